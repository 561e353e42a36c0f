"""When to ask the registry: ``always``, only if the image is ``missing`` here, or ``never``."""

from __future__ import annotations

from enum import StrEnum

from hypervisor.errors import InvalidInput


class PullPolicy(StrEnum):
    """When to ask the registry for an image."""

    ALWAYS = "always"
    MISSING = "missing"
    NEVER = "never"

    @classmethod
    def parse(cls, text: str, *, where: str = "") -> PullPolicy:
        """From the CLI's words (``missing``) or Kubernetes' (``IfNotPresent``).

        :param where: path of the field, for the error
        :raises InvalidInput: it is neither
        """
        known = {policy.value: policy for policy in cls}
        known |= {"Always": cls.ALWAYS, "IfNotPresent": cls.MISSING, "Never": cls.NEVER}
        if text not in known:
            raise InvalidInput(f"unknown pull policy {text!r}; use one of: {', '.join(known)}", where=where)
        return known[text]

    def must_pull(self, *, present: bool) -> bool:
        """Whether to ask the registry, given whether the image is here already."""
        return self is PullPolicy.ALWAYS or (self is PullPolicy.MISSING and not present)
