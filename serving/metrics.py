"""Metrics of a replica in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from ul2r.inference.engine import SteppedEngine

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Metrics of one engine.

    Attributes:
        first_token: Seconds from a request to its first token.
        inter_token: Seconds between two tokens of an answer.
    """

    def __init__(self, engine: SteppedEngine) -> None:
        self._engine = engine
        # Its own registry: Ray has metrics in the global one.
        self._registry = CollectorRegistry()
        self.first_token = Histogram(
            "ul2r_time_to_first_token_seconds",
            "Time from a request to its first token.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.inter_token = Histogram(
            "ul2r_inter_token_seconds",
            "Time between two tokens of an answer.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's counts; the interface of a collector of prometheus_client."""
        engine = self._engine
        counts = engine.statistics
        for name, meaning, gauge in (
            ("ul2r_requests_running", "Requests that have a slot.", engine.num_running),
            ("ul2r_requests_waiting", "Requests that wait for a slot.", engine.num_waiting),
            ("ul2r_slots", "Slots: requests that can run at once.", engine.num_slots),
        ):
            yield GaugeMetricFamily(name, meaning, value=gauge)
        for name, meaning, count in (
            ("ul2r_requests_finished", "Answers that ended.", counts.finished),
            ("ul2r_requests_cancelled", "Requests whose client went away.", counts.cancelled),
            ("ul2r_requests_expired", "Requests whose time was over.", counts.expired),
            ("ul2r_requests_refused", "Requests that found the queue full.", counts.refused),
            ("ul2r_generated_tokens", "Sampled tokens.", counts.generated_tokens),
            ("ul2r_prompt_tokens", "Tokens of prompts that were read.", counts.prompt_tokens),
            ("ul2r_decoding_steps", "Decoding steps.", counts.steps),
            ("ul2r_prompt_cache_hits", "Prompts found in the cache.", engine.prompt_cache.hits),
            ("ul2r_prompt_cache_misses", "Prompts not found.", engine.prompt_cache.misses),
        ):
            yield CounterMetricFamily(name, meaning, value=count)

    def render(self) -> bytes:
        """Return the page that Prometheus reads."""
        return generate_latest(self._registry)
