"data/paper: every row and column of the five tables, filled cells in range, and the paper's own orderings where both cells are there."
import pandas as pd
import pytest

from pacl.report import KEYS, PAPER, read_paper

TABLES = {'table1': 468, 'table2': 60, 'table3': 21, 'table4': 27, 'table5': 54}
COLUMNS = ['row', 'backbone', *KEYS, 'value', 'source', 'note']
SETS = {'FI': {'2', '8'}, 'Emotion-6': {'6'}, 'UnbiasedEmo': {'6'}, 'WebEmo': {'2', '6', '25'}, 'Emotic': {'26'}, 'Emotic-VAD': {'3'},
        'IAPS': {'3'}}


@pytest.fixture(params=TABLES)
def name(request): return request.param


def test_every_cell_once(name):
    table = read_paper(name)
    assert list(table) == ['sweep', 'setting'] * (name == 'table5') + COLUMNS and len(table) == TABLES[name]
    keys = [c for c in table if c not in ('value', 'source', 'note')]
    assert not table.duplicated(keys).any()
    rows = [c for c in ('sweep', 'row', 'backbone') if c in table]
    assert (table.groupby(rows).size() == len(table) / len(table.drop_duplicates(rows))).all()  # each row has every column
    assert table['source'].str.fullmatch(f'Table {name[-1]}(, quoted)?').all()
    assert all(level in SETS[dataset] for dataset, level in zip(table['dataset'], table['level']))


def test_values_in_range(name):
    table = read_paper(name).dropna(subset='value')
    share = ~table['metric'].isin(['mse', 'r2'])
    assert table.loc[share, 'value'].between(1, 100).all() and (table.loc[table['metric'] == 'r2', 'value'] <= 1).all()
    assert (table.loc[table['metric'] == 'mse', 'value'] > 0).all()
    # an accuracy below chance would be a typo
    single = table[table['metric'] == 'accuracy']
    assert (single['value'] >= 100 / single['level'].astype(int)).all()


def test_rows_and_columns():
    first, second, fifth = (read_paper(f'table{i}') for i in (1, 2, 5))
    assert first.groupby('backbone')['row'].unique().map(list).to_dict() == {
        b: ['initial', 'Feng et al.', *['EmotionCLIP'] * (b == 'ViT-clip'), 'PACL']
        for b in ('ResNet-50', 'ViT-base', 'Swin-base', 'ViT-clip')}
    assert second['row'].unique()[-1] == 'PACL + PDANet'
    assert (second['source'].str.contains('quoted') != second['row'].str.startswith('PACL')).all()
    assert len(read_paper('table4')['row'].unique()) == 9 and len(read_paper('table3')['row'].unique()) == 7
    assert fifth.groupby('sweep')['setting'].unique().map(list).to_dict() == {
        'γ': ['0', '0.3', '0.5', '0.7', '0.9', '1'],
        'r': ['2', '3', '6', '10', '15', '25'], 'τ': ['0.01', '0.03', '0.05', '0.07', '0.5', '1']}
    default = fifth[fifth['row'] == 'PACL'].drop_duplicates('sweep').set_index('sweep')['setting'].to_dict()
    assert default == {'γ': '0.7', 'r': '2', 'τ': '0.07'}


def test_oddities_are_noted():
    first, fifth = read_paper('table1'), read_paper('table5')
    fi = first.query('row == "PACL" and backbone == "ResNet-50" and protocol == "linear" and dataset == "FI"').iloc[0]
    assert fi['metric'] == 'accuracy'
    assert fi['value'] == 59.50 and '59.59' in fi['note']
    assert set(fifth.query('row == "PACL" and dataset == "FI"')['value']) == {59.59} and fifth['value'].min() == 39.56
    keys = ['row', *KEYS]
    pair = {b: first[(first['backbone'] == b) & (first['row'] == 'Feng et al.')].set_index(keys) for b in ('ViT-base', 'ViT-clip')}
    assert pair['ViT-clip']['note'].str.contains('ViT-base').all()
    both = pair['ViT-clip']['value'].dropna()
    assert (both == pair['ViT-base'].loc[both.index, 'value']).all()
    middle = pd.concat([first, read_paper('table2')]).query('dataset == "WebEmo" and level == "6"')
    assert middle['note'].str.contains('7 in the text').all()


def test_orderings_hold_where_both_cells_are_filled():
    claims, tried = read_paper('claims'), 0
    assert set(claims['table']) <= set(TABLES) and not claims.duplicated(['better', 'worse', 'table']).any()
    for claim in claims.itertuples():
        table = read_paper(claim.table)
        where = [c for c in ('sweep', 'backbone', *KEYS) if c in table]
        wide = table.dropna(subset='value').pivot(index=where, columns='row', values='value')
        if {claim.better, claim.worse} <= set(wide):
            both = wide[[claim.better, claim.worse]].dropna()
            sign = (-1) ** (both.index.get_level_values('metric') == 'mse')
            assert (sign * (both[claim.better] - both[claim.worse]) > 0).all(), claim
            tried += len(both)
    assert tried >= 1  # γ 1 against the default


def test_every_row_of_a_claim_is_one_of_its_table():
    ours = {'initial'}  # a row that Table 2 of the report adds
    for claim in read_paper('claims').itertuples():
        assert {claim.better, claim.worse} <= set(read_paper(claim.table)['row']) | ours, claim


def test_text_and_readme():
    text = read_paper('text').set_index('name')['value']
    assert text['strong'] + text['partial'] + text['weak'] == 100
    readme = (PAPER / 'README.md').read_text(encoding='utf-8')
    for name, cells in TABLES.items(): assert f'`{name}.csv` {cells}' in readme
