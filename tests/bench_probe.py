"""What linear evaluation on features saves, and what more seeds of a head cost. Both sides of a ratio are timed turn by turn in one run.

features  §4's linear evaluation (40 epochs, batches of 64) with the features extracted once, extraction included, against passing the
          pictures through the frozen backbone, without gradient, in each epoch (EfficientNet-Lite0, 96 px, 256 + 64 pictures, 8 classes)
seeds     8 seeds of a head together against one (features of 1,280 dimensions, 1,500 + 300 rows)

python tests/bench_probe.py                 both, five minutes
"""
import argparse
import statistics
import time

import numpy as np
import torch

from pacl.parts.readers import single
from pacl.parts.encoders import load_backbone
from pacl.evaluate import extract, train_heads

AT_LEAST = 20  # times faster on features
TASK = single('abcdefgh')


def take_turns(rounds, **works):
    "Seconds of each work in each round, and what it returned last. Each: how often in a round (the mean counts), and what is called."
    seconds, found = {name: [] for name in works}, {}
    for _ in range(rounds):
        for name, (times, work) in works.items():
            start = time.perf_counter()
            for _ in range(times): found[name] = work()
            seconds[name].append((time.perf_counter() - start) / times)
    return seconds, found


def compare(seconds):
    (first, a), (second, b) = ((name, statistics.median(s)) for name, s in seconds.items())
    ratios = [y / x for x, y in zip(*seconds.values())]
    return f'{first} {a:.2f} s, {second} {b:.2f} s; ratio {b / a:.2f} (each round {min(ratios):.2f} … {max(ratios):.2f})'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='?', default='both', choices=['both', 'features', 'seeds'])
    parser.add_argument('--pictures', type=int, nargs=2, default=[256, 64], help='to learn from, to choose by (256 64)')
    parser.add_argument('--side', type=int, default=96, help='pixels (%(default)s)')
    parser.add_argument('--epochs', type=int, default=40, help='of the head (%(default)s)')
    parser.add_argument('--rounds', type=int, default=3, help='of which the median is taken (%(default)s)')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads (%(default)s, as the stage uses for each encoder)')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    def labels(n): return rng.integers(len(TASK.classes[0]), size=(n, 1))
    print(f'{args.threads} threads, {args.epochs} epochs')
    if args.what != 'seeds':
        backbone = load_backbone('tf_efficientnet_lite0').requires_grad_(False)  # no gradient is computed for it in either way
        splits = []
        for y in map(labels, args.pictures):  # noise whose brightness is the label
            noise = rng.random((len(y), args.side, args.side, 3), dtype=np.float32)
            splits.append(((noise * (24 + 32 * y[..., None, None])).astype(np.uint8), y))
        def once():
            return train_heads(TASK, *((extract(x, backbone).numpy(), y) for x, y in splits), epochs=args.epochs)
        def each_epoch(): return train_heads(TASK, *splits, backbone=backbone, backbone_lr=0, epochs=args.epochs)
        once()  # sets up
        seconds, found = take_turns(args.rounds, **{'features': (5, once), 'pictures in each epoch': (1, each_epoch)})
        fast, slow = (probes[0].weight for probes, _ in found.values())
        print(f'{" + ".join(map(str, args.pictures))} pictures: {compare(seconds)}, demanded {AT_LEAST}; '
              f'largest difference of a weight {(fast - slow).abs().max():.1e}, largest weight {fast.abs().max():.1e}', flush=True)
    if args.what != 'features':
        splits = [(rng.normal(size=(n, 1280)).astype(np.float32), labels(n)) for n in (1500, 300)]
        def seeds(n): return train_heads(TASK, *splits, epochs=args.epochs, seeds=tuple(range(n)))
        seeds(8)
        works = {'1 seed': (1, lambda: seeds(1)), '8 seeds': (1, lambda: seeds(8))}
        print('1,500 rows:', compare(take_turns(max(args.rounds, 5), **works)[0]))


if __name__ == '__main__': main()
