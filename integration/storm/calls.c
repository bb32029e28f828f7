/* Timed calls, and the socket over which they are ordered. */
#define _GNU_SOURCE
#include "calls.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* <sys/mount.h> and <linux/mount.h> do not go together in older C libraries. */
int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);
int umount2(const char *target, int flags);

/* A plan is one message: longer ones are refused by the sender's kernel or cut, and then do not parse. */
enum { MESSAGE_MAX = 65536 };

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

bool parse_step(const char *line, struct step *out)
{
	char *words[] = {out->source, out->target, out->type};
	unsigned long flags = 0;
	*out = (struct step){.call = CALL_MOUNT};
	if (sscanf(line, "umount2 %255s %lu %i", out->target, &flags, &out->expected) == 3)
		out->call = CALL_UMOUNT2;
	else if (sscanf(line, "new_api %255s %255s %i", out->type, out->target, &out->expected) == 3)
		out->call = CALL_NEW_API;
	else if (sscanf(line, "open %255s %lu %i", out->target, &flags, &out->expected) == 3)
		out->call = CALL_OPEN;
	else if (sscanf(line, "pivot %255s %i", out->target, &out->expected) == 2)
		out->call = CALL_PIVOT;
	else if (strcmp(line, "unshare") == 0)
		out->call = CALL_UNSHARE;
	else if (strcmp(line, "unshare_net") == 0)
		out->call = CALL_UNSHARE_NET;
	else if (strcmp(line, "home") == 0)
		out->call = CALL_HOME;
	else if (sscanf(line, "mount %255s %255s %255s %lu %i", out->source, out->target, out->type,
			&flags, &out->expected) != 5)
		return false;
	out->flags = flags;
	for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++)
		if (strcmp(words[i], "-") == 0)
			words[i][0] = '\0';
	return true;
}

/* mount(8) of util-linux 2.39 and newer makes a filesystem so. */
static int new_api(const char *type, const char *target)
{
	int context = (int)syscall(SYS_fsopen, type, FSOPEN_CLOEXEC);
	int tree = -1, r = context < 0 ? -1 : (int)syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0);
	if (r >= 0)
		r = tree = (int)syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC, 0);
	if (r >= 0)
		r = (int)syscall(SYS_move_mount, tree, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH);
	int saved = errno;
	if (context >= 0)
		close(context);
	if (tree >= 0)
		close(tree);
	errno = saved;
	return r;
}

static int open_as(const char *path, int number)
{
	int fd = open(path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	int r = fd < 0 ? -1 : dup3(fd, number, O_CLOEXEC);
	if (fd >= 0)
		close(fd);
	return r;
}

static int pivot(const char *path)
{
	return chdir(path) < 0 ? -1 : (int)syscall(SYS_pivot_root, ".", ".");
}

static int go_home(const int home[2])
{
	return setns(home[0], CLONE_NEWNS) < 0 || setns(home[1], CLONE_NEWNET) < 0 ? -1 : 0;
}

static int make_call(const struct step *s, const int home[2], const char *source, const char *target, const char *type)
{
	switch (s->call) {
	case CALL_UMOUNT2:
		return umount2(target, (int)s->flags);
	case CALL_NEW_API:
		return new_api(type, target);
	case CALL_OPEN:
		return open_as(target, (int)s->flags);
	case CALL_PIVOT:
		return pivot(target);
	case CALL_UNSHARE:
		return unshare(CLONE_NEWNS);
	case CALL_UNSHARE_NET:
		return unshare(CLONE_NEWNET);
	case CALL_HOME:
		return go_home(home);
	default:
		return mount(source, target, type, s->flags, NULL);
	}
}

static const char *word(const char *text)
{
	return text[0] ? text : NULL;
}

const char *run_plan(const struct plan *plan, uint32_t *samples)
{
	static char failure[2 * WORD_MAX];
	static int home[2] = {-1, -1};
	if (home[0] < 0) {
		home[0] = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
		home[1] = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
	}
	for (unsigned int round = 0; round < plan->count; round++)
		for (unsigned int i = 0; i < plan->steps; i++) {
			const struct step *s = &plan->step[i];
			const char *source = word(s->source), *target = word(s->target), *type = word(s->type);
			uint64_t start = now_ns();
			int r = make_call(s, home, source, target, type);
			int error = r < 0 ? errno : 0;
			uint64_t spent = now_ns() - start;
			*samples++ = spent > UINT32_MAX ? UINT32_MAX : (uint32_t)spent;
			if (s->expected != ANY_ERRNO && error != s->expected) {
				snprintf(failure, sizeof(failure), "round %u, call %u, %s: errno %d, not %d", round, i,
					 s->target, error, s->expected);
				return failure;
			}
		}
	return NULL;
}

static const char *parse_plan(char *text, struct plan *plan)
{
	char *rest = NULL, *line = strtok_r(text, "\n", &rest);
	if (!line || sscanf(line, "%u", &plan->count) != 1 || plan->count > COUNT_MAX)
		return "no count, or too high a count";
	plan->steps = 0;
	while ((line = strtok_r(NULL, "\n", &rest))) {
		if (plan->steps == STEPS_MAX)
			return "too many calls";
		if (!parse_step(line, &plan->step[plan->steps++]))
			return "no such call";
	}
	return NULL;
}

static bool send_all(int sock, const void *data, size_t size)
{
	for (const char *p = data; size > 0;) {
		ssize_t n = send(sock, p, size > MESSAGE_MAX ? MESSAGE_MAX : size, MSG_NOSIGNAL);
		if (n < 0)
			return false;
		p += n;
		size -= (size_t)n;
	}
	return true;
}

int serve_plans(int sock)
{
	static char message[MESSAGE_MAX + 1];
	static struct plan plan;
	for (;;) {
		ssize_t n = recv(sock, message, MESSAGE_MAX, 0);
		if (n <= 0)
			return n < 0;
		message[n] = '\0';
		const char *failure = parse_plan(message, &plan);
		size_t size = failure ? 0 : (size_t)plan.count * plan.steps * sizeof(uint32_t);
		uint32_t *samples = size ? malloc(size) : NULL;
		if (!failure && !samples)
			failure = "nothing to do, or no memory";
		if (samples) {
			/* Every page is there before the clock runs. */
			memset(samples, 0, size);
			failure = run_plan(&plan, samples);
		}
		const char *first = failure ? failure : "ok";
		bool sent = send_all(sock, first, strlen(first)) && (failure || send_all(sock, samples, size));
		free(samples);
		if (!sent)
			return 1;
	}
}
