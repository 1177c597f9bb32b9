"""Rows that are no pairs, and what a method learns about them from the whole corpus.

For recipes that read "paired": `streams` makes their rows. For those that relate images to reports
(`base.relates`) `begin` makes their prototypes, `refresher` what the loop calls between steps. All
are functions of config, seed and state alone, so that a resumed run repeats them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from medvlp_jax import assemble, distributed, examples, sharding
from medvlp_jax.config import UserError
from medvlp_jax.data import pairing, pipeline
from medvlp_jax.evaluation import features
from medvlp_jax.recipes import base
from medvlp_jax.training import step as training
from medvlp_jax.training.stopping import Signals, Stopped

RELATIONS = "relations"  # the collection of the state that holds them
TOLD = ("evidence", "evidence_mask")
FIRST_PASS = 4096  # reports whose phrases the prototypes start from


def pools(parts: assemble.Parts, sources) -> pairing.Pools | None:
    """Part the studies as data.pairing says; None where the recipe reads pairs alone.

    Raises:
      UserError: for several corpora, or balanced classes.
    """
    if "paired" not in parts.recipe.inputs:
        return None
    data = parts.config["data"]
    if len(sources) != 1:
        raise UserError(f"data.pairing takes one corpus, got {len(sources)}.")
    if data["balance"]:
        raise UserError(f"data.balance={data['balance']} does not go with data.pairing.")
    patients = [sources[0][i]["patient_id"] for i in range(len(sources[0]))]
    return pairing.split(
        patients,
        ratio=data["pairing"]["ratio"],
        variant=data["pairing"]["variant"],
        seed=parts.config["seed"],
    )


def streams(
    parts: assemble.Parts, source, found: pairing.Pools, related: pairing.Related
) -> tuple[list, tuple[float, ...]]:
    """Return the sources of rows, pairs and others, and the share of each in a batch.

    Pairs fill data.pairing.share of the rows, or less, so that none of them is seen more often than
    data.pairing.passes times in the whole training.

    Raises:
      UserError: for a share of related reports outside [0, 1].
    """
    settings = parts.config["data"]["pairing"]
    share, neighbours = settings["share"], settings["related"]
    if not 0 <= neighbours <= 1:
        raise UserError(f"data.pairing.related must be in 0 .. 1, got {neighbours}.")
    pairs = pairing.Pairs(source, found)
    apart = pairing.Unpaired(source, found, parts.config["seed"], neighbours, related)
    if settings["passes"]:
        train = parts.config["train"]
        rows = train["steps"] * train["batch_size"]
        share = min(share, settings["passes"] * len(pairs) / rows)
    if share == 1 or len(apart) == 0:
        return [pairs], (1.0,)
    return [pairs, apart], (share, 1 - share)


def begin(parts: assemble.Parts, variables: dict, source, found: pairing.Pools) -> dict:
    """Return the variables with prototypes from a first pass over reports, and empty relations.

    Those of a recipe that relates nothing stay as they are. The relations are of the corpus and not
    of the model: no evaluation loads them. A run that starts from another one's parameters keeps
    its prototypes.
    """
    count = len(found.pairs)
    distributed.say(
        f"Limited pairing: {count} pairs; {len(found.images) - count} images and "
        f"{len(found.reports) - count} reports apart."
    )
    if not base.relates(parts.recipe):
        return variables
    if parts.config["train"]["refresh_every"]:
        parts.recipe.check_sizes(len(found.images), len(found.reports))
    empty = parts.recipe.no_relations(len(found.images))
    if not parts.config["init"]["params"]:
        rows = found.reports[:FIRST_PASS]
        placed = assemble.place(variables, parts)
        raw = encoder(parts, source)(placed, rows, TOLD, ("phrases_raw",))["phrases_raw"]
        params = parts.recipe.start(variables["params"], raw, parts.config["seed"])
        variables = {**variables, "params": params}
    return {**variables, RELATIONS: empty}


def recall(state, related: pairing.Related) -> None:
    """Let the rows know the relations of a state, as they did when it was saved, if it has any."""
    if RELATIONS not in state.collections:
        return
    kept = distributed.fetch(state.collections[RELATIONS])
    related.learn(kept["column"], kept["weight"], kept["confidence"])


def refresher(
    parts: assemble.Parts,
    source,
    found: pairing.Pools,
    related: pairing.Related,
    stop: Signals,
) -> Callable[[Any], Any]:
    """Return state -> state with the relations as its own model sees the corpus.

    Where the optimiser keeps an average of the weights (optim.average), that is what looks: a mean
    teacher (Tarvainen and Valpola 2017, https://arxiv.org/abs/1703.01780).

    All processes encode their share of the corpus, and all devices their share of the graphs and
    hops; `related` is told the result. What it returns raises Stopped, in all processes, when one
    of them was asked to stop.
    """
    encode = encoder(parts, source, stop)
    mesh = parts.mesh if parts.mesh.size > 1 else None

    def refresh(state):
        variables = {k: v for k, v in state.evaluated.items() if k != RELATIONS}
        images = encode(variables, found.images, ("image",), parts.recipe.described)
        reports = encode(variables, found.reports, parts.recipe.told_by, parts.recipe.told)
        made = parts.recipe.refresh(images, reports, len(found.pairs), mesh=mesh)
        made = jax.tree.map(np.asarray, made)
        trust = made["confidence"][len(found.pairs) :]
        if len(trust):
            distributed.say(
                f"Step {int(state.step)}: {(trust > 0).mean():.0%} of {len(trust)} images apart "
                f"have relations, with a mean confidence of {trust.mean():.2f}."
            )
        related.learn(made["column"], made["weight"], made["confidence"])
        kept = state.collections[RELATIONS]
        # Where the state's own lie, so that the step is the same program.
        made = {name: jax.device_put(made[name], kept[name].sharding) for name in kept}
        return state._replace(collections={**state.collections, RELATIONS: made})

    return refresh


def encoder(parts: assemble.Parts, source, stop: Signals | None = None) -> Callable:
    """Return (variables, rows of the source, batch keys, names) -> features of each row."""
    embed = training.make_embed(parts.recipe, parts.mesh)
    # One for all passes, for it remembers what it has decoded and read.
    transform_of = functools.cache(
        lambda inputs: examples.record_transform(parts, inputs, train=False)
    )

    def encode(variables, rows, inputs, keys):
        batches = pipeline.eval_batches(
            pairing.Nodes(source, rows),
            transform=transform_of(inputs),
            batch_size=sharding.whole_batch(parts.mesh, parts.config["evals"]["batch_size"]),
            process_index=parts.part.index,
            process_count=parts.part.count,
            **examples.loading(parts.config["data"]),
        )

        def read(batch):
            if stop and distributed.any_process(lambda: stop.asked, parts.mesh)():
                raise Stopped
            return embed(variables, {name: batch[name] for name in inputs})

        return features.extract(read, batches, keys=keys, part=parts.part)

    return encode
