"""Pushing to the hub, with a hub that only writes down what it is asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import PipeError
from pipeline.hub import check_repository, push_folder


class Hub:
    """Answers as huggingface_hub's HfApi; knows which repositories have a card."""

    def __init__(self, *, described: bool = False, error: Exception | None = None) -> None:
        self.described, self.error, self.asked = described, error, []

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.asked.append(("create", repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}", __str__=lambda self: "address")

    def file_exists(self, repo_id: str, name: str) -> bool:
        return self.described

    def upload_folder(self, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.asked.append(("upload", options))


@pytest.mark.parametrize("described", [False, True])
def test_a_new_repository_is_private_and_a_card_that_is_there_stays(tmp_path: Path, described: bool) -> None:
    hub = Hub(described=described)
    push_folder(tmp_path / "clip", "name", api=hub)
    (_, repository, created), (_, uploaded) = hub.asked
    assert repository == "name"
    assert (created["private"], created["exist_ok"], created["repo_type"]) == (True, True, "model")
    assert uploaded["repo_id"] == "me/name"
    assert uploaded["folder_path"] == str(tmp_path / "clip")
    assert uploaded["ignore_patterns"] == (["README.md"] if described else None)


class Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"{status} Client Error.\n\nForbidden")
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (Refused(403), r"the hub refused the push \(403 Client Error. Forbidden\).*log in with"),
        (Refused(500), r"the hub refused the push .*; try again"),
        (ConnectionError("no route"), r"the hub cannot be reached \(no route\).*the export stays in .*clip; try again"),
    ],
)
def test_what_the_hub_answers_is_one_line(tmp_path: Path, error: Exception, says: str) -> None:
    with pytest.raises(PipeError, match=says) as caught:
        push_folder(tmp_path / "clip", "me/name", api=Hub(error=error))
    assert "\n" not in str(caught.value)


def test_name_and_login_are_asked_for_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PipeError, match=r"needs a login, --hub me/name; log in with: hf auth login"):
        check_repository("me/name")
    check_repository("me/name", token="secret")
    with pytest.raises(PipeError, match="no repository's name"):
        check_repository("a/b/c", token="secret")
