"""A container's environment: variables of the manifest, config maps, secrets, the pod's fields and resources."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from hypervisor.controller.podobjects import Lookup
from hypervisor.controller.sizing import vm_size
from hypervisor.controller.spec import ContainerSpec, KeyRef, PodSpec, ResourceRef
from hypervisor.errors import InvalidInput, NotFound

MAX_EXPANDED = 131_071
"""Linux' own limit of one argument or variable."""
_REFERENCE = re.compile(r"\$(?:\$|\(([^)]*)\))")


@dataclass(frozen=True, slots=True)
class External:
    """What config maps and secrets give a container.

    :ivar all_of: the entries of ``envFrom``, in order, under their names as variables
    :ivar values: by variable; None for an optional one that is not there
    :ivar services: of the cluster's Services; everything else comes before them
    """

    services: Mapping[str, str] = field(default_factory=dict)
    all_of: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str | None] = field(default_factory=dict)


NOTHING = External()


async def fetch_external(lookup: Lookup, pod: PodSpec, container: ContainerSpec) -> External:
    """What it needs, as of now.

    :raises NotFound: an object or key that is not optional is not there
    :raises HvError: it cannot be had
    """
    all_of: dict[str, str] = {}
    for group in container.env_from:
        for key, value in (await _entries(lookup, pod, group.ref) or {}).items():
            all_of[group.prefix + key] = _text(value)
    values: dict[str, str | None] = {}
    for variable in container.env:
        if variable.key is not None:
            values[variable.name] = await _value(lookup, pod, variable.key)
    return External(await lookup.service_variables(pod), all_of, values)


async def _value(lookup: Lookup, pod: PodSpec, ref: KeyRef) -> str | None:
    entries = await _entries(lookup, pod, ref)
    if entries is not None and ref.key in entries:
        return _text(entries[ref.key])
    if ref.optional:
        return None
    raise NotFound(f"couldn't find key {ref.key} in {ref.kind} {pod.namespace}/{ref.name}")


async def _entries(lookup: Lookup, pod: PodSpec, ref: KeyRef) -> Mapping[str, bytes] | None:
    get: Callable[[str, str], Awaitable[Mapping[str, bytes]]]
    get = lookup.config_map if ref.kind == "configMap" else lookup.secret
    try:
        return await get(pod.namespace, ref.name)
    except NotFound:
        if ref.optional:
            return None
        raise


def _text(value: bytes) -> str:
    return value.replace(b"\0", b"").decode("utf-8", "surrogateescape")


def expand(text: str, variables: Mapping[str, str]) -> str:
    """``$(NAME)`` replaced as Kubernetes does: ``$$`` is ``$``, an unknown name stays as it is written.

    :raises InvalidInput: it becomes longer than Linux takes (variables that refer to each other grow like powers)
    """
    parts: list[str] = []
    length = end = 0
    for match in _REFERENCE.finditer(text):
        value = "$" if match[1] is None else variables.get(match[1], match[0])
        parts += (text[end : match.start()], value)
        length += match.start() - end + len(value)
        end = match.end()
        if length > MAX_EXPANDED:
            break
    if length + len(text) - end > MAX_EXPANDED:
        # The text is not shown: it may be a secret, and this goes into a status.
        raise InvalidInput(f"a text with $(NAME) in it has, with its variables, more than {MAX_EXPANDED} characters")
    return "".join((*parts, text[end:]))


def resource_value(ref: ResourceRef, container: ContainerSpec, pod: PodSpec) -> str:
    """A limit or request in units of the divisor, rounded up; a limit that is not set is what the pod's VM has."""
    resources = pod.container(ref.container).resources if ref.container else container.resources
    kind, _, name = ref.resource.partition(".")
    size = vm_size(pod)
    limits = {
        "cpu": (resources.cpu_limit_millis, size.vcpus * 1000),
        "memory": (resources.memory_limit, size.memory_bytes),
        "ephemeral-storage": (resources.disk_limit, size.disk_bytes),
    }
    requests = {"cpu": resources.cpu_request_millis, "memory": resources.memory_request, "ephemeral-storage": None}
    limit, available = limits[name]
    amount = limit if limit is not None else available
    if kind == "requests":
        amount = requests[name] if requests[name] is not None else limit or 0  # type: ignore[assignment]
    return str(-(-amount // ref.divisor))
