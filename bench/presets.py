"""Models whose sizes the benchmarks know by name: sizes of the head and the configuration of the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .problem import Shape


@dataclass(frozen=True)
class Preset:
    """Scored rows and pairs are what one GPU (cpu-small: two cores) takes in a micro-batch."""

    shape: Shape
    model_type: str  # of transformers.AutoConfig
    config: dict[str, Any]  # beside hidden_size and vocab_size


PRESETS = {
    "llama3-8b": Preset(
        Shape(8192, 4096, 128256, pairs=8),
        "llama",
        dict(intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
    ),
    # Its published config.json, but for the ids of special tokens: long contexts cost nothing here.
    "llama3.1-8b": Preset(
        Shape(8192, 4096, 128256, pairs=8),
        "llama",
        dict(
            intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
            max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=False,
            rope_scaling=dict(
                rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        ),
    ),
    "qwen2.5-7b": Preset(
        Shape(8192, 3584, 152064, pairs=8),
        "qwen2",
        dict(intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4),
    ),
    "gemma2-9b": Preset(
        Shape(8192, 3584, 256000, pairs=8, softcap=30.0),
        "gemma2",
        dict(
            intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8, head_dim=256,
            final_logit_softcapping=30.0,
        ),
    ),
    "mistral-7b": Preset(
        Shape(16384, 4096, 32000, pairs=16),
        "mistral",
        dict(intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
    ),
    "cpu-small": Preset(
        Shape(2048, 512, 32000, pairs=8),
        "llama",
        dict(intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4),
    ),
}
QUICK = Preset(
    Shape(64, 64, 4096, pairs=4),
    "llama",
    dict(intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
)
