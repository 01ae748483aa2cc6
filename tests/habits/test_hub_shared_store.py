"""The hub client's cache as it is on disk: blobs that are links into a store shared by all repositories."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils._shared_blobs import publish_blob_to_shared_store

from helpers import tiny_model
from nemotron_h import NemotronHForCausalLM
from nemotron_h.errors import CheckpointError


def snapshot_in(cache: Path, source: Path, shared: bool = True) -> Path:
    """A downloaded repository: links into its blobs, and of those the weights into the store, by the client's code."""
    repository = cache / "models--nvidia--tiny"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in source.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        blob = blobs / digest
        shutil.copy(file, blob)
        if shared and file.suffix == ".safetensors":
            size = blob.stat().st_size
            assert publish_blob_to_shared_store(
                blob_path=str(blob), xet_hash=digest, cache_dir=str(cache), expected_size=size
            )
            assert blob.is_symlink()
        (snapshot / file.name).symlink_to(Path("../../blobs") / digest)
    return snapshot


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_weights_in_the_shared_store_load(tmp_path: Path, size: str) -> None:
    model = tiny_model(hybrid_override_pattern="M*")
    model.save_pretrained(tmp_path / "source", max_shard_size=size)
    snapshot = snapshot_in(tmp_path / "cache", tmp_path / "source")
    loaded = NemotronHForCausalLM.from_pretrained(snapshot)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_folder_of_that_name_is_no_store_without_the_clients_mark(tmp_path: Path) -> None:
    tiny_model(hybrid_override_pattern="M").save_pretrained(tmp_path / "source")
    snapshot = snapshot_in(tmp_path / "cache", tmp_path / "source")
    (tmp_path / "cache" / "blobs" / ".huggingface-shared-blobs").unlink()
    with pytest.raises(CheckpointError, match=r"is a symbolic link to .* outside the directory"):
        NemotronHForCausalLM.from_pretrained(snapshot)


def test_a_store_that_is_itself_a_link_is_outside(tmp_path: Path) -> None:
    tiny_model(hybrid_override_pattern="M").save_pretrained(tmp_path / "source")
    snapshot = snapshot_in(tmp_path / "cache", tmp_path / "source")
    (tmp_path / "cache" / "blobs").rename(tmp_path / "elsewhere")
    (tmp_path / "cache" / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"is a symbolic link to .* outside the directory"):
        NemotronHForCausalLM.from_pretrained(snapshot)


def test_links_beside_the_store_stay_outside(tmp_path: Path) -> None:
    tiny_model(hybrid_override_pattern="M").save_pretrained(tmp_path / "source")
    snapshot = snapshot_in(tmp_path / "cache", tmp_path / "source")
    outside = tmp_path / "cache" / "other.safetensors"
    shutil.copy(tmp_path / "source" / "model.safetensors", outside)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside the directory"):
        NemotronHForCausalLM.from_pretrained(snapshot)
