"""`cloister up`: the lot on one machine, in one command, with the untrusted host's view beside the conversation."""

import contextlib
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
import uvicorn

from cloister.cli import output
from cloister.cli.chat import Turn, run_chat
from cloister.cli.dialogue import Asking
from cloister.cli.local import LocalEnclave, Plan, write_root
from cloister.cli.ownkey import announce_key, curl_option, take_key, text_of
from cloister.cli.progress import loading_bar
from cloister.cli.serve import Context, Model, Slots, wait_for_end
from cloister.cli.trust import summary
from cloister.client import AsyncSession, Session
from cloister.host.process import listen
from cloister.host.relay import Record, Relay
from cloister.models.download import resolve
from cloister.models.suggestion import suggest
from cloister.proxy import Chat, ProxyConfig, create_proxy
from cloister.proxy.key import OwnKey

__all__ = ["register"]

_SHOWN_BYTES = 24


def register(app: typer.Typer) -> None:
    app.command()(up)


def up(
    model: Model = "default",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the local endpoint; 0: any free one.")] = 8484,
    context: Context = None,
    slots: Slots = 16,
) -> None:
    """Simulated enclave, verifying proxy and a chat, all on this machine. Without a terminal it serves until ended."""
    with contextlib.closing(listen("127.0.0.1", port)) as proxy_socket:
        with output.download_bar() as bar:
            found = resolve(model, progress=bar)
        output.note(f"1 measuring the code that will run, and {output.one_line(found.name, 60)}", "dim")
        plan = Plan.make(found, context_length=context, slots=slots)
        with LocalEnclave(plan) as enclave:
            output.note(
                "2 starting the enclave (simulated: it protects nothing from this machine's owner)", "dim", hang=2
            )
            with loading_bar() as progress:
                enclave.start(progress)
            write_root(enclave.device)
            _converse(enclave, proxy_socket)


def _converse(enclave: LocalEnclave, proxy_socket: socket.socket) -> None:
    web, key = Chat(proxy_socket.getsockname()[1]), take_key()
    relay = Relay(enclave.port)
    relay.start()
    url = f"http://127.0.0.1:{relay.port}"
    try:
        with (
            Session(url, policy=enclave.policy, pin_measurement=True) as session,
            _proxy(enclave, url, proxy_socket, web, key) as at,
        ):
            output.note("3 verifying it, through the untrusted host, before anything is sent", "dim")
            if output.is_terminal(sys.stdin) and output.is_terminal(sys.stdout):
                # A toy wanders when it is given room; a real model's default is its own affair.
                toy = enclave.plan.model.source.startswith("embedded")
                output.note(f"a web chat too, for one browser: {web.address()}", "dim")
                announce_key(key)
                _chat(session, relay, at, Asking(temperature=0.3 if toy else None), web)
            else:
                _serve(session, enclave, at, web, key)
    finally:
        relay.stop()


def _chat(session: Session, relay: Relay, at: int, asking: Asking, web: Chat) -> None:
    _suggest()
    output.note(f"also for any OpenAI client: http://127.0.0.1:{at}/v1", "dim")
    session.verify()
    relay.take()
    run_chat(session, asking=asking, on_turn=lambda turn: _show_host_view(turn, relay.take()), web=web.address)


def _serve(session: Session, enclave: LocalEnclave, at: int, web: Chat, key: OwnKey | None) -> None:
    """Prints what was verified, a line that works, the web chat's address (for one browser), then `ready`; ends on SIGTERM, Ctrl+C, or with the enclave."""
    for part in summary(session.verify()):
        output.line(part, hang=2)
    _suggest()
    body = '{"model": "default", "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0.3}'
    url = f"http://127.0.0.1:{at}/v1"
    output.line(
        f"curl {url}/chat/completions -H 'content-type: application/json'{curl_option(key)} -d {shlex.quote(body)}"
    )
    output.line(f"web chat {web.address()}")
    announce_key(key)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    output.line(f"ready {url}")
    wait_for_end(enclave)


def _suggest() -> None:
    fits = suggest()
    output.note(f"a real model that fits this machine ({fits.why}): make run MODEL={fits.reference}", "dim", hang=2)


@contextlib.contextmanager
def _proxy(enclave: LocalEnclave, url: str, sock: socket.socket, web: Chat, key: OwnKey | None) -> Iterator[int]:
    """The verifying proxy in a thread of this process, at lower priority than the engine; its port."""
    at = sock.getsockname()[1]
    session = AsyncSession(url, policy=enclave.policy, pin_measurement=True)
    config = uvicorn.Config(
        create_proxy(session, ProxyConfig(at, key=text_of(key)), web),
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)

    def run() -> None:
        os.nice(10)
        server.run(sockets=[sock])

    thread = threading.Thread(target=run, name="proxy", daemon=True)
    thread.start()
    try:
        yield at
    finally:
        server.should_exit = True
        thread.join()


def _show_host_view(turn: Turn, seen: Sequence[Record]) -> None:
    """Under the answer: how much crossed the untrusted host, the first sealed bytes, and that no word was among it."""
    sent = b"".join(record.data for record in seen if record.direction == "to-enclave")
    got = b"".join(record.data for record in seen if record.direction == "from-enclave")
    words = [word for word in (turn.question.strip(), turn.answer.strip()) if len(word) > 3]
    leaked = any(word.encode() in sent + got for word in words)
    verdict = ("YOUR WORDS ARE IN IT", "bold red") if leaked else ("your words are not in it", "green")
    output.note(
        output.styled(
            (f"the host saw {len(sent):,} bytes going in, {len(got):,} coming out; ", "dim"), verdict, (":", "dim")
        ),
        hang=2,
    )
    for name, stream in (("in ", sent), ("out", got)):
        head, _, sealed = stream.partition(b"\r\n\r\n")
        first = head.split(b"\r\n")[0].decode("latin-1")
        output.note(f"  {name} {output.one_line(first, 60)} … {sealed[:_SHOWN_BYTES].hex(' ', 2)} …", "dim", hang=6)
