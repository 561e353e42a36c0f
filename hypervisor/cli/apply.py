"""``hv apply``: pods from manifests."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hypervisor.cli.app import Settings, pass_settings
from hypervisor.cli.pods import name_of
from hypervisor.cli.rest import Connection
from hypervisor.cli.route import find_cluster
from hypervisor.errors import Conflict, InvalidInput

# Not podvisor.dev/..., which is the host's own and closed to what it does not know.
APPLIED = "hv.podvisor.dev/applied"


@click.command("apply")
@click.option(
    "-f",
    "--filename",
    "files",
    multiple=True,
    required=True,
    metavar="FILE",
    type=click.Path(),
    help="YAML or JSON, - for standard input; may be given more than once.",
)
@pass_settings
def apply(settings: Settings, files: Sequence[str]) -> None:
    """Start pods from Kubernetes v1 Pod manifests.

    All documents are read before the first pod is started. A pod that was applied before from the same manifest is
    left as it is; one that differs is refused, since a pod cannot be changed: remove it first.

    In a cluster: objects of any kind, by server-side apply.
    """
    cluster = find_cluster(settings.state)
    manifests = [m for file in files for m in read_manifests(file, any_kind=cluster is not None)]
    if not manifests:
        raise InvalidInput("no manifest in " + ", ".join(files))
    if cluster is not None:
        from hypervisor.cli.apply_upstream import apply_all

        apply_all(cluster, manifests)
        return
    with settings.connect_any(None) as connection:
        for manifest in manifests:
            click.echo(f"pod/{_name(manifest)} {_apply(connection, manifest)}")


def read_manifests(file: str, *, any_kind: bool = False) -> list[dict[str, Any]]:
    """The Pods of a file, or all objects.

    :raises InvalidInput: it cannot be read, or holds something else
    """
    from hypervisor.controller.manifest import load_documents

    shown = "standard input" if file == "-" else file
    try:
        text = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as e:
        raise InvalidInput(f"cannot read it: {e.strerror}", where=shown) from e
    try:
        found = load_documents(text)
    except InvalidInput as e:
        raise InvalidInput(str(e), where=shown) from e
    for number, manifest in enumerate(found, 1):
        if manifest.get("kind") != "Pod" and not any_kind:
            raise InvalidInput(f"document {number} is a {manifest.get('kind')!s:.60}; hv apply takes Pods", where=shown)
        if not _name(manifest):
            raise InvalidInput(f"document {number} has no metadata.name", where=shown)
    return found


def _name(manifest: dict[str, Any]) -> str:
    metadata = manifest.get("metadata")
    return str(metadata.get("name") or "") if isinstance(metadata, dict) else ""


def _apply(connection: Connection, manifest: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    try:
        connection.post("hv", "v1", "pods", value=_marked(manifest, digest)).read()
    except Conflict as e:
        metadata = manifest["metadata"]
        found = connection.get("hv", "v1", "pods", metadata.get("namespace") or "default", metadata["name"])
        if ((found.get("metadata") or {}).get("annotations") or {}).get(APPLIED) == digest:
            return "unchanged"
        name = name_of(manifest)
        raise Conflict(f"pod {name} exists and is not what this manifest says; run: hv rm --force {name}") from e
    return "created"


def _marked(manifest: dict[str, Any], digest: str) -> dict[str, Any]:
    """The manifest with its digest as an annotation; whatever is wrong with it stays for hostd to say."""
    annotations = manifest["metadata"].get("annotations") or {}
    if not isinstance(annotations, dict):
        return manifest
    metadata = {**manifest["metadata"], "annotations": {**annotations, APPLIED: digest}}
    return {**manifest, "metadata": metadata}
