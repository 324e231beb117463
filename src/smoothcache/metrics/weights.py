"""Loading, downloading and digests of the networks' weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import FileFormatError, SmoothCacheError
from ..files.document import write_atomically

T = TypeVar("T")


class MissingWeightsError(SmoothCacheError, OSError):
    """A network's weights are not available locally and could not be downloaded."""


def weights_digest(model: nn.Module | Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 digest of all parameters and buffers.

    >>> import torch
    >>> weights_digest({"a": torch.zeros(2)})[:18]
    'sha256:16edfb6709e'
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def weights_file(
    path: str | os.PathLike[str] | None, *, url: str, what: str, hash_prefix: str | None = None
) -> Path:
    """Returns the file of a network's weights: the user's file, or a file downloaded once.

    Args:
        path: The user's file; None to use torch's download folder.
        url: URL of the file.
        what: Name of the network, for messages.
        hash_prefix: Prefix of the file's SHA-256 digest.

    Raises:
        MissingWeightsError: If the file does not exist and cannot be downloaded.
    """
    if path is not None:
        if not Path(path).is_file():
            raise MissingWeightsError(
                f"the weights of {what} are not at '{path}'. Download {url} and give its path."
            )
        return Path(path)
    kept = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not kept.is_file():
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(kept), hash_prefix, progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise MissingWeightsError(
                f"the weights of {what} could not be downloaded ({error}). Download {url} on a "
                f"machine with a network, and put it at '{kept}' or give its path."
            ) from error
    return kept


def load_weights(path: str | os.PathLike[str], *, what: str) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors or PyTorch file without executing code.

    Raises:
        FileFormatError: If the file is damaged, or contains anything but named tensors.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise _damaged(path, what, str(error)) from error
    except Exception as error:  # unpickling raises various errors
        raise _damaged(path, what, f"{type(error).__name__}: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise _damaged(path, what, "it holds something other than named tensors")
    return state


def fill(model: nn.Module, state: Mapping[str, Tensor], *, file: str, what: str) -> None:
    """Loads weights into a network.

    Raises:
        FileFormatError: If a tensor is missing, unknown or of another shape.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise _damaged(file, what, str(error)) from error


def pretrained(load: Callable[..., T], source: str, *, what: str, **options: Any) -> T:
    """What a ``from_pretrained`` of transformers returns.

    Args:
        load: The class method.
        source: A folder, or a name on the Hugging Face hub.
        what: The network's name, for messages.
        options: Passed on.

    Raises:
        MissingWeightsError: If it is neither on this machine nor to be downloaded.
    """
    try:
        return load(source, **options)
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise FileFormatError(
                f"'{source}' holds no usable weights of {what}: {error}"
            ) from error
        raise MissingWeightsError(
            f"the weights of {what}, '{source}', could not be loaded ({_first_line(error)}). On a "
            f"machine with a network run `hf download {source} --local-dir FOLDER`, bring FOLDER "
            "here and give its path instead of the name."
        ) from error


def save_weights(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Write a network's weights to a .safetensors file, which ``load_weights`` reads."""
    from safetensors.torch import save

    write_atomically(path, save({k: v.contiguous() for k, v in model.state_dict().items()}))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _damaged(path: str | os.PathLike[str], what: str, problem: str) -> FileFormatError:
    return FileFormatError(
        f"{path}: not the weights of {what} ({problem}). Download the file again."
    )
