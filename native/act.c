/*
 * Effects on a caller's behalf, in the caller's mount namespace, with the container's own rights and on descriptors
 * resolved before. Each is noted in the journal before it starts, so that a successor can tell whether it took place.
 */
#include "guard.h"

#define EFFECT_FLAGS (MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)

struct mount_info {
	struct ix_statmount sm;
	char strings[2 * PATH_MAX];
};

int ix_enter(const struct ix_call *call)
{
	/* setns demands a root and working directory of one's own, and a thread just started by this one still shares
	 * them until it runs; when nobody does, this costs nothing. */
	if (unshare(CLONE_FS) < 0)
		return -errno;
	return ix_result(setns(call->mntns, CLONE_NEWNS));
}

void ix_leave(void)
{
	/* A thread that cannot come home would keep the container's mounts alive: better none. */
	if (setns(ix_guard_state.home, CLONE_NEWNS) < 0)
		abort();
}

/* The filesystem type of a mount of the caller's namespace. */
int ix_mount_magic(struct ix_call *call, uint64_t mnt_id, uint64_t *magic)
{
	struct ix_statmount sm;
	if (!ix_open_mount_namespace(call))
		return -ESRCH;
	int r = ix_enter(call);
	if (r < 0)
		return r;
	r = ix_see_mount(mnt_id, IX_STATMOUNT_SB_BASIC, &sm, sizeof(sm));
	ix_leave();
	*magic = sm.sb_magic;
	return r;
}

bool ix_has_mounts_below(struct ix_call *call, uint64_t mnt_id)
{
	uint64_t first;
	if (!ix_open_mount_namespace(call) || ix_enter(call) < 0)
		return false;
	int64_t n = ix_see_below(mnt_id, 0, &first, 1);
	ix_leave();
	return n != 0;
}

/* Side effects only for a caller that still waits; from here on a successor asks the mount table what happened. */
static bool begin(struct ix_call *call, uint32_t act, uint64_t gone_id, uint64_t there_id)
{
	struct ix_slot *slot = call->slot;
	ix_settle(call);
	if (!ix_still_wanted(call))
		return false;
	slot->act = act;
	slot->gone_id = gone_id;
	slot->there_id = there_id;
	__atomic_store_n(&slot->phase, IX_PHASE_ACTING, __ATOMIC_RELEASE);
	return true;
}

/* The truth, which only needs saying; to the call's restart, if it is broken off before. */
struct ix_reply ix_acted(struct ix_call *call, int result)
{
	call->slot->result = result;
	__atomic_store_n(&call->slot->phase, IX_PHASE_ACTED, __ATOMIC_RELEASE);
	return (struct ix_reply){.outcome = IX_HANDLED, .error = -result};
}

static int mount_info(uint64_t id, struct mount_info *info)
{
	int r = ix_see_mount(id, IX_STATMOUNT_MNT_BASIC | IX_STATMOUNT_MNT_POINT, info, sizeof(*info));
	if (r < 0)
		return r;
	return info->sm.mask & IX_STATMOUNT_MNT_POINT ? 0 : -ENOENT;
}

static const char *mount_point(const struct mount_info *info)
{
	return info->sm.str + info->sm.mnt_point;
}

static bool is_mount(int fd, uint64_t id)
{
	struct ix_stat st;
	return fd >= 0 && ix_statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) == 0 && st.mnt_id == id && st.mount_root;
}

/* The root of a mount, by its ID: its path leads there, the ID proves it. Fails if something is mounted on top. */
static int open_mount(uint64_t id, struct mount_info *info)
{
	int r = mount_info(id, info);
	if (r < 0)
		return r;
	cleanup_close int fd = ix_openat2(AT_FDCWD, mount_point(info), O_PATH | O_NOFOLLOW, 0, RESOLVE_NO_MAGICLINKS);
	if (fd < 0)
		return fd;
	return is_mount(fd, id) ? ix_take_fd(&fd) : -EBUSY;
}

/*
 * Lazily unmounts the mount `id`, whose root `fd` is. `.` leads to the top of what is mounted there, so that must be
 * it. What the container mounts there in the very instant is taken in its place; then this fails.
 */
static int detach(int fd, uint64_t id)
{
	struct mount_info info;
	cleanup_close int top = ix_top_of(fd);
	if (!is_mount(top, id))
		return -EBUSY;
	if (fchdir(fd) < 0)
		return -errno;
	int r = ix_umount2(".", MNT_DETACH | UMOUNT_NOFOLLOW);
	if (chdir("/") < 0)
		return -errno;
	return r == 0 && mount_info(id, &info) == 0 ? -EBUSY : r;
}

/* The root of the top one of the mounts stacked on a file's, which alone can be mounted upon it. */
int ix_top_of_file(struct ix_call *call, uint64_t mnt_id)
{
	struct mount_info info;
	uint64_t above;
	if (!ix_open_mount_namespace(call) || ix_enter(call) < 0)
		return -ESRCH;
	while (ix_see_below(mnt_id, 0, &above, 1) > 0)
		mnt_id = above;
	int fd = open_mount(mnt_id, &info);
	ix_leave();
	return fd;
}

static bool listed(const struct ix_answer *answer, uint64_t id)
{
	for (uint32_t i = 0; i < answer->count && i < IX_MAX_IDS; i++)
		if (answer->ids[i] == id)
			return true;
	return false;
}

/* Clones of the container's own mounts on a base, and where they belong within it. */
struct own_mounts {
	int count;
	int trees[IX_MAX_IDS];
	char *places[IX_MAX_IDS];
};

static void drop_own_mounts(struct own_mounts *own)
{
	while (own->count > 0) {
		own->count--;
		ix_close_fd(&own->trees[own->count]);
		free(own->places[own->count]);
	}
}

/* What is not welded to a base and stands on it or on something that is. The welded mounts are listed in the answer;
 * a successor has none and looks at the composite, which has a mount wherever the base has a welded one. */
struct base {
	uint64_t id;
	const char *point;
	const struct ix_answer *answer;
	uint64_t target_id;            /* what stands on it goes with it */
	uint64_t composite_id;
};

/* Whether a mount of the composite, not one of the base that covers it, stands at `point`. */
static bool composite_has(const struct base *base, const char *point)
{
	uint64_t ids[256];
	int64_t n = ix_see_below(base->composite_id, 0, ids, 256);
	while (n-- > 0) {
		struct mount_info info;
		uint64_t at = ids[n];
		if (mount_info(at, &info) < 0 || strcmp(mount_point(&info), point) != 0)
			continue;
		while (at != base->id && at != base->composite_id && mount_info(at, &info) == 0)
			at = info.sm.mnt_parent_id;
		if (at == base->composite_id)
			return true;
	}
	return false;
}

static bool is_welded(const struct base *base, uint64_t id, const char *point)
{
	if (base->answer)
		return listed(base->answer, id);
	return composite_has(base, point);
}

static bool is_own(const struct base *base, uint64_t id, const struct mount_info *info)
{
	struct mount_info above;
	uint64_t parent = info->sm.mnt_parent_id;
	if (id == base->target_id || parent == base->target_id || is_welded(base, id, mount_point(info)))
		return false;
	return parent == base->id || (mount_info(parent, &above) == 0 && is_welded(base, parent, mount_point(&above)));
}

static int collect_own_mounts(const struct base *base, struct own_mounts *own)
{
	uint64_t ids[64], last = 0;
	size_t prefix = strcmp(base->point, "/") == 0 ? 0 : strlen(base->point);
	for (;;) {
		int64_t n = ix_see_below(base->id, last, ids, 64);
		if (n <= 0)
			return (int)n;
		for (int64_t i = 0; i < n; i++) {
			struct mount_info info;
			last = ids[i];
			if (mount_info(ids[i], &info) < 0 || !is_own(base, ids[i], &info))
				continue;
			if (own->count == IX_MAX_IDS)
				return -E2BIG;
			cleanup_close int top = open_mount(ids[i], &info);
			if (top < 0)
				return top;
			int tree = ix_open_tree(top, "", OPEN_TREE_CLONE | AT_RECURSIVE | AT_EMPTY_PATH);
			char *place = tree < 0 ? NULL : strdup(mount_point(&info) + prefix + 1);
			if (!place) {
				ix_close_fd(&tree);
				return -EBUSY;
			}
			own->trees[own->count] = tree;
			own->places[own->count++] = place;
		}
	}
}

static int open_within(int root, const char *place)
{
	return ix_openat2(root, place, O_PATH | O_NOFOLLOW, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
}

static int put_own_mounts(struct own_mounts *own, int composite)
{
	int result = 0;
	for (int i = 0; i < own->count; i++) {
		cleanup_close int at = open_within(composite, own->places[i]);
		int r = at < 0 ? at : ix_move_mount(own->trees[i], "", at, "", EFFECT_FLAGS);
		if (r < 0)
			result = r;
	}
	return result;
}

/* Those that were carried over still stand on the old one, and going with it they would go from its peers too,
 * originals among them. Elsewhere the old one then stays, where its parent has peers or slaves. */
static int detach_old(int old, uint64_t id, const struct own_mounts *own)
{
	if (own->count)
		ix_set_attributes_here(ix_guard_state.proc, old, true, 0, 0, MS_PRIVATE);
	return detach(old, id);
}

/*
 * First beneath the old one, then the container's own mounts onto it, then away with the old one: at no instant is
 * there a gap, and nothing of it shows before it is complete. Kernels before 6.5 leave a gap. What may fail comes
 * first: what stands beneath another mount cannot be taken away alone.
 */
static int replace(int old, const struct base *base, struct own_mounts *own, int composite)
{
	int r = collect_own_mounts(base, own);
	for (int i = 0; i < own->count && r >= 0; i++) {
		cleanup_close int at = open_within(composite, own->places[i]);
		r = at;
	}
	if (r < 0)
		return -EBUSY;
	r = ix_move_mount(composite, "", old, "", EFFECT_FLAGS | MOVE_MOUNT_BENEATH);
	if (r < 0) {
		/* The container's own mounts would be lost on the way: then rather nothing. */
		if (own->count)
			return -EBUSY;
		r = detach(old, base->id);
		return r < 0 ? r : ix_move_mount(composite, "", AT_FDCWD, base->point, MOVE_MOUNT_F_EMPTY_PATH);
	}
	if (put_own_mounts(own, composite) < 0)
		return -EBUSY;
	return detach_old(old, base->id, own);
}

static struct ix_reply act_swap(struct ix_call *call, const struct ix_answer *answer, int composite)
{
	struct mount_info info;
	cleanup_close int base = open_mount(answer->base_id, &info);
	if (base < 0)
		return ix_deny(EBUSY);
	if (!begin(call, IX_ACT_SWAP, answer->base_id, answer->there_id))
		return ix_deny(EINTR);
	struct own_mounts own = {0};
	struct base of = {answer->base_id, mount_point(&info), answer, call->target_stat.mnt_id, 0};
	int r = replace(base, &of, &own, composite);
	drop_own_mounts(&own);
	return ix_acted(call, r);
}

static struct ix_reply act_detach(struct ix_call *call, const struct ix_answer *answer)
{
	if (answer->base_id != call->target_stat.mnt_id)
		return ix_deny(EBUSY);
	if (!begin(call, IX_ACT_DETACH, answer->base_id, 0))
		return ix_deny(EINTR);
	return ix_acted(call, detach(call->target, answer->base_id));
}

/* A copied cover goes, where a composite without it was made ahead. */
static bool swap_alone(struct ix_call *call, uint64_t id, uint64_t namespace_id, struct ix_reply *reply)
{
	struct ix_swap swap;
	if (!ix_describe_swap(id, namespace_id, &swap) || !ix_ahead_of_swap(call, &swap))
		return false;
	*reply = act_swap(call, &call->question->answer, call->question->answer_fd);
	return true;
}

static bool unmount_alone(struct ix_call *call, const struct ix_request *request, uint64_t namespace_id,
			  struct ix_reply *reply)
{
	uint64_t id = request->st->mnt_id;
	switch (ix_fate_of(id, namespace_id)) {
	case IX_FATE_WHOLE:
		*reply = begin(call, IX_ACT_DETACH, id, 0) ? ix_acted(call, detach(call->target, id)) : ix_deny(EINTR);
		return true;
	case IX_FATE_BUSY:
		*reply = ix_let_kernel_run("the container's own mounts keep it busy: EBUSY is the kernel's");
		return true;
	case IX_FATE_WELDED:
		if (ix_guard_state.config.protect_immutable)
			return false;
		ix_cache_put(id, request->op, 0);
		*reply = ix_let_kernel_run("welded: the kernel answers EINVAL");
		return true;
	default:
		return swap_alone(call, id, namespace_id, reply);
	}
}

/* What needs no daemon, because the mount table alone tells all about it. */
bool ix_act_alone(struct ix_call *call, const struct ix_request *request, struct ix_reply *reply)
{
	uint64_t id = request->st->mnt_id, namespace_id;
	bool known, foreign = request->foreign;
	if (ix_mntns_id(call->mntns, &namespace_id) < 0 || ix_enter(call) < 0)
		return false;
	/* The device of a base that is gone is another's by now: of a tmpfs for example, which gets the lowest free number. */
	if (!foreign && ix_cache_is_base(request->st) && !ix_is_of_base_type(id)) {
		ix_cache_put_foreign(request->st);
		foreign = true;
	}
	bool protected = ix_guard_state.config.protect_immutable;
	if (foreign && request->op != IX_OP_DETACH) {
		known = !protected || request->op != IX_OP_UMOUNT;
		*reply = ix_let_kernel_run("a mount of the container's own");
	} else if (request->op == IX_OP_UMOUNT) {
		known = unmount_alone(call, request, namespace_id, reply);
	} else if (request->op == IX_OP_DETACH) {
		known = foreign ? !protected && ix_takes_no_original_along(id, namespace_id)
					 : ix_goes_lazily(id, namespace_id);
		*reply = ix_let_kernel_run("a lazy unmount takes along what is below: no original, and nothing with peers");
	} else {
		known = ix_is_for_the_kernel(id, namespace_id, request->op, request->flags);
		*reply = ix_let_kernel_run("only original bases are held, and a base's flags are its own but for read-only");
	}
	ix_leave();
	return known;
}

static struct ix_reply act_attach(struct ix_call *call, const struct ix_answer *answer, int composite)
{
	if (!begin(call, IX_ACT_ATTACH, 0, answer->there_id))
		return ix_deny(EINTR);
	return ix_acted(call, ix_move_mount(composite, "", call->target, "", EFFECT_FLAGS));
}

/* Whether the kernel allows the flags on the base itself, tried by setting them: it is about to do the same. */
static bool base_takes_flags(const struct ix_call *call)
{
	unsigned long flags = call->args[3];
	if ((flags & MS_MGC_MSK) == MS_MGC_VAL)
		flags &= ~MS_MGC_MSK;
	bool taken = fchdir(call->target) == 0 && ix_mount(NULL, ".", NULL, flags | MS_BIND, NULL) == 0;
	return chdir("/") == 0 && taken;
}

static struct ix_reply act_flags(struct ix_call *call, const struct ix_answer *answer)
{
	struct mount_info base;
	bool read_only = call->args[3] & MS_RDONLY;
	bool was_read_only = mount_info(call->target_stat.mnt_id, &base) == 0 && base.sm.mnt_attr & MOUNT_ATTR_RDONLY;
	if (!base_takes_flags(call))
		return ix_let_kernel_run("flags that the kernel refuses");
	/* A cover may have been made read-only by itself: systemd does that to /proc/sys, and then sets flags on /proc. */
	if (!read_only && !was_read_only)
		return ix_let_kernel_run("the submounts keep what they have");
	for (uint32_t i = 0; i < answer->count && i < IX_MAX_IDS; i++) {
		struct mount_info info;
		cleanup_close int fd = open_mount(answer->ids[i], &info);
		/* What is locked read-only stays so: clearing it fails, as it should. */
		if (fd >= 0)
			ix_set_attributes_here(ix_guard_state.proc, fd, false, read_only ? MOUNT_ATTR_RDONLY : 0,
					       read_only ? 0 : MOUNT_ATTR_RDONLY, 0);
	}
	return ix_let_kernel_run("the base itself: the kernel never weakens a weld");
}

struct ix_reply ix_act(struct ix_call *call, const struct ix_answer *answer, int given)
{
	cleanup_close int fd = given;
	struct ix_reply reply;
	struct ix_stat st;
	/* The device of what is brought here may have been another's before. */
	if (fd >= 0 && ix_statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) == 0)
		ix_cache_forget_foreign(&st);
	if (answer->act == IX_ACT_CONTINUE)
		return ix_let_kernel_run("the daemon's verdict");
	if (answer->act == IX_ACT_GIVE && fd >= 0)
		return (struct ix_reply){.outcome = IX_HANDLED, .give = ix_take_fd(&fd) + 1};
	if (answer->act == IX_ACT_ERROR)
		return ix_deny(answer->error > 0 && answer->error < 4096 ? answer->error : EIO);
	if ((answer->act == IX_ACT_SWAP || answer->act == IX_ACT_ATTACH) && fd < 0)
		return ix_deny(EIO);
	if (ix_enter(call) < 0)
		return ix_let_kernel_run("the caller's mount namespace is gone");
	switch (answer->act) {
	case IX_ACT_DETACH:
		reply = act_detach(call, answer);
		break;
	case IX_ACT_SWAP:
		reply = act_swap(call, answer, fd);
		break;
	case IX_ACT_ATTACH:
		reply = act_attach(call, answer, fd);
		break;
	case IX_ACT_FLAGS:
		reply = act_flags(call, answer);
		break;
	default:
		reply = ix_deny(EIO);
	}
	ix_leave();
	return reply;
}

/* A recursive clone brought the container's own mounts along as well; the welded ones refuse to go. */
static void strip_own_mounts(uint64_t root_id)
{
	uint64_t ids[256];
	int64_t n = ix_see_below(root_id, 0, ids, 256);
	while (n-- > 0) {
		struct mount_info info;
		cleanup_close int fd = open_mount(ids[n], &info);
		if (fd >= 0)
			detach(fd, ids[n]);
	}
}

static struct ix_reply bind_in_namespace(struct ix_call *call, int source)
{
	struct ix_stat st;
	uint64_t below;
	int plain = ix_open_tree(source, "", OPEN_TREE_CLONE | AT_EMPTY_PATH);
	if (plain != -EINVAL) {
		ix_close_fd(&plain);
		return ix_let_kernel_run("nothing welded is below");
	}
	cleanup_close int tree = ix_open_tree(source, "", OPEN_TREE_CLONE | AT_RECURSIVE | AT_EMPTY_PATH);
	if (tree < 0 || ix_statx(tree, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) < 0)
		return ix_let_kernel_run("no tree to clone: the kernel's errno");
	/* In no peer group with what it was cloned from: what is stripped from it must stay there. */
	if (ix_set_attributes_here(ix_guard_state.proc, tree, true, 0, 0, MS_PRIVATE) < 0)
		return ix_let_kernel_run("a clone that cannot be made private: EINVAL is the kernel's");
	if (!S_ISDIR(call->target_stat.mode))
		return ix_deny(ENOTDIR);
	if (ix_see_below(call->target_stat.mnt_id, 0, &below, 1) < 0)
		return ix_let_kernel_run("a mount table that cannot be read, and what to strip with it: EINVAL is the kernel's");
	if (!begin(call, IX_ACT_ATTACH, 0, st.mnt_id))
		return ix_deny(EINTR);
	int r = ix_move_mount(tree, "", call->target, "", EFFECT_FLAGS);
	if (r == 0)
		strip_own_mounts(st.mnt_id);
	return ix_acted(call, r);
}

/* A bind that is not recursive, of something with welded submounts below: they come along, nothing else does. */
struct ix_reply ix_act_bind(struct ix_call *call, int source)
{
	if (ix_enter(call) < 0)
		return ix_let_kernel_run("the caller's mount namespace is gone");
	struct ix_reply reply = bind_in_namespace(call, source);
	ix_leave();
	return reply;
}

struct ix_reply ix_act_attach_held(struct ix_call *call, int tree, uint64_t mnt_id, int to, unsigned int flags)
{
	if (ix_enter(call) < 0)
		return ix_let_kernel_run("the caller's mount namespace is gone");
	struct ix_reply reply = begin(call, IX_ACT_ATTACH, 0, mnt_id)
					? ix_acted(call, ix_move_mount(tree, "", to, "", EFFECT_FLAGS | flags))
					: ix_deny(EINTR);
	ix_leave();
	return reply;
}

/* The composite stands beneath the old base, and only part of the container's own mounts have been carried over. */
static void finish_swap(uint64_t gone_id, uint64_t there_id)
{
	struct mount_info info;
	struct own_mounts own = {0};
	cleanup_close int old = open_mount(gone_id, &info);
	struct base base = {.id = gone_id, .point = mount_point(&info), .composite_id = there_id};
	if (old < 0)
		return;
	if (collect_own_mounts(&base, &own) >= 0 && detach_old(old, gone_id, &own) >= 0) {
		cleanup_close int composite = open_mount(there_id, &info);
		put_own_mounts(&own, composite);
	}
	drop_own_mounts(&own);
}

/* After a guard's death in mid-effect: whether the effect took place, judged by the mount table alone. */
bool ix_act_recover(struct ix_call *call, int *result)
{
	const struct ix_slot *slot = call->slot;
	struct mount_info info;
	if (slot->phase == IX_PHASE_ACTED) {
		*result = slot->result;
		return true;
	}
	if (slot->phase != IX_PHASE_ACTING || ix_enter(call) < 0)
		return false;
	bool there = slot->there_id && mount_info(slot->there_id, &info) == 0;
	bool gone = slot->gone_id && mount_info(slot->gone_id, &info) == -ENOENT;
	if (slot->act == IX_ACT_SWAP && there && !gone)
		finish_swap(slot->gone_id, slot->there_id);
	ix_leave();
	*result = 0;
	return slot->act == IX_ACT_DETACH ? gone : there;
}
