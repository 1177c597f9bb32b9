import io

import numpy as np
import pytest
from PIL import Image

from medvlp_jax.config import UserError
from medvlp_jax.data import corpora
from medvlp_jax.data.datasets.cxr_pairs import cxr_pairs_dataset_builder as cxr_pairs


def entries(folder, data_dir, config):
    source = corpora.open_source(
        "cxr_pairs", "train", data_dir=data_dir, manual_dir=folder, builder_config=config
    )
    return {entry["image_id"]: entry for entry in map(source.__getitem__, range(len(source)))}


def labels(label):
    return dict(zip(cxr_pairs.FINDINGS, cxr_pairs.finding_labels(label).tolist(), strict=True))


def test_a_path_implies_its_ancestors_and_excludes_the_rest():
    found = labels("Pneumonia/Viral/COVID-19;ARDS")
    assert {name for name, value in found.items() if value == 1} == {
        "ARDS",
        "Pneumonia",
        "Pneumonia/Viral",
        "Pneumonia/Viral/COVID-19",
    }
    assert set(found.values()) == {0, 1}


def test_a_path_that_stops_early_leaves_its_descendants_unknown():
    found = labels("Pneumonia/Viral")
    assert found["Pneumonia/Viral/COVID-19"] == -1
    assert found["Pneumonia/Bacterial"] == found["No Finding"] == 0


def test_a_cause_outside_the_list_counts_as_its_ancestor():
    found = labels("Pneumonia/Lipoid")
    assert found["Pneumonia"] == 1
    assert found["Pneumonia/Viral"] == 0


def test_no_label_is_unknown():
    assert set(labels("").values()) == {-1}


def test_sections_are_used_where_the_source_has_them(cxr_folder, tmp_path):
    found = entries(cxr_folder, tmp_path / "d", "pairs")
    assert found.keys() == {"cxr0", "cxr1"}
    assert (found["cxr0"]["findings"], found["cxr0"]["impression"]) == ("Clear lungs.", "Normal.")
    assert (found["cxr1"]["findings"], found["cxr1"]["impression"]) == ("A note.", "")


def test_images_without_text_are_in_the_images_variant(cxr_folder, tmp_path):
    found = entries(cxr_folder, tmp_path / "d", "images")
    assert (found["cxr2"]["findings"], found["cxr2"]["impression"]) == ("", "")


def test_boxes_are_fractions_and_name_the_lung(cxr_folder, tmp_path):
    found = entries(cxr_folder, tmp_path / "d", "pairs")
    assert found["cxr0"]["boxes"]["phrase"] == ["right lung", "left lung"]
    np.testing.assert_allclose(
        found["cxr0"]["boxes"]["bbox"], [[0.25, 0.0625, 0.5, 0.375], [0, 0.5, 1, 1]]
    )
    assert found["cxr1"]["boxes"]["bbox"].shape == (0, 4)


def test_mask_is_a_bit_field_of_the_lung(cxr_folder, tmp_path):
    found = entries(cxr_folder, tmp_path / "d", "pairs")
    mask = np.asarray(Image.open(io.BytesIO(found["cxr0"]["mask"])))
    assert mask.sum() == 10 * 25
    assert set(np.unique(mask)) == {0, 1}
    assert Image.open(io.BytesIO(found["cxr1"]["mask"])).size == (1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        ("{", "cannot be read"),
        ("[" * 5000, r"cannot be read \(RecursionError: maximum recursion depth"),
        ("{}", r"cannot be read \(KeyError: 'categories'\)"),
    ],
)
def test_a_defect_in_the_boxes_names_the_file(cxr_folder, content, message):
    path = cxr_folder / "lung_boxes.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=rf"lung_boxes\.json.*{message}"):
        corpora.check("cxr_pairs", manual_dir=cxr_folder)


def test_boxes_in_another_encoding_are_not_printed(cxr_folder):
    (cxr_folder / "lung_boxes.json").write_bytes(b'{"name": "Mustermann", "\xff": 1}')
    with pytest.raises(UserError, match=r"\(UnicodeDecodeError: 'utf-8' codec") as raised:
        corpora.check("cxr_pairs", manual_dir=cxr_folder)
    assert "Mustermann" not in str(raised.value)


def test_a_missing_mask_names_the_row(cxr_folder):
    (cxr_folder / "lung_masks/cxr0.png").unlink()
    with pytest.raises(UserError, match=r"row 2: image .*cxr0\.png is missing"):
        corpora.check("cxr_pairs", manual_dir=cxr_folder)


@pytest.mark.parametrize("column", ["file", "image_id"])
def test_a_path_out_of_the_folder_is_refused(cxr_folder, edit_table, column):
    edit_table(cxr_folder / "pairs.csv", has_lung_mask="1", **{column: "../../elsewhere.jpg"})
    with pytest.raises(UserError, match=f"row 2: {column} '../../elsewhere.jpg' is outside"):
        corpora.check("cxr_pairs", manual_dir=cxr_folder)


def test_an_unknown_variant_names_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"no builder config 'image'.*images"):
        corpora.builder("cxr_pairs", data_dir=tmp_path, builder_config="image")


def test_real_data_has_the_published_counts_and_splits(test_data):
    counts = corpora.check("cxr_pairs", manual_dir=test_data / "cxr_pairs")
    assert {split: c["records"] for split, c in counts.items()} == {"train": 142, "validation": 43}
    assert {split: c["findings"] for split, c in counts.items()} == {"train": 142, "validation": 43}
    assert sum(c["impression"] for c in counts.values()) == 32
    assert {split: c["boxes"] for split, c in counts.items()} == {"train": 284, "validation": 86}


def test_real_data_keeps_patients_on_one_side(test_data, tmp_path):
    patients = {}
    for split in ("train", "validation"):
        source = corpora.open_source(
            "cxr_pairs", split, data_dir=tmp_path, manual_dir=test_data / "cxr_pairs"
        )
        patients[split] = {source[i]["patient_id"] for i in range(len(source))}
    assert not patients["train"] & patients["validation"]
