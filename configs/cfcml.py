"""CFCML. Variants: derm, men_phantom (small, for CPUs), glioma; derm7pt, men (as published)."""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("", "derm", "derm7pt", "men", "men_phantom", "glioma")
STEPS = 14  # an epoch of Derm7pt: 256 melanocytic nevi, 18 of them in a batch


def get_config(variant: str = "") -> ConfigDict:
    """Return the resolved config of a variant."""
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS[1:])
        raise ValueError(f"No variant '{variant}' of configs/cfcml.py. Known: {known}.")
    config = ConfigDict(
        {
            "recipe": recipe(),
            "data": common.data(
                corpora=("ham10000",),
                balance="diagnosis",
                size=224,
                crop=224,
                channels=3,
                crop_black_border=False,
                stretch=False,
                decode_cache=1024,
            ),
            # Adam with coupled decay, the Swin at a tenth of the rate; released code
            "optim": common.optim(
                name="adam",
                lr=1e-4,
                schedule="cfcml",
                weight_decay=1e-4,
                multipliers=(("^image/", 0.1),),
            ),
            "train": common.train(steps=50 * STEPS, batch_size=35, export=False),  # 5 a class
            "evals": common.evals(protocols=("classify", "probe"), split="validation"),
            **common.rest(),
        }
    )
    config.data.view = view()
    if variant:
        globals()[variant](config)
    return config


def recipe() -> ConfigDict:
    """The run script's settings for Derm7pt; every field is explained in recipes/cfcml.py."""
    weights = {"cross_entropy": 1.0, "sample": 0.04, "unimodal": 0.06, "crossmodal": 0.18}
    fusion = {"multi_granularity": True, "enhance": "multi_head", "num_heads": 4, "dim": 128}
    fusion |= {"image_tokens": 32, "table_tokens": 24, "hidden": (128, 16), "dropout": 0.5}
    return ConfigDict(
        {
            "name": "cfcml",
            **{"task": "diagnosis", "num_classes": 7},
            "image": {"name": "swin", "variant": "T", "dtype": "float32"},
            "images": ("image",),
            "table": True,
            "weights": common.weights(**weights),
            "share_encoder": True,
            **fusion,
            "temperature": 0.07,
            "memory": 0.0,
            "grad_multistage": True,  # our choice: the release detaches the first three stages
            "legacy_bgr": False,  # our choice: the release reads blue first, without statistics
        }
    )


def view() -> ConfigDict:
    """Augmentation of Derm7pt, released code; contrast is the library's default."""
    moved = {"shift": 0.0625, "scale": 0.5, "rotation": 45.0, "moved": 0.5, "quarter_turn": 0.5}
    return ConfigDict({"name": "cfcml", "probability": 0.5, "flip": 0.5, **moved, "contrast": 0.2})


def derm7pt(config):
    """Nevus or melanoma from two photographs and a table, as published."""
    config.data.update({"corpora": ("derm7pt",), "decode_cache": 2048})
    config.train.batch_size = 36
    config.recipe.update({"num_classes": 2, "images": ("image", "dermoscopy")})
    config.evals.positive = "melanoma"
    config.init.image = "microsoft/swin-tiny-patch4-window7-224"  # of ImageNet, as published
    published(config, STEPS)


def published(config, epoch):
    """Report the test split after the epoch that is best in validation; by what, is our choice."""
    config.train.evaluate_every = epoch
    config.train.select = f"classify/{config.recipe.task}/macro_auroc"
    config.evals.update({"protocols": ("classify",), "split": "test"})
    config.data.table.scale = 10.0  # docs/cfcml.md: of 1 the net hears nothing for 250 steps


def men(config):
    """Grade and invasion of meningioma, as published; the data are private: a phantom instead."""
    volumes(config)
    published(config, 36)


def volumes(config):
    """Net, sizes and rates of MEN."""
    config.recipe.image = ConfigDict({"name": "mamba3d", "variant": "men", "dtype": "float32"})
    config.recipe.update({"task": "grade", "num_classes": 3, "images": ("t1", "t2", "adc")})
    config.recipe.update({"share_encoder": False, "image_tokens": 48, "table_tokens": 16})
    config.recipe.weights.update({"sample": 0.06, "unimodal": 0.04, "crossmodal": 0.24})
    config.data.update({"corpora": ("men_phantom",), "balance": "grade", "size": 128, "crop": 128})
    config.data.update({"channels": 1, "decode_cache": 64})
    config.data.view = men_view()
    config.optim.update({"lr": 5e-4, "multipliers": ()})
    config.train.update({"steps": 50 * 36, "batch_size": 36})  # 12 of 434 cases of grade 1
    config.evals.protocols = ("classify",)


def men_view() -> ConfigDict:
    """Augmentation of MEN, released code; 1,200 is the brightest intensity."""
    fields = {"name": "men", "probability": 0.3, "smallest": 0.75, "erased": (0.02, 0.1)}
    return ConfigDict({**fields, "ceiling": 1200.0})


def men_phantom(config):
    """The phantom at a quarter of the in-plane size on two CPU cores; our choice throughout."""
    volumes(config)
    config.recipe.image.variant = "tiny"
    config.recipe.update({"share_encoder": True, "dim": 32, "image_tokens": 16, "dropout": 0.2})
    config.data.update({"size": 32, "crop": 32, "decode_cache": 2048})
    config.data.view.probability = 0.1
    config.data.table.scale = 10.0
    config.optim.update({"lr": 2e-3, "schedule": "cosine", "warmup": 50})
    config.train.update(steps=600, batch_size=12, evaluate_every=200, checkpoint_every=200)


def glioma(config):
    """Grade of glioma from slices of three sequences and a table; sizes of `derm`."""
    derm(config)
    config.recipe.update({"task": "grade", "num_classes": 2, "images": ("pre", "flair", "post")})
    config.data.update({"corpora": ("brain_mr_tabular",), "balance": "grade"})
    config.data.table.scale = 10.0
    config.train.update({"steps": 600, "batch_size": 32})
    config.evals.protocols = ("classify",)


def derm(config):
    """HAM10000 from random weights on two CPU cores; our choice throughout."""
    config.recipe.image = ConfigDict({"name": "resnet", "variant": "tiny", "dtype": "float32"})
    config.data.update({"size": 96, "crop": 96})
    config.data.view.probability = 1.0
    config.optim.update({"lr": 1e-3, "schedule": "cosine", "warmup": 60, "multipliers": ()})
    config.train.update(steps=1500, batch_size=42, evaluate_every=300, checkpoint_every=300)
    config.evals.views = 8  # docs/cfcml.md: what it is worth
