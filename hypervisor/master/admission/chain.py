"""The order of the plug-ins that complete and check objects; those of authorization come after them."""

from __future__ import annotations

from hypervisor.master.admission.limit_ranges import LimitRanger
from hypervisor.master.admission.namespace_lifecycle import NamespaceLifecycle
from hypervisor.master.admission.plugin import Plugin
from hypervisor.master.admission.priority import Priority
from hypervisor.master.admission.service_account import ServiceAccount
from hypervisor.master.admission.tolerations import DefaultTolerationSeconds
from hypervisor.master.auth.views import ObjectView


def plugins(view: ObjectView) -> tuple[Plugin, ...]:
    """As upstream orders them."""
    return (
        NamespaceLifecycle(view),
        LimitRanger(view),
        ServiceAccount(view),
        DefaultTolerationSeconds(),
        Priority(view),
    )
