"""One run of a callable in the forward: what its graph saves, and its results, so that no replay has to run it.

A `Run` keeps what autograd saves meanwhile, but for its inputs: those are saved for the checkpoint around, which has
them rebuilt. `Outputs` are its results, as a replay gets them. Which callables are run like this is not decided here.
"""

from __future__ import annotations

import dataclasses
import enum
import random
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_unflatten

from ckpt_trainer.block_state import devices_of, random_state, same_state, set_random_state
from ckpt_trainer.handles import Handle, Pack
from ckpt_trainer.sites import Site

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)
LEFT_ON_ITSELF = "it leaves a tensor on itself"

States = list[tuple[torch.device | None, Any]]  # of generators; None stands for Python's `random`
View = tuple[torch.Size, tuple[int, ...], int]  # size, stride, offset


class Run:
    """One run of a chosen callable in the forward, and what its graph saves.

    Args:
        site: What runs.
        block: Name of the block.
        inputs: The tensors among its arguments.
    """

    def __init__(self, site: Site, block: str, inputs: list[Tensor]) -> None:
        self.site = site
        self.inputs = inputs
        self.packed: list[weakref.ref[RunSaved]] = []
        devices: list[torch.device | None] = [*devices_of(inputs)]
        devices += [None] if site.uses_python_random or not site.watched else []  # slow to read
        self.states: States = [(device, state_of(device)) for device in devices]
        self._where = f"{site.name!r} of block {block!r}"
        self._versions = [tensor._version for tensor in inputs]
        self._storages = [storage_of(tensor) for tensor in inputs]
        self._references: list[tuple[RunSaved, int]] = []
        self._attributes = site.attributes()
        # A kernel holds its inputs, its results and a few statistics; a composition of ops holds every step.
        self._room = 2 * sum(tensor.nbytes for tensor in inputs)
        self._held: set[int] = set()

    def pack(self, tensor: Tensor) -> RunSaved:
        packed = RunSaved(self._where)
        self.packed.append(weakref.ref(packed))
        if _is_parameter(tensor) or not (self._refer_to_input(packed, tensor) or _refer_to_parameter(packed, tensor)):
            # Detached, because a result that an op saves would hold the op that holds it.
            packed.hold(tensor if _is_parameter(tensor) else tensor.detach())
            self._take_room(tensor)
        return packed

    def _refer_to_input(self, packed: RunSaved, tensor: Tensor) -> bool:
        index = self.index_of(tensor)
        if index is not None:
            packed.view = _view(self.inputs[index], tensor)
        else:
            whole, edge = _cast_of(tensor)
            edges = (tuple(get_gradient_edge(t)[:2]) if edge and t.requires_grad else None for t in self.inputs)
            index = next((place for place, own in enumerate(edges) if own is not None and own == edge), None)
            if index is None or not (self._is_as_found(index) and _is_plain_cast(self.inputs[index], whole)):
                return False
            packed.dtype, packed.view = whole.dtype, _view(whole, tensor)
        self._references.append((packed, index))
        return True

    def index_of(self, tensor: Tensor) -> int | None:
        """Which input the tensor is, or is a view of, if that is as the run found it."""
        storage = storage_of(tensor)
        places = [place for place, own in enumerate(self._storages) if own == storage and self._is_as_found(place)]
        views = [place for place in places if _is_view_within(self.inputs[place], tensor)]
        return next(
            (place for place in views if _view(self.inputs[place], tensor) is None), views[0] if views else None
        )

    def _is_as_found(self, index: int) -> bool:
        return self.inputs[index]._version == self._versions[index]

    def _take_room(self, tensor: Tensor) -> None:
        if self.site.is_kernel and storage_of(tensor) not in self._held:
            self._held.add(storage_of(tensor))
            self._room -= bytes_of(tensor)
            if self._room < 0:
                raise HoldsTooMuchError

    def save_inputs(self, anchor: Tensor) -> list[int]:
        """Make the checkpoint responsible for the inputs that the graph needs; returns which, for the replays."""
        for packed, index in self._references:
            if self._is_as_found(index):
                packed.node = save_for_checkpoint(anchor, [self.inputs[index]])
            else:  # Changed in place after it was saved: an error, if backward asks for it.
                packed.hold(self.inputs[index].detach(), self._versions[index])
        return [index for packed, index in self._references if packed.tensor is None]

    def drawn(self) -> States:
        """The generators that the run drew from, as it left them."""
        now = [(device, state_of(device)) for device, _ in self.states]
        drawn = [new for new, old in zip(now, self.states, strict=True) if not same_state(old[1], new[1])]
        self.site.uses_python_random |= any(device is None for device, _ in drawn)
        return drawn

    def why_again(self, inputs: list[Tensor]) -> str | None:
        """Why a replay cannot do without this run; None if it can."""
        if not all(self._is_as_found(index) for index in range(len(self.inputs))):
            return "it changes an argument in place"
        if not _are_same(inputs, self.inputs):
            return "it puts a tensor into an argument"
        return None if _are_same(self.site.attributes(), self._attributes) else LEFT_ON_ITSELF


class RunSaved:
    """What autograd holds for a tensor that a run saved.

    Args:
        where: What saved it.

    Attributes:
        tensor: The tensor, or the parameter that it is made of.
        away: Else, what stands for a tensor that may be elsewhere.
        node: Else, the node that saves the input that it is made of.
        dtype: What to cast that to.
        view: How to see it then.
    """

    __slots__ = ("__weakref__", "away", "dtype", "node", "tensor", "version", "view", "where")

    def __init__(self, where: str) -> None:
        self.where = where
        self.tensor: Tensor | None = None
        self.version = 0
        self.away: Handle | None = None
        self.node: Any = None
        self.dtype: torch.dtype | None = None
        self.view: View | None = None

    def hold(self, tensor: Tensor, version: int | None = None) -> None:
        self.tensor = tensor
        self.version = tensor._version if version is None else version

    def move(self, pack: Pack) -> None:
        """Let what `pack` makes of the tensor stand for it."""
        if self.tensor is not None and not _is_parameter(self.tensor) and self.tensor._version == self.version:
            self.away, self.tensor = pack(self.tensor), None

    def unpack(self) -> Tensor:
        if self.away is not None:
            return _seen(self.away.get(), self.view)
        tensor: Tensor = self.node.saved_tensors[0] if self.tensor is None else self.tensor
        if self.tensor is not None and tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.type()} {list(tensor.shape)}], which {self.where} saved, is at version {tensor._version}; "
                f"expected version {self.version} instead. Do not write to it between forward and backward."
            )
        return _seen(tensor if self.dtype is None else tensor.detach().to(self.dtype), self.view)


class _Alias(NamedTuple):
    """A result that is an input, or a view of one."""

    place: int
    view: View | None
    requires_grad: bool


class _Kept(NamedTuple):
    """A result that is held."""

    tensor: Tensor | Handle
    version: int
    requires_grad: bool


class Outputs:
    """The results of a run, for replays.

    Raises:
        StrangeOutputError: One is an object that may hold tensors.
    """

    def __init__(self, output: Any, run: Run) -> None:
        leaves, self._build = _flatten(output)
        self._parts = [_part(leaf, run) for leaf in leaves]

    def tensors(self) -> list[Tensor]:
        return [part.tensor for part in self._parts if type(part) is _Kept and isinstance(part.tensor, Tensor)]

    def move(self, pack: Pack) -> None:
        """Let what `pack` makes of them stand for the results that are held."""
        for place, part in enumerate(self._parts):
            tensor = part.tensor if type(part) is _Kept else None
            if isinstance(tensor, Tensor) and not (_is_changed(part) or _is_parameter(tensor)):
                self._parts[place] = part._replace(tensor=pack(tensor))

    def are_changed(self) -> bool:
        return any(type(part) is _Kept and _is_changed(part) for part in self._parts)

    def give(self, inputs: Sequence[Tensor], anchor: Tensor) -> Any:
        leaves = [_given(part, inputs) for part in self._parts]
        bare = [i for i, part in enumerate(self._parts) if _lacks_graph(part, leaves[i])]
        with torch.enable_grad():
            given = _Give.apply(anchor, [leaves[i].detach() for i in bare]) if bare else ()  # type: ignore[no-untyped-call]
        for i, tensor in zip(bare, given, strict=True):
            leaves[i] = tensor
        return self._build(leaves)


def _part(leaf: Any, run: Run) -> Any:
    if isinstance(leaf, Tensor):
        index = run.index_of(leaf)
        if index is not None:
            return _Alias(index, _view(run.inputs[index], leaf), leaf.requires_grad)
        return _Kept(leaf if _is_parameter(leaf) else leaf.detach(), leaf._version, leaf.requires_grad)
    if not isinstance(leaf, _PLAIN):
        raise StrangeOutputError(f"it returns a {type(leaf).__name__}, which may hold tensors")
    return leaf


def _is_changed(part: _Kept) -> bool:
    tensor = part.tensor
    return tensor._version != part.version if isinstance(tensor, Tensor) else tensor.changed


def _given(part: Any, inputs: Sequence[Tensor]) -> Any:
    if type(part) is _Kept:
        if not isinstance(part.tensor, Tensor):
            return part.tensor.get()
        return part.tensor if _is_parameter(part.tensor) else part.tensor.detach()
    if type(part) is not _Alias:
        return part
    tensor = _seen(inputs[part.place], part.view)
    return tensor.detach() if tensor.requires_grad > part.requires_grad else tensor


def _lacks_graph(part: Any, leaf: Any) -> bool:
    return isinstance(part, (_Kept, _Alias)) and part.requires_grad and not leaf.requires_grad


class HoldsTooMuchError(Exception):
    pass


class StrangeOutputError(Exception):
    pass


class _Save(torch.autograd.Function):
    """Saves tensors, in a graph that is connected to nothing."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, tensors: list[Tensor]
    ) -> Tensor:  # in a list, so that their graph is not tied on
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)


class _Give(torch.autograd.Function):
    """Gives tensors a graph, for what uses them to save what it would save of real results."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensors)


# Functions and not methods: autograd holds them as long as the graph, so they must not hold what runs.
def pack(run: weakref.ref[Run], tensor: Tensor) -> RunSaved | None:
    running = run()
    return running.pack(tensor) if running is not None else None


def unpack(packed: RunSaved) -> Tensor:
    return packed.unpack()


def save_nothing(tensor: Tensor) -> None:
    return None


def save_for_checkpoint(anchor: Tensor, tensors: list[Tensor]) -> Any:
    """Save tensors with the hooks that are in force; returns the node that has them. `anchor` requires grad."""
    with torch.enable_grad():
        return _Save.apply(anchor, tensors).grad_fn  # type: ignore[no-untyped-call]


def set_states(states: States) -> None:
    for device, state in states:
        set_random_state(device, state)


def state_of(device: torch.device | None) -> Any:
    return random.getstate() if device is None else random_state(device)


def storage_of(tensor: Tensor) -> int:
    """Equal for tensors that share memory."""
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return -id(tensor)
    return int(tensor.untyped_storage()._cdata)


def bytes_of(tensor: Tensor) -> int:
    """Bytes of the whole storage."""
    return tensor.nbytes if storage_of(tensor) < 0 else tensor.untyped_storage().nbytes()


def _is_parameter(tensor: Tensor) -> bool:
    # ZeRO and FSDP change what is in a parameter, so it has to be held itself.
    return tensor.is_leaf and (tensor.requires_grad or isinstance(tensor, nn.Parameter))


def _are_same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def _is_view_within(whole: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor of the same storage can be cut out of `whole`."""
    if tensor is whole:
        return True
    if storage_of(tensor) < 0 or (tensor.dtype, tensor.is_conj(), tensor.is_neg()) != (
        whole.dtype,
        whole.is_conj(),
        whole.is_neg(),
    ):
        return False
    offset = int(tensor.storage_offset() - whole.storage_offset())
    return offset >= 0 and offset + _extent(tensor) <= _extent(whole)


def _extent(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _view(whole: Tensor, tensor: Tensor) -> View | None:
    if tensor is whole:
        return None
    offset = int(tensor.storage_offset() - whole.storage_offset())
    if offset == 0 and tensor.shape == whole.shape and tensor.stride() == whole.stride():
        return None
    return tensor.shape, tensor.stride(), offset


def _seen(tensor: Tensor, view: View | None) -> Tensor:
    return tensor if view is None else tensor.as_strided(view[0], view[1], tensor.storage_offset() + view[2])


def _cast_of(tensor: Tensor) -> tuple[Tensor, tuple[Any, int] | None]:
    """The tensor that this is a view of, and the edge of autograd to what that was cast from, if it was."""
    whole = tensor if tensor._base is None else tensor._base
    node = whole.grad_fn
    return whole, node.next_functions[0] if node is not None and node.name() == "ToCopyBackward0" else None


def _is_plain_cast(source: Tensor, cast: Tensor) -> bool:
    """Whether `source.to(cast.dtype)` makes `cast` again."""
    same = source.shape == cast.shape and source.device == cast.device and source.layout == cast.layout == torch.strided
    return same and cast._version == 0 and source.is_contiguous() and cast.is_contiguous()


def _refer_to_parameter(packed: RunSaved, tensor: Tensor) -> bool:
    whole, edge = _cast_of(tensor)
    parameter = getattr(edge[0], "variable", None) if edge else None
    if parameter is None or not _is_plain_cast(parameter, whole):
        return False
    packed.hold(parameter)
    packed.dtype, packed.view = whole.dtype, _view(whole, tensor)
    return True


def _flatten(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """What is in a value, and the function that puts it together again."""
    leaves, structure = tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value and dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = list(vars(value))
        leaves, structure = tree_flatten([vars(value)[name] for name in names])
        return leaves, partial(_dataclass, type(value), names, structure)
    return leaves, partial(tree_unflatten, treespec=structure)


def _dataclass(cls: type, names: list[str], structure: Any, leaves: list[Any]) -> Any:
    made: Any = object.__new__(cls)
    made.__dict__.update(zip(names, tree_unflatten(leaves, structure), strict=True))
    return made
