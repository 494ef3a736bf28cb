"""The library that runs a model in a browser, onnxruntime-web, from the npm registry into a page: nothing of it lies on a CDN.

It is fetched by npm's own client, which checks what it got, and kept in the cache of the published weights.
"""

import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from backbones.errors import UserError
from backbones.state import existing_file, write_whole
from detection.weights.hub import cache_dir

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
"""The one that the page was tested with."""
# Two builds, of which a browser loads one: for WebAssembly, and for WebGPU, which falls back on WebAssembly.
WASM_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
WEBGPU_FILES = ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
_TIMEOUT = 600  # seconds


def locate_runtime(given: str | None = None) -> Path:
    """The package as npm packs it.

    Args:
        given: a ``.tgz`` of ``npm pack onnxruntime-web``, or a version; None: the one that the page was tested with.

    Raises:
        FileNotFoundError: no such ``.tgz``.
        UserError: neither in the cache nor to be had by npm; says where the file can be put by hand.
    """
    if given is not None and given.endswith((".tgz", ".tar.gz")):
        return existing_file(given, f"the package {PACKAGE}")
    version = given or VERSION
    if not re.fullmatch(r"\d+\.\d+\.\d+[\w.+-]*", version):
        raise UserError(
            f"--onnxruntime-web {version!r} is neither a version, such as {VERSION}, nor a .tgz of npm pack {PACKAGE}"
        )
    kept = cache_dir() / f"{PACKAGE}-{version}.tgz"
    if kept.is_file():
        return kept
    by_hand = (
        f"on a machine where that works: npm pack {PACKAGE}@{version}; then put {kept.name} into {kept.parent}, or give it: "
        f"--onnxruntime-web {kept.name}"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"--to web takes {PACKAGE} {version} from npm, and there is no npm here. Install Node.js, or {by_hand}"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{PACKAGE}@{version}", "--silent", "--pack-destination", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{' '.join(command[1:3])} did not end in {_TIMEOUT} seconds; {by_hand}") from error
        packed = Path(folder, kept.name)
        if done.returncode or not packed.is_file():
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[0][:200]
            raise UserError(f"npm pack {PACKAGE}@{version} failed, npm says: {said}; {by_hand}")
        write_whole(kept, packed.read_bytes())
    return kept


def runtime_files(package: Path, webgpu: bool = True) -> dict[str, bytes]:
    """The files of it that a page needs.

    Args:
        package: a ``.tgz`` as npm packs it.
        webgpu: with the build for WebGPU.

    Returns:
        Content by name, with a ``README.txt`` that says what and whose it is.

    Raises:
        UserError: not that package, damaged, or of a version without these files.
    """
    try:
        with tarfile.open(package) as archive:
            names = (*WASM_FILES, *WEBGPU_FILES) if webgpu else WASM_FILES
            content = {name: _member(archive, f"package/dist/{name}") for name in names}
            about = json.loads(_member(archive, "package/package.json"))
    except KeyError as error:
        raise UserError(f"{package} has no {error.args[0]}; {PACKAGE} {VERSION} has what the page needs") from error
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise UserError(f"{package} cannot be read as a package of npm: {error}") from error
    if about.get("name") != PACKAGE:
        raise UserError(f"{package} is the package {about.get('name')}, not {PACKAGE}")
    whose = f"{PACKAGE} {about.get('version')}, licence {about.get('license')}, as published on the npm registry.\n"
    return {**content, "README.txt": whose.encode()}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """Content of a file in an archive.

    Raises:
        KeyError: there is none of that name.
    """
    try:
        member = archive.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise KeyError(name)
    return member.read()
