"""All tables by name, and what comes of playing them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from interceptor.library import Interceptor
from tests.fidelity import cases, ours
from tests.fidelity.differences import MEANT, Meant, meaning
from tests.fidelity.twins import Difference, Script, twins

LONG = os.environ.get("INTERCEPTOR_LONG") == "1"
MOVES = (0, 4, 0x44, 0x40, 0x244, 0x200, 0x104, 0x144, 0x55, 0x77, 0x400, 8)

Table = Callable[[], Iterable[Script]]


def _flags() -> Iterable[Script]:
    yield from cases.mount_flags(cases.SOME_EXTRAS, cases.SOME_PAIRS)
    if LONG:
        yield from cases.mount_flags(
            (*cases.SOME_EXTRAS, *cases.MORE_EXTRAS), cases.SOME_PAIRS + cases.MORE_PAIRS
        )


def _by_each_abi(table: Callable[[str], Iterable[Script]]) -> Mapping[str, Table]:
    name = table.__name__
    return {name: lambda: table("native"), f"{name}-i386": lambda: table("i386")}


def _and_on_i386(tables: Mapping[str, Table]) -> Mapping[str, Table]:
    """Each table, and the same calls made by ``int 0x80``."""

    def on_i386(table: Table) -> Table:
        return lambda: (tuple(replace(call, abi="i386") for call in script) for script in table())

    return {**tables, **{f"{name}-i386": on_i386(table) for name, table in tables.items()}}


#: Nothing of ours is touched: the trapped twin must be as the welded one.
FREE: Mapping[str, Table] = {
    "mount_flags": _flags,
    **_by_each_abi(cases.mount_paths),
    **_by_each_abi(cases.mount_pointers),
    **_by_each_abi(cases.umounts),
    **_and_on_i386(
        {
            "move_mounts": lambda: cases.move_mounts(cases.every(cases.MOVE_FLAGS) if LONG else MOVES),
            "open_trees": cases.open_trees,
            "setattrs": cases.setattrs,
            "contexts": cases.contexts,
            "pivots": cases.pivots,
            "walks": cases.walks,
        }
    ),
    **_by_each_abi(cases.awkward),
}

#: procfs, sysfs, and what the container was made with: as the kernel alone, or a difference that is meant.
OURS: Mapping[str, Table] = {
    **_by_each_abi(ours.umounts),
    **_by_each_abi(ours.mounts),
    "mount_flags": ours.mount_flags,
    **_by_each_abi(ours.fresh),
    **_by_each_abi(ours.lives),
    **_and_on_i386({"trees": ours.trees, "contexts": ours.contexts}),
}

#: What goes beyond the stage cannot be undone in the container's first mount namespace; what the kernel allows there to
#: somebody without rights cannot be undone by him.
_NOT_IN = {
    "first": {"mount_paths", "umounts", "pivots", "walks", "mounts", "trees"},
    "no-admin": {"walks"},
    "user": {"walks"},
    "user-namespace": {"walks"},
}


#: The numbers of these calls are the same in both ABIs, and so is what is done about them: in one context, but for the
#: long run.
_BY_NUMBER_ONLY = {
    f"{name}-i386"
    for name in ("move_mounts", "open_trees", "setattrs", "contexts", "pivots", "walks", "trees")
}


def plays(tables: Mapping[str, Table], context: str) -> list[str]:
    """The names of the tables that are for a context."""
    names = [name for name in tables if name.removesuffix("-i386") not in _NOT_IN.get(context, ())]
    if not LONG and context != "root":
        names = [name for name in names if name not in _BY_NUMBER_ONLY]
    return [name for name in names if not (context == "first" and tables is OURS and name == "mount_flags")]


@dataclass
class Survey:
    """How often each difference that is meant occurred, and those that are not."""

    scripts: int = 0
    meant: Counter[str] = field(default_factory=Counter)
    defects: list[Difference] = field(default_factory=list)

    def add(self, scripts: int, differences: Iterable[Difference]) -> None:
        self.scripts += scripts
        for difference in differences:
            if (found := meaning(difference)) is not None:
                self.meant[found.request] += 1
            else:
                self.defects.append(difference)

    def rows(self) -> Sequence[Meant]:
        """Those that occurred."""
        return [meant for meant in MEANT if self.meant[meant.request]]


def survey(daemon: Interceptor, context: str, names: Iterable[str] | None = None) -> Survey:
    """Plays what is ours in a trapped container and in one that is as the kernel alone would have it."""
    found = Survey()
    with twins(daemon, welded=False) as both:
        for name in names if names is not None else plays(OURS, context):
            scripts = list(OURS[name]())
            found.add(len(scripts), both.differences(context, scripts))
    return found


def free_differences(daemon: Interceptor, context: str, name: str) -> list[Difference]:
    """Plays a table that touches nothing of ours in a trapped container and in one that is welded only."""
    with twins(daemon, welded=True) as both:
        return both.differences(context, list(FREE[name]()))
