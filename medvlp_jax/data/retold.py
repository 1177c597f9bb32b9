"""A corpus whose reports are told by a versioned text recipe, such as "impression" or "mgca-v1".

The records stay as they were prepared; which text a model reads is a setting, data.texts.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.data import records, sections
from medvlp_jax.data.corpora import Source


@dataclasses.dataclass(frozen=True)
class Retold(Source):
    """A source whose records have other texts, or none of a study the recipe leaves out.

    Attributes:
      rows: [N] of `serialised` that are kept.
      retell: (findings, impression) -> the two that are read.
    """

    rows: np.ndarray = dataclasses.field(default=None, repr=False)
    retell: Callable[[str, str], sections.Texts] = sections.RECIPES["both-v1"]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        """Return a record with the texts of the recipe."""
        record = records.parse(self.serialised[int(self.rows[int(index)])], self.metadata)
        findings, impression = self.retell(record["findings"], record["impression"])
        told = {"findings": findings, "impression": impression}
        return record | told | {"text_id": records.text_id(findings, impression)}


def retold(source: Source, name: str) -> Source:
    """Return the source with its texts told by a recipe; what that leaves without text is left out.

    Args:
      source: of records with findings and impression.
      name: of a recipe of `sections.RECIPES`, with version or without; "" changes nothing.

    Raises:
      UserError: for an unknown recipe, or one that leaves nothing.
    """
    if not name:
        return source
    retell = sections.recipe(name)
    rows = np.flatnonzero([any(retell(*pair)) for pair in source.texts()])
    if not len(rows):
        raise UserError(
            f"data.texts={name} leaves none of the {len(source)} records of {source.name} "
            f"({source.split}) a text."
        )
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(Source)}
    return Retold(**fields, rows=rows, retell=retell)
