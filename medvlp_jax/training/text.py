"""The text side of a run before its first step: a small BERT from the reports, cached features.

Both are found again by a hash of everything they depend on, so that a second run starts at once.
"""

import hashlib
import json
import pathlib
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from medvlp_jax import convert, distributed, sharding
from medvlp_jax.config import UserError
from medvlp_jax.data import pipeline
from medvlp_jax.data import text as tokenisation
from medvlp_jax.recipes import mlm
from medvlp_jax.training import loop, optim
from medvlp_jax.training import step as training
from medvlp_jax.training.report import Reporter

VERSION = 1  # raise when the meaning of a cached file changes


def fingerprint(*parts: Any) -> str:
    """Return a short hash of JSON-able parts."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:16]


def pretrain(
    texts: Sequence[str],
    *,
    encoder: Mapping[str, Any],
    tokenizer,
    mesh,
    folder: pathlib.Path,
    steps: int,
    batch_size: int,
    text_length: int,
    lr: float,
    warmup: int,
    weight_decay: float,
    rate: float,
    seed: int,
) -> pathlib.Path:
    """Train a text encoder by masked language modelling, or find the one trained before.

    Args:
      texts: the different report sections of the training split.
      encoder: recipe spec {"name", "variant", ...} of the text encoder.
      tokenizer: of the texts.
      mesh: batches are split over it.
      folder: where trained encoders lie, one folder a fingerprint.
      steps: optimisation steps.
      batch_size: texts a step.
      text_length: tokens a text.
      lr: peak learning rate of AdamW; warm-up, then cosine.
      warmup: steps.
      weight_decay: decoupled.
      rate: share of tokens masked.
      seed: of initial values, order and masks.

    Returns:
      A Hugging Face folder with weights and tokenizer.
    """
    settings = {
        k: v for k, v in locals().items() if k not in ("tokenizer", "mesh", "folder", "texts")
    }
    settings["vocabulary"] = tokenizer.to_str()
    target = folder / fingerprint(sorted(settings.items()), sorted(texts))
    if distributed.writer_decides((target / "model.safetensors").is_file()):
        return target
    distributed.say(f"Text encoder: masked language modelling on {len(texts)} different sections")
    recipe = mlm.make(
        **mlm.completed({"text": encoder, "weights": {"mlm": 1.0}, "rate": rate}, tokenizer)
    )
    transform = pipeline.mlm_transform(tokenizer, length=text_length)
    part = sharding.part_of(mesh)
    batches = pipeline.train_dataset(
        [list(texts)],
        transform=transform,
        batch_size=batch_size,
        seed=seed,
        process_index=part.index,
        process_count=part.count,
    )
    example = jax.tree.map(lambda x: np.stack([x, x]), transform(texts[0], None))
    try:
        variables = training.init_variables(recipe, example, seed)
        # What masked words do not need, such as its pooling, is asked for when they are learnt.
        jax.eval_shape(recipe.text.init, jax.random.key(seed), example["report"])
    except ValueError as error:  # an encoder's sentence about settings that do not fit
        raise UserError(str(error)) from error
    tx, schedule = optim.make(
        variables["params"],
        name="adamw",
        lr=lr,
        steps=steps,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=1.0,
    )
    # Metrics of the stage stand beside its weights, not among those of the run that needed it.
    scratch = folder / f".{target.name}.{secrets.token_hex(4)}"
    writes = distributed.is_writer()
    if writes:
        scratch.mkdir(parents=True, exist_ok=True)
    state = training.make_state(variables, tx, ())
    state = loop.fit(
        sharding.place(state, sharding.shardings(state, mesh)),
        training.make_train_step(recipe, tx, schedule, seed),
        iter(batches),
        recipe=recipe,
        mesh=mesh,
        steps=steps,
        reporter=Reporter(scratch, every=max(steps // 100, 1), writes=writes),
    )
    host = distributed.fetch(state.params["text"])
    if writes:
        (scratch / "tokenizer.json").write_text(tokenizer.to_str())
        convert.save(recipe.text, {"params": host}, scratch, tokenizer=scratch)
        if target.exists():
            shutil.rmtree(scratch)
        else:
            scratch.rename(target)
    distributed.barrier("text encoder")
    return target


def cache_features(
    texts: Sequence[str],
    encode: Callable[[tokenisation.Tokens], np.ndarray],
    *,
    tokenizer,
    length: int,
    batch_size: int = 256,
) -> dict[str, np.ndarray]:
    """Encode every different text once with a frozen encoder, each process its share of them.

    Exactly what encoding in the step would give: reports are not augmented and the encoder has no
    dropout in evaluation mode.

    Args:
      texts: different texts.
      encode: Tokens [b, T] -> features [b, ...] on the host.
      tokenizer: of the texts.
      length: T.
      batch_size: b; the last batch is filled up so that one program serves all.

    Returns:
      {text: float32 [...]}.
    """
    if not texts:
        return {}
    ordered = sorted(texts)  # any order gives the same features; this one is repeatable
    process, processes = jax.process_index(), jax.process_count()
    # Every process encodes as many batches: an all-gather takes arrays of one shape.
    rounds = -(-len(ordered) // (batch_size * processes))
    filled = ordered + [""] * (rounds * processes * batch_size - len(ordered))
    batches = [filled[k : k + batch_size] for k in range(0, len(filled), batch_size)]
    own = tqdm(batches[process::processes], "text features", unit="batch", disable=process > 0)
    encoded = [encode(tokenisation.tokenize(tokenizer, texts, length)) for texts in own]
    # Round r of process p is batch r * P + p.
    whole = np.swapaxes(distributed.gather(np.asarray(encoded, np.float32)), 0, 1)
    return dict(zip(ordered, whole.reshape(-1, *whole.shape[3:]), strict=False))
