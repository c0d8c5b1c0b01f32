"""TRL's DPOTrainer and fastpref on the same pairs: pairs a second, peak memory, and the loss of every step.

    python -m examples.smollm2.peer [PAIRS.jsonl] [--steps 50] [--batch 4] [--threads 2]

PAIRS.jsonl is what a round of `make smollm2` trained on; its tokens are used as they are, in the same micro-batches.
Both train all weights in fp32 with DPO and AdamW at a constant rate, from reference log-probs made before; with and
without activation checkpointing (full, of every layer). Each runs in a process of its own, one after the other. Peak
memory is the most that was resident during the steps. Prints a table and writes peer.json beside the pairs.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch

from fastpref.data import Example, collate
from fastpref.train import reference, stage
from fastpref.train.config import config_from_dict
from fastpref.train.display import quiet_imports
from fastpref.train.machine import device_name, versions
from fastpref.train.model import load_policy, load_tokenizer, pad_token
from fastpref.train.optim import Updater

from .convert import FOLDER

PAIRS = Path("runs/smollm2/rounds/round-001/pairs.jsonl")
BETA, RATE, SEED = 0.1, 1e-5, 14
IMPLEMENTATIONS = ("fastpref", "trl")


def read(path: Path, steps: int, batch: int) -> list[list[Example]]:
    """`steps` micro-batches, from the start again where there are fewer pairs."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [Example(i, r["prompt_ids"], tuple(r["response_ids"])) for i, r in enumerate(records)]
    return [[pairs[(step * batch + i) % len(pairs)] for i in range(batch)] for step in range(steps)]


def fastpref(model: str, batches: list[list[Example]], checkpointing: bool) -> tuple[list[float], list[float]]:
    """(loss, seconds) of every step."""
    config = config_from_dict({
        "model_name_or_path": model, "train_dataset": None, "output_dir": "none", "loss": "dpo", "beta": BETA,
        "gradient_checkpointing": "full" if checkpointing else "none",
    })
    tokenizer = load_tokenizer(config)
    policy, pad = load_policy(config, tokenizer), pad_token(tokenizer)
    used = list({pair.record_id: pair for batch in batches for pair in batch}.values())
    made = reference.compute(policy, used, config.kind, 8, pad, lambda *_: None).attach(used)
    referred = {pair.record_id: pair for pair in made}
    policy.model.train()
    updater = Updater(policy.trainable(), config)
    losses, seconds = [], []
    forget_peak()
    for batch in batches:
        started = time.perf_counter()
        made = [collate([referred[pair.record_id] for pair in batch], pad, config.kind, layout=policy.layout)]
        losses.append(stage.train_step(policy, updater, config, made, RATE, [])["loss"])
        seconds.append(time.perf_counter() - started)
    return losses, seconds


def trl(model: str, batches: list[list[Example]], checkpointing: bool) -> tuple[list[float], list[float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import dpo_trainer

    losses, seconds = [], []

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *rest: Any, **more: Any) -> Any:
            return dataset  # tokens already

        def _precompute_ref_logps(self, dataset: Any, *rest: Any, **more: Any) -> Any:
            return dataset  # in the batches, below

        def get_train_dataloader(self) -> Any:
            return collated

        def compute_loss(self, *args: Any, **more: Any) -> Any:
            found = super().compute_loss(*args, **more)
            losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

    rows = [
        [{"prompt_ids": e.prompt_ids, "chosen_ids": e.responses[0], "rejected_ids": e.responses[1]} for e in batch]
        for batch in batches
    ]
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with TemporaryDirectory() as folder, mock.patch.object(dpo_trainer, "hash_module", lambda module: ""):
        arguments = DPOConfig(
            output_dir=folder, max_steps=len(batches), per_device_train_batch_size=len(batches[0]), beta=BETA,
            learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, max_length=None, seed=SEED,
            gradient_checkpointing=checkpointing, precompute_ref_log_probs=True, bf16=False, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer = Trainer(policy, args=arguments, train_dataset=Dataset.from_list(rows[0]),
                          processing_class=AutoTokenizer.from_pretrained(model), callbacks=[clock(seconds)])
        collated = [trainer.data_collator(part) for part in rows]
        for batch in collated:
            references = trainer.compute_ref_log_probs(trainer.model, batch)
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = references
        forget_peak()
        trainer.train()
    return losses, seconds


def clock(seconds: list[float]) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **more: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **more: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    return Clock()


def forget_peak() -> None:
    """Linux: the kernel's record of the most that was resident begins anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak then has the loading of the model in it


def peak_mib() -> float:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(options: argparse.Namespace) -> dict[str, Any]:
    """In this process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    run = {"fastpref": fastpref, "trl": trl}[options.impl]
    batches = read(options.pairs, options.steps, options.batch)
    losses, seconds = run(str(options.model), batches, options.checkpointing)
    timed = seconds[1:]
    return {
        "impl": options.impl, "checkpointing": options.checkpointing, "losses": losses, "peak_mib": peak_mib(),
        "pairs_per_s": options.batch * len(timed) / sum(timed), "s_per_step": statistics.median(timed),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| | activation checkpointing | pairs/s | peak memory, MiB | loss, first and last step | apart at most |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        ours = next(r for r in rows if r["impl"] == "fastpref" and r["checkpointing"] == row["checkpointing"])
        apart = max(abs(a - b) for a, b in zip(row["losses"], ours["losses"], strict=True))
        lines.append(
            f"| {row['impl']} | {'full' if row['checkpointing'] else 'none'} | {row['pairs_per_s']:.2f} | "
            f"{row['peak_mib']:,.0f} | {row['losses'][0]:.4f}, {row['losses'][-1]:.4f} | "
            f"{'' if row is ours else f'{apart:.1e}'} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", type=Path, nargs="?", default=PAIRS)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--impl", choices=IMPLEMENTATIONS, help="this one alone, in this process; prints JSON")
    parser.add_argument("--checkpointing", action="store_true", help="with --impl")
    options = parser.parse_args(arguments)
    quiet_imports()
    if not options.pairs.is_file():
        raise SystemExit(f"smollm2: no {options.pairs}: `make smollm2` makes it")
    if options.impl:
        print(json.dumps(one(options)))
        return
    rows = []
    for checkpointing in (False, True):
        for impl in IMPLEMENTATIONS:
            command = [sys.executable, "-m", "examples.smollm2.peer", str(options.pairs), "--impl", impl]
            for name in ("model", "steps", "batch", "threads"):
                command += [f"--{name}", str(getattr(options, name))]
            ran = subprocess.run(command + ["--checkpointing"] * checkpointing, stdout=subprocess.PIPE, text=True)
            if ran.returncode:
                raise SystemExit(f"smollm2: {impl} failed (above)")
            rows.append(json.loads(ran.stdout.splitlines()[-1]))
    settings = {name: getattr(options, name) for name in ("steps", "batch", "threads")}
    device = device_name(torch.device("cpu"))
    record = {"rows": rows, "settings": settings, "device": device, "versions": versions()}
    path = options.pairs.with_name("peer.json")
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{table(rows)}\n{path}")


if __name__ == "__main__":
    main()
