"""The work behind `nemotron-h bench`: how fast a model decodes and reads, beside what the machine could give.

Every engine, ours too, is measured in a process of its own (`workers/`); this one holds no model.

    shapes      what can be measured without weights
    limits      the machine: cores, free memory, read bandwidth, peaks of its arithmetic
    measures    kinds of work, and their figures
    engines     what is measured, as a command and a request
    process     one worker from the outside
    run         what is asked for, and what fits; rounds: who works when
    report      results as JSON, CSV, text; plot as PNG
    peers/      other engines, and files for them
    workers/    programs that hold one model each
"""

from nemotron_h.benchmark.engines import FORMATS, PEERS, Subject
from nemotron_h.benchmark.measures import Bits, EngineFacts, LeftOut, Machine, Paths, Row
from nemotron_h.benchmark.report import Report
from nemotron_h.benchmark.run import SEQUENCES, Options, run
from nemotron_h.benchmark.shapes import SHAPES, shape_config

__all__ = [
    "FORMATS",
    "PEERS",
    "SEQUENCES",
    "SHAPES",
    "Bits",
    "EngineFacts",
    "LeftOut",
    "Machine",
    "Options",
    "Paths",
    "Report",
    "Row",
    "Subject",
    "run",
    "shape_config",
]
