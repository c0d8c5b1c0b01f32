"""Adapters on bases of 4 and 8 bits: what the base, dequantised by transformers, would do; on a CPU."""

from __future__ import annotations

import io
import json
import math
import shutil

import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft.optimizers import create_loraplus_optimizer
from rich.console import Console
from safetensors.torch import load_file
from tiny import make, make_tokenizer, read_metrics, stopped_after
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
)

from fastpref.data import collate
from fastpref.errors import UserError
from fastpref.losses import SFT
from fastpref.train import loop, quantized
from fastpref.train.display import Display
from fastpref.train.dry_run import dry_run
from fastpref.train.export import export
from fastpref.train.model import load_merged, load_policy
from fastpref.train.optim import Updater
from fastpref.train.stage_data import load_data

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*PeftConfig.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SIZES = dict(
    vocab_size=261, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen2, tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma2, softcap": Gemma2Config(**SIZES, head_dim=32, final_logit_softcapping=1.5, query_pre_attn_scalar=16),
    "phi, biases": PhiConfig(**SIZES | {"num_key_value_heads": 2}),
}
KINDS = {
    "nf4": {"load_in_4bit": True},
    "nf4, nested": {"load_in_4bit": True, "use_bnb_nested_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8": {"load_in_8bit": True},
}
LORA = {"use_peft": True, "lora_r": 4}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of the families, weights as large as trained ones."""
    found = {}
    for name, config in FAMILIES.items():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        found[name] = tmp_path_factory.mktemp("base")
        model.save_pretrained(found[name])
        make_tokenizer().save_pretrained(found[name])
    return found


def dequantised(base, folder, kind):
    """By transformers, in float32."""
    asked = {
        "load_in_4bit": kind.get("load_in_4bit", False), "load_in_8bit": kind.get("load_in_8bit", False),
        "bnb_4bit_quant_type": kind.get("bnb_4bit_quant_type", "nf4"),
        "bnb_4bit_use_double_quant": kind.get("use_bnb_nested_quant", False),
    }
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**asked))
    model.dequantize(torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def adapter_of(run_dir):
    return load_file(run_dir / "model" / "adapter_model.safetensors")


def steps_of(run_dir):
    rows = read_metrics(run_dir)
    return [[row[key] for key in ("loss", "grad_norm", "logps/chosen")] for row in rows if row["split"] == "train"]


@pytest.mark.parametrize(("family", "kind", "packing"), [
    *((name, "nf4, nested", False) for name in FAMILIES),
    ("llama", "nf4", True), ("llama", "fp4", False), ("llama", "8", True), ("phi, biases", "8", False),
])
def test_a_run_is_that_of_the_dequantised_base(family, kind, packing, bases, world, tmp_path, quiet):
    """Loss and gradient norm of every step, and the adapter, to 1e-5; policy and reference are one where B is 0."""
    changes = LORA | {"logging_steps": 1, "max_steps": 3, "packing": packing, "learning_rate": 1e-2,
                      "gradient_checkpointing": "full" if packing else "none"}
    whole = dequantised(bases[family], tmp_path / "whole", KINDS[kind])
    own, read = (load_file(folder / "model.safetensors") for folder in (bases[family], tmp_path / "whole"))
    name = next(name for name in own if "0.self_attn.q_proj.weight" in name)
    assert 0.003 < float((own[name] - read[name]).norm() / own[name].norm()) < 0.2  # so that the test sees something
    loop.train(make(world, tmp_path / "a", model_name_or_path=str(whole), **changes), display=quiet)
    config = make(world, tmp_path / "b", model_name_or_path=str(bases[family]), **KINDS[kind], **changes)
    loop.train(config, display=quiet)
    for ours, theirs in zip(steps_of(tmp_path / "b"), steps_of(tmp_path / "a"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    first = read_metrics(tmp_path / "b")[0]  # held-out pairs, B = 0
    assert first["split"] == "eval" and first["rewards/margins"] == 0 and first["watch/kl"] == 0
    ours, theirs = adapter_of(tmp_path / "b"), adapter_of(tmp_path / "a")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


def test_products_are_the_same_in_both_modes_and_whatever_the_batch(bases, world, tmp_path):
    """bitsandbytes' own are not: bf16 in evaluation mode (AVX512), activations in 8 bits."""
    for kind in ("nf4", "8"):
        config = make(world, tmp_path, model_name_or_path=str(bases["llama"]), **LORA, **KINDS[kind])
        policy = load_policy(config, make_tokenizer())
        assert not policy.head.weight.requires_grad and policy.head.weight.dtype == torch.float32  # two GEMMs, exact
        model, ids = policy.model, torch.arange(3, 15)[None]
        with torch.no_grad():
            trains, evaluates = model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
            beside = torch.cat([ids, ids.flip(1)])
            together = model(input_ids=beside).logits[:1]
        assert torch.equal(trains, evaluates)
        torch.testing.assert_close(together, evaluates, rtol=1e-5, atol=1e-5)


def test_a_quantised_folder_is_recognised(bases, world, tmp_path, quiet, capsys):
    """The same run as of its whole model with load_in_4bit, which then is not said twice; the log tells."""
    folder = tmp_path / "quantised"
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(bases["llama"], quantization_config=asked).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    changes = LORA | {"logging_steps": 1, "max_steps": 2}
    loop.train(make(world, tmp_path / "a", model_name_or_path=str(folder), **changes))
    assert "% of the weights in 4 bits (nf4, nested scales)" in capsys.readouterr().out.replace("\n", " ")
    config = make(world, tmp_path / "b", model_name_or_path=str(bases["llama"]), **KINDS["nf4, nested"], **changes)
    loop.train(config, display=quiet)
    assert steps_of(tmp_path / "a") == steps_of(tmp_path / "b")
    assert fingerprint_of(tmp_path / "a") == fingerprint_of(tmp_path / "b")  # the same weights
    for refused, told in (
        ({}, "is quantised already, to 4 bits, and such weights are not trained: set use_peft=true"),
        (LORA | {"load_in_8bit": True}, "load_in_8bit: .* is quantised already, to 4 bits: leave it out"),
    ):
        wrong = make(world, tmp_path / "c", model_name_or_path=str(folder), **refused)
        for run in (loop.train, dry_run):
            with pytest.raises(UserError, match=told):
                run(wrong)
    settings = json.loads((folder / "config.json").read_text())
    for method in ("gptq", "torchao"):
        settings["quantization_config"] = {"quant_method": method, "bits": 4}
        (folder / "config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=f"quantised already, with {method}; of quantised models it takes those of"):
            dry_run(make(world, tmp_path / "c", model_name_or_path=str(folder), **LORA))


@pytest.mark.parametrize(("changes", "told"), [
    ({"load_in_4bit": True}, "load_in_4bit: weights of so few bits are not trained: set use_peft=true"),
    ({"load_in_4bit": True, "load_in_8bit": True, **LORA}, "load_in_4bit and load_in_8bit: set one of them"),
    ({"load_in_4bit": True, "merge_adapter": True, **LORA}, "merge_adapter adds to whole weights, and load_in_4bit"),
    ({"load_in_4bit": True, "optim": "adamw_torch_8bit", **LORA}, "optim is 'adamw_torch_8bit', and what is trained"),
    ({"use_bnb_nested_quant": True, **LORA}, "use_bnb_nested_quant is of load_in_4bit, which is not set"),
    ({"load_in_4bit": "nf4", **LORA}, "load_in_4bit is 'nf4'; it takes true or false"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5", **LORA}, r"'nf5' \(did you mean nf4\?\); it takes nf4, fp4"),
    ({"peft": {"use_dora": True}}, "peft has settings of an adapter, and use_peft is not set"),
    ({"loraplus_lr_ratio": 16}, "loraplus_lr_ratio is of a LoRA adapter, and there is none: set use_peft=true"),
])
def test_what_a_configuration_refuses(changes, told, world, tmp_path):
    with pytest.raises(UserError, match=told):
        make(world, tmp_path, **changes)


def test_bitsandbytes_missing_or_without_a_backend(world, tmp_path, monkeypatch):
    import bitsandbytes

    config = make(world, tmp_path / "run", load_in_4bit=True, **LORA)
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda", "xpu"})
    for run in (loop.train, dry_run):
        with pytest.raises(UserError, match="needs a bitsandbytes with a backend for cpu; .* pip install --upgrade"):
            run(config)
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    for run in (loop.train, dry_run):
        with pytest.raises(UserError, match="needs bitsandbytes, which is not installed: pip install bitsandbytes"):
            run(config)


def test_a_stopped_run_goes_on_bitwise_and_is_evaluated_again(bases, world, tmp_path, quiet, monkeypatch):
    changes = LORA | KINDS["nf4"] | {"lora_dropout": 0.1, "logging_steps": 1, "save_steps": 2, "packing": True}
    changes |= {"model_name_or_path": str(bases["llama"]), "eval_generate": True, "eval_max_new_tokens": 3}
    loop.train(make(world, tmp_path / "whole", **changes), display=quiet)
    config = make(world, tmp_path / "stopped", **changes)
    with stopped_after(3, monkeypatch):
        loop.train(config, display=quiet)
    loop.train(config, resume=True, display=quiet)
    found = [(tmp_path / run / "model" / "adapter_model.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert found[0] == found[1]
    # the adapter, merged: in float32 what was trained; in bf16 it loses what rounding takes, once
    exact, rounded = (load_merged(config, tmp_path / "stopped" / "model", dtype)
                      for dtype in (torch.float32, torch.bfloat16))
    assert not any(type(m).__module__.startswith(("bitsandbytes", "peft")) for m in exact.modules())
    assert not hasattr(exact.config, "quantization_config") and rounded.dtype == torch.bfloat16
    policy = load_policy(config, make_tokenizer(), tmp_path / "stopped" / "model")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad(), policy.generating():
        expected = policy.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(exact(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        off = (rounded.float()(input_ids=ids).logits - expected).abs().max() / expected.abs().max()
    assert 1e-4 < off < 2e-2
    export(tmp_path / "stopped", tmp_path / "exported", merge=True, display=quiet)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_reward_models(bases, world, tmp_path, quiet):
    changes = LORA | {"model_name_or_path": str(bases["qwen2, tied"]), "loss": "bradley_terry", "logging_steps": 1}
    whole = dequantised(bases["qwen2, tied"], tmp_path / "whole", KINDS["nf4"])
    loop.train(make(world, tmp_path / "a", **changes, **KINDS["nf4"]), display=quiet)
    loop.train(make(world, tmp_path / "b", **changes | {"model_name_or_path": str(whole)}), display=quiet)
    ours, theirs = ([row["loss"] for row in read_metrics(tmp_path / run) if row["split"] == "train"] for run in "ab")
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == 4
    assert any("score" in name for name in adapter_of(tmp_path / "a"))


# ---- two ranks -------------------------------------------------------------------------------------------------------


def of_ranks(world, folder, name):
    storage, kind = name.split()
    changes = LORA | KINDS[kind] | {"model_name_or_path": str(world / "base"), "gradient_accumulation_steps": 3}
    changes |= {"bnb_4bit_quant_storage": storage} if storage != "int8" else {}
    return make(world, folder / name, logging_steps=1, packing=True, learning_rate=1e-4, **changes)


def work(rank, size, world, folder, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    for name in names:
        loop.train(of_ranks(world, folder, name), display=Display(Console(file=io.StringIO())))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_train_as_one(bases, world, tmp_path, quiet):
    """4-bit weights cut in their storage dtype, scales whole on each rank."""
    shutil.copytree(bases["llama"], world / "base")
    names = ["uint8 nf4", "bfloat16 nf4", "float32 nf4", "int8 8"]
    (tmp_path / "two").mkdir()
    for name in names:
        loop.train(of_ranks(world, tmp_path / "one", name), display=quiet)
    mp.spawn(work, (2, world, tmp_path / "two", names), nprocs=2)
    for name in names:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        for ours, theirs in zip(steps_of(two), steps_of(one), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        theirs = adapter_of(one)
        for key, tensor in adapter_of(two).items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-6)
        assert fingerprint_of(one) == fingerprint_of(two)  # so that they share reference log-probs


def fingerprint_of(run_dir):
    return json.loads((run_dir / "summary.json").read_text())["stages"]["dpo"]["reference"]


# ---- peft's own settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "options"), [
    ({}, {"use_dora": True}),
    (KINDS["nf4"], {"use_dora": True, "use_rslora": True, "r": 2, "lora_alpha": 3}),
    ({}, {"target_modules": r".*\.1\.self_attn\.[qv]_proj", "init_lora_weights": "gaussian"}),
    ({}, {"modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}}),
], ids=["DoRA", "DoRA, rsLoRA on 4 bits", "a regular expression", "a trained LM head"])
def test_the_first_steps_gradient_is_pefts_own(base, options, bases, world, tmp_path, quiet):
    """Of DPO over full logits, by autograd through a model that peft has made of the same settings."""
    settings = {"use_peft": True, "peft": options, "lora_dropout": None if "lora_dropout" in options else 0.0}
    config = make(world, tmp_path, model_name_or_path=str(bases["llama"]), max_length=40, **settings, **base)
    policy = load_policy(config, make_tokenizer())
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if base else None
    plain = AutoModelForCausalLM.from_pretrained(bases["llama"], quantization_config=four)
    torch.manual_seed(1)
    defaults = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    theirs = peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", **defaults | options)).train()
    assert policy.trainable().keys() == {name for name, p in theirs.named_parameters() if p.requires_grad}
    mine = policy.trainable()
    with torch.no_grad():  # away from B = 0, the same in both
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p += 0.01 * torch.randn_like(p)
                mine[name].copy_(p)
    examples = load_data(config.stage_configs(), make_tokenizer(), quiet)[0].train
    batch = collate([examples[i] for i in range(2)], 0, "pair", layout=policy.layout)
    out = policy.compute_loss(batch, SFT())
    out.loss.backward()
    logits = theirs(input_ids=batch.input_ids).logits
    logps = logits.flatten(0, 1)[batch.score_rows].log_softmax(-1)
    (-logps.gather(1, batch.targets[:, None]).sum() / batch.num_tokens).backward()
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(mine[name].grad, p.grad, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize(("options", "told"), [
    ({"use_dorra": True}, "peft.use_dorra: no such key; the nearest is use_dora"),
    ({"task_type": "SEQ_CLS"}, "peft.task_type: is set by the run"),
    ({"bias": "all"}, "peft.bias is 'all', which trains the base's own biases"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base weights"),
    ({"init_lora_weights": "eva"}, "begins from activations"),
    ({"alora_invocation_tokens": [1]}, "acts elsewhere than in the layers"),
    ({"r": 0}, "peft: .*r.* should be a positive integer"),
    ({"target_modules": "nothing_.*"}, "peft: .*nothing_.* not found in the base model"),
    ({"target_modules": ["lm_head"], "use_dora": True}, r"with a variant of LoRA \(DoRA, ...\); the fused head takes"),
])
def test_what_is_refused_of_pefts_settings(options, told, world, tmp_path):
    config = make(world, tmp_path / "run", use_peft=True, peft=options)
    for run in (dry_run, loop.train):
        with pytest.raises(UserError, match=told):
            run(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_one_setting_has_one_place(world, tmp_path):
    with pytest.raises(UserError, match="peft.r and lora_r say the same: set one of them"):
        dry_run(make(world, tmp_path, use_peft=True, lora_r=4, peft={"r": 8}))


def test_loraplus_rates_are_pefts(bases, world, tmp_path, quiet):
    """B's is so many times A's; DoRA's magnitudes have B's. AdamW's first step is as long as the rate."""
    options = {"learning_rate": 2e-4, "loraplus_lr_ratio": 16.0, "lr_scheduler_type": "constant", "max_steps": 1}
    base = {"model_name_or_path": str(bases["llama"])}
    config = make(world, tmp_path / "run", **base, **LORA, **options, peft={"use_dora": True})
    policy = load_policy(config, make_tokenizer())
    updater = Updater(policy.trainable(), config)
    updater.begin(2e-4)
    theirs = create_loraplus_optimizer(policy.model, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16)
    mine, expected = ({id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
                      for optimizer in (updater.optimizer, theirs))
    assert mine == pytest.approx(expected) and set(expected.values()) == {2e-4, 16 * 2e-4}
    loop.train(config, display=quiet)
    moved = [tensor.abs().max().item() for name, tensor in adapter_of(tmp_path / "run").items() if "lora_B" in name]
    assert moved == pytest.approx([16 * 2e-4] * len(moved), rel=1e-3)
    wrong = make(world, tmp_path / "b", **LORA, **options, peft={"target_modules": ["embed_tokens", "q_proj"]})
    for run in (loop.train, dry_run):
        with pytest.raises(UserError, match="loraplus_lr_ratio is of adapters beside linear layers, and .*embed_tok"):
            run(wrong)


def test_pissa_begins_with_peft_as_its_refusal_says(bases, world, tmp_path, quiet):
    """Policy and reference are then the model that peft took apart, and what is trained is still the adapter alone."""
    settings = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases["llama"]), settings)
    saved = model.peft_config["default"]
    saved.base_model_name_or_path, saved.init_lora_weights = str(tmp_path / "rest"), True
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "rest")
    for folder in ("adapter", "rest"):
        make_tokenizer().save_pretrained(tmp_path / folder)
    whole, name = load_file(bases["llama"] / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(load_file(tmp_path / "rest" / "model.safetensors")[name], whole[name], atol=1e-2)
    options = {"use_peft": True, "max_steps": 2, "logging_steps": 1}
    loop.train(make(world, tmp_path / "a", model_name_or_path=str(tmp_path / "adapter"), **options), display=quiet)
    loop.train(make(world, tmp_path / "b", model_name_or_path=str(bases["llama"]), **options), display=quiet)
    ours, plain = (read_metrics(tmp_path / run)[0] for run in "ab")
    assert ours["split"] == "eval" and ours["rewards/margins"] == 0 and ours["watch/kl"] == 0
    assert ours["logps/chosen"] == pytest.approx(plain["logps/chosen"], rel=1e-5)
    assert steps_of(tmp_path / "a")[1][0] < math.log(2)
