"""`fastpref rounds CONFIG --dry-run`: everything that rounds check before the first sample, but for the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastpref.train import ranks
from fastpref.train.config import TrainConfig
from fastpref.train.display import Display
from fastpref.train.dry_run import dry_run as dry_run_of_training
from fastpref.train.judge import SPEC
from fastpref.train.loop import describe
from fastpref.train.machine import device_name
from fastpref.train.metrics_log import check_report_to
from fastpref.train.model import pick_device, policy_on_meta
from fastpref.train.optim import check_optimizer
from fastpref.train.scorer import FUNCTION, load_scorer

from .config import Config
from .driver import read, takes_vllm
from .served import reach


def dry_run(config: Config, display: Display | None = None) -> dict[str, Any]:
    """Prints what the rounds would be, and returns it. Raises UserError as `rounds` does."""
    display = display or Display()
    train: TrainConfig = config.train
    settings = config.rounds
    ranks.check(train)
    check_report_to(train)
    for stage in train.stage_configs():
        check_optimizer(stage, pick_device())
    takes_vllm(config)
    reach(settings)
    if config.warm_up:
        display.say("before the first round:", "bold")
        dry_run_of_training(replace(train, stages=config.warm_up), display)
    if FUNCTION.fullmatch(settings.scorer) or SPEC.fullmatch(settings.scorer):  # the others are models: weights
        load_scorer(settings.scorer, timeout=settings.scorer_timeout, judging=settings.judging).close()
    config, tokenizer, prompts, *_ = read(config, display)
    stage, a_round = config.stage, settings.prompts_per_round or len(prompts.ids)
    policy = policy_on_meta(config.train, tokenizer)
    found = {"rounds": settings.number, "prompts": a_round, "responses": a_round * settings.num_generations,
             "parameters": sum(p.numel() for p in policy.model.parameters())}
    by = f", sampled by {settings.sampler}" if settings.sampler else ""
    for line in (
        f"{describe(policy)} on {device_name(policy.device)}",
        f"{settings.number} rounds of {a_round:,} prompts x {settings.num_generations} responses of up to "
        f"{settings.max_new_tokens} tokens: {found['responses']:,} a round{by}, scored by {settings.scorer}",
        f"  pairs          {settings.pairing}: at most {a_round:,} a round; then {stage.name}, loss {stage.loss}, "
        f"learning rate {stage.learning_rate:g}",
        f"dry run: no weights were loaded, and nothing was written to {train.output_dir}",
    ):
        display.say(line)
    return found
