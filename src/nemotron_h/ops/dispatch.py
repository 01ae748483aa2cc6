"""How an op picks its implementation.

An op folder registers its implementations once and calls the resulting `Op`:

    RMS_NORM = dispatch.register("rms_norm", reference.rms_norm, native.rms_norm, native.refusal)
    RMS_NORM(x, weight, eps, impl=impl)

`impl="native"` never falls back: it raises `KernelError` with the kernel's reason. `impl=None` takes the kernel where
its `refusal` finds nothing against it, and the reference everywhere else. settings.py lists the environment variables.
A fast implementation that is no C++ kernel registers under a name of its own (`fast_name`) and obeys the same rules.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

from nemotron_h.errors import KernelError
from nemotron_h.ops import _native, settings

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}  # csrc/kernels.h: Dtype

_log = logging.getLogger(__name__)
_registry: dict[str, "Op"] = {}


class Row(NamedTuple):
    """One line of `table`: what runs for plain CPU tensors without grad, and why."""

    op: str
    implementations: tuple[str, ...]
    chosen: str
    reason: str


def _no_kernel(*_: Any) -> str:
    return "it has no C++ kernel"


@dataclass(eq=False)
class Op:
    """One operation and its implementations, all with the same positional arguments and result.

    name       as it appears in `doctor`, traces and errors
    reference  the specification: differentiable PyTorch
    native     the C++ kernel's wrapper; without one, the reference
    refusal    says why the kernel cannot take these arguments, or None when it can
    slack      c of the error budget (see `budget`)
    fast_name  what `impl=` calls the fast implementation; "native" is a C++ kernel
    check      says what is wrong with a result for these arguments, or None; by default, what leaves the error budget.
               An op that returns choices (ids) has its own, since a near-tie may fall on either side.
    """

    name: str
    reference: Callable[..., Any]
    native: Callable[..., Any]
    refusal: Callable[..., str | None]
    slack: float
    fast_name: str = "native"
    check: Callable[[tuple[Any, ...], Any], str | None] | None = None

    @property
    def has_kernel(self) -> bool:
        return self.refusal is not _no_kernel and self.fast_name == "native"

    @property
    def label(self) -> str:
        """The fast implementation, in traces and errors."""
        return f"native {_native.level()}" if self.has_kernel else self.fast_name

    def __call__(self, *args: Any, impl: str | None = None) -> Any:
        if torch.compiler.is_compiling():
            if impl not in (None, "reference"):
                raise KernelError(f"{self.name}: impl={impl!r} was asked for, but torch.compile traces the reference.")
            return self.reference(*args)
        asked = settings.current()
        if impl is None and asked.free:  # the way of every op of every token: nothing more than it needs
            return self.native(*args) if self.refusal(*args) is None else self.reference(*args)
        reason = self.why_reference(args, impl)
        if reason is None:
            return self.run(*args)
        if asked.trace:
            _trace(self, reason, args)
        return self.reference(*args)

    def run(self, *args: Any) -> Any:
        """The fast implementation, for arguments of which `why_reference` has said None."""
        asked = settings.current()
        if asked.trace:
            _trace(self, None, args)
        result = self.native(*args)
        if asked.check:
            _check(self, args, result)
        return result

    def why_reference(self, args: tuple[Any, ...], impl: str | None) -> str | None:
        """Why these arguments take the reference; None when the kernel runs. Raises `KernelError`, see the module."""
        if impl is not None:
            return self._obey(args, impl)
        forced = settings.current().impl
        if forced == "reference":
            return "NEMOTRON_H_IMPL=reference"
        if forced == "native" and self.has_kernel and _native.load() is None:
            raise KernelError(f"{self.name}: NEMOTRON_H_IMPL=native, but {_native.why_missing()}.")
        return self.refusal(*args)

    def _obey(self, args: tuple[Any, ...], impl: str) -> str | None:
        if impl == "reference":
            return "impl='reference'"
        if impl != self.fast_name:
            raise KernelError(f"{self.name}: impl={impl!r} is not known: use 'reference', {self.fast_name!r} or None.")
        refusal = self.refusal(*args)
        if refusal is not None:
            raise KernelError(f"{self.name}: impl={impl!r} was asked for, but {refusal}.")
        return None


def register(
    name: str,
    reference: Callable[..., Any],
    native: Callable[..., Any] | None = None,
    refusal: Callable[..., str | None] | None = None,
    slack: float = 4.0,
    fast_name: str = "native",
    check: Callable[[tuple[Any, ...], Any], str | None] | None = None,
) -> Op:
    """Make an `Op` and list it in `table`."""
    op = Op(name, reference, native or reference, refusal or _no_kernel, slack, fast_name, check)
    _registry[name] = op
    return op


def table() -> list[Row]:
    """Every op imported so far, with the choice for plain CPU tensors without grad. Raises as a call would."""
    return [_row(op) for _, op in sorted(_registry.items())]


def _row(op: Op) -> Row:
    if op.refusal is _no_kernel:
        return Row(op.name, ("reference",), "reference", _no_kernel())
    both = ("reference", op.fast_name)
    if settings.current().impl == "reference":
        return Row(op.name, both, "reference", "NEMOTRON_H_IMPL=reference")
    if not op.has_kernel:
        return Row(op.name, both, op.fast_name, "where its conditions hold")
    if _native.load() is None:
        return Row(op.name, both, "reference", _native.why_missing())
    return Row(op.name, both, "native", f"level {_native.level()}")


def not_plain(*tensors: Tensor) -> str | None:
    """Why no kernel may read these tensors' memory; None when it may.

    A kernel sees addresses, so whatever stands between a tensor and its memory (autograd, functorch, fake tensors,
    subclasses, dispatch modes that count or record) must see the reference instead.
    """
    if _native.load() is None:
        return _native.why_missing()
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode (fake tensors, FLOP counter, make_fx) is active"
    if maybe_current_level() is not None:
        return "a functorch transform (vmap, grad, jvp) is active"
    if forward_ad._current_level >= 0:
        return "forward-mode autograd is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    grad = torch.is_grad_enabled()
    for t in tensors:
        if type(t) is not Tensor and type(t) is not nn.Parameter:
            return f"{type(t).__name__} is not a plain tensor"
        if not t.is_cpu:
            return f"a tensor is on {t.device}, not on the CPU"
        if grad and t.requires_grad:
            return "a tensor requires grad"
        if t.layout is not torch.strided or t.is_nested or t.is_neg():
            return "a tensor is sparse, nested or lazily negated"
    return None


def budget(fast: Tensor, low: Tensor, high: Tensor, slack: float) -> tuple[float, float]:
    """A kernel's error and what it may be: (‖fast - high‖, 2·‖low - high‖ + slack·eps(dtype of fast)·‖high‖).

    `high` is the reference in float64, `low` the reference in the tensors' own dtypes: a kernel may err twice as much
    as plain PyTorch does. Where `low` is infinite or NaN, `fast` must be the same; a mismatch is an infinite error.
    """
    finite = low.isfinite()
    odd = low[~finite].to(fast.dtype)  # which may be narrower
    if not torch.equal(finite, fast.isfinite()) or not torch.allclose(odd, fast[~finite], equal_nan=True):
        return float("inf"), 0.0
    fast64, low64, high64 = (t.double()[finite] for t in (fast, low, high))
    allowed = 2 * (low64 - high64).norm() + slack * torch.finfo(fast.dtype).eps * high64.norm()
    return float((fast64 - high64).norm()), float(allowed)


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with every floating tensor in float64: for the reference, `budget`'s `high`."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _check(op: Op, args: tuple[Any, ...], result: Any) -> None:
    with torch.no_grad():
        wrong = op.check(args, result) if op.check is not None else _outside_budget(op, args, result)
    if wrong is not None:
        raise KernelError(
            f"{op.name}: {op.label} {wrong}, for {_describe(args)}. "
            f"NEMOTRON_H_IMPL=reference runs without it; please report this."
        )


def _outside_budget(op: Op, args: tuple[Any, ...], result: Any) -> str | None:
    low, high = op.reference(*args), op.reference(*in_float64(args))
    for part, (fast, low_part, high_part) in enumerate(zip(_parts(result), _parts(low), _parts(high), strict=True)):
        error, allowed = budget(fast, low_part, high_part, op.slack)
        if allowed < error < float("inf"):
            allowed += op.slack * sensitivity(lambda *a, part=part: _parts(op.reference(*a))[part], args)
        wrong = off(error, allowed)
        if wrong is not None:
            return wrong
    return None


def sensitivity(function: Callable[..., Tensor], args: tuple[Any, ...]) -> float:
    """How far a float64 result moves, by its norm, when every floating input moves by float32's eps, up or down.

    Where large terms cancel, a result is small beside what was rounded on the way, and plain PyTorch may err by less
    than that by luck: `budget` then allows too little. No float32 sum can be asked for more than this; root mean
    square over eight draws of the signs, always the same.
    """
    generator = torch.Generator().manual_seed(0)
    exact = in_float64(args)
    high = function(*exact)
    squares = []
    for _ in range(8):
        moved = function(*(_nudged(a, generator) for a in exact)) - high
        squares.append(float(moved[moved.isfinite()].square().sum()))
    return (sum(squares) / len(squares)) ** 0.5


def _nudged(a: Any, generator: torch.Generator) -> Any:
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return a
    signs = 2 * torch.randint(0, 2, a.shape, generator=generator) - 1
    return a * (1 + torch.finfo(torch.float32).eps * signs.to(a.device))


def off(error: float, allowed: float) -> str | None:
    """What a check says of an error; None of one that is allowed."""
    return f"is off by {error:.3g} where {allowed:.3g} is allowed" if error > allowed else None


def _parts(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _trace(op: Op, reason: str | None, args: tuple[Any, ...]) -> None:
    if not _log.hasHandlers():
        _log.addHandler(logging.StreamHandler())  # stderr
    _log.setLevel(logging.INFO)
    chosen = op.label if reason is None else f"reference ({reason})"
    _log.info("%s: %s, %s", op.name, chosen, _describe(args))


def _describe(args: tuple[Any, ...]) -> str:
    return " ".join(f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}" for a in args if isinstance(a, Tensor))
