"""Rows as people have them -> records: each form against the same record written out in TRL's columns."""

import bz2
import gzip
import json
import lzma

import pytest
from test_data import CHATML, assistant, chars, pair, user

from fastpref.data import Invalid, load_prompts, load_records, records_from_rows, stream_records, tokenize_records

SYSTEM = {"role": "system", "content": "brief"}


def texts(rows):
    (record,) = records_from_rows([rows] if isinstance(rows, dict) else rows)
    return record.prompt, record.chosen, record.rejected, record.completion, record.label


def refusal(row):
    with pytest.raises(ValueError) as error:
        records_from_rows([row])
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix("rows, record 1: ")


# ---- columns ---------------------------------------------------------------------------------------------------------

HUMAN, GPT = {"from": "human", "value": "3+4"}, {"from": "gpt", "value": "7"}
CALL = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 3}}'}
CALLED = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}]}


@pytest.mark.parametrize(
    ("row", "prompt", "completion", "label"),
    [
        ({"conversations": [HUMAN, GPT]}, [user("3+4")], [assistant("7")], None),
        ({"messages": [SYSTEM, user("3+4"), assistant("7")]}, [SYSTEM, user("3+4")], [assistant("7")], None),
        ({"conversations": [HUMAN, GPT], "system": "brief"}, [SYSTEM, user("3+4")], [assistant("7")], None),
        ({"conversations": [HUMAN, GPT, HUMAN, GPT]}, [user("3+4")],
         [assistant("7"), user("3+4"), assistant("7")], None),
        ({"conversations": [HUMAN, GPT, HUMAN, GPT], "kto_tag": "false"}, [user("3+4"), assistant("7"), user("3+4")],
         [assistant("7")], False),
        ({"conversations": [{"from": "system", "value": "brief"}, HUMAN, CALL, {"from": "observation", "value": "7"},
                            GPT]},
         [SYSTEM, user("3+4")], [CALLED, {"role": "tool", "content": "7"}, assistant("7")], None),
        ({"instruction": "Add", "input": "3+4", "output": "7"}, [user("Add\n3+4")], [assistant("7")], None),
        ({"instruction": "Add", "input": "", "output": "7", "system": "brief", "history": [["1+1", "2"]]},
         [SYSTEM, user("1+1"), assistant("2"), user("Add")], [assistant("7")], None),
        ({"prompt": [user([{"type": "text", "text": "3"}, {"type": "text", "text": "+4"}])], "completion": "7"},
         [user("3+4")], [assistant("7")], None),
        ({"prompt": user("3+4"), "completion": assistant("7"), "label": 1.0}, [user("3+4")], [assistant("7")], True),
        *(({"prompt": "p", "completion": "c", "label": label}, "p", "c", good) for label, good in (
            ("true", True), ("True", True), ("1", True), (1, True), (True, True), ("false", False), ("FALSE", False),
            ("0", False), (0.0, False), (False, False))),
    ],
)
def test_forms_of_completions(row, prompt, completion, label):
    assert texts(row) == (prompt, None, None, completion, label)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("3+4")], "chosen": assistant("7"), "rejected": assistant("8")},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "8"}},  # LLaMA-Factory
        {"conversations": [HUMAN], "chosen": "7", "rejected": "8"},
        {"chosen": [HUMAN, GPT], "rejected": [HUMAN, {"from": "gpt", "value": "8"}]},
        {"chosen": [user(["3+4"]), assistant("7")], "rejected": [user("3+4"), assistant([{"text": "8"}])]},
        {"question": "3+4", "chosen": [user("3+4"), assistant("7")], "rejected": [user("3+4"), assistant("8")]},
        {"messages": [user("3+4"), assistant("7")], "chosen": [user("3+4"), assistant("7")],
         "rejected": [user("3+4"), assistant("8")]},
        {"system": "", "prompt": [user("3+4")], "chosen": "7", "rejected": "8", "images": []},
    ],
)
def test_forms_of_pairs(row):
    assert texts(row) == ([user("3+4")], [assistant("7")], [assistant("8")], None, None)


def test_prompts_alone_in_any_form(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"conversations": [HUMAN]}, {"instruction": "3+4", "input": ""}, {"prompt": user("3+4")}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [record.prompt for record in load_prompts(path)] == [[user("3+4")]] * 3


@pytest.mark.parametrize("key", ["question", "instruction", "input", "query", "system", "history", "context",
                                 "Question", "user_prompt"])
def test_a_question_that_nobody_reads(key):
    value = [["3+4", "7"]] if key == "history" else "What is 3+4?"
    message = refusal({key: value, "chosen": "It is 7.", "rejected": "It is 8."})
    assert message.startswith(f"field '{key}' would be lost, only 'prompt' is read: put it into 'prompt'")
    whole = "What is 3+4? 7" if key != "history" else "3+4 7"
    assert texts({key: value, "chosen": f"{whole} a", "rejected": f"{whole} b"})[1] == " a"  # nothing is lost
    if key in ("system", "history"):
        assert refusal({key: value, **pair()}).startswith(f"field '{key}' would be lost")
    else:
        assert texts({key: value, **pair()})[0] == pair()["prompt"]  # a prompt was made of it


@pytest.mark.parametrize("key", ["images", "image", "videos", "audio"])
def test_media_are_for_another_trainer(key):
    assert refusal(pair(**{key: ["a.png"]})) == (
        f"field '{key}': text alone is trained on here; for images, videos and audio use TRL's DPOTrainer with "
        "fastpref.integrations.trl.patch()")
    message = refusal(pair([user([{"type": "image"}, {"type": "text", "text": "?"}])]))
    assert message.startswith("field 'prompt[0].content[0]' is of type 'image': text alone is trained on here")
    from fastpref.integrations.trl import patch
    assert callable(patch)


def test_media_of_a_message_too():
    assert "field 'prompt[0].images': text alone" in refusal(pair([user("?") | {"images": ["a.png"]}]))


def test_messages_as_json_in_a_string():
    rows = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    (as_text,) = records_from_rows([{key: json.dumps(value) for key, value in rows.items()}])
    (as_list,) = records_from_rows([rows])
    assert as_text == as_list
    (kept,) = records_from_rows([{"prompt": '[{"role": 1', "chosen": '[{"name": "a"}]', "rejected": "b"}])
    assert (kept.prompt, kept.chosen) == ('[{"role": 1', '[{"name": "a"}]')


def test_a_string_prompt_repeated_at_the_head_of_the_responses():
    question = "What is 3+4?"
    rows = [pair(question, f"{question} 7", f"{question} 8"), pair(question, f"{question} 7", "8"),
            {"prompt": question, "completion": f"{question} 7"}, pair(question, question, f"{question} 7"),
            pair("Hi", "Hi there", "Hi.")]
    records = records_from_rows(rows)
    assert [r.repeated for r in records] == [True, False, True, False, False]
    assert (records[0].prompt, records[0].chosen, records[0].rejected) == (question, " 7", " 8")
    assert records[1].chosen == f"{question} 7" and records[2].completion == " 7"
    _, report = tokenize_records(records[:2], chars())
    assert report.prompts_repeated == 1 and "1 prompts repeated at the head of the responses, taken off" in str(report)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [HUMAN, GPT, HUMAN]}, "field 'conversations' ends with role 'user', expected 'assistant'"),
        ({"conversations": [GPT]}, "field 'conversations' begins with the assistant's turn, which nothing leads to"),
        ({"conversations": "hi"}, "field 'conversations' is str, expected a list of messages"),
        ({"conversations": [{"from": "narrator", "value": "x"}]},
         "field 'conversations[0].from' is 'narrator', expected one of human, user, gpt"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "add(3)"}]},
         "field 'conversations[1].value' is no function call {name, arguments} in JSON"),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, "field 'conversations[1].content' is missing or not a string"),
        ({"instruction": 3, "output": "x"}, "fields 'instruction' and 'input' have to be strings"),
        ({"instruction": "a", "output": "x", "history": ["a"]}, "field 'history' is no list of [question, answer]"),
        (pair(tools="look"), "field 'tools' is a string, but not of JSON (Expecting value"),
        (pair(tools='{"a": 1}'), "field 'tools' is dict, expected a list"),
        (pair(chat_template_kwargs="[1]"), "field 'chat_template_kwargs' is list, expected an object"),
        ({"prompt": "p", "completion": "c", "label": 2}, "field 'label' is 2, expected true or false"),
    ],
)
def test_what_no_form_allows(row, message):
    assert refusal(row).startswith(message)


def test_template_arguments_and_tools_as_strings_of_json():
    (record,) = records_from_rows([pair(tools='[{"name": "look"}]', chat_template_kwargs='{"style": "brief"}')])
    assert record.extra == {"tools": [{"name": "look"}], "chat_template_kwargs": {"style": "brief"}}
    (record,) = records_from_rows([pair(tools="", chat_template_kwargs="")])
    assert record.extra == {"tools": [], "chat_template_kwargs": {}}


# ---- files -----------------------------------------------------------------------------------------------------------


def test_packed_files_and_lines_called_json(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow

    rows = [pair("p", "é", "b"), pair("q", "c", "d")]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
              "zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True)}
    for ending, compress in packed.items():
        for name, content in (("a.jsonl", lines), ("b.json", json.dumps(rows).encode()), ("c.json", lines)):
            path = tmp_path / f"{name}.{ending}"
            path.write_bytes(compress(content))
            assert [r.chosen for r in load_records(path)] == ["é", "c"]
            plain = tmp_path / name
            plain.write_bytes(content)
            assert [r.chosen for r in load_records(plain)] == ["é", "c"]
        path.write_bytes(compress(lines)[:-9])
        with pytest.raises(ValueError, match=rf"c.json.{ending}: cannot be read \("):
            load_records(path)
    assert load_records(tmp_path / "c.json")[1].source == f"{tmp_path / 'c.json'}:2"


def test_a_field_that_stands_twice_and_a_nesting_too_deep(tmp_path):
    def message(name, content):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError) as error:
            load_records(tmp_path / name)
        return str(error.value).replace(f"{tmp_path}/", "")

    twice = '{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}'
    inner = '{"prompt": "p", "completion": "a", "chat_template_kwargs": {"a": 1, "a": 2}}'
    deep = '{"prompt": "p", "completion": ' + "[" * 100_000 + "]" * 100_000 + "}"
    expected = "a.jsonl:2: field 'chosen' stands twice in one object"
    assert message("a.jsonl", f"{json.dumps(pair())}\n{twice}") == expected
    assert message("a.jsonl", inner) == "a.jsonl:1: field 'a' stands twice in one object"
    assert message("a.json", f"[{twice}]") == "a.json: field 'chosen' stands twice in one object"
    assert message("a.jsonl", deep) == "a.jsonl:1: nested too deeply to be read"
    assert message("b.json", f"[{deep}]") == "b.json: nested too deeply to be read"
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table([["p"], ["c"], ["d"]], names=["prompt", "completion", "completion"]),
                        tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: column 'completion' stands twice"):
        load_records(tmp_path / "a.parquet")


def call(**arguments):
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def test_arrows_nulls_are_not_there(tmp_path):
    """Structs of a column have the fields of all rows: neither prompt nor response may show another row's."""
    parquet, datasets = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("datasets")
    import pyarrow

    def row(tool, schema, **arguments):
        return {
            "prompt": [user("hi"), call(**arguments), {"role": "tool", "content": "x", "name": tool}, user("so?")],
            "chosen": [call(**arguments)], "rejected": [assistant("b")],
            "tools": [{"name": tool, "parameters": {"properties": schema}}],
            "chat_template_kwargs": {tool: True},
        }

    rows = [row("weather", {"city": {"type": "string", "enum": ["a"]}}, city="Rome", days=[{"n": 1}, {"m": 2}]),
            row("sum", {"expr": {"type": "string"}}, expr="3+4", options={}),
            row("now", {"zone": {"description": "z"}}, days=[], options={"utc": True})]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = load_records(tmp_path / "a.jsonl")
    assert expected[1].chosen == [call(expr="3+4", options={})]
    template = CHATML.replace("{{ m.content }}", "{{ m | tojson }}") + "{{ tools | tojson }}{{ sum }}{{ weather }}"
    ids = [(e.prompt_ids, e.responses) for e in tokenize_records(expected, chars(chat_template=template))[0]]
    for records in (
        load_records(tmp_path / "a.parquet"),
        records_from_rows(datasets.Dataset.from_list(rows)),
        load_records({"path": "parquet", "data_files": str(tmp_path / "a.parquet"), "split": "train",
                      "cache_dir": str(tmp_path / "cache")}),
        load_records({"path": "json", "data_files": str(tmp_path / "a.jsonl"), "split": "train",
                      "cache_dir": str(tmp_path / "cache")}),
        list(stream_records({"path": "parquet", "data_files": str(tmp_path / "a.parquet"), "split": "train"})),
    ):
        for record, other in zip(records, expected, strict=True):
            assert vars(record) | {"source": ""} == vars(other) | {"source": ""}
        examples, _ = tokenize_records(records, chars(chat_template=template))
        assert [(e.prompt_ids, e.responses) for e in examples] == ids


# ---- invalid records -------------------------------------------------------------------------------------------------


def test_invalid_records_are_counted_and_the_first_ten_named(tmp_path):
    path = tmp_path / "a.jsonl"
    good, broken = json.dumps(pair()), ['{"prompt": ', "[]", '{"prompt": 3}', '{"a": 1, "a": 2}', '{"label": 1}'] * 3
    path.write_text("\n".join([good, *broken, good]))
    invalid = Invalid()
    assert [r.source for r in load_records(path, invalid=invalid)] == [f"{path}:1", f"{path}:17"]
    assert invalid.count == 15 and len(invalid.first) == 10
    assert invalid.first[1].startswith(f"{path}:3: got a JSON list, expected an object {{prompt, chosen, rejected}}")
    assert len(list(stream_records(path, invalid=Invalid()))) == 2
    path.write_text("\n".join(broken))
    with pytest.raises(ValueError, match=r"a.jsonl: all 15 records are invalid \(first: .*a.jsonl:1: not valid JSON"):
        load_records(path, invalid=Invalid())


def test_records_that_a_template_refuses():
    refuses = "{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}" + CHATML
    rows = [pair([user("no" if i % 2 else "yes")], "a", "b") for i in range(6)]
    rows[4]["prompt"] = [user("yes"), user("deep")]
    invalid = Invalid()
    examples, report = tokenize_records(records_from_rows(rows), chars(chat_template=refuses), invalid=invalid)
    assert [e.record_id for e in examples] == [0, 2, 4] and report.records == 6
    assert invalid.first[0] == "rows, record 2: the chat template refuses the messages (never)" and invalid.count == 3
    with pytest.raises(ValueError, match="rows, record 2: the chat template refuses"):
        tokenize_records(records_from_rows(rows), chars(chat_template=refuses))
    labels = records_from_rows([{"prompt": "p", "completion": "c", "label": True}, {"prompt": "p", "completion": "c"}])
    examples, _ = tokenize_records(labels, chars(), "kto", invalid=invalid)
    assert len(examples) == 1 and invalid.count == 4
    with pytest.raises(ValueError, match="none of the 1 records is usable"):
        tokenize_records(labels[1:], chars(), "kto", invalid=invalid)
