"""Uploads, against a stand-in for the hub."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from imdm_scale.errors import UserError
from imdm_scale.hf.export import save_folder
from imdm_scale.hf.push import push_folder


class Hub:
    """Records what it is asked, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.error = error

    def create_repo(self, repo: str, **settings: object) -> str:
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", {"repo": repo, **settings}))
        return f"https://huggingface.co/{repo}"

    def create_branch(self, repo: str, **settings: object) -> None:
        self.calls.append(("create_branch", settings))

    def upload_folder(self, **settings: object) -> None:
        self.calls.append(("upload_folder", settings))


@pytest.fixture
def folder(network, tmp_path) -> Path:
    model = network()
    return save_folder(model, model.config, tmp_path / "model")


def test_all_files_go_up_as_one_commit(folder):
    hub = Hub()
    assert (
        push_folder(folder, "me/model", private=True, revision="v2", api=hub)
        == "https://huggingface.co/me/model"
    )
    (create, branch, upload) = hub.calls
    assert create == ("create_repo", {"repo": "me/model", "private": True, "exist_ok": True})
    assert branch == ("create_branch", {"branch": "v2", "exist_ok": True})
    assert upload[1]["folder_path"] == folder and upload[1]["revision"] == "v2"
    hub = Hub()
    push_folder(folder, "me/model", api=hub)
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]


@pytest.mark.parametrize(
    "error",
    [
        LocalTokenNotFoundError("Token is required, but no token found.\nTo log in ..."),
        HfHubHTTPError(
            "401 Client Error\nInvalid username or password.",
            response=httpx.Response(401, request=httpx.Request("POST", "https://huggingface.co")),
        ),
        httpx.ConnectError("no route"),
        ValueError("Repo id must be in the form 'repo_name' or 'namespace/repo_name'"),
    ],
)
def test_the_hubs_errors_are_one_sentence(folder, error):
    with pytest.raises(UserError, match=r"could not be uploaded to me/model .*hf auth login") as caught:
        push_folder(folder, "me/model", api=Hub(error))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_not_uploaded(tmp_path):
    with pytest.raises(UserError, match="is not an exported model"):
        push_folder(tmp_path, "me/model", api=Hub())
