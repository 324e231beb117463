"""Base class of what is shared on the hub as one file of data beside its card."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from .card import Card, Details
from .repository import CARD, Place, fetch, push

T = TypeVar("T", bound="Shared")


@dataclass(frozen=True)
class FileKind:
    """The file that one class of objects is shared as.

    Attributes:
        name: Name of the file in the repository.
        noun: What it holds, for messages.
        most_bytes: Size above which it is not downloaded.
        others: Name of another kind's file -> what to do if the repository holds that one.
    """

    name: str
    noun: str
    most_bytes: int
    others: Mapping[str, str]


class Shared(ABC):
    """A schedule or a calibration; subclasses have ``save``, ``load`` and ``_card``."""

    _file_kind: ClassVar[FileKind]

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file."""

    @classmethod
    @abstractmethod
    def load(cls: type[T], path: str | os.PathLike[str]) -> T:
        """Reads the file and checks all of it."""

    @abstractmethod
    def _card(self, name: str, details: Details) -> Card:
        """Returns the card for a repository of this name."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str = "",
        base_revision: str = "",
        settings: Mapping[str, str] | None = None,
        prompts: Sequence[str] = (),
        seeds: str = "",
        command: str = "",
        license: str = "",
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
    ) -> str:
        """Uploads the file to the Hugging Face hub, with a card that describes it.

        Args:
            repo_id: ``owner/name``; the repository is created if it does not exist.
            base_model: ``owner/name`` of the model on the hub that the file is for.
            base_revision: Revision of that model.
            settings: Further settings by name, such as resolution, dtype and guidance.
            prompts: Prompts of the measurement; the card lists the first 40.
            seeds: Description of the initial noise.
            command: Command that made the file.
            license: License of the files, as the hub names licenses.
            private: Whether a new repository is private; None for the owner's default.
            revision: Branch to push to; None for main.
            token: Access token; None for the logged-in user's.
            endpoint: Address of another hub; None for the one of ``HF_ENDPOINT``.

        Returns:
            The address of the repository.

        Raises:
            InvalidArgumentError: If ``repo_id`` is not a repository name.
            HubError: If the hub cannot be reached or refuses the upload.
        """
        details = Details(
            base_model, base_revision, dict(settings or {}), prompts, seeds, command, license
        )
        kind, place = self._file_kind, Place(repo_id, revision, token, endpoint)
        card = self._card(repo_id, details).to_markdown().encode("utf-8")
        with tempfile.TemporaryDirectory() as folder:
            self.save(written := Path(folder, kind.name))
            files = {kind.name: written.read_bytes(), CARD: card}
        return push(place, files, message=f"Upload a {kind.noun} of smoothcache", private=private)

    @classmethod
    def from_pretrained(
        cls: type[T],
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        endpoint: str | None = None,
    ) -> T:
        """Downloads what ``push_to_hub`` uploaded, and checks the whole file as ``load`` does.

        Args:
            repo_id: ``owner/name`` on the Hugging Face hub, or a local folder.
            revision: Branch, tag or commit; None for the newest.
            token: Access token; None for the logged-in user's.
            cache_dir: Folder for downloads; None for the hub's default.
            local_files_only: Whether to use only files that were downloaded before.
            endpoint: Address of another hub; None for the one of ``HF_ENDPOINT``.

        Returns:
            The object that the file holds.

        Raises:
            InvalidArgumentError: If ``repo_id`` is neither a folder nor a repository name.
            HubError: If there is no such file, it is too large, or the hub cannot be reached.
            FileFormatError: If the file is damaged or made by a newer version.
        """
        kind = cls._file_kind
        place = Place(repo_id, revision, token, endpoint, cache_dir, local_files_only)
        found = fetch(
            place, kind.name, what=kind.noun, most_bytes=kind.most_bytes, others=kind.others
        )
        return cls.load(found)
