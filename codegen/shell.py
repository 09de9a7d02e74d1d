"""Text from a request or a model, made safe for a shell script."""

from __future__ import annotations

import shlex


def quote(text: object) -> str:
    """One shell word that stands for exactly this text."""
    return shlex.quote(str(text))


def comment(text: object) -> str:
    """The text on one line without control characters, so that it cannot leave a comment."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))
