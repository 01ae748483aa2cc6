"""The same tokens give the same logits however they are passed: in pieces, padded, in a batch, as embeddings."""

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import BIASED, assert_close, draw_ids, draw_rows, tiny_model
from nemotron_h import NemotronHForCausalLM, NemotronHHybridDynamicCache
from nemotron_h.layout import Layout

VARIANTS: dict[str, dict[str, Any]] = {
    "all block types": BIASED,
    "sliding window": {"sliding_window": 3, "hybrid_override_pattern": "M**E"} | BIASED,
    "mamba only": {"hybrid_override_pattern": "MM"} | BIASED,
    "attention only": {"hybrid_override_pattern": "**"},
    "no state": {"hybrid_override_pattern": "E-"},
    "one tap": {"mamba_d_conv": 1},
    "limited steps": {"mamba_dt_limit": (0.05, 0.3), "mamba_chunk_size": 3, "use_bias": True},
}


@cache
def variant(name: str) -> NemotronHForCausalLM:
    return tiny_model(**VARIANTS[name])


class Piece(NamedTuple):
    """One forward pass: mask [B, T] and how it is handed over."""

    mask_BT: Tensor
    full_width: bool


@st.composite
def pieces(draw: st.DrawFn) -> list[Piece]:
    """One to five passes over one to four rows, padding anywhere, every row with one real token in the first."""
    rows = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    first = True
    result = []
    for width in widths:
        bits = st.lists(st.integers(0, 1), min_size=width, max_size=width)
        dense = draw(st.booleans())
        mask = [[1] * width if dense else draw(bits.filter(any) if first else bits) for _ in range(rows)]
        result.append(Piece(torch.tensor(mask), draw(st.booleans())))
        first = False
    return result


def place(rows: list[Tensor], mask_BT: Tensor) -> Tensor:
    """Ids [B, T] with each row's tokens at its real slots, and token 7 at padding."""
    ids_BT = torch.full(mask_BT.shape, 7)
    for b, row in enumerate(rows):
        ids_BT[b, mask_BT[b].bool()] = row
    return ids_BT


def run_in_pieces(
    model: NemotronHForCausalLM, ids_BT: Tensor, steps: list[Piece]
) -> tuple[Tensor, NemotronHHybridDynamicCache]:
    logits, kept, past = [], None, 0
    mask_BT = torch.cat([step.mask_BT for step in steps], dim=1)
    for step in steps:
        end = past + step.mask_BT.shape[1]
        mask = mask_BT[:, :end] if step.full_width else step.mask_BT
        mask = None if bool(step.mask_BT.all()) and not step.full_width else mask
        out = model(ids_BT[:, past:end], attention_mask=mask, past_key_values=kept, use_cache=True)
        logits.append(out.logits)
        past, kept = end, out.past_key_values
    assert kept is not None
    return torch.cat(logits, dim=1), kept


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=25)
@given(steps=pieces(), seed=st.integers(0, 10**6))
@torch.no_grad()
def test_any_pieces_with_any_padding_are_the_rows_alone(name: str, steps: list[Piece], seed: int) -> None:
    model = variant(name)
    mask_BT = torch.cat([step.mask_BT for step in steps], dim=1)
    rows = draw_rows(model, mask_BT.sum(-1).tolist(), seed)
    logits_BTV, kept = run_in_pieces(model, place(rows, mask_BT), steps)
    assert kept.get_seq_length() == mask_BT.shape[1]
    assert kept.row_lengths == mask_BT.sum(-1).tolist()
    for b, row in enumerate(rows):
        alone = model(row[None], use_cache=True)
        assert_close(logits_BTV[b, mask_BT[b].bool()], alone.logits[0], f"row {b}")
        for ours, theirs in (
            (kept.ssm_states, alone.past_key_values.ssm_states),
            (kept.conv_states, alone.past_key_values.conv_states),
        ):
            assert_close([t[b : b + 1] for t in ours], theirs, f"state of row {b}")


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_token_by_token_is_the_full_pass(name: str) -> None:
    model = variant(name)
    (row,) = draw_rows(model, [29])
    full = model(row[None], use_cache=True)
    for sizes in ([1] * 29, [29], [28, 1], [1, 28], [8, 8, 8, 5], [7, 1, 1, 20]):
        steps = [Piece(torch.ones(1, size, dtype=torch.long), False) for size in sizes]
        logits, kept = run_in_pieces(model, row[None], steps)
        assert_close(logits, full.logits, str(sizes))
        assert_close(kept.ssm_states, full.past_key_values.ssm_states, "states")
        assert_close(kept.key_cache, full.past_key_values.key_cache, "keys")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("continuation", ["full width", "current width", "no mask"])
@torch.no_grad()
def test_decoding_on_after_one_sided_padding(side: str, continuation: str) -> None:
    """The batch that a tokenizer makes, then one token at a time, the mask in each form that callers use."""
    model, lengths, width, steps = variant("all block types"), [5, 11, 1, 8], 11, 6
    rows = draw_rows(model, [n + steps for n in lengths])
    prompt = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    prompt = prompt.flip(-1) if side == "left" else prompt
    heads = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    out = model(place(heads, prompt), attention_mask=prompt, use_cache=True)
    mask, decoded = prompt, []
    for step in range(steps):
        ids_B1 = torch.stack([row[n + step] for row, n in zip(rows, lengths, strict=True)])[:, None]
        mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)
        given = {"full width": mask, "current width": mask[:, -1:], "no mask": None}[continuation]
        out = model(ids_B1, attention_mask=given, past_key_values=out.past_key_values)
        decoded.append(out.logits[:, 0])
    for b, row in enumerate(rows):
        assert_close(torch.stack(decoded, dim=1)[b], model(row[None]).logits[0, lengths[b] :], f"row {b}")


@pytest.mark.parametrize("window", [None, 100])
@torch.no_grad()
def test_long_padded_rows_in_pieces(window: int | None) -> None:
    """Attention goes through long rows in blocks of queries, each with the keys that any row sees."""
    model = tiny_model(hybrid_override_pattern="*M*", sliding_window=window, mamba_chunk_size=32)
    mask_BT = torch.ones(3, 900, dtype=torch.long)
    mask_BT[0, :520], mask_BT[1, 300:], mask_BT[2, 100:700:3] = 0, 0, 0
    rows = draw_rows(model, mask_BT.sum(-1).tolist())
    for widths in ([900], [300, 600], [10, 590, 300]):
        steps = [Piece(mask, False) for mask in mask_BT.split(widths, dim=1)]
        logits_BTV, _ = run_in_pieces(model, place(rows, mask_BT), steps)
        for b, row in enumerate(rows):
            assert_close(logits_BTV[b, mask_BT[b].bool()], model(row[None]).logits[0], f"row {b} in {widths}")


@torch.no_grad()
def test_row_without_any_token_disturbs_nobody() -> None:
    model = variant("all block types")
    (row,) = draw_rows(model, [6])
    mask = torch.tensor([[1] * 6, [0] * 6])
    out = model(torch.stack([row, row]), attention_mask=mask, use_cache=True)
    assert out.logits.isfinite().all()
    assert_close(out.logits[0], model(row[None]).logits[0])
    after = model(row[:1].expand(2, 1), past_key_values=out.past_key_values).logits
    assert_close(after[1], model(row[None, :1]).logits[0], "the empty row begins here")


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
@torch.no_grad()
def test_mask_dtypes_and_what_stands_at_padding_do_not_matter(dtype: torch.dtype) -> None:
    model, mask = variant("all block types"), torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1]])
    first, other = (torch.where(mask.bool(), torch.tensor([3, 1, 4, 1, 5]), pad) for pad in (0, 49))
    a = model(first, attention_mask=mask).logits[mask.bool()]
    assert torch.equal(model(other, attention_mask=mask.to(dtype)).logits[mask.bool()], a)


@pytest.mark.parametrize("mask", [[[0, 0, 1, 1, 1]], [[1, 1, 0, 0, 0]], [[1, 0, 1, 0, 1]]])
def test_nan_at_padding_stays_out_of_a_mamba_mixer(mask: list[list[int]]) -> None:
    """Neither the output nor a gradient sees what stands at padding, and the mixer adds nothing there but its bias."""
    mixer, valid_BT = variant("mamba only").model.layers[0].mixer, torch.tensor(mask).bool()
    layout = Layout(5, valid_BT=valid_BT, slots_valid_BS=valid_BT)
    x_BTD = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for padding in (0.0, float("nan")):
        y_BTD = mixer(torch.where(valid_BT[..., None], x_BTD, padding), layout)
        results.append([y_BTD, *torch.autograd.grad(y_BTD[valid_BT].sum(), mixer.parameters(), allow_unused=True)])
    assert_close(results[1], results[0])
    assert torch.equal(results[1][0][~valid_BT], mixer.out_proj.bias.expand(int((~valid_BT).sum()), -1))


@torch.no_grad()
def test_batch_of_equal_rows_is_the_single_row() -> None:
    model = variant("all block types")
    (row,) = draw_rows(model, [17])
    single = model(row[None], output_router_logits=True, output_attentions=True)
    many = model(row.expand(5, -1), output_router_logits=True, output_attentions=True)
    assert_close(many.logits, single.logits.expand(5, -1, -1))
    assert_close(many.router_logits[0].unflatten(0, (5, 17)), single.router_logits[0].expand(5, 17, -1))
    assert_close(many.attentions[0], single.attentions[0].expand(5, -1, -1, -1))


@pytest.mark.parametrize("pad", [False, True])
@torch.no_grad()
def test_embeddings_instead_of_ids(pad: bool) -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    ids = draw_ids(model, 2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9]) if pad else None
    by_ids = model(ids, attention_mask=mask, output_mtp_logits=2, labels=ids, use_cache=True)
    embeds = model.get_input_embeddings()(ids)
    by_embeds = model(inputs_embeds=embeds, attention_mask=mask, output_mtp_logits=2, labels=ids, use_cache=True)
    assert_close(by_embeds.logits, by_ids.logits)
    assert_close(by_embeds.mtp_logits, by_ids.mtp_logits)
    assert_close(by_embeds.loss, by_ids.loss)
    assert_close(
        model(inputs_embeds=embeds[:, :1], past_key_values=by_embeds.past_key_values).logits,
        model(ids[:, :1], past_key_values=by_ids.past_key_values).logits,
    )


@torch.no_grad()
def test_eager_and_sdpa_are_the_same() -> None:
    eager = tiny_model(attn_implementation="eager", sliding_window=4)
    sdpa = tiny_model(attn_implementation="sdpa", sliding_window=4)
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    assert tiny_model().config._attn_implementation == "sdpa", "the default"
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 0, 1, 1]])
    ids = draw_ids(eager, 2, 9)
    for attention_mask in (None, mask):
        assert_close(eager(ids, attention_mask=attention_mask).logits, sdpa(ids, attention_mask=attention_mask).logits)
