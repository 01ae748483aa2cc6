"""Block types: the four of the family, and those that a user registers.

A block type is a name (`mamba`), a pattern letter (`M`), the layer type under which transformers' own machinery knows
it (`linear_attention`), and the shapes of its tensors. `nemotron_h.register_block` adds one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nemotron_h.errors import ConfigError

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class BlockType:
    """`tensors(config, layer)` yields hub names below `mixer.` with shapes; None when only the module knows them."""

    name: str
    letter: str
    layer_type: str
    tensors: Callable[[Any, Any], Shapes] | None = None


def mamba_tensors(config: Any, layer: Any) -> Shapes:
    heads, groups, state = config.mamba_num_heads, config.mamba_n_groups, config.ssm_state_size
    inner, hidden = heads * config.mamba_head_dim, config.hidden_size
    channels = inner + 2 * groups * state
    bias = config.use_bias or config.mamba_proj_bias
    yield from _linear("in_proj", inner + channels + heads, hidden, bias)
    yield "conv1d.weight", (channels, 1, config.mamba_d_conv)
    if config.mamba_conv_bias:
        yield "conv1d.bias", (channels,)
    yield from (("dt_bias", (heads,)), ("A_log", (heads,)), ("D", (heads,)), ("norm.weight", (inner,)))
    yield from _linear("out_proj", hidden, inner, bias)


def attention_tensors(config: Any, layer: Any) -> Shapes:
    hidden, bias = config.hidden_size, config.attention_bias
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield from _linear("q_proj", query, hidden, bias)
    yield from _linear("k_proj", key, hidden, bias)
    yield from _linear("v_proj", key, hidden, bias)
    yield from _linear("o_proj", hidden, query, bias)


def mlp_tensors(config: Any, layer: Any) -> Shapes:
    yield from _linear("up_proj", layer.intermediate_size, config.hidden_size, config.mlp_bias)
    yield from _linear("down_proj", config.hidden_size, layer.intermediate_size, config.mlp_bias)


def moe_tensors(config: Any, layer: Any) -> Shapes:
    hidden, experts, width = config.hidden_size, layer.n_routed_experts, layer.moe_intermediate_size
    latent = layer.moe_latent_size or hidden
    yield "gate.weight", (experts, hidden)
    yield "gate.e_score_correction_bias", (experts,)
    for expert in range(experts):
        yield f"experts.{expert}.up_proj.weight", (width, latent)
        yield f"experts.{expert}.down_proj.weight", (latent, width)
    shared = layer.moe_shared_expert_intermediate_size * config.n_shared_experts
    if shared:
        yield from _linear("shared_experts.up_proj", shared, hidden, config.mlp_bias)
        yield from _linear("shared_experts.down_proj", hidden, shared, config.mlp_bias)
    if layer.moe_latent_size is not None:
        yield from _linear("fc1_latent_proj", latent, hidden, config.mlp_bias)
        yield from _linear("fc2_latent_proj", hidden, latent, config.mlp_bias)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


BLOCKS: dict[str, BlockType] = {
    "mamba": BlockType("mamba", "M", "linear_attention", mamba_tensors),
    "attention": BlockType("attention", "*", "full_attention", attention_tensors),
    "moe": BlockType("moe", "E", "moe", moe_tensors),
    "mlp": BlockType("mlp", "-", "mlp", mlp_tensors),
}


def add(block: BlockType) -> None:
    """Register a block type; a name, letter or spelling that is taken already is a `ConfigError`."""
    for other in BLOCKS.values():
        if block.name in (other.name, other.layer_type) or block.letter == other.letter:
            raise ConfigError(
                f"block type {block.name!r} with letter {block.letter!r}: {other.name!r} has that name or the letter"
                f" {other.letter!r} already; choose another"
            )
    if not block.name.isidentifier() or len(block.letter) != 1 or block.letter.isspace():
        raise ConfigError(f"block type {block.name!r}: the name must be an identifier, the letter one character")
    BLOCKS[block.name] = block


def from_letter(letter: str, field: str) -> str:
    """The block type of a pattern letter; `field` names the pattern's field in the error."""
    for block in BLOCKS.values():
        if block.letter == letter:
            return block.name
    known = " ".join(f"{block.letter}={block.name}" for block in BLOCKS.values())
    raise ConfigError(f"{field}: its pattern has the letter {letter!r}; known are {known}")


def canonical(name: Any) -> Any:
    """`linear_attention` and `full_attention` are transformers' names for mamba and attention."""
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    return names.get(name, name) if isinstance(name, str) else name


def pattern(types: Any) -> str:
    return "".join(BLOCKS[name].letter for name in types)
