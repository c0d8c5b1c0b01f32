"""The command `fastpref`. A user's error is one line on stderr, exit code 2.

Other exit codes: 1 for a run that cannot go on (disk full, NaN gradients, out of memory), 130 after Ctrl-C, 143 after
SIGTERM. FASTPREF_DEBUG=1 shows the traceback as well.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .errors import RankLost, SaveError, Stopped, TrainingError, first_line

EXAMPLES = """examples:
  fastpref train examples/quickstart.yaml
  fastpref train dpo.yaml learning_rate=5e-7 stages.rpo.beta=0.05 output_dir=runs/second
  fastpref train dpo.yaml --resume
  fastpref train dpo.yaml --dry-run
  fastpref preview dpo.yaml 5
  fastpref eval runs/second
  fastpref chat runs/second --against base
  fastpref export runs/second --merge --dtype bf16
  fastpref init dpo.yaml --task dpo --model Qwen/Qwen2.5-7B --data pairs.jsonl --gpu-gib 24
  fastpref rounds examples/rounds.yaml rounds.number=5
  fastpref plan --pairs 8 --length 512 --hidden 4096 --vocab 128256
  fastpref plan --model meta-llama/Llama-3.1-8B --gpu-gib 48
  fastpref plan --model meta-llama/Llama-3.1-8B --gpus 8 --nodes 4
"""
EXTRAS = {
    "peft": "LoRA (use_peft)",
    "bitsandbytes": "bases of 4 and 8 bits (load_in_4bit, load_in_8bit)",
    "datasets": "data sets by name",
    "pyarrow": "Parquet files",
    "tensorboard": "report_to: tensorboard",
    "wandb": "report_to: wandb",
    "torchao": "optim: adamw_torch_8bit (the default for dtype=bfloat16), adamw_offload",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = parse(arguments)
    try:
        if not options.light:
            _quiet_models()
        return options.run(options) or 0
    except Stopped as stopped:
        print(f"fastpref: {stopped}", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print("fastpref: aborted; the last complete checkpoint is as it was", file=sys.stderr)
        return 128 + signal.SIGINT
    except (RankLost, SaveError, TrainingError) as error:
        return _fail(error, 1)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _fail(error, 2)
    except RuntimeError as error:
        if isinstance(error, getattr(sys.modules.get("torch._dynamo.exc"), "TorchDynamoException", ())):
            return _fail(error, 1, f"torch_compile: the compiler failed ({first_line(error)}); leave it out "
                                   "(FASTPREF_DEBUG=1 shows all that it says)")
        if "torch" not in sys.modules or not isinstance(error, sys.modules["torch"].OutOfMemoryError):
            raise
        return _fail(error, 1, "out of GPU memory; lower per_device_train_batch_size or max_length, or set "
                               "gradient_checkpointing=full, use_peft=true (fastpref plan --model tells what fits)")


def _quiet_models() -> None:
    """Loads transformers, which takes seconds: not for --help, `keys` or a mistyped option."""
    from .train.display import quiet_imports

    quiet_imports()
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for every save and load would break ours


def _fail(error: BaseException, code: int, line: str | None = None) -> int:
    if os.environ.get("FASTPREF_DEBUG") == "1":
        traceback.print_exception(error)
    text = line or " ".join(str(error).split()) or type(error).__name__
    rank = int(os.environ.get("RANK", "0"))
    if rank:  # what all ranks have met the first one says; torchrun ends the others meanwhile
        time.sleep(3)
        text = f"rank {rank} on {socket.gethostname()}: {text}"
    print(f"fastpref: {text}", file=sys.stderr)
    return code


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Overrides may stand before and after options: argparse up to Python 3.11 takes only those before."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    wrong = [word for word in more if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if more:
        options.overrides = [*options.overrides, *more]
    return options


class _Command(argparse.ArgumentParser):
    """A command whose --help ends with what its default `more` tells."""

    def format_help(self) -> str:
        more = self.get_default("more")
        return super().format_help() + (more() if more else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastpref",
        description="Trains language models on preferences, the loss fused with the LM head.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastpref {__version__}")
    parser.set_defaults(light=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)
    _add_runs(commands)
    _add_tools(commands)
    return parser


def _add_runs(commands: Any) -> None:
    """What makes runs, and what is done with them."""
    command = commands.add_parser("train", help="train as a configuration file says")
    _takes_config(command, "YAML file, of the keys below")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    how.add_argument("--dry-run", action="store_true", help="check and count everything; no weights, nothing written")
    command.set_defaults(run=_train, more=_common_keys)

    command = commands.add_parser("rounds", help="sample, score, pair and train, again and again")
    _takes_config(command, "YAML file, as for train, with a section `rounds` of the keys below")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with the rounds in output_dir")
    how.add_argument("--dry-run", action="store_true", help="check and count everything; no weights, nothing written")
    command.set_defaults(run=_rounds, more=_rounds_keys)

    command = commands.add_parser("eval", help="held-out metrics of a trained run, or of a configuration's model")
    command.add_argument("source", metavar="RUN_DIR|CONFIG", help="folder of a run, a checkpoint of it, or a YAML file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="instead of what the configuration says")
    command.set_defaults(run=_eval)

    command = commands.add_parser("report", help="report.html of a run, made again from its files")
    command.add_argument("run_dir", metavar="RUN", help="folder of a run, or of rounds")
    command.set_defaults(run=_report, light=True)

    command = commands.add_parser("compare", help="the curves of several runs in one page, with verdicts, differences")
    command.add_argument("run_dirs", metavar="RUN", nargs="+", help="folders of runs, 2 to 8")
    command.add_argument("--output", default="compare.html", help="the page; default compare.html")
    command.set_defaults(run=_compare, light=True)

    command = commands.add_parser("cache-ref", help="compute the reference log-probs that training starts with")
    _takes_config(command, "YAML file, as for train")
    command.set_defaults(run=_cache_ref)

    command = commands.add_parser("preview", help="the first records as training sees them, token by token")
    command.add_argument("config", help="YAML file, as for train")
    command.add_argument("overrides", nargs="*", metavar="n|key=value", help="how many records (3); settings")
    command.set_defaults(run=_preview)

    command = commands.add_parser("init", help="write a configuration file for your task, model, data and GPU")
    command.add_argument("file", nargs="?", type=Path, default=Path("train.yaml"), help="default train.yaml")
    command.add_argument("--task", required=True, choices=("dpo", "rpo", "kto", "reward", "rounds"))
    command.add_argument("--model", required=True, help="hub id, or a local folder")
    command.add_argument("--data", required=True, help="file or data set; it is looked at")
    command.add_argument("--eval-data", help="held-out records")
    command.add_argument("--gpu-gib", type=float, help="memory of the GPU; default: the one there is")
    command.set_defaults(run=_init)

    command = commands.add_parser("chat", help="talk with a run's model, beside what it started from or another run")
    _takes_run(command)
    command.add_argument("--against", metavar="RUN|base", help="base: what the run started from")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="answer these, into a page: .txt or records")
    command.add_argument("--page", type=Path, help="--prompts: default chat.html in the run's folder")
    command.add_argument("--temperature", type=float, default=0.0, help="0, the default: the likeliest token each time")
    command.add_argument("--max-new-tokens", type=int, default=256, help="of an answer; default 256")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=_chat)

    command = commands.add_parser("export", help="a run's model with a card: merged, for llama.cpp, to the hub")
    _takes_run(command)
    command.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/export")
    command.add_argument("--merge", action="store_true", help="the adapter added to its model: whole weights")
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of whole weights; merged: fp32 by default")
    command.add_argument("--gguf", action="store_true", help="a file for llama.cpp too, by its converter")
    command.add_argument("--push", metavar="REPO", help="to this repository of the hub")
    command.set_defaults(run=_export)


def _add_tools(commands: Any) -> None:
    command = commands.add_parser("keys", help="the keys of a configuration file: default, meaning, what each takes")
    command.add_argument("word", nargs="?", metavar="WORD", help="those that speak of it, or are called so elsewhere")
    command.set_defaults(run=_keys, light=True)

    command = commands.add_parser("info", help="versions, devices, and what is available here and why something is not")
    command.set_defaults(run=_info, light=True)

    command = commands.add_parser("losses", help="every loss: formula, what it needs, paper")
    command.set_defaults(run=_losses, light=True)

    command = commands.add_parser("plan", help="memory that training a model takes, or how the fused head runs")
    command.add_argument("--model", help="hub id, or a folder with a config.json: the memory of all ways to train it")
    command.add_argument("--gpu-gib", type=float, help="--model: memory of the GPU")
    command.add_argument("--host-gib", type=float, help="--model: host memory; default: this machine's")
    command.add_argument("--gpus", type=int, help="--model: H100s of a node; time of a step by roofline")
    command.add_argument("--nodes", type=int, help="--model, --gpus: default 1")
    command.add_argument("--max-tokens", type=int, help="--model: tokens a micro-batch; default 16384")
    command.add_argument("--lora-r", type=int, help="--model: rank of LoRA; default 16")
    command.add_argument("--pairs", type=int, help="pairs in a micro-batch; default 1")
    command.add_argument("--length", type=int, help="scored tokens of a response; --gpus: of a sequence (2048)")
    command.add_argument("--hidden", type=int)
    command.add_argument("--vocab", type=int)
    command.add_argument("--dtype", choices=("bf16", "fp32"), help="default bf16")
    command.add_argument("--budget-mib", type=int, default=2048, help="workspace; default 2048")
    command.add_argument("--frozen-head", action="store_true", help="no gradient for the LM head's weight (LoRA)")
    command.add_argument("--tail", choices=("exact", "rank1"), default="exact", help="of the LM head's softmax")
    command.set_defaults(run=_plan, light=True)

    command = commands.add_parser("bench", help="microbenchmarks, and comparing two of their results")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="none: lists them")
    command.set_defaults(run=_bench, light=True, more=_bench_commands)


def _takes_config(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("config", help=what)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="instead of what the file says")


def _takes_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a run, or a checkpoint of it")
    command.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def _common_keys() -> str:
    from .train.config import TrainConfig
    from .train.keys import COMMON, help_text, keys_of

    every = keys_of(TrainConfig).values()
    common = [key._replace(section="") for key in every if COMMON in key.rules]
    return (f"\nthe commonest keys [with their defaults]:\n{help_text(common)}\n"
            f"\nall {len(every)}: fastpref keys; those about lengths: fastpref keys length\n"
            "a file with comments for your case: fastpref init --help\n")


def _rounds_keys() -> str:
    from .rounds.config import RoundsConfig
    from .train.keys import help_text, keys_of

    return ("\nkeys of the section `rounds` [with their defaults]; the file's others: fastpref keys\n\n"
            + help_text(keys_of(RoundsConfig).values()) + "\n")


def _keys(options: argparse.Namespace) -> None:
    from .errors import UserError
    from .rounds.config import RoundsConfig
    from .train.config import TrainConfig, options_of_losses
    from .train.keys import help_text, keys_of, matching

    found = []
    for config, prefix in ((TrainConfig, ""), (RoundsConfig, "rounds.")):
        keys = list(keys_of(config).values())
        if keys := matching(keys, options.word) if options.word else keys:
            found.append(help_text(keys, prefix))
    of_losses = options_of_losses()
    if keys := matching(of_losses, options.word) if options.word else of_losses:
        found.append(help_text(keys))
    if not found:
        raise UserError(f"no key speaks of {options.word!r}; `fastpref keys` lists them all")
    print("\n\n".join(found))


def _train(options: argparse.Namespace) -> None:
    from .train.config import load_config
    from .train.loop import train
    from .train.ranks import heard

    if options.dry_run:
        from .train.dry_run import dry_run

        with heard(None) as display:
            dry_run(load_config(options.config, options.overrides), display)
        return
    train(load_config(options.config, options.overrides), resume=options.resume)


def _rounds(options: argparse.Namespace) -> None:
    from .rounds.config import load_config
    from .rounds.driver import rounds
    from .rounds.dry_run import dry_run
    from .train.ranks import heard

    if options.dry_run:
        with heard(None) as display:
            dry_run(load_config(options.config, options.overrides), display)
        return
    rounds(load_config(options.config, options.overrides), resume=options.resume)


def _eval(options: argparse.Namespace) -> None:
    from .train.evaluate_run import evaluate_run

    evaluate_run(_latest(options.source), options.overrides)


def _init(options: argparse.Namespace) -> None:
    from .train.init import init

    init(options.file, options.task, options.model, options.data, options.gpu_gib, options.eval_data)


def _chat(options: argparse.Namespace) -> None:
    from .train.chat import answer_all, chat, prompts_of, speakers
    from .train.run_folder import run_of
    from .train.sample import Sampling

    settings = Sampling(temperature=options.temperature, max_new_tokens=options.max_new_tokens, seed=options.seed)
    if options.page and not options.prompts:
        raise ValueError("--page is of --prompts")
    path = Path(_latest(str(options.run_dir)))
    prompts = prompts_of(options.prompts) if options.prompts else None
    them = speakers(path, options.against, options.trust_remote_code)
    if prompts is None:
        chat(them, settings)
    else:
        answer_all(them, prompts, settings, options.page or run_of(path) / "chat.html")


def _export(options: argparse.Namespace) -> None:
    from .train.export import export

    export(Path(_latest(str(options.run_dir))), options.output, merge=options.merge, dtype=options.dtype,
           gguf=options.gguf, push=options.push, trust_remote_code=options.trust_remote_code)


def _latest(folder: str) -> str:
    """Of a folder of rounds that of the training run of the newest round; any other folder as it is."""
    found = sorted(Path(folder).glob("round-[0-9]*/train/summary.json"))
    of_rounds = [path.parent for path in found if (path.parent / "model").is_dir()]
    if of_rounds and (Path(folder) / "config.yaml").is_file():
        print(f"{folder}: the newest round there is, {of_rounds[-1]}")
        return str(of_rounds[-1])
    return folder


def _report(options: argparse.Namespace) -> None:
    from .report.page import write_report
    from .rounds.report import write_page

    folder = Path(options.run_dir)
    of_rounds = (folder / "start" / "round.json").is_file() and (folder / "summary.json").is_file()
    print(write_page(folder) if of_rounds else write_report(folder))


def _compare(options: argparse.Namespace) -> None:
    from .report.compare import write_comparison

    print(write_comparison(options.run_dirs, options.output))


def _cache_ref(options: argparse.Namespace) -> None:
    from .train.config import load_config
    from .train.reference_cache import cache_reference

    cache_reference(load_config(options.config, options.overrides))


def _preview(options: argparse.Namespace) -> None:
    from .train.config import load_config
    from .train.preview import preview

    overrides = list(options.overrides)
    records = int(overrides.pop(0)) if overrides and overrides[0].isdigit() else 3
    preview(load_config(options.config, overrides), records)


def _info(options: argparse.Namespace) -> None:
    import importlib.util

    import torch
    from rich.console import Console
    from rich.table import Table

    from . import rows
    from .train.machine import device_name, versions

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
            # torch calls AMD's GPUs cuda, too
            kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"sm_{found.major}{found.minor}"
            bf16 = "" if torch.cuda.is_bf16_supported(including_emulation=False) else ", no bf16: fp16 (loss scaler)"
            table.add_row(f"GPU {i}", "yes", f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {kind}{bf16}")
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device or driver found"
        table.add_row("GPU", "no", why)
    if torch.backends.mps.is_built():
        mps = torch.backends.mps.is_available()
        what = "FASTPREF_DEVICE=mps trains on it: torch rows, untested on hardware" if mps else "no Apple GPU found"
        table.add_row("Apple MPS", "yes" if mps else "no", what)
    else:
        table.add_row("Apple MPS", "no", "this torch is built without it")
    adds = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
    table.add_row("GEMM sums", "yes" if adds else "no", "dW += bf16 products in fp32 on CUDA: torch 2.10 or newer")
    for backend in rows.BACKENDS:
        state = rows.availability(backend)
        table.add_row(f"rows: {backend}", "yes" if state.available else "no", state.why)
    for package, use in EXTRAS.items():
        installed = importlib.util.find_spec(package) is not None
        table.add_row(package, "yes" if installed else "no", use if installed else f"{use}: not installed")
    console = Console(highlight=False)
    console.print(table, soft_wrap=not console.is_terminal)


LEGEND = """
Means over pairs, or over responses: a desirable one | another. _c chosen, _r
rejected; logp: summed over the scored tokens of a response, |y| their number;
r = logp - ref_logp, D = r_c - r_r; σ the logistic function, e label_smoothing.
pairs, with *: looks at the whole batch; parts of a batch do not add up to it.
[V, H]: fp32 sums of the head's size for a response longer than the budget.
bradley_terry: trains a reward model, R its score of a response; κ is its
center_coefficient."""


def _losses(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .losses import CLASSES, BradleyTerry

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("name", "formula", "ref.", "pairs", "[V, H]", "arXiv"):
        table.add_column(Text(title), no_wrap=title != "formula", style="bold" if title == "name" else "")
    for name, cls in CLASSES.items():
        loss = cls()
        whole = loss.coupling == "batch"
        table.add_row(
            name,
            Text(cls.formula),
            "yes" if loss.needs_reference else "no",
            ("yes" if loss.pairwise else "no") + "*" * whole,
            "-" if whole else str(loss.scratches),
            cls.paper.removeprefix("arXiv "),
        )
    reward = BradleyTerry
    table.add_row(reward.name, Text(reward.formula), "no", "yes", "-", reward.paper.removeprefix("arXiv "))
    console = Console(highlight=False)
    console.print(table)
    console.print(Text(LEGEND), soft_wrap=True)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# Options of `plan`, with their defaults (None: required; inf: left out): of a model in memory, in time, of a head alone
OF_MODEL: dict[str, Any] = {"gpu_gib": None, "max_tokens": 16384, "lora_r": 16, "host_gib": math.inf}
OF_TIME = OF_MODEL | {"gpu_gib": math.inf, "gpus": None, "nodes": 1, "length": math.inf}
OF_HEAD: dict[str, Any] = {"length": None, "hidden": None, "vocab": None, "pairs": 1, "dtype": "bf16",
                           "frozen_head": False}


def _plan(options: argparse.Namespace) -> None:
    from .plan import MIB, Problem, plan

    timed = options.gpus is not None or options.nodes is not None
    own = OF_HEAD if options.model is None else OF_TIME if timed else OF_MODEL
    for name in OF_TIME | OF_HEAD:
        if name not in own and getattr(options, name) not in (None, False):
            raise ValueError(f"{_flag(name)}: {'is for --model' if own is OF_HEAD else '--model tells it'}")
    given = {name: default if getattr(options, name) is None else getattr(options, name)
             for name, default in own.items()} | {"budget_mib": options.budget_mib}
    for name, value in given.items():
        if value is None:
            takes = "--model and --gpu-gib or --gpus, or --length, --hidden, --vocab"
            raise ValueError(f"{_flag(name)} is missing; plan takes {takes}")
        if not isinstance(value, (str, bool)) and not value >= 1:
            raise ValueError(f"{_flag(name)} is {value}; it takes at least 1")
    if options.model is not None:
        _plan_model(options, given)
        return
    size = 2 if given["dtype"] == "bf16" else 4
    problem = Problem(
        lengths=(options.length,) * (2 * given["pairs"]),
        hidden=options.hidden,
        vocab=options.vocab,
        itemsize=size,
        grad_itemsize=size,
        needs_weight_grad=not options.frozen_head,
        tail=options.tail == "rank1",
        device="cuda",
    )
    print(plan(problem, options.budget_mib * MIB))


def _bench_commands() -> str:
    return "\n" + _benchmarks().USAGE


def _plan_model(options: argparse.Namespace, given: dict[str, Any]) -> None:
    _quiet_models()
    from .plan import MIB
    from .train.memory_estimate import config_of, host_memory_gib, measure, plan_text
    from .train.roofline import Model, roofline_text

    config, tokens = config_of(options.model), given["max_tokens"]
    if options.gpu_gib:
        host = given["host_gib"] if options.host_gib else host_memory_gib()
        found = measure(config, tokens, given["lora_r"])
        print(plan_text(options.model, found, options.gpu_gib, options.budget_mib * MIB, host))
    if options.gpus:
        length = options.length or min(2048, tokens)
        print(roofline_text(options.model, Model.of(config), tokens, length, options.gpus, given["nodes"]))


def _bench(options: argparse.Namespace) -> int:
    return _benchmarks().main(options.arguments)


def _benchmarks() -> Any:
    """They are part of the source tree and of the sdist, not of the wheel."""
    root = Path(__file__).parent.parent
    if not (root / "bench" / "__main__.py").is_file():
        raise ValueError(
            "bench: the benchmarks come with the source, not with the wheel; unpack what `pip download --no-deps "
            "--no-binary fastpref fastpref` gets, or clone the repository, and run `python -m bench` there"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from bench import __main__

    return __main__
