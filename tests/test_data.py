"pacl.data: what is read, what is refused, what is skipped."
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pacl.data import contact_sheet, image_or_reason, load_set, read_image, read_images, read_labels, read_posts, run_data
from pacl.stages import InputError, read_record, write_stage

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
        for name in ('new', 'seen'):
            (world / name).mkdir()
            Image.new('RGB', (8, 8), 'red').save(world / name / 'a.png')
            pd.DataFrame([{'id': '0007', 'image': 'a.png', 'split': 'test', 'emotion': 'fear', 'object': 'red'}]).to_csv(
                world / name / 'labels.csv', index=False)
    return run


@pytest.fixture
def csv(tmp_path):
    def write(text):
        (tmp_path / 'table.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / 'table.csv'
    return write


def test_everything_stays_text(csv):
    posts = read_posts(csv('\ufeffid,image,text,likes\r\n0017,a.png,None,007\r\n1e3,b.png,"a, ""b""\nc",\r\n\r\n'))
    assert posts.to_dict('list') == {
        'id': ['0017', '1e3'], 'image': ['a.png', 'b.png'], 'text': ['None', 'a, "b"\nc'], 'likes': ['007', '']}


@pytest.mark.parametrize('text, says', [
    ('', ['is empty']),
    ('id,image,text\n', ['is empty']),
    ('id,image\n1,a.png\n', ['row 1', 'no column "text"', '"id,image"', 'Give']),
    ('id,image,text,text\n1,a.png,b,c\n', ['row 1', '2 column "text"']),
    ('id;image;text\n1;a.png;b\n', ['row 1', 'no column "id"']),
    ('id,image,text\n0017,a.png,b\n18,b.png,c\n0017,c.png,d\n', ['rows 2, 4', 'id 0017', '1 of 3']),
    ('id,image,text\n1,a.png,"b\nb"\n2,b.png,c\n2,c.png,d\n', ['rows 4, 5', 'id 2']),
    ('id,image,text\n1,a.png,b\n,b.png,c\n', ['row 3', 'id is ""']),
    ('id,image,text\n1,a.png,b\n\n0018,b.png,  \n', ['row 4', 'id 0018', 'text is "  "', '1 of 2']),
    ('id,image,text\n1,a.png,b, c\n', ['row 2', '4 values for 3 columns', 'double quotes']),
    ('id,image,text\n1,a.png\n', ['row 2', '2 values for 3 columns']),
    ('id,image,text\n1,a.png,b\n2,b.png,"c\n', ['row 3', 'quotes']),
    (b'id,image,text\n1,a.png,b\n2,b.png,caf\xe9\n', ['row 3', 'UTF-8']),
])
def test_a_wrong_table_is_named(csv, text, says):
    path = csv(text)
    with pytest.raises(InputError) as error: read_posts(path)
    for part in [str(path), *says]: assert part in str(error.value)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(InputError, match='posts.csv: No such file'): read_posts(tmp_path / 'posts.csv')


@pytest.mark.parametrize('row, says', [
    ('1,a.png,dev,fear,cat', ['split is "dev"', 'train, val, test']),
    ('1,a.png,val,,cat', ['emotion is ""']),
    ('1,a.png,val,fear, ', ['object is " "']),
])
def test_a_wrong_label_is_named(csv, row, says):
    with pytest.raises(InputError) as error: read_labels(csv(f'id,image,split,emotion,object\n0,b.png,train,awe,cat\n{row}\n'))
    for part in ['row 3 (id 1)', *says]: assert part in str(error.value)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'YCbCr'])
def test_any_mode_becomes_rgb(tmp_path, mode):
    grey = Image.fromarray(np.full((6, 9), 255, np.uint8))
    image = Image.fromarray(np.full((6, 9), 65535, np.uint16)) if mode == 'I;16' else grey.convert(mode)
    path = tmp_path / f'x.{"tif" if mode in ("CMYK", "YCbCr") else "png"}'
    image.save(path)
    pixels = read_image(path, 5)
    assert pixels.shape == (5, 5, 3) and pixels.dtype == np.uint8 and (pixels >= 254).all()


def test_see_through_is_white(tmp_path):
    Image.new('RGBA', (4, 4), (0, 0, 0, 0)).save(tmp_path / 'a.png')
    palette = Image.new('P', (4, 4), 0)
    palette.save(tmp_path / 'b.png', transparency=0)
    assert (read_image(tmp_path / 'a.png', 4) == 255).all() and (read_image(tmp_path / 'b.png', 4) == 255).all()


def test_the_camera_is_held_upright(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:2] = 255  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / 'a.png', exif=exif)
    assert read_image(tmp_path / 'a.png', 4)[0].max() == 0 and read_image(tmp_path / 'a.png', 4)[-1].min() == 255


def test_every_damage_has_a_reason(tmp_path):
    root = tmp_path / 'root'
    root.mkdir()
    Image.effect_noise((64, 64), 50).save(tmp_path / 'outside.png')
    for end in ('jpg', 'png'):
        Image.effect_noise((64, 64), 50).save(root / f'whole.{end}')
        (root / f'cut.{end}').write_bytes((root / f'whole.{end}').read_bytes()[:1000])
    (root / 'empty.png').touch()
    (root / 'page.jpg').write_text('<html>')
    (root / 'folder').mkdir()
    (root / 'loop.png').symlink_to(root / 'loop.png')
    for name, reason in {
        'gone.png': 'missing', 'folder': 'missing', '': 'missing', 'loop.png': '', 'a\0b.png': '', 'x' * 5000: '',
        'empty.png': 'zero bytes', 'page.jpg': 'not an image', 'cut.jpg': 'truncated', 'cut.png': 'corrupt',
        '../outside.png': 'leaves the folder', 'folder/../../outside.png': 'leaves the folder',
        str(tmp_path / 'outside.png'): 'leaves the folder',
    }.items():
        said = image_or_reason(root, name, 4)
        assert isinstance(said, str) and reason in said, (name, said)
    assert image_or_reason(root, 'folder/../whole.png', 4).shape == (4, 4, 3)


def flat_pictures(folder, n):
    for i in range(n): Image.new('RGB', (9, 7), (i, 2 * i, 0)).save(folder / f'{i:02} ü.png')
    return pd.DataFrame({'id': [f'{i:04}' for i in range(n)], 'image': [f'{i:02} ü.png' for i in range(n)], 'more': 'kept'})


def test_rows_and_pictures_stay_together(tmp_path):
    table = flat_pictures(tmp_path, 41)
    for i in (0, 20): (tmp_path / table['image'][i]).write_bytes(b'no')
    images, accepted, rejected = read_images(table, tmp_path, 4, tmp_path / 'x.npy')
    assert isinstance(images, np.memmap) and images.shape == (39, 4, 4, 3) and images.dtype == np.uint8
    assert [f'{i:04}' for i in images[:, 0, 0, 0]] == list(accepted['id'])
    assert list(rejected['id']) == ['0000', '0020'] and list(accepted.columns) == ['id', 'image', 'more']
    assert (np.load(tmp_path / 'x.npy') == images).all()


def test_more_than_5_percent_rejected_stops(tmp_path):
    table = flat_pictures(tmp_path, 40)
    for i in (3, 4): (tmp_path / table['image'][i]).unlink()
    read_images(table, tmp_path, 4, tmp_path / 'x.npy')  # 2 of 40 are 5 %
    (tmp_path / table['image'][5]).unlink()
    with pytest.raises(InputError) as error: read_images(table, tmp_path, 4, tmp_path / 'x.npy')
    for part in ('3 of 40', 'id 0003, "03 ü.png": missing', str(tmp_path), 'correct'): assert part in str(error.value)


def test_run_data(tmp_path):
    run = make_world(tmp_path / 'my runs', bad=[5, 33])
    out = run_data(run, image_size=6)
    table, images = load_set(run, 'posts')
    assert len(table) == len(images) == 58 and images.shape[1:] == (6, 6, 3) and table['id'][5] == '0006'
    assert (images[5] == (63, 0, 0)).all() and table['text'][5].endswith(('joy', 'grief'))
    assert load_set(run, 'new')[0]['id'].tolist() == ['0007'] and not (out / 'clean.csv').exists()  # this world has no clean set
    assert pd.read_csv(out / 'rejected.csv', dtype=str).to_dict('records') == [
        {'set': 'posts', 'id': id, 'image': f'images/{id}.png', 'reason': 'zero bytes'} for id in ('0005', '0033')]
    assert read_record(out)['result'] == {'posts': 58, 'new': 1, 'seen': 1, 'rejected': 2}
    assert run_data.stale(run, image_size=6) is None and 'image_size' in run_data.stale(run, image_size=8)


def test_posts_of_your_own(tmp_path):
    run, own = make_world(tmp_path / 'run'), tmp_path / 'own'
    own.mkdir()
    flat_pictures(own, 3).rename(columns={'more': 'text'}).to_csv(own / 'posts.csv', index=False)
    run_data(run, posts=str(own), image_size=4)
    assert len(load_set(run, 'posts')[0]) == 3 and len(load_set(run, 'seen')[0]) == 1


def test_a_wrong_table_leaves_nothing_half_written(tmp_path):
    run = make_world(tmp_path / 'run')
    before = run_data(run, image_size=4)
    record = (before / 'stage.json').read_text()
    with pytest.raises(InputError, match='posts.csv'): run_data(run, posts=str(tmp_path / 'nowhere'), image_size=4)
    assert (run / 'data/stage.json').read_text() == record and json.loads(record)['result']['posts'] == 60
    assert sorted(p.name for p in run.iterdir()) == ['data', 'world']


def test_contact_sheet_draws_each_picture():
    fig = contact_sheet(np.zeros((5, 4, 4, 3), np.uint8), ['a $ b', 'two $ signs $', 'c', 'd', 'x' * 500], columns=3)
    assert len(fig.axes) == 6 and sum(len(ax.images) for ax in fig.axes) == 5
    fig.canvas.draw()
