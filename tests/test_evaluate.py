"pacl.evaluate: scores against loops, heads against AdamW by hand, a test split that is read last and once."
import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pacl.evaluate as evaluate
from pacl.encoders import load_backbone, save_backbone, to_input
from pacl.evaluate import (bootstrap_scores, colour_histogram, extract, fine_tune, linear_probe, mean_interval, paired_difference,
                           resamples, run_evaluate, score, train_and_test, train_heads)
from pacl.stages import InputError, read_record, write_stage

EMOTIONS, OBJECTS = ['anger', 'awe', 'fear'], ['ball', 'cat']


def make_benchmarks(run, splits=(80, 12, 40)):
    "data/, features/ and models/ in small: grey pictures whose brightness is the object, noise for the outputs of the frozen stages."
    rng, names = np.random.default_rng(0), ['train', 'val', 'test']
    n = sum(splits)
    with write_stage(run / 'data', {'stage': 'data', 'parameters': {}}) as data:
        for name in ('new', 'seen'):
            table = pd.DataFrame({'id': [f'{i:04}' for i in range(n)], 'image': 'x.png', 'split': np.repeat(names, splits),
                                  'emotion': rng.choice(EMOTIONS, n), 'object': rng.choice(OBJECTS, n)})
            table.to_csv(data / f'{name}.csv', index=False)
            grey = np.where(table['object'] == 'cat', 200, 50)[:, None, None, None]
            np.save(data / f'{name}.npy', np.broadcast_to(grey, (n, 8, 8, 3)).astype(np.uint8))
    settings = {'backbone': 'tf_efficientnet_lite0', 'trainable_stages': 1}
    with write_stage(run / 'features', {'stage': 'features', 'parameters': settings}) as features:
        for name in ('new', 'seen'): np.save(features / f'early_{name}.npy', rng.normal(size=(n, 192, 3, 3)).astype(np.float16))
    with write_stage(run / 'models', {'stage': 'models', 'parameters': {'batch_size': 16}}) as models:
        jobs = [('unpartitioned', 'evaluators', 0), ('pacl', 'evaluators', 0), ('pacl', 'true', 0),
                ('unpartitioned', 'evaluators', 1), ('pacl', 'evaluators', 1)]
        backbone = load_backbone('tf_efficientnet_lite0')
        for method, partition, seed in jobs:
            with torch.no_grad(): backbone.conv_head.weight.mul_(1.01)
            save_backbone(backbone, models / f'{method}-{partition}-s{seed}', 8)
        pd.DataFrame([{'run': f'{m}-{p}-s{s}', 'method': m, 'partition': p, 'seed': s, 'steps': 6, 'images_seen': 160}
                      for m, p, s in jobs]).to_csv(models / 'runs.csv', index=False)
    return run


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
    run = make_benchmarks(tmp_path_factory.mktemp('runs') / 'mini')
    run_evaluate(run, probe_epochs=2, fine_tune_epochs=1)
    return run


# scores

def naive_scores(labels, said):
    "By the definitions, label by label."
    n, f1 = len(labels), 0
    for c in set(labels):
        tp, fp, fn = (sum(a(x) and b(y) for x, y in zip(labels, said)) for a, b in (
            (lambda x: x == c, lambda y: y == c), (lambda x: x != c, lambda y: y == c), (lambda x: x == c, lambda y: y != c)))
        f1 += (tp + fn) / n * 2 * tp / (2 * tp + fp + fn)
    return sum(x == y for x, y in zip(labels, said)) / n, f1


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from('abc'), st.sampled_from('abcd')), min_size=1, max_size=12))
def test_scores_are_the_definitions(pairs):
    labels, said = (np.array(x) for x in zip(*pairs))
    expected = naive_scores(labels, said)
    assert np.allclose(score(labels, said)['value'], expected)
    one = np.ones((1, len(pairs)), np.float32)  # the draw that has each sample once
    assert np.allclose([v.item() for v in bootstrap_scores(labels, said, one).values()], expected, atol=1e-6)


def test_a_draw_is_a_test_set_with_repeats():
    rng = np.random.default_rng(0)
    labels, said, counts = rng.integers(3, size=20), rng.integers(3, size=20), resamples(20, 50)
    assert counts.shape == (50, 20) and (counts.sum(1) == 20).all() and counts.max() > 1
    drawn = bootstrap_scores(labels, said, counts)
    for k, count in enumerate(counts.astype(int)):
        assert np.allclose([v[k] for v in drawn.values()], naive_scores(np.repeat(labels, count), np.repeat(said, count)), atol=1e-6)


def test_the_interval_is_the_middle_95_percent():
    rng = np.random.default_rng(1)
    labels, said = rng.integers(4, size=200), rng.integers(2, size=200)
    table = score(labels, said).set_index('metric')
    draws = bootstrap_scores(labels, said, resamples(200))
    assert (table['n'] == 200).all() and ((table['ci_low'] < table['value']) & (table['value'] < table['ci_high'])).all()
    for name, row in table.iterrows():
        assert np.isclose(np.mean((draws[name] >= row['ci_low']) & (draws[name] <= row['ci_high'])), .95, atol=.03)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, held, pictures_alone = np.random.default_rng(2), [0, 0], 0
    for _ in range(300):
        held[0] += (lambda t: t['ci_low'] <= .6 <= t['ci_high'])(score(np.ones(300), rng.random(300) < .6).iloc[0])
        easy = rng.beta(3, 4, 300)
        a, b = (rng.random((3, 300)) < easy + gain + rng.normal(0, .03, (3, 1)) for gain in (.05, 0))
        _, low, high = paired_difference(a, b)
        _, alone_low, alone_high = mean_interval(a.mean(0) - b.mean(0))
        held[1] += low <= .05 <= high
        pictures_alone += alone_low <= .05 <= alone_high
    assert .91 < held[0] / 300 < .98 and .91 < held[1] / 300
    assert pictures_alone < .9 * 300  # why seeds are drawn too


def test_paired_difference():
    a = np.random.default_rng(3).random((3, 50)) < .5
    assert paired_difference(a, a) == (0, 0, 0) and paired_difference(np.ones(9), np.zeros(9)) == (1, 1, 1)
    d, low, high = paired_difference(a, ~a)
    assert np.allclose((d, low, high), -np.array(paired_difference(~a, a))[[0, 2, 1]])
    assert np.isclose(d, 2 * a.mean() - 1) and low < d < high
    assert paired_difference(a[:1], ~a[:1]) == paired_difference(a[0], ~a[0])  # one seed: pictures alone
    # pairing pays: the same pictures are easy for both
    hard = np.random.default_rng(4).random((3, 400)) < np.linspace(0, 1, 400) ** 4
    better = hard | (np.arange(400) % 20 == 0)
    assert paired_difference(better, hard)[1] > 0 > mean_interval(better)[1] - mean_interval(hard)[2]
    with pytest.raises(ValueError, match='shapes differ'): paired_difference(a, a[:2])


# heads

def blobs(n, seed, classes=3, apart=3.):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    return np.eye(classes, 6, dtype=np.float32)[labels] * apart + rng.normal(size=(n, 6)).astype(np.float32), labels


def adamw_by_hand(train, val, epochs, lr=1e-2, batch_size=16, seed=0):
    "Softmax regression in float64: gradient, decay, both moments, the cosine, the best epoch on `val`, all written out."
    (x, y), (x_val, y_val) = train, val
    w, step, best = np.zeros((y.max() + 1, x.shape[1] + 1)), 0, (-1,)  # the last column is the bias
    m, v, x1 = np.zeros_like(w), np.zeros_like(w), np.c_[x, np.ones(len(x))].astype(float)
    steps, order = epochs * math.ceil(len(x) / batch_size), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch_size):
            p = np.exp(x1[rows] @ w.T)
            gradient = (p / p.sum(1, keepdims=True) - np.eye(len(w))[y[rows]]).T @ x1[rows] / len(rows)
            rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
            step += 1
            m, v = .9 * m + .1 * gradient, .999 * v + .001 * gradient ** 2
            w = w * (1 - rate * .01) - rate * (m / (1 - .9 ** step)) / (np.sqrt(v / (1 - .999 ** step)) + 1e-8)
        accuracy = ((np.c_[x_val, np.ones(len(x_val))] @ w.T).argmax(1) == y_val).mean()
        if accuracy > best[0]: best = accuracy, w
    return best


@pytest.mark.parametrize('epochs, apart, n_val', [(1, 3., 40), (7, .5, 40), (7, 1., 6)])  # of 6 pictures, several epochs are equally good
def test_a_head_is_adamw_by_hand(epochs, apart, n_val):
    train, val = blobs(50, 0, apart=apart), blobs(n_val, 1, apart=apart)
    accuracy, weights = adamw_by_hand(train, val, epochs)
    [(_, head)], found = train_heads((train[0], train[1][:, None]), (val[0], val[1][:, None]), epochs=epochs, batch_size=16)
    assert np.isclose(found[0], accuracy)
    torch.testing.assert_close(torch.cat([head.weight, head.bias[:, None]], 1).double(), torch.tensor(weights), atol=1e-4, rtol=1e-3)


def test_heads_do_not_disturb_each_other():
    (x, y), (x_val, y_val) = blobs(60, 0, apart=1.), blobs(40, 1, apart=1.)
    both, other, other_val = np.stack([y, y // 2], 1), (y // 2)[:, None], (y_val // 2)[:, None]
    (_, (_, together)), accuracy = train_heads((x, both), (x_val, np.stack([y_val, y_val // 2], 1)), epochs=4)
    [(_, alone)], accuracy_alone = train_heads((x, other), (x_val, other_val), epochs=4)
    torch.testing.assert_close(together.weight, alone.weight)
    assert accuracy[1] == accuracy_alone[0]


def named(split): return split[0], np.array(['ant', 'bee', 'cow'])[split[1]]


def test_the_probe_learns_what_is_there_and_nothing_else():
    train, val, test = (named(blobs(n, seed)) for seed, n in enumerate((300, 100, 400)))
    rows = linear_probe(train, val, test, epochs=8).set_index('metric')
    assert rows.loc['accuracy', 'value'] > .9 and rows.loc['val_accuracy', 'value'] > .9 and rows.loc['val_accuracy', 'n'] == 100
    shuffled = np.random.default_rng(0).permutation(train[1])
    chance = linear_probe((train[0], shuffled), val, test, epochs=8).set_index('metric').loc['accuracy', 'value']
    assert chance < .55  # of three blobs one can be named wrongly throughout, but never all rightly


def test_an_unknown_class_is_wrong_and_the_seed_is_the_order():
    train, val, test = (named(blobs(n, seed, apart=.3)) for seed, n in enumerate((60, 60, 600)))
    train = train[0][train[1] != 'cow'], train[1][train[1] != 'cow']
    rows, said = train_and_test(train, val, test, epochs=2, batch_size=8, seed=3)
    assert set(said[0]) == {'ant', 'bee'} and (rows['seed'] == 3).all()
    same, other = (train_and_test(train, val, test, epochs=2, batch_size=8, seed=seed)[0]['value'] for seed in (3, 4))
    assert rows['value'].equals(same) and not rows['value'].equals(other)


class Watched:
    "A split that notes when it is opened."
    def __init__(self, split, log, name): self.split, self.log, self.name = split, log, name

    def __iter__(self):
        self.log.append(self.name)
        return iter(self.split)


def test_the_test_split_is_read_once_and_last(monkeypatch):
    log, trained = [], train_heads
    def train_and_note(*args, **settings):
        found = trained(*args, **settings)
        log.append('trained and chosen')
        return found
    monkeypatch.setattr(evaluate, 'train_heads', train_and_note)
    splits = [named(blobs(40, seed)) for seed in range(3)]
    linear_probe(*splits[:2], Watched(splits[2], log, 'test'), epochs=2)
    fine_tune(nn.Linear(6, 4), *splits[:2], Watched(splits[2], log, 'test'), epochs=1)
    assert log == ['trained and chosen', 'test'] * 2


# fine-tuning

def as_maps(split): return split[0].reshape(-1, 6, 1, 1).astype(np.float16), split[1]


def small_backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 5), nn.ReLU())


def test_fine_tuning_leaves_the_given_model_alone_and_its_statistics_frozen():
    backbone, splits = small_backbone(), [as_maps(named(blobs(80, seed, apart=1.))) for seed in range(3)]
    before = copy.deepcopy(backbone.state_dict())
    rows, _ = train_and_test(*splits, backbone=backbone, backbone_lr=1e-2, epochs=3)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), backbone.state_dict().values())) and backbone.training
    assert rows.equals(train_and_test(*splits, backbone=backbone, backbone_lr=1e-2, epochs=3)[0])
    coded = [(x, np.unique(y, return_inverse=True)[1][:, None]) for x, y in splits[:2]]
    [(tuned, _)], _ = train_heads(*coded, backbone=backbone, backbone_lr=1e-2, epochs=3)
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, before[name]) == ('running' in name or 'num_batches' in name), name


def test_fine_tuning_at_rate_0_is_linear_evaluation():
    backbone, splits = small_backbone().eval(), [as_maps(named(blobs(80, seed, apart=1.))) for seed in range(3)]
    features = [(extract(x, backbone).numpy(), y) for x, y in splits]
    tuned = fine_tune(backbone, *splits, epochs=4, backbone_lr=0)
    pd.testing.assert_frame_equal(tuned, linear_probe(*features, epochs=4))
    assert not tuned.equals(fine_tune(backbone, *splits, epochs=4, backbone_lr=1e-2))


def test_pictures_go_through_the_whole_backbone():
    backbone = load_backbone('tf_efficientnet_lite0')
    pictures = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad(): torch.testing.assert_close(extract(pictures, backbone, batch_size=2), backbone(to_input(pictures, backbone)))


def test_colour_histogram_counts_pixels():
    images = np.random.default_rng(0).integers(256, size=(2, 5, 4, 3), dtype=np.uint8)
    found = colour_histogram(images)
    for image, shares in zip(images, found):
        for channel in range(3):
            for b in range(16): assert np.isclose(shares[16 * channel + b], sum(v // 16 == b for v in image[:, :, channel].ravel()) / 20)


# the stage

def test_run_evaluate(evaluated):
    results = pd.read_csv(evaluated / 'results/results.csv', keep_default_na=False)
    said = pd.read_csv(evaluated / 'results/predictions.csv', dtype={'id': str}, keep_default_na=False)
    assert list(results.columns) == 'backbone method partition protocol dataset task level metric value seed n ci_low ci_high'.split()
    keys = ['method', 'partition', 'protocol', 'dataset', 'task', 'seed']
    linear = [(m, p, 'linear', d, t, s) for m, p, seeds in (
        ('initial', '', (0, 1)), ('unpartitioned', 'evaluators', (0, 1)), ('pacl', 'evaluators', (0, 1)), ('pacl', 'true', (0,)),
        ('colour-histogram', '', (0, 1)), ('shuffled-labels', '', (0, 1)))
        for d in ('new', 'seen') for t in ('emotion', 'object') for s in seeds]
    tuned = [(m, p, 'fine-tune', 'new', 'emotion', s) for m, p in (('initial', ''), ('unpartitioned', 'evaluators'), ('pacl', 'evaluators'))
             for s in (0, 1)]
    groups = dict(list(said.groupby(keys)))
    assert set(groups) == {*linear, *tuned} and len(results) == 3 * len(groups)
    table = pd.read_csv(evaluated / 'data/new.csv', dtype=str).query('split == "test"')
    for key, rows in results.groupby(keys):
        group, values = groups[key], rows.set_index('metric')['value']
        assert np.allclose(values[['accuracy', 'weighted_f1']], naive_scores(group['label'], group['prediction']), atol=1e-6)
        assert 0 <= values['val_accuracy'] <= 1 and set(rows['n']) == {40, 12}
        if key[3] == 'new': assert list(group['id']) == list(table['id']) and list(group['label']) == list(table[key[4]])
    first, second = (said.query('method == "initial" and protocol == "linear" and seed == @seed')['prediction'].tolist() for seed in (0, 1))
    assert first != second  # another order of the batches
    assert first != said.query('method == "shuffled-labels" and seed == 0')['prediction'].tolist()
    best = results.query('method == "colour-histogram" and task == "object" and metric == "accuracy"')['value']
    assert (best == 1).all()  # brightness is the object


def test_a_second_time_gives_the_same_bytes(evaluated):
    first = read_record(evaluated / 'results')['outputs']
    (evaluated / 'results/stage.json').unlink()
    threads = torch.get_num_threads()
    run_evaluate(evaluated, probe_epochs=2, fine_tune_epochs=1)
    assert read_record(evaluated / 'results')['outputs'] == first and torch.get_num_threads() == threads
    assert 'probe_epochs was 2, is 3' in run_evaluate.stale(evaluated, probe_epochs=3, fine_tune_epochs=1)


def test_a_benchmark_without_a_split_is_named(tmp_path):
    run = make_benchmarks(tmp_path / 'run', splits=(24, 0, 18))
    with pytest.raises(InputError, match='new.csv lacks train, val or test'): run_evaluate(run)
    assert not (run / 'results').exists()
