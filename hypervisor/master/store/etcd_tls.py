"""The certificates with which a master speaks to etcd."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from hypervisor.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """Files in PEM; None: the system's authorities, no certificate of one's own.

    :ivar ca: whose certificates etcd's must be
    :ivar certificate: of the master, with its `key`
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext | None:
        """What connections use; None where nothing is said. Reads files.

        :raises InvalidInput: a file is missing or damaged, or one without the other is given
        """
        if (self.certificate is None) != (self.key is None):
            raise InvalidInput("--etcd-certfile and --etcd-keyfile go together", where="store")
        if self.ca is None and self.certificate is None:
            return None
        try:
            made = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
            if self.certificate is not None:
                made.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidInput(f"a certificate for etcd cannot be used ({error})", where="store") from error
        return made
