"""Links of a page, which are right in the repository, made right in the tree of the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable

# Code, which has no links, or a link with its text: [text](target "title") or ![text](target).
_CODE_OR_LINK = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$|`[^`\n]+`)"
    r"|(?P<bang>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)",
    re.DOTALL | re.MULTILINE,
)


def is_outside(target: str) -> bool:
    """Whether a link has an address of its own, or stays on its page."""
    return bool(re.match(r"[a-z]+:|#|//", target))


def map_links(text: str, source: str, place: Callable[[str, str], str | None]) -> str:
    """Give every link of a page another target.

    Args:
        text: Markdown.
        source: path of the file in the repository, to whose folder the links are relative.
        place: from a path in the repository and an anchor ("" or "#name") to the new target; None where there is
            none, which leaves the text of the link alone.
    """

    def replaced(match: re.Match[str]) -> str:
        if match["code"] or is_outside(match["target"]):
            return match[0]
        path, sign, anchor = match["target"].partition("#")
        target = place(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)), sign + anchor)
        return match["text"] if target is None else f"{match['bang']}[{match['text']}]({target})"

    return _CODE_OR_LINK.sub(replaced, text)


def targets(text: str) -> list[str]:
    """The targets of a page's links, those in code left out."""
    return [match["target"] for match in _CODE_OR_LINK.finditer(text) if not match["code"]]


def anchor_of(heading: str) -> str:
    """The anchor that GitHub and the site give to a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[^\w\s-]", lambda m: m[1] or "", heading.strip())
    return re.sub(r"[\s-]+", "-", plain).lower()
