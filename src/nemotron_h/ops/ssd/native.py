"""The recurrence and its time steps by the C++ kernels (csrc/kernels/ssd_step.cpp, ssd_scan.cpp, time_step.cpp):
float32 and bfloat16 on the CPU, without grad.

Letters: B batch · T tokens · H heads · P head size · G groups · N state size.
"""

import torch
from torch import Tensor

from nemotron_h.ops import _native, threads
from nemotron_h.ops.dispatch import DTYPE_CODES, not_plain

TOKENS = 16  # csrc/kernels/ssd_step.cpp: max_tokens
STATES = 512  # its max_states
SCAN_STATES = 256  # csrc/kernels/ssd_scan.cpp: max_states


def refusal(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None,
    out_state_BHPN: Tensor | None,
) -> str | None:
    """Why the kernel cannot take these arguments; None when it can."""
    states = [state for state in (state_BHPN, out_state_BHPN) if state is not None]
    reason = _wrong_inputs(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, states, STATES)
    if reason is None and x_BTHP.shape[1] > TOKENS:
        return f"the kernel takes at most {TOKENS} tokens, not {x_BTHP.shape[1]}"
    return reason


def scan_refusal(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    chunk_size: int,
    state_BHPN: Tensor | None,
    seq_idx_BT: Tensor | None,
) -> str | None:
    """Why the kernel of many tokens cannot take these arguments; None when it can."""
    states = [] if state_BHPN is None else [state_BHPN]
    reason = _wrong_inputs(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, states, SCAN_STATES)
    if reason is None and _native.emulates():
        return _native.EMULATED
    if reason is not None or seq_idx_BT is None:
        return reason
    if seq_idx_BT.shape != x_BTHP.shape[:2] or seq_idx_BT.dtype not in (torch.int64, torch.int32):
        return f"seq_idx {seq_idx_BT.dtype} {list(seq_idx_BT.shape)} must be int64 {list(x_BTHP.shape[:2])}"
    return not_plain(seq_idx_BT)


def _wrong_inputs(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    states: list[Tensor],
    most_states: int,
) -> str | None:
    return (
        not_plain(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, *states)
        or _wrong_dtypes(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, states)
        or _wrong_shapes(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, states, most_states)
        or _wrong_layout((x_BTHP, B_BTGN, C_BTGN), states)
    )


def _wrong_dtypes(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor, states: list[Tensor]
) -> str | None:
    for tensor in (x_BTHP, D_H, *states):
        if tensor.dtype not in DTYPE_CODES:
            return f"the kernel takes float32 and bfloat16, not {tensor.dtype}"
    if B_BTGN.dtype != x_BTHP.dtype or C_BTGN.dtype != x_BTHP.dtype:
        return f"x, B and C must have one dtype, not {x_BTHP.dtype}, {B_BTGN.dtype} and {C_BTGN.dtype}"
    if dt_BTH.dtype != torch.float32 or A_H.dtype != torch.float32:
        return f"dt and A must be float32, not {dt_BTH.dtype} and {A_H.dtype}"
    return None


def _wrong_shapes(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    states: list[Tensor],
    most_states: int,
) -> str | None:
    if x_BTHP.dim() != 4 or B_BTGN.dim() != 4:
        return f"x {list(x_BTHP.shape)} and B {list(B_BTGN.shape)} must have 4 dimensions"
    batch, tokens, heads, size = x_BTHP.shape
    groups, width = B_BTGN.shape[2:]
    if x_BTHP.numel() == 0 or B_BTGN.numel() == 0:
        return "x or B is empty"
    if width > most_states:
        return f"the kernel takes states of at most {most_states}, not {width}"
    if heads % groups:
        return f"{heads} heads do not split into {groups} groups"
    expected = {
        "dt": (dt_BTH, (batch, tokens, heads)), "A": (A_H, (heads,)), "D": (D_H, (heads,)),
        "B": (B_BTGN, (batch, tokens, groups, width)), "C": (C_BTGN, (batch, tokens, groups, width)),
    }  # fmt: skip
    for index, state in enumerate(states):
        expected[f"state {index}"] = (state, (batch, heads, size, width))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            return f"{name} {list(tensor.shape)} does not fit x {list(x_BTHP.shape)}: it must be {list(shape)}"
    return None


def _wrong_layout(inputs: tuple[Tensor, Tensor, Tensor], states: list[Tensor]) -> str | None:
    for tensor in inputs:
        if tensor.stride(3) != 1 and tensor.shape[3] != 1:
            return f"the rows of x, B or C (strides {tensor.stride()}) are not contiguous"
    for state in states:
        if not state.is_contiguous():
            return "a state is not contiguous"
    return None


def step(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None,
    out_state_BHPN: Tensor | None,
    level: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `nemotron_h.ops.ssd.ssd`; valid only where `refusal` is None. `level`: default, the level in force.

    The state goes into `out_state_BHPN`, in its dtype, or into a float32 tensor of its own.
    """
    batch, tokens, heads, size = x_BTHP.shape
    groups, width = B_BTGN.shape[2:]
    y_BTHP = x_BTHP.new_empty(batch, tokens, heads, size, dtype=torch.float32)
    out = out_state_BHPN
    if out is None:
        out = x_BTHP.new_empty(batch, heads, size, width, dtype=torch.float32)
    dt_BTH, A_H, D_H = dt_BTH.contiguous(), A_H.contiguous(), D_H.contiguous()
    threads.sync()
    _native.kernels(level).ssd_step(
        x_BTHP.data_ptr(), dt_BTH.data_ptr(), A_H.data_ptr(), B_BTGN.data_ptr(), C_BTGN.data_ptr(), D_H.data_ptr(),
        0 if state_BHPN is None else state_BHPN.data_ptr(), out.data_ptr(), y_BTHP.data_ptr(),
        batch, tokens, heads, size, groups, width,
        *x_BTHP.stride()[:3], *B_BTGN.stride()[:3], *C_BTGN.stride()[:3],
        DTYPE_CODES[x_BTHP.dtype], DTYPE_CODES[D_H.dtype],
        DTYPE_CODES[out.dtype if state_BHPN is None else state_BHPN.dtype], DTYPE_CODES[out.dtype],
    )  # fmt: skip
    return y_BTHP, out


def scan(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    chunk_size: int,
    state_BHPN: Tensor | None,
    seq_idx_BT: Tensor | None,
    level: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `nemotron_h.ops.ssd.ssd`; valid only where `scan_refusal` is None.

    The kernel has chunks of its own, of 64 tokens from the start of the call or of a document. A call that ends at a
    multiple of 64 tokens and another that goes on from its state have the bits of one call; a document in a packed row
    has those of the document alone.
    """
    batch, tokens, heads, size = x_BTHP.shape
    groups, width = B_BTGN.shape[2:]
    y_BTHP = x_BTHP.new_empty(batch, tokens, heads, size, dtype=torch.float32)
    final_BHPN = x_BTHP.new_empty(batch, heads, size, width, dtype=torch.float32)
    dt_BTH, A_H, D_H = dt_BTH.contiguous(), A_H.contiguous(), D_H.contiguous()
    documents_BT = None if seq_idx_BT is None else seq_idx_BT.long().contiguous()
    threads.sync()
    _native.kernels(level).ssd_scan(
        x_BTHP.data_ptr(), dt_BTH.data_ptr(), A_H.data_ptr(), B_BTGN.data_ptr(), C_BTGN.data_ptr(), D_H.data_ptr(),
        0 if state_BHPN is None else state_BHPN.data_ptr(), 0 if documents_BT is None else documents_BT.data_ptr(),
        final_BHPN.data_ptr(), y_BTHP.data_ptr(), batch, tokens, heads, size, groups, width,
        *x_BTHP.stride()[:3], *B_BTGN.stride()[:3], *C_BTGN.stride()[:3],
        DTYPE_CODES[x_BTHP.dtype], DTYPE_CODES[D_H.dtype],
        DTYPE_CODES[torch.float32 if state_BHPN is None else state_BHPN.dtype],
    )  # fmt: skip
    return y_BTHP, final_BHPN


def time_step_refusal(dt_BTH: Tensor, dt_bias_H: Tensor, limit: tuple[float, float]) -> str | None:
    """Why the kernel cannot take these arguments; None when it can."""
    reason = not_plain(dt_BTH, dt_bias_H)
    if reason is not None:
        return reason
    if dt_BTH.dtype not in DTYPE_CODES or dt_bias_H.dtype not in DTYPE_CODES:
        return f"the kernel takes float32 and bfloat16, not {dt_BTH.dtype} with {dt_bias_H.dtype}"
    if dt_BTH.dim() != 3 or dt_bias_H.shape != dt_BTH.shape[2:]:
        return f"dt_bias {list(dt_bias_H.shape)} does not fit dt {list(dt_BTH.shape)}"
    if dt_BTH.numel() == 0:
        return "dt is empty"
    if dt_BTH.stride(2) != 1 and dt_BTH.shape[2] != 1:
        return f"the rows of dt (strides {dt_BTH.stride()}) are not contiguous"
    return None


def time_step(dt_BTH: Tensor, dt_bias_H: Tensor, limit: tuple[float, float], level: str | None = None) -> Tensor:
    """See `nemotron_h.ops.ssd.time_step`; valid only where `time_step_refusal` is None."""
    out_BTH = dt_BTH.new_empty(dt_BTH.shape, dtype=torch.float32)
    dt_bias_H = dt_bias_H.contiguous()
    threads.sync()
    _native.kernels(level).time_step(
        dt_BTH.data_ptr(), dt_bias_H.data_ptr(), out_BTH.data_ptr(), *dt_BTH.shape, *dt_BTH.stride()[:2],
        *limit, DTYPE_CODES[dt_BTH.dtype], DTYPE_CODES[dt_bias_H.dtype],
    )  # fmt: skip
    return out_BTH


def decay_rate_refusal(A_log_H: Tensor) -> str | None:
    """Why the kernel cannot take these arguments; None when it can."""
    reason = not_plain(A_log_H)
    if reason is not None:
        return reason
    if A_log_H.dtype not in DTYPE_CODES or A_log_H.dim() != 1 or not A_log_H.is_contiguous() or not len(A_log_H):
        return f"the kernel takes contiguous float32 and bfloat16, not {A_log_H.dtype} {list(A_log_H.shape)}"
    return None


def decay_rate(A_log_H: Tensor, level: str | None = None) -> Tensor:
    """See `nemotron_h.ops.ssd.decay_rate`; valid only where `decay_rate_refusal` is None."""
    A_H = torch.empty_like(A_log_H, dtype=torch.float32)
    _native.kernels(level).decay_rate(A_log_H.data_ptr(), A_H.data_ptr(), len(A_log_H), DTYPE_CODES[A_log_H.dtype])
    return A_H
