"""Every kind of table, and what real ones break: nothing is cut or swallowed, a bad row costs no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fuselip_core.data import table_reader
from fuselip_core.data.pair import DataError
from fuselip_core.data.table_reader import columns_of, json_array, read_table

LONG = "nodule " * 30_000


def read(path: Path, content: str | bytes, *optional: str) -> tuple[list[tuple[Any, ...]], dict[int, str]]:
    """The rows of a file with `content` as tuples, and its bad rows by line."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    bad: dict[int, str] = {}
    rows = [tuple(row.values()) for row in read_table(path, ("ID", "Caption"), optional, bad.__setitem__)]
    return rows, bad


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("ID,Caption\n1,a\n2,b", [("1", "a"), ("2", "b")]),
        ("\ufeff\r\nID,Caption\r\n\r\n1,a\r\n", [("1", "a")]),
        ('ID, Caption\n1, a\n2, "b, c"\n', [("1", "a"), ("2", "b, c")]),
        ('"ID" \n', None),
        ("Caption;x;ID\nnodule, left;0;1\n", [("1", "nodule, left")]),
        ("ID\tCaption\n1\tnodule, left\n", [("1", "nodule, left")]),
        ("ID,Caption,,\n1,a,,\n2,b\n", [("1", "a"), ("2", "b")]),
        (",ID,Caption\n0,1,a\n", [("1", "a")]),
        ('ID,Caption\n1,"two\nlines, ""quoted"""\n2,5" wide\n', [("1", 'two\nlines, "quoted"'), ("2", '5" wide')]),
        ('ID,Caption\n1,"measures\n5, 6 and 7 mm"\n', [("1", "measures\n5, 6 and 7 mm")]),
        ("ID,Caption\n", []),
    ],
)
def test_csv_in_each_dialect(tmp_path: Path, content: str, rows: list[tuple[str, str]] | None) -> None:
    if rows is None:
        with pytest.raises(DataError, match="faulty quote"):
            read(tmp_path / "t.csv", content)
    else:
        assert read(tmp_path / "t.csv", content) == (rows, {})


def test_a_long_field_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(LONG) > 131_072
    assert read(tmp_path / "t.csv", f"ID,Caption\n1,{LONG}\n2,b\n") == ([("1", LONG), ("2", "b")], {})
    monkeypatch.setattr(table_reader, "MOST_CHARACTERS", 1000)
    rows, bad = read(tmp_path / "t.csv", f"ID,Caption\n1,{LONG}\n2,b\n")
    assert rows == [("2", "b")] and "more than 1,000 characters" in bad[2]


@pytest.mark.parametrize(
    ("lines", "good", "bad"),
    [
        (["1,nodule, left lung, 5 mm", "2,b"], ["2"], {2: "4 fields in 2 columns; a text that contains a comma"}),
        (["1", "2,b"], ["2"], {2: "only 1 of 2 fields"}),
        (['1,"never closes', "2,b", "3,c"], ["2", "3"], {2: "does not close before line 4"}),
        (['1,"never closes', "2,b", '3,"c, d"', "4,e"], ["2", "3", "4"], {2: "does not close before line 4"}),
        (["1,a", '2,"the last'], ["1"], {3: "a quote that never closes"}),
        (['1,"a "quoted" word"', "2,b"], ["2"], {2: "not doubled"}),
        (['1,"a', "2,b", '3,c"', "4,d"], ["4"], {2: "swallows the rows up to line 4"}),
        (["", '1,"two', 'lines"', "2,b,c", "3,d"], ["1", "3"], {5: "3 fields"}),
    ],
)
def test_a_bad_row_is_set_aside_with_its_line(
    tmp_path: Path, lines: list[str], good: list[str], bad: dict[int, str]
) -> None:
    rows, found = read(tmp_path / "t.csv", "\n".join(["ID,Caption", *lines]))
    assert [row[0] for row in rows] == good
    assert found.keys() == bad.keys() and all(said in found[line] for line, said in bad.items()), found
    with pytest.raises(DataError, match=rf"t\.csv, line {min(bad)}: "):
        list(read_table(tmp_path / "t.csv", ("ID", "Caption")))


def test_many_open_quotes_cost_one_row_each(tmp_path: Path) -> None:
    lines = [f'{number},"open {number}' if number % 3 == 0 else f"{number},text" for number in range(3000)]
    rows, bad = read(tmp_path / "t.csv", "\n".join(["ID,Caption", *lines]))
    assert len(rows) == 2000 and len(bad) == 1000


UTF16 = "ID,Caption\n1,a\n".encode("utf-16")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", POINTER, "Git LFS"),
        ("t.jsonl", POINTER, "Git LFS"),
        ("t.parquet", POINTER, "Git LFS"),
        ("t.csv", b"\n<!DOCTYPE html><html>", "HTML page"),
        ("t.json", b"<html>", "HTML page"),
        ("t.csv", UTF16, "UTF-16"),
        ("t.csv", UTF16[2:], "UTF-16"),
        ("t.json", '[{"ID": 1, "Caption": "a"}]'.encode("utf-16"), "UTF-16"),
        ("t.csv", b"", "is empty"),
        ("t.tsv", b" \n\n", "is empty"),
        ("t.parquet", b"", "is empty"),
        ("t.csv", b"PK\3\4rest", "Excel sheet"),
        ("t.csv", b"\x1f\x8brest", "gzip"),
        ("t.csv", b"PAR1rest", "Parquet file"),
        ("t.csv", b'{"ID": 1}', "is JSON"),
        ("t.csv", b"\xd0\xcf\x11\xe0\0\x01\x02", "binary data"),
        ("t.csv", "ID,Caption\n1,\xfc\n".encode("latin-1"), "not UTF-8"),
        ("t.csv", b"ID,Caption,Caption\n1,a,b\n", "several columns Caption"),
        ("t.csv", b"ID;Text\n1;a\n", "lacks the column Caption"),
        ("t.json", b'{"ID": 1}', "does not contain a list"),
        ("t.json", b"[]", "empty list"),
        ("t.json", b"[1]", "does not contain a list"),
        ("t.json", b'[{"ID": 1, "Caption": "a"}', "not valid JSON"),
        ("t.json", b'[{"ID": 1, "Caption": "a", "Caption": "b"}]', "the key Caption occurs twice"),
        ("t.json", b'[{"ID": 1}]', "lacks the column Caption"),
        ("t.parquet", b"PAR1rest", "not a readable Parquet"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    with pytest.raises(DataError, match=said) as raised:
        read(tmp_path / name, content)
    assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "t.csv", "no file"), (tmp_path, "is a folder")):
        with pytest.raises(DataError, match=said):
            list(read_table(path, ("ID",)))


def test_json_lines(tmp_path: Path) -> None:
    good = {"ID": 1, "Caption": LONG, "more": [1]}
    lines = [json.dumps(good), "", '{"ID": 2, "Caption"', '{"ID": 3}', '["ID"]', '{"ID": 4, "ID": 5, "Caption": ""}']
    rows, bad = read(tmp_path / "t.jsonl", "\n".join([*lines, json.dumps(good | {"ID": 6})]), "more", "other")
    assert rows == [(1, LONG, [1], None), (6, LONG, [1], None)]
    assert bad.keys() == {3, 4, 5, 6} and "the key ID occurs twice" in bad[6] and bad[4] == "no Caption"
    assert read(tmp_path / "t.jsonl", json.dumps([good], indent=1)) == ([(1, LONG)], {})


def test_json_and_parquet(tmp_path: Path) -> None:
    rows = [{"ID": number, "Caption": f"text {number}", "cui": ["C1"]} for number in range(600)]
    (tmp_path / "t.json").write_text(json.dumps([*rows, {"ID": 1}, 7]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=250)
    bad: dict[int, str] = {}
    assert list(read_table(tmp_path / "t.json", ("ID", "Caption"), ("cui",), bad.__setitem__)) == rows
    assert bad == {601: "no Caption", 602: "no JSON object"}
    expected = [row | {"split": None} for row in rows]
    assert list(read_table(tmp_path / "t.parquet", ("ID", "Caption"), ("cui", "split"))) == expected
    doubled = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["ID", "ID"])
    pq.write_table(doubled, tmp_path / "doubled.parquet")
    with pytest.raises(DataError, match="several columns"):
        list(read_table(tmp_path / "doubled.parquet", ("ID",)))


def test_columns_of_each_kind(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("ID, Caption,\n1,a,\n")
    (tmp_path / "t.jsonl").write_text('{"ID": 1, "Caption": "a"}\n')
    pq.write_table(pa.table({"ID": [1], "Caption": ["a"]}), tmp_path / "t.parquet")
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        assert columns_of(tmp_path / name) == ("ID", "Caption"), name


def test_json_lists_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"a": [1, {"b": "ü,] ["}]}, 12345, "text", [], None, {"c": 1.5e3}]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    for size in (1, 3, 7, 1 << 20):
        monkeypatch.setattr(table_reader, "READ_CHARACTERS", size)
        assert list(json_array(path)) == values
    path.write_text(json.dumps(values)[:-5])
    with pytest.raises(DataError, match=r"list\.json"):
        list(json_array(path))
