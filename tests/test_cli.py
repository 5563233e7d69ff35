"""The command line: what it prints, what it writes, its exit codes and its errors."""

import configparser
import json
import re
from pathlib import Path

import pytest

from ckpt_trainer import cli
from ckpt_trainer.comparison import Row

KEYS = {
    "title", "device", "budget_bytes", "parameters", "trainable_parameters", "rows", "plan", "problem", "notes"
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return str(path)


def test_json_and_a_picture(config, tmp_path, capsys):
    picture = tmp_path / "modes.png"
    options = ["--seq", "16", "--modes", "none,full,auto", "--budget", "1GiB", "--json", "--plot", str(picture)]
    assert cli.main(["estimate", config, *options]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data) == KEYS
    assert [row["label"] for row in data["rows"]] == ["none", "full", "auto"]
    assert set(data["rows"][0]) == set(vars(Row("")))
    assert data["plan"] == {f"model.layers.{number}": "keep" for number in range(4)}
    assert data["budget_bytes"] == 2**30
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table(config, capsys):
    assert (
        cli.main(["estimate", config, "--seq", "64", "--batch", "3", "--modes", "none,every_2", "--device", "a100-80"])
        == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("LlamaForCausalLM, batch 3 x 64, bf16, adamw_fused\nBudget 72.0 GiB.")
    assert "roofline of A100-80" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("none", "full"))] == [
        "none",
        "full:every_2",
    ]
    assert "Plan" not in out


def test_nothing_fits(config, capsys):
    assert cli.main(["estimate", config, "--seq", "64", "--modes", "none,full,auto", "--budget", "1MiB"]) == 1
    out = capsys.readouterr().out
    assert "Nothing fits: a budget of 1.000 MiB was asked for. The leanest plan needs" in out
    assert "a smaller micro-batch" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seq", "64", "--device", "H10"], r"device 'H10' is not one of .*Did you mean 'H100'\?"),
        (["--seq", "0"], r"seq=0 was asked for\. Give a whole number from 1 on\."),
        (["--seq", "64", "--batch", "-1"], r"batch=-1 was asked for"),
        (["--seq", "64", "--budget", "20"], r"budget='20'.*20GiB"),
        (["--seq", "64", "--modes", "none,ful"], r"mode 'ful' is not one of .*Did you mean 'full'\?"),
        (["--seq", "64", "--optimizer", "adamww"], r"optimizer 'adamww' is not one of .*Did you mean 'adamw'\?"),
        (["--seq", "64", "--lora", "4", "--lora-targets", "nowhere"], r"LoRA: .*nowhere.*all-linear"),
    ],
)
def test_errors_are_one_line(config, capsys, options, said):
    assert cli.main(["estimate", config, *options]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    lines = [line for line in found.err.splitlines() if line.startswith("ckpt-trainer: ")]
    assert len(lines) == 1
    assert re.search(said, lines[0])
    assert "Traceback" not in found.err


def test_errors_of_ours_keep_their_traceback(config, monkeypatch):
    monkeypatch.setattr("ckpt_trainer.estimate_command.estimate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["estimate", config, "--seq", "64"])


@pytest.mark.parametrize("arguments", [[], ["estimate"], ["estimate", "model"], ["estimat", "model"]])
def test_what_is_missing_is_told_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: ckpt-trainer" in capsys.readouterr().err


def test_the_command_is_installed():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    assert "ckpt-trainer = ckpt_trainer.cli:main" in setup["options.entry_points"]["console_scripts"]
