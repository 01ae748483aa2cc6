"""The whole Nemotron-H model in float64 NumPy, one token after the other: the oracle of the tests.

Written to be compared by eye with a description of the model, so it knows no batch, padding, cache, chunk or dropout,
and shares no code with the package. One unpadded sequence at a time: a padded row or a packed document is run alone.

Letters: T tokens, D hidden size, V vocabulary, H mamba heads, P mamba head size, I = H*P, G groups, N state size,
K convolution kernel, C = I + 2GN convolution channels, E experts, Q attention heads, d attention head size.
Weights are named as in a hub checkpoint, linear weights are [out, in], a bias is used if its tensor is there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Tensors = Mapping[str, Array]


@dataclass
class Reference:
    """What one sequence gives; everything float64. The lists have one entry per layer of the trunk that makes one."""

    logits_TV: Array = field(default_factory=lambda: np.zeros((0, 0)))
    hidden_states: list[Array] = field(default_factory=list)
    """layers + 1 of [T, D]: what enters each block, then the output of norm_f."""
    router_logits: list[Array] = field(default_factory=list)
    """[T, E] before the sigmoid."""
    attentions: list[Array] = field(default_factory=list)
    """[Q, T, T] probabilities, 0 where masked."""
    ssm_states: list[Array] = field(default_factory=list)
    """[H, P, N] after the last token."""
    conv_states: list[Array] = field(default_factory=list)
    """[C, K-1] last inputs of the convolution, oldest first, zeros before the sequence began."""
    mtp_logits: list[Array] = field(default_factory=list)
    """[T-j, V] for depth j = 1, 2, ..."""
    selection_margin: float = math.inf
    """Smallest gap between a chosen and a refused expert or group, over all tokens and routers, MTP included."""


# --- elementwise functions and norms ---------------------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


def softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def relu2(x: Array) -> Array:
    return np.maximum(x, 0.0) ** 2


def gelu(x: Array) -> Array:
    erf = np.array([math.erf(value / math.sqrt(2.0)) for value in x.ravel()]).reshape(x.shape)
    return 0.5 * x * (1.0 + erf)


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu2": relu2,
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "identity": lambda x: x,
    "linear": lambda x: x,
}


def rms_norm(x_TD: Array, weight_D: Array, eps: float) -> Array:
    return weight_D * x_TD / np.sqrt(np.mean(x_TD**2, axis=-1, keepdims=True) + eps)


def gated_norm(y_TI: Array, z_TI: Array, weight_I: Array, groups: int, eps: float) -> Array:
    """The gate comes first; then each of the `groups` equal parts of the channels is normalized by itself."""
    u_TI = y_TI * silu(z_TI)
    parts = [part / np.sqrt(np.mean(part**2, axis=-1, keepdims=True) + eps) for part in np.split(u_TI, groups, axis=-1)]
    return weight_I * np.concatenate(parts, axis=-1)


# --- weights ---------------------------------------------------------------------------------------------------------


def tensor(tensors: Tensors, name: str, *shape: int) -> Array:
    """The named weight; the shape is checked because NumPy would broadcast a wrong one in silence."""
    value = tensors[name]
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {value.shape}")
    return value


def linear(tensors: Tensors, name: str, x_TD: Array, width: int | None = None) -> Array:
    """x @ weight.T (+ bias). `width` is the expected number of outputs where the configuration says it."""
    weight = tensors[f"{name}.weight"]
    out = weight.shape[0] if width is None else width
    y = x_TD @ tensor(tensors, f"{name}.weight", out, x_TD.shape[-1]).T
    if f"{name}.bias" in tensors:
        y = y + tensor(tensors, f"{name}.bias", out)
    return y


# --- mamba -----------------------------------------------------------------------------------------------------------


def causal_conv(x_TC: Array, weight_CK: Array, bias_C: Array | float) -> tuple[Array, Array]:
    """Depthwise: y[t] = bias + sum over k of weight[:, k] * x[t - (K-1) + k]. Also returns the last inputs [C, K-1]."""
    kernel = weight_CK.shape[1]
    padded = np.concatenate([np.zeros((kernel - 1, x_TC.shape[1])), x_TC])
    y_TC = np.zeros_like(x_TC)
    for t in range(len(x_TC)):
        for k in range(kernel):
            y_TC[t] += weight_CK[:, k] * padded[t + k]
        y_TC[t] += bias_C
    return y_TC, padded[len(x_TC) :].T


def ssm_recurrence(
    x_THP: Array, dt_TH: Array, A_H: Array, B_TGN: Array, C_TGN: Array, D_H: Array
) -> tuple[Array, Array]:
    """h_t = exp(dt A) h_{t-1} + (dt x_t) outer B_t;  y_t = h_t C_t + D x_t;  head h reads group h // (H / G)."""
    heads, width = x_THP.shape[1:]
    groups, state_size = B_TGN.shape[1:]
    state_HPN = np.zeros((heads, width, state_size))
    y_THP = np.zeros_like(x_THP)
    for t in range(len(x_THP)):
        for h in range(heads):
            g = h // (heads // groups)
            decay = np.exp(dt_TH[t, h] * A_H[h])
            state_HPN[h] = decay * state_HPN[h] + np.outer(dt_TH[t, h] * x_THP[t, h], B_TGN[t, g])
            y_THP[t, h] = state_HPN[h] @ C_TGN[t, g] + D_H[h] * x_THP[t, h]
    return y_THP, state_HPN


def mamba_mixer(config: Any, tensors: Tensors, prefix: str, x_TD: Array) -> tuple[Array, Array, Array]:
    """Returns output [T, D], final SSM state [H, P, N], final convolution state [C, K-1]."""
    H, P, G, N = config.mamba_num_heads, config.mamba_head_dim, config.mamba_n_groups, config.ssm_state_size
    inner, K, tokens = H * P, config.mamba_d_conv, len(x_TD)
    C = inner + 2 * G * N

    projected = linear(tensors, f"{prefix}in_proj", x_TD, inner + C + H)
    z_TI, xBC_TC, dt_TH = np.split(projected, [inner, inner + C], axis=-1)

    bias_C = tensor(tensors, f"{prefix}conv1d.bias", C) if f"{prefix}conv1d.bias" in tensors else 0.0
    conv_TC, conv_state = causal_conv(xBC_TC, tensor(tensors, f"{prefix}conv1d.weight", C, 1, K)[:, 0], bias_C)
    conv_TC = ACTIVATIONS[config.mamba_hidden_act](conv_TC)
    x_TI, B_TGN, C_TGN = np.split(conv_TC, [inner, inner + G * N], axis=-1)

    low, high = config.mamba_dt_limit
    dt_TH = np.clip(softplus(dt_TH + tensor(tensors, f"{prefix}dt_bias", H)), low, high)
    y_THP, ssm_state = ssm_recurrence(
        x_TI.reshape(tokens, H, P),
        dt_TH,
        -np.exp(tensor(tensors, f"{prefix}A_log", H)),
        B_TGN.reshape(tokens, G, N),
        C_TGN.reshape(tokens, G, N),
        tensor(tensors, f"{prefix}D", H),
    )
    norm_I = tensor(tensors, f"{prefix}norm.weight", inner)
    y_TI = gated_norm(y_THP.reshape(tokens, inner), z_TI, norm_I, G, config.layer_norm_epsilon)
    return linear(tensors, f"{prefix}out_proj", y_TI, x_TD.shape[1]), ssm_state, conv_state


# --- attention -------------------------------------------------------------------------------------------------------


def attention_mixer(
    config: Any, tensors: Tensors, prefix: str, x_TD: Array, sliding_window: int | None
) -> tuple[Array, Array]:
    """Returns output [T, D] and probabilities [Q, T, T]. No positions; token i sees j <= i with i - j < window."""
    Q, KV, d, tokens = config.num_attention_heads, config.num_key_value_heads, config.head_dim, len(x_TD)
    q_TQd = linear(tensors, f"{prefix}q_proj", x_TD, Q * d).reshape(tokens, Q, d)
    k_TKd = linear(tensors, f"{prefix}k_proj", x_TD, KV * d).reshape(tokens, KV, d)
    v_TKd = linear(tensors, f"{prefix}v_proj", x_TD, KV * d).reshape(tokens, KV, d)
    probs_QTT = np.zeros((Q, tokens, tokens))
    y_TQd = np.zeros_like(q_TQd)
    for h in range(Q):
        kv = h // (Q // KV)
        for i in range(tokens):
            first = 0 if sliding_window is None else max(0, i - sliding_window + 1)
            scores = k_TKd[first : i + 1, kv] @ q_TQd[i, h] / math.sqrt(d)
            weights = np.exp(scores - scores.max())
            probs_QTT[h, i, first : i + 1] = weights / weights.sum()
            y_TQd[i, h] = probs_QTT[h, i] @ v_TKd[:, kv]
    return linear(tensors, f"{prefix}o_proj", y_TQd.reshape(tokens, Q * d), x_TD.shape[1]), probs_QTT


# --- MLP, router, experts --------------------------------------------------------------------------------------------


def mlp(config: Any, tensors: Tensors, prefix: str, x_TD: Array, width: int | None = None) -> Array:
    """down(act(up(x))), not gated: an MLP block, a routed expert, or the shared expert."""
    up = linear(tensors, f"{prefix}up_proj", x_TD, width)
    return linear(tensors, f"{prefix}down_proj", ACTIVATIONS[config.mlp_hidden_act](up), x_TD.shape[-1])


def largest(scores: Array, count: int) -> tuple[NDArray[np.intp], float]:
    """Indices of the `count` largest scores, the lower index first on ties, and the gap to the next (inf if none)."""
    order = np.argsort(-scores, kind="stable")
    if not 1 <= count <= len(scores):
        raise ValueError(f"cannot choose {count} of {len(scores)}")
    gap = scores[order[count - 1]] - scores[order[count]] if count < len(scores) else math.inf
    return order[:count], float(gap)


def route(config: Any, logits_E: Array, bias_E: Array, experts_per_token: int) -> tuple[NDArray[np.intp], Array, float]:
    """One token. Returns the chosen experts [k], their weights [k], and the margin of the choice.

    The biased score c chooses groups and experts; the weights come from the unbiased s.
    """
    experts = len(logits_E)
    if experts % config.n_group:
        raise ValueError(f"{experts} experts do not split into {config.n_group} equal groups")
    size = experts // config.n_group
    s_E = sigmoid(logits_E)
    c_E = s_E + bias_E

    group_scores = np.array([np.sort(group)[-2:].sum() for group in c_E.reshape(config.n_group, size)])
    kept_groups, group_gap = largest(group_scores, config.topk_group)
    if experts_per_token > size * config.topk_group:
        raise ValueError(f"cannot choose {experts_per_token} experts of {config.topk_group} groups of {size}")
    allowed_E = np.full(experts, -math.inf)
    for group in kept_groups:
        allowed_E[group * size : (group + 1) * size] = c_E[group * size : (group + 1) * size]
    chosen, expert_gap = largest(allowed_E, experts_per_token)

    weights = s_E[chosen]
    if config.norm_topk_prob:
        weights = weights / (weights.sum() + 1e-20)
    return chosen, weights * config.routed_scaling_factor, min(group_gap, expert_gap)


def moe_mixer(config: Any, layer: Any, tensors: Tensors, prefix: str, x_TD: Array) -> tuple[Array, Array, float]:
    """Returns output [T, D], router logits [T, E] and the smallest margin. Router and shared expert see the full D."""
    E = layer.n_routed_experts
    logits_TE = linear(tensors, f"{prefix}gate", x_TD, E)
    bias_name = f"{prefix}gate.e_score_correction_bias"
    bias_E = tensor(tensors, bias_name, E) if bias_name in tensors else np.zeros(E)

    inner_TL = x_TD
    if layer.moe_latent_size:
        inner_TL = linear(tensors, f"{prefix}fc1_latent_proj", x_TD, layer.moe_latent_size)
    routed_TL = np.zeros_like(inner_TL)
    margin = math.inf
    for t in range(len(x_TD)):
        chosen, weights, gap = route(config, logits_TE[t], bias_E, layer.num_experts_per_tok)
        margin = min(margin, gap)
        for expert, weight in zip(chosen, weights, strict=True):
            routed_TL[t] += weight * mlp(config, tensors, f"{prefix}experts.{expert}.", inner_TL[t])
    out_TD = routed_TL
    if layer.moe_latent_size:
        out_TD = linear(tensors, f"{prefix}fc2_latent_proj", routed_TL, x_TD.shape[1])
    shared_width = (config.n_shared_experts or 0) * (layer.moe_shared_expert_intermediate_size or 0)
    if shared_width:
        out_TD = out_TD + mlp(config, tensors, f"{prefix}shared_experts.", x_TD, shared_width)
    return out_TD, logits_TE, margin


# --- the model -------------------------------------------------------------------------------------------------------


def block(config: Any, layer: Any, kind: str, tensors: Tensors, prefix: str, x_TD: Array, record: Reference) -> Array:
    """x + mixer(RMSNorm(x)); what the mixer shows besides its output goes to `record`."""
    n_TD = rms_norm(x_TD, tensor(tensors, f"{prefix}norm.weight", x_TD.shape[1]), config.layer_norm_epsilon)
    mixer = f"{prefix}mixer."
    if kind == "mamba":
        out_TD, ssm_state, conv_state = mamba_mixer(config, tensors, mixer, n_TD)
        record.ssm_states.append(ssm_state)
        record.conv_states.append(conv_state)
    elif kind == "attention":
        out_TD, probs_QTT = attention_mixer(config, tensors, mixer, n_TD, layer.sliding_window)
        record.attentions.append(probs_QTT)
    elif kind == "moe":
        out_TD, router_logits, margin = moe_mixer(config, layer, tensors, mixer, n_TD)
        record.router_logits.append(router_logits)
        record.selection_margin = min(record.selection_margin, margin)
    elif kind == "mlp":
        out_TD = mlp(config, tensors, mixer, n_TD)
    else:
        raise ValueError(f"unknown block type {kind!r}: expected mamba, attention, moe or mlp")
    return x_TD + out_TD


def layer_settings(config: Any, method: str, index: int, kinds: Sequence[str]) -> tuple[str, Any]:
    """Block type and the object that holds the layer's own sizes: the configuration itself where layers do not vary."""
    per_layer = getattr(config, method, None)
    if per_layer is None:
        return kinds[index], config
    layer = per_layer(index)
    return layer.block_type, layer


def lm_head(config: Any, tensors: Tensors, h_TD: Array) -> Array:
    if config.tie_word_embeddings:
        return h_TD @ tensors["backbone.embeddings.weight"].T
    return linear(tensors, "lm_head", h_TD)


def multi_token_prediction(
    config: Any, tensors: Tensors, embeds_TD: Array, hidden_TD: Array, depths: int, result: Reference
) -> None:
    """Appends the logits of depths 1..`depths` to `result`. `hidden_TD` is the trunk's output after norm_f.

    Depth j at position t joins token t+j with h_{j-1}[t] and predicts token t+j+1. It uses head min(j, heads), counted
    from 1; the sub-blocks of all heads are numbered through. Every depth is a sequence of its own.
    """
    heads, kinds, eps = config.num_nextn_predict_layers, config.mtp_layers_block_type, config.layer_norm_epsilon
    if not heads:
        raise ValueError(f"{depths} MTP depths were asked for, but num_nextn_predict_layers is {heads}")
    D = embeds_TD.shape[1]
    h_TD = hidden_TD
    for j in range(1, depths + 1):
        first = (min(j, heads) - 1) * len(kinds)
        last = first + len(kinds) - 1
        e_TD = rms_norm(embeds_TD[j:], tensor(tensors, f"mtp.layers.{first}.enorm.weight", D), eps)
        n_TD = rms_norm(h_TD[: len(e_TD)], tensor(tensors, f"mtp.layers.{first}.hnorm.weight", D), eps)
        u_TD = linear(tensors, f"mtp.layers.{first}.eh_proj", np.concatenate([e_TD, n_TD], axis=-1), D)
        record = Reference()
        for position in range(len(kinds)):
            kind, layer = layer_settings(config, "mtp_layer", position, kinds)
            u_TD = block(config, layer, kind, tensors, f"mtp.layers.{first + position}.", u_TD, record)
        h_TD = rms_norm(u_TD, tensor(tensors, f"mtp.layers.{last}.final_layernorm.weight", D), eps)
        result.mtp_logits.append(lm_head(config, tensors, h_TD))
        result.selection_margin = min(result.selection_margin, record.selection_margin)


def embed(table_VD: Array, input_ids: ArrayLike | None, inputs_embeds: ArrayLike | None) -> Array:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if inputs_embeds is not None:
        embeds_TD = np.array(inputs_embeds, dtype=np.float64)
        if embeds_TD.ndim != 2 or embeds_TD.shape[1] != table_VD.shape[1]:
            raise ValueError(f"inputs_embeds: expected one sequence [T, {table_VD.shape[1]}], got {embeds_TD.shape}")
        return embeds_TD
    ids_T = np.asarray(input_ids, dtype=np.int64)
    if ids_T.ndim != 1 or np.any(ids_T < 0) or np.any(ids_T >= len(table_VD)):
        raise ValueError(f"input_ids: expected one sequence of ids in 0..{len(table_VD) - 1}, got {ids_T.tolist()}")
    return table_VD[ids_T]


def run(
    config: Any,
    tensors: Mapping[str, Any],
    input_ids: ArrayLike | None = None,
    inputs_embeds: ArrayLike | None = None,
    mtp_depths: int = 0,
) -> Reference:
    """The model on one sequence: ids [T], or embeddings [T, D], which then also stand for the tokens that MTP reads.

    `config` has the documented attribute names with all optional values filled in. Where layers vary,
    `config.layer(i)` gives block_type, n_routed_experts, num_experts_per_tok, moe_latent_size,
    moe_shared_expert_intermediate_size and sliding_window of layer i, and `config.mtp_layer(position)` those of a
    position in the MTP pattern. Widths of MLPs and experts are read off their weights.
    """
    weights: Tensors = {name: np.asarray(value, dtype=np.float64) for name, value in tensors.items()}
    kinds = config.layers_block_type
    result = Reference()
    embeds_TD = embed(weights["backbone.embeddings.weight"], input_ids, inputs_embeds)

    x_TD = embeds_TD
    for i in range(len(kinds)):
        result.hidden_states.append(x_TD)
        kind, layer = layer_settings(config, "layer", i, kinds)
        x_TD = block(config, layer, kind, weights, f"backbone.layers.{i}.", x_TD, result)
    norm_D = tensor(weights, "backbone.norm_f.weight", x_TD.shape[1])
    hidden_TD = rms_norm(x_TD, norm_D, config.layer_norm_epsilon)
    result.hidden_states.append(hidden_TD)
    result.logits_TV = lm_head(config, weights, hidden_TD)
    if mtp_depths:
        multi_token_prediction(config, weights, embeds_TD, hidden_TD, mtp_depths, result)
    return result


# --- losses ----------------------------------------------------------------------------------------------------------


def shifted_cross_entropy(logits_TV: Array, labels_T: ArrayLike, shift: int, ignore: int) -> float:
    """Mean of -log softmax(logits[t])[labels[t + shift]] over the labels that count; nan, as in torch, without any."""
    labels = np.asarray(labels_T, dtype=np.int64)
    losses = []
    for t in range(len(labels) - shift):
        label = labels[t + shift]
        if label != ignore:
            if not 0 <= label < logits_TV.shape[1]:
                raise ValueError(f"label {label} is neither {ignore} nor in 0..{logits_TV.shape[1] - 1}")
            top = logits_TV[t].max()
            losses.append(top + np.log(np.exp(logits_TV[t] - top).sum()) - logits_TV[t, label])
    return float(np.mean(losses)) if losses else math.nan


def next_token_loss(logits_TV: Array, labels_T: ArrayLike, ignore: int = -100) -> float:
    return shifted_cross_entropy(logits_TV, labels_T, 1, ignore)


def mtp_loss(reference: Reference, labels_T: ArrayLike, depths: int) -> float:
    """Mean over depths 1..`depths`, without the loss scale; depth j predicts token t+j+1 from position t."""
    if not 1 <= depths <= len(reference.mtp_logits):
        raise ValueError(f"asked for {depths} depths of {len(reference.mtp_logits)} that were run")
    losses = [shifted_cross_entropy(reference.mtp_logits[j - 1], labels_T, j + 1, -100) for j in range(1, depths + 1)]
    return float(np.mean(losses))
