"""Output that nobody reads any more ends a command quietly, and a training not at all. Run: pytest tests/test_streams.py"""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from detection.engine.errors import main_errors
from detection.engine.streams import STATUS, LineHandler, quiet_without_reader, reader_has_gone


@pytest.fixture
def unread() -> Iterator[int]:
    """The end for writing of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


_FAILS = "from detection.engine.errors import main_errors; main_errors(lambda argv: print('line' * 9))([])"
_TELLS = "from detection.engine.errors import main_errors as m; m(lambda argv: print('x') or open('/none'))([])"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("code", ["from detection.cli.main import main; main(['--help'])", _FAILS])
def test_a_command_without_a_reader_ends_without_a_word(unread: int, code: str, unbuffered: str) -> None:
    done = _run(code, unread, unbuffered)
    assert (done.returncode, done.stderr) == (STATUS, "")


def test_an_error_is_told_all_the_same(unread: int) -> None:
    done = _run(_TELLS, unread, "")
    assert done.stderr == "error: [Errno 2] No such file or directory: '/none'\n"
    assert done.returncode == STATUS


def _run(code: str, stdout: int, unbuffered: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, check=False
    )


def test_another_pipe_that_breaks_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    @main_errors
    def main(argv: object = None) -> None:
        raise BrokenPipeError(32, "Broken pipe", "a worker's")

    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "a worker's" in capsys.readouterr().err
    with pytest.raises(BrokenPipeError), quiet_without_reader():
        raise BrokenPipeError


def test_who_has_a_reader() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        assert not reader_has_gone(stream)
        os.close(reading)
        assert reader_has_gone(stream)
    assert not reader_has_gone(stream)  # closed
    assert not reader_has_gone(None)


def test_lines_of_a_log_are_dropped_without_a_reader(capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    record = logging.makeLogRecord({"msg": "a line"})
    with os.fdopen(writing, "w") as stream:
        handler = LineHandler(stream)
        handler.handle(record)
        assert os.read(reading, 100) == b"a line\n"
        os.close(reading)
        handler.handle(record)
        handler.handle(record)
    assert capsys.readouterr().err == ""
    handler.handle(record)  # a closed stream is a mistake of ours and is told
    assert "I/O operation on closed file" in capsys.readouterr().err
