"""The step of a whole block: the bits of its modules, and everything that must make the modules run instead."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import tiny_model
from nemotron_h import NemotronHForCausalLM
from nemotron_h.ops import _native, settings
from nemotron_h.ops.block_step import native

pytestmark = pytest.mark.usefixtures("unchecked")
LATENT = {"moe_latent_size": 24}
MODELS: list[tuple[dict[str, Any], str | None, torch.dtype]] = [
    ({}, None, torch.float32),
    ({}, None, torch.bfloat16),
    (LATENT, None, torch.bfloat16),
    ({"use_bias": True, "mlp_bias": True, "mamba_proj_bias": True}, None, torch.float32),
    ({"n_shared_experts": 0, "use_conv_bias": False}, None, torch.bfloat16),
    ({}, "int4", torch.bfloat16),
    (LATENT, "int8", torch.bfloat16),
    ({"sliding_window": 3, "attention_bias": True}, "bf16", torch.bfloat16),
    ({"mlp_bias": True, "time_step_limit": (0.01, 0.5)}, "int4", torch.float32),
]
FUSED = ("mamba", "attention", "moe", "mlp")


def made(changes: dict[str, Any], quantization: str | None, dtype: torch.dtype) -> NemotronHForCausalLM:
    model = tiny_model(**changes).to(dtype).eval()
    if quantization is not None:
        model.quantize(quantization)
    return model


def read(model: nn.Module, rows: int = 1) -> Any:
    ids = torch.tensor([[5, 7, 11, 13]]).repeat(rows, 1) + torch.arange(rows)[:, None]
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


def step(model: nn.Module, cache: Any, tokens: int = 1, rows: int = 1, **kwargs: Any) -> Tensor:
    ids = (torch.arange(rows * tokens).view(rows, tokens) * 7 + 3) % 50
    with torch.no_grad():
        return model(ids, past_key_values=cache, **kwargs).logits


def without_steps(model: NemotronHForCausalLM) -> NemotronHForCausalLM:
    model = copy.deepcopy(model)
    for block in model.model.layers:
        block.step = lambda *_: None
    return model


def test_bits_of_the_modules(taken: list[str]) -> None:
    for changes, quantization, dtype in MODELS:
        model = made(changes, quantization, dtype)
        plain = without_steps(model)
        for rows, counts in ((1, (1, 2, 1, 5)), (2, (1, 4)), (3, (2,))):
            caches = read(model, rows), read(plain, rows)
            for tokens in counts:
                taken.clear()
                found = step(model, caches[0], tokens, rows)
                types = [block.block_type for block in model.model.layers]
                assert taken == [name for name in types if name in FUSED], (changes, quantization)
                assert torch.equal(found, step(plain, caches[1], tokens, rows)), (changes, quantization, rows, tokens)
            for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
                assert all(torch.equal(one.tensors()[name], state) for name, state in other.tensors().items())


@pytest.mark.parametrize(("quantization", "most"), [(None, 8), ("int4", 32), ("bf16", 32)])
def test_rows_that_step_as_a_whole(quantization: str | None, most: int, taken: list[str]) -> None:
    """Plain weights as many as their layers multiply in the kernel, packed ones 32; a state takes 16 tokens at once."""
    model = made(LATENT, quantization, torch.bfloat16)
    plain = without_steps(model)
    types = [block.block_type for block in model.model.layers if block.block_type in FUSED]
    for rows, tokens in ((8, 1), (9, 1), (4, 4), (4, 8), (32, 1), (33, 1), (2, 9), (2, 16), (1, 17)):
        caches = read(model, rows), read(plain, rows)
        taken.clear()
        found = step(model, caches[0], tokens, rows)
        fits = rows * tokens <= most
        assert taken == [name for name in types if fits and (tokens <= 16 or name != "mamba")], (rows, tokens)
        assert torch.equal(found, step(plain, caches[1], tokens, rows)), (rows, tokens)


def test_bits_of_every_level() -> None:
    model = made(LATENT, "int4", torch.bfloat16)
    kernels, results = _native.kernels, []
    for level in _native.levels():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native._native, "kernels", lambda of=None, level=level: kernels(of or level))
            cache = read(model)
            results.append(torch.cat([step(model, cache), step(model, cache, 3)], dim=1))
    assert all(torch.equal(result, results[0]) for result in results)


def test_outputs_are_written_whole() -> None:
    model = made({}, "int4", torch.bfloat16)
    cache = read(model)
    expected = step(copy.deepcopy(model), copy.deepcopy(cache))
    right = torch.empty_like, native.scratch

    def poisoned(tensor: Tensor, **options: Any) -> Tensor:
        return right[0](tensor, **options).fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", poisoned)
        patch.setattr(native, "scratch", lambda size: torch.full((size,), 255, dtype=torch.uint8))
        assert torch.equal(step(model, cache), expected)


def parts(model: NemotronHForCausalLM) -> list[str]:
    """Every module inside the blocks that a step stands for."""
    fused = [f"model.layers.{i}." for i, block in enumerate(model.model.layers) if block.block_type in FUSED]
    return [name for name, _ in model.named_modules() if name.startswith(tuple(fused))]


def test_hooks_are_called_on_every_part() -> None:
    model = made(LATENT, "int4", torch.bfloat16)
    plain = without_steps(model)
    names = parts(model)
    assert len(names) > 40
    for name in names:
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            cache, other = read(model), read(plain)
            step(model, cache), step(plain, other)  # prepared before anybody watches
            seen: list[int] = []
            handle = getattr(model.get_submodule(name), register)(lambda *_, seen=seen: seen.append(1))
            found = step(model, cache)
            handle.remove()
            assert seen, name
            assert torch.equal(found, step(plain, other)), name


def test_what_a_hook_returns_counts() -> None:
    model = made({}, None, torch.float32)
    for name in parts(model):
        module = model.get_submodule(name)
        if list(module.parameters(recurse=False)) and not name.endswith("gate"):
            cache = read(model)
            before = step(model, copy.deepcopy(cache))
            handle = module.register_forward_hook(
                lambda _m, _a, out: out._replace(output=out.output * 2) if isinstance(out, tuple) else out * 2
            )
            assert not torch.equal(step(model, cache), before), name
            handle.remove()


def first(model: NemotronHForCausalLM, block_type: str) -> Any:
    return next(block for block in model.model.layers if block.block_type == block_type)


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args) * 2


class Wrapped(nn.Module):
    """Calls what it hides, and shows what other modules read of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    @property
    def weight(self) -> Any:
        return self.inner.weight

    @property
    def eps(self) -> Any:
        return self.inner.eps

    @property
    def n_groups(self) -> Any:
        return self.inner.n_groups

    @property
    def act(self) -> Any:
        return self.inner.act


def _replace_linear(model: Any) -> None:
    mixer = first(model, "mamba").mixer
    mixer.out_proj = Doubled(mixer.out_proj)


def _replace_mixer(model: Any) -> None:
    block = first(model, "moe")
    block.mixer = Doubled(block.mixer)


def _subclass(model: Any) -> None:
    norm = first(model, "mlp").norm
    kind = type(norm)
    norm.__class__ = type("Twice", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 2})


def _own_forward(model: Any) -> None:
    layer = first(model, "mlp").mixer.up_proj
    right = layer.forward
    layer.forward = lambda *args, **kwargs: right(*args, **kwargs) * 2


def _new_parameter(model: Any) -> None:
    norm = first(model, "moe").norm
    norm.weight = nn.Parameter(norm.weight.detach() * 2)


def _new_memory(model: Any) -> None:
    layer = first(model, "mamba").mixer
    layer.A_log.data = layer.A_log.data + 1


def _other_strides(model: Any) -> None:
    """The same memory, read column by column: in a square matrix only the strides tell."""
    layer = first(model, "moe").mixer.fc1_latent_proj
    layer.weight.data = layer.weight.data.t()


def _in_place(model: Any) -> None:
    with torch.no_grad():
        first(model, "mamba").mixer.dt_bias.add_(1)


def _state_dict(model: Any) -> None:
    state = {name: value * 1.5 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _shared_experts(model: Any) -> None:
    first(model, "moe").mixer.shared_experts = None


def _router_bias(model: Any) -> None:
    gate = first(model, "moe").mixer.gate
    gate.e_score_correction_bias = torch.arange(8.0) * 10


def _value(block_type: str, path: str, name: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        setattr(first(model, block_type).get_submodule(path), name, value)

    return change


CHANGES: dict[str, Callable[[Any], None]] = {
    "linear replaced": _replace_linear,
    "mixer replaced": _replace_mixer,
    "class changed": _subclass,
    "forward of one module": _own_forward,
    "parameter replaced": _new_parameter,
    "memory replaced": _new_memory,
    "strides changed": _other_strides,
    "weights in place": _in_place,
    "state dict assigned": _state_dict,
    "shared expert removed": _shared_experts,
    "router bias replaced": _router_bias,
    "dt limit": _value("mamba", "mixer", "time_step_limit", (0.5, 0.6)),
    "window": _value("attention", "mixer", "sliding_window", 2),
    "eps": _value("mlp", "norm", "eps", 3.0),
    "gated eps": _value("mamba", "mixer.norm", "eps", 3.0),
    "top_k": _value("moe", "mixer.gate", "top_k", 1),
    "scaling": _value("moe", "mixer.gate", "routed_scaling_factor", 7.0),
    "activation": _value("mlp", "mixer", "act_fn", torch.sin),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_behind_the_first_step_count(name: str) -> None:
    model = made({"moe_latent_size": 32}, None, torch.float32)
    cache = read(model)
    step(model, cache)
    before = step(model, copy.deepcopy(cache))
    CHANGES[name](model)
    found = step(model, copy.deepcopy(cache))
    assert not torch.equal(found, before)
    assert torch.equal(found, step(without_steps(model), cache))


def test_any_part_can_be_somebody_elses() -> None:
    """A wrapper around each module in turn, before and after the first step, with none of its attributes."""
    for stepped in (True, False):
        for name in parts(made(LATENT, None, torch.float32)):
            model = made(LATENT, None, torch.float32)
            parent, _, leaf = name.rpartition(".")
            if "hook_" in name or leaf.isdigit() or leaf == "experts":
                continue
            cache = read(model)
            if stepped:
                step(model, cache)
            setattr(model.get_submodule(parent), leaf, Wrapped(model.get_submodule(name)))
            assert torch.equal(step(model, copy.deepcopy(cache)), step(without_steps(model), cache)), name


def test_a_method_changed_on_the_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made({}, None, torch.float32)
    kinds = {type(model.get_submodule(name)) for name in parts(model)}
    for kind in kinds:
        cache = read(model)
        step(model, cache)
        calls: list[int] = []
        right = kind.forward

        def patched(self: Any, *args: Any, _right: Any = right, _calls: list[int] = calls, **kwargs: Any) -> Any:
            _calls.append(1)
            return _right(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", patched)
            step(model, cache)
        assert calls or kind.__name__ == "NemotronHPoint", kind


def test_packed_experts_and_dtypes_can_change() -> None:
    model = made({}, None, torch.float32)
    cache = read(model)
    step(model, cache)
    model.bfloat16()
    cache = read(model)
    assert torch.equal(step(model, copy.deepcopy(cache)), step(without_steps(model), cache))
    model.quantize("int8")
    cache = read(model)
    assert torch.equal(step(model, copy.deepcopy(cache)), step(without_steps(model), cache))


def test_where_the_modules_run(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = made({}, None, torch.float32)
    cache = read(model)
    step(model, cache)
    taken.clear()
    step(model, copy.deepcopy(cache), output_router_logits=True)
    assert "moe" not in taken
    assert "mamba" in taken
    taken.clear()
    step(model, copy.deepcopy(cache), output_ssm_states=True)
    assert "mamba" not in taken
    taken.clear()
    model(torch.tensor([[3]]), past_key_values=copy.deepcopy(cache))  # with grad
    step(model, copy.deepcopy(cache), tokens=17)
    step(model, copy.deepcopy(cache), attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0]])[:, : cache.length + 1])
    assert "mamba" not in taken
    calls: list[int] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    taken.clear()
    step(model, copy.deepcopy(cache))
    handle.remove()
    assert not taken
    assert len(calls) >= len(parts(model)) // 3
    for name in ("NEMOTRON_H_CHECK", "NEMOTRON_H_TRACE"):
        monkeypatch.setenv(name, "1")
        settings.refresh()
        step(model, copy.deepcopy(cache))
        monkeypatch.delenv(name)
        settings.refresh()
    model.train()
    step(model, copy.deepcopy(cache))
    assert not taken


def test_a_state_that_somebody_put_there(taken: list[str]) -> None:
    model = made({}, None, torch.float32)
    expected = step(model, read(model))
    for changed in ("recurrent_states", "conv_states"):
        cache = read(model)
        layer = cache.layers[0]
        state = getattr(layer, changed)
        setattr(layer, changed, state.mT.contiguous().mT)  # the same values in another order of memory
        taken.clear()
        assert torch.allclose(step(model, cache), expected, atol=1e-5)
        assert taken.count("mamba") == (1 if changed == "recurrent_states" else 2)


def test_copies_and_pickles_prepare_their_own() -> None:
    model = made({}, "int4", torch.bfloat16)
    cache = read(model)
    expected = step(model, copy.deepcopy(cache))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.model.layers[0].norm.weight.mul_(2)
        assert not torch.equal(step(twin, copy.deepcopy(cache)), expected)
    assert torch.equal(step(model, cache), expected)


def test_a_model_that_stepped_is_collected() -> None:
    model = made({}, None, torch.float32)
    step(model, read(model))
    watched = [weakref.ref(model), weakref.ref(first(model, "mamba").mixer.in_proj.weight)]
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
