"""`medvlp convert`."""

import json
import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from medvlp_jax import convert
from medvlp_jax.config import UserError
from medvlp_jax.convert.__main__ import main
from medvlp_jax.encoders import vit


@pytest.fixture
def source(tmp_path):
    """Save a small ViT with a processor."""
    module = vit.make("tiny", depth=1, width=16, mlp_dim=16, image_size=32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
    processor = convert.image_processor(32, mean=(0.5,) * 3, std=(0.5,) * 3)
    convert.save(module, variables, tmp_path / "in", preprocessor=processor)
    return tmp_path / "in"


def test_import_writes_a_folder_that_equals_its_source(source, tmp_path, capsys):
    out = tmp_path / "out"
    main(["import", str(source), str(out)])
    assert "ViT" in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {file.name for file in source.iterdir()}
    for file in source.glob("*.json"):
        assert (out / file.name).read_text() == file.read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_import_takes_the_image_processor_out_of_the_one_file_of_two(source, tmp_path):
    """What CLIPProcessor.save_pretrained writes since release 5."""
    file = source / "preprocessor_config.json"
    said = json.loads(file.read_text())
    file.unlink()
    (source / "processor_config.json").write_text(json.dumps({"image_processor": said}))
    main(["import", str(source), str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / file.name).read_text()) == said


def test_import_does_not_write_over_files(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        main(["import", str(source), str(tmp_path / "out")])


def test_a_broken_processor_is_refused_before_anything_is_written(source, tmp_path):
    for content in ("{", "[" * 5000):
        (source / "preprocessor_config.json").write_text(content)
        with pytest.raises(UserError, match=r"preprocessor_config\.json is cut short or no JSON"):
            main(["import", str(source), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["preprocessor_config.json", "vocab.txt"])
def test_a_link_out_of_the_folder_is_refused_before_anything_is_written(source, tmp_path, name):
    (tmp_path / "secret").write_text("{}")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to("../secret")
    with pytest.raises(UserError, match=r"is a link to .*secret, outside its folder"):
        main(["import", str(source), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_only_this_package_says_what_it_does(source, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])  # those of pytest
    main(["import", str(source), str(tmp_path / "out")])
    assert logging.getLogger("medvlp_jax.convert").isEnabledFor(logging.INFO)
    assert not logging.getLogger("orbax.checkpoint").isEnabledFor(logging.INFO)


def test_help_teaches(capsys):
    for arguments, words in [
        (["--help"], "import"),
        (["import", "--help"], "Bio_ClinicalBERT"),
        (["export", "--help"], "newest checkpoint of a run, or, where train.select selected a st"),
    ]:
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        assert words in capsys.readouterr().out
