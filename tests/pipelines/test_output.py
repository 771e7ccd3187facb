"""Result folders: what two runs, a mount, a link or the user's own files do to them."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from e3pruner.pipelines.output import CONFIG_FILE, add_files, output_folder
from e3pruner.storage import locked


def finish(out: Path, content: str = "first", **options: Any) -> None:
    with output_folder(out, {"drop": 8}, **options) as folder:
        (folder / "result").write_text(content)


def test_a_result_has_the_modes_of_the_umask(tmp_path: Path) -> None:
    out, before = tmp_path / "out", os.umask(0o022)
    try:
        with output_folder(out, {"drop": 8}) as folder:
            save_file({"a": torch.ones(1)}, folder / "model.safetensors")  # 0600, whatever the umask
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()} == {
        CONFIG_FILE: 0o644,
        "model.safetensors": 0o644,
    }


def test_a_second_run_is_told_who_is_at_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out, {"drop": 8}) as folder:
        with pytest.raises(FileExistsError, match=rf"being written by process {os.getpid()} on "):
            finish(out, "second")
        (folder / "result").write_text("first")
    assert (out / "result").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_meanwhile_is_never_replaced(force: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = pytest.raises(FileExistsError, match=r"The new result is whole in .*out\.partial")
    with told, output_folder(out, {"drop": 8}, force=force) as folder:
        (folder / "result").write_text("new")
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    assert (out / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "out.partial" / "result").read_text() == "new"


@pytest.mark.parametrize("meanwhile", [False, True])
def test_force_deletes_only_what_a_run_wrote(meanwhile: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(out)
    if not meanwhile:
        (out / "notes").mkdir()
    told = pytest.raises(FileExistsError, match="notes")
    with told, output_folder(out, {"drop": 8}, force=True) as folder:
        assert meanwhile
        (folder / "result").write_text("second")
        (out / "notes").mkdir()
    assert (out / "result").read_text() == "first"
    assert (out / "notes").is_dir()
    (out / "notes").rmdir()
    finish(out, "third", force=True)
    assert (out / "result").read_text() == "third"


def test_what_the_report_adds_is_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(out)
    (out / "report.html").write_text("page")
    with pytest.raises(FileExistsError, match=r"report\.html, which e3 did not write"):
        finish(out, "second", force=True)
    add_files(out, ["report.html"])
    finish(out, "second", force=True)
    assert {path.name for path in out.iterdir()} == {"result", CONFIG_FILE}


def test_a_folder_called_old_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "thesis.tex").write_text("years of work")
    finish(tmp_path / "out")
    finish(tmp_path / "out", "second", force=True)
    assert (tmp_path / "out.old" / "thesis.tex").read_text() == "years of work"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    finish(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "result").exists()


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path) -> None:
    mounted = next(path for path in map(Path, ("/dev/shm", "/proc", "/")) if os.path.ismount(path))
    worked = False
    with pytest.raises(FileExistsError, match="is a mount point"), output_folder(mounted, {}, force=True):
        worked = True
    assert not worked


def test_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    out = tmp_path / "out"
    if not (child := os.fork()):
        with output_folder(out, {"drop": 8}) as folder:
            (folder / "checkpoint").write_text("state")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "out.lock").exists()
    with output_folder(out, {"drop": 8}) as folder:
        assert (folder / "checkpoint").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("left", ["nothing", "manifest.json", "tensorboard/events", ".half.tmp", "search.json"])
def test_what_has_measured_nothing_blocks_nobody(left: str, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    if not (child := os.fork()):
        with output_folder(out, {"drop": 8}) as folder:
            if left != "nothing":
                (folder / left).parent.mkdir(exist_ok=True)
                (folder / left).write_text('{"measured": {}}')
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (partial / CONFIG_FILE).exists()
    with output_folder(out, {"drop": 5}) as folder:
        (folder / "result").write_text("")
    assert {path.name for path in out.iterdir()} == {"result", CONFIG_FILE}


def test_folders_on_the_way_go_with_a_run_that_fails(tmp_path: Path) -> None:
    with suppress(ValueError), output_folder(tmp_path / "a" / "b" / "out", {}):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_e3_yaml_is_a_sentence(tmp_path: Path) -> None:
    finish(tmp_path / "out")
    for text in ("[" * 5000, "files: 3", "- 1", "{"):
        (tmp_path / "out" / CONFIG_FILE).write_text(text)
        with pytest.raises((ValueError, FileExistsError), match=r"e3\.yaml"):
            finish(tmp_path / "out", force=True)


def test_a_lock_waits_where_it_is_told_to(tmp_path: Path) -> None:
    read, write = os.pipe()
    if not (child := os.fork()):
        with locked(tmp_path / "a"):
            os.write(write, b"x")
            os.read(read, 0)
            (tmp_path / "order").write_text("child")
        os._exit(0)
    os.read(read, 1)
    with locked(tmp_path / "a", wait=True):
        assert (tmp_path / "order").read_text() == "child"
    os.waitpid(child, 0)
