"""The size that a JPEG, JPEG-LS or JPEG 2000 code stream states, found without decoding anything."""

from __future__ import annotations

# Start-of-frame markers: SOF0..SOF15 without DHT (C4), JPG (C8) and DAC (CC); SOF55 is JPEG-LS.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD8)) | {0x01}


def coded_size(stream: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels that the header of `stream` states; None where it is no such stream."""
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
