"""What one call of one block packed, and how many of it backward still has to ask for.

A `Group` decides which tensors may leave, and gives autograd a handle for each. When they leave and come back is the
business of `offload`, which is the lane that a group is on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ckpt_trainer.chunks import Back, Channel, Chunk, known_chunk, remember_chunk
from ckpt_trainer.handles import Handle, Kept, Moved, Place, Sharded, bytes_range, is_of_parameter
from ckpt_trainer.memory import format_bytes, storages_of

# A smaller tensor is not worth a copy of its own.
MIN_BYTES = 2**20


class Lane(Protocol):
    """The way of the groups of one device."""

    channel: Channel

    def note(self, group: Group) -> None:
        """A group packs something."""

    def send_older(self) -> None:
        """All groups but the newest leave."""

    def wait_for_oldest(self) -> None:
        """Computation waits for those that are longest on their way."""

    def take(self, use: Use) -> Place:
        """Where a chunk is, once backward asks for it."""


class Group:
    """What one call of one block packed. Owned by what autograd holds of it.

    Args:
        lane: Of its device.
        number: Groups are numbered as they begin.
        own: Parameters and buffers of the block.
        to_disk: What it packs may go on from the host to disk.

    Attributes:
        before: The group that packed something before it; None until it packs something itself.
    """

    def __init__(self, lane: Lane, number: int, own: Sequence[Tensor], to_disk: bool = False) -> None:
        self.lane = lane
        self.number = number
        self.before: Reference | None = None
        self._own = own
        self._to_disk = to_disk
        self._own_storages: set[int] | None = None
        # By the address of their chunk, which they keep alive.
        self._uses: weakref.WeakValueDictionary[int, Use] = weakref.WeakValueDictionary()

    def uses(self) -> list[Use]:
        """Those alive, the last packed first, which is the order in which backward asks for them."""
        return list(self._uses.values())[::-1]

    def awaited(self) -> list[Use]:
        """Those that backward did not ask for yet; all of them, once it asked for all: the graph is kept."""
        uses = self.uses()
        if all(use.taken for use in uses):
            for use in uses:
                use.taken = False
        return [use for use in uses if not use.taken]

    def packed_inputs(self) -> None:
        """The inputs of the call are packed: older groups may leave."""
        self.lane.send_older()

    def ended(self) -> None:
        """The forward is over: what left before it began must have arrived."""
        self.lane.wait_for_oldest()

    def pack(self, tensor: Tensor) -> Handle:
        """The hook for what autograd saves."""
        if type(tensor) is DTensor and not is_of_parameter(tensor):
            return Sharded(tensor, partial(self._pack, counter=tensor))
        return self._pack(tensor, tensor)

    def _pack(self, tensor: Tensor, counter: Tensor) -> Handle:
        why = self._why_kept(tensor)
        found = bytes_range(tensor) if why is None else None
        if found is not None and found[1] - found[0] < MIN_BYTES:
            found, why = None, _small()
        if found is None:
            self.lane.channel.counts.keep(why or "small part of a storage", _bytes_of(tensor))
            return Kept(tensor)
        self.lane.note(self)
        return Moved(tensor, self._use(tensor, *found, counter))

    def _why_kept(self, tensor: Tensor) -> str | None:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return f"a {type(tensor).__name__}, {str(tensor.layout).removeprefix('torch.')}"
        if tensor.device != self.lane.channel.streams.device:
            return f"on {tensor.device}"
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return "within a function transform"
        if tensor.untyped_storage().nbytes() < MIN_BYTES:
            return _small()
        if tensor.is_inference() or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
            return "of a special kind"
        return "parameter or buffer" if self._is_own(tensor) else None

    def _is_own(self, tensor: Tensor) -> bool:
        if is_of_parameter(tensor):
            return True
        if self._own_storages is None:
            self._own_storages = {storage._cdata for own in self._own for storage in storages_of(own)}
        return tensor.untyped_storage()._cdata in self._own_storages

    def _use(self, tensor: Tensor, start: int, end: int, counter: Tensor) -> Use:
        channel = self.lane.channel
        # Of a part that was written, which it does not count, some bytes may be known as they were before.
        written = counter is not tensor and counter._version
        chunk = None if written else known_chunk(tensor, channel, start, end)
        if chunk is None:
            chunk = Chunk(channel, tensor, start, end - start, counter)
            remember_chunk(tensor, chunk)
        else:
            chunk.retake(tensor)
        chunk.last = self.number
        chunk.to_disk |= self._to_disk
        use = self._uses.get(id(chunk))
        if use is None:
            use = self._uses[id(chunk)] = Use(self, chunk)
        use.number += 1
        use.left += 1
        return use


class Use:
    """What one group has of one chunk.

    Attributes:
        number: How many tensors of the group lie in the chunk.
        left: How many of them backward did not ask for yet.
        loaded: The memory that the chunk was brought back to, until all were asked for.
        taken: All were asked for.
    """

    __slots__ = ("__weakref__", "chunk", "group", "left", "loaded", "number", "taken")

    def __init__(self, group: Group, chunk: Chunk) -> None:
        self.group = group
        self.chunk = chunk
        self.number = self.left = 0
        self.loaded: tuple[Tensor, Back] | None = None
        self.taken = False

    def take(self) -> Place:
        """Where the chunk is, ready for computation on the live stream."""
        return self.group.lane.take(self)

    def place(self) -> Place:
        """The same, for the lane."""
        if self.chunk.is_here() and (source := self.chunk.source) is not None:
            self._taken()
            return Place(source.untyped_storage(), 0, None)
        if self.loaded is not None and not self.loaded[1].is_fit(self.chunk.channel.streams.live()):
            self.drop()
        memory, back = self.load()
        back.wait(counted=True)
        self._taken()
        return Place(memory.untyped_storage(), self.chunk.start, back.mark)

    def _taken(self) -> None:
        self.left -= 1
        if self.left <= 0:
            self.left = self.number  # for a graph that is kept and run again
            self.taken = True
            self.loaded = None
            self.chunk.settle()

    def load(self) -> tuple[Tensor, Back]:
        """Begin to bring the chunk back."""
        if self.loaded is None:
            self.loaded = self.chunk.bring_back()
        return self.loaded

    def drop(self) -> None:
        """Give up what was brought back."""
        if self.loaded is not None:
            self.loaded[1].wait()
            self.loaded = None

    def __del__(self) -> None:
        self.drop()


Reference = Callable[[], Group | None]


def _small() -> str:
    return f"below {format_bytes(MIN_BYTES)}"


def _bytes_of(tensor: Tensor) -> int:
    return tensor.nbytes if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided else 0
