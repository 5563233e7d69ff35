"""Run one block so that backward has what it needs: its forward is replayed, or what is cheap in it is rebuilt.

A replay is the forward again when backward asks, of which chosen results may be stored. Only this file and `compiled`
call `torch.utils.checkpoint`. Which blocks are run in which way is not its business.

NOTE on exactness. A replay is the same computation on the same values, so that gradients are equal to the last bit, if
  1. the inputs are the same: every tensor argument, positional, keyword or in a tuple, goes through the checkpoint as a
     positional argument, so autograd guards it against changes in place and (reentrant) sees where gradients go.
     Lists, dicts and other objects are handed on as they are, for blocks pass values to later blocks through them; a
     replay gets a copy of what they held when the forward began;
  2. the random numbers are the same: the state of their generators is restored where the block drew any;
  3. the buffers are the same: the replay sees those of before the forward and writes to copies, so that running
     statistics are updated once (for both see `block_state`);
  4. the precision is the same: torch restores autocast;
  5. nothing else changed in between. A key/value cache does: a call that gets one is not replayed, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ckpt_trainer import side_channels
from ckpt_trainer.arguments import copy_of, fill, fill_each, is_cache, lift, require_grad_of_one
from ckpt_trainer.block_state import Before, BlockState, as_before, devices_of
from ckpt_trainer.compiled import MARKED, Told, traced_or_python
from ckpt_trainer.distributed import Turns
from ckpt_trainer.flops import FlopCounter
from ckpt_trainer.groups import Group
from ckpt_trainer.handles import Pack, unpack
from ckpt_trainer.offload import Offloading
from ckpt_trainer.rebuild import Rebuilding
from ckpt_trainer.segments import Segments


@dataclass
class Tally:
    """What happened to the calls of blocks, counted since it was made.

    Args:
        calls: Calls by what was done: `recompute`, `rebuild` (cheap results only), `offload` (all that autograd
            stores), `no graph` (nothing needs a gradient), `no grad` (gradients are off), or why a call was kept.
        checkpointed: Calls that backward may replay, by block name.
        replays: Replays by block name.
        rebuilt_inputs: Forwards run once more for the input of the next block, by block name.
        last_replayed: Name of the block replayed last; where a replay does not match its forward, this is the block.
        unrestored: Blocks that drew random numbers which are not restored, and why.
        block_flops: FLOPs of one forward of each block, from the calls made while `counter` was set.
        replay_flops: FLOPs of one replay of each block that reuses results, from the first while `counts_replays`.
        counter: Counts FLOPs while a forward is measured.
        counts_replays: Whether replays are measured.
        turns: Is told of each replay of the reentrant variant.
    """

    calls: Counter[str] = field(default_factory=Counter)
    checkpointed: Counter[str] = field(default_factory=Counter)
    replays: Counter[str] = field(default_factory=Counter)
    rebuilt_inputs: Counter[str] = field(default_factory=Counter)
    last_replayed: str | None = None
    unrestored: dict[str, str] = field(default_factory=dict)
    block_flops: dict[str, int] = field(default_factory=dict)
    replay_flops: dict[str, int] = field(default_factory=dict)
    counter: FlopCounter | None = None
    counts_replays: bool = False
    turns: Turns = field(default_factory=Turns)


@dataclass(frozen=True)
class Variant:
    """How blocks are replayed: the settings that reach down to here.

    Args:
        use_reentrant: Use torch's reentrant variant.
        require_input_grad: Give the block an input that requires grad if it got none. True always; None where the
            reentrant variant needs it; False never.
        options: More keyword arguments for `torch.utils.checkpoint.checkpoint`.
    """

    use_reentrant: bool = False
    require_input_grad: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Elsewhere:
    """Where a block's stored tensors go, if not to stay on the device.

    Args:
        offloading: Moves them.
        own: Parameters and buffers of the block, which stay.
        to_disk: They may go on from the host to disk.
    """

    offloading: Offloading
    own: Sequence[Tensor]
    to_disk: bool = False

    def begin(self, tensors: Sequence[Tensor]) -> Group | None:
        """A call with these tensors; None where there is nowhere to go."""
        return self.offloading.begin(tensors, self.own, self.to_disk)


@dataclass(frozen=True)
class Movable:
    """A block of which all that autograd stores is moved, and nothing is rebuilt; call `run` in place of its forward.

    Args:
        parameters: Its parameters.
        elsewhere: Where it is moved.
        tally: Where calls are counted.
    """

    parameters: Sequence[nn.Parameter]
    elsewhere: Elsewhere
    tally: Tally

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `forward(*args, **kwargs)`."""
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        tensors: list[Tensor] = []
        for value in (*args, *kwargs.values()):
            lift(value, tensors)
        why = _why_no_graph(self.parameters, tensors)
        group = self.elsewhere.begin(tensors) if why is None else None
        self.tally.calls[why or ("kept" if group is None else "offload")] += 1
        if group is None:
            return forward(*args, **kwargs)
        group.packed_inputs()
        with saved_tensors_hooks(group.pack, unpack):
            output = forward(*args, **kwargs)
        group.ended()
        return output


@dataclass(frozen=True)
class Rebuildable:
    """A block of which cheap results are rebuilt and all others stored; call `run` in place of its forward.

    Args:
        parameters: Its parameters.
        rebuilding: What the blocks of the model rebuild.
        tally: Where calls are counted.
        elsewhere: Where what is stored is moved; None to stay.
        told: What a compiler is told of it.
    """

    parameters: Sequence[nn.Parameter]
    rebuilding: Rebuilding
    tally: Tally
    elsewhere: Elsewhere | None = None
    told: Told = MARKED

    @traced_or_python
    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `forward(*args, **kwargs)`; see `Rebuilding.run`."""
        if torch.compiler.is_compiling():
            return self.told.run(forward, args, kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        why = _why_no_graph(self.parameters, tensors)
        self.tally.calls[why or "rebuild"] += 1
        if why is not None:
            return forward(*args, **kwargs)
        return self.told.run_untraced(self._rebuilt, tensors, forward, args, kwargs)

    def _rebuilt(
        self, tensors: list[Tensor], forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        group = self.elsewhere.begin(tensors) if self.elsewhere is not None else None
        if group is None:
            return self.rebuilding.run(forward, args, kwargs, self.parameters)
        group.packed_inputs()
        output = self.rebuilding.run(forward, args, kwargs, self.parameters, group.pack)
        group.ended()
        return output


class Stored(Protocol):
    """What the replays of one call need not compute: results of ops, or of modules."""

    def storing(self) -> AbstractContextManager[Any]:
        """Around the forward."""

    def reusing(self) -> AbstractContextManager[Any]:
        """Around each replay."""

    def move(self, pack: Pack) -> None:
        """After the forward: what is stored is what `pack` made of it."""


class Storing(Protocol):
    """Chooses what is stored in the calls of one block."""

    def call(self) -> Stored:
        """For one call."""


@dataclass(frozen=True)
class Replayable:
    """A block prepared for replay; call `run` in place of its forward.

    Args:
        name: Name of the block.
        parameters: Its parameters.
        state: Its random sites and buffers.
        variant: How to replay it.
        tally: Where calls and replays are counted.
        storing: What is stored besides its inputs.
        segments: Of its stack, where its input may be rebuilt instead of stored.
        elsewhere: Where what is stored is moved; None to stay.
        told: What a compiler is told of it.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    state: BlockState
    variant: Variant
    tally: Tally
    storing: Sequence[Storing] = ()
    segments: Segments | None = None
    elsewhere: Elsewhere | None = None
    told: Told = MARKED

    @traced_or_python
    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `forward(*args, **kwargs)` so that backward replays it.

        Returns:
            What `forward` returns, with the same values bit for bit.

        Raises:
            ValueError: The reentrant variant was asked for and the arguments show that its gradients would be wrong.
            torch.utils.checkpoint.CheckpointError: In backward, if the replay does not match the forward.
        """
        if torch.compiler.is_compiling():
            return self.told.run(forward, args, kwargs)
        if not torch.is_grad_enabled():
            return self._plainly("no grad", forward, args, kwargs)
        if any(is_cache(value) for value in (*args, *kwargs.values())):
            return self._plainly("got a key/value cache", forward, args, kwargs)
        return self.told.run_untraced(self._replayed, forward, args, kwargs)

    def _replayed(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors: list[Tensor] = []
        args, kwargs = lift(args, tensors), {key: lift(value, tensors) for key, value in kwargs.items()}
        trainable = any(parameter.requires_grad for parameter in self.parameters)
        required = self.variant.require_input_grad
        if required or (required is None and self.variant.use_reentrant and trainable):
            require_grad_of_one(tensors)
        if not trainable and not any(tensor.requires_grad for tensor in tensors):
            self.tally.calls["no graph"] += 1
            return forward(*fill(args, tensors), **fill_each(kwargs, tensors))
        self.tally.calls["recompute"] += 1
        self.tally.checkpointed[self.name] += 1
        group = self.elsewhere.begin(tensors) if self.elsewhere is not None else None
        call = _Call(self, forward, args, kwargs, group)
        if group is None:
            return self._checkpointed(call, tensors)
        with saved_tensors_hooks(group.pack, unpack):  # of the inputs; the checkpoint has hooks of its own within
            output = self._checkpointed(call, tensors)
        group.ended()
        return output

    def _plainly(self, why: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.tally.calls[why] += 1
        return forward(*args, **kwargs)

    def _checkpointed(self, call: _Call, tensors: list[Tensor]) -> Any:
        # torch keeps no random state: the call does, and only where numbers are drawn.
        if not self.variant.use_reentrant:
            options = {"use_reentrant": False, "preserve_rng_state": False, **self.variant.options}
            if self.segments is not None:
                return self.segments.run(partial[Any](checkpoint, **options), call, tensors)
            return checkpoint(call, *tensors, **options)
        side_channels.refuse_containers(self.name, (*call.args, *call.kwargs.values()))
        flat = _FlatCall(call)
        with side_channels.refuse_attributes(self.name, self.state.modules, first=not self.state.watched):
            outputs = checkpoint(flat, *tensors, use_reentrant=True, preserve_rng_state=False)
        side_channels.refuse_outputs(self.name, flat.leaves, outputs, any(p.requires_grad for p in self.parameters))
        return flat.rebuild(outputs)


class _Call:
    """One call of one block: the first time it runs is the forward, every later time a replay."""

    def __init__(
        self,
        block: Replayable,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        group: Group | None,
    ) -> None:
        self.block = block
        self.group = group
        self.forward = forward
        self.args = args
        self.kwargs = kwargs
        self.before: Before | None = None
        self.stored = [storing.call() for storing in block.storing]

    def __call__(self, *tensors: Tensor) -> Any:
        if self.before is None:
            args, kwargs = fill(self.args, tensors), fill_each(self.kwargs, tensors)
            # Not the containers themselves: they may be appended to later, and hold the graph that holds this.
            self.args = tuple(copy_of(value) for value in self.args)
            self.kwargs = {key: copy_of(value) for key, value in self.kwargs.items()}
            return self._first(tensors, args, kwargs)
        self.block.tally.replays[self.block.name] += 1
        return self._replay(tensors)

    def again(self, *tensors: Tensor) -> Any:
        """The forward once more, to rebuild the input of the next block."""
        self.block.tally.rebuilt_inputs[self.block.name] += 1
        return self._replay(tensors)

    def _replay(self, tensors: Sequence[Tensor]) -> Any:
        args = tuple(copy_of(value) for value in fill(self.args, tensors))
        kwargs = {key: copy_of(value) for key, value in fill_each(self.kwargs, tensors).items()}
        self.block.tally.last_replayed = self.block.name
        assert self.before is not None
        with self._counted(), as_before(self.before), ExitStack() as stack:
            for stored in self.stored:
                stack.enter_context(stored.reusing())
            return self.forward(*args, **kwargs)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        tally, name = self.block.tally, self.block.name
        if not (tally.counts_replays and self.stored) or name in tally.replay_flops:
            yield
            return
        counter = FlopCounter()
        try:
            with counter:
                yield
        finally:  # A replay ends with an exception once it has all that backward needs.
            tally.replay_flops[name] = counter.total

    def _first(self, tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tally = self.block.tally
        flops = tally.counter.total if tally.counter else 0
        group, self.group = self.group, None
        if group is not None:
            group.packed_inputs()
        with self.block.state.remember(devices_of(tensors)) as before, ExitStack() as stack:
            for stored in self.stored:
                stack.enter_context(stored.storing())
            output = self.forward(*args, **kwargs)
        if group is not None:
            for stored in self.stored:
                stored.move(group.pack)
        if tally.counter:
            tally.block_flops[self.block.name] = tally.counter.total - flops
        if before.unrestored:
            tally.unrestored[self.block.name] = before.unrestored
        self.before = before
        return output


class _FlatCall:
    """A call whose output is a flat tuple of tensors, which is all that the reentrant variant gives gradients to."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        self.forward = call.block.tally.turns.begun

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.call.before is not None:
            self.call.block.tally.turns.replay(self.forward)
        leaves, self.structure = tree_flatten(self.call(*tensors))
        self.leaves = [leaf if not isinstance(leaf, Tensor) else None for leaf in leaves]
        self.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        return tuple(leaves[place] for place in self.places)

    def rebuild(self, tensors: tuple[Tensor, ...]) -> Any:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.structure)


def _why_no_graph(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> str | None:
    """Why autograd will store nothing of a call; None if it will."""
    if not torch.is_grad_enabled():
        return "no grad"
    return None if any(leaf.requires_grad for leaf in (*parameters, *tensors)) else "no graph"
