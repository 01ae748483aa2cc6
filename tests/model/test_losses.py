"""Losses and their gradients: targets, padding, accumulation over micro-batches, MTP, balance and z-loss."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import reference64
from helpers import BIASED, BOUND64, assert_close, draw_ids, draw_inputs, draw_rows, tiny_model
from nemotron_h import NemotronHForCausalLM
from nemotron_h.errors import InputError

WITH_MTP: dict[str, Any] = {"num_nextn_predict_layers": 1, "mtp_loss_coef": 0.3, "mtp_hybrid_override_pattern": "ME"}
MASKS = {
    "left": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0] * 8 + [1], [1] * 9]),
    "right": torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0], [1] + [0] * 8, [1] * 9]),
    "mixed": torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1, 1, 1]]),
}


def gradients(model: NemotronHForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], name, BOUND64)


@pytest.mark.parametrize("depths", [1, 2, 3])
@torch.no_grad()
def test_losses_are_the_references(depths: int) -> None:
    model = tiny_model(num_nextn_predict_layers=2, mtp_loss_coef=0.3, mtp_loss_depths=depths)
    ids, reference = draw_inputs(model, 13, mtp_depths=3)
    labels = ids.clone()
    labels[[2, 7, 8]] = -100
    out = model(ids[None], labels=labels[None])
    main, mtp = (
        reference64.next_token_loss(reference.logits_TV, labels),
        reference64.mtp_loss(reference, labels, depths),
    )
    assert_close(out.mtp_loss, np.array(mtp), "mtp_loss")
    assert_close(out.loss, np.array(main + 0.3 * mtp), "loss")
    assert len(out.mtp_logits) == 2, "one per head, whatever the loss averages over"


@pytest.mark.parametrize("side", MASKS)
def test_padded_rows_have_the_losses_and_gradients_of_the_rows_alone(side: str) -> None:
    model, mask = tiny_model(**WITH_MTP, **BIASED).double(), MASKS[side]
    rows = draw_rows(model, mask.sum(-1).tolist(), mtp_depths=2)
    ids = torch.full(mask.shape, 7)
    for b, row in enumerate(rows):
        ids[b, mask[b].bool()] = row
    padded = model(ids, attention_mask=mask, labels=ids, num_items_in_batch=10)
    found = gradients(model, padded.loss)
    alone = [model(row[None], labels=row[None], num_items_in_batch=10) for row in rows]
    assert_close(padded.loss, sum(out.loss for out in alone), "loss", BOUND64)
    assert_close(padded.mtp_loss, sum(out.mtp_loss for out in alone), "mtp_loss", BOUND64)
    assert_same_gradients(found, gradients(model, torch.stack([out.loss for out in alone]).sum()))
    mean = model(ids, attention_mask=mask, labels=ids, output_mtp_logits=False)
    targets = int((mask.sum(-1) - 1).sum())
    assert_close(mean.loss - 0.3 * mean.mtp_loss, 10 * (padded.loss - 0.3 * padded.mtp_loss) / targets, "mean", BOUND64)


def test_four_micro_batches_are_one_batch() -> None:
    model = tiny_model(**WITH_MTP).double()
    ids = draw_ids(model, 4, 12)
    labels = ids.clone()
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) < 0.4] = -100
    items = (labels[:, 1:] != -100).sum()
    whole = model(ids, labels=labels, num_items_in_batch=items)
    expected = gradients(model, whole.loss)
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items) for i in range(4)]
    assert_close(sum(part.loss for part in parts), whole.loss, "loss", BOUND64)
    assert_same_gradients(gradients(model, torch.stack([part.loss for part in parts]).sum()), expected)
    main = whole.loss - 0.3 * whole.mtp_loss
    alone = model(ids, labels=labels, output_mtp_logits=False)
    assert_close(main, alone.loss - 0.3 * alone.mtp_loss, "the mean over targets", BOUND64)


def numpy_balance(logits_TE: NDArray[np.float64], top_k: int, bias_E: NDArray[np.float64]) -> float:
    """E/k · sum over experts of (share of visits) · (mean normalized score), of one sequence."""
    scores = reference64.sigmoid(logits_TE)
    chosen = np.argsort(-(scores + bias_E), axis=-1)[:, :top_k]
    visits = np.stack([(chosen == e).any(-1) for e in range(scores.shape[1])], axis=-1)
    share = scores / scores.sum(-1, keepdims=True)
    return float((visits.mean(0) * share.mean(0)).sum() * scores.shape[1] / top_k)


def numpy_z(logits_TE: NDArray[np.float64]) -> float:
    return float((np.log(np.exp(logits_TE).sum(-1)) ** 2).mean())


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_balance_and_z_loss(padded: bool) -> None:
    """Mean over rows of each row's own loss, sum over layers; padding does not count."""
    model = tiny_model(
        hybrid_override_pattern="ME*E", n_group=1, router_aux_loss_coef=0.5, router_z_loss_coef=0.25
    ).double()
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6]) if padded else torch.ones(2, 9, dtype=torch.long)
    rows = draw_rows(model, mask.sum(-1).tolist())
    ids = torch.full((2, 9), 7)
    for b, row in enumerate(rows):
        ids[b, mask[b].bool()] = row
    out = model(ids, attention_mask=mask, labels=ids)
    balance, z = 0.0, 0.0
    for index, layer in enumerate((1, 3)):
        gate = model.model.layers[layer].mixer.gate
        for row in rows:
            logits = model(row[None], output_router_logits=True).router_logits[index].numpy()
            balance += numpy_balance(logits, 2, gate.e_score_correction_bias.numpy()) / 2
            z += numpy_z(logits) / 2
    assert_close(out.aux_loss, np.array(balance), "balance", BOUND64)
    assert_close(out.z_loss, np.array(z), "z", BOUND64)
    plain = tiny_model(hybrid_override_pattern="ME*E", n_group=1).double()(ids, attention_mask=mask, labels=ids)
    assert_close(out.loss, plain.loss + 0.5 * out.aux_loss + 0.25 * out.z_loss, "loss", BOUND64)


def test_perfect_balance_has_balance_loss_one() -> None:
    """Whatever the number of experts and layers: uniform scores and visits give 1 per layer, more is worse."""
    for experts, top_k in ((8, 2), (12, 3)):
        model = tiny_model(hybrid_override_pattern="E", n_routed_experts=experts, n_group=1, num_experts_per_tok=top_k,
                           router_aux_loss_coef=1.0)  # fmt: skip
        gate = model.model.layers[0].mixer.gate
        with torch.no_grad():
            gate.weight.zero_()
            gate.e_score_correction_bias.zero_()
        ids = draw_ids(model, 1, 6)
        assert_close(model(ids, labels=ids).aux_loss, torch.tensor(1.0))


@torch.no_grad()
def test_extra_losses_only_with_their_scale() -> None:
    ids = draw_ids(tiny_model(), 2, 9)
    plain = tiny_model(num_nextn_predict_layers=1)
    out = plain(ids, labels=ids)
    assert out.aux_loss is None
    assert out.z_loss is None
    assert out.mtp_loss is not None, "labels and a head: returned"
    assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    shown = plain(ids, labels=ids, output_router_logits=True)
    assert shown.loss == out.loss, "asking for router logits must not change the loss"
    assert shown.aux_loss > 0
    assert shown.z_loss > 0
    for field, name in (
        ("router_aux_loss_coef", "aux_loss"),
        ("router_z_loss_coef", "z_loss"),
        ("mtp_loss_coef", "mtp_loss"),
    ):
        scaled = tiny_model(num_nextn_predict_layers=1, **{field: 0.5})(ids, labels=ids)
        assert_close(scaled.loss, out.loss + 0.5 * getattr(scaled, name), field)
        assert getattr(scaled, name) > 0.1


@pytest.mark.parametrize("bad", [50, -1, -99, 10**6])
def test_label_outside_the_vocabulary(bad: int) -> None:
    model = tiny_model()
    ids = draw_ids(model, 2, 5)
    labels = ids.clone()
    labels[1, 2] = bad
    with pytest.raises(InputError, match="vocab_size=50"):
        model(ids, labels=labels)


@pytest.mark.parametrize("shape", [(2, 4), (1, 5), (10,), (2, 5, 1)])
def test_labels_of_another_shape(shape: tuple[int, ...]) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="labels"):
        model(draw_ids(model, 2, 5), labels=torch.zeros(shape, dtype=torch.long))


@torch.no_grad()
def test_nothing_to_predict() -> None:
    """As in torch a mean over no targets is nan; a sum over a given number of items is 0."""
    model = tiny_model(**WITH_MTP)
    ids = draw_ids(model, 2, 5)
    none = torch.full_like(ids, -100)
    assert math.isnan(model(ids, labels=none).loss)
    assert model(ids, labels=none, num_items_in_batch=3).loss == 0
    out = model(ids[:, :2], labels=ids[:, :2])
    assert out.mtp_loss == 0, "two tokens have no target for any depth"
    assert out.loss.isfinite()
