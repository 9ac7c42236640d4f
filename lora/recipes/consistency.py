"""Recipe `consistency`: a LoRA with which a guided video takes few steps of one pass each.

The learned sampler has fixed noise levels, and the model learns to go from one to the next in one Euler step. What it
is taught are finite differences of the teacher's flow (its probability-flow ODE), without derivatives of the network:

- "segments": where the teacher comes to at the end of the step, in several steps of its own. That is progressive
  distillation (Salimans and Ho, arXiv 2202.00512) in one stage, from states of the learned sampler alone, with a window
  for each step as in PeRFlow (arXiv 2405.07510). It is no consistency loss: nothing refers to the student itself.
- "consistency": from anywhere within a step, where the student itself comes to after one step of the teacher
  (multistep consistency models, arXiv 2403.06807; latent consistency, arXiv 2310.04378).

In both the student's result at the end of a step is x + (s - t) v, which is x at s = t, whatever the network says: that
is the preconditioning c_skip = 1, c_out = s - t. Preconditionings that follow from the teacher (CDBM, arXiv 2410.22637;
Analytic-Precond, arXiv 2502.02922) reduce to it where the teacher's velocity is what is learned, as here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...pipelines.few_steps.grid import GridScheduler
from ...pipelines.files.weight_files import transformer_file
from ...pipelines.guidance_free.adapter_file import FEW_STEPS, FEW_STEPS_RECIPE, OWN_FILE, RECIPE
from ...pipelines.guidance_free.beta import BETA, BetaSlot
from ...pipelines.guidance_free.low_rank import gate_of
from ..adapters.lora_file import read_facts
from ..backbones.base import SampleRequest, Text
from ..checkpoints.begun_from import TEACHER, keep_teacher, named_anew, teacher_of
from ..config import ConfigError
from ..data.identities import file_identity
from ..distributed.generators import Generators, derive_seed
from ..flow import shifted
from .base import Batch, Phase, load_trained
from .consistency_settings import ConsistencyLoraSettings
from .guided_lora import GuidedLora, TrainGuided

OWN = "own"
"""As `consistency.teacher`: the guidance-free adapter that the base has of its own."""


class TrainConsistency(TrainGuided):
    """Writes `out/adapter/pytorch_lora_weights.safetensors`, which `vidaccel.guidance_free` puts into a pipeline; the
    noise levels of its steps are in the header.
    """

    Config = ConsistencyLoraSettings
    config: ConsistencyLoraSettings
    teacher_gate: float | None = None
    """Guidance scale at which a gated teacher counts fully."""

    def check_transformer(self, skeleton: nn.Module) -> None:
        super().check_transformer(skeleton)
        stage, few = self.config.model.stage, self.config.consistency
        if not self.own_steps:
            low, high = self.backbone.levels
            raise ConfigError(
                f"none of the {few.steps} steps begins at a noise level of the transformer that model.stage {stage} "
                f"names, {low:g} to {high:g}: they begin at {', '.join(f'{level:.3g}' for level in self.grid)}. Set "
                "flow.shift or consistency.steps."
            )

    def prepare(self) -> None:
        super().prepare()
        self.teacher_file = self._teacher_file()
        self.teacher = {} if self.teacher_file is None else self._read_teacher(self.teacher_file)

    def _teacher_file(self) -> Path | None:
        """Where the adapter of the teacher is."""
        given, model = self.config.consistency.teacher, self.backbone
        anew = named_anew(self, TEACHER)
        if given is None:
            return None
        if given != OWN:
            kept = None if anew else teacher_of(self.checkpoint, self.config.out)
            return kept or self.adapter_file(given, TEACHER)
        file = transformer_file(model.base, OWN_FILE, model.part)
        if file is None:
            raise ConfigError(
                f"consistency.teacher is {OWN}: {model.base} has no adapter of its own ({model.part}/{OWN_FILE}). Give "
                "the file or folder of one that the recipe gft made."
            )
        return file

    def keep_inputs(self) -> None:
        if self.teacher_file is not None and self.config.consistency.teacher != OWN:
            keep_teacher(self.teacher_file, self.config.out)

    def _read_teacher(self, path: Path) -> dict[str, torch.Tensor]:
        setting, few = TEACHER, self.config.consistency
        facts = read_facts(path, setting)
        if facts.get("guidance_free", {}).get("train") == "full":
            raise ConfigError(
                f"{setting}: all weights of {path} were trained, and a LoRA is needed, as which the student starts: "
                "give one, or the whole model as model.base without a teacher."
            )
        weights = self.earlier(path, setting, RECIPE)
        guidance = facts["guidance_free"]
        if few.highest > guidance["max_scale"]:
            raise ConfigError(
                f"consistency.guidance_scale is {few.highest:g}, and {path} was trained up to "
                f"{guidance['max_scale']:g}: give at most that."
            )
        self.teacher_gate = guidance["max_scale"] if guidance["gated"] else None
        return weights

    @property
    def levels(self) -> list[float]:
        """Noise levels of the teacher's steps from 1 to 0; every `teacher_steps`-th is one of the student's."""
        few = self.config.consistency
        shift = self.config.flow.shift
        if shift is None:
            shift = self.backbone.shift(torch.zeros(1, 1, 1, 1, 1))  # of Wan, the same for all sizes
        count = few.steps * few.teacher_steps
        return shifted(1 - torch.arange(count + 1, dtype=torch.float64) / count, shift).tolist()

    @property
    def grid(self) -> list[float]:
        """Noise levels of the student's steps; the last ends at 0."""
        return self.levels[: -1 : self.config.consistency.teacher_steps]

    @property
    def own_steps(self) -> range:
        """Numbers of the student's steps that the transformer makes: those that begin at its noise levels."""
        low, high = self.backbone.levels
        # As pipelines with two choose: the first one down to the boundary, which is its own.
        own = [n for n, level in enumerate(self.grid) if (level >= low if high == 1 else level < high)]
        return range(own[0], own[-1] + 1) if own else range(0)

    @property
    def goes_beyond(self) -> bool:
        """Whether a step ends at levels of the other transformer."""
        per_step = self.config.consistency.teacher_steps
        led = self.levels[: self.own_steps.stop * per_step]
        return any(level < self.backbone.levels[0] for level in led)

    @property
    def frozen_models(self) -> int:
        return (1 if self.config.consistency.teacher is None else 2) + self.goes_beyond

    def inputs(self) -> dict[str, str]:
        teacher = self.teacher_file
        own = {} if teacher is None else {TEACHER: file_identity(teacher)}
        return {**super().inputs(), **own}

    def phases(self) -> list[Phase]:
        return [ConsistencyLora(self)]

    def transformer(self) -> nn.Module:
        """What the teacher is at the middle of the guidance scales, where there is an adapter; else the base."""
        transformer = super().transformer()
        if not self.start:
            few = self.config.consistency
            gate = gate_of((few.guidance_scale + few.highest) / 2, self.teacher_gate)
            # The student has no gate: it has to make few steps without guidance, too.
            counted = {name: value if ".lora_A." in name else gate * value for name, value in self.teacher.items()}
            load_trained(transformer, counted)
        return transformer

    def frozen_teacher(self) -> nn.Module:
        """A second transformer with the teacher's adapter."""
        transformer = super().transformer()
        load_trained(transformer, self.teacher)
        return transformer.requires_grad_(False).eval()

    def facts(self) -> dict[str, Any]:
        few = self.config.consistency
        guidance = {"min_scale": few.guidance_scale, "max_scale": few.highest, "gated": False}
        steps = {"sigmas": self.grid, "objective": few.objective, "teacher_steps": few.teacher_steps}
        return {**super().facts(), "recipe": FEW_STEPS_RECIPE, "guidance_free": guidance, FEW_STEPS: steps}


class ConsistencyLora(GuidedLora):
    """The phase `train`."""

    recipe: TrainConsistency

    def __init__(self, recipe: TrainConsistency) -> None:
        super().__init__(recipe)
        self._teacher_slot: BetaSlot | None = None
        self._teacher_told: torch.Tensor | None = None
        self._beyond: nn.Module | None = None
        """The other transformer of two, which makes the end of a step that crosses the boundary between them."""

    def teachers(self) -> Sequence[nn.Module]:
        return [*super().teachers(), *([] if self._beyond is None else [self._beyond])]

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        recipe = self.recipe
        transformer = super().setup(trained)
        self._levels = torch.tensor(recipe.levels, dtype=torch.float32, device=recipe.process.device)
        if recipe.teacher:
            self.teacher = recipe.frozen_teacher()
            embedder: Any = self.teacher.get_submodule(BETA)
            self._teacher_slot = BetaSlot(
                self.teacher, embedder, lambda: self._teacher_told, "default", recipe.teacher_gate
            )
        if recipe.goes_beyond:
            self._beyond = recipe.backbone.other_transformer().eval()
        return transformer

    def _drawn(self, model: nn.Module, batch: Batch, rng: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        few, own = self.recipe.config.consistency, self.recipe.own_steps
        noise, place, drop = rng.normal(*batch["latents"].shape[1:]), rng.stratified(), rng.uniform()
        scale = few.guidance_scale + (few.highest - few.guidance_scale) * rng.uniform()
        if few.objective == "segments":
            begin = (own.start + (place * len(own)).long()) * few.teacher_steps
        else:
            begin = own.start * few.teacher_steps + (place * len(own) * few.teacher_steps).long()
        nothing = self.nothing()
        dropped = (drop < self.caption_dropout).tolist()
        texts = [nothing if away else text for away, text in zip(dropped, batch["texts"], strict=True)]
        drawn = {**batch, "begin": begin, "scale": scale}
        # Of the step alone, so that all processes do the same.
        chance = derive_seed("own states", rng.places[0].step) / 2**63
        drawn["own"] = model.training and chance < few.own_states
        return self.flow_loss(model, drawn, noise, self._levels[begin], texts)

    def flow_loss(
        self, model: nn.Module, batch: Batch, noise: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        few, backbone, begin, levels = (
            self.recipe.config.consistency,
            self.recipe.backbone,
            batch["begin"],
            self._levels,
        )
        beta, end = 1 / batch["scale"], (begin // few.teacher_steps + 1) * few.teacher_steps
        if batch["own"]:
            first = begin // few.teacher_steps
            shown = self._student(model, noise, texts, batch, first)
        else:
            shown = backbone.noised(batch["latents"], noise, sigma)
        if few.objective == "segments":
            there = self._led(model, shown, texts, batch, begin, few.teacher_steps)
        else:
            there = self._led(model, shown, texts, batch, begin, 1)
            on = levels[begin + 1]
            velocity = self.guided(model, there, on, texts, batch, beta, gradients=False)
            there = self._moved(there, velocity, levels[end] - on, batch)
        wanted = (there - shown) / _wide(levels[end] - sigma, shown)
        made = self.guided(model, shown, sigma, texts, batch, beta)
        loss = backbone.error(made, wanted).mean()
        return loss, {"error": loss.detach()}

    # -- the flow ------------------------------------------------------------------------------------------------------

    def _moved(self, latents: torch.Tensor, velocity: torch.Tensor, by: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Latents `[B, ...]` an Euler step of length `by` `[B]` further on; a first frame that is given stays."""
        moved = latents + _wide(by, latents) * velocity
        if self.recipe.backbone.clean_first:
            moved[:, :, 0] = batch["latents"][:, :, 0]
        return moved

    def _velocity(
        self, model: nn.Module, shown: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text], batch: Batch
    ) -> torch.Tensor:
        """The guided velocity of the teacher; below the boundary between two transformers, that of the other one."""
        if self._beyond is None:
            return self._own_velocity(model, shown, sigma, texts, batch)
        below, process = sigma < self.recipe.backbone.levels[0], self.recipe.process
        found = torch.zeros_like(shown)
        # In training, and where weights are spread, all processes run what one of them needs. Without that, each
        # measures clips of its own in a validation, and asks nobody.
        needed = process.any if process.sharded or model.training else bool
        if needed(bool((~below).any())):
            found = self._own_velocity(model, shown, sigma, texts, batch)
        if needed(bool(below.any())):
            nothing = [self.nothing()] * len(shown)
            own, without = (self.of_frozen(self._beyond, shown, sigma, text, batch) for text in (texts, nothing))
            found = torch.where(_wide(below, shown), without + _wide(batch["scale"], own) * (own - without), found)
        return found

    def _own_velocity(
        self, model: nn.Module, shown: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text], batch: Batch
    ) -> torch.Tensor:
        """The same of the transformer that is trained, or of its teacher."""
        scale = batch["scale"]
        if self.teacher is not None:
            self._teacher_told = 1 / scale
            return self.of_teacher(shown, sigma, texts, batch)
        own = self.of_base(model, shown, sigma, texts, batch)
        without = self.of_base(model, shown, sigma, [self.nothing()] * len(shown), batch)
        return without + _wide(scale, own) * (own - without)

    def _led(
        self,
        model: nn.Module,
        shown: torch.Tensor,
        texts: Sequence[Text],
        batch: Batch,
        begin: torch.Tensor,
        count: int,
    ) -> torch.Tensor:
        """Where the teacher's flow leads to, by the Adams-Bashforth method of second order, which starts as Euler's.

        Args:
            shown: at the levels of number `begin` `[B]`.
            count: steps, of one level each.
        """
        last: tuple[torch.Tensor, torch.Tensor] | None = None
        for number in range(count):
            at = begin + number
            velocity = self._velocity(model, shown, self._levels[at], texts, batch)
            step, mean = self._levels[at + 1] - self._levels[at], velocity
            if last is not None:
                mean = velocity + _wide(step / (2 * last[1]), shown) * (velocity - last[0])
            shown = self._moved(shown, mean, step, batch)
            last = velocity, step
        return shown

    def _student(
        self,
        model: nn.Module,
        noise: torch.Tensor,
        texts: Sequence[Text],
        batch: Batch,
        steps: torch.Tensor,
        by_teacher: bool = False,
    ) -> torch.Tensor:
        """Where the student comes to by the step of each number, `[B]`, from where its first one begins: noise, but of
        the second of two transformers clips with noise; without gradients.

        Args:
            by_teacher: the teacher in the student's place.
        """
        few, ones, own = self.recipe.config.consistency, torch.ones_like(batch["scale"]), self.recipe.own_steps
        shown = self.recipe.backbone.noised(batch["latents"], noise, self._levels[own.start * few.teacher_steps] * ones)
        for number in range(own.start, own.stop if own.stop in steps else own.stop - 1):
            now, then = (self._levels[n * few.teacher_steps] * ones for n in (number, number + 1))
            if by_teacher:
                velocity = self._velocity(model, shown, now, texts, batch)
            else:
                velocity = self.guided(model, shown, now, texts, batch, 1 / batch["scale"], gradients=False)
            moved = self._moved(shown, velocity, then - now, batch)
            shown = torch.where(_wide(steps > number, shown), moved, shown)
        return shown

    # -- what is measured ----------------------------------------------------------------------------------------------

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """How near the few steps come to the teacher's many.

        closed is 1 - |x - y|^2 / |z - y|^2, of the latents that the student's steps (x), the teacher's many (y) and
        the student's steps done by the teacher (z) make of the same noise: 0 without training, 1 for all of it. Of two
        transformers these are the steps of the one that is trained.
        """

        def measure(batch: Batch, rng: Generators) -> dict[str, torch.Tensor]:
            few, own = self.recipe.config.consistency, self.recipe.own_steps
            noise = rng.normal(*batch["latents"].shape[1:])
            batch["scale"] = torch.full((len(noise),), (few.guidance_scale + few.highest) / 2, device=noise.device)
            begin = torch.full((len(noise),), own.start * few.teacher_steps, device=noise.device)
            texts, end = batch["texts"], torch.full_like(begin, own.stop)
            start = self.recipe.backbone.noised(batch["latents"], noise, self._levels[begin])
            many = self._led(model, start, texts, batch, begin, len(own) * few.teacher_steps)
            made = self._student(model, noise, texts, batch, end)
            plain = self._student(model, noise, texts, batch, end, by_teacher=True)
            error = self.recipe.backbone.error
            return {"off": error(made, many).mean(), "gap": error(plain, many).mean()}

        values = super().validate(model, folder, step)
        self.forget()
        recipe = self.recipe
        found = recipe.measured(recipe.flowing).mean(measure, self.settings.batch_size, recipe.process)
        return values | ({"closed": 1 - found["off"] / found["gap"]} if found.get("gap") else {})

    def sample(self, transformer: nn.Module, texts: tuple[Text, Text], request: SampleRequest) -> torch.Tensor:
        return super().sample(transformer, texts, replace(request, scheduler=GridScheduler(self.recipe.grid)))

    def close(self) -> None:
        if self._teacher_slot is not None:
            self._teacher_slot.remove()
        self._beyond = None
        super().close()


def _wide(of_each: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`[B]` as `[B, 1, ...]`."""
    return of_each.view(-1, *[1] * (like.ndim - 1))
