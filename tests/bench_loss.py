"""What the adaptive loss costs beside open_clip's ClipLoss, forward and backward, with the features' normalisation in both.

python tests/bench_loss.py           N = 256, D = 512, on one thread of the CPU: at most 1.20 is aimed at; on a GPU: gpu_check.py
"""
import pandas as pd
import torch
from gpu_check import loss_ratios

if __name__ == '__main__':
    torch.set_num_threads(1)
    rounds = [dict(loss_ratios(256, 512, .2, 'cpu')) for _ in range(9)]
    print(pd.DataFrame(rounds).median().to_string(float_format='{:.2f} × ClipLoss'.format))
