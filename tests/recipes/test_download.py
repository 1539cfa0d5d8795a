"""`halotune data`: from a local server that knows ranges, one that cuts off, one that lies; and from what the user has."""

from __future__ import annotations

import hashlib
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from halotune import HalotuneError
from halotune.cli.main import main
from halotune.recipes.common.download import Remote, fetch, unpack
from halotune.recipes.glue import download as glue
from halotune.recipes.glue.tasks import TASKS
from halotune.recipes.nlu_data import load_glue

from .test_glue import FILES, FIRST, write


class Server(ThreadingHTTPServer):
    """Serves `files`; sends at most `limit` bytes of an answer; `ranges`: whether it knows them. `asked` is what came in."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.limit: int | None = None
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []

    def remote(self, name: str, content: bytes) -> Remote:
        self.files[name] = content
        return Remote(f"http://127.0.0.1:{self.server_port}/{name}", hashlib.sha256(content).hexdigest(), len(content))


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, wanted = self.path[1:], self.headers.get("Range")
        self.server.asked.append((name, wanted))
        if name not in self.server.files:
            return self.send_error(404)
        start = int(wanted.split("=")[1].split("-")[0]) if wanted and self.server.ranges else 0
        content = self.server.files[name][start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.limit])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield served
        served.shutdown()
        thread.join()


CONTENT = bytes(range(256)) * 40


def test_a_file_is_fetched_once(server, tmp_path):
    remote = server.remote("a.bin", CONTENT)
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    fetch(remote, tmp_path)
    assert server.asked == [("a.bin", None)]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_that_was_cut_off_goes_on(server, tmp_path, ranges):
    remote = server.remote("a.bin", CONTENT)
    server.limit, server.ranges = 1000, ranges
    with pytest.raises(HalotuneError, match=r"could not be fetched .* The same command goes on where it ended"):
        fetch(remote, tmp_path)
    assert not (tmp_path / "a.bin").exists()
    server.limit = None
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    assert server.asked == [("a.bin", None), ("a.bin", "bytes=1000-")]


def test_a_wrong_file_is_not_kept(server, tmp_path):
    remote = server.remote("a.bin", CONTENT)
    server.files["a.bin"] = CONTENT[::-1]
    with pytest.raises(HalotuneError, match="not kept, as its SHA-256 is"):
        fetch(remote, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(HalotuneError, match="HTTP Error 404"):
        fetch(Remote(remote.url + "x", "", 1), tmp_path)


def zipped(folder: Path, file: Path) -> bytes:
    with zipfile.ZipFile(file, "w") as z:
        for path in sorted(folder.rglob("*")):
            z.write(path, path.relative_to(folder.parent))
    return file.read_bytes()


def test_glue_is_laid_out_as_the_recipe_expects(server, tmp_path, monkeypatch, capsys):
    """Two zips, and MRPC, whose training rows are divided by the list of GLUE's dev ids."""
    remotes = {}
    for name in ("cola", "mnli"):
        source = write(tmp_path / "source" / TASKS[name].folder, name)
        remotes[name] = (server.remote(f"{name}.zip", zipped(source, tmp_path / f"{name}.zip")),)
    head, row = FILES["mrpc"]["msr_paraphrase_train.txt"]
    rows = [head, row, ["0", "17", "18", "Three.", "Drei."]]
    train = "".join("\t".join(fields) + "\n" for fields in rows).encode()
    test = "".join("\t".join(fields) + "\n" for fields in FILES["mrpc"]["msr_paraphrase_test.txt"]).encode()
    contents = {"mrpc_dev_ids.tsv": b"17\t18\n", "msr_paraphrase_train.txt": train, "msr_paraphrase_test.txt": test}
    remotes["mrpc"] = tuple(server.remote(name, content) for name, content in contents.items())
    monkeypatch.setattr(glue, "FILES", remotes)

    assert main(["data", "glue", str(tmp_path / "glue"), "--only", "cola,mnli,mrpc"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "glue" / n) for n in ("CoLA", "MNLI", "MRPC")]
    for name in ("cola", "mnli", "mrpc"):
        data = load_glue(TASKS[name], str(tmp_path / "glue"), skip=False)
        assert data.train[0] == FIRST[name] and data.notes == []
    assert data.evaluations[""] == [{"a": "Three.", "b": "Drei.", "label": 0}] and len(data.train) == 1
    assert {f.name for f in (tmp_path / "glue").iterdir()} == {"CoLA", "MNLI", "MRPC"}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_what_the_user_has_is_taken(tmp_path, kind, capsys):
    for name in ("sst2", "stsb"):
        write(tmp_path / "have" / "glue_data" / TASKS[name].folder, name)
    given = tmp_path / "have"
    if kind != "folder":
        given = Path(shutil.make_archive(str(tmp_path / "mine"), {"zip": "zip", "tar.gz": "gztar"}[kind], given))
    assert main(["data", "glue", str(tmp_path / "glue"), "--from", str(given)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "glue" / n) for n in ("SST-2", "STS-B")]
    assert load_glue(TASKS["stsb"], str(tmp_path / "glue"), skip=False).train == [FIRST["stsb"]]
    assert main(["data", "glue", str(tmp_path / "glue"), "--only", "rte", "--from", str(given)]) == 2
    assert "holds no file of RTE" in capsys.readouterr().err


def test_wrong_uses_are_explained(tmp_path, capsys):
    assert main(["data", "glue", str(tmp_path), "--only", "colla"]) == 2
    assert "glue has no part 'colla'. It has cola, sst2" in capsys.readouterr().err
    (tmp_path / "x.zip").write_bytes(b"no archive")
    assert main(["data", "glue", str(tmp_path / "g"), "--from", str(tmp_path / "x.zip")]) == 2
    assert "cannot be unpacked" in capsys.readouterr().err


def test_nothing_is_unpacked_outside(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        z.writestr("../outside.txt", "x")
    unpack(tmp_path / "x.zip", tmp_path / "in" / "side")
    assert not (tmp_path / "in" / "outside.txt").exists() and not (tmp_path / "outside.txt").exists()


def test_vaders_ratings_need_no_network(tmp_path):
    assert main(["data", "vader", str(tmp_path / "ratings")]) == 0
    lines = (tmp_path / "ratings" / "train.csv").read_text().splitlines()
    assert lines[0] == "word,rating,sentiment" and len(lines) == 5775
