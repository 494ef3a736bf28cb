"""Published weights by name, with archives of our own on a server of our own. Run: pytest tests/test_published.py"""

import functools
import hashlib
import http.server
import json
import re
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from test_tensorflow_weights import tensorflow_detector, write_graph

import detection.weights.hub as module
from backbones.classifier import Classifier, ClassifierConfig
from backbones.mobilenetv2 import MobileNetV2Config
from backbones.weights.foreign import to_timm
from backbones.weights.readers import read_metadata
from detection import load_detector
from detection.cli.convert_weights import main as convert_weights
from detection.weights.hub import Published, cache_dir, fetch, fetch_converted, locate, published
from detection.weights.native import read_detector


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with byte ranges where ``ranges`` is on; ``cut`` ends every answer after so many bytes."""

    ranges = True
    cut: int | None = None
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        self.asked.append(self.headers.get("Range"))
        if not path.is_file():
            self.send_error(404, "no such file")
            return
        content = path.read_bytes()
        start = 0
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if found and self.ranges:
            start = int(found[1])
            if start >= len(content):
                self.send_error(416, "nothing left")
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:] if self.cut is None else content[start : start + self.cut])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which a server gives its files."""
    folder = tmp_path / "site"
    folder.mkdir()
    Server.ranges, Server.cut, Server.asked = True, None, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LITEDET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def publish(monkeypatch: pytest.MonkeyPatch, name: str, url: str, sha256: str, kind: str = "detector") -> None:
    entry = Published(
        kind=kind, url=url, sha256=sha256, sha256_from="a test", licence="CC0-1.0", figure="", input="", classes=""
    )
    monkeypatch.setattr(module, "published", lambda: {name: entry})
    monkeypatch.setattr("detection.weights.hub.published", lambda: {name: entry})


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector in the form of TensorFlow's ssdlite_mobilenet_v2_coco_2018_05_09.tar.gz."""
    folder = tmp_path_factory.mktemp("archive")
    inside = folder / "ssdlite_mobilenet_v2_coco_2018_05_09"
    inside.mkdir()
    write_graph(tensorflow_detector(90), inside / "frozen_inference_graph.pb")
    (inside / "pipeline.config").write_text("model { ssd { num_classes: 90 } }\n")
    (inside / "model.ckpt.meta").write_bytes(bytes(100))
    with tarfile.open(folder / "coco.tar.gz", "w:gz") as tar:
        tar.add(inside, inside.name)
    return folder / "coco.tar.gz"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_list() -> None:
    entries = published()
    assert {"ssdlite_mobilenet_v2_coco", "torchvision:IMAGENET1K_V2", "mobilenetv2_120d.ra_in1k"} <= set(entries)
    for name, entry in entries.items():
        assert entry.kind in ("detector", "classifier", "folded classifier"), name
        assert entry.url.startswith(("http://download.tensorflow.org/", "https://")), name
        assert re.fullmatch(r"([0-9a-f]{8}|[0-9a-f]{64})?", entry.sha256), name
        assert bool(entry.sha256) == bool(entry.sha256_from), name
        assert entry.licence in ("Apache-2.0", "BSD-3-Clause"), name
        if len(entry.sha256) == 8:
            assert entry.url.endswith(f"-{entry.sha256}.pth"), name
    text = (Path(module.__file__).parent / "published.json").read_text()
    assert len(json.loads(text)) == len(entries)


def test_torchvisions_names_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import MobileNet_V2_Weights

    for weights in MobileNet_V2_Weights:
        entry = published()[f"torchvision:{weights.name}"]
        assert entry.url == weights.url
        assert entry.figure.startswith(f"{weights.meta['_metrics']['ImageNet-1K']['acc@1']} top-1")
        assert locate(f"torchvision:{weights.name}") == f"torchvision:{weights.name}"


def test_one_line_from_a_name_to_a_detector(
    monkeypatch: pytest.MonkeyPatch,
    site: tuple[Path, str],
    archive: Path,
    own_cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, address = site
    (folder / "coco.tar.gz").write_bytes(archive.read_bytes())
    publish(monkeypatch, "coco_in_a_test", f"{address}/coco.tar.gz", sha256(archive))
    detector = load_detector("coco_in_a_test", device="cpu", score_threshold=0.0)
    assert detector.class_names[:2] == ("person", "bicycle")
    assert len(detector.class_names) == 80
    found = detector(np.zeros((60, 80, 3), np.uint8))
    assert found.boxes.shape[1] == 4
    assert detector.info.licence == "CC0-1.0"
    assert detector.info.source.startswith(f"{address}/coco.tar.gz; frozen_inference_graph.pb")
    assert sorted(path.name for path in own_cache.iterdir() if path.suffix != ".lock") == [
        "coco_in_a_test.v2.safetensors",
        "downloads",
    ]
    # The next time nothing is asked of the network.
    number = len(Server.asked)
    read_detector(locate("coco_in_a_test"))
    assert locate("coco_in_a_test") == own_cache / "coco_in_a_test.v2.safetensors"
    assert len(Server.asked) == number

    monkeypatch.chdir(tmp_path)
    import cv2

    from detection.cli.video import main as demo_video

    cv2.imwrite("image.png", np.zeros((64, 64, 3), np.uint8))
    demo_video(["coco_in_a_test", "--source", "image.png", "--json", "out.jsonl", "--device", "cpu"])
    assert json.loads((tmp_path / "out.jsonl").read_text())["frame"] == 0


def test_a_broken_download_goes_on(
    monkeypatch: pytest.MonkeyPatch, site: tuple[Path, str], archive: Path, own_cache: Path
) -> None:
    folder, address = site
    (folder / "coco.tar.gz").write_bytes(archive.read_bytes())
    size = archive.stat().st_size
    publish(monkeypatch, "coco", f"{address}/coco.tar.gz", sha256(archive))
    Server.cut = size // 3
    with pytest.raises(OSError, match=rf"closed after {size // 3} of {size} bytes.*goes on from where it broke off"):
        fetch("coco")
    part = own_cache / "downloads" / "coco.tar.gz.part"
    assert part.stat().st_size == size // 3
    Server.cut = None
    assert fetch("coco").read_bytes() == archive.read_bytes()
    assert Server.asked == [None, f"bytes={size // 3}-"]
    assert not part.exists()


def test_a_server_without_ranges_sends_all_again(
    monkeypatch: pytest.MonkeyPatch, site: tuple[Path, str], archive: Path, own_cache: Path
) -> None:
    folder, address = site
    (folder / "coco.tar.gz").write_bytes(archive.read_bytes())
    publish(monkeypatch, "coco", f"{address}/coco.tar.gz", sha256(archive)[:8])
    (own_cache / "downloads").mkdir(parents=True)
    (own_cache / "downloads" / "coco.tar.gz.part").write_bytes(b"the beginning of something else")
    Server.ranges = False
    assert fetch("coco").read_bytes() == archive.read_bytes()


def test_a_part_that_is_whole(
    monkeypatch: pytest.MonkeyPatch, site: tuple[Path, str], archive: Path, own_cache: Path
) -> None:
    folder, address = site
    (folder / "coco.tar.gz").write_bytes(archive.read_bytes())
    publish(monkeypatch, "coco", f"{address}/coco.tar.gz", sha256(archive))
    (own_cache / "downloads").mkdir(parents=True)
    (own_cache / "downloads" / "coco.tar.gz.part").write_bytes(archive.read_bytes())
    assert fetch("coco").read_bytes() == archive.read_bytes()


def test_a_wrong_hash_is_refused(
    monkeypatch: pytest.MonkeyPatch, site: tuple[Path, str], archive: Path, own_cache: Path
) -> None:
    folder, address = site
    (folder / "coco.tar.gz").write_bytes(archive.read_bytes() + b"more")
    publish(monkeypatch, "coco", f"{address}/coco.tar.gz", sha256(archive))
    message = rf"has SHA-256 [0-9a-f]{{64}}, expected {sha256(archive)} \(a test\); it was removed; try again, or put"
    with pytest.raises(ValueError, match=message):
        load_detector("coco", device="cpu")
    assert [path.name for path in (own_cache / "downloads").iterdir() if path.suffix != ".lock"] == []
    assert not list(own_cache.glob("*.safetensors"))


def test_without_a_network_the_place_is_said_and_a_file_put_there_is_taken(
    monkeypatch: pytest.MonkeyPatch, archive: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(monkeypatch, "coco", "http://127.0.0.1:9/coco.tar.gz", sha256(archive))
    place = own_cache / "downloads" / "coco.tar.gz"
    with pytest.raises(OSError, match=rf"http://127.0.0.1:9/coco.tar.gz could not be downloaded.*put it at {place}"):
        load_detector("coco", device="cpu")
    place.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"remove it, or put the right file there"):
        load_detector("coco", device="cpu")
    place.write_bytes(archive.read_bytes())
    assert len(load_detector("coco", device="cpu").class_names) == 80
    assert fetch_converted("coco").is_file()


def test_missing_on_the_server(monkeypatch: pytest.MonkeyPatch, site: tuple[Path, str]) -> None:
    publish(monkeypatch, "coco", f"{site[1]}/gone.tar.gz", "")
    with pytest.raises(OSError, match=r"gone.tar.gz could not be downloaded \(HTTP Error 404: no such file\)"):
        fetch("coco")


def test_a_classifier_from_a_local_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    classifier = Classifier(ClassifierConfig(backbone=MobileNetV2Config(width=0.35)), 4)
    torch.save(to_timm(classifier), tmp_path / "timm.pth")
    publish(monkeypatch, "small", (tmp_path / "timm.pth").as_uri(), sha256(tmp_path / "timm.pth"), "classifier")
    path = locate("small")
    metadata = read_metadata(path)
    assert (metadata["original_layout"], metadata["licence"]) == ("timm", "CC0-1.0")
    convert_weights(["small", str(tmp_path / "out.safetensors")])
    assert read_metadata(tmp_path / "out.safetensors")["source"].startswith("file://")


def test_folded_classifiers_need_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"convert-weights mobilenet_v2_1.0_224_quant OUT.*--statistics-from FOLDER"):
        locate("mobilenet_v2_1.0_224_quant")


def test_what_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean ssdlite_mobilenet_v2_coco.*published are: "):
        locate("ssdlite_mobilenet_v2_coc")
    with pytest.raises(FileNotFoundError, match=r"best.pt"):
        load_detector(tmp_path / "best.pt")
    (tmp_path / "graph.pb").write_bytes(b"\n\0")
    with pytest.raises(ValueError, match=r"graph.pb is in another library's format; convert it first: litedet conv"):
        load_detector(tmp_path / "graph.pb")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ssdlite_mobilenet_v2_coco").write_text("a file of that name comes first")
    assert locate("ssdlite_mobilenet_v2_coco") == "ssdlite_mobilenet_v2_coco"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir().name == "cache"
    monkeypatch.delenv("LITEDET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/litedet")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "litedet"
