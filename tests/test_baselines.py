"pacl.baselines: losses and attentions as loops over float64, open_clip's own features, six pretext tasks by their definitions."
import argparse
import itertools
import json
import math
import os
import pickle
from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import numpy as np
import open_clip
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss
from safetensors.torch import load_file
from test_hub import Payload
from torch import nn

from pacl import baselines
from pacl.baselines import (ORDERS, Heads, PDANet, as_map, convert_emotionclip, four_looks,
                            luma_chroma, phrase_responses, pretrain, see, sentiment_guided_loss, sentiments, shuffle_tiles)
from pacl.evaluate import train_head
from pacl.parts import judges
from pacl.parts.encoders import load_backbone, load_text_encoder, split_backbone
from pacl.parts.readers import single
from pacl.parts.stages import InputError, write_stage
from pacl.parts.standins import Evaluators

pytestmark = pytest.mark.usefixtures('one_thread')
fixed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


# EmotionCLIP: shares

def test_shares_are_vaders_and_in_this_order():
    from vader import SentimentIntensityAnalyzer
    mixed = 'a lovely picture of a horrible accident'
    told = SentimentIntensityAnalyzer().polarity_scores(mixed)
    expected = np.array([told['neg'], told['neu'], told['pos']])
    shares = sentiments([mixed, 'happy happy', 'hate', '', '...'])
    np.testing.assert_allclose(shares[0], expected / expected.sum(), rtol=1e-6)
    assert expected.min() > .1 and shares.dtype == np.float32
    assert shares[1:].argmax(1).tolist() == [2, 0, 1, 1]
    np.testing.assert_allclose(shares[3], [.001 / 1.002, 1 / 1.002, .001 / 1.002], rtol=1e-6)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    assert shares.min() > .0009 and sentiments([]).shape == (0, 3)


# EmotionCLIP: loss

def kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(np.maximum(p, 1e-12), np.maximum(q, 1e-12)))


def loop(sim, shares, temperature, scale):
    "One pair after the other in float64; the divergence of the same two texts in both directions."
    n, total = len(sim), 0
    for s in (sim, sim.T):
        for i in range(n):
            logits = [s[i, j] / temperature - (scale / max(kl(shares[j], shares[i]), 1e-6) if i != j else 0) for j in range(n)]
            top = max(logits)
            total += top + math.log(sum(math.exp(x - top) for x in logits)) - logits[i]
    return total / n / 2


@st.composite
def batches(draw):
    n, classes = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    cosines = draw(hnp.arrays(np.float64, (n, n), elements=st.sampled_from([-1., 1.]) | st.floats(-1, 1)))
    counts = draw(hnp.arrays(np.float64, (n, classes), elements=st.sampled_from([0., 1., 4., 1000.]))) + np.eye(n, classes)
    counts[:, 0] += counts.sum(1) == 0  # shares of 0 and equal rows are drawn too
    return cosines, counts / counts.sum(1, keepdims=True)


@fixed
@given(batches(), st.sampled_from([.01, .07, 1.]), st.sampled_from([0., .1, 1., 10.]))
def test_loss_equals_the_loop(batch, temperature, scale):
    cosines, shares = batch
    sim = torch.tensor(cosines, requires_grad=True)
    loss = sentiment_guided_loss(sim, torch.tensor(shares), temperature, scale=scale)
    loss.backward()
    expected = loop(cosines, shares, temperature, scale)
    assert abs(loss.item() - expected) < 1e-6 * (1 + expected)
    assert sim.grad.isfinite().all()
    clip = sentiment_guided_loss(sim.detach(), torch.tensor(shares), temperature, scale=0)
    assert -1e-9 <= loss.item() <= clip.item() + 1e-9  # weaker negatives
    rough = sentiment_guided_loss(torch.tensor(cosines).float(), torch.tensor(shares).float(), temperature, scale=scale)
    assert rough.dtype == torch.float32 and abs(rough.item() - expected) < 2e-4 * (1 + expected)


def test_without_penalty_it_is_clips_loss():
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(8, 16), dim=1), F.normalize(torch.randn(8, 16), dim=1)
    ours = sentiment_guided_loss(images @ texts.T, torch.rand(8, 3).softmax(1), .07, scale=0)
    torch.testing.assert_close(ours, ClipLoss()(images, texts, 1 / .07))


def test_texts_that_feel_alike_do_not_push():
    sim = torch.rand(4, 4, requires_grad=True)
    shares = torch.tensor([[.1, .2, .7]] * 3 + [[.6, .3, .1]])
    sentiment_guided_loss(sim, shares).backward()
    assert (sim.grad[:3, :3] - sim.grad[:3, :3].diag().diag() == 0).all()  # exactly, not by rounding
    assert (sim.grad[3, :3] > 0).all() and (sim.grad.diag() < 0).all()


# EmotionCLIP: weights

@pytest.fixture(scope='module')
def released(tmp_path_factory):
    "A stand-in in the released layout, and the tower that it holds. Weights are large: where both are linear, all activations are alike."
    torch.manual_seed(0)
    config = {'image_size': 48, 'layers': 2, 'width': 128, 'patch_size': 16, 'head_width': 64}
    text = {'context_length': 8, 'vocab_size': 16, 'width': 16, 'heads': 2, 'layers': 1}
    towers = [open_clip.model.CLIP(32, config, text, quick_gelu=quick) for quick in (False, True)]
    with torch.no_grad():
        for p in towers[0].parameters(): p.add_(torch.randn_like(p) / 4)
    towers[1].load_state_dict(towers[0].state_dict())
    model = {f'backbone.{k}': v for k, v in towers[0].state_dict().items()} | {
        'visual_head.position_ids': torch.arange(8), 'logit_scale': torch.tensor(4.6)}
    path = tmp_path_factory.mktemp('released') / 'emotionclip.pt'
    torch.save({'args': argparse.Namespace(lr=5e-5, device='cuda:0'), 'epoch': 24, 'model': model, 'optimizer': {'state': {}}}, path)
    for tower in towers: tower.visual.proj = None
    return path, towers[0].visual.eval(), towers[1].visual.eval()


@torch.no_grad()
def test_the_released_encoder_gives_the_same_features(released, tmp_path):
    path, tower, quick = released
    x = torch.randn(4, 3, 48, 48)
    convert_emotionclip(path, tmp_path / 'plain')
    backbone = load_backbone(str(tmp_path / 'plain'))
    torch.testing.assert_close(backbone(x), tower(x), atol=2e-5, rtol=1e-4)
    assert (backbone(x) - quick(x)).abs().max() > 1e-2  # that tolerance tells the activations apart
    assert backbone.num_features == 128 and not any(k.startswith('head') for k in backbone.state_dict())
    cfg = json.loads((tmp_path / 'plain/config.json').read_text())['pretrained_cfg']  # it sees pictures as EmotionCLIP does
    assert cfg['mean'] == [.485, .456, .406] and cfg['std'] == [.229, .224, .225] and cfg['interpolation'] == 'bicubic'
    assert cfg['input_size'] == [3, 48, 48]


@pytest.mark.parametrize('what', ['missing', 'text', 'no model', 'no visual', 'cut', 'payload'])
def test_a_file_that_is_no_such_checkpoint(released, tmp_path, what):
    path = tmp_path / 'x.pt'
    model = torch.load(released[0], weights_only=False)['model']
    if what == 'text': path.write_text('hello')
    if what == 'no model': torch.save({'state_dict': model}, path)
    if what == 'no visual': torch.save({'model': {'fc.weight': torch.zeros(2)}}, path)
    if what == 'cut': torch.save({'model': {k: v for k, v in model.items() if 'ln_post' not in k}}, path)
    if what == 'payload': torch.save({'model': model, 'args': Payload(tmp_path / 'created')}, path, pickle_module=pickle)
    with pytest.raises(InputError, match='x.pt is no checkpoint of EmotionCLIP.*Expected'): convert_emotionclip(path, tmp_path / 'out')
    assert not os.path.exists(tmp_path / 'created') and not os.path.exists(tmp_path / 'out')


# PDANet

def attend_loop(net, x):
    "The equations for one map (C, H, W), place by place in float64."
    w = {k: v.detach().double().numpy().reshape(v.shape[:2] if v.ndim == 4 else v.shape) for k, v in net.state_dict().items()}
    def at(h, v): return w[f'{h}.weight'] @ v + w[f'{h}.bias']
    def sigmoid(v): return 1 / (1 + np.exp(-v))
    places = [x[:, i, j] for i in range(x.shape[1]) for j in range(x.shape[2])]
    channel = 1 + sigmoid(sum(sigmoid(at('gate', v)) for v in places) / len(places))
    values = [np.maximum(at('value', v), 0) for v in places]
    scores = [float(at('score', np.tanh(at('place', v) + at('guide', channel)))[0]) for v in values]
    weights = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
    return np.concatenate([sum(channel * v for v in values) / len(places), sum(k * v for k, v in zip(weights, values)) / len(places)])


class Maps(nn.Module):
    "A model that gives the maps that it gets."
    num_features, pretrained_cfg = 3, {}
    def __init__(self): super().__init__(); self.unused = nn.Parameter(torch.zeros(1))
    def forward_features(self, x): return x


@fixed
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 2), st.just(3), st.integers(1, 3), st.integers(1, 3)), elements=st.floats(-4, 4)),
       st.integers(0, 3))
def test_attention_equals_the_loop(x, seed):
    torch.manual_seed(seed)
    net = PDANet(Maps()).double()
    with torch.no_grad():
        for p in net.fresh: p.copy_(torch.randn_like(p))
        found = net(torch.tensor(x)).numpy()
    np.testing.assert_allclose(found, np.stack([attend_loop(net, one) for one in x]), atol=1e-9)


def test_on_the_last_stages_it_looks_at_the_map_before_pooling():
    "With X₂ = X the first half are the backbone's own features, each channel weighted; with 1 + σ of a number in (0, 1)."
    torch.manual_seed(0)
    frozen, stages = split_backbone(load_backbone('tf_efficientnet_lite0'), 2)
    net = PDANet(stages).eval()
    with torch.no_grad():
        nn.init.dirac_(net.value.weight), nn.init.zeros_(net.value.bias)
        early = frozen(torch.randn(2, 3, 64, 64))
        features, f = stages(early), net(early)
        channel, values, spatial = net.attend(stages[:-1](early))
    assert f.shape == (2, 2560) and values.shape == (2, 1280, 2, 2) and spatial.shape == (2, 1, 2, 2)
    torch.testing.assert_close(f[:, :1280], channel * features)
    assert 1.5 < channel.min() and channel.max() < 1.7311
    torch.testing.assert_close(spatial.sum((2, 3)), torch.ones(2, 1))
    assert len(net.fresh) == 10 == len([*net.parameters()]) - len([*stages.parameters()])


@pytest.mark.parametrize('name, how', [
    ('test_vit', {}), ('test_resnet', {}), ('test_efficientnet', {}),
    ('swin_tiny_patch4_window7_224', dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), img_size=32, window_size=4)),
    ('vit_base_patch32_clip_224', dict(embed_dim=64, depth=1, num_heads=1, img_size=64, patch_size=16, reg_tokens=1))])
def test_any_backbone_gives_a_map(name, how):
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0, **how).eval()
    net, size = PDANet(backbone).eval(), how.get('img_size', 160)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad(): raw, f = backbone.forward_features(x), net(x)
    found = as_map(backbone, raw)
    assert found.shape[:2] == (2, backbone.num_features) and found.shape[2] == found.shape[3] > 1
    assert f.shape == (2, 2 * backbone.num_features) and net.pretrained_cfg is backbone.pretrained_cfg
    i, j, side = 1, 0, found.shape[3]
    if raw.ndim == 3: expected = raw[:, -side * side:][:, i * side + j]
    else: expected = raw[:, i, j] if name.startswith('swin') else raw[:, :, i, j]
    torch.testing.assert_close(found[:, :, i, j], expected)


def test_fine_tuning_trains_a_copy_of_the_attention():
    torch.manual_seed(0)
    rng, net = np.random.default_rng(0), PDANet(nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1)))
    x, y = rng.normal(size=(48, 3, 2, 2)).astype(np.float32), rng.integers(2, size=(48, 1))
    before = [p.clone() for p in net.parameters()]
    probe = train_head(single(['no', 'yes']), (x, y), (x, y), backbone=net, backbone_lr=1e-2, epochs=2, batch_size=16)
    assert all(map(torch.equal, before, net.parameters()))
    moved = [not torch.equal(p, q) for p, q in zip(probe.backbone.fresh, net.fresh)]
    assert sum(moved) >= 9  # softmax does not see w_s's bias


# SentiBank

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)


def test_responses_are_log_probabilities_minus_their_mean(monkeypatch):
    torch.manual_seed(0)
    judge = Evaluators(load_backbone('tf_efficientnet_lite0')).eval().requires_grad_(False)
    a, n = (np.exp(head(judge.features(PICTURES)).double().numpy()) for head in (judge.adjectives, judge.nouns))
    log = np.log([np.outer(x / x.sum(), y / y.sum()).ravel() for x, y in zip(a, n)])
    monkeypatch.setattr(baselines, 'evaluators_of', lambda run: (None, judge, None))
    monkeypatch.setattr(baselines, 'load_set', lambda run, name: (None, PICTURES))
    responses = phrase_responses('run', 'new')
    assert responses.dtype == np.float32
    np.testing.assert_allclose(responses, log - log.mean(1, keepdims=True), atol=1e-5)


# Feng et al.

class ByColour:
    "A judge that names the strongest colour of a picture."
    def top_phrases(self, images, k=3):
        return [['warm rose', 'pale rose', 'deep sea'][c] for c in images.mean((1, 2)).argmax(1)]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A profile's folder as far as pre-training reads it: noise for pictures, each leaning towards one colour."
    run, rng, n = tmp_path_factory.mktemp('runs') / 'mini', np.random.default_rng(0), 12
    with write_stage(run / 'data', {'parameters': {}}) as data:
        text = ['warm warm rose', 'the meadow', "it's the sea"] * 4
        pd.DataFrame({'id': [f'{i:03d}' for i in range(n)], 'image': 'x.png', 'text': text}).to_csv(data / 'posts.csv', index=False)
        pictures = rng.integers(0, 180, (n, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
        pictures[np.arange(n), :, :, np.arange(n) % 3] += 70
        np.save(data / 'posts.npy', pictures.astype(np.uint8))
    features = {'backbone': 'tf_efficientnet_lite0', 'trainable_stages': 2}
    judged = {'factual': 'standins', 'phrases': 'standins', 'sentences': 'standins'}
    for name, parameters in {'features': features, 'partition': judged}.items():
        with write_stage(run / name, {'parameters': parameters}): pass
    return run


@pytest.fixture(scope='module', autouse=True)
def by_colour():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judges, 'load_judges', lambda run, **names: {'factual': None, 'emotional': SimpleNamespace(detector=ByColour())})
        patch.setattr(baselines, 'text_encoder_of', lambda run: load_text_encoder('minilm'))
        yield


@pytest.fixture(scope='module')
def trained(run, tmp_path_factory):
    pretrain(run, folder := tmp_path_factory.mktemp('trained') / 'feng', images=43, batch_size=4)
    return folder


def test_orders_agree_in_one_place_at_most():
    assert ORDERS.shape == (72, 9) and ORDERS[0].tolist() == list(range(9))
    assert all(sorted(order) == list(range(9)) for order in ORDERS.tolist())
    assert max(sum(a == b for a, b in zip(p, q)) for p, q in itertools.combinations(ORDERS.tolist(), 2)) == 1


@given(st.integers(1, 4), st.lists(st.integers(0, 71), min_size=1, max_size=3))
def test_each_tile_goes_where_its_order_says(side, which):
    x = torch.randn(len(which), 2, 3 * side, 3 * side)
    y = shuffle_tiles(x, ORDERS[which])
    def tile(picture, k): return picture[:, k // 3 * side:k // 3 * side + side, k % 3 * side:k % 3 * side + side]
    for i, order in enumerate(ORDERS[which].tolist()):
        for place, k in enumerate(order): assert tile(y[i], place).equal(tile(x[i], k))
    assert shuffle_tiles(torch.rand(1, 3, 32, 32), ORDERS[[5]]).shape == (1, 3, 32, 32)


def test_the_four_looks():
    x = torch.rand(2, 3, 24, 24)
    plain, grey, small, shuffled = four_looks(x, ORDERS[[3, 40]]).chunk(4)
    assert plain.equal(x) and shuffled.equal(shuffle_tiles(x, ORDERS[[3, 40]]))
    assert grey[:, 0].equal(grey[:, 2]) and grey[:, 1].equal(luma_chroma(x)[:, 0])
    assert luma_chroma(grey)[:, 1:].abs().max() < 1e-3
    finer = x.unflatten(2, (6, 4)).flip(3).flatten(2, 3)  # what is finer than four pixels is lost
    torch.testing.assert_close(four_looks(finer, ORDERS[[3, 40]]).chunk(4)[2], small)


@pytest.mark.parametrize('name, side', [('resnet18', 32), ('vit_tiny_patch16_224', 224), ('swin_tiny_patch4_window7_224', 224)])
def test_maps_are_maps_whatever_the_architecture(name, side):
    model, x = timm.create_model(name, num_classes=0).eval(), torch.randn(2, 3, side, side)
    with torch.inference_mode():
        maps, last, pooled = see(model, x)
        torch.testing.assert_close(pooled, model(x))
    assert len(maps) == 4 and all(m.ndim == 4 and m.shape[2] == m.shape[3] for m in (*maps, last))
    assert last.shape[1:] == (model.num_features, *maps[-1].shape[2:])


def example():
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=0, zero_init_last=False).eval()
    x, order = torch.rand(2, 3, 32, 32), torch.tensor([7, 9])
    return model, x, order, (torch.tensor([0, 4]), torch.tensor([7, 1]), torch.tensor([[1, 4, 2, -100]] * 2))


def test_losses_begin_at_what_knowing_nothing_costs():
    model, x, order, labels = example()
    seen = see(model, four_looks(x, ORDERS[order]))
    losses = Heads(seen, 5, 8, 9)(seen, x, order, *labels)
    for name, n in {'scene': 5, 'phrase': 8, 'jigsaw': 72, 'caption': 9}.items():
        assert losses[name].item() == pytest.approx(math.log(n), rel=1e-5)
    assert losses['resolution'].item() == pytest.approx(((x - .5) ** 2).mean().item(), rel=1e-5)
    chroma = nn.functional.avg_pool2d(luma_chroma(x)[:, 1:], 4)
    assert losses['colour'].item() == pytest.approx((chroma ** 2).mean().item(), rel=1e-4)


@pytest.mark.parametrize('task, look', [('colour', 1), ('resolution', 2), ('scene', 0), ('jigsaw', 3), ('phrase', 0), ('caption', 0)])
def test_each_task_reads_its_own_look_and_trains_the_backbone(task, look):
    model, x, order, labels = example()
    inputs = four_looks(x, ORDERS[order]).requires_grad_()
    seen = see(model, inputs)
    heads = Heads(seen, 5, 8, 9)
    for layer in heads.say.values(): nn.init.normal_(layer.weight)
    heads(seen, x, order, *labels)[task].backward()
    assert (inputs.grad.abs().flatten(1).sum(1).view(4, 2) > 0).nonzero()[:, 0].unique().tolist() == [look]
    assert model.layer4[0].conv1.weight.grad.abs().sum() > 0


def test_what_is_left_loads_and_only_the_learning_stages_have_learnt(trained, run):
    assert sorted(os.listdir(trained)) == ['config.json', 'log.csv', 'model.safetensors', 'record.json']
    record, log = json.loads((trained / 'record.json').read_text()), pd.read_csv(trained / 'log.csv')
    assert record['method'] == 'feng' and record['steps'] == 3 and record['images_seen'] == 40
    assert list(log) == ['step', 'colour', 'resolution', 'scene', 'jigsaw', 'phrase', 'caption'] and np.isfinite(log).all(axis=None)
    assert log.loc[0, 'scene'] == pytest.approx(math.log(2), rel=1e-4)
    assert load_backbone(str(trained)).num_features == 1280
    before, after = load_backbone('tf_efficientnet_lite0').state_dict(), load_file(trained / 'model.safetensors')
    model = load_backbone('tf_efficientnet_lite0')
    learning = {id(p) for p in split_backbone(model, 2)[1].parameters()}
    names = {name for name, p in model.named_parameters() if id(p) in learning}
    for name in before: assert before[name].equal(after[name]) != (name in names), name


def test_equal_seeds_are_equal_bytes(trained, run, tmp_path):
    pretrain(run, tmp_path / 'feng', images=43, batch_size=4)
    for name in ('model.safetensors', 'log.csv'): assert (tmp_path / 'feng' / name).read_bytes() == (trained / name).read_bytes()


def test_it_learns_what_can_be_learnt(run, tmp_path):
    pretrain(run, tmp_path / 'feng', images=4 * 12 * 8, batch_size=12, lr=3e-4, head_lr=3e-3)
    log = pd.read_csv(tmp_path / 'feng/log.csv', index_col='step')
    for name in ('colour', 'resolution', 'scene', 'phrase', 'caption'): assert log[name].iloc[-1] < .97 * log[name].iloc[0], name
