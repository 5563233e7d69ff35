"""Mode `auto`: which plan a micro-batch gets, by its size and what is known of others.

`Planner` decides and remembers; what it is told was measured elsewhere, and what it decides is carried out elsewhere. A
size of which nothing is known runs on the leanest plan and is measured. A smaller one gets a plan from what is known of
larger ones; a larger one is kept as a whole where even the most it can come to fits. Each plan that is tight is measured
when it is first used, and made anew with what that showed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt_trainer.costs import Link, Sample, between, live_costs
from ckpt_trainer.extrapolation import Probes, extrapolated_probes
from ckpt_trainer.measured import StepBytes
from ckpt_trainer.plan import DEFAULT_SAVE, RECOMPUTE, Plan, SizePlan
from ckpt_trainer.sizes import Size, bucket_of, covers, growth, share, terms
from ckpt_trainer.solver import Solution, solve
from ckpt_trainer.step_costs import BudgetTooSmall, Peak, StepCosts, peak_of, phase_peaks

# A plan is measured when it is first used only where its peak is above this share of the budget.
_TIGHT = 0.8
# How often the plan of one size is made anew because a step showed something else than was expected.
_ROUNDS = 4
# Sizes whose plan is remembered; all are looked up anew after that many.
_REMEMBERED = 10_000
# By how much of the budget a measured peak may differ from the predicted one before that is worth a new plan.
_SAME = 0.002
Key = tuple[Size, bool]


@dataclass
class Choice:
    """The plan of a size.

    Args:
        size: The size it was made for, which covers that of the micro-batch.
        gradients_are_there: Whether it is for a micro-batch that is not the first of its step.
        plan: What is done to each block.
        budget_bytes: What it was made for.
        lost_bytes: By how much that is below the budget, since steps needed more than was expected.
        solution: What was chosen and what it comes to; None for the leanest plan, of which nothing is known.
        step_bytes: The predicted peak of the micro-batch itself, the step of the optimizer left out.
        measures: Whether the next micro-batch that runs on it is to be measured.
        least: Where even the leanest plan does not fit: why.
        measured_bytes: The peak that was measured.
        is_told: Whether it is in the log.
        floor_bytes: Weights, gradients and the state of the optimizer, where no plan fits.
    """

    size: Size
    gradients_are_there: bool
    plan: Plan
    budget_bytes: int
    lost_bytes: int = 0
    solution: Solution | None = None
    step_bytes: int = 0
    measures: bool = False
    least: BudgetTooSmall | None = None
    measured_bytes: int | None = None
    is_told: bool = False
    floor_bytes: int = 0

    @property
    def moves(self) -> bool:
        """Whether anything leaves the device."""
        return any(action.place != "device" for action in self.plan.actions.values())

    @property
    def peak(self) -> Peak | None:
        """The predicted peak."""
        return self.solution.peak if self.solution is not None else self.least.least if self.least else None


@dataclass
class _Known:
    """What is remembered of one size.

    Args:
        sample: What was measured.
        costs: What follows from it.
    """

    sample: Sample
    costs: StepCosts | None = None


@dataclass
class _Limits:
    """What was learnt of one size by running it.

    Args:
        offset: Bytes that are taken off the budget, since there was less memory than that.
        error: By how many bytes more was measured than predicted, where nothing else tells why.
        in_flight: Bytes that copies hold beyond what was expected of them, in plans that have any.
        rounds: How often its plan was made anew.
    """

    offset: int = 0
    error: int = 0
    in_flight: int = 0
    rounds: int = 0


@dataclass
class Planner:
    """Decides on the plan of each micro-batch.

    Args:
        names: All blocks, in forward order.
        leanest: The plan that stores least, of the blocks that are free to choose for; the others have their action.
        budget: Asked for the bytes that a step may take, whenever a plan is made.
        link: Where what blocks store can go.
        given: Plans of sizes that were made before; with them nothing is measured and nothing else is chosen.

    Attributes:
        is_ready: The optimizer has made a step, so that what it needs is known; until then each size is measured.
    """

    names: Sequence[str]
    leanest: Plan
    budget: Callable[[], int]
    link: Link = field(default_factory=Link)
    given: Sequence[SizePlan] = ()
    is_ready: bool = False
    state_bytes: int = 0
    optimizer_bytes: int = 0
    lost_bytes: int = 0
    _known: dict[Key, _Known] = field(default_factory=dict)
    _choices: dict[Key, Choice] = field(default_factory=dict)
    _planned: dict[Key, Choice] = field(default_factory=dict)
    _newest: dict[Key, Choice] = field(default_factory=dict)
    _limits: dict[Key, _Limits] = field(default_factory=dict)

    def choose(self, size: Size, gradients_are_there: bool) -> Choice:
        """The plan of a micro-batch of this size."""
        key = size, gradients_are_there
        choice = self._choices.get(key)
        if choice is None:
            if len(self._choices) >= _REMEMBERED:
                self._choices.clear()
            choice = self._choices[key] = self._decide(key)
        return choice

    def samples(self) -> Mapping[Key, Sample]:
        """What was measured of which size."""
        return {key: known.sample for key, known in self._known.items()}

    def probes_of(self, size: Size) -> Probes:
        """What probes showed of blocks in micro-batches of this size, whether gradients were there or not."""
        found = (self._known[size, there].sample.probes for there in (False, True) if (size, there) in self._known)
        return next((probes for probes in found if probes), {})

    def probes_like(self, size: Size, gradients_are_there: bool, step: StepBytes) -> Probes:
        """What probes would show of a micro-batch that was just measured; empty where they have to be made."""
        its = {other: own.sample for (other, there), own in self._known.items() if there == gradients_are_there}
        known = self.probes_of(size)
        return known or extrapolated_probes(size, step, {other: own for other, own in its.items() if own.probes})

    def choices(self) -> list[Choice]:
        """The plans that there are, in the order in which they were made."""
        return list(self._planned.values())

    def newest(self) -> list[Choice]:
        """The last plan of each size that had one, those included that are to be made anew."""
        return list(self._newest.values())

    def plan(self) -> Plan:
        """All plans in one, to be saved and given again."""
        found = [
            SizePlan(own.size, own.gradients_are_there, own.plan.actions) for own in self.choices() if own.solution
        ]
        return Plan(self.leanest.actions, tuple(found) or tuple(self.given))

    def learn(self, size: Size, sample: Sample) -> None:
        """A micro-batch ran on the leanest plan and was measured."""
        known = self._known.get((size, sample.gradients_are_there))
        if known is not None:
            sample = replace(sample, seen=known.sample.seen)
        self._known[size, sample.gradients_are_there] = _Known(sample)
        self._forget_choices()

    def learn_optimizer(self, state_bytes: int, temporary_bytes: int) -> None:
        """The optimizer made a step."""
        if (state_bytes, temporary_bytes, True) != (self.state_bytes, self.optimizer_bytes, self.is_ready):
            self.state_bytes, self.optimizer_bytes, self.is_ready = state_bytes, temporary_bytes, True
            self._forget_choices()

    def learn_fragments(self, lost_bytes: int) -> None:
        """Bytes of the device that could not be used for what was asked for, so that every plan does without them."""
        if lost_bytes > self.lost_bytes:
            self.lost_bytes = lost_bytes
            self._forget_choices()

    def learn_peak(self, choice: Choice, step: StepBytes, is_same_size: bool) -> bool:
        """A micro-batch ran on a plan that was chosen and was measured.

        Args:
            step: What was measured.
            is_same_size: Whether its size is the one that the plan was made for, and not a smaller one.

        Returns:
            Whether that size gets another plan.
        """
        key = choice.size, choice.gradients_are_there
        choice.measured_bytes, choice.measures = step.peak, False
        known, limits = self._known.get(key), self._limits.setdefault(key, _Limits())
        error = step.peak - choice.step_bytes
        is_exact = known is not None and is_same_size
        exceeds = step.peak > self.budget() - self.lost_bytes - limits.offset
        differs = abs(error - limits.error) > _SAME * choice.budget_bytes and (is_exact or error > limits.error)
        if not exceeds and (limits.rounds >= _ROUNDS or not differs):
            return False
        # What a block does depends on its neighbours' actions too, so that plans may go in circles: not for ever.
        if known is None or not is_same_size or limits.rounds >= _ROUNDS:
            limits.error = max(limits.error, error)
        else:
            more = self._learn_start(key, step)
            if choice.moves:  # which block holds what of copies in flight is not to be told
                limits.in_flight = max(0, limits.in_flight + error - more)
            else:
                known.sample = known.sample.with_seen(choice.plan, step)
            known.costs = None
        limits.rounds += 1
        self._forget(key)
        return True

    def _learn_start(self, key: Key, step: StepBytes) -> int:
        """What came to stay after the first step (workspaces of kernels, caches) is there in all later ones: its bytes."""
        known, costs = self._known[key], self._costs_known(key)
        more = step.start - (costs.base_bytes - costs.before_bytes)
        known.sample = replace(known.sample, bare_bytes=known.sample.bare_bytes + more)
        return more

    def make_leaner(self, choice: Choice, share_left: float) -> Choice:
        """The size of a plan that ran out of memory gets a leaner one.

        Args:
            share_left: How much of what the plan takes above the leanest one a new plan may take, from 0 to 1.
        """
        key = choice.size, choice.gradients_are_there
        limits = self._limits.setdefault(key, _Limits())
        if choice.solution is not None:
            least = self._least_bytes(key)
            aim = least + int(share_left * (choice.solution.peak.bytes - least))
            limits.offset += max(0, choice.budget_bytes - aim)
        self._forget(key)
        if choice.solution is None or share_left <= 0:
            lean = replace(choice, plan=self._leanest_of_all(choice.plan), solution=None, measures=False)
            self._planned[key] = self._newest[key] = lean
        return self._planned.get(key) or self._plan(key, self._costs(key))

    def _leanest_of_all(self, failed: Plan) -> Plan:
        """The leanest plan; if that is what failed, with what it stores on the host, if there is a way."""
        if not self.link.bytes_per_second or dict(failed.actions) != dict(self.leanest.actions):
            return self.leanest
        actions = self.leanest.actions.items()
        return Plan({name: replace(own, place="host") if own == RECOMPUTE else own for name, own in actions})

    def fitting_share(self, choice: Choice) -> float | None:
        """How much of a micro-batch would fit the budget on the leanest plan; None where its costs are not known."""
        key = choice.size, choice.gradients_are_there
        costs = self._costs(key) or self._most(key)
        if costs is None:
            return None
        nothing, least = self._lean_peak(between(None, costs, 0.0)), self._lean_peak(costs)
        return max(0.0, (self.budget() - nothing) / (least - nothing)) if least > nothing else None

    def _lean_peak(self, costs: StepCosts) -> int:
        chosen = [min(block.options, key=lambda option: option.stored_bytes) for block in costs.blocks]
        return peak_of(costs, chosen).bytes

    def _least_bytes(self, key: Key) -> int:
        costs = self._costs(key)
        return self._lean_peak(costs) if costs is not None else 0

    def _decide(self, key: Key) -> Choice:
        size, there = key
        if key in self._planned:  # made leaner, it may be
            return self._planned[key]
        if self.given:
            larger = [own for own in self.given if own.gradients_are_there == there and covers(own.inputs, size)]
            smallest = min(larger, key=lambda own: terms(own.inputs), default=None)
            own_size = smallest.inputs if smallest is not None else size
            if (own_size, there) in self._planned:
                return self._planned[own_size, there]
            plan = Plan(smallest.actions) if smallest is not None else self.leanest
            return Choice(own_size, there, plan, self.budget())
        if not self.is_ready:
            known = any(own == there and covers(other, size) for other, own in self._known)
            return Choice(size, there, self.leanest, self.budget(), measures=not known)
        planned = self._planned_size(key)
        if planned in self._planned:
            return self._planned[planned]
        return self._plan(planned, self._costs(planned))

    def _plan(self, key: Key, costs: StepCosts | None) -> Choice:
        size, there = key
        limits = self._limits.setdefault(key, _Limits())
        lost = self.lost_bytes + limits.offset + limits.error
        budget = self.budget() - lost
        choice = Choice(size, there, self.leanest, budget, measures=key not in self._known, lost_bytes=lost)
        if costs is None:
            return choice  # and nothing is remembered, so that it is decided anew once it was measured
        if limits.in_flight:
            costs = replace(costs, staging_bytes=costs.staging_bytes + limits.in_flight)
        try:
            choice.solution = _solve_with_reserve(costs, budget)
            choice.plan, options = choice.solution.plan, choice.solution.options
            peaks = phase_peaks(costs, options).items()
            choice.step_bytes = max(peak.bytes for phase, peak in peaks if phase != "optimizer")
            choice.measures = choice.solution.peak.bytes > _TIGHT * budget
        except BudgetTooSmall as error:
            # Without its traceback, whose frames hold the arguments and the result of the model.
            choice.least, choice.floor_bytes = error.with_traceback(None), costs.resident_bytes + costs.gradient_bytes
            # Once more, since what was learnt in the first step is left out of the second.
            choice.measures, limits.rounds = limits.rounds == 0, limits.rounds + 1
        self._planned[key] = self._newest[key] = choice
        return choice

    def _planned_size(self, key: Key) -> Key:
        """The size that a micro-batch of this size is planned as."""
        size, there = key
        if key in self._known:
            return key
        larger = [other for other, its in self._known if its == there and covers(other, size)]
        return (bucket_of(size, min(larger, key=terms)), there) if larger else key

    def _costs(self, key: Key) -> StepCosts | None:
        """What a step of a size costs at most; None where that is not known."""
        size, there = key
        if key in self._known:
            return self._costs_known(key)
        sizes = [other for other, its in self._known if its == there]
        larger = min((other for other in sizes if covers(other, size)), key=terms, default=None)
        smaller = max((other for other in sizes if covers(size, other)), key=terms, default=None)
        low = self._costs_known((smaller, there)) if smaller is not None else None
        if larger is not None:
            return between(low, self._costs_known((larger, there)), share(smaller, larger, size))
        most = self._most(key)
        if most is None:
            return None
        keep = [block.options[0] for block in most.blocks]
        return most if peak_of(most, keep).bytes <= self.budget() else None

    def _most(self, key: Key) -> StepCosts | None:
        """The most that a step can cost which is larger than one that was measured; None where there is none."""
        size, there = key
        smaller = [other for other, its in self._known if its == there and covers(size, other)]
        nearest = max(smaller, key=terms, default=None)
        return (
            between(None, self._costs_known((nearest, there)), growth(nearest, size)) if nearest is not None else None
        )

    def _costs_known(self, key: Key) -> StepCosts:
        known = self._known[key]
        if known.costs is None:
            known.costs = live_costs(known.sample, self._gradients(known.sample), self.names, self.link)
        return replace(
            known.costs,
            resident_bytes=known.sample.bare_bytes + self.state_bytes,
            optimizer_bytes=self.optimizer_bytes,
        )

    def _gradients(self, sample: Sample) -> StepBytes:
        """A step in which the gradients came into being."""
        grown = [known.sample.step for (_, there), known in self._known.items() if not there]
        return grown[0] if grown else sample.step

    def _forget(self, key: Key) -> None:
        self._planned.pop(key, None)
        self._choices = {own: choice for own, choice in self._choices.items() if (choice.size, own[1]) != key}

    def _forget_choices(self) -> None:
        self._choices.clear()
        self._planned.clear()


def _solve_with_reserve(costs: StepCosts, budget: int) -> Solution:
    """The best choice with room for what no option says: a block that rebuilds from its input stores that as well where the
    block before it is replayed, since nobody else does."""
    found, reserve = solve(costs, budget), 0
    while (needed := _inputs_stored_twice(costs, found)) > reserve and found.peak.bytes + needed > budget:
        reserve = needed
        try:
            found = solve(costs, budget - reserve)
        except BudgetTooSmall:
            break  # then what fits without it, which is measured
    return found


def _inputs_stored_twice(costs: StepCosts, found: Solution) -> int:
    total, chosen = 0, found.options
    for block, before, own in zip(costs.blocks, chosen, chosen[1:], strict=False):
        is_replayed = before.action.kind == "recompute" or before.action.save not in ((), DEFAULT_SAVE)
        if is_replayed and own.action.kind == "selective" and own.action.save == DEFAULT_SAVE:
            # What a block stores least is about what it gives to the next.
            total += min(option.stored_bytes + option.host_bytes for option in block.options)
    return total
