"""Loading and saving the weights of a model: strict, streamed, one tensor at a time.

What is overridden here are in part private hooks of transformers; tests/loading/test_transformers_hooks.py holds a
canary for each.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError  # of the http client that it uses
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.loading_report import LoadStateDictInfo

from nemotron_h.checkpoint.directory import Directory, check_index, open_directory, write_directory
from nemotron_h.checkpoint.generation_config import check_generation_config
from nemotron_h.checkpoint.names import hub_names, stacked_name
from nemotron_h.checkpoint.safetensors import (
    TensorReader,
    TensorSpec,
    dtype_name,
    read_header,
    spec_of,
)
from nemotron_h.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    ModelNotFoundError,
    NemotronHError,
    UnsupportedError,
)
from nemotron_h.filling import Files, Given, fill
from nemotron_h.quantization import is_packed, scheme
from nemotron_h.quantization.scheme import METHOD
from nemotron_h.state_dicts import rename_to_native, tie_head

_QUANTIZING = "not in this version; quantization='bf16', 'int8' or 'int4' packs the weights while loading"
_PARALLEL = "tensor parallel loading is not in this version"
_REFUSED = {
    "gguf_file": "GGUF files are not read by this version; convert the checkpoint to safetensors",
    "quantization_config": _QUANTIZING,
    "load_in_8bit": _QUANTIZING,
    "load_in_4bit": _QUANTIZING,
    "key_mapping": "the family's spellings are known; rename the tensors of other checkpoints",
    "ignore_mismatched_sizes": "a tensor of another size would be replaced by a random one; use"
    " resize_token_embeddings after loading for another vocabulary",
    "variant": "only model.safetensors and model.safetensors.index.json are read; rename the variant's files",
    "tp_plan": _PARALLEL,
    "tp_size": _PARALLEL,
    "device_mesh": _PARALLEL,
    "distributed_config": _PARALLEL,
}
_REFUSED_IN_SAVE = {
    "variant": "the files are called model.safetensors or model-<i>-of-<n>.safetensors; rename them afterwards",
    "distributed_checkpoint": "checkpoints are written from one process by this version",
}
# What matters for finding and reading config.json.
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "dtype")


class Loading(PreTrainedModel):
    """The file side of `NemotronHPreTrainedModel`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint directory or a hub id; arguments as in transformers. Pickle files are never read.

        Args:
            pretrained_model_name_or_path: Directory, or hub id (`revision`, `token`, `cache_dir`, offline as usual);
                None with `config` and `state_dict`, whose tensors are copied.
            dtype: Default "auto", the checkpoint's.
            quantization: "bf16", "int8" or "int4" packs the weights while they are read, a few rows at a time.
            mmap: Of a packed checkpoint: True maps its files, so that processes share them, False copies; None maps
                where the system gives pages of 2 MiB, since smaller ones cost a third of the speed.

        Raises:
            ModelNotFoundError: no such directory or repository. CheckpointError: damaged, or not of this config: one
                error that lists every missing, unexpected and wrong tensor. ConfigError: an illegal config.
                UnsupportedError: quantized weights, adapters, or an argument that this version does not act on.
        """
        source = pretrained_model_name_or_path
        _refuse(kwargs, _REFUSED, "from_pretrained")
        if kwargs.pop("use_safetensors", None) is False:
            raise UnsupportedError("from_pretrained(use_safetensors=False): pickle can run code, so it is never loaded")
        if source is None and (kwargs.get("config") is None or kwargs.get("state_dict") is None):
            raise InputError("from_pretrained(None): give a path or a hub id, or both config=... and state_dict=...")
        try:
            _check_files(source, kwargs.get("subfolder") or "")
            _check_config(cls, source, kwargs)
            kwargs = _with_quantization(cls, source, kwargs)
            if source is not None and not Path(source).exists():
                _check_hub_weights(str(source), kwargs)
            with _quiet_about_packing():
                return super().from_pretrained(source, *model_args, use_safetensors=True, **kwargs)
        except NemotronHError:
            raise
        except SafetensorError as error:  # transformers looks for the dtype when the config does not say it
            raise CheckpointError(f"{source}: not a readable safetensors file ({error})") from error
        except KeyError as error:
            if error.args != ("metadata",):
                raise
            raise CheckpointError(
                f'{source}: the index has no "metadata": transformers needs it, {{}} will do'
            ) from error
        except (OSError, HTTPError) as error:
            raise ModelNotFoundError.of(source, error) from error

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """torch's hook below `load_state_dict`: hub names are taken as well as the model's own."""
        head = self._modules.get("lm_head")
        rename_to_native(state_dict, prefix, "" if head is None else "model.")
        if head is not None and self.config.tie_word_embeddings and "weight" in head._parameters:
            tie_head(state_dict, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @staticmethod
    def _load_pretrained_model(
        model: Any,
        state_dict: Mapping[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        *_: Any,
    ) -> tuple[LoadStateDictInfo, None]:
        """Fill the meta model; transformers' hook."""
        where = str(load_config.pretrained_model_name_or_path)
        if state_dict is not None:
            for name, tensor in state_dict.items():
                if not isinstance(tensor, Tensor):
                    raise InputError(f"state_dict[{name!r}] must be a tensor, is {type(tensor).__name__}")
            specs = {name: spec_of(name, tensor) for name, tensor in state_dict.items()}
            fill(model, specs, Given(state_dict), load_config, "state_dict")
        else:
            directory, mapped = _open(checkpoint_files or []), model.config.__dict__.pop("_mmap", None)
            with TensorReader() as reader:
                fill(model, directory.tensors, Files(reader, directory.tensors, mapped), load_config, where)
        tied = set(model.all_tied_weights_keys)  # transformers ties those that it hears are missing
        return LoadStateDictInfo(tied, set(), set(), [], {}, set()), None

    def _load_and_finalize_distributed_pretrained_model(self, directory: Any, *_: Any) -> Any:
        """transformers' way for directories with `shard-<i>-model-<j>-of-<n>.safetensors` files; it checks little."""
        raise UnsupportedError(f"{directory}: holds a distributed checkpoint; save it again with save_pretrained(...)")

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
        _refuse(kwargs, _REFUSED_IN_SAVE, "save_pretrained")
        if kwargs.pop("safe_serialization", True) is False:
            raise UnsupportedError("save_pretrained(safe_serialization=False): pickle is never written")
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
        if self.config.tie_word_embeddings:
            for name in self.all_tied_weights_keys:
                tensors.pop(name, None)
        views = dict(hub_views(tensors))
        specs = [TensorSpec(name, dtype_name(view.dtype), tuple(view.shape)) for name, view in views.items()]
        write_directory(Path(save_directory), specs, views.__getitem__, max_shard_size=_bytes(max_shard_size))
        self._save_json(Path(save_directory))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def _save_json(self, directory: Path) -> None:
        config = copy.deepcopy(self.config)
        config.dtype = str(self.dtype).removeprefix("torch.")
        config.architectures = [type(self).__name__]
        if not is_packed(getattr(config, "quantization_config", None)):
            config.__dict__.pop(
                "quantization_config", None
            )  # of the checkpoint the config came from, not of these weights
        with tempfile.TemporaryDirectory(dir=directory, prefix=".tmp-") as temporary:
            config.save_pretrained(temporary)
            if self.can_generate():
                self.generation_config.save_pretrained(temporary)
            for file in Path(temporary).iterdir():
                os.replace(file, directory / file.name)


def _refuse(kwargs: Mapping[str, Any], refused: Mapping[str, str], function: str) -> None:
    for name, reason in refused.items():
        if kwargs.get(name):
            raise UnsupportedError(f"{function}({name}=...): {reason}")


def _check_files(source: Any, subfolder: str) -> None:
    """Refuse a local directory that is damaged before transformers opens any of its files."""
    if source is None:
        return
    path = Path(source, subfolder)
    if not path.exists() and (path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1):
        raise ModelNotFoundError(f"{source}: no such directory, and not a hub id (owner/name)")
    if path.is_file():
        raise ModelNotFoundError(f"{source}: is a file; give the directory that holds config.json and the weights")
    if not path.is_dir():
        return
    open_directory(path)
    if (path / "adapter_config.json").exists():
        raise UnsupportedError(
            f"{path}: holds an adapter (adapter_config.json), which from_pretrained does not apply: load the model from"
            " a directory of its own, then nemotron_h.load_adapter(model, adapter_directory)"
        )
    generation = path / "generation_config.json"
    if generation.exists():
        check_generation_config(generation)


def _check_hub_weights(repository: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse a repository without safetensors; transformers would ask the hub to convert its pickle files.

    Its small files are checked before transformers acts on them: it would fetch whatever the index names, and take the
    defaults for a generation config that it cannot read.
    """
    own = {name: kwargs[name] for name in _HUB if name != "dtype" and kwargs.get(name) is not None}
    generation = cached_file(repository, "generation_config.json", _raise_exceptions_for_missing_entries=False, **own)
    if generation is not None:
        check_generation_config(Path(generation))
    for name in ("model.safetensors", "model.safetensors.index.json"):
        file = cached_file(repository, name, _raise_exceptions_for_missing_entries=False, **own)
        if file is not None:
            if name.endswith(".json"):
                check_index(Path(file).parent)
            return
    raise CheckpointError(
        f"{repository}: neither model.safetensors nor model.safetensors.index.json is there; pickle files (.bin, .pt)"
        " can run code and are never loaded: convert them, or ask for another revision"
    )


def _check_config(cls: type[PreTrainedModel], source: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse quantized weights in words, before transformers looks for a quantizer of that name."""
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        own = {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}
        assert cls.config_class is not None
        config = cls.config_class.from_pretrained(source if config is None else config, **own)
    quantized = getattr(config, "quantization_config", None)
    if is_packed(quantized):
        scheme(quantized)  # type: ignore[arg-type]
    elif quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else type(quantized).__name__
        raise UnsupportedError(
            f"{source}: quantization_config in config.json says {method}; this version reads float32, bfloat16 and"
            " float16 weights only: take the BF16 checkpoint, or drop the entry if the weights are none of those"
        )


@contextmanager
def _quiet_about_packing() -> Iterator[None]:
    """transformers warns that it does not know our `quant_method` and goes on without it, as it should."""
    log = logging.getLogger("transformers.quantizers.auto")

    def keep(record: logging.LogRecord) -> bool:
        return f"got {METHOD} " not in record.getMessage()

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)


def _with_quantization(cls: type[PreTrainedModel], source: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with `quantization` and `mmap` put into the config, by which they reach the model."""
    quantization, mapped = kwargs.pop("quantization", None), kwargs.pop("mmap", None)
    if quantization is None and mapped is None:
        return kwargs
    config: Any = kwargs.pop("config", None)
    assert cls.config_class is not None
    if not isinstance(config, PreTrainedConfig):
        loaded: Any = cls.config_class.from_pretrained(
            source if config is None else config, return_unused_kwargs=True, **kwargs
        )
        config, kwargs = loaded
    config = copy.deepcopy(config)
    if quantization is not None:
        wanted = scheme(quantization).to_dict()
        if getattr(config, "quantization_config", None) not in (None, wanted):
            raise ConfigError(f"{source}: its weights are packed as {config.quantization_config}, not as {wanted}")
        config.quantization_config = wanted
    if mapped is not None:
        config.__dict__["_mmap"] = mapped
    return {**kwargs, "config": config}


def _open(files: list[str]) -> Directory:
    """The checkpoint that transformers resolved: the usual names with their index, or a single file of another name."""
    paths = [Path(file) for file in files]
    if len(paths) == 1 and paths[0].name != "model.safetensors":
        return Directory(dict(read_header(paths[0]).tensors), paths)
    return open_directory(paths[0].parent)


def hub_views(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A state dict under the hub's names; stacked experts become one view each."""
    for native, tensor in tensors.items():
        if (
            tensor.dtype == torch.uint8 and tensor.dim() == 3
        ):  # packed experts stay together, so that they can be mapped
            yield stacked_name(native), tensor
            continue
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
