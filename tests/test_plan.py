"""Actions and plans as data."""

import json

import pytest

from ckpt_trainer.plan import (
    KEEP,
    KINDS,
    MODES,
    OFFLOAD_SAVES,
    PLACES,
    RECOMPUTE,
    SELECTIVE,
    TIERS,
    Action,
    Plan,
    Settings,
    fold_names,
    offload_action,
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
     (None, "$"), ("offload", r" Did you mean 'recompute@host'\?$"), ("cpu", "$")],
)  # fmt: skip
def test_an_unknown_kind_lists_all(kind, hint):
    with pytest.raises(ValueError, match=r"is not one of keep, selective, recompute\." + hint):
        Action(kind)


@pytest.mark.parametrize(
    ("place", "hint"),
    [("cpu", r" Did you mean 'host'\?$"), ("pageable", r" Did you mean 'host'\?$"),
     ("nvme", r" Did you mean 'disk'\?$"), ("", "$"), ("Host", "$"), (None, "$"), (["host"], "$"), ("full", "$")],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_place_lists_all(kind, place, hint):
    with pytest.raises(ValueError, match=r"^place .* is not one of device, host, disk\." + hint):
        Action(kind, place=place)


def test_places():
    assert PLACES == ("device", "host", "disk")
    assert Action("keep").place == SELECTIVE.place == RECOMPUTE.place == "device"
    assert Action("recompute", place="host") != RECOMPUTE
    assert Action("keep", "", (), "disk") == Action("keep", place="disk")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_only_what_is_kept_on_the_device_is_left_alone(kind, place):
    action = Action(kind, "why", place=place)
    assert action.does_nothing is (kind == "keep" and place == "device")
    assert Plan({"a": KEEP, "b": action}).is_active is not action.does_nothing


def test_the_modes_there_are():
    assert MODES == ("none", "selective", "full", "offload", "auto")


@pytest.mark.parametrize("place", ["host", "disk"])
def test_what_mode_offload_does_to_a_block(place):
    assert OFFLOAD_SAVES == ("inputs", "expensive", "matmul", "half_matmul", "attention", "all")
    assert [str(offload_action(save, place)) for save in OFFLOAD_SAVES] == [
        f"{what}@{place}" for what in ("recompute", *(f"selective:{tier}" for tier in TIERS), "keep")
    ]


@pytest.mark.parametrize(("target", "place"), [("host", "host"), ("pageable", "host"), ("disk", "disk")])
def test_the_place_of_mode_offload(target, place):
    assert Settings(offload_to=target).offload_place == place


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
    (Action("recompute", place="host"), "recompute@host", "recompute@host"),
    (Action("keep", place="disk"), "keep@disk", "keep@disk"),
    (
        Action("selective", save=("mm", "mlp.*"), place="host"),
        "selective:mm,mlp.*@host",
        "selective:mm,mlp.*@host",
    ),
    (Action("keep", "why", place="host"), "keep@host (why)", {"kind": "keep", "place": "host", "reason": "why"}),
    (
        Action("selective", "why", place="disk"),
        "selective:expensive@disk (why)",
        {"kind": "selective", "save": ["expensive"], "place": "disk", "reason": "why"},
    ),
]


@pytest.mark.parametrize(("action", "text", "entry"), ACTIONS)
def test_actions_as_text_and_in_json(action, text, entry):
    assert str(action) == text
    assert Action.from_text(action.short) == Action(action.kind, save=action.save, place=action.place)
    plan = Plan({"a": action})
    assert plan.as_data() == json.loads(plan.to_json()) == {"blocks": {"a": entry}}
    assert Plan.from_json(plan.to_json()) == plan


def test_text_of_an_action_may_leave_out_the_tier():
    assert Action.from_text("selective") == SELECTIVE
    assert Action.from_text("selective: mm , attention").save == ("mm", "attention")
    assert Action.from_text("selective@host") == Action("selective", save=("expensive",), place="host")
    assert {Action.from_text(kind).kind for kind in KINDS} == set(KINDS)


def test_text_of_an_action_may_say_that_it_is_on_the_device():
    assert [Action.from_text(f"{kind}@device") for kind in KINDS] == [KEEP, SELECTIVE, RECOMPUTE]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep:mm", r"action 'keep' cannot have save=\('mm',\)"),
        ("selective:", r"'' is not one of expensive, matmul, half_matmul, attention, or a list of op names"),
        ("selectiv:mm", "action 'selectiv' is not one of"),
        ("recompute@", "place '' is not one of device, host, disk"),
        ("@host", "action '' is not one of"),
        ("recompute@hots", "place 'hots' is not one of device, host, disk"),
        ("recompute@host@disk", "place 'host@disk' is not one of"),
        ("keep:mm@host", r"action 'keep' cannot have save=\('mm',\)"),
        ("selective:@host", "'' is not one of expensive, matmul"),
        ("selective:atention@host", "'atention' is not a tier"),
        ("offload:attention", "Did you mean 'recompute@host'"),
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
     ('{"blocks": {"a": "keep@cpu"}}', "plan entry for block 'a' is 'keep@cpu': place 'cpu' is not one of"),
     ('{"blocks": {"a": {"kind": "keep", "place": 3}}}', "plan entry for block 'a' is .* place 3 is not one of"),
     ('{"blocks": {"a": "selective:expnsive"}}', "plan entry for block 'a' is 'selective:expnsive': 'expnsive' is not a"),
     ('{"blocks": {"a": {"kind": "selective", "save": [3]}}}', "plan entry for block 'a' is "),
     ('{"blocks": {"a": {"kind": "keep", "save": "mm"}}}', "only 'selective' stores by name")],
)  # fmt: skip
def test_bad_json_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_the_table_folds_equal_neighbours():
    some = {f"m.layers.{i}": Action("selective", save=("mm",)) for i in (3, 4)}
    moved = Action("recompute", place="host")
    plan = Plan({**{f"m.layers.{i}": RECOMPUTE for i in range(3)}, **some, "m.layers.5": SELECTIVE, "head": KEEP})
    plan = Plan({**plan.actions, "m.layers.6": moved, "m.layers.7": moved})
    assert str(plan).splitlines() == [
        "blocks        number  action",
        "------------  ------  -------------------",
        "m.layers.0-2  3       recompute",
        "m.layers.3-4  2       selective:mm",
        "m.layers.5    1       selective:expensive",
        "head          1       keep",
        "m.layers.6-7  2       recompute@host",
    ]


@pytest.mark.parametrize(
    ("names", "folded"),
    [(["a.0"], "a.0"), (["a.0", "a.1", "a.2"], "a.0-2"), (["a.0.b", "a.1.b"], "a.0-1.b"),
     (["s.0.l.0", "s.0.l.1", "s.1.l.0"], "s.0-1.l.0"), (["s.0.l.0", "s.1.l.1"], "s.0.l.0 .. s.1.l.1")],
)  # fmt: skip
def test_fold_names(names, folded):
    assert fold_names(names) == folded
