"""A preference loss inside a transformers model's forward, against autograd over the model's own full logits."""

from __future__ import annotations

import copy
import gc
import inspect
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastpref as fp
from fastpref.integrations.transformers import (
    PreferenceRequest,
    add_preference_head,
    preference_step,
    sequence_logps,
    targets_of,
)
from fastpref.trunk import linear_operands
from tests.families import CONFIGS, VOCAB, full_logits_logps, make_batch, make_model

REF = torch.tensor([-20.0, -18.0, -25.0, -23.0], dtype=torch.float64)


def dpo(logps, ref, beta=0.1):
    chosen, rejected = (logps - ref).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def expect(model, batch, ref=REF):
    """(loss, logps, gradients) through the model's own logits."""
    logps, out = full_logits_logps(model, batch)
    loss = dpo(logps, ref.to(logps.dtype))
    if getattr(out, "aux_loss", None) is not None:
        loss = loss + model.config.router_aux_loss_coef * out.aux_loss
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return loss.detach(), logps.detach(), found


def check(model, batch, out, expected, rtol=1e-9):
    loss, logps, wanted = expected
    torch.testing.assert_close(out.loss.detach(), loss, rtol=rtol, atol=rtol)
    torch.testing.assert_close(out.logps, logps, rtol=rtol, atol=rtol)
    model.zero_grad(set_to_none=True)
    out.loss.backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=rtol, atol=rtol * float(grad.abs().max() + 1e-3), msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name):
    model, batch = make_model(name), make_batch()
    expected = expect(model, batch)
    single = expected[0].dtype == torch.float32
    out = preference_step(model, batch, fp.DPO(beta=0.1), ref=REF.to(expected[0].dtype))
    check(model, batch, out, expected, rtol=2e-5 if single else 1e-9)
    assert (out.aux_loss is not None) == ("router" in name)
    assert out.metrics["rewards/margins"].shape == (2,) and out.lengths.tolist() == [7, 5, 5, 6]


def test_router_losses_of_micro_batches_add_up():
    model, batch = make_model("mixtral, router loss"), make_batch(pairs=2)
    single = {k: torch.cat((v[:1], v[2:3])) for k, v in batch.items()}
    totals = fp.Totals(sequences=4, tokens=23, chosen_tokens=12)
    out = preference_step(model, single, fp.DPO(), ref=REF[[0, 2]].float(), totals=totals)
    plain = preference_step(model, single, fp.DPO(), ref=REF[[0, 2]].float())
    torch.testing.assert_close(out.loss, plain.loss / 2)
    model.config.output_router_logits = False
    assert preference_step(model, single, fp.DPO(), ref=REF[[0, 2]].float()).aux_loss is None


def test_labels_are_an_other_way_to_say_what_is_scored():
    model, batch = make_model("llama"), make_batch()
    scored = (batch["completion_mask"] * batch["attention_mask"]).bool()
    labels = batch["input_ids"].masked_fill(~scored, -100)
    other = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    assert torch.equal(targets_of(batch), targets_of(other))
    assert torch.equal(sequence_logps(model, batch), sequence_logps(model, other))
    everything = targets_of({"input_ids": batch["input_ids"], "labels": batch["input_ids"]})
    assert torch.equal(everything[:, :-1], batch["input_ids"][:, 1:])  # nothing predicts the first token,
    assert (everything[:, -1] == -100).all()  # and the last one nothing
    # mean NLL of the chosen tokens is transformers' own loss
    own = model(**{k: v[:2] for k, v in other.items()}, use_cache=False).loss
    out = preference_step(model, {k: v[:2] for k, v in other.items()}, "sft")
    torch.testing.assert_close(out.loss.float(), own)  # which is fp32


def test_references():
    model, batch = make_model("qwen2, tied"), make_batch()
    ref = make_model("gemma2, softcap")
    logps, _ = full_logits_logps(ref, batch)
    out = preference_step(model, batch, fp.DPO(), ref=ref)
    torch.testing.assert_close(out.ref_logps, logps, rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for p in ref.parameters())
    given = preference_step(model, batch, fp.DPO(), ref=logps.detach())
    torch.testing.assert_close(given.loss, out.loss, rtol=1e-12, atol=1e-12)
    columns = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), logps.detach().chunk(2)))  # TRL's
    assert torch.equal(preference_step(model, batch | columns, fp.DPO()).loss, given.loss)
    with pytest.raises(ValueError, match="batch has ref_chosen_logps .* and then ref=None"):
        preference_step(model, batch | columns, fp.DPO(), ref=ref)
    assert preference_step(model, batch, fp.DPO(), ref=model).loss.item() == pytest.approx(torch.log(torch.tensor(2.0)))


def test_a_reference_has_no_dropout():
    ref = make_model("llama")
    ref.config.attention_dropout = 0.5
    for layer in ref.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ref.train()
    batch = make_batch()
    assert torch.equal(sequence_logps(ref, batch), sequence_logps(ref, batch)) and ref.training


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_peft(when, targets):
    """The head found before or after PEFT, LoRA on it or not, the adapter off for the reference."""
    import peft  # not at the top: the processes below import this module, and have no use for it

    model, batch = (
        make_model("cohere, logit_scale" if "lm_head" not in targets else "granite, logits_scaling"),
        make_batch(),
    )
    base_logps, _ = full_logits_logps(model, batch)
    if when == "before":
        add_preference_head(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    expected = expect(model, batch, base_logps.detach())
    assert all("lora" in name for name in expected[2])
    out = preference_step(model, batch, fp.DPO(), ref="adapter_off")
    torch.testing.assert_close(out.ref_logps, base_logps, rtol=1e-10, atol=1e-10)
    check(model, batch, out, expected)


def test_lora_on_the_head_in_bf16():
    """fp32 adapters on bf16 weights, as PEFT makes them, and bf16 autocast over fp32 weights."""
    import peft

    batch = make_batch()
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        model = peft.get_peft_model(make_model("llama", dtype), peft.LoraConfig(r=4, target_modules=["lm_head"]))
        adapter = model.lm_head.lora_B.default.weight
        torch.nn.init.normal_(adapter, std=0.3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = preference_step(model, batch, fp.DPO(), ref=REF.float())
        out.loss.backward()
        found = adapter.grad.double()
        loss, logps, wanted = expect(model.double(), batch)
        torch.testing.assert_close(out.logps.double(), logps, rtol=3e-2, atol=0.3)
        grad = next(grad for name, grad in wanted.items() if "lora_B" in name)
        assert (found - grad).norm() < 0.05 * grad.norm() and abs(out.loss.item() - loss.item()) < 0.05


def test_adapter_off_needs_an_adapter():
    with pytest.raises(ValueError, match="ref is 'adapter_off', but LlamaForCausalLM has no adapter"):
        preference_step(make_model("llama"), make_batch(), fp.DPO(), ref="adapter_off")


def test_gradient_checkpointing():
    model, batch = make_model("qwen2, tied").train(), make_batch()
    expected = expect(model, batch)
    model.gradient_checkpointing_enable()
    check(model, batch, preference_step(model, batch, fp.DPO(), ref=REF), expected)


def test_the_models_own_forward_is_left_as_it_was():
    model, plain = make_model("gemma2, softcap").eval(), make_model("gemma2, softcap").eval()
    signature = inspect.signature(model.forward)
    add_preference_head(model)
    forward = model.forward
    add_preference_head(model)
    assert model.forward is forward or model.forward.__func__ is forward.__func__
    assert inspect.signature(model.forward) == signature
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, expected) and generated.shape == (1, 8)
    preference_step(model, make_batch(), fp.DPO(), ref=REF)
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert "forward" not in vars(model.lm_head)


def test_a_failed_call_leaves_the_head_as_it_was():
    model, batch = make_model("llama"), make_batch()
    with pytest.raises(ValueError, match="ref_logps is None; dpo takes"):
        preference_step(model, batch, fp.DPO())
    assert model(input_ids=batch["input_ids"]).logits.shape[-1] == VOCAB


def test_copies_saving_and_accelerate(tmp_path):
    """A deep copy has its own weights; save_pretrained and accelerate's wrapping and unwrapping go on as before."""
    import accelerate

    model, batch = make_model("llama", torch.float32), make_batch()
    add_preference_head(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    logps, _ = full_logits_logps(other, batch)
    torch.testing.assert_close(sequence_logps(other, batch), logps, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    accelerate.state.AcceleratorState._reset_state()  # what a trainer's test left in this process
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    low = preference_step(prepared, batch, fp.DPO(), ref=REF.float())
    exact, _ = full_logits_logps(loaded, batch)
    assert low.logps.dtype == torch.float32 and not torch.equal(low.logps, exact)
    torch.testing.assert_close(low.logps, exact, rtol=2e-2, atol=0.2)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    torch.testing.assert_close(sequence_logps(unwrapped, batch), exact, rtol=1e-5, atol=1e-5)


def test_accelerates_hooks_run():
    """Weights that a device map keeps elsewhere arrive in a hook around the head's forward."""
    import accelerate

    model, batch = make_model("llama"), make_batch()
    expected = sequence_logps(copy.deepcopy(model), batch)
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=False)
    assert model.lm_head.weight.is_meta
    torch.testing.assert_close(sequence_logps(model, batch), expected)


def test_compiled_model():
    model, batch = make_model("llama"), make_batch()
    expected = expect(model, batch)
    out = preference_step(torch.compile(model, backend="eager"), batch, fp.DPO(), ref=REF)
    check(model, batch, out, expected)


def test_token_weights_and_temperature_hold_for_the_reference_too():
    model, ref, batch = make_model("llama"), make_model("qwen2, tied"), make_batch()
    weights = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = preference_step(model, batch | {"token_weights": weights}, fp.DPO(), ref=ref, temperature=0.7)
    scored = (batch["completion_mask"] * batch["attention_mask"])[:, 1:]
    for m, logps in ((model, found.logps), (ref, found.ref_logps)):
        logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1] / 0.7
        tokens = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        torch.testing.assert_close(logps, (tokens * scored * weights[:, 1:]).sum(1), rtol=1e-10, atol=1e-10)


def test_kto():
    model, batch = make_model("llama"), make_batch()
    desirable = torch.tensor([True, False, True, False])
    kl, ref_kl = torch.tensor([-3.0, -4.0], dtype=torch.float64), torch.tensor([-3.5, -4.1], dtype=torch.float64)
    kto = fp.KTO(beta=0.2)
    out = preference_step(model, batch | {"desirable": desirable, "kl_logps": kl, "ref_kl_logps": ref_kl}, kto, ref=REF)
    logps, _ = full_logits_logps(model, batch)
    distance = 0.2 * (logps - REF - 0.3)
    torch.testing.assert_close(
        out.loss, torch.where(desirable, 1 - distance.sigmoid(), 1 - (-distance).sigmoid()).mean()
    )


def test_bad_input():
    model, batch = make_model("llama"), make_batch()
    add_preference_head(model)
    ids = batch["input_ids"]
    with pytest.raises(ValueError, match="labels is given beside preference"):
        model(input_ids=ids, labels=ids, preference=PreferenceRequest(targets_of(batch)))
    with pytest.raises(ValueError, match="batch has neither; it takes labels or completion_mask"):
        preference_step(model, {"input_ids": ids}, "dpo", ref=REF)
    with pytest.raises(ValueError, match="batch has both"):
        preference_step(model, batch | {"labels": ids}, "dpo", ref=REF)
    with pytest.raises(ValueError, match=r"labels is of shape \(4, 3\); it takes \(4, 9\)"):
        preference_step(model, {"input_ids": ids, "labels": ids[:, :3]}, "dpo", ref=REF)
    with pytest.raises(TypeError, match="ref is 'adapter-off'; it takes a model, a tensor"):
        preference_step(model, batch, "dpo", ref="adapter-off")
    with pytest.raises(TypeError, match="betta"):
        preference_step(model, batch, "dpo", ref=REF, betta=0.1)
    with pytest.raises(ValueError, match="even number"):
        preference_step(model, {k: v[:3] for k, v in batch.items()}, "dpo", ref=REF[:3])
    with pytest.raises(TypeError, match="DataParallel; it takes DistributedDataParallel"):
        preference_step(torch.nn.DataParallel(model), batch, "dpo", ref=REF)
    with pytest.raises(ValueError, match="vocabulary of 96 is smaller than the tokenizer's 97"):
        add_preference_head(model, range(97))


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------


def part(batch, ref, rank):
    """Every second pair."""
    pick = [rank, 2 + rank]
    return {name: value[pick] for name, value in batch.items()}, ref[pick]


def wrap(kind):
    model = make_model("qwen2, tied" if ", tied" in kind else "gemma2, softcap", torch.float32)
    model.config.tie_word_embeddings = ", tied" in kind
    if "untied" in kind:
        model.lm_head.weight = torch.nn.Parameter(0.3 * model.lm_head.weight.detach().flip(0))
    if kind.startswith("ddp"):
        return DistributedDataParallel(model)
    if "own unit" in kind:  # the head is added when the model is sharded already
        fully_shard(model.lm_head)
    else:
        add_preference_head(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def work(rank, folder, kinds):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batch = make_batch()
    mine, ref = part(batch, REF.float(), rank)
    for kind in kinds:
        model = wrap(kind)
        out = preference_step(model, mine, fp.DPO(), ref=ref)
        out.loss.backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
        found = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items() if g is not None}
        optimizer.step()
        optimizer.zero_grad()
        again = sequence_logps(model, mine)  # the head's weights are gathered anew
        torch.save({"loss": out.loss.detach(), "grads": found, "logps": again}, f"{folder}/{kind}-{rank}.pt")
        del model, optimizer, out
        gc.collect()
    torch.save(tensor_parallel(), f"{folder}/tp-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def tensor_parallel():
    """A head of which each rank has half the vocabulary; all ranks have the same batch."""
    model = make_model("llama", torch.float32)
    add_preference_head(model)
    mesh = init_device_mesh("cpu", (2,))
    model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="hidden is a DTensor"):
        linear_operands(model.lm_head, distribute_tensor(torch.ones(2, 32), mesh, [Shard(0)]))
    out = preference_step(model, make_batch(), fp.DPO(), ref=REF.float())
    out.loss.backward()
    assert model.lm_head.weight.grad.to_local().shape == (VOCAB // 2, 32)
    grads = {n: p.grad for n, p in model.named_parameters()}
    return out.loss.detach(), {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}


KINDS = ["ddp, tied", "fsdp2, tied", "fsdp2, untied", "fsdp2, untied, own unit"]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes(tmp_path):
    """DDP and FSDP2 (the head in the root's group, or its own): gradients and the next step of one process."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(work, (str(tmp_path), KINDS), nprocs=2)
    batch = make_batch()
    for kind in KINDS:
        model = make_model("qwen2, tied" if ", tied" in kind else "gemma2, softcap", torch.float32)
        if "untied" in kind:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(0.3 * model.lm_head.weight.detach().flip(0))
        loss, _, wanted = expect(model, batch, REF.float())
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= 0.1 * wanted[name]
        after, _ = full_logits_logps(model, batch)
        ranks = [torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in range(2)]
        torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, loss, rtol=1e-5, atol=1e-6)
        for rank, found in enumerate(ranks):
            assert found["grads"].keys() == wanted.keys(), kind
            for name, grad in wanted.items():
                torch.testing.assert_close(found["grads"][name], grad, rtol=1e-4, atol=1e-6, msg=f"{kind} {name}")
            torch.testing.assert_close(found["logps"], after[[rank, 2 + rank]], rtol=1e-4, atol=1e-4, msg=kind)
    loss, _, wanted = expect(make_model("llama", torch.float32), batch, REF.float())
    for rank in range(2):
        found_loss, grads = torch.load(tmp_path / f"tp-{rank}.pt")
        torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=1e-6)
        for name, grad in wanted.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)
