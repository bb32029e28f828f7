/* envoy_main SOCK PROC_FD SYS_FD: nothing but the envoy's loop, for tests that run it under the sanitizers. */
#include "compat.h"

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	return ix_envoy(atoi(argv[1]), atoi(argv[2]), atoi(argv[3]), -1, NULL) < 0;
}
