"""Uploading a folder to the Hugging Face Hub."""

from pathlib import Path

from espnet_kv.errors import UserError, one_line


def check_token(repo: str) -> None:
    """Refuse an upload to `repo` for which nobody is logged in.

    Raises:
        UserError: there is no token.
    """
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(
            f"--hf_repo {repo}: no token for the upload: log in (hf auth login), or set HF_TOKEN"
        )


def upload(repo: str, folder: Path) -> str:
    """Put all files of `folder` into a repository in one commit; it is created if need be.

    Args:
        repo: USER/NAME.

    Returns:
        The address of the repository.

    Raises:
        UserError: the token is refused, there is no network, or the server's answer is an error.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    hub = HfApi()
    try:
        address = str(hub.create_repo(repo, exist_ok=True))
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Update model")
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"--hf_repo {repo}: {constants.ENDPOINT} refuses the token (status {status}): log "
                "in with one that may write there (hf auth login, or HF_TOKEN)"
            ) from error
        raise UserError(
            f"--hf_repo {repo}: not uploaded ({one_line(error)}): run stage 17 again"
        ) from error
    except (HTTPError, OSError) as error:
        raise UserError(
            f"--hf_repo {repo}: {constants.ENDPOINT} cannot be reached ({one_line(error)}): check "
            "the network and run stage 17 again"
        ) from error
    return address
