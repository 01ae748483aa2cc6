"""Packed documents are the documents alone: logits, states of the routers, losses and gradients."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import BIASED, BOUND64, assert_close, draw_ids, draw_rows, tiny_model
from nemotron_h import NemotronHForCausalLM
from nemotron_h.errors import InputError

Description = Callable[[list[int]], dict[str, Tensor]]
WITH_MTP: dict[str, Any] = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "M*E", "mtp_loss_coef": 0.3}


def positions(lengths: list[int]) -> dict[str, Tensor]:
    return {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


def shifted_positions(lengths: list[int]) -> dict[str, Tensor]:
    """DataCollatorWithFlattening may start documents elsewhere than at 0: any step other than 1 is a boundary."""
    return {"position_ids": torch.cat([torch.arange(7, 7 + n) for n in lengths])[None]}


def document_numbers(lengths: list[int]) -> dict[str, Tensor]:
    return {"seq_idx": torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None]}


def cumulative(lengths: list[int]) -> dict[str, Tensor]:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    longest = max(lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}  # type: ignore[dict-item]


DESCRIPTIONS = [positions, shifted_positions, document_numbers, cumulative]


def gradients(model: NemotronHForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("describe", DESCRIPTIONS)
@pytest.mark.parametrize("window", [None, 4])
@settings(max_examples=12)
@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=8), seed=st.integers(0, 10**6))
@torch.no_grad()
def test_logits(describe: Description, window: int | None, lengths: list[int], seed: int) -> None:
    model = tiny_model(sliding_window=window, **WITH_MTP, **BIASED)
    rows = draw_rows(model, lengths, seed, mtp_depths=2)
    packed = model(torch.cat(rows)[None], **describe(lengths), output_mtp_logits=2, output_router_logits=True)
    assert packed.past_key_values is None
    starts = [0, *accumulate(lengths)]
    for row, start in zip(rows, starts, strict=False):
        alone = model(row[None], output_mtp_logits=2, output_router_logits=True)
        here = slice(start, start + len(row))
        assert_close(packed.logits[:, here], alone.logits, "logits")
        assert_close(packed.router_logits[0][here], alone.router_logits[0], "router_logits")
        for depth, (ours, theirs) in enumerate(zip(packed.mtp_logits, alone.mtp_logits, strict=True), start=1):
            assert_close(ours[:, start : start + max(0, len(row) - depth)], theirs, f"mtp depth {depth}")


@pytest.mark.parametrize("window", [None, 100])
def test_long_documents(window: int | None) -> None:
    """Attention goes through long rows in blocks of queries, each with the keys that its documents need."""
    model = tiny_model(hybrid_override_pattern="*M*", sliding_window=window, mamba_chunk_size=32).double()
    lengths = [3, 250, 1, 270, 40, 1, 1, 60]
    rows = draw_rows(model, lengths)
    packed = model(torch.cat(rows)[None], **positions(lengths)).logits
    alone = torch.cat([model(row[None]).logits for row in rows], dim=1)
    assert_close(packed, alone, "logits", BOUND64)
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 100
    expected = gradients(model, (alone * weights).sum())
    found = gradients(model, (packed * weights).sum())
    for name in expected:
        assert_close(found[name], expected[name], name, BOUND64)


@pytest.mark.parametrize("describe", DESCRIPTIONS)
def test_losses_and_gradients(describe: Description) -> None:
    """Summed over a given number of items, the losses of the documents add up; a single token has none."""
    model = tiny_model(**WITH_MTP, **BIASED).double()
    lengths = [9, 1, 2, 14, 5]
    rows = draw_rows(model, lengths, mtp_depths=2)
    ids = torch.cat(rows)[None]
    packed = model(ids, labels=ids, num_items_in_batch=10, **describe(lengths))
    found = gradients(model, packed.loss)
    alone = [model(row[None], labels=row[None], num_items_in_batch=10) for row in rows]
    expected = gradients(model, torch.stack([out.loss for out in alone]).sum())
    assert_close(packed.loss, sum(out.loss for out in alone), "loss", BOUND64)
    assert_close(packed.mtp_loss, sum(out.mtp_loss for out in alone), "mtp_loss", BOUND64)
    assert len(found) == len(list(model.parameters()))
    for name in expected:
        assert_close(found[name], expected[name], name, BOUND64)


def test_mean_loss_weighs_documents_by_their_targets() -> None:
    model = tiny_model(num_nextn_predict_layers=1, mtp_loss_coef=1.0, mtp_loss_depths=1).double()
    lengths = [9, 3, 14, 5]
    rows = draw_rows(model, lengths, mtp_depths=1)
    ids = torch.cat(rows)[None]
    packed = model(ids, labels=ids, **positions(lengths))
    alone = [model(row[None], labels=row[None]) for row in rows]
    next_token, ahead = [n - 1 for n in lengths], [n - 2 for n in lengths]
    mtp = sum(n * out.mtp_loss for n, out in zip(ahead, alone, strict=True)) / sum(ahead)
    main = sum(n * (out.loss - out.mtp_loss) for n, out in zip(next_token, alone, strict=True)) / sum(next_token)
    assert_close(packed.mtp_loss, mtp, "mtp_loss", BOUND64)
    assert_close(packed.loss, main + mtp, "loss", BOUND64)


@torch.no_grad()
def test_label_across_a_boundary_is_ignored() -> None:
    model = tiny_model(**WITH_MTP)
    lengths = [4, 6, 5]
    ids = torch.cat(draw_rows(model, lengths, mtp_depths=2))[None]
    before = model(ids, labels=ids, **positions(lengths))
    first_of_a_document = ids.clone()
    first_of_a_document[0, [0, 4, 10]] += torch.where(ids[0, [0, 4, 10]] > 25, -1, 1)
    after = model(ids, labels=first_of_a_document, **positions(lengths))
    assert (after.loss, after.mtp_loss) == (before.loss, before.mtp_loss)
    second_of_a_document = ids.clone()
    second_of_a_document[0, 5] += 1 if ids[0, 5] < 25 else -1
    changed = model(ids, labels=second_of_a_document, **positions(lengths))
    assert changed.loss != before.loss
    assert changed.mtp_loss == before.mtp_loss, "no MTP depth predicts the second token of a document"


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@torch.no_grad()
def test_packed_rows_with_padding(side: str) -> None:
    """Two rows of packed documents, of different lengths, one padded."""
    model = tiny_model(**BIASED)
    lengths = [[5, 3, 7], [4, 6]]
    rows = [draw_rows(model, row, seed) for seed, row in enumerate(lengths)]
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[1, {"left": slice(0, 5), "right": slice(10, 15), "holes": slice(1, 10, 2)}[side]] = 0
    ids, seq_idx = torch.full((2, 15), 3), torch.zeros(2, 15, dtype=torch.long)
    for b, documents in enumerate(rows):
        numbers = document_numbers(lengths[b])["seq_idx"][0].long()
        ids[b, mask[b].bool()] = torch.cat(documents)
        real = mask[b].cumsum(0).sub(1).clamp(min=0)
        seq_idx[b] = numbers[real]
    packed = model(ids, attention_mask=mask, seq_idx=seq_idx, use_cache=False, output_ssm_states=True)
    for b, documents in enumerate(rows):
        alone = [model(d[None], output_ssm_states=True) for d in documents]
        assert_close(packed.logits[b, mask[b].bool()], torch.cat([out.logits[0] for out in alone]), f"row {b}")
        assert_close([s[b : b + 1] for s in packed.ssm_states], alone[-1].ssm_states, "the last document's states")


@torch.no_grad()
def test_positions_mean_documents_only_without_mask_and_cache() -> None:
    """generate() gives padding tokens any position, and always a mask and a cache."""
    model = tiny_model()
    ids = draw_ids(model, 1, 6)
    restart = torch.tensor([[0, 1, 2, 0, 1, 2]])
    plain = model(ids).logits
    assert_close(model(ids, position_ids=torch.arange(6)[None]).logits, plain)
    assert_close(model(ids, position_ids=restart, attention_mask=torch.ones(1, 6)).logits, plain)
    out = model(ids[:, :3], use_cache=True)
    assert_close(
        model(ids[:, 3:], position_ids=restart[:, 3:], past_key_values=out.past_key_values).logits, plain[:, 3:]
    )
    assert not torch.allclose(model(ids, position_ids=restart).logits[:, 3:], plain[:, 3:], atol=0.1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"seq_idx": torch.tensor([[0, 0, 1, 0, 1, 1]])},
        {"seq_idx": torch.zeros(1, 5, dtype=torch.long)},
        {"cu_seq_lens_q": torch.tensor([0, 3, 5])},
        {"cu_seq_lens_q": torch.tensor([1, 3, 6])},
        {"cu_seq_lens_q": torch.tensor([0, 4, 3, 6])},
        {"position_ids": torch.zeros(1, 5, dtype=torch.long)},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": True},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]]), "use_cache": True},
    ],
)
def test_descriptions_that_mean_nothing(arguments: dict[str, Any]) -> None:
    model = tiny_model(hybrid_override_pattern="M*")
    with pytest.raises(InputError):
        model(draw_ids(model, 1, 6), **arguments)
