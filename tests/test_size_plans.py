"""Plans of sizes: saved with a checkpoint by mode `auto`, read again, carried out without measuring."""

import json

import pytest
import torch
import transformers
from tiny_models import llama, text_dataset

from ckpt_trainer import CheckpointedTrainer, CheckpointTrainingArguments, Plan, checkpointing
from ckpt_trainer.plan import KEEP, RECOMPUTE, SizePlan

STEPS = 6


def trained(tmp_path, cls=CheckpointedTrainer, args=CheckpointTrainingArguments, accumulation=1, **flags):
    fixed = {"max_steps": STEPS, "save_steps": STEPS, "logging_steps": 1, "report_to": [], "disable_tqdm": True}
    found = args(
        output_dir=str(tmp_path / "out"), gradient_accumulation_steps=accumulation, use_cpu=True, **fixed, **flags
    )
    model = llama(4, use_cache=False)
    trainer = cls(model, found, train_dataset=text_dataset(64, length=24))
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tight(tmp_path, accumulation):
    """A budget at which some blocks are kept and others not."""
    free = trained(tmp_path / "free", accumulation=accumulation, save_strategy="no")
    return int(0.85 * max(size["predicted_peak_bytes"] for size in free.memory_report()["auto"]["sizes"]))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_saved_plan_gives_the_same_without_measuring(tmp_path, accumulation):
    budget = tight(tmp_path, accumulation)
    plain = trained(tmp_path / "plain", transformers.Trainer, transformers.TrainingArguments, accumulation)
    first = trained(tmp_path / "first", accumulation=accumulation, checkpointing_budget=budget)
    path = tmp_path / "first" / "out" / f"checkpoint-{STEPS}" / "checkpointing_plan.json"
    assert json.loads(path.read_text()) == first.memory_report()["plan"]
    assert len(json.loads(path.read_text())["sizes"]) == accumulation
    second = trained(tmp_path / "second", accumulation=accumulation, checkpointing_plan=str(path))
    assert losses(first) == losses(second) == losses(plain)
    report = second.memory_report()
    assert report["calls"].get("recompute", 0) == 0  # no step on the leanest plan
    assert report["plan"] == first.memory_report()["plan"]
    for one, other in zip(second.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_same_run_makes_the_same_plans(tmp_path):
    budget = tight(tmp_path, 1)
    plans = [trained(tmp_path / name, checkpointing_budget=budget).memory_report()["plan"] for name in ("a", "b")]
    assert plans[0] == plans[1]


def test_the_plan_of_another_run_does_not_stay_beside_other_weights(tmp_path):
    trained(tmp_path)
    path = tmp_path / "out" / f"checkpoint-{STEPS}" / "checkpointing_plan.json"
    assert path.exists()
    trained(tmp_path, checkpointing_mode="full")
    assert not path.exists()


def plan_of_sizes(names):
    small = SizePlan((("input_ids", (2, 8)),), False, dict.fromkeys(names, KEEP))
    large = SizePlan((("input_ids", (2, 16)),), False, {name: KEEP if i else RECOMPUTE for i, name in enumerate(names)})
    return Plan(dict.fromkeys(names, RECOMPUTE), (large, small))


def test_sizes_go_to_json_and_back():
    plan = plan_of_sizes(["layers.0", "layers.1"])
    assert Plan.from_json(plan.to_json()) == plan
    assert "sizes" not in Plan(plan.actions).as_data()


@pytest.mark.parametrize("entry", [{}, {"inputs": {"x": 3}, "gradients_are_there": False, "blocks": {}}, 3])
def test_another_form_of_sizes_is_told(entry):
    text = json.dumps({"blocks": {"layers.0": "keep"}, "sizes": [entry]})
    with pytest.raises(ValueError, match='an entry of "sizes" in a plan is'):
        Plan.from_json(text)


def test_the_smallest_size_that_covers_a_batch_decides_and_else_the_plan_of_all():
    model = llama(2, use_cache=False)
    with checkpointing(model, plan=plan_of_sizes([f"model.layers.{i}" for i in range(2)])) as state:
        replayed = []
        for length in (8, 5, 16, 9, 17, 8):
            before = state.tally.calls["recompute"]
            loss = model(input_ids=torch.ones(2, length, dtype=torch.long)).logits.sum()
            loss.backward()
            replayed.append(state.tally.calls["recompute"] - before)
            model.zero_grad()
    assert replayed == [0, 0, 1, 1, 2, 0]


def test_a_size_may_not_name_blocks_that_are_not_there():
    plan = plan_of_sizes(["model.layers.0", "model.layers.7"])
    with pytest.raises(ValueError, match=r"model\.layers\.7"), checkpointing(llama(2), plan=plan):
        pass
