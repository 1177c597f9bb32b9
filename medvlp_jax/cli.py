"""The console script: `medvlp VERB ...`, each verb also `python -m medvlp_jax.VERB`."""

import importlib
import os
import pathlib
import select
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax

from medvlp_jax import writing
from medvlp_jax.config import StorageError, UserError, nearest
from medvlp_jax.training import stopping

VERBS = {
    "train": ("medvlp_jax.train", "train a method from a config; evaluates and exports at the end"),
    "evaluate": ("medvlp_jax.evaluate", "protocols and controls of a run, with intervals"),
    "compare": ("medvlp_jax.evaluation.paired", "is one classifier better, paired over patients"),
    "table": ("medvlp_jax.table", "several runs side by side, and published figures below"),
    "report": ("medvlp_jax.report", "one HTML page of a run"),
    "adapt": ("medvlp_jax.adapt", "fine-tune, segment or detect on any image encoder"),
    "convert": ("medvlp_jax.convert.__main__", "weights in from Hugging Face, and back out"),
    "evidence": ("medvlp_jax.evidence.__main__", "evidence of reports, risk knowledge of articles"),
    "data": ("medvlp_jax.data.__main__", "list, check and prepare corpora"),
    "bench": ("medvlp_jax.bench", "how many images a second your pipeline makes"),
}


def run(main: Callable, argv: list[str] | None = None) -> int:
    """Call a command and return its exit code.

    0 finished; 2 bad input, one sentence on stderr; 74 the same for a disk that is full or a file
    system that fails, another start may mend it; 75 asked to stop and saved, see
    training/stopping.py; 130 Ctrl-C twice; 141 who reads the output has left, as `| head` does; 1 a
    defect, with its traceback.
    """
    try:
        main(argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"medvlp: {error}", file=sys.stderr)
        return error.code
    except stopping.Stopped:
        print("medvlp: stopped; start the same command again to go on.", file=sys.stderr)
        return stopping.EXIT_CODE
    except KeyboardInterrupt:
        print("medvlp: broken off; start the same command again to go on.", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            # Python writes once more at exit, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        if file := _in_the_way(error):
            print(f"medvlp: {file} is a file; name a folder.", file=sys.stderr)
            return 2
        if isinstance(error, IsADirectoryError) and error.filename:
            # Of a file that could not take the place of a folder, the second one is the folder.
            folder = error.filename2 or error.filename
            print(f"medvlp: {folder} is a folder; name a file.", file=sys.stderr)
            return 2
        if isinstance(error, OSError) and error.errno in writing.PASSING:
            print(f"medvlp: {error}.", file=sys.stderr)
            return StorageError.code
        traceback.print_exc()
        return 1
    return 0


def _is_unread() -> bool:
    """Say whether nobody reads what is printed any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _in_the_way(error: Exception) -> pathlib.Path | None:
    """Return the file that stands where a command wanted a folder, if that is the error."""
    if not isinstance(error, (FileExistsError, NotADirectoryError)) or not error.filename:
        return None
    place = pathlib.Path(error.filename)
    return next((path for path in (place, *place.parents) if path.is_file()), None)


def leave(code: int) -> NoReturn:
    """End the process with this code, and without waiting where waiting could take for ever.

    Python joins threads at exit, and one of them may be why the run was stopped: a read that does
    not return. JAX waits minutes for the other processes, of which a failed one would be the last
    to hear.
    """
    together = jax.distributed.is_initialized()
    if together and code in (0, stopping.EXIT_CODE):
        jax.distributed.shutdown()
    if code == 0 or not (together or code == stopping.EXIT_CODE):
        sys.exit(code)
    if together:
        name = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"medvlp: {name} leaves with code {code}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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


def command() -> NoReturn:
    """Run the console script."""
    leave(main())


if __name__ == "__main__":
    command()
