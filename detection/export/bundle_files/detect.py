"""Find objects in an image, in a video or in what a camera sees. It needs numpy, opencv and the package that runs the model:
onnxruntime for model.onnx, ai-edge-litert for model.tflite (pip install -r requirements.txt). No torch.

python detect.py photo.jpg --out boxes.jpg
python detect.py video.mp4 --out boxes.mp4 --threshold 0.4
python detect.py 0                                  # the first camera, until Ctrl-C

For each image or frame one line of json: the frame's number, and of each object its box (x1, y1, x2, y2 in pixels), score,
label and class. In a program of your own:

from detect import Detector, draw
detector = Detector()
image = cv2.imread("photo.jpg")
for found in detector(image):
    print(found.name, found.score, found.box)
cv2.imwrite("boxes.jpg", draw(image, detector(image)))
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

HERE = Path(__file__).resolve().parent


class Found(NamedTuple):
    """An object: box (x1, y1, x2, y2) in pixels of the image, score 0..1, number and name of its class."""

    box: tuple
    score: float
    label: int
    name: str


class Detector:
    """The model beside this file, ready to run.

    threads: of the processor, for one image.
    """

    def __init__(self, threads=2):
        self.record = json.loads((HERE / "model.json").read_text(encoding="utf-8"))
        self.names = (HERE / "labels.txt").read_text(encoding="utf-8").splitlines()
        # What is worth showing: from the best score of each class on, where an evaluation has found it, else from 0.25 on.
        self.thresholds = np.array(self.record["record"]["info"]["thresholds"] or [0.25] * len(self.names))
        open_model = open_onnx if (HERE / "model.onnx").exists() else open_litert
        self.run = open_model(threads)

    def __call__(self, image, threshold=None):
        """BGR uint8 [H, W, 3], as cv2 reads it -> list of Found, best first.

        threshold: the least score, of all classes; None: each class has its own (self.thresholds).
        """
        pixels, (scale_x, scale_y, left, top) = place(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), self.record["input"])
        rows = self.run(pixels)
        boxes, scores, labels = rows[:, :4], rows[:, 4], rows[:, 5].astype(int)
        boxes = (boxes - [left, top, left, top]) / [scale_x, scale_y, scale_x, scale_y]
        height, width = image.shape[:2]
        boxes = boxes.clip(0, [width, height, width, height])
        least = self.thresholds[labels] if threshold is None else threshold
        keep = (scores >= least) & (scores > 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        return [
            Found(tuple(box), score, label, self.names[label])
            for box, score, label in zip(
                boxes[keep].tolist(), scores[keep].tolist(), labels[keep].tolist(), strict=True
            )
        ]


# Each gives a function: RGB uint8 [H, W, 3] at the model's input size -> [N, 6]: x1, y1, x2, y2 in its pixels, score, label.


def open_onnx(threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(HERE / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"images": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])})[0][0]


def open_litert(threads):
    from ai_edge_litert.interpreter import Interpreter

    model = Interpreter(model_path=str(HERE / "model.tflite"), num_threads=threads)
    model.allocate_tensors()
    source = model.get_input_details()[0]["index"]
    outputs = [one["index"] for one in model.get_output_details()]

    def run(pixels):
        model.set_tensor(source, pixels[None])
        model.invoke()
        boxes, classes, scores, count = (model.get_tensor(index)[0] for index in outputs)
        height, width = pixels.shape[:2]
        boxes = boxes[:, [1, 0, 3, 2]] * [width, height, width, height]  # they come as y1, x1, y2, x2 in 0..1
        return np.concatenate((boxes, scores[:, None], classes[:, None]), 1)[: int(count)]

    return run


def place(image, size):
    """The image at the model's input size, as in training, and where it lies there: scale x, scale y, left, top."""
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


def draw(image, detections):
    """A copy of the image with boxes, classes and scores, the best on top."""
    image = image.copy()
    line = max(2, round(max(image.shape[:2]) / 400))
    letters = max(0.5, max(image.shape[:2]) / 1400)
    for found in reversed(detections):
        x1, y1, x2, y2 = (round(value) for value in found.box)
        cv2.rectangle(image, (x1, y1), (x2, y2), colour_of(found.label), line)
    for found in reversed(detections):
        text = f"{found.name} {found.score:.2f}"
        (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, letters, line // 2)
        x = max(0, min(round(found.box[0]), image.shape[1] - width - 6))
        y = max(round(found.box[1]), height + below + 4)
        cv2.rectangle(image, (x, y - height - below - 4), (x + width + 6, y), colour_of(found.label), cv2.FILLED)
        place = (x + 3, y - below - 1)
        cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, letters, (0, 0, 0), line // 2, cv2.LINE_AA)
    return image


def colour_of(label):
    """BGR; bright, so that black letters can be read on it."""
    hue = (100 + label * 68.75) % 180
    return tuple(int(v) for v in cv2.cvtColor(np.array([[[hue, 150, 255]]], np.uint8), cv2.COLOR_HSV2BGR)[0, 0])


def as_json(number, detections):
    rows = [
        {"box": [round(v, 2) for v in one.box], "score": round(one.score, 4), "label": one.label, "class": one.name}
        for one in detections
    ]
    return json.dumps({"frame": number, "detections": rows}, ensure_ascii=False)


def on_image(detector, image, arguments):
    detections = detector(image, arguments.threshold)
    print(as_json(0, detections))
    if arguments.out:
        write_image(arguments.out, draw(image, detections))


def write_image(path, image):
    try:
        written = cv2.imwrite(path, image)
    except cv2.error:  # an ending that it does not know
        written = False
    if not written:
        raise SystemExit(f"--out {path} cannot be written; an image ends in .jpg or .png")


def on_video(detector, source, arguments):
    if not source.isdigit() and "://" not in source and not Path(source).exists():
        raise SystemExit(f"{source} does not exist")
    video = cv2.VideoCapture(int(source) if source.isdigit() else source)
    if not video.isOpened():
        what = f"camera {source}" if source.isdigit() else source
        raise SystemExit(
            f"{what} cannot be opened; give an image, a video, the number of a camera or the URL of a stream"
        )
    writer, number, begin = None, 0, time.monotonic()
    try:
        while arguments.frames is None or number < arguments.frames:
            read, frame = video.read()
            if not read:
                break
            detections = detector(frame, arguments.threshold)
            print(as_json(number, detections), flush=True)
            if arguments.out:
                writer = writer or open_writer(arguments.out, video, frame)
                writer.write(draw(frame, detections))
            number += 1
    except KeyboardInterrupt:
        pass
    finally:
        video.release()
        if writer:
            writer.release()
    if not number:
        raise SystemExit(f"{source} was opened, and gave no image")
    print(f"{number} frames, {number / (time.monotonic() - begin):.1f} a second", file=sys.stderr)


def open_writer(path, video, frame):
    rate = video.get(cv2.CAP_PROP_FPS)
    rate = rate if 1 <= rate <= 240 else 25  # not every camera says
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), rate, (frame.shape[1], frame.shape[0]))
    if not writer.isOpened():
        raise SystemExit(f"--out {path} cannot be written; a video ends in .mp4")
    return writer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="an image, a video, the number of a camera, or the URL of a stream")
    parser.add_argument("--out", help="image (.jpg, .png) or video (.mp4) with the boxes drawn on it")
    parser.add_argument(
        "--threshold", "--score", type=float, help="least score; by default that of each class in model.json, else 0.25"
    )
    parser.add_argument("--frames", type=int, help="stop after so many frames of a video or a camera")
    parser.add_argument("--threads", type=int, default=2, help="of the processor, for one image")
    arguments = parser.parse_args()
    try:
        detector = Detector(arguments.threads)
    except ImportError as error:
        raise SystemExit(
            f"the package {error.name} is not installed; pip install -r {HERE / 'requirements.txt'}"
        ) from error
    image = cv2.imread(arguments.source) if Path(arguments.source).is_file() else None  # turned as EXIF says
    if image is not None:
        on_image(detector, image, arguments)
    else:
        on_video(detector, arguments.source, arguments)


if __name__ == "__main__":
    main()
