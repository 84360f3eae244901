"""The one map between text ids, the mask, image codes and joint ids, and the one rule that joins them to a sequence.

Legend: B sequences, L tokens, K codes an image, T text tokens without begin, end and padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TEXT_SIZE = 49408  # CLIP's byte-pair encoding
PAD = 0  # also the id of "!": a published quirk, see the README's parity table
BEGIN_OF_TEXT = 49406
END_OF_TEXT = 49407
IGNORED = -100  # label of a place that is not masked


@dataclass(frozen=True)
class Vocabulary:
    """Joint ids: text first, then the mask token if there is one, then the image codes.

    FuseLIP (arXiv 2506.03096), section 3.1.
    """

    codebook_size: int
    mask_token: bool = True

    @property
    def mask_id(self) -> int:
        """Id that hides a token; raises ValueError where the vocabulary has none."""
        if not self.mask_token:
            raise ValueError("this vocabulary has no mask token; build the model with mask_token=true")
        return TEXT_SIZE

    @property
    def image_offset(self) -> int:
        """Joint id of image code 0."""
        return TEXT_SIZE + int(self.mask_token)

    @property
    def size(self) -> int:
        """Number of joint ids."""
        return self.image_offset + self.codebook_size

    def joint_ids(self, codes: Tensor) -> Tensor:
        """Image codes (..., K), any integer dtype → joint ids (..., K) int64."""
        return codes.to(torch.int64) + self.image_offset


def text_sequence(text_ids: Tensor, lengths: Tensor) -> Tensor:
    """Bare text ids (B, T), zero-padded, and their lengths (B) → (B, T + 2) int64 with begin, end and padding."""
    batch, longest = text_ids.shape
    sequence = torch.full((batch, longest + 2), PAD, dtype=torch.int64, device=text_ids.device)
    sequence[:, 0] = BEGIN_OF_TEXT
    sequence[:, 1 : longest + 1] = text_ids
    places = torch.arange(longest + 2, device=text_ids.device)
    sequence[places[None, :] > lengths[:, None]] = PAD
    sequence[torch.arange(batch, device=text_ids.device), lengths.to(torch.int64) + 1] = END_OF_TEXT
    return sequence


def first_end(ids: Tensor) -> Tensor:
    """Ids (B, L) → the place (B) int64 of each row's first end-of-text token, where embeddings are pooled."""
    return (ids == END_OF_TEXT).int().argmax(dim=1)


def longest_text(text: Tensor) -> int:
    """Columns of padded ids (B, L) up to the last that is not padding in every row: what is behind need not be read."""
    if not len(text):
        return text.shape[1]
    return int((text != PAD).any(dim=0).nonzero().max()) + 1


def join(image_ids: Tensor | None, text: Tensor | None, context_length: int) -> Tensor:
    """Joint image ids (B, K) and text with begin, end and padding (B, L), either absent → sequence (B, ≤ context).

    Image first, then text. What does not fit is cut from the end of the text; a sequence that is cut closes with
    end-of-text, because that is where it is pooled. Without a text the image is followed by an empty one.
    """
    if image_ids is None and text is None:
        raise ValueError("a sequence needs an image, a text or both")
    if text is None:
        assert image_ids is not None
        text = image_ids.new_tensor([BEGIN_OF_TEXT, END_OF_TEXT]).expand(image_ids.shape[0], 2)
    sequence = text if image_ids is None else torch.cat([image_ids, text.to(image_ids.device)], dim=1)
    if sequence.shape[1] <= context_length:
        return sequence
    cut = sequence[:, :context_length].clone()
    was_longer = (sequence[:, context_length:] != PAD).any(dim=1)
    cut[was_longer, -1] = END_OF_TEXT
    return cut
