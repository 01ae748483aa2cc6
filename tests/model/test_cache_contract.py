"""The cache between passes and between programs: foreign caches, interruptions, dtypes, files."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from helpers import BIASED, assert_close, draw_ids, tiny_config, tiny_model
from nemotron_h import NemotronHForCausalLM, NemotronHHybridDynamicCache
from nemotron_h.errors import CacheError, InputError

LISTS = ("conv_states", "ssm_states", "key_cache", "value_cache")
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]])


def filled(model: NemotronHForCausalLM, rows: int = 2) -> NemotronHHybridDynamicCache:
    return model(draw_ids(model, rows, 6), attention_mask=MASK if rows == 2 else None, use_cache=True).past_key_values


def contents(kept: NemotronHHybridDynamicCache) -> list[Tensor]:
    return [tensor.clone() for name in LISTS for tensor in getattr(kept, name)]


def assert_unchanged(kept: NemotronHHybridDynamicCache, before: list[Tensor]) -> None:
    for a, b in zip(contents(kept), before, strict=True):
        assert torch.equal(a, b)


# What a caller may hand over as past_key_values.


@torch.no_grad()
def test_empty_dynamic_cache_becomes_ours_in_place() -> None:
    model = tiny_model()
    ids = draw_ids(model, 2, 9)
    for theirs in (DynamicCache(), DynamicCache(config=model.config)):
        mine = theirs
        out = model(ids[:, :4], past_key_values=theirs)
        assert out.past_key_values is mine
        assert isinstance(mine, NemotronHHybridDynamicCache)
        assert mine.get_seq_length() == 4
        assert_close(model(ids[:, 4:], past_key_values=mine).logits, model(ids).logits[:, 4:])


def filled_dynamic_cache() -> DynamicCache:
    theirs = DynamicCache()
    theirs.update(torch.zeros(2, 2, 3, 12), torch.zeros(2, 2, 3, 12), 0)
    return theirs


def of_another_model(**overrides: Any) -> Callable[[], NemotronHHybridDynamicCache]:
    return lambda: filled(tiny_model(**overrides))


FOREIGN: dict[str, Callable[[], Any]] = {
    "a filled DynamicCache": filled_dynamic_cache,
    "StaticCache": lambda: StaticCache(config=tiny_config(), max_cache_len=8),
    "tuple": lambda: ((torch.zeros(2, 2, 3, 12), torch.zeros(2, 2, 3, 12)),),
    "list": list,
    "num_key_value_heads=1": of_another_model(num_key_value_heads=1),
    "ssm_state_size=4": of_another_model(ssm_state_size=4),
    "layers_block_type": of_another_model(hybrid_override_pattern="M*E-M"),
    "'mamba', 'mamba'": of_another_model(hybrid_override_pattern="MM"),
}


@pytest.mark.parametrize("said", FOREIGN)
@torch.no_grad()
def test_foreign_cache(said: str) -> None:
    model = tiny_model()
    with pytest.raises(CacheError, match=said):
        model(draw_ids(model, 2, 2), past_key_values=FOREIGN[said]())


@torch.no_grad()
def test_cache_of_a_model_of_the_same_sizes_is_welcome() -> None:
    """Two fine-tunes, or a model and its copy in another class."""
    model = tiny_model()
    kept = filled(model)
    twin = tiny_model(vocab_size=50, routed_scaling_factor=1.0)
    assert twin(draw_ids(model, 2, 1), past_key_values=kept).past_key_values is kept


@torch.no_grad()
def test_other_number_of_rows() -> None:
    model = tiny_model()
    kept = filled(model)
    before = contents(kept)
    with pytest.raises(CacheError, match="holds 2 rows, the input has 3"):
        model(draw_ids(model, 3, 1), past_key_values=kept)
    assert_unchanged(kept, before)


@pytest.mark.parametrize("arguments", [{"use_cache": False}, {"seq_idx": torch.tensor([[0, 0, 1]] * 2)}])
@torch.no_grad()
def test_cache_with_arguments_that_contradict_it(arguments: dict[str, Any]) -> None:
    model = tiny_model()
    ids, kept = draw_ids(model, 2, 3), filled(model)
    with pytest.raises(InputError, match="past_key_values"):
        model(ids, past_key_values=kept, **arguments)
    assert kept.get_seq_length() == 6


# A pass that is interrupted.


class Interrupted(RuntimeError):
    pass


def interrupt(model: NemotronHForCausalLM, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    def stop(*_: Any) -> None:
        raise Interrupted

    handle = module.register_forward_hook(stop)
    with pytest.raises(Interrupted):
        model(*args, **kwargs)
    handle.remove()


@pytest.mark.parametrize("block", range(5))
@torch.no_grad()
def test_interrupted_pass_leaves_the_cache_as_it_was(block: int) -> None:
    model = tiny_model(**BIASED)
    kept, new = filled(model), draw_ids(model, 2, 3, seed=1)
    kept.activate_past_recording()
    before, twin = contents(kept), copy.deepcopy(kept)
    interrupt(model, model.model.layers[block], new, past_key_values=kept)
    assert_unchanged(kept, before)
    assert (kept.get_seq_length(), kept.row_lengths) == (6, [4, 4])
    model(new[:, :0], past_key_values=kept)
    assert_unchanged(kept, before)
    assert_close(model(new, past_key_values=kept).logits, model(new, past_key_values=twin).logits)
    kept.crop(-2)
    twin.crop(-2)
    assert_close(contents(kept), contents(twin))


@torch.no_grad()
def test_after_an_interrupted_first_pass_any_batch_may_come() -> None:
    model = tiny_model()
    kept = NemotronHHybridDynamicCache(model.config)
    interrupt(model, model.model.layers[4], draw_ids(model, 3, 5), past_key_values=kept)
    assert kept.get_seq_length() == 0
    assert_unchanged(kept, [torch.empty(0)] * 20)
    ids = draw_ids(model, 1, 4)
    assert_close(model(ids, past_key_values=kept).logits, model(ids).logits)
    assert [tuple(t.shape) for t in kept.key_cache if t.numel()] == [(1, 2, 4, 12)]


@torch.no_grad()
def test_rows_chosen_after_a_crop_to_zero() -> None:
    model = tiny_model()
    kept = filled(model)
    kept.crop(-6)
    kept.batch_select_indices([0])
    ids = draw_ids(model, 1, 4)
    assert_close(model(ids, past_key_values=kept).logits, model(ids).logits)
    assert kept.batch_size == 1


# Types.


@pytest.mark.parametrize("at_rest", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_dtypes_at_rest(at_rest: str, model_dtype: torch.dtype) -> None:
    """`mamba_ssm_cache_dtype` is the state's; a float64 model keeps float64. Everything else has the model's."""
    model = tiny_model(mamba_ssm_cache_dtype=at_rest).to(model_dtype)
    out = model(draw_ids(model, 2, 6), use_cache=True, output_ssm_states=True)
    state, computed = out.past_key_values.ssm_states[0], out.ssm_states[0]
    wide = model_dtype == torch.float64 and at_rest == "float32"
    assert state.dtype == (torch.float64 if wide else getattr(torch, at_rest))
    assert computed.dtype == (torch.float64 if model_dtype == torch.float64 else torch.float32), "arithmetic is wide"
    assert torch.equal(state, computed.to(state.dtype))
    assert out.past_key_values.conv_states[0].dtype == model_dtype
    assert out.past_key_values.key_cache[2].dtype == model_dtype
    after = model(draw_ids(model, 2, 1), past_key_values=out.past_key_values).past_key_values
    assert after.ssm_states[0].dtype == state.dtype


# Files.


@pytest.mark.parametrize("overrides", [BIASED, {"mamba_d_conv": 1}, {"hybrid_override_pattern": "E-"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_save_and_load(overrides: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(**overrides).to(dtype)
    kept = filled(model)
    kept.save(tmp_path / "cache.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors"]
    loaded = NemotronHHybridDynamicCache.load(tmp_path / "cache.safetensors", model.config)
    assert_unchanged(loaded, contents(kept))
    assert (loaded.get_seq_length(), loaded.row_lengths, loaded.batch_size) == (6, [4, 4], 2)
    new = draw_ids(model, 2, 3, seed=1)
    assert torch.equal(model(new, past_key_values=loaded).logits, model(new, past_key_values=kept).logits)


@torch.no_grad()
def test_save_replaces_and_an_empty_cache_is_a_file_too(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "cache"
    filled(model).save(path)
    NemotronHHybridDynamicCache(model.config).save(path)
    loaded = NemotronHHybridDynamicCache.load(path, model.config)
    assert (loaded.get_seq_length(), loaded.batch_size) == (0, -1)
    ids = draw_ids(model, 3, 4)
    assert_close(model(ids, past_key_values=loaded).logits, model(ids).logits)


def damaged(content: bytes) -> dict[str, bytes]:
    return {"truncated": content[:-9], "empty": b"", "header only": content[:8], "text": b"{}\n" * 40}


@pytest.mark.parametrize("damage", damaged(b""))
@torch.no_grad()
def test_damaged_file(damage: str, tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "cache"
    filled(model).save(path)
    path.write_bytes(damaged(path.read_bytes())[damage])
    with pytest.raises(CacheError, match=str(path)):
        NemotronHHybridDynamicCache.load(path, model.config)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="nowhere"):
        NemotronHHybridDynamicCache.load(tmp_path / "nowhere", tiny_config())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [({"num_key_value_heads": 1}, "num_key_value_heads=2, not 1"), ({"hybrid_override_pattern": "M*"}, "layers_block"),
     ({"mamba_d_conv": 3}, "mamba_d_conv"), ({"hybrid_override_pattern": "ME*-MM"}, "layers_block")],
)  # fmt: skip
@torch.no_grad()
def test_file_of_another_model(overrides: dict[str, Any], said: str, tmp_path: Path) -> None:
    filled(tiny_model()).save(tmp_path / "cache")
    with pytest.raises(CacheError, match=said):
        NemotronHHybridDynamicCache.load(tmp_path / "cache", tiny_config(**overrides))


CHANGES: dict[str, dict[str, str]] = {
    "format": {"format": "pt"},
    "sizes": {"sizes": "[]"},
    "length": {"length": "7"},
    "no length": {"length": "six"},
    "batch": {"batch": "3"},
    "another tensor": {},
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_file_that_contradicts_itself(change: str, tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "cache"
    filled(model).save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    assert NemotronHHybridDynamicCache.load(path, model.config).row_lengths == [4, 4], "unchanged it loads"
    if change == "another tensor":
        tensors["1.keys"] = torch.zeros(2, 3)
    save_file(tensors, path, metadata | CHANGES[change])
    with pytest.raises(CacheError, match=str(path)):
        NemotronHHybridDynamicCache.load(path, model.config)
