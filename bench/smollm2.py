"""Real logits for the benchmarks: hidden rows, head and targets of SmolLM2-135M-Instruct on its own sampled answers.

    python -m bench.smollm2 [FILE]      # makes FILE (runs/smollm2/logits.pt) if it is not there, and compares

The model samples two answers of up to 128 tokens to each of the 100 questions of examples/smollm2, at temperature 0.7
and from a seed; one more forward pass gives the hidden row that predicts each token. `--logits smollm2` takes its rows
from there, in their order. The command prints them beside the logits that are drawn (problem.py), of which those called
`chat` are to be like them. Nothing here is of fastpref.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .problem import REAL, REAL_SIZES, Shape, make_batch

FILE = Path("runs/smollm2/logits.pt")
SEED, ANSWERS, LENGTH, BATCH = 14, 2, 128, 50  # a question; tokens; questions at once
TEMPERATURE = 0.7  # at 1 the answers drift, to an NLL of 3.4 nats a token after 112 tokens


def real_logits(file: Path = FILE) -> dict[str, Any]:
    """hidden [N, H] and weight [V, H] fp32, targets [N], cu_seqlens (a list; an answer each), `made` of what."""
    from examples.smollm2.convert import RECORD, convert

    folder = convert()
    made = [json.loads((folder / RECORD).read_text())["gguf"], SEED, ANSWERS, LENGTH, BATCH, TEMPERATURE]
    if file.is_file():
        found: dict[str, Any] = torch.load(file, weights_only=True, mmap=True)
        if found["made"] == made:
            return found
    found = _made() | {"made": made}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".partial-{file.name}")
    torch.save(found, partial)
    partial.replace(file)
    return found


def rows_of_answers(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [count, H], weight, targets [count]) of the first answers, one after the other."""
    real = real_logits()
    if count > len(real["targets"]):
        raise ValueError(f"rows is {count}; logits {REAL!r} has {len(real['targets'])}")
    return real["hidden"][:count], real["weight"], real["targets"][:count]


def windows(count: int, length: int, scored: int) -> Tensor:
    """[count, length] tokens of conversations, each up to where `scored` tokens of an answer end: for a whole step."""
    real = real_logits()
    ends, (tokenizer, texts) = real["cu_seqlens"], _questions()
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream: list[int] = []
    found = []
    for number, (start, end) in enumerate(zip(ends, ends[1:])):
        stream += prompts[number // ANSWERS]
        at = len(stream) + scored
        stream += real["targets"][start:end].tolist()
        if end - start >= scored and at >= length:
            found.append(stream[at - length : at])
        if len(found) == count:
            return torch.tensor(found)
    raise ValueError(f"logits {REAL!r} has {len(found)} answers of {scored} tokens, fewer than the {count} sequences: "
                     "take fewer rows or pairs")


def load_model(dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    from examples.smollm2.convert import convert

    return AutoModelForCausalLM.from_pretrained(convert(), dtype=dtype)


def _questions() -> tuple[Any, list[str]]:
    """The tokenizer, and the questions as prompts of a chat."""
    from transformers import AutoTokenizer

    from examples.smollm2.convert import convert
    from examples.smollm2.make_prompts import DATA

    tokenizer: Any = AutoTokenizer.from_pretrained(convert(), padding_side="left")
    with (DATA / "questions.jsonl").open(encoding="utf-8") as file:
        chats = [json.loads(line)["prompt"] for line in file]
    return tokenizer, tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def _made() -> dict[str, Any]:
    tokenizer, texts = _questions()
    model = load_model(torch.float32).eval()
    eos = tokenizer.eos_token_id
    hidden, targets, cu_seqlens = [], [], [0]
    torch.manual_seed(SEED)
    for start in range(0, len(texts), BATCH):
        prompts = tokenizer(texts[start : start + BATCH], return_tensors="pt", padding=True, add_special_tokens=False)
        prompts = {name: prompts[name].repeat_interleave(ANSWERS, 0) for name in ("input_ids", "attention_mask")}
        out = model.generate(**prompts, do_sample=True, top_k=0, top_p=1.0, temperature=TEMPERATURE,
                             max_new_tokens=LENGTH, eos_token_id=eos, pad_token_id=eos)
        width = prompts["input_ids"].shape[1]
        for ids, mask in zip(out, prompts["attention_mask"]):
            answer = ids[width:]
            ended = (answer == eos).nonzero()[:1, 0]
            answer = answer[: int(ended) + 1] if len(ended) else answer
            whole = torch.cat((ids[:width][mask.bool()], answer))
            hidden.append(model.model(whole[None, :-1], use_cache=False).last_hidden_state[0, -len(answer) :].clone())
            targets.append(answer.clone())
            cu_seqlens.append(cu_seqlens[-1] + len(answer))
    weight = model.get_output_embeddings().weight.detach().clone()
    return {"hidden": torch.cat(hidden), "weight": weight, "targets": torch.cat(targets), "cu_seqlens": cu_seqlens}


# ---- what logits are like ----


@torch.no_grad()
def profile(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Any]:
    """Of the softmax of each row: top probability, entropy, NLL, and how many columns have more than 2^-k."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("top", "entropy", "nll", "std", *map(str, POWERS))}
    for x, y in zip(hidden.float().split(256), targets.split(256)):
        z = x @ weight.float().t()
        logp = z.log_softmax(1)
        p = logp.exp()
        parts["top"].append(p.amax(1))
        parts["entropy"].append(-(p * logp).sum(1))
        parts["nll"].append(-logp.gather(1, y[:, None])[:, 0])
        parts["std"].append(z.std(1))
        for k in POWERS:
            parts[str(k)].append((p > 2.0**-k).sum(1).float())
    found = {name: torch.cat(values) for name, values in parts.items()}
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    return {name: [float(v) for v in (*values.quantile(quantiles), values.mean())] for name, values in found.items()}


POWERS = (4, 8, 12, 16, 20)


def table(profiles: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':34} {'10 %':>9} {'25 %':>9} {'median':>9} {'75 %':>9} {'90 %':>9} {'mean':>9}"]
    names = {"top": "top probability", "entropy": "entropy, nats", "nll": "NLL, nats", "std": "std of logits"}
    names |= {str(k): f"columns above 2^-{k}" for k in POWERS}
    for name, label in names.items():
        for who, found in profiles.items():
            lines.append(f"{label:24} {who:9} " + " ".join(f"{value:9.4g}" for value in found[name]))
    return "\n".join(lines)


def main() -> None:
    real = real_logits(*map(Path, sys.argv[1:2]))
    rows = len(real["targets"])
    some = torch.arange(0, rows, max(1, rows // 2048))[:2048]
    profiles = {REAL: profile(real["hidden"][some], real["weight"], real["targets"][some])}
    for logits in ("chat", "trained", "peaked"):
        drawn = make_batch(Shape(2048, *REAL_SIZES, logits=logits), torch.float32)
        profiles[logits] = profile(drawn.rows(), drawn.weight, drawn.scored_targets)
    print(f"{rows} rows of {len(real['cu_seqlens']) - 1} answers\n" + table(profiles))


if __name__ == "__main__":
    main()
