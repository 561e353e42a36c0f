"""What the server counts, in the names that upstream's dashboards know."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """One server's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        labels = ("verb", "resource", "subresource", "code")
        self._requests = Counter("apiserver_requests", "Requests answered.", labels, registry=self.registry)
        self._duration = Histogram(
            "apiserver_request_duration_seconds",
            "From a request's head to its answer; watches and streams not counted.",
            ("verb", "resource"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.watchers = Gauge("apiserver_watchers", "Watches that are open.", ("resource",), registry=self.registry)
        self._counters: dict[tuple[str, str, str, int], Counter] = {}
        self._timers: dict[tuple[str, str], Histogram] = {}

    def observe(self, verb: str, resource: str, subresource: str, code: int, seconds: float) -> None:
        """An answer. `resource` is one that is served, so that clients cannot make up labels."""
        key = verb, resource, subresource, code
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = self._requests.labels(verb, resource, subresource, str(code))
        counter.inc()
        if verb == "watch" or subresource in ("exec", "attach", "debug", "portforward", "log"):
            return
        timer = self._timers.get((verb, resource))
        if timer is None:
            timer = self._timers[verb, resource] = self._duration.labels(verb, resource)
        timer.observe(seconds)

    def gauge(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        """A figure that is asked for when somebody looks."""
        Gauge(name, documentation, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
