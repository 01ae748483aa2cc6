"""Saving a directory: transformers' layout, one tensor at a time, and at every moment the old or the new one loads."""

import errno
import json
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from nemotron_h.checkpoint.directory import INDEX, SINGLE, open_directory, write_directory
from nemotron_h.checkpoint.safetensors import TensorReader, TensorSpec, read_header, spec_of
from nemotron_h.errors import CheckpointError, InputError

SYSTEM_CALLS = ("open", "write", "fsync", "close", "rename", "link", "unlink")
OTHER_FILES = {"config.json", "adapter_model.safetensors", "pytorch_model.bin", "model.safetensors.md"}


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files live in the page cache here; the calls of fsync are still made and counted."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def tensors(value: float, count: int = 4) -> dict[str, torch.Tensor]:
    return {f"t{number}": torch.full((10,), float(value)) for number in range(count)}


def save(path: Path, content: dict[str, torch.Tensor], shards: int = 1) -> list[Path]:
    """Saves equal tensors of 40 bytes in so many shards."""
    specs = [spec_of(*item) for item in content.items()]
    return write_directory(path, specs, content.__getitem__, max_shard_size=40 * -(-len(content) // shards))


def load(path: Path) -> dict[str, torch.Tensor]:
    with TensorReader() as reader:
        return {name: reader.read(info) for name, info in open_directory(path).tensors.items()}


def value_of(path: Path) -> float | None:
    """The value every tensor of a checkpoint has; None when there is no checkpoint. Mixed or damaged ones fail."""
    try:
        loaded = load(path)
    except CheckpointError as problem:
        if "is empty" in str(problem) or "has neither" in str(problem) or "no such" in str(problem):
            return None
        raise
    values = {value for tensor in loaded.values() for value in tensor.tolist()}
    assert len(values) == 1
    return values.pop()


def names(path: Path) -> set[str]:
    return set(os.listdir(path))


def shard_names(count: int) -> set[str]:
    if count == 1:
        return {SINGLE}
    return {INDEX, *(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))}


def test_single_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model"
    assert save(path, tensors(1)) == [path / SINGLE]
    assert names(path) == {SINGLE}
    assert read_header(path / SINGLE).metadata == {"format": "pt"}
    assert value_of(path) == 1


def test_shards_and_index(tmp_path: Path) -> None:
    files = save(tmp_path, tensors(1), shards=2)
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 160},
        "weight_map": {"t0": files[0].name, "t1": files[0].name, "t2": files[1].name, "t3": files[1].name},
    }
    assert [read_header(file).metadata for file in files] == [{"format": "pt"}] * 2
    assert value_of(tmp_path) == 1


def test_metadata_is_the_callers(tmp_path: Path) -> None:
    write_directory(tmp_path, [TensorSpec("a", "F32", (1,))], lambda _: torch.ones(1), metadata={"step": "7"})
    assert read_header(tmp_path / SINGLE).metadata == {"step": "7"}


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([4, 4, 4], 12, [3]),
        ([4, 4, 4], 11, [2, 1]),
        ([4, 4, 4], 4, [1, 1, 1]),
        ([4, 4, 4], 1, [1, 1, 1]),
        ([4, 40, 4, 4], 8, [1, 1, 2]),
        ([8, 0, 8], 8, [2, 1]),
    ],
)
def test_split(tmp_path: Path, sizes: list[int], limit: int, expected: list[int]) -> None:
    specs = [TensorSpec(f"t{number}", "U8", (size,)) for number, size in enumerate(sizes)]
    shapes = {spec.name: spec.shape for spec in specs}
    files = write_directory(
        tmp_path, specs, lambda name: torch.ones(shapes[name], dtype=torch.uint8), max_shard_size=limit
    )
    assert [len(read_header(file).tensors) for file in files] == expected
    assert open_directory(tmp_path).tensors.keys() == shapes.keys()


def test_one_tensor_is_made_at_a_time_and_in_order(tmp_path: Path) -> None:
    specs = [spec_of(*item) for item in tensors(1, 6).items()]
    made: list[tuple[str, weakref.ref[np.ndarray]]] = []  # the memory: a view may outlive the tensor and keep that

    def produce(name: str) -> torch.Tensor:
        assert all(reference() is None for _, reference in made)
        memory = np.ones(10, dtype=np.float32)
        made.append((name, weakref.ref(memory)))
        return torch.from_numpy(memory)

    write_directory(tmp_path, specs, produce, max_shard_size=80)
    assert [name for name, _ in made] == [f"t{number}" for number in range(6)]


def test_misaligned_order_is_mended_within_the_shard(tmp_path: Path) -> None:
    content = {"byte": torch.ones(3, dtype=torch.uint8), "scale": torch.ones(2), "half": torch.ones(2).bfloat16()}
    save(tmp_path, content)
    assert list(read_header(tmp_path / SINGLE).tensors) == ["scale", "half", "byte"]
    assert all(info.start % info.alignment == 0 for info in open_directory(tmp_path).tensors.values())


def test_wrong_arguments(tmp_path: Path) -> None:
    spec = TensorSpec("a", "F32", (1,))
    for size in (0, -1):
        with pytest.raises(InputError, match="max_shard_size must be a positive number"):
            write_directory(tmp_path, [spec], lambda _: torch.ones(1), max_shard_size=size)
    with pytest.raises(CheckpointError, match="no tensors to save"):
        write_directory(tmp_path, [], lambda _: torch.ones(1))
    with pytest.raises(CheckpointError, match="1 of the names to save are repeated"):
        write_directory(tmp_path, [spec, spec], lambda _: torch.ones(1), max_shard_size=4)
    with pytest.raises(CheckpointError, match="expected TensorSpec"):
        write_directory(tmp_path, [spec], lambda _: torch.ones(2))
    assert names(tmp_path) == set()


# --- replacing an older checkpoint ----------------------------------------------------------------------------------


TRANSITIONS = [(old, new) for old in (0, 1, 2, 4) for new in (1, 2, 4)]


@pytest.fixture(params=TRANSITIONS, ids=lambda pair: f"{pair[0]}-to-{pair[1]}")
def transition(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int, int]:
    """A directory with foreign files and an old checkpoint of 0 (none), 1, 2 or 4 shards; the shards of the new one."""
    old, new = request.param
    for name in OTHER_FILES:
        (tmp_path / name).write_bytes(b"keep")
    if old:
        save(tmp_path, tensors(1), old)
    return tmp_path, old, new


def fail_at(patch: pytest.MonkeyPatch, function: str, call: int) -> Callable[[], bool]:
    """Makes the `call`-th call of os.<function> raise ENOSPC; the result tells whether that happened."""
    original, calls = getattr(os, function), 0

    def failing(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    patch.setattr(os, function, failing)
    return lambda: calls >= call


def watched(patch: pytest.MonkeyPatch, look: Callable[[], None]) -> None:
    """Calls `look` before every system call that changes files; what it sees is what a power cut would leave."""
    looking = False

    def wrap(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal looking
            if not looking:
                looking = True
                look()
                looking = False
            return original(*args, **kwargs)

        return call

    for function in SYSTEM_CALLS:
        patch.setattr(os, function, wrap(getattr(os, function)))


def test_old_or_new_loads_at_every_moment(transition: tuple[Path, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    path, old, new = transition
    seen: list[float | None] = []
    with monkeypatch.context() as patch:
        watched(patch, lambda: seen.append(value_of(path)))
        save(path, tensors(2), new)
    seen.append(value_of(path))
    before = 1 if old else None
    flip = seen.index(2)
    assert seen == [before] * flip + [2] * (len(seen) - flip)
    assert names(path) == OTHER_FILES | shard_names(new)
    assert all((path / name).read_bytes() == b"keep" for name in OTHER_FILES)


@pytest.mark.parametrize("function", SYSTEM_CALLS)
def test_failure_at_every_call_leaves_the_old_or_the_new(
    transition: tuple[Path, int, int], function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, old, new = transition
    for call in range(1, 200):
        with monkeypatch.context() as patch:
            happened = fail_at(patch, function, call)
            failure = ""
            try:
                save(path, tensors(2), new)
            except (OSError, CheckpointError) as problem:
                failure = str(problem)
        assert (os.strerror(errno.ENOSPC) in failure) == happened()
        assert value_of(path) in {1 if old else None, 2}
        if function != "unlink":
            assert not [name for name in names(path) if ".tmp-" in name]
        if function == "link":
            assert names(path) - shard_names(new) <= OTHER_FILES | shard_names(old or 1)
        if not happened():
            break
        if old:
            save(path, tensors(1), old)
            assert names(path) == OTHER_FILES | shard_names(old)
    assert value_of(path) == 2
    assert names(path) == OTHER_FILES | shard_names(new)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (1, 1, "fsync rename fsync"),
        (2, 1, "fsync rename fsync unlink unlink unlink"),
        (1, 2, "fsync fsync fsync rename rename fsync rename fsync unlink fsync"),
        (4, 2, "fsync fsync fsync rename rename fsync rename fsync unlink unlink unlink unlink"),
        (2, 2, "fsync fsync fsync link link fsync fsync rename fsync rename rename fsync rename fsync unlink unlink"),
    ],
)
def test_syncs_come_before_what_relies_on_them(
    tmp_path: Path, old: int, new: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, tensors(1), old)
    calls: list[str] = []

    def recorded(function: str) -> Callable[..., object]:
        original = getattr(os, function)

        def call(first: object, *others: object, **options: object) -> object:
            # Not temporaries that have been renamed, and not what the garbage collector removes of earlier tests.
            if function == "fsync" or (isinstance(first, Path) and first.exists()):
                calls.append(function)
            return original(first, *others, **options)

        return call

    for function in ("fsync", "rename", "link", "unlink"):
        monkeypatch.setattr(os, function, recorded(function))
    save(tmp_path, tensors(2), new)
    # The files; then second names and the old index on them; then the shards; then the new index; then the removal.
    assert " ".join(calls) == expected


def test_interrupted_producer_leaves_the_old(transition: tuple[Path, int, int]) -> None:
    path, old, new = transition
    before = names(path)
    specs = [spec_of(*item) for item in tensors(2).items()]

    def produce(name: str) -> torch.Tensor:
        if name == "t3":
            raise KeyboardInterrupt
        return torch.ones(10)

    with pytest.raises(KeyboardInterrupt):
        write_directory(path, specs, produce, max_shard_size=160 // new)
    assert names(path) == before
    assert value_of(path) == (1 if old else None)


def test_without_hard_links_shards_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    save(tmp_path, tensors(1), 2)
    before = names(tmp_path)
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(CheckpointError, match=r"no hard links.*save to an empty directory"):
        save(tmp_path, tensors(2), 2)
    assert names(tmp_path) == before
    assert value_of(tmp_path) == 1
    save(tmp_path, tensors(2), 4)
    assert value_of(tmp_path) == 2


def test_broken_old_checkpoints_are_replaced(tmp_path: Path) -> None:
    for damage in (
        lambda: (tmp_path / INDEX).write_text("{"),
        lambda: (tmp_path / "model-00001-of-00002.safetensors").unlink(),
        lambda: (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b""),
    ):
        save(tmp_path, tensors(1), 2)
        damage()
        save(tmp_path, tensors(2), 2)
        assert value_of(tmp_path) == 2
        assert names(tmp_path) == shard_names(2)


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    for name in (
        *(".model.safetensors.tmp-0123abcd", ".model-00001-of-00002.safetensors.tmp-0123abcd"),
        *("model-00001-of-00002.old-0123abcd.safetensors", ".model.safetensors.index.json.tmp-0123abcd"),
    ):
        (tmp_path / name).touch()
    kept = {".model.safetensors", "model.safetensors.tmp-x", "my-model-00001-of-00002.safetensors", ".tmp-0123abcd"}
    for name in kept:
        (tmp_path / name).touch()
    save(tmp_path, tensors(1))
    assert names(tmp_path) == kept | {SINGLE}


def test_index_of_an_old_checkpoint_cannot_point_the_removal_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save(path, tensors(1), 2)
    (tmp_path / "victim.safetensors").touch()
    (path / "mine.safetensors").touch()
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": "../victim.safetensors", "b": "mine.safetensors"}}))
    save(path, tensors(2), 2)
    assert (tmp_path / "victim.safetensors").exists()
    assert names(path) == shard_names(2) | {"mine.safetensors"}


def test_retrying_producers_get_a_clean_start(tmp_path: Path) -> None:
    def failing() -> Iterator[torch.Tensor]:
        yield torch.ones(10)
        raise ValueError("out of scales")

    made = failing()
    specs = [spec_of(*item) for item in tensors(1).items()]
    with pytest.raises(ValueError, match="out of scales"):
        write_directory(tmp_path, specs, lambda _: next(made))
    assert names(tmp_path) == set()
    save(tmp_path, tensors(1))
    assert value_of(tmp_path) == 1
