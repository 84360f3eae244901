"""FuseLIP (arXiv 2506.03096) for radiology: early-fusion image-text embeddings.

``load_model`` and ``Embedder`` are imported on first use, so that importing the package stays light and needs no torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuselip_core.model.embedder import Embedder
    from fuselip_core.model.hub import load_model

__all__ = ["Embedder", "load_model"]

_PLACES = {"Embedder": "fuselip_core.model.embedder", "load_model": "fuselip_core.model.hub"}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        importlib.import_module("fuselip_core.model.fetch").RESOLVERS["models:/"] = _registered
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'fuselip_core' has no attribute '{name}'")


def _registered(address: str) -> Path:
    """The folder of a model in MLflow's registry."""
    folder: Path = importlib.import_module("fuselip_core.registry.address").fetch_model(address)
    return folder


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
