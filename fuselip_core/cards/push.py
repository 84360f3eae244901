"""Uploads a model with its processor and cards to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from fuselip_core.cards.model_card import cards_of
from fuselip_core.errors import FuselipError
from fuselip_core.model.fetch import HUB_ID, fetch, is_unreachable
from fuselip_core.model.hub import load_pretrained

FILES = ["*.json", "*.safetensors"]


def push_model(model: str | Path, repository: str, private: bool = False) -> str:
    """Uploads the model in one commit and returns the commit's URL. Respects HF_ENDPOINT.

    Loads the model first, so that no damaged one is published. Raises FuselipError if the model has no card, or if the
    Hub refuses it or cannot be reached.
    """
    if not HUB_ID.fullmatch(repository):
        raise FuselipError(f"'{repository}' is not the name of a repository; give OWNER/NAME")
    folder = fetch(model)
    cards = cards_of(folder)
    load_pretrained(folder, "cpu")
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    files = [*(path for pattern in FILES for path in folder.glob(pattern)), *cards.glob("*.md")]
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(path.name, path) for path in sorted(files)],
            commit_message="Model, processor and cards",
        )
    except errors.LocalTokenNotFoundError as error:
        raise FuselipError("you are not logged in to the Hub; run `hf auth login` with a write token") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "run `hf auth login` with a write token for it" if status in (401, 403) else "try again later"
        raise FuselipError(f"the Hub refuses the upload to {repository} ({status}); {remedy}") from error
    except Exception as error:
        if not is_unreachable(error):
            raise
        raise FuselipError(
            f"the Hub cannot be reached ({api.endpoint}); check the connection and HF_ENDPOINT"
        ) from error
    return str(commit.commit_url)
