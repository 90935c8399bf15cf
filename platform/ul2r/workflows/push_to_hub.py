"""An export on the Hugging Face Hub: what can refuse is asked before the export is written, then one commit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ul2r.config import Recipe
from ul2r.errors import RecipeError, ServiceError
from ul2r.paths import EXPORT_METADATA_FILE, MODEL_CARD_FILE, TOKENIZER_FILE

logger = logging.getLogger(__name__)

FILES = [
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "custom_generate/*.py",
    EXPORT_METADATA_FILE,
    MODEL_CARD_FILE,
]
"""Files of an export that are uploaded; a folder may hold others, which are of this machine, and text of the corpus."""
NEW_REPOSITORY = {".gitattributes"}
"""Files that the Hub puts into a new repository."""


@dataclass(frozen=True)
class HubTarget:
    """A repository that may be written to.

    Attributes:
        name: With its owner.
        private: Whether it is private if it has to be created.
    """

    name: str
    private: bool


def find_hub_target(recipe: Recipe) -> HubTarget | None:
    """Check that an export can be pushed, as far as that is known before it is written.

    The token is that of huggingface_hub's own login: HF_TOKEN, or what `hf auth login` stored.

    Returns:
        The repository; None if `export.push_to_hub` is not set.

    Raises:
        RecipeError: If the repository holds something else than an export of this project.
        ServiceError: If there is no login, the Hub does not accept it, or does not answer.
    """
    name = recipe.export.push_to_hub
    if name is None:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    with translate_hub_errors(name):
        user = api.whoami()
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ServiceError(
            f"export.push_to_hub={name}: the token of {user['name']} may only read: make one that may write at "
            f"{api.endpoint}/settings/tokens, and log in with `hf auth login`"
        )

    full_name = name if "/" in name else f"{user['name']}/{name}"
    target = HubTarget(full_name, recipe.export.hub_private)
    with translate_hub_errors(name):
        try:
            files = set(api.list_repo_files(full_name))
        except RepositoryNotFoundError:
            return target  # or one that the token does not see, which its creation will say
    others = sorted(files - NEW_REPOSITORY)
    if others and EXPORT_METADATA_FILE not in files:
        raise RecipeError(
            f"export.push_to_hub={name}: {full_name} exists on the Hub and is no export of this project, it holds "
            f"{others[0]}: choose another name"
        )
    return target


def push_export(folder: Path, target: HubTarget) -> str:
    """Upload an export in one commit, and return its address; files that the Hub has are not sent again.

    Raises:
        ServiceError: If the Hub refuses it, or fails.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with translate_hub_errors(target.name):
        url = api.create_repo(target.name, private=target.private, exist_ok=True)
        # Not seen before the commit, and an upload that broke off begins where it was: the Hub keeps files by digest.
        api.upload_folder(
            repo_id=target.name,
            folder_path=folder,
            allow_patterns=FILES,
            # Shards of an earlier export; other files of its owner stay.
            delete_patterns=FILES,
            commit_message=f"Export of {folder.parent.name}",
        )
    return str(url)


@contextmanager
def translate_hub_errors(name: str) -> Iterator[None]:
    """Turn errors of huggingface_hub and its HTTP client into one line each.

    Raises:
        ServiceError: In place of them.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    where = f"export.push_to_hub={name}"
    try:
        yield
    except LocalTokenNotFoundError:
        raise ServiceError(
            f"{where}: there is no login for the Hub: run `hf auth login`, or set HF_TOKEN"
        ) from None
    except HFValidationError as error:
        raise ServiceError(f"{where}: the Hub takes no such name: {error}") from None
    except OfflineModeIsEnabled:
        raise ServiceError(f"{where}: HF_HUB_OFFLINE is set: unset it to push") from None
    except HfHubHTTPError as error:
        raise ServiceError(f"{where}: {_explain_status(error.response.status_code)}") from None
    except Exception as error:
        # huggingface_hub wraps what an upload raises.
        cause = error if _is_http_error(error) else error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            raise ServiceError(f"{where}: {_explain_status(cause.response.status_code)}") from None
        if not _is_http_error(cause):
            raise
        raise ServiceError(
            f"{where}: {constants.ENDPOINT} cannot be reached or broke off ({type(cause).__name__}: {cause}): run the "
            "same command again when there is a network"
        ) from None


def _is_http_error(error: BaseException) -> bool:
    """Return whether an error is one of huggingface_hub's HTTP client: httpx for versions 1, httpx2 for versions 2."""
    return any(
        kind.__name__ == "HTTPError" and kind.__module__.startswith("httpx")
        for kind in type(error).__mro__
    )


def _explain_status(status: int) -> str:
    """Return what an answer of the Hub means and what to do."""
    if status == 401:
        return (
            "the Hub does not accept the token: log in again with `hf auth login`, or set HF_TOKEN"
        )
    if status == 403:
        return "the token may not write there: choose a name of your own, or a token that may"
    if status == 404:
        return (
            "the Hub knows no such user, organization or repository, or the token does not see it"
        )
    if status == 409:
        return "somebody else changes the repository at the same time: run the same command again"
    return f"the Hub answered with HTTP status {status}: run the same command again later"
