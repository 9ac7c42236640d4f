"""Further arguments of a pipeline's call: held to the types of the real classes, and what a pipeline says to them."""

from __future__ import annotations

import pytest
import torch
from families import cogvideo, ltx

import vidaccel
from vidaccel.generation.errors import BadInput
from vidaccel.generation.requests.pipeline_options import admits, check_options
from vidaccel.generation.rows import ROWS
from vidaccel.pipelines.loading import call_arguments, call_defaults, call_types

SMALL = {"frames": 9, "height": 32, "width": 32, "steps": 2, "progress": False}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_types_of_every_class_are_known_and_admit_its_defaults(name, monkeypatch):
    cogvideo.without_opencv(monkeypatch)
    types = call_types(name)
    assert set(call_arguments(name)) <= set(types)
    odd = [
        argument
        for argument, default in call_defaults(name).items()
        if default is not None and not admits(types[argument], default)
    ]
    assert not odd


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("WanPipeline", {"max_sequence_length": "abc"}, "is max_sequence_length='abc': WanPipeline takes int there"),
        ("WanPipeline", {"max_sequence_length": True}, "is max_sequence_length=True: WanPipeline takes int"),
        ("WanPipeline", {"max_sequence_length": None}, "is max_sequence_length=None: WanPipeline takes int"),
        ("WanPipeline", {"max_sequence_length": 0}, "is max_sequence_length=0: it must be at least 1"),
        ("WanPipeline", {"attention_kwargs": 3}, r"is attention_kwargs=3: WanPipeline takes dict\[str, Any\] \| None"),
        ("WanPipeline", {"latents": 3}, r"is latents=3: WanPipeline takes torch.Tensor \| None there"),
        ("WanPipeline", {"num_videos_per_prompt": 2}, "a run makes one video. Run it again with another seed"),
        ("WanPipeline", {"output_type": "latent"}, "a run makes frames, which are written to the file .*Leave it out"),
        ("WanPipeline", {"callback_on_step_end": None}, "a run has its own, which counts the steps. Leave it out"),
        ("HunyuanVideoPipeline", {"true_cfg_scale": "6,0"}, "takes float there"),
        ("LTX2Pipeline", {"spatio_temporal_guidance_blocks": ["a"]}, r"takes list\[int\] \| None there"),
        ("HunyuanVideoFramepackPipeline", {"sampling_type": "f1"}, "takes 'vanilla' or 'inverted_anti_drifting'"),
        ("Cosmos3OmniPipeline", {"condition_video_keep": "all"}, "takes 'first' or 'last' there"),
        ("ChronoEditPipeline", {"enable_temporal_reasoning": True}, "is of no use: of five frames there are none"),
        ("HeliosPyramidPipeline", {"pyramid_num_inference_steps_list": [2, 2, 2]}, "steps decides it"),
    ],
)
def test_options_of_another_type_are_refused(name, options, message):
    with pytest.raises(BadInput, match=f"pipeline_options .*{message}"):
        check_options(options, ROWS[name])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("WanPipeline", {"max_sequence_length": 64, "attention_kwargs": {"scale": 1.0}, "latents": torch.zeros(1)}),
        ("HunyuanVideoPipeline", {"true_cfg_scale": 6, "sigmas": (1.0, 0.5), "prompt_2": None}),
        ("HunyuanVideoFramepackPipeline", {"sampling_type": "vanilla"}),
        ("CogVideoXPipeline", {"use_dynamic_cfg": True}),
    ],
)
def test_options_of_their_type_are_taken(name, options):
    check_options(options, ROWS[name])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_scale_2": 3}, "guidance_scale_2=3: the pipeline refuses it: .*boundary_ratio"),
    ],
)
def test_what_the_pipeline_itself_refuses_is_told_of_its_options(options, words):
    with pytest.raises(BadInput, match=f"^pipeline_options is {words}"):
        vidaccel.generate("demo", "a dot", **SMALL, pipeline_options=options)


def test_so_is_what_its_schedule_refuses():
    pipe = ltx.ltx()
    with pytest.raises(
        BadInput, match=r"^pipeline_options is timesteps=\[1000, 500\]: the pipeline refuses it: Only one"
    ):
        vidaccel.generate(pipe, "a dot", **SMALL, pipeline_options={"timesteps": [1000, 500]})


def test_what_goes_wrong_elsewhere_is_no_fault_of_the_options(monkeypatch):
    def broken(*_, **__):
        raise ValueError("a fault of the model")

    pipe = ltx.ltx()
    monkeypatch.setattr(pipe.transformer, "forward", broken)
    with pytest.raises(ValueError, match="^a fault of the model$"):
        vidaccel.generate(pipe, "a dot", **SMALL, pipeline_options={"decode_timestep": 0.05})
