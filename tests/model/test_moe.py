"""The routed experts' two implementations, the router's selection, and the bias that balances the load."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference64
from helpers import BOUND, BOUND64, MARGIN, assert_close, draw_ids, tiny_config, tiny_model
from nemotron_h.errors import KernelError
from nemotron_h.ops.moe import experts, load
from nemotron_h.ops.router import route

ROUTINGS = ("even", "one expert", "last expert empty", "only the ends", "skewed")


def choose(kind: str, tokens: int, n_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Ascending expert ids [M, k], spread over the experts in the manner of `kind`."""
    if kind == "one expert" or top_k == n_experts:
        return torch.arange(top_k).expand(tokens, -1)
    scores = torch.rand(tokens, n_experts, generator=generator)
    if kind == "last expert empty":
        scores[:, -1] = -1
    elif kind == "only the ends":
        scores[:, : top_k // 2 + top_k % 2] = 2
        scores[:, n_experts - top_k // 2 :] = 2
    elif kind == "skewed":
        scores += torch.linspace(3, 0, n_experts)
    return scores.topk(top_k).indices.sort(-1).values


def arguments(tokens: int, n_experts: int, top_k: int, kind: str, biases: bool, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).div(shape[-1] ** 0.5).requires_grad_()

    chosen = choose(kind, tokens, n_experts, top_k, generator)
    weights = torch.rand(tokens, top_k, generator=generator).requires_grad_()
    bias = (draw(n_experts, 16), draw(n_experts, 8)) if biases else (None, None)
    return draw(tokens, 8), chosen, weights, draw(n_experts, 16, 8), draw(n_experts, 8, 16), "relu2", *bias


def cast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The floating tensors in `dtype`, the routing's weights never below float32."""
    wide = torch.promote_types(dtype, torch.float32)

    def change(index: int, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(wide if index == 2 else dtype).requires_grad_()

    return tuple(change(index, value) for index, value in enumerate(args))


def run(args: tuple[Any, ...], impl: str) -> tuple[Tensor, list[Tensor]]:
    out = experts(*args, impl=impl)
    wanted = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    weight = torch.linspace(-1, 1, out.numel()).view_as(out).to(out)
    return out, list(torch.autograd.grad((out * weight).sum(), wanted))


def plainly(x_ML: Tensor, chosen_Mk: Tensor, weights_Mk: Tensor, up: Tensor, down: Tensor, *rest: Any) -> Tensor:
    """Token by token and expert by expert, in float64."""
    _, up_bias, down_bias = rest
    out = torch.zeros_like(x_ML, dtype=torch.float64)
    for m in range(x_ML.shape[0]):
        for e, w in zip(chosen_Mk[m].tolist(), weights_Mk[m].double(), strict=True):
            h = up[e].double() @ x_ML[m].double() + (0 if up_bias is None else up_bias[e].double())
            out[m] += w * (down[e].double() @ h.relu().square() + (0 if down_bias is None else down_bias[e].double()))
    return out


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 40), n_experts=st.integers(1, 12), data=st.data(), kind=st.sampled_from(ROUTINGS),
    biases=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_both_implementations(
    tokens: int, n_experts: int, data: st.DataObject, kind: str, biases: bool, seed: int
) -> None:
    """Values and gradients, however uneven the load; an expert without tokens has gradient zero."""
    top_k = data.draw(st.integers(1, n_experts))
    args = arguments(tokens, n_experts, top_k, kind, biases, seed)
    expected = plainly(*args)
    reference, reference_grads = run(args, "reference")
    assert_close(reference, expected, "reference")
    wide = cast(args, torch.float64)
    value, wide_grads = run(wide, "reference")
    assert_close(value, expected, "reference in float64", BOUND64)
    assert_close(reference_grads, wide_grads, "gradients")
    idle = load(args[1], n_experts) == 0
    assert (reference_grads[2][idle] == 0).all()
    if tokens * top_k >= 32:
        grouped, grouped_grads = run(args, "grouped")
        assert_close(grouped, expected, "grouped")
        assert_close(grouped_grads, wide_grads, "gradients of grouped")
        assert (grouped_grads[2][idle] == 0).all()
        assert (grouped_grads[3][idle] == 0).all()


@pytest.mark.parametrize("kind", ROUTINGS)
def test_bfloat16(kind: str) -> None:
    """Weighted sums are float32: the error is that of the products' bfloat16, in both implementations."""
    args = arguments(32, 8, 2, kind, False, 0)
    low = cast(args, torch.bfloat16)
    expected = plainly(*low)
    for impl in ("reference", "grouped"):
        out = experts(*low, impl=impl)
        assert out.dtype == torch.bfloat16
        assert (out.double() - expected).norm() < 0.01 * expected.norm()


def test_grouped_says_why_it_cannot() -> None:
    wide = cast(arguments(32, 4, 2, "even", False, 0), torch.float64)
    with pytest.raises(KernelError, match="float64"):
        experts(*wide, impl="grouped")
    weights = torch.randn(2, 5, 3), torch.randn(2, 3, 5)
    narrow = torch.randn(32, 3), torch.zeros(32, 1, dtype=torch.long), torch.ones(32, 1), *weights
    with pytest.raises(KernelError, match="16 bytes"):
        experts(*narrow, "relu", impl="grouped")
    assert_close(experts(*narrow, "relu2"), plainly(*narrow, "relu2", None, None))


def test_no_tokens() -> None:
    args = arguments(0, 4, 2, "even", True, 0)
    assert experts(*args).shape == (0, 8)


@pytest.mark.parametrize(("n_group", "topk_group", "top_k"), [(1, 1, 3), (4, 1, 2), (4, 3, 5), (8, 2, 2), (2, 2, 8)])
@pytest.mark.parametrize("norm", [True, False])
def test_router_is_the_references(n_group: int, topk_group: int, top_k: int, norm: bool) -> None:
    """Down to margins of 1e-4, in float32, with weights that carry no bias."""
    groups = {"n_group": n_group, "topk_group": topk_group}
    config = tiny_config(**groups, num_experts_per_tok=top_k, norm_topk_prob=norm, routed_scaling_factor=2.5)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator) for s in ((400, 16), (8, 16), (8,)))
    weight, bias = weight / 4, bias * 0.3
    # A zero input ties all scores: the bias alone decides, by as little as the margin.
    x[:2] = 0
    near = torch.linspace(0, 7 * MARGIN * 1.5, 8)
    for bias_E in (bias, near, bias - 3):  # the last: scores are negative, refused groups must stay below them
        routing = route(x, weight, bias_E, top_k, n_group, topk_group, norm, 2.5)
        compared = 0
        for m in range(len(x)):
            logits = (weight.double() @ x[m].double()).numpy()
            chosen, weights, margin = reference64.route(config, logits, bias_E.double().numpy(), top_k)
            if margin > MARGIN:
                order = np.argsort(chosen)
                assert routing.experts[m].tolist() == chosen[order].tolist()
                assert_close(routing.weights[m], weights[order])
                compared += 1
        assert compared > 300
        assert routing.weights.dtype == torch.float32


def test_router_is_float32_in_a_bfloat16_model() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*s, generator=generator).bfloat16() for s in ((64, 16), (8, 16)))
    low = route(x, weight, torch.zeros(8), 2)
    assert_close(low.logits, x.double() @ weight.double().T, bound=BOUND / 100)
    assert low.weights.dtype == torch.float32
    model = tiny_model().bfloat16()
    gate = model.model.layers[1].mixer.gate
    assert (gate.weight.dtype, gate.e_score_correction_bias.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(gate.e_score_correction_bias, tiny_model().model.layers[1].mixer.gate.e_score_correction_bias)


# The bias that balances the load.


def test_update_router_bias() -> None:
    """`bias += rate · sign(mean load - load)` over the real tokens since the last update; nothing else moves it."""
    model = tiny_model(hybrid_override_pattern="ME-E", n_group=1, num_nextn_predict_layers=1).train()
    gates = [model.model.layers[i].mixer.gate for i in (1, 3)] + [model.mtp.layers[1].mixer.gate]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]])
    chosen: list[list[Tensor]] = [[], [], []]
    for gate, seen in zip(gates, chosen, strict=True):
        gate.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.experts[args[1]]))
    for seed in range(2):
        ids = draw_ids(model, 3, 8, seed=seed)
        model(ids, attention_mask=mask, labels=ids, num_items_in_batch=1).loss.backward()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name}: a pass and its gradients move nothing"
    loads = [torch.bincount(torch.cat(seen).flatten(), minlength=8).double() for seen in chosen]
    assert [load.sum() for load in loads[:2]] == [2 * 2 * int(mask.sum())] * 2, "padding has no load"
    assert_close([gate.load_E for gate in gates], loads, "loads")
    model.update_router_bias(0.25)
    for i, (gate, counts) in enumerate(zip(gates, loads, strict=True)):
        moved = gate.e_score_correction_bias - before[[n for n in before if n.endswith("correction_bias")][i]]
        assert_close(moved, 0.25 * torch.sign(counts.mean() - counts), f"gate {i}", 1e-6)
        assert moved.max() > 0 > moved.min()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.endswith("correction_bias")), name
    after = [gate.e_score_correction_bias.clone() for gate in gates]
    model.update_router_bias()
    assert all(torch.equal(g.e_score_correction_bias, a) for g, a in zip(gates, after, strict=True)), "loads start anew"


def test_updates_even_out_the_load() -> None:
    """Scores favour two experts; after some hundred steps every expert has work."""
    model = tiny_model(hybrid_override_pattern="E", n_group=1).train()
    gate = model.model.layers[0].mixer.gate
    with torch.no_grad():
        gate.e_score_correction_bias.copy_(torch.tensor([2.0, 2.0] + [0.0] * 6))
    ids = draw_ids(model, 8, 16)

    def imbalance() -> float:
        gate.load_E = None
        model(ids, use_cache=False)
        return float(gate.load_E.max() / gate.load_E.mean())

    assert imbalance() > 3.5
    for _ in range(250):
        model(ids, use_cache=False)
        model.update_router_bias(0.01)
    assert imbalance() < 1.3


@torch.no_grad()
def test_evaluation_counts_no_load() -> None:
    model = tiny_model(hybrid_override_pattern="E")
    before = model.model.layers[0].mixer.gate.e_score_correction_bias.clone()
    model(draw_ids(model, 2, 8))
    model.update_router_bias()
    assert torch.equal(model.model.layers[0].mixer.gate.e_score_correction_bias, before)


def test_the_bias_of_a_frozen_router_stays() -> None:
    """As under an adapter: a step of training moves nothing of the base model."""
    model = tiny_model(hybrid_override_pattern="E").train()
    router = model.model.layers[0].mixer.gate
    before = router.e_score_correction_bias.clone()
    for frozen in (True, False):
        router.weight.requires_grad_(not frozen)
        model(draw_ids(model, 2, 12))
        assert router.load_E is not None
        model.update_router_bias(0.25)
        assert router.load_E is None
        assert torch.equal(router.e_score_correction_bias, before) is frozen
