"""What a model's folder is: weights that are missing, adapters, folders that a run would remove."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make, make_config, make_pairs, make_tokenizer, read_metrics, settings, write_rows
from transformers import GenerationConfig, LlamaForCausalLM, LlamaForSequenceClassification

from fastpref.errors import UserError
from fastpref.train.dry_run import dry_run
from fastpref.train.evaluate_run import evaluate_run
from fastpref.train.loop import train
from fastpref.train.model import load_policy, load_reference, load_tokenizer, load_weights
from fastpref.train.reference_cache import cache_reference
from fastpref.train.scorer import load_scorer

# peft asks transformers with a name of its that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
UP = "model.layers.1.mlp.up_proj.weight"
DAMAGE = {  # name -> (what is put in place of a tensor, changes of config.json, what is said)
    "head": ({"lm_head.weight": None}, {}, "its weights lack lm_head.weight"),
    "trunk": ({UP: None, "model.norm.weight": None}, {}, f"its weights lack {UP} and 1 more"),
    "shape": ({UP: torch.zeros(3, 32)}, {}, rf"have {UP} as \(3, 32\), config.json as \(48, 32\)"),
    "wider": ({}, {"intermediate_size": 64}, r"have model.layers.0.mlp.down_proj.weight as \(32, 48\), config.json as"),
    "fewer layers": ({}, {"num_hidden_layers": 1}, "have model.layers.1.input_layernorm.weight and 8 more, of which"),
}


def damaged(source: Path, folder: Path, tensors, settings) -> Path:
    shutil.copytree(source, folder)
    found = load_file(folder / "model.safetensors") | tensors
    found = {key: value for key, value in found.items() if value is not None}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("name", DAMAGE)
def test_weights_that_are_not_all_there(name, world, tmp_path, quiet, monkeypatch):
    tensors, settings, message = DAMAGE[name]
    folder = str(damaged(world / "pretrained", tmp_path / "model", tensors, settings))
    config = make(world, tmp_path / "run", model_name_or_path=folder)
    tokenizer = make_tokenizer()
    with pytest.raises(UserError, match=f"model: no causal language model that loads .*{message}"):
        load_policy(config, tokenizer)
    with pytest.raises(UserError, match=message):
        load_reference(make(world, tmp_path / "run"), tokenizer, folder)
    # a run says so before it has tokenised anything
    monkeypatch.setattr("fastpref.train.loop.load_data", None)
    monkeypatch.setattr("fastpref.train.dry_run.load_data", None)
    for changes in ({"model_name_or_path": folder}, {"ref_model_name_or_path": folder}):
        config = make(world, tmp_path / "run", **changes)
        for run in (dry_run, train):
            with pytest.raises(UserError, match=message):
                run(config, display=quiet)
    config = make(world, tmp_path / "run", model_name_or_path=folder, loss="bradley_terry")
    if name == "head":  # nobody needs it there
        load_policy(config, load_tokenizer(config))
        return
    with pytest.raises(UserError, match=message):
        load_policy(config, load_tokenizer(config))


def test_a_shard_that_is_not_there(world, tmp_path, quiet):
    model = LlamaForCausalLM.from_pretrained(world / "pretrained")
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    make_tokenizer().save_pretrained(tmp_path / "model")
    config = make(world, tmp_path / "run", model_name_or_path=str(tmp_path / "model"))
    policy = load_policy(config, make_tokenizer())
    assert torch.equal(policy.head.weight, model.lm_head.weight)
    lost = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    lost.unlink()
    for run in (dry_run, train):
        with pytest.raises(UserError, match=f"no causal language model that loads .*{lost.name}"):
            run(config, display=quiet)


def test_a_tied_head_has_no_tensor_of_its_own(world, tmp_path):
    torch.manual_seed(0)
    tied = LlamaForCausalLM(make_config(tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    config = make(world, tmp_path / "run", model_name_or_path=str(tmp_path / "tied"))
    policy = load_policy(config, make_tokenizer())
    assert torch.equal(policy.head.weight, tied.lm_head.weight)


def test_what_a_run_has_saved_is_read_as_strictly(world, tmp_path):
    config, tokenizer = make(world, tmp_path / "run"), make_tokenizer()
    policy = load_policy(config, tokenizer)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    folder = damaged(world / "pretrained", tmp_path / "checkpoint", {UP: None}, {})
    with pytest.raises(UserError, match=f"its weights lack {UP}"):
        load_policy(config, tokenizer, folder)
    with pytest.raises(UserError, match=f"checkpoint: no weights of this model .its weights lack {UP}"):
        load_weights(policy, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())


def test_a_scorer_whose_weights_are_not_all_there(world, tmp_path):
    torch.manual_seed(0)
    LlamaForSequenceClassification(make_config(num_labels=1)).save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    folder = damaged(tmp_path / "whole", tmp_path / "rm", {UP: torch.zeros(48, 3)}, {})
    with pytest.raises(UserError, match=rf"no reward model that loads .its weights have {UP} as \(48, 3\)"):
        load_scorer(str(folder))


# ---- adapters --------------------------------------------------------------------------------------------------------

peft = pytest.importorskip("peft")


def random_adapter(folder: Path, base: Path, cls=LlamaForCausalLM, task="CAUSAL_LM", **changes) -> Path:
    """What an SFT run with LoRA leaves."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": task} | changes
    model = cls.from_pretrained(base, **({"num_labels": 1} if task == "SEQ_CLS" else {}))
    model = peft.get_peft_model(model, peft.LoraConfig(**lora))
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("sft") / "adapter", world / "pretrained")


def by_peft(folder, base=None):
    """A saved model, read without us."""
    if base is None and not (Path(folder) / "adapter_config.json").is_file():
        return LlamaForCausalLM.from_pretrained(folder).eval()
    if base is None:
        return peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    return peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).eval()


def sums(model, rows, side):
    """[rows]: log-probs of a side of pairs, from the model's own logits in fp64."""
    tokenizer, found = make_tokenizer(), []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = tokenizer(row[side], add_special_tokens=False)["input_ids"] + [2]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(float(logps.gather(1, torch.tensor(response)[:, None]).sum()))
    return torch.tensor(found, dtype=torch.float64)


def cached(folder):
    """[pairs, 2]: the reference log-probs of the held-out set."""
    (path,) = Path(folder).glob("*-eval.safetensors")
    return load_file(path)["logps"].double()


HELD_OUT = make_pairs(9, seed=2)
WAYS = {
    "goes on": {"use_peft": True},
    "merged": {"merge_adapter": True},
    "merged, a new one": {"use_peft": True, "merge_adapter": True, "lora_r": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_starts_from_base_and_adapter(way, world, tmp_path, quiet, adapter):
    """The commonest recipe, LoRA SFT and then LoRA DPO. Everything against peft and the model's own logits."""
    start = by_peft(adapter)
    before = torch.stack([sums(start, HELD_OUT, side) for side in ("chosen", "rejected")], 1)
    bare = sums(LlamaForCausalLM.from_pretrained(world / "pretrained").eval(), HELD_OUT, "chosen")
    assert (before[:, 0] - bare).abs().mean() > 0.1  # of the two it is a different one
    config = make(world, tmp_path / "run", model_name_or_path=str(adapter), learning_rate=1e-2, **WAYS[way])
    said = dry_run(config, quiet)
    first = cache_reference(config, quiet)
    assert torch.allclose(cached(tmp_path / "run" / "reference"), before, atol=2e-5)
    stamps = [path.stat().st_mtime_ns for path in first]
    summary = train(config, display=quiet)
    assert [path.stat().st_mtime_ns for path in first] == stamps  # they were what the run looked for
    assert summary["before"]["logps/chosen"] == pytest.approx(float(before[:, 0].mean()), abs=2e-5)
    assert summary["before"]["rewards/margins"] == pytest.approx(0, abs=1e-6)

    end = by_peft(tmp_path / "run" / "model")
    after = torch.stack([sums(end, HELD_OUT, side) for side in ("chosen", "rejected")], 1)
    margins = 0.1 * ((after - before)[:, 0] - (after - before)[:, 1])
    assert margins.abs().mean() > 0.01
    assert summary["after"]["logps/chosen"] == pytest.approx(float(after[:, 0].mean()), abs=2e-5)
    assert summary["after"]["rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-5)
    trained = sum(p.numel() for p in end.parameters())
    if "use_peft" in WAYS[way]:
        trained = sum(p.numel() for name, p in end.named_parameters() if "lora_" in name)
    assert said["trained"] == trained
    assert (tmp_path / "run" / "base").is_dir() == (way == "merged, a new one")

    shutil.rmtree(tmp_path / "run" / "reference")  # and from the run's folder it is all the same
    again = evaluate_run(tmp_path / "run", display=quiet)
    assert again["rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-5)
    with load_scorer(f"implicit:{tmp_path / 'run'}") as scorer:
        scores = scorer.score([row["prompt"] for row in HELD_OUT], [row["chosen"] for row in HELD_OUT])
    assert scores == pytest.approx((0.1 * (after - before)[:, 0]).tolist(), abs=1e-5)


def test_eval_of_a_configuration_with_an_adapter(world, tmp_path, quiet, adapter):
    values = settings(world, tmp_path / "run", model_name_or_path=str(adapter), use_peft=True)
    (tmp_path / "dpo.yaml").write_text(json.dumps(values))
    found = evaluate_run(tmp_path / "dpo.yaml", display=quiet)
    expected = sums(by_peft(adapter), HELD_OUT, "chosen")
    assert found["logps/chosen"] == pytest.approx(float(expected.mean()), abs=2e-5)


def test_a_run_with_an_adapter_goes_on_bitwise(world, tmp_path, quiet, adapter):
    """And its fresh samples are compared with the adapter it began with, not with the bare model."""
    changes = {"model_name_or_path": str(adapter), "use_peft": True, "lora_dropout": 0.1, "save_steps": 2,
               "sample_steps": 2, "sample_prompts": 4, "sample_max_new_tokens": 4, "sample_time_share": None}
    train(make(world, tmp_path / "whole", **changes), display=quiet)
    samples = [row for row in read_metrics(tmp_path / "whole") if row["split"] == "sample"]
    assert samples[0]["step"] == 0 and samples[0]["kl_k3"] == pytest.approx(0, abs=1e-9) and samples[-1]["kl_k3"] > 1e-9
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("summary.json", "model", "reference"):  # as if it had been killed after step 2
        path = tmp_path / "again" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    train(make(world, tmp_path / "again", **changes), resume=True, display=quiet)
    a, b = (tmp_path / name / "model" / "adapter_model.safetensors" for name in ("whole", "again"))
    assert a.read_bytes() == b.read_bytes()


def test_an_adapter_as_reference(world, tmp_path, quiet, adapter):
    before = torch.stack([sums(by_peft(adapter), HELD_OUT, side) for side in ("chosen", "rejected")], 1)
    for changes in ({}, {"use_peft": True}):
        config = make(world, tmp_path / str(len(changes)), ref_model_name_or_path=str(adapter), max_steps=1, **changes)
        dry_run(config, quiet)
        train(config, display=quiet)
        assert torch.allclose(cached(tmp_path / str(len(changes)) / "reference"), before, atol=2e-5)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("way", WAYS)
def test_a_reward_model_from_an_adapter(task, way, world, tmp_path, quiet, adapter):
    """From one of SFT, whose trunk it takes, with a new score layer; from one of a reward model, with its own."""
    folder = adapter
    if task == "SEQ_CLS":
        folder = random_adapter(tmp_path / "rm", world / "pretrained", LlamaForSequenceClassification, task)
    config = make(world, tmp_path / "run", model_name_or_path=str(folder), loss="bradley_terry", max_steps=1,
                  learning_rate=1e-2, **WAYS[way])
    policy = load_policy(config, load_tokenizer(config))
    policy.model.eval()
    ids = torch.tensor([[1, 40, 41, 42, 2]])
    with torch.no_grad():
        hidden = policy.trunk(input_ids=ids).last_hidden_state
        if task == "SEQ_CLS":
            expected = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
            assert torch.allclose(policy.model(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5)
        else:
            inner = by_peft(folder).get_base_model().model
            assert torch.allclose(hidden, inner(input_ids=ids).last_hidden_state, atol=1e-5)
    dry_run(config, quiet)
    summary = train(config, display=quiet)
    texts = [row["prompt"] for row in HELD_OUT], [row["chosen"] for row in HELD_OUT]
    with load_scorer(str(tmp_path / "run" / "model")) as scorer:
        rewards = scorer.score(*texts)
    assert summary["after"]["rewards/chosen"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-4)


def test_the_tokenizer_is_the_adapters_if_it_has_one(world, tmp_path, adapter):
    config = make(world, tmp_path / "run", model_name_or_path=str(adapter), use_peft=True)
    assert load_tokenizer(config).name_or_path == str(world / "pretrained")
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    make_tokenizer().save_pretrained(folder)
    config = make(world, tmp_path / "run", model_name_or_path=str(folder), use_peft=True)
    assert load_tokenizer(config).name_or_path == str(folder)


def changed_adapter(adapter, folder, change):
    shutil.copytree(adapter, folder)
    found = load_file(folder / "adapter_model.safetensors")
    save_file(change(found), folder / "adapter_model.safetensors", metadata={"format": "pt"})


Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
EMBEDDING = "base_model.model.model.embed_tokens.weight"
OTHERS = {
    "lacking": (lambda found: {k: v for k, v in found.items() if k != Q.format(1)}, "it lacks .*1.self_attn.q_proj"),
    "left over": (lambda found: found | {Q.format(7): torch.zeros(4, 32)}, "no place for its .*layers.7.self_attn"),
    "shape": (lambda found: found | {Q.format(0): torch.zeros(4, 16)}, "size mismatch for .*0.self_attn.q_proj.lora_A"),
    "embeddings": (lambda found: found | {EMBEDDING: torch.zeros(261, 32)}, "embed_tokens.weight beside the adapter"),
    "a larger vocabulary": (lambda found: found | {EMBEDDING: torch.zeros(263, 32)}, "embed_tokens.weight .*resize"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_adapters_that_do_not_fit(name, world, tmp_path, quiet, adapter):
    change, message = OTHERS[name]
    changed_adapter(adapter, tmp_path / "adapter", change)
    for changes in ({"model_name_or_path": str(tmp_path / "adapter"), "use_peft": True},
                    {"ref_model_name_or_path": str(tmp_path / "adapter")}):
        config = make(world, tmp_path / "run", **changes)
        for run in (dry_run, train)[name == "embeddings" :]:  # of these only their values tell
            with pytest.raises(UserError, match=f"adapter: no adapter that loads on .*pretrained .*{message}"):
                run(config, display=quiet)
        if name != "embeddings":
            assert not (tmp_path / "run" / "config.yaml").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    if name == "embeddings":  # merged, they are not lost
        config = make(world, tmp_path / "run", model_name_or_path=str(tmp_path / "adapter"), merge_adapter=True)
        assert not load_policy(config, make_tokenizer()).model.get_input_embeddings().weight.any()


def test_an_adapter_that_cannot_be_merged_is_refused_before_the_weights_are_read(world, tmp_path, quiet):
    import peft

    base = LlamaForCausalLM.from_pretrained(world / "pretrained")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], lora_bias=True)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    config = make(world, tmp_path / "run", model_name_or_path=str(tmp_path / "adapter"), merge_adapter=True)
    for run in (dry_run, train):
        with pytest.raises(UserError, match="Impossible to merge LoRA with `lora_bias=True`"):
            run(config, display=quiet)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_same_embeddings_beside_an_adapter_do_no_harm(world, tmp_path, adapter):
    own = LlamaForCausalLM.from_pretrained(world / "pretrained").get_input_embeddings().weight.data
    changed_adapter(adapter, tmp_path / "adapter", lambda found: found | {EMBEDDING: own.clone()})
    config = make(world, tmp_path / "run", model_name_or_path=str(tmp_path / "adapter"), use_peft=True)
    ids = torch.tensor([[1, 40, 41]])
    assert torch.allclose(load_policy(config, make_tokenizer()).model.eval()(ids).logits, by_peft(adapter)(ids).logits)


def test_what_does_not_go_with_an_adapter(world, tmp_path, quiet, adapter):
    def refused(message, name=str(adapter), **changes):
        config = make(world, tmp_path / "run", model_name_or_path=name, **changes)
        for run in (dry_run, train):
            with pytest.raises(UserError, match=message):
                run(config, display=quiet)
        assert not (tmp_path / "run" / "config.yaml").exists()

    refused("adapter is an adapter on .*pretrained: set use_peft=true to go on .*, or merge_adapter=true")
    refused("merge_adapter: .*pretrained is no adapter", name=str(world / "pretrained"), merge_adapter=True)
    refused("init_from_config makes random weights, and .*adapter is an adapter", merge_adapter=True,
            init_from_config=True)
    refused("lora_r is 8, and 4 in the adapter", use_peft=True, lora_r=8)
    refused("lora_target_modules is .*, and .* in the adapter", use_peft=True, lora_target_modules=["q_proj"])
    ia3 = peft.get_peft_model(LlamaForCausalLM.from_pretrained(world / "pretrained"),
                              peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"))
    ia3.save_pretrained(tmp_path / "ia3")
    refused("ia3: no adapter that loads on .*pretrained .it is of type IA3; it takes LoRA", name=str(tmp_path / "ia3"),
            use_peft=True)
    for name, base, message in (
        ("homeless", "", "does not say which model the adapter belongs to"),
        ("stacked", str(adapter), "its model .*adapter is an adapter itself"),
        ("gone", str(tmp_path / "gone_base"), "gone_base: no such folder"),
    ):
        folder = shutil.copytree(adapter, tmp_path / name)
        values = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
        (folder / "adapter_config.json").write_text(json.dumps(values))
        refused(message, name=str(folder), use_peft=True)
    both = shutil.copytree(world / "pretrained", tmp_path / "both")
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    refused("both: has an adapter and a whole model", name=str(both), use_peft=True)


# ---- tokenizers and settings -----------------------------------------------------------------------------------------


def with_pad_beyond(world, folder, name="pretrained") -> Path:
    """[PAD] was added to the tokenizer and the model was not resized: its id is the vocabulary's size."""
    shutil.copytree(world / name, folder)
    tokenizer = make_tokenizer()
    while len(tokenizer) < 261:
        tokenizer.add_tokens(f"<more{len(tokenizer)}>")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 261 == len(tokenizer) - 1
    tokenizer.save_pretrained(folder)
    return folder


def test_a_padding_token_beyond_the_head(world, tmp_path, quiet):
    """Nothing depends on it: the run is the one with a padding token within, down to its last bit."""
    folder = with_pad_beyond(world, tmp_path / "beyond")
    for name, model in (("a", world / "pretrained"), ("b", folder)):
        config = make(world, tmp_path / name, model_name_or_path=str(model), eval_generate=True)
        train(config, display=quiet)
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert make_tokenizer().__class__.from_pretrained(tmp_path / "b" / "model").pad_token == "[PAD]"  # as it was


def test_a_reward_model_pads_with_a_token_that_it_has(world, tmp_path, quiet):
    folder = with_pad_beyond(world, tmp_path / "beyond")
    config = make(world, tmp_path / "run", model_name_or_path=str(folder), loss="bradley_terry", max_steps=1)
    summary = train(config, display=quiet)
    saved = LlamaForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert saved.config.pad_token_id == 1 and load_tokenizer(config).pad_token_id == 1  # BOS
    with load_scorer(str(tmp_path / "run" / "model")) as scorer:
        rewards = scorer.score([row["prompt"] for row in HELD_OUT], [row["chosen"] for row in HELD_OUT])
        assert scorer.score(["<more259>[PAD]"], ["a"]) == [None]
        assert "a token beyond the model's vocabulary of 261" in scorer.first["raised"]
    assert summary["after"]["rewards/chosen"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-4)


@pytest.mark.parametrize("key", ["model_name_or_path", "ref_model_name_or_path"])
def test_a_token_beyond_the_head_that_occurs(key, world, tmp_path, quiet, monkeypatch):
    folder = with_pad_beyond(world, tmp_path / "beyond")
    rows = make_pairs(8, seed=3)
    rows[5]["rejected"] += " [PAD]"
    changes = {key: str(folder), "tokenizer_name_or_path": str(folder), "eval_dataset": None}
    config = make(world, tmp_path / "run", train_dataset=str(write_rows(tmp_path / "rows.jsonl", rows)), **changes)
    monkeypatch.setattr("fastpref.train.sharding.load_policy", None)
    for run in (dry_run, train):
        with pytest.raises(UserError, match=r"vocabulary of 261 is smaller than the tokenizer's 262, and the token "
                                            r"'\[PAD\]' \(id 261\) occurs"):
            run(config, display=quiet)


def test_a_tokenizer_that_is_not_of_transformers(world, tmp_path, quiet, monkeypatch):
    class MistralCommonBackend:
        eos_token_id = 2

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: MistralCommonBackend())
    for run in (dry_run, train):
        with pytest.raises(UserError, match="its tokenizer, a MistralCommonBackend, has no chat_template, .*: set "
                                            "tokenizer_name_or_path"):
            run(make(world, tmp_path / "run"), display=quiet)


def test_settings_that_would_not_be_saved(world, tmp_path, quiet, monkeypatch):
    """What transformers before 5 refuses to save of what it has read without a word."""
    folder = shutil.copytree(world / "pretrained", tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}')
    monkeypatch.setattr("fastpref.train.loop.load_data", None)
    monkeypatch.setattr("fastpref.train.dry_run.load_data", None)

    def save(self, folder):
        self.validate(strict=True)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", save)
    for run in (dry_run, train):
        with pytest.raises(UserError, match="model: its generation_config.json is one that transformers does not save "
                                            ".*: correct it there"):
            run(make(world, tmp_path / "run", model_name_or_path=str(folder)), display=quiet)
