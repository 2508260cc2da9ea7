"pacl.partition: Eqs. 1 and 2, the four partitions, and their quality against a naive count."
import json
import multiprocessing
import os
import signal
import sys
import types

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_data import COLOURS, make_world

from pacl.parts import judges as evaluators
from pacl import partition
from pacl.parts.data import in_post_order, load_set, run_data
from pacl.parts.readers import read_table
from pacl.partition import (PARTITIONS, POOLS, SCALES, anp_cosines, assign_partition, clip_score, emotion_score,
                            partition_quality, plot_gallery, plot_partition, plot_thresholds, read_partition, rescale, run_partition,
                            score_cosines, score_posts, suggest_threshold, threshold_sweep, to_scores, user_paths)
from pacl.parts.stages import InputError, read_record, write_stage

def score_pairs(images, texts, clip, anp, sentiment, scale='clipscore', pool='sentence'):
    return to_scores(score_cosines(images, texts, clip, anp, sentiment, pool), scale)


unit = st.sampled_from([0., 0.5, 0.7, 1.]) | st.floats(0, 1)


@st.composite
def scores(draw):
    n = draw(st.integers(1, 8))
    return draw(hnp.arrays(float, n, elements=unit)), draw(hnp.arrays(float, n, elements=unit))


@given(scores(), unit)
def test_partition_is_two_comparisons(pair, γ):
    names = {(True, True): 'strong', (False, True): 'emotional', (True, False): 'factual', (False, False): 'weak'}
    assert assign_partition(*pair, γ).tolist() == [names[f > γ, e > γ] for f, e in zip(*pair)]


@given(scores())
def test_the_sweep_ends_at_all_weak(pair):
    assert set(assign_partition(*pair, 1)) == {'weak'}
    assert set(assign_partition(*(p + 1e-9 for p in pair), 0)) == {'strong'}


def test_both_matched_is_strong_and_the_default_is_the_papers():
    assert assign_partition(pd.Series([.71, .7, .71, .7]), pd.Series([.71, .71, .7, .7])).tolist() == list(PARTITIONS)
    assert assign_partition([], []).tolist() == []


@pytest.mark.parametrize('γ', [-0.1, 1.1, float('nan'), float('inf')])
def test_threshold_outside_0_1(γ):
    with pytest.raises(ValueError, match=r'threshold .* expected a number in \[0, 1\]'): assign_partition([.5], [.5], γ)


@pytest.mark.parametrize('factual, emotional', [([.1, .2, np.nan], [.1, .2, .3]), ([.1, .2, .3], [.1, .2, np.nan])])
def test_nan_names_the_row(factual, emotional):
    with pytest.raises(ValueError, match='row 2 .*nan.*1 of 3'): assign_partition(factual, emotional)


def test_scores_of_different_length():
    with pytest.raises(ValueError, match='one shape'): assign_partition([.1, .2], [.1])


@st.composite
def embeddings(draw):
    n, d = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    number = st.sampled_from([-1., 0., 1.]) | st.floats(-1, 1, width=32)
    return draw(hnp.arrays(np.float32, (n, d), elements=number)), draw(hnp.arrays(np.float32, (n, d), elements=number))


def naive_cosines(a, b):
    def norm(x): return sum(float(v) ** 2 for v in x) ** .5
    return [sum(float(x) * float(y) for x, y in zip(p, q)) / max(norm(p) * norm(q), 1e-12) for p, q in zip(a, b)]


@given(embeddings())
def test_equations_1_and_2(pair):
    cosines = naive_cosines(*pair)
    np.testing.assert_allclose(clip_score(*pair), [min(2.5 * max(c, 0), 1) for c in cosines], atol=1e-9)
    np.testing.assert_allclose(emotion_score(*pair), [min(max(c, 0), 1) for c in cosines], atol=1e-9)


@settings(deadline=None)  # scipy is imported by the first call
@given(embeddings(), st.sampled_from(SCALES))
def test_every_scale_keeps_order_and_range(pair, scale):
    cosines, found = np.array(naive_cosines(*pair)), clip_score(*pair, scale)
    assert found.shape == cosines.shape and ((0 <= found) & (found <= 1)).all()
    assert (found[:, None] <= found)[cosines[:, None] < cosines - 1e-9].all()
    if scale != 'clipscore': np.testing.assert_array_equal(emotion_score(*pair, scale), found)


@settings(deadline=None)  # scipy is imported by the first call
@given(embeddings(), st.sampled_from(SCALES))
def test_scales_do_not_depend_on_the_order_of_rows(pair, scale):
    np.testing.assert_allclose(clip_score(*(p[::-1] for p in pair), scale), clip_score(*pair, scale)[::-1], atol=1e-12)


def test_ranks_are_quantiles():
    n = 1000
    angle = np.random.default_rng(0).uniform(0, np.pi, n)
    found = clip_score(np.stack([np.cos(angle), np.sin(angle)], 1), np.tile([1., 0.], (n, 1)), 'rank')
    for γ in (0, .25, .53, 1): assert abs((found > γ).mean() - (1 - γ)) <= 1 / n
    assert clip_score(np.ones((3, 2)), np.ones((3, 2)), 'rank').tolist() == [.5] * 3  # ties share a rank
    assert clip_score(np.ones((3, 2)), np.ones((3, 2)), 'minmax').tolist() == [.5] * 3


def test_wrong_scales_shapes_and_numbers():
    one = np.ones((2, 3))
    with pytest.raises(ValueError, match='"clipscor", expected one of clipscore, cosine, minmax, rank'): clip_score(one, one, 'clipscor')
    with pytest.raises(ValueError, match='belongs to CLIP'): emotion_score(one, one, 'clipscore')
    with pytest.raises(ValueError, match='one shape'): clip_score(one, np.ones((3, 3)))
    bad = one.copy(); bad[1, 2] = np.nan
    with pytest.raises(ValueError, match='row 1 .*not finite'): clip_score(one, bad, 'rank')


def test_cosines_are_computed_in_parts():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 8195, 2))
    np.testing.assert_allclose(emotion_score(a, b, 'cosine'), np.clip(naive_cosines(a, b), 0, 1), atol=1e-12)
    a[8193, 1] = np.inf
    with pytest.raises(ValueError, match='row 8193 .*not finite'): emotion_score(a, b)


words = st.sampled_from(['glad dog', 'gloomy dog', 'gloomy cat', 'glad gloomy day', 'blue sea'])


def counts(texts): return np.array([[t.count('glad'), t.count('gloomy'), 1] for t in texts], float)


@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=5), st.sampled_from(POOLS))
def test_pools_of_equation_2(rows, pool):
    texts, asked = ['glad gloomy glad ' * (i % 2) for i in range(len(rows))], []

    def embed(texts):
        asked.extend(texts)
        return counts(texts)
    found = anp_cosines([', '.join(row) for row in rows], counts(texts), embed, pool)
    if pool == 'sentence': expected = naive_cosines(counts([', '.join(row) for row in rows]), counts(texts))
    else:
        single = [naive_cosines(counts(row), counts([text] * 3)) for row, text in zip(rows, texts)]
        expected = [max(three) if pool == 'max' else sum(three) / 3 for three in single]
        assert sorted(asked) == sorted({phrase for row in rows for phrase in row})  # once each
    np.testing.assert_allclose(found, expected, atol=1e-12)


def naive_sweep(factual, emotional, truth, γ):
    names = {(True, True): 'strong', (False, True): 'emotional', (True, False): 'factual', (False, False): 'weak'}
    said = [names[f > γ, e > γ] for f, e in zip(factual, emotional)]
    for name in PARTITIONS:
        right = sum(s == t == name for s, t in zip(said, truth))
        yield (said.count(name), said.count(name) / len(said), right / said.count(name) if name in said else np.nan,
               right / truth.count(name) if name in truth else np.nan)


@given(scores(), st.lists(unit, min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_sweep_against_a_naive_count(pair, thresholds, data):
    truth = data.draw(st.lists(st.sampled_from(PARTITIONS), min_size=len(pair[0]), max_size=len(pair[0])))
    found = threshold_sweep(*pair, truth, thresholds)
    assert found['threshold'].tolist() == list(np.repeat(thresholds, 4))
    assert found['partition'].tolist() == list(PARTITIONS) * len(thresholds)
    expected = [row for γ in thresholds for row in naive_sweep(*pair, truth, γ)]
    np.testing.assert_array_equal(found[['size', 'share', 'precision', 'recall']], expected)
    pd.testing.assert_frame_equal(threshold_sweep(*pair, thresholds=thresholds), found[['threshold', 'partition', 'size', 'share']])


def test_sweep_goes_from_all_to_none():
    found = threshold_sweep(*np.random.default_rng(0).uniform(.01, .99, (2, 50))).set_index(['threshold', 'partition'])['size']
    assert found[0, 'strong'] == found[1, 'weak'] == 50 and (found[:, 'strong'].diff().dropna() <= 0).all() and len(found) == 404
    with pytest.raises(ValueError, match='3 true partitions for 2 scores'): threshold_sweep([.1, .2], [.1, .2], ['weak'] * 3)
    with pytest.raises(ValueError, match='threshold .* is 1.5'): threshold_sweep([.1], [.1], thresholds=[1.5])


@given(scores(), unit)
@settings(deadline=None)
def test_no_threshold_comes_nearer_to_the_share(pair, share):
    lower = np.minimum(*pair)
    if len(set(lower)) == 1:
        with pytest.raises(ValueError, match='no threshold tells them apart'): suggest_threshold(*pair, strong_share=share)
        return
    γ = suggest_threshold(*pair, strong_share=share)

    def miss(γ): return abs((assign_partition(*pair, γ) == 'strong').mean() - share)
    # strong changes only where γ passes a score: these, and what lies between, are all the thresholds there are
    levels = sorted({0, 1, *lower})
    assert miss(γ) <= min(map(miss, [*levels, *((a + b) / 2 for a, b in zip(levels, levels[1:]))])) + 1e-12


@pytest.mark.parametrize('strong', [0, 1, 22, 99, 100])
def test_without_ties_the_share_is_exact(strong):
    pair = np.random.default_rng(0).permutation(200).reshape(2, 100) / 200 + .001
    γ = suggest_threshold(*map(pd.Series, pair), 'share', strong / 100)
    assert (assign_partition(*pair, γ) == 'strong').sum() == strong


def naive_crossing(x):
    "Two normal distributions by expectation-maximisation; where both are equally likely."
    belongs = (x > x.mean()).astype(float)
    for _ in range(2000):
        weight = [1 - belongs.mean(), belongs.mean()]
        mean = [sum(b * x) / sum(b) for b in (1 - belongs, belongs)]
        variance = [sum(b * (x - m) ** 2) / sum(b) for b, m in zip((1 - belongs, belongs), mean)]
        rest, matched = (w / v ** .5 * np.exp(-(x - m) ** 2 / 2 / v) for w, m, v in zip(weight, mean, variance))
        belongs = matched / (rest + matched)
    grid = np.linspace(*mean, 20001)
    rest, matched = (w / v ** .5 * np.exp(-(grid - m) ** 2 / 2 / v) for w, m, v in zip(weight, mean, variance))
    return grid[(matched > rest).argmax()]


@pytest.mark.parametrize('seed', range(3))
def test_mixture_against_naive_expectation_maximisation(seed):
    rng = np.random.default_rng(seed)
    lower = np.where(rng.random(300) < .3, rng.normal(.75, .06, 300), rng.normal(.3, .1, 300)).clip(0, 1)
    other = rng.uniform(lower, 1)  # the higher score plays no part, whichever it is
    swap = rng.random(300) < .5
    table = pd.DataFrame({'factual': np.where(swap, lower, other), 'emotional': np.where(swap, other, lower)})[::-1]
    γ = suggest_threshold(table['factual'], table['emotional'], by='mixture')
    assert abs(γ - naive_crossing(lower)) < 2e-3


@pytest.mark.parametrize('factual, emotional, settings, says', [
    ([.1, np.nan, .3], [.1, .2, .3], {}, 'row 1 .*nan'),
    ([.1, np.nan, .3], [.1, .2, .3], {'by': 'mixture'}, 'row 1 .*nan'),
    ([.5, .5, .9], [.5, .7, .5], {}, 'lower score of each of the 3 pairs is the same'),
    ([.5, .5, .9], [.5, .7, .5], {'by': 'mixture'}, 'lower score of each of the 3 pairs is the same'),
    ([], [], {}, '0 pairs'),
    ([.1, .2], [.1], {}, 'one shape'),
    ([.1, 1.2], [.1, .2], {}, r'row 1 .*outside \[0, 1\] \(1 of 2'),
    ([.1, .2], [.1, -.2], {}, r'row 1 .*outside \[0, 1\]'),
    ([.1, .2], [.1, .2], {'strong_share': 22}, r'strong_share is 22, expected a number in \[0, 1\]'),
    ([.1, .2], [.1, .2], {'strong_share': np.nan}, 'strong_share is nan'),
    ([.1, .2], [.1, .2], {'by': 'shares'}, 'by is "shares", expected one of share, mixture'),
    (*[np.random.default_rng(0).normal(.5, np.repeat([.15, .01], 500)).clip(0, 1)] * 2, {'by': 'mixture'}, 'no two humps'),
])
def test_no_threshold_can_be_suggested(factual, emotional, settings, says):
    with pytest.raises(ValueError, match=says): suggest_threshold(factual, emotional, **settings)


def random_table(n, seed, noise=0.5):
    rng = np.random.default_rng(seed)
    truth = pd.DataFrame({'id': [f'{i:04}' for i in range(n)], 'factual': rng.integers(0, 2, n), 'emotional': rng.integers(0, 2, n)})
    truth['partition'] = assign_partition(truth['factual'], truth['emotional'])
    # rounded: ties occur, and count one half
    table = truth.assign(**{name: (truth[name] + rng.normal(0, noise, n)).clip(0, 1).round(1) for name in ('factual', 'emotional')})
    return table.assign(partition=assign_partition(table['factual'], table['emotional'], .5)), truth


@pytest.mark.parametrize('seed', range(3))
def test_quality_against_naive_loops(seed):
    table, truth = random_table(60, seed)
    found = partition_quality(table, truth)
    for name in ('factual', 'emotional'):
        wins = [(p > q) + (p == q) / 2 for p, x in zip(table[name], truth[name]) if x for q, y in zip(table[name], truth[name]) if not y]
        assert abs(found[f'auroc_{name}'] - sum(wins) / len(wins)) < 1e-12
    for i, said in enumerate(PARTITIONS):
        inside = [t for t, p in zip(truth['partition'], table['partition']) if p == said]
        held = [p for t, p in zip(truth['partition'], table['partition']) if t == said]
        assert found['precision'][said] == inside.count(said) / len(inside) and found['recall'][said] == held.count(said) / len(held)
        assert found['share'][said] == len(inside) / 60 and found['true_share'][said] == len(held) / 60
        assert [row[i] for row in found['confusion']] == [inside.count(name) for name in PARTITIONS]
    assert json.loads(json.dumps(found)) == found


def test_quality_where_it_is_not_defined():
    table, truth = random_table(20, 0)
    truth = truth.assign(factual=1, partition=assign_partition(np.ones(20), truth['emotional']))
    found = partition_quality(table.assign(partition='strong'), truth)
    assert found['auroc_factual'] is None and found['precision']['weak'] is None and found['recall']['weak'] is None
    with pytest.raises(ValueError, match='different ids'): partition_quality(table[::-1], truth)


@pytest.mark.parametrize('row, says', [
    ('0017,.9,.2,emotionl', ['row 3', 'id 0017', 'partition is "emotionl"', ', '.join(PARTITIONS), '1 of 2']),
    ('0017,.9,high,weak', ['row 3', 'emotional is "high"', '[0, 1]']),
    ('0017,1.9,.2,weak', ['row 3', 'factual is "1.9"']),
    ('0017,,.2,weak', ['row 3', 'factual is ""']),
    ('0017,nan,.2,weak', ['row 3', 'factual is "nan"']),
    ('0018,.9,.2,weak', ['rows 2, 3', '0018']),
])
def test_a_wrong_partition_file_is_named(tmp_path, row, says):
    path = tmp_path / 'partition.csv'
    path.write_text(f'id,factual,emotional,partition\n0018,0.5,1,emotional\n{row}\n')
    with pytest.raises(InputError) as error: read_partition(path)
    for part in [str(path), *says]: assert part in str(error.value)


def partition_file(path, ids):
    path.write_text('id,factual,emotional,partition\n' + ''.join(f'{i},.9,.8,strong\n' for i in ids))
    return path


@pytest.mark.parametrize('ids, says', [
    (['01', '03'], ['no row for id 02 of data/posts.csv', '1 of 3 posts are missing', 'Correct them, or delete the folder']),
    (['1', '02', '03'], ['no row for id 01', '1 of 3']),  # 01 is no number
    (['01', '02', '03', '04'], ['row 5', 'id is "04", expected an id of data/posts.csv', '1 of 4', 'Correct them']),
    (['01', '02', '03', '02'], ['rows 3, 5', 'all have the id 02', 'Give each row an id of its own']),
])
def test_a_partition_of_other_posts_is_refused(tmp_path, ids, says):
    path = partition_file(tmp_path / 'partition.csv', ids)
    with pytest.raises(InputError) as error: read_partition(path, ['01', '02', '03'])
    for part in [str(path), *says]: assert part in str(error.value)


def test_a_partition_comes_in_the_order_of_the_posts(tmp_path):
    path = partition_file(tmp_path / 'partition.csv', ['03', '01', '02'])
    assert read_partition(path, pd.Series(['01', '02', '03']))['id'].tolist() == ['01', '02', '03']
    assert read_partition(path)['id'].tolist() == ['03', '01', '02']
    assert in_post_order(path, read_table(path, ['id']), ['01', '03'], '', surplus=True)['id'].tolist() == ['01', '03']


class Evaluators:
    "Judges make_world's pictures by colour and brightness; right by construction."
    def embed_images(self, images): return images.reshape(len(images), -1, 3).mean(1)
    def top_phrases(self, images, k=3): return [', '.join([f'{"joy" if image.max() > 200 else "grief"} thing'] * k) for image in images]


class Clip(Evaluators):
    def embed_texts(self, texts): return np.array([COLOURS[text.split()[0]] for text in texts], float)


class Sentiment(Evaluators):
    def embed_texts(self, texts): return np.array([[1., 0] if 'joy' in text else [0, 1.] for text in texts])


@pytest.fixture
def run(tmp_path, monkeypatch):
    module = types.ModuleType('pacl.parts.standins')
    module.load_evaluators = lambda folder: (Clip(), Evaluators(), Sentiment())
    monkeypatch.setitem(sys.modules, 'pacl.parts.standins', module)
    run = make_world(tmp_path / 'run', bad=[7])
    run_data(run, image_size=4)
    with write_stage(run / 'standins', {'stage': 'standins'}) as folder: (folder / 'anps.txt').write_text('joy thing')
    return run


def test_run_partition(run):
    out = run_partition(run, threshold=.7, scale='clipscore')
    table, truth = read_partition(out / 'partition.csv'), read_partition(out / 'true_partition.csv')
    assert len(table) == 59 and '0007' not in set(table['id'])  # its picture was rejected
    pd.testing.assert_frame_equal(table, truth, check_dtype=False)
    quality = json.loads((out / 'quality.json').read_text())
    assert quality['auroc_factual'] == quality['auroc_emotional'] == 1 and quality['recall'] == dict.fromkeys(PARTITIONS, 1)
    assert sum(read_record(out)['result'][name] for name in PARTITIONS) == 59
    full = pd.read_csv(out / 'truth.csv', dtype={'id': str})
    assert list(full['id']) == list(table['id']) and {'object', 'emotion', 'text_object', 'text_emotion'} <= set(full)


@pytest.mark.parametrize('scale', SCALES)
def test_the_demos_evaluators_see_all_posts_at_once(run, monkeypatch, scale):
    "Features change in the seventh digit with the batch that they are in: the demo's file must not depend on shards."
    monkeypatch.setattr(partition, 'SHARD', 8)
    posts, images = load_set(run, 'posts')
    table = pd.concat([posts[['id']], score_pairs(images, posts['text'], Clip(), Evaluators(), Sentiment(), scale).round(6)], axis=1)
    table['partition'] = assign_partition(table['factual'], table['emotional'], .53)
    sizes = []
    monkeypatch.setattr(Clip, 'embed_images', lambda self, images: sizes.append(len(images)) or Evaluators.embed_images(self, images))
    out = run_partition(run, threshold=.53, scale=scale)
    assert (out / 'partition.csv').read_text() == table.to_csv(index=False) and sizes == [59]


# evaluators by name, in shards

NAMES = dict(factual='open_clip:a/b', phrases='clip-anp:list', sentences='bert')


@pytest.fixture
def asked(monkeypatch):
    "Shards of 8 posts; says which sizes the evaluators were asked for."
    monkeypatch.setattr(partition, 'SHARD', 8)
    monkeypatch.setattr(evaluators, 'load_evaluators', lambda run, factual, phrases, sentences: (Clip(), Evaluators(), Sentiment()))
    sizes = []
    embed = Clip.embed_texts
    monkeypatch.setattr(Clip, 'embed_texts', lambda self, texts: sizes.append(len(texts)) or embed(self, texts))
    return sizes


def test_shards_give_what_the_whole_gives(run, asked):
    whole = (run_partition(run, threshold=.7) / 'partition.csv').read_bytes()
    asked.clear()
    out = run_partition(run, threshold=.7, **NAMES)
    assert asked == [8] * 7 + [3] and (out / 'partition.csv').read_bytes() == whole and not (run / '.partition-parts').exists()
    assert list(read_record(out)['inputs']) == ['data']  # no stand-ins are read
    assert list(read_record(run_partition(run, **NAMES | {'sentences': 'standins'}))['inputs']) == ['data', 'standins']


def in_shard(n, asked, how):  # in the n-th call, counted from 0
    def embed(self, texts, embed=Clip.embed_texts):
        return how() if len(asked) == n else embed(self, texts)
    return embed


def test_a_killed_run_goes_on(run, asked, monkeypatch):
    def killed():
        monkeypatch.setattr(Clip, 'embed_texts', in_shard(3, asked, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        run_partition(run, scale='minmax', **NAMES)
    process = multiprocessing.get_context('fork').Process(target=killed)
    process.start(); process.join()
    assert process.exitcode == -signal.SIGKILL and len(list(run.glob('.partition-parts/*/*.npy'))) == 3
    next(run.glob('.partition-parts/*')).joinpath('000000024.0').write_bytes(b'half')  # what a kill in the middle of writing leaves
    out = run_partition(run, scale='rank', **NAMES)  # scale and threshold come later
    assert asked == [8] * 4 + [3]
    again = (out / 'partition.csv').read_bytes()
    run_partition(run, scale='minmax', **NAMES)
    assert len(asked) == 5 + 8 and (run_partition(run, scale='rank', **NAMES) / 'partition.csv').read_bytes() == again


@pytest.mark.parametrize('changed', [{'factual': 'open_clip:a/c'}, {'phrases': 'clip-anp:x'}, {'sentences': 'roberta'}, {'pool': 'max'}])
def test_other_evaluators_do_not_go_on_with_these_shards(run, asked, changed):
    score_posts(run, **NAMES, rank=0, ranks=8)
    score_posts(run, **NAMES, rank=0, ranks=8)
    assert asked == [8]
    score_posts(run, **NAMES | changed, rank=0, ranks=8)
    assert asked == [8, 8]


def test_an_error_says_which_posts(run, asked, monkeypatch):
    monkeypatch.setattr(Clip, 'embed_texts', in_shard(2, asked, lambda: np.full((8, 3), np.nan)))
    with pytest.raises(ValueError, match=r'posts from row 16 \(counted from 0\) on: row 0 .*not finite'): run_partition(run, **NAMES)


def test_processes_share_the_shards(run, asked):
    given = [(run, *NAMES.values(), 'sentence', rank, 2) for rank in range(2)]
    processes = [multiprocessing.get_context('fork').Process(target=score_posts, args=args) for args in given]
    for process in processes: process.start()
    for process in processes: process.join()
    assert [process.exitcode for process in processes] == [0, 0] and len(list(run.glob('.partition-parts/*/*.npy'))) == 8
    run_partition(run, **NAMES)
    assert not asked  # in this process nothing was left to do


def test_ranks_take_turns(run, asked):
    for rank in range(3): score_posts(run, **NAMES, rank=rank, ranks=3)
    assert asked == [8, 8, 8] + [8, 8, 3] + [8, 8]
    found = [np.load(path) for path in score_posts(run, **NAMES)]
    posts, images = load_set(run, 'posts')
    np.testing.assert_array_equal(np.concatenate(found), partition.score_cosines(images, posts['text'], Clip(), Evaluators(), Sentiment()))


def test_paths_of_the_user_are_watched(tmp_path):
    for name in ('anps.txt', 'clip.pt'): (tmp_path / name).touch()
    (tmp_path / 'bert').mkdir()
    given = dict(factual=f'open_clip:ViT-B-32/{tmp_path}/clip.pt', phrases=f'clip-anp:{tmp_path}/anps.txt', sentences=f'{tmp_path}/bert')
    assert user_paths(given) == [tmp_path / name for name in ('clip.pt', 'anps.txt', 'bert')]
    assert user_paths(given | {'factual': f'open_clip:{tmp_path}'})[0] == tmp_path
    assert user_paths(NAMES | {'factual': 'open_clip:ViT-B-32/openai', 'sentences': 'vinai/bertweet-base'}) == []


def test_truth_does_not_influence_the_partition(run):
    before = (run_partition(run, threshold=.53, scale='rank') / 'partition.csv').read_bytes()
    truth = pd.read_csv(run / 'world/truth.csv', dtype=str)
    truth[::-1].assign(id=truth['id'].to_numpy(), partition='weak').to_csv(run / 'world/truth.csv', index=False)
    run_partition(run, threshold=.54, scale='rank')
    assert (run_partition(run, threshold=.53, scale='rank') / 'partition.csv').read_bytes() == before
    (run / 'world/truth.csv').unlink()
    run_partition(run, threshold=.54, scale='rank')
    out = run_partition(run, threshold=.53, scale='rank')
    assert (out / 'partition.csv').read_bytes() == before and sorted(p.name for p in out.iterdir()) == ['partition.csv', 'stage.json']


def test_posts_of_your_own_have_no_truth(run):
    run_data(run, posts=str(run / 'world/posts'), image_size=4)  # the same ids, and yet nobody says that these are the world's
    assert not (run_partition(run, threshold=.7, scale='clipscore') / 'truth.csv').exists()


def test_a_truth_of_other_posts_is_refused(run):
    truth = pd.read_csv(run / 'world/truth.csv', dtype=str)
    truth[truth['id'] != '0009'].to_csv(run / 'world/truth.csv', index=False)
    with pytest.raises(InputError, match='truth.csv: no row for id 0009 .*1 of 59.*Delete the folder .*world'): run_partition(run)
    assert not (run / 'partition').exists()


@pytest.mark.parametrize('wrong, says', [
    ({'threshold': 1.1}, r'threshold .* is 1.1, expected a number in \[0, 1\]'),
    ({'threshold': -.1}, r'threshold .* is -0.1'),
    ({'scale': 'ranks'}, 'scale is "ranks", expected one of clipscore'),
    ({'pool': 'median'}, 'pool is "median", expected one of sentence, mean, max'),
])
def test_a_wrong_setting_stops_before_any_encoder(run, monkeypatch, wrong, says):
    for evaluator in (Clip, Evaluators, Sentiment):
        for method in ('embed_images', 'embed_texts', 'top_phrases'):
            monkeypatch.setattr(evaluator, method, lambda *_, **__: pytest.fail('an encoder ran'), raising=False)
    with pytest.raises(ValueError, match=says): run_partition(run, **wrong)
    assert not (run / 'partition').exists()


class Mixed(Evaluators):
    def top_phrases(self, images, k=3): return ['joy thing, grief thing, grief thing'] * len(images)


def test_pools(run):
    images, texts = np.full((2, 4, 4, 3), 255, np.uint8), ['red joy', 'blue grief']
    found = {pool: score_pairs(images, texts, Clip(), Mixed(), Sentiment(), pool=pool)['emotional'].tolist() for pool in POOLS}
    assert found == {'sentence': [1, 0], 'mean': [pytest.approx(1 / 3), pytest.approx(2 / 3)], 'max': [1, 1]}  # Sentiment hears joy first
    ranked = score_pairs(images, texts, Clip(), Mixed(), Sentiment(), 'rank', 'mean')['emotional']
    assert ranked.tolist() == rescale(np.array([1 / 3, 2 / 3]), 'rank').tolist()  # pooled first, scaled then
    out = run_partition(run, threshold=.7, pool='mean')
    assert read_record(out)['parameters']['pool'] == 'mean' and 'pool' in run_partition.stale(run, threshold=.7)


def test_the_emotional_score_is_a_plain_cosine_beside_clipscore(run):
    images, texts = np.full((2, 4, 4, 3), 255, np.uint8), ['red joy', 'blue grief']
    images[1, ..., 1:] = 0
    for scale in SCALES:
        found = score_pairs(images, texts, Clip(), Evaluators(), Sentiment(), scale)
        assert list(found) == ['factual', 'emotional'] and found.to_numpy().min() >= 0 and found.to_numpy().max() <= 1
    assert score_pairs(images, texts, Clip(), Evaluators(), Sentiment(), 'clipscore')['factual'].tolist() == [1, 0]


def test_figures_show_every_partition():
    table, _ = random_table(40, 0)
    labels = [text.get_text() for text in plot_partition(table, .5).legends[0].get_texts()]
    assert [label.split()[0] for label in labels] == list(PARTITIONS)
    few = table[table['partition'] != 'weak'].reset_index(drop=True)  # an empty partition leaves an empty row
    fig = plot_gallery(few, np.zeros((len(few), 4, 4, 3), np.uint8), ['a $ b'] * len(few), columns=3)
    assert len(fig.axes) == 12 and sum(len(ax.images) for ax in fig.axes) == 9
    fig.canvas.draw()


def test_figure_of_thresholds():
    table, truth = random_table(40, 0)
    sweep = threshold_sweep(table['factual'], table['emotional'], truth['partition'])
    left, right = plot_thresholds(sweep, .53).axes
    assert [line.get_label() for line in left.lines] == [*PARTITIONS, 'γ = 0.53']
    assert [line.get_label() for line in right.lines] == ['precision of strong', 'recall of strong', 'γ = 0.53']
    for name, line in zip(PARTITIONS, left.lines):
        np.testing.assert_array_equal(line.get_ydata(), sweep['share'][sweep['partition'] == name])
    assert len(plot_thresholds(sweep.drop(columns=['precision', 'recall'])).axes) == 1
