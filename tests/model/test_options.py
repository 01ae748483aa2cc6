"""What `forward` may be asked for: part of the logits, tuples, inner tensors; and what it refuses."""

import weakref
from typing import Any

import pytest
import torch

from helpers import assert_close, draw_ids, tiny_model
from nemotron_h import NemotronHModel
from nemotron_h.errors import InputError


@torch.no_grad()
def test_logits_to_keep() -> None:
    model = tiny_model()
    ids = draw_ids(model, 2, 9)
    full = model(ids).logits
    assert full.dtype == torch.float32
    assert_close(model(ids, logits_to_keep=0).logits, full)
    assert_close(model(ids, logits_to_keep=1).logits, full[:, -1:])
    assert_close(model(ids, logits_to_keep=4).logits, full[:, -4:])
    assert_close(model(ids, logits_to_keep=40).logits, full)
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 5, 3])).logits, full[:, [0, 5, 3]])
    assert_close(model(ids, logits_to_keep=torch.tensor([[2], [8]])).logits, full[[0, 1], [2, 8]][:, None])
    assert_close(model(ids, logits_to_keep=torch.tensor([[2, 3], [8, 1]])).logits, full[[[0], [1]], [[2, 3], [8, 1]]])


@pytest.mark.parametrize("keep", [-1, torch.zeros(3, 1, dtype=torch.long), torch.zeros(1, 1, 1, dtype=torch.long)])
def test_logits_to_keep_that_mean_nothing(keep: Any) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="logits_to_keep"):
        model(draw_ids(model, 2, 9), logits_to_keep=keep)


@pytest.mark.parametrize("keep", [1, torch.tensor([0])])
def test_labels_need_all_logits(keep: Any) -> None:
    model = tiny_model()
    ids = draw_ids(model, 2, 9)
    with pytest.raises(InputError, match="logits_to_keep"):
        model(ids, labels=ids, logits_to_keep=keep)


@torch.no_grad()
def test_return_dict_false_gives_the_same_in_a_tuple() -> None:
    model = tiny_model(use_cache=False)
    ids = draw_ids(model, 2, 9)
    out = model(ids, labels=ids, output_hidden_states=True)
    loss, logits, hidden_states = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert_close([loss, logits, *hidden_states], [out.loss, out.logits, *out.hidden_states])
    (hidden,) = model.model(ids, return_dict=False)
    assert_close(hidden, out.hidden_states[-1])
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)
    assert model(ids, return_dict=True).logits.shape == logits.shape


@torch.no_grad()
def test_inner_tensors_only_when_asked_for() -> None:
    model = tiny_model(hybrid_override_pattern="ME*-M*", num_nextn_predict_layers=1, sliding_window=4)
    ids = draw_ids(model, 2, 9)
    names = ("hidden_states", "attentions", "router_logits", "ssm_states", "mtp_logits")
    plain = model(ids)
    assert [getattr(plain, name) for name in names] == [None] * 5
    out = model(ids, **{f"output_{name}": True for name in names})
    assert_close(out.logits, plain.logits)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 9, 32)] * 7
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 9, 9)] * 2, "the default implementation is SDPA"
    assert [tuple(r.shape) for r in out.router_logits] == [(18, 8)]
    assert [tuple(s.shape) for s in out.ssm_states] == [(2, 6, 8, 16)] * 2
    assert [tuple(m.shape) for m in out.mtp_logits] == [(2, 8, 50)]
    assert len(model(ids, output_mtp_logits=3).mtp_logits) == 3
    for weights in out.attentions:
        assert_close(weights.sum(-1), torch.ones(2, 4, 9))
        assert (weights.triu(1) == 0).all()
        assert (weights.tril(-4) == 0).all()
    model.config.output_router_logits = model.config.output_hidden_states = True
    asked = model(ids)
    assert_close([*asked.router_logits, *asked.hidden_states], [*out.router_logits, *out.hidden_states])
    assert model(ids, output_router_logits=False).router_logits is None


@torch.no_grad()
def test_only_the_last_hidden_states() -> None:
    """-1, as transformers' speculative decoding asks."""
    model = tiny_model()
    ids = draw_ids(model, 2, 9)
    (last,) = model(ids, output_hidden_states=-1).hidden_states
    assert torch.equal(last, model(ids, output_hidden_states=True).hidden_states[-1])


@pytest.mark.parametrize("asked", [None, True])
@torch.no_grad()
def test_hidden_states_that_nobody_wants_are_let_go(asked: bool | None) -> None:
    """Else a long prompt would hold the output of every block."""
    model, alive = tiny_model(hybrid_override_pattern="M-M-"), []
    watched: list[Any] = []
    model.model.layers[0].register_forward_hook(lambda *args: watched.append(weakref.ref(args[2])))
    model.model.layers[3].register_forward_hook(lambda *_: alive.append(watched[0]() is not None))
    model(draw_ids(model, 2, 9), output_hidden_states=asked)
    assert alive == [bool(asked)]


@torch.no_grad()
def test_attentions_over_a_cache_and_padding() -> None:
    model = tiny_model(hybrid_override_pattern="M*")
    ids, mask = draw_ids(model, 2, 9), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    full = model(ids, attention_mask=mask, output_attentions=True).attentions[0]
    first = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
    then = model(ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values, output_attentions=True)
    assert_close(then.attentions[0], full[:, :, 4:])
    assert (full[0, :, 2:, :2] == 0).all()


@torch.no_grad()
def test_base_model_has_the_arguments_of_the_page() -> None:
    """`NemotronHModel.forward(input_ids, inputs_embeds, position_ids, past_key_values, use_cache, attention_mask)`."""
    model = tiny_model()
    ids, mask = draw_ids(model, 2, 6), torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    by_position = model.model(ids, None, None, None, True, mask)
    by_name = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=True)
    assert_close(by_position.last_hidden_state, by_name.hidden_states[-1])
    assert by_position.past_key_values.get_seq_length() == 6
    causal = model(ids, mask, None, by_position.past_key_values, None, None, None, 1)
    assert causal.logits.shape == (2, 1, 50), "input_ids, attention_mask, …, logits_to_keep"
    lonely = NemotronHModel(model.config).eval()
    lonely.load_state_dict(model.model.state_dict())
    assert_close(lonely(ids, attention_mask=mask).last_hidden_state, by_position.last_hidden_state)


@torch.no_grad()
def test_empty_sequence() -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    ids = draw_ids(model, 2, 5)
    nothing = ids[:, :0]
    out = model(nothing, attention_mask=nothing, use_cache=True, output_mtp_logits=2)
    assert out.logits.shape == (2, 0, 50)
    assert [m.shape for m in out.mtp_logits] == [(2, 0, 50)] * 2
    assert out.past_key_values.get_seq_length() == 0
    assert_close(model(ids, past_key_values=out.past_key_values).logits, model(ids).logits)
    filled = model(ids[:, :3], use_cache=True).past_key_values
    model(nothing, past_key_values=filled)
    assert filled.get_seq_length() == 3
    assert_close(model(ids[:, 3:], past_key_values=filled).logits, model(ids).logits[:, 3:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "exactly one"),
        ({"input_ids": torch.zeros(1, 2, dtype=torch.long), "inputs_embeds": torch.zeros(1, 2, 32)}, "exactly one"),
        ({"input_ids": torch.zeros(2, dtype=torch.long)}, r"\[batch, tokens\]"),
        ({"input_ids": torch.zeros(1, 2)}, "integers"),
        ({"input_ids": torch.zeros(0, 2, dtype=torch.long)}, "no rows"),
        ({"inputs_embeds": torch.zeros(0, 2, 32)}, "no rows"),
        ({"input_ids": torch.tensor([[3, 50]])}, "vocab_size=50"),
        ({"input_ids": torch.tensor([[3, -1]])}, "vocab_size=50"),
        ({"inputs_embeds": torch.zeros(1, 2, 31)}, r"tokens, 32\]"),
        ({"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.tensor([[1, 2]])}, "1 for real tokens"),
        ({"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 3)}, r"= \[1, 2\]"),
        ({"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 1, 2, 2)}, "attention_mask"),
        ({"input_ids": torch.tensor([[3, 4]]), "output_mtp_logits": True}, "num_nextn_predict_layers"),
        ({"input_ids": torch.tensor([[3, 4]]), "output_hidden_state": True}, "output_hidden_states"),
        ({"input_ids": torch.tensor([[3, 4]]), "attention_masks": torch.ones(1, 2)}, "attention_mask"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        tiny_model(hybrid_override_pattern="-")(**arguments)


@pytest.mark.parametrize("depths", [-1, 1.5, "2"])
def test_refused_mtp_depths(depths: Any) -> None:
    model = tiny_model(hybrid_override_pattern="-", num_nextn_predict_layers=1)
    with pytest.raises(InputError, match="output_mtp_logits"):
        model(draw_ids(model, 1, 4), output_mtp_logits=depths)


def test_mtp_needs_the_whole_sequence() -> None:
    model = tiny_model(hybrid_override_pattern="-", num_nextn_predict_layers=1)
    out = model(draw_ids(model, 1, 4), use_cache=True)
    with pytest.raises(InputError, match="whole sequence"):
        model(draw_ids(model, 1, 4), past_key_values=out.past_key_values, output_mtp_logits=True)
