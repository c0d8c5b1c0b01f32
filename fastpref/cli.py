"""The command `fastpref`: train, eval, info, plan. An error of the user's is one line on stderr and exit code 2.

Other exit codes: 1 for a run that cannot go on (disk full, NaN gradients, out of memory), 130 after Ctrl-C, 143 after
SIGTERM. FASTPREF_DEBUG=1 shows the traceback as well.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from . import __version__

EXAMPLES = """examples:
  fastpref train examples/quickstart.yaml
  fastpref train dpo.yaml learning_rate=5e-7 stages.rpo.beta=0.05 output_dir=runs/second
  fastpref train dpo.yaml --resume
  fastpref eval runs/second
  fastpref plan --pairs 8 --length 512 --hidden 4096 --vocab 128256
"""
EXTRAS = {
    "peft": "LoRA (use_peft)",
    "datasets": "data sets by name",
    "pyarrow": "Parquet files",
    "tensorboard": "report_to: tensorboard",
    "wandb": "report_to: wandb",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = _parser().parse_args(arguments)
    # Loading transformers takes seconds; --help and a mistyped option should not.
    import torch
    from transformers.utils import logging

    from .train.checkpoint import SaveError
    from .train.loop import Stopped, TrainingError

    logging.disable_progress_bar()  # a bar for every save and load would break ours
    try:
        options.run(options)
        return 0
    except Stopped as stopped:
        print(f"fastpref: {stopped}", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print("fastpref: aborted; the last complete checkpoint is as it was", file=sys.stderr)
        return 128 + signal.SIGINT
    except torch.OutOfMemoryError as error:
        return _fail(error, 1, "out of GPU memory; lower per_device_train_batch_size or max_length, or set "
                               "gradient_checkpointing=true, use_peft=true")  # fmt: skip
    except (SaveError, TrainingError) as error:
        return _fail(error, 1)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _fail(error, 2)


def _fail(error: BaseException, code: int, line: str | None = None) -> int:
    if os.environ.get("FASTPREF_DEBUG") == "1":
        traceback.print_exception(error)
    text = line or " ".join(str(error).split()) or type(error).__name__
    print(f"fastpref: {text}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastpref",
        description="Trains language models on preferences, the loss fused with the LM head.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastpref {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train as a configuration file says")
    command.add_argument("config", help="YAML file; its keys are those of fastpref.train.config.TrainConfig")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="instead of what the file says")
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    command.set_defaults(run=_train)

    command = commands.add_parser("eval", help="held-out metrics of a trained run, or of a configuration's model")
    command.add_argument("source", metavar="RUN_DIR|CONFIG", help="folder of a run, or a YAML file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="instead of what the configuration says")
    command.set_defaults(run=_eval)

    command = commands.add_parser("info", help="versions, devices, and what is available here and why something is not")
    command.set_defaults(run=_info)

    command = commands.add_parser("plan", help="how a step of the fused head would run in a memory budget")
    command.add_argument("--pairs", type=int, default=1, help="pairs in a micro-batch; default 1")
    command.add_argument("--length", type=int, required=True, help="scored tokens of a response")
    command.add_argument("--hidden", type=int, required=True)
    command.add_argument("--vocab", type=int, required=True)
    command.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    command.add_argument("--budget-mib", type=int, default=2048, help="workspace; default 2048")
    command.add_argument("--frozen-head", action="store_true", help="no gradient for the LM head's weight (LoRA)")
    command.set_defaults(run=_plan)
    return parser


def _train(options: argparse.Namespace) -> None:
    from .train.config import load_config
    from .train.loop import train

    train(load_config(options.config, options.overrides), resume=options.resume)


def _eval(options: argparse.Namespace) -> None:
    from .train.held_out import evaluate_run

    evaluate_run(options.source, options.overrides)


def _info(options: argparse.Namespace) -> None:
    import importlib.util

    import torch
    from rich.console import Console
    from rich.table import Table

    from . import rows
    from .train.metrics import device_name, versions

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    for package, number in versions().items():
        table.add_row(package, number, "")
    table.add_row("CPU", "yes", device_name(torch.device("cpu")))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(i)
            capability = f"sm_{found.major}{found.minor}"
            table.add_row(f"GPU {i}", "yes", f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {capability}")
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device or driver found"
        table.add_row("GPU", "no", why)
    for backend in rows.BACKENDS:
        state = rows.availability(backend)
        table.add_row(f"rows: {backend}", "yes" if state.available else "no", state.why)
    for package, use in EXTRAS.items():
        installed = importlib.util.find_spec(package) is not None
        table.add_row(package, "yes" if installed else "no", use if installed else f"{use}: not installed")
    console = Console(highlight=False)
    console.print(table, soft_wrap=not console.is_terminal)


def _plan(options: argparse.Namespace) -> None:
    from .plan import MIB, Problem, plan

    for name in ("pairs", "length", "hidden", "vocab", "budget_mib"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it takes at least 1")
    size = 2 if options.dtype == "bf16" else 4
    problem = Problem(
        lengths=(options.length,) * (2 * options.pairs),
        hidden=options.hidden,
        vocab=options.vocab,
        itemsize=size,
        grad_itemsize=size,
        needs_weight_grad=not options.frozen_head,
        device="cuda",
    )
    print(plan(problem, options.budget_mib * MIB))
