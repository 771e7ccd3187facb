import os
import re
import resource
import signal
from contextlib import suppress
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from e3pruner.form import check_form, natural, positive
from e3pruner.storage import (
    content_digest,
    fingerprint,
    new_folder,
    read_checked,
    read_json,
    read_json_lines,
    remove_temporaries,
    replacing_file,
    write_checked,
    write_json,
    write_tensors,
)


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640)])
def test_what_is_written_has_the_modes_of_the_umask(tmp_path, umask, folder, file):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "new") as new:
            save_file({"a": torch.ones(1)}, new / "theirs.safetensors")  # 0600, whatever the umask
            (new / "tool").touch(0o755)
            write_tensors(new / "ours.safetensors", {"a": torch.ones(1)})
        write_tensors(tmp_path / "alone.safetensors", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new", *tmp_path.rglob("*"))}
    assert modes.pop("new") == folder
    assert modes.pop("tool") == folder  # what could be executed still can
    assert modes == dict.fromkeys(("theirs.safetensors", "ours.safetensors", "alone.safetensors"), file)


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


KIND = "test.content"
read_whole = partial(read_checked, kind=KIND, form={})
DEEP = "[" * 100_000 + "]" * 100_000
DAMAGED = ["", "{", "nul", "\x00", DEEP, '{"a":' * 100_000 + "1" + "}" * 100_000, "1" * 5000]


@pytest.mark.parametrize("text", DAMAGED)
def test_what_is_no_json_is_said_in_a_sentence_with_its_file(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    for read in (read_json, read_whole):
        with pytest.raises(ValueError, match=r"a\.json is damaged: "):
            read(tmp_path / "a.json")
    if text:  # no line is no damage
        with pytest.raises(ValueError, match=r"a\.json, line 1: "):
            read_json_lines(tmp_path / "a.json", {"x": int}, "no row")


def test_bytes_that_are_no_text_are_said_in_a_sentence(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00\x81")
    for read in (read_json, read_whole, partial(read_json_lines, form={}, otherwise="no row")):
        with pytest.raises(ValueError, match=r"a\.json"):
            read(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{}", '{"format": {}}', '{"format": "test.other"}'])
def test_other_json_is_of_another_kind(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is not of the format 'test\.content'"):
        read_whole(tmp_path / "a.json")


@pytest.mark.parametrize("checksum", ["", ', "checksum": null', ', "checksum": []', f', "x": {DEEP[99_500:100_500]}'])
def test_a_checksum_that_is_none_is_no_checksum(tmp_path, checksum):
    (tmp_path / "a.json").write_text(f'{{"format": "{KIND}"{checksum}}}')
    with pytest.raises(ValueError, match=r"a\.json is damaged: "):
        read_whole(tmp_path / "a.json")


def test_any_flipped_bit_is_found_or_changes_nothing(tmp_path):
    content = {"format": KIND, "step": 7, "curve": [0.1, float("nan"), None], "names": {"é": "x", "1": [1e300]}}
    path = tmp_path / "a.json"
    write_checked(path, KIND, content)
    assert repr(read_whole(path)) == repr(content)
    written = path.read_bytes()
    for place in range(len(written)):
        for bit in (0, 5):
            flipped = bytearray(written)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with suppress(ValueError):
                assert repr(read_whole(path)) == repr(content), place


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "it is [], not an object"),
        ({"n": 0, "x": [1, 2.5]}, "n is 0, not positive"),
        ({"n": True, "x": []}, "n is True, not positive"),
        ({"n": 1, "x": [1, "2"]}, "x[1] is '2', not float"),
        ({"n": 1, "x": [1, True]}, "x[1] is True, not float"),
        ({"n": 1, "x": {"a": 1}}, "x is {'a': 1}, not a list"),
        ({"n": 1}, "it lacks 'x'"),
        ({"n": 1, "x": [], "m": {"a": {"b": None}}}, "m.a.b is None, not str"),
        ({"n": 1, "x": [], "m": {"a": {}}}, "m.a lacks 'b'"),
        ({"n": 1, "x": [], "o": "?"}, "o is '?', not natural"),
    ],
)
def test_what_has_not_its_form_is_said_with_its_place(value, message):
    form = {"n": positive, "x": [float], "m?": {str: {"b": str}}, "o?": (natural, None)}
    check_form("file", {"n": 1, "x": [1], "m": {"a": {"b": "c", "more": 1}}, "o": None}, form)
    with pytest.raises(ValueError, match=re.escape(f"file is damaged: {message}")):
        check_form("file", value, form)


def test_content_digests_tell_every_value_apart():
    tensors = {"a": torch.arange(300.0).view(20, 15), "b": torch.zeros(0), "c": torch.tensor(1, dtype=torch.int8)}
    other = tensors | {"a": tensors["a"].clone()}
    assert content_digest([tensors]) == content_digest({n: t} for n, t in reversed(other.items()))
    other["a"][10, 7] = -0.0
    assert len({content_digest([each]) for each in (tensors, other, tensors | {"d": tensors["b"]}, {})}) == 4


def test_fingerprints_tell_values_dtypes_and_shapes_apart():
    x = torch.arange(6.0)
    different = [x, x.view(2, 3), x.double(), x + 1, x.bfloat16(), {"a": x}, {"b": x}, {"a": 1}, [1, 2], 12]
    assert len({fingerprint(part) for part in different}) == len(different)
    assert fingerprint({"a": x, "b": 1}) == fingerprint({"b": 1, "a": x.clone()})
    assert fingerprint(x.view(2, 3).t()) == fingerprint(x.view(2, 3).t().contiguous())
