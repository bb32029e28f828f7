"""Turns: each contestant runs a workload for a while, round after round."""

from __future__ import annotations

import array
from collections.abc import Callable, Sequence

from integration.storm.contestants import Contestant
from integration.storm.figures import FEW
from integration.storm.workloads import BY_SIZE, DENIED, FREE, PROPAGATION, SYSTEMD, Workload

#: Nanoseconds, a list a round, by (figure, contestant, mounts in the table).
Key = tuple[str, str, int]
Samples = dict[Key, list["array.array[int]"]]

#: Floors that a workload means something to. Pairs must succeed, and one floor lets them; what is denied needs one that
#: denies; and what no floor traps costs what a filter costs.
FLOORS_OF = {
    DENIED.name: ("floor_answer", "floor_resolve"),
    FREE.name: ("floor_continue",),
    SYSTEMD.name: ("floor_continue",),
    PROPAGATION.name: ("floor_answer",),
}


def takes_part(contestant: Contestant, workload: Workload) -> bool:
    """Whether the workload means something to that contestant."""
    if contestant.mounts != FEW and workload not in BY_SIZE:
        return False
    if contestant.agent:
        return workload in BY_SIZE
    if contestant.guarded:
        return True
    if workload.guarded:
        return False
    if not contestant.floor:
        return True
    return contestant.name in FLOORS_OF.get(workload.name, ())


def play(
    contestants: Sequence[Contestant],
    workloads: Sequence[Workload],
    rounds: int,
    told: Callable[[str], None] = lambda _text: None,
) -> Samples:
    """All workloads, ``rounds`` times each, contestants in turn, after one round that does not count.

    The order of the contestants is turned around from round to round. ``told`` hears what is being done.
    """
    samples: Samples = {}
    for workload in workloads:
        told(workload.name)
        taking_part = [c for c in contestants if takes_part(c, workload)]
        for number in range(rounds + 1):
            for contestant in taking_part if number % 2 else taking_part[::-1]:
                measured = contestant.caller.run(workload, workload.turn)
                if number == 0:
                    continue
                for figure, nanoseconds in measured.items():
                    key = (figure, contestant.name, contestant.mounts)
                    samples.setdefault(key, []).append(nanoseconds)
    return samples
