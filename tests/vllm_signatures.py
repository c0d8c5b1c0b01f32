"""The signatures of vLLM that we call, as its wheel 0.33.0 (commit 4ba787ec9) has them: names, kinds, defaults.

Of an installed vLLM `published` reads its own instead.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect

NOT_A_FACT_WE_USE = None  # defaults that are objects of vLLM's


class LLM:
    def __init__(
        self, model, *, runner="auto", convert="auto", tokenizer=None, tokenizer_mode="auto", skip_tokenizer_init=False,
        trust_remote_code=False, allowed_local_media_path="", allowed_media_domains=None, tensor_parallel_size=1,
        dtype="auto", quantization=None, revision=None, tokenizer_revision=None, chat_template=None, seed=0,
        gpu_memory_utilization=0.92, cpu_offload_gb=0, offload_group_size=0, offload_num_in_group=1,
        offload_prefetch_step=1, offload_params=None, enforce_eager=False, enable_return_routed_experts=False,
        return_sampling_mask=False, disable_custom_all_reduce=False, hf_token=None, hf_overrides=None,
        mm_processor_kwargs=None, pooler_config=None, structured_outputs_config=None, profiler_config=None,
        attention_config=None, kv_cache_memory_bytes=None, compilation_config=None, quantization_config=None,
        logits_processors=None, spec_method=None, spec_model=None, spec_tokens=None, **kwargs,
    ): ...

    def generate(
        self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None,
        tokenization_kwargs=None, mm_processor_kwargs=None,
    ): ...


class SamplingParams:
    def __init__(
        self, n=1, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, temperature=1.0,
        watermarking=None, top_p=1.0, top_k=0, min_p=0.0, seed=None, stop=None, stop_token_ids=None, ignore_eos=False,
        max_tokens=16, min_tokens=0, logprobs=None, prompt_logprobs=None, prompt_logprob_token_ids=None,
        prompt_logprob_start=None, logprob_token_ids=None, flat_logprobs=False, detokenize=True,
        skip_special_tokens=True, spaces_between_special_tokens=True, include_stop_str_in_output=False,
        output_kind=NOT_A_FACT_WE_USE, stream_interval=None, skip_clone=False, output_text_buffer_length=0,
        _eos_token_id=None, _all_stop_token_ids=NOT_A_FACT_WE_USE, _watermarking_skipped=False,
        structured_outputs=None, logit_bias=None, allowed_token_ids=None, extra_args=None, bad_words=None,
        _bad_words_token_ids=None, skip_reading_prefix_cache=None, thinking_token_budget=None,
        repetition_detection=None, routed_experts_prompt_start=0, trace_decode_token_ids=None,
    ): ...


class EngineCoreClient:
    def shutdown(self, timeout=None): ...


STUBS = {"LLM": ("vllm.entrypoints.llm", LLM), "SamplingParams": ("vllm.sampling_params", SamplingParams),
         "EngineCoreClient": ("vllm.v1.engine.core_client", EngineCoreClient)}
# Fields: those of EngineArgs that LLM(**kwargs) may be given and we give, of a prompt, and of a completion.
FIELDS = {
    "EngineArgs": ("vllm.engine.arg_utils", {"generation_config", "max_model_len"}),
    "TokensPrompt": ("vllm.inputs", {"prompt_token_ids", "prompt", "token_type_ids", "prompt_token_offsets"}),
    "CompletionOutput": ("vllm.outputs", {
        "index", "text", "token_ids", "cumulative_logprob", "logprobs", "routed_experts", "finish_reason",
        "stop_reason", "lora_request", "sampling_mask", "spec_decode_metrics", "weight_versions"}),
}
INSTALLED = importlib.util.find_spec("vllm") is not None
# At once: a test may put something else in vllm's place.
CLASSES = {name: getattr(importlib.import_module(module), name)
           for name, (module, _) in (STUBS | FIELDS).items()} if INSTALLED else {}


def published(name: str, method: str) -> inspect.Signature:
    """Of a class's method, `self` included."""
    found = CLASSES.get(name, STUBS[name][1])
    if INSTALLED and name == "SamplingParams":  # a msgspec.Struct: its class has the signature
        bare = inspect.signature(found)
        return bare.replace(parameters=[inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY),
                                        *bare.parameters.values()])
    return inspect.signature(getattr(found, method))


def fields(name: str) -> set[str]:
    if not INSTALLED:
        return FIELDS[name][1]
    found = CLASSES[name]
    if dataclasses.is_dataclass(found):
        return {field.name for field in dataclasses.fields(found)}
    return {key for base in found.__mro__ for key in getattr(base, "__annotations__", ())}
