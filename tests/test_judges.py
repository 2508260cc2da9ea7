"pacl.parts.judges: open_clip's own numbers, Caffe's numbers by a network in NumPy, and files that say what is wrong with them."
import shutil

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from safetensors.torch import save_file
from scipy.special import softmax
from sklearn.preprocessing import normalize
from test_hub import TINY, Payload, make_clip

from pacl.parts.data import run_data
from pacl.parts.encoders import load_backbone, run_frozen, save_backbone
from pacl.parts.judges import (
    ClipPhrases, ImageNetNames, OpenClip, SentiBank, Valence, fit_valence, load_judges, load_open_clip, rated_pictures,
    read_pairs, resized)
from pacl.parts.stages import InputError, write_stage

pytestmark = pytest.mark.usefixtures('one_thread')
PICTURES = np.random.default_rng(0).integers(60, 200, (5, 40, 40, 3), np.uint8)  # beyond, Pillow clips between its two passes
TEXTS = ['a red dog', '', 'so happy! ' * 60]


@pytest.fixture(scope='module')
def hub_folder(tmp_path_factory): return make_clip(tmp_path_factory.mktemp('hub'))


# open_clip

@torch.no_grad()
def test_embeddings_are_those_of_open_clip(hub_folder):
    model, _, transform = open_clip.create_model_and_transforms(f'local-dir:{hub_folder}')
    x = torch.stack([transform(Image.fromarray(picture)) for picture in PICTURES])
    images = model.eval().encode_image(x, normalize=True).numpy()
    texts = model.encode_text(open_clip.get_tokenizer(f'local-dir:{hub_folder}')(TEXTS), normalize=True).numpy()
    clip = OpenClip(f'open_clip:{hub_folder}')
    np.testing.assert_allclose(clip.embed_texts(TEXTS), texts, atol=1e-6)
    np.testing.assert_allclose(clip.embed_images(PICTURES), images, atol=2e-3)  # 40 → 32 pixels: Pillow differs by one at times
    assert np.abs(clip.embed_images(PICTURES[::-1]) - images).max() > .02  # nothing old is given


def test_weights_go_with_the_activation_that_they_learnt_with(tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, 'ViT-B-32', TINY)
    save_file(open_clip.CLIP(**TINY).state_dict(), tmp_path / 'openai.safetensors')
    monkeypatch.setattr(open_clip.factory, 'download_pretrained', lambda *args, **more: str(tmp_path / 'openai.safetensors'))
    for name, activation in (('openai', 'QuickGELU'), ('laion2b_e16', 'GELU'), (f'{tmp_path}/openai.safetensors', 'GELU')):
        clip = load_open_clip(f'open_clip:ViT-B-32/{name}')
        assert {type(m).__name__ for m in clip.modules() if 'GELU' in type(m).__name__} == {activation}


@pytest.mark.parametrize('name', [
    'ViT-B-32', 'ViT-B-32/opnai', 'ViT-B-33/openai', 'ViT-B-32/{}/cut.safetensors', 'ViT-B-32/{}/pickle.pt', '{}'])
def test_weights_that_cannot_be_had(tmp_path, monkeypatch, name):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, 'ViT-B-32', TINY)
    (tmp_path / 'cut.safetensors').write_bytes(b'\x10')
    torch.save({'x': Payload(tmp_path / 'created')}, tmp_path / 'pickle.pt')
    name = name.format(tmp_path)
    with pytest.raises(InputError, match=f'open_clip:{name} cannot be loaded'):
        load_open_clip(f'open_clip:{name}')
    assert not (tmp_path / 'created').exists()


# adjective-noun pairs

@pytest.mark.parametrize('file, text, says', [
    ('none.txt', b'', 'none.txt.*No such file'),
    ('a.txt', b'a_b\nc_d\nold city\n', 'a.txt: entry 3 is "old"'),
    ('a.txt', b'a_b\nc,_d\ne_f\n', 'entry 2'),
    ('a.json', b'["a_b", "c_d"', 'a.json.*delimiter'),
])
def test_a_wrong_list_is_named(tmp_path, file, text, says):
    (tmp_path / file.replace('none', 'other')).write_bytes(text)
    with pytest.raises(InputError, match=f'{says}.*Expected one adjective_noun'):
        read_pairs(tmp_path / file)


def test_clip_anp_takes_the_nearest_prompts(hub_folder):
    clip = OpenClip(f'open_clip:{hub_folder}')
    pairs = ['gloomy cat', 'happy dog', 'calm sea', 'old house']
    cosines = clip.embed_images(PICTURES) @ clip.embed_texts([f'a photo of a {pair}' for pair in pairs]).T
    sentences = np.array(pairs)[np.argsort(-cosines)[:, :3]]
    assert ClipPhrases(clip, pairs).top_phrases(PICTURES) == [*map(', '.join, sentences)]


# Caffe: a writer of its wire format, a network in NumPy

def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def field(number, value):  # an int, or bytes: text, packed numbers, a message
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def blob(array):
    sides = (1,) * (4 - array.ndim) + array.shape
    shape = b''.join(field(number, side) for number, side in enumerate(sides, 1))
    return shape + field(5, array.astype('<f4').tobytes()) + field(6, bytes(8))  # 6: gradients


def caffemodel(weights):
    net = field(1, b'CaffeNet') + field(2, field(4, b'data'))  # a layer without weights
    arrays = iter(weights.items())
    for (name, weight), (_, bias) in zip(arrays, arrays):
        about = field(3, b'below') + field(4, name.removesuffix('.weight').encode())
        net += field(2, about + field(6, blob(weight)) + field(6, blob(bias)))
    return net


def random_weights():
    "Groups of unequal inputs and outputs."
    rng, weights = np.random.default_rng(0), {}
    shapes = {'conv1': (4, 3, 11, 11), 'conv2': (6, 2, 5, 5), 'conv3': (4, 6, 3, 3), 'conv4': (6, 2, 3, 3), 'conv5': (4, 3, 3, 3),
              'fc6': (7, 144), 'fc7': (6, 7), 'fc8-t': (5, 6)}
    for name, shape in shapes.items():
        weights[f'{name}.weight'] = rng.normal(0, 2 * np.prod(shape[1:]) ** -.5, shape).astype(np.float32)
        weights[f'{name}.bias'] = rng.normal(0, .1, shape[0]).astype(np.float32)
    weights['conv3.weight'] *= .002  # large before, where α = 1e-4 must count; small after, where softmax must not be 0 or 1
    return weights


def numpy_net(x, w):  # (3, H, W) → (classes,)
    def conv(name, x, stride, pad, groups):
        weight = w[f'{name}.weight']
        x = np.pad(x, pad)[pad:len(x) + pad]
        windows = sliding_window_view(x, weight.shape[2:], (1, 2))[:, ::stride, ::stride]
        parts = zip(np.split(windows, groups), np.split(weight, groups))
        y = [np.einsum('chwij,ocij->ohw', *part) for part in parts]
        return np.maximum(np.concatenate(y) + w[f'{name}.bias'][:, None, None], 0)

    def pool(x):
        return sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((3, 4))

    def normalise(x):  # across channels, α / n
        return np.stack([x[c] / (1 + 1e-4 / 5 * (x[max(0, c - 2):c + 3] ** 2).sum(0)) ** .75 for c in range(len(x))])

    x = normalise(pool(conv('conv1', x, 4, 0, 1)))
    x = normalise(pool(conv('conv2', x, 1, 2, 2)))
    x = pool(conv('conv5', conv('conv4', conv('conv3', x, 1, 1, 1), 1, 1, 2), 1, 1, 2)).ravel()
    for name in ('fc6', 'fc7'):
        x = np.maximum(w[f'{name}.weight'] @ x + w[f'{name}.bias'], 0)
    return softmax(w['fc8-t.weight'] @ x + w['fc8-t.bias'])


def release(folder, weights):
    mean = np.random.default_rng(1).uniform(90, 150, (3, 256, 256)).astype(np.float32)
    (folder / 'caffe_sentibank_train_iter_250000').write_bytes(caffemodel(weights))
    (folder / 'imagenet_mean.binaryproto').write_bytes(blob(mean))
    (folder / 'classes.json').write_text('["a_n", "b_n", "c_n", "d_n", "e_n"]')
    return mean


def test_a_released_file_from_end_to_end(tmp_path):
    weights = random_weights()
    mean = release(tmp_path, weights)
    pictures = np.random.default_rng(2).integers(0, 256, (2, 300, 300, 3), np.uint8)
    bank = SentiBank(str(tmp_path))
    found = softmax(bank.responses(pictures), axis=1)
    x = resized(pictures, (256, 256), 'bilinear', False).numpy()[:, ::-1] - mean  # BGR
    np.testing.assert_allclose(found, [numpy_net(picture[:, 14:241, 14:241], weights) for picture in x], atol=1e-5)
    assert np.ptp(found, axis=0).max() > 1e-4 and found.max() < .99  # says something
    assert bank.top_phrases(pictures, k=1) == [f'{"abcde"[j]} n' for j in found.argmax(1)]


NET, MEAN = 'caffe_sentibank_train_iter_250000', 'imagenet_mean.binaryproto'


@pytest.mark.parametrize('name, content, says', [
    (NET, None, 'No such file'),
    (NET, caffemodel(random_weights())[:-1], 'DecodeError'),
    (NET, b'<!DOCTYPE html>', ''),  # a page that the download gave
    (NET, caffemodel(random_weights() | {'conv3.weight': np.ones((4, 5, 3, 3))}), ''),
    (MEAN, blob(np.zeros((3, 8, 8))), 'invalid for input of size'),
    ('classes.json', b'["a_b", "c_d", "e_f"]', '3 pairs for 5 outputs'),
])
def test_a_damaged_release_is_named(tmp_path, name, content, says):
    release(tmp_path, random_weights())
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f'(?s){tmp_path / name}.*{says}'):
        SentiBank(tmp_path)


# the three of a profile

def test_one_clip_serves_both_equations(hub_folder, tmp_path, monkeypatch):
    (tmp_path / 'anps.txt').write_text('gloomy_cat\nhappy_dog\nold_house')
    clip, phrases = load_judges(tmp_path, f'open_clip:{hub_folder}', f'clip-anp:{tmp_path}/anps.txt', 'minilm').values()
    runs = []
    monkeypatch.setattr(clip.model, 'encode_image', lambda x, normalize: runs.append(len(x)) or torch.ones(len(x), 16))
    clip.embed_images(PICTURES)
    phrases.embed_images(PICTURES)
    assert runs == [5]


@pytest.mark.parametrize('factual, phrases, says', [
    ('clip', 'standins', 'factual is "clip", expected one of standins, open_clip:MODEL/WEIGHTS, imagenet'),
    ('open_clip:no/where', 'sentibank:x', 'phrases is "sentibank:x", expected .*clip-anp'),
    ('imagenet', 'clip-anp:x', 'phrases=clip-anp:x asks the CLIP'),
])
def test_unknown_evaluators_stop_before_any_is_loaded(tmp_path, factual, phrases, says):
    with pytest.raises(InputError, match=says):
        load_judges(tmp_path, factual, phrases, 'standins')


# judges that ask the backbone

def test_imagenet_names_are_compared_with_texts():
    judge = ImageNetNames('tf_efficientnet_lite0')
    model = load_backbone('tf_efficientnet_lite0', classifier=True)
    features = run_frozen(load_backbone('tf_efficientnet_lite0'), PICTURES, '', model)
    probabilities = softmax(run_frozen(model, PICTURES, '', model), axis=1)
    names = normalize(judge.embed_texts(judge.names))
    for row, emb in zip(probabilities, judge.embed_images(features)):
        best = np.argsort(-row)[:5]
        np.testing.assert_allclose(emb, row[best] @ names[best], atol=1e-5)
    assert judge.names[849] == 'teapot'


def test_a_backbone_without_a_classifier_is_named(tmp_path):
    save_backbone(load_backbone('tf_efficientnet_lite0'), tmp_path, 96)
    with pytest.raises(InputError, match=f'backbone={tmp_path} bring no classifier'): ImageNetNames(str(tmp_path))


def test_a_group_is_never_on_both_sides():
    x, group = np.random.default_rng(0).normal(size=(60, 8)), np.arange(60) // 6
    x += 9 * np.eye(10, 8)[group]  # a group is known by its place, and its rating is its own
    ratings = np.random.default_rng(1).normal(size=10)[group]
    errors = [-fit_valence(x, ratings, groups)[-1].best_score_ / ratings.var() for groups in (group, np.arange(60))]
    assert errors[0] > .8 > .2 > errors[1]


@pytest.fixture
def rated(tmp_path):
    "A run whose benchmark is rated; brighter pictures are more pleasant."
    (own := tmp_path / 'own').mkdir()
    table = pd.DataFrame({'valence': range(60), 'split': 10 * [*4 * ['train'], 'val', 'test'], 'text': 'a day'})
    table['id'] = table['image'] = [f'{i}.png' for i in range(60)]
    for i, name in enumerate(table['image']): Image.new('RGB', (32, 32), (4 * i, 4 * i, 90)).save(own / name)
    table.to_csv(own / 'labels.csv', index=False)
    table[:9].to_csv(own / 'posts.csv', index=False)
    run_data(tmp_path, posts=f'{tmp_path}/own', benchmarks=[f'csv/valence:{tmp_path}/own'], image_size=32)
    with write_stage(tmp_path / 'features', {'parameters': {'backbone': 'tf_efficientnet_lite0'}}): pass
    return tmp_path


def test_valence_learns_from_the_split_train_alone(rated):
    table, images = rated_pictures(rated, f'csv/valence:{rated}/own')
    assert set(table['split']) == {'train'} and len(table) == 40 == len(images)
    assert (images[:, 0, 0, 0] == 4 * table['valence'].astype(float)).all()
    judge = Valence(rated, f'csv/valence:{rated}/own')
    assert judge.model[-1].best_score_ > -.4 * np.var(range(60))
    assert judge.embed_texts(['a lovely day', 'so sad']).round().tolist() == [[1], [-1]]


@pytest.mark.parametrize('label, split, says', [('valence', 'val', 'few .* for train'), ('pleasure', 'train', 'columns .*pleasure')])
def test_a_set_without_ratings_to_learn_from_is_named(rated, label, split, says):
    table = pd.read_csv(rated / 'own/labels.csv').rename(columns={'valence': label})
    shutil.copytree(rated / 'own', rated / 'other')
    table.replace({'split': {'train': split}}).to_csv(rated / 'other/labels.csv', index=False)
    with pytest.raises(InputError, match=f'{rated}/other: .*{says}'):
        load_judges(rated, 'scores:x', f'valence:csv/{label}:{rated}/other', '')
