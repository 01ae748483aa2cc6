"""What the files of an adapter hold, and PEFT's config made of it: targets come from the tensors that are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from nemotron_h.adapters import names
from nemotron_h.adapters.compat import allow_expert_dora
from nemotron_h.adapters.names import PREFIX
from nemotron_h.adapters.settings import pattern_value, read_settings
from nemotron_h.adapters.targets import named_targets
from nemotron_h.checkpoint.names import FLOATS
from nemotron_h.checkpoint.safetensors import TensorInfo, read_header
from nemotron_h.errors import CheckpointError
from nemotron_h.experts import NemotronHExperts

_SHOWN = 20


@dataclass
class Contents:
    """What the files say, in this package's names.

    tensors   names without PEFT's prefix, and where the values are
    experts   single experts' tensors: (parameter, kind) -> by id
    extra     copies of base weights that PEFT stores beside an adapter on `lm_head`
    """

    where: str
    settings: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    experts: dict[tuple[str, str], dict[int, TensorInfo]] = field(default_factory=dict)
    extra: dict[str, TensorInfo] = field(default_factory=dict)

    @classmethod
    def read(cls, config_file: Path, weights_file: Path, base: nn.Module) -> Contents:
        adapter = cls(str(weights_file), read_settings(config_file))
        trunk = not hasattr(base, "lm_head")
        problems = []
        for name, info in read_header(weights_file).tensors.items():
            if info.dtype not in FLOATS:
                problems.append(f"{name}: dtype {info.dtype}, must be floating point")
            elif not name.startswith(PREFIX):
                problems.append(f"{name}: PEFT's names start with {PREFIX}")
            elif not adapter._add(name.removeprefix(PREFIX), info, trunk):
                problems.append(f"{name}: is there twice, under `model.` and `backbone.`")
        counts = names.expert_counts(base)
        for (target, kind), found in adapter.experts.items():
            needed = set(range(counts.get(target, 0))) or found.keys()
            if lacking := sorted(needed - found.keys()):
                problems.append(f"{target}: {kind}: of the {len(needed)} experts {lacking} are missing")
            if unknown := sorted(found.keys() - needed):
                problems.append(f"{target}: {kind}: the model has {len(needed)} experts, not {unknown}")
        if not (adapter.tensors or adapter.experts):
            problems.append("there are no tensors of an adapter")
        raise_if(problems, adapter.where)
        return adapter

    def _add(self, spelled: str, info: TensorInfo, trunk: bool) -> bool:
        """Put a tensor where it belongs; False if its place is taken."""
        name = names.native(spelled, trunk)
        key = names.parse(name)
        if key is not None and key.expert is not None:
            group = self.experts.setdefault((key.target, key.kind), {})
            return group.setdefault(key.expert, info) is info
        copied = key is None and name.endswith(".base_layer.weight")
        return (self.extra if copied else self.tensors).setdefault(name, info) is info

    # Settings

    def make_config(self, base: nn.Module, is_trainable: bool) -> Any:
        """PEFT's config of this adapter, for this model."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        trunk = not hasattr(base, "lm_head")
        settings = dict(self.settings)
        for key in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
            if isinstance(settings.get(key), list):
                settings[key] = [names.native(name, trunk) for name in settings[key]]
        if settings["peft_type"] == "LORA":
            settings |= self._lora_settings(base, is_trainable)
        else:
            self._check_rank(settings)
        settings["inference_mode"] = not is_trainable
        try:
            config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[settings.pop("peft_type")](**settings)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.where}: PEFT refuses the settings beside it: {error}") from error
        return allow_expert_dora(config) if settings.get("target_parameters") else config

    def _lora_settings(self, base: nn.Module, is_trainable: bool) -> dict[str, Any]:
        """Targets from the tensors, as full names, with the rank and alpha that the settings give each."""
        modules, parameters = self._targets(base)
        r, alpha = self.settings.get("r", 8), self.settings.get("lora_alpha", 8)
        ranks = {t: self._of_pattern("rank_pattern", t, r) for t in (*modules, *parameters)}
        alphas = {t: self._of_pattern("alpha_pattern", t, alpha) for t in (*modules, *parameters)}
        self._check_ranks(ranks, names.expert_counts(base))
        dropout = self.settings.get("lora_dropout", 0.0)
        return {
            "target_modules": modules,
            "target_parameters": parameters or None,
            "rank_pattern": {target: value for target, value in ranks.items() if value != r},
            "alpha_pattern": {target: value for target, value in alphas.items() if value != alpha},
            # PEFT has no dropout for stacked weights, and refuses it also where it would not be used.
            "lora_dropout": 0.0 if parameters and not is_trainable else dropout,
            **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        }

    def _targets(self, base: nn.Module) -> tuple[list[str], list[str]]:
        present, stacked, trunk = dict(named_targets(base)), names.expert_counts(base), not hasattr(base, "lm_head")
        keys = [key for key in map(names.parse, self.tensors) if key is not None]
        found = dict.fromkeys([key.module for key in keys] + [target for target, _ in self.experts])
        problems = []
        for target in found:
            if target not in present | stacked:
                problems.append(f"{target}: the model has no such module")
            elif target in present and not isinstance(present[target], nn.Linear | nn.Embedding | NemotronHExperts):
                problems.append(f"{target}: takes no adapter, only linears, embeddings and routed experts do")
        raise_if(problems, self.where)
        groups = dict.fromkeys(target.rpartition(".")[0] for target in stacked)
        wrapped = [module for module in found if module in groups]
        suffixes = [names.native(name, trunk) for name in self.settings.get("target_parameters") or []]
        parameters = [
            target
            for target in stacked
            if target in found
            or target.rpartition(".")[0] in wrapped
            and any(target == name or target.endswith(f".{name}") for name in suffixes)
        ]
        modules = [target for target in found if target not in groups and target not in stacked]
        return modules, parameters

    def _of_pattern(self, key: str, target: str, default: Any) -> Any:
        """The rank or alpha of a target, which is the same for all experts in one stacked weight."""
        patterns = self.settings.get(key) or {}
        found = self.experts.get((target, "lora_A.weight"))
        module, _, projection = target.rpartition(".")
        meant = [target] if found is None else [f"{module}.{expert}.{projection}" for expert in found]
        values = [pattern_value(patterns, (name, names.hub(name)), default) for name in meant]
        if len(set(values)) > 1:
            raise CheckpointError(f"{self.where}: {key} gives experts of {target} different values: {set(values)}")
        return values[0]

    def _check_ranks(self, ranks: Mapping[str, int], experts: Mapping[str, int]) -> None:
        """Before anything is allocated for them."""
        problems = []
        for name, info in self.tensors.items():
            key = names.parse(name)
            if key is None or key.kind not in ("lora_A.weight", "lora_embedding_A"):
                continue
            targets = [t for t in ranks if t == key.target or t.rpartition(".")[0] == key.target and t in experts]
            allowed = [ranks[t] * experts.get(t, 1) for t in targets]
            if allowed and info.shape[:1] not in [(rows,) for rows in allowed]:
                problems.append(f"{name}: shape {list(info.shape)}, the settings say {allowed[0]} rows")
        for (target, kind), found in self.experts.items():
            wrong = [i for i in found.values() if kind == "lora_A.weight" and i.shape[:1] != (ranks[target],)]
            problems += [f"{i.name}: shape {list(i.shape)}, the settings say rank {ranks[target]}" for i in wrong[:1]]
        raise_if(problems, self.where)

    def _check_rank(self, settings: Mapping[str, Any]) -> None:
        largest = max((size for info in self.tensors.values() for size in info.shape), default=0)
        for value in (settings.get("r") or 0, *(settings.get("rank_pattern") or {}).values()):
            if type(value) is not int or value > largest:
                raise CheckpointError(f"{self.where}: rank {value} is in the settings, no tensor is that large")


def raise_if(problems: list[str], where: str) -> None:
    """One `CheckpointError` for all problems, if there are any."""
    if problems:
        shown = "; ".join(problems[:_SHOWN]) + (f"; and {len(problems) - _SHOWN} more" if problems[_SHOWN:] else "")
        raise CheckpointError(f"{where}: the adapter does not fit this model, which is unchanged: {shown}")
