"""The chunk scan kernel: within its budget for long and short memories, one set of bits however the work is cut.

Letters: B batch · T tokens · H heads · P head size · G groups · N state size.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mamba_cases import DTYPES, LEVELS, assert_bits, kernel_threads
from torch import Tensor, nn

from nemotron_h.errors import KernelError
from nemotron_h.ops import _native, dispatch
from nemotron_h.ops import ssd as op
from nemotron_h.ops.ssd import native, reference, ssd, ssd_in_two

Arguments = tuple[Any, ...]
FAST = LEVELS[1:] or LEVELS
"""Levels for work that would take the generic one long."""


def case(
    B: int,
    T: int,
    H: int,
    P: int,
    G: int,
    N: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    steps: tuple[float, float] = (1e-3, 0.3),
) -> Arguments:
    """x, dt, A, B, C, D, chunk size, state, documents; x, B and C are slices of one tensor, as behind the convolution,
    and dt is drawn evenly on a logarithmic scale."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = [H * P, G * N, G * N, 3]
    x, B_, C, _ = draw(B, T, sum(sizes)).to(dtype).split(sizes, dim=-1)
    low, high = map(math.log, steps)
    dt = torch.exp(low + (high - low) * torch.rand(B, T, H, generator=generator))
    A = -torch.exp(torch.rand(H, generator=generator) * math.log(16))  # 1 to 16, as models are initialized
    parts = x.unflatten(-1, (H, P)), B_.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
    return parts[0], dt, A, parts[1], parts[2], draw(H), 128, draw(B, H, P, N), None


def change(arguments: Arguments, **names: Any) -> Arguments:
    order = ("x", "dt", "A", "B", "C", "D", "chunk_size", "state", "seq_idx")
    return tuple(names.get(name, value) for name, value in zip(order, arguments, strict=True))


def part(arguments: Arguments, tokens: slice, state: Tensor | None) -> Arguments:
    x, dt, _, B, C, *_ = arguments
    cut = {"x": x[:, tokens], "dt": dt[:, tokens], "B": B[:, tokens], "C": C[:, tokens]}
    return change(arguments, **cut, state=state, seq_idx=None)


@contextmanager
def fenced_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN and lie between fences: elements that a kernel forgot show, and those beside."""
    right, fences = Tensor.new_empty, []

    def new_empty(self: Tensor, *size: int, **options: Any) -> Tensor:
        count = math.prod(size)
        memory = right(self, count + 64, **options).fill_(float("nan"))
        fences.extend(fence.fill_(7.0) for fence in (memory[:32], memory[32 + count :]))
        return memory[32 : 32 + count].view(size)

    Tensor.new_empty = new_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Tensor.new_empty = right  # type: ignore[method-assign]
    assert all(bool((fence == 7.0).all()) for fence in fences)


def assert_within_the_budget(arguments: Arguments, levels: tuple[str, ...] = LEVELS) -> None:
    low, high = reference.chunk_scan(*arguments), reference.chunk_scan(*dispatch.in_float64(arguments))
    for level in levels:
        with fenced_memory():
            found = native.scan(*arguments, level)
        for fast, a, b in zip(found, low, high, strict=True):
            assert (fast.dtype, fast.shape) == (torch.float32, b.shape)
            error, allowed = dispatch.budget(fast, a, b, op._CHUNK_SCAN.slack)
            assert error <= allowed, level


SHAPES = [
    (1, 1, 1, 1, 1, 1), (2, 65, 4, 5, 2, 7), (1, 130, 6, 80, 3, 96), (3, 17, 2, 63, 1, 64), (1, 64, 3, 16, 3, 127),
    (2, 129, 5, 1, 5, 16), (1, 23, 2, 130, 1, 256), (1, 67, 16, 64, 2, 128),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_levels_give_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = case(*shape, seed=sum(shape), dtype=dtype)
    with fenced_memory():
        outs = [native.scan(*arguments, level) for level in LEVELS]
    for level, found in zip(LEVELS, outs, strict=True):
        assert found[0].isfinite().all(), level
        assert_bits(found, outs[0], level)


@examples(max_examples=60)
@given(
    T=st.integers(1, 300),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from((1, 3, 16, 63, 64, 80)), st.integers(1, 2)),
    N=st.sampled_from((1, 15, 16, 33, 96, 128, 200)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    steps=st.sampled_from(((1e-4, 1e-2), (1e-3, 0.1), (0.05, 1.0), (1.0, 30.0))),
    start=st.booleans(),
    seed=st.integers(0, 999),
)
def test_within_the_budget(
    T: int,
    sizes: tuple[int, ...],
    N: int,
    dtypes: tuple[torch.dtype, ...],
    steps: tuple[float, float],
    start: bool,
    seed: int,
) -> None:
    """In norms over 16 numbers or more: a single sum may cancel to nearly nothing."""
    B, per_group, P, G = sizes
    assume(P * N >= 16)
    arguments = case(B, T, per_group * G, P, G, N, seed, dtypes[0], steps)
    state = arguments[7].to(dtypes[2]) if start else None
    assert_within_the_budget(change(arguments, D=arguments[5].to(dtypes[1]), state=state), FAST[-1:])


@pytest.mark.parametrize("dt", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_the_budget_over_32k_tokens(dt: float, dtype: torch.dtype) -> None:
    """The same step everywhere: then every decay errs to the same side."""
    x, steps, A, *rest = case(1, 32768, 1, 4, 1, 16, dtype=dtype)
    assert_within_the_budget((x, torch.full_like(steps, dt), torch.full_like(A, -1.0), *rest), FAST[-1:])


@pytest.mark.parametrize("rate", [1e-3, 1.0, 16.0])
@pytest.mark.parametrize("dt", [1e-4, 1e-2, 1.0])
def test_every_decay_is_as_exact_as_a_float(dt: float, rate: float) -> None:
    """B and C choose one pair of tokens (s, q) for each n: y[q] is then exp(sum of dt·A over (s, q]) itself.

    Three units in the last place, and what the rounding of an exponent of e costs beside."""
    T, N = 128, 128
    x, steps, A, B, C, D, chunk, *_ = case(1, T, 1, 1, 1, N)
    sources = torch.randint(0, T, (T,), generator=torch.Generator().manual_seed(3))
    sources = torch.minimum(sources, torch.arange(T))
    steps = dt * (0.5 + steps / steps.max())
    C, B = torch.eye(T)[None, :, None], torch.zeros(1, T, 1, N)
    B[0, sources, 0, torch.arange(T)] = 1.0
    A = torch.full_like(A, -rate)
    total = (steps[0, :, 0].double() * -rate).cumsum(0)
    exponent = total - total[sources]
    expected = torch.exp(exponent) * steps[0, sources, 0].double()
    for level in LEVELS:
        y, _ = native.scan(torch.ones_like(x), steps, A, B, C, torch.zeros_like(D), chunk, None, None, level)
        error = (y[0, :, 0, 0].double() - expected).abs()
        assert bool((error <= expected * 2.0**-23 * (3 + 1.5 * exponent.abs()) + 1e-37).all()), level


@pytest.mark.parametrize("dt", [1e-4, 2e-4, 3e-4, 1e-3])
def test_a_long_memory_does_not_drift(dt: float) -> None:
    """The decay of a chunk, 512 times the same: as a single float it would be off by 1e-5 in the end."""
    x, steps, A, B, C, D, chunk, state, _ = case(1, 32768, 1, 8, 1, 16)
    steps, A = torch.full_like(steps, dt), torch.full_like(A, -1.0)
    expected = state.double() * torch.exp(-steps[0, 0, 0].double() * 32768)
    for level in FAST:
        final = native.scan(torch.zeros_like(x), steps, A, B, C, D, chunk, state, None, level)[1]
        assert (final - expected).norm() <= 1.5e-6 * expected.norm(), level


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 300, 4, 7, 2, 19), (1, 261, 2, 64, 1, 128), (1, 257, 3, 1, 1, 1)])
def test_cut_at_multiples_of_a_chunk(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = case(*shape, dtype=dtype)
    tokens = shape[1]
    for level in LEVELS:
        whole = native.scan(*arguments, level)
        for cuts in ([128], [256], [128, 256], [64, 192]):
            state, ys = arguments[7], []
            for begin, end in zip([0, *cuts], [*cuts, tokens], strict=True):
                y, state = native.scan(*part(arguments, slice(begin, end), state), level)
                ys.append(y)
            assert_bits((torch.cat(ys, dim=1), state), whole, (level, cuts))


def test_a_token_does_not_depend_on_those_behind() -> None:
    arguments = case(1, 200, 2, 17, 1, 33)
    for level in LEVELS:
        whole, _ = native.scan(*arguments, level)
        for tokens in (1, 5, 16, 63, 64, 65, 101, 144, 199):
            y, _ = native.scan(*part(arguments, slice(tokens), arguments[7]), level)
            assert_bits((y,), (whole[:, :tokens],), (level, tokens))


def test_a_row_and_a_head_do_not_depend_on_their_neighbours() -> None:
    arguments = case(3, 70, 6, 20, 3, 24)
    x, dt, A, B, C, D, chunk, state, _ = arguments
    for level in LEVELS:
        y, final = native.scan(*arguments, level)
        for row, head in ((0, 0), (2, 5), (1, 2)):
            b, h, g = slice(row, row + 1), slice(head, head + 1), slice(head // 2, head // 2 + 1)
            alone = native.scan(
                x[b, :, h].clone(), dt[b, :, h].clone(), A[h].clone(), B[b, :, g].clone(), C[b, :, g].clone(),
                D[h].clone(), chunk, state[b, h].clone(), None, level,
            )  # fmt: skip
            assert_bits(alone, (y[b, :, h], final[b, h]), (level, row, head))


def test_chunk_size_is_the_reference_s() -> None:
    arguments = case(1, 150, 2, 8, 1, 16)
    assert_bits(native.scan(*change(arguments, chunk_size=7)), native.scan(*arguments))


@pytest.mark.parametrize("shape", [(2, 100, 16, 16, 2, 32), (1, 70, 40, 24, 5, 97), (1, 90, 5, 64, 1, 64)])
def test_any_number_of_threads(shape: tuple[int, ...]) -> None:
    arguments = case(*shape)
    for level in FAST:
        with kernel_threads(1):
            expected = native.scan(*arguments, level)
        for count in (2, 3, 7):
            with kernel_threads(count), fenced_memory():
                assert_bits(native.scan(*arguments, level), expected, (count, level))


@pytest.mark.parametrize("layout", ["rows far apart", "heads in another order", "expanded", "at odd addresses"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(layout: str, dtype: torch.dtype) -> None:
    x, dt, A, B, C, D, chunk, state, _ = case(2, 70, 4, 5, 2, 7, dtype=dtype)
    if layout == "rows far apart":
        B, dt = torch.randn(2, 70, 2, 9).to(dtype)[..., 1:8], torch.rand(2, 70, 8)[..., ::2]
    elif layout == "heads in another order":
        x, A = x.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([A, A], dim=1)[:, 0]
    elif layout == "expanded":
        x, C, D = x[:1].expand(2, 70, 4, 5), C[:, :1].expand(2, 70, 2, 7), D[:1].expand(4)
    else:
        x = torch.randn(2 * 70 * 4 * 5 + 1).to(dtype)[1:].view(2, 70, 4, 5)
        state = torch.randn(2 * 4 * 5 * 7 + 1)[1:].view(2, 4, 5, 7)
    given_arguments = (x, dt, A, B, C, D, chunk, state, None)
    plain = tuple(a.contiguous().clone() if isinstance(a, Tensor) else a for a in given_arguments)
    assert native.scan_refusal(*given_arguments) is None
    for level in LEVELS:
        assert_bits(native.scan(*given_arguments, level), native.scan(*plain, level), level)


def test_the_state_before_stays_as_it_was() -> None:
    for dtype in DTYPES:
        arguments = case(1, 70, 2, 5, 1, 7)
        state = arguments[7].to(dtype)
        kept = state.clone()
        found = native.scan(*change(arguments, state=state))
        assert_bits((state,), (kept,))
        assert_bits(found, native.scan(*change(arguments, state=kept.float())), "widened")
    zeros = torch.zeros_like(arguments[7])
    assert_bits(native.scan(*change(arguments, state=None)), native.scan(*change(arguments, state=zeros)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_have_the_bits_of_documents_alone(dtype: torch.dtype) -> None:
    lengths = [[1, 64, 70, 3, 128, 34], [150, 1, 1, 148]]
    arguments = case(2, 300, 4, 17, 2, 33, dtype=dtype)
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) * 3 - 1 for row in lengths]
    packed = change(arguments, seq_idx=torch.stack(rows))
    assert_within_the_budget(packed)
    for level in LEVELS:
        y, final = native.scan(*packed, level)
        assert_bits(native.scan(*change(packed, seq_idx=packed[8].int()), level), (y, final), "int32")
        for row, counts in enumerate(lengths):
            at = 0
            for count in counts:
                own = part(arguments, slice(at, at + count), arguments[7] if at == 0 else None)
                own = change(
                    own, x=own[0][row : row + 1], dt=own[1][row : row + 1], B=own[3][row : row + 1],
                    C=own[4][row : row + 1], state=None if own[7] is None else own[7][row : row + 1],
                )  # fmt: skip
                alone, left = native.scan(*own, level)
                assert_bits((alone,), (y[row : row + 1, at : at + count],), (level, row, at))
                at += count
            assert_bits((left,), (final[row : row + 1],), (level, row))


@pytest.mark.parametrize("real", [1, 50, 64, 90, 128])
def test_padding_leaves_every_bit_of_the_state(real: int) -> None:
    """Behind the real tokens dt is 0; what stands there reaches neither the state nor the outputs before."""
    arguments = case(1, 200, 2, 17, 1, 33)
    arguments[1][:, real:] = 0.0
    for level in LEVELS:
        alone = native.scan(*part(arguments, slice(real), arguments[7]), level)
        for there in (3e30, float("nan")):
            padded = change(arguments, x=arguments[0].clone())
            padded[0][:, real:] = there
            y, final = native.scan(*padded, level)
            assert_bits((final,), (alone[1],), level)
            if there == 3e30:
                assert_bits((y[:, :real],), (alone[0],), level)
    arguments[1][:] = 0.0
    arguments[7][0, 0, 0, :2] = torch.tensor([-0.0, 1e-42])
    for level in LEVELS:
        assert_bits((native.scan(*arguments, level)[1],), (arguments[7],), "no step at all")


def test_subnormals_and_extremes_give_the_same_bits() -> None:
    arguments = case(1, 140, 2, 17, 1, 33)
    arguments[0][:, ::3] *= 1e-39
    arguments[3][:, 1::5] *= 1e-38
    arguments[7][..., ::2] *= 1e-40
    arguments[1][:, 30:40] = 50.0  # decays of exactly zero
    arguments[1][:, 70:100] = 1e-30
    expected = native.scan(*arguments, LEVELS[0])
    assert all(t.isfinite().all() for t in expected)
    for level in LEVELS:
        assert_bits(native.scan(*arguments, level), expected, level)
    for count in (1, 3):
        with kernel_threads(count):
            assert_bits(native.scan(*arguments), expected, count)
    assert_within_the_budget(arguments)


def refused() -> dict[str, Arguments]:
    arguments = case(2, 9, 4, 5, 2, 7)
    x, dt, _, B, C, D, _, state, _ = arguments
    documents = torch.zeros(2, 9, dtype=torch.long)
    return {
        "requires grad": change(arguments, D=nn.Parameter(D)),
        "meta": change(arguments, x=x.to("meta")),
        "bfloat16, not torch.float64": change(arguments, x=x.double()),
        "bfloat16, not torch.float16": change(arguments, state=state.half()),
        "torch.bfloat16 and torch.float32$|torch.bfloat16 and torch.float32\\.": change(arguments, B=B.bfloat16()),
        "must be float32, not torch.bfloat16": change(arguments, dt=dt.bfloat16()),
        "x or B is empty": change(arguments, x=x[:, :0], dt=dt[:, :0], B=B[:, :0], C=C[:, :0]),
        "at most 256, not 300": case(1, 9, 1, 2, 1, 300),
        "4 heads do not split into 3 groups": change(arguments, B=B[:, :, [0, 1, 1]], C=C[:, :, [0, 1, 1]]),
        r"dt \[2, 2, 4\] does not fit x": change(arguments, dt=dt[:, :2]),
        r"C \[2, 9, 1, 7\] does not fit": change(arguments, C=C[:, :, :1]),
        r"state 0 \[1, 4, 5, 7\]": change(arguments, state=state[:1]),
        "rows of x, B or C": change(arguments, x=x.transpose(2, 3).contiguous().transpose(2, 3)),
        "a state is not contiguous": change(arguments, state=state.transpose(0, 1).contiguous().transpose(0, 1)),
        r"seq_idx torch.int64 \[2, 8\] must be int64 \[2, 9\]": change(arguments, seq_idx=documents[:, :8]),
        r"seq_idx torch.float32 \[2, 9\]": change(arguments, seq_idx=documents.float()),
        "a tensor is on meta": change(arguments, seq_idx=documents.to("meta")),
    }  # fmt: skip


@pytest.mark.parametrize("reason", refused())
def test_what_the_kernel_refuses(reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        op._CHUNK_SCAN(*refused()[reason], impl="native")


def test_the_generic_level_leaves_long_products_to_pytorch(
    environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = case(1, 9, 2, 5, 1, 7)
    environment(NEMOTRON_H_ISA="generic")
    for machine, slow in (("x86_64", True), ("AMD64", True), ("aarch64", False)):
        monkeypatch.setattr(_native.platform, "machine", lambda machine=machine: machine)
        assert (native.scan_refusal(*arguments) == _native.EMULATED) == slow
    environment(NEMOTRON_H_ISA="")
    monkeypatch.undo()
    assert native.scan_refusal(*arguments) is None or LEVELS == ("generic",)


def test_the_kernel_is_the_choice_where_it_can_run(environment: Callable[..., None]) -> None:
    """Also for the first part of a pass that is cut in two."""
    x, dt, A, B, C, D, chunk, state, _ = case(2, 100, 4, 5, 2, 7)
    if _native.emulates():
        return
    scan = ssd(x, dt, A, B, C, D, chunk, state)
    assert_bits(tuple(scan), native.scan(x, dt, A, B, C, D, chunk, state, None))
    assert_bits(tuple(ssd(x, dt, A, B, C, D, chunk, state, impl="native")), tuple(scan))
    documents = torch.arange(100).expand(2, -1) // 30
    packed = ssd(x, dt, A, B, C, D, chunk, state, documents)
    assert_bits(tuple(packed), native.scan(x, dt, A, B, C, D, chunk, state, documents))
    (y, final), between = ssd_in_two(64, x, dt, A, B, C, D, chunk, state)
    assert between is not None
    assert_bits((y, final), tuple(scan), "cut at a chunk")
    assert_bits((between,), (native.scan(x[:, :64], dt[:, :64], A, B[:, :64], C[:, :64], D, chunk, state, None)[1],))
    with torch.enable_grad():
        trained = nn.Parameter(D)
        assert ssd(x, dt, A, B, C, trained, chunk, state).output.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_check(dtype: torch.dtype, environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    environment(NEMOTRON_H_CHECK="1")
    if _native.emulates():
        return
    x, dt, A, B, C, D, chunk, state, _ = case(2, 80, 4, 5, 2, 7, dtype=dtype)
    ssd(x, dt, A, B, C, D, chunk, state)
    right = op._CHUNK_SCAN.native
    for wrong in (0, 1):

        def broken(*args: Any, wrong: int = wrong) -> tuple[Tensor, ...]:
            results = right(*args)
            results[wrong].mul_(1.00001)
            return results

        monkeypatch.setattr(op._CHUNK_SCAN, "native", broken)
        with pytest.raises(KernelError, match=r"ssd_chunk_scan: native .* is off by"):
            ssd(x, dt, A, B, C, D, chunk, state)
