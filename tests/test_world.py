"pacl.parts.world: glyphs and words that no two sides share, pixels that no number of workers changes, noise with known shares."
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from pacl.parts import world
from pacl.parts.stages import file_hashes
from pacl.parts.standins import TUNING_WORDS
from pacl.parts.world import (BARE_TEMPLATES, CAPTION_TEMPLATES, CLEAN_WORDS, CLUTTER, EMOTIONS, NOUNS, OBJECTS, POST_TEMPLATES, POST_WORDS,
                        POSITIVE, compose, draw_images, draw_mixtures, draw_pairs, draw_scene, glyph_picture, own_glyphs, run_world,
                        sign_glyphs, turn_hue, valence, write_text)

GLYPH_ROWS = {**OBJECTS, **EMOTIONS, 'clutter': CLUTTER}
AFFECT = {'post': POST_WORDS, 'clean': CLEAN_WORDS, 'tuning': TUNING_WORDS}


def words_of(rows): return [word for row in rows.values() for word in row.split()]


def said(text, rows, part=slice(None)):
    "Keys whose words, or part of them, stand in the text."
    tokens = {token.strip('#.,!:') for token in text.replace('/', ' ').split()}
    return {key for key, row in rows.items() if tokens & set(row.split()[part])}


# glyphs

def test_the_benchmark_new_shares_no_glyph_with_the_posts():
    old, new = ({g for row in GLYPH_ROWS.values() for g in own_glyphs(row, half)} for half in (False, True))
    assert not old & new and old | new == set(words_of(GLYPH_ROWS))
    assert len(words_of(GLYPH_ROWS)) == len(old | new)  # nor does a glyph stand for two things
    for name, row in GLYPH_ROWS.items():
        need = 1 if name in OBJECTS else 2
        assert min(len(own_glyphs(row, half)) for half in (False, True)) >= need, name


def test_every_glyph_has_a_picture_of_its_own():
    pictures = {g: glyph_picture(g) for g in words_of(GLYPH_ROWS)}
    empty = [g for g, p in pictures.items() if p.getchannel('A').getextrema()[1] == 0 or max(p.size) > 200 or min(p.size) < 10]
    assert not empty  # a glyph that the font lacks is drawn as nothing, or as the same box for all
    assert len({(p.size, p.tobytes()) for p in pictures.values()}) == len(pictures)


@pytest.mark.parametrize('new', [False, True])
def test_a_scene_shows_one_object_two_signs_and_two_pieces_of_clutter(new, monkeypatch):
    drawn = []
    monkeypatch.setattr(world, 'draw_scene', lambda rng, glyphs, size: drawn.extend(glyphs))
    for i in range(20): compose((0, i), 'dog', {'fear': 2}, new)
    for start in range(0, 100, 5):
        glyphs, lows, _ = zip(*drawn[start:start + 5])
        halves = [own_glyphs(row, new) for row in (OBJECTS['dog'], EMOTIONS['fear'], EMOTIONS['fear'], CLUTTER, CLUTTER)]
        assert all(g in half for g, half in zip(glyphs, halves)) and len(set(glyphs)) == 5
        assert list(lows) == sorted(lows, reverse=True)  # the largest first: the small ones find room beside it
    assert {g for g, *_ in drawn if g in OBJECTS['dog']} == set(own_glyphs(OBJECTS['dog'], new))


def test_turning_the_hue_keeps_the_shape():
    picture = glyph_picture('🌹')
    turned = turn_hue(picture, 85)
    assert turned.getchannel('A').tobytes() == picture.getchannel('A').tobytes()
    before, after = (np.asarray(p.convert('RGB').convert('HSV'), int) for p in (picture, turned))
    assert np.abs(before[..., 2] - after[..., 2]).max() <= 2  # the same brightness …
    coloured = (before[..., 1] > 100) & (before[..., 2] > 100)
    shift = (after[..., 0] - before[..., 0])[coloured] % 256
    assert coloured.any() and np.abs(shift - 85).max() <= 3  # … and a third of the circle further


def test_same_seed_same_picture():
    again = compose((3, 1, 4), 'cat', {'awe': 2}, size=48)
    assert again.size == (48, 48) and again.mode == 'RGB'
    again = again.tobytes()
    assert again == compose((3, 1, 4), 'cat', {'awe': 2}, size=48).tobytes() != compose((3, 1, 5), 'cat', {'awe': 2}, size=48).tobytes()


def test_glyphs_keep_clear_of_each_other_where_there_is_room(monkeypatch):
    covered, boxes, paste = [], [], world.Image.Image.paste
    def spy(self, picture, at, mask): boxes.append((*at, *picture.size)); paste(self, picture, at, mask)
    monkeypatch.setattr(world.Image.Image, 'paste', spy)
    for seed in range(40):
        boxes.clear()
        draw_scene(np.random.default_rng(seed), [('🍎', .3, .3), ('🍇', .2, .2)])
        (a, b, w, h), (c, d, v, u) = boxes
        covered.append(max(0, min(a + w, c + v) - max(a, c)) * max(0, min(b + h, d + u) - max(b, d)))
    assert np.mean(covered) < 1  # pixels; one try in place of twelve: 57


@pytest.mark.parametrize('workers', [1, 2])
def test_any_number_of_workers_draws_the_same_pixels(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'cpu_count', lambda: workers)
    table = draw_pairs(np.random.default_rng(0), 34)  # more than one chunk
    table.insert(0, 'id', [f'{i:05d}' for i in range(34)])
    table['signs'] = [{'awe-2': 2, emotion: 1} for emotion in table['emotion']]
    names = draw_images(tmp_path, table, (7, 1), True, 16)
    assert names[0] == 'images/00000.png' and len(names) == 34
    for i in (0, 31, 32, 33):
        with world.Image.open(tmp_path / names[i]) as image:
            expected = compose((7, 1, i), table['object'][i], table['signs'][i], True, 16)
            assert image.tobytes() == expected.tobytes()


# words

@pytest.mark.parametrize('one, other', [('post', 'clean'), ('post', 'tuning'), ('clean', 'tuning')])
def test_no_two_lists_of_affect_words_share_a_stem(one, other):
    stems = [{w[:5] for w in words_of(AFFECT[name])} for name in (one, other)]
    assert not stems[0] & stems[1]


@pytest.mark.parametrize('name', AFFECT)
def test_affect_words_name_one_emotion_and_no_class(name):
    words = words_of(AFFECT[name])
    assert list(AFFECT[name]) == list(EMOTIONS) and len(set(words)) == len(words)
    names = {w[:5] for w in [*EMOTIONS, *OBJECTS, *words_of(NOUNS)]}
    assert not [w for w in words if w[:5] in names]


def test_each_object_has_three_nouns_of_its_own():
    assert list(NOUNS) == list(OBJECTS) and len(set(words_of(NOUNS))) == len(words_of(NOUNS))
    assert all(len(row.split()) == 3 for row in NOUNS.values())


def test_posts_and_captions_are_built_differently():
    posts = {*POST_TEMPLATES, *BARE_TEMPLATES}
    assert not posts & set(CAPTION_TEMPLATES) and len(posts) == len(POST_TEMPLATES) + len(BARE_TEMPLATES)
    filled = [{t.format(noun='N', a='A', b='B') for t in ts} for ts in (posts, CAPTION_TEMPLATES)]
    assert not filled[0] & filled[1]
    assert all('{noun}' in t for t in POST_TEMPLATES + CAPTION_TEMPLATES) and not any('{noun}' in t for t in BARE_TEMPLATES)


@pytest.mark.parametrize('caption, kind', [(False, 'ship'), (False, ''), (True, 'ship')])
def test_a_text_says_its_emotion_and_its_object_alone(caption, kind):
    affect, other, part = (CLEAN_WORDS, POST_WORDS, slice(0, 3, 2)) if caption else (POST_WORDS, CLEAN_WORDS, slice(2))
    texts = [write_text(np.random.default_rng(seed), kind, 'sadness', caption) for seed in range(60)]
    for text in texts:
        assert said(text, affect) == {'sadness'} and not said(text, other)
        assert said(text, NOUNS, part) == ({kind} if kind else set())
    nouns = NOUNS['ship'].split()
    assert {noun for noun in nouns if any(noun in text.replace(',', '').split() for text in texts)} == (set(nouns[part]) if kind else set())


# noise

@pytest.fixture(scope='module', params=['social', 'uniform'])
def pairs(request): return request.param, draw_pairs(np.random.default_rng(0), 4000, request.param)


def test_partitions_are_near_the_papers(pairs):
    _, table = pairs
    shares = table['partition'].value_counts(normalize=True)
    for name, share in dict(strong=.226, weak=.276).items(): assert abs(shares[name] - share) < .02  # 3 standard errors
    assert abs(shares['emotional'] + shares['factual'] - .499) < .024 and abs(shares['emotional'] - shares['factual']) < .03


def test_flags_and_partition_say_what_is_equal(pairs):
    _, table = pairs
    assert (table['factual'] == (table['object'] == table['text_object'])).all()
    assert (table['emotional'] == (table['emotion'] == table['text_emotion'])).all()
    names = {(True, True): 'strong', (False, True): 'emotional', (True, False): 'factual', (False, False): 'weak'}
    assert [names[flags] for flags in zip(table['factual'], table['emotional'])] == list(table['partition'])


@pytest.mark.parametrize('what', ['object', 'emotion'])
@pytest.mark.parametrize('flag', ['factual', 'emotional'])
def test_what_a_picture_shows_does_not_tell_a_mismatch(pairs, what, flag):
    _, table = pairs
    assert chi2_contingency(pd.crosstab(table[what], table[flag])).pvalue > .001
    assert chi2_contingency(pd.crosstab(table['factual'], table['emotional'])).pvalue > .001


def test_what_posts_are_about(pairs):
    noise, table = pairs
    mismatched = table[~table['factual']]
    unnamed = (mismatched['text_object'] == '').mean()
    named = mismatched.loc[mismatched['text_object'] != '', 'text_object'].value_counts()
    if noise == 'uniform':
        for column in ('object', 'emotion', 'text_emotion'): assert chisquare(table[column].value_counts()).pvalue > .001
        assert unnamed == 0 and len(named) == 20 and chisquare(named).pvalue > .001
    else:
        order = table['object'].value_counts().reindex(list(OBJECTS))
        assert order.iloc[:5].min() > 1.5 * order.iloc[15:].max() and order.min() > 0  # skewed topics
        assert abs(table['emotion'].isin(POSITIVE).mean() - .58) < .024 and abs(unnamed - .6) < .04
        assert set(named.index) == set(list(OBJECTS)[:5])


@pytest.mark.parametrize('noise', ['', 'Social', 'uniform '])
def test_unknown_noise(noise):
    with pytest.raises(ValueError, match=f'noise is "{noise}", expected social or uniform'): draw_pairs(np.random.default_rng(0), 1, noise)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.sampled_from(['social', 'uniform']), st.sampled_from([0, 1]))
def test_all_or_nothing_may_match(n, noise, matched):
    table = draw_pairs(np.random.default_rng(n), n, noise, matched)
    assert len(table) == n and (table['partition'] == ('strong' if matched else 'weak')).all()
    assert ((table['object'] == table['text_object']) == bool(matched)).all()


# the stage

SMALL = dict(n_posts=12, n_train=5, n_val=2, n_test=3, n_clean=6, image_size=16)


@pytest.fixture(scope='module')
def small(tmp_path_factory): return run_world(tmp_path_factory.mktemp('runs') / 'one', **SMALL)


def read(path): return pd.read_csv(path, dtype={'id': str}, keep_default_na=False)


def test_the_same_seed_makes_the_same_world(small, tmp_path):
    again, other = run_world(tmp_path / 'two', **SMALL), run_world(tmp_path / 'three', **SMALL, seed=1)
    assert file_hashes(small) == file_hashes(again)
    same = {name for name, value in file_hashes(small).items() if file_hashes(other).get(name) == value}
    assert not same


def test_truth_lies_apart_from_what_is_learnt_from(small):
    posts, truth = read(small / 'posts/posts.csv'), read(small / 'truth.csv')
    assert list(posts) == ['id', 'image', 'text'] and list(posts['id']) == list(truth['id']) == [f'{i:05d}' for i in range(12)]
    assert list(truth) == ['id', 'object', 'emotion', 'text_object', 'text_emotion', 'factual', 'emotional', 'partition']
    assert [p.name for p in small.rglob('*truth*')] == ['truth.csv']
    for row, text in zip(truth.itertuples(), posts['text']):  # the truth is that of the row's own text and picture
        assert said(text, POST_WORDS) == {row.text_emotion} and said(text, NOUNS, slice(2)) == {row.text_object} - {''}
        with world.Image.open(small / 'posts' / posts['image'][int(row.id)]) as image:
            assert image.tobytes() == compose((0, 0, int(row.id)), row.object, {row.emotion: 2}, size=16).tobytes()


def test_benchmarks_and_clean_scenes(small):
    levels = ['level_1', 'level_2', 'level_3']
    for name, number, columns in (('new', 2, ['label', 'object', *levels]), ('seen', 3, ['label', 'object'])):
        table = read(small / name / 'labels.csv')
        assert list(table) == ['id', 'image', 'split', *columns] and table['id'].str.fullmatch(r'\d{5}').all()
        assert table['split'].value_counts().to_dict() == {'train': 5, 'val': 2, 'test': 3}
        first = table.iloc[0]
        with world.Image.open(small / name / first['image']) as image:
            sign = first['level_3' if name == 'new' else 'label']
            assert image.tobytes() == compose((0, number, 0), first['object'], {sign: 2}, name == 'new', 16).tobytes()
    table = read(small / 'new/labels.csv')
    assert (table['level_2'] == table['label']).all() and (table['level_3'].str[:-2] == table['label']).all()
    assert set(table['level_3'].str[-1]) == set('123')
    assert ((table['level_1'] == 'positive') == table['label'].isin(POSITIVE)).all()
    mixed = read(small / 'mixed/labels.csv')
    assert list(mixed) == ['id', 'image', 'split', 'labels', 'valence'] and set(mixed['labels'].str.count(r'\|')) == {0, 1, 2}
    clean = read(small / 'clean/captions.csv')
    assert list(clean) == ['id', 'image', 'text', 'object', 'emotion'] and list(clean['id']) == [f'{i:05d}' for i in range(6)]
    for row in clean.itertuples():  # never mismatched
        assert said(row.text, CLEAN_WORDS) == {row.emotion} and said(row.text, NOUNS) == {row.object}


def test_kinds_of_an_emotion_divide_its_glyphs():
    for emotion in EMOTIONS:
        kinds = [sign_glyphs(f'{emotion}-{k}', True) for k in (1, 2, 3)]
        assert sum(kinds, []) == sign_glyphs(emotion, True) == own_glyphs(EMOTIONS[emotion], True) and {len(k) for k in kinds} == {2}


def test_valence_is_that_of_the_words():
    from vader import SentimentIntensityAnalyzer
    lexicon = SentimentIntensityAnalyzer().lexicon
    for emotion in EMOTIONS:
        rated = [lexicon[word] for word in POST_WORDS[emotion].split() if word in lexicon]
        assert len(rated) >= 4 and valence(emotion) == pytest.approx(sum(rated) / len(rated))
        assert (valence(emotion) > 0) == (emotion in POSITIVE)


def test_mixtures_have_three_signs_of_one_to_three_emotions():
    table = draw_mixtures(np.random.default_rng(0), 300)
    for row in table.itertuples():
        assert sum(row.signs.values()) == 3 and row.labels == '|'.join(row.signs) and set(row.signs) <= set(EMOTIONS)
        signs = [emotion for emotion, n in row.signs.items() for _ in range(n)]
        assert row.valence == pytest.approx(np.mean([valence(emotion) for emotion in signs]), abs=1e-4)
    assert chisquare(table['signs'].map(len).value_counts()).pvalue > .01
