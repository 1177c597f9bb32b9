"""What lies beside the weights of a Hugging Face folder: tokenizer and image preprocessing."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medvlp_jax.config import UserError
from medvlp_jax.convert.files import check_own
from medvlp_jax.writing import replaced

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
PREPROCESSOR = "preprocessor_config.json"


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
