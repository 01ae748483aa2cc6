"""Text from a model: `LLM` and `SamplingParams`.

Texts decode together (batch.py), each with the bits that it has alone: one prompt at a time is the oracle of a list.
"""

from nemotron_h.generation.llm import LLM
from nemotron_h.generation.params import SamplingParams
from nemotron_h.generation.results import Completion, Event, Result, Usage

__all__ = ["LLM", "Completion", "Event", "Result", "SamplingParams", "Usage"]
