"pacl.parts.standins: tuned on no word of the posts, the same weights every time, and evaluators that answer as they were saved."
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from pacl.parts import standins
from pacl.parts.encoders import encode_texts, load_backbone, load_text_encoder, run_frozen
from pacl.parts.stages import file_hashes, write_stage
from pacl.parts.standins import (ADJECTIVES, KINDS, TUNING_WORDS, Evaluators, SentimentEncoder, load_evaluators, raw_text_encoder, run_standins,
                           tune_evaluators, tune_text_encoder, tuning_words)
from pacl.parts.world import CLEAN_WORDS, EMOTIONS, OBJECTS, POST_WORDS, compose, write_text

N = 24


def clean_scenes():
    "The pictures and captions that the evaluators learn from, small."
    rng = np.random.default_rng(0)
    table = pd.DataFrame({'id': [f'{i:05d}' for i in range(N)], 'image': 'x.png', 'object': rng.choice(list(OBJECTS), N),
                          'emotion': rng.choice(list(EMOTIONS), N)})
    table['text'] = [write_text(rng, kind, emotion, True) for kind, emotion in zip(table['object'], table['emotion'])]
    images = [np.asarray(compose((0, i), row.object, {row.emotion: 2}, size=32)) for i, row in enumerate(table.itertuples())]
    return table, np.stack(images)


def make(run):
    table, images = clean_scenes()
    with write_stage(run / 'data', {'stage': 'data', 'parameters': {}}) as data:
        table.to_csv(data / 'clean.csv', index=False)
        np.save(data / 'clean.npy', images)
    return run_standins(run, text_steps=2, evaluator_epochs=1)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make(tmp_path_factory.mktemp('runs') / 'one')


@pytest.fixture(scope='module')
def loaded(folder): return load_evaluators(folder)


# words

def test_no_tuning_word_shares_its_stem_with_a_post_a_caption_or_a_class():
    words = tuning_words()
    stems = {w[:5] for rows in (POST_WORDS, CLEAN_WORDS) for row in rows.values() for w in row.split()} | {name[:5] for name in EMOTIONS}
    assert not [w for w in words['word'] if w[:5] in stems]
    from vader import SentimentIntensityAnalyzer
    lexicon = SentimentIntensityAnalyzer().lexicon
    left_out = {w for w in lexicon if w.isalpha() and len(w) > 2} - set(words['word'])
    assert left_out and all(w[:5] in stems for w in left_out)  # and nothing else is left out


def test_tuning_words_carry_vaders_rating_and_their_emotion():
    words = tuning_words().set_index('word')
    assert words.index.is_unique and words['valence'].between(-4, 4).eq(words['valence'].notna()).all()
    assert words.loc['good', 'valence'] == 1.9 and words.loc['horrible', 'valence'] == -2.5 and words.loc['good', 'emotion'] == -1
    for number, row in enumerate(TUNING_WORDS.values()): assert (words.loc[row.split(), 'emotion'] == number).all()
    assert (words['emotion'] >= 0).sum() == 80 and (words['valence'].notna() | (words['emotion'] >= 0)).all()


# tuning

def test_only_the_upper_half_of_the_text_encoder_is_tuned(folder):
    raw, tuned = raw_text_encoder()[0].state_dict(), load_text_encoder(folder / 'text_encoder')[0].state_dict()
    assert raw.keys() == tuned.keys()
    changed = {name.split('.')[2] for name in raw if not torch.equal(raw[name], tuned[name]) and name.startswith('encoder.layer')}
    assert changed == {'3', '4', '5'}
    assert all(torch.equal(raw[name], tuned[name]) for name in raw if not name.startswith('encoder.layer'))
    log = pd.read_csv(folder / 'text_encoder.csv')
    assert list(log) == ['step', 'valence', 'emotion'] and len(log) == 2 and np.isfinite(log).all(axis=None)


def test_the_first_losses_of_the_text_encoder_are_those_by_hand():
    words = tuning_words()
    model, tokenizer, *_ = raw_text_encoder()
    said = []
    def listen(texts, **kwargs): said.extend(texts); return tokenizer(texts, **kwargs)
    torch.manual_seed(5)
    heads = [torch.nn.Linear(384, n) for n in (1, 8)]
    _, log = tune_text_encoder(model, listen, words, 1, seed=5)
    found = [next(w for w in text.replace(',', ' ').split() if w in set(words['word']) - {'feeling', 'thing', 'story'}) for text in said]
    table = words.set_index('word').loc[found]
    assert len(said) == 64 and table['valence'][:32].notna().all() and (table['emotion'][32:] >= 0).all()
    features = torch.tensor(encode_texts(raw_text_encoder(), said))
    with torch.no_grad(): valence, emotion = (head(features).numpy() for head in heads)
    rated, known = table['valence'].notna().to_numpy(), (table['emotion'] >= 0).to_numpy()
    emotion = emotion - np.log(np.exp(emotion).sum(1, keepdims=True))
    expected = {'valence': np.mean((valence[rated, 0] - table['valence'][rated]) ** 2),
                'emotion': -np.mean([emotion[i, table['emotion'].iloc[i]] for i in np.flatnonzero(known)])}
    assert log.iloc[0].to_dict() == pytest.approx(expected, rel=1e-4)


def test_only_the_last_stages_and_the_heads_of_the_evaluators_are_tuned(folder):
    initial, tuned = load_backbone('tf_efficientnet_lite0').state_dict(), load_file(folder / 'evaluators.safetensors')
    backbone = {name.removeprefix('backbone.'): value for name, value in tuned.items() if name.startswith('backbone.')}
    changed = {name for name in initial if not torch.equal(initial[name], backbone[name])}
    assert {'.'.join(name.split('.')[:2]) for name in changed if name.startswith('blocks')} == {'blocks.5', 'blocks.6'}
    assert {name.split('.')[0] for name in changed} == {'blocks', 'conv_head', 'bn2'}
    assert not [name for name in changed if 'running' in name]  # batch norm keeps its statistics
    heads = {name: tuple(value.shape) for name, value in tuned.items() if not name.startswith('backbone.')}
    assert heads == {'image_projector.weight': (128, 1280), 'text_projector.weight': (128, 384), 'adjectives.weight': (24, 1280),
                     'adjectives.bias': (24,), 'nouns.weight': (20, 1280), 'nouns.bias': (20,)}


def test_the_evaluators_losses_are_those_by_hand():
    table, images = clean_scenes()
    torch.manual_seed(0)
    evaluators = Evaluators(load_backbone('tf_efficientnet_lite0'))
    with torch.no_grad():
        h = evaluators.features(images)
        sim = F.normalize(evaluators.image_projector(h)) @ F.normalize(torch.tensor(evaluators.embed_texts(table['text']))).T / .07
        clip = -(sim.log_softmax(1).diag().mean() + sim.log_softmax(0).diag().mean()) / 2
        adjectives = [[a for a in ADJECTIVES if a in text.replace(',', '').split()] for text in table['text']]
        assert all(len(found) == 1 and found[0] in CLEAN_WORDS[emotion].split() for found, emotion in zip(adjectives, table['emotion']))
        places = [ADJECTIVES.index(found[0]) for found in adjectives], [KINDS.index(kind) for kind in table['object']]
        anp = -sum(head(h).log_softmax(1)[range(N), place].mean().item()
                   for head, place in zip((evaluators.adjectives, evaluators.nouns), places))
    log = tune_evaluators(evaluators, images, table, 3)  # a batch holds all scenes, in any order
    assert log.iloc[0].to_dict() == pytest.approx({'clip': clip.item(), 'anp': anp}, rel=1e-4)
    assert len(log) == 3 and (log.iloc[2] < log.iloc[0]).all()


def test_batches_are_drawn_from_the_seed_and_the_last_may_be_smaller():
    table, images = clean_scenes()
    table, images = pd.concat([table] * 3, ignore_index=True), np.concatenate([images] * 3)  # 72: 64 and 8
    logs = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        evaluators = Evaluators(load_backbone('tf_efficientnet_lite0'))
        torch.manual_seed(len(logs))  # whatever was drawn before
        logs.append(tune_evaluators(evaluators, images, table, 1, seed))
        assert len(logs[-1]) == 2 and np.isfinite(logs[-1]).all(axis=None)
    assert logs[0].equals(logs[1]) and not logs[0].equals(logs[2])


def test_the_same_seed_makes_the_same_weights(folder, tmp_path):
    assert file_hashes(make(tmp_path / 'two')) == file_hashes(folder)
    model, tokenizer, *_ = raw_text_encoder()
    head, _ = tune_text_encoder(model, tokenizer, tuning_words(), 1, seed=1)
    assert not torch.equal(head.weight, load_file(folder / 'emotion_head.safetensors')['weight'])


# what the partition asks

def test_evaluators_come_back_as_they_were_saved(folder, loaded):
    _, images = clean_scenes()
    clip, anp, _ = loaded
    saved, texts = load_file(folder / 'evaluators.safetensors'), ['a funny dog', 'the tree in an ugly scene']
    features = run_frozen(clip.backbone, images, 'by hand', clip.backbone)
    np.testing.assert_allclose(clip.embed_images(images), features @ saved['image_projector.weight'].numpy().T, atol=1e-5)
    raw = encode_texts(raw_text_encoder(), texts)
    np.testing.assert_allclose(clip.embed_texts(texts), raw @ saved['text_projector.weight'].numpy().T, atol=1e-5)
    assert clip.embed_images(images).shape == (N, 128) and clip.embed_texts(texts).shape == (2, 128) and not clip.training
    initial = run_frozen(load_backbone('tf_efficientnet_lite0'), images, 'initial', clip.backbone)
    assert np.abs(features - initial).max() > 1e-3  # the tuned backbone, not the initial one


def test_top_phrases_are_adjective_noun_pairs(loaded):
    _, images = clean_scenes()
    anp = loaded[1]
    h = run_frozen(anp.backbone, images, 'by hand', anp.backbone)
    adjectives, nouns = (h @ head.weight.detach().numpy().T + head.bias.detach().numpy() for head in (anp.adjectives, anp.nouns))
    score = {f'{a} {k}': adjectives[:, i] + nouns[:, j] for i, a in enumerate(ADJECTIVES) for j, k in enumerate(KINDS)}
    assert len(score) == 480
    for row, phrase in enumerate(anp.top_phrases(images)):
        found = phrase.split(', ')
        assert len(found) == len(set(found)) == 3
        best = sorted((score[name][row] for name in score), reverse=True)[:3]
        np.testing.assert_allclose([score[name][row] for name in found], best, atol=1e-5)
    assert all(phrase.count(' ') == 1 and ',' not in phrase for phrase in anp.top_phrases(images, 1))


def test_pictures_go_through_the_network_once_for_both_scores(loaded, monkeypatch):
    clip, anp, _ = loaded
    _, images = clean_scenes()
    asked = []
    def spy(module, inputs, *rest): asked.append(len(inputs)); return run_frozen(module, inputs, *rest)
    monkeypatch.setattr(standins, 'run_frozen', spy)
    first = clip.embed_images(images)
    anp.top_phrases(images)
    assert asked == [N]
    np.testing.assert_allclose(clip.embed_images(images[:5].copy()), first[:5], atol=1e-5)
    assert asked == [N, 5]


def test_sentiment_is_the_tuned_encoders_emotion_head(folder, loaded):
    sentiment, texts = loaded[2], ['feeling despair', 'so witty', 'feeling despair']
    assert isinstance(sentiment, SentimentEncoder)
    found, head = sentiment.embed_texts(texts), load_file(folder / 'emotion_head.safetensors')
    logits = encode_texts(load_text_encoder(folder / 'text_encoder'), texts) @ head['weight'].numpy().T + head['bias'].numpy()
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.shape == (3, 8) and (found[0] == found[2]).all() and np.abs(found.sum(1) - 1).max() < 1e-5
