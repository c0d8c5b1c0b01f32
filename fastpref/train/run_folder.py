"""A run's folder: what is read back from it (newest weights, a stage's reference), and what starting over removes."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from fastpref.errors import UserError

from . import checkpoint, sharding
from .config import TrainConfig
from .model import BASE, Policy, fingerprint, load_reference
from .source import source_of

LOG = logging.getLogger("fastpref")
LEFT = ("summary.json", "report.html", "metrics.jsonl", "samples.jsonl", "model", "checkpoints", "tensorboard", BASE)
# Keys whose values may be paths
INPUTS = ("model_name_or_path", "tokenizer_name_or_path", "ref_model_name_or_path", "train_dataset", "eval_dataset",
          "reference_dir", "scorer")


# ---- what is read back -----------------------------------------------------------------------------------------------


def run_of(path: Path) -> Path:
    """The folder of a run that `path` is, or that it is a checkpoint or the model of."""
    for run_dir in (path, *path.absolute().parents[:2]):
        if (run_dir / "config.yaml").is_file():
            return run_dir
    raise UserError(f"{path} is neither the folder of a run nor a checkpoint of one")


def weights_of_run(path: Path, stages: int) -> tuple[Path, int]:
    """Of a run's folder its model/, or its newest checkpoint if it has not ended; of a checkpoint or model/ that. And
    the place of the stage that these come from."""
    if (path / "state.json").is_file():
        return path, checkpoint.read_state(path)[0].stage
    if (path / "model").is_dir():
        return path / "model", stages - 1
    if not (path / "config.yaml").is_file():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"{path}: not a checkpoint that can be read (it has no model)")
        return path, stages - 1
    saved = checkpoint.checkpoints(path)
    if not saved:
        raise UserError(f"{path}: has neither a model nor a checkpoint yet")
    return saved[-1], checkpoint.read_state(saved[-1])[0].stage


def file_of(config: TrainConfig, run_dir: Path, index: int, stage: TrainConfig, split: str) -> Path:
    """Of the reference log-probs of a stage's examples."""
    folder = Path(config.reference_dir) if config.reference_dir else run_dir / "reference"
    return folder / f"{index:02d}-{stage.name}-{split}.safetensors"


def reference_at_start(stage: TrainConfig, tokenizer: PreTrainedTokenizerBase, policy: Policy) -> Policy:
    """What a stage that begins with `policy` compares with."""
    name = stage.ref_model_name_or_path
    return load_reference(stage, tokenizer, name) if name else policy


def reference_again(
    config: TrainConfig, index: int, run_dir: Path, tokenizer: PreTrainedTokenizerBase, expected: str | None,
    load: Callable[..., Policy] = sharding.load,
) -> Policy:
    """The reference of a stage of a run that has moved on since, loaded again; random weights are drawn again.
    expected: its `fingerprint`. load: `load_policy`, for one that every rank has whole.

    Raises UserError where it is gone, or has other weights than it had."""
    stage = config.stage_configs()[index]
    if stage.ref_model_name_or_path:
        source = load_reference(stage, tokenizer, stage.ref_model_name_or_path)
    elif index:
        folder = run_dir / "checkpoints" / checkpoint.folder_name(index, stage.name or "", 0)
        if not folder.is_dir():
            raise UserError(f"{run_dir}: stage {stage.name!r} has no reference log-probs for these data, and "
                            f"{folder.name}, its first weights, is gone")
        source = load(config, tokenizer, folder)
    else:
        checkpoint.seed_everything(config.seed)
        source = load(config, tokenizer)
    if expected is None:
        LOG.warning("%s: there is no record of which weights the reference of stage %r had", run_dir, stage.name)
    elif fingerprint(source.model) != expected:
        name = stage.ref_model_name_or_path or config.model_name_or_path
        raise UserError(f"{run_dir}: stage {stage.name!r}: the reference model ({name}) has other weights, or another "
                        "dtype, than when the stage began")
    return source


def recorded_reference(config: TrainConfig, index: int, run_dir: Path, weights: Path) -> str | None:
    """The fingerprint that the reference of a stage had when it began. weights: the run's model/, or a checkpoint."""
    stage = config.stage_configs()[index]
    if (weights / "state.json").is_file():
        state = checkpoint.read_state(weights)[0]
        if state.reference:
            return state.reference
    elif (run_dir / "summary.json").is_file():
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        if found := summary["stages"][stage.name].get("reference"):
            return str(found)
    for split in ("train", "train-part", "eval"):  # a run from before this was recorded
        try:
            with safe_open(file_of(config, run_dir, index, stage, split), framework="pt") as file:
                return str(json.loads(file.metadata()["header"])["weights"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            pass
    return None


# ---- starting over ---------------------------------------------------------------------------------------------------


def refuse_used(run_dir: Path, config: TrainConfig) -> None:
    used = [name for name in ("checkpoints", "metrics.jsonl", "model", "summary.json") if (run_dir / name).exists()]
    if used and not config.overwrite_output_dir:
        raise UserError(
            f"output_dir {run_dir} holds a run already ({', '.join(used)}): --resume goes on with it, "
            "overwrite_output_dir=true starts over"
        )


def clear(run_dir: Path) -> None:
    """Removes what an earlier run left; its reference log-probs stay, their headers tell whether they fit."""
    for path in (run_dir / name for name in LEFT):
        if path.is_dir():
            checkpoint.remove(path)
        else:
            path.unlink(missing_ok=True)


def refuse_removed(run_dir: Path, names: Iterable[str], config: TrainConfig, **more: Any) -> None:
    """names: what starting over in `run_dir` removes (patterns); more: inputs beside those of `config`, by key.

    Raises UserError for a model, data or cache to be read that is among it, whichever symbolic links lead there."""
    doomed = {form for name in names for path in run_dir.glob(name) for form in _forms(path)}
    for key, value in (_inputs(config) | more).items() if doomed else ():
        for text in _texts(value):
            text = text.removeprefix("implicit:")
            for path in (text, *glob.glob(text)):
                if os.path.lexists(path) and any({form, *form.parents} & doomed for form in _forms(Path(path))):
                    raise UserError(f"{key} is {text}: starting over in output_dir {run_dir} would remove it; set "
                                    "another output_dir, or move it elsewhere")


def _inputs(config: TrainConfig) -> dict[str, Any]:
    """What a run reads, by key; of several stages, by key and stage."""
    found: dict[str, Any] = {}
    for stage in config.stage_configs():
        found |= {f"stages.{stage.name}.{key}" if config.stages else key: getattr(stage, key) for key in INPUTS}
    for key, name in list(found.items()):
        if "model_name" in key and name and (source := source_of(name)).adapter:
            found[f"the model of the adapter {name}"] = source.model
    return found


def _forms(path: Path) -> set[Path]:
    """A path as it is written, where its links lead, and on the way."""
    found = {path.resolve()}
    for _ in range(40):
        found.add(path := Path(os.path.abspath(path)))
        if not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)
