"""A prompt on kernels wakes none of PyTorch's threads: they would spin on the cores of ours."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from helpers import tiny_config
from nemotron_h import modeling, packing
from nemotron_h.cache import layers
from nemotron_h.ops.slots import reference

ALONE = 2**15  # at::internal::GRAIN_SIZE: PyTorch shares out what has more elements
VIEWS = {"aten::view", "aten::reshape", "aten::flatten", "aten::unflatten", "aten::split", "aten::split_with_sizes"}
VIEWS |= {"aten::slice", "aten::select", "aten::transpose", "aten::as_strided", "aten::view_as", "aten::to"}
VIEWS |= {"aten::empty_like", "aten::new_empty", "aten::empty", "aten::empty_strided", "aten::narrow"}
VIEWS |= {"aten::dropout"}  # which does nothing here


def prompt() -> tuple[modeling.NemotronHForCausalLM, torch.Tensor]:
    """Every hidden state, key and projection of the prompt has more elements than PyTorch takes alone."""
    config = tiny_config(
        hidden_size=512, hybrid_override_pattern="ME*-M", num_key_value_heads=4, head_dim=128, moe_latent_size=None
    )
    config.dtype = torch.bfloat16
    torch.manual_seed(0)
    return packing.random_model(config, "int4").eval(), torch.randint(0, 50, (1, 100))


@torch.no_grad()
def test_no_op_of_pytorch_sees_as_much_as_it_shares_out() -> None:
    model, ids_BT = prompt()
    model(ids_BT, logits_to_keep=1)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        model(ids_BT, logits_to_keep=1)
    large = {
        (event.key, str(event.input_shapes))
        for event in seen.key_averages(group_by_input_shape=True)
        if event.key not in VIEWS
        for shape in event.input_shapes[:1]  # an op in place, or the larger operand
        if shape and all(isinstance(n, int) for n in shape) and torch.Size(shape).numel() > ALONE
    }
    assert not large


@torch.no_grad()
def test_the_bits_are_those_of_pytorchs_sums_and_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids_BT = prompt()
    ours = model(ids_BT)
    monkeypatch.setattr(modeling, "add", lambda x, y: x + y)
    monkeypatch.setattr(layers, "with_room", reference.with_room)
    theirs = model(ids_BT)
    assert torch.equal(ours.logits, theirs.logits)
    for mine, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        for name, tensor in mine.tensors().items():
            assert torch.equal(tensor, other.tensors()[name])
