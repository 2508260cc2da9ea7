"""pacl.parts.encoders' registries without a network: stand-ins of the true architectures, randomly initialised, in the hub's own layout.
Other tests import `make_backbone`, `make_clip`, `make_open_clip`, `make_text_encoder` and `in_hub` from here."""
import json
import string
from pathlib import Path

import numpy as np
import open_clip
import pacl
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pacl.parts.encoders import (BACKBONES, TEXT_ENCODERS, load_backbone, load_text_encoder, run_frozen,
                                 save_backbone, to_input)
from pacl.parts.stages import InputError

pytestmark = pytest.mark.usefixtures('one_thread')
WORDS = 'so happy sad the a cat dog rain joy and fear of it is i am feeling'.split()


# stand-ins

def make_backbone(name, folder, seed=0):
    "What the hub holds of a timm model: config.json and model.safetensors, with its classifier."
    torch.manual_seed(seed)
    model = timm.create_model(BACKBONES.get(name, name))
    folder.mkdir(parents=True, exist_ok=True)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


TINY = {'embed_dim': 16, 'vision_cfg': {'image_size': 32, 'layers': 2, 'width': 32, 'patch_size': 8, 'head_width': 16},
        'text_cfg': {'context_length': 77, 'vocab_size': 49408, 'width': 16, 'heads': 2, 'layers': 2}}
LOOK = {'mean': [.5, .4, .3], 'std': [.25, .2, .3], 'interpolation': 'bicubic', 'resize_mode': 'shortest'}


def make_clip(folder):
    "A CLIP in miniature, as open_clip's models lie on the hub."
    torch.manual_seed(0)
    (folder / 'open_clip_config.json').write_text(json.dumps({'model_cfg': TINY, 'preprocess_cfg': LOOK}))
    save_file(open_clip.CLIP(**TINY).state_dict(), folder / 'open_clip_model.safetensors')
    return folder


def make_open_clip(name, folder):
    "What the hub holds of both towers; `name` as 'ViT-B-32/openai'."
    torch.manual_seed(0)
    clip = open_clip.create_model(name.partition('/')[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(clip.state_dict(), folder / 'open_clip_model.safetensors')
    return folder


def make_text_encoder(kind, folder):
    "Two layers of 32 features that read characters, in the files that the authors' own tokenizer has."
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    small = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 64}
    letters = string.ascii_letters + string.punctuation
    if kind in ('skep', 'roberta'):
        tokens = ['<s>', '<pad>', '</s>', '<unk>', *bytes_to_unicode().values(), '<mask>']
        files = {'vocab.json': json.dumps({token: i for i, token in enumerate(tokens)}), 'merges.txt': '#version: 0.2\n'}
        config = transformers.RobertaConfig(vocab_size=len(tokens), max_position_embeddings=514, pad_token_id=1, **small)
        model = transformers.RobertaModel(config)
    elif 'bertweet' in kind:
        tokens = [*letters, *(f'{c}@@' for c in letters)]
        files = {'vocab.txt': ''.join(f'{token} 1\n' for token in tokens), 'bpe.codes': ''}
        config = transformers.RobertaConfig(vocab_size=len(tokens) + 5, max_position_embeddings=130, pad_token_id=1, **small)
        config.tokenizer_class = 'BertweetTokenizer'
        model = transformers.RobertaForSequenceClassification(config)
    else:  # WordPiece
        tokens = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *letters, *(f'##{c}' for c in letters)]
        files = {'vocab.txt': '\n'.join(tokens)}
        model = transformers.BertModel(transformers.BertConfig(vocab_size=len(tokens), **small))
    for name, text in files.items():
        (folder / name).write_text(text, encoding='utf-8')
    model.save_pretrained(folder)
    if kind == 'skep':  # a pickle on the hub
        (folder / 'model.safetensors').unlink()
        torch.save(model.state_dict(), folder / 'pytorch_model.bin')
    return folder


def in_hub(cache, hub):
    "The folder of the repository `hub` in the Hugging Face cache `cache` (HF_HOME/hub)."
    place = cache / f'models--{hub.replace("/", "--")}'
    (place / 'refs').mkdir(parents=True, exist_ok=True)
    (place / 'refs/main').write_text('0' * 40)
    folder = place / 'snapshots' / ('0' * 40)
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


def timm_id(name):
    return timm.get_pretrained_cfg(BACKBONES.get(name, name)).hf_hub_id


def close(found, expected, tolerance=1e-3):
    np.testing.assert_allclose(found, expected[:len(found)], rtol=tolerance, atol=tolerance)


# the visual encoders


@pytest.mark.parametrize('name', ['resnet18', 'vit_tiny_patch16_224'])
@torch.no_grad()
def test_a_backbone_is_timms(hub, tmp_path, monkeypatch, name):
    monkeypatch.setitem(BACKBONES, 'short', name)
    folder = make_backbone(name, in_hub(hub, timm_id(name)))
    backbone = load_backbone('short')
    theirs = timm.create_model(name, pretrained=True).eval()
    theirs.reset_classifier(0)
    assert not backbone.training
    # as timm itself prepares a square of that size, and as it computes
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs) | {'crop_pct': 1.})
    x = torch.stack([transform(Image.fromarray(picture)) for picture in PICTURES])
    torch.testing.assert_close(to_input(torch.from_numpy(PICTURES), backbone), x, rtol=0, atol=1e-5)
    features = theirs(x).numpy()
    close(run_frozen(backbone, PICTURES, 'pictures', backbone), features)
    for other in (timm_id(name), str(folder)):
        close(load_backbone(other)(x[:1]), features)
    save_backbone(backbone, tmp_path / 'enhanced', 224)
    (tmp_path / 'plain').touch()  # others may read it, too
    assert (tmp_path / 'enhanced/model.safetensors').stat().st_mode == (tmp_path / 'plain').stat().st_mode
    close(pacl.load(tmp_path / 'enhanced')(Image.fromarray(PICTURES[0])), features)
    assert {*load_file(tmp_path / 'enhanced/model.safetensors')} == {*theirs.state_dict()}


# the text encoders

TEXTS = ['so happy', 'I am feeling sad and happy, so sad!', '', 'the cat of joy ' * 40, 'the dog 😂 @bob https://a.b/c', 'so happy']


def plain(hub, texts, max_length):
    "Each text by itself, by transformers' own call."
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub, normalization=True)
    model = transformers.AutoModel.from_pretrained(hub).eval()
    features = []
    for text in texts:
        batch = tokenizer(text, truncation=True, max_length=max_length, return_tensors='pt')
        features.append(model(**batch).last_hidden_state[0, 0])
    return torch.stack(features).detach().numpy()


@pytest.mark.parametrize('name, most', [('skep', 512), ('bert', 510), ('bertweet-sentiment', 128)])
def test_text_encoders_by_name(hub, name, most):
    official = TEXT_ENCODERS[name]
    folder = make_text_encoder(name, in_hub(hub, official))
    expected = plain(official, TEXTS, 77)
    for given in (name, official, folder):
        encoder = load_text_encoder(given)
        assert encoder.max_length == 77 and not encoder.model.training
        close(encoder.embed_texts(TEXTS, batch_size=4), expected, 1e-5)
    assert len(np.unique(expected.round(4), axis=0)) == 5
    long = load_text_encoder(name, max_length=9999)
    assert long.max_length == most
    close(long.embed_texts(['so sad ' * 600]), plain(official, ['so sad ' * 600], most), 1e-5)


def test_bertweet_reads_tweets(tmp_path):
    encoder = load_text_encoder(make_text_encoder('bertweet', tmp_path))
    tokens = encoder.tokenizer.tokenize('so 😂 @bob https://a.b/c')
    assert ''.join(token.removesuffix('@@') for token in tokens) == 'so:face_with_tears_of_joy:@USERHTTPURL'
    assert encoder.embed_texts(['a.' * 4000]).shape == (1, 32)  # in no time, not the 22 s that all of it takes


# what cannot be had

@pytest.mark.parametrize('load_it, name, says', [
    (load_backbone, 'vit_bse', 'backbone: no folder, nor a model that timm has weights for: "vit_bse"; nearest valid: vit_base'),
    (load_backbone, 'vit_base', 'backbone: vit_base_patch16_224.augreg2_in21k_ft_in1k cannot be loaded: '
                                '.* Give a folder with config.json and model.* its cache .*/hub .*HF_HOME'),
    (load_backbone, 'somebody/model', 'backbone: hf-hub:somebody/model cannot be loaded'),
    (load_backbone, '/no/where', 'backbone: /no/where cannot be loaded: there is no config.json'),
    (load_text_encoder, 'skep', 'text_encoder: Yaxin/roberta-large-ernie2-skep-en cannot be loaded'),
    (load_text_encoder, 'brt', 'a short name: minilm, skep, bert, roberta'),
])
def test_names_that_cannot_be_found(hub, load_it, name, says):
    with pytest.raises(InputError, match=says):
        load_it(name)


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), 'w')


def make_model(load_it, folder):
    return make_text_encoder('bert', folder) if load_it is load_text_encoder else make_backbone('test_resnet', folder)


@pytest.mark.parametrize('load_it', [load_text_encoder, load_backbone])
def test_a_pickle_that_runs_code_is_refused(tmp_path, load_it):
    folder = make_model(load_it, tmp_path / 'model')
    (folder / 'model.safetensors').unlink()
    torch.save({'embeddings.word_embeddings.weight': Payload(tmp_path / 'proof')}, folder / 'pytorch_model.bin')
    with pytest.raises(InputError, match=f'{folder} cannot be loaded: a pickle that holds more than weights .* Take a copy'):
        load_it(str(folder))
    assert not (tmp_path / 'proof').exists()
    torch.load(folder / 'pytorch_model.bin', weights_only=False)
    assert (tmp_path / 'proof').exists()  # it would have


def cut(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def lose(file):  # the library would draw those at random
    save_file({k: v for k, v in load_file(file).items() if '1.' in k}, file, metadata={'format': 'pt'})


@pytest.mark.parametrize('name, spoil', [
    ('config.json', Path.unlink), ('config.json', cut), ('model.safetensors', Path.unlink), ('model.safetensors', cut),
    ('model.safetensors', lose)])
@pytest.mark.parametrize('load_it', [load_backbone, load_text_encoder])
def test_a_spoilt_folder(tmp_path, load_it, name, spoil):
    folder = make_model(load_it, tmp_path / 'model')
    spoil(folder / name)
    with pytest.raises(InputError, match=f'{folder} cannot be loaded: .* Give a folder with config.json'):
        load_it(str(folder))
