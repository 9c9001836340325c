"""How `models show` tells of a model: as lines, or as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cloister.cli import output
from cloister.models.gguf import Description
from cloister.models.lineage import Digests, Fetched, Found, Lineage, Quantized, Step, encode_step
from cloister.models.memory import Estimate

__all__ = ["Shown"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Shown:
    """All that is known of one model. `memory`: type of the cache -> what serving it takes; `available` in bytes."""

    name: str
    source: str
    path: str
    model: Description
    digests: Digests
    lineage: Lineage | None
    memory: Mapping[str, Estimate]
    available: int

    @property
    def of_other_bytes(self) -> bool:
        """The file is not the one that the record tells of."""
        return self.lineage is not None and self.lineage.sha256 != self.digests.sha256

    def write_lines(self, *, tensors: bool) -> None:
        model = self.model
        for name, value in self._facts():
            output.line(f"{name:<13} {output.one_line(value)}")
        self._write_lineage()
        output.line()
        rows = [
            (kind, f"{count:,}", f"{size:,}", f"{size / model.weights:.1%}")
            for kind, (count, size) in model.by_type().items()
        ]
        _write_table(("tensors of", "count", "bytes", "share"), rows)
        output.line()
        self._write_memory()
        if tensors:
            output.line()
            listed = [(t.name, t.type, " x ".join(map(str, t.shape)), f"{t.size:,}") for t in model.tensors]
            _write_table(("tensor", "type", "shape", "bytes"), listed)

    def _facts(self) -> list[tuple[str, str]]:
        model = self.model
        return [
            ("model", f"{model.name or self.name}"),
            ("source", self.source),
            ("architecture", f"{model.architecture}, {len(model.kv_heads)} layers of width {model.width:,}"),
            (
                "attention",
                f"{model.heads} heads, {_say_range(model.kv_heads)} for keys and values, {model.key_length} wide",
            ),
            ("parameters", f"{model.parameters:,}"),
            ("quantization", model.quantization),
            ("size", f"{model.file_size:,} bytes"),
            ("context", f"{model.context:,} tokens in training"),
            ("vocabulary", f"{model.vocabulary:,} tokens"),
            ("template", "none" if model.chat_template is None else "yes (--template prints it)"),
            ("licence", model.licence or "not said"),
            ("sha256", self.digests.sha256),
        ]

    def _write_lineage(self) -> None:
        if self.lineage is None:
            output.line("lineage       no record")
            return
        output.line(f"lineage       sha256:{self.lineage.digest()}")
        for step in self.lineage.steps:
            output.line(f"              {output.one_line(_say(step))}")
        if self.of_other_bytes:
            what = _say_difference(self.lineage.tensors, self.digests.tensors)
            output.line(output.styled((" " * 14, ""), ("of other bytes", "bold red"), (f": {what}", "")))

    def _write_memory(self) -> None:
        first = next(iter(self.memory.values()))
        rows = [
            ("weights", *(_mib(e.weights) for e in self.memory.values())),
            ("cache", *(_mib(e.kv) for e in self.memory.values())),
            ("  tokens in it", *(f"{e.cells:,}" for e in self.memory.values())),
            ("buffers", *(_mib(e.buffers) for e in self.memory.values())),
            ("resident", *(_mib(e.resident) for e in self.memory.values())),
            ("peak at load", *(_mib(e.peak) for e in self.memory.values())),
        ]
        output.line(f"memory for {first.streams} streams of {first.context:,} tokens; {_mib(self.available)} are free")
        _write_table(("", *(f"cache {kind}" for kind in self.memory)), rows)

    def to_json(self, *, tensors: bool) -> dict[str, Any]:
        model = self.model
        fields = {name: value for name, value in asdict(model).items() if name != "tensors"}
        lineage = None
        if self.lineage is not None:
            steps = [encode_step(step) for step in self.lineage.steps]
            lineage = {"sha256": self.lineage.digest(), "of_these_bytes": not self.of_other_bytes, "steps": steps}
        found: dict[str, Any] = {
            **fields,
            "name": model.name or self.name,
            "source": self.source,
            "path": self.path,
            "sha256": self.digests.sha256,
            "parameters": model.parameters,
            "types": {kind: {"tensors": count, "bytes": size} for kind, (count, size) in model.by_type().items()},
            "lineage": lineage,
            "memory": {kind: {**asdict(e), "resident": e.resident, "peak": e.peak} for kind, e in self.memory.items()},
            "available": self.available,
        }
        if tensors:
            digests = self.digests.tensors
            found["tensors"] = [{**asdict(tensor), "sha256": digests.get(tensor.name)} for tensor in model.tensors]
        return found


def _say_range(numbers: Sequence[int]) -> str:
    low, high = min(numbers, default=0), max(numbers, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f} MiB"


def _say(step: Step) -> str:
    match step:
        case Fetched():
            return f"fetched from hf.co/{step.repository} at {step.revision}: {step.file}"
        case Found():
            return f"found as {step.file}, sha256 {step.sha256}"
        case Quantized():
            again = ", from a quantized one" if step.requantized else ""
            return f"quantized to {step.type} by {step.tool} ({step.version}, engine {step.engine_sha256[:12]}…){again}"


def _say_difference(recorded: Mapping[str, str], found: Mapping[str, str]) -> str:
    names = recorded.keys() | found.keys()
    changed = sum(recorded.get(name) != found.get(name) for name in names)
    if not changed:
        return "the weights are the same, what the file says about them is not"
    return f"{changed} of {len(names)} tensors differ"


def _write_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, the others to the right."""
    plain = [[output.one_line(cell, 64) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *plain, strict=True)]
    for row in (head, *plain):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        output.line("  ".join(cells).rstrip())
