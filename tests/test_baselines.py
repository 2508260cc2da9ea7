"pacl.baselines: the losses and attentions written once more as loops over float64, and open_clip's and EmotionCLIP's own features."
import argparse
import json
import math
import os
import pickle

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
from torch import nn

from pacl.parts import judges as evaluators
from pacl.baselines import (SUBJECTS, PDANet, bag_of_words, convert_emotionclip, log_responses, phrase_responses,
                            polarity_consistent_loss, sentiment_guided_loss, sentiment_penalty, sentiments)
from pacl.parts.readers import single
from pacl.parts.encoders import build_tower, load, load_backbone, split_backbone
from pacl.evaluate import extract, predict, train_heads
from pacl.parts.judges import best_phrases
from pacl.parts.stages import InputError
from pacl.parts.standins import ADJECTIVES, KINDS, Evaluators

pytestmark = pytest.mark.usefixtures('one_thread')
fixed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


# EmotionCLIP: shares

def test_shares_are_vaders_and_in_this_order():
    from vader import SentimentIntensityAnalyzer
    mixed = 'a lovely picture of a horrible accident'
    told = SentimentIntensityAnalyzer().polarity_scores(mixed)
    shares = sentiments([mixed, 'happy happy', 'hate', '', '...', mixed])
    assert shares.dtype == np.float32 and shares.shape == (6, 3)
    np.testing.assert_allclose(shares[0], np.array([told['neg'], told['neu'], told['pos']]) / sum(told[k] for k in ('neg', 'neu', 'pos')))
    assert min(told['neg'], told['neu'], told['pos']) > .1 and (shares[0] == shares[5]).all()
    assert shares[1:5].argmax(1).tolist() == [2, 0, 1, 1]
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


def test_the_penalty_is_the_divergence_of_the_candidate_from_the_anchor():
    p = torch.tensor([[.7, .2, .1], [.1, .3, .6], [.1, .3, .6]], dtype=torch.float64)
    penalty = sentiment_penalty(p)
    np.testing.assert_allclose(penalty[0, 1], 10 / F.kl_div(p[0].log(), p[1], reduction='sum'))
    np.testing.assert_allclose(penalty[1, 0], 10 / F.kl_div(p[1].log(), p[0], reduction='sum'))
    assert abs(penalty[0, 1] - penalty[1, 0]) > .5 and penalty.diag().tolist() == [0, 0, 0]
    assert penalty[1, 2] == penalty[2, 1] == 1e7 and torch.equal(sentiment_penalty(p, 5.), penalty / 2)


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
    assert sentiment_guided_loss(sim, shares[:1].repeat(4, 1)) == 0
    assert sentiment_guided_loss(sim.detach()[:1, :1], shares[:1]) == 0
    wide = sentiment_guided_loss(sim.detach().bfloat16(), shares.double())
    assert wide.dtype == torch.float32 and abs(wide - sentiment_guided_loss(sim.detach().bfloat16().float(), shares)) < 1e-5


@pytest.mark.parametrize('sim, shares', [((3, 4), (3, 3)), ((3, 3), (4, 3)), ((3, 3), (3,)), ((3,), (3, 3))])
def test_shapes_that_differ(sim, shares):
    with pytest.raises(ValueError, match='shapes differ'): sentiment_guided_loss(torch.rand(sim), torch.rand(shares))


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


def with_mask(tower, x, mask):
    "EmotionCLIP's encoder, step by step: mask (N, H, W), 1 where a person is."
    place = tower.positional_embedding
    patches = tower.conv1(x).flatten(2).transpose(1, 2)
    covered = mask.unflatten(2, (-1, 16)).unflatten(1, (-1, 16)).mean((2, 4)).flatten(1)
    subject = sum(covered[:, k, None] * place[1 + k] for k in range(covered.shape[1]))
    tokens = torch.cat([(tower.class_embedding + place[0]).expand(len(x), 1, -1), patches + place[1:], subject[:, None]], 1)
    return tower.ln_post(tower.transformer(tower.ln_pre(tokens))[:, 0])


@torch.no_grad()
def test_the_released_encoder_gives_the_same_features(released, tmp_path):
    path, tower, quick = released
    x = torch.randn(4, 3, 48, 48)
    convert_emotionclip(path, tmp_path / 'plain')
    backbone = load_backbone(str(tmp_path / 'plain'))
    torch.testing.assert_close(backbone(x), tower(x), atol=2e-5, rtol=1e-4)
    assert (backbone(x) - quick(x)).abs().max() > 1e-2  # that tolerance tells the activations apart
    assert backbone.num_features == 128 and not any(k.startswith('head') for k in backbone.state_dict())
    for subject, fill in (('nobody', torch.zeros), ('everything', torch.ones)):
        convert_emotionclip(path, tmp_path / subject, subject)
        features = load_backbone(str(tmp_path / subject))(x)
        torch.testing.assert_close(features, with_mask(tower, x, fill(4, 48, 48)), atol=2e-5, rtol=1e-4)
        assert (features - backbone(x)).abs().max() > 1e-2
    half = (torch.arange(48) < 20).float().expand(4, 48, 48)
    assert (with_mask(tower, x, half) - features).abs().max() > 1e-3  # the oracle does look at its mask


def test_it_sees_pictures_as_emotionclip_does(released, tmp_path):
    convert_emotionclip(released[0], tmp_path / 'e')
    transform = load(tmp_path / 'e').transform
    cfg = json.loads((tmp_path / 'e' / 'config.json').read_text())['pretrained_cfg']
    assert cfg['mean'] == [.485, .456, .406] and cfg['std'] == [.229, .224, .225] and cfg['interpolation'] == 'bicubic'
    assert cfg['input_size'] == [3, 48, 48] and 'Normalize' in str(transform) and '0.4850' in str(transform)


def test_the_released_size_is_timms_own(released, tmp_path, monkeypatch):
    "768 wide, 12 layers and heads, 49 patches of 32: the numbers that the weights would give, without 350 MB of them."
    shapes = {'class_embedding': (768,), 'positional_embedding': (50, 768), 'conv1.weight': (768, 3, 32, 32)}
    weights = {f'backbone.visual.{k}': torch.zeros(1).expand(shape) for k, shape in shapes.items()}
    weights |= {f'backbone.visual.transformer.resblocks.{i}.ln_1.weight': torch.zeros(768) for i in range(12)}
    asked = {}
    def create(name, **how): asked.update(how, name=name); raise ValueError('enough')
    monkeypatch.setattr(timm, 'create_model', create)
    torch.save({'model': weights}, tmp_path / 'x.pt')
    with pytest.raises(InputError, match='enough'): convert_emotionclip(tmp_path / 'x.pt', tmp_path / 'out')
    assert asked == dict(name='vit_base_patch32_clip_224', num_classes=0, embed_dim=768, num_heads=12, patch_size=32, img_size=224,
                         depth=12, reg_tokens=0)


class Payload:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


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


def test_a_subject_that_is_not_known(released, tmp_path):
    with pytest.raises(InputError, match=f'"someone".*{", ".join(SUBJECTS)}'): convert_emotionclip(released[0], tmp_path / 'out', 'someone')


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
        channel, values, spatial = net.attend(net.feature_map(early))
    assert f.shape == (2, 2560) and values.shape == (2, 1280, 2, 2) and spatial.shape == (2, 1, 2, 2)
    torch.testing.assert_close(f[:, :1280], channel * features)
    assert 1.5 < channel.min() and channel.max() < 1.7311
    torch.testing.assert_close(spatial.sum((2, 3)), torch.ones(2, 1))
    assert len(net.fresh) == 10 and {id(p) for p in net.fresh}.isdisjoint(map(id, stages.parameters()))
    assert len(net.fresh) + len([*stages.parameters()]) == len([*net.parameters()])


@pytest.mark.parametrize('name, how', [
    ('test_vit', {}), ('test_resnet', {}), ('test_efficientnet', {}), ('test_convnext', {}),
    ('swin_tiny_patch4_window7_224', dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), img_size=32, window_size=4)),
    ('vit_base_patch32_clip_224', dict(embed_dim=64, depth=1, num_heads=1, img_size=64, patch_size=16, reg_tokens=1))])
def test_any_backbone_gives_a_map(name, how):
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0, **how).eval()
    net, size = PDANet(backbone).eval(), backbone.pretrained_cfg['input_size'][1] if not how else how['img_size']
    x = torch.randn(2, 3, size, size)
    with torch.no_grad(): found, raw, f = net.feature_map(x), backbone.forward_features(x), net(x)
    assert found.shape[:2] == (2, backbone.num_features) and found.shape[2] == found.shape[3] > 1
    assert f.shape == (2, 2 * backbone.num_features) and net.pretrained_cfg is backbone.pretrained_cfg
    i, j, side = 1, 0, found.shape[3]
    if raw.ndim == 3: expected = raw[:, -side * side:][:, i * side + j]
    else: expected = raw[:, i, j] if name.startswith('swin') else raw[:, :, i, j]
    torch.testing.assert_close(found[:, :, i, j], expected)


def test_a_tower_without_a_map_is_refused():
    vision = {'image_size': 32, 'layers': 1, 'width': 64, 'patch_size': 16}
    tower = build_tower({'embed_dim': 8, 'vision_cfg': vision, 'quick_gelu': False}, {})
    with pytest.raises(InputError, match='VisionTransformer.*Take a model of timm'): PDANet(tower)


def test_fine_tuning_trains_a_copy_of_the_attention():
    torch.manual_seed(0)
    rng, net = np.random.default_rng(0), PDANet(nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1)))
    x, y = rng.normal(size=(48, 3, 2, 2)).astype(np.float32), rng.integers(2, size=(48, 1))
    x[:, 0] += 3 * y[:, :, None]
    before = [p.clone() for p in net.parameters()]
    (probe,), _ = train_heads(single(['no', 'yes']), (x, y), (x, y), backbone=net, backbone_lr=1e-2, epochs=20, batch_size=16)
    assert all(map(torch.equal, before, net.parameters()))
    assert {id(p) for p in probe.backbone.fresh} < {id(p) for p in probe.backbone.parameters()}
    assert not {id(p) for p in probe.backbone.fresh} & {id(p) for p in net.parameters()}
    moved = [not torch.equal(p, q) for p, q in zip(probe.backbone.fresh, net.fresh)]
    assert sum(moved) >= 9  # softmax does not see w_s's bias
    assert (predict(single(['no', 'yes']), probe, x) == y).mean() > .8


def test_pictures_reach_the_backbone_as_it_sees_them():
    backbone = timm.create_model('test_resnet', num_classes=0).eval()
    pictures, net = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8), PDANet(backbone).eval()
    x = (torch.tensor(pictures).permute(0, 3, 1, 2) / 255 - torch.tensor(backbone.pretrained_cfg['mean']).view(3, 1, 1)) / torch.tensor(
        backbone.pretrained_cfg['std']).view(3, 1, 1)
    with torch.no_grad(): torch.testing.assert_close(extract(pictures, net), net(x))


@fixed
@given(hnp.arrays(np.float64, st.tuples(st.just(2), st.integers(1, 4), st.integers(1, 3)),
                  elements=st.sampled_from([0., .5, 1.]) | st.floats(0, 1, width=16)), st.sampled_from([0., 1., 10.]))
def test_polarity_loss_equals_the_loop(ratings, weight):
    said, true = ratings
    total = sum((p - y) ** 2 * (1 + weight if (p > .5) != (y > .5) else 1) for p, y in zip(said.ravel(), true.ravel()))
    loss = polarity_consistent_loss(torch.tensor(said), torch.tensor(true), weight)
    assert abs(loss.item() - total / said.size) < 1e-12
    if not weight: torch.testing.assert_close(loss, F.mse_loss(torch.tensor(said), torch.tensor(true)))
    stretched = polarity_consistent_loss(torch.tensor(said) * 8 + 1, torch.tensor(true) * 8 + 1, weight, middle=5)
    assert abs(stretched.item() - 64 * total / said.size) < 1e-9


def test_polarity_loss_refuses_broadcasting():
    with pytest.raises(ValueError, match='shapes differ'): polarity_consistent_loss(torch.rand(3, 1), torch.rand(3))


# SentiBank

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)


def test_the_stand_ins_responses():
    torch.manual_seed(0)
    judge = Evaluators(load_backbone('tf_efficientnet_lite0')).eval()
    responses = log_responses(judge, PICTURES)
    phrases = [f'{adjective} {kind}' for adjective in ADJECTIVES for kind in KINDS]
    assert responses.shape == (3, len(phrases)) and responses.dtype == np.float32
    assert best_phrases(responses, phrases, 3) == judge.top_phrases(PICTURES)
    a, n = (np.exp(h(judge.features(PICTURES).clone()).detach().double().numpy()) for h in (judge.adjectives, judge.nouns))
    p = np.stack([np.outer(x / x.sum(), y / y.sum()).ravel() for x, y in zip(a, n)])
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_allclose(responses, np.log(p) - np.log(p).mean(1, keepdims=True), atol=1e-5)


def test_the_responses_of_the_other_two_detectors():
    class Bank:
        def probabilities(self, images): return np.array([[.5, .3, .2], [0, 1, 0], [1 / 3] * 3], np.float32)
    class Clip:
        emb = np.array([[1., 0], [0, 1], [.6, .8]], np.float32)
        class clip:
            def embed_images(images): return np.array([[1., 0], [.8, .6], [0, 1]], np.float32)
    bank, clip = log_responses(Bank(), PICTURES), log_responses(Clip(), PICTURES)
    np.testing.assert_allclose(bank[0], np.log([.5, .3, .2]) - np.log([.5, .3, .2]).mean(), rtol=1e-5)
    assert np.isfinite(bank).all() and bank[1].argmax() == 1
    p = np.exp(100 * np.array([.8, .6, .96]) - 96)
    np.testing.assert_allclose(clip[1], np.log(p / p.sum()) - np.log(p / p.sum()).mean(), atol=1e-3)
    for responses in (bank, clip): np.testing.assert_allclose(responses.mean(1), 0, atol=1e-4)


def test_the_profiles_own_detector_is_asked(tmp_path, monkeypatch):
    for name in ('partition', 'data'): (tmp_path / name).mkdir()
    told = dict(factual='open_clip:a', phrases='clip-anp:b', sentences='c')
    (tmp_path / 'partition/stage.json').write_text(json.dumps({'parameters': dict(threshold=.7, **told)}))
    pd.DataFrame({'id': ['x', 'y', 'z'], 'image': ''}).to_csv(tmp_path / 'data/new.csv', index=False)
    np.save(tmp_path / 'data/new.npy', PICTURES)
    class Bank:
        def probabilities(self, images): return np.asarray(images).reshape(3, -1)[:, :4].astype(np.float32) + 1
    right = (tmp_path, *told.values())
    monkeypatch.setattr(evaluators, 'load_evaluators', lambda *given: (None, Bank(), None) if given == right else 1 / 0)
    np.testing.assert_array_equal(phrase_responses(str(tmp_path), 'new'), log_responses(Bank(), PICTURES))


# bag of words

POSTS = ['Happy dog in the sun', 'a sad dog', 'the happy cat', 'sad grey rain', 'rain again, SAD bus', 'sun and a happy day',
         'a sad dog', '', 'rain rain rain']


def tfidf(texts, of):
    "Word by word; words of one letter do not count."
    def split(text): return [w for w in text.lower().replace(',', '').split() if len(w) > 1]
    vocabulary = sorted({w for text in texts for w in split(text)})
    idf = [math.log((1 + len(texts)) / (1 + sum(w in split(text) for text in texts))) + 1 for w in vocabulary]
    rows = np.array([[split(text).count(w) * i for w, i in zip(vocabulary, idf)] for text in of])
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


@pytest.mark.parametrize('dim', [384, 4])
def test_bag_of_words_equals_tfidf_on_its_main_directions(dim):
    asked = ['happy happy rain', 'unseen', 'the unseen bus']
    features, others = bag_of_words(POSTS, asked, dim)
    x, y = tfidf(POSTS, POSTS), tfidf(POSTS, asked)
    _, values, directions = np.linalg.svd(x, full_matrices=False)
    kept = directions[:min(dim, len(values))]
    assert dim > 10 or values[dim - 1] - values[dim] > .01  # else which directions are kept would be a matter of rounding
    assert features.dtype == others.dtype == np.float32 and features.shape == (9, min(dim, 9))
    np.testing.assert_allclose(features @ features.T, x @ kept.T @ kept @ x.T, atol=1e-5)
    np.testing.assert_allclose(others @ features.T, y @ kept.T @ kept @ x.T, atol=1e-5)
    assert (features[7] == 0).all() and (others[1] == 0).all()
    np.testing.assert_allclose(features[1], features[6], atol=1e-6)
    again = bag_of_words(POSTS, asked, dim)
    assert (again[0] == features).all() and (again[1] == others).all()


def test_bag_of_words_of_few_or_no_words():
    features, others = bag_of_words(['one word', 'word'])
    assert features.shape == (2, 2) and others.shape == (0, 2)
    for texts in (['', 'a'], ['!']):
        with pytest.raises(InputError, match='no post has a word'): bag_of_words(texts)
