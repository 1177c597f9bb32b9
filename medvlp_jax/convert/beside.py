"""What lies beside the weights of a Hugging Face folder: tokenizer and image preprocessing."""

import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medvlp_jax.config import UserError
from medvlp_jax.convert.files import (
    PREPROCESSOR,
    PROCESSOR,
    TOKENIZER_FILES,
    check_own,
    read_json,
)
from medvlp_jax.encoders.base import IMAGENET_MEAN, IMAGENET_STD
from medvlp_jax.writing import replaced

_HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Mean and deviation of processors whose file names none, by class in `transformers`.
NUMBERS = {
    "BitImageProcessor": _OPENAI,
    "CLIPImageProcessor": _OPENAI,
    "ConvNextImageProcessor": _HALVES,
    "DINOv3ViTImageProcessor": (IMAGENET_MEAN, IMAGENET_STD),
    "DeiTImageProcessor": _HALVES,
    "SiglipImageProcessor": _HALVES,
    "ViTImageProcessor": _HALVES,
}


def save_tokenizer(tokenizer: Any, out_dir: Path) -> None:
    """Write the files of a tokenizer, each whole or not at all.

    Args:
      tokenizer: as for `save`.
      out_dir: made if absent.

    Raises:
      UserError: for a folder without such files, or with one that is a link out of it.
    """
    if hasattr(tokenizer, "save_pretrained"):
        with tempfile.TemporaryDirectory() as made:
            tokenizer.save_pretrained(made)
            for file in filter(Path.is_file, Path(made).rglob("*")):
                _copy(file, out_dir / file.relative_to(made))
        return
    found = [name for name in TOKENIZER_FILES if (Path(tokenizer) / name).is_file()]
    if not found:
        raise UserError(f"{tokenizer} holds no tokenizer file, such as {TOKENIZER_FILES[0]}.")
    if Path(tokenizer).resolve() != out_dir.resolve():
        for name in found:
            check_own(Path(tokenizer) / name)
        for name in found:
            _copy(Path(tokenizer) / name, out_dir / name)


def _copy(file, target):
    with replaced(target) as scratch:
        shutil.copyfile(file, scratch)


def read_preprocessor(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """Return the file that says how images are prepared and what it says; None if there is none.

    Release 5 of `transformers` writes the processors of images and of texts into one file.

    Raises:
      UserError: if the file holds no JSON object.
    """
    if (folder / PREPROCESSOR).is_file():
        return folder / PREPROCESSOR, read_json(folder / PREPROCESSOR)
    if (folder / PROCESSOR).is_file():
        found = read_json(folder / PROCESSOR).get("image_processor")
        if isinstance(found, dict):
            return folder / PROCESSOR, found
    return folder / PREPROCESSOR, None


def mean_and_std(said: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return what images are normalised by: what the file says, else what its class takes.

    Args:
      said: what `read_preprocessor` found.

    Returns:
      Mean and deviation per channel, None where neither is known.
    """
    name = said.get("image_processor_type") or said.get("feature_extractor_type") or ""
    name = re.sub("(FeatureExtractor|ImageProcessor)(Fast|Pil)?$", "ImageProcessor", str(name))
    mean, std = NUMBERS.get(name, (None, None))
    return said.get("image_mean") or mean, said.get("image_std") or std


def image_processor(size: int, *, mean: Iterable[float], std: Iterable[float]) -> dict[str, Any]:
    """Describe our image preprocessing as `transformers.AutoImageProcessor` reads it.

    Args:
      size: pixels a side.
      mean: per channel, of pixels scaled to [0, 1].
      std: per channel, same scale.
    """
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,  # a grey image has three equal channels
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,  # PIL's bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
