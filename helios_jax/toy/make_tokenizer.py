"""The toy worlds' tokenizers: `python -m helios_jax.toy.make_tokenizer` writes helios_jax/assets/toy/tokenizer.

With `--world scenes` it writes the tokenizer of the larger world, into assets/scenes.

It has the structure of UMT5's tokenizer (Unigram over Metaspace words, <pad> 0, </s> 1, <unk> 2, an end token), so the
same code reads both. The vocabulary is stated instead of trained: each word of the captions is one token with its log
frequency; letters and a little punctuation spell any other word. A trained vocabulary would keep only pieces that
several words share, which splits most of these words, and would differ from run to run.
"""

import json
import math
import string
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from helios_jax.runtime.command import Tool
from helios_jax.toy import scenes
from helios_jax.toy import world as toy

ASSETS = Path(__file__).parent.parent / "assets"
FOLDERS = {"shapes": ASSETS / "toy" / "tokenizer", "scenes": ASSETS / "scenes" / "tokenizer"}
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
MAX_LENGTH = {"shapes": 16, "scenes": 32}
# Far below any word's score, so that a known word is never spelt out.
LETTER_SCORE = -20.0


def words_of(world: str) -> Counter[str]:
    """Counts of the words in the captions of a world."""
    if world == "shapes":
        return Counter(
            word for split in ("train", "test") for a in toy.combinations(split) for word in toy.caption(a).split()
        )
    drawn = (scenes.caption(scenes.sample_scene(seed, "train")) for seed in range(5000))
    return Counter(word for caption in drawn for word in caption.split())


def build(world: str = "shapes") -> Tokenizer:
    """The tokenizer of a world, the same each time, `</s>` at the end of every text; it has 64 tokens for shapes."""
    counts = words_of(world)
    total = counts.total()
    words = [(f"▁{word}", math.log(counts[word] / total)) for word in sorted(counts)]
    pieces = ["▁", *string.ascii_lowercase, *".,!?'-:"]
    vocab = [(token, 0.0) for token in SPECIAL.values()] + words + [(piece, LETTER_SCORE) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always", split=True)]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def save(folder: Path, world: str = "shapes") -> None:
    """Writes the files that `transformers` and `tokenizers` load, as T5TokenizerFast."""
    folder.mkdir(parents=True, exist_ok=True)
    build(world).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5TokenizerFast",
        **SPECIAL,
        "extra_ids": 0,  # without this, transformers adds 100 sentinel tokens
        "additional_special_tokens": [],
        "model_max_length": MAX_LENGTH[world],
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", SPECIAL)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and writes the files."""
    parser = Tool(description="Writes the toy world's tokenizer.")
    parser.add_argument("--world", choices=sorted(FOLDERS), default="shapes")
    parser.add_argument("--out", type=Path, help="folder to write into; by default the world's")
    args = parser.parse_args(argv)
    out = args.out or FOLDERS[args.world]
    save(out, args.world)
    print(f"{out}: {build(args.world).get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
