"""Buffers in PyTorch: the specification. Any device, `meta` included.

Letters: B batch · K key/value heads · T tokens · d head size.
"""

from torch import Tensor

from nemotron_h.errors import InputError


def with_room(x_BKTd: Tensor, slots: int) -> Tensor:
    """See `nemotron_h.ops.slots.with_room`."""
    batch, heads, tokens, *sizes = x_BKTd.shape
    if slots < tokens:
        raise InputError(f"with_room: {tokens} tokens do not fit {slots} slots")
    buffer = x_BKTd.new_zeros(batch, heads, slots, *sizes)
    buffer[:, :, :tokens] = x_BKTd
    return buffer
