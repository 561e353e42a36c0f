"""Who a request is, over real TLS: tokens and certificates that are good, and those that are not."""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from masterkit import Api, pod, tls_of, write_pair

from hypervisor.master.api.view import RegistryView
from hypervisor.master.auth.ca import CertificateAuthority, Request, utc_now
from hypervisor.master.auth.tokens import ServiceAccountTokens, SigningKey
from hypervisor.master.auth.user import SYSTEM_MASTERS
from hypervisor.master.daemon import Master

TOKENS = "/api/v1/namespaces/default/serviceaccounts/default/token"
REVIEWS = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
ROOT = Request("root", (SYSTEM_MASTERS,), client=True)


async def who(master: Master, token: str) -> tuple[int, str]:
    """Status and name that a bearer of the token gets, without a certificate."""
    tls = ssl.create_default_context(cafile=str(master.auth.ca.certificate_file))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session:
        headers = {"Authorization": f"Bearer {token}"}
        url = f"https://127.0.0.1:{master.port}{REVIEWS}"
        async with session.post(url, json={}, headers=headers) as answer:
            body = await answer.json()
            return answer.status, body.get("status", {}).get("userInfo", {}).get("username", "") if answer.ok else ""


async def ask(api: Api, **spec: Any) -> str:
    answer = await api.send("POST", TOKENS, {"spec": spec})
    assert answer.status == 201, answer.body
    return str(answer.json["status"]["token"])


ACCOUNT = "system:serviceaccount:default:default"


async def test_a_token_bound_to_a_pod_ends_with_it(api: Api, master: Master) -> None:
    name = f"bound-{api.namespace}"
    assert (await api.send("POST", api.pods, pod(name))).status == 201
    token = await ask(api, boundObjectRef={"kind": "Pod", "apiVersion": "v1", "name": name})
    assert await who(master, token) == (201, ACCOUNT)
    answer = await api.send("DELETE", f"{api.pods}/{name}?gracePeriodSeconds=0")
    assert answer.status == 200, answer.body
    assert await who(master, token) == (401, "")
    assert (await api.send("POST", api.pods, pod(name))).status == 201
    assert await who(master, token) == (401, "")  # another pod of the same name


async def test_a_token_for_others_is_nobody_here(api: Api, master: Master) -> None:
    token = await ask(api, audiences=["vault"])
    assert await who(master, token) == (401, "")
    reviews = "/apis/authentication.k8s.io/v1/tokenreviews"
    answer = await api.send("POST", reviews, {"spec": {"token": token, "audiences": ["vault"]}})
    assert (answer.json["status"]["authenticated"], answer.json["status"]["audiences"]) == (True, ["vault"])


async def test_an_expired_token_is_nobody(master: Master) -> None:
    inside = master.inside
    view, key = RegistryView(inside.kinds, inside.objects.registry), SigningKey.open(master.config.pki / "sa.key")

    def signed(ago_s: int) -> str:
        past = ServiceAccountTokens(key, view, now=lambda: utc_now() - dt.timedelta(seconds=ago_s))
        spec = {"spec": {"expirationSeconds": 600}}
        return str(past.request("default", "default", spec)["status"]["token"])

    assert await who(master, signed(590)) == (201, ACCOUNT)
    assert await who(master, signed(601)) == (401, "")


async def call_with(master: Master, folder: Path, ca: CertificateAuthority, request: Request) -> int:
    """The status that the holder of a certificate gets.

    :raises aiohttp.ClientError: the server ends the connection over it
    """
    tls = tls_of(master, write_pair(folder, ca.issue(request)))
    connector = aiohttp.TCPConnector(ssl=tls)
    url = f"https://127.0.0.1:{master.port}/api/v1/secrets"
    async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as answer:
        return answer.status


async def test_a_certificate_of_the_cluster_is_let_in(master: Master, tmp_path: Path) -> None:
    assert await call_with(master, tmp_path, master.auth.ca, ROOT) == 200


async def test_an_expired_certificate_is_not(master: Master, tmp_path: Path) -> None:
    expired = Request("root", (SYSTEM_MASTERS,), client=True, lifetime=dt.timedelta(seconds=-1))
    with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
        await call_with(master, tmp_path, master.auth.ca, expired)


async def test_a_certificate_of_another_authority_is_not(master: Master, tmp_path: Path) -> None:
    foreign = await asyncio.to_thread(CertificateAuthority.open, tmp_path / "pki")
    with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
        await call_with(master, tmp_path, foreign, ROOT)
