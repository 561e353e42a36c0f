"""``hv apply`` in a cluster: server-side apply of any kind that the master serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from hypervisor.cli.rest import QUICK, target
from hypervisor.cli.route import ClusterEndpoint, namespace
from hypervisor.cli.upstream import MasterConnection
from hypervisor.errors import InvalidInput, NotFound

MANAGER = "hv"
APPLY = "application/apply-patch+yaml"  # JSON is YAML
Object = dict[str, Any]


def apply_all(cluster: ClusterEndpoint, manifests: Sequence[Object]) -> None:
    """Applies objects in their order, and says what became of each.

    :raises InvalidInput: a kind is not served, or an object is not as it should be; those before it are applied
    """
    with MasterConnection(cluster, QUICK) as master:
        kinds: dict[str, list[Object]] = {}
        paths = [_collection(master, manifest, kinds) for manifest in manifests]
        for manifest, path in zip(manifests, paths, strict=True):
            done = _apply(master, path, manifest)
            click.echo(f"{str(manifest['kind']).lower()}/{manifest['metadata']['name']} {done}")


def _collection(master: MasterConnection, manifest: Object, kinds: dict[str, list[Object]]) -> list[str]:
    """Path parts of the collection that an object belongs to."""
    version, kind = str(manifest.get("apiVersion")), str(manifest.get("kind"))
    root = ["apis", *version.split("/")] if "/" in version else ["api", version]
    if version not in kinds:
        try:
            kinds[version] = list(master.api("GET", target(root))["resources"])
        except NotFound:
            kinds[version] = []
    for resource in kinds[version]:
        if resource["kind"] == kind and "/" not in resource["name"]:
            where = manifest["metadata"].get("namespace") or namespace()
            scope = ["namespaces", str(where)] if resource["namespaced"] else []
            return [*root, *scope, str(resource["name"])]
    raise InvalidInput(f"the cluster has no kind {kind} in {version}; see: kubectl api-resources")


def _apply(master: MasterConnection, collection: Sequence[str], manifest: Object) -> str:
    path = [*collection, str(manifest["metadata"]["name"])]
    try:
        before = master.api("GET", target(path))["metadata"]["resourceVersion"]
    except NotFound:
        before = None
    query = [("fieldManager", MANAGER), ("force", "true"), ("fieldValidation", "Strict")]
    after = master.api("PATCH", target(path, query), manifest, APPLY)["metadata"]["resourceVersion"]
    return "created" if before is None else "unchanged" if before == after else "configured"
