"""Parameters, tensors and memory of a configuration, by arithmetic alone: no torch, no allocation.

`config` is anything with the table's fields as attributes. Letters as in docs/numerics.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from nemotron_h.errors import UnsupportedError
from nemotron_h.family import rules, spelling
from nemotron_h.family.blocks import BLOCKS, Shapes

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "bf16": 2, "int8": 1.0078125, "int4": 0.52734375,
}  # fmt: skip
"""Bytes per weight; bf16, int8 and int4 are the packed formats, scales included."""


@dataclass(frozen=True)
class Layer:
    """The sizes of one block: the globals, or what `block_configs` says for it."""

    block_type: str
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_latent_size: int | None
    moe_shared_expert_intermediate_size: int
    sliding_window: int | None


_SIZES = tuple(name for name in Layer.__dataclass_fields__ if name != "block_type")


def describe(kwargs: Mapping[str, Any]) -> SimpleNamespace:
    """Read and check keyword arguments (any spelling) into a plain namespace, for callers without transformers."""
    values, extras = spelling.read(kwargs)
    spec = SimpleNamespace(**values, extras=extras)
    rules.check(spec)
    return spec


def layer(config: Any, index: int) -> Layer:
    """Sizes of trunk block `index`."""
    block_type = config.layers_block_type[index]
    width = config.intermediate_size
    if not isinstance(width, int):
        width = width[config.layers_block_type[:index].count("mlp")] if block_type == "mlp" else width[0]
    return _layer(config, block_type, width, (config.block_configs or {index: {}})[index])


def mtp_layer(config: Any, index: int) -> Layer:
    """Sizes of block `index` of an MTP head."""
    width = config.intermediate_size if isinstance(config.intermediate_size, int) else config.intermediate_size[0]
    entry = (config.mtp_block_configs or {index: {}})[index]
    return _layer(config, config.mtp_layers_block_type[index], width, entry)


def _layer(config: Any, block_type: str, width: int, entry: Mapping[str, Any]) -> Layer:
    sizes = {name: entry.get(name, getattr(config, name)) for name in _SIZES if name != "intermediate_size"}
    return Layer(block_type, entry.get("intermediate_size", width), **sizes)


def block_tensors(config: Any, sizes: Layer) -> Shapes:
    """Names below `mixer.` and shapes of one block."""
    make = BLOCKS[sizes.block_type].tensors
    if make is None:
        raise UnsupportedError(
            f"block type {sizes.block_type!r} was registered without a tensor table; build the model to count it"
        )
    return make(config, sizes)


def tensors(config: Any) -> Shapes:
    """Every tensor of a checkpoint in the hub layout: `(name, shape)`."""
    hidden = config.hidden_size
    yield "backbone.embeddings.weight", (config.vocab_size, hidden)
    for index in range(len(config.layers_block_type)):
        yield f"backbone.layers.{index}.norm.weight", (hidden,)
        for name, shape in block_tensors(config, layer(config, index)):
            yield f"backbone.layers.{index}.mixer.{name}", shape
    yield "backbone.norm_f.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
    yield from mtp_tensors(config)


def mtp_tensors(config: Any) -> Shapes:
    """The MTP heads' part of `tensors`; the flat index is head * blocks per head + block."""
    hidden, blocks = config.hidden_size, len(config.mtp_layers_block_type)
    for head in range(config.num_nextn_predict_layers):
        for block in range(blocks):
            prefix = f"mtp.layers.{head * blocks + block}"
            if block == 0:
                yield f"{prefix}.enorm.weight", (hidden,)
                yield f"{prefix}.hnorm.weight", (hidden,)
                yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)
            yield f"{prefix}.norm.weight", (hidden,)
            for name, shape in block_tensors(config, mtp_layer(config, block)):
                yield f"{prefix}.mixer.{name}", shape
            if block == blocks - 1:
                yield f"{prefix}.final_layernorm.weight", (hidden,)


@dataclass(frozen=True)
class Count:
    """Parameters by part; `active` are those that one token's forward pass reads (MTP heads excluded)."""

    total: int
    active: int
    by_part: dict[str, int]


def grouped(config: Any) -> Iterator[tuple[Layer, int, str]]:
    """Distinct blocks with their number, so that a million equal layers cost as much as one."""
    if config.block_configs is None and isinstance(config.intermediate_size, int):
        for block_type, number in Counter(config.layers_block_type).items():
            yield layer(config, config.layers_block_type.index(block_type)), number, block_type
    else:
        for index, block_type in enumerate(config.layers_block_type):
            yield layer(config, index), 1, block_type
    for index in range(len(config.mtp_layers_block_type) if config.num_nextn_predict_layers else 0):
        yield mtp_layer(config, index), config.num_nextn_predict_layers, "mtp"


def count(config: Any) -> Count:
    """Exact parameter counts, router biases and MTP heads included, as stored in a checkpoint."""
    hidden = config.hidden_size
    parts: Counter[str] = Counter(embeddings=config.vocab_size * hidden, norm_f=hidden)
    if not config.tie_word_embeddings:
        parts["lm_head"] = config.vocab_size * hidden
    active = hidden + config.vocab_size * hidden  # final norm and output head; an embedding row is negligible
    for sizes, number, part in grouped(config):
        whole, used = _block_count(config, sizes)
        parts[part] += number * (whole + hidden)
        active += 0 if part == "mtp" else number * (used + hidden)
    if config.num_nextn_predict_layers:
        parts["mtp"] += config.num_nextn_predict_layers * (3 * hidden + 2 * hidden * hidden)
    return Count(sum(parts.values()), active, dict(parts))


def _block_count(config: Any, sizes: Layer) -> tuple[int, int]:
    """(all parameters, parameters that one token uses) of a block's mixer."""
    if sizes.block_type != "moe":
        whole = sum(math.prod(shape) for _, shape in block_tensors(config, sizes))
        return whole, whole
    expert = 2 * sizes.moe_intermediate_size * (sizes.moe_latent_size or config.hidden_size)
    one = Layer(**{**sizes.__dict__, "n_routed_experts": 1})
    rest = sum(math.prod(s) for n, s in block_tensors(config, one) if not n.startswith(("experts.", "gate.")))
    rest += sizes.n_routed_experts * (config.hidden_size + 1)
    return rest + sizes.n_routed_experts * expert, rest + sizes.num_experts_per_tok * expert


@dataclass(frozen=True)
class CacheBytes:
    """Memory of one sequence: attention keys and values per token, Mamba states whatever the length."""

    per_token: int
    fixed: int


def cache_bytes(config: Any, dtype: str = "bfloat16") -> CacheBytes:
    """Bytes of the cache for one sequence of the trunk, in `dtype` (SSM states in `mamba_ssm_cache_dtype`)."""
    width = DTYPE_BYTES[dtype]
    blocks = Counter(config.layers_block_type)
    inner = config.mamba_num_heads * config.mamba_head_dim
    channels = inner + 2 * config.mamba_n_groups * config.ssm_state_size
    state = inner * config.ssm_state_size * DTYPE_BYTES[config.mamba_ssm_cache_dtype]
    window = channels * (config.mamba_d_conv - 1) * width
    keys = 2 * config.num_key_value_heads * config.head_dim * width
    return CacheBytes(int(blocks["attention"] * keys), int(blocks["mamba"] * (state + window)))
