"Each set in its owners' layout, in miniature: what is read, what is refused, and a split that is the same everywhere."
import csv
import io
import json
import os
import pickle
import tarfile
import unicodedata
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from pacl.parts import readers as datasets
from pacl.parts.readers import (
    BOX, EMOTIC, MIKELS, VAD, WEBEMO, Task, benchmark, dataset, draw_split, numbers, one_of, posts, read_rows, read_table, single,
)
from pacl.parts.stages import InputError

_png = io.BytesIO()
Image.new('RGB', (2, 2), 'red').save(_png, 'png')
PICTURE = _png.getvalue()


def write(root, name, content):
    path = Path(root) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pictures(root, *names):
    for name in names: write(root, name, PICTURE)


def tumemo(root):
    words = ['Angry', 'Bored', 'Calm', 'Fear', 'Happy', 'Love', 'Sad']
    write(root, 'all_data_id_and_label.txt', 'ID label\n' + ''.join(f'{i} {words[i % 7]}\n' for i in range(14)))
    pictures(root, *(f'all_data/{i}.jpg' for i in range(14)))
    for i in range(14): write(root, f'all_data/{i}.txt', f'post {i}')


def fi_folders(root):
    pictures(root, *(f'emotion_dataset/{label}/{label}_{i:04}.jpg' for label in MIKELS for i in range(3)))


def fi_wscnet(root):
    for split, n in (('train', 3), ('val', 1), ('test', 1)):
        pictures(root, *(f'FI/{split}/{label}/{i}.jpg' for label in MIKELS for i in range(n)))


def fi_votes(root):  # two of three have a majority; one picture has it for two emotions
    for label in MIKELS:
        write(root, f'agg/{label}_0.csv', ''.join(f'x,http://flickr.com/a/{label}{i}.jpg,{disagree},{agree}\n'
                                                  for i, (disagree, agree) in enumerate([(1, 4), (2, 3), (2, 2)])))
        pictures(root, *(f'pictures/{label}{i}.jpg' for i in range(3)))
    with open(root / 'agg/fear_0.csv', 'a') as file: file.write('x,http://flickr.com/a/awe0.jpg,2,3\n')


def emotion_6(root):
    pictures(root, *(f'images/{label}/{sub}/{word}/{i}.jpg' for label in ('anger', 'fear', 'joy', 'love', 'sadness', 'surprise')
                     for sub, word in (('a', 'joy'), ('b', 'two words')) for i in range(2)))


def webemo(root):
    for split, n in (('train', 50), ('test', 25)):
        names = [f'220_F_{split}{i}_x.jpg' for i in range(n)]
        write(root, f'{split}25.txt', ''.join(f'https://as2.ftcdn.net/jpg/00/{name} {i % 25}\n' for i, name in enumerate(names)))
        pictures(root, *(f'{split}/{i % 25}/{name}' for i, name in enumerate(names)))


PEOPLE = {  # split → picture → persons: box, words, ratings
    'train': {'a.jpg': [([1, 2, 30, 40], ['Fear', 'Pain'], [2, 8, 3]), ([-4, 2, 9, 9], ['Peace'], [7, 2, 6])],
              'b.jpg': [([5, 5, 6, 6], ['Fear'], [np.nan, 1, 1])], 'c.jpg': [([5, 5, 6, 6], ['Doubt/Confusion'], [5, 5, 5])]},
    'val': {'d.jpg': [([5, 5, 6, 6], ['Anger', 'Aversion'], [3, 7.5, 4])]},
    'test': {'e.jpg': [([5, 5, 6, 6], ['Yearning'], [5, 4.25, 4]), ([1, 1, 2, 2], ['Happiness'], [9, 9, 9])],
             'f.jpg': [([5, 5, 6, 6], [], [5, 5, 5])]},
}
for split, n in (('train', 5), ('val', 1), ('test', 2)):
    PEOPLE[split] |= {f'{split}{i}.jpg': [([1, 2, 3, 4], ['Peace', 'Pleasure'], [6, 4, 5])] for i in range(n)}


def cells(words):
    array = np.empty(len(words), object)
    array[:] = words
    return array


def structs(dicts):
    array = np.empty((1, len(dicts)), [(name, object) for name in dicts[0]])
    for i, d in enumerate(dicts):
        for name, value in d.items(): array[0, i][name] = structs(value) if isinstance(value, list) else value
    return array


def emotic_mat(root, people=PEOPLE, without=None):
    def person(split, box, words, ratings):
        whole = complete(split, box, words, ratings)
        return {name: value for name, value in whole.items() if split != 'val' or name != without}

    def complete(split, box, words, ratings):
        said = dict(categories=cells(words)), dict(zip(VAD, map(float, ratings)))
        rest = dict(gender='Male', age='Adult')
        box = np.array([box], float)
        if split == 'train': return dict(body_bbox=box, annotations_categories=said[0], annotations_continuous=said[1], **rest)
        return dict(body_bbox=box, annotations_categories=[said[0], dict(categories=cells(['Fear']))], combined_categories=cells(words),
                    annotations_continuous=[said[1], said[1]], combined_continuous=said[1], **rest)
    out = {split: structs([dict(filename=image, folder='mscoco/images', image_size=dict(n_col=640, n_row=480),
                                original_database=dict(name='mscoco'), person=[person(split, *p) for p in persons])
                           for image, persons in entries.items()]) for split, entries in people.items()}
    savemat(write(root, 'Annotations/Annotations.mat', b''), out)
    pictures(root, *(f'emotic/mscoco/images/{image}' for entries in people.values() for image in entries))


def emotic_csv(root):
    for split, entries in PEOPLE.items():
        rows, index = ['Index,Folder,Filename,Image Size,BBox,Categorical_Labels,Continuous_Labels,Gender,Age'], 0
        for image, persons in entries.items():
            for box, words, ratings in persons:
                if not words or np.isnan(ratings).any(): continue  # as the conversion does
                rows.append(f'{index},mscoco/images,{image},"[480, 640]","{box}","{words}","{[float(r) for r in ratings]}",Male,Adult')
                index += 1
        write(root, f'emotic_pre/{split}.csv', '\r\n'.join(rows) + '\r\n')
        pictures(root, *(f'emotic/mscoco/images/{image}' for image in entries))


def iaps(root):
    rows = [f'Thing\t{1000 + i}\t{2 + i % 6}.50\t1.2\t{4 + i % 3}.25\t2.1\t{5 if i % 2 else "."}\t2\t{"." if i % 2 else 6}\t2\t{i + 1}'
            for i in range(20)]
    rows += ['"Snake\t1000\t3.50\t1\t5.25\t2\t.\t.\t5\t2\t9', 'Web\t6570.1\t2.19\t1.7\t6.24\t2.1\t.\t.\t.\t.\t3']
    write(root, 'Tech Report/AllSubjects_1-20.txt', 'The ratings of all subjects,\r\nsets 1 to 20\r\n\r\n\r\n\r\n'
          'desc\tIAPS\tvalmn\tvalsd\taromn\tarosd\tdom1mn\tdom1sd\tdom2mn\tdom2sd\tset\r\n' + '\r\n'.join(rows) + '\r\n')
    pictures(root, *(f'IAPS 1-20 Images/{1000 + i}.JPG' for i in range(20)), 'IAPS 1-20 Images/6570.1.jpg')


def iaps_pdanet(root):
    write(root, 'IAPS_VAD.txt', ''.join(f'{1000 + i} {2 + i % 6}.5 4.25 {5 + i % 2}\n' for i in range(20)) + '2000 nan nan nan\n')
    pictures(root, *(f'Dataset/{1000 + i}.jpg' for i in range(20)))


EMOSET = ('amusement', 'awe', 'contentment', 'excitement', 'anger', 'disgust', 'fear', 'sadness')


def emoset(root):
    write(root, 'info.json', '{}')
    for split, places in (('train', (0, 1)), ('val', (2,)), ('test', (3,))):
        entries = [[e, f'{e}_{i:05}', f'image/{e}/{e}_{i:05}.jpg', f'annotation/{e}/{e}_{i:05}.json'] for e in EMOSET for i in places]
        write(root, f'{split}.json', json.dumps(entries))
        for entry in entries:
            pictures(root, entry[2])
            write(root, entry[3], '{}')


def oasis(root, end='\r', quote=''):
    head = ',Theme,Category,Source,Valence_mean,Valence_SD,Valence_N,Arousal_mean,Arousal_SD,Arousal_N'
    rows = [f'I{i},Theme {i}{" " if i < 3 else ""},Object,Pixabay,{1.5 + i % 5},1,100,{2 + i % 3}.25,1,100' for i in range(1, 21)]
    lines = [quote + line.replace(',', f'{quote},{quote}') + quote for line in [head, *rows]]
    write(root, 'OASIS.csv', end.join(lines) + end)
    pictures(root, *(f'images/Theme {i}.jpg' for i in range(1, 21)))


def artphoto(root):
    labels = ['sad' if label == 'sadness' else label for label in MIKELS]
    pictures(root, *(f'testImages_artphoto/{label}_{i:04}.jpg' for label in labels for i in range(3)))


def abstract(root):  # the last three have no clear winner
    rows = [[3 if j == i % 8 else 1 for j in range(8)] for i in range(16)] + [[2, 2, 0, 0, 0, 0, 0, 0]] * 3
    write(root, 'ABSTRACT_groundTruth.csv', "'','Amusement','Anger','Awe','Content','Disgust','Excitement','Fear','Sad'\r\n"
          + ''.join(f"'abstract_{i:04}.jpg',{','.join(map(str, row))}\r\n" for i, row in enumerate(rows)))
    pictures(root, *(f'abstract_{i:04}.jpg' for i in range(19)))


def cornell(root):
    names = [f'{label}/{i}.jpg' for label in ('anger', 'disgust', 'fear', 'joy', 'sadness', 'surprise') for i in (1, 2)]
    felt = ['0.7\t0.3\t0\t0\t0\t0\t0', '0.1\t0.1\t0\t0\t0\t0\t0.8', '0.4\t0\t0.4\t0.2\t0\t0\t0'] * 4
    write(root, 'ground_truth.txt', '\t'.join(f'[{c}]' for c in ('image_filename', 'valence', 'arousal', *(
        f'prob. {e}' for e in 'anger disgust fear joy sadness surprise neutral'.split()))) + '\n'
        + ''.join(f'{name}\t{2.5 + i % 4}\t3.8\t{f}\n' for i, (name, f) in enumerate(zip(names, felt))))
    pictures(root, *(f'images/{name}' for name in names))


def mvsa(root, annotators):
    votes = {1: ['positive,positive', 'neutral,negative', 'positive,negative', 'neutral,neutral', 'positive,neutral'],
             3: ['positive,positive\tpositive,neutral\tnegative,positive', 'neutral,negative\tneutral,negative\tpositive,positive',
                 'positive,negative\tpositive,negative\tneutral,neutral', 'neutral,neutral\tneutral,neutral\tnegative,positive',
                 'positive,neutral\tneutral,positive\tnegative,negative']}[annotators]
    write(root, 'labelResultAll.txt', 'ID' + '\ttext,image' * annotators + '\n'
          + ''.join(f'{i + 2}\t{v}\n' for i, v in enumerate(votes * 3)))
    pictures(root, *(f'data/{i}.jpg' for i in range(2, 17)))
    for i in range(2, 17): write(root, f'data/{i}.txt', f'RT @you: post {i}\n')


def own_folder(root):
    pictures(root, *(f'my classes/{label}/{i}.png' for label in ('calm sea', 'Übermut') for i in range(10)), 'logo.png')
    return root / 'my classes'


def own_csv(root):
    write(root, 'labels.csv', 'image,label,split,why\n' + ''.join(
        f'{i}.png,{"calm" if i % 2 else "fear"},{("train", "val", "test")[i % 3]},"a, b"\n' for i in range(12)))
    pictures(root, *(f'{i}.png' for i in range(12)))


def own_posts(root):
    write(root, 'posts.csv', 'id,image,text,label\n' + ''.join(f'0{i},{i}.png,"post ""{i}""",{"calm" if i % 2 else "fear"}\n'
                                                               for i in range(12)))
    pictures(root, *(f'images/{i}.png' for i in range(12)))


def shard(root, name, members):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / name, 'w') as tar:
        for member, content in members:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return root / name


def shards(root):
    for n in range(3):
        shard(root, f'shard-{n:04}.tar', [(f'{i:06}.{kind}', content) for i in range(5 * n, 5 * n + 5)
                                          for kind, content in (('jpg', PICTURE), ('txt', f'post {i}'.encode()))])


MINI = [  # name, task, maker, rows, counts of the last label column (or means of the ratings), counts of the split
    ('tumemo', None, tumemo, 14, dict.fromkeys('love happy calm bored sad angry fear'.split(), 2), (12, 1, 1)),
    ('fi', None, fi_folders, 24, dict.fromkeys(MIKELS, 3), (20, 2, 2)),
    ('fi', 'polarity', fi_folders, 24, dict(positive=12, negative=12), (20, 2, 2)),
    ('fi', None, fi_wscnet, 40, dict.fromkeys(MIKELS, 5), (24, 8, 8)),
    ('fi', None, fi_votes, 17, dict.fromkeys(MIKELS, 2) | dict(fear=3), None),
    ('emotion-6', None, emotion_6, 24, dict.fromkeys('love joy surprise sadness anger fear'.split(), 4), (20, 2, 2)),
    ('unbiasedemo', None, emotion_6, 24, dict.fromkeys('love joy surprise sadness anger fear'.split(), 4), (20, 2, 2)),
    ('webemo', None, webemo, 75, dict.fromkeys(WEBEMO, 3), (45, 5, 25)),
    ('webemo', 'six', webemo, 72, dict.fromkeys(set(WEBEMO) - {'confusion'}, 3), None),
    ('emotic', None, emotic_mat, 14, dict.fromkeys([0], 13) | {1: 1}, (8, 2, 4)),
    ('emotic', None, emotic_csv, 14, dict.fromkeys([0], 13) | {1: 1}, (8, 2, 4)),
    ('emotic', 'vad', emotic_mat, 14, (79 / 14, 67.75 / 14, 71 / 14), (8, 2, 4)),
    ('emotic', 'vad', emotic_csv, 14, (79 / 14, 67.75 / 14, 71 / 14), (8, 2, 4)),
    ('iaps', None, iaps, 20, None, (17, 1, 2)),
    ('iaps', None, iaps_pdanet, 20, (4.8, 4.25, 5.5), (16, 2, 2)),
    ('emoset', None, emoset, 32, dict.fromkeys(EMOSET, 4), (16, 8, 8)),
    ('emoset', 'polarity', emoset, 32, dict(positive=16, negative=16), (16, 8, 8)),
    ('oasis', None, oasis, 20, (3.5, 3.3), (16, 2, 2)),
    ('oasis', None, lambda root: oasis(root, '\n', '"'), 20, (3.5, 3.3), (16, 2, 2)),
    ('artphoto', None, artphoto, 24, dict.fromkeys(MIKELS, 3), (20, 2, 2)),
    ('abstract', None, abstract, 16, dict.fromkeys(MIKELS, 2), (13, 1, 2)),
    ('cornell-emotion6', None, cornell, 12, dict.fromkeys('anger disgust fear joy sadness surprise'.split(), 2), (10, 1, 1)),
    ('cornell-emotion6', 'dominant', cornell, 8, dict(anger=4, neutral=4), None),
    ('cornell-emotion6', 'va', cornell, 12, (4.0, 3.8), (10, 1, 1)),
    ('mvsa-single', None, lambda root: mvsa(root, 1), 12, dict(positive=6, negative=3, neutral=3), (10, 1, 1)),
    ('mvsa-multiple', None, lambda root: mvsa(root, 3), 9, dict(positive=3, negative=3, neutral=3), None),
    ('folder', None, own_folder, 20, {'calm sea': 10, 'Übermut': 10}, (16, 2, 2)),
    ('csv', None, own_csv, 12, dict(calm=6, fear=6), (4, 4, 4)),
    ('csv', 'why', own_csv, 12, {'a, b': 12}, (4, 4, 4)),
    ('posts', None, own_posts, 12, dict(calm=6, fear=6), (10, 1, 1)),
]


@pytest.mark.parametrize('name, task, make, n, counts, split', MINI, ids=[f'{i}-{m[0]}' for i, m in enumerate(MINI)])
def test_every_set_is_read(tmp_path, name, task, make, n, counts, split):
    root = make(tmp_path) or tmp_path
    table, about = benchmark(name, root, task)
    assert len(table) == n and table['id'].is_unique and (table['missing'] == '').all()
    assert all((root / image).is_file() and '\\' not in image for image in table['image'])
    assert {'id', 'image', 'split', 'missing', *about.columns} <= set(table.columns)
    if split: assert tuple(table['split'].value_counts().reindex(['train', 'val', 'test']).fillna(0)) == split
    if isinstance(counts, dict): assert dict(table[about.columns[-1]].value_counts()) == counts
    if isinstance(counts, tuple): np.testing.assert_allclose(about.targets(table).mean(0), counts, rtol=1e-6)
    if about.kind == 'regression':
        low, high = np.array(about.ranges).T
        assert ((low <= about.targets(table)) & (about.targets(table) <= high)).all()
    again, _ = benchmark(name, root, task)  # split.csv is read back
    pd.testing.assert_frame_equal(table, again)


def test_label_indices_are_those_of_the_release(tmp_path):
    fi_folders(tmp_path)
    _, task = benchmark('fi', tmp_path)
    release = dict(excitement=0, amusement=1, awe=2, contentment=3, sadness=4, disgust=5, anger=6, fear=7)
    assert {name: i for i, name in enumerate(task.classes[0])} == release and task.chance == (1 / 8,)
    webemo(tmp_path / 'w')
    table, task = benchmark('webemo', tmp_path / 'w')
    row = table.set_index('id').loc['train/220_F_train19_x.jpg']
    assert tuple(row[list(task.columns)]) == ('negative', 'sadness', 'sadness') and task.classes[2][19] == 'sadness'
    assert task.classes[1] == ('love', 'joy', 'surprise', 'confusion', 'sadness', 'anger', 'fear')
    assert [len(names) for names in task.classes] == [2, 7, 25] and task.kind == 'hierarchical'
    assert task.targets(table.loc[[2]]).tolist() == [[1, 3, 2]]  # confusion
    assert [len(names) for names in benchmark('webemo', tmp_path / 'w', 'six')[1].classes] == [2, 6, 25]


def test_webemo_takes_val_from_train_and_leaves_test_alone(tmp_path):
    webemo(tmp_path)
    table, _ = benchmark('webemo', tmp_path)
    assert {split: set(rows['id'].str.split('/').str[0]) for split, rows in table.groupby('split')} == {
        'train': {'train'}, 'val': {'train'}, 'test': {'test'}}
    six, _ = benchmark('webemo', tmp_path, 'six')
    assert dict(zip(six['id'], six['split'])).items() <= dict(zip(table['id'], table['split'])).items()


def test_emotic_is_the_same_from_both_forms(tmp_path):
    emotic_mat(tmp_path / 'mat')
    emotic_csv(tmp_path / 'csv')
    for task in ('categories', 'vad'):
        (mat, about), (csv, same) = benchmark('emotic', tmp_path / 'mat', task), benchmark('emotic', tmp_path / 'csv', task)
        pd.testing.assert_frame_equal(mat, csv)
        assert about == same
    first = mat.set_index('id').loc['mscoco/images/a.jpg#2']
    assert first[list(BOX)].tolist() == [0, 2, 9, 9] and first[list(VAD)].tolist() == [7, 2, 6] and first['Peace'] == 1
    categories, about = benchmark('emotic', tmp_path / 'mat')
    assert about.kind == 'multi-label' and about.columns == about.classes[0] == EMOTIC and len(EMOTIC) == 26
    words = [{name for name, has in zip(EMOTIC, row) if has} for row in about.targets(categories)]
    more = {'Peace', 'Pleasure'}
    assert words == [{'Fear', 'Pain'}, {'Peace'}, {'Doubt/Confusion'}, *[more] * 5, {'Anger', 'Aversion'}, more,
                     {'Yearning'}, {'Happiness'}, more, more]


def test_iaps_takes_either_dominance_and_the_mean_of_two_ratings(tmp_path):
    iaps(tmp_path)
    table, task = benchmark('iaps', tmp_path)
    assert table['image'][0] == 'IAPS 1-20 Images/1000.JPG' and '6570.1' not in set(table['id'])  # no dominance at all
    assert table.set_index('id').loc['1000', list(VAD)].tolist() == [3.0, 4.75, 5.5]
    assert table.set_index('id').loc['1001', 'dominance'] == 5 and table.set_index('id').loc['1002', 'dominance'] == 6


@pytest.mark.parametrize('end, quote', [('\r', ''), ('\n', '"'), ('\r\n', '')])
def test_oasis_of_old_and_new_machines(tmp_path, end, quote):
    oasis(tmp_path, end, quote)
    table, task = benchmark('oasis', tmp_path)
    assert table['id'].tolist() == [f'I{i}' for i in range(1, 21)] and table['image'][0] == 'images/Theme 1.jpg'
    assert task.columns == ('valence', 'arousal') and task.ranges == ((1, 7), (1, 7)) and task.chance is None


def test_majority_of_votes_keeps_an_undecided_picture_in_one_split(tmp_path):
    fi_votes(tmp_path)
    table, _ = benchmark('fi', tmp_path)
    both = table[table['image'] == 'pictures/awe0.jpg']
    assert sorted(both['label']) == ['awe', 'fear'] and both['split'].nunique() == 1
    assert not table['image'].str.contains('2.jpg').any()  # a tie


def test_posts_have_texts(tmp_path):
    tumemo(tmp_path)
    write(tmp_path, 'all_data/3.txt', '\ufeffcafé ☕\n'.encode())
    write(tmp_path, 'all_data/4.txt', 'caf\xe9 \x93quoted\x94'.encode('latin-1'))
    write(tmp_path, 'all_data/5.txt', ' \n')
    os.remove(tmp_path / 'all_data/6.txt')
    (tmp_path / 'all_data/6.txt').symlink_to('nowhere.txt')
    os.remove(tmp_path / 'all_data/7.jpg')
    table, task = posts('TumEmo', tmp_path)
    assert table.columns.tolist() == ['id', 'image', 'text', 'label', 'missing'] and task.classes[0][0] == 'love'
    assert table['text'][3:7].tolist() == ['café ☕', 'café “quoted”', '', '']
    assert table['missing'][3:8].tolist() == ['', '', 'no text', 'no text', 'no image']
    write(tmp_path / 'own', 'posts.csv', 'id,image,text,likes\n01,a.png,None,3\n02,b.png,"rain, again",4\n')
    pictures(tmp_path / 'own', 'a.png', 'images/b.png')
    table, task = posts('posts', tmp_path / 'own')
    assert task is None and table['id'].tolist() == ['01', '02'] and table['text'].tolist() == ['None', 'rain, again']
    assert table['image'].tolist() == ['a.png', 'images/b.png'] and 'likes' in table


TEXTS = {  # what a post may say → why it is not used
    '': 'no text', ' \n ': 'no text', '😀🏳️‍🌈': '', 'https://example.org/a?b=c,d': '', 'long ' * 2000: '', 'שלום, عالم': '', '\u202eabc': '',
    'He said "no",\nthen\r\nleft\rfor "good"': '', ' ends ': '', 'None': '', '\ufeffmark': '', '=1+1': '', "it's; a\ttab": ''}
BROKEN = b'caf\xe9, at last'


def test_a_text_of_any_kind_is_kept_or_has_its_reason(tmp_path):
    raw = [text.encode() for text in TEXTS] + [BROKEN]
    cells = b''.join(b'%d,%d.png,"%s"\n' % (i, i, text.replace(b'"', b'""')) for i, text in enumerate(raw))
    write(tmp_path, 'posts.csv', b'\xef\xbb\xbfid,image,text\n' + cells)
    pictures(tmp_path, *(f'{i}.png' for i in range(len(raw))))
    table, _ = posts('posts', tmp_path)
    assert table['text'].tolist() == [*TEXTS, 'caf?, at last'] and table['missing'].tolist() == [*TEXTS.values(), 'text is not UTF-8']
    table['text'].str.encode('utf-8')  # can be written again


@given(st.lists(st.text(st.characters(exclude_categories=['Cs']), max_size=20), min_size=1, max_size=6))
def test_any_text_survives_a_table(tmp_path_factory, texts):
    file = io.StringIO(newline='')
    writer = csv.writer(file, quoting=csv.QUOTE_ALL)
    writer.writerows([['id', 'text'], *([str(i), text] for i, text in enumerate(texts))])
    path = write(tmp_path_factory.mktemp('t'), 'a.csv', file.getvalue())
    assert read_table(path, ['id', 'text'])['text'].tolist() == texts


def test_a_remedy_of_ones_own(tmp_path):
    table = read_table(write(tmp_path, 'a.csv', 'id,n\n1,x\n'), ['id', 'n'])
    with pytest.raises(InputError, match=r'row 2 \(id 1\).*Run it again.'): numbers('a.csv', table, ['n'], 0, 1, 'Run it again.')
    with pytest.raises(InputError, match='one of a, b .*Run it again.'): one_of('a.csv', table, 'n', ['a', 'b'], 'Run it again.')


def test_shards_are_read_in_place(tmp_path):
    members = [('./deep/a.b.jpg', b'no picture: its kind is b.jpg'), ('./deep/a.txt', 'caf\xe9 ☕\n'.encode()), ('./deep/a.JPG', PICTURE),
               ('b.json', json.dumps({'caption': 'from json'}).encode()), ('b.png', PICTURE), ('b.cls', b'3'), ('c.jpg', PICTURE),
               ('d.txt', b'no picture'), ('e.txt', BROKEN), ('e.jpg', PICTURE + b'!'), ('f.json', b'{"text": '), ('f.jpg', PICTURE),
               ('._b.jpg', b'mac'), ('../g.jpg', PICTURE), ('../../h.jpg', PICTURE), ('é'.encode().decode('latin-1') + '.jpg', PICTURE),
               ('README.md', b'about'), ('i.json', b'{"text": "first"}'), ('i.txt', b'second'), ('i.webp', PICTURE), ('j.json', b'[3]'),
               ('k.json', b'{"text": "\\ud83d"}'), ('k.jpg', PICTURE), ('l.json', b'[' * 200_000), ('l.jpg', PICTURE),
               ('n.jpg', PICTURE), ('n.png', b'a second'), ('n.txt', b'first'), ('n.json', b'{"text": "second"}'), ('m.txt', b'a link')]
    link = tarfile.TarInfo('m.jpg')
    link.type, link.linkname = tarfile.SYMTYPE, 'n.jpg'
    with tarfile.open(shard(tmp_path / 'other disk', '1.tar', members), 'a') as tar: tar.addfile(link)
    (tmp_path / 'root').mkdir()
    (tmp_path / 'root/shard 1.tar').symlink_to(tmp_path / 'other disk/1.tar')
    shard(tmp_path / 'root', 'deep/0.tar', [('0.txt', b'zero'), ('0.jpg', b'')])
    table, task = posts('webdataset', tmp_path / 'root')
    assert task is None and table.columns.tolist() == ['id', 'image', 'text', 'missing', 'offset', 'bytes']
    assert table[['offset', 'bytes']].dtypes.tolist() == [np.int64, np.int64]
    rows = {row.id: row for row in table.itertuples()}
    assert rows['deep/a'].image == 'shard 1.tar/deep/a.JPG'
    assert rows['deep/a'].text == 'caf\xe9 ☕\n' and rows['0'].image == 'deep/0.tar/0.jpg'
    assert {key: row.text for key, row in rows.items() if key in 'bin'} == {'b': 'from json', 'i': 'second', 'n': 'first'}
    assert {key: row.missing for key, row in rows.items() if row.missing} == {
        'c': 'no text', 'd': 'no image', 'e': 'text is not UTF-8', 'f': 'no text', '../g': 'no text', '../../h': 'leaves the folder',
        'Ã©': 'no text', 'j': 'no image', 'k': 'text is not UTF-8', 'l': 'no text', 'm': 'no image'}
    for row in rows.values():
        if row.missing in ('', 'text is not UTF-8') and row.bytes:
            with open(tmp_path / 'root' / f'{row.image.split(".tar/")[0]}.tar', 'rb') as file:
                file.seek(row.offset)
                assert file.read(row.bytes) == PICTURE + b'!' * (row.id == 'e')
    assert sorted(path.name for path in (tmp_path / 'root').rglob('*')) == ['0.tar', 'deep', 'shard 1.tar']  # nothing unpacked


@given(st.data())
def test_a_shard_cut_anywhere_is_named(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp('cut')
    path = shard(folder, 'a.tar', [(f'{i}.{kind}', PICTURE * 9) for i in range(2) for kind in ('txt', 'jpg')])
    with tarfile.open(path) as tar: end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    path.write_bytes(path.read_bytes()[:data.draw(st.integers(0, end + 511) | st.integers(0, end // 512).map(lambda i: i * 512))])
    with pytest.raises(InputError, match='a.tar: .*Copy it again'): posts('webdataset', folder)


def test_a_broken_header_within_a_shard_is_named(tmp_path):
    path = shard(tmp_path, 'a.tar', [(f'{i}.jpg', PICTURE) for i in range(3)])
    content = bytearray(path.read_bytes())
    content[1024] ^= 1  # the name of the second
    path.write_bytes(content)
    with pytest.raises(InputError, match='a.tar: unexpected end'): posts('webdataset', tmp_path)


def test_columns_of_ones_own_called_like_those_of_a_shard(tmp_path):
    write(tmp_path, 'posts.csv', 'id,image,text,bytes,offset\n1,a.png,b,7,x\n')
    pictures(tmp_path, 'a.png')
    table, _ = posts('posts', tmp_path)
    assert table['missing'].tolist() == [''] and not {'bytes', 'offset'} & set(table)


@pytest.mark.parametrize('columns, rows, kind, targets', [
    ('labels', ['joy|awe', '', 'awe'], 'multi-label', [[1, 1], [0, 0], [1, 0]]),
    ('level_1,level_2', ['good,joy', 'bad,fear', 'good,awe'], 'hierarchical', [[1, 2], [0, 1], [1, 0]]),
    ('valence,arousal', ['1,2', '3,1.5', '-2,0'], 'regression', [[1, 2], [3, 1.5], [-2, 0]]),
    ('label', ['b', 'a', 'b'], 'single-label', [[1], [0], [1]]),
])
def test_ones_own_table_has_any_task(tmp_path, columns, rows, kind, targets):
    write(tmp_path, 'labels.csv', f'image,{columns}\n' + ''.join(f'{i}.png,{row}\n' for i, row in enumerate(rows)))
    pictures(tmp_path, '0.png', '1.png', '2.png')
    table, task = benchmark('csv', tmp_path)
    assert task.kind == kind and task.targets(table).tolist() == targets
    again = Task.of(json.loads(json.dumps(asdict(task))))
    assert again == task and hash(again) == hash(task)
    table.to_csv(tmp_path / 'kept.csv', index=False)  # as the data stage keeps it: all text
    np.testing.assert_array_equal(again.targets(read_table(tmp_path / 'kept.csv', ['id'])), task.targets(table))
    if kind == 'regression': assert task.ranges == ((-2, 3), (0, 2))


def broken(maker, name, old, new):
    def make(root):
        root = maker(root) or root
        content = (root / name).read_bytes()
        assert old.encode() in content
        (root / name).write_bytes(content.replace(old.encode(), new if isinstance(new, bytes) else new.encode(), 1))
        return root
    return make


def old_mat(root):
    emotic_mat(root)
    savemat(root / 'Annotations/Annotations.mat', {'Annotations': np.zeros(3)})


TUMEMO, IAPS, EMOTION6 = 'all_data_id_and_label.txt', 'Tech Report/AllSubjects_1-20.txt', 'ground_truth.txt'
MALFORMED = [  # name, task, maker, what the message says
    ('tumemo', None, broken(tumemo, TUMEMO, '5 Love', '5 Lowe'), [f'{TUMEMO}, row 7 (id 5)', 'label is "lowe"', 'love, happy']),
    ('tumemo', None, broken(tumemo, TUMEMO, '5 Love', '5'), ['row 7: 1 values for 2']),
    ('tumemo', None, broken(tumemo, TUMEMO, '5 Love', '4 Love'), ['rows 6, 7', 'the id 4', '1 of 14']),
    ('tumemo', None, broken(tumemo, TUMEMO, '5 Love', b'5 \xff'), ['row 7: not UTF-8']),
    ('fi', None, broken(fi_votes, 'agg/awe_0.csv', ',2,3', ',two,3'), ['awe_0.csv, row 2', 'disagree is "two"']),
    ('fi', None, broken(fi_votes, 'agg/awe_0.csv', ',2,3', ',2'), ['awe_0.csv, row 2: 3 values for 4']),
    ('fi', None, lambda root: pictures(root, 'FI/awe/1.jpg', 'FI/happy/1.jpg'), ['happy/1.jpg', 'no folder above it is a class']),
    ('emotion-6', None, fi_folders, ['no folder above it is a class', 'anger']),
    ('emotion-6', None, lambda root: pictures(root, 'images/anger/x/1.jpg'), ['1 class folders']),
    ('unbiasedemo', None, lambda root: pictures(root, 'images/anger/x/1.jpg', 'images/joyy/dog/1.jpg'), ['images/joyy/dog/1.jpg']),
    ('webemo', None, broken(webemo, 'test25.txt', 'test3_x.jpg 3', 'test3_x.jpg 33'), ['test25.txt, row 4', 'index is "33"', '0 to 24']),
    ('webemo', None, broken(webemo, 'train25.txt', 'train3_x.jpg 3', 'train3_x.jpg'), ['train25.txt, row 4: 1 values']),
    ('webemo', None, lambda root: (webemo(root), os.remove(root / 'test25.txt'))[0], ['no file test25.txt']),
    ('emotic', None, lambda root: emotic_mat(root, without='combined_categories'), ['.mat, val, entry 1', 'combined_categories']),
    ('emotic', None, lambda root: emotic_mat(root, without='body_bbox'), ['val, entry 1', 'body_bbox']),
    ('emotic', None, old_mat, ['no variable train', '2019']),
    ('emotic', None, lambda root: emotic_mat(root, PEOPLE | {'val': {'d.jpg': [([1, 2, 3, 4], ['Angry'], [3, 3, 3])]}}),
     ['val, row 1 (mscoco/images/d.jpg)', 'no category "Angry"', 'Anger']),
    ('emotic', None, lambda root: emotic_mat(root, PEOPLE | {'val': {'d.jpg': [([1, 2, 3], ['Fear'], [3, 3, 3])]}}),
     ['val, row 1 (mscoco/images/d.jpg)', 'box']),
    ('emotic', None, lambda root: write(root, 'Annotations.mat', b'MATLAB 5.0 MAT-file' + bytes(200)) and None, ['Annotations.mat', '-v7']),
    ('emotic', 'vad', broken(emotic_csv, 'emotic_pre/val.csv', "['Anger'", "'Anger'"), ['val.csv, row 2', 'must be lists']),
    ('emotic', 'vad', broken(emotic_csv, 'emotic_pre/val.csv', "'Anger'", "'Angr'"), ['val.csv, val, row 2', '"Angr"', 'Anger']),
    ('emotic', 'vad', broken(emotic_csv, 'emotic_pre/val.csv', 'BBox', 'Box'), ['val.csv, row 1', 'no column "BBox"']),
    ('iaps', None, broken(iaps, IAPS, '\t1003\t5.50', '\t1003\t55.0'), ['row 10 (id 1003)', 'valence is "55.0"', '[1, 9]']),
    ('iaps', None, broken(iaps, IAPS, 'valmn', 'valence'), ['row 6: no column "valmn"']),
    ('iaps', None, broken(iaps_pdanet, 'IAPS_VAD.txt', '1002 4.5 4.25', '1002 4.5'), ['row 3: 3 values for 4']),
    ('emoset', None, broken(emoset, 'val.json', '"awe", ', ''), ['val.json', 'expected 4', '[[emotion, id']),
    ('emoset', None, broken(emoset, 'val.json', '[', ''), ['val.json, row 1', 'Download']),
    ('emoset', None, broken(emoset, 'test.json', '"awe",', '"aw",'), ['test.json, row 2 (id awe_00003)', 'label is "aw"']),
    ('emoset', None, broken(emoset, 'test.json', 'awe_00003"', 'awe_00000"'),
     ['rows image/awe/awe_00000.jpg, image/awe/awe_00003.jpg: all have the id awe_00000']),
    ('oasis', None, broken(oasis, 'OASIS.csv', 'Valence_mean', 'Valence'), ['OASIS.csv, row 1: no column "Valence_mean"']),
    ('oasis', None, broken(oasis, 'OASIS.csv', 'Object,Pixabay,2.5', 'Object,Pixabay,2;5'), ['row 2 (id I1)', 'valence is "2;5"']),
    ('oasis', None, broken(oasis, 'OASIS.csv', 'I2,Theme', 'I2,"Theme'), ['OASIS.csv, row 3', 'quotes']),
    ('oasis', None, broken(oasis, 'OASIS.csv', 'I3,', b'\xff3,'), ['OASIS.csv, row 4: not UTF-8']),
    ('oasis', None, lambda root: pictures(root, 'OASIS.xlsx', 'images/a.jpg'), ['OASIS.xlsx', 'CSV UTF-8', 'OASIS.csv']),
    ('artphoto', None, lambda root: pictures(root, 'awe_1.jpg', 'cover.jpg'), ['id cover.jpg', 'label is "cover.jpg"']),
    ('abstract', None, broken(abstract, 'ABSTRACT_groundTruth.csv', "'Content'", "'Joy'"), ['row 1: no column "Content"']),
    ('abstract', None, broken(abstract, 'ABSTRACT_groundTruth.csv', "0.jpg',3", "0.jpg',x"), ['row 2 (id abstract_0000.jpg)', 'is "x"']),
    ('cornell-emotion6', 'va', broken(cornell, EMOTION6, '2.jpg\t3.5', '2.jpg\t35'), ['row 3 (id anger/2.jpg)', 'valence is "35"']),
    ('cornell-emotion6', None, broken(cornell, EMOTION6, '0.7\t', '7\t'), ['row 2', 'anger is "7"', '[0, 1]']),
    ('cornell-emotion6', None, broken(cornell, EMOTION6, 'anger/2', 'angry/2'), ['row 3', 'label is "angry"']),
    ('mvsa-single', None, broken(lambda r: mvsa(r, 1), 'labelResultAll.txt', 'neutral,negative', 'neutral,neg'),
     ['labelResultAll.txt, row 3 (id 3)', '"neutral,neg"']),
    ('mvsa-single', None, lambda r: mvsa(r, 3), ['row 2: 4 values for 2']),
    ('mvsa-multiple', None, broken(lambda r: mvsa(r, 3), 'labelResultAll.txt', '\tneutral,negative', ''), ['row 3: 3 values']),
    ('csv', None, broken(own_csv, 'labels.csv', 'label', 'lable'), ['labels.csv, row 1', 'no column label']),
    ('csv', None, broken(own_csv, 'labels.csv', '3.png,calm', '3.png,'), ['row 5 (id 3.png)', 'label is ""']),
    ('csv', None, broken(own_csv, 'labels.csv', 'calm,val', 'calm,dev'), ['row 3', 'split is "dev"', 'train, val, test']),
    ('csv', 'vad', own_csv, ['row 1', 'no column vad among label, why', 'valence']),
    ('csv', 'object', own_csv, ['labels.csv, row 1', 'no column object among label, why']),
    ('csv', 'image', own_csv, ['no column image among label, why']),
    ('csv', None, broken(own_csv, 'labels.csv', 'split,why', 'split,label'), ['row 1: 2 column "label"']),
    ('csv', None, broken(own_csv, 'labels.csv', 'image,label,split', 'image,image,split'), ['row 1: 2 column "image"']),
    ('folder', None, lambda root: pictures(root, 'images/a.jpg'), ['1 class folders', 'a folder for each class']),
    ('posts', None, lambda root: write(root, 'posts.csv', 'id,image,text\n1,a.png,b\n1,b.png,c\n') and None, ['rows 2, 3', 'id 1']),
    ('posts', None, broken(own_posts, 'posts.csv', '07,', b'\xff7,'), ['posts.csv, row 9: not UTF-8']),
    ('posts', None, broken(own_posts, 'posts.csv', 'id,image', 'id,picture'), ['posts.csv, row 1: no column "image"']),
    ('posts', None, broken(own_posts, 'posts.csv', '""7', '"7'), ['posts.csv, row 9', 'quotes']),
    ('webdataset', None, lambda root: shard(root, 'a.tar.gz', []) and None, ['a.tar.gz', 'plain .tar']),
    ('webdataset', None, lambda root: write(root, 'a.tar', b'\x1f\x8b\x08' + bytes(600)) and None, ['a.tar', 'Copy it again']),
    ('webdataset', None, lambda root: write(root, 'a.tar', b'') and None, ['a.tar', 'empty file', 'Copy it again']),
    ('webdataset', None, lambda root: pictures(root, 'a.jpg'), ['no .tar file']),
    ('webdataset', None, lambda root: (shards(root), shard(root, 'x/more.tar', [('000007.png', PICTURE)]))[0],
     ['more.tar', '000007.png has the key of a post in shard-0001.tar']),
    ('webdataset', None, lambda root: shard(root, 'a.tar', [('1.jpg', PICTURE), ('1.JPG', PICTURE)]) and None,
     ['1.JPG has the key', 'a.tar']),
    ('webdataset', None, lambda root: shard(root, 'a.tar', [('1.txt', b'words')]) and None, ['of 1 pictures none', '"a.tar/1"']),
]


@pytest.mark.parametrize('name, task, make, says', MALFORMED, ids=[f'{i}-{m[0]}' for i, m in enumerate(MALFORMED)])
def test_a_malformed_file_is_named(tmp_path, name, task, make, says):
    root = make(tmp_path) or tmp_path
    with pytest.raises(InputError) as error: benchmark(name, root, task)
    assert str(tmp_path) in str(error.value)
    for part in says: assert part in str(error.value), str(error.value)
    assert not (root / 'split.csv').exists()


class Bomb:
    def __reduce__(self): return os.mkdir, ('exploded',)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, 'Annotations.mat', pickle.dumps(Bomb()))
    with pytest.raises(InputError, match='Annotations.mat'): benchmark('emotic', tmp_path)
    assert not Path('exploded').exists()


def test_a_column_is_a_task(tmp_path):
    write(tmp_path, 'labels.csv', 'image,object,level_1,polarity\n' + ''.join(f'{i}.png,{("cat", "dog")[i % 2]},a,p\n' for i in range(20)))
    pictures(tmp_path, *(f'{i}.png' for i in range(20)))
    table, task = benchmark('csv', tmp_path, 'object')
    assert task == Task('single-label', ('object',), (('cat', 'dog'),)) and task.targets(table)[:3].ravel().tolist() == [0, 1, 0]
    assert table.columns[:5].tolist() == ['id', 'image', 'object', 'split', 'missing']
    assert benchmark('csv', tmp_path, 'polarity')[1].classes == (('p',),) and benchmark('csv', tmp_path)[1].kind == 'hierarchical'
    write(tmp_path / 'o', 'labels.csv', (tmp_path / 'labels.csv').read_text().replace('level_1', 'else'))
    pictures(tmp_path / 'o', *(f'{i}.png' for i in range(20)))
    other, _ = benchmark('csv', tmp_path / 'o', 'object')  # nothing but columns of one's own: the split is drawn by this one
    assert other['split'].value_counts().to_dict() == {'train': 16, 'val': 2, 'test': 2}
    with pytest.raises(InputError, match='no column label among object, else, polarity'): benchmark('csv', tmp_path / 'o')


def test_unknown_names_get_the_nearest(tmp_path):
    with pytest.raises(InputError, match='no data set "emosets"; nearest valid: emoset'): benchmark('emosets', tmp_path)
    with pytest.raises(InputError, match='fi has no task "polarities"; nearest valid: polarity'): benchmark('fi', tmp_path, 'polarities')
    with pytest.raises(InputError, match='nowhere is not a folder'): benchmark('fi', tmp_path / 'nowhere')
    fi_folders(tmp_path)
    with pytest.raises(InputError, match='without texts'): posts('fi', tmp_path)
    write(tmp_path / 'p', 'posts.csv', 'id,image,text\n1,a.png,b\n')
    pictures(tmp_path / 'p', 'a.png')
    with pytest.raises(InputError, match='no labels'): benchmark('posts', tmp_path / 'p')


def test_missing_pictures_keep_their_rows_and_the_split(tmp_path):
    webemo(tmp_path / 'whole')
    webemo(tmp_path / 'half')
    whole, _ = benchmark('webemo', tmp_path / 'whole')
    gone = whole['image'][::2]
    for image in gone: os.remove(tmp_path / 'half' / image)
    half, _ = benchmark('webemo', tmp_path / 'half')
    assert half['missing'].value_counts().to_dict() == {'no image': 38, '': 37} and half['split'].equals(whole['split'])
    for image in whole['image'][1::2]: os.remove(tmp_path / 'half' / image)
    with pytest.raises(InputError, match='of 75 pictures none is in .*half.*220_F_train0_x.jpg'): benchmark('webemo', tmp_path / 'half')


def test_paths_of_every_kind(tmp_path):
    root = tmp_path / 'the root'
    nfd = unicodedata.normalize('NFD', 'Zoë.png')
    pictures(root, 'in/a b.PNG', f'in/{nfd}', 'in/deep/c.jpg', 'c.jpg', '__MACOSX/d.png', '.hidden/d.png', 'x/y/F.png', 'x/z/f.png')
    pictures(tmp_path, 'secret.png')
    (root / 'in/loop').symlink_to(root)
    (root / 'in/dead.png').symlink_to('nowhere.png')
    (root / 'self.png').symlink_to(root / 'self.png')
    (root / 'linked').symlink_to(tmp_path / 'elsewhere')
    pictures(tmp_path / 'elsewhere', 'e.png')
    (tmp_path / 'elsewhere/back').symlink_to(root)
    names = {'in/a b.png': ('in/a b.PNG', ''), unicodedata.normalize('NFC', 'in/Zoë.png'): (f'in/{nfd}', ''), 'c.jpg': ('c.jpg', ''),
             'deep/c.jpg': ('in/deep/c.jpg', ''), 'in\\a b.PNG': ('in/a b.PNG', ''), 'e.png': ('linked/e.png', ''),
             './in/../c.jpg': ('c.jpg', ''), 'F.png': ('x/y/F.png', ''), 'f.png': ('x/z/f.png', ''), 'no/c.jpg': ('no/c.jpg', 'no image'),
             '../secret.png': ('../secret.png', 'leaves the folder'), 'in/../../secret.png': ('in/../../secret.png', 'leaves the folder'),
             f'{tmp_path}/secret.png': (f'{tmp_path}/secret.png', 'leaves the folder'), 'C:\\x.png': ('C:\\x.png', 'leaves the folder'),
             'd.png': ('d.png', 'no image'), 'in/dead.png': ('in/dead.png', 'no image'), 'self.png': ('self.png', 'no image'),
             '': ('', 'no image')}
    write(root, 'labels.csv', 'id,image,label\n' + ''.join(f'{i},{name},{"ab"[i % 2]}\n' for i, name in enumerate(names)))
    table, _ = benchmark('csv', root)
    assert dict(zip(names, zip(table['image'], table['missing']))) == names


def test_a_name_that_is_no_text_is_named(tmp_path):
    try: pictures(tmp_path, 'awe/a.jpg', os.fsdecode(b'awe/caf\xe9.jpg'))
    except OSError: pytest.skip('this file system refuses such names')
    with pytest.raises(InputError, match='caf.*not UTF-8. Rename'): benchmark('fi', tmp_path)


def test_the_split_does_not_depend_on_the_order_of_files(tmp_path, monkeypatch):
    names = [f'{label}/{i} é.jpg' for label in MIKELS for i in range(11)]
    pictures(tmp_path / 'a', *names)
    pictures(tmp_path / 'b', *(unicodedata.normalize('NFD', name) for name in reversed(names)))
    scandir = os.scandir
    monkeypatch.setattr(os, 'scandir', lambda path: reversed(list(scandir(path))))
    tables = [benchmark('fi', tmp_path / side)[0] for side in 'ab']
    assert tables[0][['id', 'label', 'split']].equals(tables[1][['id', 'label', 'split']])
    assert (tmp_path / 'a/split.csv').read_bytes() == (tmp_path / 'b/split.csv').read_bytes()


def test_the_split_is_the_same_on_every_machine():
    ids = [f'{label}/{i}.jpg' for label in ('awe', 'fear') for i in range(15)]
    drawn = draw_split(ids, ids, [name.split('/')[0] for name in ids])
    assert {split: [name for name, s in zip(ids, drawn) if s == split] for split in ('val', 'test')} == PINNED


PINNED = {'val': ['awe/13.jpg', 'fear/0.jpg', 'fear/8.jpg'], 'test': ['awe/2.jpg', 'awe/6.jpg', 'fear/1.jpg']}


def test_the_split_file_decides(tmp_path):
    fi_folders(tmp_path)
    table, _ = benchmark('fi', tmp_path)
    text = (tmp_path / 'split.csv').read_text()
    assert text.startswith('id,split\namusement/amusement_0000.jpg,') and len(text.splitlines()) == 25
    assert not list(tmp_path.glob('.split*'))
    other, _ = benchmark('fi', tmp_path, seed=1)
    assert not other['split'].equals(table['split']) and (tmp_path / 'split-seed1.csv').exists()
    (tmp_path / 'split.csv').write_text(text.replace(',val', ',train').replace('awe_0000.jpg,train', 'awe_0000.jpg,val'))
    edited, _ = benchmark('fi', tmp_path, 'polarity')
    assert edited['id'][edited['split'] == 'val'].tolist() == ['awe/awe_0000.jpg']
    pictures(tmp_path, 'emotion_dataset/awe/new.jpg')
    with pytest.raises(InputError, match=r'split.csv: no row for id awe/new.jpg \(1 of 25 are missing\). Delete'): benchmark('fi', tmp_path)
    (tmp_path / 'split.csv').write_text(text.replace(',val', ',dev'))
    with pytest.raises(InputError, match='split is "dev"'): benchmark('fi', tmp_path)


@pytest.mark.parametrize('name, make, tasks', [
    ('cornell-emotion6', cornell, ('label', 'dominant', 'va')), ('fi', fi_folders, ('label', 'polarity'))])
def test_all_tasks_share_the_split_whichever_comes_first(tmp_path, name, make, tasks):
    files = set()
    for task in tasks:
        make(tmp_path / task)
        benchmark(name, tmp_path / task, task)
        files.add((tmp_path / task / 'split.csv').read_text())
    assert len(files) == 1


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    own_csv(tmp_path)
    write(tmp_path, 'labels.csv', b'\xef\xbb\xbf' + (tmp_path / 'labels.csv').read_bytes())
    assert len(benchmark('csv', tmp_path)[0]) == 12


def test_class_names_have_one_spelling(tmp_path):
    names = [f'{label}/{i}.png' for label in ('ärger', 'zorn') for i in range(10)]
    for side, form in (('a', 'NFC'), ('b', 'NFD')): pictures(tmp_path / side, *(unicodedata.normalize(form, name) for name in names))
    (one, task), (other, same) = (benchmark('folder', tmp_path / side) for side in 'ab')
    assert task == same and one[['id', 'label', 'split']].equals(other[['id', 'label', 'split']])


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    fi_folders(tmp_path / 'fi')
    to_csv = pd.DataFrame.to_csv

    def refuse(self, path, **more):
        if Path(path).parent == tmp_path / 'fi': raise PermissionError(13, 'Permission denied', str(path))
        return to_csv(self, path, **more)
    monkeypatch.setattr(pd.DataFrame, 'to_csv', refuse)
    with pytest.raises(InputError, match=r'fi/split.csv: Permission denied. .*split=FILE'): benchmark('fi', tmp_path / 'fi')
    table, _ = benchmark('fi', tmp_path / 'fi', split=tmp_path / 'mine.csv')
    assert (tmp_path / 'mine.csv').read_text().count(',test') == (table['split'] == 'test').sum() == 2


def test_an_official_split_without_a_part(tmp_path):
    for split in ('train', 'val'): pictures(tmp_path, f'{split}/a/1.jpg', f'{split}/b/1.jpg')
    with pytest.raises(InputError, match='pictures for train and val only'): benchmark('folder', tmp_path)
    pictures(tmp_path, *(f'testing/{c}/{i}.jpg' for c in 'ab' for i in range(3)), *(f'train/{c}/{i}.jpg' for c in 'ab' for i in range(9)))
    table, _ = benchmark('folder', tmp_path)
    assert table['split'].value_counts().to_dict() == {'train': 18, 'test': 6, 'val': 2} and not (tmp_path / 'split.csv').exists()


@given(st.lists(st.tuples(st.integers(0, 400), st.sampled_from('abc')), min_size=1, max_size=120, unique_by=lambda row: row[0]),
       st.integers(0, 3), st.booleans())
def test_shares_are_right_and_no_class_lacks_in_train(rows, seed, given_test):
    ids, strata = [str(i) for i, _ in rows], [s for _, s in rows]
    held = ('val',) if given_test else ('test', 'val')
    split = draw_split(ids, ids, strata, seed, held)
    assert len(split) == len(ids) and set(split) <= {'train', *held}
    shared = sum(n for n in Counter(strata).values() if n > 1)  # a class of one is for train
    for part in held:
        assert split.count(part) in (shared // 10, -(-shared // 10))
        for stratum, n in Counter(strata).items():
            assert sum(p == part and s == stratum for p, s in zip(split, strata)) in (n // 10, -(-n // 10))
    assert {s for p, s in zip(split, strata) if p == 'train'} == set(strata)
    order = sorted(range(len(ids)), key=lambda i: ids[i][::-1])
    assert draw_split([ids[i] for i in order], [ids[i] for i in order], [strata[i] for i in order], seed, held) == [split[i] for i in order]


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60))
def test_rows_of_one_picture_stay_together(images):
    split = draw_split([str(i) for i in range(len(images))], [str(i) for i in images], ['a'] * len(images))
    assert len({(image, part) for image, part in zip(images, split)}) == len(set(images))


def test_ratings_and_several_labels_are_stratified(tmp_path):
    write(tmp_path, 'labels.csv', 'image,labels\n' + ''.join(f'{i}.png,common{"|rare" if i < 20 else ""}\n' for i in range(100)))
    pictures(tmp_path, *(f'{i}.png' for i in range(100)))
    table, _ = benchmark('csv', tmp_path)
    assert table[table['rare'] == 1]['split'].value_counts().to_dict() == {'train': 16, 'val': 2, 'test': 2}
    oasis(tmp_path / 'o')
    table, task = benchmark('oasis', tmp_path / 'o')
    assert datasets.strata_of(table, task)[:3] == ['2', '4', '4']  # 2.5, 3.5, 4.5 by the rule of even neighbours


def test_a_new_set_is_one_function(tmp_path):
    @dataset('rooms', 'label')
    def rooms(files, task):
        path = files.annotation('moods.csv')
        table = read_rows(path, ('photo', 'label'))
        return {path: table.assign(id=table['photo'], image=table['photo'])}, single(['cold', 'cosy'])
    try:
        write(tmp_path, 'x/Moods.CSV', 'photo,label\n' + ''.join(f'room {i},{("cosy", "cold")[i % 2]}\n' for i in range(20)))
        pictures(tmp_path, *(f'photos/Room {i}.png' for i in range(20)))
        table, task = benchmark('rooms', tmp_path)
        assert table['image'][3] == 'photos/Room 3.png' and task.targets(table)[:2].ravel().tolist() == [1, 0]
        assert table['split'].value_counts().to_dict() == {'train': 16, 'val': 2, 'test': 2}
    finally: del datasets.READERS['rooms']


def test_a_task_is_frozen_and_compares():
    assert single(['a', 'b']) == Task('single-label', ('label',), (('a', 'b'),))
    with pytest.raises(AttributeError): single(['a', 'b']).kind = 'regression'
