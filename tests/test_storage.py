import os
import resource
import signal
from contextlib import suppress

import pytest
import torch

from e3pruner.storage import fingerprint, new_folder, remove_temporaries, replacing_file, write_json, write_tensors


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with suppress(RuntimeError), replacing_file(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.json").read_text() == '{\n "x": 1\n}'
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(10)})
    before = (tmp_path / "a.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"a\.safetensors"):
            write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with suppress(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "first").write_text("")
    with pytest.raises(FileExistsError, match="never overwritten unasked"), new_folder(tmp_path / "out"):
        pass
    with new_folder(tmp_path / "out", force=True) as folder:
        (folder / "second").write_text("")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["second"]


def test_of_two_that_make_a_folder_the_second_is_told(tmp_path):
    out = tmp_path / "out"
    told = pytest.raises(FileExistsError, match="made by another process")
    with told, new_folder(out), new_folder(out) as first:
        (first / "first").write_text("")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert [f.name for f in out.iterdir()] == ["first"]


def test_what_killed_writers_left_is_removed(tmp_path):
    child = os.fork()
    if child == 0:
        with new_folder(tmp_path / "out") as folder, replacing_file(tmp_path / "a.json") as temporary:
            (folder / "half").write_text("")
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (tmp_path / "mine.tmp").write_text("")
    assert len(list(tmp_path.iterdir())) == 3
    remove_temporaries(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.tmp"]


def test_fingerprints_tell_values_dtypes_and_shapes_apart():
    x = torch.arange(6.0)
    different = [x, x.view(2, 3), x.double(), x + 1, x.bfloat16(), {"a": x}, {"b": x}, {"a": 1}, [1, 2], 12]
    assert len({fingerprint(part) for part in different}) == len(different)
    assert fingerprint({"a": x, "b": 1}) == fingerprint({"b": 1, "a": x.clone()})
    assert fingerprint(x.view(2, 3).t()) == fingerprint(x.view(2, 3).t().contiguous())
