"""Hugging Face ResNetModel <-> medvlp_jax.encoders.resnet.ResNet."""

import jax.numpy as jnp
import numpy as np

from medvlp_jax.convert.table import Field, Rule, Table, conv, norm
from medvlp_jax.encoders.resnet import ResNet

FIELDS = {
    "embedding_size": Field("embedding_size", 64),
    "hidden_sizes": Field("hidden_sizes", (256, 512, 1024, 2048), tuple, list),
    "depths": Field("depths", (3, 4, 6, 3), tuple, list),
}

FIXED = {
    "num_channels": 3,
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,  # True is "v1": the stride on the first 1x1 convolution
}

CLASSIFIER = "the head of ResNetForImageClassification"


def _layers(module):
    """Yield (name in the file, path of the convolution, path of its norm)."""
    yield "embedder.embedder", "stem_conv", "stem_norm"
    channels = module.embedding_size
    for stage, (features, depth) in enumerate(zip(module.hidden_sizes, module.depths, strict=True)):
        for block in range(depth):
            theirs = f"encoder.stages.{stage}.layers.{block}"
            ours = f"stage_{stage}_block_{block}"
            for i in range(3):
                yield f"{theirs}.layer.{i}", f"{ours}/conv{i + 1}", f"{ours}/norm{i + 1}"
            if block == 0 and (stage > 0 or channels != features):
                yield f"{theirs}.shortcut", f"{ours}/shortcut_conv", f"{ours}/shortcut_norm"
        channels = features


def rules(module: ResNet) -> list[Rule]:
    """Pair every tensor of ResNetModel with ours."""
    found = []
    for theirs, ours_conv, ours_norm in _layers(module):
        normalization = f"{theirs}.normalization"
        found += [
            conv(f"{theirs}.convolution", ours_conv),
            *norm(normalization, ours_norm),
            Rule(f"{normalization}.running_mean", f"batch_stats/{ours_norm}/mean"),
            Rule(f"{normalization}.running_var", f"batch_stats/{ours_norm}/var"),
        ]
    return found


def _counters(module):
    return [f"{theirs}.normalization.num_batches_tracked" for theirs, _, _ in _layers(module)]


def left_out(module: ResNet) -> dict[str, str]:
    """Name the tensors that are known and not read."""
    counters = dict.fromkeys(_counters(module), "a counter torch needs only where momentum is None")
    return {"classifier.1.weight": CLASSIFIER, "classifier.1.bias": CLASSIFIER, **counters}


def added(module: ResNet) -> dict[str, np.ndarray]:
    """Make the counters of torch's BatchNorm, at zero: nothing reads them where momentum is set."""
    return {name: np.zeros((), np.int64) for name in _counters(module)}


TABLE = Table(
    module=ResNet,
    model_types=("resnet",),
    prefix="resnet.",
    fields=FIELDS,
    fixed=FIXED,
    example=lambda module: jnp.zeros((2, 64, 64, 3)),
    rules=rules,
    left_out=left_out,
    added=added,
    architecture=lambda module: ("ResNetModel", ""),
)
