"""Which repeated layers a model has: the blocks that a plan gives actions to.

Nothing is run and nothing is changed. Whether a block is worth recomputing is for policies, how it is done for install.

NOTE on blocks that are no HF layers. They are equal siblings in a list: same class, same names and shapes of parameters.
The outermost win, so experts or heads inside a layer are not taken for layers. The class is then a block class in every
list of the model: blocks are also the first of a stage (it has a downsample), the few dense layers before many sparse
ones, and the early blocks of a convolutional net, which have the fewest parameters and the largest activations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

MIN_GROUP_SHARE = 0.01  # of all parameters
MIN_SHARED_BLOCK_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Block:
    """One of the repeated layers of a model.

    Args:
        name: Dotted name as the user sees it, without the prefixes that wrappers (DDP, torch.compile, PEFT) add.
        module: The layer itself.
        stack: Name of the list or module that the block is one of, for counting within a stack.
        component: `text`, `vision` or `audio`.
        native: True for an HF layer made to be recomputed, False for one found by likeness to its siblings.
    """

    name: str
    module: nn.Module
    stack: str
    component: str
    native: bool

    @property
    def trainable(self) -> bool:
        """Whether any parameter requires grad now; users freeze and unfreeze between two calls of `train`."""
        return any(parameter.requires_grad for parameter in self._parameters)

    @cached_property
    def _parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.module.parameters())


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of `model`, disjoint, in the order of `model.named_modules()`; an empty list where it has none."""
    root = _tree(model)
    native = _native_layers(root)
    taken = {id(node) for node in native}
    found = _equal_siblings(root, taken)
    if not native and not found:
        found = _shared_blocks(root, root.num_parameters * MIN_SHARED_BLOCK_SHARE)
    chosen = taken | {id(node) for node in found}
    return [
        Block(node.name, node.module, node.name.rpartition(".")[0], node.component, id(node) in taken)
        for node in root.walk()
        if id(node) in chosen
    ]


def largest_groups(model: nn.Module, limit: int = 5) -> list[tuple[str, int]]:
    """(name, number of children) of the modules with the most children: what to name where there are no blocks."""
    groups = [(node.name, len(node.children)) for node in _tree(model).walk() if len(node.children) > 1]
    return sorted(groups, key=lambda group: -group[1])[:limit]


@dataclass(frozen=True, eq=False)
class _Node:
    """A module without what is wrapped around it. `core` is `module` without PEFT's additions."""

    name: str
    module: nn.Module
    core: nn.Module
    component: str
    children: tuple[_Node, ...]

    def walk(self) -> Iterator[_Node]:
        yield self
        for child in self.children:
            yield from child.walk()

    @cached_property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of the parameters, without those that PEFT added: it may adapt some siblings only."""
        own = [(name, _shape(p)) for name, p in self.core.named_parameters(recurse=False)]
        below = [(f"{c.name.rpartition('.')[2]}.{name}", shape) for c in self.children for name, shape in c.shapes]
        return tuple(own + below)

    @cached_property
    def num_parameters(self) -> int:
        return sum(prod(shape) for _, shape in self.shapes)

    @property
    def may_be_block(self) -> bool:
        """Holds parameters and is more than a single linear map, convolution or norm."""
        classes = (c for c in type(self.core).__mro__ if c is not nn.Module)
        is_leaf = not self.children and any(c.__module__.startswith("torch.nn.") for c in classes)
        return bool(self.shapes) and not is_leaf


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor and this attribute


def _tree(model: nn.Module) -> _Node:
    return _node("", _unwrap(model), "text", None, set())


def _node(name: str, module: nn.Module, component: str, owner: PreTrainedModel | None, seen: set[int]) -> _Node:
    """The node of an unwrapped module in the HF model `owner`. A module used twice counts where it is first."""
    core = _without_adapter(module)
    component = _component(name.rpartition(".")[2], core, component, owner)
    owner = core if isinstance(core, PreTrainedModel) else owner
    seen.update((id(module), id(core)))
    children = []
    for child_name, wrapped in core.named_children():
        child = _unwrap(wrapped)
        if id(child) not in seen:
            children.append(_node(f"{name}.{child_name}".lstrip("."), child, component, owner, seen))
    return _Node(name, module, core, component, tuple(children))


# Class -> attribute that holds the model. By name: three of these packages are optional, FSDP needs a build with it.
_WRAPPERS = {
    "torch.DataParallel": "module",
    "torch.DistributedDataParallel": "module",
    "torch.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.OptimizedModule": "_orig_mod",
    "torch.ActivationWrapper": "_checkpoint_wrapped_module",
    "deepspeed.DeepSpeedEngine": "module",
    "peft.PeftModel": "base_model",
    "peft.PeftMixedModel": "base_model",
    "peft.BaseTuner": "model",
}


def _unwrap(module: nn.Module) -> nn.Module:
    while inner := next((a for c in type(module).__mro__ if (a := _WRAPPERS.get(_class_name(c)))), None):
        module = getattr(module, inner)
    return module


def _class_name(cls: type) -> str:
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def _without_adapter(module: nn.Module) -> nn.Module:
    while hasattr(module, "get_base_layer") and isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _native_layers(node: _Node) -> list[_Node]:
    """The HF layers. Of nested ones (a stage of layers) the inner, where they hold most of the outer's parameters."""
    inner = [layer for child in node.children for layer in _native_layers(child)]
    if not isinstance(node.core, GradientCheckpointingLayer):
        return inner
    if inner and 2 * sum(layer.num_parameters for layer in inner) >= node.num_parameters:
        return inner
    return [node]


def _equal_siblings(root: _Node, taken: set[int]) -> list[_Node]:
    """The blocks outside HF layers: first the classes that have equal siblings, then all list entries of a class."""
    min_parameters = root.num_parameters * MIN_GROUP_SHARE
    seeds = _list_entries(root, taken, lambda entries: _equal(entries, min_parameters))
    classes = {type(node.core) for node in seeds} - {nn.Sequential, nn.ModuleList}
    ids = {id(node) for node in seeds}
    return _list_entries(root, taken, lambda entries: [e for e in entries if id(e) in ids or type(e.core) in classes])


def _list_entries(node: _Node, taken: set[int], choose: Callable[[list[_Node]], list[_Node]]) -> list[_Node]:
    """What `choose` takes of the entries of each list, outermost lists first; what it leaves is searched further."""
    if id(node) in taken:
        return []
    chosen: set[int] = set()
    if isinstance(node.core, (nn.ModuleList, nn.Sequential)):
        entries = [c for c in node.children if c.may_be_block and not any(id(n) in taken for n in c.walk())]
        chosen = {id(entry) for entry in choose(entries)}
    lists = [[c] if id(c) in chosen else _list_entries(c, taken, choose) for c in node.children]
    return [entry for entries in lists for entry in entries]


def _equal(entries: list[_Node], min_parameters: float) -> list[_Node]:
    """Those that have an equal among the others, in groups that are large enough."""
    groups: dict[Any, list[_Node]] = {}
    for entry in entries:
        groups.setdefault((type(entry.core), entry.shapes), []).append(entry)
    large = [g for g in groups.values() if len(g) > 1 and sum(e.num_parameters for e in g) >= min_parameters]
    return [entry for group in large for entry in group]


def _shared_blocks(node: _Node, min_parameters: float) -> list[_Node]:
    """The only entry of a list, for models (ALBERT) that apply one block again and again."""
    if isinstance(node.core, nn.ModuleList) and len(node.children) == 1:
        entry = node.children[0]
        if entry.may_be_block and entry.num_parameters >= min_parameters:
            return [entry]
    return [block for child in node.children for block in _shared_blocks(child, min_parameters)]


# In names of modules and of parts of a config, and in `main_input_name`.
_WORDS = re.compile(
    r"(?:^|_)(?:(?P<vision>vision|visual|images?|videos?|pixel|vit|vq|flattened)"
    r"|(?P<audio>audio|speech|acoustic|codec|whisper|spectrogram|input_features|input_values)"
    r"|(?P<text>text|language|llm|lm))(?=_|$)"
)


def _component(name: str, module: nn.Module, inherited: str, owner: PreTrainedModel | None) -> str:
    """What the module works on. Surest first: which part of the owner's config it has, its name, its main input."""
    config, owner_config = getattr(module, "config", None), getattr(owner, "config", None)
    keys = [key for key, value in vars(owner_config).items() if value is config] if config and owner_config else []
    names = keys if name == getattr(owner, "base_model_prefix", None) else [*keys, name]
    if said := _said_by(*names):
        return said
    if name == "decoder" and inherited == "audio" and hasattr(owner_config, "vocab_size"):
        return "text"
    return _component_of_model(module, inherited, owner) if isinstance(module, PreTrainedModel) else inherited


def _component_of_model(model: PreTrainedModel, inherited: str, owner: PreTrainedModel | None) -> str:
    """By its main input, or by its type where that is left at the default. A model of parts is text, whatever it sees."""
    config, main = model.config, model.main_input_name
    if owner is not None and config is owner.config:
        return inherited
    if any(hasattr(value, "model_type") and _said_by(key) == "text" for key, value in vars(config).items()):
        return "text"
    last_word = config.model_type.removesuffix("_model").removesuffix("_encoder").rpartition("_")[2]
    names = [main] if isinstance(main, str) else main
    return _said_by(*names, last_word if owner is None else config.model_type) or "text"


def _said_by(*names: str) -> str | None:
    found = (_WORDS.search(name) for name in names)
    return next((match.lastgroup for match in found if match), None)
