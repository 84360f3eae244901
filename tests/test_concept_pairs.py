"""Pairs beside the caption: sentences, names of concepts, questions by rules, and edits."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from instructions import obey
from PIL import Image
from training_data import write_raw

from fuselip_core.config import PrepareSettings
from fuselip_core.data.pair import DataError
from fuselip_core.data.prepare.extra_pairs import sentences_of
from fuselip_core.data.prepare.prepare import prepare_data
from fuselip_core.data.shards.in_order import pixel_batches
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.tokens.store import ABSENT, TokenStore, gather
from fuselip_core.data.transforms import FAMILIES, GENERAL
from fuselip_core.images import to_pixels
from fuselip_core.training.mixture import Mixture


def prepared(root: Path, folder: Path, kinds: tuple[str, ...] = ("concepts",)) -> PreparedData:
    fields = {"source": "rocov2", "root": root, "workers": 1, "extra_pairs": kinds}
    settings = PrepareSettings.model_validate(fields)
    prepare_data(settings, folder / "prepared", folder / "work")
    return PreparedData(folder / "prepared")


def test_each_image_leads_to_the_names_of_its_concepts(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=6, held_out=2)
    table = tmp_path / "raw" / "train_concepts.csv"
    first = table.read_text().splitlines()[1].split(",")[0]
    table.write_text(table.read_text().replace(f"{first},C0040405", f"{first},C0817096;C0040405;C0000001"))
    with (tmp_path / "raw" / "cui_mapping.csv").open("a") as mapping:
        mapping.write("C0817096,Chest\n")
    data = prepared(tmp_path / "raw", tmp_path)
    pairs = [row for row in data.pairs("train").to_pylist() if row["kind"] == "concepts"]
    texts = {row["query_image"]: row["target_text"] for row in pairs}
    assert len(texts) == 6 and texts.pop(first) == "Chest; X-Ray Computed Tomography"
    assert set(texts.values()) == {"X-Ray Computed Tomography"}
    assert all(row["query_text"] is None and row["group"] == row["query_image"] for row in pairs)
    assert "1 concepts of images have no name in cui_mapping.csv and are in no pair" in data.manifest["notes"]


def test_concepts_without_their_names_are_one_sentence(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=6, held_out=2)
    (tmp_path / "raw" / "cui_mapping.csv").unlink()
    with pytest.raises(DataError, match=r"has no cui_mapping\.csv with concept names"):
        prepared(tmp_path / "raw", tmp_path)


def test_sentences_are_told_apart() -> None:
    caption = "Axial CT (Fig. 2) of the chest. A nodule vs. Scar is seen in St. Mary's. See. The lung is clear."
    assert sentences_of(caption) == [
        "Axial CT (Fig. 2) of the chest.",
        "A nodule vs. Scar is seen in St. Mary's.",
        "The lung is clear.",
    ]
    assert sentences_of("One sentence of 2.5 cm only") == ["One sentence of 2.5 cm only"]


def test_every_kind_of_pair_from_the_same_images(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=12, held_out=3)
    for split in ("train", "valid", "test"):
        table = tmp_path / "raw" / f"{split}_captions.csv"
        table.write_text(table.read_text().replace("half is bright, seen", "half is bright. It was seen"))
    plain = prepared(tmp_path / "raw", tmp_path / "plain", kinds=())
    data = prepared(tmp_path / "raw", tmp_path / "all", kinds=("sentences", "concepts", "questions", "edits"))
    rows = data.pairs("train").to_pylist()
    kinds = Counter(row["kind"] for row in rows)
    assert kinds["caption"] == kinds["sentence"] == kinds["concepts"] == 12
    assert kinds["edit"] in range(30, 37) and kinds["vqa"] >= 24
    # No file holds what an instruction makes; the token store has a row for each.
    assert data.image_count("train") == 12 and data.row_count("train") == 12 + kinds["edit"]
    # What is measured stays as it is: nothing is edited there, and captions are the same.
    for split in ("valid", "test"):
        assert data.image_count(split) == plain.image_count(split)
        captions = [row for row in data.pairs(split).to_pylist() if row["kind"] == "caption"]
        assert captions == [row for row in plain.pairs(split).to_pylist() if row["kind"] == "caption"]
    answers = {row["target_text"] for row in rows if row["query_text"] == "What imaging modality is this?"}
    assert answers == {"ct"}


def pictures_of(data: PreparedData, split: str = "train") -> dict[str, np.ndarray]:
    """Every picture of a split as it is read to be tokenized, by its id, in its own size."""
    ids, found = data.row_ids(split).to_pylist(), {}
    draw = lambda image, row: np.array(image.convert("RGB"))[None]  # noqa: E731
    for start in (0, 5):  # from any row on
        for first, batch in pixel_batches(data, split, draw, batch_rows=7, start=start):
            found |= {ids[first + place]: picture[0] for place, picture in enumerate(batch)}
    assert sorted(found) == sorted(ids)
    return found


def test_edits_are_what_their_instruction_says_and_never_mirrored(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=24, held_out=2)
    data = prepared(tmp_path / "raw", tmp_path, kinds=("edits",))
    images = pictures_of(data)
    pairs = [row for row in data.pairs("train").to_pylist() if row["kind"] == "edit"]
    families = Counter(row["query_text"].split()[0] for row in pairs)
    assert set(families) == {"crop", "rotate", "increase", "decrease"}
    for row in pairs:
        assert "flip" not in row["query_text"] and row["group"] == f"{row['query_image']}/edits"
        wanted = obey(images[row["query_image"]], row["query_text"])
        assert np.array_equal(images[row["target_image"]], wanted)


def test_general_edits_have_the_published_shares_and_variants(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=400, held_out=2)
    data = prepared(tmp_path / "raw", tmp_path, kinds=("general-edits",))
    pairs = [row for row in data.pairs("train").to_pylist() if row["kind"] == "edit"]
    groups: dict[str, list[str]] = defaultdict(list)
    for row in pairs:
        groups[row["group"]].append(family_of(row["query_text"]))
    assert len(groups) == 400 and all(len(set(families)) == 1 for families in groups.values())
    # Colour changes are drawn from factors of one digit, so that two may be equal.
    variants = {families[0]: len(families) for families in groups.values()}
    assert variants == {name: FAMILIES[name].training for name in GENERAL}
    shares = {name: share / sum(GENERAL.values()) for name, share in GENERAL.items()}
    found = Counter(family_of(row["query_text"]) for row in pairs)
    assert {name: count / len(pairs) for name, count in found.items()} == pytest.approx(shares, abs=0.06)


def test_flips_and_colours_go_both_ways_between_one_image_and_what_is_made_of_it(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=60, held_out=2)
    data = prepared(tmp_path / "raw", tmp_path, kinds=("general-edits",))
    images = pictures_of(data)
    seen = Counter()
    for row in (row for row in data.pairs("train").to_pylist() if row["kind"] == "edit"):
        query, target = images[row["query_image"]], images[row["target_image"]]
        if row["query_text"] == "colorize":
            query, target = target, query
        wanted = obey(query, "grayscale" if row["query_text"] == "colorize" else row["query_text"])
        assert np.array_equal(target, wanted), row
        seen[row["query_text"], "/made-" in row["query_image"], "/made-" in row["target_image"]] += 1
    for axis in ("horizontal", "vertical"):
        assert seen[f"{axis} flip", False, True] == seen[f"{axis} flip", True, False] > 0
    assert seen["grayscale", False, True] == seen["colorize", True, False] > 0


def test_a_share_of_the_images_is_edited_the_same_ones_each_time(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=200, held_out=2)
    found = []
    for share in (0.25, 0.25, 0.5):
        fields = {"source": "rocov2", "root": tmp_path / "raw", "workers": 1, "edited_share": share}
        settings = PrepareSettings.model_validate(fields | {"extra_pairs": ("general-edits",)})
        manifest = prepare_data(settings, tmp_path / "prepared")
        found.append({row["group"] for row in PreparedData(tmp_path / "prepared").pairs("train").to_pylist()})
        assert manifest["counts"]["train"]["images"] == 200
    edited = [{group for group in groups if group.endswith("/edits")} for groups in found]
    assert edited[0] == edited[1] < edited[2]
    assert 35 < len(edited[0]) < 65 and 80 < len(edited[2]) < 120


def test_both_sorts_of_edits_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="both edits and general-edits"):
        PrepareSettings.model_validate({"extra_pairs": ("edits", "general-edits")})


def family_of(instruction: str) -> str:
    """The family of transforms.GENERAL that an instruction belongs to."""
    if " by factor " in instruction:
        return "colour"
    if instruction.endswith(" flip"):
        return "flip"
    return "colorize" if instruction in ("grayscale", "colorize") else instruction.split()[0]


def test_every_kind_reaches_the_mixture_and_knows_its_like(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from fuselip_core.config import TokenizeSettings
    from fuselip_core.model.presets import tokenizer_config
    from fuselip_core.model.processing import TextTokenizer
    from fuselip_core.model.titok import TiTok
    from fuselip_core.tokenizer.tokenize import Tokenizing, store_identity

    write_raw(tmp_path / "raw", train=8, held_out=2)
    data = prepared(tmp_path / "raw", tmp_path, kinds=("concepts", "questions", "edits"))
    torch.manual_seed(0)
    # Shards that end within the images and within those made of them.
    tokenizer, settings = TiTok(tokenizer_config("tiny")), TokenizeSettings(rows_per_shard=5, batch_size=3)
    identity = store_identity(data, "random", tokenizer, settings)
    Tokenizing(data, tokenizer, TextTokenizer(77).encode, settings, identity, tmp_path / "tokens").run()
    store = TokenStore(tmp_path / "tokens", "train")
    pictures = pictures_of(data)
    assert store.images == len(pictures) > 8
    for row, name in enumerate(data.row_ids("train").to_pylist()):
        pixels = torch.from_numpy(to_pixels(Image.fromarray(pictures[name]), 96).copy()).permute(2, 0, 1)[None] / 255.0
        # A code may lie on a tie between two batch sizes.
        assert (tokenizer.codes(pixels.float())[0].numpy() == store.codes[row, 0]).mean() > 0.9, name
    weights = {"caption": 0.25, "concepts": 0.25, "vqa": 0.25, "edit": 0.25}
    rows = next(Mixture(store, weights, batch_size=8, seed=0))
    drawn = Counter(store.kinds[kind] for kind in store.pairs.kind[rows])
    assert drawn == dict.fromkeys(weights, 2)
    edits = store.rows_of("edit")
    query, target = (gather(store, edits, side) for side in ("query", "target"))
    assert query.has_image.all() and target.has_image.all() and (query.text_lengths > 0).all()
    # All images have the one concept CT: their captions and concepts are alike, questions and edits never.
    assert np.unique(store.pairs.alike[store.rows_of("caption")]).tolist() == [0]
    assert np.unique(store.pairs.alike[store.rows_of("concepts")]).tolist() == [0]
    assert (store.pairs.alike[np.append(edits, store.rows_of("vqa"))] == ABSENT).all()
