"""What a model sees of a table: numbers, or sentences through a frozen text encoder."""

import math

import jax
import numpy as np
import pytest

from medvlp_jax import convert, tables
from medvlp_jax.config import UserError
from medvlp_jax.data import tabular
from medvlp_jax.data import text as tokenisation
from medvlp_jax.encoders import bert
from medvlp_jax.encoders.base import Tokens

SCHEMA = {
    "age": {"kind": "numeric", "unit": "years", "range": [0, 100]},
    "sex": {"kind": "categorical", "categories": ["female", "male"]},
    "stage": {"kind": "ordinal", "categories": ["low", "high"], "leakage": "seen later"},
}
VALUES = ({"age": 50.0, "sex": 1.0, "stage": 1.0}, {"age": math.nan, "sex": 0.0, "stage": 0.0})


class Corpus:
    """Stands in for a Source: its schema and its tables."""

    name = "made"

    def __init__(self, values=VALUES, schema=SCHEMA, labels=None):
        self.metadata, self.values = {"table": schema}, values
        self.tasks, self.labels = {"label": ["no", "yes"]}, lambda task: np.eye(2)[labels]

    def tables(self):
        return list(self.values)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    words = ["Age: 50 years. 60 unknown.", "Sex: female male unknown."]
    tokenisation.train_wordpiece(words, vocab_size=80, out_dir=folder)
    vocab = len((folder / "vocab.txt").read_text().splitlines())
    module = bert.make("tiny", vocab_size=vocab, width=16, depth=1, num_heads=2, mlp_dim=16)
    tokens = Tokens(np.zeros((1, 8), np.int32), np.ones((1, 8), bool))
    variables = jax.jit(module.init)(jax.random.key(0), tokens)
    convert.save(module, variables, folder, tokenizer=folder)
    return folder, module, variables


def settings(tmp_path, **table):
    plain = {"exclude": (), "leakage": (), "encoding": "vectors", "text": "", "tower": ""}
    plain |= {"pooling": "", "scale": 1.0}
    return {"corpora": ("made",), "data_dir": str(tmp_path), "table": plain | table}


def test_vectors_are_those_of_the_schema_without_leakage(tmp_path):
    rows = tables.rows_of(settings(tmp_path), [Corpus()])(VALUES[0])
    np.testing.assert_array_equal(rows, tabular.rows(VALUES[0], SCHEMA, ("age", "sex")))
    larger = tables.rows_of(settings(tmp_path, scale=10.0), [Corpus()])(VALUES[0])
    np.testing.assert_array_equal(larger, 10 * rows)


def test_sentences_are_encoded_once_and_found_again(tmp_path, encoder, monkeypatch):
    folder, module, variables = encoder
    data = settings(tmp_path, encoding="sentences", text=str(folder))
    rows = tables.rows_of(data, [Corpus()])
    tokenizer = tokenisation.load_tokenizer(folder)
    for values, said in zip(
        VALUES,
        (["Age: 50 years.", "Sex: male."], ["Age: unknown.", "Sex: female."]),
        strict=True,
    ):
        tokens = tokenisation.tokenize(tokenizer, said, 77)
        expected = module.apply(variables, tokens).pooled
        np.testing.assert_allclose(rows(values), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(convert, "load", lambda *_, **__: pytest.fail("encoded again"))
    again = tables.rows_of(data, [Corpus()])
    np.testing.assert_array_equal(again(VALUES[1]), rows(VALUES[1]))


def test_other_sentences_are_other_features(tmp_path, encoder):
    data = settings(tmp_path, encoding="sentences", text=str(encoder[0]))
    one = tables.rows_of(data, [Corpus()])(VALUES[0])
    older = {"age": 60.0, "sex": 1.0, "stage": 1.0}
    other = tables.rows_of(data, [Corpus((older,))])(older)
    assert np.abs(one[0] - other[0]).max() > 1e-3
    np.testing.assert_allclose(one[1], other[1], rtol=1e-5, atol=1e-6)


def test_equal_weights_that_pool_otherwise_are_other_features(tmp_path, encoder):
    folder, module, variables = encoder
    one = tables.rows_of(settings(tmp_path, encoding="sentences", text=str(folder)), [Corpus()])
    convert.save(module.clone(pooling="mean"), variables, tmp_path / "mean", tokenizer=folder)
    data = settings(tmp_path, encoding="sentences", text=str(tmp_path / "mean"))
    other = tables.rows_of(data, [Corpus()])
    assert np.abs(one(VALUES[0]) - other(VALUES[0])).max() > 1e-3


def test_bad_settings_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"data.table.encoding is 'sentence'. Did you mean sent"):
        tables.rows_of(settings(tmp_path, encoding="sentence"), [Corpus()])
    with pytest.raises(UserError, match=r"encoding=sentences needs data.table.text"):
        tables.rows_of(settings(tmp_path, encoding="sentences"), [Corpus()])
    with pytest.raises(UserError, match=r"encoding=metablock is that of pad_ufes_20; accepted for"):
        tables.rows_of(settings(tmp_path, encoding="metablock"), [Corpus()])
    shorter = {k: v for k, v in SCHEMA.items() if k != "age"}
    with pytest.raises(UserError, match="The tables of made, made differ"):
        tables.rows_of(settings(tmp_path), [Corpus(), Corpus(schema=shorter)])


def test_a_corpus_without_a_table_has_no_rows(tmp_path):
    assert tables.rows_of(settings(tmp_path), [Corpus(schema={})]) is None


def test_the_label_under_another_name_is_no_column_of_the_table(tmp_path):
    truth = np.arange(40) % 2
    rows = [{"age": 50.0, "sex": float(k), "stage": float(k)} for k in truth]
    check = lambda rows, truth, schema=SCHEMA, **table: tables.check_labels(
        settings(tmp_path, **table), [Corpus(rows, schema, truth)], "label"
    )
    message = "The table has 'sex', and each of its values goes with one class: the label leaks"
    with pytest.raises(UserError, match=message):
        check(rows, truth)
    rows[0] |= {"sex": 1.0}
    check(rows, truth)  # one that does not: no copy
    check(rows, truth, exclude=("age", "sex"), leakage=("stage",))  # asked for
    told = {name: {"kind": entry["kind"]} for name, entry in SCHEMA.items()}
    with pytest.raises(UserError, match="The table has 'stage'"):
        check(rows, truth, told)
    check(rows, truth, told, exclude=("stage",))
    check(rows[:19], truth[:19], told)  # too few to say
    check(rows, truth, {})
