"""Checkpoints go both ways: transformers' own NemotronH reads what we save, and we read what it saves.

Its mixers floor the time step at `time_step_min`; the floor is lifted before logits are compared.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loading_cases import assert_same_tensors, read_config, read_weights, stacked
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from helpers import assert_close, draw_inputs, tiny_model
from nemotron_h import NemotronHForCausalLM, NemotronHModel, family

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"hybrid_override_pattern": "M-M*-"},
    "dense with biases": {"hybrid_override_pattern": "M-*", "use_bias": True, "mlp_bias": True},
    "moe": {"hybrid_override_pattern": "ME*E", "moe_latent_size": None},
    "latent moe": {"hybrid_override_pattern": "MEM*E"},
    "eleven experts": {"hybrid_override_pattern": "ME", "n_routed_experts": 11, "n_group": 1, "num_experts_per_tok": 3},
    "heads beside the trunk": {"hybrid_override_pattern": "ME*", "num_nextn_predict_layers": 1},
}


def lift_floor(model: torch.nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, theirs.NemotronHMamba2Mixer):
            module.time_step_limit = (0.0, float("inf"))
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_transformers_reads_ours(tmp_path: Path, kind: str, size: str) -> None:
    model = tiny_model(**MODELS[kind])
    ids_T, reference = draw_inputs(model, 19)
    model.save_pretrained(tmp_path, max_shard_size=size)
    their_model, info = transformers.NemotronHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(their_model) is theirs.NemotronHForCausalLM
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(key.startswith("mtp.") for key in info["unexpected_keys"])
    with torch.no_grad():
        logits_TV = lift_floor(their_model)(ids_T[None], use_cache=False).logits[0]
        assert_close(logits_TV, model(ids_T[None]).logits[0], kind)
    assert_close(logits_TV, reference.logits_TV, kind)


@pytest.mark.parametrize("kind", MODELS)
def test_ours_reads_transformers(tmp_path: Path, kind: str) -> None:
    model = tiny_model(**MODELS[kind])
    model.save_pretrained(tmp_path / "ours")
    their_model = transformers.NemotronHForCausalLM.from_pretrained(tmp_path / "ours")
    their_model.save_pretrained(tmp_path / "theirs")
    assert "linear_attention" in read_config(tmp_path / "theirs")["layers_block_type"], "their own spelling"

    heads = {} if not model.config.num_nextn_predict_layers else {"num_nextn_predict_layers": 0}
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path / "theirs", **heads)
    kept = {name: t for name, t in model.state_dict().items() if not name.startswith("mtp.")}
    assert_same_tensors(loaded.state_dict(), kept)
    ids_T, _ = draw_inputs(model, 19)
    assert_close(loaded(ids_T[None]).logits, model(ids_T[None]).logits, kind)


def test_state_dict_of_their_model(tmp_path: Path) -> None:
    """In memory its names are `model.` and stacked experts."""
    model = tiny_model(**MODELS["latent moe"])
    model.save_pretrained(tmp_path)
    their_model = transformers.NemotronHForCausalLM.from_pretrained(tmp_path)
    loaded = NemotronHForCausalLM.from_pretrained(None, config=model.config, state_dict=their_model.state_dict())
    assert_same_tensors(loaded.state_dict(), model.state_dict())


def test_their_trunk(tmp_path: Path) -> None:
    model = tiny_model(**MODELS["latent moe"])
    model.save_pretrained(tmp_path / "ours")
    transformers.NemotronHModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert_same_tensors(NemotronHModel.from_pretrained(tmp_path / "theirs").state_dict(), model.model.state_dict())


def test_bfloat16_both_ways(tmp_path: Path) -> None:
    model = tiny_model(**MODELS["latent moe"]).bfloat16()
    model.save_pretrained(tmp_path / "ours")
    their_model = transformers.NemotronHForCausalLM.from_pretrained(tmp_path / "ours")
    assert their_model.dtype == torch.bfloat16
    their_model.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(NemotronHForCausalLM.from_pretrained(tmp_path / "theirs").state_dict(), model.state_dict())


def test_saved_names_are_the_hubs(tmp_path: Path) -> None:
    """Their loader knows `backbone.` and single experts as the hub's layout; the table says the same."""
    model = tiny_model(**MODELS["latent moe"])
    model.save_pretrained(tmp_path)
    assert {name: tuple(t.shape) for name, t in read_weights(tmp_path).items()} == dict(family.tensors(model.config))
    stack = stacked(read_weights(tmp_path))
    their_model = transformers.NemotronHForCausalLM.from_pretrained(tmp_path)
    assert {"backbone." + n.removeprefix("model.") for n in their_model.state_dict() if n != "lm_head.weight"} == {
        n for n in stack if n != "lm_head.weight"
    }
