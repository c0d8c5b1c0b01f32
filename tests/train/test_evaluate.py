"""Held-out metrics against a plain computation from full logits; greedy generation against argmax without a cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import make, make_tokenizer, write_rows

from fastpref.data import Example, eval_order, load_records, records_from_rows, tokenize_records
from fastpref.losses import DPO, KTO, SFT
from fastpref.train import reference
from fastpref.train.evaluate import evaluate, exact_match, generate, is_right
from fastpref.train.model import load_policy, load_tokenizer
from fastpref.train.prompts import questions


def tick(done, of):
    pass


@pytest.fixture
def setup(world, tmp_path):
    config = make(world, tmp_path)
    tokenizer = load_tokenizer(config)
    return load_policy(config, tokenizer), tokenizer, load_records(config.eval_dataset)


def full_logps(model, prompt, response):
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return sum(float(logps[len(prompt) + t - 1, token]) for t, token in enumerate(response))


def test_dpo_metrics(setup):
    policy, tokenizer, records = setup
    examples, _ = tokenize_records(records, tokenizer, "pair", max_length=64)
    logps = torch.tensor([[full_logps(policy.model, e.prompt_ids, r) for r in e.responses] for e in examples])
    ref = logps + torch.randn(logps.shape, generator=torch.Generator().manual_seed(3))
    cached = reference.ReferenceLogps(ref.float(), torch.empty(0), torch.tensor([0]))
    found = evaluate(policy, cached.attach(examples), "pair", DPO(beta=0.3), 4, 0, cached, tick)
    rewards = 0.3 * (logps - ref)
    margins = rewards[:, 0] - rewards[:, 1]
    assert found["loss"] == pytest.approx(float(-F.logsigmoid(margins).mean()), abs=1e-5)
    assert found["logps/chosen"] == pytest.approx(float(logps[:, 0].mean()), abs=1e-4)
    assert found["logps/rejected"] == pytest.approx(float(logps[:, 1].mean()), abs=1e-4)
    assert found["rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-5)
    assert found["rewards/accuracies"] == pytest.approx(float((margins > 0).double().mean()))
    lengths = torch.tensor([[len(r) for r in e.responses] for e in examples])
    ratio = ((logps - ref) / lengths).exp()
    assert found["watch/kl"] == pytest.approx(float((lengths * (ratio - 1 - ratio.log())).mean()), rel=1e-4)


def test_sft_is_one_mean_over_tokens(setup):
    policy, tokenizer, records = setup
    examples, _ = tokenize_records(records, tokenizer, "sft", max_length=64)
    found = evaluate(policy, examples, "sft", SFT(), 4, 0, None, tick)
    total = sum(full_logps(policy.model, e.prompt_ids, e.responses[0]) for e in examples)
    assert found["loss"] == pytest.approx(-total / sum(len(e.responses[0]) for e in examples), abs=1e-5)


def test_kto_has_one_baseline_for_the_whole_set(setup):
    policy, tokenizer, records = setup
    examples, _ = tokenize_records(records, tokenizer, "kto", max_length=64)
    order = eval_order(examples, 4)
    cached = reference.compute(policy, examples, "kto", 4, 0, tick, [order])
    lower = reference.ReferenceLogps(cached.logps, cached.kl - 0.7, cached.kl_offsets)  # z is then 0.7 nats
    found = evaluate(policy, lower.attach(examples), "kto", KTO(beta=0.5), 4, 0, lower, tick)
    assert found["kl"] == pytest.approx(0.7, abs=1e-4)
    good = torch.sigmoid(torch.tensor(0.5 * 0.7))  # every log-ratio is 0
    assert found["loss"] == pytest.approx(float(0.5 * good + 0.5 * (1 - good)), abs=1e-5)
    assert found["rewards/chosen"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_kto_is_measured_over_desirable_and_undesirable(setup, batch_size):
    """KL is that of the responses, whatever the baseline; accuracy is of all pairs of the two kinds, however cut."""
    policy, tokenizer, records = setup
    examples, _ = tokenize_records(records, tokenizer, "kto", max_length=64)
    order = eval_order(examples, batch_size)
    cached = reference.compute(policy, examples, "kto", batch_size, 0, tick, [order])
    shift = torch.randn(cached.logps.shape, generator=torch.Generator().manual_seed(4))
    moved = reference.ReferenceLogps(cached.logps - shift, cached.kl + 5, cached.kl_offsets)  # so the baseline is 0
    found = evaluate(policy, moved.attach(examples), "kto", KTO(beta=0.5), batch_size, 0, moved, tick)
    assert found["kl"] == 0
    lengths = torch.tensor([len(e.responses[0]) for e in examples])
    rho = shift[:, 0].double() / lengths
    assert found["watch/kl"] == pytest.approx(float((lengths * (rho.exp() - 1 - rho)).mean()), rel=1e-3)
    kinds = torch.tensor([e.desirable for e in examples])
    good, bad = 0.5 * shift[kinds, 0], 0.5 * shift[~kinds, 0]
    assert 0.1 < (good[:, None] > bad).double().mean() < 0.9
    assert found["rewards/accuracies"] == pytest.approx(float((good[:, None] > bad).double().mean()))
    assert found["rewards/margins"] == pytest.approx(float(good.mean() - bad.mean()), abs=1e-4)


def test_generation_is_plain_argmax(setup):
    policy, tokenizer, records = setup
    own = policy.model.generation_config
    own.repetition_penalty, own.temperature = 1.9, 0.3  # what a model's author may have set
    prompts = [tokenizer(record.prompt)["input_ids"] for record in records]
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(3)  # so that greedy texts differ from prompt to prompt
    texts = generate(policy, tokenizer, prompts, 4, 6, tick)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    assert len(set(texts)) > 1
    assert policy.model.generation_config is own


def test_questions_answers_and_tasks(setup, tmp_path):
    _, tokenizer, records = setup
    examples, _ = tokenize_records(records, tokenizer, "kto", max_length=64)  # two examples a record
    asked = questions(records, examples, None)
    assert [q.answer for q in asked] == [r.extra["answer"] for r in records]
    assert len(questions(records, examples, 3)) == 3
    texts = [q.answer if i < 6 else "no" for i, q in enumerate(asked)]
    found = exact_match(asked, texts)
    assert found["exact_match"] == pytest.approx(6 / 9)
    counts = [sum(q.task == task for q in asked) for task in ("long", "short")]
    assert sum(found[f"exact_match/{task}"] * n for task, n in zip(("long", "short"), counts, strict=True)) == 6

    rows = [
        {"prompt": "a:", "completion": " b", "label": True},
        {"prompt": "c:", "completion": " d", "label": False},
        {"prompt": [{"role": "user", "content": "e"}], "completion": [{"role": "assistant", "content": " f "}]},
    ]
    chat = make_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    records = load_records(write_rows(tmp_path / "r.jsonl", rows))
    examples, _ = tokenize_records(records[::2], chat, "sft", max_length=64)
    assert [(q.prompt, q.answer) for q in questions(records[::2], examples, None)] == [("a:", "b"), ("user: e", "f")]
    labelled, _ = tokenize_records(records[:2], chat, "kto", max_length=64)
    assert [q.answer for q in questions(records, labelled, None)] == ["b"]  # a completion labelled bad is no answer


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("12", "12", True), (" 12\n", "12", True), ("so 12", "12", True), ("9+3=12", "12", True), ("112", "12", False),
        ("12 or 13", "12", False), ("12.", "12", False), ("", "12", False), ("answer b", "b", True), ("ab", "b", False),
    ],
)
def test_is_right(text, answer, right):
    assert is_right(text, answer) is right


def test_prose_has_no_exact_match():
    """Of chat data without an `answer`: generations are kept to be read, and no share of them is right."""
    said = [{"role": "user", "content": "Why?"}]
    prose = [{"role": "assistant", "content": "Because the sky scatters blue light more than red."}]
    row = {"prompt": said, "chosen": prose, "rejected": prose}
    rows = [row, row | {"answer": "42"}]
    records = records_from_rows(rows)
    examples = [Example(i, [1], ((2,), (3,))) for i in range(2)]
    one, other = questions(records, examples, None)
    assert (one.answer, other.answer) == (None, "42")
    assert exact_match([one], ["anything"]) == {} and exact_match([one, other], ["x", "42"]) == {"exact_match": 1.0}
