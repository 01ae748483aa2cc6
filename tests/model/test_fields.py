"""Every field of the documented configuration has its documented effect."""

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from field_effects import EFFECTS, effect
from torch import Tensor
from torch.nn import functional as F

from helpers import BIASED, draw_ids, tiny_config, tiny_model
from nemotron_h import NemotronHForCausalLM
from nemotron_h.layout import Layout

SIGNATURE = (Path(__file__).parent.parent / "data" / "seed_config_signature.txt").read_text()
DOCUMENTED = re.findall(r"(\w+) = ", SIGNATURE)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


def generate(model: NemotronHForCausalLM, ids: Tensor | None, **kwargs: Any) -> list[list[int]]:
    return model.generate(ids, **(GREEDY | kwargs)).tolist()


def prompt_and_text() -> tuple[Tensor, list[int], list[int]]:
    """A prompt of two rows, and what greedy decoding makes of each when nothing ends it; the rows differ early."""
    model = tiny_model(eos_token_id=None)
    for seed in range(100):
        ids = draw_ids(model, 2, 4, seed=seed)
        first, second = (row[4:] for row in generate(model, ids))
        if first[3] not in first[:3] + second and second[3] not in first + second[:3]:
            return ids, first, second
    raise AssertionError("no prompt whose continuations differ")


@effect
def eos_token_id() -> None:
    ids, first, _ = prompt_and_text()
    assert generate(tiny_model(eos_token_id=first[3]), ids[:1])[0][4:] == first[:4]
    assert generate(tiny_model(eos_token_id=[49, first[3]]), ids[:1])[0][4:] == first[:4]


@effect
def pad_token_id() -> None:
    ids, first, second = prompt_and_text()
    for pad in (0, 33):
        rows = generate(tiny_model(eos_token_id=first[3], pad_token_id=pad), ids)
        assert rows[0][4:] == first[:4] + [pad] * 8
        assert rows[1][4:] == second


@effect
def bos_token_id() -> None:
    for bos in (1, 40):
        model = tiny_model(bos_token_id=bos, eos_token_id=None)
        assert generate(model, None)[0] == generate(model, torch.tensor([[bos]]))[0]


@effect
def num_logits_to_keep() -> None:
    ids = torch.arange(5)[None]
    for value, wanted in ((1, 1), (3, 3), (0, 5), (None, 5)):
        model = tiny_model(num_logits_to_keep=value, eos_token_id=None)
        seen: list[int] = []
        model.register_forward_hook(lambda _module, _args, out, seen=seen: seen.append(out.logits.shape[1]))
        generate(model, ids, max_new_tokens=3)
        assert seen == [wanted, 1, 1]


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@effect
def max_position_embeddings() -> None:
    model, far = tiny_model(max_position_embeddings=17, eos_token_id=None), tiny_model(max_position_embeddings=10**6)
    ids, records = draw_ids(model, 1, 30), _Records()
    assert torch.equal(model(ids).logits, far(ids).logits), "the model has no positions: nothing is bounded"
    logging.getLogger("nemotron_h").addHandler(records)
    try:
        generate(model, ids[:, :3])
        assert records.messages == [], "15 tokens are within"
        for _ in range(2):
            generate(model, ids[:, :10])
    finally:
        logging.getLogger("nemotron_h").removeHandler(records)
    assert len(records.messages) == 1, "once"
    assert "max_position_embeddings=17" in records.messages[0]


@effect
def use_cache() -> None:
    for value in (True, False):
        model = tiny_model(use_cache=value)
        ids = draw_ids(model, 1, 3)
        assert (model(ids).past_key_values is not None) is value
        assert (model.model(ids).past_key_values is not None) is value
        assert (model(ids, use_cache=not value).past_key_values is None) is value
    assert tiny_model().train()(ids).past_key_values is None, "not in training"


@effect
def residual_in_fp32() -> None:
    ids = torch.arange(8)[None]
    outs = []
    for value in (True, False):
        model = tiny_model(residual_in_fp32=value, **BIASED).bfloat16()
        outs.append(model(ids, output_hidden_states=True))
        stream = torch.float32 if value else torch.bfloat16
        assert {h.dtype for h in outs[-1].hidden_states[:-1]} == {stream}
    assert not torch.equal(outs[0].logits, outs[1].logits)


def train_logits(seed: int = 0, **fields: Any) -> Tensor:
    model = tiny_model(**fields).train()
    torch.manual_seed(seed)
    return model(draw_ids(model, 2, 12)).logits.detach()


def dropout(name: str) -> None:
    assert torch.equal(train_logits(0), train_logits(1)), "without, training is deterministic"
    assert not torch.allclose(train_logits(0, **{name: 0.5}), train_logits(1, **{name: 0.5}), atol=0.1)
    ids = draw_ids(tiny_model(), 2, 12)
    assert torch.equal(tiny_model(**{name: 0.5})(ids).logits, tiny_model()(ids).logits), "training only"


@effect
def attention_dropout() -> None:
    dropout("attention_dropout")
    model = tiny_model(attention_dropout=0.5).train()
    shown = model(draw_ids(model, 1, 6), output_attentions=True).attentions[0]
    assert (shown.sum(-1) - 1).abs().max() < 1e-5, "the probabilities that are shown are those before dropout"


@effect
def hidden_dropout() -> None:
    dropout("hidden_dropout")
    model = tiny_model(hidden_dropout=0.5, hybrid_override_pattern="-").train()
    embeds = torch.ones(1, 400, 32)
    entering = model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[0]
    assert set(entering.unique().tolist()) == {0.0, 2.0}, "the embeddings are dropped"
    assert (entering == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    block = model.model.layers[0]
    leaving = block(embeds, Layout(400)) - embeds
    assert (leaving == 0).float().mean() == pytest.approx(0.5, abs=0.05), "and each mixer's output"


# Initialization: many heads, so that the statistics say something.

WIDE: dict[str, Any] = {"mamba_num_heads": 2048, "mamba_head_dim": 1, "hybrid_override_pattern": "MME*-"}


def fresh(**fields: Any) -> NemotronHForCausalLM:
    torch.manual_seed(0)
    return NemotronHForCausalLM(tiny_config(**(WIDE | fields))).requires_grad_(False)


def steps(**fields: Any) -> Tensor:
    """The time steps that a fresh model starts with."""
    return F.softplus(fresh(**fields).model.layers[0].mixer.dt_bias.detach().double())


@effect
def mamba_dt_min() -> None:
    for low in (0.001, 0.02):
        drawn = steps(mamba_dt_min=low).log()
        assert drawn.min() == pytest.approx(math.log(low), abs=0.02)
        assert drawn.mean() == pytest.approx((math.log(low) + math.log(0.1)) / 2, abs=0.1), "log-uniform"


@effect
def mamba_dt_max() -> None:
    for high in (0.1, 5.0):
        drawn = steps(mamba_dt_max=high).log()
        assert drawn.max() == pytest.approx(math.log(high), abs=0.02)
        assert drawn.std() == pytest.approx((math.log(high) - math.log(0.001)) / 12**0.5, rel=0.05), "log-uniform"


@effect
def mamba_dt_init_floor() -> None:
    assert steps(mamba_dt_init_floor=0.03).min() == pytest.approx(0.03, rel=1e-4)
    floored = (steps(mamba_dt_init_floor=0.03) < 0.0301).float().mean()
    assert floored == pytest.approx(math.log(30) / math.log(100), abs=0.05)


@effect
def initializer_range() -> None:
    for std in (0.02, 0.3):
        model = fresh(initializer_range=std, rescale_prenorm_residual=False)
        expert = model.model.layers[2].mixer
        for weight in (
            model.model.embeddings.weight, model.lm_head.weight, model.model.layers[0].mixer.in_proj.weight,
            model.model.layers[0].mixer.out_proj.weight, model.model.layers[3].mixer.q_proj.weight, expert.gate.weight,
            model.model.layers[4].mixer.up_proj.weight, expert.experts.up_proj, expert.shared_experts.up_proj.weight,
        ):  # fmt: skip
            assert weight.std() == pytest.approx(std, rel=0.1)
            assert abs(weight.mean()) < 0.2 * std


@effect
def rescale_prenorm_residual() -> None:
    """Kaiming-uniform with a = √5 is uniform in ±1/√fan_in; then divided by the square root of the number of layers."""
    weight = fresh(rescale_prenorm_residual=True).model.layers[1].mixer.out_proj.weight
    limit = 1 / 2048**0.5 / 5**0.5
    assert weight.abs().max() == pytest.approx(limit, rel=0.01)
    assert weight.std() == pytest.approx(limit / 3**0.5, rel=0.02)
    plain = fresh(rescale_prenorm_residual=False).model.layers[1].mixer.out_proj.weight
    assert plain.std() == pytest.approx(0.02, rel=0.02)


def test_the_rest_of_the_initialization() -> None:
    """A_log = log(1..H); D and norms 1; biases 0."""
    model = fresh(use_bias=True, mlp_bias=True, attention_bias=True, mamba_num_heads=6, num_nextn_predict_layers=1)
    for name, tensor in model.state_dict().items():
        if name.endswith("A_log"):
            assert torch.allclose(tensor.exp(), torch.arange(1.0, 7.0))
        elif name.endswith(("norm.weight", "layernorm.weight", "norm_f.weight", ".D")):
            assert (tensor == 1).all(), name
        elif name.endswith("bias") and not name.endswith("dt_bias"):
            assert (tensor == 0).all(), name
        else:
            assert tensor.std() > 1e-3, name


@pytest.mark.parametrize("name", DOCUMENTED)
def test_field(name: str) -> None:
    EFFECTS[name]()


def test_every_documented_field_has_a_check_and_no_other() -> None:
    assert len(DOCUMENTED) == 55
    assert sorted(EFFECTS) == sorted(DOCUMENTED)
