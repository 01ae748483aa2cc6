"""Stand-ins for the CUDA packages: their signatures, what they refuse, and their results, one token after the other.

What they assert is what mamba_ssm 2.2 and causal_conv1d 1.5 assert or check in C++, in their own letters.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

INF = float("inf")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Calls(list[tuple[str, dict[str, Any]]]):
    """(function, keyword arguments) of every call."""

    def names(self) -> list[str]:
        return [name for name, _ in self]


def install(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put both packages into `sys.modules`."""
    calls = Calls()

    def add(name: str, *functions: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for function in functions:

            def recorded(*args: Any, function: Any = function, **kwargs: Any) -> Any:
                calls.append((function.__name__, kwargs))
                return function(*args, **kwargs)

            setattr(module, function.__name__, recorded)
        monkeypatch.setitem(sys.modules, name, module)

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        add(name)
    add("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined)
    add("mamba_ssm.ops.triton.selective_state_update", selective_state_update)
    add("causal_conv1d", causal_conv1d_fn, causal_conv1d_update)
    return calls


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF), return_final_states: bool = False, return_varlen_states: bool = False,
) -> Any:  # fmt: skip
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    assert x.dtype in KERNEL_DTYPES
    assert dt.shape == (batch, seqlen, nheads)
    assert A.shape == (nheads,)
    assert B.shape == C.shape == (batch, seqlen, ngroups, dstate)
    assert D is not None
    assert D.shape == (nheads,)
    assert z is cu_seqlens is None
    assert seq_idx is None or (seq_idx.shape == (batch, seqlen) and seq_idx.dtype == torch.int32)
    assert initial_states is None or initial_states.shape == (batch, nheads, headdim, dstate)
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    state = x.new_zeros(batch, nheads, headdim, dstate, dtype=torch.float32)
    state = state if initial_states is None else initial_states.float()
    document, outputs = torch.zeros(batch, device=x.device), []
    for t in range(seqlen):
        if seq_idx is not None:
            state = torch.where((seq_idx[:, t] == document)[:, None, None, None], state, 0)
            document = seq_idx[:, t]
        state, y = advance(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)
        outputs.append(y.to(x.dtype))
    out = torch.stack(outputs, dim=1)
    return (out, state) if return_final_states else out


def advance(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """One token of all rows: (state after it, its output)."""
    per_group = x.shape[1] // B.shape[1]
    B, C = (m.float().repeat_interleave(per_group, dim=1)[:, :, None] for m in (B, C))
    x = x.float()
    state = state * torch.exp(dt * A)[..., None, None] + (dt[..., None] * x)[..., None] * B
    return state, (state * C).sum(-1) + D[:, None] * x


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    batch, nheads, dim, dstate = state.shape
    assert x.dtype in KERNEL_DTYPES
    assert x.shape == dt.shape == (batch, nheads, dim)
    assert A.shape == (nheads, dim, dstate)
    assert B.shape == C.shape == (batch, B.shape[1], dstate)
    assert D is not None
    assert D.shape == (nheads, dim)
    assert z is state_batch_indices is None
    assert not (torch.is_grad_enabled() and x.requires_grad), "there is no backward"
    # The package reads dt_bias here without asking whether there is one.
    tied = A.stride(-1) == A.stride(-2) == dt.stride(-1) == 0 and dt_bias.stride(-1) == 0  # type: ignore[union-attr]
    assert tied, "the fast kernel wants one dt, A and dt_bias per head"
    assert dt_bias is not None
    assert dt_bias.shape == (nheads, dim)
    dt = dt.float() + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    after, y = advance(state.float(), x, dt[..., 0], A[:, 0, 0], B, C, D[:, 0])
    state.copy_(after)
    return y.to(x.dtype)


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False, final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:  # fmt: skip
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    assert x.dtype in KERNEL_DTYPES
    assert 2 <= width <= 4
    assert dim % 8 == 0
    assert x.stride(1) == 1, "channel last"
    assert x.stride(2) % 8 == x.stride(0) % 8 == 0
    assert bias is None or (bias.dtype == weight.dtype and bias.shape == (dim,))
    assert activation in (None, "silu", "swish")
    assert final_states_out is None
    past = x.new_zeros(batch, dim, width - 1)
    if seq_idx is not None:
        assert initial_states is None, "initial_states must be None if seq_idx is not None"
        assert not return_final_states, "If seq_idx is not None, we don't return final_states_out"
        assert seq_idx.dtype == torch.int32
        assert seq_idx.is_contiguous()
    if initial_states is not None:
        assert initial_states.shape == past.shape
        assert initial_states.dtype == x.dtype
        assert initial_states.stride(1) == 1, "channel last"
        past = initial_states
    inputs = torch.cat([past, x], dim=2).float()
    columns = []
    for t in range(seqlen):
        taps = inputs[:, :, t : t + width]
        if seq_idx is not None:
            document = F.pad(seq_idx, (width - 1, 0), value=-1)[:, t : t + width]
            taps = torch.where((document == document[:, -1:])[:, None], taps, 0)
        columns.append((taps * weight.float()).sum(-1) + (0 if bias is None else bias.float()))
    out = torch.stack(columns, dim=2)
    out = (out if activation is None else F.silu(out)).to(x.dtype)
    return (out, inputs[:, :, seqlen:].to(x.dtype)) if return_final_states else out


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    batch, dim = x.shape
    width = weight.shape[1]
    assert conv_state.dtype == x.dtype
    assert conv_state.shape == (batch, dim, width - 1)
    assert cache_seqlens is conv_state_indices is None
    assert not (torch.is_grad_enabled() and x.requires_grad), "there is no backward"
    taps = torch.cat([conv_state, x[..., None]], dim=2)
    conv_state.copy_(taps[:, :, 1:])
    out = (taps.float() * weight.float()).sum(-1) + (0 if bias is None else bias.float())
    return (out if activation is None else F.silu(out)).to(x.dtype)
