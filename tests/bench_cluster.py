"""k-means at TumEmo's size (§3.2): time, memory beyond the memory-mapped features and inertia of four ways to run it.

python tests/bench_cluster.py                                   200,000 × 2,048, r = 2 and 25: 12 minutes, 1.6 GB of disk
python tests/bench_cluster.py --rows 30000 --only pacl mini     a minute
"""
import argparse
import json
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
    'quality': 'cluster_quality of these clusters'}


def make_features(path, rows, dim, seed):
    "Like the pooled features of a ResNet: 50 kinds in 64 dimensions, projected up, with noise, negative values cut off."
    rng = np.random.default_rng(seed)
    kinds, up = rng.standard_normal((50, 64), np.float32), rng.standard_normal((64, dim), np.float32) / 8
    features = np.lib.format.open_memmap(path, 'w+', np.float32, (rows, dim))
    for at in range(0, rows, 4096):
        part = features[at:at + 4096]
        low = kinds[rng.integers(50, size=len(part))] + rng.standard_normal((len(part), 64), np.float32)
        part[:] = np.maximum(low @ up + rng.standard_normal(part.shape, np.float32) / 2, 0)


def anonymous_memory():  # GiB; pages of the mapped file do not count
    with open('/proc/self/status') as status: return next(int(line.split()[1]) for line in status if line.startswith('RssAnon')) / 2**20


def measure(path, way, r, seed, labels_file):
    "In a process of its own: seconds, peak of anonymous memory (Python and libraries included), inertia. Prints json."
    import threadpoolctl
    from sklearn.cluster import KMeans, MiniBatchKMeans

    from pacl.cluster import cluster_features, cluster_quality, squared_distances

    features, peak, done = np.load(path, mmap_mode='r'), [0], threading.Event()

    def watch():
        while not done.wait(.02): peak[0] = max(peak[0], anonymous_memory())
    one, threads = threadpoolctl.threadpool_limits, 2 if way == 'pacl2' else 1
    threadpoolctl.threadpool_limits = lambda n: one(threads)  # cluster_features asks for one
    labels = np.load(labels_file) if way == 'quality' else None
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.time()
    if way == 'quality': cluster_quality(features, labels, seed)
    elif way.startswith('pacl'): labels = cluster_features(features, r, seed)
    else:
        with one(1): labels = (KMeans if way == 'all' else MiniBatchKMeans)(r, n_init=10, random_state=seed).fit_predict(features)
    seconds = time.time() - start
    done.set()
    watcher.join()
    differ = None
    if way == 'pacl': np.save(labels_file, labels)
    if way == 'pacl2' and Path(labels_file).exists(): differ = int((np.load(labels_file) != labels).sum())
    sizes = np.bincount(labels, minlength=r)
    print(json.dumps({'seconds': seconds, 'memory': peak[0], 'inertia': squared_distances(features, labels).sum(),
                      'smallest': int(sizes.min()), 'differ': differ}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=200_000, help='posts, > 20,000 to see the two steps (%(default)s)')
    parser.add_argument('--dim', type=int, default=2048, help='features of each (%(default)s)')
    parser.add_argument('--clusters', type=int, nargs='+', default=[2, 25], metavar='R', help='(%(default)s)')
    parser.add_argument('--only', nargs='+', choices=WAYS, default=list(WAYS), help='; '.join(f'{k}: {v}' for k, v in WAYS.items()))
    parser.add_argument('--seed', type=int, default=0, help='of features and starts (%(default)s)')
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure: return measure(*json.loads(args.measure))
    with tempfile.TemporaryDirectory() as folder:
        path = f'{folder}/features.npy'
        make_features(path, args.rows, args.dim, args.seed)
        print(f'{args.rows:,} × {args.dim:,} float32 on disk, {args.rows * args.dim * 4 / 2**30:.2f} GiB. '
              'Column GiB: the most memory beyond that, 0.1 of it Python itself; inertia: relative to the best')
        print(f'{"":54} {"r":>3} {"seconds":>8} {"GiB":>6} {"inertia":>8} {"smallest cluster":>17}', flush=True)
        for r in args.clusters:
            found = {}
            for way in args.only:
                if way == 'quality' and 'pacl' not in found: continue
                job = json.dumps([path, way, r, args.seed, f'{folder}/labels-{r}.npy'])
                ended = subprocess.run([sys.executable, __file__, '--measure', job], stdout=subprocess.PIPE, text=True)
                if ended.returncode: sys.exit(f'{WAYS[way]}, r = {r}: exit code {ended.returncode}')
                found[way] = json.loads(ended.stdout)
            best = min(f['inertia'] for f in found.values())
            for way, f in found.items():
                print(f'{WAYS[way]:54} {r:3} {f["seconds"]:8.1f} {f["memory"]:6.2f} {f["inertia"] / best:8.4f} {f["smallest"]:17,}',
                      '' if f['differ'] is None else f'  {f["differ"]:,} labels differ', flush=True)


if __name__ == '__main__': main()
