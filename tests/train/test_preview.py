"""`fastpref preview`: what it shows is what is trained on."""

import io
import re

import pytest
from rich.console import Console
from test_rendering import chats
from tiny import make, write_rows

from fastpref.data import LAYOUTS, Rendering, collate, records_from_rows, tokenize_records
from fastpref.errors import UserError
from fastpref.train import preview as page
from fastpref.train.display import Display
from fastpref.train.model import load_tokenizer

TURNS = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "w"}, {"role": "assistant", "content": "z"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = {
    "pair": [chats(1)[0] | {"chosen": TURNS}, {"prompt": "ab:", "chosen": " ab", "rejected": " AB"}],
    "kto": [{"prompt": "ab:", "completion": " ab", "label": True}, chats(1)[0] | {"rejected": TURNS}],
    "sft": [{"prompt": chats(1)[0]["prompt"], "completion": TURNS}, {"prompt": "a\n", "completion": " ü\n"}],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("how", [{}, {"max_length": 24, "overlong_response": "truncate"}], ids=["whole", "cut"])
def test_it_marks_the_targets_and_nothing_else(world, tmp_path, kind, layout, how):
    tokenizer = load_tokenizer(make(world, tmp_path))
    tokenizer.chat_template = TEMPLATE
    records = records_from_rows(ROWS[kind])
    examples, _ = tokenize_records(records, tokenizer, kind, **how)
    whole, _ = tokenize_records(records, tokenizer, kind)
    for example, full in zip(examples, whole, strict=True):
        batch = collate([example], 0, kind, layout=layout)
        (_, _, prompt), *responses = page.sequences(example, full, tokenizer, {tokenizer.eos_token_id})
        assert {part.style for part in prompt} <= {"prompt", "cut"}
        assert [p.text for p in prompt if p.style == "prompt"] == page.texts(tokenizer, example.prompt_ids)
        marked = [[p.text for p in parts if p.style in ("scored", "end")] for _, _, parts in responses]
        targets = [batch.targets[a:b].tolist() for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:])]
        assert marked == [page.texts(tokenizer, ids) for ids in targets]
        every = [[p.text for p in parts if p.style != "cut"] for _, _, parts in responses]
        assert every == [page.texts(tokenizer, ids) for ids in example.responses]
        ends = [p.text for _, _, parts in responses for p in parts if p.style == "end"]
        assert set(ends) <= {"</s>"} and len(ends) == sum(ids.count(2) for ids in targets)
        for (_, _, parts), ids, uncut in zip(responses, example.responses, full.responses, strict=True):
            cut = [p.text for p in parts if p.style == "cut"]
            assert cut == ([f" ✂ {len(uncut) - len(ids)} tokens cut ✂ "] if len(ids) < len(uncut) else [])


@pytest.mark.parametrize("width", [80, 120])
def test_what_it_prints(world, tmp_path, width):
    empty = {"role": "assistant", "content": ""}
    long = {"prompt": "abcdefgh:" * 20, "chosen": " ab", "rejected": " AB"}
    beyond = {"prompt": "beyond n", "chosen": "a", "rejected": "b"}
    rows = [ROWS["pair"][0], chats(1)[0] | {"chosen": [empty]}, long, beyond]
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = make(world, tmp_path / "run", train_dataset=str(data), chat_template=str(template), max_length=64)
    said = io.StringIO()
    page.preview(config, 3, Display(Console(file=said, width=width, highlight=False)))
    lines = said.getvalue().splitlines()
    assert max(len(line) for line in lines if not line.startswith("3 records")) <= max(width, len(str(data)) + 12)
    text = "\n".join(line.rstrip() for line in lines)
    joined = re.sub(r"\n +", "", text)
    assert "chosen    4 of 25  [x][</s>]↵│<│u│s│e│r│>│w│</s>│↵│<│a│s│s│i│s│t│a│n│t│>[z][</s>]" in joined
    assert "rejected        2  [y][</s>]" in text
    assert f"{data}:2\ndropped: empty response" in text and "beyond" not in text
    assert "prompt    60  <s> ✂ 121 tokens cut ✂" in text
    assert "3 records -> 2 pairs; 1 prompts truncated; 1 responses with turns of others" in text
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="n is 0; it takes at least 1"):
        page.preview(config, 0)


def test_ends_of_turns_are_those_of_generation(world, tmp_path):
    tokenizer = load_tokenizer(make(world, tmp_path))
    options = {"max_length": 64, "rendering": Rendering(stops=frozenset([0]))}
    said = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=100)
    page.show(said, records_from_rows([{"prompt": "ab:", "chosen": " ab<pad>", "rejected": " AB"}]), tokenizer, "pair",
              options)
    assert "\x1b[1;35m[<pad>]" in said.file.getvalue() and "\x1b[1;35m[</s>]" in said.file.getvalue()
