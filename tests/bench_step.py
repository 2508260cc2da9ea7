"""What a training step costs beside its backbone. Both sides of each ratio are timed turn by turn in one run.

step     read, augment, forward, adaptive loss, backward, AdamW, against forward, backward and AdamW of the same backbone on a batch
         that is there already (EfficientNet-Lite0, 96 px, all of it learns, 64 pairs of one partition)
text     the same step of a ResNet-50 at 224 px with the texts' features kept, against one that runs a text tower of RoBERTa-large's size
         in each step, frozen and without gradient
compile  the step of `step` with the backbone compiled, against not
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from test_train import make_run

from pacl import train
from pacl.train import Batches, Posts, Towers, TrainConfig, backward_step, plan_steps, step_losses

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('what', nargs='?', default='step', choices=['step', 'text', 'compile'])
parser.add_argument('--rounds', type=int, default=10, help='of which the median is taken (%(default)s)')
parser.add_argument('--batch', type=int, default=64, help='pairs (%(default)s)')
parser.add_argument('--tokens', type=int, default=77, help='of each text (%(default)s)')
parser.add_argument('--partition', default='weak', choices=train.PARTITIONS, help='whose loss (%(default)s, the dearest)')


class Step:
    "A training step as `pacl.train.train` makes it."
    def __init__(self, posts, **settings):
        self.posts, self.config = posts, TrainConfig(**settings)
        self.towers = Towers(posts, self.config)
        self.optimizer = torch.optim.AdamW([p for p in self.towers.parameters() if p.requires_grad], fused=True)
        self.plan = plan_steps(posts.partitions['evaluators'], self.config)
        self.plan = [{'epoch': s['epoch'], args.partition: s[args.partition]} for s in self.plan if args.partition in s]
        self.batches, self.number = Batches(posts, self.plan, 0), 0

    def inputs(self):
        k = self.number = (self.number + 1) % len(self.plan)
        return self.posts.inputs(self.batches[k], self.batches.rows[k], self.batches.seeds[k], self.towers.backbone)

    def __call__(self, texts=None):
        inputs = self.inputs()
        step, rows = self.plan[self.number], self.batches.rows[self.number]
        self.optimizer.zero_grad()
        backward_step(self.towers, inputs, self.posts.text[rows] if texts is None else texts,
                      lambda v, t: step_losses(v, t, step, self.posts, self.config), self.config)
        self.optimizer.step()


def bare(step, x):
    step.optimizer.zero_grad()
    step.towers.trainable(x).square().mean().backward()
    step.optimizer.step()


def compare(**works):
    seconds = {name: [] for name in works}
    for number in range(args.rounds + 1):  # the first round warms up
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if number: seconds[name].append(time.perf_counter() - start)
    (first, a), (second, b) = ((name, statistics.median(s)) for name, s in seconds.items())
    ratios = [x / y for x, y in zip(*seconds.values())]
    print(f'{torch.get_num_threads()} threads, {args.batch} pairs: {first} {a:.3f} s, {second} {b:.3f} s a step; '
          f'ratio {a / b:.3f} (each round {min(ratios):.2f} … {max(ratios):.2f})')


if __name__ == '__main__':
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(sizes=(max(2 * args.batch, 256),) * 4, trainable_stages=0, side=96)
        if args.what == 'text':
            import timm
            from transformers import RobertaConfig, RobertaModel

            from pacl.parts.encoders import save_backbone
            save_backbone(timm.create_model('resnet50', num_classes=0), Path(folder) / 'resnet50', 224)
            step = Step(Posts(make_run(Path(folder) / 'run', backbone=f'local-dir:{folder}/resnet50', **settings | {'side': 224})),
                        batch_size=args.batch)
            shape = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, vocab_size=50265)
            tower = RobertaModel(RobertaConfig(**shape, max_position_embeddings=514), add_pooling_layer=False).eval()
            tokens = torch.from_numpy(np.random.default_rng(0).integers(5, 50265, (args.batch, args.tokens)))

            def with_text():
                with torch.inference_mode(): features = tower(tokens).last_hidden_state[:, 0]
                step(features[:, :step.posts.text.shape[1]].clone())
            compare(**{'text tower in each step': with_text, 'features kept': step})
        else:
            posts = Posts(make_run(Path(folder) / 'run', **settings))
            step = Step(posts, batch_size=args.batch)
            if args.what == 'step':
                x = step.inputs()
                compare(**{'whole step': step, 'bare step': lambda: bare(step, x)})
            else: compare(**{'compiled': Step(posts, batch_size=args.batch, compile=True), 'eager': step})
