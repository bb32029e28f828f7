"""A child's network: nothing, its loopback, or a veth pair to the host. By rtnetlink, through pyroute2."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, field
from typing import Literal

from interceptor.errors import ContainerError, InterceptorError

_IFNAMSIZ = 15


@dataclass(frozen=True)
class Veth:
    """A veth pair: ``name`` inside with ``address``, ``host_name`` outside with ``host_address``.

    Addresses are written with their prefix length (``10.77.0.2/30``); IPv4 or IPv6, both ends alike.
    """

    address: str
    host_address: str
    name: str = "eth0"
    host_name: str = field(default_factory=lambda: f"ix{secrets.token_hex(4)}")

    def __post_init__(self) -> None:
        for address in (self.address, self.host_address):
            try:
                ipaddress.ip_interface(address)
            except ValueError as error:
                raise InterceptorError(f"veth address: {error}") from None
        for name in (self.name, self.host_name):
            if not 0 < len(name) <= _IFNAMSIZ:
                raise InterceptorError(
                    f"network interface name {name!r}: 1 to {_IFNAMSIZ} characters are allowed"
                )


#: ``none``: a network namespace with its loopback down. ``loopback``: up.
Network = Literal["none", "loopback"] | Veth


def prepare(network: Network) -> None:
    """Import in the parent what a forked child will use: its own root filesystem need not have it."""
    if network != "none":
        import pyroute2  # noqa: F401


def configure_outside(network: Network, pid: int) -> None:
    """The host's half: make the pair, give one end to the network namespace of ``pid``. Raises `ContainerError`.

    Nothing is left to be undone: the pair goes with the namespace of either end.
    """
    if not isinstance(network, Veth):
        return
    from pyroute2 import IPRoute, NetlinkError

    try:
        with IPRoute() as route:
            route.link(
                "add",
                ifname=network.host_name,
                kind="veth",
                peer={"ifname": network.name, "net_ns_pid": pid},
            )
            _bring_up(route, network.host_name, network.host_address)
    except NetlinkError as error:
        raise ContainerError(f"cannot make the veth pair {network.host_name}: {error}") from None


def configure_inside(network: Network) -> None:
    """The child's half, run by a process in its network namespace."""
    if network == "none":
        return
    from pyroute2 import IPRoute

    with IPRoute() as route:
        _bring_up(route, "lo")
        if isinstance(network, Veth):
            _bring_up(route, network.name, network.address)
            gateway = str(ipaddress.ip_interface(network.host_address).ip)
            route.route("add", dst="default", gateway=gateway)


def _bring_up(route, name: str, address: str | None = None) -> None:  # type: ignore[no-untyped-def]
    (index,) = route.link_lookup(ifname=name)
    if address is not None:
        interface = ipaddress.ip_interface(address)
        route.addr("add", index=index, address=str(interface.ip), prefixlen=interface.network.prefixlen)
    route.link("set", index=index, state="up")
