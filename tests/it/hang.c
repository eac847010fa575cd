/* Loaded before the C library: while the file that KEYBROKER_TEST_HANG names is there, no sync of an audit segment ends. */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int fdatasync(int fd)
{
    const char *gate = getenv("KEYBROKER_TEST_HANG");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path);
    if (gate && length > 6 && memcmp(path + length - 6, ".jsonl", 6) == 0)
        while (access(gate, F_OK) == 0)
            usleep(10000);
    return (int)syscall(SYS_fdatasync, fd);
}
