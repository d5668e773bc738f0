"""A file appears whole or not at all."""

from pathlib import Path

import pytest

from lit_dpo.files.atomic import atomic_write


def test_a_file_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "folder/x.txt"
    for content in ("old", "new"):
        with atomic_write(path) as beside:
            assert beside.parent == path.parent, "a rename within one folder, never a copy between file systems"
            beside.write_text(content)
        assert path.read_text() == content
    assert [found.name for found in path.parent.iterdir()] == ["x.txt"]


def interrupted(path: Path) -> None:
    with atomic_write(path) as beside:
        beside.write_text("ne")
        raise KeyboardInterrupt


def test_an_interruption_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["x.txt"]
