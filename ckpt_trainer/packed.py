"""What autograd holds in place of a saved tensor: the tensor, or how to make it again.

A packed tensor owns all that it needs and leads to no node, so that a graph that is dropped is freed. It is known by
the node whose result it is, for as long as anyone holds it: what is saved twice is packed once.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ckpt_trainer.chunks import mark_of
from ckpt_trainer.handles import Handle, Kept, Pack
from ckpt_trainer.rebuild_rules import Node

_KEY = "ckpt_trainer"


class Held:
    """A tensor stored in the graph as it is, unless it turns out later that it can be rebuilt (`give_way`) or `move`s."""

    __slots__ = (
        "__weakref__", "_away", "_back", "_instead", "_left", "_lent", "signature", "stays", "tensor", "uses", "version",
    )  # fmt: skip

    def __init__(self, tensor: Tensor) -> None:
        # Detached, because the result of an op that saves it would else hold the op that holds it.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        # What was made in inference mode counts no versions; an op may read it and save nothing of it.
        self.version = 0 if tensor.is_inference() else tensor._version
        # Sparse tensors have no strides.
        contiguous = tensor.layout is torch.strided and tensor.is_contiguous()
        self.signature = hash((tensor.dtype, tensor.layout, contiguous))
        self.uses = 0
        self.stays = isinstance(tensor, nn.Parameter)  # others may set it: not to be moved
        self._instead: Rebuilt | None = None
        self._away: Handle | None = None
        # What is away comes back once for all who ask, as what is rebuilt.
        self._back: Tensor | None = None
        self._left = 0
        self._lent = 0  # the version that it came back with

    @property
    def is_rebuilt(self) -> bool:
        return self._instead is not None

    @property
    def is_away(self) -> bool:
        """Whether it was moved."""
        return self._away is not None or (self._instead is not None and self._instead.is_away)

    @property
    def is_valid(self) -> bool:
        """Whether the tensor is as it was when it was stored."""
        return self.tensor.is_inference() or self.tensor._version == self.version

    def use(self) -> None:
        self.uses += 1
        self._left += self._away is not None
        if self._instead is not None:
            self._instead.use()

    def give_way(self, rebuilt: Rebuilt) -> None:
        """Let what makes the tensor again stand for it from now on."""
        for _ in range(self.uses):
            rebuilt.use()
        self._instead = rebuilt
        self.tensor = self.tensor.new_empty(0)
        self.version = self.tensor._version

    def move(self, pack: Pack) -> None:
        """Let what `pack` makes of the tensor stand for it from now on."""
        if self._instead is not None:
            self._instead.move(pack)
        elif self.uses and self._away is None and not self.stays and self.is_valid:
            away = pack(self.tensor)
            if not isinstance(away, Kept):
                self._away = away
                self._left = self.uses
                self.tensor = mark_of(self.tensor)

    def peek(self) -> Tensor:
        if self._away is not None:
            return self._away.get() if self._back is None else self._back
        return self.tensor if self._instead is None else self._instead.peek()

    def get(self) -> Tensor:
        if self._instead is not None:
            return self._instead.get()
        if self._away is not None:
            return self._get_away(self._away)
        if not self.is_valid:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{str(self.tensor.dtype)[6:]} {list(self.tensor.shape)}] is at version {self.tensor._version}; "
                f"expected version {self.version} instead."
            )
        return self.tensor

    def _get_away(self, away: Handle) -> Tensor:
        back = self._back
        if back is None or away.changed or back._version != self._lent:
            back = away.get()
            self._lent = back._version
        self._left -= 1
        self._back = back if self._left > 0 else None
        if self._left <= 0:
            self._left = self.uses  # for a graph that is kept and run again
        return back


class Rebuilt:
    """A tensor made again when backward asks for it: once for all who ask, and dropped after the last of them.

    Args:
        kind: What tells ways of making a tensor apart, with those of the inputs.
        function: Gives the tensor from those of `inputs` and `arguments`.
    """

    __slots__ = ("__weakref__", "arguments", "function", "inputs", "left", "signature", "strides", "uses", "value")

    def __init__(self, kind: Any, function: Any, inputs: tuple[Packed, ...], arguments: tuple[Any, ...] = ()) -> None:
        self.function = function
        self.inputs = inputs
        self.arguments = arguments
        self.signature: int = hash((kind, *(packed.signature for packed in inputs)))
        self.strides: tuple[int, ...] | None = None
        self.uses = self.left = 0
        self.value: Tensor | None = None

    @property
    def is_rebuilt(self) -> bool:
        """Whether an op has to run; a view of what is stored takes none."""
        return self.function is not as_view or self.inputs[0].is_rebuilt

    @property
    def is_away(self) -> bool:
        """Whether something that it is made of was moved."""
        return any(packed.is_away for packed in self.inputs)

    def use(self) -> None:
        """Count one more who will ask for the tensor; before the first, it asks nothing of its inputs either."""
        if not self.uses:
            for packed in self.inputs:
                packed.use()
        self.uses += 1
        self.left += 1

    def move(self, pack: Pack) -> None:
        """Move what it is made of."""
        for packed in self.inputs:
            packed.move(pack)

    def peek(self) -> Tensor:
        """The tensor, by nobody's request."""
        if self.value is not None:
            return self.value
        return self._shaped(self.function(*(packed.peek() for packed in self.inputs), *self.arguments))

    def get(self) -> Tensor:
        value = self.value
        if value is None:
            value = self._shaped(self.function(*(packed.get() for packed in self.inputs), *self.arguments))
        self.left -= 1
        self.value = value if self.left > 0 else None
        if self.left <= 0:
            self.left = self.uses  # for a graph that is kept and run again
        return value

    def _shaped(self, value: Tensor) -> Tensor:
        if self.strides is None or value.stride() == self.strides:
            return value
        return torch.empty_strided(value.shape, self.strides, dtype=value.dtype, device=value.device).copy_(value)


class _Nothing(Held):
    """What a node saved of an argument that was not given."""

    def __init__(self) -> None:
        self.signature = self.uses = 0
        self._instead = self._away = None

    def use(self) -> None:
        pass

    def move(self, pack: Pack) -> None:
        pass

    def peek(self) -> Any:
        return None

    get = peek


NOTHING = _Nothing()
Packed = Held | Rebuilt


def unpack(packed: Packed) -> Tensor:
    """The hook that gives autograd the tensor."""
    if not packed.is_rebuilt:
        return packed.get()  # as it is: no op to keep from being recorded or cast
    with torch.no_grad(), torch._C._DisableAutocast():
        return packed.get()


def as_view(base: Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    """A view of a rebuilt base as one of the base was; `offset` counts from where the base begins."""
    return base.as_strided(size, stride, base.storage_offset() + offset)


def known(node: Node, output: int) -> Packed | None:
    """What a result of a node was packed as, if anyone holds it still."""
    reference = node.metadata.get((_KEY, output))
    packed: Packed | None = reference() if reference is not None else None
    return packed


def remember(node: Node, output: int, packed: Packed) -> None:
    """Let `known` find it."""
    # By the node and not by us: the graph owns it. Weakly, for what is packed may lead to nodes.
    node.metadata[_KEY, output] = weakref.ref(packed)


def saved_by(node: Node, name: str) -> Packed | None:
    """What was packed of an argument that a node saved."""
    packed = packed_of(getattr(node, f"_raw_saved_{name}"))
    return None if packed is NOTHING else packed


def packed_of(saved: Any) -> Packed | None:
    """The same of one `SavedTensor`; `NOTHING` where the op was given none."""
    if saved.unpack_hook is unpack:
        packed: Packed = saved.data
        return packed
    if saved.unpack_hook is not None:
        return None  # others' hooks are not ours to call
    # Without hooks are numbers that became tensors, and nodes from outside.
    try:
        tensor = saved.unpack()
    except RuntimeError:  # changed in place since
        return None
    return NOTHING if tensor is None else Held(tensor)
