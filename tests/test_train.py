"pacl.train: schedule and masks by the equations, any number of processes, the same bits after a kill, the truth never read."
import ast
import collections
import dataclasses
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from pacl import train as train_module
from pacl.contrast import pacl_loss, release_loss
from pacl.parts.encoders import augment, id_keys, load_backbone, save_backbone, split_backbone, to_input
from pacl.parts.stages import InputError, read_record, write_stage
from pacl.train import (FULL, MAIN, PARTITIONS, SAMPLES, Posts, Towers, TrainConfig, active_partitions, backward_step, batches_of,
                        count_images, endless_batches, enhance, gather_rows, load_checkpoint, loss_of, main, method_masks, own_rows,
                        plan_steps, run_train, save_checkpoint, step_losses, sum_gradients, train)

pytestmark = pytest.mark.usefixtures('one_thread')
N = 72
METHODS = list(dict.fromkeys(m for m, _ in FULL))


def make_run(run, seed=0, trainable_stages=2, true=True, backbone='tf_efficientnet_lite0', sizes=(16, 20, 12, 24), side=32):
    "A profile's folder as the stages before leave it, with noise for pictures, features and scores."
    rng = np.random.default_rng(seed)
    N = sum(sizes)
    ids = [f'{i:04d}' for i in range(N)]
    partition = rng.permutation(np.repeat(PARTITIONS, sizes))
    with write_stage(run / 'data', {'stage': 'data', 'parameters': {}}) as data:
        pd.DataFrame({'id': ids, 'image': 'x.png', 'text': 'so it goes'}).to_csv(data / 'posts.csv', index=False)
        np.save(data / 'posts.npy', rng.integers(0, 256, (N, side, side, 3), np.uint8))
    features = {'backbone': backbone, 'trainable_stages': trainable_stages}
    with write_stage(run / 'features', {'stage': 'features', 'parameters': features}) as folder:
        np.save(folder / 'text.npy', rng.normal(size=(N, 384)).astype(np.float32))
        if trainable_stages: np.save(folder / 'early_posts.npy', rng.normal(size=(2, N, 112, 6, 6)).astype(np.float16))
    with write_stage(run / 'partition', {'stage': 'partition', 'parameters': {}}) as folder:
        for name, kinds in {'partition': partition, 'true_partition': rng.permutation(partition)}.items():
            table = pd.DataFrame({'id': ids, 'factual': rng.random(N), 'emotional': rng.random(N), 'partition': kinds})
            if name == 'partition' or true: table.sample(frac=1, random_state=0).to_csv(folder / f'{name}.csv', index=False)  # not in order
        (folder / 'truth.csv').write_text('id\n')
    with write_stage(run / 'clusters', {'stage': 'clusters', 'parameters': {}}) as folder:
        clusters = pd.DataFrame({'id': ids, **{f'{k}_cluster': rng.integers(2, size=N) for k in ('factual', 'emotional')}})
        clusters.iloc[::-1].to_csv(folder / 'clusters.csv', index=False)
    (run / 'world').mkdir()
    (run / 'world/truth.csv').write_text('id\n')
    return run


def copy(run, to):
    shutil.copytree(run, to)
    return to


@pytest.fixture(scope='module')
def run(tmp_path_factory): return make_run(tmp_path_factory.mktemp('runs') / 'mini')


@pytest.fixture(scope='module')
def posts(run): return Posts(run)


CONFIG = TrainConfig(batch_size=8, seed=3)


@pytest.fixture(scope='module')
def trained(posts, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained') / CONFIG.name
    train(posts, CONFIG, folder)
    return folder


# settings

@pytest.mark.parametrize('settings, says', [
    ({'temprature': 1}, 'unknown setting "temprature"; nearest valid: temperature'),
    ({'method': 'palc'}, 'method is "palc", expected one of unpartitioned, strong, pacl'),
    ({'partition': 'truth'}, 'partition is "truth", expected one of evaluators, true'),
    ({'mixing': 'both'}, 'mixing is "both", expected one of together, alternate'),
    ({'epochs': 0}, 'epochs is 0, expected 1 or more'), ({'batch_size': 1}, 'batch_size is 1, expected 2 or more'),
    ({'epochs': 3.5}, 'epochs is 3.5, expected int'), ({'chunk': -1}, 'chunk is -1'), ({'lr': 0}, 'lr is 0.0, expected a number above 0'),
    ({'temperature': math.nan}, 'temperature is nan'), ({'lr': '1e-4'}, "lr is '1e-4', expected float"),
    ({'weights': 5}, 'weights is 5, expected tuple'), ({'weights': [1, 1, 'a', 1]}, 'weights is .*, expected four numbers'),
    ({'weights': (1, 1, 1)}, 'weights is .*, expected four numbers'), ({'weights': (1, 1, 1, -1)}, 'weights is .*, expected four numbers'),
    ({'chunk': 8, 'batch_norm': 'trained'}, 'chunk and batch_norm=trained')])
def test_a_setting_that_makes_no_sense_stops_before_any_work(settings, says, tmp_path):
    with pytest.raises(InputError, match=says): enhance(tmp_path / 'no run', tmp_path / 'out', **settings)


# the schedule, Eqs. 15–17

def test_an_epoch_has_the_partitions_of_its_third():
    assert [active_partitions(e, 3) for e in range(3)] == [('strong',), ('strong', 'emotional', 'factual'), PARTITIONS]
    assert [len(active_partitions(e, 30)) for e in range(30)] == [1] * 10 + [3] * 10 + [4] * 10


@given(st.integers(1, 100), st.data())
def test_the_thirds_are_those_of_the_equations_whatever_the_number_of_epochs(epochs, data):
    epoch = data.draw(st.integers(0, epochs - 1))
    expected = 1 if epoch < epochs / 3 else 3 if epoch < 2 * epochs / 3 else 4
    assert active_partitions(epoch, epochs) == PARTITIONS[:expected]


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 3))
def test_each_pass_takes_each_post_at_most_once_and_fills_every_batch(n, size, seed):
    rows, stream = np.arange(100, 100 + n), endless_batches(np.arange(100, 100 + n), size, np.random.default_rng(seed))
    for _ in range(3):
        batches = [next(stream) for _ in range(max(n // size, 1))]
        assert {len(batch) for batch in batches} == {min(size, n)}
        drawn = np.concatenate(batches)
        assert len(set(drawn)) == len(drawn) and set(drawn) <= set(rows)


def test_each_pass_is_in_a_new_order():
    stream = endless_batches(np.arange(12), 4, np.random.default_rng(0))
    passes = [np.concatenate([next(stream) for _ in range(3)]).tolist() for _ in range(4)]
    assert len({tuple(p) for p in passes}) == 4 and all(sorted(p) == list(range(12)) for p in passes)


@pytest.mark.filterwarnings('ignore:partition.csv')
@pytest.mark.parametrize('method', METHODS)
@settings(max_examples=50, deadline=None)
@given(strong=st.sampled_from([1, 2, 3, 8]), others=st.lists(st.sampled_from(PARTITIONS), min_size=1, max_size=40),
       batch_size=st.integers(2, 9), epochs=st.integers(1, 7), seed=st.integers(0, 2))
def test_plan(method, strong, others, batch_size, epochs, seed):
    partition, config = np.array(['strong'] * strong + others), TrainConfig(method=method, batch_size=batch_size, epochs=epochs, seed=seed)
    count = {name: int((partition == name).sum()) for name in PARTITIONS}
    samples = SAMPLES.get(method, {name: (name,) for name in PARTITIONS})
    active = [[name for name in active_partitions(epoch, epochs) if count[name] >= 2] for epoch in range(epochs)]
    drawn = [[name for name, kinds in samples.items() if {*kinds} & {*names}] for names in active]
    if not any(active) or any(names and not mine for names, mine in zip(active, drawn)):
        with pytest.raises(InputError, match=f'no pairs (for method {method}|of a part)'): plan_steps(partition, config)
        return
    factual, weak = (min(count[name], batch_size) * (count[name] >= 2) for name in ('factual', 'weak'))
    if method == 'release' and weak and factual != weak and epochs >= 3:  # the weak come with the last of three parts
        with pytest.raises(InputError, match='method=release: its weak loss reads the factual batch'): plan_steps(partition, config)
        return
    plan = plan_steps(partition, config)
    np.testing.assert_equal(plan, plan_steps(partition, config))
    assert [step['epoch'] for step in plan] == sorted(step['epoch'] for step in plan) and plan[-1]['epoch'] < epochs
    for step in plan:  # as many batches as PACL, in turn of what the method draws from
        names = [loss_of(name) for name in batches_of(step)]
        expected = [name for _, name in zip(active[step['epoch']], itertools.cycle(drawn[step['epoch']]))]
        assert len(names) == len(active[step['epoch']]) and (set(names) == set(expected) or len(names) % len(drawn[step['epoch']]))
        for name, rows in batches_of(step).items():
            kinds = [kind for kind in samples[loss_of(name)] if count[kind] >= 2]
            assert len(set(rows)) == len(rows) == min(batch_size, sum(count[kind] for kind in kinds))
            assert np.isin(partition[rows], kinds).all()
    for epoch in range(epochs):
        seen = collections.Counter(loss_of(name) for step in plan if step['epoch'] == epoch for name in batches_of(step))
        assert not seen or max(seen.values()) - min(seen.values()) <= 1 and set(seen) <= set(drawn[epoch])
    pacl = plan_steps(partition, TrainConfig(batch_size=batch_size, epochs=epochs, seed=seed))
    for epoch in range(epochs):  # until the largest partition is through
        largest = max([count[name] for name in active[epoch]], default=0)
        assert sum(step['epoch'] == epoch for step in pacl) == max(largest // batch_size, largest > 0)
    if method not in SAMPLES: np.testing.assert_equal(plan, pacl)
    assert len(plan) == len(pacl) and [len(step) for step in plan] == [len(step) for step in pacl]  # equal compute
    if min(count[name] for step in active for name in step) >= batch_size: assert count_images(plan) == count_images(pacl)


@pytest.mark.parametrize('shares', [(1, 0, 0, 0), (0, 0, 0, 1), (.2, .3, .3, .2)], ids=['γ = 0: all strong', 'γ = 1: all weak', 'between'])
def test_a_budget_of_images_is_kept_whatever_the_partition(shares):
    partition = np.repeat(PARTITIONS, [int(2000 * share) for share in shares])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        plans = [plan_steps(partition, TrainConfig(images=images, epochs=6)) for images in (0, 5000, 20000)]
    for plan, images in zip(plans[1:], (5000, 20000)):
        assert abs(count_images(plan) - images) <= 256 * 3  # half a step an epoch
        for step in plan: assert len(batches_of(step)) == len(active_partitions(step['epoch'], 6))  # empty partitions cost no batch
    assert {step['epoch'] for step in plans[1]} == {step['epoch'] for step in plans[0]}


def test_a_partition_without_pairs_trains_nothing():
    with pytest.raises(InputError, match='no pairs for method strong in epoch'), pytest.warns(UserWarning, match='strong has 0 of 9'):
        plan_steps(np.repeat('weak', 9), TrainConfig(method='strong', batch_size=2))


def test_alternate_takes_the_same_batches_one_a_step():
    partition = np.repeat(PARTITIONS, [8, 20, 12, 16])
    together, alternate = (plan_steps(partition, TrainConfig(batch_size=4, mixing=mixing)) for mixing in ('together', 'alternate'))
    assert all(len(batches_of(step)) == 1 for step in alternate) and len(alternate) == sum(len(batches_of(step)) for step in together)
    pairs = [(step['epoch'], name, rows) for step in together for name, rows in batches_of(step).items()]
    for step, (epoch, name, rows) in zip(alternate, pairs, strict=True): np.testing.assert_equal(step, {'epoch': epoch, name: rows})


def test_the_release_variant_needs_two_batches_in_a_step():
    with pytest.raises(InputError, match='mixing=together and a batch_size of at most 12'):
        plan_steps(np.repeat(PARTITIONS, [8, 20, 12, 16]), TrainConfig(method='release', batch_size=4, mixing='alternate'))


def test_a_partition_of_one_pair_is_left_out_and_counted():
    with pytest.warns(UserWarning, match='partition.csv: factual has 1 of 9 pairs; fewer than 2 cannot be contrasted') as said:
        plan = plan_steps(np.array([*['strong'] * 4, *['weak'] * 4, 'factual']), TrainConfig(batch_size=2))
    assert {name for step in plan for name in batches_of(step)} == {'strong', 'weak'}
    assert [str(w.message).split()[1] for w in said] == ['emotional', 'factual']


def test_another_seed_makes_another_plan():
    partition = np.repeat(PARTITIONS, 8)
    for method in METHODS:
        plans = [plan_steps(partition, TrainConfig(method=method, batch_size=4, seed=seed)) for seed in (0, 1)]
        assert len(plans[0]) == len(plans[1]) and str(plans[0]) != str(plans[1])


# masks

def naive_masks(method, sim, partition, factual, emotional, groups, keep_positives):
    "Positives and candidates of image and text anchors, pair by pair."
    n = len(sim)
    if partition == 'all' or method == 'curriculum': partition = 'strong'
    group = [i * groups // n for i in range(n)]
    best_text = [max((j for j in range(n) if group[j] == group[i]), key=lambda j: (sim[i][j], -j)) for i in range(n)]
    best_image = [max((i for i in range(n) if group[j] == group[i]), key=lambda i: (sim[i][j], -i)) for j in range(n)]
    masks = [[[False] * n for _ in range(n)] for _ in range(4)]
    for i in range(n):
        for j in range(n):
            dropped = (partition in ('emotional', 'weak') and factual[i] == factual[best_image[j]]
                       or partition in ('factual', 'weak') and emotional[j] == emotional[best_text[i]])
            kept = (method == 'pacl-no-filter' or not dropped) and group[i] == group[j]
            pseudo = partition == 'weak' and method != 'pacl-no-pseudo'
            of_image, of_text = (j == best_text[i], i == best_image[j]) if pseudo else (i == j, i == j)
            of_image, of_text = (positive and (keep_positives or not dropped) for positive in (of_image, of_text))
            masks[0][i][j], masks[1][i][j] = of_image, of_image or kept
            masks[2][j][i], masks[3][j][i] = of_text, of_text or kept
    return masks


@pytest.mark.parametrize('method', [method for method in METHODS if method != 'release'])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(2, 5), groups=st.sampled_from([1, 2, 3]))
def test_masks_of_every_method(method, data, n, groups):
    partition = data.draw(st.sampled_from(PARTITIONS[::-1] if method.startswith('pacl') else [*PARTITIONS, 'all']))
    keep_positives = method != 'pacl' or data.draw(st.booleans())
    row = st.lists(st.sampled_from([-1., 0., .5, 1.]), min_size=n, max_size=n)  # with ties
    sim = data.draw(st.lists(row, min_size=n, max_size=n))
    factual, emotional = (data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)) for _ in range(2))
    config = TrainConfig(method=method, candidate_groups=groups, keep_positives=keep_positives)
    masks = method_masks(config, torch.tensor(sim), partition, torch.tensor(factual), torch.tensor(emotional))
    assert [mask.tolist() for mask in masks] == naive_masks(method, sim, partition, factual, emotional, groups, keep_positives)


# the losses of a step, in one process and in two

class Tiny(nn.Module):
    "Towers with one layer for a backbone, in float64."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)).double(), nn.Linear(6, 4, bias=False).double()
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))


TINY_STEP = {'epoch': 0, 'strong': np.arange(8), 'emotional': np.arange(8, 15), 'factual': np.arange(15, 18), 'weak': np.arange(18, 21)}


def tiny_posts():
    rng = np.random.default_rng(0)
    pictures, text = (torch.tensor(rng.normal(size=(22, d))) for d in (5, 6))
    clusters = {k: torch.tensor(rng.integers(3, size=22)) for k in ('factual', 'emotional')}
    sentiment = torch.tensor(rng.dirichlet(np.ones(3), size=22))
    return SimpleNamespace(pictures=pictures, text=text, clusters=clusters, sentiment=sentiment)


def tiny_step(step, config):
    "Losses, and gradients as one flat vector; of all processes together."
    towers, posts = Tiny(), tiny_posts()
    rows = np.concatenate([rows[own_rows(len(rows))] for rows in batches_of(step).values()])
    losses = backward_step(towers, posts.pictures[rows], posts.text[rows], lambda v, t: step_losses(v, t, step, posts, config), config)
    sum_gradients(list(towers.parameters()))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in towers.parameters()]
    return losses, torch.cat([g.flatten() for g in gradients]).numpy()


def tiny_gradients():
    found = {}
    for method in METHODS:
        step = {'epoch': 0, 'all': np.arange(21), 'all 2': np.arange(9, 16)} if 'all' in SAMPLES.get(method, ()) else TINY_STEP
        for chunk in (0, 3):
            losses, found[f'{method}, chunk {chunk}, gradients'] = tiny_step(step, TrainConfig(method=method, temperature=.2, chunk=chunk))
            found[f'{method}, chunk {chunk}, losses'] = np.array(list(losses.values()))
    return found


def tiny_losses(rows, partition, towers, posts, **readings):
    v, t = towers.image(posts.pictures[rows]), towers.text(posts.text[rows])
    return pacl_loss(v, t, partition, posts.clusters['factual'][rows], posts.clusters['emotional'][rows], .2, **readings)


def test_a_step_sums_what_the_equations_say():
    towers, posts = Tiny(), tiny_posts()
    expected = {name: tiny_losses(rows, name, towers, posts) for name, rows in batches_of(TINY_STEP).items()}
    weights = (1., 2., .5, 0.)
    sum(w * loss for w, loss in zip(weights, expected.values())).backward()
    losses, gradients = tiny_step(TINY_STEP, TrainConfig(temperature=.2, weights=weights))
    assert list(losses) == list(PARTITIONS) and losses == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-12)
    by_hand = torch.cat([p.grad.flatten() for p in [*towers.image.parameters(), *towers.text.parameters()]])
    np.testing.assert_allclose(gradients[3:], by_hand, rtol=1e-10, atol=1e-14)
    losses, _ = tiny_step({'epoch': 0, 'all': np.arange(22)}, TrainConfig(method='unpartitioned', temperature=.2))
    assert losses['all'] == pytest.approx(tiny_losses(np.arange(22), 'strong', towers, posts).item(), rel=1e-12)


@pytest.mark.parametrize('reading', [{'keep_positives': False}, {'empty': 'skip'}], ids=str)
def test_a_step_takes_the_readings(reading):
    towers, posts = Tiny(), tiny_posts()
    losses, usual = (tiny_step(TINY_STEP, TrainConfig(temperature=.2, **r))[0] for r in (reading, {}))
    expected = {name: tiny_losses(rows, name, towers, posts, **reading).item() for name, rows in batches_of(TINY_STEP).items()}
    assert losses == pytest.approx(expected, rel=1e-12) != usual


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('chunk', [0, 3])
def test_a_loss_that_is_not_finite_leaves_no_gradient(chunk, value):
    towers, posts = Tiny(), tiny_posts()
    def losses_of(v, t): return {'strong': (v * t).sum(), 'weak': (v * t).sum() * 0 + value}
    with pytest.raises(FloatingPointError, match=f'the weak loss is {value}'):
        backward_step(towers, posts.pictures, posts.text, losses_of, TrainConfig(chunk=chunk))
    assert all(p.grad is None for p in towers.parameters())


def test_the_release_variant_is_one_loss_over_the_partitions():
    towers, posts = Tiny(), tiny_posts()
    sims, clusters = {}, {'factual': {}, 'emotional': {}}
    for name, rows in batches_of(TINY_STEP).items():
        v, t = (nn.functional.normalize(x, dim=1) for x in (towers.image(posts.pictures[rows]), towers.text(posts.text[rows])))
        sims[name] = v @ t.T
        for k in clusters: clusters[k][name] = posts.clusters[k][rows]
    expected = release_loss(sims, clusters['factual'], clusters['emotional'], .2)
    losses, _ = tiny_step(TINY_STEP, TrainConfig(method='release', temperature=.2))
    assert losses == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-12)


@pytest.mark.parametrize('chunk', [1, 3, 7, 22, 100])
@pytest.mark.parametrize('method', METHODS)
def test_chunks_change_nothing(chunk, method):
    step = {'epoch': 0, 'all': np.arange(22)} if method.startswith(('unpartitioned', 'strong')) else TINY_STEP
    (losses, gradients), (expected, whole) = (tiny_step(step, TrainConfig(method=method, chunk=c)) for c in (chunk, 0))
    assert losses == pytest.approx(expected, rel=1e-12) and np.abs(whole).max() > .01
    np.testing.assert_allclose(gradients, whole, rtol=1e-9, atol=1e-13)


def test_chunks_hold_the_activations_of_one_chunk():
    "Counted where autograd keeps them, while the loss is computed."
    kept = {}
    for chunk in (0, 2):
        now = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: now.append(x.numel()) or x, lambda x: x):
            def losses_of(v, t, now=now, chunk=chunk):
                kept[chunk] = sum(now)
                return {'all': (v * t).sum()}
            towers, posts = Tiny(), tiny_posts()
            backward_step(towers, posts.pictures, posts.text, losses_of, TrainConfig(chunk=chunk))
    assert kept[2] < kept[0] / 2


@given(st.integers(0, 200), st.integers(1, 9))
def test_shares_are_nearly_equal_and_leave_nobody_out(n, processes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.dist, 'is_initialized', lambda: True)
        patch.setattr(train_module.dist, 'get_world_size', lambda: processes)
        shares = []
        for rank in range(processes):
            patch.setattr(train_module.dist, 'get_rank', lambda: rank)
            shares.append(range(n)[own_rows(n)])
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_summed_gradients_keep_the_layout_of_their_weights(monkeypatch):
    "Fused AdamW reads both in one order. The weights of TINY_BACKBONES are contiguous and would not tell."
    weight, unused = nn.Parameter(torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last)), nn.Parameter(torch.rand(2))
    (weight * torch.arange(48.).view(4, 3, 2, 2)).sum().backward()
    monkeypatch.setattr(train_module.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(train_module.dist, 'all_reduce', lambda flat: flat.mul_(2))
    sum_gradients([weight, unused])
    assert weight.grad.stride() == weight.stride() and torch.equal(weight.grad, 2 * torch.arange(48.).view(4, 3, 2, 2))
    monkeypatch.undo()
    sum_gradients([alone := nn.Parameter(torch.rand(2))])
    assert unused.grad.tolist() == alone.grad.tolist() == [0, 0]  # else weight decay would depend on the number of processes


TINY_BACKBONES = 'test_convnext', 'test_efficientnet'  # without batch norm; with frozen statistics
TWENTY = TrainConfig(batch_size=64, epochs=9, dim=32)  # 64 pairs of each partition, steps: 3 × 2 strong, 3 × 2 of three, 3 × 3 of four


@pytest.fixture(scope='module')
def tiny_runs(tmp_path_factory):
    "Small backbones, random, as `save_backbone` writes them, that learn whole from pictures."
    runs = {}
    for name in TINY_BACKBONES:
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        save_backbone(timm.create_model(name, num_classes=0), folder / 'backbone', 32)
        runs[name] = make_run(folder / 'run', trainable_stages=0, backbone=f'local-dir:{folder / "backbone"}', sizes=(128, 130, 64, 192))
    return runs


def train_tiny(runs, out):
    "Every backbone in float32 and in float64, by the engine itself."
    for name, run in runs.items():
        posts = Posts(run)
        with pytest.MonkeyPatch.context() as patch:
            train(posts, TWENTY, Path(out) / f'{name}-32')
            patch.setattr(train_module, 'Towers', lambda *args: Towers(*args).double())
            train(posts, TWENTY, Path(out) / f'{name}-64')
        if not train_module.dist.is_initialized() or train_module.dist.get_rank() == 0: assert (Path(out) / f'{name}-64').exists()


def in_many_processes(folder, job):
    "What each of torchrun's processes does, see the end of this file."
    job, folder = json.loads(Path(job).read_text()), Path(folder)
    train_module.dist.init_process_group('gloo')
    torch.set_num_threads(1)
    rank = train_module.dist.get_rank()
    weight = nn.Parameter(torch.zeros(2))
    if rank: weight.grad = torch.tensor([1., 2.])
    sum_gradients([weight])
    kernel = nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last))
    kernel.grad = torch.arange(24.).view(2, 3, 2, 2).to(memory_format=torch.channels_last)
    sum_gradients([kernel])
    own = torch.arange(7.)[own_rows(7), None].requires_grad_()
    everyone = gather_rows(own, 7)
    (everyone.squeeze() * torch.arange(7.)).sum().backward()
    np.savez(folder / f'{rank}.npz', **tiny_gradients(), weight=weight.grad, everyone=everyone.detach(), own=own.detach(),
             own_gradient=own.grad, kernel=kernel.grad, kernel_stride=kernel.grad.stride())
    train_tiny(job['tiny'], folder)
    train_module.dist.barrier()
    if rank == 0: (folder / 'modules').write_text('\n'.join(sys.modules))
    train_module.dist.init_process_group = lambda backend: None  # once is enough
    if job['run']: main(job['run'], folder / 'parts', jobs=folder / 'jobs.json')  # the runs of the stage, unkilled


def torchrun_environment(): return {**os.environ, 'PYTHONPATH': ':'.join(filter(None, sys.path)), 'OMP_NUM_THREADS': '1'}


def start_processes(count, folder, tiny_runs, run=None):
    (folder / 'job.json').write_text(json.dumps({'run': run and str(run), 'tiny': {name: str(path) for name, path in tiny_runs.items()}}))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}', __file__]
    subprocess.run([*command, folder, folder / 'job.json'], check=True, env=torchrun_environment())
    return [np.load(folder / f'{rank}.npz') for rank in range(count)]


@pytest.fixture(scope='module')
def reference(tmp_path_factory, tiny_runs):
    "A run folder without truth, and what two processes make of it when nobody kills them."
    folder = tmp_path_factory.mktemp('reference')
    run = make_run(folder / 'runs/mini', true=False)
    (folder / 'jobs.json').write_text(json.dumps([dict(method=m, batch_size=8) for m, p in MAIN if p == 'evaluators']))
    (folder / 'parts').mkdir()
    return SimpleNamespace(run=run, parts=folder / 'parts', ranks=start_processes(2, folder, tiny_runs, run), folder=folder)


@pytest.fixture(scope='module')
def four_processes(tmp_path_factory, tiny_runs):
    folder = tmp_path_factory.mktemp('four')
    return SimpleNamespace(ranks=start_processes(4, folder, tiny_runs), folder=folder)


@pytest.fixture(scope='module')
def one_process(tmp_path_factory, tiny_runs):
    folder = tmp_path_factory.mktemp('one')
    train_tiny(tiny_runs, folder)
    return folder


@pytest.mark.parametrize('name', TINY_BACKBONES)
@pytest.mark.parametrize('many', ['reference', 'four_processes'])
def test_1_x_64_is_2_x_32_is_4_x_16(request, one_process, many, name):
    folder = request.getfixturevalue(many).folder
    ours, theirs = (pd.read_csv(f / f'{name}-64/log.csv') for f in (one_process, folder))
    assert len(ours) == 21 and ours.notna().sum()[list(PARTITIONS)].tolist() == [21, 15, 15, 9]
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-9, atol=0)
    for file in ('model', 'projectors'):
        weights, others = (load_file(f / f'{name}-64/{file}.safetensors') for f in (one_process, folder))
        for key, weight in weights.items():
            if weight.is_floating_point(): assert weight.dtype == torch.float64 or 'running' in key
            torch.testing.assert_close(others[key], weight, rtol=1e-6, atol=1e-6)
    ours, theirs = (pd.read_csv(f / f'{name}-32/log.csv') for f in (one_process, folder))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=0)


def test_neither_text_encoder_nor_its_library_is_in_memory(reference):
    modules = set((reference.folder / 'modules').read_text().splitlines())
    assert 'pacl.train' in modules and 'timm' in modules and not {m for m in modules if m.split('.')[0] == 'transformers'}


@pytest.mark.parametrize('many', ['reference', 'four_processes'])
def test_many_processes_have_the_losses_and_gradients_of_one(request, many):
    ranks, alone = request.getfixturevalue(many).ranks, tiny_gradients()
    assert len(alone) == 4 * len(METHODS) and all(np.abs(v).max() > .01 for v in alone.values())
    for rank in ranks:
        for name, value in alone.items(): np.testing.assert_allclose(rank[name], value, rtol=0, atol=1e-9, err_msg=name)
        assert rank['weight'].tolist() == [len(ranks) - 1, 2 * (len(ranks) - 1)]  # a process without a gradient adds nothing
        np.testing.assert_array_equal(rank['kernel'], len(ranks) * np.arange(24).reshape(2, 3, 2, 2))
        assert rank['kernel_stride'].tolist() == [12, 1, 6, 3]  # the weight's: fused AdamW reads gradients in its layout
        assert rank['everyone'].ravel().tolist() == list(range(7))
        np.testing.assert_array_equal(rank['own_gradient'], rank['own'])  # through the own rows alone
    assert [len(rank['own']) for rank in ranks] == ([3, 4] if len(ranks) == 2 else [1, 2, 2, 2])


def test_two_processes_train_as_one_does(reference, tmp_path):
    train(Posts(reference.run), TrainConfig(batch_size=8), tmp_path / 'alone')
    folders = tmp_path / 'alone', reference.parts / 'pacl-evaluators-s0'
    ours, theirs = (pd.read_csv(f / 'log.csv') for f in folders)
    pd.testing.assert_frame_equal(ours[:2], theirs[:2], rtol=1e-4)  # later, differences of the last bit grow
    ours, theirs = ((f / 'record.json').read_text() for f in folders)
    assert ours == theirs


# what a run reads

def test_posts_come_in_one_order(run, posts):
    def column(path, name): return pd.read_csv(run / path, dtype={'id': str}).set_index('id')[name].loc[posts.ids].to_numpy()
    assert posts.ids.tolist() == [f'{i:04d}' for i in range(N)]
    assert (posts.partitions['evaluators'] == column('partition/partition.csv', 'partition')).all()
    assert (posts.partitions['true'] == column('partition/true_partition.csv', 'partition')).all()
    for k in ('factual', 'emotional'): assert (posts.clusters[k].numpy() == column('clusters/clusters.csv', f'{k}_cluster')).all()


@pytest.mark.parametrize('name', ['partition/partition.csv', 'partition/true_partition.csv', 'clusters/clusters.csv'])
def test_a_post_without_a_row(run, tmp_path, name):
    path = copy(run, tmp_path / 'run') / name
    table = pd.read_csv(path, dtype={'id': str})
    table[~table['id'].isin(['0017', '0044'])].to_csv(path, index=False)
    says = rf'{path.name}: no row for id 0017 of data/posts.csv \(2 of 72 posts are missing\). Delete the folder'
    with pytest.raises(InputError, match=says): enhance(path.parents[1], tmp_path / 'out')
    pd.concat([table, table[:1].assign(id='x9')]).to_csv(path, index=False)
    says = rf'{path.name}, row 74 \(id x9\): id is "x9", expected an id of data/posts.csv'
    with pytest.raises(InputError, match=says): enhance(path.parents[1], tmp_path / 'out')
    pd.concat([table, table[:1]]).to_csv(path, index=False)
    with pytest.raises(InputError, match=f'{path.name}.*{table["id"].iloc[0]}'): enhance(path.parents[1], tmp_path / 'out')
    assert not list(tmp_path.glob('out*'))


@pytest.mark.parametrize('path, column, value, says', [
    ('partition/partition.csv', 'partition', 'emotionl', 'partition is "emotionl", expected strong|emotional|factual|weak'),
    ('partition/true_partition.csv', 'partition', '', 'partition is "", expected strong|emotional|factual|weak'),
    ('clusters/clusters.csv', 'factual_cluster', '1.0', 'factual_cluster is "1.0", expected')])
def test_a_word_that_is_none(run, tmp_path, path, column, value, says):
    path = copy(run, tmp_path / 'run') / path
    table = pd.read_csv(path, dtype=str)
    table.loc[3, column] = value
    table.to_csv(path, index=False)
    with pytest.raises(InputError, match=re.escape(f'{path.name}, row 5 (id {table["id"][3]}): {says}')): Posts(tmp_path / 'run')


def test_a_stage_that_is_missing(run, tmp_path):
    shutil.rmtree(copy(run, tmp_path / 'run') / 'features')
    with pytest.raises(InputError, match='features is missing'): enhance(tmp_path / 'run', tmp_path / 'out')


@pytest.mark.parametrize('name', ['text', 'early_posts'])
def test_features_of_other_posts(run, tmp_path, name):
    path = copy(run, tmp_path / 'run') / f'features/{name}.npy'
    array = np.load(path)
    np.save(path, array[:-1] if name == 'text' else array[:, :-1])
    with pytest.raises(InputError, match=f'{name}.npy: 71 rows, but there are 72 posts'): enhance(path.parents[1], tmp_path / 'out')


def test_a_kept_picture_is_one_of_its_views(posts):
    seen = {seed: posts.read(np.arange(N), seed).numpy() for seed in ((0, 1), (0, 2), (1, 1))}  # (run, epoch)
    second = [(pictures == posts.early[1]).all((1, 2, 3)) for pictures in seen.values()]
    assert all(((pictures == posts.early[0]).all((1, 2, 3)) ^ other).all() for pictures, other in zip(seen.values(), second))
    assert all(20 < other.sum() < 52 for other in second) and len({other.tobytes() for other in second}) == 3
    rows = np.random.default_rng(0).permutation(N)[:40]
    np.testing.assert_array_equal(posts.read(rows, (0, 1)), seen[0, 1][rows])  # whatever else is in the batch


def test_the_whole_backbone_learns_from_pictures(tmp_path):
    posts = Posts(make_run(tmp_path / 'run', trainable_stages=0))
    backbone, rows = load_backbone('tf_efficientnet_lite0'), np.array([5, 3, 60])
    def inputs(rows, seed=(0, 1)): return posts.inputs(posts.read(rows, seed), rows, seed, backbone)
    seen = inputs(rows)
    assert seen.shape == (3, 3, 32, 32) and (seen != to_input(posts.images[rows], backbone)).flatten(1).any(1).all()
    torch.testing.assert_close(seen[1:], inputs(rows[1:]), rtol=0, atol=0)  # by run, epoch and id alone
    torch.testing.assert_close(seen[:1], augment(to_input(posts.images[[5]], backbone), [(0, 1, *id_keys(['0005']).tolist())]))
    assert all((inputs(rows, other) != seen).any() for other in ((1, 1), (0, 2)))
    train(posts, config := TrainConfig(batch_size=8, epochs=1, dim=24), tmp_path / 'out')
    assert {w.shape for w in load_file(tmp_path / 'out/projectors.safetensors').values()} == {(24, 1280), (24, 384)}
    state, initial = load_file(tmp_path / 'out/model.safetensors'), backbone.state_dict()
    same = {name for name in initial if torch.equal(initial[name], state[name])}
    assert same == {name for name in initial if 'running' in name or 'num_batches' in name}
    torch.manual_seed(0)
    towers, probe = Towers(posts, config), np.load(tmp_path / 'out/probe.npz')
    with torch.no_grad(): v = towers.image(to_input(posts.images[probe['ids'][0].astype(int)], backbone))  # pictures as they are
    np.testing.assert_allclose(probe['image_features'][0, 0], v, atol=1e-4)


# one run

def test_a_run_leaves_what_the_next_stages_read(posts, trained):
    log = pd.read_csv(trained / 'log.csv')
    assert list(log) == ['step', 'epoch', 'lr', *PARTITIONS]
    np.testing.assert_allclose(log['lr'], CONFIG.lr * (1 + np.cos(np.pi * np.arange(7) / 7)) / 2)
    assert log['step'].tolist() == list(range(7)) and log['epoch'].tolist() == [0, 0, 1, 1, 2, 2, 2]
    for name in PARTITIONS: assert log[name].notna().tolist() == [name in active_partitions(e, 3) for e in log['epoch']]
    record = json.loads((trained / 'record.json').read_text())
    assert record['steps'] == 7 and record['images_seen'] == 2 * 8 + 2 * 24 + 3 * 32 and record['method'] == 'pacl' and record['seed'] == 3
    files = ['config.json', 'log.csv', 'losses.png', 'model.safetensors', 'probe.npz', 'projectors.safetensors', 'record.json']
    assert sorted(p.name for p in trained.iterdir()) == files and [*trained.parent.iterdir()] == [trained]


def test_only_the_last_stages_learn(posts, trained):
    state, initial = load_file(trained / 'model.safetensors'), load_backbone('tf_efficientnet_lite0')
    learning = {p.data_ptr() for p in split_backbone(initial, 2)[1].parameters()}
    expected = {name for name, p in initial.named_parameters() if p.data_ptr() in learning}
    assert {name for name, value in initial.state_dict().items() if not torch.equal(value, state[name])} == expected
    for value in state.values(): assert value.isfinite().all()


def test_training_is_the_plain_loop(posts, trained):
    "AdamW by hand, with a cosine from the settings' rates to 0, once a step."
    torch.manual_seed(CONFIG.seed)
    towers, plan = Towers(posts, CONFIG), plan_steps(posts.partitions['evaluators'], CONFIG)
    learning = {name: p for name, p in towers.named_parameters() if p.requires_grad}
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in learning.items()}
    start = {name: p.detach().clone() for name, p in learning.items()}
    for number, step in enumerate(plan, 1):
        rows = np.concatenate(list(batches_of(step).values()))
        v = towers.image(posts.inputs(posts.read(rows, (CONFIG.seed, step['epoch'])), rows, None, towers.backbone))
        losses = step_losses(v, towers.text(posts.text[rows]), step, posts, CONFIG)
        gradients = torch.autograd.grad(sum(losses.values()), list(learning.values()))
        cosine = (1 + math.cos(math.pi * (number - 1) / len(plan))) / 2
        for (name, p), gradient in zip(learning.items(), gradients):
            rate, (mean, square) = (CONFIG.projector_lr if 'projector' in name else CONFIG.lr) * cosine, state[name]
            mean.lerp_(gradient, .1)
            square.lerp_(gradient ** 2, .001)
            p.data -= rate * (.01 * p.data + mean / (1 - .9 ** number) / ((square / (1 - .999 ** number)).sqrt() + 1e-8))
    saved = {f'backbone.{name}': value for name, value in load_file(trained / 'model.safetensors').items()}
    saved |= {f'{name}.weight': value for name, value in load_file(trained / 'projectors.safetensors').items()}
    for name, p in learning.items():
        way, off = (saved[name] - start[name]).norm(), (saved[name] - p.detach()).norm()
        assert way > 0 and off < .02 * way, (name, way, off)


def test_probes_are_the_features_of_some_posts_of_each_partition(posts, trained):
    probe = np.load(trained / 'probe.npz')
    assert probe['ids'].shape == (4, 12) and probe['image_features'].shape == probe['text_features'].shape == (4, 4, 12, 256)
    for name, ids in zip(PARTITIONS, probe['ids']): assert (posts.partitions['evaluators'][ids.astype(int)] == name).all()
    rows = probe['ids'].astype(int).ravel()
    torch.manual_seed(CONFIG.seed)
    towers = Towers(posts, CONFIG)
    for epoch in (0, 3):  # before training and after it
        if epoch:
            towers.backbone.load_state_dict(load_file(trained / 'model.safetensors'))
            for name, weight in load_file(trained / 'projectors.safetensors').items(): getattr(towers, name).weight.data = weight
        with torch.no_grad(): v, t = towers.image(torch.tensor(posts.early[0, rows], dtype=torch.float32)), towers.text(posts.text[rows])
        np.testing.assert_allclose(probe['image_features'][epoch].reshape(48, -1), v, atol=1e-4)
        np.testing.assert_allclose(probe['text_features'][epoch].reshape(48, -1), t, atol=1e-4)
    assert all((probe['image_features'][e] != probe['image_features'][e + 1]).any() for e in range(3))


def test_probes_leave_trained_batch_norm_alone(tiny_runs):
    posts = Posts(tiny_runs['test_efficientnet'])
    towers = Towers(posts, TrainConfig(batch_norm='trained'))
    before = {name: value.clone() for name, value in towers.state_dict().items()}
    first, again = (train_module.probe_features(towers, posts, np.arange(n).reshape(4, -1))[0].reshape(n, -1) for n in (8, 16))
    assert all(torch.equal(value, before[name]) for name, value in towers.state_dict().items())
    np.testing.assert_allclose(again.reshape(4, 4, -1).reshape(16, -1)[:8], first, atol=1e-5)  # whoever else is looked at
    assert any(m.training for m in towers.modules())  # and goes on learning


def bits(folder): return {name: (folder / name).read_bytes() for name in ('model.safetensors', 'projectors.safetensors', 'log.csv')}


def test_without_the_truth_the_same_bits(run, trained, tmp_path):
    blind = copy(run, tmp_path / 'run')
    shutil.rmtree(blind / 'world')
    for name in ('truth.csv', 'true_partition.csv'): (blind / 'partition' / name).unlink()
    encoder = enhance(blind, tmp_path / 'out', batch_size=8, seed=3)
    assert bits(tmp_path / 'out') == bits(trained)
    assert (tmp_path / 'out/record.json').read_bytes() == (trained / 'record.json').read_bytes()
    images = np.load(blind / 'data/posts.npy')[:2]
    from PIL import Image
    expected = load_backbone('tf_efficientnet_lite0')
    expected.load_state_dict(load_file(trained / 'model.safetensors'))
    with torch.no_grad(): torch.testing.assert_close(encoder([Image.fromarray(i) for i in images]), expected(to_input(images, expected)))
    with pytest.raises(InputError, match='out is not empty'): enhance(blind, tmp_path / 'out')


@pytest.mark.parametrize('workers', [1, 2])
def test_any_number_of_readers_gives_the_same_bits(posts, trained, tmp_path, workers):
    train(posts, TrainConfig(batch_size=8, seed=3, workers=workers), tmp_path / 'out')
    assert bits(tmp_path / 'out') == bits(trained)


@pytest.mark.parametrize('settings', [{'chunk': 50}, {'chunk': 50, 'precision': 'bfloat16'}], ids=str)
def test_a_chunked_run_is_the_whole_one(tiny_runs, one_process, tmp_path, settings):
    "In bfloat16 with its own unchunked run. Which kernel rounds a picture depends on how many there are."
    posts, config = Posts(tiny_runs['test_convnext']), dataclasses.asdict(TWENTY) | settings
    train(posts, TrainConfig(**config), tmp_path / 'chunked')
    expected, low = one_process / 'test_convnext-32', 'precision' in settings
    if low: train(posts, TrainConfig(**config | {'chunk': 0}), expected := tmp_path / 'whole')
    ours, theirs = (pd.read_csv(f / 'log.csv') for f in (tmp_path / 'chunked', expected))
    pd.testing.assert_frame_equal(ours, theirs, rtol=.05 if low else 1e-4, atol=0)
    folders = tmp_path / 'chunked', expected, tiny_runs['test_convnext'].parent / 'backbone'
    ours, theirs, initial = (torch.cat([w.flatten() for w in load_file(f / 'model.safetensors').values()]) for f in folders)
    assert (ours - theirs).norm() < (.1 if low else 1e-3) * (theirs - initial).norm()


def test_bfloat16_is_close_to_float32_and_learns(tiny_runs, one_process, tmp_path):
    posts, config = Posts(tiny_runs['test_convnext']), TrainConfig(**dataclasses.asdict(TWENTY) | {'precision': 'bfloat16'})
    assert Towers(posts, config).image(torch.rand(2, 3, 32, 32)).dtype == torch.float32  # similarities are not for bfloat16
    train(posts, config, tmp_path / 'out')
    low, high = (pd.read_csv(f / 'log.csv') for f in (tmp_path / 'out', one_process / 'test_convnext-32'))
    pd.testing.assert_frame_equal(low, high, rtol=.05, atol=0)
    assert (low['strong'] != high['strong']).all() and low['strong'].iloc[-1] < low['strong'].iloc[0]
    assert all(w.dtype == torch.float32 for w in load_file(tmp_path / 'out/model.safetensors').values() if w.is_floating_point())


def test_checkpointed_activations_give_the_same_bits_in_less_memory(tiny_runs, one_process, tmp_path):
    posts, config = Posts(tiny_runs['test_convnext']), TrainConfig(**dataclasses.asdict(TWENTY) | {'checkpointing': True})
    train(posts, config, tmp_path / 'out')
    assert bits(tmp_path / 'out') == bits(one_process / 'test_convnext-32')
    kept = {}
    for towers in (Towers(posts, TWENTY), Towers(posts, config)):
        now = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: now.append(x.numel()) or x, lambda x: x):
            towers.image(torch.rand(4, 3, 32, 32))
        kept[len(kept)] = sum(now)
    assert kept[1] < kept[0] / 3


def test_checkpointing_needs_the_whole_backbone(posts, tmp_path):
    config = TrainConfig(checkpointing=True, batch_size=8)
    with pytest.raises(InputError, match='checkpointing needs trainable_stages=0'): train(posts, config, tmp_path / 'out')


def test_a_compiled_backbone_learns_the_same(tiny_runs, one_process, tmp_path, monkeypatch):
    compiled = []  # without the minutes that generated code takes; tests/bench_step.py has the real one
    monkeypatch.setattr(nn.Module, 'compile', lambda self, real=nn.Module.compile: compiled.append(self) or real(self, backend='eager'))
    train(Posts(tiny_runs['test_efficientnet']), TrainConfig(**dataclasses.asdict(TWENTY) | {'compile': True}), tmp_path / 'out')
    ours, theirs = (pd.read_csv(f / 'log.csv') for f in (tmp_path / 'out', one_process / 'test_efficientnet-32'))
    assert len(compiled) == 1
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-3, atol=0)
    assert list(load_file(tmp_path / 'out/model.safetensors')) == list(load_file(one_process / 'test_efficientnet-32/model.safetensors'))


def test_trained_batch_norm_moves_its_statistics(tiny_runs, tmp_path):
    run = tiny_runs['test_efficientnet']
    train(Posts(run), TrainConfig(**dataclasses.asdict(TWENTY) | {'batch_norm': 'trained'}), tmp_path / 'out')
    state, initial = load_file(tmp_path / 'out/model.safetensors'), load_file(run.parent / 'backbone/model.safetensors')
    moved = [(state[name] != initial[name]).any().item() for name in initial if 'running' in name]
    assert all(moved) and len(moved) > 10
    frozen = load_file(run.parent / 'backbone/model.safetensors')
    from timm.layers import convert_sync_batchnorm
    model = timm.create_model('test_efficientnet', num_classes=0)
    assert set(convert_sync_batchnorm(model).state_dict()) == set(frozen)  # what a GPU writes, a CPU reads


def test_what_a_person_sees(posts, trained, tmp_path, monkeypatch):
    monkeypatch.setenv('PACL_PROGRESS', str(tmp_path / 'progress'))
    train(posts, CONFIG, tmp_path / 'out')
    shown = (tmp_path / 'progress').read_text()
    losses = ' '.join(rf'{name} \d\.\d\d' for name in PARTITIONS)
    assert re.search(rf'pacl-evaluators-s3 \d/7, .*left, {losses}, \d+ images/s', shown)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(posts.run / 'tensorboard/out'))
    events.Reload()
    log = pd.read_csv(trained / 'log.csv')
    assert set(events.Tags()['scalars']) == {*(f'loss/{name}' for name in PARTITIONS), 'lr', 'images a second'}
    weak = events.Scalars('loss/weak')
    assert [e.step for e in weak] == [4, 5, 6] and np.allclose([e.value for e in weak], log['weak'].dropna(), rtol=1e-5)
    from PIL import Image
    with Image.open(trained / 'losses.png') as picture: assert min(picture.size) > 300


def test_a_board_shows_each_step_once(posts, tmp_path):
    older = posts.run / 'tensorboard' / tmp_path.name / 'events.out.tfevents.0.older'
    older.parent.mkdir(parents=True)
    older.touch()
    config = dataclasses.replace(CONFIG, checkpoint_minutes=0)
    interrupted(posts, tmp_path / tmp_path.name, 5, config)[-1].unlink()  # so that step 4 is made and written again
    train(posts, config, tmp_path / tmp_path.name)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(older.parent))
    events.Reload()
    assert [e.step for e in events.Scalars('loss/strong')] == list(range(7)) and not older.exists()


def test_two_runs_have_two_boards(run, tmp_path):
    posts = Posts(copy(run, tmp_path / 'run'))
    for name in ('a', 'b'): train(posts, dataclasses.replace(CONFIG, epochs=1), tmp_path / name)
    assert {'a', 'b'} <= {folder.name for folder in (posts.run / 'tensorboard').iterdir()}


# checkpoints, and runs that are killed

def in_a_child(work):
    "Runs `work` in a copy of this process; its exit status, negative: the signal that killed it."
    child = os.fork()
    if not child:
        try: work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_myself(*_, **__): os.kill(os.getpid(), signal.SIGKILL)


def at_call(number, function, before=kill_myself):
    "`function`, but the call with this number kills the process first."
    calls = iter(range(10**6))
    def replacement(*args, **settings):
        if next(calls) == number: before(*args, **settings)
        return function(*args, **settings)
    return replacement


def half_a_file(tensors, path, *_):
    Path(path).write_bytes(os.urandom(10_000))
    kill_myself()


def kill_after(seconds):
    threading.Timer(seconds, kill_myself).start()


KILLS = {  # the name in pacl.train (or of a method of Path), the call that is the last, and what happens there
    'in the third step': ('backward_step', 3, kill_myself), 'after a step, before its checkpoint': ('save_checkpoint', 4, kill_myself),
    'in the middle of writing a checkpoint': ('save_file', 2, half_a_file),
    'before the checkpoint has its name': ('file_hashes', 1, kill_myself),
    'while the model is saved': ('save_backbone', 0, kill_myself), 'while the projectors are saved': ('save_file', 7, half_a_file),
    'before the whole run has its name': ('rename', 8, kill_myself)}  # after those of the log and of 7 checkpoints


@pytest.mark.filterwarnings('error:.*cut or changed')  # a kill leaves no half file under the name of a whole one
@pytest.mark.parametrize('where', KILLS)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(posts, trained, tmp_path, monkeypatch, where):
    name, number, how = KILLS[where]
    config = TrainConfig(batch_size=8, seed=3, checkpoint_minutes=0)
    def killed():
        place = Path if hasattr(Path, name) else train_module
        setattr(place, name, at_call(number, getattr(place, name), how))
        train(posts, config, tmp_path / 'out')
    assert in_a_child(killed) == -signal.SIGKILL and not (tmp_path / 'out').exists()
    steps = []
    monkeypatch.setattr(train_module, 'backward_step', lambda *args: steps.append(1) or backward_step(*args))
    train(posts, config, tmp_path / 'out')
    assert bits(tmp_path / 'out') == bits(trained) and len(steps) < 7  # some were done already
    for file in ('probe.npz', 'losses.png'): assert (tmp_path / 'out' / file).read_bytes() == (trained / file).read_bytes()
    record, whole = (json.loads((folder / 'record.json').read_text()) for folder in (tmp_path / 'out', trained))
    assert record == whole | {'checkpoint_minutes': 0}
    assert [*tmp_path.iterdir()] == [tmp_path / 'out']


def test_a_kill_between_the_name_and_the_end(posts, trained, tmp_path):
    config = TrainConfig(batch_size=8, seed=3, checkpoint_minutes=0)
    def killed():
        def remove(path, *more, **how): return kill_myself() if (tmp_path / 'out').exists() else rmtree(path, *more, **how)
        rmtree, shutil.rmtree = shutil.rmtree, remove
        train(posts, config, tmp_path / 'out')
    assert in_a_child(killed) == -signal.SIGKILL and sorted(p.name for p in tmp_path.iterdir()) == ['out', 'out.part']
    with pytest.raises(InputError, match='seed was 3, is 4'): train(posts, dataclasses.replace(config, seed=4), tmp_path / 'out')
    train(posts, config, tmp_path / 'out')  # whole already: nothing is trained again
    assert bits(tmp_path / 'out') == bits(trained) and [p.name for p in tmp_path.iterdir()] == ['out']


def test_a_run_killed_again_and_again_at_random(posts, trained, tmp_path):
    config, rng, kills = TrainConfig(batch_size=8, seed=3, checkpoint_minutes=0), np.random.default_rng(), 0
    for number in range(60):
        def killed(number=number):
            kill_after(rng.uniform(.3, 1.2 + number / 10))  # later and later: a busy machine may need seconds to begin
            train(posts, config, tmp_path / 'out')
        if not (status := in_a_child(killed)): break
        assert status == -signal.SIGKILL
        kills += 1
        rng.random()  # the child's draws are its own
    assert kills and bits(tmp_path / 'out') == bits(trained)


def test_a_kill_while_the_log_is_cut(posts, trained, tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_minutes=0)
    interrupted(posts, tmp_path / 'out', 3, config)
    def killed():
        def half(path, *_): path.open('w').close(), kill_myself()
        Path.write_text = half
        train(posts, config, tmp_path / 'out')
    assert in_a_child(killed) == -signal.SIGKILL
    train(posts, config, tmp_path / 'out')
    assert bits(tmp_path / 'out') == bits(trained)


def test_a_run_killed_before_its_first_checkpoint_leaves_nothing_of_itself(posts, trained, tmp_path):
    interrupted(posts, tmp_path / 'out', 12, dataclasses.replace(CONFIG, epochs=6, dim=32))
    train(posts, CONFIG, tmp_path / 'out')
    for file in ('probe.npz', 'log.csv'): assert (tmp_path / 'out' / file).read_bytes() == (trained / file).read_bytes()


def interrupted(posts, folder, steps, config):
    "The folder of a run that stopped after this many steps."
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, 'backward_step', at_call(steps, backward_step, lambda *_: exec('raise KeyboardInterrupt')))
        train(posts, config, folder)
    return sorted(Path(f'{folder}.part/checkpoints').glob('step-*'))


@pytest.mark.parametrize('damage', ['cut', 'changed', 'empty'])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(posts, trained, tmp_path, damage, monkeypatch):
    config = TrainConfig(batch_size=8, seed=3, checkpoint_minutes=0)
    older, newer = interrupted(posts, tmp_path / 'out', 5, config)
    assert [path.name[:12] for path in (older, newer)] == ['step-0000004', 'step-0000005']
    content = bytearray(newer.read_bytes())
    content[-5] ^= 1
    newer.write_bytes({'cut': content[:len(content) // 2], 'changed': content, 'empty': b''}[damage])
    steps = []
    monkeypatch.setattr(train_module, 'backward_step', lambda *args: steps.append(1) or backward_step(*args))
    with pytest.warns(UserWarning, match=f'{newer.name}: cut or changed since it was written'): train(posts, config, tmp_path / 'out')
    assert len(steps) == 3 and bits(tmp_path / 'out') == bits(trained)


def test_new_checkpoints_outlive_damaged_ones_of_later_steps(posts, tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_minutes=0)
    for path in interrupted(posts, tmp_path / 'out', 6, config): path.write_bytes(b'')
    with pytest.warns(UserWarning, match='cut or changed'): left = interrupted(posts, tmp_path / 'out', 3, config)
    assert [path.name[:12] for path in left] == ['step-0000002', 'step-0000003']


def test_a_checkpoint_of_another_run_is_not_taken(posts, run, tmp_path):
    config = TrainConfig(batch_size=8, seed=3, checkpoint_minutes=0)
    interrupted(posts, tmp_path / 'out', 2, config)
    with pytest.raises(InputError, match='left by another run: lr was 0.0001, is 0.001.*Delete it'):
        train(posts, dataclasses.replace(config, lr=1e-3), tmp_path / 'out')
    other = Posts(make_run(tmp_path / 'other', seed=1))
    with pytest.raises(InputError, match='left by another run: posts was'): train(other, config, tmp_path / 'out')
    train(posts, dataclasses.replace(config, workers=1, checkpoint_minutes=5), tmp_path / 'out')  # these may change


def test_a_checkpoint_belongs_to_its_posts_and_to_all_that_shapes_a_run(posts, tmp_path, monkeypatch):
    origin = {}
    monkeypatch.setattr(train_module, 'load_checkpoint', lambda *args: origin.update(args[-1]) or exec('raise KeyboardInterrupt'))
    with pytest.raises(KeyboardInterrupt): train(posts, CONFIG, tmp_path / 'out')
    free = {'workers', 'checkpoint_minutes'}
    assert origin == {name: value for name, value in dataclasses.asdict(CONFIG).items() if name not in free} | {'posts': posts.digest}


def test_a_checkpoint_every_few_minutes(posts, tmp_path, monkeypatch):
    now, saved = [0], []  # seconds, of which a step takes 50
    monkeypatch.setattr(train_module, 'time', SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(train_module, 'backward_step', lambda *args: now.append(now.pop() + 50) or backward_step(*args))
    monkeypatch.setattr(train_module, 'save_checkpoint', lambda folder, step, *_: saved.append(step))
    train(posts, dataclasses.replace(CONFIG, checkpoint_minutes=2.), tmp_path / 'out')
    assert saved == [3, 6]


def test_a_checkpoint_holds_all_that_the_next_step_needs(posts, tmp_path):
    def fresh():
        torch.manual_seed(0)
        towers = Towers(posts, CONFIG)
        optimizer = torch.optim.AdamW([p for p in towers.parameters() if p.requires_grad], fused=True)
        return towers, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    def step(towers, optimizer, schedule):
        optimizer.zero_grad()
        x = torch.randn(2, 112, 6, 6)
        (towers.image(x) * towers.text(posts.text[:2])).sum().backward()
        optimizer.step()
        schedule.step()
    first, second = fresh(), fresh()
    step(*first)
    save_checkpoint(tmp_path, 1, *first, {'a': 1})
    step(*first)
    torch.manual_seed(7)
    assert load_checkpoint(tmp_path, *second, {'a': 1}) == 1
    step(*second)
    for a, b in zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True): assert torch.equal(a, b)
    assert first[1].param_groups[0]['lr'] == second[1].param_groups[0]['lr'] != 1e-3
    strides = [[{name: s.stride() for name, s in state.items()} for state in o.state.values()] for o in (first[1], second[1])]
    assert strides[0] == strides[1]
    for number in (2, 3, 4): save_checkpoint(tmp_path, number, *first, {})
    assert [path.name[:12] for path in sorted(tmp_path.iterdir())] == ['step-0000003', 'step-0000004']


def test_another_seed_or_partition_makes_another_encoder(posts, tmp_path):
    for seed, partition in ((3, 'evaluators'), (4, 'evaluators'), (3, 'true')):
        config = TrainConfig(batch_size=8, epochs=1, seed=seed, partition=partition)
        train(posts, config, tmp_path / config.name)
    assert len({bits(folder)['model.safetensors'] for folder in tmp_path.iterdir()}) == 3


@pytest.mark.parametrize('module', ['train', 'cluster', 'contrast', 'encoders', 'standins', 'data'])
def test_no_training_code_names_a_file_of_the_truth(module):
    tree = ast.parse((Path(train_module.__file__).parent / f'{module}.py').read_text())
    said = {node.body[0].value for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
            and node.body and isinstance(node.body[0], ast.Expr)}  # docstrings
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and n not in said]
    assert strings and not [s for s in strings if 'truth' in s]
    found = {s for s in strings if 'true_' in s or 'world' in s}
    # `train` offers the true partition under its own name; `data` reads the world's posts and pictures, never its root
    assert found <= ({'true_partition.csv'} if module == 'train' else {'world'} if module == 'data' else set())


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops(run, tmp_path, value):
    broken = copy(run, tmp_path / 'run')
    text, partition = np.load(broken / 'features/text.npy'), Posts(broken).partitions['evaluators']
    row = np.flatnonzero(partition == 'factual')[2]
    text[row, 7] = value
    np.save(broken / 'features/text.npy', text)
    says = rf'pacl-evaluators-s0, step 1, epoch 1: the factual loss is nan; ids of the batch: .*\b{row:04d}\b'
    with pytest.raises(FloatingPointError, match=says) as error: enhance(broken, tmp_path / 'out', batch_size=16)
    ids = str(error.value).split(': ')[-1].split()
    assert len(ids) == 12 and (partition[[int(i) for i in ids]] == 'factual').all()  # of that batch alone
    assert not (tmp_path / 'out').exists()


# the stage

def fake_torchrun(called, error=''):
    def run(command, **how):
        called.append((command, how))
        parts = command[command.index('--jobs') - 1]
        for job in json.loads((Path(parts) / 'jobs.json').read_text()):
            if error: break
            folder = Path(parts) / TrainConfig(**job).name
            folder.mkdir()
            (folder / 'record.json').write_text(json.dumps(job | {'steps': 1, 'images_seen': 8}))
        return SimpleNamespace(returncode=bool(error), stderr=error)
    return run


@pytest.mark.parametrize('compare, true, runs', [('main', True, MAIN), ('full', True, FULL), ('main', False, MAIN[:3])])
def test_the_stage_starts_every_method_with_every_seed(tmp_path, monkeypatch, compare, true, runs):
    called, run = [], make_run(tmp_path / 'run', true=true)
    monkeypatch.setattr(train_module.subprocess, 'run', fake_torchrun(called))
    settings = dict(compare=compare, n_seeds=2, batch_size=8, processes=3, temperature=.1)
    out = run_train(run, **settings)
    table = pd.read_csv(out / 'runs.csv')
    assert sorted(zip(table['method'], table['partition'], table['seed'])) == sorted((m, p, s) for m, p in runs for s in range(2))
    assert {'run', 'method', 'partition', 'seed', 'steps', 'images_seen'} <= set(table)
    assert sorted(f.name for f in out.iterdir() if f.is_dir()) == sorted(table['run']) and (table['temperature'] == .1).all()
    pacl = plan_steps(Posts(run).partitions['evaluators'], TrainConfig(batch_size=8))
    asked = {p: count_images(pacl) * (p == 'true') for _, p in runs}  # the true partition's runs see as many as PACL
    assert dict(zip(table['partition'], table['images'])) == asked
    (command, how), = called  # one start for all
    assert '--nproc_per_node=3' in command and how['env']['PACL_PARENT'] == str(os.getpid())
    assert read_record(out)['result']['runs'] == 2 * len(runs) and run_train(run, **settings) == out and len(called) == 1


def test_the_stage_hands_every_setting_on(tmp_path, monkeypatch):
    run, seen = make_run(tmp_path / 'run', true=False), {'batch_size'}
    monkeypatch.setattr(train_module.subprocess, 'run', fake_torchrun([]))
    for chosen in (dict(epochs=4, lr=2e-4, projector_lr=2e-3, temperature=.1, mixing='alternate', precision='bfloat16', chunk=3,
                        checkpointing=True, compile=True, workers=1, checkpoint_minutes=1.), dict(batch_norm='trained')):
        table = pd.read_csv(run_train(run, n_seeds=1, batch_size=8, **chosen) / 'runs.csv')
        for name, value in chosen.items(): assert (table[name] == value).all(), name
        seen |= {*chosen}
    assert seen == {*inspect.signature(run_train).parameters} & {field.name for field in dataclasses.fields(TrainConfig)}


def test_finished_runs_serve_what_they_were_made_from_alone(tmp_path, monkeypatch):
    called, run = [], make_run(tmp_path / 'run', true=False)
    monkeypatch.setattr(train_module.subprocess, 'run', fake_torchrun(called))
    usual = {'batch_size': 8, 'n_seeds': 2}
    for other in ({}, {'n_seeds': 1}, {'lr': 2e-4}, {'temperature': .1}, {'processes': 1}): run_train(run, **usual | other)
    clusters = pd.read_csv(run / 'clusters/clusters.csv', dtype=str)
    clusters.assign(factual_cluster='0').to_csv(run / 'clusters/clusters.csv', index=False)
    run_train(run, **usual, processes=1)
    monkeypatch.setattr(train_module, 'code_hashes', lambda module: 'of other code')
    run_train(run, batch_size=8, n_seeds=1, processes=1)
    places = [command[-3] for command, _ in called]
    assert places[0] == places[1] and len(set(places)) == 6
    assert not (run / '.models-parts').exists()


def test_bad_input_is_told_before_torchrun_starts(tmp_path, monkeypatch):
    called, run = [], make_run(tmp_path / 'run')
    monkeypatch.setattr(train_module.subprocess, 'run', fake_torchrun(called))
    table = pd.read_csv(run / 'partition/partition.csv', dtype=str)
    table.assign(partition='weak').to_csv(run / 'partition/partition.csv', index=False)
    with pytest.raises(InputError, match='no pairs for method strong in epoch 2'): run_train(run)
    table[1:].to_csv(run / 'partition/partition.csv', index=False)
    with pytest.raises(InputError, match=f'no row for id {table["id"][0]}'): run_train(run)
    assert not called and not (run / 'models').exists()


def test_no_more_processes_than_gpus(tmp_path, monkeypatch):
    called, run = [], make_run(tmp_path / 'run', true=False)
    monkeypatch.setattr(train_module.subprocess, 'run', fake_torchrun(called))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    run_train(run, batch_size=8, n_seeds=1, processes=2)
    assert '--nproc_per_node=1' in called[0][0]


@pytest.mark.parametrize('said, told', [
    ('[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried …', 'torch.OutOfMemoryError: CUDA out of memory. Tried …'),
    ('safetensors_rust.SafetensorError: I/O error', 'safetensors_rust.SafetensorError: I/O error'), ('all is well', ''),
    ('  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 17)', 'Process 1 was killed by signal 9: often for want of memory.'),
    ('  rank      : 1 (local_rank: 1)\n  exitcode  : -15 (pid: 17)', '')])  # torchrun's own, after another one stopped
def test_the_reason_is_found_in_what_torchrun_says(said, told): assert train_module.what_stopped(f'[rank1]: a\n{said}\nb') == told


def test_what_stopped_training_is_told_first(tmp_path, monkeypatch):
    said = 'FloatingPointError: s0, epoch 1: the weak loss is nan; ids of the batch: 0017'
    report = (f'[rank1]:     raise FloatingPointError(...)\n[rank1]: {said}\nTraceback (most recent call last):\n'
              + '  File "run.py", line 1, in launch\n' * 200  # what follows may be longer than what is shown
              + 'torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \npacl.train FAILED\n')
    run = make_run(tmp_path / 'run')
    monkeypatch.setattr(train_module.subprocess, 'run', fake_torchrun([], report))
    with pytest.raises(RuntimeError) as error: run_train(run, batch_size=8)
    first, second, *rest = str(error.value).splitlines()
    assert 'training stopped' in first and second == said
    assert rest[-1] == 'pacl.train FAILED' and not (run / 'models').exists()


def still_there(run):
    "Processes that have this folder on their command line."
    found = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try: found += [path.parent.name] * (str(run).encode() in path.read_bytes())
        except OSError: pass  # ended meanwhile
    return found


def test_processes_of_a_killed_torchrun_end(run, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'pacl.train']
    settings = [run, tmp_path / 'out', 'batch_size=8', 'epochs=300', 'checkpoint_minutes=0']
    torchrun = subprocess.Popen(command + settings, env=torchrun_environment(), stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if torchrun.poll() is not None or list(tmp_path.glob('out.part/checkpoints/step-*')): break
        time.sleep(.05)
    assert torchrun.poll() is None and len(still_there(tmp_path)) == 3
    torchrun.kill()
    torchrun.wait()
    for _ in range(100):
        if not still_there(tmp_path): break
        time.sleep(.1)
    else:
        for pid in still_there(tmp_path): os.kill(int(pid), signal.SIGKILL)
        pytest.fail('processes were left')


def test_two_machines_are_two_processes(reference, tmp_path):
    "Two torchruns that meet at an address, as on two machines that share a disk."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        meeting = f'127.0.0.1:{free.getsockname()[1]}'
    command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d',
               f'--rdzv_endpoint={meeting}', '--rdzv_id=17', '-m', 'pacl.train', reference.run, tmp_path / 'out', 'batch_size=8']
    nodes = [subprocess.Popen(command, env=torchrun_environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    expected = load_file(reference.parts / 'pacl-evaluators-s0' / 'model.safetensors')
    for name, weight in load_file(tmp_path / 'out' / 'model.safetensors').items():
        difference = (weight.double() - expected[name]).abs()  # a process has more threads here: the last bits differ, and Adam lifts them
        assert difference.max() < 2e-4 and difference.mean() < 1e-6, name


def test_a_killed_stage_leaves_no_process_and_goes_on_to_the_same_bits(reference, tmp_path):
    run = copy(reference.run, tmp_path / 'a run')
    program = f'from pacl.train import run_train; run_train({str(run)!r}, n_seeds=1, batch_size=8)'
    environment = torchrun_environment() | {'PACL_PROGRESS': str(tmp_path / 'progress')}  # else the closed pipe would end them
    with open(tmp_path / 'said', 'w') as said:
        stage = subprocess.Popen([sys.executable, '-c', program], stderr=said, env=environment)
    for _ in range(1200):
        finished = list(run.glob('.models-parts/*/unpartitioned-evaluators-s0'))
        if finished or stage.poll() is not None: break
        time.sleep(.05)
    assert stage.poll() is None, (tmp_path / 'said').read_text()
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    assert still_there(run)  # torchrun and its processes do not end with it …
    for _ in range(150):
        if not still_there(run): break
        time.sleep(.1)
    else: pytest.fail('processes are left: ' + ' '.join(still_there(run)))  # … but soon after
    assert not (run / 'models').exists() and not list(run.glob('.models-parts/*/pacl-evaluators-s0'))
    kept, = finished
    before = (kept / 'model.safetensors').stat()

    out = run_train(run, n_seeds=1, batch_size=8)
    after = (out / kept.name / 'model.safetensors').stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)  # not trained again
    names = pd.read_csv(out / 'runs.csv')['run'].tolist()
    assert sorted(names) == sorted(f.name for f in reference.parts.iterdir()) and len(names) == 3
    for name in names: assert bits(out / name) == bits(reference.parts / name), name
    assert not list(run.glob('.models.*')) and not still_there(run)


def test_one_killed_process_of_two_ends_the_run_with_a_word_and_it_goes_on(reference, tmp_path):
    run = copy(reference.run, tmp_path / 'a run')
    settings = dict(n_seeds=1, batch_size=8, checkpoint_minutes=0.)
    def kill_rank_1():
        for _ in range(1200):
            if list(run.glob('.models-parts/*/pacl-evaluators-s0.part/checkpoints/step-*')): break
            time.sleep(.02)
        for pid in still_there(run):
            if b'\0RANK=1\0' in Path(f'/proc/{pid}/environ').read_bytes(): os.kill(int(pid), signal.SIGKILL)
    killer = threading.Thread(target=kill_rank_1)
    killer.start()
    with pytest.raises(RuntimeError) as error: run_train(run, **settings)
    killer.join()
    first, second, *_ = str(error.value).splitlines()
    assert 'finished runs and checkpoints are kept, and the same command goes on' in first
    assert second.startswith('Process 1 was killed by signal 9')
    assert not (run / 'models').exists() and list(run.glob('.models-parts/*/*.part/checkpoints/step-*')) and not still_there(run)
    out = run_train(run, **settings)
    for name in (f.name for f in reference.parts.iterdir()): assert bits(out / name) == bits(reference.parts / name), name


def test_the_command_line_names_the_true_partition_and_refuses_another_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'set_num_threads', lambda threads: None)  # as the tests after this one expect
    def call(*settings): main(str(run), str(tmp_path / 'out'), ['batch_size=8', 'epochs=1', *settings])
    (tmp_path / 'out').mkdir()  # an empty one will do
    call('partition=true', 'keep_positives=false')
    before = bits(tmp_path / 'out')
    assert json.loads((tmp_path / 'out/record.json').read_text())['partition'] == 'true'
    with pytest.raises(InputError, match='another run: partition was true, is evaluators; keep_positives was False, is True'): call()
    call('partition=true', 'keep_positives=false', 'workers=1')  # done: nothing to do
    assert bits(tmp_path / 'out') == before
    (tmp_path / 'jobs.json').write_text('[{"temprature": 1}]')
    with pytest.raises(InputError, match='unknown setting "temprature"'): main(str(run), str(tmp_path), jobs=str(tmp_path / 'jobs.json'))


def test_torchrun_starts_one_run_from_the_command_line(reference, tmp_path):
    def call(*arguments):
        command = [sys.executable, '-m', 'pacl.train', *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=torchrun_environment())
    shown = call('--help').stdout
    assert 'temperature=0.07' in shown and 'torchrun --nproc_per_node 4 -m pacl.train' in shown
    wrong = call(reference.run, tmp_path / 'out', 'temprature=.1')
    assert wrong.returncode and wrong.stderr.strip() == 'InputError: unknown setting "temprature"; nearest valid: temperature'
    ended = call(reference.run, tmp_path / 'out', 'batch_size=8', 'lr=1e-3', 'keep_positives=false', 'method=pacl', 'epochs=1')
    record = json.loads((tmp_path / 'out/record.json').read_text())
    assert not ended.returncode and record['lr'] == 1e-3 and record['keep_positives'] is False and record['batch_size'] == 8


if __name__ == '__main__': in_many_processes(*sys.argv[1:])
