"""What the adaptive loss costs beside open_clip's ClipLoss, forward and backward, with the features' normalisation in both.

python tests/bench_loss.py           N = 256, D = 512, on one thread of the CPU: at most 1.20 is aimed at; on a GPU: gpu_check.py
"""
import argparse
import statistics

import torch
from gpu_check import loss_ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', type=int, nargs='+', default=[256], help='pairs in the batch, N (256)')
    parser.add_argument('--rounds', type=int, default=9, help='of which the median is taken (%(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for n in args.sizes:
        rounds = [dict(loss_ratios(n, 512, .2, 'cpu')) for _ in range(args.rounds)]
        for name in rounds[0]:
            print(f'{n:6,}  {name:10} {statistics.median(ratios[name] for ratios in rounds):5.2f} × ClipLoss', flush=True)


if __name__ == '__main__': main()
