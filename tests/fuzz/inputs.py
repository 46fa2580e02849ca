"""Strategies for odd values and damaged files."""

from typing import Any

from hypothesis import strategies as st

ODD_TEXT = [
    "", " ", "0", "-1", "1", "2", "3.5", "1e3", "1e400", "nan", "inf", "-inf", "null", "true", "false", "[]", "[1]",
    "[1,2,3]", "{}", "{a: 1}", "2147483647", "2147483648", "4294967301", "9223372036854775807", "18446744073709551615",
    "18446744073709551616", "9" * 40, "0x10", "1_000", "٣", "½", "a", "infs", "nans", "-5s", "1e400s",
    "a" * 300, "a" * 5000,
    "/", ".", "..", "~", "~nobody/x", "/dev/full", "/dev/null", "/proc/self/mem", "/etc/hostname/x", "no/such/file",
    "x.mp4", "x.npz", "x.gif", "x", "c.yaml", "file:x.mp4", "tcp://localhost:1/x", "take:1.mp4", "-", "--", "${seed}",
    "${oc.env:HOME}", "é", "\u202e", "🦊", "a\nb", "a\tb", "'", '"', "#", "%s", "%", "\\", "a=b", "=",
    "!!python/object:os.system",
]  # fmt: skip

text = st.one_of(st.sampled_from(ODD_TEXT), st.text(max_size=12), st.integers().map(str), st.floats().map(str))
scalar = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), text, st.integers(min_value=-2, max_value=40), st.just(2**63)
)
value = st.recursive(
    scalar, lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(text, x, max_size=3)), max_leaves=5
)


@st.composite
def damage(draw: Any, data: bytes, most: int = 3) -> bytes:
    """`data` with up to `most` bytes or ranges changed, cut out, repeated, or its end cut off."""
    for _ in range(draw(st.integers(0, most))):
        place = int(draw(st.floats(0, 1)) * len(data))
        kind = draw(st.sampled_from(["set", "cut", "end", "insert", "repeat", "zero"]))
        length = draw(st.integers(1, 40))
        if kind == "set":
            data = data[:place] + draw(st.binary(min_size=1, max_size=4)) + data[place + 1 :]
        elif kind == "cut":
            data = data[:place] + data[place + length :]
        elif kind == "end":
            data = data[:place]
        elif kind == "insert":
            data = data[:place] + draw(st.binary(max_size=20)) + data[place:]
        elif kind == "repeat":
            data = data[:place] + data[place : place + length] * 2 + data[place + length :]
        else:
            data = data[:place] + bytes(length) + data[place + length :]
    return data


@st.composite
def changed(draw: Any, tree: Any) -> Any:
    """A JSON value with one place in it changed, taken out or added to."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(tree)))
        how = draw(st.integers(0, 9))
        if how == 0:
            return {k: v for k, v in tree.items() if k != key}
        if how == 1:
            return tree | {draw(text): draw(value)}
        return tree | {key: draw(changed(tree[key]))}
    if isinstance(tree, list) and tree and draw(st.integers(0, 2)):
        i = draw(st.integers(0, len(tree) - 1))
        return [*tree[:i], draw(changed(tree[i])), *tree[i + 1 :]]
    if isinstance(tree, int) and not isinstance(tree, bool) and draw(st.booleans()):
        return draw(st.sampled_from([0, -1, tree + 1, 2 * tree, tree * 10**6, float(tree), str(tree), 10**30]))
    return draw(value)
