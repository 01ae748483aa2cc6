"""A mapped file: its pages, what happens to small ones, and that it is what the file holds."""

import mmap
import os
from pathlib import Path

import pytest
import torch

from nemotron_h.checkpoint import mapping
from nemotron_h.checkpoint.mapping import ENOUGH, MappedFile, huge_bytes
from nemotron_h.checkpoint.safetensors import TensorInfo
from nemotron_h.errors import CheckpointError

SIZE = 64 << 20
CONTENT = os.urandom(1 << 20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that lies on the disk, and in no page of memory."""
    file = tmp_path / "file"
    with file.open("wb") as target:
        for _ in range(SIZE >> 20):
            target.write(CONTENT)
        target.flush()
        os.fsync(target.fileno())
    forget(file)
    return file


def forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read_in_small_pieces(path: Path) -> None:
    """Fill the page cache with pages of 4 KiB: with random access announced, the system reads nothing ahead."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    for start in range(0, SIZE, mmap.PAGESIZE):
        os.pread(descriptor, mmap.PAGESIZE, start)
    os.close(descriptor)


def share_as_it_is(path: Path) -> float:
    """Of huge pages, mapped without a look at them."""
    file = object.__new__(MappedFile)
    file._path = path
    file._memory = file._map()
    return file.huge_share()


def whole(path: Path) -> TensorInfo:
    return TensorInfo("whole", "U8", (SIZE,), path, 0, SIZE)


def test_small_pages_in_the_cache_are_dropped(path: Path) -> None:
    """Where the file system has huge pages, and a file read through a mapping shows that, this one gets them too."""
    fresh = share_as_it_is(path)
    forget(path)
    read_in_small_pieces(path)
    before = share_as_it_is(path)
    file = MappedFile(path)
    assert file.huge_share() >= before
    assert before < ENOUGH or fresh >= ENOUGH
    assert (file.huge_share() >= ENOUGH) == (fresh >= ENOUGH)
    content = torch.frombuffer(bytearray(CONTENT), dtype=torch.uint8)
    assert bool((file.tensor(whole(path)).view(-1, len(CONTENT)) == content).all())


@pytest.mark.parametrize(("share", "dropped"), [(ENOUGH, 0), (ENOUGH - 0.01, 1), (0.0, 1)])
def test_pages_are_dropped_once_and_only_where_they_are_small(
    path: Path, monkeypatch: pytest.MonkeyPatch, share: float, dropped: int
) -> None:
    """On a file system that has no huge pages the second mapping is as good as the first, and is kept."""
    advice: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, start, length, kind: advice.append(kind))
    monkeypatch.setattr(mapping, "huge_bytes", lambda start, length: int(share * length + 0.5))
    file = MappedFile(path)
    assert advice == [os.POSIX_FADV_DONTNEED] * dropped
    assert file.tensor(whole(path))[:: len(CONTENT)].eq(CONTENT[0]).all()


def test_a_file_smaller_than_a_huge_page_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: pytest.fail("dropped"))
    (tmp_path / "file").write_bytes(CONTENT)
    info = TensorInfo("t", "U8", (16,), tmp_path / "file", 64, 80)
    assert bytes(MappedFile(tmp_path / "file").tensor(info).tolist()) == CONTENT[64:80]


def test_a_tensor_beyond_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="tensor t ends at byte 16, the file before it"):
        MappedFile(tmp_path / "file").tensor(TensorInfo("t", "U8", (16,), tmp_path / "file", 0, 16))


def test_a_file_that_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be mapped"):
        MappedFile(tmp_path / "file")


def test_huge_bytes_counts_the_mappings_of_its_range_alone() -> None:
    """A mapping with huge pages, if the system gives any, beside the stack, which has none."""
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = mapping.address(memory)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    assert huge_bytes(start, SIZE) == 0  # nothing written yet
    memory[:] = bytes(SIZE)
    found = huge_bytes(start, SIZE)
    assert found % (2 << 20) == 0
    assert found <= SIZE
    assert huge_bytes(start, 4096) <= 4096
    assert huge_bytes(0, 4096) == 0
