"""What becomes of each field of a ``v1`` Pod here: honoured, accepted and ignored, or refused, and why.

One row a field; a field of the published schema that has no row is refused, so that nothing new in Kubernetes is ever
dropped silently. docs/pods.md prints this table, and a test compares the two.

A refused field whose value says "nothing special" (`harmless`) is accepted: manifests that went through an API server
carry many such defaults.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hypervisor.controller.schema import field_path
from hypervisor.errors import InvalidInput


class Support(enum.Enum):
    """What happens with a field."""

    HONOURED = "honoured"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Field:
    """One row. `path` has ``[]`` for any list index; a row stands for everything below it unless rows go deeper."""

    path: str
    support: Support
    why: str
    harmless: tuple[object, ...] = ()


def _honoured(why: str, *paths: str) -> tuple[Field, ...]:
    return tuple(Field(path, Support.HONOURED, why) for path in paths)


def _ignored(why: str, *paths: str) -> tuple[Field, ...]:
    return tuple(Field(path, Support.IGNORED, why) for path in paths)


def _refused(why: str, *paths: str, harmless: tuple[object, ...] = ()) -> tuple[Field, ...]:
    return tuple(Field(path, Support.REFUSED, why, harmless) for path in paths)


_OFF = (False, None)

_METADATA = (
    *_honoured("", "metadata.name", "metadata.namespace", "metadata.labels", "metadata.annotations"),
    *_ignored(
        "set by the server",
        "metadata.uid",
        "metadata.resourceVersion",
        "metadata.generation",
        "metadata.creationTimestamp",
        "metadata.deletionTimestamp",
        "metadata.deletionGracePeriodSeconds",
        "metadata.selfLink",
        "metadata.managedFields",
    ),
    *_ignored("nothing here owns pods but you", "metadata.ownerReferences"),
    *_refused("give the pod a name", "metadata.generateName", harmless=("",)),
    *_refused("nothing here would remove them", "metadata.finalizers", harmless=([],)),
)

_POD = (
    *_ignored("the server's to write", "status"),
    *_honoured(
        "",
        "spec.containers[]",
        "spec.initContainers[]",
        "spec.restartPolicy",
        "spec.terminationGracePeriodSeconds",
        "spec.activeDeadlineSeconds",
        "spec.hostname",
        "spec.subdomain",
        "spec.setHostnameAsFQDN",
        "spec.shareProcessNamespace",
        "spec.hostAliases",
        "spec.dnsPolicy",
        "spec.dnsConfig.nameservers",
        "spec.dnsConfig.searches",
        "spec.dnsConfig.options",
        "spec.imagePullSecrets",
        "spec.enableServiceLinks",
        "spec.volumes[].name",
        "spec.volumes[].emptyDir.medium",
        "spec.volumes[].emptyDir.sizeLimit",
        "spec.volumes[].configMap",
        "spec.volumes[].secret",
        "spec.volumes[].downwardAPI",
        "spec.volumes[].projected",
        "spec.securityContext.runAsUser",
        "spec.securityContext.runAsGroup",
        "spec.securityContext.runAsNonRoot",
        "spec.securityContext.fsGroup",
        "spec.securityContext.supplementalGroups",
        "spec.securityContext.seccompProfile.type",
    ),
    *_ignored(
        "one host: there is nothing to schedule",
        "spec.nodeName",
        "spec.nodeSelector",
        "spec.affinity",
        "spec.tolerations",
        "spec.topologySpreadConstraints",
        "spec.schedulerName",
        "spec.priority",
        "spec.priorityClassName",
        "spec.preemptionPolicy",
    ),
    *_ignored("volumes begin empty: there is nothing to change", "spec.securityContext.fsGroupChangePolicy"),
    *_ignored("every pod here is a VM of its own", "spec.runtimeClassName", "spec.hostUsers"),
    *_ignored("matters to a token volume only", "spec.serviceAccountName", "spec.serviceAccount"),
    *_refused("no API server, so no token to mount", "spec.automountServiceAccountToken", harmless=_OFF),
    *_refused("a pod VM has no host namespace", "spec.hostNetwork", "spec.hostPID", "spec.hostIPC", harmless=_OFF),
    *_refused("not supported yet; use hostname", "spec.hostnameOverride", harmless=("", None)),
    *_refused("pod VMs run Linux", "spec.os", harmless=({"name": "linux"},)),
    *_refused("readiness gates are not supported yet", "spec.readinessGates", harmless=([],)),
    *_refused("nothing here lifts a gate", "spec.schedulingGates", harmless=([],)),
    *_refused("set resources on the containers", "spec.resources", "spec.overhead", harmless=({},)),
    *_refused("add debug containers by `hv exec`", "spec.ephemeralContainers", harmless=([],)),
    *_refused(
        "not supported yet",
        *(
            f"spec.volumes[].{kind}"
            for kind in (
                "hostPath",
                "persistentVolumeClaim",
                "image",
            )
        ),
    ),
    *_refused("not supported yet", "spec.securityContext.supplementalGroupsPolicy", harmless=("Merge",)),
    *_refused("not supported yet", "spec.securityContext.sysctls", harmless=([],)),
    *_refused("profiles of the host do not reach the guest", "spec.securityContext.seccompProfile.localhostProfile"),
    *_refused("the guest has no AppArmor", "spec.securityContext.appArmorProfile", harmless=({"type": "Unconfined"},)),
    *_refused("the guest has no SELinux", "spec.securityContext.seLinuxOptions", harmless=({},)),
    *_refused("the guest has no SELinux", "spec.securityContext.seLinuxChangePolicy"),
    *_refused("pod VMs run Linux", "spec.securityContext.windowsOptions"),
)

_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_PROBE_FIELDS = ("initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold")

_CONTAINER = (
    *_honoured(
        "",
        "name",
        "image",
        "imagePullPolicy",
        "command",
        "args",
        "workingDir",
        "env[].name",
        "env[].value",
        "env[].valueFrom.fieldRef",
        "env[].valueFrom.configMapKeyRef",
        "env[].valueFrom.secretKeyRef",
        "env[].valueFrom.resourceFieldRef",
        "envFrom",
        "resources.limits",
        "resources.requests",
        "stdin",
        "stdinOnce",
        "tty",
        "volumeMounts[].name",
        "volumeMounts[].mountPath",
        "volumeMounts[].readOnly",
        "volumeMounts[].subPath",
        "volumeMounts[].subPathExpr",
        *(
            f"{probe}.{field}"
            for probe in _PROBES
            for field in (*_PROBE_FIELDS, "exec", "httpGet", "tcpSocket", "grpc")
        ),
        "livenessProbe.terminationGracePeriodSeconds",
        "startupProbe.terminationGracePeriodSeconds",
        "lifecycle.postStart",
        "lifecycle.preStop",
        "restartPolicy",
        "terminationMessagePath",
        "terminationMessagePolicy",
        "securityContext.runAsUser",
        "securityContext.runAsGroup",
        "securityContext.runAsNonRoot",
        "securityContext.readOnlyRootFilesystem",
        "securityContext.privileged",
        "securityContext.allowPrivilegeEscalation",
        "securityContext.capabilities",
        "securityContext.seccompProfile.type",
        "ports[].hostPort",
        "ports[].hostIP",
    ),
    *_ignored(
        "tells people (and, by name, probes) which ports are meant; nothing is opened or closed by it",
        "ports[].name",
        "ports[].containerPort",
        "ports[].protocol",
    ),
    *_ignored("containers are not resized yet", "resizePolicy"),
    *_refused("a readiness probe ends nothing", "readinessProbe.terminationGracePeriodSeconds"),
    *_refused("every image has a stop signal, or SIGTERM", "lifecycle.stopSignal", harmless=("",)),
    *_refused("not supported yet", "env[].valueFrom.fileKeyRef"),
    *_refused("not supported yet", "resources.claims", "volumeDevices", harmless=([],)),
    *_refused("not supported yet", "restartPolicyRules", harmless=([],)),
    *_refused("mounts stay in their container", "volumeMounts[].mountPropagation", harmless=("None",)),
    *_refused("not supported yet; use readOnly", "volumeMounts[].recursiveReadOnly", harmless=("Disabled",)),
    *_refused("not supported yet", "securityContext.procMount", harmless=("Default",)),
    *_refused("profiles of the host do not reach the guest", "securityContext.seccompProfile.localhostProfile"),
    *_refused("the guest has no AppArmor", "securityContext.appArmorProfile", harmless=({"type": "Unconfined"},)),
    *_refused("the guest has no SELinux", "securityContext.seLinuxOptions", harmless=({},)),
    *_refused("pod VMs run Linux", "securityContext.windowsOptions"),
)

POD_FIELDS: Mapping[str, Field] = {row.path: row for row in (*_METADATA, *_POD)}
CONTAINER_FIELDS: Mapping[str, Field] = {row.path: row for row in _CONTAINER}
UNKNOWN_WHY = "not supported yet"


def check_support(manifest: Mapping[str, Any]) -> None:
    """Refuse a field that would mean something and is not supported. The manifest has passed the schema.

    :raises InvalidInput: the first such field, with its path and the reason
    """
    for key, value in manifest.items():
        if key not in ("apiVersion", "kind"):
            _check(value, key, key, POD_FIELDS)


def _check(value: object, pattern: str, path: str, table: Mapping[str, Field]) -> None:
    if value is None:
        return
    row = table.get(pattern)
    if row is not None and row.support is not Support.HONOURED:
        _judge(row, value, path)
    elif pattern in ("spec.containers[]", "spec.initContainers[]") and isinstance(value, dict):
        for key, item in value.items():
            _check(item, key, field_path(path, key), CONTAINER_FIELDS)
    elif row is None:
        _descend(value, pattern, path, table)


def _descend(value: object, pattern: str, path: str, table: Mapping[str, Field]) -> None:
    if not any(re.match(re.escape(pattern) + r"[.\[]", other) for other in table):
        raise InvalidInput(UNKNOWN_WHY, where=path)
    for sub_pattern, sub_path, item in _children(value, pattern, path):
        _check(item, sub_pattern, sub_path, table)


def _children(value: object, pattern: str, path: str) -> Iterator[tuple[str, str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{pattern}.{key}", field_path(path, key), item
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield f"{pattern}[]", field_path(path, index), item


def _judge(row: Field, value: object, path: str) -> None:
    if row.support is Support.REFUSED and not any(value == v and type(value) is type(v) for v in row.harmless):
        raise InvalidInput(f"not supported: {row.why}", where=path)
