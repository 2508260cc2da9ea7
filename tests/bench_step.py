"""What a training step costs beside its backbone. Both sides of each ratio are timed turn by turn in one run.

step     read, augment, forward, adaptive loss, backward, AdamW, against forward, backward and AdamW of the same backbone on a batch
         that is there already (EfficientNet-Lite0, 96 px, all of it learns, 64 pairs of one partition): at most 1.10
text     the same step with the texts' features kept, against one that runs a text tower of MiniLM's size in each step
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from test_train import make_run

from pacl.partition import PARTITIONS
from pacl.train import Batch, Pictures, Posts, Step, Towers, TrainConfig, must_be_finite, step_losses

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('what', nargs='?', default='step', choices=['step', 'text'])
parser.add_argument('--rounds', type=int, default=10, help='of which the median is taken (%(default)s)')
parser.add_argument('--batch', type=int, default=64, help='pairs (%(default)s)')
parser.add_argument('--tokens', type=int, default=77, help='of each text (%(default)s)')
parser.add_argument('--partition', default='weak', choices=PARTITIONS, help='whose loss (%(default)s, the dearest)')


class WholeStep:
    "A step as `pacl.train.train` makes it."
    def __init__(self, posts, batch, partition):
        self.posts, self.config, self.text, self.clusters = posts, TrainConfig(), posts.text(), posts.clusters()
        rows = np.flatnonzero(posts.partition() == partition)[:batch]
        self.pictures = Pictures(posts, [Step(0, [Batch(partition, rows)])], 0)
        self.towers = Towers(posts, self.config, self.text.shape[1])
        self.optimizer = torch.optim.AdamW([p for p in self.towers.parameters() if p.requires_grad], fused=True)

    def inputs(self):
        pictures, rows, seeds = self.pictures[0]
        return self.towers.image_inputs(torch.from_numpy(pictures), seeds), rows

    def __call__(self, text=None):
        images, rows = self.inputs()
        v, t = self.towers(images, self.text[rows] if text is None else text)
        losses = step_losses(v, t, self.pictures.plan[0], self.clusters, self.config)
        must_be_finite(losses, self.pictures.plan[0], self.posts.ids, 'bench')
        self.optimizer.zero_grad()
        sum(losses).backward()
        self.optimizer.step()

    def bare(self, images):
        self.optimizer.zero_grad()
        self.towers.trainable(images).square().mean().backward()
        self.optimizer.step()


def compare(rounds, **works):
    seconds = {name: [] for name in works}
    for number in range(rounds + 1):  # the first round warms up
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if number: seconds[name].append(time.perf_counter() - start)
    (first, a), (second, b) = ((name, statistics.median(s)) for name, s in seconds.items())
    ratios = [x / y for x, y in zip(*seconds.values())]
    print(f'{torch.get_num_threads()} threads: {first} {a:.3f} s, {second} {b:.3f} s a step; '
          f'ratio {a / b:.3f} (each round {min(ratios):.2f} … {max(ratios):.2f})')


if __name__ == '__main__':
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        posts = Posts(make_run(Path(folder) / 'run', sizes=(max(2 * args.batch, 256),) * 4, trainable_stages=0, side=96))
        step = WholeStep(posts, args.batch, args.partition)
        if args.what == 'step':
            images, _ = step.inputs()
            compare(args.rounds, whole=step, bare=lambda: step.bare(images))
        else:
            from transformers import BertConfig, BertModel
            tower = BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)).eval()
            tokens = torch.randint(5, 30000, (args.batch, args.tokens))

            def with_text():
                with torch.inference_mode(): features = tower(tokens).last_hidden_state[:, 0]
                step(features.clone())
            compare(args.rounds, **{'text tower in each step': with_text, 'features kept': step})
