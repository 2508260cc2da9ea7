"pacl.cluster: k-means and what its clusters are compared with."
import numpy as np
import pandas as pd
import pytest
from test_data import make_world

from pacl.cluster import POLARITY, cluster_agreement, cluster_features, nearest_to_centre, run_cluster
from pacl.data import load_set, run_data
from pacl.stages import InputError, read_record, write_stage


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
    (np.sign, 20, 'only 8 rows of the features differ'),
])
@pytest.mark.filterwarnings('ignore:Number of distinct clusters')
def test_what_cannot_be_clustered(change, r, says):
    features = np.concatenate([*np.meshgrid(*[[-1., 1.]] * 3)]).reshape(3, -1).T  # the corners of a cube …
    features = np.tile(features, (8, 1))[:60] * np.random.default_rng(0).uniform(1, 2, (60, 1))  # … pulled outwards
    with pytest.raises(ValueError, match=says): cluster_features(change(features), r)


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
    assert sum(read_record(out)['result']['factual_cluster']) == 59
    assert run_cluster.stale(run, n_clusters=2, seed=0) is None and 'n_clusters' in run_cluster.stale(run, n_clusters=3, seed=0)


def test_features_of_other_posts_are_refused(run):
    np.save(run / 'features/text.npy', np.eye(58, dtype=np.float32))
    with pytest.raises(InputError, match='text.npy has 58 rows, data/posts.csv 59'): run_cluster(run, n_clusters=2, seed=0)
    assert not (run / 'clusters').exists()
