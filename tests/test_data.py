"pacl.parts.data: what a run reads, what it leaves out, what leaks, and the page that the check prints."
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_datasets
from PIL import Image
from test_pictures import TILES

from pacl.parts import pictures
from pacl.parts.data import PUBLISHED, check, histogram, in_post_order, load_set, load_tasks, main, named, run_data, user_folders
from pacl.parts.readers import EMOTIC, Task, single
from pacl.parts.stages import InputError, read_record, write_stage

COLOURS = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255)}


def make_world(run, posts=60, bad=()):
    "A world of flat pictures: the colour is the object, its brightness the feeling; half of the texts say another, half feel otherwise."
    with write_stage(run / 'world', {'stage': 'world'}) as world:
        rows, truth = [], []
        (world / 'posts/images').mkdir(parents=True)
        for i in range(posts):
            seen, bright = list(COLOURS)[i % 3], i // 3 % 2
            factual, emotional = i // 6 % 2, i // 12 % 2
            said = seen if factual else list(COLOURS)[(i + 1) % 3]
            glad = bright if emotional else 1 - bright
            name = f'images/{i:04}.png'
            Image.new('RGB', (10, 8), tuple(c if bright else c // 4 for c in COLOURS[seen])).save(world / 'posts' / name)
            rows.append({'id': f'{i:04}', 'image': name, 'text': f'{said} {"joy" if glad else "grief"}'})
            truth.append({'id': f'{i:04}', 'object': seen, 'emotion': 'awe' if bright else 'fear', 'text_object': said,
                          'text_emotion': 'awe' if glad else 'fear', 'factual': bool(factual), 'emotional': bool(emotional),
                          'partition': {(1, 1): 'strong', (0, 1): 'emotional', (1, 0): 'factual', (0, 0): 'weak'}[factual, emotional]})
        for i in bad: (world / 'posts' / rows[i]['image']).write_bytes(b'')
        pd.DataFrame(rows).to_csv(world / 'posts/posts.csv', index=False)
        pd.DataFrame(truth).to_csv(world / 'truth.csv', index=False)
        labelled = pd.DataFrame([{'id': f'{i:04}', 'image': f'{i}.png', 'split': split, 'label': ('awe', 'fear')[i % 2], 'object': 'red',
                                  'level_1': ('positive', 'negative')[i % 2], 'level_2': ('awe', 'fear')[i % 2],
                                  'labels': ('awe|fear', 'awe')[i % 2], 'valence': i / 8}
                                 for i, split in enumerate(['train', 'val', 'test', 'test'])])
        for name, columns in {'new': 'label object level_1 level_2', 'seen': 'label object', 'mixed': 'labels valence'}.items():
            (world / name).mkdir()
            for i in range(4): Image.new('RGB', (8, 8), (200, 10 * i, 99)).save(world / name / f'{i}.png')
            labelled[['id', 'image', 'split', *columns.split()]].to_csv(world / name / 'labels.csv', index=False)
    return run


def rejected(run): return pd.read_csv(run / 'data/rejected.csv', dtype=str, keep_default_na=False).to_dict('records')


def test_run_data(tmp_path):
    run = make_world(tmp_path / 'my runs', bad=[5, 33])
    out = run_data(run, image_size=6)
    table, images = load_set(run, 'posts')
    assert len(table) == len(images) == 58 and images.shape[1:] == (6, 6, 3) and table['id'][5] == '0006'
    assert (images[5] == (63, 0, 0)).all() and table['text'][5].endswith(('joy', 'grief')) and 'missing' not in table
    assert load_set(run, 'new')[0]['id'].tolist() == ['0000', '0001', '0002', '0003'] and not (out / 'clean.csv').exists()
    assert rejected(run) == [{'set': 'posts', 'id': id, 'image': f'images/{id}.png', 'reason': 'zero bytes'} for id in ('0005', '0033')]
    assert read_record(out)['result'] == {'posts': 58, 'new': 4, 'seen': 4, 'mixed': 4, 'leaked': 0, 'rejected': 2}
    assert run_data.stale(run, image_size=6) is None and 'image_size' in run_data.stale(run, image_size=8)
    assert (out / 'posts.npy').samefile(next((run / 'pictures').glob(f'{next_name(run, "posts")}.npy')))  # stored once


def next_name(run, name):  # the cache's file behind data/NAME.npy
    inode = (run / f'data/{name}.npy').stat().st_ino
    return next(path.stem for path in (run / 'pictures').glob('*.npy') if path.stat().st_ino == inode)


def test_tasks_of_the_world(tmp_path):
    run = make_world(tmp_path)
    run_data(run, image_size=4)
    tasks = load_tasks(run)
    assert {name: list(about) for name, about in tasks.items()} == {
        'new': ['label', 'object', 'levels'], 'seen': ['label', 'object'], 'mixed': ['labels', 'vad']}
    assert tasks['new']['label'] == single(['awe', 'fear']) and tasks['new']['object'].columns == ('object',)
    assert tasks['new']['levels'] == Task('hierarchical', ('level_1', 'level_2'), (('negative', 'positive'), ('awe', 'fear')))
    mixed, _ = load_set(run, 'mixed')
    assert tasks['mixed']['labels'].targets(mixed).tolist() == [[1, 1], [1, 0], [1, 1], [1, 0]]
    assert tasks['mixed']['vad'].targets(mixed).ravel().tolist() == [0, .125, .25, .375]
    assert tasks['new']['levels'].targets(load_set(run, 'new')[0]).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]


def test_the_cache_keeps_what_is_used(tmp_path, monkeypatch):
    run = make_world(tmp_path)
    run_data(run, image_size=4)
    decoded = []
    monkeypatch.setattr(pictures, 'fill_array', lambda *args, old=pictures.fill_array: decoded.append(1) or old(*args))
    (run / 'data/posts.csv').write_text('edited')
    run_data(run, image_size=4)
    assert not decoded and len(load_set(run, 'posts')[0]) == 60
    (run / 'data/posts.npy').open('r+b').write(b'edited')  # the same file as the cache's
    run_data(run, image_size=4)
    assert len(decoded) == 1 and len(load_set(run, 'posts')[1]) == 60
    before = {path.stem for path in (run / 'pictures').iterdir()}
    run_data(run, image_size=5)
    after = {path.stem for path in (run / 'pictures').iterdir()}
    assert len(after) == len(before) and before & after == {'.lock'}


TEXTS = {  # id → bytes of the text, the reason or None
    '01': (b'', 'no text'), '02': ('\u2003 \t'.encode(), 'no text'), '03': ('😀🎉'.encode(), None), '04': (b'https://t.co/x', None),
    '05': (b'long ' * 2000, None), '06': ('مرحبا بالعالم'.encode(), None), '07': (b'caf\xe9', 'text is not UTF-8'),
    '08': (b'"quoted", and\r\na new line', None), '09': (b'NULL', None), '10': ('\ufeffbom'.encode(), None), '11': (b"=1+1;'", None)}


def test_every_kind_of_text(tmp_path):
    run, own = make_world(tmp_path / 'run'), tmp_path / 'own'
    own.mkdir()
    with open(own / 'posts.csv', 'wb') as file:
        file.write('\ufeffid,image,text\r\n'.encode())
        for i, (key, (text, _)) in enumerate(TEXTS.items()):
            Image.new('RGB', (4, 4), (i, 0, 0)).save(own / f'{key} ü.png')
            file.write(f'{key},{key} ü.png,"'.encode() + text.replace(b'"', b'""') + b'"\r\n')
    run_data(run, posts=str(own), image_size=4)
    table, images = load_set(run, 'posts')
    assert dict(zip(table['id'], table['text'])) == {key: text.decode() for key, (text, reason) in TEXTS.items() if not reason}
    assert [f'{i + 1:02}' for i in images[:, 0, 0, 0]] == table['id'].tolist()
    assert [(r['id'], r['reason']) for r in rejected(run)] == [(key, reason) for key, (_, reason) in TEXTS.items() if reason]


def own_posts(folder, names_and_pictures):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'posts.csv', 'w', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(['id', 'image', 'text'])
        for name, picture in names_and_pictures.items():
            if picture is not None: picture.save(folder / f'{name}.png')
            rows.writerow([name, f'{name}.png', f'text of {name}'])
    return folder


def own_benchmark(folder, split_to_pictures):
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for split, some in split_to_pictures.items():
        for i, picture in enumerate(some):
            picture.save(folder / f'{split}{i}.png')
            rows.append({'id': f'{split}-{i}', 'image': f'{split}{i}.png', 'split': split, 'label': ('awe', 'fear')[i % 2]})
    pd.DataFrame(rows).to_csv(folder / 'labels.csv', index=False)
    return folder


def test_posts_that_leak_are_left_out(tmp_path):
    run = make_world(tmp_path / 'run')
    moods = own_benchmark(tmp_path / 'moods', {'train': TILES[:4], 'val': TILES[4:6], 'test': TILES[6:9]})
    smaller = TILES[8].resize((90, 60))
    own = own_posts(tmp_path / 'own', {'a': TILES[6], 'b': TILES[0], 'c': TILES[10], 'd': smaller, 'e': TILES[11], 'f': None})
    given = dict(posts=f'posts:{own}', benchmarks=[f'csv:{moods}', f'csv/label:{moods}'], image_size=48)
    out = run_data(run, **given)
    table, images = load_set(run, 'posts')
    assert table['id'].tolist() == ['b', 'c', 'e'] and len(images) == 3
    np.testing.assert_array_equal(images[1], np.asarray(TILES[10].resize((48, 48), Image.Resampling.BICUBIC)))
    assert [(r['id'], r['reason']) for r in rejected(run)] == [
        ('f', 'no image'), ('a', 'also a test picture of csv (id test-0)'), ('d', 'also a test picture of csv (id test-2)')]
    assert read_record(out)['result'] == {'posts': 3, 'csv': 9, 'csv-label': 9, 'leaked': 2, 'rejected': 3}
    assert set(load_tasks(run)) == {'csv', 'csv-label'} and not (out / 'new.csv').exists()
    assert run_data.stale(run, **given) is None
    run_data(run, **given, keep_leaked=True)
    assert load_set(run, 'posts')[0]['id'].tolist() == list('abcde') and read_record(out)['result']['leaked'] == 2
    os.utime(moods / 'val0.png', (1, 1))
    assert run_data.stale(run, **given, keep_leaked=True) == f'{moods} changed'


def test_all_posts_leak(tmp_path):
    moods = own_benchmark(tmp_path / 'moods', {'train': TILES[:4], 'val': TILES[4:6], 'test': TILES[6:9]})
    own = own_posts(tmp_path / 'own', {'a': TILES[6]})
    with pytest.raises(InputError, match='keep_leaked'): run_data(make_world(tmp_path / 'run'), posts=str(own), benchmarks=[f'csv:{moods}'])


def test_persons_are_cut_out_and_whole_pictures_compared(tmp_path):
    run, root = make_world(tmp_path / 'run'), tmp_path / 'emotic'
    test_datasets.emotic_csv(root)
    for i, path in enumerate(sorted(root.rglob('*.jpg'))): TILES[i].save(path, quality=95)
    names = {path.name: i for i, path in enumerate(sorted(root.rglob('*.jpg')))}
    own = own_posts(tmp_path / 'own', {'a': TILES[names['e.jpg']], 'b': TILES[20 % len(TILES)].transpose(Image.Transpose.ROTATE_180)})
    given = dict(posts=str(own), benchmarks=[f'emotic:{root}', f'emotic/vad:{root}'], image_size=32)
    for person_box in (False, True):
        run_data(run, **given, person_box=person_box)
        assert load_set(run, 'posts')[0]['id'].tolist() == ['b']  # e.jpg is a test picture
        table, images = load_set(run, 'emotic-vad')
        first = np.asarray(TILES[names['a.jpg']].crop((1, 2, 30, 40) if person_box else (0, 0, 160, 106)).resize((32, 32))).astype(int)
        assert table['image'][0].endswith('a.jpg') and np.abs(images[0] - first).mean() < 6
        assert load_tasks(run)['emotic']['categories'].classes == (EMOTIC,) and load_tasks(run)['emotic-vad']['vad'].ranges[0] == (1, 10)


@pytest.mark.parametrize('text, says', [
    ('emoset6:/data', ['emoset6', 'nearest valid: emoset']), ('/data/FI', ['"/data/FI" names no reader', 'fi:/data/FI']),
    ('fi/labels:{tmp}', ['no task "labels"']), ('fi:{tmp}/nowhere', ['nowhere is not a folder'])])
def test_a_benchmark_that_is_none(tmp_path, text, says):
    run = make_world(tmp_path / 'run')
    with pytest.raises(InputError) as error: run_data(run, benchmarks=[text.format(tmp=tmp_path)])
    for part in says: assert part in str(error.value)


def test_names_and_folders():
    assert named('fi:/data/FI') == ('fi', None, Path('/data/FI')) and named('FI/polarity:/a:b') == ('fi', 'polarity', Path('/a:b'))
    assert named('/data/own') == ('posts', None, Path('/data/own')) and named('~/x')[2] == Path.home() / 'x'
    assert user_folders({'posts': '', 'benchmarks': []}) == []
    assert user_folders({'posts': 'tumemo:/a', 'benchmarks': ['fi:/b']}) == [Path('/a'), Path('/b')]


def test_a_wrong_table_leaves_nothing_half_written(tmp_path):
    run = make_world(tmp_path / 'run')
    before = run_data(run, image_size=4)
    record = (before / 'stage.json').read_text()
    with pytest.raises(InputError, match='nowhere'): run_data(run, posts=str(tmp_path / 'nowhere'), image_size=4)
    assert (run / 'data/stage.json').read_text() == record and json.loads(record)['result']['posts'] == 60
    assert sorted(p.name for p in run.iterdir()) == ['data', 'pictures', 'world']


def test_rows_come_in_the_order_of_the_posts(tmp_path):
    table = pd.DataFrame({'id': ['b', 'c', 'a'], 'x': ['1', '2', '3']}, index=[2, 3, 4])
    assert in_post_order('x.csv', table, ['a', 'b', 'c'], 'Mend.')['x'].tolist() == ['3', '1', '2']
    with pytest.raises(InputError, match='x.csv: no row for id d .*1 of 2.* Mend'): in_post_order('x.csv', table, ['a', 'd'], 'Mend.')
    with pytest.raises(InputError, match='row 2 .id b.*Mend'): in_post_order('x.csv', table, ['a', 'c'], 'Mend.')
    assert in_post_order('x.csv', table, ['c'], 'Mend.', surplus=True)['x'].tolist() == ['2']


MINI = test_datasets.MINI


@pytest.mark.parametrize('name, task, make, n, counts, split', MINI, ids=[f'{i}-{m[0]}' for i, m in enumerate(MINI)])
def test_every_miniature_is_checked(tmp_path, name, task, make, n, counts, split):
    root = make(tmp_path) or tmp_path
    found = check(name, root, task)
    page = '\n'.join(found['lines'])
    assert f'{name} at {root}: {n:,} rows, {n:,} can be used.' in page and page.count('→') == len(found['findings'])
    assert (f'Published: {PUBLISHED[name][0]:,}' if name in PUBLISHED else 'No published count') in page
    if isinstance(counts, dict) and name != 'emotic':
        for label, number in counts.items():
            assert any(line.split()[:1] == label[:17].split()[:1] and str(number) == str(sum(
                int(word) for word in line.split() if word.isdigit())) for line in found['lines']), (label, page)
    found['sheet'].canvas.draw()


def small(label, i):
    picture = TILES[i].copy()
    picture.paste('red' if label == 'joy' else 'blue', (0, 0, 30, 20))
    return picture


def folders(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        small(Path(name).parent.name, i).save(root / name)
    return root


NAMES = [f'{split}/{label}/{i}.png' for split, n in (('train', 4), ('val', 1), ('test', 2)) for label in ('joy', 'grief') for i in range(n)]


def test_a_clean_folder_has_no_findings(tmp_path, capsys, monkeypatch):
    folders(tmp_path / 'data', NAMES)
    monkeypatch.chdir(tmp_path)
    assert main(['check', 'folder', 'data']) == 0
    out = capsys.readouterr().out
    assert 'Nothing to do.' in out and 'No picture comes twice.' in out and Image.open('folder-check.png').size[0] > 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ['data', 'folder-check.png']  # the cache was temporary


def test_a_dirty_folder_is_told_what_to_do(tmp_path, capsys):
    root = folders(tmp_path / 'data', NAMES)
    (root / 'train/joy/0.png').write_text('<html>')
    (root / 'train/joy/1.png').write_bytes(b'')
    (root / 'val/joy/gone.png').symlink_to('nowhere.png')
    small('grief', 13).resize((100, 70)).save(root / 'train/grief/again.jpg', quality=80)  # test/grief/1.png
    for i in range(6): Image.new('RGB', (30, 30), 'grey').save(root / f'train/grief/gone {i}.png')
    own = own_posts(tmp_path / 'own', {'a': small('joy', 10), 'b': TILES[14], 'c': TILES[15]})
    assert main(['check', 'folder', str(root), '--posts', f'posts:{own}', '--out', str(tmp_path / 'out')]) == 1
    out = capsys.readouterr().out
    for part in ('22 rows, 19 can be used', 'left out, not an image: 1\n   train/joy/0.png', 'left out, zero bytes: 1',
                 'left out, no image: 1', 'pictures in two splits: 1; names in test: 1', 'train/grief/again.jpg', 'near',
                 'pictures under five names or more: 1',
                 'gone 0.png: 6 times', 'posts whose picture is a test picture: 1 of 3', 'post a = test/joy/0.png, exact', 'Findings: 6.'):
        assert part in out, (part, out)
    assert (tmp_path / 'out/folder-check.png').exists() and list((tmp_path / 'out/pictures').glob('*.npy'))


def test_two_people_in_a_picture_are_no_duplicates(tmp_path):
    test_datasets.emotic_csv(tmp_path)
    for i, path in enumerate(sorted(tmp_path.rglob('*.jpg'))): TILES[i].save(path)
    assert 'No picture comes twice.' in check('emotic', tmp_path)['lines']


def test_an_incomplete_download_is_found(tmp_path):
    test_datasets.artphoto(tmp_path)
    assert ('rows: 24; published: 806', '', 'Is the download complete, and is it this set?') in check('artphoto', tmp_path)['findings']


def test_the_command_says_what_is_wrong(tmp_path):
    def run(*args): return subprocess.run([sys.executable, '-m', 'pacl.parts.data', *args], capture_output=True, text=True, cwd=tmp_path, env=env)
    env = os.environ | {'PYTHONPATH': str(Path(__file__).parents[1])}
    ended = run('check', 'folder', str(tmp_path / 'nowhere'))
    assert ended.returncode == 2 and 'nowhere is not a folder' in ended.stderr and 'Traceback' not in ended.stderr
    assert 'Example: python -m pacl.parts.data check' in run('--help').stdout


def test_histogram_counts_in_each_split():
    table = pd.DataFrame({'split': ['train', 'train', 'test'], 'label': ['a', 'b', 'b'], 'x': [1, 0, 1], 'y': [1, 1, 1],
                          'valence': [1., 2, 4]})
    assert [line.split()[1:3] for line in histogram(table, single(['a', 'b']))[3:]] == [['1', '0'], ['1', '1']]
    assert [line.split()[1:3] for line in histogram(table, Task('multi-label', ('x', 'y'), (('x', 'y'),)))[2:]] == [['1', '1'], ['2', '1']]
    line = histogram(table, Task('regression', ('valence',), ranges=((1, 9),)))[2]
    assert 'from 1.00 to 4.00, half of them in 1.50–3.00, median 2.00' in line


def test_any_text_comes_back_as_it_was(tmp_path):
    texts = ['plain', 'a\rb', 'c\r\nd\ne', 'e "q", f', '\u202eabc', '😂', 'http://a.b', 'x' * 10_000, ' lead ', 'None']
    rows = pd.DataFrame({'id': [f'{i:03}' for i in range(len(texts))], 'image': [f'{i}.png' for i in range(len(texts))], 'text': texts})
    (tmp_path / 'own').mkdir()
    for i, name in enumerate(rows['image']): Image.effect_noise((32, 32), 40 + 5 * i).save(tmp_path / 'own' / name)
    rows.to_csv(tmp_path / 'own/posts.csv', index=False, quoting=1)
    with write_stage(tmp_path / 'run/world', {'stage': 'world'}): pass
    run_data(tmp_path / 'run', posts=str(tmp_path / 'own'), image_size=16)
    assert load_set(tmp_path / 'run', 'posts')[0]['text'].tolist() == texts
