"pacl.parts.standins: tuned on no word of the posts, the same weights every time, and evaluators that answer as they were saved."
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from pacl.parts.encoders import load_backbone, load_text_encoder, run_frozen
from pacl.parts.stages import file_hashes, write_stage
from pacl.parts.standins import (
    ADJECTIVES, KINDS, TUNING_WORDS, load_evaluators, run_standins, tuning_words)
from pacl.parts.world import CAPTION_WORDS, EMOTIONS, OBJECTS, POST_WORDS, compose, write_text

N = 24


def clean_scenes():
    "The pictures and captions that the evaluators learn from, small."
    rng = np.random.default_rng(0)
    table = pd.DataFrame({'object': rng.choice(list(OBJECTS), N), 'emotion': rng.choice(list(EMOTIONS), N)})
    table['text'] = [write_text(rng, *row, True) for row in table[['object', 'emotion']].to_numpy()]
    images = [np.asarray(compose((0, i), row.object, {row.emotion: 2}, size=32)) for i, row in enumerate(table.itertuples())]
    return table, np.stack(images)


def make(run):
    table, images = clean_scenes()
    with write_stage(run / 'data', {'parameters': {}}) as data:
        table.assign(id=[f'{i:05d}' for i in range(N)], image='x.png').to_csv(data / 'clean.csv', index=False)
        np.save(data / 'clean.npy', images)
    return run_standins(run, text_steps=2, evaluator_epochs=1)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make(tmp_path_factory.mktemp('runs') / 'one')


@pytest.fixture(scope='module')
def loaded(folder): return load_evaluators(folder)


def test_no_tuning_word_shares_its_stem_with_a_post_a_caption_or_a_class():
    words = tuning_words()
    taken = ' '.join([*POST_WORDS.values(), *CAPTION_WORDS.values(), *EMOTIONS])
    assert not set(words['word'].str[:5]) & {w[:5] for w in taken.split()}
    words = words.set_index('word')
    assert words.index.is_unique and words.loc['good', 'valence'] == 1.9 and words.loc['good', 'emotion'] == -1
    for number, row in enumerate(TUNING_WORDS.values()): assert (words.loc[row.split(), 'emotion'] == number).all()
    assert (words['emotion'] >= 0).sum() == 80 and (words['valence'].notna() | (words['emotion'] >= 0)).all()


def test_only_the_upper_half_of_the_text_encoder_is_tuned(folder):
    raw, tuned = load_text_encoder('minilm')[0].state_dict(), load_text_encoder(folder / 'text_encoder')[0].state_dict()
    changed = {name.split('layer.')[-1][0] for name in raw if not torch.equal(raw[name], tuned[name])}
    assert raw.keys() == tuned.keys() and changed == {'3', '4', '5'}


def test_only_the_last_stages_and_the_heads_of_the_evaluators_are_tuned(folder):
    initial, tuned = load_backbone('tf_efficientnet_lite0').state_dict(), load_file(folder / 'evaluators.safetensors')
    changed = {name for name in initial if not torch.equal(initial[name], tuned[f'backbone.{name}'])}
    assert {name[:8] for name in changed if name.startswith('blocks')} == {'blocks.5', 'blocks.6'}
    assert {name.split('.')[0] for name in changed} == {'blocks', 'conv_head', 'bn2'}
    assert not [name for name in changed if 'running' in name]  # batch norm keeps its statistics


def test_the_same_seed_makes_the_same_weights(folder, tmp_path):
    assert file_hashes(make(tmp_path / 'two')) == file_hashes(folder)


def test_evaluators_come_back_as_they_were_saved(folder, loaded):
    _, images = clean_scenes()
    clip, anp, _ = loaded
    saved, texts = load_file(folder / 'evaluators.safetensors'), ['a funny dog', 'the tree in an ugly scene']
    h = run_frozen(clip.backbone, images, 'by hand', clip.backbone)
    np.testing.assert_allclose(clip.embed_images(images), h @ saved['image_projector.weight'].numpy().T, atol=1e-5)
    raw = load_text_encoder('minilm').embed_texts(texts)
    np.testing.assert_allclose(clip.embed_texts(texts), raw @ saved['text_projector.weight'].numpy().T, atol=1e-5)
    adjectives, nouns = (head(torch.from_numpy(h)) for head in (anp.adjectives, anp.nouns))
    for phrase, adjective, noun in zip(anp.top_phrases(images), adjectives, nouns):  # the best has the best of each
        assert phrase.split(', ')[0] == f'{ADJECTIVES[adjective.argmax()]} {KINDS[noun.argmax()]}'
        assert len(set(phrase.split(', '))) == 3


def test_sentiment_is_the_tuned_encoders_emotion_head(folder, loaded):
    texts = ['feeling despair', 'so witty']
    found, head = loaded[2].embed_texts(texts), load_file(folder / 'emotion_head.safetensors')
    features = torch.tensor(load_text_encoder(folder / 'text_encoder').embed_texts(texts))
    np.testing.assert_allclose(found, F.linear(features, head['weight'], head['bias']).softmax(1), atol=1e-6)
