"""k-means at TumEmo's size (§3.2): time, memory beyond the memory-mapped features, and inertia beside scikit-learn’s own ways and faiss.

python tests/bench_cluster.py                                   200,000 × 2,048, r = 2 and 25: 12 minutes, 1.6 GB of disk
python tests/bench_cluster.py --rows 30000 --only pacl mini     a minute; `faiss` needs pip install faiss-cpu
"""
import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

WAYS = {
    'all': 'KMeans, 10 starts on all rows',
    'mini': 'MiniBatchKMeans, 10 starts',
    'pacl': 'cluster_features: 10 starts on 20,000 rows, then all',
    'pacl2': 'the same with 2 threads',
    'faiss': 'faiss, 10 starts on 256 rows a cluster'}


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


def by_faiss(features, r):
    import faiss
    faiss.omp_set_num_threads(1)
    features = np.ascontiguousarray(features)  # it reads no mapped file
    starts = faiss.Kmeans(features.shape[1], r, nredo=10, seed=0)
    starts.train(features)
    return starts.index.search(features, 1)[1][:, 0]


def measure(path, way, r):
    "In a process of its own. Prints r, seconds, peak of anonymous memory, inertia and the smallest cluster."
    import threadpoolctl
    from sklearn.cluster import KMeans, MiniBatchKMeans

    from pacl.cluster import cluster_features, cluster_quality

    features, peak, done = np.load(path, mmap_mode='r'), [0], threading.Event()

    def watch():
        while not done.wait(.02): peak[0] = max(peak[0], anonymous_memory())
    limits, threads = threadpoolctl.threadpool_limits, 2 if way == 'pacl2' else 1
    threadpoolctl.threadpool_limits = lambda n: limits(threads)  # cluster_features asks for one
    threading.Thread(target=watch).start()
    start = time.time()
    if way.startswith('pacl'): labels = cluster_features(features, r)
    elif way == 'faiss': labels = by_faiss(features, r)
    else:
        with limits(1): labels = (KMeans if way == 'all' else MiniBatchKMeans)(r, n_init=10, random_state=0).fit_predict(features)
    seconds = time.time() - start
    done.set()
    quality = cluster_quality(features, labels)
    print(f'{WAYS[way]:54} {r:3} {seconds:8.1f} {peak[0]:6.2f} {quality["inertia"]:12.6g} {min(quality["sizes"]):17,}', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=200_000, help='posts, > 20,000 to see the two steps')
    parser.add_argument('--dim', type=int, default=2048, help='features of each')
    parser.add_argument('--clusters', type=int, nargs='+', default=[2, 25], metavar='R')
    parser.add_argument('--only', nargs='+', choices=WAYS, default=list(WAYS)[:-1])
    parser.add_argument('--measure', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure: return measure(args.measure[0], args.measure[1], int(args.measure[2]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'features.npy'
        make_features(path, args.rows, args.dim)
        print(f'{"":54} {"r":>3} {"seconds":>8} {"GiB":>6} {"inertia":>12} {"smallest cluster":>17}', flush=True)
        for r in args.clusters:
            for way in args.only: subprocess.run([sys.executable, __file__, '--measure', path, way, str(r)], check=True)


if __name__ == '__main__': main()
