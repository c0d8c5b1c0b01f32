"""`fastpref train CONFIG --dry-run`: everything that a run does before its first step, but for the weights.

Configuration, tokenizer and data are read as a run reads them, so every error of theirs comes here too. The model is
made of its configuration on torch's meta device. Nothing is written, and no weight is loaded: so what only a forward
pass can tell (that trunk and head give the model's logits, that packed sequences do not see each other) is left to the
run.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from fastpref.data import Examples, Layout
from fastpref.errors import UserError

from . import memory_estimate, ranks
from .batch_order import BatchOrder
from .compiled import check_compiles
from .config import TrainConfig
from .display import Display
from .fresh_samples import check_prompts
from .loop import describe
from .machine import device_name
from .memory_estimate import GIB, Terms
from .metrics_log import check_report_to
from .model import check_saves, check_weights, load_tokenizer, pick_device, policy_on_meta, with_lora
from .optim import check_optimizer, learning_rate
from .positions import check_positions, longest_sequences
from .rendering import dated
from .run_folder import LEFT, refuse_removed, refuse_used
from .scorer import FUNCTION, load_scorer
from .source import adapter_lines, source_of_run
from .stage_data import load_data


def dry_run(config: TrainConfig, display: Display | None = None) -> dict[str, Any]:
    """Prints what the run would be, and returns it: parameters, layout, and for each stage examples, schedule, tokens
    and, where it can be told, bytes on one GPU. Raises UserError as `train` does."""
    display = display or Display()
    ranks.check(config)
    check_report_to(config)
    stages = config.stage_configs()
    for stage in stages:
        check_optimizer(stage, pick_device())
    try:
        refuse_used(Path(config.output_dir), config)
    except UserError as error:  # it may be looked at, and a run would be refused
        display.say(f"note: {error}", "yellow")
    refuse_removed(Path(config.output_dir), LEFT, config)
    tokenizer = load_tokenizer(config)
    check_weights(config)
    check_saves(config, tokenizer)
    check_compiles(config, tokenizer)
    stages = dated(config, tokenizer).stage_configs()
    data = load_data(stages, tokenizer, display)
    check_positions(stages, longest_sequences(stages, data), display)
    policy = policy_on_meta(config, tokenizer)
    display.say(f"{describe(policy)} on {device_name(policy.device)}")
    for line in adapter_lines(config):
        display.say(line)
    for name in {stage.ref_model_name_or_path for stage in stages if stage.ref_model_name_or_path}:
        policy_on_meta(config, tokenizer, name)
    for stage, its in zip(stages, data):
        if stage.sample_steps:
            check_prompts(stage, policy, tokenizer, its.prompts)
        if stage.scorer and FUNCTION.fullmatch(stage.scorer):  # the others are models: weights
            load_scorer(stage.scorer, timeout=stage.scorer_timeout).close()
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "trained": sum(p.numel() for p in policy.trainable().values()),
        "layout": policy.layout,
        "stages": {},
    }
    for index, (stage, examples) in enumerate(zip(stages, data)):
        order = BatchOrder(stage, examples.train, config.seed + index)
        values = _counts(stage, examples.train, order, policy.layout) | {"held_out": len(examples.eval)}
        terms, why = _memory(stage, values["positions"])
        values["gpu_bytes"] = terms.total if terms else None
        found["stages"][stage.name] = values
        for line in _lines(stage, values, terms, why):
            display.say(line)
    display.say(f"dry run: no weights were loaded, and nothing was written to {config.output_dir}")
    return found


def _counts(stage: TrainConfig, examples: Examples, order: BatchOrder, layout: Layout) -> dict[str, Any]:
    """Of all steps. Tokens are what the trunk reads; positions those of the largest micro-batch, padding among them."""
    sizes, lengths = examples.tokens(share_prompts=False).tolist(), examples.lengths.tolist()
    in_prompts, in_responses = examples.prompt_lengths.tolist(), examples.response_lengths.sum(1).tolist()
    scored = examples.scored_lengths.sum(1).tolist()
    steps = [order.of_step(step)[1] for step in range(order.steps)]
    seen = [i for batches in steps for batch in batches for i in batch]

    def tokens(batch: list[int]) -> int:
        if layout != "shared":
            return sum(sizes[i] for i in batch)
        prompts = [in_prompts[i] for i in batch]
        if len(set(prompts)) < len(prompts):  # else no two are equal
            prompts = [len(ids) for ids in {tuple(examples[i].prompt_ids) for i in batch}]
        return sum(prompts) + sum(in_responses[i] for i in batch)

    def positions(batch: list[int]) -> int:
        if layout != "padded":
            return tokens(batch)
        return len(batch) * len(examples.sides) * max(lengths[i] for i in batch)

    of_step = [sum(map(tokens, batches)) for batches in steps]
    rates = [learning_rate(stage, step, order.steps) for step in range(order.steps)]
    return {
        "examples": len(examples),
        "referenced": len(examples) if stage.dataset_streaming or stage.loss_fn.needs_kl else len(
            order.used() or examples),
        "steps": order.steps,
        "epochs": len(seen) / len(examples),
        "examples_a_step": max(sum(map(len, batches)) for batches in steps),
        "micro_batches_a_step": max(map(len, steps)),
        "positions": max(positions(batch) for batches in steps for batch in batches),
        "tokens_a_step": statistics.median(of_step),
        "most_tokens_a_step": max(of_step),
        "tokens": sum(of_step),
        "scored_tokens": sum(scored[i] for i in seen),
        "learning_rate": max(rates),
        "warmup_steps": rates.index(max(rates)),
    }


def _memory(stage: TrainConfig, positions: int) -> tuple[Terms | None, str]:
    """What memory_estimate.py says of the stage's recipe; or why it says nothing."""
    if stage.reward_model:
        return None, "not estimated: a reward model; `fastpref plan --model` tells of a causal LM, which needs more"
    try:
        source = source_of_run(stage)
        config = AutoConfig.from_pretrained(
            source.model, revision=source.revision, trust_remote_code=stage.trust_remote_code
        )
        recipe = memory_estimate.recipe_of(stage, config)
        sizes = memory_estimate.measure(config, positions, only=(stage.gradient_checkpointing, recipe),
                                        adapt=partial(with_lora, stage))
    except UserError as error:
        return None, f"not estimated: {error}"
    if sizes.no_lora:
        return None, f"not estimated: {sizes.no_lora}"
    return memory_estimate.terms(sizes, recipe, stage.gradient_checkpointing, stage.memory_budget), ""


def _lines(stage: TrainConfig, values: dict[str, Any], terms: Terms | None, why: str) -> Iterator[str]:
    noun = {"pair": "pairs", "kto": "labelled examples", "sft": "examples"}[stage.kind]
    options = "".join(f", {name} {value:g}" if isinstance(value, float) else f", {name} {value}"
                      for name, value in stage.loss_options.items())
    held_out = f"; {values['held_out']:,} held out" if values["held_out"] else ""
    yield f"{stage.name}: loss {stage.loss}{options}; {values['examples']:,} {noun}{held_out}"
    micro = values["micro_batches_a_step"]
    parts = f" in {micro} micro-batches" if micro > 1 else ""
    yield (f"  steps          {values['steps']:,} of up to {values['examples_a_step']:,} {noun}{parts}; "
           f"epochs {values['epochs']:.4g}")
    share = values["scored_tokens"] / values["tokens"]
    yield (f"  tokens         {values['tokens_a_step']:,.0f} a step (most: {values['most_tokens_a_step']:,}), "
           f"{values['tokens']:,} in all, {100 * share:.0f} % of them scored; "
           f"{values['positions']:,} in the largest micro-batch")
    yield (f"  learning rate  {stage.lr_scheduler_type}, {values['learning_rate']:g} after {values['warmup_steps']} "
           f"steps of warm-up; {stage.optimizer}")
    if stage.loss_fn.needs_reference:
        source = stage.ref_model_name_or_path or "the policy as the stage finds it"
        yield f"  reference      {source}: {values['referenced'] + values['held_out']:,} examples, once"
    if terms is None:
        yield f"  memory         {why}"
        return
    names = {"weights": terms.weights, "gradients": terms.gradients, "optimiser": terms.optimizer,
             "activations": terms.activations, "work": terms.work, "context": terms.context}
    said = ", ".join(f"{name} {part / GIB:.1f}" for name, part in names.items())
    host = f"; {terms.host / GIB:.1f} GiB of host memory" if terms.host else ""
    yield f"  memory         {terms.total / GIB:.1f} GiB on one GPU alone ({said}){host}"
