"""Files of one repository on the hub: pushed in one commit, fetched within a bound of size."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HubError, InvalidArgumentError
from ..version import __version__

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
REVISION = re.compile(r"[\w][\w./-]*")
LIBRARY = "smoothcache"
CARD = "README.md"
MOST_CARD_BYTES = 2**20
NETWORK = {"ConnectError", "ConnectionError", "NetworkError", "TimeoutException", "ProxyError"}
NETWORK |= {"Timeout", "TransportError"}


@dataclass(frozen=True)
class Place:
    """Where something is on the hub, and how it is reached.

    Attributes:
        name: ``owner/name`` of a repository; to read from, also a local folder.
        revision: Branch, tag or commit; None for the newest.
        token: Of the user; None for the one that is logged in, False for none.
        endpoint: Address of the hub; None for the one of ``HF_ENDPOINT``.
        cache_dir: Where downloads are kept; None for the usual place.
        local_files_only: Whether to take only what was downloaded before.
    """

    name: str
    revision: str | None = None
    token: str | bool | None = None
    endpoint: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False


def push(
    place: Place, files: Mapping[str, bytes], *, message: str, private: bool | None = None
) -> str:
    """Puts files into a repository, which is made if there is none; gives its address.

    Args:
        place: The repository.
        files: Name -> content.
        message: Of the commit.
        private: Whether a new repository is private; None for the owner's default.

    Raises:
        InvalidArgumentError: If the name is none of a repository.
        HubError: If the hub cannot be reached, or refuses.
    """
    _check_names(place)
    hub = _hub()
    api = hub.HfApi(
        endpoint=place.endpoint, token=place.token, library_name=LIBRARY,
        library_version=__version__,
    )  # fmt: skip
    operations = [
        hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=data)
        for name, data in files.items()
    ]
    try:
        address = api.create_repo(place.name, private=private, exist_ok=True)
        api.create_commit(place.name, operations, commit_message=message, revision=place.revision)
    except Exception as error:  # httpx, requests and the hub's own
        raise _told(place, error, f"cannot push to '{place.name}'") from error
    return str(address)


def fetch(
    place: Place, file: str, *, what: str, most_bytes: int, others: Mapping[str, str]
) -> Path:
    """A file of a repository, downloaded or from the cache; or of a local folder.

    Args:
        place: The repository or folder.
        file: Name of the file.
        what: What it holds, for messages.
        most_bytes: Above which it is not taken.
        others: Name of another file -> what to do if there is that one instead.

    Raises:
        InvalidArgumentError: If the name is neither a folder nor a repository's.
        HubError: If there is no such file, it is too large, or the hub cannot be reached.
    """
    if _is_folder(place.name):
        folder = Path(place.name).expanduser()
        found = folder / file
        if not found.is_file():
            hint = next((hint for name, hint in others.items() if (folder / name).is_file()), "")
            raise HubError(_without(f"the folder '{place.name}'", file, what, hint))
    else:
        _check_names(place)
        found = _downloaded(place, file, what, most_bytes, others)
    _check_size(found.stat().st_size, place, file, most_bytes)
    return found


def _is_folder(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().is_dir()
    except (OSError, RuntimeError):  # too long for a name, or of an unknown user
        return False


def _downloaded(
    place: Place, file: str, what: str, most_bytes: int, others: Mapping[str, str]
) -> Path:
    hub = _hub()
    offline = place.local_files_only or bool(hub.constants.HF_HUB_OFFLINE)
    options = {"revision": place.revision, "endpoint": place.endpoint}
    try:
        if not offline:
            url = hub.hf_hub_url(place.name, file, **options)
            known = hub.get_hf_file_metadata(url, token=place.token)
            if known.size is None:
                raise HubError(
                    f"the hub does not say how large {file} of '{place.name}' is, so it is not "
                    "downloaded"
                )
            _check_size(known.size, place, file, most_bytes)
        path = hub.hf_hub_download(
            place.name, file, **options, token=place.token, cache_dir=place.cache_dir,
            local_files_only=offline, library_name=LIBRARY, library_version=__version__,
        )  # fmt: skip
    except HubError:
        raise
    except Exception as error:  # httpx, requests and the hub's own
        names = {cls.__name__ for cls in type(error).__mro__}
        if "EntryNotFoundError" in names and "LocalEntryNotFoundError" not in names:
            hint = _hint(hub, place, others, options)
            raise HubError(_without(f"'{place.name}'", file, what, hint)) from error
        raise _told(place, error, f"cannot fetch {what} from '{place.name}'") from error
    return Path(path)


def _hint(hub: Any, place: Place, others: Mapping[str, str], options: Mapping[str, Any]) -> str:
    """What to do instead, if the repository has one of the other files."""
    for name, hint in others.items():
        try:
            url = hub.hf_hub_url(place.name, name, **options)
            hub.get_hf_file_metadata(url, token=place.token)
        except Exception:  # then it has not
            continue
        return hint
    return ""


def _without(where: str, file: str, what: str, hint: str) -> str:
    remedy = hint or "Check the name and the revision."
    return f"{where} holds no {what}: it has no {file}. {remedy}"


def _check_size(size: int, place: Place, file: str, most_bytes: int) -> None:
    if size > most_bytes:
        raise HubError(
            f"{file} of '{place.name}' has {size} bytes, more than the {most_bytes} that are read; "
            "if you trust it, download it yourself and load the file."
        )


def _check_names(place: Place) -> None:
    name = place.name
    if not REPOSITORY.fullmatch(name) or ".." in name or len(name) > 200:
        raise InvalidArgumentError(
            f"{name!r} is neither a folder nor the name of a repository; expected owner/name."
        )
    if place.revision is not None and (
        not REVISION.fullmatch(place.revision) or ".." in place.revision
    ):
        raise InvalidArgumentError(f"{place.revision!r} is no branch, tag or commit.")


def _told(place: Place, error: BaseException, what: str) -> HubError:
    """An error of the hub in a sentence that says what to do."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    names = {cls.__name__ for one in causes for cls in type(one).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in names:
        reason = "it asks you to accept its terms and to log in (hf auth login)"
    elif "RevisionNotFoundError" in names:
        reason = f"it has no revision '{place.revision}'"
    elif "RepositoryNotFoundError" in names:
        reason = "the hub has no repository of that name, or it is private: log in (hf auth login)"
    elif status in (401, 403) or "LocalTokenNotFoundError" in names:
        reason = "the hub refuses it: log in with a token that may write (hf auth login)"
    elif names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"} and not names & NETWORK:
        reason = "it was not downloaded before, and the hub is not asked (offline)"
    elif names & NETWORK or "LocalEntryNotFoundError" in names:
        reason = "the hub cannot be reached; check the network, or HF_ENDPOINT"
    else:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
    return HubError(f"{what}: {reason}.")


def _hub() -> Any:
    return importlib.import_module("huggingface_hub")
