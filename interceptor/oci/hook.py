"""``interceptor-hook``: what a bundle names as its ``createRuntime`` and ``poststop`` hook.

It passes the state that the runtime writes to its standard input on to the daemon and waits until that has acted. A
runtime waits for it on every container start, so nothing is imported beyond the standard library's cheap parts.
"""

from __future__ import annotations

import argparse
import json
import sys

from interceptor.client import request
from interceptor.errors import InterceptorError, NoDaemon

#: The control operation for each hook of the OCI runtime specification that we serve.
OPERATIONS = {"createRuntime": "create", "poststop": "poststop"}

DEFAULT_SOCKET = "/run/interceptor/control.sock"
STATE_MAX = 1 << 20


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit status: 0 done, 1 failed, with one line of explanation, 2 used wrongly."""
    options = _parser().parse_args(arguments)
    try:
        state = read_state(sys.stdin.buffer.read(STATE_MAX + 1))
        request(options.socket, {"op": OPERATIONS[options.hook], "state": state}, options.timeout)
    except InterceptorError as error:
        if options.daemon_may_be_away and isinstance(error, NoDaemon):
            return 0
        hint = f" ({error.hint})" if error.hint else ""
        print(f"interceptor-hook {options.hook}: {error}{hint}", file=sys.stderr)
        return 1
    return 0


def read_state(data: bytes) -> dict[str, object]:
    """The container's state in ``data``, checked only for being a JSON object: the daemon checks the rest."""
    if len(data) > STATE_MAX:
        raise InterceptorError(f"standard input has more than {STATE_MAX} bytes")
    try:
        state = json.loads(data)
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise InterceptorError(
            "standard input is not the JSON state of a container", "run it as a hook of a bundle, not by hand"
        )
    return state


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="interceptor-hook",
        description="Tell the interceptor's daemon about a container. For the hooks of an OCI bundle's config.json: "
        "the runtime gives the container's state on standard input.",
        epilog='Example: "hooks": {"createRuntime": [{"path": "/usr/local/bin/interceptor-hook", '
        '"args": ["interceptor-hook", "createRuntime"]}], "poststop": [{"path": '
        '"/usr/local/bin/interceptor-hook", "args": ["interceptor-hook", "poststop"]}]}',
    )
    parser.add_argument("hook", choices=list(OPERATIONS), help="which hook of the bundle this is")
    parser.add_argument("--socket", default=DEFAULT_SOCKET, help="the daemon's control socket (%(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=30.0, help="seconds to wait for the daemon's answer (%(default)g)"
    )
    parser.add_argument(
        "--daemon-may-be-away",
        action="store_true",
        help="exit with status 0 where no daemon listens: the next one finds out by itself",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
