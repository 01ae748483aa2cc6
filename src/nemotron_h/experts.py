"""The routed experts of a block, stacked: plain ones, and ones whose weights are packed.

Letters: M tokens · E experts · k experts per token · F expert width · L latent width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nemotron_h.configuration import NemotronHConfig
from nemotron_h.family import Layer
from nemotron_h.linears import empty_packed
from nemotron_h.ops.moe import experts, packed_experts
from nemotron_h.ops.pack import pack_into
from nemotron_h.quantization import Packing, Scheme
from nemotron_h.state_dicts import take_experts


class NemotronHExperts(nn.Module):
    """The routed experts, stacked: `up_proj` [E, F, L] and `down_proj` [E, L, F], out x in as in a linear."""

    up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(self, config: NemotronHConfig, sizes: Layer) -> None:
        super().__init__()
        width, latent = sizes.moe_intermediate_size, sizes.moe_latent_size or config.hidden_size
        self.num_experts, self.act = sizes.n_routed_experts, config.mlp_hidden_act
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, width, latent))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, latent, width))
        self.register_parameter("up_proj_bias", None)
        self.register_parameter("down_proj_bias", None)

    def add_bias(self) -> None:
        """Room for biases; published models have none, a checkpoint that carries them loads."""
        for name, projection in (("up_proj_bias", self.up_proj), ("down_proj_bias", self.down_proj)):
            setattr(self, name, nn.Parameter(projection.new_zeros(projection.shape[:2])))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """torch's hook below `load_state_dict`: experts may come one by one, as checkpoints hold them."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        take_experts(self, state_dict, prefix, assign, missing_keys, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def packed(self, scheme: Scheme) -> NemotronHPackedExperts:
        """The same experts with packed weights; on `meta`, without values."""
        return NemotronHPackedExperts(self, scheme)

    def forward(self, x_ML: Tensor, experts_Mk: Tensor, weights_Mk: Tensor) -> Tensor:
        return experts(
            x_ML, experts_Mk, weights_Mk, self.up_proj, self.down_proj, self.act, self.up_proj_bias, self.down_proj_bias
        )

    fused = forward


class NemotronHPackedExperts(nn.Module):
    """Routed experts whose weights are packed: `up_proj` and `down_proj` hold bytes, uint8 [E, panels, bytes]."""

    up_proj: nn.Parameter
    down_proj: nn.Parameter
    up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(self, plain: NemotronHExperts, scheme: Scheme) -> None:
        super().__init__()
        self.num_experts, self.act, self.scheme = plain.num_experts, plain.act, scheme
        self.width, self.latent = plain.up_proj.shape[1:]
        for name, shape in self.packed_shapes().items():
            weight: Tensor = getattr(plain, name)
            packed = empty_packed((shape[0], *self.packing.shape(*shape[1:])), weight.device)
            for matrix, panels in zip(weight, packed.data, strict=True):
                if not weight.is_meta:
                    pack_into(panels, matrix, self.packing)
            self.register_parameter(name, packed)
            self.register_parameter(f"{name}_bias", getattr(plain, f"{name}_bias"))

    @property
    def packing(self) -> Packing:
        return self.scheme.packing

    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Packed parameters, with the shapes that their values have."""
        shape = (self.num_experts, self.width, self.latent)
        return {"up_proj": shape, "down_proj": (shape[0], shape[2], shape[1])}

    def forward(self, x_ML: Tensor, experts_Mk: Tensor, weights_Mk: Tensor) -> Tensor:
        return packed_experts(
            x_ML, experts_Mk, weights_Mk, self.up_proj, self.down_proj, self.packing, self.width, self.act,
            self.up_proj_bias, self.down_proj_bias, self.scheme.activations,
        )  # fmt: skip

    fused = forward
