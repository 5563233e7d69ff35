"""Of a profiler's trace: which share of the time of copies between host and device ran beside computation.

Times are those of the trace, in microseconds. A copy is hidden while a kernel runs on another stream of its device; a copy
that is enqueued between kernels, on their own stream, is never hidden.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Names that the profilers of CUDA, ROCm and XPU give to copies: "Memcpy DtoH (Device -> Pinned)", "CopyHostToDevice", ...
_OUT = re.compile(r"DtoH|D2H|D2M|DeviceToHost", re.IGNORECASE)
_IN = re.compile(r"HtoD|H2D|M2D|HostToDevice", re.IGNORECASE)

Interval = tuple[float, float]


@dataclass(frozen=True)
class Span:
    """Something that ran on a device.

    Args:
        kind: `kernel`, `out` (a copy to the host) or `in`.
        start: When it began.
        end: When it was over.
        stream: On which stream of its device.
        device: On which device.
    """

    kind: str
    start: float
    end: float
    stream: Any = 0
    device: Any = 0


@dataclass(frozen=True)
class Overlap:
    """Copies in one direction.

    Args:
        number: How many.
        seconds: Time for which any of a stream ran, summed over streams.
        hidden_seconds: The part of it in which a kernel ran on another stream.
    """

    number: int = 0
    seconds: float = 0.0
    hidden_seconds: float = 0.0

    @property
    def share(self) -> float | None:
        """Hidden time / time; None where nothing was copied."""
        return self.hidden_seconds / self.seconds if self.seconds else None


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points, as intervals that are sorted and apart; empty ones are left out."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def intersect(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """What two lists have in common, each as `merge` gives it."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        # The one that ends first meets nothing more.
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Length of intervals that are apart."""
    return sum(end - start for start, end in intervals)


def overlap(spans: Sequence[Span], kind: str) -> Overlap:
    """How much of the copies of one kind was hidden."""
    copies = [span for span in spans if span.kind == kind]
    total = hidden = 0.0
    for place in {(span.device, span.stream) for span in copies}:
        own = merge((span.start, span.end) for span in copies if (span.device, span.stream) == place)
        total += length(own)
        hidden += length(intersect(own, _others_kernels(spans, *place)))
    return Overlap(len(copies), total / 1e6, hidden / 1e6)


def _others_kernels(spans: Sequence[Span], device: Any, stream: Any) -> list[Interval]:
    others = (s for s in spans if s.kind == "kernel" and s.device == device and s.stream != stream)
    return merge((span.start, span.end) for span in others)


def idle_seconds(spans: Sequence[Span]) -> float:
    """Time between the first kernel and the last in which no kernel ran, on any device."""
    busy = merge((span.start, span.end) for span in spans if span.kind == "kernel")
    return (busy[-1][1] - busy[0][0] - length(busy)) / 1e6 if busy else 0.0


def read_trace(path: Path) -> list[Span]:
    """Kernels and copies between host and device of a chrome trace that `torch.profiler` wrote."""
    data = json.loads(path.read_text())
    events = data["traceEvents"] if isinstance(data, Mapping) else data
    return [span for event in events if (span := _span(event)) is not None]


def _span(event: Mapping[str, Any]) -> Span | None:
    kind = _kind(event) if event.get("ph") == "X" else None
    if kind is None:
        return None
    start, details = float(event["ts"]), event.get("args", {})
    stream, device = details.get("stream", event.get("tid")), details.get("device", event.get("pid"))
    return Span(kind, start, start + float(event.get("dur", 0)), stream, device)


def _kind(event: Mapping[str, Any]) -> str | None:
    category, name = str(event.get("cat", "")).lower(), str(event.get("name", ""))
    if category == "kernel":
        return "kernel"
    if category != "gpu_memcpy":
        return None
    return "out" if _OUT.search(name) else "in" if _IN.search(name) else None
