"""What the report node is told: the sampling that is this one's, or what there is instead."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...attention import RunReport

CACHED = (
    "The result came from ComfyUI's cache: nothing was sampled this time. Below is the last sampling of this model, "
    "which need not be the one that made it."
)
CACHED_VIDEO = "The video came from ComfyUI's cache: below is the run that made it."
NEVER = (
    "The model was not sampled, so there is nothing to report. Connect the MODEL of the node that reports to the "
    "sampler, and the sampler's LATENT to after. (A result from ComfyUI's cache is not sampled either.)"
)
BYPASSED = "No report came in: the Sparse Attention node is bypassed or not connected, so the model is as it was."


@dataclass(frozen=True)
class News:
    """A report for the report node.

    Args:
        report: what to show.
        heading: what must be known before reading it; empty when it is that of this sampling.
    """

    report: RunReport
    heading: str = ""


def nothing(heading: str) -> News:
    """News without a sampling."""
    return News(RunReport("", {}, ()), heading)


def why_dense(report: RunReport) -> str:
    """Why no call was sparse, in a sentence; empty when one was."""
    if any(not record.reason for record in report.records):
        return ""
    reasons = report.dense_reasons()
    if reasons:
        return f"No call was sparse: {', '.join(f'{reason} ({count} calls)' for reason, count in reasons.items())}."
    if report.notes:
        return "No call was sparse: the notes say why."
    return (
        "No call was sparse: no attention call over a video was seen. Another node may compute attention itself, or a "
        "cache skipped the model."
    )


@dataclass(frozen=True)
class GenerationReport:
    """The report of one generation of a pipeline, which stays with its video.

    Args:
        made: what was done.
        queued: the entry of ComfyUI's queue in which it was; None where nobody says.
    """

    made: News
    queued: str | None = None

    def news(self, queued: str | None = None) -> News:
        """The run that this report was made with; whether that was for this entry of the queue stands above it."""
        if None in (queued, self.queued) or queued == self.queued:
            return self.made
        return replace(self.made, heading=" ".join(filter(None, [CACHED_VIDEO, self.made.heading])))
