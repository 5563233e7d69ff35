"""Plans as data, and the policies that make them."""

import json

import pytest
from tiny_models import CASES, llama
from torch import nn

from ckpt_trainer.blocks import Block, find_blocks
from ckpt_trainer.plan import KEEP, RECOMPUTE, Action, Plan, Settings, fold_names
from ckpt_trainer.policies import make_plan


def blocks(*stacks):
    """Blocks named by stack: `("vision", "vision", 3)` is (stack, component, number)."""
    return [
        Block(f"{stack}.{index}", nn.Linear(1, 1), stack, component, True)
        for stack, component, number in stacks
        for index in range(number)
    ]


def kinds(plan):
    return [action.kind for action in plan.actions.values()]


def test_json_round_trip_keeps_order_and_reasons():
    plan = Plan({"b.1": RECOMPUTE, "a.0": Action("keep", "every_n=2")})
    assert Plan.from_json(plan.to_json()) == plan
    assert list(Plan.from_json(plan.to_json()).actions) == ["b.1", "a.0"]
    assert json.loads(plan.to_json())["blocks"]["b.1"] == "recompute"


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "a plan is a JSON object"), ('{"a": 1}', "a plan is a JSON object"),
     ('{"blocks": {"a": "recomput"}}', "plan entry for block 'a' is 'recomput': action 'recomput' is not one of"),
     ('{"blocks": {"a": {"king": "keep"}}}', "plan entry for block 'a'"), ("{", "this text is not JSON")],
)  # fmt: skip
def test_bad_json_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_the_table_folds_equal_neighbours():
    plan = Plan({**{f"m.layers.{i}": RECOMPUTE for i in range(3)}, "m.layers.3": KEEP, "head": KEEP})
    assert str(plan).splitlines() == [
        "blocks        number  action",
        "------------  ------  ---------",
        "m.layers.0-2  3       recompute",
        "m.layers.3    1       keep",
        "head          1       keep",
    ]


@pytest.mark.parametrize(
    ("names", "folded"),
    [(["a.0"], "a.0"), (["a.0", "a.1", "a.2"], "a.0-2"), (["a.0.b", "a.1.b"], "a.0-1.b"),
     (["s.0.l.0", "s.0.l.1", "s.1.l.0"], "s.0-1.l.0"), (["s.0.l.0", "s.1.l.1"], "s.0.l.0 .. s.1.l.1")],
)  # fmt: skip
def test_fold_names(names, folded):
    assert fold_names(names) == folded


def test_none_and_full():
    some = blocks(("l", "text", 3))
    assert kinds(make_plan(some, Settings(mode="none"))) == ["keep"] * 3
    assert kinds(make_plan(some, Settings(mode="full"))) == ["recompute"] * 3


def test_every_n_counts_each_stack_by_itself():
    some = blocks(("v", "vision", 3), ("l", "text", 4))
    plan = make_plan(some, Settings(every_n=2))
    assert kinds(plan) == ["recompute", "keep", "recompute", "recompute", "keep", "recompute", "keep"]
    assert plan["v.1"].reason == "every_n=2"


@pytest.mark.parametrize(
    ("modules", "expected"),
    [((("vision", "none"),), "kkrr"), ((("v.*", "none"),), "kkrr"), ((("v", "none"),), "kkrr"),
     ((("*.1", "none"),), "rkrk"), ((("v.0", "full"), ("vision", "none")), "rkrr"),
     ((("vision", "none"), ("v.0", "full")), "kkrr"), ((("*", "none"), ("text", "full")), "kkkk")],
    ids=str,
)  # fmt: skip
def test_parts_follow_the_first_key_that_names_them(modules, expected):
    plan = make_plan(blocks(("v", "vision", 2), ("l", "text", 2)), Settings(modules=modules))
    assert "".join(kind[0] for kind in kinds(plan)) == expected


def test_a_part_can_be_turned_on_where_the_mode_is_none():
    plan = make_plan(blocks(("v", "vision", 2), ("l", "text", 2)), Settings(mode="none", modules=(("text", "full"),)))
    assert kinds(plan) == ["keep", "keep", "recompute", "recompute"]


def test_a_key_that_names_nothing_lists_what_is_there():
    with pytest.raises(ValueError, match=r"'audio', which matches no block. Blocks of this model: l \(2 x text\)"):
        make_plan(blocks(("l", "text", 2)), Settings(modules=(("audio", "full"),)))


def test_frozen_blocks_say_so():
    model = llama(2)
    model.model.layers[0].requires_grad_(False)
    plan = make_plan(find_blocks(model), Settings())
    assert [action.reason for action in plan.actions.values()] == ["frozen, if a gradient passes", ""]


def test_a_vision_language_model_by_parts():
    found = find_blocks(CASES["llava"].build())
    plan = make_plan(found, Settings(modules=(("vision", "none"),)))
    assert {block.component: plan[block.name].kind for block in found} == {"vision": "keep", "text": "recompute"}
