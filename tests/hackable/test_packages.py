"""The optional CUDA packages: which calls go to them, with which arguments, and that the results are the references'.

Nothing here ran on hardware. Stand-ins take the packages' place; they have the packages' signatures and refuse what the
packages refuse. Tensors stay on the CPU; where the choice counts they say of themselves that they are on CUDA.

On `dt_limit`: the packages can apply bias, softplus and limits to dt themselves. Ours arrives finished (`time_step`)
and is zero at padding, so they must leave it alone: no bias, softplus off, limits (0, inf). Handing `time_step_limit`
over as well would change nothing at real tokens, but would lift the zeros at padding to its lower bound.
"""

from typing import Any

import pytest
import torch
from stand_ins import Calls, install, mamba_chunk_scan_combined
from torch import Tensor

from helpers import assert_close, draw_ids, tiny_model
from nemotron_h.ops.causal_conv1d import causal_conv1d
from nemotron_h.ops.causal_conv1d import cuda as conv_cuda
from nemotron_h.ops.causal_conv1d import reference as conv_reference
from nemotron_h.ops.ssd import cuda as ssd_cuda
from nemotron_h.ops.ssd import reference as ssd_reference
from nemotron_h.ops.ssd import ssd, time_step

# B batch · T tokens · H heads · P head size · G groups · N state size · C channels · K taps
B, T, H, P, G, N, C, K = 2, 11, 6, 8, 2, 16, 24, 4
MAMBA: dict[str, Any] = {"hybrid_override_pattern": "MM", "mamba_num_heads": 8}
SEQ_IDX_BT = torch.tensor([[0] * 4 + [1] * 2 + [3] * 5, [0] * 11])
LIMITS = [(0.0, float("inf")), (0.001, 0.1)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return install(monkeypatch)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def scan_arguments(tokens: int, limit: tuple[float, float] = LIMITS[0], padding: int = 0) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D; the last `padding` tokens have dt = 0."""
    dt_BTH = time_step(draw(B, tokens, H) - 3, draw(H), limit)
    dt_BTH[:, tokens - padding :] = 0
    projections = draw(B, tokens, G, N), draw(B, tokens, G, N, seed=1)
    return draw(B, tokens, H, P), dt_BTH, -draw(H, seed=1).exp(), *projections, draw(H, seed=2)


# The state space


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("state", [None, draw(B, H, P, N)], ids=["zero", "given"])
@pytest.mark.parametrize("seq_idx", [None, SEQ_IDX_BT], ids=["one", "packed"])
def test_scan(calls: Calls, state: Tensor | None, seq_idx: Tensor | None, limit: tuple[float, float]) -> None:
    arguments = scan_arguments(T, limit, padding=2)
    found = ssd_cuda.ssd(*arguments, 4, state, seq_idx)
    assert_close(found, ssd_reference.chunk_scan(*arguments, 4, state, seq_idx))
    ((name, given),) = calls
    assert name == "mamba_chunk_scan_combined"
    assert given["dt_limit"] == (0.0, float("inf"))
    assert given["dt_softplus"] is False
    assert given["dt_bias"] is None
    assert given["return_final_states"] is True
    assert given["initial_states"] is state
    assert (given["seq_idx"] is None) == (seq_idx is None)


def test_handing_over_the_limits_would_be_wrong() -> None:
    """What the module says of `dt_limit`, shown: with limits or softplus applied again, padding moves the state."""
    *arguments, D_H = scan_arguments(T, LIMITS[1], padding=2)
    _, expected = ssd_reference.chunk_scan(*arguments, D_H, 4, None, None)

    def final_state(**kwargs: Any) -> Tensor:
        return mamba_chunk_scan_combined(*arguments, 4, D=D_H, return_final_states=True, **kwargs)[1]

    assert_close(final_state(), expected)
    for wrong in ({"dt_limit": LIMITS[1]}, {"dt_softplus": True}):
        assert (final_state(**wrong) - expected).abs().max() > 1e-3


def test_one_token_from_a_state(calls: Calls) -> None:
    arguments, state_BHPN = scan_arguments(1), draw(B, H, P, N)
    kept = state_BHPN.clone()
    found = ssd_cuda.ssd(*arguments, 4, state_BHPN, None)
    assert_close(found, ssd_reference.step(*arguments, state_BHPN))
    assert torch.equal(state_BHPN, kept)  # the package writes into its argument: an interrupted pass must not see that
    ((name, given),) = calls
    assert name == "selective_state_update"
    assert given["dt_softplus"] is False
    assert not given["dt_bias"].any()  # it cannot do without one


def test_one_token_without_a_state(calls: Calls) -> None:
    arguments = scan_arguments(1)
    assert_close(ssd_cuda.ssd(*arguments, 4, None, None), ssd_reference.step(*arguments, None))
    assert calls.names() == ["mamba_chunk_scan_combined"]


# The convolution


def conv_arguments(tokens: int, width: int = C) -> tuple[Tensor, Tensor, Tensor, str]:
    """x as it comes in a model: a part of a wider projection."""
    x_BTC = draw(B, tokens, width + 13)[..., 8 : 8 + C]
    return x_BTC, draw(C, K), draw(C), "silu"


WINDOW_BCK = draw(B, C, K - 1)  # contiguous, as after one-token steps
CHANNEL_LAST = draw(B, K - 1, C).transpose(1, 2)  # as after a longer pass


@pytest.mark.parametrize("tokens", [1, 2, T])
@pytest.mark.parametrize("window", [None, WINDOW_BCK, CHANNEL_LAST], ids=["none", "contiguous", "channel last"])
def test_convolution(calls: Calls, tokens: int, window: Tensor | None) -> None:
    x_BTC, *rest = conv_arguments(tokens)
    kept = None if window is None else window.clone()
    found = conv_cuda.causal_conv1d(x_BTC, *rest, window, None)
    assert_close(found, conv_reference.causal_conv1d(x_BTC, *rest, window, None, None))
    assert window is None or torch.equal(window, kept)
    one = tokens == 1 and window is not None
    assert calls.names() == ["causal_conv1d_update" if one else "causal_conv1d_fn"]
    if not one:
        assert calls[0][1]["activation"] == "silu"
        assert calls[0][1]["return_final_states"] is True


@pytest.mark.parametrize("tokens", [2, T])
def test_convolution_of_packed_documents(calls: Calls, tokens: int) -> None:
    """The package then returns no window: it is cut from the inputs."""
    x_BTC, *rest = conv_arguments(tokens)
    seq_idx_BT = SEQ_IDX_BT[:, 4 : 4 + tokens] if tokens < T else SEQ_IDX_BT
    found = conv_cuda.causal_conv1d(x_BTC, *rest, None, seq_idx_BT)
    assert_close(found, conv_reference.causal_conv1d(x_BTC, *rest, None, None, seq_idx_BT))
    ((name, given),) = calls
    assert name == "causal_conv1d_fn"
    assert given["seq_idx"].tolist() == seq_idx_BT.tolist()


def test_convolution_of_unaligned_rows(calls: Calls) -> None:
    """The kernel wants strides in multiples of 8; a projection may have any width."""
    for width in (C, C + 3, C + 8):
        x_BTC, *rest = conv_arguments(T, width)
        expected = conv_reference.causal_conv1d(x_BTC, *rest, None, None, None)
        assert_close(conv_cuda.causal_conv1d(x_BTC, *rest, None, None), expected)


# The whole model


@pytest.fixture
def _on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor says so, and computes where it is."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


CONV, SCAN = "causal_conv1d_fn", "mamba_chunk_scan_combined"
CONV_ONE, SCAN_ONE = "causal_conv1d_update", "selective_state_update"


@pytest.mark.usefixtures("_on_cuda")
@torch.no_grad()
@pytest.mark.parametrize("limit", LIMITS)
def test_model_on_the_packages(calls: Calls, limit: tuple[float, float]) -> None:
    model, own = (tiny_model(**MAMBA, mamba_dt_limit=limit, use_mamba_kernels=use) for use in (True, False))
    ids_BT = draw_ids(model, 2, 9)
    expected = own(ids_BT, use_cache=False).logits
    assert not calls
    out = model(ids_BT[:, :4], use_cache=True)
    logits = [out.logits]
    for part_BT in (ids_BT[:, 4:5], ids_BT[:, 5:6], ids_BT[:, 6:]):  # one token, one token, several again
        out = model(part_BT, past_key_values=out.past_key_values)
        logits.append(out.logits)
    assert_close(torch.cat(logits, dim=1), expected)
    assert calls.names() == 2 * [CONV, SCAN] + 4 * [CONV_ONE, SCAN_ONE] + 2 * [CONV, SCAN]


@pytest.mark.usefixtures("_on_cuda")
@torch.no_grad()
def test_packed_documents_on_the_packages(calls: Calls) -> None:
    model, own = (tiny_model(**MAMBA, use_mamba_kernels=use) for use in (True, False))
    ids_BT, seq_idx_BT = draw_ids(model, 2, T), SEQ_IDX_BT
    assert_close(model(ids_BT, seq_idx=seq_idx_BT).logits, own(ids_BT, seq_idx=seq_idx_BT).logits)
    assert calls.names() == 2 * [CONV, SCAN]


@pytest.mark.usefixtures("_on_cuda")
@torch.no_grad()
@pytest.mark.parametrize("limit", LIMITS)
def test_padded_rows(calls: Calls, limit: tuple[float, float]) -> None:
    """The convolution stays, since the package knows no padding; the scan goes, padding has dt = 0."""
    model, own = (tiny_model(**MAMBA, mamba_dt_limit=limit, use_mamba_kernels=use) for use in (True, False))
    ids_BT, mask_BT = draw_ids(model, 2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    outs = [each(ids_BT, attention_mask=mask_BT, use_cache=True) for each in (model, own)]
    assert_close(outs[0].logits[mask_BT.bool()], outs[1].logits[mask_BT.bool()])
    assert_close(outs[0].past_key_values.ssm_states, outs[1].past_key_values.ssm_states)
    assert calls.names() == 2 * [SCAN]


@pytest.mark.usefixtures("_on_cuda")
def test_training_on_the_packages(calls: Calls) -> None:
    model, own = (tiny_model(**MAMBA, use_mamba_kernels=use).train() for use in (True, False))
    ids_BT = draw_ids(model, 2, 9)
    for each in (model, own):
        each(ids_BT, labels=ids_BT).loss.backward()
    assert calls.names() == 2 * [CONV, SCAN]
    for (name, parameter), expected in zip(model.named_parameters(), own.parameters(), strict=True):
        assert_close(parameter.grad, expected.grad, name)


# Which calls go there


def prefill_and_step(**config: Any) -> None:
    model = tiny_model(**(MAMBA | config))
    ids_BT = draw_ids(model, 2, 6)
    with torch.no_grad():
        out = model(ids_BT[:, :5], use_cache=True)
        model(ids_BT[:, 5:], past_key_values=out.past_key_values)


def test_cpu_tensors_never_do(calls: Calls) -> None:
    model = tiny_model(**MAMBA)
    assert model.config.use_mamba_kernels
    prefill_and_step()
    model(draw_ids(model, 2, 5), labels=draw_ids(model, 2, 5)).loss.backward()
    assert not calls


@pytest.mark.usefixtures("_on_cuda")
def test_not_with_use_mamba_kernels_false(calls: Calls) -> None:
    prefill_and_step()
    assert calls
    calls.clear()
    prefill_and_step(use_mamba_kernels=False)
    assert not calls


@pytest.mark.usefixtures("_on_cuda")
def test_not_when_they_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ssd_cuda, conv_cuda):
        monkeypatch.setattr(module, "find_spec", lambda _: None)
        monkeypatch.setattr(module, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    prefill_and_step()


@pytest.mark.usefixtures("_on_cuda")
@pytest.mark.parametrize(
    "config",
    [{"mamba_hidden_act": "gelu"}, {"mamba_d_conv": 1}, {"mamba_d_conv": 5}, {"ssm_state_size": 9}],
    ids=str,
)
def test_convolutions_that_the_package_lacks_stay(calls: Calls, config: dict[str, Any]) -> None:
    """It has silu, 2 to 4 taps, and channels in multiples of 8."""
    prefill_and_step(**config)
    assert calls.names() == 2 * [SCAN] + 2 * [SCAN_ONE]


def conv(tokens: int, state: bool = False, dtype: torch.dtype = torch.float32, grad: bool = False, **more: Any) -> Any:
    x_BTC = draw(B, tokens, C).to(dtype).requires_grad_(grad)
    window_BCK = WINDOW_BCK.to(dtype) if state else None
    arguments = x_BTC, draw(C, K).to(dtype), draw(C).to(dtype), "silu", window_BCK
    return causal_conv1d(*arguments, use_packages=True, **more), causal_conv1d(*arguments, **more)


def scan(tokens: int, state: bool = False, dtype: torch.dtype = torch.float32, grad: bool = False, **more: Any) -> Any:
    x_BTHP, *rest = (t.to(dtype) for t in scan_arguments(tokens))
    arguments = x_BTHP.requires_grad_(grad), *rest, 4, draw(B, H, P, N) if state else None
    return ssd(*arguments, use_packages=True, **more), ssd(*arguments, **more)


@pytest.mark.usefixtures("_on_cuda")
@pytest.mark.parametrize("op", [conv, scan])
@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"tokens": T}, True),
        ({"tokens": T, "grad": True}, True),
        ({"tokens": T, "state": True}, True),
        ({"tokens": 1, "state": True}, True),
        ({"tokens": T, "impl": "reference"}, False),
        ({"tokens": T, "dtype": torch.float64}, False),  # the kernels have none
        ({"tokens": 1, "state": True, "grad": True}, False),  # the one-token kernels have no backward
        ({"tokens": T, "state": True, "seq_idx_BT": SEQ_IDX_BT}, None),  # the convolution takes one or the other
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value),
)
def test_what_the_packages_cannot_do_stays(calls: Calls, op: Any, given: dict[str, Any], taken: bool | None) -> None:
    found, expected = op(**given)
    assert len(calls) == (op is scan if taken is None else taken)
    assert_close(found, expected)
    assert found[0].requires_grad == given.get("grad", False)
