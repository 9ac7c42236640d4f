"""SVG2: queries and keys permuted into semantic clusters; each query cluster reads the key clusters that matter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..clustering.clusters import (
    Clusters,
    cluster,
    cluster_mass,
    for_heads,
    log_mass_of_means,
    plan_with_text,
    renewed,
    spend,
)
from ..clustering.probe import map_error
from ..groups import repeat_heads
from ..heads import HeadShare
from ..layout import VideoLayout
from ..plan import BlockPlan
from ..running_sum import running_sum
from ..schedule import DenseSchedule
from ..skipped import SkippedClusters
from .base import Method, PlanMemory, check_count, check_flag, check_fraction, check_reach, cluster_count, is_number


@dataclass(frozen=True, kw_only=True)
class SVG2(Method):
    """Sparse VideoGen 2 (arXiv 2505.18875, sections 4.1 and 4.2).

    k-means on the queries and on the keys of each head, warm-started from the last step; each sequence is permuted by
    its own labels; the score of a pair of clusters is that of their centroids, weighted by the keys in the cluster, and
    each query cluster keeps the best key clusters until their share of the softmax passes `top_p`. Text tokens stay
    outside: they read and are read by everything. Query heads that share a head of k and v share its clusters.

    `route="error"` spends a density on the error that leaving out a cluster makes, over all heads of a layer at once.
    With `compensate` that is SVG-EAR (arXiv 2603.08982), restated from its project page since no code was published
    with it: the clusters whose mean key gets the attention of the query cluster's centroid most wrong, in squares and
    for each key computed. Without, what a cluster would move the centroid's output by, from means alone.

    Args:
        q_clusters, k_clusters: clusters of queries and of keys; when None `0.364 N^0.5`, at least 36, and `1.8 N^0.5`:
            (36, 43) at 576 tokens, (36, 165) at 8,448 and (100, 495) at 75,600, where the paper has (100, 500). Short
            sequences need relatively many query clusters: one that spans a whole object and its background has no keys
            to leave out.
        top_p: share of the estimated softmax mass to keep, in (0, 1].
        min_ratio: share of the key clusters that is always kept, in [0, 1].
        compensate: let the clusters that a query does not read enter through their mean key and mean value (see
            `attention/skipped.py`). Those pairs count in the density: one per query and skipped cluster, which is
            little in long sequences and much in short ones. Needs a backend that returns the log-sum-exp.
        density: when given, replaces `top_p` and `min_ratio`: each call finds the `top_p` that computes this share of
            all pairs, the mean over its heads, in (0, 1], to the nearest pair of clusters. Each query cluster keeps its
            best key cluster all the same, so less than one for each is refused (`check`); with `compensate` less than
            the means is, and the best clusters are computed beside them, also where that is more than the density:
            .13 for .10 on random tokens at a length of 576. `route="error"` keeps to the density.
        route: "mass", the paper's; or "error", see above, which needs a density and, with `compensate`, holds the
            centroids of the queries against every key, at `query clusters / 2 / tokens` of the cost of a dense call.
        init_iterations: k-means iterations at the first sparse step of a run.
        step_iterations: at every later one; 1 here and 2 in the paper, which costs twice as much and lowered the error
            of a call by 0.2 % on the demo model.
        schedule: dense steps and layers; 30 % of the steps by default, as in the paper.

    Raises:
        ValueError: a value outside its bound.
    """

    name: ClassVar[str] = "svg2"
    summary: ClassVar[str] = (
        "k-means permutes queries and keys, each query cluster keeps the key clusters of highest mass"
    )
    good_for: ClassVar[str] = "quality from about a third of the pairs up; follows the content, not the grid"
    costs: ClassVar[str] = "k-means at every step; ragged plans"
    source: ClassVar[str] = "Sparse VideoGen 2, arXiv 2505.18875"

    q_clusters: int | None = None
    k_clusters: int | None = None
    top_p: float = 0.9
    min_ratio: float = 0.1
    density: float | None = None
    compensate: bool = False
    route: str = "mass"
    init_iterations: int = 50
    step_iterations: int = 1
    schedule: DenseSchedule = field(default_factory=lambda: DenseSchedule(first_steps=0.3))

    def __post_init__(self) -> None:
        for name in ("q_clusters", "k_clusters"):
            if getattr(self, name) is not None:
                check_count("SVG2", name, getattr(self, name), 1)
        check_fraction("SVG2", "top_p", self.top_p, fix="0.9 keeps 90 % of the estimated mass")
        if self.density is not None:
            check_fraction(
                "SVG2", "density", self.density, fix="0.3 computes 30 % of the pairs, None leaves it to top_p"
            )
        if not is_number(self.min_ratio) or not 0 <= self.min_ratio <= 1:
            raise ValueError(f"SVG2 min_ratio is {self.min_ratio!r}: it must lie between 0 and 1; 0.1 is the paper's.")
        check_flag("SVG2", "compensate", self.compensate)
        if self.route not in ("mass", "error"):
            raise ValueError(f'SVG2 route is {self.route!r}: choose "mass" or "error".')
        if self.route == "error" and self.density is None:
            raise ValueError('SVG2 route is "error" and density None: give the density to spend, such as 0.2.')
        check_count("SVG2", "init_iterations", self.init_iterations, 1)
        check_count("SVG2", "step_iterations", self.step_iterations, 1)

    def check(self, layout: VideoLayout) -> None:
        _, clusters = self.cluster_counts(layout.video_tokens)
        if self.compensate:
            of_means = "compensate=True, which reads the mean of each key cluster,"
            fixes = {"compensate": "leave compensate out", "k_clusters": "lower k_clusters"}
            check_reach("SVG2", self.density, layout, clusters, of_means, fixes)
        else:  # of the usual size, rounded down: what the best ones have is known in the call alone
            one, fixes = "one key cluster for each query", {"k_clusters": "raise k_clusters"}
            check_reach("SVG2", self.density, layout, layout.video_tokens // clusters, one, fixes)

    def expected_density(self, layout: VideoLayout) -> float | None:
        return self.density

    @property
    def stands_in(self) -> bool:
        return self.compensate

    @property
    def uneven_heads(self) -> bool:
        return True

    def table_bytes(self, layout: VideoLayout, heads: int, head_dim: int, itemsize: int) -> int:
        clusters = self.cluster_counts(layout.video_tokens)[1] + (layout.text_tokens > 0)
        return heads * 2 * 4 * clusters * head_dim if self.compensate else 0

    def kept_bytes(self, layout: VideoLayout, heads: int, head_dim: int) -> int:
        return heads * 4 * sum(self.cluster_counts(layout.video_tokens)) * head_dim

    def planning_pairs(self, layout: VideoLayout) -> float:
        if self.route == "mass" or not self.compensate:
            return 0.0
        # The centroids against every key: of the two products of attention, one.
        return 0.5 * self.cluster_counts(layout.video_tokens)[0] * layout.video_tokens / layout.tokens**2

    def cluster_counts(self, tokens: int) -> tuple[int, int]:
        """Clusters of queries and of keys for a number of video tokens.

        Raises:
            OutOfReach: more clusters were asked for than there are tokens.
        """
        q_clusters = cluster_count("SVG2", "q_clusters", self.q_clusters, max(36, 0.364 * tokens**0.5), tokens)
        return q_clusters, cluster_count("SVG2", "k_clusters", self.k_clusters, 1.8 * tokens**0.5, tokens)

    @torch.no_grad()
    def plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, memory: PlanMemory
    ) -> BlockPlan:
        q_clusters, k_clusters = self.cluster_counts(layout.video_tokens)
        queries = self._cluster(q, q_clusters, layout, memory.call, "svg2_q")
        clusters = self._cluster(k, k_clusters, layout, memory.call, "svg2_k")
        keys = for_heads(clusters, q.shape[1])
        k, v = (x[:, :, layout.video] for x in (k, v))
        log_mass = log_mass_of_means(queries.means, keys.means, keys.sizes)
        if self.compensate or self.route == "error":
            v_means = renewed(v, clusters._replace(means=torch.zeros_like(clusters.means))).means
            v_means = repeat_heads(v_means, q.shape[1])
        if self.route == "error":
            selected = self._by_error(log_mass.softmax(-1), queries, k, clusters, v_means, layout, memory.heads)
            facts: dict[str, Any] = {"planning_pairs": self.planning_pairs(layout)}
        elif self.density is None:
            selected = _select(log_mass.softmax(-1), self.top_p, int(self.min_ratio * k_clusters))
            facts = {"top_p": self.top_p}
        else:
            of_all, q_sizes, k_sizes = (memory.heads.gather(x) for x in (log_mass, queries.sizes, keys.sizes))
            selected, top_p = self._by_mass(of_all, q_sizes, k_sizes, layout)
            selected, facts = memory.heads.mine(selected), {"top_p": top_p}
        plan = plan_with_text(queries, keys, selected, layout)
        if self.compensate:
            text = (0, 0, 0, int(layout.text_tokens > 0))  # the text's own cluster, which is never skipped
            plan = replace(plan, skipped=SkippedClusters(*(F.pad(x, text) for x in (keys.means, v_means))))
        return plan.with_details(q_cluster_sizes=_deciles(queries.sizes), k_cluster_sizes=_deciles(keys.sizes), **facts)

    def _by_mass(
        self, log_mass: torch.Tensor, q_sizes: torch.Tensor, k_sizes: torch.Tensor, layout: VideoLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clusters that `route="mass"` reads at a density, `[B, H, Cq, Ck]` bool, and the `top_p` of it, `[B]`.

        All is of all heads of the layer. One value for them lets a diffuse head read more than a sharp one; one for
        each batch entry keeps a video from depending on its neighbours in the batch.
        """
        ordered, ranking = log_mass.log_softmax(-1).sort(dim=-1, stable=True)
        sizes = k_sizes.unsqueeze(-2).expand(ranking.shape).gather(-1, ranking)
        if self.compensate:
            sizes = (sizes - 1).clamp(min=0)
        # A higher top_p takes in clusters by the mass that lies before them. Ranked is the mass from them on: where
        # heads are sharp, the sum of what lies before rounds to 1 for most clusters, which would be taken all or none.
        # What rounds to 0 even so goes by its own mass, of which the log is known.
        rest = running_sum(ordered.exp()).log().maximum(ordered)
        keep = spend(rest, q_sizes.unsqueeze(-1) * sizes, self._budget(k_sizes, layout))
        keep[..., -1] = True  # no query may read nothing
        top_p = -rest.where(keep, 0.0).amin((1, 2, 3)).expm1()
        return torch.zeros_like(keep).scatter_(-1, ranking, keep), top_p

    def _budget(self, k_sizes: torch.Tensor, layout: VideoLayout) -> torch.Tensor:
        """Pairs of tokens that the density leaves to clusters read, `[B]`; the sizes are those of all heads."""
        pairs = (self.density or 0.0) * layout.tokens**2 - layout.tokens**2 + layout.video_tokens**2
        pairs *= k_sizes.shape[1]
        if not self.compensate:
            return torch.full(k_sizes.shape[:1], pairs, device=k_sizes.device)
        # Each query reads the mean of a cluster unless it reads its tokens.
        return pairs - layout.video_tokens * (k_sizes > 0).sum((1, 2))

    def _by_error(
        self,
        mass: torch.Tensor,
        queries: Clusters,
        k: torch.Tensor,
        keys: Clusters,
        v_means: torch.Tensor,
        layout: VideoLayout,
        heads: HeadShare,
    ) -> torch.Tensor:
        """The clusters that `route="error"` reads, `[B, H, Cq, Ck]` bool; `keys` are those of the key-value heads."""
        k_sizes = repeat_heads(keys.sizes, mass.shape[1])
        rows, sizes = queries.sizes.unsqueeze(-1), k_sizes.unsqueeze(-2)
        cost = rows * (sizes - int(self.compensate)).clamp(min=0)
        if self.compensate:
            error = map_error(queries.means, k, keys, k.shape[-1] ** -0.5)
        else:
            error = mass.square() * torch.cdist(mass @ v_means, v_means).square()
        rank = (error / sizes.clamp(min=1)).masked_fill(cost == 0, -torch.inf)
        if not self.compensate:  # no query may read nothing
            best = torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, mass.argmax(-1, keepdim=True), True)
            rank = rank.masked_fill(best & (cost > 0), torch.inf)
        budget = self._budget(heads.gather(k_sizes), layout)
        selected = heads.mine(spend(heads.gather(rank), heads.gather(cost), budget))
        return selected if self.compensate else selected | best

    def _cluster(self, x: torch.Tensor, count: int, layout: VideoLayout, memory: dict, key: str) -> Clusters:
        """Clusters of the video tokens, from those of the last step where there are any."""
        start = memory.get(key)
        iterations = self.init_iterations if start is None else self.step_iterations
        clusters = cluster(x[:, :, layout.video], count, iterations, start)
        memory[key] = clusters.means
        return clusters


def select_clusters(
    q_centroids: torch.Tensor, k_centroids: torch.Tensor, k_sizes: torch.Tensor, top_p: float, min_ratio: float
) -> torch.Tensor:
    """The key clusters that each query cluster reads (arXiv 2505.18875, section 4.2).

    Args:
        q_centroids: `[B, H, Cq, D]`. k_centroids: `[B, H, Ck, D]`.
        k_sizes: `[B, H, Ck]`, keys per cluster; an empty cluster has no mass.
        top_p: mass to keep; the cluster that crosses it is kept too.
        min_ratio: the best `int(min_ratio * Ck)` clusters are kept whatever their mass.

    Returns:
        `[B, H, Cq, Ck]` bool.
    """
    mass = cluster_mass(q_centroids, k_centroids, k_sizes)
    return _select(mass, top_p, int(min_ratio * mass.shape[-1]))


def _deciles(sizes: torch.Tensor) -> torch.Tensor:
    """The smallest of all sizes, the tenths and the largest, `[11]` float32, by the nearest rank."""
    ordered = sizes.flatten().sort().values
    last = len(ordered) - 1
    return torch.stack([ordered[(i * last + 5) // 10] for i in range(11)]).float()


def _select(mass: torch.Tensor, top_p: float, forced: int) -> torch.Tensor:
    """The key clusters before which less than `top_p` of the mass lies, and the first `forced` ones."""
    ordered, ranking = mass.sort(dim=-1, descending=True, stable=True)
    keep = running_sum(ordered) - ordered < top_p
    keep[..., : max(1, forced)] = True  # at least one: no query may read nothing
    return torch.zeros_like(keep).scatter_(-1, ranking, keep)
