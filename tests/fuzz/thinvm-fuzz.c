/*
 * libFuzzer's entry to thinvm's engine
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The input is a sparse image and a program (thinvm-fuzz-image.h), what is
 * done with it is in thinvm-fuzz-run.c, and how inputs are changed in
 * thinvm-fuzz-mutate.c.  tests/fuzz/run.py builds and runs this.
 */
#include "qemu/osdep.h"
#include <sys/time.h>
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/error-report.h"
#include "qapi/error.h"
#include "thinvm-fuzz-run.h"
#include "thinvm-fuzz-mutate.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size,
                               unsigned int seed);
size_t LLVMFuzzerCustomCrossOver(const uint8_t *data1, size_t size1,
                                 const uint8_t *data2, size_t size2,
                                 uint8_t *out, size_t max_out_size,
                                 unsigned int seed);

/* Waits and warnings are no part of what is tested: see run.py, --wrap */
void coroutine_fn __wrap_qemu_co_sleep_ns_wakeable(QemuCoSleep *w,
                                                   QEMUClockType type,
                                                   int64_t ns);
void __wrap_warn_report(const char *fmt, ...);

void coroutine_fn __wrap_qemu_co_sleep_ns_wakeable(QemuCoSleep *w,
                                                   QEMUClockType type,
                                                   int64_t ns)
{
}

void __wrap_warn_report(const char *fmt, ...)
{
}

/* Seconds of CPU that one input may take; 0: any number */
static unsigned cpu_limit;

/* libFuzzer keeps the input of what aborts */
static void out_of_time(int number)
{
    static const char text[] = "thinvm-fuzz: one input takes too much CPU\n";

    if (write(STDERR_FILENO, text, sizeof(text) - 1) < 0) {
        _exit(1);
    }
    abort();
}

/* By CPU time: what is slow on a busy machine is no hang */
static void limit_cpu(unsigned seconds)
{
    struct itimerval limit = { .it_value.tv_sec = seconds };

    setitimer(ITIMER_PROF, &limit, NULL);
}

static void tell_sums(void)
{
    const FuzzSums *sums = fuzz_sums();

    fprintf(stderr, "thinvm-fuzz: checksums of data: right in %u inputs of %u,"
            " wrong in %u\n", sums->right, sums->inputs, sums->wrong);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    const char *limit = getenv("THINVM_FUZZ_CPU_SECONDS");
    sigset_t alarm;

    if (limit && qemu_strtoui(limit, NULL, 10, &cpu_limit) < 0) {
        error_report("THINVM_FUZZ_CPU_SECONDS: not a number: %s", limit);
        exit(1);
    }
    signal(SIGPROF, out_of_time);
    atexit(tell_sums);
    qemu_init_main_loop(&error_abort);
    /* The main loop takes it for itself; here it ends what hangs */
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &alarm, NULL);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    FuzzImage *image = fuzz_image_decode(data, size);

    limit_cpu(cpu_limit);
    fuzz_run(image);
    limit_cpu(0);
    fuzz_image_free(image);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size,
                               unsigned int seed)
{
    FuzzImage *image = fuzz_image_decode(data, size);
    size_t n;

    fuzz_mutate(image, seed);
    n = fuzz_image_encode(image, data, max_size);
    fuzz_image_free(image);
    return n ?: MIN(size, max_size);
}

/* The image of one and the program of the other */
size_t LLVMFuzzerCustomCrossOver(const uint8_t *data1, size_t size1,
                                 const uint8_t *data2, size_t size2,
                                 uint8_t *out, size_t max_out_size,
                                 unsigned int seed)
{
    FuzzImage *a = fuzz_image_decode(data1, size1);
    FuzzImage *b = fuzz_image_decode(data2, size2);
    uint8_t *program = a->program;
    size_t n = a->program_size;

    a->program = b->program;
    a->program_size = b->program_size;
    b->program = program;
    b->program_size = n;
    n = fuzz_image_encode(a, out, max_out_size);
    fuzz_image_free(a);
    fuzz_image_free(b);
    return n;
}
