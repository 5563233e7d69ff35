"""Backward in a thread of its own, as autograd runs it for an accelerator: nothing may count on the thread of forward."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import CASES

from ckpt_trainer import checkpointing

MODES = (
    {"mode": "full"},
    {"mode": "full", "segment": 2},
    {"mode": "full", "use_reentrant": True},
    {"mode": "selective"},
    {"mode": "selective", "save": "matmul"},
    {"mode": "selective", "save": "attention"},
    {"mode": "auto", "budget": "20GiB"},
    {"mode": "auto", "budget": "1MiB"},
)


def train(case, backward, **flags):
    model = case.build()
    if hasattr(model, "config"):
        model.config.use_cache = False
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    torch.manual_seed(1)
    losses = []
    with checkpointing(model, **flags):
        for _ in range(4):
            loss = model(**case.batch())["loss"]
            backward(loss)
            losses.append(loss.detach().clone())
            optimizer.step()
            optimizer.zero_grad()
    return [*losses, *(value.detach() for value in model.state_dict().values())]


@pytest.mark.parametrize("flags", MODES, ids=str)
@pytest.mark.parametrize("name", ["plain_transformer", "gpt2", "residual_net", "bert"])
def test_bits_are_those_of_plain_training(name, flags):
    expected = train(CASES[name], torch.Tensor.backward, mode="none")
    with ThreadPoolExecutor(1) as other:
        found = train(CASES[name], lambda loss: other.submit(loss.backward).result(), **flags)
    assert all(torch.equal(one, another) for one, another in zip(found, expected, strict=True))
