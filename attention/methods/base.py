"""What every sparse-attention method is: a frozen config that turns queries and keys into a `BlockPlan`."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, TypeVar

import torch

from ..account.plain_values import of_python
from ..heads import ALL_HEADS, HeadShare
from ..layout import VideoLayout
from ..plan import BlockPlan
from ..schedule import DenseSchedule, check_kind

M = TypeVar("M", bound="Method")

SINK_SHARE = 0.2  # of a density: a method that decides whether to read the first frame whole spends no more on it


class OutOfReach(ValueError):
    """A setting that a method cannot follow on a layout. The text has Python's names; a front end can use its own.

    Args:
        message: one line.
        field: of the method, or an argument of `for_density`.
        value: what it has.
        least, most: what it can have on that layout; None where there is no bound.
        eased_by: other fields of the method that move the bound.
    """

    def __init__(
        self,
        message: str,
        field: str = "",
        value: Any = None,
        *,
        least: float | None = None,
        most: float | None = None,
        eased_by: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.field, self.value, self.least, self.most, self.eased_by = field, value, least, most, eased_by


@dataclass
class PlanMemory:
    """What a method may keep between calls, and whose heads the call has. The engine owns it: methods hold no state.

    Args:
        call: of one (model, layer, guidance branch, layout); emptied when a run starts, and before each call of a
            training, whose steps are of unlike samples.
        layout: shared by every layer of one layout and device; holds what needs nothing else, such as static masks.
        run: shared by every layer; emptied when a run starts.
        heads: what is decided over all heads of a layer, or by a head's number, goes through it.
        counts: how often one call was made, which a training counts on; emptied when a run starts.
        drawn: what was drawn for one call without a look at q, k and v, which a training keeps; emptied as `counts`.
        turn: where a run begins of what differs from step to step; a training, whose steps are runs of one pass, counts
            on from one to the next.
    """

    call: dict[str, Any] = field(default_factory=dict)
    layout: dict[Any, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    heads: HeadShare = ALL_HEADS
    counts: dict[str, int] = field(default_factory=dict)
    drawn: dict[str, Any] = field(default_factory=dict)
    turn: int = 0


@dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """Base of the method configs.

    Args:
        schedule: the steps and layers that stay dense; every method has its own default.

    A class has a `name`, under which it is asked for and reported. The other texts are what users are told of it.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    good_for: ClassVar[str] = ""
    costs: ClassVar[str] = ""
    source: ClassVar[str] = ""

    schedule: DenseSchedule = field(default_factory=DenseSchedule)

    @classmethod
    def for_density(cls, layout: VideoLayout, density: float, **settings: Any) -> Self:
        """A config of this method that computes about `density` of all pairs on a layout.

        Args:
            layout: methods whose density follows from the geometry search on it.
            density: pairs computed over pairs in dense attention, in (0, 1].
            settings: further fields.

        Raises:
            ValueError: a density out of range, or a method that has no such setting.
            OutOfReach: one that this layout does not allow.
        """
        known = [f.name for f in fields(cls)]
        if "density" not in known:
            raise ValueError(
                f"{cls.__name__} has no density, it has {', '.join(known)}: give these and not density {density}, or "
                "write a for_density of its own, which finds those that compute so many pairs."
            )
        method = cls(**{"density": density, **settings})
        method.check(layout)
        return method

    def check(self, layout: VideoLayout) -> None:  # noqa: B027 (most methods can do every layout)
        """Raise `OutOfReach` if the method cannot do what it is set to on this layout; called before a run works."""

    def expected_density(self, layout: VideoLayout) -> float | None:
        """Share of the pairs that a sparse call computes on a layout; None where it depends on the content."""
        return None

    @property
    def stands_in(self) -> bool:
        """Whether something stands for the keys that a query skips, which not every backend can attend to."""
        return False

    @property
    def second_stage(self) -> bool:
        """Whether its plans have a `pv_threshold`, which not every backend computes with."""
        return False

    @property
    def uneven_heads(self) -> bool:
        """Whether heads of one layer compute different numbers of pairs, so that processes which share them swap some.

        What such a method keeps in `memory.call` are tensors `[B, H, ...]`, tuples of them, and numbers.
        """
        return False

    @property
    def needs_weights(self) -> bool:
        """Whether each layer must have weights that were trained for this method, which `complete` is given."""
        return False

    @property
    def completes_dense(self) -> bool:
        """Whether `complete` is for dense calls, too, with None for the plan: what it adds was trained beside them."""
        return False

    def table_bytes(self, layout: VideoLayout, heads: int, head_dim: int, itemsize: int) -> int:
        """Memory of what stands for skipped keys in a call, the largest thing that a plan holds, in bytes.

        Args:
            layout: the token grid.
            heads: times the batch. head_dim: D.
            itemsize: bytes of a number of q.
        """
        return 0

    def kept_bytes(self, layout: VideoLayout, heads: int, head_dim: int) -> int:
        """Memory of what a call leaves behind until the run ends, of which there is one for each layer and guidance
        branch, in bytes.

        Args:
            layout: the token grid.
            heads: times the batch. head_dim: D.
        """
        return 0

    def run_bytes(self, layout: VideoLayout, heads: int, head_dim: int, itemsize: int, calls: int) -> int:
        """Memory of a run at its height: the tables of the call at work, and what all calls of a step leave behind.

        Args:
            layout, heads, head_dim, itemsize: see `table_bytes`.
            calls: sparse layers times guidance branches.
        """
        kept = calls * self.kept_bytes(layout, heads, head_dim)
        return self.table_bytes(layout, heads, head_dim, itemsize) + kept

    def planning_pairs(self, layout: VideoLayout) -> float:
        """What the probe of a plan computes, in pairs of dense attention and as a share of them; not in the density.

        It is not all that planning multiplies: `benchmarks/planning_work.py` counts that.
        """
        return 0.0

    def remark(self, layout: VideoLayout) -> str:
        """What a report should say of the method on a layout, in one sentence; empty for nothing."""
        return ""

    @abc.abstractmethod
    def plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, memory: PlanMemory
    ) -> BlockPlan:
        """Decide what each query reads.

        Args:
            q: `[B, H, N, D]`, k, v: `[B, Hkv, N, D]`, after normalisation and rotary embedding, `N = layout.tokens`; H
                is a multiple of Hkv. The plan is for H heads (`kv_order` may have fewer, see `BlockPlan`).
            layout: where the video tokens are.
            memory: what this method left behind in earlier calls, and whose heads these are.
        """

    def complete(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: BlockPlan | None,
        layout: VideoLayout,
        weights: Any,
    ) -> torch.Tensor:
        """The output of a sparse call from what a backend made of its plan; most methods leave it as it is.

        Args:
            out: `[B, H, N, D]`.
            q, k, v, layout: as those of `plan`. Gradients flow.
            plan: of this call; None for a dense one, see `completes_dense`.
            weights: what was trained for the layer; None where there is none.

        Raises:
            ValueError: it needs weights, and there are none.
        """
        return out


def first_frame_pays(layout: VideoLayout, density: float) -> bool:
    """Whether reading the first frame whole leaves enough of a density for the rest: not in short videos."""
    return layout.tokens_per_frame / layout.tokens <= SINK_SHARE * density


def is_number(value: object) -> bool:
    """Whether a value is a finite number: a text or True is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_fraction(owner: str, name: str, value: float, *, fix: str) -> None:
    """Raise a `ValueError` unless `0 < value <= 1`."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{owner} {name} is {value!r}: it must be above 0 and at most 1; {fix}.{of_python(value)}")


def check_count(owner: str, name: str, value: int, least: int) -> None:
    """Raise a `ValueError` unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{owner} {name} is {value!r}: it must be a whole number of at least {least}.{of_python(value)}"
        )


def check_seed(owner: str, seed: int) -> None:
    """Raise a `ValueError` unless a seed is a whole number that torch takes."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"{owner} seed is {seed!r}: it must be a whole number of 64 bits, such as 0.{of_python(seed)}")


def check_undecided(owner: str, density: float, settings: Mapping[str, Any], *names: str) -> None:
    """Raise a `ValueError` for settings beside a density that decides them, or puts them out of use."""
    for name in names:
        if settings.get(name) is not None:
            raise ValueError(f"{owner} has density {density} and {name} {settings[name]!r}: give one of them.")


def check_flag(owner: str, name: str, value: bool | None, or_none: bool = False) -> None:
    """Raise a `ValueError` unless `value` is True or False: a text such as "false" would count as true."""
    if not isinstance(value, bool) and not (or_none and value is None):
        known = "True, False or None" if or_none else "True or False"
        raise ValueError(f"{owner} {name} is {value!r}: it must be {known}.")


def check_reach(
    owner: str, density: float | None, layout: VideoLayout, clusters: int, stand_in: str, easing: Mapping[str, str]
) -> None:
    """Raise `OutOfReach` where what is computed whatever is skipped is more than a density.

    Args:
        owner: the method's class, for the message.
        density: of the method; None where it has none to meet.
        layout: the token grid; what is beside the video stays dense.
        clusters: of keys for which each video token reads a stand-in; 0 for none.
        stand_in: what that is, "one stand-in for each key cluster".
        easing: field of the method that leads to fewer stand-ins -> what to do with it.
    """
    pairs = {
        f"the {layout.beside}, which stays dense,": layout.tokens**2 - layout.video_tokens**2,
        stand_in: clusters * layout.video_tokens,
    }
    text, least = (count / layout.tokens**2 for count in (next(iter(pairs.values())), sum(pairs.values())))
    if density is None or density >= least:
        return
    told = [f"{what} makes {count / layout.tokens**2:.3f}" for what, count in pairs.items() if count]
    told[0] += " of the pairs"
    fixes = easing if text < density else {}  # else the text alone is too much
    enough = printable(least)
    raise OutOfReach(
        f"{owner} density is {density}, but {' and '.join(told)}: "
        f"{either([f'raise density to {enough:.3f} or more', *fixes.values()])}.",
        "density",
        density,
        least=least,
        eased_by=tuple(fixes),
    )


def printable(least: float) -> float:
    """A bound to three digits, rounded up: as it is printed, it must be possible."""
    return math.ceil(least * 1000) / 1000


def blocks_for_density(
    owner: str,
    density: float,
    layout: VideoLayout,
    blocks: int,
    reading: Callable[[int], M],
    one_block: str,
    easing: str,
) -> M:
    """The method whose query blocks read as many key blocks as come nearest to a density.

    Args:
        owner: the method's class, for messages.
        density: of all pairs, in (0, 1].
        layout: the token grid; its text stays dense.
        blocks: of keys.
        reading: number of key blocks -> the method that reads so many.
        one_block: the least that a query block reads, in words.
        easing: what makes that less, in words.

    Raises:
        ValueError: a density out of range. OutOfReach: one below what the text and one block cost.
    """
    check_fraction(owner, "density", density, fix="0.1 computes 10 % of the pairs")
    computed = [reading(count).expected_density(layout) or 0.0 for count in range(1, blocks + 1)]
    # To half a block it is met; where the video is one block, nothing but all of it can be.
    if density < computed[0] - (0.5 / blocks if blocks > 1 else 0.0):
        raise OutOfReach(
            f"{owner} density {density} is below {computed[0]:.3f}, which is {one_block}"
            f"{f' and the {layout.beside}' if layout.text_tokens else ''}: raise density, or use {easing}.",
            "density",
            density,
            least=computed[0],
        )
    return reading(1 + min(range(blocks), key=lambda place: abs(computed[place] - density)))


def check_config(method: Method) -> None:
    """Raise a TypeError for a config without what every method has, which no class is made to check."""
    cls, name = type(method).__name__, getattr(method, "name", None)
    if not isinstance(name, str) or not name:
        raise TypeError(f'{cls} has no name: write name: ClassVar[str] = "my-method" in it.')
    if name == "dense":
        raise TypeError(f"{cls} has the name {name!r}, which stands for attention to all: give it another.")
    check_kind(f"{cls}.schedule", method.schedule)


def either(ways: Sequence[str]) -> str:
    """Things that can be done, in words: "a", "a, or b", "a, b, or c"."""
    return ", or ".join([", ".join(ways[:-1]), ways[-1]]) if ways[1:] else ways[0]


def cluster_count(owner: str, name: str, asked: int | None, rule: float, tokens: int) -> int:
    """How many clusters a method makes of `tokens` tokens: as many as were asked for, or as its rule says.

    Raises:
        OutOfReach: more were asked for than there are tokens.
    """
    if asked is not None and asked > tokens:
        text = f"{owner} {name} is {asked}, but there are only {tokens} video tokens: lower it, or use None."
        raise OutOfReach(text, name, asked, most=tokens)
    return asked or min(tokens, max(2, round(rule)))
