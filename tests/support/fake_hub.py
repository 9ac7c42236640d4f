"""The hub without a network: folders here stand for repositories, behind huggingface_hub's own functions."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub as hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects


@dataclass
class FakeHub:
    """Repositories by name; `asked` has the name and the options of each call, `got` the files by repository."""

    cache: Path
    repositories: dict[str, Path]
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    got: dict[str, set[str]] = field(default_factory=dict)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
        monkeypatch.setattr(hub, "hf_hub_download", self.hf_hub_download)
        monkeypatch.setattr(hub, "snapshot_download", self.snapshot_download)
        return self

    def hf_hub_download(self, name: str, file: str, **options: Any) -> str:
        self.asked.append((name, options))
        if not (self._repository(name) / file).is_file():
            raise EntryNotFoundError("404")
        return str(self._take(name, [file]) / file)

    def snapshot_download(
        self,
        name: str,
        *,
        allow_patterns: list[str] | None = None,
        ignore_patterns: list[str] | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> str:
        self.asked.append((name, options))
        if local_files_only:
            if name not in self.got:
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.cache / name)
        repository = self._repository(name)
        files = sorted(str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file())
        wanted = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        return str(self._take(name, list(wanted)))

    def _repository(self, name: str) -> Path:
        if name not in self.repositories:
            response = SimpleNamespace(headers={}, request=None)
            raise RepositoryNotFoundError(f"404: there is no {name}", response=response)
        return self.repositories[name]

    def _take(self, name: str, files: list[str]) -> Path:
        folder = self.cache / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self._repository(name) / file, folder / file)
        self.got.setdefault(name, set()).update(files)
        return folder
