import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from medvlp_jax.data import records

TASKS = {"finding": ["a", "b", "c"], "view": ["pa", "ap"]}
TABLE = {"age": {"unit": "years"}, "sex": {"categories": ["f", "m"]}}


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 6), 90, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_text_id_is_equal_exactly_where_both_sections_are():
    ids = {
        records.text_id(*pair)
        for pair in [("a", "b"), ("a b", ""), ("a", " b"), ("", "ab"), ("b", "a"), ("", "")]
    }
    assert len(ids) == 6
    assert records.text_id("a", "b") == records.text_id("a", "b")
    assert len(records.text_id("a", "b")) == 16


def test_one_hot_of_an_empty_name_is_unknown():
    np.testing.assert_array_equal(records.one_hot("b", TASKS["finding"]), [0, 1, 0])
    np.testing.assert_array_equal(records.one_hot("", TASKS["finding"]), [-1, -1, -1])


def test_empty_mask_decodes_to_one_zero_pixel():
    mask = np.asarray(Image.open(io.BytesIO(records.empty_mask())))
    np.testing.assert_array_equal(mask, [[0]])


def test_mask_bits_survive_encoding():
    bits = np.arange(256, dtype=np.uint8).reshape(16, 16)
    decoded = np.asarray(Image.open(io.BytesIO(records.encode_mask(bits))))
    np.testing.assert_array_equal(decoded, bits)


def test_parse_equals_the_reader_of_tfds():
    features = records.features(tasks=TASKS, table=TABLE)
    info = records.metadata(tasks=TASKS, table=TABLE)
    entry = records.record(
        image=jpeg(),
        image_id="i",
        patient_id="p",
        study_id="s",
        findings="Größe 3 µm",
        labels={"finding": np.array([1, 0, -1], np.int8), "view": records.unknown(TASKS["view"])},
        boxes=[((0, 0.25, 0.5, 1), "right lung"), ((0.1, 0, 1, 1), "left lung")],
        table={"age": 61.5, "sex": np.nan},
    )
    serialised = features.serialize_example(features.encode_example(entry))
    skip = tfds.decode.SkipDecoding()
    theirs = features.deserialize_example_np(serialised, decoders={"image": skip, "mask": skip})
    ours = records.parse(serialised, info)
    assert ours.keys() == theirs.keys()
    for key in records.TEXT_KEYS:
        assert ours[key] == theirs[key].decode()
    assert (ours["image"], ours["mask"]) == (theirs["image"], theirs["mask"])
    np.testing.assert_array_equal(ours["boxes"]["bbox"], theirs["boxes"]["bbox"])
    assert ours["boxes"]["phrase"] == ["right lung", "left lung"]
    for task in TASKS:
        np.testing.assert_array_equal(ours["labels"][task], theirs["labels"][task])
        assert ours["labels"][task].dtype == np.int8
    np.testing.assert_equal(ours["table"], {"age": 61.5, "sex": np.nan})


def test_keys_without_content_are_left_out():
    assert "labels" not in records.features(tasks={})
    assert "table" not in records.features(tasks={})
