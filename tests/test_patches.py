"""Image tokenizers with other pixels and patches than their preset."""

from __future__ import annotations

import dataclasses

import pytest

from fuselip_core.config import CodebookSettings
from fuselip_core.errors import FuselipError
from fuselip_core.model.presets import TOKENIZERS, tokenizer_config


def test_other_patches_change_the_codes_an_image_only_where_each_is_a_patch() -> None:
    found = tokenizer_config("tiny", image_size=80, patch_size=8, codes=1024)
    assert (found.latent_tokens, found.codebook_size, found.width) == (100, 1024, 128)
    assert tokenizer_config("small", image_size=128).latent_tokens == TOKENIZERS["small"].latent_tokens == 128
    assert dataclasses.asdict(tokenizer_config("tiny")) == dataclasses.asdict(TOKENIZERS["tiny"])


def test_dimensions_that_do_not_fit_are_one_sentence() -> None:
    with pytest.raises(FuselipError, match="patches of 7 pixels do not fill an image of 96: set codebook"):
        tokenizer_config("tiny", patch_size=7)
    with pytest.raises(ValueError, match="image_size, patch_size and codes are those of `init`"):
        CodebookSettings(init="some/folder", codes=512)
