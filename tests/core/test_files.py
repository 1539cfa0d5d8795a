"""Files and errors about them."""

from __future__ import annotations

import copy
import os
import pickle
import sys

import pytest

from halotune import AdapterFileError, HalotuneError
from halotune.core.files import PICKLE_NAME, WEIGHTS_NAME, locate, read_json, write_atomically


def fail_after_some(error):
    def write(path):
        path.write_text("half of the new")
        raise error

    return write


def test_a_file_is_written_with_its_folders(tmp_path):
    file = tmp_path / "a" / "b" / "file.txt"
    write_atomically(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new"
    assert os.listdir(file.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_the_old_file_stays_where_writing_fails(tmp_path, error):
    file = tmp_path / "file.txt"
    file.write_text("old")
    with pytest.raises(type(error)):
        write_atomically(file, fail_after_some(error))
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_the_old_file_stays_where_renaming_fails(tmp_path, monkeypatch):
    file = tmp_path / "file.txt"
    file.write_text("old")

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        write_atomically(file, lambda path: path.write_text("new"))
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("old")

    def write(path):
        path.write_text("new")
        assert file.read_text() == "old"

    write_atomically(file, write)
    assert file.read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file.txt", lambda path: path.write_text("new"))
    finally:
        os.umask(before)
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o640


# -- finding


def test_locate(tmp_path):
    for folder in (tmp_path, tmp_path / "second"):
        folder.mkdir(exist_ok=True)
        (folder / "x.json").write_text("{}")
    assert locate(tmp_path, "x.json") == tmp_path / "x.json"
    assert locate(str(tmp_path), "x.json", subfolder="second") == tmp_path / "second" / "x.json"


def test_missing_weights_beside_a_pickle_say_why(tmp_path):
    (tmp_path / PICKLE_NAME).write_bytes(b"")
    with pytest.raises(AdapterFileError, match=r"no such file.*a pickle can run code"):
        locate(tmp_path, WEIGHTS_NAME)


def test_missing_weights_above_subfolders_name_them(tmp_path):
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / WEIGHTS_NAME).write_bytes(b"")
    with pytest.raises(AdapterFileError, match=r"These subfolders hold one: second; name it with subfolder="):
        locate(tmp_path, WEIGHTS_NAME)


@pytest.mark.parametrize("where", ["/no/such/folder", "nothing", "./a/b", "~/a", "a/b/c"])
def test_a_path_is_no_hub_id(where, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # asking the hub would be another error
    with pytest.raises(AdapterFileError, match="there is no such folder"):
        locate(where, "x.json")


def test_a_hub_id_without_the_hubs_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HalotuneError, match=r"someone/adapter.*needs huggingface-hub"):
        locate("someone/adapter", "x.json")


def test_an_error_of_the_hub_names_the_repository(monkeypatch):
    import huggingface_hub

    def refuse(repository, filename, *, subfolder, revision):
        raise OSError(f"{revision}: no such revision\nand much more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(AdapterFileError, match=r"^someone/adapter/x\.json: .*v2: no such revision Check the name"):
        locate("someone/adapter", "x.json", revision="v2")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"{", "cannot be read as JSON"), (b"[1]", "found a list"), (b"\xff", "cannot be read as JSON")],
)
def test_damaged_json(tmp_path, content, says):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(AdapterFileError, match=says) as e:
        read_json(file)
    assert e.value.file == str(file)


# -- the error


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("key", [None, "a.hra_u"])
def test_an_error_survives_another_process(copied, key):
    error = AdapterFileError("x.safetensors", "is bad.", key=key, remedy="Fix it.")
    duplicate = copied(error)
    assert type(duplicate) is AdapterFileError and isinstance(duplicate, HalotuneError) and isinstance(duplicate, ValueError)
    assert str(duplicate) == str(error) == f"x.safetensors{': a.hra_u' if key else ''}: is bad. Fix it."
    assert (duplicate.file, duplicate.key) == ("x.safetensors", key)
