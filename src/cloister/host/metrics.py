"""The host's counts and sizes in Prometheus' text format. No content, no addresses of clients."""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["render"]

_OF_APPS: tuple[tuple[str, str, str, str], ...] = (  # metric, type, help, field of `usage`
    ("cloister_app_memory_bytes", "gauge", "Resident memory.", "memory_bytes"),
    ("cloister_app_cpu_seconds_total", "counter", "CPU time since its start.", "cpu_seconds"),
    ("cloister_app_connections_total", "counter", "Connections to its port.", "connections"),
    ("cloister_app_received_bytes_total", "counter", "Bytes from clients.", "received"),
    ("cloister_app_sent_bytes_total", "counter", "Bytes to clients.", "sent"),
)


def render(apps: Iterable[Mapping[str, Any]], bundle_bytes: int) -> str:
    """`apps`: as `Fleet.all` describes them."""
    known = list(apps)
    lines = ["# HELP cloister_app_up Whether it can answer.", "# TYPE cloister_app_up gauge"]
    lines += [f'cloister_app_up{{app="{app["name"]}"}} {int(app["state"] == "ready")}' for app in known]
    lines += [
        "# HELP cloister_app_starts_total Starts since the host's own.",
        "# TYPE cloister_app_starts_total counter",
    ]
    lines += [f'cloister_app_starts_total{{app="{app["name"]}"}} {app["starts"]}' for app in known]
    for metric, kind, words, name in _OF_APPS:
        lines += [f"# HELP {metric} {words}", f"# TYPE {metric} {kind}"]
        lines += [f'{metric}{{app="{app["name"]}"}} {app["usage"][name]}' for app in known if app["usage"]]
    lines += ["# HELP cloister_bundle_bytes Bundles on the disk.", "# TYPE cloister_bundle_bytes gauge"]
    return "\n".join([*lines, f"cloister_bundle_bytes {bundle_bytes}", ""])
