"""What a run's configuration says of conversations: template, date, ends of turns."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from fastpref.data import TEMPLATES, Rendering, tells_the_date
from fastpref.errors import UserError, first_line
from fastpref.files import write_text

from .config import TrainConfig
from .source import source_of_run


def rendering_of(stage: TrainConfig) -> Rendering:
    source = source_of_run(stage)
    stops = ends_of_generation(source.model, source.revision, stage.trust_remote_code)
    return Rendering(stage.train_on, stage.chat_template_kwargs, stage.chat_template_date,
                     stage.sanitize_control_tokens, stops)


@functools.lru_cache
def ends_of_generation(name: str, revision: str = "main", trust_remote_code: bool = False) -> frozenset[int]:
    """The tokens that a model's generation ends with: of its generation_config.json, as transformers reads it, or else
    of its configuration."""
    try:
        found: Any = GenerationConfig.from_pretrained(name, revision=revision)
    except Exception:  # no such file, or one that another version wrote
        try:
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
            found = GenerationConfig.from_model_config(config)
        except Exception:  # its loading tells why, in its place
            return frozenset()
    ends = found.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def set_template(tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> None:
    """`chat_template` of a configuration, which the saved tokenizer then has too."""
    if config.chat_template is None:
        return
    if (template := TEMPLATES.get(config.chat_template)) is None:
        try:
            template = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"chat_template is {config.chat_template!r}, a file that cannot be read ({first_line(error)}); it "
                f"takes a file with a template, or {', '.join(TEMPLATES)}"
            ) from None
    tokenizer.chat_template = template


def dated(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainConfig:
    """With the date that the chat template tells, if it tells one: the configuration's, or that of the run in
    output_dir, or of the log-probs in reference_dir; else today."""
    if config.chat_template_date or not tells_the_date(tokenizer):
        return config
    saved = Path(config.output_dir, "config.yaml")
    date = None
    if saved.is_file() and not config.overwrite_output_dir:
        date = yaml.safe_load(saved.read_text(encoding="utf-8")).get("chat_template_date")
    kept = _kept(config)
    if date is None and kept.is_file() and (config.reference_dir or not config.overwrite_output_dir):
        date = kept.read_text(encoding="utf-8").strip()
    return dataclasses.replace(config, chat_template_date=date or datetime.date.today().isoformat())


def keep_date(config: TrainConfig) -> None:
    """Beside the reference log-probs, which depend on it, for runs that begin another day."""
    if config.chat_template_date:
        kept = _kept(config)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, config.chat_template_date + "\n")


def _kept(config: TrainConfig) -> Path:
    return Path(config.reference_dir or Path(config.output_dir, "reference"), "chat_template_date.txt")
