"""Kept values in host memory, for devices that have no room for them.

On CUDA the memory is pinned, and copies run on a stream of their own, beside the computing: to the
host when a value is kept, and back when the layer before it in the model is reused.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


class Parked:
    """A tensor in host memory.

    Args:
        value: The tensor, which nobody writes into any more.

    Attributes:
        nbytes: Its bytes.
    """

    def __init__(self, value: Tensor) -> None:
        self.nbytes = value.nbytes
        self._device = value.device
        self._back: Tensor | None = None  # on its way to the device, or there
        self._arrival: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._host = _sent_to_host(value)
        else:
            self._host = value.cpu()

    def prefetch(self) -> None:
        """Begins to bring the tensor to its device."""
        if self._device.type == "cuda" and self._back is None:
            aside = _stream(self._device)
            with torch.cuda.stream(aside):
                self._back = self._host.to(self._device, non_blocking=True)
                self._arrival = aside.record_event()

    def fetch(self) -> Tensor:
        """A copy on the device, for whoever asks to write into; it must be asked for anew."""
        self.prefetch()
        back, self._back = self._back, None
        if back is None or self._arrival is None:
            return self._host.to(self._device, copy=True)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._arrival)
        back.record_stream(stream)  # its memory was taken on the other stream
        return back


def _sent_to_host(value: Tensor) -> Tensor:
    host = torch.empty_like(value, device="cpu", pin_memory=True)
    aside = _stream(value.device)
    aside.wait_stream(torch.cuda.current_stream(value.device))
    with torch.cuda.stream(aside):
        host.copy_(value, non_blocking=True)
    value.record_stream(aside)
    return host


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies to and from a device run on; in the order in which they were begun."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
