"""A report as CSV, text and picture."""

import csv
import dataclasses
import sys

import pytest

from nemotron_h.benchmark import Decode, EngineFacts, Machine, Paths, Report
from nemotron_h.benchmark.plot import check_installed, check_path, write_png
from nemotron_h.benchmark.report import append_csv, check_csv, notes, tables
from nemotron_h.errors import InputError, MissingDependencyError

MACHINE = Machine("CPU, with a comma", 2, 2, 8 << 30, "Linux", "1.0", "abc", "2026-01-02", 0.1, [4e9, 5e9, 9e9])
ENGINES = [
    EngineFacts("nemotron-h", "int4", "1.0", "random", 1.25, 2 << 30, 3 << 30),
    EngineFacts("llama.cpp", "Q4_0", "0.3", "loaded", 0.5, 1 << 30, 1 << 30),
    EngineFacts("transformers", "bfloat16", skipped="it needs about 70 GB"),
]
DECODE = [
    Decode("nemotron-h", "int4", 0, [20.0, 10.0, 11.0], 100_000_000, True),
    Decode("llama.cpp", "Q4_0", 0, [5.5, 5.5, 5.5], 200_000_000, True),
    Decode("nemotron-h", "int4", 4096, [8.0, 8.0, 8.0], 300_000_000, True),
]
REPORT = Report("tiny", "M*", 1234, MACHINE, ENGINES, DECODE)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv(tmp_path):
    path = tmp_path / "speeds.csv"
    append_csv(REPORT, path)
    append_csv(REPORT, path)
    found = rows(path)
    assert len(found) == 6, "rows are added, the header is not"
    assert found[:3] == found[3:]
    first = found[0]
    assert first["cpu"] == "CPU, with a comma"
    assert (first["date"], first["commit"], first["model"]) == ("2026-01-02", "abc", "tiny")
    assert (first["engine"], first["format"], first["context"]) == ("nemotron-h", "int4", "0")
    assert [float(first[name]) for name in ("tokens_per_second", "slowest", "fastest")] == [11, 10, 20]
    assert float(first["gb_per_s"]) == 1.1
    assert float(first["read_gb_per_s"]) == 5
    assert float(first["share_of_bandwidth"]) == 0.22
    assert (first["first_token_seconds"], first["packed_bytes"], first["peak_bytes"]) == (
        "1.25", str(2 << 30), str(3 << 30)
    )  # fmt: skip
    assert [row["engine"] for row in found[:3]] == ["nemotron-h", "llama.cpp", "nemotron-h"]


def test_csv_files_that_are_something_else(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, words in [
        (other, "its columns"), (tmp_path / "no" / "x.csv", "no directory"), (tmp_path, "Is a directory"),
        (tmp_path / "binary", "not a text file"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            check_csv(path)
    with pytest.raises(InputError):
        append_csv(REPORT, other)
    assert other.read_text() == "a,b\n1,2\n"
    (tmp_path / "empty.csv").touch()
    append_csv(REPORT, tmp_path / "empty.csv")
    assert len(rows(tmp_path / "empty.csv")) == 3


def test_tables():
    decode, engines = tables(REPORT)
    assert decode[1] == ["nemotron-h", "int4", "0", "11", "10 to 20", "90.91", "100", "1.1", "22%"]
    assert decode[3][2] == "4,096"
    assert engines[1:] == [
        ["nemotron-h", "1.0", "random", "1.25 s", "2 GiB", "3 GiB"],
        ["llama.cpp", "0.3", "loaded", "0.5 s", "1 GiB", "1 GiB"],
    ]


def test_notes():
    said = "\n".join(notes(REPORT))
    assert "transformers did not run: it needs about 70 GB" in said
    assert "decode against llama.cpp: 2.00x behind 0 tokens" in said
    assert "load average" not in said
    assert "NaN" not in said
    busy = dataclasses.replace(REPORT, machine=dataclasses.replace(MACHINE, load=3.21))
    assert "load average 3.2" in notes(busy)[0]
    broken = dataclasses.replace(REPORT, decode=[dataclasses.replace(DECODE[0], finite=False), *DECODE[1:]])
    assert any(line.startswith("nemotron-h: its logits were NaN") for line in notes(broken))
    apart = dataclasses.replace(REPORT, paths=Paths({"step": 100.0, "model.generate": 84.0}))
    assert "NOT within 15% of each other" in notes(apart)[-1]
    near = dataclasses.replace(REPORT, paths=Paths({"step": 85.0, "model.generate": 100.0}))
    assert "model.generate 100: within 15%" in notes(near)[-1]


def test_facts():
    facts = REPORT.facts()
    assert facts["machine"]["read_bytes_per_second"] == 5e9
    assert facts["decode"][0]["share_of_bandwidth"] == pytest.approx(0.22)
    assert facts["decode"][0]["tokens_per_second"] == 11
    assert facts["ratios"] == [{"peer": "llama.cpp", "context": 0, "ratio": 2.0}]
    assert facts["engines"][2]["skipped"]
    assert facts["paths"] is None


def test_picture(tmp_path):
    write_png(REPORT, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "matplotlib.pyplot" not in sys.modules, "it may look for a display"


def test_what_is_drawn():
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

    from nemotron_h.benchmark.plot import _draw

    axes = Figure().add_subplot()
    _draw(axes, REPORT)
    heights = [
        sorted(bar.get_height() for bar in group) for group in axes.containers if isinstance(group, BarContainer)
    ]
    assert [8.0, 11.0] in heights
    assert [5.5] in heights
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "4,096"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels.count("read bandwidth") == 1
    assert {"nemotron-h (int4)", "llama.cpp (Q4_0)"} <= set(labels)
    bounds = sorted(
        float(y) for dots in axes.collections if hasattr(dots, "get_offsets") for _, y in dots.get_offsets()
    )
    assert {50.0, 25.0} <= {round(bound, 6) for bound in bounds}


def test_where_it_cannot_be_drawn(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "no" / "a.png"):
        with pytest.raises(InputError, match="--png"):
            check_path(path)
    check_path(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'nemotron-h\[plot\]'"):
        check_installed()
