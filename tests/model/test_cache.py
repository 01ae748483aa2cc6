"""The cache by itself: taking tokens back, choosing rows, copies, and what its lists hold."""

import copy
from typing import Any

import pytest
import torch
from configurations import models
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import BIASED, assert_close, draw_ids, tiny_config, tiny_model
from nemotron_h import NemotronHForCausalLM, NemotronHHybridDynamicCache
from nemotron_h.cache import BLOCK, JOURNAL, journal
from nemotron_h.errors import CacheError
from nemotron_h.ops.ssd import ssd

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 1, 0, 0, 0, 1, 1], [1] * 10])


def fill(
    model: NemotronHForCausalLM,
    ids_BT: Tensor,
    mask_BT: Tensor | None = None,
    sizes: list[int] | None = None,
    recorded_from: int | None = None,
) -> NemotronHHybridDynamicCache:
    """A cache that holds these tokens, passed in pieces of `sizes`; recording from a slot on."""
    kept, past = NemotronHHybridDynamicCache(model.config), 0
    for size in sizes or [ids_BT.shape[1]]:
        if past == recorded_from:
            kept.activate_past_recording()
        end = past + size
        mask = None if mask_BT is None else mask_BT[:, past:end]
        model(ids_BT[:, past:end], attention_mask=mask, past_key_values=kept)
        past = end
    assert past == ids_BT.shape[1]
    return kept


def assert_same(ours: NemotronHHybridDynamicCache, theirs: NemotronHHybridDynamicCache, what: str = "") -> None:
    assert (ours.get_seq_length(), ours.batch_size, ours.row_lengths) == (
        theirs.get_seq_length(), theirs.batch_size, theirs.row_lengths
    )  # fmt: skip
    for name in ("conv_states", "ssm_states", "key_cache", "value_cache"):
        for layer, (a, b) in enumerate(zip(getattr(ours, name), getattr(theirs, name), strict=True)):
            assert_close(a, b, f"{what} {name} of layer {layer}")


@pytest.mark.parametrize("sizes", [[10], [4, 6], [1] * 10, [7, 1, 1, 1], [3, 4, 3]])
@pytest.mark.parametrize("mask", [None, MASK])
@torch.no_grad()
def test_crop_to_every_position(sizes: list[int], mask: Tensor | None) -> None:
    model = tiny_model(**BIASED)
    ids = draw_ids(model, 3, 10)
    full = model(ids, attention_mask=mask).logits
    recorded = fill(model, ids, mask, sizes, recorded_from=0)
    for kept in range(11):
        cropped = copy.deepcopy(recorded)
        cropped.crop(kept - 10)
        fresh = fill(model, ids[:, :kept], None if mask is None else mask[:, :kept])
        if kept:
            assert_same(cropped, fresh, f"cropped to {kept}")
        assert cropped.get_seq_length() == kept
        if kept < 10:
            rest = None if mask is None else mask[:, kept:]
            again = model(ids[:, kept:], attention_mask=rest, past_key_values=cropped).logits
            assert_close(again, full[:, kept:], f"continued from {kept}")
            assert_same(cropped, recorded, "after the same tokens again")


@settings(max_examples=40)
@given(model=models(), data=st.data())
@torch.no_grad()
def test_crop_again_and_again(model: NemotronHForCausalLM, data: st.DataObject) -> None:
    """As in speculative decoding: a few tokens forward, some back, and always what a fresh prefix would hold."""
    kept = NemotronHHybridDynamicCache(model.config)
    kept.activate_past_recording()
    ids = draw_ids(model, 2, 0)
    for seed in range(4):
        sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
        for size in sizes:
            new = draw_ids(model, 2, size, seed=10 * seed + len(ids[0]))
            model(new, past_key_values=kept)
            ids = torch.cat([ids, new], dim=1)
        back = data.draw(st.integers(0, sum(sizes)))
        kept.crop(-back)
        ids = ids[:, : ids.shape[1] - back]
        if ids.shape[1]:
            assert_same(kept, fill(model, ids))


@pytest.mark.parametrize(("recorded_from", "back"), [(None, 1), (None, 9), (6, 5), (6, 9)])
@torch.no_grad()
def test_position_that_cannot_be_restored(recorded_from: int | None, back: int) -> None:
    """Tokens before the recording began cannot be taken back; the refusal changes nothing."""
    model = tiny_model()
    ids = draw_ids(model, 2, 10)
    kept = fill(model, ids, None, [6, 3, 1], recorded_from)
    before = copy.deepcopy(kept)
    with pytest.raises(CacheError, match="activate_past_recording"):
        kept.crop(-back)
    assert_same(kept, before)
    if recorded_from is not None:
        kept.crop(-4)
        assert_same(kept, fill(model, ids[:, :6]))


@torch.no_grad()
def test_history_is_bounded_and_ends_at_a_crop() -> None:
    model = tiny_model(hybrid_override_pattern="M*M")
    ids = draw_ids(model, 1, 2 * JOURNAL)
    kept = fill(model, ids, None, [1] * (2 * JOURNAL), recorded_from=0)
    assert [layer.journal.slots for layer in kept.layers if hasattr(layer, "journal")] == [JOURNAL] * 2
    with pytest.raises(CacheError):
        kept.crop(-JOURNAL - 1)
    kept.crop(-JOURNAL)
    assert_same(kept, fill(model, ids[:, :JOURNAL]))
    with pytest.raises(CacheError):
        kept.crop(-1)
    model(ids[:, :2], past_key_values=kept)
    kept.crop(0)
    with pytest.raises(CacheError):
        kept.crop(-1)


@torch.no_grad()
def test_is_croppable_says_whether_tokens_can_be_taken_back() -> None:
    for pattern, recorded, expected in (("M*", None, False), ("M*", 0, True), ("*-", None, True), ("E", None, True)):
        model = tiny_model(hybrid_override_pattern=pattern)
        assert fill(model, draw_ids(model, 1, 4), recorded_from=recorded).is_croppable is expected


@pytest.mark.parametrize("pattern", ["M*", "M", "**", "E-"])
@torch.no_grad()
def test_crop_to_zero_is_always_possible(pattern: str) -> None:
    model = tiny_model(hybrid_override_pattern=pattern)
    ids = draw_ids(model, 2, 6)
    for amount in (-6, -100):
        kept = fill(model, ids, MASK[:2, :6])
        kept.crop(amount)
        assert kept.get_seq_length() == 0
        assert_close(model(ids, past_key_values=kept).logits, model(ids).logits)
        assert kept.row_lengths == [6, 6]


@torch.no_grad()
def test_crop_without_mamba_needs_no_recording() -> None:
    model = tiny_model(hybrid_override_pattern="*E*")
    ids = draw_ids(model, 3, 10)
    kept = fill(model, ids, MASK)
    kept.crop(-4)
    assert_same(kept, fill(model, ids[:, :6], MASK[:, :6]))


def test_crop_takes_no_positive_number() -> None:
    with pytest.raises(CacheError, match="negative"):
        NemotronHHybridDynamicCache(tiny_config()).crop(3)


@torch.no_grad()
def test_crop_after_a_long_prompt_needs_no_square_memory() -> None:
    """The first verified pass of assisted decoding is prompt and draft; chunks of the whole prompt would be 1.6 GB."""
    model = tiny_model(hybrid_override_pattern="M", mamba_num_heads=6, mamba_chunk_size=64)
    ids = draw_ids(model, 1, 8192)
    kept = fill(model, ids, None, None, recorded_from=0)
    seen = []
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Largest():
        kept.crop(-3)
    assert max(seen) < 64 * 8192 * 6 * 4
    assert_close(kept.ssm_states[0], fill(model, ids[:, :-3]).ssm_states[0])


@pytest.mark.parametrize("mask", [None, MASK])
@torch.no_grad()
def test_rows_reordered_selected_and_repeated(mask: Tensor | None) -> None:
    """Each is what passing the rows in that order gives, and continues as they do, with its history."""
    model = tiny_model(**BIASED)
    ids, new = draw_ids(model, 3, 10), draw_ids(model, 6, 3, seed=1)
    changes: list[tuple[str, Any, list[int]]] = [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
        ("batch_select_indices", [2, 1], [2, 1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ]
    for method, argument, rows in changes:
        kept = fill(model, ids, mask, [8, 2], recorded_from=8)
        getattr(kept, method)(argument)
        there = None if mask is None else mask[rows]
        fresh = fill(model, ids[rows], there)
        assert_same(kept, fresh, method)
        tokens = new[: len(rows)]
        assert_close(model(tokens, past_key_values=kept).logits, model(tokens, past_key_values=fresh).logits, method)
        kept.crop(-4)
        assert_same(kept, fill(model, ids[rows, :9], None if there is None else there[:, :9]), f"{method}, then crop")


@pytest.mark.parametrize("pattern", ["M*E-", "MM", "E-", "*"])
@torch.no_grad()
def test_lengths(pattern: str) -> None:
    model = tiny_model(hybrid_override_pattern=pattern)
    kept = NemotronHHybridDynamicCache(model.config, 3, dtype=torch.float32, device="cpu")
    assert (kept.get_seq_length(), kept.row_lengths, kept.is_initialized) == (0, [], False)
    ids = draw_ids(model, 3, 10)
    model(ids[:, :4], attention_mask=MASK[:, :4], past_key_values=kept)
    assert kept.row_lengths == [2, 2, 4]
    model(ids[:, 4:], attention_mask=MASK, past_key_values=kept)
    assert (kept.get_seq_length(), kept.row_lengths, kept.batch_size) == (10, [7, 5, 10], 3)
    assert kept.get_mask_sizes(2, 0) == (12, 0)
    assert kept.is_initialized
    assert not kept.is_compileable
    kept.reset()
    assert kept.get_seq_length() == 0
    assert_close(model(ids[:2], past_key_values=kept).logits, model(ids[:2]).logits, "other rows after reset")


@torch.no_grad()
def test_lists_by_layer() -> None:
    model = tiny_model(hybrid_override_pattern="M*E-")
    empty = NemotronHHybridDynamicCache(model.config)
    for name in ("conv_states", "ssm_states", "key_cache", "value_cache"):
        assert [t.numel() for t in getattr(empty, name)] == [0] * 4
    kept = fill(model, draw_ids(model, 3, 7))
    assert [tuple(t.shape) for t in kept.conv_states] == [(3, 6 * 8 + 2 * 2 * 16, 3), (0,), (0,), (0,)]
    assert [tuple(t.shape) for t in kept.ssm_states] == [(3, 6, 8, 16), (0,), (0,), (0,)]
    assert [tuple(t.shape) for t in kept.key_cache] == [(0,), (3, 2, 7, 12), (0,), (0,)]
    assert [t.shape for t in kept.value_cache] == [t.shape for t in kept.key_cache]


@torch.no_grad()
def test_keys_and_values_grow_in_blocks() -> None:
    model = tiny_model(hybrid_override_pattern="*")
    kept = fill(model, draw_ids(model, 1, 3))
    (layer,) = kept.layers
    places = []
    for _ in range(2 * BLOCK):
        model(torch.tensor([[1]]), past_key_values=kept)
        places.append((layer.keys.data_ptr(), layer.values.data_ptr(), layer.keys.shape[2]))
    moves = [i for i in range(1, len(places)) if places[i] != places[i - 1]]
    assert moves == [BLOCK - 3, 2 * BLOCK - 3]
    assert {width for _, _, width in places} == {BLOCK, 2 * BLOCK, 3 * BLOCK}


@torch.no_grad()
def test_deepcopy_is_independent() -> None:
    model = tiny_model(**BIASED)
    ids = draw_ids(model, 3, 10)
    kept = fill(model, ids[:, :6], MASK[:, :6], [4, 2], recorded_from=4)
    twin, untouched = copy.deepcopy(kept), copy.deepcopy(kept)
    model(ids[:, 6:], attention_mask=MASK, past_key_values=twin)
    assert_same(kept, untouched)
    assert_same(twin, fill(model, ids, MASK))
    kept.crop(-2)
    assert_same(twin, fill(model, ids, MASK))


@pytest.mark.parametrize("tokens", [JOURNAL, JOURNAL + 1, 3 * JOURNAL])
@torch.no_grad()
def test_long_prompt_is_not_scanned_again(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking tokens back runs the kept ones of the journal again, without any module of the model."""
    model = tiny_model(hybrid_override_pattern="ME*M")
    ids, scanned = draw_ids(model, 2, tokens), []
    kept = fill(model, ids, recorded_from=0)
    for layer in (0, 3):
        assert kept.layers[layer].journal.slots == JOURNAL
    monkeypatch.setattr(journal, "ssd", lambda x, *args: (scanned.append(x.shape[1]), ssd(x, *args))[1])
    handles = [module.register_forward_hook(lambda *_: pytest.fail("a module ran")) for module in model.modules()]
    kept.crop(-5)
    for handle in handles:
        handle.remove()
    assert scanned == [JOURNAL - 5] * 2
    assert_same(kept, fill(model, ids[:, : tokens - 5]))


@torch.no_grad()
def test_accepted_tokens_alone_are_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in speculative decoding: a verified step of 6 tokens of which 3 stay."""
    model = tiny_model(hybrid_override_pattern="M*M")
    ids, scanned = draw_ids(model, 1, 20), []
    kept = fill(model, ids[:, :14], recorded_from=0)
    kept.crop(0)
    model(ids[:, 14:], past_key_values=kept)
    monkeypatch.setattr(journal, "ssd", lambda x, *args: (scanned.append(x.shape[1]), ssd(x, *args))[1])
    kept.crop(-3)
    assert scanned == [3] * 2
    assert_same(kept, fill(model, ids[:, :17]))


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = vars(value).values() if hasattr(value, "__dict__") else value if isinstance(value, list | tuple) else []
    return [tensor for item in values for tensor in tensors_of(item)]


@pytest.mark.parametrize("recorded_from", [None, 0])
@torch.no_grad()
def test_cache_of_a_long_prompt_keeps_no_pass_alive(recorded_from: int | None) -> None:
    model, tokens = tiny_model(hybrid_override_pattern="MM"), 8 * JOURNAL
    kept = fill(model, draw_ids(model, 1, tokens), recorded_from=recorded_from)
    held = [t.untyped_storage().nbytes() for layer in kept.layers for t in tensors_of(layer)]
    channels = model.model.layers[0].mixer.conv_dim
    assert len(held) >= 4
    assert max(held) < tokens // 2 * channels * 4
