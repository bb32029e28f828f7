"""The library's networks: none, loopback, a veth pair."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from interceptor.errors import ContainerError, InterceptorError
from interceptor.library import Interceptor, Veth

pytestmark = pytest.mark.root


def _interfaces() -> dict[str, str]:
    return {
        name: Path(f"/sys/class/net/{name}/operstate").read_text().strip()
        for name in os.listdir("/sys/class/net")
    }


def _flags(name: str) -> int:
    return int(Path(f"/sys/class/net/{name}/flags").read_text(), 16)


def test_loopback_is_up_unless_no_network_is_wanted(real_interceptor: Interceptor) -> None:
    iff_up = 1
    with real_interceptor.spawn() as child:
        assert child.call(_interfaces).keys() == {"lo"}
        assert child.call(_flags, "lo") & iff_up
    with real_interceptor.spawn(network="none") as child:
        assert child.call(_interfaces).keys() == {"lo"}
        assert not child.call(_flags, "lo") & iff_up


def test_a_veth_pair_carries_data_both_ways(real_interceptor: Interceptor) -> None:
    veth = Veth(address="10.213.77.2/30", host_address="10.213.77.1/30")

    def echo_once(ready: int) -> bytes:
        with socket.create_server(("10.213.77.2", 7777)) as server:
            os.write(ready, b"!")
            connection, _ = server.accept()
            with connection:
                data = connection.recv(100)
                connection.sendall(data.upper())
                return data

    read, write = os.pipe()
    try:
        with real_interceptor.spawn(network=veth) as child:
            assert veth.host_name in _interfaces()
            with child.start(echo_once, write, pass_fds=[write]) as process:
                assert os.read(read, 1) == b"!"
                with socket.create_connection(("10.213.77.2", 7777), timeout=30) as connection:
                    connection.sendall(b"hello")
                    assert connection.recv(100) == b"HELLO"
                assert process.wait().value == b"hello"
            assert b"default via 10.213.77.1" in child.run(["ip", "route"]).stdout
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Veth("nonsense", "10.0.0.1/30"), "veth address"),
        (lambda: Veth("10.0.0.2/30", "10.0.0.1/30", name="x" * 16), "1 to 15"),
    ],
)
def test_a_veth_that_cannot_be_is_refused(make: Callable[[], Veth], message: str) -> None:
    with pytest.raises(InterceptorError, match=message):
        make()


def test_a_veth_whose_name_is_taken_leaves_nothing(real_interceptor: Interceptor) -> None:
    with pytest.raises(ContainerError, match="veth pair lo"):
        real_interceptor.spawn(network=Veth("10.213.77.2/30", "10.213.77.1/30", host_name="lo"))


# ---- beginning and end -------------------------------------------------------------------------------------
