"""Functions that hang, raise, exit, crash, print and return what is no number; reward models and implicit rewards
against plain computations from full outputs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import make_config, make_tokenizer, settings
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from fastpref.errors import UserError
from fastpref.train import scorer as scorer_module
from fastpref.train.config import config_from_dict
from fastpref.train.loop import train
from fastpref.train.scorer import load_scorer

CHECKS = '''
import json, math, os, signal, subprocess, sys, threading, time
from fractions import Fraction

calls = 0
table = {"a": 1.5}

def right(prompt, response):
    global calls
    calls += 1
    return float(response == prompt.rstrip(":"))

def many(prompt, response):
    if response == "hang":
        time.sleep(60)
    if response == "hang with a child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open("child.pid", "w").write(str(child.pid))
        time.sleep(60)
    if response == "hang with a daemon":
        if os.fork() == 0:
            os.setsid()
            open("daemon.pid", "w").write(str(os.getpid()))
        time.sleep(60)
    if response == "torch":
        return "torch" in sys.modules
    if response == "raise":
        return {}["no such key"]
    if response == "several lines":
        raise RuntimeError("first\\nsecond")
    if response == "exit":
        sys.exit(3)
    if response == "os_exit":
        os._exit(3)
    if response == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "print":
        print(json.dumps({"score": 99}), flush=True)
        os.write(1, b'{"score": 99}\\n')
    if response == "stops":
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGSTOP)).start()
    if response == "read":
        return float(len(sys.stdin.read()))
    if response == "calls":
        global calls
        calls += 1
        return calls
    return {
        "nan": math.nan, "inf": -math.inf, "huge": 10**400, "text": "0.5", "none": None, "complex": 1j, "list": [1.0],
        "true": True, "false": False, "int": 7, "fraction": Fraction(1, 4),
    }.get(response, 0.5)

def length(prompt, response):
    return len(prompt) + 1000 * len(response)

def roles(prompt, response):
    return 10 * len(prompt) + (prompt[-1]["content"] == response)

def slow(prompt, response):
    time.sleep(0.15)
    return float(response)
'''


@pytest.fixture
def checks(tmp_path, monkeypatch):
    (tmp_path / "checks.py").write_text(CHECKS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether the process ends in that time; a zombie has."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


# ---- functions -------------------------------------------------------------------------------------------------------


def test_a_function_scores(checks):
    with load_scorer("checks:right") as scorer:
        assert scorer.name == "checks:right"
        assert scorer.score(["ab:", "ab:", "c:"], ["ab", "AB", "c"]) == [1.0, 0.0, 1.0]
        assert scorer.score([], []) == []
        assert not scorer.failures and scorer.report() == "0 of 3 not scored"
        pid = scorer.worker.process.pid
    assert gone(pid)


def test_numbers_and_what_is_none(checks):
    """Bools are 0 and 1, any real number is one; the rest is counted under its kind, with the first message."""
    given = {
        "true": 1.0, "false": 0.0, "int": 7.0, "fraction": 0.25, "other": 0.5,
        "nan": None, "inf": None, "huge": None, "text": None, "none": None, "complex": None, "list": None,
        "raise": None, "several lines": None, "exit": None,
    }
    with load_scorer("checks:many") as scorer:
        pid = scorer.worker.process.pid
        assert scorer.score(["p"] * len(given), list(given)) == list(given.values())
        assert scorer.worker.process.pid == pid  # none of these costs a restart
        assert scorer.failures == {"not finite": 3, "not a number": 4, "raised": 3}
        assert scorer.first["not finite"] == "returned nan"
        assert scorer.first["not a number"] == "returned str: '0.5'"
        assert scorer.first["raised"].startswith("KeyError: 'no such key' (checks.py:")
        report = scorer.report()
        assert report.startswith("10 of 15 not scored: 4 not a number (first: returned str: '0.5'); ")
        assert "\n" not in report


def test_one_that_hangs_is_killed_and_the_next_is_scored(checks):
    with load_scorer("checks:many", timeout=0.3) as scorer:
        start = time.monotonic()
        found = scorer.score(["p"] * 4, ["calls", "hang", "calls", "hang with a child"])
        assert time.monotonic() - start < 10
        assert found == [1.0, None, 1.0, None]  # a new process counts from the beginning
        assert scorer.failures == {"timed out": 2} and scorer.first["timed out"] == "no score after 0.3 s"
        assert gone(int((checks / "child.pid").read_text()))
        assert scorer.score(["p"], ["other"]) == [0.5]


def test_a_daemon_that_holds_the_connection_does_not_prolong_the_time(checks):
    with load_scorer("checks:many", timeout=0.5) as scorer:
        start = time.monotonic()
        assert scorer.score(["p"] * 2, ["hang with a daemon", "other"]) == [None, 0.5]
        assert scorer.failures == {"timed out": 1} and time.monotonic() - start < 10
    os.kill(int((checks / "daemon.pid").read_text()), signal.SIGKILL)


def test_the_process_starts_without_torch(checks):
    with load_scorer("checks:many") as scorer:
        assert scorer.score(["p"], ["torch"]) == [0.0]


def test_a_process_that_reads_no_more(checks):
    """What it is sent does not fit into the pipe; the time that this may take is limited too."""
    with load_scorer("checks:many", timeout=0.5) as scorer:
        assert scorer.score(["p"], ["stops"]) == [0.5]
        time.sleep(0.4)
        start = time.monotonic()
        assert scorer.score(["p"] * 2, ["x" * 3_000_000, "other"]) == [None, 0.5]
        assert scorer.failures == {"timed out": 1} and time.monotonic() - start < 10


def test_one_that_ends_its_process(checks):
    with load_scorer("checks:many") as scorer:
        assert scorer.score(["p"] * 5, ["calls", "os_exit", "calls", "crash", "calls"]) == [1.0, None, 1.0, None, 1.0]
        assert scorer.failures == {"died": 2} and scorer.first["died"] == "exited with 3"
        scorer.first.clear()
        assert scorer.score(["p"], ["crash"]) == [None] and scorer.first["died"] == "killed by SIGSEGV"


def test_a_process_that_does_not_start_again(checks):
    with load_scorer("checks:many") as scorer:
        (checks / "checks.py").write_text("import no_such_module\n")
        assert scorer.score(["p"] * 3, ["os_exit", "calls", "calls"]) == [None] * 3
        assert scorer.failures == {"died": 3}
        assert "no_such_module" in scorer.unusable


def test_output_and_input_of_the_function_are_not_the_protocol(checks, capfd):
    with load_scorer("checks:many") as scorer:
        assert scorer.score(["p"] * 4, ["print", "read", "print", "calls"]) == [0.5, 0.0, 0.5, 1.0]
    out, err = capfd.readouterr()
    assert out == "" and err.count('{"score": 99}') == 4


def test_texts_arrive_as_they_are(checks):
    texts = ["", "ä ß 漢字 🙂", "a\nb\r\n\t\"\\ \u2028 \x00", "\ud83d", "x" * 3_000_000]
    with load_scorer("checks:length") as scorer:
        assert scorer.score(["é🙂"] * len(texts), texts) == [2 + 1000.0 * len(text) for text in texts]


def test_messages_arrive_as_messages(checks):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    with load_scorer("checks:roles") as scorer:
        assert scorer.score([prompt, prompt], ["hi", "ho"]) == [21.0, 20.0]
        assert scorer.score([[{"role": "user", "content": object()}]], ["hi"]) == [None]
        assert scorer.first["raised"].startswith("the prompt cannot be handed over")


def test_scoring_goes_on_beside_the_caller(checks):
    with load_scorer("checks:slow") as scorer:
        pending = [scorer.submit(["p"] * 2, ["1", "2"]), scorer.submit(["p"], ["3"])]
        assert not pending[0].done()
        assert [future.result() for future in pending] == [[1.0, 2.0], [3.0]]


def test_closing_does_not_wait_for_one_that_hangs(checks):
    start = time.monotonic()
    with load_scorer("checks:many", timeout=None) as scorer:
        hanging, waiting = scorer.submit(["p"] * 2, ["hang"] * 2), scorer.submit(["p"], ["other"])
        time.sleep(0.2)
        pid = scorer.worker.process.pid
    assert time.monotonic() - start < 10 and gone(pid)
    assert hanging.result() == [None, None] and waiting.cancelled()


def test_the_process_ends_with_the_run(checks):
    """Also where the run is killed while a function hangs."""
    worker = Path(scorer_module.__file__).with_name("scorer_worker.py")
    code = (
        "import multiprocessing, subprocess, sys, time\n"
        "ours, theirs = multiprocessing.Pipe()\n"
        f"command, fd = [sys.executable, {str(worker)!r}, 'checks:many'], theirs.fileno()\n"
        "p = subprocess.Popen([*command, str(fd)], pass_fds=[fd])\n"
        "assert ours.recv_bytes() == b'{\"ready\": true}'\n"
        "ours.send_bytes(b'{\"prompt\": \"p\", \"response\": \"hang\"}')\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    pid = int(run.stdout.readline())
    assert not gone(pid, 0.3)
    run.kill()
    run.communicate()
    assert gone(pid)


@pytest.mark.parametrize(
    ("spec", "text", "message"),
    [
        ("no_such_module:f", "", "scorer 'no_such_module:f': there is no module 'no_such_module'"),
        ("own:f", "", "scorer 'own:f': module own has no 'f'"),
        ("own:f", "f = 3", "scorer 'own:f': f is a int, not a function"),
        ("own:f", "x = 1\n1 / 0", r"importing own raised ZeroDivisionError: division by zero \(own.py:2\)"),
        ("own:f", "import missing_thing", "importing own raised ModuleNotFoundError: No module named 'missing_thing'"),
        ("own:f", "def f(:", "importing own raised SyntaxError"),
        ("own:f", "import sys; sys.exit(0)", "importing own raised SystemExit: 0"),
        ("own:f", "import os; os._exit(4)", "importing its module ended Python: exited with 4"),
        ("own:f", "import time; time.sleep(60)", "its module is not imported after 0.5 s"),
        ("own.inner:f", "", "there is no module 'own.inner'"),
        ("own:", "", "scorer 'own:': it takes module:function, the folder"),
        ("own:f:g", "", "scorer 'own:f:g': it takes module:function, the folder"),
    ],
)
def test_a_function_that_cannot_be_used(tmp_path, monkeypatch, spec, text, message):
    (tmp_path / "own.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    if "sleep" in text:
        monkeypatch.setattr(scorer_module, "START_TIMEOUT", 0.5)
    with pytest.raises(UserError, match=message) as caught:
        load_scorer(spec)
    assert "\n" not in str(caught.value)


def test_modules_of_the_package_are_not_in_the_way(tmp_path, monkeypatch):
    """`report`, `data`, ... are the user's own names, not files beside the worker."""
    (tmp_path / "report.py").write_text("print('loading')\ndef f(prompt, response): return 1")
    monkeypatch.chdir(tmp_path)
    with load_scorer("report:f") as scorer:
        assert scorer.score(["a"], ["b"]) == [1.0]


@pytest.mark.parametrize("timeout", [0, -1.0, math.inf, math.nan])
def test_timeouts_that_are_refused(timeout):
    with pytest.raises(UserError, match="it takes seconds, above 0, or none"):
        load_scorer("checks:right", timeout=timeout)


# ---- models ----------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROMPTS, RESPONSES = ["ab:", "ab:", "cde:", "f:"], [" ab", " x", " something longer", " f"]


def save_reward_model(folder: Path, **changes):
    torch.manual_seed(3)
    config = LlamaConfig(**(make_config().to_dict() | {"num_labels": 1} | changes))
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.mul_(50)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def reward_at_eos(model, ids):
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return float(hidden.double() @ model.score.weight[0].detach().double())


@pytest.mark.parametrize("pad", [0, None])
def test_a_reward_model_is_read_at_eos(tmp_path, pad):
    model, tokenizer = save_reward_model(tmp_path / "rm", pad_token_id=pad)
    expected = [
        reward_at_eos(model, tokenizer(prompt + response)["input_ids"] + [2])
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    with load_scorer(str(tmp_path / "rm"), batch_size=3) as scorer:
        assert scorer.score(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-4)
        assert max(expected) - min(expected) > 0.1
        assert scorer.score(["ab:", "ab:", "ab:"], ["  ", "", " ab"]) == [None, None, pytest.approx(expected[0])]
        assert scorer.failures == {"empty response": 2} and scorer.scored == 7


def test_a_reward_model_reads_messages_through_its_template(tmp_path):
    model, tokenizer = save_reward_model(tmp_path / "rm")
    ids = tokenizer("<s>[user]hi[assistant]ho</s>", add_special_tokens=False)["input_ids"]
    assert ids[0] == 1 and ids[-1] == 2
    with load_scorer(str(tmp_path / "rm")) as scorer:
        found = scorer.score([[{"role": "user", "content": "hi"}]], ["ho"])
        assert found == pytest.approx([reward_at_eos(model, ids)], abs=1e-4)
        scorer.tokenizer.chat_template = None
        assert scorer.score([[{"role": "user", "content": "hi"}]], ["ho"]) == [None]
        assert "no chat template" in scorer.first["raised"]


def test_a_reward_model_that_is_an_adapter(tmp_path, world):
    """As `use_peft` saves it: the adapter and the score layer, on a causal LM."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(6)
    base = LlamaForSequenceClassification.from_pretrained(world / "pretrained", num_labels=1)
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    model = peft.get_peft_model(base, lora)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.5)
    model.save_pretrained(tmp_path / "rm")
    make_tokenizer().save_pretrained(tmp_path / "rm")
    tokenizer = make_tokenizer()
    with torch.no_grad():
        expected = [
            float(model(input_ids=torch.tensor([tokenizer(p + r)["input_ids"] + [2]])).logits)
            for p, r in zip(PROMPTS, RESPONSES, strict=True)
        ]
    with load_scorer(str(tmp_path / "rm")) as scorer:
        assert scorer.score(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-4)


def test_a_reward_model_that_is_damaged(tmp_path):
    save_reward_model(tmp_path / "rm")
    with load_scorer(str(tmp_path / "rm")) as scorer:
        with torch.no_grad():
            scorer.model.score.weight[0, 0] = math.nan
        assert scorer.score(PROMPTS, RESPONSES) == [None] * 4
        assert scorer.failures == {"not finite": 4}


def test_what_is_no_reward_model(tmp_path, world):
    for spec, message in (
        (str(tmp_path / "nothing"), "no reward model that loads .* it takes module:function"),
        (str(world / "pretrained"), r"no reward model that loads \(its weights lack score.weight\)"),
    ):
        with pytest.raises(UserError, match=message):
            load_scorer(spec)
    save_reward_model(tmp_path / "three", num_labels=3)
    with pytest.raises(UserError, match="has 3 labels"):
        load_scorer(str(tmp_path / "three"))
    LlamaForCausalLM(make_config(num_labels=1)).save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match="no reward model that loads .its weights lack score.weight"):
        load_scorer(str(tmp_path / "lm"))
    save_reward_model(tmp_path / "endless")
    make_tokenizer(eos=False).save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match="no EOS token"):
        load_scorer(str(tmp_path / "endless"))


def full_logps(model, prompt, response):
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return sum(float(logps[len(prompt) + t - 1, token]) for t, token in enumerate(response))


@pytest.fixture(scope="module")
def run_dir(world, tmp_path_factory):
    """Two stages: SFT, then DPO with beta 0.3, whose reference is what the first ended with."""
    folder = tmp_path_factory.mktemp("implicit") / "run"
    stages = [{"loss": "sft"}, {"loss": "dpo", "beta": 0.3, "learning_rate": 1e-2}]
    values = settings(world, folder, stages=stages, max_steps=2, save_steps=1, save_total_limit=None)
    train(config_from_dict(values))
    return folder


def test_the_implicit_reward_of_a_run(run_dir, world):
    tokenizer = make_tokenizer()

    def expected(weights, reference, beta):
        policy, ref = (LlamaForCausalLM.from_pretrained(folder) for folder in (weights, reference))
        rows = [(tokenizer(p)["input_ids"], tokenizer(r)["input_ids"][1:] + [2]) for p, r in zip(PROMPTS, RESPONSES)]
        return [beta * (full_logps(policy, *row) - full_logps(ref, *row)) for row in rows]

    saved = run_dir / "checkpoints"
    torch.manual_seed(4)
    state = torch.get_rng_state()
    for folder, weights, reference, beta in (
        (run_dir, run_dir / "model", saved / "01-dpo-00000000", 0.3),
        (run_dir / "model", run_dir / "model", saved / "01-dpo-00000000", 0.3),
        (saved / "01-dpo-00000001", saved / "01-dpo-00000001", saved / "01-dpo-00000000", 0.3),
        (saved / "00-sft-00000001", saved / "00-sft-00000001", world / "pretrained", 1.0),  # no beta: nats
    ):
        with load_scorer(f"implicit:{folder}", batch_size=3) as scorer:
            found = scorer.score(PROMPTS, RESPONSES)
        assert found == pytest.approx(expected(weights, reference, beta), abs=2e-5)
        assert max(map(abs, found)) > 1e-3
    assert torch.equal(torch.get_rng_state(), state)
    with load_scorer(f"implicit:{saved / '01-dpo-00000000'}") as scorer:
        assert scorer.score(PROMPTS, RESPONSES) == [0.0] * 4  # the policy is its reference


def test_no_implicit_reward(tmp_path, world, run_dir):
    reward_run = tmp_path / "reward" / "model"
    reward_run.mkdir(parents=True)
    values = settings(world, tmp_path, loss="bradley_terry")
    (tmp_path / "reward" / "config.yaml").write_text(json.dumps(values))  # JSON is YAML
    for folder, message in (
        (tmp_path, "neither the folder of a run nor a checkpoint of one"),
        (world / "pretrained", "neither the folder of a run nor a checkpoint of one"),
        (run_dir / "checkpoints", "not a checkpoint that can be read"),
        (reward_run, "the run trains a reward model, which is a scorer itself: .*reward$"),
    ):
        with pytest.raises(UserError, match=message):
            load_scorer(f"implicit:{folder}")
