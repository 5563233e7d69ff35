"""A call of a block that is made again: what it tells, and that nothing of it stays."""

import random

import numpy
import pytest
import torch
from tiny_models import HIDDEN, PlainBlock, ResidualBlock
from torch import nn
from torch.utils.checkpoint import checkpoint

from ckpt_trainer.memory import LiveBytes
from ckpt_trainer.probes import CallNotes, probe


def plainly(forward, args, kwargs):
    return forward(*args, **kwargs)


def replayed(forward, args, kwargs):
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def noted(module, *args, **kwargs):
    with CallNotes({"block": module}) as notes:
        module(*args, **kwargs)
    return notes.calls["block"]


class Squares(nn.Module):
    """Stores its input and one result of the same size."""

    def __init__(self, width=1000):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return (x * self.weight) ** 2


def test_bytes_are_exact():
    x = torch.ones(1000, requires_grad=True)
    found = probe(noted(block := Squares(), x), plainly, block.forward)
    # The input and the product; the output goes to whoever comes after.
    assert found.stored == 2 * 4000
    assert found.forward == 2 * 4000
    assert found.backward >= found.stored + 4000
    lean = probe(noted(block, x), replayed, block.forward)
    assert lean.stored == 4000
    assert lean.backward > found.stored
    assert sum(lean.work.values()) > sum(found.work.values())


def test_the_arguments_are_those_of_the_step_and_without_their_graph():
    block, seen = PlainBlock(0.0), []
    x = torch.ones(2, 3, HIDDEN, requires_grad=True) * 2
    frozen = torch.ones(2, 3, HIDDEN)
    call = noted(block, x, scale=0.25)
    assert call.args[0].grad_fn is None
    assert call.args[0].requires_grad
    assert call.args[0].data_ptr() == x.data_ptr()
    assert call.kwargs == {"scale": 0.25}
    assert not noted(block, frozen).args[0].requires_grad
    probe(call, lambda forward, args, kwargs: seen.append(args[0]) or forward(*args, **kwargs), block.forward)
    assert torch.equal(seen[0], x)
    assert call.device == torch.device("cpu")


def test_calls_are_counted_and_only_those_with_gradients():
    block = PlainBlock(0.0)
    with CallNotes({"block": block}) as notes:
        for _ in range(3):
            block(torch.ones(2, 3, HIDDEN))
        with torch.no_grad():
            block(torch.ones(9, 3, HIDDEN))
    block(torch.ones(2, 3, HIDDEN))
    assert notes.calls["block"].times == 3
    assert not block._forward_pre_hooks
    with CallNotes({"block": block}) as notes, torch.no_grad():
        block(torch.ones(2, 3, HIDDEN))
    assert notes.calls == {}


def test_what_needs_no_graph():
    block = PlainBlock(0.0).requires_grad_(False)
    assert not noted(block, torch.ones(2, 3, HIDDEN)).needs_graph
    assert noted(block, torch.ones(2, 3, HIDDEN, requires_grad=True)).needs_graph
    assert noted(PlainBlock(0.0), torch.ones(2, 3, HIDDEN)).needs_graph


def test_autocast_is_as_it_was():
    block, seen = nn.Linear(4, 4), []
    x = torch.ones(2, 4)
    block.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        call = noted(block, x)
    assert call.autocast == {"cpu": torch.bfloat16}
    probe(call, plainly, block.__call__)
    plain = noted(block, x)
    assert plain.autocast == {}
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        probe(plain, plainly, block.__call__)
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("run", [plainly, replayed])
def test_nothing_of_it_stays(run):
    torch.manual_seed(0)
    block = ResidualBlock(4, 4, 0.5).train()
    theirs = dict(block.norm1.named_buffers())
    call = noted(block, torch.randn(2, 4, 5, 5, requires_grad=True))
    values = {key: value.clone() for key, value in block.state_dict().items()}
    state, python, numbers = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()

    def drawing(forward, args, kwargs):
        random.random()
        numpy.random.rand(1000)
        return run(forward, args, kwargs)

    with LiveBytes() as live:
        found = probe(call, drawing, block.forward)
        assert live.current == 0
    assert found.backward > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert numpy.array_equal(numpy.random.get_state()[1], numbers)
    assert all(parameter.grad is None for parameter in block.parameters())
    assert call.args[0].grad is None
    assert all(block.norm1.get_buffer(key) is value for key, value in theirs.items())
    assert all(torch.equal(value, block.state_dict()[key]) for key, value in values.items())


def test_nothing_stays_after_a_failure():
    block = ResidualBlock(4, 4, 0.5).train()
    call = noted(block, torch.randn(2, 4, 5, 5, requires_grad=True))
    mean, state = block.norm1.running_mean.clone(), torch.get_rng_state()

    def failing(forward, args, kwargs):
        forward(*args, **kwargs)
        raise KeyError("no")

    with pytest.raises(KeyError):
        probe(call, failing, block.forward)
    assert torch.equal(block.norm1.running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x.mul_(2) * self.weight


def test_a_block_may_write_to_its_input():
    block = InPlace()
    x = torch.ones(2, 4, requires_grad=True) * 1
    call = noted(block, x.clone())
    before = call.args[0].clone()
    probe(call, plainly, block.forward)
    assert torch.equal(call.args[0], before)


def test_gradients_are_asked_for_and_not_accumulated():
    block, seen = PlainBlock(0.0), []
    for parameter in block.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter))
    probe(noted(block, torch.ones(2, 3, HIDDEN, requires_grad=True)), plainly, block.forward)
    assert seen == []
    assert all(parameter.grad is None for parameter in block.parameters())
