"""A model built on the meta device has exactly the counted parameters, whatever the size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from config_cases import COMPLETE, legal_configs, puzzle_config
from hypothesis import given, settings

from nemotron_h import NemotronHConfig, NemotronHForCausalLM, family


def stored_elements(config: NemotronHConfig) -> int:
    """Elements of parameters (a tied one once) and persistent buffers."""
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    saved = model.state_dict().keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    return sum(tensor.numel() for tensor in [*model.parameters(), *buffers])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_published_config_builds_with_the_counted_parameters(path: Path, tied: bool) -> None:
    config = NemotronHConfig.from_pretrained(str(path), tie_word_embeddings=tied)
    assert stored_elements(config) == family.count(config).total


@pytest.mark.parametrize("tied", [False, True])
def test_puzzle_builds_with_the_counted_parameters(tied: bool) -> None:
    config = NemotronHConfig(**puzzle_config() | {"tie_word_embeddings": tied})
    assert stored_elements(config) == family.count(config).total


@settings(max_examples=30)
@given(legal_configs())
def test_any_config_builds_with_the_counted_parameters(kwargs: dict[str, Any]) -> None:
    config = NemotronHConfig(**kwargs)
    assert stored_elements(config) == family.count(config).total
