"""Models taken apart: what is found gives their own logits, also with PEFT on the head; what cannot be is refused."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

from fastpref.trunk import LMHead, _settled, check_vocabulary, logit_maths, take_apart, unwrap
from tests.families import CONFIGS, VOCAB, make_batch, make_model


def logits_of(parts, ids):
    hidden, weight, bias = parts.head.operands(parts.trunk(input_ids=ids, use_cache=False).last_hidden_state)
    z = hidden @ weight.T * parts.head.logit_scale
    if bias is not None:
        z = z + parts.head.logit_scale * bias
    return z if parts.head.softcap is None else parts.head.softcap * torch.tanh(z / parts.head.softcap)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_give_the_models_own_logits(name):
    model = make_model(name).eval()
    ids = make_batch()["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits_of(take_apart(model), ids), expected, rtol=1e-5, atol=1e-5)


def test_what_the_configurations_say():
    maths = {name: logit_maths(make_model(name)) for name in CONFIGS}
    assert maths["llama"] == (None, 1.0)
    assert maths["gemma2, softcap"] == (1.5, 1.0)
    assert maths["granite, logits_scaling"] == (None, 0.25)
    assert maths["cohere, logit_scale"] == (None, 0.3)
    assert maths["falcon_h1, lm_head_multiplier"] == (None, 0.5)
    if "hyperclovax, logits_scaling multiplies" in CONFIGS:
        assert maths["hyperclovax, logits_scaling multiplies"] == (None, 0.25)
    if "minicpm3, scaled before the head" in CONFIGS:  # only the trunk's hidden states still lack it
        assert maths["minicpm3, scaled before the head"] == (None, 1.0)
        assert take_apart(make_model("minicpm3, scaled before the head")).head.logit_scale == 0.25


def test_taking_apart_leaves_a_model_as_it_was():
    model = make_model("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    take_apart(model)
    logit_maths(model)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not model.lm_head._forward_pre_hooks and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "name, bias", [("llama", False), ("qwen2, tied", False), ("phi, bias", False), ("phi, bias", True)]
)
def test_lora_on_the_head(name, bias):
    """The product of `operands` and the gradients of A and B are those of PEFT's own forward."""
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["lm_head", "q_proj"], lora_bias=bias)
    model = peft.get_peft_model(make_model(name), config).double()
    head = take_apart(model).head
    module = head.module
    adapter = {"A": module.lora_A.default.weight, "B": module.lora_B.default.weight}
    if bias:
        adapter["B's bias"] = module.lora_B.default.bias
    for p in adapter.values():
        nn.init.normal_(p)
    hidden = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    x, w, b = head.operands(hidden)
    assert w.shape == (VOCAB, 32 + 4)
    z, expected = x @ w.T + (0 if b is None else b), module(hidden)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(z)
    ours = torch.autograd.grad(z, (hidden, *adapter.values()), upstream)
    theirs = torch.autograd.grad(expected, (hidden, *adapter.values()), upstream)
    for got, want in zip(ours, theirs):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    with model.disable_adapter():
        x, w, b = head.operands(hidden)
        assert x is hidden and w.shape == (VOCAB, 32)
        torch.testing.assert_close(x @ w.T + (0 if b is None else b), module(hidden), rtol=1e-12, atol=1e-12)


def test_dropout_of_lora_on_the_head():
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5))
    head = take_apart(model.double()).head
    nn.init.normal_(head.module.lora_B.default.weight)
    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    for training in (True, False):
        model.train(training)
        torch.manual_seed(0)
        x, w, _ = head.operands(hidden)
        torch.manual_seed(0)
        torch.testing.assert_close(x @ w.T, head.module(hidden), rtol=1e-12, atol=1e-12)


def test_modules_to_save_and_merged_adapters():
    model = peft.get_peft_model(
        make_model("llama"), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    head = take_apart(model).head
    nn.init.normal_(head.module.modules_to_save.default.weight)
    assert head.weight is head.module.modules_to_save.default.weight
    with model.disable_adapter():
        assert head.weight is head.module.original_module.weight
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=4, target_modules=["lm_head"])).double()
    nn.init.normal_(model.lm_head.lora_B.default.weight)
    before = model(input_ids=make_batch()["input_ids"]).logits
    model.merge_adapter()
    torch.testing.assert_close(logits_of(take_apart(model), make_batch()["input_ids"]), before, rtol=1e-9, atol=1e-9)


def test_wrappers_come_off():
    model = make_model("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    compiled = torch.compile(adapted, backend="eager")
    assert unwrap(compiled) is unwrap(adapted) is unwrap(model) is model


class Doubled(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


class Cut(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits[..., :-6]
        return out


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_models_that_are_refused():
    llama = CONFIGS["llama"]
    for find in (take_apart, logit_maths):
        with pytest.raises(ValueError, match=r"Doubled: .* do not give its logits .*looked for logit_scale, .*softcap"):
            find(Doubled(llama))
        with pytest.raises(ValueError, match="Cut: its LM head gives 96 logits a token, of which it returns 90"):
            find(Cut(llama))
    with pytest.raises(ValueError, match=r"LlamaModel: its LM head is none \(looked for .get_output_embeddings"):
        take_apart(transformers.LlamaModel(llama))
    with pytest.raises(ValueError, match="Linear: not a transformers model"):
        take_apart(nn.Linear(2, 2))
    model = make_model("llama")
    model.lm_head = Quantised(32, VOCAB, dtype=torch.float64)
    with pytest.raises(ValueError, match="its LM head is tests?.*Quantised, the fused head takes a torch.nn.Linear"):
        take_apart(model)
    with pytest.raises(ValueError, match="vocabulary of 96 is smaller than the tokenizer's 97"):
        check_vocabulary(model.__class__(llama), range(97))
    dora = peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ValueError, match="DoRA.*takes plain LoRA: leave the LM head out of target_modules"):
        take_apart(dora)
    with pytest.raises(ValueError, match="leave the LM head out of target_modules"):
        take_apart(peft.get_peft_model(make_model("llama"), peft.LoHaConfig(target_modules=["lm_head"])))


def test_heads_that_are_not_whole():
    head = LMHead(nn.Linear(4, 8))
    head.module.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"weight is an empty shard \(0,\): call the wrapped model"):
        head.operands(torch.ones(1, 4))
    head.module.weight.ds_id = 3
    with pytest.raises(ValueError, match="partitioned by DeepSpeed ZeRO-3; use FSDP2"):
        head.operands(torch.ones(1, 4))


def test_without_weights_there_is_no_proof():
    with torch.device("meta"):
        plain, scaled = (
            transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
            for name in ("llama", "granite, logits_scaling")
        )
    assert logit_maths(plain) == (None, 1.0) and take_apart(plain).head.logit_scale == 1.0
    with pytest.raises(ValueError, match=r"logit scale of 0.25 or 4 or 1, .*take it apart before it is sharded"):
        logit_maths(scaled)


def test_a_head_of_zeros_proves_nothing():
    model = make_model("granite, logits_scaling")
    nn.init.zeros_(model.get_output_embeddings().weight)
    with pytest.raises(ValueError, match="may mean a logit scale"):
        take_apart(model)


def test_a_token_that_goes_to_other_experts_is_no_proof_in_16_bit():
    """ERNIE 4.5's mixture in bf16 was refused, relative difference 0.09: of a longer row one token of 12."""
    z = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    other = z.clone()
    other[0, 3] += 1
    assert _settled(None, z, other, [(None, 1.0)]) == (None, 1.0)
    for wrong, of in ((other.float(), z.float()), (2 * z, z)):
        with pytest.raises(ValueError, match="do not give its logits"):
            _settled(None, of, wrong, [(None, 1.0)])


def test_16_bit_models_pass_and_wrong_scales_do_not():
    model = make_model("cohere, logit_scale", torch.bfloat16)
    assert take_apart(model).head.logit_scale == 0.3
    model.config.logit_scale = 0.5  # the module keeps its own 0.3
    with pytest.raises(ValueError, match="do not give its logits"):
        take_apart(model)
