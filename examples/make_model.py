"""Makes the quickstart's model folder: a tokenizer trained on its data, and the config of a small Llama. No weights.

    python examples/make_model.py --data examples/data --out examples/model

The tokenizer is a byte-level BPE that keeps digits apart, so that arithmetic is possible, and puts BOS first, as
Llama's does. The model is `AutoModelForCausalLM.from_config` of config.json: randomly initialised, trained from there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCAB = 512


def texts(folder: Path) -> list[str]:
    """What the tokenizer is trained on: everything but the held-out records."""
    found = []
    for name in ("sft", "train"):
        with (folder / f"{name}.jsonl").open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                found += [row[key] for key in ("prompt", "completion", "chosen", "rejected") if key in row]
    return found


def make_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size); with the usual 0.02 copying is learnt twice as late
        tie_word_embeddings=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("examples/data"))
    parser.add_argument("--out", type=Path, default=Path("examples/model"))
    arguments = parser.parse_args()
    tokenizer = make_tokenizer(texts(arguments.data))
    tokenizer.save_pretrained(arguments.out)
    path = arguments.out / "tokenizer_config.json"  # transformers 5 writes a class name that 4 does not know
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2) + "\n")
    make_config(tokenizer).save_pretrained(arguments.out)
    print(f"{arguments.out}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
