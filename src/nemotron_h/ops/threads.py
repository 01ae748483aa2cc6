"""How many threads the C++ kernels use: torch's number, but never more than the cores that this process may use.

`torch.set_num_threads`, OMP_NUM_THREADS and `LLM(threads=...)` therefore steer both. More threads than cores would only
take turns: a region of a few microseconds ends when its last thread has had its turn.

A forked child starts kernel threads of its own. PyTorch's OpenMP does not: once the parent has run it on several
threads, the child hangs in the first large op, unless it calls `torch.set_num_threads(1)` before (or is spawned).
"""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path

import torch

from nemotron_h.ops import _native

CGROUP = Path("/sys/fs/cgroup")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"

_set: int | None = None


@cache
def allowed_cores() -> int:
    """Physical cores that affinity and cgroup allow; read once."""
    cores = _physical_cores()
    quota = cgroup_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _physical_cores() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    try:
        return len({Path(_TOPOLOGY.format(cpu)).read_text() for cpu in allowed})
    except OSError:  # no topology there: take every CPU for a core
        return len(allowed)


def cgroup_quota() -> float | None:
    """CPUs that the container may use, from cgroup v2 or v1; None without a limit."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            words = " ".join((CGROUP / name).read_text() for name in names).split()
            quota, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):  # another version, or "max"
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None


def sync() -> None:
    """Let the kernels use as many threads as torch does now, within the cores. Cheap: called before every kernel."""
    global _set
    wanted = torch.get_num_threads()
    if wanted != _set:
        _native.extension().set_threads(min(wanted, allowed_cores()))
        _set = wanted
