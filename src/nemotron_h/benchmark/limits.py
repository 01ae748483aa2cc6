"""The machine: its cores, its free memory, how fast its memory can be read, and how fast it can multiply."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

SET_BYTES = 1 << 30  # well over every last-level cache's share of a decode step
_PASSES = 4


def allowed_cores() -> int:
    """Physical cores that affinity and cgroup allow: the number of threads where none is given."""
    from nemotron_h.ops import threads

    return threads.allowed_cores()


def cpu_model() -> str:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def total_memory() -> int:
    """Bytes of memory in the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Bytes that programs may take without swapping: Linux's estimate, elsewhere all there is."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else total_memory()


def free_disk(directory: Path) -> int:
    """Bytes that may be written there."""
    return shutil.disk_usage(directory).free


class ReadBandwidth:
    """Bytes per second at which `threads` threads together read memory.

    The set is anonymous memory for which 2 MiB pages are asked: on 4 KiB pages a third of the bandwidth is lost to
    address translation, for the meter as for a model. It is kept between measurements; `close` gives it back.
    """

    def __init__(self, threads: int, size: int = SET_BYTES) -> None:
        self.threads, self.size = threads, size
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no THP
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = (ctypes.c_char * size).from_buffer(self._memory)
        ctypes.memset(self._bytes, 0, size)  # or every page would be the one page of zeros

    def measure(self) -> float:
        """One measurement: every thread reads its part a few times."""
        start = ctypes.addressof(self._bytes)
        part = self.size // self.threads
        ready = threading.Barrier(self.threads)
        times: list[float] = []  # the readers' own: this thread may get no core until they are done
        readers = [
            threading.Thread(target=_read, args=(start + i * part, part, ready, times), daemon=True)
            for i in range(self.threads)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return self.threads * part * _PASSES / (max(times) - min(times))

    def close(self) -> None:
        """Give the memory back."""
        del self._bytes
        self._memory.close()


PEAKS = ("float32", "bf16", "int8")  # in the order of csrc/kernels.h: PeakKind
_PEAK_SECONDS, _PEAK_RUNS = 0.002, 4


def peaks(threads: int) -> dict[str, float]:
    """Operations per second of `threads` threads that multiply and add in registers, at the CPU's highest level: the
    bound of matrix products by arithmetic. A multiply-add counts as two. Empty without the C++ kernels.

    bfloat16 is multiplied by its own instruction, or widened to float32, whichever is faster.
    """
    from nemotron_h.ops import _native

    levels = _native.levels()
    if not levels:
        return {}
    extension, kernels = _native.extension(), _native.kernels(levels[-1])
    sinks = (ctypes.c_float * extension.peak_sinks)()
    before = extension.threads()
    extension.set_threads(min(threads, allowed_cores()))
    try:
        found = {name: _peak(kernels, sinks, kind) for kind, name in enumerate(PEAKS)}
    finally:
        extension.set_threads(before)
    return found | {"bf16": max(found["bf16"], found["float32"])}


def _peak(kernels: Any, sinks: Any, kind: int) -> float:
    """The best of a few short runs: a thread that loses its core for a while says nothing about the arithmetic."""
    rounds, seconds, best = 64, 0.0, 0.0
    while seconds < _PEAK_SECONDS:  # the first calls are too short to count, and warm up
        rounds *= 2
        seconds = _timed_peak(kernels, sinks, kind, rounds)[1]
    for _ in range(_PEAK_RUNS):
        operations, seconds = _timed_peak(kernels, sinks, kind, rounds)
        best = max(best, operations / seconds)
    return best


def _timed_peak(kernels: Any, sinks: Any, kind: int, rounds: int) -> tuple[float, float]:
    start = time.perf_counter()
    operations = kernels.peak(kind, rounds, ctypes.addressof(sinks))
    return operations, time.perf_counter() - start


def _read(start: int, size: int, ready: threading.Barrier, times: list[float]) -> None:
    ready.wait()
    times.append(time.perf_counter())
    for _ in range(_PASSES):
        read_memory(start, size)
    times.append(time.perf_counter())


def read_memory(start: int, size: int) -> None:
    """Read `size` bytes of zeros at an address, without Python's lock.

    The C library's memchr looks for a byte that is not there: it does nothing but vector loads and compares.
    """
    _memchr(start, 1, size)


_memchr = ctypes.CDLL(None).memchr
_memchr.argtypes, _memchr.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
