"""Queues of metrics and files, and their file."""

import json
from pathlib import Path

import pytest

from ul2r.tracking.backlog import Backlog, Point

# As versions before this module existed wrote it.
FILE_CONTENT = (
    '{"points": [["train/loss", 2.5, 3, 0], ["train/loss", NaN, 4, 1]], "files": ["guards/a.json"]}'
)


def test_file_is_read_and_written_in_the_same_format(tmp_path: Path) -> None:
    path = tmp_path / "tracking_waiting.json"
    path.write_text(FILE_CONTENT)
    backlog = Backlog(path)
    assert (backlog.num_points, backlog.num_files) == (2, 1)
    assert backlog.first_points(1) == [Point("train/loss", 2.5, 3, 0)]
    assert backlog.first_file() == Path("guards/a.json")

    backlog.save()
    assert path.read_text() == FILE_CONTENT


def test_uploaded_points_and_files_leave_the_queues_in_order(tmp_path: Path) -> None:
    backlog = Backlog(tmp_path / "tracking_waiting.json")
    points = [Point("train/loss", 1.0, step, 0) for step in range(5)]
    backlog.add_points(points)
    backlog.add_file(Path("a"))
    backlog.add_file(Path("b"))

    backlog.remove_points(2)
    backlog.remove_file()
    assert backlog.first_points(9) == points[2:]
    assert backlog.first_file() == Path("b")


def test_file_of_an_empty_backlog_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "tracking_waiting.json"
    backlog = Backlog(path)
    backlog.add_points([Point("train/loss", 1.0, 1, 0)])
    backlog.save()
    assert json.loads(path.read_text())["points"] == [["train/loss", 1.0, 1, 0]]

    backlog.remove_points(1)
    assert backlog.is_empty
    assert backlog.first_file() is None
    backlog.save()
    assert not path.exists()


def test_file_that_cannot_be_removed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tracking_waiting.json"
    backlog = Backlog(path)
    backlog.add_file(Path("a"))
    backlog.save()
    backlog.remove_file()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        backlog.save()
        backlog.save()
    (line,) = caplog.messages
    assert line.startswith(f"{path} cannot be removed (Permission denied)")
    backlog.save()
    assert not path.exists()
