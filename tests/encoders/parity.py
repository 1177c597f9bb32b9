"""What parity with PyTorch means for the language models: values, gradients, one optimiser step.

Gradients and parameters of the PyTorch model are laid out as ours by the conversion table, so that
every leaf is compared.
"""

import jax
import numpy as np
import optax

from medvlp_jax.convert.tensors import base_names, to_variables
from medvlp_jax.encoders.base import Tokens


def error(ours, reference):
    """Return max |a - b| / max |b|."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / np.abs(reference).max()


def assert_close(ours, reference, tolerance=1e-5):
    """Hold max |a - b| <= tolerance * max |b|."""
    assert error(ours, reference) <= tolerance


def shake(model, seed=0, noise=0.1):
    """Move every tensor off its initial value."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        tensor.data += noise * torch.randn(tensor.shape, generator=generator)
    return model.eval()


def random_tokens(lengths, total, vocab, *, side="right"):
    """Draw texts of the given lengths, padded to `total` on one side."""
    steps = np.arange(total)
    lengths = np.array(lengths)[:, None]
    mask = steps < lengths if side == "right" else steps >= total - lengths
    ids = np.random.default_rng(total).integers(1, vocab, mask.shape)
    return Tokens(np.where(mask, ids, 0).astype(np.int32), mask)


def packed(padded, rows):
    """Lay texts, padded on the right, behind one another.

    Args:
      padded: Tokens [B, T].
      rows: for each row which texts lie in it.

    Returns:
      (Tokens [rows, T], segment ids [rows, T], -1 behind the last text).
    """
    ids = np.zeros((len(rows), padded.ids.shape[1]), np.int32)
    segments = np.full_like(ids, -1)
    for row, texts in enumerate(rows):
        parts = [padded.ids[text][padded.mask[text]] for text in texts]
        lengths = [len(part) for part in parts]
        ids[row, : sum(lengths)] = np.concatenate(parts)
        segments[row, : sum(lengths)] = np.repeat(np.arange(len(texts)), lengths)
    return Tokens(ids, segments >= 0), segments


def assert_packed_equals_padded(module, variables, padded, rows, *, logits="mlm_logits"):
    """Hold pooled, tokens and the logits of packed texts equal to those of padded ones.

    Args:
      module: an encoder.
      variables: its own.
      padded: Tokens [B, T].
      rows: for each row which texts lie in it.
      logits: the method that gives them; "" where the encoder has none.
    """
    tokens, segments = packed(padded, rows)
    packing = {"segments": segments, "num_segments": max(map(len, rows))}
    expected = jax.jit(module.apply)(variables, padded)
    ours = jax.jit(lambda v: module.apply(v, tokens, **packing))(variables)
    pairs = [(ours.tokens, expected.tokens)]
    if logits:
        theirs = jax.jit(lambda v: module.apply(v, padded, method=logits))(variables)
        packed_logits = lambda v: module.apply(v, tokens, segments=segments, method=logits)
        pairs.append((jax.jit(packed_logits)(variables), theirs))
    for row, texts in enumerate(rows):
        for segment, text in enumerate(texts):
            here, there = segments[row] == segment, padded.mask[text]
            assert_close(ours.pooled[row, segment], expected.pooled[text])
            for found, wanted in pairs:
                assert_close(found[row][here], wanted[text][there])
    assert ours.pooled.shape == (len(rows), max(map(len, rows)), expected.pooled.shape[-1])
    assert np.isfinite(ours.pooled).all()


def as_torch(tokens):
    """Return the keywords of a `transformers` model."""
    import torch

    ids, mask = (torch.tensor(np.asarray(leaf)).long() for leaf in tokens)
    return {"input_ids": ids, "attention_mask": mask}


def as_ours(table, module, model, value):
    """Lay out value(parameter) of every parameter of a PyTorch model as our params."""
    tensors = {name: value(p).detach().numpy() for name, p in model.named_parameters()}
    return to_variables(table, module, base_names(table, tensors), source="torch")["params"]


def gradients_and_step(table, module, params, model, loss, reference):
    """Compare the gradients of a scalar and the parameters after one step of AdamW.

    Args:
      table: of the architecture.
      module: ours.
      params: ours.
      model: of `transformers`, with the same parameters.
      loss: params -> scalar.
      reference: -> the same scalar of `model`.

    Returns:
      ({path: gradient error}, {path: error after the step}).
    """
    import torch

    model.zero_grad()
    reference().backward()
    gradient = jax.jit(jax.grad(loss))(params)
    gradients = errors(gradient, as_ours(table, module, model, lambda p: p.grad))
    settings = {"eps": 1e-3, "weight_decay": 0.1}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.AdamW(model.parameters(), lr=1e-3, **settings).step()
    optimiser = optax.adamw(1e-3, **settings)
    updates, _ = optimiser.update(gradient, optimiser.init(params), params)
    stepped = optax.apply_updates(params, updates)
    step = errors(stepped, as_ours(table, module, model, lambda p: p))
    for name, p in model.named_parameters():  # the model is shared by tests
        p.data = before[name]
    return gradients, step


def errors(ours, reference):
    """Return {path: error} of two trees of the same leaves."""
    found = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (jax.tree_util.keystr(path, simple=True, separator="/"), error(a, b)),
        ours,
        reference,
    )
    return dict(jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, tuple)))
