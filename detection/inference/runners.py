"""What runs a detector's network when it predicts: torch, torch.compile, ONNX Runtime or OpenVINO.

All of them are a ``detection.structures.Runner``: they take the same images and say the same to 1e-4; post-processing is ours
with each. One runner may be called from several threads at once, and it can be pickled and copied. ONNX Runtime and OpenVINO are
extra packages (``pip install litedet[export]``) and are imported when they are asked for.
"""

import contextlib
import copy
import platform
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from backbones.errors import UserError
from detection.engine.quiet import quiet
from detection.inference.packed import PackedRunner, can_pack
from detection.models.detector import Detector
from detection.models.folding import clip_sums_in_blocks, fold_norms, merge_outputs
from detection.models.quantized import QuantizedDetector
from detection.structures import RawPredictions, Runner

Backend = Literal["torch", "compile", "onnxruntime", "openvino"]
Amp = Literal["off", "bf16", "fp16"]

_X86 = ("x86_64", "AMD64")  # Linux and macOS, Windows


def build_runner(
    model: Detector, backend: Backend = "torch", device: torch.device | None = None, amp: Amp = "off"
) -> Runner:
    """What computes a detector's raw predictions.

    Args:
        model: it stays as it is: what runs is a copy, its batch norms folded into the convolutions.
        backend: "torch" runs it as it is, on an x86 processor with its convolutions packed. "compile" compiles it at the
            first call, which takes a minute or so. "onnxruntime" and "openvino" run on CPUs, with as many threads as torch
            has at this moment.
        device: where to compute; None: where the model is.
        amp: number format of the convolutions with "torch" and "compile". "off" is float32; "fp16" needs a GPU.

    Raises:
        UserError: an unknown backend, a package that is not installed, a backend that does not run on the device or does not
            know the number format.
    """
    if backend not in get_args(Backend):
        raise UserError(f"backend {backend!r} is unknown; there are {', '.join(map(repr, get_args(Backend)))}")
    device = device or model.anchors.device
    if isinstance(model, QuantizedDetector):
        if backend != "torch" or amp != "off":
            raise UserError(
                "a detector that was fine-tuned in 8 bits runs with backend 'torch' in float32, or exported"
            )
        return TorchRunner(copy.deepcopy(model).eval().to(device), device)
    folded = fold_norms(merge_outputs(copy.deepcopy(model).eval())).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if backend == "torch":
        # oneDNN's packed layers are float32.
        packs = device.type == "cpu" and amp == "off" and can_pack()
        return PackedRunner(folded) if packs else TorchRunner(folded, device, amp)
    if backend == "compile":
        return CompiledRunner(folded, device, amp)
    if device.type != "cpu":
        raise UserError(f"backend {backend} runs on the CPU here, the device is {device}; take 'torch' or 'compile'")
    if amp != "off":
        raise UserError(f"backend {backend} computes in float32 here; amp={amp!r} is for 'torch' and 'compile'")
    make = OnnxRuntimeRunner if backend == "onnxruntime" else OpenVinoRunner
    if backend == "onnxruntime" and platform.machine() in _X86:
        folded = clip_sums_in_blocks(folded)
    try:
        return make(to_onnx(folded), folded.anchors)
    except ImportError as error:
        raise UserError(
            f"backend {backend} needs the package {error.name}, which is not installed; pip install 'litedet[export]'"
        ) from error


class TorchRunner:
    """A network as a runner.

    It runs in evaluation mode and is left in the mode that it is in.

    Args:
        model: images [B, 3, H, W] -> RawPredictions, on ``device``.
        device: where it is.
        amp: number format of its convolutions; "off" is float32.

    Raises:
        UserError: "fp16" on a CPU.
    """

    def __init__(self, model: nn.Module, device: torch.device, amp: Amp = "off") -> None:
        if amp not in get_args(Amp):
            raise UserError(f"amp {amp!r} is unknown; there are {', '.join(map(repr, get_args(Amp)))}")
        if amp == "fp16" and device.type == "cpu":
            raise UserError("amp 'fp16' needs a GPU; a CPU computes with 'bf16' or 'off' (float32)")
        self.model = model
        self.device = device
        self.amp = amp

    def __call__(self, images: Tensor) -> RawPredictions:
        """See ``Runner``."""
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            if self.amp == "off":
                return self._run(images)
            with torch.autocast(self.device.type, torch.float16 if self.amp == "fp16" else torch.bfloat16):
                return self._run(images)
        finally:
            if was_training:
                self.model.train()

    def _run(self, images: Tensor) -> RawPredictions:
        raw: RawPredictions = self.model(images)
        return raw


class CompiledRunner(TorchRunner):
    """A network compiled by torch.compile, at the first call and again for another number of images.

    Args:
        model, device, amp: as for ``TorchRunner``.
    """

    def __init__(self, model: nn.Module, device: torch.device, amp: Amp = "off") -> None:
        super().__init__(model, device, amp)
        self._compiled: Any = torch.compile(model)

    def _run(self, images: Tensor) -> RawPredictions:
        raw: RawPredictions = self._compiled(images)
        return raw

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.device, self.amp)


_threads_lock = threading.Lock()
_predicting = 0  # predictions under way whose network is run by another library's threads
_threads_before = 0  # torch's number of threads before the first of them


@contextlib.contextmanager
def threads_for(runner: Runner) -> Iterator[None]:
    """How many threads torch has in a prediction: one where another library's threads run the network.

    torch's threads keep a core busy for milliseconds after an operator, in case another one follows, and the other library's
    threads wait: with two cores a prediction of 16 ms took 19. torch has one number for the process, so predictions that
    overlap share what it was before the first of them, and each leaves that number behind.
    """
    global _predicting, _threads_before
    if not getattr(runner, "own_threads", False):
        yield
        return
    with _threads_lock:
        if not _predicting:
            _threads_before = torch.get_num_threads()
        _predicting += 1
        torch.set_num_threads(1)  # of this thread; the others have set their own
    try:
        yield
    finally:
        with _threads_lock:
            _predicting -= 1
            torch.set_num_threads(_threads_before)


EXPORTER_LOGS = ("torch.onnx", "onnxscript")
"""Where torch's ONNX exporter and its optimiser report their steps, whatever they are told."""


def to_onnx(model: Detector) -> bytes:
    """The network as an ONNX file: what ``Detector.forward`` computes, the normalisation included.

    Input ``images``: uint8 [B, 3, H, W], RGB, H and W those of the config. Outputs ``codes`` [B, A, D] and
    ``class_logits`` [B, A, C], float32. B is free.

    Raises:
        ImportError: torch's exporter needs the packages onnx and onnxscript.
    """
    return module_to_onnx(_WithoutAnchors(model), model.config.input_size, ("codes", "class_logits"))


def module_to_onnx(module: nn.Module, input_size: tuple[int, int], outputs: Sequence[str]) -> bytes:
    """A function of images as an ONNX file with the input ``images``, uint8 [B, 3, H, W], B free.

    Args:
        module: uint8 [B, 3, H, W] -> a tensor for each output.
        input_size: (height, width).
        outputs: their names.

    Raises:
        ImportError: torch's exporter needs the packages onnx and onnxscript.
    """
    device = next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))
    images = torch.zeros(2, 3, *input_size, dtype=torch.uint8, device=device)
    with quiet(*EXPORTER_LOGS):
        program = torch.onnx.export(
            module,
            (images,),
            input_names=["images"],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


class _WithoutAnchors(nn.Module):
    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.model(images)
        return raw.codes, raw.class_logits


def as_predictions(outputs: Sequence[NDArray[np.float32]], anchors: Tensor) -> RawPredictions:
    """What a file gave, as raw predictions.

    Args:
        outputs: codes [B, A, D] and class logits [B, A, C]; or, of a file that finishes its detections itself, one array
            [B, K, 6] of x1, y1, x2, y2 in pixels of the input, score and label, rows of score 0 being empty.
        anchors: float32 [A, 4], the detector's.

    Returns:
        The predictions. Those of finished detections have the boxes [B, K, 4] as codes and (score, label) [B, K, 2] as class
        logits, for ``detection.inference.exported.FilePostprocess``.
    """
    if len(outputs) == 1:
        rows = torch.from_numpy(outputs[0])
        return RawPredictions(rows[..., :4], rows[..., 4:], anchors)
    codes, class_logits = outputs
    return RawPredictions(torch.from_numpy(codes), torch.from_numpy(class_logits), anchors)


class FileRunner(ABC):
    """A file of a network, run on the CPU by the library that it is made for; one caller at a time or several.

    Attributes:
        anchors: float32 [A, 4], the detector's; [0, 4] for a classifier, whose only method is ``outputs``.
        max_batch: images that it takes at once at most; None: any number.
    """

    device = torch.device("cpu")
    own_threads = True
    max_batch: int | None = None
    anchors: Tensor

    @abstractmethod
    def outputs(self, images: Tensor) -> list[NDArray[np.float32]]:
        """uint8 [B, 3, H, W], RGB, however it lies in memory -> what the file gives, in its order."""

    def __call__(self, images: Tensor) -> RawPredictions:
        """See ``Runner``."""
        return as_predictions(self.outputs(images), self.anchors)


class OnnxRuntimeRunner(FileRunner):
    """An ONNX file of a detector, run by ONNX Runtime on the CPU.

    Args:
        onnx: the file: raw predictions as ``to_onnx`` makes them, or finished detections [B, K, 6].
        anchors: float32 [A, 4], the detector's.
        num_threads: threads for one call; None: as many as torch has at this moment.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self, onnx: bytes, anchors: Tensor, num_threads: int | None = None) -> None:
        import onnxruntime

        self.onnx = onnx
        self.anchors = anchors
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or torch.get_num_threads()
        # Its threads wait for the next operator by spinning, which is a fifth quicker than to sleep; after the last operator
        # they would keep the cores busy for a while, and post-processing would go at half the speed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])

    def outputs(self, images: Tensor) -> list[NDArray[np.float32]]:
        """See ``FileRunner``."""
        found: list[NDArray[np.float32]] = self._session.run(None, {"images": np.ascontiguousarray(images.numpy())})
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.onnx, self.anchors)


_openvino_lock = threading.Lock()
_openvino_cores: list[Any] = []


def openvino_core() -> Any:
    """The one ``openvino.Core`` of this process, which lives as long as the process does.

    OpenVINO's CPU plugin (seen in 2026.4) gives the thread that loads it a stack for signal handlers, and when the last that
    uses the plugin is dropped it frees that stack. It puts the former one back only if the stack in use is its own: not where
    another thread drops it, nor where two cores are dropped in the order they were made (the second puts the stack of the
    first back). The next signal that Python handles, Ctrl-C or the end of a process it started, then ends the process
    by a segmentation fault, without a traceback.
    """
    import openvino

    with _openvino_lock:
        if not _openvino_cores:
            _openvino_cores.append(openvino.Core())
        return _openvino_cores[0]


class OpenVinoRunner(FileRunner):
    """A file of a detector, run by OpenVINO on the CPU.

    Args:
        onnx: the content of an ONNX file, or the path of OpenVINO's own ``.xml``.
        anchors, num_threads: as for ``OnnxRuntimeRunner``.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self, onnx: bytes | Path, anchors: Tensor, num_threads: int | None = None) -> None:
        core = openvino_core()
        self.onnx = onnx
        self.anchors = anchors
        settings = {
            "INFERENCE_NUM_THREADS": num_threads or torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            # Its default on processors with bfloat16 units would be that format.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._compiled = core.compile_model(core.read_model(onnx), "CPU", settings)
        # A request serves one caller at a time: there are as many as there ever were callers at once.
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def outputs(self, images: Tensor) -> list[NDArray[np.float32]]:
        """See ``FileRunner``."""
        try:
            request = self._requests.get_nowait()
        except queue.Empty:
            request = self._compiled.create_infer_request()
        try:
            # The request writes every answer to the same memory, hence the copies.
            results = request.infer({0: np.ascontiguousarray(images.numpy())}, share_inputs=True)
            return [result.copy() for result in results.to_tuple()]
        finally:
            self._requests.put(request)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.onnx, self.anchors)
