"pacl.parts.pictures: every kind of file works or has a reason; the cache after kill -9; the same picture twice."
import io
import multiprocessing
import os
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, PngImagePlugin
from sklearn.datasets import load_sample_images

from pacl.parts import pictures
from pacl.parts.pictures import (
    ENDINGS, copies, fingerprints, image_or_reason, open_picture, read_image, read_images,
)
from pacl.parts.stages import InputError

PHOTO = Image.fromarray(load_sample_images().images[0])
TILES = [PHOTO.crop((x, y, x + 160, y + 106)) for y in range(0, 320, 106) for x in range(0, 640, 160)]


def saved(image, kind, **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def numbers(value, dtype): return Image.fromarray(np.full((6, 9), value, dtype))


text, text_bomb = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
text.add_text('prompt', 'x' * 2 * 2**20, zip=True)
text_bomb.add_text('prompt', 'x' * 70 * 2**20, zip=True)
red, grey = Image.new('RGB', (6, 9), 'red'), numbers(200, np.uint8)
OPENS = {  # name → content, how bright all pixels are; red ones: 76
    **{mode: (saved(grey.convert(mode), 'tiff'), 200) for mode in ('L', 'LA', 'P', 'RGBA', 'YCbCr')},
    **{kind: (saved(red, kind), 76) for kind in ('jpeg', 'gif', 'bmp', 'webp', 'tiff', 'avif', 'jpeg2000')},
    'black and white': (saved(Image.new('1', (6, 9), 1), 'png'), 255),
    'printed, jpeg': (saved(red.convert('CMYK'), 'jpeg'), 76),  # Adobe's store it inverted, TIFF does not
    'the first frame': (saved(red, 'gif', save_all=True, append_images=[grey]), 76),
    '16 bits': (saved(numbers(51_200, np.uint16), 'png'), 200),
    '16 bits, big end first': (saved(numbers(51_200, '>u2'), 'tiff'), 200),
    '32 bits': (saved(numbers(51_200, np.int32), 'tiff'), 200),
    'floats up to 1': (saved(numbers(0.5, np.float32), 'tiff'), 127),
    'floats a little beyond 1': (saved(numbers(1.1, np.float32), 'tiff'), 255),
    'floats up to 255': (saved(numbers(200, np.float32), 'tiff'), 200),
    'floats beyond': (saved(numbers(9e9, np.float32), 'tiff'), 255),
    'not a number': (saved(numbers(np.nan, np.float32), 'tiff'), 0),
    'see-through': (saved(Image.new('RGBA', (4, 4), (0, 0, 0, 0)), 'png'), 255),
    '2 MB of text': (saved(red, 'png', pnginfo=text), 76),
    'colour profile of 3 MB': (saved(red, 'png', icc_profile=bytes(3 * 2**20)), 76)}


@pytest.mark.parametrize('name', OPENS)
def test_any_kind_becomes_rgb(tmp_path, name):
    content, brightness = OPENS[name]
    (tmp_path / 'schön, und bewegt 1.JPG').write_bytes(content)  # whatever the name ends with
    pixels = image_or_reason(tmp_path, {'image': 'schön, und bewegt 1.JPG'}, 5)
    assert pixels.shape == (5, 5, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels @ [.299, .587, .114] - brightness).max() <= 2
    assert open_picture(tmp_path / 'schön, und bewegt 1.JPG').mode == 'RGB'


def test_endings_of_the_formats():
    assert ENDINGS >= {'.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.gif', '.bmp', '.webp', '.tif', '.tiff', '.avif', '.jp2'}
    assert not ENDINGS & {'.eps', '.pdf', '.txt', '.ico'}


def test_the_camera_is_held_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = PHOTO.transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(read_image(saved(stored, 'png', exif=exif), 16), square(PHOTO, 16))


def bomb(side):
    raw = bytearray(saved(Image.new('1', (8, 8)), 'png'))
    raw[16:24] = 2 * side.to_bytes(4)
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4)
    return bytes(raw)


NOISE = Image.effect_noise((64, 64), 50)
BROKEN = {  # name → content, what its reason has
    **{name: (None, 'no image') for name in ('gone.png', 'folder', '', 'pipe.png', 'loop.png', 'a\0b.png')},
    **{name: (None, 'leaves the folder') for name in ('../outside.png', 'folder/../../outside.png', '/x.png')},
    **{f'cut.{kind}': (saved(NOISE, kind)[:1000], 'corrupt, truncated or unreadable: ') for kind in ('jpeg', 'png', 'webp', 'tiff')},
    'x' * 5000: (None, 'File name too long'), 'empty.png': (b'', 'zero bytes'), 'page.jpg': (b'<html>', 'not an image'),
    'program.jpg': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n', 'not an image'),  # Pillow would start Ghostscript
    'text bomb.png': (saved(red, 'png', pnginfo=text_bomb), 'too large'),
    'bomb.png': (bomb(10_000), 'decompression bomb: 10,000×10,000 pixels'), 'larger.png': (bomb(65_000), 'decompression bomb')}


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('name', BROKEN)
def test_every_damage_has_a_reason(tmp_path, name):
    content, reason = BROKEN[name]
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'loop.png').symlink_to(tmp_path / 'loop.png')
    os.mkfifo(tmp_path / 'pipe.png')  # opening it would wait for ever
    if content is not None: (tmp_path / name).write_bytes(content)
    found = image_or_reason(tmp_path, {'image': name}, 4)
    assert isinstance(found, str) and reason in found and '\n' not in found
    if content is not None:
        with pytest.raises(InputError) as error: open_picture(tmp_path / name)
        assert str(error.value) == f'{tmp_path / name}: {found}'


def test_a_shard_is_read_in_place(tmp_path):
    row = {'image': 'a b.tar/0.png', 'offset': 512, 'bytes': len(saved(red, 'png'))}
    assert image_or_reason(tmp_path, row, 2) == 'no image'
    (tmp_path / 'a b.tar').write_bytes(bytes(512) + saved(red, 'png') + bytes(512))
    assert (image_or_reason(tmp_path, row, 2) == [255, 0, 0]).all()
    assert image_or_reason(tmp_path, row | {'offset': 9999}, 2) == 'zero bytes'


def flat_pictures(folder, n, bad=()):
    folder.mkdir()
    for i in range(n): Image.new('RGB', (9, 7), (i, i // 2, 0)).save(folder / f'{i:02} ü.png')
    for i in bad: (folder / f'{i:02} ü.png').write_bytes(b'no')
    return pd.DataFrame({'id': [f'{i:04}' for i in range(n)], 'image': [f'{i:02} ü.png' for i in range(n)], 'more': 'kept'})


def test_rows_and_pictures_stay_together(tmp_path):
    table = flat_pictures(tmp_path / 'a', 43, bad=[0, 20])
    table['missing'] = ['no text' if i == 7 else '' for i in range(43)]
    images, accepted, rejected = read_images(table, tmp_path / 'a', 4, tmp_path / 'cache')
    assert isinstance(images, np.memmap) and images[:, 0, 0, 0].tolist() == [int(id) for id in accepted['id']]
    assert dict(zip(rejected['id'], rejected['reason'])) == {'0000': 'not an image', '0007': 'no text', '0020': 'not an image'}


@pytest.fixture
def decoded(monkeypatch):
    "The names of the pictures that are decoded from now on."
    names = []
    monkeypatch.setattr(pictures, 'image_or_reason', lambda *args: names.append(args[1]['image']) or image_or_reason(*args))
    return names


def test_only_what_changed_is_decoded_again(tmp_path, decoded):
    table, root, cache = flat_pictures(tmp_path / 'a', 30, bad=[3]), tmp_path / 'a', tmp_path / 'cache'

    def times(size=4, table=table):
        decoded.clear()
        read_images(table, root, size, cache)
        return len(decoded)
    assert [times(), times(), times(5), times(), times(4, table[::-1]), times(4, table.assign(more='else'))] == [30, 0, 30, 0, 30, 0]
    os.utime(root / table['image'][5], (1, 1))
    assert times() == 30 and times() == 0


def test_too_many_unreadable_stop_those_not_there_do_not(tmp_path):
    table, root = flat_pictures(tmp_path / 'a', 50, bad=[0, 1]), tmp_path / 'a'
    for image in table['image'][40:]: (root / image).unlink()
    def read(rows=table, **given): return len(read_images(rows, root, 4, tmp_path / 'cache', **given)[0])
    assert read() == 38 and read(table[:3]) == 1  # few do not stop, unless none is left
    (root / table['image'][2]).write_bytes(b'no')
    for _ in range(2):  # the second time from the cache
        with pytest.raises(InputError, match='3 of 40 pictures in .*0000, 00 ü.png, not an image.* Mend'): read()
    assert read(tolerated=1) == 37
    with pytest.raises(InputError, match='3 of 3 '): read(table[:3], tolerated=1)
    with pytest.raises(InputError, match='0 of 0 .*no image'): read(table[40:])


def start(*args):
    child = multiprocessing.get_context('fork').Process(target=read_images, args=args)
    child.start()
    return child


def test_kill_in_the_middle_goes_on_to_the_same_bytes(tmp_path, monkeypatch, decoded):
    table, cache = flat_pictures(tmp_path / 'a', 90, bad=[2, 50]), tmp_path / 'cache'
    fresh = read_images(table, tmp_path / 'a', 16, tmp_path / 'fresh')
    monkeypatch.setattr(pictures, 'BATCH', 8)
    monkeypatch.setattr(pictures, 'image_or_reason', lambda *args, old=pictures.image_or_reason: time.sleep(.01) or old(*args))
    def pieces(): return len([*cache.glob('*/0*.npy')])
    for n in (1, 9):
        child = start(table, tmp_path / 'a', 16, cache)
        while pieces() < n: time.sleep(.002)
        child.kill()
        child.join()
    before = pieces()
    decoded.clear()
    again = read_images(table, tmp_path / 'a', 16, cache)
    assert 9 <= before < 12 and len(decoded) == 90 - 8 * before
    assert Path(again[0].filename).read_bytes() == Path(fresh[0].filename).read_bytes()
    for a, b in zip(again[1:], fresh[1:]): pd.testing.assert_frame_equal(a, b)
    assert sorted(path.suffix for path in cache.iterdir()) == ['.json', '.npy']


def square(image, size=96): return np.asarray(image.convert('RGB').resize((size, size), Image.Resampling.BICUBIC))


def saved_again(image, quality): return Image.open(io.BytesIO(saved(image, 'jpeg', quality=quality)))


def prints(images): return fingerprints(np.stack(images), np.arange(len(images)))


CHANGES = {'quality 60': lambda tile: saved_again(tile, 60), 'half': lambda tile: tile.resize((80, 53)),
           'cut': lambda tile: tile.crop((2, 1, 158, 105))}


@pytest.mark.parametrize('change', CHANGES)
def test_a_changed_copy_is_found_and_nothing_else(change):
    tiles = [square(tile) for tile in TILES]
    changed = [square(CHANGES[change](tile)) for tile in TILES[:3]]
    found = copies(prints([*tiles[3:], *changed]), prints(tiles[:3]))
    assert found[['i', 'j']].to_numpy().tolist() == [[len(tiles) - 3 + i, i] for i in range(3)]


def test_a_copy_is_named_with_its_first():
    a, b, near = square(TILES[0]), square(TILES[5]), square(saved_again(TILES[0], 60))
    plain, other = np.full_like(a, 90), np.full_like(a, 91)
    found = copies(prints([plain, other, near, a, b]), prints([plain, near, a]))
    assert found.to_numpy().tolist() == [[0, 0, 'exact'], [2, 1, 'exact'], [3, 2, 'exact']]
