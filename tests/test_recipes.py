"""examples/recipes: each is parsed and dry-run on a small model, with records in the form that its data set has."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fastpref.train.config import load_config
from fastpref.train.display import Display
from fastpref.train.dry_run import dry_run

sys.path.insert(0, str(Path(__file__).parent / "train"))
from tiny import make_config, make_tokenizer  # noqa: E402

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))
TEMPLATE = (  # Zephyr's
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# pairs or labelled examples a step, steps of warm-up (or their share) and epochs, as published
PUBLISHED = {
    "kto-llama3-8b": ("kto", 32, 150, 1, {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}, 5e-6),
    "rpo-beta": ("rpo", 128, 0.1, 1, {"beta": 0.01, "eta": 0.005}, 5e-7),
    "rpo-gemma": ("rpo", 128, 0.1, 2, {"beta": 0.05, "eta": 0.005}, 5e-7),
    "simpo-llama3-8b-instruct": ("simpo", 128, 0.1, 1, {"beta": 2.5, "gamma": 2.5 * 0.55}, 1e-6),
    "simpo-mistral-7b-base": ("simpo", 128, 0.1, 1, {"beta": 2.0, "gamma": 1.6}, 3e-7),
    "tulu3-8b-dpo": ("dpo_norm", 128, 0.1, 1, {"beta": 5.0}, 5e-7),
    "tulu3-8b-rm": ("bradley_terry", 256, 0, 1, {}, 3e-6),
    "zephyr-7b-dpo": ("dpo", 128, 0.1, 1, {"beta": 0.01}, 5e-7),
}


def conversation(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def ultrafeedback(i):
    """HuggingFaceH4/ultrafeedback_binarized, and allenai/ultrafeedback_binarized_cleaned."""
    question, good, bad = f"What is {i}?", f"It is {i}.", f"No {i}."
    return {
        "prompt": question, "prompt_id": f"{i:064x}", "chosen": conversation(question, good),
        "rejected": conversation(question, bad), "messages": conversation(question, good), "score_chosen": 8.5,
        "score_rejected": 4.0,
    }


def dpo_mix(i):
    """argilla/dpo-mix-7k: no prompt; one of its sources has a system message."""
    first = [{"role": "system", "content": "Be brief."}] * (i % 2)
    question = f"What is {i}?"
    return {
        "dataset": "argilla/distilabel-intel-orca-dpo-pairs", "chosen": first + conversation(question, f"It is {i}."),
        "rejected": first + conversation(question, f"No {i}."), "chosen_rating": 9.0, "rejected_rating": 7.0,
    }


def llama3_ultrafeedback(i):
    """princeton-nlp/llama3-ultrafeedback."""
    row = ultrafeedback(i)
    return {key: row[key] for key in ("prompt_id", "prompt", "chosen", "rejected")} | {
        "all_generated_responses": [f"It is {i}.", f"No {i}."], "all_rm_scores": [0.17, 0.12],
    }


def tulu_3(i):
    """allenai/llama-3.1-tulu-3-8b-preference-mixture; some of its conversations have several turns."""
    earlier = conversation("Hello.", "Hello!") * (i % 3 == 0)
    question = f"What is {i}?"
    return {
        "id": f"x_{i}", "prompt": question, "chosen": earlier + conversation(question, f"It is {i}."),
        "rejected": earlier + conversation(question, f"No {i}."), "source": "allenai/tulu-3-wildchat",
    }


FORMATS = {
    "HuggingFaceH4/ultrafeedback_binarized": (ultrafeedback, {"train_prefs", "test_prefs"}),
    "allenai/ultrafeedback_binarized_cleaned": (ultrafeedback, {"train_prefs", "test_prefs"}),
    "argilla/dpo-mix-7k": (dpo_mix, {"train", "test"}),
    "princeton-nlp/llama3-ultrafeedback": (llama3_ultrafeedback, {"train", "test"}),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": (tulu_3, {"train"}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes") / "model"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    make_config(max_position_embeddings=2048).save_pretrained(folder)
    return folder


def test_every_recipe_is_known():
    assert [path.stem for path in RECIPES] == sorted(PUBLISHED)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_dry_runs(path, model, tmp_path):
    config = load_config(path)
    loss, batch, warmup, epochs, options, rate = PUBLISHED[path.stem]
    stage = config.stage_configs()[-1]
    assert (stage.loss, stage.num_train_epochs, stage.learning_rate) == (loss, epochs, rate)
    assert dict(stage.loss_options) == pytest.approx(options)
    assert warmup == (stage.warmup_steps or stage.warmup_ratio)
    assert re.search(r"^# .*(arXiv \d{4}\.\d{5}|alignment-handbook)", path.read_text(), flags=re.M)

    overrides = [f"model_name_or_path={model}", f"output_dir={tmp_path / 'run'}"]
    if config.tokenizer_name_or_path:
        overrides.append(f"tokenizer_name_or_path={model}")
    count = 2 * batch + 3  # more than one step and a rest
    for key in ("train_dataset", "eval_dataset"):
        source = getattr(config, key)
        if source is None:
            continue
        rows, splits = FORMATS[source["path"]]
        assert source["split"] in splits
        data = tmp_path / f"{key}.jsonl"
        data.write_text("".join(json.dumps(rows(i)) + "\n" for i in range(count if key == "train_dataset" else 4)))
        overrides.append(f"{key}={data}")
    found = dry_run(load_config(path, overrides), Display(Console(file=io.StringIO())))
    values = found["stages"][stage.name]
    per_pair = 2 if loss == "kto" else 1
    assert values["examples"] == per_pair * count and values["examples_a_step"] == batch
    assert values["steps"] == epochs * -(-per_pair * count // batch)
    assert values["held_out"] == (0 if config.eval_dataset is None else 4 * per_pair)
    assert (values["gpu_bytes"] is None) == (loss == "bradley_terry") and found["layout"] == "shared"
    assert not (tmp_path / "run").exists()
