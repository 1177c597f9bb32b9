"""What two corpora share: by origin, by id and by picture."""

import json
import types

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
    assert leakage.warning(["padchest"], "padchest:frontal") == ""  # the variant of the bare name
    assert leakage.warning(["padchest:frontal-512"], "padchest") == ""
    assert leakage.warning(["cxr_phantom"], "cxr_phantom:tiny") != ""


def test_patients_in_two_splits_are_said_unless_the_splits_were_dealt_anew():
    source = types.SimpleNamespace(metadata={"torn_patients": 1234})
    assert leakage.torn_patients(source, dealt={}) == 1234
    assert leakage.torn_patients(source, dealt={"count": 5}) == 0
    assert leakage.torn_patients(types.SimpleNamespace(metadata={}), dealt={}) == 0
    assert leakage.torn("siim_acr", 0) == ""
    assert "1,234 patients of siim_acr are in more than one" in leakage.torn("siim_acr", 1234)


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


def own_folder(folder, patients, text):
    folder.mkdir()
    columns = {"image": "file", "group": "who", "findings": "seen", "split": "part"}
    (folder / "corpus.json").write_text(json.dumps({"columns": columns}))
    lines = ["file,who,seen,part"]
    for k, who in enumerate(patients):
        lines.append(f"{who}.png,{who},{text} {k}.,{'train' if k else 'test'}")
        layouts.image(folder / f"{who}.png")
    (folder / "table.csv").write_text("\n".join(lines))


def test_two_folders_of_one_s_own_may_hold_the_same_people(tmp_path, capsys):
    patients = {"mine": ["1", "2"], "yours": ["1", "3"], "others": ["8", "9"]}
    for name, people in patients.items():
        own_folder(tmp_path / name, people, f"Seen by {name}")
        where = {"data_dir": tmp_path / "data", "manual_dir": tmp_path / name}
        corpora.prepare("csv_folder", builder_config=name, **where)

    def said(tested):
        command = ["data", "leakage", "csv_folder:mine", f"csv_folder:{tested}"]
        assert cli.main([*command, "--data-dir", str(tmp_path / "data")]) == 0
        return capsys.readouterr().out

    assert (
        "csv_folder:yours test (1 records) shares with csv_folder:mine test: 1 images, 1 patients "
        "(by name: in two folders of your own the same ones, or chance)" in said("yours")
    )
    assert "Their records share nothing." in said("others")
    assert "chance" not in said("mine")


def test_where_patients_are_not_compared_that_is_said(prepared, tmp_path, capsys):
    own_folder(tmp_path / "own", ["1", "2"], "Seen")
    where = {"data_dir": prepared, "manual_dir": tmp_path / "own"}
    corpora.prepare("csv_folder", builder_config="own", **where)
    command = ["data", "leakage", "nih_cxr14", "csv_folder:own", "--data-dir", str(prepared)]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "share nothing" in out
    assert "Their texts share nothing." in out
    assert "Patients and names of images were not compared" in out
    assert "--images compares the pictures." in out


def test_the_same_corpus_shares_its_patients_with_itself(prepared, capsys):
    names = ["nih_cxr14:official", "nih_cxr14:by_patient"]
    sources = corpora.open_all("nih_cxr14", data_dir=prepared)
    shared = leakage.measure(sources[0], sources[0])
    assert (shared.images, shared.patients) == (len(sources[0]), len(sources[0]))
    assert leakage.table(sources, sources) == []
    assert names[0] in leakage.warning(names[:1], names[1])
