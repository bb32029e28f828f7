"""The connection to the kernel: requests in, operations started, answers out, by one descriptor on /dev/fuse.

The connection lives as long as any duplicate of the descriptor does, so a server that is killed leaves requests behind
that it had read and not answered. Its successor asks for them again and answers EIO to each: what they did is not
known, and one of them may be what killed it. What was not read yet is served as if nothing had happened.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

from interceptor.kernel.fuse import Pump
from interceptor.view import wire
from interceptor.view.filesystem import View
from interceptor.view.host import KernelHost
from interceptor.view.log import Logger
from interceptor.view.tasks import Task
from interceptor.view.wire import Opcode, Request

log = Logger()

_BATCH = 64
"""Most requests that are taken before others get their turn: envoys, orders."""


class Session:
    """Serves one connection."""

    def __init__(self, device: int, host: KernelHost, view: View, unmounted: Callable[[], None]) -> None:
        """Takes over the descriptor. ``unmounted`` is called when there is nothing more to serve."""
        os.set_blocking(device, False)
        self._device = device
        self._buffer = bytearray(wire.BUFFER_SIZE)
        self.pump = Pump(device, host.proc, time.clock_gettime_ns(time.CLOCK_BOOTTIME), self._buffer)
        view.use(self.pump)
        self._host = host
        self._view = view
        self._unmounted = unmounted
        self._waiting: dict[int, tuple[Task, int]] = {}
        """By the request's number, with who asked."""

    @property
    def is_busy(self) -> bool:
        """Whether something was read that is not answered yet."""
        return bool(self._waiting)

    def take_over(self) -> None:
        """Have the kernel send again what a predecessor read and did not answer."""
        try:
            os.write(self._device, wire.resend())
        except OSError as error:
            # A connection that nobody has answered INIT on yet, or Linux before 6.9.
            log.warning("requests_not_resent", error=str(error))

    def receive(self, others: int, wait_s: float) -> None:
        """Take what is there and start on it, until ``others``, an epoll instance, is ready.

        If nothing is there, wait for ``wait_s`` seconds; negative: for ever.
        """
        for _ in range(_BATCH):
            try:
                received = self.pump.receive(others, wait_s)
            except OSError as error:
                if error.errno != errno.ENODEV:
                    log.error("device_failed", error=str(error))
                self._unmounted()
                return
            if received is None:
                return
            wait_s = 0.0  # what we begin may have a time limit
            length, asked = received
            self._start(wire.parse(self._buffer, length), asked)

    def _start(self, request: Request, asked: int = 0) -> None:
        """``asked``: a READ for which its envoy has been asked already, under this number."""
        handler = self._view.handlers.get(request.opcode)
        if handler is None:
            self._special(request)
        elif request.unique & wire.RESENT:
            self._send(wire.refusal(request.unique, errno.EIO))
        else:
            unique = request.unique

            def finish(payload: bytes | None, error: int) -> None:
                self._waiting.pop(unique, None)
                self._view.inodes.flush()
                self._send(wire.refusal(unique, error) if payload is None else wire.reply(unique, payload))

            operation = self._view.read_asked(request, asked) if asked else handler(request)
            task = Task(handler.__name__, operation, finish)
            task.run()
            if task.waiting is not None:
                self._waiting[unique] = task, request.pid

    def _special(self, request: Request) -> None:
        """What is no operation on a node."""
        match request.opcode:
            case Opcode.FORGET:
                self._view.forget(request.node, wire.number_64(request.body))
            case Opcode.BATCH_FORGET:
                for node, lookups in wire.forgets(request.body):
                    self._view.forget(node, lookups)
            case Opcode.INTERRUPT:
                self._interrupt(wire.number_64(request.body))
            case Opcode.INIT:
                self._send(wire.reply(request.unique, wire.init(request.body)))
            case Opcode.DESTROY:
                self._send(wire.reply(request.unique, b""))
            case _:
                self._send(wire.refusal(request.unique, errno.ENOSYS))

    def _interrupt(self, unique: int) -> None:
        """A caller got a signal. It ends the wait of who ends by it, as nobody else's in procfs, which is never EINTR.

        What may take effect is waited for all the same, until its envoy's time limit.
        """
        task, pid = self._waiting.get(unique, (None, 0))
        if (
            task is not None
            and task.waiting is not None
            and task.name != "write"
            and self._host.is_killed(pid)
        ):
            task.waiting.settle(errno.EINTR)

    def _send(self, answer: bytes) -> None:
        try:
            os.write(self._device, answer)
        except OSError as error:
            if error.errno != errno.ENOENT:  # who asked is gone
                log.warning("answer_not_taken", error=str(error))
