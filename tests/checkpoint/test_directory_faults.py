"""Checkpoint directories whose index lies, links lead out, or weights are pickles; never a file outside is opened."""

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_h.checkpoint.directory import INDEX, SINGLE, Directory, locate, open_directory
from nemotron_h.checkpoint.safetensors import TensorReader, spec_of, write_file
from nemotron_h.errors import CheckpointError

# An audit hook cannot be removed, so there is one, and it records while this is a list.
_events: list[tuple[str, tuple[object, ...]]] | None = None

CODE = ("import", "exec", "compile", "socket", "subprocess", "pickle", "marshal", "ctypes", "os.system", "os.fork")


def _record(event: str, arguments: tuple[object, ...]) -> None:
    if _events is not None:
        _events.append((event, arguments))


sys.addaudithook(_record)


@contextlib.contextmanager
def nothing_but(*roots: Path) -> Iterator[list[Path]]:
    """Inside, only files and directories under `roots` may be opened, and no code may be loaded or run.

    The list that is yielded holds the files opened, once the block has ended.
    """
    global _events
    _events = recorded = []
    opened: list[Path] = []
    try:
        yield opened
    finally:
        _events = None
    for event, arguments in recorded:
        assert not event.startswith(CODE), (event, arguments)
        if event in {"open", "os.listdir", "os.scandir"} and isinstance(arguments[0], str | bytes | os.PathLike):
            real = Path(os.path.realpath(os.fsdecode(arguments[0])))
            assert any(real.is_relative_to(os.path.realpath(root)) for root in roots), (event, real)
            if event == "open":
                opened.append(real)


def load(path: Path, *roots: Path) -> Directory:
    """Opens a directory and reads every tensor under the eyes of the audit hook."""
    torch.empty(1).numpy()  # whatever torch imports on first use is not the checkpoint's doing
    with nothing_but(path, *roots):
        directory = open_directory(path)
        assert locate(path) == directory.files
        with TensorReader() as reader:
            for info in directory.tensors.values():
                reader.read(info)
    return directory


def refused(path: Path, *expected: str) -> str:
    with nothing_but(path), pytest.raises(CheckpointError) as caught:
        open_directory(path)
    message = str(caught.value)
    assert str(path) in message
    for part in expected:
        assert part in message
    assert "\n" not in message
    assert len(message) < 1200 + len(str(path))
    return message


def shard(path: Path, **sizes: int) -> None:
    tensors = {name: torch.ones(size) for name, size in sizes.items()}
    write_file(path, [spec_of(*item) for item in tensors.items()], tensors.items())


def index(path: Path, weight_map: object, **metadata: object) -> None:
    path.mkdir(exist_ok=True)
    (path / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


def two_shards(path: Path) -> dict[str, str]:
    path.mkdir()
    shard(path / "s1.safetensors", a=1, b=2)
    shard(path / "s2.safetensors", c=3)
    weight_map = {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"}
    index(path, weight_map, total_size=24)
    return weight_map


# --- what loads -----------------------------------------------------------------------------------------------------


def test_single_file(tmp_path: Path) -> None:
    shard(tmp_path / SINGLE, a=3, b=1)
    directory = load(tmp_path)
    assert directory.files == [tmp_path / SINGLE]
    assert list(directory.tensors) == ["a", "b"]


def test_shards(tmp_path: Path) -> None:
    two_shards(tmp_path / "m")
    shard(tmp_path / "m" / "adapter_model.safetensors", unrelated=1)
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "m" / "config.json").write_text("{}")
    directory = load(tmp_path / "m")
    assert directory.files == [tmp_path / "m" / "s1.safetensors", tmp_path / "m" / "s2.safetensors"]
    assert {name: info.file.name for name, info in directory.tensors.items()} == {
        "a": "s1.safetensors",
        "b": "s1.safetensors",
        "c": "s2.safetensors",
    }


def test_single_file_counts_beside_an_index(tmp_path: Path) -> None:
    two_shards(tmp_path / "m")
    shard(tmp_path / "m" / SINGLE, x=1)
    assert list(load(tmp_path / "m").tensors) == ["x"]


@pytest.mark.parametrize("metadata", [{}, {"total_size": 24.0}, {"total_size": None}, {"total_parameters": 6}])
def test_total_size_may_be_absent_or_a_float(tmp_path: Path, metadata: dict[str, object]) -> None:
    index(tmp_path / "m", two_shards(tmp_path / "m"), **metadata)
    assert len(load(tmp_path / "m").tensors) == 3


def test_index_without_metadata(tmp_path: Path) -> None:
    weight_map = two_shards(tmp_path / "m")
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert len(load(tmp_path / "m").tensors) == 3


def test_relative_and_linked_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_shards(tmp_path / "m")
    (tmp_path / "link").symlink_to("m")
    assert len(load(tmp_path / "link").tensors) == 3
    monkeypatch.chdir(tmp_path / "m")
    assert len(load(Path()).tensors) == 3


# --- links ----------------------------------------------------------------------------------------------------------


def hub_cache(tmp_path: Path) -> Path:
    """A snapshot as huggingface_hub lays it out: links into the model's blobs."""
    repository = tmp_path / "hub" / "models--nvidia--tiny"
    snapshot = repository / "snapshots" / "0123abcd"
    two_shards(tmp_path / "plain")
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        file.rename(repository / "blobs" / f"b{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/b{number}")
    return snapshot


def test_hub_cache_snapshot(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    directory = load(snapshot, snapshot.parent.parent / "blobs")
    assert directory.files == [snapshot / "s1.safetensors", snapshot / "s2.safetensors"]
    (tmp_path / "model").symlink_to(snapshot)
    assert len(load(tmp_path / "model", snapshot.parent.parent / "blobs").tensors) == 3


def test_subfolder_of_a_hub_cache_snapshot(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot / "fp8").mkdir()
    (snapshot / "fp8" / SINGLE).symlink_to("../../../blobs/b1")
    assert load(snapshot / "fp8", snapshot.parent.parent / "blobs").files == [snapshot / "fp8" / SINGLE]


def test_links_within_the_directory(tmp_path: Path) -> None:
    two_shards(tmp_path / "m")
    (tmp_path / "m" / "data").mkdir()
    (tmp_path / "m" / "s1.safetensors").rename(tmp_path / "m" / "data" / "x")
    (tmp_path / "m" / "s1.safetensors").symlink_to("data/x")
    assert len(load(tmp_path / "m").tensors) == 3


@pytest.mark.parametrize("name", ["s1.safetensors", INDEX, SINGLE])
@pytest.mark.parametrize("absolute", [True, False])
def test_links_out_of_the_directory(tmp_path: Path, name: str, absolute: bool) -> None:
    two_shards(tmp_path / "m")
    shard(tmp_path / "outside", a=1, b=2)
    (tmp_path / "m" / name).unlink(missing_ok=True)
    (tmp_path / "m" / name).symlink_to(tmp_path / "outside" if absolute else "../outside")
    refused(tmp_path / "m", name, "symbolic link to", "outside the directory", "copy the file")


def test_links_out_of_a_hub_cache(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    shard(tmp_path / "outside", a=1, b=2)
    (snapshot / "s1.safetensors").unlink()
    (snapshot / "s1.safetensors").symlink_to("../../../../outside")
    is_link = pytest.raises(CheckpointError, match=r"shard 's1\.safetensors' is a symbolic link")
    with nothing_but(snapshot, snapshot.parent.parent / "blobs"), is_link:
        open_directory(snapshot)


@pytest.mark.parametrize("target", ["../../refs/main", "../other/s1.safetensors", "../../blobs/../refs/main"])
def test_only_blobs_of_the_cache_are_inside(tmp_path: Path, target: str) -> None:
    snapshot = hub_cache(tmp_path)
    for name in ("refs/main", "snapshots/other/s1.safetensors"):
        (snapshot.parent.parent / name).parent.mkdir()
        shard(snapshot.parent.parent / name, a=1, b=2)
    (snapshot / "s1.safetensors").unlink()
    (snapshot / "s1.safetensors").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"shard 's1\.safetensors' is a symbolic link"):
        open_directory(snapshot)


def test_blobs_that_are_a_link_out_of_the_cache(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    refused(snapshot, "is a symbolic link")


def test_blobs_without_a_hub_cache_around_are_outside(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    repository = snapshot.parent.parent.rename(tmp_path / "hub" / "copy")
    refused(repository / "snapshots" / snapshot.name, "is a symbolic link")
    repository = repository.rename(tmp_path / "hub" / "models--nvidia--tiny")
    (repository / "snapshots").rename(repository / "trees")
    refused(repository / "trees" / snapshot.name, "is a symbolic link")


def test_link_loops_and_special_files(tmp_path: Path) -> None:
    path = tmp_path / "m"
    two_shards(path)
    for make in (
        lambda shard: shard.symlink_to("s1.safetensors"),
        lambda shard: shard.symlink_to("nowhere"),
        os.mkfifo,
        lambda shard: shard.mkdir(),
    ):
        (path / "s1.safetensors").unlink()
        make(path / "s1.safetensors")
        old = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("blocked on a FIFO"))
        signal.alarm(5)
        refused(path, "s1.safetensors")
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


# --- the index ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../m/s1.safetensors",
            "../evil.safetensors",
            "sub/../s1.safetensors",
            "./s1.safetensors",
            "sub/x.safetensors",
        ),
        *("/etc/passwd", "/s1.safetensors", "..\\evil.safetensors", "C:\\x.safetensors", "~/x.safetensors"),
        *(
            "",
            ".",
            "..",
            "s1.bin",
            "pytorch_model.bin",
            "s1.safetensors/",
            "s1.safetensors\0",
            "s1\n.safetensors",
            "s1\0.safetensors",
        ),
        *("https://x/y.safetensors", "x" * 300 + ".safetensors"),
    ],
)
def test_shard_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    weight_map = two_shards(tmp_path / "m")
    shard(tmp_path / "evil.safetensors", a=1)
    (tmp_path / "m" / "sub").mkdir()
    shard(tmp_path / "m" / "sub" / "x.safetensors", a=1)
    index(tmp_path / "m", weight_map | {"a": name})
    refused(tmp_path / "m", "shard ", "cannot be read" if len(name) > 255 else "must be a plain file name")


INDEXES = {
    "list": ("[]", "must hold an object, holds []"),
    "no weight_map": ("{}", "weight_map must map tensors to shards, is None"),
    "weight_map a list": ('{"weight_map": ["a"]}', "weight_map must map"),
    "zero shards": ('{"weight_map": {}}', "weight_map must map"),
    "shard a number": ('{"weight_map": {"a": 1}}', "'a' must be the name of a shard, is 1"),
    "shard a list": ('{"weight_map": {"a": ["s1.safetensors"]}}', "'a' must be the name of a shard"),
    "shard null": ('{"weight_map": {"a": null}}', "'a' must be the name of a shard, is None"),
    "tensor twice": ('{"weight_map": {"a": "s1.safetensors", "a": "s2.safetensors"}}', "key 'a' twice"),
    "map twice": ('{"weight_map": {"a": "s1.safetensors"}, "weight_map": {}}', "key 'weight_map' twice"),
    "metadata a list": ('{"metadata": [], "weight_map": {"a": "s1.safetensors"}}', "metadata must be an object"),
    "not JSON": ("{", "not valid JSON"),
    "deep": ('{"weight_map":' * 100_000, "nests deeper"),
    "surrogate": (r'{"weight_map": {"a": "\ud800.safetensors"}}', "surrogate"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_malformed_index(tmp_path: Path, case: str) -> None:
    text, expected = INDEXES[case]
    two_shards(tmp_path / "m")
    (tmp_path / "m" / INDEX).write_text(text)
    refused(tmp_path / "m", INDEX, expected)


@pytest.mark.parametrize("total", [23, 25, 0, -24, 24.5, True, "24", [24], 1e308])
def test_wrong_total_size(tmp_path: Path, total: object) -> None:
    index(tmp_path / "m", two_shards(tmp_path / "m"), total_size=total)
    refused(tmp_path / "m", INDEX, "total_size")


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    path = tmp_path / "m"
    weight_map = two_shards(path)
    index(path, weight_map | {"d": "s2.safetensors"})
    refused(path, "tensor 'd' is not in s2.safetensors, where the index puts it")
    index(path, {"b": "s1.safetensors", "c": "s2.safetensors"})
    refused(path, f"tensor 'a' of s1.safetensors is not listed in {INDEX}")
    index(path, weight_map | {"a": "s2.safetensors"})
    refused(path, "tensor 'a' is in s1.safetensors, the index says 's2.safetensors'")
    index(path, weight_map | {"a": "s3.safetensors"})
    refused(path, "shard 's3.safetensors' is missing")
    shard(path / "s2.safetensors", a=1, c=3)
    index(path, weight_map)
    refused(path, "tensor 'a' is in two shards, s1.safetensors and s2.safetensors")


def test_one_file_under_two_names(tmp_path: Path) -> None:
    path = tmp_path / "m"
    weight_map = two_shards(path)
    (path / "s3.safetensors").hardlink_to(path / "s1.safetensors")
    index(path, weight_map | {"b": "s3.safetensors"})
    refused(path, "tensor 'a' is in two shards", "tensor 'b' is in two shards")


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    two_shards(tmp_path / "m")
    os.truncate(tmp_path / "m" / "s2.safetensors", 50)
    refused(tmp_path / "m", "s2.safetensors: ")


def test_message_lists_five_problems_and_counts_all(tmp_path: Path) -> None:
    index(tmp_path / "m", {f"t{number}": f"{number}.safetensors" for number in range(8)})
    message = refused(tmp_path / "m", "8 problems: ", "; and 3 more")
    assert message.count("is missing") == 5
    index(tmp_path / "m", {f"t{number}": f"{number}.safetensors" for number in range(5)})
    assert "more" not in refused(tmp_path / "m", "5 problems: ")
    index(tmp_path / "m", {f"t{number}": number for number in range(7)})
    assert refused(tmp_path / "m", "7 problems: ", "; and 2 more").count("must be the name of a shard") == 5


def test_a_million_entries(tmp_path: Path) -> None:
    two_shards(tmp_path / "m")
    entries = ",".join(f'"layers.{number}.weight":"s1.safetensors"' for number in range(1_000_000))
    (tmp_path / "m" / INDEX).write_text('{"weight_map":{' + entries + "}}")
    refused(tmp_path / "m", "1000002 problems: tensor 'a' of s1.safetensors is not listed", "; and 999997 more")


FILES = st.dictionaries(
    st.sampled_from(["s1", "s2", "s3"]), st.sets(st.sampled_from("abcd"), min_size=1), min_size=1, max_size=3
)
MAPS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from(["s1", "s2", "s3"]), min_size=1)


@settings(max_examples=120)
@given(files=FILES, weight_map=MAPS, truthful=st.booleans(), error=st.sampled_from([0, 0, 0, 4]))
def test_random_layouts_load_only_if_consistent(
    files: dict[str, set[str]],
    weight_map: dict[str, str],
    truthful: bool,
    error: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("layout")
    if truthful:
        weight_map = {name: file for file, names in files.items() for name in names}
    for file, names in files.items():
        shard(path / f"{file}.safetensors", **dict.fromkeys(sorted(names), 1))
    index(
        path, {name: f"{file}.safetensors" for name, file in weight_map.items()}, total_size=4 * len(weight_map) + error
    )
    listed = {file: files.get(file) for file in weight_map.values()}
    consistent = listed == {
        file: {name for name, other in weight_map.items() if other == file} for file in weight_map.values()
    }
    if consistent and not error:
        assert load(path).tensors.keys() == weight_map.keys()
    else:
        refused(path)


# --- no safetensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "last.ckpt"),
        *("w.pkl", "w.pickle", "__0_0.distcp"),
    ],
)
def test_pickle_is_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m"
    path.mkdir()
    (path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with nothing_but(path) as opened, pytest.raises(CheckpointError) as caught:
        open_directory(path)
    assert opened == []
    assert f"only '{name}': pickle can run code, so it is never loaded; convert it" in str(caught.value)
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with nothing_but(path) as opened, pytest.raises(CheckpointError, match="must be a plain file name that ends in"):
        open_directory(path)
    assert opened == [path / INDEX]


def test_the_audit_hook_sees_what_it_should(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").touch()
    for act in (
        lambda: os.close(os.open(tmp_path / "out", os.O_RDONLY)),
        lambda: os.listdir(tmp_path),
        lambda: (tmp_path / "in" / ".." / "out").read_bytes(),
        lambda: eval("1"),
    ):
        with pytest.raises(AssertionError), nothing_but(tmp_path / "in"):
            act()


def test_directories_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with pytest.raises(CheckpointError, match="no such directory"):
        open_directory(path)
    path.mkdir()
    refused(path, "is empty")
    (path / "config.json").write_text("{}")
    refused(path, f"has neither {SINGLE} nor {INDEX}")
    (path / "model-q8_0.gguf").write_bytes(b"GGUF")
    refused(path, "gguf_file=")
    shard(path / "model-00001-of-00002.safetensors", a=1)
    refused(path, "unfinished download or save")
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        open_directory(path / "config.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_directory(Path("a\0b"))


def test_unreadable_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", denied)
    refused(tmp_path, "Permission denied")
