"""What the forward passes return.

Letters: B batch · T tokens · V vocabulary · M = B·T · E experts · H, P, N as in ops/ssd.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class NemotronHModelOutput(BaseModelOutputWithPast):
    """As transformers' output, with `router_logits` (pre-sigmoid, [M, E] per moe layer) and `ssm_states`
    ([B, H, P, N] per mamba layer, behind the last token), both only when asked for."""

    router_logits: tuple[Tensor, ...] | None = None
    ssm_states: tuple[Tensor, ...] | None = None


@dataclass
class NemotronHCausalLMOutput(CausalLMOutputWithPast):
    """As transformers' output; `loss` includes the terms whose config scale is > 0, each is also returned by itself.

    mtp_logits: one [B, T - j, V] per depth j, float32. aux_loss: balance. z_loss: router. All only when asked for or
    when labels are given.
    """

    router_logits: tuple[Tensor, ...] | None = None
    ssm_states: tuple[Tensor, ...] | None = None
    mtp_logits: list[Tensor] | None = None
    mtp_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
