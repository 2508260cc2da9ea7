"""A training step beside what one would use instead and beside its bare network, turn by turn in one run, on the CPU.

python tests/bench_step.py           EfficientNet-Lite0, 96 px, all of it learns, 4 × 16 pairs, 15 rounds: three minutes

pacl       read, augment, both towers, the four losses, AdamW, as `pacl.train.train` does it
open_clip  the same towers and batch in open_clip_train's own train_one_epoch with its ClipLoss; at most 1.05 of it is aimed at
bare       forward, backward, AdamW of the network on a batch that is there already; at most 1.10
"""
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from bench_cache import in_turn
from gpu_check import config_of
from open_clip.loss import ClipLoss
from open_clip_train.train import train_one_epoch
from test_train import make_run
from torch import nn
from torch.nn import functional as F

from pacl.train import Pictures, Posts, Towers, must_be_finite, plan_steps, step_losses

SETTINGS = SimpleNamespace(device='cpu', precision='fp32', distill=False, accum_freq=1, skip_scheduler=True, horovod=False,
                           grad_clip_norm=None, rank=0, local_rank=0, world_size=1, log_every_n_steps=1, batch_size=64, wandb=False)


class Work:
    "Towers, their optimizer, and one step of the plan."
    num_batches, num_samples = 1, 64  # for open_clip_train

    def __init__(self, posts, config):
        self.posts, self.config, self.text, self.clusters = posts, config, posts.text(), posts.clusters()
        self.step = plan_steps(posts.partition(), config)[-1]
        self.pictures = Pictures(posts, [self.step], 0)
        self.towers = Towers(posts, config, self.text.shape[1])
        self.optimizer = torch.optim.AdamW([p for p in self.towers.parameters() if p.requires_grad], fused=True)

    def __iter__(self):
        pictures, rows, seeds = self.pictures[0]
        yield self.towers.image_inputs(torch.from_numpy(pictures), seeds), self.text[rows]

    def pacl(self):
        for images, texts in self:
            losses = step_losses(*self.towers(images, texts), self.step, self.clusters, self.config)
            must_be_finite(losses, self.step, self.posts.ids, 'bench')
            self.optimizer.zero_grad()
            sum(losses).backward()
            self.optimizer.step()

    def bare(self, images):
        self.optimizer.zero_grad()
        self.towers.trainable(images).square().mean().backward()
        self.optimizer.step()


class OpenClip(nn.Module):
    "Our towers as open_clip_train calls a model."
    def __init__(self, towers):
        super().__init__()
        self.towers, self.logit_scale = towers, nn.Parameter(torch.tensor(1 / .07).log())

    def train(self, mode=True): return self  # batch norm as pre-trained, as in ours

    def forward(self, images, texts):
        v, t = self.towers(images, texts)
        return {'image_features': F.normalize(v, dim=1), 'text_features': F.normalize(t, dim=1), 'logit_scale': self.logit_scale.exp()}


def main():
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / 'run', trainable_stages=0, sizes=[64] * 4, side=96)
        work = Work(Posts(run), config_of(3, 16, precision='float32'))
        model = OpenClip(work.towers)
        data = {'train': SimpleNamespace(set_epoch=lambda epoch: None, dataloader=work)}
        (images, _), = work
        ways = {'pacl': work.pacl, 'bare': lambda: work.bare(images), 'open_clip': lambda: train_one_epoch(
            model, data, ClipLoss(), 0, work.optimizer, None, None, None, SETTINGS)}
        seconds = in_turn(ways, 16)[1:]  # the first round warms up
    for way in ways:
        ratio = (seconds['pacl'] / seconds[way]).median()
        print(f'{way:10} {seconds[way].median():.3f} s a step; pacl takes {ratio:.3f} of it, {torch.get_num_threads()} threads')


if __name__ == '__main__': main()
