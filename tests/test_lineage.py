"""A run that starts from another is held against what that one was trained on."""

import types

import pytest

from configs import prima
from medvlp_jax import assemble, config, evaluator, lineage, origins, report
from medvlp_jax.config import UserError
from medvlp_jax.data import leakage
from medvlp_jax.evaluation import results


@pytest.fixture
def ran(tmp_path):
    """Return a function that makes the run folder of a variant of PRIMA: folder and config."""

    def made(variant, start="", name="", **data):
        resolved = prima.get_config(variant).to_dict()
        resolved["init"]["params"] = start
        resolved["data"] |= {k: v for k, v in data.items() if k != "folds"}
        resolved["data"]["folds"] |= data.get("folds", {})
        folder = tmp_path / (name or variant)
        folder.mkdir()
        (folder / assemble.CONFIG).write_text(config.to_json(resolved))
        return str(folder), resolved

    return made


def check(resolved, corpus="cxr_phantom:clinic", split="test"):
    lineage.check(resolved, corpus, split)


def test_the_stages_of_launch_prima_start_from_one_another(ran):
    """Injection reads texts alone, whatever its folds: they are none."""
    for folds in ({"index": 3}, {"count": 0, "index": 0}):
        start = ""
        for stage in ("inject", "align", "sharpen", "fuse"):
            own = folds if stage != "inject" else {}
            name = f"{stage}-{folds['index']}"
            start, resolved = ran(f"{stage}_phantom", start, name, folds=own)
            check(resolved, resolved["data"]["corpora"][0])
        assert lineage.corpora(resolved) == ("cxr_phantom:clinic", "knowledge")
        assert [name.rsplit("/", 1)[1].split("-")[0] for name, _ in lineage.earlier(resolved)] == [
            "sharpen",
            "align",
            "inject",
        ]


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ({"index": 0}, {"index": 1}, "by data.folds.index=0, and .* by data.folds.index=1: rows"),
        ({"seed": 1}, {}, "by data.folds.seed=1, and here .* by data.folds.seed=0"),
        ({"group": "study_id"}, {}, "by data.folds.group=study_id, and"),
        ({"count": 0}, {}, "by the corpus' own splits, and .* by data.folds.count=5: rows"),
        ({}, {"count": 0}, "by data.folds.count=5, and .* by the corpus' own splits: rows"),
    ],
)
def test_a_run_of_another_fold_is_no_start(ran, there, here, said):
    aligned, _ = ran("align_phantom", folds=there)
    _, resolved = ran("sharpen_phantom", aligned, folds=here)
    with pytest.raises(UserError, match=f"init.params={aligned} was trained on .* {said}"):
        check(resolved)
    # Nor is one that started from it.
    sharpened, _ = ran("sharpen_phantom", aligned, "again", folds=there)
    _, resolved = ran("fuse_phantom", sharpened, folds=here)
    with pytest.raises(UserError, match=said):
        check(resolved)


def test_another_inner_share_moves_the_validation_rows_alone(ran):
    aligned, _ = ran("align_phantom", folds={"inner": 0})
    _, resolved = ran("sharpen_phantom", aligned)
    check(resolved)
    with pytest.raises(
        UserError, match=r"by data\.folds\.inner=0, and .* by data\.folds\.inner=10"
    ):
        check(resolved, split="validation")


def test_a_run_of_another_corpus_or_of_the_same_fold_is_one(ran):
    other, _ = ran("align_men", folds={"index": 4})
    _, resolved = ran("sharpen_phantom", other)
    check(resolved)
    aligned, _ = ran("align_phantom", name="sized", corpora=("cxr_phantom:clinic",))
    _, resolved = ran("sharpen_phantom", aligned, "next")
    check(resolved)
    check(resolved, "men_phantom:flat")


def test_the_split_another_run_was_trained_on_is_not_tested(ran):
    own = {"count": 0}
    aligned, _ = ran("align_phantom", folds=own, split="validation")
    _, resolved = ran("sharpen_phantom", aligned, folds=own)
    check(resolved)
    with pytest.raises(UserError, match="was trained on the split validation of cxr_phantom:clin"):
        check(resolved, split="validation")
    trained, _ = ran("align_phantom", name="trained", folds=own)
    _, resolved = ran("sharpen_phantom", trained, "same", folds=own)
    check(resolved, split="train")  # this very run has seen it: the report says so
    _, resolved = ran("sharpen_men", trained)
    with pytest.raises(UserError, match="was trained on the split train of cxr_phantom:clinic"):
        check(resolved, split="train")


def test_what_is_not_here_is_not_known(ran, tmp_path):
    gone = str(tmp_path / "gone")
    aligned, resolved = ran("align_phantom", gone)
    check(resolved)
    assert lineage.unknown(resolved) == gone
    assert lineage.unknown(ran("sharpen_phantom", aligned)[1]) == gone
    assert lineage.unknown(ran("align_phantom", "", "first")[1]) == ""
    assert lineage.earlier({"data": {}}) == []
    itself, resolved = ran("align_men", str(tmp_path / "align_men"))
    assert [folder for folder, _ in lineage.earlier(resolved)] == [itself]
    assert lineage.unknown(resolved) == ""


def test_an_evaluation_is_told_of_the_runs_before(ran, monkeypatch, capsys):
    first, _ = ran("align_phantom", corpora=("nih_cxr14",), folds={"count": 0})
    _, resolved = ran("sharpen_phantom", first, corpora=("padchest",), folds={"count": 0})
    resolved["evals"] |= {"corpus": "rsna_pneumonia"}
    monkeypatch.setattr(assemble, "open_corpus", lambda *_: pytest.fail("opened"))
    parts = types.SimpleNamespace(config=resolved, recipe=None, mesh=None)
    monkeypatch.setattr("medvlp_jax.embedder.make_embed", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        evaluator.Evaluator(parts, resolved["evals"])
    assert "what was trained on: nih_cxr14 (NIH ChestX-ray14)" in capsys.readouterr().out
    (warned,) = report.warnings(resolved, results.Written({}, {}))[:1]
    assert warned == leakage.warning(["nih_cxr14"], "rsna_pneumonia")

    aligned, _ = ran("align_phantom", name="zero")
    _, resolved = ran("sharpen_phantom", aligned, "one", folds={"index": 1})
    parts = types.SimpleNamespace(config=resolved, recipe=None, mesh=None)
    with pytest.raises(UserError, match=r"was trained on .* by data\.folds\.index=0"):
        evaluator.Evaluator(parts, resolved["evals"])


def test_an_encoder_has_seen_what_the_runs_before_its_own_had(ran):
    first, _ = ran("align_phantom", corpora=("nih_cxr14",))
    second, _ = ran("sharpen_phantom", first, corpora=("padchest",))
    assert origins.find(second, None).corpora == ("padchest", "nih_cxr14")
