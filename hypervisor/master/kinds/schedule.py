"""Cron schedules: the five fields of a line of crontab, and when they come round.

Source: Kubernetes, "CronJob" (schedule syntax); POSIX, crontab. Where both the day of the month and the day of the week
are restricted, either will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_MACROS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 7))
_MOST_DAYS = 366 * 8 + 3
"""29 February comes after eight years at the latest."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """:ivar any_day: of the month; `any_weekday` likewise"""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    any_day: bool
    any_weekday: bool

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """:raises ValueError: what is wrong with it"""
        fields = _MACROS.get(text.strip(), text).split()
        if len(fields) != len(_FIELDS):
            raise ValueError(f"expected exactly 5 fields, found {len(fields)}: {fields}")
        parsed = (_field(field, *row) for field, row in zip(fields, _FIELDS, strict=True))
        minutes, hours, days, months, weekdays = parsed
        any_day, any_weekday = (fields[n][0] in "*?" for n in (2, 4))
        return cls(minutes, hours, days, months, frozenset(d % 7 for d in weekdays), any_day, any_weekday)

    def after(self, moment: datetime, zone: tzinfo = UTC) -> datetime | None:
        """The first time later than `moment`; None: it never comes. A time that a zone's clocks skip is left out."""
        local = moment.astimezone(zone).replace(tzinfo=None, second=0, microsecond=0) + timedelta(minutes=1)
        for day in range(_MOST_DAYS):
            date = (local + timedelta(days=day)).date()
            if not self._on(date.month, date.day, date.isoweekday() % 7):
                continue
            for hour in sorted(self.hours):
                for minute in sorted(self.minutes):
                    naive = datetime(date.year, date.month, date.day, hour, minute)
                    found = naive.replace(tzinfo=zone)
                    exists = found.astimezone(UTC).astimezone(zone).replace(tzinfo=None) == naive
                    if naive >= local and exists and found > moment:
                        return found.astimezone(UTC)
        return None

    def between(self, start: datetime, end: datetime, zone: tzinfo = UTC) -> Iterator[datetime]:
        """Every time after `start`, up to `end`."""
        found = self.after(start, zone)
        while found is not None and found <= end:
            yield found
            found = self.after(found, zone)

    def _on(self, month: int, day: int, weekday: int) -> bool:
        if month not in self.months:
            return False
        if self.any_day or self.any_weekday:
            return day in self.days and weekday in self.weekdays
        return day in self.days or weekday in self.weekdays


def _field(text: str, name: str, low: int, high: int) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        span, slash, step = part.partition("/")
        every = _number(step, name, 1, high) if slash else 1
        if span in ("*", "?"):
            first, last = low, high if high != 7 else 6
        else:
            start, dash, end = span.partition("-")
            first = _number(start, name, low, high)
            last = _number(end, name, low, high) if dash else high if slash else first
        if first > last:
            raise ValueError(f"{name}: beginning of range ({first}) beyond end of range ({last}): {text}")
        found.update(range(first, last + 1, every))
    return frozenset(found)


def _number(text: str, name: str, low: int, high: int) -> int:
    named = {"month": _MONTHS, "day of week": _DAYS}.get(name, ())
    if text.lower() in named:
        return named.index(text.lower()) + low
    if not (text.isascii() and text.isdigit()) or not low <= int(text) <= high:
        raise ValueError(f"{name}: {text!r} is no number from {low} to {high}")
    return int(text)
