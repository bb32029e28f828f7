"""What a process of its own says, with which its mounts go."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def told_by_a_child(body: Callable[[bytes], T]) -> T:
    """What ``body`` returns there, given an empty directory; what it raises is the failure."""
    with tempfile.TemporaryDirectory() as top, tempfile.TemporaryFile() as report:
        pid = os.fork()
        if pid == 0:
            try:
                said: tuple[str, T | None] = ("", body(os.fsencode(top)))
            except BaseException:
                said = (traceback.format_exc(), None)
            try:
                pickle.dump(said, report)
                report.flush()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        report.seek(0)
        failure, found = pickle.load(report)
        assert not failure, failure
        told: T = found
        return told
