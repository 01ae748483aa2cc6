"""Router losses in training: micro-batches, packed documents and the MTP head's routers.

Letters: T tokens · E experts.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_cases import HEAD, LOSSES, gradients

from helpers import BOUND64, assert_close, draw_ids, draw_rows, tiny_model
from nemotron_h import NemotronHForCausalLM
from nemotron_h.modeling import NemotronHTopkRouter

TERMS = ("loss", "mtp_loss", "aux_loss", "z_loss")


def backward(model: NemotronHForCausalLM, *losses: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.stack(losses).sum().backward()
    return gradients(model)


def assert_same(found: tuple[list[Any], dict[str, Tensor]], expected: tuple[list[Any], dict[str, Tensor]]) -> None:
    """Every term of the outputs' losses, summed, and all gradients."""
    for term in TERMS:
        assert_close(sum(o[term] for o in found[0]), sum(o[term] for o in expected[0]), term, BOUND64)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_close(found[1][name], gradient, name, BOUND64)


def ragged(model: NemotronHForCausalLM) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels [4, 11]: rows of different lengths, a third of the labels left out."""
    lengths = torch.tensor([11, 3, 7, 9])
    mask = (torch.arange(11) < lengths[:, None]).long()
    ids = draw_ids(model, 4, 11)
    drop = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    return ids, mask, ids.masked_fill(drop, -100)


@pytest.mark.parametrize("depths", [1, 2])
def test_micro_batches_add_up_to_the_batch(depths: int) -> None:
    model = tiny_model(**LOSSES, mtp_loss_depths=depths).double()
    ids, mask, labels = ragged(model)
    items = ((labels[:, 1:] != -100) & (mask[:, 1:] == 1)).sum()
    whole = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=items)
    parts = [
        model(ids[i], attention_mask=mask[i], labels=labels[i], num_items_in_batch=items)
        for i in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    expected = [whole], backward(model, whole.loss)
    assert_same((parts, backward(model, *(part.loss for part in parts))), expected)


def packed(rows: list[Tensor], padding: int = 0) -> dict[str, Tensor]:
    """One row of documents; padding stands before the first, as a document of its own, and behind the last."""
    ids = torch.cat([torch.full((padding,), 7), *rows, torch.full((padding,), 7)])
    numbers = [torch.full((len(row),), i * i + 2) for i, row in enumerate(rows)]  # some next to each other, some not
    seq_idx = torch.cat([torch.zeros(padding), *numbers, torch.full((padding,), 99)]).long()
    mask = (seq_idx % 99 != 0).long()
    return {"input_ids": ids[None], "labels": ids[None], "seq_idx": seq_idx[None], "attention_mask": mask[None]}


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("depths", [1, 2])
def test_packed_documents_have_the_losses_of_the_rows(padding: int, depths: int) -> None:
    model = tiny_model(**LOSSES, mtp_loss_depths=depths).double()
    rows = draw_rows(model, [9, 1, 5, 2, 12], mtp_depths=depths)
    items = sum(len(row) - 1 for row in rows)
    together = model(**packed(rows, padding), num_items_in_batch=items)
    alone = [model(row[None], labels=row[None], num_items_in_batch=items) for row in rows]
    expected = alone, backward(model, *(out.loss for out in alone))
    assert_same(([together], backward(model, together.loss)), expected)
    mean = model(**packed(rows, padding))
    for term in ("aux_loss", "z_loss"):
        separate = [model(row[None], labels=row[None])[term] for row in rows]
        assert_close(mean[term], torch.stack(separate).mean(), term, BOUND64)


@pytest.mark.parametrize("depths", [1, 2])
def test_padded_rows_have_the_losses_of_the_rows_alone(depths: int) -> None:
    model = tiny_model(**LOSSES, mtp_loss_depths=depths).double()
    rows = draw_rows(model, [11, 3, 7, 9], mtp_depths=depths)
    ids, mask = torch.full((4, 11), 7), torch.zeros(4, 11, dtype=torch.long)
    for b, row in enumerate(rows):
        start = b if b < 3 else 0
        ids[b, start : start + len(row)], mask[b, start : start + len(row)] = row, 1
    ids[0], mask[0] = rows[0], 1
    items = sum(len(row) - 1 for row in rows)
    together = model(ids, attention_mask=mask, labels=ids, num_items_in_batch=items)
    alone = [model(row[None], labels=row[None], num_items_in_batch=items) for row in rows]
    expected = alone, backward(model, *(out.loss for out in alone))
    assert_same(([together], backward(model, together.loss)), expected)


class Gates:
    """What every router was asked and answered, by plain recomputation of the losses of one row."""

    def __init__(self, model: NemotronHForCausalLM) -> None:
        self.balance, self.z, self.calls = 0.0, 0.0, 0
        for module in model.modules():
            if isinstance(module, NemotronHTopkRouter):
                module.register_forward_hook(self.see)

    def see(self, module: Any, args: Any, routing: Any) -> None:
        scores = 1 / (1 + np.exp(-routing.logits.detach().numpy()))
        visits = np.zeros_like(scores)
        np.put_along_axis(visits, routing.experts.numpy(), 1.0, axis=1)
        share = scores / scores.sum(1, keepdims=True)
        self.balance += float((visits.mean(0) * share.mean(0)).sum()) * scores.shape[1] / routing.experts.shape[1]
        self.z += float((np.log(np.exp(routing.logits.detach().numpy()).sum(1)) ** 2).mean())
        self.calls += 1


@pytest.mark.parametrize(("depths", "heads"), [(1, 1), (3, 1), (3, 2)])
def test_the_routers_of_trained_heads_count_at_every_depth(depths: int, heads: int) -> None:
    model = tiny_model(**LOSSES | {"num_nextn_predict_layers": heads}, mtp_loss_depths=depths).double()
    gates, (row,) = Gates(model), draw_rows(model, [13], mtp_depths=depths)
    out = model(row[None], labels=row[None])
    assert gates.calls == 1 + depths
    assert_close(out.aux_loss, np.array(gates.balance), "balance", BOUND64)
    assert_close(out.z_loss, np.array(gates.z), "z", BOUND64)


@pytest.mark.parametrize("shown", [True, 2])
def test_heads_that_are_only_shown_do_not_count(shown: Any) -> None:
    config = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1}
    model = tiny_model(**HEAD, **config).double()
    (row,) = draw_rows(model, [13], mtp_depths=2)
    plain = model(row[None], labels=row[None], output_mtp_logits=False)
    out = model(row[None], labels=row[None], output_mtp_logits=shown)
    assert out.aux_loss == plain.aux_loss
    trained = tiny_model(**LOSSES, mtp_loss_depths=1).double()
    few, many = (trained(row[None], labels=row[None], output_mtp_logits=n) for n in (1, 3))
    assert few.aux_loss == many.aux_loss, "depths beyond those of the loss are shown, not trained"
    assert few.aux_loss > plain.aux_loss
    assert out.router_logits is None
    assert len(trained(row[None], labels=row[None], output_router_logits=True).router_logits) == 1


def test_gradients_of_checkpointed_blocks_are_the_same() -> None:
    model = tiny_model(**LOSSES).double().train()
    ids, mask, labels = ragged(model)
    out = model(ids, attention_mask=mask, labels=labels)
    expected = [out], backward(model, out.loss)
    model.gradient_checkpointing_enable()
    out = model(ids, attention_mask=mask, labels=labels)
    assert_same(([out], backward(model, out.loss)), expected)
