"""The folder of a training in the place of its adapter, for all that takes one; and what is refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vidaccel import SLA
from vidaccel.generation.errors import BadInput
from vidaccel.generation.levers.adapter_places import taken_notes
from vidaccel.generation.levers.guidance import guidance_adapters
from vidaccel.generation.levers.loras import lora_files
from vidaccel.generation.levers.sla import sla_adapters
from vidaccel.lora.adapters.lora_file import lora_path
from vidaccel.lora.config import ConfigError
from vidaccel.nodes.adapter_files import state_of
from vidaccel.nodes.pipeline.loras import Lora
from vidaccel.pipelines.acceleration.sla_weights import TrainedSLA
from vidaccel.pipelines.files.adapter_header import facts_of
from vidaccel.pipelines.files.run_folder import FILE, NoAdapter, adapter_path, chosen_adapter, model_path, taken
from vidaccel.pipelines.length.adapter_file import read_length
from vidaccel.pipelines.length.trained import LengthError
from vidaccel.pipelines.loras.files import LoraError, LoraFile, attach_loras

BASE = {"base": "tiny", "base_hash": "0", "part": "transformer", "rank": 2, "unconditional": ""}
TRAINED = TrainedSLA.of(SLA(topk=0.5, block=(8, 8)), (), "tiny", "0").facts()


def write(folder: Path, recipe: str = "gft", **facts) -> Path:
    """An adapter with a header and next to no weights, as a run has it in its folder or in that of a checkpoint."""
    header = {"recipe": recipe, **BASE, "guidance_free": {"max_scale": 6.0, "gated": True}, **facts}
    (folder / "adapter").mkdir(parents=True)
    file = folder / "adapter" / FILE
    save_file({"beta_embedder.linear.weight": torch.zeros(2, 2)}, file, {"vidaccel": json.dumps(header)})
    return file


def checkpoint(run: Path, step: int, order: int | None, recipe: str = "gft") -> Path:
    file = write(run / "checkpoints" / f"step_{step:08d}", recipe)
    if order is not None:  # else of a checkpoint of which the adapter alone was kept
        (file.parent.parent / "checkpoint.json").write_text(json.dumps({"order": order}))
    return file


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run that has just begun."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("recipe: gft\n")
    return folder


def test_the_adapter_of_a_run_is_its_result_or_that_of_its_newest_checkpoint(run):
    """Newest by the order in which they were written: after a resume, higher steps may be the older ones."""
    for step, order in ((100, None), (300, 3), (200, 4)):
        newest = checkpoint(run, step, order)
        assert adapter_path(run) == adapter_path(run / "checkpoints") == newest
    assert adapter_path(newest.parent) == adapter_path(newest.parent.parent) == adapter_path(newest) == newest
    result = write(run)
    assert adapter_path(run) == adapter_path(str(run)) == result
    assert facts_of(run)["recipe"] == "gft"


def test_which_file_was_taken_is_told_where_the_place_does_not_name_it(run, caplog):
    file = checkpoint(run, 7, 1)
    told = f"{run} is the folder of a training: its checkpoints/step_00000007/adapter/{FILE} is used."
    with caplog.at_level("INFO"):
        assert chosen_adapter(run) == file
    assert caplog.messages == [told] == [taken(run, file)] == taken_notes([file, run], [LoraFile(file)] * 2)
    assert taken_notes(f"transformer:{run}=0.5", [LoraFile(file.parent)]) == [told]
    assert taken_notes(True, guidance_adapters(file)) == taken_notes((), ()) == []
    assert taken(file, file) == taken(file.parent, file) == ""


def test_every_function_that_takes_an_adapter_takes_the_run(run, tmp_path):
    file = checkpoint(run, 5, 1)
    for given in (run, [str(run)]):
        assert [adapter.path for adapter in guidance_adapters(given)] == [file]
    assert lora_path(run, "lora.start") == file
    assert state_of(run) == state_of(file) != state_of(run / "config.yaml")
    sla = write(tmp_path / "sla", "sla", sla=TRAINED)
    assert [adapter.path for adapter in sla_adapters(tmp_path / "sla", ["sla"])] == [sla]
    lora = write(tmp_path / "lora", "lora")
    assert [found.path for found in lora_files(tmp_path / "lora")] == [lora.parent]
    assert Lora(tmp_path / "lora").path == lora.parent
    with pytest.raises(LengthError, match=f"{FILE} is a LoRA of the recipe gft: give one that the recipe length made"):
        read_length(run)


def refused(read, place: Path, error: type[Exception]) -> str:
    with pytest.raises(error) as raised:
        read(place)
    return str(raised.value)


READERS = {
    "generate --guidance-free": (guidance_adapters, BadInput),
    "generate --sla": (lambda place: sla_adapters(place, ["sla"]), BadInput),
    "generate --lora": (lora_files, BadInput),
    "lora.start": (lambda place: lora_path(place, "lora.start"), ConfigError),
    "lengthen": (read_length, LengthError),
    "a preset": (lambda place: attach_loras(_TakesLoras(), [LoraFile(place)]), LoraError),
}


class _TakesLoras:
    def load_lora_weights(self, *args, **options):
        raise AssertionError("nothing is to be loaded")


@pytest.mark.parametrize("reader", READERS)
def test_a_run_without_an_adapter_says_so(run, reader):
    read, error = READERS[reader]
    told = f"{run} is the folder of a training that has written no adapter yet: the first checkpoint has one"
    assert told in refused(read, run, error)
    assert facts_of(run) == {} and state_of(run) is None


def test_the_model_of_a_run_is_its_result_or_the_adapted_one_of_its_newest_checkpoint(run, tmp_path):
    with pytest.raises(NoAdapter, match="has written no model"):
        (run / "checkpoints").mkdir()
        model_path(run)
    for step, order in ((100, 2), (200, 1)):
        folder = checkpoint(run, step, order).parent
        (folder / "adapter.json").write_text("{}")
    newest = run / "checkpoints" / "step_00000100" / "adapter"
    assert model_path(run) == newest and model_path(newest) == newest
    assert taken(run, newest).endswith("its checkpoints/step_00000100/adapter is used.")
    (run / "pipeline").mkdir()
    (run / "pipeline" / "model_index.json").write_text("{}")
    assert model_path(run) == model_path(run / "pipeline") == run / "pipeline"
    assert model_path("demo") == Path("demo") and model_path(tmp_path) == tmp_path
    other = tmp_path / "lora"
    write(other)
    with pytest.raises(NoAdapter, match="whose result is an adapter, .*adapter: give that beside the model"):
        model_path(other)


def test_a_damaged_checkpoint_may_be_the_newest(run):
    for step in (1, 2):
        checkpoint(run, step, step)
    (run / "checkpoints" / "step_00000002" / "checkpoint.json").write_text('{"order": 2')
    with pytest.raises(
        NoAdapter, match=r"step_00000002 is damaged \(checkpoint.json cannot be read\) and may be the newest"
    ):
        adapter_path(run)
    assert adapter_path(run / "checkpoints" / "step_00000001" / "adapter").is_file()


def test_folders_of_others_that_are_called_checkpoints_are_not_a_run_s(tmp_path):
    """It took a published model in a folder of that name, or with one in it, for a training without a model."""
    for place in (tmp_path / "checkpoints", tmp_path / "model"):
        (place / "checkpoints" / "step_of_another_tool").mkdir(parents=True)
        (place / "config.json").write_text("{}")
        assert model_path(place) == adapter_path(place) == place
    named = tmp_path / "runs" / "checkpoints"  # the folder of a run
    saved = checkpoint(named, 5, 1).parent.parent
    assert adapter_path(named) == adapter_path(named / "checkpoints") == saved / "adapter" / FILE
    shutil.rmtree(saved / "adapter")
    with pytest.raises(NoAdapter, match="has written no model"):
        model_path(named)


def test_what_ae_adapt_made_is_taken_as_a_model_and_never_as_an_adapter(run, tmp_path):
    """Its LoRA is for the transformer that it changes: in the model as it was, it makes another video."""
    file = checkpoint(run, 5, 1)
    (file.parent / "adapter.json").write_text("{}")
    saved = file.parent.parent
    for place in (run, saved.parent, saved):
        assert model_path(place) == file.parent
        told = refused(adapter_path, place, NoAdapter)
        assert told.endswith("of ae_adapt, whose result is a model: give it as that.")
    assert f"give {file.parent} as the model" in refused(adapter_path, file, NoAdapter)
    assert refused(lora_files, file.parent, BadInput).endswith("is a model of ae_adapt: give it as the model.")
    assert facts_of(file) == {} and state_of(run) is None
    assert taken(saved, file.parent).endswith("its adapter is used.")
    file.unlink()  # of a phase that trains the embedder and the head alone
    assert "of ae_adapt" in refused(adapter_path, run, NoAdapter) and model_path(run) == file.parent
    write(tmp_path / "lora")
    assert "give one of them (lora)" in refused(adapter_path, tmp_path, NoAdapter)
    lora = checkpoint(run, 3, 0)  # of another recipe in the same folder
    assert adapter_path(run) == lora and model_path(run) == file.parent


def test_other_results_several_results_and_several_runs_are_told(run):
    (run / "pipeline").mkdir()
    told = refused(adapter_path, run, NoAdapter)
    assert told.endswith(
        f"the folder of a training whose result is a whole model: give {run / 'pipeline'} as the model."
    )
    file = write(run)
    told = refused(adapter_path, run, NoAdapter)
    assert told.endswith(f"the results of several recipes (adapter/ and pipeline/): give {file.parent}.")
    (file.parent / "adapter.json").write_text("{}")  # of ae_adapt, of which both are one result
    assert "whose result is a whole model" in refused(adapter_path, run, NoAdapter)
    shutil.rmtree(run / "pipeline")
    shutil.rmtree(run / "adapter")
    (run / "decoder").mkdir()
    assert f"a tiny decoder: give {run / 'decoder'} as the decoder." in refused(adapter_path, run, NoAdapter)
    checkpoint(run.parent / "other", 3, 1)
    write(run.parent / "third")
    told = refused(adapter_path, run.parent, NoAdapter)
    assert told.endswith("holds the folders of trainings: give one of them (other, third).")


def test_folders_of_other_tools_stay_what_they_are(tmp_path):
    """Those of ai-toolkit have a config.yaml, too, and a folder of LoRAs may have one of a run in it."""
    save_file({"x": torch.zeros(1)}, tmp_path / "mine.safetensors")
    (tmp_path / "config.yaml").write_text("job: extension\n")
    write(tmp_path / "run")
    assert adapter_path(tmp_path) == tmp_path == lora_files(tmp_path)[0].path
    empty = tmp_path / "empty"
    empty.mkdir()
    assert adapter_path(empty) == empty and adapter_path(tmp_path / "gone") == tmp_path / "gone"
    with pytest.raises(BadInput, match=rf"guidance_free cannot be used: .*empty holds no adapter \({FILE}\): give the"):
        guidance_adapters(empty)
