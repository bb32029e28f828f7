/*
 * Keeps the sanitizers' findings where they survive: preloaded beside libasan by the sanitized stage of integration/check.
 *
 * A guard has closed every inherited descriptor, runs as another user and may be in a container's mount namespace when
 * it fails, so that it can write a report neither to standard error nor to a file. A shared mapping it still has. And
 * a guard that died is replaced so well that no test need notice.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <execinfo.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct board {
	_Atomic size_t used;
	char text[];
};

static struct board *board;
static size_t room;

static void note(const char *text)
{
	size_t length = strlen(text);
	size_t at = atomic_fetch_add(&board->used, length);
	if (at + length <= room)
		memcpy(board->text + at, text, length);
}

/* A process without standard error ends here before the sanitizer hands out its text; addr2line tells the rest. */
static void note_death(void)
{
	void *frames[32];
	char line[512];
	int count = backtrace(frames, 32);

	snprintf(line, sizeof(line), "process %d was ended by a sanitizer\n", (int)getpid());
	note(line);
	for (int i = 0; i < count; i++) {
		Dl_info module;
		if (!dladdr(frames[i], &module) || !module.dli_fname || !strstr(module.dli_fname, "/_native."))
			continue;
		snprintf(line, sizeof(line), "    %s+0x%tx\n", module.dli_fname,
			 (char *)frames[i] - (char *)module.dli_fbase);
		note(line);
	}
}

/* Each runtime has a list of death callbacks of its own. */
static void watch(const char *library)
{
	void *handle = dlopen(library, RTLD_LAZY);
	if (!handle)
		return;
	void (*on_death)(void (*)(void)) = dlsym(handle, "__sanitizer_set_death_callback");
	void (*on_report)(void (*)(const char *)) = dlsym(handle, "__asan_set_error_report_callback");
	if (on_death)
		on_death(note_death);
	if (on_report)
		on_report(note);
}

__attribute__((constructor)) static void begin(void)
{
	const char *path = getenv("INTERCEPTOR_FINDINGS");
	struct stat status;
	int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
	if (fd < 0)
		return; /* a program in a container's own root: none of ours */
	if (fstat(fd, &status) == 0 && (size_t)status.st_size > sizeof(*board)) {
		void *map = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (map != MAP_FAILED) {
			board = map;
			backtrace((void *[1]){NULL}, 1); /* loads the unwinder, for which it is too late in the end */
			room = status.st_size - sizeof(*board);
			watch("libasan.so.8");
			watch("libubsan.so.1");
		}
	}
	close(fd);
}
