"""The numbers a setting can have: one table for what methods share, looked at before all else.

What depends on a method, a corpus or the devices is checked where that is known. A setting that a
config does not have is not looked at, and neither is a schedule (knots) in place of a number.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from medvlp_jax.config import UserError, flatten


class Range(NamedTuple):
    """Numbers from `low` to `high`; an end that is open is not one of them, infinity never is."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.low_open else self.low <= value
        below = value < self.high if self.high_open or self.high == math.inf else value <= self.high
        return above and below  # never of NaN

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.low_open else f"{self.low:g} or more"
        if self.high == math.inf:
            return low
        low = low if self.low_open else f"at least {self.low:g}"
        return f"{low} and {'below' if self.high_open else 'at most'} {self.high:g}"


SOME, ANY = Range(1), Range(0)  # one or more; none or more
POSITIVE = Range(0, low_open=True)
SHARE, PART = Range(0, 1), Range(0, 1, low_open=True)  # PART is not nothing
DECAY = Range(0, 1, high_open=True)  # and not all of what was before
TOKENS = Range(3)  # one word between a first and a last token

RANGES = {
    "seed": ANY,
    **{f"data.{name}": SOME for name in ("size", "crop", "threads", "prefetch")},
    **{f"data.{name}": ANY for name in ("decode_cache", "pack")},
    "data.shares": POSITIVE,
    "data.text_length": TOKENS,
    "data.mask_lower_edge": DECAY,
    "data.evidence.phrases": SOME,
    "data.evidence.length": TOKENS,
    "data.evidence.pack": ANY,
    "data.pairing.ratio": PART,
    "data.pairing.share": PART,
    "data.pairing.passes": ANY,
    "data.pairing.related": SHARE,
    **{f"data.view.{name}": SHARE for name in ("flip", "flip_horizontal", "flip_vertical")},
    **{f"data.view.{name}": SHARE for name in ("perspective_probability", "autocontrast")},
    "data.view.rotation": Range(0, 180),
    "data.view.perspective": DECAY,
    **{f"optim.{name}": DECAY for name in ("b1", "b2")},
    **{f"optim.{name}": ANY for name in ("warmup", "floor", "weight_decay", "clip")},
    "optim.lr": POSITIVE,
    **{f"train.{name}": SOME for name in ("steps", "batch_size", "chunks", "log_every", "keep")},
    **{f"train.{name}": ANY for name in ("checkpoint_every", "keep_every", "refresh_every")},
    **{f"train.{name}": ANY for name in ("evaluate_every", "evaluate_limit")},
    **{f"mlm.{name}": SOME for name in ("steps", "batch_size")},
    **{f"mlm.{name}": ANY for name in ("warmup", "weight_decay", "seed")},
    "mlm.lr": POSITIVE,
    "mlm.rate": PART,
    "evals.batch_size": SOME,
    **{f"evals.{name}": ANY for name in ("limit", "probe_limit", "resamples")},
    "evals.masked_edge": Range(0, 1, low_open=True, high_open=True),  # of the image's height
    "evals.grounding.smoothing": ANY,
    **{f"recipe.{name}": SOME for name in ("dim", "lesions", "depth", "num_heads", "neighbours")},
    **{f"recipe.{name}": ANY for name in ("loss_tile", "hops", "shrinkage", "strength")},
}


def check(config: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse a number outside of what its setting can have.

    Args:
      config: resolved, or a section of it.
      prefix: "evals." where it is that section.

    Raises:
      UserError: naming the first one and what would be accepted.
    """
    for name, value in flatten(config, prefix):
        if (accepted := RANGES.get(name)) is None:
            continue
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int | float) and number not in accepted:
                raise UserError(f"{name}={value} must be {accepted}.")
