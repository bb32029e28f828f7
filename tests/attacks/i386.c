/* One system call of i386 from a 64-bit process: i386 NUMBER ARGUMENT...; an argument is a string or =NUMBER. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

int main(int argc, char **argv)
{
	unsigned long a[6] = {0};
	char *low = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	if (low == MAP_FAILED || argc < 2 || argc > 7)
		return 2;
	for (int i = 2; i < argc; i++) {
		if (argv[i][0] == '=') {
			a[i - 2] = strtoul(argv[i] + 1, NULL, 0);
			continue;
		}
		a[i - 2] = (unsigned long)strcpy(low, argv[i]);
		low += strlen(argv[i]) + 1;
	}
	int result;
	__asm__ volatile("int $0x80"
			 : "=a"(result)
			 : "a"(atoi(argv[1])), "b"(a[0]), "c"(a[1]), "d"(a[2]), "S"(a[3]), "D"(a[4])
			 : "memory", "r8", "r9", "r10", "r11", "cc");
	printf("%d\n", -result);
	return 0;
}
