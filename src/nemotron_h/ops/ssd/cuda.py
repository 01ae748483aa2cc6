"""The state space by the `mamba_ssm` package on CUDA. Not run on hardware; tests check the calls with a stand-in.

Letters: B batch · T tokens · H heads · P head size · G groups · N state size.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor


def refusal(x_BTHP: Tensor, dt_BTH: Tensor, state_BHPN: Tensor | None) -> str | None:
    """Why the package cannot take this call; None when it can."""
    if not x_BTHP.is_cuda:
        return f"the tensors are on {x_BTHP.device}, not on CUDA"
    if find_spec("mamba_ssm") is None:
        return "mamba_ssm is not installed"
    if x_BTHP.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the package has no kernel for {x_BTHP.dtype}"
    one_token = x_BTHP.shape[1] == 1 and state_BHPN is not None
    if one_token and torch.is_grad_enabled() and (x_BTHP.requires_grad or dt_BTH.requires_grad):
        return "the package's one-token kernel has no backward"
    return None


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    chunk_size: int,
    state_BHPN: Tensor | None,
    seq_idx_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `nemotron_h.ops.ssd.ssd`; valid only where `refusal` is None.

    dt arrives finished (softplus, limits, padding), so the package is told to leave it alone: its limits would lift the
    zeros at padding.
    """
    if x_BTHP.shape[1] == 1 and state_BHPN is not None:
        return _step(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN)
    combined = import_module("mamba_ssm.ops.triton.ssd_combined")
    return combined.mamba_chunk_scan_combined(
        x_BTHP,
        dt_BTH,
        A_H,
        B_BTGN,
        C_BTGN,
        chunk_size,
        D=D_H,
        dt_bias=None,
        dt_softplus=False,
        dt_limit=(0.0, float("inf")),
        initial_states=state_BHPN,
        seq_idx=None if seq_idx_BT is None else seq_idx_BT.int(),
        return_final_states=True,
    )


def _step(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    update = import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    (size, states), new_BHPN = state_BHPN.shape[2:], state_BHPN.clone()  # the kernel writes into it
    no_bias_HP = torch.zeros_like(D_H)[:, None].expand(-1, size)  # it reads dt_bias without asking for None
    y_BHP = update(
        new_BHPN,
        x_BTHP[:, 0],
        dt_BTH[:, 0, :, None].expand(-1, -1, size),
        A_H[:, None, None].expand(-1, size, states),
        B_BTGN[:, 0],
        C_BTGN[:, 0],
        D_H[:, None].expand(-1, size),
        dt_bias=no_bias_HP,
        dt_softplus=False,
    )
    return y_BHP[:, None], new_BHPN
