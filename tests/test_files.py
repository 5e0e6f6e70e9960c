"""Where files can be written, and where not."""

from __future__ import annotations

import os

import pytest

from sparsek_tune import files


def test_writable_or_not_is_known_before(tmp_path):
    for path, kind in ((tmp_path, IsADirectoryError), (tmp_path / "no" / "x.json", FileNotFoundError)):
        with pytest.raises(kind) as error:
            files.check_writable(path)
        assert error.value.filename == str(path)
    there = tmp_path / "x.json"
    there.write_text("kept")
    files.check_writable(there)
    assert there.read_text() == "kept" and os.listdir(tmp_path) == ["x.json"]
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    files.check_writable(pipe)  # replacing() writes to it as it is
    link.symlink_to(tmp_path / "no" / "y.json")
    with pytest.raises(FileNotFoundError):
        files.check_writable(link)
    with pytest.raises(OSError, match="File name too long"):
        files.check_writable(tmp_path / ("x" * 250))
    if os.geteuid():  # root may write anything
        there.chmod(0o444)
        with pytest.raises(PermissionError):
            files.check_writable(there)
