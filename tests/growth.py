"""How time and memory grow with the posts and with the size of their pictures, stage by stage, and what much more would take.

python tests/growth.py              4,500, 9,000, 18,000 posts at 96 px, 4,500 at 192: 20 minutes; data/measured/growth.json and .png
python tests/growth.py --table      200 thousand to 2 billion posts on 4 and 64 GPUs, from what was measured

Evaluation and tables read no posts. Each stage is a process of its own; seconds of the processor, since other work may be beside it.
"""
import argparse
import json
import math
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd

from pacl.cluster import run_cluster
from pacl.parts.data import run_data
from pacl.parts.encoders import run_features
from pacl.parts.stages import figure
from pacl.parts.standins import run_standins
from pacl.parts.world import run_world
from pacl.partition import run_partition
from pacl.train import enhance

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / 'data/measured'
STAGES = ('world', 'data', 'standins', 'features', 'partition', 'clusters', 'models')
SIZES = ((4500, 96), (9000, 96), (18_000, 96), (4500, 192))  # posts, side in pixels


def calls(run, posts, side):
    "The demo's stages, with little beside the posts."
    few = dict(n_train=16, n_val=16, n_test=16, n_clean=64)
    return {'world': lambda: run_world(run, n_posts=posts, image_size=side, **few),
            'data': lambda: run_data(run, image_size=side),
            'standins': lambda: run_standins(run, text_steps=2, evaluator_epochs=1),
            'features': lambda: run_features(run),
            'partition': lambda: run_partition(run, scale='rank', threshold=.53),
            'clusters': lambda: run_cluster(run),
            'models': lambda: enhance(run, run / 'models/pacl-s0', batch_size=16)}


def used():
    "Seconds of the processor, children's too; GiB of this process at its peak, pages of mapped files among them."
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    return seconds, own.ru_maxrss / 2**20


def measure_one(stage, run, posts, side):
    (before, empty), start = used(), time.perf_counter()
    calls(run, posts, side)[stage]()
    seconds = time.perf_counter() - start
    after, full = used()
    return {'stage': stage, 'posts': posts, 'side': side, 'seconds': round(seconds, 2),
            'cpu_seconds': round(after - before, 2), 'gib': round(full - empty, 3)}


def measure():
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for posts, side in SIZES:
            run = Path(folder) / f'{posts}-{side}'
            for stage in STAGES:
                with ProcessPoolExecutor(1, get_context('fork')) as pool:  # imports are done
                    rows.append(pool.submit(measure_one, stage, run, posts, side).result())
                print(rows[-1], flush=True)
    return rows


def exponents(rows):
    "Of n, and of the pixels. What a stage takes whatever n is drops out of the differences; one that reads no posts has 0."
    found = {}
    for stage, some in pd.DataFrame(rows).groupby('stage', sort=False):
        one, two, four, larger = some['cpu_seconds']
        grows = four > 1.3 * one
        found[stage] = {'of posts': round(math.log2((four - two) / (two - one)), 2) if grows else 0.,
                        'of pixels': round(math.log(larger / one, 4), 2), 'GiB': some['gib'].round(2).tolist(),
                        'ms a post': round(1000 * (four - one) / 3 / SIZES[0][0], 1)}
    return pd.DataFrame(found).T


def plot(rows, found):
    fig = figure(8, 3.6)
    axes = fig.subplots(1, 2)
    for marker, (stage, some) in zip('osD^vP*', pd.DataFrame(rows).query('side == 96').groupby('stage', sort=False)):
        axes[0].loglog(some['posts'], some['cpu_seconds'], marker=marker, label=f'{stage}, n^{found["of posts"][stage]}')
        axes[1].semilogx(some['posts'], some['gib'], marker=marker)
    axes[0].set(xlabel='posts', ylabel='processor time (s)')
    axes[1].set(xlabel='posts', ylabel='memory beyond the start (GiB)')
    sizes = [posts for posts, side in SIZES if side == 96]
    for ax in axes:
        ax.set_xticks(sizes, list(map('{:,}'.format, sizes)))
        ax.xaxis.minorticks_off()
    fig.legend(loc='outside right center', frameon=False)
    return fig


# a second: on a GPU, assumed until data/measured/gpu.json is there; on a core, measured by bench_cache.py and bench_cluster.py
RATES = {'resnet50, training': 1000., 'resnet50, pictures': 3000., 'MiniLM, 20 words, texts': 10_000., 'decoding': 93., 'k-means': 8700.}
PASSES = 23.5  # pictures seen in 30 epochs, for each post: partitions of 22, 51 and 27 %


def scale_table():
    "Ten lines. SKEP takes 15 times the arithmetic of MiniLM; features have 1,024 and 2,048 numbers."
    rate, file = dict(RATES), MEASURED / 'gpu.json'
    if file.exists(): rate |= {row['what']: row['value'] for row in json.loads(file.read_text())['rows']}
    trained = PASSES / rate['resnet50, training']
    hours = {'decoding, 8 cores': 1 / rate['decoding'] / 8, 'three judges, a GPU': 3 / rate['resnet50, pictures'],
             'features of pictures, a GPU': 1 / rate['resnet50, pictures'],
             'features of texts, a GPU': 15 / rate['MiniLM, 20 words, texts'],
             'k-means twice, a core': 2 / rate['k-means'], 'training, 4 GPUs': trained / 4, 'training, 64 GPUs': trained / 64}
    gigabytes = {'cache of pictures, disk': 150.5e-6, 'features of pictures, memory': 8.2e-6,
                 'features of texts, memory of all processes together': 4.1e-6}
    columns = {}
    for posts in (2e5, 2e7, 2e9):
        lines = {what: f'{posts * seconds / 3600:,.1f} h' for what, seconds in hours.items()}
        columns[f'{posts:,.0f} posts'] = lines | {what: f'{posts * each:,.0f} GB' for what, each in gigabytes.items()}
    return pd.DataFrame(columns)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--table', action='store_true')
    args = parser.parse_args()
    if args.table: return print(scale_table().to_string())
    rows = measure()
    found = exponents(rows)
    record = {'rows': rows, 'exponents': found.to_dict('index')}
    (MEASURED / 'growth.json').write_text(json.dumps(record, indent=1))
    plot(rows, found).savefig(MEASURED / 'growth.png', dpi=110)
    print(found.to_string())


if __name__ == '__main__': main()
