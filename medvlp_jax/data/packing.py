"""Several texts behind one another in a row, so that an encoder computes on words, not on padding.

The texts of a group of examples share a fixed number of rows; a group lies on one device, so that
packing moves nothing between devices. Longest texts first, each into the first row that has room
(first-fit decreasing: Johnson 1974, https://doi.org/10.1137/0203025, at most 11/9 of the fewest
rows). Where a group has more words than its rows hold, its longest texts lose their ends, all down
to one length, and that is said.

Axis letters: n texts of a group, T tokens, g groups, r rows of a group, G texts of a row, N phrases
of an example.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from absl import logging

from medvlp_jax.config import UserError
from medvlp_jax.encoders.base import Packed, Tokens

SHORTEST = 2  # tokens: an empty text is its first and its last one
CROWDED = 4  # times the texts a row holds if all have the same number


class Place(NamedTuple):
    """Where each of n texts lies: row, which text of the row it is, and its first token."""

    row: np.ndarray
    slot: np.ndarray
    start: np.ndarray


def rows_of(share: float, examples: int) -> int:
    """Return r, the rows of a group of so many examples."""
    return math.ceil(share * examples)


def slots_of(texts: int, rows: int, length: int) -> int:
    """Return G, how many texts a row may hold; more room costs memory and is hardly ever used."""
    return min(length // SHORTEST, CROWDED * math.ceil(texts / rows))


def check(share: float, examples: int, texts: int, length: int, setting: str) -> None:
    """Refuse a share that leaves texts without a place, however short they are.

    Args:
      share: rows for each example, above 0.
      examples: of a group.
      texts: of a group, n.
      length: T.
      setting: what the user calls the share.

    Raises:
      UserError: naming what would be accepted.
    """
    most = texts / examples
    if not 0 < share <= most:
        raise UserError(f"{setting}={share} must be in (0, {most:g}], or 0 for no packing.")
    rows = rows_of(share, examples)
    if rows * slots_of(texts, rows, length) < texts:
        least = math.ceil(texts / (length // SHORTEST)) / examples
        raise UserError(
            f"{setting}={share} gives {texts} texts {rows} rows of {length} tokens, too few even "
            f"for empty ones; accepted is {least:.3f} or more."
        )


def place(sizes: np.ndarray, *, rows: int, length: int, slots: int) -> Place | None:
    """Find a place for texts of so many tokens [n], longest first; None where they do not fit."""
    free, held = np.full(rows, length), np.zeros(rows, np.int64)
    found = Place(*np.zeros((3, len(sizes)), np.int64))
    for text in np.argsort(-sizes, kind="stable"):
        fits = (free >= sizes[text]) & (held < slots)
        row = int(fits.argmax())
        if not fits[row]:
            return None
        found.row[text], found.slot[text] = row, held[row]
        found.start[text] = length - free[row]
        free[row] -= sizes[text]
        held[row] += 1
    return found


def pack(tokens: Tokens, *, rows: int, used: np.ndarray | None = None) -> tuple[Packed, int]:
    """Put the texts of one group into rows.

    Args:
      tokens: NumPy [n, T], one text a row, padded at its end.
      rows: r.
      used: [n] bool, texts that are needed; the others get a place without meaning. None: all.

    Returns:
      Packed without its group axis, and how many tokens were cut off.
    """
    ids, mask = tokens
    count, length = ids.shape
    slots = slots_of(count, rows, length)
    wanted = np.arange(count) if used is None else np.flatnonzero(used)
    whole = sizes = mask.sum(1)[wanted]
    found = place(sizes, rows=rows, length=length, slots=slots)
    if found is None:
        few, many = SHORTEST, length  # `few` fits: see `check`
        while many - few > 1:
            middle = (few + many) // 2
            fits = place(np.minimum(whole, middle), rows=rows, length=length, slots=slots)
            few, many = (few, middle) if fits is None else (middle, many)
        sizes = np.minimum(whole, few)
        found = place(sizes, rows=rows, length=length, slots=slots)
    packed = Packed(
        # Padding is what it was: the first token that is none of a text.
        ids=np.full((rows, length), ids[np.unravel_index(mask.argmin(), mask.shape)], np.int32),
        mask=np.zeros((rows, length), bool),
        segments=np.zeros((rows, length), np.int32),
        filled=np.zeros((rows, slots), bool),
        at=np.zeros(count, np.int32),
    )
    for k in np.argsort(found.start):
        text, size, row, start, slot = (
            wanted[k],
            sizes[k],
            found.row[k],
            found.start[k],
            found.slot[k],
        )
        packed.ids[row, start : start + size] = ids[text, :size]
        packed.ids[row, start + size - 1] = ids[text, whole[k] - 1]  # cut or not, its last one
        packed.mask[row, start : start + size] = True
        # To the end of the row: the padding belongs to the last text, as it does without packing.
        packed.segments[row, start:] = slot
        packed.filled[row, slot] = True
        packed.at[text] = row * slots + slot
    return packed, int((whole - sizes).sum())


def fewest_rows(tokens: Tokens, used: np.ndarray | None = None) -> int:
    """Return the rows that the texts [n, T] of one group take, none cut."""
    sizes = tokens.mask.sum(1)
    sizes = sizes if used is None else sizes[used]
    count, length = tokens.mask.shape
    rows = max(1, math.ceil(sizes.sum() / length))
    while place(sizes, rows=rows, length=length, slots=slots_of(count, rows, length)) is None:
        rows += 1
    return rows


class Packing:
    """Packs texts of the batches of a process; says once where more than 1 % of words are cut.

    Attributes:
      shares: rows for each example by batch key.
      groups: g, in how many the examples of a process are packed: its devices.
    """

    def __init__(self, shares: Mapping[str, float], groups: int):
        """Remember what to pack."""
        self.shares = shares
        self.groups = groups
        self._told = set()

    def __call__(self, batch: Mapping) -> dict:
        """Return a batch with the texts of `shares`, [b, T] or [b, N, T], packed."""
        return {**batch, **{key: self._packed(key, batch) for key in self.shares}}

    def _packed(self, key, batch) -> Packed:
        ids, mask = batch[key]
        used = batch.get(f"{key}_mask")
        examples = len(ids) // self.groups
        rows = rows_of(self.shares[key], examples)
        shape = (self.groups, -1, ids.shape[-1])
        used = [None] * self.groups if used is None else used.reshape(self.groups, -1)
        groups = zip(ids.reshape(shape), mask.reshape(shape), used, strict=True)
        parts = [pack(Tokens(i, m), rows=rows, used=u) for i, m, u in groups]
        fields = Packed(*map(np.stack, zip(*(packed for packed, _ in parts), strict=True)))
        cut = sum(lost for _, lost in parts)
        kept = int(fields.mask.sum())
        if cut > 0.01 * (cut + kept) and key not in self._told:
            self._told.add(key)
            logging.warning(
                "Packing %s at %s rows an example cut off %.1f %% of the words of a batch; they "
                "fill %.2f rows an example.",
                key,
                self.shares[key],
                100 * cut / (cut + kept),
                (cut + kept) / ids.shape[-1] / len(ids),
            )
        return fields._replace(at=fields.at.reshape(self.groups, examples, *ids.shape[1:-1]))
