"""How a person names a model: an embedded one, one that was quantized here, a file, or a repository on the Hugging Face
hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cloister.errors import WrongUse
from cloister.models.store import quantized_path

__all__ = ["EmbeddedModel", "HubModel", "ModelFile", "Reference", "parse_reference"]

_HUB = re.compile(r"(?:https?://)?(?:hf\.co|huggingface\.co)/(.*)", re.IGNORECASE)
_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
"""As the hub has them: `--` stands between organization and repository in the names of folders here."""
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_EMBEDDED = {"default": "demo", "demo": "demo", "tiny": "tiny"}
_HINT = "Name a .gguf file, hf.co/org/repo, hf.co/org/repo:Q4_K_M, or one of the embedded models: default, tiny."


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model that comes with the package: `demo` (also called `default`) or `tiny`."""

    name: str


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A GGUF file on this machine, named by its path or, when it was quantized here, by its name. It was there when the
    reference was read."""

    path: Path


@dataclass(frozen=True, slots=True)
class HubModel:
    """`repository` is `org/repo`; `tag` a quantization (`Q8_0`), a file's name, or "" for the usual choice."""

    repository: str
    tag: str = ""

    def __str__(self) -> str:
        return f"hf.co/{self.repository}" + (f":{self.tag}" if self.tag else "")


Reference: TypeAlias = EmbeddedModel | ModelFile | HubModel


def parse_reference(text: str) -> Reference:
    """What `text` names. Looks at the disk for local files, never at the network.

    A file that exists wins over an embedded model only when it is written as a path (`./tiny`, `tiny.gguf`).

    Raises:
        WrongUse: it names nothing, or a local file that is not there.
    """
    if hub := _HUB.fullmatch(text):
        return _parse_hub(text, hub.group(1))
    if text.lower() in _EMBEDDED:
        return EmbeddedModel(_EMBEDDED[text.lower()])
    return _parse_path(text)


def _parse_hub(text: str, rest: str) -> HubModel:
    location, _, tag = rest.partition(":")
    parts = location.rstrip("/").split("/")
    if len(parts) != 2 or not all(_NAME.fullmatch(part) for part in parts) or (tag and not _TAG.fullmatch(tag)):
        raise WrongUse(
            f"Not a model on the hub: {text[:200]!r}.", hint="Write hf.co/org/repo or hf.co/org/repo:Q4_K_M."
        )
    return HubModel("/".join(parts), tag)


def _parse_path(text: str) -> ModelFile:
    path = Path(text).expanduser()
    if path.is_file():
        return ModelFile(path.absolute())
    if _NAME.fullmatch(text) and (made := quantized_path(text)).is_file():
        return ModelFile(made)
    if path.is_dir():
        raise WrongUse(f"{text[:200]!r} is a folder; a model is one .gguf file.", hint=_HINT)
    if re.fullmatch(rf"{_NAME.pattern}/{_NAME.pattern}(:.*)?", text) and not text.lower().endswith(".gguf"):
        raise WrongUse(f"There is no file {text[:200]!r}.", hint=f"For the model on the hub, write hf.co/{text[:200]}")
    raise WrongUse(f"There is no model {text[:200]!r}.", hint=_HINT)
