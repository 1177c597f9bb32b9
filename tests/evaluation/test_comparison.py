"""Runs side by side: one hash a column, published figures apart, every format whole."""

import csv
import io
import json

import pytest

from medvlp_jax import table
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import (
    classify,
    comparison,
    detection,
    finetuning,
    grounding,
    layout,
    probe,
    published,
    results,
    retrieval,
    segmentation,
)


def write(folder, value, *, resamples=2000, rows="r1", **labels):
    """A run with one zero-shot task of two classes, and its untrained control."""
    folder.mkdir(parents=True)
    found = {}
    for name, shift in (("organ", 0.0), ("organ (untrained)", -0.3)):
        numbers = {
            "macro_auroc": results.number(value + shift, 0.4, 0.95, n=40, chance=0.5),
            "auroc/lung": results.number(value + shift, n=40, chance=0.5),
        }
        settings = {"resamples": resamples, "prompts": ["an image of a lung"] * 9}
        found |= results.assemble(
            "zero_shot@clean-v1", name, numbers, settings=settings, notes={"patients": 7}
        )
    where = {"corpus": "made", "split": "test", "rows": 40, "patients": 7, "hash": rows}
    where |= labels
    results.write_results(found, folder, {"rows": where})
    return folder


@pytest.fixture
def runs(tmp_path):
    return write(tmp_path / "a", 0.81), write(tmp_path / "b", 0.84)


def read(*folders):
    return {folder.name: results.read(folder) for folder in folders}


def test_a_run_and_its_control_share_a_column_with_their_hash(runs):
    found = comparison.compare(read(*runs))
    assert found.rows == [("a", ""), ("a", "untrained"), ("b", ""), ("b", "untrained")]
    (column,) = found.columns
    assert column.metric == "macro_auroc"
    assert found.notes == []
    text = layout.markdown(comparison.grid(found))
    assert f"zero_shot/organ/macro_auroc<br>zero_shot@clean-v1 #{column.hash}" in text
    assert "0.840 [0.400, 0.950]" in text
    assert "| chance" in text


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("classify/grade", ("classify/grade", "", "")),
        ("classify/grade (untrained)", ("classify/grade", "", "untrained")),
        (
            "classify/grade (by study) (shuffled images)",
            ("classify/grade", "by study", "shuffled images"),
        ),
        ("zero_shot/organ (gloria)", ("zero_shot/organ (gloria)", "", "")),
        (
            "zero_shot/organ (gloria) (lower 12% masked)",
            ("zero_shot/organ (gloria)", "", "lower 12% masked"),
        ),
        ("probe/organ_1% (draw 0) (untrained)", ("probe/organ_1%", "draw 0", "untrained")),
        ("regression/grade (table and pixels)", ("regression/grade", "", "table and pixels")),
    ],
)
def test_a_key_is_parted_into_what_was_measured_and_its_control(task, expected):
    assert comparison.parted(f"{task}/auroc/lung") == (*expected, "auroc/lung")


def test_studies_flavours_and_draws_are_columns_and_controls_are_rows(tmp_path, capsys):
    found, folder = {}, tmp_path / "a"
    folder.mkdir()
    protocols = {"classify/grade (by study)": "clean-v2", "zero_shot/organ (gloria)": "gloria-v1"}
    protocols |= {"probe/organ_1%": "clean-v1", "probe/organ_1% (draw 0)": "clean-v1"}
    for task, version in protocols.items():
        protocol, name = task.split("/")
        number = {"macro_auroc": results.number(0.8, n=9, chance=0.5)}
        one = results.assemble(
            f"{protocol}@{version}", name, number, settings={"task": task}, notes={}
        )
        found |= one | results.renamed(one, "shuffled images")
    results.write_results(found, folder, {"rows": {"hash": "r"}})
    table.main([str(folder), "--format=csv", "--metrics=*"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["task"] for row in rows if not row["control"]] == [*protocols]
    assert {row["control"] for row in rows} == {"", "shuffled images"}
    whole = comparison.compare(read(folder))
    assert whole.rows == [("a", ""), ("a", "shuffled images")]
    assert {column.task for column in whole.columns} == {*protocols} - {"probe/organ_1% (draw 0)"}


def test_other_settings_have_a_column_of_their_own_and_a_note_names_them(runs, tmp_path):
    other = write(tmp_path / "c", 0.9, resamples=20)
    found = comparison.compare(read(*runs, other))
    assert len(found.columns) == 2
    for (row, column), entry in found.cells.items():
        assert entry["hash"] == column.hash
        assert (column == found.columns[1]) == (row[0] == "c")
    (note,) = found.notes
    assert "measured in 2 ways" in note
    assert note.endswith("They differ in resamples (2000, 20).")
    header, *_, last = comparison.grid(found).rows
    assert header[2] == ""
    assert last == ["chance", "0.500", "0.500"]


def test_other_rows_are_said(runs, tmp_path):
    other = write(tmp_path / "c", 0.9, rows="r2")
    (note,) = comparison.compare(read(*runs, other)).notes
    assert note.startswith("Not all were measured on the same rows. a: 40 rows of 7 patients")


def test_other_labels_of_the_same_rows_are_said(runs, tmp_path):
    folders = [
        write(tmp_path / name, 0.9, labels={"organ": organ, "plane": "p"}, boxes=boxes)
        for name, organ, boxes in (("c", "o1", "b"), ("d", "o2", "b"), ("e", "o1", "b2"))
    ]
    notes = comparison.compare(read(*runs, *folders)).notes  # of the first two it is not known
    assert notes == [
        "The labels of organ are not the same in c, d, e, though the rows are.",
        "The boxes are not the same in c, d, e, though the rows are.",
    ]
    assert comparison.compare(read(*runs, folders[0])).notes == []
    moved = write(tmp_path / "f", 0.9, rows="r2", labels={"organ": "o2"})
    (note,) = comparison.compare(read(folders[0], moved)).notes
    assert note.startswith("Not all were measured on the same rows")


def test_patterns_choose_numbers_and_one_that_fits_none_is_refused(runs):
    found = comparison.compare(read(*runs), ["zero_shot/*/auroc/*"])
    assert [column.metric for column in found.columns] == ["auroc/lung"]
    with pytest.raises(UserError, match=r"No run has a number 'zero_shot/organ/macro_auc'. Did"):
        comparison.compare(read(*runs), ["zero_shot/organ/macro_auc"])


def test_csv_has_a_line_a_number_with_protocol_and_hash(runs, capsys):
    table.main([*map(str, runs), "--format=csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert tuple(rows[0]) == comparison.FIELDS
    assert [row["value"] for row in rows if not row["control"]] == ["0.81", "0.84"]
    assert {row["protocol"] for row in rows} == {"zero_shot@clean-v1"}
    with pytest.raises(UserError, match="would mix"):
        table.main([str(runs[0]), "--published", "--format=csv"])


def test_latex_escapes_and_has_one_cell_a_column(runs, capsys):
    table.main([f"A_1={runs[0]}", str(runs[1]), "--format=latex"])
    text = capsys.readouterr().out
    assert r"A\_1 (untrained) & 0.510 [0.400, 0.950] \\" in text
    assert r"zero\_shot@clean-v1 \#" in text
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in lines} == {1}
    assert layout.escape("a\\b{50 %}") == r"a\textbackslash{}b\{50 \%\}"
    assert layout.escape("<|") == r"\textless{}\textbar{}"  # other signs in LaTeX's old fonts


def test_published_figures_stand_below_with_mark_and_source_and_never_in_the_table(runs, capsys):
    table.main([*map(str, runs), "--published"])
    measured, *apart = capsys.readouterr().out.split("**Published, not measured here")
    assert len(apart) == len(published.fitting(["zero_shot"])) > 1
    assert "CheXzero" not in measured
    assert any("CheXzero [P]" in text and "Source: G2D" in text for text in apart)
    table.main([str(runs[0]), "--published=mgca/auroc"])
    assert "IMITATE [M]" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"No published table 'mgca/auc'. Did you mean mgca/auroc"):
        table.main([str(runs[0]), "--published=mgca/auc"])


def test_published_figures_of_every_kind_go_with_a_protocol_that_is_measured_here():
    ids = [module.PROTOCOL for module in (classify, finetuning, grounding, probe, retrieval)]
    ids += [*segmentation.PROTOCOL.values(), *detection.PROTOCOL.values(), "zero_shot@clean-v1"]
    kinds = {name.partition("@")[0] for name in ids}
    assert {table["protocol"] for table in published.load()["tables"].values()} <= kinds
    assert "mgca/dice" in published.fitting(["segment"])
    assert published.fitting(["segment-train-encoder"]) == ["medklip/own"]


def test_every_published_figure_has_a_source_a_mark_and_a_place():
    marks = published.load()["marks"]
    for name, entry in published.load()["tables"].items():
        assert entry["source"], name
        assert {entry["mark"], *entry.get("marks", {}).values()} <= {*marks}, name
        assert {*entry.get("marks", {})} <= {*entry["rows"]}, name
        for model, values in entry["rows"].items():
            assert len(values) == len(entry["columns"]), (name, model)
        highest = 100 if entry["unit"] == "%" else 2
        assert all(v is None or 0 <= v <= highest for r in entry["rows"].values() for v in r), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 5000, "is not JSON: more than 100 levels of nesting"),
        ("[1]", "holds no results"),
        ('{"provenance": {}}', "holds no results"),
        ('{"loss": {"value": 1}}', "'loss' is no protocol/task/metric"),
        ('{"a/b/c": {"protocol": "a@1", "hash": "1", "value": 1}}', "'a/b/c' needs value, low"),
        (
            '{"a/b/c": {"protocol": "a@1", "hash": "1", "value": "1", "low": null, "high": null, '
            '"n": 1, "chance": null}}',
            "each a number or null",
        ),
    ],
)
def test_what_is_no_results_file_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message):
        results.read(tmp_path)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (None, {}, "of a are damaged: their provenance.rows is None; an object with"),
        (5, {}, "provenance.rows is 5"),
        ({"hash": []}, {}, "provenance.rows is {'hash': "),
        ({"labels": "o1"}, {}, "provenance.rows is {'labels': 'o1'}"),
        ({"labels": {"organ": []}}, {}, "provenance.rows is {'labels': {'organ': "),
        ({}, 5, "of a are damaged: the settings of 'zero_shot/organ/protocol' are 5;"),
    ],
)
def test_damaged_rows_and_settings_are_one_sentence(runs, rows, settings, message):
    file = runs[0] / "results.json"
    held = json.loads(file.read_text())
    held["provenance"]["rows"] = rows
    held["zero_shot/organ/protocol"]["settings"] = settings
    file.write_text(json.dumps(held))
    with pytest.raises(UserError, match=message):
        comparison.compare(read(*runs))


def test_two_runs_of_one_name_are_refused(runs):
    with pytest.raises(UserError, match="Two runs are called 'a'"):
        table.named([str(runs[0]), str(runs[0])])


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path):
    folder = write(tmp_path / "lr=0.1", 0.81)
    assert list(table.named([str(folder)])) == ["lr=0.1"]
    assert list(table.named([f"slow={folder}"])) == ["slow"]


def test_provenance_is_parted_from_the_numbers(runs):
    written = results.read(runs[0])
    assert written.provenance["rows"]["hash"] == "r1"
    assert results.PROVENANCE not in written.numbers
    assert next(iter(json.loads((runs[0] / "results.json").read_text()))) == "provenance"
