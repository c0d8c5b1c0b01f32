"""A model taken apart: its log-probs against its own logits, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import make, make_config, make_tokenizer

from fastpref.data import Example, collate
from fastpref.errors import UserError
from fastpref.train.model import fingerprint, load_policy, load_tokenizer, take_apart
from fastpref.train.traits import hush

EXAMPLES = [
    Example(0, [1, 20, 21], ([30, 31, 2], [40, 2])),
    Example(1, [1, 22], ([33, 34, 35, 36, 2], [50, 51, 52, 2])),
]
ARCHITECTURES = {
    "llama": make_config(),
    "qwen2, tied": transformers.Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    ),
    "gemma2, softcap": transformers.Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5,
    ),
    "cohere, logit_scale": transformers.CohereConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        logit_scale=0.3,
    ),
    "granite, logits_scaling": transformers.GraniteConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=4.0,
    ),
    "phi, bias": transformers.PhiConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    ),
    "bloom, no position ids": transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2),
    "gpt2": transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    ),
    "opt": transformers.OPTConfig(
        vocab_size=300, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
}


def own_logps(model, sequence, prompt):
    """Of a response, from the model's own logits of the one sequence, without padding, in fp64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0].double()
    logps = logits.log_softmax(-1)
    return sum(float(logps[t - 1, sequence[t]]) for t in range(prompt, len(sequence)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_are_the_models_own(name, world, tmp_path):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name], dtype=torch.float32)
    for p in model.parameters():  # visible biases and norms, and logits worth a soft cap
        p.data += 0.1 * torch.randn_like(p)
    hush(model)
    policy = take_apart(model, make(world, tmp_path), make_tokenizer())
    logps = policy.sequence_logps(collate(EXAMPLES, 0))
    expected = [
        own_logps(model.eval(), e.prompt_ids + e.responses[side], len(e.prompt_ids))
        for side in (0, 1)
        for e in EXAMPLES
    ]
    assert logps.tolist() == pytest.approx(expected, abs=2e-5)


def test_training_mode_has_no_dropout(world, tmp_path):
    config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    hush(model)
    policy = take_apart(model.train(), make(world, tmp_path), make_tokenizer())
    batch = collate(EXAMPLES, 0)
    assert torch.equal(policy.sequence_logps(batch), policy.sequence_logps(batch))


def test_bf16_is_autocast_over_fp32_weights(world, tmp_path):
    tokenizer = make_tokenizer()
    exact, rounded = (load_policy(make(world, tmp_path, bf16=bf16), tokenizer) for bf16 in (False, True))
    assert rounded.head.weight.dtype == torch.float32
    batch = collate(EXAMPLES, 0)
    a, b = exact.sequence_logps(batch), rounded.sequence_logps(batch)
    assert not torch.equal(a, b) and torch.allclose(a, b, rtol=5e-3)
    assert b.dtype == torch.float32


def test_models_that_are_refused(world, tmp_path):
    config, tokenizer = make(world, tmp_path), make_tokenizer()

    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    with pytest.raises(UserError, match="Doubled: trunk and LM head do not give its logits"):
        take_apart(Doubled(make_config()), config, tokenizer)
    with pytest.raises(UserError, match="BertModel: its LM head is none"):
        bert = transformers.BertConfig(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
        )
        take_apart(transformers.BertModel(bert), config, tokenizer)
    with pytest.raises(UserError, match="lora_target_modules: Target modules"):
        load_policy(make(world, tmp_path, use_peft=True, lora_target_modules=["w_q"]), tokenizer)


def test_what_cannot_be_loaded(world, tmp_path):
    tokenizer = make_tokenizer()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty: no tokenizer that loads"):
        load_tokenizer(make(world, tmp_path, model_name_or_path=str(empty)))
    with pytest.raises(UserError, match="config: no causal language model that loads .*safetensors"):
        load_policy(make(world, tmp_path, model_name_or_path=str(world / "config")), tokenizer)
    transformers.Idefics3Config().save_pretrained(tmp_path / "vlm")
    with pytest.raises(UserError, match=r"vlm: no causal .* \(it reads images too; TRL.s DPOTrainer .*patch\(\)"):
        load_policy(make(world, tmp_path, model_name_or_path=str(tmp_path / "vlm")), tokenizer)
    pickled = tmp_path / "pickled"
    make_config().save_pretrained(pickled)
    torch.save(transformers.LlamaForCausalLM(make_config()).state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="only safetensors weights are loaded"):
        load_policy(make(world, tmp_path, model_name_or_path=str(pickled)), tokenizer)
    make_tokenizer(eos=False).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(UserError, match="no_eos: the tokenizer has no EOS"):
        load_tokenizer(make(world, tmp_path, tokenizer_name_or_path=str(tmp_path / "no_eos")))


def test_fingerprint_is_of_the_bits(world, tmp_path):
    config, tokenizer = make(world, tmp_path), make_tokenizer()
    model = load_policy(config, tokenizer).model
    first = fingerprint(model)
    assert fingerprint(load_policy(config, tokenizer).model) == first
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    assert fingerprint(model) != first
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(-9.0))
    assert fingerprint(model) == first
    weight[[0, 1]] = weight[[1, 0]]  # the same values elsewhere
    assert fingerprint(model) != first
