"""A file is there whole or not at all."""

import pytest

from medvlp_jax.writing import replaced


def test_the_old_content_stays_until_the_new_is_whole(tmp_path):
    file = tmp_path / "folder" / "a.json"
    with replaced(file) as scratch:
        scratch.write_text("old")
    with replaced(file) as scratch:
        scratch.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert [p.name for p in file.parent.iterdir()] == ["a.json"]


def test_two_that_write_one_file_do_not_meet(tmp_path):
    """In containers of one job every process has the same number."""
    file = tmp_path / "a.json"
    with replaced(file) as one, replaced(file) as other:
        one.write_text("one")
        other.write_text("other")
    assert file.read_text() == "one"
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("name", ["", "folder", "folder/.."])
def test_a_folder_is_no_file(tmp_path, monkeypatch, name):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IsADirectoryError, match="Is a directory"), replaced(name):
        pytest.fail("nothing may be written")


def test_a_failure_leaves_everything_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")

    def fail():
        with replaced(file) as scratch:
            scratch.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file]


def test_a_block_that_writes_nothing_is_a_defect_and_replaces_nothing(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(FileNotFoundError), replaced(file):
        pass
    assert file.read_text() == "old"
