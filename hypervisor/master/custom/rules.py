"""What a CustomResourceDefinition must be, its defaults, and what of it may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.errors import Cause
from hypervisor.master.custom import structural
from hypervisor.master.custom.columns import parse
from hypervisor.master.custom.definition import FINALIZER
from hypervisor.master.kinds import rules
from hypervisor.master.kinds.kind import Object

Causes = Iterator[Cause]
View = Mapping[str, Any]
_COLUMN_TYPES = ("boolean", "date", "integer", "number", "string")
_PATHS = {"specReplicasPath": ".spec.", "statusReplicasPath": ".status."}


def default(obj: Object) -> None:
    """Defaults of a definition: names, and the conversion that there is."""
    spec = obj.setdefault("spec", {})
    names = spec.setdefault("names", {})
    kind = names.get("kind")
    if isinstance(kind, str) and kind:
        names.setdefault("singular", kind.lower())
        names.setdefault("listKind", f"{kind}List")
    spec.setdefault("conversion", {"strategy": "None"})


def new(obj: Object) -> None:
    """A new definition goes only when its objects are gone."""
    finalizers = obj["metadata"].setdefault("finalizers", [])
    if FINALIZER not in finalizers:
        finalizers.append(FINALIZER)
    obj["status"] = {"conditions": [], "storedVersions": [], "acceptedNames": {"plural": "", "kind": ""}}


def check(obj: View) -> Causes:
    """Everything wrong with a definition."""
    spec = obj.get("spec") or {}
    names, group = spec.get("names") or {}, spec.get("group") or ""
    wanted = f"{names.get('plural')}.{group}"
    if obj["metadata"].get("name") != wanted:
        why = f'must be spec.names.plural+"."+spec.group: {wanted}'
        yield rules.invalid("metadata.name", obj["metadata"].get("name", ""), why)
    yield from rules.named("spec.group", group, rules.dns_subdomain)
    if "." not in group:
        yield rules.invalid("spec.group", group, "should be a domain with at least one dot")
    yield from rules.one_of("spec.scope", spec.get("scope"), ("Cluster", "Namespaced"))
    for key in ("plural", "singular"):
        yield from rules.named(f"spec.names.{key}", names.get(key), rules.dns_1035_label)
    yield from rules.named("spec.names.kind", str(names.get("kind") or "").lower(), rules.dns_1035_label)
    if (spec.get("conversion") or {}).get("strategy") != "None":
        why = "webhooks that convert are not called here: versions differ in apiVersion only"
        yield rules.forbidden("spec.conversion.strategy", why)
    if spec.get("preserveUnknownFields"):
        yield rules.invalid("spec.preserveUnknownFields", True, "must be false")
    yield from _versions(spec.get("versions") or ())


def _versions(versions: Any) -> Causes:
    if not versions:
        yield rules.required("spec.versions", "must have exactly one version marked as storage version")
    elif sum(bool(v.get("storage")) for v in versions) != 1:
        yield rules.invalid(
            "spec.versions",
            [v.get("name") for v in versions],
            "must have exactly one version marked as storage version",
        )
    seen: set[str] = set()
    for index, version in enumerate(versions):
        path, name = f"spec.versions[{index}]", str(version.get("name") or "")
        yield from rules.named(f"{path}.name", name, rules.dns_1035_label)
        if name in seen:
            yield rules.duplicate(f"{path}.name", name)
        seen.add(name)
        schema = (version.get("schema") or {}).get("openAPIV3Schema")
        if schema is None:
            yield rules.required(f"{path}.schema.openAPIV3Schema", "schemas are required")
        else:
            yield from structural.wrong(schema, f"{path}.schema.openAPIV3Schema")
        yield from _columns(version.get("additionalPrinterColumns") or (), path)
        yield from _scale((version.get("subresources") or {}).get("scale"), f"{path}.subresources.scale")


def _columns(columns: Any, path: str) -> Causes:
    for index, column in enumerate(columns):
        here = f"{path}.additionalPrinterColumns[{index}]"
        yield from rules.one_of(f"{here}.type", column.get("type"), _COLUMN_TYPES)
        try:
            parse(str(column.get("jsonPath") or ""))
        except ValueError as error:
            yield rules.invalid(f"{here}.jsonPath", column.get("jsonPath", ""), str(error))


def _scale(scale: View | None, path: str) -> Causes:
    for field, start in _PATHS.items() if scale else ():
        given = str((scale or {}).get(field) or "")
        if not given.startswith(start):
            yield rules.invalid(f"{path}.{field}", given, f"should be a json path under {start[:-1]}")


def check_update(after: View, before: View) -> Causes:
    """A definition that is established keeps group, scope and kind; a version that holds objects stays."""
    new_spec, old_spec = after.get("spec") or {}, before.get("spec") or {}
    yield from rules.unchanged("spec.group", new_spec.get("group"), old_spec.get("group"))
    if meta.is_true(before, "Established"):
        yield from rules.unchanged("spec.scope", new_spec.get("scope"), old_spec.get("scope"))
        for key in ("kind", "plural"):
            old_name = (old_spec.get("names") or {}).get(key)
            yield from rules.unchanged(f"spec.names.{key}", (new_spec.get("names") or {}).get(key), old_name)
    there = {v.get("name") for v in new_spec.get("versions") or ()}
    for version in (after.get("status") or {}).get("storedVersions") or ():
        if version not in there:
            yield rules.invalid("status.storedVersions", version, "missing from spec.versions; must be listed")
