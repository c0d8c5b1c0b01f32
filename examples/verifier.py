"""A verifier for `fastpref rounds`: 1 for a response that ends with the answer its prompt has in examples/data, else 0.

    scorer: examples.verifier:right
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"


@cache
def answers() -> dict[str, str]:
    found = {}
    for name in ("train", "heldout"):
        for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found[record["prompt"]] = record["answer"]
    return found


def right(prompt: str, response: str) -> float:
    """The answer has to stand there as words of its own: "9+3=12, so 12" is right for 12, "112" is not."""
    answer = answers()[prompt]
    before = response.strip().removesuffix(answer)
    return float(before != response.strip() and not (before[-1:].isalnum() and answer[:1].isalnum()))
