"pacl.evaluate: metrics against scikit-learn, heads against AdamW by hand, features against the backbone, a stage that goes on."
import copy
import functools
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file
from sklearn import metrics
from sklearn.linear_model import Ridge
from torch import nn

import pacl.evaluate as evaluate
from pacl.evaluate import (ADJECTIVES, COLUMNS, METRICS, PROMPTS, by_level, colour_histogram, extract, level_tasks,
                           predict, quality, questions, resamples, ridge_probe, run_evaluate, score, train_head, zero_shot)
from pacl.parts.encoders import load_backbone, save_backbone, text_encoder_of
from pacl.parts.readers import MIKELS, PANDA, WEBEMO, Task, folds_of, rating, single
from pacl.parts.stages import InputError, write_stage

pytestmark = pytest.mark.usefixtures('one_thread')
EMOTIONS, OBJECTS = ('anger', 'awe', 'fear'), ('ball', 'cat')
SIDES = dict(anger='negative', awe='positive', fear='negative')
KINDS = (*EMOTIONS, 'rage', 'shame', 'zest')
LABEL, OBJECT = single(EMOTIONS), Task('single-label', ('object',), (OBJECTS,))
LEVELS = Task('hierarchical', ('level_1', 'level_2', 'level_3'), (('negative', 'positive'), EMOTIONS, KINDS))
BENCHMARKS = {'new': {'label': LABEL, 'object': OBJECT, 'levels': LEVELS}, 'seen': {'label': LABEL, 'object': OBJECT},
              'mixed': {'labels': Task('multi-label', EMOTIONS, (EMOTIONS,)), 'vad': rating(['valence'])}}
ALL = 'linear-all fine-tune zero-shot'
RUNS = [  # run, folder, seed, method, protocols
    ('initial', '', 0, 'initial', ALL), ('initial', '', 1, 'initial', ALL),
    ('PACL', 'pacl-s0', 0, 'pacl', ALL), ('PACL', 'pacl-s1', 1, 'pacl', ALL), ('strong only', 'strong-s0', 0, 'strong', 'linear'),
    ('colour histogram', '', 0, 'colour-histogram', 'linear'),
    ('shuffled labels', '', 0, 'shuffled-labels', 'linear'), ('shuffled labels', '', 1, 'shuffled-labels', 'linear')]


def write_runs(run, rows):
    table = pd.DataFrame(rows, columns=['run', 'folder', 'seed', 'method', 'protocols'])
    about = dict(partition='evaluators', budget='1.0', text_encoder='', tables='main', steps=6, images_seen=160)
    table.assign(**about).to_csv(run / 'models/runs.csv', index=False)


def make_benchmarks(run, splits=(80, 12, 40)):
    "data/, features/ and models/ in small: grey pictures whose brightness is the object, noise for the frozen stages' outputs."
    rng, n = np.random.default_rng(0), sum(splits)
    with write_stage(run / 'data', {'parameters': {}}) as data:
        for name in BENCHMARKS:
            table = pd.DataFrame({'id': [f'{i:04}' for i in range(n)], 'image': 'x.png'})
            table['split'] = np.repeat(['train', 'val', 'test'], splits)
            table['label'], table['object'] = rng.choice(EMOTIONS, n), rng.choice(OBJECTS, n)
            table['level_1'], table['level_2'], table['level_3'] = table['label'].map(SIDES), table['label'], rng.choice(KINDS, n)
            for emotion in EMOTIONS: table[emotion] = rng.integers(2, size=n)
            table.loc[table['split'] == 'test', 'fear'] = 0  # a class that the test split lacks
            table['valence'] = rng.uniform(1, 9, n).round(2)
            table.to_csv(data / f'{name}.csv', index=False)
            grey = np.where(table['object'] == 'cat', 200, 50)[:, None, None, None]
            np.save(data / f'{name}.npy', np.broadcast_to(grey, (n, 8, 8, 3)).astype(np.uint8))
        told = {name: {task: asdict(about) for task, about in tasks.items()} for name, tasks in BENCHMARKS.items()}
        (data / 'tasks.json').write_text(json.dumps(told))
    given = {'backbone': 'tf_efficientnet_lite0', 'trainable_stages': 1, 'text_encoder': 'minilm'}
    with write_stage(run / 'features', {'parameters': given}) as features:
        for name in BENCHMARKS: np.save(features / f'early_{name}.npy', rng.normal(size=(n, 192, 3, 3)).astype(np.float16))
    with write_stage(run / 'models', {'parameters': {'batch_size': 16}}) as models:
        backbone = load_backbone('tf_efficientnet_lite0')
        for folder in filter(None, (row[1] for row in RUNS)):
            with torch.no_grad(): backbone.conv_head.weight.mul_(1.01)
            save_backbone(backbone, models / folder, 8)
            towers = {f'{tower}_projector': torch.randn(5, d) for tower, d in (('image', 1280), ('text', 384))}
            save_file(towers, models / folder / 'projectors.safetensors')
    write_runs(run, RUNS)
    return run


EPOCHS = dict(probe_epochs=2, fine_tune_epochs=1, datasets=['new/label', 'new/levels', 'seen/label'])


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
    run = make_benchmarks(tmp_path_factory.mktemp('runs') / 'mini')
    run_evaluate(run, **EPOCHS)
    return run


def read(run): return pd.read_csv(run / 'results/predictions.csv', dtype=str, keep_default_na=False)


# metrics

VALUES = {'accuracy': metrics.accuracy_score, 'weighted_f1': functools.partial(metrics.f1_score, average='weighted', zero_division=0),
          'average_precision': metrics.average_precision_score, 'roc_auc': metrics.roc_auc_score,
          'mse': metrics.mean_squared_error, 'r2': metrics.r2_score}
NAMES = {'single-label': ('accuracy', 'weighted_f1'), 'hierarchical': ('accuracy', 'weighted_f1'),
         'multi-label': ('average_precision', 'roc_auc'), 'regression': ('mse', 'r2')}
RATINGS = st.sampled_from([1, 1.5, 3, 3.25, 9])  # few: many ties
ENTRIES = {'hierarchical': (st.integers(0, 3),) * 2, 'multi-label': (st.integers(0, 1), st.sampled_from([0, .25, .5, 1])),
           'regression': (RATINGS,) * 2}


@pytest.mark.parametrize('kind', ENTRIES)
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_draw_is_scikit_learn_s_with_sample_weights(kind, data):
    n = data.draw(st.integers(2, 12))
    labels, predictions = (data.draw(hnp.arrays(np.float32, n, elements=entries)) for entries in ENTRIES[kind])
    counts = data.draw(hnp.arrays(np.float32, (3, n), elements=st.integers(0, 3)))
    counts[counts.sum(1) == 0] = 1
    for name, draws in METRICS[kind](labels, predictions, counts).items():
        for weights, found in zip(counts, draws):
            there = np.unique(labels[weights > 0])
            if kind != 'hierarchical' and len(there) < 2:
                assert kind == 'regression' or np.isnan(found)
                continue
            assert found == pytest.approx(VALUES[name](labels, predictions, sample_weight=weights), abs=1e-5, rel=1e-5), name


@pytest.mark.parametrize('kind', METRICS)
def test_scores_are_scikit_learn_s(kind):
    rng, columns = np.random.default_rng(0), ['a', 'b', 'c']
    targets, outputs = rng.integers(2, size=(60, 3)), rng.integers(2, size=(2, 60, 3))
    if kind in ('multi-label', 'regression'): outputs = rng.random((2, 60, 3)).round(1)
    if kind == 'multi-label': targets[:, 2] = 0  # a class that nobody has is left out of the mean
    table = score(kind, targets, outputs, columns).set_index(['level', 'metric'])
    for name in NAMES[kind]:
        expected = np.array([[VALUES[name](targets[:, c], p[:, c]) for c in range(3 - (kind == 'multi-label'))] for p in outputs])
        levels = columns[:expected.shape[1]]
        if kind in ('multi-label', 'regression'): expected, levels = np.c_[expected, expected.mean(1)], [*levels, 'mean']
        found = table.xs(name, level='metric').loc[levels]
        np.testing.assert_allclose(found['value'], expected.mean(0))
        assert (found['ci_low'] <= found['value']).all() and (found['value'] <= found['ci_high']).all() and (found['n'] == 60).all()
    assert table.loc['c'].isna().any(axis=None) == (kind == 'multi-label')
    pd.testing.assert_frame_equal(score(kind, targets, outputs[0], columns), score(kind, targets, outputs[:1], columns))


# heads

TASKS = {'single-label': single('abc'), 'hierarchical': Task('hierarchical', ('which', 'coin'), (tuple('abc'), ('heads', 'tails'))),
         'multi-label': Task('multi-label', tuple('abc'), (tuple('abc'),)), 'regression': rating(['valence', 'arousal'])}


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


def slope(kind, outputs, y):
    "Of the loss of each sample, written out."
    if kind == 'regression': return 2 * (outputs - y) / y.shape[1]
    if kind == 'multi-label': return (1 / (1 + np.exp(-outputs)) - y) / y.shape[1]
    levels = np.split(outputs, [3], 1)[:y.shape[1]]
    return np.concatenate([np.exp(o) / np.exp(o).sum(1, keepdims=True) - np.eye(o.shape[1])[y[:, k]] for k, o in enumerate(levels)], 1)


def goodness(kind, outputs, y):
    if kind == 'regression': return -np.mean((outputs - y) ** 2)
    if kind == 'multi-label': return metrics.average_precision_score(y, outputs)
    return np.mean([np.argmax(o, 1) == y[:, k] for k, o in enumerate(np.split(outputs, [3], 1)[:y.shape[1]])])


def adamw_by_hand(kind, train, val, epochs, lr=1e-2, batch_size=16):
    "A linear head in float64: gradient, decay, both moments, the cosine, all written out; of each epoch `goodness` on `val` and weights."
    (x, y), (x_val, y_val) = train, val
    w, step, found = np.zeros(({'hierarchical': 5, 'regression': 2}.get(kind, 3), x.shape[1] + 1)), 0, []  # the last column is the bias
    if kind == 'regression': w[:, -1] = y.astype(float).mean(0)
    m, v, x1 = np.zeros_like(w), np.zeros_like(w), np.c_[x, np.ones(len(x))].astype(float)
    steps, order = epochs * math.ceil(len(x) / batch_size), torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch_size):
            gradient = slope(kind, x1[rows] @ w.T, y[rows]).T @ x1[rows] / len(rows)
            rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
            step += 1
            m, v = .9 * m + .1 * gradient, .999 * v + .001 * gradient ** 2
            w = w * (1 - rate * .01) - rate * (m / (1 - .9 ** step)) / (np.sqrt(v / (1 - .999 ** step)) + 1e-8)
        found.append((goodness(kind, np.c_[x_val, np.ones(len(x_val))] @ w.T, y_val), w))
    return found


@pytest.mark.parametrize('kind', TASKS)
@pytest.mark.parametrize('epochs, apart, n_val, sign', [(1, 3., 40, 1), (7, .5, 40, 1), (7, 1., 7, 1), (5, 3., 40, -1)])
def test_a_head_is_adamw_by_hand(kind, epochs, apart, n_val, sign):  # of 7 pictures, several epochs are equally good: the first of equals
    train, (x, y) = samples(kind, 50, 0, apart), samples(kind, n_val, 1, apart)
    if sign < 0: y = 10 - y if kind == 'regression' else 1 - y if kind == 'multi-label' else (y + 1) % 2  # what is learnt makes it worse
    _, weights = max(adamw_by_hand(kind, train, (x, y), epochs), key=lambda epoch: epoch[0])
    probe = train_head(TASKS[kind], train, (x, y), epochs=epochs, batch_size=16)
    found = torch.cat([probe.weight.T, probe.bias.T], 1).double()
    torch.testing.assert_close(found, torch.tensor(weights), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('kind', TASKS)
def test_what_is_no_number_stops(kind):
    (x, y), val = samples(kind, 40, 0), samples(kind, 20, 1)
    x[3, 2] = np.nan
    with pytest.raises(FloatingPointError, match='no epoch gave a number on the validation pictures .*lr 0.01, 40 training'):
        train_head(TASKS[kind], (x, y), val, epochs=2)


# fine-tuning

def as_maps(kind, n, seed):
    x, y = samples(kind, n, seed, 1.)
    return x.reshape(-1, 6, 1, 1).astype(np.float16), y


def small_backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 5), nn.Dropout(.5), nn.ReLU())


def test_fine_tuning_leaves_the_given_model_alone_and_its_statistics_frozen():
    backbone, splits = small_backbone(), [as_maps('single-label', 80, seed) for seed in range(2)]
    before = copy.deepcopy(backbone.state_dict())
    probe, again = (train_head(TASKS['single-label'], *splits, backbone=backbone, backbone_lr=1e-2, epochs=3) for _ in range(2))
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)
    assert backbone.training and torch.equal(probe.weight, again.weight)
    for name, value in probe.backbone.state_dict().items():
        assert torch.equal(value, before[name]) == ('running' in name or 'num_batches' in name), name


def test_backbone_and_head_have_rates_of_their_own():
    backbone, splits = small_backbone(), [as_maps('single-label', 80, seed) for seed in range(2)]
    for rate in (1e-3, 1e-5):
        probe = train_head(TASKS['single-label'], *splits, backbone=backbone, backbone_lr=rate, epochs=1, batch_size=20)
        step = (probe.backbone[2].weight - backbone[2].weight).abs().max().item() / rate
        assert .3 < step < 3  # of four steps the first finds a head of zeros, and Adam's are about as long as the rate
        assert .01 < probe.weight.abs().max() < .04


def test_the_best_epochs_backbone_is_kept_too(monkeypatch):
    task, (x, y), seen = TASKS['regression'], as_maps('regression', 80, 1), []
    monkeypatch.setattr(evaluate, 'quality', lambda *given: seen.append(quality(*given)) or seen[-1])
    probe = train_head(task, as_maps('regression', 80, 0), (x, 10 - y), backbone=small_backbone(), backbone_lr=1e-2, epochs=6)
    assert quality(task, 10 - y, predict(task, probe, x)) == max(seen) > seen[-1]


@pytest.mark.parametrize('kind', TASKS)
def test_features_once_are_pictures_through_the_frozen_backbone_each_time(kind):
    torch.manual_seed(0)
    backbone, rng = timm.create_model('test_efficientnet', num_classes=0).eval(), np.random.default_rng(0)
    splits = []
    for n in (40, 20, 15):
        _, y = samples(kind, n, n)
        ground = np.resize(40 * y[:, :1], (n, 3))[:, None, None]  # the first column is the brightness
        splits.append(((ground % 256 * rng.random((n, 32, 32, 3))).astype(np.uint8), y))
    (*learnt, (test, _)), task = splits, TASKS[kind]
    features = [(extract(x, backbone).numpy(), y) for x, y in learnt]
    fast, slow = train_head(task, *features, epochs=3), train_head(task, *learnt, backbone=backbone, backbone_lr=0, epochs=3)
    for part in ('weight', 'bias'): torch.testing.assert_close(getattr(fast, part), getattr(slow, part), atol=1e-4, rtol=0)
    torch.testing.assert_close(slow.backbone.state_dict(), backbone.state_dict(), rtol=0, atol=0)
    np.testing.assert_allclose(predict(task, fast, extract(test, backbone).numpy()), predict(task, slow, test), atol=1e-4)


def test_ridge_is_the_closed_form_with_the_penalty_that_validation_chooses():
    rng, w = np.random.default_rng(0), np.random.default_rng(1).normal(size=(12, 2))
    x = [1 + rng.normal(size=(n, 12)) * np.linspace(.5, 3, 12) for n in (40, 30, 20)]
    y = [rows @ w + rng.normal(0, 9, (len(rows), 2)) for rows in x]
    z = [(rows - x[0].mean(0)) / x[0].std(0) for rows in x]
    told = {}
    for penalty in 10 ** np.arange(0, 6.5, .5):
        weights = np.linalg.solve(z[0].T @ z[0] + penalty * np.eye(12), z[0].T @ (y[0] - y[0].mean(0)))
        told[penalty] = [rows @ weights + y[0].mean(0) for rows in z]
    best = min(told, key=lambda penalty: ((told[penalty][1] - y[1]) ** 2).mean())
    assert 1 < best < 1e6
    np.testing.assert_allclose(Ridge(best).fit(z[0], y[0]).predict(z[2]), told[best][2])
    given = [rows.astype(np.float32) for rows in (*x, *y)]
    np.testing.assert_allclose(ridge_probe((given[0], given[3]), (given[1], given[4]), given[2]), told[best][2], rtol=1e-4, atol=1e-4)


# zero-shot and shortcuts

def test_zero_shot_by_hand():
    rng, seen = np.random.default_rng(1), {}
    def embed(texts):
        for text in texts: seen.setdefault(text, rng.normal(size=4) * rng.uniform(.1, 9))  # of any length: the cosine does not see it
        return torch.tensor(np.stack([seen[text] for text in texts])).float()
    images = rng.normal(size=(200, 4)).astype(np.float32)
    found = zero_shot(torch.tensor(images), LEVELS, embed)
    assert list(found) == ['zero-shot 1', 'zero-shot 2', 'zero-shot all']
    unit = {text: vector / np.linalg.norm(vector) for text, vector in seen.items()}
    for name, predictions in found.items():
        chosen = {'zero-shot 1': PROMPTS[:1], 'zero-shot 2': PROMPTS[1:]}.get(name, PROMPTS)
        for k, classes in enumerate(LEVELS.classes):
            t = np.stack([sum(unit[prompt.format(ADJECTIVES.get(c, c))] for prompt in chosen) for c in classes])
            cosines = images @ (t / np.linalg.norm(t, axis=1, keepdims=True)).T
            assert (predictions[:, k] == cosines.argmax(1)).all()


def test_no_two_classes_have_one_adjective():
    for classes in (MIKELS, PANDA, WEBEMO): assert len({ADJECTIVES[name] for name in classes}) == len(classes)


# the stage

class Killed(Exception): pass


def test_polarity_is_learnt_alone():
    eight = single(MIKELS)
    assert level_tasks({'label': eight}) == {
        'label': eight, 'polarity': Task('single-label', ('polarity',), (('negative', 'positive'),))}
    assert level_tasks(BENCHMARKS['mixed']) == {}


@pytest.mark.parametrize('protocols, expected', [
    ('linear', 'linear new label|linear mixed vad|linear seen label'),
    ('linear linear-first', 'linear new label|linear mixed vad|linear seen label'),
    ('linear-first', 'linear new label'), ('validation', 'validation new label'),
    ('linear-all', 'linear new label|linear new object|linear new levels|linear seen label|linear seen object|'
     'linear mixed labels|linear mixed vad'),
    ('fine-tune', 'fine-tune new label'),
    ('fine-tune-all', 'fine-tune new label|fine-tune new levels|fine-tune mixed labels|fine-tune mixed vad'),
    ('fine-tune levels', 'fine-tune new label|fine-tune new level_1|fine-tune new level_3'),
    ('pdanet', 'pdanet new label|pdanet new level_1|pdanet new level_3'), ('zero-shot', 'zero-shot new label|zero-shot mixed vad')])
def test_what_a_protocol_asks(protocols, expected):
    asked = questions(protocols.split(), BENCHMARKS, [('new', 'label'), ('mixed', 'vad'), ('seen', 'label')])
    assert '|'.join(map(' '.join, asked)) == expected


def test_every_question_is_answered_for_every_test_picture(evaluated):
    found = read(evaluated)
    assert list(found) == COLUMNS
    for run, folder, seed, _, protocols in RUNS:
        rows = found[(found['run'] == run) & (found['seed'] == str(seed))]
        counts = rows.groupby(['protocol', 'dataset', 'task']).ngroups
        assert counts == (3 if protocols == 'linear' else 8 + 6 * bool(folder)), run  # each prompt and both, of two tasks
    for (_, _, name, task, _), rows in found.groupby(['run', 'protocol', 'dataset', 'task', 'seed']):
        table = pd.read_csv(evaluated / f'data/{name}.csv', dtype=str).query('split == "test"')
        assert list(rows['level'].unique()) == list(BENCHMARKS[name][task].columns)
        for level, of_level in rows.groupby('level'):
            assert list(of_level['id']) == list(table['id']) and list(of_level['label']) == list(table[level])
    kept = found.query('dataset == "mixed" and task == "labels" and seed == "0"').groupby('run')['prediction'].apply(tuple)
    assert kept.nunique() == len(kept) == 2 and all(len(set(scores)) > 100 for scores in kept)  # not rounded into ties
    orders = found.query('run == "initial" and protocol == "linear"').groupby('seed')['prediction'].apply(tuple)
    assert orders.nunique() == 2


def split_of(run, targets_of, x):
    rows = [targets_of['split'].to_numpy() == name for name in ('train', 'val', 'test')]
    y = LABEL.targets(targets_of)
    return *((x[r], y[r]) for r in rows[:2]), x[rows[2]]


@pytest.mark.parametrize('run, folder', [('initial', None), ('PACL', 'pacl-s1'), ('colour histogram', ''), ('shuffled labels', '')])
def test_the_stage_is_a_linear_probe_on_the_encoders_features(evaluated, run, folder):
    table, images = evaluate.load_set(evaluated, 'new')
    train, seed = np.flatnonzero(table['split'] == 'train'), 0 if run == 'colour histogram' else 1
    x = extract(np.load(evaluated / 'features/early_new.npy'), evaluate.learning_stages(evaluated, folder)).numpy()
    if run == 'colour histogram':
        x = colour_histogram(images)
        x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)  # scaled by the training pictures alone
    learnt, val, test = split_of(evaluated, table, x)
    if run == 'shuffled labels': learnt = learnt[0], np.random.default_rng(seed).permutation(learnt[1])
    expected = np.array(EMOTIONS)[predict(LABEL, train_head(LABEL, learnt, val, epochs=2, seed=seed), test)[:, 0]]
    found = read(evaluated).query(f'run == "{run}" and protocol == "linear" and dataset == "new" and task == "label" and seed == "{seed}"')
    assert (found['prediction'] == expected).all()


def test_zero_shot_goes_through_the_projectors_that_were_trained(evaluated):
    table = pd.read_csv(evaluated / 'data/new.csv', dtype=str)
    inputs = torch.from_numpy(np.load(evaluated / 'features/early_new.npy')[table['split'] == 'test']).float()
    towers = load_file(evaluated / 'models/pacl-s1/projectors.safetensors')
    with torch.no_grad(): v = evaluate.learning_stages(evaluated, 'pacl-s1')(inputs) @ towers['image_projector'].T
    texts = text_encoder_of(evaluated).embed_texts([PROMPTS[1].format(word) for word in ('angry', 'awed', 'fearful')])
    t = torch.from_numpy(texts) @ towers['text_projector'].T
    expected = np.array(EMOTIONS)[torch.cosine_similarity(v[:, None], t[None], dim=-1).argmax(1)]
    found = read(evaluated).query('run == "PACL" and protocol == "zero-shot 2" and task == "label" and seed == "1"')
    assert (found['prediction'] == expected).all()


def copy_of(run, folder, rows):
    copied = shutil.copytree(run, folder, ignore=shutil.ignore_patterns('results', '.kept'))
    write_runs(copied, rows)
    return copied


PART = [('PACL', 'pacl-s1', 1, 'pacl', 'linear fine-tune zero-shot')]


def test_the_number_of_threads_changes_no_byte(evaluated, tmp_path, monkeypatch):
    found, counts, real = [], set(), evaluate.evaluate
    def count(*args, **given):
        counts.add(torch.get_num_threads())
        return real(*args, **given)
    monkeypatch.setattr(evaluate, 'evaluate', count)
    for n in (1, 2):
        monkeypatch.setattr(evaluate, 'ThreadPoolExecutor', lambda _, n=n, **start: ThreadPoolExecutor(n, **start))
        run = copy_of(evaluated, tmp_path / str(n), PART)
        torch.set_num_threads(3)
        try: run_evaluate(run, **EPOCHS)
        finally: torch.set_num_threads(1)
        found.append((run / 'results/predictions.csv').read_bytes())
    assert found[0] == found[1] and counts == {1}


def test_a_killed_stage_goes_on_and_more_runs_cost_only_themselves(evaluated, tmp_path, monkeypatch):
    run, done, real = copy_of(evaluated, tmp_path / 'run', PART), [], evaluate.evaluate
    monkeypatch.setattr(evaluate, 'ThreadPoolExecutor', lambda _, **start: ThreadPoolExecutor(1, **start))
    def work(most):
        def counted(run, job, *args, **given):
            if len(done) == most: raise Killed
            done.append(job)
            return real(run, job, *args, **given)
        monkeypatch.setattr(evaluate, 'evaluate', counted)
        run_evaluate(run, **EPOCHS)
    with pytest.raises(Killed): work(1)
    assert not (run / 'results').exists()
    work(9)
    assert len(done) == len({(job.dataset, *job.asked) for job in done}) == 3
    whole = copy_of(evaluated, tmp_path / 'whole', PART)
    run_evaluate(whole, **EPOCHS)
    assert (run / 'results/predictions.csv').read_bytes() == (whole / 'results/predictions.csv').read_bytes()
    done.clear()
    run_evaluate(run, **EPOCHS)
    assert not done
    write_runs(run, [*PART, RUNS[4]])
    run_evaluate(run, **EPOCHS)
    assert {job.run for job in done} == {'strong only'} and set(read(run)['run']) == {'PACL', 'strong only'}


def test_folds_are_a_loop_over_the_groups(evaluated, tmp_path):
    run = copy_of(evaluated, tmp_path / 'run', [('PACL', 'pacl-s1', 1, 'pacl', 'linear validation')])
    table = pd.read_csv(run / 'data/new.csv', dtype=str)
    table['image'], table['group'] = table['id'], [f'theme {i % 37}' for i in range(len(table))]
    table.to_csv(run / 'data/new.csv', index=False)
    told = (run / 'data/tasks.json').read_text()
    (run / 'data/tasks.json').write_text(told.replace('"drawn": false', '"drawn": true', 1))  # of new/label
    run_evaluate(run, **EPOCHS | {'datasets': ['new/label'], 'folds': 4})
    found, y = read(run).set_index('id'), LABEL.targets(table)
    x = extract(np.load(run / 'features/early_new.npy'), evaluate.learning_stages(run, 'pacl-s1')).numpy()
    for protocol, asked in (('linear', table['split'] == 'test'), ('validation', table['split'] != 'test')):
        pool = table if protocol == 'linear' else table[asked]
        fold, expected = folds_of(pool, 4), {}
        for k in range(4):
            own, val = (pool.index[fold == f % 4] for f in (k, k + 1))
            train = pool.index.difference(val.union(own))
            assert not {*table['group'][own]} & {*table['group'][train.union(val)]}
            probe = train_head(LABEL, (x[train], y[train]), (x[val], y[val]), epochs=2, seed=1)
            for row in own[asked[own]]: expected[table['id'][row]] = EMOTIONS[predict(LABEL, probe, x[row:row + 1])[0, 0]]
        rows = found[found['protocol'] == protocol]
        assert rows['prediction'].to_dict() == expected and rows.index.is_unique
        assert (rows['group'] == table.set_index('id')['group'][rows.index]).all()


def test_groups_are_drawn_as_wholes():
    rng, units = np.random.default_rng(0), np.repeat([*'cab'], [2, 5, 3])
    targets, outputs = rng.integers(2, size=(2, 10, 1))
    draws = by_level('single-label', targets, outputs[None], ['label'], units)['label', 'accuracy'][0, 1:]
    right = pd.Series((targets == outputs)[:, 0]).groupby(units).agg(['sum', 'size']).to_numpy()  # of a, b, c
    totals = resamples(3) @ right
    np.testing.assert_allclose(draws, totals[:, 0] / totals[:, 1], rtol=1e-6)


def test_attention_phrases_and_clip(evaluated, tmp_path, monkeypatch):
    class Clip:
        def embed_images(self, images): return np.asarray(images, np.float32).reshape(len(images), -1)[:, :8]
        def embed_texts(self, texts): return np.random.default_rng(0).normal(size=(len(texts), 8)).astype(np.float32)
    monkeypatch.setattr(evaluate, 'evaluators_of', lambda run: (Clip(), None, None))
    responses = np.random.default_rng(1).normal(size=(132, 5)).astype(np.float32)
    monkeypatch.setattr(evaluate, 'phrase_responses', lambda run, name: responses)
    rows = [('initial', '', 0, 'initial', 'levels pdanet'), ('CLIP', '', 0, 'clip', 'zero-shot'), ('CLIP', '', 1, 'clip', 'zero-shot'),
            ('DeepSentiBank', '', 0, 'sentibank', 'linear')]
    run = copy_of(evaluated, tmp_path / 'run', rows)
    run_evaluate(run, **EPOCHS | {'datasets': ['new/levels']})
    found = read(run)
    levels = {('fine-tune', task, level) for task, level in (('label', 'label'), ('level_1', 'level_1'), ('level_3', 'level_3'))}
    for name, expected in {
            'initial': levels, 'initial + PDANet': levels, 'DeepSentiBank': {('linear', 'levels', level) for level in LEVELS.columns},
            'CLIP': {(f'zero-shot {prompt}', 'levels', level) for prompt in ('1', '2', 'all') for level in LEVELS.columns}}.items():
        rows = found[found['run'] == name]
        assert set(rows[['protocol', 'task', 'level']].itertuples(index=False, name=None)) == expected
    one, two = (rows.drop(columns='seed').reset_index(drop=True) for _, rows in found[found['run'] == 'CLIP'].groupby('seed'))
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.parametrize('column, replaced, given, message', [
    ('split', {'val': 'train'}, {}, r'data/new.csv lacks train, val or test pictures\. Give it some of each'),
    ('split', {'test': 'val'}, {}, 'data/new.csv lacks train, val or test'),
    ('label', dict.fromkeys(EMOTIONS, 'awe'), {}, 'data/new.csv: the training pictures do not differ in label. Give it'),
    ('label', {}, {'datasets': ['new/lable']}, 'datasets: no SET/TASK of .*tasks.json is "new/lable"; nearest.* new/label')])
def test_what_cannot_be_learnt_or_measured_is_named(evaluated, tmp_path, monkeypatch, column, replaced, given, message):
    run = copy_of(evaluated, tmp_path / 'run', RUNS[:1])
    table = pd.read_csv(run / 'data/new.csv', dtype=str)
    table.assign(**{column: table[column].replace(replaced)}).to_csv(run / 'data/new.csv', index=False)
    monkeypatch.setattr(evaluate, 'ThreadPoolExecutor', None)  # refused before any work
    with pytest.raises(InputError, match=message): run_evaluate(run, **EPOCHS | given)
