"""`torch.compile` of a training step: one graph without a break, the loss and gradients of eager, one compilation.

aot_eager has the same graphs as inductor, the default, without its C++, which takes a minute: that is a campaign.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from training_cases import LOSSES, assert_same_bits, gradients, losses_of, rows_of, trainer

from helpers import BIASED, BOUND, assert_close, draw_ids, tiny_model


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with inductor.patch(compile_threads=1):  # a pool of workers costs more than these few kernels
        yield
    torch._dynamo.reset()


class Step:
    """Loss, gradients, an optimizer's step, the routers' balance."""

    def __init__(self, model: Any, run: Any) -> None:
        self.model, self.run = model.train(), run
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def __call__(self, ids: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.optimizer.zero_grad()
        loss = self.run(ids, labels=ids, **kwargs).loss
        loss.backward()
        found = gradients(self.model)
        self.optimizer.step()
        self.model.update_router_bias()
        return loss.detach(), found


def assert_same_steps(compiled: Step, eager: Step, ids: Tensor, steps: int = 3, **kwargs: Any) -> None:
    for _ in range(steps):
        (loss, found), (expected_loss, expected) = compiled(ids, **kwargs), eager(ids, **kwargs)
        assert_close(loss, expected_loss, "loss", BOUND)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(found[name], gradient, name, BOUND)
    for name, buffer in eager.model.named_buffers():
        assert_same_bits(dict(compiled.model.named_buffers())[name], buffer)
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == 1, "compiled once, not at every step"


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.campaign)])
def test_the_step_is_that_of_eager(backend: str) -> None:
    config = {**BIASED, "hybrid_override_pattern": "ME*-", "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.05}
    model, plain = tiny_model(**config), tiny_model(**config)
    compiled = Step(model, torch.compile(model, fullgraph=True, backend=backend))
    assert_same_steps(compiled, Step(plain, plain), draw_ids(plain, 2, 9))


def test_packed_and_padded_rows() -> None:
    config = {**LOSSES, "hybrid_override_pattern": "ME", "mtp_hybrid_override_pattern": "E"}
    kwargs = {
        "seq_idx": torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 7]),
        "attention_mask": torch.tensor([[0] * 2 + [1] * 7, [1] * 9]),
        "num_items_in_batch": torch.tensor(20),
    }
    model, plain = tiny_model(**config), tiny_model(**config)
    compiled = Step(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert_same_steps(compiled, Step(plain, plain), draw_ids(plain, 2, 9), steps=2, **kwargs)


def test_gradient_checkpointing() -> None:
    model, plain = tiny_model(hybrid_override_pattern="M-"), tiny_model(hybrid_override_pattern="M-")
    model.gradient_checkpointing_enable()
    compiled = Step(model, torch.compile(model, backend="aot_eager"))
    assert_same_steps(compiled, Step(plain, plain), draw_ids(plain, 2, 9), steps=2)


def test_trainer_compiles(tmp_path: Path) -> None:
    """`torch_compile=True`; Trainer's batches have the same shape here."""
    model, plain = tiny_model(hybrid_override_pattern="M-"), tiny_model(hybrid_override_pattern="M-")
    options = {"max_steps": 2, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = trainer(model, tmp_path, rows_of([12] * 4), **options)
    compiled.train()
    eager = trainer(plain, tmp_path, rows_of([12] * 4), max_steps=2)
    eager.train()
    assert counters["stats"]["unique_graphs"] >= 1
    assert losses_of(compiled) == pytest.approx(losses_of(eager), rel=1e-4)
    compiled.save_model()
    assert isinstance(model, nn.Module)
    assert_same_bits(type(model).from_pretrained(tmp_path).state_dict(), model.state_dict())
