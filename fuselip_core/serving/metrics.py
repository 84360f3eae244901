"""Metrics for Prometheus: counts and times, nothing about the content of requests."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """The metrics of one server, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fuselip_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "fuselip_request_seconds", "Time to the end of the answer.", ("route",), registry=self.registry
        )
        self.batch_rows = Histogram(
            "fuselip_batch_rows",
            "Rows of a forward pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self.registry,
        )
        self.waiting_rows = Gauge("fuselip_waiting_rows", "Rows waiting for the model.", registry=self.registry)
        self.index_rows = Gauge("fuselip_index_rows", "Rows of the index.", registry=self.registry)
