"""Choice of experts (numerics.md, "Router and MoE").

Letters: M tokens (rows) · D hidden size · E experts · k experts per token.
"""

from typing import NamedTuple

from torch import Tensor

from nemotron_h.ops import dispatch
from nemotron_h.ops.router import check, native, reference


class Routing(NamedTuple):
    """`experts` [M, k] (int64, ascending ids), their `weights` [M, k] and the pre-sigmoid `logits` [M, E], float32."""

    experts: Tensor
    weights: Tensor
    logits: Tensor


_ROUTE = dispatch.register("router", reference.route, native.route, native.refusal, check=check.wrong)


def route(
    x_MD: Tensor,
    weight_ED: Tensor,
    correction_bias_E: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    scaling_factor: float = 1.0,
    *,
    impl: str | None = None,
) -> Routing:
    """`s = sigmoid(x Wᵀ)`; the bias takes part in the choice of experts and not in their weights. All in float32.

    x [M, D], weight [E, D], bias [E], any floating dtypes. Of equal scores (of experts, of groups) the one with the
    lower id is chosen; NaN counts as greater than every number. The kernel takes up to 512 experts, x and weight in
    float32 or bfloat16, the bias in float32.

    Args:
        n_group: Equal groups of experts; a group's score is the sum of its two best.
        topk_group: Best groups whose experts may be chosen.
        norm_topk_prob: Divide a token's weights by their sum.
        scaling_factor: Multiplies the weights at the end.

    Raises:
        InputError: top_k is not in 1 to E, or the groups do not fit E experts.
        KernelError: `impl="native"` cannot run.
    """
    return Routing(
        *_ROUTE(
            x_MD, weight_ED, correction_bias_E, top_k, n_group, topk_group, norm_topk_prob, scaling_factor, impl=impl
        )
    )
