"""The family as data: field table, spellings, rules, block types, presets, parameter and memory arithmetic.

Nothing in this package imports torch or transformers, so that `nemotron-h info` answers at once.
"""

from nemotron_h.family.arithmetic import (
    DTYPE_BYTES,
    CacheBytes,
    Count,
    Layer,
    cache_bytes,
    count,
    describe,
    layer,
    mtp_layer,
    mtp_tensors,
    tensors,
)
from nemotron_h.family.blocks import BLOCKS, BlockType, pattern
from nemotron_h.family.blocks import add as add_block
from nemotron_h.family.fields import ACTIVATIONS, ALIASES, FIELDS, MOE_FIELDS, Field
from nemotron_h.family.memory import (
    Training,
    Unit,
    full_training,
    largest_unit,
    lora_parameters,
    lora_training,
    units,
)
from nemotron_h.family.operations import Operations, operations
from nemotron_h.family.presets import PRESETS, preset, presets
from nemotron_h.family.reads import Reads, decode_reads
from nemotron_h.family.rules import check, check_field
from nemotron_h.family.spelling import (
    CODE_KEYS,
    INERT,
    canonical_name,
    check_model_type,
    decode,
    language_model,
    override,
    read,
    refuse_typo,
)

__all__ = [
    "ACTIVATIONS",
    "ALIASES",
    "BLOCKS",
    "CODE_KEYS",
    "DTYPE_BYTES",
    "FIELDS",
    "INERT",
    "MOE_FIELDS",
    "PRESETS",
    "BlockType",
    "CacheBytes",
    "Count",
    "Field",
    "Layer",
    "Operations",
    "Reads",
    "Training",
    "Unit",
    "add_block",
    "cache_bytes",
    "canonical_name",
    "check",
    "check_field",
    "check_model_type",
    "count",
    "decode",
    "decode_reads",
    "describe",
    "full_training",
    "language_model",
    "largest_unit",
    "layer",
    "lora_parameters",
    "lora_training",
    "mtp_layer",
    "mtp_tensors",
    "operations",
    "override",
    "pattern",
    "preset",
    "presets",
    "read",
    "refuse_typo",
    "tensors",
    "units",
]
