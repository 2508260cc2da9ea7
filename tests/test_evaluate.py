"pacl.evaluate: heads against AdamW by hand, features against the backbone, a test split that is read last, a stage that goes on."
import copy
import json
import math
import shutil
from collections import Counter
from dataclasses import asdict
from multiprocessing.pool import ThreadPool

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score
from test_metrics import NAIVE, mean
from torch import nn

import pacl.evaluate as evaluate
from pacl.parts.readers import MIKELS, PANDA, WEBEMO, Task, rating, single
from pacl.parts.encoders import load_backbone, save_backbone, to_input
from pacl.evaluate import (ADJECTIVES, PROMPTS, class_prompts, colour_histogram, decode, extract, fine_tune, head_loss, linear_probe,
                           pieces, quality, run_evaluate, train_and_test, train_heads, zero_shot)
from pacl.parts.metrics import METRICS
from pacl.parts.stages import InputError, write_stage

pytestmark = pytest.mark.usefixtures('one_thread')
EMOTIONS, OBJECTS = ('anger', 'awe', 'fear'), ('ball', 'cat')
SIDES = dict(anger='negative', awe='positive', fear='negative')
KINDS = (*EMOTIONS, 'rage', 'shame', 'zest')
LABEL, OBJECT = single(EMOTIONS), Task('single-label', ('object',), (OBJECTS,))
BENCHMARKS = {'new': {'label': LABEL, 'object': OBJECT,
                      'levels': Task('hierarchical', ('level_1', 'level_2', 'level_3'), (('negative', 'positive'), EMOTIONS, KINDS))},
              'seen': {'label': LABEL, 'object': OBJECT},
              'mixed': {'labels': Task('multi-label', EMOTIONS, (EMOTIONS,)), 'vad': rating(['valence'], 1, 9)}}


def make_text_encoder(folder):
    "A BERT of one layer that knows the prompts' words."
    from transformers import BertConfig, BertModel, BertTokenizer
    words = {word for text in ('[PAD] [UNK] [CLS] [SEP] [MASK] ! .', *PROMPTS, *(ADJECTIVES.get(x, x) for x in KINDS), *SIDES.values())
             for word in text.replace('{}', '').lower().replace('.', ' .').replace('!', ' !').replace('[', ' [').split()}
    folder.mkdir()
    (folder / 'vocab.txt').write_text('\n'.join(sorted(word.upper() if word[0] == '[' else word for word in words)))
    torch.manual_seed(0)
    shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    BertTokenizer(str(folder / 'vocab.txt')).save_pretrained(folder)


def make_benchmarks(run, splits=(80, 12, 40)):
    "data/, standins/, features/ and models/ in small: grey pictures whose brightness is the object, noise for the frozen stages' outputs."
    rng, names = np.random.default_rng(0), ['train', 'val', 'test']
    n = sum(splits)
    with write_stage(run / 'data', {'stage': 'data', 'parameters': {}}) as data:
        for name in BENCHMARKS:
            table = pd.DataFrame({'id': [f'{i:04}' for i in range(n)], 'image': 'x.png', 'split': np.repeat(names, splits)})
            objects = rng.choice(OBJECTS, n)
            if name == 'mixed':
                for emotion in EMOTIONS: table[emotion] = rng.integers(2, size=n)
                table.loc[table['split'] == 'test', 'fear'] = 0  # a class that the test split lacks
                table['valence'] = rng.uniform(1, 9, n).round(2)
            else: table['label'], table['object'] = rng.choice(EMOTIONS, n), objects
            if name == 'new':
                table['level_1'], table['level_2'], table['level_3'] = table['label'].map(SIDES), table['label'], rng.choice(KINDS, n)
            table.to_csv(data / f'{name}.csv', index=False)
            grey = np.where(objects == 'cat', 200, 50)[:, None, None, None]
            np.save(data / f'{name}.npy', np.broadcast_to(grey, (n, 8, 8, 3)).astype(np.uint8))
        told = {name: {task: asdict(about) for task, about in tasks.items()} for name, tasks in BENCHMARKS.items()}
        (data / 'tasks.json').write_text(json.dumps(told))
    with write_stage(run / 'standins', {'stage': 'standins', 'parameters': {}}) as standins: make_text_encoder(standins / 'text_encoder')
    settings = {'backbone': 'tf_efficientnet_lite0', 'trainable_stages': 1}
    with write_stage(run / 'features', {'stage': 'features', 'parameters': settings}) as features:
        for name in BENCHMARKS: np.save(features / f'early_{name}.npy', rng.normal(size=(n, 192, 3, 3)).astype(np.float16))
    with write_stage(run / 'models', {'stage': 'models', 'parameters': {'batch_size': 16}}) as models:
        jobs = [('unpartitioned', 'evaluators', 0), ('pacl', 'evaluators', 0), ('pacl', 'true', 0),
                ('unpartitioned', 'evaluators', 1), ('pacl', 'evaluators', 1)]
        backbone = load_backbone('tf_efficientnet_lite0')
        for method, partition, seed in jobs:
            with torch.no_grad(): backbone.conv_head.weight.mul_(1.01)
            save_backbone(backbone, folder := models / f'{method}-{partition}-s{seed}', 8)
            towers = {tower: torch.from_numpy(rng.normal(size=(5, d))).float() for tower, d in (('image', 1280), ('text', 8))}
            save_file({f'{tower}_projector': weights for tower, weights in towers.items()}, folder / 'projectors.safetensors')
        pd.DataFrame([{'run': f'{m}-{p}-s{s}', 'method': m, 'partition': p, 'seed': s, 'steps': 6, 'images_seen': 160}
                      for m, p, s in jobs]).to_csv(models / 'runs.csv', index=False)
    return run


EPOCHS = dict(probe_epochs=2, fine_tune_epochs=1)


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
    run = make_benchmarks(tmp_path_factory.mktemp('runs') / 'mini')
    run_evaluate(run, **EPOCHS)
    return run


# heads

TASKS = {'single-label': single('abc'), 'hierarchical': Task('hierarchical', ('which', 'coin'), (tuple('abc'), ('heads', 'tails'))),
         'multi-label': Task('multi-label', tuple('abc'), (tuple('abc'),)), 'regression': rating(['valence', 'arousal'], 1, 9)}


def samples(kind, n, seed, apart=3.):
    "Features that tell the targets, the better the further apart."
    rng = np.random.default_rng(seed)
    labels, x = rng.integers(3, size=n), rng.normal(size=(n, 6))
    if kind == 'multi-label': y = rng.integers(2, size=(n, 3)).astype(np.float32)
    elif kind == 'regression': y = rng.uniform(1, 9, (n, 2)).astype(np.float32)
    else: y = np.stack([labels, rng.integers(2, size=n)], 1)[:, :1 if kind == 'single-label' else 2]
    told = {'multi-label': y, 'regression': (y - 5) / 4}.get(kind, np.eye(3)[labels])
    x[:, :told.shape[1]] += apart * told
    return x.astype(np.float32), y


def as_table(kind, split):
    task, (x, y) = TASKS[kind], split
    names = TASKS[kind].classes if kind in ('single-label', 'hierarchical') else None
    return x, pd.DataFrame({c: np.array(names[k])[y[:, k]] if names else y[:, k] for k, c in enumerate(task.columns)})


def slope(kind, outputs, y):
    "Of the loss of each sample, written out."
    if kind == 'regression': return 2 * (outputs - y) / y.shape[1]
    if kind == 'multi-label': return (1 / (1 + np.exp(-outputs)) - y) / y.shape[1]
    levels = np.split(outputs, [3], 1)[:y.shape[1]]
    return np.concatenate([np.exp(o) / np.exp(o).sum(1, keepdims=True) - np.eye(o.shape[1])[y[:, k]] for k, o in enumerate(levels)], 1)


def goodness(kind, outputs, y):
    if kind == 'regression': return -np.mean((outputs - y) ** 2)
    if kind == 'multi-label': return average_precision_score(y, outputs)
    return np.mean([np.argmax(o, 1) == y[:, k] for k, o in enumerate(np.split(outputs, [3], 1)[:y.shape[1]])])


def adamw_by_hand(kind, train, val, epochs, lr=1e-2, batch_size=16, seed=0):
    "A linear head in float64: gradient, decay, both moments, the cosine, all written out; of each epoch `goodness` on `val` and weights."
    (x, y), (x_val, y_val) = train, val
    w, step, found = np.zeros(({'hierarchical': 5, 'regression': 2}.get(kind, 3), x.shape[1] + 1)), 0, []  # the last column is the bias
    if kind == 'regression': w[:, -1] = y.astype(float).mean(0)
    m, v, x1 = np.zeros_like(w), np.zeros_like(w), np.c_[x, np.ones(len(x))].astype(float)
    steps, order = epochs * math.ceil(len(x) / batch_size), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch_size):
            gradient = slope(kind, x1[rows] @ w.T, y[rows]).T @ x1[rows] / len(rows)
            rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
            step += 1
            m, v = .9 * m + .1 * gradient, .999 * v + .001 * gradient ** 2
            w = w * (1 - rate * .01) - rate * (m / (1 - .9 ** step)) / (np.sqrt(v / (1 - .999 ** step)) + 1e-8)
        found.append((goodness(kind, np.c_[x_val, np.ones(len(x_val))] @ w.T, y_val), w))
    return found


def weights_of(probe): return torch.cat([probe.weight.T, probe.bias.T], 1).double()


@pytest.mark.parametrize('kind', TASKS)
@pytest.mark.parametrize('epochs, apart, n_val', [(1, 3., 40), (7, .5, 40), (7, 1., 7)])  # of 7 pictures, several epochs are equally good
def test_a_head_is_adamw_by_hand(kind, epochs, apart, n_val):
    train, val = samples(kind, 50, 0, apart), samples(kind, n_val, 1, apart)
    best, weights = max(adamw_by_hand(kind, train, val, epochs), key=lambda epoch: epoch[0])  # the first of equals
    [probe], found = train_heads(TASKS[kind], train, val, epochs=epochs, batch_size=16)
    assert np.isclose(found[0], best) and probe.backbone is None
    torch.testing.assert_close(weights_of(probe), torch.tensor(weights), atol=1e-4, rtol=1e-3)


def test_of_errors_the_smallest_is_the_best():
    train, (x, y) = samples('regression', 50, 0), samples('regression', 40, 1)
    epochs = adamw_by_hand('regression', train, (x, 10 - y), 5)  # what is learnt makes it worse
    errors = [-found for found, _ in epochs]
    assert errors == sorted(errors) and errors[0] < errors[-1] - .1
    [probe], found = train_heads(TASKS['regression'], train, (x, 10 - y), epochs=5, batch_size=16)
    assert np.isclose(found[0], -errors[0])
    torch.testing.assert_close(weights_of(probe), torch.tensor(epochs[0][1]), atol=1e-4, rtol=1e-3)


def test_levels_learn_together_what_each_learns_alone():
    train, val, loss = samples('hierarchical', 60, 0, 1.), samples('hierarchical', 40, 1, 1.), 0
    [together], found = train_heads(TASKS['hierarchical'], train, val, epochs=1, batch_size=16)
    outputs, y = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), torch.tensor(train[1])
    for k, part in enumerate((slice(0, 3), slice(3, 5))):
        task = Task('single-label', TASKS['hierarchical'].columns[k:k + 1], TASKS['hierarchical'].classes[k:k + 1])
        loss += head_loss(task, outputs[:, part], y[:, [k]])
        [alone], accuracy = train_heads(task, (train[0], train[1][:, [k]]), (val[0], val[1][:, [k]]), epochs=1, batch_size=16)
        torch.testing.assert_close((together.weight[:, part], together.bias[:, part]), (alone.weight, alone.bias))
        found[0] -= accuracy[0] / 2
    assert abs(found[0]) < 1e-6
    torch.testing.assert_close(head_loss(TASKS['hierarchical'], outputs, y), loss)


@pytest.mark.parametrize('kind', TASKS)
def test_the_loss_of_several_seeds_is_the_mean_of_each_ones(kind):
    task, y = TASKS[kind], torch.tensor(np.stack([samples(kind, 9, seed)[1] for seed in range(3)]))
    outputs = torch.randn(3, 9, sum(task.sizes), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head_loss(task, outputs, y), sum(head_loss(task, o, t) for o, t in zip(outputs, y)) / 3)


@pytest.mark.parametrize('kind', TASKS)
def test_seeds_together_are_seeds_alone(kind):
    train, val, seeds = samples(kind, 60, 0, .5), samples(kind, 40, 1, .5), (3, 1, 4)
    together, found = train_heads(TASKS[kind], train, val, epochs=4, batch_size=16, seeds=seeds)
    for seed, probe, best in zip(seeds, together, found):
        [alone], [expected] = train_heads(TASKS[kind], train, val, epochs=4, batch_size=16, seeds=(seed,))
        assert np.isclose(best, expected)
        torch.testing.assert_close((probe.weight, probe.bias), (alone.weight, alone.bias))
    assert not torch.equal(together[0].weight, together[1].weight)


@pytest.mark.parametrize('kind', TASKS)
def test_what_is_no_number_stops(kind):
    (x, y), val = samples(kind, 40, 0), samples(kind, 20, 1)
    x[3, 2] = np.nan
    with pytest.raises(FloatingPointError, match='no epoch gave a number on the validation pictures .*lr 0.01, 40 training'):
        train_heads(TASKS[kind], (x, y), val, epochs=2)


def test_an_epoch_is_chosen_by_the_mean_over_columns():
    levels, labels = np.array([[0, 1], [2, 0], [1, 1], [1, 0]]), np.array([[0, 1, 0], [1, 1, 0], [0, 1, 1], [0, 1, 0]])
    assert quality(TASKS['hierarchical'], levels, np.array([[0, 1], [2, 1], [1, 0], [1, 1]])) == pytest.approx((1 + .25) / 2)
    scores = np.array([[.9, .5, .1], [.8, .5, .2], [.1, .5, .9], [.2, .5, .3]])  # all have the second class: it says nothing
    assert quality(TASKS['multi-label'], labels, scores) == pytest.approx((.5 + 1) / 2)
    assert quality(TASKS['regression'], np.array([[1, 2], [3, 4.]]), np.array([[1, 2], [4, 7.]])) == pytest.approx(-(.5 + 4.5) / 2)


def test_what_a_head_says():
    outputs = torch.tensor([[.1, .3, .2, 5, -5], [2, 0, 1, -1, 1]])
    assert decode(TASKS['hierarchical'], outputs).tolist() == [[1, 0], [0, 1]]
    assert decode(TASKS['single-label'], outputs[:, :3]).tolist() == [[1], [0]]
    np.testing.assert_allclose(decode(TASKS['multi-label'], outputs[:, :3]), 1 / (1 + np.exp(-outputs[:, :3].numpy())), rtol=1e-6)
    assert (decode(TASKS['regression'], outputs[:, 3:]) == outputs[:, 3:].numpy()).all()


# both protocols

@pytest.mark.parametrize('kind', TASKS)
def test_the_probe_learns_what_is_there_and_nothing_else(kind):
    train, val, test = (as_table(kind, samples(kind, n, seed)) for seed, n in enumerate((300, 100, 400)))
    task, (first, last) = TASKS[kind], METRICS[kind][1]
    found = linear_probe(train, val, test, task, epochs=15, lr=.05, seeds=(0, 5))
    assert list(found) == 'level metric value n ci_low ci_high seed'.split() and set(found['seed']) == {0, 5}
    alone = linear_probe(train, val, test, task, epochs=15, lr=.05, seeds=(5,)).reset_index(drop=True)
    pd.testing.assert_frame_equal(found[found['seed'] == 5].reset_index(drop=True), alone)
    levels = [*task.columns, *['mean'] * (kind in ('multi-label', 'regression'))]
    named = [(level, name) for level in levels for name in (first, last)]
    assert list(zip(alone['level'], alone['metric'])) == [*named, ('', f'val_{first}')]
    assert (alone['n'] == [400] * (len(alone) - 1) + [100]).all() and alone.iloc[-1][['ci_low', 'ci_high']].isna().all()
    value = alone.set_index(['level', 'metric'])['value']
    chosen = train_heads(task, *((x, task.targets(table)) for x, table in (train, val)), epochs=15, lr=.05, seeds=(5,))[1]
    assert value['', f'val_{first}'] == abs(chosen[0])
    assert value[levels[0], last] > (.6 if kind == 'regression' else .85)
    shuffled = train[1].sample(frac=1, random_state=0)
    chance = linear_probe((train[0], shuffled), val, test, task, epochs=15, lr=.05).set_index(['level', 'metric'])['value'][levels[0], last]
    assert chance < (.3 if kind == 'regression' else .8)  # of three blobs one can be named wrongly throughout, but never all rightly


def test_the_coin_is_not_learnt():
    train, val, test = (as_table('hierarchical', samples('hierarchical', n, seed)) for seed, n in enumerate((300, 100, 400)))
    value = linear_probe(train, val, test, TASKS['hierarchical'], epochs=8).set_index(['level', 'metric'])['value']
    assert value['which', 'accuracy'] > .85 and abs(value['coin', 'accuracy'] - .5) < .1


def named(split): return split[0], np.array(['ant', 'bee', 'cow'])[split[1][:, 0]]


def test_names_do_as_labels():
    splits = [samples('single-label', 60, seed, .5) for seed in range(3)]
    task = single(['ant', 'bee', 'cow'])
    tables = [(x, pd.DataFrame({'label': y})) for x, y in map(named, splits)]
    pd.testing.assert_frame_equal(linear_probe(*map(named, splits), epochs=2), linear_probe(*tables, task, epochs=2))


@pytest.mark.parametrize('task', [single(['ant', 'bee', 'cow']), None])
def test_a_class_that_was_not_learnt_is_wrong(task):
    train, val, test = (named(samples('single-label', 60, seed, .5)) for seed in range(3))
    train = train[0][train[1] != 'cow'], train[1][train[1] != 'cow']
    if task: train, val, test = ((x, pd.DataFrame({'label': y})) for x, y in (train, val, test))
    found = linear_probe(train, val, test, task, epochs=8, batch_size=8).set_index('metric')
    ants_and_bees = (np.asarray(test[1]) != 'cow').mean()
    assert .3 < found.loc['accuracy', 'value'] <= ants_and_bees


def test_the_seed_is_the_order():
    train, val, test = (as_table('single-label', samples('single-label', n, seed, .3)) for seed, n in enumerate((60, 60, 600)))
    first, same, other = (train_and_test(TASKS['single-label'], train, val, test, epochs=2, batch_size=8, seeds=(k,)) for k in (3, 3, 4))
    assert first[1].shape == (1, 600, 1) and (first[1] == same[1]).all() and (first[1] != other[1]).any()
    pd.testing.assert_frame_equal(first[0], same[0])


class Sealed:
    "A split that may be opened once, and not before its seal is broken."
    def __init__(self, split, log, name): self.split, self.log, self.name = split, log, name

    def __iter__(self):
        self.log.append(f'{self.name} opened')
        inputs, table = self.split
        return iter((Rows(inputs, self.log), table))


class Rows:
    "Inputs that note which of them are read."
    def __init__(self, inputs, log): self.inputs, self.log = inputs, log

    def __len__(self): return len(self.inputs)

    def __getitem__(self, rows):
        self.log.extend(np.arange(len(self.inputs))[rows].tolist())
        return self.inputs[rows]


@pytest.mark.parametrize('kind', TASKS)
def test_the_test_split_is_read_once_and_last(kind, monkeypatch):
    log, trained = [], train_heads
    def train_and_note(*args, **settings):
        found = trained(*args, **settings)
        log.append('trained and chosen')
        return found
    monkeypatch.setattr(evaluate, 'train_heads', train_and_note)
    splits = [as_table(kind, samples(kind, 40, seed)) for seed in range(3)]
    linear_probe(*splits[:2], Sealed(splits[2], log, 'test'), TASKS[kind], epochs=2)
    fine_tune(nn.Linear(6, 4), *splits[:2], Sealed(splits[2], log, 'test'), TASKS[kind], epochs=1)
    assert log == ['trained and chosen', 'test opened', *range(40)] * 2
    log.clear()
    linear_probe(*splits[:2], Sealed(splits[2], log, 'test'), TASKS[kind], epochs=2, seeds=(0, 1))
    assert log == ['trained and chosen', 'test opened', *range(40), *range(40)]  # once for each seed's result


# fine-tuning

def as_maps(split): return split[0].reshape(-1, 6, 1, 1).astype(np.float16), split[1]


def small_backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 5), nn.Dropout(.5), nn.ReLU())


def test_fine_tuning_leaves_the_given_model_alone_and_its_statistics_frozen():
    backbone, splits = small_backbone(), [as_maps(samples('single-label', 80, seed, 1.)) for seed in range(2)]
    before = copy.deepcopy(backbone.state_dict())
    [probe], found = train_heads(TASKS['single-label'], *splits, backbone=backbone, backbone_lr=1e-2, epochs=3)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), backbone.state_dict().values())) and backbone.training
    [again], once_more = train_heads(TASKS['single-label'], *splits, backbone=backbone, backbone_lr=1e-2, epochs=3)
    assert found == once_more and torch.equal(probe.weight, again.weight)
    for name, value in probe.backbone.state_dict().items():
        assert torch.equal(value, again.backbone.state_dict()[name])
        assert torch.equal(value, before[name]) == ('running' in name or 'num_batches' in name), name


def test_backbone_and_head_have_rates_of_their_own():
    backbone, splits = small_backbone(), [as_maps(samples('single-label', 80, seed, 1.)) for seed in range(2)]
    for rate in (1e-3, 1e-5):
        [probe], _ = train_heads(TASKS['single-label'], *splits, backbone=backbone, backbone_lr=rate, epochs=1, batch_size=20)
        step = (probe.backbone[2].weight - backbone[2].weight).abs().max().item() / rate
        assert .3 < step < 3  # of four steps the first finds a head of zeros, and Adam's are about as long as the rate
        assert .01 < probe.weight.abs().max() < .04


def test_the_best_epochs_backbone_is_kept_too():
    backbone, splits = small_backbone(), [as_maps(samples('regression', 80, seed, 1.)) for seed in range(2)]
    val = splits[1][0], 10 - splits[1][1]  # the first epoch is the best
    [probe], [best] = train_heads(TASKS['regression'], splits[0], val, backbone=backbone, backbone_lr=1e-2, epochs=6)
    assert quality(TASKS['regression'], val[1], evaluate.predict(TASKS['regression'], probe, val[0])) == pytest.approx(best)


def test_features_once_are_pictures_through_the_frozen_backbone_each_time():
    torch.manual_seed(0)
    backbone = timm.create_model('test_efficientnet', num_classes=0).eval()
    rng = np.random.default_rng(0)
    def pictures(kind, n, seed):
        _, y = samples(kind, n, seed)
        ground = np.resize(40 * y[:, :1], (n, 3))[:, None, None]  # the first column is the brightness
        return (ground % 256 * rng.random((n, 32, 32, 3))).astype(np.uint8), y
    for kind, task in TASKS.items():
        train, val = pictures(kind, 40, 0), pictures(kind, 20, 1)
        fast, slow = (train_heads(task, *splits, epochs=3, batch_size=16, **more) for splits, more in (
            ([(extract(x, backbone).numpy(), y) for x, y in (train, val)], {}), ((train, val), dict(backbone=backbone, backbone_lr=0))))
        assert fast[1] == pytest.approx(slow[1], abs=1e-4) and slow[0][0].weight.abs().max() > .01
        for part in ('weight', 'bias'): torch.testing.assert_close(getattr(fast[0][0], part), getattr(slow[0][0], part), atol=1e-4, rtol=0)
        torch.testing.assert_close(slow[0][0].backbone.state_dict(), backbone.state_dict(), rtol=0, atol=0)


def test_fine_tuning_at_rate_0_is_linear_evaluation():
    backbone, kind = small_backbone().eval(), 'hierarchical'
    splits = [as_maps(as_table(kind, samples(kind, 80, seed, 1.))) for seed in range(3)]
    features = [(extract(x, backbone).numpy(), y) for x, y in splits]
    tuned = fine_tune(backbone, *splits, TASKS[kind], epochs=4, backbone_lr=0)
    pd.testing.assert_frame_equal(tuned, linear_probe(*features, TASKS[kind], epochs=4))
    assert not tuned.equals(fine_tune(backbone, *splits, TASKS[kind], epochs=4, backbone_lr=1e-2))


def test_pictures_go_through_the_whole_backbone():
    backbone = load_backbone('tf_efficientnet_lite0')
    pictures = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad(): torch.testing.assert_close(extract(pictures, backbone, batch_size=2), backbone(to_input(pictures, backbone)))


# zero-shot

def words_to_vectors(seed=0, size=4):
    rng, seen = np.random.default_rng(seed), {}
    def embed(texts):
        for text in texts: seen.setdefault(text, rng.normal(size=size) * rng.uniform(.1, 9))  # of any length: the cosine does not see it
        return torch.tensor(np.stack([seen[text] for text in texts])).float()
    return embed, seen


@pytest.mark.parametrize('prompts', [PROMPTS, ('{}',), ('{}', 'so {}', 'I feel {}')])
def test_zero_shot_by_hand(prompts):
    task = BENCHMARKS['new']['levels']
    rng, (embed, seen) = np.random.default_rng(1), words_to_vectors()
    images = rng.normal(size=(200, 4)).astype(np.float32)
    table = pd.DataFrame({c: rng.choice(names, 200) for c, names in zip(task.columns, task.classes)})
    rows, said = zero_shot(torch.tensor(images), table, task, embed, prompts)
    names = [str(k + 1) for k in range(len(prompts))] + ['all'] * (len(prompts) > 1)
    assert list(said) == names and list(rows) == 'level metric value n ci_low ci_high prompt'.split()
    unit = {text: vector / np.linalg.norm(vector) for text, vector in seen.items()}
    for name in names:
        chosen = prompts if name == 'all' else prompts[int(name) - 1:int(name)]
        for k, classes in enumerate(task.classes):
            t = np.stack([sum(unit[p.format(ADJECTIVES.get(c, c))] for p in chosen) for c in classes])
            expected = np.array([max(range(len(classes)), key=lambda j: v @ t[j] / np.linalg.norm(t[j])) for v in images])
            assert (said[name][:, k] == expected).all()
            values = rows[(rows['prompt'] == name) & (rows['level'] == task.columns[k])].set_index('metric')['value']
            assert list(values) == pytest.approx(NAIVE['single-label'](table[task.columns[k]], np.array(classes)[expected]))
    assert len(rows) == 6 * len(names) and (len(names) == 1 or (said['1'] != said['all']).any())


def test_prompts_name_the_classes_by_adjectives():
    assert class_prompts(LABEL, PROMPTS[0]) == [f'A photo with {word} emotion.' for word in ('angry', 'awed', 'fearful')]
    embed, seen = words_to_vectors()
    zero_shot(torch.randn(2, 4), pd.DataFrame({'label': ['anger', 'serene']}), single(['anger', 'serene']), embed)
    assert list(seen) == ['A photo with angry emotion.', 'A photo with serene emotion.',
                          'The photo makes me feel so angry!', 'The photo makes me feel so serene!']
    for classes in (MIKELS, PANDA, WEBEMO):
        assert set(classes) <= set(ADJECTIVES) and len({ADJECTIVES[name] for name in classes}) == len(classes)


@pytest.mark.parametrize('kind', ['multi-label', 'regression'])
def test_zero_shot_needs_classes_to_choose_from(kind):
    with pytest.raises(ValueError, match=f'needs classes to choose from, not {kind}'):
        zero_shot(torch.zeros(1, 4), as_table(kind, samples(kind, 1, 0))[1], TASKS[kind], words_to_vectors()[0])


def test_colour_histogram_counts_pixels():
    images = np.random.default_rng(0).integers(256, size=(2, 5, 4, 3), dtype=np.uint8)
    found = colour_histogram(images)
    for image, shares in zip(images, found):
        for channel in range(3):
            for b in range(16): assert np.isclose(shares[16 * channel + b], sum(v // 16 == b for v in image[:, :, channel].ravel()) / 20)


# the stage

class Killed(Exception): pass


KEYS = ['method', 'partition', 'protocol', 'dataset', 'task', 'seed']
EVERY = [(name, task) for name, tasks in BENCHMARKS.items() for task in tasks]
SINGLE = [('new', 'label'), ('new', 'object'), ('seen', 'label'), ('seen', 'object')]
TUNED = [('new', 'label'), ('new', 'levels'), ('mixed', 'labels'), ('mixed', 'vad')]
CLASSED = [('new', 'label'), ('new', 'levels')]


def test_what_is_evaluated_how(evaluated):
    "The table in the notebook, row by row; and nothing else."
    initial, pacl, whole, true = ('initial', ''), ('pacl', 'evaluators'), ('unpartitioned', 'evaluators'), ('pacl', 'true')
    colour, shuffled = ('colour-histogram', ''), ('shuffled-labels', '')
    plan = {(encoder, 'linear'): EVERY for encoder in (initial, pacl, whole)}
    plan |= {(encoder, 'linear'): SINGLE for encoder in (true, colour, shuffled)}
    plan |= {(initial, 'fine-tune'): TUNED, (pacl, 'fine-tune'): TUNED, (whole, 'fine-tune'): [('new', 'label')]}
    plan |= {(encoder, f'zero-shot {prompt}'): CLASSED for encoder in (pacl, whole) for prompt in ('1', '2', 'all')}
    expected = {(*encoder, protocol, *where, seed) for (encoder, protocol), wheres in plan.items() for where in wheres
                for seed in ((0,) if encoder == true else (0, 1))}
    results = pd.read_csv(evaluated / 'results/results.csv', keep_default_na=False)
    assert list(results) == 'backbone method partition protocol dataset task level metric value seed n ci_low ci_high'.split()
    assert set(results['backbone']) == {'tf_efficientnet_lite0'}
    found = dict(list(results.groupby(KEYS)))
    assert set(found) == expected
    for (_, _, protocol, name, task, _), rows in found.items():
        about = BENCHMARKS[name][task]
        first, last = METRICS[about.kind][1]
        levels = [*about.columns, *['mean'] * (about.kind in ('multi-label', 'regression'))]
        chosen = [] if protocol.startswith('zero') else [('', f'val_{first}')]
        assert list(zip(rows['level'], rows['metric'])) == [(level, metric) for level in levels for metric in (first, last)] + chosen
        assert list(rows['n']) == [40] * 2 * len(levels) + [12] * len(chosen)
    assert not pd.read_csv(evaluated / 'results/results.csv')['value'][results['level'] != 'fear'].isna().any()


def test_all_encoders_of_the_plan():
    jobs = ('strong', 'evaluators', 0), ('strong', 'true', 0), ('release', 'evaluators', 2)
    runs = pd.DataFrame([(f'{m}-{p}-s{s}', m, p, s) for m, p, s in jobs], columns=['run', 'method', 'partition', 'seed'])
    counts, seeds = Counter(), {}
    for function, what in pieces(runs, BENCHMARKS).values():
        counts[what[1]['method'], what[1]['partition'], function.__name__.split('_')[1]] += 1
        if what[1]['method'] == 'initial' and function is evaluate.evaluate_frozen: seeds[what[0]] = what[3]
    assert counts == {('initial', '', 'frozen'): 3, ('initial', '', 'tuned'): 8, ('strong', 'evaluators', 'frozen'): 3,
                      ('strong', 'evaluators', 'tuned'): 1, ('strong', 'true', 'frozen'): 2, ('release', 'evaluators', 'frozen'): 2,
                      ('colour-histogram', '', 'frozen'): 2, ('shuffled-labels', '', 'frozen'): 4}
    assert seeds == dict.fromkeys(BENCHMARKS, [0, 2])


def test_predictions_give_back_the_results(evaluated):
    results = pd.read_csv(evaluated / 'results/results.csv', keep_default_na=False)
    said = pd.read_csv(evaluated / 'results/predictions.csv', dtype={'id': str}, keep_default_na=False)
    assert list(said) == 'method partition protocol dataset task level seed id label prediction'.split()
    groups = dict(list(said.groupby(KEYS)))
    assert groups.keys() == dict(list(results.groupby(KEYS))).keys()
    for key, rows in results[~results['metric'].str.startswith('val_')].groupby(KEYS):
        about, table = BENCHMARKS[key[3]][key[4]], pd.read_csv(evaluated / f'data/{key[3]}.csv', dtype=str).query('split == "test"')
        numbers, expected = about.kind in ('multi-label', 'regression'), {}
        for level, group in groups[key].groupby('level', sort=False):
            assert list(group['id']) == list(table['id'])
            label, prediction = ((group[c].astype(float) if numbers else group[c]) for c in ('label', 'prediction'))
            assert (label == (table[level].astype(float) if numbers else table[level]).values).all()
            expected[level] = NAIVE[about.kind](label.tolist(), prediction.tolist())
        assert list(expected) == list(about.columns)
        if numbers: expected['mean'] = tuple(map(mean, zip(*expected.values())))
        for level, values in expected.items():
            found = pd.to_numeric(rows[rows['level'] == level]['value'])
            np.testing.assert_allclose(found, values, atol=2e-3 if about.kind == 'regression' else 2e-6, err_msg=f'{key} {level}')
    first, second = (said.query('method == "initial" and protocol == "linear" and seed == @seed')['prediction'].tolist() for seed in (0, 1))
    assert first != second  # another order of the batches
    best = results.query('method == "colour-histogram" and task == "object" and metric == "accuracy" and level != ""')['value']
    assert (pd.to_numeric(best) == 1).all()  # brightness is the object
    scores = said.query('dataset == "mixed" and task == "labels" and seed == 0').groupby(['method', 'protocol'])['prediction'].apply(tuple)
    assert len(scores) == len(set(scores)) == 5  # other weights, other scores


def test_what_the_baselines_learn_from(evaluated, monkeypatch):
    seen = []
    def see(task, *splits, **settings):
        seen.append(splits)
        raise Killed
    monkeypatch.setattr(evaluate, 'train_and_test', see)
    for method, k in (('initial', 0), ('shuffled-labels', 0), ('shuffled-labels', 1), ('colour-histogram', 0)):
        encoder = dict(method=method, partition='', model=None)
        with pytest.raises(Killed): evaluate.evaluate_frozen(evaluated, 'new', encoder, ['label'], [k], 0, 1, {})
    (x, _), *rest = seen.pop()
    assert abs(x.mean(0)).max() < 1e-5 and np.allclose(x.std(0)[x.std(0) > 0], 1, atol=1e-4)  # scaled by the training pictures alone
    assert all(abs(other.mean(0)).max() > .01 for other, _ in rest)
    for splits in seen[1:]:  # shuffled: the training labels in another order
        for (x, table), (other_x, other) in zip(seen[0], splits):
            assert (x == other_x).all() and Counter(table['label']) == Counter(other['label'])
        assert all(a[1].equals(b[1]) for a, b in zip(seen[0][1:], splits[1:]))
    assert len({tuple(splits[0][1]['label']) for splits in seen}) == 3


def test_a_scores_prediction_is_not_rounded_into_ties():
    task, table = BENCHMARKS['mixed']['labels'], pd.DataFrame({name: [0, 1, 1] for name in EMOTIONS})
    scores = np.array([[1e-6], [2e-6], [.99999]], np.float32).repeat(3, 1)
    said = evaluate.prediction_rows(['a', 'b', 'c'], task, task.targets(table), scores)
    assert said['prediction'].nunique() == 3


def test_zero_shot_goes_through_the_projectors_that_were_trained(evaluated):
    from safetensors.torch import load_file

    from pacl.parts.encoders import encode_texts, text_encoder_of
    table = pd.read_csv(evaluated / 'data/new.csv', dtype=str)
    inputs = torch.from_numpy(np.load(evaluated / 'features/early_new.npy')[table['split'] == 'test']).float()
    texts = [PROMPTS[1].format(word) for word in ('angry', 'awed', 'fearful')]
    encoder = text_encoder_of(evaluated)
    assert len({feature.tobytes() for feature in encode_texts(encoder, texts)}) == 3  # the vocabulary tells them apart
    said = pd.read_csv(evaluated / 'results/predictions.csv', dtype=str)
    said = said.query('protocol == "zero-shot 2" and dataset == "new" and task == "label"')
    for method in ('unpartitioned', 'pacl'):
        folder = f'{method}-evaluators-s1'
        towers = load_file(evaluated / 'models' / folder / 'projectors.safetensors')
        with torch.no_grad(): v = evaluate.learning_stages(evaluated, folder)(inputs) @ towers['image_projector'].T
        t = torch.from_numpy(encode_texts(encoder, texts)) @ towers['text_projector'].T
        expected = np.array(EMOTIONS)[torch.cosine_similarity(v[:, None], t[None], dim=-1).argmax(1)]
        assert (said.query('method == @method and seed == "1"')['prediction'] == expected).all()


def files(run): return {name: (run / 'results' / name).read_bytes() for name in ('results.csv', 'predictions.csv')}


def part_of(evaluated, folder, model, sets=BENCHMARKS):
    "A copy with one model, and some of the benchmarks."
    run = without_results(evaluated, folder)
    lines = (run / 'models/runs.csv').read_text().splitlines()
    (run / 'models/runs.csv').write_text('\n'.join([lines[0], *(line for line in lines if line.startswith(model))]))
    told = {name: {task: asdict(BENCHMARKS[name][task]) for task in tasks} for name, tasks in sets.items()}
    (run / 'data/tasks.json').write_text(json.dumps(told))
    return run


@pytest.fixture(scope='module')
def one_model(evaluated):
    run = part_of(evaluated, evaluated.parent / 'part', 'unpartitioned-evaluators-s1')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, 'ThreadPool', lambda n: ThreadPool(1))
        run_evaluate(run, **EPOCHS)
    return run


def without_results(run, folder): return shutil.copytree(run, folder, ignore=shutil.ignore_patterns('results'))


def test_the_number_of_threads_changes_no_byte(one_model, tmp_path, monkeypatch):
    run, counts, evaluate_frozen = without_results(one_model, tmp_path / 'run'), set(), evaluate.evaluate_frozen
    def count(*what):
        counts.add(torch.get_num_threads())
        return evaluate_frozen(*what)
    monkeypatch.setattr(evaluate, 'evaluate_frozen', count)
    monkeypatch.setattr(evaluate, 'ThreadPool', lambda n: ThreadPool(2))
    torch.set_num_threads(3)
    try:
        run_evaluate(run, **EPOCHS)
        assert torch.get_num_threads() == 3
    finally: torch.set_num_threads(1)
    assert files(run) == files(one_model) and counts == {1}


def test_a_killed_run_goes_on(one_model, tmp_path, monkeypatch):
    run, done = without_results(one_model, tmp_path / 'run'), []
    real = {name: getattr(evaluate, name) for name in ('evaluate_frozen', 'evaluate_tuned')}
    monkeypatch.setattr(evaluate, 'ThreadPool', lambda n: ThreadPool(1))

    def counting(name, stop_at):
        def count(run, *what):
            if len(done) == stop_at: raise Killed
            done.append((name, str(what[:4])))
            return real[name](run, *what)
        return count
    for name in real: monkeypatch.setattr(evaluate, name, counting(name, 8))
    with pytest.raises(Killed): run_evaluate(run, **EPOCHS)
    parts = sorted((run / '.results-parts').rglob('[!.]*.csv'))
    assert len(done) == len(parts) == 8 and not (run / 'results').exists()
    parts[3].unlink()  # killed between a piece's two files
    for name in real: monkeypatch.setattr(evaluate, name, counting(name, None))
    run_evaluate(run, **EPOCHS)
    work = pieces(pd.read_csv(run / 'models/runs.csv'), BENCHMARKS)
    assert len(work) == 15 and len(done) == 16 and len(set(done)) == 15
    assert files(run) == files(one_model) and not (run / '.results-parts').exists()


def test_other_settings_do_not_take_up_what_is_left(one_model, tmp_path, monkeypatch):
    run, asked = without_results(one_model, tmp_path / 'run'), []
    def refuse(run, *what):
        asked.append(what)
        raise Killed
    monkeypatch.setattr(evaluate, 'ThreadPool', lambda n: ThreadPool(1))
    for name in ('evaluate_frozen', 'evaluate_tuned'): monkeypatch.setattr(evaluate, name, refuse)
    folders = []
    for settings in (EPOCHS, EPOCHS, EPOCHS | {'seed': 1}, EPOCHS | {'backbone_lr': 1e-3}):
        with pytest.raises(Killed): run_evaluate(run, **settings)
        folders.append({path.name for path in (run / '.results-parts').iterdir()})
    assert [len(names) for names in folders] == [1, 1, 2, 3] and len(asked) >= 4
    assert 'probe_epochs was 2, is 3' in run_evaluate.stale(one_model, **EPOCHS | {'probe_epochs': 3})
    assert run_evaluate.stale(one_model, **EPOCHS) is None


def test_labels_of_the_test_split_change_no_choice(evaluated, tmp_path):
    name, encoder = 'new', dict(method='initial', partition='', model=None)
    run = shutil.copytree(evaluated, tmp_path / 'run', ignore=shutil.ignore_patterns('results', 'models'))
    table = pd.read_csv(run / 'data/new.csv', dtype=str)
    table.loc[table['split'] == 'test', 'label'] = table['label'].map(dict(zip(EMOTIONS, np.roll(EMOTIONS, 1))))
    table.to_csv(run / 'data/new.csv', index=False)
    for found in zip(*(evaluate.evaluate_frozen(r, name, encoder, ['label'], [0], 0, 2, {}) for r in (evaluated, run))):
        (before,), (after,) = found
        if 'prediction' in before: assert before['prediction'].equals(after['prediction']) and not before['label'].equals(after['label'])
        else: assert before.iloc[-1].equals(after.iloc[-1]) and not before['value'].equals(after['value'])


@pytest.mark.parametrize('task', ['labels', 'vad'])
def test_a_run_without_classes_to_choose_from(evaluated, tmp_path, task):
    run = part_of(evaluated, tmp_path / 'run', 'pacl-evaluators-s0', {'mixed': [task]})
    run_evaluate(run, probe_epochs=1, fine_tune_epochs=1)
    results = pd.read_csv(run / 'results/results.csv', keep_default_na=False)
    assert set(results['protocol']) == {'linear', 'fine-tune'} and set(results['method']) == {'initial', 'pacl'}


def test_a_run_of_the_true_partition_alone(evaluated, tmp_path):
    run = part_of(evaluated, tmp_path / 'run', 'pacl-true-s0', {'new': ['label']})  # csv readers take "true" for a truth value
    run_evaluate(run, probe_epochs=1, fine_tune_epochs=1)
    found = pd.read_csv(run / 'results/results.csv', keep_default_na=False, dtype=str).query('method == "pacl"')
    assert set(found['partition']) == {'true'} and set(found['protocol']) == {'linear'}


def test_a_benchmark_without_a_split_is_named(tmp_path):
    run = make_benchmarks(tmp_path / 'run', splits=(24, 0, 18))
    with pytest.raises(InputError, match='new.csv lacks train, val or test'): run_evaluate(run)
    assert not (run / 'results').exists()
