"""The last tokens that a Mamba layer saw, so that some of them can be taken back.

A state cannot run backwards. A journal therefore holds the state before its tokens and what each pass fed to the
recurrence, some 22 KiB per token of a 30B model beside 2 MiB per state; taking tokens back runs the kept ones again,
from that state, without any projection.

Letters: B batch · T tokens · C conv channels · W = taps - 1 · H, P, G, N as in ops/ssd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemotron_h.ops.causal_conv1d import next_window
from nemotron_h.ops.ssd import ssd

JOURNAL = 64  # tokens that a recording cache can always take back
CHUNK = 128  # tokens of a chunk when some are run again


class Step(NamedTuple):
    """What one pass fed to a Mamba layer. Rows are compacted (Layout.compact)."""

    xBC_BTC: Tensor
    x_BTHP: Tensor
    dt_BTH: Tensor
    A_H: Tensor
    B_BTGN: Tensor
    valid_BT: Tensor | None  # of the pass's slots, not compacted

    @classmethod
    def of(cls, recorded: tuple[Tensor, Tensor, Tensor], A_H: Tensor, groups: int, state: int) -> Step:
        """Of a pass without padding: inputs [B, T, C] of the convolution, its outputs x | B | C, and the time steps."""
        inputs_BTC, convolved_BTC, dt_BTH = recorded
        inner = convolved_BTC.shape[2] - 2 * groups * state
        x_BTHP = convolved_BTC[..., :inner].unflatten(-1, (dt_BTH.shape[2], -1))
        B_BTGN = convolved_BTC[..., inner : inner + groups * state].unflatten(-1, (groups, state))
        return cls(inputs_BTC, x_BTHP, dt_BTH, A_H, B_BTGN, None)

    @property
    def slots(self) -> int:
        return self.dt_BTH.shape[1]

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> Step:
        batched = {name: change(t) for name, t in self._asdict().items() if t is not None and name != "A_H"}
        return self._replace(**batched)

    def tail(self, start: int) -> Step:
        """The tokens from `start` on, in memory of their own: a view would keep the whole pass alive."""
        valid_BT = None if self.valid_BT is None else self.valid_BT[:, start:].clone()
        tensors = (self.xBC_BTC, self.x_BTHP, self.dt_BTH, self.B_BTGN)
        xBC_BTC, x_BTHP, dt_BTH, B_BTGN = (t[:, start:].clone() for t in tensors)
        return Step(xBC_BTC, x_BTHP, dt_BTH, self.A_H, B_BTGN, valid_BT)

    def lengths_B(self, kept: int) -> Tensor:
        """Real tokens of each row among the first `kept` slots."""
        if self.valid_BT is None:
            return torch.full((self.dt_BTH.shape[0],), kept, device=self.dt_BTH.device)
        return self.valid_BT[:, :kept].sum(-1)


class Journal:
    """The passes since a known state.

    Args:
        window_BCW, state_BHPN: Convolution window and state before the first pass; None at the start of the text.
        at_rest: Rounds a state to the dtype in which the cache keeps it.
    """

    def __init__(
        self, window_BCW: Tensor | None, state_BHPN: Tensor | None, at_rest: Callable[[Tensor], Tensor]
    ) -> None:
        self.window_BCW, self.state_BHPN, self.at_rest = window_BCW, state_BHPN, at_rest
        self.steps: list[Step] = []

    @property
    def slots(self) -> int:
        return sum(step.slots for step in self.steps)

    def copy(self) -> Journal:
        """One that grows by itself; the tensors, which nobody writes over, are shared."""
        other = Journal(self.window_BCW, self.state_BHPN, self.at_rest)
        other.steps = list(self.steps)
        return other

    def append(self, step: Step, taps: int) -> None:
        """Add a pass; the oldest are folded into the state while the others hold `JOURNAL` slots."""
        self.steps.append(step)
        while len(self.steps) > 1 and self.slots - self.steps[0].slots >= JOURNAL:
            self.window_BCW, self.state_BHPN = self._run(self.steps[:1], self.steps[0].slots, taps)
            del self.steps[0]

    def take_back(self, slots: int, taps: int) -> tuple[Tensor | None, Tensor | None]:
        """Window and state without the last `slots` slots; the kept ones are run again."""
        return self._run(self.steps, self.slots - slots, taps)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self.window_BCW = None if self.window_BCW is None else change(self.window_BCW)
        self.state_BHPN = None if self.state_BHPN is None else change(self.state_BHPN)
        self.steps = [step.map_batch(change) for step in self.steps]

    def _run(self, steps: list[Step], kept: int, taps: int) -> tuple[Any, Any]:
        """Window (of `taps` inputs) and state behind the first `kept` slots of `steps`, pass by pass as it was."""
        window_BCW, state_BHPN = self.window_BCW, self.state_BHPN
        for step in steps:
            now = min(kept, step.slots)
            if now == 0:
                break
            lengths_B = step.lengths_B(now)
            window_BCW = next_window(step.xBC_BTC, window_BCW, taps, lengths_B)
            real_BT = torch.arange(now, device=lengths_B.device) < lengths_B[:, None]
            dt_BTH = torch.where(real_BT[..., None], step.dt_BTH[:, :now], 0)
            x_BTHP, B_BTGN = step.x_BTHP[:, :now], step.B_BTGN[:, :now]
            D_H, C_BTGN = torch.zeros_like(step.A_H), torch.zeros_like(B_BTGN)
            scan = ssd(x_BTHP, dt_BTH, step.A_H, B_BTGN, C_BTGN, D_H, CHUNK, state_BHPN)
            state_BHPN = self.at_rest(scan.final_state)
            kept -= now
        return window_BCW, state_BHPN
