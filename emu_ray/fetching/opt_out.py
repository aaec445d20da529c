"""Whether a server forbids what we are about to do, by the header X-Robots-Tag."""

from __future__ import annotations

import re
from collections.abc import Iterable

FORBIDDING = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_NAME = re.compile(r"[a-z][\w-]*")  # of an agent; a date's "25 jun 2010 15" isn't one


def is_opted_out(robots_tags: Iterable[str], agent: str) -> bool:
    """Whether one of the headers forbids it to everybody or to `agent`, the product token of our User-Agent.

    A header is a list `directive, ...` or `agent: directive, ...`; an agent's name holds for the directives after it in
    the same header, up to the next name.
    """
    for tag in robots_tags:
        is_for_us = True
        for part in tag.lower().split(","):
            name, colon, after = part.partition(":")
            name, directive = name.strip(), part.strip()
            names_us = name in ("", "*", agent.lower())
            if colon and (names_us or (_NAME.fullmatch(name) and name not in _WITH_VALUE)):
                is_for_us, directive = names_us, after.strip()
            if is_for_us and directive in FORBIDDING:
                return True
    return False
