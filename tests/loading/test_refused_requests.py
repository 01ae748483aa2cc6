"""What this version does not do is refused before anything is loaded, in words that say what to do instead."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loading_cases import read_config

from helpers import tiny_model
from nemotron_h import NemotronHConfig, NemotronHForCausalLM, NemotronHModel, filling
from nemotron_h.checkpoint.safetensors import TensorReader
from nemotron_h.errors import ConfigError, UnsupportedError

ARGUMENTS: dict[str, Any] = {
    "gguf_file": "model.gguf",
    "load_in_8bit": True,
    "load_in_4bit": True,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "key_mapping": {"^model": "backbone"},
    "ignore_mismatched_sizes": True,
    "variant": "fp16",
    "tp_plan": "auto",
    "tp_size": 2,
    "device_mesh": object(),
    "distributed_config": object(),
    "use_safetensors": False,
}
FORMATS: dict[str, dict[str, Any]] = {
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "nvfp4": {"quant_method": "nvfp4"},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_model(hybrid_override_pattern="M*-", hidden_size=8).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("weights were read although the request is refused")

    monkeypatch.setattr(TensorReader, "read", never)


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("kind", [NemotronHForCausalLM, NemotronHModel])
def test_argument(saved: Path, name: str, kind: Any) -> None:
    with pytest.raises(UnsupportedError, match=rf"^from_pretrained\({name}=.*\): .") as error:
        kind.from_pretrained(saved, **{name: ARGUMENTS[name]})
    assert "\n" not in str(error.value)
    assert isinstance(error.value, NotImplementedError)


@pytest.mark.parametrize("method", FORMATS)
def test_quantized_checkpoint(saved: Path, method: str) -> None:
    """With bfloat16 weights, too: transformers would load some of these as if nothing were said."""
    config = read_config(saved) | {"quantization_config": FORMATS[method]}
    (saved / "config.json").write_text(json.dumps(config))
    for kind, kwargs in ((NemotronHForCausalLM, {}), (NemotronHModel, {}), (NemotronHModel, {"config": saved})):
        with pytest.raises(UnsupportedError, match=f"quantization_config in config.json says {method}") as error:
            kind.from_pretrained(saved, **kwargs)
        assert "BF16" in str(error.value)
    loaded = NemotronHConfig.from_pretrained(saved)
    with pytest.raises(UnsupportedError, match=method):
        NemotronHForCausalLM.from_pretrained(saved, config=loaded)
    weights = NemotronHForCausalLM(loaded).state_dict()
    with pytest.raises(UnsupportedError, match=method):
        NemotronHForCausalLM.from_pretrained(None, config=loaded, state_dict=weights)


@pytest.mark.parametrize("method", ["unknown", "exl9", "", None, 5, ["fp8"]])
def test_unknown_quantization(saved: Path, method: Any) -> None:
    for value in ({"quant_method": method}, {}, [method], "fp8"):
        (saved / "config.json").write_text(json.dumps(read_config(saved) | {"quantization_config": value}))
        with pytest.raises(ConfigError, match=r"quantization_config=.*quant_method is one of"):
            NemotronHForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    "device_map", [{"": "disk"}, {"model": "cpu", "lm_head": "disk"}, {"lm_head": "disk", "": "cpu"}]
)
def test_offloading_to_disk(saved: Path, tmp_path: Path, device_map: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match="offloading to disk"):
        NemotronHForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path / "off")


def test_device_map(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    expected = NemotronHForCausalLM.from_pretrained(saved)
    for device_map in ("cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}, torch.device("cpu")):
        loaded = NemotronHForCausalLM.from_pretrained(saved, device_map=device_map)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


def test_device_of_the_longest_prefix() -> None:
    """With one device only, a placement over several can be checked no other way."""
    places = {"": "cpu", "model.layers.1": "cuda:1", "model.layers": "cuda:0", "lm_head.weight": "meta"}
    for name, device in (
        ("model.embeddings.weight", "cpu"),
        ("model.layers.0.norm.weight", "cuda:0"),
        ("model.layers.1.norm.weight", "cuda:1"),
        ("model.layers.11.norm.weight", "cuda:0"),
        ("lm_head.weight", "meta"),
    ):
        assert filling.device_of(places, name) == device
    assert filling.device_of(None, "lm_head.weight") == torch.device("cpu")
