"""The node side against an API server with upstream's manners: it registers, serves, reports a pod and lets it go.

No upstream API server runs where these tests do; what differs from ours is in `upstream_manners`.
"""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from master_process import HV, Kubectl, running_master, until
from upstream_manners import upstream

from hypervisor.kube import kubeconfig
from hypervisor.master.auth import parties
from hypervisor.master.auth.ca import CertificateAuthority

pytestmark = [pytest.mark.qemu, pytest.mark.root]

ADDRESS = "127.0.0.77"
POD = """
apiVersion: v1
kind: Pod
metadata: {name: waits}
spec:
  nodeName: n1
  terminationGracePeriodSeconds: 1
  containers: [{name: c, image: "localhost/nobody/has-this", imagePullPolicy: Never}]
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])


def is_ready(kubectl: Kubectl) -> bool:
    nodes = kubectl.get("nodes")["items"]
    return any(c["type"] == "Ready" and c["status"] == "True" for n in nodes for c in n["status"].get("conditions", ()))


def waiting(kubectl: Kubectl) -> str:
    found: dict[str, Any] = kubectl.get("pod", "waits")["status"]
    states = [c.get("state", {}) for c in found.get("containerStatuses", ())]
    return next((s["waiting"].get("reason", "") for s in states if "waiting" in s), "")


def serves(port: int, state: Path) -> bool:
    """Whether the node's server answers with a certificate of the cluster's."""
    from hypervisor.master.auth.ca import client_context

    ca = CertificateAuthority.open(state / "pki")
    tls = client_context(parties.kubelet_client(ca), ca.certificate_file)
    try:
        with socket.create_connection((ADDRESS, port), 5) as plain, tls.wrap_socket(plain, server_hostname=ADDRESS):
            return True
    except OSError:
        return False


def test_a_node_lives_with_upstreams_manners(tmp_path: Path) -> None:
    state, port = tmp_path / "master", free_port()
    with running_master(state, "--no-approve-serving") as master:
        server = kubeconfig.load(master.kubeconfig).server
        with upstream(state, server, tmp_path) as (url, told):
            ca = CertificateAuthority.open(state / "pki")
            pair, own = parties.node(ca, "n1"), tmp_path / "n1.kubeconfig"
            made = kubeconfig.render(server=url, ca=ca.pem, user="n1", certificate=pair.certificate, key=pair.key)
            kubeconfig.write(own, made)
            words = ("hostd", "--node-name", "n1", "--kubeconfig", str(own), "--node-address", ADDRESS)
            command = [*HV, "--state-dir", str(tmp_path / "host"), *words, "--node-port", str(port)]
            with (tmp_path / "hlog").open("wb") as log:
                node = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=dict(os.environ))
            try:
                walk(master.kubectl, state, port)
            finally:
                node.terminate()
                node.wait(30)
    assert told.refused == []
    assert told.busy > 0  # it was sent away, and came again
    assert told.expired > 0
    assert max(told.watches.values()) > 2


def walk(kubectl: Kubectl, state: Path, port: int) -> None:
    """From the node's registration to the end of a pod that never ran."""
    until(lambda: is_ready(kubectl), 60)
    name = until(lambda: kubectl("get", "csr", "-o", "name").split())[0]
    assert not serves(port, state)  # upstream leaves that to people
    kubectl("certificate", "approve", name.partition("/")[2])
    until(lambda: serves(port, state), 60)
    kubectl("create", "-f", "-", stdin=POD)
    until(lambda: waiting(kubectl) == "ErrImageNeverPull", 60)
    kubectl("delete", "pod", "waits", "--wait=false")
    until(lambda: not kubectl.get("pods")["items"], 60)  # it was for the node to remove it
    lease = kubectl.get("lease", "n1", "--namespace", "kube-node-lease")["spec"]["renewTime"]
    until(lambda: kubectl.get("lease", "n1", "--namespace", "kube-node-lease")["spec"]["renewTime"] > lease, 60)
