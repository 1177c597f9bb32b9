"""Does injection work: what low-rank MLM on a risk corpus does to a small text encoder.

    python benchmarks/injection.py [--seeds 3] [--steps 300]
        [--out benchmarks/results/injection.json]

A small ModernBERT first learns the language of generated reports and patient tables, which say
nothing of risks. Then its low-rank factors (PRIMA's stage "inject") learn the paragraphs the
template writes from the phantom's disease model. Before and after, and after the same training on
a corpus whose risks are dealt at random ("shuffled"), for every seed:

* masked-token loss on paraphrases that were held out;
* how alike the table texts of different, new patients with the same risk profile are: cosine of
  the embedding, centred over all patients, within a profile and between profiles, and the share
  of a patient's ten nearest neighbours that have the same profile. A profile is the disease whose
  log odds the table raises most, in standard deviations over the patients.

Seven minutes on two CPU cores with 300 steps.
"""

import argparse
import json
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from medvlp_jax import cli, convert, sharding
from medvlp_jax.convert import lora
from medvlp_jax.data import knowledge, pipeline
from medvlp_jax.data import text as tokenisation
from medvlp_jax.data.datasets.cxr_phantom import generate, patients
from medvlp_jax.encoders.base import pool
from medvlp_jax.evaluation import masked_tokens
from medvlp_jax.evidence import backends, corpus, risk, template
from medvlp_jax.layers import Lora
from medvlp_jax.recipes import mlm
from medvlp_jax.training import optim
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training
from medvlp_jax.training import text as text_stage
from medvlp_jax.writing import replaced

LENGTH, TABLE_LENGTH = 128, 64  # tokens of a paragraph, of a table
BASE = {"steps": 250, "batch_size": 16, "lr": 2e-3, "warmup": 25, "weight_decay": 0.01, "rate": 0.3}
INJECT = {"batch_size": 8, "lr": 2e-3, "weight_decay": 1e-3}
STEPS, LONGEST_WARMUP = 300, 100
FACTORS = Lora(8, 16.0, 0.05, "", fused=True)  # PRIMA, stage 1b
HELD_OUT, VARIANTS = "template:3", 4
PATIENTS, NEIGHBOURS = 400, 10
LEVELS = {"sex": ("female", "male"), "fever": ("no", "yes"), "cough": ("no", "yes")}


def tables(seed: int, count: int) -> list[dict]:
    """Return complete tables of patients, categories by name."""
    found = []
    for who in patients.population(seed, count):
        values = patients._before_disease(patients.stream(seed, who.index, 0, "visit"), who, 0)
        found.append({k: LEVELS[k][int(v)] if k in LEVELS else v for k, v in values.items()})
    return found


def table_text(table: risk.Risk, values: dict) -> str:
    """Write a patient's table as metadata reaches the encoder."""
    return " ".join(factor.sentence(values[key]) for key, factor in table.factors.items())


def profiles(table: risk.Risk, rows: list[dict]) -> np.ndarray:
    """Return the disease [N] each table raises most, in standard deviations over the rows."""
    odds = np.array(
        [
            [sum(f.effect(row[k], d) for k, f in table.factors.items()) for d in table.diseases]
            for row in rows
        ]
    )
    return ((odds - odds.mean(0)) / odds.std(0)).argmax(1)


def shuffled(table: risk.Risk, seed: int) -> risk.Risk:
    """Deal the diseases anew for each factor: as many risks as before, none of them true."""
    rng = np.random.default_rng(seed)
    factors = {}
    for key, factor in table.factors.items():
        names = dict(zip(table.diseases, rng.permutation(table.diseases).tolist(), strict=True))
        deal = lambda odds, names=names: {names[d]: v for d, v in odds.items()}
        levels = {level: deal(odds) for level, odds in factor.levels.items()}
        factors[key] = factor._replace(levels=levels, log_odds=deal(factor.log_odds))
    return table._replace(version=f"shuffled-{seed}", factors=factors)


def paragraphs(table: risk.Risk, folder: pathlib.Path) -> tuple[list[str], list[str]]:
    """Have the template write a corpus; return its training and held-out texts."""
    backend = backends.writer("template", template.writer(table))
    corpus.run(corpus.from_table(table, variants=VARIANTS), backend, folder)
    settings = {"held_out": (HELD_OUT,), "allow_unvetted": True}
    splits = (knowledge.open_texts(folder, split, **settings) for split in ("train", "test"))
    return tuple([text for text, _ in split.texts()] for split in splits)


def base_encoder(table: risk.Risk, tokenizer, mesh, folder: pathlib.Path) -> pathlib.Path:
    """Train the encoder that knows the language and no risks; return its folder."""
    reports = [
        " ".join(generate.plan(7, who, 0).report[:2]) for who in patients.population(7, 1500)
    ]
    texts = [*reports, *(table_text(table, row) for row in tables(8, 1500))]
    spec = {"name": "modernbert", "variant": "tiny", "vocab_size": tokenizer.get_vocab_size()}
    return text_stage.pretrain(
        list(dict.fromkeys(texts)),
        encoder={**spec, "pad_id": tokenisation.pad_id(tokenizer)},
        tokenizer=tokenizer,
        mesh=mesh,
        folder=folder,
        text_length=TABLE_LENGTH,
        seed=0,
        **BASE,
    )


class Bench:
    """The programs, compiled once for all seeds: what differs between them are numbers."""

    def __init__(self, recipe, params, tokenizer, held_out: list[str], tables: list[str], inject):
        """Prepare the step and what is measured; `inject` are the settings of the training."""
        self.recipe, self.tokenizer, self.settings = recipe, tokenizer, inject
        trainable, _ = paths.split(params, recipe.frozen)
        fields = {k: v for k, v in inject.items() if k != "batch_size"}
        self.tx, rate = optim.make(trainable, name="adamw", clip=1.0, **fields)
        self.step = training.make_train_step(recipe, self.tx, rate, seed=0)
        self.share = paths.count(trainable) / paths.count(params)
        self.held_out = tokenisation.tokenize(tokenizer, held_out, LENGTH)
        self.tables = tokenisation.tokenize(tokenizer, tables, TABLE_LENGTH)
        self.encode = jax.jit(lambda p, b: recipe.apply({"params": p}, b, method="encode"))
        self.tokens = jax.jit(lambda p, t: recipe.text.apply({"params": p["text"]}, t).tokens)

    def inject(self, params, texts: list[str], *, seed: int):
        """Train the low-rank factors on paragraphs; return all parameters."""
        variables = jax.tree.map(jnp.array, {"params": params})  # the step gives its own away
        state = training.make_state(variables, self.tx, self.recipe.frozen)
        batches = iter(
            pipeline.train_dataset(
                [texts],
                transform=pipeline.mlm_transform(self.tokenizer, length=LENGTH),
                batch_size=self.settings["batch_size"],
                seed=seed,
            )
        )
        for _ in range(self.settings["steps"]):
            rows = next(batches)
            state, metrics = self.step(state, {"report": rows["report"]})
        if not np.isfinite(float(metrics["loss"])):
            raise FloatingPointError(f"seed {seed}: the loss is {float(metrics['loss'])}")
        return state.variables["params"]

    def measure(self, params, kinds: np.ndarray) -> dict:
        """Return the masked-token loss and how alike the texts of a profile are."""
        found = jax.device_get(self.encode(params, {"report": self.held_out}))
        scored = masked_tokens.run(
            found["masked_loss"],
            found["masked_count"],
            vocab_size=self.recipe.vocab_size,
            rate=self.recipe.rate,
            resamples=0,
        )
        tokens = self.tokens(params, self.tables)
        return {"masked_loss": scored["masked_tokens/knowledge/loss"]["value"]} | {
            pooling: likeness(np.asarray(pool(tokens, self.tables.mask, pooling), float), kinds)
            for pooling in ("cls", "mean")
        }


def likeness(features: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """Compare pairs of one profile with pairs of two."""
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    same = kinds[:, None] == kinds
    other = ~np.eye(len(kinds), dtype=bool)
    raw = unit(features) @ unit(features).T
    centred = unit(features - features.mean(0))
    cosine = centred @ centred.T
    nearest = np.argsort(-np.where(other, cosine, -np.inf), axis=1)[:, :NEIGHBOURS]
    return {
        "raw_within": raw[same & other].mean(),
        "raw_between": raw[~same].mean(),
        "within": cosine[same & other].mean(),
        "between": cosine[~same].mean(),
        "neighbours": (kinds[nearest] == kinds[:, None]).mean(),
    }


def study(seeds: int, steps: int, scratch: pathlib.Path) -> dict:
    """Measure everything."""
    inject = INJECT | {"steps": steps, "warmup": min(steps // 10, LONGEST_WARMUP)}
    tokenizer = tokenisation.load_tokenizer("risk")
    table = risk.read("cxr_phantom")
    began = time.perf_counter()
    folder = base_encoder(table, tokenizer, sharding.make_mesh(), scratch / "base")
    seconds = {"base": time.perf_counter() - began}
    encoder, variables = convert.load(folder)
    train, held_out = paragraphs(table, scratch / "true")
    rows = tables(9, PATIENTS)
    kinds, bench, runs = profiles(table, rows), None, []
    for seed in range(seeds):
        began = time.perf_counter()
        module, start = lora.attach(encoder, variables, FACTORS, jax.random.key(seed))
        params = {"text": start["params"]}
        if bench is None:
            recipe = mlm.make(
                text=module, weights={"mlm": 1.0}, rate=BASE["rate"], **mlm.token_fields(tokenizer)
            )
            texts = [table_text(table, row) for row in rows]
            bench = Bench(recipe, params, tokenizer, held_out, texts, inject)
        wrong, _ = paragraphs(shuffled(table, seed), scratch / f"shuffled-{seed}")
        entry = {"seed": seed, "before": bench.measure(params, kinds)}
        for name, corpus_texts in (("after", train), ("shuffled", wrong)):
            entry[name] = bench.measure(bench.inject(params, corpus_texts, seed=seed), kinds)
        seconds[f"seed {seed}"] = time.perf_counter() - began
        runs.append(entry)
        print(json.dumps(entry), flush=True)
    return {
        "settings": {"base": BASE, "inject": inject, "lora": FACTORS._asdict(), "length": LENGTH},
        "train_texts": len(train),
        "held_out_texts": len(held_out),
        "trainable_share": bench.share,
        "patients": PATIENTS,
        "profiles": np.bincount(kinds, minlength=len(table.diseases)).tolist(),
        "neighbours_chance": float((np.bincount(kinds) ** 2).sum() / len(kinds) ** 2),
        "device": jax.devices()[0].device_kind,
        "seconds": seconds,
        "runs": runs,
    }


def summary(found: dict) -> str:
    """Return a Markdown table of means over the seeds, the least and the most in brackets."""
    lines = ["| | before | after | shuffled risks |", "|---|---|---|---|"]
    metrics = [("masked-token loss, held-out paraphrases", ("masked_loss",))]
    for pooling in ("cls", "mean"):
        for key in ("within", "between", "neighbours", "raw_within", "raw_between"):
            metrics.append((f"{pooling}: {key.replace('_', ' ')}", (pooling, key)))
    for title, path in metrics:
        cells = []
        for name in ("before", "after", "shuffled"):
            values = []
            for run in found["runs"]:
                value = run[name]
                for key in path:
                    value = value[key]
                values.append(value)
            cells.append(f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, and write every number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="of injection")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        found = study(options.seeds, options.steps, pathlib.Path(scratch))
    print(summary(found))
    print({name: round(s, 1) for name, s in found["seconds"].items()})
    if options.out:
        with replaced(options.out) as scratch:
            scratch.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    cli.leave(cli.run(main))
