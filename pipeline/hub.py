"""Exported folders to the Hugging Face hub. The only code of this project that writes to a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.console import log
from pipeline.errors import PipeError

LOGIN = "log in with: hf auth login (or set HF_TOKEN)"


def check_repository(repository: str, *, token: str | None = None) -> None:
    """Whether a push to `repository` (NAME or ORG/NAME) can begin; asks no network.

    Raises:
        PipeError: that is no repository's name, or nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise PipeError("this is no repository's name", where=repr(repository), fix="write --hub ORG/NAME") from None
    if (token or get_token()) is None:
        raise PipeError("a push to the hub needs a login", where=f"--hub {repository}", fix=LOGIN)


def push_folder(folder: Path, repository: str, *, api: Any = None) -> str:
    """Upload an exported folder as one commit; returns the repository's address.

    A repository that does not exist yet is created as a private one: what its card says of licence and data is to be
    filled in before others see it. A card that is there already stays, since somebody may have filled it in; so do
    files that this export does not have.

    Args:
        api: a huggingface_hub.HfApi, or what stands for it.

    Raises:
        PipeError: no login, no right to write there, or the hub cannot be reached.
    """
    if api is None:
        from huggingface_hub import HfApi

        check_repository(repository)
        api = HfApi()
    try:
        url = api.create_repo(repository, repo_type="model", private=True, exist_ok=True)
        name = getattr(url, "repo_id", repository)  # the hub adds the owner to a bare name
        described = api.file_exists(name, "README.md")
        if described:
            log.info("%s has a model card already, which stays", name)
        api.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            commit_message=f"Export of {folder.name}",
            ignore_patterns=["README.md"] if described else None,
        )
    except Exception as error:  # the client's own, and those of whatever HTTP library it uses
        raise PipeError(_reason(error), where=repository, fix=f"the export stays in {folder}; {_fix(error)}") from error
    return str(url)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return f"the hub refused the push ({text})" if _status(error) else f"the hub cannot be reached ({text})"


def _fix(error: BaseException) -> str:
    return LOGIN if _status(error) in (401, 403) else "try again"
