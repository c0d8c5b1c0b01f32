"""What rounds stand on: streaming and going on of `collect`, prompts, weights that change places, the command line."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import yaml
from rich.console import Console
from small import lines, make, settings
from tiny import make_config, make_pairs, make_tokenizer, write_rows
from transformers import LlamaForCausalLM

from fastpref import cli
from fastpref.data import Rendering, load_prompts, load_records, tokenize_prompts, tokenize_records
from fastpref.errors import UserError
from fastpref.rounds import driver
from fastpref.rounds.collect import Prompts, collect, read_prompts
from fastpref.rounds.config import config_from, load_config
from fastpref.rounds.driver import rounds
from fastpref.train.checkpoint import snapshot
from fastpref.train.config import config_from_dict
from fastpref.train.display import Display
from fastpref.train.model import exchanged, load_policy, load_weights, save_model, set_weights, weights_of
from fastpref.train.sample import InMemory, Sample, _sample
from fastpref.train.scorer import Scorer

COUNT, N = 7, 2
PROMPTS = Prompts([f"p{i}" for i in range(COUNT)], [[1, i] for i in range(COUNT)])


class Beside(Scorer):
    """Scores in a thread, and only when it is let; notes what was asked together."""

    def __init__(self):
        super().__init__("beside")
        self.asked, self.thread = [], ThreadPoolExecutor(1)
        self.free = threading.Event()

    def submit(self, prompts, responses):
        return self.thread.submit(self._score, prompts, responses)

    def _score(self, prompts, responses):
        assert self.free.wait(5), "sampling waited for the scores"
        self.asked.append(list(zip(prompts, responses, strict=True)))
        self.scored += len(responses)
        return [float(len(text)) if "bad" not in text else None for text in responses]


def texts(index):
    return [f"r{index}" * (1 + number) for number in range(N)]


def source(done, sampled=None):
    for index in reversed(range(COUNT)):
        if index not in done:
            if sampled is not None:
                sampled.append(index)
            yield index, [Sample([3, 4], text, True) for text in texts(index)]


def test_a_prompt_is_done_with_before_the_last_is_sampled(tmp_path):
    """Pairs are made as scores come: with a scorer that answers at once, before sampling is over."""
    events = []

    class AtOnce(Beside):
        submit = Scorer.submit

    scorer = AtOnce()
    scorer.free.set()

    def sampled(done):
        for item in source(done):
            events.append(("sampled", item[0]))
            yield item

    collect(tmp_path / "r.jsonl", PROMPTS, sampled, scorer, group=2, seconds={},
            each=lambda index, responses: events.append(("done", index)))
    assert events.index(("done", 6)) < events.index(("sampled", 3))
    assert [len(asked) for asked in scorer.asked] == [4, 4, 4, 2]  # two prompts of two responses in one call


def test_sampling_does_not_wait_for_a_slow_scorer(tmp_path):
    scorer, sampled = Beside(), []

    def all_of_them(done):
        yield from source(done, sampled)
        scorer.free.set()  # nothing was scored until here

    seconds: dict[str, float] = {}
    collect(tmp_path / "r.jsonl", PROMPTS, all_of_them, scorer, group=2, seconds=seconds)
    assert sampled == [6, 5, 4, 3, 2, 1, 0] and len(scorer.asked) == 4
    assert set(seconds) == {"sampling", "scoring"}


def note(done, index, responses):
    done.append(index)


def test_it_goes_on_with_whole_groups(tmp_path):
    scorer = Beside()
    scorer.free.set()
    whole = collect(tmp_path / "whole.jsonl", PROMPTS, source, scorer, group=3, seconds={})
    groups, scorer.asked = scorer.asked, []
    path = tmp_path / "parts.jsonl"
    content = (tmp_path / "whole.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in (0, ends[1], ends[2], ends[3] + 5, ends[5], len(content) - 1, len(content)):
        path.write_bytes(content[:cut])
        sampled, done, scorer.asked = [], [], []
        again = collect(path, PROMPTS, partial(source, sampled=sampled), scorer, group=3, seconds={},
                        each=partial(note, done))
        kept = 7 if cut == len(content) else sum(end <= cut for end in ends) // 3 * 3
        assert path.read_bytes() == content and again == whole
        assert sampled == [6, 5, 4, 3, 2, 1, 0][kept:]
        assert scorer.asked == groups[kept // 3 :] if kept < 7 else not scorer.asked  # the same calls as before
        assert sorted(done) == list(range(7))


def test_duplicates_and_empty_ones_are_not_scored(tmp_path):
    scorer = Beside()
    scorer.free.set()

    def samples(done):
        for index in range(COUNT):
            yield index, [Sample([3], text, True) for text in ("a", "", "a", "bad", "b")]

    found = collect(tmp_path / "r.jsonl", PROMPTS, samples, scorer, group=4, seconds={})
    assert [r.skipped for r in found[0]] == [None, "empty", "duplicate", None, None]
    assert [r.score for r in found[0]] == [1.0, None, None, None, 1.0] and found[0][3].failed
    assert [text for asked in scorer.asked for _, text in asked] == ["a", "bad", "b"] * COUNT


def test_a_begun_turn_is_gone_on_with_as_it_was_sampled(tmp_path):
    """'The answer is' and ' 4': a scorer that put '4' behind it would read another text."""
    begun = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "The answer is"}]
    scorer = Beside()
    scorer.free.set()
    prompts = Prompts(["2 + 2 =", begun[:1], begun], [[3], [4], [5]])
    tokenizer = make_tokenizer()
    (ids,) = tokenizer([" 4\n"], add_special_tokens=False)["input_ids"]
    sampled = _sample(tokenizer, [*ids, tokenizer.eos_token_id], frozenset({tokenizer.eos_token_id}))
    found = collect(tmp_path / "r.jsonl", prompts, lambda done: ((i, [sampled]) for i in range(3)), scorer, group=3,
                    seconds={})
    assert [text for _, text in scorer.asked[0]] == [r.text for r, in found] == ["4", "4", " 4"]


def test_prompts_alone(tmp_path):
    rows = make_pairs(5, seed=3)
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    alone = write_rows(tmp_path / "alone.jsonl", [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows])
    tokenizer = make_tokenizer()
    examples, _ = tokenize_records(load_records(pairs), tokenizer)
    for path in (pairs, alone):
        records = load_prompts(path)
        ids, cut = tokenize_prompts(records, tokenizer, 40)
        assert ids == [e.prompt_ids for e in examples] and cut == 0
        assert [r.extra["answer"] for r in records] == [row["answer"] for row in rows]
    ids, cut = tokenize_prompts(records, tokenizer, 3)
    assert cut == sum(len(e.prompt_ids) > 3 for e in examples)
    for short, example in zip(ids, examples, strict=True):  # BOS stays, then the end
        assert short == [1, *example.prompt_ids[1:][-2:]]
    with pytest.raises(ValueError, match="alone.jsonl:1: field 'chosen' or 'completion' is missing"):
        load_records(alone)
    with pytest.raises(ValueError, match="field 'prompt' is int"):
        load_prompts(write_rows(tmp_path / "bad.jsonl", [{"prompt": 3}]))


def test_messages_as_prompts(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("hi", "ho", "hi")]
    path = write_rows(tmp_path / "chat.jsonl", rows)
    prompts = read_prompts(
        str(path), tokenizer, 40, "keep_end", Rendering(), "prompts", Display(Console(file=io.StringIO()))
    )
    assert [tokenizer.decode(ids) for ids in prompts.ids] == ["<user>hi<assistant>", "<user>ho<assistant>"]
    assert prompts.shown == [rows[0]["prompt"], rows[1]["prompt"]]


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def policy(request, tmp_path):
    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    LlamaForCausalLM(make_config(tie_word_embeddings=request.param)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = config_from_dict({
        "model_name_or_path": str(tmp_path / "model"), "train_dataset": "x", "output_dir": "y", "packing": False,
    })
    return load_policy(config, tokenizer), tokenizer


def moved(policy):
    with torch.no_grad():
        for p in policy.model.parameters():
            p += torch.randn_like(p)


def test_weights_go_back_in_place(policy, tmp_path):
    policy, tokenizer = policy
    places = {name: tensor.data_ptr() for name, tensor in weights_of(policy).items()}
    first = snapshot(weights_of(policy))
    save_model(policy, tokenizer, tmp_path / "saved")
    for restore in (lambda: load_weights(policy, tmp_path / "saved"), lambda: set_weights(policy, first)):
        moved(policy)
        assert not torch.equal(policy.head.weight, first["lm_head.weight"])
        restore()
        assert all(torch.equal(tensor, first[name]) for name, tensor in weights_of(policy).items())
    assert places == {name: tensor.data_ptr() for name, tensor in weights_of(policy).items()}
    other = LlamaForCausalLM(make_config(hidden_size=16))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="other: no weights of this model"):
        load_weights(policy, tmp_path / "other")


def test_weights_change_places(policy):
    policy, _ = policy
    first = snapshot(weights_of(policy))
    moved(policy)
    second, held = snapshot(weights_of(policy)), snapshot(first)
    with pytest.raises(ZeroDivisionError), exchanged(policy, held):
        assert all(torch.equal(tensor, first[name]) for name, tensor in weights_of(policy).items())
        assert all(torch.equal(tensor, second[name]) for name, tensor in held.items())
        raise ZeroDivisionError
    assert all(torch.equal(tensor, second[name]) for name, tensor in weights_of(policy).items())
    assert all(torch.equal(tensor, first[name]) for name, tensor in held.items())


# ---- vLLM ------------------------------------------------------------------------------------------------------------


def test_vllm_gets_the_weights_as_they_are(world, tmp_path, quiet, monkeypatch):
    """With a stand-in that generates from the folder it is given: the same responses as without it."""
    opened = []

    class StandIn:
        positions = None

        def __init__(self, folder, tokenizer, dtype, **options):
            config = make(world, tmp_path / "x").train
            self.own = InMemory(load_policy(config, tokenizer, folder), tokenizer)
            self.stops, self.generate = self.own.stops, self.own.generate
            opened.append((dtype, options))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    rounds(make(world, tmp_path / "plain"), display=quiet)
    monkeypatch.setattr(driver, "uses_vllm", lambda name: True)
    monkeypatch.setattr(driver, "VLLM", StandIn)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60, 80))
    rounds(make(world, tmp_path / "vllm"), display=quiet)
    for i in (1, 2):
        a, b = (tmp_path / run / f"round-00{i}/responses.jsonl" for run in ("plain", "vllm"))
        assert a.read_bytes() == b.read_bytes()
    assert opened == [("float32", {"gpu_memory_utilization": pytest.approx(0.7125)})] * 2
    assert not (tmp_path / "vllm/vllm").exists()


# ---- the KL budget, the command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reference", "count"), [("initial", 1), ("previous", 2)])
def test_a_kl_budget_ends_the_rounds_where_there_is_one_reference(world, tmp_path, quiet, reference, count):
    config = make(world, tmp_path / "run", kl_budget=1e-6, reference=reference, per_device_train_batch_size=1)
    summary = rounds(config, display=quiet)
    assert len(summary["rounds"]) == count and summary["ended_by_kl_budget"] == (count == 1)
    of_stage = summary["rounds"][0]["training"]["stages"]["dpo"]
    assert of_stage["steps"] < summary["rounds"][0]["pairs"]  # the round ended there, too
    kept = [path.name for path in (tmp_path / "run/round-001/train/checkpoints").iterdir()]
    assert kept == [summary["rounds"][0]["kl_budget"]["checkpoint"]]
    again = rounds(config, resume=True, display=quiet)
    assert again == summary


def run_cli(*words):
    return cli.main(["rounds", *map(str, words)])


def test_the_command(world, tmp_path, capsys):
    path = tmp_path / "rounds.yaml"
    path.write_text(yaml.safe_dump(settings(world, tmp_path / "run")))
    assert run_cli(path, "rounds.number=1") == 0
    out = capsys.readouterr().out
    assert "round 1/1 | " in out and "report" in out
    assert run_cli(path, "rounds.number=1") == 2
    assert capsys.readouterr().err.strip().endswith("overwrite_output_dir=true starts over")
    assert run_cli(path, "rounds.number=1", "--resume") == 0
    for words, message in (
        (["rounds.num_generations=1"], "rounds.num_generations is 1, but pairing best_worst needs at least 2"),
        (["rounds.scorer=nope:f", "overwrite_output_dir=true"], "there is no module 'nope'"),
        (["rounds.numbr=3"], "rounds.numbr: no such key; the nearest is number"),
    ):
        assert run_cli(path, *words) == 2
        err = capsys.readouterr().err.strip()
        assert message in err and "\n" not in err
    assert cli.main(["train", str(path)]) == 2
    assert "rounds: belongs to `fastpref rounds`" in capsys.readouterr().err
    assert lines(tmp_path / "run/round-001/responses.jsonl")  # the run is as it was


def test_the_example_is_right_about_its_answers(monkeypatch):
    root = cli.Path(cli.__file__).parents[1]
    monkeypatch.chdir(root)
    config = load_config(root / "examples/rounds.yaml")
    assert [stage.name for stage in config.train.stage_configs()] == ["sft", "rpo"]
    monkeypatch.syspath_prepend(str(root))
    from examples.verifier import right

    for row in lines(root / "examples/data/heldout.jsonl"):
        assert right(row["prompt"], row["chosen"]) == 1.0 and right(row["prompt"], row["rejected"]) == 0.0
    with pytest.raises(UserError, match="rounds.scorer is missing"):
        config_from({key: value for key, value in config.to_dict().items() if key != "rounds"} | {"rounds": {}})
