"""Bytes that one decode step has to read, by arithmetic alone: no torch, no allocation.

`config` is anything with the table's fields as attributes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nemotron_h.family.arithmetic import DTYPE_BYTES, Layer, block_tensors, cache_bytes, grouped


@dataclass(frozen=True)
class Reads:
    """Bytes read for one token of one sequence.

    weights: what the token uses: all matrices but the experts that the router leaves out, and one row of the embedding.
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
) -> Reads:
    """The reads of the trunk; MTP heads are not in them.

    Args:
        matrix_bits: Per weight of a projection, an expert, the embedding or the output head, scales included.
        other_bytes: Per element of everything else: routers, norms, convolutions, biases.
        context: Tokens already in the cache.
        cache_dtype: Of keys, values and convolution windows.
        head_bits: Of the output head, where it is stored otherwise than the other matrices.

    Raises:
        UnsupportedError: a block type without a tensor table.
    """
    hidden = config.hidden_size
    head_bits = matrix_bits if head_bits is None else head_bits
    matrices, others, seen = hidden, hidden, 0
    for sizes, number, part in grouped(config):
        if part == "mtp":
            continue
        packed, plain = _block(config, sizes)
        matrices, others = matrices + number * packed, others + number * (plain + hidden)
        if sizes.block_type == "attention":
            seen += number * min(context, sizes.sliding_window or context)
    keys = 2 * config.num_key_value_heads * config.head_dim * DTYPE_BYTES[cache_dtype]
    head = config.vocab_size * hidden * head_bits / 8
    weights = math.ceil(matrices * matrix_bits / 8 + head + others * other_bytes)
    return Reads(weights, cache_bytes(config, cache_dtype).fixed, math.ceil(seen * keys))


def _block(config: Any, sizes: Layer) -> tuple[int, int]:
    """Elements that one token uses: (of matrices, of everything else) of a block's mixer."""
    one = Layer(**{**sizes.__dict__, "n_routed_experts": 1}) if sizes.block_type == "moe" else sizes
    matrices = others = 0
    for name, shape in block_tensors(config, one):
        size = math.prod(shape)
        if name.startswith("gate."):  # all experts are scored
            others += size * sizes.n_routed_experts
        elif len(shape) != 2:
            others += size
        else:
            matrices += size * (sizes.num_experts_per_tok if name.startswith("experts.") else 1)
    return matrices, others
