"""From records to examples and batches: images, views, tables and texts as a config says."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from medvlp_jax import checks, clinical, sharding, tables
from medvlp_jax import config as configs
from medvlp_jax.assemble import SECTIONS, Parts, evidence_batch
from medvlp_jax.config import UserError
from medvlp_jax.data import corpora, packing, pipeline, records, scans, transforms, volumes
from medvlp_jax.evidence import phrases
from medvlp_jax.training import text as text_stage

VOLUME_VIEW = "men"


def train_batches(parts: Parts, sources, features=None, *, shares=None):
    """Return the iterator of this process's training batches.

    Args:
      parts: of the run.
      sources: of rows.
      features: cached text features by text.
      shares: of each source in a batch; None takes data.shares.
    """
    data = parts.config["data"]
    recipe = parts.recipe
    reads_table, told = "tabular" in recipe.inputs, None
    if clinical.reads_metadata(recipe):
        told = clinical.told_of(data, sources, recipe.task, train=True)
    return iter(
        pipeline.train_dataset(
            sources,
            transform=record_transform(
                parts,
                parts.recipe.inputs,
                train=True,
                features=features,
                table=tables.rows_of(data, sources) if reads_table else None,
                images=sources[0].images,
                told=told,
                pair_from=sources,
            ),
            batch_size=parts.config["train"]["batch_size"],
            seed=parts.config["seed"],
            weights=shares or data["shares"] or None,
            balance=data["balance"],
            process_index=parts.part.index,
            process_count=parts.part.count,
            **loading(data),
            pack=packing_of(parts),
        )
    )


def loading(data: Mapping[str, Any]) -> dict[str, int]:
    """Return how many batches are made at the same time, and how many are kept ready."""
    return {name: data[name] for name in ("threads", "prefetch")}


def packing_of(parts: Parts) -> packing.Packing | None:
    """Return what packs the texts of this process's batches, as data.pack says; None: nothing."""
    shares = checks.packed(parts.config, parts.recipe, parts.mesh)
    devices = sharding.batch_devices(parts.mesh) // parts.part.count
    return packing.Packing(shares, devices) if shares else None


def cached_text(parts: Parts, variables: Mapping, sources) -> dict[str, np.ndarray] | None:
    """Encode all training texts once, where the recipe reads cached features; else None."""
    if not any(key.endswith("_feature") for key in parts.recipe.inputs):
        return None
    wanted, texts = "pooled", pipeline.mlm_texts
    if "metadata_feature" in parts.recipe.inputs:
        data, task = parts.config["data"], parts.recipe.task
        told = clinical.told_of(data, sources, task, train=True)
        wanted, texts = "tokens", functools.partial(clinical.texts_of, told)
    apply = parts.recipe.text.apply
    encode = jax.jit(lambda p, tokens: getattr(apply({"params": p}, tokens), wanted))
    held = jax.device_put(variables["params"]["text"])
    blank = [""] if getattr(parts.recipe, "reads_blank", False) else []
    return text_stage.cache_features(
        [*texts(sources), *blank],
        lambda tokens: encode(held, tokens),
        tokenizer=parts.tokenizer,
        length=parts.config["data"]["text_length"],
    )


def record_transform(
    parts: Parts,
    inputs: Sequence[str],
    *,
    train: bool,
    features=None,
    table: tables.Rows | None = None,
    images: records.Images | None = None,
    told=None,
    pair_from: Sequence[corpora.Source] = (),
    mask=None,
):
    """Return record -> example for the given batch keys: random views in training, else the centre.

    Args:
      parts: of the run.
      inputs: batch keys.
      train: random views, no labels.
      features: cached text features by text.
      table: see `tables.rows_of`, for the key "tabular".
      images: further images of the corpus, see `corpora.Source.images`.
      told: how tables become texts, see `clinical.told_of`.
      pair_from: sources in which the second of two scans is looked for.
      mask: share of the lower edge to blacken; None takes data.mask_lower_edge.
    """
    data = parts.config["data"]
    check_view(data, images or {}, inputs)
    decode = functools.lru_cache(maxsize=data["decode_cache"])(
        functools.partial(
            transforms.decode,
            size=data["size"],
            channels=data["channels"],
            crop_black_border=data["crop_black_border"],
            stretch=data["stretch"],
            legacy_wrap=data["legacy_wrap"],
            fit=data["fit"],
        )
    )
    fraction = data["mask_lower_edge"] if mask is None else mask
    if fraction:
        whole = decode
        decode = lambda encoded: transforms.mask_lower_edge(whole(encoded), fraction)
    view = functools.partial(transforms.center_view, size=data["crop"])
    if train and data["view"]["name"] != VOLUME_VIEW:
        view = random_view(data)
    further = {
        name: _further_image(name, spec, decode, view, data, train=train)
        for name, spec in (images or {}).items()
        if name in inputs
    }
    pair = None
    if train and "image_2" in inputs and "siblings" in data:
        recipe = parts.recipe
        pair = clinical.pair_of(data, pair_from, recipe.images, decode, recipe.task)
    return pipeline.record_transform(
        inputs=inputs,
        decode=decode,
        view=view,
        tokenizer=parts.tokenizer,
        lengths=dict.fromkeys((*SECTIONS, "metadata"), data["text_length"]),
        features=features,
        table=table,
        images=further,
        told=told,
        pair=pair,
        evidence=evidence_of(data) if "evidence" in inputs else None,
        train=train,
    )


def evidence_of(data: Mapping[str, Any]) -> pipeline.Evidence:
    """Return where the phrases of a report come from, as data.evidence says."""
    settings = data["evidence"]
    read = phrases.reader(**{name: settings[name] for name in ("folder", "unit", "negated")})
    return pipeline.Evidence(read, settings["phrases"], settings["length"])


def evidence_in(texts: Sequence[str], parts: Parts) -> dict[str, Any]:
    """Return "evidence" and "evidence_mask" of prompts, by rules: no extraction has read them.

    A text in which the rules find nothing is a phrase as it is.
    """
    settings = parts.config["data"]["evidence"]
    read = phrases.reader(unit=settings["unit"], negated=settings["negated"])
    told = [phrases.in_prompt(text, read) or (text,) for text in texts]
    return evidence_batch(parts.tokenizer, parts.config["data"], told)


def check_view(data: Mapping[str, Any], images: records.Images, inputs: Sequence[str]) -> None:
    """Refuse a view that does not exist or does not fit the further images of a corpus.

    Args:
      data: settings.
      images: see `corpora.Source.images`.
      inputs: batch keys: the images that are read.

    Raises:
      UserError: likewise for a volume whose view is one of images, or the other way round.
    """
    random_view(data)
    view = data["view"]["name"]
    for name, spec in images.items():
        if name not in inputs:
            continue
        is_volume = "slices" in spec
        if is_volume != (view == VOLUME_VIEW):
            kind, fits = (
                ("a volume", VOLUME_VIEW) if is_volume else ("an image", "cfcml, imitate, prima")
            )
            raise UserError(
                f"data.view.name={view} does not fit '{name}', {kind}; accepted: {fits}."
            )


def _further_image(name, spec, decode, view, data, *, train) -> pipeline.Transform:
    """Return (record, rng) -> view of a further image, by what the corpus says it is."""
    settings = data["view"]
    if "slices" in spec:
        read = functools.lru_cache(maxsize=data["decode_cache"])(
            functools.partial(volumes.decode, slices=spec["slices"], size=data["size"])
        )
        centre = functools.partial(
            volumes.center_view, size=data["crop"], ceiling=settings["ceiling"]
        )
        see = random_view(data) if train else centre
        return lambda record, rng: see(read(record["images"][name]), rng)
    return lambda record, rng: view(scans.image_of(record, name, spec, decode), rng)


def random_view(data: Mapping[str, Any]) -> Callable:
    """Return the (image, rng) -> view of data.view: its name and its settings.

    Raises:
      UserError: for a view that does not exist.
    """
    settings = dict(data["view"])
    name = settings.pop("name")
    views = {
        "imitate": transforms.imitate_view,
        "cfcml": transforms.cfcml_view,
        "prima": transforms.prima_view,
        VOLUME_VIEW: volumes.men_view,
    }
    if name not in views:
        raise UserError(f"No view '{name}'. {configs.nearest(name, list(views))}")
    return functools.partial(views[name], size=data["crop"], **settings)
