"""The plans of a forward pass, for the backward pass that may need them again."""

from __future__ import annotations

from collections.abc import Callable

from .plan import BlockPlan


class PassPlans:
    """The plans of the forward pass that was begun last, by call.

    Gradient checkpointing runs a layer again in the backward pass. A method with a memory would plan anew then, and the
    gradient would be of another function than the one that was computed.
    """

    def __init__(self) -> None:
        self._backward: list[dict[tuple, BlockPlan]] = []  # of passes whose backward pass began
        self.drop()

    def drop(self) -> None:
        """Begin a pass: who still holds the output of one that had its backward pass does not hold gigabytes of plans
        with it."""
        for plans in self._backward:
            plans.clear()
        self._backward.clear()
        self._plans: dict[tuple, BlockPlan] = {}
        self._counts: dict[tuple, dict[str, int]] = {}

    def plan(self, call: tuple) -> BlockPlan | None:
        """That of a call of this pass; None where none was kept."""
        return self._plans.get(call)

    def keep(self, call: tuple, plan: BlockPlan) -> None:
        """Keep a plan of this pass."""
        self._plans[call] = plan

    def counts(self, call: tuple, now: dict[str, int]) -> dict[str, int]:
        """What a call counts on.

        Args:
            call: see above.
            now: what it comes to now, which is kept; but a call of a pass whose plans were dropped since is planned
                with that of its first time.
        """
        if call in self._counts:
            return dict(self._counts[call])
        self._counts[call] = dict(now)
        return now

    def again(self) -> Callable[[], None]:
        """What brings this pass back, when others may have been begun."""
        plans, counts = self._plans, self._counts

        def bring_back() -> None:
            self._plans, self._counts = plans, counts
            self._backward.append(plans)

        return bring_back
