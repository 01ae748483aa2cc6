"""Selective state space of Mamba-2 (numerics.md, "Mamba-2 mixer" steps 3 and 4).

Letters: B batch · T tokens · H heads · P head size · G groups · N state size. Head h uses group h // (H/G).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_h.ops import dispatch
from nemotron_h.ops.ssd import cuda, reference
from nemotron_h.ops.ssd.reference import time_step

__all__ = ["SSDResult", "ssd", "ssd_in_two", "time_step"]


class SSDResult(NamedTuple):
    """`output` [B, T, H, P] and `final_state` [B, H, P, N], both float32 (float64 in a float64 model)."""

    output: Tensor
    final_state: Tensor


_CHUNK_SCAN = dispatch.register("ssd_chunk_scan", reference.chunk_scan)
_STEP = dispatch.register("ssd_step", reference.step)


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
    use_packages: bool = False,
    impl: str | None = None,
) -> SSDResult:
    """`h_t = exp(dt·A)·h_{t-1} + (dt·x_t) ⊗ B_t`, `y_t = h_t·C_t + D·x_t`.

    One token takes the recurrence itself, more take the chunked form; the two agree up to rounding.

    Args:
        dt_BTH: Time steps from `time_step`, zero at padding: there the state neither decays nor changes.
        A_H: `-exp(A_log)`, float32.
        state_BHPN: State before the first token; None is zero.
        seq_idx_BT: Document of each token, ascending; each starts from a zero state, the first from `state_BHPN`.
        chunk_size: Tokens per chunk; changes rounding and speed only.
        use_packages: On CUDA, take the `mamba_ssm` package where it is installed.
    """
    if use_packages and impl is None and cuda.refusal(x_BTHP, dt_BTH, state_BHPN) is None:
        return SSDResult(*cuda.ssd(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, chunk_size, state_BHPN, seq_idx_BT))
    if x_BTHP.shape[1] == 1:
        return SSDResult(*_STEP(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN, impl=impl))
    return SSDResult(
        *_CHUNK_SCAN(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, chunk_size, state_BHPN, seq_idx_BT, impl=impl)
    )


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
    use_packages: bool = False,
) -> tuple[SSDResult, Tensor | None]:
    """`ssd` over the first `first` tokens and then over the rest, and the state between them; with none first, that is
    the state before the pass. The split changes rounding only."""
    if first == 0:
        scan = ssd(
            x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, chunk_size, state_BHPN, seq_idx_BT, use_packages=use_packages
        )
        return scan, state_BHPN

    def part(tokens: slice, state_BHPN: Tensor | None) -> SSDResult:
        return ssd(
            x_BTHP[:, tokens], dt_BTH[:, tokens], A_H, B_BTGN[:, tokens], C_BTGN[:, tokens], D_H, chunk_size,
            state_BHPN, None if seq_idx_BT is None else seq_idx_BT[:, tokens], use_packages=use_packages,
        )  # fmt: skip

    front = part(slice(first), state_BHPN)
    rest = part(slice(first, None), front.final_state)
    return SSDResult(torch.cat([front.output, rest.output], dim=1), rest.final_state), front.final_state
