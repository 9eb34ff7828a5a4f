"""What one prompt may be: text that is not blank, and that every tokenizer and every file
can take.
"""

from __future__ import annotations

from flowgym_gym.errors import OptionError, shown


def check_text(name: str, value: object, empty: bool = False) -> None:
    """Raise an OptionError unless ``value`` is a text that can be a prompt.

    Args:
        name: What the message calls the value, such as ``"negative_prompt"``.
        value: The value.
        empty: Whether a text without a visible character will do.
    """
    wrong = fault(value)
    if wrong and not (empty and isinstance(value, str) and not value.strip()):
        raise OptionError(f"{name} is {shown(value)}, {wrong}")


def fault(value: object) -> str | None:
    """What keeps ``value`` from being a prompt, as the end of an error message; None where nothing
    does.
    """
    if not isinstance(value, str):
        return "expected a text"
    if not value.strip():
        return "expected a text that is not blank"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        return (
            f"which holds {half!r}, half of a character (a lone surrogate) that no tokenizer can "
            "read; mend the text"
        )
    if "\0" in value:
        return (
            "which holds NUL, as texts that were read from another encoding do; read it again, or "
            "take NUL out"
        )
    if value.startswith("\ufeff"):
        return "which begins with a byte-order mark; read its file with encoding='utf-8-sig'"
    return None
