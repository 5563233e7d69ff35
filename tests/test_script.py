"""`ckpt-trainer run`: what a script sees of it, what it trains, how it ends, and that nothing is left."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import transformers

import ckpt_trainer
from ckpt_trainer.cli import main
from ckpt_trainer.script import swapped

TESTS = Path(__file__).parent
NAMES = ("Trainer", "TrainingArguments", "Seq2SeqTrainer", "Seq2SeqTrainingArguments")
ORIGINALS = {name: getattr(transformers, name) for name in NAMES}


def given(name):
    """What transformers has under a name now; it puts another module in its place while it is imported."""
    return getattr(sys.modules["transformers"], name)


TRAINING = """
    import json, sys, torch
    from tiny_models import {build}, text_dataset
    from transformers import HfArgumentParser, {trainer}, {arguments}
    (args,) = HfArgumentParser({arguments}).parse_args_into_dataclasses()
    model = {build}()
    for part in model.modules():
        if hasattr(part, "config"):
            part.config.use_cache = False
    trainer = {trainer}(model, args, train_dataset=text_dataset(4))
    trainer.train()
    weights = trainer.model.state_dict()
    found = [log["loss"] for log in trainer.state.log_history if "loss" in log], weights
"""
ARGUMENTS = [
    "--output_dir",
    "out",
    "--report_to",
    "none",
    "--max_steps",
    "2",
    "--logging_steps",
    "1",
    "--use_cpu",
    "true",
]
ARGUMENTS += ["--disable_tqdm", "true", "--save_strategy", "no", "--per_device_train_batch_size", "2"]
PLAIN = {"build": "llama", "trainer": "Trainer", "arguments": "TrainingArguments"}
SEQ2SEQ = {"build": "t5", "trainer": "Seq2SeqTrainer", "arguments": "Seq2SeqTrainingArguments"}


@pytest.fixture(autouse=True)
def _left_as_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "folder of ckpt-trainer"), *sys.path])
    before = sys.argv[:], sys.path[:], sys.modules["__main__"]
    yield
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before
    for name, original in ORIGINALS.items():
        home = sys.modules[original.__module__]
        assert given(name) is getattr(home, name) is original
    assert sys.modules["transformers.trainer"].TrainingArguments is ORIGINALS["TrainingArguments"]
    assert not hasattr(ckpt_trainer.CheckpointingMixin.__init__, "__wrapped__")


@pytest.fixture
def write(tmp_path):
    def write(text, name="train.py"):
        path = tmp_path / name
        path.write_text(dedent(text))
        return str(path)

    return write


@pytest.fixture
def look(write, monkeypatch):
    """Runs a script and gives what it puts into `found`."""

    def look(text, *command, flags=()):
        found = []
        monkeypatch.setattr(sys, "look", found.append, raising=False)
        path = write(dedent(text) + "\nimport sys\nsys.look(found)\n")
        assert main(["run", *flags, path, *command]) == 0
        return found[0]

    return look


class TestSwap:
    def test_each_way_to_a_name(self, look):
        found = look(
            """
            import transformers
            from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
            from transformers.trainer import Trainer as defined
            from transformers.training_args_seq2seq import Seq2SeqTrainingArguments as defined_arguments
            assert defined is transformers.Trainer is Trainer
            assert defined_arguments is transformers.training_args_seq2seq.Seq2SeqTrainingArguments
            assert issubclass(Seq2SeqTrainer, Trainer) and issubclass(Seq2SeqTrainingArguments, TrainingArguments)
            found = Trainer, TrainingArguments, Seq2SeqTrainer, Seq2SeqTrainingArguments
            """
        )
        assert found == (
            ckpt_trainer.CheckpointedTrainer,
            ckpt_trainer.CheckpointTrainingArguments,
            ckpt_trainer.CheckpointedSeq2SeqTrainer,
            ckpt_trainer.CheckpointSeq2SeqTrainingArguments,
        )
        assert all(issubclass(ours, original) for ours, original in zip(found, ORIGINALS.values(), strict=True))

    def test_a_subclass_in_the_script(self, look):
        text = """
            from dataclasses import dataclass, fields
            from transformers import Trainer, TrainingArguments
            @dataclass
            class Arguments(TrainingArguments):
                output_dir: str = "out"
                checkpointing_every_n: int = 2
            class Mine(Trainer):
                def training_step(self, *args, **kwargs):
                    return super().training_step(*args, **kwargs)
            found = Arguments, Mine
        """
        arguments, mine = look(text, flags=("--mode", "full"))
        assert issubclass(mine, ckpt_trainer.CheckpointedTrainer)
        assert (arguments().checkpointing_mode, arguments().checkpointing_every_n) == ("full", 2)
        assert arguments().settings().mode == "full"

    def test_arguments_that_a_trainer_makes_itself_are_ours(self, look):
        text = """
            from tiny_models import llama
            from transformers import Trainer
            found = Trainer(llama()).args
        """
        assert look(text, flags=("--segment", "sqrt")).checkpointing_segment == "sqrt"


class TestTraining:
    @pytest.fixture(params=[PLAIN, SEQ2SEQ], ids=["Trainer", "Seq2SeqTrainer"])
    def text(self, request):
        return dedent(TRAINING).format(**request.param)

    def test_as_without(self, text, look, write, monkeypatch, caplog):
        ours = look(text + "\nfound += (trainer.memory_report(),)", *ARGUMENTS, flags=("--mode", "full"))
        assert ours[2]["recomputed_blocks"] > 0
        plain = {}
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *ARGUMENTS])
            exec(compile(text, "train.py", "exec"), plain)
        losses, weights = plain["found"]
        assert losses == ours[0]
        assert all(torch.equal(weights[name], ours[1][name]) for name in weights)
        (line,) = [record for record in caplog.records if record.getMessage().startswith("run: ")]
        assert line.levelname == "INFO"
        assert "by default mode=full" in line.getMessage()
        assert all(name in line.getMessage() for name in NAMES)

    def test_flags_of_ours_reach_the_parser(self, look):
        found = (
            "found = args.checkpointing_mode, args.checkpointing_every_n, trainer.memory_report()['recomputed_blocks']"
        )
        text = dedent(TRAINING).format(**PLAIN) + found
        flags = ["--checkpointing_mode", "full", "--checkpointing_every_n", "2"]
        assert look(text, *ARGUMENTS, *flags) == ("full", 2, 4)


class TestDefaults:
    SETTINGS = """
        import sys
        from transformers import HfArgumentParser, TrainingArguments
        (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
        found = args
    """

    def mode(self, look, *command, flags):
        return look(self.SETTINGS, "--output_dir", "out", *command, flags=flags).settings().mode

    def test_the_words_of_the_script_win(self, look):
        flags = ("--mode", "selective", "--save", "attention")
        assert self.mode(look, flags=flags) == "selective"
        assert self.mode(look, "--checkpointing_mode", "none", flags=flags) == "none"
        # Its older word, too.
        assert self.mode(look, "--gradient_checkpointing", "true", flags=flags) == "full"

    def test_values_have_the_types_of_the_flags(self, look):
        flags = [
            "--every-n",
            "3",
            "--skip_frozen",
            "false",
            "--modules",
            '{"text": "full"}',
            "--save",
            '["mm", "mlp.*"]',
        ]
        found = look(self.SETTINGS, "--output_dir", "out", flags=[*flags, "--host-budget", "1GiB", "--mode", "offload"])
        assert (found.checkpointing_every_n, found.checkpointing_skip_frozen) == (3, False)
        assert found.checkpointing_modules == {"text": "full"}
        assert found.settings().save == ("mm", "mlp.*")
        assert found.settings().host_budget == 2**30

    @pytest.mark.parametrize("name", ["TrainingArguments", "Seq2SeqTrainingArguments"])
    def test_such_arguments_are_copied_and_stored(self, name):
        with swapped((("checkpointing_mode", "full"),)):
            made, parent = given(name)("out", report_to=[]), given("TrainingArguments")
        for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
            assert type(again) is type(made)
            assert again == made
            assert again.settings() == made.settings()
            assert isinstance(again, parent)
        again.gradient_checkpointing = True  # a default is no word that this could contradict
        assert again.settings().mode == "full"

    def test_a_value_that_is_none(self, write, capsys):
        assert main(["run", "--mode", "ful", write("print('ran')")]) == 2
        written = capsys.readouterr()
        assert written.out == ""
        (line,) = [line for line in written.err.splitlines() if "ckpt-trainer" in line]
        assert re.search("'ful'.*'full'", line)


class TestAsPython:
    def test_what_a_script_sees(self, write, look, tmp_path):
        write("value = 5", "beside.py")
        text = """
            from __future__ import annotations
            import beside, pickle, sys
            class Own: pass
            assert type(pickle.loads(pickle.dumps(Own()))) is Own
            assert sys.modules["__main__"].Own is Own
            found = sys.argv[:], sys.path[0], __name__, __file__, beside.value
        """
        arguments = ["--mod", "1", "--mode", "x", "-m", "--", "-h2", "run"]
        path = str(tmp_path / "train.py")
        assert look(text, *arguments) == ([path, *arguments], str(tmp_path), "__main__", path, 5)
        sys.modules.pop("beside")

    def test_a_path_that_is_not_absolute(self, write, tmp_path, capsys):
        write("import sys\nprint(sys.argv[0], __file__)")
        assert main(["run", "train.py"]) == 0
        assert capsys.readouterr().out.split() == ["train.py", str(tmp_path / "train.py")]

    def test_a_module(self, tmp_path, capsys):
        (tmp_path / "package_of_test").mkdir()
        (tmp_path / "package_of_test" / "__main__.py").write_text("import sys\nprint(sys.argv, sys.path[0], __name__)")
        assert main(["run", "-m", "package_of_test", "-x", "1"]) == 0
        path = str(tmp_path / "package_of_test" / "__main__.py")
        assert capsys.readouterr().out.strip() == f"{[path, '-x', '1']} {tmp_path} __main__"
        sys.modules.pop("package_of_test")


class TestEnd:
    @pytest.fixture(autouse=True)
    def _hook_of_python(self, monkeypatch):
        # Other tests bring libraries that put a hook of their own there.
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)

    @pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("sys.exit()", 0), ("sys.exit(0)", 0), ("pass", 0)])
    def test_exit_codes(self, write, end, code):
        assert main(["run", write(f"import sys\n{end}")]) == code

    def test_a_text_goes_on(self, write):
        with pytest.raises(SystemExit, match=r"^no data$"):
            main(["run", write("import sys\nsys.exit('no data')")])

    def test_an_error_has_the_traceback_of_the_script_alone(self, write, capsys):
        path = write("def f():\n    raise ValueError('of the script')\nf()")
        assert main(["run", path]) == 1
        lines = capsys.readouterr().err.splitlines()
        shown = lines[lines.index("Traceback (most recent call last):") :]
        assert [line.split(",")[:2] for line in shown if "File" in line] == [
            [f'  File "{path}"', " line 3"],
            [f'  File "{path}"', " line 2"],
        ]
        assert shown[-1] == "ValueError: of the script"

    def test_a_script_that_is_not_python(self, write, capsys):
        assert main(["run", write("a b")]) == 1
        shown = capsys.readouterr().err
        assert re.search(r'File ".*train\.py", line 1(.|\n)*SyntaxError', shown)
        assert "Traceback" not in shown

    def test_a_module_that_is_not_there(self, capsys):
        assert main(["run", "-m", "no_such_module"]) == 1
        assert "No module named no_such_module" in capsys.readouterr().err

    def test_a_file_that_is_not_there(self, capsys):
        assert main(["run", "no_such.py"]) == 2
        assert "no_such.py" in capsys.readouterr().err

    def test_interrupted(self, write):
        with pytest.raises(KeyboardInterrupt):
            main(["run", write("raise KeyboardInterrupt")])


class TestNothingBuilt:
    def warnings(self, caplog):
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    @pytest.mark.parametrize("end", ["", "import sys; sys.exit(0)"])
    def test_is_said(self, write, caplog, end):
        assert main(["run", write(f"from transformers import Trainer\n{end}")]) == 0
        (warning,) = self.warnings(caplog)
        assert "built no trainer of this package" in warning

    def test_not_after_an_error_or_help(self, write, caplog):
        assert main(["run", write("raise ValueError")]) == 1
        assert main(["run", write("pass"), "--help"]) == 0
        assert self.warnings(caplog) == []

    def test_not_where_one_was_built(self, write, caplog):
        script = "from tiny_models import llama\nfrom transformers import Trainer\nTrainer(llama())"
        assert main(["run", write(script)]) == 0
        assert self.warnings(caplog) == []


SFT = """
    import json, sys
    from datasets import Dataset
    from tiny_models import llama, tokenizer
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"text": "the cat sat on a mat"}] * 4)
    args = SFTConfig("out", max_steps=2, logging_steps=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no")
    trainer = SFTTrainer(llama(), args, train_dataset=rows, processing_class=tokenizer())
    trainer.train()
    report = getattr(trainer, "memory_report", dict)()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    actions = {str(action) for action in report.get("plan", {"blocks": {}})["blocks"].values()}
    found = [losses, sorted(actions), report.get("recomputed_blocks"), sys.argv, __name__, sys.path[0]]
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
    sys.exit(7)
"""


@pytest.mark.distributed
def test_a_script_of_trl(write, tmp_path):
    path = write(SFT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    found = {}
    started = {
        "plain": [path, "plain"],
        "ours": ["-m", "ckpt_trainer", "run", "--mode", "selective", "--save", "matmul", path, "ours"],
    }
    for name, command in started.items():
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 7, done.stderr
        found[name] = json.loads((tmp_path / name).read_text())
        assert ("mode selective: 4/4 text blocks" in done.stderr) == (name == "ours"), done.stderr
    losses, actions, replays, *seen = found["ours"]
    assert losses == found["plain"][0]
    assert actions == ["selective:matmul"]
    assert replays > 0
    assert seen == [[path, "ours"], "__main__", str(tmp_path)]
    assert found["plain"][3:] == [[path, "plain"], "__main__", str(tmp_path)]
