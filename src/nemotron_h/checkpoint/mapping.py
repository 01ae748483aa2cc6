"""A checkpoint's file as memory: mapped once, shared with every other process that maps it, in pages of 2 MiB.

Weights are read from front to back for every token; with pages of 4 KiB a third of that time goes into looking them up.
Linux keeps a file in large pages when it is read through a mapping that asks for them, but not where it was written a
moment ago: then its small pages are dropped and the file is read again.
"""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_h.errors import CheckpointError
from nemotron_h.files import open_regular

if TYPE_CHECKING:
    import torch

    from nemotron_h.checkpoint.safetensors import TensorInfo

ENOUGH = 0.95  # share of the pages that should be huge

_HUGE = 2 << 20
_POPULATE_READ = 22  # madvise: bring the pages in, now (Linux 5.14)
_PIECE = 256 << 20  # between two pieces Ctrl-C is heard
_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")


class MappedFile:
    """A file in memory. Tensors hold the mapping; writing to one changes this process's copy alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._memory = self._map()
        if len(self._memory) >= _HUGE and self.huge_share() < ENOUGH and hasattr(os, "posix_fadvise"):
            self._drop_small_pages()
            self._memory = self._map()

    def _map(self) -> mmap.mmap:
        descriptor = open_regular(self._path)
        try:
            memory = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as problem:
            raise CheckpointError(f"{self._path}: cannot be mapped: {problem}") from problem
        finally:
            os.close(descriptor)
        _advise(memory, getattr(mmap, "MADV_HUGEPAGE", None), 0, len(memory))
        for start in range(0, len(memory), _PIECE):
            _advise(memory, _POPULATE_READ, start, min(_PIECE, len(memory) - start))
        return memory

    def _drop_small_pages(self) -> None:
        """Let the page cache forget the file; pages that others have mapped stay."""
        self._memory.close()
        descriptor = open_regular(self._path)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def huge_share(self) -> float:
        """Share of the file that this process sees in huge pages; 0 where the system does not tell."""
        return huge_bytes(address(self._memory), len(self._memory)) / max(1, len(self._memory))

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """A tensor of the file, as its header has it; CheckpointError if the file is shorter than that."""
        import torch

        from nemotron_h.checkpoint.safetensors import torch_dtype

        if len(self._memory) < info.end:
            raise CheckpointError(f"{info.file}: tensor {info.name} ends at byte {info.end}, the file before it")
        flat = torch.frombuffer(self._memory, dtype=torch.uint8, offset=info.start, count=info.nbytes)
        return flat.view(torch_dtype(info.dtype)).view(info.shape)


def _advise(memory: mmap.mmap, advice: int | None, start: int, length: int) -> None:
    """madvise, which is advice: a system that does not know it reads the file as it would."""
    if advice is None:
        return
    try:
        memory.madvise(advice, start, length)
    except OSError:
        return


def address(memory: mmap.mmap) -> int:
    import torch

    return torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()


def huge_bytes(start: int, length: int) -> int:
    """Bytes of [start, start + length) that lie in huge pages, as /proc says it of the mappings that begin there; 0
    elsewhere than on Linux."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return 0
    found, inside = 0, False
    for line in lines:
        header = _HEADER.match(line)
        if header is not None:
            low, high = int(header[1], 16), int(header[2], 16)
            inside = low < start + length and start < high
        elif inside and line.startswith(("AnonHugePages:", "FilePmdMapped:", "ShmemPmdMapped:")):
            found += int(line.split()[1]) * 1024
    return min(found, length)
