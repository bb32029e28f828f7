/* Mount tables, and what must be true of them, by filesystem identity alone. */
#include "engine.h"

#include <stdarg.h>

enum { LOCKABLE = MOUNT_ATTR_RDONLY | 2 | 4 | 8 /* nosuid, nodev, noexec */ };

struct managed {
	uint64_t magic;
	const char *path;
	bool read_only;                /* the kernel's own node, but read-only */
	bool covered;                  /* in this container */
};

static struct managed managed[] = {
	{IX_PROC_SUPER_MAGIC, "uptime", false, false}, {IX_PROC_SUPER_MAGIC, "swaps", false, false},
	{IX_PROC_SUPER_MAGIC, "sys", false, false}, {IX_PROC_SUPER_MAGIC, "kcore", false, false},
	{IX_PROC_SUPER_MAGIC, "bus", true, false}, {IX_PROC_SUPER_MAGIC, "irq", true, false},
	{IX_SYSFS_MAGIC, "kernel", false, false}, {IX_SYSFS_MAGIC, "devices/virtual", false, false},
	{IX_SYSFS_MAGIC, "module/nf_conntrack/parameters", false, false}, {IX_SYSFS_MAGIC, "firmware", false, false},
};
enum { MANAGED = sizeof(managed) / sizeof(managed[0]) };

void report(const char *format, ...)
{
	int at = atomic_fetch_add(&shared->wrong, 1);
	if (at >= 8)
		return;
	va_list arguments;
	int n = snprintf(shared->text[at], sizeof(shared->text[at]), "step %d: ", atomic_load(&shared->step));
	va_start(arguments, format);
	vsnprintf(shared->text[at] + n, sizeof(shared->text[at]) - (size_t)n, format, arguments);
	va_end(arguments);
}

uint64_t namespace_of(int pid)
{
	char name[32];
	uint64_t id = 0;
	snprintf(name, sizeof(name), "%d/ns/mnt", pid);
	cleanup_close int fd = openat(proc_fd, name, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || ix_mntns_id(fd, &id) < 0)
		return 0;
	return id;
}

static const char *keep(struct table *table, const char *text)
{
	size_t n = strlen(text) + 1;
	if (table->used + n > sizeof(table->arena))
		abort();
	char *at = table->arena + table->used;
	memcpy(at, text, n);
	table->used += n;
	return at;
}

static int read_mount(struct table *table, uint64_t id, uint64_t namespace)
{
	struct {
		struct ix_statmount sm;
		char strings[3 * PATH_MAX];
	} info;
	const uint64_t mask = IX_STATMOUNT_SB_BASIC | IX_STATMOUNT_MNT_BASIC | IX_STATMOUNT_MNT_ROOT | IX_STATMOUNT_MNT_POINT;
	int r = ix_statmount(id, namespace, mask, &info, sizeof(info));
	if (r < 0)
		return r;
	if (table->count == MOUNTS_MAX)
		return -E2BIG;
	const struct ix_statmount *s = &info.sm;
	table->mounts[table->count++] = (struct mount){
		.id = s->mnt_id,
		.parent = s->mnt_parent_id,
		.magic = s->sb_magic,
		.attributes = s->mnt_attr,
		.major = s->sb_dev_major,
		.minor = s->sb_dev_minor,
		.root = keep(table, s->mask & IX_STATMOUNT_MNT_ROOT ? s->str + s->mnt_root : ""),
		.point = s->mask & IX_STATMOUNT_MNT_POINT && s->str[s->mnt_point] ? keep(table, s->str + s->mnt_point) : NULL,
	};
	return 0;
}

/* Every mount of a namespace (0: the caller's) that is below its root. Returns how many; -errno if it is gone, or has
 * more than there is room for. */
int read_table(struct table *table, uint64_t namespace)
{
	uint64_t ids[256], last = 0;
	table->count = 0;
	table->used = 0;
	for (;;) {
		int64_t n = ix_listmount(UINT64_MAX, namespace, last, ids, 256);
		if (n < 0)
			return (int)n;
		for (int64_t i = 0; i < n; i++) {
			int r = read_mount(table, last = ids[i], namespace);
			if (r < 0 && r != -ENOENT)
				return r;
		}
		if (n < 256)
			return table->count;
	}
}

/* They come in the order of their IDs. */
const struct mount *find_mount(const struct table *table, uint64_t id)
{
	int low = 0, high = table->count - 1;
	while (low <= high) {
		int middle = (low + high) / 2;
		if (table->mounts[middle].id == id)
			return &table->mounts[middle];
		if (table->mounts[middle].id < id)
			low = middle + 1;
		else
			high = middle - 1;
	}
	return NULL;
}

/* Whether `path` is `top` or below it; both without slashes at their ends, and everything is below "". */
static bool within(const char *path, const char *top)
{
	size_t n = strlen(top);
	return n == 0 || (strncmp(path, top, n) == 0 && (path[n] == '/' || path[n] == '\0'));
}

static const char *inside(const char *root)
{
	return root + strspn(root, "/");
}

/* Where, within its filesystem, a mount stands on another; false if that cannot be said. */
static bool place_on(const struct mount *base, const struct mount *mount, char *out, size_t size)
{
	if (!base->point || !mount->point)
		return false;
	size_t n = strcmp(base->point, "/") == 0 ? 0 : strlen(base->point);
	if (strncmp(mount->point, base->point, n) != 0)
		return false;
	const char *top = inside(base->root), *rest = inside(mount->point + n);
	return (size_t)snprintf(out, size, "%s%s%s", top, *top && *rest ? "/" : "", rest) < size;
}

static bool is_cover(const struct mount *mount, const struct managed *m)
{
	if (m->read_only && mount->magic == m->magic)
		return mount->attributes & MOUNT_ATTR_RDONLY;
	return (mount->major == shared->view_major && mount->minor == shared->view_minor) ||
	       (mount->major == shared->shield_major && mount->minor == shared->shield_minor);
}

static bool is_covered(const struct table *table, const struct mount *base, const struct managed *m)
{
	char place[PATH_MAX];
	for (const struct mount *c = table->mounts; c < table->mounts + table->count; c++)
		if (c->parent == base->id && is_cover(c, m) && place_on(base, c, place, sizeof(place)) && *place &&
		    within(m->path, place))
			return true;
	return false;
}

/* Which of the managed paths are covered at all: what the kernel does not have needs no cover. */
void learn_managed(const struct table *table)
{
	for (struct managed *m = managed; m < managed + MANAGED; m++)
		for (int i = 0; i < table->count; i++)
			if (table->mounts[i].magic == m->magic && strcmp(table->mounts[i].root, "/") == 0)
				m->covered = is_covered(table, &table->mounts[i], m);
	for (int i = 0; i < MANAGED; i++)
		if (!managed[i].covered && (i < 3 || i == 6 || i == 7))
			report("%s has no cover to begin with", managed[i].path);
}

static void audit_base(const struct table *table, const struct mount *base)
{
	const char *top = inside(base->root);
	if (!base->point)
		return;
	for (const struct managed *m = managed; m < managed + MANAGED; m++) {
		if (m->magic != base->magic || !m->covered)
			continue;
		if (within(top, m->path)) {
			if (!m->read_only || !(base->attributes & MOUNT_ATTR_RDONLY))
				report("%s is /%s of the kernel's own %s", base->point, top, m->path);
		} else if (within(m->path, top) && !is_covered(table, base, m))
			report("%s (from /%s) has no cover on %s", base->point, top, m->path);
	}
}

void audit(const struct table *table)
{
	for (int i = 0; i < table->count; i++)
		if (table->mounts[i].magic == IX_PROC_SUPER_MAGIC || table->mounts[i].magic == IX_SYSFS_MAGIC)
			audit_base(table, &table->mounts[i]);
}

static bool is_base(const struct mount *m)
{
	return (m->magic == IX_PROC_SUPER_MAGIC || m->magic == IX_SYSFS_MAGIC) && strcmp(m->root, "/") == 0;
}

static bool is_submount(const struct table *table, const struct mount *m)
{
	const struct mount *parent = find_mount(table, m->parent);
	return parent && is_base(parent) &&
	       ((m->major == shared->view_major && m->minor == shared->view_minor) ||
		(m->major == shared->shield_major && m->minor == shared->shield_minor) || m->magic == parent->magic);
}

static void compare_one(const struct table *baseline, const struct table *table, const struct mount *was, const char *where)
{
	const struct mount *now = find_mount(table, was->id);
	bool base = is_base(was), submount = is_submount(baseline, was);
	if (now) {
		uint64_t lost = was->attributes & LOCKABLE & ~now->attributes;
		if (lost)
			report("%s: %s lost flags %#llx", where, was->point, (unsigned long long)lost);
		if (submount && now->parent != was->parent)
			report("%s: the original %s was moved", where, was->point);
	} else if (shared->decides && !baseline->pivoted && (base || submount))
		report("%s: the original %s is gone", where, was->point);
	else if (submount && find_mount(table, was->parent))
		report("%s: the original %s was taken from what it covers", where, was->point);
}

/* Read-only, wherever the same part of the same filesystem is mounted, if it was so wherever it was to begin with. */
static void compare_read_only(const struct table *baseline, const struct table *table, const char *where)
{
	for (const struct mount *m = table->mounts; m < table->mounts + table->count; m++) {
		if (m->attributes & MOUNT_ATTR_RDONLY)
			continue;
		for (int i = 0; i < baseline->count; i++) {
			const struct mount *was = &baseline->mounts[i];
			if (was->major == m->major && was->minor == m->minor && was->attributes & MOUNT_ATTR_RDONLY &&
			    !is_base(was) && within(inside(m->root), inside(was->root)))
				report("%s: %s, which is /%s, is not read-only", where, m->point ? m->point : "?", inside(m->root));
		}
	}
}

bool compare(const struct table *baseline, const struct table *table, const char *where)
{
	bool same = baseline->count == table->count;
	for (int i = 0; i < baseline->count; i++) {
		const struct mount *was = &baseline->mounts[i], *now = find_mount(table, was->id);
		compare_one(baseline, table, was, where);
		same = same && now && now->parent == was->parent && now->attributes == was->attributes && now->point &&
		       was->point && strcmp(now->point, was->point) == 0;
	}
	compare_read_only(baseline, table, where);
	return same;
}
