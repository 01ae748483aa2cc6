"""A block's decode step in one call of a kernel, where nobody can tell it from the block's modules one after the other.

A token of a 30B-A3B model passes some three hundred ops; between two of them Python, whose objects the weights have
pushed out of the caches, takes longer than the kernels can wait. So a block prepares its step once and repeats it.

Nothing of what makes the model hackable is lost. A module takes part when its class says, by `fused = forward`, that
the step reproduces just this `forward`; a subclass or a changed method does not inherit it. Before each step the
block's `Guard` looks whether hooks hang on any part, whether modules, parameters, their memory and every number that
went into the step are still what they were; if not, the step is prepared again, or the modules run. Weights that change
in place are read where they are.

Letters: B batch · T tokens · D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from nemotron_h.cache import MambaLayer, Step
from nemotron_h.layout import Layout
from nemotron_h.ops import _native, settings
from nemotron_h.ops.activations import activation
from nemotron_h.ops.block_step import MOST_ROWS, AttentionBlock, MambaBlock, Matrix, MlpBlock, MoeBlock, Norm
from nemotron_h.ops.causal_conv1d.native import TAPS
from nemotron_h.ops.dispatch import DTYPE_CODES, not_plain
from nemotron_h.ops.linear.native import ARITHMETIC_CODES
from nemotron_h.ops.linear.native import MOST_ROWS as MOST_PLAIN_ROWS
from nemotron_h.ops.mamba_step.native import record_buffers
from nemotron_h.ops.router.native import MOST_EXPERTS
from nemotron_h.ops.ssd import decay_rate
from nemotron_h.ops.ssd.native import STATES
from nemotron_h.points import untouched

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


class _NotFused(Exception):
    """A part is not what a step can take."""


class BlockStep:
    """The prepared step of one block, or None yet. Copies of a block prepare their own."""

    def __init__(self) -> None:
        self._guard: Any = None
        self._dtype: torch.dtype | None = None
        self._most_rows = 0
        self._run: Callable[[Tensor, Layout, Any], Tensor | None] | None = None

    def __reduce__(self) -> tuple[type[BlockStep], tuple[()]]:
        return BlockStep, ()

    def __call__(self, block: nn.Module, x_BTD: Tensor, layout: Layout, cache: Any) -> Tensor | None:
        """x [B, T, D] behind the block; None where its modules must run."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not settings.current().free:
            return None
        if not 0 < x_BTD.numel() <= MOST_ROWS * x_BTD.shape[-1] or not_plain(x_BTD) is not None:
            return None
        if x_BTD.is_cuda or not x_BTD.is_contiguous() or not self._ready(block, x_BTD.dtype, x_BTD.shape[-1]):
            return None
        assert self._run is not None
        if x_BTD.numel() > self._most_rows * x_BTD.shape[-1]:
            return None
        return self._run(x_BTD, layout, cache)

    @torch.no_grad()
    def rows(self, block: nn.Module, dtype: torch.dtype, size: int) -> int:
        """How many rows x [..., size] may have, each with the bits that it has alone; 1 where modules run."""
        steps = settings.current().free and _native.load() is not None and self._ready(block, dtype, size)
        return self._most_rows if steps else 1

    def _ready(self, block: nn.Module, dtype: torch.dtype, size: int) -> bool:
        return self._is_prepared(dtype) or self._prepare(block, dtype, size)

    def _is_prepared(self, dtype: torch.dtype) -> bool:
        return self._guard is not None and dtype is self._dtype and self._guard.holds()

    def _prepare(self, block: nn.Module, dtype: torch.dtype, size: int) -> bool:
        try:
            parts = _Parts(dtype)
            self._run = parts.step_of(block, size)
        except _NotFused:
            self._guard = self._run = None
            return False
        self._guard, self._dtype, self._most_rows = parts.guard, dtype, parts.most_rows
        return True


class _Parts:
    """Reads a block for its step, and notes in a guard all that was read."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.guard = dtype, _native.extension().Guard()
        self.most_rows = MOST_ROWS
        self._noted: set[tuple[int, str]] = set()  # a fact is looked up at every token: once is enough
        if dtype not in DTYPE_CODES:
            raise _NotFused
        for name in _GLOBAL_HOOKS:
            self.need(not vars(torch_module)[name])
            self.guard.empty(vars(torch_module), name)

    def step_of(self, block: nn.Module, size: int) -> Callable[..., Tensor | None]:
        self.value(block, "training", False)
        mixer = self.child(block, "mixer", fused=False)
        build = _BUILDERS.get(type(mixer).__dict__.get("fused_step", ""))
        if build is None:
            raise _NotFused
        self.check(mixer)
        norm = self.child(block, "norm")
        weight, code = self.address(norm, "weight", size)
        self.need(weight != 0 and code == DTYPE_CODES[self.dtype])
        return build(self, Norm(weight, code, size, float(self.value(norm, "eps"))), mixer)

    def need(self, condition: bool) -> None:
        if not condition:
            raise _NotFused

    def check(self, module: nn.Module) -> None:
        """That the module's own `forward` is what would run, and that nobody watches it."""
        kind, own = type(module), module.__dict__
        if not self._first(own, "forward"):
            return
        self.need(untouched(module))
        self.guard.type(module, kind)
        self.guard.attribute(kind, "forward", kind.forward)
        self.guard.absent(own, "forward")
        for name in _HOOKS:
            self.guard.empty(own, name)

    def _first(self, own: dict[str, Any], key: str) -> bool:
        """Whether a place is noted for the first time."""
        place = id(own), key
        seen = place in self._noted
        self._noted.add(place)
        return not seen

    def _same(self, own: dict[str, Any], key: str, value: Any) -> None:
        if self._first(own, key):
            self.guard.same(own, key, value)

    def child(self, module: nn.Module, name: str, fused: bool = True) -> Any:
        child: Any = self.optional(module, name, fused)
        self.need(child is not None)
        return child

    def optional(self, module: nn.Module, name: str, fused: bool = True) -> Any | None:
        modules = module._modules
        self._same(module.__dict__, "_modules", modules)
        child = modules.get(name)
        if name in modules:
            self._same(modules, name, child)
        else:  # where no module was ever put, torch keeps the None as a plain attribute
            self.guard.absent(modules, name)
            self.value(module, name, None)
        if child is not None and fused:
            self.check(child)
        return child

    def value(self, module: nn.Module, name: str, *expected: Any) -> Any:
        """An attribute that is no module and no tensor."""
        self.need(name in module.__dict__)
        value = module.__dict__[name]
        self.need(not expected or value in expected)
        self._same(module.__dict__, name, value)
        return value

    def tensor(self, module: nn.Module, name: str) -> Tensor | None:
        """A parameter or buffer in plain contiguous memory; None where the module has None."""
        held = "_parameters" if name in module._parameters else "_buffers"
        tensors: dict[str, Any] = module.__dict__[held]
        self.need(name in tensors)
        tensor = tensors[name]
        self._same(module.__dict__, held, tensors)
        self._same(tensors, name, tensor)
        if tensor is not None:
            self.need(not_plain(tensor) is None and tensor.is_contiguous() and tensor.numel() > 0)
            self.guard.tensor(tensor)
        return tensor

    def address(self, module: nn.Module, name: str, *shape: int) -> tuple[int, int]:
        """(address, dtype code) of a tensor of this shape; zeros for None."""
        tensor = self.tensor(module, name)
        if tensor is None:
            return 0, 0
        self.need(tensor.shape == shape and tensor.dtype in DTYPE_CODES)
        return tensor.data_ptr(), DTYPE_CODES[tensor.dtype]

    def width(self, module: nn.Module, name: str) -> int:
        """Outputs of a linear layer."""
        return self.value(self.child(module, name), "out_features")

    def matrix(self, module: nn.Module, name: str, rows: int, cols: int) -> Matrix:
        """A linear layer, plain or packed."""
        layer = self.child(module, name)
        weight = self.tensor(layer, "weight")
        assert weight is not None
        bias, bias_dtype = self.address(layer, "bias", rows)
        if "scheme" not in layer.__dict__:
            self.need(weight.dtype is self.dtype and weight.shape == (rows, cols))
            self.most_rows = MOST_PLAIN_ROWS  # with more the layer takes PyTorch's product
            return Matrix(weight.data_ptr(), DTYPE_CODES[weight.dtype], cols, rows, cols, 0, 0, 1, bias, bias_dtype)
        scheme = self.value(layer, "scheme")
        self.need(weight.dtype == torch.uint8 and weight.shape == scheme.packing.shape(rows, cols))
        return Matrix(weight.data_ptr(), scheme.packing.code, 0, rows, cols, *packed_codes(scheme), bias, bias_dtype)


def packed_codes(scheme: Any) -> tuple[int, int, int]:
    """(group, scale type, arithmetic) of a scheme."""
    packing = scheme.packing
    return packing.group, packing.scale_code, ARITHMETIC_CODES[scheme.activations]


def _mlp(parts: _Parts, norm: Norm, mixer: Any) -> Callable[..., Tensor | None]:
    step = MlpBlock(norm, *_up_and_down(parts, mixer, norm.size)).step
    return lambda x_BTD, layout, cache: step(x_BTD)


def _up_and_down(parts: _Parts, mlp: Any, size: int) -> tuple[Matrix, Matrix]:
    parts.need(parts.value(mlp, "act_fn") is activation(parts.value(mlp, "act", "relu2")))
    up = parts.width(mlp, "up_proj")
    return parts.matrix(mlp, "up_proj", up, size), parts.matrix(mlp, "down_proj", size, up)


def _mamba(parts: _Parts, norm: Norm, mixer: Any) -> Callable[..., Tensor | None]:
    names = ("num_heads", "head_dim", "n_groups", "ssm_state_size")
    heads, head_dim, groups, state = (parts.value(mixer, name) for name in names)
    inner = heads * head_dim
    channels = inner + 2 * groups * state
    conv, gated = parts.child(mixer, "conv1d"), parts.child(mixer, "norm")
    for name in ("hook_z", "hook_x", "hook_B", "hook_C", "hook_dt", "hook_y", "hook_state"):
        parts.child(mixer, name)
    taps = conv.weight.shape[-1]
    parts.value(conv, "act", "silu", "swish")
    parts.value(gated, "n_groups", groups)
    parts.need(state <= STATES and taps in TAPS)
    tensors = (
        parts.address(conv, "weight", channels, 1, taps), parts.address(conv, "bias", channels),
        parts.address(mixer, "dt_bias", heads), parts.address(mixer, "A_log", heads), parts.address(mixer, "D", heads),
        parts.address(gated, "weight", inner),
    )  # fmt: skip
    parts.need(all(address for address, _ in (tensors[0], *tensors[2:])))
    in_proj = parts.matrix(mixer, "in_proj", inner + channels + heads, norm.size)
    out_proj = parts.matrix(mixer, "out_proj", norm.size, inner)
    low, high = parts.value(mixer, "time_step_limit")
    block = MambaBlock(
        channels, taps - 1, norm, in_proj, out_proj, *zip(*tensors, strict=True), heads, head_dim, groups, state, taps,
        float(low), float(high), float(parts.value(gated, "eps")),
    )  # fmt: skip
    shapes = (channels, taps - 1), (heads, head_dim, state)

    def run(x_BTD: Tensor, layout: Layout, cache: Any) -> Tensor | None:
        if type(cache) is not MambaLayer or not cache.steps or not layout.is_plain:
            return None
        window_BCW, state_BHPN, out_state = cache.conv_states, cache.recurrent_states, cache.buffer(layout)
        if out_state is None or not _fit(x_BTD, window_BCW, state_BHPN, shapes):
            return None
        recorded = record_buffers(x_BTD, x_BTD.shape[0], x_BTD.shape[1], channels, heads) if cache.record_past else ()
        y_BTD, window = block.step(x_BTD, window_BCW, state_BHPN, out_state, recorded)
        cache.update(window, out_state)
        if recorded:
            cache.record(Step.of(recorded, decay_rate(mixer.A_log), groups, state), 0, state_BHPN)
        return y_BTD

    return run


def _fit(
    x_BTD: Tensor, window_BCW: Tensor, state_BHPN: Tensor, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> bool:
    """Whether the states are what the kernel reads: anybody may have put them into the cache."""
    batch = x_BTD.shape[0]
    fit = window_BCW.shape == (batch, *shapes[0]) and state_BHPN.shape == (batch, *shapes[1])
    typed = window_BCW.dtype is x_BTD.dtype and state_BHPN.dtype in DTYPE_CODES
    return fit and typed and state_BHPN.is_contiguous() and not_plain(window_BCW, state_BHPN) is None


def _moe(parts: _Parts, norm: Norm, mixer: Any) -> Callable[..., Tensor | None]:
    gate, experts = parts.child(mixer, "gate"), parts.child(mixer, "experts")
    for name in ("hook_router_experts", "hook_router_weights"):
        parts.child(mixer, name)
    count, width, latent = experts.num_experts, *_expert_sizes(parts, experts)
    weight, weight_dtype = parts.address(gate, "weight", count, norm.size)
    bias, bias_dtype = parts.address(gate, "e_score_correction_bias", count)
    choices = [parts.value(gate, name) for name in ("top_k", "n_group", "topk_group", "norm_topk_prob")]
    top_k, n_group, topk_group, _ = choices
    parts.value(gate, "training", False)
    parts.need(weight != 0 and bias != 0 and bias_dtype == DTYPE_CODES[torch.float32])
    parts.need(1 <= top_k <= count <= MOST_EXPERTS and count % n_group == 0 and 1 <= topk_group <= n_group)
    fc1, fc2 = _latent(parts, mixer, latent, norm.size)
    shared = parts.optional(mixer, "shared_experts")
    up_down = (Matrix(), Matrix()) if shared is None else _up_and_down(parts, shared, norm.size)
    step = MoeBlock(
        norm, weight, bias, weight_dtype, count, *choices, float(parts.value(gate, "routed_scaling_factor")),
        *_experts(parts, experts, count, width, latent), fc1, fc2, *up_down,
    ).step  # fmt: skip

    def run(x_BTD: Tensor, layout: Layout, cache: Any) -> Tensor | None:
        recorded = layout.recorder is not None and layout.recorder.routings is not None
        return None if recorded else step(x_BTD)

    return run


def _latent(parts: _Parts, mixer: Any, latent: int, size: int) -> tuple[Matrix, Matrix]:
    if parts.optional(mixer, "fc1_latent_proj") is None:
        parts.need(parts.optional(mixer, "fc2_latent_proj") is None and latent == size)
        return Matrix(), Matrix()
    return parts.matrix(mixer, "fc1_latent_proj", latent, size), parts.matrix(mixer, "fc2_latent_proj", size, latent)


def _expert_sizes(parts: _Parts, experts: Any) -> tuple[int, int]:
    """(width, latent)."""
    parts.value(experts, "act", "relu2")
    if "scheme" in experts.__dict__:
        return parts.value(experts, "width"), parts.value(experts, "latent")
    return experts.up_proj.shape[1:]


def _experts(parts: _Parts, experts: Any, count: int, width: int, latent: int) -> tuple[int, ...]:
    """The experts' fields of a `MoeBlock`."""
    up, down = parts.tensor(experts, "up_proj"), parts.tensor(experts, "down_proj")
    assert up is not None
    assert down is not None
    biases = (
        parts.address(experts, "up_proj_bias", count, width),
        parts.address(experts, "down_proj_bias", count, latent),
    )
    parts.need(all(code == DTYPE_CODES[torch.float32] for _, code in biases))
    codes: tuple[int, ...]
    if "scheme" in experts.__dict__:
        scheme = parts.value(experts, "scheme")
        shapes = [(count, *scheme.packing.shape(*shape)) for shape in ((width, latent), (latent, width))]
        parts.need(up.dtype == torch.uint8 == down.dtype and [up.shape, down.shape] == shapes)
        codes = scheme.packing.code, *packed_codes(scheme)
    else:
        parts.need(up.dtype is parts.dtype and down.dtype is up.dtype)
        parts.most_rows = MOST_PLAIN_ROWS
        parts.need(up.shape == (count, width, latent) and down.shape == (count, latent, width))
        codes = DTYPE_CODES[up.dtype], 0, 0, 1
    bytes_each = [tensor.stride(0) * tensor.element_size() for tensor in (up, down)]
    return (
        up.data_ptr(), down.data_ptr(), biases[0][0], biases[1][0], *bytes_each, *codes, latent, width
    )  # fmt: skip


def _attention(parts: _Parts, norm: Norm, mixer: Any) -> Callable[..., Tensor | None]:
    query, key = parts.width(mixer, "q_proj"), parts.width(mixer, "k_proj")
    widths = {"q_proj": query, "k_proj": key, "v_proj": key}
    ins = [parts.matrix(mixer, name, rows, norm.size) for name, rows in widths.items()]
    block = AttentionBlock(tuple(widths.values()), norm, *ins, parts.matrix(mixer, "o_proj", norm.size, query))

    def run(x_BTD: Tensor, layout: Layout, cache: Any) -> Tensor:
        return block.output(x_BTD, mixer.attend(*block.inputs(x_BTD), layout, cache).contiguous())

    return run


_BUILDERS: dict[str, Callable[[_Parts, Norm, Any], Callable[..., Tensor | None]]] = {
    "attention": _attention,
    "mamba": _mamba,
    "mlp": _mlp,
    "moe": _moe,
}
