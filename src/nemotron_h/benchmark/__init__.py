"""The work behind `nemotron-h bench`: decode speed, load time and memory, beside what the machine's memory can give.

Every engine, ours too, is measured in a process of its own (`workers/`); this one holds no model.

    shapes      what can be measured without weights
    limits      the machine: cores, free memory, read bandwidth
    engines     what is measured, as a command and a request
    process     one worker from the outside
    run         rounds: who decodes when, and what comes out
    report      results as JSON, CSV, text; plot as PNG
    peers/      other engines, and files for them
    workers/    programs that hold one model each
"""

from nemotron_h.benchmark.engines import FORMATS, PEERS, Subject
from nemotron_h.benchmark.report import Decode, EngineFacts, Machine, Paths, Report
from nemotron_h.benchmark.run import Options, run
from nemotron_h.benchmark.shapes import SHAPES, shape_config

__all__ = [
    "FORMATS",
    "PEERS",
    "SHAPES",
    "Decode",
    "EngineFacts",
    "Machine",
    "Options",
    "Paths",
    "Report",
    "Subject",
    "run",
    "shape_config",
]
