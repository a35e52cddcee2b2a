"""Pairs of answers, one preferred and one rejected: whether a row is the one, or the contrast of the two.

A contrast's objective is a difference of two losses, each reduced over its own supervised tokens by the gradient space
(`--reduction`):

    L(row) = L(prompt, chosen) - L(prompt, rejected),    L(prompt, answer) = mean or sum over tokens of -log p(token)

so that a row's gradient is minus that of log p(chosen | prompt) - log p(rejected | prompt): a step down it makes the
chosen answer likelier against the rejected one, and a positive score means the same as for any row. With sums it is the
direction of DPO's gradient, whose equation 7 is -beta sigmoid(r(rejected) - r(chosen)) times the gradient of that
difference: the weight is beta / 2 where the model is its own reference, as at the start of a training, or beta -> 0.

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7.
"""

from typing import Any

from whence.errors import SettingError

CHOSEN, CONTRAST = "chosen", "contrast"
PREFERENCES = {
    CHOSEN: "the chosen answer, as in fine-tuning on it",
    CONTRAST: "the chosen answer against the rejected one, as in DPO",
}
"""What a row with a preferred and a rejected answer is."""


def checked(preferences: str | None) -> str:
    """One of `PREFERENCES`; "chosen" for None.

    Raises:
        SettingError: There is no such choice.
    """
    if preferences is not None and preferences not in PREFERENCES:
        raise SettingError(f"--preferences {preferences}: choose one of {', '.join(PREFERENCES)}")
    return preferences or CHOSEN


def refuse_contrast(preferences: str | None, reason: str) -> None:
    """Refuse to compare two answers, where one of a row is read.

    Raises:
        SettingError: That is asked for, or there is no such choice.
    """
    if checked(preferences) == CONTRAST:
        raise SettingError(f"--preferences {CONTRAST}: {reason}")


def take_preferences(tokenizer: Any, preferences: str | None) -> None:
    """Say what pairs of answers are among the rows that a tokenizer reads: one of `PREFERENCES`. It is changed.

    Raises:
        SettingError: There is no such choice.
    """
    tokenizer.preferences = checked(preferences)


def preferences_of(tokenizer: Any) -> str:
    """What pairs of answers are among the rows that a tokenizer reads: one of `PREFERENCES`."""
    return getattr(tokenizer, "preferences", CHOSEN)


def same_preferences(preferences: str | None, stored: str | None, where: str) -> str:
    """What pairs of answers are among an index' rows.

    Raises:
        SettingError: Another one is asked for.
    """
    stored = stored or CHOSEN
    if preferences and checked(preferences) != stored:
        raise SettingError(f"--preferences {preferences}: the rows of {where} were read with {stored}. Leave it out.")
    return stored
