"""What models bring along: noise, positions, rotary factors that follow a batch, routers, no attention at all."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers
from tiny import make, make_pairs, make_tokenizer, read_metrics, write_rows

from fastpref import arguments
from fastpref.data import Example, collate
from fastpref.errors import UserError
from fastpref.losses import DPO
from fastpref.train.dry_run import dry_run
from fastpref.train.loop import train
from fastpref.train.micro_batches import totals_of
from fastpref.train.model import load_policy, save_model
from fastpref.train.traits import has_table, hush, noise_of, positions_of
from fastpref.trunk import unwrap

SIZES = dict(vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=128)
EXPERTS = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0,
            "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


def folder_of(config, path):
    """A pretrained model of that configuration, with visible biases, and a tokenizer."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def run_lines(config, capsys):
    summary = train(config)
    return summary, capsys.readouterr().out


# ---- noise -----------------------------------------------------------------------------------------------------------

NOISY = {
    "falcon": transformers.FalconConfig(
        vocab_size=261, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_dropout=0.3,
        attention_dropout=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "gpt2": transformers.GPT2Config(vocab_size=261, n_positions=128, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.3,
                                    embd_pdrop=0.3, resid_pdrop=0.3),
    "opt": transformers.OPTConfig(
        vocab_size=261, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, layerdrop=0.5,
        max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.3, attention_dropout=0.3, pad_token_id=0),
    "bloom": transformers.BloomConfig(vocab_size=261, hidden_size=32, n_layer=2, n_head=2, hidden_dropout=0.3,
                                      attention_dropout=0.3),
    "llama": transformers.LlamaConfig(**SIZES, attention_dropout=0.3),
    "phimoe": transformers.PhimoeConfig(**EXPERTS, router_jitter_noise=0.3, input_jitter_noise=0.3),
    "mixtral": transformers.MixtralConfig(**EXPERTS, router_jitter_noise=0.3, attention_dropout=0.3),
    "biogpt": transformers.BioGptConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
                                        hidden_dropout_prob=0.3, activation_dropout=0.3, layerdrop=0.4),
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=261, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=128, resid_dropout=0.3, embed_dropout=0.3, attention_dropout=0.3),
    "stablelm": transformers.StableLmConfig(**SIZES, hidden_dropout=0.3, attention_dropout=0.3),
}


@pytest.mark.parametrize("name", NOISY)
def test_train_mode_is_evaluation_mode_once_hushed(name, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(NOISY[name]), dtype=torch.float32)
    ids = torch.randint(3, 261, (2, 20))
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, use_cache=False).logits
        noisy = model.train()(input_ids=ids, use_cache=False).logits
        assert not torch.allclose(noisy, expected, atol=1e-4)
        hush(model)
        assert not list(noise_of(model))
        assert torch.equal(model.train()(input_ids=ids, use_cache=False).logits, expected)
        assert torch.equal(model.eval()(input_ids=ids, use_cache=False).logits, expected)


def test_falcon_trains_without_its_dropout_and_keeps_it_in_its_config(world, tmp_path, capsys):
    source = folder_of(NOISY["falcon"], tmp_path / "falcon")
    options = {"model_name_or_path": str(source), "learning_rate": 0.0, "eval_dataset": None, "logging_steps": 1}
    _, said = run_lines(make(world, tmp_path / "quiet", **options), capsys)
    losses = [row["loss"] for row in read_metrics(tmp_path / "quiet")]
    assert losses == pytest.approx([0.693147] * 4, abs=1e-6)
    assert "the noise floor" in said
    saved = json.loads((tmp_path / "quiet" / "model" / "config.json").read_text())
    assert saved["hidden_dropout"] == saved["attention_dropout"] == 0.3
    _, said = run_lines(make(world, tmp_path / "noisy", disable_dropout=False, **options), capsys)
    assert "the noise that is asked for (attention_dropout 0.3, hidden_dropout 0.3" in said
    assert max(row["loss"] for row in read_metrics(tmp_path / "noisy")) > 0.7


def test_adapters_have_dropout_only_without_a_reference(world, tmp_path):
    def rate(**options):
        config = make(world, tmp_path, use_peft=True, **options)
        model = load_policy(config, make_tokenizer()).model
        return model.peft_config["default"].lora_dropout

    assert rate() == 0 and rate(loss="sft") == 0.05 and rate(lora_dropout=0.2) == 0.2
    assert rate(stages=[{"loss": "sft"}, {"loss": "dpo"}]) == 0


def test_kept_attention_dropout_and_packing_are_refused_together(world, tmp_path):
    source = str(folder_of(NOISY["llama"], tmp_path / "llama"))
    with pytest.raises(UserError, match="attention_dropout 0.3.*packed batches have none.*packing=false"):
        dry_run(make(world, tmp_path / "a", model_name_or_path=source, disable_dropout=False, packing=True))
    found = dry_run(make(world, tmp_path / "a", model_name_or_path=source, disable_dropout=False, packing=None))
    assert found["layout"] == "padded"


# ---- positions -------------------------------------------------------------------------------------------------------

TABLES = {
    "gpt2": transformers.GPT2Config(n_positions=40, n_embd=32, n_layer=1, n_head=2, vocab_size=261),
    "opt": transformers.OPTConfig(vocab_size=261, hidden_size=32, ffn_dim=48, num_hidden_layers=1,
                                  word_embed_proj_dim=32, num_attention_heads=2, max_position_embeddings=40),
    "gpt_neo": transformers.GPTNeoConfig(vocab_size=261, hidden_size=32, num_layers=1, num_heads=2,
                                         attention_types=[[["global"], 1]], max_position_embeddings=40),
    "gpt_bigcode": transformers.GPTBigCodeConfig(n_positions=40, n_embd=32, n_layer=1, n_head=2, vocab_size=261),
    "gptj": transformers.GPTJConfig(n_positions=40, n_embd=32, n_layer=1, n_head=2, vocab_size=261, rotary_dim=8),
    "biogpt": transformers.BioGptConfig(vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                        num_attention_heads=2, max_position_embeddings=40),
    "ctrl": transformers.CTRLConfig(vocab_size=261, n_positions=40, n_embd=32, dff=48, n_layer=1, n_head=2),
    "mpt": transformers.MptConfig(vocab_size=261, d_model=32, n_heads=2, n_layers=1, max_seq_len=40),
}
SIZES_40 = SIZES | {"max_position_embeddings": 40, "num_hidden_layers": 1}
NO_TABLES = {
    "llama": transformers.LlamaConfig(**SIZES_40),
    "hidden is the number of positions": transformers.LlamaConfig(**SIZES_40 | {"hidden_size": 40}),
    "phi": transformers.PhiConfig(**SIZES_40),
    "bloom": transformers.BloomConfig(vocab_size=261, hidden_size=32, n_layer=1, n_head=2),
    "falcon alibi": transformers.FalconConfig(vocab_size=261, hidden_size=32, num_hidden_layers=1, alibi=True,
                                              num_attention_heads=2, max_position_embeddings=40),
    "xglm": transformers.XGLMConfig(vocab_size=261, d_model=32, ffn_dim=48, num_layers=1, attention_heads=2,
                                    max_position_embeddings=40),
    "mamba": transformers.MambaConfig(vocab_size=261, hidden_size=32, num_hidden_layers=1, state_size=4),
}


@pytest.mark.parametrize("name", [*TABLES, *NO_TABLES])
def test_a_table_of_positions_is_where_longer_rows_fail(name):
    config = copy.deepcopy((TABLES | NO_TABLES)[name])
    limit = positions_of(config)
    with torch.device("meta"):
        found = bool(limit) and has_table(transformers.AutoModelForCausalLM.from_config(config), limit)
    assert found == (name in TABLES) and limit == (None if name in ("bloom", "mamba") else 40)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model(input_ids=torch.full((1, 40), 5), use_cache=False)
        if found:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, 41), 5), use_cache=False)
        else:
            model(input_ids=torch.full((1, 60), 5), use_cache=False)


def test_too_few_positions_are_found_before_weights_are_read(world, tmp_path, capsys, monkeypatch):
    source = tmp_path / "gpt2"
    TABLES["gpt2"].save_pretrained(source)  # no weights: whoever loads them fails otherwise
    make_tokenizer().save_pretrained(source)
    long = str(write_rows(tmp_path / "long.jsonl", [{"prompt": "p" * 30, "chosen": "c" * 9, "rejected": "r" * 9}] * 4))
    for begin in (train, dry_run):
        with pytest.raises(UserError, match="gpt2: has 40 positions, and the longest record of stage 'dpo' 41 tokens, "
                                            "for which there is none: set max_length=40"):
            begin(make(world, tmp_path / "a", model_name_or_path=str(source), train_dataset=long, eval_dataset=None))
    with pytest.raises(UserError, match="the longest prompt with eval_max_new_tokens=33 41 tokens.*lower it"):
        dry_run(make(world, tmp_path / "a", model_name_or_path=str(source), eval_generate=True, eval_max_new_tokens=33))
    with pytest.raises(UserError, match="the longest prompt with sample_max_new_tokens=33 41 tokens.*lower it"):
        dry_run(make(world, tmp_path / "a", model_name_or_path=str(source), sample_steps=2, sample_max_new_tokens=33))
    NO_TABLES["llama"].save_pretrained(source)
    dry_run(make(world, tmp_path / "a", model_name_or_path=str(source), train_dataset=long, eval_dataset=None))
    assert "has 40 positions, and the longest record of stage 'dpo' 41 tokens, beyond what it was trained on" in (
        capsys.readouterr().out)
    dry_run(make(world, tmp_path / "a", model_name_or_path=str(source), eval_dataset=None))
    assert "max_length=64 is more than its 40 positions; no record here is so long" in capsys.readouterr().out
    scaled = transformers.LlamaConfig(**SIZES_40, rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "rope_theta": 1e4})
    assert positions_of(scaled) == 160


# ---- rotary factors --------------------------------------------------------------------------------------------------

SHORT = {"original_max_position_embeddings": 24}
SCALES = {"short_mscale": 1.1, "long_mscale": 1.3}
ROPES = {
    "longrope": (transformers.Phi3Config(**SIZES, **SHORT, rope_parameters=LONGROPE), "LongRoPE with its long factors"),
    "phimoe": (transformers.PhimoeConfig(**EXPERTS, **SHORT, rope_parameters=LONGROPE | SCALES),
               "LongRoPE with its long factors"),
    "dynamic": (transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 24}, rope_parameters={
        "rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}), "dynamic NTK as for 64 positions"),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_factors_are_one_choice_a_run(name, world, tmp_path, capsys):
    config, says = ROPES[name]
    source = folder_of(config, tmp_path / "model")
    rows = make_pairs(6, seed=1)  # short ones; and one longer than the model was first trained on
    rows.append({"prompt": "x" * 30, "chosen": " yes", "rejected": " no"})
    data = str(write_rows(tmp_path / "data.jsonl", rows))
    options = {"model_name_or_path": str(source), "train_dataset": data, "eval_dataset": data, "learning_rate": 0.0,
               "per_device_train_batch_size": 1, "per_device_eval_batch_size": 7, "logging_steps": 1, "max_steps": 7}
    _, said = run_lines(make(world, tmp_path / "run", **options), capsys)
    assert says in said
    for row in read_metrics(tmp_path / "run"):
        assert abs(row["rewards/margins"]) < 1e-5
    # The value: transformers' own angles for a row of max_length, and for a short one if that is the choice.
    policy = load_policy(make(world, tmp_path / "run", **options), make_tokenizer())
    short = load_policy(make(world, tmp_path / "run", **options | {"max_length": 20}), make_tokenizer())
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.randint(3, 261, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        long_rows = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :12]
        fresh = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
        short_rows = fresh.base_model(input_ids=ids[:, :12], use_cache=False).last_hidden_state
        found = policy.trunk(input_ids=ids[:, :12], use_cache=False).last_hidden_state
        assert torch.allclose(found, long_rows, atol=1e-6)
        found = short.trunk(input_ids=ids, use_cache=False).last_hidden_state[:, :12]
        assert torch.allclose(found, short_rows, atol=1e-6)
    assert not torch.allclose(long_rows, short_rows, atol=1e-3)


def test_stages_share_one_choice_of_rotary_factors(world, tmp_path):
    source = folder_of(ROPES["longrope"][0], tmp_path / "model")
    with pytest.raises(UserError, match="its rotary factors depend on max_length, which differs between stages"):
        dry_run(make(world, tmp_path / "a", model_name_or_path=str(source),
                     stages=[{"loss": "sft"}, {"loss": "dpo", "max_length": 32}]))


# ---- mixtures of experts ---------------------------------------------------------------------------------------------

ROUTED = {
    "mixtral": transformers.MixtralConfig(**EXPERTS, output_router_logits=True, router_aux_loss_coef=0.1),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24,
        output_router_logits=True, router_aux_loss_coef=0.1, decoder_sparse_step=1),
}
EXAMPLES = [Example(0, [1, 20, 21], ([30, 31, 2], [40, 2])), Example(1, [1, 22], ([33, 2], [41, 42, 43, 2]))]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ROUTED)
def test_the_routers_loss_is_the_models_own(name, layout, checkpointing, world, tmp_path):
    source = folder_of(ROUTED[name], tmp_path / "model")
    options = {"model_name_or_path": str(source), "packing": layout == "packed", "prefix_sharing": False}
    policy = load_policy(make(world, tmp_path, gradient_checkpointing=checkpointing, **options), make_tokenizer())
    assert policy.layout == layout and "router loss times 0.1 in every loss" in policy.notes
    policy.model.train()
    ref = torch.tensor([-5.0, -4.0, -6.0, -9.0])
    batch = collate(EXAMPLES, 0, layout=layout)
    out = policy.compute_loss(batch, DPO(), ref_logps=ref)
    out.loss.backward()
    model = transformers.AutoModelForCausalLM.from_pretrained(source).train()
    plain = collate(EXAMPLES, 0)
    theirs = model(input_ids=plain.input_ids, attention_mask=plain.attention_mask, use_cache=False)
    logps = theirs.logits.log_softmax(-1).flatten(0, 1)[plain.score_rows].gather(1, plain.targets[:, None])[:, 0]
    sums = torch.stack([part.sum() for part in logps.split(torch.tensor(plain.cu_seqlens).diff().tolist())])
    chosen, rejected = (sums - ref).chunk(2)
    loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean() + 0.1 * theirs.aux_loss
    loss.backward()
    assert float(out.loss) == pytest.approx(float(loss), abs=1e-5)
    assert out.metrics["aux_loss"].tolist() == pytest.approx([float(theirs.aux_loss)] * 4, abs=1e-5)
    expected = dict(model.named_parameters())
    for key, p in policy.model.named_parameters():
        assert torch.allclose(p.grad, expected[key].grad, atol=2e-5), key


def test_the_routers_loss_adds_up_over_micro_batches_and_is_in_the_metrics(world, tmp_path, capsys):
    source = folder_of(ROUTED["mixtral"], tmp_path / "model")
    options = {"model_name_or_path": str(source), "learning_rate": 0.0, "logging_steps": 1, "max_steps": 1,
               "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    _, said = run_lines(make(world, tmp_path / "run", **options), capsys)
    assert "router loss times 0.1 in every loss" in said and "mfu: unknown" in said
    rows = read_metrics(tmp_path / "run")
    for row in rows:
        assert row["loss"] == pytest.approx(0.693147 + 0.1 * row["aux_loss"], abs=1e-5) and row["aux_loss"] > 0.5
    policy = load_policy(make(world, tmp_path, **options), make_tokenizer())
    batches = [collate(EXAMPLES[:1], 0), collate(EXAMPLES, 0)]
    totals = totals_of(batches)
    bare = [policy.compute_loss(b, lambda seq: seq.logps.sum() * 0, totals) for b in batches]
    aux = [float(out.metrics["aux_loss"][0]) for out in bare]
    assert sum(float(out.loss) for out in bare) == pytest.approx(0.1 * (2 * aux[0] + 4 * aux[1]) / 6, abs=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "phimoe"])
def test_lora_leaves_routers_alone_and_says_its_share(name, world, tmp_path):
    config = (ROUTED | {"phimoe": transformers.PhimoeConfig(**EXPERTS)})[name]
    source = folder_of(config, tmp_path / "model")
    policy = load_policy(make(world, tmp_path, model_name_or_path=str(source), use_peft=True), make_tokenizer())
    assert not [key for key in policy.trainable() if "gate." in key or "router" in key or "expert_gate" in key]
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    named = {key: p.numel() for key, p in base.named_parameters()}
    total, experts = sum(named.values()), sum(p.numel() for p in base.parameters() if p.ndim == 3)
    linear = [key for key in named if key.endswith("proj.weight")]
    share = sum(named[key] for key in linear) / total
    left = f"; not beside experts' 3-D weights, {100 * experts / total:.2g} % of all"
    if name == "mixtral":  # peft has adapters for them
        share, left = share + experts / total, ""
    note = next(note for note in policy.notes if note.startswith("LoRA"))
    assert note == f"LoRA beside {100 * share:.2g} % of the weights{left}"
    # the adapter loads by peft, and gives the policy's log-probs
    with torch.no_grad():
        for p in policy.trainable().values():
            p += 0.05 * torch.randn_like(p)
    save_model(policy, make_tokenizer(), tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    policy.model.eval()
    ids = torch.tensor([[1, 20, 21, 30, 31, 2]])
    expected = loaded(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, 2:5].gather(1, ids[0, 3:, None]).sum()
    assert float(policy.sequence_logps(collate(EXAMPLES[:1], 0))[0]) == pytest.approx(float(expected), abs=1e-4)


EXPERT_LORA = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize(("family", "options", "checkpointing"), [
    ("qwen3_moe", {}, "none"), ("qwen2_moe", EXPERT_LORA, "full"),  # peft knows the experts of the one
])
def test_adapters_of_experts_where_prompts_are_shared(family, options, checkpointing, world, tmp_path):
    """In grouped products, over packed rows: loss and gradients of peft's model over padded ones, expert by expert."""
    kind = transformers.AutoConfig.for_model(
        family, **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24)
    source = folder_of(kind, tmp_path / "model")
    config = make(world, tmp_path, model_name_or_path=str(source), packing=True, use_peft=True, peft=options,
                  gradient_checkpointing=checkpointing)
    policy = load_policy(config, make_tokenizer())
    base = transformers.AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager")
    settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(base, settings)  # with adapters beside routers, which stay at B = 0
    assert policy.layout == "shared" and unwrap(policy.model).config._experts_implementation == "grouped_mm"
    expected = {name: p for name, p in theirs.named_parameters() if p.requires_grad and "gate." not in name}
    assert policy.trainable().keys() == expected.keys() and any("experts.lora_A" in name for name in expected)
    with torch.no_grad():
        for name, p in policy.trainable().items():
            p.copy_(0.1 * torch.randn_like(p))
            expected[name].copy_(p)
    ref = torch.tensor([-5.0, -4.0, -6.0, -9.0])
    out = policy.compute_loss(collate(EXAMPLES, 0, layout="shared"), DPO(), ref_logps=ref)
    out.loss.backward()
    plain = collate(EXAMPLES, 0)
    logps = theirs(input_ids=plain.input_ids).logits.log_softmax(-1).flatten(0, 1)[plain.score_rows]
    sums = logps.gather(1, plain.targets[:, None])[:, 0].split(torch.tensor(plain.cu_seqlens).diff().tolist())
    chosen, rejected = (torch.stack([part.sum() for part in sums]) - ref).chunk(2)
    loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    loss.backward()
    assert float(out.loss) == pytest.approx(float(loss), abs=1e-5)
    save_model(policy, make_tokenizer(), tmp_path / "adapter")
    again = load_policy(config, make_tokenizer(), tmp_path / "adapter").trainable()
    for name, p in policy.trainable().items():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(again[name], p)


# ---- no attention ----------------------------------------------------------------------------------------------------

WITHOUT_ATTENTION = {
    "mamba": transformers.MambaConfig(vocab_size=261, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0,
                                      bos_token_id=1, eos_token_id=2),
    "mamba2": transformers.Mamba2Config(
        vocab_size=261, hidden_size=32, num_hidden_layers=2, state_size=8, head_dim=8, num_heads=8, n_groups=1,
        chunk_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "rwkv": transformers.RwkvConfig(vocab_size=261, hidden_size=32, attention_hidden_size=32, num_hidden_layers=3,
                                    rescale_every=2, bos_token_id=1, eos_token_id=2),
}


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"use_peft": True}], ids=["bf16", "LoRA"])
@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_models_without_attention_have_bf16_weights_and_adapters(name, changes, world, tmp_path):
    """Mamba's residual is fp32 in front of a bf16 head; peft refuses an adapter beside its out_proj."""
    source = folder_of(WITHOUT_ATTENTION[name], tmp_path / "model")
    policy = load_policy(make(world, tmp_path / "run", model_name_or_path=str(source), **changes), make_tokenizer())
    policy.model.eval()
    batch = collate(EXAMPLES, 0)
    own = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=policy.head.weight.dtype).eval()
    for logp, (example, side) in zip(policy.sequence_logps(batch), ((e, s) for s in (0, 1) for e in EXAMPLES)):
        ids = torch.tensor([example.prompt_ids + example.responses[side]])
        with torch.no_grad():
            logits = own(input_ids=ids, use_cache=False).logits[0, :-1].float()
            logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])
        expected = float(logps[len(example.prompt_ids) - 1 :].sum())
        assert float(logp) == pytest.approx(expected, rel=1e-2 if changes.get("dtype") else 1e-5)
    names = {name.split(".")[-2] for name, _ in policy.model.named_parameters() if "lora_A" in name.split(".")}
    assert "out_proj" not in names


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_models_without_attention_train(name, world, tmp_path, capsys):
    source = folder_of(WITHOUT_ATTENTION[name], tmp_path / "model")
    config = make(world, tmp_path / "run", model_name_or_path=str(source), eval_generate=True, eval_max_new_tokens=4,
                  packing=None)
    dry_run(config)
    summary, said = run_lines(config, capsys)
    assert "mfu: unknown, for experts, or layers other than attention" in said
    assert summary["before"]["loss"] == pytest.approx(0.693147, abs=1e-5) and summary["after"]["loss"] < 0.69
    # what is saved is what was evaluated (RWKV divides weights when it evaluates)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    policy = load_policy(config, make_tokenizer(), tmp_path / "run" / "model")
    batch = collate(EXAMPLES, 0)
    logps = policy.sequence_logps(batch)
    for s, (example, side) in enumerate((e, side) for side in (0, 1) for e in EXAMPLES):
        ids = torch.tensor([example.prompt_ids + example.responses[side]])
        with torch.no_grad():
            own = saved(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        assert float(logps[s]) == pytest.approx(float(own[len(example.prompt_ids) - 1 :].sum()), abs=1e-4)


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", True), ("float32", False)])
def test_a_cpu_that_multiplies_slower_in_bf16_says_so(dtype, said, world, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "SLOW_DTYPES", frozenset([torch.bfloat16]))
    policy = load_policy(make(world, tmp_path, dtype=dtype), make_tokenizer())
    assert any(note.startswith("in bfloat16 this CPU multiplies slower") for note in policy.notes) == said
