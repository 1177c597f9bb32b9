"""Corpora of images and a table: the real headers are read, defects named, leakage left out."""

import csv
import dataclasses
import io
import json
import math
import pathlib

import numpy as np
import pytest
from PIL import Image
from test_dicom import write_dicom

from configs import common
from medvlp_jax import protocols, tables
from medvlp_jax.config import UserError
from medvlp_jax.data import building, corpora, files, records, tabular, volumes
from medvlp_jax.data.datasets.derm7pt import derm7pt_dataset_builder as derm7pt
from medvlp_jax.data.datasets.men_phantom import generate
from medvlp_jax.data.datasets.pad_ufes_20 import pad_ufes_20_dataset_builder as pad

EVALS = common.evals().to_dict()


def encoded(seed, format="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def write(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def entries(name, split, folder, tmp_path, variant=""):
    source = corpora.open_source(
        name, split, data_dir=tmp_path / "data", manual_dir=folder, builder_config=variant
    )
    return source, [source[i] for i in range(len(source))]


DIAGNOSES = (
    "clark nevus",
    "melanoma (less than 0.76 mm)",
    "seborrheic keratosis",
    "reed or spitz nevus",
    "melanoma metastasis",
    "basal cell carcinoma",
)


@pytest.fixture
def derm7pt_folder(tmp_path):
    folder = tmp_path / "release_v0"
    rows = []
    for i, diagnosis in enumerate(DIAGNOSES):
        rest = ["1", *["absent"] * 7, "medium", "flat", "head neck", "male", "excision"]
        row = [str(i + 1), diagnosis, *rest, f"NEL/Nel{i}.jpg", f"NEL/Ndl{i}.jpg", f"c{i}", ""]
        rows.append(row)
        for j, name in enumerate(row[15:17]):
            (folder / "images/NEL").mkdir(parents=True, exist_ok=True)
            (folder / "images" / name).write_bytes(encoded(10 * i + j))
    write(folder / "meta/meta.csv", derm7pt.HEADER, rows)
    for name, indexes in (("train", (0, 1, 2)), ("valid", (3,)), ("test", (4, 5))):
        write(folder / f"meta/{name}_indexes.csv", ["indexes"], [[i] for i in indexes])
    return folder


def test_derm7pt_keeps_nevi_and_melanomas_with_both_images(derm7pt_folder, tmp_path):
    source, found = entries("derm7pt", "train", derm7pt_folder, tmp_path)
    assert source.tasks["diagnosis"] == ["melanocytic nevus", "melanoma"]
    by_id = {entry["image_id"]: entry for entry in found}
    assert {k: v["labels"]["diagnosis"].tolist() for k, v in by_id.items()} == {
        "1": [1, 0],
        "2": [0, 1],
    }
    assert by_id["2"]["image"] == encoded(10)
    assert by_id["2"]["images"] == {"dermoscopy": encoded(11)}
    assert source.images == {"dermoscopy": {}}
    assert by_id["1"]["table"]["level_of_diagnostic_difficulty"] == 1
    seen = tabular.columns(source.metadata["table"])
    assert seen == ("level_of_diagnostic_difficulty", "elevation", "location", "sex")


def test_derm7pt_has_all_cases_in_five_groups(derm7pt_folder, tmp_path):
    counts = corpora.check("derm7pt", manual_dir=derm7pt_folder, builder_config="five")
    assert {k: v["records"] for k, v in counts.items()} == {"train": 3, "validation": 1, "test": 2}


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("meta/meta.csv", "clark nevus", "wart", "row 2: diagnosis is 'wart'; accepted are"),
        ("meta/meta.csv", "Ndl1", "Ndl9", r"row 3: image .*Ndl9.jpg is missing"),
        ("meta/meta.csv", "blue_whitish_veil", "veil", "row 1: no column blue_whitish_veil"),
        ("meta/valid_indexes.csv", "3", "6", "row 2: indexes is '6'; accepted are 0 to 5"),
        ("meta/valid_indexes.csv", "3", "0", "row 2: case 0 is in train too"),
    ],
)
def test_a_defect_of_derm7pt_is_named(derm7pt_folder, file, old, new, message):
    path = derm7pt_folder / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        corpora.check("derm7pt", manual_dir=derm7pt_folder)


@pytest.fixture
def pad_folder(tmp_path):
    folder = tmp_path / "pad"
    (folder / "images/imgs_part_2").mkdir(parents=True)
    rows = []
    for i in range(20):
        row = dict.fromkeys(pad.HEADER, "")
        row |= {"patient_id": f"PAT_{i // 2}", "lesion_id": str(i), "img_id": f"PAT_{i}.png"}
        row |= {"diagnostic": list(pad.DIAGNOSES)[i % 6], "age": "60", "itch": "UNK"}
        row |= {"grew": "True", "region": "NOSE", "biopsed": "True", "fitspatrick": "2.0"}
        rows.append([row[column] for column in pad.HEADER])
        (folder / f"images/imgs_part_2/PAT_{i}.png").write_bytes(encoded(i, "PNG"))
    write(folder / "metadata.csv", pad.HEADER, rows)
    return folder


def test_pad_ufes_20_splits_by_patient_and_says_what_is_missing(pad_folder, tmp_path):
    source, found = entries("pad_ufes_20", "train", pad_folder, tmp_path)
    held = {e["patient_id"] for e in found}
    assert 0 < len(held) < 10
    assert len(found) == 2 * len(held)
    table = found[0]["table"]
    assert table["itch"] == tabular.UNKNOWN
    assert math.isnan(table["smoke"])
    assert (table["grew"], table["fitspatrick"], table["region"]) == (1.0, 1.0, 13.0)
    assert "biopsed" not in tabular.columns(source.metadata["table"])


@pytest.mark.parametrize(("encoding", "width"), [("metablock", 81), ("metablock-active", 45)])
def test_pad_ufes_20_as_published_results_read_it(pad_folder, tmp_path, encoding, width):
    source, found = entries("pad_ufes_20", "train", pad_folder, tmp_path)
    settings = {"exclude": (), "leakage": (), "encoding": encoding}
    read = tables.rows_of({"corpora": ("pad_ufes_20",), "table": settings}, [source])
    table = found[0]["table"]
    row = read(table)
    assert row.shape == (1, width)
    # One column for each category that is known, "UNK" too; an empty cell has none.
    columns = json.loads(pathlib.Path(pad.__file__).with_name("metablock.json").read_text())
    names = columns["columns"] if encoding == "metablock" else columns["active"]
    numbers = {"age", "diameter_1", "diameter_2"} & {*names}
    told = [n for n in names if n not in numbers and not math.isnan(table[n])]
    assert (row == 1).sum() - sum(table[n] == 1 for n in numbers) == len(told)
    assert row.sum() == len(told) + sum(np.nan_to_num(table[n]) for n in numbers)
    start = 0
    for name in names:
        values = columns["columns"][name]
        part = row[0, start : start + max(len(values), 1)]
        start += len(part)
        if name in numbers:
            assert part[0] == np.nan_to_num(table[name])
        elif table[name] == tabular.UNKNOWN:
            assert part.tolist() == [float(v == "UNK") for v in values]
        elif math.isnan(table[name]):
            assert not part.any()
        else:
            categories = source.metadata["table"][name]["categories"]
            assert values[part.argmax()] == categories[int(table[name])]


def test_a_number_out_of_range_is_named(pad_folder):
    path = pad_folder / "metadata.csv"
    path.write_text(path.read_text().replace(",60,", ",600,", 1))
    with pytest.raises(UserError, match="row 2: age is 600; accepted are 0 to 120"):
        corpora.check("pad_ufes_20", manual_dir=pad_folder)


@pytest.fixture
def own_folder(tmp_path):
    folder = tmp_path / "own"
    (folder / "pictures").mkdir(parents=True)
    description = {
        "classes": ["benign", "malignant"],
        "columns": {"image": "file", "label": "dx", "group": "who", "id": "", "split": ""},
        "images": {"closeup": "near"},
    }
    (folder / "corpus.json").write_text(json.dumps(description))
    schema = {"age": {"kind": "numeric", "range": [0, 120]}}
    (folder / "table.json").write_text(json.dumps(schema))
    rows = []
    for i in range(30):
        for name, format in ((f"pictures/{i}.png", "PNG"), (f"pictures/{i}.jpg", "JPEG")):
            (folder / name).write_bytes(encoded(i, format))
        dx = "" if i == 29 else description["classes"][i % 2]
        rows.append([f"pictures/{i}.png", f"pictures/{i}.jpg", f"w{i // 3}", dx, 20 + i])
    write(folder / "table.csv", ["file", "near", "who", "dx", "age"], rows)
    return folder


def test_a_folder_of_ones_own_is_prepared_under_a_name_and_opened_without_its_source(
    own_folder, tmp_path
):
    source, found = entries("csv_folder", "train", own_folder, tmp_path, "lesions")
    assert source.tasks == {"label": ["benign", "malignant"]}
    assert source.folder.parts[-3:] == ("csv_folder", "lesions", "1.0.0")
    entry = next(e for e in found if e["image_id"] == "pictures/4.png")
    assert entry["image"] == encoded(4, "PNG")
    assert entry["images"]["closeup"] == encoded(4)
    assert entry["labels"]["label"].tolist() == [1, 0]
    again = corpora.open_source("csv_folder", "train", data_dir=tmp_path / "data",
                                builder_config="lesions")  # fmt: skip
    assert again.metadata == source.metadata
    assert again[0]["image_id"] == source[0]["image_id"]


def test_a_deep_image_is_stretched_and_not_cut_off_at_white(own_folder, tmp_path):
    ramp = np.tile(np.arange(0, 4096, 64, dtype=np.uint16), (64, 1))  # of 12 bits
    Image.fromarray(ramp).save(own_folder / "pictures/4.png")
    _, found = entries("csv_folder", "train", own_folder, tmp_path, "lesions")
    entry = next(e for e in found if e["image_id"] == "pictures/4.png")
    grey = np.asarray(Image.open(io.BytesIO(entry["image"])).convert("L")).astype(int)
    assert (np.diff(grey.mean(0)) > 0).mean() > 0.9


def test_a_deep_image_is_refused_where_a_corpus_has_none(pad_folder):
    path = next(pad_folder.rglob("*.png"))
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(path)
    with pytest.raises(UserError, match=f"{path.name} has more than 8 bits a channel"):
        corpora.check("pad_ufes_20", manual_dir=pad_folder)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("corpus.json", '"group"', '"grup"', "columns has no field 'grup'. Did you mean group"),
        ("corpus.json", ', "malignant"', "", "two or more different are needed"),
        ("corpus.json", '"closeup"', '"tabular"', "cannot be called 'tabular'"),
        ("table.csv", "benign", "bening", "row 2: dx is 'bening'; accepted are benign, malignant"),
        ("table.csv", "pictures/3.jpg", "../3.jpg", "row 5: near '../3.jpg' is outside"),
        ("table.csv", "pictures/3.jpg", "3.jpg", r"row 5: image .*3.jpg is missing"),
        ("table.json", "numeric", "number", "column 'age' has kind 'number'"),
    ],
)
def test_a_defect_of_ones_own_folder_is_named(own_folder, file, old, new, message):
    path = own_folder / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        corpora.check("csv_folder", manual_dir=own_folder)


@pytest.fixture
def own_reports(tmp_path):
    """Radiographs with reports as a user has them: 8 bits, 16 bits and DICOM."""
    folder = tmp_path / "reports"
    folder.mkdir()
    columns = {"image": "file", "group": "who", "study": "visit"}
    columns |= {"findings": "seen", "impression": "said"}
    description = {"columns": columns, "labels": {"finding": ["effusion", "edema"]}}
    description |= {"channels": 1, "side": 32}
    (folder / "corpus.json").write_text(json.dumps(description))
    rng, rows = np.random.default_rng(0), []
    for i in range(30):
        name = f"{i}{('.jpg', '.png', '.dcm')[i % 3]}"
        grey = rng.integers(0, 256, (40, 60), dtype=np.uint8)
        if i % 3 == 2:
            write_dicom(folder / name, grey, bits=8)
        else:
            Image.fromarray(grey if i % 3 else np.stack([grey] * 3, -1)).save(folder / name)
        label = (("1", "0"), ("", "-1"), ("0.0", "1.0"))[i % 3]
        rows.append(
            [name, f"w{i // 3}", f"v{i // 2}", f"Seen {i}.", "" if i == 4 else f"Said {i}."]
        )
        rows[-1] += label
    write(folder / "table.csv", ["file", "who", "visit", "seen", "said", "effusion", "edema"], rows)
    return folder


def all_entries(name, folder, tmp_path, variant):
    sources = corpora.open_all(
        name, data_dir=tmp_path / "data", manual_dir=folder, builder_config=variant
    )
    return {e["image_id"]: e for s in sources for e in (s[i] for i in range(len(s)))}, sources[0]


def test_reports_and_findings_of_ones_own_are_read_without_a_line_of_python(own_reports, tmp_path):
    found, source = all_entries("csv_folder", own_reports, tmp_path, "mine-2024")
    assert len(found) == 30
    assert source.tasks == {"finding": ["effusion", "edema"]}
    assert source.metadata["table"] == {}
    entry = found["4.png"]
    assert (entry["findings"], entry["impression"]) == ("Seen 4.", "")
    assert (entry["patient_id"], entry["study_id"]) == ("w1", "v2")
    assert found["3.jpg"]["labels"]["finding"].tolist() == [1, 0]
    assert found["4.png"]["labels"]["finding"].tolist() == [records.UNKNOWN] * 2
    assert found["5.dcm"]["labels"]["finding"].tolist() == [0, 1]
    for entry in found.values():
        with Image.open(io.BytesIO(entry["image"])) as image:
            assert (image.size, image.mode, image.format) == ((48, 32), "L", "JPEG")


def test_prompts_of_ones_own_are_kept_with_the_records_else_the_classes_names(
    own_reports, tmp_path
):
    _, source = all_entries("csv_folder", own_reports, tmp_path, "named")
    resolved = protocols.read_prompts(EVALS, "csv_folder:named", source)
    sides = {"positive": ["edema"], "negative": ["no edema"]}
    assert resolved["tasks"]["finding"]["classes"]["edema"] == sides
    classes = {
        name: {"positive": [f"{name}!"], "negative": ["clear"]} for name in ("effusion", "edema")
    }
    spec = {"section": "findings", "multi_label": True, "classes": classes}
    own = {"version": "mine", "tasks": {"finding": spec}}
    (own_reports / "prompts.json").write_text(json.dumps(own))
    _, source = all_entries("csv_folder", own_reports, tmp_path, "told")
    assert protocols.read_prompts(EVALS, "csv_folder:told", source) == own
    # Earlier versions prepared whatever prompts.json held.
    metadata = {**source.metadata, "prompts": {"version": "mine", "tasks": {"finding": 1}}}
    with pytest.raises(
        UserError, match=r'prompts.json of csv_folder:told, .* prepared: task .* needs a "section"'
    ):
        protocols.read_prompts(
            EVALS, "csv_folder:told", dataclasses.replace(source, metadata=metadata)
        )
    (own_reports / "corpus.json").write_text(
        json.dumps({"columns": {"image": "file", "group": "who", "findings": "seen"}})
    )
    (own_reports / "prompts.json").unlink()
    _, source = all_entries("csv_folder", own_reports, tmp_path, "bare")
    with pytest.raises(
        UserError, match="zero_shot needs classes, and csv_folder:bare has no label"
    ):
        protocols.read_prompts(EVALS, "csv_folder:bare", source)


def test_a_whole_report_is_split_at_its_headings(own_reports, tmp_path):
    description = {"columns": {"image": "file", "group": "who", "report": "seen"}, "channels": 1}
    (own_reports / "corpus.json").write_text(json.dumps(description))
    path = own_reports / "table.csv"
    path.write_text(path.read_text().replace("Seen 6.", "FINDINGS: Large. IMPRESSION: Bad."))
    found, source = all_entries("csv_folder", own_reports, tmp_path, "whole")
    assert source.tasks == {}
    assert (found["6.jpg"]["findings"], found["6.jpg"]["impression"]) == ("Large.", "Bad.")
    assert found["6.jpg"]["study_id"] == found["6.jpg"]["patient_id"] == "w2"
    assert found["6.jpg"]["image"] == (own_reports / "6.jpg").read_bytes()


def test_an_image_on_the_skip_list_is_left_out_and_groups_are_apart(own_reports, tmp_path):
    write(own_reports / "skip_list.csv", ["image_id", "reason"], [["7.png", "rotated"]])
    (own_reports / "7.png").unlink()
    found, source = all_entries("csv_folder", own_reports, tmp_path, "kept")
    assert found.keys() == {f"{i}{('.jpg', '.png', '.dcm')[i % 3]}" for i in range(30)} - {"7.png"}
    assert source.metadata["left_out"] == {"skip list skip_list.csv": 1}
    where = {"data_dir": tmp_path / "data", "builder_config": "kept"}
    parts = [
        {s[i]["patient_id"] for i in range(len(s))} for s in corpora.open_all("csv_folder", **where)
    ]
    assert len(parts) > 1
    assert sum(map(len, parts)) == len(set().union(*parts)) == 10


def test_a_patient_in_two_splits_is_refused_in_ones_own_table(own_reports, tmp_path):
    path = own_reports / "corpus.json"
    described = json.loads(path.read_text())
    described["columns"]["split"] = "part"
    path.write_text(json.dumps(described))
    table = own_reports / "table.csv"
    lines = table.read_text().splitlines()
    parts = ["part", "train", "test", *["train"] * 28]
    table.write_text("\n".join(f"{a},{b}" for a, b in zip(lines, parts, strict=True)))
    with pytest.raises(UserError, match="row 3: who w0 is in test here and in train in row 2"):
        corpora.check("csv_folder", manual_dir=own_reports)


def test_patients_a_published_split_tears_apart_are_counted():
    sample = lambda patient, split: building.Sample(None, None, split, "", patient, "")
    pairs = ("ab", "train"), ("cd", "train"), ("ab", "test"), ("e", "test"), ("ab", "validation")
    torn = building.count_torn(sample(*pair) for pair in pairs)
    assert torn == 1
    assert building.torn_line(torn) == "WARNING: 1 patients are in more than one split."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1.png,w0,v0,Seen, but cut,Said,1,0", "row 4: 8 cells, and the header has 7"),
        ("1.png,w0,v0,Seen", "row 4: 4 cells, and the header has 7"),
    ],
)
def test_a_row_longer_or_shorter_than_the_header_is_refused_where_a_spreadsheet_shows_it(
    tmp_path, row, message
):
    path = tmp_path / "t.csv"
    head = "file,who,visit,seen,said,effusion,edema"
    path.write_text(f'{head}\n\n0.jpg,w0,v0,"Seen,\nin two lines",Said,1,0\n{row}\n')
    with pytest.raises(UserError, match=message):
        files.read_rows(path, columns=("file",))


def test_ones_own_folder_does_not_run_on_beam(own_reports, tmp_path):
    where = {"data_dir": tmp_path / "data", "manual_dir": own_reports}
    with pytest.raises(UserError, match="csv_folder does not run on Beam"):
        corpora.prepare("csv_folder", beam_runner="DirectRunner", **where)


def test_colours_stay_where_three_channels_are_made_smaller(own_folder, tmp_path):
    path = own_folder / "corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"side": 32}))
    big = np.zeros((64, 96, 3), np.uint8)
    big[..., 0] = 200
    for name in ("pictures/4.png", "pictures/4.jpg"):
        Image.fromarray(big).save(own_folder / name)
    found, _ = all_entries("csv_folder", own_folder, tmp_path, "small")
    for content in (found["pictures/4.png"]["image"], found["pictures/4.png"]["images"]["closeup"]):
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        assert pixels.shape == (32, 48, 3)
        np.testing.assert_allclose(pixels.mean((0, 1)), [200, 0, 0], atol=3)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("corpus.json", '"said"', '"seid"', "table.csv row 1: no column seid"),
        ("corpus.json", '"findings"', '"report"', "a whole report beside its parts"),
        ("corpus.json", '"findings"', '"label"', "the label and its classes go together"),
        ("corpus.json", '["effusion", "edema"]', "[]", r"labels 'finding' is \[\]; a list"),
        ("corpus.json", '{"finding": ["effusion", "edema"]}', "[1]", r"labels \[1\]; an object"),
        ("corpus.json", '"finding"', '"label"', "under another name than 'label'"),
        ("corpus.json", '"side": 32', '"side": 7', "side 7; accepted are 0 and 32 to 4096"),
        ("corpus.json", '"channels": 1', '"channels": 2', "channels 2; accepted are 1 and 3"),
        ("table.csv", "Said 3.,1,0", "Said 3.,2,0", "row 5: effusion is '2'"),
        ("table.csv", "2.dcm", "../2.dcm", "row 4: file '../2.dcm' is outside"),
        ("table.csv", "2.dcm", "22.dcm", "row 4: image .*22.dcm is missing"),
    ],
)
def test_a_defect_of_ones_own_reports_is_named(own_reports, file, old, new, message):
    path = own_reports / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        corpora.check("csv_folder", manual_dir=own_reports)


def test_the_phantoms_label_follows_from_rim_and_oedema_of_the_named_mass_alone():
    for number in range(9):
        found = generate.case(0, number)
        t1 = found.volumes["t1"].astype(float)
        assert t1.shape == (128, 128, 24)
        named = np.array(generate.PLACES[int(found.table["location"])])
        y, x, s = (named * (128, 128, 24)).astype(int)
        brightest = t1[y - 16 : y + 17, x - 16 : x + 17, s - 4 : s + 5]
        rim = (brightest > generate.MASS["t1"] + 0.6 * generate.RIM).mean() > 0.02
        large = found.table["oedema_area"] > 850
        assert generate.CLASSES[found.label] == (
            "grade 1" if not rim else f"grade 2, {'' if large else 'no '}brain invasion"
        )


def test_the_phantom_is_prepared_as_three_volumes(tmp_path):
    source = corpora.open_source("men_phantom", "train", data_dir=tmp_path, builder_config="tiny")
    assert source.images == {name: {"slices": 24} for name in ("t1", "t2", "adc")}
    entry = next(source[i] for i in range(6) if source[i]["image_id"] == "train2")
    expected = generate.case(0, 2)
    for name, volume in expected.volumes.items():
        found = volumes.decode(entry["images"][name], slices=24, size=128)
        np.testing.assert_array_equal(found, volume)
    assert entry["labels"]["grade"].tolist() == [0, 0, 1]
    assert entry["table"] == pytest.approx(expected.table)


def test_the_flat_phantom_is_three_images_that_show_all_three_masses(tmp_path):
    where = {"data_dir": tmp_path, "builder_config": "flat_tiny"}
    source = corpora.open_source("men_phantom", "train", **where)
    assert source.images == {name: {} for name in ("t1", "t2", "adc")}
    assert len(source) == 24
    for number in range(6):
        found = generate.case(0, number, flat=True)
        t1 = found.volumes["t1"].astype(float)
        assert t1.shape == (128, 128, 1)
        y, x, _ = (np.array(generate.PLACES[int(found.table["location"])]) * 128).astype(int)
        near = t1[y - 16 : y + 17, x - 16 : x + 17]
        rim = (near > generate.MASS["t1"] + 0.6 * generate.RIM).mean() > 0.02
        assert rim == (generate.CLASSES[found.label] != "grade 1")


def test_countries_have_one_spelling_and_unlisted_ones_are_other():
    schema = {"father": pad.SCHEMA["background_father"]}
    names = schema["father"]["categories"]
    read = lambda text: tabular.parse_row({"father": text}, schema)["father"]
    assert read("BRASIL") == read("BRAZIL") == names.index("BRAZIL")
    assert read("ATLANTIS") == names.index("OTHER")
    assert read("UNK") == tabular.UNKNOWN
    assert math.isnan(read(""))


def test_the_real_hannover_sample_is_read_whole(test_data):
    counts = corpora.check("cxr_tabular", manual_dir=test_data / "cxr_tabular")
    assert {k: v["records"] for k, v in counts.items()} == {"train": 154, "validation": 32}


def test_the_real_glioma_sample_is_read_whole(test_data):
    folder = test_data / "brain_mr_tabular"
    counts = corpora.check("brain_mr_tabular", manual_dir=folder, builder_config="all")
    assert {k: v["records"] for k, v in counts.items()} == {"train": 397, "validation": 96}


def test_a_censored_value_becomes_the_end_of_the_range():
    schema = {"crp": {"kind": "numeric", "range": [0, 600], "censored": True}}
    row = lambda text: {"crp": text}
    assert tabular.parse_row(row("-inf"), schema) == {"crp": 0.0}
    assert tabular.parse_row(row("inf"), schema) == {"crp": 600.0}
    assert records.stored({"a": {}, "b": {"channel": 1}, "c": {"slices": 3}}) == ["a", "c"]
