"pacl.tables: the paper's numbers, ours against loops, signs and order, and the whole stage on a miniature run."
import json

import numpy as np
import pandas as pd
import pytest

from pacl.evaluate import score, summary
from pacl.parts.encoders import BACKBONES
from pacl.parts.readers import Task, single
from pacl.parts.stages import write_stage
from pacl.tables import (PAPER, TABLES, agreement, beside, builds_on, claims_told, differences, in_words, measure, paper_pairs,
                         paper_tables, read_answers, read_paper, run_tables, score_runs, table_to_read, to_read, when_pairs, write_table)
from pacl.train import Run

pytestmark = pytest.mark.usefixtures('one_thread')
CLASSES = ('a', 'b', 'c', 'd')
TASKS = {'new': {'label': single(CLASSES), 'object': Task('single-label', ('object',), (CLASSES,)),
                 'levels': Task('hierarchical', ('level_1', 'level_2'), (('a', 'b'), CLASSES))},
         'fi': {'label': single(CLASSES)},
         'mixed': {'vad': Task('regression', ('valence', 'arousal'))}}


# the paper's numbers

def test_all_numbers_of_the_paper_are_there():
    tables = {name: read_paper(name) for name in TABLES}
    assert [table['paper'].count() for table in tables.values()] == [468, 42, 18, 18, 108]  # 654 in all
    for name, table in tables.items():
        assert not table.duplicated([c for c in table if c not in ('paper', 'source', 'note')]).any()
        shares = table[~table['metric'].isin(['mse', 'r2'])]
        assert shares['paper'].dropna().between(1, 100).all()
        assert table['source'].str.fullmatch(f'Table {name[-1]}(, quoted)?').all()
        assert set(table['paper_backbone']) <= {'', *BACKBONES}
    assert set(tables['table3']['paper_test']) == {'FI/8', 'Emotion-6/6'} and set(tables['table4']['paper_test']) == {'UnbiasedEmo/6'}
    assert set(pd.concat(tables.values())['paper_test']) == set(pd.read_csv(PAPER / 'stands.csv')['paper_test'])


# ours

def made_up(shares, seeds=(0, 1, 2), n=200, dataset='new', task='label', protocol='linear'):
    "Predictions in which each run is right on this share of the pictures."
    rng, tables = np.random.default_rng(0), []
    for run, share in shares.items():
        for seed in seeds:
            label = np.array(CLASSES)[np.arange(n) % 4]
            right = np.arange(n) + rng.normal(0, 5, n) < share * n
            tables.append(pd.DataFrame({
                'run': run, 'protocol': protocol, 'dataset': dataset, 'task': task, 'level': task, 'seed': str(seed),
                'id': [f'{i:04}' for i in range(n)], 'group': '', 'label': label, 'prediction': np.where(right, label, np.roll(label, 1))}))
    return pd.concat(tables)


def ratings(runs, n=60):
    rng, tables = np.random.default_rng(0), []
    truth = {name: rng.uniform(1, 9, n) for name in ('valence', 'arousal')}
    for run in runs:
        for level, y in truth.items():
            tables.append(pd.DataFrame({
                'run': run, 'protocol': 'linear', 'dataset': 'mixed', 'task': 'vad', 'level': level, 'seed': '0',
                'id': [f'{i:04}' for i in range(n)], 'group': '', 'label': y, 'prediction': y + rng.normal(0, 1, n)}).astype(str))
    return pd.concat(tables)


def write_predictions(run, *tables):
    (run / 'results').mkdir(parents=True, exist_ok=True)
    (run / 'data').mkdir(exist_ok=True)
    pd.concat(tables).to_csv(run / 'results/predictions.csv', index=False)
    told = {name: {task: vars(about) for task, about in tasks.items()} for name, tasks in TASKS.items()}
    (run / 'data/tasks.json').write_text(json.dumps(told))
    return read_answers(run)


def by_hand(table, columns, kind):
    "The answers of each seed as arrays, pictures in order."
    found = []
    for _, rows in table.assign(seed=table['seed'].astype(int)).groupby('seed'):
        wide = rows.pivot(index='id', columns='level', values=['label', 'prediction'])
        found.append([wide[what][columns].to_numpy(kind) for what in ('label', 'prediction')])
    return found[0][0], np.stack([prediction for _, prediction in found])


def test_answers_are_measured_as_05_does_in_the_order_of_seeds(tmp_path):
    table = made_up({'A': .4}, seeds=(10, 9, 0))
    table.loc[table['label'] == 'd', 'label'] = 'c'  # d is answered, and nowhere right
    for rows, task, kind in ((table, TASKS['new']['label'], str), (ratings(['A']), TASKS['mixed']['vad'], float)):
        answers = measure(rows.sample(frac=1, random_state=0), task)
        labels, predictions = by_hand(rows, list(task.columns), kind)
        assert answers.seeds == sorted(map(int, set(rows['seed']))) and answers.n == len(labels)
        expected = score(task.kind, labels, predictions, task.columns)
        pd.testing.assert_frame_equal(summary(answers.measured, answers.n), expected)


def test_results_and_differences_are_those_of_05(tmp_path):
    table = made_up({'initial': .3, 'PACL': .4})
    answers = write_predictions(tmp_path, table, made_up({'B': .4}, seeds=(7,)), ratings(['initial', 'PACL']))
    results = score_runs(answers, 'lite', {'PACL': 'pacl'})
    q = results.query('run == "PACL" and seed == "all" and metric == "accuracy"').iloc[0]
    labels, predictions = by_hand(table[table['run'] == 'PACL'], ['label'], str)
    expected = score('single-label', labels, predictions, ['label']).query('metric == "accuracy"').iloc[0]
    assert list(q[['value', 'ci_low', 'ci_high']]) == [100 * x for x in expected[['value', 'ci_low', 'ci_high']]]
    assert np.isclose(q['value'], 100 * (predictions == labels).mean()) and q['method'] == 'pacl'
    vad = results[results['task'] == 'vad']
    assert set(vad['level']) == {'valence', 'arousal', 'vad'} and set(vad['metric']) == {'mse', 'r2'}
    table = differences(answers, [('PACL', 'initial'), ('PACL', 'B')])
    assert set(table['b']) == {'initial'}  # B has other seeds
    d = table.query('task == "label" and metric == "accuracy"').iloc[0]
    given, other = (answers[run, 'linear', 'new', 'label'].measured for run in ('PACL', 'initial'))
    expected = summary({key: given[key] - other[key] for key in given}, 1).query('metric == "accuracy"').iloc[0]
    assert list(d[['value', 'ci_low', 'ci_high']]) == [100 * x for x in expected[['value', 'ci_low', 'ci_high']]]


@pytest.mark.parametrize('run, runs, base', [
    ('PACL', ['initial', 'unpartitioned', 'PACL'], 'unpartitioned'), ('PACL', ['initial', 'strong only', 'PACL'], 'strong only'),
    ('factual partition', ['factual partition, matched', 'unpartitioned'], 'factual partition, matched'),
    ('factual partition, matched', ['factual partition', 'unpartitioned'], 'unpartitioned'), ('PACL, γ 0.3', ['PACL', 'initial'], 'PACL'),
    ('initial', ['initial', 'PACL'], None), ('PACL', ['PACL'], None)])
def test_what_a_row_builds_on(run, runs, base): assert builds_on(run, runs) == base


# beside the paper

def results_of(tmp_path, *tables, backbone='resnet50', methods=()):
    return score_runs(write_predictions(tmp_path, *tables), backbone, dict(methods))


SHARES = {'initial': .4, 'unpartitioned': .38, 'strong only': .5, 'PACL': .7}


def test_a_number_stands_beside_the_papers_only_for_the_same_set_and_backbone(tmp_path):
    tables = [made_up(SHARES, dataset=name) for name in ('fi', 'new')]
    paper = read_paper('table1').query('paper_backbone == "resnet50"')
    for backbone, dataset, same in (('resnet50', 'fi', True), ('lite', 'fi', False), ('resnet50', 'new', False)):
        results = results_of(tmp_path, *tables, backbone=backbone).query('dataset == @dataset')
        lines = beside(paper, results, alone=False)
        assert set(lines['same']) == {same} and set(lines['run']) == {'initial', 'PACL'} | ({'Feng et al.'} if same else set())
        text = table_to_read(lines).loc[('FI/8', f'{dataset}/label', 'linear', 'PACL'), 'accuracy']
        ours = results.query('run == "PACL" and seed == "all" and metric == "accuracy"')['value'].item()
        assert text.startswith(f'{ours:.1f} [') and text.endswith('] (paper 59.50)' if same else ']')


def test_a_test_stands_for_one_column_of_a_table(tmp_path):
    results = results_of(tmp_path, made_up(SHARES))
    lines = paper_tables(results)
    found = {name: set(rows['paper_test']) for name, rows in lines.groupby('table')}
    assert found == {'table1': {'FI/8'}, 'table4': {'UnbiasedEmo/6'}}  # and Table 1 not UnbiasedEmo too
    assert set(lines['paper_backbone']) == {'resnet50'}
    more = paper_tables(results_of(tmp_path, made_up(SHARES | {'curriculum only': .6})))
    assert more[~more['run'].isin(lines['run'])]['table'].unique().tolist() == ['table4']  # a method that the paper lacks
    vit = paper_tables(results.assign(backbone='vit_base'))
    assert vit.groupby('table')['paper_backbone'].unique().str.join('').to_dict() == {'table1': 'vit_base', 'table4': 'resnet50'}


def test_levels_learnt_alone_are_those_of_table_2(tmp_path):
    together = made_up({'PACL': .5}, task='levels', protocol='fine-tune')
    together = pd.concat([together.assign(level=level) for level in ('level_1', 'level_2')])
    alone = made_up({'PACL': .7, 'PACL + PDANet': .8}, task='level_1', protocol='fine-tune')
    results = results_of(tmp_path, together, alone)
    for table, task in (('table1', 'levels'), ('table2', 'level_1')):
        lines = beside(read_paper(table), results, alone=table == 'table2')
        assert set(lines.query('test == "new/level_1"')['task']) == {task}


def test_the_sweeps_of_table_5(tmp_path):
    shares = {'PACL': .7, 'PACL, γ 0.7': .6, 'PACL, γ 1': .5, 'PACL, τ 1': .65}
    results = results_of(tmp_path, made_up(shares))
    lines = paper_tables(results).query('table == "table5" and metric == "accuracy"')
    found = lines.set_index(['sweep', 'setting'])['run'].to_dict()
    # the profile's own γ is none of the paper's: its run stands for the paper's r and τ alone
    expected = {('γ', '0.7'): 'PACL, γ 0.7', ('γ', '1'): 'PACL, γ 1', ('r', '2'): 'PACL', ('τ', '0.07'): 'PACL'}
    assert found == expected | {('τ', '1'): 'PACL, τ 1'}
    assert len(table_to_read(lines)) == len(shares)


def test_signs_and_order(tmp_path):
    results = results_of(tmp_path, made_up(SHARES))
    lines = paper_tables(results)
    pairs = paper_pairs(lines).query('table == "table4" and metric == "accuracy"')
    assert set(zip(pairs['a'], pairs['b'], pairs['paper_sign'])) == {
        ('PACL', 'initial', 1), ('PACL', 'unpartitioned', 1), ('PACL', 'strong only', 1), ('unpartitioned', 'initial', 1),
        ('strong only', 'unpartitioned', 1)}
    compared = differences(read_answers(tmp_path), list(zip(pairs['a'], pairs['b'])))
    signs = pairs.merge(compared)
    counts = agreement(lines.query('table == "table4" and metric == "accuracy"'), signs).iloc[0]
    told = ((signs['ci_low'] > 0) * 1 - (signs['ci_high'] < 0)) * signs['paper_sign']
    assert list(counts[['as_paper', 'opposite', 'open']]) == [(told == sign).sum() for sign in (1, -1, 0)]
    assert counts['kendall'] == pytest.approx(4 / 6)  # initial and unpartitioned change places
    assert agreement(lines[:0], signs[:0]).empty  # none of the paper's tests was asked


def test_markdown_and_latex(tmp_path):
    results = results_of(tmp_path, made_up(SHARES | {'PACL, γ 0.3': .6}))
    rows = results.query('seed == "all" and metric == "accuracy"')
    table = to_read(rows.assign(text=in_words(rows)), ['run'], ['metric'])
    assert list(table) == ['accuracy'] and list(table.index) == [*SHARES, 'PACL, γ 0.3']
    write_table(table.rename(index={'strong only': '50 % R_2'}), tmp_path / 'table')
    lines = (tmp_path / 'table.md').read_text().splitlines()
    assert len(lines) == 7 and len({line.count('|') for line in lines}) == 1 and lines[2].startswith('| initial | ')
    text = (tmp_path / 'table.tex').read_text()
    assert r'\toprule' in text and r'50 \% R\_2' in text and r'$\gamma$' in text and not any(ord(c) > 127 for c in text)


def test_a_claim_is_the_sign_of_a_difference():
    ends = {'initial': (1, 3), 'unpartitioned': (-3, -1), 'strong + partial': (-1, 3)}
    about = {'a': 'PACL', 'protocol': 'linear', 'task': 'label', 'level': 'label', 'metric': 'accuracy'}
    rows = [about | {'b': b, 'ci_low': low, 'ci_high': high} for b, (low, high) in ends.items()]
    table = claims_told(pd.DataFrame(rows))
    assert list(table['told'][table['ci_low'].notna()]) == ['holds here', 'does not', 'cannot be told']
    assert set(table['told'][table['ci_low'].isna()]) == {'was not asked'}


# when

def when_runs():
    rows = [('plain', dict(method='unpartitioned', budget=.5), 'when'),
            ('u', dict(method='unpartitioned', budget=.25), 'when'), ('p', dict(partition='true', budget=.25), 'when'),
            ('f', dict(partition='true', flipped=.2, budget=.5), 'when'),
            ('r', dict(method='strong', partition='random', budget=.5), 'when'),
            ('e', dict(budget=.5), 'main when'), ('x', {}, 'main')]
    runs = pd.DataFrame([{'run': name, **vars(Run(**given)), 'tables': tables} for name, given, tables in rows])
    return runs.astype(object).where(runs.notna(), '').astype(str)


def test_when_each_run_is_compared_with_unpartitioned_training_on_the_same_posts():
    found = when_pairs(when_runs())
    assert set(found.itertuples(index=False, name=None)) == {('p', 'u'), ('f', 'plain'), ('r', 'plain'), ('e', 'plain')}


# the whole stage

def make_run(run):
    "What the stages before leave, in small."
    for name in ('features', 'partition', 'clusters', 'models', 'results', 'data'):
        with write_stage(run / name, {'parameters': {'backbone': 'lite'}}): pass
    runs = when_runs().assign(seed='0', folder='')
    names = {'initial': 'initial', 'unpartitioned': 'unpartitioned', 'strong only': 'strong', 'PACL': 'pacl'}
    main = pd.DataFrame({'run': names.keys(), 'method': names.values()})
    main = main.assign(tables='main', seed='0', folder='')
    pd.concat([main, runs[runs['tables'] == 'when']]).to_csv(run / 'models/runs.csv', index=False)
    shares = SHARES | dict.fromkeys('uprf', .5) | {'plain': .4}
    write_predictions(run, made_up(shares), made_up(SHARES, task='object'), ratings(SHARES))
    return run


def test_run_tables(tmp_path):
    run = make_run(tmp_path / 'mini')
    out = run_tables(run)
    assert run_tables.stale(run) is None
    written = {path.relative_to(out).as_posix() for path in out.rglob('*.*')}
    tables = {f'table{k}.{kind}' for k in (1, 4) for kind in ('csv', 'md', 'tex')}
    others = {f'{name}.csv' for name in ('results', 'differences', 'signs', 'agreement', 'claims', 'choice')}
    assert written - {'stage.json'} == tables | others
    table = pd.read_csv(out / 'table4.csv')
    assert table['paper'].isna().all() and not table['same'].any()  # other sets, another backbone: none of the paper's numbers
    compared = pd.read_csv(out / 'differences.csv')
    assert {('PACL', 'initial'), ('strong only', 'unpartitioned'), ('p', 'u')} <= set(zip(compared['a'], compared['b']))
    counts = pd.read_csv(out / 'agreement.csv')
    told = json.loads((out / 'stage.json').read_text())['result']
    assert told == {name: counts[name].sum() for name in ('as_paper', 'opposite', 'open')}


def test_posts_without_a_truth_and_without_a_class(tmp_path):
    run = make_run(tmp_path / 'mini')
    told = pd.read_csv(run / 'results/predictions.csv', dtype=str, keep_default_na=False).query('task == "vad"')
    answers = told[told['run'] == 'PACL'].assign(protocol='validation')
    told = pd.concat([told, *(answers.assign(run=f'PACL, τ {t}') for t in (.1, 1))])
    told.to_csv(run / 'results/predictions.csv', index=False)
    (run / 'data/tasks.json').write_text(json.dumps({'mixed': {'vad': vars(TASKS['mixed']['vad'])}}))
    out = run_tables(run)
    results, choice = (pd.read_csv(out / f'{name}.csv') for name in ('results', 'choice'))
    assert set(results['protocol']) == {'linear'} and set(choice['run']) == {'PACL, τ 0.1', 'PACL, τ 1'}
    assert set(pd.read_csv(out / 'claims.csv')['told']) > {'was not asked'}
