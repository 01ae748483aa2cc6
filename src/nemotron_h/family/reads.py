"""Bytes that one step has to read, by arithmetic alone: no torch, no allocation.

`config` is anything with the table's fields as attributes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nemotron_h.family.arithmetic import DTYPE_BYTES, Layer, block_tensors, cache_bytes, grouped


@dataclass(frozen=True)
class Reads:
    """Bytes read for a step.

    weights: what its tokens use: all matrices but the experts that no token goes to, and a row of the embedding each.
    states: Mamba's SSM states and convolution windows. keys_values: of the tokens before.
    """

    weights: int
    states: int
    keys_values: int

    @property
    def total(self) -> int:
        return self.weights + self.states + self.keys_values


def decode_reads(
    config: Any,
    matrix_bits: float,
    other_bytes: float,
    context: int,
    cache_dtype: str = "bfloat16",
    head_bits: float | None = None,
    tokens: int = 1,
    sequences: int = 1,
) -> Reads:
    """The reads of the trunk; MTP heads are not in them. Experts are counted as if the router chose at random.

    Args:
        matrix_bits: Per weight of a projection, an expert, the embedding or the output head, scales included.
        other_bytes: Per element of everything else: routers, norms, convolutions, biases.
        context: Tokens already in the cache.
        cache_dtype: Of keys, values and convolution windows.
        head_bits: Of the output head, where it is stored otherwise than the other matrices.
        tokens: Of each sequence in the step.
        sequences: That go through the step together, each behind its own `context`.

    Raises:
        UnsupportedError: a block type without a tensor table.
    """
    hidden = config.hidden_size
    head_bits = matrix_bits if head_bits is None else head_bits
    rows = tokens * sequences
    matrices, others, seen = rows * hidden, hidden, 0
    for sizes, number, part in grouped(config):
        if part == "mtp":
            continue
        packed, plain = _block(config, sizes, rows)
        matrices, others = matrices + number * packed, others + number * (plain + hidden)
        if sizes.block_type == "attention":
            seen += number * min(context, sizes.sliding_window or context)
    keys = 2 * config.num_key_value_heads * config.head_dim * DTYPE_BYTES[cache_dtype]
    head = config.vocab_size * hidden * head_bits / 8
    weights = math.ceil(matrices * matrix_bits / 8 + head + others * other_bytes)
    fixed = sequences * cache_bytes(config, cache_dtype).fixed
    return Reads(weights, fixed, math.ceil(sequences * seen * keys))


def experts_read(sizes: Layer, rows: int) -> float:
    """Different experts that `rows` tokens go to, on average, where each goes to its number of them at random."""
    experts, chosen = sizes.n_routed_experts, sizes.num_experts_per_tok
    return chosen if rows == 1 else experts * (1 - (1 - chosen / experts) ** rows)


def _block(config: Any, sizes: Layer, rows: int) -> tuple[float, int]:
    """Elements that `rows` tokens use: (of matrices, of everything else) of a block's mixer."""
    one = Layer(**{**sizes.__dict__, "n_routed_experts": 1}) if sizes.block_type == "moe" else sizes
    matrices, others = 0.0, 0
    for name, shape in block_tensors(config, one):
        size = math.prod(shape)
        if name.startswith("gate."):  # all experts are scored
            others += size * sizes.n_routed_experts
        elif len(shape) != 2:
            others += size
        else:
            matrices += size * (experts_read(sizes, rows) if name.startswith("experts.") else 1)
    return matrices, others
