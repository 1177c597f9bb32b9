"""Tables: schema files, cells, sentences and rows of numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import tabular
from medvlp_jax.data.files import Row

SCHEMA = {
    "age": {"kind": "numeric", "unit": "years", "range": [0, 120]},
    "sex": {"kind": "categorical", "categories": ["female", "male"], "missing": ["unknown"]},
    "difficulty": {
        "kind": "ordinal",
        "categories": ["low", "medium", "high"],
        "sentence": "Diagnostic difficulty: {value}.",
    },
    "management": {
        "kind": "categorical",
        "categories": ["excision", "follow up"],
        "leakage": "decided with the suspected diagnosis in mind",
    },
}
CELLS = {"age": "50.126", "sex": "male", "difficulty": "medium", "management": "excision"}


def row(**cells):
    return Row(Path("table.csv"), 7, {**CELLS, **cells})


def written(tmp_path, schema):
    file = tmp_path / "table.json"
    file.write_text(schema if isinstance(schema, str) else json.dumps(schema))
    return file


def test_cells_become_numbers_indices_and_nan():
    values = tabular.parse_row(row(), SCHEMA)
    assert values == {"age": 50.126, "sex": 1.0, "difficulty": 1.0, "management": 0.0}
    missing = tabular.parse_row(row(age="", sex="unknown"), SCHEMA)
    assert math.isnan(missing["age"])
    assert math.isnan(missing["sex"])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"sex": "m"}, "table.csv row 7: sex is 'm'; accepted are female, male, or an empty cell"),
        ({"age": "old"}, "table.csv row 7: age is 'old'; a number or an empty cell is needed"),
        ({"age": "130"}, "table.csv row 7: age is 130; accepted are 0 to 120"),
        ({"age": "nan"}, "age is nan; accepted are 0 to 120"),
        ({"age": "-inf"}, "age is -inf; accepted are 0 to 120"),
    ],
)
def test_a_cell_that_does_not_fit_is_refused_with_row_and_column(cells, message):
    with pytest.raises(UserError, match=message):
        tabular.parse_row(row(**cells), SCHEMA)


def test_leakage_is_left_out_unless_asked_for():
    assert tabular.columns(SCHEMA) == ("age", "sex", "difficulty")
    assert tabular.columns(SCHEMA, exclude=("sex",), leakage=("management",)) == (
        "age",
        "difficulty",
        "management",
    )
    with pytest.raises(UserError, match=r"no column 'agee'. Did you mean age"):
        tabular.columns(SCHEMA, exclude=("agee",))
    with pytest.raises(UserError, match="'age' is not marked as leakage"):
        tabular.columns(SCHEMA, leakage=("age",))
    with pytest.raises(UserError, match="No column of the table is left"):
        tabular.columns(SCHEMA, exclude=("age", "sex", "difficulty"))


def test_sentences_name_the_attribute_and_the_value():
    values = tabular.parse_row(row(sex=""), SCHEMA)
    assert tabular.sentences(values, SCHEMA, ("age", "sex", "difficulty")) == [
        "Age: 50.13 years.",
        "Sex: unknown.",
        "Diagnostic difficulty: medium.",
    ]
    assert tabular.sentences({"age": 70.0}, SCHEMA, ("age",)) == ["Age: 70 years."]
    assert tabular.sentences({"age": math.nan}, SCHEMA, ("age",)) == ["Age: unknown."]


def test_rows_keep_attributes_apart_and_mark_what_is_missing():
    names = tabular.columns(SCHEMA)
    values = tabular.parse_row(row(age="60"), SCHEMA)
    np.testing.assert_array_equal(
        tabular.rows(values, SCHEMA, names),
        np.float32([[0.5, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0.5, 0]]),
    )
    empty = tabular.parse_row(row(age="", sex="", difficulty=""), SCHEMA)
    np.testing.assert_array_equal(
        tabular.rows(empty, SCHEMA, names),
        np.float32([[0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1]]),
    )


def test_a_schema_file_is_read_as_it_stands(tmp_path):
    assert tabular.read_schema(written(tmp_path, SCHEMA)) == SCHEMA


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 5000, "is not JSON"),
        ({}, "with columns"),
        ({"age": 3}, "column 'age' is 3; an object with 'kind' is needed"),
        ({"age": {"kind": "number"}}, "has kind 'number'; accepted are numeric, categorical"),
        ({"age": {"kind": "numeric"}}, "has range None"),
        ({"age": {"kind": "numeric", "range": [3, 1]}}, r"has range \[3, 1\]; the first must be"),
        ({"sex": {"kind": "categorical", "categories": ["f"]}}, "two or more different"),
        ({"sex": {"kind": "ordinal", "categories": ["f", "f"]}}, "two or more different"),
        ({"a": {"kind": "numeric", "range": [0, 1], "sentence": "A."}}, "has no place for {value}"),
        ({"a": {"kind": "numeric", "ranges": [0, 1]}}, "no field 'ranges'. Did you mean range"),
        ({"a": {"kind": "numeric", "range": [0, math.inf]}}, r"has range \[0, inf\]"),
        ({"a": {"missing": 5}}, "column 'a' has missing 5; a list of texts is needed"),
        ({"a": {"missing": "nan"}}, "has missing 'nan'; a list of texts is needed"),
        ({"a": {"unknown": [1]}}, r"has unknown \[1\]; a list of texts is needed"),
        ({"a": {"kind": "ordinal", "categories": ["f", ["m"]]}}, "a list of texts is needed"),
        ({"a": {"kind": "ordinal", "categories": ["0", 1]}}, "a list of texts is needed"),
        ({"a": {"kind": "ordinal", "categories": ["0", ""]}}, "two or more different are needed"),
        ({"a": {"same": []}}, r"has same \[\]; {spelling: category} is needed"),
        ({"a": {"same": {"x": [1]}}}, "{spelling: category} is needed"),
        ({"a": {"sentence": 5}}, "has sentence 5; a text is needed"),
        ({"a": {"other": []}}, r"has other \[\]; a text is needed"),
        ({"a": {"kind": "ordinal", "categories": ["0", "1"], "other": "2"}}, "no category '2'"),
    ],
)
def test_a_schema_that_says_something_else_is_refused_by_column(tmp_path, schema, message):
    with pytest.raises(UserError, match=message):
        tabular.read_schema(written(tmp_path, schema))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"sex": "m" * 41}, f"sex is '{'m' * 40}'; accepted are female, male"),
        ({"age": "x" * 41}, f"age is '{'x' * 40}'; a number or an empty cell"),
        ({"age": "9" * 41}, f"age is {'9' * 40}; accepted are 0 to 120"),
    ],
)
def test_a_long_cell_is_cut_in_the_error(cells, message):
    with pytest.raises(UserError, match=message):
        tabular.parse_row(row(**cells), SCHEMA)
    with pytest.raises(UserError, match=f"sex is '{'m' * 40}'; accepted are female"):
        row(sex="m" * 41).choice("sex", ("female", "male"))


def test_a_missing_schema_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"table.json is missing; a JSON file"):
        tabular.read_schema(tmp_path / "table.json")
