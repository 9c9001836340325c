import contextlib
import functools
import itertools
import os
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.channel.vectors import CHUNKED, OHTTP

from cloister.channel.bhttp import Request, ResponseEvent, encode_varint
from cloister.channel.hpke import KEM_X25519, Context, X25519Key, setup_receiver, setup_sender
from cloister.channel.keys import GroupRing, KeyRing, encode_configs, parse_configs, replica_of
from cloister.channel.limits import DEFAULT_LIMITS, MAX_CHUNK, Limits
from cloister.channel.ohttp import (
    ChunkReader,
    RequestOpener,
    ResponseEnd,
    ResponseHead,
    ResponseOpener,
    ResponseSealer,
    SealedRequest,
    request_info,
    response_sequence,
    seal_chunk,
    seal_final_chunk,
    seal_request,
    seal_to,
)
from cloister.channel.padding import event_padding
from cloister.errors import (
    ChannelBroken,
    CloisterError,
    KeyUnknown,
    MalformedMessage,
    NotTrusted,
    Replayed,
    TruncatedResponse,
    WrongUse,
)

ASK = Request(
    "POST", "http", "enclave.invalid", "/v1/chat/completions", ((b"content-type", b"application/json"),), b"{}" * 20
)
SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
X25519_HEAD = 7 + 32


@functools.cache
def ring_seed() -> bytes:
    return b"\0" + os.urandom(63)  # the first epoch is number 0


def make_ring(**options: Any) -> KeyRing:
    """Always the same keys, to save their making."""
    return KeyRing(0.0, entropy=lambda length: ring_seed()[:length], **options)


def x25519_only(ring: KeyRing) -> bytes:
    return encode_configs(parse_configs(ring.ohttp_keys)[1:])


def opened(ring: KeyRing, body: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[Request, ResponseSealer]:
    opener = RequestOpener(ring, limits=limits)
    opener.feed(body, 0.0)
    result = opener.finish(0.0)
    return result.request, result.response


def exchange(keys: bytes | None = None) -> tuple[SealedRequest, ResponseSealer]:
    ring = make_ring()
    sealed = seal_to(keys or x25519_only(ring), ASK)
    return sealed, opened(ring, sealed.body)[1]


def read(opener: ResponseOpener, pieces: Iterable[bytes]) -> list[ResponseEvent]:
    events = [event for piece in pieces for event in opener.feed(piece)]
    opener.finish()
    return events


def content(events: Sequence[ResponseEvent]) -> bytes:
    return b"".join(event for event in events if isinstance(event, bytes))


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def chunks_of(data: bytes, head: int) -> list[bytes]:
    """The head, then every chunk with its length."""
    pieces, position = [data[:head]], head
    while data[position]:
        start = 1 << (data[position] >> 6)
        length = int.from_bytes(data[position : position + start], "big") & ((1 << (8 * start - 2)) - 1)
        pieces.append(data[position : position + start + length])
        position += start + length
    return [*pieces, data[position:]]


# The published vectors


def vector_contexts(vector: dict[str, str], label: bytes) -> tuple[bytes, bytes, Context, Context]:
    key = X25519Key(bytes.fromhex(vector["sk_r"]))
    encoded = bytes.fromhex(vector["config"])
    (config,) = parse_configs(len(encoded).to_bytes(2, "big") + encoded)
    assert config.public == key.public
    header = bytes([config.key_id]) + bytes.fromhex("002000010001")
    info = request_info(header, label)
    assert info.hex() == vector["info"]
    sk_e = bytes.fromhex(vector["sk_e"])
    enc, sender = setup_sender(KEM_X25519, 1, config.public, info, entropy=lambda _: sk_e)
    return header, enc, sender, setup_receiver(key, 1, enc, info)


def test_rfc9458_appendix_a() -> None:
    header, enc, sender, receiver = vector_contexts(OHTTP, b"message/bhttp request")
    request, response = bytes.fromhex(OHTTP["request"]), bytes.fromhex(OHTTP["response"])
    sealed = sender.seal(b"", request)
    assert header + enc + sealed == bytes.fromhex(OHTTP["sealed_request"])
    assert receiver.open(b"", sealed) == request
    nonce = bytes.fromhex(OHTTP["nonce"])
    answer = nonce + response_sequence(receiver, enc, nonce, b"message/bhttp response").seal(b"", response)
    assert answer == bytes.fromhex(OHTTP["sealed_response"])
    assert response_sequence(sender, enc, nonce, b"message/bhttp response").open(b"", answer[16:]) == response


def test_chunked_ohttp_appendix_a() -> None:
    header, enc, sender, receiver = vector_contexts(CHUNKED, b"message/bhttp chunked request")
    request, response = bytes.fromhex(CHUNKED["request"]), bytes.fromhex(CHUNKED["response"])
    sealed = [seal_chunk(sender, request[:12]), seal_chunk(sender, request[12:]), seal_final_chunk(sender, b"")]
    assert header + enc + b"".join(sealed) == bytes.fromhex(CHUNKED["sealed_request"])
    nonce = bytes.fromhex(CHUNKED["nonce"])
    answers = response_sequence(receiver, enc, nonce)
    sealed = [seal_chunk(answers, response[:1]), seal_chunk(answers, response[1:]), seal_final_chunk(answers, b"")]
    assert nonce + b"".join(sealed) == bytes.fromhex(CHUNKED["sealed_response"])


def test_reads_chunked_ohttp_appendix_a() -> None:
    _, enc, sender, receiver = vector_contexts(CHUNKED, b"message/bhttp chunked request")
    reader = ChunkReader()
    reader.feed(bytes.fromhex(CHUNKED["sealed_request"])[X25519_HEAD:])
    first, second = reader.take(), reader.take()
    assert first is not None
    assert second is not None
    assert reader.take() is None
    assert reader.final
    plaintext = receiver.open(b"", first) + receiver.open(b"", second) + receiver.open(b"final", reader.rest())
    assert plaintext == bytes.fromhex(CHUNKED["request"])
    opener = ResponseOpener(sender, enc)
    # The vector's response is cut before its content, which Binary HTTP allows and a whole answer here may not be.
    with pytest.raises(TruncatedResponse):
        read(opener, [bytes.fromhex(CHUNKED["sealed_response"])])


# Requests


@pytest.mark.parametrize("length", [0, 1, 800, 16_000, 16_384, 40_000, 100_000])
def test_requests_arrive_whole_however_they_are_cut(length: int) -> None:
    ring = make_ring()
    request = Request("POST", "http", "enclave.invalid", "/x", ((b"a", b"b"),), os.urandom(length))
    body = seal_to(ring.ohttp_keys, request).body
    assert opened(ring, body)[0] == request
    opener = RequestOpener(make_ring())
    for i in range(0, len(body), 977):
        opener.feed(body[i : i + 977], 0.0)
    assert opener.finish(0.0).request == request


def test_requests_of_nearby_sizes_look_the_same() -> None:
    ring = make_ring()
    sizes = {
        len(seal_to(ring.ohttp_keys, Request("GET", "http", "enclave.invalid", "/" + "x" * n)).body) for n in range(900)
    }
    assert len(sizes) == 1


def test_a_request_fed_byte_by_byte_is_the_same() -> None:
    ring = make_ring()
    body = seal_to(ring.ohttp_keys, ASK).body
    opener = RequestOpener(ring)
    for byte in bytewise(body):
        opener.feed(byte, 0.0)
    assert opener.finish(0.0).request == ASK


@functools.cache
def small_request() -> bytes:
    """X25519, two chunks: 30 bytes, then the rest with some padding."""
    ring = make_ring()
    config = parse_configs(ring.ohttp_keys)[1]
    header = bytes([config.key_id]) + bytes.fromhex("002000010002")
    enc, context = setup_sender(KEM_X25519, 2, config.public, request_info(header), entropy=os.urandom)
    message = b"\0\x03GET\x04http\x0fenclave.invalid\x02/x\0\x04text\0" + bytes(20)
    pieces = [message[:30], message[30:40], message[40:]]
    sealed = [seal_chunk(context, piece) for piece in pieces[:2]] + [seal_final_chunk(context, pieces[2])]
    return header + enc + b"".join(sealed)


def test_the_small_request_opens() -> None:
    assert opened(make_ring(), small_request())[0] == Request("GET", "http", "enclave.invalid", "/x", (), b"text")


def refused(body: bytes) -> CloisterError:
    with pytest.raises((ChannelBroken, MalformedMessage)) as caught:
        opened(make_ring(), body)
    return caught.value


def test_every_cut_of_a_request_is_refused() -> None:
    body = small_request()
    for cut in range(len(body)):
        refused(body[:cut])


def test_every_flipped_bit_of_a_request_is_refused() -> None:
    body = small_request()
    for position in range(len(body)):
        flipped = bytearray(body)
        flipped[position] ^= 1 << position % 8
        refused(bytes(flipped))


def test_no_arrangement_of_a_requests_chunks_but_the_right_one_opens() -> None:
    pieces = chunks_of(small_request(), X25519_HEAD)
    head, one, two, final = pieces
    for wrong in ([two, one, final], [one, one, two, final], [one, final], [two, final], [one, two], [final]):
        refused(head + b"".join(wrong))
    refused(small_request() + b"\0")
    refused(small_request() + final)
    # The final chunk dressed as another one, and another one as the final.
    refused(head + one + two + encode_varint(len(final) - 1) + final[1:])
    refused(head + one + b"\0" + two[1:])


def test_crypto_failures_say_the_same() -> None:
    body = small_request()
    pieces = chunks_of(body, X25519_HEAD)
    attempts = [body[:-1], body[:X25519_HEAD], body[:10] + b"\xff" + body[11:], pieces[0] + b"".join(pieces[2:])]
    attempts.append(body[:7] + bytes(32) + body[39:])
    assert len({(type(error), str(error), error.step, error.hint) for error in map(refused, attempts)}) == 1


def test_the_first_chunk_opens_before_the_rest_has_come() -> None:
    ring = make_ring()
    body = small_request()
    opener = RequestOpener(ring)
    first = len(b"".join(chunks_of(body, X25519_HEAD)[:2]))
    opener.feed(body[: first - 1], 0.0)
    assert opener.control is None
    assert opener.unauthenticated > 0
    opener.feed(body[first - 1 : first], 0.0)
    assert opener.control is not None
    assert opener.unauthenticated == 0


def raw_request(ring: KeyRing, message: bytes, *, cut: int = 0) -> bytes:
    config = parse_configs(ring.ohttp_keys)[1]
    header = bytes([config.key_id]) + bytes.fromhex("002000010002")
    enc, context = setup_sender(KEM_X25519, 2, config.public, request_info(header), entropy=os.urandom)
    return header + enc + seal_chunk(context, message[:cut] if cut else message)


@pytest.mark.parametrize(
    "target", [b"\x0fenclave.invalid\x01x", b"\x0bexample.com\x01/", b"\x00\x01/", b"\x10enclave.invalid.\x01/"]
)
def test_another_target_is_refused_at_the_first_chunk(target: bytes) -> None:
    ring = make_ring()
    opener = RequestOpener(ring)
    with pytest.raises(MalformedMessage) as caught:
        opener.feed(raw_request(ring, b"\0\x03GET\x04http" + target), 0.0)
    assert caught.value.step == "target"
    with pytest.raises(WrongUse):
        opener.feed(b"", 0.0)


@pytest.mark.parametrize("length", [1, 16, MAX_CHUNK + 17, 1 << 40])
def test_a_chunk_of_wrong_size_is_refused_by_its_length_alone(length: int) -> None:
    ring = make_ring()
    opener = RequestOpener(ring)
    with pytest.raises(MalformedMessage):
        opener.feed(small_request()[:X25519_HEAD] + encode_varint(length), 0.0)


def test_a_final_chunk_over_the_limit_is_refused_while_it_arrives() -> None:
    opener = RequestOpener(make_ring())
    opener.feed(small_request()[:X25519_HEAD] + b"\0" + bytes(MAX_CHUNK + 16), 0.0)
    with pytest.raises(MalformedMessage):
        opener.feed(b"\0", 0.0)


def test_a_request_over_the_limit_is_refused_as_such() -> None:
    ring = make_ring()
    body = seal_to(ring.ohttp_keys, Request("POST", "http", "enclave.invalid", "/", (), bytes(40_000))).body
    with pytest.raises(MalformedMessage) as caught:
        opened(ring, body, Limits(request_bytes=65_535))
    assert caught.value.step == "size"
    assert len(opened(make_ring(), body, Limits(request_bytes=65_536))[0].content) == 40_000


def test_a_replay_is_refused() -> None:
    ring = make_ring()
    opened(ring, small_request())
    with pytest.raises(Replayed):
        opened(ring, small_request())


def test_a_cut_request_cannot_be_sent_again() -> None:
    ring = make_ring()
    RequestOpener(ring).feed(small_request()[:-1], 0.0)
    with pytest.raises(Replayed):
        opened(ring, small_request())


def test_a_forged_first_chunk_does_not_burn_the_real_request() -> None:
    ring = make_ring()
    with pytest.raises(ChannelBroken):
        opened(ring, small_request()[:50] + bytes(len(small_request()) - 50))
    opened(ring, small_request())


def test_a_key_that_is_not_held_is_told_apart_from_the_header_alone() -> None:
    opener = RequestOpener(make_ring())
    with pytest.raises(KeyUnknown):
        opener.feed(b"\x09" + small_request()[1:7], 0.0)


def test_a_request_sealed_before_a_rotation_opens_after_it() -> None:
    ring = KeyRing(0.0, lifetime=100.0)
    body = seal_to(ring.ohttp_keys, ASK).body
    ring.rotate(50.0)
    opener = RequestOpener(ring)
    opener.feed(body, 99.0)
    assert opener.finish(99.0).request == ASK
    late = RequestOpener(ring)
    with pytest.raises(KeyUnknown):
        late.feed(body, 100.0)


def test_chains_that_share_an_identifier_each_open_what_was_sealed_to_them() -> None:
    """Two groups' numbers are drawn from 128: whoever goes from one to the other may hold two keys of one identifier."""
    first, second = (
        GroupRing.found(0.0, entropy=lambda length: b"\7" if length == 1 else os.urandom(length)) for _ in range(2)
    )
    bodies = [seal_to(ring.ohttp_keys, ASK).body for ring in (first, second)]
    assert bodies[0][:7] == bodies[1][:7]
    second.install(first.secrets, 0.0)
    for body in bodies:
        assert opened(second, body)[0] == ASK
        with pytest.raises(Replayed):
            opened(second, body)
        with pytest.raises(ChannelBroken):
            opened(first if body is bodies[1] else second, body[:-1] + bytes([body[-1] ^ 1]))


def test_an_opener_is_used_once() -> None:
    ring = make_ring()
    opener = RequestOpener(ring)
    opener.feed(small_request(), 0.0)
    opener.finish(0.0)
    with pytest.raises(WrongUse):
        opener.finish(0.0)


# Sealing


def verified(purpose: str, keys: bytes) -> Any:
    return SimpleNamespace(statement=SimpleNamespace(purpose=purpose), ohttp_keys=keys)


def test_seals_only_to_a_statement_that_serves() -> None:
    ring = make_ring()
    sealed = seal_request(verified("serve", ring.ohttp_keys), ASK)
    assert opened(ring, sealed.body)[0] == ASK
    assert sealed.replica == replica_of(ring.ohttp_keys)
    for purpose in ("provision", "key-join", ""):
        with pytest.raises(NotTrusted):
            seal_request(verified(purpose, ring.ohttp_keys), ASK)


def test_seals_to_the_post_quantum_key_when_there_is_one() -> None:
    ring = make_ring()
    assert seal_to(ring.ohttp_keys, ASK).body[1:7].hex() == "647a00010002"
    assert seal_to(x25519_only(ring), ASK).body[1:7].hex() == "002000010002"
    with pytest.raises(NotTrusted):
        seal_to(x25519_only(ring), ASK, require_pq=True)


def test_seals_for_the_enclave_only_and_no_more_than_fits() -> None:
    ring = make_ring()
    with pytest.raises(WrongUse):
        seal_to(ring.ohttp_keys, Request("GET", "https", "example.com", "/"))
    with pytest.raises(WrongUse):
        seal_to(ring.ohttp_keys, Request("POST", "http", "enclave.invalid", "/", (), bytes(32 << 20)))


def test_no_two_sealed_requests_are_alike() -> None:
    ring = make_ring()
    assert seal_to(ring.ohttp_keys, ASK).body != seal_to(ring.ohttp_keys, ASK).body


def test_the_plaintext_is_not_in_the_sealed_body() -> None:
    body = seal_to(make_ring().ohttp_keys, ASK).body
    for words in (b"/v1/chat", b"enclave.invalid", b"application/json", b"{}" * 4):  # too long to be there by chance
        assert words not in body


# Responses


def stream_of(sealer: ResponseSealer) -> list[bytes]:
    events = [b"data: %d\n\n" % number for number in range(3)]
    return [
        sealer.start(200, SSE, stream=True),
        *(sealer.data(event + event_padding(len(event))) for event in events),
        sealer.finish([(b"receipt", b"r")]),
    ]


def test_the_nonce_may_leave_before_there_is_an_answer_and_leaves_once() -> None:
    sealed, sealer = exchange()
    nonce = sealer.begin()
    assert len(nonce) == 32
    assert sealer.begin() == b""
    assert sealed.response.feed(nonce) == []
    head, *rest = read(sealed.response, stream_of(sealer))
    assert head == ResponseHead(200, tuple(SSE))
    assert isinstance(rest[-1], ResponseEnd)


def test_a_stream_sends_one_padded_chunk_per_event() -> None:
    sealed, sealer = exchange()
    sent = stream_of(sealer)
    assert {len(piece) for piece in sent[1:4]} == {2 + 2 + 512 + 16}
    assert len(sent[4]) == 1 + 512 + 16
    head, *rest = read(sealed.response, sent)
    assert head == ResponseHead(200, tuple(SSE))
    assert rest[-1] == ResponseEnd(((b"receipt", b"r"),))
    assert [line for line in content(rest).split(b"\n") if line and not line.startswith(b":")] == [
        b"data: 0",
        b"data: 1",
        b"data: 2",
    ]


@pytest.mark.parametrize("kem", ["xwing", "x25519"])
def test_a_response_fed_byte_by_byte_is_the_same(kem: str) -> None:
    sealed, sealer = exchange(make_ring().ohttp_keys if kem == "xwing" else None)
    sent = b"".join(stream_of(sealer))
    events = read(sealed.response, bytewise(sent))
    assert content(events).count(b"data: ") == 3
    assert isinstance(events[0], ResponseHead)
    assert isinstance(events[-1], ResponseEnd)


@pytest.mark.parametrize("length", [0, 1, 900, 16_382, 16_384, 50_000])
def test_a_whole_response_tells_its_padded_size_only(length: int) -> None:
    sizes = []
    for extra in (0, 1):
        sealed, sealer = exchange()
        body = os.urandom(length - extra if length > 1 else length)
        sent = (
            sealer.start(200, [(b"x", b"y" * (3 - extra))])
            + sealer.data(body[:7])
            + sealer.data(body[7:])
            + sealer.finish()
        )
        assert content(read(sealed.response, [sent])) == body
        sizes.append([len(chunk) for chunk in chunks_of(sent, 32)])
    assert sizes[0] == sizes[1]
    plaintext = sum(len(c) for c in chunks_of(sent, 32)[1:]) - (len(sizes[0]) - 2) * 20 - 17
    assert plaintext & (plaintext - 1) == 0
    assert plaintext >= 1024


def test_padding_can_be_left_out() -> None:
    sealed, sealer = exchange()
    sent = sealer.start(204, []) + sealer.finish(pad=False)
    assert len(sent) < 80
    assert read(sealed.response, [sent]) == [ResponseHead(204, ()), ResponseEnd()]


def test_other_streams_go_out_at_once_when_asked_to() -> None:
    _, sealer = exchange()
    sealer.start(200, [(b"content-type", b"application/x-ndjson")], stream=True)
    assert len(sealer.data(b"{}\n")) > 0


def test_a_long_piece_is_split_at_the_chunks_limit() -> None:
    sealed, sealer = exchange()
    body = os.urandom(50_000)
    sent = sealer.start(200, [*SSE, (b"x", b"y" * 20_000)], stream=True) + sealer.data(body) + sealer.finish()
    assert all(len(chunk) <= 4 + MAX_CHUNK + 16 for chunk in chunks_of(sent, 32))
    assert content(read(sealed.response, [sent])) == body


def small_response() -> tuple[Context, bytes, list[bytes]]:
    """A new client context each time, because opening moves it: head, two events, end."""
    key = X25519Key(b"\x42" * 32)
    enc, client = setup_sender(KEM_X25519, 2, key.public, b"", entropy=lambda _: b"\x43" * 32)
    nonce = b"\x44" * 32
    sealer = ResponseSealer(nonce, response_sequence(setup_receiver(key, 2, enc, b""), enc, nonce))
    return (
        client,
        enc,
        [sealer.start(200, SSE, stream=True), sealer.data(b"a"), sealer.data(b"b"), sealer.finish(pad=False)],
    )


def taken(data: bytes, size: int = 1 << 20) -> tuple[list[ResponseEvent], CloisterError | None]:
    client, enc, _ = small_response()
    opener = ResponseOpener(client, enc)
    events: list[ResponseEvent] = []
    try:
        for i in range(0, len(data), size):
            events += opener.feed(data[i : i + size])
        opener.finish()
    except CloisterError as error:
        return events, error
    return events, None


def never_whole(data: bytes, size: int = 1 << 20) -> CloisterError:
    events, error = taken(data, size)
    assert isinstance(error, (ChannelBroken, MalformedMessage))
    assert b"ab".startswith(content(events))
    return error


def test_the_small_response_opens() -> None:
    events, error = taken(b"".join(small_response()[2]))
    assert error is None
    assert events == [ResponseHead(200, tuple(SSE)), b"a", b"b", ResponseEnd()]


def test_every_cut_of_a_response_is_a_truncation() -> None:
    data = b"".join(small_response()[2])
    for cut in range(len(data)):
        for size in (1, 1 << 20):
            assert isinstance(never_whole(data[:cut], size), TruncatedResponse)


def test_every_flipped_bit_of_a_response_is_an_error() -> None:
    data = b"".join(small_response()[2])
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        never_whole(bytes(flipped))


def test_no_arrangement_of_a_responses_chunks_but_the_right_one_opens() -> None:
    start, one, two, final = small_response()[2]
    for wrong in itertools.chain(
        (p for n in range(4) for p in itertools.permutations((one, two, final), n)),
        [(one, one, two, final), (one, two, two, final), (one, two, final, final), (one, two, final, b"\0")],
    ):
        if wrong != (one, two, final):
            never_whole(start + b"".join(wrong))
    never_whole(start + one + two + encode_varint(len(final) - 1) + final[1:])
    never_whole(start + one + b"\0" + two[1:])
    nonce, head = start[:32], start[32:]
    never_whole(nonce + one + two + final)
    never_whole(nonce + head + head + one + two + final)
    never_whole(head + one + two + final)


def test_data_after_the_end_is_an_error() -> None:
    client, enc, sent = small_response()
    opener = ResponseOpener(client, enc)
    assert opener.feed(b"".join(sent))[-1] == ResponseEnd()
    assert opener.feed(b"") == []
    opener.finish()
    with pytest.raises(MalformedMessage):
        opener.feed(b"\0")
    with pytest.raises(MalformedMessage):
        opener.finish()


def test_after_an_error_the_opener_stays_broken() -> None:
    client, enc, (start, one, two, final) = small_response()
    opener = ResponseOpener(client, enc)
    opener.feed(start)
    with pytest.raises(ChannelBroken):
        opener.feed(two)
    for piece in (one, two, final):
        with pytest.raises(ChannelBroken):
            opener.feed(piece)
    with pytest.raises(ChannelBroken):
        opener.finish()


@pytest.mark.parametrize("message", ["0340c800", "0340c8000161", "0140c80004616263", "0140c8"])
def test_a_final_chunk_without_the_contents_end_is_not_the_end(message: str) -> None:
    client, enc, sent = small_response()
    key, nonce = X25519Key(b"\x42" * 32), sent[0][:32]
    sequence = response_sequence(setup_receiver(key, 2, enc, b""), enc, nonce)
    opener = ResponseOpener(client, enc)
    with pytest.raises((TruncatedResponse, MalformedMessage)):
        read(opener, [nonce + seal_final_chunk(sequence, bytes.fromhex(message))])


def test_another_requests_response_does_not_open() -> None:
    first, sealer = exchange()
    second, _ = exchange()
    sent = b"".join(stream_of(sealer))
    with pytest.raises(ChannelBroken):
        read(second.response, [sent])
    read(first.response, [sent])


def test_a_sealer_keeps_the_order_of_a_response() -> None:
    _, sealer = exchange()
    with pytest.raises(WrongUse):
        sealer.data(b"x")
    sealer.start(200, [])
    with pytest.raises(WrongUse):
        sealer.start(200, [])
    sealer.finish()
    with pytest.raises(WrongUse):
        sealer.finish()
    with pytest.raises(WrongUse):
        sealer.data(b"x")


# Anything at all


@given(st.binary(max_size=300), st.booleans(), st.integers(1, 60))
def test_opening_a_request_raises_nothing_foreign(data: bytes, real_head: bool, size: int) -> None:
    opener = RequestOpener(make_ring())
    body = small_request()[:X25519_HEAD] + data if real_head else data
    with contextlib.suppress(CloisterError):
        for i in range(0, len(body), size):
            opener.feed(body[i : i + size], 0.0)
        opener.finish(0.0)
        pytest.fail("noise was opened")


@given(st.binary(max_size=600), st.integers(1, 60))
def test_opening_a_response_raises_nothing_foreign(data: bytes, size: int) -> None:
    events, error = taken(data, size)
    assert events == []
    assert error is not None


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=700), max_size=6), st.booleans(), st.integers(1, 2000))
def test_any_response_arrives_whole_in_any_pieces(body: list[bytes], stream: bool, size: int) -> None:
    client, enc, sent = small_response()
    nonce = sent[0][:32]
    sealer = ResponseSealer(nonce, response_sequence(setup_receiver(X25519Key(b"\x42" * 32), 2, enc, b""), enc, nonce))
    data = sealer.start(200, [], stream=stream) + b"".join(map(sealer.data, body)) + sealer.finish()
    events = read(ResponseOpener(client, enc), [data[i : i + size] for i in range(0, len(data), size)])
    assert content(events) == b"".join(body)
    assert isinstance(events[-1], ResponseEnd)
