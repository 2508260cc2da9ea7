"pacl.parts.data: what a run reads, what it leaves out, what leaks, and the page that the check prints."
import os

import numpy as np
import pandas as pd
import pytest
import test_readers
from PIL import Image
from test_pictures import TILES

from pacl.app.pipeline import command_line
from pacl.parts.data import check, load_set, load_tasks, run_data
from pacl.parts.stages import InputError, read_record, write_stage

COLOURS = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255)}


def make_world(run, posts=60, bad=()):
    "A world of flat pictures: the colour is the object, its brightness the feeling; half of the texts say another, half feel otherwise."
    with write_stage(run / 'world', {}) as world:
        i = np.arange(posts)
        bright, factual, emotional = i // 3 % 2, i // 6 % 2, i // 12 % 2
        glad = np.where(emotional, bright, 1 - bright)
        objects, emotions = np.array([*COLOURS]), np.array(['fear', 'awe'])
        truth = pd.DataFrame({
            'id': [f'{n:04}' for n in i], 'object': objects[i % 3], 'emotion': emotions[bright],
            'text_object': objects[(i + 1 - factual) % 3], 'text_emotion': emotions[glad],
            'factual': factual > 0, 'emotional': emotional > 0,
            'partition': np.array(['weak', 'emotional', 'factual', 'strong'])[2 * factual + emotional]})
        truth.to_csv(world / 'truth.csv', index=False)
        texts = truth['text_object'] + np.array([' grief', ' joy'])[glad]
        table = pd.DataFrame({'id': truth['id'], 'image': 'images/' + truth['id'] + '.png', 'text': texts})
        (world / 'posts/images').mkdir(parents=True)
        table.to_csv(world / 'posts/posts.csv', index=False)
        for name, seen, light in zip(table['image'], truth['object'], bright):
            Image.new('RGB', (10, 8), tuple(c if light else c // 4 for c in COLOURS[seen])).save(world / 'posts' / name)
        for n in bad: (world / 'posts' / table['image'][n]).write_bytes(b'')
        feelings = ['awe', 'fear'] * 2
        labelled = pd.DataFrame({
            'id': ['0000', '0001', '0002', '0003'], 'image': ['0.png', '1.png', '2.png', '3.png'],
            'split': ['train', 'val', 'test', 'test'], 'label': feelings,
            'object': ['red', 'green'] * 2, 'level_1': ['positive', 'negative'] * 2, 'level_2': feelings,
            'labels': ['awe|fear', 'awe'] * 2, 'valence': [0, .125, .25, .375]})
        for name, columns in {'new': 'label object level_1 level_2', 'seen': 'label object', 'mixed': 'labels valence'}.items():
            (world / name).mkdir()
            for i in range(4): Image.new('RGB', (8, 8), (200, 10 * i, 99)).save(world / name / f'{i}.png')
            labelled[['id', 'image', 'split', *columns.split()]].to_csv(world / name / 'labels.csv', index=False)
    return run


def rejected(run):
    table = pd.read_csv(run / 'data/rejected.csv', dtype=str, keep_default_na=False)
    return table.to_numpy().tolist()


def test_a_world_becomes_sets_and_tasks(tmp_path):
    run = make_world(tmp_path / 'my runs', bad=[5, 33])
    out = run_data(run, image_size=6)
    table, images = load_set(run, 'posts')
    assert len(table) == 58 and images.shape == (58, 6, 6, 3) and table['id'][5] == '0006' and 'missing' not in table
    assert (images[5] == (63, 0, 0)).all()
    assert rejected(run) == [['posts', id, f'images/{id}.png', 'zero bytes'] for id in ('0005', '0033')]
    assert read_record(out)['result'] == {'posts': 58, 'new': 4, 'seen': 4, 'mixed': 4, 'leaked': 0, 'rejected': 2}
    assert run_data.stale(run, image_size=6) is None and 'image_size' in run_data.stale(run, image_size=8)
    tasks = load_tasks(run)
    assert [*tasks] == ['new', 'seen', 'mixed'] and [*tasks['new']] == ['label', 'object', 'levels']
    mixed = load_set(run, 'mixed')[0]
    assert tasks['mixed']['labels'].targets(mixed).tolist() == [[1, 1], [1, 0], [1, 1], [1, 0]]
    assert tasks['mixed']['vad'].targets(mixed).ravel().tolist() == [0, .125, .25, .375]


def test_pixels_are_stored_once_and_mended_when_edited(tmp_path):
    run = make_world(tmp_path)
    run_data(run, image_size=4)
    array = run / 'data/posts.npy'
    assert array.stat().st_nlink == 2
    before = array.read_bytes()
    with open(array, 'r+b') as file: file.write(b'edited')  # the same file as the cache's
    run_data(run, image_size=4)
    assert array.read_bytes() == before


TEXTS = {  # id → bytes of the text, which comes back as it is, or the reason that it does not
    '01': (b'', 'no text'), '02': ('\u2003 \t'.encode(), 'no text'), '03': ('😀🎉'.encode(), ''), '04': (b'https://t.co/x', ''),
    '05': (b'long ' * 40_000, ''), '06': ('مرحبا بالعالم'.encode(), ''), '07': (b'caf\xe9', 'text is not UTF-8'),
    '08': (b'""quoted"", and\r\na new line\rold Mac', ''), '09': (b'NULL', ''), '10': ('\ufeffbom'.encode(), ''),
    '11': (b"=1+1;\t'", ''), '12': (b' lead ', ''), '13': ('\u202ee\u0301'.encode(), '')}


def test_every_kind_of_text(tmp_path):
    make_world(tmp_path, posts=6)
    lines = '\ufeffid,image,text\r\n'.encode()
    for key, (text, _) in TEXTS.items(): lines += f'{key},{key} ü.png,'.encode() + b'"' + text + b'"\r\n'
    for key in TEXTS: Image.new('RGB', (4, 4), (int(key), 0, 0)).save(tmp_path / f'{key} ü.png')
    (tmp_path / 'posts.csv').write_bytes(lines)
    run_data(tmp_path, posts=str(tmp_path), image_size=4)
    table, images = load_set(tmp_path, 'posts')
    for id, text, pixel in zip(table['id'], table['text'], images[:, 0, 0, 0]):
        assert TEXTS[id] == (text.replace('"', '""').encode(), '') and pixel == int(id)
    assert len(table) == 10 and all(TEXTS[id][1] == reason for _, id, _, reason in rejected(tmp_path))


def own_posts(folder, pictures):
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        if picture: picture.save(folder / f'{name}.png')
    table = pd.DataFrame({'id': pictures.keys(), 'text': 'so it goes'})
    table.assign(image=table['id'] + '.png').to_csv(folder / 'posts.csv', index=False)
    return folder


def make_posts(root): return make_world(root, 6) / 'world/posts'


def own_benchmark(folder, columns='id image split label'):
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for i, split in enumerate(['train'] * 4 + ['val'] * 2 + ['test'] * 3):
        TILES[i].save(folder / f'{i}.png')
        rows.append({'id': f'{split}-{i}', 'image': f'{i}.png', 'split': split, 'label': ('awe', 'fear')[i % 2]})
    pd.DataFrame(rows).to_csv(folder / 'labels.csv', index=False, columns=columns.split())
    return folder


def test_posts_that_leak_are_left_out(tmp_path):
    run, moods = tmp_path / 'run', own_benchmark(tmp_path / 'moods')
    smaller = TILES[6].resize((90, 60))
    own = own_posts(tmp_path / 'own', {'a': smaller, 'b': TILES[0], 'c': TILES[10], 'd': TILES[8], 'e': None})
    given = dict(posts=f'posts:{own}', benchmarks=[f'csv:{moods}', f'csv/label:{moods}', f'csv:{moods}'], image_size=48)
    result = read_record(run_data(run, **given))['result']
    assert result == {'posts': 2, 'csv': 9, 'csv-label': 9, 'csv-3': 9, 'leaked': 2, 'rejected': 3}
    table, images = load_set(run, 'posts')
    assert table['id'].tolist() == ['b', 'c']
    np.testing.assert_array_equal(images[1], np.asarray(TILES[10].resize((48, 48), Image.Resampling.BICUBIC)))
    assert [(id, reason) for _, id, _, reason in rejected(run)] == [
        ('a', 'also a test picture of csv (id test-6, near)'), ('d', 'also a test picture of csv (id test-8, exact)'), ('e', 'no image')]
    os.utime(moods / '5.png', (1, 1))
    assert run_data.stale(run, **given) == f'{moods} changed'
    drawn = own_benchmark(tmp_path / 'drawn', 'id image label')
    run_data(run, **given | dict(benchmarks=[f'csv:{drawn}', f'csv/label:{moods}'], shares=[1, 1, 1]))
    assert {name: task.drawn for name, tasks in load_tasks(run).items() for task in tasks.values()} == {'csv': True, 'csv-label': False}
    assert load_set(run, 'csv')[0]['split'].value_counts().to_dict() == {'train': 3, 'val': 3, 'test': 3}
    own_posts(own, {'a': TILES[6]})
    with pytest.raises(InputError, match='All posts are pictures'): run_data(run, **given)


@pytest.mark.parametrize('given, says', [
    ('shares [8,2]', 'shares: .* not three whole numbers'),
    ('benchmarks emoset6:/data', 'no data set "emoset6"; nearest valid: emoset'), ('benchmarks /data/FI', '"/data/FI" names no reader'),
    ('benchmarks csv/x:{moods}', 'no column x with two values'), ('benchmarks fi:{moods}/none', 'none is not a folder'),
    ('posts {moods}/none', 'none is not a folder'), ('posts csv:{moods}', 'pictures without texts')])
def test_what_stops_a_run_is_named_and_the_old_data_stay(tmp_path, given, says):
    run, moods = make_world(tmp_path / 'run', posts=6), own_benchmark(tmp_path / 'moods')
    before = (run_data(run, image_size=4) / 'stage.json').read_text()
    name, value = given.format(moods=moods).split(' ')
    with pytest.raises(InputError, match=says): run_data(run, **{name: value if name == 'posts' else [value]})
    assert (run / 'data/stage.json').read_text() == before
    assert sorted(os.listdir(run)) == ['data', 'pictures', 'world']


@pytest.mark.parametrize('mini', [*test_readers.MINI, ('posts', None, make_posts, 6)], ids=lambda mini: mini[0])
def test_every_layout_is_checked(tmp_path, mini):
    name, task, make, n, *_ = mini
    root = make(tmp_path) or tmp_path
    page, findings = check(name, root, task, tmp_path / 'cache')
    assert f'{name} at {root}: {n:,} rows, {n:,} can be used.' in page and page.count('→') == findings


def in_folders(root, n_of_split):
    names = [f'{split}/{label}/{i}.png' for split, n in n_of_split.items() for label in ('joy', 'grief') for i in range(n)]
    for name, tile in zip(names, TILES):
        picture = tile.copy()
        picture.paste('red' if 'joy' in name else 'blue', (0, 0, 30, 20))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / name)
    return root


def test_a_dirty_folder_is_told_what_to_do(tmp_path, capsys):
    root = in_folders(tmp_path / 'data', {'train': 4, 'val': 1, 'test': 1})
    test = Image.open(root / 'test/grief/0.png')
    (root / 'train/joy/0.png').write_text('<html>')
    (root / 'train/joy/1.png').write_bytes(b'')
    test.resize((100, 70)).save(root / 'train/grief/again.jpg', quality=80)
    for i in range(6): Image.new('RGB', (30, 30), 'grey').save(root / f'train/grief/gone {i}.png')
    assert command_line(f'check folder {root}'.split()) == 1
    out = capsys.readouterr().out
    for part in ('19 rows, 17 can be used', 'left out, not an image: 1\n   train/joy/0.png', 'left out, zero bytes: 1',
                 'pictures in two splits: 1\n   train/grief/again.jpg: also a test picture of folder (id test/grief/0.png, near)',
                 'Findings: 3\n'):
        assert part in out
    assert [line.split()[1:] for line in out.splitlines() if line.startswith(('joy', 'grief'))] == [['1', '11', '1'], ['1', '2', '1']]
