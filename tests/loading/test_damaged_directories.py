"""Damaged or hostile checkpoint directories: one line that names file and fault, nothing opened outside."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loading_cases import INDEX, SINGLE, Tensors, read_config, read_weights, write_checkpoint, write_weights
from safetensors.torch import save_file

from helpers import tiny_model
from nemotron_h import NemotronHForCausalLM, NemotronHModel
from nemotron_h.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedError

# An audit hook cannot be removed, so there is one, and it records while this is a list.
_opened: list[str] | None = None


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(os.path.realpath(os.fsdecode(arguments[0])) if not isinstance(arguments[0], int) else "")


sys.addaudithook(_record)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    tiny_model(hybrid_override_pattern="M*-", hidden_size=8).save_pretrained(directory)
    return directory


@pytest.fixture
def saved(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "saved"))


def refusal(directory: Path, error_type: type[Exception] = CheckpointError, **kwargs: Any) -> str:
    """The error's text, one line, not too long; the trunk says the same."""
    with pytest.raises(error_type) as error:
        NemotronHForCausalLM.from_pretrained(directory, **kwargs)
    with pytest.raises(error_type):
        NemotronHModel.from_pretrained(directory, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600 + len(str(directory))
    return text


def shards(saved: Path) -> dict[str, Tensors]:
    """The checkpoint in two files."""
    tensors = read_weights(saved)
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    return {file: {name: tensors[name] for name in half} for file, half in halves.items()}


def change_index(saved: Path, change: Any) -> None:
    index = json.loads((saved / INDEX).read_text())
    change(index)
    (saved / INDEX).write_text(json.dumps(index))


def test_a_tensor_in_two_shards(saved: Path) -> None:
    parts = shards(saved)
    first, second = parts.values()
    name, tensor = next(iter(first.items()))
    write_weights(saved, parts)
    NemotronHForCausalLM.from_pretrained(saved)
    save_file(second | {name: torch.zeros_like(tensor)}, saved / "model-00002-of-00002.safetensors")
    assert f"tensor '{name}' is in two shards" in refusal(saved)


@pytest.mark.parametrize("place", ["../evil.safetensors", "{}/evil.safetensors", "link.safetensors"])
def test_an_index_that_leads_outside(saved: Path, place: str) -> None:
    evil = saved.parent / "evil.safetensors"
    parts = shards(saved)
    write_weights(saved, parts)
    shutil.copy(saved / "model-00002-of-00002.safetensors", evil)
    (saved / "link.safetensors").symlink_to(evil)
    outside = place.format(saved.parent)

    def lead_out(index: dict[str, Any]) -> None:
        index["weight_map"] |= dict.fromkeys(parts["model-00002-of-00002.safetensors"], outside)

    change_index(saved, lead_out)
    global _opened
    _opened = []
    text = refusal(saved)
    opened, _opened = _opened, None
    assert "shard" in text
    assert any(path.endswith(INDEX) for path in opened), "the hook sees what is opened"
    assert not any("evil" in path for path in opened)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda i: i["weight_map"].popitem(), "is not listed in"),
        (lambda i: i["weight_map"].update(x="model-00001-of-00002.safetensors"), "tensor 'x' is not in"),
        (lambda i: i["weight_map"].update(x="model-00003-of-00003.safetensors"), "is missing"),
        (lambda i: i["metadata"].update(total_size=5), "total_size is 5"),
        (lambda i: i.update(weight_map={}), "weight_map must map"),
        (lambda i: i.clear(), "weight_map must map"),
    ],
)
def test_an_index_that_lies(saved: Path, change: Any, text: str) -> None:
    write_weights(saved, shards(saved))
    change_index(saved, change)
    assert text in refusal(saved)


def test_a_shard_that_is_missing(saved: Path) -> None:
    write_weights(saved, shards(saved))
    (saved / "model-00002-of-00002.safetensors").unlink()
    assert "shard 'model-00002-of-00002.safetensors' is missing" in refusal(saved)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
@pytest.mark.parametrize("sharded", [False, True])
def test_pickle_is_refused_with_what_to_do(
    saved: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, sharded: bool
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", never)
    (saved / SINGLE).unlink()
    (saved / f"pytorch_model{'-00001-of-00001' * sharded}.{suffix}").write_bytes(b"\x80\x04.")
    if sharded:
        (saved / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    for kwargs in ({}, {"use_safetensors": None}, {"weights_only": False}):
        text = refusal(saved, **kwargs)
        assert "pickle can run code, so it is never loaded" in text
        assert "save_pretrained" in text
    assert "pickle can run code" in refusal(saved, UnsupportedError, use_safetensors=False)


@pytest.mark.parametrize("keep", [0, 7, 8, 60, 0.5, -1])
def test_truncated_weights(saved: Path, keep: float) -> None:
    data = (saved / SINGLE).read_bytes()
    (saved / SINGLE).write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert SINGLE in refusal(saved)


def test_corrupt_weights(saved: Path) -> None:
    data = (saved / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    twice = header.replace(b'"lm_head.weight"', b'"backbone.norm_f.weight"')
    overlap = json.loads(header)
    overlap["lm_head.weight"]["data_offsets"] = [0, 50 * 8 * 4]
    for new, text in (
        (twice, "'backbone.norm_f.weight' twice"),
        (header.replace(b"{", b"[", 1), "not a safetensors file"),
        (header[:-20], "is not valid JSON"),
        (json.dumps(overlap).encode(), "overlaps"),
        (header.replace(b'"F32"', b'"F33"', 1), "'F33' is not supported"),
        (header.replace(b"lm_head.weight", b"../head.weight"), "'../head.weight'"),
    ):
        (saved / SINGLE).write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])
        assert text in refusal(saved)
    (saved / SINGLE).write_bytes(data + b"\0")
    assert "trailing bytes" in refusal(saved)


def test_corrupt_weights_that_transformers_opens(saved: Path) -> None:
    """It does so itself where it is told a file's name, and has to find out the dtype."""
    config = NemotronHForCausalLM.from_pretrained(saved).config
    config.dtype, config.transformers_weights = None, "other.safetensors"
    data = (saved / SINGLE).read_bytes()
    (saved / "other.safetensors").write_bytes(data)
    NemotronHForCausalLM.from_pretrained(saved, config=config)
    (saved / "other.safetensors").write_bytes(data[:-8])
    assert "not a readable safetensors file" in refusal(saved, config=config)


def test_a_file_is_no_directory(saved: Path) -> None:
    for name in (SINGLE, "config.json"):
        assert "is a file; give the directory" in refusal(saved / name)
        assert "is a file; give the directory" in refusal(saved / name, config=saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold an object"),
        ('{"a":', "not valid JSON"),
        ("\xff", "not UTF-8"),
        ('{"max_new_tokens": -5}', "max_new_tokens"),
        ('{"watermarking_config": 5}', "watermarking|validate"),
        ('{"eos_token_id": 2, "eos_token_id": 3}', "'eos_token_id' twice"),
    ],
)
def test_damaged_generation_config(saved: Path, text: str, message: str) -> None:
    (saved / "generation_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=rf"generation_config\.json.*({message})"):
        NemotronHForCausalLM.from_pretrained(saved)


def test_missing_config(saved: Path) -> None:
    (saved / "config.json").unlink()
    assert refusal(saved, ModelNotFoundError) == f"{saved}: has no config.json"


def test_overrides_are_validated(saved: Path) -> None:
    assert "hidden_size=-5" in refusal(saved, ConfigError, hidden_size=-5)
    assert "mamba_n_groups=4" in refusal(saved, ConfigError, n_groups=4)
    assert "dtype='int8'" in refusal(saved, ConfigError, dtype="int8")
    assert "attn_implementation" in refusal(saved, ConfigError, attn_implementation="org/kernel")
    text = refusal(saved, CheckpointError, vocab_size=51)
    assert "backbone.embeddings.weight is [50, 8], expected [51, 8]" in text


def test_tied_checkpoints(saved: Path, tmp_path: Path) -> None:
    tensors, config = read_weights(saved), read_config(saved) | {"tie_word_embeddings": True}
    embeddings = tensors["backbone.embeddings.weight"]
    other = embeddings.clone()
    other[3, 3] += 1e-3
    for name in ("lm_head.weight", "language_model.lm_head.weight"):
        inside = name.startswith("language_model")
        rest = {
            ("language_model." + key if inside else key): t for key, t in tensors.items() if key != "lm_head.weight"
        }
        for head in ({}, {name: embeddings}, {name: embeddings.double()}):
            directory = write_checkpoint(tmp_path / "tied", config, rest | head)
            loaded = NemotronHForCausalLM.from_pretrained(directory)
            assert loaded.lm_head.weight is loaded.model.embeddings.weight
            assert torch.equal(loaded.lm_head.weight, embeddings)
        for head, text in (
            (other, f"{name} differs from "),
            (embeddings[:-1], f"{name} is [49, 8], expected [50, 8]"),
            (embeddings.to(torch.int8), f"{name} is I8"),
        ):
            write_checkpoint(directory, config, rest | {name: head})
            with pytest.raises(CheckpointError, match="tied") as error:
                NemotronHForCausalLM.from_pretrained(directory)
            assert text in str(error.value)
        write_checkpoint(directory, config, rest | {"lm_head.bias": torch.ones(50)} if not inside else rest)
        if not inside:
            with pytest.raises(CheckpointError, match=r"1 unexpected: lm_head\.bias"):
                NemotronHForCausalLM.from_pretrained(directory)


def test_a_tie_that_differs_puts_nothing_anywhere(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(saved) | {"tie_word_embeddings": True}
    (saved / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("nemotron_h.filling.put", None)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings=True, but lm_head\.weight differs"):
        NemotronHForCausalLM.from_pretrained(saved)


def test_adapter_and_distributed_directories(saved: Path) -> None:
    """Both would make transformers load something else than the weights that were checked."""
    shutil.copy(saved / SINGLE, saved / "shard-00001-model-00001-of-00001.safetensors")
    assert "distributed checkpoint" in refusal(saved, UnsupportedError)
    (saved / "shard-00001-model-00001-of-00001.safetensors").unlink()
    (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "../evil", "peft_type": "LORA"}')
    assert "adapter_config.json" in refusal(saved, UnsupportedError)
    (saved / SINGLE).unlink()
    assert "an adapter" in refusal(saved) or "neither" in refusal(saved)


@pytest.mark.parametrize("name", ["./no-such", "/no/such/model", "~/no-such", "a/b/c", "no such", "org/no-such"])
def test_unknown_model(name: str) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        NemotronHForCausalLM.from_pretrained(name, local_files_only=True)
    assert str(error.value).startswith(name)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, OSError)
