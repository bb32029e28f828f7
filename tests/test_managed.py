"""What is covered: the view's paths, and the runtime's masked and read-only ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from interceptor.mounts.managed import CGROUP_PROC, CGROUP_SYS, VIEW_PROC, VIEW_SYS, Cover, make_plan

names = st.binary(min_size=1, max_size=6).filter(
    lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..")
)
paths = st.builds(
    lambda base, parts: base + b"/".join(parts),
    st.sampled_from([b"/proc/", b"/sys/", b"/etc/"]),
    st.lists(names | st.sampled_from([b"sys", b"kernel", b"devices", b"virtual"]), min_size=1, max_size=3),
)


def covers(plan: tuple[object, ...]) -> dict[bytes, tuple[Cover, bool]]:
    return {c.path: (c.cover, c.readonly) for c in plan}  # type: ignore[attr-defined]


def test_without_a_runtimes_wishes_the_view_is_all() -> None:
    plan = make_plan()
    assert set(covers(plan.proc)) == set(VIEW_PROC)
    assert set(covers(plan.sys)) == set(VIEW_SYS)


def test_what_shows_the_cgroup_is_covered_on_demand_only() -> None:
    plan = make_plan(cgroup_aware=True)
    assert set(covers(plan.proc)) == {*VIEW_PROC, *CGROUP_PROC}
    assert set(covers(plan.sys)) == {*VIEW_SYS, *CGROUP_SYS}


def test_masked_and_readonly_paths_of_a_usual_bundle() -> None:
    plan = make_plan(
        [b"/proc/kcore", b"/sys/firmware", b"/etc/shadow"], [b"/proc/bus", b"/proc/sys", b"/usr"]
    )
    assert covers(plan.proc) == {
        b"bus": (Cover.READONLY, False),
        b"kcore": (Cover.MASKED, False),
        b"swaps": (Cover.VIEW, False),
        b"sys": (Cover.VIEW, True),
        b"uptime": (Cover.VIEW, False),
    }
    assert covers(plan.sys)[b"firmware"] == (Cover.MASKED, False)


def test_a_path_both_masked_and_managed_is_masked() -> None:
    assert covers(make_plan([b"/proc/sys"]).proc)[b"sys"] == (Cover.MASKED, False)


def test_the_whole_of_procfs_is_no_masked_path() -> None:
    assert b"" not in covers(make_plan([b"/proc", b"/proc/"]).proc)


@given(st.lists(paths, max_size=8), st.lists(paths, max_size=8))
def test_parents_come_before_what_lies_below_them(masked: list[bytes], readonly: list[bytes]) -> None:
    plan = make_plan(masked, readonly)
    for rows in (plan.proc, plan.sys):
        seen: list[bytes] = []
        for row in rows:
            assert not any(earlier.startswith(row.path + b"/") for earlier in seen)
            seen.append(row.path)
        assert len(set(seen)) == len(seen)


@given(st.lists(paths, max_size=8), st.lists(paths, max_size=8))
def test_the_view_is_never_left_uncovered(masked: list[bytes], readonly: list[bytes]) -> None:
    plan = make_plan(masked, readonly)
    assert set(VIEW_PROC) <= set(covers(plan.proc))
    assert set(VIEW_SYS) <= set(covers(plan.sys))
    assert all(c.cover in (Cover.VIEW, Cover.MASKED) for c in plan.proc if c.path in VIEW_PROC)
