"""The C++ extension `nemotron_h._native`, loaded at the first use, and the kernel level in force."""

import importlib
import platform
from functools import cache
from types import ModuleType
from typing import Protocol

from nemotron_h.errors import KernelError
from nemotron_h.ops import settings

INTERFACE_VERSION = 6  # csrc/kernels.h: interface_version
INSTALL_HINT = "install a C++ compiler and Python's headers (apt-get install g++ python3-dev), then nemotron-h again"


class Kernels(Protocol):
    """One level's kernels: addresses from `data_ptr()`, sizes and strides in elements. Nothing below validates them."""

    @property
    def level(self) -> str: ...

    def rms_norm(
        self,
        x: int,
        weight: int,
        out: int,
        rows: int,
        cols: int,
        stride: int,
        eps: float,
        x_dtype: int,
        w_dtype: int,
        /,
    ) -> None: ...

    def add(self, x: int, y: int, out: int, count: int, x_dtype: int, y_dtype: int, /) -> None: ...
    def mamba_step(self, *args: float) -> None: ...
    def mamba_block(self, *args: int) -> None: ...
    def attention_inputs(self, *args: int) -> None: ...
    def attention_output(self, *args: int) -> None: ...
    def mlp_block(self, block: int, x: int, dtype: int, rows: int, out: int, scratch: int, /) -> None: ...
    def moe_block(self, block: int, x: int, dtype: int, rows: int, out: int, scratch: int, /) -> None: ...
    def linear(self, *args: int) -> None: ...
    def experts(self, *args: int) -> bool: ...
    def pack(self, w: int, rows: int, cols: int, format: int, panels: int, /) -> bool: ...

    def router(
        self,
        x: int,
        x_dtype: int,
        x_stride: int,
        tokens: int,
        weight: int,
        weight_dtype: int,
        experts: int,
        cols: int,
        bias: int,
        top_k: int,
        n_group: int,
        topk_group: int,
        norm: bool,
        scaling: float,
        out_experts: int,
        out_weights: int,
        out_logits: int,
        /,
    ) -> None: ...

    def sample(
        self,
        logits: int,
        vocabulary: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        u: float,
        scratch: int,
        /,
    ) -> int: ...

    def attention(
        self,
        shape: int,
        q: int,
        q_dtype: int,
        k: int,
        v: int,
        kv_dtype: int,
        k_scale: int,
        v_scale: int,
        visible: int,
        scratch: int,
        out: int,
        /,
    ) -> None: ...

    def attention_prefill(self, *arguments: int) -> None: ...

    def with_room(self, *arguments: int) -> None: ...

    # In the order of csrc/kernels.h.
    def ssd_step(self, *arguments: int) -> None: ...

    def ssd_scan(self, *arguments: int) -> None: ...

    def causal_conv1d(self, *arguments: int) -> None: ...

    def gated_rms_norm(self, *arguments: float) -> None: ...

    def decay_rate(self, A_log: int, A: int, heads: int, dtype: int, /) -> None: ...

    def time_step(self, *arguments: float) -> None: ...

    def peak(self, kind: int, rounds: int, sinks: int, /) -> float: ...


def load() -> ModuleType | None:
    """The extension module, or None; `why_missing` then says why."""
    return _load()[0]


def why_missing() -> str:
    """One line that says why there is no extension and what to install; empty when there is one."""
    return _load()[1]


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("nemotron_h._native")
    except ModuleNotFoundError as error:
        if error.name != "nemotron_h._native":
            raise
        return None, f"nemotron-h was installed without its C++ kernels: {INSTALL_HINT}"
    except ImportError as error:
        return None, f"the C++ kernels do not load ({error}): install nemotron-h again"
    if module.interface_version != INTERFACE_VERSION:
        return None, "the C++ kernels were built from other sources than these Python files: install nemotron-h again"
    return module, ""


@cache
def levels() -> tuple[str, ...]:
    """The kernel levels that this CPU can run, lowest first; empty without the extension."""
    module = load()
    return () if module is None else tuple(module.levels())


def level() -> str:
    """The level in force: NEMOTRON_H_ISA, or the highest.

    Raises `KernelError` without the extension, for an illegal value, and for a level that this CPU lacks.
    """
    available = levels()
    if not available:
        raise KernelError(why_missing())
    asked = settings.current().isa
    if asked is None:
        return available[-1]
    if asked not in available:
        raise KernelError(f"NEMOTRON_H_ISA={asked!r}: this CPU has {', '.join(available)}; use one or unset it.")
    return asked


def emulates() -> bool:
    """Whether the level in force does its fused multiply-adds in software. PyTorch is then faster at long products; the
    kernels are still exact. Raises as `level`."""
    return level() == "generic" and platform.machine() in ("x86_64", "AMD64")


EMULATED = "at the generic level x86 has no fused multiply-add, and PyTorch is faster"


def kernels(of_level: str | None = None) -> Kernels:
    """The kernels of one level, by default of the level in force. Raises as `level`."""
    return _kernels(of_level or level())


@cache
def _kernels(of_level: str) -> Kernels:
    module = load()
    if module is None:
        raise KernelError(why_missing())
    if of_level not in levels():
        raise KernelError(f"No kernel level {of_level!r}: this CPU has {', '.join(levels())}.")
    return module.Kernels(of_level)


def extension() -> ModuleType:
    """The extension module. Raises `KernelError` where there is none."""
    module = load()
    if module is None:
        raise KernelError(why_missing())
    return module


def cpu_features() -> dict[str, bool]:
    """Instruction sets that CPU and operating system allow, and two facts about AMX; empty without the extension.

    `amx_permission`: the system has granted this process their registers. `amx_works`: the build has kernels for them,
    and their products are what the other levels compute, so `levels()` has "amx".
    """
    module = load()
    return {} if module is None else module.cpu_features()


def tile_kernels() -> str:
    """Whether the build multiplies on matrix units: by "instructions", "emulation" (a build for tests), or "none"."""
    module = load()
    return "none" if module is None else module.tile_kernels
