"""Whether mapped weights lie in pages of 2 MiB on this machine and, where they do not, why and what to do.

A packed checkpoint is mapped where it lies, and read from front to back for every token; with pages of 4 KiB a third of
that time goes into looking them up.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TRIAL_BYTES = 64 << 20
_HUGE = 2 << 20
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_COPIES = "loading copies the weights into pages of 2 MiB by itself unless mmap=True: as fast, but not shared"


class Pages(NamedTuple):
    """What was mapped, the shares of its pages and of other memory that are huge, and what to say of them.

    Shares are None where nothing was mapped; `why` and `advice` are None where nothing is wrong.
    """

    path: str
    file_system: str | None
    mapped_share: float | None
    anonymous_share: float | None
    why: str | None = None
    advice: str | None = None


def of_machine() -> Pages:
    """A trial with a file of 64 MiB that is removed again, in the hub's cache or, where that cannot be, in /tmp."""
    directory = _directory()
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".nemotron-h-pages-") as file:
            for _ in range(TRIAL_BYTES >> 20):
                file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
            return _judged(directory, [Path(file.name)])
    except OSError as error:
        why = f"no file of {TRIAL_BYTES >> 20} MiB could be written there ({error.strerror})"
        return Pages(str(directory), None, None, None, why, "make room, or give --model DIR")


def of_model(directory: Path) -> Pages:
    """The files of a packed checkpoint, as loading maps them. Raises CheckpointError for what is no checkpoint."""
    from nemotron_h.checkpoint.directory import open_directory

    packed = {info.file for info in open_directory(directory).tensors.values() if info.dtype == "U8"}
    if not packed:
        return Pages(str(directory), None, None, None, "its weights are not packed: they are read, never mapped")
    return _judged(directory, sorted(packed))


def _directory() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    usable = cache.is_dir() and os.access(cache, os.W_OK) and shutil.disk_usage(cache).free > 2 * TRIAL_BYTES
    return cache if usable else Path(tempfile.gettempdir())


def _judged(directory: Path, files: list[Path]) -> Pages:
    from nemotron_h.checkpoint.mapping import ENOUGH, MappedFile

    sizes = [file.stat().st_size for file in files]
    huge = sum(size * MappedFile(file).huge_share() for file, size in zip(files, sizes, strict=True))
    system, share, anonymous = file_system(files[0]), huge / max(1, sum(sizes)), anonymous_share()
    told = (None, None)
    if share < ENOUGH:
        ends = sum(size % _HUGE for size in sizes) / max(1, sum(sizes))
        told = ("it is too small for pages of 2 MiB", _COPIES) if ends > 1 - ENOUGH else _why(anonymous, system, ENOUGH)
    return Pages(str(directory), system, share, anonymous, *told)


def _why(anonymous: float, system: str | None, enough: float) -> tuple[str, str]:
    """Why a mapped file has small pages, and what to do."""
    if not _THP.is_dir():
        return "this system has no transparent huge pages, or does not tell", "on Linux, CONFIG_TRANSPARENT_HUGEPAGE=y"
    if _chosen("enabled") == "never":
        return f"{_THP}/enabled is never", f"echo madvise | sudo tee {_THP}/enabled"
    if _switched_off():
        return "they are switched off for this process (PR_SET_THP_DISABLE)", "start it from another program"
    if anonymous < enough:
        return "memory is in small pieces", "echo 1 | sudo tee /proc/sys/vm/compact_memory, or restart the machine"
    if system == "tmpfs" and _chosen("shmem_enabled") in ("never", "deny"):
        return f"{_THP}/shmem_enabled is {_chosen('shmem_enabled')}", (
            f"echo advise | sudo tee {_THP}/shmem_enabled; until then {_COPIES}"
        )
    return f"{system or 'the file system'} keeps files in small pages, or another process keeps this one so", (
        f"put it on xfs, or ext4 with Linux 6.16 or later; until then {_COPIES}"
    )


def anonymous_share(size: int = TRIAL_BYTES) -> float:
    """Share of fresh memory that comes in huge pages where they are asked for."""
    from nemotron_h.checkpoint.mapping import huge_bytes

    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            return 0.0
    data = (ctypes.c_char * size).from_buffer(memory)
    ctypes.memset(data, 1, size)
    share = huge_bytes(ctypes.addressof(data), size) / size
    del data
    memory.close()
    return share


def file_system(path: Path) -> str | None:
    """Its type, ext4 for example; None where the system does not tell."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    return next((kind for found, kind in _mounts() if found == number), None)


def _mounts() -> Iterator[tuple[str, str]]:
    """Device number and file system of every mount (proc_pid_mountinfo(5))."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        before, _, after = line.partition(" - ")
        yield before.split()[2], after.split()[0]


def _chosen(name: str) -> str | None:
    """The word in brackets: `always [madvise] never`."""
    try:
        found = re.search(r"\[(\w+)\]", (_THP / name).read_text())
    except OSError:
        return None
    return found[1] if found else None


def _switched_off() -> bool:
    try:
        return re.search(r"^THP_enabled:\s*0$", Path("/proc/self/status").read_text(), re.MULTILINE) is not None
    except OSError:
        return False
