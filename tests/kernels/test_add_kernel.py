"""The kernel of sums: PyTorch's bits, on any threads, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mamba_cases import LEVELS, assert_bits, draw, kernel_threads, poisoned_memory
from torch import Tensor, nn

from nemotron_h.errors import KernelError
from nemotron_h.ops import add as op
from nemotron_h.ops.add import add, native

F32, BF16 = torch.float32, torch.bfloat16
PAIRS = ((F32, F32), (BF16, BF16), (F32, BF16))


def case(
    *shape: int, dtypes: tuple[torch.dtype, torch.dtype], seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    x, y = draw(*shape, seed=seed, scale=scale), draw(*shape, seed=seed + 1, scale=scale)
    return x.to(dtypes[0]), y.to(dtypes[1])


@examples(max_examples=100)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtypes=st.sampled_from(PAIRS),
    scale=st.sampled_from([1.0, 1e-38, 1e-40, 1e38]),
    seed=st.integers(0, 999),
)
def test_the_bits_are_pytorchs(
    shape: list[int], dtypes: tuple[torch.dtype, torch.dtype], scale: float, seed: int
) -> None:
    x, y = case(*shape, dtypes=dtypes, seed=seed, scale=scale)
    expected = x + y
    for level in LEVELS:
        with poisoned_memory():
            assert_bits((native.add(x, y, level),), (expected,), level)


@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("scale", [1.0, 1e-38])
def test_any_number_of_threads(dtypes: tuple[torch.dtype, torch.dtype], scale: float) -> None:
    """Subnormal sums too, though the pool's threads else count them as zero."""
    x, y = case(1, 67, 1003, dtypes=dtypes, scale=scale)
    expected = x + y
    for level in LEVELS:
        for count in (1, 2, 3, 7):
            with kernel_threads(count), poisoned_memory():
                assert_bits((native.add(x, y, level),), (expected,), (level, count))


def test_infinities_and_nans() -> None:
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 3e38, 1.0, -0.0])
    for dtypes in PAIRS:
        x, y = odd.repeat(6).to(dtypes[0]), odd.repeat_interleave(6).to(dtypes[1])
        for level in LEVELS:
            torch.testing.assert_close(native.add(x, y, level), x + y, rtol=0, atol=0, equal_nan=True)


def test_the_arguments_stay_what_they_are() -> None:
    x, y = case(70, 1000, dtypes=(BF16, BF16))
    before = x.clone(), y.clone()
    out = add(x, y)
    assert_bits((x, y), before)
    assert out.data_ptr() not in (x.data_ptr(), y.data_ptr())


def refused() -> dict[str, tuple[Tensor, Tensor]]:
    x = draw(3, 8)
    return {
        "requires grad": (x, nn.Parameter(x)),
        "meta": (x.to("meta"), x.to("meta")),
        "torch.bfloat16 and torch.float32": (x.bfloat16(), x),
        "torch.float64 and torch.float32": (x.double(), x),
        "torch.float32 and torch.float16": (x, x.half()),
        r"x \[3, 8\] and y \[1, 8\]": (x, x[:1]),
        r"x \[0, 8\]": (x[:0], x[:0]),
        "x or y is not contiguous": (x.t(), x.t()),
        r"not contiguous \(strides \(8, 1\) and \(1, 3\)\)": (x, draw(8, 3).t()),
    }


@pytest.mark.parametrize("reason", refused())
def test_what_the_kernel_refuses(reason: str) -> None:
    x, y = refused()[reason]
    with pytest.raises(KernelError, match=reason):
        add(x, y, impl="native")
    expected = x + y
    assert (add(x, y).shape, add(x, y).dtype) == (expected.shape, expected.dtype)
    assert expected.is_meta or torch.equal(add(x, y), expected)


def test_gradients_and_compile_take_pytorch() -> None:
    x, y = (t.requires_grad_() for t in case(4, 5, dtypes=(F32, F32)))
    add(x, y).square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * (x + y).detach())
    compiled = torch.compile(lambda x, y: add(x, y), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, y), x + y)


def test_check(environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    environment(NEMOTRON_H_CHECK="1")
    for dtypes in PAIRS:
        add(*case(3, 96, dtypes=dtypes))
    right = op._ADD.native
    monkeypatch.setattr(op._ADD, "native", lambda *args: right(*args) * 1.01)
    with pytest.raises(KernelError, match=f"add: native {LEVELS[-1]} is off by"):
        add(*case(3, 96, dtypes=(F32, F32)))
