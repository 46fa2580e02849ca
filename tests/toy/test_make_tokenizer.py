"""The toy tokenizer: the committed files are what the code builds, and transformers reads them the same way."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from helios_jax.toy import make_tokenizer as toy_tokenizer
from helios_jax.toy import world as toy

CAPTIONS = [toy.caption(a) for split in ("train", "test") for a in toy.combinations(split)]
tokenizer = Tokenizer.from_file(str(toy_tokenizer.FOLDERS["shapes"] / "tokenizer.json"))


def test_the_committed_files_are_what_the_code_builds(tmp_path):
    toy_tokenizer.main(["--out", str(tmp_path)])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert json.loads((tmp_path / name).read_text()) == json.loads(
            (toy_tokenizer.FOLDERS["shapes"] / name).read_text()
        )


def test_every_word_is_one_token_and_the_end_is_marked():
    assert tokenizer.get_vocab_size() == 64
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    seen = set()
    for caption in CAPTIONS:
        ids = tokenizer.encode(caption).ids
        assert len(ids) == len(caption.split()) + 1
        assert ids[-1] == 1
        assert 2 not in ids
        assert tokenizer.decode(ids) == caption
        seen.add(tuple(ids))
    assert len(seen) == len(CAPTIONS)
    assert tokenizer.encode("").ids == [1]


@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyz.,!?'-:", min_size=1, max_size=9), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_any_lower_case_text_can_be_spelt(words):
    text = " ".join(words)
    ids = tokenizer.encode(text).ids
    assert 2 not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.reference
@given(st.one_of(st.sampled_from(CAPTIONS), st.text(max_size=30)))
@settings(max_examples=200, deadline=None)
def test_transformers_gives_the_same_ids(text):
    assert reference()(text).input_ids == tokenizer.encode(text).ids


def reference(cache=[]):  # noqa: B006
    if not cache:
        transformers = pytest.importorskip("transformers")
        cache.append(transformers.AutoTokenizer.from_pretrained(toy_tokenizer.FOLDERS["shapes"]))
    return cache[0]


@pytest.mark.reference
def test_transformers_pads_and_cuts_as_umt5_does():
    assert "T5Tokenizer" in type(reference()).__name__
    assert len(reference()) == 64
    got = reference()([CAPTIONS[0], "a"], padding="max_length", max_length=6, truncation=True)
    assert got.input_ids == [[*tokenizer.encode(CAPTIONS[0]).ids[:5], 1], [3, 1, 0, 0, 0, 0]]
    assert got.attention_mask == [[1] * 6, [1, 1, 0, 0, 0, 0]]
