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
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = _parser().parse_args(arguments)
    # Loading transformers takes seconds; --help and a mistyped option should not.
    from .train.checkpoint import SaveError
    from .train.loop import Stopped, TrainingError

    try:
        import torch

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
    command.add_argument("--rows", type=int, required=True, help="scored tokens of a micro-batch")
    command.add_argument("--hidden", type=int, required=True)
    command.add_argument("--vocab", type=int, required=True)
    command.add_argument("--budget-mib", type=int, default=2048, help="workspace; default 2048")
    command.add_argument("--frozen-head", action="store_true", help="no gradient for the LM head's weight (LoRA)")
    command.set_defaults(run=_plan)
    return parser


def _train(options: argparse.Namespace) -> None:
    from .train.config import load_config
    from .train.loop import train

    train(load_config(options.config, options.overrides), resume=options.resume)


def _eval(options: argparse.Namespace) -> None:
    from .train.standalone import evaluate_run

    evaluate_run(options.source, options.overrides)


def _info(options: argparse.Namespace) -> None:
    from .info import show

    show()


def _plan(options: argparse.Namespace) -> None:
    raise NotImplementedError
