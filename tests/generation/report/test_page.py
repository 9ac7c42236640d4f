"""The numbers are those of torchmetrics and of the records, and the page shows them."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vidaccel.attention.account.records import percent
from vidaccel.generation.machine import version_of
from vidaccel.generation.report.comparison import Comparison, GeneratedVideo, compare, mean_psnr
from vidaccel.generation.report.page import (
    cluster_deciles,
    format_psnr,
    format_seconds,
    heat_maps,
    summary,
    temporal_share,
    write_html,
    write_json,
)


def test_identical_videos(clip):
    metrics = compare(clip, clip.copy())
    assert metrics.psnr == (math.inf,) * 6
    assert metrics.ssim == (1.0,) * 6
    assert metrics.identical_frames == 6
    assert metrics.mean_psnr == math.inf


def test_a_mean_is_over_what_differs():
    assert mean_psnr([math.inf, 20.0, 30.0]) == 25
    assert mean_psnr([math.inf]) == math.inf
    assert math.isnan(mean_psnr([math.inf, math.nan, 30.0]))


def test_known_distance():
    """Every value off by 16 of 255: PSNR is 20 log10(255 / 16) = 24.05 dB, whatever the picture."""
    a = np.random.default_rng(0).integers(0, 200, (3, 32, 32, 3), dtype=np.uint8)
    metrics = compare(a, a + 16)
    assert metrics.psnr == pytest.approx((20 * math.log10(255 / 16),) * 3, abs=1e-3)


def test_known_noise():
    """Gaussian noise of sigma 8: the mean squared error is 64."""
    generator = np.random.default_rng(0)
    a = np.full((2, 256, 256, 3), 128, np.uint8)
    noisy = (a + generator.normal(0, 8, a.shape)).round().clip(0, 255).astype(np.uint8)
    metrics = compare(a, noisy)
    assert metrics.mean_psnr == pytest.approx(20 * math.log10(255 / 8), abs=0.05)
    assert metrics.mean_ssim < 0.5


def test_equal_to_torchmetrics(clip):
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    other = np.roll(clip, 3, axis=2)
    metrics = compare(clip, other)
    for index in range(len(clip)):
        target, preds = (
            torch.tensor(x[index] / 255.0, dtype=torch.float64).movedim(-1, 0)[None] for x in (clip, other)
        )
        assert metrics.psnr[index] == pytest.approx(
            float(PeakSignalNoiseRatio(data_range=1.0)(preds, target)), abs=1e-4
        )
        expected = float(StructuralSimilarityIndexMeasure(data_range=1.0)(preds, target))
        assert metrics.ssim[index] == pytest.approx(expected, abs=1e-4)


def test_a_mean_over_the_frames_that_differ(clip):
    """One identical frame does not make the mean infinite."""
    other = clip.copy()
    other[1:] = np.where(clip[1:] > 100, clip[1:] - 16, clip[1:] + 16)
    metrics = compare(clip, other)
    assert metrics.identical_frames == 1
    assert metrics.mean_psnr == pytest.approx(20 * math.log10(255 / 16), abs=1e-3)


def test_what_cannot_be_compared(clip):
    with pytest.raises(ValueError, match="one shape"):
        compare(clip, clip[:3])
    with pytest.raises(ValueError, match="at least 11x11"):
        compare(clip[:, :8, :8], clip[:, :8, :8])
    dense = GeneratedVideo("dense", clip, 1.0)
    with pytest.raises(ValueError, match="two or more videos"):
        Comparison("", (dense,), 1, {}, {}, "")


def test_what_the_records_say(reports):
    share = temporal_share(reports["svg"])
    assert share.shape == (2, 3)
    assert np.isnan(share[:, 0]).all()  # the dense step knows no head kinds
    assert (share[:, 1:] == 0.25).all()
    assert temporal_share(reports["svg2"]) is None
    deciles = cluster_deciles(reports["svg2"])
    assert deciles["query"].shape == (8, 11)
    assert np.allclose(deciles["query"], np.arange(0, 101, 10))
    assert cluster_deciles(reports["svg"]) is None


def test_what_a_notebook_shows(comparison, clip, reports, monkeypatch):
    """A line each, and in a notebook the videos: the arrays and the records of all calls fill pages."""
    made = comparison(svg=np.roll(clip, 1, 2))
    dense, svg = made.videos
    size = "6 frames of 48x32, 8 frames per second"
    assert repr(dense) == f"<vidaccel video dense: {size}, made in {dense.seconds:.3g} s>"
    assert re.fullmatch(rf"<vidaccel video svg: {size}, made in [\d.]+ s, density 0\.\d\d>", repr(svg))
    psnr = f"PSNR {made.metrics['svg'].mean_psnr:.1f} dB"
    told = f"dense {dense.seconds:.3g} s; svg {svg.seconds:.3g} s, {psnr}; files {made.files[0]}, {made.files[1]}"
    assert repr(made) == f"<vidaccel comparison: {told}>"
    assert "; svg 2 s, identical to dense;" in re.sub(r"svg [\d.]+ s", "svg 2 s", repr(comparison(svg=clip)))
    assert repr(reports["svg"]) == "<vidaccel report of svg: 12 calls, mean density 0.500; print it for a table>"
    assert repr(replace(reports["svg"], records=())).endswith("no call yet; print it for a table>")
    assert str(reports["svg"]).count("\n") > 3
    page = made._repr_html_()
    assert page.count('<video src="data:video/mp4;base64,') == 2
    assert f"<figcaption>svg {svg.seconds:.3g} s, {psnr}</figcaption>" in page
    assert dense._repr_html_().count("<video") == 1
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/such/ffmpeg")
    assert dense._repr_html_() is None  # IPython shows the line then


def test_the_numbers_of_a_comparison(comparison, clip, tmp_path):
    made = comparison(svg=clip, svg2=np.roll(clip, 1, axis=1))
    numbers = json.loads(write_json(made, tmp_path / "report.json").read_text())
    assert numbers == json.loads(json.dumps(summary(made, tmp_path), allow_nan=False)) and numbers["version"] == 1
    dense, svg, svg2 = numbers["videos"]
    assert dense["times_faster_than_dense"] == 1
    assert svg["times_faster_than_dense"] == 2
    # JSON has no infinity.
    assert svg["against_dense"]["psnr"] == [None] * 6
    assert svg["against_dense"]["psnr_mean"] is None
    assert svg["against_dense"]["identical_frames"] == 6
    assert svg2["against_dense"]["psnr_mean"] == pytest.approx(made.metrics["svg2"].mean_psnr)
    attention = svg2["attention"]
    assert attention["mean_density"] == pytest.approx((1 + 0.25 + 0.25) / 3)
    assert attention["density_layers_x_steps"] == [[1, 0.25, 0.25]] * 2
    assert attention["plan_seconds"] == pytest.approx(8 * 0.5)
    assert attention["attention_seconds"] == pytest.approx(12 * 0.25)
    assert attention["dense_calls"] == {"first steps": 4}
    assert attention["backends"] == {"dense": 4, "flex": 8}
    assert attention["key_cluster_size_deciles"] == [5] * 11
    assert svg["attention"]["temporal_head_share"] == 0.25


def test_the_numbers_name_videos_as_from_their_own_folder(comparison, clip, tmp_path):
    """They may lie elsewhere, be named as from where the command ran, or be seen through a link."""
    (tmp_path / "pages" / "of today").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "pages" / "of today", target_is_directory=True)
    made = comparison(svg=clip)
    for place in ("pages/of today", "link", "."):
        numbers = write_json(made, tmp_path / place / "report.json")
        files = [numbers.parent / video["file"] for video in json.loads(numbers.read_text())["videos"]]
        assert not any(Path(video["file"]).is_absolute() for video in json.loads(numbers.read_text())["videos"])
        assert all(file.samefile(other) for file, other in zip(files, made.files, strict=True))
    assert json.loads((tmp_path / "report.json").read_text())["videos"][0]["file"] == "dense.mp4"


def test_the_page(comparison, clip, tmp_path):
    page = write_html(
        comparison("1 < 2 & 'x'", svg=clip, svg2=np.roll(clip, 1, axis=1)), tmp_path / "p.html"
    ).read_text()
    text = " ".join(re.sub(r"<(style|script).*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL).split())
    assert "1 &lt; 2 &amp; &#39;x&#39;" in text
    assert "6 frames of 48x32, 36 tokens in self-attention" in text
    # 8 s against 4 s in all, 7.5 s against 3.5 s without the decoding.
    assert "svg 4.0 s 2.00 identical 1.000 50 % 3.5 s 2.14 4.0 s 3.0 s 500 ms 3.0 s" in text
    assert (
        "8 of 12 calls were sparse, at a mean density of 25.0 %. "
        "Dense: first steps (4). Computed by dense (4), flex (8)." in text
    )
    assert "flex cannot do &lt;this&gt;: gather took over" in text
    assert "Nothing fell back." in text  # svg has no notes
    assert "smallest 0, median 50, largest 100" in text
    assert page.count('src="data:video/mp4;base64,') == 3


def test_a_page_with_bytes_that_are_no_text(comparison, clip, tmp_path):
    """As the names of files may hold, and then the command line in the page."""
    made = replace(comparison(svg=clip), command="vidaccel generate --out caf\udce9.mp4")
    write_json(made, tmp_path / "p.json")
    assert "--out caf?.mp4</pre>" in write_html(made, tmp_path / "p.html").read_text("utf-8")


def test_a_psnr_that_leaves_frames_out_says_so(comparison, clip, tmp_path):
    """It is the mean over the frames that differ; with all of them, the infinite ones would be the mean."""
    from vidaccel.cli.terminal import print_summary

    other = np.roll(clip, 1, axis=1)
    other[:4] = clip[:4]
    page = write_html(made := comparison(svg=other), tmp_path / "p.html").read_text()
    told = f"{made.metrics['svg'].mean_psnr:.1f} dB (4 identical)"
    assert page.count(told) == 2 and "PSNR over those that differ, and in brackets how many are identical" in page
    assert f"PSNR {made.metrics['svg'].mean_psnr:.1f} dB over the frames that differ (4 identical)" in repr(made)
    files = {video.name: file for video, file in zip(made.videos, made.files, strict=True)}
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as shown:
        patch.setenv("COLUMNS", "400")
        patch.setattr("sys.stdout", shown)
        print_summary(list(made.videos), files, made)
        assert told in shown.getvalue() and "PSNR is the mean over the frames that differ" in shown.getvalue()
    assert "identical" not in repr(comparison(svg=np.roll(clip, 1, axis=1)))
    page = write_html(comparison(svg=np.roll(clip, 1, axis=1)), tmp_path / "p.html").read_text()
    assert "identical)" not in page


def test_a_page_without_warm_up(comparison, clip, tmp_path):
    made = comparison(svg=clip)
    videos = tuple(replace(v, warm_up_seconds=None, step_seconds=None) for v in made.videos)
    made = replace(made, videos=videos)
    page = write_html(made, tmp_path / "page.html").read_text()
    assert "warm-up" not in page
    assert "one step was made and not counted" not in page


def test_figures_take_the_colour_of_the_page(reports):
    from vidaccel.generation.report.figures import INK, figure_svg, heat_map, line_chart, quantile_chart

    figures = [
        heat_map(reports["svg"].density_map(), "density"),
        line_chart({"svg": (math.inf, 30.0, 31.0), "svg2": (math.inf,) * 3}, "PSNR (dB)", least_span=2),
        quantile_chart(cluster_deciles(reports["svg2"])),
    ]
    for index, figure in enumerate(figures):
        svg = figure_svg(figure, f"f{index}")
        assert svg.startswith("<svg")
        assert "currentColor" in svg
        assert INK not in svg
        assert "http" not in svg
        assert not re.search(r'^<svg[^>]* (width|height)="', svg)
        assert all(i.startswith(f"f{index}-") for i in re.findall(r'\bid="([^"]+)"', svg))


@pytest.mark.parametrize(
    "names",
    [
        ["tangent", "svg2", "radial"],
        [f"svg2-top_p=0.{digit}" for digit in range(1, 8)],
        ["tangent-tolerance=0.1-k_clusters=64", "tangent-tolerance=0.2-k_clusters=64", "tangent-density=0.7"],
        ["svg2-top_p=0.9-density=0.25-first_steps=0.3-init_iterations=20-recluster_every=3", "radial"],
        ["x" * 200],
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_legend_leaves_the_chart_its_room(names):
    """However long the names are: matplotlib warned, and what was drawn was cut off."""
    from vidaccel.generation.report.figures import line_chart

    figure = line_chart({name: (40.0, 41.5) for name in names}, "PSNR (dB)", least_span=2)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = axes.get_legend()
    box = legend.get_window_extent()
    assert box.x0 > 0 and box.x1 < figure.bbox.width and axes.bbox.y1 < box.y0 and box.y1 < figure.bbox.height
    assert axes.bbox.width > 0.8 * figure.bbox.width and axes.bbox.height > 0.65 * 2.9 * figure.dpi
    assert ["".join(text.get_text().split("\n")) for text in legend.get_texts()] == names
    assert figure.get_size_inches()[0] == 4.9, "all charts of a page are as wide"


def test_formats():
    assert [format_seconds(s) for s in (None, 0.0421, 3.14159, 119.9, 754)] == [
        "–",
        "42 ms",
        "3.1 s",
        "119.9 s",
        "12 min 34 s",
    ]
    rounded = {0.9994: "999 ms", 0.9996: "1.0 s", 119.97: "2 min 0 s", 179.7: "3 min 0 s", 3599.8: "60 min 0 s"}
    assert {s: format_seconds(s) for s in rounded} == rounded
    assert [format_psnr(v) for v in (None, math.inf, 27.345)] == ["–", "identical", "27.3 dB"]
    assert [format_psnr(*v) for v in ((27.345, 3), (math.inf, 6))] == ["27.3 dB (3 identical)", "identical"]


class TestMeasuredErrors:
    @pytest.fixture
    def made(self, comparison, clip, measured):
        """A comparison with a measured method beside one that was not measured."""
        made = comparison(svg=clip, svg2=np.roll(clip, 1, axis=1))
        videos = [replace(v, report=measured) if v.name == "svg2" else v for v in made.videos]
        return replace(made, videos=tuple(videos))

    def test_the_page_has_maps_and_a_headline(self, made, tmp_path):
        page = write_html(made, tmp_path / "p.html").read_text()
        text = " ".join(re.sub(r"<(style|script).*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL).split())
        assert (
            "Measured error of the output in 8 sparse calls: median 1.0 %, worst 9.0 % in layer 1 at step 2 (cond); "
            "the method itself predicted a median of 0.50 %, and 4.5 % there. Measuring took 1.0 s." in text
        )
        assert text.count("Error per layer and step") == text.count("Predicted error per layer and step") == 1
        assert "density median error denoising" in text and " 50 % 1.0 % 3.5 s " in text and " 50 % – 3.5 s " in text

    def test_a_page_without_a_meter_has_none_of_it(self, comparison, clip, tmp_path):
        page = write_html(comparison(svg=clip), tmp_path / "p.html").read_text()
        assert "easuring" not in page and "rror per layer" not in page and "rror of the output" not in page

    def test_the_numbers(self, made, tmp_path):
        numbers = json.loads(write_json(made, tmp_path / "report.json").read_text())
        dense, svg, svg2 = numbers["videos"]
        assert "attention" not in dense and "error" not in svg["attention"]
        assert svg2["attention"]["error"] == {
            "median": pytest.approx(0.01),
            "worst": {
                "model": "transformer",
                "layer": 1,
                "step": 2,
                "branch": "cond",
                "error": 0.09,
                "predicted": 0.045,
            },
            "calls": 8,
            "seconds": 1.0,
            "layers_x_steps": [[None, 0.01, 0.01], [None, 0.01, 0.09]],
            "predicted_layers_x_steps": [[None, 0.005, 0.005], [None, 0.005, 0.045]],
        }

    def test_errors_and_predictions_have_one_scale(self, measured):
        density, error, predicted = heat_maps(measured)
        assert (density.top, error.top, predicted.top) == (1.0, 0.09, 0.09)
        assert predicted.label == "predicted error" and predicted.values[1].tolist()[1:] == [0.005, 0.045]

    def test_what_a_method_measured_itself_is_told_without_a_meter(self, measured, comparison, clip, tmp_path):
        records = [
            replace(r, error=None, error_seconds=0.0, details={"predicted_error": [0.04], "error_is_measured": True})
            for r in measured.records
        ]
        report = replace(measured, records=(*measured.records[:1], *records[1:]))
        made = comparison(svg=clip)
        made = replace(made, videos=(made.videos[0], replace(made.videos[1], report=report)))
        numbers = json.loads(write_json(made, tmp_path / "r.json").read_text())["videos"][1]["attention"]
        assert "error" not in numbers and numbers["error_measured_by_method"]["median"] == 0.04
        page = write_html(made, tmp_path / "r.html").read_text()
        assert "on the queries that the method measured: median 4.0 %" in page and "Measuring took" not in page
        assert [one.label for one in heat_maps(report)] == ["density", "error as the method measured it"]

    def test_what_is_no_number_is_null(self, measured, comparison, clip, tmp_path):
        broken = replace(measured, records=tuple(replace(r, error=math.nan) for r in measured.records))
        made = comparison(svg=clip)
        videos = (made.videos[0], replace(made.videos[1], report=broken))
        numbers = json.loads(write_json(replace(made, videos=videos), tmp_path / "r.json").read_text())
        assert numbers["videos"][1]["attention"]["error"]["median"] is None
        assert "median nan %" in write_html(replace(made, videos=videos), tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0, "0 %"), (0.000_034, "0.0034 %"), (0.00123, "0.12 %"), (0.0249, "2.5 %"), (0.123, "12 %"), (1.5, "150 %")],
)
def test_percents_have_two_digits_that_count(share, shown):
    assert percent(share) == shown


def test_a_package_whose_distribution_has_another_name_has_its_version(tmp_path, monkeypatch):
    """As triton is `pytorch-triton-rocm` on ROCm, and `triton-windows` on Windows."""
    (tmp_path / "triangles").mkdir()
    facts = tmp_path / "pytorch_triangles_rocm-3.9.1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: pytorch-triangles-rocm\nVersion: 3.9.1\n")
    (facts / "top_level.txt").write_text("triangles\n")
    assert version_of("triangles") == "not installed"
    monkeypatch.syspath_prepend(str(tmp_path))
    assert version_of("triangles") == "3.9.1"
