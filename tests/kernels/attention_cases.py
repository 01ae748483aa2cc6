"""What the tests of the attention kernels share.

Letters: B batch · T queries · S keys · Q query heads · K key/value heads · R = Q/K · d head size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemotron_h.ops import dispatch
from nemotron_h.ops.attention import Int8Rows, native, quantize

FLOAT, BFLOAT, INT8 = torch.float32, torch.bfloat16, torch.int8
KINDS = [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (FLOAT, INT8), (BFLOAT, INT8)]  # queries; keys and values
NAN, INF = float("nan"), float("inf")


class Case(NamedTuple):
    """One call of the op."""

    q: Tensor
    k: Tensor | Int8Rows
    v: Tensor | Int8Rows
    visible: Tensor | None = None
    causal: bool = False
    past: int = 0
    window: int | None = None

    @property
    def op(self) -> str:
        return "attention_int8" if isinstance(self.k, Int8Rows) else "attention"

    @property
    def args(self) -> tuple[Any, ...]:
        k, v = ((*x,) if isinstance(x, Int8Rows) else (x,) for x in (self.k, self.v))
        return self.q, *k, *v, self.visible, self.causal, 0.0, self.past, self.window

    @property
    def keys(self) -> int:
        return (self.k.bytes_BKSd if isinstance(self.k, Int8Rows) else self.k).shape[2]

    def run(self, level: str | None = None) -> Tensor:
        refusal = native.refusal_int8 if self.op == "attention_int8" else native.refusal
        assert refusal(*self.args) is None
        return getattr(native, self.op)(*self.args, level=level)

    def where(self, change: Callable[[Tensor], Tensor]) -> "Case":
        """Keys, values and their scales changed."""
        k, v = (Int8Rows(*map(change, x)) if isinstance(x, Int8Rows) else change(x) for x in (self.k, self.v))
        return self._replace(k=k, v=v)


def draw(
    B: int, T: int, K: int, R: int, S: int, d: int, kind: tuple[torch.dtype, torch.dtype] = KINDS[0], seed: int = 0,
    sharp: float = 1.0,
) -> Case:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=g) for shape in [(B, T, K * R, d), (B, K, S, d), (B, K, S, d)])
    q = (q * sharp).to(kind[0])
    return Case(q, quantize(k), quantize(v)) if kind[1] == INT8 else Case(q, k.to(kind[1]), v.to(kind[1]))


def draw_mask(case: Case, seed: int = 0) -> Tensor:
    """About half of the keys; every query sees one."""
    B, T, S = *case.q.shape[:2], case.keys
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand((B, 1, T, S), generator=g) < 0.5
    mask.scatter_(3, torch.randint(0, S, (B, 1, T, 1), generator=g), True)
    return mask


def assert_within_budget(case: Case, out: Tensor) -> None:
    op = dispatch._registry[case.op]
    low = op.reference(*case.args)
    high = op.reference(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in case.args))
    slack = op.slack if out.dtype == FLOAT else 0.5  # in bfloat16 it is far below what PyTorch errs
    error, allowed = dispatch.budget(out, low, high, slack)
    assert error <= allowed, f"{[getattr(t, 'shape', t) for t in case.args]}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, zeros' signs included; a NaN is a NaN."""
    number = {FLOAT: torch.int32, BFLOAT: torch.int16}[a.dtype]
    nan = a.isnan() & b.isnan()
    return a.shape == b.shape and bool(((a.view(number) == b.view(number)) | nan).all())
