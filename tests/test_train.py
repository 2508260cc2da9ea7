"pacl.train: schedule and masks by the equations, any number of processes, the same bits after a kill, the truth never read."
import ast
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from pacl import train as train_module
from pacl.contrast import pacl_loss
from pacl.encoders import augment, load_backbone, split_backbone, to_input
from pacl.stages import InputError, read_record, write_stage
from pacl.train import (FULL, MAIN, PARTITIONS, Posts, Towers, TrainConfig, active_partitions, count_images, endless_batches, enhance,
                        gather_rows, main, method_masks, own_rows, plan_steps, run_train, step_losses, sum_gradients, train)

N = 72
METHODS = list(dict.fromkeys(m for m, _ in FULL))


def make_run(run, seed=0, trainable_stages=2, true=True):
    "A profile's folder as the stages before leave it, with noise for pictures, features and scores."
    rng = np.random.default_rng(seed)
    ids = [f'{i:04d}' for i in range(N)]
    partition = rng.permutation(np.repeat(PARTITIONS, [16, 20, 12, 24]))
    with write_stage(run / 'data', {'stage': 'data', 'parameters': {}}) as data:
        pd.DataFrame({'id': ids, 'image': 'x.png', 'text': 'so it goes'}).to_csv(data / 'posts.csv', index=False)
        np.save(data / 'posts.npy', rng.integers(0, 256, (N, 32, 32, 3), np.uint8))
    features = {'backbone': 'tf_efficientnet_lite0', 'trainable_stages': trainable_stages}
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


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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

@pytest.mark.parametrize('settings, error, says', [
    ({'temprature': 1}, TypeError, 'temprature'),
    ({'method': 'palc'}, InputError, 'method is "palc", expected one of unpartitioned, strong, pacl'),
    ({'partition': 'truth'}, InputError, 'partition is "truth", expected one of evaluators, true')])
def test_a_setting_that_is_not_there(settings, error, says, tmp_path):
    with pytest.raises(error, match=says): enhance(tmp_path / 'no run', tmp_path / 'out', **settings)


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


@settings(deadline=None)
@given(st.lists(st.sampled_from(PARTITIONS), min_size=2, max_size=40), st.integers(2, 9), st.integers(1, 7), st.sampled_from(METHODS),
       st.integers(0, 2))
def test_plan(partition, batch_size, epochs, method, seed):
    partition, config = np.array(partition), TrainConfig(method=method, batch_size=batch_size, epochs=epochs, seed=seed)
    count = {name: int((partition == name).sum()) for name in PARTITIONS}
    if count['strong'] < 2:
        with pytest.raises(InputError, match='fewer than 2 pairs are strong'): plan_steps(partition, config)
        return
    plan = plan_steps(partition, config)
    np.testing.assert_equal(plan, plan_steps(partition, config))
    assert [step['epoch'] for step in plan] == sorted(step['epoch'] for step in plan) and plan[-1]['epoch'] < epochs
    for step in plan:
        names = set(step) - {'epoch'}
        if method.startswith(('pacl', 'curriculum')):
            assert names == {name for name in active_partitions(step['epoch'], epochs) if count[name] >= 2}
        else: assert names == {'all' if method.startswith('unpartitioned') else 'strong'}
        for name in names:
            assert len(set(step[name])) == len(step[name]) == min(batch_size, count.get(name, len(partition)))
            assert name == 'all' or (partition[step[name]] == name).all()
    pacl = plan_steps(partition, TrainConfig(batch_size=batch_size, epochs=epochs, seed=seed))
    for epoch in range(epochs):  # until the largest partition is through
        largest = max(count[name] for name in active_partitions(epoch, epochs))
        assert sum(step['epoch'] == epoch for step in pacl) == max(largest // batch_size, 1)
    if method.startswith(('pacl', 'curriculum')): np.testing.assert_equal(plan, pacl)
    elif method.endswith('-steps'): assert len(plan) == len(pacl)
    else: assert 0 <= count_images(plan) - count_images(pacl) < batch_size


def test_another_seed_makes_another_plan():
    partition = np.repeat(PARTITIONS, 8)
    for method in METHODS:
        plans = [plan_steps(partition, TrainConfig(method=method, batch_size=4, seed=seed)) for seed in (0, 1)]
        assert len(plans[0]) == len(plans[1]) and str(plans[0]) != str(plans[1])


# masks

def naive_masks(method, sim, partition, factual, emotional):
    "Positives and candidates of image and text anchors, pair by pair."
    n = len(sim)
    if method in ('unpartitioned', 'strong', 'curriculum', 'unpartitioned-steps', 'strong-steps'): partition = 'strong'
    best_text = [max(range(n), key=lambda j: (sim[i][j], -j)) for i in range(n)]
    best_image = [max(range(n), key=lambda i: (sim[i][j], -i)) for j in range(n)]
    masks = [[[False] * n for _ in range(n)] for _ in range(4)]
    for i in range(n):
        for j in range(n):
            dropped = (partition in ('emotional', 'weak') and factual[i] == factual[best_image[j]]
                       or partition in ('factual', 'weak') and emotional[j] == emotional[best_text[i]])
            kept = method == 'pacl-no-filter' or not dropped
            pseudo = partition == 'weak' and method != 'pacl-no-pseudo'
            of_image, of_text = (j == best_text[i], i == best_image[j]) if pseudo else (i == j, i == j)
            masks[0][i][j], masks[1][i][j] = of_image, of_image or kept
            masks[2][j][i], masks[3][j][i] = of_text, of_text or kept
    return masks


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from(METHODS), st.sampled_from([*PARTITIONS, 'all']))
def test_masks_of_every_method(data, n, method, partition):
    if partition == 'all' and method.startswith('pacl'): return
    row = st.lists(st.sampled_from([-1., 0., .5, 1.]), min_size=n, max_size=n)  # with ties
    sim = data.draw(st.lists(row, min_size=n, max_size=n))
    factual, emotional = (data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)) for _ in range(2))
    masks = method_masks(method, torch.tensor(sim), partition, torch.tensor(factual), torch.tensor(emotional))
    assert [mask.tolist() for mask in masks] == naive_masks(method, sim, partition, factual, emotional)


# the losses of a step, in one process and in two

class Tiny(nn.Module):
    "Towers with one linear layer for a backbone, in float64."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.text_projector = nn.Linear(5, 4, dtype=torch.float64), nn.Linear(6, 4, bias=False, dtype=torch.float64)
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    def forward(self, pictures, texts): return self.backbone(pictures), self.text_projector(texts)


TINY_STEP = {'epoch': 0, 'strong': np.arange(8), 'emotional': np.arange(8, 15), 'factual': np.arange(15, 17), 'weak': np.arange(17, 22)}


def tiny_posts():
    rng = np.random.default_rng(0)
    pictures, text = (torch.tensor(rng.normal(size=(22, d))) for d in (5, 6))
    return SimpleNamespace(pictures=lambda rows, seed, backbone: pictures[rows], text=text, ids=np.array([f'{i:04d}' for i in range(22)]),
                           clusters={k: torch.tensor(rng.integers(3, size=22)) for k in ('factual', 'emotional')})


def tiny_gradients():
    "Every method's losses and gradients as one flat vector each; of all processes together."
    found = {}
    for method in METHODS:
        step = TINY_STEP if method.startswith(('pacl', 'curriculum')) else {'epoch': 0, 'all': np.arange(21)}
        towers = Tiny()
        losses = step_losses(towers, tiny_posts(), step, TrainConfig(method=method, temperature=.2))
        sum(losses.values()).backward()
        sum_gradients(list(towers.parameters()))
        found[f'{method} losses'] = torch.stack(list(losses.values())).detach().numpy()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in towers.parameters()]
        found[f'{method} gradients'] = torch.cat([g.flatten() for g in gradients]).numpy()
    return found


def test_a_step_sums_what_the_equations_say():
    towers, posts = Tiny(), tiny_posts()
    def expected(rows, partition):
        v, t = towers(posts.pictures(rows, 0, None), posts.text[rows])
        return pacl_loss(v, t, partition, posts.clusters['factual'][rows], posts.clusters['emotional'][rows], .2)
    losses = step_losses(towers, posts, TINY_STEP, TrainConfig(temperature=.2))
    assert list(losses) == list(PARTITIONS)
    for name in PARTITIONS: torch.testing.assert_close(losses[name], expected(TINY_STEP[name], name), rtol=1e-12, atol=0)
    everyone = step_losses(towers, posts, {'epoch': 0, 'all': np.arange(22)}, TrainConfig(method='unpartitioned', temperature=.2))
    torch.testing.assert_close(everyone['all'], expected(np.arange(22), 'strong'), rtol=1e-12, atol=0)


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


def in_two_processes(out, run, jobs, parts):
    "What each of torchrun's processes does, see the end of this file."
    train_module.dist.init_process_group('gloo')
    rank = train_module.dist.get_rank()
    weight = nn.Parameter(torch.zeros(2))
    if rank: weight.grad = torch.tensor([1., 2.])
    sum_gradients([weight])
    own = torch.arange(7.)[own_rows(7), None].requires_grad_()
    everyone = gather_rows(own, 7)
    (everyone.squeeze() * torch.arange(7.)).sum().backward()
    np.savez(f'{out}/{rank}.npz', **tiny_gradients(), weight=weight.grad, everyone=everyone.detach(), own=own.detach(),
             own_gradient=own.grad)
    train_module.dist.init_process_group = lambda backend: None  # once is enough
    main(run, jobs, parts)  # the runs of the stage, unkilled


def torchrun_environment(): return {**os.environ, 'PYTHONPATH': ':'.join(filter(None, sys.path)), 'OMP_NUM_THREADS': '1'}


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    "A run folder without truth, and what two processes make of it when nobody kills them."
    folder = tmp_path_factory.mktemp('reference')
    run = make_run(folder / 'runs/mini', true=False)
    jobs = [dict(method=m, batch_size=8) for m, p in MAIN if p == 'evaluators']
    (folder / 'jobs.json').write_text(json.dumps(jobs))
    (folder / 'parts').mkdir()
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', __file__]
    subprocess.run([*command, folder, run, folder / 'jobs.json', folder / 'parts'], check=True, env=torchrun_environment())
    return SimpleNamespace(run=run, parts=folder / 'parts', ranks=[np.load(folder / f'{rank}.npz') for rank in range(2)])


def test_two_processes_have_the_losses_and_gradients_of_one(reference):
    alone = tiny_gradients()
    assert len(alone) == 2 * len(METHODS) and all(np.abs(v).max() > .01 for v in alone.values())
    for rank in reference.ranks:
        for name, value in alone.items(): np.testing.assert_allclose(rank[name], value, rtol=0, atol=1e-9, err_msg=name)
        assert rank['weight'].tolist() == [1, 2]  # a process without a gradient adds nothing
        assert rank['everyone'].ravel().tolist() == list(range(7))
        np.testing.assert_array_equal(rank['own_gradient'], rank['own'])  # through the own rows alone
    assert [len(rank['own']) for rank in reference.ranks] == [3, 4]


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
    says = rf'{path.name}: no row for id 0017 \(2 of 72 posts are missing\)'
    with pytest.raises(InputError, match=says): enhance(path.parents[1], tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_a_kept_picture_is_one_of_its_views(posts):
    seen = {seed: posts.pictures(np.arange(N), seed, None).numpy() for seed in ((0, 1), (0, 2), (1, 1))}  # (run, epoch)
    second = [(pictures == posts.early[1]).all((1, 2, 3)) for pictures in seen.values()]
    assert all(((pictures == posts.early[0]).all((1, 2, 3)) ^ other).all() for pictures, other in zip(seen.values(), second))
    assert all(20 < other.sum() < 52 for other in second) and len({other.tobytes() for other in second}) == 3
    rows = np.random.default_rng(0).permutation(N)[:40]
    np.testing.assert_array_equal(posts.pictures(rows, (0, 1), None), seen[0, 1][rows])  # whatever else is in the batch


def test_the_whole_backbone_learns_from_pictures(tmp_path):
    posts = Posts(make_run(tmp_path / 'run', trainable_stages=0))
    backbone, rows = load_backbone('tf_efficientnet_lite0'), np.array([5, 3, 60])
    seen = posts.pictures(rows, (0, 1), backbone)
    assert seen.shape == (3, 3, 32, 32) and (seen != to_input(posts.images[rows], backbone)).flatten(1).any(1).all()
    torch.testing.assert_close(seen[1:], posts.pictures(rows[1:], (0, 1), backbone), rtol=0, atol=0)
    torch.testing.assert_close(seen[:1], augment(to_input(posts.images[[5]], backbone), np.random.default_rng((0, 1, 5))))
    train(posts, TrainConfig(batch_size=8, epochs=1), tmp_path / 'out')
    state, initial = load_file(tmp_path / 'out/model.safetensors'), backbone.state_dict()
    same = {name for name in initial if torch.equal(initial[name], state[name])}
    assert same == {name for name in initial if 'running' in name or 'num_batches' in name}


# one run

def test_a_run_leaves_what_the_next_stages_read(posts, trained):
    log = pd.read_csv(trained / 'log.csv')
    assert list(log) == ['step', 'epoch', *PARTITIONS]
    assert log['step'].tolist() == list(range(7)) and log['epoch'].tolist() == [0, 0, 1, 1, 2, 2, 2]
    for name in PARTITIONS: assert log[name].notna().tolist() == [name in active_partitions(e, 3) for e in log['epoch']]
    record = json.loads((trained / 'record.json').read_text())
    assert record['steps'] == 7 and record['images_seen'] == 2 * 8 + 2 * 24 + 3 * 32 and record['method'] == 'pacl' and record['seed'] == 3
    assert not list(trained.parent.glob('*.part'))


def test_only_the_last_stages_learn(posts, trained):
    state, initial = load_file(trained / 'model.safetensors'), load_backbone('tf_efficientnet_lite0')
    learning = {p.data_ptr() for p in split_backbone(initial, 2)[1].parameters()}
    expected = {name for name, p in initial.named_parameters() if p.data_ptr() in learning}
    assert {name for name, value in initial.state_dict().items() if not torch.equal(value, state[name])} == expected
    for value in state.values(): assert value.isfinite().all()


def test_training_is_the_plain_loop(posts, trained):
    "AdamW by hand, with a cosine from the settings' rates to 0, once a step."
    torch.manual_seed(CONFIG.seed)
    towers, plan = Towers(posts, CONFIG.dim).eval(), plan_steps(posts.partitions['evaluators'], CONFIG)
    learning = {name: p for name, p in towers.named_parameters() if p.requires_grad}
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in learning.items()}
    start = {name: p.detach().clone() for name, p in learning.items()}
    for number, step in enumerate(plan, 1):
        gradients = torch.autograd.grad(sum(step_losses(towers, posts, step, CONFIG).values()), list(learning.values()))
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
    towers = Towers(posts, CONFIG.dim).eval()
    for epoch in (0, 3):  # before training and after it
        if epoch:
            towers.backbone.load_state_dict(load_file(trained / 'model.safetensors'))
            for name, weight in load_file(trained / 'projectors.safetensors').items(): getattr(towers, name).weight.data = weight
        with torch.no_grad(): v, t = towers(torch.tensor(posts.early[0, rows], dtype=torch.float32), posts.text[rows])
        np.testing.assert_allclose(probe['image_features'][epoch].reshape(48, -1), v, atol=1e-4)
        np.testing.assert_allclose(probe['text_features'][epoch].reshape(48, -1), t, atol=1e-4)
    assert all((probe['image_features'][e] != probe['image_features'][e + 1]).any() for e in range(3))


def bits(folder): return {name: (folder / name).read_bytes() for name in ('model.safetensors', 'projectors.safetensors', 'log.csv')}


def test_without_the_truth_the_same_bits(run, trained, tmp_path):
    blind = copy(run, tmp_path / 'run')
    shutil.rmtree(blind / 'world')
    for name in ('truth.csv', 'true_partition.csv'): (blind / 'partition' / name).unlink()
    encoder = enhance(blind, tmp_path / 'out', batch_size=8, seed=3)
    assert bits(tmp_path / 'out') == bits(trained)
    images = np.load(blind / 'data/posts.npy')[:2]
    from PIL import Image
    expected = load_backbone('tf_efficientnet_lite0')
    expected.load_state_dict(load_file(trained / 'model.safetensors'))
    with torch.no_grad(): torch.testing.assert_close(encoder([Image.fromarray(i) for i in images]), expected(to_input(images, expected)))
    with pytest.raises(InputError, match='out is not empty'): enhance(blind, tmp_path / 'out')


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
    says = rf'pacl-evaluators-s0, epoch 1: the factual loss is nan; ids of the batch: .*\b{row:04d}\b'
    with pytest.raises(FloatingPointError, match=says): enhance(broken, tmp_path / 'out', batch_size=16)
    assert not (tmp_path / 'out').exists()


# the stage

def fake_torchrun(called, error=''):
    def run(command, **how):
        called.append((command, how))
        *_, parts = command
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
    (command, how), = called  # one start for all
    assert '--nproc_per_node=3' in command and how['env']['PACL_PARENT'] == str(os.getpid())
    assert read_record(out)['result']['runs'] == 2 * len(runs) and run_train(run, **settings) == out and len(called) == 1


def test_finished_runs_serve_what_they_were_made_from_alone(tmp_path, monkeypatch):
    called, run = [], make_run(tmp_path / 'run', true=False)
    monkeypatch.setattr(train_module.subprocess, 'run', fake_torchrun(called))
    usual = {'batch_size': 8, 'n_seeds': 2}
    for other in ({}, {'n_seeds': 1}, {'lr': 2e-4}, {'temperature': .1}, {'processes': 1}): run_train(run, **usual | other)
    clusters = pd.read_csv(run / 'clusters/clusters.csv', dtype=str)
    clusters.assign(factual_cluster='0').to_csv(run / 'clusters/clusters.csv', index=False)
    run_train(run, **usual, processes=1)
    places = [command[-1] for command, _ in called]
    assert places[0] == places[1] and len(set(places)) == 5
    assert not (run / '.models-parts').exists()


def test_bad_input_is_told_before_torchrun_starts(tmp_path, monkeypatch):
    called, run = [], make_run(tmp_path / 'run')
    monkeypatch.setattr(train_module.subprocess, 'run', fake_torchrun(called))
    table = pd.read_csv(run / 'partition/partition.csv', dtype=str)
    table.assign(partition='weak').to_csv(run / 'partition/partition.csv', index=False)
    with pytest.raises(InputError, match='fewer than 2 pairs are strong'): run_train(run)
    table[1:].to_csv(run / 'partition/partition.csv', index=False)
    with pytest.raises(InputError, match=f'no row for id {table["id"][0]}'): run_train(run)
    assert not called and not (run / 'models').exists()


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


if __name__ == '__main__': in_two_processes(*sys.argv[1:])
