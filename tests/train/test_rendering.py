"""What a configuration says of conversations reaches every reader of data: training, evaluation, rounds, scorers."""

import datetime
import json
import shutil
import signal
import types

import pytest
import yaml
from test_loop import stop_after
from tiny import make, make_tokenizer, settings, write_rows
from transformers import GenerationConfig
from transformers.utils import chat_template_utils

from fastpref.errors import UserError
from fastpref.train import reference_cache, rendering
from fastpref.train.config import config_from_dict
from fastpref.train.dry_run import dry_run
from fastpref.train.evaluate_run import evaluate_run
from fastpref.train.loop import Stopped, train
from fastpref.train.model import load_tokenizer
from fastpref.train.reference_cache import cache_reference
from fastpref.train.stage_data import load_data

DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chats(count=10):
    return [
        {"prompt": [{"role": "user", "content": "ab" * (i % 3) + "c"}],
         "chosen": [{"role": "assistant", "content": "x" * i}], "rejected": [{"role": "assistant", "content": "y"}]}
        for i in range(1, count + 1)
    ]


@pytest.fixture
def chat_world(world, tmp_path):
    """The world, its tokenizer with a template that tells the date, and conversations."""
    folder = tmp_path / "chat_world"
    shutil.copytree(world, folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder / "pretrained")
    write_rows(folder / "train.jsonl", chats())
    write_rows(folder / "heldout.jsonl", chats(4))
    return folder


def set_clock(monkeypatch, date):
    """Today, for a run; the clock that templates read by themselves must not be asked."""
    today = types.SimpleNamespace(today=lambda: datetime.date.fromisoformat(date), fromisoformat=None)
    monkeypatch.setattr(rendering, "datetime", types.SimpleNamespace(date=today))
    monkeypatch.setattr(chat_template_utils, "datetime", None)


def test_a_run_keeps_its_date(chat_world, tmp_path, quiet, monkeypatch):
    """Stopped before midnight, it goes on the next day, and so do its evaluation and those who share its reference."""
    config = make(chat_world, tmp_path / "run", reference_dir=str(tmp_path / "shared"), save_steps=2)
    set_clock(monkeypatch, "2031-02-03")
    cache_reference(config, quiet)
    assert (tmp_path / "shared" / "chat_template_date.txt").read_text() == "2031-02-03\n"
    set_clock(monkeypatch, "2031-02-04")
    monkeypatch.setattr(reference_cache.reference, "compute", None)  # its log-probs are there
    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config, display=quiet)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["chat_template_date"] == "2031-02-03"
    set_clock(monkeypatch, "2031-02-05")
    dry_run(make(chat_world, tmp_path / "other"), quiet)
    assert not (tmp_path / "other").exists()
    train(config, resume=True, display=quiet)
    evaluate_run(str(tmp_path / "run"), display=quiet)
    tokenizer = load_tokenizer(config)
    (data,) = load_data(rendering.dated(config, tokenizer).stage_configs(), tokenizer, quiet)
    assert tokenizer.decode(data.train[0].prompt_ids).startswith("03 Feb 2031[user]")
    fresh = make(chat_world, tmp_path / "fresh")
    assert rendering.dated(fresh, tokenizer).chat_template_date == "2031-02-05"
    assert rendering.dated(make(chat_world, tmp_path / "run", chat_template_date="2030-01-01"),
                           tokenizer).chat_template_date == "2030-01-01"
    tokenizer.chat_template = "no date"
    assert rendering.dated(fresh, tokenizer).chat_template_date is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"chat_template_date": "3 Feb"}, "chat_template_date is '3 Feb'; it takes a date as 2026-01-31"),
    ({"chat_template_kwargs": "{"}, "chat_template_kwargs is '{', which is not valid JSON"),
    ({"chat_template_kwargs": "[1]"}, r"chat_template_kwargs is \[1\]; it takes keys and values"),
    ({"train_on": "user"}, "train_on is 'user'"),
    ({"train_on": "all", "assistant_only_loss": True}, "say the same: set one of them"),
])
def test_values_that_are_refused(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make(world, tmp_path, **changes)


def test_keys_by_which_other_tools_know_them(world, tmp_path):
    assert make(world, tmp_path).train_on == make(world, tmp_path, assistant_only_loss=True).train_on == "assistant"
    assert make(world, tmp_path, assistant_only_loss=False).train_on == "all"
    as_text = make(world, tmp_path, chat_template_kwargs='{"enable_thinking": false}')
    assert as_text.chat_template_kwargs == {"enable_thinking": False}
    values = settings(world, tmp_path) | yaml.safe_load("chat_template_date: 2031-02-03")
    assert config_from_dict(values).chat_template_date == "2031-02-03"


def test_everything_reaches_the_tokens(chat_world, tmp_path, quiet):
    template = tmp_path / "own.jinja"
    template.write_text(
        "{{ style }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "</s>"},
             {"role": "assistant", "content": "z"}]
    write_rows(chat_world / "train.jsonl", [chats(1)[0] | {"chosen": turns}])
    GenerationConfig(eos_token_id=[2, 0]).save_pretrained(chat_world / "pretrained")

    def first(**changes):
        config = make(chat_world, tmp_path / "run", chat_template=str(template), eval_dataset=None, **changes)
        tokenizer = load_tokenizer(config)
        (data,) = load_data(config.stage_configs(), tokenizer, quiet)
        return config, tokenizer, data.train[0]

    config, tokenizer, example = first()
    scored = [example.responses[0][i] for start, end in example.scored[0] for i in range(start, end)]
    assert tokenizer.decode(scored) == "x</s>z</s>"
    assert tokenizer.decode(example.prompt_ids) == "[user]abc</s>[assistant]"
    assert rendering.rendering_of(config).stops == {2, 0}
    assert first(train_on="all")[2].scored is None
    brief = first(chat_template_kwargs={"style": "brief"})[2]
    assert tokenizer.decode(brief.prompt_ids).startswith("brief[user]")
    safe = first(sanitize_control_tokens=True)[2]
    assert safe.responses[0].count(2) == example.responses[0].count(2) - 1
    assert load_tokenizer(make(chat_world, tmp_path, chat_template="chatml")).chat_template.count("<|im_start|>") == 2
    with pytest.raises(UserError, match=r"chat_template is 'no.jinja', a file that cannot be read .*; it takes a file"):
        load_tokenizer(make(chat_world, tmp_path, chat_template="no.jinja"))


def test_chatml_by_name_for_a_model_without_a_template(world, tmp_path, quiet):
    write_rows(tmp_path / "chats.jsonl", chats(4))
    changes = {"train_dataset": str(tmp_path / "chats.jsonl"), "eval_dataset": None, "max_length": 128}
    with pytest.raises(ValueError, match="has no chat template; set chat_template to a file with one, or to chatml"):
        train(make(world, tmp_path / "run", **changes), display=quiet)
    train(make(world, tmp_path / "run2", chat_template="chatml", **changes), display=quiet)
    saved = json.loads((tmp_path / "run2" / "model" / "tokenizer_config.json").read_text())
    jinja = tmp_path / "run2" / "model" / "chat_template.jinja"
    assert "<|im_start|>" in (jinja.read_text() if jinja.is_file() else saved["chat_template"])
