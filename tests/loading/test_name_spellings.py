"""Every spelling of tensor names in circulation loads the same weights, and is saved again in the hub's."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loading_cases import (
    Tensors,
    assert_same_tensors,
    read_config,
    read_weights,
    renamed,
    stacked,
    write_checkpoint,
)

from helpers import BIASED, assert_close, tiny_model
from nemotron_h import NemotronHForCausalLM, NemotronHModel
from nemotron_h.errors import CheckpointError

VISION: Tensors = {"vision_model.encoder.layers.0.weight": torch.ones(3, 2), "mlp1.0.bias": torch.zeros(5).bfloat16()}


def _model_prefix(name: str) -> str:
    return re.sub(r"^backbone\.", "model.", name)


def _without_prefix(name: str) -> str:
    return name.removeprefix("backbone.")


def _embedding(name: str) -> str:
    return name.replace(".embeddings.", ".embedding.")


def _inside(name: str) -> str:
    return "language_model." + name


def _puzzle_bias(name: str) -> str:
    return name.replace(".gate.e_score_correction_bias", ".e_score_correction_bias")


def _module_bias(name: str) -> str:
    return name.replace(".gate.e_score_correction_bias", ".e_score_correction.bias")


def _gate_module_bias(name: str) -> str:
    return name.replace("e_score_correction_bias", "e_score_correction.bias")


def _all_at_once(name: str) -> str:
    return _inside(_model_prefix(_embedding(_puzzle_bias(name))))


SPELLINGS: dict[str, Callable[[Tensors], Tensors]] = {
    "backbone": dict,
    "model": lambda t: renamed(t, _model_prefix),
    "no prefix": lambda t: renamed(t, _without_prefix),
    "embedding": lambda t: renamed(t, _embedding),
    "model and embedding": lambda t: renamed(t, lambda n: _model_prefix(_embedding(n))),
    "no prefix and embedding": lambda t: renamed(t, lambda n: _without_prefix(_embedding(n))),
    "language_model.backbone": lambda t: renamed(t, _inside),
    "language_model.model": lambda t: renamed(t, lambda n: _inside(_model_prefix(n))),
    "language_model without prefix": lambda t: renamed(t, lambda n: _inside(_without_prefix(n))),
    "multimodal": lambda t: renamed(t, _inside) | VISION,
    "stacked": stacked,
    "stacked with .weight": lambda t: stacked(t, ".weight"),
    "stacked in model": lambda t: renamed(stacked(t), _model_prefix),
    "router bias of Puzzle": lambda t: renamed(t, _puzzle_bias),
    "router bias as a module": lambda t: renamed(t, _module_bias),
    "router bias as a module of the gate": lambda t: renamed(t, _gate_module_bias),
    "everything": lambda t: renamed(stacked(t), _all_at_once) | VISION,
}


@pytest.mark.parametrize("expert_bias", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(tmp_path: Path, spelling: str, expert_bias: bool) -> None:
    model = _model(expert_bias)
    model.save_pretrained(tmp_path / "hub")
    hub = read_weights(tmp_path / "hub")
    respelt = SPELLINGS[spelling](hub)
    assert (set(respelt) != set(hub)) == (spelling != "backbone"), "the test renames something"
    write_checkpoint(tmp_path / "respelt", read_config(tmp_path / "hub"), respelt)

    loaded = NemotronHForCausalLM.from_pretrained(tmp_path / "respelt")
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    trunk = NemotronHModel.from_pretrained(tmp_path / "respelt")
    assert_same_tensors(trunk.state_dict(), model.model.state_dict())

    loaded.save_pretrained(tmp_path / "again")
    assert_same_tensors(read_weights(tmp_path / "again"), hub)


def _model(expert_bias: bool) -> NemotronHForCausalLM:
    """Twelve experts, so that names sorted as text are not in order, in the trunk and in a head."""
    model = tiny_model(
        hybrid_override_pattern="ME*-", n_routed_experts=12, num_nextn_predict_layers=1, hidden_size=12, **BIASED
    )
    if expert_bias:
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                module.add_bias()
                module.up_proj_bias.data.normal_()
                module.down_proj_bias.data.normal_()
    return model


def test_expert_biases_act(tmp_path: Path) -> None:
    model = _model(expert_bias=True)
    model.save_pretrained(tmp_path)
    ids = torch.arange(6)[None]
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert_close(loaded(ids).logits, model(ids).logits)
    assert not torch.allclose(_model(expert_bias=False)(ids).logits, model(ids).logits)


def test_experts_of_one_layer_stacked_and_of_another_single(tmp_path: Path) -> None:
    model = tiny_model(hybrid_override_pattern="EE")
    model.save_pretrained(tmp_path)
    hub = read_weights(tmp_path)
    mixed = {n: t for n, t in hub.items() if ".layers.1." in n} | {
        n: t for n, t in stacked(hub).items() if ".layers.1." not in n
    }
    write_checkpoint(tmp_path, read_config(tmp_path), mixed)
    assert_same_tensors(NemotronHForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_multimodal_config(tmp_path: Path) -> None:
    """A multimodal checkpoint nests our configuration, too."""
    model = _model(expert_bias=False)
    model.save_pretrained(tmp_path)
    outer = {"model_type": "some_vlm", "vision_config": {"model_type": "vit"}, "llm_config": read_config(tmp_path)}
    write_checkpoint(tmp_path, outer, renamed(read_weights(tmp_path), _inside) | VISION)
    assert_same_tensors(NemotronHForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_multimodal_language_model_stays_strict(tmp_path: Path) -> None:
    model = _model(expert_bias=False)
    model.save_pretrained(tmp_path)
    tensors = renamed(read_weights(tmp_path), _inside)
    tensors["language_model.backbone.layers.9.norm.weight"] = torch.ones(12)
    del tensors["language_model.backbone.norm_f.weight"]
    write_checkpoint(tmp_path, read_config(tmp_path), tensors | VISION)
    with pytest.raises(CheckpointError) as error:
        NemotronHForCausalLM.from_pretrained(tmp_path)
    assert "1 missing: backbone.norm_f.weight" in str(error.value)
    assert "1 unexpected: language_model.backbone.layers.9.norm.weight" in str(error.value)
    assert "vision" not in str(error.value)


def test_heads_that_the_config_does_not_count_are_ignored(tmp_path: Path) -> None:
    """Converted checkpoints keep `mtp.*` beside `num_nextn_predict_layers: 0`."""
    model = tiny_model(num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path) | {"num_nextn_predict_layers": 0}
    write_checkpoint(tmp_path, config, read_weights(tmp_path))
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert loaded.mtp is None
    assert_same_tensors(loaded.state_dict(), {k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")})


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("pattern", ["*E", "M", "-M*E"])
def test_names_of_several_heads(tmp_path: Path, heads: int, pattern: str) -> None:
    model = tiny_model(num_nextn_predict_layers=heads, mtp_hybrid_override_pattern=pattern, hybrid_override_pattern="-")
    model.save_pretrained(tmp_path)
    names = read_weights(tmp_path)
    for index in range(heads * len(pattern)):
        first, last = index % len(pattern) == 0, index % len(pattern) == len(pattern) - 1
        assert f"mtp.layers.{index}.norm.weight" in names
        assert (f"mtp.layers.{index}.eh_proj.weight" in names) == first
        assert (f"mtp.layers.{index}.final_layernorm.weight" in names) == last
    assert f"mtp.layers.{heads * len(pattern)}.norm.weight" not in names
    assert_same_tensors(NemotronHForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())
