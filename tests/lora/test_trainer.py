"""The loop, with a recipe of two phases on a tiny network with dropout."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import shutil
import weakref
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from vidaccel.generation.alone import OWNER, alone
from vidaccel.lora import phase_run, trainer
from vidaccel.lora.checkpoints.checkpoint import CheckpointError, CheckpointFolder
from vidaccel.lora.config import ConfigError, load
from vidaccel.lora.distributed.processes import Process
from vidaccel.lora.logs.pace import Pace
from vidaccel.lora.logs.tracking import Tracker
from vidaccel.lora.optim import learning_rate, make_optimizer, set_learning_rate
from vidaccel.lora.phase_run import PhaseRun
from vidaccel.lora.recipes.base import load_trained
from vidaccel.lora.settings import PhaseSettings
from vidaccel.lora.trainer import Diverged, Stopped, Trainer, make_accelerator


def log(settings) -> list[dict]:
    return [json.loads(line) for line in (Path(settings.out) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("steps", "clips"), [(1, 5), (3, None), (4, 5), (5, None)])
def test_an_interrupted_run_ends_bit_equal(tiny_settings, run_tiny, stop_after, steps, clips):
    """Wherever it is interrupted: in the first phase, at the border, in the second."""
    loop = {"validate_every": 2}
    straight = run_tiny(tiny_settings("straight", data={"clips": clips}, loop=loop))
    settings = tiny_settings("stopped", data={"clips": clips}, loop=loop)
    stop_after(steps)
    with pytest.raises(Stopped, match="continue with --resume latest"):
        run_tiny(settings)
    resumed = run_tiny(settings, "latest")
    assert resumed.seen == straight.seen[steps:]
    assert resumed.trained.keys() == straight.trained.keys()
    for name, value in straight.trained.items():
        assert torch.equal(value, resumed.trained[name]), name
    last = [row for row in log(settings) if "loss" in row][-1]
    wanted = [row for row in log(tiny_settings("straight")) if "loss" in row][-1]
    assert last["loss"] == wanted["loss"]
    files = [CheckpointFolder(Path(s.out) / "checkpoints") for s in (tiny_settings("straight"), settings)]
    ends = [folder.load(folder.find("latest")) for folder in files]
    for part in ("weights", "ema", "trained"):
        first, second = (getattr(end, part) for end in ends)
        assert all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()
    assert torch.equal(ends[0].random[0]["torch"], ends[1].random[0]["torch"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_with_each_optimizer(tiny_settings, run_tiny, stop_after, optimizer):
    phases = {"first": {"steps": 4, "optimizer": optimizer, "batch_size": 2}, "second": {"steps": 0}}
    straight = run_tiny(tiny_settings("straight", phases=phases))
    stop_after(2)
    with pytest.raises(Stopped):
        run_tiny(tiny_settings("stopped", phases=phases))
    resumed = run_tiny(tiny_settings("stopped", phases=phases), "latest")
    assert all(torch.equal(value, resumed.trained[name]) for name, value in straight.trained.items())


def test_background_workers_change_nothing(tiny_settings, run_tiny):
    plain = run_tiny(tiny_settings("plain"))
    workers = run_tiny(tiny_settings("workers", data={"workers": 1}))
    assert all(torch.equal(value, workers.trained[name]) for name, value in plain.trained.items())


def test_accumulation_is_a_larger_batch(tiny_settings, run_tiny, monkeypatch):
    """The clips, their noise and the result are those of one batch."""
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    whole = run_tiny(tiny_settings("whole", phases={"first": {"steps": 2, "batch_size": 4}, "second": {"steps": 0}}))
    phases = {"first": {"steps": 2, "batch_size": 2, "gradient_accumulation_steps": 2}, "second": {"steps": 0}}
    parts = run_tiny(tiny_settings("parts", phases=phases))
    assert sum((entry[2] for entry in parts.seen), ()) == sum((entry[2] for entry in whole.seen), ())
    for name, value in whole.trained.items():
        torch.testing.assert_close(value, parts.trained[name], rtol=1e-5, atol=1e-6)


def test_a_skipped_phase_leaves_its_part_untrained(tiny_settings, run_tiny):
    recipe = run_tiny(tiny_settings(phases={"first": {"steps": 0}}))
    assert set(recipe.trained) == {"second.weight", "second.bias"}
    assert {entry[0] for entry in recipe.seen} == {"second"}


def test_results_are_the_moving_averages(tiny_settings, run_tiny):
    settings = tiny_settings(phases={"first": {"steps": 0}, "second": {"steps": 3}})
    recipe = run_tiny(settings)
    folder = CheckpointFolder(Path(settings.out) / "checkpoints")
    saved = folder.load(folder.find("latest"))
    assert torch.equal(recipe.trained["second.weight"], saved.ema["second.weight"])
    assert not torch.equal(saved.ema["second.weight"], saved.weights["second.weight"])


def test_other_settings_are_refused_with_the_difference(tiny_settings, run_tiny, stop_after):
    stop_after(1)
    with pytest.raises(Stopped):
        run_tiny(tiny_settings())
    with pytest.raises(CheckpointError, match=r"phases.first.weight_decay: 0.0 then, 0.5 now"):
        run_tiny(tiny_settings(phases={"first": {"steps": 3, "weight_decay": 0.5}}), "latest")


def test_free_settings_may_change(tiny_settings, run_tiny, stop_after):
    stop_after(1)
    with pytest.raises(Stopped):
        run_tiny(tiny_settings())
    run_tiny(tiny_settings(loop={"save_every": 7, "log_every": 2}), "auto")


def test_the_steps_of_a_constant_learning_rate_may_change(tiny_settings, run_tiny, stop_after):
    """The clips and the noise of a step do not depend on how many steps there are."""
    straight = run_tiny(tiny_settings("straight", phases={"first": {"steps": 4}, "second": {"steps": 1}}))
    stop_after(2)
    with pytest.raises(Stopped):
        run_tiny(tiny_settings())
    settings = tiny_settings(phases={"first": {"steps": 4}, "second": {"steps": 1}})
    resumed = run_tiny(settings, "latest")
    assert all(torch.equal(value, resumed.trained[name]) for name, value in straight.trained.items())
    for other in (2, 9):  # more would stand in the settings of the result, and never have been made
        told = (
            f"in the phase second, and a phase that is over keeps its steps:\n  phases.first.steps: 4 then, {other} now"
        )
        with pytest.raises(CheckpointError, match=told):
            run_tiny(tiny_settings(phases={"first": {"steps": other}, "second": {"steps": 2}}), "latest")
    assert load(type(settings), Path(settings.out) / "config.yaml").phases.first.steps == 4
    with pytest.raises(CheckpointError, match="in the phase second, whose steps are 0 now"):
        run_tiny(tiny_settings(phases={"second": {"steps": 0}}), "latest")
    with pytest.raises(CheckpointError, match="phases.first.lr_scheduler: 'constant' then, 'linear' now"):
        run_tiny(tiny_settings(phases={"first": {"steps": 5, "lr_scheduler": "linear"}}), "latest")


def test_fewer_steps_than_were_done_are_refused(tiny_settings, run_tiny):
    """The result was that of all steps, beside settings with fewer."""
    settings = {"loop": {"save_every": 1, "keep_last": 9}}
    run_tiny(tiny_settings(phases={"first": {"steps": 4}, "second": {"steps": 0}}, **settings))
    fewer = tiny_settings(phases={"first": {"steps": 2}, "second": {"steps": 0}}, **settings)
    with pytest.raises(CheckpointError, match=r"after step 4 of .* first, .* are 2 now: give 4 or more, or") as told:
        run_tiny(fewer, "latest")
    assert load(type(fewer), Path(fewer.out) / "config.yaml").phases.first.steps == 4
    earlier = str(told.value).partition("--resume ")[2].removesuffix(".")
    assert earlier.endswith("step_00000002")
    assert run_tiny(fewer, earlier).trained.keys()
    shutil.rmtree(Path(fewer.out) / "checkpoints" / "step_00000001")
    one = tiny_settings(phases={"first": {"steps": 1}, "second": {"steps": 0}}, **settings)
    with pytest.raises(CheckpointError, match=r"step 4 of .* are 1 now: give 4 or more\.$"):
        run_tiny(one, "latest")


def test_a_line_of_the_log_is_over_all_of_its_steps_after_a_resume(tiny_settings, run_tiny, stop_after):
    phases = {"first": {"steps": 4, "batch_size": 2}, "second": {"steps": 0}}
    loop = {"log_every": 4}
    run_tiny(straight := tiny_settings("straight", phases=phases, loop=loop))
    stop_after(3)
    with pytest.raises(Stopped):
        run_tiny(settings := tiny_settings(phases=phases, loop=loop))
    run_tiny(settings, "latest")
    [wanted], [row] = ([r for r in log(s) if "loss" in r] for s in (straight, settings))
    assert {k: row[k] for k in ("step", "loss", "uniform")} == {k: wanted[k] for k in ("step", "loss", "uniform")}


def test_a_run_is_not_overwritten(tiny_settings, run_tiny):
    run_tiny(tiny_settings())
    with pytest.raises(CheckpointError, match="holds a run already .* --resume latest"):
        run_tiny(tiny_settings())


def test_a_result_is_not_overwritten(tiny_settings, run_tiny, tmp_path):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"the result of a run already \(adapter/\), .* choose another `out`"):
        run_tiny(tiny_settings())


def test_a_folder_that_nothing_can_be_written_to_is_refused_at_once(tiny_settings, run_tiny, monkeypatch, tiny_recipe):
    """Python's own error came when models were loaded and clips encoded."""
    monkeypatch.setattr(tiny_recipe, "prepare", lambda self: pytest.fail("it began to prepare"))
    settings = tiny_settings("run")
    file = Path(settings.out)
    file.write_text("a file")
    with pytest.raises(ConfigError, match=r"^out is .*run: .*run is a file, so nothing .* Give another folder\.$"):
        run_tiny(settings)
    assert file.read_text() == "a file"


def test_two_runs_in_one_folder(tiny_settings, run_tiny, tiny_recipe, tmp_path, monkeypatch):
    """Both were accepted until the first checkpoint, and wrote into one log."""
    with alone(tmp_path / "run"), pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* trains in it\. Wait"):
        run_tiny(tiny_settings())
    # One that begins while this one prepares, where there was no folder yet.
    prepare, other = tiny_recipe.prepare, contextlib.ExitStack()

    def prepared(self):
        prepare(self)
        other.enter_context(alone(Path(self.config.out)))

    with other, monkeypatch.context() as patch, pytest.raises(ConfigError, match="trains in it"):
        patch.setattr(tiny_recipe, "prepare", prepared)
        run_tiny(tiny_settings("new"))
    run_tiny(tiny_settings("second"))
    whole = tmp_path / "second" / "checkpoints", tmp_path / "third" / "checkpoints"
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="another run was in .* meanwhile"):
        patch.setattr(tiny_recipe, "prepare", lambda self: prepare(self) or shutil.copytree(*whole))
        run_tiny(tiny_settings("third"), "auto")
    run_tiny(tiny_settings())
    assert not (tmp_path / "run" / OWNER).exists()


def test_the_time_limit_ends_a_phase(tiny_settings, run_tiny):
    phases = {"first": {"steps": 100_000, "max_minutes": 0.005}, "second": {"steps": 2}}
    settings = tiny_settings(phases=phases, loop={"log_every": 10_000, "save_every": 100_000})
    recipe = run_tiny(settings)
    steps = sum(entry[0] == "first" for entry in recipe.seen)
    assert 0 < steps < 100_000 and recipe.seen[-1][0] == "second"
    assert {row["phase"] for row in log(settings)} == {"first", "second"}


def test_a_full_disk_does_not_end_the_run(tiny_settings, run_tiny, monkeypatch, caplog):
    """A checkpoint in between may fail; training goes on and the last one is written."""
    original = CheckpointFolder.save

    def save(self, checkpoint, config, adapter):
        if checkpoint.total_steps == 2:
            raise CheckpointError("No space left on device.")
        return original(self, checkpoint, config, adapter)

    monkeypatch.setattr(CheckpointFolder, "save", save)
    recipe = run_tiny(tiny_settings(loop={"save_every": 1}))
    assert "tries again in 1 steps" in caplog.text
    assert len(recipe.seen) == 6


def test_a_log_that_cannot_be_written_does_not_end_the_run(tiny_settings, run_tiny, caplog):
    settings = tiny_settings()
    (Path(settings.out) / "log.jsonl").mkdir(parents=True)
    assert len(run_tiny(settings).seen) == 6
    assert "log.jsonl could not be written" in caplog.text


def test_a_full_disk_at_the_end_is_an_error(tiny_settings, run_tiny, tiny_recipe, monkeypatch):
    """Of a checkpoint, and of the result; it says how to go on, and to make room where there is none."""
    settings = tiny_settings(phases={"second": {"steps": 0}}, loop={"save_every": 1})
    with monkeypatch.context() as patch:
        save = CheckpointFolder.save

        def full(self, checkpoint, *more):
            if checkpoint.step == 3:
                raise CheckpointError("No space left.") from OSError(errno.ENOSPC, "No space left on device")
            return save(self, checkpoint, *more)

        patch.setattr(CheckpointFolder, "save", full)
        with pytest.raises(CheckpointError, match=r"No space left\. Make room, and continue with --resume latest\.$"):
            run_tiny(settings)
    with monkeypatch.context() as patch:
        patch.setattr(tiny_recipe, "finish", lambda *_: broken(OSError("adapter could not be written.")))
        with pytest.raises(
            OSError, match=r"^adapter could not be written\. See that it can be, and continue with --resume latest"
        ):
            run_tiny(settings, "latest")
    run_tiny(settings, "latest")


def broken(error: Exception):
    raise error


def test_a_loss_that_is_no_number_ends_the_run(tiny_settings, run_tiny):
    phases = {
        "first": {"steps": 0},
        "second": {"steps": 9, "learning_rate": 1e30, "max_grad_norm": None, "lr_warmup_steps": 0},
    }
    with pytest.raises(Diverged, match="the loss of phase second is (nan|inf) by step .* The last checkpoint is"):
        run_tiny(tiny_settings(phases=phases, loop={"save_every": 1}))


@pytest.mark.parametrize("broken", ["loss", "weights"])
def test_a_checkpoint_of_a_diverged_run_is_never_written(tiny_settings, run_tiny, monkeypatch, broken):
    """Between two lines of the log, too, and the good checkpoints stay; the log and the tracker are closed."""
    original, closed = PhaseRun._one_step, []

    def step(self, stream):
        values = original(self, stream)
        if self.state.step == 15:
            if broken == "loss":
                values["loss"] = values["loss"] * float("nan")
            else:
                next(iter(self.state.named.values())).data.fill_(float("inf"))
        return values

    monkeypatch.setattr(PhaseRun, "_one_step", step)
    monkeypatch.setattr(Tracker, "end", lambda self: closed.append(True))
    loop = {"log_every": 50, "save_every": 8, "keep_last": 1}
    settings = tiny_settings(phases={"first": {"steps": 0}, "second": {"steps": 40}}, loop=loop)
    with pytest.raises(Diverged, match=r"loss or a weight .* is NaN or infinite by step 16.*step_00000008"):
        run_tiny(settings)
    folder = CheckpointFolder(Path(settings.out) / "checkpoints")
    (last,) = folder.saved()
    saved = folder.load(last)
    assert all(value.isfinite().all() for value in [*saved.weights.values(), *saved.ema.values()])
    assert closed == [True]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_what_a_diverged_run_advises_can_be_done(tiny_settings, run_tiny, monkeypatch, capsys, schedule):
    """It was refused as other settings."""
    phases = {"first": {"steps": 4, "learning_rate": 0.01, "lr_scheduler": schedule}, "second": {"steps": 0}}
    with monkeypatch.context() as patch:
        original = PhaseRun._one_step
        broken = {"loss": torch.tensor(float("nan"))}
        patch.setattr(
            PhaseRun, "_one_step", lambda self, s: original(self, s) | (broken if self.state.step == 2 else {})
        )
        with pytest.raises(Diverged) as caught:
            run_tiny(tiny_settings(phases=phases, loop={"save_every": 1}))
    assert str(caught.value).endswith(
        "step_00000002: continue with --resume latest, and with a lower learning_rate or max_grad_norm."
    )
    phases["first"] |= {"learning_rate": 0.001, "max_grad_norm": 0.5}
    settings = tiny_settings(phases=phases)
    run_tiny(settings, "latest")
    assert "phases.first.learning_rate is 0.001 from here on, and was 0.01.\n" in capsys.readouterr().out
    wanted = {"constant": 0.001, "cosine": learning_rate(PhaseSettings(**phases["first"]), 2)}[schedule]
    assert log(settings)[2]["learning_rate"] == pytest.approx(wanted)


def test_a_checkpoint_is_let_go_of_once_it_is_restored(tiny_settings, run_tiny, stop_after, monkeypatch):
    """It is as large as weights and optimiser together."""
    phases = {"first": {"steps": 4}, "second": {"steps": 0}}
    stop_after(2)
    with pytest.raises(Stopped):
        run_tiny(tiny_settings(phases=phases))
    loaded, alive = [], []
    load, validate = CheckpointFolder.load, PhaseRun._validate

    def look(self):
        gc.collect()
        alive.append(loaded[0]() is not None)
        return validate(self)

    def remember(self, path):
        checkpoint = load(self, path)
        loaded.append(weakref.ref(checkpoint))
        return checkpoint

    monkeypatch.setattr(CheckpointFolder, "load", remember)
    monkeypatch.setattr(PhaseRun, "_validate", look)
    run_tiny(tiny_settings(phases=phases), "latest")
    assert alive == [False]


def test_an_interrupted_replacement_is_put_back_before_it_is_looked_for(tiny_settings, run_tiny, stop_after):
    settings = tiny_settings()
    stop_after(2)
    with pytest.raises(Stopped):
        run_tiny(settings)
    (path,) = CheckpointFolder(Path(settings.out) / "checkpoints").saved()
    path.rename(path.with_name(f".{path.name}.old.part"))
    assert run_tiny(settings, "latest").seen[0][1] == 2


def test_results_of_phases_that_cannot_be_written_do_not_end_the_run(tiny_settings, run_tiny, caplog):
    settings = tiny_settings()
    (Path(settings.out)).mkdir(parents=True)
    (Path(settings.out) / "phases").write_text("in the way")
    assert len(run_tiny(settings).seen) == 6
    assert "first.safetensors could not be written" in caplog.text


def test_results_of_another_shape_are_refused():
    net = torch.nn.Linear(2, 3)
    load_trained(net, {"bias": torch.ones(3)})
    assert net.bias.tolist() == [1, 1, 1]
    with pytest.raises(CheckpointError, match=r"weight is \[4, 2\] in the checkpoint and \[3, 2\] in the model"):
        load_trained(net, {"weight": torch.ones(4, 2)})


def test_results_that_have_no_place_are_refused():
    """They were left out without a word, and a model that was not trained was written."""
    with pytest.raises(CheckpointError, match=r"1 of 2 trained weights, such as _orig_mod.bias, have no place"):
        load_trained(torch.nn.Linear(2, 3), {"bias": torch.ones(3), "_orig_mod.bias": torch.ones(3)})


def test_what_fsdp_cannot_split_is_refused_before_any_phase(tiny_settings, tiny_recipe, monkeypatch):
    """The first phase trained to its end, and then the second one was refused."""
    monkeypatch.setattr(tiny_recipe, "prepare", lambda self: pytest.fail("models were loaded"))
    settings = tiny_settings(phases={"second": {"steps": 1, "optimizer": "muon"}})
    made = tiny_recipe(settings, Process(torch.device("cpu"), sharded=True))
    with pytest.raises(ConfigError, match="phase second: optimizer is muon, which needs whole matrices"):
        Trainer(made, make_accelerator(settings)).run()


def test_only_the_main_process_has_the_result_of_the_last_phase(tiny_settings, run_tiny, monkeypatch):
    """Each of eight had a copy of all weights in float32, in one machine's memory."""
    kept, train = [], PhaseRun.train
    monkeypatch.setattr(PhaseRun, "train", lambda self, keep: kept.append((keep, train(self, keep))) or kept[-1][1])
    assert len(run_tiny(tiny_settings()).trained) == 4
    assert [keep for keep, _ in kept] == [True, True]
    monkeypatch.setattr(Process, "is_main", property(lambda self: False))
    run_tiny(tiny_settings("another"))
    assert [(keep, len(found)) for keep, found in kept[2:]] == [(True, 2), (False, 0)]


def test_every_process_goes_on_from_what_the_main_one_found(tiny_settings, run_tiny, tiny_recipe, monkeypatch):
    """One that saw another checkpoint, or none yet, went on from that, or began anew."""
    settings = tiny_settings(loop={"save_every": 1, "keep_last": 9})
    run_tiny(settings)
    steps = Path(settings.out) / "checkpoints"
    told = []

    def broadcast(objects, *_, **__):
        objects[:] = [str(steps / "step_00000002"), None]
        told.append(objects)

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    process = Process(torch.device("cpu"), 1, 2)
    monkeypatch.setattr(Process, "wait", lambda self: None)
    monkeypatch.setattr(Process, "any", lambda self, flag: flag)
    halves = {name: {"steps": 3, "learning_rate": 0.01, "batch_size": 1} for name in ("first", "second")}
    halves["second"] |= {"ema_decay": 0.9, "lr_warmup_steps": 2}
    settings = tiny_settings(loop={"save_every": 1, "keep_last": 9}, phases=halves)
    made = Trainer(tiny_recipe(settings, process), make_accelerator(settings))
    phases = made.recipe.phases()
    for asked in ("auto", "latest"):
        start = made._start(asked, phases)
        assert (start.checkpoint.step, start.phase, made.checkpoints.current.name) == (2, "first", "step_00000002")
    assert len(told) == 2
    monkeypatch.setattr(Process, "any", lambda self, flag: True)  # another one does not see it, of a disk of its own
    with pytest.raises(CheckpointError, match="step_00000002 is not there for all processes: `out` must be one folder"):
        made._start("latest", phases)
    monkeypatch.setattr(
        torch.distributed, "broadcast_object_list", lambda objects, *_, **__: objects.__setitem__(1, "no checkpoint")
    )
    with pytest.raises(CheckpointError, match="^no checkpoint$"):
        made._start("latest", phases)


def test_a_training_that_decodes_its_own_clips_says_so_on_a_gpu(tiny_settings, run_tiny, monkeypatch, capsys):
    """Without `data.workers` the GPU waits for each video."""
    words = "data.workers is 0, so that the process that trains decodes each clip itself"
    begins = PhaseRun._say_what_begins

    def on_a_gpu(self):
        self.process = SimpleNamespace(**{**vars(self.process), "is_main": True, "device": torch.device("cuda")})
        begins(self)
        self.process = process

    process = Process(torch.device("cpu"))
    data = {"kind": "videos", "folder": "somewhere"}
    run_tiny(tiny_settings("on a CPU", data=data))
    assert words not in capsys.readouterr().out
    monkeypatch.setattr(PhaseRun, "_say_what_begins", on_a_gpu)
    run_tiny(tiny_settings("with workers", data={**data, "workers": 1}, phases={"second": {"steps": 0}}))
    assert words not in capsys.readouterr().out
    run_tiny(tiny_settings("without", data=data, phases={"second": {"steps": 0}}))
    assert f"phase first: {words}" in capsys.readouterr().out


def test_clips_are_encoded_before_the_model_is_there(tiny_settings, run_tiny):
    """What encodes them needs the memory that the model takes."""
    assert run_tiny(tiny_settings()).calls == ["clips first", "setup first", "clips second", "setup second"]


def test_fsdp_spreads_gradients_in_each_micro_batch(tiny_settings, monkeypatch):
    """Else each process holds those of all weights until the last one. Runs without FSDP wait for that one."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "plugin_of", lambda _: FullyShardedDataParallelPlugin(fsdp_version=2))
        spread = make_accelerator(tiny_settings())
    assert spread.gradient_state.plugin_kwargs["sync_each_batch"]
    assert not make_accelerator(tiny_settings()).gradient_state.plugin_kwargs.get("sync_each_batch")


def test_processes_wait_for_hours(tiny_settings):
    """One of them may encode clips, or write a pipeline, for longer than the 10 minutes that NCCL waits."""
    assert make_accelerator(tiny_settings()).init_handler.timeout >= timedelta(hours=12)


def test_refusals_come_before_anything_loads(tiny_settings, run_tiny, monkeypatch):
    recipe = run_tiny(tiny_settings())
    monkeypatch.setattr(type(recipe), "prepare", lambda self: pytest.fail("models were loaded"))
    with pytest.raises(CheckpointError, match="holds a run already"):
        run_tiny(tiny_settings())


def test_learning_rates():
    phase = PhaseSettings(steps=110, learning_rate=1.0, lr_warmup_steps=10, lr_scheduler="linear", min_lr_rate=0.1)
    assert learning_rate(phase, 0) == pytest.approx(0.1)
    assert learning_rate(phase, 9) == pytest.approx(1.0)
    assert learning_rate(phase, 60) == pytest.approx(0.55)
    assert learning_rate(phase, 110) == pytest.approx(0.1)
    timed = PhaseSettings(steps=10**6, learning_rate=1.0, lr_scheduler="cosine", max_minutes=2)
    assert learning_rate(timed, 0, 60) == pytest.approx(0.5, abs=1e-3)
    assert learning_rate(timed, 0, 120) == pytest.approx(0.0, abs=1e-6)
    assert learning_rate(PhaseSettings(steps=5, learning_rate=0.3), 4) == 0.3
    decaying = PhaseSettings(steps=30, learning_rate=1.0, lr_decay_steps=10, min_lr_rate=0.2)
    assert [learning_rate(decaying, step) for step in (0, 20, 25, 29)] == pytest.approx([1.0, 1.0, 0.6, 0.28])
    timed = replace(decaying, steps=1000, max_minutes=1)
    known = [learning_rate(timed, step, 2.0 * step, 2.0) for step in (0, 20, 25, 29)]
    assert known == pytest.approx([1.0, 1.0, 0.6, 0.28])  # the time ends after 30 steps
    assert learning_rate(timed, 29, 61.0, 2.0) == pytest.approx(0.2) and learning_rate(timed, 0) == 1.0


def test_the_pace_leaves_out_the_first_step_of_a_process():
    """It may load and compile; where nothing else is known, that of the processes before counts."""
    new = Pace(0, 0.0)
    assert new.seconds_per_step is None
    new.add(1, 60.0)
    assert new.seconds_per_step is None
    new.add(3, 64.0)
    assert new.seconds_per_step == 2.0
    resumed = Pace(10, 30.0)
    resumed.add(11, 90.0)
    assert resumed.seconds_per_step == 3.0
    resumed.add(12, 92.0)
    assert resumed.seconds_per_step == 2.0


def test_the_rate_falls_before_the_time_ends(tiny_settings, run_tiny, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(phase_run, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    phase = {"steps": 10**6, "learning_rate": 0.01, "lr_decay_steps": 10, "max_minutes": 0.5}
    settings = tiny_settings(phases={"first": phase, "second": {"steps": 0}}, loop={"save_every": 10**6})
    run_tiny(settings)
    rates = [row["learning_rate"] for row in log(settings) if "learning_rate" in row]
    assert rates[5] == 0.01 and rates == sorted(rates, reverse=True) and rates[-1] < 0.003


def test_a_run_that_went_on_for_long_is_ended_with_a_falling_rate(tiny_settings, run_tiny):
    constant = {"first": {"steps": 3}, "second": {"steps": 0}}
    run_tiny(tiny_settings(phases=constant))
    ended = tiny_settings(phases={"first": {"steps": 6, "lr_decay_steps": 3}, "second": {"steps": 0}})
    run_tiny(ended, "latest")
    rates = [row["learning_rate"] for row in log(ended) if "learning_rate" in row]
    assert rates == pytest.approx([0.01] * 4 + [0.01 * 2 / 3, 0.01 / 3], rel=1e-4)  # as the log rounds them


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_end_of_a_falling_rate_stays(tiny_settings, run_tiny, kind):
    """With more minutes the rate rose again, or fell to nothing with fewer; without a fall they may change."""
    falling = {"steps": 3, "lr_scheduler": kind, "max_minutes": 10}
    run_tiny(tiny_settings(phases={"first": falling, "second": {"steps": 0}}))
    with pytest.raises(CheckpointError, match="phases.first.max_minutes: 10.0 then, 20.0 now"):
        run_tiny(tiny_settings(phases={"first": {**falling, "max_minutes": 20}, "second": {"steps": 0}}), "latest")
    constant = {"first": {"steps": 3, "max_minutes": 10}, "second": {"steps": 0}}
    run_tiny(tiny_settings("constant", phases=constant))
    constant["first"] = {"steps": 4, "max_minutes": 20}
    assert len(run_tiny(tiny_settings("constant", phases=constant), "latest").seen) == 1


def test_a_warm_up_that_does_not_end_is_told(tiny_settings, run_tiny, caplog):
    phases = {"first": {"steps": 2, "lr_warmup_steps": 8}, "second": {"steps": 3, "lr_warmup_steps": 2}}
    run_tiny(tiny_settings(phases=phases))
    [told] = [message for message in caplog.messages if "lr_warmup_steps" in message]
    assert "phase first: lr_warmup_steps is 8 and there are 2 steps" in told and "to 25 % of 0.01" in told


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_scheduler": "linear", "lr_decay_steps": 2}, "of use only with the lr_scheduler constant"),
        ({"lr_warmup_steps": 2, "lr_decay_steps": 2}, "more than the 1 of the 3 steps"),
    ],
)
def test_a_falling_rate_that_cannot_be(tiny_settings, settings, words):
    with pytest.raises(ConfigError, match=words):
        tiny_settings(phases={"first": settings})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_matrices_alone_have_weight_decay(optimizer):
    """muon's vectors had it, and with both the tables of modulations, of Wan `[1, 6, dim]`, of LTX-Video `[6, dim]`."""
    kept = {"norm.weight": (8,), "to_q.bias": (8,), "norm.gamma": (8, 1, 1)}
    kept |= {"wan.scale_shift_table": (1, 6, 8), "ltx.scale_shift_table": (6, 8)}
    decayed = {"to_q.weight": (8, 8), "conv.weight": (8, 8, 3), "to_q.lora_A.default.weight": (1, 8)}
    named = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in {**kept, **decayed}.items()}
    made = make_optimizer(
        PhaseSettings(steps=1, weight_decay=0.5, learning_rate=0.1, optimizer=optimizer), named, lambda name: 1.0
    )
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    assert {name for name, value in named.items() if (value == 1).all()} == set(kept)
    assert all(named[name].flatten()[0].item() == pytest.approx(0.95) for name in decayed)


def test_groups_of_the_optimizer():
    net = torch.nn.Linear(2, 3)
    named = dict(net.named_parameters())
    settings = PhaseSettings(steps=1, weight_decay=0.5)
    optimizer = make_optimizer(settings, named, lambda name: 2.0 if name == "bias" else 1.0)
    set_learning_rate(optimizer, 0.1)
    assert [(g["weight_decay"], g["lr"]) for g in optimizer.param_groups] == [(0.5, 0.1), (0.0, 0.2)]


@pytest.mark.parametrize(
    ("tracker", "words"), [("wndb", "use auto, none, or one of"), ("wandb", "which is not installed")]
)
def test_trackers_that_cannot_be_used(tiny_settings, run_tiny, tracker, words):
    with pytest.raises(ConfigError, match=words):
        run_tiny(tiny_settings(loop={"tracker": tracker}))


def test_tensorboard_gets_the_numbers(tiny_settings, run_tiny):
    pytest.importorskip("tensorboard")
    settings = tiny_settings(loop={"tracker": "auto"})
    run_tiny(settings)
    assert list((Path(settings.out) / "tracker").rglob("*tfevents*"))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda loss: loss, "returned a Tensor"),
        (lambda loss: (loss.expand(2), {}), r"returned a loss of shape \[2\]"),
        (lambda loss: (1.0, {}), r"returned 1\.0"),
        (lambda loss: (loss, {"error": 0.5}), r"returned 0\.5 for error"),
    ],
)
def test_a_loss_of_another_kind_is_named(tiny_settings, run_tiny, tiny_recipe, monkeypatch, made, words):
    phase = type(tiny_recipe(tiny_settings(), Process(torch.device("cpu"))).phases()[0])
    loss = phase.loss
    monkeypatch.setattr(phase, "loss", lambda *given: made(loss(*given)[0]))
    with pytest.raises(TypeError, match=rf"^loss of the phase \w+ {words}: it must return \(loss, numbers\)"):
        run_tiny(tiny_settings())


def test_phases_have_names_of_their_own(tiny_settings, run_tiny, tiny_recipe, monkeypatch):
    phases = tiny_recipe.phases
    monkeypatch.setattr(tiny_recipe, "phases", lambda self: [phases(self)[0], phases(self)[0]])
    with pytest.raises(ConfigError, match=r"two phases of the name \w+: give each a name of its own"):
        run_tiny(tiny_settings())
