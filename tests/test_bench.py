"""`ckpt-trainer bench`: what the rows hold, what is compared with what, and what becomes of a mode that fails."""

import gc
import json
import weakref
from contextlib import contextmanager

import pytest
import torch
from tiny_models import llama
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ckpt_trainer.bench import bench
from ckpt_trainer.cli import main
from ckpt_trainer.comparison import PARTS
from ckpt_trainer.estimates import estimate
from ckpt_trainer.measured_rows import (
    NUM_WARMUP,
    Measured,
    Way,
    Work,
    auto_label,
    budgets_between,
    close,
    digest_of,
    measure_bytes,
    measure_seconds,
    reference,
    row_of,
)
from ckpt_trainer.predicted_rows import FIXED_MODES

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {"batch": 2, "seq": 64, "dtype": "fp32", "rounds": 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture(scope="module")
def whole(path):
    return bench(path, **SIZES)


def by_label(found):
    return {row.label: row for row in found.rows}


class TestRows:
    def test_all_modes_and_that_of_transformers(self, whole):
        labels = [row.label for row in whole.rows]
        fixed = ["none", "transformers", *(mode for mode in FIXED_MODES if mode != "none")]
        assert labels[: len(fixed)] == fixed
        budgets = budgets_between([Measured("", phase_bytes=row.phase_bytes) for row in whole.rows[: len(fixed)]])
        assert len(budgets) == 3
        assert labels[len(fixed) :] == [auto_label(budget) for budget in budgets]
        assert all(row.peak_bytes <= budget for row, budget in zip(whole.rows[len(fixed) :], budgets, strict=True))

    def test_all_that_ran_are_exact(self, whole):
        rows = by_label(whole)
        offload = rows.pop("offload")
        assert whole.exact.items() >= dict.fromkeys(rows, True).items()
        assert {row.note for row in rows.values()} == {"exact"}
        # Nothing can be moved without an accelerator, and that is said.
        assert (offload.peak_bytes, offload.slowdown, whole.exact["offload"]) == (None, None, None)
        assert "cpu is the host" in offload.note

    def test_bytes(self, whole):
        rows = by_label(whole)
        ran = [row for row in whole.rows if row.peak_bytes is not None]
        for row in ran:
            assert list(row.phase_bytes) == ["forward", "backward", "optimizer"]
            assert row.peak_bytes == max(row.phase_bytes.values()) == row.phase_bytes[row.where]
            assert sum(row.part_bytes.values()) == row.peak_bytes
            assert set(row.part_bytes) <= set(PARTS)
        # As much for the optimizer as for weights, twice, and some steps counted.
        weights, state = rows["none"].part_bytes["weights"], rows["none"].part_bytes["optimizer"]
        assert weights < state < 2.01 * weights
        assert rows["full"].peak_bytes < rows["selective:expensive"].peak_bytes < rows["none"].peak_bytes
        assert rows["full"].peak_bytes < rows["full:every_2"].peak_bytes < rows["none"].peak_bytes
        assert rows["full"].peak_bytes == pytest.approx(rows["transformers"].peak_bytes, rel=0.01)

    def test_as_estimated(self, whole, path):
        modes = ["none", "full", "half_matmul"]
        found = estimate(path, 2, 64, dtype="fp32", modes=modes, every_block=True, budget="1GiB")
        measured = by_label(whole)
        for row in found.rows:
            assert row.peak_bytes == pytest.approx(measured[row.label].peak_bytes, rel=0.01)

    def test_times_and_plans(self, whole):
        rows = by_label(whole)
        assert rows["none"].slowdown == 1
        assert all(len(whole.seconds[label]) == (0 if label == "offload" else 1) for label in rows)
        plan = rows["full:every_2"].plan
        assert [str(action) for action in plan.actions.values()].count("recompute") == 2
        assert rows["transformers"].plan is None

    def test_as_text_and_data(self, whole):
        text = str(whole)
        assert "LlamaForCausalLM, batch 2 x 64, fp32, adamw_fused" in text
        assert all(row.label in text for row in whole.rows)
        assert "bitwise that of none" in text
        data = whole.as_data()
        assert json.loads(json.dumps(data)) == data
        assert list(data) == ["title", "machine", "budget_bytes", "rows", "notes"]
        row = data["rows"][0]
        assert (row["label"], row["exact"], len(row["seconds"])) == ("none", True, 1)


class TestOptions:
    def test_a_budget_is_one_row(self, path, whole):
        budget = (by_label(whole)["none"].peak_bytes + by_label(whole)["full"].peak_bytes) // 2
        found = bench(path, **SIZES, modes=["full", "auto"], budget=budget)
        assert [row.label for row in found.rows] == ["none", "full", "auto"]
        assert found.budget_bytes == budget
        auto = by_label(found)["auto"]
        assert by_label(whole)["full"].peak_bytes < auto.peak_bytes <= budget
        assert found.exact["auto"]
        # What measured the steps of auto is gone, or all that comes after is slower.
        assert _get_current_dispatch_mode_stack() == []

    def test_lora(self, path):
        found = by_label(bench(path, **SIZES, lora=2, modes=["full", "transformers"]))
        assert [row.note for row in found.values()] == ["exact"] * 3
        assert found["none"].part_bytes["optimizer"] < 0.5 * found["none"].part_bytes["weights"]

    def test_a_later_micro_batch_starts_with_gradients(self, path, whole):
        found = bench(path, **SIZES, modes=["full"], accumulate=True)
        assert "a later micro-batch" in found.title
        assert all(found.exact.values())
        for label in ("none", "full"):
            first, later = by_label(whole)[label], by_label(found)[label]
            gradients = later.phase_bytes["forward"] - first.phase_bytes["forward"]
            assert gradients == pytest.approx(first.part_bytes["weights"], rel=0.03)

    def test_mixed_precision(self, path):
        found = bench(path, **{**SIZES, "dtype": "bf16-mixed"}, modes=["full"], optimizer="none")
        assert all(found.exact.values())
        assert list(found.rows[0].phase_bytes) == ["forward", "backward"]
        assert found.rows[0].part_bytes["optimizer"] == 0

    def test_a_model_that_transformers_does_not_recompute(self, tmp_path):
        config = {
            "model_type": "openai-gpt",
            "vocab_size": 64,
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = by_label(bench(tmp_path, **SIZES, modes=["transformers", "full"]))
        assert "does not support" in found["transformers"].note
        assert found["full"].note == "exact"

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"rounds": 0}, "rounds=0"),
            ({"optimizer": "adamq"}, "adamq"),
            ({"optimizer": "rprop"}, "changes weights with a learning rate of 0"),
            ({"modes": ["ful"]}, "Did you mean 'full'"),
            ({"dtype": "fp8"}, "fp8"),
            ({"seq": 0}, "seq=0"),
            ({"lora": 0}, "LoRA rank of 0"),
        ],
    )
    def test_wrong_values(self, path, wrong, said):
        with pytest.raises(ValueError, match=said):
            bench(path, **{**SIZES, "modes": ["full"], **wrong})

    def test_no_room_for_the_optimizer(self, path, monkeypatch):
        def fail(*args, **kwargs):
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(torch.optim.AdamW, "step", fail)
        with pytest.raises(ValueError, match="have no room"):
            bench(path, **SIZES, modes=["full"])


class TestCommand:
    def test_json_and_plot(self, path, tmp_path, capsys):
        picture = tmp_path / "modes.png"
        options = ["--batch", "2", "--seq", "64", "--dtype", "fp32", "--modes", "full", "--rounds", "1"]
        assert main(["bench", path, *options, "--json", "--plot", str(picture)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [row["label"] for row in found["rows"]] == ["none", "full"]
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_a_mode_that_is_not_exact_is_an_exit_code(self, path, capsys, monkeypatch):
        steps = []

        def another(tensors):
            steps.append(tensors)
            return (len(steps),)

        monkeypatch.setattr("ckpt_trainer.measured_rows.digest_of", another)
        assert main(["bench", path, "--seq", "8", "--modes", "none,full", "--rounds", "1"]) == 1
        assert "NOT EXACT: other gradients" in capsys.readouterr().out

    def test_errors_are_one_line(self, path, capsys):
        assert main(["bench", path + "x", "--seq", "8"]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("ckpt-trainer: ")


# Ways of the test's own: what one does wrong, and at which of its steps.

COUNTED = NUM_WARMUP
TIMED = NUM_WARMUP + 1


class Failing:
    """A way that fails in one of its steps, with the graph of the step alive in its frames."""

    def __init__(self, work, at, error):
        self.work, self.at, self.error = work, at, error
        self.steps = 0
        self.released = False
        self.graph = None

    def way(self):
        return Way("failing", step=self.step, release=self.release)

    def release(self):
        self.released = True

    @contextmanager
    def step(self):
        self.steps += 1
        if self.steps - 1 == self.at:
            output = self.work.model(**self.work.batch)
            self.graph = weakref.ref(output["logits"])
            raise self.error
        yield


@pytest.fixture
def work():
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    return Work(llama(), {"input_ids": ids, "labels": ids.clone()})


def run(work, ways, rounds=2):
    every = measure_bytes(work, ways)
    measure_seconds(work, every, rounds)
    close(every)
    return every, {measured.label: row_of(every, measured, {"weights": 0}) for measured in every}


class TestFailures:
    @pytest.mark.parametrize("at", [0, COUNTED, TIMED + 1], ids=["first", "counted", "timed"])
    def test_out_of_memory_is_a_row(self, work, at):
        failing = Failing(work, at, torch.OutOfMemoryError("out of memory: tried to allocate"))
        every, rows = run(work, {"none": lambda: Way("none"), "failing": failing.way, "last": lambda: Way("last")})
        assert rows["failing"].note == "out of memory"
        assert (rows["failing"].peak_bytes, rows["failing"].slowdown) == (None, None)
        assert failing.steps == at + 1
        assert failing.released
        gc.collect()
        assert failing.graph() is None
        assert [rows[label].note for label in ("none", "last")] == ["exact", "exact"]
        assert [len(measured.seconds) for measured in every] == [2, 0, 2]

    @pytest.mark.parametrize("at", [0, TIMED], ids=["first", "timed"])
    def test_without_the_first_mode_the_next_is_the_measure(self, work, at):
        failing = Failing(work, at, RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        every, rows = run(work, {"none": failing.way, "next": lambda: Way("next")})
        assert rows["none"].note == "out of memory"
        assert rows["next"].slowdown == 1
        assert rows["next"].note == "exact"
        assert (reference(every) is every[1]) == (at == 0)

    def test_a_way_that_cannot_be_made(self, work):
        def refuse():
            raise ValueError("not  with\nthis model")

        _, rows = run(work, {"none": lambda: Way("none"), "refused": refuse})
        assert rows["refused"].note == "not with this model"

    def test_other_errors_are_errors(self, work):
        failing = Failing(work, 0, RuntimeError("a fault"))
        with pytest.raises(RuntimeError, match="a fault"):
            run(work, {"failing": failing.way})


class TestExact:
    def changed(self, work, at, change):
        """A way in one of whose steps something is other than in those of the first way."""
        steps = []

        @contextmanager
        def step():
            steps.append(0)
            undo = change(work.model) if len(steps) - 1 == at else None
            yield
            if undo is not None:
                undo()

        return Way("changed", step=step)

    @pytest.mark.parametrize("at", [0, NUM_WARMUP - 1, TIMED], ids=["first", "last compared", "timed"])
    def test_another_loss(self, work, at):
        def change(model):
            torch.rand(1)  # dropout draws other numbers

        _, rows = run(work, {"none": lambda: Way("none"), "changed": lambda: self.changed(work, at, change)})
        assert rows["changed"].note.startswith("NOT EXACT")
        assert rows["none"].note == "exact"

    def test_another_gradient(self, work):
        def change(model):
            weight = next(model.parameters())
            # The last bit of one number.
            return weight.register_hook(
                lambda grad: grad.view(torch.int32).add(torch.eye(*grad.shape).int()).view(grad.dtype)
            ).remove

        _, rows = run(work, {"none": lambda: Way("none"), "changed": lambda: self.changed(work, 1, change)})
        assert rows["changed"].note == "NOT EXACT: other gradients"

    def test_a_digest_sees_bits(self):
        one = torch.ones(3)
        assert digest_of([one, None]) == digest_of([one.clone(), None])
        assert digest_of([one]) != digest_of([one.nextafter(torch.tensor([1.0, 1.0, 2.0]))])
        assert digest_of([torch.tensor([0.0])]) != digest_of([torch.tensor([-0.0])])
        assert digest_of([None]) != digest_of([torch.zeros(1)])
        assert digest_of([torch.ones(2, dtype=torch.bfloat16)]) == (2 * 0x3F80,)


class TestBudgets:
    def test_between_the_least_and_the_most(self):
        every = [Measured("a", phase_bytes={"forward": 10, "backward": 50}), Measured("b", phase_bytes={"forward": 90})]
        assert budgets_between([*every, Measured("c")]) == [80, 70, 60]

    def test_none_where_all_are_equal(self):
        assert budgets_between([]) == []
        assert budgets_between([Measured("a", phase_bytes={"forward": 10})] * 2) == []
