/* What counting.py asks of callgrind: only C has its macros. */
#include <valgrind/callgrind.h>

void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(const char *reason) { CALLGRIND_DUMP_STATS_AT(reason); }
