/* How fast this machine reads memory: the roofline that generating tokens is held against.
 *
 * tools/build_engine.py compiles this with the engine's own compiler, and cloister.bench.roofline calls it. It is no part
 * of the engine, and no enclave loads it. */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define MOST_THREADS 256
#define PLACES 4 /* that each thread reads at, in turn: one alone does not keep the memory busy */

typedef uint64_t vector __attribute__((vector_size(64), aligned(64)));

enum { WAIT, GO, GIVE_UP };

typedef struct {
    pthread_t thread;
    unsigned char *start;
    size_t size; /* bytes: a multiple of PLACES vectors */
    int cpu;     /* to stay on; -1: anywhere */
    atomic_int *ready, *signal;
    double began, ended; /* seconds */
    uint64_t sum;        /* of all that was read, or a compiler might leave the reading out */
} share;

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

static uint64_t read_all(const unsigned char *start, size_t size) {
    size_t count = size / PLACES / sizeof(vector);
    const vector *from = (const vector *)start;
    vector a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t at = 0; at < count; at++) {
        a += from[at];
        b += from[at + count];
        c += from[at + 2 * count];
        d += from[at + 3 * count];
    }
    a += b + c + d;
    uint64_t sum = 0;
    for (size_t lane = 0; lane < sizeof(vector) / sizeof(uint64_t); lane++)
        sum += a[lane];
    return sum;
}

static void *work(void *argument) {
    share *mine = argument;
    if (mine->cpu >= 0) {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(mine->cpu, &one);
        sched_setaffinity(0, sizeof one, &one);
    }
    if (mine->start[0] == 0)
        memset(mine->start, 1, mine->size); /* once: pages lie near the thread that touches them first */
    atomic_fetch_add(mine->ready, 1);
    int told;
    while ((told = atomic_load(mine->signal)) == WAIT)
        sched_yield();
    if (told == GO) {
        mine->began = now();
        mine->sum += read_all(mine->start, mine->size);
        mine->ended = now();
    }
    return NULL;
}

/* All shares once, at the same time: bytes per second, from the first one's beginning to the last one's end. */
static double read_shares(share *shares, int threads) {
    atomic_int ready = 0, signal = WAIT;
    int made = 0;
    for (; made < threads; made++) {
        shares[made].ready = &ready;
        shares[made].signal = &signal;
        if (pthread_create(&shares[made].thread, NULL, work, &shares[made]))
            break;
    }
    while (atomic_load(&ready) < made)
        sched_yield();
    atomic_store(&signal, made == threads ? GO : GIVE_UP);
    for (int at = 0; at < made; at++)
        pthread_join(shares[at].thread, NULL);
    if (made < threads)
        return -1;
    double began = shares[0].began, ended = shares[0].ended, size = 0;
    for (int at = 0; at < threads; at++) {
        began = shares[at].began < began ? shares[at].began : began;
        ended = shares[at].ended > ended ? shares[at].ended : ended;
        size += (double)shares[at].size;
    }
    return size / (ended - began);
}

/* The best of `repeats` readings of `size` bytes by `threads` threads, in bytes per second. Each thread stays on its own
 * one of `cpus`, or goes anywhere where that is NULL. Negative when memory or threads are not to be had. */
double membw_read(size_t size, int threads, const int *cpus, int repeats) {
    if (threads < 1 || threads > MOST_THREADS)
        return -1;
    size_t each = size / (size_t)threads / (PLACES * 4096) * (PLACES * 4096);
    if (each == 0)
        return -1;
    size = each * (size_t)threads;
    unsigned char *buffer = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED)
        return -1;
    madvise(buffer, size, MADV_HUGEPAGE);
    share shares[MOST_THREADS];
    for (int at = 0; at < threads; at++)
        shares[at] = (share){.start = buffer + (size_t)at * each, .size = each, .cpu = cpus ? cpus[at] : -1};
    double best = -1;
    for (int repeat = 0; repeat < repeats; repeat++) {
        double rate = read_shares(shares, threads);
        if (rate < 0) {
            best = -1;
            break;
        }
        best = rate > best ? rate : best;
    }
    munmap(buffer, size);
    return best;
}
