"""Offload to disk through the engine: gradients are those of mode `full` or there is an error; nothing is left behind."""

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fake_device import HOST, TIMINGS
from test_offload_schedules import (
    Boom,
    Device,
    Training,
    accumulation,
    assert_same,
    dropped_graph,
    early_stop,
    exception_in_backward,
    exception_in_forward,
    expected,
    gradients,
    in_reverse,
    interleaved,
    last_parameter,
    no_grad_between,
    plain_step,
    retain_graph,
    two_forwards,
)  # fmt: skip
from tiny_models import CASES

import ckpt_trainer
from ckpt_trainer import host_store, install
from ckpt_trainer.disk import DiskFile
from ckpt_trainer.loop import checkpointing

UNIT = 4096  # of host memory, which is what a block's inputs take
TIMEOUT = 60
SAVES = ("inputs", "attention", "expensive", "all")


def until(condition):
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def descriptors(folder):
    """Open files of this process that lie in a folder, with or without a name."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith(f"{folder}/"):
            found.append(int(name))
    return found


class Disk(Device):
    """The fake device with a disk, whose threads are seen by the race detector as a part of the host.

    Attributes:
        folder: Of the files.
        files: Those that were made.
    """

    def __init__(self, patch, folder):
        super().__init__(patch)
        self.folder, self.files = folder, []
        disk = self

        class Watched(DiskFile):
            def __init__(self, folder):
                super().__init__(folder)
                disk.files.append(self)

            def write(self, pieces, before, then):
                def begin():
                    before()
                    disk.touch(pieces, "read by the disk", writes=False)

                def end(error):
                    disk.touch(pieces, "read by the disk until now", writes=False)
                    then(error)

                return super().write(pieces, begin, end)

            def read(self, ticket, pieces, then):
                def end(error):
                    disk.touch(pieces, "written by the disk until now", writes=True)
                    then(error)

                disk.touch(pieces, "written by the disk", writes=True)
                super().read(ticket, pieces, end)

        patch.setattr(host_store, "DiskFile", Watched)

    def touch(self, pieces, text, writes):
        with self.fake._lock:
            for tensor in pieces.tensors:
                memory = self.fake._memory_of(tensor)
                self.fake._access(memory, HOST, tensor.storage_offset(), tensor.numel(), writes, f"{memory} is {text}")

    def start(self, timing="lazy", seed=0, **options):
        self.files.clear()
        return super().start(timing, seed, **options)

    def flags(self, units, save="inputs", **others):
        to = {"mode": "offload", "offload_save": save, "offload_to": "disk", "offload_dir": str(self.folder)}
        return {**to, "host_budget": units * UNIT, **others}

    def assert_clean(self, training):
        # The writer may still have what is gone.
        until(lambda: all(pool.in_use == 0 for pool in self.pools))
        super().assert_clean(training)
        assert [pool.held <= pool.cap for pool in self.pools] == [True] * len(self.pools)
        assert os.listdir(self.folder) == []
        for file in self.files:
            until(lambda file=file: free_bytes(file) == file._work.file._extents.length)


def free_bytes(file):
    file = file._work.file
    return sum(length for _, length in tuple(file.returned)) + file._extents.free


@pytest.fixture
def disk(monkeypatch, tmp_path):
    return Disk(monkeypatch, tmp_path)


@pytest.fixture
def on_proc():
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc")


def first_of_two(training):
    """The first graph is used first, which is on disk by then."""
    first, second = training.loss(0), training.loss(1)
    first.backward()
    second.backward()


SCHEDULES = (
    plain_step, accumulation, two_forwards, interleaved, in_reverse, first_of_two, retain_graph, dropped_graph,
    no_grad_between, exception_in_forward, exception_in_backward, early_stop,
)  # fmt: skip


# What is stored besides the inputs takes more memory, and more time.
SETUPS = {
    True: (("lazy", 1), ("random", 2), ("eager", 3), ("random", 5)),
    False: (("lazy", 2), ("random", 8)),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.__name__)
@pytest.mark.parametrize("save", SAVES)
def test_gradients_of_each_schedule(disk, save, schedule):
    for seed, (timing, units) in enumerate(SETUPS[save == "inputs"]):
        disk.start(timing, seed)
        got = gradients("llama", schedule, between=disk.assert_clean, **disk.flags(units, save))
        assert_same(got, expected("llama", schedule))
        assert disk.fake.host_bytes <= units * UNIT
        assert disk.fake.num_copies("out") > 0


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", ["bert", "t5", "plain_transformer"])
def test_gradients_of_other_models(disk, name, save):
    for timing, units, schedule in (("lazy", 2, retain_graph), ("random", 5, first_of_two)):
        disk.start(timing)
        got = gradients(name, schedule, between=disk.assert_clean, **disk.flags(units, save))
        assert_same(got, expected(name, schedule))


@pytest.mark.parametrize("prefetch", [0, 2, 100])
def test_any_prefetch_is_exact(disk, prefetch):
    for schedule in (plain_step, first_of_two, retain_graph):
        disk.start("lazy")
        flags = disk.flags(3, prefetch=prefetch)
        assert_same(gradients("llama", schedule, between=disk.assert_clean, **flags), expected("llama", schedule))


def test_nothing_new_is_taken_after_the_first_step(disk):
    sizes = []

    def between(training):
        disk.assert_clean(training)
        sizes.append(([pool.slabs for pool in disk.pools], [file._work.file._extents.length for file in disk.files]))

    disk.start("random")
    got = gradients("llama", plain_step, 2, between, **disk.flags(2))
    assert_same(got, expected("llama", plain_step, 2))
    assert sizes[0][0] == sizes[1][0]
    assert len(disk.pools) == len(disk.files) == 1
    assert sizes[0] == sizes[1]


def report_of(disk, schedule, units, name="plain_transformer", **others):
    training = Training(name)
    with checkpointing(training.model, **disk.flags(units, **others)) as state:
        schedule(training)
        training.collect()
        disk.assert_clean(training)
        return state.report()["offload"], training.results


@pytest.mark.parametrize("timing", TIMINGS)
def test_counts_of_a_plain_step(disk, timing):
    nbytes = 2 * 12 * 32 * 4
    disk.start(timing)
    number = len(Training("plain_transformer").blocks)
    report, _ = report_of(disk, plain_step, units=1)
    # All inputs but the last go through the only unit of memory, and all are written at once.
    assert report["copies_out"] == number - 1
    assert report["disk"]["bytes_written"] == (number - 1) * nbytes
    # The last of them is still there when backward asks for it.
    assert report["disk"]["bytes_read"] == (number - 2) * nbytes
    assert report["disk"]["waited_seconds"] > 0
    assert report["host_held_bytes"] == report["host_peak_bytes"] == UNIT
    assert report["kept"] == {}


def test_counts_where_memory_suffices(disk):
    disk.start("lazy")
    report, _ = report_of(disk, plain_step, units=64)
    assert report["disk"] == {"bytes_written": 0, "bytes_read": 0, "waited_seconds": 0}
    assert report["copies_out"] > 0
    assert [file._work._threads for file in disk.files] == [{}]


def test_there_is_no_disk_in_a_report_without_one(disk):
    disk.start("lazy")
    report, _ = report_of(disk, plain_step, units=2, offload_to="host", offload_dir=None)
    assert "disk" not in report


def test_no_memory_at_all_leaves_everything_on_the_device(disk):
    disk.start("lazy")
    report, results = report_of(disk, plain_step, units=0)
    assert_same(results, expected("plain_transformer", plain_step))
    assert report["copies_out"] == report["disk"]["bytes_written"] == 0
    assert "host budget reached" in report["kept"]


def test_host_memory_that_the_system_refuses(disk):
    for limit in (0, UNIT, 2 * UNIT):
        disk.start("lazy", host_limit=limit)
        got = gradients("llama", retain_graph, between=disk.assert_clean, **disk.flags(3))
        assert_same(got, expected("llama", retain_graph))
        assert disk.fake.host_bytes <= limit


PLANS = (
    ("recompute@host", "recompute@disk", "keep@disk", "selective:attention@host"),
    ("keep@host", "selective:expensive@disk", "recompute@host", "recompute@disk"),
    ("recompute@disk", "keep", "keep@host", "selective:attention@disk"),
)


@pytest.mark.parametrize("actions", PLANS, ids=lambda actions: actions[0])
@pytest.mark.parametrize("schedule", [plain_step, first_of_two, retain_graph], ids=lambda one: one.__name__)
def test_host_and_disk_in_one_plan(disk, schedule, actions):
    written = []
    for timing, units in (("lazy", 2), ("random", 5), ("lazy", 60)):
        training = Training("llama")
        names = iter(actions * len(training.blocks))
        disk.start(timing)
        policy = {"policy": lambda block, names=names: next(names), "offload_dir": str(disk.folder)}
        with checkpointing(training.model, **policy, host_budget=units * UNIT) as state:
            schedule(training)
            training.collect()
            disk.assert_clean(training)
        assert {name.rpartition("@")[2] for name in actions} >= {"host", "disk"}
        assert_same(training.results, expected("llama", schedule))
        written.append(state.report()["offload"]["disk"]["bytes_written"])
    assert any(written)


def test_a_backward_beside_a_forward(disk):
    """Two threads of one model: one packs, the other unpacks."""
    model, batch = CASES["plain_transformer"].build(dropout=0.0), CASES["plain_transformer"].batch()
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(model(**batch)["loss"], parameters)
    for seed in range(4):
        disk.start("random", seed)
        got = []

        def back(loss, got=got):
            got.append(torch.autograd.grad(loss, parameters))

        with checkpointing(model, **disk.flags(3, "all")):
            loss = model(**batch)["loss"]
            for _ in range(4):
                backward = threading.Thread(target=back, args=(loss,))
                backward.start()
                loss = model(**batch)["loss"]
                backward.join(TIMEOUT)
                assert not backward.is_alive()
            del loss, backward
        assert len(got) == 4
        for gradient in got:
            assert_same(gradient, wanted)
        assert disk.fake.races == []
        until(lambda: all(pool.in_use == 0 for pool in disk.pools))


# --- what goes wrong ----------------------------------------------------------------------------------------------------


class Failing:
    """A call of `os` of which all after so many fail, or only the next."""

    def __init__(self, patch, name, after, error, times=1000):
        self.real, self.left, self.error, self.times = getattr(os, name), after, error, times
        patch.setattr(os, name, self)

    def __call__(self, *args):
        if self.left <= 0 and self.times > 0:
            self.times -= 1
            raise OSError(self.error, os.strerror(self.error))
        self.left -= 1
        return self.real(*args)


def outcome(disk, schedule, units, save="inputs", failing=None):
    """Gradients of a step, or the error that it raised, after which nothing fails; in the end nothing is left."""
    name = "llama"
    training = Training(name)
    with checkpointing(training.model, **disk.flags(units, save)):
        try:
            schedule(training)
        except (OSError, RuntimeError) as error:
            problem = type(error)(*error.args)  # without the frames, which have the graph
            failing.times = 0
            training.model.zero_grad()
        else:
            problem = None
            training.collect()
        disk.assert_clean(training)
        if isinstance(problem, RuntimeError):
            return problem
        # The next step is right, whatever happened.
        results = training.results
        if problem is not None:
            training.results = []
            plain_step(training)
            training.collect()
            assert_same(training.results, expected(name, plain_step))
        return problem or results


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("schedule", [plain_step, first_of_two, retain_graph], ids=lambda one: one.__name__)
@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fdatasync"])
def test_a_disk_that_gets_full(disk, monkeypatch, caplog, call, schedule, save):
    kinds = set()
    for units in (2, 5):
        for after in (0, 3):
            disk.start("lazy")
            caplog.clear()
            with monkeypatch.context() as patch:
                failing = Failing(patch, call, after, errno.ENOSPC)
                found = outcome(disk, schedule, units, save, failing)
                failed = failing.times < 1000
            if isinstance(found, RuntimeError):
                assert "No space left on device" in str(found)
                assert "Raise checkpointing_host_budget" in str(found)
            else:
                assert_same(found, expected("llama", schedule))
            kinds.add((failed, isinstance(found, RuntimeError)))
            assert sum("could not be written" in record.message for record in caplog.records) == failed
    assert (True, True) in kinds
    assert (False, True) not in kinds


def test_a_disk_that_is_full_while_memory_suffices_is_only_said(disk, monkeypatch, caplog):
    Failing(monkeypatch, "pwrite", 0, errno.ENOSPC)
    number = len(Training("plain_transformer").blocks) - 1
    for units in range(number, 2 * number - 1):
        disk.start("lazy")
        caplog.clear()
        report, results = report_of(disk, plain_step, units=units)
        assert_same(results, expected("plain_transformer", plain_step))
        assert (report["disk"]["bytes_written"], report["disk"]["bytes_read"], report["kept"]) == (0, 0, {})
        said = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(said) == 1
        assert "No space left on device" in said[0]
        assert "Nothing is lost" in said[0]


@pytest.mark.parametrize("prefetch", [0, 1])
def test_graphs_before_the_disk_was_full_are_whole(disk, monkeypatch, prefetch):
    """A forward that cannot go on takes nothing from the one before it."""
    disk.start("lazy")
    training = Training("llama")
    with checkpointing(training.model, **disk.flags(4, prefetch=prefetch)):
        loss = training.loss(0)
        with monkeypatch.context() as patch:
            Failing(patch, "pwrite", 0, errno.ENOSPC)
            with pytest.raises(RuntimeError, match="No space left on device"):
                training.loss(1), training.loss(2)
        gc.collect()  # what the error holds of the forward that failed
        loss.backward()
        training.collect()
        del loss
        disk.assert_clean(training)
    assert_same(training.results, expected("llama", plain_step))


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("schedule", [plain_step, first_of_two, retain_graph], ids=lambda one: one.__name__)
def test_reads_that_fail(disk, monkeypatch, schedule, save):
    if not hasattr(os, "preadv"):
        pytest.skip("no preadv")
    kinds = set()
    for after, times in ((0, 1000), (1, 1), (1, 1000), (1000, 0)):
        disk.start("lazy")
        with monkeypatch.context() as patch:
            failing = Failing(patch, "preadv", after, errno.EIO, times)
            found = outcome(disk, schedule, 2, save, failing)
        if isinstance(found, OSError):
            assert "could not be read back from a file in" in str(found)
            assert str(disk.folder) in str(found)
        else:
            assert_same(found, expected("llama", schedule))
        kinds.add(type(found))
    assert kinds == {list, OSError}


def test_a_graph_whose_backward_could_not_read_may_be_run_again(disk, monkeypatch):
    disk.start("lazy")
    training = Training("llama")
    with checkpointing(training.model, **disk.flags(1)):
        loss = training.loss(0)
        for after in (0, 1):
            with monkeypatch.context() as patch:
                Failing(patch, "preadv", after, errno.EIO)
                with pytest.raises(OSError, match="could not be read back"):
                    loss.backward(retain_graph=True)
            training.model.zero_grad()
        loss.backward()
        training.collect()
        del loss
        disk.assert_clean(training)
    assert_same(training.results, expected("llama", plain_step))


def damaged(disk, damage):
    """What a backward gives after something happened to the file: gradients, or an error."""
    training = Training("llama")
    with checkpointing(training.model, **disk.flags(1)) as state:
        loss = training.loss(0)
        # Three inputs of 3072 bytes each are written; the first two are to be read.
        until(lambda: state.report()["offload"]["disk"]["bytes_written"] == 3 * 3072)
        (descriptor,) = descriptors(disk.folder)
        damage(descriptor)
        try:
            loss.backward()
        except OSError as error:
            training.model.zero_grad()
            found = OSError(*error.args)
        else:
            training.collect()
            found = training.results
        del loss
        disk.assert_clean(training)
        return found


@pytest.mark.parametrize("length", [0, 1, UNIT - 1025, UNIT - 1, UNIT, UNIT + 1, 2 * UNIT, 2**20])
def test_a_truncated_file_gives_an_error_or_the_same(disk, on_proc, length):
    disk.start("lazy")
    found = damaged(disk, lambda descriptor: os.truncate(f"/proc/self/fd/{descriptor}", length))
    assert isinstance(found, OSError) == (length < UNIT + 3072)
    if not isinstance(found, OSError):
        assert_same(found, expected("llama", plain_step))
    else:
        assert "could not be read back" in str(found)
        assert "it ends at byte" in str(found)


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_gives_an_error_or_the_same(disk, on_proc, seed):
    position, generator = random.Random(seed).randrange(2 * UNIT), random.Random(seed)

    def damage(descriptor):
        (byte,) = os.pread(descriptor, 1, position)
        os.pwrite(descriptor, bytes([byte ^ (1 << generator.randrange(8))]), position)

    disk.start("lazy")
    found = damaged(disk, damage)
    if position % UNIT < 3072:
        assert "it holds other bytes than were written" in str(found)
    else:  # nobody's byte
        assert_same(found, expected("llama", plain_step))


def test_an_error_of_the_model_leaves_nothing(disk):
    disk.start("lazy")
    training = Training("llama")
    hook = training.blocks[-1].register_forward_pre_hook(boom)
    with checkpointing(training.model, **disk.flags(1)):
        with pytest.raises(Boom):
            training.loss(0)
        disk.assert_clean(training)
        hook.remove()
        training.results += torch.autograd.grad(training.loss(0), last_parameter(training))
        disk.assert_clean(training)


def boom(*args):
    raise Boom


def test_threads_and_file_end_with_the_engine(disk, on_proc):
    disk.start("lazy")
    before = threading.enumerate()
    assert_same(gradients("llama", plain_step, **disk.flags(1)), expected("llama", plain_step))
    assert len(disk.files) == 1
    disk.files.clear()
    gc.collect()
    threads = [thread for thread in threading.enumerate() if thread not in before]
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert descriptors(disk.folder) == []


def test_a_folder_is_asked_for(tmp_path):
    model = CASES["plain_transformer"].build()
    with pytest.raises(ValueError, match="checkpointing_offload_dir"):
        with checkpointing(model, mode="offload", offload_to="disk"):
            pass
    with pytest.raises(ValueError, match="missing"):
        with checkpointing(model, mode="offload", offload_to="disk", offload_dir=str(tmp_path / "missing")):
            pass


CHILD = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
from fake_device import FakeStreams
from tiny_models import CASES
from ckpt_trainer import groups, streams
from ckpt_trainer.loop import checkpointing
fake = FakeStreams("eager")
streams.streams_of, groups.MIN_BYTES = fake.streams_of, 0
model, batch = CASES["plain_transformer"].build(), CASES["plain_transformer"].batch()
flags = dict(mode="offload", offload_to="disk", offload_dir=sys.argv[1], host_budget=4096)
with checkpointing(model, **flags) as state:
    for step in range(1000000):
        loss = model(**batch)["loss"]
        if step == 2:
            print(state.report()["offload"]["disk"]["bytes_written"] > 0, flush=True)
        loss.backward()
"""


@pytest.mark.distributed
def test_a_killed_process_leaves_nothing(tmp_path):
    paths = [str(Path(__file__).parent), str(Path(ckpt_trainer.__file__).parent.parent)]
    out = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), *paths], **out) as child:
        try:
            assert child.stdout.readline() == "True\n"
            assert os.listdir(tmp_path) == []
            if Path(f"/proc/{child.pid}/fd").is_dir():
                links = [os.readlink(path) for path in Path(f"/proc/{child.pid}/fd").iterdir() if path.is_symlink()]
                assert sum(link.startswith(f"{tmp_path}/") for link in links) == 1
        finally:
            child.send_signal(signal.SIGKILL)
        assert child.wait(TIMEOUT) == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_the_engine_asks_for_the_folder_of_the_flag(disk):
    disk.start("lazy")
    with checkpointing(CASES["plain_transformer"].build(), **disk.flags(1)) as state:
        offloading = install.offloading_of(state.settings)
    assert offloading._folder == str(disk.folder)
