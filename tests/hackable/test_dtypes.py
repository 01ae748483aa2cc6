"""Which dtypes and devices appear inside: a float64 model is float64 throughout, no other one ever makes float64 or
complex tensors, and everything is made where the inputs are."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import BOUND64, assert_close, draw_ids, draw_inputs, tiny_config, tiny_model
from nemotron_h import LLM, NemotronHForCausalLM, SamplingParams

PATTERN: dict[str, Any] = {"hybrid_override_pattern": "ME*-", "num_nextn_predict_layers": 1}
PACKED = torch.tensor([[0] * 5 + [1] * 4] * 2)
MASK_BT = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]])


class Seen(TorchDispatchMode):
    """Counts what every operation, forward and backward, returns."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: Counter[torch.dtype] = Counter()
        self.devices: Counter[str] = Counter()
        self.where: dict[Any, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.dtypes[tensor.dtype] += 1
                self.devices[tensor.device.type] += 1
                self.where.setdefault(tensor.dtype, str(func))
                self.where.setdefault(tensor.device.type, str(func))
        return result

    def floats(self) -> set[torch.dtype]:
        return {dtype for dtype in self.dtypes if dtype.is_floating_point or dtype.is_complex}


# What one does with a model. B batch · T tokens.


def forward(model: NemotronHForCausalLM, ids_BT: Tensor) -> None:
    with torch.no_grad():
        model(ids_BT, output_hidden_states=True, output_attentions=True, output_mtp_logits=True, output_ssm_states=True)


def masked(model: NemotronHForCausalLM, ids_BT: Tensor) -> None:
    with torch.no_grad():
        model(ids_BT, attention_mask=MASK_BT.to(ids_BT.device), use_cache=False)


def packed(model: NemotronHForCausalLM, ids_BT: Tensor) -> None:
    with torch.no_grad():
        model(ids_BT, seq_idx=PACKED.to(ids_BT.device))


@torch.no_grad()
def decode(model: NemotronHForCausalLM, ids_BT: Tensor) -> None:
    mask_BT = MASK_BT.to(ids_BT.device)
    cache = model(ids_BT, attention_mask=mask_BT, use_cache=True).past_key_values
    for _ in range(2):
        mask_BT = torch.cat([mask_BT, mask_BT[:, 3:4]], dim=1)
        model(ids_BT[:, :1], attention_mask=mask_BT, past_key_values=cache)


def backward(model: NemotronHForCausalLM, ids_BT: Tensor) -> None:
    model(ids_BT, attention_mask=MASK_BT.to(ids_BT.device), labels=ids_BT, output_mtp_logits=True).loss.backward()


def generate(model: NemotronHForCausalLM, ids_BT: Tensor) -> None:
    model.generate(ids_BT, max_new_tokens=3, do_sample=False, eos_token_id=None)


ON_ANY_DEVICE: list[Callable[[NemotronHForCausalLM, Tensor], None]] = [forward, masked, packed, decode, backward]
RUNS = [*ON_ANY_DEVICE, generate]


def watched(model: NemotronHForCausalLM, run: Callable[[NemotronHForCausalLM, Tensor], None]) -> Seen:
    for module in model.modules():
        if hasattr(module, "load_E"):
            module.load_E = None
    model.config.mtp_loss_coef = model.config.router_aux_loss_coef = model.config.router_z_loss_coef = 0.1
    device = model.device
    ids_BT = (
        draw_ids(model, 2, 9).to(device) if device.type != "meta" else torch.zeros(2, 9, dtype=torch.long).to(device)
    )
    with Seen() as seen:
        run(model, ids_BT)
    return seen


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("run", ON_ANY_DEVICE)  # not generate: transformers samples from float32
def test_float64_throughout(run: Callable[..., None], training: bool) -> None:
    model = tiny_model(**PATTERN).double().train(training)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    seen = watched(model, run)
    assert seen.floats() == {torch.float64}, seen.where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("run", RUNS)
def test_never_float64_or_complex(
    run: Callable[..., None], dtype: torch.dtype, environment: Callable[..., None]
) -> None:
    """`environment`: the checks of NEMOTRON_H_CHECK compute in float64."""
    seen = watched(tiny_model(**PATTERN).to(dtype), run)
    assert seen.floats() == {dtype, torch.float32}, seen.where


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 0, "top_k": 5, "top_p": 0.9, "min_p": 0.01}])
def test_engine_makes_no_float64(params: dict[str, Any]) -> None:
    engine = LLM(tiny_model(**PATTERN).bfloat16())
    more = {"presence_penalty": 1.0, "repetition_penalty": 1.5, "logit_bias": {3: 1.0}, "logprobs": 2}
    with Seen() as seen:
        engine.generate([1, 2, 3], SamplingParams(max_tokens=4, prompt_logprobs=1, **params, **more))
        engine.score([1, 2, 3])
    assert seen.floats() == {torch.bfloat16, torch.float32}, seen.where


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("run", ON_ANY_DEVICE)
def test_everything_is_made_on_the_inputs_device(run: Callable[..., None], training: bool) -> None:
    with torch.device("meta"):
        model = NemotronHForCausalLM(tiny_config(**PATTERN)).train(training)
    seen = watched(model, run)
    assert set(seen.devices) == {"meta"}, seen.where


def test_float64_model_is_exact() -> None:
    """Not float64 tensors around float32 arithmetic: the reference is met to 1e-9, through the cache as well."""
    model = tiny_model(**PATTERN).double()
    ids_T, reference = draw_inputs(model, 12)
    expected = torch.tensor(reference.logits_TV)
    with torch.no_grad():
        assert_close(model(ids_T[None], use_cache=False).logits[0], expected, bound=BOUND64)
        out = model(ids_T[None, :5], use_cache=True)
        for token in range(5, 12):
            out = model(ids_T[None, token : token + 1], past_key_values=out.past_key_values)
            assert_close(out.logits[0, 0], expected[token], f"token {token}", BOUND64)


def test_correction_bias_is_never_rounded() -> None:
    """The choice of experts is float32 whatever the model's dtype; `.double()` widens it, nothing narrows it."""
    model = tiny_model(**PATTERN)
    gate = model.model.layers[1].mixer.gate
    expected = gate.e_score_correction_bias.clone()
    for change in (model.bfloat16, model.half, model.float, model.double, model.bfloat16, lambda: model.to(torch.half)):
        change()
        assert gate.e_score_correction_bias.dtype in (torch.float32, torch.float64)
        assert torch.equal(gate.e_score_correction_bias.float(), expected)
