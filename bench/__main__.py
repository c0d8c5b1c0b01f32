"""The benchmarks' commands: `python -m bench COMMAND`, or `fastpref bench COMMAND`."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence

from fastpref.train.display import quiet_imports

COMMANDS = {
    "head": "the fused head and loss against bare GEMMs and every peer",
    "rows": "the row kernels against copying as many bytes",
    "attention": "shared prompts against repeated ones",
    "step": "a whole training step of a model",
    "train": "training as the trainer does it, within a card's memory, beside TRL",
    "data": "reading and tokenising a data set, and starting on it again",
    "loss": "accuracy: errors against fp64",
    "sweep": "the head as rows, vocabulary, pair length, pairs or ranks grow",
    "compare": "what became faster or slower between two result files",
    "plots": "draws the plots of result files again",
    "readme": "the results of README.md, from bench/results",
}
LINES = (f"  {name:10} {what}\n" for name, what in COMMANDS.items())
USAGE = "usage: fastpref bench COMMAND [--help]\n\n" + "".join(LINES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 1 for a wrong result or a regression, 2 for a user's error."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if name not in COMMANDS:
        print(f"fastpref bench: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    quiet_imports()
    try:
        return importlib.import_module(f"{__package__}.{name}").main(rest)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():  # nobody pressed a key: out of time, and where it was is what a log should say
            traceback.print_exc()
        return 130
    except ValueError as error:
        print(f"fastpref bench {name}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
