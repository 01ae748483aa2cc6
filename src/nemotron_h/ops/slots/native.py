"""Buffers by the C++ kernel (csrc/kernels/with_room.cpp): any dtype on the CPU, without grad.

Letters: B batch · K key/value heads · T tokens · d head size.
"""

from torch import Tensor

from nemotron_h.ops import _native, threads
from nemotron_h.ops.dispatch import not_plain


def refusal(x_BKTd: Tensor, slots: int) -> str | None:
    """Why the kernel cannot take these arguments; None when it can."""
    reason = not_plain(x_BKTd)
    if reason is not None:
        return reason
    if x_BKTd.dim() != 4 or x_BKTd.numel() == 0:
        return f"the kernel takes four dimensions that are not empty, not {list(x_BKTd.shape)}"
    if x_BKTd.stride(3) != 1 and x_BKTd.shape[3] != 1:
        return f"the rows of x (strides {x_BKTd.stride()}) are not contiguous"
    if slots < x_BKTd.shape[2]:
        return f"{x_BKTd.shape[2]} tokens do not fit {slots} slots"
    return None


def with_room(x_BKTd: Tensor, slots: int, level: str | None = None) -> Tensor:
    """See `nemotron_h.ops.slots.with_room`; valid only where `refusal` is None. `level`: default, the one in force."""
    batch, heads, tokens, size = x_BKTd.shape
    out = x_BKTd.new_empty(batch, heads, slots, size)
    each = x_BKTd.element_size()
    threads.sync()
    _native.kernels(level).with_room(
        x_BKTd.data_ptr(), out.data_ptr(), batch, heads, tokens, slots, size * each,
        *(stride * each for stride in x_BKTd.stride()[:3]),
    )  # fmt: skip
    return out
