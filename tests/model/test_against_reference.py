"""Every output of the model against the float64 reference, over configurations that use every field."""

import pytest
import torch
from configurations import models
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference64
from helpers import (
    BIASED,
    BOUND,
    BOUND64,
    assert_close,
    draw_inputs,
    draw_weights,
    hub_tensors,
    tiny_config,
    tiny_model,
)
from nemotron_h import NemotronHForCausalLM
from nemotron_h.family import tensors
from nemotron_h.modeling import NemotronHCausalLMOutput
from reference64 import Reference

Depths = int


def run_all(model: NemotronHForCausalLM, ids_T: Tensor, mtp_depths: Depths) -> NemotronHCausalLMOutput:
    with torch.no_grad():
        return model(
            ids_T[None], use_cache=True, output_hidden_states=True, output_attentions=True, output_router_logits=True,
            output_ssm_states=True, output_mtp_logits=mtp_depths or None,
        )  # fmt: skip


def check(model: NemotronHForCausalLM, out: NemotronHCausalLMOutput, reference: Reference, bound: float) -> None:
    """All that the model returns or leaves in its cache is what the reference says."""
    mambas = [i for i, kind in enumerate(model.config.layers_block_type) if kind == "mamba"]
    cache = out.past_key_values
    assert_close(out.logits[0], reference.logits_TV, "logits", bound)
    assert_close([h[0] for h in out.hidden_states], reference.hidden_states, "hidden_states", bound)
    assert_close([a[0] for a in out.attentions], reference.attentions, "attentions", bound)
    assert_close(list(out.router_logits), reference.router_logits, "router_logits", bound)
    assert_close([s[0] for s in out.ssm_states], reference.ssm_states, "ssm_states", bound)
    assert_close([cache.ssm_states[i][0] for i in mambas], reference.ssm_states, "cached ssm_states", bound)
    assert_close([cache.conv_states[i][0] for i in mambas], reference.conv_states, "conv_states", bound)
    assert_close([m[0] for m in out.mtp_logits or []], reference.mtp_logits, "mtp_logits", bound)


@settings(max_examples=200)
@given(models(), st.integers(1, 40), st.integers(1, 3), st.integers(0, 10**6))
def test_any_configuration(model: NemotronHForCausalLM, tokens: int, depths: Depths, seed: int) -> None:
    depths = depths if model.config.num_nextn_predict_layers else 0
    ids_T, reference = draw_inputs(model, tokens, seed, depths)
    check(model, run_all(model, ids_T, depths), reference, BOUND)
    check(model, run_all(model.double(), ids_T, depths), reference, BOUND64)


@pytest.mark.parametrize("pattern", ["M", "MMM", "*", "**", "E", "EE", "-", "--", "MEM*E-M"])
@pytest.mark.parametrize("tokens", [1, 2, 21])
def test_patterns_of_one_block_type_and_of_all(pattern: str, tokens: int) -> None:
    model = tiny_model(hybrid_override_pattern=pattern, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
    ids_T, reference = draw_inputs(model, tokens, mtp_depths=3)
    assert tokens == 1 or 3 < abs(reference.logits_TV).max() < 12, "the bound means something for logits of about 5"
    check(model, run_all(model, ids_T, 3), reference, BOUND)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("pattern", ["M", "*E", "-", "ME*-"])
def test_mtp_heads(heads: int, pattern: str) -> None:
    model = tiny_model(num_nextn_predict_layers=heads, mtp_hybrid_override_pattern=pattern, mlp_bias=True)
    ids_T, reference = draw_inputs(model, 12, mtp_depths=3)
    out = run_all(model, ids_T, 3)
    assert [tuple(m.shape) for m in out.mtp_logits] == [(1, 11, 50), (1, 10, 50), (1, 9, 50)]
    check(model, out, reference, BOUND)


@pytest.mark.parametrize("dt_bias", [-9.0, -7.0, 0.0, 3.0])
def test_long_sequence_in_chunks(dt_bias: float) -> None:
    """Trained models have steps below 0.001, at which a state lives for the whole sequence."""
    config = tiny_config(hybrid_override_pattern="M*M", mamba_chunk_size=128, mamba_num_heads=4)
    model = draw_weights(NemotronHForCausalLM(config), dt_bias=dt_bias)
    ids_T, reference = draw_inputs(model, 300)
    check(model, run_all(model, ids_T, 0), reference, BOUND)
    check(model, run_all(model.double(), ids_T, 0), reference, BOUND64)


def test_large_steps_and_strong_decay_stay_finite_and_exact() -> None:
    model = tiny_model(hybrid_override_pattern="MM", mamba_chunk_size=32)
    with torch.no_grad():
        for block in model.model.layers:
            block.mixer.A_log.copy_(torch.linspace(-8, 5, 6))
            block.mixer.dt_bias.copy_(torch.tensor([-30.0, -9.0, 0.0, 3.0, 25.0, 60.0]))
    ids_T, reference = draw_inputs(model, 70)
    check(model, run_all(model, ids_T, 0), reference, BOUND)
    check(model, run_all(model.double(), ids_T, 0), reference, BOUND64)


@pytest.mark.parametrize("groups", [1, 2])
def test_ties_between_equal_experts(groups: int) -> None:
    """Experts 0 and 4, 1 and 5, … are the same: scores tie exactly, and whichever is taken, the output is the same."""
    model = tiny_model(hybrid_override_pattern="E", n_group=groups, topk_group=1, num_experts_per_tok=3, **BIASED)
    mixer = model.model.layers[0].mixer
    with torch.no_grad():
        for tensor in (
            mixer.gate.weight,
            mixer.gate.e_score_correction_bias,
            mixer.experts.up_proj,
            mixer.experts.down_proj,
        ):
            tensor[4:] = tensor[:4]
    ids_T = torch.arange(50)
    reference = reference64.run(model.config, hub_tensors(model), ids_T.numpy())
    assert reference.selection_margin == 0
    check(model, run_all(model, ids_T, 0), reference, BOUND)


@settings(max_examples=25)
@given(models(), st.integers(1, 20))
def test_bfloat16_runs_in_its_own_types(model: NemotronHForCausalLM, tokens: int) -> None:
    ids_T = torch.arange(tokens) % model.config.vocab_size
    depths = 2 if model.config.num_nextn_predict_layers else 0
    out = run_all(model.bfloat16(), ids_T, depths)
    stream = torch.float32 if model.config.residual_in_fp32 else torch.bfloat16
    kinds = model.config.layers_block_type
    assert {h.dtype for h in out.hidden_states[:-1]} == {stream}
    assert out.hidden_states[-1].dtype == torch.bfloat16
    assert {t.dtype for t in (out.logits, *out.router_logits, *out.ssm_states, *(out.mtp_logits or []))} == {
        torch.float32
    }
    assert {a.dtype for a in out.attentions} <= {torch.bfloat16}
    for i, kind in enumerate(kinds):
        if kind == "mamba":
            assert out.past_key_values.conv_states[i].dtype == torch.bfloat16
            assert out.past_key_values.ssm_states[i].dtype == torch.float32
    shown = (
        out.logits,
        *out.hidden_states,
        *out.router_logits,
        *out.ssm_states,
        *out.attentions,
        *(out.mtp_logits or []),
    )
    assert all(t.isfinite().all() for t in shown)


@settings(max_examples=40)
@given(models())
def test_helpers_name_every_tensor_of_the_hub_layout(model: NemotronHForCausalLM) -> None:
    """The oracle reads the weights of the published layout, all of them and in its shapes."""
    shapes = {name: value.shape for name, value in hub_tensors(model).items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    expert_biases = {name for name in shapes if ".experts." in name and name.endswith(".bias")}
    assert {name: shape for name, shape in shapes.items() if name not in expert_biases} == dict(tensors(model.config))
