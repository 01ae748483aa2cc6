"""Attention of many queries: within its error budget, and bit for bit what the queries give one by one.

test_attention_kernel.py holds the same kernel with few queries: values that are not ordinary, strides, refusals.

Letters: B batch · T queries · S keys · Q query heads · K key/value heads · R = Q/K · d head size.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from attention_cases import (
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
from mamba_cases import kernel_threads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import assert_close, draw_ids, tiny_model
from nemotron_h import NemotronHHybridDynamicCache
from nemotron_h.errors import InputError, KernelError
from nemotron_h.layout import Layout
from nemotron_h.ops import _native
from nemotron_h.ops.attention import Int8Rows, attention, native, reference

Kind = tuple[torch.dtype, torch.dtype]
allocated: list[int] = []


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the wrapper allocates is NaN, and counted in elements."""
    empty, like = torch.empty, torch.empty_like
    allocated.clear()

    def new(t: Tensor) -> Tensor:
        allocated.append(t.numel())
        return t.fill_(NAN) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: new(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: new(like(*a, **k)))


def causal(case: Case, window: int | None = None) -> Case:
    return case._replace(causal=True, past=case.keys - case.q.shape[1], window=window)


def mask_of(case: Case) -> Tensor:
    """The mask [T, S] that says what `causal`, `past` and `window` say."""
    age = torch.arange(case.q.shape[1])[:, None] + case.past - torch.arange(case.keys)
    return (age >= 0) & (age < (case.window or case.keys))


def as_mask(case: Case) -> Case:
    return case._replace(visible=mask_of(case), causal=False, past=0, window=None)


def only(case: Case, begin: int, end: int) -> Case:
    """Queries [begin, end) of the case, behind what lies before them."""
    part = case._replace(q=case.q[:, begin:end], past=case.past + begin)
    if case.visible is not None:
        return part._replace(visible=case.visible[..., begin:end, :], past=0)
    return part.where(lambda x: x[:, :, : case.past + end])


def in_pieces(case: Case, cuts: list[int]) -> Tensor:
    queries = case.q.shape[1]
    ends = sorted({0, queries, *(cut % queries for cut in cuts)})
    return torch.cat([only(case, a, b).run() for a, b in itertools.pairwise(ends)], dim=1)


# Against the reference, and at every level.

SHAPES = [
    # B, T, K, R, S, d
    (1, 40, 2, 16, 40, 128), (1, 33, 8, 5, 290, 128), (2, 9, 1, 1, 9, 1), (1, 257, 1, 1, 257, 63),
    (1, 67, 1, 3, 131, 80), (1, 17, 1, 2, 523, 256), (3, 31, 2, 1, 31, 7), (1, 11, 1, 13, 300, 16),
    (1, 9, 1, 131, 20, 24), (1, 130, 2, 1, 700, 12),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sight", ["all", "causal", "window", "mask"])
def test_within_the_budget_and_equal_at_every_level(shape: tuple[int, ...], kind: Kind, sight: str) -> None:
    case = draw(*shape, kind, seed=sum(shape))
    if sight == "mask":
        case = case._replace(visible=draw_mask(case))
    elif sight != "all":
        case = causal(case, window=1 + shape[4] // 3 if sight == "window" else None)
    outs = [case.run(level) for level in _native.levels()]
    assert outs[0].shape == case.q.shape
    assert_within_budget(case, outs[-1])
    for level, out in zip(_native.levels(), outs, strict=True):
        assert same_bits(out, outs[-1]), level
    if case.causal:
        assert same_bits(as_mask(case).run(), outs[-1])


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(9, 150), st.integers(1, 3), st.integers(1, 9)),
    past=st.integers(0, 600), d=st.integers(1, 40), kind=st.sampled_from(KINDS), seed=st.integers(0, 99),
    window=st.none() | st.integers(1, 700), masked=st.booleans(), sharp=st.sampled_from([0.0, 1.0, 10.0]),
    cuts=st.lists(st.integers(0, 149), max_size=4),
)  # fmt: skip
def test_any_shape_in_any_pieces(
    shape: tuple[int, ...], past: int, d: int, kind: Kind, seed: int, window: int | None, masked: bool, sharp: float,
    cuts: list[int],
) -> None:  # fmt: skip
    case = draw(*shape, past + shape[1], d, kind, seed=seed, sharp=sharp)
    case = case._replace(visible=draw_mask(case, seed)) if masked else causal(case, window)
    out = case.run()
    assert_within_budget(case, out)
    assert same_bits(in_pieces(case, cuts), out)


# A row depends on its own query and the keys that it sees.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 1, 33, 300])
@pytest.mark.parametrize("past", [0, 1, 250])
def test_a_prompt_at_once_in_pieces_and_token_by_token(kind: Kind, window: int | None, past: int) -> None:
    case = causal(draw(1, 290, 2, 3, 290 + past, 40, kind), window)
    out = case.run()
    assert same_bits(in_pieces(case, [1, 9, 128, 137, 256]), out)
    assert same_bits(in_pieces(case, list(range(290))), out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_row_by_itself(kind: Kind, masked: bool) -> None:
    """Neither the other rows of the batch, nor the other queries, nor the other heads show."""
    case = draw(3, 50, 2, 6, 330, 40, kind)
    case = case._replace(visible=draw_mask(case)) if masked else causal(case)
    whole = case.run()
    for b, t, head in itertools.product(range(3), (0, 21, 22, 49), (0, 5, 6, 11)):
        own = only(case, t, t + 1).where(lambda x, b=b, head=head: x[b : b + 1, head // 6 : head // 6 + 1])
        own = own._replace(q=own.q[b : b + 1, :, head : head + 1])
        if own.visible is not None:
            own = own._replace(visible=own.visible[b : b + 1])
        assert same_bits(own.run()[0, 0, 0], whole[b, t, head])


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS[1:3])
def test_any_number_of_threads(count: int, kind: Kind) -> None:
    """Long enough for the threads to meet: each has memory of its own."""
    case = causal(draw(2, 500, 2, 4, 700, 48, kind), 410)
    expected = case.run()
    with kernel_threads(count):
        for _ in range(6):
            assert same_bits(case.run(), expected)


@pytest.mark.parametrize("spoiled", [0, 5, 31, 32, 40, 299])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_query_does_not_see_may_be_anything(spoiled: int, window: int | None, kind: Kind) -> None:
    """A NaN among keys or values: in the queries that see it, and in no other bit."""
    case = causal(draw(1, 300, 1, 2, 300, 20, kind), window)
    expected = case.run()
    for part in (0, 1):
        rows = [case.k, case.v][part]
        bad = rows.scale_BKS.clone() if isinstance(rows, Int8Rows) else rows.clone()
        bad[:, :, spoiled] = NAN
        rows = Int8Rows(rows.bytes_BKSd, bad) if isinstance(rows, Int8Rows) else bad
        out = (case._replace(k=rows) if part == 0 else case._replace(v=rows)).run()
        sees = mask_of(case)[:, spoiled]
        assert out[:, sees].isnan().all()
        assert same_bits(out[:, ~sees], expected[:, ~sees])


def test_masks_of_every_broadcast_shape_and_stride() -> None:
    case = draw(3, 40, 2, 2, 300, 16)
    full = draw_mask(case) | (torch.arange(300) == 7)
    wide = torch.zeros(3, 1, 40, 900, dtype=torch.bool)
    wide[..., ::3] = full
    odd = torch.zeros(3, 1, 40, 303, dtype=torch.bool)
    odd[..., 3:] = full
    turned = full.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    expected = case._replace(visible=full).run()
    assert_within_budget(case._replace(visible=full), expected)
    for mask in (wide[..., ::3], odd[..., 3:], turned):
        assert same_bits(case._replace(visible=mask).run(), expected)
    for mask in (full[:1], full[:, :, :1], full[0], full[0, 0], full[0, 0, 0]):
        contiguous = mask.expand(3, 1, 40, 300).contiguous()
        assert same_bits(case._replace(visible=mask).run(), case._replace(visible=contiguous).run())
    everything = torch.ones((), dtype=torch.bool)
    assert same_bits(case._replace(visible=everything).run(), case.run())


@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind: Kind) -> None:
    case = causal(draw(2, 20, 3, 2, 280, 20, kind), 100)

    def interleaved(x: Tensor) -> Tensor:  # [B, S, K, ...] in memory, as a projection leaves it
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def in_a_buffer(x: Tensor) -> Tensor:
        buffer = torch.full((3, 5, 400, *x.shape[3:]), 55 if x.dtype == INT8 else NAN, dtype=x.dtype)
        buffer[1:, 1:4, 17:297] = x
        return buffer[1:, 1:4, 17:297]

    expected = case.run()
    for change in (in_a_buffer, *([] if kind[1] == INT8 else [interleaved])):
        assert same_bits(case.where(change).run(), expected)
        assert same_bits(case._replace(v=case.where(change).v).run(), expected)
    q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert same_bits(case._replace(q=q).run(), expected)


def test_a_longer_past_than_the_window_costs_nothing() -> None:
    """Blocks before the window are not read: what lies there may be anything, or be left out."""
    case = causal(draw(1, 20, 1, 2, 1044, 16), 100)
    expected = case.run()
    left_out = case.where(lambda x: x[:, :, 768:])._replace(past=256)
    assert same_bits(left_out.run(), expected)


# Memory.


def test_memory_does_not_grow_with_the_lengths() -> None:
    """Beside the result there is only a fixed amount of scratch per thread."""
    found = []
    for tokens in (300, 2400):
        case = causal(draw(1, tokens, 1, 1, 2 * tokens, 32), 64)
        allocated.clear()
        case.run()
        assert allocated[0] == case.q.numel()
        found.append(allocated[1:])
    assert found[0] == found[1]
    assert sum(found[0]) < 2**20 * (_native.extension().threads() + 1)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return result


def test_the_reference_keeps_no_matrix_of_queries_by_keys() -> None:
    case = causal(draw(1, 1500, 1, 1, 3000, 4))
    with Largest() as seen:
        attention(case.q, case.k, case.v, causal=True, past=1500, impl="reference")
    assert seen.numel <= reference.BLOCK * 3000
    with Largest() as seen:
        attention(case.q, case.k, case.v, causal=True, past=1500, window=100, impl="reference")
    assert seen.numel <= reference.BLOCK * (reference.BLOCK + 100)


@pytest.mark.parametrize("window", [None, 7])
@torch.no_grad()
def test_a_model_builds_no_mask(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in pieces, and its tokens one by one: places say all. Padding needs a mask."""
    model = tiny_model(hybrid_override_pattern="*-*", sliding_window=window)
    ids, masks, make = draw_ids(model, 2, 41), [], Layout._make_visible
    monkeypatch.setattr(Layout, "_make_visible", lambda *a: masks.append(a) or make(*a))
    padding = torch.ones(2, 41)
    padding[:, 0] = 0
    expected = model(ids, attention_mask=padding).logits[:, 1:]
    assert masks
    masks.clear()
    cache = NemotronHHybridDynamicCache(model.config)
    logits = [model(piece, past_key_values=cache).logits for piece in ids[:, 1:].split([12, 1, 1, 9, 16, 1], dim=1)]
    assert_close(torch.cat(logits, dim=1), expected)
    assert_close(model(ids[:, 1:]).logits, expected)
    assert masks == []


# When it runs.


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_takes_the_kernel(kind: Kind, environment: Callable[..., None]) -> None:
    environment(NEMOTRON_H_CHECK="1")
    case = causal(draw(2, 30, 2, 3, 300, 16, kind), 50)
    expected, where = case.run(), {"causal": True, "past": 270, "window": 50}
    for impl in (None, "native"):
        assert same_bits(attention(case.q, case.k, case.v, **where, impl=impl).output, expected)
    weights = attention(case.q, case.k, case.v, **where, return_weights=True)
    assert weights.weights is not None
    assert ((weights.weights > 0) == mask_of(case)).all()
    torch.testing.assert_close(weights.output, expected, rtol=2e-2, atol=2e-2)


Q, KV = torch.ones(2, 10, 4, 8), torch.ones(2, 2, 15, 8)
MISUSES = {
    "another number of keys": ({"causal": True, "past": 4}, r"past \+ queries = 4 \+ 10 keys \(got 15\)"),
    "a mask as well": ({"causal": True, "past": 5, "visible": torch.ones(15) > 0}, r"no mask \(got \[15\]\)"),
    "a negative past": ({"causal": True, "past": -1}, "past=-1 must be at least 0"),
    "an empty window": ({"causal": True, "past": 5, "window": 0}, "window=0 None or at least 1"),
    "past alone": ({"past": 5}, "only with causal=True"),
    "window alone": ({"window": 5}, "only with causal=True"),
}


@pytest.mark.parametrize("why", MISUSES)
def test_misuse(why: str) -> None:
    arguments, said = MISUSES[why]
    with pytest.raises(KernelError, match=said):
        attention(Q, KV, KV, **arguments, impl="native")
    for impl, weights in ((None, False), ("reference", False), (None, True)):
        with pytest.raises(InputError, match=said):
            attention(Q, KV, KV, **arguments, impl=impl, return_weights=weights)
    int8 = native.refusal_int8
    rows = Int8Rows(KV.to(INT8), torch.ones(2, 2, 15))
    ordered = [arguments.get(name, default) for name, default in
               {"visible": None, "causal": False, "dropout": 0.0, "past": 0, "window": None}.items()]  # fmt: skip
    assert int8(Q, *rows, *rows, *ordered) is not None
    assert int8(Q, *rows, *rows, None, True, 0.0, 5, 3) is None
