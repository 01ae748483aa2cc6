"""Nemotron-H: Mamba-2, attention, MLP and mixture-of-experts blocks in one residual stream, and an MTP head.

Every block is `x = x + mixer(norm(x))`; a mixer takes hidden states, the layout of the tokens and its part of the
cache, and returns one tensor. The mathematics of each step is in `ops/` (contract, reference, kernels); this file is
the figure.

Letters: B batch · T tokens · D hidden_size · V vocab_size · H Mamba heads · P Mamba head size · I = H·P · G groups ·
N state size · C = I + 2·G·N conv channels · Q query heads · K key/value heads · d head size · E experts · k experts per
token · F expert width · L latent width · M = B·T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from nemotron_h import cache as caches
from nemotron_h import family, losses, pieces
from nemotron_h.cache import CacheLayer, DepthCache, NemotronHHybridDynamicCache
from nemotron_h.configuration import NemotronHConfig
from nemotron_h.errors import ConfigError, InputError
from nemotron_h.experts import NemotronHExperts
from nemotron_h.family import BlockType, Layer
from nemotron_h.generation_mixin import NemotronHGenerationMixin
from nemotron_h.inputs import keep_positions, kept_alone, prepare
from nemotron_h.layout import Layout, Recorder, ordered
from nemotron_h.linears import NemotronHLinear, activated, widened
from nemotron_h.ops.activations import activation
from nemotron_h.ops.add import add
from nemotron_h.ops.attention import attention
from nemotron_h.ops.causal_conv1d import ConvResult, causal_conv1d
from nemotron_h.ops.dispatch import not_plain
from nemotron_h.ops.mamba_step import MambaSizes, step_if_possible
from nemotron_h.ops.moe import load
from nemotron_h.ops.norm import gated_rms_norm, rms_norm
from nemotron_h.ops.router import Routing, route
from nemotron_h.ops.ssd import decay_rate, ssd_in_two, time_step
from nemotron_h.ops.tracing import tracing
from nemotron_h.outputs import NemotronHCausalLMOutput, NemotronHModelOutput
from nemotron_h.points import NemotronHPoint, hooked, in_slots, through, untouched
from nemotron_h.pretrained import NemotronHPreTrainedModel
from nemotron_h.steps import BlockStep


class NemotronHRMSNorm(nn.Module):
    """`w · x / rms(x)`, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)

    fused = forward


class NemotronHEmbedding(nn.Embedding):
    """`nn.Embedding`; where kernels may run, on the calling thread alone.

    PyTorch shares more than `ALONE` elements, which 16 tokens have, with its OpenMP threads, and these then spin for
    milliseconds on the cores where the kernels' own threads work.
    """

    ALONE = 2**15

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        if tracing() or torch.is_grad_enabled() or self.max_norm is not None or not_plain(input_ids, self.weight):
            return super().forward(input_ids)
        out_MD = self.weight.new_empty(input_ids.numel(), self.embedding_dim)
        rows = max(1, self.ALONE // self.embedding_dim)
        for ids_M, piece_MD in zip(input_ids.flatten().split(rows), out_MD.split(rows), strict=True):
            torch.index_select(self.weight, 0, ids_M, out=piece_MD)
        return out_MD.view(*input_ids.shape, self.embedding_dim)


class NemotronHGatedRMSNorm(nn.Module):
    """Gate first, then RMS norm over each group of channels."""

    def __init__(self, size: int, eps: float, n_groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.n_groups = eps, n_groups

    def forward(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        return gated_rms_norm(y_BTI, z_BTI, self.weight, self.eps, self.n_groups)

    fused = forward


class NemotronHCausalConv1d(nn.Conv1d):
    """Depthwise causal convolution with its activation; the parameters are those of a grouped `nn.Conv1d`."""

    def __init__(self, channels: int, taps: int, bias: bool, act: str, use_packages: bool) -> None:
        super().__init__(channels, channels, taps, groups=channels, bias=bias, padding=taps - 1)
        self.act, self.use_packages = act, use_packages

    def forward(  # type: ignore[override]
        self, x_BTC: Tensor, window_BCW: Tensor | None, lengths_B: Tensor | None, seq_idx_BT: Tensor | None
    ) -> ConvResult:
        weight_CK = self.weight[:, 0]
        return causal_conv1d(
            x_BTC, weight_CK, self.bias, self.act, window_BCW, lengths_B, seq_idx_BT, use_packages=self.use_packages
        )

    fused = forward


class NemotronHMamba2Mixer(nn.Module):
    """Mamba-2: project, convolve, scan, gate and norm, project back (arXiv 2405.21060)."""

    def __init__(self, config: NemotronHConfig, sizes: Layer, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.n_groups, self.ssm_state_size = config.mamba_n_groups, config.ssm_state_size
        self.intermediate_size = self.num_heads * self.head_dim
        self.conv_dim = self.intermediate_size + 2 * self.n_groups * self.ssm_state_size
        self.time_step_limit, self.chunk_size = config.mamba_dt_limit, config.mamba_chunk_size
        self.use_packages = config.use_mamba_kernels
        bias = config.use_bias or config.mamba_proj_bias

        projected = self.intermediate_size + self.conv_dim + self.num_heads
        self.in_proj = NemotronHLinear(config.hidden_size, projected, bias=bias)
        self.conv1d = NemotronHCausalConv1d(
            self.conv_dim, config.mamba_d_conv, config.mamba_conv_bias, config.mamba_hidden_act, self.use_packages
        )
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = NemotronHGatedRMSNorm(self.intermediate_size, config.layer_norm_epsilon, self.n_groups)
        self.out_proj = NemotronHLinear(self.intermediate_size, config.hidden_size, bias=bias)
        self.hook_z, self.hook_x, self.hook_B, self.hook_C = (NemotronHPoint() for _ in range(4))
        self.hook_dt, self.hook_y, self.hook_state = (NemotronHPoint() for _ in range(3))

    def forward(
        self, hidden_states: Tensor, layout: Layout | None = None, cache: caches.MambaLayer | None = None
    ) -> Tensor:
        layout = layout or Layout(hidden_states.shape[1])
        # With a bias a zeroed input still projects to something, so the projection is zeroed as well.
        projected = layout.zero_padding(self.in_proj(layout.zero_padding(hidden_states)))
        normed_BTI = self._few_tokens(projected, layout, cache)
        if normed_BTI is None:
            normed_BTI = self._any_tokens(projected, layout, cache)
        return self.out_proj(normed_BTI)

    fused, fused_step = forward, "mamba"

    def _any_tokens(self, projected: Tensor, layout: Layout, cache: caches.MambaLayer | None) -> Tensor:
        window_BCW, state_BHPN = (None, None) if cache is None else (cache.conv_states, cache.recurrent_states)
        z_BTI, xBC_BTC, dt_BTH = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        z_BTI = through(self.hook_z, z_BTI)

        # Convolution and state must meet the real tokens one after the other.
        xBC_BTC, dt_BTH = layout.compact(xBC_BTC), layout.compact(dt_BTH)
        seq_idx_BT, valid_BT = layout.compact_seq_idx_BT(), layout.compact_valid_BT()
        conv = self.conv1d(xBC_BTC, window_BCW, layout.lengths_B, seq_idx_BT)
        x_BTHP, B_BTGN, C_BTGN = self._split(conv.output, layout)
        dt_BTH = _zero_padding(time_step(dt_BTH, self.dt_bias, self.time_step_limit), valid_BT)
        # Once more: what a hook leaves at padding must not reach the state.
        dt_BTH = _zero_padding(in_slots(self.hook_dt, dt_BTH, layout), valid_BT)
        A_H = decay_rate(self.A_log)

        start = 0 if cache is None else cache.unrecorded(layout)
        seen = hooked(self.hook_state) or layout.recorder is not None and layout.recorder.ssm_states is not None
        scan, start_BHPN = ssd_in_two(
            start, x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, self.D, self.chunk_size, state_BHPN, seq_idx_BT,
            out_state=None if cache is None or seen else cache.buffer(layout), use_packages=self.use_packages,
        )  # fmt: skip
        final_BHPN = through(self.hook_state, scan.final_state)
        if cache is not None:
            cache.update(conv.window, cache.at_rest(final_BHPN))
            step = caches.Step(xBC_BTC, x_BTHP, dt_BTH, A_H, B_BTGN, layout.valid_BT)
            cache.record(step, start, start_BHPN)
        if layout.recorder is not None and layout.recorder.ssm_states is not None:
            layout.recorder.ssm_states[self.layer_idx] = final_BHPN
        y_BTHP = through(self.hook_y, layout.expand(scan.output))
        return self.norm(y_BTHP.flatten(2), z_BTI)

    def _few_tokens(self, projected: Tensor, layout: Layout, cache: caches.MambaLayer | None) -> Tensor | None:
        """A decode step in one op, with the bits of the ops above; None where somebody watches or it cannot be."""
        if torch.compiler.is_compiling() or cache is None or not cache.steps or not layout.is_plain:
            return None
        if projected.is_cuda or self._is_watched() or self.conv1d.act not in ("silu", "swish"):
            return None
        sizes = MambaSizes(
            self.num_heads, self.head_dim, self.n_groups, self.ssm_state_size, self.time_step_limit, self.norm.eps
        )
        A_H = decay_rate(self.A_log)
        args = (
            projected, sizes, self.conv1d.weight[:, 0], self.conv1d.bias, self.dt_bias, A_H, self.D,
            self.norm.weight, cache.conv_states, cache.recurrent_states, cache.buffer(layout),
            cache.record_past,
        )  # fmt: skip
        step = step_if_possible(*args)
        if step is None:
            return None
        cache.update(step.window, cache.at_rest(step.final_state))
        if step.inputs is not None and step.convolved is not None and step.steps is not None:
            recorded = step.inputs, step.convolved, step.steps
            taken = caches.Step.of(recorded, A_H, self.n_groups, self.ssm_state_size)
            cache.record(taken, 0, cache.recurrent_states)
        return step.output

    def _is_watched(self) -> bool:
        """Whether a part that a fused op would skip has hooks, or is somebody's own."""
        if not (untouched(self.conv1d) and untouched(self.norm)):
            return True
        points = (self.hook_z, self.hook_x, self.hook_B, self.hook_C, self.hook_dt, self.hook_y, self.hook_state)
        return any(map(hooked, points)) or self.norm.n_groups != self.n_groups

    def _split(self, xBC_BTC: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        state = self.n_groups * self.ssm_state_size
        x_BTI, B_BTS, C_BTS = xBC_BTC.split([self.intermediate_size, state, state], dim=-1)
        heads, groups = (self.num_heads, self.head_dim), (self.n_groups, self.ssm_state_size)
        return (
            in_slots(self.hook_x, x_BTI.unflatten(-1, heads), layout),
            in_slots(self.hook_B, B_BTS.unflatten(-1, groups), layout),
            in_slots(self.hook_C, C_BTS.unflatten(-1, groups), layout),
        )


def _zero_padding(dt_BTH: Tensor, valid_BT: Tensor | None) -> Tensor:
    return dt_BTH if valid_BT is None else torch.where(valid_BT[..., None], dt_BTH, 0)


class NemotronHAttention(nn.Module):
    """Grouped-query attention without positions."""

    def __init__(self, config: NemotronHConfig, sizes: Layer, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.config = layer_idx, config
        self.head_dim, self.dropout, self.sliding_window = (
            config.head_dim,
            config.attention_dropout,
            sizes.sliding_window,
        )
        query, key = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = NemotronHLinear(config.hidden_size, query, bias=config.attention_bias)
        self.k_proj = NemotronHLinear(config.hidden_size, key, bias=config.attention_bias)
        self.v_proj = NemotronHLinear(config.hidden_size, key, bias=config.attention_bias)
        self.o_proj = NemotronHLinear(query, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        layout: Layout | None = None,
        cache: caches.AttentionLayer | caches.RowsLayer | None = None,
    ) -> Tensor:
        q_BTX, k_BTX, v_BTX = (project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.attend(q_BTX, k_BTX, v_BTX, layout or Layout(hidden_states.shape[1]), cache))

    fused, fused_step = forward, "attention"

    def attend(
        self,
        q_BTX: Tensor,
        k_BTX: Tensor,
        v_BTX: Tensor,
        layout: Layout,
        cache: caches.AttentionLayer | caches.RowsLayer | None,
    ) -> Tensor:
        """Everything between the projections: [B, T, Q·d] of queries [B, T, Q·d], keys and values [B, T, K·d]."""
        heads = (-1, self.head_dim)
        q_BTQd = q_BTX.unflatten(-1, heads)
        k_BKTd, v_BKTd = k_BTX.unflatten(-1, heads).transpose(1, 2), v_BTX.unflatten(-1, heads).transpose(1, 2)
        if not isinstance(cache, caches.RowsLayer):
            return self._attend(q_BTQd, k_BKTd, v_BKTd, layout, cache).flatten(2)
        rows = zip(cache.rows, q_BTQd.split(1), k_BKTd.split(1), v_BKTd.split(1), strict=True)
        each = [self._attend(q, k, v, Layout(layout.tokens, row.length), row) for row, q, k, v in rows]
        return torch.cat(each).flatten(2)

    def _attend(
        self, q_BTQd: Tensor, k_BKSd: Any, v_BKSd: Any, layout: Layout, cache: caches.AttentionLayer | None
    ) -> Tensor:
        if cache is not None:
            k_BKSd, v_BKSd = cache.append(k_BKSd, v_BKSd)
        seen = layout.visibility(self.sliding_window, q_BTQd.device)
        wanted = None if layout.recorder is None else layout.recorder.attentions
        result = attention(
            q_BTQd, k_BKSd, v_BKSd, seen.visible, seen.causal, self.dropout if self.training else 0.0,
            past=seen.past, window=seen.window,
            return_weights=wanted is not None or self.config._attn_implementation == "eager",
        )  # fmt: skip
        if wanted is not None and result.weights is not None:
            wanted[self.layer_idx] = result.weights
        return result.output


class NemotronHMLP(nn.Module):
    """`down(act(up(x)))`, not gated; act is relu² in every published model."""

    def __init__(self, config: NemotronHConfig, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = NemotronHLinear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = NemotronHLinear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act, self.act_fn = config.mlp_hidden_act, activation(config.mlp_hidden_act)

    def forward(self, hidden_states: Tensor, layout: Layout | None = None, cache: CacheLayer | None = None) -> Tensor:
        if self.act_fn is activation(self.act):
            return self.down_proj(activated(self.up_proj, hidden_states, self.act))
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))

    fused, fused_step = forward, "mlp"


class NemotronHTopkRouter(nn.Module):
    """Sigmoid router; its bias takes part in choosing experts only, and is moved by `update_bias`, not by gradients."""

    e_score_correction_bias: Tensor

    def __init__(self, config: NemotronHConfig, sizes: Layer) -> None:
        super().__init__()
        self.top_k, self.n_group, self.topk_group = sizes.num_experts_per_tok, config.n_group, config.topk_group
        self.norm_topk_prob, self.routed_scaling_factor = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(sizes.n_routed_experts, config.hidden_size))
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("e_score_correction_bias", torch.zeros(sizes.n_routed_experts, dtype=wide))
        self.load_E: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NemotronHTopkRouter:
        """`model.bfloat16()` must not round the bias: the choice of experts is float32 whatever the model's dtype."""
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype.itemsize < 4:
            self.e_score_correction_bias = bias_E.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x_MD: Tensor, valid_M: Tensor | None = None) -> Routing:
        routing = route(
            x_MD, self.weight, self.e_score_correction_bias, self.top_k, self.n_group, self.topk_group,
            self.norm_topk_prob, self.routed_scaling_factor,
        )  # fmt: skip
        if self.training:
            dtype = self.e_score_correction_bias.dtype
            load_E = load(routing.experts, self.weight.shape[0], valid_M, dtype)
            self.load_E = load_E if self.load_E is None else self.load_E + load_E
        return routing

    fused = forward

    @torch.no_grad()
    def update_bias(self, rate: float) -> None:
        """`bias += rate · sign(mean load - load)` over the tokens seen in training since the last call; the bias of a
        frozen router stays."""
        load_E, self.load_E = self.load_E, None
        if load_E is not None and self.weight.requires_grad:
            step_E = rate * torch.sign(load_E.mean() - load_E)
            self.e_score_correction_bias += step_E.to(self.e_score_correction_bias)


class NemotronHMoE(nn.Module):
    """Routed experts, between two latent projections where the model has them, plus a shared expert."""

    def __init__(self, config: NemotronHConfig, sizes: Layer, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.gate = NemotronHTopkRouter(config, sizes)
        self.experts = NemotronHExperts(config, sizes)
        shared = sizes.moe_shared_expert_intermediate_size * config.n_shared_experts
        self.shared_experts = NemotronHMLP(config, shared) if shared else None
        self.fc1_latent_proj = self.fc2_latent_proj = None
        if sizes.moe_latent_size is not None:
            self.fc1_latent_proj = NemotronHLinear(config.hidden_size, sizes.moe_latent_size, bias=config.mlp_bias)
            self.fc2_latent_proj = NemotronHLinear(sizes.moe_latent_size, config.hidden_size, bias=config.mlp_bias)
        self.hook_router_experts, self.hook_router_weights = NemotronHPoint(), NemotronHPoint()

    def forward(self, hidden_states: Tensor, layout: Layout | None = None, cache: CacheLayer | None = None) -> Tensor:
        layout = layout or Layout(hidden_states.shape[1])
        x_MD = hidden_states.flatten(0, 1)
        valid_M = None if layout.valid_BT is None else layout.valid_BT.flatten()
        routing = self._seen(self.gate(x_MD, valid_M), hidden_states.shape[1])
        x_ML = x_MD if self.fc1_latent_proj is None else self.fc1_latent_proj(x_MD)
        routed = self.experts(x_ML, routing.experts, routing.weights)
        y_MD = routed if self.fc2_latent_proj is None else self.fc2_latent_proj(routed)
        if self.shared_experts is not None:
            y_MD = add(y_MD, self.shared_experts(x_MD))
        if layout.recorder is not None and layout.recorder.routings is not None:
            layout.recorder.routings[self.layer_idx] = routing
        return y_MD.view_as(hidden_states)

    fused, fused_step = forward, "moe"

    def _seen(self, routing: Routing, tokens: int) -> Routing:
        """The routing by way of its named points, which show it by row: [B, T, k]."""
        if not hooked(self.hook_router_experts) and not hooked(self.hook_router_weights):
            return routing
        experts_BTk = through(self.hook_router_experts, routing.experts.unflatten(0, (-1, tokens)))
        weights_BTk = through(self.hook_router_weights, routing.weights.unflatten(0, (-1, tokens)))
        return routing._replace(experts=experts_BTk.flatten(0, 1), weights=weights_BTk.flatten(0, 1))


MIXERS: dict[str, Callable[[NemotronHConfig, Layer, int], nn.Module]] = {
    "mamba": NemotronHMamba2Mixer,
    "attention": NemotronHAttention,
    "moe": NemotronHMoE,
    "mlp": lambda config, sizes, layer_idx: NemotronHMLP(config, sizes.intermediate_size),
}


def register_block(
    name: str,
    letter: str,
    mixer: Callable[[NemotronHConfig, Layer, int], nn.Module],
    cache_layer: type[CacheLayer] | None = None,
) -> None:
    """Make `name` (in patterns: `letter`) a block type that configs may use.

    Args:
        mixer: Called with (config, the block's sizes, layer index); its module takes
            `(hidden_states [B, T, D], layout, cache)` and returns one [B, T, D] tensor.
        cache_layer: A `CacheLayer` subclass when the block keeps state between passes.

    Raises:
        ConfigError: name or letter is taken or illegal, or `cache_layer` is no such class.
    """
    if cache_layer is not None and not (isinstance(cache_layer, type) and issubclass(cache_layer, CacheLayer)):
        raise ConfigError(f"block type {name!r}: cache_layer must be a subclass of CacheLayer, got {cache_layer!r}")
    family.add_block(BlockType(name, letter, layer_type="linear_attention" if cache_layer else "mlp"))
    MIXERS[name] = mixer
    if cache_layer is not None:
        caches.LAYERS[name] = lambda config: cache_layer()


class NemotronHBlock(GradientCheckpointingLayer):
    """`x + dropout(mixer(norm(x)))`."""

    def __init__(self, config: NemotronHConfig, sizes: Layer, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.block_type, self.dropout = layer_idx, sizes.block_type, config.hidden_dropout
        self.norm = NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MIXERS[sizes.block_type](config, sizes, layer_idx)
        self.step = BlockStep()

    def forward(
        self,
        hidden_states: Tensor,
        layout: Layout,
        past_key_values: NemotronHHybridDynamicCache | DepthCache | None = None,
    ) -> Tensor:
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        stepped = self.step(self, hidden_states, layout, cache)
        if stepped is not None:
            return stepped
        normed = self.norm(hidden_states).to(self.norm.weight.dtype)
        mixed = self.mixer(normed, layout, cache)
        return add(hidden_states, F.dropout(mixed, self.dropout) if self.training else mixed)


class NemotronHModel(NemotronHPreTrainedModel):
    """The trunk: embeddings, blocks, final norm."""

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__(config)
        self.embeddings = NemotronHEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NemotronHBlock(config, config.layer(i), i) for i in range(config.num_hidden_layers))
        self.norm_f = NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()
        self._pack()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: NemotronHHybridDynamicCache | None = None,
        use_cache: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> NemotronHModelOutput | tuple[Any, ...]:
        """Hidden states behind the final norm.

        Args:
            input_ids: [B, T] token ids; or `inputs_embeds` [B, T, D].
            attention_mask: [B, T], or [B, cached + T]: 1 for real tokens, 0 for padding, anywhere in a row.
            position_ids: [B, T]; the model has no positions, but without a mask and a cache a restart marks a new
                packed document. `seq_idx` [B, T] or `cu_seq_lens_q` [documents + 1] say the same.
            past_key_values: Cache to continue from and to extend.
            use_cache: Return a cache. Default: `config.use_cache`, but not in training and not for packed rows.
            kwargs: `output_hidden_states` (-1: only the last ones), `output_attentions`, `output_router_logits`,
                `output_ssm_states`, `return_dict`.

        Raises:
            InputError: shapes, ids or combinations that mean nothing. CacheError: a foreign cache.
        """
        prepared = kwargs.pop("prepared", None) or prepare(
            self, input_ids, inputs_embeds, position_ids, past_key_values, use_cache, attention_mask, kwargs
        )
        layout, cache, options, parts, kept_Bn = prepared
        tokens = cast("Tensor", input_ids if inputs_embeds is None else inputs_embeds)
        hidden_states: list[Tensor] = []
        if parts is not None:

            def run(rows: slice, slots: slice, layout: Layout, cache: NemotronHHybridDynamicCache | None) -> Tensor:
                return self._run(tokens[rows, slots], layout, cache)

            x_BTD = pieces.read(parts, layout, cache, self.config, tokens.shape[0], kept_Bn, run)
        else:
            x_BTD = self._run(tokens, layout, cache, hidden_states if options.hidden_states == "all" else None)
            if cache is not None:
                cache.commit(x_BTD.shape[0], layout.tokens, layout.slots_valid_BS)

        seen = layout.recorder or Recorder()
        output = NemotronHModelOutput(
            last_hidden_state=x_BTD,
            past_key_values=cache,
            hidden_states=None if options.hidden_states == "none" else (*hidden_states, x_BTD),
            attentions=ordered(seen.attentions),
            router_logits=seen.router_logits() if options.router_logits else None,
            ssm_states=ordered(seen.ssm_states),
        )
        return output if options.return_dict else output.to_tuple()

    def _run(
        self,
        tokens: Tensor,
        layout: Layout,
        cache: NemotronHHybridDynamicCache | None,
        hidden_states: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of ids [B, T] or embeddings [B, T, D] behind the final norm; `hidden_states` gets those before
        each block."""
        x_BTD = tokens if tokens.is_floating_point() else self.embeddings(tokens)
        if self.config.residual_in_fp32:
            x_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        x_BTD = F.dropout(x_BTD, self.config.hidden_dropout, self.training)
        for block in self.layers:
            if hidden_states is not None:
                hidden_states.append(x_BTD)
            if layout.tokens:
                x_BTD = block(x_BTD, layout, past_key_values=cache)
        return self.norm_f(x_BTD).to(self.norm_f.weight.dtype)


class NemotronHMTPBlock(NemotronHBlock):
    """A block of an MTP head; the first one also joins embedding and hidden state, the last one also norms."""

    enorm: NemotronHRMSNorm
    hnorm: NemotronHRMSNorm
    eh_proj: NemotronHLinear
    final_layernorm: NemotronHRMSNorm

    def __init__(self, config: NemotronHConfig, index: int) -> None:
        blocks, flat = len(config.mtp_layers_block_type), config.num_hidden_layers + index
        super().__init__(config, config.mtp_layer(index % blocks), flat)
        size, eps = config.hidden_size, config.layer_norm_epsilon
        if index % blocks == 0:
            self.enorm, self.hnorm = NemotronHRMSNorm(size, eps), NemotronHRMSNorm(size, eps)
            self.eh_proj = NemotronHLinear(2 * size, size, bias=False)
        if index % blocks == blocks - 1:
            self.final_layernorm = NemotronHRMSNorm(size, eps)


class NemotronHMTP(nn.Module):
    """Multi-token prediction heads: depth j predicts token t + j + 1 from depth j - 1 and the embedding of token t + j.

    With one head every depth uses it again; with n, depth j uses head min(j, n).
    """

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__()
        self.heads, self.blocks = config.num_nextn_predict_layers, len(config.mtp_layers_block_type)
        self.layers = nn.ModuleList(NemotronHMTPBlock(config, i) for i in range(self.heads * self.blocks))

    def forward(self, hidden_BTD: Tensor, embeds_BTD: Tensor, layout: Layout, depths: int) -> list[Tensor]:
        """Final hidden states [B, T - j, D] of depths j = 1 .. depths, from the trunk's output behind `norm_f`."""
        outputs = []
        # A token's successors are the next real ones.
        hidden_BTD, embeds_BTD, compacted = layout.compact(hidden_BTD), layout.compact(embeds_BTD), layout.compacted()
        for depth in range(1, depths + 1):
            rest = max(0, layout.tokens - depth)
            recorder = None if layout.recorder is None else layout.recorder.at_depth(depth)
            shorter = compacted.first(rest, recorder)
            hidden_BTD = self._run(depth, hidden_BTD[:, :rest], embeds_BTD[:, depth:], shorter)
            outputs.append(layout.expand(hidden_BTD))
        return outputs

    def extend(self, depth: int, hidden_BTD: Tensor, embeds_BTD: Tensor, cache: DepthCache) -> Tensor:
        """Depth `depth` [B, T, D] for the tokens behind those in `cache`, from the depth before it at these positions
        and the embeddings of the tokens `depth` places further."""
        return self._run(depth, hidden_BTD, embeds_BTD, Layout(hidden_BTD.shape[1], cache.length), cache)

    def _run(
        self, depth: int, hidden_BTD: Tensor, embeds_BTD: Tensor, layout: Layout, cache: DepthCache | None = None
    ) -> Tensor:
        if hidden_BTD.shape[1] == 0:
            return hidden_BTD
        first = (min(depth, self.heads) - 1) * self.blocks
        blocks = cast("list[NemotronHMTPBlock]", list(self.layers[first : first + self.blocks]))
        joined = torch.cat([blocks[0].enorm(embeds_BTD), blocks[0].hnorm(hidden_BTD)], dim=-1)
        u_BTD = blocks[0].eh_proj(joined)
        for block in blocks:
            u_BTD = block(u_BTD, layout, past_key_values=cache)
        return blocks[-1].final_layernorm(u_BTD)


class NemotronHForCausalLM(NemotronHPreTrainedModel, NemotronHGenerationMixin):
    """The language model: trunk, `lm_head`, and MTP heads where the config has them."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012 (transformers' own declaration)

    def __init__(self, config: NemotronHConfig) -> None:
        super().__init__(config)
        self.model = NemotronHModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = NemotronHLinear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = NemotronHMTP(config) if config.num_nextn_predict_layers else None
        self.post_init()
        self._pack()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: NemotronHHybridDynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> NemotronHCausalLMOutput | tuple[Any, ...]:
        """Logits [B, T, V] in float32, and with `labels` the loss.

        Args:
            labels: [B, T] token ids, -100 where ignored; shifted inside.
            logits_to_keep: Only the last n positions (0: all), or the positions in a 1-D tensor, or one per row [B, 1].
            kwargs: As `NemotronHModel.forward`; `output_mtp_logits` (True, or a number of depths) and
                `num_items_in_batch` (divides the summed loss instead of the number of labels).

        Raises:
            InputError, CacheError: as `NemotronHModel.forward`; labels outside the vocabulary.
        """
        prepared = prepare(
            self.model,
            input_ids,
            inputs_embeds,
            position_ids,
            past_key_values,
            use_cache,
            attention_mask,
            kwargs,
            labels,
        )
        layout, _, options, _, _ = prepared
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise InputError("labels need all logits: give logits_to_keep=0 with them")
        batch = cast("Tensor", input_ids if inputs_embeds is None else inputs_embeds).shape[0]
        kept_Bn = kept_alone(prepared, batch, logits_to_keep)
        prepared = prepared._replace(options=options._replace(return_dict=True), kept_Bn=kept_Bn)
        trunk = self.model(input_ids, inputs_embeds, prepared=prepared)
        hidden_BTD = trunk.last_hidden_state
        logits_BTV = self.logits_of(hidden_BTD if kept_Bn is not None else keep_positions(hidden_BTD, logits_to_keep))

        mtp_logits = None
        if self.mtp is not None and options.mtp_depths:
            embeds_BTD = self.model.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
            mtp_logits = [
                self.logits_of(h_BTD) for h_BTD in self.mtp(hidden_BTD, embeds_BTD, layout, options.mtp_depths)
            ]

        terms = {} if labels is None else self._losses(logits_BTV, mtp_logits, labels, layout, options.num_items)
        output = NemotronHCausalLMOutput(
            **terms,
            logits=logits_BTV,
            past_key_values=trunk.past_key_values,
            hidden_states=trunk.hidden_states,
            attentions=trunk.attentions,
            router_logits=trunk.router_logits,
            ssm_states=trunk.ssm_states,
            mtp_logits=None if mtp_logits is None else mtp_logits[: options.mtp_shown],
        )
        return output if options.return_dict else output.to_tuple()

    def logits_of(self, hidden_BTD: Tensor) -> Tensor:
        """`lm_head` of hidden states behind the final norm, in float32 (float64 in a float64 model)."""
        return widened(self.lm_head, hidden_BTD)

    def _losses(
        self,
        logits_BTV: Tensor,
        mtp_logits: list[Tensor] | None,
        labels_BT: Tensor,
        layout: Layout,
        num_items: Tensor | int | None,
    ) -> dict[str, Tensor]:
        """`loss` and, each by itself, the terms that it includes where their scale in the config is > 0."""
        config, recorder = self.config, layout.recorder
        terms = {"loss": losses.next_token(logits_BTV, labels_BT, layout, num_items)}
        if mtp_logits:
            terms["mtp_loss"] = losses.mtp(mtp_logits[: config.mtp_loss_depths], labels_BT, layout, num_items)
        if recorder is not None:
            terms |= losses.router_terms(recorder, labels_BT, layout, num_items, config.mtp_loss_depths)
        scales = {
            "mtp_loss": config.mtp_loss_coef,
            "aux_loss": config.router_aux_loss_coef,
            "z_loss": config.router_z_loss_coef,
        }
        for name, scale in scales.items():
            if scale and name in terms:
                terms["loss"] = terms["loss"] + scale * terms[name]
        return terms

    def update_router_bias(self, rate: float = 1e-3) -> None:
        """Move every router's bias towards an even load, after an optimizer step (arXiv 2408.15664)."""
        for module in self.modules():
            if isinstance(module, NemotronHTopkRouter):
                module.update_bias(rate)
