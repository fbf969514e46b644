# SPDX-License-Identifier: GPL-2.0-or-later
#
# Instructions per request, counted by valgrind's callgrind: the difference of
# two runs with different numbers of requests, so that starting and ending do
# not count.
#
# How often the event loop wakes, and what the host's interfaces for I/O do
# meanwhile, is up to the host's scheduling and differs from run to run by more
# than what formats differ by.  It is the same work for all of them, so the
# functions of the loop and the kernel interface are left out.

import re
from collections import Counter

from bench_workloads import Failure, bench_arguments, most_requests, run

FEW, MANY = 500, 3500

LOOP = re.compile(
    r'''g_|main_loop|aio_(ctx|dispatch|compute|pending|prepare|poll|notify
        |bh_poll|set|wait|get_linux|add_ready|free)
        |timerlist|timer_|qemu_clock|cpu_get_clock|get_clock|qemu_lockcnt
        |event_notifier|fdmon|ioq_|qemu_laio|io_(submit|getevents)|luring
        |thread_pool|worker_thread|qemu_(sem|cond|poll|futex)|notify_
        |ppoll|poll|clock_gettime|__vdso|read$|write$|syscall
        |pthread_(cond|create)|start_thread|clone|0x|_dl_|do_lookup
        |_int_|malloc|free|calloc|realloc|sysmalloc''',
    re.VERBOSE)


def self_costs(path):
    """Instructions that each function executed itself."""
    names, costs = {}, Counter()
    function, inclusive = None, False
    with open(path, encoding='utf-8', errors='replace') as f:
        for text in f:
            if text.startswith('fn='):
                number, _, name = text[3:].strip().partition(' ')
                if name:
                    names[number] = re.sub(r"'\d+$", '', name)
                function = names[number]
            elif text.startswith('cfn='):
                number, _, name = text[4:].strip().partition(' ')
                if name:
                    names[number] = re.sub(r"'\d+$", '', name)
            elif text.startswith('calls='):
                inclusive = True    # the next line is not its own
            elif text[:1] in '0123456789+-*' and function:
                if not inclusive:
                    costs[function] += int(text.split()[1])
                inclusive = False
    return costs


def counted(costs):
    return sum(n for name, n in costs.items() if not LOOP.match(name))


def one_run(bench, name, workload, count):
    path = bench.images.prepare(name, workload)
    out = bench.images.dir / 'callgrind.out'
    run('valgrind', '--tool=callgrind', f'--callgrind-out-file={out}',
        bench.img, *bench_arguments(name, workload, path, bench.args, count))
    bench.images.clean_up(path, workload)
    if not out.exists():
        raise Failure('callgrind has left no counts')
    result = counted(self_costs(out))
    out.unlink()
    return result


def per_request(bench, name, workload):
    most = most_requests(workload, bench.args)
    many = min(most, MANY)
    few = min(FEW, many // 4)
    return ((one_run(bench, name, workload, many) -
             one_run(bench, name, workload, few)) / (many - few))
