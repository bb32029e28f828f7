"""The quickstart's config.json: plain data, so its properties are checked as data."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integration.containers import bundle as oci
from interceptor.oci.seccomp import oci_fragment

SAMPLE = oci.Bundle(
    rootfs="/run/example/merged",
    hostname="example",
    first_id=100000,
    cgroups_path="/example",
    cgroup="/sys/fs/cgroup/unified/example",
    machine="x86_64",
    bounding_set=(1 << 41) - 1,
    listener="/run/example/seccomp.sock",
    notify="/run/example/notify",
    devices=(oci.Device("/dev/fuse", 10, 229),),
    create_runtime=(("/usr/bin/interceptor-hook", "--socket", "/run/example/control.sock", "createRuntime"),),
    poststop=(("/usr/bin/interceptor-hook", "--socket", "/run/example/control.sock", "poststop"),),
)


def traps_mount(flags: int) -> bool:
    """Decide as the kernel would decide with the rules for mount(2): one that matches is enough."""
    rules = oci.seccomp("/s", "", "x86_64")["syscalls"]
    matches = [rule["args"][0] for rule in rules if "mount" in rule["names"]]
    return any(flags & one["value"] == one["valueTwo"] for one in matches)


def destinations(config: oci.Json) -> list[str]:
    return [mount["destination"] for mount in config["mounts"]]


def test_config_is_json_and_the_same_every_time() -> None:
    assert json.loads(json.dumps(oci.config(SAMPLE))) == oci.config(SAMPLE)


def test_each_mount_comes_after_the_one_that_it_is_mounted_on() -> None:
    paths = destinations(oci.config(SAMPLE))
    for index, path in enumerate(paths):
        assert not [later for later in paths[index:] if later != path and path.startswith(later + "/")]
    assert paths.index("/sys") < paths.index("/sys/fs/cgroup")


def test_hooks_keep_their_order_and_name_their_program_twice() -> None:
    hooks = oci.config(SAMPLE)["hooks"]
    assert hooks["createRuntime"] == [
        {"path": "/usr/bin/interceptor-hook", "args": list(SAMPLE.create_runtime[0])},
    ]
    assert hooks["poststop"][0]["args"][-1] == "poststop"


def test_container_without_hooks_has_no_empty_hooks_object() -> None:
    plain = oci.Bundle("/r", "h", 1, "/c", "/g", "x86_64", 0)
    assert "hooks" not in oci.config(plain)
    assert "seccomp" not in oci.config(plain)["linux"]


def test_host_device_is_bound_in_and_allowed_and_nothing_else_is() -> None:
    config = oci.config(SAMPLE)
    assert "/dev/fuse" in destinations(config)
    allowed = [
        rule for rule in config["linux"]["resources"]["devices"] if rule["allow"] and "rw" in rule["access"]
    ]
    assert allowed == [{"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"}]
    assert config["linux"]["resources"]["devices"][0] == {"allow": False, "access": "rwm"}


def test_capabilities_are_those_of_the_host_s_bounding_set() -> None:
    without_resource = SAMPLE.bounding_set & ~(1 << 24)
    names = oci.capabilities(without_resource)
    assert "CAP_SYS_ADMIN" in names
    assert "CAP_SYS_RESOURCE" not in names
    assert oci.capabilities(1) == ["CAP_CHOWN"]
    assert oci.capabilities(1 << 37) == ["CAP_AUDIT_READ"]


def test_there_are_no_rlimits_because_host_root_may_lack_cap_sys_resource() -> None:
    assert "rlimits" not in oci.process(SAMPLE)


def test_systemd_is_told_where_to_say_that_it_is_ready() -> None:
    config = oci.config(SAMPLE)
    assert f"NOTIFY_SOCKET={oci.NOTIFY_INSIDE}" in config["process"]["env"]
    assert oci.NOTIFY_INSIDE in destinations(config)


@pytest.mark.parametrize(
    ("flags", "trapped"),
    [
        (0, True),
        (oci.MS_BIND, True),
        (oci.MS_BIND | oci.MS_SHARED, True),
        (oci.MS_REMOUNT | oci.MS_PRIVATE, True),
        (oci.MS_MGC_VAL, True),
        (oci.MS_SHARED, False),
        (oci.MS_SLAVE | 0x4000, False),
        (oci.MS_PRIVATE | 0x4000 | 0x8000, False),
    ],
)
def test_only_pure_changes_of_propagation_pass_untrapped(flags: int, trapped: bool) -> None:
    assert traps_mount(flags) is trapped


@given(st.integers(0, (1 << 32) - 1))
def test_whatever_the_kernel_does_not_take_for_a_propagation_change_is_trapped(flags: int) -> None:
    effective = flags & ~oci.MS_MGC_MSK if flags & oci.MS_MGC_MSK == oci.MS_MGC_VAL else flags
    only_propagation = bool(effective & oci.MS_PROPAGATION) and not effective & (oci.MS_REMOUNT | oci.MS_BIND)
    assert traps_mount(flags) or only_propagation


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_rules_written_by_hand_are_those_that_the_product_hands_out(machine: str) -> None:
    def flattened(profile: Any) -> set[tuple[str, str]]:
        return {
            (name, json.dumps(rule.get("args", []), sort_keys=True))
            for rule in profile["syscalls"]
            for name in rule["names"]
        }

    ours = oci.seccomp("/run/s", "example", machine)
    theirs: Any = oci_fragment("/run/s", "example", machine)
    assert flattened(ours) == flattened(theirs)
    assert {key: ours[key] for key in ours if key != "syscalls"} == {
        key: theirs[key] for key in theirs if key != "syscalls"
    }
