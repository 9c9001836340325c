"""`cloister bench steady`: whether long prompts, cancels and thousands of requests leave an engine as it was."""

import statistics
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.table import Table

from cloister.bench import steady as measurements
from cloister.cli import output
from cloister.cli.measuring import machine, measuring_bar, random_model, show
from cloister.cli.output import AsJson
from cloister.models.download import resolve

__all__ = ["steady"]

_SHAPE = "qwen2-0.5b"
_HEAVY = "pythia-1b"
_HEAVY_TOKENS = 4096


def steady(
    requests: Annotated[int, typer.Option(min=400, max=1_000_000, help="For growth.")] = 2000,
    as_json: AsJson = False,
) -> None:
    """Fairness beside a long prompt, cancelling in the midst of one, memory, and growth over many requests."""
    light, heavy = random_model(_SHAPE), random_model(_HEAVY)
    with measuring_bar(43) as step:
        memory = _stepped(step, lambda: measurements.memory(heavy, tokens=_HEAVY_TOKENS))
        fair = _stepped(step, lambda: measurements.fairness(light))
        held = _stepped(step, lambda: measurements.cancel_in_prompt(light))
        growth = measurements.growth(resolve("default").path, requests=requests, on_step=step)
    found: dict[str, Any] = {
        "machine": machine(),
        "memory": {"shape": _HEAVY, **memory.to_json()},
        "fairness": {"shape": _SHAPE, **fair.to_json()},
        "cancel_in_prompt": {"shape": _SHAPE, "held_ms": [seconds * 1000 for seconds in held]},
        "growth": {"model": "default", **growth.to_json()},
    }
    if as_json:
        output.json_value(found)
    else:
        _show(found)


def _stepped(step: Callable[[], None], measure: Callable[[], Any]) -> Any:
    found = measure()
    step()
    return found


def _show(found: dict[str, Any]) -> None:
    memory, fair, growth = found["memory"], found["fairness"], found["growth"]
    held = found["cancel_in_prompt"]["held_ms"]
    table = Table("what", "measured", "")
    whole = f"{(memory['weights'] + memory['cache']) / 1e6:,.0f} MB of weights and cache"
    table.add_row("resident after loading", f"{memory['resident_ratio']:.2f} x", f"{whole} ({memory['shape']} shape)")
    table.add_row("peak while loading", f"{memory['peak_ratio']:.2f} x", "the sealed copy of the file counted in")
    beside = f"beside a prompt of {fair['prompt_tokens']} tokens ({fair['shape']} shape)"
    table.add_row(
        f"{fair['streams']} streams' time between tokens",
        f"{fair['ratio']:.2f} x",
        f"{fair['quiet_ms']:.0f} -> {fair['beside_ms']:.0f} ms {beside}",
    )
    table.add_row("longest gap", f"{fair['longest_gap_ms']:.0f} ms", "meanwhile, of any stream")
    table.add_row("that prompt's first token", f"{fair['long_prompt_first_token_s']:.1f} s", "")
    table.add_row(
        "cancelled in its prompt",
        f"{statistics.median(held):.0f} ms",
        f"for which it still held its slot; {max(held):.0f} ms at most, {len(held)} trials",
    )
    table.add_row(
        "growth", f"{growth['bytes_per_request']:+,.0f} bytes a request", f"over {growth['requests']:,} requests"
    )
    show(table)
