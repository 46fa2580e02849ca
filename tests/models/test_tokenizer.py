"""Prompts to ids: as transformers does on the same folder, and what a wrong folder is told."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from helios_jax.models.tokenizer import Tokenizer, prompt_clean

SPECIAL = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"]
CORPUS = [
    "A red ball bounces over the wooden floor, then rolls under the table.",
    "The camera follows a fox through snow; golden light, shallow depth of field.",
    "Ein Fuchs läuft über das Feld – Żółta łódka płynie. Le café est fermé à l'été.",
    "一只猫在厨房里烤蛋糕。 東京の夜、雨が降っている。 고양이가 뛴다.",
    "Кошка печёт торт. 3 + 4 = 7, 100% (ABC) \"quoted\" 'text' 😀🎬",
] * 3
HARD = [
    "",
    " ",
    "a red fox",
    "  two   spaces\tand\ntwo\r\n\nlines  ",
    "Tom &amp; Jerry &amp;amp; Co &lt;b&gt;bold&lt;/b&gt; &nbsp; &eacute;t&eacute; &#128512;",
    "mojibake: schÃ¶n, â€œquotedâ€\x9d, l&rsquo;Ã©tÃ©",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈🇵🇱 and kiss 💋",
    "ＦＵＬＬ　ｗｉｄｔｈ，　ﾊﾝｶｸ ｶﾀｶﾅ",
    "combining é ñ Å Ż ก็ हिन्दी",
    "control \x00\x01\x07\x1b[31m\x7f\x85 zero\u200bwidth\u200djoin\ufeffbom \u202eright-to-left",
    "عربي עברית ไทย 中文 日本語 한국어 Ελληνικά",
    "ligatures ﬁ ﬂ ½ ² ™ № … “curly” ‘quotes’ – — ‐",
    "markers ▁▁ in ▁text <pad> </s> <unk> <extra_id_0><extra_id_1> <extra_id_7>",
    "&lt;/s&gt; &lt;pad&gt;",
    "x" * 400,
    "word " * 300,
    "\u2028line\u2029para\u00a0nbsp\u3000ideographic",
    "𝔐𝔞𝔱𝔥 𝓼𝓬𝓻𝓲𝓹𝓽 \U0010ffff \ue000",
]


def write(folder, kind: str, special: list[str] = SPECIAL, end: bool = True):
    """A T5-like tokenizer in `folder`: one that transformers rebuilds as T5's, or one that it takes from the file."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    metaspace = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    if kind == "T5Tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
        )
        tokenizer.pre_tokenizer = metaspace
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if end:
        number = tokenizer.token_to_id("</s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", number)]
        )
    tokenizer.enable_truncation(7)  # settings in the file that a call must not keep
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": kind,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 2,
        "additional_special_tokens": SPECIAL[3:],
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["T5Tokenizer", "PreTrainedTokenizerFast"])
def folder(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def both(folder):
    """Our tokenizer and transformers'."""
    return Tokenizer.from_pretrained(folder), pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def assert_same(both, prompts: list[str], max_length: int) -> None:
    ours, theirs = both
    cleaned = [prompt_clean(p) for p in prompts]
    expected = theirs(cleaned, padding="max_length", max_length=max_length, truncation=True, return_tensors="np")
    ids, mask = ours(prompts, max_length)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])


@pytest.mark.reference
@pytest.mark.parametrize("max_length", [1, 2, 8, 512])
def test_hard_prompts_give_transformers_ids(both, max_length):
    assert_same(both, HARD, max_length)


@pytest.mark.reference
@settings(deadline=None, database=None, max_examples=60)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=3), st.integers(1, 24))
def test_any_prompt_gives_transformers_ids(both, prompts, max_length):
    assert_same(both, prompts, max_length)


@pytest.mark.reference
@settings(deadline=None, database=None, max_examples=200)
@given(st.one_of(st.sampled_from(HARD), st.text(), st.text(alphabet="&;#ampltx0 \n\té")))
def test_prompt_clean_is_diffusers(text):
    pytest.importorskip("torch")
    from diffusers.pipelines.helios import pipeline_helios

    assert prompt_clean(text) == pipeline_helios.prompt_clean(text)


def test_shapes_end_and_padding(folder):
    tokenizer = Tokenizer.from_pretrained(str(folder))
    ids, mask = tokenizer(["a red ball", "", "ball " * 50], 12)
    assert ids.shape == mask.shape == (3, 12)
    assert (ids.dtype, mask.dtype) == (np.int32, bool)
    assert not ids[~mask].any()
    assert [row[m][-1] for row, m in zip(ids, mask)] == [1, 1, 1]
    assert mask.sum(1).tolist()[1:] == [1, 12]
    assert tokenizer.max_length == 64


def test_a_saved_folder_is_the_same(folder, tmp_path):
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(folder)
    copy = Tokenizer.from_pretrained(tmp_path / "copy")
    np.testing.assert_array_equal(copy(HARD, 30)[0], tokenizer(HARD, 30)[0])
    assert copy.max_length == 64


def test_wrong_folders_are_told_in_one_line(tmp_path):
    def message() -> str:
        with pytest.raises(ValueError) as info:
            Tokenizer.from_pretrained(tmp_path)
        assert "\n" not in str(info.value)
        return str(info.value)

    assert "tokenizer.json is missing" in message()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer" in message()
    write(tmp_path, "T5Tokenizer", special=["</s>", "<pad>", "<unk>"])
    assert "<pad> the id 1" in message()
    write(tmp_path, "T5Tokenizer", special=["<pad>", "<unk>", "</s>"])
    assert "</s> the id 2" in message()
    write(tmp_path, "T5Tokenizer", end=False)
    assert "does not end a prompt" in message()
    write(tmp_path, "T5Tokenizer")
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path).max_length == 512


def test_a_prompt_that_is_cut_warns_with_count_and_limit(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    with pytest.warns(UserWarning, match=r"prompt 'a red square.*'.* has \d+ tokens, of which 4 are used"):
        ids, mask = tokenizer(["a red square moves right fast", "a"], 4)
    assert ids[0, -1] == 1
    assert mask[0].all()
