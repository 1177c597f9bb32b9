"""The page of a run: whole in itself, nothing unescaped, no patient's text unless asked for."""

import base64
import errno
import html.parser
import json
import os
import re
import shutil
import types

import numpy as np
import pytest
import scipy.special

from medvlp_jax import cases, cli, report, writing
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import (
    case_tables,
    page,
    paired,
    plots,
    provenance,
    results,
    retrieval,
    zero_shot,
)

CONFIG = {
    "recipe": {"name": "clip<script>"},
    "data": {"corpora": ["siim_acr"]},
    "evals": {"corpus": "rsna_pneumonia", "split": "validation"},
    "train": {"steps": 6, "batch_size": 8},
    "init": {"image": "", "text": "mlm"},
    "seed": 0,
}
VOID = {"meta", "img", "line", "circle", "br", "hr", "link"}


class Reader(html.parser.HTMLParser):
    """Collects what matters of a page, and whether its elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.images, self.texts, self.tags = [], [], [], [], set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        found = dict(attributes)
        self.links += [found[key] for key in ("src", "href") if key in found]
        self.images += [found["src"]] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def numbers():
    found = {}
    for name, value in (("finding", 0.81), ("finding (untrained)", 0.52)):
        entries = {
            "macro_auroc": results.number(value, value - 0.05, value + 0.05, n=40, chance=0.5),
            "mean_rank": results.number(3.2, 2.0, 4.0, n=40, chance=20.5),
            "auroc/edema": results.number(value, n=40, chance=0.5),
        }
        notes = {"patients": 40, "skipped": ["hernia"], "prevalence": {"edema": 0.1, "normal": 0.5}}
        notes["fewest_patients"] = {"edema": 4, "normal": 20, "mass": 30}
        found |= results.assemble("zero_shot@v1", name, entries, settings={}, notes=notes)
    return found


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run <b>1"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    origin = {
        "date": "2026-11-27T10:00:00+00:00",
        "code": {"version": "0.1.0 (ab)", "commit": "c" * 40, "dirty": True},
        "config": provenance.config_hash(CONFIG),
        "rows": {"corpus": "rsna_pneumonia", "split": "validation"}
        | provenance.rows(["i1", "i2"], ["patient-anna", "patient-bert"]),
        "weights": "f" * 16,
        "seeds": {"run": 0},
        "libraries": {"jax": "0.10"},
        "devices": "1 x cpu",
    }
    results.write_results(numbers(), folder, origin)
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    image = np.zeros((1, 8, 8, 1), np.uint8)
    plots.examples(image, [["a report"]], [[0.5]], ["a report"], folder / "examples.png")
    return folder


SCORED = b"image_id,patient_id,finding/edema,finding/edema (truth)\n"


def predictions(folder, lines):
    text = "\n".join(["image_id,patient_id,truth,normal,edema", *lines])
    (folder / "predictions.csv").write_text(text + "\n")


def test_the_page_is_whole_needs_no_network_and_escapes_what_it_is_given(run):
    found = Reader(report.build(run))
    assert not found.open
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    assert not found.tags & {"script", "link", "iframe", "b"}
    assert "run <b>1" in found.text
    assert "clip<script>" in found.text
    (curves,) = found.images
    assert base64.b64decode(curves.split(",", 1)[1]).startswith(b"\x89PNG")


def test_a_control_stands_beside_its_number_with_the_hash(run):
    text = report.build(run)
    row = text[text.index("<td>macro auroc</td>") :]
    assert row.index("0.810") < row.index("0.520") < row.index("0.500")
    assert "zero_shot@v1 #" in text
    assert "the same network with the weights it started from" in text


def test_what_a_reader_must_know_is_said_first(run):
    told = report.warnings(report.assemble.written_config(run), results.read(run))
    whole = " ".join(told)
    for part in (
        "NIH ChestX-ray14",  # leakage: both corpora come from it
        "validation split",
        "not committed",
        "skipped, for they lack one of both outcomes: hernia",
        "without, edema, normal: the intervals",
    ):
        assert part in whole, part
    assert len([line for line in told if "hernia" in line]) == 1
    other = "config.json is not the one"
    assert other not in whole
    (run / "config.json").write_text(json.dumps(CONFIG | {"seed": 1}))
    told = report.warnings(report.assemble.written_config(run), results.read(run))
    assert any(other in line for line in told)


def test_numbers_on_the_rows_of_training_are_called_that(run):
    config = report.assemble.written_config(run)
    trained = config["data"] | {"split": "validation", "corpora": ["rsna_pneumonia"]}
    whole = " ".join(report.warnings({**config, "data": trained}, results.read(run)))
    assert "on the validation split, whose rows the run was trained on" in whole


def test_what_a_flavour_alone_skipped_is_said_and_controls_have_their_names(run):
    entry = {"macro_auroc": results.number(0.7, n=40, chance=0.5)}
    notes = {"patients": 40, "skipped": ["hernia"]}
    flavoured = results.assemble(
        "zero_shot@gloria-v1", "finding (gloria)", entry, settings={}, notes=notes
    )
    written = results.read(run)._replace(
        numbers=flavoured | results.renamed(flavoured, "untrained")
    )
    told = report.warnings(report.assemble.read_config(run), written)
    (line,) = [line for line in told if "hernia" in line]
    assert line.startswith("zero_shot/finding (gloria): skipped")
    studies = results.assemble("classify@v1", "d (by study)", entry, settings={}, notes={})
    found = written.numbers | studies | results.renamed(studies, "shuffled images")
    columns = {task.name: task.columns for task in page.tasks(found)}
    assert columns["zero_shot/finding (gloria)"] == ["this run", "untrained"]
    assert columns["classify/d"] == ["by study", "by study, shuffled images"]


def test_rows_with_uncertain_findings_are_warned_of(run):
    numbers = {"P@1": results.number(0.5, n=16, chance=0.5)}
    notes = {retrieval.UNKNOWN: 4}
    found = results.assemble("retrieval@v1", "image_to_text", numbers, settings={}, notes=notes)
    written = results.read(run)._replace(numbers=found)
    told = report.warnings(report.assemble.read_config(run), written)
    assert f"retrieval/image_to_text: {retrieval.UNKNOWN}: 4." in told


def test_patients_texts_and_ids_are_in_the_page_only_when_asked_for(run):
    plain, full = report.build(run), report.build(run, with_texts=True)
    assert len(Reader(full).images) == len(Reader(plain).images) + 1
    assert "examples.png may show patients' texts" in Reader(plain).text
    for text in (plain, full):
        assert "patient-anna" not in text


def test_a_classifier_has_its_curves_and_its_examples_name_classes_alone(run):
    predictions(run, ["i1,anna,normal,0.9,0.1", "i2,bert,edema,0.4,0.6", "i3,carl,,0.5,0.5"])
    found = Reader(report.build(run))
    assert len(found.images) == 3
    assert "calibration" in found.text
    assert "anna" not in found.text
    predictions(run, ["i3,carl,,0.5,0.5"])  # nothing is known: no curves
    assert len(Reader(report.build(run)).images) == 2
    predictions(run, ["i1,anna,hernia,0.9,0.1"])
    with pytest.raises(UserError, match="'hernia' is none of the classes normal, edema"):
        report.build(run)


def test_scores_of_prompts_are_written_read_and_drawn(run):
    labels = np.array([[1, 0], [0, -1], [1, 1]], np.int8)
    scores = np.array([[0.5, -0.25], [0.125, 0.75], [0.1, 1 - 2**-53]])  # %.6g makes the last 1
    tasks = {"finding": zero_shot.PromptScores(labels, scores, ("edema", "mass/nodule"))}
    found = {"image_id": ["i1", "i2", "i3"], "patient_id": ["anna", "bert", "bert"]}
    case_tables.write_scores(tasks, found, run / "zero_shot.csv")
    assert (run / "zero_shot.csv").read_text().splitlines()[2] == "i2,bert,0.125,0,0.75,"
    (read,) = case_tables.read_scores(run / "zero_shot.csv").values()
    np.testing.assert_array_equal(read.labels, labels)
    np.testing.assert_array_equal(read.scores, scores)
    assert read.classes == ("edema", "mass/nodule")
    page_of = Reader(report.build(run))
    assert len(page_of.images) == 2
    assert "ROC of each class, by prompts" in page_of.text
    assert "anna" not in page_of.text


def test_probabilities_are_written_so_that_they_read_back_as_they_are(run):
    logits = np.array([[20, -2], [19, -2], [0.1, 0.3]], np.float32)
    source = types.SimpleNamespace(tasks={"state": ["normal", "edema"]})
    recipe = types.SimpleNamespace(task="state")
    evaluator = types.SimpleNamespace(source=source, parts=types.SimpleNamespace(recipe=recipe))
    found = {"image_id": ["i1", "i2", "i3"], "patient_id": ["anna", "bert", "carl"]}
    found |= {"logits": logits, "label/state": np.array([[1, 0], [1, 0], [0, 1]])}
    cases.write_predictions(evaluator, found, run / "predictions.csv")
    read = paired.read(run)
    expected = scipy.special.softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_array_equal(read.chances, expected)
    assert read.chances[0, 0] > read.chances[1, 0] > 0.999999


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("zero_shot.csv", b"", r"has the columns \[\] \.\.\."),
        ("zero_shot.csv", b"a,b\n1,2\n", r"has the columns \['a', 'b'\] .* TASK/CLASS \(truth\)"),
        ("zero_shot.csv", b"\xff", "a UTF-8 CSV file is needed"),
        ("zero_shot.csv", SCORED + b"i1,anna,high,1\n", "its column 'finding/edema' fails"),
        ("zero_shot.csv", SCORED + b"i1,anna,nan,1\n", "which needs finite numbers"),
        ("zero_shot.csv", SCORED + b"i1,anna,0.5,7\n", r"'finding/edema \(truth\)' of 1, 0 and"),
        ("zero_shot.csv", SCORED + b"i1,anna,0.5\n", "its column 'finding/edema' fails"),
        ("predictions.csv", b"image_id,patient_id,truth,a\ni,p,a,nan\n", "row 2: 'nan' is no prob"),
        ("config.json", b"[]", "is no config of a run; an object with a section recipe is needed"),
        ("config.json", b"{}", "is no config of a run"),
        ("config.json", b"\xff", r"config\.json is not JSON: 'utf-8' codec"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_sentence(run, file, content, message):
    (run / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        report.main([str(run)])
    assert not (run / "report.html").exists()


def test_files_of_cases_are_cleared_where_an_evaluation_lies_and_nowhere_else(run, tmp_path):
    predictions(run, ["i1,anna,normal,0.9,0.1"])
    cases.clear(run)
    kept = {"config.json", "results.json", "metrics.jsonl"}
    assert {path.name for path in run.iterdir()} == kept
    (tmp_path / "examples.png").write_text("mine")
    cases.clear(tmp_path)
    assert (tmp_path / "examples.png").read_text() == "mine"


def test_a_run_without_a_number_in_its_log_has_a_page_that_says_so(run):
    for content in (b"{}\n", b"[1]\n", b"\xff"):
        (run / "metrics.jsonl").write_bytes(content)
        found = Reader(report.build(run))
        assert not found.images
        assert "metrics.jsonl" in found.text


def test_controls_under_other_keys_join_the_classifiers_table():
    found = {}
    one = lambda value: {"accuracy": results.number(value, n=9, chance=0.5)}
    both = one(0.8) | {"prevalence_control_accuracy": results.number(0.6, n=9)}
    options = {"settings": {}, "notes": {}}
    found |= results.assemble("classify@v1", "d", both, **options)
    found |= results.assemble("classify@v1", "d (by study)", both, **options)
    found |= results.assemble("regression@v1", "d (table)", one(0.7), **options)
    (task,) = page.tasks(found)
    assert task.columns == ["this run", "most frequent class", "by study", "regression: table"]
    values = {column: entry["value"] for column, entry in task.entries["accuracy"].items()}
    assert list(values.values()) == [0.8, 0.6, 0.8, 0.7]


def test_a_column_of_other_rows_says_its_own_n_and_level_of_guessing():
    one = lambda n, chance: {"P@1": results.number(0.8, 0.7, 0.9, n=n, chance=chance)}
    options = {"settings": {}, "notes": {}}
    found = results.assemble("classify@v1", "d", one(40, 0.5), **options)
    found |= results.assemble("classify@v1", "d (by study)", one(12, 0.25), **options)
    found |= results.assemble("classify@v1", "d (untrained)", one(40, 0.5), **options)
    (task,) = page.tasks(found)
    table = page.table(task)
    cells = re.findall(r"<td>(0\.800.*?)</td>", table)
    said = [re.sub("<.*?>", "", cell) for cell in cells]
    assert said == ["0.800 [0.700, 0.900]", "0.800 [0.700, 0.900] chance 0.250 n 12", said[0]]
    assert "<td>0.500</td><td>40</td>" in table


def test_a_folder_without_results_is_refused_and_nothing_is_written(run, tmp_path):
    (run / "results.json").unlink()
    with pytest.raises(UserError, match=r"has no results.json: it has not been evaluated yet"):
        report.main([str(run), "--out", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()
    shutil.rmtree(run)
    with pytest.raises(UserError, match="is not a run folder"):
        report.main([str(run)])


def test_results_without_a_run_have_a_page_that_says_what_is_not_known(run):
    told = " ".join(report.warnings({}, results.read(run)))
    assert "What the encoder was trained on is not recorded here" in told
    assert "config.json" not in told
    (run / "config.json").unlink()
    found = Reader(report.build(run))
    assert "Results without the config of a run; tested on 2 rows of 2 patients" in found.text
    assert "fewer than 30 patients" in found.text
    assert "0.810" in found.text


def test_what_adapt_says_of_its_encoder_and_of_torn_patients_is_read(run):
    written = results.read(run)
    written.provenance["rows"]["torn_patients"] = 7
    entry = written.numbers["zero_shot/finding/protocol"]
    for encoder, leaks in (
        ({"untrained": False, "corpora": ["siim_acr"]}, True),
        ({"untrained": True}, False),
    ):
        entry["encoder"] = encoder
        told = " ".join(report.warnings({}, written))
        assert ("NIH ChestX-ray14" in told) == leaks
        assert "is not recorded" not in told
        assert "7 patients of rsna_pneumonia are in more than one of its splits" in told


def test_the_seeds_of_adapt_are_drawn_by_the_first(run):
    (run / "config.json").unlink()
    (run / "seed_4").mkdir()
    predictions(run / "seed_4", ["i1,anna,normal,0.9,0.1", "i2,bert,edema,0.4,0.6"])
    (run / "segment.png").write_bytes((run / "examples.png").read_bytes())
    found = Reader(report.build(run))
    assert "calibration, of seed_4" in found.text
    assert "Test images with what was found in them" in found.text
    assert "examples.png may show patients' texts" in found.text  # no classifier's: not its own
    labels = np.array([[1, 0], [0, 1]], np.int8)
    scored = {"finding": zero_shot.PromptScores(labels, labels / 2 + 0.1, ("edema", "mass"))}
    ids = {"image_id": ["i1", "i2"], "patient_id": ["anna", "bert"]}
    case_tables.write_scores(scored, ids, run / "seed_4/predictions.csv")
    assert "ROC of each finding, of seed_4" in Reader(report.build(run)).text
    cases.clear(run)
    assert not [*run.glob("*.png"), *run.glob("seed_4/*")]


def test_a_folder_where_a_file_belongs_is_one_sentence(run, tmp_path, capsys):
    assert cli.run(report.main, [str(run), f"--out={tmp_path}"]) == 2
    assert f"{tmp_path} is a folder; name a file, such as" in capsys.readouterr().err
    folder = tmp_path / "folder"
    folder.mkdir()

    def replace(_):  # as `data check --json` does
        with writing.replaced(folder) as scratch:
            scratch.write_text("")

    for main in (replace, lambda _: folder.write_text("")):
        assert cli.run(main) == 2
        assert f"medvlp: {folder} is a folder; name a file." in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_a_code_that_is_tried_again(capsys):
    def write(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    assert cli.run(write) == 74
    assert capsys.readouterr().err == (
        "medvlp: [Errno 28] No space left on device: 'metrics.jsonl'.\n"
    )


def test_the_page_lies_in_the_run_folder(run, capsys):
    report.main([str(run)])
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert "opens in any browser" in capsys.readouterr().out
