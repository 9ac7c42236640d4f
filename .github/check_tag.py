"""Refuse a tag that is not the version of the package: `python .github/check_tag.py v1.2.3`. Needs Python alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problem(tag: str, source: str, changelog: str) -> str | None:
    """What keeps a tag from being a release.

    Args:
        tag: `v` and the version. source: text of `__init__.py`. changelog: text of CHANGELOG.md.
    """
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if found is None:
        return "__init__.py has no line __version__ = ..."
    version = found[1]
    if tag != f"v{version}":
        return f"the tag is {tag}, and __version__ in __init__.py is {version}: the tag of that is v{version}"
    heading = re.search(rf"^## \[{re.escape(version)}\](.*)$", changelog, re.MULTILINE)
    if heading is None:
        return f"CHANGELOG.md has no section ## [{version}]"
    if not re.fullmatch(r" - \d{4}-\d\d-\d\d", heading[1]):
        return f"CHANGELOG.md has ## [{version}]{heading[1]}, and no date of release: ## [{version}] - YYYY-MM-DD"
    return None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: check_tag.py TAG")
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("__init__.py", "CHANGELOG.md")]
    sys.exit(problem(sys.argv[1], *texts))
