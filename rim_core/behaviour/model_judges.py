"""Judges that are models on this machine: a sequence classifier, or a language model that is asked a question."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rim_core.behaviour.judges import HARMFUL, Finding, Question, check_template, exchanges, fill, of_finished
from rim_core.behaviour.openings import next_token
from rim_core.errors import InputError
from rim_core.models.batching import by_rows
from rim_core.models.loading import keep_packed
from rim_core.models.model import Model
from rim_core.prompts import Prompt, format_chat
from rim_core.texts import ChatText, checked, continuation, encode


class ClassifierJudge:
    """A sequence-classification model: an answer is found where `label` has a probability of over one half.

    Text beyond the model's window is cut off at its end.

    Args:
        source: a local folder or a hub id; safetensors only.
        label: the name or number of the label that means yes.
        finds: what that is, `"refusal"` or `"harm"`.
        template: what is classified, with `{answer}` and, where wanted, `{prompt}` in it.
        device: `"auto"` is CUDA where there is one.

    Raises:
        InputError: a model that cannot be loaded or has no classification head, or an unknown label.

    Example:
        >>> rim.ClassifierJudge("no such folder", "refuses")
        Traceback (most recent call last):
        rim_core.errors.InputError: cannot load a classifier from no such folder: ...
    """

    def __init__(
        self,
        source: str,
        label: str | int,
        *,
        finds: Finding = "refusal",
        template: str = "{answer}",
        device: str = "auto",
    ) -> None:
        check_template(template)
        self.source, self.finds, self.template = str(source), finds, template
        where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.hf, self.tokenizer = _load_classifier(self.source, where)
        config = self.hf.config
        labels = {str(name): int(index) for index, name in config.id2label.items()}
        index = labels.get(label) if isinstance(label, str) else label
        if index is None or not 0 <= index < config.num_labels:
            raise InputError(f"{source} has no label {label!r}: it has {', '.join(labels)}")
        self.index = index
        # One output, or several that do not exclude each other, are logits of their own.
        self._separate = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        known = self.tokenizer.model_max_length
        self._window = known if known < 10**6 else getattr(config, "max_position_embeddings", None)

    def __call__(self, prompts: Sequence[Prompt | str] | None, answers: Sequence[str]) -> list[bool]:
        """Whether the label is more likely than not, an answer; False where a thought was never finished."""
        return of_finished(lambda *asked: (self.probabilities(*asked) > 0.5).tolist(), prompts, answers)

    @torch.no_grad()
    def probabilities(self, prompts: Sequence[Prompt | str] | None, answers: Sequence[str]) -> Tensor:
        """The label's probability, `[answer]`."""
        texts = checked(fill(self.template, prompts, answers), empty=True)
        # A classifier reads a whole text with the tokens at both ends that it was trained with: nothing is continued.
        ids = self.tokenizer(texts, truncation=self._window is not None, max_length=self._window).input_ids

        def run(rows: list[int]) -> Tensor:
            inputs = self.tokenizer.pad(
                {"input_ids": [ids[row] for row in rows]}, padding_side="right", return_tensors="pt"
            )
            logits = self.hf(**inputs.to(self.hf.device)).logits.float().cpu()
            return (logits.sigmoid() if self._separate else logits.softmax(-1))[:, self.index]

        return by_rows(ids, run, 4096)


def _load_classifier(source: str, device: str) -> tuple[Any, Any]:
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        hf, info = AutoModelForSequenceClassification.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False, device_map={"": device}, output_loading_info=True
        )
    except (OSError, HfHubHTTPError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot load a classifier from {source}: {reason}") from None
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{source} is no sequence classifier: it has no {missing[0]}; for a language model use PromptJudge"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    hf.config.pad_token_id = tokenizer.pad_token_id
    return keep_packed(hf.eval().requires_grad_(False)), tokenizer


class PromptJudge:
    """A language model here, asked a `Question`: which of yes and no it is likelier to say, without sampling.

    The two are compared at the first token that tells them apart, so no reply has to be parsed.

    Args:
        model: a loaded model (`rim.load`), such as a guard model or any instruct model; judging with the model that
            is judged is refused inside an intervention, and holds for the adapter then active.
        question: `HARMFUL`, `REFUSING`, `GUARD`, or one of your own.
        chat: put the question into the model's chat template; False gives the model the bare text, for judges whose
            template is their whole input.

    Example:
        >>> judge = rim.PromptJudge(model, rim.Question("Does this refuse? {answer}", yes="7", no="8", finds="refusal"))
        >>> len(rim.refusals(["I'm sorry, no.", "Sure."], judge=judge))
        2
    """

    def __init__(self, model: Model, question: Question = HARMFUL, *, chat: bool = True) -> None:
        model.require("PromptJudge", "padding")
        self.model, self.question, self.chat = model, question, chat
        self.finds: Finding = question.finds

    def __call__(self, prompts: Sequence[Prompt | str] | None, answers: Sequence[str]) -> list[bool]:
        """Whether yes is likelier than no, an answer; False where a thought was never finished."""
        return of_finished(lambda *asked: (self.log_odds(*asked) > 0).tolist(), prompts, answers)

    @torch.no_grad()
    def log_odds(self, prompts: Sequence[Prompt | str] | None, answers: Sequence[str]) -> Tensor:
        """Log-odds of yes against no, `[answer]`.

        Raises:
            InputError: inside an intervention on the judge, or where yes and no cannot be told apart.
        """
        if self.model.edits:
            raise InputError("the judge is the model under intervention: judge the answers outside of it")
        texts = self._texts(prompts, answers)
        ways = [continuation(self.model, texts[0], word) for word in (self.question.yes, self.question.no)]
        yes, no = (way or [] for way in ways)
        shared = next((i for i, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b), None)
        if shared is None:
            raise InputError(
                f"{self.model.name} cannot be asked for {self.question.yes!r} or {self.question.no!r}: as tokens one "
                "begins with the other, or merges with the text before; choose other words"
            )
        ids = [row + yes[:shared] for row in encode(self.model, texts, new_tokens=shared)]

        return next_token(self.model, ids, lambda logits: logits[:, yes[shared]] - logits[:, no[shared]])

    def _texts(self, prompts: Sequence[Prompt | str] | None, answers: Sequence[str]) -> list[str]:
        if self.question.template is not None:
            texts = fill(self.question.template, prompts, answers)
            return format_chat(self.model, texts) if self.chat else texts
        turns = exchanges(prompts, answers)
        tokenizer = self.model.tokenizer
        if not tokenizer.chat_template:
            raise InputError(f"{self.model.name} has no chat template to show an exchange in: use a template")
        return [
            ChatText(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)) for turn in turns
        ]
