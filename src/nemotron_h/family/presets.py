"""The twelve published shapes, by name.

Sources: NVIDIA's config.json files where public, Megatron-LM and Megatron-Bridge recipes, the papers' tables
(Nemotron-H arXiv 2504.03624, Nano 2 arXiv 2508.14444, Nemotron 3 arXiv 2512.20848).
"""

from __future__ import annotations

from typing import Any

from nemotron_h.errors import ConfigError
from nemotron_h.family import spelling

_DENSE_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
_47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
_56B = "M-M-M-M*" + "-M-M-M-M-M*" * 9 + "-M-M-M-M-M-"
_NANO_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
_SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
_ULTRA = "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"

_COMMON: dict[str, Any] = {"vocab_size": 131072, "ssm_state_size": 128, "head_dim": 128, "dtype": "bfloat16"}
_MOE: dict[str, Any] = _COMMON | {
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "max_position_embeddings": 262144,
    "n_shared_experts": 1,
}
_NANO: dict[str, Any] = _MOE | {
    "hidden_size": 2688,
    "hybrid_override_pattern": _NANO_30B,
    "mamba_num_heads": 64,
    "intermediate_size": 1856,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "routed_scaling_factor": 2.5,
}
_LATENT: dict[str, Any] = _MOE | {
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "routed_scaling_factor": 5.0,
    "moe_shared_expert_overlap": False,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
}

PRESETS: dict[str, dict[str, Any]] = {
    "nemotron-h-4b": _COMMON
    | {"hidden_size": 3072, "hybrid_override_pattern": _DENSE_8B, "mamba_num_heads": 112, "intermediate_size": 12288}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192},
    "nemotron-h-8b": _COMMON
    | {"hidden_size": 4096, "hybrid_override_pattern": _DENSE_8B, "mamba_num_heads": 128, "intermediate_size": 21504}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192},
    "nemotron-h-47b": _COMMON
    | {"hidden_size": 8192, "hybrid_override_pattern": _47B, "mamba_num_heads": 256, "intermediate_size": 30720}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192, "ssm_state_size": 256},
    "nemotron-h-56b": _COMMON
    | {"hidden_size": 8192, "hybrid_override_pattern": _56B, "mamba_num_heads": 256, "intermediate_size": 32768}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192, "ssm_state_size": 256},
    "nemotron-nano-9b-v2": _COMMON
    | {"hidden_size": 4480, "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"}
    | {"mamba_num_heads": 128, "mamba_head_dim": 80, "intermediate_size": 15680, "pad_token_id": 12}
    | {"num_attention_heads": 40, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "nemotron-nano-12b-v2": _COMMON
    | {"hidden_size": 5120, "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"}
    | {"mamba_num_heads": 128, "mamba_head_dim": 80, "intermediate_size": 20480, "pad_token_id": 12}
    | {"num_attention_heads": 40, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "nemotron-3-nano-4b": _COMMON
    | {"hidden_size": 3136, "hybrid_override_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"}
    | {"mamba_num_heads": 96, "mamba_head_dim": 80, "intermediate_size": 12544, "mamba_chunk_size": 256}
    | {"num_attention_heads": 40, "num_key_value_heads": 8, "max_position_embeddings": 262144},
    "nemotron-3-nano-30b-a3b": _NANO,
    "nemotron-3.5-lightning-30b-a3b": _NANO
    | {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E", "max_position_embeddings": 1048576},
    "nemotron-3-super-120b-a12b": _LATENT
    | {"hidden_size": 4096, "hybrid_override_pattern": _SUPER, "mamba_num_heads": 128, "intermediate_size": 2688}
    | {"moe_intermediate_size": 2688, "moe_shared_expert_intermediate_size": 5376, "moe_latent_size": 1024},
    "nemotron-3-ultra-550b-a55b": _LATENT
    | {"hidden_size": 8192, "hybrid_override_pattern": _ULTRA, "mamba_num_heads": 256, "intermediate_size": 5120}
    | {"num_attention_heads": 64, "moe_intermediate_size": 5120, "moe_shared_expert_intermediate_size": 10240}
    | {"moe_latent_size": 2048},
    "nemotron-3-puzzle-75b-a9b": _MOE
    | {"hidden_size": 4096, "mamba_num_heads": 128, "ssm_state_size": 96, "n_routed_experts": 512}
    | {"moe_latent_size": 1024, "moe_shared_expert_intermediate_size": 5376, "routed_scaling_factor": 5.0},
}


def presets() -> list[str]:
    """Names that `NemotronHConfig.preset` takes."""
    return list(PRESETS)


def preset(name: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments of a published shape, with `overrides` (in the preset's own or any other spelling) applied.

    Raises:
        ConfigError: unknown name; the Puzzle preset without `block_configs` (the public full list is not known).
    """
    overrides = dict(overrides or {})
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; presets are {', '.join(PRESETS)}")
    if name == "nemotron-3-puzzle-75b-a9b" and overrides.get("block_configs") is None:
        raise ConfigError(
            f"preset {name!r} needs block_configs=[one dict per layer]: its sizes differ per layer and are in the"
            " checkpoint's config.json"
        )
    return spelling.override(PRESETS[name], overrides)
