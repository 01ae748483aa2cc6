"""Loading and saving the weights of a model: strict, streamed, one tensor at a time.

`_load_pretrained_model` and `_finalize_model_loading` are private hooks of transformers; tests/transformers holds a
canary for each.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from nemotron_h.checkpoint.directory import Directory, locate, open_directory, write_directory
from nemotron_h.checkpoint.names import hub_names, plan, with_expert_bias
from nemotron_h.checkpoint.safetensors import TensorReader, TensorSpec, dtype_name, read_header, spec_of
from nemotron_h.errors import CheckpointError, InputError, ModelNotFoundError, UnsupportedError

Read = Callable[[str], Tensor]

_REFUSED = {
    "gguf_file": "GGUF files are not read by this version; convert the checkpoint to safetensors",
    "quantization_config": "quantization while loading is not in this version; load in bfloat16",
    "load_in_8bit": "quantization while loading is not in this version; load in bfloat16",
    "load_in_4bit": "quantization while loading is not in this version; load in bfloat16",
    "key_mapping": "the family's spellings are known; rename the tensors of other checkpoints",
    "ignore_mismatched_sizes": "a tensor of another size would be replaced by a random one; use"
    " resize_token_embeddings after loading for another vocabulary",
    "tp_plan": "tensor parallel loading is not in this version",
    "tp_size": "tensor parallel loading is not in this version",
    "distributed_config": "tensor parallel loading is not in this version",
}


class Loading(PreTrainedModel):
    """The file side of `NemotronHPreTrainedModel`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint directory or a hub id; arguments as in transformers. Pickle files are never read.

        Args:
            pretrained_model_name_or_path: Directory, or hub id (`revision`, `token`, `cache_dir`, offline as usual).
            dtype: Default "auto", the checkpoint's.

        Raises:
            ModelNotFoundError: no such directory or repository. CheckpointError: damaged, or not of this config: one
                error that lists every missing, unexpected and wrong tensor. ConfigError: an illegal config.
        """
        for name, reason in _REFUSED.items():
            if kwargs.get(name):
                raise UnsupportedError(f"from_pretrained({name}=...): {reason}")
        if pretrained_model_name_or_path is not None:
            path = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            if path.is_dir() and kwargs.get("variant") is None:
                locate(path)
        kwargs["use_safetensors"] = True
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except (CheckpointError, ModelNotFoundError):
            raise
        except OSError as error:
            raise ModelNotFoundError.of(pretrained_model_name_or_path, error) from error

    @staticmethod
    def _load_pretrained_model(
        model: Any,
        state_dict: Mapping[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        *_: Any,
    ) -> tuple[LoadStateDictInfo, None]:
        """Fill the meta model; transformers' hook."""
        if load_config.hf_quantizer is not None or load_config.device_mesh is not None:
            raise UnsupportedError("quantizers of transformers and device meshes are not supported by this version")
        where = str(load_config.pretrained_model_name_or_path)
        if state_dict is not None:
            specs = {name: spec_of(name, tensor) for name, tensor in state_dict.items()}
            fill(model, specs, state_dict.__getitem__, load_config, "state_dict")
        else:
            directory = _open(checkpoint_files or [])
            with TensorReader() as reader:
                fill(model, directory.tensors, lambda name: reader.read(directory.tensors[name]), load_config, where)
        tied = set(model.all_tied_weights_keys)  # transformers ties those that it hears are missing
        return LoadStateDictInfo(tied, set(), set(), [], {}, set()), None

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """Write config.json (in both spellings), generation_config.json and the weights in the hub layout.

        An older checkpoint in the directory stays loadable until the new one is complete. Arguments as in transformers;
        memory: one tensor beyond the model.
        """
        if getattr(self, "_hf_peft_config_loaded", False):  # adapters only, in PEFT's layout
            given = None if state_dict is None else dict(state_dict)
            super().save_pretrained(save_directory, is_main_process, given, push_to_hub, max_shard_size, **kwargs)
            return
        if os.path.isfile(save_directory):
            raise InputError(f"save_pretrained({os.fspath(save_directory)!r}): there is a file, a directory is needed")
        if not is_main_process:
            return
        os.makedirs(save_directory, exist_ok=True)
        tensors = dict(self.state_dict() if state_dict is None else state_dict)
        for name in self.all_tied_weights_keys:
            tensors.pop(name, None)
        views = dict(_hub_views(tensors))
        specs = [TensorSpec(name, dtype_name(view.dtype), tuple(view.shape)) for name, view in views.items()]
        write_directory(
            Path(save_directory),
            specs,
            lambda name: views[name].detach().cpu().contiguous(),
            max_shard_size=_bytes(max_shard_size),
        )
        self._save_json(Path(save_directory))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def _save_json(self, directory: Path) -> None:
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        self.config.architectures = [type(self).__name__]
        with tempfile.TemporaryDirectory(dir=directory, prefix=".tmp-") as temporary:
            self.config.save_pretrained(temporary)
            if self.can_generate():
                self.generation_config.save_pretrained(temporary)
            for file in Path(temporary).iterdir():
                os.replace(file, directory / file.name)


def _open(files: list[str]) -> Directory:
    """The checkpoint that transformers resolved: the usual names with their index, or a single file of another name."""
    paths = [Path(file) for file in files]
    if len(paths) == 1 and paths[0].name != "model.safetensors":
        return Directory(dict(read_header(paths[0]).tensors), paths)
    return open_directory(paths[0].parent)


def fill(model: Any, specs: Mapping[str, Any], read: Read, load_config: Any, where: str) -> None:
    """Put a checkpoint's tensors into a model on `meta`, after everything about them has been checked."""
    for prefix in with_expert_bias(specs):
        module = _experts_at(model, prefix)
        if module is not None:
            module.add_bias()
    state = model.state_dict()
    tied = dict(model.all_tied_weights_keys)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied}
    causal = hasattr(model, "lm_head")
    ignore = [] if causal and getattr(model, "mtp", None) is not None else ["mtp."]
    ignore += [] if causal and not tied else ["lm_head."]
    matched = plan(specs, wanted, ignore, where)
    if tied and "lm_head.weight" in specs:
        _check_tie(matched.sources["model.embeddings.weight"][0], read, where)
    for name, sources in matched.sources.items():
        dtype = state[name].dtype
        device = _device(load_config.device_map, name)
        _put(model, name, _assemble(sources, read, wanted[name], dtype, device))


def _experts_at(model: nn.Module, hub_prefix: str) -> Any:
    modules = dict(model.named_modules())
    return modules.get(hub_prefix.replace("backbone.", "model.", 1), modules.get(hub_prefix.removeprefix("backbone.")))


def _assemble(sources: list[str], read: Read, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    if len(sources) == 1 and shape[:1] != (1,):
        return read(sources[0]).to(device=device, dtype=dtype)
    if len(sources) == 1:
        return read(sources[0]).reshape(shape).to(device=device, dtype=dtype)
    stacked = torch.empty(shape, dtype=dtype, device=device)
    for index, source in enumerate(sources):
        stacked[index] = read(source)
    return stacked


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if leaf in parent._parameters:
        value = nn.Parameter(value, requires_grad=True)
    value._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' flag: never initialize this again
    setattr(parent, leaf, value)


def _device(device_map: Any, name: str) -> Any:
    """The device of the longest prefix of `name` in transformers' device map."""
    if not device_map:
        return torch.device("cpu")
    fitting = [key for key in device_map if key == "" or name == key or name.startswith(key + ".")]
    device = device_map[max(fitting, key=len)]
    if device == "disk":
        raise UnsupportedError("device_map: offloading to disk is not supported by this version")
    return device


def _check_tie(embeddings: str, read: Read, where: str) -> None:
    if not torch.equal(read("lm_head.weight"), read(embeddings)):
        raise CheckpointError(
            f"{where}: tie_word_embeddings=True, but lm_head.weight differs from the embeddings; set it to False in"
            " config.json if the weights are right"
        )


def _hub_views(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for native, tensor in tensors.items():
        pieces = hub_names(native, tuple(tensor.shape))
        for index, (name, shape) in enumerate(pieces):
            yield name, tensor if tuple(tensor.shape) == shape else tensor[index]


def _bytes(size: int | str) -> int:
    """`5GB`, `200MB` or a number of bytes."""
    if isinstance(size, int):
        return size
    units = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}
    for unit, factor in units.items():
        if size.upper().endswith(unit) and size[: -len(unit)].strip().replace(".", "", 1).isdigit():
            return int(float(size[: -len(unit)]) * factor)
    raise InputError(f"max_shard_size={size!r}: give a number of bytes, or a text such as '5GB'")
