"""The folder of statistics: it saves time, and nothing that happens to it costs a job more than that."""

import errno
import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateur.engine.measure import cache as statistics
from secateur.engine.measure.cache import Statistics
from secateur.files import write_whole


def found() -> list[Tensor]:
    return [torch.arange(3.0), torch.eye(2)]


def known(folder: Path, name: str) -> bool:
    """Whether a later job finds it there."""
    asked: list[str] = []
    values = Statistics(folder, {}).get(name, lambda: asked.append(name) or found())  # type: ignore[func-returns-value]
    assert all(map(torch.equal, values, found()))
    return not asked


def test_what_is_kept_is_found_by_the_next_job(tmp_path: Path) -> None:
    folder = tmp_path / "statistics"
    assert not known(folder, "gates") and known(folder, "gates") and not known(folder, "forward_statistics")


def test_a_folder_that_cannot_be_written_costs_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert not known(tmp_path / "file", "gates"), "there can be no folder"

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(statistics, "write_whole", full)
    assert not known(tmp_path / "statistics", "gates") and not known(tmp_path / "statistics", "gates")
    assert "No space left" in caplog.text


def test_the_least_recently_used_and_what_a_kill_left_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MOST_FILES", 2)
    for age, name in enumerate(("c", "b", "a")):
        assert not known(tmp_path, name)
        for file in tmp_path.glob(f"*-{name}.*"):
            os.utime(file, (time.time() - 10 * age - 10,) * 2)
    (tmp_path / "old.tmp").touch()
    os.utime(tmp_path / "old.tmp", (0, 0))
    (tmp_path / "new.tmp").touch()
    (tmp_path / "vanishing.safetensors").symlink_to(tmp_path / "gone")  # as one that another job has just removed
    assert not known(tmp_path, "d")
    assert known(tmp_path, "c") and not (tmp_path / "old.tmp").exists() and (tmp_path / "new.tmp").exists()
    assert sorted(file.name.rpartition("-")[2] for file in tmp_path.glob("*-*")) == ["c.safetensors", "d.safetensors"]


def test_a_file_that_cannot_be_written_whole_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "file", b"first")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="broken"):
        write_whole(tmp_path / "file", b"second")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"first")]
