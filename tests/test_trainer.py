"""The trainers in place of Hugging Face's: nothing changes but memory, and nothing stays behind."""

import copy
import dataclasses
import inspect
import json
import warnings

import peft
import pytest
import torch
import transformers
import trl
from tiny_models import CASES, llama, text_dataset, tokenizer
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from ckpt_trainer import (
    CheckpointedSeq2SeqTrainer,
    CheckpointedTrainer,
    CheckpointingArguments,
    CheckpointingMixin,
    CheckpointSeq2SeqTrainingArguments,
    CheckpointTrainingArguments,
)

FIVE = hasattr(TrainingArguments, "activation_checkpointing")


def arguments(tmp_path, cls=CheckpointTrainingArguments, **flags):
    fixed = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "learning_rate": 1e-2,
    }  # fmt: skip
    return cls(**{**fixed, **flags})


def plain_model(**config):
    """A model that plain Trainer trains without cache in every version, as ours do."""
    return llama(use_cache=False, **config)


_WRITTEN_BY_SAVING = ("architectures", "dtype", "torch_dtype")


def state_of(model):
    """All that training may leave behind on a model, weights excepted."""
    modules = list(model.named_modules())
    return {
        # Not of the model itself: accelerate puts a forward of its own there, and after a failure leaves it.
        "forwards": {name: vars(module).get("forward") for name, module in modules if name},
        "switches": {name: vars(module).get("gradient_checkpointing") for name, module in modules},
        "hooks": {
            name: [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)]
            for name, module in modules
        },
        "config": {key: value for key, value in model.config.to_dict().items() if key not in _WRITTEN_BY_SAVING},
        "gradient hooks": [
            (parameter._backward_hooks, parameter._post_accumulate_grad_hooks) for parameter in model.parameters()
        ],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
    }


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def norms(trainer):
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def assert_same_training(left, right):
    assert losses(left) == losses(right)
    assert norms(left) == norms(right)
    for a, b in zip(left.model.parameters(), right.model.parameters(), strict=True):
        assert torch.equal(a, b)


def trained(tmp_path, trainer=CheckpointedTrainer, args=CheckpointTrainingArguments, model=None, **flags):
    model = plain_model() if model is None else model
    result = trainer(model=model, args=arguments(tmp_path, args, **flags), train_dataset=text_dataset(16))
    result.train()
    return result


FULL = {"checkpointing_mode": "full"}

MODES = [
    {},
    {"checkpointing_budget": "0B"},
    {"checkpointing_budget": "900KiB", "checkpointing_mode": "auto"},
    {"checkpointing_mode": "none"},
    {"checkpointing_mode": "full"},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": True}},
    {"checkpointing_every_n": 2},
    {"checkpointing_modules": {"model.layers.1": "none"}},
    {"checkpointing_use_reentrant": True},
    {"checkpointing_input_grads": "always"},
]


@pytest.mark.parametrize("flags", MODES, ids=str)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_losses_gradient_norms_and_weights_are_those_of_plain_trainer(tmp_path, flags):
    plain = trained(tmp_path, Trainer, TrainingArguments)
    assert_same_training(plain, trained(tmp_path, **flags))


@pytest.mark.parametrize(
    ("flags", "replays"),
    [(FULL, 12), ({"checkpointing_budget": "0B"}, 12), ({"checkpointing_mode": "none"}, 0),
     ({"checkpointing_every_n": 2}, 6),
     ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 3}}, 6),
     ({**FULL, "checkpointing_modules": {"model.layers.[01]": "none"}}, 6)],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_blocks_recomputed_in_three_steps(tmp_path, flags, replays):
    trainer = trained(tmp_path, **flags)
    assert trainer.memory_report()["recomputed_blocks"] == replays
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    # Nothing is said of it where nothing is to be recomputed.
    assert [entry.get("checkpointing/recomputed_blocks", 0) for entry in logged] == [replays // 3] * 3
    assert ("checkpointing/recomputed_blocks" in logged[0]) == (replays > 0)


def test_plain_training_arguments_mean_the_defaults(tmp_path):
    plain = trained(tmp_path, Trainer, TrainingArguments)
    ours = trained(tmp_path, args=TrainingArguments)
    assert_same_training(plain, ours)
    assert ours.memory_report()["blocks"] == {"text": {"keep": 4}}


def test_by_default_what_has_room_is_kept_from_the_second_step_on(tmp_path):
    trainer = trained(tmp_path)
    report = trainer.memory_report()
    assert report["calls"] == {"recompute": 4}
    assert report["recomputed_flops_share"] is None
    (size,) = report["auto"]["sizes"]
    assert size["inputs"]["input_ids"] == [4, 12]
    assert size["actions"] == {"keep": 4}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["checkpointing/recomputed_blocks"] for entry in logged] == [4, 0, 0]


def test_a_report_before_training_has_the_plan_that_it_begins_with(tmp_path):
    model = llama()
    before = state_of(model)
    report = CheckpointedTrainer(model, arguments(tmp_path), train_dataset=text_dataset(8)).memory_report()
    assert report["blocks"] == {"text": {"recompute": 4}}
    assert report["auto"]["sizes"] == []
    assert (report["calls"], report["recomputed_blocks"]) == ({}, 0)
    assert state_of(model) == before


def test_two_trainers_in_turn_do_not_see_each_others_optimizers(tmp_path):
    alone = trained(tmp_path, checkpointing_budget="900KiB")
    first = CheckpointedTrainer(plain_model(), arguments(tmp_path), train_dataset=text_dataset(16))
    found = []

    class TrainsAnother(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                found.append(trained(tmp_path, checkpointing_budget="900KiB"))

    first.add_callback(TrainsAnother())
    first.train()
    assert_same_training(alone, found[0])
    ours, theirs = alone.memory_report()["auto"], found[0].memory_report()["auto"]
    assert ours == theirs
    assert first.memory_report()["auto"]["optimizer_state_bytes"] == ours["optimizer_state_bytes"] > 0
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_switch_set_after_construction_counts(tmp_path):
    args = arguments(tmp_path, checkpointing_mode=None)
    args.gradient_checkpointing = True
    args.gradient_checkpointing_kwargs = {"every_n_layers": 2}
    trainer = CheckpointedTrainer(plain_model(), args, train_dataset=text_dataset(8))
    trainer.train()
    assert trainer.memory_report()["blocks"] == {"text": {"recompute": 2, "keep": 2}}


class Notes(TrainerCallback):
    """Looks at the model and the arguments whenever it is asked."""

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        self.fail_at, self.error, self.seen = fail_at, error, []

    def _look(self, where, args, model):
        self.seen.append((where, bool(args.gradient_checkpointing), model.config.use_cache, state_of(model)))
        if where == self.fail_at:
            raise self.error

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._look("train_begin", args, model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._look("step_begin", args, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._look("step_end", args, model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._look("evaluate", args, model)

    def on_save(self, args, state, control, model=None, **kwargs):
        self._look("save", args, model)

    def on_log(self, args, state, control, model=None, **kwargs):
        self._look("log", args, model)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("fail_at", [None, "train_begin", "step_begin", "step_end", "evaluate", "save", "log"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("is_full", [True, False], ids=["full", "auto"])
def test_nothing_is_on_the_model_outside_of_a_step_however_training_ends(tmp_path, fail_at, error, is_full):
    model = llama()
    before = state_of(model)
    notes = Notes(fail_at, error)
    flags = {"gradient_checkpointing": True, "checkpointing_input_grads": "always"} if is_full else {}
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, **flags)
    data = text_dataset(16)
    trainer = CheckpointedTrainer(model, args, train_dataset=data, eval_dataset=data[:2], callbacks=[notes])
    if fail_at is None:
        trainer.train()
    else:
        with pytest.raises(error):
            trainer.train()
    assert notes.seen
    for where, switch, cache, state in notes.seen:
        assert (where, switch, cache) == (where, is_full, True)
        assert state == before
    assert state_of(model) == before
    assert not model.training
    assert bool(args.gradient_checkpointing) is is_full
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("flags", [{}, {"checkpointing_budget": "900KiB"}, FULL], ids=str)
@pytest.mark.parametrize("fail_at", [1, 2])
def test_an_exception_within_a_step_leaves_nothing(tmp_path, where, flags, fail_at):
    model, calls = llama(), []
    before = state_of(model)

    def fail(*args):
        calls.append(1)
        if len(calls) == fail_at:
            raise KeyboardInterrupt

    norm = model.model.norm  # Outside of all blocks, so that it runs once in each step.
    handle = norm.register_forward_pre_hook(fail) if where == "forward" else norm.register_full_backward_hook(fail)
    trainer = CheckpointedTrainer(model, arguments(tmp_path, **flags), train_dataset=text_dataset(8))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    assert len(calls) == fail_at
    assert state_of(model) == before
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks
    assert len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()) == 0


def test_model_is_live_only_inside_of_a_step(tmp_path):
    seen = []

    class Looks(CheckpointedTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(("forward" in vars(model.model.layers[0]), model.config.use_cache))
            return super().compute_loss(model, inputs, *args, **kwargs)

    data = text_dataset(8)
    args = arguments(tmp_path, max_steps=1)
    trainer = Looks(llama(), args, train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    trainer.evaluate()
    assert seen == [(True, False), (False, True)]


def saved_config(folder):
    return json.loads((folder / "config.json").read_text())


def test_saves_have_the_users_use_cache(tmp_path):
    trainer = trained(tmp_path, model=llama(), save_strategy="steps", save_steps=2)
    trainer.save_model(str(tmp_path / "final"))
    assert saved_config(tmp_path / "checkpoint-2")["use_cache"] is True
    assert saved_config(tmp_path / "final")["use_cache"] is True
    assert saved_config(tmp_path / "final").get("use_cache") == llama().config.to_dict()["use_cache"]


def test_saves_add_no_key_that_was_not_there(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    before = "use_cache" in model.config.to_dict()
    trainer = CheckpointedTrainer(model, arguments(tmp_path))
    trainer.save_model(str(tmp_path / "vit"))
    assert ("use_cache" in saved_config(tmp_path / "vit")) == before


def test_the_users_choice_between_construction_and_training_is_kept(tmp_path):
    model = llama()
    trainer = CheckpointedTrainer(model, arguments(tmp_path), train_dataset=text_dataset(8))
    model.config.use_cache = False
    trainer.train()
    assert model.config.use_cache is False


@pytest.mark.skipif(not FIVE, reason="the argument use_cache came with transformers 5")
def test_an_explicit_use_cache_keeps_the_cache_and_the_blocks(tmp_path):
    plain = trained(tmp_path, Trainer, TrainingArguments, model=llama(), use_cache=True)
    ours = trained(tmp_path, model=llama(), use_cache=True, **FULL)
    assert_same_training(plain, ours)
    assert_same_training(plain, trained(tmp_path, model=llama(), use_cache=True))
    assert ours.memory_report()["calls"] == {"got a key/value cache": 12}


def test_generate_right_after_training_gives_the_tokens_of_the_saved_model(tmp_path):
    model = llama(attention_dropout=0.5)
    trainer = CheckpointedTrainer(model, arguments(tmp_path), train_dataset=text_dataset(16))
    trainer.train()
    prompt = text_dataset(1)[0]["input_ids"][None, :4]
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)
    trainer.save_model(str(tmp_path / "final"))
    reloaded = type(model).from_pretrained(str(tmp_path / "final"))
    assert torch.equal(tokens, reloaded.generate(prompt, max_new_tokens=8, do_sample=False))


def test_generate_inside_of_a_training_step_is_right(tmp_path):
    tokens = {}

    class Generates(CheckpointedTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            prompt = inputs["input_ids"][:, :4]
            tokens["in step"] = model.generate(prompt, max_new_tokens=6, do_sample=False)
            tokens["reference"] = reference.generate(prompt, max_new_tokens=6, do_sample=False)
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = llama(attention_dropout=0.0)
    reference = copy.deepcopy(model)
    Generates(model, arguments(tmp_path, max_steps=1), train_dataset=text_dataset(8)).train()
    assert torch.equal(tokens["in step"], tokens["reference"])


def test_train_twice_and_resume(tmp_path):
    once = trained(tmp_path / "a", max_steps=4, save_strategy="steps", save_steps=2)
    again = CheckpointedTrainer(
        plain_model(), arguments(tmp_path / "a", max_steps=4), train_dataset=text_dataset(16)
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(once)[2:] == losses(again)[-2:]
    before = state_of(again.model)
    again.train()
    assert state_of(again.model) == before


def test_each_train_begins_with_the_arguments_as_they_are_then(tmp_path):
    trainer = trained(tmp_path, **FULL)
    assert trainer.memory_report()["recomputed_blocks"] == 12
    trainer.args.checkpointing_every_n = 2
    trainer.train()
    assert trainer.memory_report()["recomputed_blocks"] == 6


def test_model_init_and_several_models(tmp_path):
    models = []

    def build():
        models.append(llama())
        return models[-1]

    trainer = CheckpointedTrainer(args=arguments(tmp_path), model_init=build, train_dataset=text_dataset(8))
    trainer.train()
    trainer.train()
    assert len(models) == 3
    assert [model.config.use_cache for model in models] == [True] * 3
    assert trainer.memory_report()["recomputed_blocks"] == 4


def test_unfreezing_during_training_is_noticed_at_the_next_step(tmp_path):
    class Unfreezes(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.requires_grad_(True)

    class Counts(CheckpointedTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            counts.append(dict(self._checkpointing.tally.calls))
            return loss

    counts = []
    model = plain_model()
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    args = arguments(tmp_path, max_steps=2)
    trainer = Counts(model, args, train_dataset=text_dataset(8), callbacks=[Unfreezes()])
    trainer.train()
    assert counts[0] == {"no graph": 3, "recompute": 1}
    assert counts[1] == {"no graph": 3, "recompute": 5}
    assert not _global_optimizer_pre_hooks


def test_signature_is_the_parents():
    for ours, theirs in ((CheckpointedTrainer, Trainer), (CheckpointedSeq2SeqTrainer, Seq2SeqTrainer)):
        parameters = dict(inspect.signature(ours).parameters)
        assert parameters.pop("checkpointing_policy").kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters == dict(inspect.signature(theirs).parameters)


def test_a_subclass_with_its_own_constructor(tmp_path):
    class QuestionAnsweringTrainer(CheckpointedTrainer):
        def __init__(self, *args, eval_examples=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.eval_examples = eval_examples

    trainer = QuestionAnsweringTrainer(
        plain_model(), arguments(tmp_path), train_dataset=text_dataset(8), eval_examples=[1]
    )  # fmt: skip
    trainer.train()
    assert trainer.eval_examples == [1]
    assert trainer.memory_report()["recomputed_blocks"] == 4


def test_the_start_is_said_in_one_line(tmp_path, caplog):
    trained(tmp_path, **FULL)
    lines = [record.getMessage() for record in caplog.records if record.name == "ckpt_trainer"]
    assert len(lines) == 1
    assert lines[0].startswith("mode full: 4/4 text blocks recomputed; non-reentrant; use_cache off while training")


def test_auto_says_its_budget_and_the_plan_of_each_size(tmp_path, caplog):
    trained(tmp_path)
    budget, start, plan = [record.getMessage() for record in caplog.records if record.name == "ckpt_trainer"]
    assert budget.startswith("auto: budget ")
    assert start.startswith(
        "mode auto, at first: 4/4 text blocks recomputed; non-reentrant; use_cache off while training"
    )
    assert plan.startswith("auto, up to input_ids 4x12: 4 keep; predicted peak ")


class NoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 1)

    def forward(self, x, labels=None):
        return {"loss": (self.head(x) - labels).square().mean()}


def test_a_model_without_blocks_trains_with_a_warning_or_is_an_error_where_a_mode_was_named(tmp_path, caplog):
    data = [{"x": torch.ones(4), "labels": torch.ones(1)}] * 4
    CheckpointedTrainer(NoBlocks(), arguments(tmp_path), train_dataset=data).train()
    assert "found no repeated blocks in NoBlocks" in caplog.text
    named = CheckpointedTrainer(NoBlocks(), arguments(tmp_path, checkpointing_mode="full"), train_dataset=data)
    with pytest.raises(ValueError, match=r"checkpointing_mode='full': found no repeated blocks in NoBlocks"):
        named.train()


def test_a_glob_that_names_nothing_is_an_error(tmp_path):
    args = arguments(tmp_path, checkpointing_modules={"vision": "full"})
    with pytest.raises(ValueError, match=r"names 'vision', which matches no block.*model.layers \(4 x text\)"):
        CheckpointedTrainer(plain_model(), args, train_dataset=text_dataset(8))


def test_checkpointing_that_the_user_turned_on_is_replaced_while_training(tmp_path, caplog):
    plain = trained(tmp_path, Trainer, TrainingArguments)
    model = plain_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable()
    forwards = []
    model.model.layers[0].mlp.register_forward_hook(lambda *args: forwards.append(1))
    before = state_of(model)
    ours = trained(tmp_path, model=model, checkpointing_mode="none")
    assert_same_training(plain, ours)
    assert len(forwards) == 3
    assert ours.memory_report()["recomputed_blocks"] == 0
    assert "checkpointing was turned on for" in caplog.text
    assert state_of(model) == before


@pytest.mark.parametrize("skip_frozen", [True, False])
def test_frozen_blocks_below_the_first_trainable_parameter(tmp_path, skip_frozen):
    model = plain_model()
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    model.enable_input_require_grads()
    before = state_of(model)
    ours = trained(tmp_path, model=model, checkpointing_skip_frozen=skip_frozen, **FULL)
    expected = {"no graph": 9, "recompute": 3} if skip_frozen else {"recompute": 12}
    assert ours.memory_report()["calls"] == expected
    assert state_of(model) == before


def test_gradient_accumulation_and_clipping(tmp_path):
    flags = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1, "max_steps": 2}
    plain = trained(tmp_path, Trainer, TrainingArguments, **flags)
    for own in ({}, {"checkpointing_budget": "900KiB"}, FULL):
        assert_same_training(plain, trained(tmp_path, **flags, **own))


@pytest.mark.parametrize(
    "flags", [{"bf16": True}, {"neftune_noise_alpha": 5}, {"label_smoothing_factor": 0.1}], ids=str
)
def test_precision_noise_and_smoothing(tmp_path, flags):
    plain = trained(tmp_path, Trainer, TrainingArguments, **flags)
    for own in ({}, {"checkpointing_budget": "900KiB"}, FULL):
        assert_same_training(plain, trained(tmp_path, **flags, **own))


@pytest.mark.parametrize(
    ("flags", "does"),
    [
        ({}, ("recompute", 12)),
        ({"checkpointing_mode": "selective"}, ("rebuild", 0)),
        ({"checkpointing_every_n": 2}, ("recompute", 6)),
        ({"checkpointing_mode": "offload"}, ("recompute", 12)),
    ],
    ids=str,
)
def test_trl(tmp_path, flags, does):
    class Sft(CheckpointingMixin, trl.SFTTrainer):
        pass

    @dataclasses.dataclass
    class Arguments(CheckpointingArguments, trl.SFTConfig):
        pass

    def sft(cls):
        from datasets import Dataset

        # Without flags of ours, also without their class.
        own = {"cls": Arguments, **flags} if cls is Sft and flags else {"cls": trl.SFTConfig}
        args = arguments(tmp_path, max_length=16, gradient_checkpointing=cls is Sft, bf16=False, **own)
        data = Dataset.from_dict({"text": ["the cat sat on the mat"] * 8})
        trainer = cls(plain_model(), args, train_dataset=data, processing_class=tokenizer())
        trainer.train()
        return trainer

    ours = sft(Sft)
    assert_same_training(sft(trl.SFTTrainer), ours)
    report = ours.memory_report()
    assert report["recomputed_blocks"] == does[1]
    assert report["calls"] == {does[0]: does[1] or 12}
    if flags.get("checkpointing_mode") == "offload":  # without a device it is `full`
        assert report["offload"]["copies_out"] == 0


def test_sequence_to_sequence_with_generation(tmp_path):
    case = CASES["t5"]
    rows = [{key: value[i] for key, value in case.batch().items()} for i in (0, 1)] * 4

    def run(cls, args_cls):
        model = case.build()
        # Plain Trainer trains with the cache that the config of the decoder asks for; it lays keys out in another way.
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "use_cache"):
                module.config.use_cache = False
        args = arguments(tmp_path, args_cls, predict_with_generate=True, generation_max_length=6)
        trainer = cls(model, args, train_dataset=rows, eval_dataset=rows[:2])
        trainer.train()
        return trainer, trainer.predict(rows[:2]).predictions

    plain, expected = run(Seq2SeqTrainer, Seq2SeqTrainingArguments)
    ours, predicted = run(CheckpointedSeq2SeqTrainer, CheckpointSeq2SeqTrainingArguments)
    assert_same_training(plain, ours)
    assert (expected == predicted).all()
    assert ours.memory_report()["recomputed_blocks"] == 5


def lora(model, **options):
    torch.manual_seed(5)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=targets, **options)
    return peft.get_peft_model(model, config)


def test_lora_trains_the_same_and_saves_the_users_config(tmp_path):
    plain = trained(tmp_path, Trainer, TrainingArguments, model=lora(plain_model()))
    assert_same_training(plain, trained(tmp_path, model=lora(plain_model()), checkpointing_budget="900KiB"))
    ours = trained(tmp_path, model=lora(plain_model()))
    assert_same_training(plain, ours)
    moved = [name for name, weight in ours.model.named_parameters() if "lora_B" in name and weight.abs().sum() > 0]
    assert len(moved) == 4 * 7


def test_lora_on_the_top_layers_recomputes_those_only(tmp_path):
    ours = trained(tmp_path, model=lora(llama(8), layers_to_transform=[6, 7]), **FULL)
    assert ours.memory_report()["calls"] == {"no graph": 3 * 6, "recompute": 3 * 2}
    merged = ours.model.merge_and_unload()
    merged.save_pretrained(str(tmp_path / "merged"))
    assert saved_config(tmp_path / "merged")["use_cache"] is True


def test_lora_in_reentrant_mode_gives_every_adapter_a_gradient(tmp_path):
    plain = trained(tmp_path, Trainer, TrainingArguments, model=lora(plain_model()))
    assert_same_training(plain, trained(tmp_path, model=lora(plain_model()), checkpointing_use_reentrant=True))


SCRIPT = """
from dataclasses import dataclass, field
from tiny_models import CASES, llama, text_dataset, tokenizer
from transformers import {imports}
{swap}

@dataclass
class ScriptArguments:
    layers: int = field(default=4)

parser = HfArgumentParser((ScriptArguments, TrainingArguments))
script, training = parser.parse_args_into_dataclasses(argv)
trainer = Trainer(model=llama(script.layers, use_cache=False), args=training, train_dataset=text_dataset(16))
trainer.train()
trainer.save_model()
"""


def test_a_script_after_the_two_line_swap(tmp_path):
    options = "--per_device_train_batch_size 4 --max_steps 3 --logging_steps 1 --report_to none --use_cpu True"
    argv = [*options.split(), "--output_dir", str(tmp_path), "--layers", "3", "--save_strategy", "no"]
    swap = "from ckpt_trainer import CheckpointedTrainer as Trainer, CheckpointTrainingArguments as TrainingArguments"
    plain, ours = {"argv": argv}, {"argv": [*argv, "--checkpointing_every_n", "2"]}
    exec(SCRIPT.format(imports="HfArgumentParser, Trainer, TrainingArguments", swap=""), plain)
    exec(SCRIPT.format(imports="HfArgumentParser", swap=swap), ours)
    assert_same_training(plain["trainer"], ours["trainer"])
    assert ours["trainer"].memory_report()["recomputed_blocks"] == 6


def test_hyperparameter_search(tmp_path):
    models = []

    def build():
        models.append(llama())
        return models[-1]

    data = text_dataset(8)
    args = arguments(tmp_path, max_steps=2)
    trainer = CheckpointedTrainer(args=args, model_init=build, train_dataset=data, eval_dataset=data[:2])
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        backend="optuna", n_trials=2, direction="minimize", compute_objective=lambda metrics: metrics["eval_loss"],
    )  # fmt: skip
    assert len(models) >= 3
    assert all(model.config.use_cache for model in models)
    assert all(state_of(model) == state_of(llama()) for model in models)


def test_metrics_do_not_touch_logs_of_evaluation(tmp_path):
    data = text_dataset(8)
    trainer = CheckpointedTrainer(llama(), arguments(tmp_path, max_steps=1), train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    assert not any(key.startswith("checkpointing/") for key in trainer.evaluate())


@pytest.mark.parametrize(("flags", "replays"), [({"gradient_checkpointing": True}, 12), ({}, 4)], ids=str)
def test_a_batch_size_that_is_found_by_failing(tmp_path, flags, replays):
    class TooLarge(CheckpointedTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if inputs["input_ids"].shape[0] > 2:
                raise RuntimeError("CUDA out of memory. Tried")
            return super().training_step(model, inputs, *args, **kwargs)

    model = llama()
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = arguments(tmp_path, auto_find_batch_size=True, **flags)
        trainer = TooLarge(model, args, train_dataset=text_dataset(8))
        trainer.train()
    assert trainer.memory_report()["recomputed_blocks"] == replays
    assert state_of(model) == before


def test_prefix_tuning_keeps_its_blocks_and_trains_the_same(tmp_path, caplog):
    def prefixed():
        torch.manual_seed(6)
        return peft.get_peft_model(plain_model(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))

    plain = trained(tmp_path, Trainer, TrainingArguments, model=prefixed())
    assert_same_training(plain, trained(tmp_path, model=prefixed()))
    assert "cannot be run alone" not in caplog.text  # a second call would add to the cache
    ours = trained(tmp_path, model=prefixed(), **FULL)
    assert_same_training(plain, ours)
    assert ours.memory_report()["calls"] == {"got a key/value cache": 12}
    assert "4 calls of blocks got a key/value cache and were kept" in caplog.text


def test_a_step_of_ones_own_that_goes_round_the_plan_is_a_warning(tmp_path, caplog):
    class OwnStep(CheckpointedTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = model(**self._prepare_inputs(inputs)).loss
            self.accelerator.backward(loss)
            return loss.detach()

    OwnStep(llama(), arguments(tmp_path), train_dataset=text_dataset(8)).train()
    assert caplog.text.count("training_step of OwnStep does not call super().training_step") == 1


def test_the_mixin_has_to_come_first():
    with pytest.raises(TypeError, match="Wrong names CheckpointingMixin after a trainer"):
        type("Wrong", (Trainer, CheckpointingMixin), {})


def test_a_name_that_matches_nothing_is_told_when_the_trainer_is_made(tmp_path):
    args = arguments(tmp_path, checkpointing_modules={"model.layer": "none"})
    with pytest.raises(ValueError, match=r"Did you mean 'model.layers'"):
        CheckpointedTrainer(plain_model(), args)


@pytest.mark.parametrize(("level", "shown"), [("passive", True), ("info", True), ("warning", False)])
def test_the_line_at_the_start_follows_a_log_level_that_was_set(tmp_path, caplog, level, shown):
    trained(tmp_path, log_level=level)
    assert any(record.name == "ckpt_trainer" for record in caplog.records) == shown
