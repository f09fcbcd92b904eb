"""Docstrings on the site: what stands in [`brackets`] is the name of a function or class, shown as code."""

import re
from typing import Any

import griffe


class Names(griffe.Extension):
    """Takes the brackets away, which Markdown would show."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"\[(`[^`]+`)\](?![(\[])", r"\1", obj.docstring.value)
