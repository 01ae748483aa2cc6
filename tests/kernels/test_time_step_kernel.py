"""The time step kernel: bits, budget at both ends of the softplus, limits, and what it refuses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mamba_cases import DTYPES, LEVELS, assert_bits, draw, kernel_threads, poisoned_memory
from torch import Tensor, nn

from nemotron_h.errors import KernelError
from nemotron_h.ops import _native, dispatch
from nemotron_h.ops import ssd as op
from nemotron_h.ops.ssd import decay_rate, native, reference, time_step

FREE = (0.0, math.inf)


def case(
    B: int, T: int, H: int, dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32), seed: int = 0,
    scale: float = 3.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dt, a slice of wider rows, and its bias."""
    dt = draw(B, T, H + 6, seed=seed, dtype=dtypes[0], scale=scale)[..., 6:]
    return dt, draw(H, seed=seed + 1, dtype=dtypes[1], scale=2.0)


@examples(max_examples=100)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 90)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    limit=st.sampled_from([FREE, (0.001, 0.1), (0.5, math.inf), (0.0, 0.3), (0.2, 0.2)]),
    seed=st.integers(0, 999),
)
def test_within_the_budget_and_the_same_at_all_levels(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], scale: float, limit: tuple[float, float], seed: int
) -> None:
    arguments = case(*shape, dtypes, seed, scale)
    low = reference.time_step(*arguments, limit)
    high = reference.time_step(*(a.double() for a in arguments), limit)
    with poisoned_memory():
        outs = [native.time_step(*arguments, limit, level) for level in LEVELS]
    for level, out in zip(LEVELS, outs, strict=True):
        assert (out.dtype, out.shape, out.is_contiguous()) == (torch.float32, shape, True)
        assert_bits((out,), (outs[0],), level)
        error, allowed = dispatch.budget(out, low, high, op._TIME_STEP.slack)
        assert error <= allowed, level


def test_every_step_is_exact_to_float32() -> None:
    """Each by itself: the memory of a head is as wrong as its smallest step."""
    values = [-80.0, -30.0, -20.0, -7.0, -1.0, -1e-3, 0.0, 1e-6, 0.7, 5.0, 15.0, 20.0, 21.0, 88.0, 1e4]
    dt, bias = torch.tensor(values)[None, None], torch.zeros(len(values))
    for level in LEVELS:
        out = native.time_step(dt, bias, FREE, level)[0, 0].double()
        for value, step in zip(dt[0, 0].double().tolist(), out.tolist(), strict=True):
            exact = max(value, 0.0) + math.log1p(math.exp(-abs(value)))
            assert step == pytest.approx(exact, rel=6e-8), (level, value)


def test_the_bias_is_added_before_rounding() -> None:
    dt, bias = draw(1, 1, 50), torch.full((50,), -12.3)
    exact = torch.log1p(torch.exp(dt.double() + bias.double()))
    for level in LEVELS:
        torch.testing.assert_close(native.time_step(dt, bias, FREE, level).double(), exact, rtol=6e-8, atol=0)


def test_limits_nan_and_infinity() -> None:
    dt, bias = torch.tensor([[[-9.0, 0.0, 9.0, math.nan, math.inf, -math.inf]]]), torch.zeros(6)
    for limit in ((0.001, 0.1), FREE, (0.5, 0.2)):
        expected = reference.time_step(dt, bias, limit)
        for level in LEVELS:
            out = native.time_step(dt, bias, limit, level)
            torch.testing.assert_close(out, expected, equal_nan=True)


def test_rows_tokens_and_threads_do_not_matter() -> None:
    dt, bias = case(7, 19, 64)
    for level in LEVELS:
        with kernel_threads(1):
            together = native.time_step(dt, bias, FREE, level)
            for b, t in ((0, 0), (6, 7), (3, 5)):
                own = dt[b : b + 1, t : t + 1].clone()
                assert_bits(
                    (native.time_step(own, bias, FREE, level),), (together[b : b + 1, t : t + 1],), (level, b, t)
                )
        for count in (2, 5):
            with kernel_threads(count), poisoned_memory():
                assert_bits((native.time_step(dt, bias, FREE, level),), (together,), (level, count))


def test_layouts_that_the_kernel_takes() -> None:
    dt, bias = case(2, 3, 5)
    turned, spread = dt.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([bias, bias], dim=1)[:, 0]
    for given_dt, given_bias in (
        (turned, bias),
        (dt, spread),
        (dt[:1].expand(4, 3, 5), bias),
        (dt[..., 2:3], bias[:1]),
    ):
        assert native.time_step_refusal(given_dt, given_bias, FREE) is None
        for level in LEVELS:
            found = native.time_step(given_dt, given_bias, FREE, level)
            plain = native.time_step(given_dt.contiguous(), given_bias.contiguous(), FREE, level)
            assert_bits((found,), (plain,), level)


def refused() -> dict[str, tuple[Any, ...]]:
    dt, bias = draw(2, 3, 5), draw(5)
    return {
        "requires grad": (dt, nn.Parameter(bias), FREE),
        "meta": (dt.to("meta"), bias, FREE),
        "not torch.float64 with torch.float32": (dt.double(), bias, FREE),
        "torch.float32 with torch.float16": (dt, bias.half(), FREE),
        r"dt_bias \[4\] does not fit dt \[2, 3, 5\]": (dt, bias[:4], FREE),
        r"does not fit dt \[3, 5\]": (dt[0], bias, FREE),
        "dt is empty": (dt[:0], bias, FREE),
        "rows of dt": (draw(2, 5, 3).transpose(1, 2), bias, FREE),
    }


@pytest.mark.parametrize("reason", refused())
def test_what_the_kernel_refuses(reason: str) -> None:
    with pytest.raises(KernelError, match=reason if LEVELS else "without its C"):
        time_step(*refused()[reason], impl="native")


def test_the_kernel_is_the_choice_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    right = op._TIME_STEP.native
    monkeypatch.setattr(op._TIME_STEP, "native", lambda *args: (calls.append(args), right(*args))[1])
    time_step(draw(2, 8, 5), draw(5), FREE)
    time_step(draw(2, 9, 5), draw(5), FREE)
    time_step(draw(2, 8, 5), draw(5), FREE, impl="reference")
    assert len(calls) == (2 if LEVELS else 0)


def test_check(environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    environment(NEMOTRON_H_CHECK="1")
    for dtype in DTYPES:
        time_step(*case(2, 3, 5, (dtype, dtype)), FREE)
    right = op._TIME_STEP.native
    monkeypatch.setattr(op._TIME_STEP, "native", lambda *args: right(*args) * 1.0001)
    for level in LEVELS[-1:]:
        with pytest.raises(KernelError, match=f"time_step: native {level} is off by"):
            time_step(*case(2, 3, 5), FREE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_rates(dtype: torch.dtype) -> None:
    A_log = torch.cat([torch.linspace(-80, 80, 301), torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])]).to(dtype)
    exact = -torch.exp(A_log.double())
    for level in _native.levels():
        assert torch.equal(native.decay_rate(A_log, level=level).nan_to_num(7.0), exact.float().nan_to_num(7.0))
    with torch.no_grad():
        assert torch.equal(decay_rate(A_log[:300]), exact[:300].float())
    assert decay_rate(A_log.double()).dtype == torch.float64
    with pytest.raises(KernelError, match="contiguous float32 and bfloat16"):
        decay_rate(A_log[::2], impl="native")
