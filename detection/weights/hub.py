"""Published weights by name: fetched, checked, converted and kept in a cache.

``published.json`` lists them: URL, SHA-256 (or its first digits) where one is given and by whom, licence, the publisher's
figure, input. The cache is $LITEDET_CACHE, else $XDG_CACHE_HOME/litedet, else ~/.cache/litedet.
"""

import difflib
import os
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from importlib import resources
from pathlib import Path

import msgspec
from filelock import FileLock

from backbones.errors import UserError
from backbones.state import sha256_of
from backbones.weights.readers import is_download
from detection.engine.progress import progress_bar
from detection.weights.recognition import convert

_CONVERTED = "2"  # counts up when conversion gives other files, so that an old one in the cache is not taken
_FOREIGN_SUFFIXES = (".pb", ".tflite", ".gz", ".tgz")
_CHUNK = 1 << 18
_TIMEOUT = 30  # seconds without a byte


@dataclass(kw_only=True, slots=True, frozen=True)
class Published:
    """An entry of the list.

    Attributes:
        kind: "detector", "classifier", or "folded classifier", whose batch norms need sample images.
        url: of the file.
        sha256: of the file, or the first digits of it; empty where nobody gives one.
        sha256_from: who gives it.
        licence: SPDX name.
        figure: what the publisher measured; empty where nothing was found.
        input: size and normalisation.
        classes: which and how many.
    """

    kind: str
    url: str
    sha256: str
    sha256_from: str
    licence: str
    figure: str
    input: str
    classes: str


@cache
def published() -> dict[str, Published]:
    """All entries by name."""
    text = resources.files("detection.weights").joinpath("published.json").read_bytes()
    return msgspec.json.decode(text, type=dict[str, Published])


def cache_dir() -> Path:
    """The folder of the cache; it need not exist."""
    own = os.environ.get("LITEDET_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litedet"


def locate(source: str | Path) -> str | Path:
    """The file of a source: of a published name its converted file, fetched where the cache has none; else the source.

    A file of that name in the working directory comes first. Torchvision's names stay what they are: torchvision has a
    mechanism and a cache of its own.

    Raises:
        FileNotFoundError: neither a file nor a published name.
        UserError: weights that need sample images first, or a file with another hash.
        OSError: no network, with the place where the file can be put by hand.
    """
    name = str(source)
    if Path(source).exists():
        if Path(source).suffix in _FOREIGN_SUFFIXES:
            raise UserError(
                f"{name} is in another library's format; convert it first: "
                f"litedet convert-weights {name} OUT.safetensors"
            )
        return source
    if is_download(name):
        return source
    entry = published().get(name)
    if entry is None:
        if Path(name).suffix in (".pt", ".pth", ".safetensors", *_FOREIGN_SUFFIXES) or os.sep in name:
            return source  # meant as a file; whoever opens it says what is missing
        near = difflib.get_close_matches(name, published(), 3, 0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise FileNotFoundError(
            f"weights: {name} does not exist, and no published weights have that name; {hint}"
            f"published are: {', '.join(published())}"
        )
    if entry.kind == "folded classifier":
        raise UserError(
            f"{name} has its batch norms folded and cannot be trained on as it is; convert it with sample images: "
            f"litedet convert-weights {name} OUT.safetensors --statistics-from FOLDER"
        )
    return fetch_converted(name)


def fetch_converted(name: str) -> Path:
    """The published weights of a name as our ``.safetensors``, from the cache where they are there.

    Raises:
        UserError, OSError: as ``locate``.
    """
    target = cache_dir() / f"{name}.v{_CONVERTED}.safetensors"
    if target.is_file():
        return target

    entry = published()[name]
    downloaded = fetch(name)
    with FileLock(f"{target}.lock"):  # processes of one training wait for the first
        if not target.is_file():
            converted = convert(downloaded)
            converted.info.source = f"{entry.url}; {converted.info.source}"
            converted.info.licence = entry.licence
            converted.save(target)
    return target


def fetch(name: str) -> Path:
    """The published file of a name as it was published, from the cache where it is there.

    What was downloaded before a break is kept, and the download goes on from there.

    Raises:
        UserError: the file has another hash.
        OSError: it cannot be downloaded; the message says where to put it by hand.
    """
    entry = published()[name]
    target = cache_dir() / "downloads" / Path(urllib.parse.urlparse(entry.url).path).name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_file():
            _check(target, entry, "remove it, or put the right file there")
            return target
        part = target.with_name(target.name + ".part")
        try:
            _download(entry.url, part)
        except (OSError, HTTPException) as error:
            raise OSError(
                f"{name}: {entry.url} could not be downloaded ({error}); the same command goes on from where it broke off. "
                f"Without a network: fetch the file elsewhere and put it at {target}"
            ) from error
        try:
            _check(part, entry, f"it was removed; try again, or put the right file at {target}")
        except ValueError:
            part.unlink()
            raise
        os.replace(part, target)
    return target


def _download(url: str, part: Path) -> None:
    """Download to a file, going on after the bytes that are there."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "litedet"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416 or not have:
            raise
        return  # nothing is left to send: the file was whole; its hash tells
    with response:
        resumed = response.status == 206 if response.status is not None else False
        if not resumed:
            have = 0  # the server sends all of it again
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        name = part.name.removesuffix(".part")
        with (
            part.open("ab" if resumed else "wb") as file,
            progress_bar(total=total, initial=have, unit="B", unit_scale=True, desc=name) as progress,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise OSError(f"the connection closed after {part.stat().st_size} of {total} bytes")


def _check(path: Path, entry: Published, advice: str) -> None:
    digest = sha256_of(path)
    if not digest.startswith(entry.sha256):
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) has SHA-256 {digest}, expected {entry.sha256} "
            f"({entry.sha256_from}); {advice}"
        )
