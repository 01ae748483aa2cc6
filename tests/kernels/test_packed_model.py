"""A model in packed bfloat16 beside the one whose rows are plain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import tiny_model
from nemotron_h import NemotronHForCausalLM
from nemotron_h.errors import InputError
from nemotron_h.linears import NemotronHLinear
from nemotron_h.quantization import scheme

IDS = torch.tensor([[5, 7, 11, 13, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_bfloat16_decodes_the_plain_models_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of few tokens: for many, plain rows take PyTorch's products."""
    directory = tmp_path / "plain"
    tiny_model(mlp_bias=True).bfloat16().save_pretrained(directory)
    plain = NemotronHForCausalLM.from_pretrained(directory, dtype=dtype)
    packed = NemotronHForCausalLM.from_pretrained(directory, dtype=dtype, quantization="bf16")
    assert packed.dtype == dtype
    with torch.no_grad():
        one, other = plain(IDS, use_cache=True), packed(IDS, use_cache=True)
        assert torch.equal(one.logits, other.logits)
        for token in (3, 8, 20):
            ids = torch.tensor([[token]])
            one = plain(ids, past_key_values=one.past_key_values, use_cache=True)
            other = packed(ids, past_key_values=other.past_key_values, use_cache=True)
            assert torch.equal(one.logits, other.logits)


def test_a_packed_layer_takes_its_own_width_only() -> None:
    """The panels of 70 columns have as many bytes as those of 65."""
    layer = NemotronHLinear(70, 40).packed(scheme("int4"))
    assert layer(torch.ones(2, 70)).shape == (2, 40)
    for width in (65, 69, 71):
        with pytest.raises(InputError, match=r"packed layer of 70 inputs was given x \[2, "):
            layer(torch.ones(2, width))
