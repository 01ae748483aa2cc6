"""The state space in PyTorch: the specification. Differentiable; any device, `meta` included; linear in T.

Letters: B batch · T tokens · c chunk · L, S tokens of a chunk (query, source) · H = G·R heads · G groups · R heads per
group · P head size · N state size. Source of the chunked form: Mamba-2, arXiv 2405.21060, section 6.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def time_step(dt_BTH: Tensor, dt_bias_H: Tensor, limit: tuple[float, float]) -> Tensor:
    """`clamp(softplus(dt + dt_bias), *limit)` in float32: the step by which the state advances."""
    dtype = torch.promote_types(dt_BTH.dtype, torch.float32)
    # softplus without torch's linear shortcut above 20: the shortcut is off by 2e-9, which float64 comparisons see
    steps_BTH = torch.logaddexp(
        dt_BTH.to(dtype) + dt_bias_H.to(dtype), torch.zeros((), dtype=dtype, device=dt_BTH.device)
    )
    return steps_BTH.clamp(*limit)


def decay_rate(A_log_H: Tensor) -> Tensor:
    """`-exp(A_log)` in float32: A, the rate at which the state decays."""
    return -torch.exp(A_log_H.to(torch.promote_types(A_log_H.dtype, torch.float32)))


def step(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None,
    out_state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token; `out_state_BHPN` is a kernel's. See `nemotron_h.ops.ssd.ssd`."""
    x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H = _wide(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H)
    per_group = x_BTHP.shape[2] // B_BTGN.shape[2]
    B_BTHN, C_BTHN = (m.repeat_interleave(per_group, dim=2) for m in (B_BTGN, C_BTGN))
    h_BHPN = None if state_BHPN is None else state_BHPN.to(x_BTHP.dtype)
    outputs = []
    for t in range(x_BTHP.shape[1]):
        x_BHP, dt_BH = x_BTHP[:, t], dt_BTH[:, t]
        added_BHPN = (dt_BH[..., None] * x_BHP)[..., None] * B_BTHN[:, t, :, None]
        h_BHPN = added_BHPN if h_BHPN is None else torch.exp(dt_BH * A_H)[..., None, None] * h_BHPN + added_BHPN
        outputs.append((h_BHPN @ C_BTHN[:, t, ..., None])[..., 0] + D_H[:, None] * x_BHP)
    assert h_BHPN is not None  # there is a token
    return torch.stack(outputs, dim=1), h_BHPN


def chunk_scan(
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
    """The chunked form. See `nemotron_h.ops.ssd.ssd`."""
    x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H = _wide(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H)
    tokens, groups = x_BTHP.shape[1], B_BTGN.shape[2]
    length = max(1, min(chunk_size, tokens))

    u_BcSGRP = _chunks(dt_BTH[..., None] * x_BTHP, length).unflatten(3, (groups, -1))
    B_BcSGN, C_BcLGN = _chunks(B_BTGN, length), _chunks(C_BTGN, length)
    dA_BcGRL = _chunks(dt_BTH * A_H, length).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)
    doc_BcL = None if seq_idx_BT is None else _chunk_documents(seq_idx_BT, length)

    # Within a chunk: Y = ((C Bᵀ) ∘ L) (dt·x), L lower-triangular exp(segsum(dt·A)).
    decay_BcGRLS = _decay(dA_BcGRL, doc_BcL)
    score_BcGLS = torch.einsum("bclgn,bcsgn->bcgls", C_BcLGN, B_BcSGN)
    y_BcLGRP = torch.einsum("bcgrls,bcsgrp->bclgrp", score_BcGLS[:, :, :, None] * decay_BcGRLS, u_BcSGRP)

    # What each chunk adds to the state at its end, and the recurrence from chunk to chunk.
    # B stands first so that the gradient of u has P innermost: inductor (torch 2.13) writes past the end of sums over a
    # transposed dimension where there are fewer heads than vector lanes.
    left_BcSGR = decay_BcGRLS[..., -1, :].permute(0, 1, 4, 2, 3)
    added_BcGNRP = torch.einsum("bcsgn,bcsgrp->bcgnrp", B_BcSGN, left_BcSGR[..., None] * u_BcSGRP)
    added_BcGRPN = added_BcGNRP.permute(0, 1, 2, 4, 5, 3)
    since_start_BcGRL = torch.exp(dA_BcGRL.cumsum(-1))
    carry_BcGR, reach_BcGRL = since_start_BcGRL[..., -1], since_start_BcGRL
    if doc_BcL is not None:
        before_Bc = torch.cat([doc_BcL[:, :1, 0], doc_BcL[:, :-1, -1]], dim=1)  # document in which the state arrives
        carry_BcGR = torch.where((doc_BcL[..., -1] == before_Bc)[..., None, None], carry_BcGR, 0)
        reach_BcGRL = torch.where((doc_BcL == before_Bc[..., None])[:, :, None, None], reach_BcGRL, 0)
    arriving_BcGRPN, final_BGRPN = _recurrence(added_BcGRPN, carry_BcGR, state_BHPN)

    # What the state that arrives at a chunk contributes to its tokens.
    y_BcLGRP = y_BcLGRP + torch.einsum("bclgn,bcgrpn,bcgrl->bclgrp", C_BcLGN, arriving_BcGRPN, reach_BcGRL)
    y_BTHP = y_BcLGRP.flatten(1, 2).flatten(2, 3)[:, :tokens] + D_H[:, None] * x_BTHP
    return y_BTHP, final_BGRPN.flatten(1, 2)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(t.to(dtype) for t in tensors)


def _chunks(x_BT: Tensor, length: int) -> Tensor:
    """[B, T, ...] to [B, c, L, ...], zeros behind the last token: their dt is 0, so they change nothing."""
    missing = -x_BT.shape[1] % length
    padded = F.pad(x_BT, (0, 0) * (x_BT.dim() - 2) + (0, missing)) if missing else x_BT
    return padded.unflatten(1, (-1, length))


def _chunk_documents(seq_idx_BT: Tensor, length: int) -> Tensor:
    missing = -seq_idx_BT.shape[1] % length
    return torch.cat([seq_idx_BT, seq_idx_BT[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, length))


def _decay(dA_BcGRL: Tensor, doc_BcL: Tensor | None) -> Tensor:
    """`exp(sum of dA over (s, l])` for s <= l, zero above the diagonal and across documents.

    The sums are formed one by one instead of as differences of one cumulative sum: differences cancel where |cumsum| is
    large, an error of up to 3e-5 in float32 instead of 5e-8 (64 heads, chunk 128).
    """
    length = dA_BcGRL.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool, device=dA_BcGRL.device).tril()
    terms = torch.where(lower.tril(-1), dA_BcGRL[..., None], 0)
    sums_BcGRLS = terms.cumsum(-2)
    visible = lower if doc_BcL is None else (lower & (doc_BcL[..., :, None] == doc_BcL[..., None, :]))[:, :, None, None]
    return torch.exp(sums_BcGRLS.masked_fill(~visible, -torch.inf))


def _recurrence(added_BcGRPN: Tensor, carry_BcGR: Tensor, state_BHPN: Tensor | None) -> tuple[Tensor, Tensor]:
    """States that arrive at each chunk, and the one that leaves the last."""
    state_BGRPN = torch.zeros_like(added_BcGRPN[:, 0])
    if state_BHPN is not None:
        state_BGRPN = state_BHPN.to(added_BcGRPN.dtype).reshape(state_BGRPN.shape)
    arriving = []
    for chunk in range(added_BcGRPN.shape[1]):
        arriving.append(state_BGRPN)
        state_BGRPN = carry_BcGR[:, chunk, ..., None, None] * state_BGRPN + added_BcGRPN[:, chunk]
    return torch.stack(arriving, dim=1), state_BGRPN
