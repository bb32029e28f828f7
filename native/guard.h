/* What the guard's own files share. None of it is seen by Python. */
#ifndef IX_GUARD_H
#define IX_GUARD_H
#include "compat.h"

#include <pthread.h>
#include <stdatomic.h>

enum { IX_GUARD_FDS = 3, IX_RECEIVERS_PER_LISTENER = 32, IX_LISTENERS = 192, IX_REPETITIONS = 16 };

struct ix_listener {
	int fd;
	uint32_t index;
	atomic_int receivers;
	atomic_int leader;             /* 1: one of them receives, or serves what it received; the others wait here */
	atomic_int leader_tid;
	atomic_int followers;          /* how many wait */
	atomic_int serving;            /* how many look at a call */
	atomic_int turn;               /* odd: the leader serves a call */
	atomic_int wary;               /* calls to be received warily: a leader was stuck not long ago */
	atomic_int dropped;
};

/* A question on its way to the daemon; one a slot. All zero is a closed one: those of slots never taken are not touched. */
struct ix_question {
	pthread_mutex_t lock;
	pthread_cond_t answered;
	uint64_t seq;                  /* 0: none open */
	bool done;
	struct ix_ask ask;
	int fds[3];
	int fd_count;
	struct ix_answer answer;
	int answer_fd;
};

/* A mount that somebody asks for without effect. */
struct ix_repetition {
	atomic_uint_fast64_t mnt_id, since_ns, told_ns, untold;
	atomic_uint recent;
};

/* The guard's whole state. */
struct ix_guard_state {
	struct ix_guard_config config;
	int link, proc, home;          /* home: the guard's own, empty mount namespace */
	bool ids_return;               /* IDs of mounts are used again: before Linux 6.8 */
	int pebble;                    /* an eventfd for ix_settle; -1 from Linux 6.17 on */
	struct ix_journal *journal;
	struct ix_listener listeners[IX_LISTENERS];
	struct ix_question questions[IX_SLOTS];
	atomic_uchar slot_taken[IX_SLOTS];
	struct ix_repetition repetitions[IX_REPETITIONS];
	atomic_int watching;           /* the watchdog is awake */
	atomic_int followed;           /* somebody wants to know of every call */
	atomic_uint_fast64_t next_seq;
	struct ix_facts facts;         /* under cache_lock */
	pthread_mutex_t cache_lock;
	pthread_mutex_t stats_lock;
	pthread_mutex_t turn_lock;
	pthread_mutex_t orphan_lock;
	int orphan_fds[IX_ORPHANS];    /* 1 + the descriptor that an orphan's call was to return; 0: none */
	int orphan_placed[IX_ORPHANS]; /* 1 + its number in the caller's table, where it is already; 0: not yet */
	pthread_cond_t turn_over;      /* a call has been answered, or its result is on record */
	atomic_int busy;               /* calls received and not answered */
	bool awaits[IX_SLOTS];         /* a restart waits for what becomes of the call broken off; under turn_lock */
};
extern struct ix_guard_state ix_guard_state;

/* One trapped call, its arguments copied once. */
struct ix_call {
	struct ix_slot *slot;
	struct ix_question *question;
	struct ix_listener *listener;
	int turn;                      /* of the listener, while this thread leads; else 0 */
	enum ix_kind kind;
	int tid;
	uint64_t id;
	uint64_t args[6];
	int mntns;                     /* the caller's, once opened */
	struct ix_context context;     /* where it stood then */
	int target;                    /* O_PATH, once resolved */
	struct ix_stat target_stat;
	uint32_t taken;                /* number of the composite made ahead that was used; 0: none */
	char path[PATH_MAX];
	char text[PATH_MAX];           /* source, or the options of a new mount */
};

/* What is asked for a mount. */
struct ix_request {
	enum ix_op op;
	const struct ix_stat *st;
	uint64_t flags;                /* of mount(2) or umount2(2) */
	bool foreign;                  /* of a filesystem of the container's own */
};

/* A copied base that is to lose a cover: what the answer would say of it, found without a question. */
struct ix_swap {
	uint64_t base_id;
	uint32_t dev_major, dev_minor;
	uint64_t attributes;
	uint32_t count, shields;
	uint64_t ids[IX_MAX_IDS];      /* what is welded to it, but for the cover that goes */
	uint64_t shield[IX_AHEAD_SHIELDS];  /* hashes of where shields will stand */
};

enum ix_outcome { IX_CONTINUED, IX_DENIED, IX_HANDLED };
struct ix_reply {
	enum ix_outcome outcome;
	int error;                     /* positive errno, 0 for success; unused with IX_CONTINUED */
	int give;                      /* 1 + a descriptor that the call returns to the caller, which is closed here; 0: none */
	bool give_cloexec;
	int placed;                    /* 1 + its number in the caller's table, where it is already; 0: not yet */
	const char *reason;            /* why the kernel may run the call: written down for every such answer */
};

static inline struct ix_reply ix_let_kernel_run(const char *reason)
{
	return (struct ix_reply){.outcome = IX_CONTINUED, .reason = reason};
}

static inline struct ix_reply ix_deny(int error)
{
	return (struct ix_reply){.outcome = IX_DENIED, .error = error};
}

/* guard.c */
int ix_guard(int link_fd, int journal_fd, int proc_fd, const struct ix_guard_config *config);
bool ix_still_waiting(const struct ix_call *call);
void ix_settle(const struct ix_call *call);
bool ix_still_wanted(struct ix_call *call);
/* Asks the daemon; false if there was no answer in time. The caller closes answer_fd. */
bool ix_question(struct ix_call *call, struct ix_ask *ask, const int *fds, int fd_count);
void ix_serve_call(struct ix_listener *listener, struct ix_slot *slot, int turn, bool overloaded, bool recover);
void ix_forget(struct ix_slot *slot);
/* Slots from here on were never taken. What is not looked at takes no memory. */
int ix_slots_used(void);
/* receive.c */
int ix_start_receiver(struct ix_listener *listener, int slot, bool recover);
int ix_start_watchdog(void);
char ix_read_state(int stat_fd);
/* Before a wait: somebody else receives from here on. */
void ix_step_down(struct ix_call *call);
void ix_release_listener(struct ix_listener *listener);
void ix_end_listener(struct ix_listener *listener);
/* link.c */
int ix_link_serve(void);
bool ix_link_send(const void *message, size_t size, const int *fds, int fd_count);
/* cache.c */
int ix_cache_get(uint64_t mnt_id, enum ix_op op, int *error);
void ix_cache_put(uint64_t mnt_id, enum ix_op op, int error);
void ix_cache_flush(void);
bool ix_cache_is_foreign(const struct ix_stat *st);
void ix_cache_put_foreign(const struct ix_stat *st);
bool ix_cache_is_base(const struct ix_stat *st);
void ix_cache_put_base(const struct ix_stat *st);
void ix_cache_forget_foreign(const struct ix_stat *st);
/* handle.c */
struct ix_reply ix_handle(struct ix_call *call, uint32_t arch, int nr);
bool ix_is_ours(struct ix_call *call, int fd, const struct ix_stat *st);
int ix_mount_magic(struct ix_call *call, uint64_t mnt_id, uint64_t *magic);
bool ix_open_mount_namespace(struct ix_call *call);
struct ix_reply ix_decide(struct ix_call *call, enum ix_op op, int fd, const struct ix_stat *st, uint64_t flags);
/* copies.c */
int ix_see_mount(uint64_t mnt_id, uint64_t mask, void *buf, size_t size);
int64_t ix_see_below(uint64_t mnt_id, uint64_t last, uint64_t *ids, size_t count);
void ix_take_facts(const struct ix_facts *facts);
bool ix_is_for_the_kernel(uint64_t mnt_id, uint64_t namespace_id, enum ix_op op, uint64_t flags);
bool ix_takes_no_original_along(uint64_t mnt_id, uint64_t namespace_id);
bool ix_is_of_base_type(uint64_t mnt_id);
enum ix_fate { IX_FATE_UNCLEAR, IX_FATE_WHOLE, IX_FATE_BUSY, IX_FATE_WELDED };
enum ix_fate ix_fate_of(uint64_t mnt_id, uint64_t namespace_id);
bool ix_goes_lazily(uint64_t mnt_id, uint64_t namespace_id);
bool ix_describe_swap(uint64_t mnt_id, uint64_t namespace_id, struct ix_swap *swap);
/* ahead.c */
void ix_take_ahead(const struct ix_ahead *ahead, int *fd);
void ix_forget_ahead(void);
bool ix_ahead_of_new(struct ix_call *call, const struct ix_ask *ask, int ns);
bool ix_ahead_of_swap(struct ix_call *call, const struct ix_swap *swap);
/* options.c */
int ix_read_options(int tid, uint64_t address, char out[PATH_MAX]);
bool ix_parse_options(const char *data, struct ix_ask *ask);
void ix_name_source(const char *source, struct ix_ask *ask);
/* tally.c */
void ix_tally(const struct ix_call *call, const struct ix_reply *reply);
/* storms.c */
void ix_count_repetition(const struct ix_call *call, enum ix_op op, uint64_t mnt_id);
/* newapi.c */
int ix_fetch_fd(const struct ix_call *call, int number);
struct ix_reply ix_handle_fsopen(struct ix_call *call);
struct ix_reply ix_handle_fsmount(struct ix_call *call);
struct ix_reply ix_handle_open_tree(struct ix_call *call, bool with_attr);
struct ix_reply ix_handle_move_mount(struct ix_call *call);
int ix_resolve_moved(struct ix_call *call);
bool ix_is_held(uint64_t mnt_id);
/* open.c */
struct ix_reply ix_handle_openat2(struct ix_call *call);
/* act.c */
bool ix_has_mounts_below(struct ix_call *call, uint64_t mnt_id);
int ix_top_of_file(struct ix_call *call, uint64_t mnt_id);
int ix_enter(const struct ix_call *call);
void ix_leave(void);
struct ix_reply ix_acted(struct ix_call *call, int result);
struct ix_reply ix_act(struct ix_call *call, const struct ix_answer *answer, int fd);
bool ix_act_alone(struct ix_call *call, const struct ix_request *request, struct ix_reply *reply);
struct ix_reply ix_act_bind(struct ix_call *call, int source);
struct ix_reply ix_act_attach_held(struct ix_call *call, int tree, uint64_t mnt_id, int to, unsigned int flags);
bool ix_act_recover(struct ix_call *call, int *result);
/* caller.c */
int ix_read_string(int tid, uint64_t address, char *out, size_t size);
bool ix_caller_has_cap(int tid, int capability);
bool ix_caller_rules(const struct ix_call *call, int ns_fd);
bool ix_caller_is_nested(const struct ix_call *call);
struct ix_context ix_context_of(int tid);
bool ix_same_context(const struct ix_context *a, const struct ix_context *b);
void ix_unit_of(int tid, char name[sizeof(((struct ix_unit *)0)->name)]);
void ix_account(const struct ix_call *call);
/* resolve.c */
int ix_top_of(int directory);
int ix_open_caller(int proc_fd, int tid, const char *what, int flags);
/* Writes "TID/what" to name and returns its length; `what` is one of a few short words. */
int ix_caller_path(char *name, int tid, const char *what);

#endif
