"""From records to batches: reads preference data, tokenises it, orders it and collates it.

    rows -> load_records -> [Record] -> tokenize_records -> [Example] -> batch_order, collate -> Batch
    sources.py  records.py              tokens.py, chat.py               batches.py

`load_examples` (stored.py) does the first three for whole data sets, and keeps their tokens in columns.
Nothing here needs a GPU or knows a loss. Every count a training step needs (sequences, scored tokens, offsets) is a
Python number made here, so that nothing later has to ask the device for it.
"""

from .batches import LAYOUTS, Batch, Layout, batch_order, collate, eval_order, fill_batches, mismatched_parts
from .chat import TEMPLATES, Rendering, tells_the_date
from .records import FORMATS, Invalid, Record, load_prompts, load_records, records_from_rows, stream_records
from .stored import Examples, hashes_of, identity_of, lengths_of, load_examples, tokens_of
from .tokens import KINDS, Example, Kind, TokenizeReport, tokenize_prompts, tokenize_records, with_margins

__all__ = [
    "FORMATS",
    "KINDS",
    "LAYOUTS",
    "TEMPLATES",
    "Batch",
    "Example",
    "Examples",
    "Invalid",
    "Kind",
    "Layout",
    "Record",
    "Rendering",
    "TokenizeReport",
    "batch_order",
    "collate",
    "eval_order",
    "fill_batches",
    "hashes_of",
    "identity_of",
    "lengths_of",
    "load_examples",
    "load_prompts",
    "load_records",
    "mismatched_parts",
    "records_from_rows",
    "stream_records",
    "tells_the_date",
    "tokenize_prompts",
    "tokenize_records",
    "tokens_of",
    "with_margins",
]
