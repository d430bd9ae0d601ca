import pytest

from nas_mnist.files import folder_beside, whole_file


def test_file_is_there_whole_or_as_it_was_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "page.html"
    with whole_file(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(OSError, match="full"), whole_file(path) as temporary:
        temporary.write_text("ne")
        raise OSError("full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_folder_is_gone_unless_it_was_renamed(tmp_path):
    with folder_beside(tmp_path / "a") as kept:
        (kept / "x").write_text("1")
        kept.rename(tmp_path / "a")
    with pytest.raises(OSError), folder_beside(tmp_path / "b") as lost:
        (lost / "x").write_text("1")
        raise OSError
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "x").exists()
