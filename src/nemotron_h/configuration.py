"""`NemotronHConfig`: the family's field table as a transformers configuration."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig, PreTrainedConfig

from nemotron_h import family
from nemotron_h.errors import ConfigError, ModelNotFoundError
from nemotron_h.family.fields import choice, short
from nemotron_h.strict_json import load_json

logger = logging.getLogger("nemotron_h")

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")
_KNOWN_QUANTIZATION = ("nemotron_h", "modelopt", "compressed-tensors", "fp8", "nvfp4", "gptq", "awq", "bitsandbytes")
_OWN_FIELDS = (
    "output_router_logits", "router_aux_loss_coef", "router_z_loss_coef", "block_configs", "mtp_block_configs",
    "mtp_loss_coef", "mtp_loss_depths",
)  # fmt: skip
# With these keys a file would change what transformers' own machinery does with the config: dropped, with a warning.
_REDIRECTING = (
    "text_config", "text_encoder", "encoder", "decoder", "generator", "is_causal", "rope_scaling", "rope_parameters",
    "distributed_config",
)  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_LABELS = 2**16
_MAX_CONFIG_BYTES = 16 << 20
_warned: set[str] = set()


class NemotronHConfig(PreTrainedConfig):
    # The docstring is assembled below from the field table.

    model_type: ClassVar[str] = "nemotron_h"
    attribute_map: ClassVar[dict[str, str]] = dict(family.ALIASES)
    # What Trainer's evaluation leaves out of its predictions: then they are the logits alone.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values", "mtp_logits", "mtp_loss", "aux_loss", "z_loss",
    ]  # fmt: skip

    vocab_size: int
    hidden_size: int
    layers_block_type: list[str]
    tie_word_embeddings: bool
    use_cache: bool
    num_logits_to_keep: int | None
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    attention_bias: bool
    attention_dropout: float
    sliding_window: int | None
    intermediate_size: int | list[int]
    mlp_hidden_act: str
    mlp_bias: bool
    use_mamba_kernels: bool
    ssm_state_size: int
    mamba_num_heads: int
    mamba_n_groups: int
    mamba_head_dim: int
    mamba_d_conv: int
    mamba_expand: int
    mamba_hidden_act: str
    mamba_dt_min: float
    mamba_dt_max: float
    mamba_dt_limit: tuple[float, float]
    mamba_dt_init_floor: float
    mamba_conv_bias: bool
    mamba_proj_bias: bool
    mamba_chunk_size: int
    mamba_ssm_cache_dtype: str
    n_routed_experts: int
    n_shared_experts: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    moe_latent_size: int | None
    moe_shared_expert_overlap: bool
    num_experts_per_tok: int
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    num_nextn_predict_layers: int
    mtp_layers_block_type: list[str]
    use_bias: bool
    initializer_range: float
    layer_norm_epsilon: float
    residual_in_fp32: bool
    hidden_dropout: float
    rescale_prenorm_residual: bool
    output_router_logits: bool
    router_aux_loss_coef: float
    router_z_loss_coef: float
    mtp_loss_coef: float
    mtp_loss_depths: int
    block_configs: list[dict[str, Any]] | None
    mtp_block_configs: list[dict[str, Any]] | None

    def __init__(self, **kwargs: Any) -> None:
        family.check_model_type(kwargs.pop("model_type", None), kwargs)
        values, extras = family.read(kwargs)
        object.__setattr__(self, "_post_init_done", False)
        for name, value in values.items():
            setattr(self, name, value)
        family.check(self)
        self.__post_init__(**_base_fields(self, extras))

    def validate(self) -> None:
        """Check every field and every rule between fields; `save_pretrained` and the models call it.

        Raises:
            ConfigError: naming field, value and rule.
        """
        family.check(self)

    def __setattr__(self, key: str, value: Any) -> None:
        name = family.canonical_name(key)
        if name in family.FIELDS:
            value = family.decode(name, value)
            family.check_field(name, value)
            key = name
        elif key == "num_hidden_layers":
            if value == self.num_hidden_layers:
                return
            raise ConfigError(f"{key}={short(value)}: it is the length of layers_block_type; assign that")
        else:
            value = _check_base(key, value)
            if not key.startswith("_") and not hasattr(self, key):
                family.refuse_typo(key)
        super().__setattr__(key, value)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> NemotronHConfig:
        """The configuration of a published model; `nemotron_h.presets()` lists the names.

        Args:
            overrides: Fields to change, in any spelling.
        """
        return cls(**family.preset(name, overrides))

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but overriding values are validated together with the rest."""
        if not isinstance(config_dict, Mapping):
            raise ConfigError(f"a config must be a JSON object, got {type(config_dict).__name__}")
        own = {key: value for key, value in kwargs.items() if _is_field(key) or key in family.INERT}
        rest = {key: value for key, value in kwargs.items() if key not in own and not _is_reserved(key)}
        for key in rest:
            family.refuse_typo(key)
        if own.get("dtype") == "auto":  # the file's
            del own["dtype"]
        stored = _without_foreign_attention(family.language_model(config_dict))
        return super().from_dict(family.override(stored, own), **rest)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Any,
        cache_dir: Any = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        **kwargs: Any,
    ) -> Any:
        """As in transformers, whose 5.20 does not hand on the token."""
        hub = {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only}
        config_dict, rest = cls.get_config_dict(
            pretrained_model_name_or_path, token=token, revision=revision, **hub, **kwargs
        )
        return cls.from_dict(config_dict, **rest)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in transformers; Puzzle is a model type of ours, not a foreign one to be warned about."""
        model_type = kwargs.pop("model_type", None)
        try:
            config_dict, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except ModelNotFoundError:
            raise
        except OSError as error:
            raise ModelNotFoundError.of(pretrained_model_name_or_path, error) from error
        config_dict = family.language_model(config_dict)
        if model_type is None:
            model_type = config_dict.get("model_type")
        family.check_model_type(model_type, config_dict)
        return config_dict | {"model_type": cls.model_type}, rest

    @classmethod
    def _get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in transformers, except that a missing file is not an empty one, which would mean every default."""
        config_dict, rest = super()._get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict is None:
            raise ModelNotFoundError(f"{pretrained_model_name_or_path}: has no config.json")
        return config_dict, rest

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        parsed = load_json(
            Path(json_file), "config", error=ConfigError, max_bytes=_MAX_CONFIG_BYTES, allow_infinity=True
        )
        config_dict: Any = cls._decode_special_floats(parsed)
        if not isinstance(config_dict, dict):
            raise ConfigError(f"{json_file}: a config must be a JSON object, got {type(config_dict).__name__}")
        return {key: value for key, value in config_dict.items() if key not in family.CODE_KEYS}

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks in the trunk."""
        return len(self.layers_block_type)

    @property
    def layer_types(self) -> list[str]:
        """`layers_block_type` in transformers' words, for its cache and mask code."""
        return [family.BLOCKS[name].layer_type for name in self.layers_block_type]

    @property
    def hybrid_override_pattern(self) -> str:
        """The trunk as a pattern string, `M` mamba, `*` attention, `E` moe, `-` mlp."""
        return family.pattern(self.layers_block_type)

    @property
    def mtp_hybrid_override_pattern(self) -> str:
        """One MTP head as a pattern string."""
        return family.pattern(self.mtp_layers_block_type)

    def layer(self, index: int) -> family.Layer:
        """Sizes of block `index`, after `block_configs`."""
        return family.layer(self, index)

    def mtp_layer(self, index: int) -> family.Layer:
        """Sizes of block `index` of an MTP head."""
        return family.mtp_layer(self, index)

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` holds: both spellings, so that llama.cpp, vLLM, SGLang, MLX and transformers read it."""
        saved = super().to_diff_dict()
        for name in _OWN_FIELDS:
            if saved.get(name) == family.FIELDS[name].default:
                del saved[name]
        heads = self.mtp_layers_block_type if self.num_nextn_predict_layers else []
        if "moe" not in [*self.layers_block_type, *heads]:
            saved = {key: value for key, value in saved.items() if key not in family.MOE_FIELDS}
        if not self.num_nextn_predict_layers:
            saved.pop("mtp_layers_block_type", None)
            saved.pop("mtp_block_configs", None)
        for name, field in family.FIELDS.items():
            if name in saved:
                saved |= {alias: saved[name] for alias in field.aliases if not alias.startswith("num_")}
        saved["num_hidden_layers"] = self.num_hidden_layers
        saved["hybrid_override_pattern"] = self.hybrid_override_pattern
        if self.num_nextn_predict_layers:
            saved["mtp_hybrid_override_pattern"] = self.mtp_hybrid_override_pattern
        return saved

    def __eq__(self, other: object) -> bool:
        """Equal when every field is; the path and version of a saved file do not count."""
        return isinstance(other, NemotronHConfig) and _comparable(self) == _comparable(other)

    __hash__ = None  # type: ignore[assignment]  # mutable, as its base


def _comparable(config: NemotronHConfig) -> dict[str, Any]:
    ignored = ("transformers_version", "_name_or_path", "architectures", "dtype")
    return {key: value for key, value in config.to_dict().items() if key not in ignored}


def _is_field(key: str) -> bool:
    return family.canonical_name(key) in family.FIELDS or key == "num_hidden_layers"


def _is_reserved(key: str) -> bool:
    """Whether `key` is private, or names a method or class variable, which an attribute would hide."""
    private = key.startswith("_") and not key.startswith("_from_")  # _from_auto, _from_pipeline: transformers' notes
    return key not in family.INERT and (private or hasattr(NemotronHConfig, key))


def _base_fields(config: NemotronHConfig, extras: dict[str, Any]) -> dict[str, Any]:
    """Set the fields of transformers' base class; return the remaining extras, checked and warned about."""
    _check_extras(extras)
    for field in fields(PreTrainedConfig):
        default = None if field.default is MISSING else field.default
        object.__setattr__(config, field.name, extras.pop(field.name, default))
    generation = GenerationConfig._get_default_generation_params()
    for key, value in list(extras.items()):
        if key in generation:
            _warn_once(key, f"{key} is a generation parameter: put it into generation_config; it is dropped here")
        elif key in _REDIRECTING or _is_reserved(key):
            if value is not None:
                _warn_once(key, f"{key!r} is no field of this config and would act on transformers: it is dropped")
        else:
            if key not in family.INERT:
                _check_storable(key, value)
                _warn_once(key, f"unknown field {short(key)} is kept in the config but has no effect")
            continue
        del extras[key]
    return extras


def _check_storable(key: str, value: Any) -> None:
    """An unknown field is kept and saved again, so it must be a JSON value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"unknown field {short(key)}: its value cannot be written to config.json ({error})"
        ) from error


def _check_extras(extras: dict[str, Any]) -> None:
    for key in extras:
        extras[key] = _check_base(key, extras[key])
    dtype = extras.get("dtype")
    if dtype is not None and extras.get("torch_dtype") not in (None, dtype):
        raise ConfigError(f"torch_dtype={extras['torch_dtype']} and dtype={dtype} disagree; give one of them")
    if extras.get("output_attentions"):
        extras["attn_implementation"] = "eager"
    labels = len(extras["id2label"]) if extras.get("id2label") is not None else extras.get("num_labels")
    if extras.get("problem_type") == "single_label_classification" and labels == 1:
        raise ConfigError("problem_type='single_label_classification' needs num_labels > 1")


def _check_base(key: str, value: Any) -> Any:
    """`value` of a field of transformers' base class as the config keeps it; other keys pass."""
    rule = _BASE_RULES[key](value) if key in _BASE_RULES and value is not None else None
    if rule is not None:
        raise ConfigError(f"{key}={short(value)}: must be {rule}")
    return getattr(torch, value) if key in ("dtype", "torch_dtype") and isinstance(value, str) else value


def _dtype(value: Any) -> str | None:
    names = [str(dtype).removeprefix("torch.") for dtype in _DTYPES]
    known = value in names if isinstance(value, str) else isinstance(value, torch.dtype) and value in _DTYPES
    return None if known else f"one of {', '.join(names)}"


def _boolean(value: Any) -> str | None:
    return None if type(value) is bool else "True or False"


def _without_foreign_attention(stored: dict[str, Any]) -> dict[str, Any]:
    """A file's wish for a kernel that we lack, or that would be fetched, is no reason to refuse the checkpoint."""
    wish = stored.get("attn_implementation")
    if wish is None or _attention(wish) is None:
        return stored
    _warn_once(
        "attn_implementation", f"attn_implementation={short(wish)} in the config is ignored: sdpa and eager exist"
    )
    return {key: value for key, value in stored.items() if key != "attn_implementation"}


def _attention(value: Any) -> str | None:
    known = isinstance(value, str) and value in ATTENTION_IMPLEMENTATIONS
    return None if known else "'eager', 'sdpa' or None; nothing is fetched for it"


def _labels(value: Any) -> str | None:
    known = type(value) is int and 0 < value <= _MAX_LABELS
    return None if known else f"an integer from 1 to {_MAX_LABELS}"


def _label_names(value: Any) -> str | None:
    known = isinstance(value, dict) and all(str(key).isdecimal() and len(str(key)) < 10 for key in value)
    return None if known else "a dict from integers to names"


def _quantization(value: Any) -> str | None:
    method = value.get("quant_method") if isinstance(value, Mapping) else getattr(value, "quant_method", None)
    known = isinstance(method, str) and method in _KNOWN_QUANTIZATION
    return None if known else f"a dict whose quant_method is one of {', '.join(_KNOWN_QUANTIZATION)}"


def _strings(value: Any) -> str | None:
    return None if isinstance(value, list) and all(isinstance(v, str) for v in value) else "a list of strings"


# Rules for the values, other than None, of what transformers' base class knows.
_BASE_RULES: dict[str, Callable[[Any], str | None]] = {
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "output_hidden_states": _boolean,
    "output_attentions": _boolean,
    "return_dict": _boolean,
    "is_encoder_decoder": lambda value: None if value is False else "False: this is a decoder",
    "attn_implementation": _attention,
    "num_labels": _labels,
    "id2label": _label_names,
    "label2id": lambda value: None if isinstance(value, dict) else "a dict from names to integers",
    "problem_type": choice("regression", "single_label_classification", "multi_label_classification"),
    "architectures": _strings,
    "per_layer_config": lambda value: "None: it is not read; give block_configs=[one dict per layer]",
    "quantization_config": _quantization,
}


def _warn_once(key: str, text: str) -> None:
    if key not in _warned:
        _warned.add(key)
        logger.warning(text)


def _document() -> None:
    """Docstring and signature from the field table, so that neither can drift from it."""
    entries = []
    for name, field in family.FIELDS.items():
        spellings = f" Also spelled {', '.join(f'`{alias}`' for alias in field.aliases)}." if field.aliases else ""
        entries.append(f"    {name} (defaults to `{field.default!r}`): {field.doc}{spellings}")
    entries.insert(
        3, "    num_hidden_layers (defaults to `None`): Only checked: it must equal the number of layers above."
    )
    NemotronHConfig.__doc__ = (
        "Configuration of a Nemotron-H model.\n\nKeyword arguments only, in any published spelling; every field is"
        " readable under the name below. Values are checked at construction and at assignment, rules between fields at"
        " construction, when a model is built and when the config is saved.\n\nArgs:\n"
        + "\n".join(entries)
        + "\n\nRaises:\n    ConfigError: naming field, value and rule.\n"
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    defaults = {name: family.FIELDS[name].default for name in NemotronHConfig.__annotations__ if name in family.FIELDS}
    order = [*list(defaults)[:3], "num_hidden_layers", *list(defaults)[3:]]  # as transformers' page has them
    parameters = [inspect.Parameter(name, keyword, default=defaults.get(name)) for name in order]
    parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
    NemotronHConfig.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]


_document()
