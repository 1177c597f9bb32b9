"""From a resolved config to the parts of a run: tokenizer, recipe, corpora, batches, weights.

What `train`, `evaluate` and `convert export` share. Takes plain dicts, never a ConfigDict.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from medvlp_jax import clinical, convert, distributed, sharding, tables, weights
from medvlp_jax import config as configs
from medvlp_jax.config import UserError
from medvlp_jax.data import corpora, folds, knowledge, pipeline, records, transforms, volumes
from medvlp_jax.data import text as tokenisation
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.evidence import phrases
from medvlp_jax.recipes import mlm
from medvlp_jax.training import params as paths
from medvlp_jax.training import text as text_stage
from medvlp_jax.training.step import init_variables

CONFIG = "config.json"
VOLUME_VIEW = "men"
SECTIONS = ("findings", "impression", "report")


class Parts(NamedTuple):
    """A run without its state.

    Attributes:
      config: resolved, nested plain dict.
      recipe: the method, a Linen module.
      tokenizer: of the `tokenizers` library; None where the recipe reads no text.
      mesh: over all devices.
      part: which rows of every batch this process has.
      loaded: variables that replace freshly initialised ones: {"image": ..., "text": ...}.
    """

    config: Mapping[str, Any]
    recipe: Any
    tokenizer: Any
    mesh: jax.sharding.Mesh
    part: sharding.Part
    loaded: Mapping[str, Mapping]


def read_config(folder: pathlib.Path) -> dict:
    """Read the resolved config of a run folder; JSON's lists become tuples again.

    Raises:
      UserError: if the folder holds no run, or its config is no JSON.
    """
    file = pathlib.Path(folder) / CONFIG
    if not file.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}.")
    try:
        return _tuples(json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}.") from None


def open_corpora(data: Mapping[str, Any], split: str) -> list[corpora.Source]:
    """Open the split of every corpus; prepares what needs nothing from the user."""
    return [open_corpus(name, data, split) for name in data["corpora"]]


def open_corpus(name: str, data: Mapping[str, Any], split: str) -> corpora.Source:
    """Open one corpus, "name" or "name:variant"; with data.folds, a split of a fold of it."""
    if name == knowledge.NAME:
        return knowledge.open_texts(split=split, **data["knowledge"])
    name, _, variant = name.partition(":")
    where = {"data_dir": data["data_dir"], "manual_dir": data["manual_dir"]}
    where["builder_config"] = variant
    with distributed.writer_first(f"corpus {name}"):
        if not data["folds"]["count"]:
            return corpora.open_source(name, split, **where)
        sources = corpora.open_all(name, **where)
    return folds.open_fold(sources, split, **folds.settings(data))


def parts(config: Mapping[str, Any], *, pretrained: bool = True) -> Parts:
    """Build tokenizer, mesh and recipe, and find the weights to start from.

    Args:
      config: resolved config.
      pretrained: False leaves out weights that a checkpoint will replace anyway.

    Raises:
      UserError: for settings that do not fit together.
    """
    init, data = config["init"], config["data"]
    try:
        mesh = sharding.make_mesh(**{k: config["mesh"][k] for k in sharding.AXES})
        part = sharding.part_of(mesh)
    except ValueError as error:
        raise UserError(f"{error}.") from None
    spec = dict(config["recipe"])
    name = spec.pop("name")
    loaded = {}
    tokenizer = None
    folders = {"image": init["image"]}
    if "llm" in spec:
        spec |= language_model(spec, config)
        folders["llm"] = init["llm"]
    if "text" in spec:
        tokenizer = load_tokenizer(config)
        spec["text"] = _text_spec(spec["text"], tokenizer, data)
        folders["text"] = init["text"]
    elif init["text"]:
        raise UserError(f"init.text={init['text']}, but recipe {name} has no text encoder.")
    if folders.get("text") == "mlm":
        # The spec says all about this encoder; only its weights lie in a folder.
        trained = text_encoder_folder(config, spec["text"], tokenizer, mesh) if pretrained else ""
        folders["text"] = trained
    if name == "mlm":
        spec = mlm.completed(spec, tokenizer)
    for side, folder in folders.items():
        if folder:
            # The folder says what the architecture is, the config how it is run.
            spec[side], variables = weights.load_encoder(folder, spec[side], config["seed"])
            if pretrained:
                loaded[side] = variables
    recipe = configs.build("medvlp_jax.recipes", name, **spec)
    return Parts(config, recipe, tokenizer, mesh, part, loaded)


def load_tokenizer(config: Mapping[str, Any]):
    """Load data.tokenizer; "train" learns a vocabulary from the training reports, once."""
    data = config["data"]
    if data["tokenizer"] != "train":
        folder = data["tokenizer"] or _fetched(config["init"]["text"])
        return tokenisation.load_tokenizer(folder)
    texts = pipeline.mlm_texts(open_corpora(data, data["split"]))
    name = text_stage.fingerprint(data["vocab_size"], sorted(texts))
    folder = _derived(config) / "vocabulary" / name
    with distributed.writer_first("vocabulary"):
        if not (folder / "tokenizer.json").is_file():
            tokenisation.train_wordpiece(texts, vocab_size=data["vocab_size"], out_dir=folder)
    return tokenisation.load_tokenizer(folder)


def text_encoder_folder(config, spec, tokenizer, mesh) -> pathlib.Path:
    """Return the folder of the text encoder trained on this run's reports; trains it if need be."""
    sources = open_corpora(config["data"], config["data"]["split"])
    texts = pipeline.mlm_texts(sources)
    return text_stage.pretrain(
        texts,
        encoder={key: value for key, value in spec.items() if key != "lora"},
        tokenizer=tokenizer,
        mesh=mesh,
        folder=_derived(config) / "text_encoder",
        text_length=config["data"]["text_length"],
        **config["mlm"],
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
        pair = clinical.pair_of(data, pair_from, parts.recipe.images, decode)
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


def _further_image(name, spec, decode, view, data, *, train) -> pipeline.Transform:
    """Return (record, rng) -> view of a further image, by what the corpus says it is.

    Raises:
      UserError: for a volume whose view is one of images, or the other way round.
    """
    is_volume, settings = "slices" in spec, data["view"]
    if is_volume != (settings["name"] == VOLUME_VIEW):
        kind, fits = (
            ("a volume", VOLUME_VIEW) if is_volume else ("an image", "cfcml, imitate, prima")
        )
        raise UserError(
            f"data.view.name={settings['name']} does not fit '{name}', {kind}; accepted: {fits}."
        )
    if is_volume:
        read = functools.lru_cache(maxsize=data["decode_cache"])(
            functools.partial(volumes.decode, slices=spec["slices"], size=data["size"])
        )
        centre = functools.partial(
            volumes.center_view, size=data["crop"], ceiling=settings["ceiling"]
        )
        see = random_view(data) if train else centre
        return lambda record, rng: see(read(record["images"][name]), rng)
    if "channel" in spec:
        channel = slice(spec["channel"], spec["channel"] + 1)
        return lambda record, rng: view(decode(record["image"])[..., channel], rng)
    return lambda record, rng: view(decode(record["images"][name]), rng)


def image_shapes(data: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple]:
    """Return {name: (shape, dtype)} of one example of each image, as the first corpus has them.

    Raises:
      UserError: for an image it does not have.
    """
    if not names:
        return {}
    corpus, _, variant = data["corpora"][0].partition(":")
    built = corpora.builder(corpus, data_dir=data["data_dir"], builder_config=variant)
    further = built.info.metadata.get("images", {})
    side, found = data["crop"], {}
    for name in names:
        if name != "image" and name not in further:
            known = ("image", *further)
            raise UserError(
                f"Corpus {corpus} has no image '{name}'. {configs.nearest(name, known)}"
            )
        spec = further.get(name, {})
        if "slices" in spec:
            found[name] = (side, side, spec["slices"]), np.float32
        else:
            found[name] = (side, side, 1 if "channel" in spec else data["channels"]), np.uint8
    return found


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


def empty_evidence(tokenizer, data: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return the phrases of `size` reports in which nothing is said."""
    count, length = data["evidence"]["phrases"], data["evidence"]["length"]
    ids, mask = tokenisation.tokenize(tokenizer, [""] * size * count, length)
    shape = (size, count, length)
    tokens = Tokens(ids.reshape(shape), mask.reshape(shape))
    return {"evidence": tokens, "evidence_mask": np.ones((size, count), bool)}


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
        told = clinical.told_of(data, sources, recipe.task)
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
            threads=data["threads"],
            prefetch=data["prefetch"],
        )
    )


def initial_variables(parts: Parts) -> dict:
    """Initialise the recipe and put loaded weights in place.

    Raises:
      UserError: if a run to start from does not fit.
    """
    data = parts.config["data"]
    shape = (2, data["crop"], data["crop"], data["channels"])
    batch = dict.fromkeys(("image", "image_2"), np.zeros(shape, np.uint8))
    for name, (one, dtype) in image_shapes(data, getattr(parts.recipe, "images", ())).items():
        batch[name] = np.zeros((2, *one), dtype)
    if parts.tokenizer:
        tokens = tokenisation.tokenize(parts.tokenizer, ["a", "b"], data["text_length"])
        batch |= dict.fromkeys(SECTIONS, tokens)
    if clinical.reads_metadata(parts.recipe) or hasattr(parts.recipe, "evaluated"):
        batch |= clinical.empty_metadata(data, parts.tokenizer, 2)
    if "evidence" in parts.recipe.inputs:
        batch |= empty_evidence(parts.tokenizer, data, 2)
    if "tabular" in parts.recipe.inputs:
        batch["tabular"] = np.stack([tables.empty_table(data)] * 2)
    try:
        variables = init_variables(parts.recipe, batch, parts.config["seed"])
    except ValueError as error:  # an encoder's sentence about sizes that do not fit
        raise UserError(str(error)) from error
    for side, values in parts.loaded.items():
        for kind in variables:
            if side in variables[kind]:
                source = f"init.{side}={parts.config['init'][side]}"
                variables[kind] = paths.replace(variables[kind], side, values.get(kind, {}), source)
    if parts.config["init"]["params"]:
        folder = pathlib.Path(parts.config["init"]["params"])
        variables = weights.begin_from(folder, variables, parts.recipe)
    return variables


def cached_text(parts: Parts, variables: Mapping, sources) -> dict[str, np.ndarray] | None:
    """Encode all training texts once, where the recipe reads cached features; else None."""
    if not any(key.endswith("_feature") for key in parts.recipe.inputs):
        return None
    wanted, texts = "pooled", pipeline.mlm_texts
    if "metadata_feature" in parts.recipe.inputs:
        told = clinical.told_of(parts.config["data"], sources, parts.recipe.task)
        wanted, texts = "tokens", functools.partial(clinical.texts_of, told)
    apply = parts.recipe.text.apply
    encode = jax.jit(lambda p, tokens: getattr(apply({"params": p}, tokens), wanted))
    held = jax.device_put(variables["params"]["text"])
    return text_stage.cache_features(
        texts(sources),
        lambda tokens: encode(held, tokens),
        tokenizer=parts.tokenizer,
        length=parts.config["data"]["text_length"],
    )


def frozen_patterns(parts: Parts) -> tuple[str, ...]:
    """Patterns of fixed parameters: the recipe's own and config.optim.freeze."""
    return tuple(parts.recipe.frozen) + tuple(parts.config["optim"]["freeze"])


def place(tree, parts: Parts):
    """Put a state or variables on the mesh: parameters by rule, optimiser state beside them."""
    rules = parts.config["mesh"]["rules"]
    return sharding.place(tree, sharding.shardings(tree, parts.mesh, rules))


def language_model(spec: Mapping, config) -> dict[str, Any]:
    """Return the spec of a language model that knows its vocabulary, and the tokenised prompt."""
    data = config["data"]
    tokenizer = tokenisation.load_tokenizer(
        data["llm_tokenizer"] or _fetched(config["init"]["llm"], "data.llm_tokenizer", "init.llm")
    )
    llm = {**spec["llm"], "vocab_size": tokenizer.get_vocab_size()}
    return {"llm": llm, "prompt": clinical.prompt_of(data, spec, tokenizer)}


def _text_spec(spec: Mapping, tokenizer, data) -> dict:
    """Fill in the vocabulary size and hold the text length against the position table."""
    spec = {**spec, "vocab_size": tokenizer.get_vocab_size()}
    module = configs.build(
        "medvlp_jax.encoders", spec["name"], **{k: v for k, v in spec.items() if k != "name"}
    )
    longest = getattr(module, "max_length", data["text_length"])
    if data["text_length"] > longest:
        raise UserError(
            f"data.text_length={data['text_length']} is longer than the text encoder's position "
            f"table of {longest}."
        )
    return spec


def _fetched(source: str, setting="data.tokenizer", init="init.text") -> str:
    """Return the folder whose tokenizer files go with a pretrained text encoder."""
    if not source or source == "mlm":
        raise UserError(f"{setting} is empty: name a tokenizer file, or {init}=HF_FOLDER.")
    return str(convert.fetch(source))


def _derived(config) -> pathlib.Path:
    return corpora.derived_dir(config["data"]["data_dir"])


def _tuples(value):
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
