"""Does a checkpoint compute here what it should? The work behind `nemotron-h verify`.

Every path's logits are compared with one yardstick: the reference implementation of every op, whole prompts.

Letters: T tokens · V vocabulary · H Mamba heads.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_h import family
from nemotron_h.cache import NemotronHHybridDynamicCache
from nemotron_h.checkpoint.names import hub_names
from nemotron_h.configuration import NemotronHConfig
from nemotron_h.errors import InputError, NemotronHError, UnsupportedError
from nemotron_h.generation import LLM
from nemotron_h.modeling import NemotronHForCausalLM, NemotronHMamba2Mixer
from nemotron_h.ops import settings
from nemotron_h.ops.ssd import time_step

TOLERANCE = 2e-4
MAX_TOKENS = 160

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    # Long on purpose: the state must cross the border of a chunk of the scan.
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a"
    " wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this"
    " truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property"
    ' of some one or other of their daughters. "My dear Mr. Bennet," said his lady to him one day, "have you heard'
    ' that Netherfield Park is let at last?" Mr. Bennet replied that he had not. "But it is," returned she; "for'
    ' Mrs. Long has just been here, and she told me all about it." Mr. Bennet made no answer. "Do you not want to know'
    ' who has taken it?" cried his wife impatiently. "You want to tell me, and I have no objection to hearing it."',
)

# Fields that change this package's logits and that transformers' model does not read (5.20 to 5.23).
PEER_IGNORES = (
    "attention_bias", "sliding_window", "residual_in_fp32", "mamba_proj_bias",
    "n_shared_experts", "block_configs",
)  # fmt: skip

_JUDGED_DTYPES = ("float32", "float64")
_FOREIGN_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Comparison:
    """One path's logits against the reference's, over every position of every prompt.

    max_delta: largest |Δ logit|. mean_kl: mean KL(reference ‖ path) in nats. agreement: share of positions with the
    same best token. bound: what max_delta may be. judged: whether it decides the verdict.
    """

    path: str
    max_delta: float
    mean_kl: float
    agreement: float
    bound: float
    judged: bool

    @property
    def ok(self) -> bool:
        return self.max_delta <= self.bound or not self.judged


@dataclass(frozen=True)
class Floor:
    """transformers' floor of the time step, and the share of our time steps that lie below it."""

    time_step_min: float
    share: float

    def __str__(self) -> str:
        return (
            f"transformers raises every Mamba time step of a prompt to at least time_step_min={self.time_step_min:g},"
            " whatever time_step_limit says, but not when it decodes token by token; this package follows"
            f" time_step_limit. The floor changes {self.share:.2%} of the time steps of these prompts: as it is,"
            " transformers differs there, with the floor lifted it must not."
        )


@dataclass
class Report:
    """What `verify` found. `notes` are remarks for people."""

    model: str
    dtype: str
    prompts: int = 0
    tokens: int = 0
    tensors: int = 0
    non_finite: list[str] = field(default_factory=list)
    all_zero: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    floor: Floor | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.non_finite and not self.all_zero and all(comparison.ok for comparison in self.comparisons)


def verify(
    model: str | os.PathLike[str],
    *,
    against: str | None = None,
    prompts: Sequence[str | Sequence[int]] | None = None,
    max_tokens: int = MAX_TOKENS,
    dtype: str = "float32",
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Check a checkpoint's weights, and compare the paths by which its logits can be computed.

    Args:
        model: Directory or hub id.
        against: "transformers" also runs its `NemotronHForCausalLM` on the same files.
        prompts: Texts, or token ids (also as text where there is no tokenizer). Default: built-in ones.
        max_tokens: Longer prompts are cut.
        dtype: Of the weights. Only float32 and float64 are judged: the rounding of the others exceeds any useful bound.

    Raises:
        ModelNotFoundError, CheckpointError, ConfigError: the model does not load. InputError: unusable prompts.
        NemotronHError: transformers cannot run these files.
    """
    if against not in (None, "transformers"):
        raise UnsupportedError(f"against={against!r}: can be compared with 'transformers' only")
    if max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens}: must be an integer >= 1")
    progress(f"loading {model}")
    llm = LLM(model, dtype=dtype)
    report = Report(os.fspath(model), str(llm.model.dtype).removeprefix("torch."))
    chosen = _default_prompts(llm) if prompts is None else prompts
    ids = [_encode(llm, prompt)[:max_tokens] for prompt in chosen]
    if not ids:
        raise InputError("there is no prompt: give at least one")
    report.prompts, report.tokens = len(ids), sum(map(len, ids))
    _check_weights(llm.model, report)
    if report.non_finite:
        report.notes.append("the logits were not compared: weights that are not finite make them meaningless")
        return report
    yardstick = _compare_ours(llm.model, ids, report, progress)
    if against is not None:
        config = llm.config
        del llm  # the peer needs the memory
        gc.collect()
        progress("loading the same files with transformers")
        _compare_peer(config, dtype, ids, yardstick, report)
    if report.dtype not in _JUDGED_DTYPES:
        report.notes.append(f"{report.dtype} figures are shown but not judged; float32 is")
    return report


# Prompts


def _default_prompts(llm: LLM) -> Sequence[str | Sequence[int]]:
    if llm.tokenizer is not None:
        return PROMPTS
    generator, vocab = torch.Generator().manual_seed(0), llm.config.vocab_size
    lengths = (7, 31, llm.config.mamba_chunk_size + 9)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def _encode(llm: LLM, prompt: str | Sequence[int]) -> list[int]:
    if not isinstance(prompt, str):
        ids = list(prompt)
    elif llm.tokenizer is not None:
        ids = llm.tokenizer(prompt)["input_ids"]
    else:
        words = prompt.replace(",", " ").split()
        if not all(word.isascii() and word.isdecimal() and len(word) < 20 for word in words):
            raise InputError("this checkpoint has no tokenizer: give prompts as token ids, for example 1,5,9")
        ids = [int(word) for word in words]
    if not ids:
        raise InputError("a prompt is empty: give at least one token")
    if min(ids) < 0 or max(ids) >= llm.config.vocab_size:
        raise InputError(f"token ids must lie in [0, {llm.config.vocab_size}), got {min(ids)} to {max(ids)}")
    return ids


# Weights


def _check_weights(model: NemotronHForCausalLM, report: Report) -> None:
    """Name the tensors, experts one by one, that hold NaN or infinity, and the weights that are zero throughout."""
    stored = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    for native, tensor in stored.items():
        for index, (name, shape) in enumerate(hub_names(native, tuple(tensor.shape))):
            piece = tensor if tuple(tensor.shape) == shape else tensor[index]
            report.tensors += 1
            if not bool(piece.isfinite().all()):
                report.non_finite.append(name)
            elif name.endswith("weight") and not bool(piece.any()):
                report.all_zero.append(name)


# Logits


@dataclass
class _Difference:
    """Running comparison of one path with the yardstick."""

    max_delta: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    positions: int = 0

    def add(self, logits_TV: Tensor, yardstick_TV: Tensor) -> None:
        delta = (logits_TV - yardstick_TV).abs().amax()
        self.max_delta = max(self.max_delta, float(delta) if bool(delta.isfinite()) else float("inf"))
        log_p_TV, log_q_TV = yardstick_TV.double().log_softmax(-1), logits_TV.double().log_softmax(-1)
        self.kl += float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum())
        self.agreed += int((logits_TV.argmax(-1) == yardstick_TV.argmax(-1)).sum())
        self.positions += len(logits_TV)

    def result(self, path: str, bound: float, judged: bool) -> Comparison:
        mean_kl, agreement = self.kl / self.positions, self.agreed / self.positions
        return Comparison(path, self.max_delta, mean_kl, agreement, bound, judged)


def _bound(yardstick: Sequence[Tensor]) -> float:
    return TOLERANCE * max(1.0, *(float(logits_TV.abs().amax()) for logits_TV in yardstick))


def _compare_ours(
    model: NemotronHForCausalLM, prompts: list[list[int]], report: Report, progress: Callable[[str], None]
) -> list[Tensor]:
    """Fast against reference and cached against whole; returns the reference's logits [T, V] of each prompt."""
    whole, cached = _Difference(), _Difference()
    yardstick, steps = [], _StepCounter(model.config.mamba_dt_min)
    for number, ids in enumerate(prompts, 1):
        progress(f"prompt {number} of {len(prompts)}, {len(ids)} tokens: whole, and token by token")
        with _implementation("reference"), steps.watching(model):
            yardstick.append(_logits(model, ids))
        whole.add(_logits(model, ids), yardstick[-1])
        cached.add(_logits_one_by_one(model, ids), yardstick[-1])
    bound, judged = _bound(yardstick), report.dtype in _JUDGED_DTYPES
    report.comparisons += [
        whole.result("fast path, whole prompt", bound, judged),
        cached.result("fast path, token by token", bound, judged),
    ]
    if steps.total:
        report.floor = Floor(steps.floor, steps.below / steps.total)
    return yardstick


@torch.no_grad()
def _logits(model: nn.Module, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


@torch.no_grad()
def _logits_one_by_one(model: NemotronHForCausalLM, ids: list[int]) -> Tensor:
    cache = NemotronHHybridDynamicCache(model.config)
    return torch.cat([model(torch.tensor([[i]]), past_key_values=cache).logits[0].float() for i in ids])


@contextmanager
def _implementation(name: str) -> Iterator[None]:
    """Force one implementation of every op."""
    before = os.environ.get("NEMOTRON_H_IMPL")
    os.environ["NEMOTRON_H_IMPL"] = name
    settings.refresh()
    try:
        yield
    finally:
        os.environ.pop("NEMOTRON_H_IMPL")
        if before is not None:
            os.environ["NEMOTRON_H_IMPL"] = before
        settings.refresh()


class _StepCounter:
    """Counts the time steps below a floor while it watches a model."""

    def __init__(self, floor: float) -> None:
        self.floor, self.below, self.total = floor, 0, 0

    @contextmanager
    def watching(self, model: NemotronHForCausalLM) -> Iterator[None]:
        mixers = [module for module in model.model.modules() if isinstance(module, NemotronHMamba2Mixer)]
        handles = [mixer.in_proj.register_forward_hook(self._hook(mixer)) for mixer in mixers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, mixer: NemotronHMamba2Mixer) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(module: nn.Module, inputs: Any, projected: Tensor) -> None:
            steps_BTH = time_step(projected[..., -mixer.num_heads :], mixer.dt_bias, mixer.time_step_limit)
            self.below += int((steps_BTH < self.floor).sum())
            self.total += steps_BTH.numel()

        return count


# The peer


def _compare_peer(
    config: NemotronHConfig, dtype: str, prompts: list[list[int]], yardstick: list[Tensor], report: Report
) -> None:
    as_it_is, lifted = _Difference(), _Difference()
    try:
        peer = _load_peer(report.model, dtype)
        if config.tie_word_embeddings:  # which it ignores: its lm_head would be random
            peer.lm_head.weight = peer.get_input_embeddings().weight
            report.notes.append("transformers does not tie lm_head to the embeddings; for the comparison it was tied")
        for ids, yardstick_TV in zip(prompts, yardstick, strict=True):
            as_it_is.add(_logits(peer, ids), yardstick_TV)
        for module in peer.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = config.mamba_dt_limit
        for ids, yardstick_TV in zip(prompts, yardstick, strict=True):
            lifted.add(_logits(peer, ids), yardstick_TV)
    except _FOREIGN_ERRORS as error:
        raise NemotronHError(f"transformers cannot run these files: {type(error).__name__}: {error}") from error
    ignored = [name for name in PEER_IGNORES if getattr(config, name) != family.FIELDS[name].default]
    if ignored:
        report.notes.append(f"transformers ignores {', '.join(ignored)} of this configuration, so it is not judged")
    bound, judged = _bound(yardstick), report.dtype in _JUDGED_DTYPES and not ignored
    report.comparisons += [
        as_it_is.result("transformers, as it is", bound, False),
        lifted.result("transformers, floor lifted", bound, judged),
    ]


def _load_peer(model: str, dtype: str) -> Any:
    from transformers import NemotronHForCausalLM as Peer

    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    return Peer.from_pretrained(model, dtype=wanted, use_safetensors=True).eval()
