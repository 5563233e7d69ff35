"""What a device reaches: copies between it and the host, and a matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from device_steps import seconds_of
from torch import Tensor


def bandwidth(nbytes: int, repeats: int = 5) -> dict[str, float]:
    """GB/s (10**9) of copies of a pinned buffer, each way, both ways at once, and pageable; bf16 TFLOP/s of a matmul."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    on_device = [torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
    start = time.perf_counter()
    pinned = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    pinning = time.perf_counter() - start
    pageable = torch.ones(nbytes, dtype=torch.uint8)
    streams = [torch.Stream(device) for _ in range(2)]

    def out(host: Tensor = pinned[0]) -> None:
        host.copy_(on_device[0], non_blocking=True)

    def back(host: Tensor = pinned[1]) -> None:
        on_device[1].copy_(host, non_blocking=True)

    def both() -> None:
        live = torch.accelerator.current_stream(device)
        for stream, copy in zip(streams, (out, back)):
            stream.wait_stream(live)
            with stream:
                copy()
        for stream in streams:
            live.wait_stream(stream)

    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    ways = {"out": out, "in": back, "both": both, "out, pageable": lambda: out(pageable)}
    found = {name: nbytes / _median_seconds(copy, device, repeats) / 1e9 for name, copy in ways.items()}
    found["both"] *= 2
    found["seconds to pin a GiB"] = pinning / 2 * 2**30 / nbytes
    found["matmul TFLOP/s"] = 2 * 8192**3 / _median_seconds(lambda: square @ square, device, repeats) / 1e12
    return found


def _median_seconds(step: Callable[[], Any], device: torch.device, repeats: int) -> float:
    step()
    return median(seconds_of(step, device) for _ in range(repeats))
