"""The registry of block types: what a user may add to it, and how configs then read and write it."""

from collections.abc import Iterator

import pytest

from nemotron_h import NemotronHConfig, family
from nemotron_h.errors import ConfigError
from nemotron_h.family import blocks


@pytest.fixture
def pool() -> Iterator[family.BlockType]:
    block = family.BlockType("pool", "P", "pool", lambda config, layer: iter([("weight", (config.hidden_size, 3))]))
    blocks.add(block)
    yield block
    del family.BLOCKS["pool"]


@pytest.mark.usefixtures("pool")
def test_added_block_type_is_read_written_and_counted() -> None:
    config = NemotronHConfig(hybrid_override_pattern="MP", hidden_size=8, vocab_size=4)
    assert config.layers_block_type == ["mamba", "pool"]
    assert config.layer_types == ["linear_attention", "pool"]
    assert NemotronHConfig.from_dict(config.to_diff_dict()) == config
    assert family.count(config).by_part["pool"] == 8 * 3 + 8
    assert ("backbone.layers.1.mixer.weight", (8, 3)) in list(family.tensors(config))


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize(
    ("name", "letter", "named"),
    [
        ("mamba", "X", "mamba"),
        ("pool", "X", "pool"),
        ("full_attention", "X", "attention"),
        ("other", "M", "mamba"),
        ("other", "P", "pool"),
        ("no name", "X", "identifier"),
        ("", "X", "identifier"),
        ("other", "", "one character"),
        ("other", "XY", "one character"),
        ("other", " ", "one character"),
    ],
)
def test_name_or_letter_that_cannot_be_added(name: str, letter: str, named: str) -> None:
    before = dict(family.BLOCKS)
    with pytest.raises(ConfigError, match=named):
        blocks.add(family.BlockType(name, letter, name))
    assert before == family.BLOCKS


@pytest.mark.parametrize("pattern", ["P", "m", "M *", "M,E", "M\n"])
def test_unknown_letter_lists_the_known_ones(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"layers_block_type.*M=mamba \*=attention E=moe -=mlp"):
        NemotronHConfig(hybrid_override_pattern=pattern)
