"""How well masked words are guessed: mean cross entropy over the masked tokens of held-out texts.

Which tokens are masked follows from a text's own tokens (recipes/mlm.py), so that before and after
training, and two models with one vocabulary, answer the same questions.

Axis letters: N texts.
"""

import math

import numpy as np

from medvlp_jax.evaluation import statistics
from medvlp_jax.evaluation.results import Results, assemble, number

PROTOCOL = "masked_tokens@v1"


def run(
    loss, count, *, vocab_size: int, rate: float, groups=None, resamples: int = 2000
) -> Results:
    """Score masked tokens; intervals by bootstrap over groups.

    Args:
      loss: [N] cross entropy in nats summed over the masked tokens of a text.
      count: [N] masked tokens of a text.
      vocab_size: V; guessing evenly costs log V.
      rate: share of the tokens that is masked.
      groups: [N] what a text is about; texts about the same thing are drawn together.
      resamples: of the bootstrap; 0 gives no interval.

    Returns:
      masked_tokens/knowledge/loss, in nats a token.
    """
    loss, count = (np.asarray(x, np.float64) for x in (loss, count))

    def mean(weights):
        masked = weights @ count
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(masked > 0, weights @ loss / masked, np.nan)[:, None]

    found = statistics.bootstrap(mean, len(loss), groups=groups, resamples=resamples)
    entry = number(*(float(x[0]) for x in found), n=int(count.sum()), chance=math.log(vocab_size))
    return assemble(
        PROTOCOL,
        "knowledge",
        {"loss": entry},
        settings={"rate": rate, "vocab_size": vocab_size, "resamples": resamples},
        notes={"texts": len(loss)},
    )
