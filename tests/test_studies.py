"""What is done is kept, whole, and not taken for what other settings would give."""

import json

import pytest

from benchmarks import studies
from medvlp_jax.config import UserError

SETTINGS = {"config": "a", "overrides": ["--config.seed=1"]}


def test_what_was_kept_is_found_again(tmp_path):
    out = tmp_path / "results/rows.json"
    assert studies.finished(out, SETTINGS) == {}
    content = {"settings": SETTINGS, "rows": {"full": {"0.0": 1}}}
    studies.keep(out, content, "| a table |")
    assert studies.finished(out, SETTINGS) == content
    assert out.with_suffix(".md").read_text() == "| a table |\n"
    assert sorted(file.name for file in out.parent.iterdir()) == ["rows.json", "rows.md"]


def test_numbers_of_other_settings_are_not_mixed(tmp_path):
    out = tmp_path / "rows.json"
    studies.keep(out, {"settings": SETTINGS, "rows": {}}, "")
    for other in (SETTINGS | {"config": "b"}, SETTINGS | {"overrides": []}):
        with pytest.raises(UserError, match="holds numbers of settings"):
            studies.finished(out, other)


def test_where_files_lie_decides_nothing(tmp_path):
    given = ["--config.data.data_dir=/a", "--config.seed=1", "--config.data.manual_dir=/b"]
    assert studies.deciding(given) == ["--config.seed=1"]
    out = tmp_path / "rows.json"
    studies.keep(out, {"settings": {"config": "a", "overrides": given}, "rows": {}}, "")
    assert studies.finished(out, SETTINGS)["rows"] == {}


def test_a_setting_that_older_files_do_not_have_is_compared_where_they_do(tmp_path, capsys):
    out, now = tmp_path / "rows.json", SETTINGS | {"recipe": "now"}
    find = lambda settings: studies.finished(out, settings, since=("recipe",))
    studies.keep(out, {"settings": SETTINGS, "rows": {}})
    # Nobody knows what an older file was made with: it goes on without saying.
    assert find(now)["settings"] == SETTINGS
    assert "does not say its recipe" in capsys.readouterr().out
    studies.keep(out, {"settings": SETTINGS | {"recipe": "then"}, "rows": {}})
    with pytest.raises(UserError, match=r"holds numbers of settings.*name another --out"):
        find(now)
    with pytest.raises(UserError, match="holds numbers of settings"):
        studies.finished(out, SETTINGS)


def test_a_fingerprint_is_of_the_recipe_and_its_optimiser():
    config = {"recipe": {"name": "a"}, "optim": {"lr": 1.0}, "data": {"data_dir": "here"}}
    moved, other = {**config, "data": {}}, {**config, "optim": {"lr": 2.0}}
    assert studies.recipe_of(config) == studies.recipe_of(moved) != studies.recipe_of(other)


def test_numbers_without_a_table_leave_none(tmp_path):
    studies.keep(tmp_path / "rows.json", {"settings": {}})
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("content", ["", "[]", "[1]", "3", json.dumps({"rows": {}})])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    out = tmp_path / "rows.json"
    out.write_text(content)
    with pytest.raises(UserError, match="is no file of a study"):
        studies.finished(out, SETTINGS)
