"""Hypothesis strategies: small legal configurations that use every field, and models of them."""

from typing import Any

from hypothesis import strategies as st

from helpers import draw_weights
from nemotron_h import NemotronHConfig, NemotronHForCausalLM
from nemotron_h.family import ACTIVATIONS

INF = float("inf")
LETTERS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
_width = st.integers(1, 20)


def patterns(most: int) -> st.SearchStrategy[str]:
    return st.text("".join(LETTERS), min_size=1, max_size=most)


@st.composite
def configurations(draw: st.DrawFn) -> NemotronHConfig:
    """A configuration of 1 to 7 blocks in which any field may have any kind of value that changes the arithmetic."""
    kwargs = draw(_model_fields()) | draw(_mamba_fields()) | draw(_attention_fields()) | draw(_moe_fields())
    trunk, head, heads = draw(patterns(7)), draw(patterns(3)), draw(st.integers(0, 2))
    kwargs |= {"hybrid_override_pattern": trunk, "mtp_hybrid_override_pattern": head, "num_nextn_predict_layers": heads}
    mlps = trunk.count("-")
    listed = mlps and not (heads and "-" in head) and draw(st.booleans())
    kwargs["intermediate_size"] = draw(st.lists(_width, min_size=mlps, max_size=mlps) if listed else _width)
    for name, pattern in (("block_configs", trunk), ("mtp_block_configs", head)):
        if draw(st.booleans()):
            kwargs[name] = [draw(_block(letter, kwargs)) for letter in pattern]
    return NemotronHConfig(**kwargs)


@st.composite
def models(draw: st.DrawFn) -> NemotronHForCausalLM:
    """A model of one of `configurations` with drawn weights; time steps from 1e-4 (as trained models have) to 3."""
    model = NemotronHForCausalLM(draw(configurations()))
    seed, dt_bias, expert_bias = draw(st.integers(0, 10**6)), draw(st.integers(-9, 3)), draw(st.booleans())
    return draw_weights(model, seed, float(dt_bias), expert_bias)


@st.composite
def _model_fields(draw: st.DrawFn) -> dict[str, Any]:
    flags = ("tie_word_embeddings", "use_bias", "residual_in_fp32", "mlp_bias")
    return {name: draw(st.booleans()) for name in flags} | {
        "vocab_size": draw(st.just(1) | st.integers(2, 40)),
        "hidden_size": draw(st.integers(4, 24)),
        "layer_norm_epsilon": draw(st.sampled_from([1e-6, 1e-5, 1e-3, 1e-2])),
        "hidden_dropout": draw(st.sampled_from([0.0, 0.5])),
        "mlp_hidden_act": draw(st.sampled_from(ACTIVATIONS)),
    }


@st.composite
def _mamba_fields(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 3))
    return {
        "mamba_n_groups": groups,
        "mamba_num_heads": groups * draw(st.integers(1, 3)),
        "mamba_head_dim": draw(st.integers(2, 7)),
        "ssm_state_size": draw(st.integers(1, 9)),
        "mamba_d_conv": draw(st.integers(1, 5)),
        "mamba_hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "mamba_dt_limit": draw(st.sampled_from([(0.0, INF), (0.0, 1e308), (0.001, 0.1), (0.05, INF), (0.0, 0.5)])),
        "mamba_conv_bias": draw(st.booleans()),
        "mamba_proj_bias": draw(st.booleans()),
        "mamba_chunk_size": draw(st.sampled_from([1, 2, 3, 5, 8, 13, 64])),
        "use_mamba_kernels": draw(st.booleans()),
    }


@st.composite
def _attention_fields(draw: st.DrawFn) -> dict[str, Any]:
    key_heads = draw(st.integers(1, 3))
    return {
        "num_key_value_heads": key_heads,
        "num_attention_heads": key_heads * draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(1, 9)),
        "attention_bias": draw(st.booleans()),
        "attention_dropout": draw(st.sampled_from([0.0, 0.5])),
        "sliding_window": draw(st.none() | st.integers(1, 12)),
    }


@st.composite
def _moe_fields(draw: st.DrawFn) -> dict[str, Any]:
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    return {
        "n_routed_experts": groups * size,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": draw(st.integers(1, kept * size)),
        "n_shared_experts": draw(st.integers(0, 2)),
        "moe_intermediate_size": draw(_width),
        "moe_shared_expert_intermediate_size": draw(st.integers(0, 9)),
        "moe_latent_size": draw(st.none() | _width),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5, -0.5])),
        "norm_topk_prob": draw(st.booleans()),
    }


@st.composite
def _block(draw: st.DrawFn, letter: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """An entry of `block_configs` that is legal beside the global fields."""
    entry: dict[str, Any] = {"block_type": LETTERS[letter]}
    if letter == "*":
        entry["sliding_window"] = draw(st.none() | st.integers(1, 12))
    elif letter == "-":
        entry["intermediate_size"] = draw(_width)
    elif letter == "E":
        size = draw(st.integers(1, 4))
        entry |= {
            "n_routed_experts": kwargs["n_group"] * size,
            "num_experts_per_tok": draw(st.integers(1, kwargs["topk_group"] * size)),
            "moe_intermediate_size": draw(_width),
            "moe_latent_size": draw(st.none() | _width),
            "moe_shared_expert_intermediate_size": draw(st.integers(0, 9)),
        }
    return entry
