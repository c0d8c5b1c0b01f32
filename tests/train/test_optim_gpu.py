"""On a GPU: states and activations in host memory, updates inside the backward pass, the plan's totals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import make, make_config, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fastpref import linear_preference_loss
from fastpref.data import collate, load_records, tokenize_records
from fastpref.losses import DPO
from fastpref.train import memory_estimate, stage
from fastpref.train.memory_estimate import CONTEXT, RECIPES, measure, terms
from fastpref.train.model import Policy, enable_checkpointing, load_policy, load_tokenizer
from fastpref.train.optim import Updater, join
from fastpref.trunk import take_apart

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """A model with weights large enough for torchao to quantise and to offload (4096 numbers)."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    make_tokenizer().save_pretrained(folder)
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 264}
    LlamaForCausalLM(make_config(**sizes)).bfloat16().float().save_pretrained(folder)
    return str(folder)


def trained(world, wide, tmp_path, steps=5, **changes):
    """The policy and its updater after some steps on one batch, and what the last one reported."""
    config = make(world, tmp_path, model_name_or_path=wide, max_grad_norm=0, **changes)
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    examples, _ = tokenize_records(load_records(config.train_dataset), tokenizer, "pair", max_length=64)
    batch = collate(examples, 0)
    batch = replace(batch, ref_logps=policy.sequence_logps(batch.to(policy.device)).cpu())
    updater = Updater(policy.trainable(), config)
    for _ in range(steps):
        values = stage.train_step(policy, updater, config, [batch], 1e-4, [])
    return policy, updater, values


def test_states_on_the_host_are_a_fp32_master(world, wide, tmp_path):
    pytest.importorskip("torchao")
    here, master, values = trained(world, wide, tmp_path, dtype="bfloat16", optim="adamw_fp32_master")
    there, offloaded, same = trained(world, wide, tmp_path, dtype="bfloat16", optim="adamw_offload")
    assert same["loss"] == pytest.approx(values["loss"], rel=1e-3)
    assert same["grad_norm"] == pytest.approx(values["grad_norm"], rel=2e-2)
    for (name, p), q in zip(here.trainable().items(), there.trainable().values()):
        exact = join(p, master.optimizer.state[p]["low"])
        assert torch.allclose(exact, q.float(), rtol=2**-7, atol=3e-4), name
        assert q.grad is None
    offloaded.close()
    again = Updater(there.trainable(), make(world, tmp_path, max_grad_norm=0, dtype="bfloat16",
                                                     optim="adamw_offload"))
    (there.trunk.embed_tokens.weight.float().sum() * 2).backward()  # only the new optimiser's hooks are left
    assert len(again.norms) == 1 and len(again.optimizer.queue) == 1


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_fp32_master"])
def test_updates_inside_the_backward_pass(world, wide, tmp_path, optim):
    if optim == "adamw_torch_8bit":
        pytest.importorskip("torchao")
    _, _, after = trained(world, wide, tmp_path, dtype="bfloat16", optim=optim)
    policy, updater, inside = trained(world, wide, tmp_path, dtype="bfloat16", optim=optim, optim_in_backward=True)
    assert inside["loss"] == pytest.approx(after["loss"], rel=0.02) and inside["loss"] < math.log(2)
    assert all(p.grad is None for p in policy.trainable().values())
    assert all(updater.optimizer.state[p] for p in policy.trainable().values())


def test_inputs_of_layers_in_host_memory(world, wide, tmp_path):
    one, _, full = trained(world, wide, tmp_path, gradient_checkpointing="full")
    two, _, offload = trained(world, wide, tmp_path, gradient_checkpointing="offload")
    assert offload["loss"] == full["loss"] and offload["grad_norm"] == full["grad_norm"]
    assert all(torch.equal(p, q) for p, q in zip(one.trainable().values(), two.trainable().values()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("label", ["bf16, fp32 master", "bf16, 8-bit AdamW", "+ in backward"])
def test_the_plan_against_the_measured_peak(world, tmp_path, label, kind):
    """A 1.2B Llama with the 8B model's vocabulary: two micro-batches a step where gradients may add up."""
    if "8-bit" in label or "backward" in label:
        pytest.importorskip("torchao")
    config = LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=8,
                         num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192)
    tokens, length = 8192, 1024
    (recipe,) = (r for r in RECIPES if r.label.strip() == label)
    planned = terms(measure(config, tokens), recipe, kind)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    if kind != "none":
        enable_checkpointing(model, kind)
    parts = take_apart(model)
    policy = Policy(model, parts.trunk, parts.head, torch.device("cuda"), torch.bfloat16, None)
    keys = {key: value for key, value in recipe.keys.items() if key != "optim_in_backward"}
    settings = make(world, tmp_path, **keys | {"max_grad_norm": 0, "optim_in_backward": "backward" in label})
    updater = Updater(policy.trainable(), settings)
    ids = torch.randint(config.vocab_size, (tokens // length, length), device="cuda")
    for _ in range(2):
        updater.begin(1e-6)
        for _ in range(1 if updater.in_backward else 2):
            hidden = policy.trunk(input_ids=ids, use_cache=False).last_hidden_state
            loss_of(policy, hidden, ids).backward()
            del hidden
        updater.end(True)
    peak = torch.cuda.max_memory_allocated()
    assert peak == pytest.approx(planned.total - CONTEXT, rel=0.05)


def loss_of(policy, hidden, ids):
    sequences, length = ids.shape
    ends = [i * length for i in range(sequences + 1)]
    return linear_preference_loss(
        hidden.reshape(-1, hidden.shape[-1]), policy.head.weight, ids.reshape(-1), loss=DPO(), cu_seqlens=ends,
        ref_logps=torch.zeros(sequences, device="cuda"),
    ).loss


def test_counting_is_what_a_gpu_step_takes(tmp_path):
    """Activations alone, of two layers, against torch's counter."""
    config = LlamaConfig(vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2,
                         num_attention_heads=16, num_key_value_heads=4)
    counted = memory_estimate._activations(memory_estimate._on_meta(config), 4096, "none")
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    ids = torch.zeros(1, 4096, dtype=torch.int64, device="cuda")
    before = torch.cuda.memory_allocated()
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.cuda.memory_allocated() - before == pytest.approx(counted.kept, rel=0.03)
    del hidden
