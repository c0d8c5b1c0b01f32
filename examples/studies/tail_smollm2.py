"""As tail.py, of SmolLM2-135M-Instruct: 300 steps of RPO from the pairs of `make smollm2`, one a step.

    make smollm2                                 # its first round makes the pairs
    python examples/studies/tail_smollm2.py      # three seeds, an hour on two cores
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import smollm2  # noqa: E402
import study  # noqa: E402
import tail as of_the_quickstart  # noqa: E402

NAME, SEEDS = "tail_smollm2", 3
summarize, table, draw = of_the_quickstart.summarize, of_the_quickstart.table, of_the_quickstart.draw


def settings(quick: bool) -> dict[str, Any]:
    of = smollm2.settings(quick)["pairs_sha256"]  # refuses where there are no pairs
    steps = 2 if quick else 300
    file = str(smollm2.PAIRS.relative_to(study.ROOT))
    pairs = {"train_dataset": file, "eval_dataset": file, "save_steps": 0, "per_device_train_batch_size": 1,
             "max_steps": steps, "eval_steps": steps}
    methods = ["exact", "rank1", "rank1, 2^-9", "dropped, 2^-9"]
    return {"example": "smollm2/rounds", "pairs_sha256": of, "held_out": 64, "methods": methods, "preferences": pairs}


def one_seed(seed: int, settings: dict[str, Any], folder: Path, say: study.Say) -> dict[str, Any]:
    """The pairs that are looked at are among those that are trained: only methods are compared."""
    return of_the_quickstart.one_seed(seed, settings, folder, say)


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
