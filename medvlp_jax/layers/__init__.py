"""The few layers the encoders and heads are made of: Flax Linen, parameters in float32.

`dtype` is the type of the matrix products; norms, softmax and statistics are float32 in any case.

Axis letters: B batch, T tokens, D width, A heads, S head width, L layers; of images H, W pixels,
P patch size, N patches.
"""

from medvlp_jax.layers.attention import Attention, Cache
from medvlp_jax.layers.blocks import REMAT, Block, Stack
from medvlp_jax.layers.fusion import Fusion, Projector
from medvlp_jax.layers.linear import (
    ACTIVATIONS,
    GatedMlp,
    Initializer,
    Linear,
    Lora,
    Mlp,
    gelu,
    product,
    quick_gelu,
    torch_linear,
    torch_uniform,
)
from medvlp_jax.layers.norms import BatchNorm, LayerNorm, RMSNorm
from medvlp_jax.layers.patches import (
    PatchEmbedding,
    bicubic_matrix,
    draw_patches,
    keep_patches,
    patch_grid,
    resize_positions,
)
from medvlp_jax.layers.queries import Queries
from medvlp_jax.layers.rope import Rope, rope_1d, rope_2d, rotate

__all__ = [
    "ACTIVATIONS",
    "REMAT",
    "Attention",
    "BatchNorm",
    "Block",
    "Cache",
    "Fusion",
    "GatedMlp",
    "Initializer",
    "LayerNorm",
    "Linear",
    "Lora",
    "Mlp",
    "PatchEmbedding",
    "Projector",
    "Queries",
    "RMSNorm",
    "Rope",
    "Stack",
    "bicubic_matrix",
    "draw_patches",
    "gelu",
    "keep_patches",
    "patch_grid",
    "product",
    "quick_gelu",
    "resize_positions",
    "rope_1d",
    "rope_2d",
    "rotate",
    "torch_linear",
    "torch_uniform",
]
