"""The one error of the builder."""

from __future__ import annotations


class BuildError(Exception):
    """The image cannot be built; the message says what, why and how to mend it. Earlier output is as it was."""
