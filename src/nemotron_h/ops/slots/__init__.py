"""Buffers of a cache: what came, in front of room for what is to come.

Letters: B batch · K key/value heads · T tokens · S slots · d head size.
"""

from typing import Any

import torch
from torch import Tensor

from nemotron_h.ops import dispatch
from nemotron_h.ops.slots import native, reference


def _not_the_same(args: tuple[Any, ...], result: Tensor) -> str | None:
    """A copy has no error budget."""
    same = torch.equal(result.view(torch.uint8), reference.with_room(*args).view(torch.uint8))
    return None if same else "is not the reference's copy, byte for byte"


_WITH_ROOM = dispatch.register("with_room", reference.with_room, native.with_room, native.refusal, check=_not_the_same)


def with_room(x_BKTd: Tensor, slots: int, *, impl: str | None = None) -> Tensor:
    """A buffer [B, K, S, d] of its own memory: x [B, K, T, d] in the first T of S = `slots` slots, zeros behind.

    x may have any dtype, and fewer or more dimensions behind T; the kernel takes four, with contiguous rows of d.
    Raises `InputError` when there are fewer slots than tokens, `KernelError` when `impl="native"` cannot run.
    """
    return _WITH_ROOM(x_BKTd, slots, impl=impl)
