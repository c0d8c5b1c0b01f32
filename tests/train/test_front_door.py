"""What comes after training and before it: chat, export, init."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from unittest.mock import Mock, create_autospec

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref import cli
from fastpref.data.chat import CHATML
from fastpref.errors import UserError
from fastpref.report.reading import read_run
from fastpref.report.verdict import verdict_of
from fastpref.train.config import config_from_dict, load_config
from fastpref.train.export import export
from fastpref.train.loop import train

sys.path.insert(0, str(Path(__file__).parent))
from tiny import make_config, make_pairs, make_tokenizer, settings, write_rows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of one model a run of whole weights and one of an adapter."""
    world = tmp_path_factory.mktemp("door")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>").replace("<|im_start|>", "")
    tokenizer.save_pretrained(world / "pretrained")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make_config()).save_pretrained(world / "pretrained")
    write_rows(world / "train.jsonl", make_pairs(16, seed=1))
    write_rows(world / "heldout.jsonl", make_pairs(6, seed=2))
    for name, more in (("whole", {}), ("adapter", {"use_peft": True})):
        values = settings(world, world / name, max_steps=2, learning_rate=0.05, **more)
        (world / f"{name}.yaml").write_text(yaml.safe_dump(values))
        train(load_config(world / f"{name}.yaml"))
    return world


def logps(model, ids):
    with torch.no_grad():
        return model(ids).logits.double().log_softmax(-1)


def test_merged_weights_have_the_adapters_log_probs(runs, tmp_path, capsys):
    import peft

    assert cli.main(["export", str(runs / "adapter"), "--merge", "--output", str(tmp_path / "out")]) == 0
    ids = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    base = AutoModelForCausalLM.from_pretrained(runs / "pretrained")
    before = logps(base, ids)
    adapted = logps(peft.PeftModel.from_pretrained(base, runs / "adapter" / "model").eval(), ids)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.float32 and (adapted - before).abs().max() > 1e-2
    assert (logps(merged, ids) - adapted).abs().max() < 2e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    half = export(runs / "adapter", tmp_path / "half", merge=True, dtype="bf16")
    weights = AutoModelForCausalLM.from_pretrained(half).state_dict()
    for name, weight in merged.state_dict().items():
        assert torch.equal(weights[name], weight.bfloat16())


def test_an_adapter_goes_with_a_card_from_its_run(runs, tmp_path):
    out = export(runs / "adapter", tmp_path / "out")
    assert (out / "adapter_model.safetensors").is_file() and not list(out.glob("model*.safetensors"))
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == str(runs / "pretrained") and head["library_name"] == "peft"
    summary = json.loads((runs / "adapter" / "summary.json").read_text())
    assert "More Information Needed" not in card and "PeftModel.from_pretrained" in card
    start, end = (f"{100 * summary[when]['rewards/accuracies']:.1f}%" for when in ("before", "after"))
    assert re.search(rf"^\| .*accura.* \| {start} \| {end} \|$", card, re.M)
    verdict = verdict_of(read_run(runs / "adapter"))
    assert f"## Verdict\n\n{verdict.kind}:\n\n- {verdict.because[0]}" in card
    assert f"torch {torch.__version__.split('+')[0]}" in card and "learning_rate: 0.05" in card


@pytest.mark.parametrize(("run", "options", "message"), [
    ("whole", {"merge": True}, "--merge: .* has no adapter"),
    ("adapter", {"dtype": "bf16"}, "--dtype: an adapter stays as it is; add --merge"),
    ("adapter", {"gguf": True, "merge": True}, "convert_hf_to_gguf.py is missing: git clone .* and set LLAMA_CPP"),
])
def test_what_cannot_be_exported_is_refused_at_once(runs, tmp_path, monkeypatch, run, options, message):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(UserError, match=message):
        export(runs / run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_gguf_through_the_converter(runs, tmp_path, monkeypatch):
    """A stand-in for llama.cpp's script, which is no package: what it is called with, and that its failure is told."""
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys, pathlib\npathlib.Path(sys.argv[3]).write_text(' '.join(sys.argv[1:]))\n")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    pytest.importorskip("gguf")
    out = export(runs / "whole", tmp_path / "out", gguf=True, dtype="bf16")
    assert (out / "model.gguf").read_text() == f"{out} --outfile {out}/model.gguf --outtype bf16"
    script.write_text("raise SystemExit('no such architecture')\n")
    with pytest.raises(UserError, match=r"convert_hf_to_gguf.py failed \(no such architecture\)"):
        export(runs / "whole", tmp_path / "out2", gguf=True)


def test_push(runs, tmp_path, monkeypatch, capsys):
    """To a stand-in with the hub's own signatures."""
    import huggingface_hub

    given = ["export", str(runs / "adapter"), "--push", "me/mine", "--output"]
    monkeypatch.setattr(huggingface_hub, "whoami", Mock(side_effect=OSError("no token")))
    assert cli.main([*given, str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
    assert "--push me/mine: not logged in to the hub, `hf auth login` does (no token)" in capsys.readouterr().err
    hub = create_autospec(huggingface_hub.HfApi, instance=True)
    monkeypatch.setattr(huggingface_hub, "whoami", Mock())
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert cli.main([*given, str(tmp_path / "out")]) == 0
    assert "https://huggingface.co/me/mine" in capsys.readouterr().out
    hub.create_repo.assert_called_once_with("me/mine", exist_ok=True)
    hub.upload_folder.assert_called_once_with(repo_id="me/mine", folder_path=str(tmp_path / "out"))
    hub.upload_folder.side_effect = OSError("connection lost")
    assert cli.main([*given, str(tmp_path / "out2")]) == 2 and (tmp_path / "out2" / "README.md").is_file()
    assert "connection lost; " in capsys.readouterr().err


def greedy(model, tokenizer, prompt, tokens=5):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)["input_ids"]
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(ids),
                         pad_token_id=tokenizer.pad_token_id or 0)
    return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("run", ["whole", "adapter"])
def test_chat_beside_the_base(runs, tmp_path, monkeypatch, capsys, run):
    import peft

    tokenizer = AutoTokenizer.from_pretrained(runs / "pretrained")
    base = AutoModelForCausalLM.from_pretrained(runs / "pretrained").eval()
    before = greedy(base, tokenizer, "2+3")
    folder = runs / run / "model"
    if run == "adapter":
        after = greedy(peft.PeftModel.from_pretrained(base, folder).eval(), tokenizer, "2+3")
    else:
        after = greedy(AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer, "2+3")
    said = iter(["2+3", "/new", "2+3", ""])
    monkeypatch.setattr("rich.console.Console.input", lambda *_, **__: next(said))
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["chat", str(runs / run), "--against", "base", "--max-new-tokens", "5"]) == 0
    shown = capsys.readouterr().out
    assert after in shown and before in shown and "base, " in shown
    (tmp_path / "p.txt").write_text("2+3\n\n4+4\n")
    page = tmp_path / "page.html"
    words = ["--against", "base", "--max-new-tokens", "5", "--prompts", str(tmp_path / "p.txt"), "--page", str(page)]
    assert cli.main(["chat", str(runs / run), *words]) == 0
    text = page.read_text()
    assert text.count('<article class="card answers"') == 2 and "2+3" in text


@pytest.mark.parametrize("task", ["dpo", "rpo", "kto", "reward", "rounds"])
def test_init_writes_what_loads(runs, tmp_path, capsys, task):
    path = tmp_path / f"{task}.yaml"
    words = ["--task", task, "--model", str(runs / "pretrained"), "--data", str(runs / "train.jsonl")]
    assert cli.main(["init", str(path), *words, "--eval-data", str(runs / "heldout.jsonl"), "--gpu-gib", "24"]) == 0
    out = capsys.readouterr().out
    assert f"fastpref {'rounds' if task == 'rounds' else 'train'} {path} --dry-run" in out
    if task == "rounds":
        from fastpref.rounds.config import load_config as load

        config = load(path).train
    else:
        config = load_config(path)
    assert config.max_length == (64 + 256 if task == "rounds" else 64)  # the pairs have up to a few dozen tokens
    assert config.max_tokens_per_batch == 16384 and config.eval_dataset == str(runs / "heldout.jsonl")
    assert cli.main(["init", str(path), *words]) == 2
    assert "is there already" in capsys.readouterr().err


def test_rounds_dry_run(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_scorer.py").write_text("def score(prompt, response, record=None):\n    return 0.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rounds.yaml"
    values = settings(runs, tmp_path / "out") | {"rounds": {"number": 2, "scorer": "my_scorer:score",
                                                            "num_generations": 3, "max_new_tokens": 8}}
    path.write_text(yaml.safe_dump(values))
    assert cli.main(["rounds", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "held-out prompts: 6 records -> 6 prompts" in out
    assert "2 rounds of 15 prompts x 3 responses of up to 8 tokens: 45 a round" in out  # two are equal
    assert not (tmp_path / "out").exists()
    assert cli.main(["rounds", str(path), "--dry-run", "rounds.prompts_per_round=17"]) == 2
    assert "rounds.prompts_per_round is 17, but there are 15" in capsys.readouterr().err
    assert cli.main(["rounds", str(path), "--dry-run", "rounds.scorer=my_scorer:none"]) == 2
    assert "my_scorer:none" in capsys.readouterr().err
    server = ["rounds.sampler=openai:http://localhost:1/v1", "rounds.sampler_reload=start {folder}"]  # not there yet
    assert cli.main(["rounds", str(path), "--dry-run", *server]) == 0
    assert "45 a round, sampled by openai:http://localhost:1/v1, scored by my" in capsys.readouterr().out
    assert cli.main(["rounds", str(path), "--dry-run", *server, "rounds.engine=vllm"]) == 2
    assert "rounds.sampler and rounds.engine vllm name two engines" in capsys.readouterr().err


def test_a_run_that_has_ended_goes_on_to_more_steps(runs, tmp_path, quiet):
    """At a constant learning rate it is the run that was longer from the beginning."""
    def run(name, steps, **more):
        values = settings(runs, tmp_path / name, max_steps=steps, lr_scheduler_type="constant", save_steps=2,
                          learning_rate=1e-3)
        return train(config_from_dict(values), display=quiet, **more)

    run("short", 4)
    assert run("short", 4, resume=True)["stages"]["dpo"]["steps"] == 4  # complete
    assert run("short", 6, resume=True)["stages"]["dpo"]["steps"] == 6
    run("long", 6)
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("short", "long"))
    assert all(torch.equal(a[key], b[key]) for key in b)
    with pytest.raises(UserError, match="max_steps .6 there, 5 now"):
        run("short", 5, resume=True)
    with pytest.raises(UserError, match="is complete, and kept no checkpoint to go on from"):
        train(load_config(runs / "whole.yaml", ["max_steps=3"]), resume=True, display=quiet)
