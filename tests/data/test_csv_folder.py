"""A folder of one's own: its name, what it was prepared from, and defects of its description."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from medvlp_jax import cli
from medvlp_jax.config import UserError
from medvlp_jax.data import corpora, reports
from medvlp_jax.evidence import extract, phrases
from medvlp_jax.evidence.backends import writer

CORPUS = {
    "columns": {"image": "file", "group": "who", "label": "dx", "findings": "seen"},
    "classes": ["benign", "malignant"],
    "labels": {"finding": ["effusion", "edema"]},
    "images": {"closeup": "near"},
    "channels": 1,
}
TABLE = {"age": {"kind": "numeric", "range": [0, 120]}}
DX = {"kind": "categorical", "categories": ["benign", "malignant"]}
EDEMA = {"kind": "categorical", "categories": ["0", "1"]}
SIDES = {"positive": ["{c}"], "negative": ["no {c}"]}
SPEC = {"section": "findings", "multi_label": True, "template": SIDES}
LABEL = {"section": "findings", "multi_label": False}


@pytest.fixture(autouse=True)
def no_defaults(monkeypatch):
    monkeypatch.delenv("MEDVLP_TEST_DATA", raising=False)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    lines = ["file,near,who,dx,seen,effusion,edema,age"]
    for i in range(12):
        grey = np.random.default_rng(i).integers(0, 256, (40, 48), dtype=np.uint8)
        Image.fromarray(grey).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{i}.png,w{i},{CORPUS['classes'][i % 2]},Seen {i}.,1,0,{i}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    (folder / "corpus.json").write_text(json.dumps(CORPUS))
    (folder / "table.json").write_text(json.dumps(TABLE))
    return folder


@pytest.fixture
def prepare(tmp_path):
    """Return a function that runs `medvlp data prepare csv_folder`."""
    command = ["data", "prepare", "csv_folder", "--data-dir", str(tmp_path / "data")]

    def run(folder, name):
        return cli.main([*command, "--manual-dir", str(folder), "--builder-config", name])

    return run


@pytest.mark.parametrize(
    "name", ["../cxr_phantom/tiny", "/tmp/x", "..", ".", ".a", "a/b", "a:b", "a\n", "x" * 300]
)
def test_a_name_that_leaves_its_folder_is_refused(folder, prepare, tmp_path, capsys, name):
    assert prepare(folder, name) == 2
    assert "cannot name a corpus; accepted are up to 60 letters" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_what_was_prepared_before_is_said_and_other_tables_are_refused(
    folder, prepare, tmp_path, capsys
):
    assert prepare(folder, "good-1.0_ä") == 0
    assert "Prepared before" not in capsys.readouterr().out
    assert prepare(folder, "good-1.0_ä") == 0
    said = capsys.readouterr().out
    assert "Prepared before, so nothing was written: delete the folder" in said
    assert str(tmp_path / "data/csv_folder/good-1.0_ä/1.0.0") in said
    assert prepare(tmp_path / "nowhere", "good-1.0_ä") == 2
    assert "nowhere is missing or empty" in capsys.readouterr().err
    for name in ("corpus.json", "table.csv", "table.json"):
        content = (folder / name).read_text()
        (folder / name).write_text(f"{content}\n")
        assert prepare(folder, "good-1.0_ä") == 2
        assert "was prepared from other tables than those in" in capsys.readouterr().err
        (folder / name).write_text(content)
    # Corpora that were prepared by earlier versions do not tell from what.
    metadata = tmp_path / "data/csv_folder/good-1.0_ä/1.0.0/metadata.json"
    told = json.loads(metadata.read_text())
    assert told.pop("source_digest")
    metadata.write_text(json.dumps(told))
    (folder / "table.csv").write_text("file\n")
    assert prepare(folder, "good-1.0_ä") == 0


def test_the_command_line_says_what_is_missing(folder, tmp_path, capsys):
    assert cli.main(["data", "check", "csv_folder"]) == 2
    assert "csv_folder needs --manual-dir DIR, where DIR is" in capsys.readouterr().err
    (folder / "0.png").unlink()
    (folder / "0.png").mkdir()
    assert cli.main(["data", "check", "csv_folder", "--manual-dir", str(folder)]) == 2
    assert "image 0.png is unreadable (Is a directory)" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    for where in ("/proc/xx", str(tmp_path / "file")):
        command = ["data", "prepare", "cxr_phantom", "--builder-config", "tiny", "--data-dir"]
        assert cli.main([*command, where]) == 2
        assert f"Cannot write to {where}" in capsys.readouterr().err


def test_images_may_lie_elsewhere_behind_a_link_and_no_cell_leads_there(
    folder, prepare, tmp_path, capsys
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in folder.glob("*.png"):
        path.rename(elsewhere / path.name)
    (folder / "images").symlink_to(elsewhere)
    table = folder / "table.csv"
    linked = re.sub(r"(\d+\.png)", r"images/\1", table.read_text())
    table.write_text(linked)
    assert prepare(folder, "linked") == 0
    for cell in ("../elsewhere/0.png", "images/../images/0.png", str(elsewhere / "0.png")):
        table.write_text(linked.replace("images/0.png", cell, 1))
        assert prepare(folder, "other") == 2
        assert f"row 2: file '{cell[:80]}' is outside {folder}" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["TIFF", "WEBP", "GIF"])
def test_an_image_that_check_refuses_is_not_prepared(folder, prepare, capsys, format):
    with Image.open(folder / "3.png") as image:
        pixels = image.copy()
    pixels.save(folder / "3.png", format)
    assert cli.main(["data", "check", "csv_folder", "--manual-dir", str(folder)]) == 2
    assert "neither JPEG, PNG nor DICOM" in capsys.readouterr().out
    assert prepare(folder, "good") == 2
    assert "a whole JPEG, PNG or DICOM file is needed" in capsys.readouterr().err


def with_(**fields):
    return {**CORPUS, **fields}


def columns(**names):
    return with_(columns={**CORPUS["columns"], **names})


def prompts(task="finding", **spec):
    return {"version": "mine", "tasks": {task: {**SPEC, **spec}}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.json", columns(label=5), "column 'label' is 5; the name of one is needed"),
        ("corpus.json", columns(image=["file"]), r"column 'image' is \['file'\]; the name of one"),
        ("corpus.json", with_(labels={"finding": [1]}), r"'finding' is \[1\]; a list of columns"),
        ("corpus.json", with_(labels={"finding": ["edema"] * 2}), "a list of columns .* different"),
        ("corpus.json", with_(labels={"a/b": ["edema"]}), "labels has the name 'a/b'; one without"),
        ("corpus.json", with_(labels={"": ["edema"]}), "labels has the name ''; one without / is"),
        ("corpus.json", with_(images={"x": 3}), "image 'x' is 3; the name of a column is needed"),
        ("corpus.json", with_(images={"x/y": "near"}), "images has the name 'x/y'"),
        ("corpus.json", with_(classes=[1, 0]), r"has classes \[1, 0\]; two or more different"),
        ("corpus.json", with_(classes=["1", "1", "0"]), "two or more different are needed"),
        ("corpus.json", with_(channels=True), "has channels True; accepted are 1 and 3"),
        ("corpus.json", with_(side=False), "has side False; accepted are 0 and 32 to 4096"),
        ("corpus.json", [], "must be an object with columns"),
        ("corpus.json", with_(labels={"\ud800": ["edema"]}), "is not JSON: .* surrogates"),
        ("prompts.json", [], 'is no prompt set; one has "version" and "tasks"'),
        ("prompts.json", {"version": "1", "tasks": []}, "is no prompt set"),
        ("prompts.json", prompts("other"), "is for other; a task of the corpus is needed: finding"),
        ("prompts.json", prompts(section=1), "task 'finding' needs a \"section\""),
        ("prompts.json", prompts(multi_label="no"), 'needs "multi_label", true or false'),
        ("prompts.json", prompts(template={"positive": ["x"]}), "as the negative side of 'eff"),
        ("prompts.json", prompts(template={**SIDES, "positive": "x"}), "has 'x' as the positive"),
        ("prompts.json", prompts(template=1), "has 1 for 'effusion'"),
        ("prompts.json", prompts(classes=[1]), r"has classes \[1\]"),
        ("prompts.json", prompts(classes={"edema": SIDES}), "has no prompts for effusion"),
        ("table.json", b'{"l\xe4ge": 1}', "table.json is not JSON"),
        (
            "table.json",
            {**TABLE, "dx": DX},
            "table.json: column 'dx' is a label in corpus.json, and",
        ),
        ("table.json", {"edema": EDEMA, **TABLE}, "column 'edema' is a label in corpus.json"),
        ("table.json", {"dx": DX | {"leakage": "it is it"}}, "column 'dx' is a label in"),
        ("corpus.json", b'{"l\xe4ge": 1}', "corpus.json is not JSON"),
        ("corpus.json", b"[" * 5000, "corpus.json is not JSON"),
        ("prompts.json", b"[" * 5000, "prompts.json is not JSON"),
    ],
)
def test_a_defect_of_the_description_is_named(folder, name, content, message):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        corpora.check("csv_folder", manual_dir=folder)


@pytest.mark.parametrize(
    "found",
    [
        prompts(template={"positive": {"slots": [["a", ""], ["{c}"]]}, "negative": ["no"]}),
        prompts(positive_only=True, template={"positive": ["{c}"]}),
        prompts(partial=True, classes={"edema": SIDES, "another": {}}),
        prompts("label", **LABEL, template={"positive": ["{c}"]}),
        {"version": 2, "tasks": {**prompts()["tasks"], "other": {**LABEL, "classes": {"a": {}}}}},
    ],
)
def test_prompts_that_evaluation_reads_are_taken(folder, found):
    (folder / "prompts.json").write_text(json.dumps(found), encoding="utf-8-sig")
    assert corpora.check("csv_folder", manual_dir=folder)["train"]["records"] > 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("effusion,edema", "effusion,effusion", "row 1: more than one column is called effusion"),
        ("3.png,3.png", "3.png,3.\0png", r"row 5: near '3.\\x00png' holds a zero byte"),
    ],
)
def test_a_defect_of_the_table_is_named(folder, old, new, message):
    path = folder / "table.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        corpora.check("csv_folder", manual_dir=folder)


def test_long_cells_and_spaces_around_names_are_read(folder):
    path = folder / "table.csv"
    path.write_text(
        path.read_text().replace("edema", " edema ").replace("Seen 3", "Seen " * 40_000)
    )
    counts = corpora.check("csv_folder", manual_dir=folder)
    assert sum(split["findings"] for split in counts.values()) == 12


def with_texts(folder, name, texts):
    """Describe one column of texts in place of "seen", one a row."""
    description = with_(columns={**CORPUS["columns"], name: "seen"})
    if name != "findings":
        del description["columns"]["findings"]
    (folder / "corpus.json").write_text(json.dumps(description))
    path = folder / "table.csv"
    table = path.read_text()
    for i, cell in enumerate(texts):
        table = table.replace(f",Seen {i}.,", f',"{cell}",')
    path.write_text(table)


def test_rows_without_a_text_are_counted_and_so_are_texts_of_which_there_is_none(
    folder, prepare, capsys
):
    other = ["INDICATION: Cough.\nThe lungs are clear.", "N/A"]
    with_texts(folder, "report", [other[i % 2] for i in range(12)])
    assert cli.main(["data", "check", "csv_folder", "--manual-dir", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "kept: 12 rows without a text" in said
    assert "0 findings, 0 impressions" in said
    assert prepare(folder, "empty") == 0
    assert "kept: 12 rows without a text" in capsys.readouterr().out


def test_a_corpus_without_text_columns_lacks_no_text(folder, capsys):
    description = with_(columns={k: v for k, v in CORPUS["columns"].items() if k != "findings"})
    (folder / "corpus.json").write_text(json.dumps(description))
    assert cli.main(["data", "check", "csv_folder", "--manual-dir", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "without a text" not in said
    assert "findings" not in said


EMPTY = ("nan", "NaN", "NULL", "None", "N/A", "NA", " . ", "-")


@pytest.mark.parametrize("name", ["findings", "report"])
def test_placeholders_are_no_texts(folder, capsys, name):
    with_texts(folder, name, EMPTY)
    assert cli.main(["data", "check", "csv_folder", "--manual-dir", str(folder)]) == 0
    assert "kept: 8 rows without a text" in capsys.readouterr().out
    counts = corpora.check("csv_folder", manual_dir=folder)
    assert sum(split["findings"] for split in counts.values()) == 4
    assert sum(split["impression"] for split in counts.values()) == 0


def test_an_extraction_of_the_table_has_every_report_of_the_corpus(folder, prepare, tmp_path):
    with_texts(folder, "findings", ["Large\n  effusion.", "NaN", "No  change."])
    path = folder / "table.csv"
    path.write_text(path.read_text().replace("file,near,who,dx,seen", "id,near,who,dx,findings"))
    description = json.loads((folder / "corpus.json").read_text())
    description["columns"] |= {"image": "id", "findings": "findings"}
    (folder / "corpus.json").write_text(json.dumps(description))
    assert prepare(folder, "spaced") == 0
    extract.run(reports.read_reports(path), writer("rules", extract.write_rules), tmp_path / "out")
    where = {"data_dir": tmp_path / "data", "builder_config": "spaced"}
    for source in corpora.open_all("csv_folder", **where):
        phrases.check(str(tmp_path / "out"), source.name, source.texts())


def test_leakage_names_the_folders_of_ones_own(folder, prepare, tmp_path, capsys):
    for name in ("good", "default"):
        assert prepare(folder, name) == 0
    names = ["csv_folder:good", "csv_folder:default"]
    assert cli.main(["data", "leakage", *names, "--data-dir", str(tmp_path / "data")]) == 0
    said = capsys.readouterr().out
    assert "csv_folder:default train" in said
    assert "shares with csv_folder:good train: " in said
