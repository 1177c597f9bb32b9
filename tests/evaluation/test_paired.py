"""Paired differences of classifiers against loops and scikit-learn."""

import csv

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as reference

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import paired


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
    found = paired.over_folds(differences)
    mean = sum(differences) / 5
    variance = sum((d - mean) ** 2 for d in differences) / 4
    reach = scipy.stats.t.ppf(0.975, 4) * (variance * (1 / 5 + 1 / 4)) ** 0.5
    expected = {"difference": mean, "low": mean - reach, "high": mean + reach}
    assert found == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="needs two"):
        paired.over_folds([0.1])


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
    one.write_text("image_id,patient_id,truth,a\nx,p,,1\n")
    with pytest.raises(UserError, match="no case whose class is known"):
        paired.read(one)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x,y\n1,2\n", "its columns are x, y"),
        ("image_id,patient_id,truth\ni,p,a\n", "its columns are image_id, patient_id, truth"),
        ("image_id,patient_id,truth,a\ni,p,c,1\n", "not in tuple"),
        ("image_id,patient_id,truth,a\ni,p,a,high\n", "high"),
        ("image_id,patient_id,truth,a,b\ni,p,a,1\n", "shorter"),
        ("", "not enough values"),
        (b"\xff\xfe", "can't decode"),
    ],
)
def test_a_file_that_is_none_of_predictions_is_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "a.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"is no predictions.csv with .*{sentence}"):
        paired.read(file)


def test_what_cannot_be_resampled_or_has_other_classes_is_refused(tmp_path):
    head, rows = "image_id,patient_id,truth,", "\ni,p,a,.6,.4\nj,p,b,.6,.4\n"
    one, two, other = (tmp_path / name for name in ("one.csv", "two.csv", "other.csv"))
    one.write_text(head + "a,b" + rows)
    two.write_text(head + "a,b" + rows.replace("j,p", "j,q"))
    other.write_text(
        head + "c,d" + rows.replace("j,p", "j,q").replace("a,.", "c,.").replace("b,.", "d,.")
    )
    with pytest.raises(UserError, match="All cases are of patient p: two or more"):
        paired.compare([one], [one], "accuracy")
    with pytest.raises(UserError, match="other cases or classes"):
        paired.compare([two], [other], "accuracy")
    with pytest.raises(UserError, match="resamples=0; accepted is 1"):
        paired.compare([two], [two], "accuracy", resamples=0)


def test_the_command_prints_every_metric(tmp_path, capsys):
    a, b = (
        write(tmp_path / f"{n}/predictions.csv", s, 1.0).parent for n, s in (("a", 0), ("b", 1))
    )
    paired.main(["--ours", str(a), "--theirs", str(b), "--resamples", "50"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(paired.METRICS)
