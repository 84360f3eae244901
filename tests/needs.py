"""What a test needs and this machine lacks: reason to skip it, or to fail where the whole suite is meant to run."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skips the test that `what` is missing for; with FUSELIP_NEED_ALL, as in CI, it fails instead."""
    if os.environ.get("FUSELIP_NEED_ALL"):
        pytest.fail(f"{what}; FUSELIP_NEED_ALL is set, so nothing may be skipped")
    pytest.skip(what)
