"""Runs codecs that may crash in a helper process, so that damaged data cost one picture and not the run.

GDCM is the only free codec for lossless JPEG in DICOM, and crashes on some damaged streams. The helper starts when it
is first needed, serves one request at a time, and ends with its parent.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Start-of-frame markers: SOF0..SOF15 without DHT (C4), JPG (C8) and DAC (CC); SOF55 is JPEG-LS.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD8)) | {0x01}

# Longer than the largest frame takes, to stop a decoder in an endless loop.
LONGEST_SECONDS = 120.0


class CodecError(Exception):
    """The helper could not decode, died, or took too long. The decoder's message may quote the file."""


class Helper:
    """The parent's end of the helper process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def decode(self, path: Path, frame: int, plugin: str) -> NDArray[Any]:
        """Frame `frame` of the file at `path`, decoded by a plugin of pydicom; raises CodecError."""
        with self._lock:
            pipe = self._started()
            try:
                pipe.send((str(path), frame, plugin))
                if not pipe.poll(LONGEST_SECONDS):
                    self.close()
                    raise CodecError("took too long")
                answer = pipe.recv()
            except (EOFError, OSError):
                self.close()
                raise CodecError("died") from None
        if isinstance(answer, str):
            raise CodecError(answer)
        return np.asarray(answer)

    def _started(self) -> Connection:
        if self._pipe is None or self._process is None or self._process.poll() is not None:
            self.close()
            ours, theirs = Pipe()
            # Not multiprocessing, whose children import the caller's script and inherit its output.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fuselip_core.data.dicom.codec", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            theirs.close()
            self._pipe = ours
        return self._pipe

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._pipe = self._process = None


@functools.cache
def helper() -> Helper:
    """The helper of this process; starting one takes most of a second."""
    return Helper()


def _serve(pipe: Connection) -> None:
    from pydicom.pixels import pixel_array

    from fuselip_core.data.dicom.file import complete_syntax, discreet, read_dataset

    # The pipe closes when the parent ends, however it ends.
    with contextlib.suppress(EOFError, OSError):
        while True:
            path, frame, plugin = pipe.recv()
            try:
                with discreet():
                    dataset = read_dataset(Path(path))
                    complete_syntax(dataset)
                    pipe.send(pixel_array(dataset, index=frame, decoding_plugin=plugin))
            except Exception as error:
                pipe.send(f"{type(error).__name__} {error}")


def coded_size(stream: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels from the header of a JPEG or JPEG 2000 stream; None for other data."""
    if stream[:4] == b"\xff\x4f\xff\x51":
        return _jpeg2000(stream, 4)
    if stream[4:8] == b"jP  ":
        start = stream.find(b"\xff\x4f\xff\x51")
        return _jpeg2000(stream, start + 4) if start >= 0 else None
    return _jpeg(stream) if stream[:2] == b"\xff\xd8" else None


def _jpeg2000(stream: bytes, at: int) -> tuple[int, int] | None:
    """SIZ segment: length, capabilities, then the extent of the reference grid and its offset."""
    if len(stream) < at + 20:
        return None
    width, height, left, top = (int.from_bytes(stream[at + 4 + 4 * i : at + 8 + 4 * i], "big") for i in range(4))
    return width - left, height - top


def _jpeg(stream: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(stream):
        if stream[at] != 0xFF:
            return None
        marker = stream[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _WITHOUT_LENGTH:
            at += 2
        elif marker in _FRAME_MARKERS:
            height, width = (int.from_bytes(stream[at + 5 + 2 * i : at + 7 + 2 * i], "big") for i in range(2))
            return width, height
        else:
            at += 2 + max(2, int.from_bytes(stream[at + 2 : at + 4], "big"))
    return None


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
