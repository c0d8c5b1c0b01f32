"""The run report: its numbers are those of the files, its charts are to scale, and no text of a run is markup."""

import ast
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastpref.errors import UserError
from fastpref.report import charts as chart
from fastpref.report import metrics
from fastpref.report.page import write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Fails on tags that are not closed in order; collects elements with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def rows_of_a_run(steps=60):
    for step in range(1, steps + 1):
        yield {"stage": "sft", "split": "train", "step": step, "epoch": step / steps, "loss": 3.0 / step,
               "learning_rate": 1e-3, "grad_norm": 1.5, "tokens_per_s": 5000.0, "peak_memory_mib": 700.0}
    for step in range(0, steps + 1):
        at = step / steps
        values = {"logps/chosen": -12.0 - 3.25 * at, "logps/rejected": -14.0 - 21.0 * at,
                  "rewards/chosen": -0.3 * at, "rewards/rejected": -2.1 * at, "rewards/margins": 1.8 * at,
                  "rewards/accuracies": 0.5 + 0.4375 * at, "watch/kl": 1.7 * at, "loss": 0.7 - 0.4 * at}
        if step % 20 == 0:
            yield {"stage": "rpo", "split": "eval", "step": step, **values}
        yield {"stage": "rpo", "split": "train", "step": step, "tokens_per_s": 4000.0, "peak_memory_mib": 801.5,
               **values}


SUMMARY = {
    "stages": {"sft": {"num_tokens": 12345, "seconds": 61.0, "skipped_steps": 0},
               "rpo": {"num_tokens": 67890, "seconds": 190.0, "skipped_steps": 2}},
    "before": {"exact_match": 0.6125, "rewards/accuracies": 0.0, "rewards/margins": 0.0, "exact_match/sorting": 0.25},
    "after": {"exact_match": 0.8475, "rewards/accuracies": 0.9375, "exact_match/sorting": 0.75},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "device": "cpu, 2 threads", "tokens_per_s": 4321.0, "peak_memory_mib": 801.5, "seconds": 251.0,
}


def make_run(folder, rows, summary=None, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    if config is not None:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder


def report(*args, **kwargs):
    path = write_report(make_run(*args, **kwargs))
    return Page(path.read_text(encoding="utf-8")), path.read_text(encoding="utf-8")


def charts(html):
    """Title -> root element of every chart; ElementTree also checks that each is well-formed XML."""
    figures = re.findall(r"<figure.*?</figure>", html, re.S)
    found = {}
    for figure in figures:
        root = ET.fromstring(figure)
        found[root.find("h3").text] = next(e for e in root.iter("svg") if "chart" in e.get("class"))
    return found


def test_numbers_of_the_run_are_on_the_page(tmp_path):
    page, _ = report(tmp_path / "my-run", rows_of_a_run(), SUMMARY, "loss: rpo\nbeta: 0.125\n")
    text = page.text
    for expected in ("my-run", "84.8%", "before rpo: 61.3%", "▲ 23.5 points", "93.8%", "before rpo: all tied",
                     "12,345 tokens in 1 min 1 s", "2 steps skipped", "4,321",
                     "801.5 MiB", "4 min 11 s", "2.13.0", "cpu, 2 threads", "beta 0.125",
                     "Median 4,000 tokens/s."):
        assert expected in text, expected
    # -12 to -15.25: the sentence the RPO paper's plot is about
    assert "rpo: the chosen log-prob fell by 3.25 nats, the rejected one by more (held-out: −12 to −15.25" in text
    assert "sorting: 25.0% before, 75.0% after" in text


@pytest.mark.parametrize(
    ("end", "words"),
    [(-11.5, "did not fall, it rose by 0.5 nats"), (-12.25, "fell by 0.25 nats, and the rejected one by less")],
)
def test_the_chosen_sentence_follows_the_numbers(tmp_path, end, words):
    rows = [
        {"stage": "dpo", "split": "eval", "step": 0, "logps/chosen": -12.0, "logps/rejected": -13.0},
        {"stage": "dpo", "split": "eval", "step": 9, "logps/chosen": end, "logps/rejected": -13.0},
    ]
    assert words in report(tmp_path, rows)[0].text


def test_without_evaluations_training_steps_are_compared_by_their_first_and_last_tenth(tmp_path):
    rows = [{"stage": "dpo", "split": "train", "step": s, "logps/chosen": -float(s), "logps/rejected": -2.0 * s}
            for s in range(1, 101)]
    # means of steps 1..10 and 91..100: -5.5 and -95.5
    assert "chosen log-prob fell by 90 nats, the rejected one by more (training: −5.5 to −95.5" in report(
        tmp_path, rows)[0].text


def test_exact_match_is_told_stage_by_stage_and_ties_are_no_accuracy(tmp_path):
    rows = [
        {"stage": stage, "split": "eval", "step": step, "exact_match": match, "rewards/margins": margin,
         "rewards/accuracies": accuracy}
        for stage, step, match, margin, accuracy in (
            ("sft", 0, 0.0, None, None), ("sft", 9, 0.5, None, None),
            ("rpo", 0, 0.5, 0.0, 0.0), ("rpo", 9, 0.875, 1.5, 0.9))
    ]
    page, html = report(tmp_path, rows)
    assert "held-out prompts: 0.0% before sft, 50.0% after sft, 87.5% after rpo." in page.text
    assert "Reward accuracy 90.0% before rpo: all tied" in page.text
    assert len([e for e in charts(html)["Reward accuracy"].iter("circle") if e.find("title") is not None]) == 1
    assert "Held-out: 90.0% at step 9." in page.text


def test_samples_show_their_own_verdicts(tmp_path):
    sample = {"prompt": "Add 4 and 9.", "expected": "13", "before": "so 12", "after": "4+9=13, so 13"}
    rows = [{"stage": "rpo", "step": 1, "loss": 1.0}]
    text = report(tmp_path, rows, {"samples": [sample | {"right": [False, True]}]})[0].text
    assert "Before rpo ✗ wrong so 12 After rpo ✓ right 4+9=13, so 13 Expected 13" in text
    assert "✓" not in report(tmp_path, rows, {"samples": [sample]})[0].text


def test_overshooting_is_said(tmp_path):
    losses = [(0, 0.7), (10, 0.4), (20, 0.6)]
    rows = [{"stage": "dpo", "split": "eval", "step": s, "loss": loss} for s, loss in losses]
    text = report(tmp_path, rows)[0].text
    assert "held-out loss of dpo was lowest at step 10 (0.4) and ended at 0.6" in text
    assert "Held-out: 0.7 → 0.6; lowest 0.4 at step 10." in text


def test_charts_are_to_scale(tmp_path):
    """Every marker lies where the axes' own tick labels put the value that its tooltip states."""
    _, html = report(tmp_path, rows_of_a_run(), SUMMARY)
    found = charts(html)
    for title in ("Log-probabilities of the responses", "Implicit rewards", "Reward margin", "Reward accuracy",
                  "KL to the reference, on the data's responses", "Throughput",
                  "Peak memory", "Learning rate", "Gradient norm"):
        assert title in found
    checked = 0
    for title, svg in found.items():
        texts = [t for t in svg.iter("text") if t.get("class") == "tick"]
        across = [(float(t.get("x")), _value(t.text)) for t in texts if t.get("text-anchor") == "middle"]
        up = [(float(t.get("y")) - 4, _value(t.text)) for t in texts if t.get("text-anchor") == "end"]
        for mark in [e for e in svg.iter() if e.tag in ("circle", "rect") and e.find("title") is not None]:
            step, value = re.search(r"(?:step|√KL) ([\d,.]+): (\S+)", mark.find("title").text).groups()
            offset = 3.2 if mark.tag == "rect" else 0.0
            x = float(mark.get("cx") or mark.get("x")) + offset
            y = float(mark.get("cy") or mark.get("y")) + offset
            assert x == pytest.approx(_line_through(across, _value(step)), abs=0.3), title
            assert y == pytest.approx(_line_through(up, _value(value)), abs=0.5), title
            checked += 1
    # four evaluations of loss, chosen twice, rejected, two rewards, margin, KL, margin against KL; accuracy has no
    # value at step 0
    assert checked == 4 * 9 + 3


def _value(text):
    text = text.replace("−", "-").replace(",", "")
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _line_through(ticks, value):
    (p0, v0), (p1, v1) = ticks[0], ticks[-1]
    return p0 + (value - v0) * (p1 - p0) / (v1 - v0)


def test_nothing_is_fetched_and_nothing_runs(tmp_path):
    page, html = report(tmp_path, rows_of_a_run(), SUMMARY, "loss: rpo\n")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "action", "data"), (tag, name)
            assert name != "href" or value.startswith("#"), value
    assert not re.search(r"https?:|//[a-z]|url\(|@import", html)
    policy = [a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_text_of_a_run_is_never_markup(tmp_path):
    bad = "</title></style><script>alert(1)</script>\"' onload=x &amp; <b>"
    rows = [{"stage": bad, "split": "train", "step": s, "loss": 0.5, "logps/chosen": -1.0} for s in range(3)]
    rows += [{"stage": bad, "split": "eval", "step": s, "loss": 0.5, bad: 1.0} for s in range(3)]
    summary = {
        "before": {f"exact_match/{bad}": 0.1},
        "after": {f"exact_match/{bad}": 0.2},
        "versions": {bad: bad},
        "device": bad,
        "samples": [{"prompt": bad, "before": bad, "after": bad, "expected": bad, "right": [bad]}],
    }
    page, _ = report(tmp_path / "<script>alert(2)<", rows, summary, f"loss: {json.dumps(bad)}\n")
    tags = [tag for tag, _ in page.elements]
    assert "script" not in tags and "b" not in tags
    assert tags.count("title") == 1 + 3 + 1  # the page, three markers, one task
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(bad) >= 8  # shown as it is, not swallowed


def test_a_chart_escapes_every_text_it_is_given():
    bad = "</text><script>\"'&"
    line = chart.Line(bad, [(0, 1.0), (1, 2.0)], "eval", "marked")
    for html in (
        chart.line_chart(bad, [line], y_label=bad, x_label=bad, note=bad, guide=(1.0, bad)),
        chart.change_chart(bad, [(bad, 0.0, 1.0)], note=bad),
    ):
        root = ET.fromstring(html)
        assert root.find(".//script") is None
        assert "".join(root.itertext()).count(bad) >= 4 and bad in root.find("svg").get("aria-label")


def test_no_metrics_file_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"^run_dir: no metrics\.jsonl in .*expected the folder of a training"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "rows", [[], [{"step": 1, "loss": 0.5}], [{"stage": "dpo", "split": "eval"}], [{"loss": None}], [{"step": "x"}]]
)
def test_almost_no_metrics_give_a_report(tmp_path, rows):
    page, html = report(tmp_path, rows)
    assert ("metrics.jsonl is empty" in page.text) == (not rows)
    charts(html)


def test_half_a_line_and_values_that_are_not_finite_are_left_out_and_said(tmp_path):
    run = make_run(tmp_path, rows_of_a_run(), None, "a: [unclosed")
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"stage": "rpo", "split": "train", "step": 61, "loss": NaN}\n')
        f.write('{"stage": "rpo", "split": "train", "step": 62, "loss": null}\n[1]\n{"stage": "rpo", "spl')
    (run / "summary.json").write_text('{"before": ')
    html = write_report(run).read_text(encoding="utf-8")
    text = Page(html).text
    assert "2 of the lines of metrics.jsonl are not JSON objects (first: line 128)" in text
    assert "loss was NaN or infinite in 2 lines, first at step 61" in text
    assert "summary.json is not JSON" in text
    assert "nan" not in html.lower().replace("nan or infinite", "") and "inf " not in html
    assert "the chosen log-prob fell by 3.25 nats" in text  # the rest of the run is there


def test_a_step_repeated_after_a_resume_counts_once_and_later(tmp_path):
    first = [{"stage": "dpo", "split": "eval", "step": s, "loss": 0.7 - s / 100} for s in (0, 10, 20, 30)]
    again = [{"stage": "dpo", "split": "eval", "step": s, "loss": 0.25} for s in (20, 30)]
    text = report(tmp_path, first + again)[0].text
    assert "4 evaluations" in text and "Held-out: 0.7 → 0.25." in text


def test_long_runs_stay_small_and_keep_their_spikes(tmp_path):
    rows = [{"stage": "rpo", "split": "train", "step": s, "loss": 9.0 if s == 7777 else math.sin(s) + 2,
             **{k: math.cos(s) for k in ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected",
                                         "rewards/margins", "watch/kl", "tokens_per_s", "grad_norm")}}
            for s in range(20_000)]
    rows += [{"stage": "rpo", "split": "eval", "step": s, "loss": 1.0, "watch/kl": 1.0} for s in range(0, 20_000, 10)]
    summary = {"samples": [{"prompt": "<" * 10_000, "before": "&" * 10_000, "after": '"' * 10_000}] * 50}
    _, html = report(tmp_path, rows, summary, "note: '" + '"' * 200_000 + "'\n")
    assert len(html.encode()) < 1_000_000
    kept = chart.thin([(s, 9.0 if s == 7777 else math.sin(s)) for s in range(20_000)])
    assert len(kept) <= chart.MOST_POINTS and (7777, 9.0) in kept and kept == sorted(kept)


def test_a_report_is_replaced_whole(tmp_path):
    run = make_run(tmp_path, [{"stage": "a", "step": 1, "loss": 1.0}])
    (run / "report.html").write_text("old")
    assert write_report(str(run)) == run / "report.html"
    assert "old" not in (run / "report.html").read_text(encoding="utf-8")
    assert sorted(p.name for p in run.iterdir()) == ["metrics.jsonl", "report.html"]


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize("values", [(-125_456.0, -123_456.0), (1_234_567.0, 1_334_567.0), (-2.5e-7, 0.0), (0.1, 0.2)])
def test_labels_of_the_axes_are_on_the_picture(values, size):
    """A digit is at most 0.64 em wide (DejaVu, the widest in use), at 12 px, of large charts on a phone 16."""
    points = [(0, values[0]), (1_000_000, values[1])]
    root = ET.fromstring(chart.line_chart("t", [chart.Line("l", points, "eval", "marked")], y_label="y", size=size))
    width, digit = (520, 0.64 * 16) if size == "large" else (260, 0.64 * 12)
    labels = [t for t in root.iter("text") if t.get("class") == "tick"]
    left = [float(t.get("x")) - digit * len(t.text) for t in labels if t.get("text-anchor") == "end"]
    right = [float(t.get("x")) + digit * len(t.text) / 2 for t in labels if t.get("text-anchor") == "middle"]
    assert len(left) >= 2 and min(left) >= 0 and len(right) >= 2 and max(right) <= width


def test_there_is_no_half_of_a_step():
    def labels(points):
        root = ET.fromstring(chart.line_chart("t", [chart.Line("l", points, "eval")], y_label="y"))
        return [t.text for t in root.iter("text") if t.get("text-anchor") == "middle"]

    assert labels([(0, 1.0), (1, 2.0), (2, 3.0)]) == ["0", "1", "2"]
    assert labels([(0.0, 1.0), (1.5, 2.0)]) == ["0", "0.5", "1", "1.5"]  # a distance has


def test_the_report_stands_on_files_alone():
    folder = Path(metrics.__file__).parent
    imported = {node.module for path in folder.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("fastpref")}
    assert imported <= {"fastpref.errors", "fastpref.files"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (-0.0, "0"), (0.69314, "0.693"), (-12.345, "−12.3"), (1234567.8, "1,234,568"), (5e-7, "5e-7"),
     (-5e-7, "−5e-7"), (0.001, "0.001"), (999.6, "1,000"), (None, "n/a"), (math.nan, "n/a"), (-math.inf, "n/a")],
)
def test_number(value, text):
    assert metrics.number(value) == text


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-35.2, -11.8), (0.0, 5e-7), (4998.0, 5003.0), (-1e6, 3e6)])
def test_ticks_are_round_inside_and_few(low, high):
    found = chart.ticks(low, high)
    assert 3 <= len(found) <= 6 and low - 1e-12 <= found[0] and found[-1] <= high * (1 + 1e-9) + 1e-12
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_fresh_samples_are_shown_as_they_developed(tmp_path):
    rows = [{"stage": "dpo", "split": "train", "step": step, "loss": 1.0} for step in (1, 2)]
    sampled = [{"stage": "dpo", "step": step, "samples": [
        {"prompt": [{"role": "user", "content": "Why <b>?"}], "response": f"because {step}", "reward": step / 10},
        {"prompt": "q", "response": f"other {step}"}]} for step in (0, 50, 50, 100)]
    run = make_run(tmp_path, rows)
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sampled) + '{"half a li')
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "Fresh samples as they developed" in page.text
    assert ("Prompt user: Why <b>? Step 0 reward 0 because 0 Step 50 reward 5 because 50 Step 100 reward 10 because "
            "100 Prompt q Step 0 other 0") in page.text


def test_long_samples_are_beside_each_other(tmp_path):
    samples = [{"prompt": "p", "expected": None, "before": "short", "after": "long " * 40},
               {"prompt": "p", "before": "a", "after": "b"}]
    _, html = report(tmp_path, rows_of_a_run(3), {"samples": samples})
    assert html.count('<article class="card sample long">') == 1 and html.count('<article class="card sample">') == 1
    assert "Expected" not in html and "✗" not in html
