"""Tangent: what is skipped enters to first order, and pairs are computed where they change the output most."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..clustering.budget import Budget
from ..clustering.clusters import (
    Clusters,
    cluster,
    clusters_of,
    for_heads,
    log_mass_of_means,
    plan_with_text,
    rank_pairs,
    renewed,
    share_of_video,
    text_of,
    with_order,
)
from ..clustering.labels import label_dtype
from ..clustering.probe import probe, read
from ..clustering.slopes import slopes_of
from ..clustering.spread import spread_of
from ..clustering.tolerance import ROWS, Measured, falling_slowly, within
from ..groups import repeat_heads
from ..layout import VideoLayout
from ..plan import BlockPlan
from ..schedule import DenseSchedule
from ..skipped import SkippedClusters
from .base import Method, PlanMemory, check_count, check_flag, check_fraction, check_reach, cluster_count

# Video tokens. With the probe paid out of a density of .20, the error on the demo model is .054 at 576 tokens and .024
# at 1,088; without it .030 and .028. On imitated heads: .102 and .047, without it .046 and .045.
PROBE_PAYS = 768


@dataclass(frozen=True, kw_only=True)
class Tangent(Method):
    """Clusters as in SVG2, what is skipped to first order in the query, and a budget spent on what that leaves.

    The centroid of each query cluster is held against every key (the *probe*): what it sees of a key cluster is the
    log of that cluster's softmax mass, and the mean key and value weighted by that softmax. A cluster that is skipped
    enters each query's softmax as one pair, with the score `log mass + scale * (q - centroid) . key + curve`. But for
    the last term that is the first-order expansion of the log of the mass at the centroid, which never claims too much,
    since log-sum-exp is convex. `curve` is what the second order adds to the mass on average over the queries of the
    cluster, `log(1 + s / 2)` with `s` the mean square of the scores that queries and keys have beyond their centroids.

    The mean value of a cluster moves with the query, too: to first order by `(q - centroid)` times the covariance of
    its keys and values. All skipped clusters together move the output by one matrix for each cluster of queries, their
    covariances weighted by the shares that the centroid sees, and `(q - centroid) @ matrix` is added to the output. It
    costs as much as D / 2 further keys for each query, of D channels, which no density counts.

    What is left is of second order, and is estimated for each pair of clusters from the same covariances. The pairs
    that leave most per key computed are computed, under one threshold over all heads and rows of a layer. Text tokens
    stay outside: they read and are read by everything.

    In short sequences the probe costs more than it gives. There a cluster enters through its mean key and value, with
    the same correction of its mass, and its value moves with the whole query. Query heads that share a head of k and v
    share its clusters of keys; what stands for those is each query head's own.

    Gradients take selection and stand-ins as constants. An engine keeps the plans of a forward pass with gradients,
    with their stand-ins (`table_bytes` for each layer), until the next one.

    Args:
        density: pairs computed over all pairs, stand-ins and text included, the mean over heads, in (0, 1]. The probe
            is not in it: it is `1.5 * query clusters / tokens` of a dense call, in planning. Nor is the matrix.
        tolerance: instead: the error of the output, relative to the output, in (0, 1]; density then follows the
            content. At each call it is measured on up to 32 other queries of each head, and pairs are taken until it is
            this, but at least nine tenths of the density of the call before. What all queries have differs from that as
            a sample does, and is more where attention is so sharp that few queries have most of the error: with such
            heads made up, up to 3 times the tolerance at a first call, and twice at later ones. What `precision="int8"`
            adds is not in it.
        q_clusters, k_clusters: of queries and of keys; when None those of `SVG2`, with up to 3 times the query clusters
            as long as they have 128 queries each: 300 and 495 at 75,600 tokens, with which the stand-ins of 40 heads of
            128 channels are 3.2 GiB in half precision (`table_bytes`), and 66 and 165 at 8,448.
        probe: whether to probe; when None from 768 video tokens up, where it pays at a density of 0.2.
        recluster_every: k-means runs at every so many steps, and in between the labels stay and the means are renewed.
        init_iterations, step_iterations: of k-means at the first sparse step of a run, and at later ones.
        schedule: dense steps and layers; 20 % of the steps.

    In training the tables of each layer's plan are kept for the backward pass, `table_bytes` of them: 59 GiB over the
    40 layers of Wan 14B at 32,760 tokens, 13 GiB over the 30 of Wan 1.3B. `SVG2(compensate=True)` keeps almost nothing.

    Raises:
        ValueError: `density` and `tolerance` together or neither, or a value out of its bounds.
    """

    name: ClassVar[str] = "tangent"
    summary: ClassVar[str] = "key clusters that change the output most, and the others to first order"
    good_for: ClassVar[str] = "low densities: nearest to the dense output of one call at every density"
    costs: ClassVar[str] = "a probe of the query clusters at every call, k-means at every third step"
    source: ClassVar[str] = "this project"

    density: float | None = None
    tolerance: float | None = None
    q_clusters: int | None = None
    k_clusters: int | None = None
    probe: bool | None = None
    recluster_every: int = 3
    init_iterations: int = 10
    step_iterations: int = 1
    schedule: DenseSchedule = field(default_factory=lambda: DenseSchedule(first_steps=0.2))

    def __post_init__(self) -> None:
        if self.density is None and self.tolerance is None:
            object.__setattr__(self, "density", 0.2)
        if self.density is not None and self.tolerance is not None:
            raise ValueError(
                f"Tangent has density {self.density} and tolerance {self.tolerance}: give one; the other follows. "
                "Where a config is changed that has the other (a density of 0.2 where none was given), set that to "
                f"None: density=None, tolerance={self.tolerance}, or tolerance=None, density={self.density}."
            )
        if self.density is not None:
            check_fraction("Tangent", "density", self.density, fix="0.2 computes 20 % of the pairs")
        if self.tolerance is not None:
            check_fraction("Tangent", "tolerance", self.tolerance, fix="0.02 is an error of 2 % of the output")
        for name in ("q_clusters", "k_clusters"):
            if getattr(self, name) is not None:
                check_count("Tangent", name, getattr(self, name), 1)
        check_flag("Tangent", "probe", self.probe, or_none=True)
        for name in ("recluster_every", "init_iterations", "step_iterations"):
            check_count("Tangent", name, getattr(self, name), 1)

    @classmethod
    def for_density(cls, layout: VideoLayout, density: float | None, **settings: Any) -> Tangent:
        """A config that computes `density` of all pairs; with a `tolerance` among the settings that decides instead.

        Raises:
            ValueError: a value out of range. OutOfReach: a density that this layout does not allow.
        """
        if settings.get("tolerance") is not None:
            density = None
        method = cls(**{"density": density, **settings})
        method.check(layout)
        return method

    def check(self, layout: VideoLayout) -> None:
        _, clusters = self.cluster_counts(layout.video_tokens)
        fixes = {"k_clusters": "lower k_clusters"}
        check_reach("Tangent", self.density, layout, clusters, "one stand-in for each key cluster", fixes)

    def expected_density(self, layout: VideoLayout) -> float | None:
        return self.density

    @property
    def stands_in(self) -> bool:
        return True

    def probes(self, layout: VideoLayout) -> bool:
        """Whether the centroids are held against every key on a layout."""
        return layout.video_tokens >= PROBE_PAYS if self.probe is None else self.probe

    def planning_pairs(self, layout: VideoLayout) -> float:
        return (self._probe_pairs(layout) if self.probes(layout) else 0.0) + self._measured_pairs(layout)

    def _probe_pairs(self, layout: VideoLayout) -> float:
        return 1.5 * self.cluster_counts(layout.video_tokens)[0] * layout.video_tokens / layout.tokens**2

    def _measured_pairs(self, layout: VideoLayout) -> float:
        """The most: of many heads fewer queries of each are measured."""
        rows = 0 if self.tolerance is None else min(ROWS, layout.video_tokens)
        return 1.5 * rows * layout.video_tokens / layout.tokens**2

    def remark(self, layout: VideoLayout) -> str:
        share, measured = self._probe_pairs(layout), self._measured_pairs(layout)
        measures = f", and measures the error on up to {measured:.1%} of them" if measured else ""
        if self.probes(layout):
            return f"tangent: beside the density, planning probes {share:.1%} of the pairs of dense attention{measures}"
        fewer = "" if self.probe is False else f", in a video of fewer than {PROBE_PAYS} tokens"
        return f"tangent: ranked by mean keys, without the probe of {share:.1%} of the pairs{fewer}{measures}"

    @property
    def uneven_heads(self) -> bool:
        return True

    def table_bytes(self, layout: VideoLayout, heads: int, head_dim: int, itemsize: int) -> int:
        own = self.cluster_counts(layout.video_tokens)[0]
        q_clusters, k_clusters = (n + (layout.text_tokens > 0) for n in self.cluster_counts(layout.video_tokens))
        slopes = own * head_dim * head_dim * min(itemsize, 4)
        if not self.probes(layout):
            return heads * (4 * k_clusters * (2 * head_dim + q_clusters) + slopes)
        tables = q_clusters * k_clusters * (2 * head_dim * min(itemsize, 4) + 4)
        return heads * (tables + slopes + 4 * own * head_dim)

    def kept_bytes(self, layout: VideoLayout, heads: int, head_dim: int) -> int:
        counts = self.cluster_counts(layout.video_tokens)
        return heads * sum(label_dtype(n).itemsize * layout.video_tokens + 4 * n * head_dim for n in counts)

    def cluster_counts(self, tokens: int) -> tuple[int, int]:
        """Clusters of queries and of keys for a number of video tokens.

        Raises:
            OutOfReach: more clusters were asked for than there are tokens.
        """
        few = max(36, 0.364 * tokens**0.5)
        many = max(few, min(3 * few, tokens / 128))
        q_clusters = cluster_count("Tangent", "q_clusters", self.q_clusters, many, tokens)
        return q_clusters, cluster_count("Tangent", "k_clusters", self.k_clusters, 1.8 * tokens**0.5, tokens)

    @torch.no_grad()
    def plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, memory: PlanMemory
    ) -> BlockPlan:
        scale = q.shape[-1] ** -0.5
        of_text = (text_of(k, layout), text_of(v, layout)) if layout.text_tokens else None
        q, k, v = (x[:, :, layout.video] for x in (q, k, v))
        calls = memory.counts.get("tangent_calls", 0)
        memory.counts["tangent_calls"] = calls + 1
        queries, clusters = (
            self._clusters(x, count, memory.call, name, anew=calls % self.recluster_every == 0)
            for x, count, name in zip((q, k), self.cluster_counts(layout.video_tokens), ("q", "k"), strict=True)
        )
        keys = for_heads(clusters, q.shape[1])  # of each query head; `clusters` are of each key-value head
        text = int(of_text is not None)  # a tile and a cluster of its own, which skips nothing and is never skipped
        # A mean key has no first order, so what it leaves begins with the whole query.
        spread = spread_of(q, k, v, queries, clusters, scale, from_zero=not self.probes(layout))
        if self.probes(layout):
            tables = probe(queries.means, k, v, clusters, scale, text)
            seen = read(tables)
            key, value, bias = tables.key, tables.value, seen.bias + spread.curve
            log_mass, mass, outputs, away = tables.log_mass, seen.mass, seen.outputs, seen.away
        else:
            values = repeat_heads(renewed(v, clusters).means, q.shape[1])
            key, value = (F.pad(x, (0, 0, 0, text)) for x in (keys.means, values))
            bias = keys.sizes.log().unsqueeze(-2) + spread.curve
            log_mass = log_mass_of_means(queries.means, keys.means, keys.sizes)
            mass = log_mass.softmax(-1)
            outputs = mass @ values
            away = torch.cdist(outputs, values).square()
        if of_text is not None:
            mass = mass * share_of_video(queries.means, of_text[0], log_mass)
        pairs = rank_pairs(mass, spread.score, spread.value, away, queries.sizes, keys.sizes)
        centre = queries.means if self.probes(layout) else None
        skipped = SkippedClusters(key, value, F.pad(bias, (0, text, 0, text)))
        budget = Budget(pairs, queries, keys, layout, memory.heads)
        if self.density is not None:
            selected = budget.of_density(self.density)
            error = budget.left_by(selected, outputs)
        else:
            measured = Measured(
                q, k, v, of_text, queries, clusters, skipped, mass, spread.moves, centre, scale, calls, memory.heads
            )
            ranks, before = measured.of_tiles(pairs[1]), memory.call.get("tangent_density")
            before = None if before is None else before[:, 0]

            def error_of(density: torch.Tensor) -> torch.Tensor:
                return measured.error(budget.reads(ranks, density))

            density, error = within(self.tolerance, error_of, budget.least, before)
            if before is not None:
                density, error = falling_slowly(density, error, error_of, before)
            selected = budget.reads(pairs[1], density)
            # By head, as all that is kept.
            memory.call["tangent_density"] = density.unsqueeze(-1).expand(-1, q.shape[1])
        dtype = k.dtype if k.dtype.itemsize < 4 else torch.float32
        slope = slopes_of(mass.masked_fill(selected, 0.0), spread.moves, dtype)
        plan = plan_with_text(queries, keys, selected, layout)
        return replace(plan, skipped=replace(skipped, slope=slope, centre=centre)).with_details(
            predicted_error=error,
            error_is_measured=self.tolerance is not None,
            planning_pairs=self.planning_pairs(layout),
            probe=self.probes(layout),
        )

    def _clusters(self, x: torch.Tensor, count: int, memory: dict[str, Any], name: str, anew: bool) -> Clusters:
        """Clusters for this call. Kept of them are 16-bit labels and the means: at 75,600 tokens and 40 heads 27 MiB a
        call, 2.1 GiB over 40 layers and two branches of guidance.
        """
        kept = memory.get(f"tangent_{name}")
        if kept is not None and not anew:
            clusters = renewed(x, clusters_of(*kept))
        else:
            iterations = self.init_iterations if kept is None else self.step_iterations
            clusters = with_order(cluster(x, count, iterations, None if kept is None else kept[1]))
        memory[f"tangent_{name}"] = (clusters.labels.to(label_dtype(count)), clusters.means)
        return clusters
