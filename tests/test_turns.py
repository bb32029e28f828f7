"""A guard whose messages take long to answer does not keep the other containers waiting."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, cast

from interceptor._native import ffi, lib
from interceptor.guards.link import Facts, socket_pair
from interceptor.guards.supervise import MESSAGES_A_TURN, TURN_S, Supervisor
from interceptor.kernel.fd import OwnedFd

MESSAGES = MESSAGES_A_TURN


def _supervisor(taken: Callable[[int], None]) -> Supervisor:
    """One that is told of what has been taken, and of nothing else."""
    nothing = cast(Any, lambda *_: None)
    return Supervisor(
        "turns",
        keeper=nothing,
        config={},
        userns=nothing,
        journal=nothing,
        facts=lambda: Facts(0, 0, (), (), ()),
        answer=nothing,
        taken=taken,
        listeners={},
        changed=nothing,
        repeated=nothing,
        refuse=nothing,
        give_up=nothing,
    )


def test_after_a_long_turn_the_others_come_first() -> None:
    said: list[str] = []

    async def listen() -> None:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def note(name: str) -> None:
            said.append(name)
            if len(said) == MESSAGES + 1:
                done.set()

        def long(_number: int) -> None:
            begin = loop.time()
            while loop.time() - begin <= TURN_S:
                pass
            note("long")

        guards = []
        for taken, messages in ((long, MESSAGES), (lambda _number: note("short"), 1)):
            link, guard = socket_pair()
            guards.append(guard)
            for number in range(messages):
                message = ffi.new("struct ix_note *", {"type": lib.IX_MSG_TAKEN, "value": number})
                os.write(guard.fileno(), bytes(ffi.buffer(message)))
            _supervisor(taken).adopt(link, os.getpid(), OwnedFd(os.pidfd_open(os.getpid())))
        await asyncio.wait_for(done.wait(), 60)
        for guard in guards:
            guard.close()

    asyncio.run(listen())
    assert sorted(said) == ["long"] * MESSAGES + ["short"]
    first = said.index("long")
    # It has one turn before the others have theirs.
    assert said[first + 1 :].index("long") >= said[first + 1 :].count("short")
