"""Every published config loads, and its parameters are counted exactly by arithmetic."""

import math
from pathlib import Path

import pytest
from config_cases import COMPLETE, DATA, PUBLISHED, PUZZLE_FILE, legal_configs, published, puzzle_config
from hypothesis import given

from nemotron_h import NemotronHConfig, family
from nemotron_h.errors import ConfigError, UnsupportedError

# Exact where NVIDIA's files or Megatron's recipes say so; otherwise the published billions, to the digits shown.
PARAMETERS = {
    "nemotron-h-4b": "4.489",
    "nemotron-h-8b": "8.101",
    "nemotron-h-47b": "46.79",
    "nemotron-h-56b": "56.32",
    "nemotron-nano-9b-v2": "8.888",
    "nemotron-nano-12b-v2": "12.31",
    "nemotron-3-nano-4b": 3_973_556_832,
    "nemotron-3-nano-30b-a3b": 31_577_940_288,
    "nemotron-3.5-lightning-30b-a3b": 32_913_266_240,
    "nemotron-3-super-120b-a12b": 123_611_033_088,
    "nemotron-3-ultra-550b-a55b": "560.5",
}
ACTIVE_BILLIONS = {
    "nemotron-3-nano-30b-a3b": 3,
    "nemotron-3.5-lightning-30b-a3b": 3,
    "nemotron-3-super-120b-a12b": 12,
    "nemotron-3-ultra-550b-a55b": 55,
}
FILE_OF = {
    "Nemotron-H-4B": "nemotron-h-4b",
    "Nemotron-H-8B": "nemotron-h-8b",
    "Nemotron-H-47B": "nemotron-h-47b",
    "Nemotron-H-56B": "nemotron-h-56b",
    "Nemotron-Nano-9B-v2": "nemotron-nano-9b-v2",
    "Nemotron-Nano-12B-v2": "nemotron-nano-12b-v2",
    "Nemotron-3-Nano-4B": "nemotron-3-nano-4b",
    "Nemotron-3-Nano-30B": "nemotron-3-nano-30b-a3b",
    "Nemotron-3.5-Lightning": "nemotron-3.5-lightning-30b-a3b",
    "Nemotron-3-Super": "nemotron-3-super-120b-a12b",
    "Nemotron-3-Ultra": "nemotron-3-ultra-550b-a55b",
}


def preset_of(path: Path) -> str:
    return next(name for part, name in FILE_OF.items() if part in path.name)


def summed(config: object) -> int:
    return sum(math.prod(shape) for _, shape in family.tensors(config))


def assert_parameters(total: int, expected: int | str) -> None:
    if isinstance(expected, str):
        assert f"{total / 1e9:.{len(expected.split('.')[1])}f}" == expected
    else:
        assert total == expected


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_published_config_has_its_parameters(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = NemotronHConfig.from_pretrained(str(path))
    assert not caplog.records, "a published config is no reason for a warning"
    total = family.count(config).total
    assert_parameters(total, PARAMETERS[preset_of(path)])
    assert summed(config) == total


def test_every_file_but_puzzles_is_counted() -> None:
    assert set(PUBLISHED) - set(COMPLETE) == {PUZZLE_FILE}
    assert {preset_of(path) for path in COMPLETE} == set(PARAMETERS)
    assert (DATA / "configs/SOURCE.md").is_file()


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_has_the_parameters_of_its_model(name: str) -> None:
    config = family.describe(family.preset(name))
    count = family.count(config)
    assert_parameters(count.total, PARAMETERS[name])
    assert sum(count.by_part.values()) == count.total
    if name in ACTIVE_BILLIONS:
        assert round(count.active / 1e9) == ACTIVE_BILLIONS[name]


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_preset_equals_the_published_file(path: Path) -> None:
    """All fields, but for those that by-field files and older configs do not state."""
    stated = published(path)
    file, preset = NemotronHConfig(**stated), NemotronHConfig.preset(preset_of(path))
    names = {family.canonical_name(key) for key in stated} & set(family.FIELDS)
    assert len(names) > 15
    assert {n: getattr(preset, n) for n in names} == {n: getattr(file, n) for n in names}


def test_puzzle_needs_its_block_configs() -> None:
    with pytest.raises(ConfigError, match="block_configs"):
        NemotronHConfig.from_pretrained(str(PUZZLE_FILE))


def test_puzzle_counts_every_layer_by_its_own_sizes() -> None:
    config = NemotronHConfig(**puzzle_config())
    total = family.count(config).total
    assert summed(config) == total
    mamba = 4096 * (2 * 8192 + 2 * 8 * 96 + 128) + (8192 + 2 * 8 * 96) * 5 + 3 * 128 + 8192 + 8192 * 4096
    attention = 2 * 4096 * 4096 + 2 * 256 * 4096
    entries = [*config.block_configs, config.mtp_block_configs[1]]
    moe = sum(2 * 512 * 1024 * e["moe_intermediate_size"] for e in entries if e["block_type"] == "moe")
    moe += 41 * (512 * 4096 + 512 + 2 * 4096 * 5376 + 2 * 1024 * 4096)
    head = 2 * 4096 * 4096 + 3 * 4096 + 2 * 4096 + attention
    assert total == 2 * 131072 * 4096 + 4096 + 88 * 4096 + 40 * mamba + 8 * attention + moe + head


@given(legal_configs())
def test_count_is_the_sum_of_all_tensors(kwargs: dict) -> None:
    config = family.describe(kwargs)
    names = [name for name, _ in family.tensors(config)]
    assert len(names) == len(set(names))
    assert family.count(config).total == summed(config)


def test_active_leaves_out_idle_experts_embeddings_and_heads() -> None:
    kwargs = {"layers_block_type": ["moe"], "hidden_size": 8, "vocab_size": 10, "num_nextn_predict_layers": 1}
    kwargs |= {"n_routed_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 5}
    kwargs["moe_shared_expert_intermediate_size"] = 7
    used = 3 * 2 * 5 * 8 + 2 * 7 * 8 + 4 * 8 + 4  # experts, shared expert, router and its bias
    assert family.count(family.describe(kwargs)).active == 8 + used + 8 + 10 * 8


def test_cache_bytes_of_nano_30b() -> None:
    """6 attention layers with 2 KV heads of 128; 23 Mamba layers with a [64, 64, 128] float32 state and K - 1 = 3."""
    config = family.describe(family.preset("nemotron-3-nano-30b-a3b"))
    bf16 = family.cache_bytes(config)
    window = (64 * 64 + 2 * 8 * 128) * 3
    assert bf16.per_token == 6 * 2 * 2 * 128 * 2
    assert bf16.fixed == 23 * (64 * 64 * 128 * 4 + window * 2)
    half = family.describe(family.preset("nemotron-3-nano-30b-a3b", {"mamba_ssm_cache_dtype": "bfloat16"}))
    assert family.cache_bytes(half, "float32").fixed == 23 * (64 * 64 * 128 * 2 + window * 4)


def test_a_block_type_without_tensor_table_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(family.BLOCKS, "pool", family.BlockType("pool", "P", "pool"))
    config = family.describe({"hybrid_override_pattern": "MP"})
    assert config.layers_block_type == ["mamba", "pool"]
    with pytest.raises(UnsupportedError, match="pool"):
        family.count(config)
