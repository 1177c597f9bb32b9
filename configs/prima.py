"""PRIMA. STAGE_CORPUS: inject, align, sharpen, fuse, image, mlp of pad, derm, phantom, men."""

from ml_collections import ConfigDict

from configs import _prima_corpora, common

STAGES = ("inject", "align", "sharpen", "fuse", "image", "mlp")  # the last two are baselines
CORPORA = ("pad", "derm", "phantom", "men")
VARIANTS = ("", *(f"{stage}_{corpus}" for corpus in CORPORA for stage in STAGES))
EPOCH = 51  # steps of 32: of 2,298 images 80 % are no test images, and 90 % of those train
ALIGN = {"image": 0.2, "global": 0.3, "local": 0.2, "soft": 0.3}  # Eq. 7


def get_config(variant: str = "") -> ConfigDict:
    """Return the resolved config of a variant; "" is align_pad. What has no source is our choice.

    A stage starts from the one before: --config.init.params=RUN, but for the baselines.
    """
    if variant not in VARIANTS:
        raise ValueError(
            f"No variant '{variant}' of configs/prima.py. Known: {', '.join(VARIANTS[1:])}."
        )
    stage, _, corpus = (variant or "align_pad").partition("_")
    encoders = {"text": "Simonlee711/Clinical_ModernBERT", "llm": "Qwen/Qwen3-1.7B"}
    encoders["image"] = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    config = ConfigDict(
        {
            "recipe": recipe(),
            "data": common.data(size=256, channels=3, crop_black_border=False, stretch=False),
            "optim": common.optim(lr=3e-5, weight_decay=1e-3, floor=0.0),  # A.4, stage 2
            "train": common.train(steps=150 * EPOCH, batch_size=32, export=False),
            "evals": common.evals(protocols=("classify", "classify_studies"), controls=()),
            **common.rest(),
        }
    )
    config.init = ConfigDict({"params": "", **encoders})
    config.data.unlock()  # what only PRIMA reads
    config.data.update({"text_length": 128, "decode_cache": 2048})
    config.data.view = ConfigDict(
        {"name": "prima", "smallest": 0.6, "flip": 0.5, "rotation": 20.0, "jitter": 0.2}
        | {"hue": 0.05}
    )
    config.data.siblings = "study_id"  # the second view is another scan of the lesion
    config.data.llm_tokenizer = ""  # "" = that of init.llm
    config.data.metadata = ConfigDict(
        {"sentences": (), "unsaid": (), "words": (), "bins": (), "emphasised": (), "emphasis": 3.0}
    )
    globals()[stage](config)
    getattr(_prima_corpora, corpus)(config, stage)
    config.optim.warmup = config.train.steps // 10  # A.4
    return config


def recipe() -> ConfigDict:
    """Stages 2 and 3; every field is explained in recipes/prima.py, every choice in the docs."""
    lora = {"dropout": 0.05, "layers": "", "fused": False}  # all linears: the paper's "1 %", twice
    image = {"name": "dinov3", "variant": "B/16", "dtype": "bfloat16", "remat": "none"}
    text = {"name": "modernbert", "variant": "base", "pooling": "cls", "dtype": "bfloat16"}
    return ConfigDict(
        {
            "name": "prima",
            "stage": "align",
            "label": "diagnosis",
            "num_classes": 6,
            "image": {**image, "lora": {"rank": 32, "alpha": 64.0, **lora}},  # rank: section 2a
            # rank: section 1b; fused as in PyTorch: 1.69 M
            "text": {**text, "lora": {"rank": 8, "alpha": 16.0, **lora, "fused": True}},
            "weights": common.weights(**ALIGN),
            "images": ("image",),
            "views": 2,
            "dim": 768,
            "hidden": 768,
            "temperature": 0.07,
            "label_temperature": 5.0,
            "label_weight": 3.0,  # Eq. 6; applied before the inner product
            "local": "attention",
            "soft": "metadata",
            "soft_norm": "mean",
            "symmetric_views": False,  # Eq. 2
            "printed_local": False,
            "loss_tile": 512,
            "cached_text": True,
            "train_image": "lora",  # section 2a
            "metadata_mlp": 0,
            "mlp_reads": "text",
        }
    )


def inject(config):
    """Masked words of a risk corpus, stage 1b."""
    text = config.recipe.text
    config.init.update({"image": "", "llm": ""})  # no such encoders here
    weights = common.weights(mlm=1.0)
    config.recipe = ConfigDict({"name": "mlm", "text": text, "weights": weights, "rate": 0.3})
    config.data.corpora = ("knowledge",)
    config.data.knowledge = ConfigDict({"folder": "", "held_out": (), "allow_unvetted": False})
    config.data.text_length = 512
    config.optim.lr = 5e-5  # A.4
    config.train.update({"steps": 2500 * 18, "batch_size": 16})  # A.4; 280 paragraphs an epoch
    config.evals.protocols = ()


def align(config):
    """Two views and a text, stage 2a."""
    config.evals.protocols = ("probe",)


def sharpen(config):
    """Labels through a linear head, stage 2b: 30 epochs, the best on an inner validation split."""
    config.recipe.stage = "sharpen"
    config.recipe.weights = common.weights(cross_entropy=1.0)
    config.train.update({"steps": 30 * EPOCH, "evaluate_every": EPOCH, "checkpoint_every": EPOCH})
    config.train.select = "classify/diagnosis/macro_f1"


def fuse(config):
    """The language model, stage 3."""
    sharpen(config)
    config.recipe.update({"stage": "fuse", "fusion_hidden": 1024, "train_llm": "lora"})
    lora = {"rank": 16, "alpha": 32.0, "dropout": 0.05, "layers": "", "fused": False}  # section 3
    llm = {"name": "qwen3", "variant": "1.7B", "dtype": "bfloat16", "remat": "block"}
    config.recipe.llm = ConfigDict({**llm, "layout": "scan", "lora": lora})
    config.recipe.prompt = ConfigDict(
        {
            "question": "You are a dermatologist. Given the image features and the patient's risk "
            "factors, choose the diagnosis. Options: {options}.",
            "answer": "Diagnosis:",
            "option": " {letter}",
            "delimiters": ("image start", "image end", "text start", "text end"),
        }
    )
    config.optim.update({"lr": 1e-5, "weight_decay": 3e-2})  # A.4
    config.train.update({"steps": 80 * EPOCH, "chunks": 4})  # A.4; 4 x 8 of a batch


def image(config):
    """The baseline of images alone: DINOv3 with low-rank factors, as many steps as 2a and 2b."""
    sharpen(config)
    config.train.steps = 180 * EPOCH


def mlp(config):
    """The baseline "+ metadata via MLP": beside it the untouched text encoder's class token."""
    image(config)
    config.recipe.metadata_mlp = 256
