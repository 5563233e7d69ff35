"""The callables within a block whose results can be stored, and taking the calls of them for a while.

A `Site` is a submodule, or a scan kernel of linear attention, by the place where it is looked up when it is called: an
attribute of a module, or a name in a file of modeling code. What is done with a call is the caller's business.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from inspect import unwrap
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

# Words that choose kernels and name no module. A scan is the attention of its layer, so what stores attention stores it.
_WORDS = ("attention", "matmul", "half_matmul")
# What transformers, fla and remote code call the kernels.
_SCANS = (
    *("*delta_rule", "*_kda", "*selective_scan", "selective_scan_fn", "mamba_inner_fn", "*chunk_scan*"),
    *("mamba_split_conv1d_scan_combined", "chunk_*gla", "fused_*gla", "*lightning_attn*", "rwkv_linear_attention*"),
)

# handler(site, original, args, kwargs) -> what the call returns
Handler = Callable[["Site", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(eq=False)
class Site:
    """A callable to be stored.

    Args:
        name: Its name within the block.
        namespace: Attributes of the instance, or names of the file, where it is looked up.
        key: The name it is looked up by.
        modules: The module that holds it and those below; none for a name of a file.
        is_kernel: Chosen for what it is and not by its name.
        watched: Whether a run of it has been looked at.
        uses_python_random: Whether a run of it drew from Python's `random`.
    """

    name: str
    namespace: dict[str, Any]
    key: str
    modules: Sequence[nn.Module]
    is_kernel: bool = False
    watched: bool = field(default=False, init=False)
    uses_python_random: bool = field(default=False, init=False)

    def attributes(self) -> list[Tensor]:
        """Tensors that its modules hold as plain attributes."""
        return [value for module in self.modules for value in vars(module).values() if isinstance(value, Tensor)]

    @contextmanager
    def intercepted(self, handler: Handler) -> Iterator[None]:
        """Let the calls that this thread makes go to `handler`, the innermost if there are more."""
        with _LOCK:
            switch = self.namespace.get(self.key)
            if not isinstance(switch, _Switch):
                # Asked for now and not kept: accelerate and others may have put a forward of their own on the instance.
                original: Any = getattr(self.modules[0], self.key) if self.modules else switch
                switch = self.namespace[self.key] = _Switch(original, switch, self.modules[:1])
            switch.users += 1
        handlers = switch.handlers()
        handlers.append(partial(handler, self))
        try:
            yield
        finally:
            handlers.pop()
            with _LOCK:
                switch.users -= 1
                if not switch.users:
                    switch.leave(self.namespace, self.key)


# A kernel's name in a file is one for all blocks, and devices run their backward in threads of their own.
_LOCK = threading.Lock()


class _Switch:
    """Stands where a callable is looked up while some thread takes its calls; other threads get the callable."""

    def __init__(self, original: Callable[..., Any], theirs: Any, modules: Sequence[nn.Module]) -> None:
        self.users = 0
        self._original = original
        self._theirs = theirs
        self._modules = modules
        self._here = threading.local()

    def handlers(self) -> list[Callable[..., Any]]:
        handlers: list[Callable[..., Any]] = self._here.__dict__.setdefault("handlers", [])
        return handlers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handlers = self.handlers()
        return handlers[-1](self._original, args, kwargs) if handlers else self._original(*args, **kwargs)

    def leave(self, namespace: dict[str, Any], key: str) -> None:
        if self._theirs is None:
            namespace.pop(key, None)
        else:
            namespace[key] = self._theirs

    def __reduce__(self) -> Any:
        # A copy of the model that is made within a step is not under the plan.
        return _callable_of, (self._theirs, *self._modules)


def _callable_of(theirs: Callable[..., Any] | None, *modules: nn.Module) -> Callable[..., Any]:
    return theirs if theirs is not None else MethodType(type(modules[0]).forward, modules[0])


def find_sites(block: nn.Module, name: str, save: Sequence[str]) -> tuple[list[Site], set[str]]:
    """What `save` chooses within a block, and which of its entries chose something.

    Args:
        block: The block.
        name: Its full name.
        save: Globs for names of submodules, within the block or full; of matches within one another the outermost
            counts, and a list of modules stands for what is in it. The words `attention`, `matmul` and `half_matmul`
            choose scan kernels, and no module of that name.
    """
    sites: list[Site] = []
    matched: set[str] = set()
    opened: set[str] = set()
    for sub, module in block.named_modules():
        hits = {g for g in save if g not in _WORDS and (fnmatchcase(sub, g) or fnmatchcase(f"{name}.{sub}", g))}
        if not sub or not (hits or sub.rpartition(".")[0] in opened):
            continue
        matched |= hits
        if type(module).forward is nn.Module.forward:
            opened.add(sub)  # It is not called itself.
        elif not _is_within(sub, sites):
            sites.append(_site_of(sub, module))
    if words := set(_WORDS).intersection(save):
        kernels = [site for site in _kernels(block) if not _is_within(site.name, sites)]
        matched |= words if kernels else set()
        sites += kernels
    return sites, matched


def _site_of(name: str, module: nn.Module, is_kernel: bool = False) -> Site:
    return Site(name, vars(module), "forward", list(module.modules()), is_kernel)


def _is_within(name: str, sites: Sequence[Site]) -> bool:
    return any(name == site.name or name.startswith(f"{site.name}.") for site in sites)


def _kernels(block: nn.Module) -> Iterator[Site]:
    found = set()
    for sub, module in block.named_modules():
        prefix = f"{sub}." if sub else ""
        if _is_scan(sub.rpartition(".")[2]):
            yield _site_of(sub, module, is_kernel=True)
        for key, value in list(vars(module).items()):
            if _is_scan(key) and callable(value):
                yield Site(prefix + key, vars(module), key, [module], is_kernel=True)
        for path, key in _names_in_files(type(module)):
            if (path, key) not in found:
                found.add((path, key))
                yield Site(prefix + key, vars(sys.modules[path]), key, [], is_kernel=True)


def _names_in_files(cls: type) -> Iterator[tuple[str, str]]:
    """Kernels that methods of a class call by a name of their file: file and name."""
    for base in cls.__mro__:
        names = vars(sys.modules.get(base.__module__, object))
        kernels = [key for key in names if _is_scan(key) and callable(names[key])]
        methods = [unwrap(method) for key, method in vars(base).items() if kernels and key != "__init__"]
        used = {name for method in methods if isinstance(method, FunctionType) for name in method.__code__.co_names}
        yield from ((base.__module__, key) for key in kernels if key in used)


def _is_scan(name: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in _SCANS)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in the arguments of a call, in order: plain, and in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
