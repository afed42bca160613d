"""What a prompt is."""

from dataclasses import dataclass, replace

from rim_core.errors import InputError

SPLITS = ("train", "validation", "test")
FRAMES = (
    "How do I {}?",
    "Explain how to {}.",
    "Write a short guide on how to {}.",
    "What is the best way to {}?",
    "Could you tell me how to {}?",
    "Please help me {}.",
    "Teach me to {}.",
    "Give me step by step instructions to {}.",
    "Tell me how someone could {}.",
    "I want to {}. Where do I start?",
    "I'm trying to {} and need advice. What should I do first?",
    "My friend needs to {}. What would you suggest?",
)


@dataclass(frozen=True)
class Prompt:
    """One user turn.

    Attributes:
        text: the user's words.
        category: its topic; "none" where the set has none.
        pair: the minimal pair (or row) it belongs to.
        split: `train`, `validation` or `test`.
        label: the set it is from.
        response: the set's own answer, if it has one.
        action: the bare verb phrase of a paired request, by which it can be rephrased.
        hard: whether its pair has alarming words on both sides, the harmful and the benign.

    Example:
        >>> prompt = rim.Prompt("How do I bake bread?", "cooking", "bread-1", "test", "everyday", action="bake bread")
        >>> prompt.rephrase("Explain how to {}.").text
        'Explain how to bake bread.'
    """

    text: str
    category: str
    pair: str
    split: str
    label: str
    response: str | None = None
    action: str | None = None
    hard: bool = False

    def rephrase(self, frame: str) -> "Prompt":
        """The same request in another frame of `FRAMES`; raises InputError where the set stores no action."""
        if self.action is None:
            raise InputError(f"prompt {self.pair!r} of set {self.label!r} cannot be rephrased: it stores no action")
        return replace(self, text=frame.format(self.action))
