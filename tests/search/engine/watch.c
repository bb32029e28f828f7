/* Who looks, without a pause and after every step, at what a program is about: by path, descriptor, root, and `..`. */
#include "engine.h"

static const char *const below_procfs[] = {"uptime", "swaps", "sys", "kcore"};
static const char *const below_sysfs[] = {"kernel", "devices/virtual", "virtual", "module/nf_conntrack/parameters", "firmware"};
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* The magic number of a procfs or sysfs, 0 for all else. Says so if it is what nobody may reach. Asks no FUSE server. */
static uint64_t inspect(int fd, const char *prefix, const char *name)
{
	struct ix_stat st;
	uint64_t magic;
	if (ix_statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) < 0 || st.dev_major != 0 ||
	    (st.dev_major == shared->view_major && st.dev_minor == shared->view_minor))
		return 0;
	if (ix_fs_magic(fd, &magic) < 0 || (magic != IX_PROC_SUPER_MAGIC && magic != IX_SYSFS_MAGIC))
		return 0;
	for (int i = 0; i < shared->raw_count; i++)
		if (shared->raw[i].magic == magic && shared->raw[i].ino == st.ino)
			report("raw: %s/%s", prefix, name);
	return magic;
}

static void look_below(int dir, const char *prefix, const char *way)
{
	uint64_t magic = inspect(dir, prefix, way);
	if (!magic)
		return;
	const char *const *names = magic == IX_PROC_SUPER_MAGIC ? below_procfs : below_sysfs;
	size_t count = magic == IX_PROC_SUPER_MAGIC ? COUNT(below_procfs) : COUNT(below_sysfs);
	for (size_t i = 0; i < count; i++) {
		cleanup_close int fd = openat(dir, names[i], O_PATH | O_NOFOLLOW | O_CLOEXEC);
		if (fd < 0)
			continue;
		atomic_fetch_add(&shared->looks, 1);
		inspect(fd, prefix, names[i]);
	}
}

/* `prefix` is relative to the procfs: "PID/root/…", "PID/cwd/…", "PID/fd/N". */
void look_at(const char *prefix)
{
	static const char *const ways[] = {"..", "proc", "sys"};
	cleanup_close int at = openat(proc_fd, prefix, O_PATH | O_CLOEXEC);
	if (at < 0)
		return;
	look_below(at, prefix, "");
	for (size_t i = 0; i < COUNT(ways); i++) {
		cleanup_close int fd = openat(at, ways[i], O_PATH | O_CLOEXEC);
		if (fd >= 0)
			look_below(fd, prefix, ways[i]);
	}
}

void watch(void)
{
	char path[PATH_MAX];
	/* Looking is worth less than what is looked at. */
	if (nice(10) < 0)
		return;
	for (;;) {
		if (atomic_load(&shared->quiet)) {
			atomic_store(&shared->is_quiet, 1);
			sched_yield();
			continue;
		}
		atomic_store(&shared->is_quiet, 0);
		bool any = false;
		for (int i = 0; i < HOT && !atomic_load(&shared->quiet); i++) {
			memcpy(path, shared->hot[i], sizeof(path));
			path[sizeof(path) - 1] = '\0';
			if (path[0]) {
				any = true;
				look_at(path);
			}
		}
		if (!any)
			sched_yield();
	}
}

/* What the watcher looks at while a step is made: its paths as each worker has them, its descriptors. */
void set_hot(const struct step *step)
{
	char path[PATH_MAX];
	int n = 0;
	for (int i = 0; i < 2; i++) {
		if (!step->s[i])
			continue;
		const char *text = expand(step->s[i], path, sizeof(path));
		for (int w = 0; w < WORKERS && n < HOT; w++) {
			/* Its own cwd, the root of everybody. */
			if (!shared->pids[w] || (text[0] != '/' && w != (int)step->worker))
				continue;
			snprintf(shared->hot[n++], PATH_MAX, "%d/%s/%.3800s", shared->pids[w], text[0] == '/' ? "root" : "cwd",
				 text);
		}
	}
	for (int slot = 0; slot < SLOTS && n < HOT; slot++)
		snprintf(shared->hot[n++], PATH_MAX, "%d/fd/%d", shared->pids[step->worker], SLOT_FD + slot);
	while (n < HOT)
		shared->hot[n++][0] = '\0';
}
