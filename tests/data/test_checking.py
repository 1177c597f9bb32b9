"""`medvlp data check` on source folders with every kind of defect, and the speed it promises."""

import hashlib
import json
import time

import layout_writers as layouts
import pytest

from medvlp_jax import cli
from medvlp_jax.data import checking, corpora, images


@pytest.fixture
def folder(tmp_path):
    layouts.object_cxr(tmp_path)
    return tmp_path


def inspect(folder, name="object_cxr", **options):
    corpus, source = corpora.with_source(name, manual_dir=folder)
    return checking.inspect(corpus, source, **options)


def test_a_whole_folder_is_counted_and_hashed(folder, capsys):
    assert cli.main(["data", "check", "object_cxr", "--manual-dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "train: 2 images, 2 studies, 2 patients, 3 boxes, hash " in out
    digest = hashlib.sha256((folder / "dev.csv").read_bytes()).hexdigest()
    assert f"dev.csv: sha256 {digest[:16]}\n" in out
    assert "published: 8,000 train, 1,000 validation, 1,000 test" in out
    ids = "train/00001.jpg\ntrain/00002.jpg"
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] in out


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-80])


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b""), "empty"),
        (cut_off, "cut off: a JPEG without its end marker"),
        (lambda path: path.write_text("<html>"), "neither JPEG, PNG nor DICOM"),
    ],
)
def test_unusable_images_are_named_all_at_once(folder, capsys, tmp_path, damage, what):
    for name in ("train/00002.jpg", "test/09001.jpg"):
        damage(folder / name)
    found = inspect(folder)
    assert [p.image_id for p in found.problems] == ["train/00002.jpg", "test/09001.jpg"]
    skip_list = tmp_path / "skip_list.csv"
    command = ["data", "check", "object_cxr", "--manual-dir", str(folder)]
    assert cli.main([*command, "--write-skip-list", str(skip_list)]) == 2
    shown = capsys.readouterr()
    assert f"train.csv row 3: image train/00002.jpg is {what}" in shown.out
    assert "2 images of" in shown.err
    # The list was written into the source folder: the same images are now left out by name.
    report = tmp_path / "found.json"
    assert cli.main([*command, "--json", str(report)]) == 0
    assert "left out: 2 rows: skip list skip_list.csv" in capsys.readouterr().out
    assert json.loads(report.read_text())["problems"] == []


def test_a_dicom_cut_in_half_is_found_by_its_length(tmp_path):
    layouts.rsna_pneumonia(tmp_path)
    path = tmp_path / "stage_2_train_images/id01.dcm"
    assert inspect(tmp_path, "rsna_pneumonia").problems == []
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (problem,) = inspect(tmp_path, "rsna_pneumonia").problems
    assert "cut off: a DICOM, in its pixels" in problem.what


def test_damage_inside_an_image_is_found_by_decoding(folder):
    path = folder / "train/00001.jpg"
    content = bytearray(path.read_bytes())
    content[2:160] = bytes(158)  # the tables a decoder needs
    path.write_bytes(bytes(content))
    assert inspect(folder).problems == []
    (problem,) = inspect(folder, decode=True).problems
    assert "cannot be decoded" in problem.what


def test_hashes_are_compared_with_those_of_the_source(folder):
    digest = hashlib.sha256((folder / "dev.csv").read_bytes()).hexdigest()
    (folder / "SHA256SUMS.txt").write_text(f"{digest} dev.csv\n{'0' * 64} test.csv\n")
    tables = inspect(folder).tables
    assert [tables[f"{name}.csv"][1] for name in ("dev", "test", "train")] == [True, False, None]


def test_a_table_with_a_defect_is_refused(folder, capsys):
    (folder / "dev.csv").write_text("image,annotation\n")
    assert cli.main(["data", "check", "object_cxr", "--manual-dir", str(folder)]) == 2
    assert "dev.csv row 1: this is no known header" in capsys.readouterr().err


@pytest.mark.slow
def test_377_thousand_images_take_minutes(tmp_path, capsys):
    """20,000 files here; what one takes of a core, times 377,110, has to stay under ten minutes.

    Of a core, because other programs may hold the machine.
    """
    layouts.image(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    lines = []
    (tmp_path / "train").mkdir()
    for k in range(20_000):
        (tmp_path / f"train/{k}.jpg").write_bytes(content)
        lines.append(f"{k}.jpg,")
    layouts.table(tmp_path / "train.csv", "image_name,annotation", *lines)
    layouts.table(tmp_path / "dev.csv", "image_name,annotation")
    layouts.table(tmp_path / "test.csv", "image_path,annotation")
    start, wall = time.process_time(), time.perf_counter()
    assert not inspect(tmp_path).problems
    each = (time.process_time() - start) / 20_000
    waited = (time.perf_counter() - wall) / 20_000
    with capsys.disabled():
        for what, seconds in (("of a core", each), ("as it went", waited)):
            minutes = seconds * 377_110 / 60
            print(f"\n{what}: {seconds * 1e6:.0f} us an image, {minutes:.1f} minutes for 377,110")
    assert each * 377_110 < 600


def test_a_look_at_both_ends_knows_the_formats(tmp_path):
    for name in ("a.jpg", "a.png", "a.dcm"):
        layouts.image(tmp_path / name)
        assert images.looks_whole(tmp_path / name) == ""
    (tmp_path / "a.dcm").rename(tmp_path / "b.png")
    assert images.looks_whole(tmp_path / "b.png") == "a DICOM file by another name"
    cut_off(tmp_path / "a.png")
    assert images.looks_whole(tmp_path / "a.png") == "cut off: a PNG without its last chunk"
