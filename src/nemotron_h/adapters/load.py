"""`load_adapter`: an adapter's files on a model, strictly.

PEFT loads what fits and warns of the rest, so an adapter with other names is a model without an adapter. Here every
tensor of the file has its place and every place its tensor, or nothing is changed and one error lists the differences.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nemotron_h.adapters import names
from nemotron_h.adapters.compat import peft_compat, require_peft
from nemotron_h.adapters.contents import Contents, raise_if
from nemotron_h.adapters.names import PREFIX
from nemotron_h.adapters.targets import base_of, named_targets
from nemotron_h.checkpoint.safetensors import TensorReader
from nemotron_h.errors import CheckpointError, InputError, ModelNotFoundError

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> PeftModel:
    """Put an adapter on a model.

    Reads what PEFT wrote for this package's or transformers' classes (names `model.`), for NVIDIA's remote code (names
    `backbone.`, routed experts one by one), and both layouts of `export_adapter`. Types: LoRA, rsLoRA, DoRA, also on
    routed experts and `out_proj`, and LoHa, LoKr, IA3 and OFT on linears.

    Args:
        model: A model of this package, which is changed in place: its weights are frozen, its targets wrapped. Or a
            PeftModel, which gets one more adapter; as in PEFT, the active one stays until `set_adapter`.
        path: Directory, or hub id, with adapter_config.json and adapter_model.safetensors.
        adapter_name: Its name in the PeftModel.
        is_trainable: Train it further; otherwise it is frozen and the model put into eval mode.
        subfolder: Where in the directory or repository.
        revision, token, cache_dir, local_files_only: For a hub id, as in `huggingface_hub`.

    Returns:
        The PeftModel, `PeftModelForCausalLM` if the adapter's task_type says so.

    Raises:
        ModelNotFoundError: no such directory or repository. CheckpointError: damaged files, pickle, or tensors that do
            not fit this model: missing, unused, of another shape. UnsupportedError: a type or setting that is not read.
        InputError: the name is taken, or no model of this package. MissingDependencyError: without PEFT.
        After an error the model is as before.
    """
    require_peft()
    base = base_of(model)
    _check_name(model, adapter_name)
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    config_file, weights_file = _find(path, subfolder, hub)
    adapter = Contents.read(config_file, weights_file, base)
    config = adapter.make_config(base, is_trainable)
    with peft_compat(model), all_or_nothing(model, base, adapter_name):
        peft_model = _inject(model, config, adapter_name, adapter.where)
        _fill(peft_model, adapter, adapter_name)
    if is_trainable:
        peft_model.set_requires_grad(adapter_name)
    else:
        peft_model.eval()
    return peft_model


def _check_name(model: Any, adapter_name: str) -> None:
    if not adapter_name or "." in adapter_name:
        raise InputError(f"adapter_name={adapter_name!r}: must be a text without dots")
    taken = getattr(model, "peft_config", {})
    if adapter_name in taken:
        raise InputError(f"adapter_name={adapter_name!r}: the model has one of this name; its adapters: {list(taken)}")
    if taken and not hasattr(model, "get_base_model"):
        raise InputError("model: has adapters already; give the PeftModel that holds them instead of the model inside")


# Files


def _find(path: str | os.PathLike[str], subfolder: str, hub: Mapping[str, Any]) -> tuple[Path, Path]:
    """The two files of an adapter."""
    name = os.fspath(path)
    directory = Path(name, subfolder)
    if not Path(name).exists():
        if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
            raise ModelNotFoundError(f"{name}: no such directory, and not a hub id (owner/name)")
        hub = {**hub, "subfolder": subfolder or None}
        return _download(name, CONFIG, hub), _download(name, WEIGHTS, hub)
    if not directory.is_dir():
        raise ModelNotFoundError(f"{directory}: not a directory; give the one that holds {CONFIG}")
    if not (directory / CONFIG).exists():
        model = " (it holds a model: from_pretrained loads it)" if (directory / "config.json").exists() else ""
        raise CheckpointError(f"{directory}: there is no {CONFIG}, so this is no adapter{model}")
    if not (directory / WEIGHTS).exists():
        pickle = (directory / "adapter_model.bin").exists()
        why = "adapter_model.bin is pickle, which can run code and is never loaded; save it again as safetensors"
        raise CheckpointError(f"{directory}: there is no {WEIGHTS}{f': {why}' if pickle else ''}")
    return directory / CONFIG, directory / WEIGHTS


def _download(repository: str, file: str, hub: Mapping[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return Path(hf_hub_download(repository, file, **hub))
    except HFValidationError as error:
        raise ModelNotFoundError(f"{repository}: no such directory, and not a hub id (owner/name)") from error
    except (OSError, HTTPError) as error:
        raise ModelNotFoundError.of(f"{repository}: {file}", error) from error


# The model


@contextmanager
def all_or_nothing(model: Any, base: Any, adapter_name: str) -> Iterator[None]:
    """Take the adapter off `model` again when the body fails, or all adapters if it had none; `base` is inside."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    trained = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    try:
        yield
    except BaseException:
        if model is base:
            wrapped = [(n, m) for n, m in base.named_modules() if isinstance(m, BaseTunerLayer)]
            wrapped += [(n, m) for n, m in base.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
            for name, module in wrapped:
                original = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
                if ".base_layer" not in name:
                    base.set_submodule(name, original)
            base.__dict__.pop("peft_config", None)
        elif adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


def _inject(model: Any, config: Any, adapter_name: str, where: str) -> Any:
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

    try:
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            return model
        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)(model, config, adapter_name)
    except (TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{where}: PEFT cannot put this adapter on the model: {reason}") from error


def _fill(peft_model: Any, adapter: Contents, adapter_name: str) -> None:
    """Copy the tensors of the file, after names and shapes have been held against the places that PEFT made."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    base = peft_model.get_base_model()
    places = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    wrappers = names.wrappers(base)
    problems: list[str] = []
    with TensorReader() as reader:
        state = {PREFIX + name: reader.read(info) for name, info in adapter.tensors.items()}
        for (target, kind), found in adapter.experts.items():
            parts = [reader.read(found[expert]) for expert in sorted(found)]
            name = f"{PREFIX}{wrappers[target]}.{kind}"
            if len({tuple(part.shape) for part in parts}) == 1 and name not in state:
                state[name] = names.stack(kind, parts)
            else:
                problems.append(f"{target}: {kind} of the experts differ in shape, or are there stacked as well")
        problems += [f"{name}: missing" for name in places if name not in state]
        problems += [f"{name}: the model has no place for it" for name in state if name not in places]
        problems += [
            f"{name}: shape {list(state[name].shape)}, the model needs {list(place.shape)}"
            for name, place in places.items()
            if name in state and state[name].shape != place.shape
        ]
        problems += [p for name, info in adapter.extra.items() for p in _differs(base, name, reader.read(info))]
    raise_if(problems, adapter.where)
    set_peft_model_state_dict(peft_model, state, adapter_name=adapter_name)


def _differs(base: nn.Module, name: str, stored: Tensor) -> list[str]:
    """Whether a base weight that was stored beside an adapter is another one than the model's."""
    module = name.removesuffix(".base_layer.weight")
    own: Any = dict(named_targets(base)).get(module)
    weight = getattr(own, "weight", None)
    if weight is None or weight.shape != stored.shape:
        return [f"{name}: the adapter was made for a model with another {module}"]
    narrow = min((weight.dtype, stored.dtype), key=lambda dtype: torch.finfo(dtype).bits)
    if torch.equal(weight.detach().cpu().to(narrow), stored.to(narrow)):
        return []
    return [f"{name}: the adapter was made for a model whose {module} has other values"]
