"""`fastpref init`: a configuration file for the case at hand, with comments, from a look at data and memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastpref import losses
from fastpref.data import Kind, Record, load_prompts, stream_records, tokenize_prompts, tokenize_records
from fastpref.errors import UserError
from fastpref.files import write_text

from .config import FULL_RATE, LORA_RATE, TrainConfig, config_from_dict
from .display import Display
from .memory_estimate import GIB, Sizes, Terms, choose, config_of, host_memory_gib, measure
from .model import load_tokenizer
from .rendering import rendering_of
from .yaml_file import read_values

TASKS = {"dpo": "dpo", "rpo": "rpo", "kto": "kto", "reward": "bradley_terry", "rounds": "dpo"}  # and their losses
WHAT = {"dpo": "pairs, direct preference optimisation", "rpo": "pairs, DPO with an SFT term that keeps the chosen up",
        "kto": "labelled completions, no pairs", "reward": "a reward model from pairs",
        "rounds": "samples its own responses, scores, pairs and trains, again and again"}
LOOKED_AT = 256  # records
TOKENS = (16384, 8192, 4096, 2048)  # of a micro-batch, the most that fit


def init(path: Path, task: str, model: str, data: str, gpu_gib: float | None = None, held_out: str | None = None,
         display: Display | None = None) -> Path:
    """Writes the file. Raises UserError for data that do not go with the task, and where `path` is there already."""
    display = display or Display()
    if path.exists():
        raise UserError(f"{path} is there already: name another file, or remove it")
    values: dict[str, Any] = {"model_name_or_path": model, "train_dataset": data, "output_dir": f"runs/{path.stem}",
                              "loss": TASKS[task]}
    config = config_from_dict(values)
    lengths = _lengths(config, task, data)
    ordered = sorted(lengths)
    most, longest = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], ordered[-1]
    kept = longest if longest <= 2 * most else most  # a few that are far longer set no length
    max_length = -(-max(kept, 64) // 64) * 64
    display.say(f"{data}: of the first {len(lengths):,}, half have up to {ordered[len(ordered) // 2]:,} tokens, 99 % "
                f"up to {most:,}; the longest {longest:,}")
    if gpu_gib is None and torch.cuda.is_available():
        gpu_gib = torch.cuda.get_device_properties(0).total_memory / GIB
    sizes, best = _plan(model, max_length, gpu_gib, task) if gpu_gib else (None, None)
    if gpu_gib and best is None:
        raise UserError(f"{model}: no way to train it fits {gpu_gib:g} GiB; `fastpref plan --model {model} --gpu-gib "
                        f"{gpu_gib:g}` shows by how much")
    longer = sum(length > max_length for length in lengths)
    text = "\n".join(_lines(path, task, values, max_length, longer, gpu_gib, sizes, best, held_out)) + "\n"
    write_text(path, text)
    if task != "rounds":  # it has to be one that training takes
        config_from_dict(read_values(path), str(path))
    display.say(f"{path}: written; next: fastpref {_command(task)} {path} --dry-run")
    return path


def _command(task: str) -> str:
    return "rounds" if task == "rounds" else "train"


def _lengths(config: TrainConfig, task: str, data: str) -> list[int]:
    """Tokens of a prompt with its longest response (rounds: of a prompt) of the first records."""
    tokenizer, rendering = load_tokenizer(config), rendering_of(config)
    if task == "rounds":
        records: list[Record] = load_prompts(data)[:LOOKED_AT]
        return [len(ids) for ids in tokenize_prompts(records, tokenizer, 1 << 30, rendering=rendering)[0]]
    kind: Kind = config.kind
    records = list(islice(stream_records(data), LOOKED_AT))
    examples, report = tokenize_records(records, tokenizer, kind, max_length=1 << 30, rendering=rendering, partial=True)
    if not examples:
        raise UserError(f"{data}: {report.none_usable()}")
    return [len(e.prompt_ids) + max(map(len, e.responses)) for e in examples]


def _plan(model: str, max_length: int, gpu_gib: float, task: str) -> tuple[Sizes | None, Terms | None]:
    """By the largest micro-batch that fits: of two sequences at least, a pair."""
    for tokens in TOKENS:
        if tokens < 2 * max_length and tokens != TOKENS[0]:
            break
        sizes = measure(config_of(model), tokens)
        if best := choose(sizes, int(gpu_gib * GIB), host_bytes=host_memory_gib() * GIB)[1]:
            return sizes, best
    return None, None


def _line(key: str, value: Any, why: str = "") -> str:
    text = value if isinstance(value, str) and value and value[0] not in "&*!|>%@`{[#-" and ": " not in value else None
    line = f"{key}: {json.dumps(value) if text is None else text}"
    return f"{line:44}  # {why}" if why else line


def _lines(path: Path, task: str, values: dict[str, Any], max_length: int, longer: int, gpu_gib: float | None,
           sizes: Sizes | None, best: Terms | None, held_out: str | None) -> Iterator[str]:
    yield f"# {task}: {WHAT[task]}."
    yield f"#   fastpref {_command(task)} {path} --dry-run    checks and counts everything, without weights"
    yield f"#   fastpref {_command(task)} {path}              runs it; fastpref keys lists what else there is\n"
    size = f"{sizes.parameters / 1e6:,.1f} million parameters" if sizes else ""
    yield _line("model_name_or_path", values["model_name_or_path"], size)
    yield _line("output_dir", values["output_dir"], "model/, report.html and checkpoints go there") + "\n"
    yield _line("train_dataset", values["train_dataset"], f"fastpref preview {path} shows it token by token")
    if held_out:
        yield _line("eval_dataset", held_out, "held-out records: whether it helps")
        yield _line("eval_steps", 100)
    else:
        yield _line("# eval_dataset", "heldout.jsonl", "without held-out records nothing tells whether it helps")
    room = max_length + 256 if task == "rounds" else max_length
    yield _line("max_length", room, "tokens of prompt + longest response")
    if longer:
        yield _line("overlong_response", "truncate", f"{longer} of the first {LOOKED_AT} are longer, by far")
    yield "\n" + _line("loss", values["loss"], "fastpref losses explains them all")
    if task != "reward":
        yield _line("beta", losses.get_loss(values["loss"]).reward_scale, "larger: nearer to the reference")
    if task == "rpo":
        yield _line("eta", losses.RPO().eta, "weight of the chosen responses' own likelihood")
    rate = LORA_RATE if best is not None and best.recipe.lora else FULL_RATE
    yield f"{f'learning_rate: {rate:.1e}':44}  # the first thing to try other values of"
    yield _line("warmup_ratio", 0.1)
    yield _line("num_train_epochs", 1)
    yield from _of_memory(gpu_gib, sizes, best)
    if task == "rounds":
        yield "\nrounds:"
        for key, value, why in (("number", 3, "each: sample, score, pair, train"),
                                ("scorer", "my_scorer:score", "yours: module:function, or a reward model's folder"),
                                ("num_generations", 4, "responses to a prompt"),
                                ("max_new_tokens", 256, "of a response")):
            yield "  " + _line(key, value, why)


def _of_memory(gpu_gib: float | None, sizes: Sizes | None, best: Terms | None) -> Iterator[str]:
    if sizes is None or best is None:
        yield _line("per_device_train_batch_size", 8, "no GPU was named: --gpu-gib plans its memory")
        return
    host = f", {best.host / GIB:.0f} GiB of host memory" if best.host else ""
    yield f"\n# {best.total / GIB:.1f} of {gpu_gib:g} GiB{host} (fastpref plan --model shows the other ways)"
    yield _line("max_tokens_per_batch", sizes.tokens, "fills a micro-batch")
    if "max_grad_norm" not in best.keys:
        yield _line("gradient_accumulation_steps", 4, "micro-batches a step: no memory, more examples")
    for key, value in best.keys.items():
        yield f"{key}: {value}"
