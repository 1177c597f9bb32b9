"""Risk tables: what they say, and what is refused in them."""

import json
import math

import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data.datasets.cxr_phantom import patients
from medvlp_jax.data.datasets.ham10000 import ham10000_dataset_builder as ham10000
from medvlp_jax.data.datasets.pad_ufes_20 import pad_ufes_20_dataset_builder as pad
from medvlp_jax.evidence import risk

GOOD = {
    "version": "v",
    "field": "medicine",
    "diseases": ["flu", "gout"],
    "factors": {
        "fever": {"name": "Fever", "levels": {"no": {}, "yes": {"flu": 1.0}}},
        "urate": {
            "name": "Urate", "unit": "mg/dL", "range": [2, 12], "reference": 6, "per": 2,
            "log_odds": {"gout": 0.5},
        },
    },
}  # fmt: skip


def written(tmp_path, **changes):
    path = tmp_path / "risk.json"
    path.write_text(json.dumps({**GOOD, **changes}))
    return path


def test_the_phantoms_risk_table_is_the_model_its_patients_are_drawn_from():
    table = risk.read("cxr_phantom")
    assert set(table.diseases) == set(patients.LOG_ODDS)
    levels = {"sex": ["female", "male"], "fever": ["no", "yes"], "cough": ["no", "yes"]}
    for index in range(50):
        who = patients.patient(5, index)
        record = patients._before_disease(patients.stream(5, index, 0, "visit"), who, 0)
        values = {k: levels[k][int(v)] if k in levels else v for k, v in record.items()}
        for disease, expected in patients.log_odds(record).items():
            base = patients.LOG_ODDS[disease]["base"]
            found = sum(f.effect(values[k], disease) for k, f in table.factors.items())
            assert math.isclose(base + found, expected, abs_tol=1e-9), (disease, record)


@pytest.mark.parametrize(("name", "builder"), [("ham10000", ham10000), ("pad_ufes_20", pad)])
def test_shipped_tables_name_the_classes_of_their_corpus(name, builder):
    table = risk.read(name)
    assert set(table.diseases) == set(builder.TASKS["diagnosis"])
    for key, factor in table.factors.items():
        if factor.levels:
            assert set(factor.levels) >= set(builder.SCHEMA[key]["categories"])


def test_a_number_acts_by_steps_from_its_reference():
    table = risk.read("cxr_phantom")
    assert table.factors["age"].effect(80, "mass") == pytest.approx(0.6)
    assert table.factors["bnp"].effect(400, "edema") == pytest.approx(1.6)
    assert table.factors["bnp"].sentence(400.0) == "Bnp: 400 pg/mL."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diseases": ["flu", "flu"]}, "list of different names"),
        ({"diseases": []}, "list of different names"),
        ({"factors": {}}, "must name factors"),
        ({"disease": []}, "no field 'disease'. Did you mean diseases"),
        ({"factors": {"a": {"name": "A", "levels": {"no": {}, "yes": {"flue": 1}}}}},
         "level 'yes': no disease 'flue'. Did you mean flu"),
        ({"factors": {"a": {"name": "A", "levels": {"yes": {}}}}}, "two or more"),
        ({"factors": {"a": {"name": "A", "levels": {"no": {}, "yes": {"flu": "2"}}}}}, "'2'"),
        ({"factors": {"a": {"name": "A", "log_odds": {"flu": 1}}}}, "lacks range, reference, per"),
        ({"factors": {"a": {"name": "A", "level": {}}}}, "no field 'level'. Did you mean levels"),
        ({"factors": {"a": {"name": "A", "log_odds": {"flu": 1}, "range": [3, 1], "reference": 1,
                            "per": 1}}}, r"range \[3, 1\]"),
        ({"factors": {"a": {"name": "A", "log_odds": {"flu": 1}, "range": [0, 9], "reference": 1,
                            "per": 2, "scale": "log"}}}, "above 0"),
        ({"factors": {"a": {"levels": {"no": {}, "yes": {}}}}}, "lacks name"),
        ({"aliases": {"feever": ["pyrexia"]}}, "aliases of 'feever'.* Did you mean Fever"),
        ({"aliases": {"Fever": "pyrexia"}}, "aliases of 'Fever' are 'pyrexia'; a list"),
        ({"aliases": {"flu": [""]}}, r"aliases of 'flu' are \[''\]; a list"),
        ({"aliases": ["flu"]}, r"aliases \['flu'\]; \{name: \[other names\]\} is needed"),
    ],
)  # fmt: skip
def test_what_a_table_may_not_say_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        risk.read(written(tmp_path, **changes))


def test_a_table_that_is_no_json_is_named(tmp_path):
    for content in ("{", "[" * 5000):
        (tmp_path / "risk.json").write_text(content)
        with pytest.raises(UserError, match=r"risk\.json is not JSON"):
            risk.read(tmp_path / "risk.json")


def test_unknown_names_are_refused_with_their_neighbours(tmp_path):
    table = risk.read(written(tmp_path))
    with pytest.raises(UserError, match=r"no factor 'fevr'. Did you mean fever"):
        table.narrowed(["fevr"], [])
    with pytest.raises(UserError, match=r"no disease 'goat'. Did you mean gout"):
        table.narrowed([], ["goat"])
    table = risk.read(written(tmp_path, aliases={"flu": ["influenza"]}))
    kept = table.narrowed(["fever"], ["gout"])
    assert kept.names("flu") == ("flu", "influenza")
    assert kept.names("gout") == ("gout",)
    assert list(kept.factors) == ["fever"]
    assert kept.diseases == ("gout",)
    with pytest.raises(UserError, match="cxr_phantom, ham10000, pad_ufes_20"):
        risk.read("nowhere")
