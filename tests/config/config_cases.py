"""Shared by the configuration's tests: the published files, a Puzzle-like config, and hypothesis strategies."""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from nemotron_h.family import ACTIVATIONS, MOE_FIELDS

DATA = Path(__file__).parent.parent / "data"
PUBLISHED = sorted(path for path in (DATA / "configs").rglob("*.json") if "hf_quant_config" not in path.name)
PUZZLE_FILE = DATA / "configs/by-field/NVIDIA-Nemotron-Labs-3-Puzzle-75B-A9B-BF16.json"
COMPLETE = [path for path in PUBLISHED if path != PUZZLE_FILE]

BLOCK_TYPES = ("mamba", "attention", "moe", "mlp")
SUPER_PATTERN = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"


def published(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write_config(directory: Path, content: dict[str, Any] | str | bytes) -> Path:
    """Put `config.json` into `directory`; returns the directory."""
    data = json.dumps(content) if isinstance(content, dict) else content
    (directory / "config.json").write_bytes(data if isinstance(data, bytes) else data.encode())
    return directory


def puzzle_config() -> dict[str, Any]:
    """The public Puzzle fields with sizes per layer in the published ranges: F 1280..2688, top-k 4..22."""
    shared = {"n_routed_experts": 512, "moe_latent_size": 1024, "moe_shared_expert_intermediate_size": 5376}
    blocks: list[dict[str, Any]] = []
    for index, letter in enumerate(SUPER_PATTERN):
        block: dict[str, Any] = {"block_type": {"M": "mamba", "E": "moe", "*": "attention"}[letter]}
        if letter == "E":
            block |= {"moe_intermediate_size": 1280 + 64 * (index % 23), "num_experts_per_tok": 4 + index % 19} | shared
        blocks.append(block)
    head = [
        {"block_type": "attention"},
        {"block_type": "moe", "moe_intermediate_size": 2688, "num_experts_per_tok": 22} | shared,
    ]
    top = {key: value for key, value in published(PUZZLE_FILE).items() if key not in shared}
    return top | {"block_configs": blocks, "mtp_block_configs": head, "num_nextn_predict_layers": 1}


_unit = st.floats(0, 0.999)
_scale = st.floats(0, 1e6)
_token = st.none() | st.integers(0, 300)


@st.composite
def legal_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments for every field of the table, small, in the seed's names, obeying every rule."""
    layers = draw(st.lists(st.sampled_from(BLOCK_TYPES), min_size=1, max_size=6))
    heads, head = draw(st.integers(0, 2)), draw(st.lists(st.sampled_from(BLOCK_TYPES), min_size=1, max_size=3))
    kwargs = draw(_model_fields()) | draw(_mamba_fields()) | draw(_moe_fields())
    kwargs |= {"layers_block_type": layers, "num_nextn_predict_layers": heads, "mtp_layers_block_type": head}
    width = st.integers(1, 48)
    if "mlp" in layers and not (heads and "mlp" in head):
        width = width | st.lists(width, min_size=layers.count("mlp"), max_size=layers.count("mlp"))
    kwargs["intermediate_size"] = draw(width)
    for name, types in (("block_configs", layers), ("mtp_block_configs", head)):
        kwargs[name] = draw(st.none() | st.tuples(*(_block(kind, kwargs) for kind in types)).map(list))
    return kwargs


@st.composite
def _model_fields(draw: st.DrawFn) -> dict[str, Any]:
    key_heads = draw(st.integers(1, 3))
    flags = ("tie_word_embeddings", "use_cache", "use_bias", "residual_in_fp32", "rescale_prenorm_residual")
    return {name: draw(st.booleans()) for name in (*flags, "attention_bias", "mlp_bias")} | {
        "vocab_size": draw(st.integers(1, 300)),
        "hidden_size": draw(st.integers(1, 48)),
        "num_logits_to_keep": draw(st.none() | st.integers(0, 3)),
        "pad_token_id": draw(_token),
        "bos_token_id": draw(_token),
        "eos_token_id": draw(_token | st.lists(st.integers(0, 300), min_size=1, max_size=3)),
        "max_position_embeddings": draw(st.integers(1, 10**6)),
        "initializer_range": draw(st.floats(0, 1)),
        "layer_norm_epsilon": draw(st.floats(1e-12, 1)),
        "hidden_dropout": draw(_unit),
        "num_key_value_heads": key_heads,
        "num_attention_heads": key_heads * draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(1, 16)),
        "attention_dropout": draw(_unit),
        "sliding_window": draw(st.none() | st.integers(1, 50)),
        "mlp_hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "mtp_loss_coef": draw(_scale),
        "mtp_loss_depths": draw(st.integers(1, 5)),
    }


@st.composite
def _mamba_fields(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 3))
    low, high = sorted(draw(st.tuples(st.floats(1e-6, 10), st.floats(1e-6, 10))))
    limit = sorted(draw(st.tuples(st.floats(0, 10), st.floats(0, 100) | st.just(float("inf")))))
    return {name: draw(st.booleans()) for name in ("use_mamba_kernels", "mamba_conv_bias", "mamba_proj_bias")} | {
        "ssm_state_size": draw(st.integers(1, 16)),
        "mamba_n_groups": groups,
        "mamba_num_heads": groups * draw(st.integers(1, 3)),
        "mamba_head_dim": draw(st.integers(1, 8)),
        "mamba_d_conv": draw(st.integers(1, 5)),
        "mamba_expand": draw(st.integers(1, 4)),
        "mamba_hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "mamba_dt_min": low,
        "mamba_dt_max": high,
        "mamba_dt_limit": tuple(limit),
        "mamba_dt_init_floor": draw(st.floats(0, 1)),
        "mamba_chunk_size": draw(st.integers(1, 512)),
        "mamba_ssm_cache_dtype": draw(st.sampled_from(["float32", "bfloat16", "float16", "float64"])),
    }


@st.composite
def _moe_fields(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 3))
    experts, kept = groups * draw(st.integers(1, 4)), draw(st.integers(1, groups))
    flags = ("moe_shared_expert_overlap", "norm_topk_prob", "output_router_logits")
    return {name: draw(st.booleans()) for name in flags} | {
        "n_routed_experts": experts,
        "n_shared_experts": draw(st.integers(0, 2)),
        "moe_intermediate_size": draw(st.integers(1, 32)),
        "moe_shared_expert_intermediate_size": draw(st.integers(0, 32)),
        "moe_latent_size": draw(st.none() | st.integers(1, 16)),
        "num_experts_per_tok": draw(st.integers(1, experts // groups * kept)),
        "routed_scaling_factor": draw(st.floats(-5, 5)),
        "n_group": groups,
        "topk_group": kept,
        "router_aux_loss_coef": draw(_scale),
        "router_z_loss_coef": draw(_scale),
    }


@st.composite
def _block(draw: st.DrawFn, block_type: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"block_type": block_type}
    if block_type == "moe":
        sizes = {"moe_intermediate_size": st.integers(1, 32), "moe_latent_size": st.none() | st.integers(1, 16)}
        entry |= draw(st.fixed_dictionaries({}, optional=sizes))
        entry["n_routed_experts"] = kwargs["n_routed_experts"] * draw(st.integers(1, 2))
    if block_type == "attention":
        entry |= draw(st.fixed_dictionaries({}, optional={"sliding_window": st.none() | st.integers(1, 9)}))
    return entry


def savable(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what a saved config leaves out: fields of experts or MTP heads that the model has not."""
    heads = kwargs["mtp_layers_block_type"] if kwargs["num_nextn_predict_layers"] else []
    dropped = set() if "moe" in [*kwargs["layers_block_type"], *heads] else set(MOE_FIELDS)
    if not kwargs["num_nextn_predict_layers"]:
        dropped |= {"mtp_layers_block_type", "mtp_block_configs"}
    return {name: value for name, value in kwargs.items() if name not in dropped}
