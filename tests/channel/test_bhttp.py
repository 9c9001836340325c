import contextlib
import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.channel.vectors import (
    BHTTP_REQUEST_INDETERMINATE,
    BHTTP_REQUEST_KNOWN,
    BHTTP_RESPONSE_INDETERMINATE,
    BHTTP_RESPONSE_KNOWN,
)

from cloister.channel.bhttp import (
    Informational,
    Request,
    RequestDecoder,
    ResponseDecoder,
    ResponseEnd,
    ResponseEvent,
    ResponseHead,
    encode_content,
    encode_request,
    encode_response_end,
    encode_response_head,
    encode_varint,
)
from cloister.channel.limits import Limits
from cloister.errors import CloisterError, MalformedMessage

LIMITS = Limits()
EXAMPLE = Request(
    "GET",
    "https",
    "",
    "/hello.txt",
    (
        (b"user-agent", b"curl/7.16.3 libcurl/7.16.3 OpenSSL/0.9.7l zlib/1.2.3"),
        (b"host", b"www.example.com"),
        (b"accept-language", b"en, mi"),
    ),
)
POST = Request(
    "POST", "http", "enclave.invalid", "/v1/x?q=1", ((b"a", b"1"), (b"a", b"")), b"body" * 50, ((b"t", b"end"),)
)


def read_request(pieces: Iterable[bytes], limits: Limits = LIMITS) -> Request:
    decoder = RequestDecoder(limits)
    for piece in pieces:
        decoder.feed(piece)
    return decoder.finish()


def read_response(pieces: Iterable[bytes], limits: Limits = LIMITS) -> tuple[list[ResponseEvent], bytes, bool]:
    """The head and the end, the content joined, and whether the content's end was there."""
    decoder = ResponseDecoder(limits)
    events = [event for piece in pieces for event in decoder.feed(piece)] + decoder.finish()
    content = b"".join(event for event in events if isinstance(event, bytes))
    return [event for event in events if not isinstance(event, bytes)], content, decoder.content_ended


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def field(name: bytes, value: bytes) -> bytes:
    return encode_varint(len(name)) + name + encode_varint(len(value)) + value


def indeterminate_request(request: Request, piece: int = 7) -> bytes:
    strings = (request.method, request.scheme, request.authority, request.path)
    head = b"\x02" + b"".join(encode_varint(len(value)) + value.encode() for value in strings)
    headers = b"".join(field(*line) for line in request.headers) + b"\0"
    chunks = (request.content[i : i + piece] for i in range(0, len(request.content), piece))
    trailers = b"".join(field(*line) for line in request.trailers) + b"\0"
    return head + headers + b"".join(encode_varint(len(c)) + c for c in chunks) + b"\0" + trailers


@pytest.mark.parametrize("number", [0, 63, 64, 16383, 16384, (1 << 30) - 1, 1 << 30, (1 << 62) - 1])
def test_varints_are_the_shortest(number: int) -> None:
    encoded = encode_varint(number)
    assert len(encoded) == (1 if number < 64 else 2 if number < 16384 else 4 if number < 1 << 30 else 8)
    assert int.from_bytes(encoded, "big") & ((1 << (8 * len(encoded) - 2)) - 1) == number


def test_a_number_too_large_is_refused() -> None:
    with pytest.raises(MalformedMessage):
        encode_varint(1 << 62)


@pytest.mark.parametrize("vector", [BHTTP_REQUEST_KNOWN, BHTTP_REQUEST_INDETERMINATE], ids=["known", "indeterminate"])
def test_reads_rfc9292s_requests_however_they_arrive(vector: str) -> None:
    data = bytes.fromhex(vector)
    assert read_request([data]) == EXAMPLE
    assert read_request(bytewise(data)) == EXAMPLE


def test_writes_rfc9292s_known_length_request_and_zeros() -> None:
    vector = bytes.fromhex(BHTTP_REQUEST_KNOWN)
    assert encode_request(EXAMPLE) == vector + bytes(1024 - len(vector))


def test_an_indeterminate_request_may_lose_its_trailing_zeros() -> None:
    data = bytes.fromhex(BHTTP_REQUEST_INDETERMINATE)
    for cut in range(13):
        assert read_request([data[: len(data) - cut]]) == EXAMPLE
    with pytest.raises(MalformedMessage):
        read_request([data[:-13]])


def test_reads_rfc9292s_responses_however_they_arrive() -> None:
    data = bytes.fromhex(BHTTP_RESPONSE_INDETERMINATE)
    events, content, ended = read_response([data])
    assert (events, content, ended) == read_response(bytewise(data))
    head, end = events
    assert isinstance(head, ResponseHead)
    assert head.status == 200
    assert head.headers[-1] == (b"content-type", b"text/plain")
    assert head.informational == (
        Informational(102, ((b"running", b'"sleep 15"'),)),
        Informational(
            103,
            (
                (b"link", b"</style.css>; rel=preload; as=style"),
                (b"link", b"</script.js>; rel=preload; as=script"),
            ),
        ),
    )
    assert end == ResponseEnd()
    assert content == b"Hello World! My content includes a trailing CRLF.\r\n"
    assert ended
    known = bytes.fromhex(BHTTP_RESPONSE_KNOWN)
    expected = (
        [ResponseHead(200, ()), ResponseEnd(((b"trailer", b"text"),))],
        b"This content contains CRLF.\r\n",
        True,
    )
    assert read_response([known]) == read_response(bytewise(known)) == expected


def test_reads_known_length_informational_responses() -> None:
    hints = field(b"link", b"x")
    data = b"\x01" + encode_varint(103) + encode_varint(len(hints)) + hints + encode_varint(204) + b"\0\0\0"
    events, content, ended = read_response(bytewise(data))
    assert events == [ResponseHead(204, (), (Informational(103, ((b"link", b"x"),)),)), ResponseEnd()]
    assert (content, ended) == (b"", True)


@pytest.mark.parametrize("data", ["0140c8", "0340c8", "0140c800", "0340c800"])
def test_a_response_cut_before_empty_sections_is_read_but_not_taken_for_ended(data: str) -> None:
    events, content, ended = read_response([bytes.fromhex(data)])
    assert events == [ResponseHead(200, ()), ResponseEnd()]
    assert (content, ended) == (b"", False)


@pytest.mark.parametrize("request_", [EXAMPLE, POST])
def test_requests_survive_both_framings(request_: Request) -> None:
    known, indeterminate = encode_request(request_), indeterminate_request(request_)
    assert read_request([known]) == read_request(bytewise(known)) == request_
    assert read_request([indeterminate]) == read_request(bytewise(indeterminate + bytes(9))) == request_


@pytest.mark.parametrize("framing", ["known", "indeterminate"])
def test_every_cut_inside_a_section_is_an_error(framing: str) -> None:
    data = encode_request(POST).rstrip(b"\0") if framing == "known" else indeterminate_request(POST)
    control = len(b"\x00\x04POST\x04http\x0fenclave.invalid\x09/v1/x?q=1")
    headers = control + (1 if framing == "known" else 0) + len(field(b"a", b"1") + field(b"a", b""))
    headers += 0 if framing == "known" else 1
    trailers = len(data) - len(field(b"t", b"end")) - 1
    whole = {control, headers, trailers, len(data)}
    for cut in range(len(data) + 1):
        if cut in whole:
            read_request([data[:cut]])
        else:
            with pytest.raises(MalformedMessage):
                read_request([data[:cut]])


def test_control_data_is_known_before_the_headers_have_come() -> None:
    decoder = RequestDecoder(LIMITS)
    data = encode_request(POST)
    end = data.index(b"/v1/x?q=1") + 9
    decoder.feed(data[: end - 1])
    assert decoder.control is None
    decoder.feed(data[end - 1 : end])
    assert decoder.control is not None
    assert decoder.control.path == "/v1/x?q=1"


@pytest.mark.parametrize("data", [encode_request(EXAMPLE), bytes.fromhex(BHTTP_REQUEST_INDETERMINATE)])
def test_padding_must_be_zeros(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        read_request([data + b"\x01"])
    with pytest.raises(MalformedMessage):
        read_request([data, b"\0", b"\x01\0"])


@pytest.mark.parametrize("framing", [1, 3, 4, 63])
def test_rejects_another_kinds_framing(framing: int) -> None:
    with pytest.raises(MalformedMessage):
        read_request([encode_varint(framing) + encode_request(EXAMPLE)[1:]])
    with pytest.raises(MalformedMessage):
        read_response([encode_varint(framing ^ 1 if framing < 4 else framing) + b"\x40\xc8"])


@pytest.mark.parametrize("status", [0, 99, 600, 1 << 20])
def test_rejects_a_status_that_is_none(status: int) -> None:
    with pytest.raises(MalformedMessage):
        read_response([b"\x01" + encode_varint(status)])
    with pytest.raises(MalformedMessage):
        encode_response_head(status, ())


def test_an_informational_response_alone_is_no_response() -> None:
    with pytest.raises(MalformedMessage):
        read_response([b"\x01" + encode_varint(100) + b"\0"])


BAD_FIELDS = [
    (b"", b"x"),
    (b"A", b"x"),
    (b":path", b"x"),
    (b"a b", b"x"),
    (b"a", b"x\r\ny"),
    (b"a", b"\0"),
    (b"a", b" x"),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_rejects_fields_that_http_does_not_allow(name: bytes, value: bytes) -> None:
    line = field(name, value)
    with pytest.raises(MalformedMessage):
        read_response([b"\x01\x40\xc8" + encode_varint(len(line)) + line])
    if name:  # an empty name ends an indeterminate section
        with pytest.raises(MalformedMessage):
            read_response([b"\x03\x40\xc8" + line + b"\0\0\0"])


def test_writing_lowers_names_strips_values_and_refuses_the_rest() -> None:
    assert encode_response_head(200, [(b"X-Y", b" v\t")]) == b"\x03\x40\xc8\x03x-y\x01v\0"
    for name, value in [(b"", b"x"), (b"a b", b"x"), (b"a", b"x\ny"), (b"a", b"x\0y")]:
        with pytest.raises(MalformedMessage):
            encode_response_head(200, [(name, value)])


@pytest.mark.parametrize(
    "control",
    [
        ("GE T", "http", "h", "/"),
        ("", "http", "h", "/"),
        ("GET", "", "h", "/"),
        ("GET", "http", "h", "/ "),
        ("GET", "http", "h", "/\ud800é"),
    ],
)
def test_rejects_control_data_that_http_does_not_allow(control: tuple[str, str, str, str]) -> None:
    with pytest.raises(MalformedMessage):
        encode_request(Request(*control))
    strings = [value.encode("utf-8", "surrogatepass") for value in control]
    with pytest.raises(MalformedMessage):
        read_request([b"\0" + b"".join(encode_varint(len(value)) + value for value in strings)])


def test_a_header_section_over_its_cap_is_refused_before_it_is_stored() -> None:
    limits = Limits(header_section_bytes=100)
    start = b"\x01\x40\xc8"
    with pytest.raises(MalformedMessage) as caught:
        ResponseDecoder(limits).feed(start + encode_varint(101))
    assert caught.value.step == "size"
    decoder = ResponseDecoder(limits)
    decoder.feed(b"\x03\x40\xc8" + field(b"a", b"x" * 40))
    with pytest.raises(MalformedMessage):
        decoder.feed(b"\x01a" + encode_varint(60))
    with pytest.raises(MalformedMessage):
        RequestDecoder(limits).feed(b"\0" + encode_varint(101))
    informational = ResponseDecoder(limits)
    with pytest.raises(MalformedMessage):
        for _ in range(60):
            informational.feed((b"\x01" if _ == 0 else b"") + encode_varint(100) + b"\0")


def test_after_an_error_or_the_end_nothing_more_is_taken() -> None:
    decoder = ResponseDecoder(LIMITS)
    with pytest.raises(MalformedMessage):
        decoder.feed(b"\x09")
    with pytest.raises(MalformedMessage):
        decoder.feed(b"\x01\x40\xc8")
    with pytest.raises(MalformedMessage):
        decoder.finish()
    done = RequestDecoder(LIMITS)
    done.feed(encode_request(EXAMPLE))
    done.finish()
    with pytest.raises(MalformedMessage):
        done.feed(b"\0")
    with pytest.raises(MalformedMessage):
        done.finish()


def test_content_comes_out_as_it_arrives() -> None:
    decoder = ResponseDecoder(LIMITS)
    decoder.feed(encode_response_head(200, ()))
    assert decoder.feed(b"\x0ahal") == [b"hal"]
    assert decoder.feed(b"f of it") == [b"f of it"]
    assert not decoder.content_ended
    decoder.feed(encode_response_end())
    assert decoder.content_ended


tokens = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12).map(str.encode)
values = st.binary(max_size=30).map(lambda v: v.translate(None, b"\0\r\n").strip(b" \t"))
fields = st.lists(st.tuples(tokens, values), max_size=4).map(tuple)
requests = st.builds(
    Request,
    st.sampled_from(["GET", "POST"]),
    st.just("https"),
    st.sampled_from(["", "enclave.invalid"]),
    st.text("abc/?=%", max_size=20),
    fields,
    st.binary(max_size=300),
    fields,
)


@given(requests, st.lists(st.integers(0, 400), max_size=6), st.integers(1, 99))
def test_any_request_survives_any_arrival(request_: Request, cuts: list[int], piece: int) -> None:
    for data in (encode_request(request_), indeterminate_request(request_, piece)):
        marks = [0, *sorted(cuts), len(data)]
        assert read_request([data[a:b] for a, b in itertools.pairwise(marks)]) == request_


@given(st.integers(200, 599), fields, st.lists(st.binary(max_size=100), max_size=5), fields)
def test_any_response_survives_byte_by_byte(
    status: int, headers: tuple[tuple[bytes, bytes], ...], body: list[bytes], trailers: tuple[tuple[bytes, bytes], ...]
) -> None:
    data = encode_response_head(status, headers) + b"".join(map(encode_content, body)) + encode_response_end(trailers)
    expected = ([ResponseHead(status, headers), ResponseEnd(trailers)], b"".join(body), True)
    assert read_response([data]) == read_response(bytewise(data)) == expected


def mutated(data: bytes, edits: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for position, value in edits:
        changed[position % len(changed)] = value
    return bytes(changed)


edits = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4)


@given(st.binary(max_size=200) | edits.map(lambda e: mutated(indeterminate_request(POST), e)))
def test_decoding_raises_nothing_foreign_and_arrival_does_not_matter(data: bytes) -> None:
    outcomes = []
    for pieces in ([data], bytewise(data)):
        outcome: object = None
        with contextlib.suppress(CloisterError):
            outcome = read_request(pieces)
        outcomes.append(outcome)
    assert outcomes[0] == outcomes[1]


@given(
    st.binary(max_size=200).map(lambda d: b"\x03\x40\xc8" + d)
    | edits.map(lambda e: mutated(bytes.fromhex(BHTTP_RESPONSE_INDETERMINATE), e))
    | edits.map(lambda e: mutated(bytes.fromhex(BHTTP_RESPONSE_KNOWN), e))
)
def test_decoding_responses_raises_nothing_foreign_and_arrival_does_not_matter(data: bytes) -> None:
    outcomes = []
    for pieces in ([data], bytewise(data)):
        outcome: object = None
        with contextlib.suppress(CloisterError):
            outcome = read_response(pieces)
        outcomes.append(outcome)
    assert outcomes[0] == outcomes[1]
