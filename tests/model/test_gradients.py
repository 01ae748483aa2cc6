"""Gradients against finite differences, and along every route by which a training step may take them."""

from functools import partial

import pytest
import torch
from torch import Tensor

from helpers import BIASED, BOUND64, MARGIN, assert_close, draw_ids, draw_inputs, tiny_model
from nemotron_h import NemotronHForCausalLM
from nemotron_h.ops.activations import activation
from nemotron_h.ops.attention import attention
from nemotron_h.ops.causal_conv1d import causal_conv1d
from nemotron_h.ops.norm import gated_rms_norm, rms_norm
from nemotron_h.ops.router import route
from nemotron_h.ops.ssd import ssd, time_step

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # the name before v6
SEQ_IDX = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])


def leaves(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("seq_idx", [None, SEQ_IDX])
def test_ssd(chunk_size: int, seq_idx: Tensor | None) -> None:
    x, dt, A, B, C, D, state = leaves((1, 9, 4, 2), (1, 9, 4), (4,), (1, 9, 2, 3), (1, 9, 2, 3), (4,), (1, 4, 2, 3))

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(ssd(x, dt.exp(), -A.exp(), B, C, D, chunk_size, state, seq_idx))  # type: ignore[return-value]

    assert torch.autograd.gradcheck(scan, (x, dt, A, B, C, D, state))


def test_ssd_step() -> None:
    x, dt, A, B, C, D, state = leaves((2, 1, 4, 2), (2, 1, 4), (4,), (2, 1, 2, 3), (2, 1, 2, 3), (4,), (2, 4, 2, 3))
    assert torch.autograd.gradcheck(lambda *args: tuple(ssd(*args[:6], 8, args[6])), (x, dt, A, B, C, D, state))


def test_ssd_gradients_are_finite_where_everything_decays() -> None:
    """exp(-inf) above the diagonal must not become nan on the way back."""
    x, B, C, D = leaves((1, 9, 2, 2), (1, 9, 1, 3), (1, 9, 1, 3), (2,))
    dt, A = torch.full((1, 9, 2), 900.0, requires_grad=True), torch.tensor([-5.0, -1e-9], requires_grad=True)
    ssd(x.float(), dt, A, B.float(), C.float(), D.float(), 4, None, SEQ_IDX).output.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, dt, A, B, C, D))


def test_time_step() -> None:
    dt, bias = leaves((1, 5, 3), (3,))
    assert torch.autograd.gradcheck(lambda dt, bias: time_step(dt * 9, bias, (0.0, float("inf"))), (dt, bias))
    steps = time_step(dt, bias, (0.3, 0.9))
    inside = (steps > 0.3) & (steps < 0.9)
    assert 0 < inside.sum() < steps.numel()
    assert torch.equal(torch.autograd.grad(steps.sum(), dt)[0] != 0, inside), "a limited step has no gradient"


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("seq_idx", [None, SEQ_IDX])
@pytest.mark.parametrize("lengths", [None, torch.tensor([7])])
def test_conv(taps: int, seq_idx: Tensor | None, lengths: Tensor | None) -> None:
    x, weight, bias, window = leaves((1, 9, 3), (3, taps), (3,), (1, 3, taps - 1))

    def conv(*args: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, bias, window = args
        return tuple(causal_conv1d(x, weight, bias, "silu", window, lengths, seq_idx))  # type: ignore[return-value]

    assert torch.autograd.gradcheck(conv, (x, weight, bias, window))


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("norm", [True, False])
def test_router_weights(groups: tuple[int, int], norm: bool) -> None:
    x, weight = leaves((5, 6), (8, 6))
    bias = leaves((8,))[0].detach() * 0.1
    call = partial(route, top_k=3, n_group=groups[0], topk_group=groups[1], norm_topk_prob=norm, scaling_factor=2.5)
    chosen, _, logits = call(x, weight, bias)
    refused = torch.ones_like(logits, dtype=torch.bool).scatter(1, chosen, False)
    scores = (logits.sigmoid() + bias).detach()
    gap = (scores.gather(1, chosen).min(1).values[:, None] - scores.masked_fill(~refused, -9)).abs().min()
    assert gap > MARGIN, "away from ties, which have no derivative"
    assert torch.autograd.gradcheck(lambda x, w: call(x, w, bias)[1:], (x, weight))


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_attention(weights: bool, causal: bool) -> None:
    q, k, v = leaves((1, 5, 4, 3), (1, 2, 5, 3), (1, 2, 5, 3))
    visible = None if causal else torch.eye(5, dtype=torch.bool)[None, None] | (torch.rand(1, 1, 5, 5) > 0.5)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, visible, causal, return_weights=weights).output

    assert torch.autograd.gradcheck(call, (q, k, v))


@pytest.mark.parametrize(("tokens", "past"), [(1, 40), (5, 3), (300, 0), (300, 77), (600, 300)])
@pytest.mark.parametrize("window", [None, 1, 30, 2000])
def test_attention_behind_a_past(tokens: int, past: int, window: int | None) -> None:
    """Values and gradients are those of a mask that says the same, in every form."""
    slots = past + tokens
    q, k, v = leaves((2, tokens, 4, 3), (2, 2, slots, 3), (2, 2, slots, 3))
    age = torch.arange(past, slots)[:, None] - torch.arange(slots)
    visible = (age >= 0) & (age < (window or slots))
    place = {"causal": True, "past": past, "window": window}
    plain = attention(q, k, v, visible, return_weights=True)
    shown = attention(q, k, v, **place, return_weights=True)
    assert torch.equal(shown.output, plain.output)
    assert torch.equal(shown.weights, plain.weights)
    ours = attention(q, k, v, **place).output
    assert_close(ours, plain.output, "values", BOUND64)
    for a, b in zip(*(torch.autograd.grad(y.pow(3).sum(), (q, k, v)) for y in (ours, plain.output)), strict=True):
        assert_close(a, b, "gradients", BOUND64)


def test_attention_behind_a_past_compiled() -> None:
    """One graph for all lengths, no mask known beforehand."""
    q, k, v = leaves((1, 20, 4, 3), (1, 2, 70, 3), (1, 2, 70, 3))

    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def call(q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
        return attention(q, k, v, causal=True, past=past, window=9).output

    for slots in (70, 53, 41):
        expected = attention(q, k[:, :, :slots], v[:, :, :slots], causal=True, past=slots - 20, window=9).output
        assert_close(call(q, k[:, :, :slots], v[:, :, :slots], slots - 20), expected, bound=BOUND64)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("slots", [300, 513, 700])
def test_attention_in_blocks_of_queries(rows: int, slots: int) -> None:
    """Any mask, shared by the rows or not, spans that end anywhere: values and gradients of the plain form."""
    q, k, v = leaves((2, 300, 4, 3), (2, 2, slots, 3), (2, 2, slots, 3))
    generator = torch.Generator().manual_seed(slots)
    first = torch.randint(0, slots, (rows, 1, 300, 1), generator=generator).sort(2).values
    slot = torch.arange(slots)
    visible = (slot == first) | (slot > first - 30) & (slot < first) & (torch.rand(slots, generator=generator) > 0.3)
    ours, plain = (attention(q, k, v, visible, return_weights=w).output for w in (False, True))
    assert_close(ours, plain, "values", BOUND64)
    for a, b in zip(*(torch.autograd.grad(y.pow(3).sum(), (q, k, v)) for y in (ours, plain)), strict=True):
        assert_close(a, b, "gradients", BOUND64)


def test_norms() -> None:
    x, z, weight = leaves((2, 3, 8), (2, 3, 8), (8,))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(lambda y, z, w: gated_rms_norm(y, z, w, 1e-5, 4), (x, z, weight))


@pytest.mark.parametrize("name", ["relu2", "silu", "gelu_new", "mish", "identity"])
def test_activations(name: str) -> None:
    assert torch.autograd.gradcheck(activation(name), leaves((7,)))


# The whole model.


def gradients(model: NemotronHForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = BOUND64) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], name, bound)


def test_loss_by_finite_differences() -> None:
    """One direction in each parameter: the four block types, the MTP head and all losses together."""
    model = tiny_model(
        hybrid_override_pattern="ME*-", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E", mtp_loss_coef=0.3,
        router_aux_loss_coef=0.1, router_z_loss_coef=0.01, tie_word_embeddings=True, **BIASED,
    ).double()  # fmt: skip
    row, _ = draw_inputs(model, 9, mtp_depths=2)
    ids = row[None]
    grads = gradients(model, model(ids, labels=ids).loss)
    assert len(grads) == len(list(model.parameters()))
    step = 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                losses.append(model(ids, labels=ids).loss.item())
                parameter.sub_(sign * step * direction)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx((grads[name] * direction).sum().item(), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("sizes", [[4, 5], [1, 1, 7], [8, 1], [3, 3, 1, 1, 1]])
@pytest.mark.parametrize("trained", ["", "q_proj", "dt_bias", "experts"])
def test_through_the_cache(sizes: list[int], trained: str) -> None:
    """Passing the tokens in pieces must not cut the graph between the pieces, nor overwrite what it holds."""
    model = tiny_model(**BIASED).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    ids = draw_ids(model, 2, 9)
    full = model(ids)
    weights = torch.randn(full.logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = gradients(model, (full.logits * weights).sum() / 100)
    kept, logits = None, []
    for piece in ids.split(sizes, dim=1):
        out = model(piece, past_key_values=kept, use_cache=True)
        kept = out.past_key_values
        logits.append(out.logits)
    assert_same(gradients(model, (torch.cat(logits, dim=1) * weights).sum() / 100), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mask", [None, torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 0]])])
def test_gradient_checkpointing(use_reentrant: bool, mask: Tensor | None) -> None:
    model = (
        tiny_model(num_nextn_predict_layers=1, mtp_loss_coef=0.3, router_aux_loss_coef=0.1, **BIASED).double().train()
    )
    ids = draw_ids(model, 2, 7)
    plain = model(ids, attention_mask=mask, labels=ids)
    expected = gradients(model, plain.loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    out = model(ids, attention_mask=mask, labels=ids, use_cache=True)
    assert out.past_key_values is None
    assert_close(out.loss, plain.loss, "loss", BOUND64)
    assert_same(gradients(model, out.loss), expected)


@pytest.mark.parametrize("name", ["hidden_states", "router_logits", "attentions", "ssm_states"])
def test_inner_tensors_carry_gradients(name: str) -> None:
    """A loss of one's own on what the model shows reaches the embeddings, also under gradient checkpointing."""
    model = tiny_model().double().train()
    ids = draw_ids(model, 1, 6)
    found = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        out = model(ids, **{f"output_{name}": True})
        found.append(gradients(model, getattr(out, name)[-1].pow(3).sum()))
        assert found[-1]["model.embeddings.weight"].abs().max() > 1e-6
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
