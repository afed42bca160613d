"""What the words alone give away: each contrast of two prompt sets, told apart without any model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rim_core.prompts._built_in import load
from rim_core.prompts._prompt import Prompt


@dataclass(frozen=True)
class Contrast:
    """Two built-in sets that an experiment tells apart; `hard` keeps the hard pairs alone, `answers` reads those."""

    first: str
    second: str
    hard: bool = False
    answers: bool = False

    @property
    def name(self) -> str:
        """Such as "harmful-minimal / benign-minimal, hard pairs"."""
        what = ", hard pairs" if self.hard else ", the answers" if self.answers else ""
        return f"{self.first} / {self.second}{what}"


CONTRASTS = (
    Contrast("harmful", "benign"),
    Contrast("harmful-minimal", "benign-minimal"),
    Contrast("harmful-minimal", "benign-minimal", hard=True),
    Contrast("finance-risky", "finance-twins"),
    Contrast("finance-risky", "finance-info"),
    Contrast("finance-risky-minimal", "finance-twins-minimal"),
    Contrast("finance-risky-minimal", "finance-info-matched"),
    Contrast("finance-risky-minimal", "finance-disguised"),
    Contrast("finance-risky", "finance-prudent", answers=True),
    Contrast("assay-misaligned", "assay-aligned", answers=True),
)


def contrasts() -> pd.DataFrame:
    """How well the words alone tell the built-in sets apart, a row a contrast.

    `bag_of_words`: accuracy of logistic regression on which words occur, every category held out once (of hard pairs:
    trained on all pairs, counted on the hard ones); `length` and `opening`: the area under the ROC curve of the number
    of words, and the accuracy of the first word alone, learnt and held out in the same way; `n`: prompts.

    Example:
        >>> found = rim.prompts.contrasts().set_index("contrast")
        >>> bool(found.loc["harmful-minimal / benign-minimal", "bag_of_words"] < 0.7)
        True
    """
    return pd.DataFrame([_row(contrast) for contrast in CONTRASTS])


def _row(contrast: Contrast) -> dict[str, object]:
    from sklearn.metrics import roc_auc_score

    sides = [load(contrast.first), load(contrast.second)]
    prompts = [prompt for side in sides for prompt in side]
    labels = np.repeat([1, 0], [len(side) for side in sides])
    texts = [str(prompt.response) if contrast.answers else prompt.text for prompt in prompts]
    kept = np.array([prompt.hard or not contrast.hard for prompt in prompts])
    lengths = np.array([len(text.split()) for text in texts])
    return {
        "contrast": contrast.name,
        "n": int(kept.sum()),
        "bag_of_words": _held_out(texts, labels, prompts, kept),
        "length": float(roc_auc_score(labels[kept], lengths[kept])),
        "opening": _held_out([text.split()[0] for text in texts], labels, prompts, kept),
    }


def _held_out(texts: Sequence[str], labels: np.ndarray, prompts: Sequence[Prompt], kept: np.ndarray) -> float:
    """Accuracy over those kept, each predicted by what was learnt on the other categories."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

    # Counted once: a word that only the held-out category has is given no weight.
    words = CountVectorizer(binary=True, token_pattern=r"(?u)\b\w[\w'-]*\b").fit_transform(texts)
    groups = [prompt.category for prompt in prompts]
    reader = LogisticRegression(solver="liblinear")
    told = cross_val_predict(reader, words, labels, groups=groups, cv=LeaveOneGroupOut())
    return float((told == labels)[kept].mean())
