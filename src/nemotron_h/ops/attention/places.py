"""Where the queries of a call stand among its keys."""

from torch import Tensor


def misplaced(
    queries: int, keys: int, visible: Tensor | None, causal: bool, past: int, window: int | None
) -> str | None:
    """What is wrong with the places of queries and keys; None when nothing is."""
    if not causal:
        return "past and window say something only with causal=True" if past or window is not None else None
    if past < 0 or (window is not None and window < 1):
        return f"past={past} must be at least 0, window={window} None or at least 1"
    if visible is not None or keys != past + queries:
        mask = "none" if visible is None else list(visible.shape)
        return f"causal needs past + queries = {past} + {queries} keys (got {keys}) and no mask (got {mask})"
    return None
