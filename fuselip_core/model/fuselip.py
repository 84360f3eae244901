"""FuseLIP (arXiv 2506.03096): one bidirectional transformer over image codes and text tokens.

Parameters bear the published names, so that published checkpoints load strictly.
Legend: B sequences, L tokens, T tokens of all packed sequences, R of them that are read, M masked tokens, K codes an
image, W width, V vocabulary, S pixels a side.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModel
from transformers.utils import ModelOutput

from fuselip_core.errors import FuselipError
from fuselip_core.model.blocks import Read, ResidualBlock, through
from fuselip_core.model.fuselip_config import FuseLIPConfig
from fuselip_core.model.linear_cross_entropy import linear_cross_entropy
from fuselip_core.model.packed import Layout
from fuselip_core.model.titok import TiTok, TiTokConfig
from fuselip_core.model.vocabulary import END_OF_TEXT, IGNORED, PAD, first_end, join, longest_text
from fuselip_core.model.weights import StrictModel

# Radians across the image of a grid's features: from half a turn, which tells the sides apart, to a few codes a turn.
LOWEST, HIGHEST = 1.5, 12.0


@dataclass
class FuseLIPOutput(ModelOutput):
    """`embeddings` (B, W) float32 of unit norm; `loss`, a scalar, where labels were given."""

    loss: Tensor | None = None
    embeddings: Tensor | None = None


# What compiled code keeps for the backward pass: what these gave. Norms, GELU and sums cost a GPU little.
PRODUCTS = {"aten.mm", "aten.addmm", "fuselip.attend", "torch_attn._varlen_attn"}
Kept = Literal["all", "products", "but projections", "inputs"]


def _policy(projections: bool, _context: Any, operation: Any, *given: Any, **_: Any) -> CheckpointPolicy:
    """Whether a compiled stack keeps what `operation` gave; queries, keys and values only if `projections`."""
    name = str(getattr(operation, "overloadpacket", operation))
    if name in ("aten.mm", "aten.addmm") and not projections and given[-1].shape[1] == 3 * given[-1].shape[0]:
        return CheckpointPolicy.MUST_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE if name in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


class Transformer(nn.Module):
    """The stack of blocks, under the published name `transformer.resblocks`.

    `kept` is what it keeps for the backward pass: all that PyTorch saves, the input of each block, or, in compiled
    code, what matrix products and attention gave, with or without the projections to queries, keys and values. The
    rest is computed again.
    """

    def __init__(self, width: int, heads: int, layers: int, mlp_ratio: float) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads, mlp_ratio) for _ in range(layers))
        self.kept: Kept = "all"

    def forward(self, x: Tensor, mask: Tensor | None = None, layout: Layout | None = None, read: Read = None) -> Tensor:
        """(B, L, W) → (B, L, W), or (T, W) → (T, W), of the last block only what is `read`; arguments as in blocks."""
        if self.kept == "inputs" and torch.is_grad_enabled():
            for block in self.resblocks:
                last = read if block is self.resblocks[-1] else None
                x = checkpoint(block, x, mask, layout, last, use_reentrant=False, preserve_rng_state=False)
            return x
        if self.kept == "all" or not torch.is_grad_enabled() or not torch.compiler.is_compiling():
            return self._blocks(x, mask, layout, read)
        policy = functools.partial(_policy, self.kept == "products")
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        given = (x, mask, layout, read)
        return checkpoint(self._blocks, *given, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def _blocks(self, x: Tensor, mask: Tensor | None, layout: Layout | None, read: Read) -> Tensor:
        return through(self.resblocks, x, mask, layout, read)


class MaskPredictionHead(nn.Module):
    """Which token was hidden? Section 3.2; the decoder shares the token embedding's weight."""

    def __init__(self, width: int, vocabulary_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, vocabulary_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., W) → logits (..., V)."""
        return self.decoder(self.features(hidden)) + self.bias

    def features(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., W) → what the decoder reads (..., W)."""
        return self.layer_norm(F.gelu(self.dense(hidden)))

    def mean_loss(self, hidden: Tensor, labels: Tensor, padded: bool = False) -> Tensor:
        """Mean cross-entropy of hidden states (M, W) and the tokens they stand for (M), 0 of none.

        Tokens that are IGNORED don't count, if `padded` says that there are some.
        """
        total = linear_cross_entropy(self.features(hidden), self.decoder.weight, self.bias, labels, padded)
        return total / ((labels != IGNORED).sum().clamp(min=1) if padded else max(len(labels), 1))


class ImageTokenizer(nn.Module):
    """Holds the tokenizer under the published prefix `image_tokenizer.model`."""

    def __init__(self, model: TiTok) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)


class FuseLIPModel(StrictModel):
    """Embeds images, texts and pairs of both in one space."""

    config_class = FuseLIPConfig
    config: FuseLIPConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _tied_weights_keys = {"mask_prediction_head.decoder.weight": "token_embedding.weight"}  # noqa: RUF012

    def __init__(self, config: FuseLIPConfig) -> None:
        super().__init__(config)
        self.vocabulary = config.vocabulary
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(config.width, config.heads, config.layers, config.mlp_ratio)
        self.ln_final = nn.LayerNorm(config.width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        # A model without a mask token cannot be trained to unmask, and published ones then lack the head.
        self.mask_prediction_head = MaskPredictionHead(config.width, config.vocab_size) if config.mask_token else None
        if not config.mask_token:
            self._tied_weights_keys = {}
        self.image_tokenizer: ImageTokenizer | None = None
        if config.image_tokenizer:
            self.image_tokenizer = ImageTokenizer(TiTok(TiTokConfig(**config.image_tokenizer)))
        self._draw_weights()
        self.post_init()

    def encode_image(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        """Pixels (B, 3, S, S) float in 0..1 → embeddings (B, W) float32, of unit norm if `normalize`."""
        return self.embed_ids(self.tokenize_image(pixels, append_empty_text=True), normalize, padded=False)

    def encode_text(self, input_ids: Tensor, normalize: bool = True) -> Tensor:
        """Text ids (B, L) int64 with begin, end and padding → embeddings (B, W) float32."""
        return self.embed_ids(self._sequence(None, input_ids), normalize)

    def encode_multimodal(self, pixels: Tensor, input_ids: Tensor, normalize: bool = True) -> Tensor:
        """Pixels (B, 3, S, S) in 0..1 and text ids (B, L) int64 → embeddings (B, W) float32 of the fused pairs."""
        if len(pixels) != len(input_ids):
            raise FuselipError(f"encode_multimodal got {len(pixels)} images but {len(input_ids)} texts; give as many")
        return self.embed_ids(self._sequence(self.tokenize_image(pixels), input_ids), normalize)

    @torch.no_grad()
    def tokenize_image(self, pixels: Tensor, append_empty_text: bool = False) -> Tensor:
        """Pixels (B, 3, S, S) float in 0..1 → joint ids (B, K) int64, K + 2 with begin- and end-of-text appended."""
        if self.image_tokenizer is None:
            raise FuselipError("this model contains no image tokenizer; attach one with attach_image_tokenizer(titok)")
        # Written so that NaN, which is neither above nor below, is refused too; one look, for which a GPU waits.
        if not pixels.is_floating_point() or not bool(((pixels >= -1e-3) & (pixels <= 1.001)).all()):
            raise FuselipError("pixels must be floating-point and in 0..1; make them with the image processor")
        tokenizer = self.image_tokenizer.model
        with torch.autocast(pixels.device.type, enabled=False):  # in half precision near codes would change places
            codes = tokenizer.codes(pixels.to(tokenizer.latent_tokens.dtype))
        ids = self.vocabulary.joint_ids(codes)
        return join(ids, None, self.config.context_length) if append_empty_text else ids

    def attach_image_tokenizer(self, tokenizer: TiTok) -> None:
        """Makes `tokenizer` (its encoder and codebook) part of the model, frozen; it is then saved with it."""
        config = tokenizer.config
        if (config.codebook_size, config.latent_tokens) != (self.config.codebook_size, self.config.codes_per_image):
            raise FuselipError(
                f"the image tokenizer makes {config.latent_tokens} codes of {config.codebook_size} but the model takes "
                f"{self.config.codes_per_image} of {self.config.codebook_size}; give the one it was trained with"
            )
        own = TiTok(config).to(self.device)
        own.load_state_dict({k: v for k, v in tokenizer.state_dict().items() if not k.startswith("decoder.")})
        self.image_tokenizer = ImageTokenizer(own).train(self.training)
        self.config.image_tokenizer = dataclasses.asdict(config)
        self.config.image_size = config.image_size

    @torch.no_grad()
    def start_codes_from(self, codebook: Tensor) -> None:
        """Sets the embeddings of image codes to a random projection of the codebook (C, D), at their usual size.

        Codes that look alike then begin alike, so that what is learned of one holds for its neighbours: worth several
        epochs where images are few. The published training begins with noise.
        """
        centred = codebook - codebook.mean(dim=0)
        projected = centred @ torch.randn(codebook.shape[1], self.config.width, device=codebook.device)
        rows = self.token_embedding.weight[self.vocabulary.image_offset :]
        rows.copy_(projected * (rows.std() / projected.std()))

    @torch.no_grad()
    def start_places_from_grid(self, spread: float) -> None:
        """Sets the positions of image codes to random Fourier features of their places in the image, of size `spread`.

        Codes that lie near each other then begin alike, at several distances (arXiv 2006.10739), so that the model need
        not find out from the data which code lies beside which. Raises FuselipError unless the codes fill a square.
        """
        count, width = self.config.codes_per_image, self.config.width
        side = math.isqrt(count)
        if side * side != count:
            raise FuselipError(f"{count} codes an image are no square grid; set train.places_from_grid=false")
        axis = (torch.arange(side) + 0.5) / side
        places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)
        frequencies = torch.logspace(math.log10(LOWEST), math.log10(HIGHEST), width // 2)
        angles = places @ (torch.randn(2, width // 2) * frequencies)
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        features = features - features.mean(dim=0)
        self.positional_embedding[:count] = (features * (spread / features.std())).to(self.positional_embedding)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        layout: Layout | None = None,
        hidden: Tensor | None = None,
        **_: Any,
    ) -> FuseLIPOutput:
        """Joint ids (B, L) int64, padded with 0 → embeddings and, with `labels` (B, L), the masked-token loss.

        With a `layout` ids and labels are packed, (T): the same values without the arithmetic of padding. Embeddings
        are then in the layout's order. With `hidden` (M) int64, the places of the hidden tokens, labels (M) are theirs
        alone, and a GPU need not look for them. A model that reads padding (`mask_padding` false) can't be given packed
        ids.
        """
        if layout is not None:
            if labels is not None and hidden is None:
                hidden = (labels != IGNORED).nonzero().squeeze(1)
                labels = labels[hidden]
            embeddings, loss = self.embed_packed(input_ids, layout, hidden, labels)
            return FuseLIPOutput(loss=loss, embeddings=embeddings)
        if labels is None:
            return FuseLIPOutput(embeddings=self.embed_ids(input_ids))
        states = self.hidden_states(input_ids)
        rows = torch.arange(len(states), device=states.device)
        embeddings = self._embeddings(states[rows, first_end(input_ids)])
        return FuseLIPOutput(loss=self.masked_loss(states, labels), embeddings=embeddings)

    def embed_packed(
        self,
        input_ids: Tensor,
        layout: Layout,
        hidden: Tensor | None = None,
        labels: Tensor | None = None,
        padded: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Packed ids (T) → embeddings (B, W) in the layout's order and, where there are hidden tokens, their mean loss.

        `hidden` (M) int64 are their places, `labels` (M) what they were; `padded` as in `mean_loss`.
        """
        read = layout.pooled if hidden is None else torch.cat([layout.pooled, hidden])
        pooled, masked = self.packed_hidden_states(input_ids, layout, read).tensor_split([len(layout.pooled)])
        loss = None if labels is None else self._prediction_head().mean_loss(masked, labels, padded)
        return self._embeddings(pooled), loss

    def embed_ids(self, input_ids: Tensor, normalize: bool = True, padded: bool | None = None) -> Tensor:
        """Joint ids (B, L) int64, padded with 0 → embeddings (B, W) float32; `padded` as in `hidden_states`."""
        return self._embeddings(self.hidden_states(input_ids, padded, first_end(input_ids))[:, 0], normalize)

    def hidden_states(self, input_ids: Tensor, padded: bool | None = None, read: Tensor | None = None) -> Tensor:
        """Joint ids (B, L) int64 → last block's output (B, L, W) before the final norm, (B, 1, W) at the places `read`.

        `padded` says whether any id is padding; None looks, which on a GPU waits for it. Without padding no mask is
        built, so that the fastest attention kernel is free to run.
        """
        length = input_ids.shape[1]
        if length > self.config.context_length:
            raise FuselipError(_too_long(length, self.config.context_length))
        mask = None
        if self.config.mask_padding and padded is not False:
            seen = input_ids != PAD
            if padded or not bool(seen.all()):
                mask = seen[:, None, None, :]
        x = self.token_embedding(input_ids) + self.positional_embedding[:length]
        return self.transformer(x, mask, None, read)

    def packed_hidden_states(self, input_ids: Tensor, layout: Layout, read: Tensor | None = None) -> Tensor:
        """Packed joint ids (T) int64 → last block's output before the final norm, (T, W), or (R, W) where `read`."""
        if layout.longest > self.config.context_length:
            raise FuselipError(_too_long(layout.longest, self.config.context_length))
        if not self.config.mask_padding:
            raise FuselipError("this model reads padding (mask_padding is false), so packed sequences would differ")
        # Not plain indexing: its gradient adds up with atomics, in another order every time.
        x = self.token_embedding(input_ids) + F.embedding(layout.positions, self.positional_embedding)
        return self.transformer(x, None, layout, read)

    def _embeddings(self, pooled: Tensor, normalize: bool = True) -> Tensor:
        """The last block's output at first end-of-text tokens (B, W) → embeddings (B, W) float32."""
        normed = self.ln_final(pooled).float()
        return F.normalize(normed, dim=-1) if normalize else normed

    def masked_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy where the label is not -100; 0, with zero gradient, if it is so everywhere.

        `hidden` is (B, L, W) and `labels` (B, L). Raises FuselipError without a mask token.
        """
        places = (labels != IGNORED).flatten().nonzero().squeeze(1)
        return self._prediction_head().mean_loss(hidden.flatten(0, -2)[places], labels.flatten()[places])

    def _prediction_head(self) -> MaskPredictionHead:
        if self.mask_prediction_head is None:
            raise FuselipError("this model has no mask token to predict behind; build it with mask_token=true")
        return self.mask_prediction_head

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def get_output_embeddings(self) -> nn.Module | None:
        return self.mask_prediction_head.decoder if self.mask_prediction_head else None

    def _sequence(self, image_ids: Tensor | None, input_ids: Tensor) -> Tensor:
        """Image ids (B, K) and text ids (B, L) as one sequence, without columns that are padding in every row."""
        if not bool((input_ids == END_OF_TEXT).any(dim=1).all()):
            raise FuselipError("every text needs an end-of-text token; make ids with the text tokenizer")
        if self.config.mask_padding:
            input_ids = input_ids[:, : longest_text(input_ids)]
        return join(image_ids, input_ids, self.config.context_length)

    @torch.no_grad()
    def _draw_weights(self) -> None:
        """Random weights as in open_clip's text tower, on which the published training builds."""
        width, layers = self.config.width, self.config.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            for name, std in (
                ("attn.in_proj_weight", width**-0.5),
                ("attn.out_proj.weight", width**-0.5 * (2 * layers) ** -0.5),
                ("mlp.c_fc.weight", (2 * width) ** -0.5),
                ("mlp.c_proj.weight", width**-0.5 * (2 * layers) ** -0.5),
            ):
                nn.init.normal_(block.get_parameter(name), std=std)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: modules draw their own weights when built, and loading is strict, so none is ever missing."""


def _too_long(length: int, context: int) -> str:
    return f"a sequence of {length} tokens exceeds the context of {context}"


AutoConfig.register(FuseLIPConfig.model_type, FuseLIPConfig)
AutoModel.register(FuseLIPConfig, FuseLIPModel)
