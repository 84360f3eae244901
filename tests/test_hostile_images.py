"""Pictures as they come from the wild, or made to do harm: each is used, or set aside with its reason."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fuselip_core.config import PrepareSettings
from fuselip_core.data.prepare.prepare import prepare_data
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.sources.archives import ArchiveError
from fuselip_core.images import decode, to_pixels


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def grey(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def png_bomb(width: int, height: int) -> bytes:
    """A PNG that says it is huge and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def animated() -> bytes:
    return encoded(grey(7), "GIF", save_all=True, append_images=[grey(8), grey(9)], duration=40)


def sixteen_bits() -> bytes:
    values = np.arange(40 * 48, dtype=np.uint16).reshape(40, 48) * 34
    return encoded(Image.fromarray(values), "PNG")


def usable() -> dict[str, bytes]:
    colour = Image.merge("RGB", [grey(seed) for seed in (1, 2, 3)])
    return {
        "one_pixel": encoded(grey(4, 1, 1), "PNG"),
        "sliver": encoded(grey(4, 400, 1), "PNG"),
        "sixteen_bits": sixteen_bits(),
        "cmyk": encoded(colour.convert("CMYK"), "JPEG"),
        "palette": encoded(colour.convert("P"), "PNG"),
        "clear_palette": encoded(colour.quantize(16), "PNG", transparency=3),
        "animated": animated(),
        "with_alpha": encoded(colour.convert("RGBA"), "PNG"),
        "one_bit": encoded(grey(5).convert("1"), "PNG"),
        "tiff": encoded(grey(6), "TIFF"),
        "turned": encoded(colour, "JPEG", exif=Image.Exif()),
        "webp": encoded(colour, "WEBP"),
        "megapixels_100": encoded(Image.new("1", (12_500, 8_000)), "PNG"),
    }


def refused() -> dict[str, tuple[bytes, str]]:
    whole = encoded(grey(11, 300, 300), "JPEG")
    return {
        "empty": (b"", "empty_image"),
        "truncated": (whole[: len(whole) // 2], "damaged_image"),
        "header_only": (whole[:20], "not_an_image"),
        "text": (b"<html>404</html>", "not_an_image"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        "bomb": (png_bomb(60_000, 60_000), "too_large"),
        "megapixels_200": (encoded(Image.new("1", (20_000, 10_000)), "PNG"), "too_large"),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_each_is_used_or_set_aside(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    good, bad = usable(), refused()
    lines = ["ID,Caption"]
    with zipfile.ZipFile(root / "train_images.zip", "w") as archive:
        for name, data in {**good, **{name: data for name, (data, _) in bad.items()}}.items():
            archive.writestr(f"train/{name}.jpg", data)
            lines.append(f'{name},"Thorax «übersicht», 胸部X線 \U0001fa7b {name}, لا يوجد"')
        archive.writestr("../escape.jpg", good["cmyk"])
        archive.writestr("/etc/escape.jpg", good["cmyk"])
        archive.writestr("C:\\escape.jpg", good["cmyk"])
    (root / "train_captions.csv").write_text("\n".join(lines), encoding="utf-8")
    settings = PrepareSettings.model_validate({"source": "rocov2", "root": root, "workers": 1, "most_set_aside": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning for each large picture would bury everything else
        manifest = prepare_data(settings, tmp_path / "out")
    quarantine = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {item["id"]: item["reason"] for item in quarantine if item["id"] in bad}
    assert reasons == {name: reason for name, (_, reason) in bad.items()}
    assert manifest["quarantine"]["unsafe_member"] == 3
    prepared = PreparedData(tmp_path / "out")
    rows = {row["image_id"]: row for batch in prepared.iter_images("train") for row in batch.to_pylist()}
    assert rows.keys() == good.keys()
    assert all(rows[name]["bytes"] == data for name, data in good.items()), "bytes stay as published"
    captions = dict(zip(*(prepared.pairs("train")[name].to_pylist() for name in ("group", "target_text")), strict=True))
    assert captions["cmyk"] == "Thorax «übersicht», 胸部X線 \U0001fa7b cmyk, لا يوجد"
    assert not list(tmp_path.rglob("escape*"))
    for row in rows.values():
        assert to_pixels(decode(row["bytes"]), 32).shape == (32, 32, 3)


def test_deep_grey_keeps_its_shades_and_an_animation_gives_its_first_frame() -> None:
    pixels = np.asarray(decode(sixteen_bits()))
    assert pixels.dtype == np.uint8 and (pixels.min(), pixels.max()) == (0, 254) and len(np.unique(pixels)) == 255
    first = np.asarray(decode(animated()).convert("L"), dtype=int)
    assert np.abs(first - np.asarray(grey(7), dtype=int)).mean() < 4


def test_an_archive_that_is_a_bomb_is_refused_as_a_whole(tmp_path: Path) -> None:
    """Members that overlapping members: a small file that would unpack to any size."""
    path = tmp_path / "train_images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/a.jpg", b"\0" * 100_000)
        archive.writestr("train/b.jpg", b"\0" * 100_000)
        archive.filelist[1].header_offset = archive.filelist[0].header_offset
    (tmp_path / "train_captions.csv").write_text("ID,Caption\na,one scan\nb,two scans\n")
    settings = PrepareSettings.model_validate({"source": "rocov2", "root": tmp_path, "workers": 1, "most_set_aside": 1})
    with pytest.raises(ArchiveError, match="overlapping members"):
        prepare_data(settings, tmp_path / "out")


def test_a_member_that_unpacks_to_gigabytes_is_never_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "train_images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/bomb.jpg", b"\0" * (64 << 20))
        archive.writestr("train/good.jpg", encoded(grey(1), "JPEG"))
    (tmp_path / "train_captions.csv").write_text("ID,Caption\nbomb,a scan\ngood,another scan\n")
    settings = PrepareSettings.model_validate({"source": "rocov2", "root": tmp_path, "workers": 1, "most_set_aside": 1})
    manifest = prepare_data(settings, tmp_path / "out")
    assert manifest["quarantine"] == {"missing_image": 1, "unsafe_member": 1}
    assert manifest["counts"]["train"]["images"] == 1
