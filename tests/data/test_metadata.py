"""PRIMA's text and vector of a patient; what gives the label away is refused by name."""

import itertools
import math
import pathlib

import numpy as np
import pytest

from configs import _prima_corpora as corpora
from medvlp_jax.config import UserError
from medvlp_jax.data import datasets, metadata, tabular
from medvlp_jax.data.datasets.cxr_phantom import patients
from medvlp_jax.data.datasets.pad_ufes_20 import pad_ufes_20_dataset_builder as pad

CLASSES = pad.TASKS["diagnosis"]
PAD = {
    "sentences": corpora.PAD_SENTENCES,
    "words": corpora.YES_NO + corpora.ROMAN,
    "bins": corpora.PAD_BINS,
}
NAN = math.nan
DATASETS = pathlib.Path(datasets.__path__[0])


def patient(**values):
    """The patient of the specification's example sentence."""
    cells = dict.fromkeys(pad.SCHEMA, NAN)
    cells |= {"age": 55.0, "gender": 0.0, "fitspatrick": 1.0, "region": 13.0}
    cells |= {"diameter_1": 6.0, "diameter_2": 5.0, "itch": 1.0, "grew": 1.0, "hurt": 0.0}
    cells |= {"changed": tabular.UNKNOWN, "bleed": 1.0, "elevation": 1.0}
    return cells | {"skin_cancer_history": 1.0} | values


def test_the_text_is_the_one_of_the_specification():
    told = metadata.read(pad.SCHEMA, classes=CLASSES, **PAD)
    assert told.text(patient()) == (
        "Age: 55 years. Sex: female. Skin type: Fitzpatrick II. Location: nose. "
        "Diameter: 6 x 5 mm. Itching: yes. Growing: yes. Painful: no. Changed: unknown. "
        "Bleeding: yes. Elevated: yes. Previous skin cancer: yes."
    )
    assert told.text(dict.fromkeys(pad.SCHEMA, NAN)) == ""
    half = told.text(patient(diameter_2=NAN, age=NAN))
    assert half.startswith("Sex: female.")
    assert "Diameter: 6 x unknown mm." in half


def test_the_vector_has_one_place_a_category_and_bin_and_none_for_what_is_missing():
    told = metadata.read(pad.SCHEMA, classes=CLASSES, **PAD)
    blocks, start = {}, 0
    y = told.vector(patient(cancer_history=NAN))
    for column in told.columns:
        entry = pad.SCHEMA[column]
        size = len(entry.get("categories", ())) + ("unknown" in entry)
        size = size or len(told.bins[column]) + 1
        blocks[column] = y[start : start + size]
        start += size
    assert start == told.width == len(y)
    assert blocks["age"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]  # 50 < 55 <= 60
    assert blocks["diameter_2"].tolist() == [1, 0, 0, 0]  # (0, 5]
    assert blocks["diameter_1"].tolist() == [0, 1, 0, 0]
    assert blocks["itch"].tolist() == [0, 1, 0]
    assert blocks["changed"].tolist() == [0, 0, 1]
    assert not blocks["cancer_history"].any()
    other = told.vector(patient(region=0.0))
    assert y @ other == y @ y - 1  # shared attributes are counted


def test_y_has_all_attributes_and_the_text_those_that_can_be_seen():
    told = metadata.read(pad.SCHEMA, classes=CLASSES, **PAD, unsaid=corpora.PAD_UNSAID)
    brazil = pad.SCHEMA["background_father"]["categories"].index("BRAZIL")
    values = patient(smoke=1.0, background_father=float(brazil), has_sewage_system=NAN)
    assert told.text(values) == metadata.read(pad.SCHEMA, **PAD).text(values)
    assert {*told.columns} == {c for c, entry in pad.SCHEMA.items() if "leakage" not in entry}
    expected = []
    for column in told.columns:
        entry, value = pad.SCHEMA[column], values[column]
        if entry["kind"] == "numeric":
            edges = (-math.inf, *dict(corpora.PAD_BINS)[column], math.inf)
            expected += [float(a < value <= b) for a, b in itertools.pairwise(edges)]
            continue
        expected += [float(value == place) for place in range(len(entry["categories"]))]
        expected += [float(value == tabular.UNKNOWN)] * ("unknown" in entry)
    assert told.vector(values).tolist() == expected
    assert told.width == len(expected)
    smoker, other = (told.vector(values | {"smoke": smoke}) for smoke in (1.0, 0.0))
    assert smoker @ told.vector(values) == other @ told.vector(values) + 1


def test_a_column_that_is_told_is_in_y_once():
    settings = {"bins": corpora.PHANTOM_BINS}
    plain, told = (metadata.read(patients.TABLE, **settings, unsaid=u) for u in ((), ("sex",)))
    assert told.columns == plain.columns


def test_a_column_with_another_sign_in_its_name_is_told_and_looked_at():
    schema = {"d-dimer": {"kind": "numeric", "unit": "mg/l", "range": [0, 50]}}
    schema |= {"ward no.": {"kind": "categorical", "categories": ["A", "B"]}}
    told = metadata.read(schema, bins=(("d-dimer", (1, 5)),))
    assert told.columns == ("d-dimer", "ward no.")
    assert told.text({"d-dimer": 2.5, "ward no.": 1.0}) == "D-dimer: 2.5 mg/l. Ward no.: b."
    assert told.vector({"d-dimer": 2.5, "ward no.": 1.0}).tolist() == [0, 1, 0, 0, 1]
    with pytest.raises(UserError, match=r"bins has \(\) for the number 'd-dimer'"):
        metadata.read(schema)
    truth = np.arange(40) % 2
    leaking = [{"d-dimer": 1.0, "ward no.": float(value)} for value in truth]
    with pytest.raises(UserError, match=r"has 'ward no\.', and each of its values goes with one"):
        metadata.check_labels(told, leaking, np.eye(2, dtype=np.int8)[truth])


@pytest.mark.parametrize("name", [path.parent.name for path in DATASETS.glob("*/table.json")])
def test_every_column_of_a_shipped_corpus_is_told_that_gives_nothing_away(name):
    schema = tabular.read_schema(DATASETS / name / "table.json")
    bins = [(column, (1,)) for column, entry in schema.items() if entry["kind"] == "numeric"]
    assert metadata.read(schema, bins=bins).columns == tabular.columns(schema)


def test_what_is_excluded_is_in_neither_text_nor_y():
    both = ("diameter_1", "diameter_2")
    gone = ("itch", *both, "smoke", "biopsed")
    whole = metadata.read(pad.SCHEMA, **PAD, unsaid=corpora.PAD_UNSAID)
    told = metadata.read(pad.SCHEMA, **PAD, unsaid=corpora.PAD_UNSAID, exclude=gone)
    assert told.columns == tuple(name for name in whole.columns if name not in gone)
    text = told.text(patient())
    assert "Itching" not in text
    assert "Diameter" not in text
    assert "Growing: yes. Painful: no." in text
    plain = metadata.read(
        patients.TABLE, bins=corpora.PHANTOM_BINS, unsaid=("sex",), exclude=["sex"]
    )
    assert plain.columns == tuple(name for name in patients.TABLE if name != "sex")


@pytest.mark.parametrize("edge", [0.1, 0.3, 0.7, 1.1])
def test_a_number_on_an_edge_belongs_below_it_as_a_record_holds_it(edge):
    schema = {"lactate": {"kind": "numeric", "range": [0, 20]}}
    told = metadata.read(schema, bins=(("lactate", (edge,)),))
    for value in (edge, np.float32(edge), float(np.float32(edge))):
        assert told.vector({"lactate": value}).tolist() == [1, 0]
    assert told.vector({"lactate": np.nextafter(np.float32(edge), 9)}).tolist() == [0, 1]


def test_emphasised_columns_count_more_and_a_factor_enters_before_the_inner_product():
    told = metadata.read(pad.SCHEMA, **PAD, emphasised=("bleed",), emphasis=3.0)
    plain = metadata.read(pad.SCHEMA, **PAD)
    assert told.vector(patient()) @ told.vector(patient()) == pytest.approx(
        plain.vector(patient()) @ plain.vector(patient()) + 8
    )


def test_a_corpus_without_sentences_tells_every_column_that_gives_nothing_away():
    told = metadata.read(patients.TABLE, bins=corpora.PHANTOM_BINS)
    values = {"age": 63.0, "sex": 1.0, "smoking": 0.0, "fever": 1.0, "cough": 0.0}
    values |= {"oxygen_saturation": NAN, "white_cells": 12.5, "bnp": NAN}
    assert told.text(values) == (
        "Age: 63 years. Sex: male. Smoking: 0 pack-years. Fever: yes. Cough: no. "
        "White cells: 12.5 10^9/L."
    )
    derm = {"age": {"kind": "numeric", "range": [0, 120]}, "dx_type": {"leakage": "known after"}}
    derm["dx_type"] |= {"kind": "categorical", "categories": ["histo", "follow up"]}
    assert metadata.read(derm, bins=(("age", (50,)),)).columns == ("age",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sentences": ("Biopsy: {biopsed}.",)}, "sentences has 'biopsed', which gives the label"),
        ({"unsaid": ("biopsed",)}, "unsaid has 'biopsed', which gives the label away: every can"),
        ({"unsaid": ("smokes",)}, "metadata.unsaid: the table has no column 'smokes'. .* smoke"),
        ({"unsaid": ("age",), "bins": PAD["bins"][1:]}, r"bins has \(\) for the number 'age'"),
        ({"sentences": ("Size: {diameter}.",)}, "no column 'diameter'. Did you mean diameter_"),
        (
            {"sentences": ("Melanoma? {itch}.",), "bins": ()},
            "names the class 'melanoma': the label leaks",
        ),
        ({"words": (("True", "seborrheic keratosis"),)}, "names the class 'seborrheic keratosis'"),
        ({"bins": (("age", (50,)),)}, r"bins has \(\) for the number 'diameter_1'"),
        ({"bins": (*PAD["bins"], ("itch", (1,)))}, "bins: 'itch' is no number of the table"),
        ({"emphasised": ("smoke",)}, "emphasised: 'smoke' is no column of y"),
        (
            {"sentences": ("A lesion.",)},
            r"sentences has 'A lesion\.', which tells nothing; accepted",
        ),
        ({"sentences": ("Itch: {}.",)}, "which tells nothing"),
        ({"exclude": ("itches",)}, "The table has no column 'itches'. Did you mean itch"),
        (
            {"exclude": ("diameter_1",)},
            r"exclude has 'diameter_1', and 'Diameter: .* mm\.' tells another column beside it: "
            r"give data\.metadata\.sentences a sentence without {diameter_1}",
        ),
        (
            {"sentences": ("Itch: {itch}.",), "unsaid": ("smoke",), "exclude": ("itch",)},
            "exclude leaves no sentence of data.metadata.sentences",
        ),
        ({"exclude": tuple(pad.SCHEMA)}, "No column of the table is left"),
        ({"exclude": ("bleed",), "emphasised": ("bleed",)}, "'bleed' is no column of y"),
    ],
)
def test_what_does_not_fit_or_leaks_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        metadata.read(pad.SCHEMA, classes=CLASSES, **{**PAD, **changes})


def test_a_column_whose_values_go_with_one_class_each_is_the_label_under_another_name():
    told = metadata.read(pad.SCHEMA, **PAD)
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 40)
    labels = np.eye(len(CLASSES), dtype=np.int8)[truth]
    honest = [patient(itch=float(value)) for value in rng.integers(0, 2, 40)]
    metadata.check_labels(told, honest, labels)
    leaking = [patient(itch=float(value)) for value in truth]
    with pytest.raises(UserError, match="has 'itch', and each of its values goes with one class"):
        metadata.check_labels(told, leaking, labels)
    metadata.check_labels(told, leaking[:10], labels[:10])  # too few to say
    unsaid = metadata.read(pad.SCHEMA, **PAD, unsaid=corpora.PAD_UNSAID)
    leaking = [patient(smoke=float(value)) for value in truth]
    metadata.check_labels(told, leaking, labels)
    with pytest.raises(UserError, match="has 'smoke', and each of its values goes with one class"):
        metadata.check_labels(unsaid, leaking, labels)
