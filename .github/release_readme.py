"""Give the links of README.md whole addresses: `python .github/release_readme.py https://github.com/OWNER/NAME v1.2.3`.

PyPI shows that page apart from the repository, where links to its files lead nowhere. Only the checkout of a release is
changed so. Needs Python alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs" / "site"))
from links import map_links  # noqa: E402 - it is found there

PICTURES = (".png", ".jpg", ".svg")


def released(text: str, repository: str, tag: str) -> str:
    """The page with its links to files of the repository as it is at a tag; pictures as themselves.

    Args:
        text: of README.md. repository: its address. tag: of the release.
    """

    def place(path: str, anchor: str) -> str:
        kind = "raw" if path.endswith(PICTURES) else "blob"
        return f"{repository.rstrip('/')}/{kind}/{tag}/{path}{anchor}"

    return map_links(text, "README.md", place)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: release_readme.py REPOSITORY TAG")
    page = ROOT / "README.md"
    page.write_text(released(page.read_text(encoding="utf-8"), *sys.argv[1:]), encoding="utf-8", newline="\n")
