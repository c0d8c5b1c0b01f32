"""`--dry-run`: it says what the run then does, writes nothing, and fails where the run would fail."""

from __future__ import annotations

import copy
import io
import os

import pytest
import transformers
import yaml
from families import CONFIGS
from rich.console import Console
from tiny import make, make_config, make_tokenizer, read_metrics, settings

from fastpref import cli
from fastpref.train import display
from fastpref.train.display import Display
from fastpref.train.dry_run import dry_run
from fastpref.train.loop import train

# peft asks transformers with a name of its that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def dry(config):
    shown = io.StringIO()
    return dry_run(config, Display(Console(file=shown, width=200))), shown.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 1.5,
         "warmup_steps": 2},
        {"packing": True, "max_tokens_per_batch": 100, "per_device_train_batch_size": None, "max_steps": -1},
        {"packing": False, "use_peft": True, "loss": "kto"},
        {"packing": False, "loss": "bradley_terry"},
    ],
    ids=["epochs", "budget", "LoRA", "reward model"],
)
def test_it_says_what_the_run_then_does(world, tmp_path, quiet, changes):
    config = make(world, tmp_path / "run", logging_steps=1, **changes)
    before = sorted(os.walk(tmp_path))
    found, text = dry(config)
    assert sorted(os.walk(tmp_path)) == before and not (tmp_path / "run").exists()
    summary = train(config, display=quiet)
    lines = [row for row in read_metrics(tmp_path / "run") if row["split"] == "train"]
    stage = found["stages"][config.loss]
    assert stage["steps"] == len(lines) == summary["stages"][config.loss]["steps"]
    assert stage["tokens"] == lines[-1]["num_tokens"]
    steps = [b["num_tokens"] - a["num_tokens"] for a, b in zip([{"num_tokens": 0}, *lines], lines)]
    assert stage["most_tokens_a_step"] == max(steps)
    assert stage["tokens_a_step"] == (sorted(steps)[len(steps) // 2] + sorted(steps)[(len(steps) - 1) // 2]) / 2
    rates = [row["learning_rate"] for row in lines]
    assert stage["learning_rate"] == max(rates) and stage["warmup_steps"] == rates.index(max(rates))
    assert stage["epochs"] == pytest.approx(lines[-1]["epoch"], abs=0.51)
    if config.loss == "bradley_terry":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
        assert found["parameters"] == sum(p.numel() for p in model.parameters())
        assert stage["gpu_bytes"] is None and "not estimated: a reward model" in text
    elif not config.use_peft:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        assert found["parameters"] == found["trained"] == sum(p.numel() for p in model.parameters())
        assert stage["gpu_bytes"] > 0
    else:
        assert 0 < found["trained"] < found["parameters"] and "% trained" in text


def test_a_large_model_by_its_config_alone(world, tmp_path):
    """On the meta device, where nothing is computed: four layers of an 8B model, whose weights would be 3.6 GiB."""
    make_tokenizer().save_pretrained(tmp_path / "llama")
    transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    ).save_pretrained(tmp_path / "llama")
    config = make(world, tmp_path / "run", model_name_or_path=str(tmp_path / "llama"), dtype="bfloat16",
                  optim="adamw_fp32_master", gradient_checkpointing="full", packing=None)
    found, text = dry(config)
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336 + 2)
    count = 2 * 128256 * 4096 + 4 * layer + 4096
    assert found["parameters"] == count and found["layout"] == "shared"
    assert "1.92B parameters, bfloat16, packed batches with shared prompts" in text
    gib, each = found["stages"]["dpo"]["gpu_bytes"] / 2**30, 2 * count / 2**30
    assert f"{gib:.1f} GiB on one GPU alone (weights {each:.1f}, gradients {each:.1f}, optimiser {5 * each:.1f}" in text
    assert gib == pytest.approx(7 * each + 0.75 + 1, abs=1)  # context, and work on one micro-batch


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_by_its_config_alone(name, world, tmp_path):
    """Scales of logits too, which a model's code and nothing else could prove."""
    settings = copy.deepcopy(CONFIGS[name])
    settings.vocab_size = 300
    settings.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    found, _ = dry(make(world, tmp_path / "run", model_name_or_path=str(tmp_path), init_from_config=True, packing=None))
    assert found["parameters"] > 0


def test_what_the_run_would_refuse_is_refused(world, tmp_path, quiet):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "chosen": "b"}\n')
    bert = tmp_path / "bert"
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertConfig(**sizes).save_pretrained(bert)
    make_tokenizer().save_pretrained(bert)
    small = tmp_path / "small"
    make_config(vocab_size=40).save_pretrained(small)
    make_tokenizer().save_pretrained(small)
    bloom = tmp_path / "bloom"
    transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2).save_pretrained(bloom)
    make_tokenizer().save_pretrained(bloom)
    short = tmp_path / "short"
    make_config(max_position_embeddings=8).save_pretrained(short)
    make_tokenizer().save_pretrained(short)
    for changes, message in (
        ({"train_dataset": str(broken)}, "broken.jsonl:1: field 'rejected' is missing"),
        ({"model_name_or_path": str(tmp_path)}, "no tokenizer that loads"),
        ({"model_name_or_path": str(small)}, "its vocabulary of 40 is smaller than the tokenizer's"),
        ({"ref_model_name_or_path": str(small)}, "its vocabulary of 40 is smaller than the tokenizer's"),
        ({"model_name_or_path": str(bloom), "packing": True}, "its attention cannot be replaced"),
        ({"model_name_or_path": str(bert), "loss": "bradley_terry"}, None),  # what only running it tells
        ({"gradient_checkpointing": "offload"}, "the device is cpu: set full"),
        ({"sample_steps": 2, "scorer": "nowhere_to_be_found:score"}, "scorer 'nowhere_to_be_found:score': "),
        ({"sample_steps": 2, "model_name_or_path": str(short)}, "8 positions: none is left for a response"),
    ):
        config = make(world, tmp_path / "run", **changes)
        if message is None:
            dry(config)
            continue
        with pytest.raises(ValueError, match=message) as caught:
            dry(config)
        assert "\n" not in str(caught.value)
    (tmp_path / "run" / "model").mkdir(parents=True)
    said = dry(make(world, tmp_path / "run"))[1]  # it may be looked at; a run is refused
    assert "holds a run already (model): --resume goes on with it" in said and "dry run: no weights" in said


def test_the_command(world, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings(world, tmp_path / "run")))
    assert cli.main(["train", str(path), "loss=rpo", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "rpo: loss rpo; 22 pairs; 9 held out" in out and not (tmp_path / "run").exists()
    assert "reference      the policy as the stage finds it: 31 examples, once" in out
    assert cli.main(["train", str(path), "max_length=3", "--dry-run"]) == 2
    assert "leaves no room for a prompt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", str(path), "--dry-run", "--resume"])


def test_invalid_records_are_named_and_left_out(world, tmp_path):
    lines = (world / "train.jsonl").read_text().splitlines()
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join([lines[0], '{"prompt": 3}', "{", *lines[1:]]))
    config = make(world, tmp_path / "run", train_dataset=str(path))
    with pytest.raises(ValueError, match="broken.jsonl:2: field 'prompt' is int"):
        dry(config)
    for streamed in ({}, {"dataset_streaming": True}):
        found, text = dry(make(world, tmp_path / "run", train_dataset=str(path), invalid_records="drop", **streamed))
        assert "2 invalid records dropped" in text and "  dropped: " in text
        assert [line for line in text.splitlines() if "dropped: " in line][1].endswith(
            "broken.jsonl:3: not valid JSON (Expecting property name enclosed in double quotes at column 2)")
    assert found["stages"]["dpo"]["examples"] > 8


def test_a_pass_over_data_says_how_far_it_is_in_a_pipe_too(monkeypatch):
    now = iter([0.0, 1.0, 4.9, 5.1, 6.0, 10.3, 1000.0, 1030.0, 1053.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(now))
    shown = io.StringIO()
    with Display(Console(file=shown)).counting("read") as tick:
        for done in (1, 2, 3, 4, 5):
            tick(1000 * done, None)
        for done in (6, 7, 8):
            tick(1000 * done, 9000)
    assert shown.getvalue().splitlines() == [  # a line in ten seconds, with what is left at the pace so far
        "read: 5,000 in 0:10", "read: 6,000 of 9,000 in 16:40 | eta 8:20", "read: 7,000 of 9,000 in 17:10 | eta 4:54",
        "read: 8,000 of 9,000 in 17:33 | eta 2:12"]
