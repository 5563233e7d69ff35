"""The benchmark of modes offload and auto on a device: what it computes from what it measured; all of it runs in small."""

import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from fake_device import FakeStreams

from ckpt_trainer import groups, streams

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"
MIB = 2**20


@pytest.fixture(autouse=True, scope="module")
def _path():
    added = [str(BENCHMARKS), str(BENCHMARKS.parent)]
    sys.path[:0] = added
    yield
    for path in added:
        sys.path.remove(path)


class TestIntervals:
    def test_merge(self):
        from overlap import merge

        assert merge([]) == []
        assert merge([(3, 4), (0, 1), (1, 2), (3.5, 6), (5, 5.5), (7, 7)]) == [(0, 2), (3, 6)]

    def test_intersect(self):
        from overlap import intersect

        assert intersect([(0, 10)], [(1, 2), (4, 5), (9, 12)]) == [(1, 2), (4, 5), (9, 10)]
        assert intersect([(1, 2), (4, 5), (9, 12)], [(0, 10)]) == [(1, 2), (4, 5), (9, 10)]
        assert intersect([(0, 1), (2, 3)], [(1, 2), (3, 4)]) == []
        assert intersect([], [(0, 1)]) == []

    def test_as_counted_point_by_point(self):
        from overlap import intersect, length, merge

        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            pair = []
            for _ in range(2):
                starts = torch.randint(0, 40, (6,), generator=generator).tolist()
                lengths = torch.randint(0, 8, (6,), generator=generator).tolist()
                pair.append([(start, start + n) for start, n in zip(starts, lengths)])
            points = [{point for start, end in spans for point in range(start, end)} for spans in pair]
            a, b = map(merge, pair)
            assert length(a) == len(points[0])
            assert length(intersect(a, b)) == len(points[0] & points[1])


def spans():
    from overlap import Span

    return [
        Span("kernel", 0, 10, stream=7),
        Span("kernel", 12, 20, stream=7),
        Span("kernel", 15, 25, stream=8),
        Span("out", 5, 15, stream=9),  # hidden but for 10-12
        Span("out", 14, 16, stream=9),
        Span("in", 18, 30, stream=7),  # in line with the kernels of 7: hidden by 8 alone, until 25
        Span("kernel", 26, 28, stream=7),
        Span("in", 0, 4, stream=3, device=1),  # no kernel there
    ]


class TestOverlap:
    def test_hidden_is_beside_kernels_of_other_streams(self):
        from overlap import overlap

        out = overlap(spans(), "out")
        assert (out.number, out.seconds, out.hidden_seconds) == (2, 11e-6, 9e-6)
        back = overlap(spans(), "in")
        assert (back.number, back.seconds, back.hidden_seconds) == (2, 16e-6, 7e-6)
        assert back.share == pytest.approx(7 / 16)

    def test_nothing_copied(self):
        from overlap import overlap

        assert overlap(spans()[:3], "out").share is None

    def test_idle(self):
        from overlap import idle_seconds

        assert idle_seconds(spans()) == 3e-6
        assert idle_seconds([]) == 0

    def test_read_trace(self, tmp_path):
        from overlap import overlap, read_trace

        def event(category, name, start, duration, stream, phase="X"):
            args = {"device": 0, "stream": stream, "bytes": 4096}
            return {"ph": phase, "cat": category, "name": name, "ts": start, "dur": duration, "args": args}

        events = [
            {"ph": "M", "name": "process_name", "args": {"name": "python"}},
            {"ph": "X", "cat": "cpu_op", "name": "aten::copy_", "ts": 0, "dur": 100, "args": {}},
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaMemcpyAsync", "ts": 0, "dur": 3, "args": {"stream": 9}},
            event("kernel", "sm90_gemm", 10.5, 20.0, 7),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 20.5, 20.0, 13),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 12.5, 8.0, 14),
            event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 12.5, 8.0, 7),
            event("gpu_memset", "Memset (Device)", 12.5, 8.0, 7),
            event("kernel", "begin only", 0, 1000, 7, phase="B"),
        ]
        path = tmp_path / "trace.json"
        path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
        found = read_trace(path)
        assert [span.kind for span in found] == ["kernel", "out", "in"]
        assert overlap(found, "out").share == 0.5
        assert overlap(found, "in").share == 1
        path.write_text(json.dumps(events))
        assert read_trace(path) == found


def row(name, side="ours", **found):
    from device_steps import Row

    return vars(Row(name, side, **found)) | {"time": 1.0, "ratio": found.get("ratios", [None])[0]}


def results(ratio=1.0, stored=3 * MIB, tokens=8192, **sections):
    rows = [
        row("full", ratios=[1.0], stored=8 * MIB, is_exact=True),
        row("offload inputs", ratios=[ratio], stored=stored, is_exact=True),
        row("HF offload", "HF", is_exact=False),
    ]
    return {"times": [{"tokens": tokens, "input_bytes": MIB, "layers": 8, "rows": rows}], **sections}


STEADY = {"steps": 9, "status": "", "reserved_growth": 0, "host_growth": 0}


class TestGoals:
    def failing(self, found):
        from gpu import goals

        return [text for text, holds in goals(found).items() if not holds]

    def test_hold(self):
        checked = {"is_clean": True, "finds_dropped_waits": True, "status": ""}
        assert self.failing(results(1.02, steady=STEADY, sanitizer=checked)) == []

    def test_time(self):
        (text,) = self.failing(results(1.021))
        assert text == "8192 tokens: time of offload / full at most 1.02: 1.021"
        assert self.failing(results(1.5, tokens=4096)) == ["offload was timed from 8192 tokens on"]

    def test_inputs_gone(self):
        assert self.failing(results(stored=3.1 * MIB)) == []
        (text,) = self.failing(results(stored=3.2 * MIB))
        assert "inputs of at least 5 of 8 blocks gone" in text
        assert text.endswith(": 4.80")

    def test_exact(self):
        found = results()
        found["times"][0]["rows"][1]["is_exact"] = False
        assert self.failing(found) == ["gradients of ours are those of full, bit for bit"]

    @pytest.mark.parametrize(
        "changed", [{"reserved_growth": 1}, {"host_growth": 1}, {"status": "out of memory"}, {"reserved_growth": None}]
    )
    def test_steady(self, changed):
        (text,) = self.failing({"steady": {**STEADY, **changed}})
        assert text.startswith("9 steps reserve no more")

    def test_sanitizer(self):
        assert len(self.failing({"sanitizer": {"status": "none here"}})) == 2
        clean = {"is_clean": True, "finds_dropped_waits": False}
        assert self.failing({"sanitizer": clean}) == ["the sanitizer finds the waits that are left out"]

    def test_what_failed_is_not_met(self):
        found = results()
        found["times"][0]["rows"][1] = row("offload inputs", status="out of memory")
        assert len(self.failing(found)) == 3


def auto_entry(ratio=0.8, measured=100, predicted=103, exact=True):
    from gpu_auto import Aim

    rows = [
        row("full", ratios=[1.0], is_exact=True),
        row("offload inputs", ratios=[0.79], is_exact=True),
        row("HF every_n=2", "HF", ratios=[0.5], is_exact=True),
        row("TRL offload, all", "TRL", status="not tried"),
        row("auto", ratios=[ratio], is_exact=exact),
    ]
    aim = Aim("auto", 110, predicted, measured)
    peaks = {"full": 60, "offload inputs": 110, "HF every_n=2": 111, "auto": measured}
    return {"tokens": 64, "rows": rows, "peaks": peaks, "aims": [vars(aim) | {"error": aim.error}]}


class TestGoalsOfAuto:
    def failing(self, **changed):
        from gpu_auto import goals_of_auto

        return [text for text, holds in goals_of_auto(auto_entry(**changed)).items() if not holds]

    def test_hold(self):
        assert self.failing() == []

    def test_who_is_faster_counts_only_in_the_same_memory(self):
        from gpu_auto import fastest_within

        assert fastest_within(auto_entry(), 110)["name"] == "offload inputs"
        assert fastest_within(auto_entry(), 111)["name"] == "HF every_n=2"
        assert fastest_within(auto_entry(), 59) is None
        assert self.failing(ratio=0.79 * 1.029) == []
        (text,) = self.failing(ratio=0.79 * 1.031)
        assert text.endswith("(offload inputs, 0.790)")

    def test_peaks(self):
        (text,) = self.failing(measured=111, predicted=111)
        assert "the peak is within the budget" in text
        assert self.failing(predicted=104) == []
        (text,) = self.failing(predicted=94)
        assert text.endswith("within 5% of the measured one: -6.0%")
        assert len(self.failing(measured=None)) == 2

    def test_gradients(self):
        assert len(self.failing(exact=False)) == len(self.failing(exact=None)) == 1

    def test_they_are_among_all_goals(self):
        from gpu import goals

        assert len([holds for holds in goals({"auto": [auto_entry()]}).values() if holds]) == 4

    def test_different_lengths(self):
        from gpu_auto import goals_of_mixed, mixed_table

        found = {
            "lengths": [5, 9, 5, 9], "budget": 50 * MIB, "status": {"HF full": "out of memory"},
            "seconds": {"none": [9.0, 9.0, 1.0, 3.0], "auto": [9.0, 9.0, 2.0, 2.1]},
            "peaks": {"none": 99, "auto": 50 * MIB},
        }  # fmt: skip
        assert list(goals_of_mixed(found).values()) == [True, True]
        assert "longest 9 tokens" in mixed_table(found)
        assert "- HF full: out of memory" in mixed_table(found)
        found["seconds"]["auto"][3], found["peaks"]["auto"] = 2.2, 50 * MIB + 1
        assert list(goals_of_mixed(found).values()) == [False, False]
        found["seconds"].pop("none")
        assert list(goals_of_mixed(found).values()) == [None, False]
        assert "did not run" in mixed_table(found)


class TestPlanningOfTime:
    def test_costs_grow_faster_than_tokens(self):
        from device_steps import GROWTH, Row, predicted_costs

        rows = [Row("a", seconds=[1.0, 3.0, 2.0], setup=4.0), Row("b", status="out of memory", setup=4.0)]
        assert predicted_costs(rows, 1.0) == {"a": 8.0, "b": 4.0}
        assert predicted_costs(rows, 4.0)["b"] == 4 * 4**GROWTH

    def test_affordable(self):
        from device_steps import affordable

        costs = {"full": 2, "offload inputs": 2, "none": 1, "offload all": 3}
        names = ["full", "offload inputs", "none", "offload all"]
        assert affordable(names, {}, 0) == names
        assert affordable(names, costs, 10) == names  # 2 + 2 + 1, and 3 + 2 for the last
        assert affordable(names, costs, 9.9) == names[:3]
        assert affordable(names, costs, 1) == []

    def test_groups(self):
        from device_steps import groups_of

        names = ["full", "offload inputs", "offload all", "none", "TRL offload, all"]
        large = [["full", "offload all"], ["full", "TRL offload, all"]]
        assert groups_of(names) == [["full", "offload inputs", "none"], *large]

    def test_rounds(self):
        from device_steps import number_of_rounds

        assert [number_of_rounds(7, 2.0, left) for left in (-1, 3, 6.5, 99)] == [2, 2, 3, 7]
        assert number_of_rounds(7, 0, 1) == 7
        assert number_of_rounds(1, 2.0, 9) == 1


class TestFailures:
    def test_reasons(self):
        from device_steps import OUT_OF_MEMORY, reason_of

        assert reason_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")) == OUT_OF_MEMORY
        assert reason_of(RuntimeError("CUDA error: out of memory\nmore")) == "out of memory: CUDA error: out of memory"
        assert reason_of(AttributeError("no a\nb")) == "failed: AttributeError: no a"

    def test_tensors_of_a_failed_step_are_gone_when_memory_is_freed(self, monkeypatch):
        import device_steps

        kept, alive = [], []

        def step():
            big = torch.zeros(4)
            kept.append(weakref.ref(big))
            raise torch.OutOfMemoryError("no")

        monkeypatch.setattr(device_steps, "free_memory", lambda: alive.append(kept[0]() is not None))
        row = device_steps.Row("a")
        with device_steps.failing_into(row):
            step()
        assert (row.status, alive) == ("out of memory", [False])

    def test_growth(self):
        from device_steps import growth_of

        held = [{"reserved": n, "allocated": None, "host": 5} for n in (1, *[4] * 9, 6, *[4] * 9)]
        found = growth_of(held)
        assert (found["reserved"], found["reserved_growth"]) == (4, 2)
        assert (found["allocated"], found["allocated_growth"]) == (None, None)
        assert found["host_growth"] == 0
        assert growth_of([])["reserved_growth"] is None


class TestOlderTorch:
    def test_formulas_with_fewer_key_heads(self, monkeypatch):
        from older_torch import make_up_for_older_torch
        from torch.utils import flop_counter

        from ckpt_trainer import flops

        forward, backward = flop_counter.sdpa_flop_count, flop_counter.sdpa_backward_flop_count
        query, key = (1, 4, 8, 16), (1, 2, 8, 16)
        expected = forward(query, key, key), backward(query, query, key, key)

        def refuse(*shapes):
            *_, query, key, value = shapes
            assert query[1] == key[1] == value[1]
            return (forward if len(shapes) == 3 else backward)(*shapes)

        for module in (flop_counter, flops):
            for name in ("sdpa_flop_count", "sdpa_backward_flop_count"):
                monkeypatch.setattr(module, name, refuse)
        assert make_up_for_older_torch()[-1].startswith("its FLOP formulas refuse")
        for module in (flop_counter, flops):
            assert module.sdpa_flop_count(query, key, key) == expected[0]
            assert module.sdpa_backward_flop_count(query, query, key, key) == expected[1]

    def test_nothing_is_changed_where_nothing_is_missing(self):
        from older_torch import make_up_for_older_torch
        from torch.utils import flop_counter

        before = flop_counter.sdpa_flop_count
        assert make_up_for_older_torch() == []
        assert flop_counter.sdpa_flop_count is before


class TestSanitizer:
    def test_end_of_the_process(self):
        from sanitized import read_end

        assert read_end(0, 'noise\n{"inputs": 5}\n', "")["bytes_out"] == {"inputs": 5}
        race = "CSAN detected a possible data race on tensor with data pointer 1\n"
        assert read_end(1, "", race + race)["races"] == 2
        assert read_end(0, "noise", "")["bytes_out"] == {}

    @pytest.mark.parametrize(
        ("clean", "dropped", "expected"),
        [
            ((0, {"inputs": 1, "attention": 1, "all": 1}, 0), 3, (True, True)),
            ((0, {"inputs": 1, "attention": 1, "all": 1}, 1), 3, (False, True)),
            ((0, {"inputs": 1, "attention": 0, "all": 1}, 0), 0, (False, False)),
            ((1, {}, 0), 0, (False, False)),
        ],
    )
    def test_verdict(self, monkeypatch, clean, dropped, expected):
        import sanitized

        def child(flags, seconds):
            code, moved, races = (1, {}, dropped) if flags else clean
            return {"code": code, "races": races, "error": "text", "bytes_out": moved}

        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(sanitized.KIND))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(sanitized, "_child", child)
        found = sanitized.sanitize()
        assert (found["is_clean"], found["finds_dropped_waits"]) == expected
        assert bool(found["status"]) == (clean[0] == 1)

    def test_steps_move_bytes(self, monkeypatch):
        """What the process runs, on a device that is not there."""
        import sanitized

        fake = FakeStreams("eager")
        monkeypatch.setattr(streams, "streams_of", lambda device, pinned=True: fake.streams_of(device, pinned))
        monkeypatch.setattr(groups, "MIN_BYTES", 0)
        model, ids = sanitized.small_model(torch.device("cpu"))
        assert ids.shape[1] * model.config.hidden_size * 2 == 2 * MIB
        monkeypatch.setattr(sanitized, "small_model", lambda device: (model, ids[:, :16]))
        moved = sanitized.run(torch.device("cpu"))
        assert 0 < moved["inputs"] < moved["attention"] < moved["all"]


def options_of(monkeypatch, *arguments):
    import gpu

    monkeypatch.setattr(groups, "MIN_BYTES", 0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", *arguments])
    return gpu.read_options()


SMALL = ["--variants", "full", "offload inputs", "offload all", "HF offload", "none", "TRL offload, recompute"]


class TestSmoke:
    def test_everything_runs(self, monkeypatch, tmp_path, capsys):
        import gpu
        import gpu_auto

        output = tmp_path / "results" / "gpu.md"
        options_of(monkeypatch, *SMALL, "--output", str(output))
        gpu.main()
        text, data = output.read_text(), json.loads(output.with_suffix(".json").read_text())
        assert "these numbers mean nothing" in text
        assert set(data) >= {"circumstances", "options", "goals", *gpu.SECTIONS}
        assert [entry["tokens"] for entry in data["times"]] == [32, 48]
        for entry in data["times"]:
            rows = {row["name"]: row for row in entry["rows"]}
            assert list(rows) == SMALL[1:]
            for name in ("full", "offload inputs", "offload all", "none"):
                assert rows[name]["status"] == ""
                assert len(rows[name]["seconds"]) == 2
            # What cannot run on a host is said, and ends nothing.
            assert rows["TRL offload, recompute"]["status"]
        exact = {row["name"]: row["is_exact"] for row in data["times"][0]["rows"]}
        assert all(exact[name] for name in ("full", "offload inputs", "offload all", "none"))
        assert data["steady"]["steps"] == 3
        (auto,) = data["auto"]
        assert [aim["name"] for aim in auto["aims"]] == list(gpu_auto.SHARES)
        rows = {row["name"]: row for row in auto["rows"]}
        for name in ("full", "none", "HF full", "HF every_n=2", "Unsloth-style offload", *gpu_auto.SHARES):
            assert rows[name]["status"] == ""
            assert rows[name]["is_exact"]
            assert auto["peaks"][name] > 0
        for aim in auto["aims"]:
            assert auto["peaks"]["full"] < aim["measured"] <= aim["budget"] < auto["peaks"]["none"]
            assert abs(aim["error"]) < gpu_auto.MAX_ERROR
        assert rows["TRL offload, recompute"]["status"]
        assert list(data["mixed"]["seconds"]) == list(gpu_auto.MIXED)
        assert all(len(its) == 4 for its in data["mixed"]["seconds"].values())
        assert data["mixed"]["peaks"]["auto"] <= data["mixed"]["budget"]
        assert "different lengths: auto's peak is within its budget" in text
        assert "data race" not in text

    def test_bytes_of_a_fake_device_are_told(self, monkeypatch, capsys):
        from device_steps import measure_length
        from variants import build_stack

        fake = FakeStreams("random", seed=1)
        monkeypatch.setattr(streams, "streams_of", lambda device, pinned=True: fake.streams_of(device, pinned))
        options = options_of(monkeypatch)
        stack = build_stack(options, 32, torch.float32)
        names = ["full", "offload inputs", "offload attention", "offload all"]
        rows = measure_length(stack, 32, names, options, lambda: 99.0, exact=True)
        assert [row.status for row in rows] == [""] * 4
        assert all(row.is_exact for row in rows)
        moved = [row.report.get("bytes_out", 0) for row in rows]
        assert 0 == moved[0] < moved[1] < moved[2] < moved[3]
        assert not any(module.__dict__.get("forward") for module in stack.modules())

    def test_options_of_offload_are_handed_on(self, monkeypatch):
        from variants import Missing, build_stack, make_variant

        options = options_of(monkeypatch, "--offload", "prefetch=3", "host_budget=1MiB")
        assert options.offload == {"prefetch": 3, "host_budget": "1MiB"}
        stack = build_stack(options, 32, torch.float32)
        state = make_variant("offload inputs", stack, options, 32, 2**40).step.__self__
        assert (state.settings.prefetch, state.settings.host_budget) == (3, MIB)
        options.offload = {"no_such_flag": 1}
        with pytest.raises(Missing, match="refuses"):
            make_variant("offload inputs", stack, options, 32, 2**40)

    @pytest.mark.parametrize("name", ["HF every_n=2", "HF full", "Unsloth-style offload"])
    @pytest.mark.parametrize("full", [False, True])
    def test_what_others_offer_is_undone_and_exact(self, monkeypatch, name, full):
        from device_steps import gradients
        from gpu_auto import OTHERS
        from variants import build_stack, plain, random_batch

        options = options_of(monkeypatch, *(["--full-finetuning"] if full else []))
        stack = build_stack(options, 32, torch.float32)
        batch, variant = random_batch(stack, 32), OTHERS[name](name, stack, options)
        expected = gradients(stack, batch, plain("none", stack, options))
        ran = []
        handle = stack.model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: ran.append(1))
        found = gradients(stack, batch, variant)
        assert len(ran) == (1 if name == "HF every_n=2" else 2)
        assert len(found) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(found, expected))
        handle.remove()
        assert not any(getattr(module, "gradient_checkpointing", False) for module in stack.modules())
        assert not stack.model.get_input_embeddings()._forward_hooks

    def test_what_does_not_fit_plainly_leaves_most_of_the_device(self, monkeypatch):
        import gpu_auto
        from variants import build_stack, random_batch

        def refuse_step():
            raise torch.OutOfMemoryError("no")

        options = options_of(monkeypatch)
        stack = build_stack(options, 32, torch.float32)
        monkeypatch.setitem(gpu_auto.VARIANTS, "none", lambda *_: gpu_auto.Variant("none", "plain", step=refuse_step))
        least, most = gpu_auto.range_of(stack, random_batch(stack, 32), options)
        assert least == most > 0

    def test_what_would_kill_the_process_is_not_tried(self, monkeypatch):
        from variants import Missing, build_stack, make_variant

        options = options_of(monkeypatch)
        stack = build_stack(options, 32, torch.float32)
        with pytest.raises(Missing, match="not tried"):
            make_variant("TRL offload, all", stack, options, 10**6, 2**20)

    @pytest.mark.parametrize(("full", "trained"), [(False, "norm"), (True, "proj")])
    def test_gradients_pass_through_all_blocks(self, monkeypatch, full, trained):
        from variants import build_stack, random_batch

        options = options_of(monkeypatch, *(["--full-finetuning"] if full else []))
        stack = build_stack(options, 32, torch.float32)
        stack(**random_batch(stack, 32))["loss"].backward()
        found = [name for name, parameter in stack.named_parameters() if parameter.grad is not None]
        assert any(trained in name for name in found)
        assert full or all("norm" in name for name in found)
        assert all(any(f"layers.{number}." in name for name in found) for number in range(options.layers))

    def test_loss_in_pieces_is_that_of_the_whole(self, monkeypatch):
        from variants import build_stack, random_batch

        stack = build_stack(options_of(monkeypatch), 32, torch.float32)
        batch = random_batch(stack, 32)
        logits = stack.model(input_ids=batch["input_ids"]).logits
        whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        torch.testing.assert_close(stack(**batch)["loss"], whole)

    def test_check_fails_where_nothing_was_measured(self, monkeypatch, capsys):
        import gpu

        options_of(monkeypatch, "--check", "--sections", "bandwidth,sanitizer")
        with pytest.raises(SystemExit, match="not met: the sanitizer finds no race"):
            gpu.main()

    def test_unknown_section(self, monkeypatch, capsys):
        with pytest.raises(SystemExit):
            options_of(monkeypatch, "--sections", "time")
        assert "time is not among" in capsys.readouterr().err
