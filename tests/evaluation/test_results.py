"""The flat result dictionary and its table."""

import json

import numpy as np

from medvlp_jax.evaluation import results


def sample():
    numbers = {
        "macro_auroc": results.number(np.float64(0.8123), 0.78, 0.84, n=np.int64(512), chance=0.5),
        "mean_rank": results.number(3.26, 2.0, 4.0, n=512, chance=50.5),
        "auroc/edema": results.number(0.5, n=3),
    }
    notes = {"patients": 7, "skipped": ["hernia"], "left_out": 2, "prevalence": {"edema": 0.1}}
    return results.assemble(
        "zero_shot@clean-v1", "finding", numbers, settings={"ks": (1, 5)}, notes=notes
    )


def test_entries_are_json_and_stamped():
    found = sample()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    entry = found["zero_shot/finding/macro_auroc"]
    assert entry["protocol"] == "zero_shot@clean-v1"
    assert len(entry["hash"]) == 8
    assert found["zero_shot/finding/auroc/edema"]["low"] is None


def test_table_lines_are_aligned_and_complete():
    text = results.results_table(sample())
    rows = text.split("\n\n")[0].splitlines()
    assert len({len(row) for row in rows}) == 1
    assert " 0.812 " in text
    assert "[0.780, 0.840]" in text
    assert " 3.3 " in text
    assert "skipped: hernia" in text
    assert "7 patients" in text


def test_headline_table_hides_single_classes():
    assert "edema" not in results.results_table(sample(), per_class=False)


def test_markdown_table_has_one_header_and_full_names():
    lines = results.results_table(sample(), markdown=True).splitlines()
    assert lines[1].startswith("| ---")
    assert any("zero_shot/finding/macro_auroc" in line for line in lines)
    assert len({line.count("|") for line in lines[:5]}) == 1
