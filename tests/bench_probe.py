"""Linear evaluation beside what one would use instead: seconds, and accuracy on test pictures.

python tests/bench_probe.py                 EfficientNet-Lite0, 96 px, three times 256 pictures, 8 classes: a minute

pacl        features once, then 40 epochs of a head; the epoch is chosen on the validation pictures
sklearn     features once, then LogisticRegression
each epoch  the pictures pass the frozen backbone in each of the 40 epochs, as timm's and lightly's loops do without augmentation
"""
import time

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from pacl.evaluate import extract, linear_probe
from pacl.parts.encoders import load_backbone
from pacl.parts.readers import single

TASK, EPOCHS = single('abcdefgh'), 40


def make_split(n, rng):
    "Noise whose brightness tells the label, mostly."
    y = rng.integers(8, size=(n, 1))
    brightness = 24 + 4 * (y + rng.normal(size=(n, 1)))[..., None, None]
    return (rng.random((n, 96, 96, 3)) * brightness).clip(0, 255).astype(np.uint8), y


def each_epoch(backbone, train, test):
    head = torch.nn.Linear(backbone.num_features, 8)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(train[1]) // 64)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train[1])).split(64):
            loss = F.cross_entropy(head(extract(train[0][rows.numpy()], backbone)), torch.from_numpy(train[1][rows, 0]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head(extract(test[0], backbone)).argmax(1).numpy()


def main():
    torch.set_num_threads(1)  # as the stage uses for each encoder
    rng = np.random.default_rng(0)
    backbone = load_backbone('tf_efficientnet_lite0').requires_grad_(False)
    splits = [make_split(n, rng) for n in (256, 256, 256)]
    train, val, test = splits

    def pacl():
        (a, b, c) = ((extract(x, backbone).numpy(), y) for x, y in splits)
        return linear_probe(a, b, c[0], TASK, epochs=EPOCHS)[:, 0]

    def sklearn():
        learner = LogisticRegression(max_iter=1000).fit(extract(train[0], backbone).numpy(), train[1][:, 0])
        return learner.predict(extract(test[0], backbone).numpy())

    ways = {'pacl': pacl, 'sklearn': sklearn, 'each epoch': lambda: each_epoch(backbone, train, test)}
    for way, call in ways.items():
        start = time.perf_counter()
        right = call() == test[1][:, 0]
        print(f'{way:10} {time.perf_counter() - start:7.1f} s, accuracy {right.mean():.3f}', flush=True)


if __name__ == '__main__': main()
