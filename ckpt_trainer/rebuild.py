"""Store what is expensive to compute, rebuild the rest from it: the tier `expensive`.

While a block runs, autograd hands each tensor it saves to `Rebuilding`. If an op with a rule (`rebuild_rules`) made the
tensor from tensors that are stored anyway, only how to make it again is stored. There is no second forward, no
dispatch mode and no random number; what a saved tensor needs is owned by what stands in its place in the graph.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from ckpt_trainer.handles import Pack, is_of_parameter
from ckpt_trainer.log import logger
from ckpt_trainer.packed import Held, Packed, Rebuilt, as_view, known, packed_of, remember, saved_by, unpack
from ckpt_trainer.rebuild_rules import NORMS, RULES, Node, Rule, dtype_of, norm_rule, shape_of

# Below this a tensor is not worth the time of its rebuilding.
_SMALL_BYTES = 1024
# Ops between a tensor that is rebuilt and those that are stored. Rotary embeddings after a norm take ten.
_LONGEST_CHAIN = 12
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LEAF = "torch::autograd::AccumulateGrad"


class _Run:
    """One run of one block.

    Args:
        leaves: Parameters and inputs.
        given: What the inputs are packed as; known as long as this lives, so that a cast of an input is rebuilt from the
            input instead of being copied.
        moves: What is stored will be moved, with that of this block alone.

    Attributes:
        versions: Those that the leaves had when it began.
        results: (node, number, what stands for it) of results that their own op saved.
        norms: (weight, node) of the normalisations looked at.
        packed: What autograd was given.
    """

    def __init__(self, leaves: Sequence[Tensor], given: Sequence[Packed], moves: bool = False) -> None:
        self.moves = moves
        self.versions = {leaf: leaf._version for leaf in leaves if leaf.is_leaf and not leaf.is_inference()}
        self.given = given
        self.results: list[tuple[Node, int, Held]] = []
        self.norms: list[tuple[Tensor, Node]] = []
        self.packed: list[weakref.ref[Packed]] = []


class _Here(threading.local):
    """The run that this thread is in."""

    def __init__(self) -> None:
        self.run = _Run((), ())


class Rebuilding:
    """What the blocks of one model store and rebuild.

    Args:
        modules: All modules whose results may be rebuilt; normalisations among them are known by their weight.
        from_parameters: Rebuild from parameters too. Not where they are at hand only while their module runs (sharded).

    Attributes:
        tensors: Saved tensors that were not stored so far, a tensor saved by two ops counted twice.
        refused: Kinds of nodes that were stored because their result did not come out the same, bit for bit.
    """

    def __init__(self, modules: Iterable[nn.Module], from_parameters: bool = True) -> None:
        self.tensors = 0
        self.refused: set[str] = set()
        self._epsilons: dict[Tensor | None, float | None] = {}
        for module in modules:
            if (epsilon := _epsilon(module)) is not None:
                weight = module._parameters["weight"]
                # None where modules that share a weight disagree.
                self._epsilons[weight] = epsilon if self._epsilons.get(weight, epsilon) == epsilon else None
        self._from_parameters = from_parameters
        self._here = _Here()
        self._same: dict[int, bool] = {}

    def run(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parameters: Sequence[nn.Parameter] = (),
        move: Pack | None = None,
    ) -> Any:
        """Call `forward(*args, **kwargs)` so that of what autograd saves within, what is cheap to rebuild is not stored.

        Args:
            parameters: Those that the forward may use; what is made of others is stored.
            move: Makes of a tensor what is stored instead of it.

        Raises:
            RuntimeError: In backward, where a stored tensor was changed in place, as autograd does.
        """
        if not AVAILABLE:
            return forward(*args, **kwargs)
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        # In a run of its own: what is learnt of the nodes that made the inputs would else be kept for good.
        outer, self._here.run = self._here.run, _Run((), ())
        try:
            # What is moved is brought back block by block, so nothing is made of what another block stores.
            given = [self._packed(value) if move is None else _held_anew(value) for value in inputs]
            self._here.run = _Run((*parameters, *inputs), given, move is not None)
            with saved_tensors_hooks(self._pack, unpack):
                output = forward(*args, **kwargs)
            for node, number, held in self._here.run.results:
                self._try_again(node, number, held)
            if move is not None:
                for reference in self._here.run.packed:
                    if (packed := reference()) is not None:
                        packed.move(move)
        finally:
            self._here.run = outer
        return output

    def _pack(self, tensor: Tensor) -> Packed:
        packed = self._packed(tensor)
        packed.use()
        self.tensors += packed.is_rebuilt
        self._here.run.packed.append(weakref.ref(packed))
        return packed

    def _packed(self, tensor: Tensor) -> Packed:
        node = tensor.grad_fn
        if node is None or type(tensor) not in (Tensor, FakeTensor):
            return self._held(tensor)
        output = tensor.output_nr
        packed = self._near(known(node, output))
        if packed is not None and self._stands_for(packed, tensor, node):
            return packed
        packed = self._found(tensor, node, output)
        if packed is None:
            packed = self._held(tensor)
            if hasattr(node, "_raw_saved_result") and tensor.nbytes >= _SMALL_BYTES:
                self._here.run.results.append((node, output, packed))
        remember(node, output, packed)
        return packed

    def _held(self, tensor: Tensor) -> Held:
        held = Held(tensor)
        held.stays |= self._here.run.moves and is_of_parameter(tensor)
        return held

    def _near(self, packed: Packed | None) -> Packed | None:
        """The same, unless it waits elsewhere for another block."""
        return None if packed is not None and self._here.run.moves and packed.is_away else packed

    def _try_again(self, node: Node, output: int, held: Held) -> None:
        """Rebuild the result of an op that saved it before another op saved what it is made of, as `x * sigmoid(x)`."""
        try:
            packed = self._made(node, output, _LONGEST_CHAIN)
        except AttributeError as error:
            self._refuse(node, str(error))
            return
        if packed is not None and held.is_valid and self._stands_for(packed, held.tensor, node):
            held.give_way(packed)

    def _found(self, tensor: Tensor, node: Node, output: int) -> Packed | None:
        if tensor._is_view():
            return self._view(tensor)
        # What was written in place may differ from what its node gave, and nobody looks again.
        if tensor.nbytes < _SMALL_BYTES or tensor._version:
            return None
        try:
            packed = self._result(node, output, _LONGEST_CHAIN)
        except AttributeError as error:  # torch renamed what a node saves
            self._refuse(node, str(error))
            return None
        if packed is not None and self._stands_for(packed, tensor, node):
            return packed
        return _narrowed(tensor, node)

    def _view(self, tensor: Tensor) -> Packed | None:
        base = tensor._base
        if base is None or base.grad_fn is None:
            return None  # of a parameter or a constant: nothing is stored for it
        if base.dtype != tensor.dtype or tensor.is_conj() or tensor.is_neg():
            return None  # more than another geometry
        geometry = (tensor.size(), tensor.stride(), tensor.storage_offset() - base.storage_offset())
        return Rebuilt("view", as_view, (self._packed(base),), geometry)

    def _stands_for(self, packed: Packed, tensor: Tensor, node: Node) -> bool:
        """Whether what is packed gives this tensor, looked at once for each way of making one."""
        if isinstance(packed, Held):
            return packed.is_valid
        if tensor._version:
            return False
        if packed.strides is None:
            packed.strides = tensor.stride()
        same = self._same.get(packed.signature)
        if same is None:
            same = self._same[packed.signature] = _is_fake(tensor) or self._comes_out_the_same(packed, tensor, node)
        return same

    def _comes_out_the_same(self, packed: Packed, tensor: Tensor, node: Node) -> bool:
        try:
            with torch._C._DisableAutocast():
                same = _equal_bits(packed.peek(), tensor)
        except (RuntimeError, TypeError, ValueError) as error:
            self._refuse(node, str(error))
            return False
        if not same:
            self._refuse(node, "other bits")
        return same

    def _refuse(self, node: Node, why: str) -> None:
        if node.name() not in self.refused:
            logger.debug("result of %s is stored, since it cannot be rebuilt: %s", node.name(), why)
        self.refused.add(node.name())

    def _result(self, node: Node, output: int, longest: int) -> Packed | None:
        """What gives a result of a node, if that is stored or can be rebuilt from what is; else None."""
        packed = self._near(known(node, output))
        if packed is None:
            packed = self._made(node, output, longest)
            if packed is not None:
                remember(node, output, packed)
        elif isinstance(packed, Held) and not self._is_as_made(packed):
            return None
        return packed

    def _is_as_made(self, held: Held) -> bool:
        # What was written may have been stored before or after the op read it that is to be rebuilt. What the block was
        # given, and is as it was then, was there before all ops of the block.
        return held.is_valid and (held.version == 0 or held in self._here.run.given)

    def _made(self, node: Node, output: int, longest: int) -> Rebuilt | None:
        rule = RULES.get(node.name()) or norm_rule(node, self._epsilon_of)
        if rule is None or longest == 0:
            return None
        inputs = self._inputs(rule, node, longest - 1)
        if inputs is None or not (self._from_parameters or _without_parameters(inputs)):
            return None
        kind = (node.name(), dtype_of(node, output), node._input_metadata[output].device, self._which_norm(node))
        return Rebuilt(kind, rule.function, tuple(inputs), rule.arguments(node, output))

    def _which_norm(self, node: Node) -> Any:
        """Of a normalisation, its weight and how often that was used before: each use may have another epsilon."""
        if node.name() not in NORMS:
            return None
        weight = saved_by(node, "weight")
        assert weight is not None
        norms = self._here.run.norms
        if not any(other is node for _, other in norms):
            norms.append((weight.peek(), node))
        nodes = [other for own, other in norms if own is weight.peek()]
        return id(weight.peek()), nodes.index(node)

    def _inputs(self, rule: Rule, node: Node, longest: int) -> list[Packed] | None:
        inputs = []
        for index in range(len(node.next_functions if rule.tensors is None else rule.tensors)):
            name = rule.tensors[index] if rule.tensors else ""
            packed = self._near(saved_by(node, name) if name else None) or self._result_before(node, index, longest)
            if packed is None:
                return None
            inputs.append(packed)
        for name in rule.constants:
            saved = getattr(node, f"_raw_saved_{name}")
            constants = [self._near(packed_of(one)) for one in (saved if isinstance(saved, tuple) else (saved,))]
            if None in constants:
                return None
            inputs += [packed for packed in constants if packed is not None]
        return inputs

    def _result_before(self, node: Node, index: int, longest: int) -> Packed | None:
        before, output = node.next_functions[index]
        if before is None:
            return None
        if before.name() != _LEAF:
            return self._result(before, output, longest)
        # Not if it was written since the block began: the op may have used it before or after.
        leaf: Tensor = before.variable
        return Held(leaf) if self._here.run.versions.get(leaf) == leaf._version else None

    def _epsilon_of(self, node: Node) -> float | None:
        weight = saved_by(node, "weight")
        return None if weight is None else self._epsilons.get(weight.peek())


def _held_anew(tensor: Tensor) -> Held:
    """An input of a block, whatever it was packed as before."""
    held = Held(tensor)
    if tensor.grad_fn is not None and type(tensor) in (Tensor, FakeTensor):
        remember(tensor.grad_fn, tensor.output_nr, held)
    return held


def _without_parameters(inputs: Sequence[Packed]) -> bool:
    return not any(isinstance(packed, Held) and isinstance(packed.peek(), nn.Parameter) for packed in inputs)


def _epsilon(module: nn.Module) -> float | None:
    """The epsilon of a normalisation with a weight; None for other modules."""
    # Not by getattr: reading a weight with a parametrization (spectral norm) computes it, and takes a step.
    if module._parameters.get("weight") is None:
        return None
    found = (vars(module).get(name) for name in ("eps", "variance_epsilon", "epsilon"))
    return next((value for value in found if isinstance(value, float)), None)


def _narrowed(tensor: Tensor, node: Node) -> Packed | None:
    """A copy with fewer bytes: a tensor cast to more bits in those it had, a repeated one once."""
    name, before = node.name(), node.next_functions[0][0]
    if before is None:
        return None
    if name == "ToCopyBackward0":
        dtype = dtype_of(before, node.next_functions[0][1])
        if tensor.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16):
            return Rebuilt("cast", Tensor.to, (Held(tensor.to(dtype)),), (tensor.dtype,))
    if name in ("UnsafeViewBackward0", "ViewBackward0") and before.name() == "CloneBackward0":
        expanded = before.next_functions[0][0]
        if expanded is not None and expanded.name() == "ExpandBackward0":
            once, repeated = expanded._saved_self_sym_sizes, shape_of(expanded)
            return Rebuilt("repeat", _repeated, (Held(_once(tensor, once, repeated)),), (repeated, tensor.shape))
    return None


def _once(tensor: Tensor, shape: tuple[int, ...], repeated: tuple[int, ...]) -> Tensor:
    """The first of all repeats: what was expanded from `shape` to `repeated`, and then copied."""
    full = tensor.view(repeated)
    shape = (1,) * (len(repeated) - len(shape)) + tuple(shape)
    for dim, (size, number) in enumerate(zip(shape, repeated, strict=True)):
        full = full.narrow(dim, 0, 1) if size != number else full
    return full.clone(memory_format=torch.contiguous_format)


def _repeated(once: Tensor, repeated: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    return once.expand(repeated).reshape(shape)


def _is_fake(tensor: Tensor) -> bool:
    # No values to compare: shapes are followed for what they will cost.
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


def _equal_bits(made: Tensor, tensor: Tensor) -> bool:
    if made.dtype != tensor.dtype or made.shape != tensor.shape:
        return False
    bits = _BITS.get(tensor.element_size())
    if bits is None or not tensor.dtype.is_floating_point:
        return torch.equal(made, tensor)
    # NaN equals NaN here, and 0 is not -0.
    return torch.equal(made.view(bits), tensor.view(bits))


def _probe() -> bool:
    """Whether this torch tells what a node saved, by the names that the rules read."""
    factor = torch.full((2,), 3.0, requires_grad=True)
    packed = []

    def pack(tensor: Tensor) -> Packed:
        packed.append(Held(tensor))
        return packed[-1]

    with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
        node: Node = (factor * factor.detach()).exp().grad_fn
    try:
        before, output = node.next_functions[0]
        remember(before, output, packed[0])
        return (
            known(before, output) is packed[0]
            and saved_by(before, "other") is packed[0]
            and packed_of(node._raw_saved_result) is packed[1]
            and before.next_functions[0][0].variable is factor
            and shape_of(before) == (2,)
            and dtype_of(before) == torch.float32
        )
    except (AttributeError, TypeError):
        return False


AVAILABLE = _probe()
"""False where autograd's nodes of this torch do not tell what they saved; all is stored then."""
