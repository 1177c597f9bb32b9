"""CLIP and SigLIP, the control. Variants: "" (ResNet-50 and BERT), vit_b16, demo, radiology_qa."""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("", "vit_b16", "demo", "radiology_qa")


def get_config(variant: str = "") -> ConfigDict:
    """Return the resolved config of a variant."""
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS[1:])
        raise ValueError(f"No variant '{variant}' of configs/clip.py. Known: {known}.")
    config = ConfigDict(
        {
            "recipe": recipe(),
            "data": common.data(),
            "optim": common.optim(),
            "train": common.train(steps=33_341, batch_size=128, checkpoint_every=1000),
            "evals": common.evals(),
            **common.rest(init={"text": "emilyalsentzer/Bio_ClinicalBERT"}),
        }
    )
    if variant in ("demo", "radiology_qa"):
        small(config)
    if variant:
        globals()[variant](config)
    return config


def recipe() -> ConfigDict:
    """Every field is explained in recipes/clip.py; all values our choice."""
    return ConfigDict(
        {
            "name": "clip",
            "image": {"name": "resnet", "variant": "50", "dtype": "float32"},
            "text": {"name": "bert", "variant": "base", "pooling": "cls", "dtype": "float32"},
            "weights": common.weights(contrastive=1.0),
            "dim": 512,
            "loss": "info_nce",  # or "sigmoid"
            "section": "report",
            "same_text": False,
            "train_text": True,
            "loss_tile": 512,  # measured, benchmarks/contrastive.py; 0 = dense
        }
    )


def vit_b16(config):
    """Two transformers in bfloat16, 224 x 224 pixels, 128 tokens: for measuring throughput."""
    config.recipe.image = ConfigDict({"name": "vit", "variant": "B/16", "dtype": "bfloat16"})
    program = {"attention": "xla", "layout": "unrolled", "remat": "none"}
    config.recipe.image.update({**program, "kept_patches": 1.0})
    config.recipe.text.update({**program, "dtype": "bfloat16"})
    # CLIP has no dropout, and cuDNN's attention cannot drop probabilities.
    config.recipe.text.update({"dropout": 0.0, "attention_dropout": 0.0})
    config.data.text_length = 128
    config.optim.warmup = 1000
    config.train.batch_size = 1024


def small(config):
    """Sizes for two CPU cores, those of configs/imitate.py."""
    config.recipe.image.variant = "tiny"
    config.recipe.text = ConfigDict(
        {"name": "bert", "variant": "tiny", "pooling": "mean", "dtype": "float32"}
    )
    config.recipe.text.update({"dropout": 0.0, "attention_dropout": 0.0})
    config.recipe.dim = 128
    config.init.text = "mlm"
    config.data.update({"tokenizer": "cxr_phantom", "text_length": 64, "size": 106, "crop": 96})
    config.data.decode_cache = 8192
    config.data.view.update({"flip_vertical": 0.0, "rotation": 10.0, "perspective": 0.2})
    config.optim.update({"lr": 3e-3, "warmup": 40})


def demo(config):
    """Generated radiographs."""
    config.data.corpora = ("cxr_phantom:demo",)
    config.train.update({"steps": 400, "batch_size": 64, "checkpoint_every": 100})
    config.train.update({"evaluate_every": 100, "evaluate_limit": 256})


def radiology_qa(config):
    """Real CT, MR, X-ray ... images with composed texts."""
    config.data.update({"corpora": ("radiology_qa",), "tokenizer": "train", "text_length": 48})
    config.recipe.same_text = True  # equal texts are positives of one another
    config.evals.update({"split": "validation", "controls": ("untrained", "masked_edge")})
    config.train.update({"steps": 900, "batch_size": 64, "checkpoint_every": 300})
