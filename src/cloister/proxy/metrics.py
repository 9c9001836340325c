"""Counters without content: how many, how large, how long, and what is verified, in Prometheus' text form.

Nothing here comes out of a request or an answer but sizes, a status and, of the routes that are known by name, the route.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cloister.proxy.reply import Message, Send
from cloister.proxy.upstreams import Upstream

__all__ = ["MEDIA_TYPE", "Histogram", "Metrics", "Observed"]

MEDIA_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/generate",
    "/health",
)
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_Labels = dict[str, str]
_Sample = tuple[str, _Labels, float]


@dataclass(slots=True)
class Histogram:
    """How many took up to each of `_SECONDS`, or longer."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_SECONDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.total += seconds

    def samples(self, name: str) -> Iterator[_Sample]:
        so_far = 0
        for bound, count in zip((*map(str, _SECONDS), "+Inf"), self.counts, strict=True):
            so_far += count
            yield f"{name}_bucket", {"le": bound}, so_far
        yield f"{name}_sum", {}, self.total
        yield f"{name}_count", {}, so_far


@dataclass(slots=True)
class Metrics:
    """Since the start. `refused` counts by the proxy's own codes; `cancelled` the clients that left, `broken` the answers
    that failed, most of them after their head."""

    requests: Counter[str] = field(default_factory=Counter)
    responses: Counter[int] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    running: int = 0
    cancelled: int = 0
    broken: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    head: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)

    def refuse(self, code: str, upstream: str = "") -> None:
        self.refused[upstream, code] += 1

    def text(self, upstreams: Iterable[Upstream]) -> str:
        """What /metrics says."""
        return "".join(
            f"# HELP {name} {told}\n# TYPE {name} {kind}\n{''.join(map(_line, samples))}"
            for name, kind, told, samples in self._families(tuple(upstreams))
        )

    def _families(self, upstreams: tuple[Upstream, ...]) -> Iterator[tuple[str, str, str, list[_Sample]]]:
        for name, told, counts in (
            ("requests", "Requests by route.", [({"route": key}, n) for key, n in self.requests.items()]),
            ("responses", "Answers by status.", [({"status": str(key)}, n) for key, n in self.responses.items()]),
            ("refused", "What the proxy refused or could not do, by its own code.", self._refused()),
            ("cancelled", "Requests whose client left before the end.", [({}, self.cancelled)]),
            ("broken", "Answers that failed, most of them after their head.", [({}, self.broken)]),
            ("request_bytes", "Bytes of requests' bodies.", [({}, self.request_bytes)]),
            ("response_bytes", "Bytes of answers' bodies.", [({}, self.response_bytes)]),
        ):
            full = f"cloister_proxy_{name}_total"
            yield full, "counter", told, [(full, labels, float(count)) for labels, count in counts]
        yield from self._times()
        yield from _states(upstreams)

    def _refused(self) -> list[tuple[_Labels, int]]:
        named = [({"upstream": name} if name else {}, code, n) for (name, code), n in self.refused.items()]
        return [({**labels, "code": code}, n) for labels, code, n in named]

    def _times(self) -> Iterator[tuple[str, str, str, list[_Sample]]]:
        name = "cloister_proxy_running"
        yield name, "gauge", "Requests being answered now.", [(name, {}, float(self.running))]
        for name, told, times in (
            ("cloister_proxy_head_seconds", "From the request to the answer's head.", self.head),
            ("cloister_proxy_answer_seconds", "From the request to the answer's end.", self.whole),
        ):
            yield name, "histogram", told, list(times.samples(name))


def _states(upstreams: tuple[Upstream, ...]) -> Iterator[tuple[str, str, str, list[_Sample]]]:
    """What is verified now; an enclave that nobody asked for an hour is not."""
    now = [(one.name, one.session.verified) for one in upstreams]
    for name, told, values in (
        ("verified", "1: a verification is in use; 0: none, or it was refused.", [(n, v is not None) for n, v in now]),
        ("simulated", "1: what is verified is simulated.", [(n, v is not None and v.simulated) for n, v in now]),
        ("first_use", "1: its policy was not accepted yet.", [(n, v is not None and v.first_use) for n, v in now]),
        (
            "verified_until_seconds",
            "Unix time at which the verification ends; 0: there is none.",
            [(n, 0.0 if v is None else v.expires_at) for n, v in now],
        ),
    ):
        full = f"cloister_proxy_upstream_{name}"
        yield full, "gauge", told, [(full, {"upstream": upstream}, float(value)) for upstream, value in values]


def _line(sample: _Sample) -> str:
    name, labels, value = sample
    inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{inner}}} {value!r}\n" if inner else f"{name} {value!r}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Observed:
    """One request's `send`, which counts what it is given. `answered`: whether an answer began."""

    def __init__(self, metrics: Metrics, path: str, send: Send) -> None:
        self._metrics = metrics
        self._send = send
        self._began = time.perf_counter()
        self.answered = False
        self._ended = False
        metrics.requests[_route(path)] += 1
        metrics.running += 1

    async def send(self, message: Message) -> None:
        self.answered = True
        await self._send(message)
        if message["type"] == "http.response.start":
            self._metrics.responses[message["status"]] += 1
            self._metrics.head.add(time.perf_counter() - self._began)
            return
        self._metrics.response_bytes += len(message.get("body", b""))
        if not message.get("more_body", False):
            self._ended = True
            self._metrics.whole.add(time.perf_counter() - self._began)

    def close(self, *, failed: bool) -> None:
        """When the request is over, however that came."""
        self._metrics.running -= 1
        if not self._ended:
            if failed:
                self._metrics.broken += 1
            else:
                self._metrics.cancelled += 1


def _route(path: str) -> str:
    if path.startswith("/v1/models/"):
        return "/v1/models"
    return path if path in _ROUTES else "other"
