"""The command: exit codes, one clear line for each thing a user can get wrong, and signals to a real process."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import fastpref
from fastpref import cli
from fastpref.train.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parent / "train"))
from tiny import make_config, make_pairs, make_tokenizer, settings, write_rows  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    make_tokenizer().save_pretrained(folder / "config")
    make_config().save_pretrained(folder / "config")
    write_rows(folder / "train.jsonl", make_pairs(16, seed=1))
    write_rows(folder / "heldout.jsonl", make_pairs(6, seed=2))
    return folder


def write(world, path, **changes):
    values = settings(world, path.with_suffix(""), model_name_or_path=str(world / "config"), init_from_config=True)
    path.write_text(yaml.safe_dump(values | changes))
    return str(path)


def failed(capsys, arguments, code=2):
    """The one line on stderr of a command that fails with `code`."""
    capsys.readouterr()
    assert cli.main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastpref: ")
    return line.removeprefix("fastpref: ")


def test_train_then_eval(world, tmp_path, capsys):
    config = write(world, tmp_path / "run.yaml", eval_generate=True, eval_max_new_tokens=3)
    assert cli.main(["train", config, "loss=rpo", "eta=0.1", "max_steps=3", "save_steps=2"]) == 0
    out = capsys.readouterr().out
    assert "after rpo" in out and "peak memory" in out and str(tmp_path / "run" / "report.html") in out
    after = json.loads((tmp_path / "run" / "summary.json").read_text())["after"]
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert f"{after['logps/chosen']:.4g}" in out and f"{after['rewards/margins']:.4g}" in out
    assert cli.main(["eval", str(tmp_path / "run" / "model")]) == 0
    assert f"{after['logps/chosen']:.4g}" in capsys.readouterr().out
    (earlier,) = (tmp_path / "run" / "checkpoints").glob("00-rpo-00000002")
    assert cli.main(["eval", str(earlier)]) == 0
    out = "".join(capsys.readouterr().out.split())  # a long title is broken
    assert "00-rpo-00000002" in out and f"{after['logps/chosen']:.6g}" not in out
    (tmp_path / "empty").mkdir()
    assert "neither the folder of a run nor a checkpoint" in failed(capsys, ["eval", str(tmp_path / "empty")])
    # other data: their reference log-probs are computed from the stage's first weights, made again from the seed
    assert cli.main(["eval", str(tmp_path / "run"), f"eval_dataset={world / 'train.jsonl'}"]) == 0
    assert "reward margin" in capsys.readouterr().out
    assert cli.main(["eval", config]) == 0
    assert "reward margin │ 0 " in " ".join(capsys.readouterr().out.split()) + " "


def test_version_info_and_plan(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"fastpref {fastpref.__version__}\n"
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out
    assert "rows: reference" in out and "rows: native" in out and "peft" in out
    assert "GEMM sums        yes" in out  # fp32 += bf16 products, which torch does from 2.10 on
    assert cli.main(["plan", "--pairs", "4", "--length", "512", "--hidden", "64", "--vocab", "1000"]) == 0
    assert "4096 scored rows in 8 sequences" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "line"), [
    ("train", "  max_length [1024] prompt + longest response (whole number, at least 2)"),
    ("rounds", "  generation_batch_size [32] responses generated at once (whole number, at least 1)"),
])
def test_help_of_a_command_lists_the_keys_of_its_file(capsys, monkeypatch, command, line):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        cli.parse([command, "--help"])
    assert ended.value.code == 0
    assert line in capsys.readouterr().out.splitlines()


def test_what_needs_no_torch_does_not_wait_for_it():
    """Its import takes seconds, and so does transformers'."""
    script = """if True:
        import sys
        from fastpref import cli
        for words in ("losses", "keys", "keys length", "plan --length 8 --hidden 8 --vocab 8"):
            assert cli.main(words.split()) == 0
        for words in ("--help", "train --help", "rounds --help", "bench --help"):
            try: cli.main(words.split())
            except SystemExit: pass
        print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)), file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert "what became faster or slower" in done.stdout  # of the benchmarks' commands


def test_losses_compute_where_they_were_imported_before_torch():
    script = """if True:
        from fastpref import losses
        totals = losses.Totals(2, 6, 3)
        seq = lambda t: losses.SequenceLogps(t([-1.0, -2.0]), t([3, 3]), ref_logps=t([-1.5, -1.0]), totals=totals)
        import torch
        print(float(torch.compile(losses.DPO(beta=0.1), backend="eager", fullgraph=True)(seq(torch.tensor))))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(done.stdout) == pytest.approx(math.log1p(math.exp(-0.1 * 1.5)))


def test_keys_of_a_word(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    named = {line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "}
    assert named >= {*TrainConfig.__dataclass_fields__} - {"loss_options"} and "rounds.number" in named
    assert named >= {"beta", "eta", "desirable_weight"}  # options of losses
    assert cli.main(["keys", "save-steps"]) == 0
    assert capsys.readouterr().out.split("\n", 1)[1].startswith("  save_steps [500] 0: only where a stage ends")
    assert cli.main(["keys", "cutoff_len"]) == 0  # LLaMA-Factory's name
    assert "  max_length [1024]" in capsys.readouterr().out
    assert cli.main(["keys", "eta"]) == 0 and "of rpo, slic" in capsys.readouterr().out


def test_help_of_train_names_the_commonest_twelve(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["train", "--help"])
    text = capsys.readouterr().out.partition("the commonest keys")[2]
    assert len(re.findall(r"^  \w+ \[", text, re.M)) == 12 and "fastpref keys" in text


@pytest.mark.parametrize("columns", [80, 160])
def test_losses(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["losses"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    rows = {line.split()[0]: line.split() for line in lines if line and not line.startswith(" ")}
    assert rows.keys() >= set(fastpref.losses.CLASSES)
    for name, (reference, pairs, scratches) in {
        "dpo": ("yes", "yes", "1"), "rpo": ("yes", "yes", "2"), "simpo": ("no", "yes", "1"),
        "kto": ("yes", "no", "1"), "aot": ("yes", "yes*", "-"), "bco": ("yes", "no*", "-"),
    }.items():
        assert tuple(rows[name][-4:-1]) == (reference, pairs, scratches) and rows[name][-1][4] == "."


def test_cached_reference_log_probs(world, tmp_path, capsys):
    config = write(world, tmp_path / "run.yaml", max_steps=1)  # of 4 examples: no others are needed
    assert cli.main(["cache-ref", config, "seed=7"]) == 0
    assert "dpo: reference log-probs of 4 train examples in " in capsys.readouterr().out
    assert cli.main(["train", config, "seed=7"]) == 0
    assert f"4 train examples from {tmp_path / 'run' / 'reference'}" in capsys.readouterr().out
    line = failed(capsys, ["cache-ref", config, "max_length=50"])
    assert "00-dpo-train-part.safetensors: holds reference log-probs of something else: weights (" in line
    assert "there is nothing to cache" in failed(capsys, ["cache-ref", config, "loss=sft"])


def test_bad_command_lines(world, tmp_path, capsys):
    config = write(world, tmp_path / "run.yaml")
    assert "nope.yaml: cannot be read (No such file or directory)" in failed(capsys, ["train", "nope.yaml"])
    for name in (str(tmp_path / "nowhere"), "./nowhere", "runs/none/model"):
        assert f"{name}: no such folder" in failed(capsys, ["train", config, f"model_name_or_path={name}"])
    assert "betta: no such key; the nearest is beta" in failed(capsys, ["train", config, "betta=1"])
    assert "max_steps is 'many'; it takes a whole number" in failed(capsys, ["train", config, "max_steps=many"])
    line = failed(capsys, ["train", config, f"train_dataset={tmp_path / 'none.jsonl'}"])
    assert line.endswith("none.jsonl: no such file")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": 3}\n')
    line = failed(capsys, ["train", config, f"train_dataset={broken}"])
    assert "broken.jsonl:2: field 'chosen'" in line
    assert "has neither a model nor a checkpoint yet" not in failed(capsys, ["eval", str(tmp_path)])
    assert "is neither the folder of a run nor a checkpoint of one" in failed(capsys, ["eval", str(tmp_path)])
    assert "eval_dataset is missing" in failed(capsys, ["eval", config, "eval_dataset=null"])
    assert "--vocab is 0" in failed(capsys, ["plan", "--length", "1", "--hidden", "1", "--vocab", "0"])
    for arguments in ([], ["tune"], ["train"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2


def test_a_traceback_only_when_debugging(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTPREF_DEBUG", "1")
    assert cli.main(["train", "nope.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_out_of_memory_is_one_line(world, tmp_path, capsys, monkeypatch):
    def run(options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd a page of advice.")

    monkeypatch.setattr(cli, "_info", run)
    assert "out of GPU memory; lower per_device_train_batch_size" in failed(capsys, ["info"], code=1)


def test_a_compiler_that_fails_is_one_line(capsys, monkeypatch):
    """TorchInductor's own error, of a compiler that is there and cannot compile (no headers, no disk)."""
    torch.compiler.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("false",))
    monkeypatch.setattr(cli, "_info", lambda options: torch.compile(lambda x: x.sin() * 17.25 + 1)(torch.ones(77)))
    with torch._inductor.utils.fresh_cache():
        said = failed(capsys, ["info"], code=1)
    assert "torch_compile: the compiler failed (" in said and "leave it out (FASTPREF_DEBUG=1" in said


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends(world, tmp_path, signum, code):
    config = write(world, tmp_path / "run.yaml", max_steps=100_000, eval_dataset=None, logging_steps=1)
    command = [sys.executable, "-m", "fastpref", "train", config]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, out + err
    assert "finishing this step, then saving a checkpoint" in out
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert err.count("\n") == 1 and f"saved in {saved}; --resume goes on from there" in err
    state = json.loads((saved / "state.json").read_text())
    assert state["step"] == len(metrics.read_text().splitlines()) > 0


BARE = """
import sys, types
package = types.ModuleType("fastpref")  # without torch, which not every Python here may have
package.__path__, package.__version__ = [sys.argv[1]], "0"
sys.modules["fastpref"] = package
from fastpref.cli import parse
for line in sys.argv[2:]:
    try:
        options = parse(line.split())
        print(options.config, options.overrides, options.resume)
    except SystemExit as stopped:
        print(stopped.code)
"""


@pytest.mark.parametrize("python", [sys.executable, "python3.10", "python3.11", "python3.12", "python3.13"])
def test_overrides_stand_before_and_after_options(python):
    """On every Python there is here: their argparse differ."""
    lines = {
        "train dpo.yaml --resume dp_replicate=4": "dpo.yaml ['dp_replicate=4'] True",
        "train dpo.yaml a=1 --resume b=-2 c=--d": "dpo.yaml ['a=1', 'b=-2', 'c=--d'] True",
        "train --resume dpo.yaml a=1 b=2": "dpo.yaml ['a=1', 'b=2'] True",
        "rounds runs/lr=1/x.yaml a=1 b=2 --resume": "runs/lr=1/x.yaml ['a=1', 'b=2'] True",
        "train dpo.yaml a=1": "dpo.yaml ['a=1'] False",
        "train dpo.yaml --resume word": "2",
        "train dpo.yaml --resume --betta=1": "2",
        "train dpo.yaml --resume --dry-run a=1": "2",
        "plan a=1": "2",
    }
    if not shutil.which(python) or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip("no such Python")
    command = [python, "-c", BARE, str(ROOT / "fastpref"), *lines]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == list(lines.values())
