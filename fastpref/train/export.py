"""`fastpref export RUN`: a run's model in a folder of its own, with a card that says what it is, ready to be shared.

An adapter stays one, or is merged: added to the model's weights in fp32, in which the two are the same function up to
rounding, and then cast. A base of 4 or 8 bits is dequantised for it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fastpref.errors import UserError, first_line, refuse
from fastpref.report.card import card_of
from fastpref.report.reading import read_run

from .checkpoint import save, verify
from .config import load_config_of_run
from .display import Display
from .model import is_quantised, load_merged, load_policy, load_tokenizer
from .run_folder import run_of, weights_of_run
from .traits import save_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONVERTER = "convert_hf_to_gguf.py"


def export(path: Path, output: Path | None = None, *, merge: bool = False, dtype: str | None = None,
           gguf: bool = False, push: str | None = None, trust_remote_code: bool = False,
           display: Display | None = None) -> Path:
    """Writes the model of a run (or checkpoint) and a model card to a folder, and returns it.

    output: None: RUN/export. merge: an adapter becomes a whole model. dtype: of the weights; None: as they are (merged:
    fp32). gguf: also a file for llama.cpp. push: a repository of the hub that the folder then goes to.
    Raises UserError for what cannot be, before weights are loaded; SaveError where writing fails.
    """
    display = display or Display()
    run_dir = run_of(path)
    config = load_config_of_run(run_dir, trust_remote_code=trust_remote_code)
    output = output or run_dir / "export"
    adapter, converter = config.use_peft, _converter() if gguf else None
    refuse(
        (merge and not adapter, f"--merge: {run_dir} has no adapter (use_peft is false); leave it out"),
        (adapter and not merge and dtype, "--dtype: an adapter stays as it is; add --merge for whole weights"),
        (adapter and not merge and gguf, "--gguf takes whole weights: add --merge"),
        (gguf and config.reward_model, "--gguf: a reward model has no LM head for llama.cpp to run"),
        (output.exists(), f"{output} is there already: remove it, or set another --output"),
    )
    if push:
        _check_login(push)
    weights, _ = weights_of_run(path, len(config.stage_configs()))
    verify(weights, display.say)
    tokenizer = load_tokenizer(config)
    display.say(f"{weights} -> {output}")
    if adapter and not merge:
        policy = load_policy(config, tokenizer, weights)  # that it loads is worth knowing before it is shared
        model = policy.model
    elif adapter and is_quantised(config):  # peft would merge into codes, and round to them again
        model = load_merged(config, weights, DTYPES[dtype or "fp32"])
    else:
        policy = load_policy(replace(config, dtype="float32", optim=None, bf16=None, gradient_checkpointing="none"),
                             tokenizer, weights)
        model = policy.model.merge_and_unload(safe_merge=True) if adapter else policy.model
        model = model.to(DTYPES[dtype or ("fp32" if merge else _short(config.dtype))])
    card = card_of(read_run(run_dir), config.model_name_or_path, adapter=adapter and not merge,
                   dtype=None if adapter and not merge else str(model.dtype).removeprefix("torch."))

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        if not hasattr(model, "peft_config"):
            save_config(model, folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    save(output, write)
    if converter:
        _convert(converter, output, dtype or "fp32")
    if push:
        _push(output, push)
        display.say(f"pushed to https://huggingface.co/{push}")
    return output


def _short(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16"}[dtype]


def _converter() -> Path:
    """llama.cpp's script: on the PATH, or in the folder that LLAMA_CPP names."""
    places = [shutil.which(CONVERTER), os.path.join(os.environ.get("LLAMA_CPP", ""), CONVERTER)]
    found = next((Path(place) for place in places if place and Path(place).is_file()), None)
    if found is None:
        raise UserError(f"--gguf: llama.cpp's {CONVERTER} is missing: git clone https://github.com/ggml-org/llama.cpp "
                        "and set LLAMA_CPP to that folder")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--gguf: the package gguf is missing: pip install gguf")
    return found


def _convert(converter: Path, folder: Path, dtype: str) -> None:
    kinds = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
    command = [sys.executable, str(converter), str(folder), "--outfile", str(folder / "model.gguf"),
               "--outtype", kinds[dtype]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = next(iter(reversed(done.stderr.strip().splitlines())), "")
        raise UserError(f"--gguf: {converter.name} failed ({last}); {folder} has the other files")


def _check_login(repository: str) -> None:
    from huggingface_hub import whoami

    try:
        whoami()
    except Exception as error:  # no token, no network: each its own kind
        raise UserError(f"--push {repository}: not logged in to the hub, `hf auth login` does ({first_line(error)})"
                        ) from None


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as error:
        raise UserError(f"--push {repository}: {first_line(error)}; {folder} has what was to go there") from None

