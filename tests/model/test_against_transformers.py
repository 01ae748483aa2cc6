"""transformers' own NemotronH as a second oracle, with its floor of the time step lifted; and what the floor does.

Fields that it accepts without acting on them keep their defaults here; the float64 reference covers those.
"""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from helpers import BOUND, assert_close, draw_inputs, draw_weights, error, tiny_config, tiny_model
from nemotron_h import NemotronHConfig, NemotronHForCausalLM

INF = float("inf")


def their_model(model: NemotronHForCausalLM, floor: bool = False) -> Any:
    """Their model with our weights: in memory the names are the same."""
    config = transformers.NemotronHConfig.from_dict(model.config.to_diff_dict())
    config._experts_implementation = "eager"  # the other one wants widths that are multiples of 4
    result = theirs.NemotronHForCausalLM(config)
    result.load_state_dict(model.state_dict())
    for module in result.modules():
        if isinstance(module, theirs.NemotronHMamba2Mixer) and not floor:
            module.time_step_limit = (0.0, INF)
    return result.eval()


@torch.no_grad()
def run(model: Any, ids_BT: Tensor, **kwargs: Any) -> Any:
    return model(ids_BT, use_cache=False, output_hidden_states=True, **kwargs)


@st.composite
def configurations(draw: st.DrawFn) -> NemotronHConfig:
    groups, key_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kept, size, expert_groups = draw(st.integers(1, 2)), draw(st.integers(2, 4)), draw(st.integers(2, 3))
    width = st.integers(2, 20)
    return NemotronHConfig(
        hybrid_override_pattern=draw(st.text("ME*-", min_size=1, max_size=6)),
        vocab_size=draw(st.integers(4, 40)),
        hidden_size=draw(st.integers(4, 24)),
        use_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        mamba_conv_bias=draw(st.booleans()),
        layer_norm_epsilon=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        num_key_value_heads=key_heads,
        num_attention_heads=key_heads * draw(st.integers(1, 3)),
        head_dim=draw(width),
        intermediate_size=draw(width),
        mlp_hidden_act=draw(st.sampled_from(["relu2", "silu", "gelu"])),
        mamba_n_groups=groups,
        mamba_num_heads=groups * draw(st.integers(1, 3)),
        mamba_head_dim=draw(width),
        ssm_state_size=draw(width),
        mamba_d_conv=draw(st.integers(2, 4)),
        mamba_chunk_size=draw(st.sampled_from([4, 8, 64])),
        n_routed_experts=expert_groups * size,
        n_group=expert_groups,
        topk_group=kept,
        num_experts_per_tok=draw(st.integers(1, kept * size)),
        moe_intermediate_size=draw(width),
        moe_latent_size=draw(st.none() | width),
        moe_shared_expert_intermediate_size=draw(width),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        norm_topk_prob=draw(st.booleans()),
    )


@settings(max_examples=40)
@given(configurations(), st.integers(1, 30), st.integers(-9, 2), st.integers(0, 10**6))
def test_any_configuration(config: NemotronHConfig, tokens: int, dt_bias: int, seed: int) -> None:
    model = draw_weights(NemotronHForCausalLM(config), seed, float(dt_bias))
    ids_T, reference = draw_inputs(model, tokens, seed)
    ours, other = run(model, ids_T[None]), run(their_model(model), ids_T[None])
    assert_close(other.logits[0], reference.logits_TV, "their logits against the reference")
    assert_close(ours.logits, other.logits, "logits")
    assert_close(list(ours.hidden_states), list(other.hidden_states), "hidden_states")


@pytest.mark.parametrize("pattern", ["M-M*-", "MEM*E"])
def test_loss_and_gradients(pattern: str) -> None:
    model = tiny_model(hybrid_override_pattern=pattern)
    other = their_model(model)
    ids_T, _ = draw_inputs(model, 20)
    losses = []
    for each in (model, other):
        loss = each(ids_T[None], labels=ids_T[None], use_cache=False).loss
        loss.backward()
        losses.append(loss)
    assert_close(losses[0], losses[1], "loss")
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert_close(parameter.grad, expected[name].grad, name)


@pytest.mark.parametrize("pattern", ["M-M*-", "MEM*E"])
def test_cache(pattern: str) -> None:
    """Where theirs is right: one row, a prompt and single tokens after it, the floor lifted."""
    model = tiny_model(hybrid_override_pattern=pattern)
    other = their_model(model)
    ids_T, _ = draw_inputs(model, 20)
    caches: list[Any] = [None, None]
    with torch.no_grad():
        for part in (ids_T[:15], *ids_T[15:].split(1)):
            outputs = []
            for i, each in enumerate((model, other)):
                outputs.append(each(part[None], past_key_values=caches[i], use_cache=True))
                caches[i] = outputs[i].past_key_values
            assert_close(outputs[0].logits, outputs[1].logits, "logits")


def test_left_padding_without_biases() -> None:
    model = tiny_model()
    ids_T, _ = draw_inputs(model, 14)
    ids_BT = torch.stack([ids_T, ids_T.roll(5)])
    mask_BT = torch.ones_like(ids_BT)
    ids_BT[1, :5], mask_BT[1, :5] = 0, 0
    ours, other = (run(each, ids_BT, attention_mask=mask_BT).logits for each in (model, their_model(model)))
    assert_close(ours[0], other[0], "the full row")
    assert_close(ours[1, 5:], other[1, 5:], "the padded row")


@pytest.mark.parametrize("pattern", ["MM", "MEM*E"])
def test_what_the_floor_does(pattern: str) -> None:
    """Theirs raises every step below `time_step_min` to it, whatever `time_step_limit` says; trained ones are below."""
    config = tiny_config(hybrid_override_pattern=pattern, mamba_dt_min=1e-3, mamba_dt_limit=(0.0, INF))
    model = draw_weights(NemotronHForCausalLM(config), dt_bias=-9.0)
    ids_T, reference = draw_inputs(model, 40)
    floored, lifted = (run(their_model(model, floor=floor), ids_T[None]).logits[0] for floor in (True, False))
    assert_close(lifted, reference.logits_TV, "without the floor")
    assert_close(run(model, ids_T[None]).logits[0], reference.logits_TV, "ours")
    assert error(floored, reference.logits_TV) > 10 * BOUND, "with it, theirs computes something else"

    same = NemotronHConfig.from_dict(config.to_dict(), mamba_dt_limit=(1e-3, INF))
    limited = NemotronHForCausalLM(same)
    limited.load_state_dict(model.state_dict())
    ids_T, reference = draw_inputs(limited.eval(), 40)
    floored = run(their_model(model, floor=True), ids_T[None]).logits[0]
    assert_close(floored, reference.logits_TV, "a model that asks for the floor has it in both")
    assert_close(run(limited, ids_T[None]).logits[0], floored, "a model that asks for the floor has it in both")
