"""Runners of the files that phones and boards run: ExecuTorch and ncnn; and of AOTInductor's compiled packages.

They take the images as they were traced: row by row, a channel after the other. ExecuTorch and AOTInductor do not look at a
tensor's strides, so that an image that lies channels-last would be misread without a word.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.engine.quiet import quiet
from detection.inference.runners import FileRunner


class _PathRunner(FileRunner):
    """A file that its library reads itself.

    Args:
        path: of the file.
        anchors: float32 [A, 4], the detector's.
    """

    def __init__(self, path: Path, anchors: Tensor) -> None:
        self.path = path
        self.anchors = anchors

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.anchors)


class ExecuTorchRunner(_PathRunner):
    """A ``.pte`` program in ExecuTorch's Python runtime, image by image.

    Args:
        path, anchors: as for ``_PathRunner``.

    Raises:
        ImportError: the package executorch is not installed.
    """

    max_batch = 1

    def __init__(self, path: Path, anchors: Tensor) -> None:
        super().__init__(path, anchors)
        with quiet("", "torch.utils._pytree"):
            from executorch.runtime import Runtime

            self._program = Runtime.get().load_program(path)  # the method does not keep it alive
            self._method = self._program.load_method("forward")
        self._lock = (
            threading.Lock()
        )  # a method serves one caller at a time, and writes every answer to the same memory

    def outputs(self, images: Tensor) -> list[NDArray[np.float32]]:
        """See ``FileRunner``."""
        with self._lock:
            found = self._method.execute([images.contiguous(memory_format=torch.contiguous_format)])
            return [output.numpy().copy() for output in found]


class NcnnRunner(_PathRunner):
    """A ``.param`` file of ncnn with its ``.bin``, image by image, in float32 whatever its weights are stored in.

    Args:
        path, anchors: as for ``_PathRunner``.

    Raises:
        ImportError: the package ncnn is not installed.
        OSError: ncnn does not read the files.
    """

    max_batch = 1

    def __init__(self, path: Path, anchors: Tensor) -> None:
        super().__init__(path, anchors)
        import ncnn

        self._net = net = ncnn.Net()
        net.opt.use_vulkan_compute = False
        net.opt.num_threads = torch.get_num_threads()
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
            raise OSError(f"{path}: ncnn cannot read it, or its .bin")
        self._names = list(net.input_names()), list(net.output_names())

    def outputs(self, images: Tensor) -> list[NDArray[np.float32]]:
        """See ``FileRunner``."""
        import ncnn

        pixels = np.ascontiguousarray(images[0].float().numpy())  # ncnn has no axis of images
        (given,), wanted = self._names
        with self._net.create_extractor() as extractor:  # one for each caller
            extractor.input(given, ncnn.Mat(pixels))
            found = [np.array(extractor.extract(name)[1]) for name in wanted]
        return [output[None] for output in found]


class AotRunner(_PathRunner):
    """An AOTInductor package (.pt2): the network as machine code, image by image.

    Args:
        path, anchors: as for ``_PathRunner``.
    """

    own_threads = False
    max_batch = 1

    def __init__(self, path: Path, anchors: Tensor) -> None:
        super().__init__(path, anchors)
        os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")  # else a wrong shape reads past the end of the image
        with quiet(""):
            self._package = torch._inductor.aoti_load_package(str(path))

    def outputs(self, images: Tensor) -> list[NDArray[np.float32]]:
        """See ``FileRunner``."""
        return [output.detach().numpy().copy() for output in self._package(images.contiguous())]
