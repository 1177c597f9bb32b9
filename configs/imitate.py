"""IMITATE. Variants: "" (released code), demo, smoke, radiology_qa, cxr_pairs."""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("", "demo", "smoke", "radiology_qa", "cxr_pairs")


def get_config(variant: str = "") -> ConfigDict:
    """Return the resolved config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(
            f"No variant '{variant}' of configs/imitate.py. Known: {', '.join(VARIANTS[1:])}."
        )
    config = ConfigDict(
        {
            "recipe": recipe(),
            "data": common.data(),
            "optim": common.optim(),
            # 20 epochs of 213,384 pairs at 128; IMITATE's released code
            "train": common.train(steps=33_341, batch_size=128, checkpoint_every=1000),
            "evals": common.evals(),
            **common.rest(init={"text": "emilyalsentzer/Bio_ClinicalBERT"}),
        }
    )
    if variant:
        small(config)
        globals()[variant](config)
    return config


def recipe() -> ConfigDict:
    """The released code's settings; every field is explained in recipes/imitate.py."""
    return ConfigDict(
        {
            "name": "imitate",
            "image": {"name": "resnet", "variant": "50", "dtype": "float32"},
            "text": {
                "name": "bert",
                "variant": "base",
                "pooling": "cls",
                "dropout": 0.1,  # only where the text encoder trains
                "attention_dropout": 0.1,
                "dtype": "float32",
            },
            # beta(e) is 1 in 20 epochs; longer runs: schedules.imitate_beta for both beta terms
            "weights": common.weights(
                impression=1.0, findings=1.0, view_diagnosis=1.0, view_reading=1.0
            ),
            "dim": 512,
            "keep": (0.25, 0.15, 0.10, 0.10),
            "num_tokens": 512,
            "mask_padding": False,
            "eval_draws": 4,  # our choice
            "text_hidden": 1024,
            "temperature": 0.07,
            "view_temperature": 0.2,
            "kernel": "exp",
            "strength": 0.2,
            "findings_meet": "reading",
            "centre_prior": False,
            "normalise_target": False,
            "same_text": False,
            "contrast_group": 128,  # the paper's batch of one device
            "loss_tile": 512,  # measured, benchmarks/contrastive.py; 0 = dense
            "train_text": False,
            "cached_text": True,
            "legacy_mean_over_batch": False,
            "legacy_four_passes": False,
            "legacy_shared_statistics": False,
        }
    )


def small(config):
    """Sizes for two CPU cores, our choice: all that the paper has, only smaller."""
    config.recipe.image.variant = "tiny"
    config.recipe.text.variant = "tiny"
    # Masked words alone do not train the [CLS] vector; dropout costs a fifth of a step on CPU.
    config.recipe.text.update({"pooling": "mean", "dropout": 0.0, "attention_dropout": 0.0})
    # Mean features correlate at 0.8; centred ones only where reports are alike. Measured better.
    config.recipe.centre_prior = True
    config.recipe.update({"dim": 128, "text_hidden": 256, "num_tokens": 64, "contrast_group": 0})
    config.init.text = "mlm"
    config.data.update({"tokenizer": "cxr_phantom", "text_length": 64, "size": 106, "crop": 96})
    config.data.decode_cache = 8192
    # A few epochs do not suffice to learn chests that hang upside down.
    config.data.view.update({"flip_vertical": 0.0, "rotation": 10.0, "perspective": 0.2})
    config.optim.update({"lr": 3e-3, "warmup": 40})


def demo(config):
    """The embedded default: generated radiographs, about ten minutes on two cores."""
    config.data.corpora = ("cxr_phantom:demo",)
    config.train.update({"steps": 660, "batch_size": 64, "checkpoint_every": 220})
    config.train.update({"evaluate_every": 220, "evaluate_limit": 256})
    config.mlm.steps = 300


def smoke(config):
    """A minute or two: every part once."""
    config.data.update({"corpora": ("cxr_phantom:tiny",), "size": 72, "crop": 64})
    config.train.update({"steps": 6, "batch_size": 16, "checkpoint_every": 3, "log_every": 1})
    config.train.update({"evaluate_every": 3})
    config.mlm.update({"steps": 5, "batch_size": 16, "warmup": 1})
    config.optim.warmup = 1
    config.evals.resamples = 100


def radiology_qa(config):
    """Real CT, MR, X-ray ... images with composed texts; Findings = modality, plane, organ."""
    config.data.update({"corpora": ("radiology_qa",), "tokenizer": "train", "text_length": 48})
    config.data.update({"size": 124, "crop": 112})
    config.recipe.same_text = True  # 2,768 of 2,942 share modality, plane, organ
    # All 480 channels of the small network: about as many tokens as the paper draws (446).
    config.recipe.update({"keep": (1.0,) * 4, "num_tokens": 480, "eval_draws": 1})
    config.evals.update({"split": "validation", "controls": ("untrained", "masked_edge")})
    config.train.update({"steps": 1600, "batch_size": 64, "checkpoint_every": 400})
    config.train.update({"evaluate_every": 400, "evaluate_limit": 410})


def cxr_pairs(config):
    """Real radiographs with clinical notes: 142 training pairs, no claim beyond that."""
    config.data.update({"corpora": ("cxr_pairs",), "tokenizer": "train", "text_length": 128})
    config.evals.update({"split": "validation"})
    config.train.update({"steps": 300, "batch_size": 32, "checkpoint_every": 100})
