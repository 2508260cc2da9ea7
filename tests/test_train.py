"pacl.train: schedule and losses by the equations, any number of processes, the same bits after a kill, the truth never read."
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
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
from pacl.cluster import cluster_features
from pacl.contrast import pacl_loss
from pacl.parts.encoders import load_backbone, save_backbone, split_backbone
from pacl.parts.stages import InputError, read_record, write_stage
from pacl.partition import PARTITIONS, assign_partition
from pacl.train import (METHODS, Batch, Pictures, Posts, Run, Step, Towers, TrainConfig, active_partitions, asked_runs,
                        count_images, gather_rows, main, own_rows, plan_steps, read_runs, run_train,
                        step_losses, train, write_posts)

pytestmark = pytest.mark.usefixtures('one_thread')
TRAINED = [name for name, method in METHODS.items() if method.draws]


def make_run(run, seed=0, trainable_stages=2, true=True, backbone='tf_efficientnet_lite0', sizes=(16, 20, 12, 24), side=32):
    "A profile's folder as the stages before leave it, with noise for pictures, features and scores."
    rng = np.random.default_rng(seed)
    N = sum(sizes)
    ids = [f'{i:04d}' for i in range(N)]
    partition = rng.permutation(np.repeat(PARTITIONS, sizes))
    with write_stage(run / 'data', {'parameters': {}}) as data:
        pd.DataFrame({'id': ids, 'image': 'x.png', 'text': 'so it goes'}).to_csv(data / 'posts.csv', index=False)
        np.save(data / 'posts.npy', rng.integers(0, 256, (N, side, side, 3), np.uint8))
    features = {'backbone': backbone, 'trainable_stages': trainable_stages}
    with write_stage(run / 'features', {'parameters': features}) as folder:
        for name in ('text', 'image'): np.save(folder / f'{name}.npy', rng.normal(size=(N, 384)).astype(np.float32))
        if trainable_stages: np.save(folder / 'early_posts.npy', rng.normal(size=(2, N, 112, 6, 6)).astype(np.float16))
    with write_stage(run / 'partition', {'parameters': {'threshold': .7}}) as folder:
        for name, kinds in {'partition': partition, 'truth': rng.permutation(partition)}.items():
            table = pd.DataFrame({'id': ids, 'factual': rng.random(N), 'emotional': rng.random(N), 'partition': kinds})
            table = table.sample(frac=1, random_state=0).assign(object='fruit', emotion='awe')  # not in order
            if name == 'partition' or true: table.to_csv(folder / f'{name}.csv', index=False)
    with write_stage(run / 'clusters', {'parameters': {'n_clusters': 2}}) as folder:
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


def enhance(run, folder, **settings):
    config = TrainConfig(**settings)
    train(Posts(run), config, folder)


CONFIG = TrainConfig(batch_size=8, seed=3)


@pytest.fixture(scope='module')
def trained(posts, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained') / 'pacl-s3'
    train(posts, CONFIG, folder)
    return folder


# settings and the list of runs

@pytest.mark.parametrize('wrong, says', [
    ({'method': 'palc'}, 'unknown method "palc"; nearest valid: pacl; valid: .* strong, .*unpartitioned'),
    ({'method': 'initial'}, 'unknown method "initial"; .* valid: curriculum, '),
    ({'epochs': 0}, 'epochs is 0, expected int such as 3'), ({'workers': -1}, 'workers is -1'),
    ({'lr': 0}, 'lr is 0.0, expected float such as 0.0001'), ({'projector_lr': math.inf}, 'projector_lr is inf'),
    ({'temperature': math.nan}, 'is nan'), ({'lr': '-1e-4'}, 'expected float')])
def test_a_setting_that_makes_no_sense_stops_before_any_work(wrong, says, tmp_path):
    with pytest.raises(InputError, match=says): enhance(tmp_path / 'no run', tmp_path / 'out', **wrong)
    with pytest.raises(TypeError, match='temprature'): TrainConfig(temprature=1)


OWN = {'threshold': .7, 'n_clusters': 2, 'temperature': .07}


def test_a_profile_asks_for_tables():
    runs = asked_runs('', (), OWN, True)
    assert [run.label for run in runs] == ['initial', 'unpartitioned', 'strong only', 'PACL', 'colour histogram', 'shuffled labels']
    runs = asked_runs('5, text', ('minilm',), OWN, True)
    protocols, groups, _ = runs[Run()]  # the profile's own γ, r and τ are no runs of their own
    assert [*groups] == ['main', 'table5', 'text'] and [*protocols] == ['linear', 'zero-shot', 'fine-tune']
    labels = [run.label for run in runs]
    assert 'PACL, γ 0.3' in labels and 'PACL, text minilm' in labels and len({*labels}) == len(runs) == 6 + 5 + 5 + 5 + 1
    everything = asked_runs('all', ('minilm',), OWN, True)
    assert len({run.folder(0) for run in everything}) == len(everything) > len(asked_runs('all', ('minilm',), OWN, False))
    assert all(set(run.folder(0)) <= {*'abcdefghijklmnopqrstuvwxyz0123456789-._'} for run in everything)


@pytest.mark.parametrize('tables, says', [('6', 'truth: "table6"; nearest valid: table'), ('txet', 'nearest valid: text'),
                                          ('when', 'only for posts with a known truth: "when"')])
def test_a_table_that_cannot_be_asked_for(tables, says):
    with pytest.raises(InputError, match=says): asked_runs(tables, (), OWN, False)


@pytest.mark.parametrize('chosen, says', [({'pcal': {'lr': 1e-4}}, 'unknown method "pcal"; nearest valid: pacl'),
                                          ({'pacl': {'temprature': 1}}, 'unknown setting "temprature"; nearest valid: temperature'),
                                          ({'pacl': {'temperature': -1}}, 'temperature is -1')])
def test_a_choice_that_means_nothing(chosen, says):
    with pytest.raises(InputError, match=says): asked_runs('', (), OWN, True, chosen)


# the schedule, Eqs. 15–17

@given(st.integers(1, 100), st.data())
def test_the_thirds_are_those_of_the_equations(epochs, data):
    epoch = data.draw(st.integers(0, epochs - 1))
    expected = 1 if epoch < epochs / 3 else 3 if epoch < 2 * epochs / 3 else 4
    assert active_partitions(epoch, epochs) == PARTITIONS[:expected]


@pytest.mark.parametrize('method', TRAINED)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(PARTITIONS), max_size=40), st.integers(2, 9), st.integers(3, 7), st.integers(0, 200))
def test_plan(method, others, batch_size, epochs, images):
    drawn = sum(METHODS[method].draws.values(), ())
    partition = np.array([drawn[0]] * 3 + others)
    config = TrainConfig(method=method, batch_size=batch_size, epochs=epochs, images=images)
    count = {name: int((partition == name).sum()) for name in PARTITIONS}
    plan = plan_steps(partition, config)
    for step in plan:
        active = active_partitions(step.epoch, epochs)
        assert len(step.batches) == len(active)  # as many as PACL, whatever is empty
        for name, rows in step.batches:
            kinds = [kind for kind in METHODS[method].draws[name] if count[kind] >= 2]
            assert {*partition[rows]} <= {*kinds} and len({*rows}) == len(rows) == min(batch_size, sum(count[kind] for kind in kinds))
        names = [batch.loss for batch in step.batches]
        possible = [name for name, kinds in METHODS[method].draws.items() if any(k in active and count[k] >= 2 for k in kinds)]
        assert {*names} <= {*possible} and (len(names) < len(possible) or {*names} == {*possible})
    lengths = [len([*steps]) for _, steps in itertools.groupby(plan, lambda step: step.epoch)]
    schedule = [active_partitions(epoch, epochs) for epoch in range(epochs)]
    schedule = [active for active in schedule if any(count[name] > 1 for name in drawn if name in active)]
    natural = [max(max(count[name] for name in active) // batch_size, 1) for active in schedule]
    if not images: assert lengths == natural
    elif min(count.values()) >= batch_size: assert abs(count_images(plan) - images) <= 4 * batch_size * epochs
    again = plan_steps(partition, config)
    assert all((a.rows == b.rows).all() for s, t in zip(plan, again) for a, b in zip(s.batches, t.batches))


@pytest.mark.parametrize('counts, method', [((0, 0, 0, 9), 'strong'), ((1, 1, 1, 1), 'pacl')])
def test_a_partition_without_pairs_trains_nothing(counts, method):
    with pytest.raises(InputError, match=f'no pairs for method {method}'):
        plan_steps(np.repeat(PARTITIONS, counts), TrainConfig(method=method, batch_size=2))


# the losses of a step, in one process and in many

TINY_STEP = Step(0, [Batch('strong', np.arange(8)), Batch('emotional', np.arange(8, 15)), Batch('factual', np.arange(15, 18)),
                     Batch('weak', np.arange(18, 21))])


def tiny_gradients(method):
    "Losses of all, and gradients by one layer for each tower, averaged over processes as DistributedDataParallel does."
    rng = np.random.default_rng(0)
    pictures, text = (torch.tensor(rng.normal(size=(22, d))) for d in (5, 6))
    clusters = labels = [torch.tensor(rng.integers(3, size=22)) for _ in range(2)]
    if method == 'emotionclip': labels = [torch.tensor(rng.dirichlet(np.ones(3), size=22))]
    step = TINY_STEP
    if 'all' in METHODS[method].draws: step = Step(0, [Batch('all', np.arange(21)), Batch('all', np.arange(9, 16))])
    torch.manual_seed(0)
    towers = nn.Linear(5, 4).double(), nn.Linear(6, 4).double()
    rows = step.rows[own_rows(len(step.rows))]
    v, t = towers[0](pictures[rows]), towers[1](text[rows])
    losses = step_losses(v, t, step, labels, TrainConfig(method=method, temperature=.2))
    sum(losses).backward()
    gradients = torch.cat([p.grad.flatten() for tower in towers for p in tower.parameters()])
    if train_module.dist.is_initialized():
        train_module.dist.all_reduce(gradients)
        gradients /= train_module.dist.get_world_size()
    return np.array([loss.item() for loss in losses]), gradients.numpy(), (v, t, clusters)


def test_a_step_has_the_losses_of_its_method():
    losses, _, (v, t, (factual, emotional)) = tiny_gradients('pacl')
    def expected(name, rows): return pacl_loss(v[rows], t[rows], name, factual[rows], emotional[rows], .2).item()
    assert losses.tolist() == pytest.approx([expected(*batch) for batch in TINY_STEP.batches])
    assert tiny_gradients('curriculum')[0].tolist() == pytest.approx([expected('strong', rows) for _, rows in TINY_STEP.batches])
    losses, _, (v, t, _) = tiny_gradients('unpartitioned')
    assert losses[1] == pytest.approx(pacl_loss(v[21:], t[21:], 'strong', torch.zeros(7), torch.zeros(7), .2).item())


TINY_BACKBONES = 'test_convnext', 'test_efficientnet'  # without batch norm; with frozen statistics
TWENTY = TrainConfig(batch_size=64, dim=32, epochs=9)  # 64 pairs of each partition; 21 steps in all three parts of the schedule


@pytest.fixture(scope='module')
def tiny_runs(tmp_path_factory):
    "Small backbones, random, as `save_backbone` writes them, that learn whole from pictures."
    runs = {}
    for name in TINY_BACKBONES:
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        save_backbone(timm.create_model(name, num_classes=0), folder / 'backbone', 32)
        runs[name] = make_run(folder / 'run', trainable_stages=0, backbone=str(folder / 'backbone'), sizes=(128, 130, 64, 192))
    return runs


def train_tiny(runs, out):
    "Every backbone in float64, and one in float32, by the engine itself."
    for name, run in runs.items():
        posts = Posts(run)
        with pytest.MonkeyPatch.context() as patch:
            if name == TINY_BACKBONES[0]: train(posts, TWENTY, Path(out) / f'{name}-32')
            patch.setattr(train_module, 'Towers', lambda *args: Towers(*args).double())
            train(posts, TWENTY, Path(out) / f'{name}-64')


def in_many_processes(folder, job):
    "What each of torchrun's processes does, see the end of this file."
    job, folder = json.loads(Path(job).read_text()), Path(folder)
    train_module.dist.init_process_group('gloo')
    torch.set_num_threads(1)
    rank = train_module.dist.get_rank()
    found = {}
    for method in TRAINED: found[f'{method} losses'], found[f'{method} gradients'], _ = tiny_gradients(method)
    own = torch.arange(7.)[own_rows(7), None].requires_grad_()
    everyone = gather_rows(own, 7)
    (everyone.squeeze() * torch.arange(7.)).sum().backward()
    np.savez(folder / f'{rank}.npz', **found, everyone=everyone.detach(), own=own.detach(), own_gradient=own.grad)
    train_tiny(job['tiny'], folder)
    train_module.dist.barrier()
    if rank == 0: (folder / 'seen.json').write_text(json.dumps([*sys.modules]))
    train_module.dist.init_process_group = lambda backend: None  # once is enough
    if job['run']: main(job['run'], folder / 'parts/jobs.json')  # the runs of the stage, unkilled


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
    (folder / 'parts').mkdir()
    images = count_images(plan_steps(Posts(run).partition(), TrainConfig(batch_size=8)))
    jobs = {f'{method}-s0': {'method': method, 'batch_size': 8, 'images': images} for method in ('unpartitioned', 'strong', 'pacl')}
    (folder / 'parts/jobs.json').write_text(json.dumps(jobs))
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


@pytest.mark.parametrize('many', ['reference', 'four_processes'])
@pytest.mark.parametrize('name', TINY_BACKBONES)
def test_1_x_64_is_2_x_32_is_4_x_16(request, one_process, many, name):
    folder = request.getfixturevalue(many).folder
    ours, theirs = (pd.read_csv(f / f'{name}-64/log.csv') for f in (one_process, folder))
    assert ours.notna().sum()[list(PARTITIONS)].tolist() == [21, 15, 15, 9]
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-9, atol=0)
    for file in ('model', 'projectors'):
        weights, others = (load_file(f / f'{name}-64/{file}.safetensors') for f in (one_process, folder))
        for key, weight in weights.items(): torch.testing.assert_close(others[key], weight, rtol=1e-6, atol=1e-6)
    ours, theirs = (pd.read_csv(f / f'{TINY_BACKBONES[0]}-32/log.csv') for f in (one_process, folder))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=0)


@pytest.mark.parametrize('many', ['reference', 'four_processes'])
def test_many_processes_have_the_losses_and_gradients_of_one(request, many):
    ranks = request.getfixturevalue(many).ranks
    for rank, method in itertools.product(ranks, TRAINED):
        losses, gradients, _ = tiny_gradients(method)
        np.testing.assert_allclose(rank[f'{method} losses'], losses, rtol=0, atol=1e-9)
        np.testing.assert_allclose(rank[f'{method} gradients'], gradients, rtol=0, atol=1e-9)
    for rank in ranks:
        assert rank['everyone'].ravel().tolist() == list(range(7))
        np.testing.assert_array_equal(rank['own_gradient'], len(ranks) * rank['own'])
    assert [len(rank['own']) for rank in ranks] == ([3, 4] if len(ranks) == 2 else [1, 2, 2, 2])


def test_no_text_encoder_is_loaded(reference):
    "What the training processes import."
    modules = json.loads((reference.folder / 'seen.json').read_text())
    assert 'timm' in modules and not any(name.split('.')[0] == 'transformers' for name in modules)


# what a run reads

@pytest.mark.parametrize('path, change, says', [
    ('partition/partition.csv', lambda t: t[t['id'] != '0017'], 'no row for id 0017 of data/posts.csv'),
    ('clusters/clusters.csv', lambda t: pd.concat([t, t[:1].assign(id='x9')]), 'id is "x9", expected an id of data/posts.csv')])
def test_files_that_are_not_about_the_posts(run, tmp_path, path, change, says):
    file = copy(run, tmp_path / 'run') / path
    change(pd.read_csv(file, dtype=str)).to_csv(file, index=False)
    with pytest.raises(InputError, match=says): enhance(tmp_path / 'run', tmp_path / 'out')
    assert not [*tmp_path.glob('out*')]


def test_a_missing_stage(run, tmp_path):
    shutil.rmtree(copy(run, tmp_path / 'run') / 'features')
    with pytest.raises(InputError, match='training reads data, features'): enhance(tmp_path / 'run', tmp_path / 'out')


def test_a_kept_picture_is_one_of_its_views(posts):
    plan = [Step(epoch, [Batch('strong', np.arange(72))]) for epoch in (1, 2)] + [Step(1, [Batch('weak', np.arange(40)[::-1])])]
    first, second, some = (Pictures(posts, plan, 0)[k][0] for k in range(3))
    for seen in (first, second):
        of_view = [(seen == view).all((1, 2, 3)) for view in posts.early]
        assert (of_view[0] ^ of_view[1]).all() and 20 < of_view[1].sum() < 52
    assert (first != second).any() and (some == first[39::-1]).all()  # whatever else is in the batch


# one run

def test_a_run_leaves_what_the_next_stages_read(posts, trained):
    log = pd.read_csv(trained / 'log.csv')
    assert list(log) == ['step', 'epoch', 'lr', *PARTITIONS]
    np.testing.assert_allclose(log['lr'], CONFIG.lr * (1 + np.cos(np.pi * np.arange(7) / 7)) / 2)
    assert log['step'].tolist() == list(range(7)) and log['epoch'].tolist() == [0, 0, 1, 1, 2, 2, 2]
    for name in PARTITIONS: assert log[name].notna().tolist() == [name in active_partitions(e, 3) for e in log['epoch']]
    record = json.loads((trained / 'record.json').read_text())
    assert record == dataclasses.asdict(CONFIG) | {'steps': 7, 'images_seen': 2 * 8 + 2 * 24 + 3 * 32}
    files = ['config.json', 'log.csv', 'model.safetensors', 'projectors.safetensors', 'record.json']
    assert sorted(os.listdir(trained)) == files and [*trained.parent.iterdir()] == [trained]
    state, initial = load_file(trained / 'model.safetensors'), load_backbone('tf_efficientnet_lite0')
    learning = {p.data_ptr() for p in split_backbone(initial, 2)[1].parameters()}  # the last stages alone, and no statistics
    expected = {name for name, p in initial.named_parameters() if p.data_ptr() in learning}
    assert {name for name, value in initial.state_dict().items() if not torch.equal(value, state[name])} == expected


def test_training_is_the_plain_loop(posts, trained):
    "AdamW by hand, with a cosine from the settings' rates to 0, once a step."
    torch.manual_seed(CONFIG.seed)
    text = posts.text()
    towers, plan = Towers(posts, CONFIG, text.shape[1]), plan_steps(posts.partition(), CONFIG)
    learning = {name: p for name, p in towers.named_parameters() if p.requires_grad}
    state = {name: (torch.zeros_like(p), torch.zeros_like(p), p.detach().clone()) for name, p in learning.items()}
    for number, (pictures, rows, seeds) in enumerate(map(Pictures(posts, plan, CONFIG.seed).__getitem__, range(7)), 1):
        v, t = towers(towers.image_inputs(torch.from_numpy(pictures), seeds), text[rows])
        losses = step_losses(v, t, plan[number - 1], posts.clusters(), CONFIG)
        gradients = torch.autograd.grad(sum(losses), [*learning.values()])
        cosine = (1 + math.cos(math.pi * (number - 1) / 7)) / 2
        for (name, p), gradient in zip(learning.items(), gradients):
            rate, (mean, square, _) = (CONFIG.projector_lr if 'projector' in name else CONFIG.lr) * cosine, state[name]
            mean.lerp_(gradient, .1)
            square.lerp_(gradient ** 2, .001)
            p.data -= rate * (.01 * p.data + mean / (1 - .9 ** number) / ((square / (1 - .999 ** number)).sqrt() + 1e-8))
    saved = {f'backbone.{name}': value for name, value in load_file(trained / 'model.safetensors').items()}
    saved |= {f'{name}.weight': value for name, value in load_file(trained / 'projectors.safetensors').items()}
    for name, p in learning.items():
        way, off = (saved[name] - state[name][2]).norm(), (saved[name] - p.detach()).norm()
        assert way > 0 and off < .02 * way, (name, way, off)


def bits(folder): return {name: (folder / name).read_bytes() for name in ('model.safetensors', 'projectors.safetensors', 'log.csv')}


def test_without_the_truth_the_same_bits(run, trained, tmp_path):
    blind = copy(run, tmp_path / 'run')
    shutil.rmtree(blind / 'world')
    (blind / 'partition/truth.csv').unlink()
    enhance(blind, tmp_path / 'out', batch_size=8, seed=3, workers=2)  # any number of readers
    assert bits(tmp_path / 'out') == bits(trained)
    enhance(blind, tmp_path / 'out', batch_size=8, seed=3)  # is there already
    with pytest.raises(InputError, match='left by another run: seed was 3, is 4'): enhance(blind, tmp_path / 'out', batch_size=8, seed=4)


def test_bfloat16_is_close_to_float32_and_checkpointed_activations_give_the_same_bits(tiny_runs, one_process, tmp_path):
    posts, expected = Posts(tiny_runs['test_convnext']), one_process / 'test_convnext-32'
    train(posts, dataclasses.replace(TWENTY, checkpointing=True), tmp_path / 'saving')
    assert bits(tmp_path / 'saving') == bits(expected)
    train(posts, dataclasses.replace(TWENTY, precision='bfloat16'), tmp_path / 'low')
    low, high = (pd.read_csv(f / 'log.csv') for f in (tmp_path / 'low', expected))
    pd.testing.assert_frame_equal(low, high, rtol=.05, atol=0)
    assert (low['strong'] != high['strong']).all() and low['strong'].iloc[-1] < low['strong'].iloc[0]


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops(run, tmp_path, value):
    broken = copy(run, tmp_path / 'run')
    text, partition = np.load(broken / 'features/text.npy'), Posts(broken).partition()
    row = np.flatnonzero(partition == 'factual')[2]
    text[row, 7] = value
    np.save(broken / 'features/text.npy', text)
    says = rf'out, step 1, epoch 1: the factual loss is nan; ids of the batch: .*\b{row:04d}\b'
    with pytest.raises(FloatingPointError, match=says) as error: enhance(broken, tmp_path / 'out', batch_size=16)
    ids = str(error.value).split(': ')[-1].split()
    assert len(ids) == 12 and (partition[[int(i) for i in ids]] == 'factual').all()  # of that batch alone


# runs that are killed

ALWAYS = dataclasses.replace(CONFIG, checkpoint_minutes=1e-9)


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


def half_a_file(path, *_):
    with open(path, 'wb') as file: file.write(os.urandom(10_000))
    kill_myself()


def at_call(number, function, before):
    "`function`, but before the call with this number something happens."
    calls = iter(range(10**6))
    def replacement(*args, **settings):
        if next(calls) == number: before(*args, **settings)
        return function(*args, **settings)
    return replacement


KILLS = {  # a function of pacl.train, of torch or of Path, the call that is the last, and what happens there
    'in the third step': ('step_losses', 3, kill_myself), 'after a step, before its checkpoint': ('save_checkpoint', 4, kill_myself),
    'in the middle of writing a checkpoint': ('save', 2, lambda state, path: half_a_file(path)),
    'before the checkpoint has its name': ('rename', 1, kill_myself), 'while the model is saved': ('save_backbone', 0, kill_myself),
    'while the projectors are saved': ('write_bytes', 0, half_a_file), 'before the whole run has its name': ('rename', 7, kill_myself)}


def counted(monkeypatch):
    "A list that has an entry for each step from now on."
    done = []
    monkeypatch.setattr(train_module, 'step_losses', lambda *args: done.append(1) or step_losses(*args))
    return done


@pytest.mark.parametrize('where', KILLS)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(posts, trained, tmp_path, monkeypatch, where):
    name, number, how = KILLS[where]
    def killed():
        place = {'save': torch, 'rename': Path, 'write_bytes': Path}.get(name, train_module)
        setattr(place, name, at_call(number, getattr(place, name), how))
        train(posts, ALWAYS, tmp_path / 'out')
    assert in_a_child(killed) == -signal.SIGKILL and not (tmp_path / 'out').exists()
    done = counted(monkeypatch)
    train(posts, ALWAYS, tmp_path / 'out')
    assert bits(tmp_path / 'out') == bits(trained) and len(done) < 7  # some were done already
    assert [*tmp_path.iterdir()] == [tmp_path / 'out']


def test_a_run_killed_again_and_again_at_random(posts, trained, tmp_path):
    rng, kills = np.random.default_rng(), 0
    for number in range(60):
        def killed(number=number):
            threading.Timer(rng.uniform(0, .1 + number / 5), kill_myself).start()  # later and later, so that it ends
            train(posts, ALWAYS, tmp_path / 'out')
        if not (status := in_a_child(killed)): break
        assert status == -signal.SIGKILL
        kills += 1
        rng.random()  # the child's draws are its own
    assert kills and bits(tmp_path / 'out') == bits(trained)


def test_a_checkpoint_of_another_run_is_not_taken(posts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, 'step_losses', at_call(2, step_losses, lambda *_: exec('raise KeyboardInterrupt')))
        train(posts, ALWAYS, tmp_path / 'out')
    others = {'lr': (posts, dataclasses.replace(CONFIG, lr=1e-3)), 'posts': (Posts(make_run(tmp_path / 'other', seed=1)), CONFIG),
              'workers': (posts, dataclasses.replace(CONFIG, workers=1))}
    for changed, (some, config) in others.items():
        copy(tmp_path / 'out.part', tmp_path / f'{changed}.part')
        done = counted(monkeypatch)
        train(some, config, tmp_path / changed)
        assert len(done) == (5 if changed == 'workers' else 7)  # these may change


# what a run changes

def written(posts, tmp_path, **changes):
    folder = tmp_path / 'posts'
    tmp_path.mkdir(exist_ok=True)
    write_posts(posts, Run(**changes), 0, folder)
    return SimpleNamespace(partition=posts.partition(folder / 'partition.csv'), folder=folder, files={*os.listdir(folder)})


def test_a_threshold_cuts_the_scores_again(posts, tmp_path):
    table = pd.read_csv(posts.run / 'partition/partition.csv', dtype={'id': str}).set_index('id').loc[posts.ids]
    made = written(posts, tmp_path, threshold=.3)
    assert (made.partition == assign_partition(table['factual'], table['emotional'], .3)).all()
    assert made.files == {'partition.csv'}


def test_clusters_are_made_again(posts, tmp_path):
    made = written(posts, tmp_path, n_clusters=5)
    clusters = posts.clusters(made.folder / 'clusters.csv')
    assert [len(labels.unique()) for labels in clusters] == [5, 5] and (made.partition == posts.partition()).all()
    assert made.files == {'partition.csv', 'clusters.csv'}


def test_true_flipped_and_random_partitions(posts, tmp_path):
    true = posts.partition(posts.run / 'partition/truth.csv')
    assert (written(posts, tmp_path / 'a', partition='true').partition == true).all()
    flipped = written(posts, tmp_path / 'b', partition='true', flipped=.25).partition
    assert 6 < (flipped != true).sum() <= 18 and sorted(flipped) == sorted(true)
    random = written(posts, tmp_path / 'c', partition='true', flipped=1.).partition
    assert sorted(random) == sorted(true) and (random != true).sum() > 36


def test_texts_are_encoded_and_clustered_anew(posts, tmp_path, monkeypatch):
    encoded = np.random.default_rng(0).random((72, 9))
    seen = []
    encoder = SimpleNamespace(embed_texts=lambda texts: seen.append(texts) or encoded)
    monkeypatch.setattr(train_module, 'load_text_encoder', {'minilm': encoder}.get)
    made = written(posts, tmp_path, text_encoder='minilm')
    assert seen == [posts.texts] and (made.partition == posts.partition()).all()
    assert posts.text(made.folder / 'text.npy').shape == (72, 9)
    expected = [cluster_features(rows, 2) for rows in (np.load(posts.run / 'features/image.npy'), encoded)]
    assert posts.clusters(made.folder / 'clusters.csv').tolist() == np.array(expected).tolist()


# the stage

def fake_torchrun(called, error=''):
    def run(command, **how):
        called.append((command, how))
        file = Path(command[-1])
        for name, job in json.loads(file.read_text()).items():
            if error: break
            (file.parent / name).mkdir()
            (file.parent / name / 'record.json').write_text(json.dumps(job | {'steps': 1, 'images_seen': 8}))
        return SimpleNamespace(returncode=bool(error), stderr=error)
    return run


def test_the_stage_starts_every_run_with_every_seed(tmp_path, monkeypatch):
    called, run = [], make_run(tmp_path / 'run')
    monkeypatch.setattr(train_module.subprocess, 'run', fake_torchrun(called))
    given = dict(n_seeds=2, batch_size=8, processes=3, temperature=.1, lr=2e-4, precision='float32', workers=1)
    out = run_train(run, **given)
    table = read_runs(run)
    assert len(table) == 2 * 6 and sorted(filter(None, table['folder'])) == sorted(f.name for f in out.iterdir() if f.is_dir())
    assert (table['folder'][table['method'].isin(['initial', 'colour-histogram', 'shuffled-labels'])] == '').all()
    (command, how), = called  # one start for all
    assert '--nproc_per_node=3' in command and how['env']['PACL_PARENT'] == str(os.getpid())
    images = count_images(plan_steps(Posts(run).partition(), TrainConfig(batch_size=8)))
    assert str(run) not in ''.join(path.read_text() for path in out.glob('*/record.json'))
    for record in (json.loads((out / name / 'record.json').read_text()) for name in table['folder'] if name):
        assert record['images'] == images and (record['temperature'], record['lr'], record['workers']) == (.1, 2e-4, 1)
    run_train(run, **given)
    assert len(called) == 1
    out = run_train(run, **given, tables='4')  # only what is new is trained
    assert not {'strong-s0', 'pacl-s0'} & json.loads(Path(called[1][0][-1]).read_text()).keys() and len(called) == 2
    assert (read_runs(run)['tables'] == 'main table4').sum() == 2 * 4
    out = run_train(run, **given, chosen={'pacl': {'temperature': 1., 'lr': 3e-4}})  # a run of that method is another then
    assert sorted(json.loads(Path(called[2][0][-1]).read_text())) == ['pacl-s0', 'pacl-s1']
    record = json.loads((out / 'pacl-s1/record.json').read_text())
    assert (record['temperature'], record['lr'], record['projector_lr']) == (1., 3e-4, 1e-3)
    run_train(run, **given | {'lr': 1e-3})
    assert called[3][0][-1] != called[2][0][-1] and len([*(run / '.kept/models').iterdir()]) == 1


def test_bad_input_is_told_before_torchrun_starts(tmp_path, monkeypatch):
    called, run = [], make_run(tmp_path / 'run', true=False)
    monkeypatch.setattr(train_module.subprocess, 'run', fake_torchrun(called))
    with pytest.raises(InputError, match='known truth'): run_train(run, tables='when')
    table = pd.read_csv(run / 'partition/partition.csv', dtype=str)
    table.assign(partition='weak').to_csv(run / 'partition/partition.csv', index=False)
    with pytest.raises(InputError, match='no pairs for method strong'): run_train(run)
    assert not called and not (run / 'models').exists()


def test_what_stopped_training_is_told_first(tmp_path, monkeypatch):
    said = 'FloatingPointError: s0, epoch 1: the weak loss is nan; ids of the batch: 0017'
    report = f'[rank1]:     raise FloatingPointError(...)\n[rank1]: {said}\n' + '  File "run.py", line 1, in launch\n' * 200
    run = make_run(tmp_path / 'run')
    monkeypatch.setattr(train_module.subprocess, 'run', fake_torchrun([], report))
    with pytest.raises(RuntimeError) as error: run_train(run, batch_size=8)
    assert said in str(error.value).splitlines()[0] and not (run / 'models').exists()


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
    stage = subprocess.Popen([sys.executable, '-c', program], env=environment)
    for _ in range(2400):
        finished = [*run.glob('.kept/models/*/unpartitioned-s0')]
        if finished or stage.poll() is not None: break
        time.sleep(.05)
    assert stage.poll() is None
    stage.kill()
    stage.wait()
    for _ in range(150):
        if not still_there(run): break
        time.sleep(.1)
    else: pytest.fail('processes are left: ' + ' '.join(still_there(run)))
    assert not (run / 'models').exists() and 'starting 2 processes that train 0/3' in (tmp_path / 'progress').read_text()
    before = (finished[0] / 'model.safetensors').stat().st_mtime_ns
    out = run_train(run, n_seeds=1, batch_size=8)
    assert (out / 'unpartitioned-s0/model.safetensors').stat().st_mtime_ns == before  # not trained again
    for name in ('unpartitioned-s0', 'strong-s0', 'pacl-s0'): assert bits(out / name) == bits(reference.parts / name), name
    assert not still_there(run) and read_record(out)['result']['runs'] == 6


def test_from_the_command_line(run, tmp_path):
    def call(module, *settings):
        command = [sys.executable, '-m', *module, run, tmp_path / 'out', *settings]
        return subprocess.run(command, capture_output=True, text=True, env=torchrun_environment())
    assert call(['pacl.train'], 'lr=0').stderr.strip() == 'InputError: lr is 0.0, expected float such as 0.0001'
    assert 'unknown setting "temprature"; nearest valid: temperature' in call(['pacl.train'], 'temprature=.1').stderr
    torchrun = ['torch.distributed.run', '--standalone', '-m', 'pacl.train']
    made = call(torchrun, 'batch_size=8', 'epochs=1', 'lr=1e-3', 'checkpointing=false', 'precision=float32')
    assert not made.returncode, made.stderr
    record = json.loads((tmp_path / 'out/record.json').read_text())
    assert (record['lr'], record['checkpointing'], record['precision']) == (1e-3, False, 'float32')


@pytest.mark.parametrize('line, says', [('{metod: pacl}', 'unknown "metod"; nearest valid: method'),
                                        ('{method: palc}', 'unknown "palc"; nearest valid: pacl'),
                                        ('{method: pacl, protocols: [liner]}', 'unknown "liner"; nearest valid: linear')])
def test_a_wrong_line_of_the_list_is_named(tmp_path, monkeypatch, line, says):
    monkeypatch.setattr(train_module, 'LIST', tmp_path / 'runs.yaml')
    (tmp_path / 'runs.yaml').write_text(f'main:\n- {line}\n')
    with pytest.raises(InputError, match=f'runs.yaml, main, .*{says}'): [*train_module.listed_runs()]


if __name__ == '__main__': in_many_processes(*sys.argv[1:])
