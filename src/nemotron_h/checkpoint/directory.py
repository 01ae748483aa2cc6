"""Checkpoint directories: `model.safetensors`, or `model.safetensors.index.json` and the shards it lists.

Reading trusts nothing: the index and the headers of the shards must agree in every tensor and in the total size, and no
file outside the directory is opened. Where both forms are present the single file counts, as in transformers.
Writing replaces an older checkpoint so that at every moment, power cut included, the old or the new one loads.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_h.checkpoint.safetensors import (
    TensorInfo,
    TensorSpec,
    aligned,
    read_header,
    write_temporary_file,
)
from nemotron_h.errors import CheckpointError, InputError
from nemotron_h.files import publish, sync_directory, write_temporary
from nemotron_h.strict_json import load_json, shown

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".distcp")
_STORE_MARK = ".huggingface-shared-blobs"
_PROBLEMS_SHOWN = 5
# What a save leaves behind: shards, shards set aside for a moment, temporaries of a process that was killed.
_NAME = r"model(-\d{5,}-of-\d{5,})?(\.old-[0-9a-f]{8})?\.safetensors(\.index\.json)?"
_OURS = re.compile(rf"{_NAME}|\.{_NAME}\.tmp-[0-9a-f]{{8}}")
# What link(2) says where there are no hard links, or no more of them.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


@dataclass(frozen=True)
class Directory:
    """The tensors of a checkpoint by name, and its weight files; every header checked, no data read."""

    tensors: dict[str, TensorInfo]
    files: list[Path]


class _Problems:
    """Counts problems and keeps the first few for one message."""

    def __init__(self, where: Path) -> None:
        self._where, self._first, self._count = where, [], 0

    def add(self, problem: str) -> None:
        self._count += 1
        if len(self._first) < _PROBLEMS_SHOWN:
            self._first.append(problem)

    def raise_if_any(self) -> None:
        if self._count == 1:
            raise CheckpointError(f"{self._where}: {self._first[0]}")
        if self._count:
            more = self._count - len(self._first)
            rest = f"; and {more} more" if more else ""
            raise CheckpointError(f"{self._where}: {self._count} problems: {'; '.join(self._first)}{rest}")


# --- reading --------------------------------------------------------------------------------------------------------


def locate(path: Path) -> list[Path]:
    """The weight files of a checkpoint directory: they exist and lie inside; their contents are not looked at.

    Raises CheckpointError: no such directory, no safetensors (with what to do about pickle files), an index that is
    malformed, lists no shard, a missing one, or one that is or links to something outside the directory.
    """
    if _has_single(path):
        return [path / SINGLE]
    weight_map, _ = _read_index(path)
    return _shards(path, weight_map)


def open_directory(path: Path) -> Directory:
    """Read and check the headers of all weight files of a checkpoint directory.

    Raises CheckpointError for everything `locate` finds, for a malformed file, and where index and shards disagree: a
    tensor absent, not listed, in another shard or in two, or a wrong total_size. The message lists the first five
    problems and counts the rest.
    """
    if _has_single(path):
        return Directory(read_header(path / SINGLE).tensors, [path / SINGLE])
    weight_map, total_size = _read_index(path)
    files = _shards(path, weight_map)
    problems = _Problems(path)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).tensors.items():
            if name in tensors:
                problems.add(f"tensor {shown(name)} is in two shards, {tensors[name].file.name} and {file.name}")
            elif name not in weight_map:
                problems.add(f"tensor {shown(name)} of {file.name} is not listed in {INDEX}")
            elif weight_map[name] != file.name:
                problems.add(f"tensor {shown(name)} is in {file.name}, the index says {shown(weight_map[name])}")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            problems.add(f"tensor {shown(name)} is not in {shard}, where the index puts it")
    problems.raise_if_any()
    actual = sum(info.end - info.start for info in tensors.values())
    if total_size is not None and total_size != actual:
        raise CheckpointError(f"{path / INDEX}: total_size is {total_size}, the tensors have {actual} bytes")
    return Directory(tensors, files)


def _has_single(path: Path) -> bool:
    """Whether the directory holds `model.safetensors`; raises if it holds neither that nor an index."""
    try:
        names = set(os.listdir(path))
    except NotADirectoryError as problem:
        raise CheckpointError(f"{path}: is a file; give the directory of a checkpoint") from problem
    except FileNotFoundError as problem:
        raise CheckpointError(f"{path}: no such directory") from problem
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{str(path)!r}: cannot be read: {problem}") from problem
    if SINGLE not in names and INDEX not in names:
        raise CheckpointError(f"{path}: {_why_nothing(names)}")
    name = SINGLE if SINGLE in names else INDEX
    if refusal := _refusal(path, name):
        raise CheckpointError(f"{path}: {name} {refusal}")
    return name == SINGLE


def _why_nothing(names: set[str]) -> str:
    missing = f"has neither {SINGLE} nor {INDEX}"
    if not names:
        return "is empty; a checkpoint has model.safetensors and config.json"
    if any(name.endswith(".safetensors") for name in names):
        return f"{missing}, although there are other safetensors files: an unfinished download or save, or an adapter"
    pickles = sorted(name for name in names if name.endswith(_PICKLE_SUFFIXES))
    if pickles:
        return (
            f"{missing}, only {shown(pickles[0])}: pickle can run code, so it is never loaded; convert it on a "
            "machine you trust: transformers' AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    if any(name.endswith(".gguf") for name in names):
        return f"{missing}; the GGUF file in it is loaded with gguf_file=..."
    return missing


def _read_index(path: Path) -> tuple[dict[str, str], int | float | None]:
    """The index's weight_map and total_size (None when absent), types checked."""
    where = path / INDEX
    index = load_json(where, "index", max_depth=8)
    if not isinstance(index, dict):
        raise CheckpointError(f"{where}: must hold an object, holds {shown(index)}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: weight_map must map tensors to shards, is {shown(weight_map)}")
    problems = _Problems(where)
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            problems.add(f"weight_map: {shown(name)} must be the name of a shard, is {shown(shard)}")
    problems.raise_if_any()
    metadata = index.get("metadata", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{where}: metadata must be an object, is {shown(metadata)}")
    total_size = metadata.get("total_size")
    # Some savers write a float with an integral value, which compares equal.
    if total_size is not None and not isinstance(total_size, int | float):
        raise CheckpointError(f"{where}: total_size must be a number of bytes, is {shown(total_size)}")
    return weight_map, total_size


def check_index(path: Path) -> None:
    """Check the index of a directory whose shards are still to be fetched: CheckpointError for any that is malformed
    or names something other than plain files."""
    weight_map, _ = _read_index(path)
    problems = _Problems(path)
    for name in sorted(set(weight_map.values())):
        if not _is_plain(name):
            problems.add(f"shard {shown(name)} of {INDEX} must be a plain file name that ends in .safetensors")
    problems.raise_if_any()


def _is_plain(name: str) -> bool:
    return name.isprintable() and name.endswith(".safetensors") and "/" not in name and "\\" not in name


def _shards(path: Path, weight_map: dict[str, str]) -> list[Path]:
    """The distinct shards, sorted by name; raises for those that are missing or not plain files inside."""
    problems = _Problems(path)
    names = sorted(set(weight_map.values()))
    for name in names:
        if not _is_plain(name):
            problems.add(f"shard {shown(name)} of {INDEX} must be a plain file name that ends in .safetensors")
        elif refusal := _refusal(path, name):
            problems.add(f"shard {shown(name)} {refusal}")
    problems.raise_if_any()
    return [path / name for name in names]


def _refusal(path: Path, name: str) -> str | None:
    """Why the file may not be opened, None if it may: it must exist, and links must end inside the checkpoint."""
    root = Path(os.path.realpath(path))
    try:
        real = Path(os.path.realpath(path / name, strict=True))
    except FileNotFoundError:
        return "is missing"
    except OSError as problem:
        return f"cannot be read: {problem.strerror}"
    if any(real.is_relative_to(allowed) for allowed in _allowed_roots(root)):
        return None
    return f"is a symbolic link to {shown(str(real))}, outside the directory: copy the file instead"


def _allowed_roots(root: Path) -> Iterator[Path]:
    """The directory itself, and in the hub's cache, models--org--name/snapshots/revision, the model's blobs.

    Those may be links themselves, into a store that the client marks as its own and that all models share.
    """
    yield root
    for folder in (root, *root.parents):
        snapshots = folder.parent
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            yield snapshots.parent / "blobs"
            store = snapshots.parent.parent / "blobs"
            if (store / _STORE_MARK).is_file():
                yield store


# --- writing --------------------------------------------------------------------------------------------------------


def write_directory(
    directory: Path,
    specs: Sequence[TensorSpec],
    produce: Callable[[str], "torch.Tensor"],
    *,
    max_shard_size: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Save tensors as transformers does: one file, or shards of at most `max_shard_size` bytes and an index.

    `produce(name)` makes each tensor when its turn comes; one is held at a time. The order is that of `specs`, except
    within a shard where it would misalign data (`aligned`). A tensor larger than the limit gets a shard of its own.
    `metadata` goes into every file; the default {"format": "pt"} is what transformers asks for. Other files of the
    directory stay. Returns the weight files.

    Everything is written and synced under temporary names first. An older checkpoint loads until one rename (or, from
    a single file to shards, one removal) makes the new one load; only then are its files removed.
    Raises CheckpointError for tensors that differ from their specs and for an old index that cannot be read, OSError
    when the disk fails; the old checkpoint stays.
    """
    if max_shard_size <= 0:
        raise InputError(f"max_shard_size must be a positive number of bytes, is {max_shard_size}")
    if not specs:
        raise CheckpointError(f"{directory}: there are no tensors to save")
    repeated = len(specs) - len({spec.name for spec in specs})
    if repeated:
        raise CheckpointError(f"{directory}: {repeated} of the names to save are repeated")
    shards = _split(specs, max_shard_size)
    names = _shard_names(len(shards))
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as cleanup:
        temporaries: dict[str, Path] = {}
        for name, shard in zip(names, shards, strict=True):
            ordered = aligned(shard)
            tensors = ((spec.name, produce(spec.name)) for spec in ordered)
            file = write_temporary_file(directory / name, ordered, tensors, metadata or {"format": "pt"})
            cleanup.callback(file.unlink, missing_ok=True)
            temporaries[name] = file
        if len(shards) == 1:
            publish(temporaries[SINGLE], directory / SINGLE)
        else:
            weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
            content = _index_bytes(weight_map, sum(spec.nbytes for spec in specs))
            index = write_temporary(directory / INDEX, [memoryview(content)])
            cleanup.callback(index.unlink, missing_ok=True)
            _publish_shards(directory, temporaries, index)
    _remove_stale(directory, names)
    return [directory / name for name in names]


def _split(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not shards or spec.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _index_bytes(weight_map: Mapping[str, str], total_size: int | float | None) -> bytes:
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _publish_shards(directory: Path, temporaries: Mapping[str, Path], index: Path) -> None:
    _set_old_shards_aside(directory, temporaries.keys())
    for name, file in temporaries.items():
        publish(file, directory / name)
    sync_directory(directory)
    publish(index, directory / INDEX)


def _set_old_shards_aside(directory: Path, taken: Set[str]) -> None:
    """Give old shards whose names are `taken` a second name and point the old index there.

    After that the names can be reused one by one while the old checkpoint still loads, until the new index comes.
    """
    if not (directory / INDEX).exists():
        return
    try:
        weight_map, total_size = _read_index(directory)
    except CheckpointError as problem:
        if isinstance(problem.__cause__, OSError):
            raise  # it may be whole, and reading it may work next time
        return  # damaged: there is nothing to keep
    token = os.urandom(4).hex()
    second = {
        name: f"{name.removesuffix('.safetensors')}.old-{token}.safetensors"
        for name in taken & set(weight_map.values())
    }
    if not second:
        return
    with ExitStack() as undo:
        for name, other in second.items():
            try:
                os.link(directory / name, directory / other)
            except FileNotFoundError:
                return  # the old checkpoint lacks this shard
            except OSError as problem:
                if problem.errno not in _NO_LINKS:
                    raise
                raise CheckpointError(
                    f"{directory}: holds shards of the same names, and this file system has no hard links to replace "
                    "them safely; save to an empty directory"
                ) from problem
            undo.callback((directory / other).unlink, missing_ok=True)
        moved = {tensor: second.get(shard, shard) for tensor, shard in weight_map.items()}
        index = write_temporary(directory / INDEX, [memoryview(_index_bytes(moved, total_size))])
        undo.callback(index.unlink, missing_ok=True)
        sync_directory(directory)
        publish(index, directory / INDEX)
        undo.pop_all()
    sync_directory(directory)


def _remove_stale(directory: Path, names: Sequence[str]) -> None:
    """Remove the files of older saves, once what replaces them is durable.

    A single file goes first: its absence is what lets the shards count.
    """
    keep = {*names, INDEX} if len(names) > 1 else set(names)
    stale = {name for name in os.listdir(directory) if _OURS.fullmatch(name)} - keep
    sync_directory(directory)
    if SINGLE in stale:
        (directory / SINGLE).unlink()
        sync_directory(directory)
    for name in stale - {SINGLE}:
        (directory / name).unlink()
