"""The judge at a fake server: answers, retries, refusals, and what a run will cost."""

import pytest

from helios_jax.config import ConfigError
from helios_jax.heliosbench import judge
from helios_jax.heliosbench.judge import Judge, JudgeError, read_number
from helios_jax.heliosbench.metric import MetricError
from tests.heliosbench.fake_judge import serve

pytest.importorskip("openai")
JPEG = b"\xff\xd8 no picture"


def ask(*replies: str | int, **settings):
    with serve(*replies) as fake:
        return Judge(fake.url, **settings).ask([JPEG] * 3), fake


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4", 4), (" 4\n", 4), ("3.5", 3.5), ("7", 7), ("0", 0), ("Score: 4", 4), ("4/5", 4), ("**4**", 4),
        ("The score is 2.", 2), ("I give it 4 / 5", 4), ("", None), ("real", None), ("3 or 4", None), ("1-5", None),
        ("nan", None), ("I see 16 frames", None), ("inf", None),
    ],
)  # fmt: skip
def test_numbers_in_answers(text, number):
    assert read_number(text) == number


@pytest.mark.parametrize(("text", "score"), [("1", 0), ("2", 0.25), ("5", 1), ("9", 1), ("0", 0)])
def test_scores(text, score):
    answer, _ = ask(text)
    assert (answer.score, answer.text) == (score, text)


def test_a_request():
    _, fake = ask("4", model="qwen", instruction="judge these ##NUM_FRAMES##")
    (request,) = fake.requests
    assert (request["model"], request["temperature"]) == ("qwen", 0.0)
    *images, text = request["messages"][0]["content"]
    assert text == {"type": "text", "text": "judge these 3"}
    assert len(images) == 3
    assert images[0]["image_url"]["url"].startswith("data:image/jpeg;base64,/9g")


def test_rate_limits_and_broken_servers_are_asked_again():
    answer, fake = ask(429, 503, 500, "5")
    assert answer.score == 1
    assert len(fake.requests) == 4


def test_an_answer_without_a_number_is_asked_for_again():
    answer, fake = ask("I cannot say", "3")
    assert (answer.score, len(fake.requests)) == (0.5, 2)
    with pytest.raises(MetricError, match="answered 'no' 3 times"):
        ask("no")


def test_a_request_that_is_refused_fails_its_video_alone():
    with pytest.raises(MetricError, match="refused with 400"):
        ask(400)


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_service_that_refuses_all_requests_ends_the_run(code):
    with pytest.raises(JudgeError, match=f"refused with {code}.*OPENAI_API_KEY"):
        ask(code)


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(judge, "RETRIES", 0)
    with pytest.raises(JudgeError, match="cannot be reached"):
        Judge("http://127.0.0.1:9/v1").ask([JPEG])


def test_an_address_is_checked():
    with pytest.raises(ConfigError, match="--judge: localhost must be an address such as"):
        Judge("localhost")


def test_an_estimate():
    assert judge.estimate(720, 11520, 150, None) == "720 requests with 11,520 pictures, about 3,081,600 tokens of input"
    assert judge.estimate(720, 11520, 150, 1.75).endswith(", $5.39 at $1.75 a million")


def test_an_instruction_from_a_file(tmp_path):
    path = tmp_path / "text"
    path.write_text(" mine \n")
    assert judge.read_instruction(path) == "mine"
    assert Judge("http://x", instruction="a").digest != Judge("http://x", instruction="b").digest
    path.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        judge.read_instruction(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        judge.read_instruction(tmp_path / "none")
