"pacl.cluster: k-means, how tight its clusters are, and what they are compared with."
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from test_data import make_world

from pacl import cluster
from pacl.cluster import (POLARITY, check_features, cluster_agreement, cluster_features, cluster_quality, nearest_to_centre, run_cluster,
                          squared_distances)
from pacl.parts.data import in_post_order, load_set, run_data
from pacl.parts.readers import read_table
from pacl.parts.stages import InputError, digest, file_hashes, read_record, write_stage


def blobs(n=20, k=3, seed=0):
    kind = np.repeat(np.arange(k), n)
    return 10 * np.eye(k)[kind] + np.random.default_rng(seed).normal(size=(n * k, k)), kind


def test_blobs_are_found_whatever_their_number():
    features, kind = blobs()
    labels = cluster_features(features.astype(np.float32), 3)
    assert cluster_agreement(labels, kind) == {'nmi': pytest.approx(1), 'purity': 1, 'most_frequent': pytest.approx(1 / 3)}
    assert labels.dtype == int and set(labels) == {0, 1, 2}
    np.testing.assert_array_equal(labels, cluster_features(features.astype(np.float32), 3))  # the same seed, the same numbers


def test_from_one_cluster_to_one_each():
    features, _ = blobs(4)
    assert set(cluster_features(features, 1)) == {0} and len(set(cluster_features(features, 12))) == 12


@pytest.mark.parametrize('change, r, says', [
    (lambda x: x, 0, 'n_clusters .* is 0, expected 1 to 60'),
    (lambda x: x, 61, 'n_clusters .* is 61, expected 1 to 60'),
    (lambda x: np.where(np.arange(60)[:, None] == 7, np.nan, x), 2, 'row 7 .*not finite .1 of 60'),
    (lambda x: np.where(np.arange(60)[:, None] == 0, np.inf, x), 2, 'row 0 '),
    (np.ones_like, 2, 'all 60 rows .* are equal'),
    (np.sign, 20, 'only 8 groups of rows differ'),
    (lambda x: x[:, 0], 2, r'shape \(60,\), expected \(N, D\)'),
])
@pytest.mark.filterwarnings('ignore:Number of distinct clusters')
def test_what_cannot_be_clustered(change, r, says):
    features = np.concatenate([*np.meshgrid(*[[-1., 1.]] * 3)]).reshape(3, -1).T  # the corners of a cube …
    features = np.tile(features, (8, 1))[:60] * np.random.default_rng(0).uniform(1, 2, (60, 1))  # … pulled outwards
    with pytest.raises(ValueError, match=says): cluster_features(change(features), r)


def test_few_rows_as_ever():
    features, _ = blobs(50, 4)
    for r in (2, 5):
        expected = KMeans(r, n_init=10, random_state=3).fit_predict(features)
        np.testing.assert_array_equal(cluster_features(features, r, 3), expected)


@pytest.fixture
def many(monkeypatch, tmp_path):
    "600 rows in a file, where more than 100 are many, and 64 are read at a time."
    monkeypatch.setattr(cluster, 'SAMPLE', 100)
    monkeypatch.setattr(cluster, 'chunks', lambda n: [slice(at, at + 64) for at in range(0, n, 64)])
    features, kind = blobs(150, 4)
    np.save(tmp_path / 'features.npy', features.astype(np.float32))
    return np.load(tmp_path / 'features.npy', mmap_mode='r'), kind


def test_many_rows_begin_with_a_sample(many, monkeypatch):
    features, kind = many
    seen = []
    fit = KMeans.fit
    monkeypatch.setattr(KMeans, 'fit', lambda self, x, **more: seen.append((self.n_init, x.shape[0])) or fit(self, x, **more))
    labels = cluster_features(features, 4)
    assert seen == [(10, 100), (1, 600)] and cluster_agreement(labels, kind)['purity'] == 1
    np.testing.assert_array_equal(labels, cluster_features(np.array(features), 4))
    everywhere = fit(KMeans(9, n_init=10, random_state=0), np.array(features)).inertia_
    assert cluster_quality(features, cluster_features(features, 9))['inertia'] < 1.02 * everywhere


@settings(deadline=None, max_examples=30)
@given(hnp.arrays(np.float32, st.tuples(st.integers(6, 30), st.integers(1, 3)), elements=st.integers(0, 3)), st.integers(1, 8))
@pytest.mark.filterwarnings('ignore:Number of distinct clusters')
def test_no_cluster_is_empty(features, r):
    "Rows of a lattice, mostly duplicates; the sample has 5 of them."
    different = len(np.unique(features, axis=0))
    if different == 1 or r > len(features): return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, 'SAMPLE', max(5, r))
        if r > different:
            with pytest.raises(InputError, match=f'only {different} groups'): cluster_features(features, r)
        else: assert len(np.unique(cluster_features(features, r))) == r


def test_checks_read_every_part(many):
    features = np.array(many[0])
    check_features(features)
    features[590, 1] = np.inf
    with pytest.raises(ValueError, match='row 590 .*1 of 600'): check_features(features)
    features[:] = 1
    with pytest.raises(ValueError, match='all 600 rows'): check_features(features)
    features[599, 3] = 2
    check_features(features)


def test_checks_and_quality_hold_no_copy_of_the_features():
    features = np.random.default_rng(0).random((40_000, 128), np.float32)  # 20 MB
    labels = np.arange(40_000) % 3
    for work in (lambda: check_features(features), lambda: squared_distances(features, labels)):
        tracemalloc.start()
        work()
        assert tracemalloc.get_traced_memory()[1] < features.nbytes
        tracemalloc.stop()


@pytest.mark.parametrize('r', [1, 2, 5, 60])
def test_quality_against_naive_loops(r):
    features, _ = blobs()
    features = features.astype(np.float32)
    found = KMeans(r, n_init=1, tol=0, random_state=0).fit(features)
    quality = cluster_quality(features, found.labels_)
    members = [[row.astype(float) for row, label in zip(features, found.labels_) if label == c] for c in range(r)]
    inertia = sum(float(sum((row - sum(rows) / len(rows)) ** 2)) for rows in members for row in rows)
    assert quality['inertia'] == pytest.approx(inertia, rel=1e-9, abs=1e-9) == pytest.approx(found.inertia_, rel=1e-5, abs=1e-9)
    assert quality['sizes'] == [len(rows) for rows in members]
    if r in (1, 60): assert quality['silhouette'] is None
    else: assert quality['silhouette'] == pytest.approx(silhouette_score(features, found.labels_), abs=1e-6)
    assert json.loads(json.dumps(quality)) == quality


def test_silhouette_of_a_sample():
    features, kind = blobs(100)
    expected = silhouette_score(features, kind, sample_size=50, random_state=4)
    assert cluster_quality(features, kind, seed=4, sample=50)['silhouette'] == expected
    rare = np.zeros(300, int)
    rare[0] = 1
    assert cluster_quality(features, rare, sample=20)['silhouette'] is None  # the sample has one cluster only


def test_agreement_against_a_naive_count():
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 4, 80), rng.choice(['a', 'b', 'c'], 80)
    right = sum(max(sum(t == name for t in truth[labels == c]) for name in 'abc') for c in range(4))
    p = {(c, t): np.mean((labels == c) & (truth == t)) for c in range(4) for t in 'abc'}
    shared = sum(q * np.log(q / (np.mean(labels == c) * np.mean(truth == t))) for (c, t), q in p.items() if q)
    entropy = [-sum(q * np.log(q) for q in pd.Series(x).value_counts(normalize=True)) for x in (labels, truth)]
    found = cluster_agreement(labels, truth)
    assert found['purity'] == right / 80 and abs(found['nmi'] - shared / np.mean(entropy)) < 1e-9
    assert cluster_agreement(np.zeros(80), truth)['purity'] == found['most_frequent'] == max(np.mean(truth == t) for t in 'abc')


def test_nearest_to_centre():
    features = np.array([[0.], [1], [5], [10], [11], [15]])
    assert [rows.tolist() for rows in nearest_to_centre(features, np.array([1, 1, 1, 0, 0, 0]), 2)] == [[4, 3], [1, 0]]


def test_polarity_is_four_and_four():
    assert sorted(POLARITY.values()) == ['negative'] * 4 + ['positive'] * 4


@pytest.fixture
def run(tmp_path):
    run = make_world(tmp_path / 'run', bad=[3])
    run_data(run, image_size=4)
    posts, images = load_set(run, 'posts')
    with write_stage(run / 'features', {'stage': 'features'}) as folder:
        np.save(folder / 'image.npy', images.reshape(len(images), -1).astype(np.float32))
        np.save(folder / 'text.npy', np.array([[text.endswith('joy'), 0] for text in posts['text']], np.float32))
    return run


def test_run_cluster(run):
    out = run_cluster(run, n_clusters=2, seed=0)
    table = pd.read_csv(out / 'clusters.csv', dtype={'id': str})
    posts = load_set(run, 'posts')[0]
    assert list(table) == ['id', 'factual_cluster', 'emotional_cluster'] and list(table['id']) == list(posts['id'])
    assert cluster_agreement(table['emotional_cluster'], posts['text'].str.endswith('joy'))['purity'] == 1
    result, quality = read_record(out)['result'], json.loads((out / 'quality.json').read_text())
    assert sum(result['factual_cluster']) == 59 and result['emotional_cluster'] == quality['emotional_cluster']['sizes']
    assert result['emotional_silhouette'] == quality['emotional_cluster']['silhouette'] == pytest.approx(1)
    assert quality['factual_cluster'] == cluster_quality(np.load(run / 'features/image.npy'), table['factual_cluster'])
    assert run_cluster.stale(run, n_clusters=2, seed=0) is None and 'n_clusters' in run_cluster.stale(run, n_clusters=3, seed=0)


def test_features_of_other_posts_are_refused(run):
    np.save(run / 'features/text.npy', np.eye(58, dtype=np.float32))
    with pytest.raises(InputError, match='text.npy has 58 rows, data/posts.csv 59'): run_cluster(run, n_clusters=2, seed=0)
    assert not (run / 'clusters').exists()


def test_features_made_of_other_posts_are_refused(run):
    with write_stage(run / 'features', {'stage': 'features', 'inputs': {'data': digest(file_hashes(run / 'data'))}}) as folder:
        for name in ('image', 'text'): np.save(folder / f'{name}.npy', np.eye(59, 3, dtype=np.float32))
    run_cluster(run, n_clusters=2, seed=0)
    posts = pd.read_csv(run / 'data/posts.csv', dtype=str)
    posts[::-1].to_csv(run / 'data/posts.csv', index=False)  # as many rows as before, and yet each has another post's features
    with pytest.raises(InputError, match='features was made of other posts than .*data holds now. Delete .*features'):
        run_cluster(run, seed=1)


@pytest.mark.parametrize('name, change, says', [
    ('image', lambda x: x * 0 + 3, 'image.npy: all 59 rows of the features are equal.*Delete .*features'),
    ('text', lambda x: np.where(np.arange(59)[:, None] == 8, np.nan, x), 'text.npy: row 8 .*not finite .1 of 59.*Delete .*features'),
])
def test_features_that_cannot_be_clustered_stop_before_k_means(run, monkeypatch, name, change, says):
    monkeypatch.setattr(cluster, 'cluster_features', lambda *_: pytest.fail('k-means began'))
    path = run / f'features/{name}.npy'
    np.save(path, change(np.load(path)))
    with pytest.raises(InputError, match=says): run_cluster(run, n_clusters=2, seed=0)
    assert not (run / 'clusters').exists()


@pytest.mark.parametrize('r', [0, 60])
def test_r_outside_of_1_to_n(run, r):
    with pytest.raises(InputError, match=f'n_clusters .r. is {r}, expected 1 to 59'): run_cluster(run, n_clusters=r)


@pytest.mark.parametrize('change, says', [
    (lambda t: t[t['id'] != '0009'], 'clusters.csv: no row for id 0009 of data/posts.csv .1 of 59.*Delete'),
    (lambda t: pd.concat([t, t[:1].assign(id='9')]), 'clusters.csv, row 61 .*id is "9", expected an id of data/posts.csv'),
    (lambda t: pd.concat([t, t[:1]]), 'clusters.csv, rows 2, 61: all have the id 0000'),
])
def test_clusters_of_other_posts_are_refused(run, change, says):
    "As the Run cell reads them."
    path = run_cluster(run) / 'clusters.csv'
    change(pd.read_csv(path, dtype=str)).to_csv(path, index=False)
    with pytest.raises(InputError, match=says): in_post_order(path, read_table(path, ['id']), load_set(run, 'posts')[0]['id'], 'Delete it.')


def test_the_benchmark_runs():
    bench = Path(__file__).with_name('bench_cluster.py')
    command = [sys.executable, bench, '--rows', '20100', '--dim', '8', '--clusters', '3', '--only', 'pacl', 'quality']
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line[54:].split()[0] for line in lines[2:]] == ['3'] * 2 and all(float(line[54:].split()[3]) >= 1 for line in lines[2:])
