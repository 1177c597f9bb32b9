"""Protocols that cannot be are known before anything is embedded."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from configs import common
from medvlp_jax import assemble, evaluate, protocols
from medvlp_jax.config import UserError
from medvlp_jax.data import corpora
from medvlp_jax.evaluation import flavours, tasks


class Records(list):
    """Records that count how often they are read."""

    name, split, reads = "made", "test", 0

    def __getitem__(self, row):
        self.reads += 1
        return super().__getitem__(int(row))


def record(findings="", impression=""):
    return {"findings": findings, "impression": impression}


@pytest.mark.parametrize(
    ("name", "task"),
    [("finetune", "finetune"), ("segmentation", "segment"), ("detection", "detect")],
)
def test_a_protocol_that_trains_on_the_targets_names_the_command_that_has_it(name, task):
    assert task in tasks.TASKS
    message = rf"^Protocol '{name}' .* `medvlp adapt --task {task}` .* accepted .* zero_shot, .*\.$"
    for asked in (name, task):
        with pytest.raises(UserError, match=message.replace(f"'{name}'", f"'{asked}'")):
            flavours.normalise(("probe", asked), protocols.NAMES)


def test_a_text_is_looked_for_until_the_first_and_not_in_all_of_many_records():
    many = Records([record()] * 200_000)
    found = protocols.lack_of_texts(many, ("report",), 0)
    assert (
        found
        == f"retrieval needs texts, and none of {many.reads} records of made (test) has report"
    )
    assert many.reads == protocols.LOOKED_AT
    for row in (0, 57):
        some = Records([record()] * 100)
        some[row] = record(impression="Normal.")
        assert protocols.lack_of_texts(some, ("report",), 0) == ""
        assert some.reads == row + 1


@pytest.mark.parametrize(
    ("sections", "limit", "lacking"),
    [
        (("report",), 0, False),
        (("impression",), 0, False),
        (("findings",), 0, True),  # of a recipe that reads no other
        (("report",), 3, True),  # evals.limit ends before it
        (("report",), 90, False),
    ],
)
def test_a_text_counts_where_the_recipe_reads_it_within_the_limit(sections, limit, lacking):
    some = Records([record()] * 3 + [record(impression="Normal.")])
    assert bool(protocols.lack_of_texts(some, sections, limit)) == lacking


def test_retrieval_that_nobody_asked_for_is_left_out_with_its_control(monkeypatch, capsys):
    monkeypatch.setattr(assemble, "open_corpus", lambda *_: Records([record()]))
    parts = types.SimpleNamespace(config={"data": {"corpora": ("made",)}})
    parts.recipe = types.SimpleNamespace(spaces={"report": ("image", "text")})
    settings = {"protocols": ("zero_shot", "retrieval@clean", "retrieval@benchx"), "corpus": ""}
    settings |= {"split": "test", "limit": 0, "controls": ("untrained", "shuffled_pairs")}

    def found(*given, **changed):
        arguments = evaluate.parser().parse_args(["--run=r", *given])
        kept = evaluate._possible(settings | changed, arguments, parts)
        return kept["protocols"], kept["controls"]

    assert found() == (("zero_shot",), ("untrained",))
    assert "Protocol retrieval is left out: retrieval needs texts" in capsys.readouterr().out
    assert found("--controls=shuffled_pairs")[1] == settings["controls"]  # to be refused
    for unchanged in (("--protocol=retrieval",), ()):
        alone = {"protocols": ("retrieval",)} if not unchanged else {}
        assert found(*unchanged, **alone)[0] == alone.get("protocols", settings["protocols"])


@pytest.fixture
def own(tmp_path):
    """Return a function that prepares a folder of one's own: its classes, its splits."""

    def prepared(name, classes, splits=("train", "test"), table=None, mixed=None):
        folder = tmp_path / name
        folder.mkdir()
        columns = {"image": "file", "group": "who", "label": "dx", "split": "part"}
        (folder / "corpus.json").write_text(json.dumps({"columns": columns, "classes": classes}))
        if table:
            (folder / "table.json").write_text(json.dumps(table))
        lines = [",".join(("file,who,dx,part", *(table or ())))]
        for k, part in enumerate(splits):
            Image.fromarray(np.full((8, 8, 3), 9 * k, np.uint8)).save(folder / f"{k}.png")
            row = f"{k}.png,{k if mixed is None else part},{classes[k % 2 * bool(mixed)]},{part}"
            lines.append(row + "," * len(table or ()))
        (folder / "table.csv").write_text("\n".join(lines))
        where = {"data_dir": tmp_path / "data", "manual_dir": folder}
        corpora.prepare("csv_folder", builder_config=name, **where)
        return f"csv_folder:{name}"

    return prepared


def classifier(data_dir, trained, tested, inputs=("image",), **evals):
    """Return what is checked of an evaluator: a classifier of two classes, on another corpus."""
    data = common.data(corpora=(trained,), data_dir=str(data_dir)).to_dict()
    data["metadata"] = {"sentences": (), "bins": (("age", (50,)),)}
    recipe = types.SimpleNamespace(spaces={}, task="label", num_classes=2)
    config = {"recipe": {"name": "cfcml"}, "data": data}
    return types.SimpleNamespace(
        settings=common.evals(**{"protocols": ("classify",), "controls": (), **evals}).to_dict(),
        parts=types.SimpleNamespace(config=config, recipe=recipe),
        corpus=tested,
        source=assemble.open_corpus(tested, data, "test"),
        prompts={"tasks": {}},
        images=lambda: ("image",),
        inputs=lambda: inputs,
    )


def test_classes_in_another_order_are_not_scored(own, tmp_path, capsys):
    trained = own("ours", ["benign", "malignant"])
    turned, same = own("turned", ["malignant", "benign"]), own("same", ["benign", "malignant"])
    protocols.check(classifier(tmp_path / "data", trained, same))
    with pytest.raises(
        UserError, match=f"class 0 is 'benign' in {trained} and 'malignant' in {turned}"
    ):
        protocols.check(classifier(tmp_path / "data", trained, turned))
    assert "not prepared here" not in capsys.readouterr().out
    protocols.check(classifier(tmp_path / "data", "csv_folder:gone", turned))
    assert (
        "csv_folder:gone is not prepared here, so that only the number" in capsys.readouterr().out
    )


def test_images_of_a_patient_are_no_study_where_they_are_of_two_classes(own, tmp_path):
    classes, splits = ["benign", "malignant"], ("train", "test", "test")
    both_protocols = ("classify", "classify_studies")
    same = own("same", classes, splits, mixed=False)
    protocols.check(classifier(tmp_path / "data", same, same, protocols=both_protocols))
    both = own("both", classes, splits, mixed=True)
    protocols.check(classifier(tmp_path / "data", both, both, protocols=both_protocols[:1]))
    protocols.check(classifier(tmp_path / "data", both, both, protocols=both_protocols, limit=1))
    message = (
        "classify_studies: study 'test' has images of more than one class; .* without classify_"
    )
    with pytest.raises(UserError, match=message):
        protocols.check(classifier(tmp_path / "data", both, both, protocols=both_protocols))


AGE = {"kind": "numeric", "unit": "years", "range": [0, 120]}
SEX = {"kind": "categorical", "categories": ["female", "male"]}
TABLE = {"age": AGE, "sex": SEX, "code": {**SEX, "leakage": "decided later"}}


@pytest.mark.parametrize(
    ("name", "table", "differs"),
    [
        (
            "turned",
            {**TABLE, "sex": {**SEX, "categories": ["male", "female"]}},
            r"column 1 is 'sex' \(categorical, \['female', 'male'\]\) in csv_folder:ours and 'sex' "
            r"\(categorical, \['male', 'female'\]\) in csv_folder:turned; accepted",
        ),
        (
            "range",
            {**TABLE, "age": {**AGE, "range": [0, 100]}},
            r"column 0 is 'age' \(numeric, \[0.0, 120.0\] years\) in .*\[0.0, 100.0\] years\) in",
        ),
        ("unit", {**TABLE, "age": {**AGE, "unit": "months"}}, r"120.0\] years\) in .* months\) in"),
        ("kind", {**TABLE, "sex": {**SEX, "kind": "ordinal"}}, r"'sex' \(ordinal, "),
        (
            "order",
            {"sex": SEX, "age": AGE, "code": TABLE["code"]},
            r"column 0 is 'age'.* and 'sex'",
        ),
        (
            "fewer",
            {"age": AGE},
            r"column 1 is 'sex' .* in csv_folder:ours and none in csv_folder:fe",
        ),
        ("more", {**TABLE, "ward": SEX}, r"column 2 is none in csv_folder:ours and 'ward'"),
        ("none", None, r"and none in csv_folder:none"),
    ],
)
def test_a_table_that_would_be_read_as_other_numbers_is_not_scored(
    own, tmp_path, name, table, differs
):
    classes = ["benign", "malignant"]
    trained, tested = own("ours", classes, table=TABLE), own(name, classes, table=table)
    given = tmp_path / "data", trained, tested
    found = classifier(*given, ("image", "tabular"))
    with pytest.raises(UserError, match=f"evals.corpus: the table is not encoded as .*{differs}"):
        protocols.check(found)
    found.parts.config["data"]["table"]["encoding"] = "metablock"
    with pytest.raises(UserError, match=differs):
        protocols.check(found)
    found.parts.config["data"]["table"]["encoding"] = "sentences"
    protocols.check(found)
    protocols.check(classifier(*given))  # of a recipe that reads no table
    vector = classifier(*given, ("image", "metadata_vector"))
    with pytest.raises(UserError, match=differs if table else "csv_folder has none"):
        protocols.check(vector)
    if table:
        protocols.check(classifier(*given, ("image", "metadata")))


def test_a_table_of_the_same_encoding_is_scored(own, tmp_path):
    classes = ["benign", "malignant"]
    trained = own("ours", classes, table=TABLE)
    other = {**TABLE, "sex": {**SEX, "sentence": "A {value} patient.", "missing": ["?"]}}
    other["code"] = {**TABLE["code"], "categories": ["1", "2", "3"]}  # left out
    tested = own("theirs", classes, table=other)
    for inputs in (("image", "tabular"), ("image", "metadata_vector")):
        protocols.check(classifier(tmp_path / "data", trained, tested, inputs))
    # UNK has a place in y, and none in rows of numbers.
    asked = own("asked", classes, table={**TABLE, "sex": {**SEX, "unknown": ["UNK"]}})
    protocols.check(classifier(tmp_path / "data", trained, asked, ("image", "tabular")))
    with pytest.raises(UserError, match=r"\['female', 'male'\] or unknown\) in csv_folder:asked"):
        protocols.check(classifier(tmp_path / "data", trained, asked, ("metadata_vector",)))


@pytest.mark.parametrize(
    ("evals", "learns"),
    [
        ({"protocols": ("probe",)}, "probe"),
        ({"protocols": ("classify", "probe"), "controls": ("regression",)}, "probe, regression"),
        ({"controls": ("missing_mask",)}, "missing_mask"),
    ],
)
def test_what_learns_from_a_split_that_is_not_there_is_refused(own, tmp_path, evals, learns):
    classes = ["benign", "malignant"]
    trained, tested = own("ours", classes), own("theirs", classes, ("test",))
    message = rf"{learns} of config.evals learns from the split train of {tested}, .* no split"
    with pytest.raises(UserError, match=message):
        protocols.check(classifier(tmp_path / "data", trained, tested, **evals))
    protocols.check(classifier(tmp_path / "data", trained, trained, **evals))
    protocols.check(classifier(tmp_path / "data", trained, tested))
