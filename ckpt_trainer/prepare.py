"""Make a model ready for a checkpointed step, and as it was after it.

Input gradients, the key/value cache and the checkpointing switches of transformers. Each is a context manager: what it
changes, it puts back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

# The hook that LLaVA, PEFT, TRL and transformers put on embeddings for the reentrant variant, by the name it has in all.
_INPUT_GRAD_HOOKS = ("make_inputs_require_grad", "make_inputs_require_grads")


class UseCache:
    """The `use_cache` of every config of a model, as its user left it.

    Args:
        model: Any module; its own config, those of its submodules, those nested in them, and generation configs.
    """

    def __init__(self, model: nn.Module) -> None:
        own = (vars(module).get("config") for module in model.modules())
        # Under DeepSpeed the first is that of its engine, a dict.
        self._own = next((config for config in own if hasattr(config, "to_dict")), None)
        self._values = [
            (config, vars(config)["use_cache"]) for config in _configs(model) if "use_cache" in vars(config)
        ]
        self._absent = [config for config in _configs(model) if "use_cache" not in vars(config)]

    def restore(self) -> None:
        """Write the user's values back, and take the key away where there was none."""
        for config, value in self._values:
            config.use_cache = value
        for config in self._absent:
            vars(config).pop("use_cache", None)

    @contextmanager
    def set_to(self, wanted: bool) -> Iterator[None]:
        """While entered: False turns the cache off everywhere, True on in the model's own config.

        A forward in training has no use for a cache, and blocks that get one are not replayed.
        """
        changed = [
            (config, value) for config, value in self._values if value != wanted and (not wanted or config is self._own)
        ]
        for config, _ in changed:
            config.use_cache = wanted
        try:
            yield
        finally:
            for config, value in changed:
                config.use_cache = value


def _configs(model: nn.Module) -> list[Any]:
    """Every config of a model once: of modules, and nested in them. Generation configs only steer `generate`."""
    found: dict[int, Any] = {}
    waiting = [config for module in model.modules() if (config := vars(module).get("config")) is not None]
    while waiting:
        config = waiting.pop()
        if id(config) in found or not hasattr(config, "to_dict") or not hasattr(config, "__dict__"):
            continue
        found[id(config)] = config
        waiting.extend(vars(config).values())
    return list(found.values())


def modules_switched_on(model: nn.Module) -> list[nn.Module]:
    """Modules on which a user or a library turned the checkpointing of transformers on."""
    return [module for module in model.modules() if vars(module).get("gradient_checkpointing")]


@contextmanager
def switched_off(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The checkpointing switch of transformers off on these modules, which have it on."""
    for module in modules:
        vars(module)["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for module in modules:
            vars(module)["gradient_checkpointing"] = True


def modules_with_input_grad_hook(model: nn.Module) -> list[nn.Module]:
    """Modules whose output others made to require grad, by a hook that only the reentrant variant needs."""
    return [module for module in model.modules() if _input_grad_hooks(module)]


@contextmanager
def without_input_grad_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Those hooks taken off these modules, and put back in their place among the other hooks.

    With them, frozen blocks get graph, recompute and backward for nothing. Taking them off changes no gradient of a
    parameter.
    """
    hooked = [(module, dict(module._forward_hooks)) for module in modules]
    for module, _ in hooked:
        for key in _input_grad_hooks(module):
            del module._forward_hooks[key]
    try:
        yield
    finally:
        for module, hooks in hooked:
            added = {key: hook for key, hook in module._forward_hooks.items() if key not in hooks}
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks | added)


def _input_grad_hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_hooks.items() if getattr(hook, "__name__", "") in _INPUT_GRAD_HOOKS]


@contextmanager
def input_grads(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The outputs of these modules require grad.

    The usual hook makes a leaf, which a model may not change in place (blt, git and udop do); this one gives a copy
    that it may.
    """
    handles = [module.register_forward_hook(_copy_that_requires_grad) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copy_that_requires_grad(module: nn.Module, args: Any, output: Any) -> Any:
    if not isinstance(output, Tensor) or output.requires_grad or not output.is_floating_point():
        return None
    return output.detach().requires_grad_().clone()


def input_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose output is the input of the blocks.

    The model's own `enable_input_require_grads` says which; where it has none, its input embeddings; none if it names
    none either.
    """
    enable = getattr(model, "enable_input_require_grads", None)
    if enable is not None:
        return _hooked_by(model, enable)
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return [embeddings] if isinstance(embeddings, nn.Module) else []


def _hooked_by(model: nn.Module, enable: Any) -> list[nn.Module]:
    """The modules on which a model's own method puts hooks; the hooks and the handles it stored are taken away again."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    owners = [module for module in model.modules() if hasattr(module, "enable_input_require_grads")]
    stored = {"_require_grads_hook", "_require_grads_hooks"}
    kept = [(owner, {key: vars(owner)[key] for key in stored & set(vars(owner))}) for owner in owners]
    # Models without token embeddings raise, or warn and hook nothing.
    with suppress(NotImplementedError):
        enable()
    hooked = [module for module, keys in before.items() if set(module._forward_hooks) - keys]
    for module in hooked:
        for key in set(module._forward_hooks) - before[module]:
            del module._forward_hooks[key]
    for owner, values in kept:
        for attribute in stored:
            vars(owner).pop(attribute, None)
        vars(owner).update(values)
    return hooked


def refuse_reentrant(model: nn.Module) -> None:
    """Refuse the reentrant variant where it is known to lose gradients without a word.

    It runs each block without a graph and connects only what the block returns. What leaves a block another way, such as
    router logits captured for an auxiliary loss, gets no gradient.

    Raises:
        ValueError: A config of the model says that it captures or shares tensors so; the message says which.
    """
    for config in _configs(model):
        # Not vars(config): transformers 5 keeps some of them under another name, behind a property.
        _refuse_escapes(
            {key: getattr(config, key, None) for key in _ESCAPES}, f"this model: {type(config).__name__} has"
        )


@contextmanager
def reentrant_calls_checked(model: nn.Module) -> Iterator[None]:
    """The same for what is asked for in a call of the model: `model(..., output_router_logits=True)`."""

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        _refuse_escapes(kwargs, "a forward that is called with")

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _refuse_escapes(values: Mapping[str, Any], where: str) -> None:
    for key, what in _ESCAPES.items():
        if values.get(key):
            raise ValueError(
                f"checkpointing_use_reentrant=True gives wrong gradients for {where} {key}={values[key]!r}, so {what}. "
                "Set checkpointing_use_reentrant=False."
            )


_ESCAPES = {
    "output_router_logits": "the router's auxiliary loss would be cut from its gradients",
    "num_kv_shared_layers": "layers that share keys and values would lose part of their gradients",
    "output_attentions": "attention weights that are captured would be cut from the graph",
}
