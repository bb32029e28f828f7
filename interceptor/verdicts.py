"""From a guard's question to its answer: facts from the kernel, class by lineage, verdict by policy, composite from the
workshop. Nothing the guard says about a mount is believed; only its descriptors count.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable, Iterator

from interceptor.ahead import Ahead
from interceptor.containers.registry import Container
from interceptor.errors import InterceptorError, SyscallError
from interceptor.guards.link import MAX_IDS, Act, Answer, Ask, Op
from interceptor.kernel import mount, namespaces, process, stat
from interceptor.kernel.fd import OwnedFd
from interceptor.kernel.flags import MOUNT_ATTR__ATIME, MountAttr
from interceptor.kernel.stat import MountStat
from interceptor.mounts.arguments import SIMPLE_ATTRIBUTES, NewMount
from interceptor.mounts.composite import Composer
from interceptor.mounts.lineage import MountClass, classify, is_base, path_in_fs, reaches, welded_to
from interceptor.mounts.managed import BASE_TYPES
from interceptor.mounts.policy import Circumstances, Deed, Request, Verdict, decide
from interceptor.observe.log import get_logger

_REQUESTS = {
    Op.UMOUNT: Request.UMOUNT,
    Op.DETACH: Request.DETACH,
    Op.MOVE: Request.MOVE,
    Op.REMOUNT: Request.REMOUNT,
    Op.BENEATH: Request.BENEATH,
}
_CHAIN_MAX = 256
#: How many mount namespaces made after a container's first are looked at for originals: no call may take for ever.
_NAMESPACES_MAX = 256
#: How long a context may be in use by another call of the container's: seconds.
_CONTEXT_BUSY_S = 0.005
#: How many descriptors of a question, the first ones, are namespaces.
_NAMESPACES = {Op.NEW: 3, Op.FSOPEN: 2}


class Scene:
    """The mounts around a target in one mount namespace, looked up as needed, each once."""

    def __init__(self, namespace: int) -> None:
        self.namespace = namespace
        self._known: dict[tuple[int, int], MountStat | None] = {}
        self._read: set[int] = set()

    def mount(self, mnt_id: int, namespace: int | None = None) -> MountStat | None:
        where = self.namespace if namespace is None else namespace
        if (mnt_id, where) not in self._known:
            self._look(mnt_id, where)
        return self._known[mnt_id, where]

    def _look(self, mnt_id: int, where: int) -> None:
        if where not in self._read:
            self._read.add(where)
            with contextlib.suppress(SyscallError):
                self._known.update({(n, where): m for n, m in stat.read_at_once(where).items()})
        if (mnt_id, where) not in self._known:
            self._known[mnt_id, where] = stat.find_mount(mnt_id, where)

    def chain(self, mnt_id: int) -> list[MountStat]:
        """The mount and those above it, up to the root of the namespace; empty if it is not in there."""
        chain: list[MountStat] = []
        found = self.mount(mnt_id)
        while found is not None and len(chain) < _CHAIN_MAX:
            chain.append(found)
            if found.parent_id == found.mnt_id:
                break
            found = self.mount(found.parent_id)
        return chain

    def below(
        self, mnt_id: int, pick: stat.Pick | None = None, points: Iterable[bytes] = ()
    ) -> Iterator[MountStat]:
        """Every mount below one, or those picked and maybe others; none where that has gone, or the namespace ended."""
        try:
            ids = stat.listmount(mnt_id, self.namespace, pick, points)
        except SyscallError as error:
            if error.errno != errno.ENOENT:
                raise
            return
        for found in map(self.mount, ids):
            if found is not None:
                yield found

    def bases_below(self, mnt_id: int) -> Iterator[MountStat]:
        """The bases among them."""
        return (m for m in self.below(mnt_id, stat.Pick.BASES) if is_base(m))


class Answerer:
    """Answers questions about one container's mounts."""

    def __init__(self, composer: Composer, ahead: Ahead, protect_immutable: bool) -> None:
        self._composer = composer
        self._ahead = ahead
        self._protect_immutable = protect_immutable
        # Bound once: that costs as much as a system call.
        self._log = get_logger().bind()

    def answer(self, container: Container, ask: Ask) -> Answer:
        """The answer to a question; what cannot be answered is left to the kernel, whose welds hold."""
        about: dict[str, object] = {"container": container.cid, "op": ask.op.name.lower(), "tid": ask.tid}
        try:
            if not _asks_for_its_own(container, ask):
                answer, reason = Answer(Act.CONTINUE), "a namespace that is not the container's"
            elif ask.op is Op.NEW:
                answer, reason = self._new(container, ask)
            elif ask.op is Op.FSOPEN:
                answer, reason = self._fsopen(container, ask)
            elif ask.op is Op.FSMOUNT:
                answer, reason = self._fsmount(container, ask)
            elif ask.op is Op.OPEN_TREE:
                answer, reason = self._open_tree(container, ask)
            else:
                answer, reason = self._existing(container, ask)
        except (InterceptorError, OSError) as error:
            self._log.warning("left to the kernel: what was needed failed", call=str(error), **about)
            return Answer(Act.CONTINUE)
        except Exception:
            # Whatever it is, a caller waits; and the kernel's own answer is always a safe one.
            self._log.exception("left to the kernel: internal error", **about)
            return Answer(Act.CONTINUE)
        if answer.tree is not None and ask.op is not Op.FSOPEN:
            now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            container.note_birth(answer.there_id or stat.statx(answer.tree).mnt_id, now)
        self._log.debug("answered", act=answer.act.name, error=answer.error, reason=reason, **about)
        return answer

    def _new(self, container: Container, ask: Ask) -> tuple[Answer, str]:
        _mount_namespace, pid_namespace, network_namespace = ask.fds
        new = NewMount(
            fstype=b"proc" if ask.kind == 1 else b"sysfs",
            flags=ask.flags,
            source=ask.source,
            hidepid=ask.hidepid,
            subset_pid=ask.subset_pid,
            gid=None if ask.gid is None else process.host_gid(ask.tid, ask.gid),
            sb_flags=ask.sb_flags,
        )
        own, deciding = (
            (container.pidns_ino, pid_namespace)
            if ask.kind == 1
            else (container.netns_ino, network_namespace)
        )
        if os.fstat(deciding.fileno()).st_ino == own:
            self._ahead.asked_for_new(container, ask, new)
        tree = self._composer.fresh(new, container.material, pid_namespace, network_namespace)
        return Answer(Act.ATTACH, there_id=stat.statx(tree).mnt_id, tree=tree), "a welded composite"

    @staticmethod
    def _fsopen(container: Container, ask: Ask) -> tuple[Answer, str]:
        pid_namespace, network_namespace = ask.fds
        if ask.kind == 1:
            context = mount.fsopen_for(b"proc", pid_namespace=pid_namespace)
        else:
            context = mount.fsopen_for(b"sysfs", network_namespace=network_namespace)
        container.contexts.append((context.dup(), b"proc" if ask.kind == 1 else b"sysfs"))
        return Answer(Act.GIVE, tree=context), "a context that is known again at fsmount"

    def _fsmount(self, container: Container, ask: Ask) -> tuple[Answer, str]:
        """A context that `_fsopen` gave, configured by the caller since. No other is touched, and that not for long: a
        call of the container's on it, which locks it, may be waiting for a filesystem of the container's.
        """
        _mount_namespace, context = ask.fds
        known = next((c for c in container.contexts if process.same_file(c[0], context)), None)
        if known is None:
            return Answer(Act.CONTINUE), "a context of a predecessor, or of nobody"
        atime = ask.flags & MOUNT_ATTR__ATIME
        try:
            with process.interrupted_after(_CONTEXT_BUSY_S):
                base = mount.fsmount(context, atime | (ask.flags & MountAttr.MOUNT_ATTR_NODIRATIME))
        except SyscallError as error:
            if error.errno == errno.EBUSY:
                return Answer(Act.ERROR, error=errno.EBUSY), "made already, or not created yet"
            if error.errno == errno.EINTR:
                container.contexts.remove(known)
            raise
        tree = self._composer.over(base, known[1], container.material, ask.flags & SIMPLE_ATTRIBUTES)
        return Answer(Act.GIVE, tree=tree), "welded"

    def _open_tree(self, container: Container, ask: Ask) -> tuple[Answer, str]:
        """A clone, not recursive, of something with welded submounts below: they come along, nothing else does."""
        namespace_fd, target_fd = ask.fds
        scene = Scene(stat.mount_namespace_id(namespace_fd))
        found = stat.statx(target_fd)
        chain = scene.chain(found.mnt_id)
        if not chain or chain[0].fstype not in BASE_TYPES:
            return Answer(Act.CONTINUE), "not in the caller's mount namespace, or no base"
        # The path comes from the kernel; all that it decides is which of our own covers go where.
        inside = chain[0].root.strip(b"/")
        if not found.mount_root:
            inside = path_in_fs(chain[0], os.readlink(os.fsencode(f"/proc/self/fd/{target_fd.fileno()}")))
        shields = _shields(container, chain[0], _welded_on(container, scene, chain[0]))
        tree = self._composer.again(chain[0], inside, shields, container.material)
        return (Answer(Act.GIVE, tree=tree) if tree else Answer(Act.CONTINUE)), "a welded clone"

    def _existing(self, container: Container, ask: Ask) -> tuple[Answer, str]:
        namespace_fd, target_fd = ask.fds
        scene = Scene(stat.mount_namespace_id(namespace_fd))
        target_id = stat.statx(target_fd).mnt_id
        chain = scene.chain(target_id)
        if not chain or target_id != ask.mnt_id:
            return Answer(Act.CONTINUE), "not in the caller's mount namespace"
        kind = classify(chain, container.baseline, scene.namespace)
        request = _REQUESTS[ask.op]
        if kind is MountClass.ORIGINAL_BASE:
            circumstances = Circumstances(locked=_is_nested(container, namespace_fd))
        else:
            circumstances = self.circumstances(container, scene, chain, kind, request)
        verdict = decide(request, kind, circumstances)
        return self._carry_out(container, scene, chain, verdict), f"{kind.value}: {verdict.reason}"

    def circumstances(
        self, container: Container, scene: Scene, chain: list[MountStat], kind: MountClass, request: Request
    ) -> Circumstances:
        """What besides its class decides about ``chain[0]``, asked of the kernel."""
        takes_along = request in (Request.DETACH, Request.BENEATH)
        holds = takes_along and _holds_original(container, scene, chain)
        if request is Request.BENEATH:
            return Circumstances(holds_original=holds)
        if kind is MountClass.COPIED_BASE:
            own = self._own_mounts(container, scene, chain[0])
            return Circumstances(
                _reaches_original(container, scene, [chain]), holds, own, self._protect_immutable
            )
        if kind is MountClass.COPIED_SUBMOUNT:
            base = welded_to(chain, container.baseline.plan)
            above = [m for m in chain if base is not None and len(m.point) <= len(base.point)]
            own = self._own_mounts(container, scene, chain[0])
            reaching = _reaches_original(container, scene, [above])
            return Circumstances(reaching, holds, own, self._protect_immutable)
        if request is Request.DETACH and kind in (MountClass.FREE, MountClass.IMMUTABLE):
            # A lazy unmount takes everything below along, and by propagation what stands at its places elsewhere.
            below = [scene.chain(m.mnt_id) for m in scene.bases_below(chain[0].mnt_id)]
            return Circumstances(
                _reaches_original(container, scene, below), holds, protect_immutable=self._protect_immutable
            )
        return Circumstances(holds_original=holds, protect_immutable=self._protect_immutable)

    def _own_mounts(self, container: Container, scene: Scene, base: MountStat) -> bool:
        return any(not self._is_welded(container, scene, m) for m in scene.below(base.mnt_id))

    @staticmethod
    def _is_welded(container: Container, scene: Scene, found: MountStat) -> bool:
        return welded_to(scene.chain(found.mnt_id), container.baseline.plan) is not None

    def _carry_out(
        self, container: Container, scene: Scene, chain: list[MountStat], verdict: Verdict
    ) -> Answer:
        if verdict.deed is Deed.REFUSE:
            return Answer(Act.ERROR, error=verdict.error, cache=verdict.lasting)
        if verdict.deed is Deed.REMOVE_BASE:
            return Answer(Act.DETACH, base_id=chain[0].mnt_id)
        if verdict.deed is Deed.REPLACE_BASE:
            return self._replace_base(container, scene, chain)
        if verdict.deed is Deed.CARRY_FLAGS:
            ids = [m.mnt_id for m in _welded_on(container, scene, chain[0])]
            return Answer(Act.FLAGS, ids=ids[:MAX_IDS])
        return Answer(Act.CONTINUE, cache=verdict.lasting)

    def _replace_base(self, container: Container, scene: Scene, chain: list[MountStat]) -> Answer:
        """The copied base anew, with a shield where the target stands, and those that stand there already."""
        base = welded_to(chain, container.baseline.plan)
        assert base is not None
        welded = _welded_on(container, scene, base)
        shields = _shields(container, base, welded) | {path_in_fs(base, chain[0].point)}
        tree = self._composer.again(base, base.root.strip(b"/"), shields, container.material)
        if tree is None:
            return Answer(Act.ERROR, error=errno.EINVAL)
        if base.root == b"/":
            self._ahead.asked_for_swap(container, base, frozenset(shields))
        # What stands on the target goes with it; what stands on the others is carried over with them.
        ids = [m.mnt_id for m in welded if m.mnt_id != chain[0].mnt_id]
        there = stat.statx(tree).mnt_id
        return Answer(Act.SWAP, base_id=base.mnt_id, there_id=there, ids=ids[:MAX_IDS], tree=tree)


def _asks_for_its_own(container: Container, ask: Ask) -> bool:
    """Whether the namespaces of a question are the container's own: a guard taken over could send the host's."""
    return all(namespaces.belongs_to(fd, container.userns) for fd in ask.fds[: _NAMESPACES.get(ask.op, 1)])


def _is_nested(container: Container, namespace: OwnedFd) -> bool:
    """Whether a mount namespace belongs to another user namespace than the container's."""
    with namespaces.owner(namespace) as owner:
        return not os.path.samestat(os.fstat(owner.fileno()), os.fstat(container.userns.fileno()))


def _welded_on(container: Container, scene: Scene, base: MountStat) -> list[MountStat]:
    """The welded submounts of a base; not those of copies that the container mounted on top of it."""
    inside, top = base.root.strip(b"/"), base.point.rstrip(b"/")
    paths = container.baseline.plan.paths(base.fstype)
    below = [p for p in paths if not inside or p.startswith(inside + b"/")]
    points = [b"%s/%s" % (top, p.removeprefix(inside).strip(b"/")) for p in below]
    standing = scene.below(base.mnt_id, stat.Pick.POINTS, points)
    return [m for m in standing if _base_of(container, scene, m) == base.mnt_id]


def _holds_original(container: Container, scene: Scene, chain: list[MountStat]) -> bool:
    """Whether an original base stands below ``chain[0]``; not of the root of a mount namespace, which is locked."""
    if chain[0].point == b"/" and not any(m.point == b"/" for m in chain[1:]):
        return False
    return any(
        classify(scene.chain(m.mnt_id), container.baseline, scene.namespace) is MountClass.ORIGINAL_BASE
        for m in scene.bases_below(chain[0].mnt_id)
    )


def _shields(container: Container, base: MountStat, welded: Iterable[MountStat]) -> set[bytes]:
    """Where, within its filesystem, shields stand on a base."""
    shield = container.baseline.shield_dev
    return {path_in_fs(base, m.point) for m in welded if m.dev == shield and m.root.startswith(b"/shield")}


def _base_of(container: Container, scene: Scene, found: MountStat) -> int:
    base = welded_to(scene.chain(found.mnt_id), container.baseline.plan)
    return base.mnt_id if base is not None else 0


def _masters(scenes: Iterable[Iterable[MountStat]]) -> dict[int, int]:
    """The master of each peer group that is a slave of another."""
    return {m.peer_group: m.master for mounts in scenes for m in mounts if m.peer_group and m.master}


def _other_scenes(container: Container, scene: Scene) -> list[Scene]:
    """The container's other mount namespaces, but for the first: what is cloned has originals of its own."""
    known = (scene.namespace, container.baseline.namespace)
    scenes: list[Scene] = []
    try:
        first = namespaces.open_namespace(container.pid, "mnt")
    except OSError:
        return scenes  # its first process has ended, and everything in the container with it
    with first:
        for fd, number in namespaces.other_mount_namespaces(first, _NAMESPACES_MAX):
            if number not in known and namespaces.belongs_to(fd, container.userns):
                scenes.append(Scene(number))
    return scenes


def _originals(
    container: Container, scene: Scene, others: Iterable[Scene]
) -> list[tuple[MountStat, MountStat]]:
    """Original bases with what they are mounted on: the first namespace's, the caller's own, other ones'."""
    baseline = container.baseline
    found = []
    for recorded in baseline.bases():
        original = scene.mount(recorded.mnt_id, baseline.namespace)
        parent = scene.mount(original.parent_id, baseline.namespace) if original is not None else None
        if original is not None and parent is not None:
            found.append((original, parent))
    for cloned in (scene, *others):
        if cloned.namespace == baseline.namespace:
            continue
        for base in cloned.bases_below(stat.LSMT_ROOT):
            chain = cloned.chain(base.mnt_id)
            if len(chain) > 1 and classify(chain, baseline, cloned.namespace) is MountClass.ORIGINAL_BASE:
                found.append((chain[0], chain[1]))
    return found


def _reaches_original(container: Container, scene: Scene, targets: Iterable[list[MountStat]]) -> bool:
    """Whether unmounting any of the targets (each with its chain) would propagate to an original base."""
    shared = [chain for chain in targets if len(chain) > 1 and chain[1].peer_group]
    if not shared:
        return False
    others = _other_scenes(container, scene)
    scenes = (scene, Scene(container.baseline.namespace), *others)
    masters = _masters([s.below(stat.LSMT_ROOT, stat.Pick.BETWEEN) for s in scenes])
    return any(
        reaches(chain[0], chain[1], original, parent, masters)
        for original, parent in _originals(container, scene, others)
        for chain in shared
    )
