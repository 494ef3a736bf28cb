"""A static page that runs a detector in a browser: the model, its record, our page, and onnxruntime-web beside it."""

import json
from pathlib import Path

from detection.export.folder import model_files, write_folder
from detection.export.web_runtime import runtime_files

_PAGE = Path(__file__).parent / "web_files"
PAGE_FILES = ("app.js", "index.html", "opened.js", "pixels.js", "serve.py", "style.css", "worker.js")


def write_page(exported: Path, folder: Path, runtime: Path) -> list[str]:
    """Makes the folder of a page.

    Args:
        exported: an ``.onnx`` file of ``litedet export`` that gives detections.
        folder: must not exist yet; it appears whole or not at all.
        runtime: of ``locate_runtime``.

    Returns:
        The names of the files in it.

    Raises:
        UserError: a file of another kind or one that ends at the raw heads, the folder exists, or a runtime that lacks what
            the page needs.
    """
    content = model_files(exported, ("onnx",))
    content |= {name: (_PAGE / name).read_bytes() for name in PAGE_FILES}
    eight_bits = (
        json.loads(content["model.json"])["record"]["precision"] == "int8"
    )  # worker.js runs them on WebAssembly
    content |= {f"ort/{name}": data for name, data in runtime_files(runtime, webgpu=not eight_bits).items()}
    return write_folder(folder, content)
