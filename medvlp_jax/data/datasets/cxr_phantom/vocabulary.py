"""Train the WordPiece vocabulary that ships as medvlp_jax/data/vocab/cxr_phantom.

python -m medvlp_jax.data.datasets.cxr_phantom.vocabulary OUT_DIR

Its texts are phantom reports, their prompts, and a few words of radiology at large, so that the
small real corpora do not fall apart into letters. Every letter and digit is in it, so that no word
is unknown.
"""

import json
import string
import sys
from pathlib import Path

from medvlp_jax.data import text
from medvlp_jax.data.datasets.cxr_phantom import generate, patients

SIZE = 1000
SEED = 1000  # a population of its own: not that of the demo
PATIENTS = 2000
GENERAL = (
    "chest abdomen abdominal brain head skull neck face sinuses spine spinal cord breast pelvis "
    "heart lung liver kidney spleen pancreas bowel colon bone joint knee hip shoulder hand foot "
    "vessel aorta artery vein musculoskeletal gastrointestinal genitourinary cardiovascular "
    "axial coronal sagittal frontal lateral oblique transverse longitudinal plane view image scan "
    "x ray radiograph ct mr mri ultrasound angiography mammography pet contrast weighted t1 t2 "
    "flair with and without of the in is are patient year old male female history show shows "
    "fracture tumor cyst hemorrhage infarct stroke pneumonia tuberculosis infection abscess "
    "lesion metastasis carcinoma glioma melanoma nevus benign malignant keratosis dermatitis "
    "covid viral bacterial fungal ards opacity ground glass interstitial diffuse bilateral"
)


def texts() -> list[str]:
    """Return the training texts, in a fixed order."""
    prompts = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))
    classes = prompts["tasks"]["finding"]["classes"].values()
    spoken = [text for c in classes for side in c.values() for text in side]
    reports = [
        " ".join(generate.plan(SEED, who, 0).report[:2])
        for who in patients.population(SEED, PATIENTS)
    ]
    characters = string.ascii_lowercase + string.digits
    letters = " ".join([*(c + c for c in characters), *characters, *string.punctuation])
    return [*reports, *spoken, *[GENERAL] * 20, letters]


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    text.train_wordpiece(texts(), vocab_size=SIZE, out_dir=sys.argv[1])
