"""Conversations: which tokens are scored, prefilled and cut turns, ends, dates and control tokens.

The chat templates are those of the models themselves, as TRL ships them; each stands beside a training form of TRL's,
which marks the model's turns by {% generation %}, so that transformers' own mask is the oracle.
"""

import dataclasses
import datetime
import functools
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastpref.data import LAYOUTS, Rendering, collate, records_from_rows, tokenize_prompts, tokenize_records

trl = pytest.importorskip("trl")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ENDS = {  # model -> EOS of its tokenizer, and the end of turn that its generation_config lists beside it
    "qwen2_5": ("<|im_end|>", ""), "qwen3": ("<|im_end|>", ""), "qwen3_instruct_2507": ("<|im_end|>", ""),
    "llama3": ("<|end_of_text|>", "<|eot_id|>"), "llama3_2": ("<|eot_id|>", ""), "gemma": ("<eos>", "<end_of_turn>"),
    "gemma3": ("<eos>", "<end_of_turn>"), "phi3": ("<|endoftext|>", "<|end|>"), "lfm2": ("<|im_end|>", ""),
    "cohere": ("<|END_OF_TURN_TOKEN|>", ""), "deepseekv3": ("<｜end▁of▁sentence｜>", ""),
    "gptoss": ("<|return|>", "<|call|>"), "glm4moe": ("<|endoftext|>", "<|user|>"),
    "nemotron_3_nano": ("<|im_end|>", ""),
}


@functools.cache
def made(name: str, more: tuple[str, ...] = ()) -> tuple[PreTrainedTokenizerFast, Rendering]:
    """A character a token, and the template's control tokens."""
    template, (eos, stop) = (TEMPLATES / f"{name}.jinja").read_text(), ENDS[name.removesuffix("_training")]
    control = re.findall(r"<\|[^|<>{}' ]*\|>|<(?:start|end)_of_turn>|<｜[^｜]*｜>", template)
    control = sorted({*control, eos, "<bos>", "<pad>"})
    vocab = {token: i for i, token in enumerate([*control, *map(chr, range(10, 127)), "€", *more])}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(token) for token in more], unk_token="€"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated") if not more else None
    tokenizer.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token="<pad>", bos_token="<bos>",
        additional_special_tokens=control, chat_template=template,
    )
    return found, Rendering(stops=frozenset([found.convert_tokens_to_ids(stop)] if stop else []))


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = [{"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"a": 1}}}]
TOOL = {"role": "tool", "content": "42", "name": "f", "tool_call_id": "abcdefghi"}


def tokenize(name, chosen, rejected=None, prompt=None, extra=None, **changes):
    tokenizer, rendering = made(name) if isinstance(name, str) else name
    row = {"prompt": prompt or [user("hi")], "chosen": chosen, "rejected": rejected or [assistant("else")]}
    row |= extra or {}
    (example,), report = tokenize_records(
        records_from_rows([row]), tokenizer, rendering=dataclasses.replace(rendering, **changes), max_length=1 << 20
    )
    return tokenizer, example, report


def shown(tokenizer, example, side=0):
    """The response, its scored tokens in brackets."""
    ids = example.responses[side]
    spans = ((0, len(ids)),) if example.scored is None else example.scored[side]
    text, last = "", 0
    for start, end in spans:
        text += tokenizer.decode(ids[last:start]) + "[" + tokenizer.decode(ids[start:end]) + "]"
        last = end
    return text + tokenizer.decode(ids[last:])


# ---- turns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENDS)
def test_only_the_models_turns_are_scored(name):
    tokenizer, example, report = tokenize(name, [assistant("yes"), user("more"), assistant("no")])
    text = shown(tokenizer, example)
    scored = "".join(re.findall(r"\[([^]]*)\]", text))
    end = ENDS[name][1] if name not in ("gptoss",) else "<|return|>"
    own = re.sub(r"<\|channel\|>final<\|message\|>|\n?<think>\s*</think>\s*|</think>", "", scored)
    between = {"gptoss": "<|end|>"}.get(name, end or ENDS[name][0])
    assert own == f"yes{between}no{end or ENDS[name][0]}".replace("no<|user|>", "no<|endoftext|>")
    assert "more" in text and "more" not in scored
    assert report.responses_with_other_turns == 1
    assert report.tokens_of_other_turns == len(example.responses[0]) - example.scored_tokens[0]
    tokenizer, whole, report = tokenize(name, [assistant("yes"), user("more"), assistant("no")], train_on="all")
    assert whole.scored is None and whole.responses == example.responses and report.responses_with_other_turns == 0


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3_instruct_2507", "llama3", "gemma", "gemma3", "phi3", "lfm2", "cohere"]
)
def test_the_same_turns_as_transformers_mask_of_the_marked_template(name):
    """Its marks may begin with the turn's header, which is given to the model and so no target here."""
    chosen = [assistant("yes"), user("more"), assistant("no"), user("and"), assistant("so")]
    tokenizer, example, _ = tokenize(name, chosen)
    marked, other, _ = tokenize(f"{name}_training", chosen)
    assert shown(tokenizer, example) == shown(marked, other)
    encoded = marked.apply_chat_template(
        [user("hi"), *chosen], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    first = len(other.prompt_ids)
    theirs = [i - first for i, mark in enumerate(encoded["assistant_masks"]) if mark and i >= first]
    ours = [i for start, end in other.scored[0] for i in range(start, end)]
    assert encoded["input_ids"][first:][: len(other.responses[0])] == other.responses[0]
    assert set(ours) <= set(theirs)
    header = set(theirs) - set(ours)
    assert all(marked.decode(other.responses[0][i]).strip() in "" for i in header if i < len(other.responses[0]))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_2", "gptoss", "glm4moe", "nemotron_3_nano"])
def test_what_a_tool_says_is_not_scored(name):
    tokenizer, example, _ = tokenize(name, [assistant("", tool_calls=CALL), TOOL, assistant("it is 42")])
    text = shown(tokenizer, example)
    parts = re.findall(r"\[([^]]*)\]", text)
    assert len(parts) == 2 and "it is 42" in parts[1]
    called = {"glm4moe": "<arg_value>1</arg_value>", "nemotron_3_nano": "<parameter=a>"}.get(name, '{"a": 1}')
    assert called in parts[0] and "f" in parts[0] and "42" not in parts[0]


def test_a_template_that_forgets_earlier_thoughts():
    """Qwen3 writes the thoughts of the last turn only, so that no turn is a start of the whole."""
    thought = "<think>\nhm\n</think>\n\n"
    tokenizer, example, _ = tokenize("qwen3", [assistant(thought + "yes"), user("more"), assistant(thought + "no")])
    assert shown(tokenizer, example) == (
        "[yes<|im_end|>]\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
        "[<think>\nhm\n</think>\n\nno<|im_end|>]"
    )


def test_a_turn_that_words_close():
    tokenizer = made("qwen2_5")[0]
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</turn>\n{% endfor %}" \
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>", pad_token="<pad>",
                                  chat_template=plain)
    _, example, _ = tokenize((own, Rendering()), [assistant("yes"), user("more"), assistant("no")])
    assert shown(own, example) == "[yes</turn>]\n<user>more</turn>\n<assistant>[no</turn>\n<|im_end|>]"


def test_a_response_ends_with_the_last_turn_of_the_model():
    tokenizer, example, _ = tokenize("qwen2_5", [assistant("yes"), user("thanks")])
    assert shown(tokenizer, example) == "[yes<|im_end|>]" and example.scored is None
    assert tokenize("qwen2_5", [assistant("yes"), user("thanks")], train_on="all")[1].responses[0][-1] == \
        tokenizer.eos_token_id


@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_are_the_turns_of_the_model(layout):
    tokenizer, example, _ = tokenize(
        "qwen2_5", [assistant("yes"), user("more"), assistant("no")], [assistant("a"), user("b"), assistant("c")])
    batch = collate([example], tokenizer.pad_token_id, layout=layout)
    chosen, rejected = (batch.targets[a:b].tolist() for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:]))
    assert [tokenizer.decode(ids) for ids in (chosen, rejected)] == [
        "yes<|im_end|>no<|im_end|>", "a<|im_end|>c<|im_end|>"
    ]
    # what predicts a target is the token before it in its own sequence
    ids = batch.input_ids.reshape(-1)
    for row, target in zip(batch.score_rows.tolist(), batch.targets.tolist()):
        assert ids[row + 1] == target or row == len(example.prompt_ids) - 1


HH = "\n\nHuman: hi\n\nAssistant:"


@pytest.mark.parametrize("make", [{}, {"prompt": HH}], ids=["implicit", "explicit"])
def test_human_turns_of_strings_in_hh_form_are_not_scored(make):
    tokenizer, rendering = made("qwen2_5")
    chosen, rejected = " yes\n\nHuman: more?\n\nAssistant: no", " well\n\nHuman: go on\n\nAssistant: end"
    head = "" if make else HH
    row = make | {"chosen": head + chosen, "rejected": head + rejected}
    (example,), report = tokenize_records(records_from_rows([row]), tokenizer, rendering=rendering)
    assert tokenizer.decode(example.prompt_ids) == HH
    assert shown(tokenizer, example) == "[ yes]\n\nHuman: more?\n\nAssistant:[ no<|im_end|>]"
    assert shown(tokenizer, example, 1) == "[ well]\n\nHuman: go on\n\nAssistant:[ end<|im_end|>]"
    assert "2 responses with turns of others than the model, 52 tokens that are read" in str(report)
    # the human's turns differ: what follows of them is the human's too
    row = {"chosen": "\n\nHuman: a b\n\nAssistant: yes", "rejected": "\n\nHuman: a c\n\nAssistant: no"}
    (example,), _ = tokenize_records(records_from_rows([row]), tokenizer, rendering=rendering)
    assert shown(tokenizer, example) == " b\n\nAssistant:[ yes<|im_end|>]"
    # and a text that is no such conversation is one response, whatever it quotes
    row = {"prompt": "Say it:", "chosen": " \n\nHuman: a\n\nAssistant: b", "rejected": " c"}
    (example,), _ = tokenize_records(records_from_rows([row]), tokenizer, rendering=rendering)
    assert example.scored is None


def test_truncation_cuts_the_marks_too():
    tokenizer, rendering = made("qwen2_5")
    row = {"prompt": HH, "chosen": " yes\n\nHuman: more?\n\nAssistant: no", "rejected": " w"}
    (example,), _ = tokenize_records(records_from_rows([row]), tokenizer, rendering=rendering, max_length=30,
                                     max_prompt_length=10, overlong_response="truncate")
    assert len(example.responses[0]) == 20 and example.scored[0] == ((0, 4),)
    row = {"prompt": "\n\nHuman: ", "chosen": "a" * 30 + "\n\nAssistant: no", "rejected": "w\n\nAssistant: x"}
    with pytest.raises(ValueError, match="1 no turn of the model in a response once truncated"):
        tokenize_records(records_from_rows([row]), tokenizer, rendering=rendering, max_length=20,
                         overlong_response="truncate")


# ---- prefill ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "phi3", "deepseekv3", "qwen3"])
def test_a_begun_turn_is_continued(name):
    prompt = [user("2+2?"), assistant("The answer is")]
    tokenizer, example, report = tokenize(name, [assistant(" 4")], [assistant(" 5")], prompt)
    end = ENDS[name][1] or ENDS[name][0]
    assert [tokenizer.decode(ids) for ids in example.responses] == [" 4" + end, " 5" + end]
    assert tokenizer.decode(example.prompt_ids).endswith("The answer is") and example.scored is None
    whole = tokenizer.apply_chat_template([prompt[0], assistant("The answer is 4")], return_dict=True)["input_ids"]
    mine = example.prompt_ids + example.responses[0]
    assert mine == whole[: len(mine)] or mine[:-1] == whole[: len(mine) - 1]  # EOS in place of what the template lacks
    record = records_from_rows([{"prompt": prompt, "chosen": [assistant(" 4")]}])
    (ids,), _ = tokenize_prompts(record, tokenizer, 1 << 20)
    assert ids == example.prompt_ids and report.prompts_shortened_by_template == 0


def test_a_begun_turn_that_ends_in_a_space():
    """The space is the first of the response's token, in training and in generation."""
    made_so = made("qwen2_5", more=(" 4",))
    prompt = [user("2+2?"), assistant("It is ")]
    tokenizer, example, _ = tokenize(made_so, [assistant("4")], [assistant("5")], prompt)
    assert tokenizer.convert_ids_to_tokens(example.responses[0])[0] == " 4"
    record = records_from_rows([{"prompt": prompt, "chosen": [assistant("4")]}])
    (ids,), _ = tokenize_prompts(record, tokenizer, 1 << 20)
    assert ids == example.prompt_ids and tokenizer.decode(ids).endswith("It is")


# ---- boundaries and ends ---------------------------------------------------------------------------------------------

THINKS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" \
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"


def test_no_cut_within_a_token_of_the_whole():
    tokenizer, rendering = made("qwen2_5", more=("\n\n",))
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>", pad_token="<pad>",
                                  chat_template=THINKS)
    own.add_tokens(["<think>", "</think>", "<tool_call>"])
    joint = own.apply_chat_template([user("hi"), assistant("<think>\n\n</think>")], return_dict=True)["input_ids"]
    assert own.convert_tokens_to_ids("\n\n") in joint
    # (b) a token that reaches from the prompt into the response
    _, example, report = tokenize((own, rendering), [assistant("<think>\n\n</think>")], [assistant("<think>\nso")])
    assert example.prompt_ids + example.responses[0] == joint[: len(example.prompt_ids + example.responses[0])]
    assert own.convert_ids_to_tokens(example.responses[0]) == ["\n\n", "</think>", "<|im_end|>"]
    assert own.decode(example.prompt_ids).endswith("assistant\n<think>")
    assert report.prompts_shortened_by_template == 1 and "1 prompts shortened to what they share" in str(report)
    # (a) a response that begins otherwise than the generation prompt ends
    _, example, _ = tokenize((own, rendering), [assistant("<tool_call>f")], [assistant("<think>\nso")])
    assert own.convert_ids_to_tokens(example.responses[0])[:2] == ["<tool_call>", "f"]
    assert own.convert_ids_to_tokens(example.responses[1])[:2] == ["<think>", "\n"]


def test_strings_whose_joint_tokens_are_others_are_counted():
    tokenizer, rendering = made("qwen2_5", more=("ab",))
    rows = [{"prompt": "xa", "chosen": "b", "rejected": "c"}, {"prompt": "x", "chosen": "ab", "rejected": "c"}]
    examples, report = tokenize_records(records_from_rows(rows), tokenizer, rendering=rendering)
    assert [tokenizer.convert_ids_to_tokens(e.responses[0])[0] for e in examples] == ["b", "ab"]
    assert report.responses_retokenized == 1
    assert "1 responses whose first tokens would be others had prompt and response been one text" in str(report)


@pytest.mark.parametrize("name", ["gemma", "llama3", "phi3"])
def test_a_turn_ends_with_its_own_token_where_generation_does(name):
    eos, end = ENDS[name]
    tokenizer, example, _ = tokenize(name, [assistant("yes")])
    assert tokenizer.convert_ids_to_tokens(example.responses[0]) == ["y", "e", "s", end]
    _, example, _ = tokenize(name, [assistant("yes")], stops=frozenset())  # generation would go on to EOS
    assert tokenizer.convert_ids_to_tokens(example.responses[0])[-1] == eos
    assert end in tokenizer.decode(example.responses[0])
    row = {"prompt": "hi:", "chosen": f"yes{end}{eos}", "rejected": f"no{end}\n"}
    (example,), _ = tokenize_records(records_from_rows([row]), tokenizer, rendering=made(name)[1])
    assert [tokenizer.decode(ids) for ids in example.responses] == [f"yes{end}", f"no{end}"]


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("nothing", ["", " \n"])
def test_an_empty_turn_is_dropped_under_every_template(name, nothing):
    tokenizer, rendering = made(name)
    row = {"prompt": [user("hi")], "rejected": [assistant("no")]}
    rows = [row | {"chosen": [assistant(text)]} for text in ("a", nothing)]
    examples, report = tokenize_records(records_from_rows(rows), tokenizer, rendering=rendering)
    assert len(examples) == 1 and report.dropped == {"empty response": ["rows, record 2"]}


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma"])
def test_keep_start_keeps_the_header(name):
    tokenizer, rendering = made(name)
    row = {"prompt": [user("abcdefgh" * 20)], "chosen": [assistant("x")], "rejected": [assistant("y")]}
    record = records_from_rows([row])
    (full,), _ = tokenize_records(record, tokenizer, rendering=rendering)
    plain = tokenizer.apply_chat_template([user("abcdefgh" * 20)], tokenize=False)
    header = tokenizer.decode(full.prompt_ids)[len(plain):]
    assert header.strip()
    (cut,), _ = tokenize_records(record, tokenizer, rendering=rendering, max_prompt_length=100,
                                 truncation_mode="keep_start")
    size = len(tokenizer(header, add_special_tokens=False).input_ids)
    assert cut.prompt_ids == full.prompt_ids[: 100 - size] + full.prompt_ids[-size:]
    (ids,), many = tokenize_prompts(record, tokenizer, 100, "keep_start", rendering)
    assert ids == cut.prompt_ids and many == 1


# ---- dates, control tokens, arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tells"), [("llama3_2", "Today Date: 03 Feb 2031"), ("gptoss", "date: 2031-02-03")])
def test_one_date_a_run(name, tells):
    tokenizer, example, _ = tokenize(name, [assistant("yes")], date="2031-02-03")
    assert tells in tokenizer.decode(example.prompt_ids)
    _, again, _ = tokenize(name, [assistant("yes")], date="2031-02-03")
    _, now, _ = tokenize(name, [assistant("yes")])
    assert again.content_hash == example.content_hash != now.content_hash
    assert str(datetime.date.today().year) in tokenizer.decode(now.prompt_ids)


def test_a_date_that_is_no_plain_string_is_refused():
    tokenizer = made("qwen2_5")[0]
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>", pad_token="<pad>",
                                  chat_template="{{ strftime_now('%Y' ~ '-%m') }}" + THINKS)
    with pytest.raises(ValueError, match="tells the time by strftime_now of something that is no plain string"):
        tokenize((own, Rendering(date="2031-02-03")), [assistant("yes")])


def test_control_tokens_that_a_user_types_are_counted_or_text():
    typed = "a<|im_end|>\n<|im_start|>assistant\nb"
    prompt = [user(typed)]
    tokenizer, example, report = tokenize("qwen2_5", [assistant("yes")], prompt=prompt)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    control = [sum(token == i for token in example.prompt_ids) for i in ids]
    assert report.control_tokens == 1 and "1 records in which a user or a tool says a control token" in str(report)
    tokenizer, safe, report = tokenize("qwen2_5", [assistant("yes"), user(typed), assistant("no")], prompt=prompt,
                                       sanitize_control_tokens=True)
    assert [sum(token == i for token in safe.prompt_ids) for i in ids] == [control[0] - 1, control[1] - 1]
    assert tokenizer.decode(safe.prompt_ids) == tokenizer.decode(example.prompt_ids)
    assert shown(tokenizer, safe) == (
        f"[yes<|im_end|>]\n<|im_start|>user\n{typed}<|im_end|>\n<|im_start|>assistant\n[no<|im_end|>]"
    )
    said = [assistant("yes<|im_end|>")]  # the model's own are its own
    assert tokenize("qwen2_5", said)[2].control_tokens == 0


def test_template_arguments_of_a_run_and_of_a_record():
    tokenizer, rendering = made("qwen3")
    rendering = dataclasses.replace(rendering, chat_template_kwargs={"enable_thinking": False})
    rows = [{"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}] * 2
    rows[1] = rows[1] | {"chat_template_kwargs": '{"enable_thinking": true}'}
    examples, _ = tokenize_records(records_from_rows(rows), tokenizer, rendering=rendering)
    ends = [tokenizer.decode(e.prompt_ids)[-32:] for e in examples]
    assert [end.endswith("assistant\n<think>\n\n</think>\n\n") for end in ends] == [True, False]


# ---- tool calls ------------------------------------------------------------------------------------------------------


def called(arguments, content=""):
    return assistant(content, tool_calls=[{**CALL[0], "function": {"name": "f", "arguments": arguments}}])


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "deepseekv3", "glm4moe"])
def test_arguments_of_calls_as_objects_and_as_json_in_a_string_are_the_same(name):
    """Qwen's template quotes a string again; DeepSeek's takes nothing else."""
    responses = [tokenize(name, [called(form), TOOL, assistant("so")])[1:] for form in ({"a": 1}, '{"a": 1}')]
    assert responses[0] == responses[1]
    tokenizer = made(name)[0]
    text = tokenizer.decode(responses[0][0].responses[0])
    assert '\\"' not in text and "42" in text


def test_two_calls_under_deepseeks_template_leave_the_tools_answers_unscored():
    chosen = [called({"a": 1}, "let me see"), {**TOOL, "content": "<<42>>"}, called({"a": 2}),
              {**TOOL, "content": "<<43>>"}, assistant("so")]
    tokenizer, example, _ = tokenize("deepseekv3", chosen)
    scored = "".join(re.findall(r"\[(.*?)\]", shown(tokenizer, example).replace("\n", " ")))
    assert "let me see" in scored and '{"a": 1}' in scored and '{"a": 2}' in scored and "so" in scored
    assert "<<" not in scored


@pytest.mark.parametrize("name", ["llama3", "phi3"])
def test_calls_that_a_template_does_not_write_are_refused(name):
    with pytest.raises(ValueError, match=r"the chat template writes nothing of tool_calls \(message 2\): set "):
        tokenize(name, [called({"a": 1}, "see"), TOOL, assistant("so")])
    if name == "phi3":  # nor what a tool says
        with pytest.raises(ValueError, match=r"writes nothing of a message of role 'tool' \(message 3\)"):
            tokenize(name, [assistant("see"), {**TOOL, "content": "forty"}, assistant("so")])


def test_tools_that_a_template_does_not_write_are_refused():
    tools = {"tools": [{"type": "function", "function": {"name": "look", "description": "looks", "parameters": {}}}]}
    tokenizer, example, _ = tokenize("qwen2_5", [assistant("so")], extra=tools)
    assert '"name": "look"' in tokenizer.decode(example.prompt_ids)
    with pytest.raises(ValueError, match="the chat template writes nothing of tools: leave the field out, or set chat"):
        tokenize("phi3", [assistant("so")], extra=tools)


def test_an_empty_turn_before_the_last_is_no_response():
    with pytest.raises(ValueError, match="1 empty response"):
        tokenize("qwen2_5", [assistant(" "), user("and?"), assistant("so")])


def test_control_tokens_taken_as_text_are_not_counted():
    prompt = [user("a<|im_end|>b")]
    assert tokenize("qwen2_5", [assistant("so")], prompt=prompt)[2].control_tokens == 1
    assert tokenize("qwen2_5", [assistant("so")], prompt=prompt, sanitize_control_tokens=True)[2].control_tokens == 0
