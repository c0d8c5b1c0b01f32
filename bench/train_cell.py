"""One cell of the training benchmark: real training steps of one implementation, in a process of its own.

    python -m bench.train_cell '{"impl": "fastpref", ...}'      a Spec as JSON; the answer is the last line on stdout

fastpref's steps are the package's own: `Schedule` and `collate` make the micro-batches, `reference.compute` the
reference log-probs, `stage.train_step` and `Updater` the rest. A card is stood for by a cap on torch's allocator: its
decimal gigabytes less what CUDA's context takes of them. Peers get the same pairs in the same steps, the whole device,
and more and smaller micro-batches where theirs do not fit.
"""

from __future__ import annotations

import json
import logging
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.data import Example, collate
from fastpref.train import reference, stage
from fastpref.train.batch_order import BatchOrder
from fastpref.train.config import TrainConfig, config_from_dict
from fastpref.train.machine import device_name, peak_memory_mib
from fastpref.train.memory_estimate import CONTEXT
from fastpref.train.mfu import model_flops, peak_flops
from fastpref.train.model import enable_checkpointing, pad_token, prepared
from fastpref.train.optim import Updater, learning_rate

from .harness import keep_freed_memory, told
from .peers import MIB
from .presets import PRESETS, QUICK, Preset
from .problem import BETA, IGNORE
from .step import make_model

SEED, LEARNING_RATE = 0, 5e-7
# Lengths like UltraFeedback's, in tokens: log-normal, prompts as a multiple of the mean response.
RESPONSE, RESPONSE_SPREAD, RESPONSE_LIMITS = 300, 0.7, (50, 1000)
PROMPT, PROMPT_SPREAD, PROMPT_LIMITS = 0.42, 1.0, (8, 1024)


@dataclass(frozen=True)
class Spec:
    """What a process is asked to run."""

    impl: str  # "fastpref", "trl", "naive"
    preset: str
    device: str
    keys: dict[str, Any] = field(default_factory=dict)  # of the recipe: TrainConfig's
    max_tokens: int = 16384  # of a micro-batch
    accumulation: int = 1
    steps: int = 4  # the first is not timed
    card_gb: float | None = None  # decimal, as on the box; None: no cap
    shorter: int = 1  # lengths are divided by this: quick runs
    split: int = 1  # peers: so many times as many micro-batches, where theirs do not fit
    threads: int | None = None


def preset_of(name: str) -> Preset:
    return QUICK if name == "quick" else PRESETS[name]


def dtype_of(spec: Spec) -> torch.dtype:
    return torch.bfloat16 if spec.keys.get("dtype") == "bfloat16" else torch.float32


def checkpointed(spec: Spec) -> bool:
    return spec.keys.get("gradient_checkpointing", "none") != "none"


def config_of(spec: Spec) -> TrainConfig:
    """Model and data are made here: what a file would name them is never read."""
    return config_from_dict({
        "model_name_or_path": spec.preset, "train_dataset": "synthetic", "output_dir": "none", "beta": BETA,
        "learning_rate": LEARNING_RATE, "max_tokens_per_batch": spec.max_tokens, "max_steps": spec.steps,
        "gradient_accumulation_steps": spec.accumulation, **spec.keys,
    })


# ---------------------------------------------------------------------------------------------------------------------
# Data: the same for everybody
# ---------------------------------------------------------------------------------------------------------------------


def make_pairs(count: int, vocab: int, shorter: int = 1) -> list[Example]:
    """Random tokens with UltraFeedback's lengths."""
    rng = random.Random(SEED)

    def length(median: float, spread: float, limits: tuple[int, int]) -> int:
        least, most = (max(2, limit // shorter) for limit in limits)
        return min(most, max(least, round(median * math.exp(spread * rng.gauss(0, 1)) / shorter)))

    def ids(size: int) -> list[int]:
        return rng.choices(range(3, vocab), k=size)

    found = []
    for i in range(count):
        responses = [length(RESPONSE, RESPONSE_SPREAD, RESPONSE_LIMITS) for _ in range(2)]
        prompt = length(PROMPT * shorter * sum(responses) / 2, PROMPT_SPREAD, PROMPT_LIMITS)
        found.append(Example(i, ids(prompt), (ids(responses[0]), ids(responses[1]))))
    return found


def steps_of(spec: Spec) -> list[list[list[Example]]]:
    """Steps of micro-batches of pairs, as the trainer's own schedule makes them of one epoch."""
    vocab, config = preset_of(spec.preset).shape.vocab, config_of(spec)
    few = make_pairs(64, vocab, spec.shorter)
    mean = sum(e.tokens(True) for e in few) / len(few)
    count = 1.2 * spec.steps * spec.accumulation * spec.max_tokens / mean  # an epoch's last micro-batches may be short
    pairs = make_pairs(math.ceil(count) + 8, vocab, spec.shorter)
    schedule = BatchOrder(config, pairs, SEED)
    return [[[pairs[i] for i in batch] for batch in schedule.of_step(step)[1]] for step in range(spec.steps)]


def split_up(step: Sequence[Sequence[Example]], times: int) -> list[list[Example]]:
    """The pairs of a step in `times` as many micro-batches, alike in number."""
    if times == 1:
        return [list(batch) for batch in step]
    pairs = list(chain.from_iterable(step))
    parts = min(len(pairs), len(step) * times)
    ends = [len(pairs) * i // parts for i in range(parts + 1)]
    return [pairs[a:b] for a, b in zip(ends, ends[1:])]


def make_tokenizer(vocab: int) -> Any:
    """Nothing is tokenised; models want one that knows their padding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<s>")), pad_token="<pad>", bos_token="<s>",
        eos_token="</s>",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Implementations
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """Of every step."""

    seconds: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of the gradient, before clipping
    flops: list[float] = field(default_factory=list)  # what the model's passes over the tokens take; mfu.py
    dtype: torch.dtype = torch.float32


def fastpref(spec: Spec, device: torch.device) -> Seen:
    config, seen = config_of(spec), Seen()
    tokenizer, steps = make_tokenizer(preset_of(spec.preset).shape.vocab), steps_of(spec)
    policy = prepared(make_model(preset_of(spec.preset), None, dtype_of(spec), device), config, tokenizer)
    pad, used = pad_token(tokenizer), list(chain.from_iterable(chain.from_iterable(steps)))
    logps = reference.compute(policy, used, config.kind, config.per_device_eval_batch_size, pad, lambda *_: None)
    referred = {example.record_id: example for example in logps.attach(used)}
    policy.model.train()
    updater, flops = Updater(policy.trainable(), config), model_flops(policy)
    forget_peak(device)
    for number, step in enumerate(steps):
        with stopwatch(device, seen):
            batches = [
                collate([referred[e.record_id] for e in batch], pad, config.kind, layout=policy.layout)
                for batch in step
            ]
            rate = learning_rate(config, number, len(steps))
            values = stage.train_step(policy, updater, config, batches, rate, [])
        seen.norms.append(values["grad_norm"])
        seen.flops.append(flops.of(batches) if flops else math.nan)
    seen.dtype = policy.compute_dtype
    return seen


def naive(spec: Spec, device: torch.device) -> Seen:
    """A padded batch, logits of every row, fp32 from there on, torch's AdamW in the weights' dtype: what a trainer
    without a fused head does. Reference log-probs are computed before, like everybody's."""
    seen = Seen()
    model = make_model(preset_of(spec.preset), None, dtype_of(spec), device)
    if checkpointed(spec):
        enable_checkpointing(model, "full")
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def logps(pairs: list[Example]) -> Tensor:
        batch = collate(pairs, 0).to(device)
        labels = torch.full_like(batch.input_ids, IGNORE)
        labels.view(-1)[batch.score_rows] = batch.targets
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        tokens = -F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE)
        return tokens.view(labels.shape).sum(1)

    every = [split_up(step, spec.split) for step in steps_of(spec)]
    model.eval()
    with torch.no_grad():
        references = [[logps(pairs) for pairs in step] for step in every]
    model.train()
    forget_peak(device)
    for step, refs in zip(every, references):
        with stopwatch(device, seen):
            count = sum(map(len, step))
            for pairs, ref in zip(step, refs):
                chosen, rejected = (logps(pairs) - ref).chunk(2)
                (-F.logsigmoid(BETA * (chosen - rejected)).sum() / count).backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen.norms.append(float(norm))
    return seen


def trl(spec: Spec, device: torch.device) -> Seen:
    """TRL's DPOTrainer as it comes (its chunked head, torch's fused AdamW; checkpointing as the cell says), on these
    micro-batches, its reference log-probs computed before. It gives micro-batches of one step equal weights."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import dpo_trainer

    seen = Seen()
    tokenizer = make_tokenizer(preset_of(spec.preset).shape.vocab)
    every = [split_up(step, spec.split) for step in steps_of(spec)]
    rows = [
        [{"prompt_ids": e.prompt_ids, "chosen_ids": e.responses[0], "rejected_ids": e.responses[1]} for e in pairs]
        for pairs in chain.from_iterable(every)
    ]

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *rest: Any, **more: Any) -> Any:
            return dataset  # tokens already

        def _precompute_ref_logps(self, dataset: Any, *rest: Any, **more: Any) -> Any:
            return dataset  # in the batches, below

        def get_train_dataloader(self) -> Any:
            return batches

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **more: Any) -> None:
            synchronize(device)
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **more: Any) -> None:
            synchronize(device)
            seen.seconds.append(time.perf_counter() - self.started)

    model = make_model(preset_of(spec.preset), None, dtype_of(spec), device)
    with TemporaryDirectory() as folder, mock.patch.object(dpo_trainer, "hash_module", lambda module: ""):
        arguments = DPOConfig(
            output_dir=folder, max_steps=len(every), gradient_accumulation_steps=len(every[0]), beta=BETA,
            learning_rate=LEARNING_RATE, per_device_train_batch_size=max(map(len, rows)), max_length=None,
            logging_steps=1, seed=SEED, gradient_checkpointing=checkpointed(spec), save_strategy="no",
            report_to="none", disable_tqdm=True, precompute_ref_log_probs=True,
            use_cpu=device.type == "cpu", bf16=dtype_of(spec) == torch.bfloat16, dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model, args=arguments, train_dataset=Dataset.from_list(rows[0]), processing_class=tokenizer,
            callbacks=[Clock()],
        )
        batches = [trainer.data_collator(part) for part in rows]
        for batch in batches:
            moved = {name: value.to(device) for name, value in batch.items()}
            references = trainer.compute_ref_log_probs(trainer.model, moved)
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = (logps.cpu() for logps in references)
        forget_peak(device)
        trainer.train()
        seen.norms = [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    return seen


IMPLEMENTATIONS: dict[str, Callable[[Spec, torch.device], Seen]] = {"fastpref": fastpref, "trl": trl, "naive": naive}


# ---------------------------------------------------------------------------------------------------------------------
# Time and memory
# ---------------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def stopwatch(device: torch.device, seen: Seen) -> Iterator[None]:
    synchronize(device)
    started = time.perf_counter()
    yield
    synchronize(device)
    seen.seconds.append(time.perf_counter() - started)


def forget_peak(device: torch.device) -> None:
    """Of what came before the first step."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def cap(spec: Spec, device: torch.device) -> None:
    """Raises ValueError for a card that is larger than the one here."""
    if device.type != "cuda" or spec.card_gb is None:
        return
    there = torch.cuda.get_device_properties(device).total_memory
    if spec.card_gb * 1e9 > there:
        raise ValueError(f"a card of {spec.card_gb:g} GB does not go into this one of {there / 1e9:.0f} GB")
    torch.cuda.set_per_process_memory_fraction((spec.card_gb * 1e9 - CONTEXT) / there, device)


def measure(spec: Spec) -> dict[str, Any]:
    """The measured fields of a row."""
    device = torch.device(spec.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cap(spec, device)
    seen = IMPLEMENTATIONS[spec.impl](spec, device)
    pairs, tokens = ([sum(count(e) for batch in step for e in batch) for step in steps_of(spec)]
                     for count in (lambda e: 1, lambda e: e.tokens(True)))
    timed = seen.seconds[1:]
    milliseconds = sorted(1e3 * s for s in timed)
    peak = peak_flops(device_name(device), seen.dtype)
    found = {
        "rounds": len(timed), "ms_rounds": [1e3 * s for s in timed], "ms_median": statistics.median(milliseconds),
        "ms_p10": milliseconds[0], "ms_p90": milliseconds[-1], "pairs_per_s": sum(pairs[1:]) / sum(timed),
        "tokens_per_s": sum(tokens[1:]) / sum(timed), "grad_norm": seen.norms[0],
    }
    if peak and seen.flops:
        found["mfu"] = sum(seen.flops[1:]) / sum(timed) / peak
    return found


def main(text: str) -> dict[str, Any]:
    spec = Spec(**json.loads(text))
    if spec.threads:
        torch.set_num_threads(spec.threads)
    device = torch.device(spec.device)
    if device.type == "cpu":
        keep_freed_memory()
    try:
        found = measure(spec)
    except ValueError as error:
        found = {"status": "skipped", "note": str(error)}
    except Exception as error:
        status, note = told(error)
        found = {"status": status, "note": note}
    found["peak_mib"] = peak_memory_mib(device)
    if device.type == "cuda":
        found["reserved_mib"] = torch.cuda.max_memory_reserved(device) / MIB
    return found


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(json.dumps(main(sys.argv[1])))
