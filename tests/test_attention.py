"""Packed attention with shared prompts: the function in fp64, whole models, and what is refused.

Everything is compared with the plain way: every sequence on its own row, padded on the right, with its own prompt.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from fastpref import attention
from fastpref.attention import (
    NAME,
    AttentionPlan,
    backend,
    own_attention,
    packed_attention,
    replace_attention,
)
from fastpref.data import Example, collate

GROUPS = [(5, (4, 3)), (1, (6, 1)), (7, (2, 9)), (3, (4,)), (2, (1, 5, 3))]  # the last: three responses to one prompt


def sequences_of(groups):
    """[(rows of the prompt and of one response)] for every response, as the plan lays rows out."""
    start, found = 0, []
    for prompt, responses in groups:
        place = start + prompt
        for response in responses:
            found.append([*range(start, start + prompt), *range(place, place + response)])
            place += response
        start = place
    return found


def plain_attention(q, k, v, scale, window=None, softcap=None):
    """[L, heads, D] of one sequence: scores written out, in the dtype given."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(len(q))[:, None], torch.arange(len(q))[None]
    seen = (j <= i) & (j > i - (window or len(q)))
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def scattered(parts, sequences, rows):
    """Sequences' values back into packed rows: of a shared prompt they must agree, and the first is taken."""
    found = [None] * rows
    for part, places in zip(parts, sequences, strict=True):
        for place, value in zip(places, part, strict=True):
            found[place] = value if found[place] is None else found[place]
    return torch.stack(found)


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_plan_of_a_pair():
    plan = AttentionPlan.of([(3, (2, 4)), (2, (1,))])
    assert plan.positions == (0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2)
    assert (plan.q_lengths, plan.k_lengths) == ((5, 4, 3), (5, 7, 3))
    assert plan.cu_seqlens_q.tolist() == [0, 5, 9, 12] and plan.cu_seqlens_k.tolist() == [0, 5, 12, 15]
    assert plan.cu_seqlens_q.dtype == plan.cu_seqlens_k.dtype == torch.int32
    rows = torch.arange(12)
    assert plan.keys(rows).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 11]


def test_plan_gathers_what_each_sequence_sees():
    plan, sequences = AttentionPlan.of(GROUPS), sequences_of(GROUPS)
    rows = torch.arange(plan.num_tokens)
    keys = plan.keys(rows).split(list(plan.k_lengths))
    assert [part.tolist() for part in keys] == sequences
    assert [plan.positions[row] for row in itertools.chain(*sequences)] == [
        i for places in sequences for i in range(len(places))
    ]


def test_without_sharing_nothing_is_gathered():
    plan = AttentionPlan.of([(3, (2,)), (4, (1,))])
    rows = torch.randn(10, 2)
    assert plan.keys(rows) is rows and plan.q_lengths == plan.k_lengths == (5, 5)


def test_bad_plans_and_shapes():
    for groups in ([], [(0, (1,))], [(2, ())], [(2, (1, 0))]):
        with pytest.raises(ValueError, match="groups: got"):
            AttentionPlan.of(groups)
    plan = AttentionPlan.of([(2, (1, 1))])
    q = torch.randn(4, 4, 8)
    with pytest.raises(ValueError, match="got 4, 3 and 3 rows, expected the plan's 4"):
        packed_attention(q, q[:3], q[:3], plan)
    with pytest.raises(ValueError, match="query: got 4 heads, expected a multiple of key's 3"):
        packed_attention(q, q[:, :3], q[:, :3], plan)
    for name, value in (("window", 0), ("softcap", 0.0)):
        with pytest.raises(ValueError, match=f"{name}: got {value}, expected"):
            packed_attention(q, q, q, plan, **{name: value})


# ---- the function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=lambda heads: f"{heads[0]}q{heads[1]}kv")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0), (4, 2.0), (1, None)])
def test_equals_padded_unshared_attention_in_fp64(heads, window, softcap):
    generator = torch.Generator().manual_seed(1)
    plan, sequences = AttentionPlan.of(GROUPS), sequences_of(GROUPS)
    rows, scale = plan.num_tokens, 0.37

    def leaf(count, size=8):
        return torch.randn(rows, count, size, dtype=torch.float64, generator=generator).requires_grad_()

    q, k, v = leaf(heads[0]), leaf(heads[1]), leaf(heads[1], 6)
    cotangent = torch.randn(rows, heads[0], 6, dtype=torch.float64, generator=generator)
    out = packed_attention(q, k, v, plan, scale=scale, window=window, softcap=softcap)
    found = torch.autograd.grad((out * cotangent).sum(), (q, k, v))

    parts = [plain_attention(q[p], k[p], v[p], scale, window, softcap) for p in sequences]
    expected = scattered(parts, sequences, rows)
    gradients = torch.autograd.grad((expected * cotangent).sum(), (q, k, v))
    assert float((out - expected).detach().abs().max()) < 1e-12
    for a, b in zip(found, gradients, strict=True):
        assert float((a - b).abs().max()) < 1e-12
    for part, places in zip(parts, sequences, strict=True):  # the prompt's rows are every sequence's own
        assert float((part - out[places]).detach().abs().max()) < 1e-12


def test_default_scale_and_dtypes():
    plan = AttentionPlan.of(GROUPS)
    q = torch.randn(plan.num_tokens, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(packed_attention(q, q, q, plan), packed_attention(q, q, q, plan, scale=0.25))
    exact = packed_attention(q, q, q, plan)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        for softcap in (None, 50.0):
            found = packed_attention(*(q.to(dtype),) * 3, plan, softcap=softcap)
            assert found.dtype == dtype
            assert float((found - exact).abs().max()) < tolerance + (0.2 if softcap else 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # rotary embeddings leave queries and keys in fp32
        assert packed_attention(q.float(), q.float(), q.bfloat16(), plan).dtype == torch.bfloat16


def test_gradients_are_the_same_bits_every_time():
    plan = AttentionPlan.of(GROUPS * 3)
    q = torch.randn(plan.num_tokens, 2, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    first, second = (torch.autograd.grad(packed_attention(q, q, q, plan).square().sum(), q)[0] for _ in range(2))
    assert torch.equal(first, second)


def kernel_like(q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap=0.0):
    """What a variable-length kernel computes, from offsets alone: bottom-right causal, `window` = (left, right)."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and v.shape[-1] == q.shape[-1] and window[1] in (0, -1)
    lengths = [cu.diff().tolist() for cu in (cu_q, cu_k)]
    assert (max(lengths[0]), max(lengths[1])) == (max_q, max_k)
    out = []
    for qs, ks, vs in zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True):
        left = None if window[0] == -1 else window[0] + 1
        padded = torch.cat((qs.new_zeros(len(ks) - len(qs), *qs.shape[1:]), qs))
        out.append(plain_attention(padded, ks, vs, scale, left, softcap)[len(ks) - len(qs) :])
    return torch.cat(out)


@pytest.mark.parametrize("takes_gqa", [True, False])
def test_the_kernels_get_what_they_ask_for(monkeypatch, takes_gqa):
    """No GPU here: a stand-in with the kernels' signatures, which knows nothing but what it is handed."""
    calls = []

    def flash_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                   causal=False, window_size=(-1, -1), softcap=0.0):
        assert causal and dropout_p == 0.0
        calls.append("flash_attn")
        offsets = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return kernel_like(q, k, v, *offsets, softmax_scale, window_size, softcap)

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert window_size[1] == 0 and (enable_gqa or query.shape[1] == key.shape[1])
        calls.append("varlen_attn")
        return kernel_like(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    monkeypatch.setattr(attention, "_flash_attn", lambda: flash_attn)
    monkeypatch.setattr(attention, "_varlen_attn", lambda: (varlen_attn, takes_gqa))
    plan = AttentionPlan.of(GROUPS)
    generator = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(plan.num_tokens, heads, size, dtype=torch.float64, generator=generator)
        for heads, size in ((4, 8), (2, 8), (2, 6))
    )
    for window, softcap in ((None, None), (3, None), (None, 5.0), (99, None)):
        expected = packed_attention(q, k, v, plan, window=window, softcap=softcap)
        for name in ("flash_attn", "varlen_attn"):
            if name == "varlen_attn" and softcap:
                continue
            monkeypatch.setattr(attention, "backend", lambda *_, name=name: name)
            found = packed_attention(q, k, v, plan, window=window, softcap=softcap)
            assert found.shape == expected.shape and float((found - expected).abs().max()) < 1e-12
            assert calls[-1] == name
        monkeypatch.setattr(attention, "backend", lambda *_: "torch")


def test_backends(monkeypatch):
    gpu = torch.device("cuda")
    assert backend(torch.device("cpu"), torch.bfloat16) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    monkeypatch.setattr(attention, "_varlen_attn", lambda: (print, True))
    assert backend(gpu, torch.bfloat16) == "varlen_attn"
    assert backend(gpu, torch.float32) == backend(gpu, torch.bfloat16, head_dim=288) == "torch"
    assert backend(gpu, torch.bfloat16, softcap=50.0) == backend(gpu, torch.bfloat16, head_dim=20) == "torch"
    assert backend(gpu, torch.bfloat16, head_dim=256) == "varlen_attn"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert backend(gpu, torch.bfloat16, head_dim=256) == "torch"
    monkeypatch.setattr(attention, "_flash_attn", lambda: print)
    assert backend(gpu, torch.bfloat16, softcap=50.0) == "flash_attn"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend(gpu, torch.float16) == "torch"


def test_kernels_that_are_too_old_are_left_alone(monkeypatch):
    flash, varlen = types.ModuleType("flash_attn"), types.ModuleType("torch.nn.attention.varlen")
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", varlen)
    flash.flash_attn_varlen_func = print
    for version, taken in (("2.5.9.post1", False), ("2.6.0", True), ("2.10.0+cu13", True), ("1.0.9", False)):
        flash.__version__ = version
        assert (attention._flash_attn.__wrapped__() is print) == taken
    varlen.varlen_attn = lambda q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False: q  # torch 2.10
    assert attention._varlen_attn.__wrapped__() is None
    varlen.varlen_attn = lambda q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1): q  # 2.11
    assert attention._varlen_attn.__wrapped__() == (varlen.varlen_attn, False)
    for name in ("flash_attn", "torch.nn.attention.varlen"):  # not installed; torch 2.9
        monkeypatch.setitem(sys.modules, name, None)
    assert attention._flash_attn.__wrapped__() is attention._varlen_attn.__wrapped__() is None


# ---- whole models ----------------------------------------------------------------------------------------------------

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64)
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**TINY),
    "qwen2, window in its second layer": lambda: transformers.Qwen2Config(
        **TINY, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "mistral, window": lambda: transformers.MistralConfig(**TINY, sliding_window=4),
    "gemma2, softcap, windows in turn": lambda: transformers.Gemma2Config(
        **TINY, head_dim=8, sliding_window=4, attn_logit_softcapping=0.5, final_logit_softcapping=None
    ),
}
PAIRS = [
    Example(0, [1, 20, 21, 22, 23], ([30, 31, 2], [40, 41, 42, 43, 2])),
    Example(1, [1, 24], ([33, 34, 35, 36, 2], [2])),
    Example(2, [1, 25, 26, 27, 28, 29, 30], ([50, 51, 2], [52, 53, 54, 2])),
    Example(3, [1, 20, 21, 22, 23], ([60, 2], [61, 62, 2])),  # the first one's prompt: four responses share it
]


def make_model(config, dtype=torch.float64):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():  # attention worth the name: the default initialisation attends evenly
        p.data += 0.1 * torch.randn_like(p)
    return model.to(dtype).train()


def weighted_logps(model, batch) -> Tensor:
    """A loss with another weight for every scored token, from full logits."""
    extra = {}  # padding is on the right, where nothing that is scored attends to it
    if batch.attention_plan is not None:
        extra = {"position_ids": batch.position_ids, "attention_plan": batch.attention_plan}
    hidden = model.model(input_ids=batch.input_ids, use_cache=False, **extra).last_hidden_state
    rows = hidden.reshape(-1, hidden.shape[-1])[batch.score_rows]
    losses = F.cross_entropy(model.lm_head(rows), batch.targets, reduction="none")
    return (losses * torch.linspace(-1, 1, len(losses), dtype=losses.dtype)).sum()


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = weighted_logps(model, batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_padded_losses_and_gradients(name, checkpointing):
    model = make_model(MODELS[name]())
    expected, gradients = loss_and_gradients(model, collate(PAIRS, 0))
    own = replace_attention(model, model.model)
    assert own in ("sdpa", "eager") and model.config._attn_implementation == NAME and model.training
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for layout, tokens in (("shared", 40), ("packed", 64)):
        batch = collate(PAIRS, 0, layout=layout)
        assert batch.input_ids.shape == (1, tokens)
        loss, found = loss_and_gradients(model, batch)
        assert loss == pytest.approx(expected, rel=1e-6)
        for key, gradient in gradients.items():
            off = float((found[key] - gradient).norm() / gradient.norm().clamp(min=1e-3))
            assert off < 1e-6, (layout, key, off)
    assert "fastpref" not in model.config.to_json_string()


def test_three_responses_to_one_prompt():
    model = make_model(MODELS["llama"]())
    prompt, responses = [1, 20, 21, 22], ([30, 31, 2], [40, 2], [50, 51, 52, 2])
    examples = [Example(i, prompt, (r,)) for i, r in enumerate(responses)]
    padded = collate(examples, 0, "sft")
    expected, gradients = loss_and_gradients(model, padded)
    replace_attention(model, model.model)
    batch = collate(examples, 0, "sft", layout="shared")
    assert batch.input_ids.tolist() == [[*prompt, *responses[0], *responses[1], *responses[2]]]
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected, rel=1e-6)
    for key, gradient in gradients.items():
        assert float((found[key] - gradient).norm()) < 1e-6 * float(gradient.norm())


def test_bf16_stays_within_the_noise_of_the_padded_path():
    exact, gradients = loss_and_gradients(make_model(MODELS["llama"]()), collate(PAIRS, 0))
    model = make_model(MODELS["llama"](), torch.bfloat16)

    def off(batch):
        _, found = loss_and_gradients(model, batch)
        squares = [(found[k].double() - g).square().sum() / g.square().sum() for k, g in gradients.items()]
        return float(torch.stack(squares).mean().sqrt())

    padded = off(collate(PAIRS, 0))
    replace_attention(model, model.model)
    assert off(collate(PAIRS, 0, layout="shared")) < 1.5 * padded


# ---- what is refused -------------------------------------------------------------------------------------------------


def refusal(config):
    model = make_model(config, torch.float32).eval()
    own = model.config._attn_implementation
    with pytest.raises(ValueError) as error:
        replace_attention(model, model.base_model)
    assert "\n" not in str(error.value) and str(error.value).startswith(type(model).__name__)
    assert model.config._attn_implementation == own and not model.training
    return str(error.value)


def test_models_whose_attention_cannot_be_replaced():
    bloom = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2)
    assert "does not come from AttentionInterface" in refusal(bloom)
    mamba = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)
    refusal(mamba)
    lfm = transformers.Lfm2Config(**TINY, layer_types=["conv", "full_attention"])
    assert "has conv layers; packed batches take full and sliding attention" in refusal(lfm)
    chunks = transformers.Llama4TextConfig(
        **TINY, head_dim=8, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=48
    )
    assert "chunked_attention layers" in refusal(chunks)
    sinks = transformers.GptOssConfig(**TINY, head_dim=8, num_local_experts=4, layer_types=["full_attention"] * 2)
    assert "its attention takes s_aux" in refusal(sinks)
    llama = transformers.LlamaConfig(**TINY, attention_dropout=0.5)
    model = make_model(llama, torch.float32)
    replace_attention(model, model.model)
    with pytest.raises(ValueError, match="LlamaAttention: has attention dropout 0.5; packed batches take 0"):
        weighted_logps(model, collate(PAIRS, 0, layout="shared"))


def test_a_window_that_is_only_in_the_mask_is_refused():
    """Its short proof would not see it: eleven tokens fit the window."""
    config = MODELS["qwen2, window in its second layer"]()
    config.sliding_window = 1000
    model = make_model(config, torch.float32)
    model.model.layers[1].self_attn.sliding_window = None
    with pytest.raises(ValueError, match="attends within a window that it does not tell its attention function"):
        replace_attention(model, model.model)


def test_layers_that_look_across_sequences_are_found(monkeypatch):
    """No name tells that this model mixes neighbouring rows; the proof on a few tokens does."""
    model = make_model(MODELS["llama"](), torch.float32)
    own = model.model.layers[1].mlp.forward
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: own(x + 0.01 * x.roll(1, dims=1)))
    with pytest.raises(ValueError, match="packed sequences give other hidden rows"):
        replace_attention(model, model.model)
    assert model.config._attn_implementation != NAME


def test_a_call_without_plan_is_refused_and_generation_works():
    model = make_model(MODELS["llama"](), torch.float32).eval()
    prompt = torch.tensor([[1, 20, 21]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=prompt, **options)
    own = replace_attention(model, model.model)
    with pytest.raises(ValueError, match="LlamaAttention: attention 'fastpref' takes packed batches, but no"):
        model(input_ids=prompt)
    with own_attention(model, own):
        assert torch.equal(model.generate(input_ids=prompt, **options), expected)
    assert model.config._attn_implementation == NAME


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (None, 20.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_are_as_near_to_fp64_as_torchs_own(monkeypatch, dtype, window, softcap):
    plan = AttentionPlan.of([(300, (200, 513)), (1, (64, 1)), (129, (7, 250, 31))]).to(torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)

    def leaf(heads):
        shape = plan.num_tokens, heads, 64
        return torch.randn(shape, dtype=dtype, device="cuda", generator=generator).requires_grad_()

    q, k, v, cotangent = leaf(8), leaf(2), leaf(2), leaf(8).detach()

    def run(*inputs):
        out = packed_attention(*inputs, plan, window=window, softcap=softcap)
        return out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))

    exact = run(*(x.detach().double().requires_grad_() for x in (q, k, v)))
    kernel = backend(q.device, dtype, 64, softcap)
    assert kernel != "torch" or (softcap and attention._flash_attn() is None)
    run(q, k, v)
    torch.cuda.set_sync_debug_mode("error")  # nothing waits for the device
    try:
        found = run(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(attention, "backend", lambda *_: "torch")
    plain = run(q, k, v)
    for a, b, e in zip(found, plain, exact, strict=True):
        assert float((a.double() - e).norm()) < 1.5 * float((b.double() - e).norm()) + 1e-3 * float(e.norm())


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_runs_and_knows_its_ceiling(tmp_path):
    from bench.attention import main

    quick = ["--quick", "--device", "cpu", "--rounds", "1", "--pairs", "3", "--output", str(tmp_path)]
    assert main([*quick, "--ratio", "1", "4"]) == 0
    (path,) = tmp_path.glob("*-attention.json")
    rows = json.loads(path.read_text())
    assert [row["impl"] for row in rows] == ["padded", "packed", "fastpref"] * 2
    assert all(row["status"] == "ok" and row["pairs_per_s"] > 0 for row in rows)
    assert max(row["dw_rel_err"] for row in rows) < 1e-5
    for r, (padded, packed, shared) in ((1, rows[:3]), (4, rows[3:])):
        assert padded["tokens"] > packed["tokens"] > shared["tokens"]
        assert shared["ceiling"] == pytest.approx((2 * r + 2) / (r + 2), rel=0.03)  # prompts are whole tokens
    assert main([*quick, "--ratio", "4"]) == 0 and json.loads(path.read_text()) == rows  # nothing left to do
