"""What a name server is told to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

RecordType = Literal["A", "AAAA", "CNAME", "PTR", "SRV", "TXT"]
TTL_S = 5


@dataclass(frozen=True)
class Record:
    """One record, its data as a zone file has it."""

    type: RecordType
    data: str


class Names(Protocol):
    """Names of the cluster. Lower case, without the last dot. May not block."""

    def is_own(self, name: str) -> bool:
        """Whether nobody else may be asked about it."""

    def lookup(self, name: str) -> Sequence[Record] | None:
        """All its records, of every type; empty: only longer names exist; None: there is no such name."""
