"""The sixteen acceptance tests of the protocols' reference, and where each is held.

The reference recomputed every number from public label files. What is in other files is named here
and looked up, so that nobody renames a promise away; what no other file holds is below. Tests of
the real label tables run where MEDVLP_LABELS names a folder with them.
"""

import ast
import pathlib
from itertools import permutations

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as sk

from medvlp_jax.evaluation import classify, metrics, retrieval, statistics

TESTS = pathlib.Path(__file__).parents[1]
HELD = {
    "1 CheXpert 5x200": {
        "data/test_splits.py": (
            "test_5x200_takes_images_whose_other_findings_are_all_absent",
            "test_the_real_chexpert_draw_has_the_published_hashes",
        )
    },
    "2 RSNA splits": {
        "data/test_splits.py": (
            "test_rsna_is_cut_by_patient_whatever_the_order_of_rows",
            "test_the_real_rsna_splits_have_the_published_hashes",
        )
    },
    "3 SIIM row split": {
        "data/test_splits.py": (
            "test_a_legacy_cut_by_row_tears_images_apart_and_the_clean_one_does_not",
            "test_the_real_siim_rows_overlap_as_published",
        )
    },
    "4 MGCA validation": {
        "data/test_splits.py": (
            "test_mgca_validation_rows_stay_in_training_and_the_clean_ones_do_not",
            "test_the_real_chexpert_draw_has_the_published_hashes",
        )
    },
    "5 prompt generator": {
        "evaluation/test_prompt_sets.py": (
            "test_gloria_has_the_published_number_of_prompts",
            "test_slots_run_as_nested_loops_and_an_empty_one_leaves_its_space",
        )
    },
    "6 sectioner": {
        "data/test_sections.py": (
            "test_empty_findings_are_dropped_and_an_earlier_one_counts",
            "test_without_either_the_last_paragraph_is_what_follows_the_blank_line",
            "test_a_report_without_headings_is_one_section",
            "test_names_are_mapped",
        )
    },
    "7 run lengths": {
        "data/test_masks.py": (
            "test_relative_runs_are_column_major_and_count_from_the_run_before",
            "test_no_region_is_written_in_several_ways",
        ),
        "data/test_builders.py": ("test_siim_takes_the_union_of_rows_with_either_header",),
    },
    "8 NIH boxes": {
        "data/test_builders.py": ("test_nih_reads_both_headers_the_lists_and_the_boxes",)
    },
    "9 VinDr readers": {
        "data/test_builders.py": (
            "test_vindr_counts_readers_and_knows_both_names_of_other_diseases",
        )
    },
    "10 metric oracles": {
        "evaluation/test_retrieval.py": ("test_oracle_of_precision_hit_and_recall",),
        "evaluation/test_retrieval_legacy.py": ("test_oracle_of_precision_hit_recall_and_rank",),
        "evaluation/test_grounding.py": (
            "test_contrast_to_noise_is_the_references",
            "test_mean_iou_is_the_references_and_strictness_moves_it",
            "test_a_flat_map_scores_zero_and_says_so",
        ),
        "evaluation/test_metrics.py": (
            "test_oracle_of_auroc_and_average_precision",
            "test_oracle_of_decisions_at_one_half",
            "test_oracle_of_the_f1_threshold_which_counts_as_positive",
        ),
        "evaluation/test_statistics.py": (
            "test_delong_oracle",
            "test_delong_equals_its_structural_components_in_loops",
        ),
    },
    "11 zero-shot legacy": {
        "evaluation/test_scoring.py": (
            "test_gloria_does_not_depend_on_the_batch_size_and_benchx_does",
        )
    },
    "12 loss sharding": {"losses/test_tiled.py": (), "training/test_meshes.py": ()},
    "13 resume": {
        "test_resume.py": (
            "test_kills_in_every_phase_lose_nothing_and_repeat_nothing",
            "test_ten_kills_at_random_steps_change_no_bit_of_parameters_and_metrics",
        )
    },
    "14 PAD-UFES-20": {
        "data/test_table_corpora.py": (
            "test_pad_ufes_20_splits_by_patient_and_says_what_is_missing",
            "test_pad_ufes_20_as_published_results_read_it",
        )
    },
    "15 Derm7pt": {
        "data/test_table_corpora.py": (
            "test_derm7pt_keeps_nevi_and_melanomas_with_both_images",
            "test_derm7pt_has_all_cases_in_five_groups",
        )
    },
    "16 leakage report": {"data/test_leakage.py": ("test_known_overlaps_are_said",)},
}


def checks(function):
    """Say whether a test can fail: it asserts, calls an assert_... or expects within a `with`."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert | ast.With):
            return True
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called.startswith("assert_"):
                return True
    return False


@pytest.mark.parametrize("number", HELD)
def test_every_acceptance_test_is_held_where_it_is_said_to_be(number):
    for file, names in HELD[number].items():
        tree = ast.parse((TESTS / file).read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        there = {f.name: checks(f) for f in functions if f.name.startswith("test_")}
        assert there, file
        assert {*names} <= there.keys(), file
        assert [name for name in names or there if not there[name]] == [], file


def test_sixteen_are_listed():
    assert [int(name.split()[0]) for name in HELD] == [*range(1, 17)]


# Every metric that scikit-learn or SciPy also defines, to 1e-12.

RNG = np.random.default_rng(5)
BINARY = RNG.integers(0, 2, 300)
SCORES = np.round(RNG.normal(size=300) + BINARY, 1)  # many ties
TRUTH, GUESS = RNG.integers(0, 4, (2, 300))
TABLE = metrics.confusion(TRUTH, GUESS, 4)
LABELS4 = np.eye(4, dtype=np.int8)[TRUTH]
SCORES4 = RNG.normal(size=(300, 4)) + LABELS4
PRECISION, RECALL, _ = sk.precision_recall_curve(BINARY, SCORES)
EQUAL = {
    "best_f1_threshold": (
        sk.f1_score(BINARY, metrics.best_f1_threshold(BINARY, SCORES) <= SCORES),
        np.nanmax(2 * PRECISION * RECALL / (PRECISION + RECALL)),
    ),
    "auroc": (metrics.auroc(BINARY, SCORES), sk.roc_auc_score(BINARY, SCORES)),
    "average_precision": (
        metrics.average_precision(BINARY, SCORES),
        sk.average_precision_score(BINARY, SCORES),
    ),
    "expected_average_precision": (
        metrics.expected_average_precision(2, 5),
        np.mean([sk.average_precision_score(np.arange(5) < 2, o) for o in permutations(range(5))]),
    ),
    "confusion": (TABLE, sk.confusion_matrix(TRUTH, GUESS)),
    "accuracy": (metrics.accuracy(TABLE), sk.accuracy_score(TRUTH, GUESS)),
    "recall": (metrics.recall(TABLE), sk.recall_score(TRUTH, GUESS, average=None)),
    "sensitivity": (metrics.sensitivity(TABLE), sk.recall_score(TRUTH, GUESS, average=None)),
    "specificity": (
        metrics.specificity(TABLE),
        [sk.recall_score(c != TRUTH, c != GUESS) for c in range(4)],
    ),
    "f1": (metrics.f1(TABLE), sk.f1_score(TRUTH, GUESS, average=None)),
    "balanced_accuracy": (
        metrics.balanced_accuracy(TABLE),
        sk.balanced_accuracy_score(TRUTH, GUESS),
    ),
    "macro_f1": (metrics.macro_f1(TABLE), sk.f1_score(TRUTH, GUESS, average="macro")),
    "mcc": (metrics.mcc(TABLE), sk.matthews_corrcoef(TRUTH, GUESS)),
    "over_present": (
        metrics.over_present(np.array([0.25, np.nan, 0.75])),
        np.nanmean([0.25, np.nan, 0.75]),
    ),
    "weighted_mean": (
        metrics.weighted_mean(SCORES, np.stack([BINARY, GUESS]).astype(float)),
        [np.average(SCORES, weights=w) for w in (BINARY, GUESS)],
    ),
    "weighted_median": (
        metrics.weighted_median(SCORES, np.stack([BINARY, GUESS]).astype(float)),
        [np.median(np.repeat(SCORES, w)) for w in (BINARY, GUESS)],
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_a_metric_equals_scikit_learn_to_1e_12(name):
    ours, theirs = EQUAL[name]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_metric_is_left_out_of_the_comparison():
    own = ast.parse(pathlib.Path(metrics.__file__).read_text())
    public = {n.name for n in own.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"}
    assert public <= {*EQUAL}


def test_what_protocols_report_equals_scikit_learn_to_1e_12():
    found = classify.single_label_scores(LABELS4, SCORES4, "abcd", resamples=0).numbers
    guess = SCORES4.argmax(1)
    expected = {
        "weighted_f1": sk.f1_score(TRUTH, guess, average="weighted"),
        "macro_auroc": np.mean([sk.roc_auc_score(c == TRUTH, SCORES4[:, c]) for c in range(4)]),
        "macro_auprc": sk.average_precision_score(LABELS4, SCORES4, average="macro"),
        "hard_auprc": np.mean(
            [sk.average_precision_score(c == TRUTH, guess == c) for c in range(4)]
        ),
    }
    standard = scipy.stats.zscore(SCORES4, axis=0)
    expected["accuracy_zscore"] = sk.accuracy_score(TRUTH, standard.argmax(1))
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, rel=1e-12), name
    found = classify.multi_label_scores(LABELS4, SCORES4, "abcd", resamples=0).numbers
    value = sk.roc_auc_score(LABELS4, SCORES4, average="macro")
    assert found["macro_auroc"]["value"] == pytest.approx(value, rel=1e-12)


def test_chance_of_a_hit_is_the_hypergeometric_tail():
    side = retrieval.Side(np.eye(9), np.array([0] * 4 + [1] * 5), np.zeros(9), np.zeros(9))
    found = retrieval.chance_levels(side, side, ks=(1, 3))
    for k in (1, 3):
        tail = [scipy.stats.hypergeom(9, n, k).sf(0) for n in (4, 5)]
        expected = (4 * tail[0] + 5 * tail[1]) / 9
        assert found[f"R@{k}"] == pytest.approx(expected, rel=1e-12)


def test_delongs_area_is_the_mann_whitney_statistic():
    wins = scipy.stats.mannwhitneyu(SCORES[BINARY == 1], SCORES[BINARY == 0]).statistic
    pairs = BINARY.sum() * (1 - BINARY).sum()
    found = statistics.delong(BINARY, SCORES).auroc[0]
    assert found == pytest.approx(wins / pairs, rel=1e-12)
