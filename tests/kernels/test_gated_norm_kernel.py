"""The gated RMSNorm kernel: bits, budget, layouts, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mamba_cases import DTYPES, LEVELS, assert_bits, draw, kernel_threads, poisoned_memory
from torch import Tensor, nn

from nemotron_h.errors import InputError, KernelError
from nemotron_h.ops import dispatch, norm
from nemotron_h.ops.norm import gated_rms_norm, native, reference

EPS = 1e-5
OP = norm._GATED_RMS_NORM
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]


def case(rows: int, width: int, dtypes: Dtypes, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """y, z and weight; z is a slice of wider rows, as in_proj gives it."""
    z = draw(rows, width + 7, seed=seed + 1, dtype=dtypes[1])[:, :width]
    y = draw(rows, width, seed=seed, dtype=dtypes[0], scale=scale)
    return y, z, draw(width, seed=seed + 2, dtype=dtypes[2])


PLAIN = (torch.float32, torch.float32, torch.float32)
SHAPES = [
    (1, 1, 1),
    (3, 5, 5),
    (2, 16, 1),
    (2, 60, 4),
    (3, 77, 7),
    (1, 4096, 8),
    (2, 5000, 1),
    (1, 4112, 1),
    (4, 640, 2),
]


@pytest.mark.parametrize("y_dtype", DTYPES)
@pytest.mark.parametrize("z_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_all_levels_give_the_same_bits(y_dtype: torch.dtype, z_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    for rows, width, groups in SHAPES:
        for scale in (1.0, 1e-12, 1e15):
            arguments = (*case(rows, width, (y_dtype, z_dtype, weight_dtype), width, scale), EPS, groups)
            with poisoned_memory():
                outs = [native.gated_rms_norm(*arguments, level) for level in LEVELS]
            for level, out in zip(LEVELS, outs, strict=True):
                assert (out.dtype, out.shape, out.is_contiguous()) == (z_dtype, (rows, width), True)
                assert out.isfinite().all()
                assert_bits((out,), (outs[0],), (level, width, scale))


@examples(max_examples=80)
@given(
    rows=st.integers(1, 4),
    group=st.integers(1, 700),
    groups=st.integers(1, 5),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    exponent=st.integers(-9, 9),
    eps=st.sampled_from([1e-5, 1e-6, 1e-3]),
    seed=st.integers(0, 999),
)
def test_every_row_is_within_the_budget(
    rows: int, group: int, groups: int, dtypes: Dtypes, exponent: int, eps: float, seed: int
) -> None:
    arguments = case(rows, group * groups, dtypes, seed, 10.0**exponent)
    low = reference.gated_rms_norm(*arguments, eps, groups)
    high = reference.gated_rms_norm(*(a.double() for a in arguments), eps, groups)
    for level in LEVELS:
        out = native.gated_rms_norm(*arguments, eps, groups, level)
        for row in range(rows):
            error, allowed = dispatch.budget(out[row], low[row], high[row], OP.slack)
            assert error <= allowed, (level, row)


def test_a_wide_group_has_the_bits_of_its_sum_whatever_is_kept() -> None:
    """Beyond 4096 channels the gated values are computed twice: the first ones must not change by that."""
    for level in LEVELS:
        y, z, weight = case(2, 4096, PLAIN)
        short = native.gated_rms_norm(y, z, weight, 0.0, 1, level)
        padded = [torch.cat([t, torch.zeros_like(t)], dim=-1) for t in (y, z, weight)]
        long = native.gated_rms_norm(*padded, 0.0, 1, level)
        torch.testing.assert_close(long[:, :4096], short * 2**0.5, rtol=1e-6, atol=0)
        assert (long[:, 4096:] == 0).all()


@pytest.mark.parametrize("width", [4095, 4096, 4097, 4112, 9001])
def test_every_channel_of_a_wide_group(width: int) -> None:
    arguments = (*case(2, width, PLAIN), EPS, 1)
    expected = reference.gated_rms_norm(*arguments)
    for level in LEVELS:
        torch.testing.assert_close(native.gated_rms_norm(*arguments, level), expected, rtol=2e-6, atol=1e-7)


def test_a_group_does_not_depend_on_the_others() -> None:
    y, z, weight = case(5, 6 * 37, PLAIN)
    for level in LEVELS:
        together = native.gated_rms_norm(y, z, weight, EPS, 6, level)
        for row in range(5):
            for group in range(6):
                own = slice(37 * group, 37 * group + 37)
                parts = (y[row, own].clone(), z[row, own].clone(), weight[own].clone())
                assert_bits((native.gated_rms_norm(*parts, EPS, 1, level),), (together[row, own],), (level, row, group))


@pytest.mark.parametrize(("rows", "width", "groups"), [(9, 4096, 8), (1, 20000, 5), (300, 48, 3)])
def test_any_number_of_threads(rows: int, width: int, groups: int) -> None:
    arguments = (*case(rows, width, PLAIN), EPS, groups)
    for level in LEVELS:
        expected = native.gated_rms_norm(*arguments, LEVELS[0])
        for count in (1, 2, 3, 7):
            with kernel_threads(count), poisoned_memory():
                assert_bits((native.gated_rms_norm(*arguments, level),), (expected,), (count, level))


def test_bfloat16_is_the_float32_result_rounded_once() -> None:
    y, z, weight = case(4, 96, (torch.float32, torch.bfloat16, torch.bfloat16))
    for level in LEVELS:
        exact = native.gated_rms_norm(y, z.float(), weight.float(), EPS, 2, level)
        assert_bits((native.gated_rms_norm(y, z, weight, EPS, 2, level),), (exact.bfloat16(),), level)


def test_nan_and_infinity_stay_in_their_group() -> None:
    y, z, weight = case(3, 80, PLAIN)
    y[0, 3], z[1, 45] = float("nan"), float("inf")
    expected = reference.gated_rms_norm(y, z, weight, EPS, 2)
    for level in LEVELS:
        out = native.gated_rms_norm(y, z, weight, EPS, 2, level)
        torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_layouts_that_the_kernel_takes() -> None:
    y, z, weight = draw(2, 3, 24), draw(2, 3, 40, seed=1), draw(24, seed=2)
    for a, b in ((y, z[..., 8:32]), (y[:, -1], z[:, 1, :24]), (y[:1, 1:], z[:1, 1:, :24]), (y[0, 0], z[1, 2, 16:])):
        assert native.gated_refusal(a, b, weight, EPS, 3) is None
        for level in LEVELS:
            out = native.gated_rms_norm(a, b, weight, EPS, 3, level)
            plain = native.gated_rms_norm(a.contiguous(), b.contiguous(), weight, EPS, 3, level)
            assert_bits((out,), (plain,), level)


def refused() -> dict[str, tuple[Any, ...]]:
    y, z, weight = draw(2, 3, 8), draw(2, 3, 8, seed=1), draw(8, seed=2)
    return {
        "requires grad": (y, z, nn.Parameter(weight), EPS, 2),
        "meta": (y.to("meta"), z, weight, EPS, 2),
        "not torch.float64, torch.float32 and torch.float32": (y.double(), z, weight, EPS, 2),
        "torch.float16 and torch.float32": (y, z.half(), weight, EPS, 2),
        "and torch.float16": (y, z, weight.half(), EPS, 2),
        r"y \[2, 3, 8\], z \[2, 8\] and weight \[8\] do not fit": (y, z[:, 0], weight, EPS, 2),
        r"weight \[7\] do not fit": (y, z, weight[:7], EPS, 2),
        r"y \[\], z \[\]": (y[0, 0, 0], z[0, 0, 0], weight, EPS, 1),
        "y is empty": (y[:0], z[:0], weight, EPS, 2),
        "8 channels do not split into 3 groups": (y, z, weight, EPS, 3),
        "8 channels do not split into 0 groups": (y, z, weight, EPS, 0),
        "weight is not contiguous": (y, z, draw(8, 2)[:, 0], EPS, 2),
        "at one distance": (y.transpose(0, 1), z.transpose(0, 1).contiguous(), weight, EPS, 2),
        r"strides \(1, 3\)": (draw(3, 8), draw(8, 3).t(), weight, EPS, 2),
    }


@pytest.mark.parametrize("reason", refused())
def test_what_the_kernel_refuses(reason: str) -> None:
    with pytest.raises(KernelError, match=reason if LEVELS else "without its C"):
        OP(*refused()[reason], impl="native")


def test_misuse_is_an_input_error() -> None:
    y, z, weight = draw(2, 8), draw(2, 8), draw(8)
    for arguments in ((y, z[:1], weight, EPS, 2), (y, z, weight[:4], EPS, 2), (y, z, weight, EPS, 3)):
        with pytest.raises(InputError, match="gated_rms_norm"):
            gated_rms_norm(*arguments)


def test_check(environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    environment(NEMOTRON_H_CHECK="1")
    for y_dtype in DTYPES:
        for z_dtype in DTYPES:
            gated_rms_norm(*case(3, 96, (y_dtype, z_dtype, torch.float32)), EPS, 3)
    right = OP.native
    monkeypatch.setattr(OP, "native", lambda *args: right(*args) * 1.01)
    for level in LEVELS[-1:]:
        with pytest.raises(KernelError, match=f"gated_rms_norm: native {level} is off by"):
            gated_rms_norm(*case(3, 96, PLAIN), EPS, 3)
