"""Files to a repository on the Hugging Face hub: one commit, as a pull request unless the caller wants otherwise.

huggingface_hub does the sending. What an earlier, broken-off call has sent is not sent again, and nothing of it is seen
in the repository before the commit at the end. The address is that of ``HF_ENDPOINT``, the login that of ``HF_TOKEN``
or of ``hf auth login``; the token is in no message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.hub import PREFIX, is_repository
from unmergeable.errors import BadInput, UnmergeableError, UsageError, first_line, shown
from unmergeable.optional import optional_package

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Repository:
    """What a repository is: whether others cannot see it, and its files with their SHA-256, None for small ones."""

    is_private: bool
    files: Mapping[str, str | None]


@dataclass(frozen=True)
class Commit:
    """Where a commit can be seen. ``pull_request``: None where the branch itself has it."""

    url: str
    pull_request: str | None


def repository_name(text: str) -> str:
    """``OWNER/NAME`` from what a user calls it.

    Raises:
        UsageError: it is no such name.
    """
    name = text.removeprefix(PREFIX)
    if not is_repository(name):
        raise UsageError(f"{shown(text)} is no name of a repository: write OWNER/NAME.")
    return name


def repository(name: str) -> Repository | None:
    """What is there; None where there is nothing that this login sees.

    Raises:
        UsageError: huggingface_hub is not installed.
        BadInput: nobody is logged in, or the hub refuses.
        UnmergeableError: the hub cannot be reached.
    """
    hub = optional_package("huggingface_hub", "hf")
    if hub.get_token() is None:
        raise BadInput(f"{name}: nobody is logged in to the hub; {LOG_IN}.")
    with _asking(name):
        try:
            found = hub.HfApi().repo_info(name, files_metadata=True)
        except hub.errors.RepositoryNotFoundError as error:
            if error.response.status_code == 401:  # so the hub calls what a wrong token asks for
                raise BadInput(f"{name}: the hub does not know your login; {LOG_IN}.") from None
            return None
    files = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in found.siblings or ()}
    return Repository(bool(found.private), files)


def create_repository(name: str, *, is_private: bool) -> None:
    """Make a repository. Raises as :func:`repository`."""
    hub = optional_package("huggingface_hub", "hf")
    with _asking(name):
        hub.HfApi().create_repo(name, private=is_private, exist_ok=True)


def upload(
    files: Mapping[str, Path],
    name: str,
    *,
    message: str,
    description: str,
    revision: str | None,
    as_pull_request: bool,
    shows_progress: bool,
) -> Commit:
    """Commit files, by their path in the repository; what is there under other names stays.

    Raises:
        UsageError, BadInput: as :func:`repository`.
        UnmergeableError: it broke off; the same call goes on.
    """
    hub = optional_package("huggingface_hub", "hf")
    operations = [hub.CommitOperationAdd(path, str(file)) for path, file in files.items()]
    with _asking(name), _bars(hub, are_shown=shows_progress):
        made = hub.HfApi().create_commit(
            name,
            operations,
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=as_pull_request,
        )
    return Commit(str(made.commit_url), made.pr_url)


@contextmanager
def _bars(hub: Any, *, are_shown: bool) -> Iterator[None]:
    if are_shown or hub.utils.are_progress_bars_disabled():
        yield
        return
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.enable_progress_bars()


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """Turn what the hub and the way to it may raise into one line, without the token."""
    hub = optional_package("huggingface_hub", "hf")
    errors = hub.errors
    try:
        yield
    except errors.RevisionNotFoundError:
        raise BadInput(f"{name} has no such branch; make it there first, or leave out --revision.") from None
    except errors.RepositoryNotFoundError:
        raise BadInput(
            f"{name} is no repository that your login sees; add --create, or --private, to make it."
        ) from None
    except errors.HfHubHTTPError as error:
        raise _refused(name, error, hub.get_token()) from None
    except (errors.HFValidationError, ValueError) as error:  # ValueError: the front matter of a card
        raise BadInput(f"{name}: {_reason(error, hub.get_token())}; correct it and push again.") from None
    except (errors.HTTPError, OSError, RuntimeError) as error:
        raise UnmergeableError(
            f"{name} cannot be reached, or the upload broke off ({_reason(error, hub.get_token())}); run the same "
            "command again: what was sent is not sent twice."
        ) from None


def _refused(name: str, error: Any, token: str | None) -> UnmergeableError:
    status = error.response.status_code
    said = _reason(error, token)
    if status == 401:
        return BadInput(f"{name}: the hub does not know your login; {LOG_IN}.")
    if status == 403:
        return BadInput(
            f"{name}: your login may not write there ({said}); use a token with write access, or another name."
        )
    if status < 500 and status not in (408, 429):
        return BadInput(f"{name}: the hub refuses ({said}); correct that and push again.")
    return UnmergeableError(f"{name}: the hub failed ({said}); run the same command again later.")


def _reason(error: BaseException, token: str | None) -> str:
    cause = error.__cause__
    text = str(getattr(error, "server_message", None) or "") or first_line(error)
    text += "" if cause is None else f" {first_line(cause)}"
    text = " ".join(text.split())[:300].rstrip(".")
    return text.replace(token, "…") if token else text
