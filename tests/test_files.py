"""Files appear complete or not at all."""

import pytest

from hf_holo.files import replacing, write_text


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # on the same disk, so that renaming is one step
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_remains(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_in_utf8(tmp_path):
    write_text(tmp_path / "a.txt", "größer ÷ 2\n")
    assert (tmp_path / "a.txt").read_bytes().decode("utf-8") == "größer ÷ 2\n"
