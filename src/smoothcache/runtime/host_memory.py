"""Kept values in host memory, for devices with too little memory.

On CUDA the memory is pinned and copies run on a separate stream, in parallel with computation. A
value is copied to the host when it is kept, and back when the preceding layer is reused.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


class Parked:
    """A tensor in host memory.

    Args:
        value: The tensor; it must not be modified afterwards.

    Attributes:
        nbytes: Size in bytes.
    """

    def __init__(self, value: Tensor) -> None:
        self.nbytes = value.nbytes
        self._device = value.device
        self._on_device: Tensor | None = None  # the copy on the device, possibly in transfer
        self._arrival: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._host = _sent_to_host(value)
        else:
            self._host = value.cpu()

    def prefetch(self) -> None:
        """Starts copying the tensor to its device."""
        if self._device.type == "cuda" and self._on_device is None:
            copy_stream = _copy_stream(self._device)
            with torch.cuda.stream(copy_stream):
                self._on_device = self._host.to(self._device, non_blocking=True)
                self._arrival = copy_stream.record_event()

    def fetch(self) -> Tensor:
        """Returns a new copy on the device, which the caller may write into."""
        self.prefetch()
        value, self._on_device = self._on_device, None
        if value is None or self._arrival is None:
            return self._host.to(self._device, copy=True)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._arrival)
        value.record_stream(stream)  # its memory was allocated on the copy stream
        return value


def _sent_to_host(value: Tensor) -> Tensor:
    host = torch.empty_like(value, device="cpu", pin_memory=True)
    copy_stream = _copy_stream(value.device)
    copy_stream.wait_stream(torch.cuda.current_stream(value.device))
    with torch.cuda.stream(copy_stream):
        host.copy_(value, non_blocking=True)
    value.record_stream(copy_stream)
    return host


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream for copies to and from a device; one stream keeps them in order."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
