"""The linear kernels: against the reference in float64, and bit by bit against themselves.

Letters: M rows · N output width · K input width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_cases import PACKINGS, Packed, draw
from torch import Tensor

from nemotron_h.errors import KernelError
from nemotron_h.ops import _native, dispatch, threads
from nemotron_h.ops.linear import linear, native, packed_linear, reference
from nemotron_h.quantization import BF16, INT4, INT8, Packing, grouped_packing, pack, unpack

SIZES = (1, 7, 16, 31, 64, 80, 96, 113, 128, 129, 257, 300)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    yield
    threads._set = None  # the next kernel asks torch again


def rows(m: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(m, k, generator=generator).to(dtype)


def with_threads(count: int) -> None:
    _native.extension().set_threads(count)
    threads._set = torch.get_num_threads()


def assert_in_budget(result: Tensor, low: Tensor, high: Tensor, slack: float) -> None:
    error, allowed = dispatch.budget(result, low, high, slack)
    assert error <= allowed


FUSED = (  # a, b, c and a·b + c rounded once; a sum that is rounded to double first is another one in all but the last
    (1 + 2**-15, 2**-24 * (1 - 2**-15), 1 + 2**-23, 1 + 2**-23),
    (-1 - 2**-15, 2**-24 * (1 - 2**-15), -1 - 2**-23, -1 - 2**-23),
    (1 + 2**-15, -(2**-24) * (1 - 2**-15), 1 + 3 * 2**-23, 1 + 3 * 2**-23),
    (1 + 2**-23, 2**-24, 1 + 2**-23, 1 + 2**-22),
)


@pytest.mark.parametrize("level", _native.levels())
@pytest.mark.parametrize(("a", "b", "c", "expected"), FUSED)
def test_multiply_adds_are_rounded_once(a: float, b: float, c: float, expected: float, level: str) -> None:
    """A level without the instruction must not round twice: columns 0 and 2 are one chain."""
    w, x = torch.zeros(16, 32), torch.zeros(1, 32)
    w[:, 0], x[:, 0] = c, 1.0
    w[:, 2], x[:, 2] = a, b
    assert native.linear(x, w, None, level=level).unique().tolist() == [expected]


@given(
    seed=st.integers(0, 2**31), packing=st.sampled_from(PACKINGS), m=st.integers(1, 19), n=st.sampled_from(SIZES),
    k=st.sampled_from(SIZES), dtype=st.sampled_from(DTYPES), bias=st.booleans(),
    arithmetic=st.sampled_from(("int8", "float32")), act=st.sampled_from(("identity", "relu2")),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_packed_bits_and_budget(
    seed: int, packing: Packing, m: int, n: int, k: int, dtype: torch.dtype, bias: bool, arithmetic: str,
    act: str,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weight, _ = draw(packing, n, k, generator)
    x, bias_N = rows(m, k, dtype, generator), torch.randn(n, generator=generator) if bias else None
    args = (weight.panels, packing, n, bias_N, arithmetic, act, False)
    result = native.packed_linear(x, *args, level="generic")
    low, high = reference.packed_linear(x, *args), reference.packed_linear(x.double(), *args)
    assert_in_budget(result, low, high, slack=8.0)
    for level in _native.levels():
        for count in (1, 2, 3):
            with_threads(count)
            assert torch.equal(native.packed_linear(x, *args, level=level), result)
    for row in range(m):
        assert torch.equal(native.packed_linear(x[row], *args), result[row])


@given(
    seed=st.integers(0, 2**31), m=st.integers(1, 8), n=st.sampled_from(SIZES), k=st.sampled_from(SIZES),
    dtype=st.sampled_from(DTYPES), bias=st.booleans(), offset=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_plain_bits_and_budget(seed: int, m: int, n: int, k: int, dtype: torch.dtype, bias: bool, offset: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide_NK = torch.full((n, k + 2 * offset), torch.nan, dtype=dtype)
    weight_NK = wide_NK[:, offset : k + offset]  # rows at a distance, at any alignment, between what must not be read
    weight_NK.copy_(torch.randn(n, k, generator=generator))
    x, bias_N = rows(m, k, dtype, generator), torch.randn(n, generator=generator).to(dtype) if bias else None
    result = native.linear(x, weight_NK, bias_N, "identity", False, level="generic")
    high = reference.linear(
        x.double(), weight_NK.double(), None if bias_N is None else bias_N.double(), "identity", False
    )
    assert_in_budget(result, reference.linear(x, weight_NK, bias_N, "identity", False), high, slack=2.0)
    for level in _native.levels():
        for count in (1, 2, 3):
            with_threads(count)
            assert torch.equal(native.linear(x, weight_NK, bias_N, "identity", False, level=level), result)
    for row in range(m):
        assert torch.equal(native.linear(x[row : row + 1], weight_NK.clone(), bias_N)[0], result[row])


GROUPS = ((4, 32, False), (4, 64, True), (8, 128, True), (8, 32, False))
MANY = [BF16, INT8, INT4, *(grouped_packing(bits, group, torch.float16, has_min) for bits, group, has_min in GROUPS)]


@pytest.mark.parametrize(
    ("packing", "dtype"),
    [*((packing, torch.float32) for packing in MANY), (BF16, torch.bfloat16)],  # which matrix units take as it is
    ids=lambda p: p.name if isinstance(p, Packing) else str(p),
)
def test_every_number_of_rows_has_the_bits_of_one_row(packing: Packing, dtype: torch.dtype) -> None:
    """Around the tiles and blocks of many rows, over several slabs of columns and odd sizes, every level and thread."""
    generator = torch.Generator().manual_seed(4)
    for n, k in ((16, 64), (33, 1101), (70, 520)):
        weight, _ = draw(packing, n, k, generator)
        x = rows(257, k, dtype, generator)
        call = (weight.panels, packing, n, None, "int8")
        one = torch.cat([native.packed_linear(x[m : m + 1], *call) for m in range(len(x))])
        for m in (*range(1, 41), 100, 257):
            assert torch.equal(native.packed_linear(x[:m], *call), one[:m])
        for level in _native.levels():
            for count in (1, 3):
                with_threads(count)
                for m in (3, 8, 9, 16, 17, 32, 100):
                    assert torch.equal(native.packed_linear(x[:m], *call, level=level), one[:m])


@pytest.mark.parametrize("packing", [BF16, INT8, INT4], ids=lambda p: p.name)
def test_extreme_integers_and_scales_in_many_rows(packing: Packing) -> None:
    """Rows whose every int8 is ±127 against weights at the ends of their range, beside rows of zeros and of NaN."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randint(0, 2, (40, 300), generator=generator).float() * 2 - 1
    w[::3] *= torch.exp2(torch.randint(-9, 9, (14, 300), generator=generator).float())
    panels = pack(w, packing)
    x = torch.randint(0, 2, (30, 300), generator=generator).float() * 2 - 1
    x[3], x[5, 7], x[9] = 0, torch.nan, x[9] * 1e30
    one = torch.cat([native.packed_linear(x[m : m + 1], panels, packing, 40, None, "int8") for m in range(30)])
    for level in _native.levels():
        for m in (4, 11, 16, 30):
            result = native.packed_linear(x[:m], panels, packing, 40, None, "int8", level=level)
            assert torch.equal(result.isnan(), one[:m].isnan())
            assert torch.equal(result.nan_to_num(7.0), one[:m].nan_to_num(7.0))


@given(
    seed=st.integers(0, 2**31), m=st.sampled_from((9, 14, 65)), n=st.sampled_from(SIZES), k=st.sampled_from(SIZES),
    dtype=st.sampled_from(DTYPES), offset=st.integers(0, 3), bias=st.booleans(),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_many_plain_rows_at_a_distance(
    seed: int, m: int, n: int, k: int, dtype: torch.dtype, offset: int, bias: bool
) -> None:
    """The kernel has no bound on rows of plain weights, though the op leaves many of them to PyTorch."""
    generator = torch.Generator().manual_seed(seed)
    weight_NK = torch.full((n, k + 2 * offset), torch.nan, dtype=dtype)[:, offset : k + offset]
    weight_NK.copy_(torch.randn(n, k, generator=generator))
    x = torch.full((m, k + 5), torch.nan, dtype=dtype)[:, 2 : k + 2]
    x.copy_(torch.randn(m, k, generator=generator))
    bias_N = torch.randn(n, generator=generator).to(dtype) if bias else None
    one = torch.cat([native.linear(x[i : i + 1], weight_NK, bias_N, "relu2") for i in range(m)])
    for level in _native.levels():
        assert torch.equal(native.linear(x, weight_NK, bias_N, "relu2", level=level), one)


def test_the_order_of_additions_is_the_matrix_units() -> None:
    """For each 32 columns an even and an odd chain of fused multiply-adds from zero; their sum joins the total."""
    generator = torch.Generator().manual_seed(3)
    x, w = (torch.randn(n, 70, generator=generator).bfloat16() for n in (1, 5))
    chained = torch.zeros(5)
    for first in range(0, 70, 32):
        parts = []
        for parity in (0, 1):
            acc = torch.zeros(5, dtype=torch.float32)
            for k in range(first + parity, min(first + 32, 70), 2):  # a product of bfloat16 is exact in float64
                acc = (w[:, k].double() * x[0, k].double() + acc.double()).float()
            parts.append(acc)
        chained = chained + (parts[0] + parts[1])
    result = native.linear(x.float(), w.float(), None)
    assert torch.equal(result[0], chained)
    assert torch.equal(native.linear(x, w, None)[0], chained.bfloat16())
    assert torch.equal(native.packed_linear(x.float(), pack(w, BF16), BF16, 5, None, "int8")[0], chained)


@given(
    seed=st.integers(0, 2**31), m=st.integers(1, 8), n=st.sampled_from(SIZES), k=st.sampled_from(SIZES),
    dtype=st.sampled_from(DTYPES), bias=st.booleans(), tiny=st.booleans(), act=st.sampled_from(("identity", "relu2")),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_packed_bfloat16_has_the_bits_of_plain_rows(
    seed: int, m: int, n: int, k: int, dtype: torch.dtype, bias: bool, tiny: bool, act: str
) -> None:
    """In either dtype of x, at every level; `tiny`: with factors and products so small that they count as zero."""
    generator = torch.Generator().manual_seed(seed)
    x, w = rows(m, k, dtype, generator), torch.randn(n, k, generator=generator).bfloat16()
    if tiny:
        w = w * torch.exp2(-torch.randint(0, 133, (n, k), generator=generator)).bfloat16()
        x = x * torch.exp2(-torch.randint(0, 133, (m, k), generator=generator)).to(dtype)
    bias_N = torch.randn(n, generator=generator) if bias else None
    expected = native.linear(x, w.to(dtype), bias_N, act)
    panels = pack(w, BF16)
    for level in _native.levels():
        for arithmetic in ("int8", "float32"):
            assert torch.equal(native.packed_linear(x, panels, BF16, n, bias_N, arithmetic, act, level=level), expected)
    slow = [reference.packed_linear(x, panels, BF16, n, bias_N, kind, act, False) for kind in ("int8", "float32")]
    assert torch.equal(slow[0], slow[1])  # activations as they are, whatever is said of those that meet integers


@pytest.mark.parametrize("packing", [BF16, INT8, INT4], ids=lambda p: p.name)
@pytest.mark.parametrize("level", _native.levels())
def test_large_and_odd_sizes(packing: Packing, level: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for n, k in ((2688, 1856), (33, 15680), (113, 4480), (1, 3136), (32768, 80)):
        weight, _ = draw(packing, n, k, generator)
        x = rows(2, k, torch.bfloat16, generator)
        result = native.packed_linear(x, weight.panels, packing, n, None, "int8", level=level)
        args = (weight.panels, packing, n, None, "int8", "identity", False)
        assert_in_budget(result, reference.packed_linear(x, *args), reference.packed_linear(x.double(), *args), 8.0)


@pytest.mark.parametrize("packing", [BF16, INT8, INT4], ids=lambda p: p.name)
@pytest.mark.parametrize("level", _native.levels())
def test_long_rows_in_whole_and_parted_blocks(packing: Packing, level: str) -> None:
    """Rows that do not fit in a core's caches together, of more than one block."""
    generator = torch.Generator().manual_seed(3)
    weight, _ = draw(packing, 33, 15680, generator)
    x = rows(260, 15680, torch.bfloat16, generator)
    call = (weight.panels, packing, 33, None, "int8")
    some = [0, 47, 48, 129, 130, 255, 256, 259]
    one = torch.cat([native.packed_linear(x[m : m + 1], *call) for m in some])
    assert torch.equal(native.packed_linear(x, *call, level=level)[some], one)


@pytest.mark.parametrize("level", _native.levels())
def test_the_largest_activation_of_a_block_may_be_in_any_lane(level: str) -> None:
    generator = torch.Generator().manual_seed(6)
    weight, _ = draw(INT8, 16, 256, generator)
    x = rows(256, 256, torch.float32, generator).clamp(-1, 1) + torch.diag(torch.tensor([50.0, -50.0]).repeat(128))
    args = (weight.panels, INT8, 16, None, "int8", "identity", False)
    result = native.packed_linear(x, weight.panels, INT8, 16, None, "int8", level=level)
    assert_in_budget(result, reference.packed_linear(x, *args), reference.packed_linear(x.double(), *args), 8.0)


@pytest.mark.parametrize("packing", [BF16, INT8, INT4], ids=lambda p: p.name)
@pytest.mark.parametrize("level", _native.levels())
def test_every_output_is_written_and_nothing_else(level: str, packing: Packing) -> None:
    """Through the raw kernel: a poisoned output with a margin, for row counts around the register blocks."""
    generator = torch.Generator().manual_seed(1)
    for m in (1, 3, 4, 5, 8, 9, 17, 300):
        for n in (1, 15, 16, 17, 40):
            weight, _ = draw(packing, n, 96, generator)
            x, out = rows(m, 96, torch.float32, generator), torch.full((m, n + 3), torch.nan)
            work = native.scratch(_native.extension().linear_scratch(m, 96, packing.code, 0))
            work.fill_(0x7F)
            _native.kernels(level).linear(
                x.data_ptr(), 0, 96, m, weight.panels.data_ptr(), packing.code, 0, n, 96, 0, 0, 0, 0, 0, 0,
                out.data_ptr(), 0, n + 3, work.data_ptr(),
            )  # fmt: skip
            assert torch.equal(out[:, :n], native.packed_linear(x, weight.panels, packing, n, None, "int8"))
            assert out[:, n:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fused_activation_changes_no_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, _ = draw(INT8, 40, 64, generator)
    x, plain = rows(2, 64, dtype, generator), torch.randn(40, 64, generator=generator).to(dtype)
    product = packed_linear(x, weight.panels, INT8, 40)
    assert torch.equal(packed_linear(x, weight.panels, INT8, 40, activation="relu2"), product.relu().square())
    assert torch.equal(linear(x, plain, activation="relu2"), linear(x, plain).relu().square())
    assert torch.equal(packed_linear(x, weight.panels, INT8, 40, wide=True), product.float())
    assert torch.equal(linear(x, plain, wide=True), linear(x, plain).float())
    assert packed_linear(x.double(), weight.panels, INT8, 40, wide=True).dtype == torch.float64
    with torch.no_grad():
        silu = packed_linear(x, weight.panels, INT8, 40, activation="silu")
    assert silu.isfinite().all()
    with pytest.raises(KernelError, match="activations are identity, relu2, not silu"):
        packed_linear(x, weight.panels, INT8, 40, activation="silu", impl="native")


@pytest.mark.parametrize(("packing", "arithmetic"), [(BF16, "int8"), (INT4, "int8"), (INT4, "float32")])
def test_what_is_not_finite_stays_visible(packing: Packing, arithmetic: str) -> None:
    weight, _ = draw(packing, 20, 300, torch.Generator().manual_seed(0))
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(3, 300)
        x[1, 200] = bad
        result = packed_linear(x, weight.panels, packing, 20, None, arithmetic)  # type: ignore[arg-type]
        assert result[[0, 2]].isfinite().all()
        assert not result[1].isfinite().any()
        if arithmetic == "int8" and packing is INT4:
            assert result[1].isnan().all()


def test_tiny_and_huge_activations() -> None:
    weight, _ = draw(INT8, 4, 128, torch.Generator().manual_seed(0))
    one = packed_linear(torch.ones(1, 128), weight.panels, INT8, 4)
    assert torch.equal(packed_linear(torch.full((1, 128), 2.0**100), weight.panels, INT8, 4), one * 2.0**100)
    assert torch.equal(packed_linear(torch.full((1, 128), 2.0**-60), weight.panels, INT8, 4), one * 2.0**-60)
    for zero in (torch.zeros(1, 128), torch.full((1, 128), 1e-40)):
        assert torch.equal(packed_linear(zero, weight.panels, INT8, 4), torch.zeros(1, 4))


def test_rows_of_a_slice_and_any_leading_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, _ = draw(INT4, 24, 96, generator)
    wide = torch.randn(2, 3, 200, generator=generator)
    for x in (wide[..., 50:146], wide[0, :, 50:146], wide[:, 1, :96], wide.transpose(0, 1)[..., :96]):
        expected = packed_linear(x.contiguous(), weight.panels, INT4, 24)
        assert torch.equal(packed_linear(x, weight.panels, INT4, 24), expected)
        assert expected.shape == (*x.shape[:-1], 24)


@pytest.mark.parametrize("packing", [BF16, INT4], ids=lambda p: p.name)
def test_gradients_reach_x_as_through_the_weights(packing: Packing) -> None:
    weight, _ = draw(packing, 5, 64, torch.Generator().manual_seed(0))
    x = torch.randn(2, 64, requires_grad=True)
    packed_linear(x, weight.panels, packing, 5, arithmetic="int8").sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, unpack(weight.panels, packing, 5, 64).sum(0).expand(2, -1))


def test_refusals_and_misuse() -> None:
    weight, _ = draw(INT4, 24, 96, torch.Generator().manual_seed(0))
    x = torch.ones(1, 96)
    plain = torch.ones(24, 96)

    def refused(message: str, *args: object) -> None:
        with pytest.raises(KernelError, match=message):
            packed_linear(*args, impl="native")  # type: ignore[arg-type]

    refused(r"packed weights \[2, \d+\] do not fit int4 33 x 96", x, weight.panels, INT4, 33)
    refused(r"packed weights \[2, \d+\] do not fit int4 24 x 160", torch.ones(1, 160), weight.panels, INT4, 24)
    refused("do not fit int8 24 x 96", x, weight.panels, INT8, 24)
    refused("takes float32 and bfloat16 rows, not torch.float16", x.half(), weight.panels, INT4, 24)
    refused("requires grad", x.clone().requires_grad_(), weight.panels, INT4, 24)
    refused("not contiguous", x, weight.panels.t().contiguous().t(), INT4, 24)
    refused(r"bias \[23\] does not fit 24 outputs", x, weight.panels, INT4, 24, torch.ones(23))
    refused("arithmetic='int4' is not one of int8, float32", x, weight.panels, INT4, 24, None, "int4")
    for message, args in (
        ("more than 8 rows", (torch.ones(9, 96), plain)),
        ("one dtype", (x, plain.bfloat16())),
        (r"weight \[24, 96\] does not fit x \[1, 95\]", (torch.ones(1, 95), plain)),
        ("rows of weight are not contiguous", (x, torch.ones(96, 24).t())),
    ):
        with pytest.raises(KernelError, match=message):
            linear(*args, impl="native")


@pytest.mark.parametrize("dtype", DTYPES)
def test_check_is_quiet_where_terms_cancel(dtype: torch.dtype, environment: Callable[..., None]) -> None:
    """The last column takes back what the others add up to, so that only rounding is left of the product."""
    environment(NEMOTRON_H_CHECK="1")
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        x, weight = rows(1, 14, dtype, generator), rows(1, 14, dtype, generator)
        x[:, -1] = 1
        weight[:, -1] = -(x[:, :-1] @ weight[:, :-1].T)
        assert torch.equal(linear(x, weight), native.linear(x, weight, None))


def test_the_kernel_is_the_default_and_check_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    weight: Packed = draw(INT4, 24, 96, torch.Generator().manual_seed(0))[0]
    called = []
    spied = native.packed_linear
    monkeypatch.setattr(dispatch._registry["packed_linear"], "native", lambda *a: called.append(1) or spied(*a))
    packed_linear(torch.ones(1, 96), weight.panels, INT4, 24)
    assert called
    monkeypatch.setenv("NEMOTRON_H_CHECK", "1")
    from nemotron_h.ops import settings as variables

    variables.refresh()
    try:
        packed_linear(torch.randn(3, 96), weight.panels, INT4, 24)
        monkeypatch.setattr(dispatch._registry["packed_linear"], "native", lambda *a: -spied(*a))
        with pytest.raises(KernelError, match="packed_linear: native"):
            packed_linear(torch.randn(3, 96), weight.panels, INT4, 24)
    finally:
        monkeypatch.undo()
        variables.refresh()
