"""From the manager's configuration to that of a guarded system container: pure, so thousands of cheap examples."""

from __future__ import annotations

import copy
import json
import tomllib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from interceptor.errors import ContainerError
from interceptor.oci import commandline
from interceptor.oci.capabilities import CAPABILITIES
from interceptor.oci.profile import MOUNT_FAMILY, SYSTEM_CALLS, TRAPPED, WAIT_KILLABLE_RECV, merge
from interceptor.oci.rewrite import (
    Host,
    IdRange,
    is_privileged,
    is_systemd,
    kept_paths,
    rewrite,
    rewrite_process,
)
from interceptor.oci.runtime import plain_values
from interceptor.oci.seccomp import oci_fragment
from interceptor.oci.settings import OWNERSHIPS, Settings, read_settings

Json = dict[str, Any]

HOST = Host(
    uids=IdRange(200000, 65536),
    gids=IdRange(300000, 65536),
    listener="/run/interceptor/seccomp.sock",
    hooks={"createRuntime": ["/bin/hook", "createRuntime"], "poststop": ["/bin/hook", "poststop"]},
    capabilities=CAPABILITIES,
)

# ---- what managers write, and what they might ----

NAMES = st.sampled_from(
    [*TRAPPED, *MOUNT_FAMILY, *SYSTEM_CALLS, "read", "write", "keyctl", "kexec_load", "swapon"]
)
RULES = st.fixed_dictionaries(
    {
        "names": st.lists(NAMES, min_size=1, max_size=5),
        "action": st.sampled_from(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_LOG"]),
    },
    optional={
        "args": st.just([{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]),
        "errnoRet": st.integers(1, 40),
    },
)
PROFILES = st.fixed_dictionaries(
    {"defaultAction": st.sampled_from(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"])},
    optional={
        "architectures": st.lists(st.sampled_from(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]), unique=True),
        "syscalls": st.lists(RULES, max_size=6),
        "flags": st.lists(st.sampled_from(["SECCOMP_FILTER_FLAG_LOG", WAIT_KILLABLE_RECV]), unique=True),
    },
)
DESTINATIONS = st.sampled_from(
    ["/proc", "/sys", "/sys/fs/cgroup", "/dev", "/dev/shm", "/run", "/run/secrets", "/v", "/dev/kmsg"]
)
MOUNTS = st.builds(
    lambda destination, kind, options: {
        "destination": destination,
        "type": kind,
        "source": "s",
        "options": options,
    },
    DESTINATIONS,
    st.sampled_from(["bind", "tmpfs", "proc", "sysfs", "cgroup", "mqueue"]),
    st.lists(
        st.sampled_from(["ro", "rw", "nosuid", "rbind", "bind", "rshared", "shared", "rslave"]), unique=True
    ),
)
LISTS_OF_CAPABILITIES = st.lists(st.sampled_from(CAPABILITIES), unique=True, max_size=6)
PROCESSES = st.fixed_dictionaries(
    {"args": st.lists(st.sampled_from(["/sbin/init", "sh", "-c", "systemd"]), min_size=1, max_size=3)},
    optional={
        "user": st.fixed_dictionaries({"uid": st.sampled_from([0, 1000]), "gid": st.just(0)}),
        "env": st.lists(st.sampled_from(["PATH=/bin", "container=podman", "A=b"]), unique=True),
        "capabilities": st.dictionaries(
            st.sampled_from(["bounding", "effective", "permitted", "inheritable", "ambient"]),
            LISTS_OF_CAPABILITIES,
        ),
        "apparmorProfile": st.sampled_from(["docker-default", "mine", ""]),
    },
)
KINDS = st.lists(st.sampled_from(["network", "ipc", "uts", "user", "cgroup"]), unique=True)
SPECS = st.builds(
    lambda kinds, process, mounts, linux, hooks: {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": process,
        "mounts": mounts,
        "linux": {"namespaces": [{"type": kind} for kind in ["pid", "mount", *kinds]], **linux},
        **hooks,
    },
    KINDS,
    PROCESSES,
    st.lists(MOUNTS, max_size=6),
    st.fixed_dictionaries(
        {},
        optional={
            "seccomp": PROFILES,
            "maskedPaths": st.lists(st.sampled_from(["/proc/kcore", "/sys/firmware"]), unique=True),
            "readonlyPaths": st.lists(st.sampled_from(["/proc/sys", "/proc/bus"]), unique=True),
            "rootfsPropagation": st.sampled_from(["shared", "rslave", "private"]),
            "sysctl": st.just({"net.ipv4.ping_group_range": "0 2147483647", "kernel.x": "1"}),
        },
    ),
    st.sampled_from([{}, {"hooks": {"createRuntime": [{"path": "/theirs"}], "prestart": [{"path": "/p"}]}}]),
)
SETTINGS = st.builds(
    Settings, honor_caps=st.sampled_from([None, True, False]), systemd=st.sampled_from([None, True, False])
)
HOSTS = st.builds(
    lambda cgroup2, wait, honor: Host(
        **{**HOST.__dict__, "cgroup2": cgroup2, "wait_killable": wait, "honor_caps": honor}
    ),
    st.sampled_from([None, "/sys/fs/cgroup/unified/x"]),
    st.booleans(),
    st.booleans(),
)


@given(SPECS, SETTINGS, HOSTS)
def test_it_is_idempotent_and_leaves_what_it_was_given(spec: Json, settings: Settings, host: Host) -> None:
    before = copy.deepcopy(spec)
    once = rewrite(spec, settings, host)
    assert spec == before
    assert rewrite(once, settings, host) == once
    json.dumps(once)


@given(SPECS, SETTINGS, HOSTS)
def test_what_every_container_gets(spec: Json, settings: Settings, host: Host) -> None:
    new = rewrite(spec, settings, host)
    kinds = [n["type"] for n in new["linux"]["namespaces"]]
    assert {"user", "cgroup", "pid", "mount"} <= set(kinds)
    assert len(kinds) == len(set(kinds))
    if "user" not in [n["type"] for n in spec["linux"]["namespaces"]]:
        assert new["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 200000, "size": 65536}]
        assert new["linux"]["gidMappings"] == [{"containerID": 0, "hostID": 300000, "size": 65536}]
    else:
        assert "uidMappings" not in new["linux"]
    assert new["linux"]["maskedPaths"] == new["linux"]["readonlyPaths"] == []
    assert new["linux"]["seccomp"]["listenerPath"] == host.listener
    for name in ("createRuntime", "poststop"):
        assert new["hooks"][name][-1] == {"path": "/bin/hook", "args": ["/bin/hook", name]}
        assert len(new["hooks"][name]) == len((spec.get("hooks") or {}).get(name, [])) + 1
    for mount in new["mounts"]:
        assert not {"shared", "rshared"} & set(mount["options"])
        if mount["type"] in ("sysfs", "cgroup"):
            assert "ro" not in mount["options"]
    if (spec["linux"].get("sysctl")) is not None:
        assert new["linux"]["sysctl"] == {"net.ipv4.ping_group_range": "0 65535", "kernel.x": "1"}


@given(SPECS, SETTINGS, HOSTS)
def test_nothing_that_a_manager_mounts_is_lost(spec: Json, settings: Settings, host: Host) -> None:
    new = rewrite(spec, settings, host)
    kept = [m["destination"] for m in new["mounts"]]
    own_ipc = any(n["type"] == "ipc" for n in spec["linux"]["namespaces"])
    wanted = [m["destination"] for m in spec["mounts"] if own_ipc or m["type"] != "mqueue"]
    added = ["/dev/kmsg", "/run", "/run/lock"]
    positions = iter(kept)
    assert all(any(destination == one for one in positions) for destination in wanted), (
        "in the manager's order"
    )
    assert len(kept) - len(wanted) <= len(added)
    if is_systemd(spec, settings):
        assert {"/run", "/run/lock"} <= set(kept)
        # A tmpfs of ours never hides what the manager put below it.
        first = kept.index("/run")
        if "/run" not in wanted:
            assert not any(d.startswith("/run/") for d in kept[:first])


# ---- seccomp ----


def said_of(profile: Json, name: str) -> list[tuple[str, str]]:
    return [
        (r["action"], json.dumps(r.get("args"))) for r in profile.get("syscalls", []) if name in r["names"]
    ]


@given(PROFILES, st.booleans(), st.booleans())
def test_a_profile_is_not_weakened_beyond_the_tables(profile: Json, system: bool, wait: bool) -> None:
    new = merge(profile, "/s", system=system, wait_killable=wait)
    tables = {*TRAPPED, *MOUNT_FAMILY, *(SYSTEM_CALLS if system else ())}
    for name in {n for r in profile.get("syscalls", []) for n in r["names"]} - tables:
        assert said_of(new, name) == said_of(profile, name)
    assert new["defaultAction"] == profile["defaultAction"]
    assert new.get("architectures") == profile.get("architectures")
    assert set(profile.get("flags", [])) <= set(new.get("flags", []))
    for name in TRAPPED:
        assert {action for action, _ in said_of(new, name)} == {"SCMP_ACT_NOTIFY"}
        # Next to a default that refuses, a call that is trapped for some arguments would be refused for the others.
        if profile["defaultAction"] != "SCMP_ACT_ALLOW":
            assert said_of(new, name) == [("SCMP_ACT_NOTIFY", "null")]
    assert (WAIT_KILLABLE_RECV in new.get("flags", [])) == (
        wait or WAIT_KILLABLE_RECV in profile.get("flags", [])
    )
    assert merge(new, "/s", system=system, wait_killable=wait) == new


def test_without_a_profile_it_is_the_fragment() -> None:
    assert merge(None, "/s", system=True) == oci_fragment("/s")


@pytest.mark.parametrize(
    "profile",
    [
        {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/theirs"},
        {"defaultAction": "SCMP_ACT_NOTIFY"},
        {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["bpf"], "action": "SCMP_ACT_NOTIFY"}]},
    ],
)
def test_a_second_listener_is_a_clear_error(profile: Json) -> None:
    with pytest.raises(ContainerError, match="has a listener of its own"):
        merge(profile, "/s", system=True)


# ---- capabilities, privileged, refusals ----


def test_capabilities_by_user_and_by_honor_caps() -> None:
    few = {name: ["CAP_CHOWN"] for name in ("bounding", "effective", "permitted", "inheritable")}
    root = rewrite_process({"capabilities": few, "user": {"uid": 0}}, False, CAPABILITIES, "relax")
    assert root["capabilities"] == {
        **dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
        "inheritable": [],
    }
    user = rewrite_process({"capabilities": few, "user": {"uid": 5}}, False, CAPABILITIES, "relax")
    assert user["capabilities"] == {**few, "bounding": CAPABILITIES}
    kept = rewrite_process(
        {"capabilities": few, "apparmorProfile": "docker-default"}, True, CAPABILITIES, "keep"
    )
    assert kept == {"capabilities": few, "apparmorProfile": "docker-default"}
    relaxed = rewrite_process({"apparmorProfile": "docker-default"}, True, CAPABILITIES, "relax")
    assert relaxed == {"apparmorProfile": "unconfined"}
    assert rewrite_process({"apparmorProfile": "mine"}, True, CAPABILITIES, "relax") == {
        "apparmorProfile": "mine"
    }


def test_selinux_labels_stay() -> None:
    labels = {"selinuxLabel": "system_u:system_r:container_t:s0:c1,c2"}
    for honor in (True, False):
        assert rewrite_process(dict(labels), honor, CAPABILITIES, "relax").items() >= labels.items()
    mounts = {"mountLabel": "system_u:object_r:container_file_t:s0:c1,c2"}
    namespaces = {"namespaces": [{"type": "pid"}, {"type": "mount"}]}
    new = rewrite({"process": dict(labels), "linux": {**mounts, **namespaces}}, Settings(), HOST)
    assert new["process"].items() >= labels.items()
    assert new["linux"].items() >= mounts.items()


def privileged() -> Json:
    return {
        "process": {"capabilities": {"bounding": list(CAPABILITIES)}},
        "mounts": [{"destination": "/dev", "type": "tmpfs"}],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network"}],
            "devices": [{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}],
            "resources": {"devices": [{"allow": True, "access": "rwm"}]},
        },
    }


def test_privileged_is_refused_or_made_a_system_container() -> None:
    assert is_privileged(privileged())
    with pytest.raises(ContainerError, match="privileged containers are refused"):
        rewrite(privileged(), Settings(), HOST)
    new = rewrite(privileged(), Settings(), Host(**{**HOST.__dict__, "privileged": "system"}))
    assert new["linux"]["devices"] == []
    assert new["linux"]["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    assert not is_privileged(new)


@pytest.mark.parametrize("namespaces", [["mount"], ["pid"], [("pid", "/proc/1/ns/pid"), "mount"]])
def test_shared_namespaces_that_cannot_be_are_refused(namespaces: list[Any]) -> None:
    listed = [{"type": n} if isinstance(n, str) else {"type": n[0], "path": n[1]} for n in namespaces]
    with pytest.raises(ContainerError, match=r"needs a (pid|mount) namespace of its own"):
        rewrite({"linux": {"namespaces": listed}}, Settings(), HOST)


def test_proc_sys_is_left_to_the_view() -> None:
    spec = {"linux": {"maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys/", "/proc/bus"]}}
    assert kept_paths(spec) == (["/proc/kcore"], ["/proc/bus"])


# ---- settings ----


def test_settings_are_read_from_both_and_annotations_win() -> None:
    environment = ["PATH=/bin", "INTERCEPTOR_HONOR_CAPS=true", "INTERCEPTOR_SKIP_ID_SHIFT=/a,/b"]
    annotations = {"io.interceptor.honor_caps": "false", "other": "x"}
    assert read_settings(annotations, environment) == Settings(honor_caps=False, skip_id_shift=("/a", "/b"))
    assert read_settings(None, None) == Settings()
    assert {read_settings({"io.interceptor.ownership": o}, []).ownership for o in OWNERSHIPS} == set(
        OWNERSHIPS
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("INTERCEPTOR_HONER_CAPS=true", "INTERCEPTOR_HONER_CAPS: unknown setting"),
        ("INTERCEPTOR_HONOR_CAPS=yes", "INTERCEPTOR_HONOR_CAPS: 'yes' cannot be used; allowed: true, false"),
        ("INTERCEPTOR_HONOR_CAPS", "INTERCEPTOR_HONOR_CAPS: '' cannot be used"),
        ("INTERCEPTOR_OWNERSHIP=magic", "allowed: auto, idmapped, shiftfs, clone, none"),
        ("INTERCEPTOR_SKIP_ID_SHIFT=a", "allowed: absolute paths"),
    ],
)
def test_wrong_settings_are_refused_by_name(entry: str, message: str) -> None:
    with pytest.raises(ContainerError, match=message):
        read_settings({}, [entry])


# ---- the command line ----

LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                'runtime = "crun"',
                "runtime='x'",
                'runtime_dir = "/run/a"  ',
                'runtime = "a\\tb"',
                '"runtime" = "q"',
                'runtime_dir = "/x" # why',
                "id_count = 5",
                '# runtime = "no"',
                "[table]",
                'subuid = """',
                "ownership_strategies = [",
                "]",
            ]
        ),
        st.text(st.characters(codec="ascii"), max_size=20),
    ),
    max_size=6,
)


@given(LINES)
@example(['"runtime" = "q"'])
@example(['"\\u0072untime" = "q"'])
def test_a_configuration_that_is_read_without_a_parser_is_read_alike(lines: list[str]) -> None:
    text = "\n".join(lines)
    plain = plain_values(text.encode())
    try:
        whole = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return  # the daemon, which reads the same file, refuses it
    if plain is not None and not any(isinstance(value, dict) for value in whole.values()):
        assert plain == {key: whole[key] for key in ("runtime", "runtime_dir") if key in whole}


def test_what_containerd_says_is_understood() -> None:
    words = [
        "--root",
        "/r",
        "--log",
        "/l",
        "--log-format",
        "json",
        "create",
        "--bundle",
        "/b",
        "--pid-file",
        "/p",
        "--console-socket",
        "/c",
        "ID",
    ]
    line = commandline.parse(["--interceptor-config", "/etc/x", *words])
    assert (line.config, line.command, line.container) == ("/etc/x", "create", "ID")
    assert (line.value("--root"), line.value("--bundle", "-b"), line.words) == ("/r", "/b", words)
    line = commandline.parse(["--root=/r", "exec", "--process", "/p", "--detach", "ID"])
    assert line.value("--root") == "/r"
    assert line.replaced("--process", "/q") == ["--root=/r", "exec", "--process", "/q", "--detach", "ID"]
    line = commandline.parse(["exec", "-e", "A=b", "ID", "kill", "--all"])
    assert [word for _, word in line.arguments] == ["ID", "kill", "--all"]
    assert commandline.parse(["--version"]).command is None


@given(st.lists(st.text(max_size=12), max_size=8))
def test_any_command_line_passes_through(words: list[str]) -> None:
    ours = commandline.OUR_CONFIG
    kept = [word for word in words if not word.startswith(ours)]
    assert commandline.parse(kept).words == kept
