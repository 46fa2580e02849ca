"""Names in LoRA files: their prefixes and parts, and diffusers' names of the modules."""

import re

# Tools put these before a name; torch.compile puts _orig_mod wherever a compiled module is.
PREFIX = re.compile(r"(base_model\.model\.|model\.|module\.|transformer\.|diffusion_model\.|lora_unet_+)+")
COMPILED = "_orig_mod."
KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)"
    r"(\.(?!weight$|bias$)[^.]+)?\.(?P<kind>weight|bias)"  # PEFT may insert the adapter's name before the last word
)
DOWN = ("lora_A", "lora_down", "lora.down")
# Wan's names (or musubi's, where _ joins them) and diffusers'.
WAN = [
    (re.compile(pattern.replace(r"\.", "[._]")), name)
    for pattern, name in (
        (r"blocks\.(\d+)\.self_attn\.([qkv])", r"blocks.\1.attn1.to_\2"),
        (r"blocks\.(\d+)\.self_attn\.o", r"blocks.\1.attn1.to_out.0"),
        (r"blocks\.(\d+)\.cross_attn\.([qkv])", r"blocks.\1.attn2.to_\2"),
        (r"blocks\.(\d+)\.cross_attn\.o", r"blocks.\1.attn2.to_out.0"),
        (r"blocks\.(\d+)\.ffn\.0", r"blocks.\1.ffn.net.0.proj"),
        (r"blocks\.(\d+)\.ffn\.2", r"blocks.\1.ffn.net.2"),
        (r"time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
        (r"time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
        (r"text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
        (r"text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
        (r"time_projection\.1", "condition_embedder.time_proj"),
        (r"head\.head", "proj_out"),
    )
]
# Modules by which Wan's image-to-video models take an image, in diffusers' names or Wan's. Helios has none of them.
IMAGE = re.compile(
    r"blocks[._]\d+[._]cross_attn[._](k_img|v_img|norm_k_img)|blocks[._]\d+[._]attn2[._](add_[kv]_proj|norm_added_k)"
    r"|(img_emb|condition_embedder[._]image_embedder)[._].+"
)


def module_name(name: str) -> str:
    """diffusers' name of a module: removes prefixes, and translates Wan's and musubi's names."""
    name = name.replace(COMPILED, "")
    name = name[match.end() :] if (match := PREFIX.match(name)) else name
    for pattern, theirs in WAN:
        if match := pattern.fullmatch(name):
            return match.expand(theirs)
    return name


def part_of(key: str) -> tuple[str, str] | None:
    """The module (diffusers' name) and the part of a `Change`, or "alpha", that a file's key stands for; else None."""
    stem, _, last = key.rpartition(".")
    if last in ("alpha", "diff", "diff_b", "diff_m"):
        return module_name(stem), last
    match = KEY.fullmatch(key.replace(COMPILED, ""))
    if not match or (match["kind"] == "bias" and match["part"] in DOWN):
        return None
    part = "bias" if match["kind"] == "bias" else "down" if match["part"] in DOWN else "up"
    return module_name(match["module"]), part
