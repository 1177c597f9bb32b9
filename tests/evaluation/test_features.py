"""Extraction drops padding, keeps order; joint similarity is the mean over available sections."""

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import features


def batches(count=3, size=4):
    for i in range(count):
        rows = np.arange(i * size, (i + 1) * size)
        yield {
            "image": rows[:, None].astype(np.float32),
            "label/finding": np.stack([rows % 2, -(rows % 2)], 1).astype(np.int8),
            "text_id": rows.astype(np.int32),
            "patient_id": np.array([f"p{r // 2}" for r in rows]),
            "findings_valid": rows % 3 > 0,
            "valid": rows < 10,
        }


def embed(batch):
    return {"image": batch["image"] * 2, "logits": batch["image"]}


def test_padding_rows_are_dropped_and_order_is_kept():
    found = features.extract(embed, batches())
    np.testing.assert_array_equal(found["image"][:, 0], 2 * np.arange(10))
    np.testing.assert_array_equal(found["text_id"], np.arange(10))
    assert found["label/finding"].shape == (10, 2)
    assert found["patient_id"][9] == "p4"
    assert found["findings_valid"].dtype == bool
    assert "valid" not in found


def test_only_the_named_features_are_kept():
    found = features.extract(embed, batches(), keys=("logits",))
    assert "logits" in found
    assert "image" not in found
    with pytest.raises(UserError, match=r"no feature 'logit'.*logits"):
        features.extract(embed, batches(), keys=("logit",))


def test_texts_are_the_same_where_all_sections_that_are_read_are():
    found = {"text_id": np.array([9, 4, 7, 4]), "findings_id": np.array([1, 2, 3, 2])}
    found["impression_id"] = np.array([5, 5, 6, 5])
    ids = lambda *sections: features.text_ids(found, sections).tolist()
    assert ids("impression") == [9, 9, 7, 9]
    assert ids("findings") == ids("findings", "impression") == [9, 4, 7, 4]  # the text_id itself


def test_strings_are_kept_from_embed():
    def numbers_only(batch):
        assert "patient_id" not in batch
        assert "valid" not in batch
        return embed(batch)

    features.extract(numbers_only, batches())


def test_a_jitted_embed_is_accepted():
    import jax

    found = features.extract(jax.jit(embed), batches())
    assert isinstance(found["image"], np.ndarray)
    assert len(found["image"]) == 10


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="No examples"):
        features.extract(embed, batches(count=0))


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_joint_similarity_is_the_mean_cosine_over_the_sections_a_text_has():
    rng = np.random.default_rng(0)
    names = ("image", "image_findings", "text", "text_findings")
    f = {name: unit(rng, 3, 5) for name in names}
    valid = np.array([[True, True], [True, False], [False, True]])
    f["text_findings"][1] = np.nan  # a missing section may hold anything
    image = features.joint(f, names[:2])
    text = features.joint(f, names[2:], valid)
    for i in range(3):
        for j in range(3):
            cosines = [f["image"][i] @ f["text"][j], f["image_findings"][i] @ f["text_findings"][j]]
            expected = np.mean([c for c, ok in zip(cosines, valid[j], strict=True) if ok])
            assert image[i] @ text[j] == pytest.approx(expected, rel=1e-12)


def test_joint_of_one_key_is_the_embedding():
    x = unit(np.random.default_rng(0), 3, 5).astype(np.float32)
    np.testing.assert_array_equal(features.joint({"image": x}, "image"), x)
    assert features.joint({"image": x}, "image", np.ones((3, 1))).dtype == np.float32


def test_joint_row_without_sections_is_zero():
    x = unit(np.random.default_rng(0), 2, 5)
    found = features.joint({"text": x}, "text", [[True], [False]])
    np.testing.assert_array_equal(found[1], 0)


def test_joint_names_a_missing_key():
    with pytest.raises(UserError, match="No feature 'txt'"):
        features.joint({"text": np.ones((2, 3))}, "txt")


def test_the_eight_views_are_the_symmetries_of_a_square_and_probabilities_are_averaged():
    image = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    seen = []

    def embed(batch):
        seen.append(batch["image"])
        logits = np.array([[len(seen), 0.0], [0.0, 1.0]])
        return {"logits": logits, "pooled": batch["image"].reshape(2, -1)}

    out = features.averaged(embed, {"image": image}, ("image",), 8)
    expected = [np.rot90(x, k, (1, 2)) for x in (image, image[:, :, ::-1]) for k in range(4)]
    assert {x.tobytes() for x in seen} == {np.ascontiguousarray(x).tobytes() for x in expected}
    chance = np.mean([1 / (1 + np.exp(-k)) for k in range(1, 9)])
    np.testing.assert_allclose(np.exp(out["logits"][0]), [chance, 1 - chance], rtol=1e-6)
    np.testing.assert_array_equal(out["pooled"], image.reshape(2, -1))
    flips = []
    features.averaged(
        lambda b: embed(b) | {"seen": flips.append(b["image"])}, {"image": image}, ("image",), 4
    )
    np.testing.assert_array_equal(flips[3], image[:, ::-1, ::-1])
