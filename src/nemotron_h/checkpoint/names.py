"""Names and shapes of a checkpoint against those of a model: every spelling in, the hub layout out.

A model's own names differ from the hub's in two ways: `model.` for `backbone.`, and experts are stacked,
`mixer.experts.up_proj` [E, F, L] for `mixer.experts.<e>.up_proj.weight` [F, L].
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nemotron_h.errors import CheckpointError

Shape = tuple[int, ...]
FLOATS = ("F64", "F32", "BF16", "F16")
_SHOWN = 50

_STACKED = re.compile(r"(.*\.experts)\.(up_proj|down_proj)(_bias)?$")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(up_proj|down_proj)\.(weight|bias)$")
_SPELLINGS = (
    (re.compile(r"^backbone\.embedding\."), "backbone.embeddings."),
    (re.compile(r"\.mixer\.e_score_correction_bias$"), ".mixer.gate.e_score_correction_bias"),
    (re.compile(r"\.mixer\.(gate\.)?e_score_correction\.bias$"), ".mixer.gate.e_score_correction_bias"),
    (re.compile(r"\.experts\.(up_proj|down_proj)\.(weight)$"), r".experts.\1"),
)
_LANGUAGE = "language_model."
_PACKED = ("F8", "F4", "U8", "I8")
_SCALE = re.compile(r"\.(weight_scale|weight_scale_2|input_scale|k_scale|v_scale|weight_packed|weight_scale_inv)$")


class Spec(Protocol):
    """What a file header says of a tensor; `safetensors.TensorSpec` is one."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...


def canonical(name: str) -> str:
    """The hub's spelling of a checkpoint's tensor name."""
    name = name.removeprefix(_LANGUAGE)
    if name.startswith("model."):
        name = "backbone." + name.removeprefix("model.")
    elif name.startswith(("layers.", "embeddings.", "embedding.", "norm_f.")):
        name = "backbone." + name
    for pattern, spelling in _SPELLINGS:
        name = pattern.sub(spelling, name)
    return name


def hub_names(native: str, shape: Shape) -> list[tuple[str, Shape]]:
    """Hub names and shapes of a model's tensor; one per expert for stacked ones."""
    if native.startswith("model."):
        native = "backbone." + native.removeprefix("model.")
    elif not native.startswith(("lm_head.", "mtp.")):
        native = "backbone." + native
    stacked = _STACKED.match(native)
    if stacked is None:
        return [(native, shape)]
    kind = "bias" if stacked[3] else "weight"
    return [(f"{stacked[1]}.{e}.{stacked[2]}.{kind}", shape[1:]) for e in range(shape[0])]


def stacked_name(native: str) -> str:
    """Hub spelling of a stacked tensor that is stored as one."""
    return "backbone." + native.removeprefix("model.") if not native.startswith("mtp.") else native


def with_expert_bias(names: Iterable[str]) -> set[str]:
    """Hub prefixes (`backbone.layers.1.mixer.experts`) of the experts that carry biases."""
    found = set()
    for name in map(canonical, names):
        expert, stacked = _EXPERT.match(name), _STACKED.match(name)
        if expert is not None and expert[4] == "bias":
            found.add(expert[1])
        elif stacked is not None and stacked[3]:
            found.add(stacked[1])
    return found


@dataclass
class Plan:
    """For every tensor of the model those of the checkpoint it is made of: one, one per expert, none if optional."""

    sources: dict[str, list[str]] = field(default_factory=dict)


def plan(
    specs: Mapping[str, Spec],
    wanted: Mapping[str, Shape],
    ignore: Sequence[str] = (),
    where: str = "checkpoint",
    optional: Collection[str] = (),
    packed: Collection[str] = (),
) -> Plan:
    """Match a checkpoint with a model, strictly.

    Args:
        specs: The checkpoint's tensors by their own names.
        wanted: The model's tensors by its own names.
        ignore: Prefixes (hub spelling) of tensors that this model does not need.
        where: The checkpoint's path, for the error.
        optional: Those of `wanted` that may be absent.
        packed: Those of `wanted` that the checkpoint holds packed, as bytes.

    Raises:
        CheckpointError: listing every missing, unexpected, duplicate and wrong tensor.
    """
    missing: list[str] = []
    wrong: list[str] = []
    found = _by_canonical_name(specs, wrong)
    result = Plan()
    for native, shape in wanted.items():
        pieces = hub_names(native, shape)
        whole = stacked_name(native)
        if _STACKED.match(whole) and whole in found:
            pieces = [(whole, shape)]
        result.sources[native] = []
        for name, piece_shape in pieces:
            own = found.pop(name, None)
            if own is not None:
                result.sources[native].append(own)
                wrong += _misfit(specs[own], piece_shape, ("U8",) if native in packed else FLOATS)
            elif native not in optional:
                missing.append(name)
    unexpected = [own for name, own in found.items() if not name.startswith(tuple(ignore))]
    quantized = not packed and any(_SCALE.search(own) or specs[own].dtype.startswith(_PACKED) for own in specs)
    _raise(where, missing, unexpected, wrong, quantized)
    return result


def _by_canonical_name(specs: Mapping[str, Spec], wrong: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    multimodal = False
    for own in sorted(specs, key=lambda name: not name.startswith(_LANGUAGE)):  # those of the language model first
        name = canonical(own)
        if name in found:
            wrong.append(f"{own} and {found[name]} are two spellings of {name}")
        elif own.startswith(_LANGUAGE) or not multimodal:
            found[name] = own
        multimodal |= own.startswith(_LANGUAGE)
    return found


def _misfit(spec: Spec, shape: Shape, dtypes: Sequence[str]) -> list[str]:
    found = []
    if spec.dtype not in dtypes:
        found.append(f"{spec.name} is {spec.dtype}, expected one of {', '.join(dtypes)}")
    if tuple(spec.shape) != tuple(shape):
        found.append(f"{spec.name} is {list(spec.shape)}, expected {list(shape)}")
    return found


def _raise(where: str, missing: list[str], unexpected: list[str], wrong: list[str], quantized: bool) -> None:
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}"
        + (f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN))
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong", wrong))
        if names
    ]
    if not parts:
        return
    advice = "does the config belong to these weights?"
    if quantized:
        advice = "the weights are quantized: this version reads float32, bfloat16 and float16 checkpoints"
    raise CheckpointError(f"{where} does not fit the model, nothing was loaded. {'; '.join(parts)}. {advice}")
