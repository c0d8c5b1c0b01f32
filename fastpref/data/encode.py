"""Texts -> token ids, each stretch of text between two control tokens encoded once.

A conversation is rendered as prompt, prompt and chosen, prompt and rejected: most of the text comes three times. A
tokenizer takes control tokens out first and reads what is between them apart, unless it looks beyond it (a space put
before the text's first word). Where it does not, the ids of a text are those of its stretches, in 60 % of the time.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# That do to a stretch of text the same wherever it stands
NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Replace", "Sequence"}
PRE_TOKENIZERS = {"ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Sequence"}


class Texts:
    """Encodes texts without special tokens of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control: dict[str, int] = _apart(tokenizer)
        longest_first = sorted(self.control, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if self.control else None

    def __call__(self, texts: list[str]) -> list[list[int]]:
        if self.pattern is None:
            return self._ids(texts)
        split = [self.pattern.split(text) for text in texts]
        stretches = list(dict.fromkeys(part for parts in split for part in parts[::2] if part))
        ids = dict(zip(stretches, self._ids(stretches) if stretches else [], strict=True))
        found = []
        for parts in split:
            one: list[int] = []
            for i, part in enumerate(parts):
                one += ids.get(part, ()) if i % 2 == 0 else (self.control[part],)
            found.append(one)
        return found

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return found["input_ids"]  # type: ignore[no-any-return]


def _apart(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Control tokens that no other reaches into, and their ids; none where a stretch's place tells."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        return {}
    rules = json.loads(backend.to_str())
    normalizers, pre_tokenizers = _steps(rules["normalizer"]), _steps(rules["pre_tokenizer"])
    if not {step["type"] for step in normalizers} <= NORMALIZERS:
        return {}
    if not {step["type"] for step in pre_tokenizers} <= PRE_TOKENIZERS:
        return {}
    if any(step.get("add_prefix_space") for step in pre_tokenizers):
        return {}
    every = [token["content"] for token in rules["added_tokens"]]
    return {
        token["content"]: token["id"] for token in rules["added_tokens"]
        if token["special"] and not any(token[key] for key in ("normalized", "lstrip", "rstrip", "single_word"))
        and not any(_overlap(token["content"], other) for other in every if other != token["content"])
    }


def _steps(part: Any) -> list[dict[str, Any]]:
    """Of a normalizer or pre-tokenizer, with those of a sequence."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return [part, *(step for one in inner for step in _steps(one))]


def _overlap(token: str, other: str) -> bool:
    if token in other:
        return True
    return any(other.endswith(token[:n]) or other.startswith(token[-n:]) for n in range(1, len(token)))
