"""The recurrence kernel: one set of bits however the work is cut, within its budget, states visited in place or not.

Letters: B batch · T tokens · H heads · P head size · G groups · N state size.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mamba_cases import DTYPES, LEVELS, assert_bits, kernel_threads, poisoned, poisoned_memory
from torch import Tensor, nn

from nemotron_h.errors import KernelError
from nemotron_h.ops import _native, dispatch
from nemotron_h.ops import ssd as op
from nemotron_h.ops.ssd import native, reference, ssd

NAN = float("nan")
Arguments = tuple[Tensor, ...]


def case(
    B: int, T: int, H: int, P: int, G: int, N: int, seed: int = 0, dtype: torch.dtype = torch.float32, pad: int = 3
) -> Arguments:
    """x, dt, A, B, C, D, state; x, B and C are slices of one tensor, as behind the convolution."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = [H * P, G * N, G * N, pad]
    x, B_, C, _ = draw(B, T, sum(sizes)).to(dtype).split(sizes, dim=-1)
    dt, A = torch.rand(B, T, H, generator=generator) * 0.2, -torch.rand(H, generator=generator) * 8
    parts = x.unflatten(-1, (H, P)), B_.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
    return parts[0], dt, A, parts[1], parts[2], draw(H), draw(B, H, P, N)


def part(arguments: Arguments, tokens: slice, state: Tensor | None) -> tuple[Any, ...]:
    x, dt, A, B, C, D, _ = arguments
    return x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], D, state


SHAPES = [
    (1, 1, 1, 1, 1, 1), (2, 3, 4, 5, 2, 7), (1, 8, 6, 80, 3, 96), (3, 2, 2, 17, 1, 64), (1, 4, 3, 16, 3, 127),
    (2, 5, 5, 1, 5, 256), (1, 2, 2, 33, 1, 512), (1, 1, 64, 64, 8, 128),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_levels_give_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = case(*shape, seed=sum(shape), dtype=dtype)
    outs = []
    for level in LEVELS:
        out = poisoned(arguments[-1])
        with poisoned_memory():
            y, state = native.step(*arguments, out, level)
        assert state is out
        assert (y.shape, y.dtype) == (arguments[0].shape, torch.float32)
        assert y.isfinite().all()
        assert state.isfinite().all()
        outs.append((y, state))
    for level, found in zip(LEVELS, outs, strict=True):
        assert_bits(found, outs[0], level)


@examples(max_examples=80)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 3), st.integers(1, 70), st.integers(1, 3)),
    N=st.integers(1, 300),
    dtypes=st.tuples(
        st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(DTYPES)
    ),
    start=st.booleans(),
    seed=st.integers(0, 999),
)
def test_within_the_budget(
    sizes: tuple[int, ...], N: int, dtypes: tuple[torch.dtype, ...], start: bool, seed: int
) -> None:
    B, T, per_group, P, G = sizes
    x, dt, A, B_, C, D, state = case(B, T, per_group * G, P, G, N, seed, dtypes[0])
    D, state = D.to(dtypes[1]), state.to(dtypes[2]) if start else None
    arguments = (x, dt, A, B_, C, D, state)
    low, high = (
        reference.step(*(t if t is None else change(t) for t in arguments)) for change in (Tensor.clone, Tensor.double)
    )
    for level in LEVELS:
        out = torch.full((B, per_group * G, P, N), NAN, dtype=dtypes[3])
        for fast, a, b in zip(native.step(*arguments, out, level), low, high, strict=True):
            error, allowed = dispatch.budget(fast, a, b, op._STEP.slack)
            assert error <= allowed, level


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 8, 4, 7, 2, 19), (1, 5, 2, 64, 1, 128), (3, 4, 1, 3, 1, 1)])
def test_tokens_at_once_and_one_by_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = case(*shape, dtype=dtype)
    tokens = shape[1]
    for level in LEVELS:
        together = native.step(*arguments, None, level)
        for cuts in ([1] * tokens, [2, tokens - 2], [tokens - 1, 1]):
            state, ys, past = arguments[-1], [], 0
            for cut in cuts:
                y, state = native.step(*part(arguments, slice(past, past + cut), state), None, level)
                ys.append(y)
                past += cut
            assert_bits((torch.cat(ys, dim=1), state), together, (level, cuts))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, dt, A, B, C, D, state = case(5, 3, 4, 6, 2, 20)
    for level in LEVELS:
        y, final = native.step(x, dt, A, B, C, D, state, None, level)
        for row in range(5):
            own = slice(row, row + 1)
            alone = native.step(
                x[own].clone(), dt[own].clone(), A, B[own].clone(), C[own].clone(), D, state[own].clone(), None, level
            )
            assert_bits(alone, (y[own], final[own]), (level, row))


def test_a_head_does_not_depend_on_the_others() -> None:
    x, dt, A, B, C, D, state = case(1, 2, 6, 6, 3, 20)
    y, final = native.step(x, dt, A, B, C, D, state, None)
    for head in range(6):
        own, group = slice(head, head + 1), slice(head // 2, head // 2 + 1)
        alone = native.step(
            x[:, :, own], dt[:, :, own], A[own], B[:, :, group], C[:, :, group], D[own],
            state[:, own].contiguous(), None,
        )  # fmt: skip
        assert_bits(alone, (y[:, :, own], final[:, own]), head)


@pytest.mark.parametrize("shape", [(2, 2, 16, 64, 2, 128), (1, 1, 40, 80, 5, 97), (64, 3, 3, 8, 1, 64)])
def test_any_number_of_threads(shape: tuple[int, ...]) -> None:
    arguments = case(*shape)
    for level in LEVELS[1:]:
        expected = native.step(*arguments, None, LEVELS[0])
        for count in (1, 2, 3, 7):
            with kernel_threads(count):
                for _ in range(3):
                    assert_bits(native.step(*arguments, poisoned(arguments[-1]), level), expected, (count, level))


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 2, 3, 5, 1, 7), (1, 1, 64, 64, 8, 128), (3, 1, 8, 100, 2, 130), (1, 3, 33, 64, 1, 160)]
)
def test_in_place_and_elsewhere(shape: tuple[int, ...], state_dtype: torch.dtype) -> None:
    """Beyond 1 MiB another buffer is written past the caches, where its lines are whole."""
    *inputs, state = case(*shape, dtype=torch.bfloat16)
    state = state.to(state_dtype)
    for level in LEVELS:
        elsewhere, shifted = (
            poisoned(state),
            torch.full((state.numel() + 1,), NAN, dtype=state_dtype)[1:].view_as(state),
        )
        kept = state.clone()
        expected = native.step(*inputs, state, elsewhere, level)
        assert_bits((state,), (kept,), "the old state stays")
        assert not elsewhere.isnan().any()
        assert_bits(native.step(*inputs, state, shifted, level), expected, level)
        in_place = state.clone()
        y, found = native.step(*inputs, in_place, in_place, level)
        assert found is in_place
        assert_bits((y, found), expected, level)


def test_a_state_at_rest_is_rounded_once() -> None:
    *inputs, state = case(2, 3, 4, 5, 2, 33)
    state = state.bfloat16()
    for level in LEVELS:
        y, wide = native.step(*inputs, state, None, level)
        assert wide.dtype == torch.float32
        assert_bits(native.step(*inputs, state, poisoned(state), level), (y, wide.bfloat16()), level)
        assert_bits(native.step(*inputs, state.float(), None, level), (y, wide), level)


@pytest.mark.parametrize("state_dtype", DTYPES)
def test_padding_leaves_every_bit_of_the_state(state_dtype: torch.dtype) -> None:
    x, dt, A, B, C, D, state = case(2, 3, 2, 3, 1, 37)
    state[0, 0, 0, :6] = torch.tensor([1e-42, -1e-42, -0.0, 3e37, 1e-38, -1e-45])
    state = state.to(state_dtype)
    for level in LEVELS:
        y, final = native.step(x, torch.zeros_like(dt), A, B, C, D, state, poisoned(state), level)
        assert_bits((final,), (state,), level)
        assert y.isfinite().all()
        behind = dt.clone()
        behind[1, 1:] = 0  # a row of one token in a batch of longer ones
        rows = native.step(x, behind, A, B, C, D, state, None, level)[1]
        short = native.step(x[:, :1], dt[:, :1], A, B[:, :1], C[:, :1], D, state, None, level)[1]
        assert_bits((rows[1],), (short[1],), level)


def test_the_state_does_not_drift() -> None:
    """32,768 tokens in steps of 8, one step size all along: a decay rounded to float32 would be off by 1e-5 here."""
    tokens = 1 << 15
    x, dt, A, B, C, D, state = case(1, tokens, 2, 3, 1, 8)
    dt, A = torch.full_like(dt, 0.004), torch.tensor([-0.5, -1.7])
    expected = reference.chunk_scan(*(t.double() for t in (x, dt, A, B, C, D)), 128, state.double(), None)
    for level in LEVELS[-2:]:
        ys, now = [], state
        for start in range(0, tokens, 8):
            y, now = native.step(*part((x, dt, A, B, C, D, state), slice(start, start + 8), now), None, level)
            ys.append(y[:, -1])
        assert (now - expected[1]).norm() <= 1e-6 * expected[1].norm(), level
        every = expected[0][:, 7::8]
        assert (torch.stack(ys, dim=1) - every).norm() <= 1e-6 * every.norm(), level


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("start", [False, True])
def test_the_reference_is_the_recurrence(tokens: int, start: bool) -> None:
    x, dt, A, B, C, D, state = (t.double() for t in case(2, tokens, 4, 3, 2, 5))
    y, final = reference.step(x, dt, A, B, C, D, state if start else None)
    for b, h, p in ((0, 0, 0), (1, 3, 2), (0, 2, 1)):
        row = state[b, h, p].tolist() if start else [0.0] * 5
        for t in range(tokens):
            decay, u = math.exp(dt[b, t, h] * A[h]), float(dt[b, t, h] * x[b, t, h, p])
            row = [decay * old + u * new for old, new in zip(row, B[b, t, h // 2].tolist(), strict=True)]
            out = sum(old * c for old, c in zip(row, C[b, t, h // 2].tolist(), strict=True))
            assert float(y[b, t, h, p]) == pytest.approx(out + float(D[h] * x[b, t, h, p]), rel=1e-12, abs=1e-12)
        assert final[b, h, p].tolist() == pytest.approx(row, rel=1e-12)


def refused() -> dict[str, tuple[Any, ...]]:
    x, dt, A, B, C, D, state = case(2, 3, 4, 5, 2, 7)
    wide = case(2, 3, 4, 5, 2, 600)
    long = case(2, 17, 4, 5, 2, 7)
    return {
        "requires grad": (x, dt, A, B, C, nn.Parameter(D), state, None),
        "meta": (*(t.to("meta") for t in (x, dt, A, B, C, D, state)), None),
        "not torch.float64": (x.double(), dt, A, B.double(), C.double(), D, state, None),
        "bfloat16, not torch.float16": (x, dt, A, B, C, D, state.half(), None),
        "float32 and bfloat16, not torch.int32": (x, dt, A, B, C, D, state, state.int()),
        "one dtype, not torch.float32, torch.bfloat16": (x, dt, A, B.bfloat16(), C, D, state, None),
        "torch.float32 and torch.bfloat16": (x, dt, A, B, C.bfloat16(), D, state, None),
        "must be float32, not torch.bfloat16 and torch.float32": (x, dt.bfloat16(), A, B, C, D, state, None),
        "and torch.bfloat16$|and torch.bfloat16\\.": (x, dt, A.bfloat16(), B, C, D, state, None),
        "must have 4 dimensions": (x[0], dt, A, B, C, D, state, None),
        "x or B is empty": (x[:0], dt[:0], A, B[:0], C[:0], D, state[:0], None),
        "at most 16 tokens, not 17": (*long, None),
        "at most 512, not 600": (*wide, None),
        "4 heads do not split into 3 groups": (x, dt, A, B[:, :, [0, 1, 1]], C[:, :, [0, 1, 1]], D, state, None),
        r"dt \[2, 2, 4\] does not fit x": (x, dt[:, :2], A, B, C, D, state, None),
        r"A \[3\] does not fit": (x, dt, A[:3], B, C, D, state, None),
        r"B \[1, 3, 2, 7\] does not fit": (x, dt, A, B[:1], C, D, state, None),
        r"C \[2, 3, 1, 7\] does not fit": (x, dt, A, B, C[:, :, :1], D, state, None),
        r"D \[4, 5\] does not fit": (x, dt, A, B, C, D[:, None].expand(4, 5), state, None),
        r"state 0 \[2, 4, 5, 6\]": (x, dt, A, B, C, D, state[..., :6], None),
        r"state 1 \[1, 4, 5, 7\]": (x, dt, A, B, C, D, state, state[:1]),
        "rows of x, B or C": (x.transpose(2, 3).contiguous().transpose(2, 3), dt, A, B, C, D, state, None),
        "a state is not contiguous": (x, dt, A, B, C, D, state, state.transpose(0, 1).contiguous().transpose(0, 1)),
    }  # fmt: skip


@pytest.mark.parametrize("reason", refused())
def test_what_the_kernel_refuses(reason: str) -> None:
    with pytest.raises(KernelError, match=reason if LEVELS else "without its C"):
        op._STEP(*refused()[reason], impl="native")


@pytest.mark.parametrize("layout", ["rows far apart", "heads in another order", "expanded", "one channel"])
def test_layouts_that_the_kernel_takes(layout: str) -> None:
    x, dt, A, B, C, D, state = case(2, 3, 4, 5, 2, 7)
    if layout == "rows far apart":
        B, dt = torch.randn(2, 3, 2, 9)[..., 1:8], torch.rand(2, 3, 8)[..., ::2]
    elif layout == "heads in another order":
        x, A = x.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([A, A], dim=1)[:, 0]
    elif layout == "expanded":
        x, D = x[:1].expand(2, 3, 4, 5), D[:1].expand(4)
    else:
        x, state = x[..., 2:3], state[:, :, :1].contiguous()
    expected = native.step(*(t.contiguous() for t in (x, dt, A, B, C, D, state)), None)
    assert op._STEP.refusal(x, dt, A, B, C, D, state, None) is None
    assert_bits(native.step(x, dt, A, B, C, D, state, None), expected)


def test_which_form_runs(environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name, implementation in (
        (op._STEP, "native"),
        (op._STEP, "reference"),
        (op._CHUNK_SCAN, "native"),
        (op._CHUNK_SCAN, "reference"),
    ):
        right = getattr(name, implementation)
        label = f"{name.name} {implementation}"
        spy = lambda *args, right=right, label=label: (ran.append(label), right(*args))[1]  # noqa: E731
        monkeypatch.setattr(name, implementation, spy)

    def run(tokens: int, impl: str | None = None, seq_idx: Tensor | None = None, **change: Any) -> str:
        x, dt, A, B, C, D, state = case(2, tokens, 4, 5, 2, 7)
        D = change.get("D", D)
        ssd(x, dt, A, B, C, D, 4, state, seq_idx, impl=impl)
        return ran.pop()

    kernel, step, scan = "ssd_step native", "ssd_step reference", "ssd_chunk_scan reference"
    chunks = scan if _native.emulates() else "ssd_chunk_scan native"
    assert [run(tokens) for tokens in (1, 2, 16, 17)] == [kernel, kernel, kernel, chunks]
    assert [run(tokens, "reference") for tokens in (1, 2, 9)] == [step, scan, scan]
    assert [run(tokens, "native") for tokens in (1, 16)] == [kernel, kernel]
    with pytest.raises(KernelError, match=r"ssd_chunk_scan: .* requires grad"):
        run(17, "native", D=torch.ones(4, requires_grad=True))
    with pytest.raises(KernelError, match=r"ssd_step: .* requires grad"):
        run(4, "native", D=torch.ones(4, requires_grad=True))
    documents = torch.zeros(2, 3, dtype=torch.long)
    assert [run(3, seq_idx=documents), run(1, seq_idx=documents[:, :1])] == [chunks, kernel]
    trained = torch.ones(4, requires_grad=True)
    assert [run(1, D=trained), run(3, D=trained)] == [step, scan]
    environment(NEMOTRON_H_IMPL="reference")
    assert [run(1), run(3)] == [step, scan]


def test_out_state_is_for_kernels_alone() -> None:
    x, dt, A, B, C, D, state = case(2, 3, 4, 5, 2, 7)
    for impl in ("reference", None):
        out = poisoned(state)
        scan = ssd(x, dt, A, B, C, D, 4, state, out_state=out, impl=impl)
        assert (scan.final_state is out) == (impl is None and bool(LEVELS))
        assert out.isnan().all() == (scan.final_state is not out)
        assert scan.final_state.isfinite().all()


@torch.no_grad()
def test_compile_sees_the_references() -> None:
    for tokens in (1, 3):
        x, dt, A, B, C, D, state = case(2, tokens, 4, 5, 2, 7)
        compiled = torch.compile(lambda *args: ssd(*args[:-1], 4, args[-1]), fullgraph=True, backend="eager")
        expected = ssd(x, dt, A, B, C, D, 4, state, impl="reference")
        assert_bits(compiled(x, dt, A, B, C, D, state), expected)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("where", ["none", "elsewhere", "in place"])
def test_check_sees_the_state_from_before(tokens: int, where: str, environment: Callable[..., None]) -> None:
    environment(NEMOTRON_H_CHECK="1")
    for dtype in DTYPES:
        for state_dtype in DTYPES:
            *inputs, state = case(2, tokens, 4, 5, 2, 70, dtype=dtype)
            state = state.to(state_dtype)
            out = {"none": None, "elsewhere": poisoned(state), "in place": state}[where]
            expected = native.step(*inputs, state.clone(), None if out is None else poisoned(state))
            scan = ssd(*inputs, 4, state, out_state=out)
            assert out is None or scan.final_state is out
            assert_bits(tuple(scan), expected)


@pytest.mark.parametrize("wrong", [0, 1])
def test_check_catches_a_wrong_step(
    wrong: int, environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(NEMOTRON_H_CHECK="1")
    right = op._STEP.native

    def broken(*args: Any) -> tuple[Tensor, ...]:
        results = right(*args)
        results[wrong].mul_(1.00001)
        return results

    monkeypatch.setattr(op._STEP, "native", broken)
    *inputs, state = case(2, 2, 4, 5, 2, 7)
    with pytest.raises(KernelError, match=r"ssd_step: native .* is off by"):
        ssd(*inputs, 4, state, out_state=state)
