"""How well a model predicts: perplexity of texts, and lm-eval's tasks (extra `eval`)."""

from nemotron_h.evaluation.perplexity import Interval, TextScore, combine, score_text

__all__ = ["Interval", "TextScore", "combine", "score_text"]
