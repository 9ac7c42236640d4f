"""What an engine refuses: calls that no backend here can compute, numbers that no plan can be made from, plans that are
none."""

from __future__ import annotations

import torch

from .backends import nothing_is_fast, pick, pick_special
from .backends.base import AS_INPUTS, Precision, Request
from .gradients import wants_gradient
from .heads import HeadShare
from .layout import VideoLayout
from .methods import Method
from .plan import BlockPlan
from .schedule import StepInfo


class NotFinite(ValueError):
    """NaN or infinity in q or k: weights that are no numbers, or a dtype that overflows."""


class CallChecks:
    """The checks of the calls of one engine, each made as seldom as it can be.

    Args:
        method: of the engine.
        backend: a name, or "auto".
        formats: of the products of sparse calls.
    """

    def __init__(self, method: Method, backend: str, formats: Precision) -> None:
        self._method, self._backend, self._formats = method, backend, formats
        self._able: set[tuple] = set()  # kinds of calls that were found to have a backend
        self._finite: tuple[int, int] | None = None  # run and step that were looked at last
        # A method of the package keeps the promises of its plans, which its tests see to.
        self._is_own = type(method).__module__.partition(".")[0] != __name__.partition(".")[0]
        self.forget_run()

    def forget_run(self) -> None:
        """A run ends: the plans of the next are looked at again."""
        self._seen: set[VideoLayout] = set()  # layouts of which a plan of somebody's own method was

    def able(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Refuse what no backend here can compute in the first call of a run, be it dense, and not at the first sparse
        step: a precision or a second stage, whatever a backend that was named does not do, and with "auto" a machine
        on which all of them are slower than dense attention.
        """
        second = self._method.second_stage
        grad = wants_gradient(q, k, v)
        kind = (q.device, q.dtype, q.shape[-1], grad)
        if kind not in self._able:
            shape = (*kind[:3], q.shape[2])
            request = Request(*shape, False, False, grad, self._formats, self._method.stands_in, second_stage=second)
            if self._formats != AS_INPUTS or second:
                pick_special(self._backend, request)
            elif self._backend != "auto":
                pick(self._backend, request, scattered=False)
            elif reason := nothing_is_fast(q.device):
                raise RuntimeError(f"backend 'auto' {reason}.")
            self._able.add(kind)

    def finite(self, q: torch.Tensor, k: torch.Tensor, layer: int, heads: HeadShare, step: StepInfo) -> None:
        """NaN compares false with everything, so a plan made from it would silently drop keys: refuse it instead.

        On a GPU the check waits for it, so there it runs once a step.
        """
        place = (step.run, step.step)
        if q.device.type != "cpu" and self._finite == place:
            return
        self._finite = place
        for name, x in (("q", q), ("k", k)):
            # NaN and infinity survive a sum (opposite infinities make NaN), and a sum needs no second tensor. It is one
            # over all processes, which must all stop where one does.
            if not torch.isfinite(heads.sum(x.detach().sum(dtype=torch.float32))):
                # That of large numbers may be infinite, too. In float32, since plans are made in it.
                counts = torch.tensor([int((~torch.isfinite(x.detach().float())).sum()), x.numel()], device=x.device)
                bad, count = heads.sum(counts).tolist()
                if not bad:
                    continue
                beyond = " in float32, in which plans are made," if x.dtype == torch.float64 else ""
                raise NotFinite(
                    f"{bad} of {count} values of {name} are NaN or infinite{beyond} in layer "
                    f"{layer} at step {step.step}: no plan can be made from them. Check the weights and the dtype "
                    f"({x.dtype}); bfloat16 overflows less than float16."
                )

    def plan(self, plan: BlockPlan, layout: VideoLayout) -> None:
        """Refuse what no shipped method makes; once a run for each layout, since the device has to be waited for."""
        if not self._is_own:
            return
        cls = type(self._method).__name__
        if not isinstance(plan, BlockPlan):
            raise TypeError(f"{cls}.plan returned {plan!r}: it must return a BlockPlan, such as BlockPlan.dense(...).")
        if layout in self._seen:
            return
        try:
            plan.validate()
        except ValueError as error:
            raise ValueError(f"{cls}.plan, for {layout}: {error}") from error
        self._seen.add(layout)
