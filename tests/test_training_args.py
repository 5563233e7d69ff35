import copy
import dataclasses
import functools
import json
import logging
import os
import pickle
import tempfile

import pytest
import trl
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from ckpt_trainer.plan import OFFLOAD_SAVES, RECOMPUTE, SELECTIVE, TIERS, Action, Part, Plan, Settings, SizePlan
from ckpt_trainer.training_args import (
    CheckpointingArguments,
    CheckpointSeq2SeqTrainingArguments,
    CheckpointTrainingArguments,
    settings_of,
    settings_of_flags,
)

# HF's own word on its old names, which half of these tests use on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning")

FLAGS = {
    "checkpointing_mode": None,
    "checkpointing_modules": None,
    "checkpointing_every_n": 1,
    "checkpointing_save": "expensive",
    "checkpointing_segment": 1,
    "checkpointing_plan": None,
    "checkpointing_offload_save": "inputs",
    "checkpointing_offload_to": "host",
    "checkpointing_offload_dir": None,
    "checkpointing_host_budget": 0.8,
    "checkpointing_prefetch": 1,
    "checkpointing_budget": 0.9,
    "checkpointing_oom_retries": 3,
    "checkpointing_compile_budget": None,
    "checkpointing_skip_frozen": True,
    "checkpointing_use_reentrant": False,
    "checkpointing_input_grads": "auto",
    "checkpointing_kbit_upcast": "none",
    "checkpointing_self_check": True,
}
HF_FIELDS = {f.name for f in dataclasses.fields(TrainingArguments)}
# transformers 5 turns the cache off unless asked; 4.57 says nothing about it.
expected = functools.partial(Settings, use_cache=False if "use_cache" in HF_FIELDS else None)
full = functools.partial(expected, mode="full")
NEW_NAMES = "activation_checkpointing" in HF_FIELDS  # transformers 5.x
needs_new_names = pytest.mark.skipif(not NEW_NAMES, reason="transformers 4.57 has the gradient_* names only")
NAMES = ["activation_checkpointing", "gradient_checkpointing"] if NEW_NAMES else ["gradient_checkpointing"]
KWARGS = [f"{name}_kwargs" for name in NAMES]


FOLDER = tempfile.gettempdir()


def contexts():
    raise NotImplementedError


@pytest.fixture
def make(tmp_path):
    def make(cls=CheckpointTrainingArguments, **flags):
        return cls(output_dir=str(tmp_path), report_to=[], **flags)

    return make


@pytest.fixture
def parse(tmp_path):
    def parse(*words, cls=CheckpointTrainingArguments):
        (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--report_to", "none", *words]
        )
        return args

    return parse


PLAN = Plan({"l.0": RECOMPUTE, "l.1": Action("keep", "why"), "l.2": RECOMPUTE})


@pytest.fixture
def plan_file(tmp_path):
    """Write a plan, or text, and return the path."""

    def plan_file(content=PLAN):
        path = tmp_path / "plan.json"
        path.write_text(content.to_json() if isinstance(content, Plan) else content)
        return str(path)

    return plan_file


@pytest.fixture
def warnings_of(caplog):
    """Run an action and return what it warned of."""

    def warnings_of(action):
        logger = logging.getLogger("ckpt_trainer.training_args")
        type(logger).warning_once.cache_clear()  # a message of an earlier test would stay silent
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger=logger.name):
            action()
        return [record.getMessage() for record in caplog.records if record.name == logger.name]

    return warnings_of


# The fields.


def test_the_flags_are_these_and_no_others():
    assert {f.name: f.default for f in dataclasses.fields(CheckpointingArguments)} == FLAGS
    for cls, parent in (
        (CheckpointTrainingArguments, TrainingArguments),
        (CheckpointSeq2SeqTrainingArguments, Seq2SeqTrainingArguments),
    ):
        names = [f.name for f in dataclasses.fields(cls)]
        assert names == [f.name for f in dataclasses.fields(parent)] + list(FLAGS)


def test_no_flag_shadows_one_of_hf():
    for flag in FLAGS:
        assert not hasattr(Seq2SeqTrainingArguments, flag)
        assert not [name for name in HF_FIELDS if name.startswith(flag) or flag.startswith(name)]


def test_the_defaults_of_the_flags_are_those_of_settings(make):
    assert make().settings() == settings_of(make(TrainingArguments)) == expected()


def test_every_flag_becomes_a_setting(make, tmp_path):
    args = make(
        checkpointing_mode="none",
        checkpointing_modules={"vision": "full", "*.layers.3": "none"},
        checkpointing_every_n=2,
        checkpointing_save=["mm", "mlp.*"],
        checkpointing_offload_save="attention",
        checkpointing_offload_to="disk",
        checkpointing_offload_dir=str(tmp_path),
        checkpointing_host_budget="64GiB",
        checkpointing_prefetch=2,
        checkpointing_budget="20GiB",
        checkpointing_oom_retries=5,
        checkpointing_skip_frozen=False,
        checkpointing_use_reentrant=True,
        checkpointing_input_grads="never",
        checkpointing_compile_budget=0.5,
        checkpointing_kbit_upcast="norms",
        checkpointing_self_check=False,
    )
    assert args.settings() == expected(
        mode="none",
        modules=(Part("vision", "full"), Part("*.layers.3", "none")),
        every_n=2,
        save=("mm", "mlp.*"),
        offload_save="attention",
        offload_to="disk",
        offload_dir=str(tmp_path),
        host_budget=64 * 2**30,
        prefetch=2,
        budget=20 * 2**30,
        oom_retries=5,
        skip_frozen=False,
        use_reentrant=True,
        input_grads="never",
        compile_budget=0.5,
        kbit_upcast="norms",
        self_check=False,
    )


def test_use_cache_is_taken_over_where_hf_has_it(make):
    if "use_cache" not in HF_FIELDS:
        pytest.skip("this transformers has no use_cache argument")
    assert make(use_cache=True).settings().use_cache is True
    assert settings_of(make(TrainingArguments, use_cache=True)).use_cache is True
    assert make(use_cache=False).settings().use_cache is False


# Command line and files.


def test_command_line_sets_every_flag(parse):
    settings = parse(
        *("--checkpointing_mode", "none", "--checkpointing_every_n", "3", "--checkpointing_skip_frozen", "False"),
        *("--checkpointing_save", "attention"),
        *("--checkpointing_modules", '{"vision": "full"}', "--checkpointing_use_reentrant"),
        *("--checkpointing-input-grads", "always", "--no_checkpointing_self_check"),
    ).settings()
    assert settings == expected(
        mode="none",
        modules=(Part("vision", "full"),),
        every_n=3,
        save=("attention",),
        skip_frozen=False,
        use_reentrant=True,
        input_grads="always",
        self_check=False,
    )


def test_command_line_sets_every_flag_of_offload(parse, tmp_path):
    settings = parse(
        *("--checkpointing_mode", "offload", "--checkpointing_offload_save", "attention"),
        *("--checkpointing_offload_to", "disk", "--checkpointing_offload_dir", str(tmp_path)),
        *("--checkpointing_host_budget", "1.5 MiB", "--checkpointing_prefetch", "0"),
    ).settings()
    assert settings == expected(
        mode="offload",
        offload_save="attention",
        offload_to="disk",
        offload_dir=str(tmp_path),
        host_budget=3 * 2**19,
        prefetch=0,
    )
    assert settings.offload_place == "disk"


def test_command_line_sets_every_flag_of_auto(parse):
    words = ("--checkpointing_mode", "auto", "--checkpointing_budget", "20GiB", "--checkpointing_oom_retries", "0")
    assert parse(*words).settings() == expected(mode="auto", budget=20 * 2**30, oom_retries=0)


BUDGETS = [
    (0.8, 0.8), ("0.8", 0.8), (1, 1.0), ("1", 1.0), (1.0, 1.0), ("1.0", 1.0), (1e-3, 0.001), ("0.25", 0.25),
    (0, 0), ("0", 0), ("0B", 0), ("64GiB", 2**36), ("64 GiB", 2**36), ("1.5MiB", 3 * 2**19), ("512MB", 512 * 10**6),
    (4096, 4096), ("4096", 4096), (2**40, 2**40), ("64B", 64), ("1B", 1), (None, 0.8),
]  # fmt: skip


# Flag -> its mode, its setting, and that by default.
OF_BUDGETS = {
    "checkpointing_host_budget": ("offload", "host_budget", 0.8),
    "checkpointing_budget": ("auto", "budget", 0.9),
}


@pytest.mark.parametrize("flag", OF_BUDGETS)
@pytest.mark.parametrize(("value", "budget"), BUDGETS)
def test_a_budget_is_a_share_or_a_size(make, flag, value, budget):
    mode, setting, default = OF_BUDGETS[flag]
    args = make(checkpointing_mode=mode, **{flag: value})
    found, wanted = getattr(args.settings(), setting), default if value is None else budget
    assert (found, type(found)) == (wanted, type(wanted))
    assert getattr(args, flag) == value  # as it was given


@pytest.mark.parametrize("flag", OF_BUDGETS)
@pytest.mark.parametrize(("value", "budget"), [case for case in BUDGETS if isinstance(case[0], str)])
def test_command_line_takes_a_budget_as_it_is(parse, flag, value, budget):
    mode, setting, _ = OF_BUDGETS[flag]
    found = getattr(parse("--checkpointing_mode", mode, f"--{flag}", value).settings(), setting)
    assert (found, type(found)) == (budget, type(budget))


def test_command_line_modules_become_a_dict(parse):
    assert parse("--checkpointing_modules", '{"vision": "full"}').checkpointing_modules == {"vision": "full"}


@pytest.mark.parametrize(
    ("text", "save"),
    [
        ("expensive", ("expensive",)),
        ("half_matmul", ("half_matmul",)),
        ("mm, attention,*.input_layernorm", ("mm", "attention", "*.input_layernorm")),
        ('["mm", "mlp.*"]', ("mm", "mlp.*")),
    ],
)
def test_command_line_takes_what_is_stored(parse, text, save):
    args = parse("--checkpointing_mode", "selective", "--checkpointing_save", text)
    assert args.settings() == expected(mode="selective", save=save)
    assert args.checkpointing_save == (list(save) if text.startswith("[") else text)


@pytest.mark.parametrize(("text", "segment"), [("4", 4), ("sqrt", "sqrt"), ("1", 1)])
def test_command_line_takes_segments(parse, text, segment):
    args = parse("--checkpointing_segment", text)
    assert args.checkpointing_segment == args.settings().segment == segment


def test_command_line_takes_a_plan(parse, plan_file):
    assert parse("--checkpointing_plan", plan_file()).settings() == expected(plan=PLAN)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [["True"], []])
def test_command_line_takes_hf_flags(parse, name, value):
    args = parse(f"--{name}", *value)
    assert getattr(args, name) is True
    assert args.settings().mode == "full"


@pytest.mark.parametrize("name", KWARGS)
def test_command_line_takes_hf_kwargs(parse, name):
    text = '{"every_n_layers": 2, "use_reentrant": "false", "preserve_rng_state": false, "determinism_check": "none"}'
    settings = parse(f"--{name}", text).settings()
    assert settings == full(every_n=2, preserve_rng_state=False, checkpoint_options={"determinism_check": "none"})


def test_command_line_seq2seq(parse):
    args = parse("--predict_with_generate", "--checkpointing_mode", "none", cls=CheckpointSeq2SeqTrainingArguments)
    assert args.predict_with_generate is True
    assert args.settings().mode == "none"


def test_abbreviations_of_hf_flags_still_resolve(parse):
    assert parse("--gradient_checkpointing_k", '{"every_n_layers": 2}').settings().every_n == 2
    assert parse("--checkpointing_e", "2").settings().every_n == 2


def test_bad_value_on_the_command_line(parse):
    with pytest.raises(ValueError, match="checkpointing_mode='fulll'"):
        parse("--checkpointing_mode", "fulll")


def test_help_renders_every_flag():
    # The mixin alone: in 4.57 HF's own help has a bare percent sign and does not render.
    text = HfArgumentParser(CheckpointingArguments).format_help()
    assert [flag for flag in FLAGS if f"--{flag} " not in text] == []
    if NEW_NAMES:
        assert "--checkpointing_mode" in HfArgumentParser(CheckpointTrainingArguments).format_help()


def test_every_flag_has_help():
    for flag in dataclasses.fields(CheckpointingArguments):
        assert flag.metadata["help"].endswith(".")
        assert "%" not in flag.metadata["help"].replace("%%", "")


FILES = [
    (
        {"checkpointing_mode": "none", "checkpointing_modules": {"text": "full"}, "checkpointing_every_n": 2,
         "gradient_checkpointing_kwargs": {"preserve_rng_state": False}},
        expected(mode="none", modules=(Part("text", "full"),), every_n=2, preserve_rng_state=False),
    ),
    (
        {"checkpointing_mode": "selective", "checkpointing_save": ["mm", "attention"],
         "checkpointing_modules": {"text": "selective:matmul", "vision": "full"}, "checkpointing_segment": 4},
        expected(mode="selective", modules=(Part("text", "selective", ("matmul",)), Part("vision", "full")),
                 save=("mm", "attention"), segment=4),
    ),
    (
        {"checkpointing_mode": "selective", "checkpointing_save": "mm,attention", "checkpointing_plan": None},
        expected(mode="selective", save=("mm", "attention")),
    ),
    (
        {"checkpointing_mode": "offload", "checkpointing_host_budget": 0.5, "checkpointing_prefetch": 3,
         "checkpointing_modules": {"text": "offload:attention"}, "checkpointing_offload_dir": None},
        expected(mode="offload", modules=(Part("text", "offload", offload_save="attention"),), host_budget=0.5,
                 prefetch=3),
    ),
    (
        {"checkpointing_mode": "offload", "checkpointing_host_budget": "20GiB", "checkpointing_offload_save": "all",
         "checkpointing_offload_to": "pageable"},
        expected(mode="offload", offload_save="all", offload_to="pageable", host_budget=20 * 2**30),
    ),
    (
        {"checkpointing_mode": "full", "gradient_checkpointing_kwargs": {"offload": False}},
        full(),
    ),
    (
        {"checkpointing_mode": "auto", "checkpointing_budget": "20GiB", "checkpointing_oom_retries": 0},
        expected(mode="auto", budget=20 * 2**30, oom_retries=0),
    ),
    (
        {"checkpointing_budget": 0.5, "checkpointing_modules": {"vision": "full", "text": "auto"}},
        expected(budget=0.5, modules=(Part("vision", "full"), Part("text", "auto"))),
    ),
    ({"checkpointing_budget": None}, expected()),
    (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True, "every_n_layers": 2}},
        expected(mode="offload", every_n=2),
    ),
    (
        {"checkpointing_segment": "sqrt", "checkpointing_save": None, "checkpointing_modules": None},
        full(segment="sqrt"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("content", "settings"), FILES)
@pytest.mark.parametrize("suffix", ["json", "yaml", "dict"])
def test_files_and_dicts(tmp_path, suffix, content, settings):
    content = {"output_dir": str(tmp_path), "report_to": [], **content}
    parser, path = HfArgumentParser(CheckpointTrainingArguments), tmp_path / f"args.{suffix}"
    if suffix == "dict":
        (args,) = parser.parse_dict(content)
    else:
        path.write_text(json.dumps(content))  # JSON is YAML
        (args,) = getattr(parser, f"parse_{suffix}_file")(str(path))
    assert args.settings() == settings


# Modes of parts, segments, plans.


@pytest.mark.parametrize(
    ("mode", "part"),
    [
        ("selective", Part("text", "selective", ("attention", "mm"))),
        ("selective:matmul", Part("text", "selective", ("matmul",))),
        ("selective:mm,mlp.*", Part("text", "selective", ("mm", "mlp.*"))),
        ("selective:aten::mm", Part("text", "selective", ("aten::mm",))),
        ("full", Part("text", "full")),
        ("none", Part("text", "none")),
    ],
)
def test_parts_store_what_they_say_or_what_all_do(make, mode, part):
    args = make(checkpointing_modules={"text": mode}, checkpointing_save="attention,mm", checkpointing_mode="selective")
    assert args.settings().modules == (part,)


@pytest.mark.parametrize(
    ("mode", "part"),
    [("offload", Part("text", "offload", offload_save="half_matmul")),
     *((f"offload:{save}", Part("text", "offload", offload_save=save)) for save in OFFLOAD_SAVES),
     ("selective", Part("text", "selective")), ("full", Part("text", "full")), ("auto", Part("text", "auto"))],
)  # fmt: skip
def test_parts_offload_what_they_say_or_what_all_do(make, mode, part):
    args = make(
        checkpointing_modules={"text": mode}, checkpointing_offload_save="half_matmul", checkpointing_mode="offload"
    )
    assert args.settings().modules == (part,)


@pytest.mark.parametrize("folder", ["str", "path", "relative", "home"])
def test_the_folder_becomes_an_absolute_path(make, tmp_path, monkeypatch, folder):
    inner = tmp_path / "spill"
    inner.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    value = {"str": str(inner), "path": inner, "relative": "spill", "home": "~/spill"}[folder]
    args = make(checkpointing_mode="offload", checkpointing_offload_to="disk", checkpointing_offload_dir=value)
    assert isinstance(args.checkpointing_offload_dir, str)
    json.loads(args.to_json_string())
    assert args.settings().offload_dir == str(inner)
    assert list(inner.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_refused(make, tmp_path, monkeypatch):
    def refusal(folder):
        with pytest.raises(ValueError) as caught:
            make(checkpointing_mode="offload", checkpointing_offload_to="disk", checkpointing_offload_dir=folder)
        return str(caught.value)

    missing, file = str(tmp_path / "no"), tmp_path / "file"
    file.touch()
    name = "checkpointing_offload_dir"
    assert refusal(missing) == (
        f"{name}={missing!r}: {missing} does not exist. Make it, or set {name} to a folder that exists."
    )
    assert refusal(str(file)).startswith(f"{name}={str(file)!r}: {file} is not a folder. ")
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(mode))
    assert refusal(str(tmp_path)) == (
        f"{name}={str(tmp_path)!r}: this process may not write in {tmp_path}. Set {name} to a folder where it may."
    )
    assert asked == [os.W_OK | os.X_OK]


@pytest.mark.parametrize("flags", [{}, {"checkpointing_mode": "offload"}, {"checkpointing_mode": "none"}])
def test_disk_needs_a_folder(make, flags):
    with pytest.raises(ValueError) as caught:
        make(**flags, checkpointing_offload_to="disk")
    assert str(caught.value) == (
        "checkpointing_offload_to='disk' needs a folder for its file. Set checkpointing_offload_dir to one on a fast "
        "local disk."
    )


def test_disk_in_a_plan_needs_a_folder(make, plan_file, tmp_path):
    plan = Plan({"l.0": Action("keep", place="host"), "l.1": Action("recompute", place="disk")})
    with pytest.raises(ValueError, match=r"^a block at 'disk' in checkpointing_plan needs a folder"):
        make(checkpointing_plan=plan_file(plan))
    settings = make(checkpointing_plan=plan_file(plan), checkpointing_offload_dir=str(tmp_path)).settings()
    assert settings == expected(plan=plan, offload_dir=str(tmp_path))
    host = Plan({"l.0": Action("recompute", place="host")})
    assert make(checkpointing_plan=plan_file(host)).settings() == expected(plan=host)


def test_segments_and_stored_names_set_later_are_read(make):
    args = make(checkpointing_mode="selective")
    args.checkpointing_save, args.checkpointing_segment = '["mm"]', "3"
    assert args.settings() == expected(mode="selective", save=("mm",), segment=3)


def test_a_plan_file_is_read_when_settings_are_made(make, plan_file, tmp_path):
    args = make(checkpointing_plan=tmp_path / plan_file())
    assert isinstance(args.checkpointing_plan, str)  # which JSON can hold
    json.loads(args.to_json_string())
    assert args.settings() == expected(plan=PLAN)
    plan_file(Plan({"l.0": SELECTIVE}))
    assert args.settings().plan == Plan({"l.0": SELECTIVE})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "this text is not JSON"),
        ("[]", "a plan is a JSON object"),
        (
            '{"blocks": {"l.0": "recomput"}}',
            "plan entry for block 'l.0' is 'recomput': action 'recomput' is not one of",
        ),
        ('{"blocks": {"l.0": "selective:expnsive"}}', "Did you mean 'expensive'?"),
    ],
)
def test_a_bad_plan_file_names_flag_and_path(make, plan_file, content, message):
    path = plan_file(content)
    with pytest.raises(ValueError) as caught:
        make(checkpointing_plan=path)
    assert str(caught.value).startswith(f"checkpointing_plan={path!r}: ")
    assert message in str(caught.value)


def test_a_missing_plan_file_names_flag_and_path(make, tmp_path):
    path = str(tmp_path / "nothing.json")
    with pytest.raises(ValueError) as caught:
        make(checkpointing_plan=path)
    assert str(caught.value) == f"checkpointing_plan={path!r}: there is no file {path}."


def test_binary_is_no_plan(make, tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"checkpointing_plan='.*plan.json' cannot be read: 'utf-8'"):
        make(checkpointing_plan=str(tmp_path / "plan.json"))


def test_an_object_is_no_path_where_arguments_are_saved(make):
    with pytest.raises(ValueError, match=r"checkpointing_plan=.* is not the path of a JSON file"):
        make(checkpointing_plan=PLAN)


BESIDE_A_PLAN = [
    ({"checkpointing_mode": "full"}, "checkpointing_mode='full'"),
    ({"checkpointing_mode": "none"}, "checkpointing_mode='none'"),
    ({"checkpointing_modules": {"text": "full"}}, "checkpointing_modules={'text': 'full'}"),
    ({"checkpointing_every_n": 2}, "checkpointing_every_n=2"),
    ({"checkpointing_save": "mm"}, "checkpointing_save='mm'"),
    ({"checkpointing_mode": "offload"}, "checkpointing_mode='offload'"),
    ({"checkpointing_offload_save": "all"}, "checkpointing_offload_save='all'"),
    ({"gradient_checkpointing_kwargs": {"offload": True}}, "gradient_checkpointing_kwargs['offload']=True"),
    ({"gradient_checkpointing": True}, "gradient_checkpointing=True"),
    ({"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "gradient_checkpointing_kwargs['every_n_layers']"),
]


@pytest.mark.parametrize(("flags", "named"), BESIDE_A_PLAN)
def test_a_plan_and_something_else_that_plans_are_one_too_many(make, plan_file, flags, named):
    path = plan_file()
    with pytest.raises(ValueError) as caught:
        make(checkpointing_plan=path, **flags)
    message = str(caught.value)
    assert message.startswith(f"checkpointing_plan={path!r} and ")
    assert named in message
    assert message.endswith(" both say what is done to each block. Remove one of them.")


def test_a_plan_goes_with_flags_that_do_not_plan(make, plan_file):
    settings = make(
        checkpointing_plan=plan_file(),
        checkpointing_mode=None,
        checkpointing_modules={},
        checkpointing_segment=2,
        checkpointing_skip_frozen=False,
        checkpointing_use_reentrant=False,
        checkpointing_offload_save="inputs",
        gradient_checkpointing_kwargs={"determinism_check": "none", "offload": False},
    ).settings()
    options = {"determinism_check": "none"}
    assert settings == expected(plan=PLAN, segment=2, skip_frozen=False, checkpoint_options=options)


def test_a_default_of_the_args_class_gives_way_to_a_plan(make, plan_file):
    assert make(TheirDefaults, checkpointing_plan=plan_file()).settings().plan == PLAN
    assert make(OurDefaults, checkpointing_plan=plan_file()).settings().plan == PLAN


def test_a_default_that_gave_way_to_a_plan_is_not_warned_of(make, plan_file, warnings_of):
    def with_plan(plan, **flags):
        return warnings_of(lambda: make(OurDefaults, checkpointing_plan=plan_file(plan), **flags))

    assert with_plan(Plan({})) == []
    assert with_plan(PLAN, checkpointing_segment=2) == []


# What does not go together.

ONE_SELECTIVE = Plan({"l.0": RECOMPUTE, "l.1": SELECTIVE})
ONE_MOVED = Plan({"l.0": Action("keep", place="host"), "l.1": Action("selective", place="host")})
OFFLOAD_MODE = {"checkpointing_mode": "offload"}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"checkpointing_mode": "selective"}, "checkpointing_mode='selective'"),
        ({"checkpointing_mode": "auto"}, "checkpointing_mode='auto'"),
        (
            {"checkpointing_mode": "full", "checkpointing_modules": {"l": "auto"}},
            "'auto' in checkpointing_modules['l']",
        ),
        ({"checkpointing_modules": {"v": "full", "l": "selective:mm"}}, "'selective' in checkpointing_modules['l']"),
        ({"checkpointing_plan": ONE_SELECTIVE}, "a selective block in checkpointing_plan"),
        ({"checkpointing_plan": ONE_MOVED}, "a selective block in checkpointing_plan"),
        *(
            ({**OFFLOAD_MODE, "checkpointing_offload_save": tier}, f"checkpointing_offload_save={tier!r}")
            for tier in TIERS
        ),
        (
            {"checkpointing_modules": {"v": "offload", "l": "offload:attention"}},
            "'offload:attention' in checkpointing_modules['l']",
        ),
        (
            {"checkpointing_modules": {"l": "offload"}, "checkpointing_offload_save": "matmul"},
            "'offload:matmul' in checkpointing_modules['l']",
        ),
        ({**OFFLOAD_MODE, "checkpointing_segment": 2}, "checkpointing_segment=2"),
        ({"checkpointing_segment": 2}, "checkpointing_segment=2"),
        ({"checkpointing_segment": "sqrt"}, "checkpointing_segment='sqrt'"),
    ],
)
@pytest.mark.parametrize("where", ["checkpointing_use_reentrant", "gradient_checkpointing_kwargs"])
def test_reentrant_goes_with_none_of_these(make, plan_file, flags, named, where):
    flags = {name: plan_file(value) if isinstance(value, Plan) else value for name, value in flags.items()}
    flags[where] = True if where.startswith("checkpointing") else {"use_reentrant": True}
    with pytest.raises(ValueError) as caught:
        make(**flags)
    message = str(caught.value)
    assert message.startswith(
        f"{named} needs the non-reentrant variant of torch's checkpoint. Remove use_reentrant=True"
    )
    assert where in message
    assert message.endswith(f"), or {named}.")


def test_reentrant_goes_with_a_plan_that_selects_nothing(make, plan_file):
    assert make(checkpointing_plan=plan_file(), checkpointing_use_reentrant=True).settings().use_reentrant


@pytest.mark.parametrize(
    "flags",
    [
        OFFLOAD_MODE,
        {**OFFLOAD_MODE, "checkpointing_offload_save": "all"},
        {"checkpointing_modules": {"a": "offload:inputs", "b": "offload:all"}, "checkpointing_offload_save": "matmul"},
        {"checkpointing_plan": Plan({"l.0": Action("recompute", place="host"), "l.1": Action("keep", place="host")})},
        {"gradient_checkpointing_kwargs": {"offload": True, "use_reentrant": True}},
    ],
)
def test_reentrant_goes_with_what_is_moved_as_a_whole(make, plan_file, flags):
    flags = {name: plan_file(value) if isinstance(value, Plan) else value for name, value in flags.items()}
    assert make(**flags, checkpointing_use_reentrant=True).settings().use_reentrant


@pytest.mark.parametrize(
    "flags",
    [
        {"checkpointing_mode": "selective"},
        {"checkpointing_mode": "auto"},
        {"checkpointing_mode": "none", "checkpointing_modules": {"a": "auto"}},
        {"checkpointing_modules": {"a": "selective"}},
        {**OFFLOAD_MODE, "checkpointing_offload_save": "attention"},
        {"checkpointing_modules": {"a": "offload:attention"}, **OFFLOAD_MODE},
    ],
)
def test_two_selections_are_one_too_many(make, flags):
    with pytest.raises(
        ValueError, match=r"\['context_fn'\] and .*(selective|attention|auto).* are two selections .* Remove"
    ):
        make(**flags, gradient_checkpointing_kwargs={"context_fn": contexts})
    make(**flags, gradient_checkpointing_kwargs={"early_stop": False})


# In a loop of one's own.


def test_flags_without_prefix_take_a_plan_and_what_is_stored():
    assert settings_of_flags({"plan": PLAN}).plan is PLAN
    settings = settings_of_flags({"mode": "selective", "save": ["mm"], "segment": 1, "plan": None})
    assert settings == Settings(mode="selective", save=("mm",))
    assert settings_of_flags({"segment": "sqrt"}).segment == "sqrt"
    with pytest.raises(ValueError, match=r"^checkpointing_plan and checkpointing_save='mm' both say"):
        settings_of_flags({"plan": PLAN, "save": "mm"})
    with pytest.raises(ValueError, match="there is no file"):
        settings_of_flags({"plan": "no/plan.json"})


def test_flags_without_prefix_offload(tmp_path):
    flags = {"mode": "offload", "offload_save": "all", "host_budget": 2**20, "prefetch": 0}
    assert settings_of_flags(flags) == Settings(mode="offload", offload_save="all", host_budget=2**20, prefetch=0)
    settings = settings_of_flags({"modules": {"l": "offload"}, "offload_to": "disk", "offload_dir": tmp_path})
    assert settings == Settings(modules=(Part("l", "offload"),), offload_to="disk", offload_dir=str(tmp_path))
    with pytest.raises(TypeError, match=r"^'offload' is not one of mode, .* Did you mean mode='offload'\?$"):
        settings_of_flags({"offload": True})
    with pytest.raises(TypeError, match=r"Did you mean 'offload_to'\?$"):
        settings_of_flags({"offload_too": "host"})


# Copies.


def without_tokens(args):
    return {name: value for name, value in args.to_dict().items() if not name.endswith("_token")}


COPIES = {
    "pickle": lambda args: pickle.loads(pickle.dumps(args)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "replace": dataclasses.replace,
    "to_dict": lambda args: type(args)(**without_tokens(args)),
    "json": lambda args: HfArgumentParser(type(args)).parse_dict(
        {k: v for k, v in json.loads(args.to_json_string()).items() if not k.endswith("_token")}
    )[0],
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("cls", [CheckpointTrainingArguments, CheckpointSeq2SeqTrainingArguments])
def test_copies_say_the_same(make, duplicate, cls):
    args = make(
        cls,
        checkpointing_mode="full",
        checkpointing_modules='{"vision": "none", "text": "selective:mm"}',
        checkpointing_save='["mm", "mlp.*"]',
        checkpointing_segment="4",
        checkpointing_offload_save="attention",
        checkpointing_offload_to="disk",
        checkpointing_offload_dir=FOLDER,
        checkpointing_host_budget="64GiB",
        checkpointing_prefetch=0,
        checkpointing_self_check=False,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"every_n_layers": 2, "early_stop": False},
    )
    twin = duplicate(args)
    assert type(twin) is cls
    assert twin.settings() == args.settings()
    assert without_tokens(twin) == without_tokens(args)
    twin.gradient_checkpointing_kwargs = {"every_n_layers": 5}  # names stay tied together in a copy, too
    assert twin.settings().every_n == 5
    assert args.settings().every_n == 2


def test_post_init_is_idempotent(make):
    args = make(checkpointing_modules='{"vision": "full"}', gradient_checkpointing=True)
    before, settings = without_tokens(args), args.settings()
    args.__post_init__()
    assert without_tokens(args) == before
    assert args.settings() == settings


def test_replace_validates(make):
    args = make()
    assert dataclasses.replace(args, checkpointing_mode="none").settings().mode == "none"
    with pytest.raises(ValueError, match="checkpointing_every_n=0"):
        dataclasses.replace(args, checkpointing_every_n=0)


def test_json_names_a_function_and_to_dict_keeps_it(make):
    args = make(gradient_checkpointing_kwargs={"context_fn": contexts})
    written = json.loads(args.to_json_string())["gradient_checkpointing_kwargs"]["context_fn"]
    assert written.endswith("test_training_args.contexts")
    assert args.to_dict()["gradient_checkpointing_kwargs"]["context_fn"] is contexts
    assert pickle.loads(pickle.dumps(args)).settings().checkpoint_options == {"context_fn": contexts}


def test_json_still_refuses_what_is_not_a_function(make):
    args = make()
    args.run_name = object()
    with pytest.raises(TypeError, match="no JSON form"):
        args.to_json_string()


# Bad values.

DEFAULT = "that by default"
BAD_BUDGETS = [
    (64, "64GiB"), ("64", "64GiB"), (4095, "4095GiB"), (2, "2GiB"), (1.5, "1.5GiB"), (64.0, "64GiB"),
    (1e9, "1000000000B"), ("64G", "64GiB"), ("1.5 tb/s", "1.5TiB"), ("80%", 0.8), ("25 %", 0.25), ("300%", DEFAULT),
    (0.0, "0B"), (-1, "0B"), ("-0.5", "0B"), ("all", DEFAULT), ("", DEFAULT), ("nan", DEFAULT), (float("inf"), DEFAULT),
    (True, DEFAULT),
    ([0.5], DEFAULT),
]  # fmt: skip
BAD_FLAGS = [
    ("checkpointing_mode", "fulll", "'fulll' is not one of auto, full, none, offload, selective. Did you mean 'full'?"),
    ("checkpointing_mode", "FULL", "'FULL' is not one of auto, full, none, offload, selective. Did you mean 'full'?"),
    ("checkpointing_mode", " none", "' none' is not one of auto, full, none, offload, selective. Did you mean 'none'?"),
    ("checkpointing_mode", "", "'' is not one of auto, full, none, offload, selective. Did you mean "),
    ("checkpointing_mode", False, "False is not one of auto, full, none, offload, selective. Did you mean 'none'?"),
    ("checkpointing_mode", 3, "3 is not one of auto, full, none, offload, selective. Did you mean "),
    ("checkpointing_mode", "ofload", " is not one of auto, full, none, offload, selective. Did you mean 'offload'?"),
    ("checkpointing_mode", "atuo", "'atuo' is not one of auto, full, none, offload, selective. Did you mean 'auto'?"),
    ("checkpointing_mode", "auto:9GiB", " is not one of auto, full, none, offload, selective. Did you mean 'auto'?"),
    ("checkpointing_mode", "offload:all", ". Set it to 'offload', checkpointing_offload_save to 'all'."),
    ("checkpointing_mode", "full:all", " is not one of auto, full, none, offload, selective. Did you mean 'full'?"),
    (
        "checkpointing_mode",
        "selectve",
        "'selectve' is not one of auto, full, none, offload, selective. Did you mean 'selective'?",
    ),
    ("checkpointing_mode", "selective:mm", ". Set it to 'selective', checkpointing_save to 'mm'."),
    ("checkpointing_save", "expnsive", ": 'expnsive' is not a tier. Did you mean 'expensive'?"),
    ("checkpointing_save", ["mm", "Attention"], ": 'Attention' is not a tier. Did you mean 'attention'?"),
    ("checkpointing_save", "expensive,mm", ": 'expensive' stands alone, and expensive, mm are 2."),
    ("checkpointing_save", "", ": '' is not one of expensive, matmul, half_matmul, attention, or a list of op names"),
    ("checkpointing_save", [], ": [] is not one of expensive, matmul, half_matmul, attention, or a list of op names"),
    ("checkpointing_save", 3, ": 3 is not one of expensive, matmul"),
    ("checkpointing_save", ["mm", 3], ": ['mm', 3] is not one of expensive, matmul"),
    ("checkpointing_segment", 0, "0 is not a whole number from 1 up or 'sqrt'. Did you mean 1?"),
    ("checkpointing_segment", "0", "'0' is not a whole number from 1 up or 'sqrt'. Did you mean 1?"),
    ("checkpointing_segment", -3, "-3 is not a whole number from 1 up or 'sqrt'. Did you mean 1?"),
    ("checkpointing_segment", True, "True is not a whole number from 1 up or 'sqrt'. Did you mean 1?"),
    ("checkpointing_segment", 2.6, "2.6 is not a whole number from 1 up or 'sqrt'. Did you mean 3?"),
    ("checkpointing_segment", "2.6", "'2.6' is not a whole number from 1 up or 'sqrt'. Did you mean 3?"),
    ("checkpointing_segment", "Sqrt", "'Sqrt' is not a whole number from 1 up or 'sqrt'. Did you mean 'sqrt'?"),
    ("checkpointing_segment", "sqr", "Did you mean 'sqrt'?"),
    ("checkpointing_segment", "four", "Did you mean 1?"),
    ("checkpointing_plan", 3, "3 is not the path of a JSON file. Write one with plan.to_json()."),
    ("checkpointing_plan", "no/plan.json", ": there is no file /"),
    ("checkpointing_plan", "/", " cannot be read: "),
    (
        "checkpointing_offload_save",
        "input",
        "'input' is not one of inputs, expensive, matmul, half_matmul, attention, all. Did ",
    ),
    ("checkpointing_offload_save", "input", "Did you mean 'inputs'?"),
    ("checkpointing_offload_save", "mm", "'mm' is not one of inputs, expensive"),
    ("checkpointing_offload_save", ["inputs"], "['inputs'] is not one of inputs, expensive"),
    ("checkpointing_offload_save", None, "None is not one of inputs, expensive"),
    ("checkpointing_offload_to", "cpu", "'cpu' is not one of host, pageable, disk. Did you mean 'host'?"),
    ("checkpointing_offload_to", "RAM", "'RAM' is not one of host, pageable, disk. Did you mean 'host'?"),
    ("checkpointing_offload_to", "pinned", "Did you mean 'host'?"),
    ("checkpointing_offload_to", "NVMe", "Did you mean 'disk'?"),
    ("checkpointing_offload_to", "ssd", "Did you mean 'disk'?"),
    ("checkpointing_offload_to", "pagable", "Did you mean 'pageable'?"),
    ("checkpointing_offload_to", None, "None is not one of host, pageable, disk."),
    ("checkpointing_offload_dir", 3, "3 is not the path of a folder. Set it to one that exists."),
    ("checkpointing_offload_dir", "", "'' is not the path of a folder."),
    ("checkpointing_offload_dir", "/no/folder", ": /no/folder does not exist. Make it, or set "),
    ("checkpointing_compile_budget", 1.5, "1.5 is not a number from 0 to 1. Did you mean 1.0?"),
    ("checkpointing_compile_budget", 40, "40 is not a number from 0 to 1. Did you mean 0.4?"),
    ("checkpointing_compile_budget", -1, "-1 is not a number from 0 to 1. Did you mean 0.0?"),
    ("checkpointing_compile_budget", "0.4", "'0.4' is not a number from 0 to 1. Did you mean 0.4?"),
    ("checkpointing_compile_budget", True, "True is not a number from 0 to 1. Did you mean 0.5?"),
    ("checkpointing_prefetch", -1, "-1 is not a whole number from 0 up. Did you mean 0?"),
    ("checkpointing_prefetch", -0.6, "-0.6 is not a whole number from 0 up. Did you mean 0?"),
    ("checkpointing_prefetch", 1.5, "1.5 is not a whole number from 0 up. Did you mean 2?"),
    ("checkpointing_prefetch", "0", "'0' is not a whole number from 0 up. Did you mean 0?"),
    ("checkpointing_prefetch", False, "False is not a whole number from 0 up. Did you mean 0?"),
    ("checkpointing_prefetch", None, "None is not a whole number from 0 up. Did you mean 1?"),
    ("checkpointing_oom_retries", -1, "-1 is not a whole number from 0 up. Did you mean 0?"),
    ("checkpointing_oom_retries", 2.6, "2.6 is not a whole number from 0 up. Did you mean 3?"),
    ("checkpointing_oom_retries", "3", "'3' is not a whole number from 0 up. Did you mean 3?"),
    ("checkpointing_oom_retries", True, "True is not a whole number from 0 up. Did you mean 1?"),
    ("checkpointing_oom_retries", None, "None is not a whole number from 0 up. Did you mean 1?"),
    ("checkpointing_every_n", 0, "0 is not a whole number from 1 up. Did you mean 1?"),
    ("checkpointing_every_n", -1, "-1 is not a whole number from 1 up. Did you mean 1?"),
    ("checkpointing_every_n", True, "True is not a whole number from 1 up. Did you mean 1?"),
    ("checkpointing_every_n", 2.6, "2.6 is not a whole number from 1 up. Did you mean 3?"),
    ("checkpointing_every_n", "2", "'2' is not a whole number from 1 up. Did you mean 2?"),
    ("checkpointing_every_n", "two", "'two' is not a whole number from 1 up. Did you mean 1?"),
    ("checkpointing_every_n", float("inf"), "inf is not a whole number from 1 up. Did you mean 1?"),
    ("checkpointing_every_n", None, "None is not a whole number from 1 up. Did you mean 1?"),
    ("checkpointing_skip_frozen", "flase", "'flase' is not True or False. Did you mean False?"),
    ("checkpointing_skip_frozen", "yes", "'yes' is not True or False. Did you mean True?"),
    ("checkpointing_skip_frozen", 1, "1 is not True or False. Did you mean True?"),
    ("checkpointing_use_reentrant", None, "None is not True or False. Did you mean False?"),
    ("checkpointing_kbit_upcast", "norm", "'norm' is not one of none, norms, all. Did you mean 'norms'?"),
    ("checkpointing_kbit_upcast", True, "True is not one of none, norms, all. Did you mean 'all'?"),
    ("checkpointing_kbit_upcast", "fp32", "'fp32' is not one of none, norms, all. Did you mean 'all'?"),
    ("checkpointing_self_check", 0, "0 is not True or False. Did you mean False?"),
    ("checkpointing_input_grads", "allways", "'allways' is not one of auto, always, never. Did you mean 'always'?"),
    ("checkpointing_input_grads", "Auto", "'Auto' is not one of auto, always, never. Did you mean 'auto'?"),
    ("checkpointing_input_grads", None, "None is not one of auto, always, never. Did you mean "),
    ("checkpointing_modules", "vision", "'vision' is not JSON"),
    ("checkpointing_modules", '{"vision": full}', " is not JSON"),
    ("checkpointing_modules", '["vision"]', ' is not a dict. Write it like {"vision": "full"}.'),
    ("checkpointing_modules", ["vision"], "['vision'] is not a dict"),
    *(
        (
            flag,
            value,
            f"{value!r} is not a share of memory, above 0 and at most 1, or a size such as '64GiB'. "
            f"Did you mean {default if near == DEFAULT else near!r}?",
        )
        for flag, (_, _, default) in OF_BUDGETS.items()
        for value, near in BAD_BUDGETS
    ),
]
BAD_MODULES = [
    (
        {"vision": "ful"},
        "checkpointing_modules['vision']='ful' is not one of auto, full, none, offload, selective. Did you mean 'full'?",
    ),
    (
        {"vision": "Auto"},
        "checkpointing_modules['vision']='Auto' is not one of auto, full, none, offload, selective. Did you mean 'auto'?",
    ),
    ({"vision": "auto:20GiB"}, "only 'selective' and 'offload' are followed by what they store."),
    (
        {"vision": "offload:input"},
        "['vision']='offload:input' is not 'offload:' and one of inputs, expensive, matmul, half_matmul, attention, all. "
        "Did you mean 'offload:inputs'?",
    ),
    ({"vision": "offload:"}, "['vision']='offload:' is not 'offload:' and one of inputs, "),
    ({"vision": "offload:mm"}, "['vision']='offload:mm' is not 'offload:' and one of inputs, "),
    ({"vision": "offload:all@disk"}, "Did you mean 'offload:all'?"),
    ({"vision": "Offload:mm"}, "Did you mean 'offload:mm'?"),
    ({"vision": "full:all"}, "Did you mean 'offload:all'?"),
    (
        {"vision": None},
        "checkpointing_modules['vision']=None is not one of auto, full, none, offload, selective. Did you mean 'none'?",
    ),
    (
        {"vision": "selective:atention"},
        "['vision']='selective:atention': 'atention' is not a tier. Did you mean 'attention'?",
    ),
    ({"vision": "selective:"}, "['vision']='selective:': '' is not one of expensive, matmul"),
    ({"vision": "selective:mm,half_matmul"}, "'half_matmul' stands alone, and mm, half_matmul are 2."),
    (
        {"vision": "full:mm"},
        "only 'selective' and 'offload' are followed by what they store. Did you mean 'selective:mm'?",
    ),
    (
        {"vision": "selectiv:mm"},
        "['vision']='selectiv:mm' is not a mode; only 'selective' and 'offload' are followed by what they store.",
    ),
    (
        {"vision": "selectiv"},
        "['vision']='selectiv' is not one of auto, full, none, offload, selective. Did you mean 'selective'?",
    ),
    ({3: "full"}, "a name in checkpointing_modules=3 is not a module glob"),
    ({"": "full"}, "a name in checkpointing_modules='' is not a module glob"),
]
BAD_KWARGS = [
    ({"every_n_layers": 0}, "['every_n_layers']=0 is not a whole number from 1 up. Did you mean 1?"),
    ({"every_n_layers": True}, "['every_n_layers']=True is not a whole number from 1 up. Did you mean 1?"),
    ({"every_n_layers": 1.5}, "['every_n_layers']=1.5 is not a whole number from 1 up. Did you mean 2?"),
    ({"every_n_layers": "2"}, "['every_n_layers']='2' is not a whole number from 1 up. Did you mean 2?"),
    ({"use_reentrant": "False"}, "['use_reentrant']='False' is not True or False. Did you mean False?"),
    ({"preserve_rng_state": None}, "['preserve_rng_state']=None is not True or False. Did you mean False?"),
    ({"determinism_check": False}, "['determinism_check']=False is not one of default, none. Did you mean "),
    ({"determinism_check": "nonee"}, "['determinism_check']='nonee' is not one of default, none. Did you mean 'none'?"),
    ({"context_fn": "contexts"}, "['context_fn']='contexts' is not a function."),
    ({"debug": 1}, "['debug']=1 is not True or False. Did you mean True?"),
    ({"early_stop": "no"}, "['early_stop']='no' is not True or False. Did you mean False?"),
    ({"offload": 1}, "['offload']=1 is not True or False. Did you mean True?"),
    ({"offload": "true"}, "['offload']='true' is not True or False. Did you mean True?"),
    ({"use_reentrent": False}, "has the key 'use_reentrent', which is not one of every_n_layers, use_reentrant, "),
    ({"use-reentrant": False}, "Did you mean 'use_reentrant'?"),
    ({"every_n": 2}, "Did you mean 'every_n_layers'?"),
    ({7: 2}, "has the key 7, which is not one of "),
    ({"use_reentrant": True, "debug": True}, ": use_reentrant=True cannot be combined with debug."),
    ({"use_reentrant": True, "context_fn": contexts}, ": use_reentrant=True cannot be combined with context_fn."),
    ("{every_n_layers: 2}", " is not JSON"),
    ("every_n_layers=2", " is not JSON"),
    ([("use_reentrant", True)], ' is not a dict. Write it like {"every_n_layers": 2}.'),
]


@pytest.mark.parametrize(("flag", "value", "message"), BAD_FLAGS)
def test_bad_flags_raise(make, flag, value, message):
    with pytest.raises(ValueError) as caught:
        make(**{flag: value})
    assert str(caught.value).startswith(f"{flag}={value!r}")
    assert message in str(caught.value)


@pytest.mark.parametrize(("value", "message"), BAD_MODULES)
def test_bad_modules_raise(make, value, message):
    with pytest.raises(ValueError) as caught:
        make(checkpointing_modules=value)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", KWARGS)
@pytest.mark.parametrize(("value", "message"), BAD_KWARGS)
def test_bad_hf_kwargs_raise(make, name, value, message):
    with pytest.raises(ValueError) as caught:
        make(**{name: value})
    assert name in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["true", 1])
def test_bad_hf_flags_raise(make, name, value):
    with pytest.raises(ValueError, match=rf"{name}.*={value!r} is not True or False. Did you mean True\?"):
        make(**{name: value})


@pytest.mark.parametrize(("flag", "value", "message"), BAD_FLAGS)
def test_bad_flags_set_later_raise_when_read(make, flag, value, message):
    args = make()
    setattr(args, flag, value)
    with pytest.raises(ValueError) as caught:
        args.settings()
    assert message in str(caught.value)


@pytest.mark.parametrize(("value", "message"), BAD_KWARGS)
def test_plain_arguments_are_checked_when_read(make, value, message):
    args = make(TrainingArguments)
    args.gradient_checkpointing_kwargs = value
    with pytest.raises(ValueError) as caught:
        settings_of(args)
    assert message in str(caught.value)


# HF's own spelling.


@pytest.mark.parametrize("cls", [CheckpointTrainingArguments, TrainingArguments])
@pytest.mark.parametrize("name", KWARGS)
def test_hf_kwargs_are_honoured(make, cls, name):
    kwargs = {
        "every_n_layers": 2,
        "use_reentrant": False,
        "preserve_rng_state": True,
        "determinism_check": "none",
        "context_fn": contexts,
        "debug": False,
        "early_stop": False,
        "offload": False,
    }
    assert settings_of(make(cls, **{name: kwargs})) == full(
        every_n=2,
        preserve_rng_state=True,
        checkpoint_options={
            "context_fn": contexts,
            "determinism_check": "none",
            "debug": False,
            "early_stop": False,
        },
    )


@pytest.mark.parametrize("kwargs", [None, {}, {"preserve_rng_state": False}, {"determinism_check": "none"}])
def test_kwargs_without_use_reentrant_stay_non_reentrant(make, kwargs):
    assert make(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs).settings().use_reentrant is False


def test_reentrant_on_either_side(make):
    assert make(gradient_checkpointing_kwargs={"use_reentrant": True}).settings().use_reentrant is True
    assert make(checkpointing_use_reentrant=True).settings().use_reentrant is True
    both = make(checkpointing_use_reentrant=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert both.settings().use_reentrant is True


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [True, False, None])
def test_no_mode_means_auto_unless_hf_says_full(make, name, value):
    mode = "full" if value else "auto"
    assert make(**{name: value}).settings().mode == mode
    assert settings_of(make(TrainingArguments, **{name: value})).mode == mode


@pytest.mark.parametrize(
    "flags",
    [
        {"checkpointing_every_n": 2},
        {"checkpointing_segment": 2},
        {"checkpointing_segment": "sqrt"},
        {"checkpointing_use_reentrant": True},
        {"gradient_checkpointing_kwargs": {"every_n_layers": 2}},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing_kwargs": {"context_fn": contexts}},
        {"checkpointing_every_n": 2, "checkpointing_modules": {"v": "auto"}},
    ],
)
def test_no_mode_means_full_with_a_flag_of_that_mode(make, flags):
    assert make(**flags).settings().mode == "full"
    assert not make(**flags).settings().named
    assert make(checkpointing_mode="none", **flags).settings().mode == "none"


@pytest.mark.parametrize(
    "flags",
    [
        {"checkpointing_modules": {"v": "full", "l": "none"}},
        {"checkpointing_budget": 0.5, "checkpointing_oom_retries": 1},
        {"checkpointing_skip_frozen": False, "checkpointing_self_check": False, "checkpointing_input_grads": "always"},
        {"checkpointing_use_reentrant": False, "checkpointing_segment": 1, "checkpointing_every_n": 1},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False, "every_n_layers": 1, "preserve_rng_state": True}},
        {"gradient_checkpointing_kwargs": {"debug": True, "early_stop": False, "determinism_check": "none"}},
    ],
)
def test_no_mode_means_auto_with_flags_that_hold_in_each(make, flags):
    assert make(**flags).settings().mode == "auto"


def test_auto_that_is_said_stays_with_flags_of_another_mode(make):
    assert make(checkpointing_mode="auto", checkpointing_every_n=2, checkpointing_segment=2).settings().mode == "auto"


@pytest.mark.parametrize("name", NAMES)
def test_hf_flag_set_to_false_is_no_conflict(make, name):
    assert make(checkpointing_mode="full", **{name: False}).settings().mode == "full"
    assert make(checkpointing_mode="none", **{name: False}).settings().mode == "none"
    assert make(checkpointing_mode="full", **{name: True}).settings().mode == "full"


CONFLICTS = [
    ({"checkpointing_mode": "none"}, {"gradient_checkpointing": True}),
    ({"checkpointing_mode": "selective"}, {"gradient_checkpointing": True}),
    ({"checkpointing_mode": "offload"}, {"gradient_checkpointing": True}),
    ({"checkpointing_mode": "auto"}, {"gradient_checkpointing": True}),
    ({"checkpointing_mode": "auto"}, {"gradient_checkpointing_kwargs": {"offload": True}}),
    (
        {"checkpointing_mode": "offload"},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": False}},
    ),
    *(
        (
            {"checkpointing_mode": mode},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True}},
        )
        for mode in ("none", "selective", "full")
    ),
    ({"checkpointing_mode": "none"}, {"gradient_checkpointing_kwargs": {"offload": True}}),
    ({"checkpointing_every_n": 3}, {"gradient_checkpointing_kwargs": {"every_n_layers": 2}}),
    ({"checkpointing_every_n": 3}, {"gradient_checkpointing_kwargs": {"every_n_layers": 1}}),
    ({"checkpointing_use_reentrant": True}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ours", "theirs"), CONFLICTS)
def test_conflicts_name_both(make, ours, theirs, name):
    theirs = {key.replace("gradient_checkpointing", name): value for key, value in theirs.items()}
    with pytest.raises(ValueError) as caught:
        make(**ours, **theirs)
    message = str(caught.value)
    assert all(f"{flag}={value!r}" in message for flag, value in ours.items())
    # What HF's flag says and its kwargs do not is said alone.
    assert all(key in message for key in theirs if theirs[key] != {"offload": False})
    assert message.endswith("ask for different things. Remove one of them.")


@pytest.mark.parametrize(("ours", "theirs"), CONFLICTS)
def test_conflicts_made_later_raise_when_read(make, ours, theirs):
    args = make(**ours)
    for name, value in theirs.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match="ask for different things"):
        args.settings()


def test_agreement_is_no_conflict(make):
    args = make(checkpointing_every_n=2, gradient_checkpointing_kwargs={"every_n_layers": 2, "use_reentrant": False})
    assert args.settings() == full(every_n=2)


@pytest.mark.parametrize("cls", [CheckpointTrainingArguments, TrainingArguments])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flag", [True, False, None])
def test_their_offload_is_ours(make, cls, name, flag):
    args = make(cls, **{name: flag, f"{name}_kwargs": {"offload": True, "every_n_layers": 2}})
    settings = settings_of(args)
    assert settings == expected(mode="offload", every_n=2)
    assert settings.named


@pytest.mark.parametrize("flag", [True, False])
def test_their_offload_and_ours_agree(make, flag):
    args = make(
        checkpointing_mode="offload",
        checkpointing_offload_save="attention",
        gradient_checkpointing=flag,
        gradient_checkpointing_kwargs={"offload": True},
    )
    assert args.settings() == expected(mode="offload", offload_save="attention")


@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload", "auto", None])
def test_offload_set_to_false_is_no_word(make, mode):
    args = make(checkpointing_mode=mode, gradient_checkpointing_kwargs={"offload": False, "early_stop": False})
    assert args.settings().mode == (mode or "auto")


@dataclasses.dataclass
class TheirOffload(CheckpointTrainingArguments):
    gradient_checkpointing_kwargs: dict | None = dataclasses.field(default_factory=lambda: {"offload": True})


@dataclasses.dataclass
class TheirOffloadAndFlag(TheirOffload):
    gradient_checkpointing: bool = True


@dataclasses.dataclass
class TheirOffloadOurMode(TheirOffload):
    checkpointing_mode: str | None = "selective"


@pytest.mark.parametrize("cls", [TheirOffload, TheirOffloadAndFlag])
def test_an_offload_that_is_a_default_of_the_args_class_is_not_the_users_word(make, cls):
    assert make(cls).settings() == expected(mode="offload")
    assert not make(cls).settings().named
    for mode in ("none", "selective", "full", "offload", "auto"):
        assert make(cls, checkpointing_mode=mode).settings().mode == mode
    kwargs = {"every_n_layers": 2}
    assert make(cls, gradient_checkpointing_kwargs=kwargs).settings() == full(every_n=2)
    without = make(cls, gradient_checkpointing_kwargs={"offload": False})
    assert without.settings() == (full() if without.gradient_checkpointing else expected())


def test_of_two_defaults_of_the_args_class_ours_counts(make):
    assert make(TheirOffloadOurMode).settings() == expected(mode="selective")
    assert make(TheirOffloadOurMode, gradient_checkpointing=True).settings() == expected(mode="offload")


def test_their_flag_said_with_an_offload_that_was_not(make):
    assert make(TheirOffload, gradient_checkpointing=True).settings() == expected(mode="offload")
    assert make(TheirOffload, gradient_checkpointing=True, checkpointing_mode="full").settings() == full()
    with pytest.raises(ValueError, match=r"checkpointing_mode='none' and .*gradient_checkpointing=True.* Remove one"):
        make(TheirOffload, gradient_checkpointing=True, checkpointing_mode="none")


@dataclasses.dataclass
class TheirDefaults(CheckpointingArguments, TrainingArguments):
    """What TRL does: other defaults for HF's fields."""

    gradient_checkpointing: bool = True
    gradient_checkpointing_kwargs: dict | None = dataclasses.field(default_factory=lambda: {"every_n_layers": 2})


@dataclasses.dataclass
class OurDefaults(CheckpointTrainingArguments):
    checkpointing_mode: str | None = "none"
    checkpointing_every_n: int = 4


def test_a_default_of_the_args_class_is_not_the_users_word(make):
    assert make(TheirDefaults).settings() == full(every_n=2)
    assert make(TheirDefaults, checkpointing_mode="none").settings().mode == "none"
    assert make(TheirDefaults, checkpointing_mode="selective").settings() == expected(mode="selective", every_n=2)
    assert make(TheirDefaults, checkpointing_every_n=3).settings().every_n == 3
    assert make(TheirDefaults, checkpointing_mode="auto").settings() == expected(mode="auto", every_n=2)
    assert make(TheirDefaults, gradient_checkpointing=False).settings().mode == "full"  # with its every_n_layers


def test_a_default_of_ours_gives_way_to_what_the_user_says_to_hf(make):
    assert make(OurDefaults).settings() == expected(mode="none", every_n=4)
    args = make(OurDefaults, gradient_checkpointing=True, gradient_checkpointing_kwargs={"every_n_layers": 2})
    assert args.settings() == full(every_n=2)


# Set on the object.


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_names_stay_equal_when_set_later(make, name):
    args = make()
    kwargs = {"every_n_layers": 2}
    setattr(args, name, True)
    setattr(args, f"{name}_kwargs", kwargs)
    assert args.activation_checkpointing is args.gradient_checkpointing is True
    assert args.activation_checkpointing_kwargs is args.gradient_checkpointing_kwargs is kwargs
    assert args.settings().every_n == 2
    assert dataclasses.replace(args).settings().every_n == 2
    args.gradient_checkpointing_kwargs["every_n_layers"] = 3  # changed in place, as TRL does
    assert args.settings().every_n == 3


@needs_new_names
def test_constructor_keeps_hf_order_of_names(make):
    args = make(activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": 2})
    assert args.gradient_checkpointing is True
    assert args.gradient_checkpointing_kwargs == {"every_n_layers": 2}
    changed = dataclasses.replace(args, activation_checkpointing_kwargs={"every_n_layers": 3})
    assert changed.settings().every_n == 3


def test_json_text_set_later_is_read(make):
    args = make()
    args.gradient_checkpointing_kwargs = '{"every_n_layers": 2}'
    args.checkpointing_modules = '{"vision": "none"}'
    assert args.settings() == full(every_n=2, modules=(Part("vision", "none"),))


def test_flags_set_later_are_read(make):
    args = make(checkpointing_mode="full")
    args.checkpointing_mode = type(args.checkpointing_mode)("none")  # as a hyper-parameter search does
    assert args.settings().mode == "none"


@needs_new_names
def test_plain_arguments_with_two_different_kwargs_raise(make):
    args = make(TrainingArguments, activation_checkpointing_kwargs={"every_n_layers": 2})
    args.gradient_checkpointing_kwargs = {"every_n_layers": 3}
    with pytest.raises(ValueError, match=r"activation_checkpointing_kwargs=.* and gradient_checkpointing_kwargs="):
        settings_of(args)


def test_plain_arguments_set_later_are_read(make):
    args = make(TrainingArguments)
    args.gradient_checkpointing = True
    args.gradient_checkpointing_kwargs = {"every_n_layers": 2}
    assert settings_of(args) == full(every_n=2)


def test_a_mode_counts_as_named_only_where_the_user_said_it(make):
    assert not make().settings().named
    assert make(checkpointing_mode="full").settings().named
    assert make(checkpointing_mode="none").settings().named
    assert settings_of(make(TrainingArguments, gradient_checkpointing=True)).named


# Settings that nothing follows from.


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"checkpointing_every_n": 2}, "checkpointing_every_n"),
        ({"checkpointing_modules": {"vision": "none"}}, "checkpointing_modules"),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "gradient_checkpointing_kwargs"),
    ],
)
def test_one_warning_for_what_has_no_effect(make, warnings_of, flags, named):
    def twice():
        make(checkpointing_mode="none", **flags).settings()

    (message,) = warnings_of(twice)
    assert message.startswith("No effect in checkpointing_mode='none': ")
    assert named in message
    assert [flag for flag in FLAGS if flag in message] == ["checkpointing_mode"] + [f for f in FLAGS if f == named]


SAVE, SEGMENT = {"checkpointing_save": "mm"}, {"checkpointing_segment": 2}
SELECTIVE_MODE = {"checkpointing_mode": "selective"}
NO_OFFLOAD = "(of mode 'offload', or a policy's)"
NO_DISK = "checkpointing_offload_dir (of offload to 'disk')"
HOST_FLAGS = {
    "checkpointing_offload_save": "all", "checkpointing_offload_to": "pageable", "checkpointing_offload_dir": FOLDER,
    "checkpointing_host_budget": "1GiB", "checkpointing_prefetch": 2,
}  # fmt: skip
MOVED = Plan({"l.0": Action("recompute", place="host")})
AUTO_FLAGS = {"checkpointing_budget": 0.5, "checkpointing_oom_retries": 0}
NOT_AUTO = ", ".join(f"{flag} (of mode 'auto')" for flag in AUTO_FLAGS)
AUTO_MODE = {"checkpointing_mode": "auto"}
NO_EVERY_N = "checkpointing_every_n (of modes that are not 'auto')"
SIZED = Plan(PLAN.actions, (SizePlan((("x", (2, 3)),), False, {"l.0": RECOMPUTE}),))
NO_SAVE, NO_SEGMENT = (
    "checkpointing_save (of mode 'selective')",
    "checkpointing_segment (of mode 'full', or 'offload' with inputs)",
)


@pytest.mark.parametrize(
    ("flags", "where", "idle"),
    [
        (SAVE, "checkpointing_mode='auto'", NO_SAVE),
        ({**SAVE, "checkpointing_mode": "full"}, "checkpointing_mode='full'", NO_SAVE),
        ({**SAVE, "checkpointing_modules": {"l": "selective:attention"}}, "checkpointing_mode='auto'", NO_SAVE),
        *(
            ({**AUTO_FLAGS, "checkpointing_mode": mode}, f"checkpointing_mode={mode!r}", NOT_AUTO)
            for mode in ("none", "selective", "full", "offload")
        ),
        ({**AUTO_FLAGS, "checkpointing_modules": {"l": "none"}, "checkpointing_mode": "full"},
         "checkpointing_mode='full'", NOT_AUTO),
        ({**AUTO_FLAGS, "checkpointing_every_n": 2}, "checkpointing_mode='full'", NOT_AUTO),
        ({**AUTO_FLAGS, "checkpointing_plan": PLAN}, "this checkpointing_plan", NOT_AUTO),
        ({**AUTO_MODE, "checkpointing_every_n": 2}, "checkpointing_mode='auto'", NO_EVERY_N),
        ({**AUTO_MODE, "checkpointing_every_n": 2, "checkpointing_modules": {"l": "none"}}, "checkpointing_mode='auto'",
         NO_EVERY_N),
        ({**AUTO_MODE, **SEGMENT}, "checkpointing_mode='auto'", NO_SEGMENT),
        ({**AUTO_MODE, **SEGMENT, "checkpointing_modules": {"l": "none"}}, "checkpointing_mode='auto'", NO_SEGMENT),
        ({**SEGMENT, "checkpointing_mode": "full", "checkpointing_modules": {"l": "auto"}}, "checkpointing_mode='full'",
         "checkpointing_segment (beside mode 'auto')"),
        ({**AUTO_MODE, "checkpointing_offload_save": "all"}, "checkpointing_mode='auto'",
         "checkpointing_offload_save (of mode 'offload')"),
        ({**SEGMENT, **SELECTIVE_MODE}, "checkpointing_mode='selective'", NO_SEGMENT),
        ({**SAVE, **SEGMENT, "checkpointing_mode": "none"}, "checkpointing_mode='none'", f"{NO_SAVE}, {NO_SEGMENT}"),
        ({**SEGMENT, "checkpointing_plan": Plan({"l.0": SELECTIVE})}, "this checkpointing_plan", NO_SEGMENT),
        ({"gradient_checkpointing_kwargs": {"early_stop": True}, "checkpointing_plan": Plan({})},
         "this checkpointing_plan", "gradient_checkpointing_kwargs"),
        ({"checkpointing_prefetch": 0, "checkpointing_mode": "full"}, "checkpointing_mode='full'",
         f"checkpointing_prefetch {NO_OFFLOAD}"),
        ({**HOST_FLAGS, "checkpointing_mode": "none"}, "checkpointing_mode='none'",
         ", ".join(f"{flag} {NO_OFFLOAD}" for flag in HOST_FLAGS)),
        ({"checkpointing_host_budget": "0B", "checkpointing_modules": {"l": "selective"}, "checkpointing_mode": "full"},
         "checkpointing_mode='full'", f"checkpointing_host_budget {NO_OFFLOAD}"),
        ({"checkpointing_offload_dir": FOLDER, "checkpointing_plan": MOVED}, "this checkpointing_plan", NO_DISK),
        ({"checkpointing_prefetch": 3, "checkpointing_plan": PLAN}, "this checkpointing_plan",
         f"checkpointing_prefetch {NO_OFFLOAD}"),
        ({"checkpointing_offload_to": "disk", "checkpointing_offload_dir": FOLDER, "checkpointing_plan": MOVED},
         "this checkpointing_plan", f"checkpointing_offload_to (the plan says where), {NO_DISK}"),
        ({"checkpointing_offload_save": "all", "checkpointing_modules": {"l": "offload:inputs"}, "checkpointing_mode":
          "full"}, "checkpointing_mode='full'", "checkpointing_offload_save (each part says its own)"),
        ({**SEGMENT, **OFFLOAD_MODE, "checkpointing_offload_save": "all"}, "checkpointing_mode='offload'", NO_SEGMENT),
        ({**SAVE, **OFFLOAD_MODE, "checkpointing_offload_save": "matmul"}, "checkpointing_mode='offload'", NO_SAVE),
        ({**SEGMENT, "checkpointing_every_n": 2}, "checkpointing_mode='full'",
         "checkpointing_segment (with every_n there are no recomputed blocks in a row)"),
    ],
)  # fmt: skip
def test_one_warning_for_what_concerns_another_mode(make, plan_file, warnings_of, flags, where, idle):
    flags = {name: plan_file(value) if isinstance(value, Plan) else value for name, value in flags.items()}
    (message,) = warnings_of(lambda: [make(**flags).settings() for _ in range(2)])
    shown = message.replace("activation_checkpointing_kwargs/", "")
    assert shown == f"No effect in {where}: {idle}. Remove it or set a mode."


@pytest.mark.parametrize(
    "flags",
    [
        {**SAVE, **SELECTIVE_MODE},
        {**SELECTIVE_MODE, "checkpointing_every_n": 2, "checkpointing_modules": {"l": "none"}},
        {**SAVE, "checkpointing_modules": {"l": "selective"}},
        {**SAVE, **SELECTIVE_MODE, "checkpointing_modules": {"l": "selective:attention"}},
        SEGMENT,
        {"checkpointing_segment": "sqrt"},
        {**SEGMENT, **SELECTIVE_MODE, "checkpointing_modules": {"l": "full"}},
        {**SEGMENT, "checkpointing_plan": PLAN},
        {"checkpointing_plan": Plan({})},
        {"checkpointing_mode": "none", "checkpointing_modules": {"l": "selective"}, "checkpointing_every_n": 2},
        {**HOST_FLAGS, **OFFLOAD_MODE, "checkpointing_offload_to": "disk"},
        {**HOST_FLAGS, "checkpointing_modules": {"l": "offload"}, "checkpointing_offload_to": "disk"},
        {"checkpointing_offload_to": "pageable", "checkpointing_host_budget": 0.5, "checkpointing_plan": MOVED},
        {"checkpointing_offload_dir": FOLDER, "checkpointing_plan": Plan({"l.0": Action("keep", place="disk")})},
        {
            "checkpointing_offload_to": "disk",
            "checkpointing_offload_dir": FOLDER,
            "checkpointing_plan": Plan({"l.0": Action("keep", place="disk")}),
        },
        {**SEGMENT, **OFFLOAD_MODE},
        {**SEGMENT, "checkpointing_plan": MOVED},
        {**SEGMENT, **OFFLOAD_MODE, "checkpointing_modules": {"l": "offload:all"}},
        {
            **OFFLOAD_MODE,
            "checkpointing_offload_save": "all",
            "checkpointing_every_n": 2,
            "checkpointing_modules": {"l": "none"},
        },
        {**OFFLOAD_MODE, "checkpointing_offload_save": "all", "checkpointing_modules": {"l": "offload:inputs"}},
        {"checkpointing_host_budget": "0.8", "checkpointing_offload_save": "inputs"},
        {"checkpointing_mode": "none", "checkpointing_host_budget": None, "checkpointing_budget": None},
        AUTO_FLAGS,
        {**AUTO_FLAGS, **AUTO_MODE},
        {**AUTO_FLAGS, "checkpointing_mode": "none", "checkpointing_modules": {"l": "auto"}},
        {**AUTO_FLAGS, "checkpointing_every_n": 2, "checkpointing_modules": {"l": "auto"}},
        {**AUTO_FLAGS, "checkpointing_plan": SIZED},
        {"checkpointing_mode": "none", "checkpointing_oom_retries": 3, "checkpointing_budget": "0.9"},
        {"gradient_checkpointing_kwargs": {"offload": True}},
    ],
)
def test_no_warning_where_a_mode_is_concerned(make, plan_file, warnings_of, flags):
    flags = {name: plan_file(value) if isinstance(value, Plan) else value for name, value in flags.items()}
    assert warnings_of(lambda: make(**flags)) == []


@dataclasses.dataclass
class OurOffloadDefaults(CheckpointTrainingArguments):
    checkpointing_prefetch: int = 2
    checkpointing_host_budget: float | str | None = "32GiB"
    checkpointing_save: list[str] | str | None = "matmul"
    checkpointing_segment: int | str | None = 2


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_no_warning_for_a_default_of_the_args_class(make, warnings_of, mode):
    assert warnings_of(lambda: make(OurOffloadDefaults, checkpointing_mode=mode)) == []
    if mode == "full":
        assert warnings_of(lambda: make(OurOffloadDefaults, checkpointing_every_n=2)) == []
    said = warnings_of(lambda: make(OurOffloadDefaults, checkpointing_mode=mode, checkpointing_prefetch=3))
    assert [f"checkpointing_prefetch {NO_OFFLOAD}" in message for message in said] == [True]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"checkpointing_every_n": 2, "checkpointing_modules": {"vision": "none"}},
        {"checkpointing_mode": "none"},
        {"checkpointing_mode": "none", "checkpointing_modules": {"vision": "full"}, "checkpointing_every_n": 2},
        {"gradient_checkpointing_kwargs": {"every_n_layers": 2}},
    ],
)
def test_no_warning_for_what_has_an_effect(make, warnings_of, flags):
    assert warnings_of(lambda: make(**flags)) == []


# With other libraries' arguments.


def test_mixes_with_trl(make, parse):
    Mixed = dataclasses.make_dataclass("Mixed", [], bases=(CheckpointingArguments, trl.SFTConfig))
    args = make(Mixed, bf16=False)
    assert args.gradient_checkpointing is True
    assert args.settings() == full()
    assert make(Mixed, bf16=False, checkpointing_mode="none").settings().mode == "none"
    args = parse(
        *("--bf16", "False", "--checkpointing_modules", '{"vision": "full"}', "--packing"),
        *("--model_init_kwargs", '{"use_cache": false}'),
        cls=Mixed,
    )
    assert args.model_init_kwargs == {"use_cache": False}
    assert args.packing is True
    assert args.settings().modules == (Part("vision", "full"),)
    assert dataclasses.replace(args, checkpointing_every_n=2).settings().every_n == 2
    assert Mixed(**without_tokens(args)).settings() == args.settings()
