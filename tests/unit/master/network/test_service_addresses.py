"""Addresses and node ports of Services, through a whole master without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor.kube.client import Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import ENDPOINT_SLICES, NODES, SERVICES
from hypervisor.master.daemon import Master, MasterConfig, running
from hypervisor.master.network.ranges import Ranges

DUAL = Ranges.parse("10.96.0.0/24,fd00:10:96::/112", "10.244.0.0/16,fd00:10:244::/56", "30000-30009")
SINGLE = Ranges.parse("10.96.0.0/28")


def config(folder: Path, ranges: Ranges, *, controllers: bool = False) -> MasterConfig:
    return MasterConfig(folder, port=0, controllers=controllers, ranges=ranges)


@pytest.fixture
async def master(tmp_path: Path) -> AsyncIterator[Master]:
    async with running(config(tmp_path, DUAL)) as made:
        yield made


async def make(master: Master, name: str, numbers: tuple[int, ...] = (80,), **spec: Any) -> Any:
    listed = [{"name": f"p{p}", "port": p} for p in numbers]
    body = {"metadata": {"name": name}, "spec": {"ports": listed, "selector": {"a": "b"}, **spec}}
    return (await master.client.create(SERVICES, body, "default"))["spec"]


async def refused(master: Master, name: str, **spec: Any) -> str:
    with pytest.raises(ApiError) as caught:
        await make(master, name, **spec)
    assert caught.value.code == 422
    return str(caught.value)


async def test_each_service_has_an_address_of_its_own(master: Master) -> None:
    made = await asyncio.gather(*(make(master, f"s{n}") for n in range(40)))
    addresses = [spec["clusterIP"] for spec in made]
    assert len(set(addresses)) == 40
    assert all(spec["clusterIPs"] == [spec["clusterIP"]] for spec in made)
    assert all((spec["ipFamilies"], spec["ipFamilyPolicy"]) == (["IPv4"], "SingleStack") for spec in made)
    assert "10.96.0.1" not in addresses


async def test_the_api_servers_own_service(master: Master) -> None:
    own = await master.client.get(SERVICES, "kubernetes", "default")
    assert own["spec"]["clusterIP"] == "10.96.0.1"
    (endpoint,) = (await master.client.get(ENDPOINT_SLICES, "kubernetes", "default"))["endpoints"]
    assert endpoint["addresses"] == ["127.0.0.1"]
    assert own["spec"]["ports"][0]["targetPort"] == master.port


async def test_an_address_that_was_asked_for(master: Master) -> None:
    assert (await make(master, "mine", clusterIP="10.96.0.50"))["clusterIPs"] == ["10.96.0.50"]
    assert "provided IP is already allocated" in await refused(master, "yours", clusterIP="10.96.0.50")
    assert "10.96.0.0/24" in await refused(master, "far", clusterIP="10.97.0.1")
    assert "must be a valid IP" in await refused(master, "odd", clusterIP="10.96.0.300")
    assert "first value must match" in await refused(master, "two", clusterIP="10.96.0.60", clusterIPs=["10.96.0.61"])


async def test_what_a_refused_request_held_is_free_again(master: Master) -> None:
    await refused(master, "bad", clusterIP="10.96.0.51", sessionAffinity="Nonsense")
    assert (await make(master, "good", clusterIP="10.96.0.51"))["clusterIP"] == "10.96.0.51"
    with pytest.raises(ApiError, match="already exists"):
        await make(master, "good", clusterIP="10.96.0.52")
    assert (await make(master, "better", clusterIP="10.96.0.52"))["clusterIP"] == "10.96.0.52"


async def test_addresses_and_ports_are_free_after_a_deletion(master: Master) -> None:
    before = await make(master, "goes", type="NodePort", clusterIP="10.96.0.53")
    port = before["ports"][0]["nodePort"]
    await master.client.delete(SERVICES, "goes", "default")
    ports = [{"port": 80, "nodePort": port}]
    body = {"metadata": {"name": "comes"}, "spec": {"type": "NodePort", "clusterIP": "10.96.0.53", "ports": ports}}
    assert (await master.client.create(SERVICES, body, "default"))["spec"]["ports"][0]["nodePort"] == port


async def test_a_headless_service_has_no_address(master: Master) -> None:
    spec = await make(master, "headless", clusterIP="None")
    assert (spec["clusterIP"], spec["clusterIPs"]) == ("None", ["None"])
    assert (spec["ipFamilies"], spec["ipFamilyPolicy"]) == (["IPv4"], "SingleStack")
    external = await make(master, "external", type="ExternalName", externalName="example.com", numbers=())
    assert not {"clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"} & set(external)


async def test_both_ip_versions(master: Master) -> None:
    both = await make(master, "both", ipFamilyPolicy="RequireDualStack")
    assert both["ipFamilies"] == ["IPv4", "IPv6"]
    assert both["clusterIPs"][0] == both["clusterIP"]
    assert both["clusterIPs"][1].startswith("fd00:10:96::")
    six = await make(master, "six", ipFamilies=["IPv6"])
    assert six["clusterIP"].startswith("fd00:10:96::")
    assert (await make(master, "rather", ipFamilyPolicy="PreferDualStack"))["ipFamilies"] == ["IPv4", "IPv6"]
    assert 'supported values: "IPv4", "IPv6"' in await refused(master, "seven", ipFamilies=["IPv7"])
    assert "as indicated by" in await refused(master, "mixed", ipFamilies=["IPv6"], clusterIP="10.96.0.70")


async def test_a_cluster_of_one_ip_version(tmp_path: Path) -> None:
    async with running(config(tmp_path, SINGLE)) as master:
        assert (await make(master, "rather", ipFamilyPolicy="PreferDualStack"))["ipFamilies"] == ["IPv4"]
        assert "not configured for dual-stack" in await refused(master, "both", ipFamilyPolicy="RequireDualStack")
        assert "not configured on this cluster" in await refused(master, "six", ipFamilies=["IPv6"])
        for n in range(12):
            await make(master, f"s{n}")
        with pytest.raises(ApiError, match="range is full") as caught:
            await make(master, "late")
        assert caught.value.code == 500
        await master.client.delete(SERVICES, "s3", "default")
        assert (await make(master, "late"))["clusterIP"]


async def test_node_ports(master: Master) -> None:
    spec = await make(master, "many", (80, 81), type="NodePort")
    mine = {p["nodePort"] for p in spec["ports"]}
    assert len(mine) == 2
    taken = min(mine)
    ports = [{"port": 80, "nodePort": taken}]
    assert "already allocated" in await refused(master, "same", type="NodePort", ports=ports)
    ports = [{"port": 80, "nodePort": 80}]
    assert "30000-30009" in await refused(master, "low", type="NodePort", ports=ports)
    udp = [{"name": "u", "port": 53, "protocol": "UDP"}, {"name": "t", "port": 53, "protocol": "TCP"}]
    body = {"metadata": {"name": "dns"}, "spec": {"type": "NodePort", "ports": udp}}
    shared = (await master.client.create(SERVICES, body, "default"))["spec"]["ports"]
    assert shared[0]["nodePort"] == shared[1]["nodePort"]
    with pytest.raises(ApiError, match="failed to allocate a nodePort"):
        await asyncio.gather(*(make(master, f"n{n}", type="NodePort") for n in range(20)))


async def change(master: Master, name: str, spec: Object) -> Any:
    return (await master.client.patch(SERVICES, name, "default", {"spec": spec}))["spec"]


async def test_changes_of_a_service_keep_what_it_has(master: Master) -> None:
    first = await make(master, "web")
    exposed = await change(master, "web", {"type": "NodePort"})
    port = exposed["ports"][0]["nodePort"]
    assert exposed["clusterIP"] == first["clusterIP"]
    # A client that puts its own manifest back leaves out what it was given.
    live = await master.client.get(SERVICES, "web", "default")
    live["spec"] = {"type": "NodePort", "ports": [{"name": "p80", "port": 80}], "selector": {"a": "c"}}
    again = (await master.client.update(SERVICES, live))["spec"]
    assert (again["clusterIP"], again["ports"][0]["nodePort"]) == (first["clusterIP"], port)
    inside = await change(master, "web", {"type": "ClusterIP"})
    assert "nodePort" not in inside["ports"][0]
    both = await change(master, "web", {"ipFamilyPolicy": "PreferDualStack"})
    assert len(both["clusterIPs"]) == 2
    one = await change(master, "web", {"ipFamilyPolicy": "SingleStack"})
    assert one["clusterIPs"] == [first["clusterIP"]]
    with pytest.raises(ApiError, match="may not change once set"):
        await change(master, "web", {"clusterIP": "10.96.0.99", "clusterIPs": ["10.96.0.99"]})
    named = await change(master, "web", {"type": "ExternalName", "externalName": "example.com"})
    assert "clusterIP" not in named
    assert (await change(master, "web", {"type": "ClusterIP"}))["clusterIP"]


async def test_what_was_given_away_stays_so_after_a_restart(tmp_path: Path) -> None:
    async with running(config(tmp_path, SINGLE)) as master:
        made = {(await make(master, f"s{n}"))["clusterIP"] for n in range(10)}
    async with running(config(tmp_path, SINGLE)) as master:
        more = {(await make(master, f"t{n}"))["clusterIP"] for n in range(2)}
        assert len(made | more) == 12


async def test_a_dry_run_holds_nothing(master: Master) -> None:
    body = {"metadata": {"name": "try"}, "spec": {"ports": [{"port": 80}], "clusterIP": "10.96.0.77"}}
    from hypervisor.master.api.call import Call
    from hypervisor.master.api.local import CONTROLLER
    from hypervisor.master.kinds.table import KINDS

    call = Call(CONTROLLER, KINDS.of(SERVICES), "default", dry_run=True)
    assert (await master.inside.objects.create(call, body))["spec"]["clusterIPs"] == ["10.96.0.77"]
    assert (await make(master, "real", clusterIP="10.96.0.77"))["clusterIP"] == "10.96.0.77"


async def test_nodes_get_parts_that_do_not_overlap(tmp_path: Path) -> None:
    async def parts(master: Master, count: int) -> dict[str, tuple[str, ...]]:
        async with asyncio.timeout(20):
            while True:
                nodes = (await master.client.list(NODES)).items
                found = {n["metadata"]["name"]: tuple(n.get("spec", {}).get("podCIDRs") or ()) for n in nodes}
                if len(found) == count and all(found.values()):
                    return found
                await asyncio.sleep(0.02)

    async with running(config(tmp_path, DUAL, controllers=True)) as master:
        await asyncio.gather(*(master.client.create(NODES, {"metadata": {"name": f"n{n}"}}) for n in range(12)))
        first = await parts(master, 12)
        assert len({p for both in first.values() for p in both}) == 24
        assert all(four.endswith("/24") and six.endswith("/64") for four, six in first.values())
        await master.client.delete(NODES, "n3")
    async with running(config(tmp_path, DUAL, controllers=True)) as master:
        await master.client.create(NODES, {"metadata": {"name": "n99"}})
        again = await parts(master, 12)
        assert again.pop("n99") == first.pop("n3")  # the lowest that is free
        assert again == first
