"""What the adaptive loss costs beside open_clip's ClipLoss, forward and backward, with the features' normalisation in both.

All losses take turns in one process, so that a busy machine slows each alike; the median of the repetitions is printed."""
import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from pacl.contrast import pacl_loss
from pacl.partition import PARTITIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', type=int, nargs='+', default=[256], help='pairs in the batch, N (256)')
    parser.add_argument('--dim', type=int, default=512, help='features of a sample, D (512)')
    parser.add_argument('--clusters', type=int, default=2, help='r of both kinds (2)')
    parser.add_argument('--seconds', type=float, default=20, help='to spend on each size, in at least five repetitions (20)')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads (1)')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clip = ClipLoss()
    print(f'{args.threads} threads, D = {args.dim}, float32, forward + backward; at N = 256 at most 1.20 × ClipLoss')
    for n in args.sizes:
        images, texts = (torch.randn(n, args.dim, requires_grad=True) for _ in range(2))
        clusters = [torch.randint(args.clusters, (n,)) for _ in range(2)]
        calls = {'ClipLoss': lambda: clip(F.normalize(images, dim=1), F.normalize(texts, dim=1), 1 / 0.07).backward()}
        for name in PARTITIONS: calls[name] = lambda name=name: pacl_loss(images, texts, name, *clusters).backward()
        times, start = {name: [] for name in calls}, time.perf_counter()
        while len(times['ClipLoss']) < 5 or time.perf_counter() - start < args.seconds:
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
        median = {name: statistics.median(t) for name, t in times.items()}
        for name in calls: print(f'{n:6,}  {name:10} {median[name] * 1e3:8.1f} ms  {median[name] / median["ClipLoss"]:5.2f}')
        print(f'        median of {len(times["ClipLoss"])}', flush=True)


if __name__ == '__main__': main()
