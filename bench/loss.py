"""Accuracy: what every implementation's log-probs, dX and dW are off by, and the time it takes for that.

    fastpref bench loss [--logits uniform peaked wrong huge negative chat smollm2] [--impl fastpref naive trl]

Against fp64, on logits as a trained model has them, near-uniform ones, a model sure of its targets, one as sure of
other tokens, logits of +-1e4, all of them near -1e4 (`negative`), and those of a chat model on its own answers: drawn
ones (`chat`) and, where asked for, real ones (`smollm2`). Whoever is inaccurate is timed here all the same; only what
is not finite is wrong. All implementations of fastpref's row kernels take part. Protocol: bench/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import command
from .harness import all_right
from .head import Group, add_arguments, chosen_groups, run_groups
from .peers import fastpref_backends
from .presets import PRESETS
from .problem import DTYPES, LOGITS, Shape

# Small enough for the row kernels in plain torch; the errors do not depend on the number of rows.
SHAPES = {"cpu": Shape(256, 512, 32000, pairs=4), "cuda": replace(PRESETS["llama3-8b"].shape, rows=2048)}
ANY_FINITE = 1e9  # times the usual tolerance


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("loss", __doc__ or "")
    add_arguments(parser)
    command.add_logits(parser, list(LOGITS))
    options = parser.parse_args(arguments)
    with command.session(options, "loss") as run:
        shapes = command.shapes(options, [SHAPES[run.device.type]])
        groups: list[Group] = []
        for group in chosen_groups(options, run.device, shapes):
            backends = (*fastpref_backends(run.device, DTYPES[group.cell.dtype]), "reference")
            groups.append(group._replace(
                cell=group.cell._replace(benchmark="loss"), backends=tuple(dict.fromkeys(backends))
            ))
        run_groups(groups, run, tolerance=ANY_FINITE)
        command.finish(run)
    return int(not all_right(run.results.rows))
