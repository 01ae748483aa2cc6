"""Buffers with room: the reference's bytes for any strides, dtype and number of threads."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mamba_cases import LEVELS, draw, kernel_threads, poisoned_memory
from torch import Tensor, nn

from nemotron_h.cache import AttentionLayer
from nemotron_h.errors import InputError, KernelError
from nemotron_h.ops import slots
from nemotron_h.ops.slots import native, reference, with_room

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def keys(B: int, K: int, T: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As attention's projection gives them: a slice of wider rows, heads inside tokens."""
    return draw(B, T, K * d + 5, dtype=dtype)[..., 5:].unflatten(-1, (K, d)).transpose(1, 2)


@examples(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 30)),
    more=st.integers(0, 50),
    dtype=st.sampled_from(DTYPES),
    contiguous=st.booleans(),
)
def test_what_came_is_in_front_of_zeros(
    shape: tuple[int, int, int, int], more: int, dtype: torch.dtype, contiguous: bool
) -> None:
    x = keys(*shape, dtype)
    x = x.contiguous() if contiguous else x
    expected = reference.with_room(x, shape[2] + more)
    assert torch.equal(expected[:, :, : shape[2]], x)
    assert not expected[:, :, shape[2] :].any()
    for level in LEVELS:
        with poisoned_memory():
            out = native.with_room(x, shape[2] + more, level)
        assert out.is_contiguous()
        assert torch.equal(out, expected), level


@pytest.mark.parametrize("shape", [(1, 2, 300, 128), (3, 5, 67, 33), (1, 1, 2, 40000)])
def test_any_number_of_threads(shape: tuple[int, int, int, int]) -> None:
    x = keys(*shape)
    expected = reference.with_room(x, shape[2] + 77)
    for level in LEVELS:
        for count in (1, 2, 3, 7):
            with kernel_threads(count), poisoned_memory():
                assert torch.equal(native.with_room(x, shape[2] + 77, level), expected), (level, count)


def test_int8_and_other_dimensions() -> None:
    x = torch.arange(-60, 60, dtype=torch.int8).view(2, 3, 4, 5)
    assert torch.equal(with_room(x, 9, impl="native"), reference.with_room(x, 9))
    assert torch.equal(with_room(x[..., 0], 6), reference.with_room(x[..., 0], 6))


def refused() -> dict[str, tuple[Tensor, int]]:
    x = keys(1, 2, 3, 4)
    return {
        "requires grad": (nn.Parameter(x), 4),
        "meta": (x.to("meta"), 4),
        r"not \[1, 2, 3\]": (x[..., 0], 4),
        r"not \[1, 2, 0, 4\]": (x[:, :, :0], 4),
        "are not contiguous": (x.transpose(2, 3), 4),
    }


@pytest.mark.parametrize("reason", refused())
def test_what_the_kernel_refuses(reason: str) -> None:
    x, room = refused()[reason]
    with pytest.raises(KernelError, match=reason):
        with_room(x, room, impl="native")
    assert with_room(x, room).shape == (*x.shape[:2], room, *x.shape[3:])


def test_too_few_slots() -> None:
    x = keys(1, 2, 3, 4)
    with pytest.raises(InputError, match="3 tokens do not fit 2 slots"):
        with_room(x, 2)
    with pytest.raises(KernelError, match="3 tokens do not fit 2 slots"):
        with_room(x, 2, impl="native")


def test_check(environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    environment(NEMOTRON_H_CHECK="1")
    x = keys(1, 2, 3, 4)
    x[0, 0, 0] = float("nan")
    for kind in (x, x.bfloat16(), torch.ones(1, 2, 3, 4, dtype=torch.int8)):
        with_room(kind, 5)
    right = slots._WITH_ROOM.native
    monkeypatch.setattr(slots._WITH_ROOM, "native", lambda *args: right(*args).neg())
    with pytest.raises(KernelError, match=r"with_room: native .* byte for byte"):
        with_room(x, 5)


@torch.no_grad()
def test_a_cache_keeps_what_it_was_given_and_grows() -> None:
    """Its buffers are its own: what a hook has seen of the keys may change later."""
    layer, k, v = AttentionLayer(), keys(2, 3, 250, 8), keys(2, 3, 250, 8) + 1
    before = k.clone()
    for start, end in ((0, 100), (100, 101), (101, 250)):
        layer.append(k[:, :, start:end], v[:, :, start:end])
        layer.commit(end - start)
    more = keys(2, 3, 300, 8)
    found_k, found_v = layer.append(more, more)
    assert torch.equal(found_k, torch.cat([k, more], 2))  # type: ignore[arg-type]
    assert torch.equal(found_v, torch.cat([v, more], 2))  # type: ignore[arg-type]
    assert layer.keys is not None
    assert layer.keys.shape[2] == 768
    assert not layer.keys[:, :, 550:].any()
    first = AttentionLayer()
    first.append(k, v)
    k.zero_()
    assert torch.equal(first.keys, torch.nn.functional.pad(before, (0, 0, 0, 6)))  # type: ignore[arg-type]
