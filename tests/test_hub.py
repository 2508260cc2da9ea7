"""pacl.parts.encoders' registries without a network: stand-ins of the true architectures, randomly initialised, in the hub's own layout.
Other tests import `make_backbone`, `make_open_clip`, `make_text_encoder` and `in_hub` from here."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pacl.parts.encoders import (BACKBONES, TEXT_ENCODERS, encode_texts, load, load_backbone, load_open_clip, load_text_encoder, run_features,
                           run_frozen, save_backbone, text_encoder_of, to_input)
from pacl.parts.stages import InputError, read_record, write_stage

WORDS = 'so happy sad the a cat dog rain joy and fear of it is i am feeling'.split()
LETTERS = 'abcdefghijklmnopqrstuvwxyz'


# stand-ins

def make_backbone(name, folder, seed=0):
    "What the hub holds of a timm model: config.json and model.safetensors, with its classifier."
    torch.manual_seed(seed)
    full = BACKBONES.get(name, name)
    model = timm.create_model(full, pretrained=False)
    folder.mkdir(parents=True, exist_ok=True)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    config = json.loads((folder / 'config.json').read_text())  # the hub's copies name the architecture without quickgelu
    config['architecture'] = config['architecture'].replace('quickgelu_', '')
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def make_open_clip(name, folder, seed=0):
    "open_clip_config.json and open_clip_model.safetensors of both towers; `name` as 'ViT-B-32/openai', the text tower one layer deep."
    import open_clip
    torch.manual_seed(seed)
    model, weights = name.split('/')
    quick = open_clip.get_pretrained_cfg(model, weights).get('quick_gelu', False)
    clip = open_clip.create_model(model, force_quick_gelu=quick)
    config = open_clip.get_model_config(model) | {'quick_gelu': quick}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(clip.state_dict(), folder / 'open_clip_model.safetensors')
    seen = {k: clip.visual.preprocess_cfg[k] for k in ('mean', 'std', 'interpolation', 'resize_mode')}
    (folder / 'open_clip_config.json').write_text(json.dumps({'model_cfg': config, 'preprocess_cfg': seen}))
    return folder


def make_text_encoder(kind, folder, seed=0):
    "Two layers of 32 features with a vocabulary of a few words, in the files that the authors' own tokenizer has."
    import transformers
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    def write(name, text): (folder / name).write_text(text, encoding='utf-8')
    if kind in ('skep', 'roberta'):
        from transformers.convert_slow_tokenizer import bytes_to_unicode
        tokens = ['<s>', '<pad>', '</s>', '<unk>', *bytes_to_unicode().values(), 'Ġs', 'ad', 'Ġsad', '<mask>']
        write('vocab.json', json.dumps({token: i for i, token in enumerate(tokens)}))
        write('merges.txt', '#version: 0.2\nĠ s\na d\nĠs ad\n')
        write('tokenizer_config.json', json.dumps({'model_max_length': 512}))
        config = transformers.RobertaConfig(vocab_size=len(tokens), max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, **small)
        model = transformers.RobertaModel(config)
    elif kind in ('bertweet', 'bertweet-sentiment'):
        tokens = ['@USER', 'HTTPURL', ':face_with_tears_of_joy:', *WORDS, *LETTERS, *'!,', *(f'{c}@@' for c in LETTERS)]
        write('vocab.txt', ''.join(f'{token} {9000 - i}\n' for i, token in enumerate(tokens)))  # token and count
        merges, joined = [], set()
        for word in ['@USER', 'HTTPURL', ':face_with_tears_of_joy:', *WORDS]:
            parts = [*word[:-1], word[-1] + '</w>']
            while len(parts) > 1:
                if (pair := tuple(parts[:2])) not in joined: merges.append(f'{pair[0]} {pair[1]} {9000 - len(merges)}'); joined.add(pair)
                parts[:2] = [''.join(pair)]
        write('bpe.codes', '\n'.join(merges) + '\n')
        write('tokenizer_config.json', json.dumps({'model_max_length': 128}))
        config = transformers.RobertaConfig(vocab_size=len(tokens) + 5, max_position_embeddings=130, type_vocab_size=1, pad_token_id=1,
                                            tokenizer_class='BertweetTokenizer', **small)
        model = transformers.RobertaModel(config) if kind == 'bertweet' else transformers.RobertaForSequenceClassification(config)
    else:  # WordPiece
        tokens = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS, *LETTERS, *'!,', *(f'##{c}' for c in LETTERS)]
        write('vocab.txt', '\n'.join(tokens) + '\n')
        write('tokenizer_config.json', json.dumps({'do_lower_case': True, 'model_max_length': 512}))
        if kind == 'distilbert':
            config = transformers.DistilBertConfig(vocab_size=len(tokens), dim=32, n_layers=2, n_heads=2, hidden_dim=64)
            model = transformers.DistilBertModel(config)
        else: model = transformers.BertModel(transformers.BertConfig(vocab_size=len(tokens), **small))
    model.save_pretrained(folder)
    if kind == 'skep':  # a pickle on the hub
        (folder / 'model.safetensors').unlink()
        torch.save(model.state_dict(), folder / 'pytorch_model.bin')
    if kind == 'minilm':
        (folder / '1_Pooling').mkdir(exist_ok=True)
        write('1_Pooling/config.json', json.dumps({'pooling_mode_cls_token': False, 'pooling_mode_mean_tokens': True}))
    return folder


def in_hub(cache, hub, revision='0' * 40, refs=('main',)):
    "The folder of a revision of the repository `hub` in the Hugging Face cache `cache` (HF_HOME/hub)."
    place = cache / f'models--{hub.replace("/", "--")}'
    (place / 'refs').mkdir(parents=True, exist_ok=True)
    for ref in refs: (place / 'refs' / ref).write_text(revision)
    folder = place / 'snapshots' / revision
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty cache, and no network."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    return tmp_path / 'hub'


PICTURES = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
REVISION = 'abcdef0123' * 4


def shapes(model): return {k: v.shape for k, v in model.state_dict().items()}


def timm_id(name): return timm.get_pretrained_cfg(BACKBONES.get(name, name)).hf_hub_id


# the visual encoders

@pytest.mark.parametrize('name', BACKBONES)
@torch.no_grad()
def test_the_papers_backbones(hub, tmp_path, name):
    folder = make_backbone(name, in_hub(hub, timm_id(name)))
    backbone = load_backbone(name)
    expected = timm.create_model(BACKBONES[name], pretrained=True).eval()
    expected.reset_classifier(0)
    assert not backbone.training and shapes(backbone) == shapes(expected)
    assert backbone.num_features == (2048 if name == 'resnet50' else 768)
    # as timm itself prepares a square of that size, and as it computes
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(expected) | {'crop_pct': 1.})
    x = torch.stack([transform(Image.fromarray(picture)) for picture in PICTURES])
    torch.testing.assert_close(to_input(PICTURES, backbone), x, rtol=0, atol=1e-5)
    features = expected(x).numpy()
    def same(found): np.testing.assert_allclose(found, features[:len(found)], rtol=1e-3, atol=1e-3)
    same(run_frozen(backbone, PICTURES, 'pictures', backbone))
    same(load_backbone(str(folder))(x[:1]))  # the hub's folder by its path …
    save_backbone(backbone, tmp_path / 'enhanced', 224)
    same(load(tmp_path / 'enhanced')(Image.fromarray(PICTURES[0])))
    again = timm.create_model(f'local-dir:{tmp_path / "enhanced"}', pretrained=True, num_classes=0).eval()
    same(again(x[:1]))  # … and ours, which adds nothing
    assert shapes(again) == shapes(expected)
    classifier = 4 * (512 if name == 'vit_clip' else 1000) * (again.num_features + 1)
    sizes = [(f / 'model.safetensors').stat().st_size for f in (folder, tmp_path / 'enhanced')]
    assert 0 <= sizes[0] - sizes[1] - classifier < 1024  # and the classifier's lines of the header


@pytest.mark.parametrize('name', ['ViT-B-32/openai', 'ViT-B-32/laion2b_s34b_b79k', 'coca_ViT-B-32/laion2b_s13b_b90k'])
@torch.no_grad()
def test_towers_of_open_clip(hub, tmp_path, monkeypatch, name):
    import open_clip
    model, weights = name.split('/')
    for config in ('text_cfg', 'vision_cfg'): monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS[model][config], 'layers', 1)
    if 'multimodal_cfg' in (config := open_clip.factory._MODEL_CONFIGS[model]): monkeypatch.setitem(config['multimodal_cfg'], 'layers', 1)
    known = open_clip.get_pretrained_cfg(model, weights)
    folder = make_open_clip(name, in_hub(hub, known['hf_hub'].strip('/')))
    backbone = load_backbone(f'open_clip:{name}')
    expected, transform = open_clip.create_model_from_pretrained(model, weights, force_quick_gelu=known.get('quick_gelu', False))
    x = torch.stack([transform(Image.fromarray(picture)) for picture in PICTURES])
    torch.testing.assert_close(to_input(PICTURES, backbone), x, rtol=0, atol=1e-5)
    features = expected.eval().encode_image(x, normalize=False).numpy()
    def same(found): np.testing.assert_allclose(found, features, rtol=1e-4, atol=1e-4)
    same(run_frozen(backbone, PICTURES, 'pictures', backbone))
    same(load_backbone(f'open_clip:{folder}')(x))
    same(load_open_clip(name).encode_image(x, normalize=False))
    assert backbone.num_features == features.shape[1] == 512
    save_backbone(backbone, tmp_path / 'enhanced', 224)
    again = load(tmp_path / 'enhanced')
    same(again([Image.fromarray(picture) for picture in PICTURES]))
    assert shapes(again.backbone) == shapes(expected.visual)


def test_openais_activation_is_its_own(tmp_path):
    folder = make_backbone('vit_clip', tmp_path / 'vit clip')
    assert 'vit_base_patch32_clip_224' in (folder / 'config.json').read_text()
    assert type(load_backbone(str(folder)).blocks[0].mlp.act).__name__ == 'QuickGELU' and 'quickgelu' in BACKBONES['vit_clip']


@torch.no_grad()
def test_how_a_model_was_made_is_kept(tmp_path):
    "Its size, where that is not the architecture's first, and arguments such as the pooling."
    folder = make_backbone('vit_tiny_patch16_384.augreg_in21k_ft_in1k', tmp_path / 'theirs')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | {'model_args': {'global_pool': 'avg', 'fc_norm': False}}))
    backbone = load_backbone(str(folder))
    save_backbone(backbone, tmp_path / 'ours', 384)
    x = torch.rand(1, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    expected = backbone.forward_features(x)[:, 1:].mean(1)
    for found in (backbone, load(tmp_path / 'ours').backbone): torch.testing.assert_close(found(x), expected)


def test_a_revision_is_kept_to(hub):
    for revision, seed in (('0' * 40, 0), (REVISION, 1)): make_backbone('resnet18', in_hub(hub, timm_id('resnet18'), revision), seed)
    in_hub(hub, timm_id('resnet18'), '0' * 40)  # main
    names = 'resnet18', f'resnet18@{REVISION}', 'resnet18.a1_in1k', f'timm/resnet18.a1_in1k@{REVISION}'
    weights = [load_backbone(name).conv1.weight for name in names]
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights[1], weights[3]) and not torch.equal(weights[0], weights[1])
    for revision, seed in (('0' * 40, 0), (REVISION, 1)): make_text_encoder('bert', in_hub(hub, TEXT_ENCODERS['bert'][0], revision), seed)
    in_hub(hub, TEXT_ENCODERS['bert'][0], '0' * 40)
    (vocab := in_hub(hub, TEXT_ENCODERS['bert'][0], REVISION, ()) / 'vocab.txt').write_text(vocab.read_text().replace('sad', 'mad'))
    first, other = map(load_text_encoder, ('bert', f'bert@{REVISION}'))
    assert not torch.equal(*(e.model.embeddings.word_embeddings.weight for e in (first, other)))
    assert first.tokenizer.tokenize('sad') == ['sad'] and other.tokenizer.tokenize('sad') == ['s', '##a', '##d']


# the text encoders

TEXTS = ['so happy', 'I am feeling sad and happy, so sad!', '', 'the cat of joy ' * 40, 'the dog 😂 @bob https://a.b/c', 'so happy']


def plain(name, hub, texts, max_length, pooling):
    "Each text by itself, by transformers' own call."
    from transformers import AutoModel, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(hub, **{'normalization': True} if 'bertweet' in name else {})
    model = AutoModel.from_pretrained(hub).eval()
    with torch.no_grad():
        batches = [tokenizer(text, truncation=True, max_length=max_length, return_tensors='pt') for text in texts]
        states = [model(**batch).last_hidden_state[0] for batch in batches]
    return torch.stack([state[0] if pooling == 'cls' else state.mean(0) for state in states]).numpy()


@pytest.mark.parametrize('name', TEXT_ENCODERS)
def test_text_encoders_by_name(hub, name):
    official, pooling = TEXT_ENCODERS[name]
    folder = make_text_encoder(name, in_hub(hub, official))
    encoder = load_text_encoder(name)
    assert encoder.pooling == pooling == ('mean' if name == 'minilm' else 'cls') and encoder.max_length == 77 and not encoder.model.training
    expected = plain(name, official, TEXTS, 77, pooling)
    for found in (encoder, load_text_encoder(official), load_text_encoder(folder)):
        np.testing.assert_allclose(encode_texts(found, TEXTS, batch_size=4), expected, atol=1e-5)
    assert len({row.tobytes() for row in expected.round(4)}) == 5  # the vocabulary tells them apart
    most = 128 if 'bertweet' in name else 512
    long = load_text_encoder(name, max_length=9999)
    assert long.max_length == most
    np.testing.assert_allclose(encode_texts(long, ['so sad ' * 600]), plain(name, official, ['so sad ' * 600], most, pooling), atol=1e-5)


def test_bertweet_reads_tweets(hub, monkeypatch):
    folder = make_text_encoder('bertweet', hub / 'bertweet')
    assert load_text_encoder(folder).tokenizer.tokenize('so happy 😂 @bob https://a.b/c') == \
        ['so', 'happy', ':face_with_tears_of_joy:', '@USER', 'HTTPURL']
    monkeypatch.setitem(sys.modules, 'emoji', None)
    with pytest.raises(InputError, match='reads emoji by their names. Install them: pip install emoji'): load_text_encoder(folder)


def test_half_precision_weights_become_float32(tmp_path):
    file = make_text_encoder('bert', tmp_path) / 'model.safetensors'
    save_file({k: v.half() for k, v in load_file(file).items()}, file, metadata={'format': 'pt'})
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | {'dtype': 'float16'}))
    assert load_text_encoder(tmp_path).model.dtype == torch.float32


# what cannot be had

def test_names_that_cannot_be_found(hub):
    for load_it, name, says in [
        (load_backbone, 'vit_bse', 'backbone=vit_bse: no folder, and no model with weights that timm knows; nearest valid: vit_base'),
        (load_backbone, 'resnet50.a1_in2k', 'nearest valid: resnet50.a1_in1k'),
        (load_backbone, 'vit_base',
         f'backbone=vit_base: timm/vit_base_patch16_224.augreg2_in21k_ft_in1k cannot be loaded from the cache {hub} or the hub: '
         '.*HF_HUB_OFFLINE forbids; or bring the cache .*HF_HOME.* a folder with config.json and model.safetensors'),
        (load_backbone, 'somebody/model', 'backbone=somebody/model: somebody/model cannot be loaded from the cache'),
        (load_backbone, '/no/where', 'backbone=/no/where: there is no folder /no/where. Give one with config.json and model.safetensors'),
        (load_backbone, 'open_clip:ViT-B-23/openai', 'open_clip:ViT-B-23/openai: no folder, .*; nearest valid: ViT-B-32/openai'),
        (load_backbone, 'open_clip:ViT-B-32/openai', 'open_clip:ViT-B-32/openai: .* cannot be loaded from the cache'),
        (load_text_encoder, 'skep', 'text_encoder=skep: Yaxin/roberta-large-ernie2-skep-en cannot be loaded from the cache'),
        (load_text_encoder, 'brt', 'Short names: skep, bert, roberta'),
        (load_text_encoder, './none', 'there is no folder ./none'),
    ]:
        with pytest.raises(InputError, match=says): load_it(name)


class Payload:
    def __init__(self, file): self.file = file
    def __reduce__(self): return open, (str(self.file), 'w')


@pytest.mark.parametrize('kind', ['text', 'timm', 'open_clip'])
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, kind):
    proof, folder = tmp_path / 'proof', tmp_path / 'model'
    if kind == 'text': make_text_encoder('skep', folder)
    elif kind == 'timm': make_backbone('resnet18', folder)
    else:
        import open_clip
        for config in ('text_cfg', 'vision_cfg'): monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS['ViT-B-32'][config], 'layers', 1)
        make_open_clip('ViT-B-32/openai', folder)
    for file in folder.glob('*.safetensors'): file.unlink()
    torch.save({'embeddings.word_embeddings.weight': torch.zeros(2), 'x': Payload(proof)},
               folder / ('open_clip_pytorch_model.bin' if kind == 'open_clip' else 'pytorch_model.bin'))
    name = f'open_clip:{folder}' if kind == 'open_clip' else str(folder)
    with pytest.raises(InputError, match='holds a pickle with more than weights in it. .* it is refused. Take a copy') as error:
        (load_text_encoder if kind == 'text' else load_backbone)(name)
    assert not proof.exists() and str(folder) in str(error.value)
    torch.load(next(folder.glob('*.bin')), weights_only=False)
    assert proof.exists()  # it would have


def cut(file): file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


@pytest.mark.parametrize('spoil', ['missing', 'cut', 'swapped', 'config'])
@pytest.mark.parametrize('load_it, kind', [(load_backbone, 'timm'), (load_text_encoder, 'bert'), (load_text_encoder, 'skep')])
def test_a_spoilt_folder(tmp_path, load_it, kind, spoil):
    folder = tmp_path / 'model'
    make_backbone('resnet18', folder) if kind == 'timm' else make_text_encoder(kind, folder)
    file = folder / ('config.json' if spoil == 'config' else 'pytorch_model.bin' if kind == 'skep' else 'model.safetensors')
    if spoil == 'missing': file.unlink()
    elif spoil == 'swapped':
        if kind == 'skep': torch.save({'x': torch.zeros(1)}, file)
        elif kind == 'bert': file.write_bytes((make_text_encoder('distilbert', tmp_path / 'other') / file.name).read_bytes())
        else: save_file({f'module.{k}': v for k, v in load_file(file).items() if 'layer4' in k}, file)  # not all of them
    else: cut(file)
    with pytest.raises(InputError, match=rf'(?s){folder} cannot be loaded: .* A folder needs config.json'): load_it(str(folder))


# the stage

def make_data(run, size, n=3):
    with write_stage(run / 'data', {'stage': 'data', 'parameters': {}}) as data:
        (data / 'posts.csv').write_text('id,image,text\n' + ''.join(f'{i},x.png,{TEXTS[i]}\n'.replace('!', '') for i in (0, 2, 4)[:n]))
        np.save(data / 'posts.npy', np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8))
        (data / 'tasks.json').write_text('{}')


def test_the_stage_reads_no_stand_ins_where_an_encoder_is_named(hub, tmp_path):
    make_backbone('resnet18', tmp_path / 'resnet'), make_text_encoder('bertweet', in_hub(hub, TEXT_ENCODERS['bertweet'][0]))
    make_data(tmp_path / 'run', 64)
    given = dict(backbone=str(tmp_path / 'resnet'), text_encoder='bertweet', trainable_stages=0, max_length=500)
    out = run_features(tmp_path / 'run', **given)
    assert {'standins', 'data'} & set(read_record(out)['inputs']) == {'data'}
    texts = [TEXTS[i] for i in (0, 2, 4)]
    np.testing.assert_allclose(np.load(out / 'text.npy'), plain('bertweet', TEXT_ENCODERS['bertweet'][0], texts, 128, 'cls'), atol=1e-5)
    assert np.load(out / 'image.npy').shape == (3, 512)
    encoder = text_encoder_of(tmp_path / 'run')
    np.testing.assert_array_equal(encode_texts(encoder, texts), np.load(out / 'text.npy'))
    assert encoder.max_length == 128 and run_features.stale(tmp_path / 'run', **given) is None
    make_backbone('resnet18', tmp_path / 'resnet', seed=1)  # a folder of the user's that changed
    assert 'resnet changed' in run_features.stale(tmp_path / 'run', **given)


def test_a_picture_size_that_the_backbone_does_not_take(hub, tmp_path, monkeypatch):
    make_data(tmp_path / 'run', 96), make_backbone('vit_tiny_patch16_224', tmp_path / 'vit')
    monkeypatch.setattr('pacl.parts.encoders.load_text_encoder', None)  # nothing else is begun
    with pytest.raises(InputError, match=f'image_size=96, and {tmp_path}/vit takes 224. Set image_size=224.'):
        run_features(tmp_path / 'run', backbone=str(tmp_path / 'vit'), text_encoder='bert', trainable_stages=0)


def test_by_the_environment_alone(tmp_path):
    "HF_HOME and HF_HUB_OFFLINE, in a process of its own."
    make_backbone('resnet18', in_hub(tmp_path / 'hub', timm_id('resnet18')))
    make_text_encoder('skep', in_hub(tmp_path / 'hub', TEXT_ENCODERS['skep'][0]))
    code = ("from pacl.parts.encoders import encode_texts, load_backbone, load_text_encoder\n"
            "print(load_backbone('resnet18').num_features, encode_texts(load_text_encoder('skep'), ['so sad']).shape)")
    env = os.environ | {'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run([sys.executable, '-c', code], env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout == '512 (1, 32)\n', done.stderr
