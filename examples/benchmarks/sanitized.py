"""Small steps of mode offload under torch's sanitizer, which finds accesses of two streams that nothing puts in order.

    TORCH_CUDA_SANITIZER=1 python examples/benchmarks/sanitized.py

`sanitize` runs that in a process of its own, for the sanitizer wants to see everything from the start; and once more with
the waits of streams for each other left out, which it has to find. What it cannot see: memory that is freed while a copy
still reads it, since it forgets what is freed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ckpt_trainer import checkpointing, streams

sys.path.insert(0, str(Path(__file__).resolve().parent))
from older_torch import make_up_for_older_torch

# The sanitizer is torch's for this kind of device only.
KIND = "cuda"
SAVES = ("inputs", "attention", "all")
_RACE = "CSAN detected a possible data race"


def small_model(device: torch.device) -> tuple[nn.Module, Tensor]:
    """Four blocks whose inputs are 2 MiB, and tokens for them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=128, use_cache=False)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        return model, torch.randint(128, (1, 4096))


def run(device: torch.device) -> dict[str, int]:
    """Bytes that left the device, by what is stored; in plain steps, two in a row, and two forwards before a backward."""
    model, ids = small_model(device)
    moved = {}
    for save in SAVES:
        with checkpointing(model, mode="offload", offload_save=save) as state:
            for _ in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
            losses = [model(input_ids=rows, labels=rows).loss for rows in (ids, ids.flip(1))]
            sum(losses).backward()
            model.zero_grad()
            del losses
        moved[save] = state.report()["offload"]["bytes_out"]
    return moved


def ignore_set() -> None:
    """`set_` gives a tensor other memory and touches none; the sanitizer takes it for a write of all of it."""
    from torch.cuda import _sanitizer

    mode = _sanitizer.CUDASanitizerDispatchMode
    watch = mode.__torch_dispatch__

    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::set_":
            return func(*args, **(kwargs or {}))
        return watch(self, func, types, args, kwargs)

    mode.__torch_dispatch__ = dispatch


def drop_waits() -> None:
    """Let no stream wait for another."""
    streams.Accelerator.wait = lambda *args, **kwargs: None


def sanitize(seconds: float = 240) -> dict[str, Any]:
    """Run this file under the sanitizer, as it is and without waits.

    Returns:
        `status`: why there was nothing to run, or what went wrong, else empty; `bytes_out` as `run` gives it; `is_clean`:
        no race was found; `finds_dropped_waits`.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or device.type != KIND:
        return {"status": f"torch has no sanitizer for {device.type if device else 'a machine without accelerator'}"}
    as_it_is, dropped = (_child(flags, seconds) for flags in ((), ("--drop-waits",)))
    is_clean = as_it_is["code"] == 0 and not as_it_is["races"]
    failed = "" if is_clean or as_it_is["races"] else f"ended with {as_it_is['code']}: {as_it_is['error'][-400:]}"
    return {
        "status": failed,
        "is_clean": is_clean and all(as_it_is["bytes_out"].get(save) for save in SAVES),
        "bytes_out": as_it_is["bytes_out"],
        "finds_dropped_waits": dropped["races"] > 0,
        "output": as_it_is["error"][-4000:] if not is_clean else "",
    }


def _child(flags: Sequence[str], seconds: float) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TORCH_CUDA_SANITIZER": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(Path(__file__).resolve()), *flags]
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"code": None, "races": 0, "error": f"not over after {seconds:.0f} s", "bytes_out": {}}
    return read_end(ended.returncode, ended.stdout, ended.stderr)


def read_end(code: int, output: str, error: str) -> dict[str, Any]:
    """What a process that ran this file said: its last line of output is the JSON that `main` prints."""
    lines = output.strip().splitlines()
    try:
        moved = json.loads(lines[-1]) if lines and code == 0 else {}
    except json.JSONDecodeError:
        moved = {}
    return {"code": code, "races": error.count(_RACE), "error": error, "bytes_out": moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drop-waits", action="store_true", help="leave out what the sanitizer is to miss")
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator()
    if device is None or not torch.accelerator.is_available():
        sys.exit("there is no accelerator")
    make_up_for_older_torch()
    if device.type == KIND:
        ignore_set()
    if options.drop_waits:
        drop_waits()
    moved = run(device)
    torch.accelerator.synchronize()
    print(json.dumps(moved))


if __name__ == "__main__":
    main()
