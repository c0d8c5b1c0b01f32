"""The verdict on a run: saved runs of each kind, each rule at its threshold, the frontier study, and what is shown."""

import importlib.util
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_report import Page, charts
from tiny import make, make_pairs, read_metrics, write_rows

from fastpref.cli import main
from fastpref.report import verdict
from fastpref.report.metrics import percent
from fastpref.report.page import write_report
from fastpref.report.reading import read_run
from fastpref.report.verdict import Evidence, Gold, judge, verdict_of, verdict_of_rounds
from fastpref.train import stage
from fastpref.train.display import Display
from fastpref.train.loop import train
from fastpref.train.model import load_tokenizer
from fastpref.train.stage_data import load_data
from fastpref.train.summary import write_summary

SAVED = Path(__file__).parent / "verdicts"
ROOT = Path(__file__).parents[2]


def run_of(folder, name):
    folder.mkdir(exist_ok=True)
    shutil.copy(SAVED / f"{name}.jsonl", folder / "metrics.jsonl")
    return folder


# The quickstart: RPO after SFT, with eta 1 and 0.005; then DPO at learning rates of 1e-3, 100, 3, 1e-7
@pytest.mark.parametrize("name, kind, row, first", [
    ("worked", "worked", "worked", "exact match rose: 73.4% → 87.7%"),
    ("past", "over-optimised", "past-peak", "exact match fell: 73.4% → 66.3%"),
    ("over-optimised", "over-optimised", "chosen-fell", "exact match fell: 87.7% → 53.7%"),
    ("broken", "broken", "broken", "4 of 10 steps were skipped for NaN or infinite gradients"),
    ("exploded", "broken", "broken", "held-out loss 0.693 → "),
    ("nothing", "nothing", "nothing", "no clear change of exact match: 87.7% → 87.7%"),
])
def test_saved_runs_of_each_kind(tmp_path, name, kind, row, first):
    found = verdict_of(read_run(run_of(tmp_path, name)))
    assert (found.kind, found.row) == (kind, row)
    assert 2 <= len(found.because) <= 3 and found.because[0].startswith(first)
    assert found.content() == {"kind": kind, "because": list(found.because), "next": f"{found.helps} ({found.place})"}


@pytest.mark.parametrize("name", ["over-optimised", "broken", "exploded"])
def test_no_green_where_the_policy_has_left(tmp_path, name):
    """Without the exact match, so that the loss looks best of all."""
    rows = [json.loads(line) for line in (SAVED / f"{name}.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key != "exact_match"} for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert verdict_of(read_run(tmp_path)).kind == ("over-optimised" if name == "over-optimised" else "broken")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert f'verdict {"over-optimised" if name == "over-optimised" else "broken"}"' in page
    cards = dict(re.findall(r'<div class="card number (\w*)"><dt>(.*?)</dt>', page)[i][::-1]
                 for i in range(len(re.findall(r'<div class="card number (\w*)"><dt>', page))))
    assert "better" not in cards.values() and {"KL to the reference", "Loss", "Reward margin"} <= cards.keys()


def test_a_run_that_worked_is_green(tmp_path):
    page = write_report(run_of(tmp_path, "worked")).read_text(encoding="utf-8")
    assert 'class="card number better"><dt>Loss' in page and "Verdict: worked" in page


def at(kind, **given):
    found = judge(Evidence(**given))
    assert found.kind == kind, found
    return found


LOSS = [(0, 0.69), (10, 0.6), (20, 0.5)]


def test_rules_at_their_thresholds():
    at("worked", loss=LOSS)
    at("broken", loss=[(0, 0.69), (20, 6.91)])
    at("over-optimised", loss=[(0, 0.69), (20, 6.89)])  # past its lowest, its start
    at("broken", loss=LOSS, chosen=(-8.0, -50.1), tokens=4)  # 12.5 nats a token
    at("over-optimised", loss=LOSS, chosen=(-8.0, -49.9), tokens=4)
    at("broken", loss=LOSS, kl=50.1, kl_of="fresh samples", tokens=4)
    at("broken", loss=LOSS, damage="the loss is NaN")
    assert at("over-optimised", loss=LOSS, chosen=(-8.0, -12.1)).row == "chosen-fell"  # half of it gone
    at("worked", loss=LOSS, chosen=(-8.0, -11.9))
    at("worked", loss=LOSS, chosen=(-0.4, -1.3))  # less than a nat
    assert at("over-optimised", loss=LOSS, kl=4.1, tokens=4).row == "far"
    at("worked", loss=LOSS, kl=3.9, tokens=4)
    assert at("over-optimised", loss=[*LOSS, (30, 0.512)]).row == "loss-past"  # lowest 0.5 + 2 % of that
    at("worked", loss=[*LOSS, (30, 0.509)])
    at("worked", loss=[*LOSS, (30, 0.6)], of="training")  # of batches: no evidence of new pairs
    at("nothing", loss=[(0, 0.69), (20, 0.684)])
    at("worked", loss=[(0, 0.69), (20, 0.683)])
    assert at("nothing").row == "unmeasured"


def test_what_was_measured_decides():
    def gold(*values, error=0.02):
        return [Gold("reward", [(10.0 * i, value, error) for i, value in enumerate(values)])]

    found = at("over-optimised", golds=gold(0.1, 0.6, 0.5), loss=LOSS)  # by more than 2 sqrt(2) 0.02
    words = "reward was highest at step 10 (0.6 ± 0.02) and ended at 0.5 ± 0.02"
    assert found.row == "past-peak" and found.because[0] == words
    found = judge(Evidence(golds=gold(0.1, 0.6, 0.5), place=lambda step: f"checkpoints/00-dpo-{step:08.0f}"))
    assert found.helps.startswith("Take checkpoints/00-dpo-00000010 (step 10). Take the best checkpoint;")
    at("worked", golds=gold(0.1, 0.6, 0.55), loss=LOSS)  # within the error
    at("worked", golds=gold(0.1, 0.6, 0.55, error=0.0), loss=LOSS)  # exact, but a tenth of what was won
    at("over-optimised", golds=gold(0.1, 0.6, 0.54, error=0.0), loss=LOSS)
    at("over-optimised", golds=gold(0.5, 0.3), loss=LOSS)  # below its start
    risen = at("worked", golds=gold(0.1, 0.6), loss=[*LOSS, (30, 0.9)], chosen=(-8.0, -20.0))
    assert risen.extreme and risen.because[0] == "reward rose: 0.1 ± 0.02 → 0.6 ± 0.02"
    assert at("over-optimised", golds=gold(0.1, 0.1), loss=[*LOSS, (30, 0.9)]).row == "loss-past"
    found = at("nothing", golds=gold(0.1, 0.1), loss=[(0, 0.69), (9, 0.69)])
    assert found.because[0] == "no clear change of reward: 0.1 ± 0.02 → 0.1 ± 0.02"
    exact = [Gold("exact match", [(0.0, 0.8, 0.0), (9.0, 0.76, 0.0)], percent, verdict.POINTS)]
    at("worked", golds=exact, loss=LOSS)  # 4 points
    luck = [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.75, 0.5, 0.5]  # of twelve one was lucky
    at("worked", golds=gold(*luck, error=0.1), loss=LOSS)


def test_held_out_records_that_were_trained_on_come_first(tmp_path):
    found = at("worked", loss=LOSS, leaked=0.25)
    assert found.because[0] == "25.0% of the held-out records are among the training ones" and found.row == "leaked"
    run_of(tmp_path, "nothing")
    summary = {"stages": {"dpo": {"leaked": 1.0}}}
    write_summary(tmp_path, summary)
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert saved == summary and saved["verdict"]["kind"] == "nothing"
    assert saved["verdict"]["because"][0].startswith("100.0% of the held-out records")


def test_rounds_have_the_same_engine():
    of_round = verdict.Verdict("nothing", ("a",), "unmeasured").content()
    rows = [{"round": 0}, {"round": 1, "training": {"verdict": of_round}}]
    assert verdict_of_rounds(rows, []).content() == of_round
    reward = Gold("held-out reward", [(0, 0.1, 0.01), (1, 0.7, 0.01), (2, 0.4, 0.01)], at="round")
    found = verdict_of_rounds(rows, [reward])
    assert found.kind == "over-optimised" and found.because[0].startswith("held-out reward was highest at round 1")
    rows[1]["training"]["verdict"] |= {"kind": "broken", "because": ["the loss is NaN"]}
    assert verdict_of_rounds(rows, [reward]).because[0] == "round 1 broke: the loss is NaN"


@pytest.mark.parametrize("terminal", [False, True])
def test_in_the_terminal(tmp_path, terminal):
    content = verdict_of(read_run(run_of(tmp_path, "over-optimised"))).content()
    shown = io.StringIO()
    Display(Console(file=shown, width=80, force_terminal=terminal, color_system=None)).verdict(content)
    lines = shown.getvalue().splitlines()
    assert lines[0].rstrip() == "verdict over-optimised" and lines[1].rstrip() == f"  {content['because'][0]}"
    assert not terminal or max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()).endswith(f"next: {content['next']}")


def test_every_verdict_has_its_row_in_the_docs():
    page = (ROOT / "docs" / "watch.md").read_text(encoding="utf-8")
    assert re.findall(r'<a id="([\w-]+)"></a>', page) == list(verdict.ROWS)
    for name in re.findall(r'"([a-z-]+)", \[', (ROOT / "fastpref/report/verdict.py").read_text()):
        assert name in verdict.ROWS or name in ("broken", "over-optimised")


def test_how_often_it_is_right_on_the_frontier():
    """The committed counts are those of the committed curves, and docs/watch.md has them."""
    sys.path.insert(0, str(ROOT / "examples" / "studies"))
    try:
        spec = importlib.util.spec_from_file_location("verdicts", ROOT / "examples" / "studies" / "verdicts.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        committed = json.loads((module.study.RESULTS / "verdicts.json").read_text())
        record = json.loads((module.study.RESULTS / "frontier.json").read_text())
        assert module.table(committed["counts"]) in module.PAGE.read_text(encoding="utf-8")
        found = module.counts(record, committed["starts"], ["none"])
        assert found["none"] == committed["counts"]["none"]
        caught, missed, wrong, right = committed["counts"]["sampled"]["end"]
        assert committed["counts"]["exact"]["end"][1:3] == [0, 0]
        assert caught / (caught + missed) > 0.7 and wrong / (wrong + right) < 0.1
    finally:
        sys.path.remove(str(ROOT / "examples" / "studies"))


def test_runs_are_compared_in_one_page(tmp_path, capsys):
    folders = [run_of(tmp_path / name, name) for name in ("worked", "past")]
    for folder, eta in zip(folders, (1.0, 0.005)):
        (folder / "config.yaml").write_text(f"output_dir: {folder}\nseed: 42\nstages:\n- {{loss: rpo, eta: {eta}}}\n")
    assert main(["compare", *map(str, folders), "--output", str(tmp_path / "two.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'two.html'}\n"
    page = Page((tmp_path / "two.html").read_text(encoding="utf-8"))
    assert "worked: worked" in page.text and "past: over-optimised exact match fell: 73.4% → 66.3%" in page.text
    assert "stages.0.eta 1.0 0.005" in page.text and "seed" not in page.text and "output_dir" not in page.text
    assert "Exact match, greedy 87.7% 66.3%" in page.text
    drawn = charts((tmp_path / "two.html").read_text(encoding="utf-8"))
    for title in ("Loss", "KL to the reference", "Exact match, greedy"):
        roles = {g.get("class").split()[0] for g in drawn[title].iter("g")}
        assert {"run0", "run1"} <= roles, title
    assert main(["compare", *map(str, folders), str(run_of(tmp_path / "exploded", "exploded")), "--output",
                 str(tmp_path / "three.html")]) == 0
    html = (tmp_path / "three.html").read_text(encoding="utf-8")
    assert "exploded: it broke" in html and "Left out, for it broke: exploded." in html and '<g class="run2' not in html
    capsys.readouterr()
    assert main(["compare", str(folders[0])]) == 2
    assert "compare takes 2 to 8 runs; got 1" in capsys.readouterr().err


def test_a_report_is_made_again(tmp_path, capsys):
    folder = run_of(tmp_path / "run", "past")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert "Verdict: over-optimised" in (folder / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err


def test_a_held_out_set_of_training_records_is_said(world, tmp_path):
    rows = make_pairs(8, seed=3)
    trained, held_out = write_rows(tmp_path / "a.jsonl", rows[:6]), write_rows(tmp_path / "b.jsonl", rows[3:7])
    shown = io.StringIO()
    config = make(world, tmp_path / "run", train_dataset=str(trained), eval_dataset=str(held_out))
    (data,) = load_data(config.stage_configs(), load_tokenizer(config), Display(Console(file=shown, width=200)))
    assert data.leaked == 0.75
    assert "dpo: 75.0 % of the held-out records are among the training ones" in shown.getvalue()


def test_a_run_tells_its_verdict_and_is_reported_as_it_goes(world, tmp_path, monkeypatch):
    """In summary.json and the terminal; a report at every evaluation and sampling; lines no wider than the terminal."""
    seen = []
    monkeypatch.setattr(stage, "write_report", lambda folder: seen.append(len(read_metrics(folder))))
    shown = io.StringIO()
    config = make(world, tmp_path / "run", max_steps=4, eval_steps=2, logging_steps=2, sample_steps=2,
                  sample_prompts=3, sample_max_new_tokens=4, sample_time_share=None,
                  eval_dataset=make(world, tmp_path).train_dataset)
    summary = train(config, display=Display(Console(file=shown, width=80, force_terminal=True, color_system=None)))
    lines = read_metrics(tmp_path / "run")
    ours = [i for i, row in enumerate(lines, 1) if row["split"] != "train"]
    assert seen == ours and len(ours) == 6
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved["verdict"] == summary["verdict"] == verdict_of(read_run(tmp_path / "run")).content()
    assert summary["stages"]["dpo"]["leaked"] == 1.0
    assert summary["verdict"]["because"][0] == "100.0% of the held-out records are among the training ones"
    words = re.sub(r"\x1b\[\w+", "", shown.getvalue())
    assert f"verdict {summary['verdict']['kind']}" in words
    held_out = [line for line in words.splitlines() if " held-out | " in line]
    assert len(held_out) == 3 and all("loss" in line and len(line.rstrip()) <= 80 for line in held_out)
    sampled = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in sampled] == [0, 2, 4] and len(sampled[0]["samples"]) == 3
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert page.count('<article class="card sample developed">') == 3
