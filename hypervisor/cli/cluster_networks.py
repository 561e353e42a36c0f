"""The address ranges of a cluster, as options of the commands that start one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

SERVICE_CIDR = "10.96.0.0/16"
POD_CIDR = "10.244.0.0/16"
NODE_PORTS = "30000-32767"

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Networks:
    """As ``hv master`` takes them.

    :ivar pod_network: hosts give pods addresses of those ranges; else each pod has QEMU's user-mode network to itself
    """

    services: str = SERVICE_CIDR
    pods: str = POD_CIDR
    node_ports: str = NODE_PORTS
    pod_network: bool = False

    def arguments(self) -> list[str]:
        """For ``hv master``."""
        return [
            *("--service-cidr", self.services, "--pod-cidr", self.pods),
            *("--service-node-ports", self.node_ports),
        ]

    def host_arguments(self) -> list[str]:
        """For ``hv hostd``."""
        if not self.pod_network:
            return []
        ranges = [*self.pods.split(","), *self.services.split(",")]
        return ["--pod-network", *(word for text in ranges for word in ("--cluster-cidr", text))]


def options(defaults: Networks | None) -> Callable[[Command], Command]:
    """The three options.

    :param defaults: None: what was not given is None
    """
    shown = defaults is not None
    rows = (
        ("--service-cidr", "services", "Where Services get their addresses: CIDR or CIDR4,CIDR6.", SERVICE_CIDR),
        ("--pod-cidr", "pods", "Where nodes get their part of the pods' addresses: CIDR or CIDR4,CIDR6.", POD_CIDR),
        ("--service-node-ports", "node_ports", "Ports of Services on nodes: FIRST-LAST.", NODE_PORTS),
    )

    def add(command: Command) -> Command:
        for option, name, text, usual in reversed(rows):
            words = text if shown else f"{text} Default: {usual}; stays as the cluster was made."
            command = click.option(
                option, name, metavar="RANGE", default=usual if shown else None, show_default=shown, help=words
            )(command)
        return command

    return add
