"""Plans in force: the context for one's own loop, the check of the first backward, reports and errors."""

import copy
import gc
import pickle
from contextlib import nullcontext

import pytest
import torch
import transformers
from tiny_models import CASES, llama, text_dataset
from torch import nn
from torch.utils.checkpoint import CheckpointError

from ckpt_trainer import checkpointing, engine
from ckpt_trainer.blocks import find_blocks
from ckpt_trainer.flops import FlopCounter
from ckpt_trainer.gradient_check import GradientCheck
from ckpt_trainer.install import Installed, Runners, _Forward
from ckpt_trainer.memory import SavedBytes
from ckpt_trainer.plan import Settings
from ckpt_trainer.policies import make_plan
from ckpt_trainer.recompute import Tally


def batch():
    rows = text_dataset(2)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def step(model):
    torch.manual_seed(1)
    loss = model(**batch()).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_loop_of_ones_own():
    kept = step(llama(use_cache=False))
    model = llama()
    with checkpointing(model, mode="full") as state:
        assert model.config.use_cache is False
        replayed = step(model)
    assert_equal(kept, replayed)
    assert state.report()["recomputed_blocks"] == 4
    assert model.config.use_cache is True
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("budget", "replays"), [(None, 4), ("0B", 16), ("700KiB", 4)])
def test_by_default_a_loop_of_ones_own_gets_a_plan_for_each_size(budget, replays):
    def train(model, state=None):
        optimizer, found = torch.optim.AdamW(model.parameters()), []
        for length in (12, 12, 6, 12):
            torch.manual_seed(1)
            model.train()
            loss = model(**{key: value[:, :length] for key, value in batch().items()}).loss
            loss.backward()
            found += [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
            optimizer.step()
            assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
            optimizer.zero_grad()
            model.eval()
            found.append(model.generate(batch()["input_ids"][:, :4], max_new_tokens=4, do_sample=False, use_cache=True))
        return found

    kept, model = train(llama(use_cache=False)), llama()
    with checkpointing(model, budget=budget) as state:
        assert model.config.use_cache is False
        ours = train(model)
    assert_equal(kept, ours)
    report = state.report()
    sizes = report["auto"]["sizes"]
    lengths = [size["inputs"]["input_ids"] for size in sizes]
    assert lengths == [[2, 12], [2, 6]]
    assert report["recomputed_blocks"] == replays
    assert (sizes[0]["actions"] == {"keep": 4}) is (budget is None)
    assert model.config.use_cache is True
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("flags", "rebuilt"), [({"mode": "auto"}, 0), ({}, 2)], ids=str)
def test_segments_are_of_mode_full_only(flags, rebuilt):
    model = llama()
    with checkpointing(model, segment=2, budget="0B", **flags) as state:
        step(model)
    assert state.report()["rebuilt_inputs"] == rebuilt


def test_a_mode_that_does_not_exist():
    with (
        pytest.raises(ValueError, match="checkpointing_mode='ful' is not one of auto, full, none"),
        checkpointing(llama(), mode="ful"),
    ):
        pass


def test_an_option_that_does_not_exist():
    with pytest.raises(TypeError, match="Did you mean 'every_n'"), checkpointing(llama(), every=2):
        pass


def test_modules_may_be_a_dict():
    with checkpointing(llama(), "full", modules={"model.layers.0": "none"}) as state:
        assert state.plan.count("recompute") == 3


def test_the_forward_of_a_block_is_given_back():
    model = llama(2)
    mine = model.model.layers[0].forward
    model.model.layers[0].forward = mine
    with checkpointing(model, "full"):
        assert model.model.layers[0].forward is not mine
    assert model.model.layers[0].forward is mine
    assert "forward" not in vars(model.model.layers[1])


def test_state_dict_names_classes_and_copies_are_untouched_while_in_force():
    model = llama(2)
    names, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    with checkpointing(model, "full"):
        assert list(model.state_dict()) == names
        assert [type(module) for module in model.modules()] == classes


def test_hooks_on_a_block_run_once():
    model, calls = llama(2), []
    model.model.layers[0].register_forward_hook(lambda *args: calls.append("forward"))
    with checkpointing(model, "full"):
        step(model)
    assert calls == ["forward"]


def test_installed_may_be_entered_again():
    model = llama(2, use_cache=False)
    blocks = find_blocks(model)
    installed = Installed(
        blocks, make_plan(blocks, Settings()), Settings(), Runners(blocks, Settings(), tally := Tally())
    )
    for _ in range(2):
        with installed:
            model(**batch()).loss.backward()
        model(**batch()).loss.backward()
    assert tally.replays == {"model.layers.0": 2, "model.layers.1": 2}


def test_share_of_flops_recomputed_is_what_is_counted():
    model = llama(4, use_cache=False)
    with FlopCounter() as forward:
        model(**batch())
    with FlopCounter() as plain:
        step(model)
    with checkpointing(model, "full") as state, FlopCounter() as replayed:
        step(model)
    hidden, inner, tokens = 32, 64, 24
    unused = 4 * 2 * tokens * hidden * inner  # early stop: the last matmul of each block is not run again
    blocks = state.report()["recomputed_flops_share"] * forward.total
    assert round(blocks) - unused == replayed.total - plain.total


def test_top_two_of_eight_layers_cost_what_they_cost_without_checkpointing():
    def flops(checkpointed):
        model = llama(8, use_cache=False)
        model.requires_grad_(False)
        for layer in model.model.layers[-2:]:
            layer.mlp.requires_grad_(True)
        with FlopCounter() as counter:
            if not checkpointed:
                return step(model), counter.total
            with checkpointing(model, "full") as state:
                result = step(model)
        assert state.tally.calls == {"no graph": 6, "recompute": 2}
        return result, counter.total

    (kept, plain), (replayed, ours) = flops(False), flops(True)
    assert_equal(kept, replayed)
    assert ours <= 1.15 * plain


class Chain(nn.Module):
    """Blocks in a list, and a loss that uses what they leave aside."""

    def __init__(self, block, number=3):
        super().__init__()
        self.layers = nn.ModuleList([block() for _ in range(number)])

    def forward(self, x):
        SINK.clear()
        for layer in self.layers:
            x = layer(x)
        return x.square().mean() + sum(tensor.sum() for tensor in SINK)


SINK = []


class Aside(nn.Module):
    """Puts a tensor where only the model finds it; `router` gets its gradient by that way only."""

    def __init__(self):
        super().__init__()
        self.main, self.router = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        SINK.append(self.router(x).square())
        return x + self.main(x)


def test_reentrant_that_loses_a_gradient_is_an_error_that_names_it():
    model = Chain(Aside)
    message = r"no gradient to layers.0.router.weight.*block 'layers.0'.*checkpointing_use_reentrant=False"
    with pytest.raises(RuntimeError, match=message), checkpointing(model, use_reentrant=True):
        model(torch.ones(2, 4)).backward()


class OnItself(Aside):
    def forward(self, x):
        self.aside = self.router(x).square()
        return x + self.main(x)


class Wrapped:
    def __init__(self, tensor):
        self.tensor = tensor


class ReturnsObject(Aside):
    def forward(self, x):
        return Wrapped(self.main(x))


@pytest.mark.parametrize(
    ("block", "reason"),
    [(OnItself, "block 'layers.0' leaves a tensor on itself as 'aside'"),
     (ReturnsObject, "block 'layers.0' returns a Wrapped, in which tensors are not seen")],
)  # fmt: skip
def test_reentrant_is_refused_where_a_block_has_another_way_out(block, reason):
    model = Chain(block)
    with pytest.raises(ValueError, match=reason), checkpointing(model, use_reentrant=True):
        model(torch.ones(2, 4))


def test_the_same_model_is_right_without_reentrant():
    model = Chain(Aside)
    kept = copy.deepcopy(model)
    kept(torch.ones(2, 4)).backward()
    with checkpointing(model, "full"):
        model(torch.ones(2, 4)).backward()
    assert_equal([p.grad for p in kept.parameters()], [p.grad for p in model.parameters()])


def test_the_check_can_be_turned_off():
    model = Chain(Aside)
    with checkpointing(model, use_reentrant=True, self_check=False):
        model(torch.ones(2, 4)).backward()
    assert model.layers[0].router.weight.grad is None


class Unused(Aside):
    def forward(self, x):
        self.router(x)
        return x + self.main(x)


def test_a_parameter_that_takes_no_part_is_a_warning_without_reentrant(caplog):
    model = Chain(Unused)
    with checkpointing(model, "full"):
        model(torch.ones(2, 4)).backward()
    assert "no gradient to layers.0 (2 parameters), layers.1 (2 parameters)" in caplog.text
    assert "Recomputing is not the cause" in caplog.text


def test_no_warning_where_all_is_well_or_a_module_did_not_run(caplog):
    class Idle(Aside):
        def forward(self, x):
            return x + self.main(x)

    model = Chain(Idle)
    with checkpointing(model, "full"):
        model(torch.ones(2, 4)).backward()
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_the_check_sees_gradients_that_an_optimizer_takes_in_backward():
    model = Chain(Aside)

    def take(parameter):
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(take)
    with GradientCheck(find_blocks(model)) as check:
        model(torch.ones(2, 4)).backward()
    assert check.missing() == []
    assert all(len(parameter._post_accumulate_grad_hooks) == 1 for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Drifts(nn.Module):
    """Reads a number that changes between forward and backward."""

    size = 4

    def __init__(self):
        super().__init__()
        self.main = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.main(x)[:, : Drifts.size]).sum()


def test_a_replay_that_does_not_match_names_its_block():
    model = Chain(Drifts)
    named = pytest.raises(CheckpointError, match=r"block 'layers\.2' gave other tensors")
    with named as raised, checkpointing(model, "full"):
        loss = model(torch.ones(2, 4))
        Drifts.size = 2
        try:
            loss.backward()
        finally:
            Drifts.size = 4
    text = str(raised.value)
    assert 'checkpointing_modules={"layers.2": "none"}' in text
    assert "it reads state that changed" in text
    assert "saved metadata" in text or "metadata" in text  # what torch found stays
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_causes_named_fit_the_block():
    class Router(Drifts):
        pass

    class Moe(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = Router()

        def forward(self, x):
            return self.router(x)

    model = Chain(Moe)
    with pytest.raises(CheckpointError, match="its router chose other experts"), checkpointing(model, "full"):
        loss = model(torch.ones(2, 4))
        Drifts.size = 2
        try:
            loss.backward()
        finally:
            Drifts.size = 4


def test_a_report_before_and_after():
    model = CASES["llava"].build()
    with checkpointing(model, "full", modules={"vision": "none"}) as state:
        before = state.report()
        model(**CASES["llava"].batch()).loss.backward()
    after = state.report()
    assert before["recomputed_blocks"] == 0
    assert before["recomputed_flops_share"] is None
    assert after["blocks"] == {"vision": {"keep": 3}, "text": {"recompute": 2}}
    assert after["recomputed_blocks"] == 2
    assert after["calls"] == {"recompute": 2}
    assert 0 < after["recomputed_flops_share"] < 1
    assert set(after["memory"]) <= {"peak_device_bytes", "peak_host_bytes"}


def test_the_first_line_counts_by_part_and_says_why_not(caplog):
    model = CASES["llava"].build()
    model.model.vision_tower.requires_grad_(False)
    with checkpointing(model, "full", modules={"text": "none"}):
        pass
    text = caplog.records[0].getMessage()
    assert "0/3 vision blocks recomputed (3 frozen, if a gradient passes)" in text
    assert "0/2 text blocks recomputed (2 kept)" in text


def test_nothing_is_counted_where_ops_are_compiled(monkeypatch):
    model = llama(2)
    monkeypatch.setattr(model.config, "_attn_implementation", "flex_attention")
    assert not engine.is_eager(model)
    monkeypatch.undo()
    assert engine.is_eager(model)
    assert not engine.is_eager(torch.compile(model))


def test_data_parallel_is_refused_with_advice():
    with pytest.raises(ValueError, match="torchrun"), checkpointing(nn.DataParallel(llama(2))):
        pass


def test_a_user_graph_through_frozen_blocks_is_kept():
    model = llama(2, use_cache=False).requires_grad_(False)
    embeds = torch.randn(1, 5, 32, requires_grad=True)

    def gradient():
        embeds.grad = None
        torch.manual_seed(2)
        model(inputs_embeds=embeds).logits.square().mean().backward()
        return embeds.grad

    kept = gradient()
    with checkpointing(model, "full"):
        assert torch.equal(kept, gradient())


@pytest.mark.parametrize("build", [lambda: Chain(Aside), lambda: CASES["vit"].build(), lambda: llama(3)])
@pytest.mark.parametrize(("input_grads", "calls"), [("always", {"recompute": 3}), ("auto", {"no graph": 3})])
def test_inputs_require_grad_where_asked_also_without_embeddings(build, input_grads, calls):
    model = build().requires_grad_(False)
    inputs = {Chain: {"x": torch.ones(2, 4)}}.get(type(model)) or (
        CASES["vit"].batch() if "ViT" in type(model).__name__ else batch()
    )
    with checkpointing(model, "full", input_grads=input_grads) as state:
        model(**inputs)
    assert state.tally.calls == calls


def test_reentrant_with_inputs_that_never_require_grad_is_refused():
    model = llama(2)
    model.get_input_embeddings().requires_grad_(False)
    with pytest.raises(ValueError, match="has trainable parameters, and nothing that it returns needs a gradient"):
        with checkpointing(model, use_reentrant=True, input_grads="never"):
            step(model)


def test_evaluation_in_the_middle_is_left_alone():
    model = llama(2)
    with checkpointing(model, "full") as state:
        step(model)
        model.eval()
        with torch.no_grad():
            cached = model(**batch(), use_cache=True)
    assert state.tally.calls == {"recompute": 2, "no grad": 2}
    assert isinstance(cached.past_key_values, transformers.Cache)


def test_a_cache_that_keeps_blocks_from_being_recomputed_is_said(caplog):
    model = llama(2)
    with checkpointing(model, "full") as state:
        model(**batch(), use_cache=True).loss.backward()
    assert state.tally.calls == {"got a key/value cache": 2}
    assert "2 calls of blocks got a key/value cache and were kept" in caplog.text


def test_a_plan_without_effect_is_said(caplog):
    model = llama(2).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    with checkpointing(model, "full"):
        step(model)
    assert "2 blocks were to be recomputed and none was. Their calls in the first step: 2 no graph." in caplog.text


@pytest.mark.parametrize(("dropout", "warned"), [(0.1, True), (0.0, False)])
def test_random_numbers_that_are_not_restored_are_a_warning(caplog, dropout, warned):
    model = llama(2, dropout=dropout)
    with checkpointing(model, "full", preserve_rng_state=False):
        step(model)
    assert ("2 blocks draw random numbers (model.layers.0, ...)" in caplog.text) == warned


def test_no_graph_break_and_equal_gradients_when_compiled():
    torch._dynamo.reset()
    grads = []
    for checkpointed in (False, True):
        model = llama(2, dropout=0.0, use_cache=False)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        if checkpointed:
            with checkpointing(compiled, "full"):
                compiled(**batch()).loss.backward()
        else:
            compiled(**batch()).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert_equal(*grads)


def test_reentrant_is_refused_for_what_a_call_asks_for():
    model = CASES["mixtral"].build()
    model.config.output_router_logits = False
    with pytest.raises(ValueError, match="called with output_router_logits=True"):
        with checkpointing(model, use_reentrant=True):
            model(**CASES["mixtral"].batch(), output_router_logits=True)
    assert not model._forward_pre_hooks


def test_hooks_of_others_that_are_off_are_said(caplog):
    model = llama(2)
    model.enable_input_require_grads()
    with checkpointing(model, "full"):
        pass
    assert "the one of others taken off in each step (checkpointing_skip_frozen)" in caplog.text


def test_a_loop_is_told_of_lost_gradients_after_its_first_backward():
    model = Chain(Aside)
    done = []
    with pytest.raises(RuntimeError, match="gave no gradient"), checkpointing(model, use_reentrant=True):
        for _ in range(3):
            model(torch.ones(2, 4)).backward()
            done.append(1)
    assert len(done) == 1


def test_share_of_flops_does_not_grow_with_the_length_of_a_loop():
    model = llama(2, use_cache=False)
    shares = []
    with checkpointing(model, "full") as state:
        for _ in range(3):
            step(model)
            shares.append(state.report()["recomputed_flops_share"])
    assert shares[1] == shares[2] == state.recomputable_share


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_within_a_step_is_not_under_the_plan(copied):
    model = llama(2, dropout=0.0, use_cache=False)
    with checkpointing(model, "full") as state:
        teacher = copied(model)
        step(model)
        assert state.tally.checkpointed == {"model.layers.0": 1, "model.layers.1": 1}
        assert_equal(step(model.zero_grad() or model), step(teacher))
        assert state.tally.checkpointed == {"model.layers.0": 2, "model.layers.1": 2}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())
    left = [vars(module)["forward"].__self__ for module in teacher.modules() if "forward" in vars(module)]
    assert len(left) == 2
    assert all(type(forward) is _Forward and forward._block is None for forward in left)


class TakesList(Aside):
    def forward(self, xs):
        return torch.tanh(self.main(sum(xs)))


class Dense(Chain):
    """Hands all earlier outputs to each block, in a list that it goes on filling."""

    def forward(self, x):
        xs = [x]
        for layer in self.layers:
            xs.append(layer(xs))
        return sum(xs).square().mean()


def test_a_list_that_is_appended_to_after_the_call():
    model = Dense(TakesList)
    kept = copy.deepcopy(model)
    kept(torch.ones(2, 4)).backward()
    with checkpointing(model, "full") as state:
        model(torch.ones(2, 4)).backward()
    assert sum(state.tally.replays.values()) == 3
    assert_equal([p.grad for p in kept.parameters()], [p.grad for p in model.parameters()])


def test_a_dropped_graph_of_blocks_that_share_values_is_freed():
    model, inputs = CASES["gemma3n"].build(), CASES["gemma3n"].batch()
    with checkpointing(model, "full"), SavedBytes(model) as saved:
        output = model(**inputs)
        assert saved.bytes > 0
        del output
        gc.collect()
        assert saved.bytes == 0


def test_evaluation_mode_between_forward_and_backward():
    def gradients(checkpointed):
        model = llama(2, use_cache=False)
        torch.manual_seed(1)
        with checkpointing(model, "full") if checkpointed else nullcontext():
            loss = model(**batch()).loss
            model.eval()
            loss.backward()
        assert not any(module.training for module in model.modules())
        return [parameter.grad for parameter in model.parameters()]

    assert_equal(gradients(False), gradients(True))
