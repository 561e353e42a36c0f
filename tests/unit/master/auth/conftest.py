"""A clock, a cluster's objects in memory, and an authority."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from authkit import Clock, Objects

from hypervisor.master.auth.ca import CertificateAuthority
from hypervisor.master.auth.tokens import ServiceAccountTokens, SigningKey


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def objects() -> Objects:
    return Objects()


@pytest.fixture
def ca(tmp_path: Path, clock: Clock) -> CertificateAuthority:
    return CertificateAuthority.open(tmp_path / "pki", now=clock)


@pytest.fixture
def tokens(tmp_path: Path, objects: Objects, clock: Clock) -> ServiceAccountTokens:
    return ServiceAccountTokens(SigningKey.open(tmp_path / "pki" / "sa.key"), objects, now=clock)


@pytest.fixture
def open_ca(tmp_path: Path, clock: Clock) -> Callable[[], CertificateAuthority]:
    return lambda: CertificateAuthority.open(tmp_path / "pki", now=clock)
