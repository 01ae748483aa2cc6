"""The five ops one after the other, by their references. Differentiable; any device.

Letters: B batch · T tokens · H heads · P head size · I = H·P · G groups · N state size · C = I + 2·G·N · K taps.
"""

from __future__ import annotations

from torch import Tensor

from nemotron_h.ops.causal_conv1d import reference as conv
from nemotron_h.ops.mamba_step.sizes import MambaSizes
from nemotron_h.ops.norm import reference as norm
from nemotron_h.ops.ssd import reference as ssd


def mamba_step(
    projected_BTX: Tensor, sizes: MambaSizes, conv_weight_CK: Tensor, conv_bias_C: Tensor | None, dt_bias_H: Tensor,
    A_H: Tensor, D_H: Tensor, norm_weight_I: Tensor, window_BCK: Tensor, state_BHPN: Tensor, out_state: Tensor | None,
    record: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `nemotron_h.ops.mamba_step.mamba_step`."""
    z_BTI, inputs_BTC, dt_BTH = projected_BTX.split([sizes.inner, sizes.channels, sizes.heads], dim=-1)
    dt_BTH = ssd.time_step(dt_BTH, dt_bias_H, sizes.limit)
    xBC_BTC, window = conv.causal_conv1d(inputs_BTC, conv_weight_CK, conv_bias_C, "silu", window_BCK, None, None)
    x_BTI, B_BTS, C_BTS = xBC_BTC.split([sizes.inner, *[sizes.groups * sizes.state] * 2], dim=-1)
    groups = (sizes.groups, sizes.state)
    y_BTHP, state = ssd.step(
        x_BTI.unflatten(-1, (sizes.heads, sizes.head_dim)), dt_BTH, A_H, B_BTS.unflatten(-1, groups),
        C_BTS.unflatten(-1, groups), D_H, state_BHPN, None,
    )  # fmt: skip
    output_BTI = norm.gated_rms_norm(y_BTHP.flatten(2), z_BTI, norm_weight_I, sizes.eps, sizes.groups)
    return output_BTI, window, state, *((inputs_BTC, xBC_BTC, dt_BTH) if record else ())
