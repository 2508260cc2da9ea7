"pacl.partition: Eqs. 1 and 2, the four partitions, and a stage that goes on where it was killed."
import json
import multiprocessing
import os
import signal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_data import COLOURS, make_world

from pacl import partition
from pacl.parts import judges, standins
from pacl.parts.data import load_set, run_data
from pacl.parts.stages import InputError, read_record, write_stage
from pacl.partition import (
    PARTITIONS, SCALES, assign_partition, clip_score, embed_pairs, embed_posts, emotion_score, plot_gallery,
    plot_partition, read_partition, run_partition, user_paths)

unit = st.sampled_from([0., 0.5, 0.7, 1.]) | st.floats(0, 1)


@st.composite
def scores(draw):
    n = draw(st.integers(1, 8))
    return draw(hnp.arrays(float, n, elements=unit)), draw(hnp.arrays(float, n, elements=unit))


@given(scores(), unit)
def test_a_partition_is_two_comparisons(pair, γ):
    names = {(1, 1): 'strong', (0, 1): 'emotional', (1, 0): 'factual', (0, 0): 'weak'}
    assert assign_partition(*pair, γ).tolist() == [names[f > γ, e > γ] for f, e in zip(*pair)]
    assert set(assign_partition(*pair, 1)) == {'weak'}


def test_the_default_threshold_is_the_papers():
    assert assign_partition(pd.Series([.71, .7, .71, .7]), pd.Series([.71, .71, .7, .7])).tolist() == list(PARTITIONS)


@pytest.mark.parametrize('factual, emotional, γ, says', [
    ([.5], [.5], 1.1, r'threshold .* is 1.1, expected a number in \[0, 1\]'),
    ([.5], [.5], np.nan, 'threshold .* is nan'),
    ([.1, .2, np.nan], [.1, .2, .3], .7, 'row 2 .*no number'),
    ([.1, .2, .3], [.1, np.nan, .3], .7, 'row 1 .*no number'),
    ([.1, .2], [.1], .7, 'shape'),
])
def test_what_cannot_be_partitioned(factual, emotional, γ, says):
    with pytest.raises(ValueError, match=says): assign_partition(factual, emotional, γ)


# the equations

@st.composite
def embeddings(draw):
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    number = st.sampled_from([-1., 0., 1.]) | st.floats(-1, 1, width=32)
    return [draw(hnp.arrays(np.float32, shape, elements=number)) for _ in range(2)]


def cosine(a, b):
    product = sum(float(x) * float(y) for x, y in zip(a, b))
    lengths = sum(float(x) ** 2 for x in a) ** .5 * sum(float(y) ** 2 for y in b) ** .5
    return product / max(lengths, 1e-12)


@given(embeddings())
def test_equations_1_and_2(pair):
    cosines = [cosine(a, b) for a, b in zip(*pair)]
    np.testing.assert_allclose(clip_score(*pair), [min(2.5 * max(c, 0), 1) for c in cosines], atol=1e-9)
    np.testing.assert_allclose(emotion_score(*pair), [max(c, 0) for c in cosines], atol=1e-9)
    np.testing.assert_array_equal(emotion_score(*pair, 'clipscore'), emotion_score(*pair))


@settings(deadline=None)  # scipy is imported by the first call
@given(embeddings(), st.sampled_from(SCALES))
def test_every_scale_keeps_order_and_range(pair, scale):
    cosines = np.array([cosine(a, b) for a, b in zip(*pair)])
    found = clip_score(*pair, scale)
    assert ((0 <= found) & (found <= 1)).all()
    assert (found[:, None] <= found)[cosines[:, None] < cosines - 1e-9].all()


def test_ranks_are_quantiles():
    angle = np.random.default_rng(0).uniform(0, np.pi, 1000)
    found = clip_score(np.stack([np.cos(angle), np.sin(angle)], 1), np.tile([1., 0.], (1000, 1)), 'rank')
    for γ in (0, .25, .53, 1): assert abs((found > γ).mean() - (1 - γ)) <= .001


@pytest.mark.parametrize('row, number, scale, says', [
    (8193, np.nan, 'rank', 'row 8193 .*not finite'), (1, -np.inf, 'cosine', 'row 1 .*not finite'),
    (0, 0, 'clipscor', '"clipscor", expected one of clipscore, cosine, minmax, rank')])
@pytest.mark.filterwarnings('ignore:invalid value')
def test_wrong_numbers_and_scales(row, number, scale, says):
    wrong = np.ones((8195, 3))
    wrong[row, 1] = number
    with pytest.raises(ValueError, match=says): clip_score(np.ones((8195, 3)), wrong, scale)
    with pytest.raises(ValueError, match='one shape'): clip_score(wrong, wrong[:, :2])


# files

@pytest.mark.parametrize('row, says', [
    ('0017,.9,.2,emotionl', ['row 3', 'id 0017', 'partition is "emotionl"', ', '.join(PARTITIONS), '1 of 2']),
    ('0017,.9,high,weak', ['row 3', 'emotional is "high"', '[0, 1]']),
    ('0017,1.9,.2,weak', ['row 3', 'factual is "1.9"']),
    ('0018,.9,.2,weak', ['row 3', 'id is "0018"']),
    ('17,.9,.2,weak', ['no row for id 0017 of data/posts.csv', '1 of 2', 'Correct them, or delete the folder']),
    ('0017,.9,.2,weak\n0019,.9,.2,weak', ['row 4', 'id is "0019", expected an id of data/posts.csv']),
])
def test_a_wrong_partition_file_is_named(tmp_path, row, says):
    path = tmp_path / 'partition.csv'
    path.write_text(f'id,factual,emotional,partition\n0018,0.5,1,emotional\n{row}\n')
    with pytest.raises(InputError) as error: read_partition(path, ['0017', '0018'])
    for part in [str(path), *says]: assert part in str(error.value)


def test_a_partition_comes_in_the_order_of_the_posts(tmp_path):
    path = tmp_path / 'partition.csv'
    path.write_text('id,factual,emotional,partition\n02,.9,.8,strong\n01,.9,.2,factual\n')
    assert read_partition(path, pd.Series(['01', '02']))['partition'].tolist() == ['factual', 'strong']
    assert read_partition(path)['id'].tolist() == ['02', '01']


def test_figures_show_every_partition():
    table = pd.DataFrame(np.random.default_rng(0).random((60, 2)), columns=['factual', 'emotional'])
    table['partition'] = assign_partition(*table.to_numpy().T, .5)
    labels = [text.get_text() for text in plot_partition(table, .5).legends[0].get_texts()]
    assert [label.split()[0] for label in labels] == list(PARTITIONS)
    few = table[table['partition'] != 'weak'].reset_index(drop=True)  # an empty partition leaves an empty row
    fig = plot_gallery(few, np.zeros((len(few), 4, 4, 3), np.uint8), ['a $ b'] * len(few), columns=3)
    assert len(fig.axes) == 12 and sum(len(ax.images) for ax in fig.axes) == 9
    fig.canvas.draw()


# the stage, with evaluators that judge make_world's pictures by colour and brightness and are right by construction

class Anp:
    def top_phrases(self, images, k=3):
        return [', '.join([f'{"joy" if image.max() > 200 else "grief"} thing'] * k) for image in images]


class Clip:
    def embed_images(self, images): return images.reshape(len(images), -1, 3).mean(1)
    def embed_texts(self, texts): return np.array([COLOURS[text.split()[0]] for text in texts], float)


class Sentiment:
    def embed_texts(self, texts): return np.array([[1., 0] if 'joy' in text else [0, 1.] for text in texts])


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(standins, 'load_evaluators', lambda folder: (Clip(), Anp(), Sentiment()))
    run = make_world(tmp_path / 'run', bad=[7])
    run_data(run, image_size=4)
    with write_stage(run / 'standins', {'stage': 'standins'}) as folder: (folder / 'anps.txt').write_text('joy thing')
    return run


def test_run_partition(run):
    out = run_partition(run, threshold=.7)
    table = read_partition(out / 'partition.csv')
    assert len(table) == 59 and '0007' not in set(table['id'])  # its picture was rejected
    pd.testing.assert_frame_equal(table, read_partition(out / 'true_partition.csv'), check_dtype=False)
    cut = pd.read_csv(out / 'scores.csv', dtype={'id': str})
    pd.testing.assert_frame_equal(cut, table[['id', 'factual', 'emotional']], check_dtype=False, check_names=False)
    quality, result = json.loads((out / 'quality.json').read_text()), read_record(out)['result']
    assert quality['auroc_factual'] == quality['auroc_emotional'] == result['auroc_factual'] == 1
    for i, name in enumerate(PARTITIONS):
        assert quality[name]['recall'] == 1 and quality['confusion'][i][i] == result[name] == (table['partition'] == name).sum()


@pytest.mark.parametrize('scale', SCALES)
def test_the_equations_are_what_the_stage_calls(run, scale):
    posts, images = load_set(run, 'posts')
    pairs = embed_pairs(images, posts['text'].tolist(), Clip(), Anp(), Sentiment())
    table = posts[['id']].assign(factual=clip_score(pairs['image'], pairs['text'], scale),
                                 emotional=emotion_score(pairs['phrases'], pairs['sentence'], scale)).round(6)
    table['partition'] = assign_partition(table['factual'], table['emotional'], .53)
    out = run_partition(run, threshold=.53, scale=scale)
    assert (out / 'partition.csv').read_text() == table.to_csv(index=False)


NAMES = dict(factual='open_clip:a/b', phrases='clip-anp:list', sentences='bert')


@pytest.fixture
def asked(monkeypatch):
    "Shards of 8 posts; says how many posts the evaluators were asked about in each call."
    monkeypatch.setattr(partition, 'SHARD', 8)
    monkeypatch.setattr(judges, 'load_evaluators', lambda run, factual, phrases, sentences: (Clip(), Anp(), Sentiment()))
    sizes = []
    embed = Clip.embed_texts
    monkeypatch.setattr(Clip, 'embed_texts', lambda self, texts: sizes.append(len(texts)) or embed(self, texts))
    return sizes


def test_shards_give_what_the_whole_gives(run, asked):
    whole = (run_partition(run, threshold=.7) / 'partition.csv').read_bytes()
    assert asked == [59]  # the demo's evaluators: features change in the seventh digit with the batch
    asked.clear()
    out = run_partition(run, threshold=.7, **NAMES)
    assert asked == [8] * 7 + [3] and (out / 'partition.csv').read_bytes() == whole
    assert list(read_record(out)['inputs']) == ['data']  # no stand-ins are read
    assert list(read_record(run_partition(run, **NAMES | {'sentences': 'standins'}))['inputs']) == ['data', 'standins']


def test_a_killed_run_goes_on(run, asked, monkeypatch):
    def killed():
        embed = Clip.embed_texts
        def last(self, texts):
            if len(asked) == 3: os.kill(os.getpid(), signal.SIGKILL)
            return embed(self, texts)
        monkeypatch.setattr(Clip, 'embed_texts', last)
        run_partition(run, **NAMES)
    process = multiprocessing.get_context('fork').Process(target=killed)
    process.start(); process.join()
    assert process.exitcode == -signal.SIGKILL and len(list(run.glob('.kept/partition/*/*.npy'))) == 3
    run_partition(run, scale='rank', **NAMES)
    run_partition(run, scale='minmax', threshold=.3, **NAMES)  # scale and threshold come later
    assert asked == [8] * 4 + [3]


@pytest.mark.parametrize('changed', [{'factual': 'open_clip:a/c'}, {'phrases': 'clip-anp:x'}, {'sentences': 'roberta'}])
def test_other_evaluators_do_not_go_on_with_these_shards(run, asked, changed):
    for names in (NAMES, NAMES, NAMES | changed): embed_posts(run, **names)
    assert asked == 2 * ([8] * 7 + [3])


def test_paths_of_the_user_are_watched(tmp_path):
    for name in ('anps.txt', 'clip.pt'): (tmp_path / name).touch()
    (tmp_path / 'bert').mkdir()
    given = dict(factual=f'open_clip:ViT-B-32/{tmp_path}/clip.pt', phrases=f'clip-anp:{tmp_path}/anps.txt', sentences=f'{tmp_path}/bert')
    assert set(user_paths(given)) == {tmp_path / name for name in ('clip.pt', 'anps.txt', 'bert')}
    assert user_paths(NAMES | {'sentences': 'vinai/bertweet-base'}) == []


def test_truth_does_not_influence_the_partition(run):
    before = (run_partition(run, threshold=.53) / 'partition.csv').read_bytes()
    (run / 'world/truth.csv').unlink()
    run_partition(run, threshold=.54)
    out = run_partition(run, threshold=.53)
    assert (out / 'partition.csv').read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ['partition.csv', 'scores.csv', 'stage.json']


def test_a_truth_of_other_posts_is_refused(run):
    truth = pd.read_csv(run / 'world/truth.csv', dtype=str)
    truth[truth['id'] != '0009'].to_csv(run / 'world/truth.csv', index=False)
    with pytest.raises(InputError, match='truth.csv: no row for id 0009 .*1 of 59.*Delete .*world'): run_partition(run)
    assert not (run / 'partition').exists()


@pytest.mark.parametrize('wrong, says', [
    ({'threshold': -.1}, r'threshold .* is -0.1, expected a number in \[0, 1\]'),
    ({'scale': 'ranks'}, 'scale is "ranks", expected one of clipscore')])
def test_a_wrong_setting_stops_before_any_encoder(run, asked, wrong, says):
    with pytest.raises(InputError, match=says): run_partition(run, **wrong)
    assert not asked and not (run / 'partition').exists()
