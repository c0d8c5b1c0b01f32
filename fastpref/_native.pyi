# What mypy knows of the extension. Its functions take addresses; rows/native.py and rows/cuda.py are their typed door.
from typing import Any

def __getattr__(name: str) -> Any: ...
