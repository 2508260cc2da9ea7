"Each set in its owners' layout, in miniature: what is read, what is refused, and a split that is the same everywhere."
import io
import json
import pickle
import tarfile
from dataclasses import asdict
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from pacl.parts.readers import (
    EMOTIC, MIKELS, PANDA, VAD, WEBEMO, Task, benchmark, draw_split, folds_of, parse_source, posts, read_rows,
    read_table, single, strata_of,
)
from pacl.parts.stages import InputError

buffer = io.BytesIO()
Image.new('RGB', (2, 2), 'red').save(buffer, 'png')
PICTURE = buffer.getvalue()


def write(root, name, content):
    path = Path(root) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def pictures(root, *names):
    for name in names: write(root, name, PICTURE)


def many(root, pattern, n=20):
    pictures(root, *(pattern.format(i) for i in range(n)))


def lines(row, n=20, head='', end='\n'):
    return head + ''.join(row(i) + end for i in range(n))


def tumemo(root):
    words = ['Angry', 'Bored', 'Calm', 'Fear', 'Happy', 'Love', 'Sad']
    write(root, 'all_data_id_and_label.txt', lines(lambda i: f'{i} {words[i % 7]}', 14, 'ID label\n'))
    many(root, 'all_data/{}.jpg', 14)
    for i in range(14): write(root, f'all_data/{i}.txt', f'post {i}')


def fi(root):
    for label in MIKELS: many(root, f'emotion_dataset/{label}/{label}_{{}}.jpg', 3)


def fi_wscnet(root):
    for label in MIKELS:
        for split, n in (('train', 3), ('val', 1), ('test', 1)): many(root, f'FI/{split}/{label}/{{}}.jpg', n)


def panda(root):
    for label in PANDA:
        for deeper in ('a/joy', 'b/two words'): many(root, f'images/{label}/{deeper}/{{}}.jpg', 2)


def webemo(root):
    for split, n in (('train', 50), ('test', 25)):
        write(root, f'{split}25.txt', lines(lambda i: f'https://as2.ftcdn.net/jpg/00/220_F_{split}{i}_x.jpg {i % 25}', n))
        many(root, f'{split}/220_F_{split}{{}}_x.jpg', n)


def person(split, box, words, ratings):
    words = np.array([*words, None], object)[:-1]
    ratings = dict(zip(VAD, map(float, ratings)))
    if split == 'train': said = {'annotations_categories': {'categories': words}, 'annotations_continuous': ratings}
    else: said = {'combined_categories': words, 'combined_continuous': ratings}
    return {'body_bbox': np.array(box, float), **said}


def emotic(root, word='Fear', change=lambda content: content):
    content, box = {}, [1, 2, 30, 40]
    for split in ('train', 'val', 'test'):
        people = [person(split, box, [word, 'Pain'], [2, 8, 3]), person(split, [-4, 2, 9, 9], ['Peace'], [7, 2, 6]),
                  person(split, box, ['Peace'], [np.nan, 1, 1]), person(split, box, [], [5, 5, 5])]
        content[split] = [{'filename': f'{split}.jpg', 'folder': 'mscoco/images', 'person': people},
                          {'filename': f'{split}2.jpg', 'folder': 'mscoco/images', 'person': people[0]}]
        pictures(root, f'emotic/mscoco/images/{split}.jpg', f'emotic/mscoco/images/{split}2.jpg')
    write(root, 'Annotations/Annotations.mat', '')
    savemat(root / 'Annotations/Annotations.mat', change(content))


def iaps(root):
    rows = lines(lambda i: f'Thing\t{1000 + i}\t{2 + i % 6}.50\t{4 + i % 3}.25\t{5 if i % 2 else "."}\t{"." if i % 2 else 6}', end='\r\n')
    more = '"Snake\t1000\t3.50\t5.25\t.\t5\r\nWeb\t6570.1\t2.19\t6.24\t.\t.\r\n'
    head = 'The ratings of all subjects,\r\nsets 1 to 20\r\n\r\ndesc\tIAPS\tvalmn\taromn\tdom1mn\tdom2mn\r\n'
    write(root, 'Tech Report/AllSubjects_1-20.txt', head + rows + more)
    many(root, 'IAPS 1-20 Images/10{:02}.JPG')


def emoset(root, fields=lambda e, name: [e, name, f'image/{e}/{name}.jpg', f'annotation/{e}/{name}.json']):
    for split, places in (('train', (0, 1)), ('val', (2,)), ('test', (3,))):
        entries = [fields(e, f'{e}_{i:05}') for e in MIKELS for i in places]
        write(root, f'{split}.json', json.dumps(entries))
    for e in MIKELS: many(root, f'image/{e}/{e}_{{:05}}.jpg', 4)


def oasis(root):
    text = lines(lambda i: f'I{i},Red {i // 2} {i % 2}{" " * (i < 3)},Pixabay,{1.5 + i % 5},{2 + i % 3}.25', 40,
                 ',Theme,Source,Valence_mean,Arousal_mean\r', '\r')
    write(root, 'OASIS.csv', text)
    for i in range(2): many(root, f'images/Red {{}} {i}.jpg')


def mvsa(root):
    votes = ['positive,positive', 'neutral,negative', 'positive,negative', 'neutral, neutral', 'positive,neutral']
    write(root, 'labelResultAll.txt', lines(lambda i: f'{i}\t{votes[i % 5]}', 15, 'ID\ttext,image\n'))
    many(root, 'data/{}.jpg', 15)
    for i in range(15): write(root, f'data/{i}.txt', f'RT @you: post {i}\n')


def folders(root):
    for label in ('calm sea', 'Übermut'): many(root, f'my classes/{label}/{{}}.png', 10)
    pictures(root, 'logo.png')
    return root / 'my classes'


def table(root, head='image,label', row=lambda i: f'{i}.png,{"calm" if i % 2 else "fear"}', n=20, name='labels.csv'):
    write(root, name, lines(row, n, f'{head}\n'))
    many(root, '{}.png', n)


def shard(root, name, members):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / name, 'w') as tar:
        for member, content in members:
            info = tarfile.TarInfo(member)
            content = content if isinstance(content, bytes) else content.encode()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


MINI = [  # name, task, maker, rows, counts of the last label column, or means of the ratings, counts of train, val, test
    ('tumemo', None, tumemo, 14, dict.fromkeys('love happy calm bored sad angry fear'.split(), 2), (12, 1, 1)),
    ('fi', None, fi, 24, dict.fromkeys(MIKELS, 3), (20, 2, 2)),
    ('fi', None, fi_wscnet, 40, dict.fromkeys(MIKELS, 5), (24, 8, 8)),
    ('emotion-6', None, panda, 24, dict.fromkeys(PANDA, 4), (20, 2, 2)),
    ('webemo', None, webemo, 75, dict.fromkeys(WEBEMO, 3), (45, 5, 25)),
    ('emotic', None, emotic, 9, {0: 9}, (3, 3, 3)),
    ('emotic', 'vad', emotic, 9, (11 / 3, 6, 4), (3, 3, 3)),
    ('iaps', None, iaps, 20, (4.825, 5.225, 5.475), (17, 1, 2)),
    ('emoset', None, emoset, 32, dict.fromkeys(MIKELS, 4), (16, 8, 8)),
    ('emoset', None, lambda root: emoset(root, lambda e, n: [e, f'a/{n}.json', f'image/{e}/{n}.jpg']), 32,
     dict.fromkeys(MIKELS, 4), (16, 8, 8)),
    ('oasis', None, oasis, 40, (3.5, 3.225), (32, 4, 4)),
    ('mvsa-single', None, mvsa, 12, dict(positive=6, negative=3, neutral=3), (10, 1, 1)),
    ('folder', None, folders, 20, {'calm sea': 10, 'Übermut': 10}, (16, 2, 2)),
    ('csv', None, table, 20, dict(calm=10, fear=10), (16, 2, 2)),
    ('csv', 'felt by whom?', lambda root: table(root, 'image,felt by whom?'), 20, dict(calm=10, fear=10), (16, 2, 2)),
    ('csv', 'a/b é', lambda root: table(root, normalize('NFD', 'image,a/b é')), 20, dict(calm=10, fear=10), (16, 2, 2)),
]


@pytest.mark.parametrize('name, task, make, n, counts, split', MINI, ids=lambda value: str(value)[:12])
def test_every_set_is_read(tmp_path, name, task, make, n, counts, split):
    root = make(tmp_path) or tmp_path
    rows, about = benchmark(name, root, task)
    assert len(rows) == n and rows['id'].is_unique and rows['missing'].eq('').all()
    assert all((root / image).is_file() for image in rows['image'])
    assert tuple(rows['split'].value_counts().reindex(['train', 'val', 'test'])) == split
    if isinstance(counts, dict): assert rows[about.columns[-1]].value_counts().to_dict() == counts
    else: np.testing.assert_allclose(about.targets(rows).mean(0), counts, rtol=1e-6)
    if 'group' in rows: assert rows.groupby('group')['split'].nunique().eq(1).all()


def test_label_indices_are_those_of_the_release(tmp_path):
    assert ' '.join(MIKELS) == 'excitement amusement awe contentment sadness disgust anger fear'
    webemo(tmp_path)
    rows, task = benchmark('webemo', tmp_path)
    assert task.sizes == [2, 7, 25] and ' '.join(task.classes[1]) == 'love joy surprise confusion sadness anger fear'
    assert task.targets(rows)[[2, 17, 19, 22]].tolist() == [[1, 3, 2], [1, 5, 17], [1, 4, 19], [0, 2, 22]]


def test_people_share_a_picture_and_ratings_a_mean(tmp_path):
    for make in (emotic, iaps): make(tmp_path)
    row = benchmark('emotic', tmp_path)[0].set_index('id').loc['mscoco/images/train.jpg#2']
    assert row[[*VAD, 'Peace', 'Fear']].tolist() == [7, 2, 6, 1, 0] and len(EMOTIC) == 26
    rows = benchmark('iaps', tmp_path)[0].set_index('id')
    assert rows.loc[['1000', '1001', '1002'], list(VAD)].to_numpy().tolist() == [[3.0, 4.75, 5.5], [3.5, 5.25, 5], [4.5, 6.25, 6]]


def test_posts_have_texts(tmp_path):
    tumemo(tmp_path)
    for name, raw in (('3', 'caf\u00e9 \u2615\n'.encode('utf-8-sig')), ('4', b'caf\xe9 \x93quoted\x94'), ('5', b' \n')):
        write(tmp_path, f'all_data/{name}.txt', raw)
    for name in ('6.txt', '7.jpg'): (tmp_path / 'all_data' / name).unlink()
    rows, task = posts('TumEmo', tmp_path)
    assert rows['text'][3:7].tolist() == ['caf\u00e9 \u2615', 'caf\u00e9 \u201cquoted\u201d', '', '']
    assert rows['missing'][3:8].tolist() == ['', '', 'no text', 'no text', 'no image'] and task.classes[0][0] == 'love'


def test_shards_are_read_in_place(tmp_path):
    members = {'./deep/a.txt': 'caf\u00e9\n', './deep/a.JPG': PICTURE, 'b.TXT': 'large', 'b.png': PICTURE, 'b.cls': '3',
               'c.jpg': PICTURE, 'd.txt': 'no picture', 'e.txt': b'caf\xe9', 'e.jpg': PICTURE,
               '._b.jpg': 'mac', 'i.txt': 'text', 'i.webp': PICTURE, 'n.jpg': PICTURE, 'n.png': 'a second'}
    shard(tmp_path, 'other disk/1.tar', members.items())
    (tmp_path / 'root').mkdir()
    (tmp_path / 'root/shard 1.tar').symlink_to(tmp_path / 'other disk/1.tar')
    rows, _ = posts('webdataset', tmp_path / 'root')
    texts = {'deep/a': 'caf\u00e9\n', 'b': 'large', 'c': '', 'e': 'caf?', 'i': 'text', 'n': ''}
    assert dict(zip(rows['id'], rows['text'])) == texts and rows['image'][0] == 'shard 1.tar/deep/a.JPG'
    assert rows['id'][rows['missing'] == 'text is not UTF-8'].tolist() == ['e']
    content = (tmp_path / 'other disk/1.tar').read_bytes()
    assert all(content[at:at + n] == PICTURE for at, n in zip(rows['offset'], rows['bytes']))


@given(st.data())
def test_a_shard_cut_anywhere_is_named(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp('cut')
    shard(folder, 'a.tar', [(f'{i}.{kind}', PICTURE * 9) for i in range(2) for kind in ('txt', 'jpg')])
    content = (folder / 'a.tar').read_bytes()
    end = len(content.rstrip(b'\0')) // 512 * 512
    write(folder, 'a.tar', content[:data.draw(st.integers(0, end) | st.integers(0, end // 512).map(lambda i: i * 512))])
    with pytest.raises(InputError, match='a.tar: .*copy it again'): posts('webdataset', folder)


@pytest.mark.parametrize('columns, rows, kind, targets', [
    ('labels', ['joy | awe', '', 'awe'], 'multi-label', [[1, 1], [0, 0], [1, 0]]),
    ('level_1,level_2', ['good,joy', 'bad,fear', 'good,awe'], 'hierarchical', [[1, 2], [0, 1], [1, 0]]),
    ('valence,arousal', ['1,2', '3,1.5', '-2,0'], 'regression', [[1, 2], [3, 1.5], [-2, 0]]),
    ('label', ['b', 'a', 'b'], 'single-label', [[1], [0], [1]]),
])
def test_ones_own_table_has_any_task(tmp_path, columns, rows, kind, targets):
    table(tmp_path, f'image,{columns}', lambda i: f'{i}.png,{rows[i]}', 3)
    found, task = benchmark('csv', tmp_path)
    again = Task(**json.loads(json.dumps(asdict(task))))
    assert json.dumps(asdict(again)) == json.dumps(asdict(task)) and task.kind == kind
    found.to_csv(tmp_path / 'kept.csv', index=False)  # as the data stage keeps it: all text
    assert again.targets(read_table(tmp_path / 'kept.csv', ['id'])).tolist() == task.targets(found).tolist() == targets


def test_a_column_called_valence_holds_ratings(tmp_path):
    table(tmp_path, 'image,valence', lambda i: f'{i}.png,{i}', 3)
    assert benchmark('csv', tmp_path, 'valence')[1] == Task('regression', ('valence',))


def broken(maker, name, old, new):
    def make(root):
        root = maker(root) or root
        content = (root / name).read_bytes()
        assert old.encode() in content
        write(root, name, content.replace(old.encode(), new if isinstance(new, bytes) else new.encode(), 1))
        return root
    return make


def two(root, first, second):
    "Two sets side by side, whose pictures have the same names and differ."
    for name, make in ((first, mvsa), (second, fi)): make(root / name)
    many(root / second, 'data/{}.jpg', 15)
    write(root, f'{second}/data/3.jpg', PICTURE + b'!')


def two_classes(root):
    webemo(root)
    pictures(root, 'joy/220_F_train1_x.jpg')
    write(root, 'fear/220_F_train1_x.jpg', PICTURE + b'!')


class Bomb:
    def __reduce__(self): return exec, ('open("exploded", "w")',)


LABELS, IAPS = 'all_data_id_and_label.txt', 'Tech Report/AllSubjects_1-20.txt'
MALFORMED = [  # name, task, maker, what the message says
    ('tumemo', None, broken(tumemo, LABELS, '5 Love', '5 Lowe'), [f'{LABELS}, row 7 (id 5)', 'label is "lowe"', 'love, happy']),
    ('tumemo', None, broken(tumemo, LABELS, '5 Love', '4 Love'), ['row 7 (id 4)', 'an id that no row above has', '1 of 14']),
    ('tumemo', None, broken(tumemo, LABELS, '5 Love', b'5 \xff'), ['row 7: not UTF-8']),
    ('emotion-6', None, fi, ['no folder above it is a class', 'anger']),
    ('webemo', None, broken(webemo, 'test25.txt', 'test3_x.jpg 3', 'test3_x.jpg 33'), ['test25.txt, row 4', 'index is "33"']),
    ('webemo', None, two_classes, ['"220_F_train1_x.jpg" may be', 'fear/220_F_train1_x.jpg', 'differ']),
    ('emotic', None, lambda root: emotic(root, 'Angry'), ['Annotations.mat, train, entry 1', 'Angry']),
    ('emotic', None, lambda root: emotic(root, change=lambda content: {'Annotations': 3}), ['.mat, train, entry 1', 'file of 2019']),
    ('emotic', None, lambda root: write(root, 'Annotations.mat', pickle.dumps(Bomb())), ['Annotations.mat', '-v7']),
    ('iaps', None, broken(iaps, IAPS, '\t1003\t5.50', '\t1003\t55.0'), ['row 8 (id 1003)', 'valence is "55.0"', '[1, 9]']),
    ('iaps', None, broken(iaps, IAPS, 'valmn', 'valence'), ['AllSubjects_1-20.txt', 'table of IAPS, valmn']),
    ('emoset', None, broken(emoset, 'val.json', '"image/awe', '"image/awe.png", "'), ['val.json', 'too many values', '[[emotion, image']),
    ('emoset', None, broken(emoset, 'test.json', '"awe",', '"aw",'), ['test.json, row 3 (id awe_00003)', 'label is "aw"']),
    ('oasis', None, broken(oasis, 'OASIS.csv', 'Pixabay,2.5', 'Pixabay,2;5'), ['row 3 (id I1)', 'valence is "2;5"']),
    ('oasis', None, broken(oasis, 'OASIS.csv', 'I2,Red', 'I2,"Red'), ['OASIS.csv', 'EOF inside string', 'quoted']),
    ('mvsa-single', None, lambda root: two(root, 'B', 'A') or write(root, 'C/labelResultAll.txt', ''), ['may be B/', 'or C/']),
    ('csv', None, lambda root: [table(root / name) for name in 'ab'], ['2 files labels.csv in it and below']),
    ('csv', None, lambda root: table(root, 'image,lable'), ['labels.csv: there is no column label with two values']),
    ('csv', None, broken(table, 'labels.csv', '3.png,calm', '3.png,'), ['row 5 (id 3.png)', 'label is ""']),
    ('csv', None, lambda root: table(root, 'image,label', lambda i: f'{i}.png,calm'), ['no column label with two values']),
    ('csv', 'vad', lambda root: table(root, 'image,valence', lambda i: f'{i}.png,{i if i else "inf"}'), ['valence is "inf"']),
    ('csv', None, lambda root: table(root, 'image,label,label', lambda i: f'{i}.png,1,2'), ['row 1: 2 columns "label"']),
    ('folder', None, lambda root: pictures(root, 'images/a.jpg'), ['no column label with two values or more; the columns are id, image']),
    ('folder', None, lambda root: pictures(root, 'train/a/1.jpg', 'val/b/1.jpg'), ['too few pictures', 'for test. Add']),
    ('webdataset', None, lambda root: shard(root, 'a.tar.gz', []) or write(root, 'a.tar.gz', b'\x1f\x8b'), ['a.tar.gz', 'plain .tar']),
    ('webdataset', None, lambda root: shard(root, 'a.tar', [('1.jpg', PICTURE), ('1.JPG', PICTURE)]), ['(id 1)', 'a.tar/1.JPG']),
    ('emosets', None, fi, ['no data set "emosets"; nearest valid: emoset']),
    ('emotic', 'vat', fi, ['emotic has no task "vat"; nearest valid: vad']),
    ('fi', None, lambda root: root / 'nowhere', ['nowhere is not a folder']),
]


@pytest.mark.parametrize('name, task, make, says', MALFORMED, ids=lambda value: str(value)[:40])
def test_a_malformed_file_is_named(tmp_path, monkeypatch, name, task, make, says):
    monkeypatch.chdir(tmp_path)
    root = make(tmp_path)
    with pytest.raises(InputError) as error: benchmark(name, root if isinstance(root, Path) else tmp_path, task)
    for part in says: assert part in str(error.value), str(error.value)
    assert not Path('exploded').exists()


def test_another_sets_pictures_are_not_taken(tmp_path):
    two(tmp_path, 'MVSA_Single', 'MVSA_multiple')
    (tmp_path / 'MVSA_Single/data/4.jpg').unlink()
    rows, _ = posts('mvsa-single', tmp_path)
    assert rows['image'].str.startswith('MVSA_Single/data/').sum() == 11 and rows.set_index('id')['missing']['4'] == 'no image'


def test_paths_of_every_kind(tmp_path):
    root, decomposed = tmp_path / 'the root', normalize('NFD', 'Zo\u00eb.png')
    pictures(root, 'in/a b.PNG', f'in/{decomposed}', 'in/deep/c.jpg', 'c.jpg', 'x/d.jpeg', 'elsewhere/e.png', '../secret.png', 'x/t.heic',
             *(f'{litter}/c.jpg' for litter in ('__MACOSX', '.hidden', '@eaDir', 'x/@EADIR', '#recycle')), 'x/._d.jpeg')
    (root / 'in/loop').symlink_to(root)
    names = {'in/a b.png': 'in/a b.PNG', 'in/Zo\u00eb.png': f'in/{decomposed}', 'c.jpg': 'c.jpg', 'deep/c.jpg': 'in/deep/c.jpg',
             'in\\a b.PNG': 'in/a b.PNG', './in/../c.jpg': 'c.jpg', 'd': 'x/d.jpeg', 't.heic': 'x/t.heic', 'no/c.jpg': None,
             '../secret.png': None, f'{tmp_path}/secret.png': None, 'f.png': None, '': None}
    write(root, 'labels.csv', 'id,image,label\n' + ''.join(f'{i},{name},{"ab"[i % 2]}\n' for i, name in enumerate(names)))
    rows, _ = benchmark('csv', root)
    assert [image if why != 'no image' else None for image, why in zip(rows['image'], rows['missing'])] == list(names.values())
    assert rows['missing'][7] == '.heic is not read'


@pytest.mark.parametrize('text, source', [
    ('fi:/data/FI', ('fi', None, '/data/FI')), ('FI/polarity:/a:b', ('fi', 'polarity', '/a:b')),
    ('/data/own', ('posts', None, '/data/own')), ('csv/perceived emotion:data', ('csv', 'perceived emotion', 'data')),
    ('csv/a/b (é)?:x', ('csv', 'a/b (é)?', 'x')),
    ('C:/own', ('posts', None, 'C:/own')), ('fi:~/x', ('fi', None, '/home/own/x'))])
def test_sources(text, source, monkeypatch):
    monkeypatch.setenv('HOME', '/home/own')
    assert parse_source(text) == (*source[:2], Path(source[2]))
    with pytest.raises(InputError, match='no data set "fy"; nearest valid: fi'): parse_source('fy:/data')


def test_missing_pictures_keep_their_rows_and_the_split(tmp_path):
    webemo(tmp_path)
    whole, _ = benchmark('webemo', tmp_path)
    for image in whole['image'][::2]: (tmp_path / image).unlink()
    half, _ = benchmark('webemo', tmp_path)
    assert half['missing'].value_counts().to_dict() == {'no image': 38, '': 37} and half['split'].equals(whole['split'])


def test_the_split_file_decides(tmp_path):
    fi(tmp_path)
    rows, _ = benchmark('fi', tmp_path)
    rows['split'] = rows['split'].replace('val', 'train').mask(rows['id'] == 'awe/awe_0.jpg', 'val')
    rows.to_csv(tmp_path / 'split.csv', columns=['id', 'split'], index=False)
    edited, _ = benchmark('fi', tmp_path, 'label')
    assert edited['id'][edited['split'] == 'val'].tolist() == ['awe/awe_0.jpg']
    pictures(tmp_path, 'emotion_dataset/awe/new.jpg')
    with pytest.raises(InputError, match=r'id awe/new.jpg.*a row with this id \(1 of 25.*delete'): benchmark('fi', tmp_path)
    write(tmp_path, 'split.csv', 'id,split\na,dev\n')
    with pytest.raises(InputError, match='split is "dev"'): benchmark('fi', tmp_path)


def test_all_tasks_share_one_split_and_nothing_is_written(tmp_path):
    table(tmp_path, 'image,labels,scene', lambda i: f'{i}.png,{"joy|awe" if i % 3 else "fear"},{"ab"[i % 2]}')
    before = sorted(tmp_path.iterdir())
    first, second = (benchmark('csv', tmp_path, task)[0]['split'] for task in ('labels', 'scene'))
    assert first.equals(second) and sorted(tmp_path.iterdir()) == before


def test_a_group_is_on_one_side(tmp_path):
    table(tmp_path, 'image,label,group', lambda i: f'{i}.png,{"ab"[i % 2]},{f"g{i // 5}" if i < 50 else ""}', 60)
    rows, _ = benchmark('csv', tmp_path, shares=(2, 1, 1))
    rows['fold'] = folds_of(rows, 3)
    sides = rows[:50].groupby('group')[['split', 'fold']].nunique()
    assert (sides == 1).all(axis=None) and rows['split'].nunique() == 3
    assert (np.bincount(rows['fold']) == 20).all() and (folds_of(rows[::-1], 3) == rows['fold'][::-1]).all()
    table(tmp_path, 'image,label,group', lambda i: f'{i}.png,{"ab"[i % 2]},same')
    with pytest.raises(InputError, match='too few pictures, or groups of them, for test and val'): benchmark('csv', tmp_path)


def drawn(ids, labels, shares=(8, 1, 1)):
    return draw_split(pd.DataFrame({'id': ids, 'image': ids, 'label': labels}), single(labels), shares).tolist()


def test_the_split_is_the_same_on_every_machine():
    ids = [f'{label}/{i}.jpg' for label in ('awe', 'fear') for i in range(15)]
    split = drawn(ids, [name.split('/')[0] for name in ids])
    assert [name for name, part in zip(ids, split) if part == 'val'] == ['awe/13.jpg', 'fear/0.jpg', 'fear/8.jpg']
    assert [name for name, part in zip(ids, split) if part == 'test'] == ['awe/2.jpg', 'awe/6.jpg', 'fear/1.jpg']


@given(st.lists(st.tuples(st.integers(0, 400), st.sampled_from('abc')), min_size=1, max_size=80, unique_by=lambda row: row[0]),
       st.sampled_from([(8, 1, 1), (9, 1, 0), (7, 1, 2), (2, 1, 1)]))
def test_shares_are_right_and_no_class_lacks_in_train(rows, shares):
    ids, strata = [str(i) for i, _ in rows], [stratum for _, stratum in rows]
    split = drawn(ids, strata, shares)
    for _, parts in pd.Series(split).groupby(strata):
        parts = list(parts)
        assert 'train' in parts
        for part, share in zip(('train', 'val', 'test'), shares):
            assert abs(parts.count(part) - len(parts) * share / sum(shares)) <= share
    assert drawn(ids[::-1], strata[::-1], shares) == split[::-1]


def test_rows_of_one_picture_stay_together_and_rare_classes_are_even(tmp_path):
    table(tmp_path, 'image,labels', lambda i: f'{i // 2}.png,common{"|rare" if i < 20 else ""}', 100)
    rows, task = benchmark('csv', tmp_path)
    assert rows.groupby('image')['split'].nunique().eq(1).all() and sorted(rows['split'].value_counts()) == [10, 10, 80]
    assert strata_of(rows, task)[19:21].tolist() == ['rare', 'common'] and rows[rows['rare'] == 1]['split'].value_counts()['train'] == 16


def test_a_row_keeps_its_line(tmp_path):
    write(tmp_path, 'a.csv', 'x,y,,\n\n1, 2,,\n\n3,4,,\n')
    assert read_rows(tmp_path / 'a.csv', ['y'])['y'].to_dict() == {3: '2', 5: '4'}
