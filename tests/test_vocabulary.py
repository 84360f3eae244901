"""The map between text ids, mask, image codes and joint ids, and how a sequence is put together."""

from __future__ import annotations

import pytest
import torch

from fuselip_core.model.vocabulary import BEGIN_OF_TEXT, END_OF_TEXT, PAD, Vocabulary, join, text_sequence

CODES = torch.tensor([[0, 7], [3, 1]])


def test_published_vocabulary_sizes() -> None:
    assert Vocabulary(4096).size == 53505
    assert Vocabulary(8192).size == 57601


@pytest.mark.parametrize(("mask_token", "offset"), [(True, 49409), (False, 49408)])
def test_codes_go_to_joint_ids(mask_token: bool, offset: int) -> None:
    vocabulary = Vocabulary(8, mask_token)
    ids = vocabulary.joint_ids(CODES.to(torch.uint16))
    assert ids.dtype == torch.int64
    assert torch.equal(ids, CODES + offset)
    assert int(ids.max()) < vocabulary.size


def test_absent_special_tokens_are_errors() -> None:
    with pytest.raises(ValueError, match="no mask token"):
        _ = Vocabulary(8, mask_token=False).mask_id


def test_text_sequence_adds_begin_end_and_padding() -> None:
    ids = text_sequence(torch.tensor([[5, 6, 7], [8, 0, 0], [0, 0, 0]], dtype=torch.uint8), torch.tensor([3, 1, 0]))
    assert ids.tolist() == [
        [BEGIN_OF_TEXT, 5, 6, 7, END_OF_TEXT],
        [BEGIN_OF_TEXT, 8, END_OF_TEXT, PAD, PAD],
        [BEGIN_OF_TEXT, END_OF_TEXT, PAD, PAD, PAD],
    ]


def test_join_cuts_the_text_and_closes_it_only_where_something_was_lost() -> None:
    image = torch.tensor([[50000], [50001]])
    text = torch.tensor([[BEGIN_OF_TEXT, 5, 6, END_OF_TEXT], [BEGIN_OF_TEXT, 5, END_OF_TEXT, PAD]])
    assert join(image, text, 5).shape == (2, 5)
    cut = join(image, text, 4)
    assert cut[0].tolist() == [50000, BEGIN_OF_TEXT, 5, END_OF_TEXT]
    assert cut[1].tolist() == [50001, BEGIN_OF_TEXT, 5, END_OF_TEXT]


def test_join_of_one_side() -> None:
    image = torch.tensor([[50000, 50001]])
    assert join(image, None, 8).tolist() == [[50000, 50001, BEGIN_OF_TEXT, END_OF_TEXT]]
    text = torch.tensor([[BEGIN_OF_TEXT, END_OF_TEXT]])
    assert torch.equal(join(None, text, 8), text)
    with pytest.raises(ValueError, match="image, a text or both"):
        join(None, None, 8)
