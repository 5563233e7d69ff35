"""Mode offload where parameters are sharded: FSDP2 frees and fills the memory of weights around each block."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from fake_device import FakeStreams
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ckpt_trainer import checkpointing, groups, streams

pytestmark = pytest.mark.distributed

WIDTH = 32
NUM_PROCESSES = 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden, scale):
        inner = torch.nn.functional.gelu(self.up(self.norm(hidden)))
        return hidden + torch.nn.functional.dropout(self.down(inner), 0.1) * scale


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, hidden):
        for block in self.blocks:
            hidden = block(hidden, scale=torch.full((8, WIDTH), 0.5))
        return self.head(hidden).square().mean()


def sharded(dtype):
    torch.manual_seed(0)
    model = Model()
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype)}
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def gradients(model, rank, **flags):
    """Local gradients of two steps, each of two forwards before one backward."""
    hidden = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(rank))
    found = []
    torch.manual_seed(rank)
    with checkpointing(model, **flags) as state:
        for _ in range(2):
            model.zero_grad()
            (model(hidden) + model(hidden.flip(0))).backward()
            found += [parameter.grad.to_local().clone() for parameter in model.parameters()]
        return found, state.report()["offload"]


def run(rank, folder):
    os.environ["LOCAL_WORLD_SIZE"] = str(NUM_PROCESSES)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_PROCESSES)
    groups.MIN_BYTES = 16
    for dtype in (None, torch.bfloat16):
        model = sharded(dtype)
        expected, _ = gradients(model, rank, mode="none")
        for save in ("inputs", "attention", "matmul", "expensive", "all"):
            fake = FakeStreams("lazy")
            streams.streams_of = fake.streams_of
            found, report = gradients(model, rank, mode="offload", offload_save=save, host_budget="4MiB")
            assert all(map(torch.equal, found, expected)), (dtype, save)
            assert report["copies_out"] > 0, (dtype, save)
            assert fake.device_bytes == 0, (dtype, save)
    dist.destroy_process_group()


def test_gradients_of_sharded_models_are_those_without_offload(tmp_path):
    torch.multiprocessing.spawn(run, args=(tmp_path,), nprocs=NUM_PROCESSES)
