"""Ops as a dispatch mode sees them: how they are written, what kind of work they do, and which place in a block asks.

What is done about them is decided elsewhere. An op is an `OpOverload` or a higher-order operator.

NOTE on places. A count of calls does not tell two matmuls apart for long: a branch not taken, an expert without tokens
or a cache filled once moves every count behind it. The line of code that asks does. So a place is the chain of calls
from the op up to the forward of the block, with torch's own frames left out, for hooks that come and go change those.
A loop over a list of modules is one place, as it should be for experts; the modules of a `Sequential` are told apart by
their turn. Reading frames takes 1-2 us for each op that is asked about; hooks that name the running module would take
about as much for every module.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_iter

from ckpt_trainer.memory import storages_of

Kind = Literal["attention", "matmul", "batched", "choice", "collective", "copy", "unsafe view"]
Place = tuple[str | int, ...]

# Words in a list that stand for a kind of ops.
WORDS = ("attention", "matmul", "half_matmul")

# Weights of experts, or attention that is composed of matmuls; only the arguments tell.
_BATCHED = frozenset({"bmm", "baddbmm"})
# What a router chooses. Another choice in a replay than in the forward would send tokens to other experts.
_CHOICES = frozenset({"topk", "sort", "argsort", "argmax", "multinomial"})
# Not all_gather: its result is the largest tensor there is, and often a weight.
_COLLECTIVES = frozenset({"all_reduce", "reduce_scatter_tensor", "all_to_all_single"})

# Ops that leave a weight the weight it is.
_WEIGHT_VIEW = re.compile(
    r"(Unsafe)?(Alias|Clone|Expand|Index|Permute|Reshape|ReshapeAlias|Select|Slice|Split|Squeeze|T|ToCopy|Transpose|Unbind"
    r"|Unsqueeze|View)Backward\d+"
)

# Views that autograd takes for results.
_UNSAFE_VIEWS = frozenset({"_unsafe_view", "unsafe_split", "unsafe_split_with_sizes"})

_BACKWARD = re.compile(r"backward|bwd|(^|_)grad(_|$)|double_back")
_ATTENTION_WORD = re.compile(
    r"attention|attn|flash|sdpa|fmha|(^|_)mha(_|$)|(^|_)(scan|ssd|ssm|wkv\d*|gla|delta_rule|gated_delta|retention)(_|$)"
)
_FORWARD_WORD = re.compile(r"(^|_)(fwd|forward|varlen|func)(_|$)")
_MATMUL_WORD = re.compile(
    r"(^|_)(mm|addmm|bmm|addbmm|gemm|mv|addmv|gemv|matmul|linear|bilinear|trilinear|convolution|conv_tbc)(_|$)"
)
_NOT_A_MATMUL = re.compile(
    r"quantize|dequant|(^|_)(pack|prepack|unpack|repack|convert|shuffle|search|combination|reorder)(_|$)"
)

_TORCH = str(Path(torch.__file__).parent) + os.sep
_PACKAGE = str(Path(__file__).parent) + os.sep
_SEQUENTIAL = nn.Sequential.forward.__code__


def name_of(op: Any) -> str:
    """The name of an op as a user would write it: `mm`, or `namespace::name` outside of aten."""
    namespace, name, _ = _parts(op)
    return name if namespace == "aten" else f"{namespace}::{name}"


def matches_op(entry: str, op: Any) -> bool:
    """Whether an entry of a list means this op.

    Args:
        entry: A word of `WORDS`, a name (`mm`, `aten.mm`, `aten::mm`, `aten.mm.default`, `namespace::name`), or a glob
            over names (`*softmax*`).
        op: The op.
    """
    if entry in WORDS:
        kind = kind_of(op)
        return kind == "attention" or (entry != "attention" and kind in ("matmul", "batched"))
    return _is_written(entry.replace("::", "."), *_parts(op))


def _is_written(entry: str, namespace: str, name: str, overload: str) -> bool:
    spellings = name, f"{namespace}.{name}", f"{namespace}.{name}.{overload or 'default'}"
    return any(fnmatchcase(spelling, entry) for spelling in spellings)


def names_an_op(entry: str) -> bool:
    """Whether an entry of a list means any op that is registered with torch."""
    return entry in WORDS or any(_is_written(entry.replace("::", "."), *parts) for parts in _registered())


def registered_names() -> list[str]:
    """Names of all ops of aten that are registered with torch."""
    return [name for namespace, name, _ in _registered() if namespace == "aten"]


def _registered() -> Iterator[tuple[str, str, str]]:
    """Namespace, name and overload of each op there is; others may be registered later."""
    for known in torch._C._dispatch_get_all_op_names():
        namespace, _, name = known.partition("::")
        yield namespace, *name.partition(".")[::2]
    for name in torch._ops._higher_order_ops:
        yield "higher_order", name, ""


def nearest_names(entry: str, names: list[str]) -> list[str]:
    """Up to three of the names that look most like an entry that matched nothing, best first."""
    bare = re.sub(r"^(aten|torch)(\.|::)|\.default$|[*?]", "", entry)
    if _ATTENTION_WORD.search(bare):
        return ["attention"]
    if _MATMUL_WORD.search(bare):
        return ["matmul"]
    return get_close_matches(bare, sorted(set(names)), n=3, cutoff=0.7)


@cache
def kind_of(op: Any) -> Kind | None:
    """What kind of work an op does; None for the many that are cheap, change an argument, or run in backward."""
    namespace, name, _ = _parts(op)
    if _BACKWARD.search(name):
        return None
    if namespace == "aten":
        return _kind_in_aten(name)
    if "c10d_functional" in namespace:
        return "collective" if name in _COLLECTIVES else None
    # Kernels that are loaded by name have a namespace that says what they are, and ops named `fwd`.
    if _ATTENTION_WORD.search(name) or (_ATTENTION_WORD.search(namespace) and _FORWARD_WORD.search(name)):
        return "attention"
    return "matmul" if _is_matmul(name) else None


def _kind_in_aten(name: str) -> Kind | None:
    if "attention" in name and not name.endswith("_"):
        return "attention"
    if name in _BATCHED:
        return "batched"
    if name in _CHOICES:
        return "choice"
    if name in _UNSAFE_VIEWS:
        return "unsafe view"
    if _is_matmul(name):
        return "matmul"
    return "copy" if name == "_to_copy" else None


def _is_matmul(name: str) -> bool:
    return bool(_MATMUL_WORD.search(name)) and not _NOT_A_MATMUL.search(name)


@cache
def written_arguments(op: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that an op writes to or returns a view of."""
    schema = getattr(op, "_schema", None)
    if schema is None:
        return ()
    return tuple((i, argument.name) for i, argument in enumerate(schema.arguments) if argument.alias_info is not None)


@cache
def writes(op: Any) -> bool:
    """Whether an op may change an argument in place."""
    schema = getattr(op, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def written_by(op: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that a call of an op writes to, or returns views of."""
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in written_arguments(op)]
    return [value for value in values if value is not None]


@cache
def _may_draw(op: Any) -> bool:
    """Whether an op may draw random numbers; of a custom op nobody can tell."""
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ()) or _parts(op)[0] != "aten"


def place_of(forward: Any) -> Place:
    """The chain of calls from here up to the frame that runs the code `forward`, or to the one that called for it.

    The first item is 1 if a `Sequential` is on the way, so that the turn matters too.
    """
    sites: list[str | int] = [0]
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        whose = _whose(code.co_filename)
        if whose == "theirs":
            sites += (code.co_filename, code.co_firstlineno, frame.f_lasti)
        elif whose == "caller":
            break
        elif code is _SEQUENTIAL:
            sites[0] = 1
        if code is forward:
            break
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(sites)


@cache
def _whose(filename: str) -> Literal["torch", "ours", "caller", "theirs"]:
    if filename.startswith(_TORCH):
        return "torch"
    if not filename.startswith(_PACKAGE):
        return "theirs"
    # Blocks within blocks: the modes of the outer one are called from those of the inner one.
    return "ours" if Path(filename).stem in ("ops", "stored_results") else "caller"


@cache
def _parts(op: Any) -> tuple[str, str, str]:
    """Namespace, name and overload of an op."""
    schema = getattr(op, "_schema", None)
    if schema is None:
        return "higher_order", str(op.name()), ""
    namespace, name = schema.name.split("::", maxsplit=1)
    return namespace, name, str(schema.overload_name)


def is_weight(operand: Tensor) -> bool:
    """Whether an operand is a parameter, or one seen through views and casts."""
    node = operand.grad_fn
    while node is not None:
        if node.name() == "torch::autograd::AccumulateGrad":
            return True
        inputs = [following for following, _ in node.next_functions if following is not None]
        if len(inputs) != 1 or not _WEIGHT_VIEW.fullmatch(node.name()):
            return False
        node = inputs[0]
    # A frozen weight is no result of anything that needs a gradient.
    return True


def device_drawn_from(op: Any, args: Any, kwargs: Any) -> torch.device | None:
    """The device whose generator an op may draw from."""
    if not _may_draw(op):
        return None
    for leaf in tree_iter((args, kwargs)):
        if isinstance(leaf, Tensor):
            return None if isinstance(leaf, FakeTensor) or leaf.device.type == "meta" else leaf.device
    # One that makes a tensor of nothing, such as `rand`; a dispatch mode is told the device.
    device = torch.device(kwargs.get("device") or "cpu")
    return None if device.type == "meta" else device


def returns_argument(op: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether a result is, views or shares memory with an argument, or may."""
    if written_by(op, args, kwargs):
        return True
    # Of aten's own only few do so without saying so, and matmuls do not.
    if kind_of(op) in ("matmul", "batched") and _parts(op)[0] == "aten":
        return False
    given = {
        storage._cdata
        for leaf in tree_iter((args, kwargs))
        if isinstance(leaf, Tensor)
        for storage in storages_of(leaf)
    }
    return any(storage._cdata in given for tensor in tensors_in(out) for storage in storages_of(tensor))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of what an op returned."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (tuple, list)) else []
