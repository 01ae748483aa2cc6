"""`load_state_dict` with a hub checkpoint's names, native ones, shards, wrappers; bits of every tensor compared."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_cases import HEAD, assert_same_bits, other, read_weights
from transformers.trainer_utils import load_sharded_checkpoint

from helpers import BIASED, draw_weights, tiny_model
from nemotron_h import NemotronHForCausalLM
from nemotron_h.experts import NemotronHExperts

ROUTED = "layers.1.mixer.experts."


def on_disk(model: NemotronHForCausalLM, directory: Path, shard: str = "5GB") -> dict[str, Tensor]:
    model.save_pretrained(directory, max_shard_size=shard)
    return read_weights(directory)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {**HEAD, **BIASED},
        {"tie_word_embeddings": True},
        {"n_routed_experts": 1, "n_group": 1, "num_experts_per_tok": 1},
        {"n_routed_experts": 12, "moe_latent_size": None},
        {"hybrid_override_pattern": "MM", "num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "E"},
    ],
)
def test_what_was_saved_comes_back_in_one_file(config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**config)
    tensors = on_disk(model, tmp_path)
    found = other(model)
    assert not any(found.load_state_dict(tensors)), "strict, and nothing to report"
    assert_same_bits(found.state_dict(), model.state_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_shard_by_shard(tied: bool, tmp_path: Path) -> None:
    """A stacked tensor's experts lie in several shards."""
    model = tiny_model(hybrid_override_pattern="-E", tie_word_embeddings=tied)
    on_disk(model, tmp_path, "15KB")
    first, last = (
        next(f for f in tmp_path.glob("*.safetensors") if f"backbone.{ROUTED}{e}.up_proj.weight" in load_file(f))
        for e in (0, 7)
    )
    assert first != last
    found = other(model)
    load_sharded_checkpoint(found, os.fspath(tmp_path), strict=False)
    assert_same_bits(found.state_dict(), model.state_dict())
    assert (found.lm_head.weight is found.model.embeddings.weight) == tied


def spellings(tensors: dict[str, Tensor], model: NemotronHForCausalLM) -> Iterator[dict[str, Tensor]]:
    yield dict(model.state_dict())
    yield {name.replace("backbone.", "model."): t for name, t in tensors.items()}
    yield {"language_model." + name: t for name, t in tensors.items()}
    yield {name.replace("backbone.embeddings.", "backbone.embedding."): t for name, t in tensors.items()}


def test_spellings(tmp_path: Path) -> None:
    model = tiny_model(**HEAD)
    for tensors in spellings(on_disk(model, tmp_path), model):
        before = dict(tensors)
        found = other(model)
        found.load_state_dict(tensors)
        assert_same_bits(found.state_dict(), model.state_dict())
        assert tensors.keys() == before.keys(), "the caller's dict stays as it was"


def test_bare_trunk(tmp_path: Path) -> None:
    model = tiny_model()
    tensors = on_disk(model, tmp_path)
    trunk = other(model.model)
    result = trunk.load_state_dict(tensors, strict=False)
    assert result.unexpected_keys == ["lm_head.weight"]
    assert result.missing_keys == []
    assert_same_bits(trunk.state_dict(), model.model.state_dict())


class Wrapper(nn.Module):
    """Holds the model below a name, as DistributedDataParallel and PEFT do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile])
def test_below_a_wrapper(wrap: Any, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    tensors = on_disk(model, tmp_path)
    found = other(model)
    wrapped = wrap(found)
    name = "module." if wrap is Wrapper else "_orig_mod."
    assert not any(wrapped.load_state_dict({name + key: tensor for key, tensor in tensors.items()}))
    assert_same_bits(found.state_dict(), model.state_dict())


# What is reported


def broken(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    some = f"backbone.{ROUTED}3.up_proj.weight"
    if kind == "missing expert":
        del tensors[some]
    elif kind == "expert too many":
        tensors[some.replace("3.up", "8.up")] = tensors[some]
    elif kind == "size of an expert":
        tensors[some] = tensors[some][:, 1:]
    elif kind == "missing norm":
        del tensors["backbone.norm_f.weight"]
    elif kind == "unknown tensor":
        tensors["backbone.layers.0.mixer.gamma"] = torch.zeros(1)
    elif kind == "unknown biases":
        tensors[some.replace("weight", "bias")] = torch.zeros(24)
    elif kind == "two spellings":
        tensors["model.norm_f.weight"] = tensors["backbone.norm_f.weight"]
    else:
        tensors[f"backbone.{ROUTED}up_proj"] = torch.zeros(8, 24, 16)
    return tensors


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing expert", rf'Missing key.*"model.{ROUTED}3.up_proj.weight"'),
        ("expert too many", rf'Unexpected key.*"model.{ROUTED}8.up_proj.weight"'),
        ("size of an expert", rf"size mismatch for model.{ROUTED}3.up_proj.weight: \[24, 15\].*\[24, 16\]"),
        ("missing norm", 'Missing key.*"model.norm_f.weight"'),
        ("unknown tensor", 'Unexpected key.*"model.layers.0.mixer.gamma"'),
        ("unknown biases", rf'Unexpected key.*"model.{ROUTED}3.up_proj.bias"'),
        ("two spellings", 'Unexpected key.*"backbone.norm_f.weight"'),
        ("stacked and separate", rf'Unexpected key.*"model.{ROUTED}0.up_proj.weight"'),
    ],
)
def test_strict_names_what_is_wrong(kind: str, said: str, tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(RuntimeError, match=r"(?s)" + said) as raised:
        model.load_state_dict(broken(on_disk(model, tmp_path), kind))
    assert str(raised.value).count("experts") <= 16, "only what is wrong is listed"


def test_a_tied_head_that_differs(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    tensors = on_disk(model, tmp_path)
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
    assert not any(model.load_state_dict(tensors)), "equal: fine"
    tensors["lm_head.weight"] += 1
    with pytest.raises(RuntimeError, match=r"lm_head.weight differs from model.embeddings.weight"):
        model.load_state_dict(tensors)


def test_a_part_leaves_the_rest_alone(tmp_path: Path) -> None:
    model = tiny_model()
    tensors = on_disk(model, tmp_path)
    some = f"backbone.{ROUTED}3.up_proj.weight"
    found = other(model)
    before = {name: t.clone() for name, t in found.state_dict().items()}
    result = found.load_state_dict({some: tensors[some]}, strict=False)
    assert f"model.{ROUTED}2.up_proj.weight" in result.missing_keys
    assert f"model.{ROUTED}3.up_proj.weight" not in result.missing_keys
    before[f"model.{ROUTED}up_proj"][3] = tensors[some]
    assert_same_bits(found.state_dict(), before)


# dtypes and devices


def test_the_router_bias_stays_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    tensors = on_disk(model, tmp_path)
    found = other(model)
    found.load_state_dict(tensors)
    assert_same_bits(found.state_dict(), model.state_dict())
    assert {b.dtype for b in found.buffers()} == {torch.float32}


def test_expert_biases(tmp_path: Path) -> None:
    model = draw_weights(tiny_model(), expert_bias=True)
    found = other(model)
    found.load_state_dict(on_disk(model, tmp_path))
    assert_same_bits(found.state_dict(), model.state_dict())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_assign_takes_the_tensors_dtype(device: str, tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    tensors = on_disk(model, tmp_path)
    with torch.device(device):
        found = NemotronHForCausalLM(model.config)
    found.load_state_dict(tensors, assign=True)
    assert_same_bits(found.state_dict(), model.state_dict())
    assert all(p.requires_grad for p in found.parameters())


def test_assign_of_a_part_leaves_no_chance_values(tmp_path: Path) -> None:
    model = tiny_model()
    some = f"backbone.{ROUTED}3.up_proj.weight"
    tensor = on_disk(model, tmp_path)[some]
    with torch.device("meta"):
        found = NemotronHForCausalLM(model.config)
    found.load_state_dict({some: tensor}, strict=False, assign=True)
    stacked = next(m for m in found.modules() if isinstance(m, NemotronHExperts)).up_proj
    assert torch.equal(stacked[3], tensor)
    assert stacked.isnan().flatten(1).all(1).tolist() == [e != 3 for e in range(8)]


def test_meta_without_assign_stays_meta(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.device("meta"):
        found = NemotronHForCausalLM(model.config)
    with pytest.warns(UserWarning, match="no-op"):
        found.load_state_dict(on_disk(model, tmp_path))
    assert all(t.is_meta for t in found.state_dict().values())


def test_swapped_tensors(tmp_path: Path) -> None:
    """torch's other way of loading, which refuses a tensor that is the module's own."""
    model = tiny_model()
    tensors = on_disk(model, tmp_path)
    found = other(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        found.load_state_dict(tensors)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same_bits(found.state_dict(), model.state_dict())
