"""The functions that a caller of the newer dialects offers, and the texts in its messages."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from cloister.enclave.llm.fields import Fields, refuse
from cloister.enclave.llm.requests import MAX_TOOLS
from cloister.enclave.llm.schemas import MAX_SCHEMA
from cloister.enclave.llm.toolcalls import Tool

__all__ = ["element", "join_texts", "missing", "read_tools", "refuse_media", "required_text"]

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


def missing(name: str) -> NoReturn:
    refuse(name, f"'{name}' is missing.", "missing_required_parameter")


def required_text(fields: Fields, field: str) -> str:
    """Raises `Refused` (400) unless it is a string that says something."""
    value = fields.text(field)
    return value or missing(fields.name(field))


def element(value: Any, where: str) -> Fields:
    """An object that stands in an array. Raises `Refused` (400)."""
    if not isinstance(value, dict):
        refuse(where, f"'{where}' must be an object.", "invalid_type")
    return Fields(value, f"{where}.")


def read_tools(fields: Fields, kinds: Sequence[str | None], schema: str) -> tuple[Tool, ...]:
    """The field `tools`. `kinds`: the types that are functions; `schema`: the field for a function's parameters.

    Raises: Refused (400).
    """
    values = fields.array("tools")
    if len(values) > MAX_TOOLS:
        refuse("tools", f"'tools' may hold {MAX_TOOLS} tools at most.")
    tools = tuple(_tool(element(value, f"tools[{index}]"), kinds, schema) for index, value in enumerate(values))
    if len({tool.name for tool in tools}) < len(tools):
        refuse("tools", "'tools' holds two tools of one name.")
    return tools


def _tool(fields: Fields, kinds: Sequence[str | None], schema: str) -> Tool:
    if fields.text("type") not in kinds:
        wanted = " or ".join(kind for kind in kinds if kind)
        message = f"'{fields.name('type')}' must be {wanted}: an enclave runs no tools of its own."
        refuse(fields.name("type"), message, "unsupported_parameter")
    name = required_text(fields, "name")
    if not _NAME.fullmatch(name):
        refuse(fields.name("name"), f"'{fields.name('name')}' must be 1 to 128 letters, digits or any of _.:/-.")
    parameters = fields.object(schema).values
    if len(json.dumps(parameters)) > MAX_SCHEMA:
        refuse(fields.name(schema), f"'{fields.name(schema)}' is longer than {MAX_SCHEMA} characters.")
    return Tool(name, fields.text("description") or "", parameters)


def join_texts(fields: Fields, field: str, read: Callable[[Fields], str | None]) -> str:
    """A string, or an array of parts that `read` knows; None from it leaves a part out. Raises `Refused` (400)."""
    if isinstance(fields.get(field), str):
        return str(fields.get(field))
    where = fields.name(field)
    texts = [read(element(part, f"{where}[{index}]")) for index, part in enumerate(fields.array(field))]
    return "\n".join(text for text in texts if text is not None)


def refuse_media(fields: Fields, *, remote: bool) -> NoReturn:
    """What is no text. Fetching a `remote` one would tell a stranger's server that, and when, this was asked."""
    where = fields.name("").removesuffix(".")
    if remote:
        refuse(where, f"'{where}': an enclave fetches no remote address for a prompt.", "remote_url_refused")
    refuse(where, f"'{where}': this model reads text only.", "unsupported_content")
