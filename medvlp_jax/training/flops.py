"""Floating-point operations of a traced program, by part, before anything is compiled.

Counted from the jaxpr, whose operations carry the names of the modules they come from. XLA's own
count takes the body of a loop once, however often it runs, and tiles, chunks and scanned layers are
loops. A multiplication with addition is 2; elementwise arithmetic and reductions are 1 an element;
moving, comparing, choosing, random bits and what a custom call does are 0. cuDNN's attention counts
as its matrix products do without it: two forward and four backward, also of pairs that are masked.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

# One operation for each element of the result.
# fmt: off
ELEMENTWISE = (
    "add", "sub", "mul", "div", "rem", "max", "min", "neg", "abs", "sign", "floor", "ceil", "round",
    "exp", "exp2", "expm1", "log", "log1p", "sqrt", "rsqrt", "cbrt", "tanh", "logistic", "erf",
    "erfc", "erf_inv", "sin", "cos", "pow", "integer_pow", "square", "add_any",
)
# One for each element of the operand.
REDUCTIONS = (
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin", "cumsum", "cummax",
    "cumlogsumexp", "cumprod",
)
# fmt: on
CUDNN = "dot_product_attention_"  # then fwd or bwd; query and key [B, T, A, S] first
SIDES = {"image": "image encoder", "text": "text encoder", "llm": "language model"}
RECOMPUTED = "rematted_computation"  # how JAX names what a backward pass makes again


class Operation(NamedTuple):
    """One operation of a program.

    Attributes:
      name: scopes from outside in, "jvp(Clip.encode)/image/stack/block_0/mlp/up".
      flops: of all its repetitions on all devices.
    """

    name: str
    flops: int


def by_part(jaxpr, part_of: Callable[[str], str]) -> tuple[Counter, Counter]:
    """Sum the operations of a ClosedJaxpr by part.

    Args:
      jaxpr: of the step, for instance `jitted.trace(...).jaxpr`.
      part_of: name of an operation -> part.

    Returns:
      ({part: FLOPs}, {part: FLOPs of it that a backward pass makes again to save memory}).
    """
    total, again = Counter(), Counter()
    for name, flops in operations(jaxpr):
        part = part_of(name)
        total[part] += flops
        again[part] += flops * (RECOMPUTED in name)
    return total, again


def step_part(name: str) -> str:
    """Name the part of a training step an operation belongs to.

    The encoders are the submodules `image`, `text` and `llm` of a recipe; "heads" is the rest of
    `encode`.
    """
    for side, part in SIDES.items():
        if re.search(rf"(^|[/(]){side}([/)]|$)", name):
            return part
    if ".objective" in name:
        return "loss"
    return "heads" if ".encode" in name or "jvp(" in name else "optimiser"


def operations(jaxpr) -> Iterator[Operation]:
    """Yield every operation of a ClosedJaxpr that its results need, loops unfolded."""
    needed, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    yield from _unfold(needed, "", 1)


def _unfold(jaxpr, outside, times):
    """Yield the operations of a program that stands in scope `outside` and runs `times`."""
    for eqn in jaxpr.eqns:
        name = "/".join(filter(None, (outside, str(eqn.source_info.name_stack))))
        kind, params = eqn.primitive.name, eqn.params
        if kind == "cond":
            # Whatever is chosen costs no more than the dearest branch.
            branches = [list(_unfold(b.jaxpr, name, times)) for b in params["branches"]]
            yield from max(branches, key=lambda found: sum(op.flops for op in found))
        elif inner := list(_inner(params)):
            repeats = times * (params["length"] if kind == "scan" else 1)
            if kind == "shard_map":  # written for the share of one device
                split = {axis for spec in params["in_specs"] for axis in _axes(spec)}
                repeats *= math.prod(params["mesh"].shape[axis] for axis in split)
            if not kind.startswith("scatter"):  # its inner program is only how numbers are combined
                for program in inner:
                    yield from _unfold(program, name, repeats)
        elif flops := _flops(kind, eqn):
            yield Operation(name, times * flops)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if isinstance(item, Jaxpr):
                yield item


def _axes(spec) -> Iterator[str]:
    for entry in spec:
        yield from (entry,) if isinstance(entry, str) else entry or ()


def _flops(kind, eqn) -> int:
    out, operands = eqn.outvars[0].aval, [v.aval for v in eqn.invars]
    if kind == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * out.size * math.prod(operands[0].shape[axis] for axis in contracted)
    if kind == "conv_general_dilated":
        return _convolution(eqn.params, *operands, out)
    if kind.startswith(CUDNN):
        (batch, queries, heads, width), keys = operands[0].shape, operands[1].shape[1]
        products = 4 if "_bwd" in kind else 2
        return 2 * products * batch * heads * queries * keys * width
    if kind in ELEMENTWISE and np.issubdtype(out.dtype, np.inexact):
        return out.size
    if kind in REDUCTIONS and np.issubdtype(operands[0].dtype, np.inexact):
        return operands[0].size
    return 0


def _convolution(params, x, kernel, out) -> int:
    """Count the products of a kernel element with an element of x; holes and padding are none."""
    numbers = params["dimension_numbers"]
    products = 1
    for i, (low, _) in enumerate(params["padding"]):
        size = x.shape[numbers.lhs_spec[2 + i]]
        taps, places = kernel.shape[numbers.rhs_spec[2 + i]], out.shape[numbers.out_spec[2 + i]]
        hole, spread = params["lhs_dilation"][i], params["rhs_dilation"][i]
        at = np.add.outer(
            np.arange(places) * params["window_strides"][i] - low, np.arange(taps) * spread
        )
        products *= int(((at >= 0) & (at <= (size - 1) * hole) & (at % hole == 0)).sum())
    batch, features = (out.shape[axis] for axis in numbers.out_spec[:2])
    return 2 * batch * features * kernel.shape[numbers.rhs_spec[1]] * products
