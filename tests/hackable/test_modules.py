"""What users hang on, put into or change inside the model takes effect: hooks, other mixers, edited weights.

B batch · T tokens · D hidden size.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from helpers import assert_close, draw_ids, error, tiny_model
from nemotron_h import NemotronHForCausalLM

TINY: dict[str, Any] = {"hybrid_override_pattern": "ME*-", "num_nextn_predict_layers": 1, "use_bias": True}


@pytest.fixture
def model() -> NemotronHForCausalLM:
    return tiny_model(**TINY)


def with_parameters(model: nn.Module) -> list[str]:
    """Submodules that hold a parameter themselves, not by way of a child."""
    return [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]


@torch.no_grad()
def prefill(model: NemotronHForCausalLM, ids_BT: Tensor) -> Tensor:
    return model(ids_BT, use_cache=False).logits


@torch.no_grad()
def decode(model: NemotronHForCausalLM, ids_BT: Tensor, split: int = 3) -> Tensor:
    """The same logits, through a cache: `split` tokens at once, the others one by one."""
    out = model(ids_BT[:, :split], use_cache=True)
    logits = [out.logits]
    for token in range(split, ids_BT.shape[1]):
        out = model(ids_BT[:, token : token + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def mtp(model: NemotronHForCausalLM, ids_BT: Tensor) -> Tensor:
    return model(ids_BT, output_mtp_logits=True).mtp_logits[0]


# Hooks


def test_every_module_with_parameters_is_called_as_one(model: NemotronHForCausalLM) -> None:
    names = with_parameters(model)
    assert {"lm_head", "model.layers.0.mixer.conv1d", "model.layers.1.mixer.experts", "mtp.layers.0.eh_proj"} < {*names}
    calls: Counter[str] = Counter()
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    trunk = {name for name in names if not name.startswith("mtp.")}

    ids_BT = draw_ids(model, 2, 5)
    prefill(model, ids_BT)
    assert calls == dict.fromkeys(trunk, 1)
    decode(model, ids_BT)
    assert calls == dict.fromkeys(trunk, 1 + 3)
    model.generate(ids_BT, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert calls == dict.fromkeys(trunk, 1 + 3 + 4)
    calls.clear()
    mtp(model, ids_BT)
    assert {name: min(count, 1) for name, count in calls.items()} == dict.fromkeys(names, 1)


def louder(_module: nn.Module, _args: Any, output: Any) -> Any:
    """A hook that scales a module's output; of the routers' and convolutions' tuples the tensor that matters."""
    if isinstance(output, Tensor):
        return 1.5 * output
    field = "weights" if hasattr(output, "weights") else "output"
    return output._replace(**{field: 1.5 * getattr(output, field)})


def test_what_a_hook_returns_is_used(model: NemotronHForCausalLM) -> None:
    ids_BT = draw_ids(model, 1, 6)
    before, before_mtp = prefill(model, ids_BT), mtp(model, ids_BT)
    for name in with_parameters(model):
        handle = model.get_submodule(name).register_forward_hook(louder)
        if name.startswith("mtp."):
            assert error(mtp(model, ids_BT), before_mtp) > 1e-3, name
        else:
            hooked = prefill(model, ids_BT)
            assert error(hooked, before) > 1e-3, name
            assert_close(decode(model, ids_BT), hooked, name)
        handle.remove()
    assert torch.equal(prefill(model, ids_BT), before)


# Other mixers


class Doubled(nn.Module):
    """A mixer of one's own: hidden states first, one tensor back."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        return 2 * self.linear(hidden_states)


@pytest.mark.parametrize("index", range(4), ids="ME*-")
def test_replaced_mixer(model: NemotronHForCausalLM, index: int) -> None:
    ids_BT = draw_ids(model, 2, 6)
    before = prefill(model, ids_BT)
    block = model.model.layers[index]
    block.mixer = own = Doubled(model.config.hidden_size)

    with torch.no_grad():
        out = model(ids_BT, output_hidden_states=True, use_cache=False)
        into, behind = out.hidden_states[index : index + 2]
        if index < 3:  # behind the last block stands the final norm
            assert_close(behind - into, own(block.norm(into)))
        else:
            assert_close(behind, model.model.norm_f(into + own(block.norm(into))))
    assert error(out.logits, before) > 1e-2
    assert_close(decode(model, ids_BT), out.logits)
    written = model.generate(ids_BT[:1], max_new_tokens=5, do_sample=False, eos_token_id=None)
    for length in range(6, 11):
        assert written[0, length] == prefill(model, written[:, :length])[0, -1].argmax()


def test_mixer_is_given_layout_and_cache(model: NemotronHForCausalLM) -> None:
    seen = []

    class Watching(Doubled):
        def forward(self, hidden_states: Tensor, layout: Any = None, cache: Any = None) -> Tensor:
            seen.append((hidden_states.shape[1], layout.tokens, layout.past, cache))
            return super().forward(hidden_states)

    model.model.layers[0].mixer = Watching(model.config.hidden_size)
    out = model(draw_ids(model, 1, 5), use_cache=True)
    model(draw_ids(model, 1, 1), past_key_values=out.past_key_values)
    model(draw_ids(model, 1, 4), use_cache=False)
    layer = out.past_key_values.layers[0]
    assert seen == [(5, 5, 0, layer), (1, 1, 5, layer), (4, 4, 0, None)]


# Weights


def test_weights_edited_in_place(model: NemotronHForCausalLM) -> None:
    ids_BT = draw_ids(model, 1, 6)
    before, before_mtp = prefill(model, ids_BT), mtp(model, ids_BT)
    names = [*model.named_parameters(), *model.named_buffers()]
    assert len(names) > 40
    for name, tensor in names:
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.mul_(-3.0) if "correction_bias" in name else tensor.mul_(1.3)
        if name.startswith("mtp."):
            assert error(mtp(model, ids_BT), before_mtp) > 1e-4, name
        else:
            edited = prefill(model, ids_BT)
            assert error(edited, before) > 1e-4, name
            assert_close(decode(model, ids_BT), edited, name)
        with torch.no_grad():
            tensor.copy_(kept)
    assert torch.equal(prefill(model, ids_BT), before)


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.8 * weight


def test_weights_behind_parametrizations(model: NemotronHForCausalLM) -> None:
    ids_BT = draw_ids(model, 2, 6)
    before = prefill(model, ids_BT)
    edited = tiny_model(**TINY)
    with torch.no_grad():
        for parameter in edited.parameters():
            parameter.mul_(0.8)
    for name, _ in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(module), leaf, Scaled())

    runs: list[Callable[..., Tensor]] = [prefill, decode, mtp]
    for run in runs:
        assert_close(run(model, ids_BT), run(edited, ids_BT), run.__name__)
    assert error(prefill(model, ids_BT), before) > 1e-2

    for each in (model, edited):
        each(ids_BT, labels=ids_BT, output_mtp_logits=True).loss.backward()
    for name, parameter in edited.named_parameters():
        module, _, leaf = name.rpartition(".")
        original = model.get_submodule(module).parametrizations[leaf].original
        if parameter.grad is None:
            assert original.grad is None or not original.grad.any(), name
        else:
            assert_close(original.grad, 0.8 * parameter.grad, name)


# Gradients


def test_gradients_reach_every_parameter(model: NemotronHForCausalLM) -> None:
    model.train()
    model.config.mtp_loss_coef = 0.3
    model(draw_ids(model, 4, 24), labels=draw_ids(model, 4, 24, seed=1)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        nonzero = parameter.grad.flatten(1).any(1) if parameter.dim() > 1 else parameter.grad.any()
        sparse = (".experts.", ".gate.", "embeddings")  # experts and tokens that were drawn, no others
        assert nonzero.float().mean() > 0.5 if any(part in name for part in sparse) else nonzero.all(), name


def test_an_expert_that_no_token_takes_has_no_gradient(model: NemotronHForCausalLM) -> None:
    moe = model.model.layers[1].mixer
    moe.gate.e_score_correction_bias[3] = -100.0
    model(draw_ids(model, 2, 12), labels=draw_ids(model, 2, 12)).loss.backward()
    for projection in (moe.experts.up_proj, moe.experts.down_proj):
        assert not projection.grad[3].any()
        assert projection.grad.flatten(1).any(1).sum() > 4


@pytest.mark.parametrize("past", [0, 3])
def test_gradients_reach_the_inputs(model: NemotronHForCausalLM, past: int) -> None:
    """Also by way of a cache that was filled with gradients on."""
    embeds_BTD = model.model.embeddings(draw_ids(model, 1, 7)).detach().requires_grad_()
    if past:
        cache = model(inputs_embeds=embeds_BTD[:, :past], use_cache=True).past_key_values
        logits = model(inputs_embeds=embeds_BTD[:, past:], past_key_values=cache).logits
    else:
        logits = model(inputs_embeds=embeds_BTD, use_cache=False).logits
    (by_cache,) = torch.autograd.grad(logits[:, -1].square().sum(), embeds_BTD)
    whole = model(inputs_embeds=embeds_BTD, use_cache=False).logits
    (expected,) = torch.autograd.grad(whole[:, -1].square().sum(), embeds_BTD)
    assert expected.flatten(0, 1).any(1).all()
    assert_close(by_cache, expected)
