"""``hv host ls|drain|rm``: the hosts of a cluster, through its API."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from hypervisor.cli import output
from hypervisor.cli.app import Settings, pass_settings
from hypervisor.cli.cluster_state import ClusterPaths
from hypervisor.cli.cluster_up import node_is_ready
from hypervisor.cli.host import host as host_group
from hypervisor.cli.kubeapi import KubeApi
from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound, Timeout
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import NODES, PODS

__all__ = ["host"]

MIRROR = "kubernetes.io/config.mirror"
LOOK_EVERY = 0.25
RETRY_EVICTION = 1.0  # seconds; upstream waits 5
Object = dict[str, Any]

host = host_group
kubeconfig_option = click.option(
    "--kubeconfig",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Of another cluster. Default: the one of hv cluster up, else $KUBECONFIG.",
)


def open_api(settings: Settings, kubeconfig: Path | None) -> KubeApi:
    """The API server that commands about hosts speak to.

    :raises NotFound: there is no cluster
    """
    own = ClusterPaths(Path(settings.state)).kubeconfig
    if kubeconfig is None and own.exists():
        kubeconfig = own
    if kubeconfig is None:
        given = [name for name in os.environ.get("KUBECONFIG", "").split(":") if name]
        kubeconfig = Path(given[0]) if given else None
    if kubeconfig is None:
        raise NotFound("there is no cluster: run hv cluster up, or name one with --kubeconfig")
    return KubeApi(kubeconfig)


def host_names(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Hosts that begin so, for the shell; never fails."""
    from hypervisor.cli.state import state_dir

    try:
        settings = Settings(state_dir(ctx.find_root().params.get("state_dir")))
        with open_api(settings, None) as api:
            names = [str(node["metadata"]["name"]) for node in api.list(NODES)]
    except HvError:
        return []
    return [name for name in names if name.startswith(incomplete)]


@host.command("ls")
@kubeconfig_option
@output.format_option()
@pass_settings
def ls(settings: Settings, kubeconfig: Path | None, output: str) -> None:
    """List the hosts of the cluster."""
    with open_api(settings, kubeconfig) as api:
        nodes = api.list(NODES)
        pods = [p for p in api.list(PODS) if (p.get("status") or {}).get("phase") not in ("Succeeded", "Failed")]
    show_nodes(nodes, pods, output)


def show_nodes(nodes: Sequence[Object], pods: Sequence[Object], fmt: str) -> None:
    """Prints them in a format."""
    counts: dict[str, int] = {}
    for pod in pods:
        name = (pod.get("spec") or {}).get("nodeName", "")
        counts[name] = counts.get(name, 0) + 1
    wide = fmt == "wide"
    header = ("NAME", "STATUS", "PODS", "CPUS", "MEMORY", "ADDRESS", "AGE") + (("VERSION", "KERNEL") if wide else ())
    rows = [_row(node, counts, wide=wide) for node in nodes]
    listed = {"apiVersion": "v1", "kind": "NodeList", "items": list(nodes)}
    output.show(listed, fmt, names=[n["metadata"]["name"] for n in nodes], header=header, rows=rows)


def _row(node: Mapping[str, Any], counts: Mapping[str, int], *, wide: bool) -> list[str]:
    metadata, status = node["metadata"], node.get("status") or {}
    allocatable = status.get("allocatable") or {}
    addresses = [a["address"] for a in status.get("addresses") or () if a.get("type") == "InternalIP"]
    words = "Ready" if node_is_ready(node) else "NotReady"
    words += ",SchedulingDisabled" if (node.get("spec") or {}).get("unschedulable") else ""
    cells = [metadata["name"], words, str(counts.get(metadata["name"], 0)), str(allocatable.get("cpu", "-"))]
    cells += [_memory(allocatable.get("memory")), next(iter(addresses), "-")]
    cells += [output.age_since(metadata.get("creationTimestamp"))]
    info = status.get("nodeInfo") or {}
    return cells + ([info.get("kubeletVersion", "-"), info.get("kernelVersion", "-")] if wide else [])


def _memory(quantity: str | None) -> str:
    from hypervisor.kube.quantity import parse_bytes

    return "-" if not quantity else output.size(parse_bytes(str(quantity), where="memory"))


@dataclass(frozen=True, slots=True)
class Drain:
    """How a host is drained.

    :ivar grace_s: of each pod; None: its own
    :ivar timeout_s: for all of it
    """

    ignore_daemonsets: bool = False
    force: bool = False
    delete_emptydir: bool = False
    grace_s: int | None = None
    timeout_s: float = 600.0


@host.command("drain")
@click.argument("name", shell_complete=host_names)
@click.option("--ignore-daemonsets", is_flag=True, help="Leave pods of DaemonSets where they are.")
@click.option("--force", is_flag=True, help="Evict pods that no controller will replace, too.")
@click.option("--delete-emptydir-data", "delete_emptydir", is_flag=True, help="Evict pods with emptyDir volumes, too.")
@click.option("--grace-period", "grace_s", metavar="SECONDS", type=click.IntRange(0), help="Default: each pod's own.")
@click.option(
    "--timeout", "timeout_s", metavar="SECONDS", type=float, default=600.0, show_default=True, help="For all."
)
@kubeconfig_option
@pass_settings
def drain(settings: Settings, /, name: str, kubeconfig: Path | None, **how: Any) -> None:
    """Let a host take no more pods, and evict those that it has.

    Eviction respects PodDisruptionBudgets: it waits until they allow it. Undo it with kubectl uncordon.
    """
    with open_api(settings, kubeconfig) as api:
        drain_host(api, name, Drain(**how), output.note)
    click.echo(f"{name} is drained")


def drain_host(api: KubeApi, name: str, how: Drain, tell: Callable[[str], None]) -> None:
    """Cordons a host and evicts its pods.

    :raises InvalidInput: pods are in the way that an option must be given for; the host takes no new pods already
    :raises Timeout: pods are left
    """
    api.patch(NODES, name, {"spec": {"unschedulable": True}})
    pods = api.list(PODS, fieldSelector=f"spec.nodeName={name}")
    chosen = to_evict(pods, how)
    deadline = time.monotonic() + how.timeout_s
    left = {pod["metadata"]["uid"]: pod for pod in chosen}
    asked: set[str] = set()
    while left:
        for uid, pod in list(left.items()):
            if uid not in asked and _evict(api, pod, how, tell):
                asked.add(uid)
            if uid in asked and _is_gone(api, pod):
                del left[uid]
        if left and time.monotonic() > deadline:
            names = ", ".join(sorted(_shown(pod) for pod in left.values()))
            raise Timeout(f"{name} is not drained within {how.timeout_s:g} s; left: {names}")
        if left:
            time.sleep(LOOK_EVERY if asked >= set(left) else RETRY_EVICTION)


def to_evict(pods: Sequence[Object], how: Drain) -> list[Object]:
    """Those of a host's pods that are to go.

    :raises InvalidInput: what is in the way, and the option for each
    """
    chosen, obstacles = [], []
    for pod in pods:
        metadata = pod["metadata"]
        if MIRROR in (metadata.get("annotations") or {}):
            continue
        owner = next((o for o in metadata.get("ownerReferences") or () if o.get("controller")), None)
        ended = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
        if owner is not None and owner.get("kind") == "DaemonSet":
            if not how.ignore_daemonsets:
                obstacles.append(f"{_shown(pod)} is a DaemonSet's (--ignore-daemonsets)")
            continue
        if owner is None and not ended and not how.force:
            obstacles.append(f"{_shown(pod)} has no controller (--force)")
        elif _has_emptydir(pod) and not ended and not how.delete_emptydir:
            obstacles.append(f"{_shown(pod)} has an emptyDir volume (--delete-emptydir-data)")
        chosen.append(pod)
    if obstacles:
        raise InvalidInput(f"pods are in the way: {'; '.join(obstacles)}")
    return chosen


def _has_emptydir(pod: Object) -> bool:
    return any("emptyDir" in volume for volume in (pod.get("spec") or {}).get("volumes") or ())


def _shown(pod: Object) -> str:
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"


def _evict(api: KubeApi, pod: Object, how: Drain, tell: Callable[[str], None]) -> bool:
    """Asks for it; False while a budget forbids it."""
    metadata = pod["metadata"]
    options: Object = {"preconditions": {"uid": metadata["uid"]}}
    options |= {} if how.grace_s is None else {"gracePeriodSeconds": how.grace_s}
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]},
        "deleteOptions": options,
    }
    try:
        api.create(PODS, eviction, metadata["namespace"], at=f"{metadata['name']}/eviction")
    except ApiError as error:
        if error.code == 429:
            tell(f"{_shown(pod)}: not yet: {error}")
            return False
        if error.reason not in ("NotFound", "Conflict"):
            raise
    else:
        tell(f"{_shown(pod)} is evicted")
    return True


def _is_gone(api: KubeApi, pod: Object) -> bool:
    metadata = pod["metadata"]
    try:
        found = api.get(PODS, metadata["name"], metadata["namespace"])
    except ApiError as error:
        if error.reason != "NotFound":
            raise
        return True
    return bool(found["metadata"].get("uid") != metadata["uid"])


@host.command("rm")
@click.argument("name", shell_complete=host_names)
@click.option("--force", is_flag=True, help="Although it still has pods: they end, and controllers make them anew.")
@kubeconfig_option
@pass_settings
def rm(settings: Settings, name: str, force: bool, kubeconfig: Path | None) -> None:
    """Remove a drained host from the cluster.

    A host of hv cluster up is ended and its state folder removed; elsewhere only its Node object goes: end its hostd
    first, or it registers itself again.
    """
    with open_api(settings, kubeconfig) as api:
        api.get(NODES, name)
        pods = api.list(PODS, fieldSelector=f"spec.nodeName={name}")
        left = [p for p in pods if not any(o.get("kind") == "DaemonSet" for o in _owners(p))]
        if left and not force:
            raise Conflict(f"{name} still has {len(left)} pods; run hv host drain {name} first, or give --force")
        paths = ClusterPaths(Path(settings.state))
        own = kubeconfig is None and _end_own(paths, name)
        api.delete(NODES, name)
    click.echo(f"{name} is removed" + (", with its state" if own else ""))


def _owners(pod: Object) -> Sequence[Mapping[str, Any]]:
    return pod["metadata"].get("ownerReferences") or ()


def _end_own(paths: ClusterPaths, name: str) -> bool:
    """Ends a host of the local cluster; False when it is none."""
    import shutil

    from hypervisor.cli.cluster_down import stop_component

    spec = paths.load()
    if spec is None or name not in {h.name for h in spec.hosts}:
        return False
    with paths.locked():
        stop_component(paths, name, output.note)
        paths.save(replace(spec, hosts=tuple(h for h in spec.hosts if h.name != name)))
        shutil.rmtree(paths.host(name), ignore_errors=True)
    return True
