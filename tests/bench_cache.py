"""An epoch of pictures from the cache against decoding their files each time, torchvision's ImageFolder + DataLoader among the ways.

python tests/bench_cache.py                 256 JPEGs of one megapixel at 224 px: a minute, 0.1 GB of disk
"""
import tempfile
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from pacl.parts.pictures import read_image, read_images

N, SIDE, SIZE, REPEATS, THREADS = 256, 1000, 224, 5, 2


def make_photos(folder):
    "Cut from two real photos, enlarged, with a little noise as sensors have it, quality 90."
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    (folder / 'joy').mkdir(parents=True)
    for i in range(N):
        x, y = rng.integers(0, 127, 2).tolist()
        photo = photos[i % 2].crop((x, y, x + 300, y + 300)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        noisy = np.asarray(photo) + rng.normal(0, 4, (SIDE, SIDE, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f'joy/{i}.jpg', quality=90)
    return pd.DataFrame({'id': range(N), 'image': [f'joy/{i}.jpg' for i in range(N)]})


def image_folder(folder):
    "Batches of an epoch, its workers' start included."
    resize = transforms.Resize((SIZE, SIZE), transforms.InterpolationMode.BICUBIC)
    files = ImageFolder(folder, transforms.Compose([resize, transforms.PILToTensor()]))
    return DataLoader(files, 64, shuffle=True, num_workers=THREADS)


def in_turn(ways, rounds):
    "Seconds of each of the ways, {name: call}, a row for each round."
    rows = []
    for _ in range(rounds):
        rows.append({})
        for way, call in ways.items():
            start = time.perf_counter()
            call()
            rows[-1][way] = time.perf_counter() - start
    return pd.DataFrame(rows)


def main():
    with tempfile.TemporaryDirectory() as folder, ThreadPool(THREADS) as pool:
        folder = Path(folder)
        photos = folder / 'photos'
        table = make_photos(photos)
        images, _, _ = read_images(table, photos, SIZE, folder / 'cache')
        paths = [photos / image for image in table['image']]

        def batches(): return np.random.default_rng(0).permutation(N).reshape(-1, 64)

        def drafts(rows): return pool.map(lambda i: read_image(paths[i].read_bytes(), SIZE), rows)

        ways = {'ImageFolder and DataLoader': lambda: list(image_folder(photos)),
                'decoded by read_image (draft)': lambda: [drafts(rows) for rows in batches()],
                'from the cache': lambda: [images[rows] for rows in batches()]}
        seconds = in_turn(ways, REPEATS).median()
        print(f'{N} JPEGs of {SIDE}×{SIDE} to {SIZE} px, batches of 64, random order, {THREADS} threads or workers; files in memory')
        for way in ways: print(f'{way:30} {seconds[way] / N * 1000:7.3f} ms a picture')


if __name__ == '__main__': main()
