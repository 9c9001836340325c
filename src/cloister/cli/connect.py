"""`cloister connect URL`: verify, then an OpenAI-compatible endpoint and a web chat on 127.0.0.1, and all of it sealed.

With several addresses, each is verified by itself and answers for its own models; one that is refused keeps no other from
answering.
"""

import asyncio
import errno
import os
import re
import socket
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from cloister.cli import output
from cloister.cli.judgement import show_blocked, stopping
from cloister.cli.ownkey import announce_key, curl_option, take_key, text_of
from cloister.cli.service import unit
from cloister.cli.trust import ApiKey, PolicyFile, RequirePq, SimulatorRoot, Trust, one_word, split, summary
from cloister.errors import CloisterError, WrongUse
from cloister.host.process import listen
from cloister.proxy import Chat, ProxyConfig, Upstream, create_proxy
from cloister.proxy.key import OwnKey
from cloister.proxy.origin import origin_key
from cloister.proxy.serving import server

__all__ = ["register", "sixth"]

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})=(https?://.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Address:
    """One enclave as it was asked for. `name`: given, or the address's host and port."""

    name: str
    url: str
    trust: Trust
    api_key: str


def register(app: typer.Typer) -> None:
    app.command()(_connect)


def _connect(
    urls: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]URL...",
            help="The enclave's address; or several, each with its own models.",
            show_default=False,
        ),
    ],
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="On 127.0.0.1; 0 takes a free one.")
    ] = 8484,
    policy: PolicyFile = None,
    policy_of: Annotated[
        list[str] | None,
        typer.Option("--policy-of", metavar="NAME=FILE", help="Of several: what to believe of this one instead."),
    ] = None,
    dangerously_trust_simulator: SimulatorRoot = None,
    require_pq: RequirePq = False,
    api_key: ApiKey = "",
    require_key: Annotated[
        bool,
        typer.Option("--require-key", help="Answer programs only that show a generated key. Always so but on Linux."),
    ] = False,
    print_service: Annotated[
        bool, typer.Option("--print-service", help="Start nothing: print a systemd user service that does.")
    ] = False,
) -> None:
    """Offer a verified enclave to any OpenAI- or Anthropic-compatible tool of this machine's user, and to a browser, until
    Ctrl+C. An enclave with an app of somebody's own is offered with all of the app's paths, and its pages at an address
    of their own.

    With --api-key that key is sent in place of the tool's own. Of several enclaves, each takes its key from
    CLOISTER_API_KEY_NAME (the name in capitals, other letters as _), and a request goes to the one whose model it names.
    """
    trust = Trust(policy, dangerously_trust_simulator, require_pq)
    addresses = _addresses(urls, trust, policy_of or [], api_key)
    if print_service:
        output.write(unit([*_arguments(addresses, port), *(["--require-key"] if require_key else [])]))
        return
    key = take_key(required=require_key)
    upstreams = [
        Upstream(one.name, one.trust.async_session(one.url, pin_measurement=True), one.api_key) for one in addresses
    ]
    with stopping(), listen("127.0.0.1", port) as sock:
        asyncio.run(_serve(upstreams, sock, key))


def _addresses(urls: Sequence[str], trust: Trust, policies: Iterable[str], api_key: str) -> list[_Address]:
    """Raises: WrongUse for two of one name, a policy of none of them, or one key for several."""
    named = dict(_named(url) for url in urls)
    if len(named) != len(urls):
        hint = "Give them names: cloister connect one=https://… two=https://…"
        raise WrongUse("Two of the enclaves have one name.", hint=hint, step="upstreams")
    if api_key and len(named) > 1:
        hint = f"Each its own, in the environment: {', '.join(map(_variable, named))}."
        raise WrongUse("One API key for several enclaves: which of them shall see it?", hint=hint, step="api-key")
    files = dict(_policy(text, named) for text in policies)
    return [
        _Address(
            name,
            url,
            replace(trust, policy_file=files.get(name, trust.policy_file)),
            api_key or (one_word(os.environ.get(_variable(name), "")) if len(named) > 1 else ""),
        )
        for name, url in named.items()
    ]


def _named(text: str) -> tuple[str, str]:
    """Name and address of `[NAME=]URL`; what is no address is left to whoever asks there."""
    match = _NAMED.fullmatch(text)
    return (match[1], match[2]) if match else (_place(text), text)


def _place(url: str) -> str:
    """Host and port, as the address has them."""
    try:
        return urlsplit(split(url)[0]).netloc.rpartition("@")[2] or url
    except ValueError:
        return url


def _policy(text: str, named: Iterable[str]) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if name not in named or not file:
        raise WrongUse(
            "--policy-of names none of the enclaves.",
            hint="--policy-of NAME=FILE: the name before the address, or its host and port.",
            step="policy-of",
            expected=", ".join(named),
            got=output.one_line(text, 80),
        )
    return name, Path(file)


def _variable(name: str) -> str:
    return "CLOISTER_API_KEY_" + re.sub(r"[^A-Z0-9]", "_", name.upper())


def _arguments(addresses: Sequence[_Address], port: int) -> list[str]:
    """The same again, for a service: it starts in another folder, and has no key on its command line."""
    several = len(addresses) > 1
    urls = [one.url if one.name == _place(one.url) else f"{one.name}={one.url}" for one in addresses]
    words = ["connect", *urls, "--port", str(port)]
    for one in addresses:
        if one.trust.policy_file is not None:
            file = str(one.trust.policy_file.absolute())
            words += ["--policy-of", f"{one.name}={file}"] if several else ["--policy", file]
    trust = addresses[0].trust
    if trust.simulator_root is not None:
        words += ["--dangerously-trust-simulator", str(trust.simulator_root.absolute())]
    return [*words, "--require-pq"] if trust.require_pq else words


async def _serve(upstreams: Sequence[Upstream], sock: socket.socket, key: OwnKey | None) -> None:
    async with AsyncExitStack() as sessions:
        for one in upstreams:
            await sessions.enter_async_context(one.session)
        await _verify(upstreams)
        port = sock.getsockname()[1]
        if len(upstreams) == 1 and upstreams[0].app is not None:
            proxy = create_proxy(upstreams, ProxyConfig(port=port, app_key=origin_key(), key=text_of(key)))
            sockets = [sock, *sixth(port)]
            _announce_app(f"http://127.0.0.1:{port}", proxy.app_address)
            announce_key(key)
            await server(proxy).serve(sockets=sockets)
            return
        chat = _chat(port) if len(upstreams) == 1 else None
        _announce(f"http://127.0.0.1:{port}/v1", chat, upstreams, key)
        announce_key(key)
        proxy = create_proxy(upstreams, ProxyConfig(port=port, key=text_of(key)), chat)
        await server(proxy).serve(sockets=[sock])


def sixth(port: int) -> list[socket.socket]:
    """A browser that looks for `NAME.localhost` asks ::1 before 127.0.0.1: whoever listened there would be taken for the
    app. Raises: WrongUse when somebody does."""
    try:
        return [listen("::1", port)]
    except WrongUse as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return []  # this machine has no such address, so nobody listens there
        raise


def _announce_app(base: str, address: str) -> None:
    output.line(f"ready {base}")
    output.line(f"app {address}")
    told = "open the second in a browser: there its pages, forms and cookies work; the first is for programs"
    output.note(told, "dim")


async def _verify(upstreams: Sequence[Upstream]) -> None:
    """All at once; what cannot be verified is shown. Raises: what its verification raised, when none is left."""
    outcomes = await asyncio.gather(*(_outcome(one) for one in upstreams))
    errors = [error for error in outcomes if error is not None]
    if len(errors) == len(upstreams):
        raise errors[0]
    for one, error in zip(upstreams, outcomes, strict=True):
        if len(upstreams) > 1:
            output.note(output.styled((one.name, "bold"), (f"  {one.session.url}", "")))
        if error is not None:
            output.note(
                output.styled(("BLOCKED", "bold red"), ("  it is asked again when somebody names its model", ""))
            )
            show_blocked(error)
        elif (verified := one.session.verified) is not None:
            for part in summary(verified):
                output.note(part, hang=2)


async def _outcome(upstream: Upstream) -> CloisterError | None:
    try:
        await upstream.verify()
    except CloisterError as error:
        return error
    return None


def _chat(port: int) -> Chat:
    chat = Chat(port, on_begin=lambda: output.note(f"web chat, for another browser: {chat.address()}", "dim"))
    return chat


def _announce(base: str, chat: Chat | None, upstreams: Sequence[Upstream], key: OwnKey | None) -> None:
    """The socket listens already, so whoever reads this may ask. The chat's address is good for one browser."""
    body = '{"model":"default","messages":[{"role":"user","content":"Who are you?"}]}'
    output.line(f"ready {base}")
    output.line(f"curl {base}/chat/completions -H 'Content-Type: application/json'{curl_option(key)} -d '{body}'")
    if chat is not None:
        output.line(f"web chat {chat.address()}")
    else:
        output.line(f"models  curl {base}/models{curl_option(key)}  ({upstreams[0].name} answers for `default`)")
        output.note("no web chat: it shows the proof of one enclave, so connect to one for it", "dim")
