"""Inputs of the tests that look inside, and what must be seen there.

B batch · T tokens · H Mamba heads · P head size · G groups · N state size · C conv channels · I = H·P · S = G·N.
"""

import numpy as np
import torch
from torch import Tensor

import reference64
from helpers import draw_rows, hub_tensors
from nemotron_h import NemotronHForCausalLM

MASK_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 1, 1, 1, 1]])


def rows_of(model: NemotronHForCausalLM, mask_BT: Tensor = MASK_BT) -> tuple[Tensor, list[Tensor]]:
    """A padded batch for the mask, and its rows alone [1, T]; without near-ties of the router."""
    alone = draw_rows(model, mask_BT.sum(-1).tolist())
    ids_BT = torch.full(mask_BT.shape, 7)
    ids_BT[mask_BT.bool()] = torch.cat(alone)
    return ids_BT, [row[None] for row in alone]


def scanned(model: NemotronHForCausalLM, ids_T: Tensor) -> dict[str, np.ndarray]:
    """What the points of layer 0, a mamba block, must show of one sequence: float64, step by step."""
    config, weights = model.config, hub_tensors(model)
    H, P, G, N = config.mamba_num_heads, config.mamba_head_dim, config.mamba_n_groups, config.ssm_state_size
    inner, tokens, prefix = H * P, len(ids_T), "backbone.layers.0."
    normed = reference64.rms_norm(
        weights["backbone.embeddings.weight"][ids_T.numpy()], weights[f"{prefix}norm.weight"], config.layer_norm_epsilon
    )
    channels = inner + 2 * G * N
    z_TI, xBC_TC, dt_TH = np.split(
        reference64.linear(weights, f"{prefix}mixer.in_proj", normed), [inner, inner + channels], axis=-1
    )
    conv = weights[f"{prefix}mixer.conv1d.weight"][:, 0], weights[f"{prefix}mixer.conv1d.bias"]
    xBC_TC = reference64.silu(reference64.causal_conv(xBC_TC, *conv)[0])
    x_TI, B_TS, C_TS = np.split(xBC_TC, [inner, inner + G * N], axis=-1)
    dt_TH = reference64.softplus(dt_TH + weights[f"{prefix}mixer.dt_bias"])
    x, B, C = x_TI.reshape(tokens, H, P), B_TS.reshape(tokens, G, N), C_TS.reshape(tokens, G, N)
    A, D = -np.exp(weights[f"{prefix}mixer.A_log"]), weights[f"{prefix}mixer.D"]
    y, state = reference64.ssm_recurrence(x, dt_TH, A, B, C, D)
    return {"z": z_TI, "x": x, "B": B, "C": C, "dt": dt_TH, "y": y, "state": state}
