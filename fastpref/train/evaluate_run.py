"""`fastpref eval`: the held-out metrics of a run's model, or of the model a configuration starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastpref.data import eval_order
from fastpref.errors import UserError

from . import reference
from .checkpoint import seed_everything, verify
from .config import load_config, load_config_of_run
from .display import Display, evaluation_table
from .evaluate import evaluate, exact_match, generate
from .model import load_policy, load_tokenizer, pad_token
from .positions import check_positions, longest_sequences
from .rendering import dated
from .run_folder import (
    file_of,
    recorded_reference,
    reference_again,
    reference_at_start,
    run_of,
    weights_of_run,
)
from .stage_data import load_data


def evaluate_run(
    source: str | Path, overrides: Sequence[str] = (), display: Display | None = None
) -> dict[str, float]:
    """Evaluates on `eval_dataset` with the loss of the stage that the weights come from, and prints the table.

    source: the folder of a run (its model/, or its newest checkpoint if it has not ended), a checkpoint in one, or a
        configuration file:
        then the model it names, under its last stage's loss and, unless the file names a reference, as its own.

    The reference log-probs of a run are its cached ones where they fit the data; otherwise they are computed again.
    """
    display = display or Display()
    path = Path(source)
    run_dir = run_of(path) if path.is_dir() else None
    config = load_config_of_run(run_dir, overrides) if run_dir else load_config(path, overrides)
    stages = config.stage_configs()
    index, weights = len(stages) - 1, None
    if run_dir:
        weights, index = weights_of_run(path, len(stages))
        verify(weights, display.say)
    stage, name = stages[index], stages[index].name or ""
    if stage.eval_dataset is None:
        raise UserError("eval_dataset is missing: there is nothing to evaluate on")
    seed_everything(config.seed)
    tokenizer = load_tokenizer(config)
    stage = dated(config, tokenizer).stage_configs()[index]
    data = load_data([stage], tokenizer, display, held_out_only=True)[0]
    check_positions([stage], longest_sequences([stage], [data]), display)
    policy = load_policy(config, tokenizer, weights)
    examples, size, pad, loss = data.eval, stage.per_device_eval_batch_size, pad_token(tokenizer), stage.loss_fn
    logps = None
    if loss.needs_reference:
        steps = [eval_order(examples, size)] if loss.needs_kl else None
        expected = recorded_reference(config, index, run_dir, weights) if run_dir and weights else None
        header = reference.header_of(stage, tokenizer, policy.compute_dtype, expected or "", examples, steps)
        if run_dir:
            logps = reference.read(file_of(config, run_dir, index, stage, "eval"), header)
        if logps is None:
            if run_dir:
                source_policy = reference_again(config, index, run_dir, tokenizer, expected)
            else:
                source_policy = reference_at_start(stage, tokenizer, policy)
            with display.counting("reference log-probs") as show:
                logps = reference.compute(source_policy, examples, stage.kind, size, pad, show, steps)
            del source_policy
        examples = logps.attach(examples)
    with display.counting("evaluating") as show:
        values = evaluate(policy, examples, stage.kind, loss, size, pad, logps, show)
    if data.questions:
        prompts = [question.prompt_ids for question in data.questions]
        with display.counting("generating") as show:
            texts = generate(policy, tokenizer, prompts, size, stage.eval_max_new_tokens, show)
        values |= exact_match(data.questions, texts)
    display.console.print(evaluation_table(f"{weights or config.model_name_or_path}, {name}", {"": values}))
    return values
