/*
 * A coroutine backend that ThreadSanitizer can follow
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For tests/unit/thinvm_sanitize.py only, in the place of QEMU's own backend,
 * which goes from stack to stack by siglongjmp() and so loses TSan's idea of
 * who has called whom.  Here each coroutine is a fiber of TSan's, and the
 * stack is changed by swapcontext().
 */
#include "qemu/osdep.h"
#include <ucontext.h>
#include <sanitizer/tsan_interface.h>
#include "qemu/units.h"
#include "qemu/coroutine_int.h"

#define STACK_SIZE (256 * KiB)

typedef struct CoroutineTsan {
    Coroutine base;
    void *stack;                /* NULL: the thread's own */
    ucontext_t context;
    void *fiber;
    CoroutineAction action;     /* of who switched to it */
} CoroutineTsan;

static __thread CoroutineTsan leader;
static __thread CoroutineTsan *current;

/* Not inlined: a coroutine may go on in another thread, with other variables */
static __attribute__((noinline)) CoroutineTsan **current_place(void)
{
    asm volatile("");
    return &current;
}

static __attribute__((noinline)) CoroutineTsan *leader_place(void)
{
    asm volatile("");
    return &leader;
}

static CoroutineTsan *current_get(void)
{
    CoroutineTsan **place = current_place();

    if (!*place) {
        *place = leader_place();
        (*place)->fiber = __tsan_get_current_fiber();
    }
    return *place;
}

static void trampoline(void)
{
    for (;;) {
        Coroutine *co = &current_get()->base;

        co->entry(co->entry_arg);
        qemu_coroutine_switch(co, co->caller, COROUTINE_TERMINATE);
    }
}

Coroutine *qemu_coroutine_new(void)
{
    CoroutineTsan *co = g_new0(CoroutineTsan, 1);

    co->stack = g_malloc(STACK_SIZE);
    getcontext(&co->context);
    co->context.uc_stack.ss_sp = co->stack;
    co->context.uc_stack.ss_size = STACK_SIZE;
    makecontext(&co->context, trampoline, 0);
    co->fiber = __tsan_create_fiber(0);
    return &co->base;
}

void qemu_coroutine_delete(Coroutine *base)
{
    CoroutineTsan *co = container_of(base, CoroutineTsan, base);

    __tsan_destroy_fiber(co->fiber);
    g_free(co->stack);
    g_free(co);
}

__attribute__((noinline, no_sanitize("thread")))
CoroutineAction qemu_coroutine_switch(Coroutine *from_base, Coroutine *to_base,
                                      CoroutineAction action)
{
    CoroutineTsan *from = container_of(from_base, CoroutineTsan, base);
    CoroutineTsan *to = container_of(to_base, CoroutineTsan, base);

    *current_place() = to;
    to->action = action;
    __tsan_switch_to_fiber(to->fiber, 0);
    swapcontext(&from->context, &to->context);
    return from->action;
}

Coroutine *qemu_coroutine_self(void)
{
    return &current_get()->base;
}

bool qemu_in_coroutine(void)
{
    CoroutineTsan *self = *current_place();

    return self && self->base.caller;
}
