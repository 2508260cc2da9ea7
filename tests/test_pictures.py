"pacl.parts.pictures: every kind of file works or has a reason; the cache after kill -9; the same picture twice."
import io
import json
import multiprocessing
import os
import signal
import tarfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from pacl.parts import pictures
from pacl.parts.pictures import contact_sheet, duplicates, fingerprint, fingerprints, image_or_reason, read_image, read_images
from pacl.parts.stages import InputError

PHOTO = Image.fromarray(load_sample_images().images[0])


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I;16B', 'YCbCr', 'F'])
def test_any_mode_becomes_rgb(tmp_path, mode):
    grey = Image.fromarray(np.full((6, 9), 255, np.uint8))
    image = Image.fromarray(np.full((6, 9), 65535, '>u2' if mode == 'I;16B' else '<u2')) if mode.startswith('I') else grey.convert(mode)
    path = tmp_path / f'x.{"tif" if mode in ("CMYK", "YCbCr", "F", "I;16B") else "png"}'
    image.save(path)
    pixels = read_image(path, 5)
    assert pixels.shape == (5, 5, 3) and pixels.dtype == np.uint8 and (pixels >= 254).all()


@pytest.mark.parametrize('name', ['a.jpg', 'a.tif'])  # Adobe's JPEGs store CMYK inverted, TIFF does not
def test_printed_colours_are_not_inverted(tmp_path, name):
    Image.new('CMYK', (16, 16), (0, 255, 255, 0)).save(tmp_path / name)
    assert np.abs(read_image(tmp_path / name, 4).astype(int) - [255, 0, 0]).max() < 4


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 16).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (16, 1))).save(tmp_path / 'a.png')
    assert np.abs(read_image(tmp_path / 'a.png', 16)[0, :, 0].astype(int) - ramp // 256).max() <= 1


def test_see_through_is_white(tmp_path):
    Image.new('RGBA', (4, 4), (0, 0, 0, 0)).save(tmp_path / 'a.png')
    Image.new('P', (4, 4), 0).save(tmp_path / 'b.png', transparency=0)
    assert (read_image(tmp_path / 'a.png', 4) == 255).all() and (read_image(tmp_path / 'b.png', 4) == 255).all()


def test_first_frame_and_any_ending(tmp_path):
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
    frames[0].save(tmp_path / 'moves.gif', save_all=True, append_images=frames[1:])
    os.rename(tmp_path / 'moves.gif', tmp_path / 'schön, und bewegt 1.JPG')
    assert (image_or_reason(tmp_path, 'schön, und bewegt 1.JPG', 4) == [255, 0, 0]).all()


@pytest.mark.parametrize('shape', [(1, 1), (1, 20_000), (20_000, 1)])
def test_odd_shapes(tmp_path, shape):
    Image.fromarray(np.full((*shape, 3), 77, np.uint8)).save(tmp_path / 'a.png')
    assert (read_image(tmp_path / 'a.png', 6) == 77).all()


@pytest.mark.parametrize('orientation', range(1, 9))
def test_the_camera_is_held_upright_and_boxes_follow(tmp_path, orientation):
    upright = np.asarray(PHOTO.resize((96, 64)))
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
              6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / 'a.png', exif=exif)
    for box in (None, (10, 20, 50, 60), (-5, 30, 40, 900)):
        want = Image.fromarray(upright).crop((max(0, box[0]), max(0, box[1]), box[2], min(64, box[3]))) if box else Image.fromarray(upright)
        np.testing.assert_array_equal(read_image(tmp_path / 'a.png', 16, box), np.asarray(want.resize((16, 16), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize('orientation, box', [(1, None), (6, None), (1, (500, 100, 1500, 900)), (6, (100, 300, 900, 1500))])
def test_draft_is_as_good_as_the_whole_picture(tmp_path, orientation, box):
    exif = Image.Exif()
    exif[0x0112] = orientation
    PHOTO.resize((1920, 1281), Image.Resampling.BICUBIC).save(tmp_path / 'a.jpg', quality=90, exif=exif)
    with Image.open(tmp_path / 'a.jpg') as image: whole = pictures.upright_rgb(image)
    want = np.asarray(whole.resize((96, 96), Image.Resampling.BICUBIC, box)).astype(int)
    assert np.abs(read_image(tmp_path / 'a.jpg', 96, box) - want).mean() < 1


def test_draft_keeps_twice_the_size(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, 'upright_rgb', lambda image, old=pictures.upright_rgb: seen.append(image.size) or old(image))
    PHOTO.resize((1600, 800)).save(tmp_path / 'a.jpg')
    for box in (None, (0, 0, 200, 200)): read_image(tmp_path / 'a.jpg', 96, box)
    assert seen == [(400, 200), (1600, 800)]


@pytest.mark.parametrize('box', [(5, 5, 5, 9), (9, 5, 5, 9), (30, 0, 40, 9), (-9, 0, 0, 5)])
def test_an_empty_box_has_a_reason(tmp_path, box):
    Image.new('RGB', (20, 20)).save(tmp_path / 'a.jpg')
    assert image_or_reason(tmp_path, 'a.jpg', 4, box) == 'empty box'


def test_every_damage_has_a_reason(tmp_path):
    root = tmp_path / 'root'
    root.mkdir()
    Image.effect_noise((64, 64), 50).save(tmp_path / 'outside.png')
    for end in ('jpg', 'png', 'webp', 'tif'):
        Image.effect_noise((64, 64), 50).save(root / f'whole.{end}')
        (root / f'cut.{end}').write_bytes((root / f'whole.{end}').read_bytes()[:1000])
    (root / 'empty.png').touch()
    (root / 'page.jpg').write_text('<html>')
    (root / 'program.jpg').write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n')  # Pillow would start Ghostscript
    (root / 'folder').mkdir()
    (root / 'loop.png').symlink_to(root / 'loop.png')
    os.mkfifo(root / 'pipe.png')  # opening it would wait for ever
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for name, reason in {
            'gone.png': 'no image', 'folder': 'no image', '': 'no image', 'loop.png': 'no image', 'pipe.png': 'no image',
            'a\0b.png': 'no image', 'x' * 5000: 'File name too long', 'empty.png': 'zero bytes', 'page.jpg': 'not an image',
            'program.jpg': 'not an image', 'cut.jpg': 'truncated', 'cut.png': 'corrupt', 'cut.webp': 'corrupt', 'cut.tif': 'corrupt',
            '../outside.png': 'leaves the folder', 'folder/../../outside.png': 'leaves the folder',
            str(tmp_path / 'outside.png'): 'leaves the folder',
        }.items():
            said = image_or_reason(root, name, 4)
            assert isinstance(said, str) and reason in said, (name, said)
    assert image_or_reason(root, 'folder/../whole.png', 4).shape == (4, 4, 3)


@pytest.mark.parametrize('width, height', [(10_000, 10_000), (20_000, 10_000), (65_000, 65_000)])
def test_bombs_are_named_without_a_warning(tmp_path, width, height):
    Image.new('1', (8, 8)).save(tmp_path / 'a.png')
    raw = bytearray((tmp_path / 'a.png').read_bytes())
    raw[16:24] = width.to_bytes(4) + height.to_bytes(4)
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4)
    (tmp_path / 'a.png').write_bytes(raw)
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert image_or_reason(tmp_path, 'a.png', 8) == f'decompression bomb: {width:,}×{height:,} pixels'
    assert Image.MAX_IMAGE_PIXELS == limit


def test_pictures_in_shards(tmp_path):
    with tarfile.open(tmp_path / 'a b.tar', 'w') as tar:
        for name, colour in (('0.png', 'red'), ('sub/../../1.png', 'blue')):
            Image.new('RGB', (9, 9), colour).save(file := io.BytesIO(), 'png')
            info = tarfile.TarInfo(name)
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)
    with tarfile.open(tmp_path / 'a b.tar') as tar: parts = [(m.name, m.offset_data, m.size) for m in tar]
    table = pd.DataFrame([{'id': n, 'image': f'a b.tar/{n}', 'offset': o, 'bytes': b} for n, o, b in parts])
    images, rows, rejected = read_images(table, tmp_path, 2, tmp_path / 'cache')
    assert images[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]] and len(rejected) == 0
    assert image_or_reason(tmp_path, '../x.tar/a.png', 4, part=(512, 9)) == 'leaves the folder'
    assert image_or_reason(tmp_path, 'x.tar/a.png', 4, part=(512, 9)) == 'no image'
    size = (tmp_path / 'a b.tar').stat().st_size
    assert image_or_reason(tmp_path, 'a b.tar/a.png', 4, part=(size - 5, 9)) == 'the shard is cut off'
    assert image_or_reason(tmp_path, 'a b.tar/a.png', 4, part=(size + 5, 9)) == 'zero bytes'


def flat_pictures(folder, n):
    folder.mkdir(exist_ok=True)
    for i in range(n): Image.new('RGB', (9, 7), (i, i // 2, 0)).save(folder / f'{i:02} ü.png')
    return pd.DataFrame({'id': [f'{i:04}' for i in range(n)], 'image': [f'{i:02} ü.png' for i in range(n)], 'more': 'kept'})


def test_rows_and_pictures_stay_together(tmp_path):
    table = flat_pictures(tmp_path / 'a', 43)
    for i in (0, 20): (tmp_path / 'a' / table['image'][i]).write_bytes(b'no')
    table['missing'] = ['no text' if i in (7, 40) else '' for i in range(43)]
    images, accepted, rejected = read_images(table, tmp_path / 'a', 4, tmp_path / 'cache')
    assert isinstance(images, np.memmap) and images.shape == (39, 4, 4, 3) and images.dtype == np.uint8
    assert [f'{i:04}' for i in images[:, 0, 0, 0]] == list(accepted['id'])
    assert rejected.to_dict('list') == {'id': ['0000', '0007', '0020', '0040'], 'image': [f'{i:02} ü.png' for i in (0, 7, 20, 40)],
                                        'reason': ['not an image', 'no text', 'not an image', 'no text']}
    assert list(accepted.columns) == ['id', 'image', 'more', 'missing']


def test_only_what_changed_is_decoded_again(tmp_path, monkeypatch):
    table, root, decoded = flat_pictures(tmp_path / 'a', 30), tmp_path / 'a', []
    (root / table['image'][3]).write_bytes(b'no')
    monkeypatch.setattr(pictures, 'image_or_reason', lambda *args: decoded.append(args[1]) or image_or_reason(*args))

    def times(**changes):
        decoded.clear()
        given = dict(table=table, root=root, size=4, cache=tmp_path / 'cache') | changes
        images, rows, rejected = read_images(**given)
        assert len(images) == len(rows) == len(given['table']) - len(rejected)
        return len(decoded)
    boxed = table.assign(x1=0, y1=0, x2=4, y2=4)
    assert [times(), times(), times(size=5), times(table=boxed), times(table=boxed, person_box=True), times(table=table[::-1])] == [
        30, 0, 30, 0, 30, 30]
    assert times() == 0  # the other files are still there
    os.utime(root / table['image'][5], (1, 1))
    assert times() == 30 and times() == 0
    (file,) = [f for f in (tmp_path / 'cache').glob('*.npy') if f.stat().st_mtime_ns == max(
        g.stat().st_mtime_ns for g in (tmp_path / 'cache').glob('*.npy'))]
    time.sleep(.02)
    with open(file, 'r+b') as array: array.seek(200); array.write(b'x')  # someone writes into it
    assert times() == 30
    assert times(table=table.assign(missing='no text').assign(missing=lambda t: t['missing'].where(t.index > 0, ''))) == 1


@pytest.mark.parametrize('tolerated', [.05, .1])
def test_too_many_unreadable_stop_those_not_there_do_not(tmp_path, tolerated):
    table, root = flat_pictures(tmp_path / 'a', 60), tmp_path / 'a'
    bad = int(tolerated * 40)
    for i in range(bad): (root / table['image'][i]).write_bytes(b'no')
    for i in range(20, 30): (root / table['image'][i]).unlink()
    table['missing'] = ['no image' if i >= 50 else '' for i in range(60)]  # 40 are there
    read_images(table, root, 4, tmp_path / 'cache', tolerated=tolerated)
    (root / table['image'][bad]).write_bytes(b'no')
    for _ in range(2):  # the second time from the cache
        with pytest.raises(InputError) as error: read_images(table, root, 4, tmp_path / 'cache', tolerated=tolerated)
        for part in (f'{bad + 1} of 40', f'more than {tolerated * 100:g} %', 'id 0000, "00 ü.png": not an image', str(root), 'Mend'):
            assert part in str(error.value)


def test_few_pictures_do_not_stop_unless_none_is_left(tmp_path):
    table, root = flat_pictures(tmp_path / 'a', 10), tmp_path / 'a'
    for name in table['image'][:9]: (root / name).write_bytes(b'no')
    assert len(read_images(table, root, 4, tmp_path / 'cache')[0]) == 1
    (root / table['image'][9]).write_bytes(b'no')
    with pytest.raises(InputError, match='none is left'): read_images(table, root, 4, tmp_path / 'cache')
    for name in table['image']: (root / name).unlink()
    with pytest.raises(InputError, match='0 of 0 .*no image'): read_images(table, root, 4, tmp_path / 'cache')


def slow(monkeypatch, seconds):
    monkeypatch.setattr(pictures, 'image_or_reason', lambda *args, old=image_or_reason: time.sleep(seconds) or old(*args))


def journal(cache):
    found = list(cache.glob('*.rows'))
    return found[0].read_bytes().count(b'\n') if found else 0


def test_kill_in_the_middle_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    table, root, cache = flat_pictures(tmp_path / 'a', 90), tmp_path / 'a', tmp_path / 'cache'
    for i in (2, 50): (root / table['image'][i]).write_bytes(b'no')
    fresh = read_images(table, root, 16, tmp_path / 'fresh')
    slow(monkeypatch, .01)
    for at in (1, 30, 31, 70):
        child = multiprocessing.get_context('fork').Process(target=read_images, args=(table, root, 16, cache))
        child.start()
        while journal(cache) < at: time.sleep(.002)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert at <= journal(cache) < 90 and not list(cache.glob('*.npy'))
    before, decoded = journal(cache), []
    monkeypatch.setattr(pictures, 'image_or_reason', lambda *args: decoded.append(args[1]) or image_or_reason(*args))
    again = read_images(table, root, 16, cache)
    assert len(decoded) == 90 - before
    a, b = (Path(images.filename) for images in (again[0], fresh[0]))
    assert a.name == b.name and a.parent != b.parent and a.read_bytes() == b.read_bytes()
    for a, b in zip(again[1:], fresh[1:]): pd.testing.assert_frame_equal(a, b)
    assert sorted(p.suffix for p in cache.iterdir() if p.name != '.lock') == ['.npy', '.rows']


@pytest.mark.parametrize('damage', ['half a line', 'half a picture', 'pixels lost', 'journal unreadable', 'all done but the renaming'])
def test_what_a_kill_may_leave(tmp_path, damage):
    table, root, cache = flat_pictures(tmp_path / 'a', 40), tmp_path / 'a', tmp_path / 'cache'
    (root / table['image'][1]).write_bytes(b'no')
    images, _, rejected = read_images(table, root, 8, cache)
    want = images.copy()
    (array,), (log,) = cache.glob('*.npy'), cache.glob('*.rows')
    del images
    part, begin, row = array.with_suffix('.part'), 128, 8 * 8 * 3
    array.rename(part)
    lines = log.read_text().splitlines(keepends=True)
    assert part.stat().st_size == begin + 39 * row
    if damage == 'half a line': log.write_text(''.join(lines[:20]) + '"not an im'); os.truncate(part, begin + 20 * row)
    if damage == 'half a picture': log.write_text(''.join(lines[:20])); os.truncate(part, begin + 19 * row + 50)
    if damage == 'pixels lost': log.write_text(''.join(lines[:20])); os.truncate(part, begin + 10 * row)
    if damage == 'journal unreadable': log.write_bytes(''.join(lines[:20]).encode() + b'\0\0\0\n')
    images, _, again = read_images(table, root, 8, cache)
    np.testing.assert_array_equal(images, want)
    pd.testing.assert_frame_equal(again, rejected)


def test_two_at_once_decode_once(tmp_path, monkeypatch):
    table, root, cache = flat_pictures(tmp_path / 'a', 40), tmp_path / 'a', tmp_path / 'cache'

    def noted(*args):
        with open(tmp_path / 'decoded', 'a') as file: file.write('x')
        time.sleep(.005)
        return image_or_reason(*args)
    monkeypatch.setattr(pictures, 'image_or_reason', noted)
    children = [multiprocessing.get_context('fork').Process(target=read_images, args=(table, root, 4, cache)) for _ in range(3)]
    for child in children: child.start()
    for child in children: child.join()
    assert [child.exitcode for child in children] == [0, 0, 0] and (tmp_path / 'decoded').stat().st_size == 40
    assert read_images(table, root, 4, cache)[0][:, 0, 0, 0].tolist() == list(range(40))


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    table = flat_pictures(tmp_path / 'a', 3)
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(pictures, 'fill_array', full)
    with pytest.raises(InputError, match='the disk is full'): read_images(table, tmp_path / 'a', 4, tmp_path / 'cache')


def square(image, size=96): return np.asarray(image.convert('RGB').resize((size, size), Image.Resampling.BICUBIC))


def saved_again(image, quality):
    image.save(file := io.BytesIO(), 'jpeg', quality=quality)
    return Image.open(file)


TILES = [PHOTO.crop((x, y, x + 160, y + 106)) for y in range(0, 320, 106) for x in range(0, 640, 160)]


@pytest.mark.parametrize('change', [
    lambda t: saved_again(t, 60), lambda t: t.resize((80, 53)), lambda t: t.convert('L'), lambda t: t.crop((2, 1, 158, 105)),
    lambda t: t.crop((3, 0, 160, 106)), lambda t: saved_again(t.resize((120, 80)), 75)], ids='q60 half grey crop edge q75'.split())
def test_a_changed_copy_is_found_and_nothing_else(change):
    images = np.stack([square(t) for t in [*TILES, *map(change, TILES[:6])]])
    found = duplicates(fingerprints(images))
    n = len(TILES)
    assert found[['i', 'j']].to_numpy().tolist() == [[i, n + i] for i in range(6)] and set(found['kind']) <= {'near', 'exact'}
    found = duplicates(fingerprints(images[n:]), fingerprints(images[:n]))
    assert found[['i', 'j']].to_numpy().tolist() == [[i, i] for i in range(6)]


def test_black_bars_hardly_make_pictures_alike():
    images = np.stack([square(t) for t in TILES])
    images[:, :14] = images[:, -14:] = 0
    assert len(duplicates(fingerprints(images))) <= 1  # two tiles of plain sky; with the largest steps not cut off, most of them


def test_groups_are_named_by_their_first(tmp_path):
    a, b = square(TILES[0]), square(TILES[5])
    near = square(saved_again(TILES[0], 60))
    flat, other = np.full_like(a, 90), np.full_like(a, 91)
    images = np.stack([b, near, a, flat, near, a, other, flat, b])
    found = duplicates(fingerprints(images))
    assert found.to_numpy().tolist() == [[1, 2, 'near'], [1, 4, 'exact'], [1, 5, 'exact'], [3, 7, 'exact'], [0, 8, 'exact']]
    found = duplicates(fingerprints(np.stack([flat, other, near, a, b])), fingerprints(np.stack([flat, a])))
    assert found.to_numpy().tolist() == [[0, 0, 'exact'], [2, 1, 'near'], [3, 1, 'exact']]


def test_some_rows_have_the_same_fingerprints(tmp_path):
    images = np.stack([square(t) for t in TILES])
    rows = np.array([5, 1, 7])
    for some, every in zip(fingerprints(images, rows), fingerprints(images)): np.testing.assert_array_equal(some, every[rows])
    steps = fingerprint(images)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), 1, rtol=1e-5)
    grey = images.astype(float) @ [.299, .587, .114]
    fields = grey.reshape(len(grey), 8, 12, 8, 12).mean((2, 4))  # 96 is 8 × 12
    want = np.concatenate([np.diff(fields, axis=1).reshape(len(grey), -1), np.diff(fields, axis=2).reshape(len(grey), -1)], 1)
    limit = 1 + 2 * np.median(np.abs(want), axis=1, keepdims=True)
    want = want.clip(-limit, limit)
    np.testing.assert_allclose(steps, want / np.linalg.norm(want, axis=1, keepdims=True), atol=1e-4)


def test_many_placeholders_stay_few_pairs():
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((6000, 112)).astype(np.float32)
    steps[:2000] = steps[0] + .05 * steps[:2000]  # nearly the same
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    hashes = np.arange(6000, dtype=np.uint64)
    hashes[3000:5000], steps[3000:5000] = 7777, steps[3000]
    found = duplicates((steps, hashes))
    assert len(found) == 1999 + 1999 and found['kind'].value_counts().to_dict() == {'near': 1999, 'exact': 1999}
    assert set(found['i']) == {0, 3000}


def test_contact_sheet_draws_each_picture():
    fig = contact_sheet(np.zeros((5, 4, 4, 3), np.uint8), ['a $ b', 'two $ signs $', 'c', 'd', 'x' * 500], columns=3)
    assert len(fig.axes) == 6 and sum(len(ax.images) for ax in fig.axes) == 5
    fig.canvas.draw()


def test_the_journal_is_plain_json_lines(tmp_path):
    table = flat_pictures(tmp_path / 'a', 3)
    (tmp_path / 'a' / table['image'][1]).write_bytes(b'no')
    read_images(table, tmp_path / 'a', 4, tmp_path / 'cache')
    (log,) = (tmp_path / 'cache').glob('*.rows')
    assert [json.loads(line) for line in log.read_text().splitlines()] == ['', 'not an image', '']
