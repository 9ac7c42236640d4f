"""`guidance_free` in real pipelines at tiny sizes: one pass a step, and nothing left behind."""

from __future__ import annotations

import copy
import inspect
import shutil
import threading
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from gft_adapters import write_adapter
from gft_calls import NO_TEXT, loaded, made, saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_dc import generate_dc, make_dc_pipe
from tiny_pipelines import cogvideox
from tiny_wan import make_pipe, make_scheduler, make_transformer

import vidaccel
from vidaccel import DCVideoGenPipeline
from vidaccel.pipelines.files.weight_files import transformer_files
from vidaccel.pipelines.guidance_free import GuidanceFreeError
from vidaccel.pipelines.loading import call_arguments


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=["gated", "plain"])
def adapter(request, tmp_path_factory, base) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return write_adapter(folder, base, make_transformer(), gated=request.param == "gated")


@pytest.fixture
def pipe(base) -> WanPipeline:
    return loaded(base)


def passes(pipe, part: str = "transformer") -> list[int]:
    """Counts the forward passes of a transformer from now on."""
    seen: list[int] = []
    getattr(pipe, part).register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def test_one_pass_a_step(pipe, adapter):
    seen = passes(pipe)
    made(pipe)
    assert len(seen) == 6
    with vidaccel.guidance_free(pipe, adapter):
        seen.clear()
        made(pipe)
        assert len(seen) == 3
    seen.clear()
    made(pipe)
    assert len(seen) == 6


def test_the_guidance_scale_is_told(pipe, adapter):
    """Each scale gives another video, that of 1 / scale; those up to 1 are no guidance."""
    with vidaccel.guidance_free(pipe, adapter) as handle:
        videos = {scale: made(pipe, scale) for scale in (0.5, 1.0, 2.0, 5.0)}
        assert handle.scale("transformer") == 5.0
    assert torch.equal(videos[0.5], videos[1.0])
    assert not torch.allclose(videos[1.0], videos[2.0]) and not torch.allclose(videos[2.0], videos[5.0])


def test_a_gated_adapter_is_nothing_without_guidance(tmp_path, base, pipe):
    before = made(pipe, 1.0)
    with vidaccel.guidance_free(pipe, write_adapter(tmp_path, base, make_transformer())):
        assert torch.equal(made(pipe, 1.0), before)
        assert not torch.allclose(made(pipe, 2.0), before)


def test_nothing_is_left_behind(pipe, adapter):
    before, cls = made(pipe), type(pipe)
    modules = [(name, type(module)) for name, module in pipe.transformer.named_modules()]
    handle = vidaccel.guidance_free(pipe, adapter)
    assert type(pipe).__name__ == cls.__name__ and isinstance(pipe, cls)
    assert inspect.signature(pipe.__call__) == inspect.signature(cls(None, None, None, pipe.scheduler).__call__)
    assert "guidance_scale" in call_arguments(type(pipe).__name__)
    assert not torch.allclose(made(pipe), before)
    assert "transformer.safetensors" in repr(handle)
    handle.remove()
    handle.remove()
    assert type(pipe) is cls and "removed" in repr(handle)
    assert [(name, type(module)) for name, module in pipe.transformer.named_modules()] == modules
    assert not pipe.transformer.condition_embedder.time_embedder._forward_hooks
    assert not any("guidance" in name and "vidaccel" in name for name in vars(pipe))
    assert torch.equal(made(pipe), before)


@pytest.mark.parametrize("first", ["accelerate", "guidance_free"])
def test_with_sparse_attention_in_either_order(pipe, adapter, first):
    """The same video either way, each step reported once, and either can be removed first."""
    before = made(pipe)
    method = vidaccel.Radial(schedule=vidaccel.DenseSchedule())
    with vidaccel.guidance_free(pipe, adapter), vidaccel.accelerate(pipe, method) as handle:
        wanted = made(pipe)
        assert {record.branch for record in handle.report().records} == {"cond"}
    if first == "accelerate":
        sparse, free = vidaccel.accelerate(pipe, method), vidaccel.guidance_free(pipe, adapter)
    else:
        free, sparse = vidaccel.guidance_free(pipe, adapter), vidaccel.accelerate(pipe, method)
    assert torch.equal(made(pipe), wanted)
    for handle in (sparse, free):
        handle.remove()
    assert torch.equal(made(pipe), before)


@pytest.mark.parametrize("first", ["style", "guidance_free"])
def test_beside_another_lora(pipe, adapter, first):
    """In either order and at the weight it has; each goes and leaves the other."""
    other = {n: -v for n, v in load_file(adapter).items() if "lora" in n}

    def style() -> None:
        pipe.load_lora_weights(other, adapter_name="style")
        pipe.set_adapters(["style"], [0.3])

    style()
    styled = made(pipe)
    with vidaccel.guidance_free(pipe, adapter, merge=False):
        wanted = made(pipe)
    pipe.unload_lora_weights()
    with vidaccel.guidance_free(pipe, adapter):
        plain = made(pipe)
    if first == "style":
        style()
    with vidaccel.guidance_free(pipe, adapter):
        if first != "style":
            made(pipe)
            style()
        torch.testing.assert_close(made(pipe), wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(wanted, styled, atol=1e-3)
        pipe.disable_lora()
        torch.testing.assert_close(made(pipe), plain)
        pipe.enable_lora()
    assert torch.equal(made(pipe), styled)


def test_a_copy_of_the_pipeline_has_its_own(pipe, adapter):
    handle = vidaccel.guidance_free(pipe, adapter)
    twin = copy.deepcopy(pipe)
    wanted = made(pipe, 2.0)
    assert not torch.allclose(made(pipe, 5.0), wanted, atol=1e-3)
    torch.testing.assert_close(made(twin, 2.0), wanted, atol=1e-4, rtol=1e-4)
    handle.remove()
    torch.testing.assert_close(made(twin, 2.0), wanted, atol=1e-4, rtol=1e-4)


def test_a_pipeline_of_its_class_has_no_adapter(tmp_path, pipe, adapter):
    with vidaccel.guidance_free(pipe, adapter):
        other = type(pipe).from_pipe(pipe)
        words = "WanPipeline has the class of a guidance-free one and no adapter: call remove"
        with pytest.raises(GuidanceFreeError, match=words):
            made(other)
        with pytest.raises(GuidanceFreeError, match=words):
            other.save_pretrained(tmp_path)


@pytest.mark.parametrize("merge", [None, False])
def test_a_pipeline_that_shares_the_transformer_is_the_base(pipe, adapter, merge):
    """Its two passes a step guide already; and without them it is what it was."""
    other = WanPipeline.from_pipe(pipe, scheduler=make_scheduler())
    other.set_progress_bar_config(disable=True)
    guided, plain = made(other), made(other, 1.0)
    with vidaccel.guidance_free(pipe, adapter, merge=merge) as handle:
        wanted = made(pipe)
        assert not wanted.equal(guided) and len(handle.notes()) == 1
        for _ in range(2):
            assert made(other).equal(guided) and made(other, 1.0).equal(plain)
            assert made(pipe).equal(wanted)
        assert "18 passes of other pipelines that share it were made without the adapter" in handle.notes()[1]
        with pytest.raises(RuntimeError, match="guidance-free already, of another pipeline that shares it"):
            vidaccel.guidance_free(other, adapter)
    assert made(other).equal(guided)


def test_another_thread_does_not_change_the_weights_of_a_pass(pipe, adapter):
    other = WanPipeline.from_pipe(pipe, scheduler=make_scheduler())
    errors = []

    def call() -> None:
        with pytest.raises(GuidanceFreeError) as raised:
            made(other)
        errors.append(str(raised.value))

    def elsewhere(*_) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with vidaccel.guidance_free(pipe, adapter):
        wanted = made(pipe)
        hook = pipe.transformer.blocks[0].register_forward_hook(elsewhere)
        assert made(pipe).equal(wanted)
        hook.remove()
    assert len(errors) == 3 and all("called by two threads at once" in text for text in errors)


def test_a_pass_that_needs_no_change_does_not_hide_another(pipe, adapter):
    """Two threads make passes of the base; the second one then wants the adapter, while the first is in its pass."""
    first, second = (WanPipeline.from_pipe(pipe, scheduler=make_scheduler()) for _ in range(2))
    for other in (first, second):
        other.set_progress_bar_config(disable=True)
    with vidaccel.guidance_free(pipe, adapter):
        wanted = made(first)
        right = made(second)
        errors, mades = [], []

        def call() -> None:
            mades.append(made(second))
            with pytest.raises(GuidanceFreeError) as raised:
                made(pipe)
            errors.append(str(raised.value))

        def elsewhere(*_) -> None:
            if not errors and threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=call)
                thread.start()
                thread.join()

        hook = pipe.transformer.blocks[0].register_forward_hook(elsewhere)
        assert made(first).equal(wanted)
        hook.remove()
    assert len(errors) == 1 and "called by two threads at once" in errors[0] and mades[0].equal(right)


def test_two_transformers(tmp_path):
    """An adapter for each, and the second has its own scale; both or none."""
    folder = saved(tmp_path / "two", transformer_2=make_transformer(1), boundary_ratio=0.9)
    pipe = loaded(folder)
    files = [write_adapter(tmp_path, folder, getattr(pipe, part), part) for part in ("transformer", "transformer_2")]
    with pytest.raises(GuidanceFreeError, match="has transformer and transformer_2, .* give one for each transformer"):
        vidaccel.guidance_free(pipe, files[0])
    assert not getattr(pipe.transformer, "peft_config", None)
    before = made(pipe, guidance_scale_2=3.0)
    with vidaccel.guidance_free(pipe, files) as handle:
        seen = [passes(pipe, part) for part in ("transformer", "transformer_2")]
        after = made(pipe, guidance_scale_2=3.0)
        assert [handle.scale(part) for part in ("transformer", "transformer_2")] == [5.0, 3.0]
        assert sum(map(len, seen)) == 3 and all(seen)
        assert not torch.allclose(after, made(pipe))
        with pytest.raises(GuidanceFreeError, match="guidance_scale is 7"):
            made(pipe, guidance_scale_2=7.0)
    assert torch.equal(made(pipe, guidance_scale_2=3.0), before)


def test_dc_videogen(tmp_path):
    make_dc_pipe(DCVideoGenPipeline).save_pretrained(tmp_path / "dc")
    pipe = DCVideoGenPipeline.from_pretrained(tmp_path / "dc", **NO_TEXT)
    pipe.set_progress_bar_config(disable=True)
    file = write_adapter(tmp_path, tmp_path / "dc", pipe.transformer)
    seen, before = passes(pipe), generate_dc(pipe, guidance_scale=4.0)
    assert len(seen) == 4
    with vidaccel.guidance_free(pipe, file):
        seen.clear()
        embeds = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(9))
        given = {"prompt": None, "prompt_embeds": embeds}
        one, two = (generate_dc(pipe, guidance_scale=scale, **given) for scale in (4.0, 2.0))
        assert len(seen) == 4
    assert not torch.allclose(one, two)
    assert torch.equal(generate_dc(pipe, guidance_scale=4.0), before)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_calls_that_it_cannot_do(pipe, adapter):
    embeds = torch.randn(1, 6, 16)
    with vidaccel.guidance_free(pipe, adapter) as handle:
        with pytest.raises(GuidanceFreeError, match='"blurry" is baked into transformer.safetensors'):
            made(pipe, negative_prompt_embeds=embeds)
        with pytest.raises(GuidanceFreeError, match="negative_prompt is of no use"):
            made(pipe, negative_prompt="ugly")
        with pytest.raises(GuidanceFreeError, match="guidance_scale is 6.5: .* was trained up to 6"):
            made(pipe, 6.5)
        made(pipe, 6.0)
        handle.check_call("blurry", None)
        handle.check_call(["", "blurry"], None)
        with pytest.raises(RuntimeError, match="is guidance-free already"):
            vidaccel.guidance_free(pipe, adapter)


def test_another_base(tmp_path, base, adapter):
    """Other weights, another shape in memory than in the files, or no files."""
    other = saved(tmp_path / "other", transformer=make_transformer(3))
    with pytest.raises(GuidanceFreeError, match="this transformer has other weights: give the model"):
        vidaccel.guidance_free(loaded(other), adapter)
    changed = loaded(base)
    changed.transformer.register_to_config(patch_size=(1, 1, 1))
    with pytest.raises(GuidanceFreeError, match="has other weights"):
        vidaccel.guidance_free(changed, adapter)
    other.joinpath("transformer/diffusion_pytorch_model.safetensors").rename(
        other / "transformer/diffusion_pytorch_model.bf16.safetensors"
    )
    base_of_variant = tmp_path / "variant"
    shutil.copytree(base, base_of_variant)
    folder = base_of_variant / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bf16.safetensors")
    assert transformer_files(str(base_of_variant)) == transformer_files(str(base)) != transformer_files(str(other))
    unknown = make_pipe()
    with pytest.raises(GuidanceFreeError, match="cannot be told: .* give that folder with base="):
        vidaccel.guidance_free(unknown, adapter)
    vidaccel.guidance_free(unknown, adapter, base=base).remove()
    assert type(unknown) is WanPipeline


def test_files_that_are_no_adapters(tmp_path, base, pipe, adapter):
    plain = write_adapter(tmp_path, base, make_transformer(), recipe="lora")
    with pytest.raises(GuidanceFreeError, match="of the recipe lora: give one that the recipe gft or consistency made"):
        vidaccel.guidance_free(pipe, plain)
    file = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(GuidanceFreeError, match="not written by this package's trainer"):
        vidaccel.guidance_free(pipe, file)
    with pytest.raises(GuidanceFreeError, match="is no adapter that can be read"):
        vidaccel.guidance_free(pipe, tmp_path / "gone")
    with pytest.raises(GuidanceFreeError, match="its header lacks 'max_scale'"):
        vidaccel.guidance_free(pipe, write_adapter(tmp_path, base, make_transformer(), guidance_free={}))


def test_one_that_cannot_be_loaded_leaves_nothing(tmp_path, base, pipe):
    before = made(pipe)
    file = write_adapter(tmp_path, base, make_transformer())
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("lora_B.weight"))
    save_file({**tensors, name: tensors[name][:-1].clone()}, file, header)
    with pytest.raises(GuidanceFreeError, match="transformer.safetensors cannot be loaded"):
        vidaccel.guidance_free(pipe, file)
    assert torch.equal(made(pipe), before) and not getattr(pipe.transformer, "peft_config", None)


@pytest.mark.parametrize("what", ["flat", "half", "NaN", "whole numbers"])
def test_damaged_files_are_told_with_their_tensor(what, tmp_path, base, pipe):
    before = made(pipe)
    file = write_adapter(tmp_path, base, make_transformer())
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors, embedder = load_file(file), "beta_embedder.linear.weight"
    half = next(name for name in tensors if "lora_A" in name)
    told = {
        "flat": f"has {embedder} of the shape ",
        "half": f"has {half.replace('lora_A', 'lora_B')} without {half}",
        "NaN": f"has values in {embedder} that are NaN or infinite",
        "whole numbers": f"has {half} in torch.int32",
    }
    if what == "half":
        del tensors[half]
    else:
        name, change = {
            "flat": (embedder, lambda x: x.flatten()),
            "NaN": (embedder, lambda x: x * torch.nan),
            "whole numbers": (half, lambda x: x.int()),
        }[what]
        tensors[name] = change(tensors[name])
    save_file(tensors, file, header)
    with pytest.raises(GuidanceFreeError, match=f"^{file} {told[what]}"):
        vidaccel.guidance_free(pipe, file)
    assert made(pipe).equal(before)


def test_a_pipeline_without_a_slot(adapter):
    other, _ = cogvideox()
    with pytest.raises(GuidanceFreeError, match="a CogVideoXTransformer3DModel has no free slot for beta"):
        vidaccel.guidance_free(other, adapter)
