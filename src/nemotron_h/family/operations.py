"""Arithmetic operations of one step, by arithmetic alone: no torch, no allocation.

`config` is anything with the table's fields as attributes. A multiply-add counts as two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nemotron_h.family.arithmetic import Layer, block_tensors, grouped

_PER_STATE = 5  # of the recurrence, for each element of a state and token: h = a·h + u·B, y += C·h


@dataclass(frozen=True)
class Operations:
    """matrices: products with weights, the output head included. attention: scores and weighted values.
    scan: Mamba's recurrence and convolution, as if done token by token, however a kernel does them."""

    matrices: int
    attention: int
    scan: int

    @property
    def total(self) -> int:
        return self.matrices + self.attention + self.scan


def operations(config: Any, tokens: int, sequences: int = 1, context: int = 0, logits: int = 1) -> Operations:
    """Operations of the trunk for a step of `tokens` tokens of each of `sequences`, all behind `context` tokens.

    Args:
        logits: Tokens of each sequence that go through the output head.

    Raises:
        UnsupportedError: a block type without a tensor table.
    """
    weights, attention, scan = 0, 0, 0
    for sizes, number, part in grouped(config):
        if part == "mtp":
            continue
        weights += number * used_weights(config, sizes)
        if sizes.block_type == "attention":
            heads = config.num_attention_heads * config.head_dim
            attention += number * 4 * heads * _seen(tokens, context, sizes.sliding_window)
        elif sizes.block_type == "mamba":
            inner, cells = config.mamba_num_heads * config.mamba_head_dim, config.ssm_state_size
            channels = inner + 2 * config.mamba_n_groups * cells
            scan += number * tokens * (_PER_STATE * inner * cells + 2 * config.mamba_d_conv * channels)
    head = logits * config.vocab_size * config.hidden_size
    matrices = 2 * (tokens * weights + head)
    return Operations(sequences * matrices, sequences * attention, sequences * scan)


def used_weights(config: Any, sizes: Layer) -> int:
    """Weights of a block's matrices that one token is multiplied with: k of the experts, all of the router."""
    one = Layer(**{**sizes.__dict__, "n_routed_experts": 1}) if sizes.block_type == "moe" else sizes
    used = 0
    for name, shape in block_tensors(config, one):
        if len(shape) != 2:
            continue
        times = sizes.n_routed_experts if name.startswith("gate.") else 1
        used += math.prod(shape) * (sizes.num_experts_per_tok if name.startswith("experts.") else times)
    return used


def _seen(tokens: int, context: int, window: int | None) -> int:
    """Keys that `tokens` queries behind `context` tokens look at, together."""
    whole = tokens * context + tokens * (tokens + 1) // 2
    if window is None:
        return whole
    growing = max(0, min(tokens, window - context))  # the first queries see all there is
    return growing * context + growing * (growing + 1) // 2 + (tokens - growing) * window
