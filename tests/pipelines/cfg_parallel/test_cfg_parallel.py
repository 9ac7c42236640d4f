"""Two processes that share guidance against one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launched import launch

from vidaccel import cfg_parallel
from vidaccel.pipelines.cfg_parallel.handle import READS_BETWEEN

SCRIPT = Path(__file__).with_name("cfg_processes.py")
# With a pass for each branch, that of a guider, a batch, and a batch whose samples have texts of their own.
FAST = ("WanPipeline", "HunyuanVideo15Pipeline", "CogVideoXPipeline", "MochiPipeline")
CACHES = ("first-block cache", "seacache", "taylorseer", "forecast")
STAYS = ("offloaded before", "offloaded after", "cache gone")
BESIDE = (
    *CACHES,
    "hooked",
    "hook stayed",
    *STAYS,
    "bfloat16",
    "autocast first",
    "autocast last",
    "no guidance",
    "forecast, no guidance",
    "two transformers",
    "compiled blocks",
    "copied",
    "restored",
    "from_pipe",
    "from_pipe, no guidance",
)


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> list[dict]:
    """What each of two processes made of every case: they start once, which takes longer than the cases."""
    return launch(SCRIPT, 2, tmp_path_factory.mktemp("cfg"), ",".join(FAST))


def check_family(made: tuple[dict, dict]) -> None:
    """One family in both processes."""
    for one in made:
        assert one["shared"].equal(one["again"]) and one["after"].equal(one["alone"])
        for shared, alone in (("shared", "alone"), ("other size", "other size, alone")):
            # In a batch of one sample products are added up in another order than in one of two.
            torch.testing.assert_close(one[shared], one[alone], atol=1e-3, rtol=1e-4)
    assert made[0]["shared"].equal(made[1]["shared"])


def test_families_give_the_video_of_one_process(launched):
    first, second = (process["families"] for process in launched)
    for case in first:
        check_family((first[case], second[case]))
    wan = [process["families"]["Wan-wan"] for process in launched]
    assert all(one["shared"].equal(one["alone"]) for one in wan)
    # What a pass gives is learned from the first one of a shape, so the second process computes one more.
    assert [one["note"] for one in wan] == [
        "transformer: 4 passes computed here, 4 by the other process",
        "transformer: 5 passes computed here, 3 by the other process",
    ]
    assert first["CogVideoX-cogvideox_5b"]["note"] == "transformer: 4 samples computed here, 4 by the other process"


@pytest.mark.slow
def test_all_families(tmp_path):
    first, second = (process["families"] for process in launch(SCRIPT, 2, tmp_path, "all"))
    refused = {case for case, made in first.items() if "refused" in made}
    for case in first.keys() - refused:
        check_family((first[case], second[case]))
    names = {case.partition("-")[0] for case in refused}
    assert {name for name in names if f"{name}Pipeline" not in READS_BETWEEN} == {
        "HunyuanSkyreelsImageToVideo",
        "HunyuanVideo",
        "HunyuanVideoFramepack",
        "HunyuanVideoImageToVideo",
    }
    assert all("Share the sequence instead" in first[case]["refused"] for case in refused)


def test_sparse_attention_before_and_after(launched):
    for process in launched:
        made = process["sparse"]
        for name in ("two passes", "a batch"):
            assert made[name, "accelerated before"].equal(made[name, "accelerated after"])
            torch.testing.assert_close(made[name, "accelerated before"], made[name, "alone"], atol=1e-4, rtol=1e-4)
            assert all(note.startswith(("backend auto", "tangent: ranked")) for note in made[name, "notes"])
    one, two = ({branch for _, branch, _ in process["sparse"]["two passes", "records"]} for process in launched)
    assert one == {"cond"} and two == {"cond", "uncond"}  # of the first step, where shapes are learned, both
    steps = [{step for step, _, _ in process["sparse"]["two passes", "records"]} for process in launched]
    assert steps == [{0, 1, 2, 3}] * 2


@pytest.mark.parametrize("what", BESIDE)
def test_beside_other_levers(launched, what):
    for process in launched:
        alone, shared = (process["beside"][what, how] for how in ("alone", "shared"))
        assert alone.isfinite().all() and shared.equal(alone)


def test_guidance_that_goes_in_the_middle_of_a_run(launched):
    for process in launched:
        for (*case, _), made in process["goes"].items():
            assert made.equal(launched[0]["goes"][*case, "alone"])


def test_restore_by_a_pipeline_that_shares_the_transformer_leaves_no_hook(launched):
    assert [process["beside"]["restored", "hooks"] for process in launched] == [[], []]


def test_forecasts_are_decided_by_both_branches(launched):
    """Each process would skip by its own branch, which is near enough in other steps."""
    found = [
        {key: made for (what, key), made in process["beside"].items() if what == "near forecasts"}
        for process in launched
    ]
    cases = sorted({key[:2] for key in found[0]})
    for one in found:
        for case in cases:
            assert one[*case, "shared", "skipped"] == one[*case, "alone", "skipped"]
            tolerance = 0.0 if case[0] == "two passes" else 1e-3
            torch.testing.assert_close(one[*case, "shared"], one[*case, "alone"], atol=tolerance, rtol=tolerance)
    for name in ("two passes", "a batch"):  # and that is not always the same
        assert len({str(found[0][*case, "shared", "skipped"]) for case in cases if case[0] == name}) > 1


@pytest.mark.parametrize("what", STAYS)
def test_it_stays_at_work(launched, what):
    """In the second call, too: of 16 passes in two, the second process computes one that the first one does."""
    assert [process["beside"][what, "note"] for process in launched] == [
        "transformer: 8 passes computed here, 8 by the other process",
        "transformer: 9 passes computed here, 7 by the other process",
    ]


def test_a_pipeline_that_shares_the_transformer_is_shared_as_it_guides(launched):
    for process in launched:
        others = 3 if process is launched[1] else 4  # one more is computed where shapes are learned
        assert process["beside"]["from_pipe", "note"].endswith(f", {others} by the other process")
        assert "call transformer with different latents" in process["beside"]["from_pipe", "seeds"]


def test_a_loop_of_ones_own_is_shared_as_the_pipeline_last_guided(launched):
    assert [process["beside"]["own loop", True] for process in launched] == [
        "transformer: 2 passes computed here, 2 by the other process",
        "transformer: 3 passes computed here, 1 by the other process",
    ]
    for process in launched:
        alone, why = process["beside"]["own loop", False].split("; ")
        assert alone == "transformer: 4 passes computed here, 0 by the other process"
        assert why.startswith("4 passes of the transformer were made outside of a call") and "in full" in why


def test_what_cannot_be_shared_is_refused_by_both(launched):
    for texts in (process["refusals"] for process in launched):
        assert "torchrun --nproc-per-node 2" in texts["no processes"]
        assert "this group has 1" in texts["one process"]
        assert "cfg-parallel already" in texts["twice"]
        assert "transformer_2 of this WanPipeline is cfg-parallel already" in texts["shared twice"]
        assert "shares its passes with another process" in texts["shared, then left out"]
        assert "Call remove() on its handle, apply the preset, and call cfg_parallel again" in texts["cache after"]
        assert "has a guidance cache" in texts["left out, then shared"]
        assert "call transformer with different latents" in texts["seeds"]
        for same in ("scales", "steps", "seeds of a batch"):
            assert "call transformer with different latents" in texts[same]
        assert texts["stopped"] == "stopped"
        assert texts["and goes on"] == texts["and goes on again"] == "True"
        assert "called transformer once" in texts["one pass"]
        assert "was put on transformer after cfg_parallel" in texts["hooked after"]
        assert "compile_repeated_blocks" in texts["compiled"]


def test_a_model_without_branches_is_refused(pipe):
    with pytest.raises(TypeError, match="no transformer that vidaccel knows"):
        cfg_parallel(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="torchrun"):
        cfg_parallel(pipe)


@pytest.mark.slow
def test_beside_ulysses(tmp_path):
    made = launch(SCRIPT, 4, tmp_path, "ulysses")
    assert [one["branch"] for one in made] == [0, 0, 1, 1]
    for one in made:
        torch.testing.assert_close(one["shared"], one["alone"], atol=2e-6, rtol=1e-5)
        assert one["shared"].equal(made[0]["shared"])
