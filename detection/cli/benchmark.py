"""LiteDet and what it is measured against, side by side: each stage runs in turn, ours, theirs, ours, theirs, ...

python tools/benchmark.py                       every stage, with drawn images; some ten minutes on two cores
python tools/benchmark.py --stages predict train --rounds 9
python tools/benchmark.py --images DIR --annotations FILE --weights RUN/best.pt
python tools/benchmark.py --count               parameters, multiply-adds and activations by part
python tools/benchmark.py --scale               what a data set's size does to the cost of an image
"""

import contextlib
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor, nn

from backbones.classifier import Classifier, ClassifierConfig
from backbones.errors import UserError
from detection.benchmark import count, drawn, scale
from detection.benchmark.peer import as_peer_input, build_peer, build_peer_loader
from detection.data.augment import TrainTransform, ssd_augment
from detection.data.coco import CocoIndex
from detection.data.drawn import draw_detection_set
from detection.data.loader import DetectionDataset, build_loader
from detection.engine.optim import OptimConfig, build_optimizer, parameter_groups
from detection.engine.runtime import main_errors, open_runtime
from detection.evaluation.coco_ap import FIGURES, CocoEvaluator
from detection.evaluation.table import write_json
from detection.inference.predictor import Predictor, read_image
from detection.inference.runners import Backend, build_runner
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.postprocess import PostprocessConfig
from detection.structures import Batch
from detection.training.losses import TrainingStep
from detection.training.ssd_loss import SSDLossConfig
from detection.weights.info import DetectorInfo
from detection.weights.native import read_detector

Stage = Literal["predict", "backends", "postprocess", "train", "loader", "open", "evaluate"]
STAGES: tuple[Stage, ...] = ("predict", "backends", "postprocess", "train", "loader", "open", "evaluate")
SETTLE_SECONDS = 0.01  # threads keep spinning for some milliseconds after their work; not at the other side's cost
NUM_IMAGES = 96  # read from --images, or drawn
_PACKAGES: dict[Backend, tuple[str, ...]] = {
    "torch": (),
    "compile": (),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}


@dataclass(kw_only=True, slots=True)
class BenchmarkConfig:
    stages: tuple[Stage, ...] = STAGES
    """What to measure."""
    count: bool = False
    """Print parameters, multiply-adds and activations by part, and nothing else."""
    scale: bool = False
    """Print costs per image for data sets of growing size, and nothing else."""
    out: Path = Path("runs/benchmark")
    """Folder for benchmark.json and benchmark.png."""
    weights: Path | None = None
    """A detector (best.pt or .safetensors) with square input. None: drawn weights whose scores are spread as after a training
    on COCO, 80 classes, 320 px."""
    images: Path | None = None
    """Folder of real images; needs --annotations. None: drawn images, 640x480."""
    annotations: Path | None = None
    """COCO json of --images."""
    threads: int = 2
    """Threads of torch, of OpenCV and of the backends, on both sides."""
    rounds: int = 21
    """Runs of each side in the short stages. The long ones take a third of it, opening five, AP two."""
    backends: tuple[Backend, ...] = ("compile", "onnxruntime", "openvino")
    """What the stage "backends" tries. The last two need pip install 'litedet[export]'."""
    batch_size: int = 24
    """Images of a batch in training and loading."""
    open_images: Annotated[int, tyro.conf.arg(aliases=["--open-pictures"])] = 118_287
    """Images of the annotation file that is opened."""
    open_boxes: int = 860_001
    """Boxes in it; with these two numbers it has the size of COCO's train2017."""
    evaluate_images: Annotated[int, tyro.conf.arg(aliases=["--evaluate-pictures"])] = 5_000
    """Images that AP is computed on, with 7.4 boxes and 100 detections each."""
    scale_sizes: tuple[int, ...] = (1_000, 10_000, 118_287)
    """Numbers of images that --scale compares."""
    cache: Path = Path(tempfile.gettempdir()) / "litedet-benchmark"
    """Folder for what is drawn; it is used again."""

    def validate(self) -> None:
        """Raises UserError for values that make no sense."""
        for name in ("threads", "rounds", "batch_size", "open_images", "open_boxes", "evaluate_images"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.batch_size > NUM_IMAGES:
            raise UserError(f"--batch-size {self.batch_size} is more than the {NUM_IMAGES} images that are read")
        if (self.images is None) != (self.annotations is None):
            raise UserError("--images and --annotations go together: a folder and the COCO json of its images")
        if "backends" in self.stages:
            for backend in self.backends:
                for package in _PACKAGES[backend]:
                    if find_spec(package) is None:
                        raise UserError(
                            f"--backends {backend} needs the package {package}, which is not installed; "
                            "pip install 'litedet[export]', or leave it out"
                        )
        if not self.scale_sizes or min(self.scale_sizes) < 64:
            raise UserError(f"--scale-sizes must be at least 64 each, got {self.scale_sizes}")


@dataclass(kw_only=True, slots=True)
class Comparison:
    """One row of the result.

    Attributes:
        name: what was measured.
        peer: what it was measured against.
        ours, theirs: medians, in ``unit``.
        ratio: ours over theirs; below 1 we are ahead.
        bar: the ratio that the project asks for on two cores, None where it asks for none.
        spread: quartiles of the ratios of neighbouring runs.
        unit: of the medians.
        runs: of each side.
    """

    name: str
    peer: str
    ours: float
    theirs: float
    ratio: float
    bar: float | None
    spread: tuple[float, float]
    unit: str = "ms"
    runs: int = 1


@dataclass(kw_only=True, slots=True)
class BenchmarkResult:
    """What ``benchmark.json`` holds."""

    environment: dict[str, str]
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@main_errors
def main(argv: Sequence[str] | None = None) -> BenchmarkResult:
    config = tyro.cli(BenchmarkConfig, args=sys.argv[1:] if argv is None else argv, description=__doc__)
    config.validate()
    torch.set_num_threads(config.threads)
    cv2.setNumThreads(config.threads)
    result = BenchmarkResult(environment=environment(config.threads))
    print("\n".join(f"{name}: {value}" for name, value in result.environment.items()), end="\n\n", flush=True)
    if config.count:
        print_counts()
    elif config.scale:
        folder = _images(config)[0]
        print(scale.table(scale.measure_scale(config.cache, folder, config.scale_sizes)))
    else:
        run = Benchmark(config, result)
        for stage in config.stages:
            for comparison in getattr(run, stage)():
                result.comparisons.append(comparison)
                print(row(comparison), flush=True)
            write_json(config.out / "benchmark.json", asdict(result))  # after each: the stages are long
        for note in result.notes:
            print(note)
        draw_chart(result, config.out / "benchmark.png")
        print(f"\nwritten: {config.out / 'benchmark.json'}, {config.out / 'benchmark.png'}")
    return result


def interleave(sides: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Milliseconds of each run of each side; the sides take turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warm_up, rounds):
        for name, run in sides.items():
            settled = time.perf_counter() + SETTLE_SECONDS
            while (start := time.perf_counter()) < settled:  # not asleep: the processor would have to wake up again
                pass
            run()
            if number >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def compare(
    name: str, peer: str, ours: Sequence[float], theirs: Sequence[float], bar: float | None, unit: str = "ms"
) -> Comparison:
    """Medians and their ratio of runs that took turns."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return Comparison(
        name=name,
        peer=peer,
        ours=statistics.median(ours),
        theirs=statistics.median(theirs),
        ratio=statistics.median(ours) / statistics.median(theirs),
        bar=bar,
        spread=(ratios[len(ratios) // 4], ratios[(3 * len(ratios) - 1) // 4]),
        unit=unit,
        runs=len(ours),
    )


class Benchmark:
    """The stages. Each method yields one comparison or more; what several stages need is made once."""

    def __init__(self, config: BenchmarkConfig, result: BenchmarkResult) -> None:
        self.config = config
        self.result = result
        self.folder, annotations = _images(config)
        full = CocoIndex.read(annotations)
        self.index = _first(full, NUM_IMAGES)
        if len(self.index) < config.batch_size:
            raise UserError(f"{annotations} has {len(self.index)} images, fewer than --batch-size {config.batch_size}")
        self.images = [
            read_image(self.folder / self.index.file_name(position)) for position in range(min(8, len(self.index)))
        ]
        if config.weights is None:
            torch.manual_seed(0)
            self.model = SSDLite(SSDLiteConfig(), drawn.NUM_CLASSES)
            height, width = self.model.config.input_size
            small = np.stack([cv2.resize(image, (width, height)) for image in self.images])
            drawn.draw_weights(self.model, torch.from_numpy(small).permute(0, 3, 1, 2))
            names = tuple(f"class {number}" for number in range(drawn.NUM_CLASSES))
            self.info = DetectorInfo(
                model=self.model.config,
                postprocess=PostprocessConfig(),
                class_names=names,
                category_ids=tuple(range(drawn.NUM_CLASSES)),
            )
            result.notes.append("weights: drawn, scores spread as after a training on COCO")
        else:
            model, self.info = read_detector(config.weights)
            if not isinstance(model, SSDLite):
                raise UserError(
                    f"{config.weights} holds a detector of kind {model.config.kind}; the peer is an SSDLite"
                )
            self.model = model
            self.info.postprocess.score_threshold = 0.001
            result.notes.append(f"weights: {config.weights.name}, {len(self.info.class_names)} classes")
        self.peer = build_peer(self.model.eval(), self.info.postprocess)
        self._turn = 0

    def _image(self) -> NDArray[np.uint8]:
        """One of the images; both sides of a round see the same."""
        self._turn += 1
        return self.images[self._turn // 2 % len(self.images)]

    def _predictor(self, backend: Backend) -> Predictor:
        return Predictor(build_runner(self.model, backend, torch.device("cpu")), self.info)

    def _predict_peer(self) -> object:
        with torch.inference_mode():
            return self.peer([as_peer_input(self._image())])

    def predict(self) -> Iterator[Comparison]:
        """Array in memory -> detections, torch alone."""
        ours = self._predictor("torch")
        times = interleave(
            {"ours": lambda: ours(self._image()), "peer": self._predict_peer}, self.config.rounds, warm_up=3
        )
        yield compare("predict, torch", "torchvision", times["ours"], times["peer"], bar=0.55)

    def backends(self) -> Iterator[Comparison]:
        """The same with other backends; the bar is for the fastest."""
        compared = []
        for backend in self.config.backends:
            ours = self._predictor(backend)
            times = interleave(
                {"ours": lambda ours=ours: ours(self._image()), "peer": self._predict_peer},  # type: ignore[misc]
                self.config.rounds,
                warm_up=3,
            )
            compared.append(compare(f"predict, {backend}", "torchvision", times["ours"], times["peer"], bar=None))
        min(compared, key=lambda one: one.ratio).bar = 0.35
        yield from compared

    def postprocess(self) -> Iterator[Comparison]:
        """Raw predictions -> detections in the image's pixels."""
        height, width = self.model.config.input_size
        ours = self._predictor("torch")
        with torch.inference_mode():
            inputs = [torch.from_numpy(cv2.resize(p, (width, height))).permute(2, 0, 1)[None] for p in self.images]
            raws = [ours.runner(image) for image in inputs]
            sizes = [tuple(image.shape[:2]) for image in self.images]
            placements = [torch.tensor([[width / w, height / h, 0.0, 0.0]]) for h, w in sizes]

            def next_one() -> int:
                self._turn += 1
                return self._turn // 2 % len(raws)

            def own() -> object:
                place = next_one()
                return ours.postprocess(raws[place], placements[place], torch.tensor([sizes[place]]))

            def peer() -> object:
                place = next_one()
                outputs = {"bbox_regression": raws[place].codes, "cls_logits": raws[place].class_logits}
                found = self.peer.postprocess_detections(outputs, [raws[place].anchors], [(height, width)])
                return self.peer.transform.postprocess(found, [(height, width)], [sizes[place]])

            times = interleave({"ours": own, "peer": peer}, self.config.rounds * 3, warm_up=8)
            above = statistics.mean(
                int((ours.postprocess.scores(raw.class_logits) > self.info.postprocess.score_threshold).sum())
                for raw in raws
            )
        self.result.notes.append(
            f"post-processing: {above:.0f} of {raws[0].class_logits[0, :, 1:].numel()} pairs above 0.001"
        )
        yield compare("post-processing", "torchvision", times["ours"], times["peer"], bar=0.15)

    def train(self) -> Iterator[Comparison]:
        """Forward, loss, backward and optimiser of one batch that is in memory already."""
        size = self.config.batch_size
        dataset = DetectionDataset(self.index, self.folder, TrainTransform(ssd_augment(), self.model.config.input_size))
        batch = next(iter(build_loader(dataset, batch_size=size)))
        batch.labels %= self.model.num_classes
        context = multiprocessing.get_context("spawn")  # a process each, because ours changes how memory is kept
        calls, processes = {}, []
        for side in ("ours", "default", "channels-last"):
            here, there = context.Pipe()
            processes.append(
                context.Process(
                    target=_training_side,
                    args=(
                        side,
                        self.model.config,
                        self.info,
                        self.model.state_dict(),
                        batch,
                        self.config.threads,
                        there,
                    ),
                    daemon=True,
                )
            )
            processes[-1].start()
            calls[side] = partial(_ask, here)
        times = interleave(calls, max(self.config.rounds // 3, 2), warm_up=2)
        for process in processes:
            process.terminate()
            process.join()
        rate = 1e3 * size / statistics.median(times["ours"])
        self.result.notes.append(f"training: {rate:.1f} images a second")
        yield compare(f"training step, batch {size}", "torchvision", times["ours"], times["default"], bar=0.42)
        yield compare(
            f"training step, batch {size}", "torchvision channels-last", times["ours"], times["channels-last"], bar=0.97
        )

    def loader(self) -> Iterator[Comparison]:
        """JPEG files -> augmented batches, one worker, SSD's augmentation against the ssdlite preset of the references.

        Torchvision's batch holds images of their own size: its network resizes them, and that time is not counted here.
        """
        dataset = DetectionDataset(self.index, self.folder, TrainTransform(ssd_augment(), self.model.config.input_size))
        ours = build_loader(dataset, batch_size=self.config.batch_size, num_workers=1)
        theirs = build_peer_loader(self.index, self.folder, self.config.batch_size, num_workers=1)

        def drain(batches: Any) -> Callable[[], None]:
            def run() -> None:
                for _ in batches:
                    pass

            return run

        times = interleave({"ours": drain(ours), "peer": drain(theirs)}, max(self.config.rounds // 3, 2))
        images = len(ours) * self.config.batch_size
        per_image = {name: [run / images for run in runs] for name, runs in times.items()}
        yield compare("loading an image, 1 worker", "torchvision", per_image["ours"], per_image["peer"], bar=0.50)

    def open(self) -> Iterator[Comparison]:
        """Opening a COCO json, each time in a process of its own: seconds, and megabytes above those of the imports."""
        config = self.config
        path = config.cache / f"open_{config.open_images}_{config.open_boxes}.json"
        if not path.is_file():
            print(f"drawing {path} ...", flush=True)
            drawn.draw_annotations(path, config.open_images, config.open_boxes)
        first, second, peer = [], [], []
        for _ in range(5):
            shutil.rmtree(config.cache / "index", ignore_errors=True)
            first.append(_open_apart("ours", path, config))
            second.append(_open_apart("ours", path, config))
            peer.append(_open_apart("pycocotools", path, config))
        seconds = [run["seconds"] for run in peer]
        yield compare("opening annotations", "pycocotools", [r["seconds"] for r in first], seconds, bar=0.12, unit="s")
        yield compare(
            "  peak memory",
            "pycocotools",
            [r["megabytes"] for r in first],
            [r["megabytes"] for r in peer],
            bar=0.45,
            unit="MB",
        )
        yield compare("  second opening", "pycocotools", [r["seconds"] for r in second], seconds, bar=0.03, unit="s")

    def evaluate(self) -> Iterator[Comparison]:
        """Detections in memory and opened ground truth -> the twelve figures, which must agree to 1e-9."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        num = self.config.evaluate_images
        path = self.config.cache / f"evaluate_{num}.json"
        if not path.is_file():
            drawn.draw_annotations(path, num, round(num * 7.3562))
        index = CocoIndex.read(path)
        found = drawn.draw_detections(index)
        images = scale.feed(CocoEvaluator(index), index, found)
        truth = _quietly(lambda: COCO(str(path)))
        xyxy = torch.cat([image.boxes for image in images]).double().numpy()
        rows = zip(
            found[0].tolist(),
            index.category_ids[found[3]].tolist(),
            np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1).tolist(),
            torch.cat([image.scores for image in images]).double().tolist(),
            strict=True,
        )
        results = [{"image_id": i, "category_id": c, "bbox": box, "score": score} for i, c, box, score in rows]
        figures: dict[str, list[float]] = {}

        def own() -> None:
            evaluator = CocoEvaluator(index)
            for start in range(0, num, 16):
                evaluator.update(index.image_ids[start : start + 16].tolist(), images[start : start + 16])
            figures["ours"] = list(evaluator.compute().figures.values())

        def peer() -> None:
            def run() -> list[float]:
                evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "bbox")
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                return [float(value) for value in evaluation.stats]

            figures["peer"] = _quietly(run)

        times = interleave({"ours": own, "peer": peer}, 2, warm_up=0)
        difference = max(abs(a - b) for a, b in zip(figures["ours"], figures["peer"], strict=True))
        assert difference <= 1e-9, f"AP differs by {difference}: {dict(zip(FIGURES, figures['ours'], strict=True))}"
        self.result.notes.append(f"AP: the twelve figures agree to {difference:.0e}")
        seconds = {name: [run / 1e3 for run in runs] for name, runs in times.items()}
        yield compare(f"AP of {num} images", "pycocotools", seconds["ours"], seconds["peer"], bar=0.12, unit="s")


def _ask(connection: Connection) -> None:
    connection.send(None)
    connection.recv()


def _training_side(
    side: str,
    config: SSDLiteConfig,
    info: DetectorInfo,
    weights: dict[str, Tensor],
    batch: Batch,
    threads: int,
    connection: Connection,
) -> None:
    """A process that makes a training step each time it is asked to."""
    torch.set_num_threads(threads)
    model = SSDLite(config, len(info.class_names))
    model.load_state_dict(weights)
    with open_runtime("cpu", threads) if side == "ours" else contextlib.nullcontext():
        run = (
            _own_step(model, batch) if side == "ours" else _peer_step(build_peer(model, info.postprocess), batch, side)
        )
        while True:
            connection.recv()
            run()
            connection.send(None)


def _own_step(model: SSDLite, batch: Batch) -> Callable[[], None]:
    step: nn.Module = TrainingStep(model, SSDLossConfig().build(model)).train()
    step = step.to(memory_format=torch.channels_last)
    config = OptimConfig(lr=0.01)
    optimizer = build_optimizer(parameter_groups(model, config, {}), config)

    def run() -> None:
        loss = step(*batch.inputs())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def _peer_step(peer: nn.Module, batch: Batch, side: str) -> Callable[[], None]:
    peer.train()
    if side == "channels-last":
        peer = peer.to(memory_format=torch.channels_last)
    images = list(batch.images.contiguous().float() / 255)
    targets = [
        {"boxes": boxes[valid], "labels": labels[valid] + 1}
        for boxes, labels, valid in zip(batch.boxes, batch.labels, batch.valid, strict=True)
    ]
    optimizer = torch.optim.SGD(peer.parameters(), lr=0.01, momentum=0.9, weight_decay=4e-5)

    def run() -> None:
        loss = sum(peer(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


_OPEN = """
import json, sys, time
from pathlib import Path
{imports}

def peak():  # not ru_maxrss: a child inherits that of its parent
    status = Path("/proc/self/status")
    if not status.is_file():
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024

before, start = peak(), time.perf_counter()
opened = {call}
seconds = time.perf_counter() - start
print(json.dumps({{"seconds": seconds, "megabytes": peak() - before}}))
"""
_OPENERS = {
    "ours": ("from detection.data.coco import CocoIndex", "CocoIndex.read(sys.argv[1])"),
    "pycocotools": ("from pycocotools.coco import COCO", "COCO(sys.argv[1])"),
}


def _open_apart(side: str, path: Path, config: BenchmarkConfig) -> dict[str, float]:
    imports, call = _OPENERS[side]
    environment = dict(os.environ, XDG_CACHE_HOME=str(config.cache / "index"), OMP_NUM_THREADS=str(config.threads))
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    )
    command = [sys.executable, "-c", _OPEN.format(imports=imports, call=call), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _quietly(run: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return run()


def _images(config: BenchmarkConfig) -> tuple[Path, Path]:
    """(folder, annotation file) of the images, drawn where none are given."""
    if config.images is not None and config.annotations is not None:
        return config.images, config.annotations
    folder = config.cache / "images"
    if not (folder / "val.json").is_file():  # written last
        draw_detection_set(folder, num_train=NUM_IMAGES, num_val=1, size=(480, 640))
    return folder / "train", folder / "train.json"


def _first(index: CocoIndex, number: int) -> CocoIndex:
    """The first images of a file that have something to learn from, as a file of their own."""
    position = np.repeat(np.arange(len(index)), np.diff(index.offsets))
    return index.select(np.unique(position[index.usable])[:number])


def print_counts() -> None:
    """The tables of the networks that the papers give figures of."""
    for title, model, side in (
        ("MobileNetV2 x1.0, 1000 classes, 224x224", Classifier(ClassifierConfig(), 1000), 224),
        ("SSDLite, 80 classes, 320x320", SSDLite(SSDLiteConfig(), 80), 320),
    ):
        print(f"{title}\n{count.table(count.count(model, (side, side)))}\n")


def environment(threads: int) -> dict[str, str]:
    """What the figures depend on."""
    packages = ("torch", "torchvision", "opencv-python", "pycocotools", "faster-coco-eval", "onnxruntime", "openvino")
    versions = []
    for name in packages:
        with contextlib.suppress(ModuleNotFoundError):  # an extra that is not installed
            versions.append(f"{name} {version(name)}")
    return {
        "processor": _processor(),
        "cores": f"{os.cpu_count()}, threads on both sides: {threads} (torch.set_num_threads({threads}))",
        "python": platform.python_version(),
        "versions": ", ".join(versions),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'unknown'} ({platform.machine()}, {platform.system()})"


def row(comparison: Comparison) -> str:
    """A comparison for people."""
    low, high = comparison.spread
    verdict = ""
    if comparison.bar is not None:
        verdict = f"  bar {comparison.bar:.2f} {'reached' if comparison.ratio <= comparison.bar else 'missed'}"
    return (
        f"{comparison.name:<28} {comparison.ours:>9.2f} {comparison.unit:<2}  {comparison.peer:<25} "
        f"{comparison.theirs:>9.2f} {comparison.unit:<2}  ratio {comparison.ratio:.3f} ({low:.3f} to {high:.3f}, "
        f"{comparison.runs} runs){verdict}"
    )


def draw_chart(result: BenchmarkResult, path: Path) -> None:
    """Bars of the time (or memory) that we take of what the peer takes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result.comparisons[::-1]
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [f"{one.name.strip()}\nvs {one.peer}" for one in rows]
    places = range(len(rows))
    axes.barh(places, [1.0] * len(rows), color="#e3e3e3", label="the peer")
    axes.barh(places, [one.ratio for one in rows], color="#2f6db3", height=0.55, label="LiteDet")
    for place, one in zip(places, rows, strict=True):
        if one.bar is not None:
            aim = [one.bar] * 2
            axes.plot(aim, [place - 0.4, place + 0.4], color="#c0392b", linewidth=1.5, label="" if place else "aim")
        ours, theirs = (f"{value:.0f}" if value >= 1000 else f"{value:.3g}" for value in (one.ours, one.theirs))
        text = f"{ours} of {theirs} {one.unit}: {one.ratio:.2f}"
        axes.text(max(one.ratio, one.bar or 0) + 0.015, place, text, va="center", fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_xlim(0, 1.3)
    axes.set_xlabel(
        f"share of the peer's time or memory; cores: {result.environment['cores'].partition(' (')[0]}", fontsize=8
    )
    axes.legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
