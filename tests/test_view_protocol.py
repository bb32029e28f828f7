"""The packets of the view: to and from envoys, and on the control socket."""

from __future__ import annotations

import json
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.errors import ProtocolError
from interceptor.view import wire
from interceptor.view.protocol import (
    DATA_MAX,
    PATH_MAX,
    REPLY_MAX,
    Add,
    Attr,
    Base,
    List,
    Op,
    Ping,
    Quit,
    Remove,
    decode_attr,
    decode_entries,
    decode_message,
    decode_reply,
    encode_answer,
    encode_message,
    encode_request,
    is_name,
)

ATTR = Attr(stat.S_IFREG | 0o644, 1, 0, 0, 0, 1, 2, 3)
names = st.binary(min_size=1, max_size=255).filter(is_name)


def packed_attr(attr: Attr) -> bytes:
    return struct.pack("=IIIIQqqq", *attr)


def packed_entry(name: bytes, attr: Attr = ATTR, cookie: int = 1) -> bytes:
    return packed_attr(attr) + struct.pack("=QH6x", cookie, len(name)) + name + bytes(-len(name) % 8)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(Op),
    st.sampled_from(Base),
    st.binary(max_size=300).filter(lambda path: b"\0" not in path),
    st.integers(0, 2**63 - 1),
    st.binary(max_size=300),
)
def test_request_has_the_layout_of_envoy_c(
    seq: int, op: Op, base: Base, path: bytes, offset: int, data: bytes
) -> None:
    packet = encode_request(seq, op, base, path, offset=offset, size=7, data=data)
    assert struct.unpack_from("=IBBHIIQ", packet) == (seq, op, base, len(path), 7, 0, offset)
    assert packet[24:] == path + data


@pytest.mark.parametrize(
    ("path", "data", "offset"),
    [
        (b"x" * (PATH_MAX + 1), b"", 0),
        (b"a\0b", b"", 0),
        (b"x", bytes(DATA_MAX + 1), 0),
        (b"x", b"", -1),
        (b"", b"", 1 << 64),
    ],
)
def test_request_that_does_not_fit_is_refused(path: bytes, data: bytes, offset: int) -> None:
    with pytest.raises(ProtocolError):
        encode_request(1, Op.WRITE, Base.PROC, path, data=data, offset=offset)


def test_reply_carries_everything_the_envoy_said() -> None:
    reply = decode_reply(struct.pack("=IiQ", 9, 22, 5) + b"data")
    assert (reply.seq, reply.error, reply.value, reply.data) == (9, 22, 5, b"data")


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        bytes(15),
        bytes(REPLY_MAX + 1),
        struct.pack("=IiQ", 1, -1, 0),
        struct.pack("=IiQ", 1, 1000, 0),  # libfuse would refuse it, and the caller would wait for ever
    ],
)
def test_malformed_reply_is_refused(packet: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_reply(packet)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        packed_attr(ATTR)[:-1],
        packed_attr(ATTR) + b"\0",
        packed_attr(ATTR._replace(mode=stat.S_IFCHR | 0o666)),
        packed_attr(ATTR._replace(mode=0o644)),
        packed_attr(ATTR._replace(size=1 << 63)),
    ],
)
def test_attributes_that_the_view_never_shows_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_attr(data)


@given(st.lists(st.tuples(names, st.integers(1, 2**63 - 1)), max_size=20))
def test_entries_come_back_as_they_were_packed(entries: list[tuple[bytes, int]]) -> None:
    data = b"".join(packed_entry(name, cookie=cookie) for name, cookie in entries)
    assert [(e.name, e.attr, e.cookie) for e in decode_entries(data)] == [(n, ATTR, c) for n, c in entries]


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0", b"x" * 256])
def test_entry_with_an_impossible_name_is_refused(name: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(decode_entries(packed_entry(name)))


@pytest.mark.parametrize("cookie", [0, 1 << 63])
def test_entry_with_an_impossible_cookie_is_refused(cookie: int) -> None:
    with pytest.raises(ProtocolError):
        list(decode_entries(packed_entry(b"name", cookie=cookie)))


@given(st.binary(max_size=500))
def test_any_bytes_as_entries_are_either_refused_or_sound(data: bytes) -> None:
    try:
        entries = list(decode_entries(data))
    except ProtocolError:
        return
    assert all(is_name(entry.name) for entry in entries)


@pytest.mark.parametrize(
    "message",
    [Add("web-1", 100000, 100000, 5), Remove("web-1"), List(), Ping(), Quit()],
    ids=lambda m: type(m).__name__,
)
def test_control_message_survives_the_socket(message: Add | Remove | List | Ping | Quit) -> None:
    packet = encode_message(message)
    assert json.loads(packet)["op"] == type(message).__name__.lower()
    assert decode_message(packet) == message


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"nonsense",
        b"\xff",
        b"[]",
        b'{"op":"unknown"}',
        b'{"op":"remove"}',
        b'{"op":"remove","id":"a/b"}',
        b'{"op":"remove","id":".."}',
        b'{"op":"remove","id":"."}',
        b'{"op":"remove","id":""}',
        b'{"op":"remove","id":"a\\n"}',
        b'{"op":"remove","id":"a","more":1}',
        b'{"op":"add","id":"a","uid":-1,"gid":0,"created_ns":0}',
        b'{"op":"add","id":"a","uid":4294967295,"gid":0,"created_ns":0}',
        b'{"op":"add","id":"a","uid":0,"gid":0}',
    ],
)
def test_malformed_control_message_is_refused(packet: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_message(packet)


@given(st.binary(max_size=200))
def test_any_bytes_on_the_control_socket_are_a_message_or_refused(packet: bytes) -> None:
    try:
        message = decode_message(packet)
    except ProtocolError:
        return
    assert isinstance(message, Add | Remove | List | Ping | Quit)


def test_answers_say_whether_it_worked() -> None:
    assert json.loads(encode_answer()) == {"ok": True}
    assert json.loads(encode_answer(containers={"a": True})) == {"ok": True, "containers": {"a": True}}
    assert json.loads(encode_answer(n=7)) == {"ok": True, "n": 7}
    assert json.loads(encode_answer("no container a")) == {"ok": False, "error": "no container a"}


def test_the_init_of_a_kernel_without_the_second_flags_is_answered() -> None:
    """Up to Linux 5.16 it is four bytes shorter (struct fuse_init_in)."""
    answered = wire.init(struct.pack("=IIII", 7, 32, 131072, 0xFFFFFFFF))
    assert struct.unpack_from("=II", answered) == (7, 32)
    assert len(answered) == 64
    with pytest.raises(ValueError, match=r"7\.31"):
        wire.init(struct.pack("=IIII", 7, 31, 131072, 0))
