"""A model of `transformers`, its twin here, and what must hold between the two.

The reference is moved off its initial values and run in float64, so that an error is ours alone.
Tensors are compared as its file lays them out: names in memory differ between releases.
"""

import copy
import json

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from medvlp_jax import convert
from medvlp_jax.convert.architectures import table_of_module
from medvlp_jax.convert.tensors import base_names, is_scanned, to_tensors, to_variables

RNG = np.random.default_rng(0)


def error(ours, reference):
    """Return max |a - b| / max |b|."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / np.abs(reference).max()


def assert_close(ours, reference, tolerance=1e-5):
    """Hold max |a - b| <= tolerance * max |b|."""
    assert error(ours, reference) <= tolerance


def make_theirs(architecture, folder, *, noise=0.1, **fields):
    """Save a random model, every tensor off its initial value; return it in float64."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, architecture)
    model = model(model.config_class(**fields)).eval()
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model.double()


def as_torch(images):
    """Return images [B, H, W, C] as a float64 tensor [B, C, H, W]."""
    import torch

    return torch.tensor(images).double().permute(0, 3, 1, 2)


def draw_images(*size, batch=2):
    return RNG.normal(size=(batch, *size, 3)).astype(np.float32)


def run(module, variables, *inputs, **options):
    """Apply under jit, at full precision."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda v: module.apply(v, *inputs, **options))(variables)


def gradients_and_step(theirs, module, variables, folder, outputs):
    """Compare the gradient of a random projection, and the parameters after a step of AdamW.

    Args:
      theirs: of `transformers`, in float64; left as it is.
      module: ours.
      variables: ours, the same numbers.
      folder: to write to.
      outputs: (theirs or None, params or None) -> the outputs, a list, of the one that is given.

    Returns:
      ({path: error of the gradient}, {path: error after the step}), blocks unrolled; a gradient
      that is zero by symmetry is measured against the largest of all.
    """
    import torch

    theirs = copy.deepcopy(theirs)
    table = table_of_module(module)
    found = outputs(theirs, None)
    # Divided, so that gradients near zero lie well below AdamW's epsilon.
    weights = [RNG.normal(size=y.shape).astype(np.float32) / 100 for y in found]
    sum((y * torch.tensor(w)).sum() for y, w in zip(found, weights, strict=True)).backward()
    grad = copy.deepcopy(theirs)
    for parameter, mine in zip(grad.parameters(), theirs.parameters(), strict=True):
        parameter.data = torch.zeros_like(mine) if mine.grad is None else mine.grad
    settings = {"eps": 1e-3, "weight_decay": 0.1}
    torch.optim.AdamW(theirs.parameters(), lr=1e-3, **settings).step()

    @jax.jit
    def step(params):
        def loss(p):
            return sum((y * w).sum() for y, w in zip(outputs(None, p), weights, strict=True))

        gradient = jax.grad(loss)(params)
        optimiser = optax.adamw(1e-3, **settings)
        updates, _ = optimiser.update(gradient, optimiser.init(params), params)
        return gradient, optax.apply_updates(params, updates)

    with jax.default_matmul_precision("highest"):
        ours = step(variables["params"])
    flat = module.clone(layout="unrolled") if is_scanned(module) else module

    def errors(params, model, name):
        model.save_pretrained(folder / name)
        tensors = base_names(table, load_file(folder / name / "model.safetensors"))
        expected = to_variables(table, flat, tensors, source=name)
        tensors = to_tensors(table, module, {**variables, "params": params})
        mine = to_variables(table, flat, tensors, source=name)
        mine, expected = (flatten_dict(tree["params"], sep="/") for tree in (mine, expected))
        expected = {path: leaf for path, leaf in expected.items() if leaf.size}
        largest = max(np.abs(leaf).max() for leaf in expected.values())
        return {
            path: np.abs(mine[path] - leaf).max() / largest
            if path.endswith("key/bias")  # moves all logits of a query alike
            else error(mine[path], leaf)
            for path, leaf in expected.items()
        }

    return errors(ours[0], grad, "gradient"), errors(ours[1], theirs, "stepped")


def assert_gradients_and_step(gradients, stepped):
    """Hold 1e-4 for every leaf's gradient, 1e-5 for every leaf after the step."""
    assert {path: e for path, e in gradients.items() if not e <= 1e-4} == {}
    assert {path: e for path, e in stepped.items() if not e <= 1e-5} == {}


def assert_round_trip(source, folder, **options):
    """Hold theirs -> ours -> theirs -> ours, bit for bit, nothing missing or unexpected.

    Returns:
      Ours.
    """
    import transformers

    module, variables = convert.load(source, **options)
    convert.save(module, variables, folder / "ours")
    before, after = (load_file(f / "model.safetensors") for f in (source, folder / "ours"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape)
        np.testing.assert_array_equal(tensor, after[name])
    old, config = (json.loads((f / "config.json").read_text()) for f in (source, folder / "ours"))
    assert {key: old.get(key, value) for key, value in config.items()} == config
    assert not [file.name for file in (folder / "ours").iterdir() if file.name[0] == "."]
    theirs, report = getattr(transformers, config["architectures"][0]).from_pretrained(
        folder / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    theirs.save_pretrained(folder / "again")
    again, back = convert.load(folder / "again", **options)
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    return module, variables


def count(module, *inputs):
    """Return (number of parameters, shapes of the outputs) without allocating any."""
    # Traced once for both: at the largest sizes tracing is what a test waits for.
    outputs, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), *inputs)
    return sum(leaf.size for leaf in jax.tree.leaves(variables)), outputs


def count_theirs(architecture, **fields):
    """Return the number of parameters of a model that is not allocated either."""
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, architecture)
        return model(model.config_class(**fields)).num_parameters()


def hugging_face_fields(module, **more):
    """Return our module's fields as its config.json has them."""
    table = table_of_module(module)
    fields = {key: f.write(getattr(module, f.name)) for key, f in table.fields.items()}
    return {**table.fixed, **fields, **more}


def edit_config(source, folder, **changes):
    """Copy a folder, with some settings changed."""
    folder.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return folder
