"""Files from the network: a transfer that was cut off goes on where it ended, and nothing is kept whose checksum is wrong."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from ...core.errors import HalotuneError

CHUNK = 1 << 20
NAMES = {"sha256": "SHA-256", "sha1": "SHA-1"}
SECONDS = 60.0  # without a byte, after which a connection counts as lost


@dataclass(frozen=True)
class Remote:
    """A file on the network.

    Attributes:
        checksum: in hexadecimal digits; None where it is not the same at every transfer, as of archives packed anew.
        size: in bytes; None where only the server knows it.
        algorithm: of the checksum, as hashlib calls it; another where its makers publish no SHA-256.
    """

    url: str
    checksum: str | None
    size: int | None = None
    algorithm: str = "sha256"

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def fetch(remote: Remote, folder: Path) -> Path:
    """The file, in the folder; what is there already and right is not fetched again.

    Raises:
        HalotuneError: it cannot be had, or is not the file that it should be.
    """
    file, part = folder / remote.name, folder / f".{remote.name}.part"
    if file.is_file() and remote.checksum in (None, _digest(file, remote.algorithm)):
        return file
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _receive(remote, part)
    except (OSError, ValueError, http.client.HTTPException) as e:  # URLError is an OSError; ValueError is of bad addresses
        reason = getattr(e, "reason", e)
        if isinstance(e, urllib.error.HTTPError):  # it holds the connection
            reason = e
            e.close()
        raise HalotuneError(
            f"{remote.url}: could not be fetched ({reason}). The same command goes on where it ended; "
            "what you have already is taken with --from FILE."
        ) from e
    found = _digest(part, remote.algorithm)
    if remote.checksum not in (None, found):
        part.unlink()
        raise HalotuneError(
            f"{remote.url}: not kept, as its {NAMES[remote.algorithm]} is {found} where {remote.checksum} was expected: the "
            "file was changed or damaged on its way. Try again, or give a copy that you trust with --from FILE."
        )
    os.replace(part, file)
    return file


def _receive(remote: Remote, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    if remote.size is not None and have >= remote.size:  # complete, or of another file: its checksum will tell
        return
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        opened = urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as e:
        if e.code == 416 and have:  # nothing is left to be had
            return
        raise
    with opened as response:
        quiet = not sys.stderr.isatty()
        if have and response.status != 206:  # a server that knows no ranges sends all of it
            have = 0
        length = response.headers.get("Content-Length")
        size = remote.size or (have + int(length) if length else None)
        with (
            part.open("ab" if have else "wb") as out,
            tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=remote.name, disable=quiet) as bar,
        ):
            while chunk := response.read(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
    if size is not None and part.stat().st_size < size:
        raise OSError(f"the connection ended after {part.stat().st_size:,} of {size:,} bytes")


def _digest(file: Path, algorithm: str) -> str:
    with file.open("rb") as f:
        digest = hashlib.new(algorithm)
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """The files of a zip or tar archive, none of them outside the folder.

    Raises:
        HalotuneError: it is no such archive.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as z:
                z.extractall(folder)
        else:
            with tarfile.open(archive) as t:
                t.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as e:
        raise HalotuneError(f"{archive}: cannot be unpacked ({e}). Give a zip or tar archive, or a folder.") from e


def put(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` fill a folder beside `folder`, which then takes its place as a whole."""
    staging = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    fill(staging)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)
