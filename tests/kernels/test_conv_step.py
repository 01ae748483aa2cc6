"""The convolution kernel for a few tokens: bits, budget, windows of any layout, and what it refuses.

Letters: B batch · T tokens · C channels · K taps.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mamba_cases import DTYPES, LEVELS, assert_bits, draw, kernel_threads, poisoned_memory
from torch import Tensor, nn

from helpers import draw_ids, tiny_model
from nemotron_h import NemotronHHybridDynamicCache
from nemotron_h.errors import KernelError
from nemotron_h.ops import causal_conv1d as op
from nemotron_h.ops import dispatch
from nemotron_h.ops.causal_conv1d import causal_conv1d, native, reference

NAN, INF = float("nan"), float("inf")
Arguments = tuple[Any, ...]


def case(
    B: int,
    T: int,
    C: int,
    K: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
) -> Arguments:
    """x, a slice of wider rows; weight, bias, activation, window, lengths, documents."""
    weights = weights or dtype
    x = draw(B, T, C + 5, seed=seed, dtype=dtype)[..., 3 : 3 + C]
    weight, bias = draw(C, 1, K, seed=seed + 1, dtype=weights)[:, 0], draw(C, seed=seed + 2, dtype=weights)
    return x, weight, bias, "silu", draw(B, C, K - 1, seed=seed + 3, dtype=dtype), None, None


def change(arguments: Arguments, **names: Any) -> Arguments:
    order = ("x", "weight", "bias", "activation", "window", "lengths", "seq_idx")
    return tuple(names.get(name, value) for name, value in zip(order, arguments, strict=True))


SHAPES = [(1, 1, 1, 4), (2, 3, 5, 4), (3, 8, 17, 4), (1, 1, 200, 4), (2, 5, 131, 3), (1, 2, 33, 2), (2, 7, 64, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 6144, 4)])
def test_all_levels_give_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype) -> None:
    arguments = case(*shape, seed=sum(shape), dtype=dtype, weights=weights)
    window = reference.causal_conv1d(*arguments)[1]
    with poisoned_memory():
        outs = [native.causal_conv1d(*arguments, level) for level in LEVELS]
    for level, (out, new) in zip(LEVELS, outs, strict=True):
        assert out.isfinite().all(), level
        assert_bits((out, new), (outs[0][0], window), level)


@examples(max_examples=100)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 300), st.integers(2, 5)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    with_bias=st.booleans(),
    with_window=st.booleans(),
    seed=st.integers(0, 999),
)
def test_within_the_budget(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], with_bias: bool, with_window: bool, seed: int
) -> None:
    arguments = case(*shape, seed=seed, dtype=dtypes[0], weights=dtypes[1])
    arguments = change(
        arguments, bias=arguments[2] if with_bias else None, window=arguments[4] if with_window else None
    )
    low = reference.causal_conv1d(*arguments)
    high = reference.causal_conv1d(*(a.double() if isinstance(a, Tensor) else a for a in arguments))
    for level in LEVELS:
        out, window = native.causal_conv1d(*arguments, level)
        error, allowed = dispatch.budget(out, low[0], high[0], op._CONV.slack)
        assert error <= allowed, level
        assert_bits((window,), (low[1],), level)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_any_number(dtype: torch.dtype) -> None:
    """Far below zero it is zero, to the largest number there is, and NaN of minus infinity, as PyTorch has it."""
    sizes = torch.cat([torch.logspace(-30, 38.5, 300), torch.linspace(80, 100, 300), torch.tensor([3.3e38, NAN, INF])])
    x_C = torch.cat([sizes, -sizes]).to(dtype)
    taps_CK = torch.tensor([[0.0, 1.0]], dtype=dtype).expand(len(x_C), 2).contiguous()
    arguments = x_C[None, None], taps_CK, None, "silu", torch.zeros(1, len(x_C), 1, dtype=dtype), None, None
    expected = torch.nn.functional.silu(x_C.double())
    for level in LEVELS:
        out = native.causal_conv1d(*arguments, level)[0][0, 0]
        assert torch.equal(out.isnan(), expected.isnan())
        torch.testing.assert_close(
            out.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-36, equal_nan=True, msg=level
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 8, 19, 4), (1, 5, 64, 3), (3, 4, 1, 2), (1, 6, 40, 5)])
def test_tokens_at_once_and_one_by_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = case(*shape, dtype=dtype)
    tokens = shape[1]
    for level in LEVELS:
        together = native.causal_conv1d(*arguments, level)
        for cuts in ([1] * tokens, [2, tokens - 2], [tokens - 1, 1]):
            window, outs, past = arguments[4], [], 0
            for cut in cuts:
                x = arguments[0][:, past : past + cut]
                out, window = native.causal_conv1d(*change(arguments, x=x, window=window), level)
                outs.append(out)
                past += cut
            assert_bits((torch.cat(outs, dim=1), window), together, (level, cuts))


def test_a_row_and_a_channel_do_not_depend_on_their_neighbours() -> None:
    arguments = case(4, 3, 50, 4)
    x, weight, bias, _, window, *_ = arguments
    for level in LEVELS:
        out, new = native.causal_conv1d(*arguments, level)
        for b, c in ((0, slice(0, 50)), (3, slice(7, 8)), (2, slice(33, 50))):
            own = change(
                arguments, x=x[b : b + 1, :, c].clone(), weight=weight[c].clone(), bias=bias[c].clone(),
                window=window[b : b + 1, c],
            )  # fmt: skip
            assert_bits(native.causal_conv1d(*own, level), (out[b : b + 1, :, c], new[b : b + 1, c]), (level, b, c))


@pytest.mark.parametrize("shape", [(1, 1, 20000, 4), (5, 8, 1031, 4), (2, 4, 6144, 3)])
def test_any_number_of_threads(shape: tuple[int, ...]) -> None:
    arguments = case(*shape)
    for level in LEVELS:
        expected = native.causal_conv1d(*arguments, LEVELS[0])
        for count in (1, 2, 3, 7):
            with kernel_threads(count), poisoned_memory():
                assert_bits(native.causal_conv1d(*arguments, level), expected, (count, level))


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_and_inputs_of_any_strides(dtype: torch.dtype) -> None:
    arguments = case(2, 3, 37, 4, dtype=dtype)
    x, window = arguments[0], arguments[4]
    wide = draw(2, 37, 9, seed=8, dtype=dtype)
    wide[..., 2:8:2] = window
    windows = [window.transpose(1, 2).contiguous().transpose(1, 2), wide[..., 2:8:2], window[:1].expand_as(window)]
    inputs = [x.contiguous(), x.transpose(0, 1).contiguous().transpose(0, 1), x[:, :1].expand(x.shape)]
    for level in LEVELS:
        for given_x in inputs:
            for given_window in windows:
                plain = change(arguments, x=given_x.contiguous(), window=given_window.contiguous())
                strided = change(arguments, x=given_x, window=given_window)
                assert native.refusal(*strided) is None
                found = native.causal_conv1d(*strided, level)
                assert_bits(found, native.causal_conv1d(*plain, level), level)
                assert found[1].stride() == (3 * 37, 1, 37)


def test_subnormals_in_the_window_keep_their_bits() -> None:
    arguments = case(1, 1, 20, 4)
    arguments[4][0, :, 1:] = torch.tensor([1e-42, -0.0])
    for level in LEVELS:
        window = native.causal_conv1d(*arguments, level)[1]
        assert_bits((window[..., :2],), (arguments[4][..., 1:],), level)


def refused() -> dict[str, Arguments]:
    arguments = case(2, 3, 6, 4)
    x, weight, bias, _, window, *_ = arguments
    documents = torch.zeros(2, 3, dtype=torch.long)
    return {
        "requires grad": change(arguments, weight=nn.Parameter(weight)),
        "meta": change(arguments, x=x.to("meta")),
        "bfloat16, not torch.float64": change(arguments, x=x.double()),
        "bfloat16, not torch.float16": change(arguments, bias=bias.half()),
        "window is torch.bfloat16, x is torch.float32": change(arguments, window=window.bfloat16()),
        "neither padding nor": change(arguments, lengths=torch.tensor([3, 2])),
        "nor packed documents": change(arguments, seq_idx=documents),
        "silu only, not relu2": change(arguments, activation="relu2"),
        r"weight \[5, 4\] does not fit x \[2, 3, 6\]": change(arguments, weight=weight[:5]),
        r"does not fit x \[3, 6\]": change(arguments, x=x[0]),
        "x is empty": change(arguments, x=x[:0], window=window[:0]),
        "at most 8 tokens, not 9": case(2, 9, 6, 4),
        "2 to 5 taps, not 6": case(2, 3, 6, 6),
        "2 to 5 taps, not 1": case(2, 3, 6, 1),
        r"bias \[1\] does not fit": change(arguments, bias=bias[:1]),
        r"window \[2, 6, 2\] must be \[2, 6, 3\]": change(arguments, window=window[..., 1:]),
        "rows of x": change(arguments, x=draw(2, 6, 3).transpose(1, 2)),
        "weight .* is not contiguous": change(arguments, weight=draw(4, 6).t()),
        "bias is not contiguous": change(arguments, bias=draw(6, 2)[:, 0]),
    }


@pytest.mark.parametrize("reason", refused())
def test_what_the_kernel_refuses(reason: str) -> None:
    with pytest.raises(KernelError, match=reason if LEVELS else "without its C|neither padding|silu only"):
        op._CONV(*refused()[reason], impl="native")


def test_the_kernel_is_the_choice_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    right = op._CONV.native
    monkeypatch.setattr(op._CONV, "native", lambda *args: (calls.append(args), right(*args))[1])
    arguments = case(2, 3, 6, 4)
    causal_conv1d(*arguments)
    causal_conv1d(*change(arguments, activation="swish"))
    assert len(calls) == (2 if LEVELS else 0)
    causal_conv1d(*change(arguments, lengths=torch.tensor([3, 2])))
    causal_conv1d(*change(arguments, activation="gelu"))
    causal_conv1d(*case(2, 9, 6, 4))
    assert len(calls) == (2 if LEVELS else 0)


def test_check(environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    environment(NEMOTRON_H_CHECK="1")
    for dtype in DTYPES:
        causal_conv1d(*case(2, 3, 70, 4, dtype=dtype))
    right = op._CONV.native
    for wrong in ((1.01, 1.0), (1.0, 1.01)):
        monkeypatch.setattr(
            op._CONV, "native", lambda *args, by=wrong: tuple(t * f for t, f in zip(right(*args), by, strict=True))
        )
        for level in LEVELS[-1:]:
            with pytest.raises(KernelError, match=f"causal_conv1d: native {level} is off by"):
                causal_conv1d(*case(2, 3, 70, 4))


@torch.no_grad()
def test_a_cache_holds_the_window_in_either_layout(tmp_path: Path) -> None:
    """Prefill, step, choose rows, save, load: the windows are the same numbers everywhere."""
    model = tiny_model(hybrid_override_pattern="MM")
    ids = draw_ids(model, 2, 12)
    cache = NemotronHHybridDynamicCache(model.config)
    model(ids[:, :10], past_key_values=cache)
    for t in (10, 11):
        model(ids[:, t : t + 1], past_key_values=cache)
    whole = NemotronHHybridDynamicCache(model.config)
    model(ids, past_key_values=whole)
    cache.save(tmp_path / "cache.safetensors")
    loaded = NemotronHHybridDynamicCache.load(tmp_path / "cache.safetensors", model.config)
    for found, expected in zip((*cache.conv_states, *loaded.conv_states), whole.conv_states * 2, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    cache.reorder_cache(torch.tensor([1, 0]))
    loaded.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(*(model(ids[:, :1], past_key_values=kept).logits for kept in (cache, loaded)))
