"""safetensors' own functions on our files and models.

E experts · L layers.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_model

from helpers import draw_ids, hub_tensors, tiny_model
from nemotron_h import NemotronHForCausalLM

BOTH = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def same(a: NemotronHForCausalLM, b: NemotronHForCausalLM) -> bool:
    ids_BT = draw_ids(a, 2, 6)
    with torch.no_grad():
        return torch.equal(a(ids_BT).logits, b(ids_BT).logits)


def saved(directory: Path, tied: bool) -> tuple[NemotronHForCausalLM, Path]:
    model = tiny_model(tie_word_embeddings=tied, num_nextn_predict_layers=1)
    model.save_pretrained(directory)
    return model, directory / "model.safetensors"


@BOTH
def test_safe_open_lists_and_slices(tmp_path: Path, tied: bool) -> None:
    model, path = saved(tmp_path, tied)
    tensors = hub_tensors(model)
    if tied:
        del tensors["lm_head.weight"]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(tensors)
        for name, expected in tensors.items():
            part = file.get_slice(name)
            assert part.get_shape() == list(expected.shape)
            assert torch.equal(part[1:3], torch.from_numpy(expected[1:3]).float()), name
            assert torch.equal(file.get_tensor(name), torch.from_numpy(expected).float()), name


def test_every_shard_opens(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    found: dict[str, torch.Tensor] = {}
    shards = sorted(tmp_path.glob("*.safetensors"))
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        found |= load_file(shard)
    assert len(shards) > 2
    assert found.keys() == hub_tensors(model).keys()


@BOTH
def test_load_file_gives_what_load_state_dict_takes(tmp_path: Path, tied: bool) -> None:
    model, path = saved(tmp_path, tied)
    other = tiny_model(seed=1, tie_word_embeddings=tied, num_nextn_predict_layers=1)
    assert not same(model, other)
    other.load_state_dict(load_file(path))
    assert same(model, other)


@BOTH
def test_load_model_reads_a_saved_checkpoint(tmp_path: Path, tied: bool) -> None:
    model, path = saved(tmp_path, tied)
    other = tiny_model(seed=1, tie_word_embeddings=tied, num_nextn_predict_layers=1)
    missing, unexpected = load_model(other, path, strict=not tied)
    assert (set(missing), list(unexpected)) == (set(), ["model.embeddings.weight"] if tied else [])
    assert same(model, other)


@BOTH
def test_save_model_and_load_model(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied, num_nextn_predict_layers=1)
    other = tiny_model(seed=1, tie_word_embeddings=tied, num_nextn_predict_layers=1)
    save_model(model, str(tmp_path / "own.safetensors"))
    missing, unexpected = load_model(other, tmp_path / "own.safetensors")
    assert (set(missing), list(unexpected)) == (set(), [])
    assert same(model, other)
    assert (other.lm_head.weight is other.model.embeddings.weight) == tied
    with safe_open(tmp_path / "own.safetensors", "pt") as file:
        assert len(file.keys()) == len(model.state_dict()) - tied


def test_load_model_refuses_what_does_not_fit(tmp_path: Path) -> None:
    _, path = saved(tmp_path, tied=False)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_model(tiny_model(), path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_model(tiny_model(hidden_size=16, num_nextn_predict_layers=1), path)
