"""From a resolved config to the parts of a run: tokenizer, recipe, corpora, weights.

What `train`, `evaluate` and `convert export` share. Takes plain dicts, never a ConfigDict.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import common
from medvlp_jax import clinical, convert, distributed, sharding, tables, weights
from medvlp_jax import config as configs
from medvlp_jax.config import UserError
from medvlp_jax.data import corpora, folds, knowledge, leakage, pipeline, retold
from medvlp_jax.data import text as tokenisation
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.reading import parse_json
from medvlp_jax.recipes import mlm
from medvlp_jax.training import params as paths
from medvlp_jax.training import text as text_stage
from medvlp_jax.training.step import init_variables

CONFIG = "config.json"
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


def written_config(folder: pathlib.Path) -> dict:
    """Read the config of a run folder as it is; JSON's lists become tuples again.

    Raises:
      UserError: if the folder holds no run, or its config is no JSON or none of a run.
    """
    file = pathlib.Path(folder) / CONFIG
    if not file.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}.")
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}.") from None
    if not isinstance(config, dict) or not isinstance(config.get("recipe"), dict):
        raise UserError(f"{file} is no config of a run; an object with a section recipe is needed.")
    return _tuples(config)


def read_config(folder: pathlib.Path) -> dict:
    """Read the resolved config of a run folder.

    A setting that did not exist yet when the run was made has the default of configs/common.py,
    which is what was done before.

    Raises:
      UserError: as `written_config`.
    """
    return completed(written_config(folder))


def completed(config: Mapping) -> dict:
    """Return a config of a run with the settings there were not yet when it was made."""
    sections = {name: getattr(common, name)() for name in ("data", "optim", "train", "evals")}
    return _completed(config, ConfigDict({**sections, **common.rest()}).to_dict())


def _completed(config: Mapping, defaults: Mapping) -> dict:
    """Return a config with what it lacks of the defaults; of another kind of section, nothing."""
    if config.get("name") != defaults.get("name"):  # data.view of another method
        return {**config}
    missing = {key: value for key, value in defaults.items() if key not in config}
    nested = {
        key: _completed(config[key], value)
        for key, value in defaults.items()
        if isinstance(value, Mapping) and isinstance(config.get(key), Mapping)
    }
    return {**config, **missing, **nested}


def open_corpora(data: Mapping[str, Any], split: str) -> list[corpora.Source]:
    """Open the split of every corpus; prepares what needs nothing from the user."""
    return [open_corpus(name, data, split) for name in data["corpora"]]


def open_corpus(name: str, data: Mapping[str, Any], split: str) -> corpora.Source:
    """Open one corpus, "name" or "name:variant"; with data.folds, a split of a fold of it."""
    if name == knowledge.NAME:
        return knowledge.open_texts(split=split, **data["knowledge"])
    fold = fold_of(name, data)
    name, _, variant = name.partition(":")
    where = {"data_dir": data["data_dir"], "manual_dir": data["manual_dir"]}
    where["builder_config"] = variant
    with distributed.writer_first(f"corpus {name}"):
        if not fold:
            return retold.retold(corpora.open_source(name, split, **where), data["texts"])
        sources = corpora.open_all(name, **where)
    return retold.retold(folds.open_fold(sources, split, **fold), data["texts"])


def fold_of(name: str, data: Mapping[str, Any]) -> dict:
    """Return the arguments of `folds.open_fold` for a corpus; {} where it is not dealt.

    Folds are dealt of what a run is trained on; another corpus has its own splits.
    """
    is_trained_on = leakage.unsized(name) in map(leakage.unsized, data["corpora"])
    return folds.settings(data) if is_trained_on else {}


def mesh_of(config: Mapping[str, Any]) -> Mesh:
    """Lay out the devices as config.mesh says.

    Raises:
      UserError: where there are others.
    """
    try:
        return sharding.make_mesh(**{k: config["mesh"][k] for k in sharding.AXES})
    except ValueError as error:
        raise UserError(f"{error}.") from None


def parts(config: Mapping[str, Any], *, pretrained: bool = True) -> Parts:
    """Build tokenizer, mesh and recipe, and find the weights to start from.

    Args:
      config: resolved config.
      pretrained: False leaves out weights that a checkpoint will replace anyway.

    Raises:
      UserError: for settings that do not fit together.
    """
    init, data = config["init"], config["data"]
    mesh = mesh_of(config)
    try:
        part = sharding.part_of(mesh)
    except ValueError as error:
        raise UserError(f"{error}.") from None
    spec = dict(config["recipe"])
    name = spec.pop("name")
    loaded = {}
    tokenizer = None
    folders = {"image": init["image"]}
    if init["image"] and "image" not in spec:
        raise UserError(f"init.image={init['image']}, but recipe {name} has no image encoder.")
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
                if side == "image":
                    weights.say_normalisation(folder)
            if side == "text":
                _check_vocabulary(data["tokenizer"], tokenizer, folder, spec[side])
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


def evidence_batch(tokenizer, data: Mapping[str, Any], told: Sequence[Sequence[str]]) -> dict:
    """Return "evidence" and "evidence_mask" of the first phrases of each row, as a batch."""
    count, length = data["evidence"]["phrases"], data["evidence"]["length"]
    told = [list(phrases)[:count] for phrases in told]
    rows = [phrase for row in told for phrase in row + [""] * (count - len(row))]
    ids, mask = tokenisation.tokenize(tokenizer, rows, length)
    shape = (len(told), count, length)
    exists = np.arange(count) < np.array([len(row) for row in told])[:, None]
    tokens = Tokens(ids.reshape(shape), mask.reshape(shape))
    return {"evidence": tokens, "evidence_mask": exists}


def empty_evidence(tokenizer, data: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return the phrases of `size` reports in which nothing is said."""
    return evidence_batch(tokenizer, data, [[""] * data["evidence"]["phrases"]] * size)


def initial_variables(parts: Parts) -> dict:
    """Initialise the recipe and put loaded weights in place.

    Raises:
      UserError: if a run or weights to start from do not fit, or nothing would take them.
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
    for side in parts.loaded:
        variables = _with_loaded(variables, side, parts)
    if parts.config["init"]["params"]:
        folder = pathlib.Path(parts.config["init"]["params"])
        variables = weights.begin_from(folder, variables, parts.recipe)
    return variables


def _with_loaded(variables, side, parts) -> dict:
    """Put the loaded weights of an encoder in place, in every copy where each image has its own."""
    source = f"init.{side}={parts.config['init'][side]}"
    names = getattr(parts.recipe, "copies", {}).get(side, (side,))
    if not {*names} & {*variables["params"]}:
        raise UserError(
            f"{source}, but with these settings recipe {parts.config['recipe']['name']} has no "
            f"{side} encoder; accepted is init.{side}= (empty)."
        )
    found = {}
    for kind, tree in variables.items():
        for name in filter(tree.__contains__, names):
            tree = paths.replace(tree, name, parts.loaded[side].get(kind, {}), source)
        found[kind] = tree
    return found


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


def _check_vocabulary(name: str, tokenizer, folder, encoder) -> None:
    """Refuse a vocabulary that is not the one a text encoder was trained with."""
    if not name:
        return
    try:
        own = tokenisation.load_tokenizer(convert.fetch(folder)).get_vocab()
    except UserError:  # none beside the weights
        own = tokenizer.get_vocab()
    size = getattr(encoder, "vocab_size", len(own))
    if own != tokenizer.get_vocab() or len(own) > size:
        raise UserError(
            f"data.tokenizer={name} has {tokenizer.get_vocab_size()} tokens and is not the "
            f"vocabulary of init.text={folder}, of {min(len(own), size)}; accepted is "
            "data.tokenizer= (empty: that of the folder)."
        )


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
