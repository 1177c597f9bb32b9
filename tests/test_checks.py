"""What a run is refused for once its recipe and its corpora are there; settings: test_train.py."""

from types import SimpleNamespace

import pytest

from medvlp_jax import checks
from medvlp_jax.config import UserError
from medvlp_jax.data.reports import Report
from medvlp_jax.evidence import extract
from medvlp_jax.evidence.backends import writer

CONTRASTS = SimpleNamespace(spaces={"report": ("image", "text")})
CLASSIFIES = SimpleNamespace(spaces={})


@pytest.mark.parametrize(
    ("size", "chunks", "recipe", "variables", "said"),
    [
        (1, 1, CONTRASTS, {}, "train.batch_size=1 leaves nothing to contrast"),
        (1, 1, CLASSIFIES, {"batch_stats": {}}, "BatchNorm needs 2 or more examples in each"),
        (4, 4, CONTRASTS, {"batch_stats": {}}, "train.batch_size=4 in train.chunks=4: BatchNorm"),
        (4, 4, CONTRASTS, {}, ""),  # the contrast is of the whole batch, whatever the chunks
        (4, 2, CONTRASTS, {"batch_stats": {}}, ""),
        (1, 1, CLASSIFIES, {}, ""),
    ],
)
def test_an_example_that_needs_others_is_not_alone(size, chunks, recipe, variables, said):
    config = {"train": {"batch_size": size, "chunks": chunks}}
    if not said:
        checks.several(config, recipe, variables)
        return
    with pytest.raises(UserError, match=said):
        checks.several(config, recipe, variables)


def test_an_extraction_that_lacks_reports_is_refused_before_training(tmp_path):
    texts = [("Clear.", ""), ("Secret.", "Worse."), ("", ""), ("Secret.", "")]
    extract.run([Report("a", "Clear.", "")], writer("rules", extract.write_rules), tmp_path)
    source = SimpleNamespace(name="csv_folder:mine", split="train", texts=lambda: texts)
    reads = SimpleNamespace(inputs=("image", "evidence"))
    config = {"data": {"evidence": {"folder": str(tmp_path)}}}
    said = r"2 of 3 reports of csv_folder:mine \(train\) are not in .*medvlp evidence extract"
    with pytest.raises(UserError, match=said) as refused:
        checks.evidence(config, reads, [source])
    assert "Secret" not in str(refused.value)
    checks.evidence(config, SimpleNamespace(inputs=("image", "report")), [source])
    checks.evidence({"data": {"evidence": {"folder": ""}}}, reads, [source])
    texts[1:] = texts[:1]
    checks.evidence(config, reads, [source])
