"""Hashes change with what they name and with nothing else; a commit is of this code or of none."""

import json
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax.evaluation import provenance


def test_rows_are_counted_and_hashed_in_any_order_and_no_id_is_written():
    images, patients = ["a1", "a2", "b1"], ["anna", "anna", "bert"]
    found = provenance.rows(images, patients)
    assert (found["rows"], found["patients"]) == (3, 2)
    assert found == provenance.rows(images[::-1], patients[::-1])
    assert found["hash"] != provenance.rows(images, ["anna", "bert", "bert"])["hash"]
    assert found["hash"] != provenance.rows(images[:2], patients[:2])["hash"]
    assert "anna" not in json.dumps(found)


def test_labels_and_boxes_have_hashes_of_their_own_beside_that_of_the_rows():
    images, patients = ["a1", "a2", "b1"], ["anna", "anna", "bert"]
    labels = np.array([[1, 0], [0, 0], [0, -1]], np.int8)
    plain = provenance.rows(images, patients)
    assert plain["hash"] == "ca0d6add2309331c"  # as in files from before labels were hashed
    found = provenance.rows(images, patients, {"finding": labels})
    assert {key: found[key] for key in plain} == plain
    assert found == provenance.rows(images[::-1], patients[::-1], {"finding": labels[::-1]})
    again = provenance.rows(images, patients, {"finding": labels.copy() * [1, 0]})
    assert again["hash"] == found["hash"]
    assert again["labels"]["finding"] != found["labels"]["finding"]

    places = np.random.default_rng(0).random((3, 1, 4))
    records = [
        {"image_id": image, "patient_id": patient, "boxes": {"bbox": bbox, "phrase": ["left lung"]}}
        for image, patient, bbox in zip(images, patients, places, strict=True)
    ]
    drawn = provenance.boxes(records)
    assert drawn == provenance.boxes(records[::-1]) != provenance.boxes(records[:2])
    records[0]["boxes"]["category"] = ["lung"]
    assert drawn != (named := provenance.boxes(records))
    records[0]["boxes"]["bbox"][0, 0] += 0.1
    assert named != provenance.boxes(records)
    assert provenance.boxes([]) != drawn


def test_a_config_read_from_json_has_the_hash_it_was_written_with():
    config = {"a": {"b": (1, 2)}, "c": 0.1}
    again = json.loads(json.dumps(config))
    assert provenance.config_hash(config) == provenance.config_hash(again)
    assert provenance.config_hash(config) != provenance.config_hash(config | {"c": 0.2})


def test_weights_are_told_apart_by_value_name_shape_and_precision():
    base = {"params": {"a": np.zeros((2, 3), np.float32), "b": np.ones(2, np.float32)}}
    others = [
        {"params": {"a": np.zeros((3, 2), np.float32), "b": np.ones(2, np.float32)}},
        {"params": {"c": np.zeros((2, 3), np.float32), "b": np.ones(2, np.float32)}},
        {"params": {"a": np.zeros((2, 3), np.float32), "b": np.float32([1, 1 + 2**-23])}},
        {"params": {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": np.ones(2, np.float32)}},
    ]
    hashes = {provenance.weights_hash(tree) for tree in (base, *others)}
    assert len(hashes) == 5
    turned = {"params": {"b": jnp.ones(2), "a": np.zeros((3, 2), np.float32).T}}
    assert provenance.weights_hash(turned) == provenance.weights_hash(base)


@pytest.fixture
def checkout(tmp_path):
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    (package / "code.py").write_text("a = 1\n")
    git = ["git", "-C", str(package.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    return package


def test_a_checkout_has_its_commit_and_whether_it_was_changed(checkout):
    found = provenance.code(checkout)
    assert len(found["commit"]) == 40
    assert found["dirty"] is False
    (checkout / "code.py").write_text("a = 2\n")
    assert provenance.code(checkout) == found | {"dirty": True}


def test_a_package_inside_somebody_elses_checkout_has_no_commit(checkout):
    inside = checkout / ".venv" / "package"
    inside.mkdir(parents=True)
    for folder in (inside, checkout.parents[1]):
        found = provenance.code(folder)
        assert (found["commit"], found["dirty"]) == (None, None)
