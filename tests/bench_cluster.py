"""k-means at TumEmo's size (§3.2): time, memory beyond the memory-mapped features, and inertia beside scikit-learn’s own ways.

python tests/bench_cluster.py       200,000 × 2,048, r = 2 and 25: 10 minutes, 1.6 GB of disk
"""
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits

from pacl.cluster import cluster_features

WAYS = {
    'all': 'KMeans, 10 starts on all rows',
    'mini': 'MiniBatchKMeans, 10 starts',
    'pacl': 'cluster_features: 10 starts on 20,000 rows, then all'}


def make_features(path, rows, dim):
    "Like the pooled features of a ResNet: 50 kinds in 64 dimensions, projected up, with noise, negative values cut off."
    rng = np.random.default_rng(0)
    kinds, up = rng.standard_normal((50, 64), np.float32), rng.standard_normal((64, dim), np.float32) / 8
    features = np.lib.format.open_memmap(path, 'w+', np.float32, (rows, dim))
    for at in range(0, rows, 4096):
        part = features[at:at + 4096]
        low = kinds[rng.integers(50, size=len(part))] + rng.standard_normal((len(part), 64), np.float32)
        part[:] = np.maximum(low @ up + rng.standard_normal(part.shape, np.float32) / 2, 0)


def anonymous_memory():  # GiB; pages of the mapped file do not count
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith('RssAnon')) / 2**20


def measure(path, way, r):
    "In a process of its own. Prints r, seconds, peak of anonymous memory, inertia and the smallest cluster."
    features, peak, done = np.load(path, mmap_mode='r'), [0], threading.Event()

    def watch():
        while not done.wait(.02): peak[0] = max(peak[0], anonymous_memory())
    threading.Thread(target=watch).start()
    start = time.time()
    if way == 'pacl': labels = cluster_features(features, r)
    else:
        learner = KMeans if way == 'all' else MiniBatchKMeans
        with threadpool_limits(1): labels = learner(r, n_init=10, random_state=0).fit_predict(features)
    seconds = time.time() - start
    done.set()
    sizes = np.bincount(labels)
    inertia = sum(n * features[labels == cluster].var(0, dtype=float).sum() for cluster, n in enumerate(sizes))
    print(f'{WAYS[way]:54} {r:3} {seconds:8.1f} {peak[0]:6.2f} {inertia:12.6g} {min(sizes):17,}', flush=True)


def main():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'features.npy'
        make_features(path, 200_000, 2048)
        print(f'{"":54} {"r":>3} {"seconds":>8} {"GiB":>6} {"inertia":>12} {"smallest cluster":>17}', flush=True)
        for r in (2, 25):
            for way in WAYS:
                with ProcessPoolExecutor(1, get_context('spawn')) as pool: pool.submit(measure, path, way, r).result()


if __name__ == '__main__': main()
