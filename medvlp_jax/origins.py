"""What is known of where an encoder comes from, and which splits it has therefore not seen.

The run it was trained in says its corpora, the folds they were dealt into, and how images were
prepared. It is the one the user names, or the one whose folder an export lies in
(RUN/export/image); of anything else nothing is known.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from medvlp_jax import assemble, distributed, lineage
from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import corpora, folds, leakage

DEEPEST = 3  # folders between an export and its run, and one more


class Origin(NamedTuple):
    """The run of an encoder.

    Attributes:
      run: its folder; None where it is not known.
      data: the section of its config; {} where it is not known.
      corpora: that it and the runs before it were trained on; () where that is not known.
    """

    run: pathlib.Path | None = None
    data: Mapping[str, Any] = {}
    corpora: tuple[str, ...] = ()

    def fold_of(self, corpus: str) -> dict[str, Any]:
        """Return the arguments of `folds.open_fold` for a corpus; {} for its own splits."""
        return assemble.fold_of(corpus, self.data) if self.run else {}


def find(run: pathlib.Path | None, encoder: str | None) -> Origin:
    """Return the origin of a run's encoder, or of a folder or hub id.

    Raises:
      UserError: if `run` is no run.
    """
    if run is None:
        run = _around(encoder or "")
    if not run:
        return Origin()
    config = assemble.read_config(run)
    return Origin(run, config["data"], lineage.corpora(config))


def _around(encoder: str) -> pathlib.Path | None:
    """Return the folder of the run that a folder lies in; None for others and hub ids."""
    folder = pathlib.Path(encoder).expanduser()
    for parent in folder.resolve().parents[:DEEPEST] if folder.is_dir() else ():
        try:
            assemble.written_config(parent)
        except UserError:  # no config.json, or that of a model
            continue
        return parent
    return None


def said(origin: Origin, corpus: str, trained: str) -> list[str]:
    """Return what must be known of testing on a corpus, one sentence each.

    Args:
      origin: of the encoder.
      corpus: NAME or NAME:VARIANT.
      trained: the weights as the user named them; "" for random ones, which have seen nothing.
    """
    told = []
    if trained and origin.run:
        told.append(leakage.warning(origin.corpora, corpus))
    elif trained:
        told.append(
            f"what {trained} was trained on is not known here, nor whether it has seen images of "
            f"{corpus}."
        )
    if fold := origin.fold_of(corpus):
        told.append(
            f"{origin.run} was trained on fold {fold['index']} of {fold['count']} of {corpus}: the "
            "splits here are those of that fold."
        )
    return [sentence for sentence in told if sentence]


def open_splits(
    corpus: str, split: str, origin: Origin, **where: str
) -> tuple[corpora.Source, corpora.Source]:
    """Open the training split of a corpus and the one to score, as the run of an encoder has them.

    Args:
      corpus: NAME or NAME:VARIANT.
      split: to score; "" takes test, or validation where there is no test.
      origin: of the encoder. Of what it was trained on in folds, these are the splits.
      **where: data_dir and manual_dir.

    Raises:
      UserError: for a split that does not exist, or the one that is learnt from.
    """
    name, _, variant = corpus.partition(":")
    with distributed.writer_first(f"corpus {name}"):
        sources = corpora.open_all(name, builder_config=variant, **where)
    fold = origin.fold_of(corpus)
    if fold:
        sources = [folds.open_fold(sources, kind, **fold) for kind in folds.SPLITS]
    by_split = {source.split: source for source in sources if len(source)}
    split = split or ("test" if "test" in by_split else "validation")
    for wanted in ("train", split):
        if wanted not in by_split:
            raise UserError(f"{name} has no split '{wanted}'. {nearest(wanted, [*by_split])}")
    if split == "train":
        raise UserError("--split train is what is learnt from; accepted are the other splits.")
    return by_split["train"], by_split[split]
