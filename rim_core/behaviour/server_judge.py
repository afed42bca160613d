"""A judge on an OpenAI-compatible server. Answers leave the machine here and nowhere else, and only when asked to."""

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3 import Retry
from urllib3.exceptions import ReadTimeoutError

from rim_core import checking
from rim_core.behaviour.judges import HARMFUL, Finding, Question, exchanges, fill, of_finished, split_thought
from rim_core.errors import InputError
from rim_core.prompts import Prompt

_GREEDY = {"temperature": 0, "max_tokens": 16}
# Passing trouble: the server took too long, is in conflict with itself, is overloaded, or failed.
_PASSING = (408, 409, 429, *range(500, 600))


class ServerJudge:
    """A model behind an OpenAI-compatible `/chat/completions`, asked a `Question`; every answer is sent there.

    Connections that fail, time-outs, overload (429) and server errors are tried again at once, then after 1, 2, 4, ...
    seconds, or as long as the server asks for (a minute at most). Verdicts are kept in the judge: called again, it asks
    only for what is missing.

    Args:
        url: of the API, such as `http://localhost:8000/v1`.
        model: as the server names it.
        question: `HARMFUL`, `REFUSING`, `GUARD`, or one of your own. The reply must begin with its yes or no, after
            the judge's own thought if it thinks.
        key_variable: the environment variable that holds the key; None sends none.
        options: what is sent besides model and messages; None is temperature 0 and at most 16 tokens.
        timeout: seconds to wait for a connection, and for a reply.
        attempts: how often a request is tried in all.
        concurrency: requests at a time.

    Raises:
        InputError: a url that is none, or a key that is not set.

    Example:
        >>> judge = rim.ServerJudge("http://localhost:8000/v1", "llama-guard", rim.judges.GUARD)  # nothing is sent yet
        >>> judge.finds
        'harm'
    """

    def __init__(
        self,
        url: str,
        model: str,
        question: Question = HARMFUL,
        *,
        key_variable: str | None = None,
        options: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        attempts: int = 4,
        concurrency: int = 4,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is no server: give a url such as http://localhost:8000/v1")
        attempts = checking.whole(attempts, "ServerJudge: attempts", 1)
        self.concurrency = checking.whole(concurrency, "ServerJudge: concurrency", 1)
        self.timeout = checking.number(timeout, "ServerJudge: timeout", above=0)
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.question, self.key_variable = model, question, key_variable
        self.options = dict(_GREEDY if options is None else options)
        retries = Retry(
            attempts - 1,
            allowed_methods={"POST"},
            status_forcelist=_PASSING,
            raise_on_status=False,
            backoff_factor=0.5,
            retry_after_max=60,
        )
        self._session = requests.Session()
        for start in ("http://", "https://"):
            self._session.mount(start, HTTPAdapter(pool_maxsize=self.concurrency, max_retries=retries))
        self.finds: Finding = question.finds
        self._known: dict[tuple[str, ...], bool] = {}
        self._headers()

    def __call__(self, prompts: Sequence[Prompt | str] | None, answers: Sequence[str]) -> list[bool]:
        """Whether the server says yes, an answer; False where a thought was never finished, which is not sent.

        Raises:
            InputError: the server cannot be reached, refuses, or replies neither yes nor no.
        """
        return of_finished(self._verdicts, prompts, answers)

    def _verdicts(self, prompts: Sequence[Prompt | str] | None, answers: Sequence[str]) -> list[bool]:
        if self.question.template is None:
            chats = exchanges(prompts, answers)
        else:
            texts = fill(self.question.template, prompts, answers)
            chats = [[{"role": "user", "content": text}] for text in texts]
        keys = [tuple(message["content"] for message in chat) for chat in chats]
        missing = {key: chat for key, chat in zip(keys, chats, strict=True) if key not in self._known}
        with (
            ThreadPoolExecutor(self.concurrency) as pool,
            tqdm(total=len(missing), desc="judging", unit="answer", delay=5, disable=None, leave=False) as bar,
        ):
            asked = {pool.submit(self._ask, chat): key for key, chat in missing.items()}
            try:
                for future in as_completed(asked):
                    self._known[asked[future]] = future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [self._known[key] for key in keys]

    def _headers(self) -> dict[str, str]:
        if self.key_variable is None:
            return {}
        key = os.environ.get(self.key_variable, "").strip()
        # A key that HTTP cannot carry would be quoted in the library's own error.
        if not key or not key.isascii() or not key.isprintable():
            raise InputError(f"the environment variable {self.key_variable} holds no key: set it to the server's")
        return {"Authorization": f"Bearer {key}"}

    def _ask(self, chat: list[dict[str, str]]) -> bool:
        reply = split_thought(self._post({**self.options, "model": self.model, "messages": chat})).answer
        yes, no = (
            re.match(rf"\W*{re.escape(word.strip())}\b", reply, re.IGNORECASE) is not None
            for word in (self.question.yes, self.question.no)
        )
        if yes == no:
            raise InputError(
                f"judge {self.model} replied {reply[:60]!r}, neither {self.question.yes.strip()!r} nor "
                f"{self.question.no.strip()!r}: reword the question, allow more tokens, or leave that answer out"
            )
        return yes

    def _post(self, body: dict[str, Any]) -> str:
        """The reply's text."""
        try:
            # Redirects are not followed: the answers go to the url that the user gave.
            reply = self._session.post(
                self.url, json=body, headers=self._headers(), timeout=self.timeout, allow_redirects=False
            )
            if reply.status_code == 200:
                text = reply.json()["choices"][0]["message"]["content"]
                if not isinstance(text, str):
                    raise TypeError
                return text
            problem = f"answered {reply.status_code} {' '.join(reply.text.split())[:120]!r}"
        except (requests.JSONDecodeError, KeyError, IndexError, TypeError):
            problem = "sent a reply without choices[0].message.content"
        except requests.RequestException as error:
            cause = getattr(next(iter(error.args), None), "reason", None)
            if isinstance(error, requests.Timeout) or isinstance(cause, ReadTimeoutError):
                problem = f"gave no reply within {self.timeout:g} s"
            elif isinstance(error, requests.ConnectionError):
                problem = "cannot be reached"
            else:
                problem = f"cannot be asked ({type(error).__name__})"
        raise InputError(f"judge server {self.url} {problem}: check url, model and key, or try again later")
