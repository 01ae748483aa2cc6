"""One token from a row of logits: greedy, or truncation and a draw.

Letters: V vocabulary.
"""

from torch import Tensor

from nemotron_h.ops import dispatch
from nemotron_h.ops.sample import check, native, reference

LOWEST_TEMPERATURE = 1e-30  # float32 would round a smaller one to zero; below 1e-6 it makes no difference anyway

_SAMPLE = dispatch.register("sample", reference.sample, native.sample, native.refusal, check=check.wrong)


def sample(
    logits_V: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    u: float = 0.0,
    *,
    impl: str | None = None,
) -> int:
    """The id of a token, or -1 when a logit is NaN or infinite.

    Temperature 0 takes the greatest logit, the lowest id among equals. Otherwise a token weighs
    `exp((logit - greatest) / temperature)`, in float32 (float64 when the logits are), nothing below e^-64; three rules,
    one after the other, decide which tokens stay, equals by ascending id; and the draw takes the first id at which the
    running sum of their weights, by ascending id, exceeds u times the total. The same u therefore draws the same token
    from every implementation, but where a sum meets its bound within float32's rounding.

    Args:
        logits_V: [V], V >= 1. The kernel takes contiguous float32.
        temperature: >= 0, finite.
        top_k: The k greatest logits stay; 0: all.
        top_p: In (0, 1]: of these, the heaviest tokens stay until they have that share of the weight.
        min_p: In [0, 1]: tokens stay that weigh at least this much of the heaviest.
        u: A uniform random number in [0, 1).

    Raises:
        InputError: logits are no vector, or empty.
        KernelError: `impl="native"` cannot run.
    """
    if temperature > 0:
        temperature = max(temperature, LOWEST_TEMPERATURE)
    return _SAMPLE(logits_V, temperature, top_k, top_p, min_p, u, impl=impl)
