"""Linear evaluation beside what one would use instead: seconds, and accuracy on test pictures.

python tests/bench_probe.py                 EfficientNet-Lite0, 96 px, 256 + 64 + 256 pictures, 8 classes: four minutes

pacl        features once, then 40 epochs of a head; the epoch is chosen on the validation pictures
sklearn     features once, then LogisticRegression
each epoch  the pictures pass the frozen backbone in each of the 40 epochs, as timm's and lightly's loops do without augmentation
"""
import argparse
import time

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from pacl.evaluate import extract, linear_probe
from pacl.parts.encoders import load_backbone
from pacl.parts.readers import single

TASK = single('abcdefgh')


def make_split(n, rng):
    "Noise whose brightness tells the label, mostly."
    y = rng.integers(8, size=(n, 1))
    brightness = 24 + 4 * (y + rng.normal(size=(n, 1)))[..., None, None]
    return (rng.random((n, 96, 96, 3)) * brightness).clip(0, 255).astype(np.uint8), y


def each_epoch(backbone, train, test, epochs):
    head = torch.nn.Linear(backbone.num_features, 8)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train[1]) // 64)
    for _ in range(epochs):
        for rows in torch.randperm(len(train[1])).split(64):
            loss = F.cross_entropy(head(extract(train[0][rows.numpy()], backbone)), torch.from_numpy(train[1][rows, 0]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head(extract(test[0], backbone)).argmax(1).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=40, help='of the heads (%(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(1)  # as the stage uses for each encoder
    rng = np.random.default_rng(0)
    backbone = load_backbone('tf_efficientnet_lite0').requires_grad_(False)
    splits = [make_split(n, rng) for n in (256, 64, 256)]
    train, val, test = splits

    def pacl():
        (a, b, c) = ((extract(x, backbone).numpy(), y) for x, y in splits)
        return linear_probe(a, b, c[0], TASK, epochs=args.epochs)[:, 0]

    def sklearn():
        learner = LogisticRegression(max_iter=1000).fit(extract(train[0], backbone).numpy(), train[1][:, 0])
        return learner.predict(extract(test[0], backbone).numpy())

    ways = {'pacl': pacl, 'sklearn': sklearn, 'each epoch': lambda: each_epoch(backbone, train, test, args.epochs)}
    for way, call in ways.items():
        start = time.perf_counter()
        predictions = call()
        seconds = time.perf_counter() - start
        print(f'{way:10} {seconds:7.1f} s, accuracy {(predictions == test[1][:, 0]).mean():.3f}', flush=True)


if __name__ == '__main__': main()
