"""examples/new_block.py, and through it `register_block`: a block type of one's own must do what the family's do.

B batch · T tokens · D hidden size.
"""

import copy
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import assert_close, draw_ids, draw_weights, tiny_config
from nemotron_h import NemotronHConfig, NemotronHForCausalLM, NemotronHHybridDynamicCache, family, register_block
from nemotron_h.cache import LAYERS, CacheLayer
from nemotron_h.errors import CacheError, ConfigError, UnsupportedError
from nemotron_h.modeling import MIXERS

EXAMPLE = Path(__file__).parent.parent / "examples" / "new_block.py"


@pytest.fixture
def registry() -> Iterator[None]:
    """Whatever a test registers is forgotten afterwards."""
    tables: list[dict[str, Any]] = [family.BLOCKS, MIXERS, LAYERS]
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


@pytest.fixture
def example(registry: None) -> ModuleType:
    spec = importlib.util.spec_from_file_location("new_block", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(example: ModuleType) -> NemotronHForCausalLM:
    return draw_weights(NemotronHForCausalLM(tiny_config(hybrid_override_pattern="MA*E")))


def read(model: NemotronHForCausalLM, ids_BT: Tensor, **kwargs: Any) -> Tensor:
    """Logits of one pass without a cache."""
    with torch.no_grad():
        return model(ids_BT, use_cache=False, **kwargs).logits


# The script


def test_script() -> None:
    run = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=120, check=True)
    assert "blocks mamba, average, attention, moe" in run.stdout
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run.stdout)]
    assert len(losses) == 5
    assert losses[0] > 4  # log(128) is 4.85
    assert losses[-1] < 0.05
    written = re.search("written with a cache: (.*)", run.stdout)
    assert written is not None
    assert written[1] == "A block type of your own takes a module, a cache layer and one call."
    assert "saved and loaded: the same logits" in run.stdout


def test_it_is_short() -> None:
    lines = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(lines) <= 70


# The block


def test_against_its_definition(example: ModuleType) -> None:
    config = tiny_config(hidden_size=5)
    block = example.Average(config, config.layer(0), 0).double()
    x_BTD = torch.randn(2, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w_in, w_out, logit_D = (
        p.detach().numpy() for p in (block.in_proj.weight, block.out_proj.weight, block.decay_logit)
    )
    a_D, h_BD, expected = 1 / (1 + np.exp(-logit_D)), np.zeros((2, 5)), []
    for x_BD in (x_BTD.numpy() @ w_in.T).swapaxes(0, 1):
        h_BD = a_D * h_BD + (1 - a_D) * x_BD
        expected.append(h_BD @ w_out.T)
    assert_close(block(x_BTD), np.stack(expected, axis=1), bound=1e-12)


@pytest.mark.parametrize("split", [1, 4, 8])
def test_cached_decoding_is_the_full_pass(model: NemotronHForCausalLM, split: int) -> None:
    ids_BT = draw_ids(model, 2, 9)
    cache, parts = NemotronHHybridDynamicCache(model.config), (ids_BT[:, :split], *ids_BT[:, split:].split(1, dim=1))
    with torch.no_grad():
        logits = [model(part_BT, past_key_values=cache).logits for part_BT in parts]
    assert_close(torch.cat(logits, dim=1), read(model, ids_BT))


@pytest.mark.parametrize("mask", ["000111", "111000", "101101"])
def test_padded_row_is_the_row_alone(model: NemotronHForCausalLM, mask: str) -> None:
    ids_BT = draw_ids(model, 2, 8)
    mask_BT = torch.tensor([[int(c) for c in mask], [1] * 6])
    real = torch.tensor([c == "1" for c in mask])
    with torch.no_grad():
        out = model(ids_BT[:, :6], attention_mask=mask_BT, use_cache=True)
        after = [model(ids_BT[:, t : t + 1], past_key_values=out.past_key_values).logits for t in (6, 7)]
    alone = torch.cat([ids_BT[:1, :6][:, real], ids_BT[:1, 6:]], dim=1)
    found = torch.cat([out.logits[:1, real], *(logits[:1] for logits in after)], dim=1)
    assert_close(found, read(model, alone))
    assert_close(torch.cat([out.logits[1:], *(logits[1:] for logits in after)], dim=1), read(model, ids_BT[1:]))


def test_packed_documents_are_the_documents_alone(model: NemotronHForCausalLM) -> None:
    documents = [draw_ids(model, 1, length, seed=length) for length in (3, 1, 5)]
    packed = read(model, torch.cat(documents, dim=1), seq_idx=torch.tensor([[0] * 3 + [1] + [2] * 5]))
    assert_close(packed, torch.cat([read(model, document) for document in documents], dim=1))


def test_save_and_load(model: NemotronHForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.config.layers_block_type == ["mamba", "average", "attention", "moe"]
    ids_BT = draw_ids(model, 2, 9)
    assert torch.equal(read(loaded, ids_BT), read(model, ids_BT))


def test_gradients_reach_it(model: NemotronHForCausalLM) -> None:
    ids_BT = draw_ids(model, 2, 9)
    model(ids_BT, labels=ids_BT).loss.backward()
    for name, parameter in model.model.layers[1].named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_its_own_initialization_stays(example: ModuleType) -> None:
    mixer = NemotronHForCausalLM(tiny_config(hybrid_override_pattern="MA*E")).model.layers[1].mixer
    assert len(mixer.decay_logit.unique()) == mixer.decay_logit.shape[0]
    assert mixer.in_proj.weight.std() < 0.03  # linears are drawn as everywhere in the model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(model: NemotronHForCausalLM, dtype: torch.dtype) -> None:
    model.to(dtype)
    out = model(draw_ids(model, 1, 5), use_cache=True)
    assert out.logits.dtype == torch.promote_types(dtype, torch.float32)
    assert out.past_key_values.layers[1].average.dtype == torch.promote_types(dtype, torch.float32)


def test_on_meta(example: ModuleType) -> None:
    with torch.device("meta"):
        model = NemotronHForCausalLM(tiny_config(hybrid_override_pattern="MA*E"))
        ids_BT = torch.zeros(2, 5, dtype=torch.long)
    out = model(ids_BT, use_cache=True)
    assert model(ids_BT[:, :1], past_key_values=out.past_key_values).logits.is_meta


def test_in_an_mtp_head(example: ModuleType) -> None:
    config = tiny_config(hybrid_override_pattern="M", mtp_hybrid_override_pattern="A-", num_nextn_predict_layers=1)
    model = draw_weights(NemotronHForCausalLM(config))
    ids_BT = draw_ids(model, 2, 6)
    whole, shorter = (model(ids_BT[:, :t], output_mtp_logits=True).mtp_logits[0] for t in (6, 5))
    assert_close(shorter, whole[:, :4])  # causal


# Its cache


def filled(model: NemotronHForCausalLM, ids_BT: Tensor) -> NemotronHHybridDynamicCache:
    with torch.no_grad():
        return model(ids_BT, use_cache=True).past_key_values


def test_rows_of_the_cache(model: NemotronHForCausalLM) -> None:
    ids_BT, next_B1 = draw_ids(model, 3, 6), draw_ids(model, 3, 1, seed=1)
    rows = torch.tensor([2, 0, 0])
    changes: list[tuple[Callable[[NemotronHHybridDynamicCache], None], Tensor]] = [
        (lambda cache: cache.reorder_cache(rows), rows),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), torch.tensor([0, 2])),
        (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ]
    for change, kept in changes:
        cache = filled(model, ids_BT)
        change(cache)
        with torch.no_grad():
            found = model(next_B1[kept], past_key_values=cache).logits
        assert_close(found, read(model, torch.cat([ids_BT, next_B1], dim=1)[kept])[:, -1:])


def test_files_and_copies_of_the_cache(model: NemotronHForCausalLM, tmp_path: Path) -> None:
    ids_BT, next_B1 = draw_ids(model, 2, 6), draw_ids(model, 2, 1, seed=1)
    cache = filled(model, ids_BT)
    cache.save(tmp_path / "cache.safetensors")
    copies = [copy.deepcopy(cache), NemotronHHybridDynamicCache.load(tmp_path / "cache.safetensors", model.config)]
    with torch.no_grad():
        expected = model(next_B1, past_key_values=cache).logits
        for other in copies:
            assert torch.equal(model(next_B1, past_key_values=other).logits, expected)


def test_cropping_the_cache(model: NemotronHForCausalLM) -> None:
    """A block without a history can return to nothing only, and says so before anything has changed."""
    ids_BT = draw_ids(model, 1, 6)
    cache = filled(model, ids_BT[:, :5])
    cache.activate_past_recording()
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(CacheError):
        cache.crop(-2)
    with torch.no_grad():
        assert_close(model(ids_BT[:, 5:], past_key_values=cache).logits, read(model, ids_BT)[:, -1:])
    cache.crop(-6)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        assert_close(model(ids_BT, past_key_values=cache).logits, read(model, ids_BT))


def test_interrupted_pass_leaves_the_cache_as_it_was(model: NemotronHForCausalLM) -> None:
    ids_BT = draw_ids(model, 1, 6)
    cache = filled(model, ids_BT[:, :5])
    handle = model.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids_BT[:, 5:], past_key_values=cache)
    handle.remove()
    with torch.no_grad():
        assert_close(model(ids_BT[:, 5:], past_key_values=cache).logits, read(model, ids_BT)[:, -1:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_generate(model: NemotronHForCausalLM, options: dict[str, Any]) -> None:
    ids_BT = draw_ids(model, 2, 5)
    common = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
    with_cache, without = (model.generate(ids_BT, use_cache=use, **common) for use in (True, False))
    assert with_cache.tolist() == without.tolist()


# The registry


@pytest.mark.parametrize(
    ("name", "letter", "named"),
    [
        ("average", "X", "'average'"),
        ("other", "A", "'average'"),
        ("mamba", "X", "'mamba'"),
        ("linear_attention", "X", "'mamba'"),
        ("other", "M", "'mamba'"),
        ("no name", "X", "identifier"),
        ("other", "XY", "one character"),
    ],
)
def test_conflicts(example: ModuleType, name: str, letter: str, named: str) -> None:
    tables: list[dict[str, Any]] = [family.BLOCKS, MIXERS, LAYERS]
    before = [dict(table) for table in tables]
    with pytest.raises(ConfigError, match=named):
        register_block(name, letter, example.Average, example.AverageLayer)
    assert [dict(table) for table in tables] == before


@pytest.mark.parametrize("cache_layer", [nn.Linear, "AverageLayer", CacheLayer()], ids=["class", "name", "object"])
@pytest.mark.usefixtures("registry")
def test_cache_layer_that_is_none(cache_layer: Any) -> None:
    with pytest.raises(ConfigError, match="subclass of CacheLayer"):
        register_block("other", "X", nn.Linear, cache_layer)
    assert "other" not in family.BLOCKS


def test_not_registered() -> None:
    with pytest.raises(ConfigError, match="letter 'A'"):
        NemotronHConfig(hybrid_override_pattern="MA*E")
    with pytest.raises(ConfigError, match="layers_block_type"):
        NemotronHConfig(layers_block_type=["mamba", "average"])


def test_counting_needs_the_model(model: NemotronHForCausalLM) -> None:
    with pytest.raises(UnsupportedError, match=r"'average'.*build the model"):
        family.count(model.config)
    size = model.config.hidden_size
    assert sum(p.numel() for p in model.model.layers[1].parameters()) == 2 * size * size + 2 * size


@pytest.mark.usefixtures("registry")
def test_block_without_a_state() -> None:
    class Shift(nn.Module):
        def __init__(self, config: NemotronHConfig, sizes: family.Layer, layer_idx: int) -> None:
            super().__init__()
            self.seen = (sizes.block_type, layer_idx)
            self.shift = nn.Parameter(torch.zeros(config.hidden_size))

        def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
            return hidden_states.roll(1, -1) + self.shift

    register_block("shift", "S", Shift)
    model = draw_weights(NemotronHForCausalLM(tiny_config(hybrid_override_pattern="S*S")))
    assert [block.mixer.seen for block in model.model.layers if hasattr(block.mixer, "seen")] == [
        ("shift", 0),
        ("shift", 2),
    ]
    ids_BT = draw_ids(model, 2, 6)
    cache = filled(model, ids_BT[:, :5])
    with torch.no_grad():
        assert_close(model(ids_BT[:, 5:], past_key_values=cache).logits, read(model, ids_BT)[:, -1:])
    assert cache.is_croppable
