"""`fastpref rounds CONFIG --dry-run`: everything that rounds check before the first sample, but for the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastpref.errors import UserError
from fastpref.train.config import TrainConfig
from fastpref.train.display import Display
from fastpref.train.dry_run import dry_run as dry_run_of_training
from fastpref.train.loop import describe
from fastpref.train.machine import device_name
from fastpref.train.metrics_log import check_report_to
from fastpref.train.model import check_ids, check_saves, check_weights, load_tokenizer, pick_device, policy_on_meta
from fastpref.train.optim import check_optimizer
from fastpref.train.positions import SequenceLength, check_positions, longest_sequences
from fastpref.train.rendering import dated, rendering_of
from fastpref.train.scorer import FUNCTION, load_scorer
from fastpref.train.stage_data import load_data

from .collect import read_prompts
from .config import Config
from .driver import _check_budget, _takes_vllm


def dry_run(config: Config, display: Display | None = None) -> dict[str, Any]:
    """Prints what the rounds would be, and returns it. Raises UserError as `rounds` does."""
    display = display or Display()
    train: TrainConfig = config.train
    settings = config.rounds
    check_report_to(train)
    for stage in train.stage_configs():
        check_optimizer(stage, pick_device())
    _takes_vllm(config)
    if config.warm_up:
        display.say("before the first round:", "bold")
        dry_run_of_training(replace(train, stages=config.warm_up), display)
    tokenizer = load_tokenizer(train)
    check_weights(train)
    check_saves(train, tokenizer)
    config = replace(config, train=dated(train, tokenizer))
    stage = config.stage
    if FUNCTION.fullmatch(settings.scorer):  # the others are models: weights
        load_scorer(settings.scorer, timeout=settings.scorer_timeout).close()
    room = stage.max_length - settings.max_new_tokens
    room = min(room, stage.max_prompt_length or room)
    source = stage.train_dataset if settings.prompts is None else settings.prompts
    how = stage.truncation_mode, rendering_of(stage)
    prompts = read_prompts(source, tokenizer, room, *how, "prompts", display)
    a_round = settings.prompts_per_round or len(prompts.ids)
    if a_round > len(prompts.ids):
        raise UserError(f"rounds.prompts_per_round is {a_round}, but there are {len(prompts.ids)}")
    check_ids(train, tokenizer, prompts.ids)
    (data,) = load_data([stage], tokenizer, display, held_out_only=not settings.offline_ratio)
    _check_budget(config, prompts)
    most = max(map(len, prompts.ids)) + settings.max_new_tokens
    asked = f"the longest prompt with rounds.max_new_tokens={settings.max_new_tokens}"
    sampled = SequenceLength(asked, most, "lower it (together at most {})")
    check_positions([stage], [sampled, *longest_sequences([stage], [data])], display)
    policy = policy_on_meta(config.train, tokenizer)
    found = {"rounds": settings.number, "prompts": a_round, "responses": a_round * settings.num_generations,
             "parameters": sum(p.numel() for p in policy.model.parameters())}
    for line in (
        f"{describe(policy)} on {device_name(policy.device)}",
        f"{settings.number} rounds of {a_round:,} prompts x {settings.num_generations} responses of up to "
        f"{settings.max_new_tokens} tokens: {found['responses']:,} a round, scored by {settings.scorer}",
        f"  pairs          {settings.pairing}: at most {a_round:,} a round; then {stage.name}, loss {stage.loss}, "
        f"learning rate {stage.learning_rate:g}",
        f"dry run: no weights were loaded, and nothing was written to {train.output_dir}",
    ):
        display.say(line)
    return found
