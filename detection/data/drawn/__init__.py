"""Images with known objects, drawn: a detection set, a classification set, the frames of a video. No download.

Six kinds of objects that differ in form, and in the hue that each kind likes: something to learn from in minutes. Size,
rotation (a little to either side), stretch, saturation, brightness, shading and texture are drawn at random. They lie on
textured backgrounds of any hue, with strokes and stains that are no object.

Everything depends on the seed alone: image i of a set is the same however many images are drawn before it.

The boxes are measured on the drawn masks: x1, y1 is the first pixel of the object, x2, y2 one past its last.

forms.py <- painting.py <- images.py <- sets.py
"""

from detection.data.drawn.forms import CLASS_NAMES
from detection.data.drawn.images import DrawnImage, draw_crop, draw_image, draw_video_frames
from detection.data.drawn.sets import DetectionSet, draw_classification_set, draw_detection_set

__all__ = [
    "CLASS_NAMES",
    "DetectionSet",
    "DrawnImage",
    "draw_classification_set",
    "draw_crop",
    "draw_detection_set",
    "draw_image",
    "draw_video_frames",
]
