/*
 * What statmount(2) and listmount(2) say, read from a mountinfo (proc_pid_mountinfo(5)): for kernels before 6.8. It is of
 * the mount namespace and root directory of the thread whose file it is; what stands beneath that root is not in it.
 */
#include "compat.h"

#include <linux/mount.h>

enum { MOUNTS_MAX = 4096, WORD_MAX = 64, WORD_END = 256, LINE_END = 257, FILE_END = 258 };

struct reader {
	int fd;
	size_t at, have;
	char chunk[4096];
};

struct line {
	uint64_t id, parent, attributes, propagation, group, master;
	uint32_t dev_major, dev_minor;
	char fstype[WORD_MAX];
};

static int next_byte(struct reader *r)
{
	if (r->at == r->have) {
		ssize_t n;
		do
			n = read(r->fd, r->chunk, sizeof(r->chunk));
		while (n < 0 && errno == EINTR);
		if (n <= 0)
			return FILE_END;
		r->at = 0;
		r->have = (size_t)n;
	}
	int c = (unsigned char)r->chunk[r->at++];
	return c == ' ' ? WORD_END : c == '\n' ? LINE_END : c;
}

/* Blanks, line feeds and backslashes are written as three octal digits. */
static int next_char(struct reader *r)
{
	int value = 0, c = next_byte(r);
	if (c != '\\')
		return c;
	for (int i = 0; i < 3; i++) {
		c = next_byte(r);
		if (c < '0' || c > '7')
			return FILE_END;
		value = value * 8 + c - '0';
	}
	return value & 0xff;
}

/* The next word of the line, cut off where there is no more room (then *length is `room`), and what ended it. */
static int read_word(struct reader *r, char *out, size_t room, size_t *length)
{
	size_t n = 0;
	int c;
	while ((c = next_char(r)) < WORD_END) {
		if (n + 1 < room)
			out[n] = (char)c;
		if (n < room)
			n++;
	}
	if (room)
		out[n < room ? n : room - 1] = '\0';
	*length = n;
	return c;
}

static int read_number(struct reader *r, uint64_t *number)
{
	char text[WORD_MAX];
	size_t n;
	int end = read_word(r, text, sizeof(text), &n);
	*number = strtoull(text, NULL, 10);
	return end;
}

static uint64_t attribute_of(const char *option)
{
	static const struct { const char *name; uint64_t attribute; } options[] = {
		{"ro", MOUNT_ATTR_RDONLY}, {"nosuid", MOUNT_ATTR_NOSUID}, {"nodev", MOUNT_ATTR_NODEV},
		{"noexec", MOUNT_ATTR_NOEXEC}, {"noatime", MOUNT_ATTR_NOATIME}, {"nodiratime", MOUNT_ATTR_NODIRATIME},
		{"nosymfollow", 0x200000}, {"idmapped", MOUNT_ATTR_IDMAP},
	};
	for (size_t i = 0; i < sizeof(options) / sizeof(options[0]); i++)
		if (strcmp(option, options[i].name) == 0)
			return options[i].attribute;
	return 0;
}

static int read_options(struct reader *r, struct line *line)
{
	char text[4 * WORD_MAX], *rest = NULL;
	size_t n;
	bool relative = false;
	int end = read_word(r, text, sizeof(text), &n);
	for (char *option = strtok_r(text, ",", &rest); option; option = strtok_r(NULL, ",", &rest)) {
		line->attributes |= attribute_of(option);
		relative = relative || strcmp(option, "relatime") == 0;
	}
	if (!relative && !(line->attributes & MOUNT_ATTR_NOATIME))
		line->attributes |= MOUNT_ATTR_STRICTATIME;
	return end;
}

/* As many as there are, up to the one that is a dash. */
static int read_tags(struct reader *r, struct line *line)
{
	char text[WORD_MAX];
	size_t n;
	int end;
	while ((end = read_word(r, text, sizeof(text), &n)) == WORD_END && strcmp(text, "-") != 0) {
		if (strncmp(text, "shared:", 7) == 0) {
			line->group = strtoull(text + 7, NULL, 10);
			line->propagation |= MS_SHARED;
		} else if (strncmp(text, "master:", 7) == 0) {
			line->master = strtoull(text + 7, NULL, 10);
			line->propagation |= MS_SLAVE;
		} else if (strcmp(text, "unbindable") == 0) {
			line->propagation |= MS_UNBINDABLE;
		}
	}
	if (!line->propagation)
		line->propagation = MS_PRIVATE;
	return end;
}

static int read_device(struct reader *r, struct line *line)
{
	char text[WORD_MAX], *minor;
	size_t n;
	int end = read_word(r, text, sizeof(text), &n);
	line->dev_major = (uint32_t)strtoul(text, &minor, 10);
	line->dev_minor = (uint32_t)strtoul(minor + (*minor == ':'), NULL, 10);
	return end;
}

/* A text and how much room it has; without room for its end, it was cut off. */
struct place {
	char *text;
	size_t room, length;
};

/* False at the end of the file, or where something is no mountinfo. */
static bool read_line(struct reader *r, struct line *line, struct place *root, struct place *point)
{
	size_t n;
	*line = (struct line){0};
	if (read_number(r, &line->id) != WORD_END || read_number(r, &line->parent) != WORD_END ||
	    read_device(r, line) != WORD_END || read_word(r, root->text, root->room, &root->length) != WORD_END ||
	    read_word(r, point->text, point->room, &point->length) != WORD_END || read_options(r, line) != WORD_END ||
	    read_tags(r, line) != WORD_END || read_word(r, line->fstype, sizeof(line->fstype), &n) != WORD_END)
		return false;
	int c;
	while ((c = next_byte(r)) < LINE_END || c == WORD_END)
		;
	/* A subtype follows the type and a dot. */
	line->fstype[strcspn(line->fstype, ".")] = '\0';
	return c == LINE_END;
}

/* Of those that anybody asks about; else 0, which is nobody's. */
static uint64_t magic_of(const char *fstype)
{
	if (strcmp(fstype, "proc") == 0)
		return IX_PROC_SUPER_MAGIC;
	if (strcmp(fstype, "sysfs") == 0)
		return IX_SYSFS_MAGIC;
	if (strcmp(fstype, "fuse") == 0 || strcmp(fstype, "fuseblk") == 0 || strcmp(fstype, "virtiofs") == 0)
		return IX_FUSE_SUPER_MAGIC;
	return 0;
}

static void fill(struct ix_statmount *s, const struct line *line)
{
	s->mask = IX_STATMOUNT_SB_BASIC | IX_STATMOUNT_MNT_BASIC | IX_STATMOUNT_MNT_ROOT | IX_STATMOUNT_MNT_POINT |
		  IX_STATMOUNT_FS_TYPE;
	s->sb_dev_major = line->dev_major;
	s->sb_dev_minor = line->dev_minor;
	s->sb_magic = magic_of(line->fstype);
	s->mnt_id = line->id;
	s->mnt_parent_id = line->parent;
	s->mnt_attr = line->attributes;
	s->mnt_propagation = line->propagation;
	s->mnt_peer_group = line->group;
	s->mnt_master = line->master;
}

int ix_mountinfo_look(int mountinfo, uint64_t mnt_id, uint64_t mask, void *buf, size_t size)
{
	struct ix_statmount *s = buf;
	struct reader r = {.fd = mountinfo};
	struct line line;
	/* Type, root and place, one after the other. */
	if (size < sizeof(*s))
		return -EINVAL;
	size_t all = size - sizeof(*s), type_room = all < WORD_MAX ? 0 : WORD_MAX, half = (all - type_room) / 2;
	struct place root = {s->str + type_room, half, 0}, point = {s->str + type_room + half, half, 0};
	while (read_line(&r, &line, &root, &point)) {
		if (line.id != mnt_id)
			continue;
		memset(s, 0, sizeof(*s));
		fill(s, &line);
		if (mask & IX_STATMOUNT_FS_TYPE && !type_room)
			return -EOVERFLOW;
		if (type_room)
			memcpy(s->str, line.fstype, WORD_MAX);
		s->mnt_root = (uint32_t)type_room;
		s->mnt_point = (uint32_t)(type_room + half);
		return (mask & IX_STATMOUNT_MNT_ROOT && root.length >= half) ||
			       (mask & IX_STATMOUNT_MNT_POINT && point.length >= half) ? -EOVERFLOW : 0;
	}
	return -ENOENT;
}

enum known { UNKNOWN, BELOW, ELSEWHERE };

/* Looked up by ID, in slots of which half are free; and what is known of each mount, so that it is found out once. */
struct table {
	int count;
	uint32_t id[MOUNTS_MAX], parent[MOUNTS_MAX];
	uint16_t slot[2 * MOUNTS_MAX];   /* 1 + the index; 0: free */
	uint8_t known[MOUNTS_MAX];
};

static uint16_t *slot_of(struct table *t, uint32_t id)
{
	uint32_t at = id % (2 * MOUNTS_MAX);
	while (t->slot[at] && t->id[t->slot[at] - 1] != id)
		at = (at + 1) % (2 * MOUNTS_MAX);
	return &t->slot[at];
}

static void add_mount(struct table *t, const struct line *line)
{
	t->id[t->count] = (uint32_t)line->id;
	t->parent[t->count++] = (uint32_t)line->parent;
	*slot_of(t, (uint32_t)line->id) = (uint16_t)t->count;
}

/* All that is passed on the way up is as high or low as what it leads to. */
static bool is_below(struct table *t, int first, uint64_t mnt_id)
{
	uint8_t found = ELSEWHERE;
	int i = first, up;
	for (int steps = 0; steps < t->count; steps++, i = up) {
		up = *slot_of(t, t->parent[i]) - 1;
		if (t->known[i] != UNKNOWN)
			found = t->known[i];
		else if (t->parent[i] == mnt_id)
			found = BELOW;
		else if (up >= 0 && up != i)
			continue;
		break;
	}
	for (i = first; i >= 0 && t->known[i] == UNKNOWN; i = t->parent[i] == mnt_id ? -1 : *slot_of(t, t->parent[i]) - 1)
		t->known[i] = found;
	return found == BELOW;
}

int64_t ix_mountinfo_list(int mountinfo, uint64_t mnt_id, uint64_t last, uint64_t *ids, size_t count)
{
	struct reader r = {.fd = mountinfo};
	struct line line;
	struct table t = {.count = 0};
	struct place nowhere = {0};
	while (read_line(&r, &line, &nowhere, &nowhere)) {
		if (t.count == MOUNTS_MAX)
			return -E2BIG;
		add_mount(&t, &line);
	}
	bool begun = last == 0;
	size_t found = 0;
	for (int i = 0; i < t.count && found < count; i++) {
		if (begun && t.id[i] != mnt_id && is_below(&t, i, mnt_id))
			ids[found++] = t.id[i];
		begun = begun || t.id[i] == last;
	}
	return begun ? (int64_t)found : -EAGAIN;
}
