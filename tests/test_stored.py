"""Columns of tokens: an example comes out as it went in, from memory, from the file, on another start; what the file's
name depends on; what is planned from lengths alone."""

import dataclasses
import json
import multiprocessing
import os

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import CHATML, assistant, chars, pair, user

from fastpref.data import (
    Example,
    Examples,
    Rendering,
    batch_order,
    fill_batches,
    hashes_of,
    load_examples,
    load_records,
    stored,
    tokenize_records,
    with_margins,
)

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)


def spans(draw, response):
    cuts = sorted(draw(st.sets(st.integers(0, len(response)))))
    return tuple(zip(cuts[::2], cuts[1::2]))


@st.composite
def examples(draw):
    found = []
    sides = draw(st.sampled_from([1, 2]))
    for record_id in range(draw(st.integers(1, 6))):
        responses = tuple(draw(ids) for _ in range(sides))
        scored = tuple(spans(draw, ids) for ids in responses) if draw(st.booleans()) else None
        found.append(Example(record_id * 3, draw(ids), responses, draw(st.sampled_from([None, True, False])),
                             margin=draw(st.sampled_from([None, 0.0, -1.5])), scored=scored))
    return found


@settings(max_examples=80, deadline=None)
@given(examples=examples(), data=st.data())
def test_examples_come_out_as_they_went_in(examples, data):
    columns = Examples.of(examples, [f"é:{e.record_id}" for e in examples])
    assert list(columns) == examples and len(columns) == len(examples) and columns[-1] == examples[-1]
    order = data.draw(st.lists(st.integers(0, len(examples) - 1), min_size=1))
    for some, same in ((columns, examples), (columns.select(order), [examples[i] for i in order]),
                       (columns[1:], examples[1:])):
        assert list(some) == same
        assert some.lengths.tolist() == [e.length for e in same]
        assert some.hashes.tobytes().hex() == "".join(e.content_hash for e in same) == "".join(hashes_of(some))
        if same:
            assert some.scored_lengths.tolist() == [e.scored_tokens for e in same]
            assert some.source(0) == f"é:{same[0].record_id}"
        for share in (True, False):
            assert some.tokens(share).tolist() == [e.tokens(share) for e in same]
    logps = numpy.arange(len(examples) * 2, dtype=numpy.float32).reshape(-1, 2)
    some = columns.with_ref_logps(logps).select(order)
    assert [e.ref_logps for e in some] == [(2.0 * i, 2.0 * i + 1) for i in order]


def test_every_field_of_an_example_has_its_column():
    known = {"record_id", "prompt_ids", "responses", "desirable", "ref_logps", "margin", "scored"}
    assert {field.name for field in dataclasses.fields(Example)} == known, "stored.py keeps no column of the new one"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """41 pairs in parts of 8, among them two that no template takes and one of equal responses."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(stored, "PART", 8)
    rows = [pair([user(f"q{i}")], [assistant("a" * (i % 7 + 1))], [assistant("b" * (i % 5 + 1))], margin=i / 2)
            for i in range(41)]
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[9]["prompt"] = rows[40]["prompt"] = [user("no")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


REFUSES = "{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}" + CHATML


def load(folder, template=REFUSES, **options):
    options = {"drop_invalid": True} | options
    return load_examples(str(folder / "a.jsonl"), chars(chat_template=template), "pair", **options)


def files(folder):
    return sorted(path.name for path in (folder / "cache").rglob("*.arrow"))


def test_the_second_start_reads_no_record(data, monkeypatch):
    records = load_records(data / "a.jsonl")
    usable = [r for i, r in enumerate(records) if i not in (9, 40)]
    expected, _ = tokenize_records(usable, chars(chat_template=REFUSES))
    expected = with_margins(expected, usable)
    ticks = []
    found, report = load(data, margins=True, tick=lambda done, of: ticks.append(done))
    assert ticks == [8, 16, 24, 32, 40, 41]
    strip = [dataclasses.replace(e, record_id=0) for e in expected]
    assert [dataclasses.replace(e, record_id=0) for e in found] == strip
    assert [e.record_id for e in found] == [i for i in range(41) if i not in (3, 9, 40)]
    assert found.source(3) == f"{data}/a.jsonl:5"
    assert str(report) == ("41 records -> 38 pairs; 1 dropped: chosen equals rejected (first: "
                           f"{data}/a.jsonl:4); 2 invalid records dropped; prompt tokens: median 26, max 26; "
                           "response tokens: median 4, max 8")
    assert report.invalid.first == [f"{data}/a.jsonl:{n}: the chat template refuses the messages (never)"
                                    for n in (10, 41)]
    monkeypatch.setattr(stored, "tokenize_records", None)
    monkeypatch.setattr(stored, "stream_records", None)
    again, told = load(data, margins=True)
    assert list(again) == list(found) and told == report
    values = again.parts[0]["prompt"][0]
    assert values.dtype == numpy.int32 and not values.flags.owndata and not values.flags.writeable  # the file's pages


def test_the_files_name_has_everything_that_tokens_depend_on(data, monkeypatch):
    load(data)
    for options in ({}, {"margins": True}, {"max_length": 64}, {"template": REFUSES + " "},
                    {"truncation_mode": "keep_start"}):
        load(data, **options)
    assert len(files(data)) == 5
    tokenizer = chars(chat_template=REFUSES)
    tokenizer.padding_side = "left"
    tokenizer(["a", "ab"], padding=True, truncation=True, max_length=4)  # state of the last call, which changes nothing
    load_examples(str(data / "a.jsonl"), tokenizer, "pair", drop_invalid=True)
    assert len(files(data)) == 5
    for other in (chars(chat_template=REFUSES, eos_token="<pad>"), chars(chat_template=REFUSES)):
        if other.eos_token == "</s>":
            other.chat_template = REFUSES + "  "  # as a configuration sets it
        load_examples(str(data / "a.jsonl"), other, "pair", drop_invalid=True)
    content = (data / "a.jsonl").read_text()
    stamp = os.stat(data / "a.jsonl")
    (data / "a.jsonl").write_text(content.replace('"q7"', '"q8"'))
    os.utime(data / "a.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same time, other content
    load(data)
    assert len(files(data)) == 8
    monkeypatch.setattr(stored, "_code_key", lambda: ["newer"])
    load(data)
    assert len(files(data)) == 9


def test_the_date_counts_where_the_template_tells_it(data):
    for template, made in ((REFUSES, 1), (REFUSES + "{{ strftime_now('%d %b %Y') }}", 3)):
        for date in ("2026-01-01", "2026-01-02", "2026-01-01"):
            load(data, template, rendering=Rendering(date=date))
        assert len(files(data)) == made


def test_what_stays_in_memory(data, monkeypatch):
    monkeypatch.setattr(stored, "PART", 64)
    whole, report = load(data)
    assert files(data) == [] and len(whole) == report.examples == 38
    monkeypatch.setattr(stored, "PART", 8)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    parts, told = load(data)
    assert list(parts) == list(whole) and told == report and files(data) == []


def test_an_end_in_the_middle_leaves_nothing_that_is_read(data, monkeypatch):
    def ends(done, of):
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(data, tick=ends)
    assert files(data) == []
    found, _ = load(data)
    (path,) = (data / "cache").rglob("*.arrow")
    path.with_suffix(".json").unlink()  # killed between the two files
    again, _ = load(data)
    assert list(again) == list(found)
    path.with_suffix(".json").write_text("{")
    assert list(load(data)[0]) == list(found)
    with pytest.raises(ValueError, match="a.jsonl:10: the chat template refuses"):
        load(data, drop_invalid=False)
    with pytest.raises(ValueError, match=r"a.jsonl: none of the 41 records is usable \(41 empty response\)"):
        load(data, template="{% if m %}{% endif %}")


def test_as_many_processes_as_cores_give_the_same(data, monkeypatch):
    """The first two parts are made here, to see whether there are more; the others wherever there is a core."""
    reports = []
    for cores in (1, 2, 3):
        monkeypatch.setattr(stored, "_cores", lambda cores=cores: cores)
        monkeypatch.setattr(stored, "_code_key", lambda cores=cores: [str(cores)])
        found, report = load(data, margins=True)
        reports.append((list(found), report))
    assert reports[0] == reports[1] == reports[2] and len(files(data)) == 3


def test_a_process_that_dies_or_finds_an_error_ends_the_start(data, monkeypatch):
    monkeypatch.setattr(stored, "_cores", lambda: 2)
    tokenize, here = tokenize_records, os.getpid()

    def dies(*args, **options):
        if os.getpid() != here:
            os._exit(1)
        return tokenize(*args, **options)

    monkeypatch.setattr(stored, "tokenize_records", dies)
    with pytest.raises(ValueError, match="a process that tokenises was ended from outside"):
        load(data)
    monkeypatch.setattr(stored, "tokenize_records", tokenize)
    (data / "a.jsonl").write_text((data / "a.jsonl").read_text().replace('"q30"', '"no"'))
    with pytest.raises(ValueError, match="^[^\n]*a.jsonl:10: the chat template refuses the messages .never.$"):
        load(data, drop_invalid=False)
    lines = (data / "a.jsonl").read_text().splitlines()
    (data / "a.jsonl").write_text("\n".join(lines[:9] + lines[10:40]))
    with pytest.raises(ValueError, match="^[^\n]*a.jsonl:30: the chat template refuses the messages .never.$"):
        load(data, drop_invalid=False)
    assert files(data) == []


def _one_of_two(folder, made):
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    stored.PART = 8
    write = stored._write
    stored._write = lambda *args: (made.put("wrote"), write(*args))
    made.put([e.content_hash for e in load(folder)[0]])


def test_two_processes_make_one_file(data):
    context = multiprocessing.get_context("fork")
    made = context.Queue()
    both = [context.Process(target=_one_of_two, args=(data, made)) for _ in range(2)]
    for process in both:
        process.start()
    got = [made.get(timeout=60) for _ in range(3)]
    for process in both:
        process.join()
    assert got.count("wrote") == 1
    one, other = (hashes for hashes in got if hashes != "wrote")
    assert one == other == hashes_of(load(data)[0])


def test_data_sets_are_known_by_their_fingerprint(data):
    source = {"path": "json", "data_files": str(data / "a.jsonl"), "cache_dir": str(data / "hub"), "split": "train"}
    tokenizer = chars(chat_template=CHATML)
    found, _ = load_examples([source, str(data / "a.jsonl")], tokenizer, "pair")
    assert len(found) == 80 and len(files(data)) == 1
    assert list(load_examples([source, str(data / "a.jsonl")], tokenizer, "pair")[0]) == list(found)
    assert len(files(data)) == 1
    assert found.hashes[:40].tolist() == found.hashes[40:].tolist()


def test_an_order_is_planned_from_lengths_alone():
    rng = numpy.random.default_rng(0)
    lengths = rng.integers(5, 400, 3000).astype(numpy.int32)
    examples = Examples.of([Example(i, [1] * 3, ([2] * int(n - 3),)) for i, n in enumerate(lengths)])
    plain = lengths.tolist()
    assert examples.lengths.tolist() == plain
    for e in range(3):
        assert batch_order(examples.lengths, 8, seed=1, epoch=e) == batch_order(plain, 8, seed=1, epoch=e)
        assert fill_batches(examples.lengths, 900, seed=1, epoch=e) == fill_batches(plain, 900, seed=1, epoch=e)
    in_order = batch_order(plain, 7, seed=0, epoch=0, shuffle=False)  # stable: equal lengths as they came
    assert [i for batch in in_order for i in batch] == sorted(range(3000), key=plain.__getitem__)
    assert all(type(i) is int for batch in in_order for i in batch)
