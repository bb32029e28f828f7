/*
 * Which mounts of a long list are worth a look by the daemon: a container may have tens of thousands, and to look at one
 * takes Python ten times as long as the kernel.
 */
#include "compat.h"

static int compare(const void *key, const void *entry)
{
	return strcmp(key, *(const char *const *)entry);
}

static bool is_wanted(const struct ix_statmount *s, int what, const char *const *points, size_t count)
{
	switch (what) {
	case IX_PICK_BASES:
		return s->sb_magic == IX_PROC_SUPER_MAGIC || s->sb_magic == IX_SYSFS_MAGIC;
	case IX_PICK_BETWEEN:
		return s->mnt_peer_group && s->mnt_master;
	default:
		return bsearch(s->mask & IX_STATMOUNT_MNT_POINT ? s->str + s->mnt_point : "", points, count, sizeof(*points),
			       compare);
	}
}

size_t ix_pick(uint64_t ns_id, uint64_t *ids, size_t count, int what, const char *const *points, size_t point_count)
{
	struct {
		struct ix_statmount sm;
		char strings[PATH_MAX];
	} found;
	uint64_t mask = what == IX_PICK_BASES	  ? IX_STATMOUNT_SB_BASIC
			: what == IX_PICK_BETWEEN ? IX_STATMOUNT_MNT_BASIC
						  : IX_STATMOUNT_MNT_POINT;
	size_t kept = 0;
	for (size_t i = 0; i < count; i++) {
		int r = ix_statmount(ids[i], ns_id, mask, &found, sizeof(found));
		/* What cannot be looked at here has to be looked at there. */
		if (r == 0 ? is_wanted(&found.sm, what, points, point_count) : r != -ENOENT)
			ids[kept++] = ids[i];
	}
	return kept;
}
