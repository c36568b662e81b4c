"""What the server measures, in the text format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Metrics of one server.

    Attributes:
        refused, ended: streams, by reason. accepted: streams.
        latency: seconds from the arrival of audio to its result.
    """

    def __init__(self, max_streams: int):
        self._registry = registry = CollectorRegistry()

        def name(rest: str) -> str:
            return f"espnet_kv_{rest}"

        self._streams = Gauge(name("streams"), "Open streams", registry=registry)
        Gauge(name("max_streams"), "Streams at most", registry=registry).set(max_streams)
        self.accepted = Counter(name("streams_accepted"), "Streams accepted", registry=registry)
        self.refused = Counter(
            name("streams_refused"), "Streams refused", ["reason"], registry=registry
        )
        self.ended = Counter(name("streams_ended"), "Streams ended", ["reason"], registry=registry)
        self._cache = Gauge(
            name("cache_bytes"), "Bytes held for all streams", ["kind"], registry=registry
        )
        self._capacity = Gauge(
            name("cache_capacity_bytes"), "Bytes allocated for encoder states", registry=registry
        )
        self._step = Histogram(
            name("step_seconds"), "Time of a step", registry=registry, buckets=SECONDS
        )
        self._batch = Counter(name("step_streams"), "Streams in all steps", registry=registry)
        self.latency = Histogram(
            name("latency_seconds"),
            "Time from the arrival of audio to its result",
            registry=registry,
            buckets=SECONDS,
        )
        self._audio = Counter(name("audio_seconds"), "Audio decoded", registry=registry)
        self._busy = Counter(name("processing_seconds"), "Time of decoding", registry=registry)

    def step(self, streams: int, audio_seconds: float, seconds: float) -> None:
        """Count a step of some streams."""
        self._step.observe(seconds)
        self._batch.inc(streams)
        self._audio.inc(audio_seconds)
        self._busy.inc(seconds)

    def text(self, streams: int, held: dict[str, int], capacity: int) -> bytes:
        """All metrics; streams, held, capacity: open streams and their bytes at present."""
        self._streams.set(streams)
        self._capacity.set(capacity)
        for kind, count in held.items():
            self._cache.labels(kind).set(count)
        return generate_latest(self._registry)
