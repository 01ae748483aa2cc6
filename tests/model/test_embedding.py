"""The embedding: `nn.Embedding`'s values and gradients, without PyTorch's threads where no gradient is wanted."""

import pytest
import torch
from torch import nn

from nemotron_h.modeling import NemotronHEmbedding
from nemotron_h.ops import _native


def pair(vocab: int, size: int, dtype: torch.dtype = torch.bfloat16) -> tuple[NemotronHEmbedding, nn.Embedding]:
    ours, plain = NemotronHEmbedding(vocab, size).to(dtype), nn.Embedding(vocab, size).to(dtype)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize("shape", [(1, 1), (16, 1), (2, 37), (5, 0), (0,), (3,)])
@pytest.mark.parametrize("size", [1, 2688, 40000])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_values_are_those_of_nn_embedding(shape: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    ours, plain = pair(11, size)
    ids = torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        rows = ours(ids)
        assert torch.equal(rows, plain(ids))
        assert rows.is_contiguous()
        assert rows.dtype == torch.bfloat16


def test_no_call_without_grad_is_large_enough_for_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, right = [], torch.index_select

    def spy(weight: torch.Tensor, dim: int, ids: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        sizes.append(out.numel())
        return right(weight, dim, ids, out=out)

    monkeypatch.setattr(torch, "index_select", spy)
    ours, _ = pair(11, 2688)
    with torch.no_grad():
        ours(torch.arange(11).repeat(5))
    kernels = bool(_native.levels())  # without them there are no threads of ours to disturb
    assert sum(sizes) == kernels * 55 * 2688
    assert max(sizes, default=0) <= NemotronHEmbedding.ALONE


def test_gradients_are_those_of_nn_embedding() -> None:
    ours, plain = pair(11, 6, torch.float32)
    ids = torch.tensor([[1, 4, 4], [0, 10, 1]])
    for module in (ours, plain):
        module(ids).square().sum().backward()
    assert torch.equal(ours.weight.grad, plain.weight.grad)


def test_transforms_and_meta_tensors_see_plain_ops() -> None:
    ours, plain = pair(11, 6, torch.float32)
    ids = torch.tensor([[1, 4], [0, 10]])
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(ours)(ids), plain(ids))
        assert ours.to("meta")(ids.to("meta")).shape == (2, 2, 6)
