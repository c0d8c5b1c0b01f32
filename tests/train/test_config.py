"""The configuration: what a file and the command line may say, and the one line for each thing they may not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from fastpref import losses
from fastpref.errors import UserError
from fastpref.rounds.config import RoundsConfig, config_from, differing
from fastpref.train.aliases import ALIASES
from fastpref.train.config import TrainConfig, config_from_dict, differing_keys, load_config, options_of_losses
from fastpref.train.keys import BOUNDS, FREE, RUN, help_text, key, keys_of
from fastpref.train.source import adapter_lines

BASE = """
model_name_or_path: m
train_dataset: t.jsonl
output_dir: out
"""
STAGES = BASE + """
learning_rate: 1e-6
beta: 0.2
stages:
  - {name: warm, loss: sft, learning_rate: 1e-5, max_steps: 3}
  - {loss: rpo, eta: 0.5}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def test_values_and_defaults(tmp_path):
    config = load(tmp_path, BASE + "learning_rate: 5e-7\nbeta: 0.3\nreport_to: tensorboard\nmax_steps: 7.0\n")
    assert config.learning_rate == 5e-7  # YAML 1.1 reads 5e-7 as a string
    assert config.max_steps == 7 and isinstance(config.max_steps, int)
    assert config.report_to == ("tensorboard",)
    assert (config.batch_size, config.max_length, config.bf16) == (8, 1024, None)
    assert config.loss_fn == losses.DPO(beta=0.3)
    (stage,) = config.stage_configs()
    assert stage.name == "dpo" and stage.loss_fn == config.loss_fn and stage.kind == "pair"


def test_lora_has_a_learning_rate_of_its_own(tmp_path):
    base = BASE.replace(": m\n", f": {tmp_path}\n")  # a folder: no hub is asked
    assert load(tmp_path, base).learning_rate == 1e-6
    lora = load(tmp_path, base + "use_peft: true\nstages: [{loss: sft, learning_rate: 2e-5}, {loss: dpo}]\n")
    assert [stage.learning_rate for stage in lora.stage_configs()] == [2e-5, 1e-5]
    assert adapter_lines(lora) == []
    set_low = load(tmp_path, base + "use_peft: true\nlearning_rate: 5e-7\n")
    assert set_low.learning_rate == 5e-7 and adapter_lines(set_low) == [
        "learning_rate 5e-07 is one of full weights; LoRA takes about ten times as much (1e-05 where none is set)"]


def test_stages_inherit_what_they_do_not_set(tmp_path):
    warm, rpo = load(tmp_path, STAGES).stage_configs()
    assert (warm.name, warm.kind, warm.learning_rate, warm.max_steps, warm.loss_fn) == (
        "warm", "sft", 1e-5, 3, losses.SFT(),
    )
    assert (rpo.name, rpo.kind, rpo.learning_rate, rpo.max_steps) == ("rpo", "pair", 1e-6, -1)
    assert rpo.loss_fn == losses.RPO(beta=0.2, eta=0.5)
    assert rpo.stages == () and rpo.train_dataset == "t.jsonl"


def test_overrides_reach_into_stages_and_mappings(tmp_path):
    config = load(
        tmp_path, STAGES, "stages.warm.max_steps=9", "stages.1.beta=0.7", "stages.rpo.learning_rate=2e-6",
        "weight_decay=0.1", "train_dataset={path: a, split: b}", "eval_dataset=[a, b]",
    )
    warm, rpo = config.stage_configs()
    assert warm.max_steps == 9 and rpo.loss_fn == losses.RPO(beta=0.7, eta=0.5) and rpo.learning_rate == 2e-6
    assert warm.weight_decay == rpo.weight_decay == 0.1
    assert config.train_dataset == {"path": "a", "split": "b"} and config.eval_dataset == ["a", "b"]


def test_to_dict_gives_the_same_configuration_back(tmp_path):
    for text in (STAGES, BASE + "loss: kto\ndesirable_weight: 2\nuse_peft: true\nlora_target_modules: [q_proj]\n"):
        config = load(tmp_path, text)
        assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (BASE + "learning_rte: 1\n", (), "learning_rte: no such key; the nearest is learning_rate"),
        (BASE + "bta: 1\n", (), "bta: no such key; the nearest is beta"),
        (BASE + "lora_r: 8\n", (), "lora_r is of a LoRA adapter, and there is none: set use_peft=true, or leave"),
        (BASE, ("lora_target_modules=q_proj",), "lora_target_modules is of a LoRA adapter"),
        (BASE + "zyx: 1\n", (), "zyx: no such key; `fastpref keys` lists them all"),  # nothing is near
        (BASE + "cutoff_len: 512\n", (), "cutoff_len: no such key; here it is max_length"),
        (BASE + "rl: dpo\n", (), "rl: no such key; here it is loss"),
        (BASE + "push_to_hub: true\n", (), "push_to_hub: no such key; `fastpref export RUN --push REPO` puts"),
        (BASE + "attn_implementation: sdpa\n", (), "attn_implementation: no such key; leave it out: packed batches"),
        (BASE, ("deepspeed=ds.json",), "deepspeed: no such key; here it is fsdp"),
        (BASE + "quant_type: int4\n", (), "quant_type: no such key; 4-bit bases are bitsandbytes': load_in_4bit=true"),
        (BASE, ("per_device_batch_size=2",), "no such key; the nearest is per_device_eval_batch_size"),
        (BASE + "learning_rate: fast\n", (), "learning_rate is 'fast'; it takes a number"),
        (BASE + "learning_rate: .nan\n", (), "learning_rate is nan; it takes a number"),
        (BASE + "learning_rate: true\n", (), "learning_rate is True; it takes a number"),
        (BASE + "max_steps: 2.5\n", (), "max_steps is 2.5; it takes a whole number"),
        (BASE + "max_steps: 0\n", (), "max_steps is 0; it takes -1 or at least 1"),
        (BASE + "bf16: yes please\n", (), "bf16 is 'yes please'; it takes true or false"),
        (BASE, ("output_dir=3",), "output_dir is 3; it takes a string"),
        (BASE + "lr_scheduler_type: cosin\n", (), "did you mean cosine?); it takes linear, cosine, constant"),
        (BASE + "report_to: mlflow\n", (), "report_to is 'mlflow'; it takes tensorboard, wandb or none"),
        (BASE + "per_device_train_batch_size: 0\n", (), "per_device_train_batch_size is 0; it takes at least 1"),
        (BASE + "learning_rate: -1\n", (), "learning_rate is -1.0; it takes at least 0"),
        (BASE + "eval_steps: 0\n", (), "eval_steps is 0; it takes at least 1"),
        (BASE + "adam_beta2: 1\n", (), "adam_beta2 is 1.0; it takes 0 to below 1"),
        (BASE + "loss: rp\n", (), "loss is 'rp' (did you mean 'rpo'?); it takes aot, "),
        (BASE + "eta: 0.1\n", (), "eta: no option of loss 'dpo', which takes beta, f_alpha_divergence_coef, f_div"),
        (BASE + "beta: -1\n", (), "beta is -1.0; it takes a number above 0"),
        (BASE + "loss: rpo\nsft: words\n", (), "it takes sum, tokens"),
        (BASE + "loss: aot\ngradient_accumulation_steps: 2\n", (), "compares all sequences of a step with each other"),
        (BASE + "loss: slic\nref_model_name_or_path: r\n", (), "ref_model_name_or_path: loss 'slic' has no reference"),
        (STAGES + "  - {loss: sft, beta: 1}\n", (), "stages.2.beta: loss 'sft' takes no options"),
        (STAGES + "  - {loss: rpo}\n", (), "stages: two are called 'rpo'"),
        (STAGES + "  - {name: ../x}\n", (), "name is '../x'; it takes letters"),
        (STAGES + "  - {seed: 3}\n", (), "stages.2.seed: is the same for the whole run"),
        (STAGES + "  - {lr: 3}\n", (), "stages.2.lr: no such key"),
        (STAGES + "  - 3\n", (), "stages.2 is 3; it takes keys and values"),
        (BASE + "stages: sft\n", (), "stages is 'sft'; it takes a list of sections"),
        (BASE + "use_peft: true\ninit_from_config: true\n", (), "use_peft adapts pretrained weights"),
        ("model_name_or_path: m\noutput_dir: o\n", (), "train_dataset is missing"),
        ("a: [1\n", (), "not valid YAML"),
        (BASE + "beta: 0.1\nseed: 1\nbeta: 0.2\n", (), "yaml:7: key 'beta' stands twice"),
        (BASE + "stages:\n  - {loss: sft, loss: dpo}\n", (), "key 'loss' stands twice"),
        (BASE, ("train_dataset={path: a, path: b}",), "key 'path' stands twice"),
        ("a: " + "[" * 5000, (), "nested too deeply to be read"),
        ("- 1\n", (), "expected keys and values, got list"),
        ("", (), "expected keys and values, got an empty file"),
        (BASE, ("beta",), "'beta': expected key=value"),
        (BASE + "beta: 1\n", ("beta.x.y=1",), "beta is 1, not a section"),
        (BASE, ("stages.sft.beta=1",), "stages.sft.beta: the configuration has no stages"),
        (STAGES, ("stages.dpo.beta=1",), "stages.dpo: no such entry; there are warm, rpo (0 to 1)"),
        (STAGES, ("stages.7.beta=1",), "no such entry"),
    ],
)
def test_one_line_for_what_is_wrong(tmp_path, text, overrides, message):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_without_effect_is_an_error(tmp_path):
    both = STAGES.replace("{loss: rpo, eta: 0.5}", "{loss: rpo, learning_rate: 1e-4}")
    with pytest.raises(UserError, match="every stage sets its own learning_rate; say which: stages"):
        load(tmp_path, both, "learning_rate=1")
    assert load(tmp_path, STAGES, "learning_rate=1").stage_configs()[1].learning_rate == 1


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"nope.yaml: cannot be read \(No such file"):
        load_config(tmp_path / "nope.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: \xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_differing_keys_names_what_changes_the_weights(tmp_path):
    config = load(tmp_path, STAGES)
    changed = dataclasses.replace(config, seed=1, save_steps=3, output_dir="elsewhere").to_dict()
    assert differing_keys(config.to_dict(), changed) == ["seed (42 there, 1 now)"]
    other = load(tmp_path, STAGES, "stages.rpo.eta=0.6", "beta=0.25").to_dict()
    assert sorted(differing_keys(config.to_dict(), other)) == [
        "beta (0.2 there, 0.25 now)", "stages.1.eta (0.5 there, 0.6 now)",
    ]


def test_a_run_written_before_there_was_a_key_had_its_default(tmp_path):
    now = load(tmp_path, BASE).to_dict()
    older = {name: value for name, value in now.items() if name not in ("chat_template_kwargs", "tail", "stages")}
    assert differing_keys(older, now) == []
    assert differing_keys(older, now | {"tail": "rank1"}) == ["tail (exact there, rank1 now)"]
    rounds = config_from({"model_name_or_path": "m", "output_dir": "o", "train_dataset": "t",
                          "rounds": {"scorer": "a:b"}}).to_dict()
    older = rounds | {"rounds": {k: v for k, v in rounds["rounds"].items() if k != "engine"}}
    assert differing(older, rounds) == []


@pytest.mark.parametrize("config", [TrainConfig, RoundsConfig])
def test_every_key_says_what_it_means_and_keeps_its_own_bound(config):
    fields = {field.name for field in dataclasses.fields(config)} - {"loss_options"}
    keys = keys_of(config)
    assert set(keys) == fields
    assert all(about.meaning and about.section for about in keys.values())
    for about in keys.values():
        if about.bound and about.default not in (None, (), dataclasses.MISSING):
            assert BOUNDS[about.bound](about.default), about


def test_what_holds_for_the_whole_run_and_what_may_differ(tmp_path):
    keys = keys_of(TrainConfig)
    assert {"seed", "dtype", "tail", "stages", "output_dir"} <= {k for k in keys if RUN in keys[k].rules}
    assert {"output_dir", "save_steps", "kl_budget", "fsdp"} <= {k for k in keys if FREE in keys[k].rules}
    learnt = ("seed", "dtype", "learning_rate", "max_length", "loss", "prefix_sharing", "train_dataset", "optim")
    assert not [name for name in learnt if FREE in keys[name].rules]
    with pytest.raises(TypeError, match="rules of a key: got {'at least'}"):
        key(1, "", "at least")


def test_stages_are_computed_once(tmp_path):
    config = load(tmp_path, STAGES)
    assert config.stage_configs() is config.stage_configs()
    assert dataclasses.replace(config, seed=3).stage_configs()[1].seed == 3  # another configuration, its own stages


def test_trls_names_of_losses(tmp_path):
    values = yaml.safe_load(BASE)
    for theirs, ours in (("sigmoid", "dpo"), ("sigmoid_norm", "dpo_norm")):
        config = config_from_dict(values | {"loss": theirs, "beta": 0.2})
        assert config.loss == ours and config.loss_fn == losses.get_loss(ours, beta=0.2)
        (stage,) = config_from_dict(values | {"stages": [{"loss": theirs}]}).stage_configs()
        assert stage.loss == ours


def test_other_programs_names_are_none_of_ours_and_lead_to_some():
    ours = {*keys_of(TrainConfig), *(key.name for key in options_of_losses())}
    assert not ours & ALIASES.keys()
    assert {said for said in ALIASES.values() if said.isidentifier()} <= ours
    assert {"bnb_4bit_use_double_quant", "deepspeed", "sequence_len", "cutoff_len", "lora_rank"} <= ALIASES.keys()


def test_help_lists_every_key_with_its_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text(keys_of(TrainConfig).values())
    assert set(keys_of(TrainConfig)) == set(re.findall(r"^  (\w+) \[", text, flags=re.M))
    for line in (
        "  lora_r [16] rank of the adapter (whole number, at least 1)",
        "  bf16 [none] autocast over fp32 weights; None: on a GPU that has it (true / false)",
        "  disable_dropout [true] the model's own dropout and router jitter are off (true / false)",
        "  model_name_or_path [required] hub id, or a local folder (text)",
        "  max_steps [-1] above 0: so many, whatever the epochs (whole number, -1 or at least 1)",
    ):
        assert line in text.splitlines()
