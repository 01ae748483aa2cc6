"""The environment variables that steer the ops; no other module reads them.

    NEMOTRON_H_IMPL   reference: every op runs its PyTorch reference. native: every op that has a C++ kernel must have
                      it available, or its first call raises; inputs that a kernel does not cover (autograd, `meta`,
                      another device) still take the reference. Unset or empty: the kernel where it can run.
    NEMOTRON_H_ISA    generic, avx2, avx512 or amx: the level of the C++ kernels. Unset: the highest this CPU has.
    NEMOTRON_H_CHECK  1: run the reference beside every kernel and raise where the kernel leaves its error budget.
    NEMOTRON_H_TRACE  1: log every op's implementation, shapes and reason to stderr.

They are read once, at the first op; `refresh()` reads them again.
"""

import os
from typing import NamedTuple

from nemotron_h.errors import KernelError

IMPLEMENTATIONS = ("reference", "native")
LEVELS = ("generic", "avx2", "avx512", "amx")


class Settings(NamedTuple):
    """What the environment asks for; None where it leaves the choice to us. `free`: it asks for nothing but a level."""

    impl: str | None
    isa: str | None
    check: bool
    trace: bool
    free: bool = False


_current: Settings | None = None


def current() -> Settings:
    """The settings in force. Raises `KernelError` for an illegal value."""
    return _current if _current is not None else refresh()


def refresh() -> Settings:
    """Read the environment again. Raises `KernelError` for an illegal value."""
    global _current
    _current = None
    impl = _choice("NEMOTRON_H_IMPL", IMPLEMENTATIONS)
    isa = _choice("NEMOTRON_H_ISA", LEVELS)
    check = _choice("NEMOTRON_H_CHECK", ("0", "1")) == "1"
    trace = _choice("NEMOTRON_H_TRACE", ("0", "1")) == "1"
    _current = Settings(impl, isa, check, trace, impl is None and not check and not trace)
    return _current


def _choice(name: str, legal: tuple[str, ...]) -> str | None:
    value = os.environ.get(name, "")
    if value in ("", *legal):
        return value or None
    raise KernelError(f"{name}={value!r} is not known: use {', '.join(legal)}, or unset it.")
