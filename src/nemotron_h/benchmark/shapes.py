"""Shapes to measure without weights: slices of published models whose layers have the full size, and whole models."""

from __future__ import annotations

from typing import Any

from nemotron_h import family

# name: (preset, what differs from it). A slice reads its layers at full width but few of them, so that it fits and
# starts quickly; part of its weights may stay in a large last-level cache, so shares of the bandwidth mean most on
# nano-30b.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "nano-slice": (
        "nemotron-3-nano-30b-a3b",
        {"hybrid_override_pattern": "MEM*EMEM", "n_routed_experts": 32, "vocab_size": 32768},
    ),
    "dense-slice": ("nemotron-nano-9b-v2", {"hybrid_override_pattern": "M-M-M*-M", "vocab_size": 32768}),
    "nano-30b": ("nemotron-3-nano-30b-a3b", {}),
}


def shape_config(name: str) -> dict[str, Any] | None:
    """Keyword arguments of a shape or a preset, as `NemotronHConfig` takes them; None for any other name.

    Raises:
        ConfigError: a preset that is no complete shape.
    """
    if name in SHAPES:
        preset, changes = SHAPES[name]
        return family.preset(preset, dict(changes))
    return family.preset(name) if name in family.PRESETS else None
