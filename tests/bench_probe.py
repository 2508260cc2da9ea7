"""What linear evaluation on features saves: §4's linear evaluation (40 epochs, batches of 64) with the features extracted once,
extraction included, against passing the pictures through the frozen backbone, without gradient, in each epoch (EfficientNet-Lite0,
96 px, 256 + 64 pictures, 8 classes). Both are timed turn by turn in one run; the median of the ratios counts.

python tests/bench_probe.py                 four minutes
"""
import argparse
import statistics
import time

import numpy as np
import torch

from pacl.evaluate import extract, train_head
from pacl.parts.encoders import load_backbone
from pacl.parts.readers import single

AT_LEAST = 20  # times faster on features
TASK = single('abcdefgh')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=40, help='of the head (%(default)s)')
    parser.add_argument('--rounds', type=int, default=3, help='of which the median is taken (%(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(1)  # as the stage uses for each encoder
    rng = np.random.default_rng(0)
    backbone = load_backbone('tf_efficientnet_lite0').requires_grad_(False)  # no gradient is computed for it in either way
    splits = []
    for n in (256, 64):  # noise whose brightness is the label
        y = rng.integers(8, size=(n, 1))
        noise = rng.random((n, 96, 96, 3), dtype=np.float32)
        splits.append(((noise * (24 + 32 * y[..., None, None])).astype(np.uint8), y))
    seconds = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        fast = train_head(TASK, *((extract(x, backbone).numpy(), y) for x, y in splits), epochs=args.epochs)
        between = time.perf_counter()
        slow = train_head(TASK, *splits, backbone=backbone, backbone_lr=0, epochs=args.epochs)
        seconds.append((between - start, time.perf_counter() - between))
    ratio = statistics.median(b / a for a, b in seconds)
    print(f'seconds on features, and on pictures in each epoch: {seconds}; ratio {ratio:.1f}, demanded {AT_LEAST}; '
          f'largest difference of a weight {(fast.weight - slow.weight).abs().max():.1e}')


if __name__ == '__main__': main()
