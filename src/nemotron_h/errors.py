"""The exceptions of the package.

Each is a `NemotronHError` and also the built-in exception that a caller would expect, so both
`except NemotronHError` and `except ValueError` work. A message says what was expected, what came, and what to do.
"""


class NemotronHError(Exception):
    """Base of every exception that the package raises on purpose."""


class ConfigError(NemotronHError, ValueError):
    """A configuration breaks a rule; the message names field, value and rule."""


class CheckpointError(NemotronHError, ValueError):
    """A checkpoint is missing, damaged, or does not fit its configuration."""


class ModelNotFoundError(CheckpointError, OSError):
    """There is no such directory, file or hub repository."""

    @classmethod
    def of(cls, name: object, error: Exception) -> "ModelNotFoundError":
        """One line from an error of transformers or the hub client, which have many; ours stay as they are."""
        if isinstance(error, cls):
            return error
        root: BaseException = error
        while (cause := root.__cause__ or root.__context__) is not None:
            root = cause
        reason = _first_line(error)
        if root is not error and _first_line(root) not in reason:  # what broke, such as a connection
            reason = f"{reason.split('. ')[0].rstrip('.')} ({_first_line(root)})"
        return cls(f"{name}: {reason}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class InputError(NemotronHError, ValueError):
    """An argument of a call (tokens, mask, cache, sampling parameter) is unusable."""


class UnsupportedError(NemotronHError, NotImplementedError):
    """The request is legal, but this package does not do it; the message says what does."""


class CacheError(NemotronHError, ValueError):
    """A cache cannot be used as asked: foreign type, other shape, a position that cannot be restored."""


class KernelError(NemotronHError, RuntimeError):
    """An implementation that was asked for explicitly cannot run, or left its error budget."""


class MissingDependencyError(NemotronHError, ImportError):
    """An optional package is missing; the message is the `pip install` line that mends it."""
