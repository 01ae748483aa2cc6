"""Adapters in files: every spelling and layout is read to the same effect, and nothing else is read at all."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_cases import adapted, build, draw_adapter, logits, saved, without
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import BIASED, assert_close
from nemotron_h import (
    CheckpointError,
    InputError,
    ModelNotFoundError,
    NemotronHError,
    UnsupportedError,
    load_adapter,
    lora_targets,
    peft_compat,
)
from nemotron_h.adapters import export_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS = "base_model.model.backbone.layers.1.mixer.experts"
TINY = {"target_modules": ["model.layers.0.mixer.in_proj"]}

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def change_tensors(directory: Path, change: Change) -> Path:
    save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS, {"format": "pt"})
    return directory


def change_settings(directory: Path, **settings: Any) -> Path:
    file = directory / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return directory


def settings_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / CONFIG).read_text())


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small, sound adapter."""
    return saved(adapted(build(), targets=TINY), tmp_path / "tiny")


# Round trips


@pytest.mark.parametrize("layout", ["PEFT itself", "peft", "per_expert"])
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}, BIASED | {"lora_bias": True}])
def test_every_layout_is_read_back_to_the_same_effect(kind: dict[str, Any], layout: str, tmp_path: Path) -> None:
    biased = {key: kind[key] for key in kind if key in BIASED}
    targets = lora_targets(build(**biased)) if not biased else {"target_modules": ["in_proj", "out_proj", "up_proj"]}
    settings = {key: kind[key] for key in kind if key not in BIASED}
    source = adapted(build(**biased), targets=targets, **settings)
    if layout == "PEFT itself":
        source.save_pretrained(tmp_path / "a")
    else:
        export_adapter(source, tmp_path / "a", layout)
    assert {file.name for file in (tmp_path / "a").iterdir()} - {"README.md"} == {WEIGHTS, CONFIG}
    model = build(**biased)
    base = logits(model)
    loaded = load_adapter(model, tmp_path / "a")
    assert type(loaded) is type(source)
    assert torch.equal(logits(loaded), logits(source))
    assert float((logits(loaded) - base).abs().max()) > 0.3
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_ranks_and_scales_of_single_modules_survive_in_both_layouts(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"out_proj": 2, r"model\.layers\.1\.mixer\.experts\.up_proj": 3, "lm_head": 1},
        "alpha_pattern": {"experts.down_proj": 11, "o_proj": 7},
    }
    source = adapted(build(), **patterns)
    for layout in ("peft", "per_expert"):
        export_adapter(source, tmp_path / layout, layout)
        loaded = load_adapter(build(), tmp_path / layout)
        assert torch.equal(logits(loaded), logits(source))
        export_adapter(loaded, tmp_path / "again", "per_expert")
    tensors, again = load_file(tmp_path / "per_expert" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    assert settings_of(tmp_path / "again") == settings_of(tmp_path / "per_expert")
    assert tensors[f"{EXPERTS}.0.up_proj.lora_A.weight"].shape[0] == 3


def test_per_expert_keys_are_those_of_single_linears(tmp_path: Path) -> None:
    """Each expert's product alone is its slice of the stacked one, under the names of the hub."""
    source = adapted(build(), use_dora=True)
    export_adapter(source, tmp_path, "per_expert")
    tensors = load_file(tmp_path / WEIGHTS)
    model = source.get_base_model()
    wrapper: Any = model.model.layers[1].mixer.experts
    for projection, layer in {"down_proj": wrapper, "up_proj": wrapper.base_layer}.items():
        delta_EON = layer.get_delta_weight("default") / layer.scaling["default"]
        for e, delta_ON in enumerate(delta_EON):
            a, b, m = (
                tensors[f"{EXPERTS}.{e}.{projection}.{kind}"]
                for kind in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
            )
            assert (a.shape, b.shape, m.shape) == (
                (4, delta_ON.shape[1]), (delta_ON.shape[0], 4), (delta_ON.shape[0],),
            )  # fmt: skip
            assert_close(b @ a, delta_ON)
    listed = set(settings_of(tmp_path)["target_modules"])
    assert {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors} == listed
    assert all(name.startswith(("backbone.", "mtp.", "lm_head")) for name in listed)


def test_names_of_nvidias_remote_code_are_read(tmp_path: Path) -> None:
    """`backbone.` for `model.`, in tensors, targets and patterns."""
    source = adapted(build(), rank_pattern={"model.layers.0.mixer.in_proj": 2}, alpha_pattern={"o_proj": 9})
    remote = renamed("base_model.model.model.", "base_model.model.backbone.")
    directory = change_tensors(saved(source, tmp_path), remote)
    settings = settings_of(directory)
    for key in ("target_modules", "target_parameters"):
        settings[key] = [name.replace("model.layers", "backbone.layers") for name in settings[key]]
    settings["rank_pattern"] = {r"backbone\.layers\.0\.mixer\.in_proj": 2}
    change_settings(directory, **settings)
    assert torch.equal(logits(load_adapter(build(), directory)), logits(source))
    change_tensors(directory, renamed("base_model.model.", "base_model.model.language_model."))  # inside a larger model
    assert torch.equal(logits(load_adapter(build(), directory)), logits(source))


def test_transformers_own_class_and_ours_read_each_others_adapters(tmp_path: Path) -> None:
    """By their tensors: its logits differ, since it floors the time step."""
    plain = {"num_nextn_predict_layers": 0}
    build(**plain).save_pretrained(tmp_path / "model")
    theirs = transformers.NemotronHForCausalLM.from_pretrained(tmp_path / "model")
    targets = without(lora_targets(build(**plain)), "out_proj")
    trained: Any = get_peft_model(theirs, LoraConfig(r=4, **targets))  # type: ignore[arg-type]
    draw_adapter(trained)
    assert_same_tensors(load_adapter(build(**plain), saved(trained, tmp_path / "theirs")), trained)
    source = adapted(build(**plain), targets=targets)
    theirs = transformers.NemotronHForCausalLM.from_pretrained(tmp_path / "model")
    assert_same_tensors(PeftModel.from_pretrained(theirs, saved(source, tmp_path / "ours")), source)


def assert_same_tensors(found: Any, expected: Any) -> None:
    a, b = (get_peft_model_state_dict(model, save_embedding_layers=False) for model in (found, expected))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_modules_trained_by_leaf_names_and_without_experts(tmp_path: Path) -> None:
    source = adapted(build(), targets={"target_modules": ["q_proj", "up_proj", "in_proj"]}, lora_dropout=0.1)
    loaded = load_adapter(build(), saved(source, tmp_path))
    assert torch.equal(logits(loaded), logits(source))
    assert loaded.peft_config["default"].lora_dropout == 0.1


def test_embeddings(tmp_path: Path) -> None:
    source = adapted(build(), targets={"target_modules": ["embeddings", "q_proj"]})
    with torch.no_grad():
        source.get_base_model().model.embeddings.lora_embedding_A["default"].add_(0.1)
    base = logits(build())
    for layout in ("peft", "per_expert"):
        export_adapter(source, tmp_path / layout, layout)
        loaded = load_adapter(build(), tmp_path / layout)
        assert torch.equal(logits(loaded), logits(source))
        assert not torch.equal(logits(loaded), base)
    change_settings(tmp_path / "peft", r=10**12)
    refused(tmp_path / "peft", CheckpointError, "the settings say")


def test_an_adapter_of_one_of_the_experts_two_weights(tmp_path: Path) -> None:
    for projection in ("up_proj", "down_proj"):
        targets = {"target_modules": [], "target_parameters": [f"mixer.experts.{projection}"]}
        source = adapted(build(), targets=targets)
        for layout in ("peft", "per_expert"):
            export_adapter(source, tmp_path / layout, layout)
            assert torch.equal(logits(load_adapter(build(), tmp_path / layout)), logits(source))


def test_an_adapter_of_the_trunk_alone(tmp_path: Path) -> None:
    trunk = build().model
    source = adapted(trunk, task_type=None)  # type: ignore[arg-type]
    saved(source, tmp_path / "trunk")
    ids = torch.arange(20)[None]
    fresh = load_adapter(build().model, tmp_path / "trunk")
    assert type(fresh) is PeftModel
    with torch.no_grad():
        assert torch.equal(fresh(ids).last_hidden_state, source(ids).last_hidden_state)


def test_a_loaded_adapter_can_be_trained_further(tmp_path: Path) -> None:
    directory = saved(adapted(build(), use_dora=True), tmp_path)
    loaded = load_adapter(build(), directory, is_trainable=True).train()
    ids = torch.arange(40).reshape(2, 20)
    loaded(ids, labels=ids).loss.backward()
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in loaded.named_parameters() if ".lora_" in name}
    assert all(p.grad is not None for name, p in loaded.named_parameters() if name in trained and "mtp" not in name)


def test_a_trained_experts_dropout_is_refused_only_where_it_would_be_used(tmp_path: Path) -> None:
    directory = change_settings(saved(adapted(build()), tmp_path), lora_dropout=0.1)
    load_adapter(build(), directory)
    with pytest.raises(CheckpointError, match="lora_dropout"):
        load_adapter(build(), directory, is_trainable=True)


def test_several_adapters_on_one_model(tmp_path: Path) -> None:
    model = build()
    sources = {"a": adapted(build(), seed=1), "b": adapted(build(), seed=2, r=2, use_dora=True)}
    loaded: Any = model
    for name, source in sources.items():
        loaded = load_adapter(loaded, saved(source, tmp_path / name), name)
    assert loaded.active_adapter == "a"
    for name, source in sources.items():
        loaded.set_adapter(name)
        assert_close(logits(loaded), logits(source), name, bound=1e-5)
    for name, what in {"a": "has one of this name", "": "without dots", "x.y": "without dots"}.items():
        with pytest.raises(InputError, match=what):
            load_adapter(loaded, tmp_path / "a", name)
    with pytest.raises(InputError, match="the PeftModel"):
        load_adapter(model, tmp_path / "a", "c")


def test_whole_modules_beside_the_factors(tmp_path: Path) -> None:
    source = adapted(build(), targets=TINY, modules_to_save=["lm_head"])
    with torch.no_grad():
        source.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    for layout in ("peft", "per_expert"):
        export_adapter(source, tmp_path / layout, layout)
        assert torch.equal(logits(load_adapter(build(), tmp_path / layout)), logits(source))


def test_narrow_models_and_narrow_files(tmp_path: Path) -> None:
    directory = change_tensors(saved(adapted(build()), tmp_path), lambda ts: {n: t.bfloat16() for n, t in ts.items()})
    wide, narrow = load_adapter(build(), directory), load_adapter(build().bfloat16(), directory)
    assert {p.dtype for n, p in narrow.named_parameters() if "lora_" in n} == {torch.float32}
    assert float((logits(wide) - logits(narrow)).abs().max()) < 0.3


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig, IA3Config, OFTConfig])
def test_other_types_on_linears(config: Any, tmp_path: Path) -> None:
    model = build()
    base, more = logits(model), {"feedforward_modules": []} if config is IA3Config else {}
    more |= {"r": 4} if config in (LoHaConfig, LoKrConfig) else {}
    with peft_compat(model):
        source = get_peft_model(model, config(target_modules=["out_proj", "q_proj"], **more)).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    loaded = load_adapter(build(), saved(source, tmp_path))
    assert torch.equal(logits(loaded), logits(source))
    assert not torch.equal(logits(loaded), base)
    if "r" in more:
        shutil.copytree(tmp_path, tmp_path / "huge")
        for huge in ({"r": 10**9}, {"r": 4, "rank_pattern": {"q_proj": 10**9}}):
            change_settings(tmp_path / "huge", **huge)
            refused(tmp_path / "huge", CheckpointError, "no tensor is that large")
    change_tensors(tmp_path, lambda ts: dict(list(ts.items())[1:]))
    refused(tmp_path, CheckpointError, "missing")


# What does not fit


def refused(directory: Path, error: type[NemotronHError], *parts: str, **overrides: Any) -> str:
    """The message of load_adapter's error; the model is as it was before, and takes a sound adapter afterwards."""
    model = build(**overrides)
    before, base, modules = model.config.to_dict(), logits(model), [type(m) for m in model.modules()]
    model.train()
    with pytest.raises(error) as caught:
        load_adapter(model, directory)
    assert [type(m) for m in model.modules()] == modules
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")
    assert model.config.to_dict() == before
    assert model.config.model_type == "nemotron_h"
    assert torch.equal(logits(model.eval()), base)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


IN_PROJ = "base_model.model.model.layers.0.mixer.in_proj"
MISFITS: dict[str, tuple[Change, list[str]]] = {
    "no tensors": (lambda ts: {}, ["no tensors"]),
    "another module": (renamed("in_proj", "other_proj"), ["model.layers.0.mixer.other_proj", "no such module"]),
    "another model": (renamed("layers.0", "layers.99"), ["layers.99", "no such module"]),
    "no prefix": (renamed("base_model.model.", ""), ["base_model.model."]),
    "another prefix": (renamed("base_model.model.model", "base_model.model.transformer"), ["transformer.layers"]),
    "missing": (lambda ts: {n: t for n, t in ts.items() if "lora_B" not in n}, [f"{IN_PROJ}.lora_B.weight: missing"]),
    "unused": (lambda ts: ts | {f"{IN_PROJ}.lora_C.weight": torch.ones(1)}, ["lora_C", "no place"]),
    "unused, no factor": (lambda ts: ts | {"base_model.model.x": torch.ones(1)}, ["base_model.model.x", "no place"]),
    "rank": (lambda ts: {n: t[:2] if "lora_A" in n else t for n, t in ts.items()}, ["the settings say 4 rows"]),
    "inputs": (lambda ts: {n: t[:, :3].contiguous() for n, t in ts.items()}, ["the model needs [4, 32]"]),
    "a scalar": (lambda ts: {n: t[0, 0].clone() if "lora_A" in n else t for n, t in ts.items()}, ["shape []"]),
    "twice": (lambda ts: ts | {n.replace("model.l", "backbone.l"): t.clone() for n, t in ts.items()}, ["there twice"]),
    "integers": (lambda ts: {n: t.int() for n, t in ts.items()}, ["dtype I32"]),
    "a router": (renamed("layers.0.mixer.in_proj", "layers.1.mixer.gate"), ["layers.1.mixer.gate: takes no adapter"]),
    "a convolution": (renamed("in_proj", "conv1d"), ["layers.0.mixer.conv1d: takes no adapter"]),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit(case: str, tiny: Path) -> None:
    change, parts = MISFITS[case]
    refused(change_tensors(tiny, change), CheckpointError, WEIGHTS, *parts)


def test_a_second_adapter_that_does_not_fit_leaves_the_first(tiny: Path, tmp_path: Path) -> None:
    source = adapted(build(), seed=3)
    loaded = load_adapter(build(), saved(source, tmp_path / "first"), "first")
    modules = [type(m) for m in loaded.modules()]
    one = adapted(build(), targets={"target_modules": [], "target_parameters": ["experts.up_proj"]})
    change_tensors(tiny, lambda ts: {n: t[:, :3].contiguous() for n, t in ts.items()})
    for bad, what in {tiny: "the model needs", saved(one, tmp_path / "one"): "same set of parameters"}.items():
        with pytest.raises(CheckpointError, match=what):
            load_adapter(loaded, bad, "second")
        assert list(loaded.peft_config) == ["first"]
        assert loaded.active_adapter == "first"
        assert [type(m) for m in loaded.modules()] == modules
        assert torch.equal(logits(loaded), logits(source))


EXPERT_MISFITS: dict[str, tuple[Change, list[str]]] = {
    "an expert is missing": (
        lambda ts: {n: t for n, t in ts.items() if ".experts.3.up_proj" not in n},
        ["model.layers.1.mixer.experts.up_proj", "[3] are missing"],
    ),
    "an expert too many": (renamed("experts.7.", "experts.8."), ["[7] are missing"]),
    "other ranks": (
        lambda ts: {n: t[:2] if "experts.3.up_proj.lora_A" in n else t for n, t in ts.items()},
        ["rank 4"],
    ),
    "one output less": (
        lambda ts: {n: t[1:].contiguous() if "experts.3.up_proj.lora_B" in n else t for n, t in ts.items()},
        ["experts.up_proj: lora_B.weight of the experts differ in shape"],
    ),
    "a ninth expert": (
        lambda ts: ts | {n.replace(".3.", ".8."): t.clone() for n, t in ts.items() if "experts.3.up_proj.lora_B" in n},
        ["the model has 8 experts, not [8]"],
    ),
    "an expert twice": (
        lambda ts: ts | {n.replace("backbone.", "model."): t.clone() for n, t in ts.items() if "experts.3.up" in n},
        ["there twice"],
    ),
    "stacked as well": (
        lambda ts: (
            ts | {f"{EXPERTS}.lora_A.weight": torch.ones(32, 24), f"{EXPERTS}.lora_B.weight": torch.ones(16, 32)}
        ),
        ["stacked as well"],
    ),
    "no experts there": (renamed("layers.1.mixer.experts", "layers.2.mixer.experts"), ["layers.2.mixer.experts"]),
}


def test_experts_of_one_weight_share_their_scale(tmp_path: Path) -> None:
    source = adapted(build(), alpha_pattern={"experts.up_proj": 3})
    export_adapter(source, tmp_path, "per_expert")
    settings = settings_of(tmp_path)["alpha_pattern"]
    assert len(settings) == 16  # two layers of 8 experts
    change_settings(tmp_path, alpha_pattern={name: alpha for name, alpha in settings.items() if ".5." not in name})
    refused(tmp_path, CheckpointError, "alpha_pattern", "different values")
    change_settings(tmp_path, alpha_pattern={r"layers\.1\.mixer\.experts\.\d\.up_proj": 3, r"experts.[0-7].up_proj": 3})
    assert torch.equal(logits(load_adapter(build(), tmp_path)), logits(source))


@pytest.mark.parametrize("case", EXPERT_MISFITS)
def test_single_experts_that_do_not_fit(case: str, tmp_path: Path) -> None:
    targets = {k: [n for n in names if not n.startswith("mtp")] for k, names in lora_targets(build()).items()}
    export_adapter(adapted(build(), targets=targets), tmp_path, "per_expert")
    change, parts = EXPERT_MISFITS[case]
    refused(change_tensors(tmp_path, change), CheckpointError, *parts)


def test_stacked_experts_need_their_target_parameters(tmp_path: Path) -> None:
    directory = change_settings(saved(adapted(build()), tmp_path), target_parameters=None)
    refused(directory, CheckpointError, "experts")


def test_weights_of_the_base_model_in_an_adapter_are_never_taken_over(tmp_path: Path) -> None:
    """PEFT saves `lm_head` beside an adapter on it; for another model that would be another model's head."""
    source = adapted(build(), targets={"target_modules": ["lm_head", "in_proj"]})
    directory = saved(source, tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(directory / WEIGHTS)
    assert torch.equal(logits(load_adapter(build(), directory)), logits(source))
    load_adapter(build().bfloat16(), directory)
    change_tensors(directory, lambda ts: {n: t * 1.01 if "base_layer" in n else t for n, t in ts.items()})
    refused(directory, CheckpointError, "lm_head has other values")
    change_tensors(directory, renamed("lm_head.base_layer", "nowhere.base_layer"))
    refused(directory, CheckpointError, "another nowhere")


SETTINGS: dict[str, tuple[dict[str, Any], type[NemotronHError], str]] = {
    "no type": ({"peft_type": None}, UnsupportedError, "peft_type=None"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, UnsupportedError, "peft_compat"),
    "a type like none": ({"peft_type": "../x"}, UnsupportedError, "peft_type"),
    "code": ({"megatron_config": {"a": 1}, "megatron_core": "os"}, UnsupportedError, "megatron"),
    "code alone": ({"megatron_core": "antigravity"}, UnsupportedError, "megatron_core"),
    "initialization": ({"init_lora_weights": "pissa"}, UnsupportedError, "rewrites the base model"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, UnsupportedError, "loftq"),
    "layers twice": ({"layer_replication": [[0, 2], [1, 3]]}, UnsupportedError, "layer_replication"),
    "a variant": ({"kasa_config": {"r": 3}}, UnsupportedError, "kasa_config"),
    "from the future": ({"use_future": True}, UnsupportedError, "use_future"),
    "rank": ({"r": 5}, CheckpointError, "the settings say 5 rows"),
    "a huge rank": ({"r": 10**12}, CheckpointError, "1000000000000"),
    "a rank of text": ({"r": "4"}, CheckpointError, "r must be an integer"),
    "a rank of zero": ({"r": 0}, CheckpointError, "r must be an integer"),
    "no alpha": ({"lora_alpha": None}, CheckpointError, "lora_alpha must be a number"),
    "patterns": ({"rank_pattern": [1]}, CheckpointError, "rank_pattern must be"),
    "a slow pattern": ({"alpha_pattern": {"(x+)+y": 1}}, UnsupportedError, "list the names"),
    "a wrong pattern": ({"alpha_pattern": {"[": 1}}, CheckpointError, "no regular expression"),
    "a pattern's value": ({"rank_pattern": {"in_proj": "2"}}, CheckpointError, "rank_pattern"),
    "targets": ({"target_modules": {"a": 1}}, CheckpointError, "target_modules must be a list"),
    "target parameters": ({"target_parameters": "experts"}, CheckpointError, "target_parameters must be a list"),
    "a switch": ({"use_dora": "yes"}, CheckpointError, "use_dora must be true or false"),
    "a task": ({"task_type": "SEQ_CLS"}, UnsupportedError, "task_type"),
    "dora without its norms": ({"use_dora": True}, CheckpointError, "lora_magnitude_vector: missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_not_read(case: str, tiny: Path) -> None:
    settings, error, part = SETTINGS[case]
    refused(change_settings(tiny, **settings), error, part)


def test_settings_that_say_nothing_about_the_numbers_are_dropped(tiny: Path) -> None:
    source = logits(load_adapter(build(), tiny))
    slow = "(" + "a*" * 20 + ")*b"
    change_settings(
        tiny, auto_mapping={"base_model_class": "x", "parent_library": "antigravity"}, peft_version="99",
        base_model_name_or_path="../evil", revision="main", target_modules=slow, exclude_modules=slow,
        use_future=None, init_lora_weights="gaussian",
    )  # fmt: skip
    assert torch.equal(logits(load_adapter(build(), tiny)), source)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 1, "r": 2}', "null", "[" * 100_000])
def test_a_config_that_is_no_object(text: str, tiny: Path) -> None:
    (tiny / CONFIG).write_text(text)
    refused(tiny, CheckpointError, CONFIG)


def test_damaged_weights(tiny: Path) -> None:
    whole = (tiny / WEIGHTS).read_bytes()
    for damaged in (b"", whole[:-1], whole + b"x", b"\x80\x04" + whole):
        (tiny / WEIGHTS).write_bytes(damaged)
        refused(tiny, CheckpointError, WEIGHTS)


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (str(self.mark), "w"))


def test_pickle_is_never_read(tiny: Path, tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    (tiny / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    load_adapter(build(), tiny)
    (tiny / WEIGHTS).unlink()
    refused(tiny, CheckpointError, "pickle")
    (tiny / "adapter_model.bin").rename(tiny / WEIGHTS)
    refused(tiny, CheckpointError, WEIGHTS)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb would have gone off"


def test_directories_without_an_adapter(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    build().save_pretrained(tmp_path / "model")
    shutil.copytree(tiny, tmp_path / "half")
    (tmp_path / "half" / WEIGHTS).unlink()
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", CheckpointError, "no adapter_config.json")
    refused(tmp_path / "model", CheckpointError, "holds a model")
    refused(tmp_path / "half", CheckpointError, f"no {WEIGHTS}")
    refused(tmp_path / "nowhere", ModelNotFoundError, "nowhere")
    refused(Path("nowhere"), ModelNotFoundError, "not a hub id")
    refused(tmp_path / "file", ModelNotFoundError, "file")
    refused(Path("a b"), ModelNotFoundError, "hub id")
    with pytest.raises(InputError, match="int"):
        load_adapter(3, tiny)  # type: ignore[arg-type]
    assert torch.equal(
        logits(load_adapter(build(), tiny.parent, subfolder="tiny")), logits(load_adapter(build(), tiny))
    )
    with pytest.raises(TypeError, match="is_trainble"):
        load_adapter(build(), tiny, is_trainble=True)  # type: ignore[call-arg]


# Exporting


def test_an_export_is_complete_or_not_there(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_adapter(build(), tiny)
    export_adapter(source, tmp_path / "a")
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    export_adapter(source, tmp_path / "a")
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before

    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nemotron_h.adapters.export.write_temporary", fail)
    with pytest.raises(OSError, match="No space"):
        export_adapter(adapted(build(), targets=TINY, r=2), tmp_path / "a")
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model = build()
    source = get_peft_model(model, IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(UnsupportedError, match="layout='peft'"):
        export_adapter(source, tmp_path, "per_expert")
    for arguments, what in {("vllm",): "peft, per_expert", ("peft", "x"): "the model has default"}.items():
        with pytest.raises(InputError, match=what):
            export_adapter(source, tmp_path, *arguments)
    with pytest.raises(InputError, match="NemotronHForCausalLM"):
        export_adapter(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_chosen_adapter_is_exported(tmp_path: Path) -> None:
    source = adapted(build(), seed=1, targets=TINY)
    source.add_adapter("second", LoraConfig(r=2, **TINY))  # type: ignore[arg-type]
    export_adapter(source, tmp_path, adapter_name="second")
    assert {tensor.shape[0 if "lora_A" in n else 1] for n, tensor in load_file(tmp_path / WEIGHTS).items()} == {2}
    assert without({"x": ["a.b", "c"]}, "b") == {"x": ["c"]}
