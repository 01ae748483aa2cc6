"""Memory of weights, training and caches by arithmetic alone: no torch, no allocation. Activations are not in it.

`config` is anything with the table's fields as attributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nemotron_h.family.arithmetic import DTYPE_BYTES, Layer, block_tensors, grouped


@dataclass(frozen=True)
class Unit:
    """What is never split over devices: a block, the embedding or the output head; `number` equal ones.

    `router_biases` are part of `parameters`; they are float32 in every format and not trained by gradients.
    `lora` is the number of parameters that an adapter of rank 1 on all projections has.
    """

    name: str
    number: int
    parameters: int
    router_biases: int = 0
    lora: int = 0

    def weights(self, dtype: str) -> int:
        """Bytes of one of them in a format of `DTYPE_BYTES`."""
        rounded = (self.parameters - self.router_biases) * DTYPE_BYTES[dtype]
        return math.ceil(rounded) + DTYPE_BYTES["float32"] * self.router_biases  # type: ignore[return-value]


def units(config: Any) -> Iterator[Unit]:
    """All parts of a model; with tied embeddings the output head has no parameters of its own.

    Raises:
        UnsupportedError: a block type without a tensor table.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    yield Unit("embeddings", 1, vocab * hidden)
    yield Unit("norm_f", 1, hidden)
    tied = config.tie_word_embeddings  # then the head has no weights, and no adapter, of its own
    yield Unit("lm_head", 1, 0 if tied else vocab * hidden, lora=0 if tied else vocab + hidden)
    blocks, seen = len(config.mtp_layers_block_type), 0
    for sizes, number, part in grouped(config):
        unit = _block(config, sizes, number, part)
        if part == "mtp":
            joins, ends = seen == 0, seen == blocks - 1
            extra = joins * (2 * hidden + 2 * hidden * hidden) + ends * hidden
            unit = replace(unit, parameters=unit.parameters + extra, lora=unit.lora + joins * 3 * hidden)
            seen += 1
        yield unit


def _block(config: Any, sizes: Layer, number: int, part: str) -> Unit:
    experts = sizes.n_routed_experts if sizes.block_type == "moe" else 0
    parameters, lora = config.hidden_size, 0
    one = replace(sizes, n_routed_experts=1) if experts else sizes
    for name, shape in block_tensors(config, one):
        times = experts if name.startswith(("experts.", "gate.")) else 1
        parameters += times * math.prod(shape)
        if len(shape) == 2 and not name.startswith("gate."):
            lora += times * sum(shape)
    return Unit(f"{'MTP ' if part == 'mtp' else ''}{sizes.block_type} block", number, parameters, experts, lora)


@dataclass(frozen=True)
class Training:
    """Bytes of a training step with AdamW, without activations.

    weights: of the model as it computes, an adapter's included. gradients: in the dtype of what is trained.
    masters: float32 copies of weights that compute in 16 bits. optimizer: two float32 moments.
    """

    weights: int
    gradients: int
    masters: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.optimizer


def full_training(config: Any, dtype: str) -> Training:
    """All weights trained, in float32 or in bfloat16 with float32 masters."""
    found = list(units(config))
    trained = sum(unit.number * (unit.parameters - unit.router_biases) for unit in found)
    weights = sum(unit.number * unit.weights(dtype) for unit in found)
    masters = 0 if dtype == "float32" else 4 * trained
    return Training(weights, int(trained * DTYPE_BYTES[dtype]), masters, 8 * trained)


def lora_parameters(config: Any, rank: int) -> int:
    """Parameters of an adapter on everything that `lora_targets` lists, each expert's own factors included."""
    return rank * sum(unit.number * unit.lora for unit in units(config))


def lora_training(config: Any, dtype: str, rank: int) -> Training:
    """A frozen model in `dtype` and an adapter in float32, as PEFT makes it."""
    adapter = lora_parameters(config, rank)
    weights = sum(unit.number * unit.weights(dtype) for unit in units(config))
    return Training(weights + 4 * adapter, 4 * adapter, 0, 8 * adapter)


def largest_unit(config: Any) -> Unit:
    """The unit with the most parameters: what one device must hold at least."""
    return max(units(config), key=lambda unit: unit.parameters)
