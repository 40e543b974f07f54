"""Uploads and downloads deltas on the Hugging Face hub: one file and its card."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from darex_jax.core.errors import DarexError
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.atomic import write_whole
from darex_jax.files.card import CARD
from darex_jax.files.paths import read_bytes

FILE = "delta.safetensors"  # file name of a delta in its repository


def push_delta(
    path: Path, repo: str, card: str, *, private: bool = False, revision: str | None = None
) -> str:
    """Uploads an artifact and its card to a model repository, created if missing. Returns its URL.

    Raises: DarexError without a token, network or write permission; FileError for a damaged file.
    """
    import huggingface_hub

    with DeltaFile(path) as file:
        file.check_data()
    if huggingface_hub.get_token() is None:
        raise DarexError(
            "no token for the hub: create one with write access at "
            "https://huggingface.co/settings/tokens, then `hf auth login`, or set HF_TOKEN."
        )
    api = huggingface_hub.HfApi()
    content = read_bytes(path)
    with _explained(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.create_commit(
            repo,
            [
                huggingface_hub.CommitOperationAdd(FILE, content),
                huggingface_hub.CommitOperationAdd(CARD, card.encode()),
            ],
            commit_message=f"A delta of {len(content):,} bytes",
            revision=revision,
        )
    return str(done.repo_url)


def pull_delta(repo: str, out: Path, *, revision: str | None = None) -> Path:
    """Downloads the artifact of a model repository to the file `out`, atomically.

    Raises: DarexError if the repository or file does not exist, or without network or read permission;
      FileError for a damaged artifact.
    """
    import huggingface_hub

    with _explained(repo):
        cached = Path(huggingface_hub.hf_hub_download(repo, FILE, revision=revision))
    with DeltaFile(cached) as file:
        file.check_data()
    write_whole(out, read_bytes(cached))
    return out


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turns the hub's errors into one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise DarexError("this needs the hub, but HF_HUB_OFFLINE is set: unset it.") from error
    except errors.HFValidationError as error:
        raise DarexError(f"{repo!r:.80} is not a repository name: expected OWNER/NAME.") from error
    except errors.GatedRepoError as error:
        raise DarexError(
            f"{repo} is gated: request access on its page, and log in (`hf auth login`)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DarexError(
            f"{repo} is not on the hub, or this token has no access to it (`hf auth login`)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DarexError(f"{repo} has no such revision.") from error
    except errors.LocalEntryNotFoundError as error:
        raise DarexError(f"{repo} cannot be downloaded: there is no connection to the hub.") from error
    except errors.EntryNotFoundError as error:
        raise DarexError(f"{repo} has no {FILE}: it was not created by `darex push`.") from error
    except errors.HfHubHTTPError as error:
        response = error.response
        status = getattr(response, "status_code", None)
        hint = " This token has no write access to it." if status in (401, 403) else ""
        raise DarexError(f"{repo}: the hub responded with {status}.{hint}") from error
    except (getattr(errors, "HTTPError", ConnectionError), ConnectionError, TimeoutError) as error:
        raise DarexError(f"{repo}: there is no connection to the hub ({type(error).__name__}).") from error
    except ValueError as error:  # invalid metadata in the card
        lines = str(error).strip().splitlines() or [""]
        raise DarexError(f"{repo}: the hub rejected this: {lines[0]:.200}") from error
