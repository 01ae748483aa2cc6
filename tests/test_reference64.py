"""Checks of the float64 reference by numbers that can be worked out by hand; everything else is compared with it."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import reference64 as ref

IDS, INF = [3, 1, 4, 1, 5, 9, 2], math.inf


def make_config(**changes: Any) -> SimpleNamespace:
    config = SimpleNamespace(
        hidden_size=6, head_dim=5, num_attention_heads=4, num_key_value_heads=2, sliding_window=None, mamba_num_heads=4,
        mamba_head_dim=3, mamba_n_groups=2, ssm_state_size=5, mamba_d_conv=4, mamba_dt_limit=(0.0, INF), n_group=2,
        mamba_hidden_act="silu", mlp_hidden_act="relu2", moe_latent_size=None, n_routed_experts=6, n_shared_experts=1,
        num_experts_per_tok=2, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.0, layer_norm_epsilon=1e-5,
        moe_shared_expert_intermediate_size=7, num_nextn_predict_layers=1, mtp_layers_block_type=["attention", "moe"],
        layers_block_type=["mamba", "moe", "attention", "mlp"], tie_word_embeddings=False)  # fmt: skip
    vars(config).update(changes)
    return config


def make_tensors(config: SimpleNamespace) -> dict[str, np.ndarray]:
    D, H, inner, C, q, kv, E, F, S, L = 6, 4, 12, 32, 20, 10, 6, 4, 7, config.moe_latent_size or 6
    mixers: dict[str, dict[str, tuple[int, ...]]] = {
        "mamba": {"in_proj.weight": (inner + C + H, D), "out_proj.weight": (D, inner), "norm.weight": (inner,)}
        | {"conv1d.weight": (C, 1, 4), "conv1d.bias": (C,), "dt_bias": (H,), "A_log": (H,), "D": (H,)},
        "attention": {f"{n}_proj.weight": s for n, s in [("q", (q, D)), ("k", (kv, D)), ("v", (kv, D)), ("o", (D, q))]},
        "mlp": {"up_proj.weight": (8, D), "down_proj.weight": (D, 8)},
        "moe": {"gate.weight": (E, D), "gate.e_score_correction_bias": (E,)}
        | {"fc1_latent_proj.weight": (L, D), "fc2_latent_proj.weight": (D, L)}
        | {"shared_experts.up_proj.weight": (S, D), "shared_experts.down_proj.weight": (D, S)}
        | {f"experts.{e}.{n}_proj.weight": s for e in range(E) for n, s in [("up", (F, L)), ("down", (L, F))]},
    }
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (11, D), "backbone.norm_f.weight": (D,)}
    shapes["lm_head.weight"] = (11, D)
    pattern, heads = config.mtp_layers_block_type, config.num_nextn_predict_layers
    blocks = [(f"backbone.layers.{i}.", kind) for i, kind in enumerate(config.layers_block_type)]
    for prefix, kind in blocks + [(f"mtp.layers.{i}.", kind) for i, kind in enumerate(pattern * heads)]:
        shapes |= {f"{prefix}norm.weight": (D,)} | {f"{prefix}mixer.{n}": s for n, s in mixers[kind].items()}
    for flat in range(0, heads * len(pattern), len(pattern)):
        shapes |= {f"mtp.layers.{flat}.enorm.weight": (D,), f"mtp.layers.{flat}.hnorm.weight": (D,)}
        shapes[f"mtp.layers.{flat}.eh_proj.weight"] = (D, 2 * D)
        shapes[f"mtp.layers.{flat + len(pattern) - 1}.final_layernorm.weight"] = (D,)
    rng = np.random.default_rng(0)
    return {name: rng.normal(0.1, 0.6, shape) for name, shape in shapes.items()}


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("relu2", [4.0, 0.0]), ("relu", [2.0, 0.0]), ("identity", [2.0, -1.0]), ("linear", [2.0, -1.0]),
     ("silu", [1.7615941559557649, -0.2689414213699951]), ("swish", [1.7615941559557649, -0.2689414213699951]),
     ("sigmoid", [0.8807970779778823, 0.2689414213699951]), ("tanh", [0.964027580075817, -0.7615941559557649]),
     ("gelu", [1.9544997361036416, -0.15865525393145707]), ("gelu_new", [1.954597694087775, -0.15880800939172324]),
     ("gelu_pytorch_tanh", [1.954597694087775, -0.15880800939172324])],
)  # fmt: skip
def test_activations_at_known_points(name: str, expected: list[float]) -> None:
    assert_allclose(ref.ACTIVATIONS[name](np.array([2.0, -1.0])), expected, rtol=1e-12)


@pytest.mark.parametrize(("dt_bias", "limit"), [(0.2, (0.0, INF)), (0.2, (1.0, 1.1)), (-20.0, (0.0, INF))])
def test_mamba_of_one_channel_unrolled(dt_bias: float, limit: tuple[float, float]) -> None:
    config = make_config(mamba_num_heads=1, mamba_head_dim=1, mamba_n_groups=1, ssm_state_size=1, mamba_d_conv=2)
    config.mamba_dt_limit, config.layer_norm_epsilon = limit, 0.1
    tensors = {
        "in_proj.weight": [[0.5], [1.0], [2.0], [-1.0], [0.3]],  # z, x, B, C, dt
        "conv1d.weight": [[[0.5, 1.0]], [[-1.0, 0.75]], [[0.2, -1.0]]], "conv1d.bias": [0.1, 0.0, -0.3],
        "dt_bias": [dt_bias], "A_log": [math.log(2.0)], "D": [0.25], "norm.weight": [1.5], "out_proj.weight": [[2.0]],
    }  # fmt: skip
    arrays = {name: np.array(value) for name, value in tensors.items()}
    out, ssm_state, conv_state = ref.mamba_mixer(config, arrays, "", np.array([[1.0], [2.0]]))

    silu = np.vectorize(lambda v: v / (1.0 + math.exp(-v)))
    # inputs of the convolution: x 1, 2; B 2, 4; C -1, -2
    x0, B0, C0 = silu(1.0 + 0.1), silu(0.75 * 2.0), silu(1.0 - 0.3)
    x1, B1, C1 = silu(0.5 + 2.0 + 0.1), silu(-2.0 + 0.75 * 4.0), silu(-0.2 + 2.0 - 0.3)
    dt0, dt1 = (min(max(math.log1p(math.exp(v + dt_bias)), limit[0]), limit[1]) for v in (0.3, 0.6))
    h0 = dt0 * x0 * B0
    h1 = math.exp(-2.0 * dt1) * h0 + dt1 * x1 * B1
    u0, u1 = (h0 * C0 + 0.25 * x0) * silu(0.5), (h1 * C1 + 0.25 * x1) * silu(1.0)
    assert_allclose(out[:, 0], [3.0 * u / math.sqrt(u * u + 0.1) for u in (u0, u1)], rtol=1e-12)
    assert_allclose(ssm_state, [[[h1]]], rtol=1e-12)
    assert_array_equal(conv_state, [[2.0], [4.0], [-2.0]])


def test_recurrence_equals_quadratic_form() -> None:
    rng = np.random.default_rng(1)
    x, dt, A = rng.normal(size=(9, 4, 3)), rng.uniform(0.01, 1.0, (9, 4)), -rng.uniform(0.1, 2.0, 4)
    B, C, D = rng.normal(size=(9, 2, 5)), rng.normal(size=(9, 2, 5)), rng.normal(size=4)
    y, state = ref.ssm_recurrence(x, dt, A, B, C, D)
    for h, g in enumerate([0, 0, 1, 1]):
        total = np.cumsum(dt[:, h] * A[h])
        L = np.tril(np.exp(total[:, None] - total[None, :]))
        dx = dt[:, h, None] * x[:, h]
        assert_allclose(y[:, h], (C[:, g] @ B[:, g].T * L) @ dx + D[h] * x[:, h], rtol=1e-11, atol=1e-12)
        assert_allclose(state[h], (np.exp(total[-1] - total)[:, None] * dx).T @ B[:, g], rtol=1e-11, atol=1e-12)


def test_gated_norm_gates_first_and_norms_each_group() -> None:
    y, z, w = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[0.0, 1.0, -1.0, 2.0]]), np.array([1.0, 2.0, 3.0, 4.0])
    u1, u2, u3 = 2.0 / (1.0 + math.exp(-1.0)), -3.0 / (1.0 + math.exp(1.0)), 4.0 * 2.0 / (1.0 + math.exp(-2.0))
    first, second = math.sqrt(u1 * u1 / 2 + 0.5), math.sqrt((u2 * u2 + u3 * u3) / 2 + 0.5)
    assert_allclose(ref.gated_norm(y, z, w, 2, 0.5)[0], [0, 2 * u1 / first, 3 * u2 / second, 4 * u3 / second], 1e-12)


def test_short_sequence_leaves_zeros_in_conv_state() -> None:
    y, state = ref.causal_conv(np.array([[3.0], [5.0]]), np.array([[1.0, 10.0, 100.0, 1000.0]]), 0.5)
    assert_array_equal(y, [[3000.5], [5300.5]])
    assert_array_equal(state, [[0.0, 3.0, 5.0]])


def test_attention_scale_grouping_window_and_bias() -> None:
    """Four query heads read x0 times 0, 0, 1, 3; key heads x1, 2 x1; value heads x0, x1; head size 4."""
    config, x = make_config(hidden_size=2, head_dim=4), np.array([[1.0, 0.0], [2.0, 1.0], [3.0, 5.0]])
    q, k, v, o = np.zeros((16, 2)), np.zeros((8, 2)), np.zeros((8, 2)), np.zeros((2, 16))
    q[[8, 12], 0], k[[0, 4], 1], v[0, 0], v[4, 1] = [1.0, 3.0], [1.0, 2.0], 1.0, 1.0
    o[0, [0, 4]], o[1, [8, 12]] = [1.0, 10.0], [1.0, 10.0]
    arrays = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": o, "o_proj.bias": x[0] / 2}
    out, probs = ref.attention_mixer(config, arrays, "", x, None)
    p, p3 = 1.0 / (1.0 + math.exp(-2.0)), 1.0 / (1.0 + math.exp(-6.0))  # second token: scores 4 and 12 over sqrt(4)
    assert_allclose(probs[:, 1], [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1 - p, p, 0.0], [1 - p3, p3, 0.0]], rtol=1e-12)
    assert_allclose(out[:2], [[11.5, 0.0], [17.0, p + 10.0 * p3]], rtol=1e-12)
    assert_allclose(probs[0, 2], [1 / 3, 1 / 3, 1 / 3])
    _, probs = ref.attention_mixer(config, arrays, "", x, 2)
    assert_allclose(probs[0], [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])


@pytest.mark.parametrize(
    ("bias", "changes", "experts", "weights", "margin"),
    [
        # group sums 1.0 and 1.1: the second group wins although the best expert is in the first
        ([0, 0, 0, 0, 0, 0], {}, [3, 4], [0.6 / 1.1, 0.5 / 1.1], 0.1),
        # the bias puts expert 5 (c = 0.55) before 4 (c = 0.5), but its weight stays 0.2
        ([0, 0, 0, 0, 0, 0.35], {"routed_scaling_factor": 2.5}, [3, 5], [2.5 * 0.6 / 0.8, 2.5 * 0.2 / 0.8], 0.05),
        ([0, 0, 0, 0, 0, 0], {"norm_topk_prob": False, "n_group": 1}, [0, 3], [0.9, 0.6], 0.1),
        # a refused group is out even where every kept score is negative; equal scores: the lower index
        ([-2, -2, -2, -3, -3, -3], {"norm_topk_prob": False}, [0, 1], [0.9, 0.1], 0.0),
    ],
)
def test_router_worked_examples(bias: list, changes: dict, experts: list, weights: list, margin: float) -> None:
    s = np.array([0.9, 0.1, 0.1, 0.6, 0.5, 0.2])
    chosen, got, gap = ref.route(make_config(**changes), np.log(s / (1.0 - s)), np.array(bias, dtype=float), 2)
    assert chosen.tolist() == experts
    assert_allclose([*got, gap], [*weights, margin], atol=1e-12)


def test_moe_latent_shared_and_biases() -> None:
    config = make_config(moe_latent_size=3, n_group=1, num_experts_per_tok=6, routed_scaling_factor=2.0)
    a = {name.removeprefix("backbone.layers.1.mixer."): value for name, value in make_tensors(config).items()}
    a |= {"fc1_latent_proj.bias": np.full(3, 0.3), "fc2_latent_proj.bias": np.full(6, 0.2)}
    a |= {"experts.4.up_proj.bias": np.full(4, 0.4), "shared_experts.down_proj.bias": np.full(6, -0.7)}
    x = np.random.default_rng(2).normal(size=6)
    s = 1.0 / (1.0 + np.exp(-(a["gate.weight"] @ x)))
    latent, total = a["fc1_latent_proj.weight"] @ x + 0.3, np.zeros(3)
    for e in range(6):
        up = np.maximum(a[f"experts.{e}.up_proj.weight"] @ latent + (0.4 if e == 4 else 0.0), 0.0) ** 2
        total += 2.0 * s[e] / s.sum() * (a[f"experts.{e}.down_proj.weight"] @ up)
    routed = a["fc2_latent_proj.weight"] @ total + 0.2
    shared = a["shared_experts.down_proj.weight"] @ np.maximum(a["shared_experts.up_proj.weight"] @ x, 0.0) ** 2 - 0.7
    out, logits, margin = ref.moe_mixer(config, config, a, "", x[None])
    assert_allclose(out[0], routed + shared, rtol=1e-11)
    assert_allclose([*logits[0], margin], [*(a["gate.weight"] @ x), INF])
    config.n_shared_experts = 0
    assert_allclose(ref.moe_mixer(config, config, a, "", x[None])[0][0], routed, rtol=1e-11)


def test_model_is_residual_causal_and_complete() -> None:
    config, tensors = make_config(), make_tensors(make_config())
    out, table = ref.run(config, tensors, IDS, mtp_depths=2), tensors["backbone.embeddings.weight"]
    assert_array_equal(out.hidden_states[0], table[IDS])
    normed = norm(out.hidden_states[3], tensors["backbone.layers.3.norm.weight"])
    mlp = ref.mlp(config, tensors, "backbone.layers.3.mixer.", normed)
    last = norm(out.hidden_states[3] + mlp, tensors["backbone.norm_f.weight"])
    assert_allclose(out.hidden_states[4], last, rtol=1e-12)
    assert_allclose(out.logits_TV, last @ tensors["lm_head.weight"].T, rtol=1e-12)
    lists = [out.hidden_states, out.ssm_states, out.conv_states, out.attentions, out.router_logits, out.mtp_logits]
    shapes = [[(7, 6)] * 5, [(4, 3, 5)], [(32, 3)], [(4, 7, 7)], [(7, 6)], [(6, 11), (5, 11)]]
    assert [[array.shape for array in part] for part in lists] == shapes
    assert_array_equal(ref.run(config, tensors, None, table[IDS], mtp_depths=2).mtp_logits[1], out.mtp_logits[1])
    assert_allclose(ref.run(make_config(tie_word_embeddings=True), tensors, IDS).logits_TV, last @ table.T, rtol=1e-12)
    other = ref.run(config, tensors, [*IDS[:-1], 7], mtp_depths=2)
    for ours, theirs in zip([out.logits_TV, *out.mtp_logits], [other.logits_TV, *other.mtp_logits], strict=True):
        assert_array_equal(ours[:-1], theirs[:-1])
        assert abs(ours[-1] - theirs[-1]).max() > 1e-3


@pytest.mark.parametrize(("index", "change"), [(0, {"sliding_window": 2}), (1, {"num_experts_per_tok": 6})])
def test_layers_may_differ(index: int, change: dict[str, int]) -> None:
    config = make_config(layers_block_type=["attention", "moe"], n_group=1, moe_latent_size=3)
    tensors = make_tensors(config)
    plain = [SimpleNamespace(**vars(config), block_type=kind) for kind in config.layers_block_type]
    other = [SimpleNamespace(**(vars(layer) | (change if i == index else {}))) for i, layer in enumerate(plain)]
    same = ref.run(config, tensors, IDS, mtp_depths=1)
    vars(config).update(n_routed_experts=None, num_experts_per_tok=None, moe_latent_size=None)
    for trunk, mtp in [(plain, plain), (plain, other), (other, plain)]:
        config.layer, config.mtp_layer = trunk.__getitem__, mtp.__getitem__
        out = ref.run(config, tensors, IDS, mtp_depths=1)
        assert (abs(out.logits_TV - same.logits_TV).max() > 1e-3) == (trunk is other)
        assert (abs(out.mtp_logits[0] - same.mtp_logits[0]).max() > 1e-3) == (trunk is other or mtp is other)


def test_mtp_reads_embedding_first_and_recurs_after_its_norm() -> None:
    config = make_config(mtp_layers_block_type=["mlp"])
    tensors = make_tensors(config)
    tensors["mtp.layers.0.mixer.down_proj.weight"][:] = 0.0  # the block adds nothing
    R, zero = np.random.default_rng(3).normal(size=(6, 6)), np.zeros((6, 6))
    final, head = tensors["mtp.layers.0.final_layernorm.weight"], tensors["lm_head.weight"]
    tensors["mtp.layers.0.eh_proj.weight"] = np.hstack([R, zero])
    out = ref.run(config, tensors, IDS, mtp_depths=2)
    e = norm(tensors["backbone.embeddings.weight"][IDS], tensors["mtp.layers.0.enorm.weight"]) @ R.T
    for j in (1, 2):
        assert_allclose(out.mtp_logits[j - 1], norm(e[j:], final) @ head.T, rtol=1e-11)
    tensors["mtp.layers.0.eh_proj.weight"] = np.hstack([zero, R])
    out = ref.run(config, tensors, IDS, mtp_depths=7)
    h = out.hidden_states[-1]
    for logits in out.mtp_logits:  # the last depth has no position left
        h = norm(norm(h[:-1], tensors["mtp.layers.0.hnorm.weight"]) @ R.T, final)
        assert_allclose(logits, h @ head.T, rtol=1e-10)


def test_mtp_depth_uses_its_head_then_the_last() -> None:
    config = make_config(layers_block_type=["mlp"], num_nextn_predict_layers=2, mtp_layers_block_type=["mamba", "moe"])
    tensors = make_tensors(config)
    before = ref.run(config, tensors, IDS, mtp_depths=3).mtp_logits
    for name in ("mtp.layers.2.enorm.weight", "mtp.layers.2.mixer.A_log", "mtp.layers.3.final_layernorm.weight"):
        after = ref.run(config, tensors | {name: tensors[name] + 1.0}, IDS, mtp_depths=3).mtp_logits
        assert [abs(a - b).max() > 1e-3 for a, b in zip(before, after, strict=True)] == [False, True, True]
    margins = [ref.run(config, tensors, IDS, mtp_depths=depths).selection_margin for depths in (0, 1, 3)]
    assert INF == margins[0] > margins[1] >= margins[2] > 0


def test_losses() -> None:
    logits = np.log(np.array([[1.0, 3.0], [1.0, 1.0], [3.0, 1.0]]))
    assert_allclose(ref.next_token_loss(logits, [0, 1, 0]), (math.log(4 / 3) + math.log(2.0)) / 2)
    assert_allclose(ref.next_token_loss(logits, [0, -100, 0]), math.log(2.0))
    assert math.isnan(ref.next_token_loss(logits, [0, -100, -100]))
    depths = ref.Reference(mtp_logits=[logits, logits[1:]])
    # labels of 4 tokens: depth 1 predicts labels 2 and 3, depth 2 label 3
    assert_allclose(ref.mtp_loss(depths, [1, 1, 0, 1], 2), ((math.log(4.0) + math.log(2.0)) / 2 + math.log(2.0)) / 2)
    assert_allclose(ref.mtp_loss(depths, [1, 1, 0, -100], 1), math.log(4.0))
