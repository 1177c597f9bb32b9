"""Preparing on Apache Beam gives the records of a preparation without it."""

import importlib.util
import sys

import layout_writers as layouts
import numpy as np
import pytest

from medvlp_jax import cli
from medvlp_jax.config import UserError
from medvlp_jax.data import corpora

HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(not HAS_BEAM, reason="needs the extra beam")
ON_BEAM = {"beam_runner": "DirectRunner", "beam_options": ["--direct_num_workers=1"]}


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    layouts.rsna_pneumonia(source)
    return source


def records(name, folder, data, **options):
    """Prepare and read every split."""
    corpora.prepare(name, data_dir=data, manual_dir=folder, **options)
    return {source.split: list(source) for source in corpora.open_all(name, data_dir=data)}


@needs_beam
@pytest.mark.parametrize("name", ["rsna_pneumonia", "mimic_cxr"])
def test_the_records_are_those_of_a_preparation_without_beam(name, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    getattr(layouts, name)(source)
    plain = records(name, source, tmp_path / "plain")
    beam = records(name, source, tmp_path / "beam", **ON_BEAM)
    assert {split: len(rows) for split, rows in beam.items()} == {
        split: len(rows) for split, rows in plain.items()
    }
    for split, rows in plain.items():
        key = lambda record: record["image_id"]
        for one, other in zip(sorted(rows, key=key), sorted(beam[split], key=key), strict=True):
            assert set(one) == set(other)
            for field, value in one.items():
                np.testing.assert_equal(other[field], value)
    left_out = [
        corpora.builder(name, data_dir=tmp_path / data).info.metadata["left_out"]
        for data in ("plain", "beam")
    ]
    assert left_out[0] == left_out[1]


@needs_beam
def test_a_damaged_image_stops_the_pipeline_and_leaves_nothing(folder, tmp_path):
    damaged = min(path for path in folder.rglob("*") if path.suffix in (".dcm", ".png", ".jpg"))
    damaged.write_bytes(b"no image")
    with pytest.raises(UserError, match=damaged.stem):
        corpora.prepare("rsna_pneumonia", data_dir=tmp_path / "d", manual_dir=folder, **ON_BEAM)
    left = {path.name for path in (tmp_path / "d").rglob("*") if path.is_file()}
    assert not {name for name in left if "array_record" in name or "dataset_info" in name}


@needs_beam
def test_an_unknown_runner_names_the_nearest(folder, tmp_path):
    with pytest.raises(UserError, match="No Beam runner 'DirectRuner'"):
        corpora.prepare(
            "rsna_pneumonia",
            data_dir=tmp_path,
            manual_dir=folder,
            beam_runner="DirectRuner",
        )


def test_without_beam_the_answer_says_what_to_install(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    arguments = f"data prepare rsna_pneumonia --manual-dir {folder} --data-dir {tmp_path / 'd'}"
    assert cli.main([*arguments.split(), "--beam-runner", "DirectRunner"]) == 2
    assert "pip install 'medvlp-jax[beam]'" in capsys.readouterr().err


def test_a_builder_that_cannot_says_so(tmp_path):
    with pytest.raises(UserError, match="The builder of cxr_phantom"):
        corpora.prepare("cxr_phantom", data_dir=tmp_path, beam_runner="DirectRunner")
