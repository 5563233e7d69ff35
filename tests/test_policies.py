"""Which action each block gets: by mode, by part, from a plan that is given, and from a policy of the user's own."""

import inspect
import json
import logging

import pytest
import torch
from tiny_models import CASES, llama, text_dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from ckpt_trainer import CheckpointedTrainer, CheckpointingMixin, CheckpointTrainingArguments, checkpointing
from ckpt_trainer.blocks import Block, find_blocks
from ckpt_trainer.engine import Checkpointing
from ckpt_trainer.plan import FROZEN, KEEP, MODES, OFFLOAD_SAVES, RECOMPUTE, SELECTIVE, Action, Part, Plan, Settings
from ckpt_trainer.policies import POLICIES, make_plan, plan_from
from ckpt_trainer.recompute import Tally
from ckpt_trainer.report import explain_no_effect, first_line, memory_report


def blocks(*stacks):
    """Blocks named by stack: `("vision", "vision", 3)` is (stack, component, number)."""
    return [
        Block(f"{stack}.{index}", nn.Linear(1, 1), stack, component, True)
        for stack, component, number in stacks
        for index in range(number)
    ]


def kinds(plan):
    return [action.kind for action in plan.actions.values()]


def parts(*modules):
    """Parts from pairs (name, mode), or (name, mode, save)."""
    return tuple(Part(*module) for module in modules)


def texts(plan):
    return [str(action) for action in plan.actions.values()]


# Modes.


def test_none_and_full_and_selective():
    some = blocks(("l", "text", 3))
    assert kinds(make_plan(some, Settings(mode="none"))) == ["keep"] * 3
    assert kinds(make_plan(some, Settings(mode="full"))) == ["recompute"] * 3
    assert make_plan(some, Settings(mode="selective")).actions == dict.fromkeys(["l.0", "l.1", "l.2"], SELECTIVE)


MOVED = ["recompute", "selective:expensive", "selective:matmul", "selective:half_matmul", "selective:attention", "keep"]


@pytest.mark.parametrize(("save", "text"), list(zip(OFFLOAD_SAVES, MOVED, strict=True)))
@pytest.mark.parametrize(("target", "place"), [("host", "host"), ("pageable", "host"), ("disk", "disk")])
def test_offload(save, text, target, place):
    settings = Settings(mode="offload", offload_save=save, offload_to=target, save=("mm",))
    plan = make_plan(blocks(("l", "text", 2)), settings)
    assert texts(plan) == [f"{text}@{place}"] * 2
    assert plan.is_active


def test_offload_with_every_n_and_frozen_blocks():
    some = blocks(("v", "vision", 2), ("l", "text", 3))
    plan = make_plan(some, Settings(mode="offload", every_n=2))
    kept = "keep (every_n=2)"
    assert texts(plan) == ["recompute@host", kept, "recompute@host", kept, "recompute@host"]
    assert [action.does_nothing for action in plan.actions.values()] == [False, True, False, True, False]
    model = llama(2)
    model.model.layers[0].requires_grad_(False)
    plan = make_plan(find_blocks(model), Settings(mode="offload", offload_save="all"))
    assert texts(plan) == [f"keep@host ({FROZEN})", "keep@host"]


def test_each_part_moves_what_it_says():
    some = blocks(("v", "vision", 2), ("l", "text", 4))
    modules = (
        Part("v.0", "selective", ("mm",)),
        Part("vision", "full"),
        Part("l.1", "offload", offload_save="attention"),
        Part("l.2", "offload", offload_save="all"),
        Part("l.3", "none"),
    )
    plan = make_plan(some, Settings(mode="offload", modules=modules, offload_to="disk", offload_dir="/"))
    assert texts(plan) == [
        *("selective:mm", "recompute", "recompute@disk", "selective:attention@disk", "keep@disk", "keep")
    ]
    plan = make_plan(some, Settings(mode="full", modules=(Part("text", "offload"),)))
    assert texts(plan) == ["recompute"] * 2 + ["recompute@host"] * 4


def test_every_n_counts_each_stack_by_itself():
    some = blocks(("v", "vision", 3), ("l", "text", 4))
    plan = make_plan(some, Settings("full", every_n=2))
    assert kinds(plan) == ["recompute", "keep", "recompute", "recompute", "keep", "recompute", "keep"]
    assert plan["v.1"].reason == "every_n=2"
    chosen = make_plan(some, Settings(mode="selective", save=("mm",), every_n=3))
    assert texts(chosen) == [
        *("selective:mm", "keep (every_n=3)", "keep (every_n=3)"),
        *("selective:mm", "keep (every_n=3)", "keep (every_n=3)", "selective:mm"),
    ]


@pytest.mark.parametrize(
    ("modules", "expected"),
    [((("vision", "none"),), "kkrr"), ((("v.*", "none"),), "kkrr"), ((("v", "none"),), "kkrr"),
     ((("*.1", "none"),), "rkrk"), ((("v.0", "full"), ("vision", "none")), "rkrr"),
     ((("vision", "none"), ("v.0", "full")), "kkrr"), ((("*", "none"), ("text", "full")), "kkkk")],
    ids=str,
)  # fmt: skip
def test_parts_follow_the_first_key_that_names_them(modules, expected):
    plan = make_plan(blocks(("v", "vision", 2), ("l", "text", 2)), Settings("full", modules=parts(*modules)))
    assert "".join(kind[0] for kind in kinds(plan)) == expected


def test_a_part_can_be_turned_on_where_the_mode_is_none():
    plan = make_plan(
        blocks(("v", "vision", 2), ("l", "text", 2)), Settings(mode="none", modules=parts(("text", "full")))
    )
    assert kinds(plan) == ["keep", "keep", "recompute", "recompute"]


def test_each_part_stores_what_it_says():
    some = blocks(("v", "vision", 2), ("l", "text", 3))
    modules = parts(("l.1", "full"), ("text", "selective", ("mm", "mlp.*")), ("v.0", "selective", ("attention",)))
    plan = make_plan(some, Settings(mode="selective", modules=modules, save=("matmul",)))
    assert texts(plan) == [
        *("selective:attention", "selective:matmul", "selective:mm,mlp.*", "recompute", "selective:mm,mlp.*")
    ]


def test_every_mode_has_a_policy():
    assert set(POLICIES) == set(MODES)


def test_a_key_that_names_nothing_lists_what_is_there():
    with pytest.raises(ValueError, match=r"'audio', which matches no block. Blocks of this model: l \(2 x text\)"):
        make_plan(blocks(("l", "text", 2)), Settings(modules=parts(("audio", "full"))))


def test_frozen_blocks_say_so():
    model = llama(2)
    model.model.layers[0].requires_grad_(False)
    plan = make_plan(find_blocks(model), Settings("full"))
    assert texts(plan) == ["recompute (frozen, if a gradient passes)", "recompute"]
    plan = make_plan(find_blocks(model), Settings(mode="selective", save=("mm",)))
    assert texts(plan) == ["selective:mm (frozen, if a gradient passes)", "selective:mm"]
    assert FROZEN == "frozen, if a gradient passes"


def test_a_near_key_is_suggested():
    with pytest.raises(ValueError, match=r"Did you mean 'vision'\?$"):
        make_plan(blocks(("l", "text", 2)), Settings(modules=parts(("visoin", "full"))))


def test_a_vision_language_model_by_parts():
    found = find_blocks(CASES["llava"].build())
    plan = make_plan(found, Settings(modules=parts(("vision", "none"))))
    assert {block.component: plan[block.name].kind for block in found} == {"vision": "keep", "text": "recompute"}


# A plan that is given.


def test_a_given_plan_is_followed_and_the_rest_kept():
    some = blocks(("v", "vision", 1), ("l", "text", 3))
    given = Plan({"l.2": RECOMPUTE, "l.0": Action("selective", "mine", ("mm",))})
    plan = plan_from(given, some)
    assert list(plan.actions) == ["v.0", "l.0", "l.1", "l.2"]
    assert texts(plan) == ["keep (not in the plan)", "selective:mm (mine)", "keep (not in the plan)", "recompute"]
    assert make_plan(some, Settings(mode="none", plan=given)) == plan


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["l.0", "l.7"], r"names 'l\.7', which this model has no block of\. Blocks of this model: l \(2 x text\)\. "),
        (["m.0", "m.1", "l.0", "m.2"], r"names 'm\.0' and 2 more, which this model has no block of"),
        (["ll.0"], r"Did you mean 'l\.0'\?$"),
    ],
)
def test_a_plan_of_another_model_is_refused(names, message):
    with pytest.raises(ValueError, match="^checkpointing_plan .*" + message):
        make_plan(blocks(("l", "text", 2)), Settings(plan=Plan(dict.fromkeys(names, KEEP))))


def test_a_plan_for_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"Blocks of this model: none\.$"):
        make_plan([], Settings(plan=Plan({"l.0": KEEP})))


# A policy of the user's own.


def test_a_policy_is_asked_once_for_each_block_in_order():
    some = blocks(("v", "vision", 1), ("l", "text", 4))
    some += blocks(("m", "text", 2))
    answers = {"v.0": KEEP, "l.0": "recompute", "l.1": "selective:mm,attention", "l.2": Action("keep", "why")}
    answers |= {"m.0": "recompute@host", "m.1": Action("keep", "why", place="host")}
    asked = []

    def policy(block):
        asked.append(block)
        return answers.get(block.name)

    plan = make_plan(some, Settings(mode="selective", save=("matmul",)), policy)
    assert texts(plan) == [
        *("keep", "recompute", "selective:mm,attention", "keep (why)", "selective:matmul"),
        *("recompute@host", "keep@host (why)"),
    ]
    assert asked == some


def test_where_a_policy_says_nothing_modules_and_every_n_hold():
    some = blocks(("v", "vision", 2), ("l", "text", 3))
    settings = Settings("full", every_n=2, modules=parts(("vision", "selective")))
    assert make_plan(some, settings, lambda block: None) == make_plan(some, settings)
    plan = make_plan(some, settings, lambda block: "recompute" if block.name in ("v.1", "l.1") else None)
    assert texts(plan) == ["selective:expensive", "recompute", "recompute", "recompute", "recompute"]


@pytest.mark.parametrize("answer", [3, True, ("keep",), ["selective"], RECOMPUTE.__class__, {"kind": "keep"}])
def test_a_policy_that_returns_something_else_is_told_for_which_block(answer):
    with pytest.raises(TypeError) as caught:
        make_plan(blocks(("l", "text", 2)), Settings(), lambda block: answer if block.name == "l.1" else None)
    assert str(caught.value).startswith(f"checkpointing_policy returned {answer!r} for block 'l.1'. Return an Action, ")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("full", "action 'full' is not one of keep, selective, recompute. Did you mean 'recompute'?"),
        ("selective:expnsive", "'expnsive' is not a tier. Did you mean 'expensive'?"),
        ("", "action '' is not one of keep, selective, recompute."),
        ("recompute@cpu", "place 'cpu' is not one of device, host, disk. Did you mean 'host'?"),
        ("offload", "action 'offload' is not one of keep, selective, recompute. Did you mean 'recompute@host'?"),
    ],
)
def test_a_policy_that_returns_bad_text_is_told_for_which_block(answer, message):
    with pytest.raises(ValueError) as caught:
        make_plan(blocks(("l", "text", 2)), Settings(), lambda block: answer if block.name == "l.1" else None)
    assert str(caught.value).startswith(f"checkpointing_policy returned {answer!r} for block 'l.1': {message}")


def test_an_error_in_a_policy_is_the_users_own():
    with pytest.raises(ZeroDivisionError):
        make_plan(blocks(("l", "text", 1)), Settings(), lambda block: 1 // 0)


def test_a_policy_and_a_plan_are_one_too_many():
    some, asked = blocks(("l", "text", 1)), []
    with pytest.raises(ValueError, match=r"checkpointing_plan and checkpointing_policy both say .* Remove one"):
        make_plan(some, Settings(plan=Plan({})), asked.append)
    assert asked == []


def test_a_policy_must_be_callable():
    with pytest.raises(TypeError, match="checkpointing_policy='selective' is not a function of a block"):
        make_plan(blocks(("l", "text", 1)), Settings(), "selective")


@pytest.mark.parametrize(
    ("settings", "remove"),
    [
        (Settings(use_reentrant=True), "Remove checkpointing_use_reentrant=True, or return 'keep' or 'recompute'"),
        (Settings(checkpoint_options={"context_fn": print}), "Remove context_fn, or return 'keep' or 'recompute'"),
    ],
)
def test_a_selective_answer_needs_what_the_mode_needs(settings, remove):
    some = blocks(("l", "text", 2))
    with pytest.raises(ValueError, match=r"returned 'selective:mm' for block 'l\.1', .*" + remove):
        make_plan(some, settings, lambda block: "selective:mm" if block.name == "l.1" else "recompute")
    with pytest.raises(ValueError, match=r"returned 'selective:mm@host' for block 'l\.0', .*" + remove):
        make_plan(some, settings, lambda block: "selective:mm@host")
    assert kinds(make_plan(some, settings, lambda block: "recompute")) == ["recompute"] * 2
    moved = iter(["recompute@host", "keep@host"])
    assert texts(make_plan(some, settings, lambda block: next(moved))) == ["recompute@host", "keep@host"]


def test_an_answer_on_disk_needs_a_folder():
    some = blocks(("l", "text", 2))
    with pytest.raises(ValueError) as caught:
        make_plan(some, Settings(), lambda block: "keep@disk" if block.name == "l.1" else "recompute@host")
    assert str(caught.value) == (
        "checkpointing_policy returned 'keep@disk' for block 'l.1', which needs a folder. Set checkpointing_offload_dir, "
        "or return '...@host'."
    )
    plan = make_plan(some, Settings(offload_dir="/"), lambda block: "keep@disk")
    assert texts(plan) == ["keep@disk"] * 2


# In a loop of one's own.


def third_of(num_blocks):
    """Keep the first third of the blocks, recompute the last, and say nothing of those between."""

    def policy(block):
        place = int(block.name.rpartition(".")[2]) * 3 // num_blocks
        return ("keep", None, RECOMPUTE)[place]

    return policy


def test_a_loop_takes_a_policy_and_each_plan_asks_again():
    model, asked = llama(3), []

    def policy(block):
        asked.append(block.name)
        return third_of(3)(block)

    with checkpointing(model, mode="none", policy=policy) as state:
        assert texts(state.plan) == ["keep", "keep", "recompute"]
        model(**batch()).loss.backward()
    assert dict(state.tally.replays) == {"model.layers.2": 1}
    assert asked == [f"model.layers.{i}" for i in range(3)]
    model.model.layers[0].requires_grad_(False)
    with state.step():
        assert asked == [f"model.layers.{i}" for i in range(3)] * 2


def test_a_loop_takes_a_plan_alone():
    model = llama(3)
    with checkpointing(model, plan=Plan({"model.layers.1": RECOMPUTE})) as state:
        model(**batch()).loss.backward()
    assert dict(state.tally.replays) == {"model.layers.1": 1}
    with checkpointing(model, plan=state.plan) as again:
        pass
    assert again.plan == state.plan
    with pytest.raises(ValueError, match="checkpointing_plan and checkpointing_mode='full' both"):
        checkpointing(model, mode="full", plan=state.plan).__enter__()
    with pytest.raises(ValueError, match="checkpointing_plan and checkpointing_policy both"):
        checkpointing(model, plan=state.plan, policy=third_of(3)).__enter__()


def batch():
    tokens = torch.arange(8).reshape(2, 4)
    return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize(
    ("plan", "off"),
    [({"model.layers.1": SELECTIVE}, True), ({"model.layers.1": RECOMPUTE}, True), ({}, False)],
    ids=str,
)
def test_the_cache_is_off_where_anything_is_done(plan, off):
    model = llama(2, use_cache=True)
    with checkpointing(model, plan=Plan(plan)):
        assert model.config.use_cache is not off
    assert model.config.use_cache is True


def test_data_parallel_is_refused_where_anything_is_done():
    model = nn.DataParallel(llama(2))
    with pytest.raises(ValueError, match="torchrun"):
        Checkpointing(model, Settings(mode="selective"))
    assert not Checkpointing(model, Settings(mode="none")).plan.is_active


# In a trainer.


def arguments(tmp_path, **flags):
    fixed = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    return CheckpointTrainingArguments(**{**fixed, **flags})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_trainer_takes_a_policy_and_does_not_pass_it_on(tmp_path):
    trainer = CheckpointedTrainer(
        llama(3),
        arguments(tmp_path, checkpointing_mode="full"),
        train_dataset=text_dataset(8),
        checkpointing_policy=third_of(3),
    )
    assert trainer.memory_report()["blocks"] == {"text": {"keep": 1, "recompute": 2}}
    trainer.train()
    assert trainer.memory_report()["recomputed_by_block"] == {"model.layers.1": 2, "model.layers.2": 2}
    plain = Trainer(
        llama(3, use_cache=False), TrainingArguments(**fixed_of(trainer.args)), train_dataset=text_dataset(8)
    )
    plain.train()
    assert losses(plain) == losses(trainer)


def fixed_of(args):
    names = ("output_dir", "per_device_train_batch_size", "max_steps", "logging_steps", "report_to", "disable_tqdm")
    return {name: getattr(args, name) for name in (*names, "save_strategy", "use_cpu")}


def test_a_policy_works_with_a_model_made_late(tmp_path):
    asked = []
    trainer = CheckpointedTrainer(
        args=arguments(tmp_path),
        model_init=lambda: llama(2),
        train_dataset=text_dataset(8),
        checkpointing_policy=lambda block: asked.append(block.name),
    )
    trainer.train()
    assert asked == ["model.layers.0", "model.layers.1"]
    # In the first step; by then it is known that all of it has room.
    assert trainer.memory_report()["recomputed_blocks"] == 2


def test_a_policy_answers_for_its_blocks_in_mode_auto(tmp_path):
    trainer = CheckpointedTrainer(
        llama(3), arguments(tmp_path), train_dataset=text_dataset(8), checkpointing_policy=third_of(3)
    )
    trainer.train()
    report = trainer.memory_report()
    assert report["recomputed_by_block"] == {"model.layers.1": 1, "model.layers.2": 2}
    assert report["plan"]["sizes"][0]["blocks"] == {
        "model.layers.0": "keep", "model.layers.1": "keep", "model.layers.2": "recompute"
    }  # fmt: skip


def test_a_bad_policy_is_told_when_the_trainer_is_made(tmp_path):
    with pytest.raises(TypeError, match="checkpointing_policy='keep' is not a function"):
        CheckpointedTrainer(llama(2), arguments(tmp_path), checkpointing_policy="keep")
    path = tmp_path / "plan.json"
    path.write_text(Plan({}).to_json())
    with pytest.raises(ValueError, match="checkpointing_plan and checkpointing_policy both"):
        args = arguments(tmp_path, checkpointing_plan=str(path))
        CheckpointedTrainer(llama(2), args, checkpointing_policy=third_of(2))


def test_the_signature_shows_the_policy():
    ours, theirs = inspect.signature(CheckpointedTrainer).parameters, inspect.signature(Trainer).parameters
    assert list(ours) == [*theirs, "checkpointing_policy"]
    assert {name: ours[name] for name in theirs} == dict(theirs)
    assert ours["checkpointing_policy"].kind is inspect.Parameter.KEYWORD_ONLY
    assert ours["checkpointing_policy"].default is None


class Keywords(Trainer):
    def __init__(self, *args, extra=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = extra


class KeywordsCheckpointed(CheckpointingMixin, Keywords):
    pass


class OwnConstructor(CheckpointedTrainer):
    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)


def test_signatures_of_other_trainers():
    assert list(inspect.signature(KeywordsCheckpointed).parameters) == [
        "args",
        "extra",
        "checkpointing_policy",
        "kwargs",
    ]
    assert list(inspect.signature(OwnConstructor).parameters) == ["model", "args", "kwargs"]


@pytest.mark.parametrize("cls", [KeywordsCheckpointed, OwnConstructor])
def test_other_trainers_take_it(tmp_path, cls):
    trainer = cls(llama(2), arguments(tmp_path), checkpointing_policy=lambda block: "keep")
    assert trainer.memory_report()["blocks"] == {"text": {"keep": 2}}


def test_a_trainer_of_trl_takes_it(tmp_path):
    import datasets
    import trl

    cls = type("Mixed", (CheckpointingMixin, trl.SFTTrainer), {})
    assert list(inspect.signature(cls).parameters)[-1] == "checkpointing_policy"
    config = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    rows = datasets.Dataset.from_list([{"input_ids": [1, 2, 3]}] * 4)
    from tiny_models import tokenizer

    trainer = cls(llama(3), config, train_dataset=rows, processing_class=tokenizer(), checkpointing_policy=third_of(3))
    assert trainer.memory_report()["blocks"] == {"text": {"keep": 1, "recompute": 2}}


def test_the_plan_of_a_report_can_be_given_again(tmp_path):
    first = CheckpointedTrainer(
        llama(4),
        arguments(tmp_path, checkpointing_mode="selective", checkpointing_every_n=2),
        checkpointing_policy=lambda block: "recompute" if block.name.endswith("3") else None,
    )
    report = first.memory_report()
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(report["plan"]))
    second = CheckpointedTrainer(llama(4), arguments(tmp_path, checkpointing_plan=str(path)))
    assert second.memory_report()["plan"] == report["plan"]
    assert list(report["plan"]["blocks"].values()) == [
        *("selective:expensive", {"kind": "keep", "reason": "every_n=2"}, "selective:expensive", "recompute")
    ]
    assert report["blocks"] == {"text": {"selective:expensive": 2, "keep": 1, "recompute": 1}}


def test_a_plan_of_another_model_is_told_when_the_trainer_is_made(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(Plan({"model.layers.9": KEEP}).to_json())
    with pytest.raises(ValueError, match=r"names 'model\.layers\.9'.* model\.layers \(2 x text\)"):
        CheckpointedTrainer(llama(2), arguments(tmp_path, checkpointing_plan=str(path)))


def test_metrics_are_logged_where_anything_is_done(tmp_path):
    def logged(mode):
        trainer = CheckpointedTrainer(
            llama(2), arguments(tmp_path, checkpointing_mode=mode), train_dataset=text_dataset(8)
        )
        trainer.train()
        return any("checkpointing/peak_host_bytes" in entry for entry in trainer.state.log_history)

    assert (logged("none"), logged("selective"), logged("full")) == (False, True, True)


# What is said.


def said(caplog, model, mode=None, policy=None, **flags):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ckpt_trainer"), checkpointing(model, mode, policy=policy, **flags):
        pass
    return next(record.getMessage() for record in caplog.records if record.name == "ckpt_trainer")


def test_the_line_counts_by_action(caplog):
    model = llama(4)
    line = said(caplog, model, "selective", every_n=2)
    assert line.startswith(
        "mode selective: 2/4 text blocks selective:expensive (2 every_n=2); non-reentrant; use_cache off"
    )
    line = said(caplog, model, "none", policy=lambda block: "selective:mm,mlp.*" if block.name.endswith("1") else None)
    assert line.startswith("mode none, own policy: 1/4 text blocks selective:mm,mlp.* (3 kept); ")
    line = said(caplog, model, plan=Plan({"model.layers.0": SELECTIVE, "model.layers.3": RECOMPUTE}))
    assert line.startswith("plan given: 2/4 text blocks: 1 selective:expensive, 1 recomputed (2 not in the plan); ")
    assert "segments" not in line


def test_the_line_of_a_frozen_tower(caplog):
    model = CASES["llava"].build()
    model.model.vision_tower.requires_grad_(False)
    line = said(caplog, model, "selective", save="attention", modules={"text": "none"})
    assert "0/3 vision blocks selective:attention (3 frozen, if a gradient passes); 0/2 text blocks recomputed" in line


def test_the_line_says_how_long_segments_are(caplog):
    model = llama(4)
    assert "; non-reentrant; segments of 2; use_cache" in said(caplog, model, "full", segment=2)
    assert "; segments of sqrt; " in said(caplog, model, "full", segment="sqrt")
    assert "segments" not in said(caplog, model, "selective", segment=2)


def test_the_line_stays_short():
    some = blocks(("l", "text", 12))
    reasons = ["a", "a", "b", "b", "c", "c", "d", "e", "f"]
    actions = {block.name: Action("keep", reason) for block, reason in zip(some, reasons, strict=False)}
    plan = Plan({**dict.fromkeys([b.name for b in some], Action("recompute", "mine")), **actions})
    line = first_line(plan, some, Settings("full"))
    assert line.startswith("mode full: 3/12 text blocks recomputed (2 a, 2 b, 2 c, 3 for other reasons); ")


@pytest.mark.parametrize(
    ("calls", "number"), [({"recompute": 1}, 0), ({"rebuild": 1}, 0), ({"no graph": 2}, 1), ({}, 0)]
)
def test_no_effect_is_said_where_no_call_was_changed(calls, number):
    tally = Tally()
    tally.calls.update(calls)
    assert len(explain_no_effect(tally, blocks(("l", "text", 2)))) == number


def test_flops_of_partial_replays_are_not_guessed():
    some, tally = blocks(("l", "text", 2)), Tally()
    tally.block_flops.update({"l.0": 10, "l.1": 10})
    tally.checkpointed.update({"l.0": 1, "l.1": 1})
    tally.replays["l.0"] = 1
    plan = Plan({"l.0": RECOMPUTE, "l.1": SELECTIVE})
    assert memory_report(plan, some, tally, 0.5)["recomputed_flops_share"] == 0.25
    tally.replays["l.1"] = 1
    assert memory_report(plan, some, tally, 0.5)["recomputed_flops_share"] is None
