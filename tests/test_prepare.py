"""What is changed on a model for a step is put back, and is right while it lasts."""

import pytest
import torch
import transformers
from tiny_models import CASES, llama
from torch import nn

from ckpt_trainer.prepare import (
    UseCache,
    input_grads,
    input_modules,
    modules_switched_on,
    modules_with_input_grad_hook,
    refuse_reentrant,
    switched_off,
    without_input_grad_hooks,
)


def hooks_of(model):
    return {name: list(module._forward_hooks.items()) for name, module in model.named_modules()}


def test_use_cache_is_off_in_nested_configs_and_comes_back():
    model = CASES["llava"].build()
    text = model.config.text_config
    text.use_cache = True
    found = UseCache(model)
    with found.set_to(False):
        assert text.use_cache is False
        assert not getattr(model.config, "use_cache", False)
    assert text.use_cache is True


def test_use_cache_comes_back_after_an_exception():
    model = llama(use_cache=True)
    with pytest.raises(KeyboardInterrupt), UseCache(model).set_to(False):
        raise KeyboardInterrupt
    assert model.config.use_cache is True


def test_use_cache_on_is_only_set_on_the_models_own_config():
    model = CASES["llava"].build()
    model.config.use_cache = model.config.text_config.use_cache = False
    with UseCache(model).set_to(True):
        assert (model.config.use_cache, model.config.text_config.use_cache) == (True, False)
    assert model.config.use_cache is False


def test_restoring_takes_away_a_key_that_was_not_there():
    model = nn.Linear(1, 1)
    model.config = transformers.PretrainedConfig()
    vars(model.config).pop("use_cache", None)
    found = UseCache(model)
    model.config.use_cache = False
    found.restore()
    assert "use_cache" not in vars(model.config)


def test_switches_go_off_and_on():
    model = llama(2)
    model.gradient_checkpointing_enable()
    on = modules_switched_on(model)
    assert on
    with switched_off(on):
        assert modules_switched_on(model) == []
    assert modules_switched_on(model) == on


def make_inputs_require_grad(module, inputs, output):
    output.requires_grad_(True)


def test_hooks_of_others_go_and_come_back_in_their_order():
    model = llama(2)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda *args: None)
    model.enable_input_require_grads()
    embeddings.register_forward_hook(make_inputs_require_grad)
    embeddings.register_forward_hook(lambda *args: None)
    before = hooks_of(model)
    hooked = modules_with_input_grad_hook(model)
    assert hooked == [embeddings]
    with without_input_grad_hooks(hooked):
        assert len(embeddings._forward_hooks) == 2
        late = embeddings.register_forward_hook(lambda *args: None)
    assert list(embeddings._forward_hooks) == [key for key, _ in before["model.embed_tokens"]] + [late.id]
    late.remove()
    assert hooks_of(model) == before
    model.disable_input_require_grads()
    assert len(embeddings._forward_hooks) == 3


def test_the_models_own_method_names_the_modules_and_leaves_nothing():
    model = llama(2)
    before = hooks_of(model)
    attributes = {key for module in model.modules() for key in vars(module)}
    assert input_modules(model) == [model.get_input_embeddings()]
    assert hooks_of(model) == before
    assert {key for module in model.modules() for key in vars(module)} == attributes


def test_hooks_the_user_enabled_are_still_his_to_disable():
    model = llama(2)
    model.enable_input_require_grads()
    input_modules(model)
    model.disable_input_require_grads()
    assert not any(module._forward_hooks for module in model.modules())


class NamesItsEmbeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(4, 2)

    def get_input_embeddings(self):
        return self.tokens


def test_input_embeddings_where_a_model_has_no_method():
    model = NamesItsEmbeddings()
    assert input_modules(model) == [model.tokens]
    assert input_modules(nn.Linear(1, 1)) == []


def test_outputs_require_grad_and_may_be_changed_in_place():
    model = NamesItsEmbeddings().requires_grad_(False)
    ids = torch.tensor([1, 2])
    with input_grads([model.tokens]):
        output = model.tokens(ids)
        output += 1
        assert output.requires_grad
        assert torch.equal(output.detach(), model.tokens.weight[1:3] + 1)
    assert not model.tokens(ids).requires_grad
    assert not model.tokens._forward_hooks


@pytest.mark.parametrize(("name", "reason"), [("mixtral", "output_router_logits=True"), ("gemma3n", "num_kv_shared")])
def test_reentrant_is_refused_where_it_loses_gradients(name, reason):
    with pytest.raises(ValueError, match=f"checkpointing_use_reentrant=True gives wrong gradients.*{reason}"):
        refuse_reentrant(CASES[name].build())


def test_reentrant_is_not_refused_elsewhere():
    refuse_reentrant(llama(2))
