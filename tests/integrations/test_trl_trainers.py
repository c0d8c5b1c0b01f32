"""The fused trainers against TRL's own: curves, metrics and weights, for every loss type and option of the configs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, TrainingArguments

trl = pytest.importorskip("trl")

from trl.trainer.base_config import _BaseConfig  # noqa: E402

from fastpref.integrations.trl import FusedDPOTrainer, FusedKTOTrainer, kernel  # noqa: E402
from fastpref.integrations.trl.options import DPO_LOSSES, KNOWN, refuse_config  # noqa: E402
from tests.integrations.trl_world import (  # noqa: E402
    arguments,
    assert_same_entries,
    assert_same_history,
    history,
    make_dpo,
    make_kto,
    make_model,
    make_tokenizer,
    pairs,
    perturbed,
    unpaired,
)
from tests.train.tiny import make_config  # noqa: E402


def assert_same_weights(ours, theirs, tolerance=2e-6):
    its = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(
            parameter, its[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def both(make, classes, folder, model=None, **given):
    """TRL's trainer and ours after training on the same things. SGD: weights show gradients, in proportion."""
    model = make_model() if model is None else model
    trainers = []
    for cls in classes:
        trainers.append(make(cls, folder, copy.deepcopy(model), **{"optim": "sgd", "learning_rate": 0.1} | given))
        trainers[-1].train()
    return trainers


MAKERS = {
    "dpo": (make_dpo, (trl.DPOTrainer, FusedDPOTrainer)),
    "kto": (make_kto, (trl.KTOTrainer, FusedKTOTrainer)),
}
BOTH = {name: functools.partial(both, *maker) for name, maker in MAKERS.items()}
both_dpo, both_kto = BOTH["dpo"], BOTH["kto"]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "tied"])
@pytest.mark.parametrize("trainer", BOTH)
def test_twenty_steps_are_trls(trainer, kind, tmp_path):
    theirs, ours = BOTH[trainer](tmp_path, make_model(kind), max_steps=20, optim="adamw_torch", learning_rate=1e-3)
    losses = [entry["loss"] for entry in history(theirs) if "loss" in entry]
    assert len(losses) == 20 and abs(losses[0] - losses[-1]) > 1e-2
    assert_same_history(ours, theirs)


SMOOTHED = {"robust": 0.2, "exo_pair": 1e-3, "aot": 0.1, "aot_unpaired": 0.1}
SCORED = ["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop"]


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_dpo_loss(loss_type, tmp_path):
    theirs, ours = both_dpo(tmp_path, loss_type=loss_type, label_smoothing=SMOOTHED.get(loss_type, 0.0), max_steps=2)
    assert_same_history(ours, theirs)
    assert_same_weights(ours, theirs)


DIVERGENCES = {
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "alpha 1": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dpo_divergence(divergence, tmp_path):
    """All losses that have one, at once."""
    theirs, ours = both_dpo(tmp_path, loss_type=SCORED, label_smoothing=0.1, max_steps=1, **DIVERGENCES[divergence])
    assert_same_history(ours, theirs)
    assert_same_weights(ours, theirs)


OPTIONS = {
    "beta": {"beta": 0.5},
    "mixed": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "mixed, unweighted": {"loss_type": ["sigmoid", "ipo"]},
    "discopop_tau": {"loss_type": "discopop", "discopop_tau": 0.2},
    "wpo": {"use_weighting": True},
    "wpo, mixed": {"use_weighting": True, "loss_type": ["sigmoid", "nca_pair"], "loss_weights": [0.5, 2.0]},
    "ld_alpha": {"ld_alpha": 0.3},
    "ld_alpha 0, ipo": {"ld_alpha": 0.0, "loss_type": "ipo"},
    "precomputed": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 5},
    "precomputed, ld_alpha": {"precompute_ref_log_probs": True, "ld_alpha": 0.5},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.7},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "truncation": {"max_length": 12},
    "no max_length": {"max_length": None},
    "no checkpointing": {"gradient_checkpointing": False},
    "padding": {"pad_to_multiple_of": 16},
    "bf16": {"bf16": True},
    "bf16, saved between": {"bf16": True, "save_strategy": "steps", "save_steps": 1, "precompute_ref_log_probs": True},
    "dropout left on": {"disable_dropout": False},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_dpo_option(option, tmp_path):
    theirs, ours = both_dpo(tmp_path, **OPTIONS[option])
    rough = option.startswith("bf16")  # two ways to round
    assert_same_history(ours, theirs, 3e-2 if rough else 1e-5)
    assert_same_weights(ours, theirs, 2e-3 if rough else 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", BOTH)
def test_compiled(trainer, tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_checkpointing": False}
    theirs, ours = BOTH[trainer](tmp_path, **compiled)
    assert_same_history(ours, theirs)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "wpo"])
@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm", ["sigmoid", "ipo"], "sigmoid"])
def test_dpo_responses_without_a_prompt(loss_type, weighted, tmp_path):
    """Cut from the left, whole windows are responses, whose first token TRL counts in the lengths it divides by, and
    not in those of WPO's weights."""
    theirs, ours = both_dpo(
        tmp_path, loss_type=loss_type, max_length=4, truncation_mode="keep_end", max_steps=2, use_weighting=weighted
    )
    assert_same_history(ours, theirs)
    assert_same_weights(ours, theirs)


def mixtral():
    torch.manual_seed(3)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, num_local_experts=4, num_experts_per_tok=2,
            router_aux_loss_coef=0.02, initializer_range=0.2,
        )
    )


@pytest.mark.parametrize("coefficient", [None, 0.5, 0.0])
@pytest.mark.parametrize("trainer", BOTH)
def test_router_loss(trainer, coefficient, tmp_path):
    theirs, ours = BOTH[trainer](tmp_path, mixtral(), router_aux_loss_coef=coefficient)
    assert ("aux_loss" in history(theirs)[0]) == (coefficient != 0.0)
    assert_same_history(ours, theirs)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize(
    "given",
    [
        {"loss_type": "apo_zero_unpaired", "desirable_weight": 0.5, "undesirable_weight": 2.0},
        {"desirable_weight": 1.5, "undesirable_weight": 0.25, "beta": 0.4},
        {"precompute_ref_log_probs": True},
        {"loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True},
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"max_length": 10, "pad_to_multiple_of": 8, "gradient_checkpointing": False},
        {"disable_dropout": False},
    ],
    ids=lambda given: ", ".join(given),
)
def test_kto_option(given, tmp_path):
    theirs, ours = both_kto(tmp_path, **given)
    assert_same_history(ours, theirs)
    assert_same_weights(ours, theirs)


def test_kto_batches_of_one_kind(tmp_path):
    """No desirable or no undesirable sequence: their metrics are left out, as TRL does."""
    rows = unpaired(8).sort("label")
    theirs, ours = both_kto(tmp_path, train_dataset=rows, per_device_train_batch_size=2, max_steps=4)
    assert any("rewards/chosen" not in entry for entry in history(theirs))
    assert_same_history(ours, theirs)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("trainer", BOTH)
def test_a_model_by_its_folder(trainer, precompute, tmp_path):
    """Its own reference: loaded a second time, or itself before training."""
    make_model().save_pretrained(tmp_path / "model")
    given = {"ref_model": None, "precompute_ref_log_probs": precompute, "model_init_kwargs": {"dtype": "float32"}}
    theirs, ours = BOTH[trainer](tmp_path, str(tmp_path / "model"), **given)
    assert history(ours)[0]["loss"] == pytest.approx({"dpo": math.log(2), "kto": 0.5}[trainer], abs=1e-5)
    mine, its = history(ours), history(theirs)
    for entries in (mine, its):
        entries[0].pop("rewards/accuracies", None)  # of a policy that is the reference: rounding decides
    assert_same_entries(mine, its)
    assert_same_weights(ours, theirs)


def lora(**changes):
    peft = pytest.importorskip("peft")
    values = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.LoraConfig(task_type="CAUSAL_LM", **(values | changes))


@pytest.mark.parametrize("trainer", BOTH)
@pytest.mark.parametrize("way", ["new", "continued", "modules_to_save"])
def test_peft(trainer, way, tmp_path):
    """The reference is the model without its adapter; of an adapter that is trained on, a copy of it."""
    peft = pytest.importorskip("peft")
    model, given = make_model(), {"peft_config": lora()}
    if way == "modules_to_save":
        given["peft_config"] = lora(modules_to_save=["lm_head"])
    if way == "continued":
        torch.manual_seed(7)
        model, given = peft.get_peft_model(model, lora()), {"ref_model": None}
    theirs, ours = BOTH[trainer](tmp_path, model, **given)
    assert any(p.requires_grad for p in ours.model.parameters())
    assert_same_history(ours, theirs)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("cls", [FusedDPOTrainer, FusedKTOTrainer])
def test_lora_on_the_head_is_refused(cls, tmp_path):
    make = make_dpo if cls is FusedDPOTrainer else make_kto
    with pytest.raises(ValueError, match="lm_head"):
        make(cls, tmp_path, peft_config=lora(target_modules=["q_proj", "lm_head"]))


def test_virtual_tokens_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"peft_config is 'PROMPT_TUNING'; .*patch\(\)"):
        make_dpo(FusedDPOTrainer, tmp_path, peft_config=config)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation, checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def last_token_share(prediction):
    return {"top": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.parametrize("trainer", BOTH)
def test_evaluate(trainer, tmp_path):
    """While it trains, afterwards, and without any training."""
    data = {"eval_dataset": pairs(7, seed=2) if trainer == "dpo" else unpaired(7, seed=2)}
    theirs, ours = BOTH[trainer](tmp_path, eval_strategy="steps", eval_steps=2, max_steps=4, **data)
    assert sum("eval_loss" in entry for entry in history(theirs)) == 2
    a, b = ours.evaluate(), theirs.evaluate()
    assert a.keys() == b.keys() and "eval_rewards/chosen" in a
    assert_same_history(ours, theirs)
    make, classes = MAKERS[trainer]
    fresh = [make(cls, tmp_path, **data).evaluate()["eval_loss"] for cls in classes]
    assert fresh[1] == pytest.approx(fresh[0], abs=1e-5)


def test_evaluate_other_data_and_precomputed(tmp_path):
    theirs, ours = both_dpo(tmp_path, precompute_ref_log_probs=True, eval_dataset={"a": pairs(4, 3), "b": pairs(5, 4)})
    a, b = (trainer.evaluate(pairs(5, seed=9)) for trainer in (ours, theirs))
    assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=1e-5)
    ours.evaluate(), theirs.evaluate()
    assert_same_history(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*return_outputs")
def test_compute_metrics_gets_the_logits(tmp_path):
    given = {"eval_dataset": pairs(5, seed=2), "compute_metrics": last_token_share, "pad_to_multiple_of": 32}
    theirs, ours = both_dpo(tmp_path, max_steps=1, **given)
    a, b = ours.evaluate(), theirs.evaluate()
    assert a["eval_top"] == b["eval_top"]
    assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("trainer", BOTH)
def test_save_and_resume(trainer, tmp_path):
    """Half a run, and the rest from its checkpoint, give what the whole run gives, bitwise; TRL reads our files."""
    make, (its, cls) = MAKERS[trainer]
    whole = make(cls, tmp_path / "whole", max_steps=6)
    whole.train()
    half = make(cls, tmp_path / "half", max_steps=6, save_strategy="steps", save_steps=3)
    half.train()
    folder = tmp_path / "half" / "checkpoint-3"
    for kind, exact in ((cls, True), (its, False)):
        resumed = make(kind, tmp_path / kind.__name__, max_steps=6)
        resumed.train(resume_from_checkpoint=str(folder))
        for (name, a), b in zip(resumed.model.named_parameters(), whole.model.parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=0 if exact else 2e-5, msg=name)
    saved = type(whole.model).from_pretrained(tmp_path / "half" / "checkpoint-6")
    for a, b in zip(saved.parameters(), whole.model.parameters()):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

REFUSED = {
    "padding_free": ({"padding_free": True}, "padding_free is True; .*leave it False"),
    "smoothing of sigmoid": ({"label_smoothing": 0.1}, "label_smoothing is 0.1; .*'robust'"),
    "smoothing of ipo": ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing is 0.1"),
    "smoothing of robust": ({"label_smoothing": 0.6, "loss_type": "robust"}, "label_smoothing is 0.6"),
    "smoothing of tokens": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1; .*robust"),
    "discopop_tau": ({"discopop_tau": 0.1}, "discopop_tau is 0.1; .*'discopop'"),
    "alpha without its divergence": ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef is 0.3; .*alpha_div"),
    "loss_type": ({"loss_type": "simpo"}, "loss_type is 'simpo'; it takes sigmoid, "),
    "ld_alpha": ({"ld_alpha": 1.5}, "ld_alpha is 1.5; it takes"),
    "ld_alpha, sft": ({"ld_alpha": 0.5, "loss_type": ["sigmoid", "sft"]}, r"ld_alpha is 0.5; .*'sft': .*patch\(\)"),
    "ld_alpha, wpo": ({"ld_alpha": 0.5, "use_weighting": True}, r"ld_alpha is 0.5; .*use_weighting.*patch\(\)"),
    "wpo, sft": ({"use_weighting": True, "loss_type": ["sigmoid", "sft"]}, "use_weighting is True; loss_type 'sft'"),
    "wpo, aot": ({"use_weighting": True, "loss_type": "aot"}, "use_weighting is True; loss_type 'aot'"),
    "beta": ({"beta": 0.0}, "beta is 0.0"),
    "divergence of aot": ({"loss_type": "aot", "f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl'"),
    "divergence": ({"f_divergence_type": "renyi"}, "f_divergence"),
    "sync, precomputed": ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "sync_ref_model=True"),
    "router of none": ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_construction(case, tmp_path):
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make_dpo(FusedDPOTrainer, tmp_path, **given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"loss_type": "bco"}, "loss_type is 'bco'; it takes kto, apo_zero_unpaired"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"desirable_weight": -1.0}, "desirable_weight is -1.0; it takes a number of at least 0"),
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy='random'"),
        ({"per_device_train_batch_size": 1}, "batch size must be > 1"),
    ],
)
def test_kto_refused_at_construction(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_kto(FusedKTOTrainer, tmp_path, **given)


def test_an_unknown_trl_is_refused(tmp_path, monkeypatch):
    """What a trainer replaces was changed: refused, with its hash and a command. What it does not replace may."""
    kernel.check_version.cache_clear()
    with monkeypatch.context() as changed:
        changed.setattr(trl, "__version__", "2.0.0")
        changed.setattr(trl.KTOTrainer, "_compute_loss", lambda self, model, inputs, return_outputs: 0)
        make_dpo(FusedDPOTrainer, tmp_path)
        message = r"TRL 2.0.0 is not supported: its KTOTrainer._compute_loss \([0-9a-f]{12}\) .*; pip install 'trl=="
        with pytest.raises(ImportError, match=message):
            make_kto(FusedKTOTrainer, tmp_path)
    kernel.check_version.cache_clear()


def test_an_option_that_only_a_newer_trl_has_is_refused(tmp_path):
    @dataclasses.dataclass
    class Newer(trl.DPOConfig):
        margin_scale: float = 1.0
        others: list[int] = dataclasses.field(default_factory=list)

    refuse_config(arguments(Newer, tmp_path))
    with pytest.raises(ValueError, match="margin_scale is 2.0; a newer TRL has it .*: leave it 1.0, or use TRL's own"):
        refuse_config(arguments(Newer, tmp_path, margin_scale=2.0))


def test_what_only_others_have_is_refused(tmp_path):
    """DeepSpeed does not run here: the checks alone."""
    config = arguments(trl.DPOConfig, tmp_path)
    config.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match="deepspeed is 'ZeRO-3'; .*FSDP2"):
        refuse_config(config)
    config.deepspeed_plugin.zero_stage = 2
    refuse_config(config)


@pytest.mark.parametrize("kind", ["Dataset", "IterableDataset"])
@pytest.mark.parametrize("trainer", MAKERS)
def test_images_are_refused_before_a_model_is_loaded(trainer, kind, tmp_path):
    make, (_, cls) = MAKERS[trainer]
    data = Dataset.from_list([{"images": [], "prompt": "a", "chosen": "b", "rejected": "c"}])
    data = data if kind == "Dataset" else data.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"^train_dataset has a column 'images'; the fused .* text: .*patch\(\)$"):
        make(cls, tmp_path, "no/such/model", ref_model=None, train_dataset=data)


@pytest.mark.parametrize("cls", [trl.DPOTrainer, FusedDPOTrainer])
def test_a_token_beyond_the_vocabulary_is_an_error(cls, tmp_path):
    """Never a number: the embedding refuses it, as under TRL."""
    model = LlamaForCausalLM(make_config(vocab_size=60))
    with pytest.raises(IndexError):
        make_dpo(cls, tmp_path, model).train()


# Every option that TRL's configs have beyond transformers', and where it is dealt with. A new one makes this fail: then
# decide whether the fused trainers honour or refuse it.
THEIRS = "in code of TRL's or transformers' that the fused trainers do not touch"
HERE = "honoured in fastpref/integrations/trl, compared above"
BASE_FIELDS = dict.fromkeys(
    "logging_steps gradient_checkpointing bf16 lr_scheduler_kwargs use_liger_kernel torch_empty_cache_steps".split(),
    THEIRS,
)
COMMON_FIELDS = BASE_FIELDS | {
    "learning_rate": THEIRS,
    "model_init_kwargs": THEIRS,
    "trust_remote_code": THEIRS,
    "router_aux_loss_coef": HERE,
    "disable_dropout": THEIRS,
    "dataset_num_proc": THEIRS,
    "max_length": THEIRS,
    "pad_to_multiple_of": THEIRS,
    "precompute_ref_log_probs": HERE,
    "precompute_ref_batch_size": THEIRS,
    "loss_type": HERE,
    "beta": HERE,
    "activation_offloading": THEIRS,  # and needs an accelerator
    "sync_ref_model": THEIRS,
    "ref_model_mixup_alpha": THEIRS,
    "ref_model_sync_steps": THEIRS,
}
FIELDS = {
    trl.DPOConfig: COMMON_FIELDS
    | {
        "truncation_mode": THEIRS,
        "pad_token": THEIRS,
        "padding_free": "refused",
        "loss_weights": HERE,
        "ld_alpha": HERE,
        "f_divergence_type": HERE,
        "f_alpha_divergence_coef": HERE,
        "label_smoothing": HERE,
        "use_weighting": HERE,
        "discopop_tau": HERE,
    },
    trl.KTOConfig: COMMON_FIELDS
    | {"train_sampling_strategy": THEIRS, "desirable_weight": HERE, "undesirable_weight": HERE},
}


@pytest.mark.parametrize("config", FIELDS)
def test_every_option_is_dealt_with(config):
    own = {f.name for f in dataclasses.fields(config)} - {f.name for f in dataclasses.fields(TrainingArguments)}
    overridden = {name for cls in (config, _BaseConfig) for name in cls.__annotations__ if not name.startswith("_")}
    assert own | overridden == set(FIELDS[config])
    assert own <= KNOWN


def test_every_loss_type_of_trls_is_known():
    """As its config documents them."""
    documented = next(f for f in dataclasses.fields(trl.DPOConfig) if f.name == "loss_type").metadata["help"]
    assert all(f"`'{name}'`" in documented for name in DPO_LOSSES)
    assert documented.count("`'") == len(DPO_LOSSES)
    choices = next(f for f in dataclasses.fields(trl.KTOConfig) if f.name == "loss_type").metadata["choices"]
    assert choices == ["kto", "apo_zero_unpaired"]


def test_arguments_by_place(tmp_path):
    """The constructor is TRL's."""
    model = make_model()
    args = arguments(trl.DPOConfig, tmp_path)
    trainer = FusedDPOTrainer(model, perturbed(model), args, None, pairs(4), None, make_tokenizer())
    assert trainer.args is args and len(trainer.train_dataset) == 4
