"""Checkpoints: round trip, what is refused, and that a reader never meets half a file."""

import math
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from torch import nn

from backbones.errors import UserError
from backbones.state import load_state, remove_unfinished, write_whole
from detection.engine.checkpoint import load_checkpoint, save_checkpoint


def test_round_trip(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "empty": {},
        "weights": OrderedDict(a=torch.tensor([1.0, 2.0]), b=torch.tensor(3)),
        "names": ["cat", "dog"],
        "size": (320, 240),
        "best": 0.5,
        "flag": True,
        "nothing": None,
        "by number": {0: "zero"},
    }
    save_checkpoint(tmp_path / "a.pt", content)
    loaded = load_checkpoint(tmp_path / "a.pt")
    torch.testing.assert_close(dict(loaded["weights"]), dict(content["weights"]), rtol=0, atol=0)
    for key in ("empty", "names", "size", "best", "flag", "nothing", "by number"):
        assert loaded[key] == content[key]
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]  # no temporary file is left


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"metrics": {"ap": np.float64(0.5)}}, r"not float64 at content\['metrics'\]\['ap'\]"),
        ({"paths": ["a", Path("b")]}, r"not PosixPath at content\['paths'\]\[1\]"),
        ({"x": {np.int64(1): 2}}, r"not int64 at content\['x'\]\[key np.int64\(1\)\]"),
    ],
)
def test_only_tensors_and_plain_data(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        save_checkpoint(tmp_path / "a.pt", content)
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"epoch": 1})

    def full_disk(content: object, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt does not exist; a checkpoint was expected"):
        load_checkpoint(tmp_path / "nothing.pt")


@pytest.mark.parametrize("data", [b"not a checkpoint at all", b"PK\x03\x04 a zip file that ends too early"])
def test_file_of_another_kind(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.pt is not a checkpoint that can be read"):
        load_checkpoint(path)


def test_damaged_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a\.pt is not a checkpoint that can be read"):
        load_checkpoint(path)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(nn.Linear(1, 1), path)
    with pytest.raises(
        ValueError,
        match=r"a\.pt is not a checkpoint that can be read: it holds a torch.nn.modules.linear.Linear, which only code",
    ):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(2)])
def test_torch_file_of_another_project(tmp_path: Path, content: object) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"a\.pt was not written by this project's training"):
        load_checkpoint(path)


def test_other_format_version(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"format": "litedet checkpoint", "version": 99}, path)
    with pytest.raises(ValueError, match="has checkpoint format 99, this version of the project reads 1"):
        load_checkpoint(path)


def test_load_state() -> None:
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    load_state(target, source.state_dict(), "source")
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_every_mismatch_is_named_and_nothing_is_loaded() -> None:
    target = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    weights = {
        "0.weight": torch.zeros(3, 4),
        "0.bias": torch.zeros(3),
        "1.weight": torch.zeros(1, 3),
        "x": torch.zeros(1),
    }
    with pytest.raises(ValueError, match="of 4 tensors differ") as error:
        load_state(target, weights, "best.pt")
    assert str(error.value).splitlines() == [
        "best.pt does not fit the network, nothing was loaded (3 of 4 tensors differ):",
        "  missing: 1.bias [1]",
        "  not expected: x [1]",
        "  0.weight: expected shape [3, 2], given [3, 4]",
    ]
    torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)


def test_an_integer_is_no_float() -> None:
    with pytest.raises(UserError, match=r"bias: expected torch\.float32, given torch\.int64"):
        load_state(nn.Linear(2, 3), {"weight": torch.zeros(3, 2), "bias": torch.zeros(3, dtype=torch.int64)}, "a.pt")
    load_state(nn.Linear(2, 3), {"weight": torch.zeros(3, 2).half(), "bias": torch.zeros(3)}, "a.pt")


def test_what_is_no_finite_number_is_refused() -> None:
    for value in (math.nan, -math.inf, 1e39):  # the last is finite in float64, and above all of float32
        layer, weight = nn.Linear(2, 3), torch.zeros(3, 2, dtype=torch.float64)
        weight[2, 1] = value
        before = layer.weight.clone()
        with pytest.raises(
            ValueError, match=r"^a.pt holds values that are no finite numbers, in 1 of 2 tensors.*: weight\."
        ):
            load_state(layer, {"weight": weight, "bias": torch.zeros(3)}, "a.pt")
        assert layer.weight.equal(before)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    with pytest.raises(UserError, match=r"empty\.pt is empty, not a checkpoint"):
        load_checkpoint(tmp_path / "empty.pt")
    with pytest.raises(FileNotFoundError, match="is a folder, not a checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"'a\\x00b\.pt' cannot be the name of a file: it holds a null character"):
        load_checkpoint("a\0b.pt")
    with pytest.raises(UserError, match="it holds a null character"):
        write_whole(tmp_path / "a\0b.pt", b"")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path / "empty.pt" / "a.pt")
    os.mkfifo(tmp_path / "pipe.pt")  # opening it would wait for a writer
    with pytest.raises(UserError, match=r"pipe\.pt is a pipe or a device"):
        load_checkpoint(tmp_path / "pipe.pt")


def test_a_file_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    torch.save({"format": "litedet checkpoint", "version": 1, "weights": torch.zeros(4 << 20)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert (tmp_path / "b.pt").stat().st_size < 100_000
    with pytest.raises(UserError, match=r"b\.pt is compressed and would unpack to 1\d{7} bytes"):
        load_checkpoint(tmp_path / "b.pt")


def test_two_that_write_the_same_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    replace, others = os.replace, [b"the other's"]

    def replace_late(source: Path, target: Path) -> None:
        if others:  # the other begins and ends while this one is about to give its file the name
            write_whole(path, others.pop())
            assert path.read_bytes() == b"the other's"
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_late)
    write_whole(path, b"mine")
    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_write_that_was_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | BaseException
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise error

    write_whole(tmp_path / "a", b"before")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((KeyboardInterrupt, OSError)):
        write_whole(tmp_path / "a", b"after")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


def test_what_a_killed_writer_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a[1].pt", b"before")
    remove_unfinished(tmp_path / "a[1].pt")
    assert os.listdir(tmp_path) == ["a[1].pt"]
    monkeypatch.setattr(os, "replace", lambda source, target: None)  # where the process is killed
    write_whole(tmp_path / "a[1].pt", b"after")
    (tmp_path / "a[1].pt.mine.part").touch()  # not of our naming
    assert len(os.listdir(tmp_path)) == 3
    remove_unfinished(tmp_path / "a[1].pt")
    assert sorted(os.listdir(tmp_path)) == ["a[1].pt", "a[1].pt.mine.part"]
    assert (tmp_path / "a[1].pt").read_bytes() == b"before"
