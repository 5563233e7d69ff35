"""Actions and plans as data."""

import json

import pytest

from ckpt_trainer.plan import (
    KEEP,
    KINDS,
    RECOMPUTE,
    SELECTIVE,
    TIERS,
    Action,
    Plan,
    fold_names,
    read_save,
)


def test_a_selective_action_stores_the_first_tier_unless_told():
    assert Action("selective").save == SELECTIVE.save == ("expensive",)
    assert Action("selective", save=("mm", " mlp.* ", "mm")).save == ("mm", "mlp.*")
    assert Action("selective", save=["attention"]) == Action("selective", save="attention")
    assert hash(Action("selective", save=["mm"])) == hash(Action("selective", save=("mm",)))
    assert KEEP.save == RECOMPUTE.save == ()


@pytest.mark.parametrize("kind", ["keep", "recompute"])
def test_only_selective_stores_by_name(kind):
    with pytest.raises(
        ValueError, match=rf"action '{kind}' cannot have save=\('mm',\): only 'selective' stores by name"
    ):
        Action(kind, save=("mm",))


@pytest.mark.parametrize(
    ("kind", "hint"),
    [("full", r" Did you mean 'recompute'\?$"), ("none", r" Did you mean 'keep'\?$"), ("x", "$"), (["keep"], "$"),
     (None, "$")],
)  # fmt: skip
def test_an_unknown_kind_lists_all(kind, hint):
    with pytest.raises(ValueError, match=r"is not one of keep, selective, recompute\." + hint):
        Action(kind)


ACTIONS = [
    (KEEP, "keep", "keep"),
    (RECOMPUTE, "recompute", "recompute"),
    (SELECTIVE, "selective:expensive", "selective:expensive"),
    (Action("selective", save=("mm", "attention")), "selective:mm,attention", "selective:mm,attention"),
    (Action("selective", save=("aten::mm", "*.norm")), "selective:aten::mm,*.norm", "selective:aten::mm,*.norm"),
    (Action("keep", "why"), "keep (why)", {"kind": "keep", "reason": "why"}),
    (
        Action("selective", "why", ("mm", "attention")),
        "selective:mm,attention (why)",
        {"kind": "selective", "save": ["mm", "attention"], "reason": "why"},
    ),
]


@pytest.mark.parametrize(("action", "text", "entry"), ACTIONS)
def test_actions_as_text_and_in_json(action, text, entry):
    assert str(action) == text
    assert Action.from_text(action.short) == Action(action.kind, save=action.save)
    plan = Plan({"a": action})
    assert plan.as_data() == json.loads(plan.to_json()) == {"blocks": {"a": entry}}
    assert Plan.from_json(plan.to_json()) == plan


def test_text_of_an_action_may_leave_out_the_tier():
    assert Action.from_text("selective") == SELECTIVE
    assert Action.from_text("selective: mm , attention").save == ("mm", "attention")
    assert {Action.from_text(kind).kind for kind in KINDS} == set(KINDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep:mm", r"action 'keep' cannot have save=\('mm',\)"),
        ("selective:", r"'' is not one of expensive, matmul, half_matmul, attention, or a list of op names"),
        ("selectiv:mm", "action 'selectiv' is not one of"),
        ("selective:atention", "'atention' is not a tier. Did you mean 'attention'"),
    ],
)
def test_bad_text_of_an_action(text, message):
    with pytest.raises(ValueError, match=message):
        Action.from_text(text)


# What is stored.


@pytest.mark.parametrize(
    ("value", "names"),
    [*((tier, (tier,)) for tier in TIERS), ("mm", ("mm",)), ("attention,matmul", ("attention", "matmul")),
     ("aten.mm.default, mlp.*,*.input_layernorm", ("aten.mm.default", "mlp.*", "*.input_layernorm")),
     (["mm", "attention"], ("mm", "attention")), (("mm", "mm"), ("mm",)), ("self_attention", ("self_attention",)),
     ("attn", ("attn",)), ("bmm,addmm,linear", ("bmm", "addmm", "linear")), ("expensive.*", ("expensive.*",)),
     ("attention_1", ("attention_1",)), ("*attentio", ("*attentio",))],
)  # fmt: skip
def test_what_is_stored_may_be_a_tier_or_names(value, names):
    assert read_save(value) == names


@pytest.mark.parametrize(
    "value", ["", " ", ",", "mm,", "mm,,attention", [], (), [""], ["mm", " "], ["mm", 3], 3, None, {"mm": 1}, True]
)
def test_what_is_stored_must_have_names(value):
    with pytest.raises(ValueError) as caught:
        read_save(value)
    message = " is not one of expensive, matmul, half_matmul, attention, or a list of op names and module globs."
    assert str(caught.value) == f"{value!r}{message}"


@pytest.mark.parametrize("tier", ["expensive", "half_matmul"])
@pytest.mark.parametrize("value", ["{},mm", "mm,{}", "attention,{}", "{},mlp.*", "expensive,half_matmul"])
def test_these_tiers_stand_alone(tier, value):
    with pytest.raises(
        ValueError, match=rf"'(expensive|{tier})' stands alone, and .* are 2\. A list holds names of ops"
    ):
        read_save(value.format(tier))


@pytest.mark.parametrize(
    ("value", "near"),
    [("expnsive", "expensive"), ("Expensive", "expensive"), ("half-matmul", "half_matmul"), ("matmuls", "matmul"),
     ("attention ,mattmul", "matmul"), ("atention,mm", "attention"), ("HALF_MATMUL", "half_matmul")],
)  # fmt: skip
def test_a_misspelled_tier_is_no_name(value, near):
    with pytest.raises(ValueError, match=rf"is not a tier. Did you mean '{near}'\? A module so named is '\*"):
        read_save(value)


# Plans.


def test_json_round_trip_keeps_order_and_reasons():
    plan = Plan({"b.1": RECOMPUTE, "a.0": Action("keep", "every_n=2"), "c": Action("selective", "x", ("mm",))})
    assert Plan.from_json(plan.to_json()) == plan
    assert list(Plan.from_json(plan.to_json()).actions) == ["b.1", "a.0", "c"]
    assert json.loads(plan.to_json())["blocks"]["b.1"] == "recompute"


def test_a_plan_is_active_where_one_block_is_not_kept():
    assert Plan({"a": KEEP, "b": SELECTIVE}).is_active
    assert Plan({"a": RECOMPUTE}).is_active
    assert not Plan({"a": KEEP, "b": Action("keep", "why")}).is_active
    assert not Plan({}).is_active


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "a plan is a JSON object"), ('{"a": 1}', "a plan is a JSON object"),
     ('{"blocks": {"a": "recomput"}}', "plan entry for block 'a' is 'recomput': action 'recomput' is not one of"),
     ('{"blocks": {"a": {"king": "keep"}}}', "plan entry for block 'a'"), ("{", "this text is not JSON"),
     ('{"blocks": {"a": 3}}', "plan entry for block 'a' is 3: action 3 is not one of"),
     ('{"blocks": {"a": "full"}}', "Did you mean 'recompute'?"),
     ('{"blocks": {"a": "selective:expnsive"}}', "plan entry for block 'a' is 'selective:expnsive': 'expnsive' is not a"),
     ('{"blocks": {"a": {"kind": "selective", "save": [3]}}}', "plan entry for block 'a' is "),
     ('{"blocks": {"a": {"kind": "keep", "save": "mm"}}}', "only 'selective' stores by name")],
)  # fmt: skip
def test_bad_json_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_the_table_folds_equal_neighbours():
    some = {f"m.layers.{i}": Action("selective", save=("mm",)) for i in (3, 4)}
    plan = Plan({**{f"m.layers.{i}": RECOMPUTE for i in range(3)}, **some, "m.layers.5": SELECTIVE, "head": KEEP})
    assert str(plan).splitlines() == [
        "blocks        number  action",
        "------------  ------  -------------------",
        "m.layers.0-2  3       recompute",
        "m.layers.3-4  2       selective:mm",
        "m.layers.5    1       selective:expensive",
        "head          1       keep",
    ]


@pytest.mark.parametrize(
    ("names", "folded"),
    [(["a.0"], "a.0"), (["a.0", "a.1", "a.2"], "a.0-2"), (["a.0.b", "a.1.b"], "a.0-1.b"),
     (["s.0.l.0", "s.0.l.1", "s.1.l.0"], "s.0-1.l.0"), (["s.0.l.0", "s.1.l.1"], "s.0.l.0 .. s.1.l.1")],
)  # fmt: skip
def test_fold_names(names, folded):
    assert fold_names(names) == folded
