"""Streams, events and memory of one device, as copies beside computation need them; no device by name.

`Streams` is what `offload` asks for. `streams_of` gives that of a real accelerator, and None for a device that has no
memory of its own apart from the host's.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor


class Streams(Protocol):
    """The streams of one device. Streams and events are opaque to those who ask for them."""

    device: torch.device

    def live(self) -> Any:
        """The stream that computation is enqueued on now; asked anew each time, since users and FSDP change it."""

    def new(self) -> Any:
        """Another stream."""

    def record(self, stream: Any) -> Any:
        """An event: all that was enqueued on the stream so far."""

    def wait(self, stream: Any, event: Any, counted: bool = False) -> None:
        """What is enqueued on the stream from now on comes after the event; the host goes on.

        Args:
            counted: Add the time for which the stream stands still to `waited_seconds`.
        """

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """Enqueue a copy of as many bytes (1-d, uint8). Neither is kept alive by it."""

    def empty(self, nbytes: int) -> Tensor:
        """Device memory (1-d, uint8) that belongs to the live stream."""

    def host(self, nbytes: int) -> Tensor:
        """Host memory (1-d, uint8). Raises RuntimeError where the system refuses it."""

    def synchronize(self, event: Any) -> None:
        """The host waits for the event."""

    @property
    def waited_seconds(self) -> float:
        """Time of all counted waits that are over."""


def why_not(device: torch.device) -> str | None:
    """Why nothing can be gained by moving tensors of this device to the host; None if there can."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != device.type:
        return f"{device.type} is the host" if device.type == "cpu" else f"{device.type} has no streams"
    if device.type == "mps":
        return "mps shares its memory with the host"
    module = torch.get_device_module(device.type)
    properties = module.get_device_properties(device) if hasattr(module, "get_device_properties") else None
    if getattr(properties, "is_integrated", False) or getattr(properties, "is_integrated_gpu", False):
        return f"{getattr(properties, 'name', device.type)} shares its memory with the host"
    return None


def streams_of(device: torch.device, pinned: bool = True) -> Streams | None:
    """The streams of a device; None where `why_not` has a reason.

    Args:
        pinned: Host memory that a device reaches by itself, which is what lets copies run beside computation.
    """
    return None if why_not(device) else Accelerator(device, pinned)


class Accelerator:
    """`Streams` of whatever accelerator torch has."""

    def __init__(self, device: torch.device, pinned: bool = True) -> None:
        self.device = device
        self._pinned = pinned
        self._waited = 0.0
        self._has_timers = True
        self._waits: deque[tuple[torch.Event, torch.Event]] = deque()
        self._spare: list[torch.Event] = []

    def live(self) -> torch.Stream:
        return torch.accelerator.current_stream(self.device)

    def new(self) -> torch.Stream:
        return torch.Stream(self.device)

    def record(self, stream: torch.Stream) -> torch.Event:
        return stream.record_event()

    def wait(self, stream: torch.Stream, event: torch.Event, counted: bool = False) -> None:
        timers = self._timers() if counted else None
        if timers is None:
            stream.wait_event(event)
            return
        before, after = timers
        before.record(stream)
        stream.wait_event(event)
        after.record(stream)
        self._waits.append((before, after))

    def copy(self, target: Tensor, source: Tensor, stream: torch.Stream) -> None:
        with stream:
            target.copy_(source, non_blocking=True)

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host(self, nbytes: int) -> Tensor:
        # Not one of inference mode, which nobody could write to outside of it.
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self._pinned)

    def synchronize(self, event: torch.Event) -> None:
        event.synchronize()

    @property
    def waited_seconds(self) -> float:
        self._add_up()
        return self._waited

    def _timers(self) -> tuple[torch.Event, torch.Event] | None:
        """Two events; None where those of the device tell no time."""
        try:
            self._add_up()
            return (self._timer(), self._timer()) if self._has_timers else None
        except (RuntimeError, NotImplementedError):
            self._has_timers = False
            return None

    def _timer(self) -> torch.Event:
        try:
            return self._spare.pop()
        except IndexError:
            return torch.Event(self.device, enable_timing=True)

    def _add_up(self) -> None:
        while True:
            try:
                before, after = self._waits.popleft()
            except IndexError:
                return
            # Only what was taken out is looked at: other threads and finalisers take from here too.
            if not after.query():
                self._waits.appendleft((before, after))
                return
            self._waited += before.elapsed_time(after) / 1000
            self._spare += (before, after)
