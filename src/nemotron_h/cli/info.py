"""`nemotron-h info`: what a model is and needs, from its configuration and the headers of its files alone."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron_h import family
from nemotron_h.cli import _options
from nemotron_h.cli._models import Shape, assignments, shape
from nemotron_h.cli._output import columns, print_json, size
from nemotron_h.errors import InputError

if TYPE_CHECKING:
    from nemotron_h.checkpoint.directory import Directory

CONTEXTS = (1024, 8192, 32768)
FORMATS = ("float32", "bfloat16", "int8", "int4")
TRAINED = ("float32", "bfloat16")
LORA_RANK = 16

_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_LAYER = re.compile(r"backbone\.layers\.(\d+)\.")
_STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def command(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL|PRESET]", show_default=False)] = None,
    changes: _options.Set = None,
    memory: Annotated[bool, typer.Option("--memory", help="Memory of inference and training instead.")] = False,
    context: Annotated[
        list[int] | None, typer.Option(metavar="N", help="With --memory: tokens of each sequence; repeatable.")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="With --memory: sequences; default 1.")] = None,
    json: _options.Json = False,
) -> None:
    """Layer pattern, parameters, bytes by part and memory needed, by arithmetic; no weights are loaded.

    MODEL is a checkpoint directory, a config.json or a hub id (of which config.json is fetched). The default is the
    shipped model. Counts are exact, router biases and MTP heads included; memory is weights plus the cache of one
    sequence, without activations. --memory says more of it: the largest layer, --batch sequences of --context tokens,
    and training all weights or an adapter with AdamW.
    """
    of = shape(model, assignments(changes or []))
    if memory:
        facts = estimate(of, context, 1 if batch is None else batch)
    elif context or batch is not None:
        raise InputError("--context and --batch belong to --memory: give it with them")
    else:
        facts = describe(of)
    if json:
        print_json(facts)
    else:
        print("\n".join(_estimate_text(facts) if memory else _text(facts)))


def describe(of: Shape) -> dict[str, Any]:
    """All of the command's facts; every size is an integer of bytes."""
    spec = family.describe(of.config)
    stored = _open(of)
    dtype = _dtype(spec)
    count, cache = family.count(spec), family.cache_bytes(spec, dtype)
    contexts = _contexts(spec)
    return {
        "model": of.name,
        "kind": of.kind,
        "pattern": family.pattern(spec.layers_block_type),
        "layers": dict(Counter(spec.layers_block_type)),
        "mtp_heads": spec.num_nextn_predict_layers,
        "mtp_pattern": family.pattern(spec.mtp_layers_block_type) if spec.num_nextn_predict_layers else None,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "dtype": dtype,
        "parameters": count.total,
        "active_parameters": count.active,
        "parameters_by_part": count.by_part,
        "bytes_by_part": _bytes_by_part(spec, count, dtype) if stored is None else _stored_by_part(spec, stored),
        "cache_bytes_per_token": cache.per_token,
        "cache_bytes_fixed": cache.fixed,
        "memory": {name: _memory(spec, count, name, contexts) for name in FORMATS},
        "files": None if stored is None else _files(stored),
    }


def _contexts(spec: Any) -> list[int]:
    return sorted({*(c for c in CONTEXTS if c < spec.max_position_embeddings), spec.max_position_embeddings})


def estimate(of: Shape, contexts: list[int] | None, batch: int) -> dict[str, Any]:
    """The facts of `--memory`; every size is an integer of bytes, of tensors alone, without activations.

    Raises:
        InputError: a context or batch below 1. ConfigError, UnsupportedError: as `describe`.
    """
    for name, value in (("--batch", batch), *(("--context", c) for c in contexts or ())):
        if value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    spec = family.describe(of.config)
    contexts = sorted(set(contexts or _contexts(spec)))
    largest = family.largest_unit(spec)
    return {
        "model": of.name,
        "kind": of.kind,
        "parameters": family.count(spec).total,
        "batch": batch,
        "largest_layer": {"name": largest.name, "parameters": largest.parameters},
        "inference": {name: _inference(spec, name, contexts, batch) for name in FORMATS},
        "training": {name: _training(family.full_training(spec, name)) for name in TRAINED},
        "lora": {"rank": LORA_RANK, "parameters": family.lora_parameters(spec, LORA_RANK)}
        | {name: _training(family.lora_training(spec, name, LORA_RANK)) for name in TRAINED},
    }


def _inference(spec: Any, dtype: str, contexts: list[int], batch: int) -> dict[str, Any]:
    weights = sum(_bytes_by_part(spec, family.count(spec), dtype).values())
    cache = family.cache_bytes(spec, "float32" if dtype == "float32" else "bfloat16")
    caches = {str(c): batch * (cache.fixed + c * cache.per_token) for c in contexts}
    return {
        "largest_layer": family.largest_unit(spec).weights(dtype),
        "weights": weights,
        "cache": caches,
        "total": {context: weights + size for context, size in caches.items()},
    }


def _training(of: family.Training) -> dict[str, int]:
    return asdict(of) | {"total": of.total}


def _open(of: Shape) -> Directory | None:
    """The headers of a local checkpoint; None for a shape without weight files."""
    if of.directory is None or not any(name.endswith(_WEIGHT_FILES) for name in os.listdir(of.directory)):
        return None
    from nemotron_h.checkpoint.directory import open_directory

    return open_directory(of.directory)


def _dtype(spec: Any) -> str:
    given = str(spec.extras.get("dtype") or spec.extras.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return given if given in _options.DTYPES else "bfloat16"


def _router_biases(spec: Any) -> Counter[str]:
    """Number of router biases by part: they are float32 whatever the model's dtype."""
    found: Counter[str] = Counter()
    layers, heads = spec.block_configs, spec.mtp_block_configs
    for part, types, entries, times in (
        ("moe", spec.layers_block_type, layers, 1),
        ("mtp", spec.mtp_layers_block_type, heads, spec.num_nextn_predict_layers),
    ):
        if entries is None:
            found[part] = times * types.count("moe") * spec.n_routed_experts
        else:
            moe = [entry for entry in entries if entry["block_type"] == "moe"]
            found[part] = times * sum(entry.get("n_routed_experts", spec.n_routed_experts) for entry in moe)
    return found


def _bytes_by_part(spec: Any, count: family.Count, dtype: str) -> dict[str, int]:
    width, biases = family.DTYPE_BYTES[dtype], _router_biases(spec)
    return {part: math.ceil((n - biases[part]) * width) + 4 * biases[part] for part, n in count.by_part.items()}


def _stored_by_part(spec: Any, stored: Directory) -> dict[str, int]:
    from nemotron_h.checkpoint.names import canonical

    sizes: Counter[str] = Counter()
    for name, info in stored.tensors.items():
        sizes[_part(spec, canonical(name))] += info.nbytes
    return dict(sizes)


def _part(spec: Any, name: str) -> str:
    if (layer := _LAYER.match(name)) and int(layer[1]) < len(spec.layers_block_type):
        return spec.layers_block_type[int(layer[1])]
    for prefix, part in (("mtp.", "mtp"), ("lm_head.", "lm_head")):
        if name.startswith(prefix):
            return part
    part = name.removeprefix("backbone.").partition(".")[0]
    return part if part in ("embeddings", "norm_f") else "other"


def _memory(spec: Any, count: family.Count, dtype: str, contexts: list[int]) -> dict[str, int]:
    """Bytes of the weights in a format, with the cache of one sequence for each context length."""
    weights = sum(_bytes_by_part(spec, count, dtype).values())
    cache = family.cache_bytes(spec, "float32" if dtype == "float32" else "bfloat16")
    return {"weights": weights} | {str(c): weights + cache.fixed + c * cache.per_token for c in contexts}


def _files(stored: Directory) -> dict[str, Any]:
    by_dtype: Counter[str] = Counter()
    for info in stored.tensors.values():
        by_dtype[_STORED.get(info.dtype, info.dtype)] += info.nbytes
    return {
        "shards": len(stored.files),
        "tensors": len(stored.tensors),
        "parameters": sum(info.numel for info in stored.tensors.values()),
        "bytes": sum(by_dtype.values()),
        "bytes_by_dtype": dict(by_dtype),
    }


def _text(facts: dict[str, Any]) -> list[str]:
    layers = ", ".join(f"{number} {name}" for name, number in facts["layers"].items())
    lines = [
        f"model         {facts['model']} ({facts['kind']})",
        f"layers        {sum(facts['layers'].values())}: {layers}",
        f"pattern       {facts['pattern']}",
    ]
    if facts["mtp_heads"]:
        lines.append(f"MTP heads     {facts['mtp_heads']}, pattern {facts['mtp_pattern']}")
    lines += [
        f"vocabulary    {facts['vocab_size']:,}",
        f"hidden size   {facts['hidden_size']:,}",
        f"context       {facts['max_position_embeddings']:,}",
        f"parameters    {facts['parameters']:,}",
        f"active        {facts['active_parameters']:,} per token",
        f"cache         {facts['cache_bytes_per_token']:,} bytes per token, {facts['cache_bytes_fixed']:,} whatever the"
        f" length; per sequence, {facts['dtype']}",
    ]
    if (files := facts["files"]) is not None:
        dtypes = ", ".join(f"{size(n)} {name}" for name, n in files["bytes_by_dtype"].items())
        lines.append(
            f"files         {files['shards']}, {files['tensors']:,} tensors, {files['bytes']:,} bytes: {dtypes}"
        )
        if files["parameters"] != facts["parameters"]:
            lines.append(
                f"              they hold {files['parameters']:,} parameters, the configuration describes others"
            )
    parts = facts["bytes_by_part"]
    rows = [["part", "parameters", f"bytes ({'in the files' if files else facts['dtype']})"]]
    rows += [
        [name, f"{facts['parameters_by_part'].get(name, 0):,}", f"{parts.get(name, 0):,}"]
        for name in dict.fromkeys([*facts["parameters_by_part"], *parts])
    ]
    memory = facts["memory"]
    headers = [f"{int(c):,} tokens" for c in next(iter(memory.values())) if c != "weights"]
    needs = [["memory", "weights", *headers]] + [[name, *map(size, row.values())] for name, row in memory.items()]
    return [*lines, "", *columns(rows), "", *columns(needs)]


def _estimate_text(facts: dict[str, Any]) -> list[str]:
    inference, lora = facts["inference"], facts["lora"]
    batch, contexts = facts["batch"], [f"{int(c):,} tokens" for c in inference["bfloat16"]["cache"]]
    rows = [["inference", "largest layer", "weights", *(f"+ {c}" for c in contexts)]]
    for name, row in inference.items():
        rows.append([name, *map(size, (row["largest_layer"], row["weights"], *row["total"].values()))])
    caches = [["cache", *contexts]] + [[name, *map(size, inference[name]["cache"].values())] for name in TRAINED]
    steps = [["training, AdamW", "weights", "gradients", "masters", "optimizer", "total"]]
    steps += [[name, *map(size, row.values())] for name, row in facts["training"].items()]
    steps += [[f"{name}, LoRA r={lora['rank']}", *map(size, lora[name].values())] for name in TRAINED]
    return [
        f"model          {facts['model']} ({facts['kind']})",
        f"parameters     {facts['parameters']:,}",
        f"largest layer  {facts['largest_layer']['name']}, {facts['largest_layer']['parameters']:,} parameters",
        f"LoRA           {lora['parameters']:,} parameters on all projections, experts included, rank {lora['rank']}",
        f"batch          {batch:,}; sizes are those of tensors, activations are not in them",
        "",
        *columns(rows),
        "",
        *columns(caches),
        "",
        *columns(steps),
    ]
