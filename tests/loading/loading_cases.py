"""Shared by the loading tests: checkpoints written and read with the `safetensors` package, small configurations."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nemotron_h import NemotronHConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LETTERS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
Tensors = dict[str, Tensor]


def weight_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def read_weights(directory: Path) -> Tensors:
    """Every tensor of a checkpoint directory; a name in two files would show as a smaller total."""
    tensors: Tensors = {}
    for file in weight_files(directory):
        tensors |= load_file(file)
    return tensors


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def write_weights(directory: Path, shards: Mapping[str, Tensors]) -> Path:
    """One file called model.safetensors, or shards and an index that lists them truthfully."""
    for old in (*directory.glob("*.safetensors"), directory / INDEX):
        old.unlink(missing_ok=True)
    for name, tensors in shards.items():
        apart = {key: tensor.clone() for key, tensor in tensors.items()}  # the package takes no shared memory
        save_file(apart, directory / name, metadata={"format": "pt"})
    if list(shards) != [SINGLE]:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        size = sum(t.nbytes for tensors in shards.values() for t in tensors.values())
        (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return directory


def write_checkpoint(directory: Path, config: NemotronHConfig | Mapping[str, Any], tensors: Tensors) -> Path:
    """config.json and a single weight file."""
    directory.mkdir(exist_ok=True)
    if isinstance(config, NemotronHConfig):
        config.save_pretrained(directory)
    else:
        (directory / "config.json").write_text(json.dumps(dict(config)))
    return write_weights(directory, {SINGLE: tensors})


def renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    return {change(name): tensor for name, tensor in tensors.items()}


def stacked(tensors: Tensors, suffix: str = "") -> Tensors:
    """Experts as one 3-D tensor each, `mixer.experts.up_proj` + `suffix`."""
    result: Tensors = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, found, rest = name.partition(".experts.")
        if not found:
            result[name] = tensor
            continue
        expert, projection, kind = rest.split(".")
        key = f"{stem}.experts.{projection}" + (suffix if kind == "weight" else "_bias")
        rows.setdefault(key, {})[int(expert)] = tensor
    return result | {key: torch.stack([found[e] for e in sorted(found)]) for key, found in rows.items()}


def assert_same_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(_bits(actual[name]), _bits(tensor)), name


def _bits(tensor: Tensor) -> Tensor:
    """So that equal means equal for NaN and -0.0 as well."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_whole(model: nn.Module) -> None:
    """What every loaded model must be: no tensor left on meta, parameters trainable, evaluation mode."""
    assert not any(t.is_meta for t in model.state_dict().values())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


def file_bytes(directory: Path, names: Iterable[str] | None = None) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in names or sorted(os.listdir(directory))}


_width = st.integers(1, 9)


@st.composite
def configurations(draw: st.DrawFn) -> NemotronHConfig:
    """A small configuration in which every field that decides names or shapes of tensors varies."""
    trunk = draw(st.text("ME*-", min_size=1, max_size=5))
    head = draw(st.text("ME*-", min_size=1, max_size=3))
    flags = ("tie_word_embeddings", "use_bias", "mamba_proj_bias", "mamba_conv_bias", "attention_bias", "mlp_bias")
    groups, key_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kwargs: dict[str, Any] = {name: draw(st.booleans()) for name in flags} | {
        "vocab_size": draw(st.integers(1, 9)),
        "hidden_size": draw(_width),
        "hybrid_override_pattern": trunk,
        "mtp_hybrid_override_pattern": head,
        "num_nextn_predict_layers": draw(st.integers(0, 2)),
        "num_key_value_heads": key_heads,
        "num_attention_heads": key_heads * draw(st.integers(1, 2)),
        "head_dim": draw(_width),
        "intermediate_size": draw(_width),
        "mamba_n_groups": groups,
        "mamba_num_heads": groups * draw(st.integers(1, 2)),
        "mamba_head_dim": draw(_width),
        "ssm_state_size": draw(_width),
        "mamba_d_conv": draw(st.integers(1, 4)),
        "num_experts_per_tok": 1,
    }
    kwargs |= draw(_moe_sizes())
    kwargs["n_shared_experts"] = draw(st.integers(0, 2))
    for name, pattern in (("block_configs", trunk), ("mtp_block_configs", head)):
        if draw(st.booleans()):
            kwargs[name] = [{"block_type": LETTERS[x]} | (draw(_moe_sizes()) if x == "E" else {}) for x in pattern]
    return NemotronHConfig(**kwargs)


@st.composite
def _moe_sizes(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "n_routed_experts": draw(st.integers(1, 11)),
        "moe_intermediate_size": draw(_width),
        "moe_latent_size": draw(st.none() | _width),
        "moe_shared_expert_intermediate_size": draw(st.integers(0, 9)),
    }
