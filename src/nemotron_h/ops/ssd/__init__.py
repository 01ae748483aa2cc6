"""Selective state space of Mamba-2 (numerics.md, "Mamba-2 mixer" steps 3 and 4).

Letters: B batch · T tokens · H heads · P head size · G groups · N state size. Head h uses group h // (H/G).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_h.ops import dispatch, settings
from nemotron_h.ops.ssd import cuda, native, reference

__all__ = ["STEP_TOKENS", "SSDResult", "decay_rate", "ssd", "ssd_in_two", "time_step"]

STEP_TOKENS = native.TOKENS
"""Tokens up to which the recurrence itself may run."""


class SSDResult(NamedTuple):
    """`output` [B, T, H, P] and `final_state` [B, H, P, N], both float32 (float64 in a float64 model).

    Where a kernel has written the state into the `out_state` that it was given, `final_state` is that tensor.
    """

    output: Tensor
    final_state: Tensor


_CHUNK_SCAN = dispatch.register("ssd_chunk_scan", reference.chunk_scan, native.scan, native.scan_refusal)
_STEP = dispatch.register("ssd_step", reference.step, native.step, native.refusal)
_DECAY_RATE = dispatch.register("decay_rate", reference.decay_rate, native.decay_rate, native.decay_rate_refusal)
_TIME_STEP = dispatch.register("time_step", reference.time_step, native.time_step, native.time_step_refusal)


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    chunk_size: int,
    state_BHPN: Tensor | None = None,
    seq_idx_BT: Tensor | None = None,
    *,
    out_state: Tensor | None = None,
    use_packages: bool = False,
    impl: str | None = None,
) -> SSDResult:
    """`h_t = exp(dt·A)·h_{t-1} + (dt·x_t) ⊗ B_t`, `y_t = h_t·C_t + D·x_t`.

    One token takes the recurrence itself, and so do up to 16 tokens of single documents where its kernel can run, which
    gives them the bits of so many calls with one token; more take the chunked form. The two agree up to rounding.

    Args:
        dt_BTH: Time steps from `time_step`, zero at padding: there the state neither decays nor changes.
        A_H: `-exp(A_log)`, float32.
        state_BHPN: State before the first token; None is zero.
        seq_idx_BT: Document of each token, ascending; each starts from a zero state, the first from `state_BHPN`.
        chunk_size: Tokens per chunk of the reference; changes rounding and speed only. The kernel has its own, 64.
        out_state: Memory [B, H, P, N] for the final state, contiguous, in the dtype that it is to have; `state_BHPN`
            itself is allowed. Only a kernel uses it, without a trace for autograd: see `SSDResult`.
        use_packages: On CUDA, take the `mamba_ssm` package where it is installed.
    """
    if use_packages and impl is None and cuda.refusal(x_BTHP, dt_BTH, state_BHPN) is None:
        return SSDResult(*cuda.ssd(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, chunk_size, state_BHPN, seq_idx_BT))
    if x_BTHP.shape[1] <= STEP_TOKENS:
        before_BHPN = state_BHPN
        if state_BHPN is not None and out_state is state_BHPN and settings.current().check:
            before_BHPN = state_BHPN.clone()  # the reference runs after the kernel and must not see its result
        step = (x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, before_BHPN, out_state)
        if x_BTHP.shape[1] == 1 or seq_idx_BT is None and _kernel_steps(step, impl):
            return SSDResult(*_STEP(*step, impl=impl))
    return SSDResult(
        *_CHUNK_SCAN(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, chunk_size, state_BHPN, seq_idx_BT, impl=impl)
    )


def _kernel_steps(step: tuple[Tensor | None, ...], impl: str | None) -> bool:
    """Whether the kernel takes these tokens one after the other. Raises `KernelError` where it must and cannot."""
    return not torch.compiler.is_compiling() and _STEP.why_reference(step, impl) is None


def time_step(dt_BTH: Tensor, dt_bias_H: Tensor, limit: tuple[float, float], *, impl: str | None = None) -> Tensor:
    """`clamp(softplus(dt + dt_bias), *limit)`: the step by which the state advances, [B, T, H].

    dt, dt_bias: any floating dtypes. Computed and returned in float32, in float64 when dt is.
    """
    return _TIME_STEP(dt_BTH, dt_bias_H, limit, impl=impl)


def decay_rate(A_log_H: Tensor, *, impl: str | None = None) -> Tensor:
    """A = `-exp(A_log)`, [H], in float32 (float64 in a float64 model).

    PyTorch's `exp` of even a few numbers wakes MKL's threads, which then spin on the cores that the kernels need.
    """
    return _DECAY_RATE(A_log_H, impl=impl)


def ssd_in_two(
    first: int,
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    chunk_size: int,
    state_BHPN: Tensor | None = None,
    seq_idx_BT: Tensor | None = None,
    *,
    out_state: Tensor | None = None,
    use_packages: bool = False,
) -> tuple[SSDResult, Tensor | None]:
    """`ssd` over the first `first` tokens and then over the rest, and the state between them; with none first, that is
    the state before the pass. The split changes rounding only. `out_state` serves a pass that is not split."""
    if first == 0:
        scan = ssd(
            x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, chunk_size, state_BHPN, seq_idx_BT,
            out_state=out_state, use_packages=use_packages,
        )  # fmt: skip
        return scan, state_BHPN

    def part(tokens: slice, state_BHPN: Tensor | None) -> SSDResult:
        return ssd(
            x_BTHP[:, tokens], dt_BTH[:, tokens], A_H, B_BTGN[:, tokens], C_BTGN[:, tokens], D_H, chunk_size,
            state_BHPN, None if seq_idx_BT is None else seq_idx_BT[:, tokens], use_packages=use_packages,
        )  # fmt: skip

    front = part(slice(first), state_BHPN)
    rest = part(slice(first, None), front.final_state)
    return SSDResult(torch.cat([front.output, rest.output], dim=1), rest.final_state), front.final_state
