"""A page that runs a detector in a browser: what is in its folder, and what headless Chromium finds with it."""

import http.server
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from shared_data import SHARED, needs_shared
from test_predictor import small_detector

from backbones.errors import UserError
from detection import load_detector
from detection.cli.export import main as export_command
from detection.export import onnx as onnx_export
from detection.export import web_runtime
from detection.export.calibration import network_inputs
from detection.export.module import RawHeads
from detection.export.run import ExportJob, export
from detection.export.web import PAGE_FILES, write_page
from detection.export.web_runtime import VERSION, WASM_FILES, WEBGPU_FILES, locate_runtime, runtime_files
from detection.images.place import place
from detection.inference.exported import open_exported
from detection.inference.runners import to_onnx
from detection.structures import Detections
from detection.weights.native import read_detector, save_detector

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PERSON_GRAPH = SHARED / "weights" / "ssdlite_mobilenet_v2_person_frozen_graph.pb"
PHOTO = SHARED / "data" / "coco_val2017_mix" / "images" / "000000001000.jpg"

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium (apt-get install chromium) and the package playwright, which are not both here",
)
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="needs the packages of litedet[export]",
)


# --- the runtime, without npm and without a network


def packed(folder: Path, files: dict[str, bytes], name: str = "onnxruntime-web") -> Path:
    """A package as npm packs it."""
    path = folder / f"{name}-{VERSION}.tgz"
    about = json.dumps({"name": name, "version": VERSION, "license": "MIT"}).encode()
    with tarfile.open(path, "w:gz") as archive:
        for where, content in {"package/package.json": about, **files}.items():
            member = tarfile.TarInfo(where)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def all_files() -> dict[str, bytes]:
    return {f"package/dist/{name}": name.encode() for name in (*WASM_FILES, *WEBGPU_FILES)}


def test_the_runtime_is_taken_from_a_package(tmp_path: Path) -> None:
    found = runtime_files(packed(tmp_path, all_files()))
    assert found.pop("README.txt") == b"onnxruntime-web 1.30.0, licence MIT, as published on the npm registry.\n"
    assert found == {name: name.encode() for name in (*WASM_FILES, *WEBGPU_FILES)}
    assert runtime_files(packed(tmp_path, all_files()), webgpu=False).keys() == {*WASM_FILES, "README.txt"}


def test_packages_that_will_not_do(tmp_path: Path) -> None:
    files = all_files()
    del files["package/dist/ort.webgpu.bundle.min.mjs"]
    with pytest.raises(UserError, match=r"has no package/dist/ort\.webgpu\.bundle\.min\.mjs; onnxruntime-web 1\."):
        runtime_files(packed(tmp_path, files))
    with pytest.raises(UserError, match="is the package left-pad, not onnxruntime-web"):
        runtime_files(packed(tmp_path, all_files(), name="left-pad"))
    (tmp_path / "cut.tgz").write_bytes(packed(tmp_path, all_files()).read_bytes()[:60])
    with pytest.raises(UserError, match=r"cut\.tgz cannot be read as a package of npm"):
        runtime_files(tmp_path / "cut.tgz")
    with pytest.raises(FileNotFoundError, match=r"no\.tgz"):
        locate_runtime(str(tmp_path / "no.tgz"))
    with pytest.raises(UserError, match="'newest' is neither a version"):
        locate_runtime("newest")


def fake_npm(folder: Path, body: str) -> None:
    folder.mkdir()
    program = folder / "npm"
    program.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    program.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="a program that is a script")
def test_npm_is_asked_once_and_its_package_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITEDET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    kept = tmp_path / "cache" / f"onnxruntime-web-{VERSION}.tgz"
    with pytest.raises(UserError, match="there is no npm here") as refused:
        locate_runtime()
    for part in (f"npm pack onnxruntime-web@{VERSION}", kept.name, str(kept.parent), "--onnxruntime-web"):
        assert part in str(refused.value)

    fake_npm(tmp_path / "failing", "print('404 Not Found', file=sys.stderr); sys.exit(1)")
    monkeypatch.setenv("PATH", str(tmp_path / "failing"))
    with pytest.raises(UserError, match=r"npm says: 404 Not Found; .* put onnxruntime-web-9\.9\.9\.tgz into"):
        locate_runtime("9.9.9")
    assert not kept.parent.exists()

    folder = "sys.argv[sys.argv.index('--pack-destination') + 1]"
    write = f"open({folder} + '/onnxruntime-web-' + sys.argv[2].split('@')[1] + '.tgz', 'wb').write(b'it')"
    fake_npm(tmp_path / "working", write)
    monkeypatch.setenv("PATH", str(tmp_path / "working"))
    assert locate_runtime() == kept
    assert kept.read_bytes() == b"it"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert locate_runtime() == kept
    assert locate_runtime(str(kept)) == kept


def test_every_file_of_the_page_goes_out() -> None:
    folder = Path(web_runtime.__file__).parent / "web_files"
    assert tuple(sorted(path.name for path in folder.iterdir() if path.is_file())) == PAGE_FILES
    page = (folder / "index.html").read_text()
    assert "http://" not in page + (folder / "style.css").read_text() + (folder / "app.js").read_text()
    assert "https://" not in page


def test_mistakes_are_told_before_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["d.pt", "--images", str(tmp_path), "--out", str(tmp_path / "page")]
    for arguments, message in (
        (["--to", "web", "--raw"], "--to web reads detections; leave --raw out"),
        (["--to", "onnx", "--onnxruntime-web", "1.30.0"], "--onnxruntime-web is for --to web, not onnx"),
        (["--to", "web", "--onnxruntime-web", str(packed(tmp_path, {}))], "has no package/dist/ort.wasm"),
    ):
        with pytest.raises(SystemExit):
            export_command([*common, *arguments])
        assert message in capsys.readouterr().err
    (tmp_path / "page").mkdir()
    with pytest.raises(SystemExit):
        export_command([*common, "--to", "web"])
    assert "exists; name a folder that does not" in capsys.readouterr().err


def test_a_page_gets_sums_that_a_browser_rounds_as_python_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[ExportJob] = []

    def seen(job: ExportJob) -> None:
        jobs.append(job)
        raise UserError("far enough")

    monkeypatch.setattr("detection.export.run.export", seen)
    package = str(packed(tmp_path, all_files()))
    for more in (["--to", "onnx", "--out", "d.onnx"], ["--to", "web", "--out", "page", "--onnxruntime-web", package]):
        with pytest.raises(SystemExit):
            export_command(["d.pt", "--images", str(tmp_path), *more])
    assert [(job.to, job.portable) for job in jobs] == [("onnx", False), ("onnx", True)]


# --- in Chromium


@pytest.fixture(scope="module")
def runtime() -> Path:
    """The real package: of the cache, else by npm."""
    try:
        return locate_runtime()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, runtime: Path) -> Path:
    """The page of a detector whose answers are as large as a trained one's, an image, a video, and a camera's frames."""
    folder = tmp_path_factory.mktemp("web")
    model, info = small_detector()
    info.thresholds = (0.5, 0.6)
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            if name.endswith("weight"):
                parameter *= 3
    save_detector(folder / "d.safetensors", model, info)
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (200, 150))
    (folder / "images").mkdir()
    cv2.imwrite(str(folder / "images" / "a.png"), image)
    job = ExportJob(checkpoint=folder / "d.safetensors", to="onnx", out=folder / "model.onnx", images=folder / "images")
    export(job, say=lambda line: None)
    write_page(folder / "model.onnx", folder / "page", runtime)
    write_frames(folder / "video.webm", [image] * 20, "libvpx")
    write_frames(folder / "camera.y4m", [image] * 20, "rawvideo")
    return folder


def write_frames(path: Path, frames: list[np.ndarray], codec: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def browser(scene: Path) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    camera.append(f"--use-file-for-fake-video-capture={scene / 'camera.y4m'}")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        yield opened
        opened.close()


class Page:
    """A page of ``litedet export --to web``, opened, and what went wrong in it."""

    def __init__(self, browser: Any, url: str, width: int = 1400, height: int = 900) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height})
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)  # a busy machine
        self.troubles: list[str] = []
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.troubles.append(said.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        own = (url, "blob:", "data:")
        self.page.on("request", lambda sent: sent.url.startswith(own) or self.troubles.append(sent.url))
        self.page.goto(url)
        self.wait_for("ready")

    def wait_for(self, state: str) -> None:
        self.page.wait_for_selector(f"body[data-state={state}]")  # an error may stand there from before
        assert self.page.evaluate("document.body.dataset.state") == state, self.page.inner_text("#status")

    def wait_until(self, condition: str) -> None:
        """JavaScript that becomes true. Playwright's own way of it is what the page's policy forbids."""
        for _ in range(2400):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(condition)

    def look_at(self, image: Path) -> list[tuple[str, list[float]]]:
        """Gives it an image; class, score and box of what it lists."""
        self.page.set_input_files("#file", str(image))
        self.wait_for("done")
        return self.listed()

    def listed(self) -> list[tuple[str, list[float]]]:
        self.page.evaluate("document.getElementById('list').open = true")
        self.page.wait_for_timeout(200)  # the page hears of it a moment later
        rows = self.page.eval_on_selector_all(
            "#rows tr", "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
        )
        return [(row[0], [float(value) for value in row[1:]]) for row in rows]

    def set_threshold(self, value: float) -> None:
        self.page.fill("#threshold", str(value))

    def close(self) -> None:
        self.context.close()
        assert self.troubles == []


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Page]]:
    """Opens a folder's page as python -m http.server serves it."""
    pages, servers = [], []

    def open_page(folder: Path, **size: int) -> Page:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        pages.append(Page(browser, f"http://localhost:{server.server_port}", **size))
        return pages[-1]

    yield open_page
    for server in servers:
        server.shutdown()
        server.server_close()
    for page in pages:
        page.close()


def assert_same(
    listed: list[tuple[str, list[float]]], expected: Detections, score: float = 0.01, pixels: float = 1
) -> None:
    assert [name for name, _ in listed] == expected.names()
    assert len(listed) > 0
    for (_, row), box, one in zip(listed, expected.boxes.tolist(), expected.scores.tolist(), strict=True):
        assert row[0] == pytest.approx(one, abs=score)
        assert row[1:] == pytest.approx(box, abs=pixels)


@needs_browser
@needs_onnx
@pytest.mark.slow
def test_the_page_finds_what_python_finds(scene: Path, opened: Callable[..., Page]) -> None:
    image = scene / "images" / "a.png"
    page = opened(scene / "page")
    assert page.page.evaluate("document.body.dataset.backend") == "wasm"
    assert page.page.evaluate("document.body.dataset.threads") == "1"  # python -m http.server sends no headers for more
    assert_same(page.look_at(image), load_detector(scene / "model.onnx")(image))  # each class from its own threshold on
    assert page.page.is_checked("#recorded")
    page.set_threshold(0.3)
    assert not page.page.is_checked("#recorded")
    assert_same(page.listed(), load_detector(scene / "model.onnx", score_threshold=0.3)(image))
    page.set_threshold(1)
    assert page.listed() == []
    assert page.page.inner_text("#count") == "0"


@needs_browser
@needs_onnx
@pytest.mark.slow
def test_a_video_and_a_camera(scene: Path, opened: Callable[..., Page]) -> None:
    page = opened(scene / "page", width=400, height=800)
    page.page.set_input_files("#file", str(scene / "video.webm"))
    page.wait_for("playing")
    page.wait_until("Number(document.getElementById('rate').textContent) > 0")
    assert page.page.inner_text("#pause") == "Pause"
    page.wait_until("document.getElementById('pause').textContent === 'Play'")  # it has come to its end
    page.set_threshold(0.3)
    assert len(page.listed()) > 0
    page.page.click("#camera")
    page.wait_until("document.getElementById('camera').textContent === 'Stop the camera'")
    assert not page.page.is_visible("#pause")
    page.wait_until("Number(document.getElementById('rate').textContent) > 0")
    assert len(page.listed()) > 0  # the fake camera shows the image
    page.page.click("#camera")
    page.wait_for("done")
    # As wide as the telephone, whatever it lists.
    assert page.page.evaluate("document.documentElement.scrollWidth <= 400")


@needs_browser
@needs_onnx
@pytest.mark.slow
def test_with_headers_it_has_threads_and_says_what_it_cannot_read(scene: Path, browser: Any) -> None:
    command = [sys.executable, str(scene / "page" / "serve.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        page = Page(browser, server.stdout.readline().strip())
        try:
            assert page.page.evaluate("crossOriginIsolated")
            assert int(page.page.evaluate("document.body.dataset.threads")) == min(
                page.page.evaluate("navigator.hardwareConcurrency"), 4
            )
            (scene / "text.png").write_text("no image")
            page.page.set_input_files("#file", str(scene / "text.png"))
            page.page.wait_for_selector("body[data-state=error]")
            assert "text.png is not an image or a video" in page.page.inner_text("#status")
            assert len(page.look_at(scene / "images" / "a.png")) > 0  # and goes on
            page.close()
        finally:
            server.terminate()


@needs_browser
@needs_onnx
@pytest.mark.slow
def test_pixels_are_those_of_training(scene: Path, opened: Callable[..., Page]) -> None:
    page = opened(scene / "page")
    generator = np.random.default_rng(0)
    run = """async ([given, width, height, input]) => {
        const { place } = await import("./pixels.js");
        const found = place({ data: Uint8ClampedArray.from(given), width, height }, input);
        return [[...found.planes], found.scaleX, found.scaleY, found.left, found.top];
    }"""
    for height, width, mode in (
        (60, 80, "stretch"),  # a little smaller
        (30, 32, "stretch"),  # larger
        (200, 150, "stretch"),  # much smaller: means of areas
        (20, 150, "stretch"),  # one side larger, one much smaller
        (61, 81, "letterbox"),
        (200, 150, "letterbox"),
        (60, 80, "stretch_tensorflow"),
        (40, 48, "stretch"),  # as it is
    ):
        image = cv2.resize(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8), (width, height))
        rgba = np.dstack((image, np.full(image.shape[:2], 255, np.uint8)))
        given = {"width": 48, "height": 40, "resize": mode, "fill": [124, 116, 104]}
        planes, *where = page.page.evaluate(run, [rgba.ravel().tolist(), width, height, given])
        expected, placement = place(image, (40, 48), mode, (124, 116, 104))  # type: ignore[arg-type]
        found = np.array(planes).reshape(3, 40, 48).transpose(1, 2, 0)
        assert np.abs(found - expected.astype(int)).max() <= 1, (height, width, mode)
        assert where == pytest.approx(list(placement))


@needs_browser
@needs_onnx
@needs_shared("weights/ssdlite_mobilenet_v2_person_frozen_graph.pb", "data/coco_val2017_mix")
@pytest.mark.slow
def test_a_photograph_in_float_and_in_eight_bits(tmp_path: Path, runtime: Path, opened: Callable[..., Page]) -> None:
    from detection.cli.convert_weights import main as convert_weights

    convert_weights([str(PERSON_GRAPH), str(tmp_path / "person.safetensors")])
    (tmp_path / "images").mkdir()
    shutil.copy(PHOTO, tmp_path / "images")
    job = ExportJob(
        checkpoint=tmp_path / "person.safetensors", to="onnx", out=tmp_path / "float.onnx", images=tmp_path / "images"
    )
    export(job, say=lambda line: None)
    write_page(tmp_path / "float.onnx", tmp_path / "float", runtime)
    expected = load_detector(tmp_path / "float.onnx", score_threshold=0.25)(PHOTO)
    assert len(expected) > 8
    assert_same(opened(tmp_path / "float").look_at(PHOTO), expected)

    # WebAssembly computes the same eight-bit sums as a processor, to the last bit, of an image of the input's size. Resizing
    # differs between the two by a level here and there, and with OpenCV 4 by some: too much for one pixel.
    eight_bits(tmp_path)
    write_page(tmp_path / "int8.onnx", tmp_path / "int8", runtime)
    assert not (tmp_path / "int8" / "ort" / WEBGPU_FILES[0]).exists()
    cv2.imwrite(str(tmp_path / "placed.png"), cv2.resize(cv2.imread(str(PHOTO)), (300, 300)))
    detector, page = load_detector(tmp_path / "int8.onnx", score_threshold=0.25), opened(tmp_path / "int8")
    expected = detector(tmp_path / "placed.png")
    assert len(expected) > 5
    assert_same(page.look_at(tmp_path / "placed.png"), expected, score=0.0006, pixels=0.06)
    if int(cv2.__version__.split(".")[0]) >= 5:
        assert_same(opened(tmp_path / "int8").look_at(PHOTO), detector(PHOTO))


def eight_bits(folder: Path) -> None:
    """int8.onnx beside float.onnx: the variant that takes least time, its ranges from the one image."""
    model, info = read_detector(folder / "person.safetensors", None)
    record = open_exported(folder / "float.onnx").record
    prepared = onnx_export._prepared(to_onnx(RawHeads(model).model))
    pixels = network_inputs([PHOTO], info.model)
    file = onnx_export._quantised(
        prepared, onnx_export.tail_onnx(model, record.info.postprocess), pixels, portable=True
    )
    file.write(folder / "int8.onnx", replace(record, precision="int8"))
