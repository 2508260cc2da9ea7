"pacl.pretext: the six tasks of Feng et al. against their definitions, and a backbone that is left as 06 leaves it."
import colorsys
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from pacl.parts import judges as evaluators_module
from pacl import pretext
from pacl.parts.encoders import id_keys, load, load_backbone, split_backbone
from pacl.pretext import (ORDERS, TASKS, Captioner, Heads, PixelHead, best_phrases, caption_loss, four_looks, number_words, pretrain, see,
                          shuffle_tiles, to_lab)
from pacl.parts.stages import InputError, read_record, write_stage

pytestmark = pytest.mark.usefixtures('one_thread')
ASKED = {'factual': 'standins', 'phrases': 'deepsentibank:/x', 'sentences': 'bert'}


class ByColour:
    "An evaluator that names the strongest colour of a picture."
    def top_phrases(self, images, k=3):
        assert k == 1
        return [['warm rose', 'pale rose', 'deep sea'][c] for c in images.mean((1, 2)).argmax(1)]


def make_run(run, backbone='tf_efficientnet_lite0', stages=2, n=12, side=32):
    "A profile's folder as far as pre-training reads it: smooth noise for pictures, each leaning towards one colour."
    rng = np.random.default_rng(0)
    ids = [f'{i:03d}' for i in range(n)]
    with write_stage(run / 'data', {'stage': 'data', 'parameters': {}}) as data:
        text = ['warm warm rose', 'the meadow 😀', "it's the sea"] * n
        pd.DataFrame({'id': ids, 'image': 'x.png', 'text': text[:n]}).to_csv(data / 'posts.csv', index=False)
        pictures = rng.integers(0, 180, (n, side // 8, side // 8, 3)).repeat(8, 1).repeat(8, 2)
        pictures[np.arange(n), :, :, np.arange(n) % 3] += 70
        np.save(data / 'posts.npy', pictures.astype(np.uint8))
    for name, parameters in {'features': {'backbone': backbone, 'trainable_stages': stages}, 'partition': ASKED}.items():
        with write_stage(run / name, {'stage': name, 'parameters': parameters}): pass
    return run


@pytest.fixture(scope='module')
def run(tmp_path_factory): return make_run(tmp_path_factory.mktemp('runs') / 'mini')


@pytest.fixture(autouse=True)
def evaluators(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluators_module, 'load_evaluators', lambda run, *names: asked.append(names) or (None, ByColour(), None))
    return asked


@pytest.fixture(scope='module')
def trained(run, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluators_module, 'load_evaluators', lambda run, *names: (None, ByColour(), None))
        pretrain(run, folder := tmp_path_factory.mktemp('trained') / 'feng', images=43, batch_size=4)
    return folder


# jigsaw

def test_orders_are_different_permutations_that_agree_in_one_place_at_most():
    assert ORDERS.shape == (72, 9) and ORDERS[0].tolist() == list(range(9))
    assert all(sorted(order) == list(range(9)) for order in ORDERS.tolist())
    assert max(sum(a == b for a, b in zip(p, q)) for p, q in itertools.combinations(ORDERS.tolist(), 2)) == 1


def test_no_more_orders_could_be_had():
    "Of 73, two would have the same tiles in their first two places: there are 9 × 8 ways to fill these, and each is taken."
    assert len({tuple(order[:2]) for order in ORDERS.tolist()}) == 9 * 8 == 72


@given(st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(0, 71), min_size=1, max_size=3))
def test_each_tile_goes_where_its_order_says(h, w, which):
    x = torch.randn(len(which), 2, 3 * h, 3 * w)
    y = shuffle_tiles(x, ORDERS[which])
    def tile(picture, k): return picture[:, k // 3 * h:k // 3 * h + h, k % 3 * w:k % 3 * w + w]
    for i, order in enumerate(ORDERS[which].tolist()):
        for place, k in enumerate(order): assert tile(y[i], place).equal(tile(x[i], k))


def test_a_side_that_is_no_multiple_of_three_keeps_its_length():
    x = torch.rand(2, 3, 32, 32)
    y = shuffle_tiles(x, ORDERS[[0, 5]])
    nearest = torch.arange(32) * 30 // 32
    assert y.shape == x.shape and y[0].equal(x[0][:, nearest][:, :, nearest])


# colours

def test_lightness_and_chroma_are_those_of_the_tables():
    known = {(1, 0, 0): (53.24, 80.09, 67.20), (0, 1, 0): (87.73, -86.18, 83.18), (0, 0, 1): (32.30, 79.19, -107.86),
             (1, 1, 1): (100, 0, 0), (0, 0, 0): (0, 0, 0), (1, 1, 0): (97.14, -21.55, 94.48), (.02, .02, .02): (1.4, 0, 0)}
    rgb = torch.tensor(list(known)).view(-1, 3, 1, 1)
    torch.testing.assert_close(to_lab(rgb).view(-1, 3), torch.tensor(list(known.values())), atol=.03, rtol=0)


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_chroma_stays_within_what_the_sigmoid_can_say_and_grey_has_none(rgb):
    lab = to_lab(torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1)).flatten()
    assert -.01 <= lab[0] <= 100.01 and (lab[1:].abs() <= 127).all()
    grey = torch.full((1, 3, 1, 1), colorsys.rgb_to_yiq(*rgb)[0], dtype=torch.float32).clamp(0, 1)
    assert to_lab(grey)[0, 1:].abs().max() < .01


def test_the_four_looks():
    x = torch.rand(2, 3, 24, 24)
    plain, grey, small, shuffled = four_looks(x, ORDERS[[3, 40]]).chunk(4)
    assert plain.equal(x) and shuffled.equal(shuffle_tiles(x, ORDERS[[3, 40]]))
    assert grey[:, 0].equal(grey[:, 2]) and grey.amin() >= 0 and grey.amax() <= 1
    torch.testing.assert_close(100 * grey[:, 1], to_lab(x)[:, 0])
    finer = x.unflatten(2, (6, 4)).flip(3).flatten(2, 3)  # what is finer than four pixels is lost
    torch.testing.assert_close(four_looks(finer, ORDERS[[3, 40]]).chunk(4)[2], small)
    assert not torch.allclose(small, x, atol=.1)


# what the heads see

@pytest.mark.parametrize('name, side', [('tf_efficientnet_lite0', 32), ('resnet18', 32), ('vit_tiny_patch16_224', 224),
                                        ('swin_tiny_patch4_window7_224', 224)])
def test_maps_are_maps_whatever_the_architecture(name, side):
    model, x = timm.create_model(name, num_classes=0).eval(), torch.randn(2, 3, side, side)
    with torch.inference_mode():
        maps, last, pooled = see(model, x)
        torch.testing.assert_close(pooled, model(x))
    assert len(maps) == 4 and all(m.ndim == 4 and m.shape[2] == m.shape[3] for m in (*maps, last))
    assert last.shape[1:] == (model.num_features, *maps[-1].shape[2:])
    if not name.startswith('vit'): torch.testing.assert_close(last.mean((2, 3)), pooled)


def test_patches_of_a_vit_stand_where_they_are_in_the_picture():
    model, x = timm.create_model('vit_tiny_patch16_224', num_classes=0, depth=1).eval(), torch.zeros(2, 3, 224, 224)
    with torch.inference_mode():
        model.blocks[0].attn.proj.weight.zero_()  # patches do not look at each other
        x[1, :, 16:32, 48:64] = 1
        last = see(model, x)[1] if len(model.blocks) > 3 else last_of(model, x)
    changed = (last[0] - last[1]).abs().sum(0) > 1e-4
    assert changed.nonzero().tolist() == [[1, 3]]


def last_of(model, x):
    "see() asks for four maps; a model of one block has one."
    model.forward_intermediates = lambda x, indices: type(model).forward_intermediates(model, x, indices=1)
    return see(model, x)[1]


def test_pixels_are_folded_out_to_the_size_that_is_asked_for():
    maps = [torch.randn(2, c, s, s) for c, s in ((4, 8), (6, 4), (8, 2))]
    head = PixelHead(maps, 3, 4)
    nn.init.zeros_(head.say.weight)
    with torch.no_grad(): head.say.bias.copy_(torch.linspace(-2, 2, 48))
    y = head(maps, 16)
    assert y.shape == (2, 3, 16, 16)
    torch.testing.assert_close(y[1, 2, 4:8, 8:12].flatten(), torch.linspace(-2, 2, 48)[32:].sigmoid())  # channel 2: its 16 pixels, by rows


# captions

def test_words_are_numbered_by_how_often_they_occur():
    words, rows = number_words(['B b a', "it's a DOG 😀", 'a 😀 b cat'], longest=3)
    assert words == ['', '<start>', '<end>', '<other>', 'a', 'b']  # a and b 3 times; 😀 is once behind the third word, cat always
    assert rows.tolist() == [[1, 5, 5, 4, 2], [1, 3, 4, 3, 2], [1, 4, 3, 5, 2]]
    assert number_words(['b b', 'a a', 'c c c'], most=2)[0][4:] == ['c', 'a']
    assert number_words(['', 'x'])[1][:, :3].tolist() == [[1, 2, 0], [1, 3, 2]]


def test_attention_is_that_of_the_equation():
    torch.manual_seed(0)
    speaker, cells, words = Captioner(5, 7, hidden=4).double(), torch.randn(1, 3, 5).double(), torch.tensor([[1, 4, 6]])
    logits, looks = speaker(cells, words)
    c, h = cells[0], torch.tanh(speaker.begin.weight @ cells[0].mean(0) + speaker.begin.bias)
    for t, word in enumerate(words[0]):
        energy = torch.stack([speaker.energy(torch.tanh(speaker.key(c[i]) + speaker.query(h))) for i in range(3)]).flatten()
        alpha = energy.exp() / energy.exp().sum()
        torch.testing.assert_close(looks[0, t], alpha)
        h = speaker.cell(torch.cat([speaker.embed.weight[word], sum(alpha[i] * c[i] for i in range(3))])[None], h[None])[0]
        torch.testing.assert_close(logits[0, t], speaker.say(h))


def test_what_comes_later_is_not_known_before():
    torch.manual_seed(0)
    speaker, cells = Captioner(5, 7, hidden=4), torch.randn(2, 3, 5)
    one, other = (speaker(cells[:1], torch.tensor([[1, 4, k]]))[0] for k in (5, 6))
    assert one[:, :2].equal(other[:, :2]) and not one[:, 2].equal(other[:, 2])
    assert not speaker(cells[1:], torch.tensor([[1]]))[0].equal(one[:, :1])  # and the picture counts from the first word on


def test_the_loss_of_a_caption_word_by_word():
    torch.manual_seed(0)
    logits, looks, words = torch.randn(2, 4, 6), torch.rand(2, 4, 3).softmax(2), torch.tensor([[4, 5, 2, 0], [3, 2, 0, 0]])
    nats, uneven = [], []
    for i, n in enumerate((3, 2)):
        nats += [-math.log(math.exp(logits[i, t, words[i, t]]) / sum(math.exp(v) for v in logits[i, t])) for t in range(n)]
        uneven += [(n / 3 - sum(looks[i, t, k].item() for t in range(n))) ** 2 for k in range(3)]
    assert caption_loss(logits, looks, words).item() == pytest.approx(sum(nats) / 5 + sum(uneven) / 6, rel=1e-5)


# all at once

def example(n=2, side=32):
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=0, zero_init_last=False).eval()
    x, order = torch.rand(n, 3, side, side), torch.tensor([7, 9])
    return model, x, order, see(model, four_looks(x, ORDERS[order]))


def test_losses_begin_at_what_knowing_nothing_costs():
    _, x, order, seen = example()
    losses = Heads(*seen, 5, 8, 9)(*seen, x, order, torch.tensor([0, 4]), torch.tensor([7, 1]), torch.tensor([[1, 4, 2, 0]] * 2))
    assert tuple(losses) == ('colour', 'resolution', 'scene', 'jigsaw', 'phrase', 'caption') == TASKS
    for name, n in {'scene': 5, 'phrase': 8, 'jigsaw': 72}.items(): assert losses[name].item() == pytest.approx(math.log(n), rel=1e-5)
    assert losses['resolution'].item() == pytest.approx(((x - .5) ** 2).mean().item(), rel=1e-5)
    chroma = nn.functional.avg_pool2d(to_lab(x)[:, 1:], 4)
    assert losses['colour'].item() == pytest.approx((((chroma + 127) / 255 - .5) ** 2).mean().item(), rel=1e-4)
    assert losses['caption'].item() == pytest.approx(math.log(9), rel=1e-5)  # at 32 px there is one cell, and it is looked at each time


@pytest.mark.parametrize('task, look', [('colour', 1), ('resolution', 2), ('scene', 0), ('jigsaw', 3), ('phrase', 0), ('caption', 0)])
def test_each_task_reads_its_own_look_and_trains_the_backbone(task, look):
    model, x, order, _ = example()
    inputs = four_looks(x, ORDERS[order]).requires_grad_()
    seen = see(model, inputs)
    heads = Heads(*seen, 5, 8, 9)
    for layer in (heads.colour.say, heads.resolution.say, heads.scene, heads.phrase, heads.jigsaw, heads.caption.say):
        nn.init.normal_(layer.weight)
    labels = torch.tensor([0, 4]), torch.tensor([7, 1]), torch.tensor([[1, 4, 2, 0]] * 2)
    heads(*seen, x, order, *labels)[task].backward()
    assert (inputs.grad.abs().flatten(1).sum(1).view(4, 2) > 0).nonzero()[:, 0].unique().tolist() == [look]
    assert model.layer4[0].conv1.weight.grad.abs().sum() > 0


def test_a_caption_says_what_comes_next():
    _, x, order, seen = example(side=64)
    heads, words = Heads(*seen, 5, 8, 9), torch.tensor([[1, 4, 7, 2, 0, 0], [1, 5, 2, 0, 0, 0]])
    nn.init.normal_(heads.caption.say.weight)
    last = nn.functional.layer_norm(seen[1][:2], seen[1].shape[1:]).flatten(2).transpose(1, 2)
    expected = caption_loss(*heads.caption(last, torch.tensor([[1, 4, 7], [1, 5, 2]])), torch.tensor([[4, 7, 2], [5, 2, 0]]))
    torch.testing.assert_close(heads(*seen, x, order, torch.tensor([0, 4]), torch.tensor([7, 1]), words)['caption'], expected)


def test_what_the_heads_are_given(run, tmp_path, monkeypatch):
    forward, given = Heads.forward, []
    monkeypatch.setattr(Heads, 'forward', lambda self, *all: given.append(all) or forward(self, *all))
    pretrain(run, tmp_path / 'feng', images=4 * 36, batch_size=12)
    for maps, last, pooled, x, order, scene, phrase, words in given:
        assert not maps[0].requires_grad and last.requires_grad  # nothing is kept of stages that do not learn
        assert len(last) == 4 * len(x) and 0 <= x.min() and x.max() <= 1
        strongest = x.mean((2, 3)).argmax(1)
        assert phrase.tolist() == [[2, 1, 0][c] for c in strongest]  # deep sea, pale rose, warm rose: in order of the alphabet
        assert scene.tolist() == [int(p == 0) for p in phrase]  # rose, sea
        assert words[:, 0].eq(1).all() and words.shape == (12, 18)
    orders = torch.cat([g[4] for g in given])
    assert orders.max() > 60 and orders.min() < 12 and len(orders.unique()) > 20


def test_phrases_are_asked_of_the_runs_own_evaluator(run, evaluators):
    pictures = np.zeros((3, 4, 4, 3), np.uint8)
    pictures[0, ..., 2] = pictures[1, ..., 0] = pictures[2, ..., 1] = 9
    assert best_phrases(run, pictures, np.array([2, 0])).tolist() == ['pale rose', 'deep sea']
    assert evaluators == [tuple(ASKED.values())]


# the whole

def test_what_is_left_is_what_06_leaves_and_loads(trained, run):
    assert sorted(path.name for path in trained.iterdir()) == ['config.json', 'log.csv', 'model.safetensors', 'record.json']
    assert [path.name for path in trained.parent.iterdir()] == ['feng']
    record, log = json.loads((trained / 'record.json').read_text()), pd.read_csv(trained / 'log.csv')
    assert record == {'method': 'feng', 'seed': 0, 'images': 43, 'batch_size': 4, 'lr': 1e-4, 'head_lr': 1e-3, 'steps': 3,
                      'images_seen': 40, 'scenes': 2, 'phrases': 3, 'words': record['words']}
    assert list(log) == ['step', *TASKS] and log['step'].tolist() == [0, 1, 2] and np.isfinite(log.to_numpy()).all()
    assert log.loc[0, 'scene'] == pytest.approx(math.log(2), rel=1e-4)
    picture = np.load(run / 'data/posts.npy')[0]
    from PIL import Image
    assert load(trained)(Image.fromarray(picture)).shape == (1, 1280)
    assert json.loads((trained / 'config.json').read_text())['pretrained_cfg']['input_size'] == [3, 32, 32]


def test_only_the_stages_that_learn_in_06_have_learnt_and_statistics_stand_still(trained):
    before, after = load_backbone('tf_efficientnet_lite0').state_dict(), load_file(trained / 'model.safetensors')
    model = load_backbone('tf_efficientnet_lite0')
    learning = {id(p) for p in split_backbone(model, 2)[1].parameters()}
    names = {name for name, p in model.named_parameters() if id(p) in learning}
    assert set(before) == set(after)
    for name in before: assert before[name].equal(after[name]) != (name in names), name


def test_equal_seeds_are_equal_bytes_and_another_seed_is_not(trained, run, tmp_path):
    pretrain(run, tmp_path / 'again', images=43, batch_size=4)
    pretrain(run, tmp_path / 'other', images=43, batch_size=4, seed=1)
    for name in ('model.safetensors', 'log.csv', 'record.json'):
        assert (tmp_path / 'again' / name).read_bytes() == (trained / name).read_bytes() != (tmp_path / 'other' / name).read_bytes()


def test_what_is_there_is_left_alone_and_another_setting_is_refused(trained, run, evaluators):
    before = (trained / 'model.safetensors').stat().st_mtime_ns
    pretrain(run, trained, images=43, batch_size=4)
    assert (trained / 'model.safetensors').stat().st_mtime_ns == before and not evaluators
    with pytest.raises(InputError, match='lr was 0.0001, is 0.001'): pretrain(run, trained, images=43, batch_size=4, lr=1e-3)


def test_what_a_kill_left_does_not_get_into_the_result(run, tmp_path):
    (tmp_path / '.feng.new').mkdir()
    (tmp_path / '.feng.new' / 'old').touch()
    pretrain(run, tmp_path / 'feng', images=4)
    assert not (tmp_path / 'feng' / 'old').exists() and not (tmp_path / '.feng.new').exists()


def test_no_number_of_images_is_each_post_once_and_more_than_all_begin_again(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pretext, 'augment', lambda x, seeds: seen.append([key for *_, key in seeds]) or x)
    for images, batch_size, sizes in ((0, 5, [5, 5, 2]), (4 * 30, 16, [16, 14])):
        seen.clear()
        pretrain(run, tmp_path / f'{images}', images=images, batch_size=batch_size)
        keys = [key for batch in seen[1:] for key in batch]  # the first look is for the heads' widths
        assert keys[:12] != id_keys([f'{i:03d}' for i in range(12)]).tolist() and keys[:12] != keys[12:24]
        assert [len(batch) for batch in seen[1:]] == sizes
        assert all(keys.count(key) in (len(keys) // 12, -(-len(keys) // 12)) for key in keys) and len(set(keys[:12])) == 12
        assert json.loads((tmp_path / f'{images}/record.json').read_text())['images_seen'] == 4 * len(keys)


def test_it_learns_what_can_be_learnt(run, tmp_path):
    pretrain(run, tmp_path / 'feng', images=4 * 12 * 8, batch_size=12, lr=3e-4, head_lr=3e-3)
    log = pd.read_csv(tmp_path / 'feng/log.csv', index_col='step')
    for name in ('colour', 'resolution', 'scene', 'phrase', 'caption'): assert log[name].iloc[-1] < .95 * log[name].iloc[0], name


def test_each_loss_weighs_what_it_was_at_the_first_step(run, tmp_path, monkeypatch):
    "Ten times the error of one task is no louder."
    forward = Heads.forward
    pretrain(run, tmp_path / 'one', images=4 * 24, batch_size=12)
    monkeypatch.setattr(Heads, 'forward', lambda *a: (losses := forward(*a)) | {'colour': 16 * losses['colour']})
    pretrain(run, tmp_path / 'ten', images=4 * 24, batch_size=12)
    one, ten = (load_file(tmp_path / name / 'model.safetensors') for name in ('one', 'ten'))
    for name in one: torch.testing.assert_close(one[name], ten[name], rtol=1e-5, atol=1e-6)


def test_rates_follow_a_cosine_from_their_own_start(run, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self, *a: rates.append([g['lr'] for g in self.param_groups]) or step(self, *a))
    pretrain(run, tmp_path / 'feng', images=48, batch_size=3, lr=2e-4, head_lr=1e-2)
    cosine = (1 + np.cos(np.pi * np.arange(4) / 4)) / 2
    np.testing.assert_allclose(rates, np.stack([2e-4 * cosine, 1e-2 * cosine], 1))


def test_a_loss_that_is_no_number_stops(run, tmp_path, monkeypatch):
    forward = Heads.forward
    monkeypatch.setattr(Heads, 'forward', lambda *a: forward(*a) | {'jigsaw': torch.tensor(math.nan)})
    with pytest.raises(FloatingPointError, match="feng, step 0: .*'jigsaw': nan"): pretrain(run, tmp_path / 'feng', images=8)
    assert not (tmp_path / 'feng').exists()


@pytest.mark.parametrize('given, says', [({'images': 3}, 'images is 3, expected 0, or 4 and more'), ({'images': -8}, 'images is -8'),
                                         ({'batch_size': 0}, 'batch_size is 0, expected 1 or more')])
def test_a_setting_that_makes_no_sense_stops_before_any_work(run, tmp_path, given, says, evaluators):
    with pytest.raises(InputError, match=says): pretrain(run, tmp_path / 'feng', **given)
    assert not evaluators


def test_a_stage_that_did_not_run_is_named(run, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run/partition')
    with pytest.raises(InputError, match='partition is missing, and pre-training reads it'): pretrain(tmp_path / 'run', tmp_path / 'feng')
    assert read_record(tmp_path / 'run' / 'features')


def test_a_whole_backbone_learns_where_all_stages_do(tmp_path, monkeypatch):
    monkeypatch.setattr(pretext, 'load_backbone', lambda name: timm.create_model('resnet18', num_classes=0).eval())
    run = make_run(tmp_path / 'run', 'resnet18', stages=0, n=4)
    torch.manual_seed(0)
    before = timm.create_model('resnet18', num_classes=0).state_dict()
    torch.manual_seed(0)
    pretrain(run, tmp_path / 'feng', images=32, batch_size=4)
    after = load_file(tmp_path / 'feng/model.safetensors')
    assert not before['conv1.weight'].equal(after['conv1.weight']) and before['bn1.running_mean'].equal(after['bn1.running_mean'])


def test_a_backbone_without_maps_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(pretext, 'load_backbone', lambda name: nn.Linear(1, 1))
    with pytest.raises(InputError, match='backbone=tf_efficientnet_lite0: its maps cannot be read here. Take a timm model.'):
        pretrain(run, tmp_path / 'feng')
