"""An epoch of pictures from the cache against decoding their files each time: milliseconds a picture.

python tests/bench_cache.py                 256 JPEGs of one megapixel at 224 px: a minute, 0.1 GB of disk
"""
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

N, SIDE, SIZE, REPEATS, THREADS = 256, 1000, 224, 5, 2


def make_photos(folder):
    "Cut from two real photos, enlarged, with a little noise as sensors have it, quality 90."
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for i in range(N):
        x, y = rng.integers(0, 127, 2).tolist()
        photo = photos[i % 2].crop((x, y, x + 300, y + 300)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        noisy = np.asarray(photo) + rng.normal(0, 4, (SIDE, SIDE, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f'{i}.jpg', quality=90)
    return pd.DataFrame({'id': range(N), 'image': [f'{i}.jpg' for i in range(N)]})


def read_plainly(path):
    with Image.open(path) as image: return np.asarray(image.convert('RGB').resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def main():
    with tempfile.TemporaryDirectory() as folder, ThreadPool(THREADS) as pool:
        folder = Path(folder)
        table = make_photos(folder)
        images, _, _ = read_images(table, folder, SIZE, folder / 'cache')
        paths = [folder / image for image in table['image']]
        ways = {
            'decoded whole by Pillow': lambda rows: pool.map(lambda i: read_plainly(paths[i]), rows),
            'decoded by read_image (draft)': lambda rows: pool.map(lambda i: read_image(paths[i].read_bytes(), SIZE), rows),
            'from the cache': lambda rows: images[rows]}
        seconds = {way: [] for way in ways}
        for seed in range(REPEATS):  # in turn; the median counts
            order = np.random.default_rng(seed).permutation(N)
            for way, read in ways.items():
                start = time.time()
                for at in range(0, N, 64): read(order[at:at + 64])
                seconds[way].append(time.time() - start)
        print(f'{N} JPEGs of {SIDE}×{SIDE} to {SIZE} px, batches of 64, random order, {THREADS} threads; files in memory')
        for way, times in seconds.items(): print(f'{way:30} {statistics.median(times) / N * 1000:7.3f} ms a picture')


if __name__ == '__main__': main()
