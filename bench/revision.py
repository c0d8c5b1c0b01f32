"""Which code a measurement is of. Imports nothing heavy: `gpu_check.py` asks before torch is there."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("fastpref", "csrc", "bench/*.py", "setup.py", "CMakeLists.txt")  # what is measured: results and docs are not


def revision() -> str:
    """FASTPREF_REVISION if set. Else the git commit that last changed the code, so that committing results does not
    part them from what is measured next; where the code differs from it, "+" and the first digits of the diff's hash.
    Without git a hash of the sources.
    """
    if given := os.environ.get("FASTPREF_REVISION"):
        return given
    commit = output_of("git", "-C", str(ROOT), "log", "-1", "--format=%H", "--", *CODE)
    if not commit:
        files = sorted(path for name in CODE for path in ROOT.glob(f"{name}/**/*.*" if "." not in name else name))
        sources = (path for path in files if path.suffix not in (".so", ".pyc"))
        return "sources-" + hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    change = output_of("git", "-C", str(ROOT), "diff", "HEAD", "--", *CODE)
    return commit[:12] + (f"+{hashlib.sha256(change.encode()).hexdigest()[:8]}" if change else "")


def output_of(*command: str) -> str | None:
    """None where it cannot be run or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
