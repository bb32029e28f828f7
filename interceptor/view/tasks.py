"""Operations that may have to wait for an envoy, without a thread each: coroutines, resumed by what they wait for.

This is all of an event loop that the view needs. An operation that waits for nobody runs through in one go.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from interceptor.view.log import Logger
from interceptor.view.nodes import NodeError

log = Logger()


class Waiting:
    """What an operation waits for: one thing, settled once."""

    __slots__ = ("_error", "resume", "settled")

    def __init__(self) -> None:
        self.settled = False
        self._error = 0
        self.resume: Callable[[], None] | None = None

    def __await__(self) -> Generator[Waiting, None, None]:
        if not self.settled:
            yield self
        if self._error:
            raise NodeError(self._error)

    def settle(self, error: int = 0) -> None:
        """It has happened, or failed with ``error``. Whoever waits goes on at once; a second time is ignored."""
        if self.settled:
            return
        self.settled = True
        self._error = error
        if self.resume is not None:
            self.resume()


Operation = Coroutine[Waiting, None, bytes | None]
Finish = Callable[[bytes | None, int], None]
"""Called with what an operation returned, or with the errno that it failed with."""


class Task:
    """An operation in progress."""

    __slots__ = ("_finish", "_operation", "name", "waiting")

    def __init__(self, name: str, operation: Coroutine[Any, Any, bytes | None], finish: Finish) -> None:
        self.name = name
        self._operation = operation
        self._finish = finish
        self.waiting: Waiting | None = None

    def run(self) -> None:
        """Go on until it is done or waits. It never raises: a mistake of ours is EIO for one caller."""
        try:
            waiting = self._operation.send(None)
        except StopIteration as done:
            self.waiting = None
            self._finish(done.value, 0)
        except NodeError as error:
            self.waiting = None
            self._finish(None, error.errno)
        except Exception as error:
            self.waiting = None
            log.exception("operation_failed", operation=self.name, error=str(error))
            self._finish(None, errno.EIO)
        else:
            self.waiting = waiting
            waiting.resume = self.run
