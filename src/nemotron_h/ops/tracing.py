"""Whether Python may look at the values of tensors."""

import torch
from torch._C._functorch import maybe_current_level


def tracing() -> bool:
    """Whether torch.compile traces or a functorch transform (vmap, grad, jvp) is active: values are not to be read."""
    return torch.compiler.is_compiling() or maybe_current_level() is not None
