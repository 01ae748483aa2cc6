"""Opening and replacing files safely (POSIX).

Reading copies: a memory map would turn a file that is truncated meanwhile into SIGBUS, a short `pread` is an error.
Writing goes to a temporary file beside the target, which is synced before anything is renamed.
"""

import os
import stat
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from nemotron_h.errors import CheckpointError, NemotronHError

# One system call moves at most this much: macOS refuses 2 GiB, Linux cuts there, and Ctrl-C waits for the call.
_CHUNK_BYTES = 64 << 20


def open_regular(path: Path, error: type[NemotronHError] = CheckpointError) -> int:
    """Open a regular file for reading and return its descriptor; the caller closes it.

    Symbolic links are followed (a snapshot in the hub's cache is made of them), a FIFO, device, socket or directory is
    refused without blocking. Raises `error` when there is no such file or it cannot be read.
    """
    try:
        real = os.path.realpath(path, strict=True)
        # Opening some devices has effects, so look first; the second look is for a file exchanged in between.
        if stat.S_ISREG(os.stat(real).st_mode):
            fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
    except OSError as problem:
        raise error(f"{path}: cannot be opened: {problem.strerror}") from problem
    except ValueError as problem:
        raise error(f"{str(path)!r}: not a file name: {problem}") from problem
    raise error(f"{path}: is not a regular file; directories, pipes and devices are never read as data")


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset` of the file; returns the bytes read, fewer only where the file ends."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done : done + _CHUNK_BYTES]], offset + done)
        if count == 0:
            break
        done += count
    return done


def read_bytes(fd: int, length: int, offset: int) -> bytes:
    """Up to `length` bytes from `offset`; fewer only where the file ends. `length` must be bounded by the caller."""
    buffer = bytearray(length)
    count = read_into(fd, memoryview(buffer), offset)
    return bytes(memoryview(buffer)[:count])


def _write_all(fd: int, piece: memoryview) -> None:
    done = 0
    while done < len(piece):
        done += os.write(fd, piece[done : done + _CHUNK_BYTES])


def write_temporary(path: Path, pieces: Iterable[memoryview]) -> Path:
    """Write `pieces` (views of bytes) to a new file beside `path`, sync it to disk and return its path.

    The name is `.<name>.tmp-<8 hex digits>`. Each piece is let go before the next one is asked for. On any failure, an
    interrupt included, the file is removed and the failure goes on (OSError for the disk's own).
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.urandom(4).hex()}")
    with ExitStack() as undo:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        undo.callback(temporary.unlink, missing_ok=True)
        try:
            for piece in pieces:
                _write_all(fd, piece)
                del piece  # a generator makes the next tensor while the loop variable would keep this one alive
            os.fsync(fd)
        finally:
            os.close(fd)
        undo.pop_all()
    return temporary


def publish(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its name; a failing rename leaves the old file and removes the new one."""
    with ExitStack() as undo:
        undo.callback(temporary.unlink, missing_ok=True)
        os.rename(temporary, path)
        undo.pop_all()


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` (renames, links, removals) survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
