"""What the tests of the Mamba kernels share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nemotron_h.ops import _native, threads

LEVELS = _native.levels()
DTYPES = (torch.float32, torch.bfloat16)


@contextmanager
def kernel_threads(count: int) -> Iterator[None]:
    """So many threads for the kernels, more than there are cores too."""
    threads.sync()
    module = _native.load()
    assert module is not None
    before = module.threads()
    module.set_threads(count)
    yield
    module.set_threads(before)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def poisoned(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, float("nan"))


def assert_bits(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: Any = "") -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), what
        kind = torch.int32 if a.dtype == torch.float32 else torch.int16
        assert torch.equal(a.contiguous().view(kind), b.contiguous().view(kind)), what


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN, so that an element that a kernel forgot shows."""
    right = Tensor.new_empty, torch.empty_like

    def new_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        return right[0](self, *size, **options).fill_(float("nan"))

    def empty_like(tensor: Tensor, **options: Any) -> Tensor:
        return right[1](tensor, **options).fill_(float("nan"))

    Tensor.new_empty, torch.empty_like = new_empty, empty_like  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Tensor.new_empty, torch.empty_like = right  # type: ignore[method-assign,assignment]
