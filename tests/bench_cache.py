"""An epoch of pictures from the cache against decoding their files each time: seconds, and how many times faster.

python tests/bench_cache.py                 256 JPEGs of one megapixel at 224 px: a minute, 0.1 GB of disk
"""
import argparse
import statistics
import tempfile
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_sample_images

from pacl.parts.pictures import read_image, read_images


def make_photos(folder, n, side, seed):
    "Cut from two real photos, enlarged, with a little noise as sensors have it, quality 90."
    rng = np.random.default_rng(seed)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for i in range(n):
        x, y = rng.integers(0, 640 - 300), rng.integers(0, 427 - 300)
        photo = photos[i % 2].crop((x, y, x + 300, y + 300)).resize((side, side), Image.Resampling.BICUBIC)
        noisy = np.asarray(photo) + rng.normal(0, 4, (side, side, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f'{i}.jpg', quality=90)
    return pd.DataFrame({'id': [str(i) for i in range(n)], 'image': [f'{i}.jpg' for i in range(n)]})


def read_plainly(path, size):
    with Image.open(path) as image: return np.asarray(image.convert('RGB').resize((size, size), Image.Resampling.BICUBIC))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pictures', type=int, default=256, help='files (%(default)s)')
    parser.add_argument('--side', type=int, default=1000, help='of the files, pixels (%(default)s)')
    parser.add_argument('--size', type=int, default=224, help='of what the network sees, pixels (%(default)s)')
    parser.add_argument('--repeats', type=int, default=5, help='epochs of each way, in turn; the median counts (%(default)s)')
    parser.add_argument('--threads', type=int, default=2, help='that decode (%(default)s); the cache is read by one')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPool(args.threads) as pool:
        folder = Path(folder)
        table = make_photos(folder, args.pictures, args.side, 0)
        start = time.time()
        images, _, _ = read_images(table, folder, args.size, folder / 'cache')
        built = time.time() - start
        paths = [folder / image for image in table['image']]
        ways = {'decoded whole by Pillow': lambda rows: np.stack(pool.map(lambda i: read_plainly(paths[i], args.size), rows)),
                'decoded by read_image (draft)': lambda rows: np.stack(pool.map(lambda i: read_image(paths[i], args.size), rows)),
                'from the cache': lambda rows: images[rows]}
        seconds = {way: [] for way in ways}
        for seed in range(args.repeats):
            order = np.random.default_rng(seed).permutation(args.pictures)
            for way, read in ways.items():
                start = time.time()
                for at in range(0, len(order), 64): assert read(order[at:at + 64]).dtype == np.uint8
                seconds[way].append(time.time() - start)
        megapixels, kilobytes = args.side**2 / 1e6, paths[0].stat().st_size / 1000
        print(f'{args.pictures} JPEGs of {megapixels:.2g} megapixel, {kilobytes:.0f} kB, to {args.size} px, batches of 64, random order, '
              f'{args.threads} threads; files in memory. Cache built in {built:.2f} s')
        best = statistics.median(seconds['from the cache'])
        for way, times in seconds.items():
            print(f'{way:30} {statistics.median(times) / args.pictures * 1000:7.3f} ms a picture, {statistics.median(times) / best:6.1f} ×')


if __name__ == '__main__': main()
