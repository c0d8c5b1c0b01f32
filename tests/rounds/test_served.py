"""Rounds over servers: one that samples is given each round's weights, and found out where it has others; one that
judges is asked which response is better."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from completions_server import serving
from small import lines, make
from test_judge import longer
from tiny import make_config
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from fastpref.errors import UserError
from fastpref.rounds.driver import rounds
from fastpref.rounds.dry_run import dry_run
from fastpref.train.judge import SWAYED, UNPARSED
from fastpref.train.scorer import load_scorer

HERE = Path(__file__).parents[2]
JUDGE = "judge:openai:http://localhost:8000/v1#m"


@pytest.fixture(scope="module")
def letters(world, tmp_path_factory):
    """The world with a token for each ASCII character and no other: what is sampled is text, as nearly always."""
    folder = tmp_path_factory.mktemp("letters")
    for name in ("train.jsonl", "heldout.jsonl"):
        (folder / name).write_text((world / name).read_text())
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(i): i - 29 for i in range(32, 127)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, pad_token="<pad>",
                                   bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder / "pretrained")
    torch.manual_seed(5)
    config = make_config(hidden_size=16, intermediate_size=24, vocab_size=98, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(folder / "pretrained")
    return folder


class Weights:
    """Answers with the model in the folder that it was asked for, as `transformers serve` does; or with the first."""

    def __init__(self, stale=False):
        self.stale, self.models, self.lock = stale, {}, threading.Lock()

    def __call__(self, body):
        with self.lock, torch.no_grad():
            folder = next(iter(self.models), body["model"]) if self.stale else body["model"]
            if folder not in self.models:
                self.models[folder] = LlamaForCausalLM.from_pretrained(folder).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model, ids = self.models[folder], torch.tensor([body["prompt"]])
            torch.manual_seed(body["seed"])
            heat = body["temperature"]
            drawn = {"do_sample": True, "temperature": heat, "top_k": 0} if heat else {"do_sample": False}
            out = model.generate(ids, max_new_tokens=body["max_tokens"], **drawn)[0, ids.shape[1] :].tolist()
        return tokenizer.decode(out, skip_special_tokens=True), "stop" if out[-1] == 2 else "length"


def test_rounds_over_a_server(letters, tmp_path, quiet):
    weights = Weights()
    with serving(weights) as server:
        rounds(make(letters, tmp_path / "run", sampler=f"openai:{server.url}"), display=quiet)
        names = [body["model"] for body in server.requests]
    folder = tmp_path / "run" / "sampler"
    (last,) = (path for path in folder.iterdir() if path.is_dir())
    assert names[-1] == str(last) and len(set(names)) == len(weights.models) >= 2  # one a round
    assert json.loads((folder / "probe.json").read_text())[1]
    said = json.loads((last / "generation_config.json").read_text())  # `transformers serve` is greedy without
    assert said["do_sample"] is True and said["top_k"] == 0 and said["eos_token_id"] == [2]
    responses = [path for path in (tmp_path / "run").rglob("responses.jsonl")]
    assert responses and all(lines(path) for path in responses)


def test_a_server_that_keeps_its_weights_is_found_out(letters, tmp_path, quiet):
    with serving(Weights(stale=True)) as server:
        with pytest.raises(UserError, match=f"^sampler openai:{server.url} answers as before it was given"):
            rounds(make(letters, tmp_path / "run", sampler=f"openai:{server.url}", learning_rate=0.1), display=quiet)


def test_rounds_over_a_judge(world, tmp_path, quiet):
    """It prefers longer responses: scores are shares of the others that are shorter, held out of the start's."""
    def rate(text, others):
        return sum((len(text) > len(other)) + (len(text) == len(other)) / 2 for other in others) / len(others)

    run = tmp_path / "run"
    with serving(longer) as server:
        rounds(make(world, run, scorer=f"judge:openai:{server.url}#m", eval_dataset=str(world / "heldout.jsonl"),
                    eval_prompts=3), display=quiet)
        requests = len(server.requests)
    asked = 0
    for number in (1, 2):
        compared = swayed = 0
        for line in lines(run / f"round-{number:03d}" / "responses.jsonl"):
            usable = [r for r in line["responses"] if not r["skipped"]]
            texts = [r["text"] for r in usable]
            pairs = list(itertools.combinations(texts, 2))
            compared, swayed = compared + len(pairs), swayed + sum(len(a) == len(b) for a, b in pairs)
            for i, r in enumerate(usable):
                assert r["score"] == (rate(texts[i], texts[:i] + texts[i + 1 :]) if len(texts) > 1 else 0.5)
        said = json.loads((run / f"round-{number:03d}" / "round.json").read_text())
        assert said["judge"] == {"pairs": compared, "requests": 2 * compared, SWAYED: swayed, UNPARSED: 0}
        assert said["reward"] is None and compared > 6
        assert f"| {compared} pairs | {swayed} {SWAYED} |" in quiet.console.file.getvalue()
        asked += 2 * compared
    start = {line["prompt"]: [r["text"] for r in line["responses"] if r["skipped"] != "empty"]
             for line in lines(run / "start" / "evaluation.jsonl")}
    for line in lines(run / "round-002" / "evaluation.jsonl"):
        usable, theirs = [r for r in line["responses"] if not r["skipped"]], start[line["prompt"]]
        for i, r in enumerate(usable):
            assert r["score"] == rate(r["text"], [theirs[i % len(theirs)], theirs[(i + 1) % len(theirs)]])
    assert requests > asked
    start = json.loads((run / "summary.json").read_text())["start"]
    assert start["best_of_n"][0]["reward"] == 0.5 and len(start["best_of_n"]) > 1


def test_servers_that_are_not_there_are_told_at_once(world, tmp_path):
    with serving(longer) as server:
        pass
    for changes in ({"sampler": f"openai:{server.url}"}, {"scorer": f"judge:openai:{server.url}#m"}):
        for run in (rounds, dry_run):
            with pytest.raises(UserError, match=rf"^(sampler|judge) openai:{server.url} cannot be reached .*start it"):
                run(make(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "judge:openai:localhost#m"}, "rounds.scorer is .*; a judge is judge:openai:URL#MODEL, such as"),
        ({"judge_comparisons": 3}, "are of a judge: set rounds.scorer=judge:openai:URL#MODEL"),
        ({"scorer": JUDGE, "pairing": "policy_reference"}, "policy_reference compares the scores of two models"),
        ({"scorer": JUDGE, "num_generations": 1, "loss": "sft", "pairing": "best_of_n", "min_score": 0.1},
         "a judge has nothing to compare the response with"),
        ({"sampler": "http://localhost:8000"}, "it takes openai:URL, such as openai:http://localhost:8000/v1"),
        ({"sampler": "openai:http://x/v1", "engine": "transformers"}, "name two engines: leave one out"),
        ({"sampler_reload": "true"}, "are of a server: set rounds.sampler=openai:URL"),
        ({"sampler": "openai:http://x/v1", "sampler_timeout": 0}, "rounds.sampler_timeout is 0"),
    ],
)
def test_what_a_configuration_may_not_say(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make(world, tmp_path / "run", **changes)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a server, 66 answers of a real model, a judge
def test_transformers_serve_on_smollm2(tmp_path):
    """A real server and a real model: two rounds, each answered by its own weights."""
    convert = pytest.importorskip("examples.smollm2.convert")
    try:
        source = convert.convert(tmp_path / "model")
    except (ImportError, SystemExit) as error:
        pytest.skip(f"SmolLM2: {error}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "server.log").open("w")
    program = Path(sys.executable).with_name("transformers")
    server = subprocess.Popen([program, "serve", "--port", str(port), "--device", "cpu", "--dtype", "float32"],
                              env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()
                time.sleep(0.5)
        config = tmp_path / "rounds.yaml"
        config.write_text(f"""
model_name_or_path: {source}
output_dir: {tmp_path}/run
loss: rpo
learning_rate: 1.0e-4
max_length: 128
per_device_train_batch_size: 4
rounds:
  number: 2
  prompts: {HERE}/examples/smollm2/data/train.jsonl
  scorer: examples.smollm2.verifier:satisfied
  prompts_per_round: 6
  num_generations: 4
  max_new_tokens: 24
  sampler: openai:http://127.0.0.1:{port}/v1
""")
        done = subprocess.run([sys.executable, "-m", "fastpref", "rounds", config], capture_output=True, text=True,
                              env=environment | {"PYTHONPATH": str(HERE)}, timeout=800)
        assert done.returncode == 0, done.stderr[-2000:]
        with load_scorer(f"judge:openai:http://127.0.0.1:{port}/v1#{source}", timeout=120) as scorer:
            scores = scorer.score(["What is 2 + 2?"] * 2, ["4", "A banana."])
        assert scorer.counts["requests"] == 2 and (scores == [None] * 2 if scorer.failures else sum(scores) == 1)
    finally:
        server.terminate()
    ours, theirs = json.loads((tmp_path / "run" / "sampler" / "probe.json").read_text())
    assert ours == theirs  # both in fp32
    assert len(json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"]) == 2
