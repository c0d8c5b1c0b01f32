"""What the scripts beside it share: tables between the markers of a page, written anew or checked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path


def with_tables(script: str, page: str, tables: Mapping[str, str]) -> str:
    """The page with each table between `<!-- NAME: made by docs/SCRIPT -->` and `<!-- end of NAME -->`."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: made by docs/{script} -->\n", f"<!-- end of {name} -->\n"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise SystemExit(f"takes exactly one {begin.strip()} and one {end.strip()}")
        head, _, rest = page.partition(begin)
        page = head + begin + "\n" + table + "\n" + end + rest.partition(end)[2]
    return page


def rewrite(script: str, pages: Mapping[Path, Callable[[str], str]]) -> None:
    """Writes each page as its function makes it; with --check exits with 1 where that would change one."""
    for path, write in pages.items():
        before = path.read_text(encoding="utf-8")
        after = write(before)
        if "--check" not in sys.argv:
            path.write_text(after, encoding="utf-8")
        elif before != after:
            sys.exit(f"{path} differs from the code: python docs/{script}")
