"""The pool of host memory, and how much memory there is to take."""

import gc
import os
import random
import threading
from collections import deque
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_trainer import host_memory
from ckpt_trainer.host_memory import HostPool, available_bytes, host_cap, local_ranks

KIB, MIB, GIB = 2**10, 2**20, 2**30
UNIT = 4096


def pageable(nbytes):
    return torch.empty(nbytes, dtype=torch.uint8)


@pytest.fixture
def small_slabs(monkeypatch):
    """Slabs of 64 to 256 KiB, so that a test writes few bytes."""
    monkeypatch.setattr(host_memory, "_SMALLEST_SLAB", 64 * KIB)
    monkeypatch.setattr(host_memory, "_LARGEST_SLAB", 256 * KIB)


@pytest.fixture
def allocated():
    """An allocator that remembers the lengths it was asked for."""

    def allocate(nbytes):
        allocate.lengths.append(nbytes)
        return pageable(nbytes)

    allocate.lengths = []
    return allocate


def addresses(pieces):
    return [(tensor.data_ptr(), tensor.data_ptr() + tensor.numel()) for tensor in pieces.tensors]


def fill(pieces, seed):
    content = torch.randint(0, 256, (pieces.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    for tensor, part in zip(pieces.tensors, content.split([t.numel() for t in pieces.tensors]), strict=True):
        tensor.copy_(part)
    return content


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_nothing_is_allocated_before_it_is_needed(allocated):
    pool = HostPool(GIB, allocated)
    assert (pool.held, pool.slabs, pool.in_use, pool.peak, pool.refused, pool.cap) == (0, 0, 0, 0, None, GIB)
    assert allocated.lengths == []


@pytest.mark.parametrize("nbytes", [1, UNIT - 1, UNIT, UNIT + 1, 100_000, 3 * MIB + 5])
def test_pieces_are_as_long_as_asked(nbytes):
    pieces = HostPool(GIB, pageable).take(nbytes)
    assert sum(tensor.numel() for tensor in pieces.tensors) == pieces.nbytes == nbytes
    assert all(tensor.dtype == torch.uint8 and tensor.dim() == 1 and tensor.numel() for tensor in pieces.tensors)


def test_no_bytes_are_no_pieces():
    pool = HostPool(GIB, pageable)
    assert pool.take(0).tensors == ()
    assert pool.slabs == 0


def test_nothing_is_lost_to_rounding(allocated):
    # 100 tensors of a little more than a power of two: twice as much where each is rounded up.
    pool = HostPool(400 * MIB, allocated)
    taken = [pool.take(4 * MIB) for _ in range(100)]
    assert all(taken)
    assert pool.in_use == pool.held == 400 * MIB
    assert pool.take(1) is None
    assert all(length & (length - 1) == 0 for length in allocated.lengths)


def test_tensors_lie_across_slabs_without_a_gap(small_slabs, allocated):
    pool = HostPool(GIB, allocated)
    taken = [pool.take(40 * KIB) for _ in range(8)]
    assert pool.held == 512 * KIB
    assert allocated.lengths == [64 * KIB, 64 * KIB, 128 * KIB, 256 * KIB]
    assert [len(pieces.tensors) for pieces in taken] == [1, 2, 1, 2, 1, 1, 2, 1]


def test_slabs_are_powers_of_two_between_two_bounds(allocated):
    pool = HostPool(3 * GIB, allocated)
    taken = [pool.take(length) for length in (MIB, 100 * MIB, 10 * MIB, 600 * MIB, 700 * MIB)]
    assert all(taken)
    assert allocated.lengths == [64 * MIB, 64 * MIB, 512 * MIB, 512 * MIB, 512 * MIB]
    assert pool.slabs == 5


def test_a_tensor_larger_than_a_slab_gets_several_pieces(small_slabs):
    pool = HostPool(GIB, pageable)
    pieces = pool.take(MIB + 1)
    assert [tensor.numel() for tensor in pieces.tensors] == [256 * KIB] * 4 + [1]
    content = fill(pieces, 0)
    assert torch.equal(torch.cat(pieces.tensors), content)


@pytest.mark.parametrize("cap", [0, 1, UNIT, UNIT + 1, 3 * UNIT, 100 * KIB, 300 * KIB + 5, 1000 * KIB])
def test_the_cap_is_filled_and_never_exceeded(small_slabs, allocated, cap):
    pool = HostPool(cap, allocated)
    taken = []
    while (pieces := pool.take(UNIT)) is not None:
        taken.append(pieces)
        assert pool.held <= cap
    assert len(taken) == cap // UNIT
    assert sum(allocated.lengths) == pool.held == cap // UNIT * UNIT
    assert pool.refused is None


def test_what_does_not_fit_the_cap_allocates_nothing(small_slabs, allocated):
    pool = HostPool(200 * KIB, allocated)
    assert pool.take(201 * KIB) is None
    assert allocated.lengths == []
    kept = pool.take(100 * KIB)
    slabs = pool.slabs
    assert pool.take(101 * KIB) is None
    assert pool.slabs == slabs
    assert pool.in_use == kept.nbytes
    assert pool.take(100 * KIB) is not None


def test_the_last_slab_is_the_largest_that_fits(allocated):
    pool = HostPool(100 * MIB, allocated)
    first = pool.take(60 * MIB)
    second = pool.take(30 * MIB)
    assert first
    assert second
    assert allocated.lengths == [64 * MIB, 32 * MIB]


def test_fragments_are_used_before_memory_is_allocated(small_slabs):
    pool = HostPool(GIB, pageable)
    taken = [pool.take(16 * KIB) for _ in range(8)]
    slabs, held = pool.slabs, pool.held
    for pieces in taken[::2]:
        pieces.give_back()
    scattered = pool.take(64 * KIB)
    assert len(scattered.tensors) == 4
    assert (pool.slabs, pool.held, pool.in_use) == (slabs, held, held)
    content = fill(scattered, 1)
    assert torch.equal(torch.cat(scattered.tensors), content)


def test_the_free_part_that_fits_best_is_taken(small_slabs):
    pool = HostPool(64 * KIB, pageable)
    a, b, c = pool.take(24 * KIB), pool.take(8 * KIB), pool.take(12 * KIB)
    place = addresses(c)
    a.give_back()
    c.give_back()
    d = pool.take(24 * KIB)  # a's, exactly
    e = pool.take(12 * KIB)
    assert addresses(e) == place
    assert [len(pieces.tensors) for pieces in (b, d, e)] == [1, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_steps_in_another_order_need_no_new_slabs(small_slabs, seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 90 * KIB) for _ in range(40)]
    pool = HostPool(GIB, pageable)
    held = {length: pool.take(length) for length in lengths}
    slabs, peak = pool.slabs, pool.peak
    held.clear()
    for _ in range(20):
        rng.shuffle(lengths)
        live = []
        for length in lengths:
            live.append(pool.take(length))
            if rng.random() < 0.2:
                live.pop(rng.randrange(len(live))).give_back()
        assert all(live)
    live.clear()
    assert (pool.slabs, pool.peak, pool.in_use) == (slabs, peak, 0)


@pytest.mark.parametrize("seed", range(10))
def test_random_use_never_overlaps_and_keeps_what_is_written(small_slabs, seed):
    rng = random.Random(seed)
    cap = rng.choice([100 * KIB, 500 * KIB, 2 * MIB])
    pool, live, most = HostPool(cap, pageable), [], 0
    for step in range(300):
        if live and rng.random() < 0.5:
            pieces, content = live.pop(rng.randrange(len(live)))
            assert torch.equal(torch.cat(pieces.tensors), content)
            if rng.random() < 0.5:
                pieces.give_back()
            del pieces
        else:
            nbytes = rng.choice([rng.randint(1, 5000), rng.randint(1, 200 * KIB)])
            units = -(-nbytes // UNIT) * UNIT
            room = pool.in_use + units <= cap // UNIT * UNIT
            pieces = pool.take(nbytes)
            assert (pieces is not None) == room
            if pieces:
                live.append((pieces, fill(pieces, step)))
        in_use = sum(-(-pieces.nbytes // UNIT) * UNIT for pieces, _ in live)
        most = max(most, in_use)
        assert (pool.in_use, pool.peak) == (in_use, most)
        assert pool.in_use <= pool.held <= cap
        spans = sorted(span for pieces, _ in live for span in addresses(pieces))
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert all(torch.equal(torch.cat(pieces.tensors), content) for pieces, content in live)


def test_a_refusal_is_remembered_and_what_is_held_is_still_used(small_slabs):
    asked = []

    def allocate(nbytes):
        asked.append(nbytes)
        if len(asked) > 1:
            raise RuntimeError("no more of it")
        return pageable(nbytes)

    pool = HostPool(GIB, allocate)
    first = pool.take(40 * KIB)
    assert pool.take(40 * KIB) is None
    assert pool.refused == "no more of it"
    assert pool.take(GIB - MIB) is None
    assert len(asked) == 2
    second = pool.take(24 * KIB)
    first.give_back()
    third = pool.take(40 * KIB)
    assert second
    assert third
    assert (pool.held, pool.slabs, pool.in_use) == (64 * KIB, 1, 64 * KIB)


def test_less_is_asked_for_where_much_is_refused(small_slabs):
    asked = []

    def allocate(nbytes):
        asked.append(nbytes)
        if nbytes > 128 * KIB:
            raise MemoryError
        return pageable(nbytes)

    pool = HostPool(GIB, allocate)
    assert pool.take(200 * KIB) is not None
    assert asked == [256 * KIB, 128 * KIB, 128 * KIB]
    assert pool.refused is None


def test_a_refusal_without_words_has_a_name(small_slabs):
    def allocate(nbytes):
        raise MemoryError

    pool = HostPool(GIB, allocate)
    assert pool.take(1) is None
    assert pool.refused == "MemoryError"


def test_pieces_go_back_once_and_when_they_are_collected():
    pool = HostPool(GIB, pageable)
    pieces = pool.take(MIB)
    pieces.give_back()
    assert pieces.tensors == ()
    other = pool.take(MIB)
    pieces.give_back()
    del pieces
    assert pool.in_use == MIB
    gc.disable()
    try:
        del other
        assert pool.in_use == 0
    finally:
        gc.enable()


def test_pieces_outlive_their_pool():
    pieces = HostPool(GIB, pageable).take(MIB)
    gc.collect()
    content = fill(pieces, 0)
    assert torch.equal(torch.cat(pieces.tensors), content)
    pieces.give_back()


def test_a_finaliser_may_give_back_in_the_middle_of_take(small_slabs):
    pool = None
    victims = deque()

    def allocate(nbytes):
        victims.popleft().give_back() if victims else None
        victims.clear()  # collected in the middle of take, on the same thread
        return pageable(nbytes)

    pool = HostPool(512 * KIB, allocate)
    victims.extend(pool.take(20 * KIB) for _ in range(3))
    taken = pool.take(60 * KIB)
    assert taken is not None
    assert pool.in_use == 60 * KIB
    spans = addresses(taken) + addresses(pool.take(60 * KIB))
    assert len({start for start, _ in spans}) == len(spans)


def test_threads_share_a_pool(small_slabs):
    pool, errors = HostPool(2 * MIB, pageable), []

    def work(seed):
        rng, live = random.Random(seed), []
        for step in range(300):
            pieces = pool.take(rng.randint(1, 60 * KIB))
            if pieces:
                mark = (seed * 31 + step) % 251
                for tensor in pieces.tensors:
                    tensor.fill_(mark)
                live.append((pieces, mark))
            if len(live) > 6 or not pieces:
                while len(live) > 3:
                    pieces, mark = live.pop(rng.randrange(len(live)))
                    if not all(bool((tensor == mark).all()) for tensor in pieces.tensors):
                        errors.append(step)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert pool.in_use == 0
    assert pool.held <= 2 * MIB


def test_taking_is_not_seen_by_a_dispatch_mode():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen, pool = [], HostPool(GIB, pageable)
    pool.take(1)
    with Seen():
        assert pool.take(MIB) is not None
    assert seen == []


def test_what_is_taken_in_inference_mode_can_be_written_outside_of_it():
    pool = HostPool(GIB, pageable)
    pool.take(1)
    with torch.inference_mode():
        pieces = pool.take(MIB)
    assert not pieces.tensors[0].is_inference()
    content = fill(pieces, 0)
    assert torch.equal(pieces.tensors[0], content)


# --- how much there is ------------------------------------------------------------------------------------------------


def build(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {64 * MIB} kB\nMemFree: 5 kB\nMemAvailable:   {32 * MIB} kB\nBuffers: 1 kB\n"}
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)


def v2(folder, limit, used, cache=0, high="max"):
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 1\nactive_file 77\ninactive_file {cache}\n",
    }


def v1(folder, limit, used, cache=0, above=2**63 - 4096):
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"inactive_file 3\nhierarchical_memory_limit {above}\ntotal_inactive_file {cache}\n",
    }


def test_the_memory_of_the_machine_without_groups(tmp_path):
    assert available_bytes(build(tmp_path, MEMINFO)) == 32 * GIB


def test_a_group_limits_and_its_page_cache_does_not_count(tmp_path):
    files = MEMINFO | {"proc/self/cgroup": "0::/user.slice/job\n", "proc/self/mountinfo": V2}
    files |= v2("sys/fs/cgroup/user.slice/job", 8 * GIB, 5 * GIB, cache=2 * GIB)
    assert available_bytes(build(tmp_path, files)) == 5 * GIB


def test_a_group_above_limits_too(tmp_path):
    files = MEMINFO | {"proc/self/cgroup": "0::/a/b/c\n", "proc/self/mountinfo": V2}
    files |= v2("sys/fs/cgroup/a/b/c", "max", GIB) | v2("sys/fs/cgroup/a/b", 16 * GIB, GIB)
    files |= v2("sys/fs/cgroup/a", 8 * GIB, 2 * GIB)
    assert available_bytes(build(tmp_path, files)) == 6 * GIB
    build(tmp_path, v2("sys/fs/cgroup/a/b/c", 3 * GIB, GIB))
    assert available_bytes(tmp_path) == 2 * GIB


def test_no_limit_is_no_limit(tmp_path):
    files = (
        MEMINFO | {"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": V2} | v2("sys/fs/cgroup/a", "max", 50 * GIB)
    )
    assert available_bytes(build(tmp_path, files)) == 32 * GIB


def test_where_a_group_is_slowed_down_is_its_limit(tmp_path):
    files = MEMINFO | {"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": V2}
    assert available_bytes(build(tmp_path, files | v2("sys/fs/cgroup/a", 9 * GIB, GIB, high=4 * GIB))) == 3 * GIB


def test_a_group_that_is_full_has_nothing(tmp_path):
    files = MEMINFO | {"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": V2} | v2("sys/fs/cgroup/a", GIB, 2 * GIB)
    assert available_bytes(build(tmp_path, files)) == 0


def test_a_container_with_its_own_view_of_groups(tmp_path):
    files = MEMINFO | {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2} | v2("sys/fs/cgroup", 4 * GIB, GIB)
    assert available_bytes(build(tmp_path, files)) == 3 * GIB


@pytest.mark.parametrize(
    "path", ["/docker/abc", "/docker/abc/inner", "/elsewhere", "/../../other", "/docker/abc/gone/too"]
)
def test_a_container_that_is_told_the_path_of_the_machine(tmp_path, path):
    mounts = V1.replace("0:32 / ", "0:32 /docker/abc ")
    files = MEMINFO | {"proc/self/cgroup": f"5:cpu,cpuacct:/x\n4:memory:{path}\n0::/\n", "proc/self/mountinfo": mounts}
    files |= v1("sys/fs/cgroup/memory", 4 * GIB, GIB)
    inner = v1("sys/fs/cgroup/memory/inner", 3 * GIB, GIB)
    expected = 2 * GIB if path.endswith("inner") else 3 * GIB
    assert available_bytes(build(tmp_path, files | inner)) == expected


def test_a_process_that_was_moved_out_of_its_view_is_limited_by_what_it_sees(tmp_path):
    files = MEMINFO | {"proc/self/cgroup": "0::/../../other\n", "proc/self/mountinfo": V2}
    files |= v2("sys/fs/cgroup", 4 * GIB, GIB) | v2("sys/other", GIB, 0)
    assert available_bytes(build(tmp_path, files)) == 3 * GIB


def test_groups_of_the_first_version(tmp_path):
    files = MEMINFO | {"proc/self/cgroup": "5:cpu,cpuacct:/c\n4:memory:/a/b\n", "proc/self/mountinfo": V1}
    files |= v1("sys/fs/cgroup/memory", 2**63 - 4096, 40 * GIB) | v1(
        "sys/fs/cgroup/memory/a", 20 * GIB, 12 * GIB, 2 * GIB
    )
    files |= v1("sys/fs/cgroup/memory/a/b", 2**63 - 4096, GIB) | v1("sys/fs/cgroup/cpu,cpuacct/c", 5, 5)
    assert available_bytes(build(tmp_path, files)) == 10 * GIB


def test_limits_above_a_container_are_in_its_statistics(tmp_path):
    files = MEMINFO | {"proc/self/cgroup": "4:memory:/\n", "proc/self/mountinfo": V1}
    files |= v1("sys/fs/cgroup/memory", 9 * GIB, GIB, above=6 * GIB)
    assert available_bytes(build(tmp_path, files)) == 5 * GIB


def test_both_versions_at_once(tmp_path):
    mounts = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    files = MEMINFO | {
        "proc/self/cgroup": "4:memory:/job\n1:name=systemd:/\n0::/slice\n",
        "proc/self/mountinfo": mounts,
    }
    files |= v1("sys/fs/cgroup/memory/job", 7 * GIB, GIB)
    files |= {"sys/fs/cgroup/unified/slice/cgroup.procs": "1\n"}
    assert available_bytes(build(tmp_path, files)) == 6 * GIB


def test_paths_with_spaces_and_colons(tmp_path):
    mounts = V2.replace("/sys/fs/cgroup ", "/sys/fs/control\\040groups ")
    files = MEMINFO | {"proc/self/cgroup": "0::/a:b c\n", "proc/self/mountinfo": mounts}
    assert available_bytes(build(tmp_path, files | v2("sys/fs/control groups/a:b c", 2 * GIB, GIB))) == GIB


def test_without_proc_psutil_tells_else_the_system(tmp_path, monkeypatch):
    class Memory:
        available = 7 * GIB

    class Fake:
        virtual_memory = Memory

    monkeypatch.setattr(host_memory, "psutil", Fake)
    assert available_bytes(tmp_path) == 7 * GIB
    monkeypatch.setattr(host_memory, "psutil", None)
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert available_bytes(tmp_path) == 4096000

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert available_bytes(tmp_path) == 0
    monkeypatch.delattr(os, "sysconf")
    assert available_bytes(tmp_path) == 0


def test_this_machine_has_some_memory():
    assert 0 < available_bytes() < 2**50


# --- whose it is ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_launcher(monkeypatch):
    for name in host_memory._LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_without_a_launcher(no_launcher):
    assert local_ranks() == 1


@pytest.mark.parametrize("name", host_memory._LOCAL_RANKS)
def test_each_launcher_has_its_own_word(no_launcher, name):
    no_launcher.setenv(name, "4")
    assert local_ranks() == 4


@pytest.mark.parametrize(
    ("text", "expected"), [("8(x2)", 8), ("2(x8)", 2), ("2(x3),7", 7), ("16", 16), ("", 1), ("0", 1), ("many", 1)]
)
def test_what_slurm_writes(no_launcher, text, expected):
    no_launcher.setenv("SLURM_STEP_TASKS_PER_NODE", text)
    assert local_ranks() == expected


def test_torchrun_is_nearer_than_what_started_it(no_launcher):
    no_launcher.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x4)")
    no_launcher.setenv("LOCAL_WORLD_SIZE", "8")
    assert local_ranks() == 8


def test_a_share_is_of_what_is_available_and_a_size_is_a_size(no_launcher):
    no_launcher.setattr(host_memory, "available_bytes", lambda: 10 * GIB)
    assert host_cap(0.5) == 5 * GIB
    assert host_cap(1.0) == 10 * GIB
    no_launcher.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_cap(0.8) == 2 * GIB
    assert host_cap(3 * GIB) == 3 * GIB
    assert host_cap(1) == 1
    assert host_cap(0) == 0
