"""Is training right and fast on this machine's GPU? One file, no network: weights are random, posts are noise.

python tests/gpu_check.py                       at most 8 minutes; a table, and data/measured/gpu.json
python tests/gpu_check.py --only loss resume    these checks alone
python tests/gpu_check.py --cpu-dry-run         every line on the CPU with tiny sizes, under a minute

The check `demo` compares with runs/demo, which ./reproduce.sh makes, and is left out where there is none.
Exit code: 0 all is within its aim, 1 something is not, or failed, 3 there is no GPU. A dry run judges no aim.
"""
import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_cluster import make_features
from open_clip.loss import ClipLoss
from test_train import make_run
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from pacl.cluster import cluster_features
from pacl.contrast import pacl_loss
from pacl.evaluate import benchmark_inputs, extract, learning_stages, linear_probe
from pacl.parts.data import load_tasks
from pacl.parts.encoders import BACKBONES, load_backbone, load_text_encoder, run_frozen, save_backbone
from pacl.partition import PARTITIONS
from pacl.train import Pictures, Posts, Towers, TrainConfig, plan_steps, step_losses, train

ROOT = Path(__file__).parents[1]
FAILED = 'no error'


class Sizes(NamedTuple):
    networks: dict   # name → timm's
    side: int        # of the pictures, pixels
    pairs: int       # of each partition
    batch: int       # of each partition in a step that is timed
    few: int         # the same in a curve that is compared; half in a step
    steps: int       # of a compared curve, in three phases
    seconds: float   # of each timing
    losses: tuple    # N
    rows: int        # of k-means
    compiler: str    # of torch.compile


ON_GPU = Sizes({name: BACKBONES[name] for name in ('resnet50', 'vit_base', 'swin_base')},
               224, 768, 64, 8, 30, 4., (256, 4096, 16384), 200_000, 'inductor')
DRY = Sizes({'resnet50': 'test_resnet', 'vit_base': 'test_vit', 'swin_base': 'test_efficientnet'},
            160, 12, 3, 4, 6, .01, (16,), 300, 'eager')


class Place(NamedTuple):
    sizes: Sizes
    device: torch.device
    run: Path   # a profile's folder, made of noise
    demo: Path  # the model that the check `demo` trains anew, below its profile's models/


class Row(NamedTuple):
    what: str
    value: float
    unit: str
    aim: str = ''
    fine: bool = True


def at_most(limit, what, value, unit): return Row(what, value, unit, f'≤ {limit:.2g}', bool(value <= limit))


def at_least(limit, what, value, unit): return Row(what, value, unit, f'≥ {limit}', value >= limit)


# what the checks stand on

def make_network(place, name):
    "A folder, as load_backbone takes it. The last norm of a block is 0 in timm, and nothing before it would learn."
    folder = place.run.with_name('networks') / name
    if not folder.exists():
        torch.manual_seed(0)
        network = timm.create_model(place.sizes.networks[name], num_classes=0)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d): nn.init.ones_(module.weight)
        save_backbone(network, folder, place.sizes.side)
    return str(folder)


def make_posts(place):
    "What the stages before training leave; pictures of large fields, since noise looks alike to a network."
    sizes = place.sizes
    network = make_network(place, 'resnet50')
    make_run(place.run, trainable_stages=0, backbone=network, sizes=[sizes.pairs] * 4, side=sizes.side)
    rng = np.random.default_rng(0)
    for image in np.load(place.run / 'data/posts.npy', mmap_mode='r+'):
        fields = rng.integers(0, 256, (sizes.side // 32, sizes.side // 32, 3), np.uint8)
        image[:] = fields.repeat(32, 0).repeat(32, 1)


def make_demo(place):
    "For a dry run: a set `new` of the posts' pictures, and a model."
    data = place.run / 'data'
    task = {'kind': 'single-label', 'columns': ['label'], 'classes': [['awe', 'fear']]}
    (data / 'tasks.json').write_text(json.dumps({'new': {'label': task}}))
    table = pd.read_csv(data / 'posts.csv', dtype=str)
    table['label'] = np.resize(['awe', 'fear'], len(table))
    table['split'] = np.resize(['train', 'val', 'test'], len(table))
    table.to_csv(data / 'new.csv', index=False)
    shutil.copy(data / 'posts.npy', data / 'new.npy')
    train(Posts(place.run), config_of(3, 3), place.demo)


def posts_for(place, name):
    posts = Posts(place.run)
    posts.settings['backbone'] = make_network(place, name)
    return posts


def config_of(steps, batch, **more):
    "A third of the steps with the losses of one, of three and of four partitions."
    images = 8 * batch * max(steps // 3, 1)
    return TrainConfig(epochs=3, batch_size=batch, images=images, checkpoint_minutes=60, **more)


def wait():
    if torch.cuda.is_available(): torch.cuda.synchronize()


def seconds_a_call(call, seconds):
    for _ in range(2): call()  # the first ones are slower
    wait()
    start = time.perf_counter()
    call()
    wait()
    n = max(3, math.ceil(seconds / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(n): call()
    wait()
    return (time.perf_counter() - start) / n


def peak_memory(start=False):  # GiB since it was called with `start`
    if not torch.cuda.is_available(): return 0.
    if start: torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2**30


class Bare:
    "Forward, backward and AdamW of the network alone, in bfloat16, on a batch that is there already."
    def __init__(self, place, name):
        sizes = place.sizes
        self.network = load_backbone(make_network(place, name)).to(place.device)
        images = torch.rand(4 * sizes.batch, 3, sizes.side, sizes.side, device=place.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-5, fused=True)

    def __call__(self):
        with torch.autocast(self.images.device.type, torch.bfloat16): features = self.network(self.images)
        self.optimizer.zero_grad()
        features.float().square().mean().backward()
        self.optimizer.step()


# the checks: each yields rows

def losses_and_gradients(posts, config, device, dtype):
    torch.manual_seed(0)
    towers = Towers(posts, config, posts.text().shape[1]).to(device, dtype)
    towers.device = device
    step = plan_steps(posts.partition(), config)[-1]
    pictures, rows, seeds = Pictures(posts, [step], 0)[0]
    images = towers.image_inputs(torch.from_numpy(pictures), seeds)
    losses = step_losses(*towers(images, posts.text()[rows]), step, posts.clusters(), config)
    sum(losses).backward()
    gradients = [p.grad.flatten().cpu() for p in towers.parameters() if p.grad is not None]
    return torch.stack(losses).detach().cpu(), torch.cat(gradients)


def float32(place):
    """One step with all four losses against the CPU's in float64. Where a number is nearly 0, rounding decides what a ReLU lets pass:
    the CPU's own float32 gradients are 8e-4 off for ResNet-50 (ViT: 1e-6), so five times that is granted where it is over 1e-4."""
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's convolutions would round to 10 bits
    cpu = torch.device('cpu')
    for name in ('resnet50', 'vit_base'):
        given = posts_for(place, name), config_of(3, place.sizes.few // 2, precision='float32')
        exact = losses_and_gradients(*given, cpu, torch.float64)
        ours, usual = (losses_and_gradients(*given, device, torch.float32) for device in (place.device, cpu))
        for what, x, a, b in zip(('losses', 'gradients'), exact, ours, usual):
            off, granted = (((y - x).norm() / x.norm()).item() for y in (a, b))
            yield at_most(max(1e-4, 5 * granted), f'{name}, {what}', off, 'of their length')
    torch.backends.cudnn.allow_tf32 = True


def curve(folder):
    "Sums of a step's losses, means of five steps."
    losses = pd.read_csv(folder / 'log.csv').drop(columns=['step', 'epoch', 'lr']).sum(axis=1)
    return losses.rolling(5, min_periods=1).mean()


def trained(place, precision):
    config = config_of(place.sizes.steps, place.sizes.few, precision=precision)
    train(Posts(place.run), config, place.run / precision)  # once: a folder that is there stays
    return curve(place.run / precision)


def furthest(curves): return (curves[0] / curves[1] - 1).abs().max().item()


def bfloat16(place):
    curves = [trained(place, precision) for precision in ('bfloat16', 'float32')]
    yield at_most(.02, f'loss of {place.sizes.steps} steps', furthest(curves), 'of float32’s at most')


def seconds_a_step(posts, config, folder):
    "Of `train` as it is, in the second half of those steps that have all four losses."
    ends = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    train(posts, config, folder)
    hook.remove()
    last = ends[-max(len(ends) // 6, 2):]
    return (last[-1] - last[0]) / (len(last) - 1)


def throughput(place):
    "Reading, augmenting, both towers, losses, AdamW against the network alone."
    sizes = place.sizes
    for name in sizes.networks:
        bare = seconds_a_call(Bare(place, name), sizes.seconds)
        peak_memory(start=True)
        steps = 3 * max(4, int(sizes.seconds / bare))
        config = config_of(steps, sizes.batch, precision='bfloat16', workers=min(8, os.cpu_count() // 2))
        whole = seconds_a_step(posts_for(place, name), config, place.run / f'speed-{name}')
        yield Row(f'{name}, training', 4 * sizes.batch / whole, 'pictures/s')
        yield at_least(.9, f'{name}, of the bare loop', bare / whole, 'times as fast')
        yield Row(f'{name}, peak memory', peak_memory(), 'GiB')


def waits(place):
    "What the GPU waits for: the parts of a step of ResNet-50, each by itself."
    posts, config = posts_for(place, 'resnet50'), config_of(3, place.sizes.batch, precision='bfloat16')
    step = plan_steps(posts.partition(), config)[-1]
    pictures, labels = Pictures(posts, [step], 0), posts.clusters()
    kept, rows, seeds = pictures[0]
    kept, texts = torch.from_numpy(kept), posts.text()[rows]
    towers = Towers(posts, config, texts.shape[1])
    images = towers.image_inputs(kept, seeds)
    features = torch.randn(2, len(rows), config.dim, device=place.device, requires_grad=True)

    def both_ways(image_features, text_features):
        sum(step_losses(image_features, text_features, step, labels, config)).backward()

    def timed(what, call): return Row(what, 1000 * seconds_a_call(call, place.sizes.seconds / 4), 'ms a step')

    yield timed('reading, in one process', lambda: pictures[0])
    yield timed('moving and augmenting', lambda: towers.image_inputs(kept, seeds))
    yield timed('losses and their gradients', lambda: both_ways(*features))
    yield timed('both towers and losses', lambda: both_ways(*towers(images, texts)))
    backend = 'nccl' if place.device.type == 'cuda' else 'gloo'
    dist.init_process_group(backend, init_method=f'file://{place.run}/group', rank=0, world_size=1)
    model = DistributedDataParallel(towers, broadcast_buffers=False, static_graph=True)
    yield timed('the same, summed over a group of one process', lambda: both_ways(*model(images, texts)))
    dist.destroy_process_group()


def loss_ratios(n, dim, seconds, device):
    "Forward and backward with the features' normalisation: name of the partition → times ClipLoss."
    torch.manual_seed(0)
    images, texts = torch.randn(2, n, dim, device=device, requires_grad=True)
    clusters = torch.randint(2, (2, n), device=device)
    clip = ClipLoss()
    theirs = seconds_a_call(lambda: clip(F.normalize(images, dim=1), F.normalize(texts, dim=1), 1 / .07).backward(), seconds)
    for name in PARTITIONS:
        ours = seconds_a_call(lambda: pacl_loss(images, texts, name, *clusters).backward(), seconds)
        yield name, ours / theirs


def loss(place):
    for n in place.sizes.losses:
        for name, ratio in loss_ratios(n, 512, place.sizes.seconds / 10, place.device):
            yield at_most(1.2, f'{name}, N = {n:,}', ratio, '× open_clip’s ClipLoss')


def kmeans(place):
    rows, file = place.sizes.rows, place.run / 'kmeans.npy'
    make_features(file, rows, 2048)
    features = np.load(file)
    start = time.perf_counter()
    cluster_features(features, 2)
    yield Row(f'{rows:,} × 2,048, r = 2, on one core', time.perf_counter() - start, 's')


def extraction(place):
    images = Posts(place.run).images[:512]
    works = {'MiniLM, 20 words, texts': lambda: encoder.embed_texts(texts)}
    encoder = load_text_encoder('minilm')
    encoder.model.to(place.device)
    texts = [f'so happy to see number {i} {"on a day like this" * 3}' for i in range(len(images))]
    for name in place.sizes.networks:
        network = load_backbone(make_network(place, name)).to(place.device)
        works[f'{name}, pictures'] = partial(run_frozen, network, images, name, network)
    for what, work in works.items():
        yield Row(what, len(images) / seconds_a_call(work, 0), 'a second')


def resume(place):
    "A training that is killed by kill -9, against one that is not."
    config = config_of(place.sizes.steps, place.sizes.few, precision='bfloat16')
    settings = ['epochs=3', f'batch_size={config.batch_size}', f'images={config.images}', 'precision=bfloat16']
    folder, part = place.run / 'killed', place.run / 'killed.part'
    def checkpoints(): return len([*part.glob('[0-9a-f]*.pt')])
    command = [sys.executable, '-m', 'pacl.train', place.run, folder, *settings, 'checkpoint_minutes=1e-6']
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None and not checkpoints(): time.sleep(.001)
    process.kill()
    process.wait()
    yield at_least(1, 'killed after a checkpoint', checkpoints(), '')
    train(Posts(place.run), config, folder)
    yield at_most(.02, 'loss, against an undisturbed run', furthest([curve(folder), trained(place, 'bfloat16')]), 'at most')


def right_answers(run, folder):
    "Of a linear probe on the test pictures of `new`."
    table, inputs = benchmark_inputs(run, 'new')
    task = load_tasks(run)['new']['label']
    x = extract(inputs, learning_stages(run, folder)).cpu().numpy()
    y = task.targets(table)
    learnt, chosen, asked = (np.flatnonzero(table['split'] == split) for split in ('train', 'val', 'test'))
    answers = linear_probe((x[learnt], y[learnt]), (x[chosen], y[chosen]), x[asked], task)
    return (answers == y[asked]).astype(float)


def demo(place):
    "PACL of the demo trained anew, here: as accurate as the one that is there?"
    if not place.demo.exists(): return
    record = json.loads((place.demo / 'record.json').read_text())
    settings = {name: record[name] for name in TrainConfig.__dataclass_fields__} | {'precision': 'auto'}
    run, again = place.demo.parents[1], place.run / 'again'
    train(Posts(run), TrainConfig(**settings), again)
    before, now = (right_answers(run, path) for path in (place.demo, again))
    half = round(1.96 * before.std() / len(before) ** .5, 3)
    yield at_most(half, f'accuracy {now.mean():.3f}, before {before.mean():.3f}: apart', abs(now.mean() - before.mean()), '')


def options(place):
    "What would make the network's own step faster or smaller; the slowest to try comes last."
    ways = {'as it is': lambda network: network,
            'channels_last weights': lambda network: network.to(memory_format=torch.channels_last),
            'gradient checkpointing': lambda network: network.set_grad_checkpointing() or network,
            'torch.compile': lambda network: torch.compile(network, backend=place.sizes.compiler)}
    usual = {}
    for way, change in ways.items():
        for name in place.sizes.networks:
            work = Bare(place, name)
            work.network = change(work.network)
            peak_memory(start=True)
            seconds = seconds_a_call(work, place.sizes.seconds / 4)
            yield Row(f'{name}, {way}', usual.setdefault(name, seconds) / seconds, 'times as fast')
            yield Row(f'{name}, {way}, peak memory', peak_memory(), 'GiB')


CHECKS = {check.__name__: check for check in (
    float32, bfloat16, throughput, waits, loss, resume, demo, extraction, kmeans, options)}


def checked(place, name, until):
    "Rows of one check; what went wrong is one, too."
    try:
        for row in CHECKS[name](place):
            yield row
            if time.monotonic() > until: raise TimeoutError('no time was left for the rest')
    except Exception as error:
        traceback.print_exc()
        yield Row(f'{type(error).__name__}: {error}', 0., '', FAILED, False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cpu-dry-run', action='store_true')
    parser.add_argument('--only', nargs='+', choices=CHECKS, default=CHECKS)
    parser.add_argument('--out', type=Path, default=ROOT / 'data/measured/gpu.json')
    args = parser.parse_args()
    if args.cpu_dry_run: os.environ['CUDA_VISIBLE_DEVICES'] = ''
    elif not torch.cuda.is_available():
        print('There is no GPU that PyTorch sees. --cpu-dry-run shows that every line runs.')
        return 3
    os.environ.setdefault('PACL_PROGRESS', os.devnull)  # no bars amid the table
    start, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / 'run'
        place = Place(ON_GPU, torch.device('cuda'), run, ROOT / 'runs/demo/models/pacl-s0')
        if args.cpu_dry_run: place = Place(DRY, torch.device('cpu'), run, run / 'models/pacl-s0')
        make_posts(place)
        if args.cpu_dry_run: make_demo(place)
        for name in args.only:
            for row in checked(place, name, start + 420):
                print(f'{name:11} {row.what:46} {row.value:10,.4g} {row.unit:24} {row.aim:9}', '' if row.fine else 'NO', flush=True)
                rows.append({'check': name} | row._asdict())
    card = 'CPU, a dry run' if args.cpu_dry_run else torch.cuda.get_device_name()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({'card': card, 'torch': torch.__version__, 'rows': rows}, indent=1))
    print(f'{card}, {time.monotonic() - start:.0f} s: {args.out}')
    wrong = [row for row in rows if not row['fine'] and (row['aim'] == FAILED or not args.cpu_dry_run)]
    return int(bool(wrong))


if __name__ == '__main__': sys.exit(main())
