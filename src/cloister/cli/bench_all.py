"""`cloister bench all`: the tables one after the other, each in a process of its own."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from cloister.bench import plots
from cloister.cli import output
from cloister.errors import WrongUse

__all__ = ["everything"]

_START = "from cloister.cli.main import main; main()"


def everything(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="For a JSON file of each table, and the plots.")],
    shape: Annotated[
        str, typer.Option(help="A shape, its weights random, for all that concerns one model.")
    ] = "pythia-1b",
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="For perplexity; needs --model.")] = None,
    model: Annotated[str, typer.Option(help="An f16 model with trained weights, for perplexity.")] = "",
) -> None:
    """The tables of overhead, peers, quant, steady and speed, and plots of them, on a machine that does nothing else."""
    if (text is None) != (not model):
        raise WrongUse(
            "Perplexity needs a text and a model.", hint="--text wiki.test.raw --model f16.gguf, or neither."
        )
    if text is not None and not text.is_file():
        raise WrongUse(
            "The text for perplexity is no file.", hint="It is read last, after half an hour.", got=str(text)
        )
    plots.require()
    folder.mkdir(parents=True, exist_ok=True)
    for name, arguments in commands(folder, shape, text, model).items():
        output.note(f"{name:<8} cloister bench {' '.join(arguments)}", "dim", hang=9)
        began = time.monotonic()
        table = folder / f"{name}.json"
        with table.open("wb") as out:
            done = subprocess.run(
                [sys.executable, "-c", _START, "bench", *arguments, "--json"], stdout=out, check=False
            )
        if done.returncode:
            table.unlink()
            output.note(
                f"cloister bench {arguments[0]} failed (status {done.returncode}). What is finished stays.", "red"
            )
            raise typer.Exit(done.returncode)
        output.line(f"{table}  {time.monotonic() - began:.0f} s")


def commands(folder: Path, shape: str, text: Path | None, model: str) -> dict[str, list[str]]:
    """What is run, by the name of its file."""
    found = {
        "overhead": ["overhead", "--shape", shape, "--plot", str(folder)],
        "peers": ["peers", "--model", shape, "--plot", str(folder)],
        "quant": ["quant", shape, "--plot", str(folder)],
        "steady": ["steady"],
        "speed": ["speed", "--plot", str(folder)],
    }
    if text is not None:
        found["quality"] = ["quant", model, "--text", str(text), "--plot", str(folder / "quality")]
    return found
