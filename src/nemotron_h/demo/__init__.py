"""The small model that ships with the package; README.md beside this file is its card."""

from pathlib import Path


def demo_model() -> Path:
    """Directory of the shipped checkpoint, for `from_pretrained` and `LLM`."""
    return Path(__file__).parent
