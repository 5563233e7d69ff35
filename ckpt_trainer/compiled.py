"""What torch's compiler is told of a plan: which blocks are run again in backward, and the results of which ops are stored.

A compiled block is not replayed as it runs. Its forward and backward are traced into one graph, which the compiler cuts
in two, and there it is decided what is stored. `full` marks all of a block to be run again; a tier or a list of ops marks
their results to be stored. A memory budget that the user names stands in place of marks, for the compiler's own solver.

NOTE on random numbers. The compiler restores them in what is marked. Under a memory budget torch 2.13 draws them anew in
backward where it runs a random op again, so that gradients are wrong. So no budget is set that was not asked for, and
one is refused where a model is seen to draw.

NOTE on graph breaks. Where a compiler gives up on a graph within a block, torch's checkpoint would run as in a model that
is not compiled, without the care that `recompute` takes: statistics would be updated twice. `traced_or_python` keeps the
compiler from starting anew with code of ours, so that this shows when a block runs, and `recompute` does the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.eval_frame import skip_code
from torch._functorch import config as partitioner
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ckpt_trainer.arguments import is_cache
from ckpt_trainer.drawing import drawing
from ckpt_trainer.ops import kind_of, matches_op, names_an_op, nearest_names, registered_names
from ckpt_trainer.plan import TIERS, Action, Plan, Settings

# What is stored for a tier. A mark is for all ops of a kind, so there is no half; the leaner is surer to fit. What needs
# no matmul is run again in any case, which is `expensive`.
MARKS: Mapping[str, str] = {
    "expensive": "matmul",
    "matmul": "matmul",
    "half_matmul": "attention",
    "attention": "attention",
}

# Their partitioner reads marks and the budget. What others do is not known.
_HEEDING = frozenset({"inductor", "aot_eager", "aot_eager_decomp_partition"})

# They run the ops of a graph one by one, what is marked included, and restore no random numbers and no statistics there.
_RUNNING_AS_IS = frozenset({"eager", "eager_noexcept", "eager_debug", "pre_dispatch_eager"})


@dataclass(frozen=True)
class Compiled:
    """What of a model goes through the compiler.

    Args:
        blocks: Names of the blocks that are compiled: each by itself, or as parts of something larger.
        backends: Names of the compilers.
    """

    blocks: frozenset[str] = frozenset()
    backends: tuple[str, ...] = ()

    @property
    def runs_as_is(self) -> bool:
        """Whether nothing may be marked, so that blocks are left to Python."""
        return any(name in _RUNNING_AS_IS for name in self.backends)

    @property
    def by(self) -> str:
        """Who compiles."""
        return ", ".join(self.backends) or "a compiler that does not tell its name"


NOT_COMPILED = Compiled()


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or any part of it goes through torch.compile."""
    return any(_is_compiled(module) for module in model.modules())


def is_eager(model: nn.Module) -> bool:
    """Whether ops run one by one: not where they are compiled, by the user or within flex attention."""
    return not is_compiled(model) and not any(
        "flex" in str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
        for module in model.modules()
    )


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def compiled_part(model: nn.Module, blocks: Iterable[tuple[str, nn.Module]]) -> Compiled:
    """What the compiler sees of a model; not a block within which something is compiled.

    Args:
        blocks: Name and module of each block.
    """
    roots = [module for module in model.modules() if _is_compiled(module)]
    inside = {id(module) for root in roots for module in root.modules()}
    names = frozenset(name for name, module in blocks if id(module) in inside)
    backends = tuple(sorted({name for root in roots if (name := _backend_of(root)) is not None}))
    return Compiled(names, backends)


def _backend_of(root: nn.Module) -> str | None:
    """The name of a compiler; None where torch does not tell."""
    context = getattr(root, "dynamo_ctx", None)
    if context is None and isinstance(root._compiled_call_impl, FunctionType):
        cells = (cell.cell_contents for cell in root._compiled_call_impl.__closure__ or ())
        context = next((value for value in cells if hasattr(value, "callback")), None)
    backend: Any = getattr(context, "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return getattr(backend, "compiler_name", None)


def heeds_marks(compiled: Compiled) -> bool:
    """Whether it is known of all compilers that they store what is marked, and only that."""
    return bool(compiled.backends) and _HEEDING.issuperset(compiled.backends)


def is_tier(save: Sequence[str]) -> bool:
    """Whether this is a tier and not a list."""
    return len(save) == 1 and save[0] in TIERS


def budget_of(plan: Plan, settings: Settings, compiled: Compiled) -> float | None:
    """The memory budget of the graphs of a plan; None where the user named none or no block needs it."""
    return settings.compile_budget if _selective(plan, compiled) and not compiled.runs_as_is else None


def _selective(plan: Plan, compiled: Compiled) -> list[str]:
    return [name for name in plan.actions if name in compiled.blocks and plan[name].kind == "selective"]


@contextmanager
def compiler_set(budget: float | None, compiled: Compiled) -> Iterator[None]:
    """Whatever is compiled meanwhile stores this share at most; None leaves it as it is."""
    with ExitStack() as stack:
        if budget is not None:
            stack.enter_context(partitioner.patch(activation_memory_budget=budget))
        if _breaks_nested(compiled):
            stack.enter_context(dynamo.patch(nested_graph_breaks=False))
        yield


def _breaks_nested(compiled: Compiled) -> bool:
    # With these a compiler goes on within code of ours.
    return bool(compiled.blocks) and bool(getattr(dynamo, "nested_graph_breaks", False))


def refuse(model: nn.Module, plan: Plan, settings: Settings, compiled: Compiled) -> None:
    """Raise ValueError where a compiler cannot do what was asked for, or would give wrong gradients."""
    again = [name for name in compiled.blocks if plan[name].kind != "keep"]
    if again and settings.checkpoint_options.get("context_fn"):
        raise ValueError(
            f"context_fn is given, and {len(again)} blocks are compiled ({compiled.by}), where a function of yours cannot "
            "be called. Remove it, and name what is to be stored: checkpointing_mode='selective' and "
            "checkpointing_save; or do not compile these blocks."
        )
    selective = _selective(plan, compiled)
    if budget_of(plan, settings, compiled) is not None and (drawn := drawing(model)):
        more = f"; and {len(drawn) - 3} more" if len(drawn) > 3 else ""
        raise ValueError(
            f"checkpointing_compile_budget={settings.compile_budget}: the model draws random numbers "
            f"({'; '.join(drawn[:3])}{more}), which torch draws anew in backward under a memory budget, so that "
            "gradients would be wrong. Remove the budget: what checkpointing_save says does without one."
        )
    for save in dict.fromkeys(plan[name].save for name in selective if settings.compile_budget is None):
        if not is_tier(save) and not compiled.runs_as_is and not _ops(save):
            raise ValueError(
                f"selective is to store {_unknown(save)}, and no op that torch knows is called so. In a compiled model "
                "only names of ops count, and those of modules do not."
            )


def _unknown(save: Sequence[str]) -> str:
    """The entries of a list that name no op, each with what is nearest."""
    return ", ".join(f"{entry!r}{_nearest(entry)}" for entry in save if not names_an_op(entry))


def _nearest(entry: str) -> str:
    near = nearest_names(entry, registered_names())
    return f" (nearest: {', '.join(near)})" if near else ""


def warnings(plan: Plan, settings: Settings, compiled: Compiled) -> Iterator[str]:
    """What of a plan a compiler does not do, or does in another way."""
    if settings.compile_budget is not None and budget_of(plan, settings, compiled) is None:
        yield (
            "checkpointing_compile_budget has no effect: it is for blocks in mode 'selective' that go through "
            "torch.compile, and there are none."
        )
    actions = [plan[name] for name in compiled.blocks]
    if compiled.runs_as_is:
        if any(action.kind != "keep" for action in actions):
            yield (
                f"the model is compiled by {compiled.by}, which would draw other random numbers where it runs a block "
                f"again: blocks are left to Python, and recomputed there. {', '.join(sorted(_HEEDING))} compile them."
            )
        return
    selective = _selective(plan, compiled)
    lists = dict.fromkeys(save for name in selective if not is_tier(save := plan[name].save))
    if settings.compile_budget is not None and lists:
        yield f"checkpointing_compile_budget takes the place of what is listed: {'; '.join(map(','.join, lists))}."
    elif unknown := [_unknown(save) for save in lists if _unknown(save)]:
        yield (
            f"selective does not store {', '.join(unknown)}: no op that torch knows is called so, and in a compiled model "
            "only names of ops count, and those of modules do not."
        )
    deaf = [repr(name) for name in compiled.backends if name not in _HEEDING]
    if deaf and any(action.kind != "keep" for action in actions):
        yield (
            f"the model is compiled by {', '.join(deaf)}, which is not known to heed what is marked to be run again: "
            "everything may be stored, and where the model draws random numbers, gradients may be wrong. "
            f"{', '.join(sorted(_HEEDING))} are known."
        )
    moved = {action.kind for action in actions if action.place != "device"}
    if moved:
        words = {"keep": "kept", "recompute": "recomputed", "selective": "selective"}
        done = " or ".join(words[kind] for kind in sorted(moved))
        yield (
            "the model is compiled, which offload does not reach: its tensors stay on the device, and blocks are "
            f"{done} as without it."
        )
    yield from _without_effect(actions, settings, compiled)


def _without_effect(actions: Sequence[Action], settings: Settings, compiled: Compiled) -> Iterator[str]:
    if _breaks_nested(compiled):
        yield "torch._dynamo.config.nested_graph_breaks is off in each step: broken blocks are replayed by this package."
    if any(action.kind != "keep" for action in actions) and settings.checkpoint_options.get("debug"):
        yield "the model is compiled, so that debug=True has no effect: a compiler checks by itself what it runs again."
    if not any(action.kind == "recompute" for action in actions):
        return
    idle = {
        f"checkpointing_segment={settings.segment!r}": settings.segment != 1,
        "use_reentrant=True": settings.use_reentrant,
    }
    for name in (name for name, is_idle in idle.items() if is_idle):
        yield f"the model is compiled, so that {name} has no effect: its blocks are recomputed one by one."


def first_line(plan: Plan, settings: Settings, compiled: Compiled) -> str | None:
    """How a plan is carried out in a compiled model; None where there is nothing to do."""
    if compiled.runs_as_is:
        return None
    kinds = Counter(plan[name].kind for name in compiled.blocks)
    said = [f"{kinds['recompute']} blocks marked to be run again in backward"] if kinds["recompute"] else []
    selective, budget = _selective(plan, compiled), budget_of(plan, settings, compiled)
    if budget is not None:
        others = len(plan.actions) - len(selective)
        also = f", and so for {others} blocks that are not selective" if others else ""
        said.append(f"activation_memory_budget {budget:g} while training, which holds for whole graphs{also}")
    elif selective:
        marks = dict.fromkeys(_ops(plan[name].save) for name in selective)
        said.append(f"results of {'; '.join(marks)} stored in {len(selective)} blocks, all else run again")
    if not said:
        return None
    return f"compiled by {compiled.by}: {'; '.join(said)}. What a compiler runs again is not counted"


def as_data(plan: Plan, settings: Settings, compiled: Compiled) -> dict[str, Any] | None:
    """For the report; None where no block is compiled."""
    if not compiled.blocks:
        return None
    return {
        "blocks": len(compiled.blocks),
        "backends": list(compiled.backends),
        "memory_budget": budget_of(plan, settings, compiled),
    }


def explain_left(name: str) -> str:
    """A block that should be compiled ran without."""
    return (
        f"the compiler broke the graph within block {name!r}, or was off: this block, and others of which that is so, run "
        "and are recomputed as in a model that is not compiled. TORCH_LOGS=graph_breaks shows where. To compile what can "
        f'be, without recomputing: checkpointing_modules={{"{name}": "none"}}.'
    )


_Run = TypeVar("_Run", bound=Callable[..., Any])


def traced_or_python(run: _Run) -> _Run:
    """A function that is compiled as part of what calls it, or not at all."""
    skip_code(run.__code__)
    return run


@dataclass(frozen=True)
class Told:
    """What a compiler is told of one block; call `run` in place of its forward, as it is traced.

    Args:
        budget: The memory budget that does for this block, as text; empty to mark the block to be run again. Text, since
            that is what a compiler compares before it takes what it has compiled for another value.
        ops: Names of ops whose results are then stored, separated by commas.
        options: More keyword arguments for `torch.utils.checkpoint.checkpoint`.
        context_fn: Marks those ops.
        left: Called where a block that should be compiled runs without; None where it should not.
        runs_as_is: Leave the block to Python.
    """

    budget: str = ""
    ops: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    context_fn: Callable[[], Any] | None = None
    left: Callable[[], None] | None = None
    runs_as_is: bool = False

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `forward(*args, **kwargs)`."""
        if self.budget or not torch.is_grad_enabled() or any(is_cache(value) for value in (*args, *kwargs.values())):
            return forward(*args, **kwargs)
        if self.runs_as_is:
            torch._dynamo.graph_break(
                msg="blocks are recomputed without this backend, which restores no random numbers"
            )
        # The compiler takes care of random numbers, and allows none of the bookkeeping of `recompute`.
        options = {"use_reentrant": False, **self.options}
        if self.ops:
            options["context_fn"] = self.context_fn
        return checkpoint(forward, *args, **options, **kwargs)

    def run_untraced(self, run: Callable[..., Any], *args: Any) -> Any:
        """Call `run(*args)`, which no compiler looks into if the block should be compiled."""
        return run(*args) if self.left is None else _without_compiler(self.left, run, *args)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _without_compiler(left: Callable[[], None], run: Callable[..., Any], *args: Any) -> Any:
    left()
    return run(*args)


def _said() -> None:
    """A warning at the start told of it."""


# All of a block is run again.
MARKED = Told()


def told(plan: Plan, settings: Settings, compiled: Compiled, left: Callable[[str], None], name: str) -> Told:
    """What a compiler is told of a block.

    Args:
        left: Called with its name where it should be compiled and runs without.
    """
    save = plan[name].save if plan[name].kind == "selective" else ()
    budget = budget_of(plan, settings, compiled) if save else None
    ops = _ops(save) if budget is None else ""
    return Told(
        budget="" if budget is None else f"{budget}",
        ops=ops,
        options={
            key: value for key, value in settings.checkpoint_options.items() if key not in ("debug", "context_fn")
        },
        context_fn=_marking(ops) if ops else None,
        left=(_said if compiled.runs_as_is else partial(left, name)) if name in compiled.blocks else None,
        runs_as_is=compiled.runs_as_is,
    )


def _ops(save: Sequence[str]) -> str:
    return MARKS[save[0]] if is_tier(save) else ",".join(entry for entry in save if names_an_op(entry))


class _StoredOps:
    """Asked by torch about each op of a block as it is traced: is its result stored?

    Args:
        save: Names of ops, and words of `ops.WORDS`, as in `Action.save`; names of modules mean nothing here.
    """

    def __init__(self, save: Sequence[str]) -> None:
        self._save = save

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        # What a router chose, and what came from other processes, is stored in any case.
        if kind_of(op) in ("choice", "collective") or any(matches_op(entry, op) for entry in self._save):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _marking(ops: str) -> Callable[[], Any]:
    """For `context_fn` of torch's checkpoint. The same each time: a compiler that gets another one compiles anew."""
    return partial(create_selective_checkpoint_contexts, _StoredOps(ops.split(",")))
