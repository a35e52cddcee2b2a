"""Who says a message: other names of the user and of the assistant, and the names that a chat template has for them.

Formats name them in their own ways: ShareGPT `human` and `gpt`, Gemma and Gemini `model`, OpenAssistant `prompter`.
They are read as `user` and `assistant`, as trainers read them; any other role stays as it is. A template that writes
its own names whatever it is given, as Gemma's does, is given `assistant`; one that knows only another name is given
that.

Sources: LLaMA-Factory's and FastChat's ShareGPT format; Gemma's chat template.
"""

import functools
import re

OTHER_NAMES = {
    "system": (),
    "user": ("human", "prompter"),
    "assistant": ("gpt", "model", "bot", "chatbot", "chatgpt", "ai"),
}
"""Names that formats give to each role, in lower case."""
_ROLES = {name: role for role, names in OTHER_NAMES.items() for name in (role, *names)}


def role_of(name: object) -> object:
    """The role that a name stands for: `system`, `user` or `assistant`; another one as it is.

    >>> role_of("gpt"), role_of("Human"), role_of("tool")
    ('assistant', 'user', 'tool')
    """
    return _ROLES.get(name.lower(), name) if isinstance(name, str) else name


@functools.lru_cache(maxsize=64)
def names_in(template: str) -> dict[str, str]:
    """The names that a chat template has for roles whose own it does not know.

    >>> names_in("{% for m in messages %}{% if m.role == 'model' %}{{ m.content }}{% endif %}{% endfor %}")
    {'assistant': 'model'}
    """
    quoted = list(dict.fromkeys(re.findall(r"""['"](\w+)['"]""", template)))
    others = {role: next((name for name in quoted if role_of(name) == role), role) for role in OTHER_NAMES}
    return {role: name for role, name in others.items() if role not in quoted and name != role}
