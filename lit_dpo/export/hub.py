"""A folder ──► a repository of the hub, private unless asked. An interrupted upload goes on where it was."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]


def check_name(name: str) -> None:
    """Checks the name of a repository, before anything is computed.

    Raises:
        ValueError: If the hub takes no such name.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push_to_hub {name}: {error}") from error


def push_folder(folder: Path, name: str, *, private: bool = True) -> str:
    """Uploads a folder. Files that the repository has already are not sent again.

    Args:
        folder: The folder.
        name: Name of the repository, such as ``team/model``.
        private: Whether a new repository is private. One that exists stays as it is.

    Returns:
        The repository's address.

    Raises:
        OSError: If the hub does not take it. The folder stays, and the message says how to go on.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Export of lit_dpo")
    except Exception as error:  # of the hub, of the network, of the library that speaks to it
        said = " ".join(str(error).split())
        raise OSError(
            f"--push_to_hub {name}: {said:.300} The export lies in {folder}. To send it again: "
            f"hf upload {name} {folder}"
        ) from error
    return str(address)
