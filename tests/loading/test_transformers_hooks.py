"""Canaries: what this package overrides or calls in transformers without a promise that it stays.

When one fails after an update of transformers, look at the override of that name in `loading.py`, `pretrained.py`,
`generation_mixin.py`, `cache.py` or `configuration.py` before the version range in pyproject.toml is widened.
"""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.candidate_generator import CandidateGenerator, MTPCandidateGenerator
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from helpers import tiny_model
from nemotron_h import NemotronHConfig, NemotronHForCausalLM
from nemotron_h.modeling import NemotronHBlock

SIGNATURES: dict[tuple[Any, str], str] = {
    (PreTrainedModel, "_load_pretrained_model"): "model state_dict checkpoint_files load_config expected_keys",
    (PreTrainedModel, "_finalize_model_loading"): "model load_config loading_info",
    (PreTrainedModel, "_load_and_finalize_distributed_pretrained_model"): (
        "self distributed_checkpoint_dir device_map device_mesh"
    ),
    (PreTrainedModel, "tie_weights"): "self missing_keys recompute_mapping",
    (PreTrainedModel, "_init_weights"): "self module",
    (PreTrainedModel, "post_init"): "self",
    (GenerationMixin, "_prepare_cache_for_generation"): (
        "self generation_config model_kwargs generation_mode batch_size max_cache_length"
    ),
    (GenerationMixin, "_assisted_decoding"): (
        "self input_ids logits_processor stopping_criteria generation_config synced_gpus streamer inputs_tensor"
        " assistant_model assistant_tokenizer tokenizer model_kwargs"
    ),
    (GenerationMixin, "_get_candidate_generator"): (
        "self generation_config input_ids inputs_tensor logits_processor model_kwargs assistant_model"
        " target_tokenizer assistant_tokenizer"
    ),
    (CandidateGenerator, "update_candidate_strategy"): "self input_ids scores num_matches",
    (MTPCandidateGenerator, "get_candidates"): (
        "self input_ids model_kwargs model_outputs is_first_iteration n_last_matches kwargs"
    ),
    # The last one must be called kwargs: assisted decoding looks for a parameter of that name.
    (GenerationMixin, "prepare_inputs_for_generation"): (
        "self input_ids next_sequence_length past_key_values attention_mask inputs_embeds is_first_iteration kwargs"
    ),
    (GenerationMixin, "load_custom_generate"): "self pretrained_model_name_or_path trust_remote_code kwargs",
    (PreTrainedConfig, "get_config_dict"): "pretrained_model_name_or_path kwargs",
    (PreTrainedConfig, "_get_config_dict"): "pretrained_model_name_or_path kwargs",
    (PreTrainedConfig, "_dict_from_json_file"): "json_file",
    (PreTrainedConfig, "from_dict"): "config_dict kwargs",
    (PreTrainedConfig, "to_diff_dict"): "self",
    (PreTrainedConfig, "__post_init__"): "self kwargs",
    (PreTrainedConfig, "validate"): "self",
    (Cache, "__init__"): "self layers layer_class_to_replicate offloading offload_only_non_sliding",
    (Cache, "get_seq_length"): "self layer_idx",
    (Cache, "get_mask_sizes"): "self query_length layer_idx",
    (Cache, "get_max_length"): "self layer_idx",
    (Cache, "has_previous_state"): "self layer_idx state_idx",
    (Cache, "reorder_cache"): "self beam_idx",
    (Cache, "batch_select_indices"): "self indices",
    (Cache, "batch_repeat_interleave"): "self repeats",
    (Cache, "crop"): "self tokens_to_remove",
    (Cache, "reset"): "self",
    (Cache, "activate_past_recording"): "self",
    (CacheLayerMixin, "lazy_initialization"): "self key_states value_states",
    (CacheLayerMixin, "get_mask_sizes"): "self query_length",
    (CacheLayerMixin, "get_seq_length"): "self",
    (CacheLayerMixin, "get_max_length"): "self",
    (GradientCheckpointingLayer, "__call__"): "self args kwargs",
    (LoadStateDictInfo, "__init__"): (
        "self missing_keys unexpected_keys mismatched_keys error_msgs conversion_errors skipped_pp_keys"
    ),
    (GenerationConfig, "_get_default_generation_params"): "",
    (init, "copy_"): "tensor other",
    (init, "normal_"): "tensor mean std generator",
}


def _changed(what: str) -> str:
    return f"transformers {transformers.__version__} changed {what}, which nemotron_h relies on"


@pytest.mark.parametrize(("owner", "name"), SIGNATURES, ids=lambda value: getattr(value, "__name__", value))
def test_signature(owner: Any, name: str) -> None:
    assert hasattr(owner, name), _changed(f"{owner.__name__}: there is no {name}")
    found = " ".join(inspect.signature(getattr(owner, name)).parameters)
    assert found == SIGNATURES[owner, name], _changed(f"the parameters of {owner.__name__}.{name}")


def test_static_methods_stay_static() -> None:
    """They are called with the model as first argument, on the class."""
    for name in ("_load_pretrained_model", "_finalize_model_loading"):
        assert isinstance(inspect.getattr_static(PreTrainedModel, name), staticmethod), _changed(name)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (GenerationMixin, "generate_batch"),
        (GenerationMixin, "init_continuous_batching"),
        (GenerationMixin, "continuous_batching_context_manager"),
        (PreTrainedModel, "_is_stateful"),
        (PreTrainedModel, "_keep_in_fp32_modules_strict"),
        (PreTrainedModel, "_no_split_modules"),
        (PreTrainedModel, "_skip_keys_device_placement"),
        (PreTrainedModel, "_supports_sdpa"),
        (PreTrainedModel, "_tied_weights_keys"),
        (PreTrainedModel, "base_model_prefix"),
        (PreTrainedModel, "supports_gradient_checkpointing"),
        (Cache, "is_compileable"),
        (Cache, "is_initialized"),
        (Cache, "is_croppable"),
        (Cache, "batch_size"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_flag_or_method_exists(owner: type, name: str) -> None:
    found = hasattr(owner, name) or name in "".join(inspect.getsource(owner))
    assert found, _changed(f"{owner.__name__}: there is no {name}")


def test_methods_of_a_cache_layer() -> None:
    wanted = {"lazy_initialization", "get_mask_sizes", "update", "get_max_length", "get_seq_length"}
    assert CacheLayerMixin.__abstractmethods__ == wanted, _changed("the abstract methods of CacheLayerMixin")


def test_fields_of_the_base_config() -> None:
    fields = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    known = {
        "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype",
        "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    }  # fmt: skip
    assert fields == known, _changed("the fields of PreTrainedConfig")


def test_fields_of_the_load_config() -> None:
    fields = {field.name for field in dataclasses.fields(LoadStateDictConfig)}
    used = {"pretrained_model_name_or_path", "device_map"}
    assert used <= fields, _changed("LoadStateDictConfig")


def test_from_pretrained_calls_the_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(hybrid_override_pattern="M", tie_word_embeddings=True).save_pretrained(tmp_path, max_shard_size="20KB")
    calls: list[tuple[str, Any]] = []
    load, finalize = NemotronHForCausalLM._load_pretrained_model, NemotronHForCausalLM._finalize_model_loading

    def loading(model: Any, state_dict: Any, files: Any, load_config: Any, *rest: Any) -> Any:
        calls.append(("load", (all(p.is_meta for p in model.parameters()), state_dict, files, load_config)))
        return load(model, state_dict, files, load_config, *rest)

    def finalizing(model: Any, load_config: Any, info: Any) -> Any:
        calls.append(("finalize", (set(info.missing_keys), info.unexpected_keys)))
        return finalize(model, load_config, info)

    monkeypatch.setattr(NemotronHForCausalLM, "_load_pretrained_model", staticmethod(loading))
    monkeypatch.setattr(NemotronHForCausalLM, "_finalize_model_loading", staticmethod(finalizing))
    model = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert [name for name, _ in calls] == ["load", "finalize"], _changed("the order of loading")
    on_meta, state_dict, files, load_config = calls[0][1]
    assert on_meta, _changed("from_pretrained: the model is not built on meta")
    assert state_dict is None
    assert {Path(file).parent for file in files} == {tmp_path}, _changed("the checkpoint's files")
    assert load_config.pretrained_model_name_or_path == tmp_path or load_config.pretrained_model_name_or_path == str(
        tmp_path
    )
    assert calls[1][1] == ({"lm_head.weight"}, set()), "tied names are announced as missing, so that they are tied"
    assert model.lm_head.weight is model.model.embeddings.weight, _changed("tie_weights")


def test_tied_names() -> None:
    tied = tiny_model(hybrid_override_pattern="M", tie_word_embeddings=True).all_tied_weights_keys
    assert tied == {"lm_head.weight": "model.embeddings.weight"}, _changed("all_tied_weights_keys")
    assert tiny_model(hybrid_override_pattern="M").all_tied_weights_keys == {}, _changed("all_tied_weights_keys")


def test_flag_of_loaded_tensors() -> None:
    """`_is_hf_initialized` keeps a tensor from being initialized again."""
    loaded, fresh = torch.full((3,), 7.0), torch.full((3,), 7.0)
    loaded._is_hf_initialized = True
    for tensor in (loaded, fresh):
        init.zeros_(tensor)
        init.copy_(tensor, torch.ones(3))
        init.normal_(tensor, mean=0.0, std=1.0)
    assert torch.equal(loaded, torch.full((3,), 7.0)), _changed("_is_hf_initialized")
    assert not torch.equal(fresh, torch.full((3,), 7.0)), _changed("transformers.initialization")


def test_generate_calls_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(hybrid_override_pattern="M*", max_position_embeddings=64)
    prepare_cache, prepare_inputs = model._prepare_cache_for_generation, model.prepare_inputs_for_generation
    calls: list[Any] = []

    def cache(generation_config: Any, model_kwargs: Any, mode: Any, batch: int, length: int) -> None:
        calls.append(("cache", mode.value, batch, length))
        prepare_cache(generation_config, model_kwargs, mode, batch, length)

    def inputs(input_ids: Any, **kwargs: Any) -> Any:
        calls.append(("inputs", kwargs.get("is_first_iteration"), kwargs.get("logits_to_keep")))
        return prepare_inputs(input_ids, **kwargs)

    monkeypatch.setattr(model, "_prepare_cache_for_generation", cache)
    monkeypatch.setattr(model, "prepare_inputs_for_generation", inputs)
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, eos_token_id=None)
    assert calls[0] == ("cache", "greedy_search", 1, 5), _changed("_prepare_cache_for_generation")
    first, *later = calls[1:]
    assert first == ("inputs", True, 1), _changed("prepare_inputs_for_generation: the first step")
    assert len(later) == 2
    assert not any(call[1] for call in later), _changed("prepare_inputs_for_generation: later steps")


def test_gradient_checkpointing_layer() -> None:
    """It recomputes the forward pass from a positional first argument."""

    class Layer(GradientCheckpointingLayer):
        calls = 0

        def forward(self, x: torch.Tensor, y: int = 0) -> torch.Tensor:
            type(self).calls += 1
            return x.sin() + y

    assert issubclass(NemotronHBlock, GradientCheckpointingLayer)
    layer = Layer().train()
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False
    )
    layer(torch.ones(2, requires_grad=True), y=1).sum().backward()
    assert Layer.calls == 2, _changed("GradientCheckpointingLayer")


def test_post_init_is_what_initializes() -> None:
    model = NemotronHForCausalLM(
        NemotronHConfig(hidden_size=8, vocab_size=6, hybrid_override_pattern="M", mamba_num_heads=4, mamba_n_groups=1)
    )
    mixer: Any = model.model.layers[0].mixer
    assert torch.allclose(mixer.A_log, torch.arange(1, 5).float().log()), _changed("_init_weights or post_init")
    assert isinstance(mixer, nn.Module)
