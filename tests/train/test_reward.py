"""Reward models: loss and gradient against fp64 mathematics, layouts, whole runs, what transformers and TRL read."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_loop import lines_without_times, stop_after
from test_packing import long_prompts
from tiny import make, make_config, make_pairs, make_tokenizer, read_metrics, write_rows

from fastpref import cli
from fastpref.data import LAYOUTS, Example, collate, load_records, tokenize_records, with_margins
from fastpref.errors import UserError
from fastpref.report.metrics import METRICS
from fastpref.train.display import Display
from fastpref.train.evaluate_run import evaluate_run
from fastpref.train.loop import Stopped, train
from fastpref.train.micro_batches import totals_of
from fastpref.train.model import load_policy, load_tokenizer, prepared, take_apart

EXAMPLES = [
    Example(0, [1, 20, 21], ([30, 31, 2], [2]), margin=0.7),  # the rejected one is a single token
    Example(1, [1, 22], ([33, 34, 35, 36, 2], [50, 51, 52, 2])),
    Example(2, [1, 20, 21], ([33, 2], [50, 51, 52, 50, 51, 2]), margin=-0.3),  # the first one's prompt
]
SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ARCHITECTURES = {
    "llama": make_config(),
    "gemma2": transformers.Gemma2Config(**SIZES, intermediate_size=48, num_key_value_heads=1, head_dim=16),
    "gpt2": transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES, intermediate_size=48),
    "bloom": transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2),
}


def classifier(config, **options):
    torch.manual_seed(1)
    config = type(config).from_dict(config.to_dict() | {"num_labels": 1} | options)
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    for p in model.parameters():  # visible biases, norms and rewards
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def reward_config(world, folder, **changes):
    return make(world, folder, **{"loss": "bradley_terry"} | changes)


def own_rewards(model, examples):
    """[2 P] by the model's own code, each sequence alone and without padding."""
    ids = [e.prompt_ids + e.responses[side] for side in (0, 1) for e in examples]
    return torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits[:, 0] for row in ids])


# ---- one batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rewards_are_the_models_own(name, layout, world, tmp_path):
    model = classifier(ARCHITECTURES[name], pad_token_id=0)
    options = {"packing": layout != "padded", "prefix_sharing": layout == "shared"}
    with torch.no_grad():
        expected = own_rewards(model, EXAMPLES)
        if name == "bloom" and layout != "padded":
            with pytest.raises(UserError, match="BloomForSequenceClassification: its attention cannot be replaced"):
                take_apart(model, reward_config(world, tmp_path, **options), make_tokenizer())
            return
        policy = take_apart(model, reward_config(world, tmp_path, **options), make_tokenizer())
        assert policy.layout == layout
        rewards = policy.rewards(collate(EXAMPLES, 0, layout=layout))
    assert rewards.tolist() == pytest.approx(expected.tolist(), abs=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_of_the_whole_model_in_fp64(world, tmp_path, layout):
    """L = mean of -log s(R_c - R_r - margin) + k (R_c + R_r)^2, all written out; the gradient by transformers' code."""
    model, other = classifier(make_config(pad_token_id=0)).double(), classifier(make_config(pad_token_id=0)).double()
    chosen, rejected = own_rewards(model, EXAMPLES).chunk(2)
    margins = torch.tensor([0.7, 0.0, -0.3], dtype=torch.float64)
    difference = chosen - rejected - margins
    truth = (torch.log1p(torch.exp(-difference)) + 0.05 * (chosen + rejected) ** 2).sum() / 3
    truth.backward()
    config = reward_config(world, tmp_path, packing=layout != "padded", center_coefficient=0.05)
    policy = dataclasses.replace(prepared(other, config, make_tokenizer()), compute_dtype=torch.float64)
    batch = collate(EXAMPLES, 0, layout=layout)
    out = policy.compute_loss(batch, config.loss_fn, totals_of([batch]))
    out.loss.backward()
    assert out.loss.dtype == torch.float64 and out.loss.item() == pytest.approx(truth.item(), rel=1e-6)
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert float((p.grad - q.grad).norm()) < 2e-6 * float(p.grad.norm()), name  # norms are fp32 in transformers
    assert out.metrics["accuracy"].tolist() == (chosen > rejected).tolist() and out.logps is None
    values = {"rewards/chosen": chosen, "rewards/rejected": rejected, "margin": chosen - rejected}
    for name, value in values.items():
        assert out.metrics[name].tolist() == pytest.approx(value.tolist(), abs=1e-6)


def test_micro_batches_add_up_to_one_batch(world, tmp_path):
    config = reward_config(world, tmp_path, packing=True, center_coefficient=0.05)
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    records = load_records(config.train_dataset)
    examples, _ = tokenize_records(records, tokenizer, max_length=64)
    for i, record in enumerate(records[:7]):  # some with a margin, some without, one micro-batch with none
        record.extra["margin"] = 0.3 * i
    examples = with_margins(examples, records)

    def gradients(parts):
        batches = [collate([examples[i] for i in part], 0, layout="shared") for part in parts]
        policy.model.zero_grad()
        outs = [policy.compute_loss(batch, config.loss_fn, totals_of(batches)) for batch in batches]
        sum(out.loss for out in outs).backward()
        return sum(out.loss.item() for out in outs), torch.cat([p.grad.reshape(-1) for p in policy.model.parameters()])

    parts = [[*range(5)], [*range(5, 9)], [*range(9, 12)]]
    one, whole = gradients([[*range(12)]])
    value, gradient = gradients(parts)
    assert value == pytest.approx(one, rel=2e-6)
    assert float((gradient - whole).norm() / whole.norm()) < 2e-6
    assert abs(sum(gradients([part])[0] for part in parts) / 3 - one) > 1e-4  # a mean of means is another number


def test_margins_come_from_the_records(world, tmp_path):
    rows = make_pairs(3, seed=1)
    rows[0]["margin"], rows[2]["margin"] = 2, -0.5
    records = load_records(write_rows(tmp_path / "m.jsonl", rows))
    plain, _ = tokenize_records(records, make_tokenizer())
    examples = with_margins(plain, records)
    assert [e.margin for e in examples] == [2.0, None, -0.5]
    assert collate(examples, 0).margins.tolist() == [2.0, 0.0, -0.5] and collate(plain, 0).margins is None
    assert examples[0].content_hash != plain[0].content_hash and examples[1].content_hash == plain[1].content_hash
    for wrong in ("much", True, math.inf):
        rows[1]["margin"] = wrong
        data = str(write_rows(tmp_path / "m.jsonl", rows))
        with pytest.raises(ValueError, match=r"m.jsonl:2: field 'margin' is .*, expected a finite number"):
            train(reward_config(world, tmp_path / "run", train_dataset=data))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_bf16_keeps_rewards_in_fp32(world, tmp_path):
    """At a reward of 30 a bf16 product would be a multiple of 1/8."""
    config = reward_config(world, tmp_path, dtype="bfloat16", optim="adamw_fp32_master")
    policy = load_policy(config, load_tokenizer(config))
    batch = collate(EXAMPLES, 0)
    with torch.no_grad():
        policy.head.module.weight.mul_(30 / policy.rewards(batch).abs().max())
        rewards = policy.rewards(batch)
        exact = policy.hidden_rows(batch).double() @ policy.head.module.weight[0].double()
    assert rewards.dtype == torch.float32 and rewards.tolist() == pytest.approx(exact.tolist(), rel=1e-5)
    assert not torch.equal(rewards, rewards.bfloat16().float())


# ---- models ----------------------------------------------------------------------------------------------------------


def test_what_is_no_reward_model_is_refused(world, tmp_path):
    config, tokenizer = reward_config(world, tmp_path), make_tokenizer()
    bert = transformers.BertConfig(**SIZES, intermediate_size=48)
    with pytest.raises(UserError, match="BertForSequenceClassification: trunk and classifier do not give its logit"):
        take_apart(classifier(bert), config, tokenizer)
    roberta = transformers.RobertaConfig(**SIZES, intermediate_size=48, pad_token_id=1)
    with pytest.raises(UserError, match=r"no score layer, .* \(found classifier \(RobertaClassificationHead\)\)"):
        take_apart(classifier(roberta), config, tokenizer)
    folder = tmp_path / "two"
    classifier(make_config(), num_labels=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="two: no sequence classifier with one label that loads") as caught:
        load_policy(reward_config(world, tmp_path, model_name_or_path=str(folder)), tokenizer)
    assert "\n" not in str(caught.value)
    weights = load_file(world / "pretrained" / "model.safetensors")
    for lost, saved in (("model.norm.weight", False), ("score.weight", True)):  # of a checkpoint, the score layer too
        folder = tmp_path / lost
        make_config().save_pretrained(folder)
        save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
        where = {} if saved else {"model_name_or_path": str(folder)}
        with pytest.raises(UserError, match=f"no sequence classifier .* that loads .its weights lack {lost}"):
            load_policy(reward_config(world, tmp_path, **where), tokenizer, folder if saved else None)


def test_a_saved_reward_model_keeps_its_score_layer(world, tmp_path):
    model = classifier(make_config())
    model.save_pretrained(tmp_path / "saved")
    config = reward_config(world, tmp_path, model_name_or_path=str(tmp_path / "saved"))
    assert torch.equal(load_policy(config, make_tokenizer()).head.weight, model.score.weight)
    fresh = [load_policy(reward_config(world, tmp_path), make_tokenizer()) for _ in range(2)]
    assert not torch.equal(fresh[0].head.weight, fresh[1].head.weight)  # random; a run seeds it
    trunk = load_file(world / "pretrained" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(fresh[0].model.model.embed_tokens.weight, trunk)


def test_padding_is_never_eos(world, tmp_path):
    """transformers reads the reward from the last token that is not padding."""
    folder = tmp_path / "model"
    classifier(make_config(pad_token_id=2)).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    config = reward_config(world, tmp_path / "run", model_name_or_path=str(folder), max_steps=1, eval_dataset=None)
    assert load_tokenizer(make(world, tmp_path, model_name_or_path=str(folder))).pad_token_id == 2  # dpo: no matter
    assert load_tokenizer(config).pad_token == "<s>"
    train(config, display=Display(Console(file=io.StringIO())))
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert saved.config.pad_token_id == 1
    ids = torch.tensor([[1, 20, 30, 2, 1, 1], [1, 20, 30, 31, 32, 2]])  # filled up with the new padding
    with torch.no_grad():
        alone = saved(input_ids=ids[:1, :4], use_cache=False).logits
        filled = saved(input_ids=ids, attention_mask=torch.tensor([[1] * 4 + [0] * 2, [1] * 6])).logits
        assert torch.allclose(filled[:1], alone, atol=1e-6)
        row = saved.model(input_ids=ids[:1, :4]).last_hidden_state[0, 3]
        assert torch.allclose(saved.score(row), alone[0], atol=1e-6)  # of EOS
    bare = make_tokenizer()
    bare.pad_token = bare.bos_token = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no special token but EOS, .*; set its pad_token"):
        load_tokenizer(reward_config(world, tmp_path, tokenizer_name_or_path=str(tmp_path / "bare")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_generate": True}, "eval_generate: loss 'bradley_terry' trains a reward model, which does not generate"),
        ({"memory_budget": 10**6}, "memory_budget is for the LM head; loss 'bradley_terry' trains a reward model"),
        ({"tail": "rank1"}, "tail is for the LM head; loss 'bradley_terry' trains a reward model"),
        ({"ref_model_name_or_path": "x"}, "ref_model_name_or_path: loss 'bradley_terry' has no reference"),
        ({"beta": 0.1}, "beta: no option of loss 'bradley_terry', which takes center_coefficient"),
        ({"center_coefficient": -1}, "center_coefficient is -1.0; it takes a number of at least 0"),
        ({"stages": [{"loss": "sft"}, {"loss": "bradley_terry"}]}, "stages: bradley_terry trains a model with a score "
         "layer, 'sft' one with an LM head; make them two runs"),
    ],
)
def test_what_a_reward_model_has_no_use_for(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        reward_config(world, tmp_path, **changes)
    assert "\n" not in str(caught.value)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_says_so_in_a_reward_models_words(world, tmp_path, capsys):
    shown = io.StringIO()
    config = reward_config(world, tmp_path / "run", packing=True, max_steps=16, eval_steps=8, center_coefficient=0.01)
    summary = train(config, display=Display(Console(file=shown, width=120)))
    assert summary["after"]["accuracy"] == 1 and summary["after"]["loss"] < 0.6 * summary["before"]["loss"]
    lines = read_metrics(tmp_path / "run")
    assert {key for line in lines for key in line} - {"stage", "split", "step"} <= set(METRICS)
    names = {"loss", "accuracy", "margin", "mean_reward", "rewards/chosen", "rewards/rejected"}
    assert all(names <= row.keys() for row in lines)
    for row in lines:
        assert row["margin"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-5)
        assert row["mean_reward"] == pytest.approx((row["rewards/chosen"] + row["rewards/rejected"]) / 2, abs=1e-5)
    text = shown.getvalue()
    assert "| acc 100 % |" in text.replace("100.0", "100") and "accuracy" in text and "log-prob" not in text
    page = (tmp_path / "run" / "report.html").read_text()
    said = page.partition("Configuration (config.yaml)")[0]
    assert "Accuracy" in said and "Mean reward" in said
    assert not [word for word in ("log-prob", "Implicit", " reference", "nats") if word in said]
    assert evaluate_run(tmp_path / "run", display=Display(Console(file=io.StringIO()))) == pytest.approx(
        summary["after"], abs=1e-6
    )
    assert cli.main(["losses"]) == 0
    assert any(line.split()[:1] == ["bradley_terry"] for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("changes", [{"packing": True, "gradient_checkpointing": "full"}, {"use_peft": True}],
                         ids=["packed, checkpointing", "LoRA"])
def test_a_run_goes_on_bitwise(world, tmp_path, quiet, monkeypatch, changes):
    changes = {"max_steps": 6, "gradient_accumulation_steps": 2, "center_coefficient": 0.01} | changes
    train(reward_config(world, tmp_path / "whole", **changes), display=quiet)
    config = reward_config(world, tmp_path / "parts", **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            train(config, display=quiet)
    train(config, resume=True, display=quiet)
    name = "adapter_model.safetensors" if "use_peft" in changes else "model.safetensors"
    whole, parts = ((tmp_path / run / "model" / name).read_bytes() for run in ("whole", "parts"))
    assert whole == parts
    assert lines_without_times(tmp_path / "whole") == lines_without_times(tmp_path / "parts")


def test_layouts_and_precision_train_the_same(world, tmp_path, quiet):
    data = long_prompts(tmp_path / "t.jsonl")
    changes = {"train_dataset": data, "max_steps": 4, "adam_epsilon": 1e-3, "learning_rate": 1e-2, "bf16": False}
    runs = {"padded": {}, "packed": {"packing": True, "prefix_sharing": False}, "shared": {"packing": True}}
    weights = {}
    for name, options in runs.items():
        train(reward_config(world, tmp_path / name, **changes | options), display=quiet)
        weights[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    for name in ("packed", "shared"):
        for key, weight in weights["padded"].items():
            assert float((weights[name][key] - weight).abs().max()) < 2e-6, (name, key)
    saved = next(r for r in read_metrics(tmp_path / "shared") if r["split"] == "train")
    assert saved["saved_tokens_per_s"] > 0


# ---- who reads the result --------------------------------------------------------------------------------------------


def run_and_rewards(world, run, quiet, **changes):
    config = reward_config(world, run, **{"packing": True, "max_steps": 8, "center_coefficient": 0.01} | changes)
    summary = train(config, display=quiet)
    records = load_records(world / "heldout.jsonl")
    texts = [side for name in ("chosen", "rejected") for side in (f"{r.prompt}{getattr(r, name)}</s>" for r in records)]
    tokenizer = load_tokenizer(config)
    examples, _ = tokenize_records(records, tokenizer, max_length=64)
    policy = load_policy(config, tokenizer, run / "model")
    policy.model.eval()
    with torch.no_grad():
        rewards = policy.rewards(collate(examples, tokenizer.pad_token_id, layout=policy.layout))
    return summary, texts, rewards.tolist()


def test_a_pipeline_reads_it(world, tmp_path, quiet):
    _, texts, rewards = run_and_rewards(world, tmp_path / "run", quiet)
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "run" / "model"), device="cpu")
    found = pipe(texts, batch_size=5, function_to_apply="none")
    assert {one["label"] for one in found} == {"reward"}
    assert [one["score"] for one in found] == pytest.approx(rewards, abs=1e-5)
    settings = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"] and settings["pad_token_id"] == 0


def test_peft_reads_the_adapter_with_its_score_layer(world, tmp_path, quiet):
    peft = pytest.importorskip("peft")
    _, texts, rewards = run_and_rewards(world, tmp_path / "run", quiet, use_peft=True)
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model", num_labels=1).eval()
    with torch.no_grad():
        found = [float(model(input_ids=torch.tensor([make_tokenizer()(text)["input_ids"]])).logits) for text in texts]
    assert found == pytest.approx(rewards, abs=1e-5)
    adapter = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert [value.shape for name, value in adapter.items() if "score" in name] == [(1, 32)]


def test_trl_reads_it_and_finds_our_loss_and_metrics(world, tmp_path, quiet):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    summary, _, _ = run_and_rewards(world, tmp_path / "run", quiet)
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in make_pairs(9, seed=2)]
    args = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"), report_to="none", per_device_eval_batch_size=9, use_cpu=True, bf16=False,
        center_rewards_coefficient=0.01, gradient_checkpointing=False,
    )
    data = datasets.Dataset.from_list(rows)
    trainer = trl.RewardTrainer(model=str(tmp_path / "run" / "model"), args=args, train_dataset=data, eval_dataset=data)
    found = trainer.evaluate()
    for name in ("loss", "accuracy", "margin", "mean_reward"):
        assert found[f"eval_{name}"] == pytest.approx(summary["after"][name], abs=2e-5), name
