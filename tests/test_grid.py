"pacl.grid: what each table asks for, what is shared, posts as a row wants them, and the stage on a miniature run."
import itertools
import json
import os
import shutil
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate import BENCHMARKS, EMOTIONS
from test_train import make_run

from pacl import grid as grid_module
from pacl.cluster import POLARITY, cluster_features
from pacl.parts.readers import Task, rating, single
from pacl.grid import (GRID, Experiment, asked, count_stages, flip, jobs_of, level_tasks, lines, read_grid, run_grid, vary)
from pacl.partition import PARTITIONS, assign_partition
from pacl.parts.stages import InputError, read_record
from pacl.tables import answers
from pacl.train import SAMPLES, Posts

pytestmark = pytest.mark.usefixtures('one_thread')
OWN = Experiment(threshold=.53, n_clusters=2, temperature=.07)


# the grid

def grid(tmp_path, text, encoders=('minilm',)):
    (tmp_path / 'grid.yaml').write_text(text)
    return read_grid(tmp_path / 'grid.yaml', OWN, list(encoders))


def test_a_line_is_every_combination_of_its_lists():
    entry = {'method': ['pacl', 'strong'], 'partition': 'true', 'mismatched': [0, .4, .8], 'protocols': ['linear', 'first']}
    found = lines(entry)
    assert [(x['method'], x['mismatched']) for x in found] == list(itertools.product(['pacl', 'strong'], [0, .4, .8]))
    assert all(x['partition'] == 'true' and x['protocols'] == ['linear', 'first'] for x in found)


def test_the_grid_that_is_shipped_has_the_rows_of_the_paper():
    found = read_grid(GRID, OWN, ['bag-of-words', 'minilm'])
    assert [e.method for e, _ in found['table4']] == ['initial', 'unpartitioned', 'factual-matched', 'factual', 'emotional-matched',
                                                      'emotional', 'strong', 'strong-partial', 'pacl']
    sweeps = {name: sorted({getattr(e, name) for e, _ in found['table5']} - {None}) for name in ('threshold', 'n_clusters', 'temperature')}
    assert sweeps == {'threshold': [0, .3, .5, .7, .9, 1], 'n_clusters': [3, 6, 10, 15, 25], 'temperature': [.01, .03, .05, .5, 1]}
    assert Experiment() in {e for e, _ in found['table5']} & {e for e, _ in found['text']}  # γ, r, τ and the encoder of the profile
    shares = {e.mismatched for e, _ in found['when'] if e.noise == 'uniform'}
    assert min(shares) == 0 and max(shares) == .8 and {e.noise for e, _ in found['when']} == {'', 'uniform', 'social'}
    for rows in found.values():
        named = {e.row: e for e, _ in rows}
        assert len(named) == len({e for e, _ in rows}), 'two rows of one name'


def test_the_paper_s_own_values_are_no_rows_of_their_own():
    found = read_grid(GRID, Experiment(threshold=.7, n_clusters=2, temperature=.07), ['bert'])['table5']
    assert {e.threshold for e, _ in found} == {None, 0, .3, .5, .9, 1}


@pytest.mark.parametrize('text, said', [
    ('table9: []', 'unknown table "table9"; nearest valid: table'),
    ('table4:\n- {methd: pacl}', 'table4, line 1: unknown setting "methd"; nearest valid: method'),
    ('table4:\n- {method: pacl}\n- {method: pacl, protocols: [linaer]}',
     'table4, line 2: unknown protocol "linaer"; nearest valid: linear')])
def test_a_wrong_grid_names_file_table_and_line(tmp_path, text, said):
    with pytest.raises(InputError) as error: grid(tmp_path, text)
    assert said in str(error.value) and 'grid.yaml' in str(error.value)


@pytest.mark.parametrize('tables, names', [('', []), ('4', ['table4']), (' 1, 4', ['table1', 'table4']), ('text,when', ['text', 'when'])])
def test_tables_by_number_or_name(tables, names): assert asked(tables, True) == names


def test_all_tables():
    every = list(yaml.safe_load(GRID.read_text()))
    assert asked('all', True) == every and asked('all', False) == [name for name in every if name != 'when']


@pytest.mark.parametrize('tables', ['6', 'table4x', '1;4', 'none'])
def test_a_table_that_is_none(tables):
    with pytest.raises(InputError, match='is none of 1, 2, 3, 4, 5, text, when, or all'): asked(tables, True)


def test_rows_say_what_differs():
    assert [Experiment(**e).row for e in ({}, {'method': 'strong', 'partition': 'true'}, {'threshold': 0.}, {'n_clusters': 6},
                                          {'temperature': .5}, {'text_encoder': 'minilm'}, {'method': 'feng'}, {'budget': .25},
                                          {'method': 'curriculum', 'partition': 'true', 'noise': 'uniform', 'mismatched': 0, 'budget': .5},
                                          {'partition': 'random', 'flipped': .2})] == [
        'PACL', 'strong only, true partition', 'PACL, γ 0', 'PACL, r 6', 'PACL, τ 0.5', 'PACL, text minilm', 'Feng et al.',
        'PACL, budget 0.25', 'curriculum only, true partition, mismatched 0 uniform, budget 0.5', 'PACL, random partition, flipped 0.2']


# sharing

RUNS = pd.DataFrame([{'run': f'{m}-{p}-s{s}', 'method': m, 'partition': p, 'seed': s} for s in (0, 1)
                     for m, p in (('unpartitioned', 'evaluators'), ('strong', 'evaluators'), ('pacl', 'evaluators'), ('pacl', 'true'))])


def test_a_run_that_two_tables_ask_for_is_one_job_with_the_protocols_of_both():
    other = Experiment(method='emotionclip')
    rows = [(other, ('linear',)), (other, ('linear', 'fine-tune')), (Experiment(method='clip'), ('zero-shot',))]
    assert jobs_of(rows, RUNS) == {(other, 0): (('linear', 'fine-tune'), None), (other, 1): (('linear', 'fine-tune'), None),
                                   (Experiment(method='clip'), 0): (('zero-shot',), None)}


def test_the_main_results_are_not_made_again():
    rows = [(Experiment(), ('linear', 'fine-tune')), (Experiment(method='initial'), ('linear',)),
            (Experiment(partition='true'), ('first',))]
    assert jobs_of(rows, RUNS) == {}
    found = jobs_of([(Experiment(), ('linear', 'levels')), (Experiment(budget=.5), ('first',))], RUNS)
    assert found[Experiment(), 1] == (('levels',), 'pacl-evaluators-s1')  # their model is
    assert found[Experiment(budget=.5), 1] == (('first',), None)
    # 07 asks a method of compare=full less than the tables do: its model serves, its answers are made
    full = pd.concat([RUNS, pd.DataFrame([dict(run='e', method='emotionclip', partition='evaluators', seed=0)])])
    assert jobs_of([(Experiment(method='emotionclip'), ('linear', 'fine-tune'))], full)[Experiment(method='emotionclip'), 0] == (
        ('linear', 'fine-tune'), 'e')


def test_stage_runs_are_counted():
    rows = [(Experiment(), ('linear',)), (Experiment(threshold=.3), ('linear',)), (Experiment(), ('linear',)),
            (Experiment(n_clusters=6), ('linear',)), (Experiment(method='initial'), ('linear',))]
    counts = count_stages(rows, 3, 8)
    # world, data, stand-ins; features once, the posts cut twice, clusters of r = 2 and r = 6; three methods trained and four evaluated
    assert counts == {'one by one': 5 * 3 * 8, 'shared': 3 + 1 + 2 + 2 + 3 * 3 + 4 * 3}


def test_sharing_saves_two_thirds_of_all_stage_runs():
    rows = [row for rows in read_grid(GRID, OWN, ['bag-of-words', 'minilm']).values() for row in rows]
    counts = count_stages(rows, 3, 8)
    assert counts['one by one'] >= 3 * counts['shared']


# posts as a row wants them

@settings(deadline=None)
@given(st.lists(st.sampled_from(PARTITIONS), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 5))
def test_flip(partition, share, seed):
    partition = np.array(partition)
    flipped = flip(partition, share, np.random.default_rng(seed))
    assert (flipped != partition).sum() == round(share * len(partition)) and set(flipped) <= {*PARTITIONS}


def test_flips_go_to_each_of_the_three_others():
    flipped = flip(np.repeat('factual', 3000), 1., np.random.default_rng(0))
    assert {name: round((flipped == name).mean(), 1) for name in PARTITIONS} == dict(strong=.3, emotional=.3, factual=0., weak=.3)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "The posts of test_train with a truth, and benchmarks that go through the same frozen stages."
    run = make_run(tmp_path_factory.mktemp('runs') / 'mini')
    rng = np.random.default_rng(0)
    for stage, more in {'clusters': {'n_clusters': 2}, 'partition': {'threshold': .53}}.items():
        record = read_record(run / stage)
        record['parameters'] |= more
        (run / stage / 'stage.json').write_text(json.dumps(record))
    ids = pd.read_csv(run / 'data/posts.csv', dtype=str)['id']
    (run / 'world/truth.csv').unlink()
    pd.DataFrame({'id': ids, 'object': rng.choice(['dog', 'cat'], len(ids)), 'emotion': rng.choice(['awe', 'fear'], len(ids))}).to_csv(
        run / 'world/truth.csv', index=False)
    splits = np.repeat(['train', 'val', 'test'], [24, 8, 12])
    for name in ('new', 'seen'):
        table = pd.DataFrame({'id': [f'{i:03}' for i in range(len(splits))], 'split': splits, 'label': rng.choice(EMOTIONS, len(splits))})
        table = table.assign(image='x.png', level_1=np.where(table['label'] == 'awe', 'positive', 'negative'), level_2=table['label'])
        table.to_csv(run / f'data/{name}.csv', index=False)
        np.save(run / f'data/{name}.npy', rng.integers(256, size=(len(table), 32, 32, 3), dtype=np.uint8))
        np.save(run / f'features/early_{name}.npy', rng.normal(size=(len(table), 112, 6, 6)).astype(np.float16))
    levels = Task('hierarchical', ('level_1', 'level_2'), (('negative', 'positive'), EMOTIONS))
    tasks = {'new': {'label': BENCHMARKS['new']['label'], 'levels': levels}, 'seen': {'label': BENCHMARKS['new']['label']}}
    (run / 'data/tasks.json').write_text(json.dumps({n: {t: asdict(task) for t, task in about.items()} for n, about in tasks.items()}))
    np.save(run / 'features/image.npy', rng.normal(size=(len(ids), 16)).astype(np.float32))
    for name in ('models', 'results'): (run / name).mkdir()
    parameters = dict(epochs=3, batch_size=8, lr=1e-4, projector_lr=1e-3, temperature=.07)
    (run / 'models/stage.json').write_text(json.dumps({'parameters': parameters}))
    RUNS.assign(images_seen=96, steps=9).to_csv(run / 'models/runs.csv', index=False)
    (run / 'results/stage.json').write_text('{"parameters": {}}')
    return run


@pytest.fixture(scope='module')
def posts(run): return Posts(run)


def test_a_threshold_cuts_the_scores_that_are_there(run, posts, tmp_path):
    varied = vary(posts, Experiment(threshold=.3), 0, tmp_path)
    scores = pd.read_csv(run / 'partition/partition.csv', dtype={'id': str}).set_index('id').loc[posts.ids]
    assert varied.partitions['evaluators'].tolist() == assign_partition(scores['factual'], scores['emotional'], .3).tolist()
    assert varied.digest != posts.digest and varied.clusters['factual'] is posts.clusters['factual']
    assert set(vary(posts, Experiment(threshold=0), 0, tmp_path).partitions['evaluators']) == {'strong'}
    assert set(vary(posts, Experiment(threshold=1), 0, tmp_path).partitions['evaluators']) == {'weak'}


def test_r_clusters_both_anew(run, posts, tmp_path):
    for _ in range(2):  # the second time from what was kept
        varied = vary(posts, Experiment(n_clusters=3), 0, tmp_path)
        for kind, name in (('factual', 'image'), ('emotional', 'text')):
            assert varied.clusters[kind].tolist() == cluster_features(np.load(run / f'features/{name}.npy'), 3, 0).tolist()
    assert len(list(tmp_path.glob('*-3.npy'))) == 2 and max(posts.clusters['factual']) == 1  # the posts themselves are as they were


def test_partitions_that_are_wrong_on_purpose(posts, tmp_path):
    true = np.array(posts.partitions['true'])
    flipped = vary(posts, Experiment(partition='true', flipped=.25), 0, tmp_path).partitions['true']
    assert (flipped != true).mean() == .25
    dealt = vary(posts, Experiment(partition='random'), 0, tmp_path).partitions['true']
    assert sorted(dealt) == sorted(true) and (dealt != true).mean() > .5


def test_texts_drawn_anew_mismatch_as_asked(posts, tmp_path, monkeypatch):
    said = []
    def encode(run, name, texts):
        said.append(texts)
        return np.random.default_rng(len(texts[0])).normal(size=(len(texts), 5))
    monkeypatch.setattr(grid_module, 'encode_as', encode)
    clean = vary(posts, Experiment(partition='true', noise='uniform', mismatched=0.), 0, tmp_path)
    assert set(clean.partitions['true']) == {'strong'} and clean.text.shape == (len(posts.ids), 5) and clean.text.dtype == torch.float32
    assert len(said[0]) == len(posts.ids) and len(set(said[0])) > len(posts.ids) / 2
    noisy = vary(posts, Experiment(partition='true', noise='uniform', mismatched=1.), 0, tmp_path)
    assert set(noisy.partitions['true']) == {'weak'}
    vary(posts, Experiment(method='strong', partition='true', noise='uniform', mismatched=1.), 0, tmp_path)
    assert len(said) == 2  # another method reads what was kept


def test_without_a_truth_nothing_is_made_up(run, posts, tmp_path):
    import copy
    blind = copy.copy(posts)
    blind.partitions = {'evaluators': posts.partitions['evaluators']}
    for e in (Experiment(partition='true'), Experiment(partition='random')):
        with pytest.raises(InputError, match='no true partition of these posts'): vary(blind, e, 0, tmp_path)


# levels

def test_levels_trained_alone():
    levels = Task('hierarchical', ('level_1', 'level_2'), (('a', 'b'), ('c', 'd', 'e')))
    assert {name: task for name, (task, _) in level_tasks(levels).items()} == {
        'level_1': Task('single-label', ('level_1',), (('a', 'b'),)), 'level_2': Task('single-label', ('level_2',), (('c', 'd', 'e'),))}
    eight = level_tasks(single(POLARITY))
    assert list(eight) == ['label', 'polarity']
    task, prepared = eight['polarity']
    assert task.targets(prepared(pd.DataFrame({'label': ['awe', 'anger']}))).ravel().tolist() == [1, 0]
    assert list(level_tasks(single(EMOTIONS))) == ['label'] and level_tasks(rating(['valence'], 1, 9)) == {}


# the stage

class Here:
    "A pool of one: this process, so that coverage and monkeypatches hold."
    def __init__(self, workers, context, initializer, arguments): initializer(*arguments)
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def shutdown(self, cancel_futures): pass

    def submit(self, function, job):
        row = Future()
        try: row.set_result(function(job))
        except RuntimeError as error: row.set_exception(error)
        return row


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(grid_module, 'ProcessPoolExecutor', Here)
    monkeypatch.setattr(grid_module, 'end_with', lambda parent: None)
    monkeypatch.setenv('PACL_PROGRESS', '')


SMALL = dict(datasets=['new/label', 'new/levels', 'seen/label'], probe_epochs=1, fine_tune_epochs=1)


@pytest.fixture
def with_grid(run, tmp_path, here, monkeypatch):
    "with_grid(text): a copy of the run, and a grid that says so."
    def make(text):
        (tmp_path / 'grid.yaml').write_text(text)
        monkeypatch.setattr(grid_module, 'GRID', tmp_path / 'grid.yaml')
        return shutil.copytree(run, tmp_path / 'mini')
    return make


def test_the_stage_runs_a_table_and_goes_on(with_grid, monkeypatch):
    own = with_grid('table4:\n- {method: [initial, unpartitioned, factual, strong-partial, pacl]}\ntable5:\n- {threshold: [0.3, 0.53]}\n')
    done, do = [], grid_module.do_row
    def stop_after_three(job):
        if len(done) == 3: raise RuntimeError('killed')
        done.append(do(job))
        return done[-1]
    monkeypatch.setattr(grid_module, 'do_row', stop_after_three)
    with pytest.raises(RuntimeError, match='killed'): run_grid(own, tables='4,5', **SMALL)
    assert not (own / 'experiments').exists()
    monkeypatch.setattr(grid_module, 'do_row', lambda job: done.append(do(job)) or done[-1])
    folder = run_grid(own, tables='4,5', **SMALL)
    assert not [p for p in (own / '.experiments-parts').glob('*/*') if p.is_dir()]  # no model stays
    assert len(done) == len(set(done)) == 6  # 3 rows, 2 seeds, none twice: initial, unpartitioned and PACL are in the main results
    rows = pd.read_csv(folder / 'rows.csv')
    assert rows.groupby('table')['row'].apply(list).to_dict() == {
        'table4': ['initial', 'unpartitioned', 'factual partition', 'strong + partial', 'PACL'], 'table5': ['PACL, γ 0.3', 'PACL']}
    runs = pd.read_csv(folder / 'runs.csv')
    assert set(runs['row']) == {'factual partition', 'strong + partial', 'PACL, γ 0.3'} and set(runs['seed']) == {0, 1}
    assert (runs['seconds'] > 0).all()
    assert runs['images_seen'].between(96 - 32, 96 + 32).all()  # the budget of PACL, up to a step
    predictions = pd.read_csv(folder / 'predictions.csv', dtype=str, keep_default_na=False)
    tasks = json.loads((own / 'data/tasks.json').read_text())
    found = answers(predictions, {n: {t: Task.of(task) for t, task in about.items()} for n, about in tasks.items()})
    assert {key[2:] for key in found} == {('new', 'label'), ('new', 'levels'), ('seen', 'label')}
    assert all(a.said.shape == (2, 12, len(a.task.columns)) for a in found.values())
    before = folder.stat().st_ino
    run_grid(own, tables='4,5', **SMALL)
    assert folder.stat().st_ino == before  # current
    run_grid(own, tables='4', **SMALL)
    assert len(done) == 6  # other tables take what is there
    for path in (own / '.experiments-parts').glob('*/*.json'): path.write_text(json.dumps(json.loads(path.read_text()) | {'seconds': 120.}))
    minutes = read_record(run_grid(own, tables='4,5', **SMALL))['result']['minutes']  # of all starts, this one did nothing
    assert len(done) == 6 and minutes == pytest.approx(6 * 2 / min(os.cpu_count(), 6), abs=.05)


def test_a_killed_process_is_said_to_be_one(with_grid, monkeypatch):
    own = with_grid('table4:\n- {method: factual}\n')
    def die(job): raise BrokenProcessPool('terminated abruptly')
    monkeypatch.setattr(grid_module, 'do_row', die)
    with pytest.raises(RuntimeError, match='a process of the grid was killed.*the same command goes on'): run_grid(own, tables='4', **SMALL)


def test_a_row_goes_on_with_the_model_of_a_killed_one(with_grid, monkeypatch):
    own, trained = with_grid('table4:\n- {method: factual}\n'), []
    learn, judge = grid_module.train, grid_module.evaluate
    monkeypatch.setattr(grid_module, 'train', lambda posts, config, folder: trained.append(folder.exists()) or learn(posts, config, folder))
    def stop(*_, **__): raise RuntimeError('killed')
    monkeypatch.setattr(grid_module, 'evaluate', stop)
    with pytest.raises(RuntimeError, match='killed'): run_grid(own, tables='4', **SMALL)
    monkeypatch.setattr(grid_module, 'evaluate', judge)
    run_grid(own, tables='4', **SMALL)
    assert trained == [False, False, True, True]  # two seeds, each found the second time


def test_a_set_that_no_protocol_fits_gives_no_rows(with_grid):
    own = with_grid('table2:\n- {method: initial, protocols: [levels]}\n')
    assert pd.read_csv(run_grid(own, tables='2', **SMALL | {'datasets': ['seen/label']}) / 'predictions.csv').empty  # 07 has that one


@pytest.mark.parametrize('given, said', [
    (dict(tables='4', datasets=['new/lable']), '"new/lable" is no SET/TASK of .*tasks.json; nearest valid: new/label'),
    (dict(tables='nine'), 'is none of 1, 2')])
def test_what_is_wrong_is_said_before_any_work(run, given, said, monkeypatch):
    monkeypatch.setattr(grid_module, 'do_row', None)
    with pytest.raises(InputError, match=said): run_grid(run, **SMALL | given)


def test_table_2_trains_each_level_alone(with_grid):
    own = with_grid('table2:\n- {method: initial, protocols: [levels, pdanet]}\n')
    predictions = pd.read_csv(run_grid(own, tables='2', **SMALL) / 'predictions.csv', dtype=str)
    assert set(zip(predictions['row'], predictions['task'], predictions['level'])) == {  # level_2 has label's classes
        ('initial', 'level_1', 'level_1'), ('initial + PDANet', 'level_1', 'level_1'), ('initial + PDANet', 'label', 'label')}
    tasks = {n: {t: Task.of(task) for t, task in about.items()} for n, about in json.loads((own / 'data/tasks.json').read_text()).items()}
    found = answers(predictions, tasks)
    assert found['initial + PDANet', 'fine-tune', 'new', 'label'].said.shape == (2, 12, 1)
    assert {key[1:] for key in found} == {('fine-tune', 'new', level) for level in ('level_1', 'label')}
    predictions = pd.read_csv(run_grid(own, tables='2', **SMALL | {'datasets': ['new/levels']}) / 'predictions.csv', dtype=str)
    assert set(zip(predictions['row'], predictions['level'])) == {(row, level) for row in ('initial', 'initial + PDANet')
                                                                  for level in ('level_1', 'level_2')}  # a set without a label


def test_clips_answers_stand_beside_each_seed(with_grid, monkeypatch):
    class Clip:
        def embed_images(self, images): return np.asarray(images, np.float32).reshape(len(images), -1)[:, :8]
        def embed_texts(self, texts): return np.random.default_rng(0).normal(size=(len(texts), 8)).astype(np.float32)
    own = with_grid('table3:\n- {method: clip, protocols: [zero-shot]}\n')
    monkeypatch.setattr('pacl.parts.judges.evaluators_of', lambda run: (Clip(), None, None))
    predictions = pd.read_csv(run_grid(own, tables='3', **SMALL) / 'predictions.csv', dtype=str)
    assert set(zip(predictions['dataset'], predictions['task'])) == {('new', 'label'), ('new', 'levels')}  # `seen` is a control
    one, two = (q.drop(columns='seed').reset_index(drop=True) for _, q in predictions.groupby('seed'))
    pd.testing.assert_frame_equal(one, two)


def test_a_run_without_truth_has_no_when(run, tmp_path):
    own = tmp_path / 'mini'
    shutil.copytree(run, own)
    (own / 'partition/truth.csv').unlink()
    with pytest.raises(InputError, match='"when" asks what only posts with a known truth can tell'): run_grid(own, tables='when', **SMALL)


def test_no_table_is_no_work(run, tmp_path):
    own = tmp_path / 'mini'
    shutil.copytree(run, own)
    folder = run_grid(own)
    assert read_record(folder)['result'] == {'runs': 0, 'minutes': 0., 'stage runs one by one': 0, 'stage runs shared': 0}
    assert len(pd.read_csv(folder / 'predictions.csv')) == len(pd.read_csv(folder / 'rows.csv')) == 0


def test_every_method_of_the_grid_is_known():
    methods = {e.method for rows in read_grid(GRID, OWN, []).values() for e, _ in rows}
    assert methods - {'initial', 'feng', 'clip', 'sentibank', 'pacl', 'curriculum'} <= {*SAMPLES}
    assert Path(GRID).name == 'grid.yaml'
