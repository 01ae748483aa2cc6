"""Named points of the mixers: what hooks on them see, and what they change.

B batch · T tokens · D hidden size · I = H·P · H Mamba heads · P head size · G groups · N state size · C conv channels ·
M tokens of all rows · E experts · k experts per token.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inside_cases import MASK_BT, rows_of, scanned
from torch import Tensor
from torch._dynamo import reset as forget_compiled

import reference64
from helpers import BOUND64, assert_close, draw_ids, draw_inputs, hub_tensors, tiny_model
from nemotron_h import NemotronHForCausalLM, NemotronHHybridDynamicCache, inspection
from nemotron_h.errors import InputError
from nemotron_h.points import NemotronHPoint

MAMBA = ("z", "x", "B", "C", "dt", "y", "state")
MOE = ("router_experts", "router_weights")
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # the name before v6
DOCS = Path(__file__).parents[2] / "docs" / "looking_inside.md"
Change = Callable[[Tensor], Tensor]


def point(model: NemotronHForCausalLM, name: str) -> NemotronHPoint:
    """The first point of that name in the trunk."""
    return next(iter(inspection.points(model, f"model.layers.*.hook_{name}").values()))


def put(model: NemotronHForCausalLM, name: str, change: Change) -> Any:
    return point(model, name).register_forward_hook(lambda _, args, value: change(value))


# Names


def test_names() -> None:
    model = tiny_model(num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
    expected = [
        f"{prefix}.mixer.hook_{name}"
        for prefix, names in (
            ("model.layers.0", MAMBA), ("model.layers.1", MOE), ("model.layers.4", MAMBA), ("mtp.layers.1", MOE)
        )
        for name in names
    ]  # fmt: skip
    assert list(inspection.points(model)) == expected
    assert list(inspection.points(model, "*.hook_dt", "mtp.*")) == [n for n in expected if "_dt" in n or "mtp" in n]


def test_every_name_is_documented() -> None:
    table = re.findall(r"^\| `mixer\.hook_(\w+)`", DOCS.read_text(), re.MULTILINE)
    assert sorted(table) == sorted({*MAMBA, *MOE})


def test_they_hold_nothing() -> None:
    model = tiny_model()
    modules = inspection.points(model).values()
    assert not any([*m.parameters(), *m.buffers(), *m.children()] for m in modules)
    assert not any("hook" in name for name in model.state_dict())
    assert not any("hook" in name for name, _ in hub_tensors(model).items())


@pytest.mark.parametrize("pattern", ["*.hook_dtt", "model.layers.2.*", ""])
def test_a_pattern_without_a_point(pattern: str) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match=r"hook_z, .*hook_router_weights.*'model\.layers\.0\.mixer\.hook_z'"):
        inspection.points(model, "*.hook_z", pattern)
    with pytest.raises(InputError, match="none"):
        inspection.points(model.model.layers[2])


def test_hooked() -> None:
    dt = point(tiny_model(), "dt")
    registrations = (
        dt.register_forward_hook, dt.register_forward_pre_hook, dt.register_full_backward_hook,
        dt.register_full_backward_pre_hook,
    )  # fmt: skip
    for register in registrations:
        handle = register(lambda *_: None)
        assert inspection.hooked(dt)
        handle.remove()
        assert not inspection.hooked(dt)
    assert inspection.hooked(torch.nn.Identity()), "somebody put another module there"


# What they show


def test_values_of_a_mamba_block() -> None:
    model = tiny_model(time_step_limit=(0.0, float("inf"))).double()
    ids_T = draw_ids(model, 13)
    with inspection.record(model, "model.layers.0.*") as seen:
        model(ids_T[None])
    for name, expected in scanned(model, ids_T).items():
        (value,) = seen[f"model.layers.0.mixer.hook_{name}"]
        assert_close(value[0], expected, name, BOUND64)


@torch.no_grad()
def test_padded_rows_show_their_tokens_where_they_stand() -> None:
    """Of tokens in any padding a hook sees what it sees of the row alone; of padding steps of length zero."""
    model = tiny_model().double()
    ids_BT, alone = rows_of(model)
    with inspection.record(model) as padded:
        model(ids_BT, attention_mask=MASK_BT)
    for row, (ids_1T, valid_T) in enumerate(zip(alone, MASK_BT.bool(), strict=True)):
        with inspection.record(model) as single:
            model(ids_1T)
        for name, (value,) in padded.items():
            shown = value[row] if name.endswith("state") else value[row, valid_T]
            assert_close(shown, single[name][0][0], f"{name}, row {row}", BOUND64)
    assert not padded["model.layers.0.mixer.hook_dt"][0][~MASK_BT.bool()].any()


def test_values_of_a_router() -> None:
    model = tiny_model(routed_scaling_factor=2.5)
    ids_T, reference = draw_inputs(model, 11)
    with inspection.record(model, "*.hook_router_*") as seen:
        model(torch.stack([ids_T, ids_T]))
    experts, weights = (seen[f"model.layers.1.mixer.hook_{name}"][0] for name in MOE)
    assert experts.shape == weights.shape == (2, 11, 2)
    scores = reference64.sigmoid(reference.router_logits[0])
    chosen = np.take_along_axis(scores, experts[1].numpy(), axis=-1)
    assert_close(weights[1], 2.5 * chosen / chosen.sum(-1, keepdims=True))
    assert (experts.diff(dim=-1) > 0).all()


@torch.no_grad()
def test_cached_passes_show_the_parts_of_the_whole() -> None:
    model = tiny_model().double()
    ids_BT = draw_ids(model, 2, 9)
    with inspection.record(model) as whole:
        model(ids_BT)
    cache = NemotronHHybridDynamicCache(model.config)
    with inspection.record(model) as parts:
        for part_BT in ids_BT.split([4, 1, 1, 3], dim=1):
            model(part_BT, past_key_values=cache)
    for name, (value,) in whole.items():
        assert len(parts[name]) == 4
        joined = parts[name][-1] if name.endswith("state") else torch.cat(parts[name], dim=1)
        assert_close(joined, value, name, BOUND64)


def test_mtp_heads_have_points_too() -> None:
    model = tiny_model(num_nextn_predict_layers=1, mtp_hybrid_override_pattern="ME")
    with inspection.record(model, "mtp.*") as seen:
        model(draw_ids(model, 2, 9), output_mtp_logits=2)
    assert [dt.shape[1] for dt in seen["mtp.layers.0.mixer.hook_dt"]] == [8, 7]
    assert [weights.shape for weights in seen["mtp.layers.1.mixer.hook_router_weights"]] == [(2, 8, 2), (2, 7, 2)]


# Hooks that only read, and hooks that change


@torch.no_grad()
@pytest.mark.parametrize("mask_BT", [None, MASK_BT])
def test_reading_changes_no_bit(mask_BT: Tensor | None) -> None:
    model = tiny_model()
    ids_BT = draw_ids(model, 3, 9)
    before = model(ids_BT, attention_mask=mask_BT, use_cache=True)
    with inspection.record(model):
        read = model(ids_BT, attention_mask=mask_BT, use_cache=True)
    assert torch.equal(read.logits, before.logits)
    for a, b in zip(read.past_key_values.ssm_states, before.past_key_values.ssm_states, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("name", ["x", "B", "C", "dt"])
@pytest.mark.parametrize("mask_BT", [None, MASK_BT])
def test_the_scan_takes_what_a_hook_returns(name: str, mask_BT: Tensor | None) -> None:
    model = tiny_model(hybrid_override_pattern="M").double()
    ids_BT = draw_ids(model, 3, 9)
    before = model(ids_BT, attention_mask=mask_BT).logits
    put(model, name, lambda value: 0.5 * value)
    with inspection.record(model) as seen:
        after = model(ids_BT, attention_mask=mask_BT).logits
    assert not torch.allclose(after, before)
    mixer = model.model.layers[0].mixer
    A_H, D_H = -np.exp(mixer.A_log.numpy()), mixer.D.numpy()
    x, dt, B, C, y, state = (seen[f"model.layers.0.mixer.hook_{n}"][0] for n in ("x", "dt", "B", "C", "y", "state"))
    valid_BT = torch.ones(3, 9, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    for row, valid_T in enumerate(valid_BT):
        inputs = (t[row, valid_T].numpy() for t in (x, dt, B, C))
        x_THP, dt_TH, B_TGN, C_TGN = inputs
        y_THP, state_HPN = reference64.ssm_recurrence(x_THP, dt_TH, A_H, B_TGN, C_TGN, D_H)
        assert_close(y[row, valid_T], y_THP, "y", BOUND64)
        assert_close(state[row], state_HPN, "state", BOUND64)


def arguments_of(module: torch.nn.Module) -> list[tuple[Tensor, ...]]:
    calls: list[tuple[Tensor, ...]] = []
    module.register_forward_pre_hook(lambda _, args: calls.append(args))
    return calls


@torch.no_grad()
def test_gate_and_output_of_the_scan_can_be_replaced() -> None:
    model = tiny_model()
    norm = arguments_of(model.model.layers[0].mixer.norm)
    put(model, "z", lambda z: torch.full_like(z, 3.0))
    put(model, "y", lambda y: torch.full_like(y, 5.0))
    model(draw_ids(model, 2, 4))
    y_BTI, z_BTI = norm[0]
    assert y_BTI.shape == z_BTI.shape
    assert (y_BTI == 5.0).all()
    assert (z_BTI == 3.0).all()


@torch.no_grad()
def test_a_head_can_be_switched_off() -> None:
    """Without its channels in `out_proj` a model is the model whose head gives zeros, up to the shared norm."""
    model = tiny_model(mamba_n_groups=6)  # a group, and so a norm, for each head
    ids_BT = draw_ids(model, 2, 7)
    handle = put(model, "y", lambda y: y * (torch.arange(6) != 2)[:, None])
    hooked = model(ids_BT).logits
    handle.remove()
    model.model.layers[0].mixer.out_proj.weight[:, 16:24] = 0
    assert_close(hooked, model(ids_BT).logits)


@torch.no_grad()
def test_a_replaced_state_is_what_the_next_pass_starts_from() -> None:
    model = tiny_model(hybrid_override_pattern="M-M")
    ids_BT = draw_ids(model, 2, 6)
    mine = torch.randn(2, 6, 8, 16)
    handle = put(model, "state", lambda _: mine)
    out = model(ids_BT[:, :5], use_cache=True, output_ssm_states=True)
    handle.remove()
    assert torch.equal(out.past_key_values.ssm_states[0], mine)
    assert torch.equal(out.ssm_states[0], mine)
    again = model(ids_BT[:, :5], use_cache=True).past_key_values
    again.layers[0].recurrent_states = mine
    expected, found = (model(ids_BT[:, 5:], past_key_values=cache).logits for cache in (again, out.past_key_values))
    assert torch.equal(found, expected)


@torch.no_grad()
def test_routing_can_be_replaced() -> None:
    model = tiny_model()
    ids_BT = draw_ids(model, 2, 5)
    called = arguments_of(model.model.layers[1].mixer.experts)
    put(model, "router_experts", lambda experts: torch.tensor([0, 7]).expand_as(experts))
    put(model, "router_weights", lambda weights: weights.new_tensor([0.25, 0.5]).expand_as(weights))
    model(ids_BT)
    _, experts_Mk, weights_Mk = called[0]
    assert experts_Mk.tolist() == [[0, 7]] * 10
    assert weights_Mk.tolist() == [[0.25, 0.5]] * 10


@torch.no_grad()
@pytest.mark.parametrize("name", ["x", "B", "C", "dt", "z", "y", "router_weights"])
def test_a_changed_padded_row_is_the_changed_row_alone(name: str) -> None:
    """Also where the hook writes something into padding."""
    model = tiny_model().double()
    ids_BT, alone = rows_of(model)
    put(model, name, lambda value: 0.5 * value + 0.3)
    out = model(ids_BT, attention_mask=MASK_BT, use_cache=True, output_ssm_states=True)
    for row, ids_1T in enumerate(alone):
        single = model(ids_1T, output_ssm_states=True)
        assert_close(out.logits[row, MASK_BT[row].bool()], single.logits[0], f"row {row}", BOUND64)
        assert_close([s[row] for s in out.ssm_states], [s[0] for s in single.ssm_states], f"row {row}", BOUND64)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["x", "B", "C", "dt", "z", "y", "router_weights"])
def test_gradients_of_and_through_a_point(name: str, checkpointing: bool) -> None:
    """Against central differences along a random direction; the parameters in front of the point get theirs too."""
    model = tiny_model(hybrid_override_pattern="MEM").double().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids_T, _ = draw_inputs(model, 9)
    ids_BT = torch.stack([ids_T, ids_T.flip(0)])
    mask_BT = MASK_BT[1:]
    with torch.no_grad(), inspection.record(model, f"*.hook_{name}") as seen:
        model(ids_BT, attention_mask=mask_BT)
    direction = torch.randn(next(iter(seen.values()))[0].shape, dtype=torch.float64)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    put(model, name, lambda value: value + scale * direction)

    def loss() -> Tensor:
        return model(ids_BT, attention_mask=mask_BT, labels=ids_BT).loss

    loss().backward()
    assert model.model.embeddings.weight.grad is not None
    losses = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            scale.fill_(step)
            losses.append(loss())
    assert scale.grad is not None
    assert scale.grad != 0
    assert_close(1e3 * scale.grad, 1e3 * (losses[0] - losses[1]) / 2e-6, bound=1e-6)


def test_reading_under_checkpointing_changes_no_gradient() -> None:
    model = tiny_model().train()
    ids_BT = draw_ids(model, 2, 9)
    model(ids_BT, labels=ids_BT).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    with inspection.record(model) as seen:
        model(ids_BT, labels=ids_BT).loss.backward()
    for name, values in seen.items():
        assert len(values) == 2, name  # backward computed the block again
        assert torch.equal(values[0], values[1])
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_close(parameter.grad, expected[name], name, 1e-6)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    forget_compiled()
    yield
    forget_compiled()


@pytest.mark.usefixtures("_fresh_compiler")
@torch.no_grad()
@pytest.mark.parametrize("mask_BT", [None, MASK_BT])
def test_compiled(mask_BT: Tensor | None) -> None:
    model = tiny_model()
    ids_BT = draw_ids(model, 3, 9)
    put(model, "dt", lambda dt: 0.5 * dt)
    with inspection.record(model) as seen:
        expected = model(ids_BT, attention_mask=mask_BT, use_cache=False).logits
    with inspection.record(model) as traced:
        compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
        found = compiled(ids_BT, attention_mask=mask_BT, use_cache=False).logits
    real = slice(None) if mask_BT is None else mask_BT.bool()
    assert_close(found[real], expected[real])
    for name, (value,) in traced.items():
        assert_close(value.float(), seen[name][0].float(), name)


# The recorder


def test_recorder_leaves_nothing_behind() -> None:
    model = tiny_model()
    seen: dict[str, list[Tensor]] = {}

    def interrupted() -> None:
        nonlocal seen
        with inspection.record(model) as seen:
            assert all(map(inspection.hooked, inspection.points(model).values()))
            model(draw_ids(model, 1, 3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert not any(map(inspection.hooked, inspection.points(model).values()))
    model(draw_ids(model, 1, 3))
    assert {len(values) for values in seen.values()} == {1}
    with pytest.raises(InputError), inspection.record(model, "*.hook_dt", "*.nothing"):
        pass
    assert not any(map(inspection.hooked, inspection.points(model).values()))


def test_recorder_detaches_unless_told_otherwise() -> None:
    model = tiny_model()
    ids_BT = draw_ids(model, 1, 5)
    name = "model.layers.0.mixer.hook_dt"
    with inspection.record(model, name) as seen:
        model(ids_BT)
    assert not seen[name][0].requires_grad
    with inspection.record(model, name, detach=False) as seen:
        loss = model(ids_BT, labels=ids_BT).loss
    (gradient,) = torch.autograd.grad(loss, seen[name][0])
    assert gradient.any()


def test_recorder_takes_parts_of_a_model() -> None:
    model = tiny_model()
    for part, name in ((model.model, "layers.0.mixer.hook_z"), (model.model.layers[0].mixer, "hook_z")):
        with inspection.record(part, "*hook_z") as seen:
            model(draw_ids(model, 1, 3))
        assert name in seen
        assert len(seen[name]) == 1
