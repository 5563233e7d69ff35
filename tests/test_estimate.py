"""Estimates: against full runs of all blocks, of models of several kinds, at the largest sizes, and what is refused."""

import json

import pytest
import torch
import transformers
from torch import nn

from ckpt_trainer import estimate
from ckpt_trainer.blocks import find_blocks
from ckpt_trainer.comparison import PARTS
from ckpt_trainer.fake_costs import ACTIONS, Conditions, fake_costs
from ckpt_trainer.largest import Axis, costs_between, largest_sizes
from ckpt_trainer.model_configs import batch_of, build_model, config_of
from ckpt_trainer.optimizers import optimizer_named
from ckpt_trainer.plan import KEEP, RECOMPUTE, Plan
from ckpt_trainer.predicted_rows import ALL_MODES, AUTO, options_under, plans_of, rows_of
from ckpt_trainer.step_costs import PHASES, BlockCost, Option, StepCosts, peak_of
from ckpt_trainer.without_weights import NeedsValues

MODERN = int(transformers.__version__.split(".")[0]) >= 5
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
BERT = {
    "model_type": "bert", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "vocab_size": 512,
}  # fmt: skip
T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 64, "d_kv": 16, "d_ff": 128,
    "num_layers": 3, "num_heads": 4, "vocab_size": 512,
}  # fmt: skip
GIB, MIB = 2**30, 2**20


def written(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def full_peaks(config, rows, tokens, modes, actions=ACTIONS):
    """Peaks of a run of all blocks."""
    model = build_model(config_of(config))
    conditions = Conditions(
        optimizer=optimizer_named("adamw_fused"), host=True, host_budget_bytes=2**60, every_block=True
    )
    costs = fake_costs(model, batch_of(model, rows, tokens), actions, None, conditions)
    plans = plans_of(modes, find_blocks(model))
    return {mode: peak_of(costs, options_under(plan, costs)).bytes for mode, plan in plans.items()}


def peaks(found):
    return {row.label: row.peak_bytes for row in found.rows}


def test_all_modes_against_a_run_of_all_blocks(tmp_path):
    path = written(tmp_path, LLAMA)
    found = estimate(path, 3, 128, budget=8 * MIB)
    assert [row.label for row in found.rows] == list(ALL_MODES)
    measured = full_peaks(path, 3, 128, ALL_MODES)
    assert {mode: peak for mode, peak in peaks(found).items() if mode != AUTO} == measured
    assert measured["none"] > 8 * MIB > peaks(found)[AUTO]
    assert found.rows[-1].plan == found.plan
    assert 1 < found.rows[-1].slowdown < found.rows[5].slowdown


def test_what_a_peak_consists_of(tmp_path):
    model = build_model(config_of(written(tmp_path, LLAMA)))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    held = sum(t.nbytes for t in (*model.buffers(), *batch_of(model, 3, 128).values()))
    for accumulate in (False, True):
        found = estimate(model, 3, 128, modes=["none", "full", "every_2", "offload"], accumulate=accumulate)
        for row in found.rows:
            assert sum(row.part_bytes.values()) == row.peak_bytes == max(row.phase_bytes.values())
            assert set(row.part_bytes) == set(PARTS)
            assert list(row.phase_bytes) == list(PHASES)
            assert row.where.partition(" of ")[0] == max(row.phase_bytes, key=row.phase_bytes.get)
            assert row.part_bytes["weights"] <= weights + held
            # Two states of each weight, and a number of steps for each tensor.
            assert 0 <= row.part_bytes["optimizer"] - 2 * weights <= 4 * len(list(model.parameters()))
            assert row.part_bytes["activations"] > 0
            assert (row.part_bytes["gradients"] == weights) == accumulate
        assert found.rows[0].where == "head and loss"
        assert found.rows[0].part_bytes["logits and loss"] > 3 * 128 * 512 * 4


def test_gradients_that_were_there_before_a_block():
    blocks = [BlockCost(name, (Option(KEEP, 5, 5, most),), gradient_bytes=10) for name, most in (("0", 100), ("1", 9))]
    costs = StepCosts(tuple(blocks), resident_bytes=50, head_gradient_bytes=7)
    (row,) = rows_of(costs, {"none": Plan({"0": KEEP, "1": KEEP})}, ["none"], 10**9, 20)
    assert (row.peak_bytes, row.where) == (167, "backward of 0")
    assert list(row.part_bytes.values()) == [20, 17, 30, 100, 0]
    assert row.slowdown is None


def test_llama_8b(tmp_path):
    path, modes = written(tmp_path, LLAMA_8B), ("none", "full", "full:every_2", "offload")
    found = estimate(path, 1, 8192, modes=modes)
    assert found.parameters == found.trainable_parameters == 8_030_261_248
    for mode, measured in full_peaks(path, 1, 8192, modes, (RECOMPUTE,)).items():
        assert abs(peaks(found)[mode] / measured - 1) < 0.01
    assert 100 * GIB < peaks(found)["none"] < 115 * GIB
    assert found.rows[0].part_bytes["weights"] == pytest.approx(2 * 8_030_261_248, rel=1e-3)
    assert found.rows[0].slowdown == 1
    assert 1.15 < found.rows[1].slowdown < 1.34


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_largest_sizes_against_runs_of_those_sizes(tmp_path, attention):
    path, modes, budget = written(tmp_path, LLAMA), ("none", "full"), 24 * MIB
    found = estimate(path, 2, 256, modes=modes, attention=attention, budget=budget, largest=True)
    for row in found.rows:
        for rows, tokens, step in ((row.largest_batch, 256, (1, 0)), (2, row.longest_sequence, (0, 64))):
            assert rows > 0
            assert tokens % 64 == 0
            sizes = [(rows, tokens), (rows + step[0], tokens + step[1])]
            fits, is_over = [
                peaks(estimate(path, *size, modes=[row.label], attention=attention))[row.label] for size in sizes
            ]
            assert fits <= budget < is_over
    assert found.rows[0].largest_batch < found.rows[1].largest_batch
    assert found.rows[0].longest_sequence < found.rows[1].longest_sequence


def test_the_longest_sequence_ends_with_the_positions(tmp_path):
    path = written(tmp_path, {**LLAMA, "max_position_embeddings": 192})
    found = estimate(path, 1, 64, modes=["none"], largest=True)
    assert found.rows[0].longest_sequence == 192
    assert "ends at the 192 positions" in found.notes[-1]


def costs_of_size(size):
    """A peak of 3 n^2 + 5 n + 7."""
    return StepCosts(
        (BlockCost("0", (Option(KEEP, 3 * size**2, 3 * size**2, 0),)),), resident_bytes=7, before_bytes=5 * size
    )


def peak_of_kept(costs):
    return peak_of(costs, [block.options[0] for block in costs.blocks]).bytes


@pytest.mark.parametrize("budget", [3 * 49 + 5 * 7 + 7, 14, 10**6, 10**9])
def test_largest_on_a_parabola(budget):
    asked = []

    def measure(size):
        asked.append(size)
        return costs_of_size(size)

    axis = Axis(measure, asked=40, step=1, most=5000, degree=2)
    (found,) = largest_sizes(axis, costs_of_size(40), [peak_of_kept], budget)
    assert found == max((n for n in range(1, 5001) if 3 * n * n + 5 * n + 7 <= budget), default=0)
    assert len(asked) <= 5
    assert peak_of_kept(costs_between({n: costs_of_size(n) for n in (4, 8, 16)}, 11, 2)) == 3 * 121 + 55 + 7


def test_budget_too_small_and_a_peak_elsewhere(tmp_path):
    path = written(tmp_path, LLAMA)
    found = estimate(path, 1, 8, optimizer="adamw", budget="2MiB", modes=["none", "full", "auto"])
    assert found.plan is None
    assert "optimizer with less state" in found.problem
    assert found.rows[-1].peak_bytes is None
    assert "nothing fits" in found.rows[-1].note
    assert {row.where for row in found.rows[:-1]} == {"optimizer"}
    assert found.rows[1].note == "no gain over none"
    assert found.notes[0].startswith("Peak in: optimizer. Under none, full no action on a block lowers it")
    assert "Nothing fits: " in str(found)
    assert "Plan of auto" not in str(found)


def test_optimizers():
    linear = nn.Linear(8, 8)
    made = {
        name: optimizer_named(name)(linear.parameters())
        for name in ("adamw", "AdamW_torch_fused", "sgd", "adamw_fused")
    }
    assert [type(one).__name__ for one in made.values()] == ["AdamW", "AdamW", "SGD", "AdamW"]
    assert [one.defaults["fused"] for one in made.values()] == [None, True, None, True]
    assert made["adamw"].defaults["foreach"]
    assert optimizer_named("none") is None
    with pytest.raises(ValueError, match=r"no fused variant of RMSprop\. Write 'rmsprop'"):
        optimizer_named("rmsprop_fused")


def test_lora(tmp_path):
    path = written(tmp_path, LLAMA)
    plain = estimate(path, 2, 64, modes=["none"])
    found = estimate(path, 2, 64, modes=["none"], lora=4, lora_targets=["q_proj", "v_proj"])
    assert found.trainable_parameters == 6 * 4 * (64 + 64 + 64 + 32)
    assert found.parameters == plain.parameters + found.trainable_parameters
    # Two states of fp32, and a number of steps for each of the 24 tensors.
    assert found.rows[0].part_bytes["optimizer"] == 8 * found.trainable_parameters + 24 * 4
    with pytest.raises(ValueError, match="rank of 0"):
        estimate(path, 2, 64, lora=0)


@pytest.mark.parametrize(
    ("config", "task", "name"),
    [
        (BERT, None, "BertForMaskedLM"),
        (BERT, "sequence-classification", "BertForSequenceClassification"),
        (T5, None, "T5ForConditionalGeneration"),
        ({**LLAMA, "architectures": ["LlamaModel"]}, None, "LlamaForCausalLM"),
    ],
)
def test_kinds_of_models(tmp_path, config, task, name):
    found = estimate(written(tmp_path, config), 4, 64, task=task, modes=["none", "full"])
    assert found.title.startswith(f"{name}, batch 4 x 64")
    assert found.rows[0].peak_bytes > found.rows[1].peak_bytes
    assert len(found.rows[1].plan) == (6 if "bert" not in name.lower() else 4)


def test_dtypes(tmp_path):
    path = written(tmp_path, LLAMA)
    half, full, mixed = (estimate(path, 2, 64, dtype=d, modes=["none"]).rows[0] for d in ("bf16", "fp32", "bf16-mixed"))
    assert 1.9 < full.part_bytes["weights"] / half.part_bytes["weights"] < 2
    assert full.part_bytes["weights"] == mixed.part_bytes["weights"]
    assert full.part_bytes["activations"] > mixed.part_bytes["activations"] > half.part_bytes["activations"]


def test_a_module_and_a_batch_of_its_own():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 3})).eval()
    before = {name: (p.data_ptr(), p.grad) for name, p in model.named_parameters()}
    ids = torch.ones(2, 32, dtype=torch.long)
    found = estimate(
        model, {"input_ids": ids, "labels": ids, "position_ids": torch.arange(32)[None]}, modes=["none"], largest=True
    )
    assert found.title == "LlamaForCausalLM, batch 2 x 32, adamw_fused"
    assert found.rows[0].largest_batch is None
    assert "no other sizes" in found.notes[-1]
    assert not model.training
    assert {name: (p.data_ptr(), p.grad) for name, p in model.named_parameters()} == before


def test_rows_longer_than_the_positions(tmp_path, caplog):
    found = estimate(written(tmp_path, {**LLAMA, "max_position_embeddings": 32}), 1, 64, modes=["none"])
    assert found.notes[-1] == "Rows of 64 tokens are longer than the 32 positions of the model's config."
    with pytest.raises(ValueError, match=r"rows of 640 tokens do not run: BertForMaskedLM has 512 positions"):
        estimate(written(tmp_path, BERT), 1, 640, modes=["none"])
    assert not [record for record in caplog.records if "fake_tensor" in record.name]


def test_experts_that_need_values_are_refused(tmp_path):
    path = written(tmp_path, {**LLAMA, "model_type": "mixtral", "architectures": None})
    if MODERN:  # theirs run all at once
        assert estimate(path, 1, 64, modes=["none"]).title.startswith("MixtralForCausalLM")
        return
    with pytest.raises(NeedsValues, match="live"):
        estimate(path, 1, 64, modes=["none"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "has no model_type"),
        ("{}", "has no model_type"),
        ('{"model_type": "lama"}', r"no model_type 'lama'\. Did you mean 'llama'\?"),
        ('{"model_type": "llama", "hidden_size": "many"}', r"LlamaForCausalLM|no valid config"),
        ('{"model_type": "vit"}', r"no model of type 'vit'"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        estimate(path, 1, 64)


def test_models_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"(?s)model 'nobody/nothing' is no file.*path of its config\.json"):
        estimate("nobody/nothing", 1, 64)
    with pytest.raises(ValueError, match="does not exist"):
        estimate(tmp_path / "missing.json", 1, 64)
    with pytest.raises(ValueError, match=r"folder without a config\.json"):
        estimate(tmp_path, 1, 64)
    written(tmp_path, LLAMA)
    assert estimate(tmp_path, 1, 64, modes=["none"]).parameters > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seq": None}, "seq is missing"),
        ({"batch": 0}, "batch=0 was asked for"),
        ({"seq": -8}, "seq=-8 was asked for"),
        ({"seq": True}, "seq=True"),
        ({"dtype": "bf8"}, r"dtype 'bf8' is not one of fp32, bf16"),
        ({"device": "A100"}, r"device 'A100' is not one of .*Did you mean 'A100-[48]0'\?"),
        ({"task": "causal"}, r"task 'causal' is not one of .*Did you mean 'causal-lm'\?"),
        ({"attention": "flash"}, r"attention 'flash' is not one of sdpa, eager"),
        ({"modes": ["half"]}, r"mode 'half' is not one of"),
        ({"budget": -1}, "budget=-1"),
        ({"budget": "1.5"}, "budget='1.5'"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        estimate(written(tmp_path, LLAMA), **{"batch": 1, "seq": 64, "modes": ["none"], **options})
