"""One line into TRL: the replaced function against TRL's own, and whole runs with and without it."""

from __future__ import annotations

import runpy

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

trl = pytest.importorskip("trl")

from trl.trainer import utils  # noqa: E402

from fastpref.integrations.trl import kernel, patch, unpatch  # noqa: E402
from tests.integrations.trl_world import (  # noqa: E402
    arguments,
    assert_same_history,
    completions,
    make_dpo,
    make_kto,
    make_model,
    make_tokenizer,
    perturbed,
)

TRLS = utils._ChunkedLogProbFunction
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    unpatch()
    assert utils._ChunkedLogProbFunction is TRLS


def operands(rows=23, hidden=12, vocab=67, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    made = [torch.randn(rows, hidden), torch.randn(vocab, hidden), torch.randn(vocab) if bias else None]
    made = [None if x is None else x.to(dtype).requires_grad_() for x in made]
    return *made, torch.randint(vocab, (rows,))


def both(given, *options, weights=(1.0, 0.7), **more):
    """(results, gradients) of TRL's function and of ours, of a sum weighted row by row."""
    found = []
    for function in (TRLS, kernel.ChunkedLogProbs):
        hidden, weight, bias = (None if x is None else x.detach().clone().requires_grad_() for x in given[:3])
        results = function.apply(hidden, weight, bias, given[3], *options, **more)
        rows = torch.linspace(-1, 2, given[3].shape[0])
        total = sum(w * (rows * x).sum() for w, x in zip(weights, results[:2]) if w and x is not None)
        total.backward()
        found.append((results, [None if x is None else x.grad for x in (hidden, weight, bias)]))
    return found


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("bias", [False, True])
def test_all_outputs_and_both_gradients(softcap, bias):
    (theirs, their_grads), (ours, our_grads) = both(operands(bias=bias), 0.8, 32, softcap, 0.6, ALL)
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert theirs[4].any() or theirs[4].dtype == torch.bool
    for a, b in zip(our_grads, their_grads):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["logps", "entropy"])
def test_either_gradient_alone(weights):
    (_, their_grads), (_, our_grads) = both(operands(), 1.3, 16, None, 1.0, ("entropy",), weights=weights)
    for a, b in zip(our_grads, their_grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_only_what_is_asked_for():
    given = operands()
    for outputs in ((), ("log_probs",), ("log_probs", "is_top1"), ("entropy", "mean_logits")):
        results = kernel.ChunkedLogProbs.apply(*given, 1.0, 32, outputs=outputs)
        assert [x is not None for x in results] == [True, *(name in outputs for name in ALL)]
    assert all(x is not None for x in kernel.ChunkedLogProbs.apply(*given, 1.0, 32))


def test_the_first_of_equal_maxima_is_top1():
    weight = torch.eye(4)[[0, 1, 1, 2]]
    hidden = torch.tensor([[0.0, 9.0, 0.0, 0.0]]).expand(2, 4).contiguous()
    targets = torch.tensor([1, 2])
    for function in (TRLS, kernel.ChunkedLogProbs):
        assert function.apply(hidden, weight, None, targets, 1.0, 4, None, 1.0, ALL)[4].tolist() == [True, False]


def test_no_rows():
    hidden, weight, bias, targets = operands(rows=0)
    results = kernel.ChunkedLogProbs.apply(hidden, weight, bias, targets, 1.0, 32, None, 1.0, ALL)
    assert [x.shape for x in results] == [(0,)] * 5
    results[0].sum().backward()
    assert hidden.grad.shape == (0, 12) and not weight.grad.any()


def test_dtypes_as_trls():
    """Autocast; hidden states in fp32 before a bf16 head (`cast_lm_head_to_fp32`); everything in bf16."""
    hidden, weight, bias, targets = operands(bias=False)
    cases = {
        "autocast": (hidden, weight, 2e-2, True),
        "fp32 over a bf16 head": (hidden, weight.detach().bfloat16().requires_grad_(), 2e-5, False),
        "bf16": (hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_(), 2e-2, False),
    }
    for name, (h, w, tolerance, autocast) in cases.items():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (theirs, their_grads), (ours, our_grads) = both((h, w, None, targets), 1.0, 32, None, 1.0, ALL)
        for a, b in zip((*ours[:4], *our_grads[:2]), (*theirs[:4], *their_grads[:2])):
            assert a.dtype == b.dtype, name
            scale = float(b.detach().float().abs().max())
            torch.testing.assert_close(a.float() / scale, b.float() / scale, rtol=0, atol=tolerance, msg=name)


def test_refuses_shards():
    hidden, weight, bias, targets = operands()
    with pytest.raises(ValueError, match="ZeRO-3"):
        kernel.ChunkedLogProbs.apply(hidden, weight[:0], None, targets, 1.0, 32)
    partitioned = torch.nn.Parameter(weight.detach().clone())
    partitioned.ds_id = 0  # gathered just now, empty again by the time of backward
    with pytest.raises(ValueError, match="ZeRO-3"):
        kernel.ChunkedLogProbs.apply(hidden, partitioned, None, targets, 1.0, 32)


def test_patch_and_unpatch(monkeypatch):
    patch()
    assert utils._ChunkedLogProbFunction is kernel.ChunkedLogProbs
    with patch():  # not the one that replaced: nothing is restored
        pass
    assert utils._ChunkedLogProbFunction is kernel.ChunkedLogProbs
    unpatch()
    assert utils._ChunkedLogProbFunction is TRLS
    unpatch()
    with patch(), patch():
        assert utils._ChunkedLogProbFunction is kernel.ChunkedLogProbs
    assert utils._ChunkedLogProbFunction is TRLS


class Other:
    pass


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.setattr(utils, "_ChunkedLogProbFunction", Other), r"its _Chunked\w+ \([0-9a-f]{12}\) is not"),
        (lambda m: m.delattr(utils, "_ChunkedLogProbFunction"), "it has no _ChunkedLogProbFunction"),
    ],
    ids=["source", "presence"],
)
def test_an_unknown_trl_is_refused(monkeypatch, change, message):
    kernel.check_version.cache_clear()
    with monkeypatch.context() as changed:
        change(changed)
        with pytest.raises(ImportError, match=message + ".*; pip install 'trl==[0-9.]+'$"):
            patch()
    kernel.check_version.cache_clear()
    assert kernel._replaced is None


def test_comments_and_indentation_are_not_of_the_source(tmp_path):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("def f(x):\n    return x\n")
    other.write_text("class A:\n    def f(x):\n        # why\n\n        return x\n")
    hashes = {kernel.source_hash(runpy.run_path(str(one))["f"]), kernel.source_hash(runpy.run_path(str(other))["A"].f)}
    assert len(hashes) == 1


def test_the_command_installs_a_version_that_was_compared():
    version = ".".join(kernel.INSTALL.rstrip("'").rpartition("==")[2].split(".")[:2])
    for known in kernel.COMPARED.values():
        assert any(version in versions.split(", ") for versions in known.values())


def sft(folder, model, **changes):
    config = arguments(trl.SFTConfig, folder, **changes)
    return trl.SFTTrainer(model, args=config, train_dataset=completions(), processing_class=make_tokenizer())


MAKERS = {
    "dpo": lambda *a, **k: make_dpo(trl.DPOTrainer, *a, **k),
    "kto": lambda *a, **k: make_kto(trl.KTOTrainer, *a, **k),
    "sft": sft,
}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "tied"])
@pytest.mark.parametrize("trainer", MAKERS)
def test_twenty_steps_are_trls(trainer, kind, tmp_path):
    plain = MAKERS[trainer](tmp_path, make_model(kind), max_steps=20)
    plain.train()
    with patch():
        patched = MAKERS[trainer](tmp_path, make_model(kind), max_steps=20)
        patched.train()
    losses = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert len(losses) == 20 and abs(losses[0] - losses[-1]) > 1e-2  # it learns, so that the curves could part
    assert_same_history(patched, plain)


TURNS = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
)


def vision_language_model():
    """(an Idefics3, the architecture of SmolVLM, of one image token an image, its processor)."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [
        "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]})
    edge = {"longest_edge": 28}
    images = Idefics3ImageProcessorPil(do_image_splitting=False, size=edge, max_image_size=edge)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=TURNS)
    text = make_model().config.to_dict() | {"vocab_size": len(tokenizer), "model_type": "llama"}
    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=28,
                  patch_size=14)
    config = Idefics3Config(text_config=text, vision_config=vision, scale_factor=2, tie_word_embeddings=False,
                            image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=0)
    torch.manual_seed(3)
    return Idefics3ForConditionalGeneration(config), processor


def pictures(count=8):
    """What colour? of plain pictures; the rejected answer names another."""
    colours = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}
    names = list(colours)
    said = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    return Dataset.from_list([
        {"images": [Image.new("RGB", (28, 28), colours[names[i % 3]])], "prompt": said("user", "What colour?"),
         "chosen": said("assistant", names[i % 3]), "rejected": said("assistant", names[(i + 1) % 3])}
        for i in range(count)
    ])


def test_images_are_trained_on_as_by_trl(tmp_path):
    """DPO of a vision-language model: same losses, same weights, in the part that sees too."""
    def run():
        model, processor = vision_language_model()
        given = arguments(trl.DPOConfig, tmp_path, max_steps=4, per_device_train_batch_size=2, max_length=None,
                          optim="sgd", learning_rate=0.1, gradient_checkpointing=False)
        trainer = trl.DPOTrainer(model, perturbed(model), given, train_dataset=pictures(), processing_class=processor)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        return trainer, before

    plain, before = run()
    with patch():
        patched, _ = run()
    losses = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[0] - losses[-1] > 1e-3
    assert_same_history(patched, plain)
    for (name, a), b in zip(patched.model.named_parameters(), plain.model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6, msg=name)
    assert any("vision" in name and not torch.equal(p, before[name]) for name, p in plain.model.named_parameters())


def shortest(completions, **_):
    return [-float(len(text)) for text in completions]


@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_online_trainers(trainer, tmp_path):
    """Sampled completions, an entropy bonus that is differentiated (GRPO), a temperature, a reference."""
    options = dict(
        num_generations=2, max_completion_length=6, per_device_train_batch_size=4, max_steps=2, temperature=0.9,
        beta=0.05, optim="sgd", learning_rate=0.1, seed=5,
    )
    config, cls = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[trainer]
    if trainer == "grpo":
        options["entropy_coef"] = 0.3

    def run():
        given = arguments(config, tmp_path, **options)
        model = make_model()
        model.save_pretrained(tmp_path / "model")  # the reference is loaded from there
        model = type(model).from_pretrained(tmp_path / "model")
        trained = cls(
            model, shortest, args=given, train_dataset=completions().remove_columns("completion"),
            processing_class=make_tokenizer(),
        )
        trained.train()
        return trained

    plain = run()
    with patch():
        patched = run()
    assert any(entry.get("grad_norm", 0) > 0 for entry in plain.state.log_history)
    assert_same_history(patched, plain)
    for a, b in zip(patched.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
