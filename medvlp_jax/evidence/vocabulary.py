"""Train the WordPiece vocabulary that ships as medvlp_jax/data/vocab/risk.

python -m medvlp_jax.evidence.vocabulary OUT_DIR

Its texts are the paragraphs the template writes from the risk tables that ship with numbers, and
those of the vocabulary of the phantom's reports: a small text encoder reads both with whole words.
"""

import itertools
import json
import sys

from medvlp_jax.data import text
from medvlp_jax.data.datasets.cxr_phantom import vocabulary
from medvlp_jax.evidence import corpus, risk, template

SIZE = 1500
TABLES = ("cxr_phantom", "ham10000")
VARIANTS = 4


def texts() -> list[str]:
    """Return the training texts, in a fixed order."""
    return [*itertools.chain.from_iterable(map(paragraphs, TABLES)), *vocabulary.texts()]


def paragraphs(table: str, variants: int = VARIANTS) -> list[str]:
    """Return what the template writes from a risk table."""
    found = risk.read(table)
    write = template.writer(found)
    tasks = corpus.from_table(found, variants=variants)
    return [json.loads(write(task.request.text))["text"] for task in tasks]


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    text.train_wordpiece(texts(), vocab_size=SIZE, out_dir=sys.argv[1])
