"""A small Llama on the accelerator, kernels that repeat their bits, and gradients under a plan."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers

from ckpt_trainer import checkpointing

# Read when the first matrix product runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = torch.accelerator.current_accelerator(check_available=True)
needs_device = pytest.mark.skipif(
    DEVICE is None or DEVICE.type == "mps", reason="needs an accelerator with memory of its own"
)
if DEVICE is not None:
    DEVICE = torch.device(DEVICE.type, torch.accelerator.current_device_index())
    # The machine with the device may have an older torch than the rest of the tests.
    benchmarks = Path(__file__).parents[2] / "examples" / "benchmarks"
    sys.path[:0] = [str(benchmarks), str(benchmarks.parent)]
    from older_torch import make_up_for_older_torch

    make_up_for_older_torch()


def llama(layers=4, hidden=64, dropout=0.0, dtype=torch.bfloat16, inner=None):
    """Heads of width 64, at least one of each kind. Dropout is in its attention, so that any head does for its kernel."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=hidden, intermediate_size=inner or 2 * hidden, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), num_key_value_heads=max(1, hidden // 128), use_cache=False,
        attention_dropout=dropout, attn_implementation="eager" if dropout else "sdpa", max_position_embeddings=2**17,
    )  # fmt: skip
    with DEVICE:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def tokens(length=64, seed=0):
    ids = torch.randint(128, (1, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return {"input_ids": ids, "labels": ids}


def gradients(model, schedule, steps=1, **flags):
    """Those of a schedule, a function of a function that gives the loss of a micro-batch; and what the plan reports."""
    found = []

    def loss(number, length=64):
        torch.manual_seed(number)
        return model(**tokens(length, seed=number)).loss

    with checkpointing(model, **flags) as state:
        for _ in range(steps):
            model.zero_grad(set_to_none=True)
            schedule(loss)
            found += [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found, state.report()


def plain_step(loss):
    loss(0).backward()


def assert_same(mine, theirs):
    assert len(mine) == len(theirs) > 0
    assert all(torch.isfinite(gradient).all() for gradient in theirs)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


@pytest.fixture
def repeatable():
    """Kernels that give the same bits each time."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def allocated(which="current"):
    """Bytes that tensors on the device asked for, now or at the `peak`; allocators round what they give."""
    found = torch.accelerator.memory_stats(DEVICE)
    # Not every allocator counts what was asked for.
    return found.get(f"requested_bytes.all.{which}", found[f"allocated_bytes.all.{which}"])


@pytest.fixture
def empty_device():
    """Nothing of tests before is left on the device."""
    gc.collect()
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
