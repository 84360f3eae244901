"""Where stored tokens meet the joint encoder: sides of pairs become packed sequences, sequences become embeddings.

Legend: B pairs, K codes an image, L tokens, T tokens of all sequences, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fuselip_core.data.tokens.joined import JoinedStore, Store
from fuselip_core.data.tokens.store import SideTokens, gather
from fuselip_core.encoding.packed_sides import PackedSides, TokenBudgets
from fuselip_core.model.compiled import compiled, require_compiler
from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.packed import Layout, pack
from fuselip_core.model.vocabulary import BEGIN_OF_TEXT, END_OF_TEXT, IGNORED, PAD, join, text_sequence


class PairEncoder(Protocol):
    """What the training loop needs of a model family: inputs of a batch, and what the model makes of them.

    Everything random is drawn while the inputs are made, so that the same inputs can be encoded twice. `looks_ahead`
    says whether `expect` has anything to do.
    """

    model: Any
    looks_ahead: bool

    def expect(self, rows: np.ndarray, view_rng: np.random.Generator, parts: int) -> None:
        """Says that the pairs `rows` (B), in the views that `view_rng` draws, come next, in so many parts."""

    def inputs(self, rows: np.ndarray, view_rng: np.random.Generator) -> Any:
        """What the model reads of the pairs `rows` (B); has `hidden`, the number of tokens it is to predict."""

    def encode(self, inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-norm embeddings of queries and of targets (B, W), and the mean loss of hidden tokens, 0 without."""

    def compile(self, pairs: int, graphs: bool) -> None:
        """From now on computes inputs of `pairs` pairs with compiled code, replayed as CUDA graphs if `graphs`."""


class TokenPairs:
    """The joint encoder on stored codes and texts: all sides of a batch in one pass."""

    looks_ahead = False

    def __init__(self, model: FuseLIPModel, store: Store, mask_probability: float, copies_ahead: bool = False) -> None:
        self.model, self.store, self.mask_probability = model, store, mask_probability
        self.device = next(model.parameters()).device
        self.budgets: TokenBudgets | None = None
        self._compiled = embed_sides
        self._stream = torch.cuda.Stream(self.device) if copies_ahead and self.device.type == "cuda" else None

    def compile(self, pairs: int, graphs: bool) -> None:
        """See PairEncoder: one graph a budget of tokens, forward and backward."""
        require_compiler()
        self.budgets = TokenBudgets(pairs, self.model.config.context_length, self.mask_probability)
        self._compiled = compiled(embed_sides, graphs)

    def expect(self, rows: np.ndarray, view_rng: np.random.Generator, parts: int) -> None:
        """Nothing to do: codes are read in no time."""

    def inputs(self, rows: np.ndarray, view_rng: np.random.Generator) -> PackedSides:
        """Pair rows (B) → packed ids, some of them hidden."""
        sides = gather_sides(self.store, rows, view_rng)
        inputs = prepare_sides(self.model, sides, self.mask_probability, view_rng)
        if self.budgets is not None:
            inputs = self.budgets.pad(inputs)
        if self.device.type != "cuda":
            return inputs
        inputs = inputs.each(Tensor.pin_memory)
        if self._stream is None:
            return inputs
        with torch.cuda.stream(self._stream):
            return replace(on_device(inputs, self.device), copied=self._stream.record_event())

    def encode(self, inputs: PackedSides) -> tuple[Tensor, Tensor, Tensor]:
        """See PairEncoder."""
        if inputs.copied is not None:
            _take_over(inputs)
        embed = self._compiled if inputs.padded else embed_sides
        (query, target), masked = embed(self.model, on_device(inputs, self.device))
        return query, target, masked


def _take_over(inputs: PackedSides) -> None:
    """Lets this stream wait for a copy that another made, and keeps the copy's memory until it has been read here."""
    assert inputs.copied is not None
    here = torch.cuda.current_stream()
    here.wait_event(inputs.copied)

    def hold(tensor: Tensor) -> Tensor:
        tensor.record_stream(here)
        return tensor

    inputs.each(hold)


class StoredEncoder(ABC):
    """Embeds stored sides without gradient; what evaluation and validation see of a model of any family."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def text_length(self) -> int | None:
        """Tokens that the model reads of a text without an image, begin and end not counted; None: all stored."""
        return int(self.model.config.context_length) - 2

    @torch.no_grad()
    def encode(self, side: SideTokens) -> np.ndarray:
        """One side of B pairs → unit-norm embeddings (B, W) float32."""
        training = self.model.training
        self.model.eval()
        embeddings = self._embeddings(side)
        self.model.train(training)
        return embeddings.float().cpu().numpy()

    @abstractmethod
    def _embeddings(self, side: SideTokens) -> Tensor:
        """One side of B pairs → unit-norm embeddings (B, W)."""


class TokenEncoder(StoredEncoder):
    """The joint encoder on stored codes."""

    def __init__(self, model: FuseLIPModel, device: torch.device) -> None:
        super().__init__(model)
        self.device = device

    def _embeddings(self, side: SideTokens) -> Tensor:
        return encode_sides(self.model, [side], self.device)[0]


def gather_sides(store: Store, rows: np.ndarray, view_rng: np.random.Generator) -> list[SideTokens]:
    """Queries and targets of the pairs `rows` (B), each image in a view drawn from all."""
    if isinstance(store, JoinedStore):
        return [store.gather(rows, "query", view_rng), store.gather(rows, "target", view_rng)]
    return [gather(store, rows, "query", view_rng), gather(store, rows, "target", view_rng)]


def pair_keys(store: Store, rows: np.ndarray, alike: bool) -> np.ndarray:
    """What says which pairs (B) are no negatives of each other, (B, 3) int64; see losses.akin.

    Without `alike` only equal targets count.
    """
    pairs = store.pairs
    sets = pairs.alike[rows] if alike else np.full(len(rows), -1)
    return np.stack([pairs.target_text[rows], pairs.target_image[rows], sets], axis=1).astype(np.int64)


def encode_sides(model: FuseLIPModel, sides: Sequence[SideTokens], device: torch.device) -> list[Tensor]:
    """Embeds sides of pairs → unit-norm embeddings (B, W) a side."""
    return embed_sides(model, on_device(prepare_sides(model, sides), device))[0]


def on_device(inputs: PackedSides, device: torch.device) -> PackedSides:
    """Copies of `inputs` on `device`, for which nobody waits."""
    return inputs.each(lambda tensor: tensor.to(device, non_blocking=True))


def prepare_sides(
    model: FuseLIPModel,
    sides: Sequence[SideTokens],
    mask_probability: float = 0.0,
    rng: np.random.Generator | None = None,
) -> PackedSides:
    """Sides of pairs → what the model reads of them, on the CPU; with a probability, `rng` draws which are hidden."""
    ids, layout, places = pack_sides(sides, model)
    sizes = tuple(map(len, sides))
    if not mask_probability:
        return PackedSides(ids, layout, places, sizes)
    assert rng is not None
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    ids, labels = mask_tokens(ids, model.vocabulary.mask_id, mask_probability, generator)
    hidden = (labels != IGNORED).nonzero().squeeze(1)
    return PackedSides(ids, layout, places, sizes, hidden, labels[hidden], len(hidden))


def embed_sides(model: FuseLIPModel, inputs: PackedSides) -> tuple[list[Tensor], Tensor]:
    """Packed sides → unit-norm embeddings (B, W) a side, and the mean loss of the hidden tokens, 0 without."""
    found, loss = model.embed_packed(inputs.ids, inputs.layout, inputs.hidden_places, inputs.labels, inputs.padded)
    embeddings = found.index_select(0, inputs.places).split(list(inputs.sizes))
    return list(embeddings), found.new_zeros(()) if loss is None else loss


def pack_sides(sides: Sequence[SideTokens], model: FuseLIPModel) -> tuple[Tensor, Layout, Tensor]:
    """Sides of pairs → packed ids (T) int64 and their layout, on the CPU, and the place in it of each row of all sides.

    All sides go through the encoder at once: one look-up, one product a layer, one gradient of the embedding table.
    """
    groups, places, before = [], [], 0
    for side in sides:
        has_image = np.asarray(side.has_image)
        for images in (True, False):
            rows = np.flatnonzero(has_image == images)
            if len(rows):
                groups.append(_sequences(side.part(rows), images, model))
                places.append(rows + before)
        before += len(side)
    ids, layout, order = pack(groups)
    return ids, layout, order[torch.from_numpy(np.argsort(np.concatenate(places)))]


def _sequences(side: SideTokens, has_images: bool, model: FuseLIPModel) -> Tensor:
    """Rows that all have an image, or none, as padded joint ids (N, L) int64."""
    text = text_sequence(_to_tensor(side.text_ids), _to_tensor(side.text_lengths))
    images = model.vocabulary.joint_ids(_to_tensor(side.codes)) if has_images else None
    return join(images, text, model.config.context_length)


def _to_tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def mask_tokens(
    ids: Tensor, mask_id: int, probability: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Hides a share of the tokens of `ids` (B, L): → ids with `mask_id` in place, labels with IGNORED elsewhere.

    Begin, end and padding are never hidden. FuseLIP (arXiv 2506.03096), section 3.2.
    """
    special = (ids == PAD) | (ids == BEGIN_OF_TEXT) | (ids == END_OF_TEXT)
    hidden = (torch.rand(ids.shape, generator=generator, device=ids.device) < probability) & ~special
    return ids.masked_fill(hidden, mask_id), ids.masked_fill(~hidden, IGNORED)
