"""What configs/prima.py says of each corpus: its table in words, and sizes for two CPU cores.

Sentences and bins are our choice; the paper names neither attributes nor wording.
"""

from ml_collections import ConfigDict

DECADES = tuple(range(10, 100, 10))
YES_NO = (("True", "yes"), ("False", "no"), ("FEMALE", "female"), ("MALE", "male"))
ROMAN = (("1.0", "I"), ("2.0", "II"), ("3.0", "III"), ("4.0", "IV"), ("5.0", "V"), ("6.0", "VI"))
PAD_SENTENCES = (  # what a photograph can show or a lesion is asked about; not the way of life
    "Age: {age} years.",
    "Sex: {gender}.",
    "Skin type: Fitzpatrick {fitspatrick}.",
    "Location: {region}.",
    "Diameter: {diameter_1} x {diameter_2} mm.",
    "Itching: {itch}.",
    "Growing: {grew}.",
    "Painful: {hurt}.",
    "Changed: {changed}.",
    "Bleeding: {bleed}.",
    "Elevated: {elevation}.",
    "Previous skin cancer: {skin_cancer_history}.",
    "Previous cancer: {cancer_history}.",
)
PAD_UNSAID = ("smoke", "drink", "background_father", "background_mother", "pesticide")
PAD_UNSAID += ("has_piped_water", "has_sewage_system")  # y holds all attributes, Eq. 6
MILLIMETRES = (5, 10, 20)
PAD_BINS = (("age", DECADES), ("diameter_1", MILLIMETRES), ("diameter_2", MILLIMETRES))
PHANTOM_BINS = (
    ("age", DECADES),
    ("smoking", (0, 10, 20, 40)),
    ("oxygen_saturation", (90, 94, 97)),
    ("white_cells", (6, 8, 10, 13)),
    ("bnp", (50, 100, 200, 400)),
)
MEN_BINS = (
    ("age", DECADES),
    ("adc", (800, 900, 1000)),
    ("tumour_area", (300, 400, 500)),
    ("oedema_area", (850,)),
)


def folds(config, stage, task="diagnosis", group="study_id"):
    """Five folds by lesion, a tenth of the rest for choosing the step; test on the held fold."""
    if stage == "inject":
        return
    config.data.folds.update({"count": 5, "task": task, "group": group, "inner": 10})
    config.evals.split = "test"


def pad(config, stage):
    """PAD-UFES-20 by lesion, as published."""
    folds(config, stage)
    if stage != "inject":
        config.data.corpora = ("pad_ufes_20",)
    words = YES_NO + ROMAN
    config.data.metadata.update({"sentences": PAD_SENTENCES, "words": words, "bins": PAD_BINS})
    config.data.metadata.unsaid = PAD_UNSAID


def derm(config, stage):
    """HAM10000 from random weights: age, sex and site."""
    small(config, stage, epoch=72)  # 756 lesions, thrice: docs/prima.md
    folds(config, stage)
    if stage != "inject":
        config.data.corpora = ("ham10000",)
        config.recipe.num_classes = 7
    config.data.metadata.bins = (("age", DECADES),)


def phantom(config, stage):
    """Generated radiographs whose table shifts the odds of disease."""
    small(config, stage, epoch=50)
    folds(config, stage, group="patient_id")
    config.data.update({"channels": 1, "siblings": ""})  # visits differ in disease
    # Chests have an upper side, and a left.
    config.data.view.update({"flip": 0.0, "rotation": 10.0, "smallest": 0.8, "hue": 0.0})
    if stage != "inject":
        config.data.corpora = ("cxr_phantom:clinic",)
        config.recipe.num_classes = 6
    config.data.metadata.bins = PHANTOM_BINS
    if stage == "fuse":
        config.recipe.prompt.question = (
            "You are a radiologist. Given the image features and the patient's risk factors, "
            "choose the diagnosis. Options: {options}."
        )


def men(config, stage):
    """Generated slices of three sequences: J = 3."""
    small(config, stage, epoch=12)
    folds(config, stage, task="grade", group="patient_id")
    config.data.update({"channels": 1, "siblings": ""})
    config.data.metadata.bins = MEN_BINS
    if stage == "inject":
        return
    config.data.corpora = ("men_phantom:flat",)
    config.recipe.update({"label": "grade", "num_classes": 3, "images": ("t1", "t2", "adc")})
    config.recipe.views = 3
    config.train.select = config.train.select.replace("diagnosis", "grade")
    if stage == "fuse":
        config.recipe.prompt.question = (
            "You are a radiologist. Given the image features and the patient's metadata, choose "
            "the grade of the meningioma. Options: {options}."
        )


def small(config, stage, epoch):
    """From random weights, so all of image encoder and language model train; 72 x 72 pixels."""
    no_lora = ConfigDict({"rank": 0, "alpha": 1.0, "dropout": 0.0, "layers": "", "fused": False})
    config.recipe.text.update({"variant": "tiny", "dtype": "float32", "lora": no_lora})
    config.recipe.text.pooling = "mean"  # masked words alone do not train the class token
    config.init.update({"image": "", "text": "", "llm": ""})
    config.data.update({"tokenizer": "risk", "llm_tokenizer": "risk"})
    config.data.update({"size": 80, "crop": 72, "text_length": 96})
    # What align has learnt does not survive its own rate: measured, docs/prima.md.
    config.optim.update({"lr": 3e-4 if stage == "sharpen" else 1e-3, "weight_decay": 0.05})
    lengths = {"inject": 300, "align": 3 * epoch, "sharpen": 5 * epoch, "fuse": 10 * epoch}
    # As many steps as the three stages together: a baseline lacks no training.
    lengths |= {"image": 18 * epoch, "mlp": 18 * epoch}
    config.train.update({"steps": lengths[stage], "chunks": 1, "log_every": 10})
    config.train.checkpoint_every = 2 * epoch
    if stage == "inject":
        return
    image = {"variant": "tiny", "patch_size": 12, "dtype": "float32", "lora": no_lora}
    config.recipe.image.update({**image, "rope_rescale": 1.0})
    config.recipe.update({"dim": 128, "hidden": 128, "train_image": "all"})
    config.recipe.mlp_reads = "vector"  # a text encoder from random weights would be no match
    if stage != "align":
        config.train.evaluate_every = 2 * epoch
    if stage == "fuse":
        config.recipe.llm.update({"variant": "tiny", "dtype": "float32", "remat": "none"})
        config.recipe.llm.update({"layout": "unrolled", "lora": no_lora})
        config.recipe.update({"fusion_hidden": 128, "train_llm": "all"})
