"""The attention kernel: within its error budget, the same bits at every level, and blind to what a query does not see.

Letters: B batch · T queries · S keys · Q query heads · K key/value heads · R = Q/K · d head size.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_cases import (
    BFLOAT,
    FLOAT,
    INF,
    INT8,
    KINDS,
    NAN,
    Case,
    assert_within_budget,
    draw,
    draw_mask,
    same_bits,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_h.errors import InputError, KernelError
from nemotron_h.ops import _native, dispatch, threads
from nemotron_h.ops.attention import Int8Rows, attention, native, quantize, reference


@pytest.fixture(autouse=True, params=["few", "many"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here holds the kernel of few queries, and that of many with as few.

    Whatever the wrapper allocates is NaN: an element that is read or returned unwritten shows.
    """
    if request.param == "many":
        monkeypatch.setattr(native, "FEW", 0)
    empty, like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: like(*a, **k).fill_(NAN))


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the pool's threads behind the wrapper's back."""
    module = _native.load()
    assert module is not None
    threads.sync()
    before = module.threads()
    yield module.set_threads
    module.set_threads(before)


SHAPES = [
    # B, T, K, R, S, d
    (1, 1, 2, 16, 5000, 128), (2, 1, 2, 16, 256, 128), (1, 8, 1, 16, 257, 64), (2, 3, 2, 2, 255, 80),
    (1, 1, 1, 1, 1, 1), (3, 5, 2, 1, 257, 8), (1, 4, 1, 13, 513, 128), (1, 2, 3, 5, 31, 33), (1, 7, 1, 7, 33, 256),
    (1, 1, 4, 3, 1000, 100),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_within_the_budget_and_equal_at_every_level(
    shape: tuple[int, ...], kind: tuple[torch.dtype, torch.dtype], masked: bool
) -> None:
    case = draw(*shape, kind, seed=sum(shape))
    if masked:
        case = case._replace(visible=draw_mask(case))
    outs = [case.run(level) for level in _native.levels()]
    assert_within_budget(case, outs[-1])
    assert outs[0].shape == case.q.shape
    for level, out in zip(_native.levels(), outs, strict=True):
        assert same_bits(out, outs[-1]), level


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 3), st.integers(1, 9), st.integers(1, 600),
                    st.integers(1, 70)),
    kind=st.sampled_from(KINDS), masked=st.booleans(), seed=st.integers(0, 99), sharp=st.sampled_from([0.0, 1.0, 10.0]),
)  # fmt: skip
def test_any_shape(
    shape: tuple[int, ...], kind: tuple[torch.dtype, torch.dtype], masked: bool, seed: int, sharp: float
) -> None:
    case = draw(*shape, kind, seed=seed, sharp=sharp)
    if masked:
        case = case._replace(visible=draw_mask(case, seed))
    outs = [case.run(level) for level in _native.levels()]
    assert_within_budget(case, outs[-1])
    assert all(same_bits(out, outs[-1]) for out in outs)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads(kind: tuple[torch.dtype, torch.dtype], set_threads: Callable[[int], None]) -> None:
    case = draw(2, 3, 2, 4, 1500, 64, kind)
    outs = []
    for count in (1, 2, 3, 8):
        set_threads(count)
        outs.append(case.run())
    assert all(same_bits(out, outs[0]) for out in outs)


def test_calls_from_several_threads_at_once(set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    cases = [draw(1, 2, 2, 4, 900, 64, seed=seed) for seed in range(4)]
    expected = [case.run() for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for out, index in [(pool.submit(cases[i % 4].run), i % 4) for i in range(40)]:
            assert same_bits(out.result(), expected[index])


# A row depends on its own query and the keys that it sees.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_row_by_itself(kind: tuple[torch.dtype, torch.dtype], masked: bool) -> None:
    """Neither the other rows of the batch, nor the other queries, nor the other heads show."""
    case = draw(3, 8, 2, 6, 700, 40, kind)
    mask = draw_mask(case) if masked else None
    whole = case._replace(visible=mask).run()
    for b, t, head in itertools.product(range(3), (0, 3, 7), range(12)):
        own = case.where(lambda x, b=b, head=head: x[b : b + 1, head // 6 : head // 6 + 1])
        seen = None if mask is None else mask[b : b + 1, :, t : t + 1]
        alone = own._replace(q=case.q[b : b + 1, t : t + 1, head : head + 1], visible=seen).run()
        assert same_bits(alone[0, 0, 0], whole[b, t, head])


@pytest.mark.parametrize("garbage", [0.0, NAN, INF, 1e30])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("used", "capacity"), [(300, 1024), (1, 256), (256, 257), (511, 1500)])
def test_a_longer_buffer(used: int, capacity: int, kind: tuple[torch.dtype, torch.dtype], garbage: float) -> None:
    """As a cache of fixed size has it: the slots behind those in use are masked, whatever lies there."""
    case = draw(2, 1, 2, 5, used, 48, kind)

    def longer(x: Tensor) -> Tensor:
        new = torch.full((*x.shape[:2], capacity, *x.shape[3:]), 77 if x.dtype == INT8 else garbage, dtype=x.dtype)
        new[:, :, :used] = x
        return new

    mask = (torch.arange(capacity) < used)[None, None, None]
    assert same_bits(case.where(longer)._replace(visible=mask).run(), case.run())


@pytest.mark.parametrize("kind", KINDS)
def test_queries_behind_a_cache(kind: tuple[torch.dtype, torch.dtype]) -> None:
    """Several tokens behind a cache in one call are the tokens one by one, also where a later one is NaN."""
    case = draw(1, 5, 2, 3, 261, 64, kind)
    spoiled = case.where(lambda x: x.clone())
    for rows in (spoiled.k, spoiled.v):  # the last key and value
        (rows.scale_BKS if isinstance(rows, Int8Rows) else rows)[:, :, -1] = NAN
    mask = (torch.arange(261) <= 256 + torch.arange(5)[:, None])[None, None]
    together = spoiled._replace(visible=mask).run()
    for t in range(5):
        alone = case.where(lambda x, t=t: x[:, :, : 257 + t])._replace(q=case.q[:, t : t + 1]).run()
        if t < 4:
            assert same_bits(together[:, t : t + 1], alone)
    assert together[:, 4].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_queries_that_see_different_blocks(kind: tuple[torch.dtype, torch.dtype], scale: float) -> None:
    """A block that only another query sees changes nothing, whether all scores are above or below zero."""
    case = draw(1, 3, 2, 3, 900, 16, kind)
    q = case.q.clone()
    q[..., 0] = 40.0 * scale
    if isinstance(case.k, Tensor):
        case.k[..., 0] = 1.0
    else:
        case.k.bytes_BKSd[..., 0] = 100
    mask = torch.zeros(1, 1, 3, 900, dtype=torch.bool)
    mask[:, :, 0, 100:200] = mask[:, :, 1, 300:310] = mask[:, :, 2, 800:] = True
    together = case._replace(q=q, visible=mask).run()
    for t in range(3):
        alone = case._replace(q=q[:, t : t + 1], visible=mask[:, :, t : t + 1]).run()
        assert same_bits(together[:, t : t + 1], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sliding_window(kind: tuple[torch.dtype, torch.dtype]) -> None:
    """Blocks that nobody sees cost nothing and change nothing: NaN there, or left out, or another block's keys."""
    case = draw(1, 1, 2, 4, 1300, 32, kind)
    mask = (torch.arange(1300) >= 600)[None, None, None]

    def spoil(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, :600] = 99 if x.dtype == INT8 else NAN
        return x

    expected = case._replace(visible=mask).run()
    assert_within_budget(case._replace(visible=mask), expected)
    assert same_bits(case.where(spoil)._replace(visible=mask).run(), expected)
    left_out = case.where(lambda x: x[:, :, 512:])._replace(visible=mask[..., 512:])
    assert same_bits(left_out.run(), expected)


def test_masks_of_every_broadcast_shape_and_stride() -> None:
    case = draw(3, 4, 2, 2, 300, 16)
    full = draw_mask(case)
    wide = torch.zeros(3, 1, 4, 900, dtype=torch.bool)
    wide[..., ::3] = full
    turned = full.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for mask in (full, full[:1], full[:, :, :1], full[0], full[0, 0], full[0, 0, 0], full[:1, :, :1], wide[..., ::3],
                 turned, full[:, :, :, :1], torch.ones((), dtype=torch.bool)):  # fmt: skip
        mask = mask | (torch.arange(300) == 7) if mask.shape[-1:] == (300,) else torch.ones_like(mask)
        contiguous = case._replace(visible=mask.expand(3, 1, 4, 300).contiguous())
        expected = contiguous.run()
        assert_within_budget(contiguous, expected)
        assert same_bits(case._replace(visible=mask).run(), expected)
    assert same_bits(case._replace(visible=torch.ones(300, dtype=torch.bool)).run(), case.run())


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_causal(tokens: int) -> None:
    case = draw(2, tokens, 2, 3, tokens, 24)._replace(causal=True)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    assert_within_budget(case, case.run())
    assert same_bits(case.run(), case._replace(causal=False, visible=mask).run())


@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind: tuple[torch.dtype, torch.dtype]) -> None:
    case = draw(2, 2, 3, 2, 300, 20, kind)

    def interleaved(x: Tensor) -> Tensor:  # [B, S, K, ...] in memory, as a projection leaves it
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def in_a_buffer(x: Tensor) -> Tensor:
        buffer = torch.full((3, 5, 400, *x.shape[3:]), 55 if x.dtype == INT8 else NAN, dtype=x.dtype)
        buffer[1:, 1:4, 17:317] = x
        return buffer[1:, 1:4, 17:317]

    def wide(x: Tensor) -> Tensor:  # channels of a wider row, at an odd address
        if x.dim() == 3:
            return x
        buffer = torch.full((*x.shape[:3], 43), 55 if x.dtype == INT8 else NAN, dtype=x.dtype)
        buffer[..., 3:23] = x
        return buffer[..., 3:23]

    expected = case.run()
    for change in (in_a_buffer, wide, *([] if kind[1] == INT8 else [interleaved])):
        assert same_bits(case.where(change).run(), expected)
        assert same_bits(case._replace(v=case.where(change).v).run(), expected)  # keys and values each have their own
        assert same_bits(case._replace(k=case.where(change).k).run(), expected)
    q = torch.full((2, 2, 6, 40), NAN, dtype=case.q.dtype)
    q[..., ::2] = case.q
    assert same_bits(case._replace(q=q[..., ::2]).run(), expected)


# Values that are not ordinary.


@pytest.mark.parametrize("kind", KINDS[:2])
def test_nan_is_not_hidden(kind: tuple[torch.dtype, torch.dtype]) -> None:
    case = draw(2, 2, 2, 3, 400, 32, kind)
    clean = case.run()
    q = case.q.clone()
    q[1, 0, 4, 9] = NAN
    out = case._replace(q=q).run()
    assert out[1, 0, 4].isnan().all()
    out[1, 0, 4] = clean[1, 0, 4]
    assert same_bits(out, clean)
    for value in (NAN, INF, -INF):
        k = case.k.clone()
        k[0, 1, 300, 5] = value
        out, key = case._replace(k=k).run(), torch.zeros(2, 2, 6, dtype=torch.bool)
        key[0, :, 3:] = True
        high = reference.attention(case.q.double(), k.double(), case.v.double(), None, False, 0.0)
        torch.testing.assert_close(out.double(), high, rtol=2e-2, atol=2e-3, equal_nan=True)
        assert same_bits(out[~key], clean[~key])
        if value != value:
            assert out[key].isnan().all()
    v = case.v.clone()
    v[0, 0, 399, 31] = NAN
    out = case._replace(v=v).run()
    assert out[0, :, :3, 31].isnan().all()
    out[0, :, :3, 31] = clean[0, :, :3, 31]
    assert same_bits(out, clean)


@pytest.mark.parametrize("block", [0, 255, 256, 399])
def test_a_weight_that_vanishes_is_zero(block: int) -> None:
    """A score 87 or more below the largest counts as nothing, in its own block or another."""
    case = draw(1, 1, 1, 2, 400, 16)
    case.q[..., 0] = 4.0
    case.k[..., 0] = 0.0
    case.k[0, 0, block, 0] = -1000.0
    case.v[0, 0, block] = 1e30
    mask = (torch.arange(400) != block)[None, None, None]
    assert same_bits(case.run(), case._replace(visible=mask).run())
    case.k[0, 0, block, 0] = 1000.0
    assert (case.run() == 1e30).all()


@pytest.mark.parametrize("offset", [-200.0, 200.0, -1e7, 1e12, -1e12])
def test_scores_far_from_zero(offset: float) -> None:
    """What all scores have in common makes no difference, beyond the digits that it costs them."""
    case = draw(1, 2, 1, 2, 400, 16)
    case.k[..., 0] = 0.0
    expected = case.run()
    case.q[..., 0] = 4.0
    case.k[..., 0] = offset
    out = case.run()
    assert out.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=0, atol=abs(offset) * 1e-6)


def test_a_block_that_vanishes_is_zero() -> None:
    case = draw(1, 1, 1, 2, 400, 16)
    case.q[..., 0] = 4.0
    case.k[:, :, 256:, 0] = -1000.0
    case.v[:, :, 256:] = 1e37
    first = case.where(lambda x: x[:, :, :256])
    assert same_bits(case.run(), first.run())


def test_a_score_of_minus_infinity_has_no_weight() -> None:
    case = draw(1, 1, 1, 2, 300, 16)
    case.q[..., 0] = 1.0
    case.k[0, 0, 256:, 0] = -INF  # a block of nothing else, and one key among others
    case.k[0, 0, 3, 0] = -INF
    mask = (torch.arange(300) < 256) & (torch.arange(300) != 3)
    assert same_bits(case.run(), case._replace(visible=mask).run())


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_numbers_at_every_level(kind: tuple[torch.dtype, torch.dtype]) -> None:
    """Products and values in the subnormal range count as zero everywhere."""
    case = draw(1, 1, 2, 3, 70, 24, kind)
    case = case.where(lambda x: x if x.dtype == INT8 else x * 1e-38)._replace(q=case.q * 1e-3)
    outs = [case.run(level) for level in _native.levels()]
    assert all(same_bits(out, outs[0]) for out in outs)


def test_equal_keys_give_the_mean_of_the_values() -> None:
    case = draw(1, 1, 1, 1, 1024, 16)
    case.k[:] = 1.0
    case.v[:] = torch.arange(1024.0)[:, None]
    assert (case.run() == 511.5).all()


# When it runs.


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_takes_the_kernel(kind: tuple[torch.dtype, torch.dtype], environment: Callable[..., None]) -> None:
    environment(NEMOTRON_H_CHECK="1")
    case = draw(2, 2, 2, 3, 300, 16, kind)
    expected = case.run()
    for impl in (None, "native"):
        assert same_bits(attention(case.q, case.k, case.v, impl=impl).output, expected)
    reference_out = attention(case.q, case.k, case.v, impl="reference").output
    assert torch.equal(reference_out, dispatch._registry[case.op].reference(*case.args))
    with_weights = attention(case.q, case.k, case.v, return_weights=True)
    assert with_weights.weights is not None
    assert with_weights.weights.shape == (2, 6, 2, 300)
    torch.testing.assert_close(with_weights.output, expected, rtol=2e-2, atol=2e-2)


BASE = (torch.ones(2, 2, 4, 8), torch.ones(2, 2, 5, 8), torch.ones(2, 2, 5, 8), None, False, 0.0)
REFUSED = {
    "dropout": ({5: 0.1}, "no dropout"),
    "wide heads": ({i: torch.ones(1, 1, 1, 257) for i in range(3)}, "at most 256 channels, not 257"),
    "float64": ({i: torch.ones(2, 2, 2, 8).double() for i in range(3)}, "not torch.float64"),
    "float16 queries": ({0: torch.ones(2, 2, 4, 8).half()}, "queries, not torch.float16"),
    "keys and values of two dtypes": ({1: torch.ones(2, 2, 5, 8).bfloat16()}, "not torch.bfloat16 and torch.float32"),
    "int8 without scales": ({i: torch.ones(2, 2, 5, 8, dtype=INT8) for i in (1, 2)}, "not torch.int8"),
    "other values": ({2: torch.ones(2, 2, 4, 8)}, "do not fit"),
    "other head size": ({0: torch.ones(2, 2, 4, 7)}, "do not fit"),
    "other batch": ({0: torch.ones(1, 2, 4, 8)}, "do not fit"),
    "three dimensions": ({0: torch.ones(2, 2, 8)}, "do not fit"),
    "uneven heads": ({0: torch.ones(2, 2, 3, 8)}, "3 query heads do not share 2 key heads evenly"),
    "no queries": ({0: torch.ones(2, 0, 4, 8)}, "no queries or no keys"),
    "no keys": ({i: torch.ones(2, 2, 0, 8) for i in (1, 2)}, "no queries or no keys"),
    "channels apart": ({1: torch.ones(2, 2, 8, 5).mT}, "do not lie one after the other"),
    "values' channels apart": ({2: torch.ones(2, 2, 8, 5).mT}, "do not lie one after the other"),
    "causal behind a cache": ({4: True}, "causal needs"),
    "causal and a mask": ({0: torch.ones(2, 5, 4, 8), 3: torch.ones(5, dtype=torch.bool), 4: True}, "causal needs"),
    "float mask": ({3: torch.ones(5)}, "must be boolean, not torch.float32"),
    "mask by head": ({3: torch.ones(2, 4, 2, 5, dtype=torch.bool)}, "does not broadcast"),
    "mask of other keys": ({3: torch.ones(4, dtype=torch.bool)}, "does not broadcast"),
    "mask of five dimensions": ({3: torch.ones(1, 1, 1, 1, 5, dtype=torch.bool)}, "does not broadcast"),
    "grad": ({2: torch.ones(2, 2, 5, 8, requires_grad=True)}, "requires grad"),
    "meta mask": ({3: torch.ones(5, dtype=torch.bool, device="meta")}, "meta"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refusals(why: str) -> None:
    assert native.refusal(*BASE) is None
    changes, said = REFUSED[why]
    args = tuple(changes.get(index, argument) for index, argument in enumerate(BASE))
    reason = native.refusal(*args)
    assert reason is not None
    assert said in reason
    with pytest.raises(KernelError, match="attention: impl='native' was asked for, but "):
        attention(*args[:6], impl="native")


def test_refusals_of_int8() -> None:
    q, rows = BASE[0], quantize(torch.ones(2, 2, 5, 8))
    scale, bytes_ = rows.scale_BKS, rows.bytes_BKSd

    def refusal(k: Tensor, k_scale: Tensor, v: Tensor = bytes_, v_scale: Tensor = scale) -> str:
        return native.refusal_int8(q, k, k_scale, v, v_scale, None, False, 0.0) or ""

    assert refusal(bytes_, scale) == ""
    assert "int8 rows with float32 scales, not torch.float32" in refusal(bytes_.float(), scale)
    assert "with torch.bfloat16" in refusal(bytes_, scale, bytes_, scale.bfloat16())
    assert "scales [2, 2, 4] do not fit rows [2, 2, 5, 8]" in refusal(bytes_, scale[:, :, 1:])
    assert "do not lie one after the other" in refusal(bytes_, scale.mT.contiguous().mT)
    assert "do not fit" in refusal(bytes_[:, :1], scale[:, :1])
    assert "meta" in refusal(bytes_, scale.to("meta"))
    with pytest.raises(InputError, match="quantize both or neither"):
        attention(q, rows, torch.ones(2, 2, 5, 8))


# Int8 rows.


def test_quantized_rows() -> None:
    x = torch.randn(2, 3, 50, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 50)[:, None]
    x[1, 1, 1] = 0.0
    rows = quantize(x)
    assert (rows.bytes_BKSd.dtype, rows.scale_BKS.dtype, rows.scale_BKS.shape) == (INT8, FLOAT, (2, 3, 50))
    assert (rows.bytes_BKSd.abs().amax(-1) == 127).sum() == 2 * 3 * 50 - 1
    assert (rows.bytes_BKSd > -128).all()
    error = (rows.dequantized(torch.float64) - x.double()).abs()
    assert (error <= rows.scale_BKS[..., None] * 0.5001).all()
    assert (rows.dequantized(FLOAT)[1, 1, 1] == 0).all()
    assert rows.dequantized(BFLOAT).dtype == BFLOAT
    again = quantize(rows.dequantized(FLOAT))
    assert torch.equal(again.bytes_BKSd, rows.bytes_BKSd)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_that_is_not_finite_is_nan(value: float) -> None:
    x = torch.ones(1, 1, 3, 4)
    x[0, 0, 1, 2] = value
    rows = quantize(x)
    assert rows.dequantized(FLOAT).isnan().all(-1).tolist() == [[[False, True, False]]]
    for k, v in ((rows, quantize(torch.ones(1, 1, 3, 4))), (quantize(torch.ones(1, 1, 3, 4)), rows)):
        assert Case(torch.ones(1, 1, 2, 4), k, v).run().isnan().all()


def test_the_reference_of_int8_is_attention_to_the_products() -> None:
    case = draw(2, 3, 2, 2, 20, 8, (FLOAT, INT8))
    assert isinstance(case.k, Int8Rows)
    assert isinstance(case.v, Int8Rows)
    k, v = (x.bytes_BKSd.float() * x.scale_BKS[..., None] for x in (case.k, case.v))
    expected = reference.attention(case.q, k, v, None, False, 0.0)
    assert torch.equal(reference.attention_int8(*case.args), expected)
