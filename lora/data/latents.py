"""Encoded clips: read from a cache that is filled once, or encoded anew in each step."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Sequence

import torch

from ..backbones.base import Encoder, Text, TextEncoder
from ..config import ConfigError
from ..distributed.generators import Place
from ..recipes.base import Batch, Process
from ..settings import SizeSettings
from .ahead import ahead, readers
from .cache import TensorCache
from .dataset import ClipDataset, sturdy_pixels
from .files import some
from .sampler import Pick, without

logger = logging.getLogger(__name__)

_NOWHERE = Place(0, 0, 1, 0)

_TEXT = "text"
"""The part of a clip that its caption is, where the text encoder sees the first frame with it."""


class Latents:
    """The parts of the clips of a dataset, as `Clips`.

    Without a cache, `load` gives pixels and captions, and `complete` encodes them. Where the text encoder sees
    pictures, the encoded caption is a part of its clip.

    Args:
        dataset: of the clips.
        sizes: of the clips.
        encoder, text_encoder: what encodes them.
        cache: where encodings are kept, or None. Endless sources are not cached, but their texts are.
        held_out: indices that are not trained on.
        prompts: further texts that will be asked for.
        workers: threads that decode clips while the ones before are encoded; 0 for none, so that each waits for the
            other. So many decoded clips, and the one that is encoded, are in memory.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        sizes: Sequence[SizeSettings],
        encoder: Encoder,
        text_encoder: TextEncoder,
        cache: TensorCache | None,
        held_out: Collection[int] = (),
        prompts: Sequence[str] = (),
        workers: int = 0,
    ) -> None:
        self.dataset, self.sizes, self.cache = dataset, tuple(sizes), cache
        self.members = without(dataset.members(self.sizes), held_out)
        self.identities = dict(encoder.identities)
        self.text_identity, self.pictured = text_encoder.identity, text_encoder.pictured
        self.cached = cache is not None and self.members is not None
        self._texts = Texts(text_encoder, cache)
        self._encoder, self._prompts, self._workers = encoder, tuple(prompts), workers

    @property
    def decodes(self) -> bool:
        return not self.cached

    def __getstate__(self) -> dict:
        """What background processes get: no models."""
        return {**self.__dict__, "_encoder": None, "_texts": None}

    def load(self, pick: Pick) -> Batch:
        """The parts of one clip.

        Raises:
            OSError: a cached file that was whole when the run began is gone or damaged; what is left of it is removed,
                so that the next run makes it again. Or `sturdy_pixels` finds no clip.
        """
        if not self.cached:
            pixels, index = sturdy_pixels(self.dataset, pick, self.members, self.sizes)
            return {"pixels": pixels, "caption": self.dataset.caption(index)}
        parts = self._read(pick)
        missing = [name for name in self._parts if name not in parts]
        if missing:
            for name in missing:
                self.cache.remove(*self._key(pick, name))
            file = self.cache.path(*self._key(pick, missing[0]))
            raise OSError(
                f"{file}, which was there when the run began, is gone or damaged: resume, and it is made again."
            )
        return {**parts, "caption": self.dataset.caption(pick.index)}

    def complete(self, batch: Batch) -> Batch:
        """The batch with whatever parts it lacks, and `texts`, its captions encoded."""
        if not self.pictured:
            texts = self._texts[batch["caption"]]
        elif _TEXT in batch:
            texts = batch[_TEXT]
        else:
            texts = self._texts.once(batch["caption"], list(batch["pixels"][:, :, 0]))
        if "pixels" in batch:
            batch = {**batch, **self._encoder.encode(batch["pixels"])}
        return {**batch, "texts": texts}

    def encode(self, pixels: torch.Tensor, caption: str) -> Batch:
        """The parts of one clip `[3, T, H, W]` and its caption, on the CPU."""
        parts: Batch = {name: value[0].cpu() for name, value in self._encoder.encode(pixels[None]).items()}
        if self.pictured:
            [parts[_TEXT]] = self._texts.once([caption], [pixels[:, 0]])
        return {**parts, "caption": caption}

    def measured(self, pick: Pick, pixels: Callable[[], torch.Tensor]) -> Batch:
        """The parts of one clip that is held out, on the CPU; kept where clips are.

        Args:
            pick: the clip.
            pixels: makes its pixels `[3, T, H, W]`, if they are needed.
        """
        caption = self.dataset.caption(pick.index)
        if not self.cached:
            return self.encode(pixels(), caption)
        parts = self._read(pick)
        if len(parts) < len(self._parts):
            made = self.encode(pixels(), caption)
            for name in self._parts:
                self.cache.write(made[name] if name == _TEXT else {"tensor": made[name]}, *self._key(pick, name))
            parts = self._read(pick)  # as the cache has it, in half precision or not
        return {**parts, "caption": caption}

    def release(self) -> None:
        """Give back the memory of what encodes; it is loaded again when it is needed."""
        self._encoder.release()
        if self.pictured:
            self._texts.encoder.release()

    def texts(self, prompts: Sequence[str], pictures: Sequence[torch.Tensor] | None = None) -> list[Text]:
        """Prompts, encoded; with pictures where the text encoder is `pictured`, see `TextEncoder.encode`."""
        return self._texts.seen(prompts, pictures)

    def fill(self, process: Process) -> None:
        """Encode what the cache lacks or has in damaged files, each process a share. Clips that cannot be read are
        dropped, and counted.

        Raises:
            ConfigError: none can be read; or processes do not see what the others wrote.
            CheckpointError: the cache cannot be written.
        """
        if self.cache is None:
            return
        captions = () if self.pictured else self.dataset.captions()
        self._texts.fill(sorted({*captions, *self._prompts}), process)
        if not self.pictured:
            self._texts.encoder.release()
        if not self.cached:
            if self.members is None and process.is_main:
                logger.info("clips that are endless are not cached: set data.clips to have them encoded once.")
            self.release()
            return
        picks = [self._pick(size, index) for size, indices in self.members.items() for index in dict.fromkeys(indices)]
        missing = self._all_missing(picks, process)
        if process.is_main:
            files = (self.cache.path(*self._key(pick, part)) for pick, parts in missing for part in parts)
            if damaged := sum(file.exists() for file in files):
                logger.warning(
                    "%d files of the cache are damaged, or of an earlier version, and are made again.", damaged
                )
        process.wait()  # before the first one writes, or that would count as damaged
        own = missing[process.index :: process.count]
        failed = []
        decoded = ahead(self._decoded, own, self._workers, self._workers + 1)
        for pick, parts, pixels in process.track(decoded, "encoding clips", len(own)):
            if isinstance(pixels, OSError):
                logger.warning("%s; it is left out.", pixels)
                failed.append((pick.size, pick.index))
                continue
            if visual := tuple(name for name in parts if name != _TEXT):
                for name, value in self._encoder.encode(pixels[None], visual).items():
                    self.cache.write({"tensor": value[0].cpu()}, *self._key(pick, name))
            if _TEXT in parts:
                [text] = self._texts.once([self.dataset.caption(pick.index)], [pixels[:, 0]], stay=True)
                self.cache.write(text, *self._key(pick, _TEXT))
        self.release()
        process.wait()
        gone = set(process.gathered(failed))
        absent = {pick for pick, _ in missing}
        made = [pick for pick in absent if (pick.size, pick.index) not in gone]
        # Of what was there before, each process has looked into a share alone.
        made += [pick for pick in picks[:: max(1, len(picks) // _LOOKED_INTO)] if pick not in absent]
        _see_all(self.cache, process, lambda: [pick for pick in made if self._missing(pick)])
        self.members = {
            size: [index for index in indices if (self._pick(size, index).size, index) not in gone]
            for size, indices in self.members.items()
        }
        lost = len(gone)
        if lost == len(picks):
            raise ConfigError(f"data: none of the {lost} clips can be decoded; the log above says why of each.")
        if lost and process.is_main:
            logger.warning("%d of %d clips cannot be decoded and are left out.", lost, len(picks))

    def _decoded(self, asked: tuple[Pick, tuple[str, ...]]) -> tuple[Pick, tuple[str, ...], torch.Tensor | OSError]:
        """What is to be encoded, with its pixels `[3, T, H, W]`, or why it has none."""
        pick, parts = asked
        try:
            return pick, parts, self.dataset.pixels(pick)
        except OSError as error:
            return pick, parts, error

    def _all_missing(self, picks: Sequence[Pick], process: Process) -> list[tuple[Pick, tuple[str, ...]]]:
        """What the cache lacks, of which each process looks for a share, as many files at a time as it can."""
        numbers = range(process.index, len(picks), process.count)
        looked = ahead(lambda number: self._missing(picks[number]), numbers, readers(), 256)
        shown = process.track(looked, "looking into the cache", len(numbers))
        own = {number: parts for number, parts in zip(numbers, shown, strict=True) if parts}
        return [(picks[number], parts) for number, parts in sorted(process.merged(own).items())]

    def _pick(self, size: int, index: int) -> Pick:
        chosen = self.sizes[size]
        return Pick(index, (chosen.frames, chosen.height, chosen.width), _NOWHERE)

    @property
    def _parts(self) -> tuple[str, ...]:
        """What is kept of a clip."""
        return (*self.identities, *((_TEXT,) if self.pictured else ()))

    def _key(self, pick: Pick, part: str) -> tuple[str, ...]:
        if part == _TEXT:
            return self.dataset.identity(pick), self.dataset.caption(pick.index), TEXT_VERSION, self.text_identity
        return self.dataset.identity(pick), part, self.identities[part]

    def _read(self, pick: Pick) -> Batch:
        """The parts of a clip that the cache has whole."""
        found = {name: self.cache.read(*self._key(pick, name)) for name in self._parts}
        return {n: part if n == _TEXT else part["tensor"] for n, part in found.items() if part is not None}

    def _missing(self, pick: Pick) -> tuple[str, ...]:
        """The parts of a clip that the cache lacks."""
        return tuple(name for name in self._parts if not self.cache.has(*self._key(pick, name)))


_LOOKED_INTO = 64
"""Clips of the cache, at most about, that all processes look for, to see that it is one."""
_LATE = 60.0
"""Seconds after which a file that another machine wrote is seen on a disk of the network."""


def _see_all(cache: TensorCache, process: Process, absent: Callable[[], Sequence[object]]) -> None:
    """See that a process finds in the cache what all of them wrote; every process must call this.

    Args:
        cache: that they share.
        process: this one.
        absent: what it does not find there.

    Raises:
        ConfigError: one of them does not.
    """
    if process.count == 1:
        return
    lost, begin = len(absent()), time.monotonic()
    while lost and time.monotonic() - begin < _LATE:
        time.sleep(1)
        lost = len(absent())
    if process.any(lost > 0):
        raise ConfigError(
            f"data.cache: process {process.index} of {process.count} does not find in {cache.folder} {lost} encodings "
            "that others wrote, or they do not find its: data.cache must be one folder that all processes see, on a "
            "disk that their machines share."
        )


TEXT_VERSION = "text 3"
"""Of encoded captions, a part of what they are kept under."""


class Texts:
    """Encoded captions, remembered.

    Args:
        encoder: of the captions.
        cache: where they are kept on disk, or None.
        limit: bytes of them that stay in memory.
    """

    def __init__(self, encoder: TextEncoder, cache: TensorCache | None, limit: int = 2**30) -> None:
        self.encoder, self.cache, self.limit = encoder, cache, limit
        self._known: dict[_Asked, Text] = {}

    def __getitem__(self, captions: Sequence[str]) -> list[Text]:
        return self.seen(captions, None)

    def seen(self, captions: Sequence[str], pictures: Sequence[torch.Tensor] | None) -> list[Text]:
        """Captions with what the encoder sees with them; see `TextEncoder.encode`."""
        asked = [(c, "" if pictures is None else _digest(pictures[n])) for n, c in enumerate(captions)]
        shown = dict(zip(asked, pictures or (), strict=pictures is not None))
        missing = [each for each in dict.fromkeys(asked) if each not in self._known]
        if missing:
            if sum(map(_size, self._known.values())) > self.limit:
                self._known = {each: self._known[each] for each in set(asked) & set(self._known)}
            self._known.update(self._read(missing, shown))
            # A text encoder may be larger than the model, which now needs the memory.
            self.encoder.park()
        return [self._known[each] for each in asked]

    def once(self, captions: Sequence[str], pictures: Sequence[torch.Tensor], stay: bool = False) -> list[Text]:
        """The same for the first frames of clips, which are not remembered here.

        Args:
            captions, pictures: of the clips.
            stay: leave the encoder where it runs.
        """
        made = self.encoder.encode(list(captions), list(pictures))
        if not stay:
            self.encoder.park()
        return made

    def fill(self, captions: Sequence[str], process: Process) -> None:
        """Encode the captions that the cache lacks, each process a share."""
        share = captions[process.index :: process.count]
        batches = range(0, len(share), 16)
        for first in process.track(batches, "encoding captions, 16 at a time", len(batches)):
            asked = [(caption, "") for caption in share[first : first + 16]]
            self._read([each for each in asked if not self.cache.has(*self._key(each))], {})
        process.wait()
        _see_all(self.cache, process, lambda: [c for c in captions if not self.cache.has(*self._key((c, "")))])

    def _read(self, asked: list[_Asked], shown: dict[_Asked, torch.Tensor]) -> dict[_Asked, Text]:
        found = {} if self.cache is None else {each: self.cache.read(*self._key(each)) for each in asked}
        found = {each: states for each, states in found.items() if states is not None}
        missing = [each for each in asked if each not in found]
        if missing:
            captions = [caption for caption, _ in missing]
            made = self.encoder.encode(captions, [shown[each] for each in missing]) if shown else None
            for each, states in zip(missing, made or self.encoder.encode(captions), strict=True):
                found[each] = states
                if self.cache is not None:
                    self.cache.write(states, *self._key(each))
        return found

    def _key(self, asked: _Asked) -> tuple[str, ...]:
        caption, picture = asked
        return (*([picture] if picture else []), caption, TEXT_VERSION, self.encoder.identity)


_Asked = tuple[str, str]
"""A caption, and the digest of the picture that is seen with it; "" for none."""


def _digest(picture: torch.Tensor) -> str:
    """What a picture `[3, H, W]` is known by."""
    plain = picture.detach().float().cpu().contiguous()
    return hashlib.sha256(f"{list(plain.shape)}".encode() + plain.numpy().tobytes()).hexdigest()


def say_what_is_cut(captions: Sequence[str], encoder: TextEncoder) -> None:
    """Name the captions that are longer than what the text encoder takes."""
    counts = [count for first in range(0, len(captions), 256) for count in encoder.count(captions[first : first + 256])]
    long = [f'"{text[:40]}..." ({n} tokens)' for text, n in zip(captions, counts, strict=True) if n > encoder.length]
    if long:
        logger.warning(
            "%d of %d captions have more than the %d tokens that the text encoder takes; what is beyond is cut off: %s",
            len(long), len(captions), encoder.length, some(long),
        )  # fmt: skip


def _size(text: Text) -> int:
    """Bytes of an encoded text."""
    return sum(tensor.nbytes for tensor in text.values())
