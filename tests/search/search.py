"""Generation and shrinking, by hypothesis, in rounds of one seed each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from tests.search.arena import Arena
from tests.search.program import (
    CONTEXTS,
    KIND,
    PATHS,
    WORKERS,
    Op,
    Program,
    Step,
    Walk,
    prelude,
    relative,
    step,
)

#: Steps come in blocks, so that programs have some forty of them; blocks and steps shrink to nothing.
BLOCK, BLOCKS = 8, 16
#: How often a program is repeated while a failure is made smaller: it may be a race.
REPEATS = 6

_number = st.integers(0, 127)
_step = st.tuples(
    st.integers(0, len(KIND) - 1),
    st.integers(0, WORKERS - 1),
    st.integers(0, PATHS - 1),
    st.integers(0, PATHS - 1),
    _number,
    _number,
)
_context = st.integers(0, len(CONTEXTS) - 1)
_blocks = st.lists(st.tuples(*[_step] * BLOCK), max_size=BLOCKS)
_scene = st.tuples(
    st.tuples(*[_context] * WORKERS),
    st.booleans(),
    st.integers(0, 7),
    st.sampled_from((2, 1, 2)),
    st.integers(0, 3),
)
Numbers = tuple[int, int, int, int, int, int]
Scene = tuple[tuple[int, ...], bool, int, int, int]


def assemble(scene: Scene, blocks: list[tuple[Numbers, ...]], mode: str) -> Program:
    """The program that generated numbers stand for."""
    contexts, shared, first, walk, private = scene
    names = [CONTEXTS[i] for i in contexts]
    steps = [Step(Op.MOUNT, 0, (0x104000,), ("", "/"))] if shared else []
    for worker, name in enumerate(names):
        steps += prelude(worker, name)
    for numbers in (n for block in blocks for n in block):
        made = step(*numbers)
        if made is not None:
            jailed = names[made.worker] == "chroot" and made.op is not Op.CHROOT
            steps.append(relative(made) if jailed else made)
    # What spoils the container costs a new one: in its first namespace only now and then.
    return Program(tuple(steps), first < 6, Walk(walk), private < 3, mode)


class Failure(AssertionError):
    """A program did what must not be possible; `program` is the smallest found."""

    def __init__(self, program: Program, wrong: str) -> None:
        super().__init__(f"{wrong}{program}")
        self.program = program
        self.wrong = wrong


def again(arena: Arena, program: Program, times: int = REPEATS) -> Failure | None:
    """What goes wrong in a few repetitions, if anything does."""
    for _ in range(times):
        outcome = arena.run(program)
        if outcome.wrong:
            return Failure(replace(program, steps=program.steps[: len(outcome.errors)]), outcome.wrong)
    return None


def shorten(arena: Arena, failure: Failure) -> Failure:
    """Leaves out what it happens without: hypothesis gives up early where a race does not happen each time."""
    size = max(1, len(failure.program.steps) // 2)
    while size:
        at = 0
        while at < len(failure.program.steps):
            steps = failure.program.steps
            tried = again(arena, replace(failure.program, steps=steps[:at] + steps[at + size :]))
            failure, at = (tried, at) if tried else (failure, at + size)
        size //= 2
    return failure


def search(arena: Arena, seed_: int, programs: int) -> None:
    """So many programs. Raises `Failure`, with a program that was made small."""
    found: list[Failure] = []

    @seed(seed_)
    @settings(
        max_examples=programs,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(_scene, _blocks)
    def attempt(scene: Scene, blocks: list[tuple[Numbers, ...]]) -> None:
        program = assemble(scene, blocks, arena.mode)
        failure = again(arena, program, REPEATS if found else 1)
        if failure is not None:
            if not found or len(failure.program.steps) <= len(found[-1].program.steps):
                found.append(failure)
            raise AssertionError("it happened")

    try:
        attempt()
    except BaseException:
        # What is flaky is a race, and a finding all the same.
        if not found:
            raise
    if found:
        raise shorten(arena, found[-1])


def report(failure: Failure, directory: Path, seed_: int) -> str:
    """Writes the program to a file; says how it is repeated."""
    path = directory / f"search-{failure.program.mode}-{seed_}.json"
    failure.program.save(path)
    return f"{failure}\nseed {seed_}; again: python -m tests.search replay {path}"
