/*
 * Composites that the daemon has made ahead of need: it was asked for the like before, and hands over the next one
 * before it is asked again. Each is for one call. What none of them fits is asked about.
 */
#include "guard.h"

enum { PLACES = 24 };

/* Nothing of a place is touched before it is used. */
struct place {
	struct ix_ahead ahead;
	int tree;                      /* 1 + descriptor; 0: free */
};
static struct place places[PLACES];
static unsigned int next_place;
static pthread_mutex_t places_lock = PTHREAD_MUTEX_INITIALIZER;

/* Takes the descriptor. Where there is no room, the one that came first goes. */
void ix_take_ahead(const struct ix_ahead *ahead, int *fd)
{
	if (*fd < 0 || ahead->shields > IX_AHEAD_SHIELDS || ahead->absent[IX_AHEAD_ABSENT - 1] != '\0' ||
	    ahead->absent[IX_AHEAD_ABSENT - 2] != '\0')
		return;
	pthread_mutex_lock(&places_lock);
	struct place *at = &places[next_place++ % PLACES];
	for (int i = 0; i < PLACES && at->tree; i++)
		if (!places[i].tree)
			at = &places[i];
	int old = at->tree - 1;
	*at = (struct place){.ahead = *ahead, .tree = ix_take_fd(fd) + 1};
	pthread_mutex_unlock(&places_lock);
	/* The end of a mount waits for an RCU grace period: not with the lock. */
	ix_close_fd(&old);
}

void ix_forget_ahead(void)
{
	for (int i = 0; i < PLACES; i++) {
		pthread_mutex_lock(&places_lock);
		int old = places[i].tree - 1;
		places[i].tree = 0;
		pthread_mutex_unlock(&places_lock);
		ix_close_fd(&old);
	}
}

static bool is_among(uint64_t value, const uint64_t *values, uint32_t count)
{
	while (count > 0)
		if (values[--count] == value)
			return true;
	return false;
}

static bool fits_swap(const struct ix_ahead *a, const struct ix_swap *swap)
{
	if (a->act != IX_ACT_SWAP || a->dev_major != swap->dev_major || a->dev_minor != swap->dev_minor ||
	    a->attributes != swap->attributes || a->shields != swap->shields)
		return false;
	for (uint32_t i = 0; i < a->shields; i++)
		if (!is_among(a->shield[i], swap->shield, swap->shields))
			return false;
	return true;
}

static bool fits_new(const struct ix_ahead *a, const struct ix_ask *ask, uint64_t ns_ino)
{
	struct ix_ask alike = *ask;
	alike.seq = alike.mnt_id = 0;
	alike.tid = 0;
	return a->act == IX_ACT_ATTACH && a->ns_ino == ns_ino && memcmp(&a->ask, &alike, sizeof(alike)) == 0;
}

/*
 * Whether something has appeared that it does not cover. What would be below a cover (EXDEV) is not looked for: nobody
 * here asks the view anything, and in the original it would show as well.
 */
static bool is_out_of_date(const struct ix_ahead *a, int tree)
{
	for (const char *path = a->absent; *path; path += strlen(path) + 1) {
		cleanup_close int fd = ix_openat2(tree, path, O_PATH | O_NOFOLLOW, 0,
						  RESOLVE_BENEATH | RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS);
		if (fd != -ENOENT && fd != -ENOTDIR && fd != -EXDEV)
			return true;
	}
	return false;
}

/* The call gets it as the answer to the question that it would have asked. False if it is none, or out of date. */
static bool give(struct ix_call *call, struct ix_answer answer, const struct ix_ahead *a, int given)
{
	cleanup_close int tree = given;
	if (tree < 0)
		return false;
	call->taken = a->number;
	if (is_out_of_date(a, tree))
		return false;
	answer.act = a->act;
	answer.there_id = a->there_id;
	call->question->answer = answer;
	call->question->answer_fd = ix_take_fd(&tree);
	return true;
}

/* Takes one out of its place: its tree, or -1. */
static int take(const struct ix_ask *ask, uint64_t ns_ino, const struct ix_swap *swap, struct ix_ahead *out)
{
	int tree = -1;
	pthread_mutex_lock(&places_lock);
	for (int i = 0; i < PLACES && tree < 0; i++) {
		struct place *p = &places[i];
		if (!p->tree || !(swap ? fits_swap(&p->ahead, swap) : fits_new(&p->ahead, ask, ns_ino)))
			continue;
		*out = p->ahead;
		tree = p->tree - 1;
		p->tree = 0;
	}
	pthread_mutex_unlock(&places_lock);
	return tree;
}

/* `ns` is the PID namespace of a procfs, the network namespace of a sysfs. */
bool ix_ahead_of_new(struct ix_call *call, const struct ix_ask *ask, int ns)
{
	struct stat st;
	struct ix_ahead ahead;
	return fstat(ns, &st) == 0 && give(call, (struct ix_answer){0}, &ahead, take(ask, st.st_ino, NULL, &ahead));
}

bool ix_ahead_of_swap(struct ix_call *call, const struct ix_swap *swap)
{
	struct ix_ahead ahead;
	struct ix_answer answer = {.base_id = swap->base_id, .count = swap->count};
	memcpy(answer.ids, swap->ids, swap->count * sizeof(answer.ids[0]));
	return give(call, answer, &ahead, take(NULL, 0, swap, &ahead));
}
