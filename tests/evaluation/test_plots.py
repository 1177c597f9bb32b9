"""Pictures are written whole, from real-shaped input, without pyplot."""

import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import calibration, labels, overlays, plots, zero_shot
from medvlp_jax.evaluation.average_precision import Boxes


def write(path, lines):
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def metrics_file(tmp_path):
    lines = []
    for step in range(100):
        values = {"loss": 1 + 1 / (step + 1), "loss/findings": 0.5, "lr": 1e-4, "grad_norm": 2.0}
        values |= {"weight/findings": 1.0, "time/step": 0.1, "time/pairs_per_second": 30.0}
        lines.append(json.dumps({"step": step, **values}))
    evaluation = {"retrieval/image_to_text/R@1": {"value": 0.2, "low": None}}
    lines.append(json.dumps({"step": 99, **evaluation, "retrieval/image_to_text/median_rank": 4.0}))
    return write(tmp_path / "metrics.jsonl", lines)


def test_half_a_line_text_and_nan_are_ignored_and_later_lines_stand(tmp_path):
    lines = ['{"step": 1, "loss": 3.0, "note": "x"}', '{"step": 1, "loss": 2.0}']
    lines += ["[" * 5000, "[4, 5]", "7", '{"step": [8], "loss": 9}']
    lines += ['{"step": 2, "loss": NaN}', '{"step": 3, "lo']
    series = plots.read_series(write(tmp_path / "m.jsonl", lines))
    assert list(series) == ["loss"]
    np.testing.assert_array_equal(series["loss"][1], [2.0])


def test_file_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no metrics"):
        plots.read_series(write(tmp_path / "m.jsonl", ["{}"]))
    (tmp_path / "m.jsonl").write_bytes(b"\xff")
    with pytest.raises(UserError, match="holds no metrics: it is not UTF-8"):
        plots.read_series(tmp_path / "m.jsonl")


def test_panels_start_with_the_loss_and_part_ranks_from_rates(metrics_file):
    titles = [title for title, _ in plots.panels(plots.read_series(metrics_file))]
    assert titles[:3] == ["loss", "loss/findings", "lr"]
    assert "retrieval/image_to_text" in titles
    assert "retrieval/image_to_text/rank" in titles
    assert "weight" not in titles  # constant


def test_smoothing_keeps_constants_and_length():
    np.testing.assert_allclose(plots.smooth(np.full(100, 3.0)), np.full(100, 3.0))
    spike = np.zeros(100)
    spike[50] = 5.0
    spread = np.zeros(100)
    spread[48:53] = 1.0  # a 25th of 100 points is 4, made odd
    np.testing.assert_allclose(plots.smooth(spike), spread, atol=1e-12)
    assert plots.smooth(np.arange(7.0)).tolist() == list(range(7))


def test_curves_writes_one_whole_picture(metrics_file, tmp_path):
    out = tmp_path / "run" / "curves.png"
    plots.curves(metrics_file, out)
    with Image.open(out) as image:
        image.load()
        assert image.width > 600
    assert [p.name for p in out.parent.iterdir()] == ["curves.png"]


def test_examples_draws_grey_and_colour_and_odd_texts(tmp_path):
    rng = np.random.default_rng(0)
    texts = [["$5 and $6", "word " * 200], ["", "x" * 400]]
    for channels in (1, 3):
        images = rng.integers(0, 255, (2, 16, 16, channels)).astype(np.uint8)
        plots.examples(images, texts, [[0.9, -0.1]] * 2, ["$5 and $6", "other"], tmp_path / "e.png")
        with Image.open(tmp_path / "e.png") as image:
            image.load()


def test_examples_needs_an_image(tmp_path):
    with pytest.raises(UserError, match="at least one image"):
        plots.examples(np.zeros((0, 4, 4, 1)), [], [], [], tmp_path / "e.png")


def test_pyplot_is_never_imported():
    code = "import sys, medvlp_jax.evaluation.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_calibration_bins_hold_all_rows_and_their_means():
    confidence = np.linspace(0.2, 1, 21)
    right = np.arange(21) % 2 == 0
    bins = calibration.bins(right, confidence, count=4)
    assert bins[:, 2].sum() == 21
    np.testing.assert_allclose(bins[0], [confidence[:6].mean(), 0.5, 6])


def test_a_calibrated_model_has_the_error_that_chance_gives_it():
    # One bin a row: a row that is right with probability p is off by 1 - p, else by p.
    confidence = np.array([0.5, 0.6, 0.8])
    found = calibration.chance_errors(confidence, draws=4000)
    expected = np.mean(2 * confidence * (1 - confidence))
    assert found.mean() == pytest.approx(expected, abs=4 * found.std() / 4000**0.5)
    # Bins of n rows of one p: the mean of |k / n - p| over the binomial distribution of k.
    k, n, p = np.arange(6), 5, 0.7
    chance = scipy.stats.binom.pmf(k, n, p) @ np.abs(k / n - p)
    found = calibration.chance_errors(np.full(8 * n, p), draws=1000)
    assert found.mean() == pytest.approx(chance, abs=4 * found.std() / 1000**0.5)
    np.testing.assert_array_equal(found, calibration.chance_errors(np.full(8 * n, p), draws=1000))


def test_calibration_says_of_how_many_cases_it_is_and_what_chance_gives(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, out: drawn.append(figure))
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.ones(2), 30)
    plots.classifier(rng.integers(0, 2, 30), chances, ["a", "b"], tmp_path / "c.png")
    panel = drawn[0].axes[2]
    by_lot = calibration.chance_errors(chances.max(1)).mean()
    (said,) = [text.get_text() for text in panel.texts]
    assert said.startswith(f"30 cases in 8 bins\na calibrated model has {by_lot:.3f} by chance")
    assert by_lot > 0.1


@pytest.mark.parametrize("classes", [2, 8])
def test_a_classifier_is_drawn_with_classes_that_do_not_occur(tmp_path, classes):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, classes - 1, 40)
    names = [f"a rather long name of class {c}" for c in range(classes)]
    out = tmp_path / "classifier.png"
    plots.classifier(truth, rng.dirichlet(np.ones(classes), 40), names, out)
    with Image.open(out) as picture:
        assert picture.width > 2 * picture.height
    with pytest.raises(UserError, match="needs at least one"):
        plots.classifier(truth[:0], np.zeros((0, classes)), names, out)


def test_attention_is_drawn_for_images_and_layers(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, c), dtype=np.uint8) for c in (3, 1)]
    maps = [[rng.random((8, 8)), rng.random((4, 4))]] * 2
    plots.attention(images, maps, ["a", "b"], tmp_path / "attention.png")
    with Image.open(tmp_path / "attention.png") as picture:
        assert picture.width > picture.height


def test_roc_curves_leave_out_classes_that_are_all_or_nothing(tmp_path, monkeypatch):
    drawn = []
    kept = plots.save
    monkeypatch.setattr(
        plots, "save", lambda figure, out: (drawn.append(figure), kept(figure, out))
    )
    known = np.array([[1, 1, -1, 0], [0, 1, 0, 0], [1, 1, 1, -1], [0, 1, 0, 0]])
    scores = np.array([[0.9, 1, 9, 0], [0.1, 1, 0.3, 0], [0.2, 1, 0.2, 0], [0.3, 1, 0.4, 0]])
    tasks = {"finding": zero_shot.PromptScores(known, scores, ("a", "all", "some", "none"))}
    other = zero_shot.PromptScores(known[:, :1], scores[:, :1], ("a",))
    plots.roc(tasks | {"other": other}, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 5000
    first, second = drawn[0].axes
    # a: 0.9 and 0.2 against 0.1 and 0.3: three of four pairs; some: 0.2 is below both others.
    assert [t.get_text() for t in first.get_legend().get_texts()] == ["a  0.75", "some  0.00"]
    assert "other: ROC; area" in [second.get_title(loc=side) for side in ("left", "center")]


ALIKE = (
    "ventriculomegaly_of_the_left_side_mild",
    "ventriculomegaly_of_the_left_side_marked",
    "ventriculomegaly_of_the_right_side_mild",
    "effusion",
)


@pytest.mark.parametrize(
    "names",
    [
        ALIKE,
        [f"a rather long name of the class {c}" for c in range(12)],
        [f"{c} is the first word of a rather long name" for c in range(12)],
        ["x" * 25 + "a" + "y" * 25, "x" * 25 + "b" + "y" * 25, "z"],  # differ in the middle alone
        ["one  two", "three\nfour"],
    ],
)
def test_names_that_are_cut_stay_different(names):
    short = labels.shortened(names, 22)
    assert len({*short}) == len(names)
    assert all(0 < len(name) <= 22 for name in short)
    for before, name in zip(names, short, strict=True):
        if len(before) <= 22:
            assert name == " ".join(before.split())
        else:
            assert set(name) & set(before), name


def test_a_cut_name_keeps_its_head_and_its_tail():
    assert labels.shortened(ALIKE[2:], 22) == ["ventriculo…t_side_mild", "effusion"]


def test_class_names_stand_in_figures_as_they_are_written(tmp_path, monkeypatch):
    drawn = []
    kept = plots.save
    monkeypatch.setattr(
        plots, "save", lambda figure, out: (drawn.append(figure), kept(figure, out))
    )
    names = [*ALIKE, r"stage $\frac$ and $x$"]
    rng = np.random.default_rng(0)
    truth, chances = np.arange(40) % len(names), rng.dirichlet(np.ones(len(names)), 40)
    plots.classifier(truth, chances, names, tmp_path / "c.png")
    known = (truth[:, None] == np.arange(len(names))).astype(int)
    scored = {r"task $\frac$": zero_shot.PromptScores(known, chances, tuple(names))}
    plots.roc(scored, tmp_path / "r.png")
    images = [np.zeros((8, 8, 1), np.uint8)]
    plots.attention(images, [[np.ones((2, 2))]], [r"$\frac$"], tmp_path / "a.png")
    confusion = drawn[0].axes[0]
    ticks = [text.get_text() for text in confusion.get_xticklabels()]
    assert len({*ticks}) == len(names)
    assert r"stage $\frac$ and $x$" in ticks
    for figure, axes in ((drawn[0], 1), (drawn[1], 0)):
        legend = figure.axes[axes].get_legend()
        found = [text.get_text().rsplit("  ", 1)[0] for text in legend.get_texts()]
        assert len({*found}) == len(names)


def test_names_over_test_images_are_as_they_are_written(tmp_path, monkeypatch):
    drawn = []
    kept = plots.save
    monkeypatch.setattr(
        plots, "save", lambda figure, out: (drawn.append(figure), kept(figure, out))
    )
    names = [r"a $\frac$", "ventriculomegaly" * 4]
    image, mask = np.zeros((16, 16, 1), np.uint8), np.zeros((16, 16, 2), bool)
    mask[4:9, 4:9] = True
    examples = [{"image": image, "mask": mask}]
    overlays.outlines(examples, mask[None], names, tmp_path / "o.png")
    corners = np.array([[2.0, 2, 9, 9], [4, 4, 12, 12]])
    found = [Boxes(corners, np.array([0, 1]), np.array([0.9, 0.8]))]
    for truth in (found, [Boxes(*(field[1:] for field in found[0]))]):
        overlays.boxes(examples, found, truth, names, tmp_path / "b.png")
    overlays.classes(examples, np.ones((1, 2)), [np.array([1, 0])], names, tmp_path / "c.png")
    title = drawn[2].axes[0].get_title(loc="left")
    assert title.startswith("ventriculomegalyventri")
    assert len(title) == 40
