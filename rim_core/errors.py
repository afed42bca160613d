"""The package's errors: each message is one line that says what is wrong, where, and what to do."""


class RimError(Exception):
    """Base of every error a user can cause or meet; `rim` prints the message and exits with `exit_code`."""

    exit_code = 2


class InputError(RimError):
    """Something the user typed or a file the user named is not usable."""


class WeightsError(RimError):
    """Weights are missing, damaged, or cannot be fetched."""


class IdentityError(RimError):
    """An identity that a tool rests on does not hold for this model, so the tool refuses."""


class OpeningError(InputError):
    """An answer's opening cannot be told by its first token in this model's tokenizer."""


class RunError(RimError):
    """A notebook failed while it ran."""

    exit_code = 1


class RimWarning(UserWarning):
    """Something that can be done, and may not be what was meant."""


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says, to be told in one of the package's own."""
    return next(iter(str(error).splitlines()), type(error).__name__)
