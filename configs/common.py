"""The sections every config has, with every setting and its default; methods override by name."""
# A new setting's default is what was done before it existed, so that older runs can be read.

from ml_collections import ConfigDict, FieldReference


def data(**fields) -> ConfigDict:
    """Corpora, tokenizer, image preparation and views."""
    return _section(
        {
            "corpora": ("cxr_phantom",),  # NAME or NAME:VARIANT, see `medvlp data list`
            "shares": (),  # share of each corpus in a batch; () = by size
            **{"split": "train", "texts": ""},  # a recipe of data/sections.py; "" = as stored
            "data_dir": "",  # prepared corpora; "" = $MEDVLP_DATA_DIR or the user's cache
            "manual_dir": "",  # the source's own files; "" = $MEDVLP_TEST_DATA/NAME
            "tokenizer": "",  # a file or folder, a shipped vocabulary, "train"; "" = init.text's
            "vocab_size": 4000,  # of a vocabulary that is trained
            "text_length": 256,  # tokens a section; IMITATE's released code
            "pack": 0.0,  # rows of them for each example, texts sharing a row; 0 = its own
            "size": 256,  # pixels a side before the crop; G2D, same group
            "crop": 224,  # pixels a side the encoder sees; IMITATE's released code
            "channels": 1,
            "fit": "squash",  # or "pad"; squash: IMITATE's released code
            **{"crop_black_border": True, "stretch": True},  # IMITATE's released code
            "legacy_wrap": False,  # their uint8 overflow of the brightest pixels
            "mask_lower_edge": 0.0,  # share of the image height blackened from below
            "view": {  # probabilities, degrees; IMITATE's released code
                "name": "imitate",
                **{"flip_horizontal": 0.5, "flip_vertical": 0.5, "rotation": 30.0},
                **{"perspective": 0.5, "perspective_probability": 0.5, "autocontrast": 0.5},
            },
            "balance": "",  # label task whose classes take turns in a batch; "" = as they come
            "table": {
                "exclude": (),  # columns left out
                "leakage": (),  # columns taken although the schema says they give away the label
                **{"encoding": "vectors", "scale": 1.0},  # others: tables.py; what is multiplied
                "text": "",  # of "sentences", folder or hub id: openai/clip-vit-base-patch32
                "tower": "",  # "text" where that holds an image encoder too
                "pooling": "",  # "projection" for CLIP; "" = the folder's, or the architecture's
            },
            "folds": {"count": 0, "index": 0, "task": "", "seed": 0}  # data/folds.py; count 0 = the
            | {"group": "patient_id", "inner": 0},  # corpus' own splits
            # Pairs fill `share` of a batch, each seen at most `passes` times; 0: any number.
            "pairing": {"ratio": 1.0, "variant": "disjoint", "share": 0.5, "passes": 0}
            | {"related": 0.5},
            "evidence": {"folder": "", "unit": "phrase", "negated": False}  # "" = by rules
            | {"phrases": 12, "length": 24, "pack": 0.0},  # rows of `length`, as data.pack
            "decode_cache": 0,  # decoded images kept in memory, size^2 bytes each
            **{"threads": 2, "prefetch": 4},
        },
        fields,
    )


def optim(**fields) -> ConfigDict:
    """AdamW with a single cosine over all steps; "adam" adds the decay to the gradient."""
    return _section(
        {
            "name": "adamw",
            "lr": 2e-4,  # IMITATE's released code
            "warmup": 0,  # steps
            "schedule": "cosine",
            "floor": 1e-8,  # IMITATE's released code
            "weight_decay": 0.05,  # likewise
            **{"b1": 0.9, "b2": 0.999},
            "clip": 0.0,  # largest global gradient norm; 0 = none
            "multipliers": (),  # ((pattern, factor), ...) on the learning rate
            "no_decay": (),  # patterns without weight decay
            "average": 0.0,  # decay of the average of the weights that is evaluated; 0 = none
            "freeze": (),  # patterns of fixed parameters, besides the recipe's own
        },
        fields,
    )


def train(**fields) -> ConfigDict:
    """Length, batch, and how often what is written."""
    return _section(
        {
            "steps": 1000,
            "batch_size": 128,  # global
            "chunks": 1,  # parts the batch is encoded in; exact, saves memory
            "log_every": 10,
            "checkpoint_every": 500,
            **{"keep": 2, "keep_every": 0},  # newest checkpoints; steps kept for good, 0 = none
            "refresh_every": 0,  # steps between two looks at the whole corpus; 0 = never
            "evaluate_every": 500,
            "evaluate_limit": 1000,  # examples of an evaluation during training
            "select": "",  # result on the validation split that picks the step; "" = the last
            "export": True,
            **{"wandb": False, "wandb_project": "medvlp"},
        },
        fields,
    )


def evals(**fields) -> ConfigDict:
    """What is measured at the end."""
    return _section(
        {
            "protocols": ("zero_shot", "retrieval", "probe"),
            "corpus": "",  # "" = the first of data.corpora
            "split": "test",
            "prompts": "",  # a file or shipped set, docs/evaluation.md; "" = the corpus' own
            "class_task": "",  # whose classes P@K counts; "" = the corpus' first task
            "batch_size": 64,
            "limit": 0,  # only the first examples; 0 = all
            "probe_limit": 0,  # training examples of the linear probe; 0 = all
            "resamples": 2000,  # of the bootstrap over patients
            "controls": ("untrained",),  # further ones: controls.NAMES, docs/evaluation.md
            "positive": "",  # class whose sensitivity and specificity count; "" = mean of all
            "views": 1,  # flips and turns over which class probabilities are averaged: 1, 4, 8
            "masked_edge": 0.12,
            "grounding": {"interpolation": "bilinear", "smoothing": 0.0}  # BioViL: nearest, 1.5
            | {"signed": False, "ddof": 0, "strict": True, "scale": "clamp"},
            "zero_shot": dict(draw=0, seed=6, strip=False, threshold="", by_rules=False),
            "probe": {"fractions": (1.0,), "draws": 3},  # papers: 0.01, 0.1, 1.0
        },
        fields,
    )


def rest(**fields) -> dict:
    """Seed, mesh, weights to start from, and the masked language modelling stage."""
    return {
        "seed": fields.pop("seed", 0),
        "mesh": ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "rules": ()}),
        "init": _section({"params": "", "image": "", "text": ""}, fields.pop("init", {})),
        "mlm": _section(  # our choice throughout
            {
                **{"steps": 400, "batch_size": 32},
                **{"lr": 1e-3, "warmup": 40, "weight_decay": 0.01, "rate": 0.15},
                "seed": 0,  # its own: seeds of a study share the frozen encoder
            },
            fields.pop("mlm", {}),
        ),
    }


def weights(**terms) -> ConfigDict:
    """Weights of loss terms; in place of each number (step, value) knots can be set."""
    return ConfigDict({k: FieldReference(v, field_type=object) for k, v in terms.items()})


def _section(defaults, fields) -> ConfigDict:
    """Merge; a name that is not among the defaults is an error of the config file."""
    section = ConfigDict(defaults)
    section.lock()
    section.update(fields)
    return section
