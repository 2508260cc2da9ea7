"pacl.partition: Eqs. 1 and 2, the four partitions, and a stage that goes on where it was killed."
import multiprocessing
import os
import signal
from itertools import product

import numpy as np
import pandas as pd
import pytest
from test_data import COLOURS, make_world

from pacl import partition
from pacl.parts import judges, standins
from pacl.parts.data import load_set, run_data
from pacl.parts.stages import InputError, read_record, write_stage
from pacl.partition import (
    NAMES, PARTITIONS, SCALES, assign_partition, clip_score, embed_pairs, embed_posts, emotion_score, plot_gallery,
    read_partition, read_scores, rescale, run_partition, user_paths, valence_score)

@pytest.mark.parametrize('γ', [0, .5, .7, 1])
def test_a_partition_is_two_comparisons(γ):
    pairs = list(product([0, .1, .5, .6, .7, .8, 1], repeat=2))
    names = {(1, 1): 'strong', (0, 1): 'emotional', (1, 0): 'factual', (0, 0): 'weak'}
    assert assign_partition(*zip(*pairs), γ).tolist() == [names[f > γ, e > γ] for f, e in pairs]


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

def test_equations_1_and_2_and_their_ranks():
    a, b = np.random.default_rng(0).integers(-2, 3, (2, 500, 3)).astype(np.float32)  # some rows are all zeros
    lengths = np.sqrt((a ** 2).sum(1) * (b ** 2).sum(1))
    cosines = (a * b).sum(1) / np.where(lengths, lengths, 1)
    np.testing.assert_allclose(clip_score(a, b), np.clip(2.5 * cosines, 0, 1), atol=1e-6)
    np.testing.assert_allclose(emotion_score(a, b), np.clip(cosines, 0, 1), atol=1e-6)
    ranks = clip_score(a, b, 'rank')
    assert (ranks[:, None] < ranks)[cosines[:, None] < cosines - 1e-6].all()


@pytest.mark.filterwarnings('ignore:invalid value')
def test_wrong_numbers_and_scales():
    says = 'unknown scale "clipscor"; nearest valid: clipscore; valid: clipscore, rank'
    with pytest.raises(InputError, match=says): rescale(np.ones(4), 'clipscor')
    for number in (np.nan, -np.inf):
        score = clip_score(np.ones((4, 3)), np.where(np.arange(4)[:, None] == 3, number, np.ones((4, 3))))
        with pytest.raises(ValueError, match='row 3 .*no number'): assign_partition(score, np.ones(4))


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


def test_a_gallery_leaves_out_what_is_empty():
    table = pd.DataFrame({'factual': [.9, .8], 'emotional': [.9, .1], 'partition': ['strong', 'factual']})
    fig = plot_gallery(table, np.zeros((2, 4, 4, 3), np.uint8), ['a $ b'] * 2, columns=1)
    assert [ax.get_title().split()[0] for ax in fig.axes] == ['strong', 'factual']
    fig.canvas.draw()


# the stage, with evaluators that judge make_world's pictures by colour and brightness and are right by construction

class Anp:
    def top_phrases(self, images, k=3):
        return [', '.join([f'{"joy" if image.max() > 200 else "grief"} thing'] * k) for image in images]


class Clip:
    reads = 'images'
    def embed_images(self, images): return images.reshape(len(images), -1, 3).mean(1)
    def embed_texts(self, texts): return np.array([COLOURS[text.split()[0]] for text in texts], float)


class Sentiment:
    def embed_texts(self, texts): return np.array([[1., 0] if 'joy' in text else [0, 1.] for text in texts])


JUDGES = {'factual': Clip(), 'emotional': judges.Phrases(Anp(), Sentiment())}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(standins, 'load_evaluators', lambda folder: (Clip(), Anp(), Sentiment()))
    run = make_world(tmp_path / 'run', bad=[7])
    run_data(run, image_size=4)
    with write_stage(run / 'standins', {}) as folder: (folder / 'anps.txt').write_text('joy thing')
    return run


def test_run_partition(run):
    out = run_partition(run, threshold=.7)
    table = read_partition(out / 'partition.csv')
    assert len(table) == 59 and '0007' not in set(table['id'])  # its picture was rejected
    pd.testing.assert_frame_equal(table, read_partition(out / 'truth.csv')[list(table)], check_dtype=False)
    assert read_record(out)['result'] == table['partition'].value_counts().to_dict()


@pytest.mark.parametrize('scale', SCALES)
def test_the_equations_are_what_the_stage_calls(run, scale):
    posts, images = load_set(run, 'posts')
    pairs = embed_pairs({'images': images}, posts['text'].tolist(), JUDGES)
    table = posts[['id']].assign(factual=clip_score(pairs['factual_image'], pairs['factual_text'], scale),
                                 emotional=emotion_score(pairs['emotional_image'], pairs['emotional_text'], scale)).round(6)
    table['partition'] = assign_partition(table['factual'], table['emotional'], .53)
    out = run_partition(run, threshold=.53, scale=scale)
    assert (out / 'partition.csv').read_text() == table.to_csv(index=False)
    assert (out / 'scores.csv').read_text() == table.drop(columns='partition').to_csv(index=False)


ASKED = dict(factual='open_clip:a/b', phrases='clip-anp:list', sentences='bert')


@pytest.fixture
def asked(monkeypatch):
    "Shards of 8 posts; says how many posts the evaluators were asked about in each call."
    monkeypatch.setattr(partition, 'SHARD', 8)
    monkeypatch.setattr(judges, 'load_judges', lambda run, factual, phrases, sentences: JUDGES)
    sizes = []
    embed = Clip.embed_texts
    monkeypatch.setattr(Clip, 'embed_texts', lambda self, texts: sizes.append(len(texts)) or embed(self, texts))
    return sizes


def test_shards_give_what_the_whole_gives(run, asked, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(partition, 'SHARD', 100)
        whole = (run_partition(run, threshold=.7) / 'partition.csv').read_bytes()
    asked.clear()
    out = run_partition(run, threshold=.7, **ASKED)
    assert asked == [8] * 7 + [3] and (out / 'partition.csv').read_bytes() == whole
    assert list(read_record(out)['inputs']) == ['data']  # no stand-ins are read
    assert list(read_record(run_partition(run, **ASKED | {'sentences': 'standins'}))['inputs']) == ['data', 'standins']


def test_a_killed_run_goes_on(run, asked, monkeypatch):
    def killed():
        embed = Clip.embed_texts
        def last(self, texts):
            if len(asked) == 3: os.kill(os.getpid(), signal.SIGKILL)
            return embed(self, texts)
        monkeypatch.setattr(Clip, 'embed_texts', last)
        run_partition(run, **ASKED)
    process = multiprocessing.get_context('fork').Process(target=killed)
    process.start(); process.join()
    assert process.exitcode == -signal.SIGKILL and len(list(run.glob('.kept/partition/*/*.npy'))) == 3
    run_partition(run, scale='rank', **ASKED)
    monkeypatch.setattr(judges, 'load_judges', None)  # nothing is left to ask
    run_partition(run, threshold=.3, **ASKED)  # scale and threshold come later
    assert asked == [8] * 4 + [3]


@pytest.mark.parametrize('changed', [{'factual': 'open_clip:a/c'}, {'phrases': 'clip-anp:x'}, {'sentences': 'roberta'}])
def test_other_evaluators_do_not_go_on_with_these_shards(run, asked, changed):
    for names in (ASKED, ASKED, ASKED | changed): embed_posts(run, names)
    assert asked == 2 * ([8] * 7 + [3])


def test_paths_of_the_user_are_watched(tmp_path, monkeypatch):
    for name in ('anps.txt', 'clip.pt', 'bert'): (tmp_path / name).touch()
    for text in ('open_clip:ViT-B-32/{}/clip.pt', 'clip-anp:{}/anps.txt', '{}/bert', 'scores:{}/anps.txt', 'valence:iaps/vad:{}/bert'):
        found = user_paths(dict.fromkeys(NAMES, text.format(tmp_path)))
        assert {*found} == {tmp_path / text.rpartition('/')[2]}
    assert user_paths(ASKED | {'sentences': 'vinai/bertweet-base'}) == []
    monkeypatch.chdir(tmp_path)
    assert user_paths(dict.fromkeys(NAMES, 'scores:anps.txt')) == 3 * [tmp_path / 'anps.txt']


def test_truth_does_not_influence_the_partition(run):
    before = (run_partition(run, threshold=.53) / 'partition.csv').read_bytes()
    (run / 'world/truth.csv').unlink()
    run_partition(run, threshold=.54)
    out = run_partition(run, threshold=.53)
    assert (out / 'partition.csv').read_bytes() == before
    assert sorted(os.listdir(out)) == ['partition.csv', 'scores.csv', 'stage.json']


def test_a_truth_of_other_posts_is_refused(run):
    truth = pd.read_csv(run / 'world/truth.csv', dtype=str)
    truth[truth['id'] != '0009'].to_csv(run / 'world/truth.csv', index=False)
    with pytest.raises(InputError, match='truth.csv: no row for id 0009 .*1 of 59.*Delete .*world'): run_partition(run)
    assert not (run / 'partition').exists()


@pytest.mark.parametrize('name, value, says', [('threshold', -.1, 'threshold .*-0.1, expected'),
                                              ('scale', 'ranks', 'scale "ranks"; .* clipscore, rank')])
def test_a_wrong_setting_stops_before_any_encoder(run, asked, name, value, says):
    with pytest.raises(InputError, match=says): run_partition(run, **{name: value})
    assert not asked and not (run / 'partition').exists()


# judges that rate, and scores from a file

def test_valence_is_compared_by_rank():
    picture, text = np.array([[1.5, 3, 5, 6.5], [-.9, .8, .1, .1]])[:, :, None]
    assert valence_score(picture, text).tolist() == [1, .5, .875, .625]
    with pytest.raises(InputError, match='valence of all 4 texts is 0: .*VADER'): valence_score(picture, np.zeros((4, 1)))
    with pytest.raises(InputError, match='valence of all 4 pictures is 0'): valence_score(np.zeros((4, 1)), text)


def test_scores_of_a_file_are_cut_as_they_are(run, tmp_path):
    posts, _ = load_set(run, 'posts')
    path = tmp_path / 'scores.csv'
    given = posts[['id']].assign(factual=np.linspace(0, 1, 59).round(6), emotional=np.linspace(.9, .1, 59).round(6)).astype(str)
    given[::-1].to_csv(path, index=False)

    def found(**judges): return pd.read_csv(run_partition(run, **judges) / 'scores.csv', dtype=str)
    assert found(factual=f'scores:{path}', phrases=f'scores:{path}').equals(given)
    assert list(read_record(run / 'partition')['inputs']) == ['data', str(path)]
    assert (found(factual=f'scores:{path}') == given).all().tolist() == [True, True, False]  # one beside a judge


@pytest.mark.parametrize('rows, says', [
    ('a,.2', 'no row for id b'), ('a,.2\nb,.8\nc,1', 'id is "c"'), ('a,.2\na,.8', 'id is "a", expected an id that no row above has'),
    ('a,.2\nb,nan', 'row 3 .*factual is "nan"'), ('a,.2\nb,1.1', 'factual is "1.1", expected a number in .0, 1.')])
def test_wrong_scores_are_named(tmp_path, rows, says):
    (tmp_path / 'scores.csv').write_text(f'id,factual\n{rows}\n')
    with pytest.raises(InputError, match=f'scores.csv.*{says}'): read_scores(tmp_path / 'scores.csv', 'factual', ['a', 'b'])
