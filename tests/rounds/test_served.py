"""Rounds whose responses a server samples: it is given each round's weights, and found out where it has others."""

from __future__ import annotations

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
from tiny import make_config
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from fastpref.errors import UserError
from fastpref.rounds.driver import rounds

HERE = Path(__file__).parents[2]


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
                              env=environment | {"PYTHONPATH": str(HERE)}, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
    finally:
        server.terminate()
    ours, theirs = json.loads((tmp_path / "run" / "sampler" / "probe.json").read_text())
    assert ours == theirs  # both in fp32
    assert len(json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"]) == 2
