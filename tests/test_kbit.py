"""Quantised models: prepared while they train, as they were afterwards, and exact in every mode."""

import copy
import types

import peft
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from fake_device import FakeStreams
from safetensors.torch import load_file
from tiny_models import llama, text_dataset
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from ckpt_trainer import (
    CheckpointedTrainer,
    CheckpointTrainingArguments,
    checkpointing,
    groups,
    prepare_model_for_kbit_training,
    streams,
)
from ckpt_trainer.kbit import following_autocast, kbit_prepared, quantization_of, weight_bytes, without_kept_inputs
from ckpt_trainer.report import kbit_line

BITS = (4, 8)
MODES = {
    "none": {"mode": "none"},
    "full": {"mode": "full"},
    "every_n": {"mode": "full", "every_n": 2},
    "reentrant": {"mode": "full", "use_reentrant": True},
    "segment": {"mode": "full", "segment": 2},
    "expensive": {"mode": "selective"},
    "matmul": {"mode": "selective", "save": "matmul"},
    "attention": {"mode": "selective", "save": "attention"},
    "module": {"mode": "selective", "save": ["mlp.act_fn"]},
    "offload": {"mode": "offload"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    llama(hidden_size=64, intermediate_size=128, dtype=torch.bfloat16).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def base(folder, bits=4, dtype=torch.bfloat16, **options):
    if bits == 4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def adapted(model):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1, target_modules="all-linear")
    return peft.get_peft_model(model, config).train()


def batch():
    rows = text_dataset(2)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def step(model, autocast=False):
    """Loss and gradients of one step, from the same random numbers each time."""
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch(), use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def equal(left, right):
    return len(left) == len(right) > 1 and all(map(torch.equal, left, right))


def dtypes(model):
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def hooks(model):
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def bits_of(model):
    return {
        name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)
    }


class TestQuantizationOf:
    @pytest.mark.parametrize("bits", BITS)
    def test_bitsandbytes(self, folder, bits):
        model = base(folder, bits)
        assert quantization_of(model) == quantization_of(adapted(model)) == f"bitsandbytes, {bits} bit"

    @pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "aqlm", "torchao"])
    def test_others_by_the_attribute_that_transformers_writes(self, method):
        model = llama()
        model.quantization_method = transformers.utils.quantization_config.QuantizationMethod(method)
        assert quantization_of(model) == quantization_of(nn.Sequential(model)) == method

    def test_by_the_quantizer(self):
        model = llama()
        model.hf_quantizer = types.SimpleNamespace(quantization_config=types.SimpleNamespace(quant_method="mine"))
        assert quantization_of(model) == "mine"

    def test_by_the_weights(self, folder):
        layer = copy.deepcopy(base(folder, 4).model.layers[0])
        assert quantization_of(layer) == "bitsandbytes, 4 bit"

    def test_not(self):
        assert quantization_of(llama()) is None


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("autocast", [False, True])
def test_modes_are_exact(folder, bits, autocast):
    model = adapted(base(folder, bits))
    plain = step(model, autocast)
    for name, flags in MODES.items():
        with checkpointing(model, **flags) as state:
            assert equal(step(model, autocast), plain), name
        replays = 2 if name == "every_n" else 0 if name in ("none", "expensive") else 4
        assert state.report()["recomputed_blocks"] == replays, name


def nodes_of(tensor):
    """The nodes of autograd from a tensor on, those of bitsandbytes for 8 bits."""
    waiting, found = [tensor.grad_fn], {}
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = node.name()
            waiting.extend(following for following, _ in node.next_functions)
    return [node for node, name in found.items() if name.startswith("MatMul8bit")]


class TestInputsOfLayersWith8Bits:
    def test_are_not_kept(self, folder):
        model = adapted(base(folder, 8))
        for within in (False, True):
            with checkpointing(model, "full") if within else torch.enable_grad():
                nodes = nodes_of(model(**batch(), use_cache=False).loss)
                # All but q, k and v of the first block, whose input needs no gradient.
                assert len(nodes) == 4 * 7 - 3
                assert all(isinstance(node.A, torch.Tensor) is not within for node in nodes)

    def test_nothing_stays_on_the_layers(self, folder):
        model = adapted(base(folder, 8))
        before = hooks(model)
        with pytest.raises(KeyboardInterrupt), checkpointing(model, "full"):
            assert hooks(model) != before
            raise KeyboardInterrupt
        assert hooks(model) == before

    @pytest.mark.parametrize("needs_weight", [False, True])
    def test_what_the_kernel_for_other_devices_keeps(self, needs_weight):
        """It holds (quantised by column, outliers, input); of these the gradient of the input needs none."""

        class MatMul8bitLt(torch.autograd.Function):
            @staticmethod
            def forward(ctx, given, weight):
                ctx.tensors = (None, given[:1], given)
                ctx.weight = weight
                return given @ weight

            @staticmethod
            def backward(ctx, gradient):
                weight = ctx.tensors[2].T @ gradient if ctx.needs_input_grad[1] else None
                return gradient @ ctx.weight.T, weight

        class Int8Params(nn.Parameter):
            pass

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = Int8Params(torch.randn(4, 4), requires_grad=needs_weight)

            def forward(self, given):
                return MatMul8bitLt.apply(given, self.weight)

        layer = Layer()
        given = torch.randn(3, 4, requires_grad=True)
        with without_kept_inputs(layer):
            result = layer(given)
        kept = [isinstance(tensor, torch.Tensor) for tensor in result.grad_fn.tensors]
        assert kept == [False, needs_weight, needs_weight]
        result.sum().backward()
        assert torch.equal(given.grad, torch.ones(3, 4) @ layer.weight.T)


class TestUpcast:
    @pytest.mark.parametrize("bits", BITS)
    def test_none_changes_nothing(self, folder, bits):
        model = adapted(base(folder, bits))
        before = dtypes(model)
        with kbit_prepared(model) as done:
            assert dtypes(model) == before
        assert (len(done.upcast), done.bytes_after) == (0, done.bytes_before)

    @pytest.mark.parametrize("bits", BITS)
    def test_norms(self, folder, bits):
        model = adapted(base(folder, bits))
        before, start = dtypes(model), bits_of(model)
        with kbit_prepared(model, "norms") as done:
            changed = {name for name, dtype in dtypes(model).items() if dtype != before[name]}
            assert changed == {name for name in before if "norm" in name}
            assert {dtypes(model)[name] for name in changed} == {torch.float32}
            # 4 layers with two, and the last; 64 weights of 2 bytes more.
            assert len(done.upcast) == 9
            assert done.bytes_after - done.bytes_before == 9 * 64 * 2
        assert dtypes(model) == before
        after = bits_of(model)
        assert all(torch.equal(after[name], value) for name, value in start.items())

    @pytest.mark.parametrize("autocast", [False, True])
    def test_norms_give_what_they_gave_in_dtype(self, folder, autocast):
        """Else activations double, and without autocast the head fails on what it gets."""
        model = adapted(base(folder))
        given = {}

        def note(which):
            for name, module in model.named_modules():
                if name.endswith(("norm", "o_proj")):
                    module.register_forward_hook(lambda m, a, output: given.setdefault(which, []).append(output.dtype))
            return step(model, autocast)

        with kbit_prepared(model, "norms"):
            found = note("prepared")
        for module in model.modules():
            module._forward_hooks.clear()
        note("plain")
        assert given["prepared"] == given["plain"]
        assert all(torch.isfinite(tensor).all() for tensor in found)

    def test_norms_make_nothing_grow(self, folder):
        model = adapted(base(folder))

        def stored():
            held = {}

            def pack(tensor):
                held[tensor.untyped_storage()._cdata] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(**batch(), use_cache=False).loss
                own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
                found = sum(tensor.untyped_storage().nbytes() for key, tensor in held.items() if key not in own)
            loss.backward()
            return found

        plain = stored()
        with kbit_prepared(model, "norms"):
            assert stored() == plain
        norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
        for parameter in norms:
            parameter.data = parameter.data.float()
        assert stored() > plain

    def test_norms_compute_in_fp32(self, folder):
        model = adapted(base(folder))
        norm = model.base_model.model.model.norm
        hidden = torch.randn(3, 64, dtype=torch.bfloat16)
        with kbit_prepared(model, "norms"):
            found = norm(hidden)
        wide = copy.deepcopy(norm).float()
        assert torch.equal(found, wide(hidden).to(torch.bfloat16))

    @pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
    def test_norms_give_what_two_dtypes_make(self, folder, given):
        norm = adapted(base(folder)).base_model.model.model.norm
        norm.weight.data = norm.weight.data.half()
        model = nn.Sequential(norm)
        model.quantization_method = "gptq"
        plain = norm(torch.ones(3, 64, dtype=given)).dtype
        with kbit_prepared(model, "norms"):
            assert norm(torch.ones(3, 64, dtype=given)).dtype == plain == torch.float32

    def test_all(self, folder):
        model = adapted(base(folder))
        before = dtypes(model)
        with kbit_prepared(model, "all") as done:
            assert torch.bfloat16 not in dtypes(model).values()
            assert dtypes(model)["base_model.model.lm_head.weight"] == torch.float32
            assert sum(dtype == torch.uint8 for dtype in dtypes(model).values()) == 4 * 7
            assert done.bytes_after == weight_bytes(model) > done.bytes_before
        assert dtypes(model) == before

    def test_all_is_what_peft_prepares(self, folder):
        ours, theirs = base(folder), base(folder)
        prepare_model_for_kbit_training(ours)
        peft.prepare_model_for_kbit_training(theirs, use_gradient_checkpointing=False)
        ours, theirs = adapted(ours), adapted(theirs)
        with kbit_prepared(ours, "all"):
            assert dtypes(ours) == dtypes(theirs)
            assert equal(step(ours), step(theirs))

    def test_trainable_weights_and_norms_of_torch_stay(self, folder):
        model = base(folder).requires_grad_(False)
        model.model.norm.requires_grad_(True)
        model.model.extra = nn.LayerNorm(64, dtype=torch.bfloat16).requires_grad_(False)
        with kbit_prepared(model, "norms") as done:
            assert model.model.norm.weight.dtype == model.model.extra.weight.dtype == torch.bfloat16
        assert len(done.upcast) == 8

    def test_kernels_of_others_take_16_bits(self, folder):
        model = base(folder).requires_grad_(False)
        model.quantization_method = "gptq"
        with kbit_prepared(model, "all") as done:
            assert model.lm_head.weight.dtype == torch.bfloat16
        assert len(done.upcast) == 9
        assert "gptq" in done.left

    def test_sharded_parameters_stay(self, folder):
        model = adapted(base(folder))
        before = dtypes(model)
        with kbit_prepared(model, "norms", is_sharded=True) as done:
            assert dtypes(model) == before
        assert len(done.upcast) == 0
        assert "FSDP" in done.left

    @pytest.mark.parametrize("upcast", ["norms", "all"])
    def test_undone_after_an_exception(self, folder, upcast):
        model = adapted(base(folder))
        before = dtypes(model), hooks(model)
        with pytest.raises(KeyboardInterrupt), kbit_prepared(model, upcast):
            assert (dtypes(model), hooks(model)) != before
            raise KeyboardInterrupt
        assert (dtypes(model), hooks(model)) == before

    def test_norms_that_share_a_weight(self, folder):
        model = adapted(base(folder))
        first, second = (layer.input_layernorm for layer in model.base_model.model.model.layers[:2])
        second.weight = first.weight
        with kbit_prepared(model, "norms") as done:
            assert first.weight.dtype == torch.float32
        assert len(done.upcast) == 8
        assert first.weight.dtype == torch.bfloat16

    def test_twice_is_once(self, folder):
        model = adapted(base(folder))
        before = dtypes(model)
        with kbit_prepared(model, "norms"):
            with kbit_prepared(model, "norms") as again:
                pass
            assert dtypes(model) != before
        assert len(again.upcast) == 0
        assert dtypes(model) == before

    @pytest.mark.parametrize("upcast", ["norms", "all"])
    def test_modes_are_exact_beside_it(self, folder, upcast):
        model = adapted(base(folder))
        with kbit_prepared(model, upcast), following_autocast(model):
            plain = step(model, autocast=True)
            for name, flags in MODES.items():
                with checkpointing(model, **flags):
                    assert equal(step(model, autocast=True), plain), name


class TestComputeDtype:
    @staticmethod
    def compute(model):
        return {vars(module)["compute_dtype"] for module in model.modules() if "compute_dtype" in vars(module)}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
    def test_follows_autocast(self, folder, dtype):
        # In fp32, since autocast to fp16 takes no bf16 on a CPU.
        model = adapted(base(folder, dtype=torch.float32))
        seen, before = [], hooks(model)
        with following_autocast(model):
            layer = next(module for module in model.modules() if "compute_dtype" in vars(module))
            layer.register_forward_hook(lambda module, args, output: seen.append(module.compute_dtype))
            model(**batch())
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                model(**batch())
        assert seen == [torch.float32, dtype or torch.float32]
        layer._forward_hooks.clear()
        assert hooks(model) == before
        assert self.compute(model) == {torch.float32}

    def test_what_the_user_chose_stays(self, folder):
        model = adapted(base(folder, bnb_4bit_compute_dtype=torch.bfloat16))
        with kbit_prepared(model) as done, following_autocast(model):
            model(**batch())
            assert self.compute(model) == {torch.bfloat16}
        assert done.compute == 0

    def test_biases_that_the_layers_cast_are_given_back(self, tmp_path):
        llama(attention_bias=True, hidden_size=64).save_pretrained(tmp_path)
        model = adapted(base(tmp_path, dtype=torch.float32))
        biases = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
        for bias in biases:
            torch.nn.init.normal_(model.get_parameter(bias))
            biases[bias] = model.get_parameter(bias).detach().clone()
        with following_autocast(model):
            step(model, autocast=True)
            assert torch.bfloat16 in {model.get_parameter(name).dtype for name in biases}
        assert len(biases) == 4 * 4
        assert all(torch.equal(model.get_parameter(name), value) for name, value in biases.items())

    def test_bits_are_the_same(self, folder):
        model = adapted(base(folder))
        for autocast in (False, True):
            plain = step(model, autocast)
            with following_autocast(model):
                assert equal(step(model, autocast), plain)


class TestPrepareModel:
    def test_freezes_and_does_nothing_else(self, folder):
        model = base(folder)
        before = dtypes(model), hooks(model)
        assert prepare_model_for_kbit_training(model, use_gradient_checkpointing=True) is model
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert (dtypes(model), hooks(model)) == before
        assert not model.is_gradient_checkpointing

    @pytest.mark.parametrize(
        "options", [{}, {"use_gradient_checkpointing": False}, {"gradient_checkpointing_kwargs": {}}]
    )
    def test_says_what_it_does_not_look_at(self, folder, caplog, options):
        with caplog.at_level("INFO", logger="ckpt_trainer"):
            prepare_model_for_kbit_training(base(folder), **options)
        assert len(caplog.records) == len(options)

    def test_refuses_to_freeze_adapters(self, folder):
        with pytest.raises(ValueError, match="has adapters"):
            prepare_model_for_kbit_training(adapted(base(folder)))
        model = base(folder)
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="has adapters"):
            prepare_model_for_kbit_training(model)

    def test_refuses_what_is_not_quantised(self):
        with pytest.raises(ValueError, match="not quantised"):
            prepare_model_for_kbit_training(llama())


def train(tmp_path, model, cls=CheckpointedTrainer, args=CheckpointTrainingArguments, **flags):
    fixed = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "report_to": [],
        "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "learning_rate": 1e-2, "bf16": True,
    }  # fmt: skip
    trainer = cls(model=model, args=args(**{**fixed, **flags}), train_dataset=text_dataset(16))
    trainer.train()
    return trainer


def losses(trainer):
    return [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]


class TestTrainer:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("by_peft", [False, True])
    def test_trains_as_plain_trainer(self, folder, tmp_path, bits, by_peft):
        def model():
            loaded = base(folder, bits)
            loaded.config.use_cache = False
            return adapted(peft.prepare_model_for_kbit_training(loaded) if by_peft else loaded)

        plain = train(tmp_path, model(), Trainer, TrainingArguments)
        ours = train(tmp_path, model(), checkpointing_mode="full")
        assert losses(ours) == losses(plain)
        assert len(losses(ours)) == 3
        for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("upcast", ["none", "norms", "all"])
    def test_model_is_as_it_was(self, folder, tmp_path, upcast, caplog):
        model = adapted(base(folder))
        before, frozen = dtypes(model), {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        seen = []
        model.register_forward_pre_hook(lambda *_: seen.append(dtypes(model)))
        with caplog.at_level("INFO", logger="ckpt_trainer"):
            train(tmp_path, model, checkpointing_kbit_upcast=upcast)
        widened = [name for name, dtype in seen[0].items() if dtype != before[name]]
        assert len(widened) == {"none": 0, "norms": 9, "all": 11}[upcast]
        assert dtypes(model) == before
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        (line,) = [r.message for r in caplog.records if r.message.startswith("quantised (bitsandbytes, 4 bit)")]
        said = {"none": "none cast", "norms": "9 parameters cast to fp32", "all": "11 parameters cast to fp32"}
        assert said[upcast] in line
        assert "28 layers set to compute in float32 do so in what autocast has" in line

    def test_what_is_trained_in_16_bits_is_told(self, folder, tmp_path, caplog):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = peft.get_peft_model(base(folder), config)
        with caplog.at_level("INFO", logger="ckpt_trainer"), kbit_prepared(model, "all") as done:
            assert model.base_model.model.lm_head.modules_to_save.default.weight.dtype == torch.bfloat16
        assert done.trained == ("base_model.model.lm_head.modules_to_save.default.weight",)
        assert kbit_line(done).endswith(f"trained in 16 bits, and not cast: {done.trained[0]}")

    def test_after_peft_prepared_it(self, folder, tmp_path, caplog):
        """PEFT's turns checkpointing on and hooks the embeddings; in a step there is one checkpointing and no hook."""
        model = adapted(peft.prepare_model_for_kbit_training(base(folder)))
        embeddings = model.get_input_embeddings()
        assert embeddings._forward_hooks
        seen = []
        model.register_forward_pre_hook(lambda *_: seen.append(len(embeddings._forward_hooks)))
        with caplog.at_level("INFO", logger="ckpt_trainer"):
            trainer = train(tmp_path, model, checkpointing_kbit_upcast="norms")
        assert set(seen) == {0}
        assert embeddings._forward_hooks
        assert any("weights" in r.message and "none cast" in r.message for r in caplog.records)
        assert trainer.memory_report()["recomputed_blocks"] == 4  # in the first step; then all of it has room

    def test_peft_does_not_turn_checkpointing_on(self, folder, tmp_path):
        model = adapted(peft.prepare_model_for_kbit_training(base(folder)))
        trainer = train(tmp_path, model, checkpointing_mode="none")
        assert trainer.memory_report()["recomputed_blocks"] == 0

    @pytest.mark.parametrize("flags", [{}, {"checkpointing_use_reentrant": True}, {"checkpointing_skip_frozen": False}])
    def test_one_input_hook_at_most(self, folder, tmp_path, flags):
        model = adapted(peft.prepare_model_for_kbit_training(base(folder)))
        embeddings = model.get_input_embeddings()
        theirs = len(embeddings._forward_hooks)
        seen = []
        model.register_forward_pre_hook(lambda *_: seen.append(len(embeddings._forward_hooks)))
        train(tmp_path, model, checkpointing_input_grads="always", **flags)
        # Theirs where it stays, else one of ours.
        assert set(seen) == {theirs if flags else 1}

    def test_flag_without_a_quantised_model_warns(self, tmp_path, caplog):
        train(tmp_path, llama(), checkpointing_kbit_upcast="norms")
        assert any("has no effect, since no weight of" in r.message for r in caplog.records)

    def test_saved_is_what_was_loaded(self, folder, tmp_path):
        """PEFT saves the embeddings of the base beside the adapter, if it is on them."""
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "embed_tokens"])
        model = peft.get_peft_model(base(folder), config)
        seen = []
        model.register_forward_pre_hook(lambda *_: seen.append(dtypes(model)["base_model.model.lm_head.weight"]))
        trainer = train(tmp_path, model, checkpointing_kbit_upcast="all", save_strategy="steps", save_steps=2)
        assert seen == 3 * [torch.float32]  # after it was saved as well
        trainer.save_model(str(tmp_path / "after"))
        for saved in ("checkpoint-2", "after"):
            tensors = load_file(tmp_path / saved / "adapter_model.safetensors")
            (name,) = [name for name in tensors if "lora" not in name]
            assert tensors[name].dtype == torch.bfloat16, saved

    def test_compiled_layers_compute_as_they_do_compiled(self, folder, tmp_path):
        def model():
            torch._dynamo.reset()
            return adapted(base(folder))

        flags = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
        plain = train(tmp_path, model(), Trainer, TrainingArguments, **flags)
        for mode in ("none", "full"):
            assert losses(train(tmp_path, model(), checkpointing_mode=mode, **flags)) == losses(plain)

    def test_model_from_model_init(self, folder, tmp_path):
        trainer = CheckpointedTrainer(
            model_init=lambda: adapted(base(folder)),
            args=CheckpointTrainingArguments(
                output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], checkpointing_kbit_upcast="norms"
            ),
            train_dataset=text_dataset(8),
        )
        trainer.train()
        assert torch.bfloat16 in dtypes(trainer.model).values()

    @pytest.mark.parametrize("bits", BITS)
    def test_adapter_is_saved_and_loaded(self, folder, tmp_path, monkeypatch, bits):
        # Without bf16, under which accelerate leaves its autocast on the model; the bf16 of other tests is remembered.
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        flags = {"checkpointing_mode": "full", "checkpointing_kbit_upcast": "norms", "bf16": False}
        trainer = train(tmp_path, adapted(base(folder, bits)), **flags)
        trainer.save_model(str(tmp_path / "adapter"))
        loaded = peft.PeftModel.from_pretrained(base(folder, bits), tmp_path / "adapter")
        assert loaded.config.use_cache is trainer.model.config.use_cache is True
        with torch.no_grad():
            left, right = (model.eval()(**batch()).logits for model in (trainer.model, loaded))
        assert torch.equal(left, right)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("save", ["inputs", "attention", "expensive", "all"])
def test_offload_moves_tensors_and_stays_exact(folder, monkeypatch, bits, save):
    model = adapted(base(folder, bits))
    plain = step(model)
    fake = FakeStreams("lazy")
    monkeypatch.setattr(streams, "streams_of", fake.streams_of)
    monkeypatch.setattr(groups, "MIN_BYTES", 16)
    with checkpointing(model, mode="offload", offload_save=save) as state:
        for _ in range(2):
            assert equal(step(model), plain)
    assert state.report()["offload"]["copies_out"] > 0
    assert fake.device_bytes == 0
