"""Two processes of which one or both run out of memory: rescued where no collective is repeated, else a clear end."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from trainer_runs import HERE, NUM_PROCESSES, assert_same

pytestmark = pytest.mark.distributed

SECONDS_AT_MOST = 200


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rescue")
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}"]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, *torchrun, str(HERE / "train_rescue.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=SECONDS_AT_MOST,
    )
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(NUM_PROCESSES)]
    texts = {path.stem: path.read_text() for path in folder.glob("*.txt")}
    return SimpleNamespace(found=found, texts=texts, done=done, seconds=time.monotonic() - begun)


@pytest.fixture
def named(started):
    return lambda name: [found[name] for found in started.found]


def rescues(found):
    return [text for text in found["lines"] if "ran out of memory" in text]


@pytest.mark.parametrize("key", ["", ", unused looked for"])
def test_forward_is_run_again_on_the_rank_that_failed(named, key):
    found = named(f"forward{key}")
    assert_same(found, named(f"plain{key}"))
    # Three failures of each of four.
    assert [len(rescues(one)) for one in found] == [0, 12]
    assert rescues(found[1])[0].startswith("step 1 on rank 1 of 2: micro-batch 1 ran out of memory in forward;")


def test_a_window_is_run_again_where_gradients_are_not_averaged_yet(named):
    found = named("accumulated")
    assert_same(found, named("plain, accumulated"))
    assert [len(rescues(one)) for one in found] == [3, 3]
    assert "micro-batch 1 ran out of memory in backward;" in rescues(found[1])[0]
    assert "all 2 since the last step were run again" in rescues(found[0])[0]


def test_buffers_that_the_first_rank_sends_are_those_that_were_sent(named):
    assert_same(named("buffers"), named("plain, buffers"))
    assert [len(rescues(one)) for one in named("buffers")] == [0, 3]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("awaited", "DDP waits for its gradients, and would average those of the micro-batches before it instead"),
        ("gathered before", "a collective has run, which the other ranks do not run twice"),
    ],
)
def test_what_ran_collectives_is_not_run_again(named, name, why):
    for rank, found in enumerate(named(name)):
        assert found["error"].startswith("OutOfMemory: step "), found
        assert f"on rank {rank} of 2: forward ran out of memory. It was not run again, since {why}" in found["error"]


def test_backward_ends_all_ranks(started):
    assert started.done.returncode != 0
    assert started.seconds < SECONDS_AT_MOST
    # The other waits for an average that does not come; it is ended by the launcher, or told that its peer is gone.
    assert not started.texts.get("0", "").startswith("OutOfMemory")
    assert started.texts["1"].startswith(
        "OutOfMemory: step 2 on rank 1 of 2: backward ran out of memory. It was not run again, since in backward DDP "
        "averages gradients over all ranks"
    )
