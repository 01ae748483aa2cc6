"""The twelve presets, and what may be imported to answer questions about them."""

import subprocess
import sys
import time

import pytest
from config_cases import puzzle_config

import nemotron_h
from nemotron_h import NemotronHConfig, family
from nemotron_h.errors import ConfigError

NAMES = [
    "nemotron-h-4b",
    "nemotron-h-8b",
    "nemotron-h-47b",
    "nemotron-h-56b",
    "nemotron-nano-9b-v2",
    "nemotron-nano-12b-v2",
    "nemotron-3-nano-4b",
    "nemotron-3-nano-30b-a3b",
    "nemotron-3-super-120b-a12b",
    "nemotron-3-ultra-550b-a55b",
    "nemotron-3.5-lightning-30b-a3b",
    "nemotron-3-puzzle-75b-a9b",
]
PUZZLE = NAMES[-1]
# Name, D, blocks M/E/*/-, q/kv/d, mamba H, P, N, G, pad.
SHAPES = {
    "nemotron-h-4b": (3072, (24, 0, 4, 24), (32, 8, 128), (112, 64, 128, 8), 0),
    "nemotron-h-8b": (4096, (24, 0, 4, 24), (32, 8, 128), (128, 64, 128, 8), 0),
    "nemotron-h-47b": (8192, (45, 0, 5, 48), (64, 8, 128), (256, 64, 256, 8), 0),
    "nemotron-h-56b": (8192, (54, 0, 10, 54), (64, 8, 128), (256, 64, 256, 8), 0),
    "nemotron-nano-9b-v2": (4480, (27, 0, 4, 25), (40, 8, 128), (128, 80, 128, 8), 12),
    "nemotron-nano-12b-v2": (5120, (28, 0, 6, 28), (40, 8, 128), (128, 80, 128, 8), 12),
    "nemotron-3-nano-4b": (3136, (21, 0, 4, 17), (40, 8, 128), (96, 80, 128, 8), 0),
    "nemotron-3-nano-30b-a3b": (2688, (23, 23, 6, 0), (32, 2, 128), (64, 64, 128, 8), 0),
    "nemotron-3-super-120b-a12b": (4096, (40, 40, 8, 0), (32, 2, 128), (128, 64, 128, 8), 0),
    "nemotron-3-ultra-550b-a55b": (8192, (48, 48, 12, 0), (64, 2, 128), (256, 64, 128, 8), 0),
    "nemotron-3.5-lightning-30b-a3b": (2688, (23, 23, 6, 0), (32, 2, 128), (64, 64, 128, 8), 0),
    PUZZLE: (4096, (40, 40, 8, 0), (32, 2, 128), (128, 64, 96, 8), 0),
}
# Experts, top k, F, shared, scale, latent, MTP heads.
EXPERTS = {
    "nemotron-3-nano-30b-a3b": (128, 6, 1856, 3712, 2.5, None, 0),
    "nemotron-3.5-lightning-30b-a3b": (128, 6, 1856, 3712, 2.5, None, 1),
    "nemotron-3-super-120b-a12b": (512, 22, 2688, 5376, 5.0, 1024, 1),
    "nemotron-3-ultra-550b-a55b": (512, 22, 5120, 10240, 5.0, 2048, 1),
}


def overrides(name: str) -> dict[str, object]:
    return {"block_configs": puzzle_config()["block_configs"]} if name == PUZZLE else {}


def test_there_are_twelve() -> None:
    assert sorted(nemotron_h.presets()) == sorted(NAMES)
    assert family.presets() == nemotron_h.presets()


@pytest.mark.parametrize("name", NAMES)
def test_preset_has_the_published_shape(name: str) -> None:
    config = NemotronHConfig.preset(name, **overrides(name))
    counts = tuple(config.hybrid_override_pattern.count(letter) for letter in "ME*-")
    attention = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    mamba = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size, config.mamba_n_groups)
    assert (config.hidden_size, counts, attention, mamba, config.pad_token_id) == SHAPES[name]
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.mamba_d_conv) == (131072, 1, 2, 4)
    assert config.mamba_chunk_size == (256 if name == "nemotron-3-nano-4b" else 128)
    biases = (config.use_bias, config.mamba_proj_bias, config.attention_bias, config.mlp_bias, config.mamba_conv_bias)
    assert biases == (False, False, False, False, True)
    assert not config.tie_word_embeddings
    assert str(config.dtype) == "torch.bfloat16"


@pytest.mark.parametrize("name", EXPERTS)
def test_preset_has_the_published_experts(name: str) -> None:
    config = NemotronHConfig.preset(name)
    sizes = (config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size)
    shared = config.moe_shared_expert_intermediate_size * config.n_shared_experts
    rest = (shared, config.routed_scaling_factor, config.moe_latent_size, config.num_nextn_predict_layers)
    assert sizes + rest == EXPERTS[name]
    assert config.mtp_hybrid_override_pattern == "*E"


def test_puzzle_asks_for_its_block_configs() -> None:
    with pytest.raises(ConfigError, match="block_configs"):
        NemotronHConfig.preset(PUZZLE)
    with pytest.raises(ConfigError, match="block_configs"):
        NemotronHConfig.preset(PUZZLE, block_configs=None)
    puzzle = puzzle_config()
    per_layer = {name: puzzle[name] for name in ("block_configs", "mtp_block_configs", "num_nextn_predict_layers")}
    assert family.count(NemotronHConfig.preset(PUZZLE, **per_layer)) == family.count(NemotronHConfig(**puzzle))


@pytest.mark.parametrize("name", ["nemotron", "", "nemotron-h-8B", "../x"])
def test_unknown_preset_lists_the_names(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        NemotronHConfig.preset(name)
    assert all(known in str(error.value) for known in NAMES)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ({"vocab_size": 32768}, "vocab_size", 32768),
        ({"n_groups": 4}, "mamba_n_groups", 4),
        ({"mamba_chunk_size": 64}, "mamba_chunk_size", 64),
        ({"chunk_size": 64}, "mamba_chunk_size", 64),
        ({"attention_head_dim": 64}, "head_dim", 64),
        ({"num_experts": 64}, "n_routed_experts", 64),
        ({"hybrid_override_pattern": "M*"}, "layers_block_type", ["mamba", "attention"]),
        ({"layers_block_type": ["mamba"]}, "layers_block_type", ["mamba"]),
        ({"layer_types": ["full_attention"]}, "layers_block_type", ["attention"]),
        ({"block_configs": [{"block_type": "moe"}]}, "layers_block_type", ["moe"]),
        ({"hybrid_override_pattern": "M*", "num_hidden_layers": 2}, "num_hidden_layers", 2),
        ({"block_configs": None}, "num_hidden_layers", 52),
        ({"mtp_block_configs": [{"block_type": "moe"}]}, "mtp_layers_block_type", ["moe"]),
        ({"mtp_layers_block_type": ["mamba"]}, "mtp_layers_block_type", ["mamba"]),
    ],
)
def test_override_wins_in_any_spelling(override: dict[str, object], field: str, value: object) -> None:
    name = "nemotron-3.5-lightning-30b-a3b"
    assert getattr(NemotronHConfig.preset(name, **override), field) == value
    saved = NemotronHConfig.preset(name).to_diff_dict()
    assert getattr(NemotronHConfig.from_dict(saved, **override), field) == value


def test_overriding_leaves_the_preset_alone() -> None:
    before = NemotronHConfig.preset("nemotron-h-8b")
    NemotronHConfig.preset("nemotron-h-8b", hidden_size=64).layers_block_type.clear()
    assert NemotronHConfig.preset("nemotron-h-8b") == before


@pytest.mark.parametrize("name", NAMES)
def test_description_is_quick(name: str) -> None:
    start = time.perf_counter()
    config = family.describe(family.preset(name, overrides(name)))
    family.count(config)
    family.cache_bytes(config)
    assert time.perf_counter() - start < 0.2


@pytest.mark.parametrize("module", ["nemotron_h", "nemotron_h.family"])
def test_the_family_needs_no_torch(module: str) -> None:
    script = (
        f"import sys, {module}, nemotron_h\n"
        "nemotron_h.presets()\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
