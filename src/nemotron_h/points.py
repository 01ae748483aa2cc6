"""Named places in the mixers, for forward hooks that read a value or put another in its stead.

Letters: B batch · T tokens of this pass.
"""

from __future__ import annotations

from torch import Tensor, nn

from nemotron_h.layout import Layout


class NemotronHPoint(nn.Identity):
    """A value on its way: no parameters, no buffers, nothing in a state dict.

    `mixer.hook_dt.register_forward_hook(lambda point, args, dt_BTH: ...)` sees the value; what the hook returns, unless
    it is None, goes on in its place, and gradients flow through either.
    """

    fused = nn.Identity.forward


def watched(module: nn.Module) -> bool:
    """Whether hooks hang on a module. Global hooks do not count."""
    hooks = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip
    return bool(hooks)


def untouched(module: nn.Module) -> bool:
    """Whether a module would do just what its class says by `fused = forward`: only then may a kernel do it instead.

    A subclass does not inherit that; a method changed on the class, a `forward` of the module's own and hooks end it.
    """
    kind = type(module)
    return kind.__dict__.get("fused") is kind.forward and "forward" not in module.__dict__ and not watched(module)


def hooked(point: nn.Module) -> bool:
    """Whether somebody watches: only where nobody does may a kernel skip the value."""
    return type(point) is not NemotronHPoint or watched(point)


def through(point: nn.Module, x_BTC: Tensor) -> Tensor:
    """A value by way of a point, which costs next to nothing where nobody watches."""
    return point(x_BTC) if hooked(point) else x_BTC


def in_slots(point: nn.Module, x_BTC: Tensor, layout: Layout) -> Tensor:
    """Compacted rows by way of a point whose hooks see every token where it stands in the batch."""
    return layout.compact(point(layout.expand(x_BTC))) if hooked(point) else x_BTC
