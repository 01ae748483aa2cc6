"""The sizes of a Mamba-2 mixer that its ops need."""

from __future__ import annotations

from typing import NamedTuple


class MambaSizes(NamedTuple):
    """Heads, their size, groups, state size; the limits of the time step, and the eps of the gated norm."""

    heads: int
    head_dim: int
    groups: int
    state: int
    limit: tuple[float, float]
    eps: float

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.groups * self.state
