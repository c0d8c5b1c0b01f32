"""Records, token boundaries, truncation, batch order and collation, against oracles written out here."""

import dataclasses
import functools
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from fastpref.data import (
    LAYOUTS,
    Example,
    batch_order,
    collate,
    fill_batches,
    load_records,
    records_from_rows,
    tokenize_records,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
PAD, BOS, EOS = 0, 1, 2

# ---- tokenizers ------------------------------------------------------------------------------------------------------


def wrap(tokenizer: Tokenizer, bos: bool = True, **options) -> PreTrainedTokenizerFast:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def bpe(bos: bool = True, **options) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a pre-tokenizing pattern, so that merges reach across anything: ":7" is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["Q: 3+4 A:7", "Q: 5+2 A:7", "A:7 A:7", "the quick brown fox", "A: yes", "A: no"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return wrap(tokenizer, bos, **options)


def chars(bos: bool = True, **options) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *map(chr, range(10, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return wrap(tokenizer, bos, **options)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama-2's: a space before every text, bytes for what the vocabulary lacks."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁yesnoritab:"]
    merges = [("▁", "y"), ("▁y", "e"), ("▁ye", "s")]
    vocab = {token: i for i, token in enumerate([*tokens, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(tokenizer)


cached = functools.cache(lambda make: make())  # for hypothesis, which calls a test often

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITH_BOS = "<s>" + CHATML.replace("</s>\n", "</s>")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pair(prompt="Q: 3+4 A:", chosen="7", rejected="8", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def tokenize(rows, tokenizer, kind="pair", **options):
    return tokenize_records(records_from_rows(rows if isinstance(rows, list) else [rows]), tokenizer, kind, **options)


def one(row, tokenizer, kind="pair", **options) -> Example:
    (example,), _ = tokenize(row, tokenizer, kind, **options)
    return example


# ---- boundaries ------------------------------------------------------------------------------------------------------


def test_no_token_straddles_the_boundary():
    tokenizer = bpe()
    prompt = tokenizer("Q: 3+4 A:").input_ids
    joint = tokenizer("Q: 3+4 A:7").input_ids
    assert joint[: len(prompt)] != prompt  # a merge across the boundary: the case is real
    assert tokenizer("Q: 3+4 A:8").input_ids[: len(prompt)] == prompt  # and on one side only

    example = one(pair(), tokenizer)
    assert example.prompt_ids == prompt and prompt[0] == BOS and BOS not in prompt[1:]
    assert [tokenizer.decode(ids) for ids in example.responses] == ["7</s>", "8</s>"]
    assert [ids.count(EOS) for ids in example.responses] == [1, 1]


def test_characters_are_exact():
    example = one(pair("ab", "c d", """ e"""), chars())
    code = {c: ord(c) - 7 for c in "abcde "}
    assert example.prompt_ids == [BOS, code["a"], code["b"]]
    assert example.responses == ([code["c"], code[" "], code["d"], EOS], [code[" "], code["e"], EOS])


@pytest.mark.parametrize("make", [bpe, chars], ids=["bpe", "chars"])
def test_bos_and_eos_stand_once(make):
    for tokenizer, bos in ((make(), [BOS]), (make(bos=False), [])):
        bare = tokenizer("is it", add_special_tokens=False).input_ids
        for prompt in ("is it", *(["<s>is it"] if bos else [])):
            for answer in ("yes", "yes</s>", "yes</s></s>", "yes</s>\n"):
                example = one(pair(prompt, answer, "no"), tokenizer)
                assert example.prompt_ids == bos + bare
                assert example.responses[0] == tokenizer("yes", add_special_tokens=False).input_ids + [EOS]


def test_no_space_that_is_not_there():
    tokenizer = sentencepiece()
    assert tokenizer.tokenize("yes") == ["▁yes"]  # the tokenizer's own habit
    for text, tokens in (("yes", ["y", "e", "s"]), (" yes", ["▁yes"]), ("\nyes", ["<0x0A>", "y", "e", "s"])):
        example = one(pair("is it:", text, " or"), tokenizer)
        got = tokenizer.convert_ids_to_tokens(example.responses[0])
        assert "".join(got) == "".join(tokens) + "</s>"
        assert tokenizer.decode(example.prompt_ids + example.responses[0], skip_special_tokens=True) == "is it:" + text


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=12), chosen=st.text(max_size=12), rejected=st.text(max_size=12))
def test_ids_spell_the_text(prompt, chosen, rejected):
    tokenizer = cached(bpe)
    rows = [pair(prompt, chosen, rejected)]
    if not chosen.strip() or not rejected.strip() or chosen == rejected:
        with pytest.raises(ValueError, match="none of the 1 records is usable"):
            tokenize(rows, tokenizer)
        return
    example = one(rows[0], tokenizer)
    for ids, text in zip(example.responses, (chosen, rejected), strict=True):
        assert ids[-1] == EOS
        assert tokenizer.decode(example.prompt_ids[1:] + ids[:-1]) == prompt + text


# ---- messages --------------------------------------------------------------------------------------------------------


def test_chat_template_brings_its_own_bos():
    tokenizer = bpe(chat_template=WITH_BOS)
    example = one(pair([user("3+4")], [assistant("7")], [assistant("8")]), tokenizer)
    full = tokenizer("<s><|user|>3+4</s><|assistant|>", add_special_tokens=False).input_ids
    assert example.prompt_ids == full and example.prompt_ids.count(BOS) == 1
    assert example.prompt_ids == tokenizer.apply_chat_template(
        [user("3+4")], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert [tokenizer.decode(ids) for ids in example.responses] == ["7</s>", "8</s>"]


def test_chat_template_without_bos_or_with_text_after_eos():
    tokenizer = bpe(chat_template=CHATML)  # ChatML's newline after </s>; no BOS though the tokenizer has one
    example = one(pair([user("3+4")], [assistant("7")], [assistant("8")]), tokenizer)
    assert tokenizer.decode(example.prompt_ids) == "<|user|>3+4</s>\n<|assistant|>"
    assert [tokenizer.decode(ids) for ids in example.responses] == ["7</s>", "8</s>"]
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"  # no end marker at all
    example = one(pair([user("3+4")], [assistant("7")], [assistant("8")]), bpe(chat_template=template))
    assert tokenizer.decode(example.responses[0]) == "[assistant]7</s>"


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [user("3+4"), assistant("7")], "rejected": [user("3+4"), assistant("8")]},  # implicit prompt
        pair("3+4", [assistant("7")], [assistant("8")]),
        pair("3+4", [user("3+4"), assistant("7")], [user("3+4"), assistant("8")]),  # UltraFeedback's columns
        pair([user("3+4")], [user("3+4"), assistant("7")], [user("3+4"), assistant("8")]),
        pair([user("3+4")], "7", "8"),
        {"chosen": [user("3+4"), {**assistant("7"), "name": None}], "rejected": [user("3+4"), assistant("8")]},
    ],
)
def test_forms_of_a_conversation_are_one(row):
    tokenizer = chars(chat_template=WITH_BOS)
    example = one(row, tokenizer)
    texts = [tokenizer.decode(ids) for ids in (example.prompt_ids, *example.responses)]
    assert texts == ["<s><|user|>3+4</s><|assistant|>", "7</s>", "8</s>"]


def test_prompt_that_the_template_renders_otherwise_is_counted():
    """A generation prompt that the finished conversation lacks (DeepSeek-R1's <think>)."""
    template = WITH_BOS.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    tokenizer = chars(chat_template=template)
    (example,), report = tokenize(pair([user("3+4")], [assistant("7")], [assistant("8")]), tokenizer)
    assert tokenizer.decode(example.prompt_ids) == "<s><|user|>3+4</s><|assistant|>"
    assert tokenizer.decode(example.responses[0]) == "7</s>"
    assert report.prompts_shortened_by_template == 1 and "shortened" in str(report)


def test_tools_and_template_arguments_reach_the_template():
    template = "{{ style }}{% for t in tools or [] %}({{ t.name }}){% endfor %}" + CHATML
    tokenizer = chars(chat_template=template)
    row = pair([user("hi")], [assistant("a")], [assistant("b")], tools='[{"name": "look"}]')
    example = one(row | {"chat_template_kwargs": {"style": "brief"}}, tokenizer)
    assert tokenizer.decode(example.prompt_ids).startswith("brief(look)<|user|>hi")


# ---- implicit prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Human: hi\n\nAssistant: I think", "Human: hi\n\nAssistant: I thank", "Human: hi\n\nAssistant: I"),
        ("A: yes", "A: no", "A:"),  # the space belongs to the response
        ("A:\nyes", "A:\nno", "A:\n"),
        ("A:42", "A:43", "A:"),
        ("A: Yes", "A: Yes and no", "A:"),  # one is the start of the other: it keeps its last word
        ("A: Yes!", "A: Yes?", "A: Yes"),
        ("left", "right", ""),
    ],
)
def test_implicit_prompt_ends_before_the_word_that_differs(chosen, rejected, prompt):
    (record,) = records_from_rows([{"chosen": chosen, "rejected": rejected}])
    assert record.prompt == prompt
    assert (record.prompt + record.chosen, record.prompt + record.rejected) == (chosen, rejected)


@given(head=st.text("ab .\n", max_size=8), chosen=st.text("ab .\n", max_size=6), rejected=st.text("ab .\n", max_size=6))
def test_implicit_prompt_loses_nothing(head, chosen, rejected):
    chosen, rejected = head + chosen, head + rejected
    (record,) = records_from_rows([{"chosen": chosen, "rejected": rejected}])
    assert (record.prompt + record.chosen, record.prompt + record.rejected) == (chosen, rejected)
    assert (record.chosen and record.rejected) or not (chosen.strip() and rejected.strip())


def test_implicit_prompt_of_messages_is_their_common_start():
    head = [{"role": "system", "content": "brief"}, user("a"), assistant("b"), user("c")]
    (record,) = records_from_rows([{"chosen": [*head, assistant("d")], "rejected": [*head, assistant("e")]}])
    assert (record.prompt, record.chosen, record.rejected) == (head, [assistant("d")], [assistant("e")])
    (same,) = records_from_rows([{"chosen": [*head, assistant("d")], "rejected": [*head, assistant("d")]}])
    assert same.chosen == same.rejected == [assistant("d")]


# ---- kinds -----------------------------------------------------------------------------------------------------------


def test_kto_labels_and_pairs_taken_apart():
    tokenizer = chars()
    rows = [{"prompt": "p", "completion": "good", "label": True}, {"prompt": "p", "completion": "bad", "label": 0}]
    examples, report = tokenize(rows, tokenizer, "kto")
    assert [e.desirable for e in examples] == [True, False] and report.examples == 2
    examples, report = tokenize([pair(), pair("other ")], tokenizer, "kto")
    assert [(e.record_id, e.desirable) for e in examples] == [(0, True), (0, False), (1, True), (1, False)]
    assert [tokenizer.decode(e.responses[0]) for e in examples] == ["7</s>", "8</s>"] * 2


def test_sft_takes_completions_and_chosen():
    tokenizer = chars()
    rows = [
        {"prompt": "p", "completion": "a"},
        pair("p", "b", "c", answer="b", task="t"),
        {"prompt": "p", "chosen": "d"},
        {"prompt": "p", "completion": "e", "label": False},
    ]
    records = records_from_rows(rows)
    examples, report = tokenize_records(records, tokenizer, "sft")
    assert [tokenizer.decode(e.responses[0]) for e in examples] == ["a</s>", "b</s>", "d</s>"]
    assert all(len(e.responses) == 1 and e.desirable is None for e in examples)
    assert records[1].extra == {"answer": "b", "task": "t"}
    assert report.dropped == {"completion labelled false": ["rows, record 4"]}


# ---- truncation ------------------------------------------------------------------------------------------------------


def test_prompt_is_cut_at_the_end_asked_for_and_keeps_bos():
    tokenizer = chars()
    row = pair("abcdefgh", "xy", "z")  # 1 + 8 and 3 tokens
    for mode, prompt in (("keep_end", "<s>fgh"), ("keep_start", "<s>abc")):
        (example,), report = tokenize(row, tokenizer, max_length=7, truncation_mode=mode)
        assert tokenizer.decode(example.prompt_ids) == prompt
        assert [len(r) for r in example.responses] == [3, 2] and example.length == 7
        assert (report.prompts_truncated, report.responses_truncated, report.dropped) == (1, 0, {})
    assert tokenizer.decode(one(row, tokenizer, max_prompt_length=3).prompt_ids) == "<s>gh"
    assert tokenizer.decode(one(row, chars(bos=False), max_prompt_length=3).prompt_ids) == "fgh"
    assert one(row, tokenizer, max_length=4).prompt_ids == [BOS]
    (example,), report = tokenize(row, tokenizer, max_length=12)
    assert len(example.prompt_ids) == 9 and report.prompts_truncated == 0


def test_overlong_response_needs_a_policy():
    tokenizer = chars()
    rows = [pair(), pair("abc", "x" * 5, "y" * 20)]
    message = "rows, record 2: field 'rejected' has 21 tokens with EOS, which leaves no room for a prompt"
    with pytest.raises(ValueError, match=message + r" in max_length=12 \(1 of 2 records"):
        tokenize(rows, tokenizer, max_length=12)
    examples, report = tokenize(rows, tokenizer, max_length=12, overlong_response="drop")
    assert [e.record_id for e in examples] == [0]
    assert report.dropped == {"response of max_length = 12 tokens or more": ["rows, record 2"]}
    assert "1 dropped" in str(report) and "rows, record 2" in str(report)

    (_, cut), report = tokenize(rows, tokenizer, max_length=12, overlong_response="truncate")
    assert tokenizer.decode(cut.prompt_ids) == "<s>abc"
    assert [tokenizer.decode(ids) for ids in cut.responses] == ["xxxxx</s>", "yyyyyyyy"]  # no EOS on what was cut
    assert (report.responses_truncated, cut.length) == (1, 12)
    (_, cut), _ = tokenize(rows, tokenizer, max_length=12, max_prompt_length=2, overlong_response="truncate")
    assert tokenizer.decode(cut.prompt_ids) == "<s>c" and len(cut.responses[1]) == 10


def test_pair_that_differs_only_beyond_the_cut_is_dropped():
    rows = [pair(), pair("p", "x" * 30 + "a", "x" * 30 + "b")]
    examples, report = tokenize(rows, chars(), max_length=12, overlong_response="truncate")
    assert len(examples) == 1 and list(report.dropped) == ["chosen equals rejected once truncated"]


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 30)] * 3),
    max_length=st.integers(3, 24),
    max_prompt_length=st.none() | st.integers(1, 23),
    mode=st.sampled_from(["keep_start", "keep_end"]),
)
def test_truncation_keeps_to_its_limits(sizes, max_length, max_prompt_length, mode):
    tokenizer = cached(chars)
    if max_prompt_length is not None and max_prompt_length >= max_length:
        max_prompt_length = None
    p, c, r = sizes
    row = pair("p" * p, "c" * c, "r" * r)
    options = {"max_length": max_length, "max_prompt_length": max_prompt_length, "truncation_mode": mode}
    example = one(row, tokenizer, overlong_response="truncate", **options)
    assert example.length <= max_length and example.prompt_ids[0] == BOS
    assert len(example.prompt_ids) <= (max_prompt_length or max_length)
    if max(c, r) + 1 < max_length:  # then nothing of a response may go
        assert [len(ids) for ids in example.responses] == [c + 1, r + 1]
        assert len(example.prompt_ids) == min(p + 1, max_length - max(c, r) - 1, max_prompt_length or p + 1)


def test_what_is_left_out_is_counted():
    rows = [pair(), pair(chosen=" \n"), pair(chosen="same", rejected="same"), pair(rejected="")]
    examples, report = tokenize(rows, chars())
    assert (report.records, report.examples, len(examples)) == (4, 1, 1)
    assert report.dropped == {
        "empty response": ["rows, record 2", "rows, record 4"],
        "chosen equals rejected": ["rows, record 3"],
    }
    assert str(report) == (
        "4 records -> 1 pairs; 2 dropped: empty response (first: rows, record 2); "
        "1 dropped: chosen equals rejected (first: rows, record 3); "
        "prompt tokens: median 10, max 10; response tokens: median 2, max 2"
    )
    examples, report = tokenize([pair(""), pair()], chars(bos=False))
    assert [e.record_id for e in examples] == [1] and list(report.dropped)[0].startswith("empty prompt")
    assert one(pair(""), chars()).prompt_ids == [BOS]


def test_content_hash_is_of_the_tokens_alone():
    def digest(row, kind="pair"):
        return tokenize(row, chars(), kind)[0][0].content_hash

    base = digest(pair("ab", "c", "d"))
    assert base == digest([pair("ab", "c", "d", task="t"), pair()]) and re.fullmatch("[0-9a-f]{32}", base)
    others = [pair("a", "bc", "d"), pair("ab", "d", "c"), pair("abc", "c", "d"), pair("ab", "cd", "d")]
    assert len({base, *(digest(row) for row in others)}) == 5
    # the same on every machine: changing it would throw away every cache of reference log-probs
    assert Example(0, [1, 70], ([80, 2], [90, 2])).content_hash == "65d88103810666315f3eb08a961f40bf"


# ---- files -----------------------------------------------------------------------------------------------------------


def test_jsonl_json_parquet_and_datasets_read_alike(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    rows = [
        pair([user("3+4")], [assistant("7")], [assistant("8")], answer="7"),
        pair([user("é")], [assistant("\u2028")], [assistant("b")], answer=None),
    ]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text(f"\ufeff{json.dumps(rows[0])}\n\n{json.dumps(rows[1], ensure_ascii=False)}", "utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    builder = {"path": "json", "data_files": {"a": str(folder / "train.jsonl")}, "cache_dir": str(tmp_path / "cache")}

    expected = [dataclasses.replace(r, source="") for r in records_from_rows(rows)]
    assert [r.extra for r in expected] == [{"answer": "7"}, {}]
    sources = [jsonl, str(tmp_path / "a.json"), tmp_path / "a.parquet", builder, {**builder, "split": "a"}]
    for source in sources:
        assert [dataclasses.replace(r, source="") for r in load_records(source)] == expected
    assert [r.source for r in load_records(jsonl)] == [f"{jsonl}:1", f"{jsonl}:3"]
    assert len(load_records([jsonl, tmp_path / "a.json"])) == 4
    assert len(records_from_rows(datasets.Dataset.from_list(rows))) == 2
    both = {**builder, "data_files": {"a": str(folder / "train.jsonl"), "b": str(folder / "train.jsonl")}}
    with pytest.raises(ValueError, match="json: has splits a, b; split must name one"):
        load_records(both)
    assert len(load_records(both, split="b")) == 2


GOOD = json.dumps(pair())
BROKEN = [
    ('{"prompt": "p", "chosen": ', r"not valid JSON \(.* at column \d+\)"),
    ("[1, 2]", r"got a JSON list, expected an object"),
    ('{"prompt": "p", "rejected": "r"}', "field 'chosen' is missing"),
    ('{"prompt": "p"}', "field 'chosen' or 'completion' is missing"),
    ('{"chosen": "p"}', "field 'rejected' is missing"),
    ('{"prompt": "p", "chosen": "c", "rejected": 3}', "field 'rejected' is int, expected a string or a list of mess"),
    ('{"prompt": null, "completion": "c"}', "field 'prompt' is missing"),
    ('{"prompt": "p", "completion": "c", "label": "yes"}', "field 'label' is 'yes', expected true or false"),
    ('{"prompt": "p", "completion": "c", "chosen": "d"}', "has field 'completion' and 'chosen' or 'rejected'"),
    ('{"chosen": "a", "rejected": [{"role": "user", "content": "b"}]}', "'chosen' and 'rejected' differ in form"),
    ('{"prompt": [], "chosen": "c", "rejected": "r"}', "field 'prompt' is an empty list of messages"),
    ('{"prompt": ["hi"], "chosen": "c", "rejected": "r"}', r"field 'prompt\[0\]' is str, expected a message"),
    ('{"prompt": [{"content": "x"}], "completion": "c"}', r"field 'prompt\[0\].role' is missing"),
    ('{"prompt": [{"role": "user"}], "completion": "c"}', r"field 'prompt\[0\].content' is missing or not a string"),
    ('{"prompt": "p\\ud800", "completion": "c"}', "field 'prompt' has a lone surrogate at character 1"),
    (
        '{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}',
        "field 'prompt' is missing and 'chosen' and 'rejected' share no first message",
    ),
    (
        '{"prompt": "p", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
        "field 'prompt' is not among the first messages of 'chosen'",
    ),
    (
        '{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "user", "content": "q"}]}',
        "field 'completion' has no message after the prompt's",
    ),
    (
        '{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "user", "content": "other"}]}',
        "field 'completion' starts with role 'user', expected 'assistant' or the prompt's messages",
    ),
]


@pytest.mark.parametrize(("line", "message"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_record_names_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match=message) as error:
        load_records(path)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_unreadable_and_empty_sources(tmp_path):
    def message(source, **options):
        with pytest.raises(ValueError) as error:
            load_records(source, **options)
        assert "\n" not in str(error.value)
        return str(error.value).replace(str(tmp_path), "DIR")

    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    assert message(tmp_path / "no.jsonl") == "DIR/no.jsonl: no such file"
    assert message(tmp_path / "pairs") == "DIR/pairs: no such file or folder"  # and no hub is asked for it
    by_name = "not one of those that are read by their names, .jsonl, .json, .parquet;"
    through = "the package datasets reads it as {path: csv, data_files: DIR/a.csv}"
    assert message(file("a.csv", b"prompt,chosen,rejected\n")) == f"DIR/a.csv: {by_name} {through}"
    (tmp_path / "a.csv").unlink()
    assert message(tmp_path / "a.csv") == f"DIR/a.csv: no such file, and {by_name} {through}"
    assert message("pairs.xlsx") == f"pairs.xlsx: no such file, and {by_name} write it as one of these"
    for name in ("empty.jsonl", "empty.json"):
        assert message(file(name, b"")) == f"DIR/{name}: no records, the data is empty"
    assert message(file("blank.jsonl", b"\n \n")) == "DIR/blank.jsonl: no records, the data is empty"
    assert message(file("a.jsonl", b'{"prompt": "\xff"}')) == "DIR/a.jsonl:1: not UTF-8 (byte 0xff at 12)"
    assert message(file("a.json", b"[\n1,]")).startswith("DIR/a.json:2: not valid JSON (")
    assert message(file("a.json", b"{}")).startswith("DIR/a.json: got a JSON dict, expected a list of records")
    assert message(file("b.json", b'[{"prompt": 1}]')).startswith("DIR/b.json, record 1: field 'prompt' is int")
    assert message([]) == "source: got an empty list, expected at least one file or data set"
    with pytest.raises(TypeError, match="source: got int"):
        load_records(3)
    with pytest.raises(ValueError, match="rows: no records"):
        records_from_rows([])
    pytest.importorskip("pyarrow")
    assert message(file("a.parquet", b"nonsense")).startswith("DIR/a.parquet: not a readable Parquet file (")
    pytest.importorskip("datasets")
    (tmp_path / "nothing").mkdir()
    assert message(tmp_path / "nothing").startswith("DIR/nothing: neither a data file here nor a data set that loads (")


def test_without_the_optional_packages(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="a.parquet: reading Parquet needs pyarrow"):
        load_records(tmp_path / "a.parquet")
    with pytest.raises(ImportError, match="someone/set: not a .jsonl, .json or .parquet file"):
        load_records("someone/set")


def test_bad_input_to_tokenize_records():
    records = records_from_rows([pair()])
    completion = records_from_rows([{"prompt": "p", "completion": "c"}])
    chat = records_from_rows([pair([user("a")], "b", "c")])
    refuses = "{{ raise_exception('no system messages') }}"
    tokenizer = chars()
    for arguments, options, message in (
        ((records, chars(eos_token=None)), {}, "has no EOS token to end responses with"),
        ((chat, tokenizer), {}, "rows, record 1: has messages, but tokenizer .* has no chat template"),
        ((chat, chars(chat_template=refuses)), {}, r"rows, record 1: the chat template .* \(no system messages\)"),
        ((completion, tokenizer), {}, "rows, record 1: field 'chosen' is missing, preference pairs need"),
        ((completion, tokenizer, "kto"), {}, "rows, record 1: field 'label' is missing, KTO needs"),
        ((records, tokenizer, "dpo"), {}, "kind: got 'dpo', expected one of pair, sft, kto"),
        ((records, tokenizer), {"truncation_mode": "left"}, "truncation_mode: got 'left', expected one of keep_start"),
        ((records, tokenizer), {"overlong_response": "cut"}, "overlong_response: got 'cut', expected one of error"),
        ((records, tokenizer), {"max_length": 1}, "max_length: got 1, expected at least 2"),
        ((records, tokenizer), {"max_prompt_length": 1024}, "max_prompt_length: got 1024, expected 1 to max_len"),
        (([], tokenizer), {}, "records: got none"),
        ((records_from_rows([pair("p", "a", "a")] * 3), tokenizer), {}, r"none of the 3 .* \(3 chosen equals rej"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            tokenize_records(*arguments, **options)
        assert "\n" not in str(error.value)


# ---- batches ---------------------------------------------------------------------------------------------------------


def labels_of(sequences, width):
    """The plain way: labels of -100 everywhere but on response tokens, then shifted by one."""
    labels = torch.full((len(sequences), width), -100)
    for i, (prompt, response) in enumerate(sequences):
        labels[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    return shifted.flatten()


EXAMPLES_OF_PAIRS = [
    Example(4, [BOS, 10, 11, 12], ([20, EOS], [30, 31, 32, EOS])),
    Example(9, [BOS, 13], ([21, 22, EOS], [EOS])),
    Example(5, [BOS], ([23, EOS], [33, 34, EOS])),
]


def test_collate_pairs():
    batch = collate(EXAMPLES_OF_PAIRS, PAD)
    sequences = [(e.prompt_ids, e.responses[i]) for i in (0, 1) for e in EXAMPLES_OF_PAIRS]
    width = 8
    for row, mask, (prompt, response) in zip(batch.input_ids, batch.attention_mask, sequences, strict=True):
        length = len(prompt) + len(response)
        assert row.tolist() == prompt + response + [PAD] * (width - length)
        assert mask.tolist() == [1] * length + [0] * (width - length)
    labels = labels_of(sequences, width)
    assert batch.score_rows.tolist() == (labels != -100).nonzero().flatten().tolist()
    assert batch.targets.tolist() == labels[labels != -100].tolist()
    assert batch.targets.dtype == batch.score_rows.dtype == batch.input_ids.dtype == torch.int64
    assert batch.cu_seqlens == [0, 2, 5, 7, 11, 12, 15] and batch.lengths == [6, 5, 3, 8, 3, 4]
    assert batch.record_ids == [4, 9, 5]
    assert (batch.num_sequences, batch.num_pairs, batch.num_tokens, batch.chosen_tokens) == (6, 3, 15, 7)
    assert batch.processed_tokens == int(batch.attention_mask.sum()) == 29
    assert batch.ref_logps is batch.desirable is batch.kl is None


def test_collate_packs_and_shares_prompts():
    padded = collate(EXAMPLES_OF_PAIRS, PAD)
    a, b, c = EXAMPLES_OF_PAIRS
    sequences = [(e.prompt_ids, e.responses[i]) for i in (0, 1) for e in EXAMPLES_OF_PAIRS]
    packed = collate(EXAMPLES_OF_PAIRS, PAD, layout="packed")
    assert packed.input_ids.tolist() == [[token for prompt, response in sequences for token in prompt + response]]
    assert packed.position_ids.tolist() == [[i for p, r in sequences for i in range(len(p) + len(r))]]
    shared = collate(EXAMPLES_OF_PAIRS, PAD, layout="shared")
    assert shared.input_ids.tolist() == [[t for e in (a, b, c) for t in e.prompt_ids + e.responses[0] + e.responses[1]]]
    # the rejected response goes on where the prompt ends, and its first token is predicted by the prompt's last row
    assert shared.position_ids.tolist() == [[*range(6), 4, 5, 6, 7, *range(5), 2, *range(3), 1, 2, 3]]
    rows = [[3, 4], [11, 12, 13], [16, 17], [3, 6, 7, 8], [11], [16, 19, 20]]
    assert shared.score_rows.tolist() == [row for part in rows for row in part]
    for batch, tokens in ((packed, 29), (shared, 22)):
        assert batch.targets.tolist() == padded.targets.tolist() and batch.cu_seqlens == padded.cu_seqlens
        assert batch.lengths == padded.lengths and batch.record_ids == padded.record_ids
        assert batch.attention_mask is None and batch.input_ids.shape == batch.position_ids.shape == (1, tokens)
        assert (batch.processed_tokens, batch.saved_tokens) == (tokens, 29 - tokens)
        assert [e.tokens(batch is shared) for e in EXAMPLES_OF_PAIRS] == ([10, 6, 6] if batch is shared else [14, 8, 7])
        ids = batch.input_ids[0]
        for s, (prompt, response) in enumerate(sequences):  # the keys of each segment are its whole sequence
            keys = batch.attention_plan.keys(ids).split(list(batch.attention_plan.k_lengths))
            assert prompt + response in [part.tolist() for part in keys]
            assert ids[batch.score_rows[batch.cu_seqlens[s]]] == prompt[-1]
    assert padded.attention_plan is None and padded.saved_tokens == 0
    moved = shared.to("meta")
    assert moved.attention_plan.cu_seqlens_q.is_meta and moved.attention_plan.q_lengths == (6, 4, 5, 1, 3, 3)
    with pytest.raises(ValueError, match="layout: got 'ragged', expected one of padded, packed, shared"):
        collate(EXAMPLES_OF_PAIRS, PAD, layout="ragged")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_turns_that_are_not_the_models_are_read_and_not_scored(layout):
    """Of a response [0, 5) only the marked runs are targets; every token of it is still input."""
    marked = dataclasses.replace(EXAMPLES_OF_PAIRS[0], responses=([20, 21, 22, 23, EOS], [30, 31, EOS]),
                                 scored=(((0, 1), (3, 5)), ((1, 3),)))
    assert marked.scored_tokens == [3, 2] and EXAMPLES_OF_PAIRS[0].scored_tokens == [2, 4]
    examples = [EXAMPLES_OF_PAIRS[1], marked]
    whole, batch = (collate(e, PAD, layout=layout) for e in (
        [examples[0], dataclasses.replace(marked, scored=None)], examples))
    kept = [0, 1, 2, 3, 6, 7, 8, 10, 11]  # of b's chosen 3, a's chosen 5, b's rejected 1, a's rejected 3
    assert batch.targets.tolist() == [21, 22, EOS, 20, 23, EOS, EOS, 31, EOS] == whole.targets[kept].tolist()
    assert batch.score_rows.tolist() == whole.score_rows[kept].tolist()
    assert batch.cu_seqlens == [0, 3, 6, 7, 9]
    for name in ("input_ids", "lengths", "last_rows", "position_ids"):
        assert torch.equal(torch.as_tensor(getattr(batch, name)), torch.as_tensor(getattr(whole, name))) \
            if getattr(whole, name) is not None else getattr(batch, name) is None
    # KTO's mismatched sequence: the other completion's scored tokens, as far as it has room
    labelled = [Example(0, [BOS, 10, 11], ([EOS],), True),
                Example(1, [BOS, 12], ([20, 21, 22, EOS],), False, scored=(((0, 1), (2, 4)),))]
    assert collate(labelled, PAD, "kto", layout=layout).kl.targets.tolist() == [20, 22, EOS]
    assert labelled[1].content_hash != dataclasses.replace(labelled[1], scored=None).content_hash
    assert labelled[1].content_hash != dataclasses.replace(labelled[1], scored=(((0, 4),),)).content_hash


def test_equal_prompts_are_shared_by_all_their_responses():
    prompt = [BOS, 10, 11]
    pairs = [Example(0, prompt, ([20, EOS], [21, EOS])), Example(1, [BOS], ([EOS], [22, EOS])),
             Example(2, prompt, ([23, 24, EOS], [25, EOS]))]
    batch = collate(pairs, PAD, layout="shared")
    assert batch.input_ids.tolist() == [[*prompt, 20, EOS, 23, 24, EOS, 21, EOS, 25, EOS, BOS, EOS, 22, EOS]]
    assert batch.attention_plan.k_lengths == (5, 6, 5, 5, 2, 3)
    assert batch.targets.tolist() == collate(pairs, PAD).targets.tolist()
    labelled = [Example(0, prompt, ([20, EOS],), True), Example(0, prompt, ([21, EOS],), False),
                Example(1, [BOS, 12], ([22, EOS],), True)]
    batch, padded = (collate(labelled, PAD, "kto", layout=layout) for layout in ("shared", "padded"))
    assert batch.input_ids.tolist() == [[*prompt, 20, EOS, 21, EOS, BOS, 12, 22, EOS]]
    assert batch.kl.targets.tolist() == padded.kl.targets.tolist() and batch.kl.lengths == padded.kl.lengths
    assert batch.kl.input_ids.tolist() == [[*prompt, 22, EOS, 22, EOS, BOS, 12, 20, EOS]]


def test_collate_sft_and_reference_logps():
    examples = [Example(i, [BOS, 10], ([20] * i + [EOS],)) for i in (1, 3)]
    batch = collate(examples, PAD, "sft")
    assert (batch.num_pairs, batch.num_sequences, batch.num_tokens, batch.chosen_tokens) == (0, 2, 6, 6)
    assert batch.cu_seqlens == [0, 2, 6]
    pairs = [dataclasses.replace(e, ref_logps=(-float(i), -10.0 - i)) for i, e in enumerate(EXAMPLES_OF_PAIRS)]
    batch = collate(pairs, PAD)
    assert batch.ref_logps.tolist() == [0.0, -1.0, -2.0, -10.0, -11.0, -12.0]
    assert batch.ref_logps.dtype == torch.float32
    assert collate([pairs[0], EXAMPLES_OF_PAIRS[1]], PAD).ref_logps is None


def test_collate_kto_mismatches_prompts_and_completions():
    examples = [
        Example(0, [BOS, 10], ([20, EOS],), True),
        Example(0, [BOS, 10], ([21, EOS],), False),  # the same prompt: no mismatch for the first
        Example(1, [BOS, 11, 12, 13], ([22, 23, 24, EOS],), True),
    ]
    batch = collate(examples, PAD, "kto")
    assert batch.desirable.tolist() == [True, False, True] and batch.desirable.dtype == torch.bool
    kl = [([BOS, 10], [22, 23, 24, EOS]), ([BOS, 10], [22, 23, 24, EOS]), ([BOS, 11, 12, 13], [20, EOS])]
    assert batch.kl.lengths == [6, 6, 6] and batch.kl.cu_seqlens == [0, 4, 8, 10]
    assert batch.kl.input_ids.tolist() == [prompt + response for prompt, response in kl]
    labels = labels_of(kl, 6)
    assert batch.kl.targets.tolist() == labels[labels != -100].tolist()
    assert (batch.num_sequences, batch.num_pairs, batch.processed_tokens) == (3, 0, 16)
    assert collate(examples[:1], PAD, "kto").kl is None  # nothing to mismatch with
    assert collate(examples[:2], PAD, "kto").kl is None

    long = [Example(0, [BOS] * 9, ([20, EOS],), True), Example(1, [BOS], ([30] * 7 + [EOS],), False)]
    kl = collate(long, PAD, "kto").kl  # never wider than the batch itself
    assert kl.lengths == [11, 3] and kl.targets.tolist() == [30, 30, 20, EOS]


def test_collate_refuses_what_it_was_not_made_for():
    pairs, kto = EXAMPLES_OF_PAIRS, [Example(7, [BOS], ([EOS],), True)]
    for examples, kind in ((pairs, "sft"), (pairs, "kto"), (kto, "sft"), (kto, "pair"), ([*pairs, *kto], "pair")):
        with pytest.raises(ValueError, match=rf"examples: record \d was not tokenised with kind='{kind}'"):
            collate(examples, PAD, kind)
    with pytest.raises(ValueError, match="examples: got none"):
        collate([], PAD)
    with pytest.raises(ValueError, match="kind: got 'dpo'"):
        collate(pairs, PAD, "dpo")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_last_row_of_each_sequence(layout):
    examples = [Example(0, [BOS, 10], ([20, 21], [22])), Example(1, [BOS, 11], ([23], [24, 25, 26])),
                Example(2, [BOS, 10], ([27], [28, 29]))]
    batch = collate(examples, PAD, layout=layout)
    assert batch.input_ids.flatten()[batch.last_rows].tolist() == [21, 23, 27, 22, 26, 29]


def test_batch_moves_whole():
    examples = [Example(i, [BOS, 10 + i], ([20, EOS],), i == 0, (-1.0,)) for i in range(2)]
    moved = collate(examples, PAD, "kto").to("meta")
    tensors = [value for part in (moved, moved.kl) for value in vars(part).values() if torch.is_tensor(value)]
    assert len(tensors) == 12 and all(tensor.is_meta for tensor in tensors)
    assert (moved.num_tokens, moved.kl.num_tokens) == (4, 4)  # the counts never were on the device


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), max_size=200),
    batch_size=st.integers(1, 9),
    window=st.integers(1, 6),
    shuffle=st.booleans(),
)
def test_batch_order_takes_every_index_once(lengths, batch_size, window, shuffle):
    batches = batch_order(lengths, batch_size, seed=1, epoch=2, window=window, shuffle=shuffle)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert sorted(map(len, batches), reverse=True)[:-1] == [batch_size] * (len(batches) - 1)


def test_batch_order_is_a_function_of_seed_and_epoch():
    lengths = [(37 * i) % 211 for i in range(1000)]
    base = batch_order(lengths, 8, seed=0, epoch=0)
    assert base == batch_order(lengths, 8, seed=0, epoch=0)
    others = [batch_order(lengths, 8, seed=s, epoch=e) for s, e in ((0, 1), (1, 0), (1, 1), (10, 0))]
    assert all(a != b for i, a in enumerate([base, *others]) for b in [base, *others][:i])
    # pinned: a run that is resumed with another Python or machine goes on with the same data
    assert batch_order([3, 1, 2, 5, 4], 2, seed=0, epoch=0) == [[1, 2], [3], [0, 4]]


def test_batch_order_is_random_yet_alike_in_length():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 1000, (4000,), generator=generator).tolist()
    batches = batch_order(lengths, 16, seed=0, epoch=0)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded / sum(lengths) < 1.05  # random batches: about 1.9
    means = torch.tensor([sum(lengths[i] for i in b) / len(b) for b in batches])
    rank = torch.corrcoef(torch.stack([means, torch.arange(len(means), dtype=torch.float32)]))[0, 1]
    assert abs(rank) < 0.2  # the batches themselves come in no order of length
    in_order = batch_order(lengths, 16, seed=0, epoch=0, shuffle=False)
    assert [lengths[i] for b in in_order for i in b] == sorted(lengths)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        batch_order(lengths, 0, seed=0, epoch=0)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 60), max_size=200),
    room=st.integers(0, 100),
    batch_size=st.none() | st.integers(1, 9),
    window=st.integers(1, 6),
)
def test_filled_batches_take_every_index_once_and_keep_their_limits(tokens, room, batch_size, window):
    limit = max(tokens, default=1) + room
    batches = fill_batches(tokens, limit, batch_size=batch_size, seed=1, epoch=2, window=window)
    assert sorted(i for batch in batches for i in batch) == list(range(len(tokens)))
    assert all(batch and sum(tokens[i] for i in batch) <= limit for batch in batches)
    assert all(len(batch) <= (batch_size or len(tokens)) for batch in batches)


def test_filled_batches_are_full_and_a_function_of_seed_and_epoch():
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randn(3000, generator=generator).mul(0.7).add(6.3).exp().long() + 60).tolist()  # median 600
    limit = max(16384, max(tokens))
    base = fill_batches(tokens, limit, seed=0, epoch=0)
    assert base == fill_batches(tokens, limit, seed=0, epoch=0)
    assert base != fill_batches(tokens, limit, seed=0, epoch=1) != fill_batches(tokens, limit, seed=1, epoch=0)
    assert sum(tokens) / (len(base) * limit) > 0.97
    # pinned: a run that is resumed with another Python or machine goes on with the same data
    assert fill_batches([3, 1, 2, 5, 4, 1], 6, seed=0, epoch=0) == [[3, 1], [4, 2], [0, 5]]
    with pytest.raises(ValueError, match="tokens: got 5, expected at most max_tokens = 4"):
        fill_batches([1, 5], 4, seed=0, epoch=0)
    with pytest.raises(ValueError, match="max_tokens: got 0"):
        fill_batches([1], 0, seed=0, epoch=0)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        fill_batches([1], 4, batch_size=0, seed=0, epoch=0)


# ---- the quickstart's data -------------------------------------------------------------------------------------------


def script(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_quickstart_data_is_what_its_script_makes():
    files = script("make_data")["make"](seed=0)
    for name, rows in files.items():
        lines = (EXAMPLES / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert lines == [json.dumps(row) for row in rows]
    prompts = [row["prompt"] for rows in files.values() for row in rows]
    assert len(set(prompts)) == len(prompts)  # held-out prompts are in no other file
    for row in files["train"] + files["heldout"]:
        ends = [re.search(rf"(?<!\w){re.escape(row['answer'])}$", row[side]) for side in ("chosen", "rejected")]
        assert ends[0] and not ends[1], row


def test_quickstart_model_is_what_its_script_makes(tmp_path):
    made = script("make_model")
    tokenizer = made["make_tokenizer"](made["texts"](EXAMPLES / "data"))
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (EXAMPLES / "model" / "tokenizer.json").read_bytes()
    shipped = AutoTokenizer.from_pretrained(EXAMPLES / "model")
    config = AutoConfig.from_pretrained(EXAMPLES / "model")
    assert config.to_diff_dict().items() >= {"vocab_size": len(shipped), "model_type": "llama"}.items()
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS, EOS, PAD)

    for name, kind in (("train", "pair"), ("train", "kto"), ("heldout", "pair"), ("sft", "sft")):
        records = load_records(EXAMPLES / "data" / f"{name}.jsonl")
        examples, report = tokenize_records(records, shipped, kind, max_length=128)
        assert not report.dropped and not report.prompts_truncated
        for example in examples[:50]:
            record = records[example.record_id]
            text = shipped.decode(example.prompt_ids + example.responses[0], skip_special_tokens=True)
            assert text.startswith(record.prompt) and example.prompt_ids[0] == BOS
            assert text[len(record.prompt) :] in (record.chosen, record.rejected, record.completion)
