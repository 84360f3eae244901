"""Every error as one line: what went wrong and what to do."""

from __future__ import annotations

import errno

import pytest

from fuselip_core.errors import FuselipError, sentence_of


class OutOfMemoryError(RuntimeError):
    """Named as torch names a GPU's."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FuselipError("no luck;\n try there"), "no luck; try there"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "no permission to write or read at a; change its owner"),
        (OutOfMemoryError("CUDA out of\nmemory"), "memory ran out (CUDA out of memory); lower train.batch_size"),
        (KeyError("x"), "unforeseen KeyError ('x'); run again with --debug"),
    ],
)
def test_sentence(error: Exception, sentence: str) -> None:
    assert sentence_of(error).startswith(sentence) and "\n" not in sentence_of(error)
