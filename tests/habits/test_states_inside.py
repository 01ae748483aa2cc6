"""States asked for, states to start from, a Mamba block as attention, routing as a picture.

B batch · T tokens · H Mamba heads · P head size · N state size · M tokens of all rows · E experts.
"""

from typing import Any

import numpy as np
import pytest
import torch
from inside_cases import MASK_BT, rows_of, scanned
from torch import Tensor
from torch.nn import functional as F

import reference64
from helpers import BOUND64, assert_close, draw_ids, draw_inputs, hub_tensors, tiny_model
from nemotron_h import NemotronHForCausalLM, NemotronHHybridDynamicCache, inspection
from nemotron_h.errors import CacheError, InputError

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # the name before v6


# States


@torch.no_grad()
def test_ssm_states_of_padded_rows() -> None:
    model = tiny_model().double()
    ids_BT, alone = rows_of(model)
    out = model(ids_BT, attention_mask=MASK_BT, output_ssm_states=True)
    assert [tuple(state.shape) for state in out.ssm_states] == [(3, 6, 8, 16)] * 2
    for row, ids_1T in enumerate(alone):
        expected = reference64.run(model.config, hub_tensors(model), ids_1T[0].numpy()).ssm_states
        assert_close([state[row] for state in out.ssm_states], expected, f"row {row}", BOUND64)


@torch.no_grad()
def test_ssm_states_of_cached_passes() -> None:
    model = tiny_model().double()
    ids_T, _ = draw_inputs(model, 9)
    cache = NemotronHHybridDynamicCache(model.config)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        states = model(ids_T[None, start:end], past_key_values=cache, output_ssm_states=True).ssm_states
        expected = reference64.run(model.config, hub_tensors(model), ids_T[:end].numpy()).ssm_states
        assert_close([state[0] for state in states], expected, f"after {end}", BOUND64)


@torch.no_grad()
def test_states_at_each_step_of_generate() -> None:
    model = tiny_model().double()
    prompt_T, _ = draw_inputs(model, 5)
    with inspection.record(model, "*.hook_state") as seen:
        written_BT = model.generate(prompt_T[None], max_new_tokens=4, do_sample=False, eos_token_id=None)
    for step, end in enumerate(range(5, 9)):
        expected = reference64.run(model.config, hub_tensors(model), written_BT[0, :end].numpy()).ssm_states
        assert_close([states[step][0] for states in seen.values()], expected, f"step {step}", BOUND64)


def drawn_states(model: NemotronHForCausalLM, batch: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    layers = model.config.layers_block_type.count("mamba")

    def leaves(*shape: int) -> list[Tensor]:
        drawn = (torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for _ in range(layers))
        return [(0.5 * state).requires_grad_() for state in drawn]

    return leaves(6, 8, 16), leaves(112, 3)


@pytest.mark.parametrize("mask_BT", [None, MASK_BT[:2, 2:7]], ids=["whole", "padded"])
def test_gradients_through_initial_states(mask_BT: Tensor | None) -> None:
    """Against central differences, of the loss and along a random direction in every state."""
    model = tiny_model(hybrid_override_pattern="M*ME", mamba_chunk_size=2).double()
    states, windows = drawn_states(model, 2)
    ids_BT = draw_ids(model, 2, 5)

    def loss(*leaves: Tensor) -> Tensor:
        cache = inspection.cache_from_states(model, leaves[:2], leaves[2:])
        return model(ids_BT, attention_mask=mask_BT, past_key_values=cache, labels=ids_BT).loss

    leaves = (*states, *windows)
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    for index, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        direction = torch.randn_like(leaf)
        values = []
        for step in (1e-6, -1e-6):
            moved = [leaf + step * direction if i == index else other for i, other in enumerate(leaves)]
            with torch.no_grad():
                values.append(loss(*moved))
        assert gradient.any()
        slope = (gradient * direction).sum()
        assert_close(1e3 * slope, 1e3 * (values[0] - values[1]) / 2e-6, f"leaf {index}", 1e-6)


def test_gradients_reach_the_state_through_generated_steps() -> None:
    """A state that is trained: two passes after it, the second of one token."""
    model = tiny_model(hybrid_override_pattern="M*M").double()
    states, _ = drawn_states(model, 1)
    ids_BT = draw_ids(model, 1, 5)
    cache = inspection.cache_from_states(model, states)
    model(ids_BT[:, :4], past_key_values=cache)
    model(ids_BT[:, 4:], past_key_values=cache).logits.sum().backward()
    whole = inspection.cache_from_states(model, other := [s.detach().requires_grad_() for s in states])
    model(ids_BT, past_key_values=whole).logits[:, -1:].sum().backward()
    for state, same in zip(states, other, strict=True):
        assert state.grad is not None
        assert same.grad is not None
        assert_close(state.grad, same.grad, bound=BOUND64)


@torch.no_grad()
def test_a_sequence_goes_on_from_states_alone() -> None:
    """Without attention the states are all there is to know of the past."""
    model = tiny_model(hybrid_override_pattern="M-ME").double()
    ids_T, _ = draw_inputs(model, 9)
    front = model(ids_T[None, :5], use_cache=True, output_ssm_states=True)
    windows = {i: front.past_key_values.conv_states[i] for i in (0, 2)}
    cache = inspection.cache_from_states(model, front.ssm_states, windows)
    kept = [state.clone() for state in front.ssm_states]
    rest = model(ids_T[None, 5:], past_key_values=cache)
    assert_close(rest.logits, model(ids_T[None]).logits[:, 5:], bound=BOUND64)
    assert cache.get_seq_length() == 4
    assert all(torch.equal(a, b) for a, b in zip(front.ssm_states, kept, strict=True))


@torch.no_grad()
def test_states_by_layer() -> None:
    model = tiny_model(hybrid_override_pattern="M*M")
    state = torch.randn(2, 6, 8, 16)
    ids_BT = draw_ids(model, 2, 5)
    named = inspection.cache_from_states(model, {2: state})
    by_hand = NemotronHHybridDynamicCache(model.config)
    by_hand.layers[2].recurrent_states = state
    zeros = inspection.cache_from_states(model, [torch.zeros_like(state), state], [torch.zeros(2, 112, 3)] * 2)
    logits = [model(ids_BT, past_key_values=cache).logits for cache in (named, by_hand, zeros)]
    assert torch.equal(logits[0], logits[1])
    assert_close(logits[0], logits[2])
    assert not torch.allclose(logits[0], model(ids_BT).logits)


@torch.no_grad()
def test_generate_from_states() -> None:
    model = tiny_model(hybrid_override_pattern="M*M").double()
    states, windows = drawn_states(model, 1)
    ids_BT = draw_ids(model, 1, 5)
    written = model.generate(
        ids_BT, past_key_values=inspection.cache_from_states(model, states, windows), max_new_tokens=4,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    expected = ids_BT
    for _ in range(4):
        cache = inspection.cache_from_states(model, states, windows)
        following = model(expected, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], dim=1)
    assert written.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("states", "windows", "words"),
    [
        ([torch.zeros(2, 6, 8, 16)], None, "2 mamba blocks, got 1"),
        ([torch.zeros(2, 6, 16, 8)] * 2, None, r"layer 0 must be floats \[2, 6, 8, 16\], got \[2, 6, 16, 8\]"),
        ({2: torch.zeros(2, 6, 8, 16), 0: torch.zeros(3, 6, 8, 16)}, None, "layer 0"),
        ({2: torch.zeros(2, 6, 8, 16, dtype=torch.long)}, None, "int64"),
        ({2: torch.tensor(0.0)}, None, r"\['batch', 6, 8, 16\], got \[\]"),
        ({1: torch.zeros(2, 6, 8, 16)}, None, r"layers \[1\] are no mamba blocks.*\[0, 2\]"),
        ({}, {0: torch.zeros(2, 112, 4)}, r"conv_states of layer 0 must be floats \[2, 112, 3\]"),
        ({0: torch.zeros(2, 6, 8, 16)}, {0: torch.zeros(1, 112, 3)}, "conv_states of layer 0"),
    ],
)
def test_states_that_do_not_fit(states: Any, windows: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        inspection.cache_from_states(tiny_model(hybrid_override_pattern="M*M"), states, windows)


def test_states_of_another_batch() -> None:
    model = tiny_model(hybrid_override_pattern="M*M")
    cache = inspection.cache_from_states(model, [torch.zeros(2, 6, 8, 16)] * 2)
    with pytest.raises(CacheError, match="2 rows, the input has 3"):
        model(draw_ids(model, 3, 4), past_key_values=cache)


def test_states_are_not_dropped_under_checkpointing() -> None:
    model = tiny_model(hybrid_override_pattern="M*M").train()
    model.gradient_checkpointing_enable()
    cache = inspection.cache_from_states(model, [torch.zeros(2, 6, 8, 16)] * 2)
    with pytest.raises(CacheError, match="states to start from"):
        model(draw_ids(model, 2, 4), past_key_values=cache)


# Effective attention


def matrix(seen: dict[str, np.ndarray], model: NemotronHForCausalLM, tokens: int) -> np.ndarray:
    """The definition, entry by entry: M[t, s] = C_t·B_s exp(Σ_{s < r <= t} dt_r A) dt_s. [H, T, T]."""
    heads = model.config.mamba_num_heads
    A_H = -np.exp(model.model.layers[0].mixer.A_log.detach().numpy())
    found = np.zeros((heads, tokens, tokens))
    for h in range(heads):
        g = h // (heads // model.config.mamba_n_groups)
        for t in range(tokens):
            for s in range(t + 1):
                decay = np.exp(seen["dt"][s + 1 : t + 1, h].sum() * A_H[h])
                found[h, t, s] = seen["C"][t, g] @ seen["B"][s, g] * decay * seen["dt"][s, h]
    return found


@torch.no_grad()
@pytest.mark.parametrize("mask_BT", [None, MASK_BT])
def test_effective_attention(mask_BT: Tensor | None) -> None:
    model = tiny_model(mamba_chunk_size=4).double()
    ids_BT = draw_ids(model, 3, 9)
    M_BHTT = inspection.effective_attention(model, ids_BT, 0, mask_BT)
    with_D_BHTT = inspection.effective_attention(model, ids_BT, 0, mask_BT, include_D=True)
    assert M_BHTT.shape == (3, 6, 9, 9)
    valid_BT = torch.ones(3, 9, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    D_HTT = model.model.layers[0].mixer.D[:, None, None] * torch.eye(9)
    for row, valid_T in enumerate(valid_BT):
        expected = torch.zeros(6, 9, 9, dtype=torch.float64)
        real = valid_T.nonzero()[:, 0]
        single = torch.from_numpy(matrix(scanned(model, ids_BT[row, real]), model, len(real)))
        expected[:, real[:, None], real] = single
        assert_close(M_BHTT[row], expected, f"row {row}", BOUND64)
        assert_close(with_D_BHTT[row], expected + D_HTT * valid_T[:, None], f"row {row} with D", BOUND64)
    assert not M_BHTT[valid_BT[:, None, :, None].expand_as(M_BHTT).logical_not()].any()


@torch.no_grad()
@pytest.mark.parametrize(
    "kwargs", [{}, {"attention_mask": MASK_BT}, {"seq_idx": torch.tensor([[0] * 4 + [1] * 5] * 3)}]
)
@pytest.mark.parametrize("layer", [0, 4])
def test_the_matrix_times_the_values_is_the_scan(kwargs: dict[str, Tensor], layer: int) -> None:
    model = tiny_model(mamba_chunk_size=4).double()
    ids_BT, _ = rows_of(model)
    M_BHTT = inspection.effective_attention(model, ids_BT, layer, include_D=True, **kwargs)
    with inspection.record(model, f"model.layers.{layer}.*") as seen:
        model(ids_BT, use_cache=False, **kwargs)
    x_BTHP, y_BTHP = (seen[f"model.layers.{layer}.mixer.hook_{name}"][0] for name in ("x", "y"))
    real = kwargs.get("attention_mask", torch.ones(3, 9)).bool()
    found_BTHP = torch.einsum("bhts,bshp->bthp", M_BHTT, x_BTHP)
    assert_close(found_BTHP[real], y_BTHP[real], bound=BOUND64)


def test_effective_attention_has_gradients() -> None:
    model = tiny_model().double()
    mixer = model.model.layers[0].mixer
    inspection.effective_attention(model, draw_ids(model, 1, 6), 0).sum().backward()
    for parameter in (mixer.A_log, mixer.dt_bias, mixer.in_proj.weight, mixer.conv1d.weight):
        assert parameter.grad is not None
        assert parameter.grad.any()
    assert inspection.effective_attention(model.float(), draw_ids(model, 1, 6), 0).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("mask_BT", [None, MASK_BT])
def test_expert_weights(mask_BT: Tensor | None) -> None:
    model = tiny_model(routed_scaling_factor=1.0)
    ids_BT, _ = rows_of(model)
    weights_BTE = inspection.expert_weights(model, ids_BT, 1, mask_BT)
    logits_ME = model(ids_BT, attention_mask=mask_BT, output_router_logits=True).router_logits[0]
    real = torch.ones(3, 9, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    chosen_BTE = weights_BTE != 0
    assert (chosen_BTE.sum(-1) == 2 * real).all()
    score_BTE = logits_ME.view(3, 9, 8).sigmoid() * chosen_BTE
    assert_close(weights_BTE[real], F.normalize(score_BTE, p=1, dim=-1)[real], bound=1e-6)


@pytest.mark.parametrize("layer", [-1, 1, 2, 5])
def test_layers_that_are_none(layer: int) -> None:
    model = tiny_model()
    ids_BT = draw_ids(model, 1, 3)
    with pytest.raises(InputError, match=rf"layer={layer} is not a mamba block; those are \[0, 4\]"):
        inspection.effective_attention(model, ids_BT, layer)
    if layer != 1:
        with pytest.raises(InputError, match=rf"layer={layer} is not a moe block; those are \[1\]"):
            inspection.expert_weights(model, ids_BT, layer)
    with pytest.raises(InputError, match="Linear"):
        inspection.effective_attention(torch.nn.Linear(2, 2), ids_BT, 0)


@torch.no_grad()
def test_a_model_with_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = tiny_model()
    ids_BT = draw_ids(model, 1, 5)
    expected = [inspection.effective_attention(model, ids_BT, 4), inspection.expert_weights(model, ids_BT, 1)]
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["in_proj", "q_proj"]))
    found = [inspection.effective_attention(adapted, ids_BT, 4), inspection.expert_weights(adapted, ids_BT, 1)]
    assert_close(found, expected)  # a fresh adapter changes nothing
    with inspection.record(adapted, "*.layers.0.mixer.hook_dt") as seen:
        adapted(ids_BT, past_key_values=inspection.cache_from_states(adapted, {0: torch.zeros(1, 6, 8, 16)}))
    assert list(seen) == ["base_model.model.model.layers.0.mixer.hook_dt"]
    assert len(seen["base_model.model.model.layers.0.mixer.hook_dt"]) == 1
