"""What torch's compiler is told of a plan: which share of a graph's results may be stored, or the results of which ops.

A compiled block is not replayed as it runs. Its forward and backward are traced into one graph, which the compiler cuts
in two, and there it is decided what is stored. `full` marks all of a block to be run again, a tier becomes a memory
budget for the compiler's own solver, and a list of ops marks their results to be stored.

NOTE on random numbers. Under a memory budget torch 2.13 draws them anew in backward where it runs a random op again, so
that gradients are wrong wherever something is dropped. It restores them in what is marked. So a model that draws has
marks in place of a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._functorch import config as partitioner
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ckpt_trainer.ops import kind_of, matches_op
from ckpt_trainer.plan import TIERS, Action, Plan, Settings

# Share of what the compiler would store by itself; 0 is the inputs of the graph. Measured with a Llama so that a tier
# stores about what it does without a compiler. Below 1 all is rebuilt that needs no matmul, which is `expensive`.
BUDGETS: Mapping[str, float] = {"expensive": 0.99, "matmul": 0.7, "half_matmul": 0.45, "attention": 0.2}

# What is marked in place of a budget. A mark is for all ops of a kind, so there is no half; the leaner is surer to fit.
MARKS: Mapping[str, str] = {
    "expensive": "matmul",
    "matmul": "matmul",
    "half_matmul": "attention",
    "attention": "attention",
}

# Their partitioner reads the budget. What others do is not known.
_HEED_BUDGET = frozenset({"inductor", "aot_eager", "aot_eager_decomp_partition"})


@dataclass(frozen=True)
class Compiled:
    """What of a model goes through the compiler.

    Args:
        blocks: Names of the blocks that are compiled: each by itself, or as parts of something larger.
        backends: Names of the compilers.
        draws: A part of the model that draws random numbers; empty if none is known.
    """

    blocks: frozenset[str] = frozenset()
    backends: tuple[str, ...] = ()
    draws: str = ""


NOT_COMPILED = Compiled()


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or any part of it goes through torch.compile."""
    return any(_is_compiled(module) for module in model.modules())


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
    return Compiled(names, backends, next(_drawing(model), ""))


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


def _drawing(model: nn.Module) -> Iterator[str]:
    """Where a model says that it draws: `layers.0.attention_dropout=0.1`. Functions that draw do not show."""
    for path, module in model.named_modules():
        held = dict(vars(module))
        if isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)) or "drop" in type(module).__name__.lower():
            held["drop"] = (
                0.5
                if isinstance(module, nn.RReLU)
                else next((held[name] for name in ("p", "drop_prob") if name in held), 0)
            )
        config = vars(held["config"]) if hasattr(held.get("config"), "__dict__") else {}
        for name, value in (*held.items(), *config.items()):
            if isinstance(value, float) and value > 0 and any(word in name for word in _RANDOM_WORDS):
                yield f"{path}.{name}={value:g}".lstrip(".")


_RANDOM_WORDS = ("drop", "jitter", "noise")


def is_tier(save: Sequence[str]) -> bool:
    """Whether this is a tier, for which there is a budget, and not a list."""
    return len(save) == 1 and save[0] in TIERS


def budget_of(plan: Plan, settings: Settings, compiled: Compiled) -> float | None:
    """The memory budget of the graphs of a plan; None where no block needs one or it would give wrong gradients."""
    saves = [plan[name].save for name in compiled.blocks if plan[name].kind == "selective"]
    if not saves or compiled.draws:
        return None
    if settings.compile_budget is not None:
        return settings.compile_budget
    # There is one for all graphs. The smallest: what was asked to be lean has to fit.
    return min((BUDGETS[save[0]] for save in saves if is_tier(save)), default=None)


@contextmanager
def memory_budget(budget: float | None) -> Iterator[None]:
    """Whatever is compiled meanwhile stores this share at most; None leaves it as it is."""
    if budget is None:
        yield
        return
    with partitioner.patch(activation_memory_budget=budget):
        yield


def refuse_budget(plan: Plan, settings: Settings, compiled: Compiled) -> None:
    """Raise ValueError where a budget that the user named would give wrong gradients."""
    is_selective = any(plan[name].kind == "selective" for name in compiled.blocks)
    if settings.compile_budget is not None and is_selective and compiled.draws:
        raise ValueError(
            f"checkpointing_compile_budget={settings.compile_budget}: the model draws random numbers "
            f"({compiled.draws}), which torch draws anew in backward under a memory budget, so that gradients would be "
            "wrong. Set that to 0.0, or remove the budget: a tier of checkpointing_save does without."
        )


def warnings(plan: Plan, settings: Settings, compiled: Compiled) -> Iterator[str]:
    """What of a plan a compiler does not do, or does in another way."""
    actions = [plan[name] for name in compiled.blocks]
    saves = {action.save for action in actions if action.kind == "selective"}
    lists, tiers = {",".join(s) for s in saves if not is_tier(s)}, {s[0] for s in saves if is_tier(s)}
    budget = budget_of(plan, settings, compiled)
    if settings.compile_budget is not None and budget is None:
        yield (
            "checkpointing_compile_budget has no effect: it is for blocks in mode 'selective' that go through "
            "torch.compile, and there are none."
        )
    if settings.compile_budget is not None and lists:
        yield f"checkpointing_compile_budget takes the place of what is listed: {'; '.join(sorted(lists))}."
    if settings.compile_budget is None and budget is not None and len(tiers) > 1:
        yield (
            f"{', '.join(sorted(tiers, key=TIERS.index))} were asked for, and a compiled model has one memory budget: "
            f"{budget:g}, of the leanest. Set checkpointing_compile_budget."
        )
    deaf = [repr(name) for name in compiled.backends if name not in _HEED_BUDGET]
    if budget is not None and deaf:
        yield (
            f"the model is compiled by {', '.join(deaf)}, which is not known to heed a memory budget, so that selective "
            f"may do nothing. {', '.join(sorted(_HEED_BUDGET))} are."
        )
    moved = {action.kind for action in actions if action.place != "device"}
    if moved:
        words = {"keep": "kept", "recompute": "recomputed", "selective": "selective"}
        done = " or ".join(words[kind] for kind in sorted(moved))
        yield (
            "the model is compiled, which offload does not reach: its tensors stay on the device, and blocks are "
            f"{done} as without it."
        )
    yield from _without_effect(actions, settings)


def _without_effect(actions: Sequence[Action], settings: Settings) -> Iterator[str]:
    if not any(action.kind == "recompute" for action in actions):
        return
    idle = {
        f"checkpointing_segment={settings.segment!r}": settings.segment != 1,
        "use_reentrant=True": settings.use_reentrant,
    }
    for name in (name for name, is_idle in idle.items() if is_idle):
        yield f"the model is compiled, so that {name} has no effect: its blocks are recomputed one by one."


def first_line(plan: Plan, settings: Settings, compiled: Compiled) -> str | None:
    """How `selective` is done in a compiled model; None where nothing is."""
    saves = {plan[name].save for name in compiled.blocks if plan[name].kind == "selective"}
    if not saves:
        return None
    said = []
    budget = budget_of(plan, settings, compiled)
    if budget is not None:
        others = sum(plan[name].kind != "selective" for name in plan.actions)
        also = f", and so for {others} blocks that are not selective" if others else ""
        said.append(f"activation_memory_budget {budget:g} while training, which holds for whole graphs{also}")
    marks = {_ops(save) for save in saves if budget is None or (not is_tier(save) and settings.compile_budget is None)}
    if marks:
        said.append(f"results of {'; '.join(sorted(marks))} are stored (names of modules mean nothing to a compiler)")
    if compiled.draws and any(map(is_tier, saves)):
        said.append(f"no memory budget, under which {compiled.draws} would draw other numbers in backward")
    by = ", ".join(compiled.backends) or "a compiler that does not tell its name"
    return f"selective, compiled by {by}: {'; '.join(said)}"


@dataclass(frozen=True)
class Told:
    """What a compiler is told of one block; call `run` in place of its forward, as it is traced.

    Args:
        budget: The memory budget that does for this block, as text; empty to mark the block to be run again. Text, since
            that is what a compiler compares before it takes what it has compiled for another value.
        ops: Names of ops whose results are then stored, separated by commas.
        options: More keyword arguments for `torch.utils.checkpoint.checkpoint`.
        context_fn: Marks those ops.
    """

    budget: str = ""
    ops: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    context_fn: Callable[[], Any] | None = None

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `forward(*args, **kwargs)`."""
        if self.budget or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The compiler takes care of random numbers, and allows none of the bookkeeping of `recompute`.
        options = {"use_reentrant": False, **self.options}
        if self.ops:
            options["context_fn"] = self.context_fn
        return checkpoint(forward, *args, **options, **kwargs)


# All of a block is run again.
MARKED = Told()


def told(plan: Plan, settings: Settings, compiled: Compiled, action: Action) -> Told:
    """What a compiler is told of a block with this action."""
    if action.kind != "selective":
        return Told(options=settings.checkpoint_options)
    budget = budget_of(plan, settings, compiled)
    # A budget that the user named stands for lists, too.
    if budget is not None and (settings.compile_budget is not None or is_tier(action.save)):
        return Told(f"{budget}")
    ops = _ops(action.save)
    return Told(ops=ops, options=settings.checkpoint_options, context_fn=_marking(ops))


def _ops(save: Sequence[str]) -> str:
    return MARKS[save[0]] if is_tier(save) else ",".join(save)


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
