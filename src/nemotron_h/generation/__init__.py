"""Text from a model: `LLM` and `SamplingParams`.

This is the plain engine, one sequence after the other, and stays as the oracle of every faster one.
"""

from nemotron_h.generation.llm import LLM, Completion, Event, Result, Usage
from nemotron_h.generation.params import SamplingParams

__all__ = ["LLM", "Completion", "Event", "Result", "SamplingParams", "Usage"]
