"""Keep the results of chosen ops of a block from its forward, and give them back while it is replayed.

`StoredResults` is what is known of one block, `StoredCall` one call of it. Both are dispatch modes at work: around the
forward and around each replay. Checkpoints, plans and tiers of another make are not their business.

NOTE on exactness. What is given back is what the op returned, or the op runs again, which is always right:
  1. A result is known by op, place in the block and turn there, never by a count over the whole block; the arguments
     must have the shapes and types they had. An op that asks for something unknown runs.
  2. A result that is about to be changed in place, in the forward or in a replay, is copied first. Storages tell, not
     versions: what `_unsafe_view` gives, as every linear layer without bias does, has a version of its own. One that
     is changed between forward and replay, when nobody looks on, raises as autograd would.
  3. A result that is or views an argument is never kept, nor that of an op that writes to one.
  4. An op that drew random numbers leaves the generator as it left it in the forward, for those that draw after it.
Left out are results that no replay asks for: torch ends a replay with the last saved tensor, and the block's last matmul
comes after that. The first replay shows which they are.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError

from ckpt_trainer.block_state import random_state, same_state, set_random_state
from ckpt_trainer.chosen_ops import ChosenOps, Key, Rule, between_devices, never
from ckpt_trainer.chunks import mark_of
from ckpt_trainer.handles import Pack, handles_in, mapped, returned
from ckpt_trainer.memory import storages_of
from ckpt_trainer.ops import (
    device_drawn_from,
    kind_of,
    name_of,
    place_of,
    returns_argument,
    tensors_in,
    writes,
    written_by,
)

if TYPE_CHECKING:
    from typing_extensions import Self

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


class StoredResults:
    """What is stored of one block; lives as long as the plan is in force.

    Args:
        module: The block.
        name: Its name, for messages.
        save: What to store: `attention`, `matmul`, `half_matmul`, names of ops, globs over names of ops.

    Attributes:
        seen: Names of the ops of the first forward, and how often each ran.
        fallback: Which result is computed again although it was chosen, and why; None if there is none.
    """

    def __init__(self, module: nn.Module, name: str, save: Sequence[str]) -> None:
        self.name = name
        self.seen: Counter[str] = Counter()
        self.fallback: str | None = None
        self.chosen = ChosenOps(save)
        # The code that runs the block, below decorators; where it is reached, places end.
        self.forward = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        self.watched = False
        self.not_kept: set[Key] = set()

    def learn_with(self, other: StoredResults) -> None:
        """Share with another block of the same modules what no replay asks for, and the names of places that takes."""
        self.chosen, self.not_kept = other.chosen, other.not_kept

    def call(self) -> StoredCall:
        """A new call of the block."""
        return StoredCall(self)

    @property
    def matched(self) -> set[str]:
        """The entries of `save` that meant an op that ran so far."""
        return self.chosen.matched


@dataclass(frozen=True)
class _Result:
    """What one op returned, in aliases without a graph, or in handles of what may be elsewhere."""

    value: Any
    versions: tuple[int, ...]
    shapes: Shapes
    random: tuple[torch.device, Tensor] | None
    unsafe_views: list[Tensor] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        # Of a view with a version of its own, the first is 0.
        written = _versions(self.value) != self.versions or any(view._version for view in self.unsafe_views)
        return written or any(handle.changed for handle in handles_in(self.value))


class StoredCall:
    """The stored results of one call of a block; to be owned by the call, that is by autograd's graph."""

    def __init__(self, block: StoredResults) -> None:
        self.block = block
        self._results: dict[Key, _Result] = {}
        self._asked: set[Key] = set()
        # Address of a storage -> what was stored in it. An address that is used again means one copy too many.
        self._owners: dict[int, set[Key]] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the distinct storages held now."""
        tensors = (tensor for result in self._results.values() for tensor in tensors_in(result.value))
        return sum({storage._cdata: storage.nbytes() for tensor in tensors for storage in storages_of(tensor)}.values())

    @property
    def devices_drawn_from(self) -> set[torch.device]:
        """Devices whose generator ops with a stored result drew from."""
        return {result.random[0] for result in self._results.values() if result.random is not None}

    def storing(self) -> AbstractContextManager[Any]:
        """Around the forward: the results of chosen ops are stored."""
        return _Storing(self)

    def reusing(self) -> AbstractContextManager[Any]:
        """Around a replay: results that are stored are given back, and their ops do not run.

        Raises:
            RuntimeError: Within, where a stored result was changed in place since the forward.
            CheckpointError: Within, where an op is asked for with other arguments than in the forward.
        """
        return _Reusing(self)

    def store(self, rule: Rule, op: Any, key: Key, args: Any, kwargs: Any) -> Any:
        """Run an op of the forward and store its result if its rule wants it."""
        self._asked.add(key)
        device = device_drawn_from(op, args, kwargs)
        before = None if device is None else random_state(device)
        out = op(*args, **kwargs)
        if not rule(self.block.chosen, key, args, out) or key in self.block.not_kept:
            return out
        if returns_argument(op, args, kwargs, out) or kwargs.get("generator") is not None:
            return out
        if any(tensor.is_inference() for tensor in tensors_in(out)):
            return out  # it counts no versions, and nothing of it is saved for backward
        random = None
        if device is not None:
            after = random_state(device)
            random = None if same_state(before, after) else (device, after)
        value = _alias(out)
        self._keep(key, _Result(value, _versions(value), _shapes(args), random))
        return out

    def _keep(self, key: Key, result: _Result) -> None:
        self._results[key] = result
        self._own(key, result.value)

    def _own(self, key: Key, value: Any) -> None:
        for storage in (storage for tensor in tensors_in(value) for storage in storages_of(tensor)):
            self._owners.setdefault(storage._cdata, set()).add(key)

    def _owned(self, value: Any) -> list[tuple[Key, _Result]]:
        """What is stored in the memory of these tensors."""
        addresses = [storage._cdata for tensor in tensors_in(value) for storage in storages_of(tensor)]
        keys = {key for address in addresses for key in self._owners.get(address, ())}
        return [(key, self._results[key]) for key in keys if key in self._results]

    def before_write(self, written: Any) -> None:
        """Copy what is stored in the memory of tensors that an op is about to write to."""
        for key, result in self._owned(written):
            if not result.changed:
                value = _copied(returned(result.value))
                # What is written there from now on, be it another tensor at this address, is none of its business.
                for keys in self._owners.values():
                    keys.discard(key)
                self._keep(key, replace(result, value=value, versions=_versions(value), unsafe_views=[]))

    def watch(self, viewed: Tensor, view: Tensor) -> None:
        """Remember a view that autograd does not know for one."""
        for _, result in self._owned(viewed):
            result.unsafe_views.extend(tensors_in(_alias(view)))

    def drop_changed(self) -> None:
        """At the end of the forward, let go of results that a kernel behind autograd's back changed in place."""
        for key in [key for key, result in self._results.items() if result.changed]:
            self.block.not_kept.add(key)
            self.block.fallback = (
                f"block {self.block.name!r} changes the result of {self.block.chosen.describe(key)} in place in a way "
                "that no op shows; it is computed again"
            )
            del self._results[key]

    def move(self, pack: Pack) -> None:
        """After the forward: what is stored is what `pack` made of it."""
        for key, result in self._results.items():
            views = [mark_of(view) for view in result.unsafe_views]
            value = mapped(pack, result.value)
            self._results[key] = replace(result, value=value, versions=(), unsafe_views=views)
        self._owners.clear()

    def give_back(self, op: Any, key: Key, args: Any, kwargs: Any, replay: _Reusing) -> Any:
        """What an op returned in the forward; else what it returns now."""
        result = self._results.get(key)
        if result is None:
            replay.strayed |= key not in self._asked
            return op(*args, **kwargs)
        replay.reached.add(key)
        shapes = _shapes(args)
        if shapes != result.shapes:
            raise CheckpointError(
                f"replay of block {self.block.name!r}: {self.block.chosen.describe(key)} got arguments "
                f"{_written(shapes)}, in the forward {_written(result.shapes)}. The block does not compute the same "
                "again: it reads something that changed in between. Recompute or keep all of it: "
                'checkpointing_modules={"<its name>": "full"} or "none".'
            )
        if result.changed:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                f"result of {self.block.chosen.describe(key)} in block {self.block.name!r}, "
                f"{[list(tensor.shape) for tensor in tensors_in(result.value)]}, stored for its replay, is at version "
                f"{list(_versions(result.value))}; expected {list(result.versions)}. Change a "
                'copy, or do not store it: checkpointing_modules={"<its name>": "full"}.'
            )
        if result.random is not None:
            set_random_state(*result.random)
        if not replay.keeps:
            del self._results[key]
            return returned(result.value)
        value = _alias(returned(result.value))
        if handles_in(result.value):
            self._own(key, value)  # what is lent may be written to
        return value

    def learn(self, reached: set[Key]) -> None:
        """At the end of a replay, let go of what it did not ask for, in later calls of the block too."""
        needless = self._results.keys() - reached
        self.block.not_kept |= needless
        for key in needless:
            del self._results[key]


class _Around(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What the two modes have in common."""

    # flex attention is one; those that are not chosen just run.
    supports_higher_order_operators = True

    def __init__(self, call: StoredCall) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._call = call
        self._block = call.block
        self._plain = call.block.chosen.plain
        self._seen: Counter[Any] | None = None  # counted in the first forward only

    def __enter__(self) -> Self:
        self._turns: Counter[int] = Counter()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # What is compiled within a block (flex attention) stays compiled.
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._seen is not None:
            self._seen[func] += 1
        if func in self._plain:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        rule = self._block.chosen.rule(func)
        if not self._is_chosen(rule, func, args, kwargs):
            return self._run(func, args, kwargs)
        return self._result(rule, func, args, kwargs)

    def _result(self, rule: Rule, op: Any, args: Any, kwargs: Any) -> Any:
        """What a chosen op gives: computed and maybe stored, or given back."""
        raise NotImplementedError

    def _is_chosen(self, rule: Rule | None, op: Any, args: Any, kwargs: Any) -> TypeGuard[Rule]:
        if writes(op):
            self._call.before_write(written_by(op, args, kwargs))
        return rule not in (None, never) and (rule is not between_devices or kwargs.get("device") is not None)

    def _run(self, op: Any, args: Any, kwargs: Any) -> Any:
        out = op(*args, **kwargs)
        if kind_of(op) == "unsafe view":
            self._call.watch(args[0], out)
        return out

    def _key(self, op: Any) -> Key:
        number = self._block.chosen.number(op, place_of(self._block.forward))
        turn = self._turns[number]
        self._turns[number] = turn + 1
        return number, turn


class _Storing(_Around):  # type: ignore[no-untyped-call]
    """The mode around a forward."""

    def __enter__(self) -> Self:
        self._seen = None if self._block.watched else Counter()
        return super().__enter__()

    def _result(self, rule: Rule, op: Any, args: Any, kwargs: Any) -> Any:
        return self._call.store(rule, op, self._key(op), args, kwargs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._call.drop_changed()
        if self._seen is not None and kind is None:
            self._block.watched = True
            for op, times in self._seen.items():
                self._block.seen[name_of(op)] += times


class _Reusing(_Around):  # type: ignore[no-untyped-call]
    """The mode around a replay.

    Attributes:
        reached: What was given back.
        strayed: It asked for a chosen op that the forward did not run.
        keeps: Another replay may follow, so that what is given back stays stored.
    """

    def __enter__(self) -> Self:
        self.reached: set[Key] = set()
        self.strayed = False
        self.keeps = _graph_is_kept()
        self._states = [(device, random_state(device)) for device in self._call.devices_drawn_from]
        return super().__enter__()

    def _result(self, rule: Rule, op: Any, args: Any, kwargs: Any) -> Any:
        return self._call.give_back(op, self._key(op), args, kwargs, self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        # Where nobody else puts the generators back, numbers would be drawn twice.
        for device, state in self._states:
            set_random_state(device, state)
        ended = kind is None or kind.__name__ == "_StopRecomputationError"
        if ended and not self.strayed:
            self._call.learn(self.reached)


def _graph_is_kept() -> bool:
    """Whether another backward may follow: always, but in a backward that frees the graph as it goes."""
    asks: Callable[[], bool] | None = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asks is None or torch._C._current_graph_task_id() == -1 or asks()


def _alias(value: Any) -> Any:
    """A result in tensors that share its memory and version and have no graph."""
    # Below autograd detach would start a version of its own.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return _detached(value)


def _copied(value: Any) -> Any:
    return mapped(Tensor.clone, value)


def _detached(value: Any) -> Any:
    return mapped(Tensor.detach, value)


def _versions(value: Any) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors_in(value))


def _shapes(args: Any) -> Shapes:
    return tuple((tensor.shape, tensor.dtype) for tensor in args if isinstance(tensor, Tensor))


def _written(shapes: Shapes) -> str:
    return ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in shapes)
