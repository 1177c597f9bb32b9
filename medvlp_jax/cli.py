"""The console script: `medvlp VERB ...`, each verb also `python -m medvlp_jax.VERB`."""

import importlib
import sys
from collections.abc import Callable

from medvlp_jax.config import UserError, nearest

VERBS = {
    "train": ("medvlp_jax.train", "train a method from a config; evaluates and exports at the end"),
    "evaluate": ("medvlp_jax.evaluate", "zero-shot, retrieval and linear probe of a run"),
    "convert": ("medvlp_jax.convert.__main__", "weights in from Hugging Face, and back out"),
    "data": ("medvlp_jax.data.__main__", "list, check and prepare corpora"),
}


def run(main: Callable, argv: list[str] | None = None) -> int:
    """Call a command; a UserError is one sentence on stderr and exit code 2."""
    try:
        main(argv)
    except UserError as error:
        print(f"medvlp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("medvlp: stopped; start the same command again to go on.", file=sys.stderr)
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    """Dispatch to a verb."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: medvlp VERB [--help]\n")
        print("\n".join(f"  {verb:<10}{text}" for verb, (_, text) in VERBS.items()))
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print(f"medvlp: no verb '{verb}'. {nearest(verb, list(VERBS))}", file=sys.stderr)
        return 2
    return run(importlib.import_module(VERBS[verb][0]).main, rest)


if __name__ == "__main__":
    sys.exit(main())
