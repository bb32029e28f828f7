/*
 * Copied bases, told from original ones by the mount table: what mounts/lineage.py says of them, for the cases that
 * need nothing else. Whatever is not plain here is asked about.
 */
#include "guard.h"

enum { BELOW_MAX = 64, DEPTH_MAX = 64 };

struct seen {
	struct ix_statmount sm;
	char strings[2 * PATH_MAX];
};

/* The mount table of this thread's mount namespace: before Linux 6.8 its mountinfo, from the host's procfs. */
static int open_table(void)
{
	return ix_result(openat(ix_guard_state.proc, "thread-self/mountinfo", O_RDONLY | O_CLOEXEC));
}

int ix_see_mount(uint64_t mnt_id, uint64_t mask, void *buf, size_t size)
{
	int r = ix_statmount(mnt_id, 0, mask, buf, size);
	if (r != -ENOSYS)
		return r;
	cleanup_close int table = open_table();
	return table < 0 ? table : ix_mountinfo_look(table, mnt_id, mask, buf, size);
}

int64_t ix_see_below(uint64_t mnt_id, uint64_t last, uint64_t *ids, size_t count)
{
	int64_t n = ix_listmount(mnt_id, 0, last, ids, count);
	if (n != -ENOSYS)
		return n;
	cleanup_close int table = open_table();
	return table < 0 ? table : ix_mountinfo_list(table, mnt_id, last, ids, count);
}

static uint64_t hash(const char *text)
{
	uint64_t h = 0xcbf29ce484222325ULL;
	while (*text)
		h = (h ^ (unsigned char)*text++) * 0x100000001b3ULL;
	return h;
}

void ix_take_facts(const struct ix_facts *facts)
{
	if (facts->bases > IX_FACT_BASES || facts->covers[0] > IX_FACT_COVERS || facts->covers[1] > IX_FACT_COVERS)
		return;
	pthread_mutex_lock(&ix_guard_state.cache_lock);
	ix_guard_state.facts = *facts;
	pthread_mutex_unlock(&ix_guard_state.cache_lock);
}

static struct ix_facts facts_now(void)
{
	pthread_mutex_lock(&ix_guard_state.cache_lock);
	struct ix_facts facts = ix_guard_state.facts;
	pthread_mutex_unlock(&ix_guard_state.cache_lock);
	return facts;
}

/* Of this thread's mount namespace. */
static bool look(uint64_t mnt_id, struct seen *m)
{
	const uint64_t wanted = IX_STATMOUNT_SB_BASIC | IX_STATMOUNT_MNT_BASIC | IX_STATMOUNT_MNT_ROOT | IX_STATMOUNT_MNT_POINT;
	return ix_see_mount(mnt_id, wanted, m, sizeof(*m)) == 0 && (m->sm.mask & wanted) == wanted;
}

bool ix_is_of_base_type(uint64_t mnt_id)
{
	struct seen m;
	return !look(mnt_id, &m) || m.sm.sb_magic == IX_PROC_SUPER_MAGIC || m.sm.sb_magic == IX_SYSFS_MAGIC;
}

/* Without peers nothing that happens on it happens elsewhere, too. */
static bool is_shared(uint64_t mnt_id)
{
	struct ix_statmount sm;
	return ix_see_mount(mnt_id, IX_STATMOUNT_MNT_BASIC, &sm, sizeof(sm)) < 0 || sm.mnt_peer_group != 0;
}

static const char *point_of(const struct seen *m)
{
	return m->sm.str + m->sm.mnt_point;
}

/* Of procfs and sysfs: 0 and 1, as in struct ix_facts. */
static int kind_of_base(const struct seen *m)
{
	if (strcmp(m->sm.str + m->sm.mnt_root, "/") != 0)
		return -1;
	return m->sm.sb_magic == IX_PROC_SUPER_MAGIC ? 0 : m->sm.sb_magic == IX_SYSFS_MAGIC ? 1 : -1;
}

/*
 * How many mounts are at the root of the namespace, above this one: one more on a root that was pivoted away. What is
 * beneath the top one cannot be reached and has no mount point; at the bottom is the kernel's own, which does not count.
 */
static uint32_t roots_above(const struct seen *m)
{
	uint64_t id = m->sm.mnt_parent_id;
	uint32_t roots = 0;
	for (int depth = 0; depth < DEPTH_MAX; depth++) {
		struct seen at;
		if (ix_see_mount(id, IX_STATMOUNT_MNT_BASIC | IX_STATMOUNT_MNT_POINT, &at, sizeof(at)) < 0 ||
		    at.sm.mnt_parent_id == id)
			break;
		roots += !(at.sm.mask & IX_STATMOUNT_MNT_POINT) || strcmp(point_of(&at), "/") == 0;
		id = at.sm.mnt_parent_id;
	}
	return roots;
}

/* In a namespace cloned from the first one an original has another ID, and stands where the first one's stands. */
static bool may_be_original(const struct ix_facts *facts, const struct seen *m, uint64_t namespace_id)
{
	for (uint32_t i = 0; i < facts->bases; i++) {
		const struct ix_original *o = &facts->base[i];
		if (o->dev_major != m->sm.sb_dev_major || o->dev_minor != m->sm.sb_dev_minor)
			continue;
		if (namespace_id == facts->namespace_id ? o->mnt_id == m->sm.mnt_id
							: o->point == hash(point_of(m)) && roots_above(m) <= facts->roots)
			return true;
	}
	return false;
}

static bool is_managed(const struct ix_facts *facts, int kind, uint64_t path)
{
	for (uint32_t i = 0; i < facts->covers[kind]; i++)
		if (facts->cover[kind][i] == path)
			return true;
	return false;
}

/* What is on a base: the first mount on each managed path, which is welded to it, and what else. */
enum load { LOAD_COVERS, LOAD_OWN, LOAD_UNCLEAR };

static enum load load_of(const struct ix_facts *facts, const struct seen *base)
{
	uint64_t ids[BELOW_MAX], points[BELOW_MAX];
	int64_t n = ix_see_below(base->sm.mnt_id, 0, ids, BELOW_MAX);
	size_t prefix = strcmp(point_of(base), "/") == 0 ? 0 : strlen(point_of(base));
	enum load load = n < 0 || n == BELOW_MAX ? LOAD_UNCLEAR : LOAD_COVERS;
	for (int64_t i = 0; i < n && load != LOAD_OWN; i++) {
		struct seen m;
		if (!look(ids[i], &m) || strlen(point_of(&m)) <= prefix)
			return LOAD_UNCLEAR;
		points[i] = hash(point_of(&m));
		bool on_base = m.sm.mnt_parent_id == base->sm.mnt_id;
		if (!is_managed(facts, kind_of_base(base), hash(point_of(&m) + prefix + 1)))
			load = on_base ? LOAD_OWN : LOAD_UNCLEAR;
		for (int64_t k = 0; k < i && !on_base; k++)
			on_base = m.sm.mnt_parent_id == ids[k] && points[k] != points[i];
		if (!on_base)
			load = LOAD_UNCLEAR;
	}
	return load;
}

/*
 * Whether a lazy unmount takes no original base along, and none that has peers: what stands in its place elsewhere, an
 * original perhaps, would go as well (mounts/lineage.py:reaches).
 */
bool ix_takes_no_original_along(uint64_t mnt_id, uint64_t namespace_id)
{
	struct ix_facts facts = facts_now();
	uint64_t ids[BELOW_MAX], last = 0;
	int64_t n;
	if (facts.namespace_id == 0)
		return false;
	while ((n = ix_see_below(mnt_id, last, ids, BELOW_MAX)) > 0)
		for (int64_t i = 0; i < n; i++) {
			struct seen m;
			last = ids[i];
			if (!look(last, &m))
				return false;
			if (kind_of_base(&m) >= 0 && (is_shared(m.sm.mnt_parent_id) || may_be_original(&facts, &m, namespace_id)))
				return false;
		}
	return n == 0;
}

/* A base takes its submounts along into being read-only, and out of it; else flags are its own affair. */
static bool keeps_submounts(const struct seen *m, uint64_t flags)
{
	return !(flags & MS_RDONLY) && !(m->sm.mnt_attr & MOUNT_ATTR_RDONLY);
}

/* Whether mounts/policy.py leaves the remount or the move to the kernel, whatever else is true. */
bool ix_is_for_the_kernel(uint64_t mnt_id, uint64_t namespace_id, enum ix_op op, uint64_t flags)
{
	struct ix_facts facts = facts_now();
	struct seen m;
	if (facts.namespace_id == 0 || (op != IX_OP_REMOUNT && op != IX_OP_MOVE) || !look(mnt_id, &m))
		return false;
	bool of_a_base = m.sm.sb_magic == IX_PROC_SUPER_MAGIC || m.sm.sb_magic == IX_SYSFS_MAGIC;
	if (op == IX_OP_REMOUNT)
		return !of_a_base || (kind_of_base(&m) >= 0 && keeps_submounts(&m, flags));
	return kind_of_base(&m) < 0 || !may_be_original(&facts, &m, namespace_id);
}

static bool is_shield(const struct seen *m)
{
	const struct ix_guard_config *c = &ix_guard_state.config;
	return m->sm.sb_dev_major == c->shield_major && m->sm.sb_dev_minor == c->shield_minor &&
	       strncmp(m->sm.str + m->sm.mnt_root, "/shield", strlen("/shield")) == 0;
}

/* A base that is a copy without doubt, and on which an unmount has no effect elsewhere. */
static bool is_plain_copy(const struct ix_facts *facts, const struct seen *base, uint64_t namespace_id)
{
	return facts->namespace_id != 0 && kind_of_base(base) >= 0 && !may_be_original(facts, base, namespace_id) &&
	       base->sm.mnt_parent_id != base->sm.mnt_id && !is_shared(base->sm.mnt_parent_id);
}

static bool note_shield(struct ix_swap *swap, uint64_t path)
{
	if (swap->shields == IX_AHEAD_SHIELDS)
		return false;
	swap->shield[swap->shields++] = path;
	return true;
}

/* Goes through what is below a base. False for what is not plain: covers on covers, the container's own on the target. */
static bool describe_covers(const struct ix_facts *facts, const struct seen *base, const struct seen *target,
			    struct ix_swap *swap)
{
	uint64_t ids[BELOW_MAX], points[BELOW_MAX];
	int64_t n = ix_see_below(base->sm.mnt_id, 0, ids, BELOW_MAX);
	size_t prefix = strlen(point_of(base)), length = strlen(point_of(target));
	bool found = false;
	if (n < 0 || n == BELOW_MAX || prefix == 1)
		return false;
	for (int64_t i = 0; i < n; i++) {
		struct seen m;
		if (!look(ids[i], &m) || strlen(point_of(&m)) <= prefix)
			return false;
		uint64_t path = hash(point_of(&m) + prefix + 1);
		points[i] = path;
		if (ids[i] == target->sm.mnt_id) {
			found = m.sm.mnt_parent_id == base->sm.mnt_id && is_managed(facts, kind_of_base(base), path);
			if (!found || !note_shield(swap, path))
				return false;
			continue;
		}
		if (strncmp(point_of(&m), point_of(target), length) == 0 &&
		    (point_of(&m)[length] == '\0' || point_of(&m)[length] == '/'))
			return false;
		if (!is_managed(facts, kind_of_base(base), path))
			continue;
		for (int64_t k = 0; k < i; k++)
			if (points[k] == path)
				return false;
		if (m.sm.mnt_parent_id != base->sm.mnt_id || swap->count == IX_MAX_IDS || (is_shield(&m) && !note_shield(swap, path)))
			return false;
		swap->ids[swap->count++] = ids[i];
	}
	return found;
}

/* What verdicts.py:Answerer._replace_base would say of a cover that is to go; false where that must be asked. */
bool ix_describe_swap(uint64_t mnt_id, uint64_t namespace_id, struct ix_swap *swap)
{
	struct ix_facts facts = facts_now();
	struct seen target, base;
	if (!look(mnt_id, &target) || is_shield(&target) || !look(target.sm.mnt_parent_id, &base) ||
	    !is_plain_copy(&facts, &base, namespace_id))
		return false;
	*swap = (struct ix_swap){
		.base_id = base.sm.mnt_id, .dev_major = base.sm.sb_dev_major, .dev_minor = base.sm.sb_dev_minor,
		.attributes = base.sm.mnt_attr,
	};
	return describe_covers(&facts, &base, &target, swap);
}

/*
 * What an unmount of a mount of this thread's mount namespace comes to. A copied base may go with all that is welded to
 * it; what the container has mounted on a base keeps it busy. A shield is welded, or bound elsewhere and the container's.
 */
enum ix_fate ix_fate_of(uint64_t mnt_id, uint64_t namespace_id)
{
	struct ix_facts facts = facts_now();
	struct seen m;
	if (!look(mnt_id, &m))
		return IX_FATE_UNCLEAR;
	if (is_shield(&m))
		return IX_FATE_WELDED;
	if (facts.namespace_id == 0 || kind_of_base(&m) < 0)
		return IX_FATE_UNCLEAR;
	enum load load = load_of(&facts, &m);
	if (load == LOAD_OWN)
		return IX_FATE_BUSY;
	return load == LOAD_COVERS && is_plain_copy(&facts, &m, namespace_id) ? IX_FATE_WHOLE : IX_FATE_UNCLEAR;
}

/* Whether a copied base may go lazily, with whatever is on it. Where the parent has peers, an original could go as well. */
bool ix_goes_lazily(uint64_t mnt_id, uint64_t namespace_id)
{
	struct ix_facts facts = facts_now();
	struct seen base;
	return look(mnt_id, &base) && is_plain_copy(&facts, &base, namespace_id) &&
	       ix_takes_no_original_along(mnt_id, namespace_id);
}
