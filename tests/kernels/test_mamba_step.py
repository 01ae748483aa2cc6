"""The fused Mamba step: the bits of its five ops, and when the mixer must call those instead.

Letters: B batch · T tokens · H heads · P head size · G groups · N state size · C channels · K taps.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import tiny_model
from nemotron_h import NemotronHForCausalLM
from nemotron_h.errors import KernelError
from nemotron_h.ops import _native, dispatch, threads
from nemotron_h.ops.causal_conv1d import native as conv
from nemotron_h.ops.mamba_step import MambaSizes, mamba_step, native, reference
from nemotron_h.ops.norm import native as norm
from nemotron_h.ops.ssd import native as ssd
from nemotron_h.steps import BlockStep

CASES = [
    (1, 1, MambaSizes(4, 8, 2, 16, (0.0, float("inf")), 1e-5), 4, torch.bfloat16),
    (3, 2, MambaSizes(6, 5, 3, 12, (0.01, 0.5), 1e-5), 2, torch.float32),
    (2, 16, MambaSizes(2, 80, 1, 96, (0.0, float("inf")), 1e-6), 5, torch.bfloat16),
    (1, 3, MambaSizes(8, 1, 8, 1, (0.0, float("inf")), 1e-5), 4, torch.float32),
]


def draw(batch: int, tokens: int, sizes: MambaSizes, taps: int, dtype: torch.dtype, bias: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(batch + tokens)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(kind)

    width = sizes.inner + sizes.channels + sizes.heads
    state = (batch, sizes.heads, sizes.head_dim, sizes.state)
    return (
        normal(batch, tokens, width), sizes, normal(sizes.channels, taps), normal(sizes.channels) if bias else None,
        normal(sizes.heads), -normal(sizes.heads, kind=torch.float32).exp(), normal(sizes.heads), normal(sizes.inner),
        normal(batch, sizes.channels, taps - 1), normal(*state, kind=torch.float32),
        torch.full(state, torch.nan),
    )  # fmt: skip


def one_by_one(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    projected, sizes, weight, bias, dt_bias, A, D, norm_weight, window, state, _ = args
    z, xBC, dt = projected.split([sizes.inner, sizes.channels, sizes.heads], dim=-1)
    xBC, new_window = conv.causal_conv1d(xBC, weight, bias, "silu", window, None, None)
    x, B, C = xBC.split([sizes.inner, *[sizes.groups * sizes.state] * 2], dim=-1)
    groups = (sizes.groups, sizes.state)
    y, final = ssd.step(
        x.unflatten(-1, (sizes.heads, sizes.head_dim)), ssd.time_step(dt, dt_bias, sizes.limit), A,
        B.unflatten(-1, groups), C.unflatten(-1, groups), D, state, None,
    )  # fmt: skip
    return norm.gated_rms_norm(y.flatten(2), z, norm_weight, sizes.eps, sizes.groups), new_window, final


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "tokens", "sizes", "taps", "dtype"), CASES)
def test_bits_of_the_five_ops(
    batch: int, tokens: int, sizes: MambaSizes, taps: int, dtype: torch.dtype, bias: bool
) -> None:
    args = draw(batch, tokens, sizes, taps, dtype, bias)
    expected = one_by_one(args)
    for level in _native.levels():
        for count in (1, 2):
            _native.extension().set_threads(count)
            threads._set = torch.get_num_threads()
            args[-1].fill_(torch.nan)
            result = native.mamba_step(*args, level=level)
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
            assert result[2] is args[-1]
    threads._set = None
    low = reference.mamba_step(*args)
    high = reference.mamba_step(*(a.double() if isinstance(a, Tensor) else a for a in args))
    for fast, a, b in zip(expected, low, high, strict=True):
        error, allowed = dispatch.budget(fast, a, b, 4.0)
        assert error <= allowed


def decoded(model: NemotronHForCausalLM, **kwargs: Any) -> list[Tensor]:
    ids = torch.tensor([[5, 7, 11, 13, 2, 3, 9, 8]])
    with torch.no_grad():
        out = model(ids[:, :4], use_cache=True)
        logits = [out.logits]
        for first, last in ((4, 5), (5, 7), (7, 8)):
            out = model(ids[:, first:last], past_key_values=out.past_key_values, **kwargs)
            logits.append(out.logits)
    return logits


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of the kernel by mixers, whose blocks do not step as a whole."""
    monkeypatch.setattr(BlockStep, "__call__", lambda *_: None)
    calls: list[int] = []
    kernel = native.mamba_step
    monkeypatch.setattr(dispatch._registry["mamba_step"], "native", lambda *a: calls.append(1) or kernel(*a))
    return calls


def test_the_mixer_takes_it_and_gives_the_same_bits_when_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    model = tiny_model().bfloat16()
    expected = decoded(model)
    mambas = sum(block.block_type == "mamba" for block in model.model.layers)
    assert len(calls) == 3 * mambas
    for name in ("hook_z", "hook_x", "hook_B", "hook_C", "hook_dt", "hook_y", "hook_state", "conv1d", "norm"):
        calls.clear()
        seen: list[int] = []
        part = getattr(model.model.layers[0].mixer, name)
        handle = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert all(torch.equal(a, b) for a, b in zip(decoded(model), expected, strict=True))
        handle.remove()
        assert len(calls) == 3 * (mambas - 1), name
        assert len(seen) == 4, name


def test_the_mixer_calls_the_ops_where_the_step_would_miss_something(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    model = tiny_model()
    decoded(model, output_ssm_states=True)
    assert not calls

    class Norm(type(model.model.layers[0].mixer.norm)):  # type: ignore[misc]
        def forward(self, y: Tensor, z: Tensor) -> Tensor:
            return super().forward(y, z) * 2

    changed = copy.deepcopy(model)
    for block in changed.model.layers:
        if block.block_type == "mamba":
            block.mixer.norm.__class__ = Norm
    assert not torch.equal(decoded(changed)[2], decoded(model)[2])
    calls.clear()
    for block in model.model.layers:
        if block.block_type == "mamba":
            block.mixer.conv1d.act = "gelu"
    decoded(model)
    assert not calls


def test_limits_changed_on_the_mixer_count() -> None:
    model = tiny_model()
    before = decoded(model)
    for block in model.model.layers:
        if block.block_type == "mamba":
            block.mixer.time_step_limit = (0.5, 0.6)
    assert not torch.equal(decoded(model)[1], before[1])
    with torch.no_grad():  # and prefill and decode agree about them
        whole = model(torch.tensor([[5, 7, 11, 13, 2, 3, 9, 8]])).logits
    assert torch.allclose(torch.cat(decoded(model), dim=1), whole, atol=1e-4)


def test_refusals() -> None:
    args = list(draw(1, 2, CASES[0][2], 4, torch.float32, True))
    for index, wrong, message in (
        (0, args[0][:, :, :-1].contiguous(), "do not fit"),
        (0, args[0].half(), "takes float32 and bfloat16"),
        (0, args[0].expand(1, 2, -1).repeat(1, 9, 1), "1 to 16 tokens, not 18"),
        (5, args[5].bfloat16(), "takes float32 and bfloat16 weights"),
        (8, args[8][:, :, :2], "do not fit"),
        (9, args[9].transpose(2, 3).contiguous().transpose(2, 3), "not contiguous"),
        (0, args[0][0], "lack a dimension"),
        (2, args[2][1:], "convolution"),
        (3, args[3][1:], "its bias"),
        *((index, args[index][1:], "dt_bias, A, D or norm weight") for index in (4, 5, 6, 7)),
    ):
        changed = [*args[:index], wrong, *args[index + 1 :]]
        with pytest.raises(KernelError, match=message):
            mamba_step(*changed, impl="native")
    uneven = draw(1, 2, CASES[0][2]._replace(groups=3), 4, torch.float32, True)
    with pytest.raises(KernelError, match="4 heads do not split into 3 groups"):
        mamba_step(*uneven, impl="native")
