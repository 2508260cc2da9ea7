"pacl.parts.world: glyphs and words that no two sides share, pictures of their own seed, noise with known shares."
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import chi2_contingency

from pacl.parts.stages import file_hashes
from pacl.parts.standins import TUNING_WORDS
from pacl.parts.world import (
    CAPTION_WORDS, CLUTTER, EMOTIONS, NOUNS, OBJECTS, POSITIVE, POST_WORDS, compose, draw_mixtures, draw_pairs,
    glyph_picture, own_glyphs, run_world, sign_glyphs, valence, write_text)

GLYPH_ROWS = {**OBJECTS, **EMOTIONS, 'clutter': CLUTTER}
AFFECT = {'post': POST_WORDS, 'clean': CAPTION_WORDS, 'tuning': TUNING_WORDS}
STEMS = {name: {word[:5] for word in ' '.join(rows.values()).split()} for name, rows in AFFECT.items()}


def words_of(rows): return ' '.join(rows.values()).split()


def said(text, rows, part=slice(None)):
    "Keys whose words, or part of them, stand in the text."
    tokens = {token.strip('#.,!:') for token in text.replace('/', ' ').split()}
    return {key for key, row in rows.items() if tokens & set(row.split()[part])}


def test_the_benchmark_new_shares_no_glyph_with_the_posts():
    old, new = ({g for row in GLYPH_ROWS.values() for g in own_glyphs(row, half)} for half in (False, True))
    assert not old & new and len(old | new) == len(words_of(GLYPH_ROWS))  # nor does a glyph stand for two things
    for emotion in EMOTIONS:
        kinds = [sign_glyphs(f'{emotion}-{k}', True) for k in (1, 2, 3)]
        assert sum(kinds, []) == sign_glyphs(emotion, True) and {len(k) for k in kinds} == {2}


def test_every_glyph_has_a_picture_of_its_own():
    pictures = [glyph_picture(g) for g in words_of(GLYPH_ROWS)]
    assert len({(p.size, p.tobytes()) for p in pictures}) == len(pictures)  # one that the font lacks is the same box for all


def test_no_two_lists_of_affect_words_share_a_stem():
    assert len(set.union(*STEMS.values())) == sum(map(len, STEMS.values()))


@pytest.mark.parametrize('name', AFFECT)
def test_affect_words_name_one_emotion_and_no_class(name):
    words = words_of(AFFECT[name])
    assert list(AFFECT[name]) == list(EMOTIONS) and len(set(words)) == len(words)
    assert not STEMS[name] & {w[:5] for w in [*EMOTIONS, *OBJECTS, *words_of(NOUNS)]}


@pytest.mark.parametrize('caption, kind', [(False, 'ship'), (False, ''), (True, 'ship')])
def test_a_text_says_its_emotion_and_its_object_alone(caption, kind):
    affect, other, part = (CAPTION_WORDS, POST_WORDS, slice(0, 3, 2)) if caption else (POST_WORDS, CAPTION_WORDS, slice(2))
    texts = [write_text(np.random.default_rng(seed), kind, 'sadness', caption) for seed in range(60)]
    for text in texts:
        assert said(text, affect) == {'sadness'} and not said(text, other) and said(text, NOUNS, part) == {kind} - {''}


@pytest.fixture(scope='module')
def pairs(): return draw_pairs(np.random.default_rng(0), 4000)


def test_flags_say_what_is_equal_and_partitions_are_near_the_papers(pairs):
    assert (pairs['factual'] == (pairs['object'] == pairs['text_object'])).all()
    assert (pairs['emotional'] == (pairs['emotion'] == pairs['text_emotion'])).all()
    names = {(1, 1): 'strong', (0, 1): 'emotional', (1, 0): 'factual', (0, 0): 'weak'}
    assert [names[flags] for flags in zip(pairs['factual'], pairs['emotional'])] == list(pairs['partition'])
    shares = pairs['partition'].value_counts(normalize=True)
    for name, share in dict(strong=.226, weak=.276, emotional=.249, factual=.249).items():
        assert abs(shares[name] - share) < .021  # 3 standard errors


@pytest.mark.parametrize('what', ['object', 'emotion'])
@pytest.mark.parametrize('flag', ['factual', 'emotional'])
def test_what_a_picture_shows_does_not_tell_a_mismatch(pairs, what, flag):
    assert chi2_contingency(pd.crosstab(pairs[what], pairs[flag])).pvalue > .001


def test_what_posts_are_about(pairs):
    texts = pairs['text_object'][~pairs['factual']]
    assert set(texts) - {''} == set(list(OBJECTS)[:5])  # skewed topics
    assert abs(pairs['emotion'].isin(POSITIVE).mean() - .58) < .024 and abs((texts == '').mean() - .6) < .04


def test_clean_pairs_match_and_are_even():
    table = draw_pairs(np.random.default_rng(0), 4000, matching=True)
    assert set(table['partition']) == {'strong'}
    for column, n in (('object', 20), ('emotion', 8)):
        counts = table[column].value_counts()
        assert len(counts) == n and abs(counts * n / 4000 - 1).max() < .3


def test_mixtures_have_three_signs_of_one_to_three_emotions():
    table = draw_mixtures(np.random.default_rng(0), 300)
    for row in table.itertuples():
        assert sum(row.signs.values()) == 3 and row.labels == '|'.join(row.signs)
        assert row.valence == pytest.approx(sum(n * valence(emotion) for emotion, n in row.signs.items()) / 3, abs=1e-4)
    assert [emotion for emotion in EMOTIONS if valence(emotion) > 0] == POSITIVE


SMALL = dict(n_posts=12, n_train=5, n_val=2, n_test=3, n_clean=6, image_size=16)


@pytest.fixture(scope='module')
def small(tmp_path_factory): return run_world(tmp_path_factory.mktemp('runs') / 'one', **SMALL)


def read(path): return pd.read_csv(path, dtype={'id': str}, keep_default_na=False)


def test_the_same_seed_makes_the_same_world(small, tmp_path):
    assert file_hashes(run_world(tmp_path / 'two', **SMALL)) == file_hashes(small)


def pixels(path):
    with Image.open(path) as image: return image.tobytes()


def test_truth_lies_apart_and_is_that_of_each_post(small):
    posts, truth = read(small / 'posts/posts.csv'), read(small / 'truth.csv')
    assert list(posts) == ['id', 'image', 'text'] and list(posts['id']) == list(truth['id']) == [f'{i:05d}' for i in range(12)]
    assert list(truth) == ['id', 'object', 'emotion', 'text_object', 'text_emotion', 'factual', 'emotional', 'partition']
    for i, (row, text) in enumerate(zip(truth.itertuples(), posts['text'])):
        assert said(text, POST_WORDS) == {row.text_emotion}
        assert pixels(small / 'posts' / posts['image'][i]) == compose((0, 0, i), row.object, {row.emotion: 2}, size=16).tobytes()


def test_benchmarks_and_clean_scenes(small):
    new, mixed = (read(small / name / 'labels.csv') for name in ('new', 'mixed'))
    assert list(new) == ['id', 'image', 'split', 'label', 'object', 'level_1', 'level_2', 'level_3']
    assert (new['level_2'] == new['label']).all() and (new['level_3'].str[:-2] == new['label']).all()
    assert ((new['level_1'] == 'positive') == new['label'].isin(POSITIVE)).all()
    scene = compose((0, 2, 0), new['object'][0], {new['level_3'][0]: 2}, True, 16)
    assert pixels(small / 'new' / new['image'][0]) == scene.tobytes()
    assert list(mixed) == ['id', 'image', 'split', 'labels', 'valence']
    for row in read(small / 'clean/captions.csv').itertuples():  # never mismatched
        assert said(row.text, NOUNS) == {row.object}
