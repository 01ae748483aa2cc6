"""Everything between a Mamba-2 mixer's two projections, for a few tokens behind a state (numerics.md, steps 2 to 5).

One call instead of five: convolution, time step, recurrence, gate and norm cost less than their calls from Python. The
bits are those of the five ops one after the other.

Letters: B batch · T tokens · H heads · P head size · I = H·P · G groups · N state size · C = I + 2·G·N · K taps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from nemotron_h.ops import dispatch
from nemotron_h.ops.mamba_step import native, reference
from nemotron_h.ops.mamba_step.sizes import MambaSizes

__all__ = ["MambaSizes", "MambaStep", "mamba_step", "step_if_possible"]


class MambaStep(NamedTuple):
    """`output` [B, T, I] in the projection's dtype; `window` [B, C, K-1]; `final_state` [B, H, P, N]. Where it was
    asked for, what went into the recurrence: `inputs` [B, T, C] of the convolution, what it made of them (`convolved`:
    x, B and C), and the time `steps` [B, T, H] in float32."""

    output: Tensor
    window: Tensor
    final_state: Tensor
    inputs: Tensor | None = None
    convolved: Tensor | None = None
    steps: Tensor | None = None


_STEP = dispatch.register("mamba_step", reference.mamba_step, native.mamba_step, native.refusal)


def mamba_step(
    projected_BTX: Tensor,
    sizes: MambaSizes,
    conv_weight_CK: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    norm_weight_I: Tensor,
    window_BCK: Tensor,
    state_BHPN: Tensor,
    out_state: Tensor | None = None,
    record: bool = False,
    *,
    impl: str | None = None,
) -> MambaStep:
    """The output of the gated norm for `projected` [B, T, 2I + 2GN + H] = z | x | B | C | dt, and what comes after it.

    Args:
        A_H: `-exp(A_log)`, float32.
        window_BCK, state_BHPN: What the tokens before left.
        out_state: Memory for the final state, as in `ops.ssd.ssd`.
        record: Also return `inputs`, `convolved` and `steps`.
    """
    args = (conv_weight_CK, conv_bias_C, dt_bias_H, A_H, D_H, norm_weight_I, window_BCK, state_BHPN, out_state, record)
    return MambaStep(*_STEP(projected_BTX, sizes, *args, impl=impl))


def step_if_possible(projected_BTX: Tensor, sizes: MambaSizes, *args: Any) -> MambaStep | None:
    """`mamba_step` by its kernel; None where that cannot take the call, and the mixer calls the five ops itself."""
    call = (projected_BTX, sizes, *args)
    return MambaStep(*_STEP.run(*call)) if _STEP.why_reference(call, None) is None else None
