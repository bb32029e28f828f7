"""The quickstart's config.json: plain data, so its properties are checked as data."""

from __future__ import annotations

import json

from integration.containers import bundle as oci

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
