"""What a check can find: one table of kinds, and the record of a single finding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Severity = Literal["error", "warning"]


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        name: as in the json.
        severity: "error" where training or evaluation refuses the data, loses it, or measures something wrong; "warning" where
            somebody should look.
        title: what it is, in a few words.
        mend: what to do about it.
        fix: what ``--fix`` does; "" where it leaves the records as they are, because nobody can know what was meant.
    """

    name: str
    severity: Severity
    title: str
    mend: str
    fix: str = ""


_ALL = (
    # The annotation file
    Kind("broken-record", "error", "Record that cannot be read", "Correct the record, or leave it out.", "left out"),
    Kind("duplicate-image-id", "error", "Image id given twice", "Give each image its own id.", "the later record left out"),
    Kind(
        "duplicate-annotation-id", "error", "Annotation id given twice", "Give each annotation its own id.", "given a new id"
    ),
    Kind(
        "duplicate-category", "error", "Category id or name given twice", "Make one category of the two.", "made one category"
    ),
    Kind(
        "unknown-image", "error", "Annotation of an image that is not listed", "List the image, or leave it out.", "left out"
    ),
    Kind(
        "unknown-category", "error", "Annotation of an unknown category", "Add the category, or correct its id.", "left out"
    ),
    Kind(
        "name-outside", "error", "File name that leads out of the image folder",
        "Names are relative to the image folder, without '..'.", "left out with its annotations",
    ),
    Kind(
        "image-listed-twice", "error", "The same file listed twice in a split",
        "Keep one record; put all objects of the image there.", "made one record with the objects of both",
    ),
    Kind(
        "no-size", "error", "Image record without a size",
        "Write width and height of the file into the record.", "the file's size written (images have to be read for it)",
    ),
    Kind(
        "no-size-voc", "warning", "XML file without a size (0x0)",
        "Nothing to do: litedet convert takes the size of the image.", "the image's size written",
    ),
    Kind(
        "annotation-without-image", "error", "Annotation file without an image",
        "Add the image, or remove the file.", "left out",
    ),
    # Boxes
    Kind("box-not-finite", "error", "Box with a number that is not finite", "Draw the box again.", "left out"),
    Kind(
        "box-inverted", "error", "Box turned inside out (negative width or height)",
        "Swap the corners.", "corners put in order",
    ),
    Kind("box-without-area", "error", "Box without area", "Draw the box again, or remove it.", "left out"),
    Kind(
        "box-outside", "error", "Box wholly outside its image",
        "Often boxes of another image, or in another unit. Draw it again, or remove it.", "left out",
    ),
    Kind(
        "box-twice", "error", "The same box of the same class twice",
        "Remove one: only one of two can ever be found.", "the later one left out",
    ),
    Kind(
        "box-two-classes", "warning", "The same box with two classes",
        "Keep the class that is right; a detector learns one class for a box best.",
    ),
    Kind("box-below-pixel", "warning", "Box below one pixel", "Often a slip of the mouse: look, and remove it."),
    Kind(
        "box-sticks-out", "warning", "Box that sticks out of its image",
        "Training cuts it off at the edge. Many of them mean another image size or unit.", "cut off at the edge",
    ),
    Kind(
        "box-covers-image", "warning", "Box over the whole image",
        "Right for a close-up; a label of the image in place of an object otherwise.",
    ),
    # Classes and images
    Kind("class-unused", "warning", "Category without an object", "Nothing is learnt for it; remove it, or add objects."),
    Kind("class-rare", "warning", "Class of fewer than 10 objects", "Label more of them, or join it with another class."),
    Kind(
        "class-not-learnt", "error", "Class that the first split has not",
        "Classes are matched by name: check the spelling, or label the class in the training split.",
    ),
    Kind(
        "no-objects", "warning", "Image without objects",
        "Right where there is nothing to find: it teaches background. An unlabelled image teaches wrong things.",
    ),
    # Files
    Kind(
        "missing-image", "error", "Image file that is not there",
        "Add the file, or remove its record.", "left out with its annotations",
    ),
    Kind("not-an-image", "error", "File that is no image", "Replace the file.", "left out with its annotations"),
    Kind(
        "truncated-image", "error", "Image that is cut off or does not decode",
        "Copy the file again; the disk or the download lost a part.", "left out with its annotations",
    ),
    Kind(
        "too-large", "error", "Image of too many pixels",
        "Make it smaller, or cut it into tiles.", "left out with its annotations",
    ),
    Kind(
        "damaged-image", "warning", "JPEG with damage in its middle",
        "It decodes to partly wrong pixels: copy the file again.",
    ),
    Kind(
        "size-differs", "error", "Image of another size than its record says",
        "The boxes count pixels of another image: scale them, or restore the file. Training leaves the image out.",
    ),
    Kind(
        "exif-turned", "warning", "Image that EXIF turns",
        "Look whether the boxes fit; write \"exif_orientation\": \"ignored\" into the record where they were drawn on the "
        "pixels as stored.",
    ),
    Kind("sixteen-bit", "warning", "Image of more than 8 bits a channel", "Read with its upper bits; look whether it is dark."),
    Kind("cmyk", "warning", "Image in CMYK", "Save it as RGB: colours are converted by a rough rule otherwise."),
    # Duplicates
    Kind(
        "leak", "error", "The same image in two splits",
        "Remove it from one: a figure measured on training images is worth nothing.", "left out of the earlier split",
    ),
    Kind("leak-near", "warning", "Nearly the same image in two splits", "Look: frames of one video belong into one split."),
    Kind(
        "duplicate-image", "warning", "The same image twice in a split",
        "Keep one; it counts double otherwise, and labels may contradict each other.", "the later one left out",
    ),
    Kind("duplicate-near", "warning", "Nearly the same image twice in a split", "Look whether the second teaches anything."),
    # Suspected label errors, where a checkpoint was given
    Kind(
        "label-missing", "warning", "Found with confidence where there is no label",
        "Look: is an object unlabelled, or is the detector wrong?",
    ),
    Kind("label-class", "warning", "Found with confidence as another class", "Look which of the two classes is right."),
    Kind(
        "label-place", "warning", "Found with confidence, but the label lies elsewhere",
        "Look whether the label fits the object.",
    ),
    Kind("label-not-found", "warning", "Label that no detection finds", "Look whether there is an object at all."),
)  # fmt: skip

KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
"""Every kind of finding by name, in the order in which reports show them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault.

    Attributes:
        kind: its name in ``KINDS``.
        split: number of the split.
        message: what is wrong, with the numbers.
        image: position of the image in its split; None where it is no image's fault.
        record: row of the annotation in its split's arrays; None where it is no annotation's fault.
        other: (split, image) that it concerns too: the first of two duplicates.
        score: of a suspected label error, in 0..1; the worst suspects have the highest.
        found: of a suspected label error, (x1, y1, x2, y2) of the detection in pixels of the image, and its class and score
            as text.
    """

    kind: str
    split: int
    message: str
    image: int | None = None
    record: int | None = None
    other: tuple[int, int] | None = None
    score: float | None = None
    found: tuple[tuple[float, float, float, float], str] | None = None

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind].severity
