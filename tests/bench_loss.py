"""What the adaptive loss costs beside open_clip's ClipLoss, forward and backward, with the features' normalisation in both.

All losses take turns in one process, so that a busy machine slows each alike; the median of the repetitions is printed.
It needs free cores all the same: at N = 256 an operation lasts microseconds, and its threads wait for the one whose core was taken.
Extra memory is the peak above what was there before one call (Linux only)."""
import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from pacl.contrast import FILTERS, pacl_loss

LIMITS = dict(strong=1.3, emotional=1.3, factual=1.3, weak=1.6)  # × ClipLoss


def resident(peak: bool) -> int | None:  # bytes in memory now, or at most since `reset_peak`
    try: lines = Path('/proc/self/status').read_text().splitlines()
    except OSError: return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('VmHWM:' if peak else 'VmRSS:'))


def extra_memory(call) -> str:
    try: Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from what is there now
    except OSError: return '–'
    before = resident(peak=False)
    call()
    return f'{max(resident(peak=True) - before, 0) / 2**20:,.0f}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', type=int, nargs='+', default=[256, 4096], help='pairs in the batch, N (256 4096)')
    parser.add_argument('--dim', type=int, default=512, help='features of a sample, D (512)')
    parser.add_argument('--clusters', type=int, default=2, help='r of both kinds (2)')
    parser.add_argument('--seconds', type=float, default=45, help='to spend on each size, in at least five repetitions (45)')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (2)')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clip = ClipLoss()
    print(f'{args.threads} threads, D = {args.dim}, float32, forward + backward\n')
    print(f'{"N":>6}  {"loss":14} {"ms":>9} {"× ClipLoss":>11} {"at most":>8} {"extra MiB":>10}')
    for n in args.sizes:
        images, texts = (torch.randn(n, args.dim, requires_grad=True) for _ in range(2))
        clusters = [torch.randint(args.clusters, (n,)) for _ in range(2)]
        calls = {'ClipLoss': lambda: clip(F.normalize(images, dim=1), F.normalize(texts, dim=1), 1 / 0.07).backward()}
        calls |= {p: lambda p=p: pacl_loss(images, texts, p, *clusters).backward() for p in FILTERS}
        memory = {name: (call(), extra_memory(call))[1] for name, call in calls.items()}  # after a first call, which sets up
        times, start = {name: [] for name in calls}, time.perf_counter()
        while len(times['ClipLoss']) < 5 or time.perf_counter() - start < args.seconds:
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
        median = {name: statistics.median(t) for name, t in times.items()}
        for name in calls:
            limit = f'{LIMITS[name]:.1f}' if name in LIMITS else ''
            print(f'{n:6,}  {name:14} {median[name] * 1e3:9.1f} {median[name] / median["ClipLoss"]:11.2f} {limit:>8} {memory[name]:>10}')
        print(f'        median of {len(times["ClipLoss"])}\n', flush=True)


if __name__ == '__main__': main()
