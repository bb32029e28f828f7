"""A view that is of another version than the daemon is replaced, under running containers.

Keeper and view outlive the daemon, so after an upgrade a new daemon finds an old view, which may not understand what
the daemon tells it. It is asked for its version and, if that is another, to hand over: the keeper sees it end and
starts what is installed now, on the same connection. That is what it does for a view that was killed, but for what is
in flight, which is answered first.
"""

from __future__ import annotations

import asyncio
from typing import Any

from interceptor.errors import InterceptorError
from interceptor.observe.log import get_logger
from interceptor.view.client import ViewClient
from interceptor.view.version import version

PATIENCE_S = 0.25
"""How long a starting daemon waits for the answer, which takes a millisecond. Later ones are heard, too."""


class Renewal:
    """Asks once, and once more what has come instead."""

    def __init__(self, view: ViewClient, loop: asyncio.AbstractEventLoop) -> None:
        self._view = view
        self._loop = loop
        self._log = get_logger()
        self._ours = version()
        self._asked = 0
        self._is_second = False

    def begin(self) -> None:
        """A predecessor has left the view. It may be stopped or stuck: nothing depends on its answer."""
        self._view.unasked = self._heard
        try:
            self._asked = self._view.tell("version")
            self._loop.add_reader(self._view.fileno(), self._look)
            self._view.take_unasked(PATIENCE_S)
        except (InterceptorError, OSError, ValueError) as error:
            self._end()
            self._log.warning("the view does not say of which version it is", error=str(error))

    def _look(self) -> None:
        try:
            self._view.take_unasked()
        except (InterceptorError, OSError, ValueError) as error:
            self._end()
            self._log.warning("the view does not say of which version it is", error=str(error))

    def _heard(self, reply: dict[str, Any]) -> None:
        if not self._asked or reply.get("n") != self._asked:
            return
        found = reply.get("version")
        if found == self._ours:
            self._end()
        elif self._is_second:
            self._end()
            self._log.error(
                "the view stays of another version: new containers may fail",
                view=found,
                daemon=self._ours,
                hint="the keeper starts what was installed where it is from: restart when no container runs",
            )
        else:
            self._replace(found)

    def _replace(self, found: object) -> None:
        self._log.info("the view is of another version; replacing it", view=found, daemon=self._ours)
        self._is_second = True
        try:
            # Those that do not know their version do not know how to hand over either.
            self._view.tell("handover" if found is not None else "quit")
            self._asked = self._view.tell("version")
        except InterceptorError as error:
            self._end()
            self._log.error("the view could not be replaced", error=str(error))

    def _end(self) -> None:
        self._asked = 0
        self._loop.remove_reader(self._view.fileno())
