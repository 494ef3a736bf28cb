"""Images that are the same, or nearly, among many: within a split and across splits.

The same: equal files. Nearly the same: a difference hash of 128 bits (each bit says which of two neighbours in a 9 x 9
thumbnail is brighter, 64 along the rows and 64 along the columns; Neal Krawetz, "Kind of like that", 2013), of which at most
``MAX_DISTANCE`` bits differ, and thumbnails that agree. It survives another size, another JPEG quality and a small change of
brightness; a mirrored or cut image is another image to it.

Two hashes of 128 bits that differ in at most seven agree in one of eight bands of 16 bits, so only images that share a band are
compared: not n * n / 2 pairs, and none of those is missed. (Bands that very many images share, as of an unmoving camera, are
gone through in sorted order, each image against the next ones.)

Letters in shapes: I images of all splits together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from detection.checks.files import THUMB, FileTable
from detection.checks.findings import Finding
from detection.checks.split import Split

MAX_DISTANCE = 7
"""Bits of 128 in which the hashes of nearly equal images may differ."""
_BANDS = 8
_LARGEST = 2048  # images of a band that are compared each with each
_NEXT = 64  # images that each one of a larger band is compared with
_LEAST_CONTRAST = 4.0  # standard deviation of a thumbnail in grey levels; a plain one is like every other plain one
_MOST_DIFFERENCE = 12.0  # mean difference of two thumbnails in grey levels, each with its mean taken off
_PAIRS = 1 << 22  # pairs compared at once


def find_duplicates(splits: Sequence[Split], tables: Sequence[FileTable]) -> list[Finding]:
    """Findings for images that are another one, or nearly.

    Without pixels (``FileTable.digests`` empty) only the same path in two splits is found.

    Args:
        splits, tables: as many of each.
    """
    starts = np.cumsum([0, *map(len, splits)])
    split_of = np.repeat(np.arange(len(splits)), [len(split) for split in splits])
    exact = _exact(splits, tables)
    findings = _findings(splits, starts, split_of, [(exact, None)], ("duplicate-image", "leak"))
    thumbs = np.concatenate([table.thumbs for table in tables])
    first_of_its_kind = np.concatenate([table.decoded for table in tables])
    first_of_its_kind[np.unique(exact[exact >= 0])] = True
    again = exact >= 0
    rows = np.flatnonzero(first_of_its_kind & ~again)
    nearest = _Nearest(split_of)
    for first, second, distance in near_pairs(thumbs[rows]):
        nearest.add(rows[first], rows[second], distance)
    findings += _findings(
        splits,
        starts,
        split_of,
        [(nearest.same, nearest.same_distance), (nearest.across, nearest.across_distance)],
        ("duplicate-near", "leak-near"),
    )
    return findings


def _exact(splits: Sequence[Split], tables: Sequence[FileTable]) -> NDArray[np.int64]:
    """int64 [I], the first image that is the same file; -1 where there is none before."""
    digests = np.concatenate([table.digests for table in tables])
    same = np.full(len(digests), -1)
    read = np.flatnonzero(digests != np.void(bytes(16)))
    _, first, inverse = np.unique(digests[read], return_index=True, return_inverse=True)
    same[read] = np.where(read[first[inverse]] == read, -1, read[first[inverse]])
    if len(splits) > 1:
        seen: dict[str, int] = {}
        row = 0
        for split in splits:
            folder = "" if split.image_dir is None else os.path.abspath(split.image_dir)
            own: dict[str, int] = {}
            for name in split.file_names:
                path = os.path.join(folder, name)
                if same[row] < 0 and path in seen:
                    same[row] = seen[path]
                own.setdefault(path, row)
                row += 1
            for path, place in own.items():
                seen.setdefault(path, place)
    return same


class _Nearest:
    """The nearest image before each, in its own split and in an earlier one."""

    def __init__(self, split_of: NDArray[np.int64]) -> None:
        self.split_of = split_of
        self.same, self.across = (np.full(len(split_of), -1) for _ in range(2))
        self.same_distance, self.across_distance = (np.full(len(split_of), 129) for _ in range(2))

    def add(self, first: NDArray[np.int64], second: NDArray[np.int64], distance: NDArray[np.int64]) -> None:
        """Pairs (first < second) and their distances."""
        own = self.split_of[first] == self.split_of[second]
        for chosen, best, least in (
            (own, self.same, self.same_distance),
            (~own, self.across, self.across_distance),
        ):
            order = np.argsort(-distance[chosen], kind="stable")  # the last to be written is the nearest
            one, two, far = first[chosen][order], second[chosen][order], distance[chosen][order]
            better = far < least[two]
            best[two[better]], least[two[better]] = one[better], far[better]


def near_pairs(
    thumbs: NDArray[np.uint8],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of nearly equal thumbnails: first < second, and the distance of their hashes; a pair may come more than once.

    Args:
        thumbs: uint8 [I, 9, 9].
    """
    contrast = thumbs.reshape(-1, THUMB * THUMB).std(axis=1)
    rows = np.flatnonzero(contrast >= _LEAST_CONTRAST)
    hashes = difference_hashes(thumbs[rows])
    centred = thumbs[rows].reshape(-1, THUMB * THUMB).astype(np.int16)
    centred -= centred.mean(axis=1, keepdims=True).astype(np.int16)
    bands = hashes.view(np.uint16)
    for band in range(_BANDS):
        # Sorted by the band and then by the whole hash, so that in a crowded band near ones stand near each other.
        order = np.lexsort((hashes[:, 1], hashes[:, 0], bands[:, band]))
        for one, two in _neighbours(bands[order, band]):
            first, second = order[one], order[two]
            distance = np.zeros(len(first), np.int64)
            for word in hashes.T:  # most pairs are told apart by the first
                distance += bit_counts(word[first] ^ word[second])
                close = distance <= MAX_DISTANCE
                first, second, distance = first[close], second[close], distance[close]
            difference = np.abs(centred[first] - centred[second]).mean(axis=1)
            alike = difference <= _MOST_DIFFERENCE
            pair = np.sort(np.stack([first[alike], second[alike]]), axis=0)
            if pair.shape[1]:
                yield rows[pair[0]], rows[pair[1]], distance[alike]


def difference_hashes(thumbs: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """uint8 [I, 9, 9] -> uint64 [I, 2]: 64 bits of brightness along the rows and 64 along the columns.

    They are dealt out to the bands in turn: neighbouring bits are alike, and a band of such would hold many images.
    """
    along = thumbs[:, :8, 1:] > thumbs[:, :8, :-1]
    down = thumbs[:, 1:, :8] > thumbs[:, :-1, :8]
    bits = np.stack([along, down], axis=1).reshape(len(thumbs), 16, _BANDS).transpose(0, 2, 1).reshape(-1, 128)
    return np.packbits(bits, axis=1).view(np.uint64)


def bit_counts(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The bits that are set in each word (numpy 2 has it as ``bitwise_count``)."""
    words = words - ((words >> np.uint64(1)) & np.uint64(0x5555555555555555))
    words = (words & np.uint64(0x3333333333333333)) + ((words >> np.uint64(2)) & np.uint64(0x3333333333333333))
    words = (words + (words >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((words * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)


def _neighbours(keys: NDArray[np.uint16]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Places (one < two) of sorted keys that are equal: offset by offset, some million pairs at once."""
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
    lengths = np.diff(np.append(starts, len(keys)))
    reach = np.where(lengths > _LARGEST, _NEXT, lengths - 1)
    ends = np.repeat(starts + lengths, lengths)
    reach_of = np.repeat(reach, lengths)
    places = np.arange(len(keys))
    offset, collected, size = 1, [], 0
    while len(places := places[(places + offset < ends[places]) & (offset <= reach_of[places])]):
        collected.append((places, places + offset))
        size += len(places)
        if size >= _PAIRS:
            yield tuple(np.concatenate(part) for part in zip(*collected, strict=True))  # type: ignore[misc]
            collected, size = [], 0
        offset += 1
    if collected:
        yield tuple(np.concatenate(part) for part in zip(*collected, strict=True))  # type: ignore[misc]


def _findings(
    splits: Sequence[Split],
    starts: NDArray[np.int64],
    split_of: NDArray[np.int64],
    found: Sequence[tuple[NDArray[np.int64], NDArray[np.int64] | None]],
    kinds: tuple[str, str],
) -> list[Finding]:
    """A finding for each image with another one before it; ``kinds`` for one in its own split and in an earlier one."""
    findings = []
    for others, distances in found:
        for row in np.flatnonzero(others >= 0).tolist():
            other = int(others[row])
            number, other_number = int(split_of[row]), int(split_of[other])
            position, other_position = row - int(starts[number]), other - int(starts[other_number])
            own, before = splits[number], splits[other_number]
            if own is before and own.file_names[position] == before.file_names[other_position]:
                continue  # one file under two records, which is a finding of its own
            text = f"{own.file_names[position]} is {'' if distances is None else 'nearly '}{before.file_names[other_position]}"
            if number != other_number:
                text += f" of {before.name}"
            if distances is not None:
                text += f" ({100 * (1 - distances[row] / 128):.0f} % alike)"
            findings.append(
                Finding(
                    kind=kinds[number != other_number],
                    split=number,
                    image=position,
                    other=(other_number, other_position),
                    message=text,
                )
            )
    return findings
