"""What two corpora share: by origin, by id and by picture."""

import layout_writers as layouts
import numpy as np
import pytest
from PIL import Image

from medvlp_jax import cli
from medvlp_jax.data import corpora, leakage


@pytest.mark.parametrize(
    ("trained", "tested", "common"),
    [
        ("nih_cxr14", "rsna_pneumonia:gloria", "NIH ChestX-ray14"),
        ("rsna_pneumonia", "nih_cxr14", "NIH ChestX-ray14"),
        ("mimic_cxr:frontal", "ms_cxr", "MIMIC-CXR"),
        ("covidx", "rsna_pneumonia", "NIH ChestX-ray14"),
        ("chexpert_plus", "chexpert:5x200", "CheXpert"),
        ("chexpert:frontal", "chexpert:5x200", "CheXpert"),
        ("vindr_cxr", "vinbigdata", "VinDr-CXR"),
        ("ham10000", "isic2018", "HAM10000"),
    ],
)
def test_known_overlaps_are_said(trained, tested, common):
    assert f"{tested} shares images or patients" in leakage.warning(["openi", trained], tested)
    assert f"{trained} ({common})" in leakage.warning([trained], tested)


def test_unrelated_corpora_and_the_own_splits_are_no_leak():
    assert leakage.warning(["mimic_cxr", "padchest"], "nih_cxr14") == ""
    assert leakage.warning(["nih_cxr14"], "nih_cxr14") == ""
    assert leakage.warning(["unheard_of"], "another") == ""
    assert leakage.warning(["nih_cxr14:official"], "nih_cxr14:official-512") == ""
    assert leakage.warning(["chexpert:train_without_5x200-256"], "chexpert:5x200") == ""
    assert leakage.warning(["csv_folder:ours"], "csv_folder:theirs") == ""


@pytest.fixture
def prepared(tmp_path):
    """NIH and RSNA, which holds NIH's first image at another size, and an unrelated third."""
    nih, rsna = tmp_path / "nih", tmp_path / "rsna"
    layouts.nih_cxr14(nih)
    layouts.rsna_pneumonia(rsna)
    smooth = np.random.default_rng(7).integers(0, 256, (9, 12), dtype=np.uint8)
    picture = Image.fromarray(smooth).resize((480, 360), Image.Resampling.BICUBIC)
    picture.save(nih / "images_001/images/00000001_000.png")
    small = np.asarray(picture.resize((240, 180), Image.Resampling.LANCZOS))
    layouts.write_dicom(rsna / "stage_2_train_images/id01.dcm", small, bits=8)
    data_dir = tmp_path / "data"
    for name, folder in (("nih_cxr14", nih), ("rsna_pneumonia", rsna)):
        corpora.prepare(name, data_dir=data_dir, manual_dir=folder)
    return data_dir


def test_a_renamed_copy_is_found_by_its_picture(prepared, capsys):
    command = ["data", "leakage", "nih_cxr14", "rsna_pneumonia", "--data-dir", str(prepared)]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "rsna_pneumonia shares images or patients" in out
    assert "Their records share nothing." in out  # the names differ
    assert cli.main([*command, "--images"]) == 0
    out = capsys.readouterr().out
    assert out.count("shares with") == 1
    assert "1 alike" in out


def test_the_same_corpus_shares_its_patients_with_itself(prepared, capsys):
    names = ["nih_cxr14:official", "nih_cxr14:by_patient"]
    sources = corpora.open_all("nih_cxr14", data_dir=prepared)
    shared = leakage.measure(sources[0], sources[0])
    assert (shared.images, shared.patients) == (len(sources[0]), len(sources[0]))
    assert leakage.table(sources, sources) == []
    assert names[0] in leakage.warning(names[:1], names[1])
