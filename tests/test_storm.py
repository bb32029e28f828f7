"""The benchmark: that it runs, and that its figures are what they say. Nothing here depends on how fast anything is."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from integration.storm import agents, baseline, contestants, figures, lxd, workloads
from integration.storm.contestants import Caller, arena, compiled
from integration.storm.figures import COMPARISONS, Comparison, Percentiles
from integration.storm.sleepers import OURS_KB, QUICK_CONTAINERS, Sleepers, sleepers
from integration.storm.workloads import Workload
from interceptor.errors import InterceptorError
from interceptor.library import Interceptor
from interceptor.spawn.create import spawn

ROOT = Path(__file__).resolve().parent.parent
LONG = os.environ.get("INTERCEPTOR_LONG") == "1"


# ---- figures -----------------------------------------------------------------------------------------------


def test_percentiles_are_of_the_sorted_samples_in_microseconds() -> None:
    found = Percentiles.of(n * 1000 for n in range(1000, 0, -1))
    assert (found.p50, found.p99, found.p999, found.count) == (501, 991, 1000, 1000)


def test_no_samples_have_no_percentiles() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Percentiles.of([])


def test_a_ratio_is_the_median_of_the_ratios_of_each_round() -> None:
    above, below = ("a", "x", 20), ("b", "x", 20)
    samples = {above: [[20], [30], [900]], below: [[10], [10], [100]]}
    assert figures.ratio(Comparison((above,), (below,), bar=2.9), samples).value == 3
    assert figures.ratio(Comparison((above,), (below,), bar=2.9), samples).holds is False


def test_figures_on_one_side_are_added_within_a_round() -> None:
    one, two, below = ("a", "x", 20), ("b", "x", 20), ("c", "x", 20)
    samples = {one: [[10, 10, 10], [1]], two: [[20], [2]], below: [[10], [1]]}
    assert figures.ratio(Comparison((one, two), (below,)), samples).value == 3


def test_the_noise_of_rounds_that_agree_is_nothing() -> None:
    assert figures.noise([[5, 5], [5, 5], [5, 5]]) == 0
    assert figures.noise([[5], [10], [15]]) == 0.5


def test_every_comparison_is_of_figures_that_workloads_have() -> None:
    known = {step.figure for workload in workloads.ALL for step in workload.steps}
    known |= {workload.whole for workload in workloads.ALL}
    for comparison in COMPARISONS.values():
        assert {figure for figure, _, _ in comparison.above + comparison.below} <= known


# ---- calls -------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_call_with_another_errno_ends_the_run() -> None:
    wrong = Workload("wrong", (workloads.umount("x", "/proc/sys", expected=errno.EBUSY),), 1)
    with compiled() as program, spawn(None, None, mounts=contestants.mounts_with(program)) as container:
        caller = Caller(container, "none")
        try:
            with pytest.raises(InterceptorError, match=f"errno {errno.EINVAL}, not {errno.EBUSY}"):
                caller.run(wrong, 3)
            assert len(caller.run(workloads.DENIED, 5)["denied"]) == 5
        finally:
            caller.close()


@pytest.mark.root
@pytest.mark.parametrize("mode", ["none", *contestants.FLOORS])
def test_the_floor_runs_by_hand(mode: str) -> None:
    with compiled() as program, spawn(None, None, mounts=contestants.mounts_with(program)) as container:
        done = container.run([f"{contestants.INSIDE}/floor", "-m", mode, "-n", "100"])
    assert (done.returncode, done.stderr) == (0, b"")
    found = json.loads(done.stdout)
    assert (found["mode"], found["count"]) == (mode, 100)
    assert 0 < found["us"]["min"] <= found["us"]["p50"] <= found["us"]["p99"] <= found["us"]["p999"]


@pytest.mark.root
def test_contestants_have_tables_of_the_size_asked_for() -> None:
    with compiled() as program, Interceptor() as daemon, arena(daemon, program, 100) as found:
        assert {c.name for c in found} == {"kernel", "guarded", *(f"floor_{m}" for m in contestants.FLOORS)}
        assert all(c.caller.run(workloads.FREE, 2)["free_umount"] for c in found if not c.floor)


# ---- the command -------------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_quick_run_has_every_figure(tmp_path: Path) -> None:
    file, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    argv = [sys.executable, "-m", "integration.storm", "--quick", "--json", str(file), "--plot", str(picture)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(file.read_text())
    of_many = {
        *("worker_p99_beside_storm", "denied_vs_lxd"),
        *("last_registration_vs_first", "memory_beside_guards_vs_150_mb"),
    }
    assert found["sleepers"]["containers"] == QUICK_CONTAINERS
    assert found["sleepers"]["ours_kb"] > found["sleepers"]["envoys_kb"] > 0
    assert found["ratios"].keys() == COMPARISONS.keys() | of_many
    assert [c["containers"] for c in found["crowds"]] == [1, 2]
    assert all(c["guard_private_kb"] > 0 and c["registration_us"] > 0 for c in found["crowds"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {
        "denied_vs_resolving_floor_p50",
        "denied_flatness",
        "free_pair_vs_kernel",
        "propagation_vs_kernel",
    } <= found["ratios"].keys()
    for figure in ("denied", "denied_lazy", "free_umount", "propagation", *figures.HANDLED_US):
        assert found["us"][figure]["guarded"]["20"]["p50"] > 0
        assert len(found["samples_ns"][figure]["guarded"]["20"]) == 2
    assert found["us"]["denied"].keys() == {*("kernel", "floor_answer", "floor_resolve", "python", "guarded")}


@pytest.mark.root
def test_a_quick_run_through_the_view_has_every_ratio(tmp_path: Path) -> None:
    written = tmp_path / "view.json"
    argv = [sys.executable, "-m", "integration.storm", "view", "--quick", "--json", str(written)]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, timeout=300)
    found = json.loads(written.read_text())
    assert set(found["bars"]) <= set(found["ratios"])
    assert {"uptime_vs_lxcfs", "passthrough_vs_lxcfs"} <= set(found["ratios"])
    assert all(value > 0 for value in found["ratios"].values())


# ---- comparisons with the committed figures ------------------------------------------------------------------


def test_what_moved_beyond_its_spread_is_told_worst_first() -> None:
    now = {"a": 2.0, "b": 1.3, "c": 1.3, "d": None, "e": 0.5}
    then = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0}
    spread = {"a": (1.9, 2.1), "b": (1.2, 1.4), "c": (0.9, 1.7), "e": (0.4, 0.6)}
    assert baseline.moved(now, then, spread) == [
        "a: 1.00 → 2.00 (+100%)",
        "b: 1.00 → 1.30 (+30%)",
        "e: 1.00 → 0.50 (-50%)",
    ]


def test_without_committed_figures_nothing_has_moved(tmp_path: Path) -> None:
    assert baseline.load(tmp_path / "none.json") == {"ratios": {}, "us": {}}


# ---- other agents -------------------------------------------------------------------------------------------


@pytest.mark.root
def test_another_agent_answers_the_same_calls() -> None:
    with (
        compiled() as program,
        agents.running(agents.PYTHON) as peer,
        spawn(peer, None, mounts=contestants.mounts_with(program)) as container,
    ):
        container.call(contestants.furnish, 20)
        caller = Caller(container, "none")
        try:
            assert len(caller.run(workloads.DENIED, 5)["denied"]) == 5
            assert len(caller.run(workloads.FREE, 5)["free_umount"]) == 5
        finally:
            caller.close()


@pytest.mark.root
def test_an_agent_that_serves_no_socket_is_told_of() -> None:
    with pytest.raises(InterceptorError, match="no agent at"), agents.running("true {socket}"):
        pytest.fail("it runs")


# ---- many containers, and LXD ---------------------------------------------------------------------------------


def asleep(**figures: float) -> Sleepers:
    found: dict[str, float] = dict.fromkeys(Sleepers.__dataclass_fields__, 1)
    return Sleepers(**{**found, **figures})  # type: ignore[arg-type]


def test_sleepers_are_held_against_their_bars() -> None:
    assert asleep(ours_kb=OURS_KB, first_cpu_us=100, last_cpu_us=109).memory.holds is True
    assert asleep(ours_kb=OURS_KB + 1).memory.holds is False
    assert asleep(first_cpu_us=100, last_cpu_us=109).slower.holds is True
    assert asleep(first_cpu_us=100, last_cpu_us=111).slower.holds is False


@pytest.mark.root
@pytest.mark.slow
def test_many_containers_that_sleep_take_little_memory_and_no_time() -> None:
    """A thousand, which take five minutes, with INTERCEPTOR_LONG=1."""
    found = sleepers() if LONG else sleepers(40, idle_seconds=2.0)
    assert found.memory.holds, found
    assert found.envoys_kb <= 60 * found.containers, found
    assert found.guard_kb <= 500, found
    assert found.idle_wake_ups == 0, found


if LONG:

    @pytest.mark.root
    @pytest.mark.slow
    def test_lxd_is_measured_on_the_same_call() -> None:
        """integration/check --long installs it."""
        assert lxd.installed()
        with compiled() as program:
            found = lxd.measure(program, 3)
        assert found.ratio.value > 1
        assert len(found.theirs) == 3
