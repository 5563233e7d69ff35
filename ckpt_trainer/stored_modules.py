"""Store the results of chosen modules of a block, so that a replay of the block does not run them.

`StoredModules` is what of one block is chosen. `StoredModulesCall` is one call of the block: in its forward the chosen
run once, and what backward and the replays need of them is kept; a replay gets their results.

NOTE on exactness. A chosen callable runs in the forward only, and backward goes through the graph of that run.
  1. What that graph saves is kept by hooks of ours, so that the checkpoint does not ask a replay for it. What it saves
     of the callable's inputs is not kept: a side node saves those for the checkpoint, in the forward and in each
     replay, so that the replay rebuilds them. Casts of inputs and of parameters are made again.
  2. A replay gets the results as they were, requiring grad as they did, so that what uses them saves what it saved.
  3. What else a run does: it draws random numbers, so a replay sets the generators to where the run left them; it
     writes buffers, which a replay does not keep anyway (see `block_state`). Where it changed an argument or left a
     tensor on itself, or where its results were changed later, a replay runs it again, and saves nothing of that.
  4. What is kept is checked for changes in place when it is used, as autograd does.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ckpt_trainer.handles import Pack
from ckpt_trainer.runs import (
    LEFT_ON_ITSELF,
    HoldsTooMuchError,
    Outputs,
    Run,
    RunSaved,
    States,
    StrangeOutputError,
    bytes_of,
    pack,
    save_for_checkpoint,
    save_nothing,
    set_states,
    state_of,
    storage_of,
    unpack,
)
from ckpt_trainer.sites import Handler, Site, find_sites, tensors_in


class StoredModules:
    """What of one block is stored by module, for as long as a plan is in force.

    Args:
        module: The block.
        name: Its full name.
        save: What is chosen, see `find_sites`; entries that choose nothing here are left to others.

    Attributes:
        matched: The entries of `save` that chose something.
        chosen: Names, within the block, of what they chose.
        names: Names of all submodules.
        skipped: Name of what is chosen but not stored any more -> why.
    """

    def __init__(self, module: nn.Module, name: str, save: Sequence[str]) -> None:
        self.name = name
        self.names = [sub for sub, _ in module.named_modules() if sub]
        self.sites, self.matched = find_sites(module, name, save)
        self.chosen = [site.name for site in self.sites]
        self.skipped: dict[str, str] = {}
        # Results, by callable and which call of it, that no replay asked for; and those that one did later.
        self.unneeded: set[tuple[str, int]] = set()
        self.needed: set[tuple[str, int]] = set()
        self.own = (*module.parameters(), *module.buffers())
        # Makes autograd record functions that are connected to nothing.
        self.anchor = torch.empty(0, requires_grad=True)

    def call(self) -> StoredModulesCall:
        """One call of the block, to be owned by what autograd holds for it."""
        return StoredModulesCall(self)


class StoredModulesCall:
    """What is stored of one call of a block: filled while `storing`, used while `reusing`, freed with the graph."""

    def __init__(self, owner: StoredModules) -> None:
        self._owner = owner
        self._records: dict[str, list[_Record | None]] = defaultdict(list)
        self._packed: list[weakref.ref[RunSaved]] = []
        self._places: Counter[str] = Counter()
        self._outside: dict[torch.device | None, Any] = {}
        self.inside = False

    @property
    def bytes(self) -> int:
        """Bytes held now, of distinct storages, without the parameters and buffers of the block."""
        packed = [getattr(held(), "tensor", None) for held in self._packed]
        kept = [tensor for record in self._all() if record.outputs for tensor in record.outputs.tensors()]
        own = {storage_of(tensor) for tensor in self._owner.own}
        sizes = {storage_of(tensor): bytes_of(tensor) for tensor in (*packed, *kept) if tensor is not None}
        return sum(size for storage, size in sizes.items() if storage not in own)

    @contextmanager
    def storing(self) -> Iterator[None]:
        """Around the forward of the block."""
        with self._intercepted(self._store):
            yield

    def move(self, pack: Pack) -> None:
        """After the forward: what is stored is what `pack` made of it."""
        for packed in (reference() for reference in self._packed):
            if packed is not None:
                packed.move(pack)
        for record in self._all():
            if record.outputs is not None:
                record.outputs.move(pack)

    @contextmanager
    def reusing(self) -> Iterator[None]:
        """Around a replay of the block, of which there may be any number.

        A replay that an exception ends has all it needs, so results that it did not ask for are not kept any longer.
        """
        self._places.clear()
        try:
            with self._intercepted(self._reuse):
                yield
        except BaseException:
            self._drop_unasked()
            raise
        finally:
            set_states(list(self._outside.items()))
            self._outside.clear()

    @contextmanager
    def _intercepted(self, handler: Handler) -> Iterator[None]:
        with ExitStack() as stack:
            for site in self._owner.sites:
                stack.enter_context(site.intercepted(handler))
            yield

    def _all(self) -> list[_Record]:
        return [record for records in self._records.values() for record in records if record is not None]

    def _store(self, site: Site, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.inside or site.name in self._owner.skipped:
            return original(*args, **kwargs)
        records = self._records[site.name]
        record = _Record((site.name, len(records)))
        records.append(record)
        run = Run(site, self._owner.name, list(tensors_in((args, kwargs))))
        try:
            output = self._run(partial(pack, weakref.ref(run)), partial(original, *args, **kwargs))
        except HoldsTooMuchError:
            records[-1] = None
            self._owner.skipped[site.name] = "it holds more than its inputs and results, so it is no single kernel"
        finally:
            if records[-1] is not None:
                record.references = run.save_inputs(self._owner.anchor)
                self._packed += run.packed
        if records[-1] is None:
            # Only here, where nothing holds what the run had made so far.
            set_states(run.states)
            return original(*args, **kwargs)
        self._keep(record, run, output, list(tensors_in((args, kwargs))))
        return output

    def _run(self, hook: Callable[[Tensor], Any], run: Callable[[], Any]) -> Any:
        self.inside = True
        try:
            with saved_tensors_hooks(hook, unpack):
                return run()
        finally:
            self.inside = False

    def _keep(self, record: _Record, run: Run, output: Any, inputs: list[Tensor]) -> None:
        """Keep the results of a run, unless a replay has to run it again."""
        record.drawn = run.drawn()
        why = run.why_again(inputs)
        if why is None and record.key not in self._owner.unneeded:
            try:
                record.outputs = Outputs(output, run)
            except StrangeOutputError as error:
                why = str(error)
        # Constants are made in a first call and then stay, so that the first says nothing about the next.
        if why is not None and (run.site.watched or why != LEFT_ON_ITSELF):
            self._owner.skipped[run.site.name] = why
        run.site.watched = True

    def _reuse(self, site: Site, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.inside:
            return original(*args, **kwargs)
        place = self._places[site.name]
        self._places[site.name] += 1
        # A call that the forward did not make is made: the checkpoint sees that it saves what the forward did not.
        record = self._records[site.name][place] if place < len(self._records[site.name]) else None
        if record is None:
            return original(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        for index in record.references:
            save_for_checkpoint(self._owner.anchor, inputs[index : index + 1])
        if record.outputs is None or record.outputs.are_changed():
            self._note_again(record)
            return self._run(save_nothing, partial(original, *args, **kwargs))
        record.asked = True
        for device, _ in record.drawn:
            self._outside.setdefault(device, state_of(device))
        set_states(record.drawn)
        return record.outputs.give(inputs, self._owner.anchor)

    def _note_again(self, record: _Record) -> None:
        name, _ = record.key
        if record.outputs is not None:
            self._owner.skipped[name] = "its results are changed in place later"
        elif record.key in self._owner.unneeded:
            self._owner.unneeded.discard(record.key)
            self._owner.needed.add(record.key)

    def _drop_unasked(self) -> None:
        for record in self._all():
            if record.outputs is not None and not record.asked and record.key not in self._owner.needed:
                record.outputs = None
                self._owner.unneeded.add(record.key)


class _Record:
    """What a replay puts in place of one run. Holds no graph."""

    def __init__(self, key: tuple[str, int]) -> None:
        self.key = key
        self.references: list[int] = []
        self.outputs: Outputs | None = None
        self.drawn: States = []
        self.asked = False
