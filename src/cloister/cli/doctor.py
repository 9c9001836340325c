"""`cloister doctor`: what confidential computing this machine has, and what was looked for."""

from dataclasses import asdict

import typer

from cloister.cli import output
from cloister.cli.output import AsJson
from cloister.enclave.attest.detect import Detection, Machine, detect

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(as_json: AsJson = False) -> None:
    """Say which TEE this machine is, and what was looked for. Makes no evidence, changes nothing."""
    found = detect(Machine())
    if as_json:
        findings = [asdict(finding) for finding in found.findings]
        output.json_value({"v": 1, "platform": found.platform, "gpus": found.gpus, "findings": findings})
    else:
        _show(found)


def _show(found: Detection) -> None:
    if found.platform is None:
        output.line(output.styled(("no TEE", "bold yellow"), ("  cloister can only simulate here", "")))
    else:
        gpus = f", {found.gpus} confidential GPUs" if found.gpus else ""
        output.line(output.styled((output.one_line(found.platform), "bold green"), (gpus, "")))
    for finding in found.findings:
        mark, style = ("found", "green") if finding.platform else ("  -  ", "dim")
        text = f" {finding.what} ({finding.where}): {finding.detail}"
        output.line(output.styled((f"  {mark}", style), (output.one_line(text), "")))
        if finding.hint:
            output.line(output.styled((f"         {output.one_line(finding.hint)}", "yellow")))
