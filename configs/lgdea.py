"""LGDEA, few pairs: "" (ViT-B/16), demo, study, the start of its images (views), smoke."""

from ml_collections import ConfigDict

from configs import common, imitate

VARIANTS = ("", "demo", "study", "views", "smoke")
IMAGENET = {"image": "google/vit-base-patch16-224-in21k"}  # its rate, 1e-5, moves no random one
STUDY_IMAGE = {"name": "resnet", "variant": "tiny", "dtype": "float32"}
STUDY_IMAGE |= {"hidden_sizes": (32, 64, 128), "depths": (1, 1, 2)}  # ends at 5 x 5 pixels
UPRIGHT = {"flip_horizontal": 0.0, "flip_vertical": 0.0, "rotation": 10.0}  # phrases tell sides
STUDY_PIXELS = {"size": 88, "crop": 80}


def get_config(variant: str = "") -> ConfigDict:
    """Return the resolved config of a variant."""
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS[1:])
        raise ValueError(f"No variant '{variant}' of configs/lgdea.py. Known: {known}.")
    if variant == "views":
        return views()
    config = ConfigDict(
        {
            "recipe": recipe(),
            "data": common.data(text_length=128),
            # Learning rates, decay and 40 % of warm-up: a sibling paper of the same authors.
            "optim": common.optim(
                lr=1e-4, weight_decay=1e-6, multipliers=(("^(image|text)/", 0.1),), warmup=8000
            ),
            "train": common.train(steps=20_000, batch_size=64, refresh_every=2500),
            "evals": common.evals(),
            **common.rest(init={"text": "emilyalsentzer/Bio_ClinicalBERT", **IMAGENET}),
        }
    )
    config.data.update({"view": UPRIGHT, "pairing": {"ratio": 0.1}})  # half of a batch are pairs
    if variant:
        small(config)
        globals()[variant](config)
    return config


def recipe() -> ConfigDict:
    """Every field is explained in recipes/lgdea.py; none is published, all are our choice."""
    weights = {"reconstruction": 1.0, "paired": 1.0, "unpaired": 0.5, "alignment": 1.0}
    weights |= {"relations": 0.5, "global": 1.0, "global_relations": 0.0, "usage": 0.0}
    return ConfigDict(
        {
            "name": "lgdea",
            "image": {"name": "vit", "variant": "B/16", "dtype": "float32"},
            "text": {"name": "bert", "variant": "base", "pooling": "cls", "dtype": "float32"},
            "weights": common.weights(**weights),
            "dim": 256,
            "prototypes": 64,
            "lesions": 8,
            "depth": 2,
            "num_heads": 12,
            "temperature": 0.1,
            "image_temperature": 0.1,
            "alignment_temperature": 0.07,
            "global_temperature": 0.07,
            "shrinkage": 0.01,
            "neighbours": 10,
            "hops": 5,
            "alpha": 0.8,
            "related": 10,
            "kept": 50,
            "near_reports": 0,  # 50 gave better relations, docs/lgdea-told.md
            "confidence": "evidence",  # "link", the specification's, trusts no unpaired image
            "least_confidence": 0.2,
            "moved": "both",
            "paired_moved": "images",
            "related_pairs": True,
            "by_share": True,
            "meets": "evidence",
            "loss_tile": 512,
        }
    )


def small(config):
    """Sizes for two CPU cores."""
    block = {"depth": 4, "width": 96, "num_heads": 4, "mlp_dim": 192, "dtype": "float32"}
    config.recipe.image = ConfigDict({"name": "vit", "variant": "tiny", **block, "patch_size": 8})
    config.recipe.image.pooling = "mean"  # each patch has its share in what meets the report
    config.recipe.text = ConfigDict({"name": "bert", "variant": "tiny", "pooling": "mean"})
    config.recipe.text.update({"dropout": 0.0, "attention_dropout": 0.0, "dtype": "float32"})
    config.recipe.update({"dim": 64, "prototypes": 32, "num_heads": 4})
    config.init.update({"image": "", "text": "mlm"})
    config.data.update({"tokenizer": "cxr_phantom", "decode_cache": 8192})
    config.optim.update({"lr": 2e-3, "warmup": 40, "multipliers": ()})


def demo(config):
    """Generated radiographs, a tenth of them with their report."""
    config.data.corpora = ("cxr_phantom:demo",)
    config.recipe.image = ConfigDict(STUDY_IMAGE)  # a small ViT learns nothing in this time
    config.recipe.text.update({"width": 96, "depth": 2, "mlp_dim": 192})
    config.recipe.update({"near_reports": 50, "hops": 1, "kept": 100, "related": 100})
    config.recipe.update({"moved": "images", "related_pairs": False})  # as measured
    config.recipe.weights.global_relations = 1.5
    config.data.update({**STUDY_PIXELS, "text_length": 48})
    # `medvlp bench data`: 1.43 rows a report hold its words; batches of sick patients need more.
    config.data.evidence.update({"phrases": 4, "length": 12, "pack": 2.2})
    config.optim.update({"lr": 3e-3, "multipliers": (("^text/", 0.1),)})
    config.data.pairing.update({"share": 1.0, "passes": 60})  # rows apart where pairs run out
    config.train.update({"steps": 800, "refresh_every": 100, "checkpoint_every": 200})
    config.train.update({"evaluate_every": 200, "evaluate_limit": 256})
    config.evals.protocols = ("zero_shot", "retrieval", "grounding", "probe")
    config.evals.controls = ("untrained", "shuffled_phrases")


def study(config):
    """A cell of benchmarks/methods_lgdea.py, which starts from the encoder of `views`."""
    demo(config)
    config.optim.multipliers = (("^(image|text)/", 0.1),)
    config.data.pairing.update({"share": 0.75, "passes": 0})  # docs/lgdea-study.md
    config.train.update(steps=1800, refresh_every=150, evaluate_every=0, export=False)
    config.evals.update({"protocols": ("zero_shot", "retrieval", "grounding"), "resamples": 500})


def views():
    """Where the study's image encoder starts: two views of an image find each other, no report."""
    config = imitate.get_config("demo")
    config.recipe.image = ConfigDict(STUDY_IMAGE)
    config.recipe.update({"keep": (0.25, 0.15, 0.10), "view_temperature": 0.1, "kernel": "none"})
    config.recipe.weights.update({"impression": 0.0, "findings": 0.0})
    config.optim.clip = 1.0
    config.data.update({**STUDY_PIXELS, "decode_cache": 8192})
    config.data.view.update({**UPRIGHT, "perspective": 0.2})
    config.init.text = ""  # random: nothing reads it
    config.train.update({"steps": 900, "checkpoint_every": 300, "evaluate_every": 0})
    config.evals.update({"protocols": ("probe",), "probe": {"fractions": (0.1, 1.0)}})
    return config


def smoke(config):
    """The same code in a few minutes, on the 169 generated radiographs of "tiny"; means nothing."""
    block = {"depth": 1, "width": 32, "num_heads": 2, "mlp_dim": 64}
    config.recipe.image.update({**block, "patch_size": 16})
    config.recipe.text.update(block)
    config.recipe.update({"dim": 16, "prototypes": 8, "depth": 1, "num_heads": 2, "hops": 2})
    config.recipe.update({"neighbours": 4, "lesions": 3, "near_reports": 8})
    config.mlm.update({"steps": 5, "batch_size": 16, "warmup": 1})
    config.optim.warmup = 2
    config.data.update({"corpora": ("cxr_phantom:tiny",), "evidence": {"phrases": 3, "length": 12}})
    config.data.update({"size": 70, "crop": 64, "text_length": 24, "pairing": {"ratio": 0.3}})
    config.train.update({"steps": 8, "batch_size": 16, "refresh_every": 4, "checkpoint_every": 4})
    config.train.update({"log_every": 1, "evaluate_every": 0, "export": False})
    config.evals.update({"protocols": ("retrieval",), "limit": 32, "batch_size": 16})
    config.evals.update({"resamples": 5, "controls": ()})
