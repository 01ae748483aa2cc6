"""A report as CSV, text and picture."""

import csv
import dataclasses
import json
import sys

import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from nemotron_h.benchmark import Bits, EngineFacts, LeftOut, Machine, Paths, Report, Row, plot
from nemotron_h.benchmark.plot import check_installed, check_path, write_png
from nemotron_h.benchmark.report import append_csv, check_csv, notes, tables
from nemotron_h.errors import InputError, MissingDependencyError

MACHINE = Machine("CPU, with a comma", 2, 2, 8 << 30, "Linux", "1.0", "abc", "2026-01-02", 0.1, [4e9, 5e9, 9e9],
                  {"int8": [2e12, 1e12, 9e12], "bf16": [1e12]})  # fmt: skip
ENGINES = [
    EngineFacts("nemotron-h", "int4", "1.0", "random", 1.25, 2 << 30, 3 << 30),
    EngineFacts("llama.cpp", "Q4_0", "0.3", "loaded", 0.5, 1 << 30, 1 << 30),
    EngineFacts("transformers", "bfloat16", skipped="it needs about 70 GB"),
]
DECODE = [
    Row("decode", "nemotron-h", "int4", 0, [20.0, 10.0, 11.0], 100_000_000, 1e9, "int8"),
    Row("decode", "llama.cpp", "Q4_0", 0, [5.5, 5.5, 5.5], 200_000_000, 1e9, "int8"),
    Row("decode", "nemotron-h", "int4", 4096, [8.0, 8.0, 8.0], 300_000_000, 1e9, "int8"),
]
OTHERS = [
    Row("verify", "nemotron-h", "int4", 4, [22.0], 25_000_000, 1e9, "int8"),
    Row("prefill", "nemotron-h", "int4", 512, [600.0, 500.0], 1_000_000, 1e9, "int8"),
    Row("prefill", "llama.cpp", "Q4_0", 512, [110.0], 1_000_000, 1e9, "float32"),
    Row("batch", "nemotron-h", "int4", 16, [88.0], 12_500_000, 1e9, "int8"),
    Row("batch", "llama.cpp", "Q4_0", 16, [22.0], 12_500_000, 1e9, "int8"),
]
REPORT = Report("tiny", "M*", 1234, MACHINE, ENGINES, DECODE)
LEFT_OUT = LeftOut("prefill", "llama.cpp", 32768, 1234.5)
BITS = Bits({"prompts": 1000, "batches": 20}, {"prompts": 0, "batches": 0}, (50, 7), True)
FULL = dataclasses.replace(REPORT, rows=[*DECODE, *OTHERS], left_out=[LEFT_OUT], bits=BITS)


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
    assert [first[name] for name in ("engine", "format", "measure", "size")] == ["nemotron-h", "int4", "decode", "0"]
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


def test_every_kind_of_work_in_csv(tmp_path):
    append_csv(FULL, tmp_path / "a.csv")
    found = rows(tmp_path / "a.csv")
    assert [(row["measure"], row["size"]) for row in found] == [(row.measure, str(row.size)) for row in FULL.rows]
    prefill, theirs = found[4:6]
    assert [float(prefill[name]) for name in ("tokens_per_second", "operations_per_token")] == [550, 1e9]
    assert [float(prefill[name]) for name in ("tflop_per_s", "peak_tflop_per_s", "share_of_peak")] == [0.55, 2, 0.275]
    assert (prefill["arithmetic"], prefill["bits"]) == ("int8", "equal")
    assert (theirs["arithmetic"], theirs["peak_tflop_per_s"], theirs["share_of_peak"]) == ("float32", "", "")
    assert theirs["bits"] == "", "ours alone were compared"
    differ = dataclasses.replace(BITS, differing={"prompts": 0, "batches": 1})
    append_csv(dataclasses.replace(FULL, bits=differ), tmp_path / "b.csv")
    assert rows(tmp_path / "b.csv")[4]["bits"] == "differ"


def test_tables():
    decode, engines = tables(REPORT)
    assert decode[1] == [
        "nemotron-h", "int4", "0", "11", "10 to 20", "90.91", "100", "1.1", "22%", "0.011", "1% of int8", "50"
    ]  # fmt: skip
    assert decode[3][2] == "4,096"
    assert engines[1:] == [
        ["nemotron-h", "1.0", "random", "1.25 s", "2 GiB", "3 GiB"],
        ["llama.cpp", "0.3", "loaded", "0.5 s", "1 GiB", "1 GiB"],
    ]


def test_a_table_for_each_kind_of_work():
    decode, verify, prefill, batch, engines = tables(FULL)
    assert [table[0][2] for table in (decode, verify, prefill, batch)] == [
        "decode behind", "tokens in one step", "prompt of", "sequences at once"
    ]  # fmt: skip
    assert [len(table) for table in (decode, verify, prefill, batch, engines)] == [4, 2, 3, 3, 3]
    assert prefill[1] == [
        "nemotron-h", "int4", "512", "550", "500 to 600", "1.818", "1", "0.55", "11%", "0.55", "28% of int8", "2000"
    ]  # fmt: skip
    assert prefill[2][-2:] == ["", "5000"], "without a peak, the bandwidth is the limit that is left"


def test_notes_of_every_kind_of_work():
    said = notes(FULL)
    for line in (
        "llama.cpp: prefill of 32,768 tokens left out: would take 1,234 s",
        "decode against llama.cpp: 2.00x behind 0 tokens",
        "prefill against llama.cpp: 5.00x of 512 tokens",
        "batches against llama.cpp: 4.00x of 16 sequences",
        "nemotron-h: a step of 4 tokens takes 2.00x the time of one, behind 0 tokens",
        "bits: equal (1,000 of prompts, 20 of batches)",
        "rounding: 7 of 50 logits of a prompt differ from those of its tokens one by one",
    ):
        assert line in said
    differ = dataclasses.replace(BITS, differing={"prompts": 3, "batches": 0})
    said = notes(dataclasses.replace(FULL, bits=differ))
    assert "bits: DIFFER (3 of 1,000 of prompts, 0 of 20 of batches)" in said
    said = notes(dataclasses.replace(FULL, bits=dataclasses.replace(differ, promised=False)))
    assert any(line.endswith("of batches); only packed weights on kernels promise them") for line in said)


def test_notes():
    said = "\n".join(notes(REPORT))
    assert "transformers did not run: it needs about 70 GB" in said
    assert "decode against llama.cpp: 2.00x behind 0 tokens" in said
    assert "load average" not in said
    assert "NaN" not in said
    busy = dataclasses.replace(REPORT, machine=dataclasses.replace(MACHINE, load=3.21))
    assert "load average 3.2" in notes(busy)[0]
    broken = dataclasses.replace(REPORT, rows=[dataclasses.replace(DECODE[0], finite=False), *DECODE[1:]])
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
    assert facts["decode"][2]["context"] == 4096
    assert facts["decode"][0]["share_of_peak"] == pytest.approx(0.0055)
    assert facts["machine"]["operations_per_second"] == {"int8": 2e12, "bf16": 1e12}
    assert facts["ratios"] == [{"measure": "decode", "peer": "llama.cpp", "context": 0, "ratio": 2.0}]
    assert (facts["prefill"], facts["batch"], facts["verify"], facts["bits"]) == ([], [], [], None)
    assert facts["engines"][2]["skipped"]
    assert facts["paths"] is None


def test_facts_of_every_kind_of_work():
    facts = FULL.facts()
    assert json.loads(json.dumps(facts)) == facts | {"bits": facts["bits"] | {"rounding": [50, 7]}}
    assert [(row["engine"], row["prompt"]) for row in facts["prefill"]] == [("nemotron-h", 512), ("llama.cpp", 512)]
    assert facts["prefill"][0]["limit"] == 2000
    assert facts["prefill"][0]["operations_per_second"] == 550e9
    assert facts["prefill"][1]["share_of_peak"] is None
    assert facts["batch"][0]["sequences"] == 16
    assert facts["verify"][0]["step"] == 4
    assert facts["left_out"] == [{"measure": "prefill", "engine": "llama.cpp", "size": 32768, "seconds": 1234.5}]
    assert facts["bits"]["equal"] is True


@pytest.mark.parametrize("report", [REPORT, FULL], ids=["decode", "full"])
def test_picture(tmp_path, report):
    write_png(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "matplotlib.pyplot" not in sys.modules, "it may look for a display"


def test_panels(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "_draw", lambda axes, report, rows: drawn.append((axes, [row.measure for row in rows])))
    write_png(FULL, tmp_path / "a.png")
    assert [measures for _, measures in drawn] == [["decode"] * 3, ["prefill"] * 2, ["batch"] * 2]
    assert [axes.get_title() for axes, _ in drawn] == [title for title, _ in plot.PANELS.values()]
    assert [axes.get_xlabel() for axes, _ in drawn] == [size for _, size in plot.PANELS.values()]


def drawn(rows):
    """(heights of the bars of each engine, ticks, labels, limits)"""
    axes = Figure().add_subplot()
    plot._draw(axes, FULL, rows)
    heights = [
        sorted(bar.get_height() for bar in group) for group in axes.containers if isinstance(group, BarContainer)
    ]
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    labels = axes.get_legend_handles_labels()[1]
    dots = [dots for dots in axes.collections if hasattr(dots, "get_offsets")]
    return heights, ticks, labels, {round(float(y), 6) for part in dots for _, y in part.get_offsets()}


def test_what_is_drawn():
    heights, ticks, labels, limits = drawn(FULL.of("decode"))
    assert heights == [[8.0, 11.0], [5.5]]
    assert ticks == ["0", "4,096"]
    assert labels.count("machine's limit") == 1
    assert {"nemotron-h (int4)", "llama.cpp (Q4_0)"} <= set(labels)
    assert {50.0, 25.0} <= limits, "of the bandwidth"
    heights, ticks, _, limits = drawn(FULL.of("prefill"))
    assert (heights, ticks) == ([[550.0], [110.0]], ["512"])
    assert {2000.0, 5000.0} <= limits, "of the arithmetic where that is less, and its peak known"


def test_where_it_cannot_be_drawn(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "no" / "a.png"):
        with pytest.raises(InputError, match="--png"):
            check_path(path)
    check_path(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'nemotron-h\[plot\]'"):
        check_installed()
