"""An installed wheel has its kernels, and they load without torch and without a driver: python tests/wheel_smoke.py"""

import importlib.util
import sys
from pathlib import Path

package = importlib.util.find_spec("fastpref")  # finds it, does not import it
(found,) = Path(package.submodule_search_locations[0]).glob("_native*.so")
spec = importlib.util.spec_from_file_location("_native", found)
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert native.isas() and "torch" not in sys.modules
print(found, native.isas())
