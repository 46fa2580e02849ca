"""A vision-language model that judges pictures from 1 to 5, at any endpoint with OpenAI's interface."""

import base64
import hashlib
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios_jax.config import ConfigError
from helios_jax.heliosbench.metric import MetricError, require
from helios_jax.messages import one_line

if TYPE_CHECKING:
    from openai import OpenAI

MODEL = "gpt-5.2-2025-12-11"  # the judge of the published scores
KEY = "OPENAI_API_KEY"
NUMBER_OF_FRAMES = "##NUM_FRAMES##"  # placeholder that an instruction may contain, as upstream's does
PICTURE_TOKENS = 255  # of a picture of up to 512x512 pixels, about
TRIES = 3  # for an answer that is a number
RETRIES = 8  # of a request, by the client, which waits as long as the server asks it to
LOWEST, HIGHEST = 1.0, 5.0

INSTRUCTION = f"""
You see {NUMBER_OF_FRAMES} still frames of one video, in order, taken far apart. Decide how likely it is that a camera
filmed it. Cuts and camera moves between frames are normal: judge each frame for itself, and things that recur.

Look for
- surfaces and details: skin, hair, fabric, water, leaves and print that look waxy, smeared or invented;
- outlines: halos, blur or bleeding where things meet what is behind them;
- bodies: hands, eyes, teeth and limbs with a wrong number or shape, faces without life;
- physics: shadows and reflections against the light, feet that do not stand, hands that do not hold;
- things that are half transparent, doubled, or melt into each other.

Answer with one number and nothing else:
1 certainly generated: plain impossibilities
2 probably generated: several suspicious places
3 cannot tell
4 probably filmed: consistent, at most small doubts
5 certainly filmed: fine detail, light and motion blur as a camera records them
""".strip()


class JudgeError(RuntimeError):
    """A service that refuses every request; the message is one line."""


@dataclass
class Answer:
    """A score from 0 to 1, and the text that the model gave."""

    score: float
    text: str


@dataclass
class Judge:
    """The model at `url`. `instruction` is the text that it gets; `prompt_tokens` counts what it read."""

    url: str
    model: str = MODEL
    instruction: str = INSTRUCTION

    def __post_init__(self):
        if not re.match(r"https?://[^/]", self.url):
            raise ConfigError(f"--judge: {self.url} must be an address such as http://localhost:8000/v1")
        require("openai")
        self.prompt_tokens = 0
        self._lock = threading.Lock()

    @property
    def digest(self) -> str:
        """A short hash of the instruction: scores of different ones do not mix."""
        return hashlib.sha256(self.instruction.encode()).hexdigest()[:12]

    @cached_property
    def _client(self) -> "OpenAI":
        from openai import OpenAI

        # Self-hosted servers often need no key, but the client does.
        return OpenAI(base_url=self.url, api_key=os.environ.get(KEY) or "none", max_retries=RETRIES, timeout=300)

    def ask(self, pictures: Sequence[bytes]) -> Answer:
        """The score of JPEG pictures of one video.

        Raises MetricError where the model gives no number, and JudgeError where the service refuses all requests.
        """
        images = [f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" for jpeg in pictures]
        content: list[Any] = [{"type": "image_url", "image_url": {"url": image}} for image in images]
        content.append({"type": "text", "text": self.instruction.replace(NUMBER_OF_FRAMES, str(len(pictures)))})
        text = ""
        for _ in range(TRIES):
            text = self._answer(content)
            if (number := read_number(text)) is not None:
                return Answer((min(HIGHEST, max(LOWEST, number)) - LOWEST) / (HIGHEST - LOWEST), text)
        raise MetricError(
            f"{self.model} answered {text[:160]!r} {TRIES} times, where a number from 1 to 5 is asked for"
        )

    def _answer(self, content: list[Any]) -> str:
        import openai

        try:
            response = self._client.chat.completions.create(
                model=self.model, temperature=0.0, messages=[{"role": "user", "content": content}]
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise JudgeError(
                f"--judge: {self.url} refuses {self.model} ({one_line(error)}); check the address, the model and"
                f" the key in {KEY}"
            ) from None
        except openai.APIConnectionError as error:
            raise JudgeError(
                f"--judge: {self.url} cannot be reached ({one_line(error.__cause__ or error)}); the same command"
                " goes on when it can"
            ) from None
        except openai.OpenAIError as error:
            raise MetricError(f"{self.model} failed: {one_line(error)}") from None
        with self._lock:
            self.prompt_tokens += response.usage.prompt_tokens if response.usage else 0
        return ((response.choices[0].message.content if response.choices else None) or "").strip()


def read_number(text: str) -> float | None:
    """The number of an answer: all of it, or the only one from 1 to 5 in it, as in "Score: 4/5"; else None."""
    try:
        number = float(text)
    except ValueError:
        found = re.findall(r"(?<![\d.,/-])[1-5](?:\.\d+)?(?![\d,/-]|\.\d)(?:\s*/\s*5\b)?|[1-5](?=/5\b)", text)
        return float(found[0].partition("/")[0]) if len(found) == 1 else None
    return number if number == number and abs(number) != float("inf") else None


def read_instruction(path: Path) -> str:
    """The text of a file; raises ConfigError if it cannot be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--judge-instruction: {path} cannot be read ({error})") from None
    if not text:
        raise ConfigError(f"--judge-instruction: {path} is empty; write what the judge shall do")
    return text


def estimate(requests: int, pictures: int, words: int, price: float | None) -> str:
    """An estimate, in words, of the questions to the judge and their cost at `price` dollars a million input tokens."""
    tokens = pictures * PICTURE_TOKENS + requests * words * 4 // 3
    cost = "" if price is None else f", ${tokens / 1e6 * price:,.2f} at ${price:g} a million"
    return f"{requests:,} requests with {pictures:,} pictures, about {tokens:,} tokens of input{cost}"
