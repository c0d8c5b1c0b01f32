"""examples/recipes: each is parsed and dry-run on a small model, with records in the form that its data set has."""

from __future__ import annotations

import io
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from transformers import Qwen3MoeConfig

from fastpref.train.config import load_config
from fastpref.train.display import Display
from fastpref.train.dry_run import dry_run
from fastpref.train.memory_estimate import GIB, measure, recipe_of, terms
from fastpref.train.model import with_lora

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


QWEN3_30B_A3B = Qwen3MoeConfig(  # its config.json
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    max_position_embeddings=262144, norm_topk_prob=True, tie_word_embeddings=False,
)


MIXTURE = Path(__file__).parents[1] / "examples" / "qwen3-30b-a3b.yaml"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_mixture_of_30b_is_planned_for_one_card():
    """And takes what the docs say."""
    config = load_config(MIXTURE)
    recipe = recipe_of(config)
    sizes = measure(QWEN3_30B_A3B, 4096, only=("full", recipe), adapt=partial(with_lora, config))
    assert sizes.parameters == 30_532_122_624  # as published
    attention = 16 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    assert sizes.adapters == 48 * (attention + 128 * 2 * (2048 + 1536 + 768 + 2048))
    found = terms(sizes, recipe, config.gradient_checkpointing, config.memory_budget)
    assert 2 * sizes.parameters < found.weights < found.total < 80 * GIB
    docs = (MIXTURE.parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"{found.total / GIB:.1f} GiB at 4,096 tokens a micro-batch, {found.weights / GIB:.1f} of them" in docs


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_its_file_dry_runs_on_a_small_mixture(tmp_path):
    config, folder = load_config(MIXTURE), tmp_path / "model"
    Qwen3MoeConfig(
        vocab_size=261, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, max_position_embeddings=4096,
    ).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    rows, _ = FORMATS[config.train_dataset["path"]]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(rows(i)) + "\n" for i in range(9)))
    overrides = {"model_name_or_path": folder, "output_dir": tmp_path / "run", "train_dataset": tmp_path / "data.jsonl",
                 "eval_dataset": tmp_path / "data.jsonl"}
    found = dry_run(load_config(MIXTURE, [f"{key}={value}" for key, value in overrides.items()]),
                    Display(Console(file=io.StringIO())))
    assert found["trained"] == 16 * 4 * (32 + 32) + 4 * 2 * (32 + 48 + 24 + 32) and found["layout"] == "shared"
    assert found["stages"]["dpo"]["gpu_bytes"] > GIB / 2  # counted, on the meta device
