/* Timed mount(2) and umount2(2) calls: the same code for every contestant. */
#ifndef STORM_CALLS_H
#define STORM_CALLS_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { STEPS_MAX = 128, WORD_MAX = 256, COUNT_MAX = 1000000 };

enum call { CALL_MOUNT, CALL_UMOUNT2, CALL_NEW_API, CALL_OPEN, CALL_PIVOT, CALL_UNSHARE, CALL_UNSHARE_NET, CALL_HOME };

/* What a step may expect instead of an errno: the kernels and agents that are compared differ here. */
enum { ANY_ERRNO = -1 };

/* One call, and the errno that it must have; anything else ends the run. */
struct step {
	enum call call;
	char source[WORD_MAX], target[WORD_MAX], type[WORD_MAX];   /* empty: NULL */
	unsigned long flags;
	int expected;
};

struct plan {
	unsigned int count, steps;
	struct step step[STEPS_MAX];
};

/* One line, "-" for NULL, -1 for any errno:
 *   mount SOURCE TARGET TYPE FLAGS ERRNO
 *   umount2 TARGET FLAGS ERRNO
 *   new_api TYPE TARGET ERRNO      fsopen, fsconfig, fsmount, move_mount
 *   open PATH NUMBER ERRNO         O_PATH, as this descriptor
 *   pivot PATH ERRNO               chdir, then pivot_root(".", ".")
 *   unshare                        to a mount namespace of its own
 *   unshare_net                    to a network namespace of its own
 *   home                           back to those that the run began in */
bool parse_step(const char *line, struct step *out);

/* Runs the steps in turn, `count` times, and writes the nanoseconds of each call to samples[count * steps].
 * Returns NULL, or what went wrong. */
const char *run_plan(const struct plan *plan, uint32_t *samples);

/* Answers plans that come over a SOCK_SEQPACKET socket until its end of file; returns an exit status. */
int serve_plans(int sock);

#endif
