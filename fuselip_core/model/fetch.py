"""Where a model's files are: a folder, the Hugging Face hub, or an address of another scheme. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from fuselip_core.errors import FORBIDDEN, FULL, FuselipError

STARTED_FROM = "started_from.json"  # beside a trained model: the checkpoint that it went on from
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Scheme of an address → what finds its folder; the package registers MLflow's, which this room must not know.
RESOLVERS: dict[str, Callable[[str], Path]] = {}


def fetch(name: str | Path, weights: bool = True) -> Path:
    """A folder as it is; a hub id's files, from the cache or the hub (HF_ENDPOINT and HF_HUB_OFFLINE are heeded).

    Without `weights` a hub id's JSON files alone, which says within seconds whether the rest can be had. Addresses of
    another scheme, such as models:/, go to the function that RESOLVERS has for it.
    """
    if Path(name).is_dir():
        return Path(name)
    for scheme, resolve in RESOLVERS.items():
        if str(name).startswith(scheme):
            return resolve(str(name))
    if not HUB_ID.fullmatch(str(name)):
        raise FuselipError(f"there is no folder '{name}', and a model on the hub is called owner/name")
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(str(name), allow_patterns=["*.json", *["*.safetensors"] * weights]))
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(name), allow_patterns=["*.bin"]))
        return folder
    except errors.HFValidationError as error:
        raise FuselipError(f"'{name}' is no name that the hub allows; a model is called owner/name") from error
    except errors.GatedRepoError as error:
        raise FuselipError(f"'{name}' is gated; accept its terms on the hub and log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise FuselipError(f"the hub has no model '{name}', or it is private; check the name or log in") from error
    except Exception as error:
        if not is_unreachable(error):
            raise
        raise FuselipError(
            f"'{name}' is neither a folder nor in the cache, and the hub cannot be reached; "
            "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder"
        ) from error


def is_unreachable(error: Exception) -> bool:
    """Whether huggingface_hub raised `error` because the Hub did not answer, not because of the local disk.

    Errors of its HTTP library pass through it: those of httpx in some releases, of httpx2 in others.
    """
    if isinstance(error, OSError):
        return error.errno not in (*FULL, *FORBIDDEN)
    return type(error).__module__.startswith("httpx")
