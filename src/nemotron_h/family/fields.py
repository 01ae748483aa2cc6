"""The field table: every configuration field with its default, its rule and what it does.

This table is the one place that knows a field. `spelling.read` uses its names and aliases, `rules.check` its rules,
`NemotronHConfig` its defaults and texts, the documentation its texts. It needs neither torch nor transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

INT_MAX = 2**31 - 1  # larger sizes cannot be indexed by the kernels and are always a mistake

ACTIVATIONS = (
    "relu2", "relu", "relu6", "silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "mish",
    "tanh", "sigmoid", "linear", "identity",
)  # fmt: skip
STATE_DTYPES = ("float32", "bfloat16", "float16", "float64")


def short(value: Any) -> str:
    """`value` for an error message: at most 80 characters, whatever a stranger's file holds."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of more than 4300 digits, lists nested too deep
        return f"<{type(value).__name__} too long to print>"
    return text if len(text) <= 80 else text[:77] + "..."


Rule = Callable[[Any], str | None]
"""Takes a value; returns None when it is legal, otherwise the rule in words."""


def integer(low: int, high: int = INT_MAX, *, optional: bool = False) -> Rule:
    """An int (bool is none) in [low, high]."""
    text = f"an integer from {low} to {high}" + (" or None" if optional else "")

    def rule(value: Any) -> str | None:
        if value is None:
            return None if optional else text
        return None if type(value) is int and low <= value <= high else text

    return rule


def number(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Rule:
    """A finite int or float in the interval."""
    text = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"

    def rule(value: Any) -> str | None:
        if type(value) not in (int, float):
            return text
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        return None if above and below else text

    return rule


def boolean(value: Any) -> str | None:
    return None if type(value) is bool else "True or False"


def choice(*allowed: str) -> Rule:
    def rule(value: Any) -> str | None:
        return None if isinstance(value, str) and value in allowed else "one of " + ", ".join(allowed)

    return rule


def token_ids(value: Any) -> str | None:
    single = integer(0, optional=True)
    if isinstance(value, list | tuple) and value:
        return None if all(single(v) is None and v is not None for v in value) else "token ids, all integers >= 0"
    return None if single(value) is None else "a token id >= 0, a non-empty list of them, or None"


def sizes(value: Any) -> str | None:
    one = integer(1)
    if isinstance(value, list | tuple):
        return None if value and all(one(v) is None for v in value) else "a list of integers >= 1, one per mlp layer"
    return None if one(value) is None else f"an integer from 1 to {INT_MAX}, or a list with one per mlp layer"


def interval(value: Any) -> str | None:
    text = "a pair (low, high) of numbers with 0 <= low <= high; high may be infinite"
    if not isinstance(value, list | tuple) or len(value) != 2:
        return text
    low, high = value
    if type(low) not in (int, float) or type(high) not in (int, float):
        return text
    return None if 0 <= low <= high and low < math.inf else text


def block_types(value: Any) -> str | None:
    from nemotron_h.family.blocks import BLOCKS  # a registry that grows; the table itself must not depend on it

    if isinstance(value, list | tuple) and value and all(isinstance(v, str) and v in BLOCKS for v in value):
        return None
    return "a non-empty list of block types, each one of " + ", ".join(BLOCKS)


def block_configs(value: Any) -> str | None:
    listed = isinstance(value, list | tuple) and value and all(isinstance(v, dict) for v in value)
    if value is None or (listed and block_types([v.get("block_type") for v in value]) is None):
        return None
    return "None or a list with one dict per layer, each with its block_type"


@dataclass(frozen=True)
class Field:
    """One configuration field: default value, rule for a single value, other spellings, and what it does."""

    default: Any
    rule: Rule
    doc: str
    aliases: tuple[str, ...] = ()


_model = {
    "vocab_size": Field(131072, integer(1), "Rows of the embedding matrix and of `lm_head`."),
    "hidden_size": Field(4096, integer(1), "Width D of the residual stream."),
    "layers_block_type": Field(
        None,
        block_types,
        "Block type of every layer: `mamba`, `attention`, `moe` or `mlp` (or a registered one). None means"
        " `['mamba', 'moe', 'attention', 'mlp']`. Also read from `layer_types` and `hybrid_override_pattern`.",
    ),
    "tie_word_embeddings": Field(False, boolean, "Use the embedding matrix as `lm_head`; such a checkpoint has none."),
    "use_cache": Field(True, boolean, "Whether `forward` returns a cache when the call does not say."),
    "num_logits_to_keep": Field(
        1, integer(0, optional=True), "Prompt logits that `generate` computes in its prefill; None or 0 means all."
    ),
    "pad_token_id": Field(0, integer(0, optional=True), "Token that `generate` appends to finished rows."),
    "bos_token_id": Field(1, integer(0, optional=True), "Token that `generate` starts from without a prompt."),
    "eos_token_id": Field(2, token_ids, "Token or tokens that end a generated text."),
    "max_position_embeddings": Field(
        4096,
        integer(1),
        "Context length of the training. The model has no positions, so nothing is bounded: it is the engine's default"
        " context length, and `generate` warns once beyond it.",
    ),
    "use_bias": Field(False, boolean, "Bias in the Mamba projections `in_proj` and `out_proj`."),
    "initializer_range": Field(0.02, number(0, 1e3), "Standard deviation of newly initialized weight matrices."),
    "layer_norm_epsilon": Field(
        1e-5, number(0, 1, open_low=True), "Epsilon of every RMS norm.", ("norm_eps", "rms_norm_eps")
    ),
    "residual_in_fp32": Field(False, boolean, "Keep the residual stream in float32 whatever the model's dtype."),
    "hidden_dropout": Field(
        0.0, number(0, 1, open_high=True), "Dropout of embeddings and of every mixer's output; training only."
    ),
    "rescale_prenorm_residual": Field(
        True, boolean, "Initialize Mamba `out_proj` kaiming-uniform, divided by sqrt(number of layers)."
    ),
}
_attention = {
    "num_attention_heads": Field(32, integer(1), "Query heads of an attention layer."),
    "num_key_value_heads": Field(8, integer(1, optional=True), "Key/value heads; None means `num_attention_heads`."),
    "head_dim": Field(
        128,
        integer(1, optional=True),
        "Width of one head; None means hidden_size // num_attention_heads.",
        ("attention_head_dim",),
    ),
    "attention_bias": Field(False, boolean, "Bias in q, k, v and o projections."),
    "attention_dropout": Field(0.0, number(0, 1, open_high=True), "Dropout of attention probabilities; training only."),
    "sliding_window": Field(
        None, integer(1, optional=True), "Key j is visible to query i only if i - j < sliding_window; None: all."
    ),
}
_mlp = {
    "intermediate_size": Field(21504, sizes, "Width of the MLP; a list gives one width per mlp layer."),
    "mlp_hidden_act": Field("relu2", choice(*ACTIVATIONS), "Activation of MLP and experts."),
    "mlp_bias": Field(False, boolean, "Bias in MLP, shared expert and latent projections (never in routed experts)."),
}
_mamba = {
    "use_mamba_kernels": Field(
        True, boolean, "Use mamba_ssm and causal_conv1d on CUDA where they are installed; speed only."
    ),
    "ssm_state_size": Field(128, integer(1), "State size N of a head."),
    "mamba_num_heads": Field(
        128, integer(1, optional=True), "Mamba heads H; None means mamba_expand * hidden_size / mamba_head_dim."
    ),
    "mamba_n_groups": Field(8, integer(1), "Groups G that share B and C and the gated norm.", ("n_groups",)),
    "mamba_head_dim": Field(64, integer(1), "Width P of a Mamba head."),
    "mamba_d_conv": Field(4, integer(1, 64), "Taps K of the causal convolution.", ("conv_kernel",)),
    "mamba_expand": Field(
        2, integer(1), "Gives the number of heads when `mamba_num_heads` is None; otherwise only kept.", ("expand",)
    ),
    "mamba_hidden_act": Field("silu", choice(*ACTIVATIONS), "Activation behind the causal convolution."),
    "mamba_dt_min": Field(
        0.001, number(0, 1e6, open_low=True), "Smallest time step drawn at initialization.", ("time_step_min",)
    ),
    "mamba_dt_max": Field(
        0.1, number(0, 1e6, open_low=True), "Largest time step drawn at initialization.", ("time_step_max",)
    ),
    "mamba_dt_limit": Field(
        (0.0, math.inf), interval, "Limits of the time step in every forward pass.", ("time_step_limit",)
    ),
    "mamba_dt_init_floor": Field(
        1e-4, number(0, 1e6), "Floor of the time step drawn at initialization.", ("time_step_floor",)
    ),
    "mamba_conv_bias": Field(True, boolean, "Bias of the causal convolution.", ("use_conv_bias",)),
    "mamba_proj_bias": Field(False, boolean, "Bias in `in_proj` and `out_proj`, as `use_bias`."),
    "mamba_chunk_size": Field(
        128, integer(1, 2**20), "Tokens per chunk of the scan; rounding and speed only.", ("chunk_size",)
    ),
    "mamba_ssm_cache_dtype": Field(
        "float32", choice(*STATE_DTYPES), "Type in which the cache keeps SSM states; arithmetic is float32 always."
    ),
}
_moe = {
    "n_routed_experts": Field(8, integer(1), "Experts E of a moe layer.", ("num_experts", "num_local_experts")),
    "n_shared_experts": Field(1, integer(0), "The shared expert is this many times its width; 0 means there is none."),
    "moe_intermediate_size": Field(7688, integer(1), "Width F of a routed expert."),
    "moe_shared_expert_intermediate_size": Field(7688, integer(0), "Width of one shared expert."),
    "moe_latent_size": Field(
        None, integer(1, optional=True), "Width L in which routed experts work, between two projections; None: D."
    ),
    "moe_shared_expert_overlap": Field(
        True, boolean, "Whether an engine may run the shared expert beside the routed ones; speed only, unused here."
    ),
    "num_experts_per_tok": Field(2, integer(1), "Experts k that each token visits."),
    "routed_scaling_factor": Field(1.0, number(-1e6, 1e6), "Factor of the routed experts' weights."),
    "n_group": Field(1, integer(1), "Groups into which the router splits the experts."),
    "topk_group": Field(1, integer(1), "Groups that a token's experts may come from."),
    "norm_topk_prob": Field(True, boolean, "Normalize a token's expert weights to sum 1 before scaling."),
    "output_router_logits": Field(False, boolean, "Return `router_logits` when the call does not say."),
    "router_aux_loss_coef": Field(0.0, number(0, 1e6), "Scale of the balance loss; 0 leaves it out."),
    "router_z_loss_coef": Field(0.0, number(0, 1e6), "Scale of the router's z-loss; 0 leaves it out."),
    "block_configs": Field(
        None, block_configs, "Per-layer sizes (Puzzle): one dict per layer with `block_type` and what differs there."
    ),
}
_mtp = {
    "num_nextn_predict_layers": Field(0, integer(0, 64), "Multi-token prediction heads in the checkpoint."),
    "mtp_layers_block_type": Field(
        ["attention", "moe"], block_types, "Block types of one head; also read from `mtp_hybrid_override_pattern`."
    ),
    "mtp_loss_coef": Field(0.0, number(0, 1e6), "Scale of the MTP loss (Megatron: 0.3); 0 leaves it out."),
    "mtp_loss_depths": Field(2, integer(1, 64), "Depths over which a training step averages the MTP loss."),
    "mtp_block_configs": Field(None, block_configs, "As `block_configs`, for the blocks of a head."),
}

FIELDS: dict[str, Field] = _model | _attention | _mlp | _mamba | _moe | _mtp
ALIASES: dict[str, str] = {alias: name for name, field in FIELDS.items() for alias in field.aliases}
MOE_FIELDS = tuple(name for name in _moe if name != "block_configs")
"""Left out of a saved config without moe blocks: llama.cpp takes `num_experts_per_tok` for "is a MoE"."""
