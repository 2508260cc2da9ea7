"pacl.parts.metrics: every metric against scikit-learn and against loops, intervals that hold what they promise, differences that are paired."
import warnings
from math import comb

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics

from pacl.parts.metrics import (METRICS, class_metrics, compare, interval, mcnemar, metric_draws, ranking_metrics, rating_metrics, resamples,
                          score, values)

AVERAGES = 'multi-label', 'regression'


# the definitions, sample by sample, in float64

def naive_classes(labels, said):
    n, f1 = len(labels), 0
    for c in set(labels):
        tp, fp, fn = (sum(a(x) and b(y) for x, y in zip(labels, said)) for a, b in (
            (lambda x: x == c, lambda y: y == c), (lambda x: x != c, lambda y: y == c), (lambda x: x == c, lambda y: y != c)))
        f1 += (tp + fn) / n * 2 * tp / (2 * tp + fp + fn)
    return sum(x == y for x, y in zip(labels, said)) / n, f1


def naive_ranking(labels, scores):
    there, absent = ([s for y, s in zip(labels, scores) if y == k] for k in (1, 0))
    if not there or not absent: return np.nan, np.nan
    precision, recall = 0, 0
    for threshold in sorted(set(scores), reverse=True):
        hits, taken = sum(s >= threshold for s in there), sum(s >= threshold for s in scores)
        precision += (hits / len(there) - recall) * hits / taken
        recall = hits / len(there)
    return precision, sum((a > b) + (a == b) / 2 for a in there for b in absent) / (len(there) * len(absent))


def naive_ratings(ratings, said):
    ratings, said = ([float(x) for x in column] for column in (ratings, said))
    n, error = len(ratings), sum((y - p) ** 2 for y, p in zip(ratings, said))
    if len(set(ratings)) == 1: return error / n, float(error == 0)
    return error / n, 1 - error / sum((y - sum(ratings) / n) ** 2 for y in ratings)


NAIVE = {'single-label': naive_classes, 'hierarchical': naive_classes, 'multi-label': naive_ranking, 'regression': naive_ratings}
RATINGS = st.sampled_from([1, 1.5, 3, 3.25, 9])  # few: many ties; float32 has them exactly
ENTRIES = {'single-label': (st.integers(0, 2), st.integers(0, 3)), 'hierarchical': (st.integers(0, 2), st.integers(0, 3)),
           'multi-label': (st.integers(0, 1), st.sampled_from([0, .25, .5, 1])), 'regression': (RATINGS, RATINGS)}


@st.composite
def predictions(draw, kind, largest=9):
    "targets, outputs and counts, of any size."
    n, columns, draws = (draw(st.integers(1, k)) for k in (largest, 1 if kind == 'single-label' else 3, 4))
    targets, outputs = (draw(hnp.arrays(np.int64 if kind in ('single-label', 'hierarchical') else np.float32, (n, columns), elements=e))
                        for e in ENTRIES[kind])
    counts = draw(hnp.arrays(np.float32, (draws, n), elements=st.integers(0, 3)))
    counts[counts.sum(1) == 0] = 1
    return targets, outputs, counts


def repeated(array, count): return np.repeat(array, count.astype(int), axis=0)


def mean(numbers): return np.nan if np.isnan(numbers).all() else np.nanmean(numbers)


def same(found, expected):
    assert found.keys() == expected.keys()
    for key in found: np.testing.assert_allclose(found[key], expected[key], rtol=1e-5, atol=1e-5, err_msg=str(key))


# metrics

@pytest.mark.parametrize('kind', METRICS)
@settings(deadline=None)
@given(st.data())
def test_a_draw_is_a_test_set_with_repeats(kind, data):
    targets, outputs, counts = data.draw(predictions(kind))
    by_loop = [[NAIVE[kind](repeated(y, k), repeated(p, k)) for y, p in zip(targets.T, outputs.T)] for k in counts]
    names, L = METRICS[kind][1], targets.shape[1]
    expected = {(c, name): [draw[c][m] for draw in by_loop] for c in range(L) for m, name in enumerate(names)}
    if kind in AVERAGES: expected |= {(None, name): [mean([c[m] for c in draw]) for draw in by_loop] for m, name in enumerate(names)}
    same(metric_draws(kind, targets, outputs, counts), expected)


@pytest.mark.parametrize('kind', METRICS)
@settings(deadline=None)
@given(st.data())
def test_scikit_learn_and_the_draw_of_each_sample_once_agree(kind, data):
    targets, outputs, counts = data.draw(predictions(kind, 30))
    found = metric_draws(kind, targets, outputs, np.ones_like(counts[:1]))
    assert all(draws.shape == (1,) for draws in found.values())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        theirs = values(kind, targets, outputs)
    same({key: draws[0] for key, draws in found.items()}, theirs)
    assert all(type(value) is float for value in theirs.values())


def test_many_columns_are_scikit_learns_averages():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(2, size=(80, 5)), rng.integers(6, size=(80, 5)) / 5
    same({key: v for key, v in values('multi-label', labels, scores).items() if key[0] is None},
         {(None, 'average_precision'): metrics.average_precision_score(labels, scores),
          (None, 'roc_auc'): metrics.roc_auc_score(labels, scores)})
    ratings, said = rng.uniform(1, 9, (2, 80, 3))
    same({key: v for key, v in values('regression', ratings, said).items() if key[0] is None},
         {(None, 'mse'): metrics.mean_squared_error(ratings, said), (None, 'r2'): metrics.r2_score(ratings, said)})
    labels, said = rng.integers(4, size=(2, 80, 3))
    found = values('hierarchical', labels, said)
    for c in range(3):
        precision, recall, f1, n = metrics.precision_recall_fscore_support(labels[:, c], said[:, c])
        assert np.isclose(found[c, 'weighted_f1'], np.average(f1, weights=n)) and found[c, 'accuracy'] == (labels == said)[:, c].mean()
    assert (None, 'accuracy') not in found


def test_a_size_at_which_rounding_would_show():
    rng = np.random.default_rng(1)
    for kind, targets, outputs in (
            ('single-label', *rng.integers(25, size=(2, 20000, 1))),
            ('multi-label', rng.integers(2, size=(20000, 1)), rng.random((20000, 1)).round(3).astype(np.float32)),
            ('regression', *rng.uniform(1, 9, (2, 20000, 1)).astype(np.float32))):
        found = metric_draws(kind, targets, outputs, np.ones((1, 20000), np.float32))
        for key, value in values(kind, targets, outputs).items(): assert abs(found[key][0] - value) < 5e-6, (kind, key)


ONE = np.ones((1, 4), np.float32)


def test_classes_without_a_sample():
    labels, said = np.array([0, 0, 2, 2]), np.array([0, 1, 2, 1])  # 1 is said and never true: nothing of F1 is its own
    assert {k: v.item() for k, v in class_metrics(labels, said, ONE).items()} == pytest.approx({'accuracy': .5, 'weighted_f1': 2 / 3})
    assert values('single-label', labels[:, None], said[:, None])[0, 'weighted_f1'] == pytest.approx(2 / 3)
    wrong = class_metrics(labels, np.full(4, 7), ONE)  # one answer for all, and wrong
    assert wrong['accuracy'] == wrong['weighted_f1'] == 0
    right = class_metrics(np.full(4, 'awe'), np.full(4, 'awe'), ONE)  # names do as well; a single class
    assert right['accuracy'] == right['weighted_f1'] == 1


@pytest.mark.parametrize('label', [0, 1])
def test_a_class_that_none_or_all_have_is_left_out_of_the_mean(label):
    labels = np.c_[np.full(4, label), [0, 1, 0, 1]]
    scores = np.c_[[.1, .2, .3, .4], [.3, .2, .1, .4]]
    for found in (values('multi-label', labels, scores), {k: v[0] for k, v in metric_draws('multi-label', labels, scores, ONE).items()}):
        assert np.isnan(found[0, 'average_precision']) and np.isnan(found[0, 'roc_auc'])
        assert found[None, 'roc_auc'] == found[1, 'roc_auc'] == .75
        assert found[None, 'average_precision'] == pytest.approx((1 + 2 / 3) / 2) == found[1, 'average_precision']


def test_constant_predictions():
    labels = np.array([0, 1, 1, 1])
    flat = ranking_metrics(labels, np.full(4, .3), ONE)
    assert flat['average_precision'] == .75 and flat['roc_auc'] == .5  # the share; a coin
    ratings = np.array([1., 2, 3, 6])
    at_the_mean, beside = (rating_metrics(ratings, np.full(4, said), ONE) for said in (3., 4.))
    assert at_the_mean['mse'] == 3.5 and at_the_mean['r2'] == 0 and beside['r2'] == pytest.approx(-1 / 3.5)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('n', [1, 2, 3, 7, 100])
@pytest.mark.parametrize('rating', [.1, 3., 5.3])  # the mean of seven times 5.3 is not 5.3
def test_r2_of_ratings_that_do_not_vary(rating, n, dtype):
    ratings = np.full((n, 1), rating, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for said, r2 in ((ratings, 1), (ratings + dtype(.5), 0)):
            assert values('regression', ratings, said)[0, 'r2'] == r2
            assert metric_draws('regression', ratings, said, np.ones((1, n), np.float32))[0, 'r2'] == r2


# draws and intervals

def test_draws():
    counts = resamples(20, 500)
    assert counts.shape == (500, 20) and counts.dtype == np.float32 and (counts.sum(1) == 20).all() and counts.max() > 1
    assert abs(counts.mean(0) - 1).max() < .25 and abs((counts == 0).mean() - np.exp(-1)) < .02  # (1 − 1/n)^n are left out
    resamples.cache_clear()
    assert (counts == resamples(20, 500)).all() and (counts != resamples(20, 500, seed=1)).any()
    assert len({row.tobytes() for row in counts}) == 500
    assert (resamples(1, 3) == 1).all()


def test_an_interval_is_the_middle_95_percent():
    draws = np.random.default_rng(0).normal(size=(1, 1000))
    assert interval(draws) == pytest.approx(tuple(np.quantile(draws, [.025, .975])))
    draws[0, :100] = np.nan  # draws in which no class can be ranked
    assert interval(draws) == pytest.approx(tuple(np.quantile(draws[0, 100:], [.025, .975])))
    assert interval(np.full((3, 1000), .25)) == pytest.approx((.25, .25))


def test_an_interval_of_several_seeds_draws_them_too():
    seeds = np.array([[.2], [.4], [.9]]).repeat(1000, 1)  # samples change nothing here
    low, high = interval(seeds)
    assert low == pytest.approx(.2, abs=.08) and high == pytest.approx(.9, abs=.18) and low < high  # 1/27 = 3.7 % are thrice the same
    two = np.array([[0.], [1]]).repeat(1000, 1)
    assert interval(two) == (0, 1)


COLUMNS = ['value', 'sd', 'n', 'ci_low', 'ci_high']


@pytest.mark.parametrize('kind, targets, outputs, levels', [
    ('single-label', np.arange(60)[:, None] % 3, np.arange(60)[:, None] % 4, ['label']),
    ('hierarchical', np.arange(120).reshape(60, 2) % 5, np.arange(120).reshape(60, 2) % 7, ['level_1', 'level_2']),
    ('multi-label', np.arange(120).reshape(60, 2) % 3 == 0, np.arange(120).reshape(60, 2) % 7 / 7, ['awe', 'fear', 'mean']),
    ('regression', np.arange(120).reshape(60, 2) % 5 + 1., np.arange(120).reshape(60, 2) % 7 + 1., ['valence', 'arousal', 'mean'])])
def test_the_table_of_a_model(kind, targets, outputs, levels):
    targets, names = targets.astype(int) if kind == 'multi-label' else targets, METRICS[kind][1]
    rng = np.random.default_rng(0)
    seeds = np.stack([outputs, outputs[rng.permutation(60)], outputs[rng.permutation(60)]])
    alone, table = (score(kind, targets, p, [x for x in levels if x != 'mean']) for p in (outputs, seeds))
    for found in (alone, table):
        assert list(found) == ['level', 'metric', *COLUMNS] and (found['n'] == 60).all()
        assert list(zip(found['level'], found['metric'])) == [(level, name) for level in levels for name in names]
        assert (found['ci_low'] < found['ci_high']).all() and found['value'].between(found['ci_low'], found['ci_high']).all()
    assert alone['sd'].isna().all()
    each = [values(kind, targets, p) for p in seeds]
    for row, key in zip(table.itertuples(), each[0]):
        of_seeds = [found[key] for found in each]
        assert row.value == pytest.approx(np.mean(of_seeds)) and row.sd == pytest.approx(np.std(of_seeds, ddof=1))
    counts = resamples(60)
    for row, (key, value) in zip(alone.itertuples(), values(kind, targets, outputs).items()):
        draws = metric_draws(kind, targets, outputs, counts)[key]
        assert row.value == value and (row.ci_low, row.ci_high) == pytest.approx(tuple(np.nanquantile(draws, [.025, .975])))
    pd.testing.assert_frame_equal(table, score(kind, targets, seeds, [x for x in levels if x != 'mean']))
    pd.testing.assert_frame_equal(alone, score(kind, targets, outputs[None], [x for x in levels if x != 'mean']))


def test_one_sample_and_a_class_that_nobody_has_make_no_noise():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for kind, found in (('single-label', 1), ('regression', 1), ('multi-label', np.nan)):
            table = score(kind, np.ones((1, 1)), np.ones((1, 1)), ['a'])
            assert len(table) == (2 if kind == 'single-label' else 4)
            rows = table[table['metric'] != 'mse']
            assert np.array_equal(rows[['value', 'ci_low', 'ci_high']], np.full((len(rows), 3), found), equal_nan=True)
        found = compare('multi-label', np.zeros((3, 1)), np.ones((1, 3, 1)), np.zeros((1, 3, 1)), ['a'])
        assert found[['difference', 'low', 'high']].isna().all(axis=None)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, trials = np.random.default_rng(2), 200
    counts, held, ones = resamples(300), dict.fromkeys(['accuracy', 'roc_auc', 'average_precision', 'mse', 'r2'], 0), np.ones(300)
    truth = {'accuracy': .6, 'mse': 1., 'r2': .5}  # of ratings with as much noise as signal
    many = rng.integers(2, size=200_000)
    truth |= {k: v.item() for k, v in ranking_metrics(many, rng.normal(size=len(many)) + many, np.ones((1, len(many)))).items()}
    for _ in range(trials):
        labels, ratings = rng.integers(2, size=300), rng.normal(5, 1, 300)
        found = class_metrics(ones, (rng.random(300) < .6).astype(float), counts) | rating_metrics(
            ratings + rng.normal(size=300), ratings, counts) | ranking_metrics(labels, rng.normal(size=300) + labels, counts)
        for name in held:
            low, high = interval(found[name][None])
            held[name] += low <= truth[name] <= high
    assert all(.90 < n / trials < .985 for n in held.values()), held


def test_intervals_of_a_method_need_its_seeds():
    rng, counts, held, alone = np.random.default_rng(3), resamples(300), 0, 0
    for _ in range(200):
        easy = rng.beta(3, 4, 300)
        a, b = (counts @ (rng.random((3, 300)) < easy + gain + rng.normal(0, .03, (3, 1))).T / 300 for gain in (.05, 0))
        held += (lambda low, high: low <= .05 <= high)(*interval((a - b).T))
        alone += (lambda low, high: low <= .05 <= high)(*interval((a - b).T.mean(0, keepdims=True)))
    assert held > .91 * 200 and alone < .9 * 200


# two models

def two_models(kind, seeds=2, n=40, columns=2):
    rng = np.random.default_rng(4)
    if kind == 'multi-label': return rng.integers(2, size=(n, columns)), *rng.random((2, seeds, n, columns))
    if kind == 'regression': return rng.uniform(1, 9, (n, columns)), *rng.uniform(1, 9, (2, seeds, n, columns))
    return rng.integers(3, size=(n, columns)), *rng.integers(3, size=(2, seeds, n, columns))


@pytest.mark.parametrize('kind', METRICS)
def test_a_difference(kind):
    targets, a, b = two_models(kind, columns=1 if kind == 'single-label' else 2)
    names = ['x', 'y'][:targets.shape[1]]
    nothing, there, back = (compare(kind, targets, *pair, names) for pair in ((a, a), (a, b), (b, a)))
    assert list(there) == ['level', 'metric', 'difference', 'low', 'high', 'mcnemar']
    assert (nothing[['difference', 'low', 'high']] == 0).all(axis=None)
    scores = score(kind, targets, a, names), score(kind, targets, b, names)
    assert there[['level', 'metric']].equals(scores[0][['level', 'metric']])
    np.testing.assert_allclose(there['difference'], scores[0]['value'] - scores[1]['value'])
    np.testing.assert_allclose(there[['difference', 'low', 'high']], -back[['difference', 'high', 'low']])
    assert (there['low'] < there['difference']).all() and (there['difference'] < there['high']).all()
    assert there['mcnemar'].equals(back['mcnemar'])
    for row in there.itertuples():
        expected = [mcnemar(x[:, names.index(row.level)] == targets[:, names.index(row.level)],
                            y[:, names.index(row.level)] == targets[:, names.index(row.level)]) for x, y in zip(a, b)] \
            if row.metric == 'accuracy' else []
        assert row.mcnemar == ' '.join(f'{p:.3g}' for p in expected)
    pd.testing.assert_frame_equal(there, compare(kind, targets, a, b, names))
    other = compare(kind, targets, a, b[::-1], names)  # seed by seed: the pairs matter to McNemar, not to the mean
    np.testing.assert_allclose(other['difference'], there['difference'])
    assert kind in AVERAGES or not other['mcnemar'].equals(there['mcnemar'])


def test_a_difference_of_draws_by_hand():
    targets, a, b = two_models('single-label', seeds=1, columns=1)
    counts = resamples(40).astype(int)
    drawn = [[naive_classes(repeated(targets[:, 0], k), repeated(p[0, :, 0], k)) for p in (a, b)] for k in counts]
    for row, ends in zip(compare('single-label', targets, a, b, ['label']).itertuples(),
                         np.quantile([np.subtract(*d) for d in drawn], [.025, .975], axis=0).T):
        assert (row.low, row.high) == pytest.approx(tuple(ends), abs=1e-5)


def test_pairing_pays():
    right = np.random.default_rng(4).random((3, 400)) < np.linspace(0, 1, 400) ** 4  # the same samples are easy for both
    better, ones = right | (np.arange(400) % 20 == 0), np.ones((400, 1), int)
    a, b = (x[..., None].astype(int) for x in (better, right))
    found = compare('single-label', ones, a, b, ['label']).iloc[0]
    ends = [score('single-label', ones, x, ['label']).iloc[0] for x in (a, b)]
    assert found['low'] > 0 > ends[0]['ci_low'] - ends[1]['ci_high']
    assert all(float(p) < .01 for p in found['mcnemar'].split())


@pytest.mark.parametrize('change', [lambda x: x[:1], lambda x: x[:, :-1], lambda x: x[..., :1]])
def test_what_cannot_be_compared(change):
    targets, a, b = two_models('hierarchical')
    with pytest.raises(ValueError, match=r'shapes differ: \(2, 40, 2\) and .*compare the same seeds on the same samples'):
        compare('hierarchical', targets, a, change(b), ['x', 'y'])


@pytest.mark.parametrize('one, other, expected', [(0, 0, 1), (1, 0, 1), (2, 0, .5), (5, 0, 1 / 16), (8, 1, 20 / 512), (3, 3, 1)])
def test_mcnemar_by_hand(one, other, expected):
    right_a, right_b = (np.repeat(rows, [one, other, 4, 5]) for rows in ([True, False, True, False], [False, True, True, False]))
    assert mcnemar(right_a, right_b) == pytest.approx(expected) == mcnemar(right_b, right_a)
    n, k = one + other, max(one, other)
    assert expected == min(1, 2 * sum(comb(n, i) for i in range(k, n + 1)) / 2 ** n)
