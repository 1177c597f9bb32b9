"""Paired differences of classifiers against loops and scikit-learn."""

import csv

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as reference

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import case_tables, paired, zero_shot


def write(file, seed, signal, patients=60):
    """Cases of two rows a patient in two of three classes."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 2 * patients)
    noise = np.random.default_rng(seed).normal(size=(2 * patients, 3))
    score = np.exp(noise + signal * np.eye(3)[truth])
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image_id", "patient_id", "truth", "a", "b", "c"))
        for i, row in enumerate(score / score.sum(1, keepdims=True)):
            writer.writerow((f"i{i}", f"p{i // 2}", "ab"[truth[i]], *row))
        writer.writerow(("unknown", "p0", "", 0.2, 0.3, 0.5))
    return file


def test_rows_of_unknown_truth_are_left_out(tmp_path):
    file = tmp_path / "predictions.csv"
    rows = ("i1,anna,normal,0.9,0.1", "i2,bert,edema,0.4,0.6", "i3,carl,,0.5,0.5")
    text = "\n".join(["image_id,patient_id,truth,normal,edema", *rows])
    file.write_text(text, encoding="utf-8-sig")  # as spreadsheets do
    found = paired.read(file)
    assert (found.patients.tolist(), found.truth.tolist()) == (["anna", "bert"], [0, 1])
    assert found.classes == ["normal", "edema"]
    np.testing.assert_allclose(found.chances, [[0.9, 0.1], [0.4, 0.6]])


@pytest.mark.parametrize("metric", paired.METRICS)
def test_a_value_is_that_of_scikit_learn_over_the_classes_present(tmp_path, metric):
    case = paired.read(write(tmp_path / "a.csv", 1, 0.7))
    truth, chances = case.truth, case.chances
    expected = {
        "macro_auroc": np.mean(
            [reference.roc_auc_score(truth == c, chances[:, c]) for c in (0, 1)]
        ),
        "macro_f1": reference.f1_score(truth, chances.argmax(1), labels=[0, 1], average="macro"),
        "balanced_accuracy": np.mean([(chances.argmax(1) == c)[truth == c].mean() for c in (0, 1)]),
        "accuracy": reference.accuracy_score(truth, chances.argmax(1)),
    }[metric]
    found = paired.value(metric, case, np.ones((1, len(truth))))
    assert found == pytest.approx(expected, abs=1e-12)


def test_classes_that_tie_share_the_row_as_in_results(tmp_path):
    file = tmp_path / "predictions.csv"
    rows = ("i1,anna,a,0.5,0.5", "i2,bert,a,0.5,0.5", "i3,carl,b,0.1,0.9")
    file.write_text("\n".join(["image_id,patient_id,truth,a,b", *rows]))
    for metric, expected in (("accuracy", 2 / 3), ("balanced_accuracy", 3 / 4)):
        found = paired.value(metric, paired.read(file), np.ones((1, 3)))
        assert found == pytest.approx(expected, rel=1e-12), metric


def test_a_difference_is_the_mean_over_runs_and_its_interval_holds_it(tmp_path):
    sides = [
        [write(tmp_path / f"{name}-{seed}/predictions.csv", seed, signal).parent for seed in (0, 1)]
        for name, signal in (("ours", 2.0), ("theirs", 0.5))
    ]
    found = paired.compare(*sides, "macro_f1", resamples=200)
    ones = np.ones((1, 120))
    ours, theirs = (
        np.mean([paired.value("macro_f1", paired.read(run), ones)[0] for run in side])
        for side in sides
    )
    assert found["difference"] == pytest.approx(ours - theirs)
    assert 0 < found["low"] < found["difference"] < found["high"]
    same = paired.compare(sides[0], sides[0], "macro_f1", resamples=200)
    assert same["difference"] == same["low"] == same["high"] == 0
    assert same["p"] == 1


def test_a_run_of_one_class_is_left_out_where_its_metric_is_undefined(tmp_path):
    full, other = (write(tmp_path / f"{n}.csv", seed, 1.0) for n, seed in (("a", 0), ("b", 1)))
    alone = []
    for file in (full, other):
        rows = [line for line in file.read_text().splitlines() if line.split(",")[2] != "a"]
        alone.append(file.with_name(f"alone-{file.name}"))
        alone[-1].write_text("\n".join(rows) + "\n")
    found = paired.compare([full, alone[0]], [other, alone[1]], "macro_auroc", resamples=100)
    expected = paired.compare([full], [other], "macro_auroc", resamples=100)
    assert found["difference"] == pytest.approx(expected["difference"])


def test_folds_have_the_interval_of_the_corrected_t_test():
    differences = [0.03, 0.01, 0.05, -0.01, 0.02]
    found = paired.over_folds(differences, ratio=0.3)
    mean = sum(differences) / 5
    variance = sum((d - mean) ** 2 for d in differences) / 4
    reach = scipy.stats.t.ppf(0.975, 4) * (variance * (1 / 5 + 0.3)) ** 0.5
    expected = {"difference": mean, "low": mean - reach, "high": mean + reach}
    assert found == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="needs two"):
        paired.over_folds([0.1], ratio=0.25)


def test_bad_input_is_refused(tmp_path):
    one, two = (write(tmp_path / f"{name}.csv", 0, 1.0) for name in "ab")
    two.write_text(two.read_text().replace("p3,", "p4,"))
    for ours, theirs, metric, message in (
        ([one], [two], "macro_f1", "predictions of other cases"),
        ([one], [one, one], "macro_f1", "compared one by one"),
        ([one], [one], "f1", "No metric 'f1'"),
        ([tmp_path / "none"], [one], "macro_f1", "only runs of a classifier"),
    ):
        with pytest.raises(UserError, match=message):
            paired.compare(ours, theirs, metric)
    two.write_text(one.read_text().replace("a,b,c", "a,b,d"))
    with pytest.raises(UserError, match="predictions of other cases"):
        paired.compare([one], [two], "macro_f1")
    with pytest.raises(UserError, match="60 patients of known class and 0 resamples"):
        paired.compare([one], [one], "macro_f1", resamples=0)
    one.write_text("image_id,patient_id,truth,a\nx,p,,1\n")
    with pytest.raises(UserError, match="0 patients of known class"):
        paired.compare([one], [one], "macro_f1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"has the columns \[\]"),
        ("image_id,patient_id,truth\ni,p,\n", "and classes are needed"),
        ("id,patient_id,truth,a\ni,p,a,1\n", r"has the columns \['id', 'patient_id', 'truth'\]"),
        ("image_id,patient_id,truth,a\ni,p,a\n", "and classes are needed"),
        ("image_id,patient_id,truth,a\ni,p,b,1\n", "'b' is none of the classes a"),
        ("image_id,patient_id,truth,a\ni,p,a,high\n", "row 2: 'high' is no probability"),
        ("image_id,patient_id,truth,a,b\ni,p,,5,0\ni,p,a,0,nan\n", "row 3: 'nan' is no prob"),
        ("image_id,patient_id,truth,a\ni,p,a,inf\n", "'inf' is no probability; a number from 0"),
        ("image_id,patient_id,truth,a\ni,p,a,-3\n", "'-3' is no probability"),
        ("image_id,patient_id,truth,a\ni,p,a,5\n", "'5' is no probability"),
        (b"image_id,patient_id,truth,\xe9\n", "a UTF-8 CSV file is needed"),
    ],
)
def test_a_file_of_something_else_is_one_sentence(tmp_path, content, message):
    file = tmp_path / "predictions.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        paired.read(tmp_path)


def test_the_command_prints_every_metric(tmp_path, capsys):
    a, b = (
        write(tmp_path / f"{n}/predictions.csv", s, 1.0).parent for n, s in (("a", 0), ("b", 1))
    )
    paired.main(["--ours", str(a), "--theirs", str(b), "--resamples", "50"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(paired.METRICS)


def write_findings(file, seed, signal, patients=40):
    """Cases of two rows a patient with two of three findings, some of them unknown."""
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 2, (2 * patients, 3)).astype(np.int8)
    labels[:, 2] = 0  # nobody has it: it cannot be ranked
    labels[3] = -1
    chances = 1 / (1 + np.exp(-np.random.default_rng(seed).normal(size=labels.shape)))
    chances = (chances + signal * (labels == 1)) / (1 + signal)
    found = {"image_id": [f"i{i}" for i in range(len(labels))]}
    found |= {"patient_id": [f"p{i // 2}" for i in range(len(labels))]}
    file.parent.mkdir(parents=True, exist_ok=True)
    scored = {"finding": zero_shot.PromptScores(labels, chances, ("edema", "mass/nodule", "none"))}
    case_tables.write_scores(scored, found, file)
    return labels, chances


def test_several_findings_a_case_are_compared_by_the_auroc_alone(tmp_path, capsys):
    files = [tmp_path / f"{name}/predictions.csv" for name in "ab"]
    values = []
    for seed, file in enumerate(files):
        labels, chances = write_findings(file, seed, 1.0 - seed)
        known = [labels[:, c] >= 0 for c in (0, 1)]
        each = [
            reference.roc_auc_score(labels[k, c] == 1, chances[k, c]) for c, k in enumerate(known)
        ]
        values.append(np.mean(each))
    case = paired.read(files[0])
    assert case.classes == ["edema", "mass/nodule", "none"]
    assert "i3" not in case.images
    found = paired.value("macro_auroc", case, np.ones((1, len(case.truth))))
    assert found == pytest.approx(values[0], abs=1e-12)
    paired.main(["--ours", str(files[0]), "--theirs", str(files[1]), "--resamples", "50"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"macro_auroc       {values[0] - values[1]:+.3f}")
    with pytest.raises(UserError, match="of which there is no macro_f1; accepted is macro_auroc"):
        paired.compare(*([file] for file in files), "macro_f1")
    one_class = write(tmp_path / "c/predictions.csv", 0, 1.0)
    with pytest.raises(UserError, match="predictions of other cases"):
        paired.compare([files[0]], [one_class], "macro_auroc")


def test_a_folder_of_seeds_stands_for_each_of_them_in_order(tmp_path):
    for name, signal in (("ours", 2.0), ("theirs", 0.5)):
        for seed in (10, 2):
            write(tmp_path / name / f"seed_{seed}/predictions.csv", seed, signal)
        run = write(tmp_path / name / "seed_3/predictions.csv", 3, signal).parent
        (run / "config.json").write_text("{}")  # a run by such a name
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert [file.parent.name for file in paired.files(ours)] == ["seed_2", "seed_10"]
    each = [[side / f"seed_{seed}" for seed in (2, 10)] for side in (ours, theirs)]
    expected = paired.compare(*each, "macro_f1", resamples=50)
    assert paired.compare([ours], [theirs], "macro_f1", resamples=50) == expected
    write(ours / "predictions.csv", 0, 1.0)  # its own come first
    assert paired.files(ours) == [ours / "predictions.csv"]
    assert paired.files(tmp_path) == []
