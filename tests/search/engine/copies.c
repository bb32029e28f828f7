/* The opposite question: whether everything that a program has mounted can be unmounted again, and in how many calls. */
#include "engine.h"

static struct table now;

static const struct mount *parent_of(const struct table *table, const struct mount *m)
{
	return m->parent == m->id ? NULL : find_mount(table, m->parent);
}

/* What was not there at first, or stands on such a mount. On top of the root no path leads to it. */
static bool is_to_go(const struct table *baseline, const struct table *table, const struct mount *mount)
{
	bool is_new = false;
	if (!mount->point)
		return false;
	for (const struct mount *m = mount; m; m = parent_of(table, m)) {
		if (find_mount(baseline, m->id))
			continue;
		if (!m->point || strcmp(m->point, "/") == 0)
			return false;
		is_new = true;
	}
	return is_new;
}

/* Writes down, as far as there is room, what is still there. */
static int count_to_go(const struct table *baseline, char *text, size_t size)
{
	int count = 0;
	size_t used = 0;
	read_table(&now, 0);
	for (int i = 0; i < now.count; i++) {
		const struct mount *m = &now.mounts[i];
		if (!is_to_go(baseline, &now, m))
			continue;
		count++;
		if (text && used < size)
			used += (size_t)snprintf(text + used, size - used, " %s (%#llx /%s)", m->point,
						 (unsigned long long)m->magic, m->root + 1);
	}
	return count;
}

/* 1: gone. What it was that the path led to is gone as well, if the call said so. */
static bool take_away(struct walk *walk, const char *point)
{
	struct ix_statmount sm;
	uint64_t id = top_mount(point, false);
	walk->calls++;
	int r = ix_umount2(point, UMOUNT_NOFOLLOW);
	if (r < 0) {
		size_t used = strlen(walk->text);
		snprintf(walk->text + used, sizeof(walk->text) - used, " %s: errno %d;", point, -r);
		return false;
	}
	if (id && ix_statmount(id, 0, IX_STATMOUNT_MNT_BASIC, &sm, sizeof(sm)) == 0)
		report("umount2(%s) said 0, and the mount is still there", point);
	return true;
}

/* systemd's umount_recursive(): in the order of the table, and again from its start after every success. */
static void parents_first(struct walk *walk, const struct table *baseline)
{
	bool again = true;
	/* What the last pass says of those that stay is what counts. */
	while (again && walk->calls <= (walk->before + 1) * (walk->before + 1)) {
		again = false;
		walk->text[0] = '\0';
		read_table(&now, 0);
		for (int i = 0; i < now.count && !again; i++)
			if (is_to_go(baseline, &now, &now.mounts[i]))
				again = take_away(walk, now.mounts[i].point);
	}
	if (again)
		report("a storm: %u calls for %u mounts", walk->calls, walk->before);
}

static int depth_of(const struct table *table, const struct mount *m)
{
	int depth = 0;
	while ((m = parent_of(table, m)))
		depth++;
	return depth;
}

/*
 * As umount -R does it: by path, what is on something before that. What is hidden behind something mounted later on an
 * ancestor of it cannot be reached until that is gone: then again, until a pass achieves nothing.
 */
static bool one_pass(struct walk *walk, const struct table *baseline)
{
	static struct table then;
	bool any = false;
	int deepest = 0;
	walk->text[0] = '\0';
	read_table(&then, 0);
	for (int i = 0; i < then.count; i++)
		deepest = depth_of(&then, &then.mounts[i]) > deepest ? depth_of(&then, &then.mounts[i]) : deepest;
	for (int depth = deepest; depth >= 0; depth--)
		for (int i = then.count - 1; i >= 0; i--)
			if (depth_of(&then, &then.mounts[i]) == depth && is_to_go(baseline, &then, &then.mounts[i]))
				any = take_away(walk, then.mounts[i].point) || any;
	return any;
}

static void deepest_first(struct walk *walk, const struct table *baseline)
{
	while (one_pass(walk, baseline))
		if (walk->calls > (walk->before + 1) * (walk->before + 1)) {
			report("a storm: %u calls for %u mounts", walk->calls, walk->before);
			return;
		}
}

/* A program that moved the container's first mounts may have hidden others behind them. */
static bool is_in_place(const struct table *baseline)
{
	read_table(&now, 0);
	for (int i = 0; i < baseline->count; i++) {
		const struct mount *was = &baseline->mounts[i], *m = find_mount(&now, was->id);
		if (m && (m->parent != was->parent || !m->point || strcmp(m->point, was->point) != 0))
			return false;
	}
	return now.count > 0 && now.mounts[0].id == baseline->mounts[0].id;
}

void take_copies_away(struct walk *walk, const struct table *baseline, uint64_t namespace)
{
	(void)namespace;
	if (!walk->kind || !is_in_place(baseline))
		return;
	if (walk->private)
		ix_mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, 0, 0, MS_PRIVATE, -1);
	walk->before = (uint32_t)count_to_go(baseline, NULL, 0);
	if (walk->kind == 1)
		deepest_first(walk, baseline);
	else
		parents_first(walk, baseline);
	size_t used = strlen(walk->text);
	walk->left = (uint32_t)count_to_go(baseline, walk->text + used, sizeof(walk->text) - used);
}

bool clean_up(const struct table *baseline)
{
	ix_mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, 0, 0, MS_PRIVATE, -1);
	for (int round = 0; round < 4; round++) {
		read_table(&now, 0);
		for (int i = now.count - 1; i >= 0; i--)
			if (now.mounts[i].point && !find_mount(baseline, now.mounts[i].id) &&
			    find_mount(baseline, now.mounts[i].parent))
				ix_umount2(now.mounts[i].point, MNT_DETACH | UMOUNT_NOFOLLOW);
		read_table(&now, 0);
		if (now.count == baseline->count)
			break;
	}
	return now.count == baseline->count;
}
