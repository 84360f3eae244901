"""Every error as one line: what went wrong and what to do."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from fuselip_core.errors import FuselipError, sentence_of


class OutOfMemoryError(RuntimeError):
    """Named as torch names a GPU's."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FuselipError("no luck;\n try there"), "no luck; try there"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "permission denied at a; change the owner"),
        (OutOfMemoryError("CUDA out of\nmemory"), "out of memory (CUDA out of memory); lower train.batch_size"),
        (KeyError("x"), "unexpected KeyError ('x'); run again with --debug"),
    ],
)
def test_sentence(error: Exception, sentence: str) -> None:
    assert sentence_of(error).startswith(sentence) and "\n" not in sentence_of(error)


def test_a_warning_is_told_by_its_first_word(repository: Path) -> None:
    code = (
        "import logging; from fuselip_core.errors import log_to_stderr; log_to_stderr()\n"
        "log = logging.getLogger('fuselip'); log.info('going'); log.warning('slow')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert done.stderr == "going\nwarning: slow\n"
