"""Find objects in an image, a video or what a camera sees. Needs numpy, opencv-python and the package that runs the model:
onnxruntime for model.onnx, ai-edge-litert for model.tflite. No torch.

python detect.py photo.jpg --out boxes.jpg
python detect.py video.mp4 --out boxes.mp4
python detect.py 0                                # the first camera; prints a line for each frame

from detect import Detector
found = Detector()(cv2.imread("photo.jpg"))       # [(x1, y1, x2, y2, score, name), ...] in pixels of the image
"""

import argparse
import json
import time
from pathlib import Path

import cv2
import numpy as np

HERE = Path(__file__).parent


class Detector:
    """The model beside this file, ready to run."""

    def __init__(self, threads=2):
        self.record = json.loads((HERE / "model.json").read_text(encoding="utf-8"))
        self.names = (HERE / "labels.txt").read_text(encoding="utf-8").splitlines()
        size = self.record["input"]
        self.height, self.width = size["height"], size["width"]
        self.run = (
            run_onnx(HERE / "model.onnx", threads) if (HERE / "model.onnx").exists() else run_litert(HERE, threads)
        )

    def __call__(self, image, score=0.25):
        """A BGR uint8 image [H, W, 3], as cv2 reads it -> a list of (x1, y1, x2, y2, score, name), best first."""
        placed, (scale_x, scale_y, left, top) = place(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), self.record["input"])
        rows = self.run(placed)
        rows = rows[rows[:, 4] > score]
        height, width = image.shape[:2]
        boxes = (rows[:, :4] - [left, top, left, top]) / [scale_x, scale_y, scale_x, scale_y]
        boxes = np.clip(boxes, 0, [width, height, width, height])
        found = [(*box, float(row[4]), self.names[int(row[5])]) for box, row in zip(boxes.tolist(), rows, strict=True)]
        return [one for one in found if one[2] > one[0] and one[3] > one[1]]


def run_onnx(path, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # uint8 [1, 3, H, W] -> [1, K, 6]: x1, y1, x2, y2 in pixels of the input, score, label
    return lambda image: session.run(None, {"images": np.ascontiguousarray(image.transpose(2, 0, 1)[None])})[0][0]


def run_litert(folder, threads):
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tflite_runtime.interpreter import Interpreter

    model = Interpreter(model_path=str(folder / "model.tflite"), num_threads=threads)
    model.allocate_tensors()
    given = model.get_input_details()[0]["index"]
    outputs = [one["index"] for one in model.get_output_details()]

    def run(image):
        model.set_tensor(given, image[None])
        model.invoke()
        boxes, classes, scores, count = (model.get_tensor(index)[0] for index in outputs)
        used = int(count)
        height, width = image.shape[:2]
        boxes = boxes[:used][:, [1, 0, 3, 2]] * [width, height, width, height]  # the file has y1, x1, y2, x2 in 0..1
        return np.concatenate((boxes, scores[:used, None], classes[:used, None]), 1)

    return run


def place(image, size):
    """The image at the network's input size, as in training, and where it lies there: scale x, scale y, left, top."""
    height, width = size["height"], size["width"]
    if size["resize"] != "letterbox":
        scale_x, scale_y = width / image.shape[1], height / image.shape[0]
        if size["resize"] == "stretch_tensorflow" and image.shape[:2] != (height, width):
            back = np.array([[1 / scale_x, 0, 0], [0, 1 / scale_y, 0]])
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            image = cv2.warpAffine(image, back, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        return resize(image, height, width), (scale_x, scale_y, 0, 0)
    scale = min(width / image.shape[1], height / image.shape[0])
    new_width, new_height = max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    canvas = np.full((height, width, 3), size["fill"], np.uint8)
    canvas[top : top + new_height, left : left + new_width] = resize(image, new_height, new_width)
    return canvas, (new_width / image.shape[1], new_height / image.shape[0], left, top)


def resize(image, height, width):
    if image.shape[:2] == (height, width):
        return image
    skips = image.shape[0] > 2 * height or image.shape[1] > 2 * width
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if skips else cv2.INTER_LINEAR)


def draw(image, found):
    for x1, y1, x2, y2, score, name in found:
        cv2.rectangle(image, (round(x1), round(y1)), (round(x2), round(y2)), (0, 200, 0), 2)
        place = (round(x1) + 2, max(round(y1) - 4, 12))
        cv2.putText(image, f"{name} {score:.2f}", place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 200, 0), 1, cv2.LINE_AA)
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="an image, a video, the number of a camera, or the URL of a stream")
    parser.add_argument("--out", help="image or video (.mp4) with the boxes drawn on it")
    parser.add_argument("--score", type=float, default=0.25, help="detections below it are left out")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    detector = Detector(arguments.threads)

    image = cv2.imread(arguments.source) if Path(arguments.source).is_file() else None
    if image is not None:
        found = detector(image, arguments.score)
        print(json.dumps([[*(round(v, 2) for v in one[:4]), round(one[4], 4), one[5]] for one in found]))
        if arguments.out and not cv2.imwrite(arguments.out, draw(image, found)):
            raise SystemExit(f"{arguments.out} cannot be written")
        return
    video = cv2.VideoCapture(int(arguments.source) if arguments.source.isdigit() else arguments.source)
    if not video.isOpened():
        raise SystemExit(f"{arguments.source} cannot be opened as an image, a video or a camera")
    writer, number, begin = None, 0, time.monotonic()
    try:
        while True:
            read, frame = video.read()
            if not read:
                break
            found = detector(frame, arguments.score)
            print(json.dumps([number, [[*(round(v, 2) for v in one[:4]), round(one[4], 4), one[5]] for one in found]]))
            if arguments.out:
                if writer is None:
                    rate = video.get(cv2.CAP_PROP_FPS) or 25
                    kind = cv2.VideoWriter_fourcc(*"mp4v")
                    writer = cv2.VideoWriter(arguments.out, kind, rate, (frame.shape[1], frame.shape[0]))
                    if not writer.isOpened():
                        raise SystemExit(f"{arguments.out} cannot be written")
                writer.write(draw(frame, found))
            number += 1
    except KeyboardInterrupt:
        pass
    finally:
        if writer is not None:
            writer.release()
    print(f"{number} frames, {number / max(time.monotonic() - begin, 1e-9):.1f} a second")


if __name__ == "__main__":
    main()
