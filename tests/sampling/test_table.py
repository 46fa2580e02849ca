"""Files of many prompts: nothing of a row is cut or lost, and what spreadsheets write is read."""

import dataclasses

import pytest

from helios_jax.config import ConfigError
from helios_jax.sampling import table
from helios_jax.sampling.chunk_frames import ChunkFrames
from helios_jax.sampling.jobs import make_jobs
from helios_jax.sampling.options import SampleConfig


def read(tmp_path, text: str | bytes, name: str = "p.csv") -> list[list[dict[str, str]]]:
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(data)
    return [[row.fields for row in rows] for rows in table.read(tmp_path / name)]


def seeds_of(tmp_path, text: str | bytes) -> list[int | None]:
    return [table.Row(tmp_path / "p.csv", 2, rows[0]).number("seed") for rows in read(tmp_path, text)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,prompt\n1,a red square, moving right fast\n", ["line 2", "3 fields for 2 columns", "quotes"]),
        ('id,prompt\n1,a\n2,"a red\nsquare\n', ["line 3", "quote not closed"]),
        ('id,prompt\n1,"a"b\n', ["line 2", "quote"]),
        ("id,prompt,prompt\n1,a,b\n", ["two columns 'prompt'"]),
        ("id,prompt,Prompt \n1,a,b\n", ["two columns 'prompt'"]),
        ("id,prompt\na,x\nb,y\na,z\n", ["line 4", "id a", "line 2"]),
        ("id,prompt_index,prompt\na,0,x\nb,0,y\na,0,z\n", ["line 4", "prompt_index", "line 2"]),
        ("id,prompt_index,prompt\na,,x\n", ["line 2", "prompt_index is empty"]),
        ("id;prompt\n1;a\n", ["';'", "commas"]),
        ("id\tprompt\n1\ta\n", ["commas"]),
        ("id,prompt,seed\n1,a,1.5\n", ["line 2", "seed", "whole number", "'1.5'"]),
        (f"id,prompt\n{'x' * 300},a\n", ["line 2", "200 bytes"]),
        ("id,prompt\n..,a\n.,b\n", ["line 2", "'..'"]),
        (b"id,prompt\n1,\xff\n", ["is not in UTF-8 (byte 12); save it"]),
        ("", ["no column prompt"]),
        ("id,prompt\n,,\n \n", ["no row"]),
    ],
)
def test_what_would_be_cut_or_lost_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        seeds_of(tmp_path, text)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_spreadsheets_are_read(tmp_path):
    text = '\ufeffID , Prompt,SEED\r\n 7 ,"a bar, ""green""",42.0\r\n,,\r\n8,"two\r\nlines",\r\n,,,,\r\n'
    (one,), (two,) = read(tmp_path, text)
    assert one == {"id": "7", "prompt": 'a bar, "green"', "seed": "42.0"}
    assert table.Row(tmp_path, 2, one).number("seed") == 42
    assert table.Row(tmp_path, 2, one | {"seed": "10"}).number("seed") == 10
    assert two["prompt"].split() == ["two", "lines"]


def test_a_text_file_is_a_prompt_a_line_split_at_newlines_only(tmp_path):
    found = read(tmp_path, "a red square\r\n\n  a bar, green\u2028and more\x0b\n", "prompts.txt")
    assert found == [[{"id": "0", "prompt": "a red square"}], [{"id": "1", "prompt": "a bar, green\u2028and more"}]]


def jobs(tmp_path, text: str, **changes):
    (tmp_path / "p.csv").write_text(text)
    config = SampleConfig(csv=str(tmp_path / "p.csv"), out=str(tmp_path / "all"), **changes)
    return [job.config for job in make_jobs(config, ChunkFrames(33, 33))]


def test_an_interactive_video_is_as_long_as_schedule_or_request(tmp_path):
    text = "id,prompt_index,prompt,num_frames\n1,0,a,\n1,1,b,\n2,1,b,\n2,0,a,400\n"
    one, two = jobs(tmp_path, text, interpolate_time=1, num_frames=132)
    assert (one.num_frames, two.num_frames) == (132, 400)
    assert [one.prompt, one.switches[0].prompt] == ["a", "b"]
    (long, given) = jobs(tmp_path, text, interpolate_time=7, num_frames=132)
    assert (long.num_frames, given.num_frames) == (2 * 7 * 33, 400)


def test_a_stream_without_end_is_no_row(tmp_path):
    with pytest.raises(ConfigError, match="num_frames must be a number"):
        jobs(tmp_path, "prompt\na\n", num_frames=None)
    assert jobs(tmp_path, "prompt,num_frames\na,9\n", num_frames=None)[0].num_frames == 9


@pytest.mark.parametrize("seed", [2**32 + 5, 2**63, 2**64 - 1])
def test_large_seeds_are_kept(tmp_path, seed):
    assert jobs(tmp_path, f"prompt,seed\na,{seed}\n")[0].seed == seed


@pytest.mark.parametrize("changes", [{"seed": -1}, {"seed": 2**64}, {"seed": 2**64 - 1, "num_videos_per_prompt": 2}])
def test_seeds_beyond_64_bits_are_refused(changes):
    with pytest.raises(ValueError, match=r"seed must be from 0 to 2\^64 - 1"):
        dataclasses.replace(SampleConfig(prompt="a"), **changes)
