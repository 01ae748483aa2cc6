"""A decode step of a whole block, `x + mixer(norm(x))`, in one call (csrc/kernels/block_step.cpp).

There is no reference here: a step has the bits of the block's modules one after the other, and where it cannot run,
those run. `nemotron_h.steps` says of which blocks it can.
"""

from nemotron_h.ops.block_step.native import MOST_ROWS, AttentionBlock, MambaBlock, Matrix, MlpBlock, MoeBlock, Norm

__all__ = ["MOST_ROWS", "AttentionBlock", "MambaBlock", "Matrix", "MlpBlock", "MoeBlock", "Norm"]
