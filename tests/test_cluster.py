"pacl.cluster: k-means, and features that cannot be clustered."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.cluster import KMeans
from test_data import make_world

from pacl import cluster
from pacl.cluster import cluster_features, run_cluster
from pacl.parts.data import load_set, run_data
from pacl.parts.stages import InputError, input_digest, read_record, write_stage


def blobs(n=20, k=3):
    kind = np.repeat(np.arange(k), n)
    return (10 * np.eye(k)[kind] + np.random.default_rng(0).normal(size=(n * k, k))).astype(np.float32), kind


def purity(labels, kind): return pd.crosstab(labels, kind).max(axis=1).sum() / len(kind)


def test_blobs_are_found_whatever_their_number():
    features, kind = blobs()
    labels = cluster_features(features, 3)
    assert purity(labels, kind) == 1 and labels.dtype == int and set(labels) == {0, 1, 2}
    assert set(cluster_features(features, 1)) == {0} and len(set(cluster_features(features, 60))) == 60


def test_many_rows_begin_with_a_sample(monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, 'SAMPLE', 100)
    features, kind = blobs(150, 4)
    np.save(tmp_path / 'features.npy', features)
    labels = cluster_features(np.load(tmp_path / 'features.npy', mmap_mode='r'), 4)
    assert purity(labels, kind) == 1 and (labels == cluster_features(features, 4)).all()
    everywhere = KMeans(9, n_init=10, random_state=0).fit(features).inertia_
    labels = cluster_features(features, 9)
    assert sum(((rows - rows.mean(0)) ** 2).sum() for rows in (features[labels == c] for c in range(9))) < 1.02 * everywhere


@settings(deadline=None, max_examples=30)
@given(hnp.arrays(np.float32, st.tuples(st.integers(6, 30), st.integers(1, 3)), elements=st.integers(0, 3)), st.integers(1, 6))
@pytest.mark.filterwarnings('ignore:Number of distinct clusters')
def test_no_cluster_is_empty(features, r):
    "Rows of a lattice, mostly duplicates; the sample has 6 of them."
    different = len(np.unique(features, axis=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, 'SAMPLE', 6)
        if 1 < different < r:
            with pytest.raises(InputError, match=f'only {different} groups'): cluster_features(features, r)
        elif different > 1: assert len(np.unique(cluster_features(features, r))) == r


@pytest.fixture
def run(tmp_path):
    run = make_world(tmp_path / 'run', bad=[3])
    run_data(run, image_size=4)
    posts, images = load_set(run, 'posts')
    with write_stage(run / 'features', {'inputs': {'data': input_digest(run, 'data')}}) as folder:
        np.save(folder / 'image.npy', images.reshape(len(images), -1).astype(np.float32))
        np.save(folder / 'text.npy', np.array([[text.endswith('joy'), 0] for text in posts['text']], np.float32))
    return run


def test_run_cluster(run):
    out = run_cluster(run)
    table = pd.read_csv(out / 'clusters.csv', dtype={'id': str})
    posts = load_set(run, 'posts')[0]
    assert list(table) == ['id', 'factual_cluster', 'emotional_cluster'] and list(table['id']) == list(posts['id'])
    assert purity(table['emotional_cluster'], posts['text'].str.endswith('joy')) == 1
    assert read_record(out)['result']['emotional_cluster'] == np.bincount(table['emotional_cluster']).tolist()


@pytest.mark.filterwarnings('ignore:Number of distinct clusters')
@pytest.mark.parametrize('name, change, r, says', [
    ('text', lambda x: x, 0, 'n_clusters .* is 0, expected 1 to 59'),
    ('text', lambda x: x, 60, 'n_clusters .* is 60, expected 1 to 59'),
    ('image', lambda x: x * 0 + 3, 2, 'image.npy: .* only 1 groups of rows differ.*Look at the encoder'),
    ('text', lambda x: np.where(np.arange(59)[:, None] == 8, np.inf, x), 2, 'text.npy: row 8 .*not finite.*Look at the encoder'),
])
def test_features_that_cannot_be_clustered(run, name, change, r, says):
    path = run / f'features/{name}.npy'
    np.save(path, change(np.load(path)))
    with pytest.raises(InputError, match=says): run_cluster(run, n_clusters=r)
    assert not (run / 'clusters').exists()


def test_features_made_of_other_posts_are_refused(run):
    run_cluster(run, seed=0)
    posts = pd.read_csv(run / 'data/posts.csv', dtype=str)
    posts[::-1].to_csv(run / 'data/posts.csv', index=False)  # as many rows as before, and yet each has another post's features
    with pytest.raises(InputError, match='features was made of other posts'): run_cluster(run, seed=1)
