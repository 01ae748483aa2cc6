"""The convolution kernel: bits, budget, windows of any layout, padding, packed documents, and what it refuses.

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
from torch import nn

from helpers import draw_ids, tiny_model
from nemotron_h import NemotronHHybridDynamicCache
from nemotron_h.errors import KernelError
from nemotron_h.ops import _native, dispatch
from nemotron_h.ops import causal_conv1d as op
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


SHAPES = [
    (1, 1, 1, 4), (2, 3, 5, 4), (3, 8, 17, 4), (1, 1, 200, 4), (2, 5, 131, 3), (1, 2, 33, 2), (2, 7, 64, 5),
    (1, 65, 130, 4), (2, 129, 19, 4), (3, 40, 20, 5), (70, 1, 20, 4), (33, 2, 17, 3),
]  # fmt: skip


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
    shape=st.tuples(
        st.integers(1, 3), st.one_of(st.integers(1, 8), st.integers(9, 200)), st.integers(1, 300), st.integers(2, 5)
    ),
    padded=st.booleans(),
    packed=st.booleans(),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    with_bias=st.booleans(),
    with_window=st.booleans(),
    seed=st.integers(0, 999),
)
def test_within_the_budget(
    shape: tuple[int, ...],
    padded: bool,
    packed: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    with_bias: bool,
    with_window: bool,
    seed: int,
) -> None:
    arguments = case(*shape, seed=seed, dtype=dtypes[0], weights=dtypes[1])
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(shape[:2], generator=generator) < 0.3
    arguments = change(
        arguments, bias=arguments[2] if with_bias else None, window=arguments[4] if with_window else None,
        lengths=torch.randint(0, shape[1] + 1, shape[:1], generator=generator) if padded else None,
        seq_idx=starts.long().cumsum(-1) if packed else None,
    )  # fmt: skip
    low = reference.causal_conv1d(*arguments)
    high = reference.causal_conv1d(*dispatch.in_float64(arguments))
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
@pytest.mark.parametrize("shape", [(2, 8, 19, 4), (1, 5, 64, 3), (3, 4, 1, 2), (1, 6, 40, 5), (2, 150, 19, 4)])
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


@pytest.mark.parametrize("shape", [(1, 1, 20000, 4), (5, 8, 1031, 4), (2, 4, 6144, 3), (2, 200, 140, 4)])
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


def test_documents_have_the_bits_of_documents_alone() -> None:
    """Shorter ones than the window too, at both ends of a block of 64 tokens."""
    lengths = [1, 62, 1, 1, 2, 80, 3, 1]
    for taps in native.TAPS:
        arguments = case(2, sum(lengths), 21, taps)
        x, window = arguments[0], arguments[4]
        documents = torch.repeat_interleave(torch.arange(len(lengths)) * 2, torch.tensor(lengths)).expand(2, -1)
        for level in LEVELS:
            out, new = native.causal_conv1d(*change(arguments, seq_idx=documents), level)
            at = 0
            for length in lengths:
                own = change(arguments, x=x[:, at : at + length], window=window if at == 0 else None)
                alone = native.causal_conv1d(*own, level)[0]
                assert_bits((alone,), (out[:, at : at + length],), (level, taps, at))
                at += length
            assert_bits((new,), (x[:, 1 - taps :].transpose(1, 2),), "the last inputs, whosever they are")
            narrow = change(arguments, seq_idx=documents.int())
            assert_bits(native.causal_conv1d(*narrow, level), (out, new), "int32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_rows_have_the_window_of_rows_alone(dtype: torch.dtype) -> None:
    lengths = [70, 0, 1, 2, 3, 64, 69]
    for taps in native.TAPS:
        x, _, _, _, window, *_ = arguments = case(len(lengths), 70, 21, taps, dtype=dtype)
        for level in LEVELS:
            for before in (window, None):
                padded = change(arguments, window=before, lengths=torch.tensor(lengths))
                with poisoned_memory():
                    out, new = native.causal_conv1d(*padded, level)
                for row, length in enumerate(lengths):
                    past = torch.zeros_like(window[row]) if before is None else window[row]
                    kept = torch.cat([past, x[row, :length].t()], dim=1)[:, 1 - taps :]
                    assert_bits((new[row],), (kept,), (level, taps, row))
                unpadded = change(padded, lengths=None)
                assert_bits((out,), (native.causal_conv1d(*unpadded, level)[0],), "outputs")


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
        r"lengths torch.int64 \[3\] must be int64 \[2\]": change(arguments, lengths=torch.tensor([3, 2, 1])),
        r"lengths torch.float32 \[2\]": change(arguments, lengths=torch.tensor([3.0, 2.0])),
        "lengths must lie between 0 and the 3": change(arguments, lengths=torch.tensor([4, 2])),
        "between 0 and the 3 tokens": change(arguments, lengths=torch.tensor([-1, 2])),
        r"seq_idx torch.int64 \[2, 2\] must be int64 \[2, 3\]": change(arguments, seq_idx=documents[:, 1:]),
        r"seq_idx torch.bool \[2, 3\]": change(arguments, seq_idx=documents.bool()),
        "a tensor is on meta": change(arguments, seq_idx=documents.to("meta")),
        "silu only, not relu2": change(arguments, activation="relu2"),
        r"weight \[5, 4\] does not fit x \[2, 3, 6\]": change(arguments, weight=weight[:5]),
        r"does not fit x \[3, 6\]": change(arguments, x=x[0]),
        "x is empty": change(arguments, x=x[:0], window=window[:0]),
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
    with pytest.raises(KernelError, match=reason if LEVELS else "without its C|silu only"):
        op._CONV(*refused()[reason], impl="native")


def test_the_kernel_is_the_choice_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    right = op._CONV.native
    monkeypatch.setattr(op._CONV, "native", lambda *args: (calls.append(args), right(*args))[1])
    arguments = case(2, 3, 6, 4)
    causal_conv1d(*arguments)
    causal_conv1d(*change(arguments, activation="swish"))
    causal_conv1d(*change(arguments, lengths=torch.tensor([3, 2]), seq_idx=torch.tensor([[0, 0, 1], [0, 1, 1]])))
    assert len(calls) == 3
    causal_conv1d(*change(arguments, activation="gelu"))
    assert len(calls) == 3
    causal_conv1d(*case(2, 9, 6, 4))
    assert len(calls) == (3 if _native.emulates() else 4)


def test_the_generic_level_leaves_many_tokens_to_pytorch(
    environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(NEMOTRON_H_ISA="generic")
    for machine, slow in (("x86_64", True), ("AMD64", True), ("aarch64", False)):
        monkeypatch.setattr(_native.platform, "machine", lambda machine=machine: machine)
        assert (native.refusal(*case(1, 9, 2, 4)) == _native.EMULATED) == slow
        assert native.refusal(*case(1, 8, 2, 4)) is None


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
