"""Where a checkpoint is: a folder, or an id of the Hugging Face hub, which is downloaded."""

import functools
import sys
from pathlib import Path

from medvlp_jax.config import UserError
from medvlp_jax.convert.files import GENERATION, PREPROCESSOR, PROCESSOR, TOKENIZER_FILES


def fetch(path: str | Path) -> Path:
    """Return the folder itself, or download the hub id's config, safetensors and tokenizer.

    Raises:
      UserError: if it is not a folder and reads like one, or the hub does not give it.
    """
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists():
        raise UserError(f"{path} is a file; give the folder that holds config.json.")
    # Somebody else may have named a model as a folder of this user that was mistyped.
    if str(path).startswith((".", "/", "~")) or Path(Path(path).parts[0]).is_dir():
        raise UserError(
            f"'{path}' is no folder, and it is a path here, so the hub was not asked; accepted are "
            "a folder that exists and the id of a model on the hub, OWNER/NAME, where no folder "
            "OWNER is."
        )
    import huggingface_hub  # here, so that reading a folder needs nothing of the network's

    _say_once(f"medvlp: downloading {path} from the Hugging Face hub, unless it was before.")
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    wanted += [GENERATION, PREPROCESSOR, PROCESSOR, *TOKENIZER_FILES]
    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=wanted))
    except (huggingface_hub.errors.HfHubHTTPError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"'{path}' is no folder, and the hub did not give it: {reason}") from error


@functools.cache
def _say_once(line):
    print(line, file=sys.stderr, flush=True)
