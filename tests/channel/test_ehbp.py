"""Opened here: what EHBP's stock client, `tinfoil-ehbp`, seals; and the other way round."""

import os

import pytest
from ehbp import AEADDecryptFailedError, ServerIdentity, SessionRecoveryToken
from ehbp.identity import REQUEST_FRAME_SIZE

from cloister.channel.ehbp import MAX_FRAME, FrameReader, OpenedBody, RequestOpener, ResponseSealer, parse_enc
from cloister.channel.hpke import AEAD_AES_256_GCM, KEM_X25519, TAG_LENGTH, setup_sender
from cloister.channel.keys import KeyRing
from cloister.channel.limits import Limits
from cloister.errors import ChannelBroken, KeyUnknown, MalformedMessage, Replayed, WrongUse

CONTENT = os.urandom(3 * REQUEST_FRAME_SIZE + 5)  # four frames


@pytest.fixture
def ring() -> KeyRing:
    return KeyRing(0.0, ehbp=True)


def sealed(ring: KeyRing, content: bytes = CONTENT) -> tuple[bytes, bytes, SessionRecoveryToken]:
    config = ring.ehbp_config
    assert config is not None
    request = ServerIdentity.unmarshal_public_config(config).encrypt_request_body(content)
    return request.encapsulated_key, request.body, request.token


def by_hand(ring: KeyRing, *pieces: bytes) -> tuple[bytes, bytes]:
    key = ring.ehbp_key
    assert key is not None
    enc, context = setup_sender(KEM_X25519, AEAD_AES_256_GCM, key, b"ehbp request", entropy=os.urandom)
    return enc, b"".join(framed(context.seal(b"", piece)) for piece in pieces)


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def frames(body: bytes) -> list[bytes]:
    found = []
    while body:
        end = 4 + int.from_bytes(body[:4], "big")
        found.append(body[:end])
        body = body[end:]
    return found


def opened(ring: KeyRing, enc: bytes, body: bytes, *, step: int = 1 << 30, now: float = 0.0) -> OpenedBody:
    opener = RequestOpener(ring, enc)
    for at in range(0, len(body), step):
        opener.feed(body[at : at + step], now)
    return opener.finish(now)


@pytest.mark.parametrize("step", [1, 3, 70_000, 1 << 30])
def test_opens_what_the_stock_client_seals_in_whatever_parts_it_comes(ring: KeyRing, step: int) -> None:
    content = CONTENT if step > 3 else b"short"
    enc, body, _ = sealed(ring, content)
    assert opened(ring, enc, body, step=step).content == content


def test_the_stock_client_opens_what_is_sealed_here(ring: KeyRing) -> None:
    enc, body, token = sealed(ring)
    response = opened(ring, enc, body).response
    answer = response.start(200, ()) + response.data(b"one") + response.data(16 * CONTENT) + response.finish()
    assert token.decrypt_response_body(response.nonce, answer) == b"one" + 16 * CONTENT
    assert all(len(frame) <= MAX_FRAME + 4 for frame in frames(answer))
    with pytest.raises(AEADDecryptFailedError):
        token.decrypt_response_body(response.nonce, b"".join(frames(answer)[1:]))


def test_two_answers_have_two_nonces(ring: KeyRing) -> None:
    nonces = {opened(ring, *sealed(ring)[:2]).response.nonce for _ in range(2)}
    assert [len(nonce) for nonce in nonces] == [32, 32]


def test_nothing_of_a_request_is_given_out_before_its_end(ring: KeyRing) -> None:
    enc, body, _ = sealed(ring)
    opener = RequestOpener(ring, enc)
    opener.feed(body[:-1], 0.0)
    with pytest.raises(ChannelBroken):
        opener.finish(0.0)


@pytest.mark.parametrize("at", [4, 20, 40])
def test_a_first_frame_that_does_not_open_may_be_of_another_key(ring: KeyRing, at: int) -> None:
    enc, body, _ = sealed(ring, b"x" * 30)
    with pytest.raises(KeyUnknown):
        opened(ring, enc, body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])


def test_a_changed_encapsulated_key_opens_nothing(ring: KeyRing) -> None:
    enc, body, _ = sealed(ring)
    for wrong in (bytes([enc[0] ^ 1]) + enc[1:], bytes(32)):
        with pytest.raises(KeyUnknown):
            opened(ring, wrong, body)


def test_a_later_frame_that_was_changed_left_out_swapped_or_repeated_is_refused(ring: KeyRing) -> None:
    enc, body, _ = sealed(ring)
    one, two, three, four = frames(body)
    changed = two[:-1] + bytes([two[-1] ^ 1])
    for wrong in (
        (one, changed, three, four),
        (one, three, four),
        (one, three, two, four),
        (one, two, two, three, four),
    ):
        with pytest.raises(ChannelBroken) as caught:
            opened(forgetful(ring), enc, b"".join(wrong))
        assert not isinstance(caught.value, KeyUnknown | Replayed)


def forgetful(ring: KeyRing) -> KeyRing:
    """The same keys, with nothing remembered."""
    for epoch in ring._epochs:
        epoch.seen.clear()
    return ring


def test_a_replay_is_refused_whatever_its_body(ring: KeyRing) -> None:
    enc, body, _ = sealed(ring)
    opened(ring, enc, body)
    with pytest.raises(Replayed):
        opened(ring, enc, body)
    with pytest.raises(Replayed):
        opened(ring, enc, frames(body)[0])


def test_what_never_opened_is_not_remembered(ring: KeyRing) -> None:
    enc, body, _ = sealed(ring)
    with pytest.raises(KeyUnknown):
        opened(ring, enc, body[:9] + bytes([body[9] ^ 1]) + body[10:])
    assert opened(ring, enc, body).content == CONTENT


def test_the_key_before_a_rotation_opens_until_it_dies(ring: KeyRing) -> None:
    old, late = sealed(ring), sealed(ring)
    ring.rotate(1800.0)
    assert opened(ring, *sealed(ring)[:2], now=1801.0).content == CONTENT
    assert opened(ring, *old[:2], now=3599.0).content == CONTENT
    with pytest.raises(KeyUnknown):
        opened(ring, *late[:2], now=3600.0)


def test_a_key_of_the_sealed_channel_does_not_open_it(ring: KeyRing) -> None:
    """The two protocols share no key, so that neither can be played against the other."""
    ohttp = ring._epochs[-1].configs[1].public
    request = ServerIdentity.from_public_key_bytes(ohttp).encrypt_request_body(b"x")
    with pytest.raises(KeyUnknown):
        opened(ring, request.encapsulated_key, request.body)


def test_a_frame_of_one_mebibyte_opens_and_a_larger_one_is_refused_before_it_is_stored(ring: KeyRing) -> None:
    enc, body = by_hand(ring, bytes(MAX_FRAME - TAG_LENGTH))
    assert len(opened(ring, enc, body).content) == MAX_FRAME - TAG_LENGTH
    reader = FrameReader()
    reader.feed((MAX_FRAME + 1).to_bytes(4, "big"))
    with pytest.raises(MalformedMessage):
        reader.take()
    enc, body = by_hand(ring, bytes(MAX_FRAME - TAG_LENGTH + 1))
    with pytest.raises(MalformedMessage):
        RequestOpener(ring, enc).feed(body[:4], 0.0)


@pytest.mark.parametrize("length", [1, TAG_LENGTH])
def test_a_frame_that_holds_nothing_is_refused(ring: KeyRing, length: int) -> None:
    with pytest.raises(MalformedMessage):
        RequestOpener(ring, bytes(32)).feed(framed(bytes(length)), 0.0)


def test_frames_of_no_bytes_are_passed_over(ring: KeyRing) -> None:
    enc, body = by_hand(ring, b"one", b"two")
    one, two = frames(body)
    empty = bytes(4)
    assert opened(ring, enc, empty + one + empty + empty + two + empty).content == b"onetwo"


@pytest.mark.parametrize("body", [b"", bytes(4), bytes(3)])
def test_a_request_without_a_frame_proves_nothing_and_is_refused(ring: KeyRing, body: bytes) -> None:
    enc, _, _ = sealed(ring)
    with pytest.raises(ChannelBroken):
        opened(ring, enc, body)


def test_a_request_over_the_limit_is_refused(ring: KeyRing) -> None:
    enc, body, _ = sealed(ring)
    opener = RequestOpener(ring, enc, limits=Limits(request_bytes=len(CONTENT) - 1))
    with pytest.raises(MalformedMessage) as caught:
        opener.feed(body, 0.0)
    assert caught.value.step == "size"


def test_after_an_error_or_its_end_nothing_more_is_taken(ring: KeyRing) -> None:
    enc, body, _ = sealed(ring)
    opener = RequestOpener(ring, enc)
    with pytest.raises(KeyUnknown):
        opener.feed(framed(bytes(17)), 0.0)
    with pytest.raises(WrongUse):
        opener.feed(body, 0.0)
    with pytest.raises(WrongUse):
        opener.finish(0.0)


def test_counts_what_no_frame_vouches_for(ring: KeyRing) -> None:
    enc, body, _ = sealed(ring, b"x")
    opener = RequestOpener(ring, enc)
    opener.feed(body[:10], 0.0)
    assert opener.unauthenticated == 10
    opener.feed(body[10:], 0.0)
    assert opener.unauthenticated == 0


def test_reads_the_encapsulated_key_once_and_in_hexadecimal() -> None:
    assert parse_enc([b"aB" * 32]) == b"\xab" * 32
    for values in ([], [b"ab" * 32] * 2, [b"ab" * 31], [b"ab" * 33], [b"zz" * 32], [b" " + b"a" * 63], [b""]):
        with pytest.raises(MalformedMessage):
            parse_enc(values)


def test_an_empty_answer_is_no_frame() -> None:
    assert ResponseSealer.data(ResponseSealer(bytes(32), None), b"") == b""  # type: ignore[arg-type]
