"""Opens the store and the encoder that training and evaluation run on, from codes or from pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuselip_core.config import TrainSettings
from fuselip_core.data.shards.by_row import PictureReader
from fuselip_core.data.shards.in_order import evaluation_view, pixel_batches
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.tokens.joined import JoinedStore, Store
from fuselip_core.data.tokens.store import MANIFEST, TokenStore, read_manifest
from fuselip_core.distributed import World
from fuselip_core.encoding.comparison import ComparisonEncoder, open_comparison_store
from fuselip_core.encoding.from_codes import PairEncoder, StoredEncoder, TokenEncoder, TokenPairs
from fuselip_core.encoding.from_pixels import (
    DecodedPictures,
    PictureEncoder,
    PicturePairs,
    Pictures,
    PictureSource,
    baseline_view,
    cache_pictures,
    open_picture_store,
    require_tokenized,
)
from fuselip_core.errors import FuselipError
from fuselip_core.model.comparison import TwoTowers
from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.hub import Model
from fuselip_core.model.late_fusion import LateFusionModel
from fuselip_core.model.processing import as_pixels
from fuselip_core.model.titok import TiTok

AnyModel = Model | TwoTowers

PIXELS = Path("work") / "pixels"
TEXTS = Path("work") / "texts"
MOST_CACHED = 4 << 30  # bytes of pixels on disk; what would be more is decoded when it is asked for


def open_training(
    model: Model, artifacts: Path, settings: TrainSettings, device: torch.device, world: World
) -> tuple[Store, PairEncoder]:
    """The training pairs of this run and of the stores that `train.tokens` names, and the encoder that reads them."""
    folders = {"": artifacts / "tokens"} | {name: Path(folder) for name, folder in settings.tokens.items()}
    if isinstance(model, FuseLIPModel):
        store = _joined({name: TokenStore(folder, "train") for name, folder in folders.items()})
        probability = settings.mask_probability if settings.mask_weight else 0.0
        return store, TokenPairs(model, store, probability, settings.cuda_graphs)
    stores: dict[str, TokenStore] = {}
    first = 0
    for name, folder in folders.items():
        stores[name] = open_picture_store(folder, "train", first=first)
        first += stores[name].codes.size
    store = _joined(stores)
    return store, PicturePairs(model, store, _pictures(artifacts, folders, "train", None, model, device, world))


def _pictures(
    artifacts: Path,
    folders: Mapping[str, Path],
    split: str,
    views: int | None,
    model: LateFusionModel,
    device: torch.device,
    world: World,
) -> PictureSource:
    """The pictures of a split of the token stores `folders`: from a cache of pixels if it is of a bearable size."""
    size, scratch = model.config.image_size, artifacts / PIXELS
    parts = []
    for name, folder in folders.items():
        prepared, manifest = PreparedData(folder.parent / "prepared"), read_manifest(folder)
        require_tokenized(prepared, manifest)
        drawn = views or int(manifest["views"])
        parts.append((scratch / f"{name or 'own'}-{split}-{drawn}x{size}.npy", prepared, manifest, drawn))
    pixels = sum(prepared.row_count(split) * views * 3 * size**2 for _, prepared, _, views in parts)
    made: PictureSource | None = None
    for rank in range(world.size):  # one after the other: the first makes the files, the others find them
        if rank == world.rank and pixels <= MOST_CACHED:
            made = Pictures([cache_pictures(*part[:3], split, size, part[3]) for part in parts], device)
        elif rank == world.rank:
            sources = [
                (PictureReader(path.with_suffix(".index"), prepared, split), views, baseline_view(size, manifest))
                for path, prepared, manifest, views in parts
            ]
            made = DecodedPictures(sources, size, device)
        world.wait()
    assert made is not None
    return made


def _joined(stores: Mapping[str, TokenStore]) -> Store:
    further = {name: store for name, store in stores.items() if name}
    return JoinedStore(stores[""], further) if further else stores[""]


def token_folder(artifacts: Path) -> Path:
    """The token store of a run, or its store of texts alone, which is enough for models that bring their own codes."""
    texts = artifacts / TEXTS
    return (
        texts
        if (texts / MANIFEST).is_file() and not (artifacts / "tokens" / MANIFEST).is_file()
        else artifacts / "tokens"
    )


def open_measuring(
    model: AnyModel, artifacts: Path, split: str, device: torch.device
) -> tuple[TokenStore, StoredEncoder]:
    """A split of the run in `artifacts` and an encoder that reads its sides, whatever the model's family.

    Where a joint encoder has another image tokenizer than that run, the split's images are tokenized anew, in memory.
    Raises FuselipError where the prepared data are not those that were tokenized.
    """
    folder, prepared = token_folder(artifacts), PreparedData(artifacts / "prepared")
    if read_manifest(folder).get("data_version") != prepared.data_version:
        raise FuselipError(f"{prepared.folder} is not what was tokenized; run the tokenize stage again")
    if isinstance(model, TwoTowers):
        files = PictureReader(artifacts / PIXELS / f"compared-{split}.index", prepared, split)
        return open_comparison_store(folder, split, model), ComparisonEncoder(model, files)
    if isinstance(model, FuseLIPModel):
        store = TokenStore(folder, split)
        if model.image_tokenizer is None and folder.name == TEXTS.name:
            raise FuselipError(f"the model has no image tokenizer, and {artifacts} no codes; run the tokenize stage")
        if model.image_tokenizer is not None and not _is_codebook(model.image_tokenizer.model, artifacts / "codebook"):
            store = _tokenized_anew(store, prepared, model.image_tokenizer.model, device)
        return store, TokenEncoder(model, device)
    pictures = _pictures(artifacts, {"": folder}, split, 1, model, device, World())
    return open_picture_store(folder, split, views=1), PictureEncoder(model, pictures)


def _is_codebook(tokenizer: TiTok, folder: Path) -> bool:
    """Whether `tokenizer` has the encoder and codes of the codebook in `folder`."""
    if not folder.is_dir():
        return False
    codebook = TiTok.load(folder)
    if codebook.config != tokenizer.config:
        return False
    own: dict[str, Any] = codebook.state_dict()
    return all(torch.equal(own[name], value.cpu()) for name, value in tokenizer.state_dict().items())


@torch.inference_mode()
def _tokenized_anew(store: TokenStore, prepared: PreparedData, tokenizer: TiTok, device: torch.device) -> TokenStore:
    """The store with the codes of `tokenizer`, of the evaluation view only."""
    size = tokenizer.config.image_size
    batches = pixel_batches(prepared, store.split, evaluation_view(size), batch_rows=64)
    codes = [tokenizer.codes(as_pixels(batch[:, 0], device)).cpu().numpy() for _, batch in batches]
    blank = tokenizer.codes(torch.zeros(1, 3, size, size, device=device))[0].cpu().numpy()
    return store.with_codes(np.concatenate(codes)[:, None].astype(np.uint16), blank.astype(np.uint16))
