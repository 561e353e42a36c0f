"""What must hold of a pod and of a template of pods besides its schema, and what of a pod may change.

Source: Kubernetes API reference, PodSpec v1 core; wording as upstream's validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypervisor.kube.selectors import label_key_error, label_value_error
from hypervisor.master.kinds.container_rules import container, local_path
from hypervisor.master.kinds.rules import (
    Causes,
    View,
    annotation_set,
    at_least,
    config_key,
    dns_label,
    dns_subdomain,
    duplicate,
    expression,
    forbidden,
    invalid,
    label_selector,
    labels,
    named,
    one_of,
    required,
)

RESTART_POLICIES = ("Always", "Never", "OnFailure")
DNS_POLICIES = ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None")
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
NODE_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt")
UPDATE_REFUSED = (
    "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
    "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
    "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
)


def pod(obj: View) -> Causes:
    """A Pod."""
    yield from pod_spec("spec", obj.get("spec") or {})


def template(path: str, obj: View | None) -> Causes:
    """A template of pods."""
    made = obj or {}
    meta = made.get("metadata") or {}
    yield from labels(f"{path}.metadata.labels", meta.get("labels"))
    yield from annotation_set(f"{path}.metadata.annotations", meta.get("annotations"))
    yield from pod_spec(f"{path}.spec", made.get("spec") or {})
    if (made.get("spec") or {}).get("ephemeralContainers"):
        yield forbidden(f"{path}.spec.ephemeralContainers", "ephemeral containers not allowed in pod template")


def pod_spec(path: str, spec: View) -> Causes:
    """A PodSpec, wherever it stands."""
    names = {str(volume.get("name")) for volume in spec.get("volumes") or ()}
    yield from _volumes(f"{path}.volumes", spec.get("volumes") or ())
    if not spec.get("containers"):
        yield required(f"{path}.containers")
    seen: set[str] = set()
    for group in ("containers", "initContainers"):
        for index, one in enumerate(spec.get(group) or ()):
            here = f"{path}.{group}[{index}]"
            yield from container(here, one, names, init=group == "initContainers")
            if one.get("name") in seen:
                yield duplicate(f"{here}.name", one["name"])
            seen.add(str(one.get("name")))
    yield from one_of(f"{path}.restartPolicy", spec.get("restartPolicy"), RESTART_POLICIES)
    yield from one_of(f"{path}.dnsPolicy", spec.get("dnsPolicy"), DNS_POLICIES)
    yield from _names(path, spec)
    yield from at_least(f"{path}.terminationGracePeriodSeconds", spec.get("terminationGracePeriodSeconds"))
    if spec.get("activeDeadlineSeconds") is not None and not 1 <= spec["activeDeadlineSeconds"] < 2**31:
        yield invalid(
            f"{path}.activeDeadlineSeconds",
            spec["activeDeadlineSeconds"],
            "must be between 1 and 2147483647, inclusive",
        )
    yield from labels(f"{path}.nodeSelector", spec.get("nodeSelector"))
    yield from _tolerations(f"{path}.tolerations", spec.get("tolerations") or ())
    yield from _affinity(f"{path}.affinity", spec.get("affinity") or {})
    yield from _spread(f"{path}.topologySpreadConstraints", spec.get("topologySpreadConstraints") or ())
    yield from _host_ports(path, spec)


def _names(path: str, spec: View) -> Causes:
    """Fields of a PodSpec that are names of something."""
    rules = {
        "serviceAccountName": dns_subdomain,
        "nodeName": dns_subdomain,
        "priorityClassName": dns_subdomain,
        "runtimeClassName": dns_subdomain,
        "hostname": dns_label,
        "subdomain": dns_label,
    }
    for key, rule in rules.items():
        if spec.get(key):
            yield from named(f"{path}.{key}", spec[key], rule)
    for index, alias in enumerate(spec.get("hostAliases") or ()):
        for place, name in enumerate(alias.get("hostnames") or ()):
            yield from named(f"{path}.hostAliases[{index}].hostnames[{place}]", name, dns_subdomain)


# ---- volumes ---------------------------------------------------------------------------------------------------------


def _volumes(path: str, volumes: Any) -> Causes:
    seen = set()
    for index, volume in enumerate(volumes):
        here, name = f"{path}[{index}]", volume.get("name")
        yield from named(f"{here}.name", name, dns_label)
        if name in seen:
            yield duplicate(f"{here}.name", name)
        seen.add(name)
        kinds = [key for key, value in volume.items() if key != "name" and value is not None]
        for extra in kinds[1:]:
            yield forbidden(f"{here}.{extra}", "may not specify more than 1 volume type")
        if kinds:
            yield from _volume(f"{here}.{kinds[0]}", kinds[0], volume[kinds[0]])


def _volume(path: str, kind: str, source: View) -> Causes:
    if kind == "configMap" and not source.get("name"):
        yield required(f"{path}.name")
    if kind == "secret" and not source.get("secretName"):
        yield required(f"{path}.secretName")
    if kind == "hostPath" and not source.get("path"):
        yield required(f"{path}.path")
    if kind == "persistentVolumeClaim" and not source.get("claimName"):
        yield required(f"{path}.claimName")
    yield from mode(f"{path}.defaultMode", source.get("defaultMode"))
    if kind in ("configMap", "secret"):
        yield from _items(f"{path}.items", source.get("items") or ())
    if kind == "projected":
        yield from _projected(f"{path}.sources", source.get("sources") or ())


def mode(path: str, value: Any) -> Causes:
    """The mode bits of files."""
    if isinstance(value, int) and not 0 <= value <= 0o777:
        yield invalid(path, value, "must be a number between 0 and 0777 (octal), both inclusive")


def _items(path: str, items: Any) -> Causes:
    for index, item in enumerate(items):
        here = f"{path}[{index}]"
        yield from named(f"{here}.key", item.get("key"), config_key)
        if not item.get("path"):
            yield required(f"{here}.path")
        yield from local_path(f"{here}.path", item.get("path") or "")
        yield from mode(f"{here}.mode", item.get("mode"))


def _projected(path: str, sources: Any) -> Causes:
    for index, source in enumerate(sources):
        given = [key for key, value in source.items() if value is not None]
        if len(given) > 1:
            yield forbidden(f"{path}[{index}].{given[1]}", "may not specify more than 1 volume type per source")
        for key in given:
            here = f"{path}[{index}].{key}"
            if key in ("configMap", "secret"):
                if not source[key].get("name"):
                    yield required(f"{here}.name")
                yield from _items(f"{here}.items", source[key].get("items") or ())
            if key == "serviceAccountToken":
                seconds = source[key].get("expirationSeconds", 3600)
                if seconds < 600:
                    yield invalid(
                        f"{here}.expirationSeconds", seconds, "may not specify a duration less than 10 minutes"
                    )
                if not source[key].get("path"):
                    yield required(f"{here}.path")


# ---- placement -------------------------------------------------------------------------------------------------------


def _tolerations(path: str, tolerations: Any) -> Causes:
    for index, one in enumerate(tolerations):
        here, operator = f"{path}[{index}]", one.get("operator") or "Equal"
        if one.get("key") and (why := label_key_error(one["key"])):
            yield invalid(f"{here}.key", one["key"], why)
        if not one.get("key") and operator != "Exists":
            yield invalid(
                f"{here}.operator",
                one.get("operator", ""),
                'operator must be Exists when `key` is empty, which means "match all values and all keys"',
            )
        if operator == "Exists" and one.get("value"):
            yield invalid(f"{here}.operator", one["value"], "value must be empty when `operator` is 'Exists'")
        elif one.get("value") and (why := label_value_error(one["value"])):
            yield invalid(f"{here}.operator", one["value"], why)
        yield from one_of(f"{here}.operator", operator, ("Equal", "Exists", "Lt", "Gt"))
        yield from one_of(f"{here}.effect", one.get("effect"), EFFECTS, needed=False)
        if one.get("tolerationSeconds") is not None and one.get("effect") != "NoExecute":
            yield invalid(
                f"{here}.effect", one.get("effect", ""), "effect must be 'NoExecute' when `tolerationSeconds` is set"
            )


def _affinity(path: str, affinity: View) -> Causes:
    node = affinity.get("nodeAffinity") or {}
    must = node.get("requiredDuringSchedulingIgnoredDuringExecution")
    if must is not None:
        here = f"{path}.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms"
        if not must.get("nodeSelectorTerms"):
            yield required(here, "must have at least one node selector term")
        for index, term in enumerate(must.get("nodeSelectorTerms") or ()):
            yield from _node_term(f"{here}[{index}]", term)
    here = f"{path}.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution"
    for index, wish in enumerate(node.get("preferredDuringSchedulingIgnoredDuringExecution") or ()):
        yield from _weight(f"{here}[{index}].weight", wish.get("weight"))
        yield from _node_term(f"{here}[{index}].preference", wish.get("preference") or {})
    for kind in ("podAffinity", "podAntiAffinity"):
        yield from _pod_affinity(f"{path}.{kind}", affinity.get(kind) or {})


def _node_term(path: str, term: View) -> Causes:
    for index, rule in enumerate(term.get("matchExpressions") or ()):
        yield from expression(f"{path}.matchExpressions[{index}]", rule, NODE_OPERATORS)


def _weight(path: str, weight: Any) -> Causes:
    if not isinstance(weight, int) or not 1 <= weight <= 100:
        yield invalid(path, weight, "must be in the range 1-100")


def _pod_affinity(path: str, affinity: View) -> Causes:
    name = "requiredDuringSchedulingIgnoredDuringExecution"
    for index, term in enumerate(affinity.get(name) or ()):
        yield from _pod_term(f"{path}.{name}[{index}]", term)
    name = "preferredDuringSchedulingIgnoredDuringExecution"
    for index, wish in enumerate(affinity.get(name) or ()):
        yield from _weight(f"{path}.{name}[{index}].weight", wish.get("weight"))
        yield from _pod_term(f"{path}.{name}[{index}].podAffinityTerm", wish.get("podAffinityTerm") or {})


def _pod_term(path: str, term: View) -> Causes:
    yield from label_selector(f"{path}.labelSelector", term.get("labelSelector"))
    if not term.get("topologyKey"):
        yield required(f"{path}.topologyKey", "can not be empty")


def _spread(path: str, constraints: Any) -> Causes:
    for index, one in enumerate(constraints):
        here = f"{path}[{index}]"
        if one.get("maxSkew", 0) <= 0:
            yield invalid(f"{here}.maxSkew", one.get("maxSkew", 0), "must be greater than zero")
        if not one.get("topologyKey"):
            yield required(f"{here}.topologyKey", "can not be empty")
        yield from one_of(
            f"{here}.whenUnsatisfiable", one.get("whenUnsatisfiable"), ("DoNotSchedule", "ScheduleAnyway")
        )
        yield from label_selector(f"{here}.labelSelector", one.get("labelSelector"))


def _host_ports(path: str, spec: View) -> Causes:
    seen = set()
    for index, one in enumerate(spec.get("containers") or ()):
        for place, port in enumerate(one.get("ports") or ()):
            here = f"{path}.containers[{index}].ports[{place}]"
            taken = (port.get("hostIP", ""), port.get("hostPort"), port.get("protocol"))
            if port.get("hostPort") and taken in seen:
                yield duplicate(f"{here}.hostPort", f"{taken[2]}//{taken[1]}")
            seen.add(taken)
            if spec.get("hostNetwork") and port.get("hostPort") != port.get("containerPort"):
                yield invalid(
                    f"{here}.containerPort",
                    port.get("containerPort"),
                    "must match `hostPort` when `hostNetwork` is true",
                )


# ---- changes ---------------------------------------------------------------------------------------------------------


def pod_update(new: View, old: View) -> Causes:
    """A change of a Pod's spec: images, a shorter deadline and more tolerations, and nothing else."""
    after, before = new.get("spec") or {}, old.get("spec") or {}
    if after == before:
        return
    for group in ("containers", "initContainers"):
        if len(after.get(group) or ()) != len(before.get(group) or ()):
            yield forbidden(
                f"spec.{group}", f"pod updates may not add or remove {'init ' * (group[0] == 'i')}containers"
            )
            return
    yield from _deadline(after.get("activeDeadlineSeconds"), before.get("activeDeadlineSeconds"))
    yield from _kept_tolerations(after.get("tolerations") or [], before.get("tolerations") or [])
    if _comparable(after, before) != _comparable(before, before):
        yield forbidden("spec", UPDATE_REFUSED)


def _deadline(new: int | None, old: int | None) -> Causes:
    path = "spec.activeDeadlineSeconds"
    if old is not None and new is None:
        yield invalid(path, new, "must not update from a positive integer to nil value")
    elif old is not None and new is not None and new > old:
        yield invalid(path, new, f"must be less than or equal to previous value {old}")


def _kept_tolerations(new: list[Any], old: list[Any]) -> Causes:
    def essence(one: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in one.items() if key != "tolerationSeconds"}

    kept = [essence(one) for one in new]
    if any(essence(one) not in kept for one in old):
        yield forbidden("spec.tolerations", "existing toleration can not be modified except its tolerationSeconds")


def _comparable(spec: View, before: View) -> dict[str, Any]:
    """`spec` without what may change. A scheduling gate may go, and then a node be chosen (by binding)."""
    kept = {key: value for key, value in spec.items() if key not in ("activeDeadlineSeconds", "tolerations")}
    for group in ("containers", "initContainers"):
        if kept.get(group):
            kept[group] = [{key: value for key, value in one.items() if key != "image"} for one in kept[group]]
    if (before.get("terminationGracePeriodSeconds") or 0) < 0 and spec.get("terminationGracePeriodSeconds") == 1:
        kept["terminationGracePeriodSeconds"] = before["terminationGracePeriodSeconds"]
    gates = [gate.get("name") for gate in before.get("schedulingGates") or ()]
    if all(gate.get("name") in gates for gate in spec.get("schedulingGates") or ()):
        kept.pop("schedulingGates", None)
    return kept
