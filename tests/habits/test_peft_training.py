"""LoRA and DoRA on every projection through PEFT: what is adapted, what it computes, what training may move."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_cases import adapted, build, draw_adapter, logits, plain_model, written_out
from torch import nn
from transformers import Trainer, TrainingArguments

from helpers import BIASED, assert_close, draw_ids
from nemotron_h import (
    InputError,
    NemotronHConfig,
    NemotronHForCausalLM,
    NemotronHModel,
    load_adapter,
    lora_targets,
    peft_compat,
)
from nemotron_h.adapters import allow_expert_dora, merge_adapter
from nemotron_h.modeling import NemotronHTopkRouter
from nemotron_h.ops import _native

VARIANTS: dict[str, dict[str, Any]] = {
    "all blocks": {},
    "no latent": {"moe_latent_size": None},
    "dense": {"hybrid_override_pattern": "M*-M", "num_nextn_predict_layers": 0},
    "biased": BIASED,
    "tied": {"tie_word_embeddings": True, "num_nextn_predict_layers": 0},
}
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


# Targets


@pytest.mark.parametrize("variant", VARIANTS)
def test_targets_are_the_matrices_of_the_hub_but_embeddings_router_and_convolution(variant: str) -> None:
    model = build(**VARIANTS[variant])
    targets = lora_targets(model)
    shapes = {name: tuple(t.shape) for name, t in model.named_parameters()}
    matrices = {n for n, shape in shapes.items() if len(shape) > 1 and not n.endswith(("conv1d.weight", "gate.weight"))}
    expected = matrices - {"model.embeddings.weight"}
    assert {f"{name}.weight" for name in targets["target_modules"]} | set(targets["target_parameters"]) == expected
    assert all(len(set(names)) == len(names) for names in targets.values())


def test_targets_of_the_trunk_of_a_wrapped_model_and_of_nothing() -> None:
    model = build()
    names = lora_targets(model)
    trunk = lora_targets(model.model)
    assert {f"model.{name}" for names in trunk.values() for name in names} == {
        name for listed in names.values() for name in listed if name.startswith("model.")
    }
    assert lora_targets(adapted(model, use_dora=True)) == names
    with pytest.raises(InputError, match="Linear"):
        lora_targets(nn.Linear(2, 2))


def test_a_users_own_block_is_adapted_too() -> None:
    model = build()
    model.model.layers[0].mixer.gate = nn.Linear(3, 4)
    assert "model.layers.0.mixer.gate" in lora_targets(model)["target_modules"]
    assert get_peft_model(model, LoraConfig(target_modules=["model.layers.0.mixer.gate"])) is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["all blocks", "no latent", "dense"])
def test_parameter_count_is_the_sum_of_r_times_in_plus_out(variant: str, kind: str) -> None:
    model, rank = build(**VARIANTS[variant]), 3
    weights = dict(model.named_parameters())
    targets = lora_targets(model)
    matrices = [weights[f"{name}.weight"] for name in targets["target_modules"]]
    matrices += [weights[name] for name in targets["target_parameters"]]
    expected = sum(rank * (w.shape[-1] + w.shape[-2]) * w.shape[:-2].numel() for w in matrices)
    if kind == "dora":
        expected += sum(w.shape[:-1].numel() for w in matrices)
    peft_model = adapted(model, r=rank, **KINDS[kind])
    assert sum(p.numel() for p in peft_model.parameters() if p.requires_grad) == expected
    assert peft_model.get_nb_trainable_parameters()[0] == expected


# Values


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapted_model_is_the_model_with_adapted_weights(
    variant: str, kind: str, impl: str, environment: Any
) -> None:
    environment(**({"IMPL": impl} if impl == "reference" or _native.levels() else {}))
    model = build(**VARIANTS[variant])
    base = logits(model)
    targets = lora_targets(model)
    assert ("lm_head" in targets["target_modules"]) is not model.config.tie_word_embeddings
    peft_model = adapted(model, targets=targets, **KINDS[kind])
    result = logits(peft_model)
    assert_close(result, logits(plain_model(peft_model)), kind)
    assert float((result - base).abs().max()) > 0.3  # an adapter that does nothing would pass everything else


def test_the_mtp_head_is_adapted() -> None:
    model = build()
    ids = draw_ids(model, 2, 20)
    trunk_only = {k: [n for n in names if n.startswith("mtp.")] for k, names in lora_targets(model).items()}
    with torch.no_grad():
        before = model(ids, output_mtp_logits=True)
        peft_model = adapted(model, targets=trunk_only)
        after = peft_model(ids, output_mtp_logits=True)
        expected = plain_model(peft_model)(ids, output_mtp_logits=True)
    assert torch.equal(after.logits, before.logits)
    assert float((after.mtp_logits[0] - before.mtp_logits[0]).abs().max()) > 0.3
    assert_close(after.mtp_logits, expected.mtp_logits)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fresh_adapters_change_nothing(kind: str) -> None:
    model = build()
    base = logits(model)
    config = allow_expert_dora(LoraConfig(r=4, **KINDS[kind], **lora_targets(model)))
    with peft_compat(model):
        assert_close(logits(get_peft_model(model, config).eval()), base, bound=1e-5)


def test_an_adapter_on_a_tied_head_leaves_the_embeddings_alone() -> None:
    model = build(**VARIANTS["tied"])
    before = model.model.embeddings.weight.clone()
    peft_model = adapted(model, targets={"target_modules": ["lm_head"]})
    ids = draw_ids(model, 2, 20)
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        head: Any = model.lm_head
        delta = head.scaling["default"] * head.lora_B["default"].weight @ head.lora_A["default"].weight
        assert_close(peft_model(ids).logits, hidden @ (before + delta).T)
    assert torch.equal(model.model.embeddings.weight, before)


def test_bfloat16() -> None:
    model = build().to(torch.bfloat16)
    peft_model = adapted(model)
    assert {p.dtype for p in peft_model.parameters() if p.requires_grad} == {torch.float32}  # PEFT's choice
    result, wide = logits(peft_model), logits(plain_model(adapted(build().to(torch.bfloat16).float())))
    plain = logits(plain_model(peft_model))
    scale = float(wide.abs().max())
    assert float((result - wide).abs().max()) / scale <= 2 * float((plain - wide).abs().max()) / scale + 0.02
    assert model.model.layers[1].mixer.gate.e_score_correction_bias.dtype == torch.float32


# Several adapters


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_several_adapters_and_none(kind: str) -> None:
    model = build()
    base = logits(model)
    peft_model = adapted(model, seed=1, **KINDS[kind])
    first = logits(peft_model)
    second = allow_expert_dora(LoraConfig(r=2, lora_alpha=5, **lora_targets(model)))
    with peft_compat(model):
        peft_model.add_adapter("second", second)
    draw_adapter(peft_model, 2, "second")
    assert torch.equal(logits(peft_model.eval()), first)
    peft_model.set_adapter("second")
    assert_close(logits(peft_model), logits(plain_model(peft_model, "second")))
    peft_model.base_model.set_adapter(["default", "second"])
    plain = [written_out(peft_model, name) for name in ("default", "second")]
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), base)
    untouched = build().state_dict()
    both = build()
    both.load_state_dict({key: plain[0][key] + plain[1][key] - untouched[key] for key in untouched})
    assert_close(logits(peft_model), logits(both))
    peft_model.set_adapter("default")
    assert torch.equal(logits(peft_model), first)
    peft_model.delete_adapter("second")
    assert torch.equal(logits(peft_model), first)


# Training


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_moves_every_factor_and_nothing_else(kind: str) -> None:
    model = build(mtp_loss_coef=0.3, router_aux_loss_coef=0.01)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft_model = adapted(model, **KINDS[kind]).train()
    factors = {name: p.detach().clone() for name, p in peft_model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = draw_ids(model, 4, 24), []
    for _ in range(4):
        loss = peft_model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        grads = {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}
        assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    moved = [name for name, p in peft_model.named_parameters() if name in factors and not torch.equal(p, factors[name])]
    assert moved == list(factors)
    after = model.state_dict()
    for name, tensor in before.items():
        kept = [key for key in after if key.replace(".base_layer", "") == name]
        assert [torch.equal(after[key], tensor) for key in kept] == [True], name
    assert any(m.load_E is not None for m in model.modules() if isinstance(m, NemotronHTopkRouter))


def test_trainer_trains_saves_and_resumes_an_adapter(tmp_path: Path) -> None:
    data = [{"input_ids": ids, "labels": ids} for ids in draw_ids(build(), 8, 16)]

    def train(name: str, steps: int, resume: str | None = None) -> Any:
        arguments = TrainingArguments(
            str(tmp_path / name), max_steps=steps, save_steps=2, per_device_train_batch_size=2, use_cpu=True, seed=1,
            learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        peft_model = adapted(build(), targets=trunk_only(build()))
        Trainer(peft_model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)  # type: ignore[arg-type]
        return peft_model

    whole, resumed = train("whole", 4), train("resumed", 4, str(tmp_path / "whole" / "checkpoint-2"))
    expected = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, expected[name]) for name, p in resumed.named_parameters() if p.requires_grad)
    untrained = adapted(build(), targets=trunk_only(build()))
    assert not any(torch.equal(p, expected[name]) for name, p in untrained.named_parameters() if p.requires_grad)
    kept = {name: t for name, t in whole.state_dict().items() if ".lora_" not in name}
    assert all(torch.equal(untrained.state_dict()[name], tensor) for name, tensor in kept.items())
    assert any(name.endswith("e_score_correction_bias") for name in kept)
    loaded = load_adapter(build(), tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(whole.eval()))


def trunk_only(model: nn.Module) -> dict[str, list[str]]:
    """Without the MTP head, which gets no gradient unless its loss is on."""
    return {key: [n for n in names if not n.startswith("mtp.")] for key, names in lora_targets(model).items()}


def test_gradients_are_those_of_the_weights_written_out() -> None:
    """d loss / dA = s · Bᵀ · dL/dW and d loss / dB = s · dL/dW · Aᵀ, expert by expert."""
    model = build(num_nextn_predict_layers=0)
    peft_model = adapted(model)
    plain = plain_model(peft_model)
    ids = draw_ids(model, 2, 20)
    peft_model(ids, labels=ids).loss.backward()
    plain(ids, labels=ids).loss.backward()
    experts: Any = model.model.layers[1].mixer.experts
    w_EON = plain.model.layers[1].mixer.experts.down_proj.grad
    a, b = experts.lora_A["default"].weight, experts.lora_B["default"].weight
    for e in range(w_EON.shape[0]):
        rows, columns, s = slice(4 * e, 4 * e + 4), slice(e, None, w_EON.shape[0]), experts.scaling["default"]
        assert_close(a.grad[rows], s * b.detach()[:, columns].T @ w_EON[e])
        assert_close(b.grad[:, columns], s * w_EON[e] @ a.detach()[rows].T)
    in_proj: Any = model.model.layers[0].mixer.in_proj
    w_ON = plain.model.layers[0].mixer.in_proj.weight.grad
    lora_B = in_proj.lora_B["default"].weight
    assert_close(in_proj.lora_A["default"].weight.grad, in_proj.scaling["default"] * lora_B.detach().T @ w_ON)


def test_dora_of_an_expert_is_pefts_dora_of_a_linear() -> None:
    """Values and gradients: PEFT's own layer on each expert's matrix, with its part of the factors."""
    model = build(num_nextn_predict_layers=0)
    adapted(model, use_dora=True)
    outer: Any = model.model.layers[1].mixer.experts
    for projection, layer in {"down_proj": outer, "up_proj": outer.base_layer}.items():
        own = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        own += [layer.lora_magnitude_vector["default"].weight]
        weight_EON = layer.get_param().detach()
        experts = weight_EON.shape[0]
        x_TN = torch.randn(5, weight_EON.shape[2], generator=torch.Generator().manual_seed(0))
        with layer._activate_lora(["default"]):
            y_ETO = x_TN @ getattr(layer.get_base_layer(), projection).transpose(1, 2)
            y_ETO.pow(2).sum().backward()
        for e in range(experts):
            linear = nn.Sequential(nn.Linear(*reversed(weight_EON.shape[1:]), bias=False))
            linear[0].weight.data = weight_EON[e].clone()
            config = LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"])
            theirs: Any = get_peft_model(linear, config).base_model.model[0]  # type: ignore[arg-type, index]
            factors = [theirs.lora_A, theirs.lora_B, theirs.lora_magnitude_vector]
            for factor, part in zip(factors, of_expert(own, e), strict=True):
                factor["default"].weight.data = part.detach().clone()
            y_TO = theirs(x_TN)
            assert_close(y_ETO[e], y_TO, projection)
            y_TO.pow(2).sum().backward()
            for factor, part in zip(factors, of_expert([tensor.grad for tensor in own], e), strict=True):
                assert_close(part, factor["default"].weight.grad, projection)


def of_expert(stacked: list[Any], expert: int, rank: int = 4) -> list[Any]:
    """One expert's A, B and magnitudes."""
    a, b, magnitude = stacked
    return [a[rank * expert :][:rank], b[:, expert :: len(magnitude)], magnitude[expert]]


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = build()
        if checkpointing:
            model.gradient_checkpointing_enable()
        peft_model = adapted(model, use_dora=True).train()
        ids = draw_ids(model, 2, 20)
        peft_model(ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in peft_model.named_parameters() if p.requires_grad and "mtp" not in n})
    for name, grad in found[0].items():
        assert_close(found[1][name], grad, name, bound=1e-5)


# Merging


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_no_copy_of_a_weight_goes_stale_when_adapters_are_merged_and_taken_out(
    kind: str, impl: str, environment: Any
) -> None:
    environment(**({"IMPL": impl} if impl == "reference" or _native.levels() else {}))
    model = build()
    untouched = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft_model = adapted(model, **KINDS[kind])
    expected = plain_model(peft_model)
    logits(peft_model)  # whatever an op keeps of the weights, it has now
    for _ in range(2):
        peft_model.merge_adapter()
        assert_close(logits(peft_model), logits(expected))
        merged = {n: t for n, t in model.state_dict().items() if ".lora_" not in n}
        for name, tensor in merged.items():
            assert_close(tensor, expected.state_dict()[name.replace(".base_layer", "")], name, bound=1e-6)
        peft_model.unmerge_adapter()
        for name, tensor in untouched.items():  # to rounding; DoRA of experts to the bit
            (found,) = [t for n, t in model.state_dict().items() if n.replace(".base_layer", "") == name]
            assert_close(found, tensor, name, bound=1e-5)
            assert kind == "lora" or ".experts." not in name or torch.equal(found, tensor)
        assert_close(logits(peft_model), logits(expected))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merged_model_is_saved_as_a_plain_checkpoint(kind: str, tmp_path: Path) -> None:
    peft_model = adapted(build(), **KINDS[kind])
    expected = plain_model(peft_model)
    merged = peft_model.merge_and_unload(safe_merge=True)
    assert type(merged) is NemotronHForCausalLM
    assert merged.state_dict().keys() == expected.state_dict().keys()
    merged.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(merged))
    assert_close(logits(loaded), logits(expected))


@pytest.mark.parametrize("whole", [False, True])
def test_merging_into_a_tied_head_leaves_the_embeddings_alone(whole: bool, tmp_path: Path) -> None:
    model = build(**VARIANTS["tied"])
    embeddings = model.model.embeddings.weight.clone()
    if whole:
        peft_model = adapted(model, targets={"target_modules": ["in_proj"]}, modules_to_save=["lm_head"])
        with torch.no_grad():
            model.lm_head.modules_to_save["default"].weight.mul_(1.5)  # type: ignore[union-attr, operator]
    else:
        peft_model = adapted(model, targets={"target_modules": ["in_proj", "lm_head"]})
    expected = logits(peft_model)
    peft_model.base_model.disable_adapter_layers()  # merging asks for the adapter by name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if whole else "error")  # PEFT's, of weights that are tied
        merged = merge_adapter(peft_model)
    assert_close(logits(merged), expected)
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.model.embeddings.weight, embeddings)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(NemotronHForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_an_adapter_elsewhere_leaves_a_tied_head_tied() -> None:
    model = build(**VARIANTS["tied"])
    peft_model = adapted(model, targets={"target_modules": ["in_proj"]})
    expected = logits(peft_model)
    peft_model.add_adapter("head", LoraConfig(target_modules=["lm_head"]))
    merged: Any = merge_adapter(peft_model, "default")
    assert_close(logits(merged), expected)
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embeddings.weight


def test_peft_alone_would_merge_a_tied_head_into_the_embeddings() -> None:
    """A canary for `merge_adapter`, too."""
    model = build(**VARIANTS["tied"])
    embeddings = model.model.embeddings.weight.clone()
    adapted(model, targets={"target_modules": ["lm_head"]}).merge_and_unload()
    assert not torch.equal(model.model.embeddings.weight, embeddings)


def test_the_adapter_that_is_named_is_merged() -> None:
    model = build()
    peft_model = adapted(model, seed=1)
    with peft_compat(model):
        peft_model.add_adapter("second", LoraConfig(r=2, lora_alpha=5, **lora_targets(model)))  # type: ignore[arg-type]
    draw_adapter(peft_model, 2, "second")
    expected = plain_model(peft_model, "second")
    for wrong, what in {"third": "default, second"}.items():
        with pytest.raises(InputError, match=what):
            merge_adapter(peft_model, wrong)
    with pytest.raises(InputError, match="NemotronHForCausalLM"):
        merge_adapter(model)
    peft_model.base_model.disable_adapter_layers()
    merged = merge_adapter(peft_model, "second")
    assert_close(logits(merged), logits(expected))
    assert list(merged.state_dict()) == list(expected.state_dict())


def test_unload_gives_the_model_back() -> None:
    model = build()
    base, names = logits(model), list(model.state_dict())
    plain = adapted(model, use_dora=True).unload()
    assert plain is model
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), base)


def test_dora_of_experts_merges_from_the_original_weights_only() -> None:
    peft_model = adapted(build(), use_dora=True)
    with peft_compat(peft_model):
        peft_model.add_adapter("second", allow_expert_dora(LoraConfig(r=2, **lora_targets(peft_model))))
    draw_adapter(peft_model, 2, "second")
    experts: Any = peft_model.get_base_model().model.layers[1].mixer.experts
    experts.merge(adapter_names=["second"])
    with pytest.raises(ValueError, match="unmerge"):
        experts.merge(adapter_names=["default"])
    experts.unmerge()
    with torch.no_grad():
        experts.lora_magnitude_vector["default"].weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        experts.merge(safe_merge=True, adapter_names=["default"])
    assert not experts.merged


def test_trained_flag_of_a_stacked_weight_survives_a_pass() -> None:
    peft_model = adapted(build(), use_dora=True)
    experts: Any = peft_model.get_base_model().model.layers[1].mixer.experts
    for trained in (True, False):
        experts.get_param().requires_grad_(trained)
        logits(peft_model)
        assert experts.get_param().requires_grad is trained


# The model's name


def test_peft_refuses_what_it_refused_when_this_was_written() -> None:
    """Canaries: when one of these fails, PEFT has lifted a limit, and a way round it here can go."""
    for targets in (["out_proj"], "all-linear", ["conv1d"]):
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            get_peft_model(build(), LoraConfig(target_modules=targets))
    with pytest.raises(ValueError, match="use_dora"):
        get_peft_model(build(), LoraConfig(use_dora=True, target_parameters=["mixer.experts.up_proj"]))
    with pytest.raises(ValueError, match="lora_dropout"):
        get_peft_model(build(), LoraConfig(lora_dropout=0.1, target_parameters=["mixer.experts.up_proj"]))


def test_all_linear_inside_the_context_leaves_only_the_head_out() -> None:
    model = build()
    with peft_compat(model):
        peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    adapted_modules = set(peft_model.base_model.targeted_module_names)
    assert adapted_modules == set(lora_targets(model)["target_modules"]) - {"lm_head"}


def test_the_context_hides_the_name_from_everything_but_peft(tmp_path: Path) -> None:
    model, other = build(), build()
    written = model.config.to_dict()
    with peft_compat(model) as same:
        assert same is model
        with peft_compat(model.model), peft_compat(model):
            assert model.config.model_type != "nemotron_h"
        assert model.config.model_type != "nemotron_h"
        assert other.config.model_type == NemotronHConfig.model_type == "nemotron_h"
        assert model.config.to_dict() == written
        model.save_pretrained(tmp_path)
        assert NemotronHConfig.from_pretrained(tmp_path).model_type == "nemotron_h"
        assert '"model_type": "nemotron_h"' in (tmp_path / "config.json").read_text()
    assert model.config.model_type == "nemotron_h"
    assert "model_type" not in vars(model.config)
    assert model.config.to_dict() == written


def test_the_name_is_restored_after_an_error() -> None:
    model = build()
    with pytest.raises(ValueError, match="not found"), peft_compat(model):
        get_peft_model(model, LoraConfig(target_modules=["nowhere"]))
    assert model.config.model_type == "nemotron_h"
    with pytest.raises(InputError, match="Linear"), peft_compat(nn.Linear(1, 1)):
        pass


def test_contexts_that_overlap_restore_the_name_with_the_last() -> None:
    model = NemotronHModel(build().config)
    first, second = peft_compat(model), peft_compat(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.config.model_type != "nemotron_h"
    second.__exit__(None, None, None)
    assert model.config.model_type == "nemotron_h"
