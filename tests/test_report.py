"pacl.report: cells beside the paper's, orderings, what is claimed, and the whole page on a miniature run."
import base64
import io
import itertools
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_tables import TASKS, made_numbers, made_up, make_posts

from pacl.parts.readers import Task
from pacl.evaluate import run_evaluate
from pacl.report import (Column, Ours, advice, all_tables, as_latex, as_markdown, beside, best_of, check_claims, contributions,
                         html_table, in_short, page, plot_curves, printed, rank_correlations, read_paper, read_stands,
                         run_report, stage_records, stand_in, when_it_helps)
from pacl.parts.stages import InputError, write_stage
from pacl.tables import answers, difference, run_tables

pytestmark = pytest.mark.usefixtures('one_thread')
SHARES = {'initial': .4, 'unpartitioned': .38, 'strong': .5, 'pacl': .7}


def ours_of(shares=SHARES, **about):
    return Ours(answers(made_up(shares, **about), TASKS))


def cells(values, dataset='FI', level='4', protocol='linear', metric='accuracy', source='Table 0', **more):
    "Of a paper's table: {row: value}."
    return pd.DataFrame({'row': list(values), 'protocol': protocol, 'dataset': dataset, 'level': level, 'metric': metric,
                         'value': list(values.values()), 'source': source, 'note': '', 'backbone': 'ResNet-50', **more})


FI = {'fi': 'new/label'}
LABEL = Column('linear', 'new', 'label', 'label', 4)

# the paper's numbers


def test_a_cell_that_is_no_number_is_named(tmp_path):
    cells({'PACL': '59,5'}).to_csv(tmp_path / 'table1.csv', index=False)
    with pytest.raises(InputError, match=r'table1.csv, row 2: value is "59,5"'): read_paper('table1', tmp_path)
    with pytest.raises(InputError, match='table2.csv is missing'): read_paper('table2', tmp_path)


# our numbers

def test_values_and_differences_are_those_of_metrics():
    ours = ours_of()
    assert ours.tests == [LABEL] and ours.rows == ['initial', 'unpartitioned', 'strong only', 'PACL']
    a, b = (ours.found[row, 'linear', 'new', 'label'] for row in ('PACL', 'strong only'))
    q, d = ours.value('PACL', LABEL, 'accuracy'), difference(a, b).iloc[0]
    assert q['value'] == pytest.approx(100 * (a.said == a.targets).mean()) and q['low'] < q['value'] < q['high'] and q['seeds'] == 3
    assert ours.difference('PACL', 'strong only', LABEL) == pytest.approx(tuple(100 * d[['difference', 'low', 'high']].astype(float)))
    assert ours.value('Feng et al.', LABEL, 'accuracy') is None and ours.difference('PACL', 'Feng et al.', LABEL) is None


def test_numbers_are_in_their_own_unit():
    predictions = pd.concat([made_numbers(method, 'vad', 1, 9) for method in ('initial', 'pacl')])
    ours = Ours(answers(predictions, TASKS))
    test = ours.tests[0]
    assert test[1:] == ('mixed', 'vad', 'mean', 2)
    a = ours.found['PACL', 'linear', 'mixed', 'vad']
    assert ours.value('PACL', test, 'mse')['value'] == pytest.approx(((a.said - a.targets) ** 2).mean())


def test_an_experiment_does_not_replace_a_row_of_the_main_run(tmp_path):
    for name, share in (('results', .9), ('experiments', .1)):
        (tmp_path / name).mkdir()
        table = made_up({'pacl': share})
        if name == 'experiments': table = pd.concat([table, made_up({'strong': share})]).assign(row=lambda t: t['method'].map(
            {'pacl': 'PACL', 'strong': 'DeepSentiBank'})).drop(columns=['method', 'partition'])
        table.to_csv(tmp_path / name / 'predictions.csv', index=False)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/tasks.json').write_text(json.dumps({'new': {}}))
    ours = Ours.of(tmp_path, experiments=True)
    assert ours.value('PACL', LABEL, 'accuracy')['value'] > 80
    assert ours.value('DeepSentiBank', LABEL._replace(protocol='fine-tune'), 'accuracy')['value'] < 20


# what stands for what

def test_stand_ins():
    levels = [Column('fine-tune', 'new', task, level, 2) for task, level in (('levels', 'level_1'), ('level_1', 'level_1'))]
    column = {'dataset': 'WebEmo', 'level': '2', 'protocol': 'fine-tune'}
    tasks = {'new': {'levels': Task('hierarchical', ('level_1', 'level_2'), (('a', 'b'), ('c', 'd', 'e')))}}
    stands = read_stands(['WebEmo/2=new/level_1', 'FI=new'], tasks)
    assert stand_in(column, stands, levels) == levels[0] and stand_in(column, stands, levels, alone=True) == levels[1]
    assert stand_in(column, stands, levels[:1], alone=True) is None
    assert stand_in(column | {'protocol': 'linear'}, stands, levels) is None
    assert stand_in(column | {'dataset': 'FI'}, stands, levels) == levels[0]  # as many classes
    assert stand_in(column | {'dataset': 'FI', 'level': '8'}, stands, levels) is None
    assert stand_in(column | {'dataset': 'NEW'}, {}, levels) == levels[0]  # equal names
    for wrong in ('FI', 'FI=neu/label', 'FI=new/lable'):
        with pytest.raises(InputError, match=f'stand_for: "{wrong}'): read_stands([wrong], tasks)


# tables

def test_a_table_beside_the_papers():
    paper = cells({'PACL': 59.5, 'initial': np.nan, 'PCNN': 70., 'MDAN': np.nan}, source=['Table 2'] * 2 + ['Table 2, quoted'] * 2)
    lines = beside(ours_of(), paper, FI, also=('strong only',))
    assert list(lines['row']) == ['strong only', 'PACL', 'initial', 'PCNN']  # MDAN has no number at all
    assert lines.set_index('row')['best'].to_dict() == {'strong only': False, 'PACL': True, 'initial': False, 'PCNN': False}
    text = printed(lines).reset_index('test').T.to_dict()
    assert text['PACL']['paper'] == '59.50' and re.fullmatch(r'\*\*\d\d\.\d\*\*', text['PACL']['ours'])
    assert float(text['PACL']['Δ']) == pytest.approx(float(text['PACL']['ours'].strip('*')) - 59.5, abs=.051)
    assert text['initial']['paper'] == text['initial']['Δ'] == '–' and text['initial']['seeds'] == '3'
    assert text['PCNN (quoted)'] | {'test': ''} == {'test': '', 'paper': '70.00', 'ours': '–', 'Δ': '–', 'interval': '–', 'seeds': '–'}


def test_each_test_of_ours_stands_for_one_column_only():
    paper = pd.concat([cells({'PACL': 1.}), cells({'PACL': 2.}, dataset='WebEmo')])
    lines = beside(ours_of(), paper, FI | {'webemo': 'new/label'})
    assert list(lines['value'].notna()) == [True, False] and lines['title'].iloc[1] == 'paper: WebEmo, 4 · linear · accuracy, %'


@pytest.mark.parametrize('second, best', [(.69, None), (.5, 'PACL')])
def test_best_only_where_the_paired_test_says_so(second, best):
    ours = ours_of(SHARES | {'strong': second})
    assert best_of(ours, {row: ours.value(row, LABEL, 'accuracy') for row in ours.rows}, LABEL, 'accuracy') == best


def test_of_errors_the_lowest_is_best():
    class Made:
        def difference(self, a, b, test, metric): return {'low': 1, 'high': 2}[a] - {'low': 1, 'high': 2}[b], -1.2, -.8
    assert best_of(Made(), {'low': {'value': 1}, 'high': {'value': 2}}, LABEL, 'mse') == 'low'
    assert best_of(Made(), {'low': {'value': 1}}, LABEL, 'mse') is None  # alone


def test_sets_that_the_paper_does_not_have_stand_in_tables_1_and_4():
    papers = {f'table{i}': cells({}) for i in range(1, 4)} | {'table4': cells({'initial': np.nan, 'PACL': np.nan}),
                                                              'table5': cells({'PACL': 59.}, sweep='γ', setting='0.7')}
    shown = all_tables({'mine': ours_of()}, papers, {}, {})
    for name in ('table1', 'table4'):
        assert list(shown[name]['row']) == ['initial', 'PACL'] and list(shown[name]['title'].unique()) == [LABEL.named('accuracy')]
    claims = pd.DataFrame([('PACL', 'initial', 'table1', '', '')], columns=['better', 'worse', 'table', 'claim', 'source'])
    assert list(check_claims(claims, shown, {'mine': ours_of()})['verdict']) == ['as in the paper, claimed']


def test_markdown_and_latex():
    lines = beside(ours_of(), cells({'PACL': 59.5, 'initial': np.nan, 'A & B': 1.}), FI)
    text, tex = as_markdown(printed(lines)), as_latex(printed(lines.assign(title='γ, % R²')))
    assert text.count('(paper: FI, 4)') == 1 and '| PACL | 59.50 | **' in text
    assert r'\toprule' in tex and r'\textbf{' in tex and r'A \& B' in tex and r'$\gamma$, \% R$^2$' in tex and '**' not in tex
    assert not re.search('[^\x00-\x7f]', tex)


def test_the_sweeps_of_table_5():
    table = pd.concat([made_up({'pacl': share}).assign(row=row) for row, share in
                       (('PACL', .7), ('PACL, γ 0.9', .5), ('PACL, γ 0.3', .6), ('PACL, r 6', .65), ('PACL, text minilm', .6))])
    papers = {f'table{i}': cells({}) for i in range(1, 5)} | {'table5': pd.concat(
        [cells({'PACL': 59., 'PACL, γ 1': 39.}, sweep='γ', setting=['0.7', '1']), cells({'PACL': 59.}, sweep='τ', setting=['0.07'])])}
    shown = all_tables({'mine': Ours(answers(table, TASKS))}, papers, FI, {'γ': .53, 'τ': .07})
    assert set(shown) == {'table5', 'text'} and set(shown['table5']['part']) == {'γ'}  # no τ was tried but the own
    assert list(shown['table5']['setting']) == [.3, .53, .9, 1] and list(shown['table5']['paper'].dropna()) == [59, 39]
    assert list(shown['text']['row']) == ['PACL, text minilm', 'PACL']
    fig = plot_curves(shown['table5'].assign(x='1', series='a'), 'accuracy')
    assert len(fig.axes[0].lines) == 2  # ours and the paper's


# signs and order

def test_orderings_against_ours():
    ours = ours_of(SHARES | {'unpartitioned': .395})
    claims = pd.DataFrame([('PACL', 'initial', 'table4', '', 'abstract'), ('unpartitioned', 'PACL', 'table4', '', 'implied: x'),
                           ('initial', 'unpartitioned', 'table4', '', 'implied: x'), ('PACL', 'nobody', 'table4', '', ''),
                           ('PACL', 'initial', 'table1', '', '')], columns=['better', 'worse', 'table', 'claim', 'source'])
    shown = {'table4': beside(ours, cells(dict.fromkeys(['initial', 'unpartitioned', 'PACL'], np.nan)), FI).assign(part='')}
    shown['table1'] = shown['table4'].assign(part='mine')  # the same tests: counted once
    checks = check_claims(claims, shown, {'mine': ours})
    assert list(checks['verdict'].iloc[:2]) == ['as in the paper, claimed', 'against the paper, claimed'] and len(checks) == 3
    assert checks['verdict'].iloc[2] in ('sign as in the paper', 'other sign')
    near = [('initial', 'unpartitioned'), ('unpartitioned', 'initial')]  # whichever is ahead, nothing is claimed
    near = pd.DataFrame(near, columns=['better', 'worse']).assign(table='table4', claim='', source='')
    near = check_claims(near, shown, {'mine': ours})
    assert (near['low'] < 0).all() and near['difference'].abs().min() > 0
    assert set(near['verdict']) == {'sign as in the paper', 'other sign'}
    said = in_short(checks, rank_correlations(shown))
    assert said[0].startswith('3 of the paper’s orderings of two rows could be tested (1 that it states')
    told = {text.split()[0]: text for text in said}
    assert told['Agrees'] == 'Agrees with the paper (tests with its sign): PACL over initial (Table 4: 1 of 1, 1 claimed).'
    reverse = r'test: unpartitioned over PACL \(Table 4: 0 of 1; the reverse claimed in 1, -\d\d\.\d \[.* on new'
    assert re.search(reverse, told['Contradicts'])
    assert 'initial over unpartitioned' in told['Cannot']
    assert len(in_short(checks[:0], rank_correlations({}))) == 1


def test_rank_correlation_needs_three_cells():
    order = {'initial': 3., 'unpartitioned': 1., 'strong only': 2., 'PACL': 4.}  # ours: unpartitioned, initial, strong only, PACL
    lines = beside(ours_of(), cells(order), FI).assign(part='')
    q = rank_correlations({'table4': lines}).iloc[0]
    assert q['rows'] == 4 and q['kendall'] == pytest.approx(4 / 6) and q['spearman'] == pytest.approx(.8)
    assert rank_correlations({'table4': lines[:2]}).empty


def test_parts_add_up():
    parts = contributions(ours_of()).set_index('part')['value']
    assert parts['all of it, over no training'] == pytest.approx(parts['any training on the posts'] + parts['all of it'])
    assert parts['all of it'] == pytest.approx(parts['strong pairs alone'] + parts['+ partial and weak pairs'])
    assert set(parts.index) == {'any training on the posts', 'strong pairs alone', '+ partial and weak pairs', 'all of it',
                                'all of it, over no training'}


GRID = [  # row, method, partition, noise, mismatched, flipped, budget
    ('unpartitioned, true partition, mismatched 0.4 uniform, budget 0.5', 'unpartitioned', 'true', 'uniform', '0.4', '0.0', '0.5'),
    ('PACL, true partition, mismatched 0.4 uniform, budget 0.5', 'pacl', 'true', 'uniform', '0.4', '0.0', '0.5'),
    ('PACL, true partition, budget 0.5', 'pacl', 'true', '', '', '0.0', '0.5'),
    ('PACL, true partition, flipped 0.2, budget 0.5', 'pacl', 'true', '', '', '0.2', '0.5'),
    ('PACL, random partition, budget 0.5', 'pacl', 'random', '', '', '0.0', '0.5'),
    ('PACL, budget 0.5', 'pacl', 'evaluators', '', '', '0.0', '0.5'),
    ('unpartitioned, budget 0.5', 'unpartitioned', 'evaluators', '', '', '0.0', '0.5'),
    ('PACL', 'pacl', 'evaluators', '', '', '0.0', '1.0'), ('unpartitioned', 'unpartitioned', 'evaluators', '', '', '0.0', '1.0')]


def grid_rows():
    return pd.DataFrame(GRID, columns=['row', 'method', 'partition', 'noise', 'mismatched', 'flipped', 'budget']).assign(table='when')


def test_gains_are_against_the_same_posts_and_budget():
    shares = dict(zip([row for row, *_ in GRID], (.2, .6, .5, .45, .3, .4, .4, .7, .4)))
    ours = Ours(answers(pd.concat([made_up({'pacl': share}).assign(row=row) for row, share in shares.items()]), TASKS))
    table = when_it_helps(ours, grid_rows(), {'r': 2})
    found = {part: dict(zip(q['x'], q['value'])) for part, q in table.groupby('part')}
    def d(a, b): return pytest.approx(ours.difference(a, b, LABEL)[0])
    row = [row for row, *_ in GRID]
    assert found['share of mismatched pairs, uniform noise'] == {'0.4': d(row[1], row[0])}
    assert found['share of the true partition flipped'] == {'0': d(row[2], row[6]), '0.2': d(row[3], row[6]), 'judges': d(row[5], row[6]),
                                                             'random': d(row[4], row[6])}
    assert found['budget, times the images seen'] == {'0.5': d(row[5], row[6]), '1': d('PACL', 'unpartitioned')}
    assert found['clusters r'] == {'2': d('PACL', 'unpartitioned')}
    lines = advice(table)
    assert lines[0].startswith('budget, times the images seen (0.5, 1): PACL gains at 1, loses at none; most at 1, +')
    assert len(lines) == 4 and not any('In practice' in line for line in lines)  # one method in each panel: nothing to choose from
    assert when_it_helps(ours, grid_rows()[:0], {}).empty and advice(table[:0]) == []


apart = (n / 1e4 for n in itertools.count())  # no two runs have the same difference


def gains(part, **methods):
    "when_it_helps' table: + a claimed gain, - a claimed loss, 0 neither."
    return [(part, str(k), name, v, v - .5, v + .5) for name, signs in methods.items()
            for k, v in enumerate({'+': 1., '-': -1., '0': 0.}[sign] + next(apart) for sign in signs)]


@pytest.mark.parametrize('panels, counted, said', [
    ([gains('a', PACL='++-', strong='+++'), gains('r', PACL='+++++')], 'PACL 2 and 1 of 3; strong 3 and 0 of 3',
     'strong gains most often. Judge'),  # alone in the panel of r: not counted
    ([gains('a', PACL='+0', strong='0+')], 'PACL 1 and 0 of 2; strong 1 and 0 of 2', 'PACL and strong gain most often, equally: begin'),
    ([gains('a', PACL='+0', order='++'), gains('b', PACL='0+', strong='00')], 'PACL 2 and 0 of 4; order 2 and 0 of 2; strong 0 and 0 of 2',
     'PACL gains most often. Judge'),
    ([gains('a', PACL='0-', strong='00')], 'PACL 0 and 1 of 2; strong 0 and 0 of 2', 'nothing gains more often than it loses here. Train')])
def test_advice_compares_what_was_tried_side_by_side(panels, counted, said):
    *_, counts, last = advice(pd.DataFrame(sum(panels, []), columns=['part', 'x', 'series', 'value', 'low', 'high']))
    assert counts == f'Claimed gains and losses, where methods were tried side by side: {counted}.'
    assert last.startswith(f'In practice: {said}')


# the page

class Page(HTMLParser):
    "Collects what a page refers to, and holds that every tag is closed in order."
    VOID = {'meta', 'link', 'img', 'br'}

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.tables, self.headings, self.words = [], [], [], 0, [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == 'img': self.images.append(attrs)
        self.links += [attrs[name] for name in ('href', 'src', 'srcset', 'action', 'data') if name in attrs and tag != 'img']
        self.tables += tag == 'table'
        assert tag not in ('script', 'iframe', 'object')
        if tag not in self.VOID: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == 'h2': self.headings.append(data)
        if self.open and self.open[-1] not in ('style', 'title'): self.words.append(data)


def test_text_is_escaped_and_empty_sections_are_left_out():
    table = pd.DataFrame({'a': ['<b>', '**2**']}, index=pd.MultiIndex.from_tuples([('g & h', 'x'), ('g & h', 'y')], names=['', 'row']))
    text = page('A < B', {'Here': html_table(table), 'Nothing': ''})
    found = Page(text)
    assert found.headings == ['Here'] and found.tables == 1 and 'A < B' in found.words
    assert '&lt;b&gt;' in text and '<b>2</b>' in text and text.count('class="group"') == 1
    assert html_table(table[:0]) == ''


def fake_experiments(run):
    "What the grid of runs would leave, from the main run's answers under other names."
    main = pd.read_csv(run / 'results/predictions.csv', dtype=str, keep_default_na=False)
    own = main[main['partition'].isin(['', 'evaluators'])]
    names = {'unpartitioned': ['factual partition, matched', 'PACL, γ 0', 'PACL, γ 1', 'PACL, r 25', 'PACL, τ 1', 'PACL, text bag-of-words',
                               'CLIP'],
             'initial': ['Feng et al.', 'DeepSentiBank'],
             'pacl': ['factual partition', 'emotional partition, matched', 'emotional partition', 'strong + partial', 'PACL, r 6',
                      'PACL, τ 0.5', 'EmotionCLIP', 'PACL + PDANet', 'PACL, γ 0.3']}
    for row, method, *_ in GRID[:-2]: names['unpartitioned' if method == 'unpartitioned' else 'pacl'].append(row)
    alone = own[(own['task'] == 'levels') & (own['protocol'] == 'fine-tune')].assign(task=lambda t: t['level'])
    found = [own[own['method'] == method].assign(row=row) for method, rows in names.items() for row in rows]
    rows = (('initial', 'initial'), ('pacl', 'PACL'), ('pacl', 'PACL + PDANet'))
    found += [alone[alone['method'] == method].assign(row=row) for method, row in rows]
    table = pd.concat(found).drop(columns=['method', 'partition'])
    with write_stage(run / 'experiments', {'stage': 'experiments', 'parameters': {'tables': 'all'}, 'result': {'runs': 4}}) as folder:
        table.to_csv(folder / 'predictions.csv', index=False)
        grid_rows().to_csv(folder / 'rows.csv', index=False)
        pd.DataFrame({'row': [*names['pacl'], 'initial', 'PACL'], 'seed': 0, 'images_seen': [160.] * len(names['pacl']) + [np.nan, 160],
                      'steps': 6}).to_csv(folder / 'runs.csv', index=False)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    run = make_posts(tmp_path_factory.mktemp('runs') / 'mini')
    run_evaluate(run, probe_epochs=1, fine_tune_epochs=1)
    run_tables(run)
    return run


def check(out, tables):
    text = (out / 'report.html').read_text(encoding='utf-8')
    found = Page(text)
    for image in found.images:
        kind, _, data = image['src'].partition(';base64,')
        assert kind == 'data:image/png' and image['alt']
        Image.open(io.BytesIO(base64.b64decode(data, validate=True))).verify()
    assert all(link.startswith('#') or link == 'data:,' for link in found.links) and not re.search(r'url\(|@import|https?://', text)
    assert {link[1:] for link in found.links if link.startswith('#')} == set(re.findall('section id="(.+?)"', text))
    for name in tables:
        assert {f'{name}.md', f'{name}.tex', f'{name}.csv'} <= {path.name for path in out.iterdir()}
    assert 'nan' not in re.sub('base64,[^"]*', '', text) and str(out.parent.parent) not in text
    return found


def test_the_report_of_a_main_run_alone(run):
    out = run_report(run)
    found = check(out, ['table1', 'table3', 'table4'])
    assert any(h.startswith('Table 4') for h in found.headings)
    assert not any(h.startswith(('Table 5', 'When', 'Other')) for h in found.headings)
    assert any('from other data' in words for words in found.words)
    table = pd.read_csv(out / 'table4.csv')
    results = pd.read_csv(run / 'tables/results.csv')
    ours = table[table['title'].str.fullmatch('new, . emotions.*FI, 8.')].set_index('row')['value']
    theirs = results[results['column'] == 'emotion, new'].set_index('row')['mean']
    assert ours['PACL'] == pytest.approx(100 * theirs['PACL'], abs=1e-3)
    assert run_report.stale(run) is None and 'PACL' in (out / 'claims.csv').read_text()
    assert 'tables' in run_report.stale(run, tables='all')


def test_the_report_of_all_experiments(run):
    fake_experiments(run)
    also = run.with_name('other')
    for name in ('data', 'results', 'features'):
        (also / name).mkdir(parents=True)
        for path in (run / name).glob('*.*'):
            if path.suffix in ('.csv', '.json'): shutil.copy(path, also / name)
    out = run_report(run, tables='all', also=[str(also)])
    found = check(out, ['table1', 'table2', 'table3', 'table4', 'table5', 'text'])
    assert len([h for h in found.headings if h.startswith('Table')]) == 5
    assert {'When does it help?', 'Other text encoders'} <= {*found.headings}
    assert {'table5.png', 'when.png', 'parts.png', 'when.csv'} <= {path.name for path in out.iterdir()}
    assert set(pd.read_csv(out / 'table1.csv')['part']) == {'tf_efficientnet_lite0', 'tf_efficientnet_lite0, other'}
    assert 'PACL + PDANet' in set(pd.read_csv(out / 'table2.csv').query('title.str.contains("level|classes")')['row'])
    with pytest.raises(InputError, match='no folder of a run'): run_report(run, tables='all', also=[str(run / 'nothing')])


def test_the_report_of_posts_without_a_truth(run, tmp_path):
    shutil.copytree(run, tmp_path / 'mini')
    for name in ('tables/why.md', 'tables/figures/pairs.png', 'tables/figures/gap.png', 'partition/truth.csv'):
        (tmp_path / 'mini' / name).unlink(missing_ok=True)
    found = check(run_report(tmp_path / 'mini', stand_for=['FI=new/label']), ['table4'])
    assert not any(h.startswith(('Why', 'The affective')) for h in found.headings)


def test_filled_cells_are_picked_up(run, tmp_path):
    shutil.copytree(os.path.join(os.path.dirname(__file__), '../data/paper'), tmp_path / 'paper')
    table = pd.read_csv(tmp_path / 'paper/table4.csv', dtype=str, keep_default_na=False)
    for k, row in enumerate(('initial', 'unpartitioned', 'PACL')):
        table.loc[(table['row'] == row) & (table['dataset'] == 'FI'), 'value'] = str(50 + k)
    table.to_csv(tmp_path / 'paper/table4.csv', index=False)
    out = run_report(run, paper=str(tmp_path / 'paper'))
    assert '| 52.00 |' in (out / 'table4.md').read_text() and '3 of the 27 cells' in (out / 'report.html').read_text()


def test_stages_in_the_order_of_their_dependence(tmp_path):
    for name, inputs in (('b', ['a']), ('a', []), ('c', ['b', 'a']), ('report', ['c'])):
        with write_stage(tmp_path / name, {'inputs': dict.fromkeys(inputs, ''), 'parameters': {}}): pass
    assert list(stage_records(tmp_path)) == ['a', 'b', 'c']


BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)


@pytest.mark.skipif(not BROWSER, reason='no browser: install chromium to see how the report looks on a phone')
def test_in_a_browser_on_a_phone(run, tmp_path):
    "Nothing on the console, no picture missing, nothing wider than 390 px outside of a box that scrolls."
    out = run_report(run)
    # a frame of a phone's width: headless windows have a least width of their own
    script = ('const f=document.getElementById("f");f.onload=()=>{const d=f.contentDocument,e=d.documentElement;document.title="done";'
              'document.body.append("WIDTH "+e.scrollWidth+" OF "+e.clientWidth+" BROKEN "+[...d.images].filter(i=>!i.naturalWidth).length'
              '+" IMAGES "+d.images.length)}')
    shutil.copy(out / 'report.html', tmp_path / 'report.html')
    frame = '<iframe id="f" width="390" height="800" style="border:0" src="report.html"></iframe>'
    (tmp_path / 'phone.html').write_text(f'<body>{frame}<script>{script}</script>')
    options = ['--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--enable-logging=stderr', '--virtual-time-budget=5000',
               '--allow-file-access-from-files', f'--user-data-dir={tmp_path}/profile']
    done = subprocess.run([BROWSER, *options, '--dump-dom', f'file://{tmp_path}/phone.html'], capture_output=True, text=True, timeout=120)
    width, of, broken, images = map(int, re.search(r'WIDTH (\d+) OF (\d+) BROKEN (\d+) IMAGES (\d+)', done.stdout).groups())
    assert width <= of == 390 and broken == 0 and images > 3
    assert 'CONSOLE' not in done.stderr
