"""A patient's table as PRIMA reads it: one text, and one vector that says who is like whom.

Wang et al. 2026, https://arxiv.org/abs/2602.23297, section "risk-integrated alignment"; the wording
and the bins are our choice (docs/prima.md). The text t is a sentence an attribute, in a fixed
order: one of which all is missing is left out, what nobody knew is "unknown", and so is a value
that is missing beside another of its sentence. The vector y of Eq. 6 has a block an attribute, of
those that the text leaves out too: one place a category or bin, one for "unknown", all zero where
the value is missing. What data.table.exclude names is in neither.

What gives the diagnosis away never enters either: columns the schema marks as leakage, sentences
that name a class, columns whose values go with one class each.

Axis letters: D places of the vector.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import tabular

PLACE = re.compile(r"\{([^{}]+)\}")  # any name: "d-dimer_val" is one


class Metadata(NamedTuple):
    """How the tables of a schema are told.

    Attributes:
      schema: of the corpus.
      templates: sentences with {column} where a value goes.
      words: what a category is called in a sentence; others in lower case.
      bins: inner edges (b_1, ..., b_n) of each number: up to b_1, above it up to b_2, ...
      factors: by which a column's block of y is multiplied; 1 where it is not named.
      unsaid: columns of y that no sentence tells.
    """

    schema: tabular.Schema
    templates: tuple[str, ...]
    words: Mapping[str, str]
    bins: Mapping[str, tuple[float, ...]]
    factors: Mapping[str, float]
    unsaid: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column of y in order: those that are told, then those that are not."""
        said = [c for text in self.templates for c in PLACE.findall(text)]
        return tuple(dict.fromkeys([*said, *self.unsaid]))

    @property
    def seen(self) -> dict[str, Mapping[str, Any]]:
        """Entries of the schema that decide the places of y, in order."""
        entries = {name: self.schema[name] for name in self.columns}
        return {name: {**entry, "unknown": "unknown" in entry} for name, entry in entries.items()}

    @property
    def width(self) -> int:
        """D."""
        return sum(self._size(column) for column in self.columns)

    def text(self, values: Mapping[str, float]) -> str:
        """Write t; "" where everything is missing."""
        return " ".join(filter(None, (self._sentence(text, values) for text in self.templates)))

    def vector(self, values: Mapping[str, float]) -> np.ndarray:
        """Return y float32 [D], without the diagnosis."""
        blocks = [self._block(column, values[column]) for column in self.columns]
        return np.concatenate(blocks)

    def _sentence(self, template, values):
        names = PLACE.findall(template)
        if all(math.isnan(values[name]) for name in names):
            return ""
        return PLACE.sub(lambda found: self._say(found[1], values[found[1]]), template)

    def _say(self, column, value):
        entry = self.schema[column]
        said = tabular.say(value, entry)
        if entry["kind"] == "numeric" or tabular.is_unknown(value, entry):
            return said
        return self.words.get(said, said.lower())

    def _size(self, column):
        entry = self.schema[column]
        if entry["kind"] == "numeric":
            return len(self.bins[column]) + 1
        return len(entry["categories"]) + ("unknown" in entry)

    def _block(self, column, value):
        block = np.zeros(self._size(column), np.float32)
        if math.isnan(value):
            return block
        if self.schema[column]["kind"] == "numeric":
            place = int(np.searchsorted(self.bins[column], np.float32(value), side="left"))
        else:
            place = int(value)  # UNKNOWN = -1 is the last
        block[place] = self.factors.get(column, 1.0)
        return block


def read(
    schema: tabular.Schema,
    *,
    sentences: Sequence[str] = (),
    unsaid: Sequence[str] = (),
    words: Sequence[tuple[str, str]] = (),
    bins: Sequence[tuple[str, Sequence[float]]] = (),
    emphasised: Sequence[str] = (),
    emphasis: float = 3.0,
    exclude: Sequence[str] = (),
    classes: Sequence[str] = (),
) -> Metadata:
    """Check a config's settings against a schema.

    Args:
      schema: of the corpus.
      sentences: templates with {column} places, in the order of the text; () tells every column of
        the schema but those that give the label away.
      unsaid: columns that enter y, and the checks, though no sentence tells them; one that is told
        is in y anyway.
      words: (category, how it is written) pairs.
      bins: (column, inner edges) of every number of y, ascending; others do no harm.
      emphasised: columns whose block counts `emphasis`-fold before the inner product, one reading
        of the paper's "disease-related dimensions".
      emphasis: that factor.
      exclude: columns left out of all these, and with them the sentences that tell no other.
      classes: names of the diagnoses, which no sentence may say.

    Raises:
      UserError: naming a column that does not exist, that gives the label away, a number without
        bins, a sentence that names a class, no column, or an excluded one beside others; or if no
        sentence is left.
    """
    kept = tabular.columns(schema, exclude=tuple(exclude))
    templates = _without(tuple(sentences) or _plain(schema, kept), exclude)
    factors = dict.fromkeys(emphasised, float(emphasis))
    unsaid = tuple(name for name in unsaid if name not in exclude)
    told = Metadata(schema, templates, dict(words), {}, factors, unsaid)
    for name in told.columns:
        setting = "data.metadata.unsaid" if name in unsaid else "data.metadata.sentences"
        if name not in schema:
            raise UserError(
                f"{setting}: the table has no column '{name}'. {nearest(name, list(schema))}"
            )
        if "leakage" in schema[name]:
            raise UserError(
                f"{setting} has '{name}', which gives the label away: {schema[name]['leakage']}."
            )
    numbers = [name for name in schema if schema[name]["kind"] == "numeric"]
    # Records hold float32: to it 0.1 is a little more than to a float, and would be above its edge.
    edges = {name: tuple(float(np.float32(edge)) for edge in inner) for name, inner in bins}
    for setting, names, known in (
        ("bins", edges, numbers),
        ("emphasised", emphasised, told.columns),
    ):
        for name in names:
            if name not in known:
                kind = "number of the table" if setting == "bins" else "column of y"
                raise UserError(
                    f"data.metadata.{setting}: '{name}' is no {kind}. {nearest(name, list(known))}"
                )
    for name in filter(numbers.__contains__, told.columns):
        inner = edges.get(name, ())
        if not inner or list(inner) != sorted(set(inner)):
            raise UserError(
                f"data.metadata.bins has {inner} for the number '{name}'; accepted are ascending "
                "inner edges, such as (20, 40, 60)."
            )
    told = told._replace(bins=edges)
    _check_words(told, classes)
    return told


def check_labels(told: Metadata, tables: Sequence[Mapping[str, float]], labels: np.ndarray) -> None:
    """Refuse a column whose every value goes with one class: it is the label under another name.

    Args:
      told: the columns of y.
      tables: values of the training rows.
      labels: [N, C] int8 of these rows, 1 present.

    Raises:
      UserError: naming the column.
    """
    where = "data.metadata", "metadata"
    tabular.check_labels(told.schema, told.columns, tables, labels, where)


def _plain(schema, names: Iterable[str]) -> tuple[str, ...]:
    """One sentence a column, as the schema words it."""
    templates = []
    for name in names:
        entry = schema[name]
        unit = f" {entry['unit']}" if "unit" in entry else ""
        plain = f"{name.replace('_', ' ').capitalize()}: {{value}}{unit}."
        templates.append(entry.get("sentence", plain).replace("{value}", f"{{{name}}}"))
    return tuple(templates)


def _without(templates: Iterable[str], exclude: Sequence[str]) -> tuple[str, ...]:
    """Return the sentences that tell no excluded column."""
    kept = []
    for template in templates:
        names = PLACE.findall(template)
        gone = [name for name in names if name in exclude]
        if not names:
            raise UserError(
                f"data.metadata.sentences has '{template}', which tells nothing; accepted are "
                "sentences with the {name} of a column."
            )
        if gone and {*names} - {*gone}:
            raise UserError(
                f"data.table.exclude has '{gone[0]}', and '{template}' tells another column beside "
                f"it: give data.metadata.sentences a sentence without {{{gone[0]}}}."
            )
        kept += [] if gone else [template]
    if not kept:
        raise UserError("data.table.exclude leaves no sentence of data.metadata.sentences to tell.")
    return tuple(kept)


def _check_words(told: Metadata, classes: Sequence[str]) -> None:
    """Refuse templates and categories that say the name of a class."""
    for template in told.templates:
        said = [template]
        for column in PLACE.findall(template):
            names = told.schema[column].get("categories", ())
            said += [told.words.get(name, name.lower()) for name in names]
        for name in classes:
            where = next((s for s in said if _says(s, name)), None)
            if where is not None:
                raise UserError(
                    f"data.metadata: '{where}' of the sentence '{template}' names the class "
                    f"'{name}': the label leaks into the metadata."
                )


def _says(text: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE) is not None
