"pacl.tables: numbers against loops, sentences that follow them, and the whole stage on a miniature run."
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_evaluate import make_benchmarks

from pacl.evaluate import paired_difference, run_evaluate
from pacl.partition import PARTITIONS
from pacl.stages import write_stage
from pacl.tables import (as_printed, differences, outcomes, pair_report, plot_embeddings, plot_pairs, reasons, result_table, run_tables,
                         strong_pairs_seen, to_markdown)

OBJECTS, EMOTIONS = np.array(['cat', 'dog', 'car']), np.array(['awe', 'fear'])


def make_posts(run, n=80):
    "Posts, partition, clusters and what training leaves beside its models, on top of `make_benchmarks`."
    make_benchmarks(run)
    rng = np.random.default_rng(1)
    truth = pd.DataFrame({
        'id': [f'{i:04}' for i in range(n)], 'object': rng.choice(OBJECTS, n), 'emotion': rng.choice(EMOTIONS, n),
        'text_object': rng.choice([*OBJECTS, ''], n), 'text_emotion': rng.choice(EMOTIONS, n),
        'factual': rng.random(n).round(3), 'emotional': rng.random(n).round(3), 'partition': np.repeat(PARTITIONS, n // 4)})
    said = truth.assign(partition=np.roll(truth['partition'], 5))[['id', 'factual', 'emotional', 'partition']]  # 15 of 20 are right
    truth.assign(image='x.png', text='a $ text')[['id', 'image', 'text']].to_csv(run / 'data/posts.csv', index=False)
    np.save(run / 'data/posts.npy', rng.integers(256, size=(n, 8, 8, 3), dtype=np.uint8))
    with write_stage(run / 'partition', {'stage': 'partition', 'parameters': {}}) as folder:
        said.to_csv(folder / 'partition.csv', index=False)
        truth.to_csv(folder / 'truth.csv', index=False)
        truth[said.columns].to_csv(folder / 'true_partition.csv', index=False)
    with write_stage(run / 'clusters', {'stage': 'clusters', 'parameters': {}}) as folder:  # in another order than the truth
        pd.DataFrame({'id': truth['id'], 'factual_cluster': np.arange(n) % 2, 'emotional_cluster': np.arange(n) // 2 % 2})[::-1].to_csv(
            folder / 'clusters.csv', index=False)
    for folder in (run / 'models').glob('*-s*'):
        ids = (truth if '-true-' in folder.name else said).groupby('partition')['id'].apply(list)[list(PARTITIONS)]
        if folder.name.startswith('pacl'):
            np.savez(folder / 'probe.npz', ids=np.array(ids.tolist()), image_features=rng.normal(size=(4, 4, 20, 5)).astype(np.float32),
                     text_features=rng.normal(size=(4, 4, 20, 5)).astype(np.float32))
            log = pd.DataFrame({'step': range(6), 'epoch': np.arange(6) // 2, 'strong': 3., 'emotional': [np.nan] * 2 + [2.] * 4,
                                'factual': [np.nan] * 2 + [2.] * 4, 'weak': [np.nan] * 4 + [1.] * 2})
        else: log = pd.DataFrame({'step': range(10), 'epoch': 0, 'all': np.linspace(4, 2, 10)})
        log.to_csv(folder / 'log.csv', index=False)
    return run


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    run = make_posts(tmp_path_factory.mktemp('runs') / 'mini')
    run_evaluate(run, probe_epochs=1, fine_tune_epochs=1)
    return run


def answers(shares, seeds=(0, 1, 2), n=200, task='emotion'):
    "Predictions in which each method is right on this share of the pictures."
    rng, tables = np.random.default_rng(0), []
    for method, share in shares.items():
        for seed in seeds:
            right = np.where(rng.random(n) < .05, rng.random(n) < .5, np.arange(n) < share * n)
            label = np.array(['a', 'b', 'c', 'd'])[np.arange(n) % 4]
            tables.append(pd.DataFrame({
                'method': method, 'partition': '' if method == 'initial' else 'evaluators', 'seed': seed,
                'protocol': 'linear', 'dataset': 'new', 'task': task,
                'id': [f'{i:04}' for i in range(n)], 'label': label, 'prediction': np.where(right, label, 'x')}))
    return pd.concat(tables)


def test_the_order_of_the_rows_does_not_matter():
    table = answers({'initial': .3, 'pacl': .4})
    mixed = outcomes(table.sample(frac=1, random_state=0))
    for key, right in outcomes(table).items(): pd.testing.assert_frame_equal(right, mixed[key])
    row = table.query('method == "pacl" and seed == 2 and id == "0007"').iloc[0]
    assert mixed['PACL', 'emotion, new'].loc[2, '0007'] == (row['label'] == row['prediction'])


def test_the_result_table():
    predictions = pd.concat([answers({'initial': .3, 'pacl': .4, 'odd-method': .2}), answers({'initial': .8}, task='object')])
    runs = pd.DataFrame({'method': 'pacl', 'partition': 'evaluators', 'seed': [0, 1], 'images_seen': [1000, 2000], 'steps': [10, 20]})
    table = result_table(predictions, runs).set_index(['row', 'column'])
    for method, row in (('initial', 'initial'), ('pacl', 'PACL'), ('odd-method', 'odd-method')):
        group, found = predictions.query('method == @method and task == "emotion"'), table.loc[(row, 'emotion, new')]
        assert np.isclose(found['mean'], (group['label'] == group['prediction']).mean()) and found['low'] < found['mean'] < found['high']
        assert (found['seeds'], found['n']) == (3, 200)
    assert (table.loc['chance']['mean'] == .25).all() and table.loc[('PACL', 'emotion, new'), 'images_seen'] == 1500
    printed = as_printed(table.reset_index())
    mean, low, high = 100 * table.loc[('PACL', 'emotion, new'), ['mean', 'low', 'high']].astype(float)
    assert list(printed.loc['PACL']) == [f'{mean:.1f} [{low:.1f}, {high:.1f}]', '', '1,500', '15']
    assert list(printed.index) == ['initial', 'PACL', 'odd-method', 'chance'] and list(printed.loc['chance'])[:2] == ['25.0', '25.0']
    lines = to_markdown(printed).splitlines()
    assert lines[0] == '|  | emotion, new | object, new | images seen | steps |'
    assert len(lines) == 6 and len({x.count('|') for x in lines}) == 1
    assert r'\toprule' in printed.to_latex(escape=True)


@pytest.mark.parametrize('pacl, plain, verdict', [
    (.6, .4, 'PACL is better than unpartitioned: +'), (.4, .6, 'PACL is worse than unpartitioned: -'),
    (.5, .5, 'no difference between PACL and unpartitioned can be claimed: ')])
def test_the_sentence_follows_the_numbers(pacl, plain, verdict):
    table = differences(answers({'unpartitioned': plain, 'pacl': pacl})).set_index(['a', 'b'])
    found = table.loc[('PACL', 'unpartitioned')]
    assert verdict in found['sentence'] and f'[{100 * found["low"]:+.1f}, {100 * found["high"]:+.1f}]' in found['sentence']
    assert len(table) == 1 and ('no difference' in found['sentence']) == (found['low'] <= 0 <= found['high'])


def test_differences_are_of_the_same_seeds_and_pictures():
    predictions = pd.concat([answers({'strong': .5, 'pacl': .6}), answers({'initial': .3}, seeds=(0, 1))])
    right, table = outcomes(predictions), differences(predictions).set_index(['a', 'b'])
    assert set(table.index) == {('PACL', 'strong only'), ('PACL', 'initial')}
    a, b = right['PACL', 'emotion, new'].loc[[0, 1]], right['initial', 'emotion, new']
    assert tuple(table.loc[('PACL', 'initial'), ['difference', 'low', 'high']]) == paired_difference(a.to_numpy(), b.to_numpy())


# against the truth

def test_pair_report_is_what_a_loop_finds(run):
    pairs = pair_report(run, batch_size=8)
    truth = pd.read_csv(run / 'partition/truth.csv', dtype=str, keep_default_na=False).set_index('id')
    clusters = pd.read_csv(run / 'clusters/clusters.csv', dtype={'id': str}).set_index('id')
    assert set(pairs['row']) == {'PACL', 'PACL, true partition'} and len(pairs) == 3 * 4 * 4
    probe = np.load(run / 'models/pacl-evaluators-s1/probe.npz')
    found = pairs.query('row == "PACL" and seed == 1 and epoch == 2').set_index('partition')
    for p, kind in ((1, 'object'), (2, 'emotion')):
        shares = []
        for start in (0, 8):  # the 4 that do not fill a batch are left out
            ids = probe['ids'][p][start:start + 8]
            v, t = (probe[f'{x}_features'][2, p, start:start + 8] for x in ('image', 'text'))
            sim, dropped = (v / np.linalg.norm(v, axis=1, keepdims=True)) @ (t / np.linalg.norm(t, axis=1, keepdims=True)).T, []
            for i in range(8):
                for j in range(8):
                    if i == j: continue
                    if kind == 'object': of, one, other = 'factual_cluster', i, sim[:, j].argmax()
                    else: of, one, other = 'emotional_cluster', j, sim[i].argmax()
                    if clusters[of][ids[one]] == clusters[of][ids[other]]:
                        dropped.append(truth[kind][ids[i]] == truth[f'text_{kind}'][ids[j]])
            shares.append((len(dropped) / 56, np.mean(dropped)))
        assert np.allclose(found.loc[PARTITIONS[p], ['dropped', f'dropped_{kind}']].astype(float), np.mean(shares, axis=0), atol=1e-6)
    assert np.isnan(found.loc['strong', 'dropped_object']) and found.loc['strong', 'positives_own'] == 1


def test_strong_pairs_seen(run):
    seen = strong_pairs_seen(run)
    assert (seen['images_seen'] == 160).all() and np.isclose(seen.loc['unpartitioned', 'strong'], 160 / 4)
    # six batches of strong, four each of emotional and factual, two of weak; of what the evaluators call strong 15 of 20 are, of weak 5 are
    assert np.isclose(seen.loc['PACL', 'strong'], 160 * (6 * .75 + 2 * .25) / 16)
    assert np.isclose(seen.loc['PACL, true partition', 'strong'], 160 * 6 / 16)


def test_reasons_say_the_numbers(run):
    pairs, seen = pair_report(run), strong_pairs_seen(run)
    lines = reasons(pairs, seen)
    assert lines[0] == 'unpartitioned saw 160 images, repeats counted; 40 of them in truly strong pairs (25%).' and len(lines) == 3 + 2 * 4
    last = pairs.query('row == "PACL" and partition == "factual" and epoch == 3').mean(numeric_only=True)
    line = next(x for x in lines if x.startswith('PACL, factual'))
    assert f'drops {last["dropped"]:.0%}' in line and f'{last["dropped_emotion"] / last["negatives_emotion"]:.2f} times chance' in line
    assert len(plot_pairs(pairs).axes) == 3 and reasons(pairs[:0], seen) == lines[:3]


def test_run_tables(run):
    out = run_tables(run)
    assert run_tables.stale(run) is None
    text = (out / 'results.md').read_text()
    assert text.count('\n|') == 8 and 'mean over 2 seeds' in text
    assert 'PACL' in (out / 'results.tex').read_text() and len((out / 'why.md').read_text().splitlines()) == 11
    compared = pd.read_csv(out / 'differences.csv')
    assert set(zip(compared['a'], compared['b'])) == {
        ('PACL', 'unpartitioned'), ('PACL', 'initial'), ('PACL, true partition', 'unpartitioned')}
    assert (out / 'differences.md').read_text() == ''.join(f'- {x}\n' for x in compared['sentence'])
    figures = {path.stem: np.asarray(Image.open(path).convert('L')) for path in (out / 'figures').iterdir()}
    assert set(figures) == {'gap', 'gallery', 'confusion', 'embeddings', 'curves', 'pairs'} and all(x.std() > 5 for x in figures.values())


def test_an_encoder_that_makes_all_pictures_alike_is_drawn():
    fig = plot_embeddings({'dead': np.zeros((20, 5), np.float32)}, np.repeat(EMOTIONS, 10))
    assert np.isfinite(fig.axes[0].collections[0].get_offsets()).all()


def test_tables_of_posts_without_a_truth(run):
    (run / 'partition/truth.csv').rename(run / 'truth')
    try: out = run_tables(run, seed=1)
    finally: (run / 'truth').rename(run / 'partition/truth.csv')
    assert not (out / 'why.md').exists() and not (out / 'pairs.csv').exists() and not (out / 'figures/pairs.png').exists()
    assert (out / 'results.md').exists()
