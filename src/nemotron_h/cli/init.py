"""`nemotron-h init`: a random-weight checkpoint of any shape, tensor by tensor to disk."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_h import family
from nemotron_h.cli import _options
from nemotron_h.cli._models import Shape, assignments, shape
from nemotron_h.cli._options import check_dtype, check_quantization
from nemotron_h.cli._output import note, print_json, size
from nemotron_h.errors import InputError

if TYPE_CHECKING:
    from nemotron_h.checkpoint.safetensors import TensorSpec

_FORMAT_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def command(
    preset: Annotated[str, typer.Argument(metavar="PRESET", show_default=False)],
    directory: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    layers: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Layers: M mamba, * attention, E moe, - mlp, as in 'ME*-'.")
    ] = None,
    changes: _options.Set = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "bfloat16",
    quantization: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Pack the weights: bf16, int8 or int4, ready to be mapped.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal weights.")] = 0,
    json: _options.Json = False,
) -> None:
    """Write a random-weight checkpoint in the hub's layout, one tensor in memory at a time.

    PRESET is one of nemotron_h.presets(), or a config.json or checkpoint directory whose shape is taken. DIR must be
    empty or not exist. There is no tokenizer in it: give prompts as --ids, or copy a tokenizer.json.
    """
    check_dtype(dtype, allow_auto=False)
    check_quantization(quantization)
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed}: must be an integer from 0 to 2^63 - 1")
    fields = assignments(changes or [])
    if layers is not None:
        fields["hybrid_override_pattern"] = layers
    of = shape(preset, fields)
    spec = family.describe(of.config)  # every error of the shape before the long imports
    count = family.count(spec)
    _check_place(directory, _least_bytes(count, dtype, quantization))
    specs = _write(of, spec, directory, dtype, seed, quantization)
    written = sum(entry.nbytes for entry in specs)
    note(f"wrote {len(specs):,} tensors, {count.total:,} parameters, {size(written)} to {directory}")
    if json:
        print_json({"directory": str(directory), "parameters": count.total, "tensors": len(specs), "bytes": written})


def _least_bytes(count: family.Count, dtype: str, quantization: str | None) -> int:
    return int(count.total * family.DTYPE_BYTES[quantization or dtype])


def _check_place(directory: Path, needed: int) -> None:
    """Refuse before anything is written: a directory that is in use, a disk that is too small."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: is a file; give a directory that is empty or does not exist")
    if directory.is_dir() and any(directory.iterdir()):
        raise InputError(f"{directory}: is not empty; give another directory, or empty it first")
    parent = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(f"{directory}: needs {size(needed)}, {size(free)} are free there")


def _write(of: Shape, spec: Any, directory: Path, dtype: str, seed: int, quantization: str | None) -> list[TensorSpec]:
    """The checkpoint, complete or not at all: without weights config.json loads nothing, so they come last."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    note("importing torch")
    import torch
    from transformers import GenerationConfig

    from nemotron_h.checkpoint.directory import write_directory
    from nemotron_h.checkpoint.safetensors import TensorSpec, torch_dtype
    from nemotron_h.configuration import NemotronHConfig
    from nemotron_h.initialization import initialize
    from nemotron_h.ops.pack import empty_panels, pack_into
    from nemotron_h.packing import packed_names
    from nemotron_h.quantization import scheme

    config = NemotronHConfig.from_dict(of.config)
    config.dtype, config.architectures = dtype, ["NemotronHForCausalLM"]
    if quantization is not None:
        config.quantization_config = scheme(quantization).to_dict()
    floating = {
        name: TensorSpec(name, _FORMAT_NAMES["float32" if name.endswith("correction_bias") else dtype], shape_)
        for name, shape_ in family.tensors(spec)
    }
    packed = packed_names(config) if quantization is not None else {}
    inside = {name for entry in packed.values() for name in entry.sources}
    specs = {name: TensorSpec(name, "U8", entry.packed_shape) for name, entry in packed.items()}
    specs |= {name: entry for name, entry in floating.items() if name not in inside}
    bar = Progress(
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )
    with ExitStack() as undo, bar:
        task = bar.add_task("", total=sum(entry.nbytes for entry in specs.values()))

        def random(name: str) -> torch.Tensor:
            entry = floating[name]
            tensor = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
            initialize(name, tensor, config, torch.Generator().manual_seed(_seed(seed, name)))
            return tensor

        def produce(name: str) -> torch.Tensor:
            if name not in packed:
                tensor = random(name)
            else:
                entry, tensor = packed[name], empty_panels(packed[name].packed_shape)
                for source, panels in zip(entry.sources, tensor if tensor.dim() == 3 else tensor[None], strict=True):
                    pack_into(panels, random(source), entry.packing)
                    bar.advance(task, panels.numel())
                return tensor
            bar.advance(task, tensor.nbytes)
            return tensor

        if not directory.exists():
            directory.mkdir(parents=True)
            undo.callback(_remove_empty, directory)
        undo.callback(_remove_files, directory)
        config.save_pretrained(directory)
        GenerationConfig.from_model_config(config).save_pretrained(directory)
        write_directory(directory, list(specs.values()), produce)
        undo.pop_all()
    return list(specs.values())


def _seed(seed: int, name: str) -> int:
    """A seed of its own for every tensor, so that neither order nor a changed neighbour matters."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1


def _remove_files(directory: Path) -> None:
    """What a failed run may have left in the directory, which was empty before."""
    for pattern in ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"):
        for file in directory.glob(pattern):
            file.unlink(missing_ok=True)


def _remove_empty(directory: Path) -> None:
    with suppress(OSError):
        os.rmdir(directory)
