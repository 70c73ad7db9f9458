"""Uploading an exported model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi

from imdm_scale.config.model_folder import missing_files
from imdm_scale.errors import UserError


def push_folder(
    folder: Path, repo: str, *, private: bool = False, revision: str | None = None, api: Any = None
) -> str:
    """Uploads all files of `folder` as one commit, making the repository if need be.

    Args:
        folder: an exported model.
        repo: OWNER/NAME.
        private: whether a repository that is made is to be private.
        revision: the branch, which is made if need be; None is the main one.
        api: a `huggingface_hub.HfApi`; None takes the user's own token.

    Returns:
        Where the model is now.

    Raises:
        UserError: the folder is no model, there is no token, or the hub refuses.
    """
    if missing := missing_files(folder):
        raise UserError(
            f"--model {folder} is not an exported model: it has no {missing[0]}; give the folder that holds it."
        )
    api = HfApi() if api is None else api
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message="Upload of an exported model"
        )
    except (httpx.HTTPError, OSError, ValueError) as error:  # the hub's own errors are all of these kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{folder} could not be uploaded to {repo} ({reason}); log in with `hf auth login` (or set HF_TOKEN) with "
            "a token that may write there, and see that --repo is OWNER/NAME and the network is reachable."
        ) from None
    return str(url)
