import json
import os
import pickle
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from medvlp_jax import cli
from medvlp_jax.config import UserError
from medvlp_jax.data import corpora
from medvlp_jax.data.datasets.radiology_qa import radiology_qa_dataset_builder as radiology_qa


@pytest.fixture(autouse=True)
def no_defaults(monkeypatch):
    monkeypatch.delenv("MEDVLP_TEST_DATA", raising=False)


def prepared(tmp_path):
    return tmp_path / "data/radiology_qa/1.0.0"


def test_a_source_gives_random_access_from_several_threads(radiology_source):
    assert len(radiology_source) == 8
    with ThreadPoolExecutor(4) as pool:
        ids = [e["image_id"] for e in pool.map(radiology_source.__getitem__, list(range(8)) * 20)]
    assert ids == ids[:8] * 20
    assert sorted(ids[:8]) == [f"syn{i}" for i in range(8)]


def test_a_source_survives_pickling(radiology_source):
    copy = pickle.loads(pickle.dumps(radiology_source))
    assert copy[3]["image"] == radiology_source[3]["image"]


def test_images_come_out_as_the_bytes_that_went_in(radiology_source, radiology_folder):
    entry = radiology_source[0]
    path = radiology_folder / f"images/{entry['image_id']}.jpg"
    assert entry["image"] == path.read_bytes()


def test_texts_are_those_of_the_records_in_order(radiology_source):
    expected = [
        (e["findings"], e["impression"]) for e in map(radiology_source.__getitem__, range(8))
    ]
    assert radiology_source.texts() == expected
    assert radiology_source.texts() is radiology_source.texts()


def test_the_order_of_records_is_the_same_in_every_preparation(radiology_folder, tmp_path):
    ids = []
    for name in ("a", "b"):
        source = corpora.open_source(
            "radiology_qa", "train", data_dir=tmp_path / name, manual_dir=radiology_folder
        )
        ids.append([source[i]["image_id"] for i in range(8)])
    assert ids[0] == ids[1]


def test_an_unprepared_corpus_names_the_command(tmp_path):
    with pytest.raises(
        UserError,
        match=f"medvlp data prepare radiology_qa --manual-dir DIR --data-dir {tmp_path}`",
    ):
        corpora.open_source("radiology_qa", "train", data_dir=tmp_path)
    # The variant that was asked for, not the first.
    with pytest.raises(UserError, match="run `medvlp data prepare mimic_cxr:pairs --manual-dir"):
        corpora.open_source("mimic_cxr", "train", data_dir=tmp_path, builder_config="pairs")


def test_a_prepared_corpus_needs_no_source_folder(radiology_source, tmp_path):
    again = corpora.open_source("radiology_qa", "validation", data_dir=tmp_path / "data")
    assert len(again) == 4


def test_the_environment_names_default_folders(radiology_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDVLP_TEST_DATA", str(radiology_folder.parent))
    monkeypatch.setenv("MEDVLP_DATA_DIR", str(tmp_path / "elsewhere"))
    assert len(corpora.open_source("radiology_qa", "train")) == 8
    assert (tmp_path / "elsewhere/radiology_qa").is_dir()


def test_unknown_names_and_splits_suggest_known_ones(radiology_source, tmp_path):
    with pytest.raises(UserError, match=r"No corpus 'radiology'\. Did you mean radiology_qa"):
        corpora.open_source("radiology", "train", data_dir=tmp_path)
    with pytest.raises(UserError, match=r"no split 'valid'\. Did you mean validation"):
        corpora.open_source("radiology_qa", "valid", data_dir=tmp_path / "data")


def test_a_missing_source_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is missing or empty; radiology_qa needs"):
        corpora.prepare("radiology_qa", data_dir=tmp_path, manual_dir=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ({"drop": "organ"}, r"pairs\.csv row 1: no column organ; it has image_id, "),
        ({"row": 4, "image_id": "syn1"}, r"row 6: image_id 'syn1' is also in row 3"),
        ({"row": 4, "group_id": " "}, r"row 6: group_id is empty; every row needs a text"),
        ({"row": 4, "file": "no.jpg"}, r"row 6: image .*no\.jpg is missing; a JPEG file"),
    ],
)
def test_a_defect_in_the_table_names_file_and_row(
    radiology_folder, tmp_path, edit_table, defect, message
):
    edit_table(radiology_folder / "pairs.csv", **defect)
    for run in (corpora.check, corpora.prepare):
        options = {"data_dir": tmp_path / "data"} if run is corpora.prepare else {}
        with pytest.raises(UserError, match=message):
            run("radiology_qa", manual_dir=radiology_folder, **options)
    assert not prepared(tmp_path).exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_png(path, format="PNG"):
    with Image.open(path) as image:
        pixels = image.copy()
    pixels.save(path, format)


def replace_by_tiff(path):
    replace_by_png(path, "TIFF")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be decoded .*; a whole JPEG file is needed"),
        (lambda path: path.write_text("no image"), "cannot be decoded"),
        (replace_by_png, "is PNG; a JPEG file is needed"),
        (replace_by_tiff, "cannot be decoded .*; a whole JPEG file is needed"),
    ],
)
def test_a_corrupt_image_names_file_and_row(radiology_folder, tmp_path, damage, message):
    damage(radiology_folder / "images/syn5.jpg")
    with pytest.raises(UserError, match=rf"pairs\.csv row 7: image .*syn5\.jpg {message}"):
        corpora.prepare("radiology_qa", data_dir=tmp_path / "data", manual_dir=radiology_folder)
    assert not prepared(tmp_path).exists()


def test_an_image_too_large_for_memory_names_file_and_row(radiology_folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice that
    with pytest.raises(UserError, match=r"row 2: image .*syn0\.jpg cannot be decoded \(Image size"):
        corpora.check("radiology_qa", manual_dir=radiology_folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("p17,a.jpg,Clear", r"no column image_id, .*; it has 3 others\."),
        ("image_id,file,Edema: none", "; it has image_id, file and 1 other"),
        (f"image_id,{'x' * 41},file", "; it has image_id, file and 1 other"),
    ],
)
def test_a_row_that_is_no_header_is_not_printed(radiology_folder, header, message):
    (radiology_folder / "pairs.csv").write_text(f"{header}\n")
    with pytest.raises(UserError, match=message):
        corpora.check("radiology_qa", manual_dir=radiology_folder)


def test_a_missing_table_is_named(radiology_folder):
    (radiology_folder / "pairs.csv").unlink()
    with pytest.raises(UserError, match=r"pairs\.csv is missing; a CSV file with the columns"):
        corpora.check("radiology_qa", manual_dir=radiology_folder)


def test_a_table_in_another_encoding_is_named(radiology_folder):
    table = radiology_folder / "pairs.csv"
    table.write_bytes(table.read_text().replace("lesion", "läsion").encode("latin-1"))
    with pytest.raises(UserError, match=r"pairs\.csv cannot be read .*; a UTF-8 CSV file"):
        corpora.check("radiology_qa", manual_dir=radiology_folder)


def test_an_interrupted_preparation_leaves_no_corpus(radiology_folder, tmp_path, monkeypatch):
    def stop(folder, row):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(radiology_qa, "to_record", stop)
        with pytest.raises(KeyboardInterrupt):
            corpora.prepare("radiology_qa", data_dir=tmp_path / "data", manual_dir=radiology_folder)
    assert not prepared(tmp_path).exists()
    with pytest.raises(UserError, match="is not prepared"):
        corpora.open_source("radiology_qa", "train", data_dir=tmp_path / "data")


def test_a_killed_preparation_leaves_no_corpus_and_can_be_repeated(radiology_folder, tmp_path):
    code = """if True:
        import os, signal, sys
        from medvlp_jax.data import corpora
        from medvlp_jax.data.datasets.radiology_qa import radiology_qa_dataset_builder as module
        whole = module.to_record
        def to_record(folder, row):
            if row.number == 12:  # in the second split, the first is written
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(folder, row)
        module.to_record = to_record
        corpora.prepare("radiology_qa", data_dir=sys.argv[1], manual_dir=sys.argv[2])
    """
    data_dir = tmp_path / "data"
    arguments = [sys.executable, "-c", code, str(data_dir), str(radiology_folder)]
    killed = subprocess.run(arguments, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert any(data_dir.rglob("*.array_record*"))
    with pytest.raises(UserError, match="is not prepared"):
        corpora.open_source("radiology_qa", "train", data_dir=data_dir)
    source = corpora.open_source(
        "radiology_qa", "train", data_dir=data_dir, manual_dir=radiology_folder
    )
    assert len(source) == 8
    assert not any(data_dir.rglob("incomplete*"))


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 100)])
def test_damaged_records_are_refused(radiology_source, tmp_path, damage):
    (shard,) = prepared(tmp_path).glob("*-train.array_record*")
    damage(shard)
    with pytest.raises(UserError, match=r"is damaged: not all 8 records of train .*; delete that"):
        corpora.open_source("radiology_qa", "train", data_dir=tmp_path / "data")


def test_a_folder_without_its_description_is_not_a_corpus(
    radiology_source, radiology_folder, tmp_path
):
    (prepared(tmp_path) / "dataset_info.json").unlink()
    options = {"data_dir": tmp_path / "data"}
    with pytest.raises(UserError, match="is not prepared"):
        corpora.open_source("radiology_qa", "train", **options)
    with pytest.raises(UserError, match=r"1\.0\.0 is damaged: its description is missing; delete"):
        corpora.open_source("radiology_qa", "train", manual_dir=radiology_folder, **options)


def test_two_processes_may_prepare_at_the_same_time(radiology_folder, tmp_path):
    code = (
        "import sys; from medvlp_jax.data import corpora;"
        "corpora.prepare('radiology_qa', data_dir=sys.argv[1], manual_dir=sys.argv[2])"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "data"), str(radiology_folder)]
    running = [subprocess.Popen(arguments) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert len(corpora.open_source("radiology_qa", "train", data_dir=tmp_path / "data")) == 8


def test_the_command_line_lists_checks_and_prepares(radiology_folder, tmp_path, capsys):
    data_dir = str(tmp_path / "data")
    assert cli.main(["data", "list", "--data-dir", data_dir]) == 0
    assert re.search("radiology_qa +from your files", capsys.readouterr().out)
    assert cli.main(["data", "check", "radiology_qa", "--manual-dir", str(radiology_folder)]) == 0
    assert "train: 8 records, 8 findings" in capsys.readouterr().out
    check = ["data", "check", "radiology_qa", "--manual-dir", str(radiology_folder)]
    assert cli.main([*check, "--json", str(tmp_path / "found.json")]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["splits"]["train"]["records"] == 8
    for flags in (["--json", str(tmp_path)], ["--write-skip-list", "skip.csv"]):
        assert cli.main([*check, *flags]) == 2
    assert "is a folder; name a file" in (said := capsys.readouterr().err)
    assert "radiology_qa has no skip list" in said
    prepare = ["data", "prepare", "radiology_qa", "--data-dir", data_dir]
    assert cli.main([*prepare, "--manual-dir", str(radiology_folder)]) == 0
    assert "train 8, validation 4 records" in capsys.readouterr().out
    assert cli.main(prepare) == 0


def test_the_command_line_takes_a_variant_after_a_colon(tmp_path, capsys):
    prepare = ["data", "prepare", "cxr_phantom:n3_seed8_64px", "--data-dir", str(tmp_path)]
    assert cli.main(prepare) == 0
    assert (tmp_path / "cxr_phantom/n3_seed8_64px/1.0.0/dataset_info.json").is_file()
    capsys.readouterr()
    assert cli.main([*prepare, "--builder-config", "tiny"]) == 2
    assert "the variants 'n3_seed8_64px' and 'tiny'" in capsys.readouterr().err


def test_who_reads_the_output_may_leave(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "medvlp_jax.cli", "data", "list", "--data-dir", str(tmp_path)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_command_line_answers_bad_input_with_one_sentence(tmp_path, capsys):
    assert cli.main(["data", "prepare", "radiology_qa", "--data-dir", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", "prepare"])
    assert stop.value.code == 2
