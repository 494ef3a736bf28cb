"""A folder that runs without torch: an exported model, its labels, its record, and ``detect.py``, which reads them."""

from pathlib import Path

from detection.export.folder import model_files, write_folder

_DETECT = Path(__file__).parent / "bundle_files" / "detect.py"


def write_bundle(exported: Path, folder: Path) -> list[str]:
    """Makes the folder of an exported file.

    Args:
        exported: an ``.onnx`` or ``.tflite`` file of ``litedet export`` that gives detections.
        folder: must not exist yet; it appears whole or not at all.

    Returns:
        The names of the files in it.

    Raises:
        UserError: a file of another kind or one that ends at the raw heads, or the folder exists.
    """
    content = model_files(exported, ("onnx", "litert"))
    package = "onnxruntime" if "model.onnx" in content else "ai-edge-litert"
    content["detect.py"] = _DETECT.read_bytes()
    content["requirements.txt"] = f"numpy\nopencv-python-headless\n{package}\n".encode()
    return write_folder(folder, content)
