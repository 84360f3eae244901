"""`fuselip data`: prepare, inspect and diff as a user types them."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fuselip_core.cli import data as data_cli
from fuselip_core.cli.main import app
from fuselip_core.config import SettingsError, SourceName
from fuselip_core.data.inspect.contact_sheet import write_sheet
from fuselip_core.data.inspect.diff import differences
from fuselip_core.data.pair import DataError
from fuselip_core.data.phantom.data_set import draw_data_set
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.sources.catalogue import source_names
from fuselip_core.data.spool import ITEMS_A_BLOCK, Spool

run = CliRunner().invoke


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The raw sample, and what `fuselip data prepare` makes of it."""
    root = tmp_path_factory.mktemp("data")
    draw_data_set(root / "raw", seed=0, counts={"train": 12, "test": 6})
    result = run(app, prepare_command(root / "raw", root / "prepared"))
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["counts"]["train"]["images"] == 12
    return root / "raw", root / "prepared"


def prepare_command(raw: Path, out: Path, *more: str) -> list[str]:
    return [
        "data",
        "prepare",
        "--source",
        "phantom",
        "--root",
        str(raw),
        "--out",
        str(out),
        "--set",
        "workers=1",
        *more,
    ]


class Page(HTMLParser):
    """Tags that are open, addresses that are named, and the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "line", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_inspect_writes_a_page_that_needs_nothing_else(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(app, ["data", "inspect", str(folders[1]), "--out", str(tmp_path / "look"), "--samples", "3"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.output)
    assert summary["words"]["train/vqa/query_text"]["texts"] == 48
    content = (tmp_path / "look" / "index.html").read_text(encoding="utf-8")
    page = Page(content)
    assert not page.open
    images = [address for address in page.addresses if not address.startswith("#")]
    assert len(images) == 12 and all(address.startswith("data:image/jpeg") for address in images)
    # Every link leads to a section of the page.
    assert all(f'id="{address[1:]}"' in content for address in page.addresses if address.startswith("#"))
    for words in ("Counts", "Modality", "Licence", "Words per text", "Samples of train", "Samples of test"):
        assert words in page.text
    # Licences may be addresses; nothing is loaded from one.
    assert not re.search(r"(?:src|href|url|@import)[=(\s'\"]*https?:", content)
    assert Image.open(tmp_path / "look" / "contact-sheet.png").width > 800


def test_the_sheet_has_every_split_and_both_pictures_of_an_edit(tmp_path: Path) -> None:
    pictures = {}
    for name, colour in (("before", (255, 0, 0)), ("after", (0, 0, 255))):
        stream = io.BytesIO()
        Image.new("RGB", (50, 50), colour).save(stream, "PNG")
        pictures[name] = stream.getvalue()
    edit = {"query_image": "before", "query_text": "make it blue", "target_image": "after", "target_text": None}
    question = {"query_image": "before", "query_text": "red?", "target_image": None, "target_text": "yes"}
    write_sheet(tmp_path / "sheet.png", {"train": ([edit] * 7, pictures), "test": ([question], pictures)})
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    red, blue = ((sheet == colour).all(axis=2) for colour in ((255, 0, 0), (0, 0, 255)))
    # Thumbnails keep their 50 pixels: eight reds, seven blues, each blue right of a red in the same rows.
    assert (red.sum(), blue.sum()) == (8 * 2500, 7 * 2500)
    first = np.argwhere(red).min(axis=0), np.argwhere(blue).min(axis=0)
    assert first[0][0] == first[1][0] and first[0][1] < first[1][1]
    assert np.argwhere(red).max() > np.argwhere(blue).max(axis=0)[0]


def test_inspect_escapes_what_a_data_set_says(folders: tuple[Path, Path], tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    draw_data_set(raw, seed=1, counts={"train": 3})
    captions = raw / "train_captions.csv"
    lines = captions.read_text().splitlines()
    lines[1] = lines[1].split(",")[0] + ",<script>alert(1)</script> & more"
    captions.write_text("\n".join(lines))
    assert run(app, prepare_command(raw, tmp_path / "out")).exit_code == 0
    assert run(app, ["data", "inspect", str(tmp_path / "out")]).exit_code == 0
    content = (tmp_path / "out-inspection" / "index.html").read_text()
    assert "<script>" not in content and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in content


def test_inspect_shows_any_script_and_folds_long_texts(folders: tuple[Path, Path], tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    draw_data_set(raw, seed=1, counts={"train": 3})
    captions = raw / "train_captions.csv"
    lines = captions.read_text().splitlines()
    texts = (
        "Röntgen, Ödem, Ελληνικά, рентген, 胸部, صورة",
        " ".join(f"word{number}" for number in range(200)),
        "x" * 900,
    )
    rows = [f'{line.split(",")[0]},"{text}"' for line, text in zip(lines[1:], texts, strict=True)]
    captions.write_text("\n".join([lines[0], *rows]), encoding="utf-8")
    assert run(app, prepare_command(raw, tmp_path / "out")).exit_code == 0
    assert run(app, ["data", "inspect", str(tmp_path / "out")]).exit_code == 0
    page = Page((tmp_path / "out-inspection" / "index.html").read_text(encoding="utf-8"))
    assert texts[0] in page.text
    assert all(f"word{number} " in page.text for number in range(199)) and page.text.count("x" * 220) == 4
    assert Image.open(tmp_path / "out-inspection" / "contact-sheet.png").height > 200


def test_diff_names_rows(folders: tuple[Path, Path], tmp_path: Path) -> None:
    raw, prepared = folders
    assert run(app, ["data", "diff", str(prepared), str(prepared)]).output == "no row differs\n"
    other = tmp_path / "raw"
    other.mkdir()
    for path in raw.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    captions = other / "train_captions.csv"
    lines = captions.read_text().splitlines()
    gone, changed = lines[1].split(",")[0], lines[2].split(",")[0]
    captions.write_text("\n".join([lines[0], f"{changed},another caption", *lines[3:]]))
    assert run(app, prepare_command(other, tmp_path / "out", "--set", "most_set_aside=1")).exit_code == 0
    result = run(app, ["data", "diff", str(prepared), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"removed images train {gone}" in result.output
    assert f"changed pairs train {changed}/caption" in result.output
    found = {(part.table, part.split): part for part in differences(tmp_path / "out", prepared)}
    assert found.keys() == {("images", "train"), ("pairs", "train")}
    assert found["images", "train"].added == (gone,) and not found["images", "train"].changed
    assert f"{gone}/caption" in found["pairs", "train"].added


def test_a_terminal_shows_a_table_and_a_pipe_gets_json(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_cli, "_at_a_terminal", lambda: True)
    for command in (
        ["data", "inspect", str(folders[1]), "--out", str(tmp_path / "look")],
        prepare_command(folders[0], tmp_path / "out"),
    ):
        result = run(app, command)
        assert result.exit_code == 0 and len(result.output.splitlines()) < 15 and "{" not in result.output
        assert re.search(r"train +12 +\d+ +12 +48", result.output) and "set aside: nothing" in result.output


def test_raw_data_is_not_advised_to_be_replaced(folders: tuple[Path, Path]) -> None:
    result = run(app, ["data", "inspect", str(folders[0])])
    assert isinstance(result.exception, DataError) and "holds no prepared data" in str(result.exception)
    assert "--out" not in str(result.exception) and f"--root {folders[0]}" in str(result.exception)


def test_a_wrong_field_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(app, prepare_command(folders[0], tmp_path / "out", "--set", "worker=2"))
    assert isinstance(result.exception, SettingsError) and "workers" in str(result.exception)


def test_every_source_of_the_settings_has_an_adapter() -> None:
    assert set(source_names()) == set(SourceName.__args__)
    assert json.loads(run(app, ["data", "sources"]).output)["prepare"] == list(source_names())


def test_a_dicom_folder_with_a_table(tmp_path: Path) -> None:
    """pydicom's own files: pictures and text come out, and neither a path nor an identity."""
    pydicom = pytest.importorskip("pydicom")
    files = Path(pydicom.__file__).parent / "data" / "test_files"
    root = tmp_path / "Mustermann"
    root.mkdir()
    names = ("CT_small.dcm", "MR_small.dcm", "JPEG2000.dcm", "SC_rgb_small_odd.dcm", "rtplan.dcm", "ExplVR_BigEnd.dcm")
    for name in names:
        (root / name).write_bytes((files / name).read_bytes())
    (root / "broken.dcm").write_bytes((files / "CT_small.dcm").read_bytes()[:400])
    table = tmp_path / "table.csv"
    table.write_text("file,text\nCT_small.dcm,A slice of the thorax for the table\n")
    out = tmp_path / "out"
    key = f"dicom.key_file={tmp_path / 'key'}"
    command = ["data", "prepare", "--source", "dicom", "--root", str(root), "--text", str(table), "--out", str(out)]
    result = run(app, [*command, "--set", "workers=1", "--set", key, "--set", "dicom.test_share=0.0"])
    assert result.exit_code == 0, result.output
    prepared = PreparedData(out)
    texts = [text for split in prepared.splits for text in prepared.pairs(split)["target_text"].to_pylist()]
    assert "A slice of the thorax for the table" in texts
    assert sum(prepared.image_count(split) for split in prepared.splits) == 5
    assert len((out / "quarantine.jsonl").read_text().splitlines()) >= 2
    for path in out.iterdir():
        content = path.read_bytes()
        for secret in (
            b"Mustermann",
            b"CompressedSamples",
            b"1CT1",
            b"1.3.6.1.4.1.5962",
            bytes(str(tmp_path), "utf-8"),
        ):
            assert secret not in content, (path.name, secret)


def test_a_field_may_name_its_section(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """`--set prepare.limit=4`, as pipelines have it, sets what `--set limit=4` sets."""
    for place, field in (("short", "limit=4"), ("long", "prepare.limit=4")):
        result = run(app, prepare_command(folders[0], tmp_path / place, "--set", field))
        assert result.exit_code == 0, result.output
        assert PreparedData(tmp_path / place).image_count("train") == 4


def test_a_spool_is_a_list_on_disk() -> None:
    count = 2 * ITEMS_A_BLOCK + 5
    spool = Spool(range(count))
    assert len(spool) == count and list(spool) == list(range(count)) == list(spool)
    assert [spool[place] for place in (0, -1, ITEMS_A_BLOCK, ITEMS_A_BLOCK - 1)] == [
        0,
        count - 1,
        ITEMS_A_BLOCK,
        ITEMS_A_BLOCK - 1,
    ]
    assert [len(part) for part in spool.parts(5000)] == [5000, count - 5000]
    assert spool == list(range(count)) and spool != [1] and not Spool()
    with pytest.raises(IndexError):
        spool[count]
