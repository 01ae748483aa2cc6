"""torch.compile, `meta`, fake tensors and functorch see a model that they can run: the reference, without a break.

B batch · T tokens · V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import reset as forget_compiled
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, vmap

from helpers import assert_close, draw_ids, tiny_config, tiny_model
from nemotron_h import NemotronHForCausalLM

PATTERN: dict[str, Any] = {"hybrid_override_pattern": "ME*-"}
HEAD: dict[str, Any] = {**PATTERN, "num_nextn_predict_layers": 1}
MASK_BT = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 1, 1, 0]])


def compiled(model: NemotronHForCausalLM) -> Any:
    """`fullgraph`: whatever cannot be traced is an error."""
    return torch.compile(model, fullgraph=True, backend="eager")


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    forget_compiled()
    yield
    forget_compiled()


# torch.compile


@pytest.mark.usefixtures("_fresh_compiler")
@torch.no_grad()
def test_compiled_forward() -> None:
    model = tiny_model(**PATTERN)
    traced, ids_BT = compiled(model), draw_ids(model, 2, 9)
    assert_close(traced(ids_BT, use_cache=False).logits, model(ids_BT, use_cache=False).logits)
    with_mask = traced(ids_BT, attention_mask=MASK_BT, use_cache=False).logits
    expected = model(ids_BT, attention_mask=MASK_BT, use_cache=False).logits
    assert_close(with_mask[MASK_BT.bool()], expected[MASK_BT.bool()])


@pytest.mark.usefixtures("_fresh_compiler")
@torch.no_grad()
def test_compiled_prefill_and_decode() -> None:
    model = tiny_model(**PATTERN)
    traced, ids_BT = compiled(model), draw_ids(model, 2, 11)
    mask_BT = torch.cat([MASK_BT, torch.ones(2, 2, dtype=torch.long)], dim=1)
    out = traced(ids_BT[:, :9], attention_mask=MASK_BT, use_cache=True)
    own = model(ids_BT[:, :9], attention_mask=MASK_BT, use_cache=True)
    for end in (10, 11):
        given = {"attention_mask": mask_BT[:, :end]}
        out = traced(ids_BT[:, end - 1 : end], past_key_values=out.past_key_values, **given)
        own = model(ids_BT[:, end - 1 : end], past_key_values=own.past_key_values, **given)
        assert_close(out.logits, own.logits)
    assert out.past_key_values.get_seq_length() == 11
    assert out.past_key_values.row_lengths == own.past_key_values.row_lengths == [9, 9]
    assert_close(out.past_key_values.ssm_states[0], own.past_key_values.ssm_states[0])


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_training() -> None:
    traced_model, model = tiny_model(**HEAD).train(), tiny_model(**HEAD).train()
    for each in (traced_model, model):
        each.config.mtp_loss_coef = each.config.router_aux_loss_coef = 0.1
    ids_BT = draw_ids(model, 2, 9)
    loss = compiled(traced_model)(ids_BT, labels=ids_BT).loss
    own = model(ids_BT, labels=ids_BT).loss
    assert_close(loss, own)
    loss.backward()
    own.backward()
    for (name, parameter), expected in zip(traced_model.named_parameters(), model.parameters(), strict=True):
        assert_close(parameter.grad, expected.grad, name)
    load_E, own_load_E = (m.model.layers[1].mixer.gate.load_E for m in (traced_model, model))
    assert load_E is not None
    assert torch.equal(load_E, own_load_E)


# meta


def test_meta_in_bfloat16() -> None:
    with torch.device("meta"):
        model = NemotronHForCausalLM(tiny_config(**HEAD)).bfloat16()
        ids_BT, mask_BT = torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    out = model(ids_BT, attention_mask=mask_BT, use_cache=True, output_hidden_states=True, output_mtp_logits=True)
    assert [t.shape[1] for t in (out.logits, *out.mtp_logits)] == [9, 8]
    assert {(t.device.type, t.dtype) for t in out.hidden_states} == {("meta", torch.bfloat16)}
    assert out.logits.dtype == torch.float32
    step = model(ids_BT[:, :1], past_key_values=out.past_key_values)
    assert (tuple(step.logits.shape), step.logits.device.type) == ((2, 1, 50), "meta")
    assert step.past_key_values.get_seq_length() == 10
    model.train()
    loss = model(ids_BT, labels=ids_BT).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("mtp."):  # their loss has no weight by default
            assert parameter.grad is not None, name
            assert (parameter.grad.is_meta, parameter.grad.dtype) == (True, torch.bfloat16), name


# Fake tensors


def test_fake_tensors() -> None:
    with FakeTensorMode():
        model = NemotronHForCausalLM(tiny_config(**HEAD))
        ids_BT = torch.zeros(2, 9, dtype=torch.long)
        out = model(ids_BT, labels=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=True)
        assert isinstance(out.logits, FakeTensor)
        out.loss.backward()
        assert isinstance(model.lm_head.weight.grad, FakeTensor)
        step = model(ids_BT[:, :1], past_key_values=out.past_key_values)
        assert (tuple(step.logits.shape), str(step.logits.device)) == ((2, 1, 50), "cpu")


@torch.no_grad()
def test_fake_inputs_of_a_real_model() -> None:
    model = tiny_model(**PATTERN)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = model(mode.from_tensor(draw_ids(model, 2, 9)), use_cache=True)
    assert isinstance(out.logits, FakeTensor)
    assert tuple(out.logits.shape) == (2, 9, 50)


# functorch


def logits_of(model: NemotronHForCausalLM, parameters: dict[str, Tensor], ids_T: Tensor) -> Tensor:
    return functional_call(model, parameters, (ids_T[None],), {"use_cache": False}).logits[0]


def test_vmap_over_rows() -> None:
    model = tiny_model(**PATTERN)
    ids_BT, parameters = draw_ids(model, 3, 9), dict(model.named_parameters())
    rows_BTV = vmap(lambda ids_T: logits_of(model, parameters, ids_T))(ids_BT)
    assert_close(rows_BTV, model(ids_BT, use_cache=False).logits)


def test_gradients_of_each_row() -> None:
    model = tiny_model(**PATTERN)
    ids_BT, parameters = draw_ids(model, 3, 7), dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], ids_T: Tensor) -> Tensor:
        return functional_call(model, weights, (ids_T[None],), {"labels": ids_T[None], "use_cache": False}).loss

    by_row = vmap(grad(loss), in_dims=(None, 0))(parameters, ids_BT)
    for row, ids_T in enumerate(ids_BT):
        model.zero_grad()
        model(ids_T[None], labels=ids_T[None]).loss.backward()
        for name, parameter in model.named_parameters():
            assert_close(by_row[name][row], parameter.grad, f"{name} of row {row}")


def test_ensemble_of_two_models() -> None:
    models = [tiny_model(seed, **PATTERN) for seed in (0, 1)]
    stacked = {
        name: torch.stack([dict(model.named_parameters())[name] for model in models])
        for name, _ in models[0].named_parameters()
    }
    for model in models:  # buffers are not stacked
        model.model.layers[1].mixer.gate.e_score_correction_bias.zero_()
    ids_T = draw_ids(models[0], 9)
    both = vmap(lambda parameters: logits_of(models[0], parameters, ids_T))(stacked)
    assert_close(list(both), [model(ids_T[None], use_cache=False).logits[0] for model in models])
