"""Files appear complete or not at all."""

import os
import platform
import subprocess
import sys

import pytest

from hf_holo.errors import HoloError
from hf_holo.files import replacing, replacing_folder, write_text


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


def test_a_folder_is_replaced_when_the_new_one_is_complete(tmp_path):
    folder = tmp_path / "exports" / "onnx"
    for content in ("old", "new"):
        with replacing_folder(folder) as temporary:
            (temporary / content).write_text(content)
            assert content == "old" or (folder / "old").exists()
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failed_block_leaves_the_old_folder_and_no_remains(tmp_path):
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "model").write_text("old")
    with pytest.raises(OSError, match="full"), replacing_folder(folder) as temporary:
        (temporary / "model").write_text("half")
        raise OSError("the disk is full")
    assert (folder / "model").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path):
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "model").write_text("old")
    with pytest.raises(OSError), replacing_folder(folder) as temporary:
        temporary.rename(tmp_path / "elsewhere")  # what is to be renamed is not there any more
    assert (folder / "model").read_text() == "old"


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "onnx").write_text("a file")
    with pytest.raises(HoloError, match="is a file"), replacing_folder(tmp_path / "onnx"):
        pass
    assert (tmp_path / "onnx").read_text() == "a file"


@pytest.fixture
def dead() -> str:
    """What becomes of the remains of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{platform.node()}-{process.pid}"


def test_what_a_killed_process_has_left_is_cleared(tmp_path, dead):
    alive, own = (f"{platform.node()}-{process}" for process in (os.getppid(), os.getpid()))
    for name in (
        f"onnx.tmp-{dead}",
        f"onnx.tmp-{own}",
        f"onnx.tmp-{alive}",
        "onnx.tmp-elsewhere-1",
        f"other.tmp-{dead}",
    ):
        (tmp_path / name).mkdir()
    with replacing_folder(tmp_path / "onnx"):
        pass
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"onnx", f"onnx.tmp-{alive}", "onnx.tmp-elsewhere-1", f"other.tmp-{dead}"}


def test_a_folder_that_had_stepped_aside_comes_back(tmp_path, dead):
    """The process was killed between the two renames: the old folder is the only one."""
    (tmp_path / f"onnx.old-{dead}").mkdir()
    (tmp_path / f"onnx.old-{dead}" / "model").write_text("old")
    with pytest.raises(OSError, match="full"), replacing_folder(tmp_path / "onnx"):
        raise OSError("the disk is full")
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    assert (tmp_path / "onnx" / "model").read_text() == "old"
