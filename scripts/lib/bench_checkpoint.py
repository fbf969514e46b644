# SPDX-License-Identifier: GPL-2.0-or-later
#
# What a checkpoint costs those who write meanwhile.  A client writes 4 KiB at
# random places of a new disk, one request at a time, so that metadata changes
# and checkpoints follow each other; QEMU's trace tells when each begins and
# ends.  Compared are the writes that one of them overlaps with the others.

import re
import statistics
import time

from bench_machine import Failure, Machine
from bench_workloads import VARIANTS, run

PERCENTILES = (50, 99, 99.9, 99.99)
EVENT = re.compile(r'\d+@(\d+\.\d+):thinvm_checkpoint_(freeze|done) ')


def percentile(sorted_values, percent):
    last = len(sorted_values) - 1
    return sorted_values[min(last, round(last * percent / 100))]


def spans(log, offset):
    """(begin, end) of each checkpoint, by time.perf_counter()."""
    found, begin = [], None
    for time_text, event in EVENT.findall(log):
        at = float(time_text) + offset
        if event == 'freeze':
            begin = at
        elif begin is not None:
            found.append((begin, at))
            begin = None
    return found


def split(writes, checkpoints):
    """Seconds of writes that a checkpoint overlaps, and of the others."""
    during, between, i = [], [], 0
    for begin, seconds in writes:
        while i < len(checkpoints) and checkpoints[i][1] < begin:
            i += 1
        meets = i < len(checkpoints) and checkpoints[i][0] < begin + seconds
        (during if meets else between).append(seconds)
    return sorted(during), sorted(between)


def once(args, directory):
    image, log = directory / 'checkpoint.thinvm', directory / 'trace'
    run(args.build / 'bin' / 'qemu-img', 'create', '-q', '-f', 'thinvm',
        *VARIANTS['thinvm'].create, image, '1T')
    with open(log, 'wb') as f:
        machine = Machine(args, image, 'thinvm', directory,
                          ('-msg', 'timestamp=on',
                           '-trace', 'thinvm_checkpoint_freeze',
                           '-trace', 'thinvm_checkpoint_done'), f)
        try:
            offset = time.perf_counter() - time.time()
            machine.writer.start()
            time.sleep(max(2.0, args.seconds * 5))
            machine.writer.stop()
            machine.writer.client.close()
            machine.quit()
        finally:
            machine.kill()
    image.unlink()
    found = spans(log.read_text(encoding='utf-8', errors='replace'), offset)
    during, between = split(machine.writer.writes, found)
    if not found or not during or not between:
        raise Failure(f'{len(found)} checkpoints, {len(during)} writes '
                      f'during them and {len(between)} between: --seconds '
                      'is too short to tell anything')
    return {'checkpoints': len(found),
            'checkpoint': statistics.median(e - b for b, e in found),
            'during': {p: percentile(during, p) for p in PERCENTILES},
            'between': {p: percentile(between, p) for p in PERCENTILES},
            'longest': max(during[-1], between[-1]),
            'writes_during': len(during), 'writes_between': len(between)}


def measure(args, directory):
    """Prints a table, returns what --json is to keep."""
    runs = [once(args, directory) for _ in range(args.runs)]
    count = sum(r['checkpoints'] for r in runs)
    during = sum(r['writes_during'] for r in runs)
    middle = statistics.median(r['checkpoint'] for r in runs) * 1000
    print(f'{count} checkpoints of {middle:.1f} ms (median), {during} writes '
          f'during them and {sum(r["writes_between"] for r in runs)} between; '
          f'median of {args.runs} runs:')
    print(f'{"percentile of writes, ms":26}{"between":>10}{"during":>10}'
          f'{"ratio":>8}')
    for p in PERCENTILES:
        during = statistics.median(r['during'][p] for r in runs)
        between = statistics.median(r['between'][p] for r in runs)
        ratio = statistics.median(r['during'][p] / r['between'][p]
                                  for r in runs)
        print(f'{p:<26}{between * 1000:10.3f}{during * 1000:10.3f}'
              f'{ratio:8.2f}', flush=True)
    return runs
