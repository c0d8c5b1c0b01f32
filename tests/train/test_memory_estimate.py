"""The table of memory terms: against the design's figures for an 8B model, against arithmetic, against a real step."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import make_config
from transformers import (
    BitsAndBytesConfig,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fastpref import cli
from fastpref.errors import UserError
from fastpref.train import loop, memory_estimate
from fastpref.train.config import TrainConfig
from fastpref.train.memory_estimate import GIB, KINDS, RECIPES, Activations, choose, measure, terms
from fastpref.train.model import enable_checkpointing
from fastpref.train.quantized import settle, states_of
from fastpref.train.stage_data import StageData

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192,
)


@pytest.fixture(scope="module")
def llama():
    return measure(LLAMA_3_8B, 16384)


def total(sizes, label, kind):
    (recipe,) = (r for r in RECIPES if r.label.strip() == label)
    return terms(sizes, recipe, kind)


def test_an_8b_model_at_16k_tokens(llama):
    assert llama.parameters == 8_030_261_248  # as published
    layers, tokens, width = 32, 16384, 4096
    t = total(llama, "bf16, 8-bit AdamW", "full")
    assert t.weights == t.gradients == 2 * llama.parameters
    assert t.optimizer == pytest.approx((2 + 2 * 4 / 256 / 2) * llama.parameters, rel=0.02)
    final_norm = tokens * width * (4 + 2 + 2)  # fp32 copy; what goes into the head, and into the norm
    assert t.activations == pytest.approx(layers * tokens * width * 2 + final_norm, rel=0.02)
    assert t.total / GIB == pytest.approx(54, rel=0.03)  # DESIGN section 8's figures
    assert total(llama, "+ in backward", "full").total / GIB == pytest.approx(40, rel=0.03)
    # 19 in the design leaves out what one layer's backward pass holds (2 to 4 GiB at 16k tokens)
    host = total(llama, "bf16, states on host", "offload")
    assert (host.total - host.work) / GIB == pytest.approx(19, rel=0.08) and host.total < 24 * GIB
    assert host.host > 14 * llama.parameters


def test_what_is_chosen_for_a_card(llama):
    def best(gib):
        found = choose(llama, gib * GIB)[1]
        return None if found is None else (found.recipe.label.strip(), found.kind)

    assert best(141) == ("bf16, fp32 master", "full")
    assert best(80) == ("bf16, 8-bit AdamW", "full")  # keeps gradient accumulation
    assert best(48) == ("+ in backward", "full")
    assert best(24) == ("bf16, states on host", "offload")
    assert best(15) is None
    text = memory_estimate.plan_text("m", llama, 48)
    assert "model_name_or_path=m dtype=bfloat16 optim=adamw_torch_8bit optim_in_backward=true max_grad_norm=0 " in text
    assert text.endswith("gradient_checkpointing=full max_tokens_per_batch=16384")
    assert "nothing fits 9 GiB" in memory_estimate.plan_text("m", llama, 9)


def test_a_recipe_that_the_host_cannot_hold_is_not_the_best(llama):
    """8.03e9 parameters with 14 bytes each on the host: 105 GiB."""
    def best(host_gib):
        return choose(llama, 32 * GIB, host_bytes=host_gib * GIB)[1].recipe.label

    assert (best(112), best(104)) == ("bf16, states on host", "LoRA on bf16")
    text = memory_estimate.plan_text("m", llama, 32, host_gib=32)
    (row,) = (line for line in text.splitlines() if line.startswith("bf16, states on host"))
    assert "host: takes more than the 32 GiB of host memory that there are (--host-gib)" in text
    assert "use_peft=true" in text.splitlines()[-1] and not row.endswith("fits")


@pytest.mark.parametrize("kind", KINDS[:3])
def test_activations_against_a_real_step(kind):
    """Against a bf16 model on the CPU, whose attention kernel keeps what a flash kernel does."""
    config = make_config(hidden_size=64, intermediate_size=160)
    counted = memory_estimate._activations(memory_estimate._on_meta(config), 96, kind)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).bfloat16().train()
    if kind != "none":
        enable_checkpointing(model, kind)
    real = memory_estimate.count(model, torch.zeros(1, 96, dtype=torch.int64))
    assert counted.kept == pytest.approx(real.kept, rel=0.02)
    assert counted.work == pytest.approx(real.work, rel=0.05)


EXPERTS = Qwen3MoeConfig(
    vocab_size=261, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=2, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2,
)


@pytest.mark.parametrize("kind", ["none", "full"])
def test_adapters_of_experts_against_a_real_step(kind):
    """Whose weights peft adds up for each pass, all experts of a layer together."""
    peft = pytest.importorskip("peft")

    def adapt(model):
        where = {"target_modules": "all-linear", "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **where))

    (recipe,) = (r for r in RECIPES if r.label == "LoRA on bf16")
    sizes = measure(EXPERTS, 96, only=(kind, recipe), adapt=adapt)
    config = Qwen3MoeConfig(**EXPERTS.to_dict() | {"attn_implementation": "sdpa"})
    model = adapt(Qwen3MoeForCausalLM(config).bfloat16())
    assert sizes.adapters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = model.get_base_model().train()
    if kind != "none":
        enable_checkpointing(base, kind)
    real = memory_estimate.count(base, torch.zeros(1, 96, dtype=torch.int64))
    assert sizes.lora[kind].kept == pytest.approx(real.kept, rel=0.05)
    assert sizes.lora[kind].kept + sizes.lora[kind].work == pytest.approx(real.kept + real.work, rel=0.05)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.bits], ids=lambda r: r.label)
@pytest.mark.parametrize("kind", ["none", "full"])
def test_bases_of_few_bits_against_a_real_step(recipe, kind, tmp_path):
    """Bytes of weights and scales, and of a step's tensors, within 5 % of those of a model in bitsandbytes."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    config = make_config(hidden_size=256, intermediate_size=640, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    sizes = measure(config, 96, lora_r=8)
    t = memory_estimate.terms(sizes, recipe, kind, 2**22)
    asked = BitsAndBytesConfig(load_in_4bit=recipe.bits == 4, load_in_8bit=recipe.bits == 8,
                               bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    config._attn_implementation = "sdpa"
    base = LlamaForCausalLM.from_pretrained(tmp_path, config=config, dtype=torch.bfloat16, quantization_config=asked)
    settle(base)
    held = {k: v for k, v in states_of(base).items() if not k.endswith(("quant_map", "weight_format"))}  # tables
    assert t.weights - 4 * sizes.adapters == pytest.approx(sum(v.nbytes for v in held.values()), rel=0.05)
    if kind != "none":
        enable_checkpointing(base, kind)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_dropout=0.05, target_modules="all-linear")
    model = peft.get_peft_model(base, lora).get_base_model().train()
    real = memory_estimate.count(model, torch.zeros(1, 96, dtype=torch.int64))
    counted = sizes.few_bits[recipe.bits][kind]
    assert counted.kept == pytest.approx(real.kept, rel=0.05)
    assert counted.kept + counted.work == pytest.approx(real.kept + real.work, rel=0.05)


MEMORY = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
BY_RECIPE = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d, ]+|none of them) \|$", MEMORY, re.M)
LABELS = {"bf16, 8-bit AdamW in backward": "+ in backward"}


def test_the_docs_say_what_qlora_of_8b_takes():
    """DPO of an 8B model on a card of 16 GB at 4,096 tokens."""
    (recipe,) = (r for r in RECIPES if r.label == "QLoRA (4 bits)")
    found = terms(measure(LLAMA_3_8B, 4096, only=("full", recipe)), recipe, "full").total / GIB
    assert found < 16e9 / GIB and BY_RECIPE[0][2] == f"{found:.1f}"
    assert f"takes {found:.1f} GiB at 4,096 tokens" in MEMORY


@pytest.mark.slow
def test_the_docs_tables_of_cards():
    rows = re.findall(r"^\| (\d+) GiB \| ([\d,]+) \| (.+?) \| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", MEMORY, re.M)
    cards = (12, 16, 24, 48, 80)
    assert {int(row[0]) for row in rows} == set(cards) and len(rows) == 10 and len(BY_RECIPE) == len(RECIPES) - 1
    sizes = {tokens: measure(LLAMA_3_8B, int(tokens.replace(",", ""))) for tokens in {row[1] for row in rows}}
    for gib, tokens, label, kind, card, host in rows:
        best = choose(sizes[tokens], int(gib) * GIB)[1]
        assert (best.recipe.label.strip(), best.kind) == (label, kind)
        assert (f"{best.total / GIB:.1f}", f"{best.host / GIB:.1f}") == (card, host)
    for label, few, many, fits in BY_RECIPE:
        found = [total(sizes[tokens], LABELS.get(label, label), "full").total / GIB for tokens in ("2,048", "4,096")]
        assert [f"{gib:.1f}" for gib in found] == [few, many]
        assert (", ".join(str(card) for card in cards if found[1] <= card) or "none of them") == fits


def test_other_families():
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}
    found = measure(Gemma2Config(**sizes, head_dim=16), 64)
    assert found.full["none"].kept > found.full["selective"].kept > found.full["full"].kept > 0
    assert found.matrices == found.parameters - 64 * (4 * 2 + 1)  # tied: the embedding is the head
    mixture = measure(MixtralConfig(**sizes, num_local_experts=4), 64)
    assert mixture.parameters > 4 * 3 * 64 * 96 * 2
    assert not mixture.no_lora and "QLoRA" in memory_estimate.plan_text("m", mixture, 1)


def test_counting_sees_tensors_live_and_die():
    with memory_estimate._Live() as live:
        a = torch.zeros(1000, device="meta")
        b = a.view(10, 100)  # the same storage
        assert live.now == 4000
        c = b * 2
        del c
    assert live.now == 4000 and live.most == 8000
    assert Activations(1, 2).kept == 1


def test_the_command(tmp_path, capsys):
    make_config().save_pretrained(tmp_path)
    assert cli.main(["plan", "--model", str(tmp_path), "--gpu-gib", "2", "--max-tokens", "128"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 4 + len(RECIPES) * len(KINDS) and "best for 2 GiB:" in out and "states on host" in out

    def failed(*arguments):
        assert cli.main(["plan", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--gpu-gib is missing" in failed("--model", "m")
    assert "--hidden is missing" in failed("--length", "3")
    assert "--gpu-gib: is for --model" in failed("--length", "3", "--hidden", "3", "--vocab", "3", "--gpu-gib", "3")
    assert "--vocab: --model tells it" in failed("--model", "m", "--gpu-gib", "3", "--vocab", "3")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    assert "no usable config.json" in failed("--model", str(tmp_path), "--gpu-gib", "3")
    assert "--max-tokens is 0; it takes at least 1" in failed("--model", "m", "--gpu-gib", "3", "--max-tokens", "0")


# ---- too few GPUs ----------------------------------------------------------------------------------------------------


def fitting(folder, **keys):
    return TrainConfig(model_name_or_path=str(folder), output_dir="out", train_dataset="pairs.jsonl", **keys)


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory):
    """Its config.json alone."""
    folder = tmp_path_factory.mktemp("8b")
    LLAMA_3_8B.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("keys", "bytes_each"), [
    ({"dtype": "bfloat16", "optim": "adamw_fp32_master"}, 2 + 2 + 10),
    ({"dtype": "bfloat16"}, 2 + 2 + 2 + 8 / 256),
])
def test_too_few_gpus_are_told_before_the_model_is_loaded(llama_8b, keys, bytes_each):
    config, needed = fitting(llama_8b, **keys), 8_030_261_248 * bytes_each
    for count in (1, 2, 3):
        memory_estimate.check_fits(config, count, int(needed / count + memory_estimate.CONTEXT) + 2)
    each = int(needed / 2.5 + memory_estimate.CONTEXT)
    line = f"are {needed / GIB:.1f} GiB; there are 2 GPUs of {each / GIB:.1f} GiB: take at least 3 GPUs, or what"
    with pytest.raises(UserError, match=re.escape(line)):
        memory_estimate.check_fits(config, 2, each)


def test_weights_that_do_not_fit_one_gpu_are_told(llama_8b):
    with pytest.raises(UserError, match="the weights alone 15.0; there are 64 GPUs of 14.0 GiB: what `fastpref plan"):
        memory_estimate.check_fits(fitting(llama_8b, dtype="bfloat16", optim="adamw_fp32_master"), 64, 14 * 2**30)


def test_ranks_that_sample_have_all_weights_beside_their_part(llama_8b):
    config, size = fitting(llama_8b, dtype="bfloat16", optim="adamw_fp32_master"), 8_030_261_248
    each = int(size * 14 / 8 + size * 2 + memory_estimate.CONTEXT) + 2
    memory_estimate.check_fits(config, 8, each, generates=True)
    with pytest.raises(UserError, match=r"all weights \(15.0\) beside their part; there are 8 GPUs .* at least 9 GPUs"):
        memory_estimate.check_fits(config, 8, each - 1000, generates=True)
    memory_estimate.check_fits(config, 8, each - 1000)


def test_lora_needs_room_for_the_base_alone(llama_8b):
    config = fitting(llama_8b, dtype="bfloat16", use_peft=True)
    with pytest.raises(UserError, match="there is 1 GPU of 15.0 GiB"):
        memory_estimate.check_fits(config, 1, 15 * 2**30)
    memory_estimate.check_fits(config, 1, 17 * 2**30)


def test_the_run_asks_before_it_loads(monkeypatch, llama_8b, tmp_path):
    """On a GPU, which is only said to be there."""
    asked = []
    monkeypatch.setattr(loop, "pick_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(loop.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 << 30))
    monkeypatch.setattr(loop, "check_optimizer", lambda *args: None)
    monkeypatch.setattr(loop, "load_tokenizer", lambda config: None)
    monkeypatch.setattr(loop, "check_saves", lambda *args: None)
    monkeypatch.setattr(loop, "dated", lambda config, tokenizer: config)
    monkeypatch.setattr(loop, "load_data", lambda *args: asked.append("data") or [StageData([])])
    monkeypatch.setattr(loop.sharding, "load", lambda *args: pytest.fail("the model was loaded"))
    config = dataclasses.replace(fitting(llama_8b), output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="weights, gradients and optimiser states are"):
        loop.train(config)
    assert asked == ["data"] and not (tmp_path / "run" / "config.yaml").exists()
