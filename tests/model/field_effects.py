"""What every field of the documented configuration does, one check per name; test_fields.py runs them.

A check builds models that differ in its field alone and sees the documented difference.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import assert_close, draw_ids, error, tiny_config, tiny_model
from nemotron_h import NemotronHForCausalLM
from nemotron_h.errors import ConfigError

Effect = Callable[[], None]
EFFECTS: dict[str, Effect] = {}


def effect(check: Effect) -> Effect:
    """Register the check of the field that it is named after."""
    EFFECTS[check.__name__] = check
    return check


def shapes(**fields: Any) -> dict[str, tuple[int, ...]]:
    """Parameter and buffer names with shapes."""
    model = NemotronHForCausalLM(tiny_config(**fields))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def added(**fields: Any) -> set[str]:
    """Last two parts of the names that these fields add to the checkpoint."""
    return {".".join(name.split(".")[-2:]) for name in shapes(**fields).keys() - shapes().keys()}


@torch.no_grad()
def logits(**fields: Any) -> Tensor:
    """Of a model with the same drawn weights whatever fields that add none say."""
    model = tiny_model(**fields)
    return model(draw_ids(model, 2, 12)).logits


def alter_logits(name: str, value: Any, **others: Any) -> None:
    """Register: with the same tensors, another value gives other logits."""

    def check() -> None:
        a, b = tiny_model(**others), tiny_model(**others, **{name: value})
        assert getattr(a.config, name) != getattr(b.config, name)
        for (key, ours), (_, theirs) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
            assert torch.equal(ours, theirs), f"{key}: the weights must be the same"
        assert error(logits(**others, **{name: value}), logits(**others)) > 1e-3

    EFFECTS[name] = check


def alter_nothing(name: str, value: Any, bound: float) -> None:
    """Register: speed and rounding only."""

    def check() -> None:
        assert getattr(tiny_config(), name) != value
        assert_close(logits(**{name: value}), logits(), name, bound)

    EFFECTS[name] = check


def set_shape(name: str, value: Any, tensor: str, shape: tuple[int, ...]) -> None:
    """Register: this tensor gets this shape."""

    def check() -> None:
        key = f"model.layers.{tensor}"
        assert shapes()[key] != shapes(**{name: value})[key] == shape
        assert logits(**{name: value}).isfinite().all()

    EFFECTS[name] = check


def add_tensors(name: str, *tensors: str) -> None:
    """Register: True adds these to the checkpoint, by the last two parts of their names."""

    def check() -> None:
        assert added(**{name: True}) == set(tensors)

    EFFECTS[name] = check


alter_nothing("use_mamba_kernels", False, 0)
alter_nothing("moe_shared_expert_overlap", False, 0)
alter_nothing("mamba_chunk_size", 5, 1e-5)
alter_logits("mlp_hidden_act", "silu")
alter_logits("mamba_hidden_act", "relu")
alter_logits("mamba_dt_limit", (0.2, 0.3))
alter_logits("routed_scaling_factor", 1.0)
alter_logits("norm_topk_prob", False)
alter_logits("layer_norm_epsilon", 0.1)
alter_logits("n_group", 4)
alter_logits("topk_group", 2)
set_shape("mamba_head_dim", 3, "0.mixer.norm.weight", (6 * 3,))
set_shape("moe_intermediate_size", 7, "1.mixer.experts.up_proj", (8, 7, 16))
set_shape("moe_shared_expert_intermediate_size", 7, "1.mixer.shared_experts.down_proj.weight", (32, 7))
add_tensors("attention_bias", "q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias")
add_tensors("mamba_proj_bias", "in_proj.bias", "out_proj.bias")
add_tensors("use_bias", "in_proj.bias", "out_proj.bias")


@effect
def vocab_size() -> None:
    found = shapes(vocab_size=13)
    assert found["model.embeddings.weight"] == found["lm_head.weight"] == (13, 32)
    assert logits(vocab_size=13).shape == (2, 12, 13)


@effect
def hidden_size() -> None:
    model = tiny_model(hidden_size=20)
    out = model(draw_ids(model, 1, 4), output_hidden_states=True)
    assert {h.shape[-1] for h in out.hidden_states} == {20}


@effect
def layers_block_type() -> None:
    types = ["mlp", "attention", "mamba", "moe", "mlp"]
    model = tiny_model(layers_block_type=types)
    names = ["MLP", "Attention", "Mamba2Mixer", "MoE", "MLP"]
    assert [type(block.mixer).__name__ for block in model.model.layers] == ["NemotronH" + name for name in names]
    default = tiny_config(layers_block_type=None)
    assert default.layers_block_type == ["mamba", "moe", "attention", "mlp"]


@effect
def num_hidden_layers() -> None:
    model = tiny_model(num_hidden_layers=5)
    assert model.config.num_hidden_layers == len(model.model.layers) == 5
    assert len(model(draw_ids(model, 1, 3), output_hidden_states=True).hidden_states) == 6
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        tiny_config(num_hidden_layers=4)


@effect
def tie_word_embeddings() -> None:
    tied, free = tiny_model(tie_word_embeddings=True), tiny_model()
    assert tied.lm_head.weight is tied.model.embeddings.weight
    assert free.lm_head.weight is not free.model.embeddings.weight
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == 50 * 32


@effect
def num_attention_heads() -> None:
    model = tiny_model(num_attention_heads=6, num_key_value_heads=2)
    assert model.model.layers[2].mixer.q_proj.weight.shape == (6 * 12, 32)
    assert model(draw_ids(model, 1, 3), output_attentions=True).attentions[0].shape == (1, 6, 3, 3)


@effect
def num_key_value_heads() -> None:
    for value, heads in ((1, 1), (4, 4), (None, 4)):
        model = tiny_model(num_key_value_heads=value)
        kept = model(draw_ids(model, 1, 3), use_cache=True).past_key_values
        assert kept.key_cache[2].shape == kept.value_cache[2].shape == (1, heads, 3, 12)


@effect
def head_dim() -> None:
    for value, size in ((5, 5), (None, 32 // 4)):
        found = shapes(head_dim=value)
        assert found["model.layers.2.mixer.q_proj.weight"] == (4 * size, 32)
        assert found["model.layers.2.mixer.o_proj.weight"] == (32, 4 * size)


@effect
def sliding_window() -> None:
    whole = logits(hybrid_override_pattern="*")
    windowed = logits(hybrid_override_pattern="*", sliding_window=4)
    assert_close(windowed[:, :4], whole[:, :4], "a window of 4 hides nothing from the first 4")
    assert error(windowed[:, 4:], whole[:, 4:]) > 1e-3


@effect
def intermediate_size() -> None:
    found = shapes(intermediate_size=[9, 17], hybrid_override_pattern="-M-")
    assert found["model.layers.0.mixer.up_proj.weight"] == (9, 32)
    assert found["model.layers.2.mixer.down_proj.weight"] == (32, 17)
    assert shapes(intermediate_size=7)["model.layers.3.mixer.up_proj.weight"] == (7, 32)


@effect
def mlp_bias() -> None:
    names = ("up_proj", "down_proj", "fc1_latent_proj", "fc2_latent_proj")
    assert added(mlp_bias=True) == {f"{name}.bias" for name in names}, "MLP, shared expert, latent projections"
    assert not any("experts.up_proj_bias" in name for name in shapes(mlp_bias=True)), "no routed expert"
    assert "model.layers.1.mixer.shared_experts.up_proj.bias" in shapes(mlp_bias=True)


@effect
def ssm_state_size() -> None:
    model = tiny_model(ssm_state_size=5)
    assert model(draw_ids(model, 1, 3), output_ssm_states=True).ssm_states[0].shape == (1, 6, 8, 5)


@effect
def mamba_num_heads() -> None:
    found = shapes(mamba_num_heads=10)
    assert {found[f"model.layers.0.mixer.{name}"] for name in ("A_log", "D", "dt_bias")} == {(10,)}
    assert found["model.layers.0.mixer.out_proj.weight"] == (32, 10 * 8)


@effect
def mamba_n_groups() -> None:
    assert shapes(mamba_n_groups=3)["model.layers.0.mixer.conv1d.weight"] == (6 * 8 + 2 * 3 * 16, 1, 4)
    one_group = {"mamba_n_groups": 1, "ssm_state_size": 32}  # as many channels as two groups of 16
    assert error(logits(**one_group), logits()) > 1e-3


@effect
def mamba_d_conv() -> None:
    model = tiny_model(mamba_d_conv=3)
    assert model.model.layers[0].mixer.conv1d.weight.shape[-1] == 3
    assert model(draw_ids(model, 1, 3), use_cache=True).past_key_values.conv_states[0].shape[-1] == 2


@effect
def mamba_expand() -> None:
    for value in (1, 2, 4):
        derived = tiny_config(mamba_num_heads=None, mamba_expand=value)
        assert derived.mamba_num_heads == value * 32 // 8
        assert tiny_config(mamba_expand=value).mamba_num_heads == 6, "given heads count"
        assert tiny_config(mamba_expand=value).to_dict()["mamba_expand"] == value


@effect
def mamba_conv_bias() -> None:
    assert "model.layers.0.mixer.conv1d.bias" in shapes()
    assert "model.layers.0.mixer.conv1d.bias" not in shapes(mamba_conv_bias=False)
    assert logits(mamba_conv_bias=False).isfinite().all()


@effect
def mamba_ssm_cache_dtype() -> None:
    for value in ("float32", "bfloat16"):
        model = tiny_model(mamba_ssm_cache_dtype=value)
        kept = model(draw_ids(model, 1, 3), use_cache=True).past_key_values
        assert kept.ssm_states[0].dtype == getattr(torch, value)


@effect
def n_routed_experts() -> None:
    model = tiny_model(n_routed_experts=12)
    assert model.model.layers[1].mixer.experts.up_proj.shape[0] == 12
    assert model(draw_ids(model, 1, 3), output_router_logits=True).router_logits[0].shape == (3, 12)


@effect
def n_shared_experts() -> None:
    for value in (1, 2, 3):
        assert shapes(n_shared_experts=value)["model.layers.1.mixer.shared_experts.up_proj.weight"] == (40 * value, 32)
    assert not any("shared_experts" in name for name in shapes(n_shared_experts=0))


@effect
def moe_latent_size() -> None:
    found = shapes(moe_latent_size=7)
    assert found["model.layers.1.mixer.fc1_latent_proj.weight"] == (7, 32)
    assert found["model.layers.1.mixer.experts.down_proj"] == (8, 7, 24)
    assert found["model.layers.1.mixer.gate.weight"] == (8, 32), "the router sees the full width"
    without = shapes(moe_latent_size=None)
    assert without["model.layers.1.mixer.experts.down_proj"] == (8, 32, 24)
    assert not any("latent" in name for name in without)


@effect
def num_experts_per_tok() -> None:
    for value in (1, 3):
        model = tiny_model(num_experts_per_tok=value).train()
        model(draw_ids(model, 1, 5), use_cache=False)
        assert model.model.layers[1].mixer.gate.load_E.sum() == 5 * value


@effect
def num_nextn_predict_layers() -> None:
    for value in (1, 2):
        model = tiny_model(num_nextn_predict_layers=value)
        assert len(model.mtp.layers) == 2 * value
        assert len(model(draw_ids(model, 1, 5), output_mtp_logits=True).mtp_logits) == value
    assert tiny_model().mtp is None


@effect
def mtp_layers_block_type() -> None:
    model = tiny_model(num_nextn_predict_layers=1, mtp_layers_block_type=["mamba", "mlp", "moe"])
    names = [type(block.mixer).__name__ for block in model.mtp.layers]
    assert names == ["NemotronHMamba2Mixer", "NemotronHMLP", "NemotronHMoE"]
