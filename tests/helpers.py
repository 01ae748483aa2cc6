"""Small models with logits of about 5, inputs without router near-ties, and the bound that every comparison keeps."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import reference64
from nemotron_h import NemotronHConfig, NemotronHForCausalLM
from nemotron_h.experts import NemotronHExperts
from reference64 import Reference

BOUND = 2e-4
"""Largest error in float32, relative to max(1, max |expected|)."""
BOUND64 = 1e-9
MARGIN = 1e-4
"""A closer choice of experts may fall differently in float32."""

# Activations that configs may name and the reference does not have.
reference64.ACTIVATIONS |= {
    "relu6": lambda x: np.clip(x, 0.0, 6.0),
    "mish": lambda x: x * np.tanh(reference64.softplus(x)),
    "gelu_fast": reference64.gelu_tanh,
}

_TINY: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "hybrid_override_pattern": "ME*-M", "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "mamba_num_heads": 6, "mamba_head_dim": 8, "mamba_n_groups": 2,
    "ssm_state_size": 16, "mamba_chunk_size": 8, "intermediate_size": 48, "n_routed_experts": 8, "n_group": 2,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40,
    "moe_latent_size": 16, "routed_scaling_factor": 2.5,
}  # fmt: skip
BIASED = {"use_bias": True, "mlp_bias": True, "attention_bias": True}


def tiny_config(**overrides: Any) -> NemotronHConfig:
    """All four block types, H·P != 2·D, Q·d != D, groups, latent experts; overrides in any spelling."""
    pattern = ("layers_block_type", "block_configs", "hybrid_override_pattern")
    base = {k: v for k, v in _TINY.items() if k not in pattern or not any(p in overrides for p in pattern)}
    return NemotronHConfig(**(base | overrides))


def tiny_model(seed: int = 0, **overrides: Any) -> NemotronHForCausalLM:
    """A model of `tiny_config` in eval mode with drawn weights."""
    return draw_weights(NemotronHForCausalLM(tiny_config(**overrides)), seed)


@torch.no_grad()
def draw_weights(
    model: NemotronHForCausalLM, seed: int = 0, dt_bias: float = -2.0, expert_bias: bool = False
) -> NemotronHForCausalLM:
    """Fill the model, in eval mode, so that logits reach about 5 and no weight, bias or norm is neutral.

    Args:
        dt_bias: Middle of the time step biases; the steps are about softplus of it.
        expert_bias: Give routed experts biases, which no config does but a checkpoint may.
    """
    generator = torch.Generator().manual_seed(seed)
    if expert_bias:
        for module in model.modules():
            if isinstance(module, NemotronHExperts):
                module.add_bias()
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float32)
        leaf = name.rpartition(".")[2]
        if leaf == "dt_bias":
            t.copy_(dt_bias + noise)
        elif leaf in ("A_log", "e_score_correction_bias", "bias", "up_proj_bias", "down_proj_bias"):
            t.copy_(0.3 * noise)
        elif t.dim() == 1:  # norms and D
            t.copy_(1.0 + 0.3 * noise)
        elif "lm_head" in name or ("embeddings" in name and model.config.tie_word_embeddings):
            t.copy_(1.6 * noise / t.shape[-1] ** 0.5)
        elif "embeddings" in name:
            t.copy_(noise)
        else:
            t.copy_(noise / t.shape[-1] ** 0.5)
    return model.eval()


def hub_tensors(model: NemotronHForCausalLM) -> dict[str, NDArray[np.float64]]:
    """The weights under the names of a hub checkpoint, experts one by one."""
    tensors: dict[str, NDArray[np.float64]] = {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().to(torch.float64).numpy()
        hub = "backbone." + name.removeprefix("model.") if name.startswith("model.") else name
        stem, _, leaf = hub.rpartition(".")
        if stem.endswith("experts") and not stem.endswith("shared_experts"):
            projection, kind = (leaf.removesuffix("_bias"), "bias") if leaf.endswith("_bias") else (leaf, "weight")
            tensors |= {f"{stem}.{e}.{projection}.{kind}": part for e, part in enumerate(value)}
        else:
            tensors[hub] = value
    return tensors


def draw_ids(model: NemotronHForCausalLM, *shape: int, seed: int = 0) -> Tensor:
    """Token ids, without a look at the router's margins."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator)


def draw_inputs(
    model: NemotronHForCausalLM, tokens: int, seed: int = 0, mtp_depths: int = 0
) -> tuple[Tensor, Reference]:
    """Token ids [T] and what the reference makes of them, drawn until every router's choice has a clear margin.

    Ten draws in vain draw the routers' biases again as well.
    """
    for attempt in range(100):
        if attempt % 10 == 9:  # with a single token in the vocabulary, drawing ids again changes nothing
            _draw_router_biases(model, attempt)
        ids_T = draw_ids(model, tokens, seed=1000 * seed + attempt)
        reference = reference64.run(model.config, hub_tensors(model), ids_T.numpy(), mtp_depths=mtp_depths)
        if reference.selection_margin > MARGIN:
            return ids_T, reference
    raise AssertionError(f"no input of {tokens} tokens with a margin above {MARGIN} in 100 draws")


def _draw_router_biases(model: NemotronHForCausalLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))


def draw_rows(model: NemotronHForCausalLM, lengths: list[int], seed: int = 0, mtp_depths: int = 0) -> list[Tensor]:
    """One row of ids [T] for each length, each without a near-tie."""
    return [draw_inputs(model, length, seed * 100 + i, mtp_depths)[0] for i, length in enumerate(lengths)]


def error(actual: Tensor | NDArray[Any], expected: Tensor | NDArray[Any]) -> float:
    """max |actual - expected| / max(1, max |expected|); infinite where shapes differ or a value is not finite."""
    a, b = (
        np.asarray(t.detach().double() if isinstance(t, Tensor) else t, dtype=np.float64) for t in (actual, expected)
    )
    if a.shape != b.shape or not np.isfinite(a).all() or not np.isfinite(b).all():
        return float("inf")
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) if a.size else 0.0


def assert_close(actual: Any, expected: Any, what: str = "", bound: float = BOUND) -> None:
    """Within the bound, shapes equal, all finite; lists and tuples element by element."""
    if isinstance(expected, list | tuple):
        assert len(actual) == len(expected), f"{what}: {len(actual)} entries instead of {len(expected)}"
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_close(a, b, f"{what}[{index}]", bound)
        return
    found = error(actual, expected)
    assert found <= bound, f"{what}: off by {found:.3g}, shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
